//! What a loaded model says about itself.

use std::collections::BTreeMap;

use tensor::Datatype;

use crate::{Dtype, Task};

/// One input or output of a model, as the Open Inference Protocol names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// The tensor's name.
    pub name: String,
    /// The datatype of its elements.
    pub datatype: Datatype,
    /// Its shape; the leading -1 counts the rows of a batch.
    pub shape: Vec<i64>,
}

impl TensorSpec {
    pub(crate) fn new(name: &str, datatype: Datatype, shape: &[i64]) -> Self {
        Self {
            name: name.to_owned(),
            datatype,
            shape: shape.to_vec(),
        }
    }
}

/// What a model is, for metadata and for the checks of its callers.
#[derive(Debug, Clone, PartialEq)]
pub struct Card {
    /// `bert`, `roberta`, `distilbert`, `modernbert` or `tabular`.
    pub family: &'static str,
    /// What the model is for.
    pub task: Task,
    /// The number format of its weights.
    pub dtype: Dtype,
    /// `cpu`, or `cuda:` and the device's index.
    pub device: String,
    /// What computes: an instruction set of our kernels by its name, or `candle`.
    pub kernels: &'static str,
    /// Width of an embedding, or the number of labels.
    pub width: usize,
    /// Width of one token's hidden state; 0 for a tabular model.
    pub hidden: usize,
    /// The labels' names, in score order; empty for an embedding model.
    pub labels: Vec<String>,
    /// Whether each label is decided on its own: scores then take a sigmoid, not a softmax.
    pub multi_label: bool,
    /// Tokens that one row may have, special ones included; 0 for a tabular model.
    pub tokens_max: usize,
    /// Bytes of the weights on the device.
    pub weight_bytes: u64,
    /// Texts to put before an input, by the name of their use.
    pub prompts: BTreeMap<String, String>,
    /// The prompt that is used where the caller names none.
    pub default_prompt: Option<String>,
    /// The inputs, in order.
    pub inputs: Vec<TensorSpec>,
    /// The outputs, in order.
    pub outputs: Vec<TensorSpec>,
    /// Smallest and largest value of a feature, for a tabular model that names them.
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
