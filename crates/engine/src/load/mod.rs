//! From a folder to a model: the folder, its configuration, the tokenizer, the weights, the
//! card. Every file is hostile until checked, and no size is believed before its limit is.

mod config;
mod folder;
mod safetensors;
mod sentence;
mod weights;

use std::path::Path;
use std::sync::Arc;

use candle_core::DeviceLocation;
use serde::Deserialize;

use crate::families::tabular::{self, Tabular, TabularConfig};
use crate::families::{self, Built};
use crate::network::TextNetwork;
use crate::{Card, Dtype, EngineError, LoadOptions, Network, Task, Tokenizer};

pub(crate) use config::{Config, RawConfig, RotaryConfig, bad as bad_config};
use folder::Folder;
pub(crate) use sentence::Dense;
use sentence::Sentence;
pub(crate) use weights::{Placement, Way, Weights};

const TOKENIZER: &str = "tokenizer.json";
const TOKENIZER_BYTES_MAX: u64 = 64 << 20;
/// A row has two special tokens at least, and without a third it says nothing.
const TOKENS_MIN: usize = 3;

/// A loaded model.
pub struct Model {
    /// What it is.
    pub card: Card,
    /// For a text model: may be shared by any number of threads.
    pub tokenizer: Option<Arc<Tokenizer>>,
    /// The weights and the forward pass: owned by one thread.
    pub network: Network,
}

/// Loads an ordinary Hugging Face folder: `config.json`, `tokenizer.json`, safetensors weights,
/// and the sentence-transformers files where there are any. A tabular model has no tokenizer.
///
/// # Errors
/// [`EngineError::Unusable`] for a file that is missing, hostile or not supported, by its name;
/// [`EngineError::Unsupported`] for options that this build or device cannot meet;
/// [`EngineError::OutOfMemory`] and [`EngineError::Device`] when the device fails.
pub fn load(folder: &Path, options: &LoadOptions) -> Result<Model, EngineError> {
    let folder = Folder::open(folder)?;
    let raw = RawConfig::read(&folder)?;
    let is_tabular = raw.model_type == tabular::MODEL_TYPE;
    let mut options = options.clone();
    if is_tabular && options.dtype == Dtype::Auto {
        // Features are measurements, and the network is small: nothing is won by rounding.
        options.dtype = Dtype::F32;
    }
    let options = &options;
    let (placement, dtype) = options.placement()?;
    let mut model = if is_tabular {
        load_tabular(&folder, options, placement)?
    } else {
        load_text(&folder, options, &raw, placement)?
    };
    model.card.dtype = dtype;
    Ok(model)
}

fn load_tabular(
    folder: &Folder,
    options: &LoadOptions,
    placement: Placement,
) -> Result<Model, EngineError> {
    if options.task.is_some_and(|task| task != Task::Tabular) {
        return Err(bad_config("a tabular model has no other task"));
    }
    let config: TabularConfig = folder.json(config::CONFIG)?;
    let mut weights = Weights::open(folder, placement.clone())?;
    let network = Tabular::load(&config, &mut weights)?;
    let (inputs, outputs) = config.tensors();
    let card = Card {
        family: "tabular",
        task: Task::Tabular,
        dtype: options.dtype,
        device: device_name(&placement),
        kernels: kernels_name(&placement),
        width: config.labels.len(),
        hidden: 0,
        feature_range: config.range()?,
        labels: config.labels,
        multi_label: false,
        tokens_max: 0,
        weight_bytes: weights.bytes,
        prompts: Default::default(),
        default_prompt: None,
        inputs,
        outputs,
    };
    Ok(Model {
        card,
        tokenizer: None,
        network: Network::tabular(network, placement),
    })
}

