//! Loading: from a model folder to a model. The only module that knows every family.

use std::path::Path;

use serde::Deserialize;

use crate::card::Card;
use crate::encoder::EncoderModel;
use crate::error::EngineError;
use crate::families::bert::Bert;
use crate::families::distilbert::DistilBert;
use crate::families::modernbert::ModernBert;
use crate::families::roberta::Roberta;
use crate::families::sentence_transformers::SentenceTransformer;
use crate::families::tabular::Tabular;
use crate::families::{EncoderFamily, LoadedEncoder};
use crate::files::{ConfigFile, Folder, ModelFolder, TextTaskConfig, Weights, bad_config};
use crate::layers::{Placement, WeightLoader};
use crate::model::Model;
use crate::options::{Dtype, LoadOptions, Task};
use crate::tokenizer::Tokenizer;

const TOKENIZER: &str = "tokenizer.json";
const TOKENIZER_BYTES_MAX: u64 = 64 << 20;
/// A row has two special tokens at least, and no text without a third.
const TOKENS_MIN: usize = 3;

/// The families, by the values of `model_type` that name them.
const FAMILIES: [(&str, Family); 7] = [
    (
        "bert",
        Family::Encoder(|file| Ok(Box::new(Bert::read(file)?))),
    ),
    ("roberta", Family::Encoder(read_roberta)),
    ("xlm-roberta", Family::Encoder(read_roberta)),
    ("camembert", Family::Encoder(read_roberta)),
    (
        "distilbert",
        Family::Encoder(|file| Ok(Box::new(DistilBert::read(file)?))),
    ),
    (
        "modernbert",
        Family::Encoder(|file| Ok(Box::new(ModernBert::read(file)?))),
    ),
    ("andon_tabular", Family::Tabular),
];

/// How a family's configuration is read.
#[derive(Clone, Copy)]
enum Family {
    Encoder(fn(&ConfigFile) -> Result<Box<dyn EncoderFamily>, EngineError>),
    Tabular,
}

fn read_roberta(file: &ConfigFile) -> Result<Box<dyn EncoderFamily>, EngineError> {
    Ok(Box::new(Roberta::read(file)?))
}

/// Loads a model folder as Hugging Face publishes it: `config.json`, `tokenizer.json`, safetensors
/// weights, and the files of sentence-transformers where there are any. A tabular model has no
/// tokenizer. The folder is outside a repository, see [`ModelFolder`].
///
/// # Errors
/// Those of [`load_from`].
pub fn load(folder: &Path, options: &LoadOptions) -> Result<Model, EngineError> {
    load_from(&ModelFolder::bare(folder), options)
}

/// Loads a model as [`load`] does, from a folder that may be in a repository.
///
/// # Errors
/// [`EngineError::InvalidFile`] for a file that is missing, malformed or not supported, by its
/// name; [`EngineError::Unsupported`] for options that this build or machine cannot meet;
/// [`EngineError::OutOfMemory`] and [`EngineError::Device`] when the device fails.
pub fn load_from(folder: &ModelFolder, options: &LoadOptions) -> Result<Model, EngineError> {
    let folder = Folder::open(folder)?;
    let config = ConfigFile::read(&folder)?;
    match family(config.model_type())? {
        Family::Encoder(read) => load_encoder(&folder, &config, options, read(&config)?.as_ref()),
        Family::Tabular => load_tabular(&folder, &config, options),
    }
}

/// The family of a `model_type`.
fn family(model_type: &str) -> Result<Family, EngineError> {
    let family = FAMILIES.iter().find(|(name, _)| *name == model_type);
    family.map(|(_, family)| *family).ok_or_else(|| {
        let supported = FAMILIES.map(|(name, _)| name).join(", ");
        bad_config(match model_type {
            "" => format!("model_type is missing: it must be one of {supported}"),
            other => format!("model_type '{other}' is not supported: use one of {supported}"),
        })
    })
}

fn load_tabular(
    folder: &Folder,
    config: &ConfigFile,
    options: &LoadOptions,
) -> Result<Model, EngineError> {
    if options.task.is_some_and(|task| task != Task::Tabular) {
        return Err(bad_config("a tabular model supports the task tabular only"));
    }
    let family = Tabular::read(config)?;
    let mut options = options.clone();
    if options.dtype == Dtype::Auto {
        // Features are measurements, and the model is small: rounding would gain nothing.
        options.dtype = Dtype::F32;
    }
    let (placement, dtype) = Placement::choose(&options)?;
    let mut weights = WeightLoader::new(Weights::open(folder)?, placement);
    let model = family.load(&mut weights, dtype)?;
    Ok(Model::Tabular(Box::new(model)))
}

