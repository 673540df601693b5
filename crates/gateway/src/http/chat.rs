//! Conversations that outside services continue, whole or as a stream of
//! events.

mod events;
pub mod generate;
mod message;
mod way;

use message::{Message, Stop};

use axum::Router;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use protocol::Error;
use providers::{ChatDelta, ChatRequest, TokenUsage};
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::time::{SystemTime, UNIX_EPOCH};
use utoipa::ToSchema;

use super::ask::{of_model, of_name};
use super::body::Json;
use super::gate::{Routes, Visit};
use super::problem::{Refused, Shape};
use super::strict::strict;
use crate::stack::Stack;

/// A conversation to be continued.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(remote = "Self")]
#[schema(example = json!({
    "model": "assistant",
    "messages": [{"role": "user", "content": "What burns in a lantern?"}],
    "max_tokens": 64
}))]
pub struct ChatCompletionRequest {
    /// The model: one of an outside service that generates text.
    #[schema(
        min_length = 1,
        max_length = 128,
        pattern = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
    )]
    pub model: String,
    /// What was said so far.
    #[schema(min_items = 1)]
    pub messages: Vec<Message>,
    /// Tokens that the answer may have.
    #[serde(default)]
    #[schema(minimum = 1)]
    pub max_tokens: Option<u32>,
    /// The same under its newer name, which is preferred.
    #[serde(default)]
    #[schema(minimum = 1)]
    pub max_completion_tokens: Option<u32>,
    /// How much chance there is.
    #[serde(default)]
    #[schema(minimum = 0, maximum = 2)]
    pub temperature: Option<f64>,
    /// The mass of likely tokens that are chosen from.
    #[serde(default)]
    #[schema(minimum = 0, maximum = 1)]
    pub top_p: Option<f64>,
    /// Texts that end the answer.
    #[serde(default)]
    pub stop: Option<Stop>,
    /// Whether the answer comes in parts, as events.
    #[serde(default)]
    pub stream: Option<bool>,
    /// What the stream has besides.
    #[serde(default)]
    pub stream_options: Option<StreamOptions>,
    /// How many answers are wanted: one.
    #[serde(default)]
    #[schema(minimum = 1, maximum = 1)]
    pub n: Option<u32>,
    /// Who the request is for; it is not used.
    #[serde(default)]
    #[allow(dead_code, reason = "it is only checked to be a text")]
    user: Option<String>,
    /// Tools are not passed on: a list of some is refused.
    #[serde(default)]
    #[schema(max_items = 0)]
    #[schema(value_type = Option<Vec<Value>>)]
    pub tools: Option<Vec<IgnoredAny>>,
    /// The form of the answer: text.
    #[serde(default)]
    #[allow(dead_code, reason = "it is checked by being read")]
    response_format: Option<ResponseFormat>,
}

/// What a stream has besides its parts.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub struct StreamOptions {
    /// Whether the last part says what the answer took.
    #[serde(default)]
    pub include_usage: Option<bool>,
}

/// The form of an answer.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub struct ResponseFormat {
    /// Text.
    #[serde(rename = "type")]
    #[allow(dead_code, reason = "there is one, which is checked by being read")]
    kind: TextFormat,
}

strict!(object ChatCompletionRequest, StreamOptions, ResponseFormat);

/// The only form.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(remote = "Self", rename_all = "lowercase")]
pub enum TextFormat {
    /// Text.
    Text,
}

strict!(word TextFormat);

/// A conversation continued.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChatCompletion {
    /// The request's id.
    id: String,
    /// Always `chat.completion`.
    #[schema(example = "chat.completion")]
    object: &'static str,
    /// When it was made, in seconds since 1970.
    created: u64,
    /// The model.
    model: String,
    /// One answer.
    choices: Vec<Choice>,
    /// What it took.
    usage: ChatTook,
}

/// An answer.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ChatChoice)]
pub struct Choice {
    /// Always 0.
    index: u32,
    /// What was said.
    message: Said,
    /// Why it ended: `stop`, `length` or `content_filter`.
    #[schema(example = "stop")]
    finish_reason: &'static str,
    /// Not known.
    #[schema(value_type = Option<Value>)]
    logprobs: (),
}

/// What was said.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ChatSaid)]
pub struct Said {
    /// Always `assistant`.
    #[schema(example = "assistant")]
    role: &'static str,
    /// The text.
    content: String,
}

