//! Loading: from a model folder to a model. The only module that knows every family.

mod plan;
mod tokenizer_settings;

use std::path::Path;

use crate::card::Card;
use crate::description::{Description, Settings};
use crate::encoder::EncoderModel;
use crate::error::EngineError;
use crate::families::EncoderFamily;
use crate::families::bert::Bert;
use crate::families::distilbert::DistilBert;
use crate::families::embedding_head::{self, EmbeddingHead};
use crate::families::modernbert::ModernBert;
use crate::families::roberta::Roberta;
use crate::families::sentence_transformers::{MODULES, SentenceFiles};
use crate::families::tabular::Tabular;
use crate::files::{ConfigFile, Folder, ModelFolder, Weights, bad_config};
use crate::layers::{Placement, WeightLoader};
use crate::model::Model;
use crate::options::{Dtype, LoadOptions, Overrides, Task};
use crate::tokenizer::{Tokenizer, Truncation};
use plan::{EncoderPlan, ReadFamily};

const CONFIG: &str = "config.json";
const TOKENIZER: &str = "tokenizer.json";
const TOKENIZER_BYTES_MAX: u64 = 64 << 20;
/// The configuration of a PEFT adapter.
const ADAPTER: &str = "adapter_config.json";
/// Files of which transformers makes a tokenizer where there is no `tokenizer.json`.
const VOCABULARIES: [&str; 4] = [
    "vocab.txt",
    "vocab.json",
    "sentencepiece.bpe.model",
    "spiece.model",
];
/// How the names of tensors begin that belong to heads of tasks.
const HEADS: [&str; 3] = ["classifier.", "qa_outputs.", "linear."];

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
    Encoder(ReadFamily),
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
    let config = read_config(&folder)?;
    match family(config.model_type())? {
        Family::Encoder(read) => {
            let plan =
                EncoderPlan::read(&folder, &config, read, options, &mut Settings::default())?;
            load_encoder(&folder, plan, options)
        }
        Family::Tabular => load_tabular(&folder, &config, options),
    }
}

/// What a model folder would be served as, with which settings from which file, and what is
/// missing or wrong. Reads no tensors: that they have the shapes that `config.json` requires shows
/// when the model is loaded.
pub fn describe(source: &ModelFolder, options: &LoadOptions) -> Description {
    let mut settings = Settings::default();
    let mut description = Description {
        model_type: String::new(),
        task: None,
        settings: Vec::new(),
        problems: Vec::new(),
    };
    match Folder::open(source) {
        Ok(folder) => {
            let found = describe_folder(&folder, options, &mut description, &mut settings);
            description.problems.extend(found.err());
        }
        Err(error) => description.problems.push(error),
    }
    description.settings = settings.0;
    description
}

/// Fills in the description; the error is what makes the rest of the folder unknown.
fn describe_folder(
    folder: &Folder,
    options: &LoadOptions,
    description: &mut Description,
    settings: &mut Settings,
) -> Result<(), EngineError> {
    let config = read_config(folder)?;
    config.model_type().clone_into(&mut description.model_type);
    let Family::Encoder(read) = family(config.model_type())? else {
        check_tabular(options)?;
        Tabular::read(&config)?;
        description.task = Some(Task::Tabular);
        settings.note("task", Task::Tabular.as_str(), CONFIG);
        return Weights::open(folder).map(drop);
    };
    let plan = EncoderPlan::read(folder, &config, read, options, settings)?;
    description.task = Some(plan.task);
    let tokenizer = read_tokenizer(folder, &plan);
    description.problems.extend(tokenizer.err());
    let weights = Weights::open(folder).and_then(|weights| check_heads(&weights, &plan));
    description.problems.extend(weights.err());
    for dense in plan.head.iter().flat_map(|head| head.dense()) {
        description
            .problems
            .extend(embedding_head::open(folder, dense).err());
    }
    Ok(())
}

