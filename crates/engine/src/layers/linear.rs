//! The linear layer.

use candle_core::Tensor;

use super::{Activation, States};
use crate::EngineError;
use crate::kernels::{self, Format, Packed, Precision};
use crate::load::{Placement, Weights};

/// What queries, keys and values are kept in where a model is of 8-bit integers: rounding them
/// costs more of an embedding's cosine than rounding all other layers does.
const ATTENTION_IN_INT8: Option<Precision> = Some(Precision::Bf16);

/// `x · weightᵀ + bias` and an activation, on packed tokens.
pub(crate) enum Linear {
    /// For the processor's kernels.
    Processor(Packed),
    /// For a device: weights of `[outputs, inputs]` and a bias of `[outputs]`.
    Device {
        weight: Tensor,
        bias: Option<Tensor>,
    },
}

impl Linear {
    /// Takes `<name>.weight` of `[outputs, inputs]` and `<name>.bias`.
    pub(crate) fn load(
        weights: &mut Weights,
        name: &str,
        [outputs, inputs]: [usize; 2],
    ) -> Result<Self, EngineError> {
        let bias = weights.values(&format!("{name}.bias"), &[outputs])?;
        let values = weights.values(&format!("{name}.weight"), &[outputs, inputs])?;
        Self::place(weights, (&values, Some(bias)), inputs, None)
    }

    /// Takes queries, keys and values, layers of one shape, as one whose outputs lie side by
    /// side: one large product is faster than three small ones.
    pub(crate) fn load_joined(
        weights: &mut Weights,
        names: &[&str],
        [outputs, inputs]: [usize; 2],
    ) -> Result<Self, EngineError> {
        let bias = joined(weights, names, "bias", &[outputs])?;
        let values = joined(weights, names, "weight", &[outputs, inputs])?;
        Self::place(weights, (&values, Some(bias)), inputs, ATTENTION_IN_INT8)
    }

    /// Takes the weights alone.
    pub(crate) fn load_unbiased(
        weights: &mut Weights,
        name: &str,
        [outputs, inputs]: [usize; 2],
    ) -> Result<Self, EngineError> {
        let values = weights.values(&format!("{name}.weight"), &[outputs, inputs])?;
        Self::place(weights, (&values, None), inputs, None)
    }

    /// Takes queries, keys and values that the checkpoint keeps as one layer, without a bias.
    pub(crate) fn load_joined_unbiased(
        weights: &mut Weights,
        name: &str,
        [outputs, inputs]: [usize; 2],
    ) -> Result<Self, EngineError> {
        let values = weights.values(&format!("{name}.weight"), &[outputs, inputs])?;
        Self::place(weights, (&values, None), inputs, ATTENTION_IN_INT8)
    }

    /// Takes rows `first .. first + outputs` of an unbiased layer that has `of` rows.
    pub(crate) fn load_slice(
        weights: &mut Weights,
        name: &str,
        [of, inputs]: [usize; 2],
        rows: std::ops::Range<usize>,
    ) -> Result<Self, EngineError> {
        let values = weights.values(&format!("{name}.weight"), &[of, inputs])?;
        let part = values.get(rows.start * inputs..rows.end * inputs);
        Self::place(weights, (part.unwrap_or_default(), None), inputs, None)
    }

    fn place(
        weights: &mut Weights,
        (values, bias): (&[f32], Option<Vec<f32>>),
        inputs: usize,
        in_int8: Option<Precision>,
    ) -> Result<Self, EngineError> {
        let outputs = values.len().checked_div(inputs).unwrap_or(0);
        match weights.placement().clone() {
            Placement::Processor(way) => {
                let set = way.instructions;
                let precision = match (way.precision, in_int8) {
                    (Precision::Int8, Some(higher)) => higher,
                    (precision, _) => precision,
                };
                let packed = Packed::new(set, precision, values, bias.as_deref(), inputs);
                weights.bytes += packed.bytes();
                Ok(Self::Processor(packed))
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
    pub(crate) fn forward(&self, input: &States) -> Result<States, EngineError> {
        self.forward_activated(input, Activation::Identity)
    }

    /// The same, and an activation after it.
    pub(crate) fn forward_activated(
        &self,
        input: &States,
        activation: Activation,
    ) -> Result<States, EngineError> {
        self.product(input, activation, Format::F32)
    }

    /// The same, in the number format of another linear layer that alone reads it.
    pub(crate) fn forward_inner(
        &self,
        input: &States,
        activation: Activation,
    ) -> Result<States, EngineError> {
        let format = match self {
            Self::Processor(packed) => inner_format(packed.precision()),
            Self::Device { .. } => Format::F32,
        };
        self.product(input, activation, format)
    }

    fn product(
        &self,
        input: &States,
        activation: Activation,
        format: Format,
    ) -> Result<States, EngineError> {
        match (self, input) {
            (Self::Processor(packed), States::Processor(input)) => Ok(States::Processor(
                kernels::multiply(packed, input, activation, format),
            )),
            (Self::Device { weight, bias }, States::Device(input)) => {
                let product = input.matmul(&weight.t()?)?;
                let biased = match bias {
                    Some(bias) => product.broadcast_add(bias)?,
                    None => product,
                };
                Ok(States::Device(activation.forward(&biased)?))
            }
            _ => Err(EngineError::apart()),
        }
    }
}

/// The number format between two linear layers of this precision.
pub(crate) fn inner_format(precision: Precision) -> Format {
    match precision {
        Precision::F32 => Format::F32,
        // 8-bit inputs are rounded row by row from what is there: half the memory is enough.
        Precision::Bf16 | Precision::Int8 => Format::Bf16,
    }
}

fn joined(
    weights: &Weights,
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
