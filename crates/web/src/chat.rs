//! Chat completions in the format of OpenAI's API, whole or as a stream of
//! events, by models of outside services.

use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use protocol::Error;
use serde::de::{self, Deserializer, IgnoredAny, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use utoipa::openapi::schema::{ArrayBuilder, OneOfBuilder};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use super::body::{self, Bounded, Json};
use super::context::RequestContext;
use super::endpoint::Endpoints;
use super::error::{ApiError, ErrorFormat};
use super::reply;
use super::rerank::NonEmptyText;
use super::sse;
use super::strict::strict;
use super::texts::{as_model_field, named_model};
use gateway::stack::Stack;
use gateway::stack::{ChatDelta, ChatMessage, ChatRequest, Role, TokenUsage};

/// Messages of a chat, and parts of the text of one.
const MESSAGES_MAX: usize = 4096;
/// Texts that may end a generated text.
const STOPS_MAX: usize = 16;
/// Tools of a chat, the limit of OpenAI's API: they are read before they are
/// refused.
const TOOLS_MAX: usize = 128;

/// A chat to be completed.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(remote = "Self")]
#[schema(example = json!({
    "model": "assistant",
    "messages": [{"role": "user", "content": "What burns in a lantern?"}],
    "max_tokens": 64
}))]
pub struct ChatCompletionRequest {
    /// The model: one of an outside service whose task is generation.
    #[schema(
        min_length = 1,
        max_length = 128,
        pattern = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
    )]
    pub model: String,
    /// The messages of the chat so far.
    #[serde(deserialize_with = "body::list::<MESSAGES_MAX, _, _>")]
    #[schema(min_items = 1, max_items = 4096)]
    pub messages: Vec<Message>,
    /// The maximum number of generated tokens.
    #[serde(default)]
    #[schema(minimum = 1)]
    pub max_tokens: Option<u32>,
    /// The newer name of `max_tokens`, which has precedence.
    #[serde(default)]
    #[schema(minimum = 1)]
    pub max_completion_tokens: Option<u32>,
    /// The sampling temperature.
    #[serde(default)]
    #[schema(minimum = 0, maximum = 2)]
    pub temperature: Option<f64>,
    /// Nucleus sampling: the probability mass of the tokens to sample from.
    #[serde(default)]
    #[schema(minimum = 0, maximum = 1)]
    pub top_p: Option<f64>,
    /// Texts at which generation stops.
    #[serde(default)]
    pub stop: Option<Stop>,
    /// Whether the response is a stream of events.
    #[serde(default)]
    pub stream: Option<bool>,
    /// Options of the stream.
    #[serde(default)]
    pub stream_options: Option<StreamOptions>,
    /// The number of choices: 1.
    #[serde(default)]
    #[schema(minimum = 1, maximum = 1)]
    pub n: Option<u32>,
    /// The end user; accepted and not used.
    #[serde(default)]
    #[allow(dead_code, reason = "it is only checked to be a text")]
    user: Option<String>,
    /// Tools are not supported: the list must be empty.
    #[serde(default)]
    #[schema(max_items = 0)]
    #[schema(value_type = Option<Vec<Value>>)]
    pub tools: Option<Tools>,
    /// The format of the response: text.
    #[serde(default)]
    #[allow(dead_code, reason = "it is checked by being read")]
    response_format: Option<ResponseFormat>,
}

/// Options of a stream.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub struct StreamOptions {
    /// Whether the last event has the token usage.
    #[serde(default)]
    pub include_usage: Option<bool>,
}

/// The format of a response.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub struct ResponseFormat {
    /// Text.
    #[serde(rename = "type")]
    #[allow(dead_code, reason = "there is one, which is checked by being read")]
    kind: TextFormat,
}

strict!(object ChatCompletionRequest, StreamOptions, ResponseFormat);

/// The supported format.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(remote = "Self", rename_all = "lowercase")]
pub enum TextFormat {
    /// Text.
    Text,
}

strict!(word TextFormat);

/// A message of a chat.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(remote = "Self")]
#[schema(as = ChatMessage)]
pub struct Message {
    /// The author of the message.
    pub role: MessageRole,
    /// A text, or a list of text parts.
    #[schema(value_type = ContentSchema)]
    pub content: Content,
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
}

strict!(word MessageRole);

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
#[serde(remote = "Self")]
#[schema(as = ChatPart)]
pub struct Part {
    /// Always `text`.
    #[serde(rename = "type")]
    #[allow(dead_code, reason = "there is one, which is checked by being read")]
    kind: TextFormat,
    /// The text.
    text: String,
}

