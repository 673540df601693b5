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

use super::counters::QuotaScope;
use super::lease::{LeaseCheck, LeaseGrant, LeaseRequest};
use super::rules::{Demand, LimitExceeded, LimitKind, Moment};
use super::slots::{REQUEST_WAIT_MAX, REQUESTS_MAX};
use crate::redis::{Redis, RedisFailure};

/// Scopes that may be queued for synchronization; each is queued once at most.
const QUEUED_MAX: usize = 1024;
/// Between two rounds of synchronization.
const SYNC_INTERVAL: Duration = Duration::from_millis(2);

/// Why a call is refused by a shared limit.
#[derive(Debug, Clone, Copy)]
pub enum QuotaRefusal {
    /// A limit has too little left.
    Exceeded(LimitExceeded),
    /// Too many calls wait for their request to a Redis that responds.
    Overloaded,
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
