//! How rows were found, in the metrics of the process.

use platform::metrics::Metrics;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    outcome: &'static str,
}

/// Rows by how they were found.
#[derive(Debug, Clone, Default)]
pub struct Counts {
    /// In memory.
    pub memory: Counter,
    /// In Redis.
    pub shared: Counter,
    /// In another call that was computing them, or twice in one call.
    pub coalesced: Counter,
    /// Nowhere.
    pub computed: Counter,
}

impl Counts {
    /// Registers what is counted.
    pub fn register(metrics: &Metrics) -> Self {
        let rows: Family<OutcomeLabel, Counter> = Family::default();
        let counter = |outcome| rows.get_or_create_owned(&OutcomeLabel { outcome });
        let counts = Self {
            memory: counter("hit_memory"),
            shared: counter("hit_shared"),
            coalesced: counter("coalesced"),
            computed: counter("computed"),
        };
        let help = "Rows of deterministic models by how they were found";
        metrics.register(|registry| registry.register("andon_gateway_cache_rows", help, rows));
        counts
    }
}
