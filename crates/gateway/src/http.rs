//! The HTTP door: the same requests as the gRPC door's, in JSON. Every route
//! stands behind the [`gate`], which is the order of [`crate::stack`] again.

mod ask;
mod body;
mod chat;
mod classify;
mod docs;
mod gate;
mod openai;
mod openapi;
mod problem;
mod rerank;
mod rest;
mod tensors;

use axum::Router;
use axum::extract::Request;
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse, Response};
use http::{HeaderName, HeaderValue, StatusCode};
use protocol::{Error, Kind};
use tower_http::CompressionLevel;
use tower_http::compression::CompressionLayer;
use tower_http::compression::predicate::{NotForContentType, Predicate, SizeAbove};
use tower_http::cors::{AllowHeaders, AllowMethods, AllowOrigin, CorsLayer, ExposeHeaders};
use tower_http::decompression::RequestDecompressionLayer;

use crate::stack::Stack;
use gate::RequestId;
use problem::{Refused, Shape};

/// What the HTTP port is held to.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct HttpSettings {
    /// Web pages of this origin may call; repeat for several, or * for all
    #[arg(long, value_name = "ORIGIN")]
    pub cors_origin: Vec<String>,
}

/// Answers that are shorter are not worth compressing.
const COMPRESSED_BYTES_MIN: u16 = 1024;

/// Every route of the door. A request meets the layers from the last to the
/// first.
pub fn router(stack: Stack, settings: &HttpSettings) -> Router {
    let routes = Router::new()
        .merge(rest::routes(&stack))
        .merge(openai::routes(&stack))
        .merge(chat::routes(&stack))
        .merge(rerank::routes(&stack))
        .merge(classify::routes(&stack))
        .merge(openapi::routes(&stack))
        .merge(docs::routes(&stack))
        .method_not_allowed_fallback(wrong_method)
        .fallback(unknown_path)
        .with_state(stack);
    let worthwhile = SizeAbove::new(COMPRESSED_BYTES_MIN.into())
        .and(NotForContentType::const_new("text/event-stream"));
    let routes = routes.layer(RequestDecompressionLayer::new()).layer(
        CompressionLayer::new()
            .quality(CompressionLevel::Fastest)
            .compress_when(worthwhile),
    );
    let routes = match settings.cors_origin.is_empty() {
        true => routes,
        false => routes.layer(cross_origin(&settings.cors_origin)),
    };
    routes.layer(from_fn(outermost))
}

/// What web pages of other origins may do: whatever other callers may.
fn cross_origin(origins: &[String]) -> CorsLayer {
    let origins = match origins.iter().any(|origin| origin == "*") {
        true => AllowOrigin::any(),
        false => AllowOrigin::list(origins.iter().filter_map(|o| HeaderValue::try_from(o).ok())),
    };
    CorsLayer::new()
        .allow_origin(origins)
        .allow_methods(AllowMethods::mirror_request())
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers(ExposeHeaders::list(
            gate::ANSWERED
                .map(HeaderName::from_static)
                .into_iter()
                .chain([http::header::RETRY_AFTER, problem::RETRY_AFTER_MS])
                .chain([HeaderName::from_static(tensors::HEADER_LENGTH)]),
        ))
}

async fn unknown_path() -> Refused {
    Error::new(Kind::NotFound, "there is nothing at this path").into()
}

async fn wrong_method() -> Refused {
    Refused {
        status: Some(StatusCode::METHOD_NOT_ALLOWED),
        ..problem::wrong_method().into()
    }
}

/// Gives each request its id, and each answer a body in the form that its
/// path's callers know, whoever refused the request.
async fn outermost(mut request: Request, next: Next) -> Response {
    let id = RequestId::of(request.headers());
    let shape = Shape::of_path(request.uri().path());
    request.extensions_mut().insert(id.clone());
    let mut response = next.run(request).await;
    if let Some(foreign) = problem::foreign(&response) {
        response = foreign.into_response();
    }
    let mut response = problem::written(response, shape, &id);
    response.headers_mut().insert(gate::REQUEST_ID, id.0);
    response
}
