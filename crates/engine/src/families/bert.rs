//! BERT (Devlin and others 2018).

use serde::Deserialize;

use super::{EncoderFamily, LoadedEncoder};
use crate::error::EngineError;
use crate::files::{
    ConfigFile, Epsilon, Layers, Positions, TokenTypes, Vocabulary, Width, bad_config, check_heads,
};
use crate::layers::{
    Activation, BlockNames, ClassificationHead, EmbeddingNames, EncoderConfig, HeadConfig, Pooling,
    Transformer, WeightLoader,
};

pub(super) const EMBEDDING: EmbeddingNames = EmbeddingNames {
    words: "embeddings.word_embeddings.weight",
    positions: Some("embeddings.position_embeddings.weight"),
    token_types: Some("embeddings.token_type_embeddings.weight"),
    norm: "embeddings.LayerNorm",
    norm_bias: true,
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

/// The keys of `config.json` that BERT reads.
#[derive(Deserialize)]
struct BertConfig {
    hidden_size: Width,
    num_hidden_layers: Layers,
    num_attention_heads: Width,
    intermediate_size: Width,
    vocab_size: Vocabulary,
    max_position_embeddings: Positions,
    type_vocab_size: Option<TokenTypes>,
    layer_norm_eps: Option<Epsilon>,
    hidden_act: Option<String>,
    position_embedding_type: Option<String>,
}

/// BERT with a checked configuration.
pub(crate) struct Bert {
    config: EncoderConfig,
}

impl Bert {
    /// Parses and checks the family's keys.
    pub(crate) fn read(file: &ConfigFile) -> Result<Self, EngineError> {
        let config: BertConfig = file.parse()?;
        check_heads(
            config.hidden_size,
            config.num_attention_heads,
            ["hidden_size", "num_attention_heads"],
        )?;
        check_position_embedding(config.position_embedding_type.as_deref())?;
        let activation = config.hidden_act.as_deref().unwrap_or("gelu");
        let config = EncoderConfig {
            hidden: config.hidden_size.0,
            layers: config.num_hidden_layers.0,
            heads: config.num_attention_heads.0,
            intermediate: config.intermediate_size.0,
            vocabulary: config.vocab_size.0,
            positions: config.max_position_embeddings.0,
            token_types: Some(config.type_vocab_size.map_or(2, |types| types.0)),
            epsilon: config.layer_norm_eps.map_or(1e-12, |epsilon| epsilon.0),
            activation: Activation::from_config("hidden_act", activation)?,
        };
        Ok(Self { config })
    }
}

impl EncoderFamily for Bert {
    fn config(&self) -> &EncoderConfig {
        &self.config
    }

    fn load(
        &self,
        weights: &mut WeightLoader,
        labels: Option<usize>,
    ) -> Result<LoadedEncoder, EngineError> {
        let config = &self.config;
        weights.find_prefix(&["", "bert."], EMBEDDING.words);
        let encoder = Transformer::load(weights, config, &EMBEDDING, &BLOCK)?;
        let head = labels.map(|labels| {
            let head = HeadConfig {
                pooling: Pooling::Cls,
                dense: weights.prefixed("pooler.dense"),
                dense_bias: true,
                activation: Activation::Tanh,
                norm: None,
                classifier: "classifier",
                labels,
            };
            ClassificationHead::load(weights, config, &head)
        });
        Ok(LoadedEncoder::new(
            "bert",
            config,
            encoder,
            head.transpose()?,
        ))
    }
}

/// Refuses relative positions, which BERT and RoBERTa may be trained with.
pub(super) fn check_position_embedding(kind: Option<&str>) -> Result<(), EngineError> {
    match kind {
        None | Some("absolute") => Ok(()),
        Some(other) => Err(bad_config(format!(
            "position_embedding_type '{other}' is not supported: it must be absolute"
        ))),
    }
}
