//! What was said, as OpenAI's clients write it.

use std::fmt;

use serde::de::{self, Deserialize, Deserializer, SeqAccess, Visitor};
use utoipa::openapi::schema::{ArrayBuilder, OneOfBuilder};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use super::super::body::none_left;
use super::super::rerank::NotEmpty;
use super::super::strict::strict;
use providers::{ChatMessage, Role};

/// What somebody said.
#[derive(Debug, Clone, serde::Deserialize, ToSchema)]
#[serde(remote = "Self")]
#[schema(as = ChatMessage)]
pub struct Message {
    /// Who.
    pub role: MessageRole,
    /// What: a text, or parts that are texts.
    #[schema(value_type = ContentForm)]
    pub content: Content,
}

/// Who says something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize, ToSchema)]
#[serde(remote = "Self", rename_all = "lowercase")]
pub enum MessageRole {
    /// Who sets the rules.
    System,
    /// The newer name of the same.
    Developer,
    /// Who asks.
    User,
    /// Who answers.
    Assistant,
}

strict!(word MessageRole);

/// A text, or parts that are texts.
#[derive(Debug, ToSchema)]
#[schema(as = ChatContent)]
#[serde(untagged)]
#[allow(dead_code, reason = "it is the schema of `Content`")]
pub enum ContentForm {
    /// A text.
    Text(String),
    /// Parts.
    Parts(Vec<Part>),
}

/// A part of what was said.
#[derive(Debug, Clone, serde::Deserialize, ToSchema)]
#[serde(remote = "Self")]
#[schema(as = ChatPart)]
pub struct Part {
    /// A text.
    #[serde(rename = "type")]
    #[allow(dead_code, reason = "there is one, which is checked by being read")]
    kind: super::TextFormat,
    /// The text.
    text: String,
}

strict!(object Message, Part);

/// The joined text of what was said.
#[derive(Clone, PartialEq, Eq)]
pub struct Content(String);

impl fmt::Debug for Content {
    /// Without the text, which is the caller's.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} bytes", self.0.len())
    }
}

/// Texts that may end an answer.
const STOPS_MAX: usize = 16;

/// One text or several that end an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stop(pub Vec<String>);

impl From<Message> for ChatMessage {
    fn from(message: Message) -> Self {
        let role = match message.role {
            MessageRole::System | MessageRole::Developer => Role::System,
            MessageRole::User => Role::User,
            MessageRole::Assistant => Role::Assistant,
        };
        Self {
            role,
            text: message.content.0,
        }
    }
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ContentVisitor)
    }
}

struct ContentVisitor;

impl<'de> Visitor<'de> for ContentVisitor {
    type Value = Content;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a text or a list of parts that are texts")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Content, E> {
        Ok(Content(text.to_owned()))
    }

    fn visit_string<E: de::Error>(self, text: String) -> Result<Content, E> {
        Ok(Content(text))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Content, A::Error> {
        let mut text = String::new();
        while let Some(part) = list.next_element::<Part>()? {
            text.push_str(&part.text);
        }
        Ok(Content(text))
    }
}

impl<'de> Deserialize<'de> for Stop {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(StopVisitor)
    }
}

struct StopVisitor;

impl<'de> Visitor<'de> for StopVisitor {
    type Value = Stop;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a text or a list of texts")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Stop, E> {
        Ok(Stop(vec![text.to_owned()]))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Stop, A::Error> {
        let mut texts = Vec::new();
        while let Some(text) = list.next_element()? {
            texts.push(text);
            if texts.len() == STOPS_MAX {
                none_left(&mut list, STOPS_MAX, |count| {
                    format!("{count} texts: there may be {STOPS_MAX}")
                })?;
                break;
            }
        }
        Ok(Stop(texts))
    }
}

impl PartialSchema for Stop {
    fn schema() -> RefOr<Schema> {
        let list = ArrayBuilder::new()
            .items(NotEmpty::schema())
            .max_items(Some(STOPS_MAX));
        let one_of = OneOfBuilder::new()
            .description(Some("One text or several"))
            .item(NotEmpty::schema())
            .item(list);
        RefOr::T(Schema::from(one_of))
    }
}

impl ToSchema for Stop {
    fn name() -> std::borrow::Cow<'static, str> {
        "StopTexts".into()
    }
}
