//! The embedding layer: from token ids to vectors.

use candle_core::Tensor;

use super::{Batch, EncoderConfig, HiddenStates, LayerNorm, Placement, WeightLoader};
use crate::error::EngineError;
use crate::kernels::{self, EmbeddingLookup};

/// A family's tensor names of the embedding, after the encoder's prefix.
pub(crate) struct EmbeddingNames {
    pub(crate) words: &'static str,
    /// None for a family with rotary embeddings.
    pub(crate) positions: Option<&'static str>,
    /// None for a family without token types.
    pub(crate) token_types: Option<&'static str>,
    pub(crate) norm: &'static str,
    pub(crate) norm_bias: bool,
}

/// The sum of a token's word, position and token type embeddings, normalized.
pub(crate) struct TokenEmbedding {
    /// `[vocabulary, hidden]`.
    words: EmbeddingTable,
    /// `[positions, hidden]`.
    positions: Option<EmbeddingTable>,
    /// `[token types, hidden]`.
    token_types: Option<EmbeddingTable>,
    width: usize,
    norm: LayerNorm,
}

enum EmbeddingTable {
    Cpu(Vec<f32>),
    Device(Tensor),
}

impl TokenEmbedding {
    pub(crate) fn load(
        weights: &mut WeightLoader,
        config: &EncoderConfig,
        names: &EmbeddingNames,
    ) -> Result<Self, EngineError> {
        let mut table = |name: &str, rows| {
            let name = weights.prefixed(name);
            let values = weights.values(&name, &[rows, config.hidden])?;
            match weights.placement() {
                Placement::Cpu(_) => {
                    weights.bytes += size_of_val(&*values) as u64;
                    Ok(EmbeddingTable::Cpu(values))
                }
                Placement::Device { .. } => {
                    let table = weights.place(values, &[rows, config.hidden])?;
                    Ok::<_, EngineError>(EmbeddingTable::Device(table))
                }
            }
        };
        let words = table(names.words, config.vocabulary)?;
        let positions = names.positions.map(|name| table(name, config.positions));
        let positions = positions.transpose()?;
        let token_types = names.token_types.zip(config.token_types);
        let token_types = token_types.map(|(name, types)| table(name, types));
        let token_types = token_types.transpose()?;
        let norm = weights.prefixed(names.norm);
        let norm = if names.norm_bias {
            LayerNorm::load(weights, &norm, config.hidden, config.epsilon)?
        } else {
            LayerNorm::load_unbiased(weights, &norm, config.hidden, config.epsilon)?
        };
        Ok(Self {
            words,
            positions,
            token_types,
            width: config.hidden,
            norm,
        })
    }

    /// The embeddings of the batch's tokens, `[tokens, hidden]`.
    pub(crate) fn forward(&self, batch: &Batch) -> Result<HiddenStates, EngineError> {
        let parts = [
            (Some(&self.words), &batch.ids),
            (self.positions.as_ref(), &batch.positions),
            (self.token_types.as_ref(), &batch.type_ids),
        ];
        let mut lookups = Vec::with_capacity(parts.len());
        let mut sum: Option<Tensor> = None;
        for (table, indices) in parts {
            match table {
                Some(EmbeddingTable::Cpu(table)) => {
                    lookups.push(EmbeddingLookup { table, indices })
                }
                Some(EmbeddingTable::Device(table)) => {
                    let embeddings = table.embedding(&batch.on_device(indices)?)?;
                    sum = Some(match sum {
                        Some(sum) => (sum + embeddings)?,
                        None => embeddings,
                    });
                }
                None => {}
            }
        }
        let sum = match sum {
            Some(sum) => HiddenStates::Device(sum),
            None => HiddenStates::Cpu(kernels::embed(&lookups, batch.tokens(), self.width)),
        };
        self.norm.forward(&sum)
    }
}
