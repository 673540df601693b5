//! A loaded model, by its architecture.

use std::sync::Arc;

use crate::card::Card;
use crate::encoder::EncoderModel;
use crate::families::tabular::TabularModel;
use crate::tokenizer::Tokenizer;

/// A loaded model. One thread owns it; the thread pool of the kernels helps where there is work
/// for it.
pub enum Model {
    /// Texts to embeddings or logits.
    Encoder(Box<EncoderModel>),
    /// Rows of features to logits.
    Tabular(Box<TabularModel>),
}

impl Model {
    /// Its card: task, inputs, outputs and limits.
    pub fn card(&self) -> &Card {
        match self {
            Self::Encoder(model) => model.card(),
            Self::Tabular(model) => model.card(),
        }
    }

    /// The tokenizer of a model that reads text, which any number of threads may share.
    pub fn tokenizer(&self) -> Option<&Arc<Tokenizer>> {
        match self {
            Self::Encoder(model) => Some(model.tokenizer()),
            Self::Tabular(_) => None,
        }
    }
}
