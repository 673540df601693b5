//! Streams of messages. Each message is routed and sent as a call of its own, so
//! that a worker may come or go in the middle of a stream.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, stream};
use http::{HeaderMap, HeaderName};
use platform::grpc::{
    Call, Message, Reply, Responses, StreamSettings, bidirectional, decode, frame, frame_bytes,
};
use platform::tls::Peer;
use protocol::{Error, Method, RerankGathering, Task, peek, with_final_response_flag};
use providers::Provider;
use tokio::time::Instant;
use tonic::Status;

use crate::policy::Caller;
use crate::request::{CREDENTIALS, Request, SelectorSource, forwarded_headers};
use crate::route::Plan;
use crate::stack::{
    Access, CallRecord, Chat, ChatStreaming, Entered, Entry, EntryGuard, EntryKind, Stack, rescue,
};
use crate::upstream::Response;
use crate::upstream::provider::{conversation, last_part, part};

/// Messages of one stream in flight at once.
const CONCURRENCY: usize = 32;
/// Texts of a rerank stream: as many as a request of the HTTP door may have.
const TEXTS_MAX: usize = 2048;

/// State shared by the messages of one stream.
#[derive(Debug)]
struct MessageStream {
    stack: Stack,
    /// The unary method that each message is a request of.
    method: Method,
    source: SelectorSource,
    headers: HeaderMap,
    /// How long each message may take, where the stream has no deadline.
    timeout: Duration,
    deadline: Option<Instant>,
    /// The credential that opened the stream.
    credentials: HeaderMap,
    peer: Arc<Peer>,
}

/// Forwards each message of a stream, and sends the responses in order.
pub fn forward_each(
    stack: Stack,
    call: Call,
    caller: &Caller,
    method: Method,
    source: SelectorSource,
) -> Result<Reply, Status> {
    let holder = caller.holder();
    let settings = StreamSettings {
        concurrency: CONCURRENCY,
        deadline: call.stream_deadline,
        drain: stack.0.drain.clone(),
        open: stack.0.streams.open(&call.peer, &holder)?,
    };
    let limits = stack.0.limits.held_by(holder.clone());
    let (timeout, deadline) = (call.deadline - call.arrived, call.stream_deadline);
    let peer = call.peer.clone();
    let (head, messages) = call.into_parts(&limits);
    let shared = Arc::new(MessageStream {
        stack,
        method: method.unary().unwrap_or(method),
        source,
        credentials: credentials(&head.headers),
        peer,
        headers: forwarded_headers(head.headers),
        timeout,
        deadline,
    });
    let reply = bidirectional(messages, settings, move |message| {
        let shared = shared.clone();
        async move {
            match shared.source {
                SelectorSource::Message => Ok(shared.infer(message).await),
                SelectorSource::Metadata(_) => shared.forward(message).await.map(Responses::One),
            }
        }
    });
    Ok(reply.map(|body| body.held_for(holder)))
}

/// The headers with the caller's credential; they are never logged.
fn credentials(headers: &HeaderMap) -> HeaderMap {
    let mut credentials = HeaderMap::new();
    for name in CREDENTIALS.map(HeaderName::from_static) {
        for value in headers.get_all(&name) {
            let mut value = value.clone();
            value.set_sensitive(true);
            credentials.append(name.clone(), value);
        }
    }
    credentials
}

/// A message that has entered, and the plan for it.
struct Planned {
    request: Request,
    plan: Plan,
    guard: EntryGuard,
}

impl MessageStream {
    /// enter → route: whose message it is now, and which model responds.
    async fn plan(&self, message: Message) -> Result<Planned, Error> {
        let entry = Entry {
            kind: EntryKind::StreamMessage,
            access: Access::Caller,
            headers: &self.credentials,
            peer: &self.peer,
        };
        let Entered { caller, guard } = self.stack.enter(entry).await?;
        let deadline = self
            .deadline
            .unwrap_or_else(|| Instant::now() + self.timeout);
        let headers = self.headers.clone();
        let request = Request::new(self.method, headers, message, deadline, caller)?;
        let selector = request.selector(self.source)?;
        let plan = self.stack.route(&selector, &request.caller)?;
        Ok(Planned {
            request,
            plan,
            guard,
        })
    }

