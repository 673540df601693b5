//! Models of outside services. [`Catalogue`] is the providers file, read and
//! checked; a [`Provider`] is one model of it, with its HTTP client, circuit
//! breaker and retry budget. What differs between kinds of services is behind
//! the trait `Dialect`, one file for each kind. Knows neither the Open
//! Inference Protocol nor `tei.v1`: the gateway translates.

mod catalogue;
mod chat;
mod credential;
mod dialect;
mod embedding;
mod error;
mod metrics;
mod pass_through;
mod provider;
mod reported;
mod rerank;
mod settings;
mod sse;
mod usage;

pub use catalogue::{Catalogue, Chain, ProviderSettings};
pub use chat::{
    ChatChoice, ChatDelta, ChatMessage, ChatOption, ChatRequest, ChatResponse, ChatStream,
    FinishReason, Role, Tool, ToolCall, ToolCallDelta,
};
pub use embedding::{EmbeddingOptions, Embeddings};
pub use error::ProviderError;
pub use metrics::ProviderMetrics;
pub use pass_through::{PassThrough, PassThroughApi, PassedStream};
pub use provider::{MODEL_VERSION, Provider};
pub use reported::TokenUsage;
pub use settings::ModelSettings;
pub use usage::{CallContext, ProviderUsage, UsageMeter};
