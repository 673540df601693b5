//! The HTTP door: the same requests as at the gRPC door, in the JSON of several
//! APIs. Each route is an endpoint, which takes its requests through the order of
//! [`gateway::stack`].

mod body;
mod chat;
mod classify;
mod compression;
mod context;
mod docs;
mod endpoint;
mod error;
mod generate;
mod infer;
mod json_words;
#[cfg(test)]
mod linear;
mod model_cache;
mod model_path;
mod openai;
mod openapi;
mod origin;
mod pass_through;
mod reply;
mod request_id;
mod rerank;
mod rest;
mod schemas;
mod sse;
mod strict;
mod texts;
mod timeouts;
mod waiting;

pub use origin::Exposure;

use std::sync::Arc;

use axum::Router;
use axum::extract::Request;
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::Response;
use http::{HeaderName, HeaderValue, StatusCode};
use protocol::{Error, Kind};
use tower_http::CompressionLevel;
use tower_http::compression::CompressionLayer;
use tower_http::compression::predicate::{NotForContentType, Predicate, SizeAbove};
use tower_http::cors::{AllowHeaders, AllowMethods, AllowOrigin, CorsLayer, ExposeHeaders};

use error::{ApiError, ErrorFormat};
use gateway::stack::Stack;
use origin::Guard;
use request_id::RequestId;

/// Settings of the HTTP port.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct HttpSettings {
    /// Web pages of this origin may call; repeat for several, or * for all. It is
    /// written as browsers do: SCHEME://HOST[:PORT], in lower case, without a path
    #[arg(long, value_name = "ORIGIN", value_parser = origin::listed_origin)]
    pub cors_origin: Vec<String>,
    /// A name, without a port, that requests may use for this server; repeat for
    /// several. On a loopback address without a policy requests must use an IP
    /// address, localhost or one of these names
    #[arg(long, value_name = "NAME")]
    pub http_host: Vec<String>,
}

/// Shorter responses are not worth compressing.
const COMPRESSED_BYTES_MIN: u16 = 1024;

/// Every route of the HTTP door. A request passes the layers from the last to
/// the first.
pub fn router(stack: Stack, settings: &HttpSettings, exposure: Exposure) -> Router {
    let routes = Router::new()
        .merge(rest::routes(&stack))
        .merge(openai::routes(&stack))
        .merge(chat::routes(&stack))
        .merge(pass_through::routes(&stack))
        .merge(generate::routes(&stack))
        .merge(rerank::routes(&stack))
        .merge(classify::routes(&stack))
        .merge(openapi::routes(&stack))
        .merge(docs::routes(&stack))
        .method_not_allowed_fallback(method_not_allowed)
        .fallback(unknown_path)
        .with_state(stack.clone());
    let worthwhile = SizeAbove::new(COMPRESSED_BYTES_MIN.into())
        .and(NotForContentType::const_new("text/event-stream"))
        .and(compression::Short);
    let routes = routes.layer(from_fn_with_state(stack, compression::compress));
    let routes = routes.layer(from_fn(known_encoding)).layer(
        CompressionLayer::new()
            .quality(CompressionLevel::Fastest)
            .compress_when(worthwhile),
    );
    let routes = if settings.cors_origin.is_empty() {
        routes
    } else {
        routes.layer(cross_origin(&settings.cors_origin))
    };
    let guard = Arc::new(Guard::new(settings, exposure));
    routes
        .layer(from_fn_with_state(guard, origin::guard))
        .layer(from_fn(outermost))
}

/// Web pages of these origins may do what other callers may.
fn cross_origin(origins: &[String]) -> CorsLayer {
    let origins = if origins.iter().any(|origin| origin == "*") {
        AllowOrigin::any()
    } else {
        AllowOrigin::list(origins.iter().filter_map(|o| HeaderValue::try_from(o).ok()))
    };
    CorsLayer::new()
        .allow_origin(origins)
        .allow_methods(AllowMethods::mirror_request())
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers(ExposeHeaders::list(
            context::RESPONSE_HEADERS
                .map(HeaderName::from_static)
                .into_iter()
                .chain([http::header::RETRY_AFTER, error::RETRY_AFTER_MS])
                .chain([HeaderName::from_static(infer::HEADER_LENGTH)]),
        ))
}

async fn unknown_path() -> ApiError {
    path_not_found()
}

fn path_not_found() -> ApiError {
    Error::new(Kind::NotFound, "the path does not exist").into()
}

async fn method_not_allowed() -> ApiError {
    ApiError {
        status: Some(StatusCode::METHOD_NOT_ALLOWED),
        ..error::method_not_allowed().into()
    }
}

/// Refuses a body in an encoding that is not supported, whoever would read it.
async fn known_encoding(request: Request, next: Next) -> Result<Response, ApiError> {
    if let Err(error) = compression::of_body(request.headers()) {
        return Err(ApiError {
            status: Some(StatusCode::UNSUPPORTED_MEDIA_TYPE),
            ..error.into()
        });
    }
    Ok(next.run(request).await)
}

/// Gives each request its id, and each error the format of its path, whichever
/// layer made it.
async fn outermost(mut request: Request, next: Next) -> Response {
    let id = RequestId::of(request.headers());
    let format = ErrorFormat::of_path(request.uri().path());
    request.extensions_mut().insert(id.clone());
    let mut response = next.run(request).await;
    if let Some(error) = error::from_middleware(&response) {
        response.extensions_mut().insert(error);
    }
    let mut response = error::render(response, format, &id);
    response.headers_mut().insert(request_id::REQUEST_ID, id.0);
    response
}
