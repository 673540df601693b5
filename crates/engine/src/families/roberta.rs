//! RoBERTa (Liu and others 2019) and XLM-R (Conneau and others 2019): BERT's blocks with BERT's
//! tensor names, with positions counted from past the padding id and a head of their own.

use serde::Deserialize;

use super::{EncoderFamily, LoadedEncoder, bert};
use crate::error::EngineError;
use crate::files::{
    ConfigFile, Epsilon, Layers, Positions, TokenTypes, Vocabulary, Width, bad_config, check_heads,
};
use crate::layers::{
    Activation, ClassificationHead, EncoderConfig, HeadConfig, Pooling, PositionScheme,
    Transformer, WeightLoader,
};

/// The keys of `config.json` that RoBERTa reads.
#[derive(Deserialize)]
struct RobertaConfig {
    hidden_size: Width,
    num_hidden_layers: Layers,
    num_attention_heads: Width,
    intermediate_size: Width,
    vocab_size: Vocabulary,
    max_position_embeddings: Positions,
    pad_token_id: Option<u32>,
    type_vocab_size: Option<TokenTypes>,
    layer_norm_eps: Option<Epsilon>,
    hidden_act: Option<String>,
    position_embedding_type: Option<String>,
}

/// RoBERTa with a checked configuration.
pub(crate) struct Roberta {
    config: EncoderConfig,
    padding_id: u32,
    tokens_max: usize,
}

impl Roberta {
    /// Parses and checks the family's keys.
    pub(crate) fn read(file: &ConfigFile) -> Result<Self, EngineError> {
        let config: RobertaConfig = file.parse()?;
        check_heads(
            config.hidden_size,
            config.num_attention_heads,
            ["hidden_size", "num_attention_heads"],
        )?;
        bert::check_position_embedding(config.position_embedding_type.as_deref())?;
        let padding_id = config.pad_token_id.unwrap_or(1);
        let positions = config.max_position_embeddings.0;
        // The first token is at the position after the padding id's.
        let tokens_max = usize::try_from(padding_id)
            .ok()
            .and_then(|padding_id| positions.checked_sub(padding_id.checked_add(1)?))
            .ok_or_else(|| {
                bad_config(format!(
                    "pad_token_id is {padding_id}, but must be below max_position_embeddings, \
                     which is {positions}"
                ))
            })?;
        let activation = config.hidden_act.as_deref().unwrap_or("gelu");
        let config = EncoderConfig {
            hidden: config.hidden_size.0,
            layers: config.num_hidden_layers.0,
            heads: config.num_attention_heads.0,
            intermediate: config.intermediate_size.0,
            vocabulary: config.vocab_size.0,
            positions,
            token_types: Some(config.type_vocab_size.map_or(2, |types| types.0)),
            epsilon: config.layer_norm_eps.map_or(1e-12, |epsilon| epsilon.0),
            activation: Activation::from_config("hidden_act", activation)?,
        };
        Ok(Self {
            config,
            padding_id,
            tokens_max,
        })
    }
}

impl EncoderFamily for Roberta {
    fn config(&self) -> &EncoderConfig {
        &self.config
    }

    fn tokens_max(&self) -> usize {
        self.tokens_max
    }

    fn load(
        &self,
        weights: &mut WeightLoader,
        labels: Option<usize>,
    ) -> Result<LoadedEncoder, EngineError> {
        let config = &self.config;
        weights.find_prefix(&["", "roberta."], bert::EMBEDDING.words);
        let encoder = Transformer::load(weights, config, &bert::EMBEDDING, &bert::BLOCK)?
            .with_position_scheme(PositionScheme::PastPadding(self.padding_id));
        let head = labels.map(|labels| {
            let head = HeadConfig {
                pooling: Pooling::Cls,
                dense: "classifier.dense".to_owned(),
                dense_bias: true,
                activation: Activation::Tanh,
                norm: None,
                classifier: "classifier.out_proj",
                labels,
            };
            ClassificationHead::load(weights, config, &head)
        });
        Ok(LoadedEncoder::new(
            "roberta",
            config,
            encoder,
            head.transpose()?,
        ))
    }
}