fn load_text(
    folder: &Folder,
    options: &LoadOptions,
    raw: &RawConfig,
    placement: Placement,
) -> Result<Model, EngineError> {
    let config = raw.checked()?;
    let task = task(folder, options, raw, &config)?;
    let mut weights = Weights::open(folder, placement.clone())?;
    let built = families::build(raw, &mut weights, task != Task::Embedding)?;
    let sentence = Sentence::read(folder, built.hidden, &placement)?;
    let tokens_max = tokens_max(folder, options, &built, &sentence)?;
    let bytes = folder.bytes(TOKENIZER, TOKENIZER_BYTES_MAX)?;
    let tokenizer = Tokenizer::from_bytes(&bytes, built.vocabulary, tokens_max)
        .map_err(|reason| EngineError::unusable(TOKENIZER, reason))?;
    drop(bytes);
    let (width, labels) = match task {
        Task::Embedding => (sentence.width(built.hidden), Vec::new()),
        _ => (config.labels.len(), config.labels),
    };
    let (inputs, outputs) = Card::text_tensors(task, width);
    let card = Card {
        family: built.family,
        task,
        dtype: options.dtype,
        device: device_name(&placement),
        kernels: kernels_name(&placement),
        width,
        hidden: built.hidden,
        labels,
        multi_label: config.multi_label,
        tokens_max,
        weight_bytes: weights.bytes + sentence.weight_bytes,
        prompts: sentence.prompts,
        default_prompt: sentence.default_prompt,
        inputs,
        outputs,
        feature_range: None,
    };
    let network = TextNetwork {
        built,
        pooling: sentence.pooling,
        dense: sentence.dense,
        tokens_max,
    };
    Ok(Model {
        card,
        tokenizer: Some(Arc::new(tokenizer)),
        network: Network::text(network, placement),
    })
}

/// The task: the caller's, or what the folder was saved for.
fn task(
    folder: &Folder,
    options: &LoadOptions,
    raw: &RawConfig,
    config: &Config,
) -> Result<Task, EngineError> {
    let is_classifier = raw
        .architectures
        .iter()
        .any(|name| name.ends_with("ForSequenceClassification"));
    match options.task {
        Some(Task::Tabular) => Err(bad_config("a text model cannot be tabular")),
        Some(Task::Rerank) if config.labels.len() != 1 => Err(bad_config(format!(
            "a reranker has one label: this model has {}",
            config.labels.len()
        ))),
        Some(task) => Ok(task),
        None if !is_classifier || Sentence::is_there(folder) => Ok(Task::Embedding),
        None if config.labels.len() == 1 => Ok(Task::Rerank),
        None => Ok(Task::Classification),
    }
}

#[derive(Deserialize, Default)]
struct TokenizerConfig {
    /// A float in some files, where 1e30 stands for no limit.
    model_max_length: Option<f64>,
}

/// The least of what positions, files and caller allow.
fn tokens_max(
    folder: &Folder,
    options: &LoadOptions,
    built: &Built,
    sentence: &Sentence,
) -> Result<usize, EngineError> {
    let tokenizer: TokenizerConfig = folder
        .json_if_there("tokenizer_config.json")?
        .unwrap_or_default();
    let model_max = tokenizer
        .model_max_length
        .filter(|length| *length >= 1.0)
        .map(|length| length as usize);
    let limits = [model_max, sentence.tokens_max, options.tokens_max];
    let least = limits
        .into_iter()
        .flatten()
        .fold(built.tokens_max, usize::min);
    if least < TOKENS_MIN {
        return Err(bad_config(format!(
            "a limit of {least} tokens for one row is too low: at least {TOKENS_MIN} are needed"
        )));
    }
    Ok(least)
}

fn device_name(placement: &Placement) -> String {
    let location = match placement {
        Placement::Processor(_) => DeviceLocation::Cpu,
        Placement::Device { device, .. } => device.location(),
    };
    match location {
        DeviceLocation::Cpu => "cpu".to_owned(),
        DeviceLocation::Cuda { gpu_id } => format!("cuda:{gpu_id}"),
        DeviceLocation::Metal { gpu_id } => format!("metal:{gpu_id}"),
    }
}

fn kernels_name(placement: &Placement) -> &'static str {
    match placement {
        Placement::Processor(way) => way.instructions.as_str(),
        Placement::Device { .. } => "candle",
    }
}
