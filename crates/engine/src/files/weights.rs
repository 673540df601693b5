//! The weights of a model as its safetensors files hold them, read by tensor name.

use std::os::unix::fs::FileExt;

use super::folder::{Folder, check_head};
use super::safetensors::SafetensorsFile;
use super::shard_index::{INDEX, shard_names};
use crate::error::EngineError;

/// The file of a checkpoint that is not split.
const SINGLE: &str = "model.safetensors";

/// The opened checkpoint of a model: one safetensors file, or its shards.
pub(crate) struct Weights {
    files: Vec<SafetensorsFile>,
}

impl Weights {
    /// Opens `model.safetensors`, or the shards that its index names.
    pub(crate) fn open(folder: &Folder) -> Result<Self, EngineError> {
        let names = if folder.has(SINGLE) {
            vec![SINGLE.to_owned()]
        } else if folder.has(INDEX) {
            shard_names(folder)?
        } else {
            return Err(no_weights(folder));
        };
        let files = names
            .iter()
            .map(|name| SafetensorsFile::open(folder, name))
            .collect::<Result<_, _>>()?;
        Ok(Self { files })
    }

    /// Opens one safetensors file other than the model's own, for example of a dense module.
    pub(crate) fn open_file(folder: &Folder, name: &str) -> Result<Self, EngineError> {
        let file = SafetensorsFile::open(folder, name)?;
        Ok(Self { files: vec![file] })
    }

    /// The beginning of a tensor's name, of several, that the checkpoint has, and the name of its
    /// file.
    pub(crate) fn find_prefix<'p>(&self, prefixes: &[&'p str]) -> Option<(&'p str, &str)> {
        self.files.iter().find_map(|file| {
            let found = prefixes.iter().find(|prefix| {
                let mut names = file.tensors.keys();
                names.any(|name| name.starts_with(**prefix))
            });
            found.map(|prefix| (*prefix, file.name.as_str()))
        })
    }

    /// Whether the checkpoint has a tensor of this name.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.files
            .iter()
            .any(|file| file.tensors.contains_key(name))
    }

    /// The values of a tensor, row-major, as 32-bit floats.
    ///
    /// # Errors
    /// [`EngineError::InvalidFile`] when it is missing or has another shape.
    pub(crate) fn values(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, EngineError> {
        for file in &self.files {
            let Some(tensor) = file.tensors.get(name) else {
                continue;
            };
            if tensor.shape != shape {
                return Err(EngineError::invalid_file(
                    &file.name,
                    format!(
                        "tensor {name} has shape {:?}, but the configuration requires {shape:?}",
                        tensor.shape
                    ),
                ));
            }
            return file.values(name, tensor);
        }
        let file = self.files.first().map_or(SINGLE, |file| &file.name);
        Err(EngineError::invalid_file(
            file,
            format!("tensor {name} is missing"),
        ))
    }
}

/// The error of a folder without weights; a pickle in their place is named.
fn no_weights(folder: &Folder) -> EngineError {
    for name in folder.names() {
        let Ok((file, _)) = folder.file(&name, u64::MAX) else {
            continue;
        };
        let mut head = [0; 16];
        let read = file.read_at(&mut head, 0).unwrap_or(0);
        if let Err(pickle) = check_head(&name, &head[..read]) {
            return pickle;
        }
    }
    EngineError::invalid_file(
        SINGLE,
        "the model folder has no safetensors weights: convert the model to safetensors",
    )
}
