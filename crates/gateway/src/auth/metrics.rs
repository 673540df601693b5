//! The metrics of authentication.

use platform::metrics::Metrics;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

/// The metrics of authentication.
#[derive(Debug, Clone, Default)]
pub struct AuthMetrics {
    refused: Family<ReasonLabel, Counter>,
}

impl AuthMetrics {
    /// Registers the metrics.
    pub fn register(&self, metrics: &Metrics) {
        metrics.register(|registry| {
            registry.register(
                "andon_gateway_auth_refused",
                "Calls refused by authentication",
                self.refused.clone(),
            );
        });
    }

    /// Counts a call that is refused.
    pub fn refused(&self, reason: &'static str) {
        self.refused.get_or_create(&ReasonLabel { reason }).inc();
    }
}
