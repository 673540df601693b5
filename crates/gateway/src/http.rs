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
mod strict;
mod tensors;

use axum::Router;
use axum::extract::Request;
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse, Response};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
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
        .fallback(async || unknown_path())
        .with_state(stack);
    let worthwhile = SizeAbove::new(COMPRESSED_BYTES_MIN.into())
        .and(NotForContentType::const_new("text/event-stream"));
    let routes = routes.layer(RequestDecompressionLayer::new()).layer(
        CompressionLayer::new()
            .quality(CompressionLevel::Fastest)
            .compress_when(worthwhile),
    );
    let routes = match settings.cors_origin.is_empty() {
        true => routes.layer(from_fn(same_origin)),
        false => routes.layer(cross_origin(&settings.cors_origin)),
    };
    routes.layer(from_fn(outermost))
}

/// Refuses what the web page of another site has a browser send: it needs no
/// answer to unload a model of a gateway that its reader can reach.
async fn same_origin(request: Request, next: Next) -> Response {
    if !changes_elsewhere(request.method(), request.headers()) {
        return next.run(request).await;
    }
    platform::body::discard(request.into_body()).await;
    let message = "web pages of other origins may not call: see --cors-origin";
    Refused::from(Error::new(Kind::Forbidden, message)).into_response()
}

/// Whether a browser says that another site asks for more than to look.
fn changes_elsewhere(method: &Method, headers: &HeaderMap) -> bool {
    let site = headers.get("sec-fetch-site");
    let elsewhere = site.is_some_and(|site| site == "cross-site" || site == "same-site");
    elsewhere && !matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS)
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

fn unknown_path() -> Refused {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_of_other_sites_may_only_look() {
        let changes = |method: Method, site: Option<&'static str>| {
            let site = site.map(HeaderValue::from_static);
            let headers = site.map(|site| (HeaderName::from_static("sec-fetch-site"), site));
            changes_elsewhere(&method, &headers.into_iter().collect())
        };
        for site in ["cross-site", "same-site"] {
            assert!(changes(Method::POST, Some(site)));
            assert!(changes(Method::DELETE, Some(site)));
            assert!(!changes(Method::GET, Some(site)));
            assert!(!changes(Method::OPTIONS, Some(site)));
        }
        for site in [Some("same-origin"), Some("none"), None] {
            assert!(!changes(Method::POST, site));
        }
    }
}