strict!(object Message, Part);

/// The joined text of a message.
#[derive(Clone, PartialEq, Eq)]
pub struct Content(String);

impl fmt::Debug for Content {
    /// Without the text, which is user data.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} bytes", self.0.len())
    }
}

/// The tools of a chat, which are counted and not kept.
#[derive(Debug, Clone)]
pub struct Tools(Vec<IgnoredAny>);

/// One text or several at which generation stops.
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

impl<'de> Deserialize<'de> for Tools {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let tools = Bounded::new("tools", TOOLS_MAX);
        deserializer.deserialize_seq(tools).map(Self)
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

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Stop, A::Error> {
        let texts = Bounded::new("texts", STOPS_MAX).visit_seq(list);
        texts.map(Stop)
    }
}

impl PartialSchema for Stop {
    fn schema() -> RefOr<Schema> {
        let list = ArrayBuilder::new()
            .items(NonEmptyText::schema())
            .max_items(Some(STOPS_MAX));
        let one_of = OneOfBuilder::new()
            .description(Some("One text or several"))
            .item(NonEmptyText::schema())
            .item(list);
        RefOr::T(Schema::from(one_of))
    }
}

impl ToSchema for Stop {
    fn name() -> std::borrow::Cow<'static, str> {
        "StopTexts".into()
    }
}

/// A completed chat.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChatCompletion {
    /// The request's id.
    id: String,
    /// Always `chat.completion`.
    #[schema(example = "chat.completion")]
    object: &'static str,
    /// When it was created, in seconds since 1970.
    created: u64,
    /// The model.
    model: String,
    /// One choice.
    choices: Vec<Choice>,
    /// The token usage.
    usage: ChatTokenUsage,
}

/// A generated message.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ChatChoice)]
pub struct Choice {
    /// Always 0.
    index: u32,
    /// The message.
    message: AssistantMessage,
    /// Why generation stopped: `stop`, `length` or `content_filter`.
    #[schema(example = "stop")]
    finish_reason: &'static str,
    /// Always null: not supported.
    #[schema(value_type = Option<Value>)]
    logprobs: (),
}

impl Choice {
    fn bytes(&self) -> usize {
        self.message.content.len()
    }
}

/// A generated message.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ChatAssistantMessage)]
pub struct AssistantMessage {
    /// Always `assistant`.
    #[schema(example = "assistant")]
    role: &'static str,
    /// The text.
    content: String,
}

/// Token usage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = TokenUsage)]
pub struct ChatTokenUsage {
    /// Tokens of the request's messages.
    prompt_tokens: u64,
    /// Generated tokens.
    completion_tokens: u64,
    /// Their sum.
    total_tokens: u64,
}

impl From<TokenUsage> for ChatTokenUsage {
    fn from(usage: TokenUsage) -> Self {
        Self {
            prompt_tokens: usage.prompt_tokens,
            completion_tokens: usage.completion_tokens,
            total_tokens: usage.prompt_tokens.saturating_add(usage.completion_tokens),
        }
    }
}

/// An event of a chat completion stream.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChatCompletionChunk {
    /// The request's id.
    id: String,
    /// Always `chat.completion.chunk`.
    #[schema(example = "chat.completion.chunk")]
    object: &'static str,
    /// When the stream began, in seconds since 1970.
    created: u64,
    /// The model.
    model: String,
    /// One choice; none in the event with the usage.
    choices: Vec<ChunkChoice>,
    /// The token usage, in the last event alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<ChatTokenUsage>,
}

/// The next part of a choice.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ChatChunkChoice)]
pub struct ChunkChoice {
    /// Always 0.
    index: u32,
    /// The next part of the message.
    delta: Delta,
    /// Why generation stopped, in the last part.
    finish_reason: Option<&'static str>,
}

/// The next part of a message.
#[derive(Debug, Default, Serialize, ToSchema)]
#[schema(as = ChatDelta)]
pub struct Delta {
    /// `assistant`, in the first event.
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    /// The text.
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
}

/// The endpoints.
pub fn routes(stack: &Stack) -> Router<Stack> {
    Endpoints::new(stack, ErrorFormat::OpenAi)
        .authenticated("/v1/chat/completions", post(complete))
        .into_router()
}

