//! ModernBERT (Warner and others 2024): norms before each part of a block and not after it, rotary
//! position embeddings, layers that attend to the whole row between layers that attend to a
//! sliding window, and gated feed-forward networks (GeGLU, Shazeer 2020). No biases.

use serde::Deserialize;
use serde_json::Value;

use super::{EncoderFamily, LoadedEncoder};
use crate::error::EngineError;
use crate::files::{
    ConfigFile, Epsilon, Layers, Positions, Vocabulary, Width, bad_config, check_heads,
};
use crate::layers::{
    Activation, Batch, ClassificationHead, EmbeddingNames, Encoder, EncoderConfig, ForwardPass,
    HeadConfig, HiddenStates, LayerNorm, Linear, Pooling, RotaryConfig, RotaryEmbedding,
    SelfAttention, TokenEmbedding, WeightLoader,
};

const EMBEDDING: EmbeddingNames = EmbeddingNames {
    words: "embeddings.tok_embeddings.weight",
    positions: None,
    token_types: None,
    norm: "embeddings.norm",
    norm_bias: false,
};

/// The keys of `config.json` that ModernBERT reads: those of transformers from 4.48, and
/// `layer_types` and `rope_parameters`, which replace some of them from 5.0.
#[derive(Deserialize)]
struct ModernBertConfig {
    hidden_size: Width,
    num_hidden_layers: Layers,
    num_attention_heads: Width,
    intermediate_size: Width,
    vocab_size: Vocabulary,
    max_position_embeddings: Positions,
    norm_eps: Option<Epsilon>,
    hidden_activation: Option<String>,
    rope_theta: Option<f64>,
    global_rope_theta: Option<f64>,
    local_rope_theta: Option<f64>,
    rope_parameters: Option<Value>,
    layer_types: Option<Vec<String>>,
    global_attn_every_n_layers: Option<usize>,
    local_attention: Option<Positions>,
    classifier_pooling: Option<String>,
    classifier_activation: Option<String>,
    #[serde(default)]
    classifier_bias: bool,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    #[serde(default)]
    norm_bias: bool,
}

impl ModernBertConfig {
    fn refuse_biases(&self) -> Result<(), EngineError> {
        let biases = [
            ("attention_bias", self.attention_bias),
            ("mlp_bias", self.mlp_bias),
            ("norm_bias", self.norm_bias),
        ];
        match biases.iter().find(|(_, is_set)| *is_set) {
            Some((key, _)) => Err(bad_config(format!(
                "{key} is true, but only models without this bias are supported"
            ))),
            None => Ok(()),
        }
    }

    /// For each layer, whether it attends to the whole row.
    fn global_layers(&self) -> Result<Vec<bool>, EngineError> {
        let layers = self.num_hidden_layers.0;
        match &self.layer_types {
            Some(types) if types.len() == layers => {
                Ok(types.iter().map(|kind| kind == "full_attention").collect())
            }
            Some(types) => Err(bad_config(format!(
                "layer_types has {} layers, but num_hidden_layers is {layers}",
                types.len()
            ))),
            None => {
                let every = self.global_attn_every_n_layers.unwrap_or(3).max(1);
                Ok((0..layers).map(|layer| layer % every == 0).collect())
            }
        }
    }

    /// The base of the rotary embedding of the layers of one type.
    fn theta(&self, layer_type: &str, old: Option<f64>, default: f64) -> Result<f64, EngineError> {
        let parameters = self.rope_parameters.as_ref();
        let parameters = parameters.and_then(|types| types.get(layer_type));
        if let Some(rope_type) = parameters.and_then(|parameters| parameters.get("rope_type"))
            && rope_type.as_str() != Some("default")
        {
            return Err(bad_config(format!(
                "rope_parameters.{layer_type}.rope_type is not supported: it must be default"
            )));
        }
        let theta = parameters
            .and_then(|parameters| parameters.get("rope_theta"))
            .and_then(Value::as_f64)
            .or(old)
            .unwrap_or(default);
        if !(theta.is_finite() && theta > 1.0) {
            return Err(bad_config(format!(
                "rope_theta of {layer_type} is {theta}, but must be above 1"
            )));
        }
        Ok(theta)
    }

