//! The messages of a chat.

use std::fmt;

use protocol::Error;
use serde::Deserialize;
use serde::de::{self, Deserializer, IgnoredAny, SeqAccess, Visitor};
use serde_json::value::to_raw_value;
use utoipa::ToSchema;

use super::super::body::Bounded;
use super::super::strict::strict;
use super::more::open;
use gateway::stack::{ChatMessage, ChatOption, Role, ToolCall};

/// Messages of a chat, and parts of the text of one.
pub const MESSAGES_MAX: usize = 4096;
/// Tools of a chat, and calls of one message: the limit of OpenAI's API.
pub const TOOLS_MAX: usize = 128;

/// A message of a chat.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(remote = "Self")]
#[schema(as = ChatMessage)]
pub struct Message {
    /// The author of the message.
    role: MessageRole,
    /// A text, or a list of text parts. Only a message that calls tools may have
    /// none.
    #[serde(default)]
    #[schema(value_type = Option<ContentSchema>)]
    content: Option<Content>,
    /// Of the model's messages: the tools that it called.
    #[serde(default)]
    #[schema(max_items = 128)]
    #[schema(value_type = Option<Vec<MessageToolCall>>)]
    tool_calls: Option<MessageToolCalls>,
    /// Of a tool's messages: the id of the call whose result it is.
    #[serde(default)]
    tool_call_id: Option<String>,
    /// The name of the author, where several have the same role.
    #[serde(default)]
    name: Option<String>,
    /// The other fields.
    #[serde(skip)]
    more: Vec<ChatOption>,
}

/// The author of the message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(remote = "Self", rename_all = "lowercase")]
pub enum MessageRole {
    /// The instructions.
    System,
    /// The newer name of `system`.
    Developer,
    /// The user.
    User,
    /// The model.
    Assistant,
    /// A tool that the model called.
    Tool,
}

/// A text, or a list of text parts.
#[derive(Debug, ToSchema)]
#[schema(as = ChatContent)]
#[serde(untagged)]
#[allow(dead_code, reason = "it is the schema of `Content`")]
pub enum ContentSchema {
    /// A text.
    Text(String),
    /// Text parts.
    Parts(Vec<Part>),
}

/// A part of a message.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(remote = "Self", deny_unknown_fields)]
#[schema(as = ChatPart)]
pub struct Part {
    /// Always `text`.
    #[serde(rename = "type")]
    #[allow(dead_code, reason = "there is one, which is checked by being read")]
    kind: PartKind,
    /// The text.
    text: String,
}

/// The supported kind of part.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(remote = "Self", rename_all = "lowercase")]
pub enum PartKind {
    /// Text.
    Text,
}

/// A call of a tool.
#[derive(Clone, Deserialize, ToSchema)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct MessageToolCall {
    /// The id of the call.
    id: String,
    /// Always `function`.
    #[serde(rename = "type")]
    #[allow(dead_code, reason = "there is one, which is checked by being read")]
    kind: ToolCallKind,
    /// The function that was called.
    function: MessageFunction,
    /// The number of the call in the stream that it came in, which its place says.
    #[serde(default)]
    #[schema(value_type = Option<u32>)]
    #[allow(dead_code, reason = "clients send it back as it came")]
    index: Option<IgnoredAny>,
}

/// The supported kind of call.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(remote = "Self", rename_all = "lowercase")]
pub enum ToolCallKind {
    /// A function.
    Function,
}

/// A function that was called.
#[derive(Clone, Deserialize, ToSchema)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct MessageFunction {
    /// Its name.
    name: String,
    /// Its arguments, JSON in a text.
    arguments: String,
}

open!(Message);
strict!(object Part, MessageToolCall, MessageFunction);
strict!(word MessageRole, PartKind, ToolCallKind);

/// The calls of a message, which are counted while they are read.
#[derive(Clone)]
struct MessageToolCalls(Vec<MessageToolCall>);

impl fmt::Debug for MessageToolCalls {
    /// Without their texts, which are user data.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} calls", self.0.len())
    }
}

impl<'de> Deserialize<'de> for MessageToolCalls {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let calls = Bounded::new("tool calls", TOOLS_MAX);
        deserializer.deserialize_seq(calls).map(Self)
    }
}

/// The joined text of a message.
#[derive(Clone, PartialEq, Eq)]
pub struct Content(String);

impl fmt::Debug for Content {
    /// Without the text, which is user data.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} bytes", self.0.len())
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
        formatter.write_str("a text or a list of text parts")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Content, E> {
        Ok(Content(text.to_owned()))
    }

