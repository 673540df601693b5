//! The sentence-transformers files of a model folder: pooling and dense modules after an encoder,
//! a token limit, and prompts. Layout: <https://sbert.net/docs/package_reference/util.html>.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::error::EngineError;
use crate::files::{Folder, Weights, Width};
use crate::layers::{Activation, Batch, HiddenStates, Linear, Placement, Pooling, WeightLoader};

const MODULES: &str = "modules.json";
const MODULES_MAX: usize = 16;

/// The head that turns an encoder's hidden states into embeddings, and the rest of the files.
pub(crate) struct SentenceTransformer {
    pub(crate) head: EmbeddingHead,
    /// Tokens of one row, where the files limit them.
    pub(crate) tokens_max: Option<usize>,
    pub(crate) prompts: BTreeMap<String, String>,
    pub(crate) default_prompt: Option<String>,
    /// Bytes of the dense modules' weights.
    pub(crate) weight_bytes: u64,
}

/// Pooling, and the dense modules after it.
pub(crate) struct EmbeddingHead {
    pooling: Pooling,
    dense: Vec<DenseModule>,
}

/// A dense module: a linear layer and an activation.
struct DenseModule {
    linear: Linear,
    activation: Activation,
    width: usize,
}

/// One entry of `modules.json`.
#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct Module {
    path: String,
    #[serde(rename = "type")]
    class: String,
}

/// `sentence_bert_config.json`.
#[derive(Deserialize, Default)]
#[serde(expecting = "an object")]
struct TokenLimit {
    max_seq_length: Option<usize>,
}

/// `config_sentence_transformers.json`.
#[derive(Deserialize, Default)]
#[serde(expecting = "an object")]
struct Prompts {
    #[serde(default)]
    prompts: BTreeMap<String, String>,
    default_prompt_name: Option<String>,
}

/// `config.json` of a dense module.
#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct DenseConfig {
    in_features: usize,
    out_features: Width,
    #[serde(default = "has_bias")]
    bias: bool,
    activation_function: Option<String>,
}

fn has_bias() -> bool {
    true
}

impl EmbeddingHead {
    /// Width of an embedding, for hidden states of this width.
    pub(crate) fn width(&self, hidden: usize) -> usize {
        self.dense.last().map_or(hidden, |dense| dense.width)
    }

    /// `[tokens, hidden]` to embeddings of `[rows, width]`, in the batch's packed order.
    pub(crate) fn forward(
        &self,
        hidden: &HiddenStates,
        batch: &Batch,
    ) -> Result<HiddenStates, EngineError> {
        let mut pooled = self.pooling.forward(hidden, batch)?;
        for dense in &self.dense {
            pooled = dense.linear.forward_activated(&pooled, dense.activation)?;
        }
        Ok(pooled)
    }
}

impl SentenceTransformer {
    /// Whether the folder was saved by sentence-transformers.
    pub(crate) fn is_in(folder: &Folder) -> bool {
        folder.has(MODULES)
    }

    /// Reads the files, for an encoder with hidden states of this width. Without them pooling is
    /// the mean, which is the default of sentence-transformers.
    pub(crate) fn read(
        folder: &Folder,
        hidden: usize,
        placement: &Placement,
    ) -> Result<Self, EngineError> {
        let limit: TokenLimit = folder
            .optional_json("sentence_bert_config.json")?
            .unwrap_or_default();
        let prompts: Prompts = folder
            .optional_json("config_sentence_transformers.json")?
            .unwrap_or_default();
        let mut sentence = Self {
            head: EmbeddingHead {
                pooling: Pooling::Mean,
                dense: Vec::new(),
            },
            tokens_max: limit.max_seq_length,
            prompts: prompts.prompts,
            default_prompt: prompts.default_prompt_name,
            weight_bytes: 0,
        };
        let modules: Vec<Module> = folder.optional_json(MODULES)?.unwrap_or_default();
        if modules.len() > MODULES_MAX {
            return Err(invalid_modules(format!(
                "has {} modules, but at most {MODULES_MAX} are allowed",
                modules.len()
            )));
        }
        for module in &modules {
            sentence.add(folder, module, hidden, placement)?;
        }
        Ok(sentence)
    }

