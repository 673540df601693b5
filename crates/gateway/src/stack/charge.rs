//! Pending charges: calls of outside services are charged even when their callers
//! do not wait for the response.

use std::sync::Arc;

use providers::{CallContext, Provider, ProviderUsage, UsageMeter};
use tokio::time::Instant;

use crate::limit::Limit;
use crate::policy::Caller;
use crate::request::Usage;

/// The charge of one call that has no response yet. Dropped before it is
/// settled, it charges the tenant for the usage that the service reported, with an
/// estimate of the rest: a caller who leaves is charged.
pub(super) struct PendingCharge<'a> {
    limit: &'a Limit,
    caller: &'a Caller,
    provider: Arc<Provider>,
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
        let usage = &self.usage;
        CallContext { deadline, usage }
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
