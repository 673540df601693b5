//! Whether something that failed repeatedly is left alone, and for how long:
//! a worker, or an outside service.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

/// Failures in a row after which it is left alone.
const FAILURES_MAX: u32 = 5;
/// How long it is left alone the first time; twice as long each time again.
const EJECTION: Duration = Duration::from_millis(500);
const EJECTION_MAX: Duration = Duration::from_secs(15);

/// What is remembered of failures.
#[derive(Debug)]
pub struct Ejection {
    failures: AtomicU32,
    ejections: AtomicU32,
    /// Microseconds after `born` until which it is left alone.
    until_us: AtomicU64,
    probing: AtomicBool,
    born: Instant,
}

impl Default for Ejection {
    fn default() -> Self {
        Self {
            failures: AtomicU32::new(0),
            ejections: AtomicU32::new(0),
            until_us: AtomicU64::new(0),
            probing: AtomicBool::new(false),
            born: Instant::now(),
        }
    }
}

impl Ejection {
    /// Whether it is left alone because it failed. When its time is over, one
    /// call at a time may try it.
    pub fn ejected(&self) -> bool {
        let until_us = self.until_us.load(Ordering::Acquire);
        until_us != 0 && (self.now_us() < until_us || self.probing.load(Ordering::Acquire))
    }

    /// Whether it is being left alone, without trying it.
    pub fn out(&self) -> bool {
        self.until_us.load(Ordering::Acquire) != 0
    }

    /// A call may go: always when all is well, one at a time when it is being
    /// tried again; else when to come back.
    pub fn admit(&self) -> Result<(), Duration> {
        let until_us = self.until_us.load(Ordering::Acquire);
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

    /// A call goes although it is left alone: it tries whether all is well.
    pub fn probe(&self) {
        if self.out() {
            self.probing.store(true, Ordering::Release);
        }
    }

    /// A call that tried it ended without telling anything.
    pub fn unprobed(&self) {
        self.probing.store(false, Ordering::Release);
    }

    /// It answered; true when it had been left alone.
    pub fn succeeded(&self) -> bool {
        self.failures.store(0, Ordering::Relaxed);
        if self.until_us.swap(0, Ordering::AcqRel) == 0 {
            return false;
        }
        self.ejections.store(0, Ordering::Relaxed);
        self.probing.store(false, Ordering::Release);
        true
    }

    /// It failed: after several times, or when it was being tried, it is left
    /// alone for so long.
    pub fn failed(&self) -> Option<Duration> {
        let probed = self.probing.swap(false, Ordering::AcqRel);
        // Calls that were under way when it was left alone say nothing new.
        if !probed && self.out() {
            return None;
        }
        let failures = self.failures.fetch_add(1, Ordering::Relaxed) + 1;
        if failures < FAILURES_MAX && !probed {
            return None;
        }
        let times = self.ejections.fetch_add(1, Ordering::Relaxed).min(10);
        let rest = EJECTION.saturating_mul(1 << times).min(EJECTION_MAX);
        let rest_us = u64::try_from(rest.as_micros()).unwrap_or(u64::MAX);
        self.failures.store(0, Ordering::Relaxed);
        let until_us = self.now_us().saturating_add(rest_us);
        self.until_us.store(until_us, Ordering::Release);
        Some(rest)
    }

    /// Forgets that it was left alone.
    pub fn returned(&self) {
        self.failures.store(0, Ordering::Relaxed);
        self.until_us.store(0, Ordering::Release);
        self.probing.store(false, Ordering::Release);
    }

    fn now_us(&self) -> u64 {
        u64::try_from(self.born.elapsed().as_micros()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_call_tries_what_was_left_alone() {
        let mut ejection = Ejection::default();
        for _ in 1..FAILURES_MAX {
            assert_eq!(ejection.failed(), None);
            assert!(ejection.admit().is_ok());
        }
        assert_eq!(ejection.failed(), Some(EJECTION));
        assert!(ejection.admit().is_err());
        ejection.born -= EJECTION;
        assert!(ejection.admit().is_ok(), "one may try");
        assert!(ejection.admit().is_err(), "but only one");
        assert_eq!(ejection.failed(), Some(EJECTION * 2));
        ejection.born -= EJECTION * 2;
        assert!(ejection.admit().is_ok());
        assert!(ejection.succeeded());
        assert!(ejection.admit().is_ok() && ejection.admit().is_ok());
        assert!(!ejection.succeeded());
    }

    #[test]
    fn calls_under_way_do_not_make_it_worse() {
        let mut ejection = Ejection::default();
        let failed = |ejection: &Ejection| ejection.failed();
        assert_eq!((1..FAILURES_MAX).find_map(|_| failed(&ejection)), None);
        assert_eq!(failed(&ejection), Some(EJECTION));
        for _ in 0..100 {
            assert_eq!(failed(&ejection), None);
        }
        ejection.born -= EJECTION;
        assert!(ejection.admit().is_ok(), "it is tried after the first time");
    }
}
