//! The limits of a policy as rules: what each counts, in which window, and the
//! amounts that a call is checked against.

use std::time::Duration;

use crate::policy::Quota;

/// Costs are counted in billionths of the currency.
const NANO: f64 = 1e9;
/// The largest count that the scripts in Redis hold exactly.
const COUNT_MAX: u64 = 1 << 53;
/// The most that one call is charged: a service may report any number.
pub const AMOUNT_MAX: u64 = 1 << 40;
const MINUTE_MS: u64 = 60_000;
const DAY_MS: u64 = 24 * 60 * MINUTE_MS;

/// A moment on the monotonic clock and on the wall clock.
#[derive(Debug, Clone, Copy)]
pub struct Moment {
    /// Seconds since the gateway started: for rates.
    pub seconds: f64,
    /// Milliseconds since 1970: for the calendar.
    pub unix_ms: u64,
}

/// The unit of a quota, besides calls in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LimitKind {
    RequestsPerSecond,
    ItemsPerMinute,
    ItemsPerDay,
    TokensPerMinute,
    TokensPerDay,
    CostPerDay,
    CostPerMonth,
}

/// The number of [`LimitKind`]s.
pub const LIMIT_KINDS: usize = 7;

impl LimitKind {
    /// The name of the limit in the policy, in metrics and in Redis.
    pub fn name(self) -> &'static str {
        match self {
            Self::RequestsPerSecond => "requests_per_second",
            Self::ItemsPerMinute => "items_per_minute",
            Self::ItemsPerDay => "items_per_day",
            Self::TokensPerMinute => "tokens_per_minute",
            Self::TokensPerDay => "tokens_per_day",
            Self::CostPerDay => "cost_per_day",
            Self::CostPerMonth => "cost_per_month",
        }
    }

    /// The unit of the limit, for messages.
    pub fn unit(self) -> &'static str {
        match self {
            Self::RequestsPerSecond => "requests per second",
            Self::ItemsPerMinute => "items per minute",
            Self::ItemsPerDay => "items per day",
            Self::TokensPerMinute => "tokens per minute",
            Self::TokensPerDay => "tokens per day",
            Self::CostPerDay => "in cost per day",
            Self::CostPerMonth => "in cost per month",
        }
    }

    /// The length of the window in milliseconds; a rate has none.
    pub fn window_ms(self) -> Option<u64> {
        match self {
            Self::RequestsPerSecond => None,
            Self::ItemsPerMinute | Self::TokensPerMinute => Some(MINUTE_MS),
            Self::ItemsPerDay | Self::TokensPerDay | Self::CostPerDay => Some(DAY_MS),
            Self::CostPerMonth => Some(30 * DAY_MS),
        }
    }

    /// Whether the amount is known only from the response: it is charged
    /// afterwards.
    pub fn is_post_paid(self) -> bool {
        matches!(
            self,
            Self::TokensPerMinute | Self::TokensPerDay | Self::CostPerDay | Self::CostPerMonth
        )
    }
}

/// One limit of a policy.
#[derive(Debug, Clone, Copy)]
pub struct LimitRule {
    pub kind: LimitKind,
    /// The number in the policy: per second for a rate.
    pub configured: f64,
    /// The limit in whole units; for costs, in billionths of the currency.
    pub limit: u64,
    /// The requests of a rate that may come at once.
    pub burst: f64,
}

impl LimitRule {
    /// The number of the window that contains a moment.
    pub fn window(&self, now: Moment) -> u64 {
        self.kind.window_ms().map_or(0, |ms| now.unix_ms / ms)
    }

    /// The time until the window ends.
    pub fn window_left(&self, now: Moment) -> Duration {
        let left = |ms: u64| Duration::from_millis(ms - now.unix_ms % ms);
        self.kind.window_ms().map_or(Duration::ZERO, left)
    }
}

/// The limits that a quota sets.
pub fn rules_of(quota: &Quota) -> Vec<LimitRule> {
    let count = |kind, limit: Option<u64>| {
        limit.map(|limit| LimitRule {
            kind,
            configured: limit as f64,
            limit: limit.min(COUNT_MAX),
            burst: 0.0,
        })
    };
    let cost = |kind, limit: Option<f64>| {
        limit.map(|limit| LimitRule {
            kind,
            configured: limit,
            limit: billionths(limit),
            burst: 0.0,
        })
    };
    let rate = quota.requests_per_second.map(|rate| LimitRule {
        kind: LimitKind::RequestsPerSecond,
        configured: rate,
        limit: 0,
        burst: quota.burst.map_or(rate, f64::from).ceil().max(1.0),
    });
    let all = [
        rate,
        count(LimitKind::ItemsPerMinute, quota.items_per_minute),
        count(LimitKind::ItemsPerDay, quota.items_per_day),
        count(LimitKind::TokensPerMinute, quota.tokens_per_minute),
        count(LimitKind::TokensPerDay, quota.tokens_per_day),
        cost(LimitKind::CostPerDay, quota.cost_per_day),
        cost(LimitKind::CostPerMonth, quota.cost_per_month),
    ];
    all.into_iter().flatten().collect()
}

/// A retry delay in seconds as a duration of at most a month.
pub fn retry_delay(wait: f64) -> Duration {
    let most = Duration::from_millis(30 * DAY_MS);
    Duration::try_from_secs_f64(wait.max(0.0)).map_or(most, |wait| wait.min(most))
}

/// A cost in billionths of the currency, rounded up.
pub fn billionths(cost: f64) -> u64 {
    // The cast saturates: a negative cost counts as zero.
    ((cost * NANO).ceil() as u64).min(COUNT_MAX)
}

/// The usage that a call is charged at admission.
#[derive(Debug, Clone, Copy)]
pub struct Demand {
    /// Requests; None where requests are not counted now.
    pub requests: Option<u64>,
    /// Rows; None where rows, tokens and costs are not checked now.
    pub items: Option<u64>,
}

impl Demand {
    /// The amount of one limit; None when the limit is not checked. Tokens and
    /// costs are 0: they are charged afterwards.
    pub fn of(self, kind: LimitKind) -> Option<u64> {
        match kind {
            LimitKind::RequestsPerSecond => self.requests,
            LimitKind::ItemsPerMinute | LimitKind::ItemsPerDay => self.items,
            _ => self.items.map(|_| 0),
        }
    }
}

/// A limit that has too little left for a call.
#[derive(Debug, Clone, Copy)]
pub struct LimitExceeded {
    /// The limit.
    pub rule: LimitRule,
    /// When it will probably have enough.
    pub retry_after: Duration,
}
