//! What all roles of a process share.

use std::sync::Arc;

use crate::drain::Drain;
use crate::metrics::Metrics;
use crate::server::ConnectionMetrics;
use crate::shards::Shards;
use crate::telemetry::TelemetryControl;

/// What all roles of a process share. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Process {
    /// The metrics that the admin port shows.
    pub metrics: Arc<Metrics>,
    /// The metrics of all ports.
    pub connections: ConnectionMetrics,
    /// What is logged and traced.
    pub telemetry: TelemetryControl,
    /// Where connections and their calls run.
    pub shards: Arc<Shards>,
    /// The way out.
    pub drain: Drain,
}
