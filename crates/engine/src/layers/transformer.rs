//! The encoder that BERT, RoBERTa and DistilBERT share: blocks of attention and a feed-forward
//! network, each followed by a norm over its sum with what came in (Vaswani and others 2017).

use super::batch::Counting;
use super::{Activation, Attention, Batch, EmbeddingNames, Linear, Norm, States, TokenEmbedding};
use crate::EngineError;
use crate::families::Encoder;
use crate::load::{Config, Weights};

/// What a family calls the parts of a block, after the block's own prefix.
pub(crate) struct BlockNames {
    /// The blocks' common prefix; the block's number and a dot follow.
    pub(crate) blocks: &'static str,
    pub(crate) queries: &'static str,
    pub(crate) keys: &'static str,
    pub(crate) values: &'static str,
    pub(crate) attention_output: &'static str,
    pub(crate) attention_norm: &'static str,
    pub(crate) up: &'static str,
    pub(crate) down: &'static str,
    pub(crate) output_norm: &'static str,
}

/// Embedding and blocks of one model.
pub(crate) struct Transformer {
    embedding: TokenEmbedding,
    blocks: Vec<Block>,
    counting: Counting,
}

impl Transformer {
    pub(crate) fn load(
        weights: &mut Weights,
        config: &Config,
        embedding: &EmbeddingNames,
        block: &BlockNames,
    ) -> Result<Self, EngineError> {
        let embedding = TokenEmbedding::load(weights, config, embedding)?;
        let blocks = (0..config.layers)
            .map(|number| Block::load(weights, config, block, number))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            embedding,
            blocks,
            counting: Counting::FromZero,
        })
    }

    /// Counts positions another way than from zero.
    pub(crate) fn counting(self, counting: Counting) -> Self {
        Self { counting, ..self }
    }
}

impl Encoder for Transformer {
    fn counting(&self) -> Counting {
        self.counting
    }

    fn depth(&self) -> usize {
        self.blocks.len()
    }

    fn embed(&self, batch: &Batch) -> Result<States, EngineError> {
        self.embedding.forward(batch)
    }

    fn layer(&self, number: usize, hidden: States, batch: &Batch) -> Result<States, EngineError> {
        match self.blocks.get(number) {
            Some(block) => block.forward(&hidden, batch),
            None => Ok(hidden),
        }
    }
}

struct Block {
    /// Queries, keys and values as one layer.
    joined: Linear,
    attention: Attention,
    attention_output: Linear,
    attention_norm: Norm,
    up: Linear,
    activation: Activation,
    down: Linear,
    output_norm: Norm,
}

impl Block {
    fn load(
        weights: &mut Weights,
        config: &Config,
        names: &BlockNames,
        number: usize,
    ) -> Result<Self, EngineError> {
        let (hidden, inner) = (config.hidden, config.intermediate);
        let prefix = weights.backbone(&format!("{}.{number}.", names.blocks));
        let full = |name: &str| format!("{prefix}{name}");
        let joined = [full(names.queries), full(names.keys), full(names.values)];
        let joined = joined.each_ref().map(String::as_str);
        let output = full(names.attention_output);
        let norm = full(names.attention_norm);
        Ok(Self {
            joined: Linear::load_joined(weights, &joined, [hidden, hidden])?,
            attention: Attention::new(weights.placement(), config.heads, None),
            attention_output: Linear::load(weights, &output, [hidden, hidden])?,
            attention_norm: Norm::load(weights, &norm, hidden, config.epsilon)?,
            up: Linear::load(weights, &full(names.up), [inner, hidden])?,
            activation: config.activation,
            down: Linear::load(weights, &full(names.down), [hidden, inner])?,
            output_norm: Norm::load(weights, &full(names.output_norm), hidden, config.epsilon)?,
        })
    }

    fn forward(&self, hidden: &States, batch: &Batch) -> Result<States, EngineError> {
        let joined = self.joined.forward(hidden)?;
        let attended = self.attention.forward(joined, batch, None)?;
        let output = self.attention_output.forward(&attended)?;
        let hidden = self.attention_norm.forward_sum(&output, hidden)?;
        let inner = self.up.forward_inner(&hidden, self.activation)?;
        let output = self.down.forward(&inner)?;
        self.output_norm.forward_sum(&output, &hidden)
    }
}
