//! Charges for calls of outside services whose callers do not wait for the end.

use std::sync::Arc;

use tokio::time::Instant;

use crate::limit::Limit;
use crate::policy::Caller;
use crate::request::Usage;
use providers::{CallContext, Provider, ProviderUsage, UsageMeter};

/// The charge of one call that has no response yet. Dropped before it is
/// settled, it charges the tenant for what the service has taken, with an
/// estimate of what is not known: a caller who leaves pays.
pub(super) struct PendingCharge<'a> {
    limit: &'a Limit,
    caller: &'a Caller,
    provider: Arc<Provider>,
    tab: UsageMeter,
    settled: bool,
}

impl<'a> PendingCharge<'a> {
    /// A charge of nothing yet.
    pub(super) fn new(limit: &'a Limit, caller: &'a Caller, provider: &Arc<Provider>) -> Self {
        Self {
            limit,
            caller,
            provider: provider.clone(),
            tab: UsageMeter::default(),
            settled: false,
        }
    }

    /// Where the provider notes what the call takes.
    pub(super) fn tab(&self) -> &UsageMeter {
        &self.tab
    }

    /// The deadline and the charge of the provider's calls.
    pub(super) fn terms(&self, deadline: Instant) -> CallContext<'_> {
        let usage = &self.tab;
        CallContext { deadline, usage }
    }

    /// Ends the pending charge: the response is charged.
    pub(super) fn settle(mut self) {
        self.settled = true;
    }
}

impl Drop for PendingCharge<'_> {
    fn drop(&mut self) {
        let used = self.tab.total();
        if self.settled || used == ProviderUsage::default() {
            return;
        }
        let usage = Usage {
            tokens: used.tokens(),
            cost: self.provider.charge(&self.caller.tenant.name, used),
        };
        self.limit.charge(self.caller, &self.provider.name, usage);
    }
}
