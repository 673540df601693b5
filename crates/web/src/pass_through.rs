//! Calls of OpenAI's API that are passed through to providers which have them:
//! the path and the body as they came, with the provider's name for the model.

use std::convert::Infallible;

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use bytes::Bytes;
use futures::{Stream, StreamExt, stream};
use http::HeaderValue;
use http::header::CONTENT_TYPE;
use protocol::Error;
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::time::{Instant, timeout_at};
use utoipa::ToSchema;

use super::body::{Json, json};
use super::context::{RequestContext, hold};
use super::endpoint::Endpoints;
use super::error::{ApiError, ErrorFormat};
use super::request_id::RequestId;
use super::texts::{as_model_field, named_model};
use super::{reply, sse};
use gateway::stack::{PassThrough, PassThroughApi, Passed, PassedStream, Stack};

/// The endpoints.
pub fn routes(stack: &Stack) -> Router<Stack> {
    Endpoints::new(stack, ErrorFormat::OpenAi)
        .authenticated("/v1/completions", post(complete))
        .authenticated("/v1/responses", post(respond))
        .into_router()
}

/// A text to be continued. Its other members are the provider's to read.
#[derive(ToSchema)]
#[schema(example = json!({"model": "assistant", "prompt": "A lantern is", "max_tokens": 64}))]
#[allow(
    dead_code,
    reason = "its schema is used, and its body stays as it came"
)]
pub struct CompletionRequest {
    /// The model: one of a provider of kind `openai` whose task is generation.
    #[schema(
        min_length = 1,
        max_length = 128,
        pattern = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
    )]
    model: String,
    /// Whether the response is a stream of events.
    stream: Option<bool>,
}

/// An input to be responded to. Its other members are the provider's to read.
#[derive(ToSchema)]
#[schema(example = json!({"model": "assistant", "input": "What burns in a lantern?"}))]
#[allow(
    dead_code,
    reason = "its schema is used, and its body stays as it came"
)]
pub struct ResponseRequest {
    /// The model: one of a provider of kind `openai` whose task is generation.
    #[schema(
        min_length = 1,
        max_length = 128,
        pattern = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
    )]
    model: String,
    /// Whether the response is a stream of events.
    stream: Option<bool>,
}

/// Create completion
///
/// Passed through to a provider of kind `openai`: the request and the response
/// stay as they are, but for the model's name in the request. Other models are
/// refused.
#[utoipa::path(
    post, path = "/v1/completions", tag = "OpenAI", operation_id = "create_completion",
    request_body = CompletionRequest,
    responses((status = 200, description = "The provider's response, whole or as a stream", content(
        (serde_json::Value = "application/json"), (String = "text/event-stream"),
    )))
)]
pub async fn complete(context: RequestContext, request: Request) -> Result<Response, ApiError> {
    pass(context, request, PassThroughApi::Completions).await
}

/// Create response
///
/// Passed through to a provider of kind `openai`: the request and the response
/// stay as they are, but for the model's name in the request. Other models are
/// refused. What is stored is stored by the provider.
#[utoipa::path(
    post, path = "/v1/responses", tag = "OpenAI", operation_id = "create_response",
    request_body = ResponseRequest,
    responses((status = 200, description = "The provider's response, whole or as a stream", content(
        (serde_json::Value = "application/json"), (String = "text/event-stream"),
    )))
)]
pub async fn respond(context: RequestContext, request: Request) -> Result<Response, ApiError> {
    pass(context, request, PassThroughApi::Responses).await
}

async fn pass(
    context: RequestContext,
    request: Request,
    api: PassThroughApi,
) -> Result<Response, ApiError> {
    let body = Json::read(&context, request, move |bytes| read(api, bytes)).await?;
    let (model, request) = body.value;
    let budget = &context.limits.budget;
    // What is sent is a copy.
    let sent = hold(budget, request.body.len())?;
    let passed = context.pass_through(&named_model(&model), &request).await;
    let (headers, passed) = passed.map_err(|error| error.map_field(as_model_field))?;
    drop(sent);
    let body = match passed {
        Passed::Whole(body) => body,
        Passed::Events(events) => {
            let events = Events {
                events,
                ended: false,
                id: context.id.clone(),
                deadline: context.stream_deadline,
            };
            let body = Body::from_stream(events.into_stream());
            return Ok((headers, sse::headers(), body).into_response());
        }
    };
    let held = hold(budget, body.len())?;
    let kind = HeaderValue::from_static("application/json");
    let response = (headers, [(CONTENT_TYPE, kind)], body).into_response();
    Ok(reply::counted(response, held))
}

/// What is read of a body; all else is the provider's to read.
#[derive(Deserialize)]
struct Members<'b> {
    #[serde(borrow)]
    model: &'b RawValue,
    stream: Option<bool>,
    #[serde(borrow)]
    prompt: Option<&'b RawValue>,
    #[serde(borrow)]
    input: Option<&'b RawValue>,
    #[serde(borrow)]
    max_tokens: Option<&'b RawValue>,
    #[serde(borrow)]
    max_output_tokens: Option<&'b RawValue>,
    #[serde(borrow)]
    n: Option<&'b RawValue>,
}

