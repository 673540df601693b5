//! Layer normalization (Ba, Kiros and Hinton 2016).

use candle_core::Tensor;

use super::States;
use crate::EngineError;
use crate::kernels::{self, Instructions, NormParameters};
use crate::load::{Placement, Weights};

/// Scales each token to mean 0 and variance 1, then by a weight and a bias of its own.
pub(crate) struct Norm {
    parameters: Parameters,
    epsilon: f32,
}

/// Weight and bias, `[width]` each.
enum Parameters {
    /// The bias is empty where the model has none.
    Processor(Instructions, Vec<f32>, Vec<f32>),
    /// The bias is zeros where the model has none.
    Device(Tensor, Tensor),
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
        let weight = weights.values(&weight, &[width])?;
        let bias = weights.values(&bias, &[width])?;
        Self::place(weights, weight, bias, epsilon)
    }

    /// Takes `<name>.weight` alone.
    pub(crate) fn load_unbiased(
        weights: &mut Weights,
        name: &str,
        width: usize,
        epsilon: f64,
    ) -> Result<Self, EngineError> {
        let weight = weights.values(&format!("{name}.weight"), &[width])?;
        Self::place(weights, weight, Vec::new(), epsilon)
    }

    fn place(
        weights: &mut Weights,
        weight: Vec<f32>,
        bias: Vec<f32>,
        epsilon: f64,
    ) -> Result<Self, EngineError> {
        let width = weight.len();
        let parameters = match weights.placement().clone() {
            Placement::Processor(way) => {
                weights.bytes += size_of_val(&*weight) as u64 + size_of_val(&*bias) as u64;
                Parameters::Processor(way.instructions, weight, bias)
            }
            Placement::Device { .. } => {
                let weight = weights.place(weight, &[width])?;
                let bias = if bias.is_empty() {
                    weight.zeros_like()?
                } else {
                    weights.place(bias, &[width])?
                };
                Parameters::Device(weight, bias)
            }
        };
        Ok(Self {
            parameters,
            epsilon: epsilon as f32,
        })
    }

    /// `[tokens, width]` to the same shape. Mean and variance are taken in 32 bits whatever the
    /// number format.
    pub(crate) fn forward(&self, input: &States) -> Result<States, EngineError> {
        self.normalize(input, None)
    }

    /// Normalizes `input + added`.
    pub(crate) fn forward_sum(
        &self,
        input: &States,
        added: &States,
    ) -> Result<States, EngineError> {
        self.normalize(input, Some(added))
    }

    fn normalize(&self, input: &States, added: Option<&States>) -> Result<States, EngineError> {
        match (&self.parameters, input, added) {
            (Parameters::Processor(set, ..), States::Processor(input), None) => {
                let output = kernels::norm(*set, self.of_processor(), input, None);
                Ok(States::Processor(output))
            }
            (
                Parameters::Processor(set, ..),
                States::Processor(input),
                Some(States::Processor(added)),
            ) => {
                let output = kernels::norm(*set, self.of_processor(), input, Some(added));
                Ok(States::Processor(output))
            }
            (Parameters::Device(weight, bias), States::Device(input), added) => {
                let input = match added {
                    Some(States::Device(added)) => (input + added)?,
                    None => input.contiguous()?,
                    Some(States::Processor(_)) => return Err(EngineError::apart()),
                };
                let output = candle_nn::ops::layer_norm(&input, weight, bias, self.epsilon)?;
                Ok(States::Device(output))
            }
            _ => Err(EngineError::apart()),
        }
    }

    fn of_processor(&self) -> NormParameters<'_> {
        let (weight, bias): (&[f32], &[f32]) = match &self.parameters {
            Parameters::Processor(_, weight, bias) => (weight, bias),
            Parameters::Device(..) => (&[], &[]),
        };
        NormParameters {
            weight,
            bias,
            epsilon: self.epsilon,
        }
    }
}
