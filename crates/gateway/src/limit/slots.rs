//! In-flight slots: how many calls of a tenant may be in flight at once. One
//! gateway counts its own calls. Several gateways hold slots that Redis leases
//! to them, as many as their calls have used lately. See
//! docs/decisions/shared_quotas.md.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ::redis::Script;
use futures::StreamExt;
use platform::tasks::{OwnedTask, spawn_owned};
use tokio::sync::Notify;
use tokio::time::timeout;

use crate::redis::{COMMAND_TIMEOUT, Redis};

/// How long a call waits for the request of another call to end: that one learns
/// in half of this time whether Redis is lost.
pub const REQUEST_WAIT_MAX: Duration = COMMAND_TIMEOUT.saturating_mul(2);
/// Requests of one call before it gives up: a window may end meanwhile.
pub const REQUESTS_MAX: usize = 3;
/// Seconds for which Redis leases slots: the slots of a gateway that died are
/// missing for this long.
const LEASE_SECONDS: f64 = 3.0;
/// Between two renewals, which also give unused slots back.
const RENEW_INTERVAL: Duration = Duration::from_millis(100);
/// Scopes whose leases are renewed concurrently.
const RENEW_CONCURRENCY: usize = 32;
/// Seconds for which Redis is not queried again after it had no free slot.
const EXHAUSTED_SECONDS: f64 = 0.005;

/// The in-flight slots of one scope.
#[derive(Debug)]
pub struct ScopeSlots {
    /// The key in Redis of the slots that gateways share.
    key: String,
    /// The identity of this gateway among the holders of the same limit.
    holder: u128,
    counts: Mutex<SlotCounts>,
    /// Held while Redis is asked for slots: one request at a time for a scope.
    request_lock: tokio::sync::Mutex<()>,
}

/// Times are seconds since the gateway started.
#[derive(Debug, Clone, Copy)]
struct SlotCounts {
    in_flight: u32,
    /// The most calls in flight since the last renewal.
    peak: u32,
    /// The slots that Redis has leased, and when the lease expires.
    granted: u32,
    expires: f64,
    /// Redis had no free slot: it is not queried again before.
    exhausted_until: f64,
    limit: u32,
    /// Calls that wait for a slot.
    waiting: u32,
    /// When Redis was queried last, and the most slots that it may have recorded
    /// for this gateway since.
    requested_at: f64,
    recorded: u32,
    /// Whether the scope is in the list of leases to renew.
    tracked: bool,
}

/// The outcome of a lease's renewal.
enum Renewal {
    /// Stop: nothing is in use and Redis records nothing.
    Stop,
    /// Nothing this time.
    Skip,
    /// Report to Redis which slots are in use.
    Report,
}

impl SlotCounts {
    fn acquire(&mut self, max: u32) -> bool {
        if self.in_flight >= max {
            return false;
        }
        self.in_flight += 1;
        self.peak = self.peak.max(self.in_flight);
        true
    }

    /// Decides on a renewal from the use since the last one.
    fn renewal(&mut self, now: f64) -> Renewal {
        let recorded = self.recorded > 0 && now < self.requested_at + LEASE_SECONDS;
        if self.in_flight == 0 && self.waiting == 0 && !recorded {
            self.tracked = false;
            return Renewal::Stop;
        }
        // Renewed after half of its time, a lease has no gap.
        if self.recorded > self.peak || now > self.expires - LEASE_SECONDS / 2.0 {
            return Renewal::Report;
        }
        self.peak = self.in_flight;
        Renewal::Skip
    }
}

impl ScopeSlots {
    /// No slot is in use and none is leased.
    pub fn new(key: String) -> Arc<Self> {
        Arc::new(Self {
            key,
            holder: rand::random(),
            counts: Mutex::new(SlotCounts {
                in_flight: 0,
                peak: 0,
                granted: 0,
                expires: f64::NEG_INFINITY,
                exhausted_until: f64::NEG_INFINITY,
                limit: 0,
                waiting: 0,
                requested_at: f64::NEG_INFINITY,
                recorded: 0,
                tracked: false,
            }),
            request_lock: tokio::sync::Mutex::new(()),
        })
    }

