//! The metrics of retries.

use platform::metrics::Metrics;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;

/// Why a call may be retried, as the label of the metric.
const REASONS: [&str; 6] = [
    "unavailable",
    "not_found",
    "late",
    "not_sent",
    "broken",
    "reset",
];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

/// The metrics of retries.
#[derive(Debug, Clone, Default)]
pub struct BalanceMetrics {
    retries: Family<ReasonLabel, Counter>,
    /// Calls that were not retried because the retry budget was empty.
    pub budget_exhausted: Counter,
    /// Calls that were refused because workers broke on them.
    pub poisonous: Counter,
}

impl BalanceMetrics {
    /// Registers the metrics.
    pub fn register(metrics: &Metrics) -> Self {
        let new = Self::default();
        for reason in REASONS {
            drop(new.retries.get_or_create(&ReasonLabel { reason }));
        }
        metrics.register(|registry| {
            registry.register(
                "andon_gateway_retries",
                "Calls retried",
                new.retries.clone(),
            );
            registry.register(
                "andon_gateway_retry_budget_exhausted",
                "Failures that were not retried because the retry budget was empty",
                new.budget_exhausted.clone(),
            );
            registry.register(
                "andon_gateway_poisonous_calls",
                "Calls that were refused because two workers broke on them",
                new.poisonous.clone(),
            );
        });
        new
    }

    /// Counts a retry.
    pub fn retried(&self, reason: &'static str) {
        self.retries.get_or_create(&ReasonLabel { reason }).inc();
    }
}