    fn classifier_pooling(&self) -> Result<Pooling, EngineError> {
        match self.classifier_pooling.as_deref() {
            None | Some("cls") => Ok(Pooling::Cls),
            Some("mean") => Ok(Pooling::Mean),
            Some(other) => Err(bad_config(format!(
                "classifier_pooling '{other}' is not supported: it must be cls or mean"
            ))),
        }
    }
}

/// ModernBERT with a checked configuration.
pub(crate) struct ModernBert {
    config: EncoderConfig,
    /// For each layer, whether it attends to the whole row.
    global_layers: Vec<bool>,
    global_theta: f64,
    local_theta: f64,
    /// Tokens to each side that a token sees in a layer with a sliding window.
    window: usize,
    classifier_pooling: Pooling,
    classifier_activation: Activation,
    classifier_bias: bool,
}

impl ModernBert {
    /// Parses and checks the family's keys.
    pub(crate) fn read(file: &ConfigFile) -> Result<Self, EngineError> {
        let config: ModernBertConfig = file.parse()?;
        let (hidden, heads) = (config.hidden_size, config.num_attention_heads);
        check_heads(hidden, heads, ["hidden_size", "num_attention_heads"])?;
        let head_width = hidden.0 / heads.0;
        if !head_width.is_multiple_of(2) {
            return Err(bad_config(format!(
                "hidden_size over num_attention_heads is {head_width}, but must be even for \
                 rotary embeddings"
            )));
        }
        config.refuse_biases()?;
        let activation = config.hidden_activation.as_deref().unwrap_or("gelu");
        let classifier_activation = config.classifier_activation.as_deref().unwrap_or("gelu");
        let global_theta = config.global_rope_theta.or(config.rope_theta);
        Ok(Self {
            global_layers: config.global_layers()?,
            global_theta: config.theta("full_attention", global_theta, 160_000.0)?,
            local_theta: config.theta("sliding_attention", config.local_rope_theta, 10_000.0)?,
            window: config.local_attention.map_or(128, |tokens| tokens.0) / 2,
            classifier_pooling: config.classifier_pooling()?,
            classifier_activation: Activation::from_config(
                "classifier_activation",
                classifier_activation,
            )?,
            classifier_bias: config.classifier_bias,
            config: EncoderConfig {
                hidden: hidden.0,
                layers: config.num_hidden_layers.0,
                heads: heads.0,
                intermediate: config.intermediate_size.0,
                vocabulary: config.vocab_size.0,
                positions: config.max_position_embeddings.0,
                token_types: None,
                epsilon: config.norm_eps.map_or(1e-5, |epsilon| epsilon.0),
                activation: Activation::from_config("hidden_activation", activation)?,
            },
        })
    }
}

impl EncoderFamily for ModernBert {
    fn config(&self) -> &EncoderConfig {
        &self.config
    }

    fn load(
        &self,
        weights: &mut WeightLoader,
        labels: Option<usize>,
    ) -> Result<LoadedEncoder, EngineError> {
        let config = &self.config;
        weights.find_prefix(&["", "model."], EMBEDDING.words);
        let encoder = ModernBertEncoder::load(weights, self)?;
        let head = labels.map(|labels| {
            let head = HeadConfig {
                pooling: self.classifier_pooling,
                dense: "head.dense".to_owned(),
                dense_bias: self.classifier_bias,
                activation: self.classifier_activation,
                norm: Some("head.norm"),
                classifier: "classifier",
                labels,
            };
            ClassificationHead::load(weights, config, &head)
        });
        Ok(LoadedEncoder::new(
            "modernbert",
            config,
            encoder,
            head.transpose()?,
        ))
    }
}

struct ModernBertEncoder {
    embedding: TokenEmbedding,
    blocks: Vec<ModernBertBlock>,
    final_norm: LayerNorm,
    global: RotaryEmbedding,
    local: RotaryEmbedding,
}

