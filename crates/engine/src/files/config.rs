//! `config.json`: read once, and parsed by each module that needs some of its keys.
//!
//! `model_type` is parsed first and alone, so that an unsupported model is refused as such
//! whatever its other keys hold. Then each family parses its own keys.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{DeserializeOwned, Error, Unexpected, Visitor};
use serde::{Deserialize, Deserializer};

use super::folder::{Folder, JSON_BYTES_MAX, parse_json};
use crate::error::EngineError;

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
    #[serde(default)]
    architectures: Vec<String>,
    id2label: Option<BTreeMap<String, String>>,
    num_labels: Option<Labels>,
    problem_type: Option<String>,
    #[serde(default)]
    is_decoder: bool,
}

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

    /// Whether the checkpoint was saved with a classification head.
    pub(crate) fn is_classifier(&self) -> bool {
        self.architectures
            .iter()
            .any(|name| name.ends_with("ForSequenceClassification"))
    }

    /// Whether each label is predicted independently of the others.
    pub(crate) fn is_multi_label(&self) -> bool {
        self.problem_type.as_deref() == Some("multi_label_classification")
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
