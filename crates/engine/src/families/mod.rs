//! One file for each model family: its keys of `config.json` and their checks, its tensor names,
//! and the computations that the shared layers do not have.

pub(crate) mod bert;
pub(crate) mod distilbert;
pub(crate) mod embedding_head;
pub(crate) mod modernbert;
pub(crate) mod roberta;
pub(crate) mod sentence_transformers;
pub(crate) mod tabular;

use crate::error::EngineError;
use crate::layers::{ClassificationHead, Encoder, EncoderConfig, WeightLoader};

/// A family of encoders, with the checked configuration of one model.
pub(crate) trait EncoderFamily {
    /// The sizes of the encoder.
    fn config(&self) -> &EncoderConfig;

    /// Tokens of one row that the positions allow.
    fn tokens_max(&self) -> usize {
        self.config().positions
    }

    /// Loads the encoder's weights, and those of a classification head with this many labels
    /// where one is requested.
    fn load(
        &self,
        weights: &mut WeightLoader,
        labels: Option<usize>,
    ) -> Result<LoadedEncoder, EngineError>;
}

/// An encoder with its weights.
pub(crate) struct LoadedEncoder {
    /// The family's name, for the card.
    pub(crate) family: &'static str,
    pub(crate) encoder: Box<dyn Encoder>,
    /// There when labels were requested.
    pub(crate) head: Option<ClassificationHead>,
    /// Token ids are below this.
    pub(crate) vocabulary: usize,
    /// Token types are below this; a model without token types ignores them.
    pub(crate) token_types: Option<usize>,
}

impl LoadedEncoder {
    /// An encoder of these sizes.
    fn new(
        family: &'static str,
        config: &EncoderConfig,
        encoder: impl Encoder + 'static,
        head: Option<ClassificationHead>,
    ) -> Self {
        Self {
            family,
            encoder: Box::new(encoder),
            head,
            vocabulary: config.vocabulary,
            token_types: config.token_types,
        }
    }
}
