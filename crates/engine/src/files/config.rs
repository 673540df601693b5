//! `config.json`: read once, and parsed by each module that needs some of its keys.
//!
//! `model_type` is parsed first and alone, so that an unsupported model is refused as such
//! whatever its other keys hold. Then each family parses its own keys.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{DeserializeOwned, Error, Unexpected, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::folder::{Folder, JSON_BYTES_MAX, parse_json};
use crate::error::EngineError;
use crate::post::ScoreActivation;

const CONFIG: &str = "config.json";

const LABELS_MAX: usize = 65_536;

/// The number of hidden layers.
pub(crate) type Layers = Size<512>;
/// The width of a vector, or the number of attention heads.
pub(crate) type Width = Size<65_536>;
/// The number of tokens in the vocabulary.
pub(crate) type Vocabulary = Size<4_194_304>;
/// The number of positions.
pub(crate) type Positions = Size<1_048_576>;
/// The number of token types.
pub(crate) type TokenTypes = Size<65_536>;
/// The number of labels.
pub(crate) type Labels = Size<LABELS_MAX>;

/// The bytes of `config.json`.
pub(crate) struct ConfigFile {
    bytes: Vec<u8>,
    model_type: String,
}

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct ModelType {
    #[serde(default)]
    model_type: String,
}

impl ConfigFile {
    /// Reads the file and its `model_type`.
    pub(crate) fn read(folder: &Folder) -> Result<Self, EngineError> {
        let bytes = folder.bytes(CONFIG, JSON_BYTES_MAX)?;
        let ModelType { model_type } = parse_json(CONFIG, &bytes)?;
        Ok(Self { bytes, model_type })
    }

    /// The `model_type`, or an empty string where the key is missing.
    pub(crate) fn model_type(&self) -> &str {
        &self.model_type
    }

    /// Parses the keys of `T`; other keys are ignored.
    pub(crate) fn parse<T: DeserializeOwned>(&self) -> Result<T, EngineError> {
        parse_json(CONFIG, &self.bytes)
    }
}

/// A size from 1 to `MAX`. Any other is refused while the file is parsed, before anything is
/// sized by it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Size<const MAX: usize>(pub(crate) usize);

impl<'de, const MAX: usize> Deserialize<'de> for Size<MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_u64(SizeVisitor)
    }
}

struct SizeVisitor<const MAX: usize>;

impl<const MAX: usize> Visitor<'_> for SizeVisitor<MAX> {
    type Value = Size<MAX>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "a whole number from 1 to {MAX}")
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<Self::Value, E> {
        let size = usize::try_from(number).ok();
        let size = size.filter(|size| (1..=MAX).contains(size));
        size.map(Size)
            .ok_or_else(|| E::invalid_value(Unexpected::Unsigned(number), &self))
    }
}

/// The number that layer normalization adds to the variance, between 0 and 1.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Epsilon(pub(crate) f64);

impl<'de> Deserialize<'de> for Epsilon {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let epsilon = f64::deserialize(deserializer)?;
        if epsilon > 0.0 && epsilon < 1.0 {
            Ok(Self(epsilon))
        } else {
            Err(D::Error::custom(format_args!(
                "{epsilon} is not between 0 and 1"
            )))
        }
    }
}

/// The keys that a Hugging Face text model of any family has: what it was trained to do.
#[derive(Debug, Deserialize)]
#[serde(expecting = "an object")]
pub(crate) struct TextTaskConfig {
    #[serde(default, deserialize_with = "names")]
    architectures: Vec<String>,
    id2label: Option<BTreeMap<String, String>>,
    num_labels: Option<Labels>,
    problem_type: Option<String>,
    #[serde(default)]
    is_decoder: bool,
    auto_map: Option<Value>,
    sentence_transformers: Option<CrossEncoderConfig>,
    /// The key for the same of sentence-transformers before version 4.
    sbert_ce_default_activation_function: Option<String>,
}

/// What sentence-transformers from 4.0 to 5.3 writes into the `config.json` of a CrossEncoder.
#[derive(Debug, Deserialize)]
#[serde(expecting = "an object")]
struct CrossEncoderConfig {
    activation_fn: Option<String>,
}

/// What the classes do that a checkpoint was saved by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SavedFor {
    /// Hidden states, without a head; or the file does not say.
    Encoder,
    /// Logits of labels.
    Classification,
    /// Another task, which is not served.
    Other(&'static str),
}

/// The ends of the names of classes whose heads are not served, and what these do.
const OTHER_HEADS: [(&str, &str); 8] = [
    (
        "ForMaskedLM",
        "masked language modelling, of which sparse embeddings (SPLADE) are made",
    ),
    ("ForPreTraining", "pre-training"),
    ("ForTokenClassification", "token classification"),
    ("ForQuestionAnswering", "question answering"),
    ("ForMultipleChoice", "multiple choice"),
    ("ForNextSentencePrediction", "next sentence prediction"),
    ("ForCausalLM", "text generation"),
    ("LMHeadModel", "text generation"),
];

