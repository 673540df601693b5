//! Chat completions in the format of OpenAI's API, whole or as a stream of
//! events, by models of outside services.

mod messages;
mod more;
mod request;
mod response;

pub use request::{ChatCompletionRequest, Stop};

use std::time::{SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use protocol::Error;

use super::body::Json;
use super::context::RequestContext;
use super::endpoint::Endpoints;
use super::error::{ApiError, ErrorFormat};
use super::reply;
use super::sse;
use super::texts::{as_model_field, named_model};
use gateway::stack::{ChatChoice, Stack};
use response::{ChatCompletion, ChunkFormat};

/// The endpoints.
pub fn routes(stack: &Stack) -> Router<Stack> {
    Endpoints::new(stack, ErrorFormat::OpenAi)
        .authenticated("/v1/chat/completions", post(complete))
        .into_router()
}

/// Create chat completion
///
/// For models of outside services whose task is generation. Parameters are passed
/// on to the service; one that it does not have is refused by its name. So are
/// fields that are not described here: services of OpenAI's API get them as they
/// came. With `stream` the response is a stream of server-sent events, the last of
/// which is `[DONE]`.
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
    let (stream, usage) = (request.stream == Some(true), request.includes_usage());
    let model = request.model.clone();
    let request = request.into_chat()?;
    let format = ChunkFormat {
        id: format!("chatcmpl-{}", context.id.as_str()),
        created: now_s(),
        model: model.clone(),
        choices: request.choices(),
        usage,
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
    let bytes = response.choices.iter().map(ChatChoice::bytes).sum();
    let make = move || format.completion(response);
    Ok(reply::json(&context, headers, bytes, make).await?)
}

fn now_s() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}