    fn visit_string<E: de::Error>(self, text: String) -> Result<Content, E> {
        Ok(Content(text))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Content, A::Error> {
        let parts = Bounded::<Part>::new("parts", MESSAGES_MAX).visit_seq(list)?;
        Ok(Content(parts.into_iter().map(|part| part.text).collect()))
    }
}

/// The messages in the terms of every provider. What a message has must fit its
/// author.
pub fn conversation(messages: Vec<Message>) -> Result<Vec<ChatMessage>, Error> {
    let messages = messages.into_iter().enumerate();
    let messages = messages.map(|(index, message)| {
        message.into_chat().map_err(|error: MessageError| {
            Error::invalid(format!("messages[{index}].{}", error.field), error.reason)
        })
    });
    messages.collect()
}

struct MessageError {
    field: &'static str,
    reason: &'static str,
}

impl Message {
    fn into_chat(self) -> Result<ChatMessage, MessageError> {
        let role = match self.role {
            MessageRole::System | MessageRole::Developer => Role::System,
            MessageRole::User => Role::User,
            MessageRole::Assistant => Role::Assistant,
            MessageRole::Tool => Role::Tool,
        };
        let wrong = |field, reason| Err(MessageError { field, reason });
        let calls = self.tool_calls.map(|calls| calls.0).unwrap_or_default();
        if !calls.is_empty() && role != Role::Assistant {
            return wrong("tool_calls", "only messages of the assistant call tools");
        }
        if self.tool_call_id.is_some() != (role == Role::Tool) {
            return wrong(
                "tool_call_id",
                "is for the messages of tools, and required there",
            );
        }
        let text = match self.content {
            Some(content) => content.0,
            None if !calls.is_empty() => String::new(),
            None => return wrong("content", "is required"),
        };
        let calls = calls.into_iter().map(|call| ToolCall {
            id: call.id,
            name: call.function.name,
            arguments: call.function.arguments,
        });
        // Clients send a response back as it came, with lists of nothing.
        let more = self.more.into_iter();
        let more = more.filter(|field| field.value.get() != "[]");
        Ok(ChatMessage {
            role,
            text,
            tool_calls: calls.collect(),
            tool_call_id: self.tool_call_id,
            options: named(self.name)?.into_iter().chain(more).collect(),
        })
    }
}

/// The name of the author, which a service may not have.
fn named(name: Option<String>) -> Result<Option<ChatOption>, MessageError> {
    let Some(name) = name else { return Ok(None) };
    let value = to_raw_value(&name).map_err(|_| MessageError {
        field: "name",
        reason: "cannot be written",
    })?;
    Ok(Some(ChatOption {
        name: "name".into(),
        value,
    }))
}

#[cfg(test)]
mod tests {
    use super::super::super::body::json;
    use super::*;

    fn read(messages: &str) -> Result<Vec<ChatMessage>, Error> {
        #[derive(Deserialize)]
        struct Chat {
            messages: Vec<Message>,
        }
        let chat: Chat = json(format!(r#"{{"messages": {messages}}}"#).as_bytes())?;
        conversation(chat.messages)
    }

    #[test]
    fn calls_of_tools_and_their_results_are_read() {
        let messages = read(
            r#"[{"role": "assistant", "content": null, "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "r"}]}]"#,
        );
        let messages = messages.unwrap();
        let call = &messages[0].tool_calls[0];
        assert_eq!((&*call.id, &*call.name, &*call.arguments), ("1", "f", "{}"));
        assert_eq!(messages[0].text, "");
        assert_eq!(messages[1].role, Role::Tool);
        assert_eq!(messages[1].tool_call_id.as_deref(), Some("1"));
        assert_eq!(messages[1].text, "r");
    }

    #[test]
    fn what_else_a_message_has_is_passed_on() {
        let messages = read(
            r#"[{"role": "user", "content": "a", "name": "anna"},
            {"role": "assistant", "content": "b", "refusal": null, "annotations": [], "thoughts": "c"}]"#,
        );
        let messages = messages.unwrap();
        let options = |index: usize| {
            let options = messages[index].options.iter();
            let options = options.map(|option| (&*option.name, option.value.get()));
            options.collect::<Vec<_>>()
        };
        assert_eq!(options(0), [("name", r#""anna""#)]);
        assert_eq!(options(1), [("thoughts", r#""c""#)]);
    }

    #[test]
    fn what_does_not_fit_its_author_is_refused_by_its_name() {
        let call = r#"{"id": "1", "type": "function", "function": {"name": "f", "arguments": ""}}"#;
        let calls =
            |role: &str| format!(r#"{{"role": "{role}", "content": "a", "tool_calls": [{call}]}}"#);
        for (message, field) in [
            (r#"{"role": "function", "content": "a"}"#.to_owned(), "role"),
            (r#"{"role": "user", "content": 1}"#.to_owned(), "content"),
            (r#"{"role": "user"}"#.to_owned(), "content"),
            (
                r#"{"role": "assistant", "content": null}"#.to_owned(),
                "content",
            ),
            (
                r#"{"role": "user", "content": [{"type": "image_url"}]}"#.to_owned(),
                "content[0].type",
            ),
            (
                r#"{"role": "user", "content": [{"type": "text", "text": "a", "mark": 1}]}"#
                    .to_owned(),
                "content[0].mark",
            ),
            (
                r#"{"role": "user", "content": "a", "name": 1}"#.to_owned(),
                "name",
            ),
            (calls("user"), "tool_calls"),
            (
                calls("assistant").replace("\"id\"", "\"mark\": 1, \"id\""),
                "tool_calls[0].mark",
            ),
            (
                calls("assistant").replace("function\", \"", "custom\", \""),
                "tool_calls[0].type",
            ),
            (
                r#"{"role": "tool", "content": "a"}"#.to_owned(),
                "tool_call_id",
            ),
            (
                r#"{"role": "user", "content": "a", "tool_call_id": "1"}"#.to_owned(),
                "tool_call_id",
            ),
        ] {
            let error = read(&format!("[{message}]")).unwrap_err();
            let field = format!("messages[0].{field}");
            assert_eq!(
                error.violation().unwrap().field.as_str(),
                field,
                "{message}"
            );
        }
        assert!(read(&format!("[{}]", calls("assistant"))).is_ok());
        let numbered = calls("assistant").replace("\"id\"", "\"index\": 0, \"id\"");
        assert!(read(&format!("[{numbered}]")).is_ok());
    }
}
