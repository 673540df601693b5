//! Streams of messages. Each message takes the way of a call of its own, so
//! that a worker may come or go in the middle of a stream.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, stream};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName};
use platform::grpc::{
    Answers, Call, EachSettings, Message, Reply, decode, each, frame, frame_bytes,
};
use platform::tls::Peer;
use protocol::inference::{ModelInferResponse, ModelStreamInferResponse};
use protocol::tei::v1::{RerankRequest, RerankStreamRequest};
use protocol::{Error, peek, with_final_response_flag};
use tokio::time::{Instant, timeout_at};
use tonic::Status;

use super::{CREDENTIALS, Door, RERANK, Request, forwarded, wanted};
use crate::auth::Caller;
use crate::limit::Counted;
use crate::limit::Entered;
use crate::stack::{Conversation, Stack};
use crate::upstream::provider::{Provider, conversation, last_part, part};

/// Messages of one stream that may be under way at once.
const CONCURRENCY: usize = 32;
/// Texts of a rerank stream: as many as a request of the HTTP door may have.
const TEXTS_MAX: usize = 2048;

/// What the messages of one stream share.
#[derive(Debug)]
struct Shared {
    stack: Stack,
    door: Door,
    path: PathAndQuery,
    headers: HeaderMap,
    patience: Duration,
    ends: Option<Instant>,
    /// Who opened it.
    caller: Caller,
    /// How that was proved.
    credentials: HeaderMap,
    peer: Arc<Peer>,
}

/// Answers each message of a stream in order.
pub fn each_message(stack: Stack, call: Call, door: Door, caller: Caller) -> Result<Reply, Status> {
    let settings = EachSettings {
        concurrency: CONCURRENCY,
        deadline: call.stream_deadline,
        drain: stack.0.drain.clone(),
    };
    let path = one_message_path(call.path())?;
    let limits = stack.0.limits.clone();
    let (patience, ends) = (call.deadline - call.arrived, call.stream_deadline);
    let peer = call.peer.clone();
    let (head, messages) = call.into_parts(&limits);
    let shared = Arc::new(Shared {
        stack,
        door,
        path,
        credentials: credentials(&head.headers),
        peer,
        headers: forwarded(head.headers),
        patience,
        ends,
        caller,
    });
    Ok(each(messages, settings, move |message| {
        let shared = shared.clone();
        async move {
            match shared.door {
                Door::Message => Ok(shared.infer(message).await),
                Door::Metadata(_) => shared.answer(message).await.map(Answers::One),
            }
        }
    }))
}

/// What says who calls; never written anywhere.
fn credentials(headers: &HeaderMap) -> HeaderMap {
    let mut kept = HeaderMap::new();
    for name in CREDENTIALS.map(HeaderName::from_static) {
        for value in headers.get_all(&name) {
            let mut value = value.clone();
            value.set_sensitive(true);
            kept.append(name.clone(), value);
        }
    }
    kept
}

/// The path that answers one message of a stream.
fn one_message_path(path: &str) -> Result<PathAndQuery, Status> {
    let one = match path {
        "/inference.GRPCInferenceService/ModelStreamInfer" => {
            "/inference.GRPCInferenceService/ModelInfer"
        }
        path => path.strip_suffix("Stream").unwrap_or(path),
    };
    PathAndQuery::try_from(one).map_err(|error| Status::internal(error.to_string()))
}

impl Shared {
    /// Who sends a message: a credential may have ended since the stream began.
    async fn caller(&self) -> Result<Caller, Error> {
        let auth = &self.stack.0.auth;
        match auth.asks() {
            true => auth.caller(&self.credentials, &self.peer).await,
            false => Ok(self.caller.clone()),
        }
    }

    async fn request(&self, message: Message) -> Result<Request, Error> {
        let caller = self.caller().await?;
        Ok(Request {
            wanted: wanted(self.door, &message, &self.headers)?,
            path: self.path.clone(),
            headers: self.headers.clone(),
            message,
            deadline: self.ends.unwrap_or_else(|| Instant::now() + self.patience),
            caller,
            counted: Counted::Request,
        })
    }

    async fn answer(&self, message: Message) -> Result<Bytes, Status> {
        self.forward(&self.request(message).await?).await
    }

    async fn forward(&self, request: &Request) -> Result<Bytes, Status> {
        // Each message counts as a call of its own.
        let _entered = self.stack.0.limit.enter(&request.caller).await?;
        let mut model = String::new();
        let answered = self.stack.forward(request, &mut model);
        match timeout_at(request.deadline, answered).await {
            Ok(answer) => answer?.into_framed(),
            Err(_) => Err(Error::deadline_passed().to_status()),
        }
    }

