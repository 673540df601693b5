//! Models: from a folder of files to embeddings and scores.
//!
//! The path of a text: [`Tokenizer::encode`] tokenizes it to a row of token ids, a batch of rows
//! goes through [`EncoderModel::forward`] on the thread that owns the model, and
//! [`normalize`], [`softmax`] and [`sigmoid`] turn raw embeddings and logits into what the caller
//! requested. Rows are packed one behind the other and never padded. On the CPU the layers
//! compute with the `kernels`, on a device with candle.
//!
//! The floors, from the ground: `files` reads and checks the files of a model folder, `kernels`
//! compute on the CPU, `layers` are made of weights, `families` are made of layers, `load` knows
//! all families. A module imports from lower floors alone.
//!
//! Synchronous: no runtime, no network, and no file is read after [`load`] returns.

mod card;
mod description;
mod encoder;
mod error;
mod families;
mod files;
pub mod kernels;
mod layers;
mod load;
mod model;
mod options;
mod post;
mod tokenizer;

pub use card::Card;
pub use description::{Description, Setting};
pub use encoder::{EncoderModel, TextOutput, TextRow};
pub use error::EngineError;
pub use families::tabular::TabularModel;
pub use files::{ModelFolder, Observe};
pub use kernels::InstructionSet;
pub use load::{describe, load, load_from};
pub use model::Model;
pub use options::{DeviceChoice, Dtype, Kernels, LoadOptions, Overrides, PoolingMode, Task};
pub use post::{ScoreActivation, argmax, normalize, sigmoid, softmax};
pub use tokenizer::{Side, Text, Token, TokenRow, Tokenizer, Truncation};
