//! What stands before each handler, in the order of the stack: rescue → shed →
//! auth → limit. What a request takes there is given back when its response has
//! been sent.

use std::sync::{Arc, OnceLock};

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::MethodRouter;
use http::HeaderValue;
use http::header::CONTENT_TYPE;
use platform::body::discard;
use platform::grpc::code_name;
use platform::server::AnswerFor;
use platform::tls::Peer;
use protocol::Error;
use tokio::time::Instant;
use tracing::Instrument;

use super::context::{Counted, RequestContext, call_headers, hold_until_sent};
use super::error::{ApiError, ErrorFormat, error_of, render};
use super::request_id::RequestId;
use super::timeouts::Timeouts;
use gateway::stack::{Access, CallRecord, Entered, Entry, EntryKind, Stack, rescue};

/// The properties of every request of one path.
#[derive(Debug, Clone)]
struct Endpoint {
    stack: Stack,
    /// The path's template: its name in metrics and traces.
    name: &'static str,
    access: Access,
    format: ErrorFormat,
}

/// Routes whose requests pass the upper layers of the stack.
#[derive(Debug)]
pub struct Endpoints {
    stack: Stack,
    format: ErrorFormat,
    router: Router<Stack>,
}

impl Endpoints {
    /// No endpoint yet; their errors will have this format.
    pub fn new(stack: &Stack, format: ErrorFormat) -> Self {
        Self {
            stack: stack.clone(),
            format,
            router: Router::new(),
        }
    }

    /// Without authentication, under overload too: probes and descriptions.
    pub fn public(self, path: &'static str, methods: MethodRouter<Stack>) -> Self {
        self.add(path, Access::Open, methods)
    }

    /// For authenticated callers.
    pub fn authenticated(self, path: &'static str, methods: MethodRouter<Stack>) -> Self {
        self.add(path, Access::Caller, methods)
    }

    /// For administrators.
    pub fn admin(self, path: &'static str, methods: MethodRouter<Stack>) -> Self {
        self.add(path, Access::Administrator, methods)
    }

    fn add(self, path: &'static str, access: Access, methods: MethodRouter<Stack>) -> Self {
        let endpoint = Endpoint {
            stack: self.stack.clone(),
            name: path,
            access,
            format: self.format,
        };
        let methods = methods.route_layer(from_fn_with_state(endpoint, serve));
        Self {
            router: self.router.route(path, methods),
            ..self
        }
    }

    /// The endpoints as a router.
    pub fn into_router(self) -> Router<Stack> {
        self.router
    }
}

/// Takes a request to its handler, and counts its response.
async fn serve(State(endpoint): State<Endpoint>, request: Request, next: Next) -> Response {
    let arrived = Instant::now();
    let id = request
        .extensions()
        .get::<RequestId>()
        .cloned()
        .unwrap_or_else(|| RequestId::of(request.headers()));
    let telemetry = endpoint.stack.telemetry();
    let span = telemetry.http_span(endpoint.name, id.as_str(), request.headers());
    let model = Arc::new(OnceLock::new());
    let record = ModelRecord {
        record: Some(endpoint.stack.record(endpoint.name, arrived)),
        model: model.clone(),
    };
    let arrival = Arrival {
        endpoint: &endpoint,
        arrived,
        id: id.clone(),
        model: model.clone(),
    };
    let response = arrival
        .rescue(request, next)
        .instrument(span)
        .await
        .unwrap_or_else(ApiError::into_response);
    let error = error_of(&response);
    record.end(error.map_or("OK", |error| code_name(error.kind().code())));
    render(response, endpoint.format, &id)
}

/// The record of a request. It is counted for the model of the request, also
/// when the caller leaves.
struct ModelRecord {
    record: Option<CallRecord>,
    model: Arc<OnceLock<String>>,
}

impl ModelRecord {
    fn end(mut self, code: &'static str) {
        if let Some(record) = self.take() {
            record.end(code);
        }
    }

    fn take(&mut self) -> Option<CallRecord> {
        let mut record = self.record.take()?;
        if let Some(name) = self.model.get() {
            name.clone_into(&mut record.model);
        }
        Some(record)
    }
}

impl Drop for ModelRecord {
    fn drop(&mut self) {
        drop(self.take());
    }
}

/// A request that has not entered the stack yet.
struct Arrival<'e> {
    endpoint: &'e Endpoint,
    arrived: Instant,
    id: RequestId,
    model: Arc<OnceLock<String>>,
}

impl Arrival<'_> {
    /// rescue: a deadline that passes becomes an error response.
    async fn rescue(self, request: Request, next: Next) -> Result<Response, ApiError> {
        let deadline_max = self.endpoint.stack.deadline_max();
        let timeouts = Timeouts::of(request.headers(), self.endpoint.format, deadline_max);
        let timeouts = match timeouts {
            Ok(timeouts) => timeouts,
            Err(error) => return Err(refuse(request.into_body(), error).await),
        };
        let deadline = self.arrived + timeouts.response;
        rescue(deadline, self.enter(request, next, timeouts)).await
    }

    /// shed → auth → limit, then the handler.
    async fn enter(
        self,
        request: Request,
        next: Next,
        timeouts: Timeouts,
    ) -> Result<Response, ApiError> {
        let (mut head, body) = request.into_parts();
        let peer = head.extensions.get::<Arc<Peer>>().cloned();
        let entry = Entry {
            kind: if self.endpoint.access == Access::Open {
                EntryKind::Probe
            } else {
                EntryKind::Call
            },
            access: self.endpoint.access,
            headers: &head.headers,
            peer: &peer.unwrap_or_default(),
        };
        let Entered { caller, guard } = match self.endpoint.stack.enter(entry).await {
            Ok(entered) => entered,
            Err(error) => return Err(refuse(body, error).await),
        };
        let holder = caller.holder();
        let context = RequestContext {
            stack: self.endpoint.stack.clone(),
            limits: self.endpoint.stack.limits().held_by(holder.clone()),
            caller,
            deadline: self.arrived + timeouts.response,
            stream_deadline: self.arrived + timeouts.stream,
            id: self.id,
            headers: call_headers(&head.headers),
            model: self.model,
            called: Arc::default(),
        };
        head.extensions.insert(context);
        let request = Request::from_parts(head, body);
        let mut response = next.run(request).await;
        let streams = response.headers().get(CONTENT_TYPE).is_some_and(is_stream);
        let counted = response.extensions_mut().remove::<Counted>().is_some();
        response.extensions_mut().insert(AnswerFor {
            holder,
            deadline: if streams {
                self.arrived + timeouts.stream
            } else {
                self.arrived + timeouts.response
            },
            counted,
        });
        Ok(hold_until_sent(response, guard))
    }
}

fn is_stream(kind: &HeaderValue) -> bool {
    kind.as_bytes().starts_with(b"text/event-stream")
}

/// Refuses a request whose body has not been read: a caller that is still
/// sending it would not see the response.
async fn refuse(body: Body, error: Error) -> ApiError {
    discard(body).await;
    error.into()
}
