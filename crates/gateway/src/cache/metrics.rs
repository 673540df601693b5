//! The metrics of lookups: hits, misses and coalesced rows.

use platform::metrics::Metrics;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    outcome: &'static str,
}

/// Counters of rows by the outcome of their lookup.
#[derive(Debug, Clone, Default)]
pub struct CacheMetrics {
    /// Hits in memory.
    pub memory: Counter,
    /// Hits in Redis.
    pub shared: Counter,
    /// Rows that another call was computing (single-flight), or that a request
    /// has twice.
    pub coalesced: Counter,
    /// Misses.
    pub computed: Counter,
}

impl CacheMetrics {
    /// Registers the counters.
    pub fn register(metrics: &Metrics) -> Self {
        let rows: Family<OutcomeLabel, Counter> = Family::default();
        let counter = |outcome| rows.get_or_create_owned(&OutcomeLabel { outcome });
        let counters = Self {
            memory: counter("hit_memory"),
            shared: counter("hit_shared"),
            coalesced: counter("coalesced"),
            computed: counter("computed"),
        };
        let help = "Rows of deterministic models by the outcome of their cache lookup";
        metrics.register(|registry| registry.register("andon_gateway_cache_rows", help, rows));
        counters
    }
}
