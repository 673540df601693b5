//! What an encoder's folder is served as: everything that its configuration files say, checked
//! before any weight is read.

use super::tokenizer_settings::TokenizerSettings;
use crate::description::{DEFAULT, PERSON, Settings};
use crate::error::EngineError;
use crate::families::EncoderFamily;
use crate::families::sentence_transformers::{HeadPlan, MODULES, PROMPTS, SentenceFiles};
use crate::files::{ConfigFile, Folder, SavedFor, TextTaskConfig, bad_config};
use crate::options::{LoadOptions, Overrides, Task};
use crate::post::ScoreActivation;
use crate::tokenizer::{Side, Tokenizer};

const CONFIG: &str = "config.json";

/// Reads the configuration of one family.
pub(super) type ReadFamily = fn(&ConfigFile) -> Result<Box<dyn EncoderFamily>, EngineError>;

/// What turns the logits of a row into scores.
pub(super) struct Scores {
    /// As the library that saved the model does.
    pub(super) activation: ScoreActivation,
    /// As text-embeddings-inference does, which knows no class of a CrossEncoder.
    pub(super) tei_activation: ScoreActivation,
    /// What says so.
    source: &'static str,
    tei_source: &'static str,
}

/// A text model, checked, without weights and without its vocabulary.
pub(super) struct EncoderPlan {
    pub(super) family: Box<dyn EncoderFamily>,
    pub(super) task: Task,
    /// Whether nothing but the lack of a head says that it embeds.
    pub(super) is_guess: bool,
    pub(super) labels: Vec<String>,
    pub(super) scores: Scores,
    pub(super) sentence: SentenceFiles,
    /// There for an embedding model.
    pub(super) head: Option<HeadPlan>,
    pub(super) tokenizer: TokenizerSettings,
}

impl EncoderPlan {
    /// Reads the configuration files. What is found is noted in `settings`, also before an error.
    pub(super) fn read(
        folder: &Folder,
        config: &ConfigFile,
        read_family: ReadFamily,
        options: &LoadOptions,
        settings: &mut Settings,
    ) -> Result<Self, EngineError> {
        let task_config = TextTaskConfig::read(config)?;
        task_config.refuse_others(folder)?;
        let overrides = &options.overrides;
        let sentence = SentenceFiles::read(folder, overrides, settings)?;
        let family = read_family(config)?;
        let labels = task_config.labels()?;
        let saved_for = task_config.saved_for();
        let (task, source) = task(options, &sentence, saved_for, labels.len())?;
        settings.note("task", task.as_str(), source);
        refuse_unused(overrides, task)?;
        let scores = scores(overrides, task, &sentence, &task_config, labels.len())?;
        let head = if task == Task::Embedding {
            let hidden = family.config().hidden;
            Some(sentence.head(folder, overrides, hidden, settings)?)
        } else {
            settings.note("labels", labels.len().to_string(), CONFIG);
            note_scores(&scores, settings);
            None
        };
        let mut tokenizer =
            TokenizerSettings::read(folder, options, family.tokens_max(), settings)?;
        tokenizer.rules.include_prompt = head.as_ref().is_none_or(|head| head.include_prompt);
        Ok(Self {
            family,
            task,
            is_guess: source == DEFAULT,
            labels,
            scores,
            sentence,
            head,
            tokenizer,
        })
    }

    /// The side that is truncated where a caller names none.
    pub(super) fn truncation_side(&self, tokenizer: &Tokenizer, options: &LoadOptions) -> Side {
        let own = options.overrides.truncation_side;
        let own = own.or(self.tokenizer.truncation_side);
        own.or(tokenizer.file_side()).unwrap_or_default()
    }
}

/// The task, a person's or the one that the folder was saved for, and what says so.
fn task(
    options: &LoadOptions,
    sentence: &SentenceFiles,
    saved_for: SavedFor,
    labels: usize,
) -> Result<(Task, &'static str), EngineError> {
    let of_labels = if labels == 1 {
        Task::Rerank
    } else {
        Task::Classification
    };
    match (options.task, saved_for) {
        (Some(Task::Tabular), _) => {
            Err(bad_config("a text model does not support the task tabular"))
        }
        (Some(Task::Rerank), _) if labels != 1 => Err(bad_config(format!(
            "the task rerank requires a model with one label, but this one has {labels}"
        ))),
        (Some(task), _) => Ok((task, PERSON)),
        (None, _) if sentence.is_cross_encoder => {
            Ok((of_labels, "config_sentence_transformers.json"))
        }
        (None, _) if sentence.has_modules => Ok((Task::Embedding, MODULES)),
        (None, SavedFor::Classification) => Ok((of_labels, CONFIG)),
        (None, SavedFor::Encoder) => Ok((Task::Embedding, DEFAULT)),
        (None, SavedFor::Other(what)) => Err(bad_config(format!(
            "architectures says that the model was saved for {what}, which is not supported: use \
             a model for embeddings, classification or reranking, or set task = \"embedding\" in \
             andon.toml to serve its encoder without that head"
        ))),
    }
}

/// Refuses a person's settings that the model has no use for: they were meant to change something.
fn refuse_unused(overrides: &Overrides, task: Task) -> Result<(), EngineError> {
    let embeds = task == Task::Embedding;
    let unused = [
        ("pooling", overrides.pooling.is_some() && !embeds),
        ("normalize", overrides.normalize.is_some() && !embeds),
        ("prompt", overrides.prompt.is_some() && !embeds),
        ("activation", overrides.activation.is_some() && embeds),
    ];
    match unused.iter().find(|(_, is_unused)| *is_unused) {
        Some((name, _)) => Err(EngineError::Unsupported(format!(
            "{name} has no meaning for a model of the task {task}: remove it"
        ))),
        None => Ok(()),
    }
}

/// A person's activation, the class of a CrossEncoder's files, or the one of the problem that the
/// model was trained for.
fn scores(
    overrides: &Overrides,
    task: Task,
    sentence: &SentenceFiles,
    config: &TextTaskConfig,
    labels: usize,
) -> Result<Scores, EngineError> {
    let alike = |activation, source| Scores {
        activation,
        tei_activation: activation,
        source,
        tei_source: source,
    };
    if let Some(activation) = overrides.activation {
        return Ok(alike(activation, PERSON));
    }
    let trained = config.activation(labels)?;
    let tei_source = if config.has_problem_type() {
        CONFIG
    } else {
        DEFAULT
    };
    let own = sentence.activation_class.as_deref();
    let (class, source) = match (own, config.activation_class()) {
        _ if task == Task::Embedding => (None, tei_source),
        (Some(class), _) => (Some(class), PROMPTS),
        (None, Some(class)) => (Some(class), CONFIG),
        (None, None) => (None, tei_source),
    };
    let Some(class) = class else {
        return Ok(alike(trained, source));
    };
    let activation = ScoreActivation::from_class(class).ok_or_else(|| {
        EngineError::invalid_file(
            source,
            format!(
                "activation_fn '{class}' is not supported: it must be \
                 torch.nn.modules.linear.Identity or torch.nn.modules.activation.Sigmoid, or set \
                 activation in andon.toml"
            ),
        )
    })?;
    Ok(Scores {
        activation,
        tei_activation: trained,
        source,
        tei_source,
    })
}

fn note_scores(scores: &Scores, settings: &mut Settings) {
    settings.note("activation", scores.activation.as_str(), scores.source);
    if scores.tei_activation != scores.activation {
        let value = scores.tei_activation.as_str();
        settings.note("tei_activation", value, scores.tei_source);
    }
}
