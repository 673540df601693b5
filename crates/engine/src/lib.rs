//! Models: from a folder of files to vectors and scores.
//!
//! The way of a text: [`Tokenizer::encode`] makes a row of token ids, a batch of rows goes
//! through [`Network::forward_text`] on the thread that owns the network, and the functions of
//! `post` turn raw vectors and logits into what a caller asked for. Rows are packed one behind
//! the other and never padded. On a processor the layers compute with `kernels`, on a device with
//! candle.
//!
//! Synchronous: no runtime, no network, and no file is read after [`load`] returns.

mod card;
mod error;
mod families;
pub mod kernels;
mod layers;
mod load;
mod network;
mod options;
mod post;
mod tokenizer;

pub use card::{Card, TensorSpec};
pub use error::EngineError;
pub use kernels::Instructions;
pub use load::{Model, load};
pub use network::{Network, TextRow, Wanted};
pub use options::{DeviceChoice, Dtype, Kernels, LoadOptions, Task};
pub use post::{argmax, normalize, sigmoid, softmax};
pub use tokenizer::{Text, Token, TokenRow, Tokenizer, Truncation};