/// Create chat completion
///
/// For models of outside services whose task is generation. Unknown fields are
/// ignored. With `stream` the response is a stream of server-sent events, the
/// last of which is `[DONE]`.
#[utoipa::path(
    post, path = "/v1/chat/completions", tag = "OpenAI", operation_id = "create_chat_completion",
    request_body = ChatCompletionRequest,
    responses((status = 200, description = "The generated message, whole or as a stream", content(
        (ChatCompletion = "application/json"), (String = "text/event-stream"),
    )))
)]
pub async fn complete(
    context: RequestContext,
    request: Json<ChatCompletionRequest>,
) -> Result<Response, ApiError> {
    let request = request.value;
    let usage = request
        .stream_options
        .and_then(|options| options.include_usage);
    let (stream, model) = (request.stream == Some(true), request.model.clone());
    let request = chat_request(request)?;
    let format = ChunkFormat {
        id: format!("chatcmpl-{}", context.id.as_str()),
        created: now_s(),
        model: model.clone(),
        usage: usage == Some(true),
    };
    let selector = named_model(&model);
    let renamed = |error: Error| error.map_field(as_model_field);
    if stream {
        let parts = context.chat_stream(&selector, &request).await;
        let (headers, parts) = parts.map_err(renamed)?;
        let response = sse::response(parts, format, ErrorFormat::OpenAi, &context);
        return Ok((headers, response).into_response());
    }
    let response = context.chat(&selector, &request).await;
    let (headers, response) = response.map_err(renamed)?;
    let completion = ChatCompletion {
        id: format.id,
        object: "chat.completion",
        created: format.created,
        model,
        choices: vec![Choice {
            index: 0,
            message: AssistantMessage {
                role: "assistant",
                content: response.text,
            },
            finish_reason: response.finish_reason.name(),
            logprobs: (),
        }],
        usage: response.usage.into(),
    };
    let bytes = completion.choices.iter().map(Choice::bytes).sum();
    Ok(reply::json(&context, headers, bytes, move || completion).await?)
}

/// The request for any provider. A field that would change the response and is
/// not supported is an error.
fn chat_request(request: ChatCompletionRequest) -> Result<ChatRequest, Error> {
    if request.tools.is_some_and(|tools| !tools.0.is_empty()) {
        return Err(Error::invalid("tools", "tools are not supported"));
    }
    if request.n.is_some_and(|count| count != 1) {
        return Err(Error::invalid("n", "must be 1"));
    }
    for (field, tokens) in [
        ("max_tokens", request.max_tokens),
        ("max_completion_tokens", request.max_completion_tokens),
    ] {
        if tokens == Some(0) {
            return Err(Error::invalid(field, "must be at least 1"));
        }
    }
    let chat = ChatRequest {
        messages: request.messages.into_iter().map(Into::into).collect(),
        max_tokens: request.max_completion_tokens.or(request.max_tokens),
        temperature: request.temperature,
        top_p: request.top_p,
        stop: request.stop.map(|stop| stop.0).unwrap_or_default(),
    };
    chat.check()?;
    Ok(chat)
}

/// The events of a stream, and the fields of a whole response.
#[derive(Debug, Clone)]
struct ChunkFormat {
    id: String,
    created: u64,
    model: String,
    /// Whether the last event has the token usage.
    usage: bool,
}

impl sse::EventFormat for ChunkFormat {
    type Data = ChatCompletionChunk;

    fn first(&self) -> Option<ChatCompletionChunk> {
        let delta = Delta {
            role: Some("assistant"),
            content: Some(String::new()),
        };
        Some(self.delta(delta, None))
    }

    fn part(&self, part: ChatDelta) -> Vec<ChatCompletionChunk> {
        let mut chunks = Vec::new();
        if !part.text.is_empty() {
            let delta = Delta {
                role: None,
                content: Some(part.text),
            };
            chunks.push(self.delta(delta, None));
        }
        if let Some((finish, usage)) = part.end {
            chunks.push(self.delta(Delta::default(), Some(finish.name())));
            if self.usage {
                chunks.push(self.chunk(Vec::new(), Some(usage.into())));
            }
        }
        chunks
    }

    fn last(&self) -> Option<&'static str> {
        Some("[DONE]")
    }
}

impl ChunkFormat {
    fn delta(&self, delta: Delta, finish_reason: Option<&'static str>) -> ChatCompletionChunk {
        let choice = ChunkChoice {
            index: 0,
            delta,
            finish_reason,
        };
        self.chunk(vec![choice], None)
    }

