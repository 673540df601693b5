//! Multilayer perceptrons over rows of numbers, for example the demo model `digits`.
//!
//! `config.json`: `model_type` is `andon_tabular`; `input` has `name`, `width` and `range`;
//! `hidden` lists the widths of the hidden layers; `activation`; `labels`; `outputs` names the two
//! output tensors. `model.safetensors`: `layers.<number>.weight` of `[outputs, inputs]`, and
//! `.bias`.

use candle_core::Tensor;
use serde::Deserialize;
use tensor::{Datatype, TensorSpec};

use crate::card::Card;
use crate::error::EngineError;
use crate::files::{ConfigFile, bad_config};
use crate::kernels::Matrix;
use crate::layers::{Activation, HiddenStates, Linear, Placement, WeightLoader};
use crate::options::{Dtype, Task};
use crate::post::ScoreActivation;
use crate::tokenizer::{Side, Truncation};

const LAYERS_MAX: usize = 64;
const WIDTH_MAX: usize = 65_536;

/// The keys of `config.json`.
#[derive(Deserialize)]
struct TabularConfig {
    input: InputConfig,
    #[serde(default)]
    hidden: Vec<usize>,
    activation: String,
    labels: Vec<String>,
    outputs: OutputConfig,
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct InputConfig {
    name: String,
    width: usize,
    range: Option<(f32, f32)>,
}

/// The names of the output tensors.
#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct OutputConfig {
    probabilities: String,
    label: String,
}

/// A tabular model with a checked configuration.
pub(crate) struct Tabular {
    config: TabularConfig,
    /// Widths of the layers' inputs, and of the last one's outputs.
    widths: Vec<usize>,
    activation: Activation,
}

impl Tabular {
    /// Parses and checks the configuration.
    pub(crate) fn read(file: &ConfigFile) -> Result<Self, EngineError> {
        let config: TabularConfig = file.parse()?;
        if let Some((low, high)) = config.input.range
            && low >= high
        {
            return Err(bad_config(format!(
                "input.range is {low} to {high}, but must go from a smaller to a larger number"
            )));
        }
        let mut widths = vec![config.input.width];
        widths.extend_from_slice(&config.hidden);
        widths.push(config.labels.len());
        if widths.len() > LAYERS_MAX {
            return Err(bad_config(format!(
                "hidden has {} layers, but at most {} are allowed",
                config.hidden.len(),
                LAYERS_MAX - 2
            )));
        }
        if let Some(width) = widths
            .iter()
            .find(|width| !(1..=WIDTH_MAX).contains(*width))
        {
            return Err(bad_config(format!(
                "input.width, hidden and the number of labels must be from 1 to {WIDTH_MAX}, \
                 but one is {width}"
            )));
        }
        Ok(Self {
            activation: Activation::from_config("activation", &config.activation)?,
            config,
            widths,
        })
    }

    /// Loads the weights.
    pub(crate) fn load(
        self,
        weights: &mut WeightLoader,
        dtype: Dtype,
    ) -> Result<TabularModel, EngineError> {
        let mut layers = Vec::new();
        for (number, (inputs, outputs)) in self.widths.iter().zip(&self.widths[1..]).enumerate() {
            let name = format!("layers.{number}");
            layers.push(Linear::load(weights, &name, [*outputs, *inputs])?);
        }
        let placement = weights.placement().clone();
        let (inputs, outputs) = self.config.tensors();
        let scores = if self.config.labels.len() == 1 {
            ScoreActivation::Sigmoid
        } else {
            ScoreActivation::Softmax
        };
        let card = Card {
            family: "tabular",
            task: Task::Tabular,
            dtype,
            device: placement.device_name(),
            kernels: placement.kernels_name(),
            width: self.config.labels.len(),
            hidden: 0,
            feature_range: self.config.input.range,
            labels: self.config.labels,
            activation: scores,
            tei_activation: scores,
            normalize: false,
            truncation: Truncation::Refuse,
            truncation_side: Side::default(),
            tokens_max: 0,
            weight_bytes: weights.bytes,
            prompts: Default::default(),
            default_prompt: None,
            inputs,
            outputs,
        };
        Ok(TabularModel {
            card,
            placement,
            width: self.config.input.width,
            layers,
            activation: self.activation,
        })
    }
}

impl TabularConfig {
    /// The input and the outputs as the protocol names them.
    fn tensors(&self) -> (Vec<TensorSpec>, Vec<TensorSpec>) {
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

/// A multilayer perceptron: rows of features to logits. One thread owns it.
pub struct TabularModel {
    card: Card,
    placement: Placement,
    /// Features of one row.
    width: usize,
    layers: Vec<Linear>,
    activation: Activation,
}

impl TabularModel {
    /// The card of the model.
    pub fn card(&self) -> &Card {
        &self.card
    }

    /// Runs `rows` rows of features, row-major, to logits of `[rows, labels]`, row-major.
    /// `should_continue` is called before each layer.
    ///
    /// # Errors
    /// [`EngineError::InvalidInput`] when the features do not fill the rows;
    /// [`EngineError::Cancelled`] once `should_continue` returns false;
    /// [`EngineError::OutOfMemory`] and [`EngineError::Device`].
    pub fn forward(
        &mut self,
        features: &[f32],
        rows: usize,
        should_continue: &dyn Fn() -> bool,
    ) -> Result<Vec<f32>, EngineError> {
        if rows.checked_mul(self.width) != Some(features.len()) {
            return Err(EngineError::InvalidInput(format!(
                "{} features do not fill {rows} rows of {}",
                features.len(),
                self.width
            )));
        }
        if rows == 0 {
            return Ok(Vec::new());
        }
        let mut values = match &self.placement {
            Placement::Cpu(_) => HiddenStates::Cpu(Matrix::from_floats(features, self.width)),
            Placement::Device { device, dtype } => {
                let features = Tensor::from_slice(features, (rows, self.width), device)?;
                HiddenStates::Device(features.to_dtype(*dtype)?)
            }
        };
        for (number, layer) in self.layers.iter().enumerate() {
            if !should_continue() {
                return Err(EngineError::Cancelled);
            }
            let is_last = number + 1 == self.layers.len();
            let activation = if is_last {
                Activation::Identity
            } else {
                self.activation
            };
            values = layer.forward_activated(&values, activation)?;
        }
        values.values()
    }
}
