//! Triton's generate extension: a text, and what follows it.

use axum::response::{IntoResponse, Response};
use protocol::Error;
use providers::{ChatDelta, ChatRequest};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::super::body::Json;
use super::super::gate::Visit;
use super::super::openapi::ModelPath;
use super::super::problem::{Refused, Shape};
use super::super::rest::Model;
use super::super::strict::strict;
use super::message::Stop;
use super::{events, way};

/// A text to be continued.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(remote = "Self", deny_unknown_fields)]
#[schema(example = json!({"text_input": "What burns in a lantern?", "parameters": {"max_tokens": 64}}))]
pub struct GenerateRequest {
    /// The text.
    #[schema(min_length = 1)]
    pub text_input: String,
    /// The caller's id for the request, which comes back.
    #[serde(default)]
    pub id: Option<String>,
    /// How it is continued.
    #[serde(default)]
    pub parameters: Option<GenerateParameters>,
}

/// How a text is continued.
#[derive(Debug, Clone, Default, Deserialize, ToSchema)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct GenerateParameters {
    /// Tokens that the answer may have.
    #[serde(default)]
    #[schema(minimum = 1)]
    pub max_tokens: Option<u32>,
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
    /// The address says whether the answer comes in parts, and this must not
    /// say otherwise.
    #[serde(default)]
    pub stream: Option<bool>,
}

strict!(object GenerateRequest, GenerateParameters);

/// A text continued, or a part of it.
#[derive(Debug, Serialize, ToSchema)]
pub struct GenerateResponse {
    /// The model.
    model_name: String,
    /// Its version: models of outside services have one.
    #[schema(example = "1")]
    model_version: &'static str,
    /// The caller's id for the request.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    id: Option<String>,
    /// What follows.
    text_output: String,
}

/// Continue a text
///
/// Triton's generate extension, for models of outside services that generate
/// text.
#[utoipa::path(
    post, path = "/v2/models/{model}/generate", tag = "Inference", operation_id = "generate",
    params(ModelPath), request_body = GenerateRequest,
    responses((status = 200, description = "What follows", body = GenerateResponse))
)]
pub async fn generate(
    visit: Visit,
    model: Model,
    request: Json<GenerateRequest>,
) -> Result<Response, Refused> {
    let wanted = model.wanted();
    let (asked, writer) = read(model.name, request.value, false)?;
    let (headers, answer) = way::chat(&visit, &wanted, &asked).await?;
    let response = writer.response(answer.text);
    Ok((headers, axum::Json(response)).into_response())
}

/// Continue a text in parts
///
/// The same with the answer as server-sent events.
#[utoipa::path(
    post, path = "/v2/models/{model}/generate_stream", tag = "Inference", operation_id = "generate_stream",
    params(ModelPath), request_body = GenerateRequest,
    responses((status = 200, description = "What follows, each part an event", body = String, content_type = "text/event-stream"))
)]
pub async fn generate_stream(
    visit: Visit,
    model: Model,
    request: Json<GenerateRequest>,
) -> Result<Response, Refused> {
    let wanted = model.wanted();
    let (asked, writer) = read(model.name, request.value, true)?;
    let (headers, parts) = way::chat_stream(&visit, &wanted, &asked).await?;
    let response = events::response(parts, writer, Shape::Problem, &visit);
    Ok((headers, response).into_response())
}

fn read(
    model: String,
    request: GenerateRequest,
    stream: bool,
) -> Result<(ChatRequest, Writer), Error> {
    if request.text_input.is_empty() {
        return Err(Error::invalid("text_input", "must not be empty"));
    }
    let parameters = request.parameters.unwrap_or_default();
    if parameters.stream.is_some_and(|said| said != stream) {
        let reason = "says otherwise than the address";
        return Err(Error::invalid("parameters.stream", reason));
    }
    let asked = ChatRequest {
        max_tokens: parameters.max_tokens,
        temperature: parameters.temperature,
        top_p: parameters.top_p,
        stop: parameters.stop.map(|stop| stop.0).unwrap_or_default(),
        ..ChatRequest::from_prompt(request.text_input)
    };
    asked.check().map_err(|error| {
        error.renamed(|field, reason| Some((format!("parameters.{field}"), reason.to_owned())))
    })?;
    let id = request.id;
    Ok((asked, Writer { model, id }))
}

/// Writes the parts of an answer.
#[derive(Debug, Clone)]
struct Writer {
    model: String,
    id: Option<String>,
}

impl Writer {
    fn response(&self, text_output: String) -> GenerateResponse {
        GenerateResponse {
            model_name: self.model.clone(),
            model_version: "1",
            id: self.id.clone(),
            text_output,
        }
    }
}

impl events::Events for Writer {
    fn first(&self) -> Option<Value> {
        None
    }

    fn part(&self, part: ChatDelta) -> Vec<Value> {
        if part.text.is_empty() {
            return Vec::new();
        }
        // Nothing in it can fail to be written.
        vec![serde_json::to_value(self.response(part.text)).unwrap_or_default()]
    }

    fn last(&self) -> Option<&'static str> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::body::json;
    use super::*;

    #[test]
    fn a_text_and_its_parameters_are_read() {
        let read = |text: &str| read("a".into(), json(text.as_bytes())?, false);
        let (asked, writer) = read(
            r#"{"text_input": "q", "id": "7", "parameters": {"max_tokens": 3, "stop": ["x"]}}"#,
        )
        .unwrap();
        assert_eq!((asked.max_tokens, asked.stop.len()), (Some(3), 1));
        let written = serde_json::to_value(writer.response("b".into())).unwrap();
        let wanted = serde_json::json!(
            {"model_name": "a", "model_version": "1", "id": "7", "text_output": "b"}
        );
        assert_eq!(written, wanted);
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
