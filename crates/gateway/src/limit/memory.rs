//! What one gateway counts. Requests per second are a bucket that fills
//! steadily (the generic cell rate algorithm of ATM, which needs one number);
//! everything per minute, day or month is a window of the calendar in UTC.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::places::Places;
use super::redis::Lease;
use crate::policy::{Pattern, Quota, Tenant};
use crate::request::Usage;

/// Costs are counted in billionths of the currency.
const NANO: f64 = 1e9;
/// What Redis' scripts can count exactly.
const COUNT_MAX: u64 = 1 << 53;
/// What one call can take: services may say anything.
pub const AMOUNT_MAX: u64 = 1 << 40;
const MINUTE_MS: u64 = 60_000;
const DAY_MS: u64 = 24 * 60 * MINUTE_MS;

/// A moment on both clocks.
#[derive(Debug, Clone, Copy)]
pub struct Now {
    /// Seconds since the gateway started: for rates.
    pub seconds: f64,
    /// Milliseconds since 1970: for the calendar.
    pub unix_ms: u64,
}

/// What can be limited, besides calls under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    RequestsPerSecond,
    ItemsPerMinute,
    ItemsPerDay,
    TokensPerMinute,
    TokensPerDay,
    CostPerDay,
    CostPerMonth,
}

const KINDS: usize = 7;

impl What {
    /// Its name in the policy, in metrics and in Redis.
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

    /// What follows the number in a sentence.
    fn words(self) -> &'static str {
        match self {
            Self::RequestsPerSecond => "requests per second",
            Self::ItemsPerMinute => "items per minute",
            Self::ItemsPerDay => "items per day",
            Self::TokensPerMinute => "tokens per minute",
            Self::TokensPerDay => "tokens per day",
            Self::CostPerDay => "in costs per day",
            Self::CostPerMonth => "in costs per month",
        }
    }

    /// How long its window is; a rate has none.
    fn window_ms(self) -> Option<u64> {
        match self {
            Self::RequestsPerSecond => None,
            Self::ItemsPerMinute | Self::TokensPerMinute => Some(MINUTE_MS),
            Self::ItemsPerDay | Self::TokensPerDay | Self::CostPerDay => Some(DAY_MS),
            Self::CostPerMonth => Some(30 * DAY_MS),
        }
    }

    /// Whether it is known only when the answer is there.
    pub fn is_post_paid(self) -> bool {
        matches!(
            self,
            Self::TokensPerMinute | Self::TokensPerDay | Self::CostPerDay | Self::CostPerMonth
        )
    }
}

/// One limit of a policy.
#[derive(Debug, Clone, Copy)]
pub struct Rule {
    pub what: What,
    /// As the policy has it.
    pub written: f64,
    /// In whole units; for costs, billionths.
    pub limit: u64,
    /// How much of a rate may come at once.
    pub burst: f64,
}

impl Rule {
    /// The number of the window that a moment is in.
    pub fn window(&self, now: Now) -> u64 {
        self.what.window_ms().map_or(0, |ms| now.unix_ms / ms)
    }

    /// How long the window still lasts.
    pub fn rest(&self, now: Now) -> Duration {
        let left = |ms: u64| Duration::from_millis(ms - now.unix_ms % ms);
        self.what.window_ms().map_or(Duration::ZERO, left)
    }
}

fn rules(quota: &Quota) -> Vec<Rule> {
    let count = |what, limit: Option<u64>| {
        limit.map(|limit| Rule {
            what,
            written: limit as f64,
            limit: limit.min(COUNT_MAX),
            burst: 0.0,
        })
    };
    let cost = |what, limit: Option<f64>| {
        limit.map(|limit| Rule {
            what,
            written: limit,
            limit: nano(limit),
            burst: 0.0,
        })
    };
    let rate = quota.requests_per_second.map(|rate| Rule {
        what: What::RequestsPerSecond,
        written: rate,
        limit: 0,
        burst: quota.burst.map_or(rate, f64::from).ceil().max(1.0),
    });
    let all = [
        rate,
        count(What::ItemsPerMinute, quota.items_per_minute),
        count(What::ItemsPerDay, quota.items_per_day),
        count(What::TokensPerMinute, quota.tokens_per_minute),
        count(What::TokensPerDay, quota.tokens_per_day),
        cost(What::CostPerDay, quota.cost_per_day),
        cost(What::CostPerMonth, quota.cost_per_month),
    ];
    all.into_iter().flatten().collect()
}

/// A time to wait, at most a month: who is told more gives up all the same.
pub fn seconds(wait: f64) -> Duration {
    let most = Duration::from_millis(30 * DAY_MS);
    Duration::try_from_secs_f64(wait.max(0.0)).map_or(most, |wait| wait.min(most))
}

