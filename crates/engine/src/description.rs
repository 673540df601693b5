//! What a model folder would be served as: found without computing, and for people to read.

use crate::error::EngineError;
use crate::options::Task;

/// A setting of a model, and where it comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// What is set.
    pub name: &'static str,
    /// The value, for people.
    pub value: String,
    /// The file of the folder that says so, `andon.toml`, or `default`.
    pub source: String,
}

/// The settings of one model, in the order in which they are found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Settings(pub(crate) Vec<Setting>);

/// The source of a setting that no file makes.
pub(crate) const DEFAULT: &str = "default";
/// The source of a setting that a person makes: the file that a worker reads it from.
pub(crate) const PERSON: &str = "andon.toml";

impl Settings {
    /// Notes a setting.
    pub(crate) fn note(
        &mut self,
        name: &'static str,
        value: impl Into<String>,
        source: impl Into<String>,
    ) {
        self.0.push(Setting {
            name,
            value: value.into(),
            source: source.into(),
        });
    }
}

/// What a model folder would be served as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// The `model_type` of `config.json`; empty where there is none.
    pub model_type: String,
    /// The task, where the folder is clear about one.
    pub task: Option<Task>,
    /// The settings that were found before the first problem, each with its source.
    pub settings: Vec<Setting>,
    /// What is missing or wrong, each with what to do; none for a folder that is served.
    pub problems: Vec<EngineError>,
}

impl Description {
    /// Whether the folder would be served.
    pub fn is_served(&self) -> bool {
        self.problems.is_empty()
    }
}
