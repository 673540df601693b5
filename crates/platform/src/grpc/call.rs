use std::sync::Arc;
use std::time::Duration;

use http::header::CONTENT_TYPE;
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Method, Request};
use tokio::time::Instant;
use tonic::Status;

use super::{MessageLimits, Messages, invalid};
use crate::body::RequestBody;
use crate::tls::Peer;

/// The longest deadline of a stream, so that clocks do not overflow.
const STREAM_MAX: Duration = Duration::from_secs(365 * 24 * 3600);

/// A call whose messages have not been read yet.
#[derive(Debug)]
pub struct Call {
    parts: Parts,
    body: RequestBody,
    /// The other end of the connection.
    pub peer: Arc<Peer>,
    /// When the head arrived.
    pub arrived: Instant,
    /// When the caller stops waiting; every call has a deadline.
    pub deadline: Instant,
    /// The deadline of a streaming call: the caller's, if it set one.
    pub stream_deadline: Option<Instant>,
}

/// Whether a request is a call of gRPC: other protocols, such as gRPC-Web, have a
/// content type that begins alike.
pub(crate) fn is_grpc<B>(request: &Request<B>) -> bool {
    let kind = request.headers().get(CONTENT_TYPE);
    let kind = kind.map(HeaderValue::as_bytes).unwrap_or_default();
    let mut parts = kind.split(|byte| matches!(*byte, b'+' | b';'));
    let named = parts.next().unwrap_or_default().trim_ascii();
    request.method() == Method::POST && named.eq_ignore_ascii_case(b"application/grpc")
}

impl Call {
    /// Checks the head of a request. The deadline is the caller's, at most
    /// `deadline_max` from now.
    pub fn new(
        request: Request<RequestBody>,
        peer: Arc<Peer>,
        deadline_max: Duration,
    ) -> Result<Self, Status> {
        let (parts, body) = request.into_parts();
        let arrived = Instant::now();
        let timeout = grpc_timeout(&parts.headers)?;
        Ok(Self {
            deadline: arrived + timeout.unwrap_or(deadline_max).min(deadline_max),
            stream_deadline: timeout.map(|timeout| arrived + timeout.min(STREAM_MAX)),
            parts,
            body,
            peer,
            arrived,
        })
    }

    /// The call's path: `/package.Service/Method`.
    pub fn path(&self) -> &str {
        self.parts.uri.path()
    }

    /// The caller's metadata.
    pub fn metadata(&self) -> &HeaderMap {
        &self.parts.headers
    }

    /// One value of the caller's metadata, if it is text.
    pub fn metadata_text(&self, key: &str) -> Option<&str> {
        self.parts.headers.get(key)?.to_str().ok()
    }

    /// The messages, to be read.
    pub fn into_messages(self, limits: &MessageLimits) -> Messages {
        self.into_parts(limits).1
    }

    /// The head, and the messages to be read. Their bytes are held for the holder
    /// of the limits, or for the peer where they have none.
    pub fn into_parts(self, limits: &MessageLimits) -> (Parts, Messages) {
        let encoding = self
            .parts
            .headers
            .get("grpc-encoding")
            .and_then(|encoding| encoding.to_str().ok());
        let messages = Messages::new(self.body, encoding, limits, &self.peer);
        (self.parts, messages)
    }

    /// The path and query as received.
    pub fn path_and_query(&self) -> http::uri::PathAndQuery {
        self.parts
            .uri
            .path_and_query()
            .cloned()
            .unwrap_or_else(|| http::uri::PathAndQuery::from_static("/"))
    }

    /// The request for a generated tonic service.
    pub(crate) fn into_tonic(self) -> Request<tonic::body::Body> {
        Request::from_parts(self.parts, tonic::body::Body::new(self.body))
    }
}

/// The caller's `grpc-timeout`; a malformed one is an error.
pub fn grpc_timeout(headers: &HeaderMap) -> Result<Option<Duration>, Status> {
    let Some(value) = headers.get("grpc-timeout") else {
        return Ok(None);
    };
    value
        .to_str()
        .ok()
        .and_then(parse_timeout)
        .map(Some)
        .ok_or_else(|| {
            invalid(
                "grpc-timeout",
                "must be at most 8 digits and a unit: H, M, S, m, u or n",
            )
        })
}

fn parse_timeout(value: &str) -> Option<Duration> {
    let (digits, unit) = value.split_at_checked(value.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(count * 3600),
        "M" => Duration::from_secs(count * 60),
        "S" => Duration::from_secs(count),
        "m" => Duration::from_millis(count),
        "u" => Duration::from_micros(count),
        "n" => Duration::from_nanos(count),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_calls_of_grpc_are_taken_for_such() {
        for (method, kind, grpc) in [
            ("POST", "application/grpc", true),
            ("POST", "application/grpc+proto", true),
            ("POST", "Application/gRPC; charset=utf-8", true),
            ("POST", "application/grpc-web", false),
            ("POST", "application/grpc-web+proto", false),
            ("POST", "application/json", false),
            ("POST", "", false),
            ("GET", "application/grpc", false),
        ] {
            let request = Request::builder().method(method);
            let request = request.header(CONTENT_TYPE, kind).body(()).unwrap();
            assert_eq!(is_grpc(&request), grpc, "{method} {kind}");
        }
        assert!(!is_grpc(&Request::post("/").body(()).unwrap()));
    }

    #[test]
    fn timeouts_are_read_or_refused() {
        assert_eq!(parse_timeout("50m"), Some(Duration::from_millis(50)));
        assert_eq!(
            parse_timeout("99999999H"),
            Some(Duration::from_secs(99_999_999 * 3600))
        );
        for wrong in ["", "m", "5", "-5m", "123456789m", "5x", "é", "5é"] {
            assert_eq!(parse_timeout(wrong), None, "{wrong}");
        }
    }
}
