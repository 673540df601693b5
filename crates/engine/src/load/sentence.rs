//! What the sentence-transformers files of a folder say: pooling, dense modules, the token
//! limit and prompts. Layout: <https://sbert.net/docs/package_reference/util.html>.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::folder::Folder;
use super::weights::{Placement, Weights};
use crate::EngineError;
use crate::layers::{Activation, Linear, Pooling, States};

const MODULES: &str = "modules.json";
const MODULES_MAX: usize = 16;
const WIDTH_MAX: usize = 65_536;

/// A dense layer after pooling.
pub(crate) struct Dense {
    linear: Linear,
    activation: Activation,
    width: usize,
}

impl Dense {
    pub(crate) fn forward(&self, input: &States) -> Result<States, EngineError> {
        self.linear.forward_activated(input, self.activation)
    }
}

/// How a folder's hidden states become embeddings.
pub(crate) struct Sentence {
    pub(crate) pooling: Pooling,
    pub(crate) dense: Vec<Dense>,
    /// Tokens of one row, where the files limit them.
    pub(crate) tokens_max: Option<usize>,
    pub(crate) prompts: BTreeMap<String, String>,
    pub(crate) default_prompt: Option<String>,
    /// Bytes of the dense layers.
    pub(crate) weight_bytes: u64,
}

#[derive(Deserialize)]
struct Module {
    path: String,
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Deserialize, Default)]
struct Limits {
    max_seq_length: Option<usize>,
}

#[derive(Deserialize, Default)]
struct Prompts {
    #[serde(default)]
    prompts: BTreeMap<String, String>,
    default_prompt_name: Option<String>,
}

#[derive(Deserialize)]
struct DenseConfig {
    in_features: usize,
    out_features: usize,
    #[serde(default = "yes")]
    bias: bool,
    activation_function: Option<String>,
}

fn yes() -> bool {
    true
}

impl Sentence {
    /// Whether the folder is one of sentence-transformers.
    pub(crate) fn is_there(folder: &Folder) -> bool {
        folder.has(MODULES)
    }

    /// Reads the files, for a model with hidden states of this width. Without them pooling is
    /// the mean, as sentence-transformers itself does.
    pub(crate) fn read(
        folder: &Folder,
        hidden: usize,
        placement: &Placement,
    ) -> Result<Self, EngineError> {
        let limits: Limits = folder
            .json_if_there("sentence_bert_config.json")?
            .unwrap_or_default();
        let prompts: Prompts = folder
            .json_if_there("config_sentence_transformers.json")?
            .unwrap_or_default();
        let mut sentence = Self {
            pooling: Pooling::Mean,
            dense: Vec::new(),
            tokens_max: limits.max_seq_length,
            prompts: prompts.prompts,
            default_prompt: prompts.default_prompt_name,
            weight_bytes: 0,
        };
        let modules: Vec<Module> = folder.json_if_there(MODULES)?.unwrap_or_default();
        if modules.len() > MODULES_MAX {
            return Err(bad(format!("more than {MODULES_MAX} modules")));
        }
        for module in &modules {
            sentence.add(folder, module, hidden, placement)?;
        }
        Ok(sentence)
    }

    /// Width of an embedding, for hidden states of this width.
    pub(crate) fn width(&self, hidden: usize) -> usize {
        self.dense.last().map_or(hidden, |dense| dense.width)
    }

    fn add(
        &mut self,
        folder: &Folder,
        module: &Module,
        hidden: usize,
        placement: &Placement,
    ) -> Result<(), EngineError> {
        let plain = module
            .path
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-');
        if !plain {
            return Err(bad("a module's path is no plain folder name"));
        }
        match module.kind.rsplit('.').next().unwrap_or_default() {
            // Whether the vector is normalized is the caller's parameter.
            "Transformer" | "Normalize" => Ok(()),
            "Pooling" => {
                self.pooling = pooling(folder, &format!("{}/config.json", module.path))?;
                Ok(())
            }
            "Dense" => {
                let inputs = self.width(hidden);
                let (dense, bytes) = dense(folder, &module.path, inputs, placement)?;
                self.dense.push(dense);
                self.weight_bytes += bytes;
                Ok(())
            }
            other => Err(bad(format!("module type '{other}' is not supported"))),
        }
    }
}

fn pooling(folder: &Folder, name: &str) -> Result<Pooling, EngineError> {
    let config: BTreeMap<String, serde_json::Value> = folder.json(name)?;
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
        [] => Err(EngineError::unusable(name, "no pooling mode is set")),
        [other] => Err(EngineError::unusable(
            name,
            format!("pooling mode '{other}' is not supported"),
        )),
        _ => Err(EngineError::unusable(
            name,
            "several pooling modes at once are not supported",
        )),
    }
}

fn dense(
    folder: &Folder,
    path: &str,
    inputs: usize,
    placement: &Placement,
) -> Result<(Dense, u64), EngineError> {
    let name = format!("{path}/config.json");
    let config: DenseConfig = folder.json(&name)?;
    let width = config.out_features;
    if config.in_features != inputs || !(1..=WIDTH_MAX).contains(&width) {
        return Err(EngineError::unusable(
            name,
            format!("in_features must be {inputs}, and out_features 1 to {WIDTH_MAX}"),
        ));
    }
    let activation = config.activation_function.as_deref().unwrap_or("Tanh");
    let activation = Activation::from_torch(activation).ok_or_else(|| {
        EngineError::unusable(&name, format!("activation '{activation}' is not supported"))
    })?;
    let file = format!("{path}/model.safetensors");
    let mut weights = Weights::open_file(folder, &file, placement.clone())?;
    let linear = if config.bias {
        Linear::load(&mut weights, "linear", [width, inputs])?
    } else {
        Linear::load_unbiased(&mut weights, "linear", [width, inputs])?
    };
    let dense = Dense {
        linear,
        activation,
        width,
    };
    Ok((dense, weights.bytes))
}

fn bad(reason: impl Into<String>) -> EngineError {
    EngineError::unusable(MODULES, reason)
}
