//! The prompts of a model: texts of its configuration, such as `query: `, that are
//! put before the texts to embed. Every call of texts chooses its prompt here, so
//! that one text has one vector, whichever way it comes.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

use engine::{Card, EngineError, Task};
use protocol::words::cut;
use protocol::{Error, FieldPath, PROMPT, PROMPT_NAME, unknown_prompt};

/// The file of a model folder that has its prompts.
const FILE: &str = "config_sentence_transformers.json";
/// The most bytes of a prompt. It is put before each text of a request: a long one
/// would make much work of a short request.
const PROMPT_BYTES_MAX: usize = 4096;

/// The prompts of a model.
#[derive(Debug, Default)]
pub struct Prompts {
    named: BTreeMap<String, Arc<str>>,
    /// The name of the prompt for callers who choose none.
    default: Option<String>,
}

/// The prompt that a request chooses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum PromptChoice<'r> {
    /// The model's default prompt, if it has one.
    #[default]
    Default,
    /// The prompt of this name.
    Named(&'r str),
    /// This text itself; an empty one is no prompt.
    Given(&'r str),
}

impl<'r> From<Option<&'r str>> for PromptChoice<'r> {
    fn from(name: Option<&'r str>) -> Self {
        name.map_or(Self::Default, Self::Named)
    }
}

impl Prompts {
    /// The prompts of a loaded model. Only texts to embed have prompts: what they
    /// would mean for the pairs of a reranker, its files do not say.
    ///
    /// # Errors
    /// A prompt that is too long, a default prompt that there is not, and one of a
    /// model for another task, which would not be applied.
    pub fn of(card: &Card) -> Result<Self, EngineError> {
        let invalid = |reason: String| EngineError::InvalidFile {
            file: FILE.to_owned(),
            reason,
        };
        let default = card.default_prompt.as_ref();
        let default_text = match default {
            None => "",
            Some(name) => {
                let text = card.prompts.get(name).map(String::as_str);
                text.ok_or_else(|| {
                    let name = cut(name);
                    invalid(format!(
                        "the default prompt '{name}' is not among the prompts"
                    ))
                })?
            }
        };
        if card.task != Task::Embedding {
            if default_text.is_empty() {
                return Ok(Self::default());
            }
            return Err(invalid(format!(
                "a default prompt is supported for the task embedding only, not for {}: remove \
                 default_prompt_name",
                card.task
            )));
        }
        if let Some((name, prompt)) = card.prompts.iter().find(|(_, text)| is_long(text)) {
            return Err(invalid(format!(
                "the prompt '{}' has {} bytes, but at most {PROMPT_BYTES_MAX} are allowed",
                cut(name),
                prompt.len()
            )));
        }
        let named = card.prompts.iter();
        Ok(Self {
            named: named
                .map(|(name, prompt)| (name.clone(), prompt.as_str().into()))
                .collect(),
            default: default.cloned(),
        })
    }

    /// The names of the prompts, sorted.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.named.keys().map(String::as_str)
    }

    /// The name of the prompt for callers who choose none.
    pub fn default_name(&self) -> Option<&str> {
        self.default.as_deref()
    }

    /// The text to put before each text of a request, if there is one. `field` is
    /// the path of [`PROMPT_NAME`] or [`PROMPT`] in the request, for errors.
    pub fn choose(
        &self,
        choice: PromptChoice<'_>,
        field: impl Fn(&'static str) -> FieldPath,
    ) -> Result<Option<Arc<str>>, Error> {
        let prompt: Option<Arc<str>> = match choice {
            PromptChoice::Default => {
                let default = self.default.as_ref();
                default.and_then(|name| self.named.get(name)).cloned()
            }
            PromptChoice::Named(name) => match self.named.get(name) {
                Some(prompt) => Some(prompt.clone()),
                None => return Err(unknown_prompt(field(PROMPT_NAME), self.names())),
            },
            PromptChoice::Given(prompt) if is_long(prompt) => {
                let bytes = prompt.len();
                let reason = format!("has {bytes} bytes, over the limit of {PROMPT_BYTES_MAX}");
                return Err(Error::invalid(field(PROMPT), reason));
            }
            PromptChoice::Given(prompt) => Some(prompt.into()),
        };
        Ok(prompt.filter(|prompt| !prompt.is_empty()))
    }
}

