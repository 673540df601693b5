//! What every role is built on: configuration, followed files, telemetry, the
//! server, the channel, the circuit breaker and the retry budget, the admin
//! port, health and the drain; what callers share, and the threads for long
//! work. Knows no models.

pub mod admin;
mod answer;
pub mod body;
mod cgroup;
pub mod channel;
pub mod circuit_breaker;
mod coalesce;
mod common;
pub mod config;
pub mod deflate;
pub mod descriptors;
pub mod drain;
pub mod files;
pub mod grpc;
pub mod health;
pub mod inflate;
mod limits;
pub mod memory;
pub mod metrics;
mod open_streams;
pub mod pace;
pub mod peer;
pub mod pool;
pub mod pot;
mod process;
pub mod retry_budget;
mod seats;
pub mod server;
pub mod shards;
pub mod streams;
pub mod tasks;
pub mod telemetry;
pub mod tls;
pub mod watchdog;

pub use common::{CommonServices, common_path};
pub use process::Process;

/// The release of the binary.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
