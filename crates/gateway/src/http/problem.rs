//! What a caller of the HTTP door is told when a request is refused: the
//! status of [`Kind::http_status`], and a body in the form that the callers of
//! the path know.

use std::time::Duration;

use axum::Json;
use axum::response::{IntoResponse, Response};
use http::header::{CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use protocol::{Error, Kind};
use serde::Serialize;
use serde_json::json;
use tonic::Status;
use utoipa::ToSchema;

use super::gate::RequestId;

/// When to come back, in milliseconds: some clients read it first.
pub const RETRY_AFTER_MS: HeaderName = HeaderName::from_static("retry-after-ms");

/// A request that was refused. Its response gets its body from [`written`],
/// which knows the form and the request's id.
#[derive(Debug, Clone)]
pub struct Refused {
    /// Why.
    pub error: Error,
    /// The HTTP status, where it says more than the kind's own.
    pub status: Option<StatusCode>,
}

impl From<Error> for Refused {
    fn from(error: Error) -> Self {
        Self {
            error,
            status: None,
        }
    }
}

impl From<Status> for Refused {
    fn from(status: Status) -> Self {
        Error::from_status(&status).into()
    }
}

impl Refused {
    fn status(&self) -> StatusCode {
        let own = StatusCode::from_u16(self.error.kind().http_status());
        let own = own.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        self.status.unwrap_or(own)
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let mut response = self.status().into_response();
        response.extensions_mut().insert(self);
        response
    }
}

/// The form of the bodies of refused requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// RFC 9457, with the `error` that clients of REST v2 read.
    Problem,
    /// OpenAI's.
    OpenAi,
}

impl Shape {
    /// The form of a path that no route has.
    pub fn of_path(path: &str) -> Self {
        match path.starts_with("/v1/") || path == "/v1" {
            true => Self::OpenAi,
            false => Self::Problem,
        }
    }

    /// The body of a refusal, for a stream that has begun too.
    pub fn body(self, error: &Error, status: StatusCode, id: &RequestId) -> serde_json::Value {
        match self {
            Self::Problem => json!(Problem::new(error, status, id)),
            Self::OpenAi => json!(OpenAiError {
                error: OpenAiReason {
                    message: error.to_string(),
                    r#type: openai_type(error),
                    param: error.violation().map(|violation| violation.field.as_str()),
                    code: openai_code(error),
                },
            }),
        }
    }
}

/// Problem details (RFC 9457).
#[derive(Debug, Serialize, ToSchema)]
pub struct Problem<'e> {
    /// Always `about:blank`: the title says what the status says.
    #[schema(example = "about:blank")]
    r#type: &'static str,
    /// The status in words.
    #[schema(example = "Bad Request")]
    title: &'static str,
    /// The status.
    #[schema(minimum = 400, maximum = 599)]
    status: u16,
    /// What is wrong, or what to do.
    detail: String,
    /// The name of the gRPC status.
    #[schema(example = "INVALID_ARGUMENT")]
    code: &'static str,
    /// The field that is wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, example = "inputs[0].shape")]
    field: Option<&'e str>,
    /// What the request is called.
    request_id: &'e str,
    /// The same as `detail`, where clients of REST v2 read it.
    error: String,
}

/// Why a request failed, as OpenAI's clients read it.
#[derive(Debug, Serialize, ToSchema)]
pub struct OpenAiError<'e> {
    /// The error.
    error: OpenAiReason<'e>,
}

/// What went wrong.
#[derive(Debug, Serialize, ToSchema)]
pub struct OpenAiReason<'e> {
    /// What is wrong, or what to do.
    message: String,
    /// The kind of error.
    #[schema(example = "invalid_request_error")]
    r#type: &'static str,
    /// The field that is wrong.
    #[schema(example = "input[1]")]
    param: Option<&'e str>,
    /// What programs may go by.
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
            code: error.kind().name(),
            field: error.violation().map(|violation| violation.field.as_str()),
            request_id: id.as_str(),
            error: message,
        }
    }
}

/// A quota that is free again only after this long is spent, not hurried.
const RATE: Duration = Duration::from_secs(300);

fn is_spent(error: &Error) -> bool {
    error.kind() == Kind::QuotaSpent && error.retry_after().is_some_and(|after| after > RATE)
}

fn openai_type(error: &Error) -> &'static str {
    match error.kind() {
        Kind::Invalid | Kind::NotFound | Kind::TooLarge | Kind::Unsupported => {
            "invalid_request_error"
        }
        Kind::Unauthenticated => "authentication_error",
        Kind::Forbidden => "permission_error",
        Kind::QuotaSpent if is_spent(error) => "insufficient_quota",
        Kind::QuotaSpent => "rate_limit_error",
        _ => "server_error",
    }
}

fn openai_code(error: &Error) -> String {
    match error.kind() {
        Kind::NotFound if error.violation().is_some() => "model_not_found".to_owned(),
        Kind::Unauthenticated => "invalid_api_key".to_owned(),
        Kind::QuotaSpent if is_spent(error) => "insufficient_quota".to_owned(),
        Kind::QuotaSpent => "rate_limit_exceeded".to_owned(),
        kind => kind.name().to_lowercase(),
    }
}