fn load_encoder(
    folder: &Folder,
    config: &ConfigFile,
    options: &LoadOptions,
    family: &dyn EncoderFamily,
) -> Result<Model, EngineError> {
    let task_config = TextTaskConfig::read(config)?;
    let labels = task_config.labels()?;
    let task = task(folder, options, &task_config, labels.len())?;
    let (placement, dtype) = Placement::choose(options)?;
    let mut weights = WeightLoader::new(Weights::open(folder)?, placement.clone());
    let head_labels = (task != Task::Embedding).then_some(labels.len());
    let encoder = family.load(&mut weights, head_labels)?;
    let sentence = SentenceTransformer::read(folder, encoder.hidden, &placement)?;
    let tokens_max = tokens_max(folder, options, &encoder, &sentence)?;
    let bytes = folder.bytes(TOKENIZER, TOKENIZER_BYTES_MAX)?;
    let tokenizer = Tokenizer::from_bytes(&bytes, encoder.vocabulary, tokens_max)
        .map_err(|reason| EngineError::invalid_file(TOKENIZER, reason))?;
    drop(bytes);
    let (width, labels) = match task {
        Task::Embedding => (sentence.head.width(encoder.hidden), Vec::new()),
        _ => (labels.len(), labels),
    };
    let (inputs, outputs) = Card::text_tensors(task, width);
    let card = Card {
        family: encoder.family,
        task,
        dtype,
        device: placement.device_name(),
        kernels: placement.kernels_name(),
        width,
        hidden: encoder.hidden,
        labels,
        multi_label: task_config.is_multi_label(),
        tokens_max,
        weight_bytes: weights.bytes + sentence.weight_bytes,
        prompts: sentence.prompts,
        default_prompt: sentence.default_prompt,
        inputs,
        outputs,
        feature_range: None,
    };
    let model = EncoderModel::new(card, tokenizer, placement, encoder, sentence.head);
    Ok(Model::Encoder(Box::new(model)))
}

/// The task: the caller's, or the one that the folder was saved for.
fn task(
    folder: &Folder,
    options: &LoadOptions,
    config: &TextTaskConfig,
    labels: usize,
) -> Result<Task, EngineError> {
    match options.task {
        Some(Task::Tabular) => Err(bad_config("a text model does not support the task tabular")),
        Some(Task::Rerank) if labels != 1 => Err(bad_config(format!(
            "the task rerank requires a model with one label, but this one has {labels}"
        ))),
        Some(task) => Ok(task),
        None if !config.is_classifier() || SentenceTransformer::is_in(folder) => {
            Ok(Task::Embedding)
        }
        None if labels == 1 => Ok(Task::Rerank),
        None => Ok(Task::Classification),
    }
}

/// `tokenizer_config.json`.
#[derive(Deserialize, Default)]
#[serde(expecting = "an object")]
struct TokenizerConfig {
    /// A float in some files, where 1e30 means no limit.
    model_max_length: Option<f64>,
}

/// The maximum number of tokens of one row: the least that positions, files and caller allow.
fn tokens_max(
    folder: &Folder,
    options: &LoadOptions,
    encoder: &LoadedEncoder,
    sentence: &SentenceTransformer,
) -> Result<usize, EngineError> {
    let tokenizer: TokenizerConfig = folder
        .optional_json("tokenizer_config.json")?
        .unwrap_or_default();
    let model_max = tokenizer
        .model_max_length
        .filter(|length| *length >= 1.0)
        .map(|length| length as usize);
    let limits = [model_max, sentence.tokens_max, options.tokens_max];
    let least = limits
        .into_iter()
        .flatten()
        .fold(encoder.tokens_max, usize::min);
    if least < TOKENS_MIN {
        return Err(bad_config(format!(
            "the limit of tokens of one row is {least}, but must be at least {TOKENS_MIN}: see \
             max_position_embeddings, max_seq_length of sentence_bert_config.json and \
             model_max_length of tokenizer_config.json"
        )));
    }
    Ok(least)
}
