//! The activation functions: by their names in configuration files, and on a device.

use candle_core::Tensor;

pub(crate) use crate::kernels::Activation;

use crate::error::EngineError;
use crate::files::bad_config;

impl Activation {
    /// The activation of this name under a key of `config.json`.
    ///
    /// # Errors
    /// [`EngineError::InvalidFile`] for one that is not supported.
    pub(crate) fn from_config(key: &str, name: &str) -> Result<Self, EngineError> {
        Ok(match name {
            "gelu" => Self::Gelu,
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Self::GeluTanh,
            "relu" => Self::Relu,
            "silu" | "swish" => Self::Silu,
            "tanh" => Self::Tanh,
            _ => {
                return Err(bad_config(format!(
                    "{key}: activation '{name}' is not supported: use gelu, gelu_new, \
                     gelu_pytorch_tanh, gelu_fast, relu, silu, swish or tanh"
                )));
            }
        })
    }

    /// The activation of a torch module's class name, as sentence-transformers writes it.
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

    /// The function of each element, on a device.
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
