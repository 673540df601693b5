//! The sentence-transformers files of a model folder: what it was saved as, the modules after an
//! encoder, and prompts. Layout: <https://sbert.net/docs/package_reference/util.html>.
//!
//! Nothing is guessed: a module, a mode or a kind of model that is not known by its whole name is
//! refused, since a wrong vector looks like a right one.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use crate::description::{DEFAULT, PERSON, Settings};
use crate::error::EngineError;
use crate::files::{Folder, Width};
use crate::layers::Activation;
use crate::options::{Overrides, PoolingMode};

pub(crate) const MODULES: &str = "modules.json";
const MODULES_MAX: usize = 16;
/// The file of sentence-transformers with the prompts of a model, and the class of its scores.
pub(crate) const PROMPTS: &str = "config_sentence_transformers.json";
/// The name under which a prompt of [`Overrides`] is among a model's prompts.
const PERSONS_PROMPT: &str = PERSON;

/// The values of two keys that say what a module reads and writes.
const SENTENCE: &str = "sentence_embedding";
const TOKENS: &str = "token_embeddings";

/// The files of sentence-transformers, checked, without weights.
pub(crate) struct SentenceFiles {
    /// Whether the folder was saved as a CrossEncoder, which scores pairs.
    pub(crate) is_cross_encoder: bool,
    /// Whether there is a list of modules.
    pub(crate) has_modules: bool,
    /// The modules after the encoder, in order.
    modules: Vec<Module>,
    pub(crate) prompts: BTreeMap<String, String>,
    pub(crate) default_prompt: Option<String>,
    /// The class that makes scores of the logits of a CrossEncoder, if the files name one.
    pub(crate) activation_class: Option<String>,
}

/// What makes embeddings of an encoder's hidden states, checked, without weights.
pub(crate) struct HeadPlan {
    /// What happens to the vector of each token.
    pub(crate) before: Vec<Stage>,
    /// How the vectors of a row become one; those of several lie side by side.
    pub(crate) poolings: Vec<PoolingMode>,
    /// What happens to the vector of a row.
    pub(crate) after: Vec<Stage>,
    /// Whether the tokens of a prompt are pooled.
    pub(crate) include_prompt: bool,
    /// Width of the vector of a token.
    pub(crate) token_width: usize,
    /// Width of an embedding.
    pub(crate) width: usize,
}

/// A step of vectors to vectors.
pub(crate) enum Stage {
    /// A linear layer and an activation.
    Dense(DensePlan),
    /// Scaling to Euclidean length 1.
    Normalize,
}

/// A dense module without its weights.
pub(crate) struct DensePlan {
    /// Its folder.
    pub(crate) path: String,
    pub(crate) inputs: usize,
    pub(crate) outputs: usize,
    pub(crate) bias: bool,
    pub(crate) activation: Activation,
}

/// An entry of `modules.json`.
#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct ModuleEntry {
    path: String,
    #[serde(rename = "type")]
    class: String,
}

struct Module {
    kind: ModuleKind,
    path: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ModuleKind {
    Transformer,
    Pooling,
    Dense,
    Normalize,
}

/// `config_sentence_transformers.json`.
#[derive(Deserialize, Default)]
#[serde(expecting = "an object")]
struct ModelConfig {
    model_type: Option<String>,
    #[serde(default)]
    prompts: BTreeMap<String, String>,
    default_prompt_name: Option<String>,
    /// A key of late interaction models from before they had a `model_type`.
    skiplist_words: Option<Value>,
    activation_fn: Option<String>,
}

/// `config.json` of a pooling module.
#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct PoolingConfig {
    #[serde(alias = "word_embedding_dimension")]
    embedding_dimension: Option<usize>,
    pooling_mode: Option<Modes>,
    #[serde(default = "yes")]
    include_prompt: bool,
    #[serde(flatten)]
    others: BTreeMap<String, Value>,
}

/// One mode, or several whose vectors lie side by side.
#[derive(Deserialize)]
#[serde(untagged, expecting = "the name of a mode or a list of names")]
enum Modes {
    One(String),
    Several(Vec<String>),
}

