//! gRPC on the wire: calls, their messages and replies. Roles answer encoded
//! messages here, so that tensor bytes can pass without being decoded.

mod body;
mod call;
mod message;

pub use body::Body;
pub use call::{Call, grpc_timeout};
pub use message::{ByteBudget, BytesHeld, Message, MessageLimits, Messages, frame, frame_bytes};

use std::future::Future;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use http::{HeaderMap, HeaderValue};
use tokio::time::Instant;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::drain::{Drain, Phase};
use crate::tasks::awaited;

/// The HTTP response that answers a call.
pub type Reply = http::Response<Body>;

/// Metadata that answers carry besides their message.
pub type Metadata = HeaderMap;

/// A reply of one framed message.
pub fn reply(framed: Bytes, metadata: Metadata) -> Reply {
    respond(Body::unary(framed), metadata)
}

/// A reply that only says why there is none.
pub fn reject(status: &Status) -> Reply {
    let mut response = respond(Body::empty(), Metadata::new());
    if status.add_header(response.headers_mut()).is_err() {
        // Metadata that cannot be written must not hide the code.
        let code = HeaderValue::from(status.code() as i32);
        response.headers_mut().insert("grpc-status", code);
    }
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

/// The status that a reply's head carries: set when there is no message.
pub fn head_status(headers: &HeaderMap) -> Option<Status> {
    Status::from_header_map(headers)
}

/// The code that a reply's head carries; OK when messages follow.
pub fn head_code(headers: &HeaderMap) -> Code {
    headers
        .get("grpc-status")
        .map_or(Code::Ok, |code| Code::from_bytes(code.as_bytes()))
}

/// Decodes the only message of a call; bytes that are no such message are the
/// caller's fault.
pub fn decode<Q: prost::Message + Default>(message: Bytes) -> Result<Q, Status> {
    Q::decode(message)
        .map_err(|error| invalid("message", &format!("not a message of this call: {error}")))
}

/// A field of the call is wrong.
fn invalid(field: &str, description: &str) -> Status {
    let mut details = ErrorDetails::new();
    details.add_bad_request_violation(field, description);
    let message = format!("{field}: {description}");
    Status::with_error_details(Code::InvalidArgument, message, details)
}

/// Answers a call of one message with one message.
pub async fn unary<Q, A, F>(
    call: Call,
    limits: &MessageLimits,
    answer: impl FnOnce(Q) -> F,
) -> Result<Reply, Status>
where
    Q: prost::Message + Default,
    A: prost::Message,
    F: Future<Output = Result<A, Status>>,
{
    let message = call.into_messages(limits).only().await?;
    let request = decode(message.bytes())?;
    let answered = answer(request).await?;
    Ok(reply(frame(&answered), Metadata::new()))
}

/// How a stream of messages is answered.
#[derive(Debug)]
pub struct EachSettings {
    /// Messages that may be under way at once.
    pub concurrency: usize,
    /// When the whole stream ends, if the caller said so.
    pub deadline: Option<Instant>,
    /// No further message is read when the server closes.
    pub drain: Drain,
}

/// What answers one message of a stream, framed.
pub enum Answers {
    /// One message.
    One(Bytes),
    /// Messages that come one by one.
    Many(BoxStream<'static, Result<Bytes, Status>>),
}

impl std::fmt::Debug for Answers {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::One(_) => "One",
            Self::Many(_) => "Many",
        })
    }
}

impl From<Bytes> for Answers {
    fn from(framed: Bytes) -> Self {
        Self::One(framed)
    }
}

/// Answers each message of a stream with one message or with several, in
/// order. An error ends the stream with its status. Nothing runs once the
/// caller is gone: the reply's body owns it all.
pub fn each<F, A>(
    messages: Messages,
    settings: EachSettings,
    answer: impl Fn(Message) -> F + Send + 'static,
) -> Reply
where
    F: Future<Output = Result<A, Status>> + Send + 'static,
    A: Into<Answers> + Send + 'static,
{
    let EachSettings {
        concurrency,
        deadline,
        drain,
    } = settings;
    let requests = stream::unfold(Some((messages, drain)), |state| async {
        let (mut messages, mut drain) = state?;
        tokio::select! {
            biased;
            () = drain.reached(Phase::Closing) => {
                Some((Err(Status::unavailable("the server is ending: call again")), None))
            }
            next = messages.next() => next.transpose().map(|next| (next, Some((messages, drain)))),
        }
    });
    let answers = requests
        .map(move |message| {
            // A task of its own: a caller who reads slowly must not keep an
            // answer in the connection that it shares with other callers.
            let answered = message.map(|message| awaited(answer(message)));
            async move {
                let ended = || Err(Status::internal("the answer was given up"));
                answered?.await.unwrap_or_else(ended)
            }
        })
        .buffered(concurrency)
        .map(|answered| match answered.map(A::into) {
            Ok(Answers::Many(several)) => several.left_stream(),
            Ok(Answers::One(framed)) => one(Ok(framed)).right_stream(),
            Err(status) => one(Err(status)).right_stream(),
        })
        .flatten()
        .boxed();
    stream(until(deadline, answers))
}

fn one<T>(item: T) -> stream::Once<std::future::Ready<T>> {
    stream::once(std::future::ready(item))
}

/// Ends a stream with DEADLINE_EXCEEDED when its deadline passes.
fn until(
    deadline: Option<Instant>,
    answers: BoxStream<'static, Result<Bytes, Status>>,
) -> BoxStream<'static, Result<Bytes, Status>> {
    let Some(deadline) = deadline else {
        return answers;
    };
    stream::unfold(Some(answers), move |answers| async move {
        let mut answers = answers?;
        match tokio::time::timeout_at(deadline, answers.next()).await {
            Ok(next) => next.map(|next| (next, Some(answers))),
            Err(_) => Some((Err(Status::deadline_exceeded("the deadline passed")), None)),
        }
    })
    .boxed()
}

/// A reply of a stream of framed messages.
pub fn stream(messages: BoxStream<'static, Result<Bytes, Status>>) -> Reply {
    respond(Body::stream(messages), Metadata::new())
}

/// The name of a code as metrics and people write it.
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
