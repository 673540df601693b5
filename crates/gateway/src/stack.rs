//! The order of a call through the gateway, on one screen:
//! rescue → shed → service → route → balance → upstream.

use std::future::Future;
use std::sync::Arc;

use platform::CommonServices;
use platform::drain::Drain;
use platform::grpc::{Call, MessageLimits, Reply, reject};
use platform::server::Handler;
use platform::telemetry::TelemetryControl;
use protocol::Error;
use tokio::time::{Instant, timeout_at};
use tonic::Status;
use tracing::Instrument;

use crate::balance::Balance;
use crate::metrics::GatewayMetrics;
use crate::route::Routes;
use crate::service::{self, Method, Request};
use crate::shed::Shed;
use crate::upstream::Answer;

/// Everything a call passes. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Stack(pub(crate) Arc<Layers>);

/// The layers in the order that a call meets them, and what they share.
#[derive(Debug)]
pub struct Layers {
    pub(crate) shed: Arc<Shed>,
    pub(crate) limits: MessageLimits,
    pub(crate) routes: Arc<Routes>,
    pub(crate) balance: Balance,
    pub(crate) common: CommonServices,
    pub(crate) metrics: GatewayMetrics,
    pub(crate) telemetry: TelemetryControl,
    pub(crate) drain: Drain,
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
            let reply = match method {
                Method::Forward(door) => {
                    // service: read and checked once.
                    let request = service::read(call, door, &layers.limits).await?;
                    self.forward(&request, &mut record.model)
                        .await?
                        .into_reply()
                }
                Method::Stream(door) => service::each_message(self.clone(), call, door)?,
                Method::Gathered => service::rerank_stream(self, call).await?,
                Method::Fleet(name) => service::fleet(self, name, call).await?,
                Method::Common => layers.common.answer(call).await,
            };
            Ok(reply.map(|body| body.guarded(place)))
        })
        .instrument(span)
        .await;
        record.end(&reply);
        reply
    }
}

impl Stack {
    /// The part of the way that each message of a stream takes too.
    pub(crate) async fn forward(
        &self,
        request: &Request,
        model: &mut String,
    ) -> Result<Answer, Status> {
        // route: which model version, and who can answer.
        let route = self.0.routes.choose(request)?;
        route.name().clone_into(model);
        // balance → upstream: which worker, and which next when it fails.
        Ok(self.0.balance.send(&route, request).await?)
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
