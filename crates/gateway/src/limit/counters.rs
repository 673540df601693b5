//! The counters of quotas in the memory of one gateway. A rate limit on requests
//! per second is a bucket that fills steadily (GCRA, the generic cell rate
//! algorithm of ATM, which needs one number). A limit per minute, day or month is
//! a fixed window of the calendar in UTC.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::lease::QuotaLease;
use super::rules::{
    AMOUNT_MAX, Demand, LIMIT_KINDS, LimitExceeded, LimitKind, LimitRule, Moment, billionths,
    retry_delay, rules_of,
};
use super::slots::ScopeSlots;
use crate::policy::{Pattern, Quota, Tenant};
use crate::request::Usage;

/// The counter of one limit, and the lease of its shared part.
#[derive(Debug, Clone, Copy, Default)]
pub struct LimitCounter {
    /// Of a rate: when the bucket will be full again (the theoretical arrival
    /// time of GCRA), in seconds since the gateway started.
    full_at: f64,
    window: u64,
    used: u64,
    /// The lease of a limit that gateways share.
    pub lease: QuotaLease,
}

impl LimitCounter {
    /// Checks that one of `shares` equal shares has room; the error is how long
    /// to wait.
    fn room(
        &self,
        rule: &LimitRule,
        amount: u64,
        now: Moment,
        shares: u32,
    ) -> Result<(), Duration> {
        let shares = f64::from(shares.max(1));
        if rule.kind.window_ms().is_none() {
            let interval = shares / rule.configured;
            let burst = (rule.burst / shares).max(1.0);
            let full_at = self.full_at.max(now.seconds) + interval * amount as f64;
            let wait = full_at - burst * interval - now.seconds;
            // Less than a billionth of a second is rounding.
            return if wait > 1e-9 {
                Err(retry_delay(wait))
            } else {
                Ok(())
            };
        }
        let limit = ((rule.limit as f64 / shares) as u64).max(1);
        let used = if self.window == rule.window(now) {
            self.used
        } else {
            0
        };
        let exceeded = if rule.kind.is_post_paid() {
            used >= limit
        } else {
            amount > 0 && used.saturating_add(amount) > limit
        };
        if exceeded {
            Err(rule.window_left(now))
        } else {
            Ok(())
        }
    }

    fn add(&mut self, rule: &LimitRule, amount: u64, now: Moment, shares: u32) {
        if rule.kind.window_ms().is_none() {
            let interval = f64::from(shares.max(1)) / rule.configured;
            let full_at = self.full_at.max(now.seconds) + interval * amount as f64;
            // The bucket is at most empty, however much leases took.
            self.full_at = full_at.min(now.seconds + rule.burst * interval);
            return;
        }
        let window = rule.window(now);
        if self.window != window {
            (self.window, self.used) = (window, 0);
        }
        self.used = self.used.saturating_add(amount);
    }

    fn refund(&mut self, rule: &LimitRule, amount: u64, now: Moment, shares: u32) {
        if rule.kind.window_ms().is_none() {
            self.full_at -= f64::from(shares.max(1)) / rule.configured * amount as f64;
        } else if self.window == rule.window(now) {
            self.used = self.used.saturating_sub(amount);
        }
    }
}

/// The counters of a scope: they outlive a reload of the policy.
#[derive(Debug)]
pub struct ScopeState {
    /// The slots of calls in flight.
    pub slots: Arc<ScopeSlots>,
    counters: Mutex<[LimitCounter; LIMIT_KINDS]>,
    /// Whether the scope is queued for synchronization with Redis.
    pub queued: AtomicBool,
    /// Held while Redis is asked for quotas: one request at a time for a scope.
    pub request_lock: tokio::sync::Mutex<()>,
}

impl ScopeState {
    fn new(key: &str) -> Arc<Self> {
        Arc::new(Self {
            slots: ScopeSlots::new(format!("{key}in_flight")),
            counters: Mutex::default(),
            queued: AtomicBool::new(false),
            request_lock: tokio::sync::Mutex::new(()),
        })
    }
}

/// The limits of a tenant for all models, or for those of a pattern together.
#[derive(Debug)]
pub struct QuotaScope {
    pattern: Option<Pattern>,
    /// The limits.
    pub rules: Vec<LimitRule>,
    in_flight_max: Option<u32>,
    /// The prefix of its keys in Redis.
    pub key: String,
    /// The counters.
    pub state: Arc<ScopeState>,
}

impl QuotaScope {
    fn new(
        tenant: &str,
        pattern: Option<&Pattern>,
        quota: &Quota,
        state: Option<Arc<ScopeState>>,
    ) -> Arc<Self> {
        // The braces keep a tenant's keys on one node of a cluster.
        let models = pattern.map_or("", Pattern::as_str);
        let key = format!("andon:quota:{{{tenant}}}:{models}:");
        Arc::new(Self {
            pattern: pattern.cloned(),
            rules: rules_of(quota),
            in_flight_max: quota.in_flight,
            state: state.unwrap_or_else(|| ScopeState::new(&key)),
            key,
        })
    }

    /// Whether the scope is of a pattern that matches the name of a model.
    pub fn matches(&self, name: &str) -> bool {
        let pattern = self.pattern.as_ref();
        pattern.is_some_and(|pattern| pattern.matches(name))
    }

    /// The counters, locked.
    pub fn counters(&self) -> MutexGuard<'_, [LimitCounter; LIMIT_KINDS]> {
        let counters = &self.state.counters;
        counters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The limits that a call is checked against, and the amount of each.
    pub fn demanded(&self, demand: Demand) -> impl Iterator<Item = (&LimitRule, u64)> {
        let rules = self.rules.iter();
        rules.filter_map(move |rule| Some((rule, demand.of(rule.kind)?)))
    }

