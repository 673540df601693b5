//! Error responses: the status of [`Kind::http_status`], and a body in the format
//! that the clients of the path read.

use std::time::Duration;

use axum::Json;
use axum::response::{IntoResponse, Response};
use http::header::{ALLOW, CONTENT_TYPE, RETRY_AFTER, VARY, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use platform::grpc::code_name;
use protocol::{Error, Fault, FieldPath, Kind};
use serde::Serialize;
use serde_json::json;
use tonic::Status;
use utoipa::ToSchema;

use super::request_id::RequestId;

/// `retry-after` in milliseconds, which some clients prefer.
pub const RETRY_AFTER_MS: HeaderName = HeaderName::from_static("retry-after-ms");

/// An error of a request. The body of its response is written by [`render`],
/// which knows the format and the request's id.
#[derive(Debug, Clone)]
pub struct ApiError {
    /// The error.
    pub error: Error,
    /// The HTTP status, where it is not the kind's own.
    pub status: Option<StatusCode>,
}

impl From<Error> for ApiError {
    fn from(error: Error) -> Self {
        Self {
            error,
            status: None,
        }
    }
}

impl From<Status> for ApiError {
    fn from(status: Status) -> Self {
        Error::from_status(&status).into()
    }
}

impl ApiError {
    fn status(&self) -> StatusCode {
        let own = StatusCode::from_u16(self.error.kind().http_status());
        let own = own.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        self.status.unwrap_or(own)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = self.status().into_response();
        response.extensions_mut().insert(self);
        response
    }
}

/// The format of error bodies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorFormat {
    /// Problem details (RFC 9457), with the `error` that clients of REST v2 read.
    Problem,
    /// The error object of OpenAI's API.
    OpenAi,
}

impl ErrorFormat {
    /// The format of a path, also of one without a route.
    pub fn of_path(path: &str) -> Self {
        if path.starts_with("/v1/") || path == "/v1" {
            Self::OpenAi
        } else {
            Self::Problem
        }
    }

    /// The body of an error, also as the last event of a stream.
    pub fn body(self, error: &Error, status: StatusCode, id: &RequestId) -> serde_json::Value {
        match self {
            Self::Problem => json!(Problem::new(error, status, id)),
            Self::OpenAi => json!(OpenAiError {
                error: OpenAiReason {
                    message: error.to_string(),
                    r#type: openai_type(error),
                    param: error.field().map(FieldPath::as_str),
                    code: openai_code(error),
                },
            }),
        }
    }
}

/// Problem details (RFC 9457).
#[derive(Debug, Serialize, ToSchema)]
pub struct Problem<'e> {
    /// Always `about:blank`: the problem is that of the status.
    #[schema(example = "about:blank")]
    r#type: &'static str,
    /// The reason phrase of the status.
    #[schema(example = "Bad Request")]
    title: &'static str,
    /// The HTTP status.
    #[schema(minimum = 400, maximum = 599)]
    status: u16,
    /// A description of the problem or of its remedy.
    detail: String,
    /// The name of the gRPC status.
    #[schema(example = "INVALID_ARGUMENT")]
    code: &'static str,
    /// The path of the invalid field.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, example = "inputs[0].shape")]
    field: Option<&'e str>,
    /// The request's id.
    request_id: &'e str,
    /// The same as `detail`, for clients of REST v2.
    error: String,
}

/// An error in the format of OpenAI's API.
#[derive(Debug, Serialize, ToSchema)]
pub struct OpenAiError<'e> {
    /// The error.
    error: OpenAiReason<'e>,
}

/// The problem.
#[derive(Debug, Serialize, ToSchema)]
pub struct OpenAiReason<'e> {
    /// A description of the problem or of its remedy.
    message: String,
    /// The type of the error.
    #[schema(example = "invalid_request_error")]
    r#type: &'static str,
    /// The path of the invalid field.
    #[schema(example = "input[1]")]
    param: Option<&'e str>,
    /// The error code, for programs.
    #[schema(example = "invalid_argument")]
    code: String,
}

