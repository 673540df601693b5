//! Layer normalization (Ba, Kiros and Hinton 2016).

use candle_core::Tensor;

use super::{HiddenStates, Placement, WeightLoader};
use crate::error::EngineError;
use crate::kernels::{self, InstructionSet, LayerNormParameters};

/// Scales each token to mean 0 and variance 1, then by a weight and a bias of its own.
pub(crate) struct LayerNorm {
    weights: NormWeights,
    epsilon: f32,
}

/// Weight and bias, `[width]` each.
enum NormWeights {
    /// The bias is empty where the model has none.
    Cpu(InstructionSet, Vec<f32>, Vec<f32>),
    /// The bias is zeros where the model has none.
    Device(Tensor, Tensor),
}

impl LayerNorm {
    /// Loads `<name>.weight` and `<name>.bias`, or `gamma` and `beta`, their names in checkpoints
    /// that were converted from TensorFlow.
    pub(crate) fn load(
        weights: &mut WeightLoader,
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

    /// Loads `<name>.weight`, without a bias.
    pub(crate) fn load_unbiased(
        weights: &mut WeightLoader,
        name: &str,
        width: usize,
        epsilon: f64,
    ) -> Result<Self, EngineError> {
        let weight = weights.values(&format!("{name}.weight"), &[width])?;
        Self::place(weights, weight, Vec::new(), epsilon)
    }

    fn place(
        weights: &mut WeightLoader,
        weight: Vec<f32>,
        bias: Vec<f32>,
        epsilon: f64,
    ) -> Result<Self, EngineError> {
        let width = weight.len();
        let placed = match weights.placement().clone() {
            Placement::Cpu(cpu) => {
                weights.bytes += size_of_val(&*weight) as u64 + size_of_val(&*bias) as u64;
                NormWeights::Cpu(cpu.instructions, weight, bias)
            }
            Placement::Device { .. } => {
                let weight = weights.place(weight, &[width])?;
                let bias = if bias.is_empty() {
                    weight.zeros_like()?
                } else {
                    weights.place(bias, &[width])?
                };
                NormWeights::Device(weight, bias)
            }
        };
        Ok(Self {
            weights: placed,
            epsilon: epsilon as f32,
        })
    }

    /// `[tokens, width]` to the same shape. Mean and variance are computed in 32 bits whatever the
    /// dtype.
    pub(crate) fn forward(&self, input: &HiddenStates) -> Result<HiddenStates, EngineError> {
        self.normalize(input, None)
    }

    /// Normalizes `input + added`.
    pub(crate) fn forward_sum(
        &self,
        input: &HiddenStates,
        added: &HiddenStates,
    ) -> Result<HiddenStates, EngineError> {
        self.normalize(input, Some(added))
    }

    fn normalize(
        &self,
        input: &HiddenStates,
        added: Option<&HiddenStates>,
    ) -> Result<HiddenStates, EngineError> {
        match (&self.weights, input, added) {
            (NormWeights::Cpu(set, ..), HiddenStates::Cpu(input), None) => {
                let output = kernels::layer_norm(*set, self.cpu_parameters(), input, None);
                Ok(HiddenStates::Cpu(output))
            }
            (
                NormWeights::Cpu(set, ..),
                HiddenStates::Cpu(input),
                Some(HiddenStates::Cpu(added)),
            ) => {
                let output = kernels::layer_norm(*set, self.cpu_parameters(), input, Some(added));
                Ok(HiddenStates::Cpu(output))
            }
            (NormWeights::Device(weight, bias), HiddenStates::Device(input), added) => {
                let input = match added {
                    Some(HiddenStates::Device(added)) => (input + added)?,
                    None => input.contiguous()?,
                    Some(HiddenStates::Cpu(_)) => return Err(EngineError::device_mismatch()),
                };
                let output = candle_nn::ops::layer_norm(&input, weight, bias, self.epsilon)?;
                Ok(HiddenStates::Device(output))
            }
            _ => Err(EngineError::device_mismatch()),
        }
    }

    fn cpu_parameters(&self) -> LayerNormParameters<'_> {
        let (weight, bias): (&[f32], &[f32]) = match &self.weights {
            NormWeights::Cpu(_, weight, bias) => (weight, bias),
            NormWeights::Device(..) => (&[], &[]),
        };
        LayerNormParameters {
            weight,
            bias,
            epsilon: self.epsilon,
        }
    }
}
