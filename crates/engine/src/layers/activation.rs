//! The functions between linear layers.

use candle_core::Tensor;

use super::processor;
use crate::EngineError;

/// A function of one number, applied to each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Activation {
    /// No change.
    Identity,
    /// Gaussian error linear unit by the error function (Hendrycks and Gimpel 2016).
    Gelu,
    /// The same by its tanh approximation.
    GeluTanh,
    /// max(x, 0).
    Relu,
    /// x times its sigmoid.
    Silu,
    /// Hyperbolic tangent.
    Tanh,
}

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

    /// Adds a bias to each row of `values`, where there is one, and applies the function.
    /// `values` must be the caller's own: on the processor it is changed in place.
    pub(crate) fn with_bias(
        self,
        values: Tensor,
        bias: Option<&Tensor>,
    ) -> Result<Tensor, EngineError> {
        if processor::takes(&values) {
            return Ok(processor::bias_activation(values, bias, self)?);
        }
        let biased = match bias {
            Some(bias) => values.broadcast_add(bias)?,
            None => values,
        };
        Ok(match self {
            Self::Identity => biased,
            Self::Gelu => biased.gelu_erf()?,
            Self::GeluTanh => biased.gelu()?,
            Self::Relu => biased.relu()?,
            Self::Silu => biased.silu()?,
            Self::Tanh => biased.tanh()?,
        })
    }
}
