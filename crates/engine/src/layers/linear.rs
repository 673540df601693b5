//! The linear layer: a matrix multiplication (GEMM), a bias and an activation.

use candle_core::Tensor;

use super::{Activation, HiddenStates, Placement, WeightLoader};
use crate::error::EngineError;
use crate::kernels::{self, MatrixDtype, PackedWeights, WeightDtype};

/// The dtype of the weights of queries, keys and values in an int8 model: quantization of these
/// costs more of an embedding's cosine than quantization of all other layers does.
const QKV_IN_INT8: Option<WeightDtype> = Some(WeightDtype::Bf16);

/// `x · weightᵀ + bias` and an activation, on packed tokens.
pub(crate) enum Linear {
    /// For the kernels on the CPU.
    Cpu(PackedWeights),
    /// On a device: weights of `[outputs, inputs]` and a bias of `[outputs]`.
    Device {
        weight: Tensor,
        bias: Option<Tensor>,
    },
}

impl Linear {
    /// Loads `<name>.weight` of `[outputs, inputs]` and `<name>.bias`.
    pub(crate) fn load(
        weights: &mut WeightLoader,
        name: &str,
        [outputs, inputs]: [usize; 2],
    ) -> Result<Self, EngineError> {
        let bias = weights.values(&format!("{name}.bias"), &[outputs])?;
        let values = weights.values(&format!("{name}.weight"), &[outputs, inputs])?;
        Self::place(weights, &values, Some(bias), inputs, None)
    }

    /// Loads queries, keys and values, three layers of one shape, as one layer whose outputs lie
    /// side by side: one large multiplication is faster than three small ones.
    pub(crate) fn load_qkv(
        weights: &mut WeightLoader,
        names: &[&str],
        [outputs, inputs]: [usize; 2],
    ) -> Result<Self, EngineError> {
        let bias = concatenated(weights, names, "bias", &[outputs])?;
        let values = concatenated(weights, names, "weight", &[outputs, inputs])?;
        Self::place(weights, &values, Some(bias), inputs, QKV_IN_INT8)
    }

    /// Loads `<name>.weight`, without a bias.
    pub(crate) fn load_unbiased(
        weights: &mut WeightLoader,
        name: &str,
        [outputs, inputs]: [usize; 2],
    ) -> Result<Self, EngineError> {
        let values = weights.values(&format!("{name}.weight"), &[outputs, inputs])?;
        Self::place(weights, &values, None, inputs, None)
    }

    /// Loads queries, keys and values that are one layer in the checkpoint, without a bias.
    pub(crate) fn load_fused_qkv_unbiased(
        weights: &mut WeightLoader,
        name: &str,
        [outputs, inputs]: [usize; 2],
    ) -> Result<Self, EngineError> {
        let values = weights.values(&format!("{name}.weight"), &[outputs, inputs])?;
        Self::place(weights, &values, None, inputs, QKV_IN_INT8)
    }

    /// Loads some of the outputs of a layer of `[outputs, inputs]`, without a bias.
    pub(crate) fn load_outputs_unbiased(
        weights: &mut WeightLoader,
        name: &str,
        [outputs, inputs]: [usize; 2],
        rows: std::ops::Range<usize>,
    ) -> Result<Self, EngineError> {
        let values = weights.values(&format!("{name}.weight"), &[outputs, inputs])?;
        let part = values.get(rows.start * inputs..rows.end * inputs);
        Self::place(weights, part.unwrap_or_default(), None, inputs, None)
    }

    fn place(
        weights: &mut WeightLoader,
        values: &[f32],
        bias: Option<Vec<f32>>,
        inputs: usize,
        in_int8: Option<WeightDtype>,
    ) -> Result<Self, EngineError> {
        let outputs = values.len().checked_div(inputs).unwrap_or(0);
        match weights.placement().clone() {
            Placement::Cpu(cpu) => {
                let set = cpu.instructions;
                let dtype = match (cpu.dtype, in_int8) {
                    (WeightDtype::Int8, Some(higher)) => higher,
                    (dtype, _) => dtype,
                };
                let packed = PackedWeights::new(set, dtype, values, bias.as_deref(), inputs);
                weights.bytes += packed.bytes();
                Ok(Self::Cpu(packed))
            }
            Placement::Device { .. } => {
                let weight = weights.place(values.to_vec(), &[outputs, inputs])?;
                let bias = bias.map(|bias| weights.place(bias, &[outputs]));
                Ok(Self::Device {
                    weight,
                    bias: bias.transpose()?,
                })
            }
        }
    }

    /// `[tokens, inputs]` to `[tokens, outputs]`.
    pub(crate) fn forward(&self, input: &HiddenStates) -> Result<HiddenStates, EngineError> {
        self.forward_activated(input, Activation::Identity)
    }

    /// The same, followed by an activation.
    pub(crate) fn forward_activated(
        &self,
        input: &HiddenStates,
        activation: Activation,
    ) -> Result<HiddenStates, EngineError> {
        self.multiply(input, activation, MatrixDtype::F32)
    }

    /// The same, in the dtype that the next linear layer multiplies, which alone reads it.
    pub(crate) fn forward_inner(
        &self,
        input: &HiddenStates,
        activation: Activation,
    ) -> Result<HiddenStates, EngineError> {
        let dtype = match self {
            Self::Cpu(packed) => inner_dtype(packed.dtype()),
            Self::Device { .. } => MatrixDtype::F32,
        };
        self.multiply(input, activation, dtype)
    }

    fn multiply(
        &self,
        input: &HiddenStates,
        activation: Activation,
        dtype: MatrixDtype,
    ) -> Result<HiddenStates, EngineError> {
        match (self, input) {
            (Self::Cpu(packed), HiddenStates::Cpu(input)) => Ok(HiddenStates::Cpu(
                kernels::matmul(packed, input, activation, dtype),
            )),
            (Self::Device { weight, bias }, HiddenStates::Device(input)) => {
                let product = input.matmul(&weight.t()?)?;
                let biased = match bias {
                    Some(bias) => product.broadcast_add(bias)?,
                    None => product,
                };
                Ok(HiddenStates::Device(activation.forward(&biased)?))
            }
            _ => Err(EngineError::device_mismatch()),
        }
    }
}

/// The dtype of activations between two linear layers whose weights are in this dtype.
pub(crate) fn inner_dtype(dtype: WeightDtype) -> MatrixDtype {
    match dtype {
        WeightDtype::F32 => MatrixDtype::F32,
        // Int8 inputs are quantized row by row when they are multiplied: until then 16 bits are
        // enough.
        WeightDtype::Bf16 | WeightDtype::Int8 => MatrixDtype::Bf16,
    }
}

fn concatenated(
    weights: &WeightLoader,
    names: &[&str],
    part: &str,
    shape: &[usize],
) -> Result<Vec<f32>, EngineError> {
    let mut values = Vec::new();
    for name in names {
        let one = weights.values(&format!("{name}.{part}"), shape)?;
        if values.is_empty() {
            values = one;
        } else {
            values.extend_from_slice(&one);
        }
    }
    Ok(values)
}
