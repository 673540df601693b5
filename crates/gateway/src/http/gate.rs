//! The way of a request of the HTTP door to its handler, in the order of the
//! stack: rescue → shed → auth → limit. What it takes on the way is given back
//! when the response has been sent.

mod patience;

use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};

use axum::Router;
use axum::body::Body;
use axum::extract::{FromRequestParts, Request, State};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::MethodRouter;
use bytes::Bytes;
use http::request::Parts;
use http::{HeaderMap, HeaderName, HeaderValue};
use http_body::{Frame, SizeHint};
use platform::body::discard;
use platform::grpc::{BytesHeld, Message};
use platform::tls::Peer;
use protocol::{CACHE_KEY, DIGEST_KEY, Error, FALLBACK_KEY, Kind, Method, TOKENS_KEY};
use tokio::time::Instant;
use tracing::Instrument;

use super::problem::{Refused, Shape, refusal, written};
use crate::policy::Caller;
use crate::request::{ModelSelector, QuotaUnit, Request as ModelRequest, default_headers};
use crate::route::Plan;
use crate::stack::{Access, Entered, Entry, EntryKind, Stack, rescue};
use crate::upstream::Response as ModelResponse;
use patience::Patience;

/// The header that names a request: the caller's, or made here.
pub const REQUEST_ID: &str = "x-request-id";
/// What is passed on of an answer's metadata.
pub const ANSWERED: [&str; 5] = [REQUEST_ID, CACHE_KEY, FALLBACK_KEY, DIGEST_KEY, TOKENS_KEY];
/// A caller's id that is longer is replaced.
const REQUEST_ID_BYTES_MAX: usize = 128;

/// What a request is called in its answer and in the trace.
#[derive(Debug, Clone)]
pub struct RequestId(pub HeaderValue);

impl RequestId {
    /// The caller's if it is fit to be written anywhere, else a new one.
    pub fn of(headers: &HeaderMap) -> Self {
        let given = headers.get(REQUEST_ID).filter(|id| {
            let bytes = id.as_bytes();
            !bytes.is_empty()
                && bytes.len() <= REQUEST_ID_BYTES_MAX
                && bytes.iter().all(u8::is_ascii_graphic)
        });
        let made = || {
            let text = format!("{:032x}", rand::random::<u128>());
            HeaderValue::try_from(text).unwrap_or(HeaderValue::from_static("none"))
        };
        Self(given.cloned().unwrap_or_else(made))
    }

    /// The id.
    pub fn as_str(&self) -> &str {
        self.0.to_str().unwrap_or_default()
    }
}

/// What stands before one route.
#[derive(Debug, Clone)]
struct Gate {
    stack: Stack,
    /// The route's name in metrics and traces.
    name: &'static str,
    access: Access,
    shape: Shape,
}

/// Routes that each stand behind a gate.
#[derive(Debug)]
pub struct Routes {
    stack: Stack,
    shape: Shape,
    router: Router<Stack>,
}

impl Routes {
    /// None yet; what is refused has this form.
    pub fn new(stack: &Stack, shape: Shape) -> Self {
        Self {
            stack: stack.clone(),
            shape,
            router: Router::new(),
        }
    }

    /// For everybody, under overload too: for probes and descriptions.
    pub fn open(self, path: &'static str, methods: MethodRouter<Stack>) -> Self {
        self.add(path, Access::Open, methods)
    }

    /// For callers who say who they are.
    pub fn callers(self, path: &'static str, methods: MethodRouter<Stack>) -> Self {
        self.add(path, Access::Caller, methods)
    }

    /// For administrators.
    pub fn administrators(self, path: &'static str, methods: MethodRouter<Stack>) -> Self {
        self.add(path, Access::Administrator, methods)
    }

    fn add(self, path: &'static str, access: Access, methods: MethodRouter<Stack>) -> Self {
        let gate = Gate {
            stack: self.stack.clone(),
            name: path,
            access,
            shape: self.shape,
        };
        let methods = methods.route_layer(from_fn_with_state(gate, pass));
        Self {
            router: self.router.route(path, methods),
            ..self
        }
    }

