//! The messages of every door, names and requests that have been checked, and
//! the one table that turns errors into statuses.

mod error;
mod ids;
mod method;
mod peek;
mod request;
mod settings;
mod statistics;
mod task;

pub use error::{Error, Kind, Violation};
pub use ids::{ModelName, ModelVersion};
pub use method::{Method, Service};
pub use peek::{Peeked, peek, peek_count, peek_rows, renamed, with_final_response_flag};
pub use request::{
    InferRequest, Input, Parameters, Value, data_type, load_target, to_response, unload_target,
};
pub use settings::{LogSettings, TraceSettings};
pub use statistics::add_statistics;
pub use task::{ReportedTask, Task, UnknownTask};

/// Metadata key that names the model of a `tei.v1` call.
pub const MODEL_KEY: &str = "andon-model";
/// Metadata key that names the model version of a `tei.v1` call.
pub const VERSION_KEY: &str = "andon-model-version";

/// Metadata key that says where an answer came from: `hit`, `miss`, or `3/4`
/// when so many of the rows were known.
pub const CACHE_KEY: &str = "x-andon-cache";
/// Metadata key with the digest of the model version that made an answer.
pub const DIGEST_KEY: &str = "x-andon-digest";
/// Metadata key with the tokens that an answer took to compute.
pub const TOKENS_KEY: &str = "x-compute-tokens";
/// Metadata key that names the model that answered in place of the first of
/// its chain, and why.
pub const FALLBACK_KEY: &str = "x-andon-fallback";

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

/// The extensions of the protocol that every role offers.
pub const EXTENSIONS: [&str; 7] = [
    "model_repository",
    "model_configuration",
    "statistics",
    "binary_tensor_data",
    "parameters",
    "trace",
    "logging",
];

/// What the calls of shared memory answer.
pub const SHARED_MEMORY_UNSUPPORTED: &str = "shared memory is not supported: tensors travel in the messages, \
     since callers and workers are on different machines";

/// What the calls of sparse vectors answer.
pub const SPARSE_UNSUPPORTED: &str =
    "sparse vectors are not supported: no model here has a sparse output";
