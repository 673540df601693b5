//! The layers that the families share. All work on packed tokens, `[tokens, width]`, with the
//! rows of a batch one behind the other; only attention and pooling know where a row begins.
//!
//! The weights of each layer are in one of two places, and it computes there: on the CPU with the
//! kernels, on a device with candle.

mod activation;
mod attention;
mod batch;
mod classification_head;
mod embedding;
mod encoder;
mod hidden_states;
mod linear;
mod norm;
mod placement;
mod pooling;
mod rotary;
mod transformer;
mod weight_loader;

pub(crate) use activation::Activation;
pub(crate) use attention::SelfAttention;
pub(crate) use batch::{Batch, PackedRow, PositionScheme};
pub(crate) use classification_head::{ClassificationHead, HeadConfig};
pub(crate) use embedding::{EmbeddingNames, TokenEmbedding};
pub(crate) use encoder::{Encoder, EncoderConfig, ForwardPass};
pub(crate) use hidden_states::HiddenStates;
pub(crate) use linear::{Linear, inner_dtype};
pub(crate) use norm::LayerNorm;
pub(crate) use placement::Placement;
pub(crate) use pooling::Pooling;
pub(crate) use rotary::{RotaryConfig, RotaryEmbedding};
pub(crate) use transformer::{BlockNames, Transformer};
pub(crate) use weight_loader::WeightLoader;
