//! Quotas that several gateways share through Redis. A gateway takes a small
//! lease of a limit ahead of time and admits calls from it, so that most calls
//! wait for no round trip. See docs/decisions/shared_quotas.md.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ::redis::{Script, ScriptInvocation};
use platform::tasks::{OwnedTask, spawn_owned};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::counters::{
    AMOUNT_MAX, Demand, LimitExceeded, LimitKind, LimitRule, Moment, QuotaScope, retry_delay,
};
use crate::redis::{COMMAND_TIMEOUT, Redis, RedisFailure};

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
/// Scopes that may be queued for synchronization; each is queued once at most.
const QUEUED_MAX: usize = 1024;
/// How long a call waits for the request of another call to end: that one learns
/// in half of this time whether Redis is lost.
pub const REQUEST_WAIT_MAX: Duration = COMMAND_TIMEOUT.saturating_mul(2);
/// Requests of one call before it gives up: a window may end meanwhile.
pub const REQUESTS_MAX: usize = 3;
/// Between two rounds of synchronization.
const SYNC_INTERVAL: Duration = Duration::from_millis(2);

/// The part of a shared limit that Redis has leased to this gateway.
#[derive(Debug, Clone, Copy, Default)]
pub struct QuotaLease {
    window: u64,
    /// Granted and not used yet.
    available: u64,
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

/// Why a call is refused by a shared limit.
#[derive(Debug, Clone, Copy)]
pub enum QuotaRefusal {
    /// A limit has too little left.
    Exceeded(LimitExceeded),
    /// Too many calls wait for their request to a Redis that responds.
    Overloaded,
}

/// Whether a lease covers a call.
enum LeaseCheck {
    Covered,
    /// Redis has to be queried.
    Short,
    /// The limit is exceeded; how long to wait.
    Exceeded(Duration),
}

impl QuotaLease {
    /// Drops the usage of an earlier window, and an expired lease of a rate.
    fn roll(&mut self, rule: &LimitRule, now: Moment) {
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

    fn check(&self, rule: &LimitRule, amount: u64, now: Moment) -> LeaseCheck {
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
    fn is_low(&self, rule: &LimitRule, now: Moment) -> bool {
        if rule.kind.is_post_paid() {
            let stale = |at| now.seconds - at > USAGE_REFRESH_SECONDS;
            return self.requested_at.is_none_or(stale);
        }
        self.size > 1 && self.available * 2 < self.size && now.seconds >= self.exhausted_until
    }

    /// The request to Redis: the unreported usage to add, and the least and the
    /// most to grant.
    fn request(&mut self, rule: &LimitRule, amount: u64, now: Moment) -> [u64; 3] {
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
    fn apply(&mut self, request: LeaseRequest, grant: LeaseGrant, now: Moment) {
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
    fn revert(&mut self, request: LeaseRequest) {
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
struct LeaseRequest {
    rule: LimitRule,
    window: u64,
    /// The usage that it reports.
    unreported: u64,
    /// The least that is of use.
    least: u64,
}

/// The response of Redis for one limit.
#[derive(Debug, Clone, Copy)]
struct LeaseGrant {
    amount: u64,
    /// Of a rate: microseconds until more is available. Of a window: the usage
    /// of all gateways.
    detail: u64,
}

/// The outcome of taking from the leases of a scope.
enum LeaseOutcome {
    /// Taken; `low` when some lease should be refilled.
    Taken { low: bool },
    /// Redis has to be queried.
    Short,
    /// A limit is exceeded.
    Exceeded(LimitExceeded),
}

/// Takes from all leases that a call needs, or from none.
fn take_leased(scope: &QuotaScope, demand: Demand, now: Moment) -> LeaseOutcome {
    let mut counters = scope.counters();
    let mut short = false;
    for (rule, amount) in scope.demanded(demand) {
        let lease = &mut counters[rule.kind as usize].lease;
        lease.roll(rule, now);
        match lease.check(rule, amount, now) {
            LeaseCheck::Covered => {}
            LeaseCheck::Short => short = true,
            LeaseCheck::Exceeded(retry_after) => {
                return LeaseOutcome::Exceeded(LimitExceeded {
                    rule: *rule,
                    retry_after,
                });
            }
        }
    }
    if short {
        return LeaseOutcome::Short;
    }
    let mut low = false;
    for (rule, amount) in scope.demanded(demand) {
        let lease = &mut counters[rule.kind as usize].lease;
        lease.available = lease.available.saturating_sub(amount);
        low |= lease.is_low(rule, now);
    }
    // Counted here too, for the time when Redis is lost.
    scope.record(&mut counters, demand, now, 1);
    LeaseOutcome::Taken { low }
}

/// The limits that several gateways share through Redis.
#[derive(Debug)]
pub struct SharedQuotas {
    redis: Arc<Redis>,
    script: Script,
    queue: mpsc::Sender<Arc<QuotaScope>>,
    queued: Mutex<Option<mpsc::Receiver<Arc<QuotaScope>>>>,
}

impl SharedQuotas {
    /// Holds no lease yet.
    pub fn new(redis: Arc<Redis>) -> Arc<Self> {
        let (queue, queued) = mpsc::channel(QUEUED_MAX);
        Arc::new(Self {
            redis,
            script: Script::new(include_str!("take.lua")),
            queue,
            queued: Mutex::new(Some(queued)),
        })
    }

    /// Charges the demand of a call. None when Redis is lost: at once, or after
    /// 20 ms for the calls that detect it.
    pub async fn take(
        &self,
        scope: &Arc<QuotaScope>,
        demand: Demand,
        now: impl Fn() -> Moment,
    ) -> Option<Result<(), QuotaRefusal>> {
        if !self.redis.available() {
            return None;
        }
        match take_leased(scope, demand, now()) {
            LeaseOutcome::Taken { low } => {
                if low {
                    self.queue_sync(scope);
                }
                return Some(Ok(()));
            }
            LeaseOutcome::Exceeded(denied) => return Some(Err(QuotaRefusal::Exceeded(denied))),
            LeaseOutcome::Short => {}
        }
        // Single-flight: one call sends a request, and the others use the lease
        // that it brings. A long wait here is no sign of a lost Redis: only the
        // request itself has a timeout of 20 ms.
        let Ok(_request) = timeout(REQUEST_WAIT_MAX, scope.state.request_lock.lock()).await else {
            return self
                .redis
                .available()
                .then_some(Err(QuotaRefusal::Overloaded));
        };
        for _ in 0..REQUESTS_MAX {
            match take_leased(scope, demand, now()) {
                LeaseOutcome::Taken { .. } => return Some(Ok(())),
                LeaseOutcome::Exceeded(denied) => return Some(Err(QuotaRefusal::Exceeded(denied))),
                LeaseOutcome::Short => self.request(scope, demand, &now).await?,
            }
        }
        match take_leased(scope, demand, now()) {
            LeaseOutcome::Taken { .. } => Some(Ok(())),
            LeaseOutcome::Exceeded(denied) => Some(Err(QuotaRefusal::Exceeded(denied))),
            LeaseOutcome::Short => Some(Err(QuotaRefusal::Overloaded)),
        }
    }

    /// Queues a scope for synchronization in the background.
    pub fn queue_sync(&self, scope: &Arc<QuotaScope>) {
        if scope.state.queued.swap(true, Ordering::AcqRel) {
            return;
        }
        if self.queue.try_send(scope.clone()).is_err() {
            // The queue is full: the next call of this scope tries again.
            scope.state.queued.store(false, Ordering::Release);
        }
    }

    /// Synchronizes the queued scopes with Redis, until the task is dropped.
    pub fn follow(
        self: &Arc<Self>,
        now: impl Fn() -> Moment + Send + Sync + 'static,
    ) -> Option<OwnedTask> {
        let mut queued = self
            .queued
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()?;
        let shared = self.clone();
        Some(spawn_owned(async move {
            let mut round = Vec::with_capacity(64);
            while queued.recv_many(&mut round, 64).await > 0 {
                for scope in round.drain(..) {
                    scope.state.queued.store(false, Ordering::Release);
                    let _request = scope.state.request_lock.lock().await;
                    let nothing = Demand {
                        requests: Some(0),
                        items: Some(0),
                    };
                    let _ = shared.request(&scope, nothing, &now).await;
                }
                tokio::time::sleep(SYNC_INTERVAL).await;
            }
        }))
    }

    /// One round trip for all limits of a scope that a call needs. When the
    /// caller leaves, or the response does not come, the unreported usage counts
    /// as reported all the same: Redis most probably added it, and must not add
    /// it twice.
    async fn request(
        &self,
        scope: &QuotaScope,
        demand: Demand,
        now: impl Fn() -> Moment,
    ) -> Option<()> {
        if !self.redis.available() {
            return None;
        }
        let mut invocation = self.script.prepare_invoke();
        let requests = prepare(&mut invocation, scope, demand, now());
        let response = self.redis.run_script::<Vec<i64>>(&invocation).await;
        let at = now();
        let mut counters = scope.counters();
        match response {
            Ok(numbers) => {
                for (request, pair) in requests.into_iter().zip(numbers.chunks_exact(2)) {
                    let number = |index: usize| u64::try_from(pair[index]).unwrap_or(0);
                    let grant = LeaseGrant {
                        amount: number(0),
                        detail: number(1),
                    };
                    let lease = &mut counters[request.rule.kind as usize].lease;
                    lease.apply(request, grant, at);
                }
                Some(())
            }
            Err(RedisFailure::NotExecuted) => {
                for request in requests {
                    let lease = &mut counters[request.rule.kind as usize].lease;
                    lease.revert(request);
                }
                None
            }
            Err(RedisFailure::Unknown) => None,
        }
    }
}

/// Adds the keys and arguments of all limits that a call needs to a script.
fn prepare(
    invocation: &mut ScriptInvocation<'_>,
    scope: &QuotaScope,
    demand: Demand,
    at: Moment,
) -> Vec<LeaseRequest> {
    let mut counters = scope.counters();
    let mut requests = Vec::new();
    for (rule, amount) in scope.demanded(demand) {
        let lease = &mut counters[rule.kind as usize].lease;
        let [unreported, least, most] = lease.request(rule, amount, at);
        let window = lease.window;
        requests.push(LeaseRequest {
            rule: *rule,
            window,
            unreported,
            least,
        });
        let name = rule.kind.name();
        match rule.kind {
            LimitKind::RequestsPerSecond => invocation
                .key(format!("{}{name}", scope.key))
                .arg("rate")
                .arg(rule.configured)
                .arg(rule.burst),
            _ => invocation
                .key(format!("{}{name}:{window}", scope.key))
                .arg("window")
                .arg(rule.limit)
                .arg(u64::try_from(rule.window_left(at).as_millis()).unwrap_or(0) + 60_000),
        };
        invocation.arg(unreported).arg(least).arg(most);
    }
    requests
}