/// `config.json` of a dense module.
#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct DenseConfig {
    in_features: usize,
    out_features: Width,
    #[serde(default = "yes")]
    bias: bool,
    activation_function: Option<String>,
    module_input_name: Option<String>,
    module_output_name: Option<String>,
    #[serde(default)]
    use_residual: bool,
}

/// `config.json` of a normalizing module; older ones have none.
#[derive(Deserialize, Default)]
#[serde(expecting = "an object")]
struct NormalizeConfig {
    module_input_name: Option<String>,
    module_output_name: Option<String>,
}

fn yes() -> bool {
    true
}

impl SentenceFiles {
    /// Reads the files; none of them has to be there.
    pub(crate) fn read(
        folder: &Folder,
        overrides: &Overrides,
        settings: &mut Settings,
    ) -> Result<Self, EngineError> {
        let config: ModelConfig = folder.optional_json(PROMPTS)?.unwrap_or_default();
        let is_cross_encoder = is_cross_encoder(&config)?;
        let entries: Option<Vec<ModuleEntry>> = folder.optional_json(MODULES)?;
        let has_modules = entries.is_some();
        let modules = modules(entries.unwrap_or_default())?;
        if is_cross_encoder && !modules.is_empty() {
            return Err(invalid_modules(
                "has modules after the encoder of a CrossEncoder, which are not supported: only \
                 one with a single Transformer is",
            ));
        }
        let mut files = Self {
            is_cross_encoder,
            has_modules,
            modules,
            prompts: config.prompts,
            default_prompt: config.default_prompt_name,
            activation_class: config.activation_fn,
        };
        files.choose_prompt(overrides, settings)?;
        Ok(files)
    }

    /// Checks the default prompt, or replaces it by a person's.
    fn choose_prompt(
        &mut self,
        overrides: &Overrides,
        settings: &mut Settings,
    ) -> Result<(), EngineError> {
        if let Some(prompt) = &overrides.prompt {
            self.default_prompt = (!prompt.is_empty()).then(|| PERSONS_PROMPT.to_owned());
            if !prompt.is_empty() {
                self.prompts
                    .insert(PERSONS_PROMPT.to_owned(), prompt.clone());
            }
            settings.note("prompt", format!("{prompt:?}"), PERSON);
        } else if let Some(name) = &self.default_prompt {
            let prompt = self.prompts.get(name).ok_or_else(|| {
                EngineError::invalid_file(
                    PROMPTS,
                    "default_prompt_name names none of prompts: add the prompt, remove the name, \
                     or set prompt in andon.toml",
                )
            })?;
            settings.note("prompt", format!("{prompt:?}"), PROMPTS);
        }
        if !self.prompts.is_empty() {
            let names: Vec<&str> = self.prompts.keys().map(String::as_str).collect();
            settings.note("prompts", names.join(", "), PROMPTS);
        }
        Ok(())
    }

    /// What makes embeddings of hidden states of this width. Without a list of modules pooling is
    /// the mean, which is the default of sentence-transformers.
    pub(crate) fn head(
        &self,
        folder: &Folder,
        overrides: &Overrides,
        hidden: usize,
        settings: &mut Settings,
    ) -> Result<HeadPlan, EngineError> {
        let mut head = HeadPlan {
            before: Vec::new(),
            poolings: Vec::new(),
            after: Vec::new(),
            include_prompt: true,
            token_width: hidden,
            width: hidden,
        };
        let mut source = DEFAULT.to_owned();
        for module in &self.modules {
            let file = config_file(&module.path);
            match module.kind {
                ModuleKind::Transformer => {
                    return Err(invalid_modules(
                        "has a second Transformer, but may have one",
                    ));
                }
                ModuleKind::Pooling => {
                    head.add_pooling(folder, &file)?;
                    source = file;
                }
                ModuleKind::Dense => head.add_dense(folder, &module.path)?,
                ModuleKind::Normalize => head.add_normalize(folder, &file)?,
            }
        }
        if let Some(mode) = overrides.pooling {
            head.replace_pooling(mode)?;
            source = PERSON.to_owned();
        } else if head.poolings.is_empty() && self.has_modules {
            return Err(invalid_modules(
                "has no Pooling, so that it says of no text what its embedding is: set pooling in \
                 andon.toml, for example to \"mean\"",
            ));
        } else if head.poolings.is_empty() {
            head.poolings = vec![PoolingMode::Mean];
        }
        let modes: Vec<&str> = head.poolings.iter().map(|mode| mode.as_str()).collect();
        settings.note("pooling", modes.join(", "), source.clone());
        if !head.include_prompt {
            settings.note("include_prompt", "false", source);
        }
        for dense in head.dense() {
            let file = config_file(&dense.path);
            settings.note(
                "dense",
                format!("{} to {}", dense.inputs, dense.outputs),
                file,
            );
        }
        head.drop_last_normalize(overrides, settings);
        Ok(head)
    }
}

