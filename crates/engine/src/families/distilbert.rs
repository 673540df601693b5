//! DistilBERT (Sanh and others 2019): BERT's blocks with other names, without token types.

use serde::Deserialize;

use super::{EncoderFamily, LoadedEncoder};
use crate::error::EngineError;
use crate::files::{ConfigFile, Layers, Positions, Vocabulary, Width, check_heads};
use crate::layers::{
    Activation, BlockNames, ClassificationHead, EmbeddingNames, EncoderConfig, HeadConfig, Pooling,
    Transformer, WeightLoader,
};

const EMBEDDING: EmbeddingNames = EmbeddingNames {
    words: "embeddings.word_embeddings.weight",
    positions: Some("embeddings.position_embeddings.weight"),
    token_types: None,
    norm: "embeddings.LayerNorm",
    norm_bias: true,
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

/// The epsilon of all DistilBERT models: it is no key of their configuration.
const EPSILON: f64 = 1e-12;

/// The keys of `config.json` that DistilBERT reads; the aliases are those of transformers.
#[derive(Deserialize)]
struct DistilBertConfig {
    #[serde(alias = "hidden_size")]
    dim: Width,
    #[serde(alias = "num_hidden_layers")]
    n_layers: Layers,
    #[serde(alias = "num_attention_heads")]
    n_heads: Width,
    hidden_dim: Width,
    vocab_size: Vocabulary,
    max_position_embeddings: Positions,
    activation: Option<String>,
}

/// DistilBERT with a checked configuration.
pub(crate) struct DistilBert {
    config: EncoderConfig,
}

impl DistilBert {
    /// Parses and checks the family's keys.
    pub(crate) fn read(file: &ConfigFile) -> Result<Self, EngineError> {
        let config: DistilBertConfig = file.parse()?;
        check_heads(config.dim, config.n_heads, ["dim", "n_heads"])?;
        let activation = config.activation.as_deref().unwrap_or("gelu");
        let config = EncoderConfig {
            hidden: config.dim.0,
            layers: config.n_layers.0,
            heads: config.n_heads.0,
            intermediate: config.hidden_dim.0,
            vocabulary: config.vocab_size.0,
            positions: config.max_position_embeddings.0,
            token_types: None,
            epsilon: EPSILON,
            activation: Activation::from_config("activation", activation)?,
        };
        Ok(Self { config })
    }
}

impl EncoderFamily for DistilBert {
    fn config(&self) -> &EncoderConfig {
        &self.config
    }

    fn load(
        &self,
        weights: &mut WeightLoader,
        labels: Option<usize>,
    ) -> Result<LoadedEncoder, EngineError> {
        let config = &self.config;
        weights.find_prefix(&["", "distilbert."], EMBEDDING.words);
        let encoder = Transformer::load(weights, config, &EMBEDDING, &BLOCK)?;
        let head = labels.map(|labels| {
            let head = HeadConfig {
                pooling: Pooling::Cls,
                dense: "pre_classifier".to_owned(),
                dense_bias: true,
                activation: Activation::Relu,
                norm: None,
                classifier: "classifier",
                labels,
            };
            ClassificationHead::load(weights, config, &head)
        });
        Ok(LoadedEncoder::new(
            "distilbert",
            config,
            encoder,
            head.transpose()?,
        ))
    }
}
