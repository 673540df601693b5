//! The encoder that BERT, RoBERTa and DistilBERT share: blocks of self-attention and a
//! feed-forward network, each with a residual connection and a norm after it (Vaswani and others
//! 2017).

use super::{
    Activation, Batch, EmbeddingNames, Encoder, EncoderConfig, ForwardPass, HiddenStates,
    LayerNorm, Linear, PositionScheme, SelfAttention, TokenEmbedding, WeightLoader,
};
use crate::error::EngineError;

/// A family's tensor names of a block, after the prefix of the block.
pub(crate) struct BlockNames {
    /// The prefix of all blocks; the number of the block and a dot follow.
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
    blocks: Vec<TransformerBlock>,
    position_scheme: PositionScheme,
}

impl Transformer {
    pub(crate) fn load(
        weights: &mut WeightLoader,
        config: &EncoderConfig,
        embedding: &EmbeddingNames,
        block: &BlockNames,
    ) -> Result<Self, EngineError> {
        let embedding = TokenEmbedding::load(weights, config, embedding)?;
        let blocks = (0..config.layers)
            .map(|number| TransformerBlock::load(weights, config, block, number))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            embedding,
            blocks,
            position_scheme: PositionScheme::FromZero,
        })
    }

    /// Counts positions by another scheme than from zero.
    pub(crate) fn with_position_scheme(self, position_scheme: PositionScheme) -> Self {
        Self {
            position_scheme,
            ..self
        }
    }
}

impl Encoder for Transformer {
    fn position_scheme(&self) -> PositionScheme {
        self.position_scheme
    }

    fn depth(&self) -> usize {
        self.blocks.len()
    }

    fn embed(&self, batch: &Batch) -> Result<HiddenStates, EngineError> {
        self.embedding.forward(batch)
    }

    fn layer(&self, number: usize, pass: &mut ForwardPass<'_>) -> Result<(), EngineError> {
        if let Some(block) = self.blocks.get(number) {
            pass.hidden = block.forward(&pass.hidden, pass.batch)?;
        }
        Ok(())
    }
}

struct TransformerBlock {
    /// Queries, keys and values as one linear layer.
    qkv: Linear,
    attention: SelfAttention,
    attention_output: Linear,
    attention_norm: LayerNorm,
    up: Linear,
    activation: Activation,
    down: Linear,
    output_norm: LayerNorm,
}

impl TransformerBlock {
    fn load(
        weights: &mut WeightLoader,
        config: &EncoderConfig,
        names: &BlockNames,
        number: usize,
    ) -> Result<Self, EngineError> {
        let (hidden, inner) = (config.hidden, config.intermediate);
        let prefix = weights.prefixed(&format!("{}.{number}.", names.blocks));
        let full = |name: &str| format!("{prefix}{name}");
        let qkv = [full(names.queries), full(names.keys), full(names.values)];
        let qkv = qkv.each_ref().map(String::as_str);
        let output = full(names.attention_output);
        let norm = full(names.attention_norm);
        Ok(Self {
            qkv: Linear::load_qkv(weights, &qkv, [hidden, hidden])?,
            attention: SelfAttention::new(weights.placement(), config.heads, None),
            attention_output: Linear::load(weights, &output, [hidden, hidden])?,
            attention_norm: LayerNorm::load(weights, &norm, hidden, config.epsilon)?,
            up: Linear::load(weights, &full(names.up), [inner, hidden])?,
            activation: config.activation,
            down: Linear::load(weights, &full(names.down), [hidden, inner])?,
            output_norm: LayerNorm::load(
                weights,
                &full(names.output_norm),
                hidden,
                config.epsilon,
            )?,
        })
    }

    fn forward(&self, hidden: &HiddenStates, batch: &Batch) -> Result<HiddenStates, EngineError> {
        let qkv = self.qkv.forward(hidden)?;
        let attended = self.attention.forward(qkv, batch, None)?;
        let output = self.attention_output.forward(&attended)?;
        let hidden = self.attention_norm.forward_sum(&output, hidden)?;
        let inner = self.up.forward_inner(&hidden, self.activation)?;
        let output = self.down.forward(&inner)?;
        self.output_norm.forward_sum(&output, &hidden)
    }
}
