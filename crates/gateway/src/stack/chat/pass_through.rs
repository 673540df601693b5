//! Requests that a provider gets as they came, with its own name for the model.

use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt;
use protocol::{Error, Kind};
use providers::{PassThrough, PassThroughApi, PassedStream, Provider};
use tokio::time::Instant;
use tonic::Status;

use super::super::{Attempt, Exchange, PendingCharge, Reservations, Stack};
use super::{Generated, Meter};
use crate::limit::Reservation;
use crate::policy::Caller;
use crate::request::QuotaUnit;
use crate::route::Route;

/// A request that is passed through.
#[derive(Debug, Clone, Copy)]
pub struct PassingThrough<'a> {
    /// The caller.
    pub caller: &'a Caller,
    /// The request.
    pub request: &'a PassThrough,
    /// When the caller stops waiting; of a stream, for its last event.
    pub deadline: Instant,
}

/// A response as it came.
pub enum Passed {
    /// In one piece.
    Whole(Bytes),
    /// The bytes of a stream of events.
    Events(PassedStream),
}

/// The provider of a model, if it has one.
fn provider(route: &Route, api: PassThroughApi) -> Result<Arc<Provider>, Error> {
    route.provider().cloned().ok_or_else(|| {
        let (name, task, path) = (route.name(), route.task(), api.path());
        let message = format!(
            "model '{name}' is served by workers, for the task '{task}', and /v1{path} is passed \
             through to providers of kind 'openai' alone: use a model of such a provider"
        );
        Error::new(Kind::Unsupported, message)
    })
}

impl Exchange for PassingThrough<'_> {
    type Output = Generated<Passed>;

    fn caller(&self) -> &Caller {
        self.caller
    }

    fn deadline(&self) -> Instant {
        self.deadline
    }

    fn rows(&self) -> u64 {
        1
    }

    fn unit(&self) -> QuotaUnit {
        QuotaUnit::Request
    }

    async fn attempt(&self, stack: &Stack, attempt: Attempt<'_>) -> Result<Self::Output, Status> {
        let request = self.request;
        let provider = provider(attempt.route, request.api)?;
        stack.0.limit.sent(self.caller);
        let pending = PendingCharge::new(&stack.0.limit, self.caller, &provider);
        let context = pending.context(attempt.deadline);
        let content = if request.stream {
            let events = provider.pass_through_stream(request, context, self.deadline);
            Passed::Events(events.await?)
        } else {
            Passed::Whole(provider.pass_through(request, context).await?)
        };
        let usage = pending.usage().clone();
        pending.settle();
        let mut generated = Generated::new(content, provider, attempt);
        generated.usage = usage;
        Ok(generated)
    }

    fn accept(&self, output: Self::Output, _: &Reservation) -> Result<Self::Output, Status> {
        Ok(output)
    }

    /// The meter charges when it is dropped: now, or with the stream.
    fn charge(&self, mut output: Self::Output, reservations: Reservations) -> Self::Output {
        let meter = Meter::new(reservations, &output, self.caller);
        output.content = match output.content {
            Passed::Whole(body) => {
                drop(meter);
                Passed::Whole(body)
            }
            Passed::Events(events) => {
                let metered = events.map(move |part| {
                    let _meter = &meter;
                    part
                });
                Passed::Events(metered.boxed())
            }
        };
        output
    }
}
