//! The commands for people: they call any role over gRPC.

mod bench;
mod call;
mod connection;
mod infer;
mod models;
mod options;
pub mod print;

pub use bench::{Bench, bench};
pub use infer::{Infer, infer};
pub use models::{Models, models};
pub use options::OutputFormat;