impl<'e> Problem<'e> {
    fn new(error: &'e Error, status: StatusCode, id: &'e RequestId) -> Self {
        let message = error.to_string();
        Self {
            r#type: "about:blank",
            title: status.canonical_reason().unwrap_or("Client Closed Request"),
            status: status.as_u16(),
            detail: message.clone(),
            code: code_name(error.kind().code()),
            field: error.field().map(FieldPath::as_str),
            request_id: id.as_str(),
            error: message,
        }
    }
}

/// A request that may be retried later than this has exhausted a quota, not
/// exceeded a rate.
const RATE_RETRY_AFTER_MAX: Duration = Duration::from_secs(300);

fn is_quota_exhausted(error: &Error) -> bool {
    let late = |after: Duration| after > RATE_RETRY_AFTER_MAX;
    error.kind() == Kind::QuotaSpent && error.retry_after().is_some_and(late)
}

fn openai_type(error: &Error) -> &'static str {
    match error.kind() {
        Kind::Unauthenticated => "authentication_error",
        Kind::Forbidden => "permission_error",
        Kind::QuotaSpent if is_quota_exhausted(error) => "insufficient_quota",
        Kind::QuotaSpent => "rate_limit_error",
        _ if error.fault() == Fault::Caller => "invalid_request_error",
        _ => "server_error",
    }
}

fn openai_code(error: &Error) -> String {
    match error.kind() {
        Kind::NotFound if error.violation().is_some() => "model_not_found".to_owned(),
        Kind::Unauthenticated => "invalid_api_key".to_owned(),
        Kind::QuotaSpent if is_quota_exhausted(error) => "insufficient_quota".to_owned(),
        Kind::QuotaSpent => "rate_limit_exceeded".to_owned(),
        kind => code_name(kind.code()).to_lowercase(),
    }
}

/// A path that exists, with a method that it does not allow.
pub fn method_not_allowed() -> Error {
    Error::new(Kind::Unsupported, "the method is not allowed for this path")
}

/// A body in an encoding that is not supported.
pub fn unsupported_encoding() -> Error {
    Error::invalid("content-encoding", "must be gzip, deflate or identity")
}

/// A request whose body ended before its time.
pub fn request_aborted() -> Error {
    Error::new(Kind::Cancelled, "the request was aborted")
}

/// The error of a layer around the routes, which responds in plain text.
pub fn from_middleware(response: &Response) -> Option<ApiError> {
    let status = response.status();
    let ours = response.extensions().get::<ApiError>().is_some()
        || response.headers().get(CONTENT_TYPE).is_some_and(|kind| {
            let kind = kind.as_bytes();
            kind.starts_with(b"application/")
        });
    if ours || !(status.is_client_error() || status.is_server_error()) {
        return None;
    }
    let error = match status {
        StatusCode::UNSUPPORTED_MEDIA_TYPE => unsupported_encoding(),
        status if status.is_client_error() => Error::new(Kind::Invalid, "the request is malformed"),
        _ => Error::new(Kind::Internal, "the request failed"),
    };
    Some(ApiError {
        error,
        status: Some(status),
    })
}

/// The error of a response that has one.
pub fn error_of(response: &Response) -> Option<&Error> {
    let error = response.extensions().get::<ApiError>();
    error.map(|error| &error.error)
}

/// Writes the body of an error; other responses stay as they are.
pub fn render(mut response: Response, format: ErrorFormat, id: &RequestId) -> Response {
    let Some(error) = response.extensions_mut().remove::<ApiError>() else {
        return response;
    };
    let status = error.status();
    let body = format.body(&error.error, status, id);
    let mut rendered = (status, Json(body)).into_response();
    let headers = rendered.headers_mut();
    if format == ErrorFormat::Problem {
        let kind = HeaderValue::from_static("application/problem+json");
        headers.insert(CONTENT_TYPE, kind);
    }
    add_advice(&error.error, headers);
    // What the layers around the error have added: a page may read an error too.
    let added = |name: &HeaderName| {
        *name == ALLOW || *name == VARY || name.as_str().starts_with("access-control-")
    };
    for (name, value) in response.headers() {
        if added(name) {
            headers.append(name, value.clone());
        }
    }
    rendered
}

