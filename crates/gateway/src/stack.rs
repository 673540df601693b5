//! The order of a call through the gateway, on one screen:
//! rescue → shed → auth → limit → service → route → cache → balance → upstream.

mod chain;
mod chat;
mod owed;

pub(crate) use chat::Conversation;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use http::HeaderMap;
use platform::CommonServices;
use platform::drain::Drain;
use platform::grpc::{Call, MessageLimits, Reply, code_name, head_code, reject};
use platform::server::Handler;
use platform::telemetry::TelemetryControl;
use platform::tls::Peer;
use protocol::Error;
use tokio::time::{Instant, timeout_at};
use tonic::Status;
use tracing::Instrument;

use crate::auth::{Auth, Caller};
use crate::balance::Balance;
use crate::cache::Cache;
use crate::limit::{Limit, Wanted};
use crate::metrics::GatewayMetrics;
use crate::route::{Plan, Route, Routes};
use crate::service::{self, Method, Request};
use crate::shed::{Share, Shed};
use crate::upstream::Answer;
use owed::Owed;

/// Everything a call passes. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Stack(pub(crate) Arc<Layers>);

/// The layers in the order that a call meets them, and what they share.
#[derive(Debug)]
pub struct Layers {
    pub(crate) shed: Arc<Shed>,
    pub(crate) auth: Arc<Auth>,
    pub(crate) limit: Limit,
    pub(crate) limits: MessageLimits,
    pub(crate) routes: Arc<Routes>,
    pub(crate) cache: Cache,
    pub(crate) balance: Balance,
    pub(crate) common: CommonServices,
    pub(crate) metrics: GatewayMetrics,
    pub(crate) telemetry: TelemetryControl,
    pub(crate) drain: Drain,
    /// The longest deadline of a request of the HTTP door.
    pub(crate) deadline_max: Duration,
}

/// Whose a call is to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Everybody's, under overload too.
    Open,
    /// Everybody's if the policy says so, else like `Caller`.
    Reflection,
    /// Anybody's who says who they are.
    Caller,
    /// An administrator's.
    Administrator,
}

impl Handler for Stack {
    async fn handle(&self, call: Call) -> Reply {
        let layers = &self.0;
        let span = layers.telemetry.request_span(call.path(), call.metadata());
        let (name, method) = service::method(call.path());
        let mut record = layers.metrics.begin(name, call.arrived);
        let reply = rescue(call.deadline, async {
            // shed: more calls than the gateway may hold are refused at once.
            let place = match method.is_probe() {
                true => None,
                false => Some(layers.shed.admit()?),
            };
            // auth: who calls, and whether it is theirs to call.
            // shed: one tenant does not take every place.
            // limit: the tenant's rate, and its calls under way. Each message of
            // a stream counts as a call of its own.
            let caller = self
                .admit(method.access(), call.metadata(), &call.peer)
                .await?;
            let share = match method.is_probe() {
                true => None,
                false => self.share(&caller)?,
            };
            let entered = match method.is_probe() || matches!(method, Method::Stream(_)) {
                true => None,
                false => Some(layers.limit.enter(&caller).await?),
            };
            let reply = match method {
                Method::Forward(door) => {
                    // service: read and checked once.
                    let request = service::read(call, door, &layers.limits, caller).await?;
                    self.forward(&request, &mut record.model)
                        .await?
                        .into_reply()
                }
                Method::Stream(door) => service::each_message(self.clone(), call, door, caller)?,
                Method::Gathered => service::rerank_stream(self, call, caller).await?,
                Method::Fleet(name) => service::fleet(self, name, call, &caller).await?,
                Method::Reflection | Method::Common => layers.common.answer(call).await,
            };
            Ok(reply.map(|body| body.guarded((place, share, entered))))
        })
        .instrument(span)
        .await;
        record.end(code_name(head_code(reply.headers())));
        reply
    }
}

impl Stack {
    /// Who calls; an error when the call is not theirs to make.
    pub(crate) async fn admit(
        &self,
        access: Access,
        headers: &HeaderMap,
        peer: &Peer,
    ) -> Result<Caller, Error> {
        let auth = &self.0.auth;
        let reflection = access == Access::Reflection && auth.reflection_is_open();
        if access == Access::Open || reflection {
            return Ok(auth.anyone());
        }
        let caller = auth.caller(headers, peer).await?;
        if auth.asks() {
            let span = tracing::Span::current();
            span.record("andon.tenant", caller.tenant.name.as_str());
            span.record("andon.credential", &*caller.credential);
            self.0.metrics.limit.called(&caller.tenant.name);
        }
        if access == Access::Administrator {
            caller.must_administrate()?;
        }
        Ok(caller)
    }

    /// A tenant's place among its own, where there are several tenants.
    pub(crate) fn share(&self, caller: &Caller) -> Result<Option<Share>, Error> {
        let auth = &self.0.auth;
        match auth.asks() && auth.policy().tenants.len() > 1 {
            true => self.0.shed.share(&caller.tenant).map(Some),
            false => Ok(None),
        }
    }

    /// The part of the way that both doors share, and each message of a
    /// stream takes too.
    pub(crate) async fn forward(
        &self,
        request: &Request,
        model: &mut String,
    ) -> Result<Answer, Status> {
        // route: which model version, and who can answer.
        let plan = self.0.routes.choose(&request.wanted, &request.caller)?;
        plan.name().clone_into(model);
        // limit, once the model is known: its own quotas, and rows.
        let limit = &self.0.limit;
        let ticket = limit
            .take(
                &request.caller,
                plan.name(),
                request.items(),
                request.counted,
            )
            .await?;
        let answer = match &plan {
            Plan::One(route) => self.0.cache.answer(self, route, request).await?,
            Plan::Chain(chain) => self.fall_back(chain, request).await?,
        };
        ticket.charge(answer.usage());
        Ok(answer)
    }

    /// Sends a request to who can answer it: the way below the cache.
    pub(crate) async fn send(&self, route: &Route, request: &Request) -> Result<Answer, Status> {
        if let Some(provider) = route.provider() {
            let owed = Owed::new(&self.0.limit, &request.caller, provider);
            let answer = provider.answer(request, owed.tab()).await?;
            owed.settle();
            return Ok(answer);
        }
        // limit, under overload: the tenant's turn.
        let wanted = Wanted {
            model: route.name(),
            workers: route.upstreams().len(),
            items: request.items(),
            deadline: request.deadline,
        };
        let _turn = self.0.limit.turn(&request.caller, wanted).await?;
        // balance → upstream: which worker, and which next when it fails.
        Ok(self.0.balance.send(route, request).await?)
    }
}

/// rescue: every error becomes a status, and so does a deadline that passes.
async fn rescue(deadline: Instant, answer: impl Future<Output = Result<Reply, Status>>) -> Reply {
    match timeout_at(deadline, answer).await {
        Ok(Ok(reply)) => reply,
        Ok(Err(status)) => reject(&status),
        Err(_) => reject(&Error::deadline_passed().to_status()),
    }
}