    /// The routes.
    pub fn into_router(self) -> Router<Stack> {
        self.router
    }
}

/// Lets a request through to its handler, and its response back.
async fn pass(State(gate): State<Gate>, request: Request, next: Next) -> Response {
    let layers = &gate.stack.0;
    let arrived = Instant::now();
    let id = request
        .extensions()
        .get::<RequestId>()
        .cloned()
        .unwrap_or_else(|| RequestId::of(request.headers()));
    let telemetry = &layers.telemetry;
    let span = telemetry.http_span(gate.name, id.as_str(), request.headers());
    let mut record = layers.metrics.begin(gate.name, arrived);
    let model = Arc::new(OnceLock::new());
    let way = Way {
        gate: &gate,
        arrived,
        id: id.clone(),
        model: model.clone(),
    };
    let response = way
        .rescue(request, next)
        .instrument(span)
        .await
        .unwrap_or_else(Refused::into_response);
    if let Some(name) = model.get() {
        name.clone_into(&mut record.model);
    }
    let refused = refusal(&response);
    record.end(refused.map_or("OK", |error| error.kind().name()));
    written(response, gate.shape, &id)
}

/// A request on its way.
struct Way<'g> {
    gate: &'g Gate,
    arrived: Instant,
    id: RequestId,
    model: Arc<OnceLock<String>>,
}

impl Way<'_> {
    /// rescue: a deadline that passes becomes an answer.
    async fn rescue(self, request: Request, next: Next) -> Result<Response, Refused> {
        let patience_max = self.gate.stack.0.deadline_max;
        let patience = match Patience::of(request.headers(), self.gate.shape, patience_max) {
            Ok(patience) => patience,
            Err(error) => return Err(refuse(request.into_body(), error).await),
        };
        let deadline = self.arrived + patience.until_begun;
        rescue(deadline, self.answer(request, next, patience)).await
    }

    async fn answer(
        self,
        request: Request,
        next: Next,
        patience: Patience,
    ) -> Result<Response, Refused> {
        let (mut head, body) = request.into_parts();
        let peer = head.extensions.get::<Arc<Peer>>().cloned();
        let entry = Entry {
            kind: if self.gate.access == Access::Open {
                EntryKind::Probe
            } else {
                EntryKind::Call
            },
            access: self.gate.access,
            headers: &head.headers,
            peer: &peer.unwrap_or_default(),
        };
        let Entered { caller, guard } = match self.gate.stack.enter(entry).await {
            Ok(entered) => entered,
            Err(error) => return Err(refuse(body, error).await),
        };
        let visit = Visit {
            stack: self.gate.stack.clone(),
            caller,
            deadline: self.arrived + patience.until_begun,
            ends: self.arrived + patience.until_ended,
            id: self.id,
            headers: forwarded(&head.headers),
            model: self.model,
            called: Arc::default(),
        };
        head.extensions.insert(visit);
        let request = Request::from_parts(head, body);
        Ok(guarded(next.run(request).await, guard))
    }
}

/// Refuses a request whose body has not been read: a caller that is still
/// sending it would not see the answer.
async fn refuse(body: Body, error: Error) -> Refused {
    discard(body).await;
    error.into()
}

/// The metadata of a forwarded call: the trace, what the caller says about
/// cached answers, and the request's id.
fn forwarded(headers: &HeaderMap) -> HeaderMap {
    let mut kept = default_headers();
    if let Some(value) = headers.get(http::header::CACHE_CONTROL) {
        kept.insert(http::header::CACHE_CONTROL, value.clone());
    }
    platform::telemetry::forward_trace(&tracing::Span::current(), headers, &mut kept);
    kept
}

