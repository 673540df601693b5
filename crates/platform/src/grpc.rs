//! gRPC on the wire: calls, their messages and replies. Roles answer encoded
//! messages here, so that tensor bytes can pass without being decoded.

mod body;
mod call;
mod message;

pub use body::Body;
pub use call::{Call, grpc_timeout};
pub use message::{ByteBudget, Message, MessageLimits, Messages, frame, frame_bytes};

use std::future::Future;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use http::{HeaderMap, HeaderValue};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

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
    Q::decode(message).map_err(|error| {
        let description = format!("not a message of this call: {error}");
        let mut details = ErrorDetails::new();
        details.add_bad_request_violation("message", &description);
        Status::with_error_details(
            Code::InvalidArgument,
            format!("message: {description}"),
            details,
        )
    })
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
    let request = decode(message.bytes.clone())?;
    let answered = answer(request).await?;
    Ok(reply(frame(&answered), Metadata::new()))
}

/// Answers each message of a stream with one message, in order, with at most
/// `concurrency` of them under way. An error ends the stream with its status.
/// Nothing runs once the caller is gone: the reply's body drives it all.
pub fn each<F>(
    messages: Messages,
    concurrency: usize,
    answer: impl Fn(Message) -> F + Send + 'static,
) -> Reply
where
    F: Future<Output = Result<Bytes, Status>> + Send + 'static,
{
    let requests = stream::unfold(messages, |mut messages| async {
        let next = messages.next().await.transpose()?;
        Some((next, messages))
    });
    let answers: BoxStream<'static, Result<Bytes, Status>> = requests
        .map(move |message| {
            let answered = message.map(&answer);
            async move {
                match answered {
                    Ok(future) => future.await,
                    Err(status) => Err(status),
                }
            }
        })
        .buffered(concurrency)
        .boxed();
    respond(Body::stream(answers), Metadata::new())
}

/// A reply of a stream of framed messages.
pub fn stream(messages: BoxStream<'static, Result<Bytes, Status>>) -> Reply {
    respond(Body::stream(messages), Metadata::new())
}
