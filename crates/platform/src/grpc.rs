//! gRPC on the wire: calls, their messages and replies. Messages stay encoded, so
//! that tensor bytes can be forwarded without being decoded.

mod body;
mod call;
mod message;
mod status;

pub use crate::limits::{ByteBudget, BytesHeld, MessageLimits};
pub use body::Body;
pub(crate) use call::is_grpc;
pub use call::{Call, grpc_timeout};
pub use message::{Message, Messages, frame, frame_bytes};

use std::future::Future;
use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use http::{HeaderMap, HeaderValue};
use tokio::time::Instant;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::drain::{Drain, Phase};
use crate::streams::OpenStream;
use crate::tasks::spawn_owned;

/// The HTTP response to a call.
pub type Reply = http::Response<Body>;

/// The metadata of a response.
pub type Metadata = HeaderMap;

/// A reply of one framed message.
pub fn reply(framed: Bytes, metadata: Metadata) -> Reply {
    respond(Body::unary(framed), metadata)
}

/// A reply without a message, only with a status.
pub fn reject(status: &Status) -> Reply {
    let mut response = respond(Body::empty(), Metadata::new());
    let status = status::bounded(status);
    if status.add_header(response.headers_mut()).is_err() {
        // Details that do not fit into a header must not hide the code.
        let code = HeaderValue::from(status.code() as i32);
        response.headers_mut().insert("grpc-status", code);
    }
    response
}

/// The answer to a request that is no call: nobody who sends one reads the status
/// of gRPC.
pub(crate) fn not_grpc() -> Reply {
    let text = "this is a gRPC port: use POST with content-type application/grpc\n";
    let mut response = http::Response::new(Body::whole(Some(text.into()), Vec::new(), None));
    *response.status_mut() = http::StatusCode::UNSUPPORTED_MEDIA_TYPE;
    response.headers_mut().insert(
        http::header::CONTENT_TYPE,
        HeaderValue::from_static("text/plain; charset=utf-8"),
    );
    response
}

fn respond(body: Body, mut headers: Metadata) -> Reply {
    headers.insert(
        http::header::CONTENT_TYPE,
        HeaderValue::from_static("application/grpc"),
    );
    let mut response = http::Response::new(body);
    *response.headers_mut() = headers;
    response
}

/// The status in the head of a reply without messages.
pub fn head_status(headers: &HeaderMap) -> Option<Status> {
    Status::from_header_map(headers)
}

/// The code that a reply's head carries; OK when messages follow.
pub fn head_code(headers: &HeaderMap) -> Code {
    headers
        .get("grpc-status")
        .map_or(Code::Ok, |code| Code::from_bytes(code.as_bytes()))
}

/// Decodes the only message of a call; bytes that cannot be decoded are the
/// caller's fault.
pub fn decode<Q: prost::Message + Default>(message: Bytes) -> Result<Q, Status> {
    Q::decode(message).map_err(|error| {
        invalid(
            "message",
            &format!("cannot be decoded as a request of this method: {error}"),
        )
    })
}

/// INVALID_ARGUMENT, with the field in its details.
fn invalid(field: &str, description: &str) -> Status {
    let mut details = ErrorDetails::new();
    details.add_bad_request_violation(field, description);
    let message = format!("{field}: {description}");
    Status::with_error_details(Code::InvalidArgument, message, details)
}

/// Serves a unary call: one message in, one message out.
pub async fn unary<Q, A, F>(
    call: Call,
    limits: &MessageLimits,
    respond: impl FnOnce(Q) -> F,
) -> Result<Reply, Status>
where
    Q: prost::Message + Default,
    A: prost::Message,
    F: Future<Output = Result<A, Status>>,
{
    let message = call.into_messages(limits).only().await?;
    let request = decode(message.bytes())?;
    let response = respond(request).await?;
    Ok(reply(frame(&response), Metadata::new()))
}

/// The limits of a bidirectional stream.
#[derive(Debug)]
pub struct StreamSettings {
    /// Messages in flight at once.
    pub concurrency: usize,
    /// The deadline of the whole stream, if the caller set one.
    pub deadline: Option<Instant>,
    /// Ends the stream when the server closes.
    pub drain: Drain,
    /// The stream's place among those that wait.
    pub open: OpenStream,
}

/// The responses to one message of a stream, framed.
pub enum Responses {
    /// One message.
    One(Bytes),
    /// Messages as they are produced.
    Many(BoxStream<'static, Result<Bytes, Status>>),
}

impl std::fmt::Debug for Responses {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::One(_) => "One",
            Self::Many(_) => "Many",
        })
    }
}

impl From<Bytes> for Responses {
    fn from(framed: Bytes) -> Self {
        Self::One(framed)
    }
}

/// Serves a bidirectional stream: each message gets one response or several, in
/// order. An error ends the stream with its status. Nothing runs once the caller
/// has cancelled: the reply's body owns every task.
pub fn bidirectional<F, A>(
    messages: Messages,
    settings: StreamSettings,
    respond: impl Fn(Message) -> F + Send + 'static,
) -> Reply
where
    F: Future<Output = Result<A, Status>> + Send + 'static,
    A: Into<Responses> + Send + 'static,
{
    let StreamSettings {
        concurrency,
        deadline,
        drain,
        open,
    } = settings;
    let open = Arc::new(open);
    let evicted = open.clone();
    let requests = stream::unfold(Some((messages, drain)), move |state| {
        let open = evicted.clone();
        async move {
            let (mut messages, mut drain) = state?;
            tokio::select! {
                biased;
                () = drain.reached(Phase::Closing) => {
                    Some((Err(Status::unavailable("the server is shutting down: retry")), None))
                }
                next = messages.next() => {
                    next.transpose().map(|next| (next, Some((messages, drain))))
                }
                status = open.evicted() => Some((Err(status), None)),
            }
        }
    });
    let responses = requests
        .map(move |message| {
            // A task of its own: a caller who reads slowly must not hold up a
            // response on an upstream connection that other callers share.
            let busy = open.busy();
            let response = message.map(|message| spawn_owned(respond(message)));
            async move {
                let _busy = busy;
                let aborted = || Err(Status::internal("the response was aborted"));
                response?.await.unwrap_or_else(aborted)
            }
        })
        .buffered(concurrency)
        .map(|response| match response.map(A::into) {
            Ok(Responses::Many(several)) => several.left_stream(),
            Ok(Responses::One(framed)) => one(Ok(framed)).right_stream(),
            Err(status) => one(Err(status)).right_stream(),
        })
        .flatten()
        .boxed();
    stream(until(deadline, responses))
}

fn one<T>(item: T) -> stream::Once<std::future::Ready<T>> {
    stream::once(std::future::ready(item))
}

/// Ends a stream with DEADLINE_EXCEEDED when its deadline passes.
fn until(
    deadline: Option<Instant>,
    responses: BoxStream<'static, Result<Bytes, Status>>,
) -> BoxStream<'static, Result<Bytes, Status>> {
    let Some(deadline) = deadline else {
        return responses;
    };
    stream::unfold(Some(responses), move |responses| async move {
        let mut responses = responses?;
        match tokio::time::timeout_at(deadline, responses.next()).await {
            Ok(next) => next.map(|next| (next, Some(responses))),
            Err(_) => Some((Err(Status::deadline_exceeded("the deadline passed")), None)),
        }
    })
    .boxed()
}

/// A reply of a stream of framed messages.
pub fn stream(messages: BoxStream<'static, Result<Bytes, Status>>) -> Reply {
    respond(Body::stream(messages), Metadata::new())
}

/// The usual name of a code, as in metrics.
pub fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}
