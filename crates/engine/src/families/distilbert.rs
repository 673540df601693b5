//! DistilBERT (Sanh and others 2019): BERT's blocks under other names, without token types.

use super::Built;
use crate::EngineError;
use crate::layers::{
    Activation, BlockNames, ClassificationHead, EmbeddingNames, HeadNames, Pooling, Transformer,
};
use crate::load::{RawConfig, Weights};

const EMBEDDING: EmbeddingNames = EmbeddingNames {
    words: "embeddings.word_embeddings.weight",
    positions: Some("embeddings.position_embeddings.weight"),
    token_types: None,
    norm: "embeddings.LayerNorm",
};

const BLOCK: BlockNames = BlockNames {
    blocks: "transformer.layer",
    queries: "attention.q_lin",
    keys: "attention.k_lin",
    values: "attention.v_lin",
    attention_output: "attention.out_lin",
    attention_norm: "sa_layer_norm",
    up: "ffn.lin1",
    down: "ffn.lin2",
    output_norm: "output_layer_norm",
};

pub(super) fn build(
    raw: &RawConfig,
    weights: &mut Weights,
    scores: bool,
) -> Result<Built, EngineError> {
    let config = raw.checked()?;
    weights.find_prefix(&["", "distilbert."], EMBEDDING.words);
    let encoder = Transformer::load(weights, &config, &EMBEDDING, &BLOCK)?;
    let head = HeadNames {
        pooling: Pooling::Cls,
        dense: "pre_classifier".to_owned(),
        dense_bias: true,
        activation: Activation::Relu,
        norm: None,
        classifier: "classifier",
    };
    let head = scores.then(|| ClassificationHead::load(weights, &config, &head));
    Ok(Built {
        family: "distilbert",
        encoder: Box::new(encoder),
        head: head.transpose()?,
        tokens_max: config.positions,
        hidden: config.hidden,
        vocabulary: config.vocabulary,
        token_types: None,
    })
}