    fn chunk(
        &self,
        choices: Vec<ChunkChoice>,
        usage: Option<ChatTokenUsage>,
    ) -> ChatCompletionChunk {
        ChatCompletionChunk {
            id: self.id.clone(),
            object: "chat.completion.chunk",
            created: self.created,
            model: self.model.clone(),
            choices,
            usage,
        }
    }
}

fn now_s() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::super::body::json;
    use super::sse::EventFormat;
    use super::*;
    use gateway::stack::FinishReason;

    fn read(text: &str) -> Result<ChatRequest, Error> {
        chat_request(json(text.as_bytes())?)
    }

    #[test]
    fn a_chat_is_read() {
        let chat = read(
            r#"{"model": "a", "messages": [
                {"role": "developer", "content": "Be short."},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
            ], "stop": "x", "max_tokens": 1, "max_completion_tokens": 2, "seed": 3}"#,
        );
        let chat = chat.unwrap();
        assert_eq!(chat.messages[0].role, Role::System);
        assert_eq!(chat.messages[1].text, "ab");
        assert_eq!((chat.max_tokens, chat.stop.len()), (Some(2), 1));
    }

    #[test]
    fn what_is_not_supported_is_refused() {
        for (rest, field) in [
            (r#""messages": []"#, "messages"),
            (
                r#""messages": [{"role": "tool", "content": "a"}]"#,
                "messages[0].role",
            ),
            (
                r#""messages": [{"role": "user", "content": 1}]"#,
                "messages[0].content",
            ),
            (
                r#""messages": [{"role": "user", "content": [{"type": "image_url"}]}]"#,
                "messages[0].content[0].type",
            ),
            (
                r#""messages": [{"role": "user", "content": "a"}], "n": 2"#,
                "n",
            ),
            (
                r#""messages": [{"role": "user", "content": "a"}], "tools": [{}]"#,
                "tools",
            ),
            (
                r#""messages": [{"role": "user", "content": "a"}], "temperature": 3"#,
                "temperature",
            ),
            (
                r#""messages": [{"role": "user", "content": "a"}], "response_format": {"type": "json_object"}"#,
                "response_format.type",
            ),
        ] {
            let error = read(&format!(r#"{{"model": "a", {rest}}}"#)).unwrap_err();
            assert_eq!(error.violation().unwrap().field, field, "{rest}");
        }
    }

    #[test]
    fn every_list_is_counted_while_it_is_read() {
        let list = |entry: &str, count: usize| format!("[{}]", vec![entry; count].join(","));
        let user = |content: &str| format!(r#"{{"role": "user", "content": {content}}}"#);
        let refused = |messages: &str, tools: &str| {
            let text = format!(r#"{{"model": "a", "messages": {messages}, "tools": {tools}}}"#);
            read(&text).unwrap_err().to_string()
        };
        let (one, parts) = (user("\"a\""), r#"{"type": "text", "text": "a"}"#);
        let none = refused(&list(&one, 1), &list("{}", TOOLS_MAX));
        assert_eq!(none, "tools: tools are not supported");
        let tools = refused(&list(&one, 1), &list("{}", TOOLS_MAX + 1));
        assert!(tools.starts_with("tools: ") && tools.contains("has 129 tools, but"));
        let messages = refused(&list(&one, MESSAGES_MAX + 1), "[]");
        assert!(messages.contains("has 4097 entries, but"), "{messages}");
        let parts = user(&list(parts, MESSAGES_MAX + 1));
        let parts = refused(&list(&parts, 1), "null");
        assert!(parts.contains("has 4097 parts, but"), "{parts}");
    }

    #[test]
    fn the_last_event_has_the_usage() {
        let format = ChunkFormat {
            id: "chatcmpl-1".into(),
            created: 1,
            model: "a".into(),
            usage: true,
        };
        let usage = TokenUsage {
            prompt_tokens: 3,
            completion_tokens: 2,
        };
        let chunks = format.part(ChatDelta {
            text: "b".into(),
            end: Some((FinishReason::Stop, usage)),
        });
        let chunks = serde_json::to_value(&chunks).unwrap();
        assert_eq!(chunks.as_array().unwrap().len(), 3);
        assert_eq!(chunks[0]["choices"][0]["delta"]["content"], "b");
        assert_eq!(chunks[1]["choices"][0]["finish_reason"], "stop");
        assert_eq!(chunks[2]["choices"], serde_json::json!([]));
        assert_eq!(chunks[2]["usage"]["total_tokens"], 5);
        let first = serde_json::to_value(format.first().unwrap()).unwrap();
        assert_eq!(first["choices"][0]["delta"]["role"], "assistant");
    }
}
