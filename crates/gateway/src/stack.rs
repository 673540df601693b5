//! The order of a call through the gateway, on one screen:
//! rescue → shed → auth → limit → route → limit → cache → balance → upstream.
//! Both doors, each message of a stream and each conversation take it.

mod charge;
mod chat;
mod fallback;
mod message;
mod metrics;

pub use chat::{Chat, ChatStreaming, Generated, Passed, PassingThrough};
pub use metrics::{CallMetrics, CallRecord};
pub use providers::{
    ChatChoice, ChatDelta, ChatMessage, ChatOption, ChatRequest, ChatResponse, ChatStream,
    FinishReason, PassThrough, PassThroughApi, PassedStream, Role, TokenUsage, Tool, ToolCall,
    ToolCallDelta,
};

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use http::HeaderMap;
use platform::drain::Drain;
use platform::grpc::MessageLimits;
use platform::health::Health;
use platform::streams::Streams;
use platform::telemetry::TelemetryControl;
use platform::tls::Peer;
use protocol::Error;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, timeout_at};
use tonic::Status;

use crate::auth::Auth;
use crate::balance::Balance;
use crate::cache::Cache;
use crate::limit::{Admission, Limit, QuotaRequest, Reservation, TurnRequest};
use crate::policy::Caller;
use crate::request::{ModelSelector, QuotaUnit, Request};
use crate::route::{Plan, Route, Routes, Table};
use crate::shed::{Shed, TenantPermit};
use crate::upstream::{Response, provider};
use charge::{PendingCharge, WorkerCharge};

/// The layers that a call passes. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Stack(pub(crate) Arc<Layers>);

/// The layers in the order of a call, and the state that they share.
#[derive(Debug)]
pub struct Layers {
    pub(crate) shed: Arc<Shed>,
    pub(crate) auth: Arc<Auth>,
    pub(crate) limit: Limit,
    pub(crate) routes: Arc<Routes>,
    pub(crate) cache: Cache,
    pub(crate) balance: Balance,
    pub(crate) limits: MessageLimits,
    pub(crate) metrics: CallMetrics,
    pub(crate) telemetry: TelemetryControl,
    pub(crate) streams: Streams,
    pub(crate) drain: Drain,
    pub(crate) health: Health,
    /// The longest deadline of a request at the HTTP door.
    pub(crate) deadline_max: Duration,
}

/// The callers that may make a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// All callers, without authentication.
    Open,
    /// As `Open` if the policy opens reflection, else as `Caller`.
    Reflection,
    /// An authenticated caller.
    Caller,
    /// An administrator.
    Administrator,
}

/// How a call enters the stack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryKind {
    /// A probe: never shed or limited, or a busy gateway would seem dead.
    Probe,
    /// A call.
    Call,
    /// A stream, whose messages enter on their own.
    Stream,
    /// A message of a stream that has entered: its caller is authenticated
    /// again, since a credential may have ended, and it counts as a call.
    StreamMessage,
}

/// The credentials and the kind of a call that enters.
#[derive(Debug, Clone, Copy)]
pub struct Entry<'a> {
    /// How it enters.
    pub kind: EntryKind,
    /// The callers that may make it.
    pub access: Access,
    /// The metadata, with the credential.
    pub headers: &'a HeaderMap,
    /// The other end of the connection.
    pub peer: &'a Peer,
}

/// A call that has entered.
#[derive(Debug)]
pub struct Entered {
    /// The authenticated caller.
    pub caller: Caller,
    /// To be held until the response has been sent.
    pub guard: EntryGuard,
}

/// The permits that a call holds while it is in flight.
#[derive(Debug)]
#[allow(dead_code, reason = "its fields are released when dropped")]
pub struct EntryGuard {
    permit: Option<OwnedSemaphorePermit>,
    tenant_permit: Option<TenantPermit>,
    admission: Option<Admission>,
}

/// One exchange with a model, for which a caller waits.
pub trait Exchange: Sync {
    /// The output of a model.
    type Output: Send;

    /// The caller.
    fn caller(&self) -> &Caller;

    /// When the caller stops waiting for the output to begin.
    fn deadline(&self) -> Instant;

    /// Rows that the tenant's quotas count.
    fn rows(&self) -> u64;

    /// Whether the tenant's quotas count it as a request.
    fn unit(&self) -> QuotaUnit;

    /// Asks one model.
    fn attempt(
        &self,
        stack: &Stack,
        attempt: Attempt<'_>,
    ) -> impl Future<Output = Result<Self::Output, Status>> + Send;

    /// The output, unless it is an error that another model may not have. The
    /// reservation is charged for a failed attempt.
    fn accept(
        &self,
        output: Self::Output,
        reservation: &Reservation,
    ) -> Result<Self::Output, Status>;

    /// Charges the reservations, now or when the output has ended.
    fn charge(&self, output: Self::Output, reservations: Reservations) -> Self::Output;
}

/// One attempt of an exchange at one model.
#[derive(Debug, Clone, Copy)]
pub struct Attempt<'a> {
    /// The model.
    pub route: &'a Route,
    /// When it must have responded.
    pub deadline: Instant,
    /// The attempts of the fallback chain, for a model of one.
    pub fallback: Option<&'a fallback::Attempts<'a>>,
}

/// The reservation of the model or chain that was named, and that of the model
/// of the chain which responded.
pub type Reservations = [Option<Reservation>; 2];

