//! The settings beside `tokenizer.json`: those of `tokenizer_config.json`, which win over it, and
//! those of sentence-transformers, which win over both.

use serde::Deserialize;
use serde_json::Value;

use crate::description::{DEFAULT, PERSON, Settings};
use crate::error::EngineError;
use crate::files::{Folder, bad_config};
use crate::options::LoadOptions;
use crate::tokenizer::{Side, TokenizerRules};

const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
/// The file of sentence-transformers, by the names that it had over the years: the first is read.
const SENTENCE_CONFIGS: [&str; 7] = [
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
];
/// The classes of tokenizers whose models are given no token types.
const NO_TOKEN_TYPES: [&str; 4] = [
    "RobertaTokenizer",
    "XLMRobertaTokenizer",
    "CamembertTokenizer",
    "DistilBertTokenizer",
];
/// A row has two special tokens at least, and no text without a third.
const TOKENS_MIN: usize = 3;

/// What the files say of a tokenizer.
pub(super) struct TokenizerSettings {
    pub(super) rules: TokenizerRules,
    /// The side that is truncated, where the file names one.
    pub(super) truncation_side: Option<Side>,
}

/// `tokenizer_config.json`.
#[derive(Deserialize, Default)]
#[serde(expecting = "an object")]
struct TokenizerConfig {
    /// A float in some files, where 1e30 means no limit.
    model_max_length: Option<f64>,
    do_lower_case: Option<bool>,
    strip_accents: Option<bool>,
    tokenize_chinese_chars: Option<bool>,
    add_prefix_space: Option<bool>,
    truncation_side: Option<String>,
    model_input_names: Option<Vec<String>>,
    tokenizer_class: Option<String>,
    auto_map: Option<Value>,
}

/// `sentence_bert_config.json` and its sisters.
#[derive(Deserialize, Default)]
#[serde(expecting = "an object")]
struct SentenceConfig {
    max_seq_length: Option<usize>,
    do_lower_case: Option<bool>,
    processing_kwargs: Option<Value>,
    query_length: Option<Value>,
    document_length: Option<Value>,
    query_expansion: Option<Value>,
    module_output_name: Option<String>,
}

impl TokenizerSettings {
    /// Reads the files, for a model with so many positions.
    pub(super) fn read(
        folder: &Folder,
        options: &LoadOptions,
        positions: usize,
        settings: &mut Settings,
    ) -> Result<Self, EngineError> {
        let config: TokenizerConfig = folder.optional_json(TOKENIZER_CONFIG)?.unwrap_or_default();
        let code = config.auto_map.as_ref();
        if code.is_some_and(|map| !map.is_null() && map.as_object().is_none_or(|it| !it.is_empty()))
        {
            return Err(EngineError::invalid_file(
                TOKENIZER_CONFIG,
                "auto_map says that the folder brings its own tokenizer code, which is never run \
                 and may make other tokens: use a model whose tokenizer transformers knows, or \
                 remove auto_map if tokenizer.json makes the same tokens",
            ));
        }
        let file = SENTENCE_CONFIGS.into_iter().find(|name| folder.has(name));
        let sentence: SentenceConfig = match file {
            Some(file) => folder.json(file)?,
            None => SentenceConfig::default(),
        };
        let file = file.unwrap_or(SENTENCE_CONFIGS[0]);
        sentence.refuse_others(file)?;
        let tokens_max = tokens_max(&config, &sentence, options, positions)?;
        settings.note(
            "tokens_max",
            tokens_max.value.to_string(),
            tokens_max.source.unwrap_or(file),
        );
        let truncation_side = config.side()?;
        note_truncation(truncation_side, options, settings);
        let lowercase_first = sentence.do_lower_case == Some(true);
        if lowercase_first {
            settings.note("do_lower_case", "true", file);
        }
        let rules = TokenizerRules {
            lowercase: config.do_lower_case,
            strip_accents: config.strip_accents,
            handle_chinese_chars: config.tokenize_chinese_chars,
            add_prefix_space: config.add_prefix_space,
            lowercase_first,
            token_types: config.has_token_types(),
            include_prompt: true,
            tokens_max: tokens_max.value,
        };
        note_rules(&rules, settings);
        Ok(Self {
            rules,
            truncation_side,
        })
    }
}

impl TokenizerConfig {
    fn side(&self) -> Result<Option<Side>, EngineError> {
        match self.truncation_side.as_deref() {
            None => Ok(None),
            Some("left") => Ok(Some(Side::Left)),
            Some("right") => Ok(Some(Side::Right)),
            Some(_) => Err(EngineError::invalid_file(
                TOKENIZER_CONFIG,
                "truncation_side must be left or right",
            )),
        }
    }

