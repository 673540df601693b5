//! The response of a worker or provider, or why there is none.

use std::fmt;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, StatusCode};
use http_body_util::BodyExt;
use platform::channel::{ChannelError, Incoming};
use platform::grpc::{Body, BytesHeld, MessageLimits, Reply, frame, head_code, head_status};
use platform::pot::Holder;
use protocol::TOKENS_KEY;
use tonic::{Code, Status};

use crate::request::Usage;

/// A response with any status. Its message stays encoded.
#[derive(Debug)]
pub struct Response {
    headers: HeaderMap,
    first: Option<Bytes>,
    rest: Vec<Bytes>,
    trailers: Option<HeaderMap>,
    /// Its bytes count as in flight until they have been forwarded.
    held: Vec<BytesHeld>,
    /// The price of an outside provider, in the currency of the price table.
    cost: f64,
}

/// Why there is no response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SendError {
    /// The worker has not processed the call: a retry costs nothing.
    NotSent(String),
    /// The connection broke with the call in flight.
    Broken(String),
    /// The stream of this call alone was reset.
    Reset(String),
    /// Something before the worker's gRPC answered with a status of HTTP.
    Http(StatusCode),
    /// The response exceeds the limit of this many bytes read.
    TooLarge(usize),
    /// The memory for messages in flight is exhausted.
    NoRoom,
}

impl From<ChannelError> for SendError {
    fn from(error: ChannelError) -> Self {
        match error {
            ChannelError::Unprocessed(error) => Self::NotSent(error.to_string()),
            ChannelError::Reset(error) => Self::Reset(error.to_string()),
            ChannelError::Failed(error) => Self::Broken(error.to_string()),
        }
    }
}

/// Reads a response to its end; its bytes are held for the caller.
pub(super) async fn read(
    response: http::Response<Incoming>,
    limits: Option<&MessageLimits>,
    holder: &Holder,
) -> Result<Response, SendError> {
    let (head, mut body) = response.into_parts();
    if head.status != StatusCode::OK && !head.headers.contains_key("grpc-status") {
        return Err(SendError::Http(head.status));
    }
    let mut whole = Response {
        headers: head.headers,
        first: None,
        rest: Vec::new(),
        trailers: None,
        held: Vec::new(),
        cost: 0.0,
    };
    let mut bytes = 0;
    while let Some(frame) = body.frame().await {
        let frame = frame?;
        match frame.into_data() {
            Ok(data) => {
                bytes += data.len();
                if let Some(limits) = limits {
                    if bytes > limits.message_bytes_max {
                        return Err(SendError::TooLarge(bytes));
                    }
                    let held = limits.hold_for(holder, data.len());
                    whole.held.push(held.map_err(|_| SendError::NoRoom)?);
                }
                if whole.first.is_none() {
                    whole.first = Some(data);
                } else {
                    whole.rest.push(data);
                }
            }
            Err(frame) => whole.trailers = frame.into_trailers().ok(),
        }
    }
    if whole.trailers.is_none() && !whole.headers.contains_key("grpc-status") {
        // The stream was cut off; the connection did not fail.
        return Err(SendError::Reset("the response has no status".to_owned()));
    }
    Ok(whole)
}

impl Response {
    /// A successful response of the gateway itself.
    pub fn own(message: &impl prost::Message, metadata: HeaderMap) -> Self {
        Self::of_framed(frame(message), metadata)
    }

    /// A successful response with an encoded message and its prefix.
    pub fn of_framed(framed: Bytes, metadata: HeaderMap) -> Self {
        let mut headers = metadata;
        headers.insert(
            http::header::CONTENT_TYPE,
            HeaderValue::from_static("application/grpc"),
        );
        let mut trailers = HeaderMap::with_capacity(1);
        trailers.insert("grpc-status", HeaderValue::from_static("0"));
        Self {
            headers,
            first: Some(framed),
            rest: Vec::new(),
            trailers: Some(trailers),
            held: Vec::new(),
            cost: 0.0,
        }
    }

    /// The same response at a cost, in the currency of the price table.
    #[must_use]
    pub fn with_cost(mut self, cost: f64) -> Self {
        self.cost = cost;
        self
    }