fn is_long(prompt: &str) -> bool {
    prompt.len() > PROMPT_BYTES_MAX
}

/// A text with its prompt before it, as the model reads it.
pub fn prompted<'t>(prompt: Option<&str>, text: &'t str) -> Cow<'t, str> {
    match prompt {
        None => Cow::Borrowed(text),
        Some(prompt) => Cow::Owned([prompt, text].concat()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linear;

    /// The card of a model of this golden folder with these prompts.
    fn card(folder: &str, prompts: &[(&str, &str)], default: Option<&str>) -> Card {
        let prompts = prompts.iter();
        Card {
            prompts: prompts
                .map(|(name, text)| ((*name).to_owned(), (*text).to_owned()))
                .collect(),
            default_prompt: default.map(str::to_owned),
            ..linear::model(folder).card.clone()
        }
    }

    const PROMPTS: [(&str, &str); 2] = [("document", ""), ("query", "query: ")];

    #[test]
    fn a_request_chooses_the_default_a_name_or_a_text() {
        let card = card("bert-embedding", &PROMPTS, Some("query"));
        let prompts = Prompts::of(&card).unwrap();
        let chosen = |choice: PromptChoice<'_>| {
            let chosen = prompts.choose(choice, FieldPath::from);
            chosen.map(|prompt| prompted(prompt.as_deref(), "a").into_owned())
        };
        for (choice, expected) in [
            (PromptChoice::Default, "query: a"),
            (PromptChoice::Named("query"), "query: a"),
            (PromptChoice::Named("document"), "a"),
            (PromptChoice::Given("title: "), "title: a"),
            (PromptChoice::Given(""), "a"),
            (PromptChoice::from(None::<&str>), "query: a"),
            (PromptChoice::from(Some("document")), "a"),
        ] {
            assert_eq!(chosen(choice).as_deref(), Ok(expected), "{choice:?}");
        }
        let long = "x".repeat(PROMPT_BYTES_MAX + 1);
        for (choice, sentence) in [
            (
                PromptChoice::Named("Query"),
                "prompt_name: must be one of the model's prompts: document, query",
            ),
            (
                PromptChoice::Given(&long),
                "prompt: has 4097 bytes, over the limit of 4096",
            ),
        ] {
            assert_eq!(chosen(choice).unwrap_err().to_string(), sentence);
        }
        assert_eq!(prompts.names().collect::<Vec<_>>(), ["document", "query"]);
        assert_eq!(prompts.default_name(), Some("query"));
    }

    #[test]
    fn a_model_without_prompts_has_no_name_but_takes_a_text() {
        let prompts = Prompts::of(&card("bert-embedding", &[], None)).unwrap();
        let choose = |choice: PromptChoice<'static>| {
            let chosen = prompts.choose(choice, FieldPath::parameter);
            chosen.map(|prompt| prompt.map(|prompt| prompt.to_string()))
        };
        assert_eq!(choose(PromptChoice::Default), Ok(None));
        let given = Some("a: ".to_owned());
        assert_eq!(choose(PromptChoice::Given("a: ")), Ok(given));
        let refused = choose(PromptChoice::Named("query"));
        assert_eq!(
            refused.unwrap_err().to_string(),
            "parameters[prompt_name]: must not be set: the model has no prompts"
        );
    }

    #[test]
    fn prompts_that_cannot_be_applied_are_refused_by_name() {
        let long = "x".repeat(PROMPT_BYTES_MAX + 1);
        for (card, part) in [
            (
                card("bert-embedding", &PROMPTS, Some("passage")),
                "the default prompt 'passage' is not among the prompts",
            ),
            (
                card("bert-embedding", &[("long", &long)], None),
                "the prompt 'long' has 4097 bytes",
            ),
            (
                card("bert-rerank", &PROMPTS, Some("query")),
                "not for rerank: remove default_prompt_name",
            ),
        ] {
            let error = Prompts::of(&card).unwrap_err().to_string();
            assert!(error.starts_with(FILE) && error.contains(part), "{error}");
        }
        // What would change no text is no reason to refuse a model.
        let card = card("bert-rerank", &PROMPTS, Some("document"));
        assert_eq!(Prompts::of(&card).unwrap().names().len(), 0);
    }
}
