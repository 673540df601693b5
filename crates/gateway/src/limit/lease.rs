//! The part of a shared limit that Redis has leased to this gateway, and how much
//! to ask for next.

use std::time::Duration;

use super::rules::{AMOUNT_MAX, LimitKind, LimitRule, Moment, retry_delay};

/// Seconds after which the rest of a lease of a rate expires.
const RATE_LEASE_SECONDS: f64 = 1.0;
/// A lease that is used up within these seconds grows; a slower one shrinks.
const LEASE_GROWTH_SECONDS: f64 = 0.2;
/// Seconds for which Redis is not queried again for an exhausted rate.
const RATE_PAUSE_SECONDS: f64 = 0.005;
/// Seconds after which the usage of all gateways is refreshed in the background.
const USAGE_REFRESH_SECONDS: f64 = 0.1;
/// Seconds after which it is refreshed before a call is admitted.
const USAGE_STALE_SECONDS: f64 = 1.0;
/// The part of a shared limit that Redis has leased to this gateway.
#[derive(Debug, Clone, Copy, Default)]
pub struct QuotaLease {
    pub window: u64,
    /// Granted and not used yet.
    pub available: u64,
    /// The amount that is requested at once.
    size: u64,
    /// When Redis was queried last, in seconds since the gateway started.
    requested_at: Option<f64>,
    /// This much or more is exhausted in Redis, which is not queried for it before.
    exhausted_amount: u64,
    exhausted_until: f64,
    /// Usage that is not reported to Redis yet: charged after a response, or
    /// counted while Redis was lost.
    unreported: u64,
    /// The usage of all gateways, when Redis was queried last.
    used_by_all: Option<u64>,
}

/// Whether a lease covers a call.
pub enum LeaseCheck {
    Covered,
    /// Redis has to be queried.
    Short,
    /// The limit is exceeded; how long to wait.
    Exceeded(Duration),
}

impl QuotaLease {
    /// Drops the usage of an earlier window, and an expired lease of a rate.
    pub fn roll(&mut self, rule: &LimitRule, now: Moment) {
        let window = rule.window(now);
        if self.window != window {
            *self = Self {
                window,
                size: self.size,
                ..Self::default()
            };
        }
        let old = self
            .requested_at
            .is_some_and(|at| now.seconds - at > RATE_LEASE_SECONDS);
        if rule.kind == LimitKind::RequestsPerSecond && old {
            self.available = 0;
        }
    }

    /// The largest lease: no more than this stays unused when a gateway stops
    /// calling, or dies.
    fn size_max(rule: &LimitRule) -> u64 {
        let most = match rule.kind {
            LimitKind::RequestsPerSecond => (rule.configured / 50.0).min(rule.burst / 5.0) as u64,
            _ => rule.limit / 100,
        };
        most.max(1)
    }

    pub fn check(&self, rule: &LimitRule, amount: u64, now: Moment) -> LeaseCheck {
        let retry_after = || match rule.kind {
            LimitKind::RequestsPerSecond => retry_delay(self.exhausted_until - now.seconds),
            _ => rule.window_left(now),
        };
        if rule.kind.is_post_paid() {
            let fresh = self
                .requested_at
                .is_some_and(|at| now.seconds - at < USAGE_STALE_SECONDS);
            return match self.used_by_all {
                Some(used_by_all) if used_by_all.saturating_add(self.unreported) >= rule.limit => {
                    LeaseCheck::Exceeded(retry_after())
                }
                Some(_) if fresh => LeaseCheck::Covered,
                _ => LeaseCheck::Short,
            };
        }
        if amount <= self.available {
            LeaseCheck::Covered
        } else if amount >= self.exhausted_amount && now.seconds < self.exhausted_until {
            LeaseCheck::Exceeded(retry_after())
        } else {
            LeaseCheck::Short
        }
    }

    /// Whether the lease should be refilled, though no call waits for that.
    pub fn is_low(&self, rule: &LimitRule, now: Moment) -> bool {
        if rule.kind.is_post_paid() {
            let stale = |at| now.seconds - at > USAGE_REFRESH_SECONDS;
            return self.requested_at.is_none_or(stale);
        }
        self.size > 1 && self.available * 2 < self.size && now.seconds >= self.exhausted_until
    }