/// What an answer took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = TokenUsage)]
pub struct ChatTook {
    /// Tokens of the conversation so far.
    prompt_tokens: u64,
    /// Tokens of the answer.
    completion_tokens: u64,
    /// Both.
    total_tokens: u64,
}

impl From<TokenUsage> for ChatTook {
    fn from(usage: TokenUsage) -> Self {
        Self {
            prompt_tokens: usage.prompt_tokens,
            completion_tokens: usage.completion_tokens,
            total_tokens: usage.prompt_tokens.saturating_add(usage.completion_tokens),
        }
    }
}

/// A part of an answer.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChatCompletionChunk {
    /// The request's id.
    id: String,
    /// Always `chat.completion.chunk`.
    #[schema(example = "chat.completion.chunk")]
    object: &'static str,
    /// When the answer began, in seconds since 1970.
    created: u64,
    /// The model.
    model: String,
    /// One part, or none beside the usage.
    choices: Vec<ChunkChoice>,
    /// What the answer took, in the last part alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<ChatTook>,
}

/// The next of one answer.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ChatChunkChoice)]
pub struct ChunkChoice {
    /// Always 0.
    index: u32,
    /// What comes next.
    delta: Delta,
    /// Why the answer ended, in its last part.
    finish_reason: Option<&'static str>,
}

/// What comes next.
#[derive(Debug, Default, Serialize, ToSchema)]
#[schema(as = ChatDelta)]
pub struct Delta {
    /// `assistant`, in the first part.
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    /// The text.
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
}

/// Every route.
pub fn routes(stack: &Stack) -> Router<Stack> {
    let openai = Routes::new(stack, Shape::OpenAi).callers("/v1/chat/completions", post(complete));
    let problem = Routes::new(stack, Shape::Problem)
        .callers("/v2/models/{model}/generate", post(generate::generate))
        .callers(
            "/v2/models/{model}/versions/{version}/generate",
            post(generate::generate),
        )
        .callers(
            "/v2/models/{model}/generate_stream",
            post(generate::generate_stream),
        )
        .callers(
            "/v2/models/{model}/versions/{version}/generate_stream",
            post(generate::generate_stream),
        );
    openai.into_router().merge(problem.into_router())
}

/// Continue a conversation
///
/// As OpenAI's clients ask, for models of outside services that generate text.
/// Fields that are not known are ignored. With `stream` the parts come as
/// events, the last of which is `[DONE]`.
#[utoipa::path(
    post, path = "/v1/chat/completions", tag = "OpenAI", operation_id = "create_chat_completion",
    request_body = ChatCompletionRequest,
    responses((status = 200, description = "The answer, whole or in parts", content(
        (ChatCompletion = "application/json"), (String = "text/event-stream"),
    )))
)]
pub async fn complete(
    visit: Visit,
    request: Json<ChatCompletionRequest>,
) -> Result<Response, Refused> {
    let request = request.value;
    let usage = request
        .stream_options
        .and_then(|options| options.include_usage);
    let (stream, model) = (request.stream == Some(true), request.model.clone());
    let asked = neutral(request)?;
    let writer = Writer {
        id: format!("chatcmpl-{}", visit.id.as_str()),
        created: now_s(),
        model: model.clone(),
        usage: usage == Some(true),
    };
    let wanted = of_name(&model);
    let in_terms = |error: Error| error.renamed(of_model);
    if stream {
        let parts = way::chat_stream(&visit, &wanted, &asked).await;
        let (headers, parts) = parts.map_err(in_terms)?;
        let response = events::response(parts, writer, Shape::OpenAi, &visit);
        return Ok((headers, response).into_response());
    }
    let answer = way::chat(&visit, &wanted, &asked).await;
    let (headers, answer) = answer.map_err(in_terms)?;
    let completion = ChatCompletion {
        id: writer.id,
        object: "chat.completion",
        created: writer.created,
        model,
        choices: vec![Choice {
            index: 0,
            message: Said {
                role: "assistant",
                content: answer.text,
            },
            finish_reason: answer.finish_reason.name(),
            logprobs: (),
        }],
        usage: answer.usage.into(),
    };
    Ok((headers, axum::Json(completion)).into_response())
}

