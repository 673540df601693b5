//! A circuit breaker: a worker or an outside service that failed repeatedly is
//! ejected with exponential backoff, and then probed by one call at a time.
//!
//! A request may fail by its own fault. So the failures of one caller open the
//! circuit only while no other caller has a use for it: where several call,
//! the calls of two of them must fail with no success between.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use ahash::RandomState;
use tokio::time::Instant;

use crate::pot::Holder;

/// Consecutive failures that open the circuit.
const FAILURES_MAX: u32 = 5;
/// The first ejection; each further one in a row is twice as long.
const EJECTION: Duration = Duration::from_millis(500);
const EJECTION_MAX: Duration = Duration::from_secs(15);
/// For how long two callers count as several after their calls took turns.
const SEVERAL_FOR: Duration = Duration::from_secs(10);
/// In place of the number of a caller.
const NOBODY: u64 = 0;
const SEVERAL: u64 = u64::MAX;

/// The state of one circuit. Closed: calls go. Open: none goes until the
/// ejection ends. Half open: one probe at a time decides which it will be.
#[derive(Debug)]
pub struct CircuitBreaker {
    /// Consecutive failures.
    failures: AtomicU32,
    /// Consecutive ejections.
    ejections: AtomicU32,
    /// Microseconds after `born` at which the ejection ends; 0 while closed.
    ejected_until_us: AtomicU64,
    /// Whether a probe is in flight.
    probing: AtomicBool,
    /// The number of the last caller, or [`NOBODY`].
    caller: AtomicU64,
    /// Microseconds after `born` when a call came from another caller than the
    /// one before it; 0 if none did.
    several_us: AtomicU64,
    /// The number of the caller whose calls failed since the last success,
    /// [`NOBODY`] or [`SEVERAL`].
    failing: AtomicU64,
    hasher: RandomState,
    born: Instant,
}

impl Default for CircuitBreaker {
    fn default() -> Self {
        Self {
            failures: AtomicU32::new(0),
            ejections: AtomicU32::new(0),
            ejected_until_us: AtomicU64::new(0),
            probing: AtomicBool::new(false),
            caller: AtomicU64::new(NOBODY),
            several_us: AtomicU64::new(0),
            failing: AtomicU64::new(NOBODY),
            hasher: RandomState::new(),
            born: Instant::now(),
        }
    }
}

impl CircuitBreaker {
    /// Whether no call should go now: the ejection lasts, or a probe is in
    /// flight.
    pub fn is_ejected(&self) -> bool {
        let until_us = self.ejected_until_us.load(Ordering::Acquire);
        until_us != 0 && (self.now_us() < until_us || self.probing.load(Ordering::Acquire))
    }

    /// Whether the circuit is open or half open: no success since the ejection.
    pub fn is_open(&self) -> bool {
        self.ejected_until_us.load(Ordering::Acquire) != 0
    }

    /// Admits a call: always while closed, one probe at a time while half
    /// open. The error is how long to wait before the next try.
    pub fn admit(&self) -> Result<(), Duration> {
        let until_us = self.ejected_until_us.load(Ordering::Acquire);
        if until_us == 0 {
            return Ok(());
        }
        let left_us = until_us.saturating_sub(self.now_us());
        if left_us > 0 {
            return Err(Duration::from_micros(left_us));
        }
        let first = self
            .probing
            .compare_exchange(false, true, Ordering::AcqRel, Ordering::Acquire);
        first.map(drop).map_err(|_| EJECTION)
    }

    /// A call goes without having been admitted, since there is nothing else
    /// to call: it is a probe, if the circuit is open.
    pub fn begin_probe(&self) {
        if self.is_open() {
            self.probing.store(true, Ordering::Release);
        }
    }

    /// A call ended without a verdict: another may probe.
    pub fn abandon_probe(&self) {
        self.probing.store(false, Ordering::Release);
    }

    /// Counts a success, which closes the circuit; true when it was open.
    pub fn succeeded(&self) -> bool {
        self.forget_failures();
        if self.ejected_until_us.swap(0, Ordering::AcqRel) == 0 {
            return false;
        }
        self.ejections.store(0, Ordering::Relaxed);
        self.probing.store(false, Ordering::Release);
        true
    }

    fn forget_failures(&self) {
        self.failures.store(0, Ordering::Relaxed);
        self.failing.store(NOBODY, Ordering::Relaxed);
    }

    /// A call of a caller goes.
    pub fn called_by(&self, caller: &Holder) {
        let caller = self.number(caller);
        let last = self.caller.load(Ordering::Relaxed);
        if last == caller {
            return;
        }
        self.caller.store(caller, Ordering::Relaxed);
        if last != NOBODY {
            self.several_us.store(self.now_us(), Ordering::Relaxed);
        }
    }

    /// Counts a failure that the caller's request may have caused: as
    /// [`Self::failed`], unless there are other callers and only the calls of
    /// this one failed since the last success.
    pub fn failed_by(&self, caller: &Holder) -> Option<Duration> {
        let caller = self.number(caller);
        let failing = match self.failing.load(Ordering::Relaxed) {
            NOBODY => caller,
            failing if failing == caller => caller,
            _ => SEVERAL,
        };
        self.failing.store(failing, Ordering::Relaxed);
        if failing != SEVERAL && self.has_several_callers() {
            self.abandon_probe();
            return None;
        }
        self.failed()
    }