    /// Takes from all limits or none: from the whole limits, or from this
    /// gateway's share of them.
    pub fn take(
        &self,
        demand: Demand,
        now: Moment,
        counted_by: CountedBy,
    ) -> Result<(), LimitExceeded> {
        let shares = match counted_by {
            CountedBy::Share(shares) => shares,
            CountedBy::Gateway | CountedBy::Lease => 1,
        };
        let mut counters = self.counters();
        for (rule, amount) in self.demanded(demand) {
            let room = counters[rule.kind as usize].room(rule, amount, now, shares);
            room.map_err(|retry_after| LimitExceeded {
                rule: *rule,
                retry_after,
            })?;
        }
        self.record(&mut counters, demand, now, shares);
        if matches!(counted_by, CountedBy::Share(_)) {
            for (rule, amount) in self.demanded(demand) {
                let lease = &mut counters[rule.kind as usize].lease;
                lease.add_unreported(rule, amount, now);
            }
        }
        Ok(())
    }

    /// Counts without a check.
    pub fn record(
        &self,
        counters: &mut [LimitCounter; LIMIT_KINDS],
        demand: Demand,
        now: Moment,
        shares: u32,
    ) {
        for (rule, amount) in self.demanded(demand) {
            counters[rule.kind as usize].add(rule, amount, now, shares);
        }
    }

    /// Returns a call's usage when another limit refused the call.
    pub fn refund(&self, demand: Demand, now: Moment, counted_by: CountedBy) {
        let mut counters = self.counters();
        for (rule, amount) in self.demanded(demand) {
            let counter = &mut counters[rule.kind as usize];
            let shares = match counted_by {
                CountedBy::Gateway => 1,
                CountedBy::Lease => {
                    counter.lease.refund(rule, amount, now);
                    1
                }
                CountedBy::Share(shares) => {
                    counter.lease.forgive_unreported(rule, amount, now);
                    shares
                }
            };
            counter.refund(rule, amount, now, shares);
        }
    }

    /// Charges the usage of a response; whether there is something to report to
    /// Redis.
    pub fn charge(&self, usage: Usage, now: Moment) -> bool {
        let mut counters = self.counters();
        let mut changed = false;
        for rule in self.rules.iter().filter(|rule| rule.kind.is_post_paid()) {
            let amount = match rule.kind {
                LimitKind::CostPerDay | LimitKind::CostPerMonth => billionths(usage.cost),
                _ => usage.tokens,
            };
            let counter = &mut counters[rule.kind as usize];
            let amount = amount.min(AMOUNT_MAX);
            counter.add(rule, amount, now, 1);
            counter.lease.add_unreported(rule, amount, now);
            changed |= amount > 0;
        }
        changed
    }

    /// How many calls may be in flight.
    pub fn in_flight_max(&self) -> Option<u32> {
        self.in_flight_max
    }

    /// The message for a caller when all slots are in use.
    pub fn slots_message(&self, limit: u32) -> String {
        self.message(&format!("{limit} calls in flight"), "is reached")
    }

    /// The message for a caller who exceeds a limit.
    pub fn exceeded_message(&self, rule: &LimitRule) -> String {
        self.message(
            &format!("{} {}", rule.configured, rule.kind.unit()),
            "is exceeded",
        )
    }

    fn message(&self, limit: &str, state: &str) -> String {
        match &self.pattern {
            Some(pattern) => format!(
                "the tenant's limit of {limit} for '{}' {state}",
                pattern.as_str()
            ),
            None => format!("the tenant's limit of {limit} for all models {state}"),
        }
    }
}

/// Where an amount was counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CountedBy {
    /// In this gateway alone: there is no Redis.
    Gateway,
    /// In a lease from Redis.
    Lease,
    /// In this gateway's share, one of so many, while Redis is lost.
    Share(u32),
}

/// All limits of one tenant.
#[derive(Debug)]
pub struct TenantQuotas {
    /// The tenant, as the policy had it.
    pub tenant: Arc<Tenant>,
    /// The limits for all models together.
    pub all: Arc<QuotaScope>,
    models: Vec<Arc<QuotaScope>>,
}

impl TenantQuotas {
    /// The limits of a tenant; the counters continue from those before.
    pub fn new(tenant: &Arc<Tenant>, before: Option<&Self>) -> Self {
        let state = |pattern: Option<&Pattern>| {
            let scopes = before.into_iter().flat_map(|before| {
                let models = before.models.iter();
                models.chain([&before.all])
            });
            let mut same = scopes.filter(|scope| scope.pattern.as_ref() == pattern);
            same.next().map(|scope| scope.state.clone())
        };
        let scope = |pattern: Option<&Pattern>, quota: &Quota| {
            QuotaScope::new(&tenant.name, pattern, quota, state(pattern))
        };
        let models = tenant.model_quotas.iter();
        Self {
            tenant: tenant.clone(),
            all: scope(None, &tenant.quota),
            models: models
                .map(|(pattern, quota)| scope(Some(pattern), quota))
                .collect(),
        }
    }

    /// The limits for a model besides those for all models: each whose pattern
    /// matches it holds.
    pub fn of_model<'a>(&'a self, model: &'a str) -> impl Iterator<Item = &'a Arc<QuotaScope>> {
        self.models.iter().filter(move |scope| scope.matches(model))
    }
}