    /// The request to Redis: the unreported usage to add, and the least and the
    /// most to grant.
    pub fn request(&mut self, rule: &LimitRule, amount: u64, now: Moment) -> [u64; 3] {
        self.roll(rule, now);
        // What exceeds the bound is reported the next time.
        let unreported = self.unreported.min(AMOUNT_MAX);
        self.unreported -= unreported;
        self.used_by_all = self
            .used_by_all
            .map(|used_by_all| used_by_all.saturating_add(unreported));
        if rule.kind.is_post_paid() {
            self.requested_at = Some(now.seconds);
            return [unreported, 0, 0];
        }
        let least = amount.saturating_sub(self.available);
        if least == 0 && !self.is_low(rule, now) {
            return [unreported, 0, 0];
        }
        let recent = |at| now.seconds - at < LEASE_GROWTH_SECONDS;
        let size = if self.requested_at.is_some_and(recent) {
            self.size.saturating_mul(2)
        } else {
            self.size / 2
        };
        self.size = size.clamp(1, Self::size_max(rule));
        self.requested_at = Some(now.seconds);
        [unreported, least, least.max(self.size)]
    }

    /// Applies the grant of Redis.
    pub fn apply(&mut self, request: LeaseRequest, grant: LeaseGrant, now: Moment) {
        let LeaseRequest { rule, least, .. } = request;
        let granted = grant.amount;
        if rule.window(now) != self.window || request.window != self.window {
            return;
        }
        self.available = self.available.saturating_add(granted);
        if rule.kind != LimitKind::RequestsPerSecond {
            self.used_by_all = Some(grant.detail);
        }
        if least == 0 || granted >= least {
            return;
        }
        (self.exhausted_amount, self.exhausted_until) = match rule.kind {
            // The bucket fills meanwhile: a slightly later request is granted
            // more at once.
            LimitKind::RequestsPerSecond => {
                let pause = (rule.burst / rule.configured / 4.0).min(RATE_PAUSE_SECONDS);
                (1, now.seconds + pause.max(grant.detail as f64 / 1e6))
            }
            // Other gateways may give something back, or the policy may change.
            _ => {
                let over = least.saturating_add(self.available);
                (over, now.seconds + USAGE_REFRESH_SECONDS)
            }
        };
    }

    /// Takes a request back that Redis did not carry out: its usage is unreported
    /// again.
    pub fn revert(&mut self, request: LeaseRequest) {
        if request.window == self.window {
            let reported = request.unreported;
            self.unreported = self.unreported.saturating_add(reported);
            self.used_by_all = self.used_by_all.map(|used| used.saturating_sub(reported));
        }
    }

    /// Adds usage that is not reported to Redis yet. Requests of a rate are never
    /// reported: calls would wait for them when Redis is back.
    pub fn add_unreported(&mut self, rule: &LimitRule, amount: u64, now: Moment) {
        if rule.kind == LimitKind::RequestsPerSecond {
            return;
        }
        self.roll(rule, now);
        self.unreported = self.unreported.saturating_add(amount);
    }

    /// Removes unreported usage of a call that was refused in the end.
    pub fn forgive_unreported(&mut self, rule: &LimitRule, amount: u64, now: Moment) {
        self.roll(rule, now);
        self.unreported = self.unreported.saturating_sub(amount);
    }

    /// Returns the usage of a refused call to the lease.
    pub fn refund(&mut self, rule: &LimitRule, amount: u64, now: Moment) {
        self.roll(rule, now);
        self.available = self.available.saturating_add(amount);
    }
}

/// A request to Redis for one limit.
#[derive(Debug, Clone, Copy)]
pub struct LeaseRequest {
    pub rule: LimitRule,
    pub window: u64,
    /// The usage that it reports.
    pub unreported: u64,
    /// The least that is of use.
    pub least: u64,
}

/// The response of Redis for one limit.
#[derive(Debug, Clone, Copy)]
pub struct LeaseGrant {
    pub amount: u64,
    /// Of a rate: microseconds until more is available. Of a window: the usage
    /// of all gateways.
    pub detail: u64,
}
