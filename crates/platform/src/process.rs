//! The state that all roles of a process share.

use std::sync::Arc;

use crate::drain::Drain;
use crate::metrics::Metrics;
use crate::pool::WorkPool;
use crate::server::ConnectionMetrics;
use crate::shards::Shards;
use crate::streams::Streams;
use crate::telemetry::TelemetryControl;
use crate::watchdog::Starvation;

/// The state that all roles of a process share. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Process {
    /// The metrics that the admin port serves.
    pub metrics: Arc<Metrics>,
    /// The connection metrics of all ports.
    pub connections: ConnectionMetrics,
    /// The log and trace settings.
    pub telemetry: TelemetryControl,
    /// The cores that the process counts on.
    pub cores: usize,
    /// The threads that connections and their calls run on.
    pub shards: Arc<Shards>,
    /// The threads for work that may take longer than a millisecond.
    pub pool: WorkPool,
    /// The streams that wait.
    pub streams: Streams,
    /// How late this process itself was lately.
    pub starvation: Starvation,
    /// The graceful shutdown.
    pub drain: Drain,
}
