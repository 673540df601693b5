//! BERT (Devlin and others 2018).

use super::Built;
use crate::EngineError;
use crate::layers::{
    Activation, BlockNames, ClassificationHead, EmbeddingNames, HeadNames, Pooling, Transformer,
};
use crate::load::{RawConfig, Weights};

pub(super) const EMBEDDING: EmbeddingNames = EmbeddingNames {
    words: "embeddings.word_embeddings.weight",
    positions: Some("embeddings.position_embeddings.weight"),
    token_types: Some("embeddings.token_type_embeddings.weight"),
    norm: "embeddings.LayerNorm",
};

pub(super) const BLOCK: BlockNames = BlockNames {
    blocks: "encoder.layer",
    queries: "attention.self.query",
    keys: "attention.self.key",
    values: "attention.self.value",
    attention_output: "attention.output.dense",
    attention_norm: "attention.output.LayerNorm",
    up: "intermediate.dense",
    down: "output.dense",
    output_norm: "output.LayerNorm",
};

pub(super) fn build(
    raw: &RawConfig,
    weights: &mut Weights,
    scores: bool,
) -> Result<Built, EngineError> {
    let config = raw.checked()?;
    weights.find_prefix(&["", "bert."], EMBEDDING.words);
    let encoder = Transformer::load(weights, &config, &EMBEDDING, &BLOCK)?;
    let head = HeadNames {
        pooling: Pooling::Cls,
        dense: weights.backbone("pooler.dense"),
        dense_bias: true,
        activation: Activation::Tanh,
        norm: None,
        classifier: "classifier",
    };
    let head = scores.then(|| ClassificationHead::load(weights, &config, &head));
    Ok(Built {
        family: "bert",
        encoder: Box::new(encoder),
        head: head.transpose()?,
        tokens_max: config.positions,
        hidden: config.hidden,
        vocabulary: config.vocabulary,
        token_types: Some(config.token_types),
    })
}