impl HeadPlan {
    /// The modules that have weights.
    pub(crate) fn dense(&self) -> impl Iterator<Item = &DensePlan> {
        let stages = self.before.iter().chain(&self.after);
        stages.filter_map(|stage| match stage {
            Stage::Dense(dense) => Some(dense),
            Stage::Normalize => None,
        })
    }

    fn add_pooling(&mut self, folder: &Folder, file: &str) -> Result<(), EngineError> {
        if !self.poolings.is_empty() {
            return Err(invalid_modules("has two Poolings, but may have one"));
        }
        let config: PoolingConfig = folder.json(file)?;
        if let Some(width) = config.embedding_dimension
            && width != self.token_width
        {
            return Err(EngineError::invalid_file(
                file,
                format!(
                    "embedding_dimension is {width}, but the vectors before this module have \
                     width {}",
                    self.token_width
                ),
            ));
        }
        self.include_prompt = config.include_prompt;
        self.poolings = config.modes(file)?;
        self.width = self.token_width * self.poolings.len();
        Ok(())
    }

    fn add_dense(&mut self, folder: &Folder, path: &str) -> Result<(), EngineError> {
        let file = config_file(path);
        let config: DenseConfig = folder.json(&file)?;
        let of_tokens = self.reads_tokens(
            &file,
            config.module_input_name.as_deref(),
            config.module_output_name.as_deref(),
        )?;
        if config.use_residual {
            return Err(EngineError::invalid_file(
                file,
                "use_residual is true, but only dense modules without a residual are supported",
            ));
        }
        let (stages, width) = if of_tokens {
            (&mut self.before, &mut self.token_width)
        } else {
            (&mut self.after, &mut self.width)
        };
        if config.in_features != *width {
            return Err(EngineError::invalid_file(
                file,
                format!(
                    "in_features is {}, but the vectors before this module have width {width}",
                    config.in_features
                ),
            ));
        }
        let activation = config.activation_function.as_deref().unwrap_or("Tanh");
        let activation = Activation::from_torch(activation).ok_or_else(|| {
            EngineError::invalid_file(
                &file,
                format!(
                    "activation_function '{activation}' is not supported: use Identity, GELU, \
                     ReLU, SiLU or Tanh"
                ),
            )
        })?;
        stages.push(Stage::Dense(DensePlan {
            path: path.to_owned(),
            inputs: *width,
            outputs: config.out_features.0,
            bias: config.bias,
            activation,
        }));
        *width = config.out_features.0;
        if of_tokens {
            self.width = self.token_width;
        }
        Ok(())
    }

    fn add_normalize(&mut self, folder: &Folder, file: &str) -> Result<(), EngineError> {
        let config: NormalizeConfig = folder.optional_json(file)?.unwrap_or_default();
        let of_tokens = self.reads_tokens(
            file,
            config.module_input_name.as_deref(),
            config.module_output_name.as_deref(),
        )?;
        let stages = if of_tokens {
            &mut self.before
        } else {
            &mut self.after
        };
        stages.push(Stage::Normalize);
        Ok(())
    }