    fn counts(&self) -> MutexGuard<'_, SlotCounts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A slot of a call in flight, until it is dropped.
#[derive(Debug)]
pub struct InFlightSlot(Option<Arc<ScopeSlots>>);

impl Drop for InFlightSlot {
    fn drop(&mut self) {
        if let Some(slots) = &self.0 {
            slots.counts().in_flight -= 1;
        }
    }
}

impl InFlightSlot {
    /// A slot of a scope without a limit.
    pub fn unlimited() -> Self {
        Self(None)
    }

    /// One of the `max` slots that this gateway counts by itself; None when all
    /// are in use.
    pub fn acquire(slots: &Arc<ScopeSlots>, max: u32) -> Option<Self> {
        let acquired = slots.counts().acquire(max);
        acquired.then(|| Self(Some(slots.clone())))
    }
}

/// Counts a call that waits for a slot, until it is dropped.
struct SlotWaiter<'s>(&'s ScopeSlots);

impl<'s> SlotWaiter<'s> {
    fn begin(slots: &'s ScopeSlots) -> Self {
        slots.counts().waiting += 1;
        Self(slots)
    }
}

impl Drop for SlotWaiter<'_> {
    fn drop(&mut self) {
        self.0.counts().waiting -= 1;
    }
}

/// Why a call gets no slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlotRefusal {
    /// All slots are in use.
    LimitReached,
    /// Too many calls wait for their request to a Redis that responds.
    Overloaded,
}

/// The in-flight slots that several gateways share through Redis.
#[derive(Debug)]
pub struct SharedSlots {
    redis: Arc<Redis>,
    script: Script,
    /// The scopes whose leases are renewed.
    tracked: Mutex<Vec<Arc<ScopeSlots>>>,
    first_tracked: Notify,
}

impl SharedSlots {
    /// Holds no lease yet.
    pub fn new(redis: Arc<Redis>) -> Arc<Self> {
        Arc::new(Self {
            redis,
            script: Script::new(include_str!("slots.lua")),
            tracked: Mutex::default(),
            first_tracked: Notify::new(),
        })
    }

    /// One of the slots that all gateways share. None when Redis is lost: at
    /// once, or after 20 ms for the calls that find it out.
    pub async fn acquire(
        &self,
        slots: &Arc<ScopeSlots>,
        limit: u32,
        now: impl Fn() -> f64,
    ) -> Option<Result<InFlightSlot, SlotRefusal>> {
        let acquire = || acquire_leased(slots, limit, now());
        if !self.redis.available() {
            return None;
        }
        if let Some(outcome) = acquire() {
            return Some(outcome);
        }
        let _waiter = SlotWaiter::begin(slots);
        // Single-flight: one call sends a request, and the others use the lease
        // that it brings.
        let request = timeout(REQUEST_WAIT_MAX, slots.request_lock.lock());
        let Ok(_request) = request.await else {
            let overloaded = Err(SlotRefusal::Overloaded);
            return self.redis.available().then_some(overloaded);
        };
        for _ in 0..REQUESTS_MAX {
            if let Some(outcome) = acquire() {
                return Some(outcome);
            }
            self.request(slots, LeaseSize::Calls, &now).await?;
        }
        // Other calls took each of the leases.
        Some(acquire().unwrap_or(Err(SlotRefusal::Overloaded)))
    }

    /// One slot of this gateway's share while Redis is lost. The next renewal
    /// reports it once Redis is back.
    pub fn acquire_from_share(
        &self,
        slots: &Arc<ScopeSlots>,
        limit: u32,
        share: u32,
    ) -> Option<InFlightSlot> {
        let slot = InFlightSlot::acquire(slots, share)?;
        slots.counts().limit = limit;
        self.track(slots);
        Some(slot)
    }