/// The headers that tell a client when to retry and how to authenticate.
fn add_advice(error: &Error, headers: &mut HeaderMap) {
    if let Some(retry_after) = error.retry_after() {
        let ms = retry_after.as_millis();
        let seconds = u64::try_from(ms.div_ceil(1000)).unwrap_or(u64::MAX).max(1);
        headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
        let ms = u64::try_from(ms).unwrap_or(u64::MAX);
        headers.insert(RETRY_AFTER_MS, HeaderValue::from(ms));
    }
    if error.kind() == Kind::Unauthenticated {
        headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;

    async fn rendered(
        error: Error,
        format: ErrorFormat,
    ) -> (StatusCode, HeaderMap, serde_json::Value) {
        let id = RequestId(HeaderValue::from_static("request-1"));
        let response = render(ApiError::from(error).into_response(), format, &id);
        let (head, body) = response.into_parts();
        let bytes = body.collect().await.unwrap().to_bytes();
        (
            head.status,
            head.headers,
            serde_json::from_slice(&bytes).unwrap(),
        )
    }

    #[tokio::test]
    async fn a_field_is_named_in_both_formats() {
        let error = Error::invalid("inputs[0].shape", "is wrong");
        let (status, headers, body) = rendered(error.clone(), ErrorFormat::Problem).await;
        assert_eq!(status, 400);
        assert_eq!(headers["content-type"], "application/problem+json");
        assert_eq!(body["field"], "inputs[0].shape");
        assert_eq!(body["code"], "INVALID_ARGUMENT");
        assert_eq!(body["error"], "inputs[0].shape: is wrong");
        assert_eq!(body["request_id"], "request-1");
        let (_, _, body) = rendered(error, ErrorFormat::OpenAi).await;
        assert_eq!(body["error"]["param"], "inputs[0].shape");
        assert_eq!(body["error"]["type"], "invalid_request_error");
    }

    #[test]
    fn a_page_of_another_origin_may_read_an_error() {
        let mut response = ApiError::from(Error::new(Kind::NotFound, "gone")).into_response();
        let headers = response.headers_mut();
        headers.insert("access-control-allow-origin", HeaderValue::from_static("*"));
        headers.insert(VARY, HeaderValue::from_static("origin"));
        headers.insert(ALLOW, HeaderValue::from_static("GET"));
        headers.insert("content-length", HeaderValue::from_static("0"));
        let id = RequestId(HeaderValue::from_static("request-1"));
        let rendered = render(response, ErrorFormat::Problem, &id);
        let headers = rendered.headers();
        assert_eq!(headers["access-control-allow-origin"], "*");
        assert_eq!(
            (&headers["vary"], &headers["allow"]),
            (
                &HeaderValue::from_static("origin"),
                &HeaderValue::from_static("GET")
            )
        );
        assert_eq!(headers["content-type"], "application/problem+json");
        assert_ne!(
            headers.get("content-length"),
            Some(&HeaderValue::from_static("0"))
        );
    }

    #[tokio::test]
    async fn whole_seconds_are_rounded_up() {
        let error = Error::quota_spent("spent", Duration::from_millis(1100));
        let (status, headers, body) = rendered(error, ErrorFormat::OpenAi).await;
        assert_eq!(status, 429);
        assert_eq!(headers["retry-after"], "2");
        assert_eq!(headers["retry-after-ms"], "1100");
        assert_eq!(body["error"]["code"], "rate_limit_exceeded");
        let error = Error::quota_spent("spent", Duration::from_secs(40_000));
        let (_, _, body) = rendered(error, ErrorFormat::OpenAi).await;
        assert_eq!(body["error"]["type"], "insufficient_quota");
        let (status, headers, _) = rendered(
            Error::new(Kind::Unauthenticated, "no credential"),
            ErrorFormat::Problem,
        )
        .await;
        assert_eq!(status, 401);
        assert_eq!(headers["www-authenticate"], "Bearer");
    }

    #[tokio::test]
    async fn errors_of_other_layers_are_api_errors() {
        let plain = StatusCode::UNSUPPORTED_MEDIA_TYPE.into_response();
        let error = from_middleware(&plain).unwrap();
        assert_eq!(error.status(), 415);
        let gone = ApiError::from(Error::new(Kind::Cancelled, "gone"));
        assert_eq!(gone.status(), 499);
        assert!(from_middleware(&gone.into_response()).is_none());
        assert!(from_middleware(&StatusCode::OK.into_response()).is_none());
    }
}