    async fn run(&self, planned: &Planned) -> Result<Response, Status> {
        let request = &planned.request;
        rescue(request.deadline, self.stack.run(&planned.plan, request)).await
    }

    async fn forward(&self, message: Message) -> Result<Bytes, Status> {
        let planned = self.plan(message).await?;
        self.run(&planned).await?.into_framed()
    }

    /// An error is a response too, and the stream stays open.
    async fn infer(&self, message: Message) -> Responses {
        let id = peek(&message.bytes()).map(|peeked| peeked.id.to_owned());
        let response = async {
            let planned = self.plan(message).await?;
            if let Some(provider) = self.stack.generator(&planned.plan) {
                return self.generate(&provider, planned).await;
            }
            let framed = self.run(&planned).await?.into_framed()?;
            let message = framed.get(5..).unwrap_or_default();
            let flagged = with_final_response_flag(message);
            Ok::<_, Status>(Responses::One(frame_bytes(&flagged)))
        };
        response.await.unwrap_or_else(|status| {
            let id = id.unwrap_or_default();
            Responses::One(error_response(id, status.message()))
        })
    }

    /// A text that comes in parts, each of which is a response.
    async fn generate(&self, provider: &Provider, planned: Planned) -> Result<Responses, Status> {
        let request = &planned.request;
        let (chat, id) = conversation(provider, request)?;
        let chat = ChatStreaming(Chat {
            caller: &request.caller,
            request: &chat,
            deadline: request.deadline,
        });
        let run = self.stack.run(&planned.plan, &chat);
        let generated = rescue(request.deadline, run).await?;
        let model = generated.model;
        let parts = generated.content.map(move |item| {
            Ok(match item {
                Ok(delta) => match delta.finish_reason.zip(delta.usage) {
                    Some((reason, usage)) => frame(&last_part(&model, &id, reason, usage)),
                    None => frame(&part(&model, &id, &delta.text)),
                },
                Err(error) => error_response(id.clone(), &error.to_string()),
            })
        });
        Ok(Responses::Many(guarded(parts.boxed(), planned.guard)))
    }
}

type Parts = stream::BoxStream<'static, Result<Bytes, Status>>;

/// The call counts as in flight until its last part.
fn guarded(parts: Parts, guard: EntryGuard) -> Parts {
    stream::unfold((parts, guard), |(mut parts, guard)| async move {
        parts.next().await.map(|part| (part, (parts, guard)))
    })
    .boxed()
}

fn error_response(id: String, message: &str) -> Bytes {
    frame(&protocol::stream_failure(id, message))
}

/// Gathers the texts of a rerank stream into one request and forwards that: it
/// can be retried when a worker fails.
pub async fn gather(
    stack: &Stack,
    call: Call,
    caller: Caller,
    record: &mut CallRecord,
) -> Result<Reply, Status> {
    let deadline = call.deadline;
    let limits = &stack.0.limits.held_by(caller.holder());
    let (head, mut messages) = call.into_parts(limits);
    let headers = forwarded_headers(head.headers);
    let mut gathering = RerankGathering::default();
    let mut held = Vec::new();
    while let Some(message) = messages.next().await? {
        gathering.reserve(message.framed().len(), limits.message_bytes_max)?;
        Method::RerankStream.outline(&message.bytes())?;
        gathering.push(decode(message.bytes())?, TEXTS_MAX)?;
        // Held until the response, so that its bytes count as in flight.
        held.push(message);
    }
    let message = Message::encode(&gathering.into_request());
    let request = Request::new(Method::Rerank, headers, message, deadline, caller)?;
    let selector = request.selector(SelectorSource::Metadata(&[Task::Rerank]))?;
    let plan = record.route(stack, &selector, &request.caller)?;
    Ok(stack.run(&plan, &request).await?.into_reply())
}
