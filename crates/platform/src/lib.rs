//! What every role is built on: configuration, followed files, telemetry, the
//! server, the channel, the circuit breaker and the retry budget, the admin
//! port, health and the drain. Knows no models.

pub mod admin;
pub mod body;
pub mod channel;
pub mod circuit_breaker;
mod coalesce;
mod common;
pub mod config;
pub mod drain;
pub mod files;
pub mod grpc;
pub mod health;
pub mod memory;
pub mod metrics;
mod process;
pub mod retry_budget;
pub mod server;
pub mod shards;
pub mod tasks;
pub mod telemetry;
pub mod tls;

pub use common::CommonServices;
pub use process::Process;

/// The release of the binary.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
