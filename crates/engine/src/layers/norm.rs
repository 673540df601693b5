//! Layer normalization (Ba, Kiros and Hinton 2016).

use candle_core::Tensor;

use super::processor;
use crate::EngineError;
use crate::load::Weights;

/// Scales each token to mean 0 and variance 1, then by a weight and a bias of its own.
pub(crate) struct Norm {
    /// `[width]`.
    weight: Tensor,
    /// `[width]`; zeros where the model has none.
    bias: Tensor,
    epsilon: f64,
}

impl Norm {
    /// Takes `<name>.weight` and `<name>.bias`, or `gamma` and `beta` as checkpoints that were
    /// once TensorFlow's call them.
    pub(crate) fn load(
        weights: &mut Weights,
        name: &str,
        width: usize,
        epsilon: f64,
    ) -> Result<Self, EngineError> {
        let gamma = format!("{name}.gamma");
        let (weight, bias) = if weights.has(&gamma) {
            (gamma, format!("{name}.beta"))
        } else {
            (format!("{name}.weight"), format!("{name}.bias"))
        };
        Ok(Self {
            weight: weights.take(&weight, &[width])?,
            bias: weights.take(&bias, &[width])?,
            epsilon,
        })
    }

    /// Takes `<name>.weight` alone.
    pub(crate) fn load_unbiased(
        weights: &mut Weights,
        name: &str,
        width: usize,
        epsilon: f64,
    ) -> Result<Self, EngineError> {
        let weight = weights.take(&format!("{name}.weight"), &[width])?;
        Ok(Self {
            bias: weight.zeros_like()?,
            weight,
            epsilon,
        })
    }

    /// `[tokens, width]` to the same shape. Mean and variance are taken in 32 bits whatever the
    /// number format.
    pub(crate) fn forward(&self, input: &Tensor) -> Result<Tensor, EngineError> {
        if processor::takes(input) {
            return Ok(processor::norm(input.copy()?, self.parameters(), None)?);
        }
        let input = input.contiguous()?;
        let epsilon = self.epsilon as f32;
        Ok(candle_nn::ops::layer_norm(
            &input,
            &self.weight,
            &self.bias,
            epsilon,
        )?)
    }

    /// Normalizes `input + added`, and a bias more where the layer before left it out. `input`
    /// must be the caller's own: on the processor it is changed in place.
    pub(crate) fn forward_sum(
        &self,
        input: Tensor,
        bias: Option<&Tensor>,
        added: &Tensor,
    ) -> Result<Tensor, EngineError> {
        if processor::takes(&input) && processor::takes(added) {
            return Ok(processor::norm(
                input,
                self.parameters(),
                Some((added, bias)),
            )?);
        }
        let biased = match bias {
            Some(bias) => input.broadcast_add(bias)?,
            None => input,
        };
        self.forward(&(biased + added)?)
    }

    fn parameters(&self) -> processor::NormParameters<'_> {
        processor::NormParameters {
            weight: &self.weight,
            bias: &self.bias,
            epsilon: self.epsilon as f32,
        }
    }
}