    /// Whether a module reads the vectors of tokens, which it must do before they are pooled and
    /// must not do after that.
    fn reads_tokens(
        &self,
        file: &str,
        input: Option<&str>,
        output: Option<&str>,
    ) -> Result<bool, EngineError> {
        let input = input.unwrap_or(SENTENCE);
        let expected = if self.poolings.is_empty() {
            TOKENS
        } else {
            SENTENCE
        };
        if input == expected && output.is_none_or(|output| output == input) {
            return Ok(expected == TOKENS);
        }
        let place = if self.poolings.is_empty() {
            "before the Pooling"
        } else {
            "after the Pooling"
        };
        Err(EngineError::invalid_file(
            file,
            format!(
                "the module is {place} in {MODULES}, so its module_input_name and \
                 module_output_name must be {expected}"
            ),
        ))
    }

    /// Pools as a person says, and not as the files do.
    fn replace_pooling(&mut self, mode: PoolingMode) -> Result<(), EngineError> {
        if self.poolings.len() > 1 {
            if !self.after.is_empty() {
                return Err(invalid_modules(
                    "has a module that needs the several vectors of its Pooling: remove pooling \
                     from andon.toml",
                ));
            }
            self.width = self.token_width;
        }
        self.poolings = vec![mode];
        Ok(())
    }

    /// Whether an embedding is normalized is a parameter of the request: the last module is not
    /// computed with the others.
    fn drop_last_normalize(&mut self, overrides: &Overrides, settings: &mut Settings) {
        let mut source = DEFAULT;
        while matches!(self.after.last(), Some(Stage::Normalize)) {
            self.after.pop();
            source = MODULES;
        }
        match overrides.normalize {
            Some(normalize) => settings.note("normalize", normalize.to_string(), PERSON),
            None => settings.note("normalize", "true", source),
        }
    }
}

impl PoolingConfig {
    /// The modes of the one key, or of the switches that it replaces from version 5.4 on.
    fn modes(&self, file: &str) -> Result<Vec<PoolingMode>, EngineError> {
        let invalid = |reason: String| EngineError::invalid_file(file, reason);
        let known = || PoolingMode::ALL.map(PoolingMode::as_str).join(", ");
        let names: Vec<&str> = match &self.pooling_mode {
            Some(Modes::One(name)) => vec![name.as_str()],
            Some(Modes::Several(names)) => names.iter().map(String::as_str).collect(),
            None => self
                .others
                .iter()
                .filter(|(_, value)| value.as_bool() == Some(true))
                .filter_map(|(key, _)| key.strip_prefix("pooling_mode_"))
                .map(|name| match name {
                    "cls_token" => "cls",
                    "max_tokens" => "max",
                    "mean_tokens" => "mean",
                    "weightedmean_tokens" => "weightedmean",
                    other => other,
                })
                .collect(),
        };
        let mut modes = Vec::with_capacity(names.len());
        for name in names {
            let mode: Result<PoolingMode, _> = name.parse();
            modes.push(mode.map_err(|_| {
                invalid(format!(
                    "pooling mode '{name}' is not supported: use {}",
                    known()
                ))
            })?);
        }
        if modes.is_empty() || modes.len() > PoolingMode::ALL.len() {
            return Err(invalid(format!(
                "pooling_mode is missing: it must be one or some of {}",
                known()
            )));
        }
        if self.pooling_mode.is_none() {
            // Switches have no order of their own.
            modes.sort_by_key(|mode| PoolingMode::ALL.iter().position(|other| other == mode));
        }
        Ok(modes)
    }
}

