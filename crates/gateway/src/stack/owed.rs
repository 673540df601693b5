//! What callers owe for calls of outside services that they do not wait for.

use std::sync::Arc;

use tokio::time::Instant;

use crate::auth::Caller;
use crate::limit::{Limit, Usage};
use crate::upstream::provider::{Provider, Tab, Terms, Used};

/// What one call may owe. Dropped before it is settled, it charges the tenant
/// for what the service has taken, with a guess at what is not known: a caller
/// who leaves does not leave the bill.
pub(super) struct Owed<'a> {
    limit: &'a Limit,
    caller: &'a Caller,
    provider: Arc<Provider>,
    tab: Tab,
    settled: bool,
}

impl<'a> Owed<'a> {
    /// Nothing yet.
    pub(super) fn new(limit: &'a Limit, caller: &'a Caller, provider: &Arc<Provider>) -> Self {
        Self {
            limit,
            caller,
            provider: provider.clone(),
            tab: Tab::default(),
            settled: false,
        }
    }

    /// Where it is noted what the call takes.
    pub(super) fn tab(&self) -> &Tab {
        &self.tab
    }

    /// What the call is held to.
    pub(super) fn terms(&self, deadline: Instant) -> Terms<'_> {
        let tab = &self.tab;
        Terms { deadline, tab }
    }

    /// There is an answer, and who gets it is charged with that.
    pub(super) fn settle(mut self) {
        self.settled = true;
    }
}

impl Drop for Owed<'_> {
    fn drop(&mut self) {
        let used = self.tab.sum();
        if self.settled || used == Used::default() {
            return;
        }
        let usage = Usage {
            tokens: used.tokens(),
            cost: self.provider.spend(&self.caller.tenant.name, used),
        };
        self.limit.charge(self.caller, &self.provider.name, usage);
    }
}