    /// An error is an answer too, and the stream stays open.
    async fn infer(&self, message: Message) -> Answers {
        let id = peek(&message.bytes()).map(|peeked| peeked.id.to_owned());
        let answered = async {
            let request = self.request(message).await?;
            match self.stack.generates(&request.wanted, &request.caller) {
                Some(provider) => self.generate(&provider, &request).await,
                None => self.forward(&request).await.map(|framed| {
                    let message = framed.get(5..).unwrap_or_default();
                    Answers::One(frame_bytes(&with_final_response_flag(message)))
                }),
            }
        };
        let answered = answered.await;
        answered.unwrap_or_else(|status| {
            let id = id.unwrap_or_default();
            Answers::One(failed(id, status.message()))
        })
    }

    /// A text that comes in parts, each of which is an answer.
    async fn generate(&self, provider: &Provider, request: &Request) -> Result<Answers, Status> {
        let entered = self.stack.0.limit.enter(&request.caller).await?;
        let (chat, id) = conversation(provider, request)?;
        let asked = Conversation {
            wanted: &request.wanted,
            caller: &request.caller,
            chat: &chat,
            deadline: request.deadline,
        };
        let opened = timeout_at(request.deadline, self.stack.chat_stream(asked)).await;
        let said = opened.map_err(|_| Error::deadline_passed())??;
        let model = said.model;
        let parts = said.answer.map(move |item| {
            Ok(match item {
                Ok(delta) => match delta.end {
                    Some(end) => frame(&last_part(&model, &id, end)),
                    None => frame(&part(&model, &id, &delta.text)),
                },
                Err(error) => failed(id.clone(), &error.to_string()),
            })
        });
        Ok(Answers::Many(held(parts.boxed(), entered)))
    }
}

type Parts = stream::BoxStream<'static, Result<Bytes, Status>>;

/// The call counts as under way until its last part.
fn held(parts: Parts, entered: Entered) -> Parts {
    stream::unfold((parts, entered), |(mut parts, entered)| async move {
        parts.next().await.map(|part| (part, (parts, entered)))
    })
    .boxed()
}

fn failed(id: String, message: &str) -> Bytes {
    frame(&ModelStreamInferResponse {
        error_message: message.to_owned(),
        infer_response: Some(ModelInferResponse {
            id,
            ..Default::default()
        }),
    })
}

/// Gathers the texts of a rerank stream into one request and sends that: it can
/// be sent again when a worker fails.
pub async fn rerank_stream(stack: &Stack, call: Call, caller: Caller) -> Result<Reply, Status> {
    let deadline = call.deadline;
    let limits = &stack.0.limits;
    let (head, mut messages) = call.into_parts(limits);
    let headers = forwarded(head.headers);
    let mut gathered = RerankRequest::default();
    let mut held = Vec::new();
    let mut bytes = 0;
    while let Some(message) = messages.next().await? {
        bytes += message.framed().len();
        if bytes > limits.message_bytes_max {
            return Err(Error::too_large(bytes, limits.message_bytes_max).to_status());
        }
        if held.len() == TEXTS_MAX {
            let reason = format!("more than {TEXTS_MAX}: that is what a request may have");
            return Err(Error::invalid("texts", reason).to_status());
        }
        let next: RerankStreamRequest = decode(message.bytes())?;
        // Held until the answer, so that its bytes count as in flight.
        held.push(message);
        if gathered.texts.is_empty() {
            gathered.query = next.query;
            gathered.truncate = next.truncate;
            gathered.raw_scores = next.raw_scores;
            gathered.return_text = next.return_text;
            gathered.truncation_direction = next.truncation_direction;
        } else if next.query != gathered.query {
            let reason = "must be the same in every message of the stream";
            return Err(Error::invalid("query", reason).to_status());
        }
        gathered.texts.push(next.text);
    }
    let message = Message::own(&gathered);
    let wanted = wanted(Door::Metadata(RERANK), &message, &headers)?;
    let request = Request {
        path: PathAndQuery::from_static("/tei.v1.Rerank/Rerank"),
        headers,
        message,
        deadline,
        wanted,
        caller,
        counted: Counted::Request,
    };
    let mut model = String::new();
    Ok(stack.forward(&request, &mut model).await?.into_reply())
}
