//! The messages of every door, names and requests that have been checked, and
//! the one table that turns errors into statuses.

mod error;
mod ids;
mod peek;
mod request;

pub use error::{Error, Kind, Violation};
pub use ids::{ModelName, ModelVersion};
pub use peek::{Peeked, peek, with_final_response_flag};
pub use request::{InferRequest, Input, Parameters, Value, to_response};

/// Metadata key that names the model of a `tei.v1` call.
pub const MODEL_KEY: &str = "andon-model";
/// Metadata key that names the model version of a `tei.v1` call.
pub const VERSION_KEY: &str = "andon-model-version";

/// The Open Inference Protocol v2 with Triton's extensions.
#[allow(
    missing_docs,
    clippy::too_many_arguments,
    clippy::doc_markdown,
    reason = "generated"
)]
pub mod inference {
    tonic::include_proto!("inference");
}

/// Typed text calls.
pub mod tei {
    /// Version 1.
    #[allow(missing_docs, clippy::doc_markdown, reason = "generated")]
    pub mod v1 {
        tonic::include_proto!("tei.v1");
    }
}

/// Andon's own services.
pub mod andon {
    /// Version 1.
    #[allow(missing_docs, clippy::doc_markdown, reason = "generated")]
    pub mod v1 {
        tonic::include_proto!("andon.v1");
    }
}

/// Every descriptor with its comments, as an encoded `FileDescriptorSet`.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// The services that a worker and a gateway answer, by their full names.
pub const SERVICES: [&str; 6] = [
    "inference.GRPCInferenceService",
    "tei.v1.Info",
    "tei.v1.Embed",
    "tei.v1.Predict",
    "tei.v1.Rerank",
    "tei.v1.Tokenize",
];