    /// Requests a lease from Redis. None when Redis is lost.
    async fn request(
        &self,
        slots: &Arc<ScopeSlots>,
        size: LeaseSize,
        now: impl Fn() -> f64,
    ) -> Option<()> {
        let requested_at = now();
        let (in_flight, max, limit) = {
            let mut counts = slots.counts();
            let max = match size {
                LeaseSize::Calls => {
                    let in_use = counts.in_flight + counts.waiting.max(1);
                    in_use + in_use / 4
                }
                LeaseSize::Peak => counts.peak,
            };
            let max = max.min(counts.limit);
            // Slots that are given back are not used while Redis learns of it.
            counts.granted = counts.granted.min(max);
            counts.requested_at = requested_at;
            // Until Redis responds, it may have recorded either number.
            counts.recorded = counts.recorded.max(max).max(counts.in_flight);
            if size == LeaseSize::Peak {
                counts.peak = counts.in_flight;
            }
            (counts.in_flight, max, counts.limit)
        };
        // The call that made the request may be gone when the response comes.
        self.track(slots);
        let mut invocation = self.script.prepare_invoke();
        let holder = format!("{:032x}", slots.holder);
        invocation.key(&slots.key).arg(holder);
        invocation.arg(limit).arg(in_flight).arg(max);
        invocation.arg((LEASE_SECONDS * 1000.0) as u64);
        let granted: u32 = self.redis.run_script(&invocation).await.ok()?;
        let mut counts = slots.counts();
        (counts.granted, counts.expires) = (granted, requested_at + LEASE_SECONDS);
        counts.recorded = granted.max(in_flight);
        if size == LeaseSize::Calls && granted <= in_flight {
            counts.exhausted_until = now() + EXHAUSTED_SECONDS;
        }
        Some(())
    }

    /// Adds a scope to the leases that are renewed.
    fn track(&self, slots: &Arc<ScopeSlots>) {
        if std::mem::replace(&mut slots.counts().tracked, true) {
            return;
        }
        self.tracked().push(slots.clone());
        self.first_tracked.notify_one();
    }

    fn tracked(&self) -> MutexGuard<'_, Vec<Arc<ScopeSlots>>> {
        self.tracked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Renews the leases of slots that are in use and gives the others back,
    /// until the task is dropped. `now` is in seconds since the gateway started.
    pub fn follow(self: &Arc<Self>, now: impl Fn() -> f64 + Send + Sync + 'static) -> OwnedTask {
        let shared = self.clone();
        spawn_owned(async move {
            loop {
                if shared.tracked().is_empty() {
                    shared.first_tracked.notified().await;
                }
                tokio::time::sleep(RENEW_INTERVAL).await;
                // Calls may add further scopes meanwhile.
                let leases = std::mem::take(&mut *shared.tracked());
                let leases = futures::stream::iter(leases);
                leases
                    .for_each_concurrent(RENEW_CONCURRENCY, |slots| shared.renew(slots, &now))
                    .await;
            }
        })
    }

    /// Renews the lease of one scope if that is due.
    async fn renew(&self, slots: Arc<ScopeSlots>, now: impl Fn() -> f64) {
        let renewal = slots.counts().renewal(now());
        match renewal {
            Renewal::Stop => return,
            Renewal::Skip => {}
            Renewal::Report => {
                let _request = slots.request_lock.lock().await;
                // Without a response the next renewal retries.
                let _ = self.request(&slots, LeaseSize::Peak, &now).await;
            }
        }
        self.tracked().push(slots);
    }
}

/// How many slots a request to Redis is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum LeaseSize {
    /// The calls in flight and those that wait, and a quarter more.
    Calls,
    /// The most calls in flight since the last renewal.
    Peak,
}

/// Takes one of the leased slots. None when Redis has to be queried.
fn acquire_leased(
    slots: &Arc<ScopeSlots>,
    limit: u32,
    now: f64,
) -> Option<Result<InFlightSlot, SlotRefusal>> {
    let mut counts = slots.counts();
    counts.limit = limit;
    let leased = if now < counts.expires {
        counts.granted.min(limit)
    } else {
        0
    };
    if counts.acquire(leased) {
        return Some(Ok(InFlightSlot(Some(slots.clone()))));
    }
    let reached = counts.in_flight >= limit || now < counts.exhausted_until;
    reached.then_some(Err(SlotRefusal::LimitReached))
}