fn nano(cost: f64) -> u64 {
    // Saturates: a negative cost is none.
    ((cost * NANO).ceil() as u64).min(COUNT_MAX)
}

/// What a call takes of its limits.
#[derive(Debug, Clone, Copy)]
pub struct Needs {
    /// A request, where those are counted now.
    pub requests: Option<u64>,
    /// Rows, where those and what earlier calls have spent are looked at now.
    pub items: Option<u64>,
}

impl Needs {
    pub fn of(self, what: What) -> Option<u64> {
        match what {
            What::RequestsPerSecond => self.requests,
            What::ItemsPerMinute | What::ItemsPerDay => self.items,
            _ => self.items.map(|_| 0),
        }
    }
}

/// Why a call may not go on.
#[derive(Debug, Clone, Copy)]
pub struct Denied {
    pub rule: Rule,
    pub retry_after: Duration,
}

/// One number, and the part of it that is shared.
#[derive(Debug, Clone, Copy, Default)]
pub struct Count {
    /// Of a rate: when all that was taken has been filled up again.
    full_at: f64,
    window: u64,
    used: u64,
    pub lease: Lease,
}

impl Count {
    /// Whether there is room in one of so many equal shares.
    fn room(&self, rule: &Rule, need: u64, now: Now, shares: u32) -> Result<(), Duration> {
        let shares = f64::from(shares.max(1));
        if rule.what.window_ms().is_none() {
            let interval = shares / rule.written;
            let burst = (rule.burst / shares).max(1.0);
            let full_at = self.full_at.max(now.seconds) + interval * need as f64;
            let wait = full_at - burst * interval - now.seconds;
            // A billionth of a second is what the number itself cannot tell.
            return match wait > 1e-9 {
                true => Err(seconds(wait)),
                false => Ok(()),
            };
        }
        let limit = ((rule.limit as f64 / shares) as u64).max(1);
        let used = match self.window == rule.window(now) {
            true => self.used,
            false => 0,
        };
        let spent = match rule.what.is_post_paid() {
            true => used >= limit,
            false => need > 0 && used.saturating_add(need) > limit,
        };
        match spent {
            true => Err(rule.rest(now)),
            false => Ok(()),
        }
    }

    fn add(&mut self, rule: &Rule, amount: u64, now: Now, shares: u32) {
        if rule.what.window_ms().is_none() {
            let interval = f64::from(shares.max(1)) / rule.written;
            let full_at = self.full_at.max(now.seconds) + interval * amount as f64;
            // No more than empty, whatever was taken by leases.
            self.full_at = full_at.min(now.seconds + rule.burst * interval);
            return;
        }
        let window = rule.window(now);
        if self.window != window {
            (self.window, self.used) = (window, 0);
        }
        self.used = self.used.saturating_add(amount);
    }

    fn give_back(&mut self, rule: &Rule, amount: u64, now: Now, shares: u32) {
        if rule.what.window_ms().is_none() {
            self.full_at -= f64::from(shares.max(1)) / rule.written * amount as f64;
        } else if self.window == rule.window(now) {
            self.used = self.used.saturating_sub(amount);
        }
    }
}

/// What stays when the policy is read again.
#[derive(Debug, Default)]
pub struct State {
    pub places: Places,
    counts: Mutex<[Count; KINDS]>,
    /// Whether it waits to be brought in step with Redis.
    pub queued: AtomicBool,
    /// Held by who asks Redis.
    pub asking: tokio::sync::Mutex<()>,
}

/// The limits of a tenant for all models, or for those of a pattern together.
#[derive(Debug)]
pub struct Scope {
    pattern: Option<Pattern>,
    pub rules: Vec<Rule>,
    in_flight_max: Option<u32>,
    /// What its keys in Redis begin with.
    pub key: String,
    pub state: Arc<State>,
}

impl Scope {
    fn new(tenant: &str, pattern: Option<&Pattern>, quota: &Quota, state: Arc<State>) -> Arc<Self> {
        // The braces keep a tenant's keys on one node of a cluster.
        let models = pattern.map_or("", Pattern::as_str);
        Arc::new(Self {
            pattern: pattern.cloned(),
            rules: rules(quota),
            in_flight_max: quota.in_flight,
            key: format!("andon:quota:{{{tenant}}}:{models}:"),
            state,
        })
    }

    /// Whether it is for the models of a pattern that a name matches.
    pub fn is_of(&self, name: &str) -> bool {
        self.pattern.as_ref().is_some_and(|p| p.matches(name))
    }

    pub fn counts(&self) -> MutexGuard<'_, [Count; KINDS]> {
        let counts = &self.state.counts;
        counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The limits that a call takes something of, and how much.
    pub fn needed(&self, needs: Needs) -> impl Iterator<Item = (&Rule, u64)> {
        let rules = self.rules.iter();
        rules.filter_map(move |rule| Some((rule, needs.of(rule.what)?)))
    }

