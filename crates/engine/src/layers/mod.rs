//! The layers that the families share. All work on packed tokens, `[tokens, width]`, with the
//! rows of a batch one behind the other; only attention and pooling know where a row begins.
//!
//! Each layer has its weights in one of two places and works there: on the processor by the
//! kernels, on a device by candle.

mod activation;
mod attention;
mod batch;
mod embedding;
mod heads;
mod linear;
mod norm;
mod pooling;
mod rotary;
mod states;
mod transformer;

pub(crate) use activation::Activation;
pub(crate) use attention::Attention;
pub(crate) use batch::{Batch, Counting};
pub(crate) use embedding::{EmbeddingNames, TokenEmbedding};
pub(crate) use heads::{ClassificationHead, HeadNames};
pub(crate) use linear::{Linear, inner_format};
pub(crate) use norm::Norm;
pub(crate) use pooling::Pooling;
pub(crate) use rotary::Rotary;
pub(crate) use states::States;
pub(crate) use transformer::{BlockNames, Transformer};
