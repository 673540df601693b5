//! Token ids to vectors.

use candle_core::Tensor;

use super::{Batch, Norm};
use crate::EngineError;
use crate::load::{Config, Weights};

/// What a family calls the tables, after the backbone's prefix.
pub(crate) struct EmbeddingNames {
    pub(crate) words: &'static str,
    pub(crate) positions: Option<&'static str>,
    pub(crate) token_types: Option<&'static str>,
    pub(crate) norm: &'static str,
}

/// The sum of a token's word, position and type vectors, normalized.
pub(crate) struct TokenEmbedding {
    /// `[vocabulary, hidden]`.
    words: Tensor,
    /// `[positions, hidden]`.
    positions: Option<Tensor>,
    /// `[types, hidden]`.
    token_types: Option<Tensor>,
    norm: Norm,
}

impl TokenEmbedding {
    pub(crate) fn load(
        weights: &mut Weights,
        config: &Config,
        names: &EmbeddingNames,
    ) -> Result<Self, EngineError> {
        let mut table = |name: &str, rows| {
            let name = weights.backbone(name);
            weights.take(&name, &[rows, config.hidden])
        };
        let words = table(names.words, config.vocabulary)?;
        let positions = names.positions.map(|name| table(name, config.positions));
        let positions = positions.transpose()?;
        let token_types = names
            .token_types
            .map(|name| table(name, config.token_types));
        let token_types = token_types.transpose()?;
        let norm = weights.backbone(names.norm);
        // Whether the norm has a bias is the family's choice, and ModernBERT's has none.
        let norm = if names.positions.is_some() {
            Norm::load(weights, &norm, config.hidden, config.epsilon)?
        } else {
            Norm::load_unbiased(weights, &norm, config.hidden, config.epsilon)?
        };
        Ok(Self {
            words,
            positions,
            token_types,
            norm,
        })
    }

    /// `[tokens, hidden]`.
    pub(crate) fn forward(&self, batch: &Batch) -> Result<Tensor, EngineError> {
        let mut sum = self.words.embedding(&batch.ids)?;
        if let Some(positions) = &self.positions {
            sum = (sum + positions.embedding(&batch.positions)?)?;
        }
        if let Some(token_types) = &self.token_types {
            sum = (sum + token_types.embedding(&batch.type_ids)?)?;
        }
        self.norm.forward(&sum)
    }
}
