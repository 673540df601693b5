//! Pending charges: calls of outside services are charged even when their callers
//! do not wait for the response.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use platform::pot::Holder;
use protocol::Error;
use providers::{CallContext, Provider, ProviderUsage, UsageMeter};
use tokio::time::Instant;
use tonic::Code;

use crate::limit::Limit;
use crate::policy::Caller;
use crate::request::{Request, Usage};
use crate::route::Route;
use crate::upstream::Response;

/// The charge of one call of workers that has no response yet. Dropped while a
/// worker has the call, it charges the tenant for the tokens that the message
/// probably has: who leaves, or whose deadline passes, is charged.
pub(super) struct WorkerCharge<'a> {
    limit: &'a Limit,
    route: &'a Route,
    request: &'a Request,
    /// Whether a worker has the call now.
    at_worker: AtomicBool,
}

impl<'a> WorkerCharge<'a> {
    /// A charge of a call that has not been sent yet.
    pub(super) fn new(limit: &'a Limit, route: &'a Route, request: &'a Request) -> Self {
        Self {
            limit,
            route,
            request,
            at_worker: AtomicBool::new(false),
        }
    }

    /// True while a worker has the call.
    pub(super) fn worker(&self) -> &AtomicBool {
        &self.at_worker
    }

    /// The call has ended: its response is charged instead, unless it says that
    /// the deadline passed at the worker.
    pub(super) fn settle(self, response: &Result<Response, Error>) {
        let bytes = self.request.bytes().len();
        match response {
            Ok(response) if response.code() == Code::Ok => {
                self.limit.learn(self.route.name(), bytes, response.usage());
            }
            Ok(response)
                if response.code() == Code::DeadlineExceeded
                    && Instant::now() >= self.request.deadline =>
            {
                return self.at_worker.store(true, Ordering::Relaxed);
            }
            _ => {}
        }
        self.at_worker.store(false, Ordering::Relaxed);
    }
}

impl Drop for WorkerCharge<'_> {
    fn drop(&mut self) {
        // A method without rows computes nothing.
        if !self.at_worker.load(Ordering::Relaxed) || self.request.rows() == 0 {
            return;
        }
        let (name, request) = (self.route.name(), self.request);
        let usage = Usage {
            tokens: self.limit.estimate(name, request.bytes().len()),
            cost: 0.0,
        };
        self.limit.charge(&request.caller, name, usage);
    }
}

/// The charge of one call that has no response yet. Dropped before it is
/// settled, it charges the tenant for the usage that the service reported, with an
/// estimate of the rest: a caller who leaves is charged.
pub(super) struct PendingCharge<'a> {
    limit: &'a Limit,
    caller: &'a Caller,
    provider: Arc<Provider>,
    holder: Holder,
    usage: UsageMeter,
    settled: bool,
}

impl<'a> PendingCharge<'a> {
    /// A charge of nothing yet.
    pub(super) fn new(limit: &'a Limit, caller: &'a Caller, provider: &Arc<Provider>) -> Self {
        Self {
            limit,
            caller,
            provider: provider.clone(),
            holder: caller.holder(),
            usage: UsageMeter::default(),
            settled: false,
        }
    }

    /// Where the provider records the usage of the call.
    pub(super) fn usage(&self) -> &UsageMeter {
        &self.usage
    }

    /// The deadline and the meter of the provider's calls.
    pub(super) fn context(&self, deadline: Instant) -> CallContext<'_> {
        CallContext {
            deadline,
            usage: &self.usage,
            holder: &self.holder,
            has_others: self.caller.tenant.has_others,
        }
    }

    /// Drops the charge: the response is charged instead.
    pub(super) fn settle(mut self) {
        self.settled = true;
    }
}

impl Drop for PendingCharge<'_> {
    fn drop(&mut self) {
        let consumed = self.usage.total();
        if self.settled || consumed == ProviderUsage::default() {
            return;
        }
        let usage = Usage {
            tokens: consumed.tokens(),
            cost: self.provider.charge(&self.caller.tenant.name, consumed),
        };
        self.limit.charge(self.caller, &self.provider.name, usage);
    }
}
