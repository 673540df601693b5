//! `config.json` of a transformer encoder, checked before anything is sized by it.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::folder::Folder;
use crate::EngineError;
use crate::layers::Activation;

pub(crate) const CONFIG: &str = "config.json";

const LAYERS_MAX: usize = 512;
const WIDTH_MAX: usize = 65_536;
const VOCABULARY_MAX: usize = 4_194_304;
const POSITIONS_MAX: usize = 1_048_576;
const LABELS_MAX: usize = 65_536;

/// The keys that the families share, under each of the names that they use for them.
#[derive(Debug, Deserialize)]
pub(crate) struct RawConfig {
    #[serde(default)]
    pub(crate) model_type: String,
    #[serde(default)]
    pub(crate) architectures: Vec<String>,
    hidden_size: Option<usize>,
    dim: Option<usize>,
    num_hidden_layers: Option<usize>,
    n_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    n_heads: Option<usize>,
    intermediate_size: Option<usize>,
    hidden_dim: Option<usize>,
    vocab_size: Option<usize>,
    max_position_embeddings: Option<usize>,
    type_vocab_size: Option<usize>,
    pad_token_id: Option<u32>,
    layer_norm_eps: Option<f64>,
    norm_eps: Option<f64>,
    hidden_act: Option<String>,
    hidden_activation: Option<String>,
    activation: Option<String>,
    id2label: Option<BTreeMap<String, String>>,
    num_labels: Option<usize>,
    problem_type: Option<String>,
    position_embedding_type: Option<String>,
    #[serde(default)]
    is_decoder: bool,
    // The rest is ModernBERT's.
    rope_theta: Option<f64>,
    global_rope_theta: Option<f64>,
    local_rope_theta: Option<f64>,
    rope_parameters: Option<serde_json::Value>,
    layer_types: Option<Vec<String>>,
    global_attn_every_n_layers: Option<usize>,
    local_attention: Option<usize>,
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

/// The sizes and choices of an encoder, each within its limit.
#[derive(Debug, Clone)]
pub(crate) struct Config {
    pub(crate) hidden: usize,
    pub(crate) layers: usize,
    pub(crate) heads: usize,
    pub(crate) intermediate: usize,
    pub(crate) vocabulary: usize,
    pub(crate) positions: usize,
    pub(crate) token_types: usize,
    pub(crate) padding_id: u32,
    pub(crate) epsilon: f64,
    pub(crate) activation: Activation,
    pub(crate) labels: Vec<String>,
    pub(crate) multi_label: bool,
}

/// What ModernBERT has beyond the other families.
#[derive(Debug, Clone)]
pub(crate) struct RotaryConfig {
    /// For each layer, whether it attends to the whole row.
    pub(crate) global_layers: Vec<bool>,
    pub(crate) global_theta: f64,
    pub(crate) local_theta: f64,
    /// How many tokens to each side a local layer sees.
    pub(crate) window: usize,
    /// `cls` or `mean`: what the classifier reads.
    pub(crate) classifier_pooling: String,
    pub(crate) classifier_activation: Activation,
    pub(crate) classifier_bias: bool,
}

impl RawConfig {
    pub(crate) fn read(folder: &Folder) -> Result<Self, EngineError> {
        folder.json(CONFIG)
    }

    /// The shared part, once every size is within its limit.
    pub(crate) fn checked(&self) -> Result<Config, EngineError> {
        let hidden = sized("hidden_size", self.hidden_size.or(self.dim), WIDTH_MAX)?;
        let heads = self.num_attention_heads.or(self.n_heads);
        let heads = sized("num_attention_heads", heads, WIDTH_MAX)?;
        if hidden % heads != 0 {
            return Err(bad(format!(
                "hidden_size {hidden} is no multiple of num_attention_heads {heads}"
            )));
        }
        if self.is_decoder {
            return Err(bad("is_decoder: the engine runs encoders"));
        }
        if let Some(kind) = &self.position_embedding_type
            && kind != "absolute"
            && kind != "rope"
        {
            return Err(bad(format!(
                "position_embedding_type '{kind}' is not supported"
            )));
        }
        let epsilon = self.norm_eps.or(self.layer_norm_eps).unwrap_or(1e-12);
        if !(epsilon > 0.0 && epsilon < 1.0) {
            return Err(bad("layer_norm_eps is not between 0 and 1"));
        }
        let layers = self.num_hidden_layers.or(self.n_layers);
        let intermediate = self.intermediate_size.or(self.hidden_dim);
        let activation_name = self
            .hidden_act
            .as_deref()
            .or(self.hidden_activation.as_deref())
            .or(self.activation.as_deref());
        Ok(Config {
            hidden,
            layers: sized("num_hidden_layers", layers, LAYERS_MAX)?,
            heads,
            intermediate: sized("intermediate_size", intermediate, WIDTH_MAX)?,
            vocabulary: sized("vocab_size", self.vocab_size, VOCABULARY_MAX)?,
            positions: sized(
                "max_position_embeddings",
                self.max_position_embeddings,
                POSITIONS_MAX,
            )?,
            token_types: sized(
                "type_vocab_size",
                self.type_vocab_size.or(Some(2)),
                WIDTH_MAX,
            )?,
            padding_id: self.pad_token_id.unwrap_or(0),
            epsilon,
            activation: activation(activation_name.unwrap_or("gelu"))?,
            labels: self.labels()?,
            multi_label: self.problem_type.as_deref() == Some("multi_label_classification"),
        })
    }