/// The conversation in the terms of no provider. What would change the answer
/// and cannot be passed on is refused.
fn neutral(request: ChatCompletionRequest) -> Result<ChatRequest, Error> {
    if request.tools.is_some_and(|tools| !tools.is_empty()) {
        return Err(Error::invalid("tools", "tools are not passed on"));
    }
    if request.n.is_some_and(|count| count != 1) {
        return Err(Error::invalid("n", "there is one answer"));
    }
    for (field, tokens) in [
        ("max_tokens", request.max_tokens),
        ("max_completion_tokens", request.max_completion_tokens),
    ] {
        if tokens == Some(0) {
            return Err(Error::invalid(field, "must be at least 1"));
        }
    }
    let neutral = ChatRequest {
        messages: request.messages.into_iter().map(Into::into).collect(),
        max_tokens: request.max_completion_tokens.or(request.max_tokens),
        temperature: request.temperature,
        top_p: request.top_p,
        stop: request.stop.map(|stop| stop.0).unwrap_or_default(),
    };
    neutral.check()?;
    Ok(neutral)
}

/// Writes the parts of an answer.
#[derive(Debug, Clone)]
pub struct Writer {
    id: String,
    created: u64,
    model: String,
    /// Whether the last part says what the answer took.
    usage: bool,
}

impl events::Events for Writer {
    fn first(&self) -> Option<Value> {
        let delta = Delta {
            role: Some("assistant"),
            content: Some(String::new()),
        };
        Some(self.chunk(delta, None))
    }

    fn part(&self, part: ChatDelta) -> Vec<Value> {
        let mut chunks = Vec::new();
        if !part.text.is_empty() {
            let delta = Delta {
                role: None,
                content: Some(part.text),
            };
            chunks.push(self.chunk(delta, None));
        }
        if let Some((finish, usage)) = part.end {
            chunks.push(self.chunk(Delta::default(), Some(finish.name())));
            if self.usage {
                chunks.push(self.written(Vec::new(), Some(usage.into())));
            }
        }
        chunks
    }

    fn last(&self) -> Option<&'static str> {
        Some("[DONE]")
    }
}

impl Writer {
    fn chunk(&self, delta: Delta, finish_reason: Option<&'static str>) -> Value {
        let choice = ChunkChoice {
            index: 0,
            delta,
            finish_reason,
        };
        self.written(vec![choice], None)
    }

    fn written(&self, choices: Vec<ChunkChoice>, usage: Option<ChatTook>) -> Value {
        let chunk = ChatCompletionChunk {
            id: self.id.clone(),
            object: "chat.completion.chunk",
            created: self.created,
            model: self.model.clone(),
            choices,
            usage,
        };
        // Nothing in it can fail to be written.
        serde_json::to_value(chunk).unwrap_or_default()
    }
}

fn now_s() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::super::body::json;
    use super::events::Events;
    use super::*;
    use providers::{FinishReason, Role};

    fn read(text: &str) -> Result<ChatRequest, Error> {
        neutral(json(text.as_bytes())?)
    }

    #[test]
    fn a_conversation_is_read() {
        let asked = read(
            r#"{"model": "a", "messages": [
                {"role": "developer", "content": "Be short."},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
            ], "stop": "x", "max_tokens": 1, "max_completion_tokens": 2, "seed": 3}"#,
        );
        let asked = asked.unwrap();
        assert_eq!(asked.messages[0].role, Role::System);
        assert_eq!(asked.messages[1].text, "ab");
        assert_eq!((asked.max_tokens, asked.stop.len()), (Some(2), 1));
    }

    #[test]
    fn what_cannot_be_passed_on_is_refused() {
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
    fn the_last_part_says_what_the_answer_took() {
        let writer = Writer {
            id: "chatcmpl-1".into(),
            created: 1,
            model: "a".into(),
            usage: true,
        };
        let usage = TokenUsage {
            prompt_tokens: 3,
            completion_tokens: 2,
        };
        let parts = writer.part(ChatDelta {
            text: "b".into(),
            end: Some((FinishReason::Stop, usage)),
        });
        assert_eq!(parts.len(), 3);
        assert_eq!(parts[0]["choices"][0]["delta"]["content"], "b");
        assert_eq!(parts[1]["choices"][0]["finish_reason"], "stop");
        assert_eq!(parts[2]["choices"], serde_json::json!([]));
        assert_eq!(parts[2]["usage"]["total_tokens"], 5);
        assert_eq!(
            writer.first().unwrap()["choices"][0]["delta"]["role"],
            "assistant"
        );
    }
}
