//! Unary calls over one channel: the tools and the benchmark share them.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, HeaderValue, Request, StatusCode, Uri, Version};
use http_body_util::BodyExt;
use platform::channel::{Channel, ChannelError};
use platform::grpc::{code_name, head_code, head_status};
use protocol::Method;
use tonic::{Code, Status};

/// The prefix of a message: a flag for compression and the length.
const PREFIX_BYTES: usize = 5;
/// The longest message: responses may be longer than requests, for example one
/// vector per token.
const MESSAGE_BYTES_MAX: usize = MESSAGE_MIB_MAX << 20;
const MESSAGE_MIB_MAX: usize = 1 << 10;

/// Why a call did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The server responded with an error.
    #[error("{}", .0.message())]
    Status(Status),
    /// The server has not processed the call: a retry is safe.
    #[error("{0}")]
    Unprocessed(ChannelError),
    /// The connection failed; the server may have processed the call.
    #[error("{0}")]
    Failed(ChannelError),
    /// There is no connection.
    #[error("cannot connect: {0}")]
    Unconnected(#[from] std::io::Error),
    /// The response is HTTP, but not gRPC.
    #[error("the server responded with HTTP status {0}")]
    Http(StatusCode),
    /// The response ended before its status.
    #[error("the response has no status")]
    NoStatus,
    /// The response is no message of the call.
    #[error("the response cannot be decoded: {0}")]
    Undecodable(String),
    /// A message is over the limit.
    #[error("the {0} is longer than {MESSAGE_MIB_MAX} MiB")]
    TooLong(&'static str),
    /// The timeout of the client passed.
    #[error("no response within {0:?}")]
    TimedOut(Duration),
}

impl CallError {
    /// The gRPC code that fits best, in the usual notation; `HTTP` where
    /// the server speaks another protocol.
    pub fn code(&self) -> &'static str {
        code_name(match self {
            Self::Status(status) => status.code(),
            Self::Unprocessed(_) | Self::Failed(_) | Self::Unconnected(_) => Code::Unavailable,
            Self::NoStatus | Self::Undecodable(_) => Code::Internal,
            Self::TooLong(_) => Code::OutOfRange,
            Self::TimedOut(_) => Code::DeadlineExceeded,
            Self::Http(_) => return "HTTP",
        })
    }
}

impl From<ChannelError> for CallError {
    fn from(error: ChannelError) -> Self {
        match error {
            ChannelError::Unprocessed(_) => Self::Unprocessed(error),
            ChannelError::Reset(_) | ChannelError::Failed(_) => Self::Failed(error),
        }
    }
}

/// The address and metadata of every request to one server.
#[derive(Debug, Clone)]
pub struct RequestTemplate {
    scheme: Scheme,
    authority: Authority,
    headers: HeaderMap,
}

impl RequestTemplate {
    /// A template for calls with this metadata, to which the headers of gRPC
    /// are added.
    pub fn new(
        scheme: Scheme,
        authority: Authority,
        mut headers: HeaderMap,
        timeout: Option<Duration>,
    ) -> Self {
        headers.insert("content-type", HeaderValue::from_static("application/grpc"));
        headers.insert("te", HeaderValue::from_static("trailers"));
        if let Some(value) = timeout.and_then(timeout_value) {
            headers.insert("grpc-timeout", value);
        }
        Self {
            scheme,
            authority,
            headers,
        }
    }

    /// The head of a request for a method.
    pub fn head(&self, method: Method) -> Request<()> {
        let mut parts = http::uri::Parts::default();
        parts.scheme = Some(self.scheme.clone());
        parts.authority = Some(self.authority.clone());
        parts.path_and_query = Some(PathAndQuery::from_static(method.path()));
        let mut request = Request::new(());
        *request.method_mut() = http::Method::POST;
        *request.version_mut() = Version::HTTP_2;
        // All three parts are there, so that they always make a URI.
        *request.uri_mut() = Uri::from_parts(parts).unwrap_or_default();
        *request.headers_mut() = self.headers.clone();
        request
    }
}