/// What a handler knows of its request besides its body.
#[derive(Debug, Clone)]
pub struct Visit {
    /// Answers it.
    pub stack: Stack,
    /// Who asks.
    pub caller: Caller,
    /// When the caller stops waiting for the answer, or for the first of its
    /// parts.
    pub deadline: Instant,
    /// When the caller stops waiting for the rest of them.
    pub ends: Instant,
    /// What the request is called.
    pub id: RequestId,
    /// The metadata of calls that are made for it.
    pub headers: HeaderMap,
    model: Arc<OnceLock<String>>,
    /// Whether a call has been made for it.
    called: Arc<AtomicBool>,
}

/// The decoded answer of a worker or a provider.
#[derive(Debug)]
pub struct Answered<A> {
    /// The message.
    pub message: A,
    /// What is passed on of its metadata.
    pub headers: HeaderMap,
    /// Its bytes count as in flight until this is dropped.
    pub held: Vec<BytesHeld>,
}

impl Visit {
    /// Which model answered, for the metrics, where it is not known from
    /// [`Self::forward`].
    pub fn answered_by(&self, model: &str) {
        // A request that asks several models counts for the first.
        let _ = self.model.set(model.to_owned());
    }

    /// Several calls for one request count as one.
    fn unit(&self) -> QuotaUnit {
        match self.called.swap(true, Ordering::Relaxed) {
            false => QuotaUnit::Request,
            true => QuotaUnit::Part,
        }
    }

    /// Decides which model responds: once for a request.
    pub fn route(&self, selector: &ModelSelector) -> Result<Plan, Error> {
        let plan = self.stack.route(selector, &self.caller)?;
        self.answered_by(plan.name());
        Ok(plan)
    }

    /// Sends a message to the model of a plan.
    pub async fn forward(
        &self,
        method: Method,
        message: Message,
        plan: &Plan,
    ) -> Result<ModelResponse, Error> {
        let request = ModelRequest {
            method,
            headers: self.headers.clone(),
            message,
            deadline: self.deadline,
            caller: self.caller.clone(),
            unit: self.unit(),
        };
        let response = self.stack.run(plan, &request).await;
        response.map_err(|status| Error::from_status(&status))
    }

    /// The same, with the response decoded.
    pub async fn ask<A: prost::Message + Default>(
        &self,
        method: Method,
        message: Message,
        plan: &Plan,
    ) -> Result<Answered<A>, Error> {
        let mut answer = self.forward(method, message, plan).await?;
        let mut headers = HeaderMap::new();
        for name in ANSWERED {
            if let Some(value) = answer.metadata().get(name) {
                headers.insert(HeaderName::from_static(name), value.clone());
            }
        }
        let held = answer.take_held();
        let bytes = answer.into_message();
        let bytes = bytes.map_err(|status| Error::from_status(&status))?;
        let message = A::decode(bytes).map_err(|_| {
            Error::new(
                Kind::Internal,
                "a worker answered with a message that cannot be read",
            )
        })?;
        Ok(Answered {
            message,
            headers,
            held,
        })
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Visit {
    type Rejection = Refused;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Refused> {
        let visit = parts.extensions.get::<Self>().cloned();
        visit.ok_or_else(|| Error::new(Kind::Internal, "the route has no gate").into())
    }
}

/// Keeps something alive until the response has been sent or given up.
pub fn guarded(response: Response, guard: impl Send + Sync + 'static) -> Response {
    response.map(|body| {
        Body::new(Guarded {
            body,
            _guard: Box::new(guard),
        })
    })
}

struct Guarded {
    body: Body,
    _guard: Box<dyn Send + Sync>,
}

impl http_body::Body for Guarded {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn with(name: &'static str, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(
            HeaderName::from_static(name),
            HeaderValue::from_bytes(value.as_bytes()).unwrap(),
        )])
    }

    #[test]
    fn an_id_is_taken_over_if_it_is_sane() {
        let taken = RequestId::of(&with(REQUEST_ID, "abc-1"));
        assert_eq!(taken.as_str(), "abc-1");
        for wrong in ["", "a b", "ä", &"x".repeat(129)] {
            let made = RequestId::of(&with(REQUEST_ID, wrong));
            assert_eq!(made.as_str().len(), 32, "{wrong}");
        }
    }
}
