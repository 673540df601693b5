//! The context of a request besides its body, and the calls that its handler
//! makes down the stack.

use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};

use axum::body::Body;
use axum::extract::FromRequestParts;
use axum::response::Response;
use bytes::Bytes;
use gateway::stack::{ChatRequest, ChatResponse, ChatStream};
use http::request::Parts;
use http::{HeaderMap, HeaderName, HeaderValue};
use http_body::{Frame, SizeHint};
use platform::grpc::{ByteBudget, BytesHeld, Message, MessageLimits};
use platform::pool::Cancelled;
use protocol::{CACHE_KEY, DIGEST_KEY, Error, FALLBACK_KEY, Kind, Method, TOKENS_KEY};
use tokio::time::Instant;

use super::error::ApiError;
use super::request_id::{REQUEST_ID, RequestId};
use gateway::Plan;
use gateway::policy::Caller;
use gateway::request::{ModelSelector, QuotaUnit, Request, default_headers};
use gateway::stack::{Chat, ChatStreaming, PassThrough, Passed, PassingThrough, Stack};

/// The metadata of a response that becomes headers of the HTTP response.
pub const RESPONSE_HEADERS: [&str; 5] =
    [REQUEST_ID, CACHE_KEY, FALLBACK_KEY, DIGEST_KEY, TOKENS_KEY];

/// The context of a request besides its body. An extractor.
#[derive(Debug, Clone)]
pub struct RequestContext {
    /// Takes the calls of this request.
    pub stack: Stack,
    /// The authenticated caller.
    pub caller: Caller,
    /// The limits of its messages, whose bytes are held for the caller.
    pub limits: MessageLimits,
    /// The deadline of the response, or of the first event of a stream.
    pub deadline: Instant,
    /// The deadline of the last event of a stream.
    pub stream_deadline: Instant,
    /// The request's id.
    pub id: RequestId,
    /// The metadata of calls that are made for this request.
    pub headers: HeaderMap,
    /// The label of the request in metrics, once the model is known to exist.
    pub(super) model: Arc<OnceLock<String>>,
    /// Whether a call has been made for this request.
    pub(super) called: Arc<AtomicBool>,
}

/// A decoded response of a worker or a provider.
#[derive(Debug)]
pub struct CallResponse<M> {
    /// The message.
    pub message: M,
    /// Those of [`RESPONSE_HEADERS`] that the response has.
    pub headers: HeaderMap,
    /// The bytes of the message count as in flight until this is dropped.
    pub held: Vec<BytesHeld>,
}

