//! Multilayer perceptrons over rows of numbers, for example the demo model `digits`.
//!
//! `config.json`: `model_type` is `andon_tabular`; `input` has `name`, `width` and `range`;
//! `hidden` lists the widths between; `activation`; `labels`; `outputs` names the two tensors.
//! `model.safetensors`: `layers.<number>.weight` of `[outputs, inputs]`, and `.bias`.

use candle_core::Tensor;
use serde::Deserialize;
use tensor::Datatype;

use crate::EngineError;
use crate::card::TensorSpec;
use crate::kernels::Matrix;
use crate::layers::{Activation, Linear, States};
use crate::load::{Placement, Weights, bad_config};

pub(crate) const MODEL_TYPE: &str = "andon_tabular";

const LAYERS_MAX: usize = 64;
const WIDTH_MAX: usize = 65_536;

#[derive(Deserialize)]
pub(crate) struct TabularConfig {
    input: Input,
    #[serde(default)]
    hidden: Vec<usize>,
    activation: String,
    pub(crate) labels: Vec<String>,
    outputs: Outputs,
}

#[derive(Deserialize)]
struct Input {
    name: String,
    width: usize,
    range: Option<(f32, f32)>,
}

#[derive(Deserialize)]
struct Outputs {
    probabilities: String,
    label: String,
}

impl TabularConfig {
    /// Smallest and largest value of a feature.
    pub(crate) fn range(&self) -> Result<Option<(f32, f32)>, EngineError> {
        match self.input.range {
            Some((low, high)) if low >= high => Err(bad_config("range: the first must be less")),
            range => Ok(range),
        }
    }

    /// The input and the outputs as the protocol names them.
    pub(crate) fn tensors(&self) -> (Vec<TensorSpec>, Vec<TensorSpec>) {
        let width = |width: usize| i64::try_from(width).unwrap_or(i64::MAX);
        let features = [-1, width(self.input.width)];
        let scores = [-1, width(self.labels.len())];
        (
            vec![TensorSpec::new(&self.input.name, Datatype::Fp32, &features)],
            vec![
                TensorSpec::new(&self.outputs.probabilities, Datatype::Fp32, &scores),
                TensorSpec::new(&self.outputs.label, Datatype::Int64, &[-1]),
            ],
        )
    }
}

/// A multilayer perceptron with its weights.
pub(crate) struct Tabular {
    width: usize,
    layers: Vec<Linear>,
    activation: Activation,
}

impl Tabular {
    pub(crate) fn load(config: &TabularConfig, weights: &mut Weights) -> Result<Self, EngineError> {
        let mut widths = vec![config.input.width];
        widths.extend_from_slice(&config.hidden);
        widths.push(config.labels.len());
        if widths.len() > LAYERS_MAX || widths.iter().any(|width| !(1..=WIDTH_MAX).contains(width))
        {
            return Err(bad_config(format!(
                "at most {LAYERS_MAX} layers of 1 to {WIDTH_MAX} numbers are allowed"
            )));
        }
        let activation = Activation::from_config(&config.activation)
            .ok_or_else(|| bad_config("activation is not supported"))?;
        let layers = widths
            .windows(2)
            .enumerate()
            .map(|(number, pair)| match pair {
                [inputs, outputs] => {
                    Linear::load(weights, &format!("layers.{number}"), [*outputs, *inputs])
                }
                _ => Err(bad_config("no layers")),
            });
        Ok(Self {
            width: config.input.width,
            layers: layers.collect::<Result<_, _>>()?,
            activation,
        })
    }

    /// `[rows, width]` to logits of `[rows, labels]`, both row-major.
    pub(crate) fn forward(
        &self,
        features: &[f32],
        placement: &Placement,
        go_on: &dyn Fn() -> bool,
    ) -> Result<States, EngineError> {
        let mut values = match placement {
            Placement::Processor(_) => States::Processor(Matrix::from_floats(features, self.width)),
            Placement::Device { device, dtype } => {
                let shape = (features.len() / self.width, self.width);
                let features = Tensor::from_slice(features, shape, device)?;
                States::Device(features.to_dtype(*dtype)?)
            }
        };
        for (number, layer) in self.layers.iter().enumerate() {
            if !go_on() {
                return Err(EngineError::Abandoned);
            }
            let is_last = number + 1 == self.layers.len();
            let activation = if is_last {
                Activation::Identity
            } else {
                self.activation
            };
            values = layer.forward_activated(&values, activation)?;
        }
        Ok(values)
    }

    /// Features of one row.
    pub(crate) fn width(&self) -> usize {
        self.width
    }
}