impl ModernBertEncoder {
    fn load(weights: &mut WeightLoader, family: &ModernBert) -> Result<Self, EngineError> {
        let config = &family.config;
        let embedding = TokenEmbedding::load(weights, config, &EMBEDDING)?;
        let blocks = family.global_layers.iter().enumerate();
        let blocks = blocks.map(|(number, is_global)| {
            let window = (!is_global).then_some(family.window);
            ModernBertBlock::load(weights, config, number, window)
        });
        let blocks = blocks.collect::<Result<_, _>>()?;
        let norm = weights.prefixed("final_norm");
        let rotary = |theta| RotaryConfig {
            positions: config.positions,
            head_width: config.hidden / config.heads,
            theta,
        };
        Ok(Self {
            embedding,
            blocks,
            final_norm: LayerNorm::load_unbiased(weights, &norm, config.hidden, config.epsilon)?,
            global: RotaryEmbedding::new(weights, rotary(family.global_theta))?,
            local: RotaryEmbedding::new(weights, rotary(family.local_theta))?,
        })
    }
}

impl Encoder for ModernBertEncoder {
    fn depth(&self) -> usize {
        self.blocks.len()
    }

    fn embed(&self, batch: &Batch) -> Result<HiddenStates, EngineError> {
        self.embedding.forward(batch)
    }

    fn layer(&self, number: usize, pass: &mut ForwardPass<'_>) -> Result<(), EngineError> {
        if let Some(block) = self.blocks.get(number) {
            let rotary = if block.is_global {
                &self.global
            } else {
                &self.local
            };
            pass.hidden = block.forward(&pass.hidden, pass.batch, rotary)?;
        }
        Ok(())
    }

    fn finish(&self, hidden: HiddenStates) -> Result<HiddenStates, EngineError> {
        self.final_norm.forward(&hidden)
    }
}

struct ModernBertBlock {
    /// Whether a token attends to its whole row, and not to a window of it.
    is_global: bool,
    /// The first block has none: the norm of the embedding is directly before it.
    attention_norm: Option<LayerNorm>,
    qkv: Linear,
    attention: SelfAttention,
    attention_output: Linear,
    inner_norm: LayerNorm,
    inner: Linear,
    activation: Activation,
    gate: Linear,
    output: Linear,
}

impl ModernBertBlock {
    fn load(
        weights: &mut WeightLoader,
        config: &EncoderConfig,
        number: usize,
        window: Option<usize>,
    ) -> Result<Self, EngineError> {
        let (hidden, inner) = (config.hidden, config.intermediate);
        let prefix = weights.prefixed(&format!("layers.{number}."));
        let full = |name: &str| format!("{prefix}{name}");
        let norm = full("attn_norm");
        let attention_norm = (number > 0)
            .then(|| LayerNorm::load_unbiased(weights, &norm, hidden, config.epsilon))
            .transpose()?;
        let qkv = full("attn.Wqkv");
        let qkv = Linear::load_fused_qkv_unbiased(weights, &qkv, [3 * hidden, hidden])?;
        let output = Linear::load_unbiased(weights, &full("attn.Wo"), [hidden, hidden])?;
        let norm = full("mlp_norm");
        let inner_norm = LayerNorm::load_unbiased(weights, &norm, hidden, config.epsilon)?;
        // The checkpoint has the inner layer and its gate as one layer.
        let both = [2 * inner, hidden];
        let wide = full("mlp.Wi");
        Ok(Self {
            is_global: window.is_none(),
            attention_norm,
            qkv,
            attention: SelfAttention::new(weights.placement(), config.heads, window),
            attention_output: output,
            inner_norm,
            inner: Linear::load_outputs_unbiased(weights, &wide, both, 0..inner)?,
            activation: config.activation,
            gate: Linear::load_outputs_unbiased(weights, &wide, both, inner..2 * inner)?,
            output: Linear::load_unbiased(weights, &full("mlp.Wo"), [hidden, inner])?,
        })
    }

    fn forward(
        &self,
        hidden: &HiddenStates,
        batch: &Batch,
        rotary: &RotaryEmbedding,
    ) -> Result<HiddenStates, EngineError> {
        let qkv = match &self.attention_norm {
            Some(norm) => self.qkv.forward(&norm.forward(hidden)?)?,
            None => self.qkv.forward(hidden)?,
        };
        let attended = self.attention.forward(qkv, batch, Some(rotary))?;
        let hidden = self.attention_output.forward(&attended)?.add(hidden)?;
        let normed = self.inner_norm.forward(&hidden)?;
        let inner = self.inner.forward_activated(&normed, self.activation)?;
        let gated = inner.multiply(&self.gate.forward(&normed)?)?;
        self.output.forward(&gated)?.add(&hidden)
    }
}