impl RequestContext {
    /// Runs work on so many bytes: here when they are few, else on a thread for
    /// work, where it may look at whether the caller still waits.
    pub async fn work<T: Send + 'static>(
        &self,
        bytes: usize,
        work: impl FnOnce(&Cancelled) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let done = self.limits.work(bytes, work).await;
        done.map_err(|status| Error::from_status(&status))?
    }

    /// Sets the label of the request in metrics.
    fn record_model(&self, model: &str) {
        // A request that calls several models counts for the first.
        let _ = self.model.set(model.to_owned());
    }

    /// Several calls for one request count as one request of a quota.
    fn unit(&self) -> QuotaUnit {
        if self.called.swap(true, Ordering::Relaxed) {
            QuotaUnit::Part
        } else {
            QuotaUnit::Request
        }
    }

    /// Decides which model responds: once for a request.
    pub fn route(&self, selector: &ModelSelector) -> Result<Plan, Error> {
        let plan = self.stack.route(selector, &self.caller);
        let name = match &plan {
            Ok(plan) => Some(plan.name()),
            // A model that cannot respond now counts for its own.
            Err(_) => self.stack.label(selector),
        };
        if let Some(name) = name {
            self.record_model(name);
        }
        plan
    }

    /// Sends a message to the model of a plan and decodes the response.
    pub async fn call<M: prost::Message + Default>(
        &self,
        method: Method,
        message: Message,
        plan: &Plan,
    ) -> Result<CallResponse<M>, Error> {
        let (headers, caller) = (self.headers.clone(), self.caller.clone());
        let mut request = Request::new(method, headers, message, self.deadline, caller)?;
        request.unit = self.unit();
        let response = self.stack.run(plan, &request).await;
        let mut response = response.map_err(|status| Error::from_status(&status))?;
        let mut headers = HeaderMap::new();
        for name in RESPONSE_HEADERS {
            if let Some(value) = response.metadata().get(name) {
                headers.insert(HeaderName::from_static(name), value.clone());
            }
        }
        let held = response.take_held();
        let bytes = response.into_message();
        let bytes = bytes.map_err(|status| Error::from_status(&status))?;
        let message = M::decode(bytes).map_err(|_| {
            Error::new(
                Kind::Internal,
                "the upstream's response message cannot be decoded",
            )
        })?;
        Ok(CallResponse {
            message,
            headers,
            held,
        })
    }

    /// Calls a model of generation; the response with its headers.
    pub async fn chat(
        &self,
        selector: &ModelSelector,
        request: &ChatRequest,
    ) -> Result<(HeaderMap, ChatResponse), Error> {
        let plan = self.stack.route(selector, &self.caller)?;
        let chat = Chat {
            caller: &self.caller,
            request,
            deadline: self.deadline,
        };
        let generated = self.stack.run(&plan, &chat).await;
        let generated = generated.map_err(|status| Error::from_status(&status))?;
        self.record_model(&generated.model);
        Ok((fallback_header(generated.fallback), generated.content))
    }

    /// Calls a model of generation; the parts of the response with its headers.
    pub async fn chat_stream(
        &self,
        selector: &ModelSelector,
        request: &ChatRequest,
    ) -> Result<(HeaderMap, ChatStream), Error> {
        let plan = self.stack.route(selector, &self.caller)?;
        let chat = ChatStreaming(Chat {
            caller: &self.caller,
            request,
            deadline: self.stream_deadline,
        });
        let generated = self.stack.run(&plan, &chat).await;
        let generated = generated.map_err(|status| Error::from_status(&status))?;
        self.record_model(&generated.model);
        Ok((fallback_header(generated.fallback), generated.content))
    }

    /// Passes a request through to a model of a provider; the response with its
    /// headers.
    pub async fn pass_through(
        &self,
        selector: &ModelSelector,
        request: &PassThrough,
    ) -> Result<(HeaderMap, Passed), Error> {
        let plan = self.stack.route(selector, &self.caller)?;
        let passing = PassingThrough {
            caller: &self.caller,
            request,
            deadline: if request.stream {
                self.stream_deadline
            } else {
                self.deadline
            },
        };
        let generated = self.stack.run(&plan, &passing).await;
        let generated = generated.map_err(|status| Error::from_status(&status))?;
        self.record_model(&generated.model);
        Ok((fallback_header(generated.fallback), generated.content))
    }
}

fn fallback_header(fallback: Option<HeaderValue>) -> HeaderMap {
    let header = fallback.map(|value| (HeaderName::from_static(FALLBACK_KEY), value));
    header.into_iter().collect()
}

impl<S: Send + Sync> FromRequestParts<S> for RequestContext {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let context = parts.extensions.get::<Self>().cloned();
        context.ok_or_else(|| Error::new(Kind::Internal, "the route is not an endpoint").into())
    }
}

/// The metadata of calls made for a request: the trace, and the caller's
/// `cache-control`.
pub fn call_headers(headers: &HeaderMap) -> HeaderMap {
    let mut forwarded = default_headers();
    if let Some(value) = headers.get(http::header::CACHE_CONTROL) {
        forwarded.insert(http::header::CACHE_CONTROL, value.clone());
    }
    platform::telemetry::forward_trace(&tracing::Span::current(), headers, &mut forwarded);
    forwarded
}

/// Counts bytes as in flight before they are made.
pub fn hold(budget: &ByteBudget, bytes: usize) -> Result<BytesHeld, Error> {
    let held = budget.hold(bytes);
    held.map_err(|status| Error::from_status(&status))
}

/// Marks a response whose bytes are counted as in flight by what it holds.
#[derive(Debug, Clone, Copy)]
pub struct Counted;

/// Keeps `guard` until the response has been sent, or its connection is gone.
pub fn hold_until_sent(response: Response, guard: impl Send + 'static) -> Response {
    response.map(|body| {
        Body::new(HoldingBody {
            body,
            _guard: Box::new(guard),
        })
    })
}

struct HoldingBody {
    body: Body,
    _guard: Box<dyn Send>,
}

impl http_body::Body for HoldingBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.get_mut().body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
