//! Charges for calls of outside services whose callers do not wait for the end.

use std::sync::Arc;

use providers::{CallContext, Provider, ProviderUsage, UsageMeter};
use tokio::time::Instant;

use crate::limit::Limit;
use crate::policy::Caller;
use crate::request::Usage;

/// The charge of one call that has no response yet. Dropped before it is
/// settled, it charges the tenant for what the service has taken, with an
/// estimate of what is not known: a caller who leaves pays.
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

    /// What the provider's calls are bound by.
    pub(super) fn context(&self, deadline: Instant) -> CallContext<'_> {
        let usage = &self.usage;
        CallContext { deadline, usage }
    }

    /// Ends the pending charge: the response is charged.
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
