//! The vectors of packed tokens, wherever they are.

use candle_core::{DType, Tensor};

use crate::EngineError;
use crate::kernels::{self, Matrix};

/// `[tokens, width]`: one vector for each token of a batch, or for each row once it is pooled.
pub(crate) enum States {
    /// On the processor, where the kernels work.
    Processor(Matrix),
    /// On a device of candle's.
    Device(Tensor),
}

impl States {
    /// Numbers in a vector.
    pub(crate) fn width(&self) -> Result<usize, EngineError> {
        match self {
            Self::Processor(matrix) => Ok(matrix.width()),
            Self::Device(tensor) => Ok(tensor.dim(1)?),
        }
    }

    /// All numbers as 32-bit floats, row-major.
    pub(crate) fn values(&self) -> Result<Vec<f32>, EngineError> {
        match self {
            Self::Processor(matrix) => Ok(matrix.floats().to_vec()),
            Self::Device(tensor) => {
                let floats = tensor.to_dtype(DType::F32)?;
                Ok(floats.flatten_all()?.to_vec1::<f32>()?)
            }
        }
    }

    /// The sum of two, of one shape.
    pub(crate) fn add(self, other: &Self) -> Result<Self, EngineError> {
        match (self, other) {
            (Self::Processor(a), Self::Processor(b)) => Ok(Self::Processor(kernels::add(a, b))),
            (Self::Device(a), Self::Device(b)) => Ok(Self::Device((a + b)?)),
            _ => Err(EngineError::apart()),
        }
    }

    /// The product of two, of one shape, number by number.
    pub(crate) fn multiply_each(self, other: &Self) -> Result<Self, EngineError> {
        match (self, other) {
            (Self::Processor(a), Self::Processor(b)) => {
                Ok(Self::Processor(kernels::multiply_each(a, b)))
            }
            (Self::Device(a), Self::Device(b)) => Ok(Self::Device((a * b)?)),
            _ => Err(EngineError::apart()),
        }
    }
}
