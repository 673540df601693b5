//! The metrics of workers.

use platform::metrics::{Metrics, duration_histogram};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WorkerLabel {
    worker: String,
}

/// The metrics of all workers.
#[derive(Debug, Clone)]
pub struct UpstreamMetrics {
    durations: Family<WorkerLabel, Histogram, fn() -> Histogram>,
    ejections: Family<WorkerLabel, Counter>,
}

/// The metrics of one worker.
#[derive(Debug, Clone)]
pub struct WorkerMetrics {
    /// From sending a call to its whole response, in seconds.
    pub duration: Histogram,
    /// Ejections after repeated failures.
    pub ejections: Counter,
}

impl UpstreamMetrics {
    /// Registers the metrics.
    pub fn register(metrics: &Metrics) -> Self {
        let new = Self {
            durations: Family::new_with_constructor(duration_histogram as fn() -> Histogram),
            ejections: Family::default(),
        };
        metrics.register(|registry| {
            registry.register(
                "andon_gateway_upstream_duration_seconds",
                "From sending a call to its whole response",
                new.durations.clone(),
            );
            registry.register(
                "andon_gateway_ejections",
                "Ejections of a worker after repeated failures",
                new.ejections.clone(),
            );
        });
        new
    }

    /// The metrics of one worker.
    pub fn of(&self, worker: String) -> WorkerMetrics {
        let label = WorkerLabel { worker };
        WorkerMetrics {
            ejections: self.ejections.get_or_create_owned(&label),
            duration: self.durations.get_or_create_owned(&label),
        }
    }
}
