//! The card of a loaded model: its task, its inputs and outputs, and its limits.

use std::collections::BTreeMap;

use tensor::{Datatype, TensorSpec};

use crate::options::{Dtype, Task};
use crate::post::ScoreActivation;
use crate::tokenizer::{Side, Truncation};

/// The description of a loaded model, for metadata and for the validation of its inputs.
#[derive(Debug, Clone, PartialEq)]
pub struct Card {
    /// `bert`, `roberta`, `distilbert`, `modernbert` or `tabular`.
    pub family: &'static str,
    /// The task that it does.
    pub task: Task,
    /// The dtype of its weights.
    pub dtype: Dtype,
    /// `cpu`, or `cuda:` and the device's index.
    pub device: String,
    /// The instruction set of the engine's kernels, or `candle`.
    pub kernels: &'static str,
    /// Width of an embedding, or the number of labels.
    pub width: usize,
    /// Width of the hidden state of one token; 0 for a tabular model.
    pub hidden: usize,
    /// The names of the labels in the order of the scores; empty for an embedding model.
    pub labels: Vec<String>,
    /// What turns the logits of a row into its scores.
    pub activation: ScoreActivation,
    /// The same for APIs whose scores are probabilities, whatever class a CrossEncoder names.
    pub tei_activation: ScoreActivation,
    /// Whether embeddings are normalized for callers who do not say.
    pub normalize: bool,
    /// The truncation of texts that are too long, for callers who do not say.
    pub truncation: Truncation,
    /// The side that is truncated, for callers who name none.
    pub truncation_side: Side,
    /// Maximum number of tokens of one row, special tokens included; 0 for a tabular model.
    pub tokens_max: usize,
    /// Bytes of memory that the weights take on the device.
    pub weight_bytes: u64,
    /// Prompts, by name: texts to put before an input.
    pub prompts: BTreeMap<String, String>,
    /// The name of the prompt for callers who choose none.
    pub default_prompt: Option<String>,
    /// The inputs, in order.
    pub inputs: Vec<TensorSpec>,
    /// The outputs, in order.
    pub outputs: Vec<TensorSpec>,
    /// Smallest and largest value of a feature, for a tabular model that declares them.
    pub feature_range: Option<(f32, f32)>,
}

impl Card {
    /// Inputs and outputs of a text model of this task and width.
    pub(crate) fn text_tensors(task: Task, width: usize) -> (Vec<TensorSpec>, Vec<TensorSpec>) {
        let width = i64::try_from(width).unwrap_or(i64::MAX);
        let text = |name| TensorSpec::new(name, Datatype::Bytes, &[-1]);
        let floats = |name| TensorSpec::new(name, Datatype::Fp32, &[-1, width]);
        match task {
            Task::Rerank => (vec![text("query"), text("text")], vec![floats("score")]),
            Task::Classification => (vec![text("text")], vec![floats("scores")]),
            Task::Embedding | Task::Tabular => (vec![text("text")], vec![floats("embedding")]),
        }
    }
}
