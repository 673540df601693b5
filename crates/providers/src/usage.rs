//! The usage of an outside service by a call, recorded as it goes: a caller may
//! cancel before there is a response, and the service charges all the same.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use platform::pot::Holder;
use serde::Deserialize;
use tokio::time::Instant;

use crate::error::ProviderError;
use crate::reported::TokenUsage;

/// The most of each that one call can be charged for: services may report
/// anything.
const AMOUNT_MAX: u64 = 1 << 40;

/// The usage of calls, in the units that services charge for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ProviderUsage {
    /// Tokens that it read.
    pub input_tokens: u64,
    /// Tokens that it wrote.
    pub output_tokens: u64,
    /// Searches of a reranker.
    pub searches: u64,
    /// Calls.
    pub requests: u64,
}

impl ProviderUsage {
    /// One call that read so many tokens.
    pub fn of_input(tokens: u64) -> Self {
        Self {
            input_tokens: tokens,
            requests: 1,
            ..Self::default()
        }
    }

    /// Both together.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            input_tokens: self.input_tokens.saturating_add(other.input_tokens),
            output_tokens: self.output_tokens.saturating_add(other.output_tokens),
            searches: self.searches.saturating_add(other.searches),
            requests: self.requests.saturating_add(other.requests),
        }
    }

    /// No more than one call can be charged for.
    #[must_use]
    pub fn bounded(self) -> Self {
        Self {
            input_tokens: self.input_tokens.min(AMOUNT_MAX),
            output_tokens: self.output_tokens.min(AMOUNT_MAX),
            searches: self.searches.min(AMOUNT_MAX),
            requests: self.requests.min(AMOUNT_MAX),
        }
    }

    /// Tokens of both kinds.
    pub fn tokens(self) -> u64 {
        self.input_tokens.saturating_add(self.output_tokens)
    }
}

impl From<TokenUsage> for ProviderUsage {
    fn from(usage: TokenUsage) -> Self {
        Self {
            output_tokens: usage.completion_tokens,
            ..Self::of_input(usage.prompt_tokens)
        }
    }
}

/// The prices of a model, in a currency that is the same in all of the file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Price {
    /// Of a million tokens that it reads.
    pub input_per_million: f64,
    /// Of a million tokens that it writes.
    pub output_per_million: f64,
    /// Of each call.
    pub per_request: f64,
    /// Of each search of a reranker.
    pub per_search: f64,
}

impl Price {
    /// The cost of a usage, in the currency of the prices.
    pub fn cost(&self, usage: ProviderUsage) -> f64 {
        let million = 1e6;
        usage.input_tokens as f64 * self.input_per_million / million
            + usage.output_tokens as f64 * self.output_per_million / million
            + usage.searches as f64 * self.per_search
            + usage.requests as f64 * self.per_request
    }

    /// Whether each is a finite number from 0.
    pub fn is_valid(&self) -> bool {
        let prices = [
            self.input_per_million,
            self.output_per_million,
            self.per_request,
            self.per_search,
        ];
        prices
            .iter()
            .all(|price| price.is_finite() && *price >= 0.0)
    }
}

/// The usage of one call of the gateway so far. It may make several calls of
/// the service, one after the other. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct UsageMeter(Arc<Mutex<Recorded>>);

#[derive(Debug, Default)]
struct Recorded {
    /// The usage that services reported.
    reported: ProviderUsage,
    /// An estimate of the call in flight.
    estimated: ProviderUsage,
}

/// The context and limits of a call.
#[derive(Debug, Clone, Copy)]
pub struct CallContext<'a> {
    /// When the caller stops waiting.
    pub deadline: Instant,
    /// Where the usage is recorded.
    pub usage: &'a UsageMeter,
    /// Whose share of the calls and bytes in flight it takes.
    pub holder: &'a Holder,
    /// Whether there are other tenants: no one has more than half of the calls.
    pub has_others: bool,
}

impl UsageMeter {
    /// The usage so far, the estimate of a call in flight included.
    pub fn total(&self) -> ProviderUsage {
        let recorded = self.lock();
        recorded.reported.plus(recorded.estimated)
    }

    /// A call is being sent that consumes about so much.
    pub(crate) fn begin(&self, estimate: ProviderUsage) {
        self.lock().estimated = estimate;
    }

    /// The call in flight has consumed about so much until now.
    pub(crate) fn correct(&self, estimate: ProviderUsage) {
        self.lock().estimated = estimate;
    }

    /// The call in flight consumed so much.
    pub(crate) fn succeeded(&self, usage: ProviderUsage) {
        let mut recorded = self.lock();
        recorded.reported = recorded.reported.plus(usage);
        recorded.estimated = ProviderUsage::default();
    }

    /// The call in flight failed: the estimate stands, if the service may
    /// charge for it.
    pub(crate) fn failed(&self, error: &ProviderError) {
        if !error.may_be_charged() {
            self.lock().estimated = ProviderUsage::default();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Recorded> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_estimate_stands_until_the_usage_is_known() {
        let calls = |requests| ProviderUsage {
            requests,
            ..ProviderUsage::default()
        };
        let meter = UsageMeter::default();
        meter.begin(calls(1));
        assert_eq!(meter.total(), calls(1));
        meter.succeeded(calls(3));
        assert_eq!(meter.total(), calls(3));
        meter.begin(calls(1));
        meter.failed(&ProviderError::Unreachable);
        assert_eq!(meter.total(), calls(3));
        meter.begin(calls(u64::MAX));
        meter.failed(&ProviderError::Timeout);
        assert_eq!(meter.total(), calls(u64::MAX));
    }
}
