//! The hidden states of packed tokens, wherever they are.

use candle_core::{DType, Tensor};

use crate::error::EngineError;
use crate::kernels::{self, Matrix};

/// `[tokens, width]`: one vector for each token of a batch, or `[rows, width]` once it is pooled.
pub(crate) enum HiddenStates {
    /// In CPU memory, for the kernels.
    Cpu(Matrix),
    /// On a device of candle's.
    Device(Tensor),
}

impl HiddenStates {
    /// Elements of a vector.
    pub(crate) fn width(&self) -> Result<usize, EngineError> {
        match self {
            Self::Cpu(matrix) => Ok(matrix.width()),
            Self::Device(tensor) => Ok(tensor.dim(1)?),
        }
    }

    /// All elements as 32-bit floats, row-major.
    pub(crate) fn values(&self) -> Result<Vec<f32>, EngineError> {
        match self {
            Self::Cpu(matrix) => Ok(matrix.floats().to_vec()),
            Self::Device(tensor) => {
                let floats = tensor.to_dtype(DType::F32)?;
                Ok(floats.flatten_all()?.to_vec1::<f32>()?)
            }
        }
    }

    /// The same vectors, each scaled to Euclidean length 1.
    pub(crate) fn normalized(&self) -> Result<Self, EngineError> {
        match self {
            Self::Cpu(matrix) => {
                let mut scaled = Matrix::from_floats(matrix.floats(), matrix.width());
                kernels::normalize_rows(&mut scaled);
                Ok(Self::Cpu(scaled))
            }
            Self::Device(tensor) => {
                // The least length that is divided by would be zero in 16 bits.
                let floats = tensor.to_dtype(DType::F32)?;
                let length = floats.sqr()?.sum_keepdim(1)?.sqrt()?;
                let length = length.clamp(1e-12f32, f32::MAX)?;
                let scaled = floats.broadcast_div(&length)?;
                Ok(Self::Device(scaled.to_dtype(tensor.dtype())?))
            }
        }
    }

    /// The element-wise sum of two of the same shape.
    pub(crate) fn add(self, other: &Self) -> Result<Self, EngineError> {
        match (self, other) {
            (Self::Cpu(a), Self::Cpu(b)) => Ok(Self::Cpu(kernels::add(a, b))),
            (Self::Device(a), Self::Device(b)) => Ok(Self::Device((a + b)?)),
            _ => Err(EngineError::device_mismatch()),
        }
    }

    /// The element-wise product of two of the same shape.
    pub(crate) fn multiply(self, other: &Self) -> Result<Self, EngineError> {
        match (self, other) {
            (Self::Cpu(a), Self::Cpu(b)) => Ok(Self::Cpu(kernels::multiply_elementwise(a, b))),
            (Self::Device(a), Self::Device(b)) => Ok(Self::Device((a * b)?)),
            _ => Err(EngineError::device_mismatch()),
        }
    }
}
