//! What is left for sending calls again, after gRFC A6: a failure costs one
//! token, a success gives a tenth back, and nothing is sent again while half
//! of them are gone.

use std::sync::atomic::{AtomicI64, Ordering};

/// Tokens are counted in tenths.
const TOKEN: i64 = 10;

/// The tokens.
#[derive(Debug)]
pub struct Budget {
    tenths: AtomicI64,
    tenths_max: i64,
}

impl Budget {
    /// So many tokens.
    pub fn new(tokens: u32) -> Self {
        let tenths_max = i64::from(tokens) * TOKEN;
        Self {
            tenths: AtomicI64::new(tenths_max),
            tenths_max,
        }
    }

    /// Gives a tenth of a token back.
    pub fn succeeded(&self) {
        if self.tenths.load(Ordering::Relaxed) < self.tenths_max {
            self.tenths.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Takes a token for a failure; whether the call may be sent again.
    pub fn failed(&self) -> bool {
        let left = self.tenths.fetch_sub(TOKEN, Ordering::Relaxed) - TOKEN;
        if left < 0 {
            self.tenths.fetch_max(0, Ordering::Relaxed);
        }
        left > self.tenths_max / 2
    }
}
