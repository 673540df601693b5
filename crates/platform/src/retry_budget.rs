//! The retry budget of gRFC A6: a failure takes one token, a success gives a
//! tenth back, and nothing is retried while half of the tokens or fewer are
//! left. So retries cannot multiply the load on a service that fails.

use std::sync::atomic::{AtomicI64, Ordering};

/// Tokens are counted in tenths.
const TOKEN: i64 = 10;

/// The tokens that are left for retries.
#[derive(Debug)]
pub struct RetryBudget {
    tenths: AtomicI64,
    tenths_max: i64,
}

impl RetryBudget {
    /// A full budget of so many tokens.
    pub fn new(tokens: u32) -> Self {
        let tenths_max = i64::from(tokens) * TOKEN;
        Self {
            tenths: AtomicI64::new(tenths_max),
            tenths_max,
        }
    }

    /// Counts a call that succeeded: a tenth of a token comes back.
    pub fn succeeded(&self) {
        if self.tenths.load(Ordering::Relaxed) < self.tenths_max {
            self.tenths.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Counts a call that failed: a token is taken. True when the call may be
    /// retried.
    pub fn failed(&self) -> bool {
        let left = self.tenths.fetch_sub(TOKEN, Ordering::Relaxed) - TOKEN;
        if left < 0 {
            self.tenths.fetch_max(0, Ordering::Relaxed);
        }
        left > self.tenths_max / 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_of_the_tokens_are_for_retries_and_successes_give_them_back() {
        let budget = RetryBudget::new(10);
        let retries = (0..100).take_while(|_| budget.failed()).count();
        assert_eq!(retries, 4);
        for _ in 0..10 {
            assert!(!budget.failed());
        }
        for _ in 0..70 {
            budget.succeeded();
        }
        assert!(budget.failed(), "seven tokens, less one, are over half");
        assert!(!budget.failed());
    }
}
