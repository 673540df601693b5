//! The messages of every door, methods and tasks as types, checked names and
//! requests, and the one table of errors.

mod error;
mod field;
mod hints;
mod ids;
#[cfg(test)]
mod linear;
mod method;
mod outline;
mod peek;
mod repository;
mod request;
mod rerank;
mod settings;
mod signature;
mod statistics;
mod task;
mod text;
pub mod words;

pub use error::{Error, Fault, Kind, Violation};
pub use field::{FieldPath, Segment};
pub use ids::{ModelName, ModelVersion};
pub use method::{Method, Service};
pub use outline::{FIELDS_MAX, Outline, PARTS_MAX};
pub use peek::{Peeked, peek, renamed, with_final_response_flag};
pub use repository::{check_repository_name, load_target, unload_target};
pub use request::{
    InferRequest, Input, Parameters, Value, checked_dimensions, stream_failure, to_response,
};
pub use rerank::RerankGathering;
pub use settings::{LogSettings, TraceSettings};
pub use signature::{IDS_INPUT, LENGTHS_INPUT, Signature, check_text_bytes, is_optional_input};
pub use statistics::add_statistics;
pub use task::{Task, UnknownTask};
pub use text::{
    COMPUTE_TYPE_KEY, PROMPT, PROMPT_NAME, insert_compute_metadata, truncation_direction,
    unknown_prompt,
};

/// Metadata key that names the model of a `tei.v1` call.
pub const MODEL_KEY: &str = "andon-model";
/// Metadata key that names the model version of a `tei.v1` call.
pub const VERSION_KEY: &str = "andon-model-version";

/// Parameter of a model's configuration with what turns logits into scores for
/// `tei.v1` and the APIs over HTTP, where that is not `activation`.
pub const TEI_ACTIVATION: &str = "tei_activation";

/// Metadata key that says where a response came from: `hit`, `miss`, or `3/4`
/// when so many of the rows were cached.
pub const CACHE_KEY: &str = "x-andon-cache";
/// Metadata key with the digest of the model version that made a response.
pub const DIGEST_KEY: &str = "x-andon-digest";
/// Metadata key with the tokens that were computed for a response.
pub const TOKENS_KEY: &str = "x-compute-tokens";
/// Metadata key that names the model that responded in place of the first of
/// its fallback chain, and why.
pub const FALLBACK_KEY: &str = "x-andon-fallback";
/// Metadata key of a call from a gateway to a worker: a number that stands for
/// the tenant, or for the caller's address where nobody authenticates. Calls of
/// different lanes take turns in the worker's queue.
pub const LANE_KEY: &str = "x-andon-lane";
/// Metadata key of a call from a gateway to a worker: `true` when the policy lets
/// the call's priority hold among other lanes too.
pub const LANE_CROSS_KEY: &str = "x-andon-lane-cross";
/// Metadata key of a call to a worker: `true` for work that waits until no other
/// call does.
pub const LANE_DEFERRED_KEY: &str = "x-andon-lane-deferred";

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

/// The services that workers and gateways serve, by their full names.
pub const SERVICES: [&str; 6] = [
    "inference.GRPCInferenceService",
    "tei.v1.Info",
    "tei.v1.Embed",
    "tei.v1.Predict",
    "tei.v1.Rerank",
    "tei.v1.Tokenize",
];

/// The protocol extensions that every role supports.
const EXTENSIONS: [&str; 7] = [
    "model_repository",
    "model_configuration",
    "statistics",
    "binary_tensor_data",
    "parameters",
    "trace",
    "logging",
];

/// The metadata of a server of this version.
pub fn server_metadata(version: &str) -> inference::ServerMetadataResponse {
    inference::ServerMetadataResponse {
        name: "andon".to_owned(),
        version: version.to_owned(),
        extensions: EXTENSIONS.map(str::to_owned).to_vec(),
    }
}

/// The error message of the calls of shared memory.
pub const SHARED_MEMORY_UNSUPPORTED: &str = "shared memory is not supported: tensors travel in the messages, \
     since callers and workers are on different machines";

/// The error message of the calls of sparse vectors.
pub const SPARSE_UNSUPPORTED: &str =
    "sparse vectors are not supported: no model here has a sparse output";