impl Stack {
    /// shed → auth → limit: authenticates a call and takes the permits that it holds.
    pub async fn enter(&self, entry: Entry<'_>) -> Result<Entered, Error> {
        let layers = &self.0;
        let admitted = matches!(entry.kind, EntryKind::Call | EntryKind::Stream);
        // shed: more calls than the gateway may have in flight are refused.
        let permit = admitted.then(|| layers.shed.admit()).transpose()?;
        // auth: the caller, and whether it may make the call.
        let mut caller = self.authenticate(entry).await?;
        // shed: one tenant does not hold every permit.
        let several_tenants = || layers.auth.policy().load().tenants.len() > 1;
        let tenant_permit = (admitted && several_tenants())
            .then(|| layers.shed.admit_tenant(&caller.tenant))
            .transpose()?;
        // limit: the tenant's rate and calls in flight.
        let admission = match entry.kind {
            EntryKind::Probe | EntryKind::Stream => None,
            EntryKind::Call | EntryKind::StreamMessage => {
                Some(layers.limit.enter(&mut caller).await?)
            }
        };
        let guard = EntryGuard {
            permit,
            tenant_permit,
            admission,
        };
        Ok(Entered { caller, guard })
    }

    async fn authenticate(&self, entry: Entry<'_>) -> Result<Caller, Error> {
        let auth = &self.0.auth;
        let open = match entry.access {
            Access::Open => true,
            Access::Reflection => auth.reflection_is_open(),
            Access::Caller | Access::Administrator => false,
        };
        if open {
            return Ok(auth.anyone(entry.peer));
        }
        let caller = auth.caller(entry.headers, entry.peer).await?;
        if auth.is_required() && entry.kind != EntryKind::StreamMessage {
            let span = tracing::Span::current();
            span.record("andon.tenant", caller.tenant.name.as_str());
            span.record("andon.credential", &*caller.credential);
            self.0.limit.metrics().called(&caller.tenant.name);
        }
        if entry.access == Access::Administrator {
            caller.must_administrate()?;
        }
        Ok(caller)
    }

    /// Begins the record of a call, by the name of its method or path in metrics.
    pub fn record(&self, method: &'static str, arrived: Instant) -> CallRecord {
        self.0.metrics.begin(method, arrived)
    }

    /// Makes the spans of calls.
    pub fn telemetry(&self) -> &TelemetryControl {
        &self.0.telemetry
    }

    /// The limits of messages, in bytes, and of all bytes in flight.
    pub fn limits(&self) -> &MessageLimits {
        &self.0.limits
    }

    /// The longest deadline of a request at the HTTP door.
    pub fn deadline_max(&self) -> Duration {
        self.0.deadline_max
    }

    /// The current routing table: another one after each change.
    pub fn routing_table(&self) -> Arc<Table> {
        self.0.routes.table()
    }

    /// route: the model version that responds, decided once for a request. The
    /// record counts for that model.
    pub fn route(&self, selector: &ModelSelector, caller: &Caller) -> Result<Plan, Error> {
        self.0.routes.choose(selector, caller)
    }

    /// The model that a call counts for in metrics when it has no route: the one
    /// that it names, if there is such a model, or was one until lately.
    pub fn label<'s>(&self, selector: &'s ModelSelector) -> Option<&'s str> {
        match selector {
            ModelSelector::Named { name, .. } if self.0.routes.is_known(name) => Some(name),
            _ => None,
        }
    }

    /// limit → cache → balance → upstream: runs an exchange with the model of a
    /// plan, or with the models of its fallback chain in turn.
    pub async fn run<E: Exchange>(&self, plan: &Plan, exchange: &E) -> Result<E::Output, Status> {
        // limit: the quotas of the model, now that it is known, and rows.
        let request = QuotaRequest {
            model: plan.name(),
            chain: None,
            rows: exchange.rows(),
            unit: exchange.unit(),
        };
        let reservation = self.0.limit.reserve(exchange.caller(), request).await?;
        let (output, member) = match plan {
            Plan::One(route) => {
                let attempt = Attempt {
                    route,
                    deadline: exchange.deadline(),
                    fallback: None,
                };
                (exchange.attempt(self, attempt).await?, None)
            }
            Plan::Chain(chain) => {
                let (output, member) = self.fall_back(chain, exchange).await?;
                (output, Some(member))
            }
        };
        Ok(exchange.charge(output, [Some(reservation), member]))
    }

    /// balance → upstream: the layers below the cache.
    async fn send(&self, route: &Route, request: &Request) -> Result<Response, Status> {
        let (limit, caller) = (&self.0.limit, &request.caller);
        if let Some(provider) = route.provider() {
            limit.sent(caller);
            let pending = PendingCharge::new(&self.0.limit, &request.caller, provider);
            let response = provider::respond(provider, request, pending.usage()).await?;
            pending.settle();
            return Ok(response);
        }
        // limit: the tenant's turn, under overload.
        let turn = TurnRequest {
            model: route.name(),
            workers: route.upstreams().len(),
            items: request.rows(),
            deadline: request.deadline,
        };
        let _turn = limit.turn(caller, turn).await?;
        limit.sent(caller);
        // balance → upstream: a worker, and the next when it fails.
        let pending = WorkerCharge::new(limit, route, request);
        let response = self.0.balance.send(route, request, pending.worker()).await;
        pending.settle(&response);
        Ok(response?)
    }
}

/// rescue: a deadline that passes becomes an error.
pub async fn rescue<T, E: From<Error>>(
    deadline: Instant,
    run: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    match timeout_at(deadline, run).await {
        Ok(result) => result,
        Err(_) => Err(Error::deadline_passed().into()),
    }
}
