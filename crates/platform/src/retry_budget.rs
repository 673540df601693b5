//! The retry budget of gRFC A6: a failure takes one token, a success gives a
//! tenth back, and nothing is retried while half of the tokens or fewer are
//! left. So retries cannot multiply the load on a service that fails.

use std::collections::HashMap;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::pot::Holder;

/// Tokens are counted in tenths.
const TOKEN: i64 = 10;
/// All callers together have the tokens of so many.
const SHARED: u32 = 4;
/// More callers than these have the shared budget alone.
const HOLDERS_MAX: usize = 16_384;

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

    fn is_full(&self) -> bool {
        self.tenths.load(Ordering::Relaxed) >= self.tenths_max
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

/// A retry budget for each caller, within one that they share: whose calls fail
/// leaves others their retries.
#[derive(Debug)]
pub struct RetryBudgets {
    tokens: u32,
    shared: RetryBudget,
    /// The budgets that are not full.
    own: Mutex<HashMap<Holder, RetryBudget>>,
}

impl RetryBudgets {
    /// A full budget of so many tokens for each caller.
    pub fn new(tokens: u32) -> Self {
        Self {
            tokens,
            shared: RetryBudget::new(tokens.saturating_mul(SHARED)),
            own: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Holder, RetryBudget>> {
        self.own.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a call of a caller that succeeded.
    pub fn succeeded(&self, holder: &Holder) {
        // Nobody has failed of late.
        if self.shared.is_full() {
            return;
        }
        self.shared.succeeded();
        let mut own = self.lock();
        if let Some(budget) = own.get(holder) {
            budget.succeeded();
            if budget.is_full() {
                own.remove(holder);
            }
        }
    }

    /// Counts a call of a caller that failed. True when it may be retried. A
    /// caller whose own budget is empty takes nothing of the shared one.
    pub fn failed(&self, holder: &Holder) -> bool {
        let mut own = self.lock();
        let mut may_retry = true;
        if own.len() < HOLDERS_MAX || own.contains_key(holder) {
            let budget = own.entry(holder.clone());
            may_retry = budget
                .or_insert_with(|| RetryBudget::new(self.tokens))
                .failed();
        }
        drop(own);
        may_retry && self.shared.failed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_callers_failures_leave_others_their_retries() {
        let budgets = RetryBudgets::new(10);
        let caller = |number: u8| Holder::Tenant(number.to_string().into());
        let retries = |holder: &Holder| (0..100).filter(|_| budgets.failed(holder)).count();
        assert_eq!(retries(&caller(1)), 4, "half of its tokens, as if alone");
        assert_eq!(retries(&caller(2)), 4, "the first took nothing of them");
        // All together retry as much as four callers.
        let others: usize = (3..50).map(|number| retries(&caller(number))).sum();
        assert_eq!(others, 19 - 8);
        for _ in 0..1000 {
            budgets.succeeded(&caller(1));
        }
        assert_eq!(retries(&caller(1)), 4);
        assert_eq!(
            retries(&caller(2)),
            0,
            "who did not succeed gets nothing back"
        );
        assert_eq!(retries(&caller(60)), 4);
    }

    #[test]
    fn budgets_that_are_full_are_forgotten() {
        let budgets = RetryBudgets::new(10);
        let caller = Holder::Tenant("a".into());
        assert!(budgets.failed(&caller));
        for _ in 0..10 {
            budgets.succeeded(&caller);
        }
        assert!(budgets.lock().is_empty());
    }

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
