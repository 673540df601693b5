//! The metrics of discovery.

use platform::metrics::Metrics;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

/// The metrics of discovery.
#[derive(Debug, Clone)]
pub struct DiscoverMetrics {
    /// DNS names that did not resolve.
    pub resolve: Counter,
    /// Workers that could not be connected to.
    pub connect: Counter,
}

impl DiscoverMetrics {
    /// Registers the metrics; their series begin at zero.
    pub fn register(metrics: &Metrics) -> Self {
        let errors = Family::<ReasonLabel, Counter>::default();
        let of = |reason| errors.get_or_create_owned(&ReasonLabel { reason });
        let new = Self {
            resolve: of("resolve"),
            connect: of("connect"),
        };
        metrics.register(|registry| {
            registry.register(
                "andon_discovery_errors",
                "Attempts to resolve a DNS name of workers, or to connect to a worker, that failed",
                errors,
            );
        });
        new
    }
}