/// Reads `config.json`. The folders in its place that people have are named.
fn read_config(folder: &Folder) -> Result<ConfigFile, EngineError> {
    if folder.has(ADAPTER) {
        return Err(EngineError::invalid_file(
            ADAPTER,
            "the folder holds a PEFT adapter, which is not applied: merge it into its base model \
             (merge_and_unload of peft), save the result, and serve that folder without this file",
        ));
    }
    if !folder.has(CONFIG) {
        // The list of modules says where the encoder is, or that there is none.
        SentenceFiles::read(folder, &Overrides::default(), &mut Settings::default())?;
    }
    if !folder.has(CONFIG) && folder.has("0_Transformer") {
        return Err(EngineError::invalid_file(
            MODULES,
            "the encoder is in the folder 0_Transformer, as old versions of \
             sentence-transformers saved it: move the files of that folder into the model folder \
             and set the path of the module to \"\", or save the model again with a new version",
        ));
    }
    if !folder.has(CONFIG) {
        return Err(bad_config(
            "is missing: a model is a folder as Hugging Face publishes it, with config.json, \
             tokenizer.json and safetensors weights directly in it",
        ));
    }
    ConfigFile::read(folder)
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
    check_tabular(options)?;
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

fn check_tabular(options: &LoadOptions) -> Result<(), EngineError> {
    if options.task.is_some_and(|task| task != Task::Tabular) {
        return Err(bad_config("a tabular model supports the task tabular only"));
    }
    if options.overrides != Overrides::default() {
        return Err(EngineError::Unsupported(
            "pooling, prompt, normalize, truncate and activation have no meaning for a tabular \
             model: remove them"
                .to_owned(),
        ));
    }
    Ok(())
}

fn load_encoder(
    folder: &Folder,
    plan: EncoderPlan,
    options: &LoadOptions,
) -> Result<Model, EngineError> {
    let (placement, dtype) = Placement::choose(options)?;
    let weights = Weights::open(folder)?;
    check_heads(&weights, &plan)?;
    let mut weights = WeightLoader::new(weights, placement.clone());
    let labels = (plan.task != Task::Embedding).then_some(plan.labels.len());
    let encoder = plan.family.load(&mut weights, labels)?;
    let head = match &plan.head {
        Some(head) => EmbeddingHead::load(folder, head, &placement)?,
        None => EmbeddingHead::none(),
    };
    let tokenizer = read_tokenizer(folder, &plan)?;
    let side = plan.truncation_side(&tokenizer, options);
    let (width, hidden, labels) = match &plan.head {
        Some(head) => (head.width, head.token_width, Vec::new()),
        None => (plan.labels.len(), plan.family.config().hidden, plan.labels),
    };
    let (inputs, outputs) = Card::text_tensors(plan.task, width);
    let overrides = &options.overrides;
    let card = Card {
        family: encoder.family,
        task: plan.task,
        dtype,
        device: placement.device_name(),
        kernels: placement.kernels_name(),
        width,
        hidden,
        labels,
        activation: plan.scores.activation,
        tei_activation: plan.scores.tei_activation,
        normalize: overrides.normalize.unwrap_or(true),
        truncation: if overrides.truncate == Some(true) {
            side.into()
        } else {
            Truncation::Refuse
        },
        truncation_side: side,
        tokens_max: plan.tokenizer.rules.tokens_max,
        weight_bytes: weights.bytes + head.weight_bytes,
        prompts: plan.sentence.prompts,
        default_prompt: plan.sentence.default_prompt,
        inputs,
        outputs,
        feature_range: None,
    };
    let model = EncoderModel::new(card, tokenizer, placement, encoder, head);
    Ok(Model::Encoder(Box::new(model)))
}

/// Refuses to drop a head of which no file says what it is for.
fn check_heads(weights: &Weights, plan: &EncoderPlan) -> Result<(), EngineError> {
    if !plan.is_guess {
        return Ok(());
    }
    match weights.find_prefix(&HEADS) {
        None => Ok(()),
        Some((head, file)) => Err(EngineError::invalid_file(
            file,
            format!(
                "has tensors of a head, {head}…, but architectures of config.json does not say \
                 for what: add it there, or set task in andon.toml"
            ),
        )),
    }
}

/// Reads `tokenizer.json`.
fn read_tokenizer(folder: &Folder, plan: &EncoderPlan) -> Result<Tokenizer, EngineError> {
    let invalid = |reason: String| EngineError::invalid_file(TOKENIZER, reason);
    if !folder.has(TOKENIZER) {
        let found = VOCABULARIES.into_iter().find(|name| folder.has(name));
        let found = found.map_or_else(String::new, |name| {
            format!(" (the folder has {name}, of which none is made)")
        });
        return Err(invalid(format!(
            "is missing{found}: load the tokenizer with AutoTokenizer.from_pretrained of \
             transformers and save it with save_pretrained, which writes this file"
        )));
    }
    let bytes = folder.bytes(TOKENIZER, TOKENIZER_BYTES_MAX)?;
    let vocabulary = plan.family.config().vocabulary;
    Tokenizer::from_bytes(&bytes, vocabulary, plan.tokenizer.rules).map_err(invalid)
}