/// The protocol allows eight digits.
fn timeout_value(timeout: Duration) -> Option<HeaderValue> {
    let micros = timeout.as_micros();
    let text = if micros < 100_000_000 {
        format!("{micros}u")
    } else {
        format!("{}m", timeout.as_millis().min(99_999_999))
    };
    HeaderValue::try_from(text).ok()
}

/// Sends a request with its framed message, hands on the data of the response
/// as they arrive, and returns when the response's status is OK.
pub async fn exchange(
    channel: &Channel,
    head: Request<()>,
    framed: Bytes,
    mut data: impl FnMut(Bytes) -> Result<(), CallError>,
) -> Result<(), CallError> {
    let response = channel.send(head, framed).await?;
    if response.status() != StatusCode::OK {
        return Err(CallError::Http(response.status()));
    }
    if response.headers().contains_key("grpc-status") {
        return ok(response.headers());
    }
    let mut body = response.into_body();
    while let Some(frame) = body.frame().await {
        match frame?.into_data() {
            Ok(chunk) => data(chunk)?,
            Err(frame) => match frame.into_trailers() {
                Ok(trailers) if trailers.contains_key("grpc-status") => return ok(&trailers),
                _ => {}
            },
        }
    }
    Err(CallError::NoStatus)
}

fn ok(headers: &HeaderMap) -> Result<(), CallError> {
    match head_code(headers) {
        Code::Ok => Ok(()),
        code => {
            let status = head_status(headers).unwrap_or_else(|| Status::new(code, ""));
            Err(CallError::Status(status))
        }
    }
}

/// Sends one message and decodes the message of the response.
pub async fn unary<R: prost::Message + Default>(
    channel: &Channel,
    head: Request<()>,
    framed: Bytes,
) -> Result<R, CallError> {
    if framed.len() - PREFIX_BYTES > MESSAGE_BYTES_MAX {
        return Err(CallError::TooLong("request"));
    }
    let mut response = BytesMut::new();
    exchange(channel, head, framed, |chunk| {
        if response.len() + chunk.len() > PREFIX_BYTES + MESSAGE_BYTES_MAX {
            return Err(CallError::TooLong("response"));
        }
        response.extend_from_slice(&chunk);
        Ok(())
    })
    .await?;
    decode(response.freeze())
}

/// Decodes the only message of a response.
fn decode<R: prost::Message + Default>(mut framed: Bytes) -> Result<R, CallError> {
    let undecodable = |reason: &str| CallError::Undecodable(reason.to_owned());
    let Some(&[compressed, length @ ..]) = framed.first_chunk::<PREFIX_BYTES>() else {
        return Err(undecodable("it has no message"));
    };
    if compressed != 0 {
        return Err(undecodable("its message is compressed"));
    }
    let message = framed.split_off(PREFIX_BYTES);
    if message.len() != u32::from_be_bytes(length) as usize {
        return Err(undecodable("its length is not that of one message"));
    }
    R::decode(message).map_err(|error| undecodable(&error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use platform::grpc::frame;
    use protocol::inference::ServerLiveResponse;

    #[test]
    fn timeouts_have_at_most_eight_digits() {
        let of = |timeout| timeout_value(timeout).unwrap();
        assert_eq!(of(Duration::from_micros(500)), "500u");
        assert_eq!(of(Duration::from_secs(100)), "100000m");
        assert_eq!(of(Duration::from_secs(1 << 40)), "99999999m");
    }

    #[test]
    fn a_response_is_one_whole_message() {
        let framed = frame(&ServerLiveResponse { live: true });
        assert!(decode::<ServerLiveResponse>(framed.clone()).unwrap().live);
        let mut compressed = framed.to_vec();
        compressed[0] = 1;
        let mut lying = framed.to_vec();
        lying[4] = 200;
        let twice = [&framed[..], &framed[..]].concat();
        for wrong in [Vec::new(), compressed, lying, twice, framed[..6].to_vec()] {
            let error = decode::<ServerLiveResponse>(wrong.into()).unwrap_err();
            assert_eq!(error.code(), "INTERNAL");
        }
    }
}
