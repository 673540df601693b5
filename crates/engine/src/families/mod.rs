//! One file for each model family: what its configuration means, what its tensors are called,
//! and what it does that the shared layers do not.

mod bert;
mod distilbert;
mod modernbert;
mod roberta;
pub(crate) mod tabular;

use crate::EngineError;
use crate::layers::{Batch, ClassificationHead, Counting, States};
use crate::load::{RawConfig, Weights, bad_config};

/// A stack of layers that turns packed token ids into packed hidden states. The network walks
/// it layer by layer, so that a forward pass can stop between two.
pub(crate) trait Encoder: Send + Sync {
    /// How the family counts positions.
    fn counting(&self) -> Counting {
        Counting::FromZero
    }

    /// Layers after the embedding.
    fn depth(&self) -> usize;

    /// `[tokens, hidden]` before the first layer.
    fn embed(&self, batch: &Batch) -> Result<States, EngineError>;

    /// One layer, `[tokens, hidden]` to the same.
    fn layer(&self, number: usize, hidden: States, batch: &Batch) -> Result<States, EngineError>;

    /// What comes after the last layer.
    fn finish(&self, hidden: States) -> Result<States, EngineError> {
        Ok(hidden)
    }
}

/// An encoder with its weights.
pub(crate) struct Built {
    pub(crate) family: &'static str,
    pub(crate) encoder: Box<dyn Encoder>,
    /// There when scores were asked for.
    pub(crate) head: Option<ClassificationHead>,
    /// Tokens that the positions allow in one row.
    pub(crate) tokens_max: usize,
    /// Width of a hidden state.
    pub(crate) hidden: usize,
    /// Token ids below this are known.
    pub(crate) vocabulary: usize,
    /// Token types below this are known; where there are none, they are ignored.
    pub(crate) token_types: Option<usize>,
}

/// Builds the encoder that `config.json` names, and its scoring head where `scores` says so.
pub(crate) fn build(
    raw: &RawConfig,
    weights: &mut Weights,
    scores: bool,
) -> Result<Built, EngineError> {
    match raw.model_type.as_str() {
        "bert" => bert::build(raw, weights, scores),
        "roberta" | "xlm-roberta" | "camembert" => roberta::build(raw, weights, scores),
        "distilbert" => distilbert::build(raw, weights, scores),
        "modernbert" => modernbert::build(raw, weights, scores),
        other => Err(bad_config(format!(
            "model_type '{other}' is not supported: use bert, roberta, xlm-roberta, distilbert, modernbert or andon_tabular"
        ))),
    }
}
