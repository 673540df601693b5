//! The page that shows the document and tries its operations. Everything it
//! needs is in the binary, and it may ask nobody but this server.

use axum::Router;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use http::{HeaderMap, HeaderName, HeaderValue};

use super::gate::Routes;
use super::problem::Shape;
use crate::stack::Stack;

const PAGE: &str = include_str!("docs/page.html");
const STYLE: &str = include_str!("docs/page.css");
const SCRIPT: &str = include_str!("docs/page.js");
const LANTERN: &str = include_str!("docs/lantern.svg");

/// Nothing is run, shown or asked but what comes from this server.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; \
     connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Every route. They are open: they say what any copy of the binary says.
pub fn routes(stack: &Stack) -> Router<Stack> {
    Routes::new(stack, Shape::Problem)
        .open("/docs", get(page))
        .open("/docs/page.css", get(style))
        .open("/docs/page.js", get(script))
        .open("/docs/lantern.svg", get(lantern))
        .into_router()
}

async fn page() -> Response {
    asset("text/html; charset=utf-8", PAGE)
}

async fn style() -> Response {
    asset("text/css; charset=utf-8", STYLE)
}

async fn script() -> Response {
    asset("text/javascript; charset=utf-8", SCRIPT)
}

async fn lantern() -> Response {
    asset("image/svg+xml", LANTERN)
}

/// One file of the page.
fn asset(kind: &'static str, text: &'static str) -> Response {
    let headers: [(HeaderName, &'static str); 5] = [
        (CONTENT_TYPE, kind),
        (CONTENT_SECURITY_POLICY, POLICY),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (REFERRER_POLICY, "no-referrer"),
        // Another release has another page at the same address.
        (CACHE_CONTROL, "no-cache"),
    ];
    let headers = headers.map(|(name, value)| (name, HeaderValue::from_static(value)));
    (HeaderMap::from_iter(headers), text).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_asks_nobody_else() {
        for text in [PAGE, STYLE, SCRIPT] {
            assert!(!text.contains("http://"), "an outside asset");
            assert!(!text.contains("https://"), "an outside asset");
            assert!(!text.contains("innerHTML"), "text that is read as HTML");
        }
        // The policy allows neither.
        assert!(!PAGE.contains("style=") && !PAGE.contains("<style"));
        assert!(!PAGE.contains("onclick=") && !PAGE.contains("<script>"));
    }

    #[test]
    fn every_file_has_the_policy() {
        let response = asset("text/css", STYLE);
        let policy = response.headers()[CONTENT_SECURITY_POLICY]
            .to_str()
            .unwrap();
        assert!(policy.starts_with("default-src 'none';"));
        assert!(policy.contains("connect-src 'self'"));
    }
}