    fn add(
        &mut self,
        folder: &Folder,
        module: &Module,
        hidden: usize,
        placement: &Placement,
    ) -> Result<(), EngineError> {
        // Not a path: nothing outside the model folder can be named.
        let is_plain = module
            .path
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-');
        if !is_plain {
            return Err(invalid_modules(
                "the path of a module must be the name of a folder in the model folder",
            ));
        }
        match module.class.rsplit('.').next().unwrap_or_default() {
            // Whether an embedding is normalized is a parameter of the request.
            "Transformer" | "Normalize" => Ok(()),
            "Pooling" => {
                self.head.pooling = read_pooling(folder, &format!("{}/config.json", module.path))?;
                Ok(())
            }
            "Dense" => {
                let inputs = self.head.width(hidden);
                let (dense, bytes) = load_dense(folder, &module.path, inputs, placement)?;
                self.head.dense.push(dense);
                self.weight_bytes += bytes;
                Ok(())
            }
            other => Err(invalid_modules(format!(
                "module type '{other}' is not supported: use Transformer, Pooling, Dense or \
                 Normalize"
            ))),
        }
    }
}

fn read_pooling(folder: &Folder, file: &str) -> Result<Pooling, EngineError> {
    let config: BTreeMap<String, serde_json::Value> = folder.json(file)?;
    let mut modes: Vec<&str> = config
        .iter()
        .filter(|(_, value)| value.as_bool() == Some(true))
        .filter_map(|(key, _)| key.strip_prefix("pooling_mode_"))
        .collect();
    // From version 5 on the mode is one name, not a switch for each.
    modes.extend(config.get("pooling_mode").and_then(|mode| mode.as_str()));
    match modes.as_slice() {
        ["mean_tokens" | "mean"] => Ok(Pooling::Mean),
        ["cls_token" | "cls"] => Ok(Pooling::Cls),
        ["lasttoken"] => Ok(Pooling::Last),
        ["max_tokens" | "max"] => Ok(Pooling::Max),
        [] => Err(EngineError::invalid_file(
            file,
            "pooling_mode is missing: it must be mean, cls, lasttoken or max",
        )),
        [other] => Err(EngineError::invalid_file(
            file,
            format!("pooling mode '{other}' is not supported: use mean, cls, lasttoken or max"),
        )),
        _ => Err(EngineError::invalid_file(
            file,
            "several pooling modes at once are not supported: set one",
        )),
    }
}

fn load_dense(
    folder: &Folder,
    path: &str,
    inputs: usize,
    placement: &Placement,
) -> Result<(DenseModule, u64), EngineError> {
    let file = format!("{path}/config.json");
    let config: DenseConfig = folder.json(&file)?;
    if config.in_features != inputs {
        return Err(EngineError::invalid_file(
            file,
            format!(
                "in_features is {}, but the vectors before this module have width {inputs}",
                config.in_features
            ),
        ));
    }
    let activation = config.activation_function.as_deref().unwrap_or("Tanh");
    let activation = Activation::from_torch(activation).ok_or_else(|| {
        EngineError::invalid_file(
            &file,
            format!(
                "activation_function '{activation}' is not supported: use Identity, GELU, ReLU, \
                 SiLU or Tanh"
            ),
        )
    })?;
    let weights = Weights::open_file(folder, &format!("{path}/model.safetensors"))?;
    let mut weights = WeightLoader::new(weights, placement.clone());
    let width = config.out_features.0;
    let linear = if config.bias {
        Linear::load(&mut weights, "linear", [width, inputs])?
    } else {
        Linear::load_unbiased(&mut weights, "linear", [width, inputs])?
    };
    let dense = DenseModule {
        linear,
        activation,
        width,
    };
    Ok((dense, weights.bytes))
}

fn invalid_modules(reason: impl Into<String>) -> EngineError {
    EngineError::invalid_file(MODULES, reason)
}