    fn labels(&self) -> Result<Vec<String>, EngineError> {
        if let Some(names) = &self.id2label {
            if names.is_empty() || names.len() > LABELS_MAX {
                return Err(bad(format!(
                    "id2label: 1 to {LABELS_MAX} labels are allowed"
                )));
            }
            // A map in JSON has no order of its own: the keys are the places.
            let name = |place: usize| {
                names
                    .get(&place.to_string())
                    .cloned()
                    .ok_or_else(|| bad(format!("id2label has no label {place}")))
            };
            return (0..names.len()).map(name).collect();
        }
        let count = sized("num_labels", self.num_labels.or(Some(2)), LABELS_MAX)?;
        Ok((0..count).map(|place| format!("LABEL_{place}")).collect())
    }

    /// The part that ModernBERT alone has; published with transformers 4.48, and again with
    /// other keys (`layer_types`, `rope_parameters`) from 5.0 on.
    pub(crate) fn rotary(&self, layers: usize) -> Result<RotaryConfig, EngineError> {
        if self.attention_bias || self.mlp_bias || self.norm_bias {
            return Err(bad(
                "biases in attention, feed-forward or norms are not supported",
            ));
        }
        let every = self.global_attn_every_n_layers.unwrap_or(3).max(1);
        let global_layers = match &self.layer_types {
            Some(types) if types.len() == layers => {
                types.iter().map(|kind| kind == "full_attention").collect()
            }
            Some(_) => return Err(bad("layer_types names another number of layers")),
            None => (0..layers).map(|layer| layer % every == 0).collect(),
        };
        let global = self.theta(
            "full_attention",
            self.global_rope_theta.or(self.rope_theta),
            160_000.0,
        )?;
        let local = self.theta("sliding_attention", self.local_rope_theta, 10_000.0)?;
        Ok(RotaryConfig {
            global_layers,
            global_theta: global,
            local_theta: local,
            window: sized(
                "local_attention",
                self.local_attention.or(Some(128)),
                POSITIONS_MAX,
            )? / 2,
            classifier_pooling: self
                .classifier_pooling
                .clone()
                .unwrap_or_else(|| "cls".to_owned()),
            classifier_activation: activation(
                self.classifier_activation.as_deref().unwrap_or("gelu"),
            )?,
            classifier_bias: self.classifier_bias,
        })
    }

    fn theta(&self, kind: &str, old: Option<f64>, default: f64) -> Result<f64, EngineError> {
        let new = self
            .rope_parameters
            .as_ref()
            .and_then(|kinds| kinds.get(kind));
        if let Some(rope_type) = new.and_then(|new| new.get("rope_type"))
            && rope_type.as_str() != Some("default")
        {
            return Err(bad(
                "rope_parameters: only the default rope_type is supported",
            ));
        }
        let theta = new
            .and_then(|new| new.get("rope_theta"))
            .and_then(serde_json::Value::as_f64)
            .or(old)
            .unwrap_or(default);
        if !(theta.is_finite() && theta > 1.0) {
            return Err(bad("rope_theta must be a number above 1"));
        }
        Ok(theta)
    }
}

/// A size that must be there and lie between 1 and its limit.
fn sized(key: &str, value: Option<usize>, limit: usize) -> Result<usize, EngineError> {
    match value {
        Some(size) if (1..=limit).contains(&size) => Ok(size),
        Some(size) => Err(bad(format!("{key} is {size}: it must be 1 to {limit}"))),
        None => Err(bad(format!("{key} is missing"))),
    }
}

fn activation(name: &str) -> Result<Activation, EngineError> {
    Activation::from_config(name)
        .ok_or_else(|| bad(format!("activation '{name}' is not supported")))
}

pub(crate) fn bad(reason: impl Into<String>) -> EngineError {
    EngineError::unusable(CONFIG, reason)
}
