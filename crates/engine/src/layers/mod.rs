//! The layers that the families share. All work on packed tokens, `[tokens, width]`, with the
//! rows of a batch one behind the other; only attention and pooling know where a row begins.

mod activation;
pub mod attention;
mod batch;
mod embedding;
mod heads;
mod linear;
mod norm;
mod pooling;
mod processor;
mod transformer;

pub(crate) use activation::Activation;
pub use batch::Batch;
pub(crate) use batch::Counting;
pub(crate) use embedding::{EmbeddingNames, TokenEmbedding};
pub(crate) use heads::{ClassificationHead, HeadNames};
pub(crate) use linear::Linear;
pub(crate) use norm::Norm;
pub(crate) use pooling::Pooling;
pub(crate) use transformer::{BlockNames, Transformer};