    /// Whether the model is given token types: a list of inputs says so, else the class.
    fn has_token_types(&self) -> bool {
        if let Some(names) = &self.model_input_names {
            return names.iter().any(|name| name == "token_type_ids");
        }
        let class = self.tokenizer_class.as_deref().unwrap_or_default();
        let class = class.strip_suffix("Fast").unwrap_or(class);
        !NO_TOKEN_TYPES.contains(&class)
    }
}

impl SentenceConfig {
    /// Refuses what would change a text, its tokens or its output in ways that are not supported.
    fn refuse_others(&self, file: &str) -> Result<(), EngineError> {
        let is_set = |value: &Option<Value>| {
            let value = value.as_ref().filter(|value| !value.is_null());
            value.is_some_and(|value| value.as_object().is_none_or(|object| !object.is_empty()))
        };
        let others = [
            ("query_length", &self.query_length),
            ("document_length", &self.document_length),
            ("query_expansion", &self.query_expansion),
        ];
        if let Some((key, _)) = others.iter().find(|(_, value)| is_set(value)) {
            return Err(EngineError::invalid_file(
                file,
                format!(
                    "{key} is that of a late interaction model (ColBERT), which is not supported \
                     yet: use an embedding model with one vector for each text"
                ),
            ));
        }
        let output = self.module_output_name.as_deref();
        if output.is_some_and(|name| !["token_embeddings", "scores"].contains(&name)) {
            return Err(EngineError::invalid_file(
                file,
                "module_output_name is not supported: it must be token_embeddings, or scores of a \
                 CrossEncoder",
            ));
        }
        if is_set(&self.processing_kwargs) {
            return Err(EngineError::invalid_file(
                file,
                "processing_kwargs changes how texts are tokenized, which is not supported: use \
                 a model without it, or remove it if it changes nothing",
            ));
        }
        Ok(())
    }
}

/// A limit, and the file that makes it; none for the file of sentence-transformers.
struct Limit {
    value: usize,
    source: Option<&'static str>,
}

/// The maximum number of tokens of one row: the least that positions, files and caller allow. The
/// limit of sentence-transformers replaces that of the tokenizer.
fn tokens_max(
    config: &TokenizerConfig,
    sentence: &SentenceConfig,
    options: &LoadOptions,
    positions: usize,
) -> Result<Limit, EngineError> {
    let of_tokenizer = config
        .model_max_length
        .filter(|length| *length >= 1.0)
        .map(|length| length as usize);
    let (of_files, source) = match sentence.max_seq_length {
        Some(length) => (Some(length), None),
        None => (of_tokenizer, Some(TOKENIZER_CONFIG)),
    };
    let mut least = Limit {
        value: positions,
        source: Some("config.json"),
    };
    for (value, source) in [(of_files, source), (options.tokens_max, Some(PERSON))] {
        if let Some(value) = value
            && value < least.value
        {
            least = Limit { value, source };
        }
    }
    if least.value < TOKENS_MIN {
        return Err(bad_config(format!(
            "the limit of tokens of one row is {}, but must be at least {TOKENS_MIN}: see \
             max_position_embeddings, max_seq_length of sentence_bert_config.json and \
             model_max_length of tokenizer_config.json",
            least.value
        )));
    }
    Ok(least)
}

fn note_truncation(side: Option<Side>, options: &LoadOptions, settings: &mut Settings) {
    if let Some(truncate) = options.overrides.truncate {
        settings.note("truncate", truncate.to_string(), PERSON);
    }
    let own = options.overrides.truncation_side;
    let (side, source) = match (own, side) {
        (Some(side), _) => (side, PERSON),
        (None, Some(side)) => (side, TOKENIZER_CONFIG),
        (None, None) => return,
    };
    settings.note("truncation_side", side.as_str(), source);
}

fn note_rules(rules: &TokenizerRules, settings: &mut Settings) {
    let switches = [
        ("do_lower_case", rules.lowercase),
        ("strip_accents", rules.strip_accents),
        ("tokenize_chinese_chars", rules.handle_chinese_chars),
        ("add_prefix_space", rules.add_prefix_space),
    ];
    for (name, value) in switches {
        if let Some(value) = value {
            settings.note(name, value.to_string(), TOKENIZER_CONFIG);
        }
    }
    let (value, source) = if rules.token_types {
        ("true", DEFAULT)
    } else {
        ("false", TOKENIZER_CONFIG)
    };
    settings.note("token_types", value, source);
}
