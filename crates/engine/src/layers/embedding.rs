//! Token ids to vectors.

use candle_core::Tensor;

use super::{Batch, Norm, States};
use crate::EngineError;
use crate::kernels::{self, Lookup};
use crate::load::{Config, Placement, Weights};

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
    words: Table,
    /// `[positions, hidden]`.
    positions: Option<Table>,
    /// `[types, hidden]`.
    token_types: Option<Table>,
    width: usize,
    norm: Norm,
}

/// A table of vectors.
enum Table {
    Processor(Vec<f32>),
    Device(Tensor),
}

impl TokenEmbedding {
    pub(crate) fn load(
        weights: &mut Weights,
        config: &Config,
        names: &EmbeddingNames,
    ) -> Result<Self, EngineError> {
        let mut table = |name: &str, rows| {
            let name = weights.backbone(name);
            let values = weights.values(&name, &[rows, config.hidden])?;
            match weights.placement() {
                Placement::Processor(_) => {
                    weights.bytes += size_of_val(&*values) as u64;
                    Ok(Table::Processor(values))
                }
                Placement::Device { .. } => {
                    let table = weights.place(values, &[rows, config.hidden])?;
                    Ok::<_, EngineError>(Table::Device(table))
                }
            }
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
            width: config.hidden,
            norm,
        })
    }

    /// `[tokens, hidden]`.
    pub(crate) fn forward(&self, batch: &Batch) -> Result<States, EngineError> {
        let parts = [
            (Some(&self.words), &batch.ids),
            (self.positions.as_ref(), &batch.positions),
            (self.token_types.as_ref(), &batch.type_ids),
        ];
        let mut lookups = Vec::with_capacity(parts.len());
        let mut sum: Option<Tensor> = None;
        for (table, places) in parts {
            match table {
                Some(Table::Processor(table)) => lookups.push(Lookup { table, places }),
                Some(Table::Device(table)) => {
                    let found = table.embedding(&batch.on(places)?)?;
                    sum = Some(match sum {
                        Some(sum) => (sum + found)?,
                        None => found,
                    });
                }
                None => {}
            }
        }
        let sum = match sum {
            Some(sum) => States::Device(sum),
            None => States::Processor(kernels::embed(&lookups, batch.tokens(), self.width)),
        };
        self.norm.forward(&sum)
    }
}