/// A path that there is, asked in another way.
pub fn wrong_method() -> Error {
    Error::new(Kind::Unsupported, "the path takes other methods")
}

/// A body that nobody here can decompress.
pub fn unknown_encoding() -> Error {
    Error::invalid("content-encoding", "gzip, deflate and none are known")
}

/// A request whose end did not come.
pub fn broken_off() -> Error {
    Error::new(Kind::Cancelled, "the request broke off")
}

/// What the layers around the routes refused by themselves, in plain text.
pub fn foreign(response: &Response) -> Option<Refused> {
    let status = response.status();
    let ours = response.extensions().get::<Refused>().is_some()
        || response.headers().get(CONTENT_TYPE).is_some_and(|kind| {
            let kind = kind.as_bytes();
            kind.starts_with(b"application/")
        });
    if ours || !(status.is_client_error() || status.is_server_error()) {
        return None;
    }
    let error = match status {
        StatusCode::UNSUPPORTED_MEDIA_TYPE => unknown_encoding(),
        status if status.is_client_error() => Error::new(Kind::Invalid, "the request is malformed"),
        _ => Error::new(Kind::Internal, "the request could not be answered"),
    };
    Some(Refused {
        error,
        status: Some(status),
    })
}

/// The code of a response: what was refused has its kind's.
pub fn refusal(response: &Response) -> Option<&Error> {
    let refused = response.extensions().get::<Refused>();
    refused.map(|refused| &refused.error)
}

/// Writes the body of a refused request; other responses are as they were.
pub fn written(mut response: Response, shape: Shape, id: &RequestId) -> Response {
    let Some(refused) = response.extensions_mut().remove::<Refused>() else {
        return response;
    };
    let status = refused.status();
    let body = shape.body(&refused.error, status, id);
    let mut written = (status, Json(body)).into_response();
    if shape == Shape::Problem {
        let kind = HeaderValue::from_static("application/problem+json");
        written.headers_mut().insert(CONTENT_TYPE, kind);
    }
    advise(&refused.error, written.headers_mut());
    for (name, value) in response.headers() {
        if name == http::header::ALLOW {
            written.headers_mut().insert(name, value.clone());
        }
    }
    written
}

/// What a client does about it: when to come back, how to say who it is.
fn advise(error: &Error, headers: &mut HeaderMap) {
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

    async fn told(error: Error, shape: Shape) -> (StatusCode, HeaderMap, serde_json::Value) {
        let id = RequestId(HeaderValue::from_static("request-1"));
        let response = written(Refused::from(error).into_response(), shape, &id);
        let (head, body) = response.into_parts();
        let bytes = body.collect().await.unwrap().to_bytes();
        (
            head.status,
            head.headers,
            serde_json::from_slice(&bytes).unwrap(),
        )
    }

    #[tokio::test]
    async fn a_field_is_named_in_both_forms() {
        let error = Error::invalid("inputs[0].shape", "is wrong");
        let (status, headers, body) = told(error.clone(), Shape::Problem).await;
        assert_eq!(status, 400);
        assert_eq!(headers["content-type"], "application/problem+json");
        assert_eq!(body["field"], "inputs[0].shape");
        assert_eq!(body["code"], "INVALID_ARGUMENT");
        assert_eq!(body["error"], "inputs[0].shape: is wrong");
        assert_eq!(body["request_id"], "request-1");
        let (_, _, body) = told(error, Shape::OpenAi).await;
        assert_eq!(body["error"]["param"], "inputs[0].shape");
        assert_eq!(body["error"]["type"], "invalid_request_error");
    }

    #[tokio::test]
    async fn whole_seconds_are_rounded_up() {
        let error = Error::quota_spent("spent", Duration::from_millis(1100));
        let (status, headers, body) = told(error, Shape::OpenAi).await;
        assert_eq!(status, 429);
        assert_eq!(headers["retry-after"], "2");
        assert_eq!(headers["retry-after-ms"], "1100");
        assert_eq!(body["error"]["code"], "rate_limit_exceeded");
        let error = Error::quota_spent("spent", Duration::from_secs(40_000));
        let (_, _, body) = told(error, Shape::OpenAi).await;
        assert_eq!(body["error"]["type"], "insufficient_quota");
        let (status, headers, _) = told(
            Error::new(Kind::Unauthenticated, "who is it?"),
            Shape::Problem,
        )
        .await;
        assert_eq!(status, 401);
        assert_eq!(headers["www-authenticate"], "Bearer");
    }

    #[tokio::test]
    async fn what_layers_refuse_is_a_problem_too() {
        let plain = StatusCode::UNSUPPORTED_MEDIA_TYPE.into_response();
        let refused = foreign(&plain).unwrap();
        assert_eq!(refused.status(), 415);
        let gone = Refused::from(Error::new(Kind::Cancelled, "gone"));
        assert_eq!(gone.status(), 499);
        assert!(foreign(&gone.into_response()).is_none());
        assert!(foreign(&StatusCode::OK.into_response()).is_none());
    }
}