/// Whether the files are those of a CrossEncoder; an error for other models than embedding ones.
fn is_cross_encoder(config: &ModelConfig) -> Result<bool, EngineError> {
    let refused = |what: &str, instead: &str| {
        Err(EngineError::invalid_file(
            PROMPTS,
            format!("the model is {what}, which is not supported yet: {instead}"),
        ))
    };
    match config.model_type.as_deref() {
        Some("SparseEncoder") => refused("a SparseEncoder (SPLADE)", "use a dense embedding model"),
        Some("ColBERT" | "MultiVectorEncoder") => refused(
            "a late interaction model (ColBERT), with a vector for each token",
            "use an embedding model with one vector for each text",
        ),
        None | Some("SentenceTransformer") if config.skiplist_words.is_some() => refused(
            "a late interaction model (skiplist_words), with a vector for each token",
            "use an embedding model with one vector for each text",
        ),
        None | Some("SentenceTransformer") => Ok(false),
        Some("CrossEncoder") => Ok(true),
        Some(_) => Err(EngineError::invalid_file(
            PROMPTS,
            "model_type is not supported: it must be SentenceTransformer or CrossEncoder",
        )),
    }
}

/// The modules after the first, which is the encoder.
fn modules(entries: Vec<ModuleEntry>) -> Result<Vec<Module>, EngineError> {
    if entries.len() > MODULES_MAX {
        return Err(invalid_modules(format!(
            "has {} modules, but at most {MODULES_MAX} are allowed",
            entries.len()
        )));
    }
    let mut modules = Vec::with_capacity(entries.len());
    for (index, entry) in entries.into_iter().enumerate() {
        // Not a path: nothing outside the model folder can be named.
        let is_plain = entry
            .path
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-');
        if !is_plain {
            return Err(invalid_modules(
                "the path of a module must be the name of a folder in the model folder",
            ));
        }
        let kind = module_kind(&entry.class)?;
        if (index == 0) != (kind == ModuleKind::Transformer) {
            return Err(invalid_modules(
                "must begin with a Transformer, and have no other one",
            ));
        }
        if index == 0 && !entry.path.is_empty() {
            return Err(invalid_modules(format!(
                "the Transformer is in the folder {}, as old versions of sentence-transformers \
                 saved it: move the files of that folder into the model folder and set the path \
                 of the module to \"\", or save the model again with a new version",
                entry.path
            )));
        }
        if index > 0 {
            let path = entry.path;
            modules.push(Module { kind, path });
        }
    }
    Ok(modules)
}

/// The configuration of a module: one without a folder has the model's.
fn config_file(path: &str) -> String {
    if path.is_empty() {
        "config.json".to_owned()
    } else {
        format!("{path}/config.json")
    }
}

/// The kind of a module by the whole name of its class: another package's class of the same last
/// name computes something else.
fn module_kind(class: &str) -> Result<ModuleKind, EngineError> {
    let names = [
        (ModuleKind::Transformer, "Transformer", "transformer"),
        (ModuleKind::Pooling, "Pooling", "pooling"),
        (ModuleKind::Dense, "Dense", "dense"),
        (ModuleKind::Normalize, "Normalize", "normalize"),
    ];
    let own = class.strip_prefix("sentence_transformers.");
    let (old, new) = (
        own.and_then(|name| name.strip_prefix("models.")),
        own.and_then(|name| {
            let base = name.strip_prefix("base.modules.");
            base.or_else(|| name.strip_prefix("sentence_transformer.modules."))
        }),
    );
    for (kind, name, module) in names {
        let is_old = old.is_some_and(|old| old == name || old == format!("{name}.{name}"));
        let is_new = new.is_some_and(|new| new == name || new == format!("{module}.{name}"));
        if is_old || is_new {
            return Ok(kind);
        }
    }
    let what = if class.starts_with("pylate.") {
        " of a late interaction model (ColBERT)"
    } else if class.starts_with("sentence_transformers.sparse_encoder.") {
        " of a sparse model (SPLADE)"
    } else if own.is_none() {
        ", which brings its own code that is never run,"
    } else {
        ""
    };
    let shown: String = class.chars().take(128).collect();
    Err(invalid_modules(format!(
        "module type '{shown}'{what} is not supported: use a model of sentence-transformers' \
         Transformer, Pooling, Dense and Normalize"
    )))
}

fn invalid_modules(reason: impl Into<String>) -> EngineError {
    EngineError::invalid_file(MODULES, reason)
}