/// The model that a body names, and the request that is passed through.
fn read(api: PassThroughApi, bytes: &[u8]) -> Result<(String, PassThrough), Error> {
    // serde would read an object from a list of its members' values.
    if bytes.trim_ascii_start().first() == Some(&b'[') {
        return Err(Error::invalid("body", "must be an object"));
    }
    if std::str::from_utf8(bytes).is_err() {
        return Err(Error::invalid("body", "must be UTF-8"));
    }
    let members: Members<'_> = json(bytes)?;
    let name: Option<String> = serde_json::from_str(members.model.get()).ok();
    let name = name.ok_or_else(|| Error::invalid("model", "must be a string"))?;
    let number = |member: Option<&RawValue>| -> Option<u64> {
        let member = member.map(RawValue::get)?;
        serde_json::from_str(member).ok()
    };
    let (content, max_tokens) = match api {
        PassThroughApi::Completions => (members.prompt, members.max_tokens),
        PassThroughApi::Responses => (members.input, members.max_output_tokens),
    };
    let choices = match api {
        PassThroughApi::Completions => number(members.n).unwrap_or(1),
        PassThroughApi::Responses => 1,
    };
    // The value is a part of the body, whose place its address tells.
    let model = members.model.get();
    let start = (model.as_ptr() as usize).saturating_sub(bytes.as_ptr() as usize);
    let content_bytes = content.map_or(0, |content| content.get().len());
    let request = PassThrough {
        api,
        body: Bytes::copy_from_slice(bytes),
        model: start..start + model.len(),
        stream: members.stream == Some(true),
        // A token of English has about four bytes.
        prompt_tokens: (content_bytes as u64).div_ceil(4),
        max_tokens: number(max_tokens).map(|tokens| tokens.saturating_mul(choices)),
    };
    Ok((name, request))
}

/// The bytes of a stream of events. Dropping it cancels the provider's stream.
struct Events {
    events: PassedStream,
    ended: bool,
    id: RequestId,
    deadline: Instant,
}

impl Events {
    fn into_stream(self) -> impl Stream<Item = Result<Bytes, Infallible>> + Send {
        stream::unfold(self, |mut events| async move {
            let next = events.next().await?;
            Some((Ok(next), events))
        })
    }

    async fn next(&mut self) -> Option<Bytes> {
        if self.ended {
            return None;
        }
        let error = match timeout_at(self.deadline, self.events.next()).await {
            Ok(Some(Ok(bytes))) => return Some(bytes),
            Ok(Some(Err(error))) => error,
            Ok(None) => return None,
            Err(_) => Error::deadline_passed(),
        };
        self.ended = true;
        let body = sse::error(&error, ErrorFormat::OpenAi, &self.id);
        // The provider's last event may have broken off in the middle of a line.
        Some(format!("\n\ndata: {body}\n\n").into())
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;
    use protocol::Kind;
    use serde_json::Value;
    use std::time::Duration;

    use super::*;

    const COMPLETIONS: PassThroughApi = PassThroughApi::Completions;

    #[test]
    fn the_body_stays_as_it_came() {
        let body = "{ \"x\": {\"model\": \"no\"},\n \"n\": 2, \"max_tokens\": 5, \
                    \"mod\\u0065l\" : \"b\\u0069g\" , \"prompt\": [1, 2], \"seed\": 1.0e+400 }";
        let (model, request) = read(COMPLETIONS, body.as_bytes()).unwrap();
        assert_eq!(model, "big");
        assert_eq!(request.body, body.as_bytes());
        assert_eq!(&body[request.model.clone()], "\"b\\u0069g\"");
        assert!(!request.stream);
        assert_eq!((request.prompt_tokens, request.max_tokens), (2, Some(10)));
    }

    #[test]
    fn what_only_estimates_need_is_never_refused() {
        let body =
            r#"{"model": "big", "input": null, "max_output_tokens": "many", "stream": true}"#;
        let (_, request) = read(PassThroughApi::Responses, body.as_bytes()).unwrap();
        assert!(request.stream);
        assert_eq!((request.prompt_tokens, request.max_tokens), (0, None));
    }

    #[test]
    fn a_body_that_names_no_model_is_refused_by_its_field() {
        for (body, field) in [
            ("", "body"),
            ("[]", "body"),
            ("[\"big\"]", "body"),
            ("7", "body"),
            ("{\"prompt\": \"a\"", "body"),
            ("{\"prompt\": \"a\"}", "model"),
            ("{\"model\": 7}", "model"),
            ("{\"model\": null}", "model"),
            ("{\"model\": \"a\", \"model\": \"b\"}", "model"),
            ("{\"model\": \"a\", \"stream\": \"yes\"}", "stream"),
        ] {
            let error = read(COMPLETIONS, body.as_bytes()).unwrap_err();
            assert_eq!(error.kind(), Kind::Invalid, "{body}");
            let named = error.field().map(ToString::to_string);
            assert_eq!(named.as_deref(), Some(field), "{body}: {error}");
        }
        let error = read(COMPLETIONS, b"{\"model\": \"a\", \"user\": \"\xff\"}").unwrap_err();
        assert_eq!(error.violation().unwrap().field, "body");
    }

    #[tokio::test]
    async fn an_error_is_an_event_after_the_bytes() {
        let broken = Error::new(Kind::NotReady, "it broke off");
        let items = [Ok(Bytes::from_static(b"data: {\"a\"")), Err(broken)];
        let events = Events {
            events: stream::iter(items).boxed(),
            ended: false,
            id: RequestId(HeaderValue::from_static("1")),
            deadline: Instant::now() + Duration::from_secs(60),
        };
        let body = Body::from_stream(events.into_stream());
        let bytes = body.collect().await.unwrap().to_bytes();
        let text = String::from_utf8(bytes.to_vec()).unwrap();
        let (passed, error) = text.split_once("\n\ndata: ").unwrap();
        assert_eq!(passed, "data: {\"a\"");
        let error: Value = serde_json::from_str(error).unwrap();
        assert_eq!(error["error"]["message"], "it broke off");
    }
}
