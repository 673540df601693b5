//! The files of a model folder: opening, reading and checking them.
//!
//! Every file is hostile until it is checked: a length, a shape or a key is compared with its
//! limit before memory is sized by it, and no code in a file is ever run.

mod config;
mod folder;
mod safetensors;
mod shard_index;
mod weights;

pub(crate) use config::{
    ConfigFile, Epsilon, Layers, Positions, SavedFor, TextTaskConfig, TokenTypes, Vocabulary,
    Width, bad_config, check_heads,
};
pub(crate) use folder::Folder;
pub use folder::{ModelFolder, Observe};
pub(crate) use weights::Weights;
