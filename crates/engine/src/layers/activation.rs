//! The functions between linear layers.

use candle_core::Tensor;

pub(crate) use crate::kernels::Activation;

use crate::EngineError;

impl Activation {
    /// The activation that a `config.json` calls by this name.
    pub(crate) fn from_config(name: &str) -> Option<Self> {
        Some(match name {
            "gelu" => Self::Gelu,
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Self::GeluTanh,
            "relu" => Self::Relu,
            "silu" | "swish" => Self::Silu,
            "tanh" => Self::Tanh,
            _ => return None,
        })
    }

    /// The activation that a sentence-transformers module calls by this name.
    pub(crate) fn from_torch(name: &str) -> Option<Self> {
        Some(match name.rsplit('.').next()? {
            "Identity" => Self::Identity,
            "GELU" => Self::Gelu,
            "ReLU" => Self::Relu,
            "SiLU" => Self::Silu,
            "Tanh" => Self::Tanh,
            _ => return None,
        })
    }

    /// The function of each number, on a device.
    pub(crate) fn forward(self, values: &Tensor) -> Result<Tensor, EngineError> {
        Ok(match self {
            Self::Identity => values.clone(),
            Self::Gelu => values.gelu_erf()?,
            Self::GeluTanh => values.gelu()?,
            Self::Relu => values.relu()?,
            Self::Silu => values.silu()?,
            Self::Tanh => values.tanh()?,
        })
    }
}