    /// The same response with further usage, of earlier attempts.
    #[must_use]
    pub fn with_usage_of(mut self, earlier: Usage) -> Self {
        let own = self.usage();
        self.cost += earlier.cost;
        if earlier.tokens > 0 {
            let tokens = own.tokens.saturating_add(earlier.tokens);
            self.headers.insert(TOKENS_KEY, tokens.into());
        }
        self
    }

    /// The metadata that precedes the message.
    pub fn metadata(&self) -> &HeaderMap {
        &self.headers
    }

    /// The metadata that precedes the message, to add to it.
    pub fn metadata_mut(&mut self) -> &mut HeaderMap {
        &mut self.headers
    }

    /// Its usage.
    pub fn usage(&self) -> Usage {
        let tokens = self.headers.get(TOKENS_KEY);
        let tokens = tokens.and_then(|tokens| tokens.to_str().ok()?.parse().ok());
        Usage {
            tokens: tokens.unwrap_or_default(),
            cost: self.cost,
        }
    }

    /// The message without its prefix; None when the response has none. It is
    /// copied only when it came in several chunks.
    pub fn message(&self) -> Option<Bytes> {
        let first = self.first.clone()?;
        if self.code() != Code::Ok || first.first() != Some(&0) {
            return None;
        }
        let framed = match self.rest.as_slice() {
            [] => first,
            rest => [std::slice::from_ref(&first), rest]
                .concat()
                .concat()
                .into(),
        };
        (framed.len() >= 5).then(|| framed.slice(5..))
    }

    /// The status code.
    pub fn code(&self) -> Code {
        head_code(self.trailers.as_ref().unwrap_or(&self.headers))
    }

    /// The status; None when the response has none.
    pub fn status(&self) -> Option<Status> {
        head_status(self.trailers.as_ref().unwrap_or(&self.headers))
    }

    /// An entry of the metadata that came with the status.
    pub fn status_metadata(&self, name: &str) -> Option<&str> {
        let headers = self.trailers.as_ref().unwrap_or(&self.headers);
        headers.get(name)?.to_str().ok()
    }

    /// Takes the permits that count the bytes as in flight, to be held until the
    /// bytes have been sent in another form.
    pub fn take_held(&mut self) -> Vec<BytesHeld> {
        std::mem::take(&mut self.held)
    }

    /// The reply that forwards the response, unchanged.
    pub fn into_reply(self) -> Reply {
        let body = Body::whole(self.first, self.rest, self.trailers);
        let mut reply = Reply::new(body.counted(self.held));
        *reply.headers_mut() = self.headers;
        reply
    }

    /// The framed message; the error is a status other than OK.
    pub fn into_framed(self) -> Result<Bytes, Status> {
        let status = head_status(self.trailers.as_ref().unwrap_or(&self.headers));
        if let Some(status) = status
            && status.code() != Code::Ok
        {
            return Err(status);
        }
        let first = self.first.unwrap_or_default();
        if self.rest.is_empty() {
            return Ok(first);
        }
        let chunks = std::iter::once(first).chain(self.rest);
        Ok(chunks.collect::<Vec<_>>().concat().into())
    }

    /// The status of a response without a message.
    pub fn into_status(self) -> Status {
        match self.into_framed() {
            Ok(_) => Status::new(Code::Ok, ""),
            Err(status) => status,
        }
    }

    /// The message; the error is a status other than OK.
    pub fn into_message(self) -> Result<Bytes, Status> {
        let framed = self.into_framed()?;
        match framed.get(..5) {
            Some([0, ..]) => Ok(framed.slice(5..)),
            _ => Err(Status::internal(
                "the message of a worker's response is malformed",
            )),
        }
    }
}

impl fmt::Display for SendError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotSent(reason) => write!(formatter, "the call was not sent: {reason}"),
            Self::Broken(reason) => write!(formatter, "the connection broke: {reason}"),
            Self::Reset(reason) => write!(formatter, "the stream broke: {reason}"),
            Self::Http(status) => write!(formatter, "the answer is HTTP status {status}"),
            Self::TooLarge(bytes) => write!(formatter, "the response has over {bytes} bytes"),
            Self::NoRoom => formatter.write_str("there is no memory for the response"),
        }
    }
}
