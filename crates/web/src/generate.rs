//! Triton's generate extension: the text that follows a text.

use axum::Router;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use protocol::Error;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::body::Json;
use super::chat::Stop;
use super::context::RequestContext;
use super::endpoint::Endpoints;
use super::error::{ApiError, ErrorFormat};
use super::model_path::{ModelPath, PathModel};
use super::reply;
use super::sse;
use super::strict::strict;
use gateway::stack::Stack;
use gateway::stack::{ChatDelta, ChatRequest};

/// A text to be continued.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(remote = "Self", deny_unknown_fields)]
#[schema(example = json!({"text_input": "What burns in a lantern?", "parameters": {"max_tokens": 64}}))]
pub struct GenerateRequest {
    /// The prompt.
    #[schema(min_length = 1)]
    pub text_input: String,
    /// The caller's id for the request, which the response repeats.
    #[serde(default)]
    pub id: Option<String>,
    /// The sampling parameters.
    #[serde(default)]
    pub parameters: Option<GenerateParameters>,
}

/// Sampling parameters.
#[derive(Debug, Clone, Default, Deserialize, ToSchema)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct GenerateParameters {
    /// The maximum number of generated tokens.
    #[serde(default)]
    #[schema(minimum = 1)]
    pub max_tokens: Option<u32>,
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
    /// Whether the response is a stream: the path decides, and this must agree
    /// with it.
    #[serde(default)]
    pub stream: Option<bool>,
}

strict!(object GenerateRequest, GenerateParameters);

/// A generated text, or a part of it.
#[derive(Debug, Serialize, ToSchema)]
pub struct GenerateResponse {
    /// The model.
    model_name: String,
    /// Its version, which is 1 for models of outside services.
    #[schema(example = "1")]
    model_version: &'static str,
    /// The caller's id for the request.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    id: Option<String>,
    /// The generated text.
    text_output: String,
}

/// The endpoints.
pub fn routes(stack: &Stack) -> Router<Stack> {
    Endpoints::new(stack, ErrorFormat::Problem)
        .authenticated("/v2/models/{model}/generate", post(generate))
        .authenticated(
            "/v2/models/{model}/versions/{version}/generate",
            post(generate),
        )
        .authenticated("/v2/models/{model}/generate_stream", post(generate_stream))
        .authenticated(
            "/v2/models/{model}/versions/{version}/generate_stream",
            post(generate_stream),
        )
        .into_router()
}

/// Generate text
///
/// Triton's generate extension, for models of outside services that generate
/// text.
#[utoipa::path(
    post, path = "/v2/models/{model}/generate", tag = "Inference", operation_id = "generate",
    params(ModelPath), request_body = GenerateRequest,
    responses((status = 200, description = "The generated text", body = GenerateResponse))
)]
pub async fn generate(
    context: RequestContext,
    model: PathModel,
    request: Json<GenerateRequest>,
) -> Result<Response, ApiError> {
    let selector = model.selector();
    let (request, format) = parse(model.name, request.value, false)?;
    let (headers, response) = context.chat(&selector, &request).await?;
    let text = response.into_text();
    let bytes = text.len();
    let make = move || format.response(text);
    Ok(reply::json(&context, headers, bytes, make).await?)
}

/// Generate text as a stream
///
/// The generated text in parts, each a server-sent event.
#[utoipa::path(
    post, path = "/v2/models/{model}/generate_stream", tag = "Inference", operation_id = "generate_stream",
    params(ModelPath), request_body = GenerateRequest,
    responses((status = 200, description = "The generated text, each part an event", body = String, content_type = "text/event-stream"))
)]
pub async fn generate_stream(
    context: RequestContext,
    model: PathModel,
    request: Json<GenerateRequest>,
) -> Result<Response, ApiError> {
    let selector = model.selector();
    let (request, format) = parse(model.name, request.value, true)?;
    let (headers, parts) = context.chat_stream(&selector, &request).await?;
    let response = sse::response(parts, format, ErrorFormat::Problem, &context);
    Ok((headers, response).into_response())
}

fn parse(
    model: String,
    request: GenerateRequest,
    stream: bool,
) -> Result<(ChatRequest, GenerateFormat), Error> {
    if request.text_input.is_empty() {
        return Err(Error::invalid("text_input", "must not be empty"));
    }
    let parameters = request.parameters.unwrap_or_default();
    if parameters.stream.is_some_and(|given| given != stream) {
        let reason = format!("must be {stream} for this path");
        return Err(Error::invalid("parameters.stream", reason));
    }
    let chat = ChatRequest {
        max_tokens: parameters.max_tokens,
        temperature: parameters.temperature,
        top_p: parameters.top_p,
        stop: parameters.stop.map(|stop| stop.0).unwrap_or_default(),
        ..ChatRequest::from_prompt(request.text_input)
    };
    chat.check()
        .map_err(|error| error.map_field(|field| Some(format!("parameters.{field}").into())))?;
    let id = request.id;
    Ok((chat, GenerateFormat { model, id }))
}

/// The format of responses and of the events of a stream.
#[derive(Debug, Clone)]
struct GenerateFormat {
    model: String,
    id: Option<String>,
}

impl GenerateFormat {
    fn response(&self, text_output: String) -> GenerateResponse {
        GenerateResponse {
            model_name: self.model.clone(),
            model_version: "1",
            id: self.id.clone(),
            text_output,
        }
    }
}

impl sse::EventFormat for GenerateFormat {
    type Data = GenerateResponse;

    fn first(&self) -> Option<GenerateResponse> {
        None
    }

    fn part(&self, part: ChatDelta) -> Vec<GenerateResponse> {
        if part.text.is_empty() {
            return Vec::new();
        }
        vec![self.response(part.text)]
    }

    fn last(&self) -> Option<&'static str> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::super::body::json;
    use super::*;

    #[test]
    fn a_text_and_its_parameters_are_read() {
        let read = |text: &str| parse("a".into(), json(text.as_bytes())?, false);
        let (chat, format) = read(
            r#"{"text_input": "q", "id": "7", "parameters": {"max_tokens": 3, "stop": ["x"]}}"#,
        )
        .unwrap();
        assert_eq!((chat.max_tokens, chat.stop.len()), (Some(3), 1));
        let written = serde_json::to_value(format.response("b".into())).unwrap();
        let expected = serde_json::json!(
            {"model_name": "a", "model_version": "1", "id": "7", "text_output": "b"}
        );
        assert_eq!(written, expected);
        for (text, field) in [
            (r#"{"text_input": ""}"#, "text_input"),
            (r#"{"text_input": "a", "max_token": 1}"#, "max_token"),
            (
                r#"{"text_input": "a", "parameters": {"stream": true}}"#,
                "parameters.stream",
            ),
            (
                r#"{"text_input": "a", "parameters": {"max_tokens": 0}}"#,
                "parameters.max_tokens",
            ),
        ] {
            let error = read(text).unwrap_err();
            assert_eq!(error.violation().unwrap().field, field);
        }
    }
}