impl TextTaskConfig {
    /// Parses and checks the keys.
    pub(crate) fn read(file: &ConfigFile) -> Result<Self, EngineError> {
        let config: Self = file.parse()?;
        if config.is_decoder {
            return Err(bad_config(
                "is_decoder is true, but only encoders are supported",
            ));
        }
        Ok(config)
    }

    /// What the checkpoint was saved for.
    pub(crate) fn saved_for(&self) -> SavedFor {
        let ends = |end: &str| self.architectures.iter().any(|name| name.ends_with(end));
        if ends("ForSequenceClassification") {
            return SavedFor::Classification;
        }
        let other = OTHER_HEADS.iter().find(|(end, _)| ends(end));
        if let Some(&(_, what)) = other {
            return SavedFor::Other(what);
        }
        // A class of another head, whatever it is for.
        let has_head = |name: &String| name.contains("For");
        if self.architectures.iter().any(has_head) {
            SavedFor::Other("another task")
        } else {
            SavedFor::Encoder
        }
    }

    /// Refuses folders whose files are those of a supported family, but whose numbers come from
    /// what is not in them.
    pub(crate) fn refuse_others(&self, folder: &Folder) -> Result<(), EngineError> {
        let is_empty = |map: &Value| map.as_object().is_some_and(|map| map.is_empty());
        if let Some(map) = &self.auto_map
            && !map.is_null()
            && !is_empty(map)
        {
            return Err(bad_config(
                "auto_map says that the folder brings its own model code, which is never run and \
                 may compute other numbers: use a model that transformers knows, or remove \
                 auto_map if its code computes what model_type does",
            ));
        }
        let is_colbert = self.architectures.iter().any(|name| name == "HF_ColBERT");
        if is_colbert || folder.has("artifact.metadata") {
            return Err(bad_config(
                "the model is one of late interaction (ColBERT), with a vector for each token, \
                 which is not supported yet: use an embedding model with one vector for each text",
            ));
        }
        Ok(())
    }

    /// What turns the logits of so many labels into scores, as the file says.
    pub(crate) fn activation(&self, labels: usize) -> Result<ScoreActivation, EngineError> {
        match self.problem_type.as_deref() {
            Some("regression") => Ok(ScoreActivation::Identity),
            Some("multi_label_classification") => Ok(ScoreActivation::Sigmoid),
            None | Some("single_label_classification") if labels == 1 => {
                Ok(ScoreActivation::Sigmoid)
            }
            None | Some("single_label_classification") => Ok(ScoreActivation::Softmax),
            Some(_) => Err(bad_config(
                "problem_type is not supported: it must be regression, \
                 single_label_classification or multi_label_classification",
            )),
        }
    }

    /// Whether the file says what turns logits into scores.
    pub(crate) fn has_problem_type(&self) -> bool {
        self.problem_type.is_some()
    }

    /// The class that makes scores of the logits of a CrossEncoder, if the file names one.
    pub(crate) fn activation_class(&self) -> Option<&str> {
        let new = self.sentence_transformers.as_ref();
        let new = new.and_then(|config| config.activation_fn.as_deref());
        new.or(self.sbert_ce_default_activation_function.as_deref())
    }

    /// The names of the labels in the order of the scores: two labels where the file has none, as
    /// transformers does.
    pub(crate) fn labels(&self) -> Result<Vec<String>, EngineError> {
        let Some(names) = &self.id2label else {
            let count = self.num_labels.map_or(2, |labels| labels.0);
            return Ok((0..count).map(|index| format!("LABEL_{index}")).collect());
        };
        if names.is_empty() || names.len() > LABELS_MAX {
            return Err(bad_config(format!(
                "id2label has {} labels, but must have from 1 to {LABELS_MAX}",
                names.len()
            )));
        }
        // A JSON object is unordered: the keys are the indices of the scores.
        let name = |index: usize| {
            names.get(&index.to_string()).cloned().ok_or_else(|| {
                bad_config(format!(
                    "id2label has no label {index}: its keys must be \"0\" to \"{}\"",
                    names.len() - 1
                ))
            })
        };
        (0..names.len()).map(name).collect()
    }
}

/// A list of names, or null for none.
fn names<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    let names: Option<Vec<String>> = Option::deserialize(deserializer)?;
    Ok(names.unwrap_or_default())
}

/// Refuses a hidden size that does not divide evenly among the attention heads. `keys` are the
/// family's names of the two.
pub(crate) fn check_heads(
    hidden: Width,
    heads: Width,
    [hidden_key, heads_key]: [&str; 2],
) -> Result<(), EngineError> {
    let (hidden, heads) = (hidden.0, heads.0);
    if hidden.is_multiple_of(heads) {
        Ok(())
    } else {
        Err(bad_config(format!(
            "{hidden_key} is {hidden}, but must be a multiple of {heads_key}, which is {heads}"
        )))
    }
}

/// An error in `config.json`.
pub(crate) fn bad_config(reason: impl Into<String>) -> EngineError {
    EngineError::invalid_file(CONFIG, reason)
}