    fn number(&self, caller: &Holder) -> u64 {
        let number = self.hasher.hash_one(caller);
        number.clamp(NOBODY + 1, SEVERAL - 1)
    }

    fn has_several_callers(&self) -> bool {
        let several_us = self.several_us.load(Ordering::Relaxed);
        let age_us = self.now_us().saturating_sub(several_us);
        several_us != 0 && Duration::from_micros(age_us) < SEVERAL_FOR
    }

    /// Counts a failure. The circuit opens after several, or when a probe
    /// failed; then the result is the length of the ejection.
    pub fn failed(&self) -> Option<Duration> {
        let probed = self.probing.swap(false, Ordering::AcqRel);
        // Calls that were in flight when the circuit opened prove nothing new.
        if !probed && self.is_open() {
            return None;
        }
        let failures = self.failures.fetch_add(1, Ordering::Relaxed) + 1;
        if failures < FAILURES_MAX && !probed {
            return None;
        }
        let times = self.ejections.fetch_add(1, Ordering::Relaxed).min(10);
        let ejection = EJECTION.saturating_mul(1 << times).min(EJECTION_MAX);
        let ejection_us = u64::try_from(ejection.as_micros()).unwrap_or(u64::MAX);
        self.forget_failures();
        let until_us = self.now_us().saturating_add(ejection_us);
        self.ejected_until_us.store(until_us, Ordering::Release);
        Some(ejection)
    }

    /// Closes the circuit without a call, because the connection is new. The
    /// count of ejections stays: the next one is longer.
    pub fn reset(&self) {
        self.forget_failures();
        self.ejected_until_us.store(0, Ordering::Release);
        self.probing.store(false, Ordering::Release);
    }

    fn now_us(&self) -> u64 {
        u64::try_from(self.born.elapsed().as_micros()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caller(name: &str) -> Holder {
        Holder::Tenant(name.into())
    }

    /// Failures of calls of one caller.
    fn fail(breaker: &CircuitBreaker, name: &str, calls: u32) {
        for _ in 0..calls {
            breaker.called_by(&caller(name));
            breaker.failed_by(&caller(name));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn one_caller_of_several_opens_no_circuit() {
        let breaker = CircuitBreaker::default();
        tokio::time::advance(Duration::from_secs(1)).await;
        breaker.called_by(&caller("honest"));
        breaker.succeeded();
        fail(&breaker, "poisonous", 100);
        assert!(!breaker.is_open());
        // Nor is the circuit closed by what shows nothing.
        fail(&breaker, "honest", 1);
        fail(&breaker, "poisonous", FAILURES_MAX - 2);
        assert!(!breaker.is_open());
        fail(&breaker, "poisonous", 1);
        assert!(breaker.is_open(), "the calls of two callers fail");
    }

    #[tokio::test(start_paused = true)]
    async fn a_caller_that_is_alone_opens_the_circuit() {
        let breaker = CircuitBreaker::default();
        tokio::time::advance(Duration::from_secs(1)).await;
        fail(&breaker, "first", FAILURES_MAX);
        assert!(breaker.is_open(), "nobody else called");
        breaker.succeeded();
        breaker.called_by(&caller("second"));
        fail(&breaker, "first", 100);
        assert!(!breaker.is_open());
        tokio::time::advance(SEVERAL_FOR).await;
        fail(&breaker, "first", FAILURES_MAX);
        assert!(breaker.is_open(), "the other called long ago");
    }

    #[test]
    fn one_call_probes_what_was_ejected() {
        let mut breaker = CircuitBreaker::default();
        for _ in 1..FAILURES_MAX {
            assert_eq!(breaker.failed(), None);
            assert!(breaker.admit().is_ok());
        }
        assert_eq!(breaker.failed(), Some(EJECTION));
        assert!(breaker.admit().is_err());
        breaker.born -= EJECTION;
        assert!(breaker.admit().is_ok(), "one may probe");
        assert!(breaker.admit().is_err(), "but only one");
        assert_eq!(breaker.failed(), Some(EJECTION * 2));
        breaker.born -= EJECTION * 2;
        assert!(breaker.admit().is_ok());
        assert!(breaker.succeeded());
        assert!(breaker.admit().is_ok() && breaker.admit().is_ok());
        assert!(!breaker.succeeded());
    }

    #[test]
    fn calls_in_flight_do_not_lengthen_an_ejection() {
        let mut breaker = CircuitBreaker::default();
        let failed = |breaker: &CircuitBreaker| breaker.failed();
        assert_eq!((1..FAILURES_MAX).find_map(|_| failed(&breaker)), None);
        assert_eq!(failed(&breaker), Some(EJECTION));
        for _ in 0..100 {
            assert_eq!(failed(&breaker), None);
        }
        breaker.born -= EJECTION;
        assert!(
            breaker.admit().is_ok(),
            "it is probed after the first ejection"
        );
    }
}
