//! Swagger UI for the OpenAPI document, at `/docs/`. All of its files are in the
//! binary, and its page may make requests to this server only.

use std::sync::{Arc, LazyLock};

use axum::Router;
use axum::extract::Path;
use axum::response::{IntoResponse, Redirect, Response};
use axum::routing::get;
use http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use http::{HeaderMap, HeaderName, HeaderValue};
use protocol::{Error, Kind};
use utoipa_swagger_ui::{Config, serve};

use super::endpoint::Endpoints;
use super::error::{ApiError, ErrorFormat};
use super::path_not_found;
use gateway::stack::Stack;

/// Everything comes from this server. Swagger UI sets styles of elements and
/// has images in its stylesheet and scripts, as `data:`.
const POLICY: &str = concat!(
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; ",
    "img-src 'self' data:; connect-src 'self'; ",
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
);

/// The stylesheet that Swagger UI leaves to the page around it.
const STYLE_NAME: &str = "index.css";
const STYLE: &str = include_str!("docs/index.css");

static CONFIG: LazyLock<Arc<Config<'static>>> = LazyLock::new(|| {
    let config = Config::from("/openapi.json")
        // Not Swagger's validator, which is a service on the internet.
        .validator_url("none")
        .deep_linking(true)
        .display_request_duration(true)
        .filter(true)
        .try_it_out_enabled(true);
    Arc::new(config)
});

/// The routes. They are open: they hold the same in each copy of the binary.
pub fn routes(stack: &Stack) -> Router<Stack> {
    Endpoints::new(stack, ErrorFormat::Problem)
        .public("/docs", get(redirect))
        .public("/docs/", get(page))
        .public("/docs/{file}", get(file))
        .into_router()
}

/// The addresses of the page's files are relative to `/docs/`.
async fn redirect() -> Redirect {
    Redirect::to("docs/")
}

async fn page() -> Result<Response, ApiError> {
    asset("index.html")
}

async fn file(Path(name): Path<String>) -> Result<Response, ApiError> {
    asset(&name)
}

/// One file of the page.
fn asset(name: &str) -> Result<Response, ApiError> {
    let headers = HeaderMap::from_iter(
        [
            (CONTENT_SECURITY_POLICY, POLICY),
            (X_CONTENT_TYPE_OPTIONS, "nosniff"),
            (REFERRER_POLICY, "no-referrer"),
            // Another release has other files at the same addresses.
            (CACHE_CONTROL, "no-cache"),
        ]
        .map(|(name, value): (HeaderName, _)| (name, HeaderValue::from_static(value))),
    );
    if name == STYLE_NAME {
        let kind = [(CONTENT_TYPE, "text/css")];
        return Ok((headers, kind, STYLE).into_response());
    }
    let file = serve(name, CONFIG.clone())
        .map_err(|error| Error::new(Kind::Internal, format!("Swagger UI: {error}")))?;
    let file = file.ok_or_else(path_not_found)?;
    let kind = [(CONTENT_TYPE, file.content_type)];
    Ok((headers, kind, file.bytes).into_response())
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;

    async fn text(name: &str) -> String {
        let response = asset(name).unwrap();
        let policy = response.headers()[CONTENT_SECURITY_POLICY]
            .to_str()
            .unwrap();
        assert!(policy.starts_with("default-src 'none';"), "{name}");
        assert!(policy.contains("connect-src 'self'"), "{name}");
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        String::from_utf8(bytes.to_vec()).unwrap()
    }

    #[tokio::test]
    async fn the_page_makes_no_foreign_requests() {
        let script = text("swagger-initializer.js").await;
        assert!(script.contains(r#""validatorUrl": "none""#), "{script}");
        for text in [script, text(STYLE_NAME).await] {
            assert!(!text.contains("http://"), "an outside asset");
            assert!(!text.contains("https://"), "an outside asset");
        }
        assert!(POLICY.contains("script-src 'self';"));
    }

    #[tokio::test]
    async fn a_file_that_is_not_there_is_refused() {
        for name in ["secret.html", "../openapi.json", "page.js"] {
            assert_eq!(asset(name).unwrap_err().error.kind(), Kind::NotFound);
        }
    }
}