    /// Takes all or nothing: of the whole, or of this gateway's share.
    pub fn take(&self, needs: Needs, now: Now, taken: Taken) -> Result<(), Denied> {
        let shares = match taken {
            Taken::Share(shares) => shares,
            Taken::Alone | Taken::Leased => 1,
        };
        let mut counts = self.counts();
        for (rule, need) in self.needed(needs) {
            let room = counts[rule.what as usize].room(rule, need, now, shares);
            room.map_err(|retry_after| Denied {
                rule: *rule,
                retry_after,
            })?;
        }
        self.note(&mut counts, needs, now, shares);
        if matches!(taken, Taken::Share(_)) {
            for (rule, need) in self.needed(needs) {
                let lease = &mut counts[rule.what as usize].lease;
                lease.owe(rule, need, now);
            }
        }
        Ok(())
    }

    /// Counts without looking.
    pub fn note(&self, counts: &mut [Count; KINDS], needs: Needs, now: Now, shares: u32) {
        for (rule, need) in self.needed(needs) {
            counts[rule.what as usize].add(rule, need, now, shares);
        }
    }

    /// Takes it back, for a call that another limit refused.
    pub fn give_back(&self, needs: Needs, now: Now, taken: Taken) {
        let mut counts = self.counts();
        for (rule, need) in self.needed(needs) {
            let count = &mut counts[rule.what as usize];
            let shares = match taken {
                Taken::Alone => 1,
                Taken::Leased => {
                    count.lease.give_back(rule, need, now);
                    1
                }
                Taken::Share(shares) => {
                    count.lease.forgive(rule, need, now);
                    shares
                }
            };
            count.give_back(rule, need, now, shares);
        }
    }

    /// Counts what an answer took; whether Redis has to be told.
    pub fn charge(&self, usage: Usage, now: Now) -> bool {
        let mut counts = self.counts();
        let mut changed = false;
        for rule in self.rules.iter().filter(|rule| rule.what.is_post_paid()) {
            let amount = match rule.what {
                What::CostPerDay | What::CostPerMonth => nano(usage.cost),
                _ => usage.tokens,
            };
            let count = &mut counts[rule.what as usize];
            let amount = amount.min(AMOUNT_MAX);
            count.add(rule, amount, now, 1);
            count.lease.owe(rule, amount, now);
            changed |= amount > 0;
        }
        changed
    }

    /// How many calls may be under way.
    pub fn in_flight_max(&self) -> Option<u32> {
        self.in_flight_max
    }

    /// The key of the places that gateways share.
    pub fn places_key(&self) -> String {
        format!("{}in_flight", self.key)
    }

    /// What a caller is told who finds no place.
    pub fn full(&self, limit: u32) -> String {
        self.sentence(&format!("{limit} calls under way"), "is reached")
    }

    /// What a caller is told of a limit.
    pub fn spent(&self, rule: &Rule) -> String {
        self.sentence(
            &format!("{} {}", rule.written, rule.what.words()),
            "is spent",
        )
    }

    fn sentence(&self, limit: &str, state: &str) -> String {
        match &self.pattern {
            Some(pattern) => format!(
                "the tenant's limit of {limit} for '{}' {state}",
                pattern.as_str()
            ),
            None => format!("the tenant's limit of {limit} for all models {state}"),
        }
    }
}

/// How something was counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    /// By the only gateway.
    Alone,
    /// Out of what Redis granted.
    Leased,
    /// Out of this gateway's share, without Redis.
    Share(u32),
}

/// All limits of one tenant.
#[derive(Debug)]
pub struct Meters {
    pub tenant: Arc<Tenant>,
    /// Of all models together.
    pub all: Arc<Scope>,
    models: Vec<Arc<Scope>>,
}

impl Meters {
    /// Limits of a tenant; what is counted stays as it was before.
    pub fn new(tenant: &Arc<Tenant>, before: Option<&Self>) -> Self {
        let state = |pattern: Option<&Pattern>| {
            let scopes = before.into_iter().flat_map(|before| {
                let models = before.models.iter();
                models.chain([&before.all])
            });
            let mut same = scopes.filter(|scope| scope.pattern.as_ref() == pattern);
            same.next()
                .map(|scope| scope.state.clone())
                .unwrap_or_default()
        };
        let scope = |pattern: Option<&Pattern>, quota: &Quota| {
            Scope::new(&tenant.name, pattern, quota, state(pattern))
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

    /// The limits for a model besides those for all: each whose pattern it
    /// matches holds.
    pub fn of_model<'a>(&'a self, model: &'a str) -> impl Iterator<Item = &'a Arc<Scope>> {
        self.models.iter().filter(move |scope| scope.is_of(model))
    }
}
