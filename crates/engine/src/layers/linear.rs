//! The linear layer.

use candle_core::Tensor;

use super::Activation;
use crate::EngineError;
use crate::load::Weights;

/// `x · weightᵀ + bias`, on packed tokens.
pub(crate) struct Linear {
    /// `[inputs, outputs]`. On the processor it is laid out so, which makes small batches up to
    /// six times faster; elsewhere it is a view of what checkpoints keep.
    weight: Tensor,
    /// `[outputs]`.
    bias: Option<Tensor>,
}

impl Linear {
    /// Takes `<name>.weight` of `[outputs, inputs]` and `<name>.bias`.
    pub(crate) fn load(
        weights: &mut Weights,
        name: &str,
        [outputs, inputs]: [usize; 2],
    ) -> Result<Self, EngineError> {
        Self::load_joined(weights, &[name], [outputs, inputs])
    }

    /// Takes several layers of the same shape as one whose outputs lie side by side: one large
    /// product is faster than three small ones.
    pub(crate) fn load_joined(
        weights: &mut Weights,
        names: &[&str],
        [outputs, inputs]: [usize; 2],
    ) -> Result<Self, EngineError> {
        let bias = joined(weights, names, "bias", &[outputs])?;
        let bias = weights.place(bias, &[outputs * names.len()])?;
        let joined = Self::load_unbiased(weights, names, [outputs, inputs])?;
        Ok(Self {
            bias: Some(bias),
            ..joined
        })
    }

    /// Takes the weights alone.
    pub(crate) fn load_unbiased(
        weights: &mut Weights,
        names: &[&str],
        [outputs, inputs]: [usize; 2],
    ) -> Result<Self, EngineError> {
        let values = joined(weights, names, "weight", &[outputs, inputs])?;
        let weight = weights.place(values, &[outputs * names.len(), inputs])?;
        Self::turned(&weight)
    }

    /// Takes rows `first .. first + outputs` of an unbiased layer that has `of` rows.
    pub(crate) fn load_slice(
        weights: &mut Weights,
        name: &str,
        [of, inputs]: [usize; 2],
        rows: std::ops::Range<usize>,
    ) -> Result<Self, EngineError> {
        let values = weights.values(&format!("{name}.weight"), &[of, inputs])?;
        let part = values
            .get(rows.start * inputs..rows.end * inputs)
            .unwrap_or_default();
        let weight = weights.place(part.to_vec(), &[rows.len(), inputs])?;
        Self::turned(&weight)
    }

    /// A layer of weights that are `[outputs, inputs]`.
    fn turned(weight: &Tensor) -> Result<Self, EngineError> {
        let view = weight.t()?;
        let weight = if weight.device().is_cpu() {
            view.contiguous()?
        } else {
            view
        };
        Ok(Self { weight, bias: None })
    }

    /// `[tokens, inputs]` to `[tokens, outputs]`.
    pub(crate) fn forward(&self, input: &Tensor) -> Result<Tensor, EngineError> {
        self.forward_activated(input, Activation::Identity)
    }

    /// The same, and an activation after it.
    pub(crate) fn forward_activated(
        &self,
        input: &Tensor,
        activation: Activation,
    ) -> Result<Tensor, EngineError> {
        let product = input.matmul(&self.weight)?;
        activation.with_bias(product, self.bias.as_ref())
    }

    /// The product alone, for a layer after it that adds the bias itself.
    pub(crate) fn product(&self, input: &Tensor) -> Result<Tensor, EngineError> {
        Ok(input.matmul(&self.weight)?)
    }

    /// The number format of the weights.
    pub(crate) fn dtype(&self) -> candle_core::DType {
        self.weight.dtype()
    }

    /// `[outputs]`.
    pub(crate) fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
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
