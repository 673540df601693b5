//! The weights of a model, taken one by one by name and expected shape.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{DType, Device, Tensor};
use serde::Deserialize;

use super::folder::{Folder, refuse_pickle};
use super::safetensors::Checkpoint;
use crate::EngineError;
use crate::kernels::{Instructions, Precision};

const SHARDS_MAX: usize = 1_024;
const WHOLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Where weights go and in which number format.
#[derive(Clone)]
pub(crate) enum Placement {
    /// To the processor's kernels.
    Processor(Way),
    /// To a device of candle's.
    Device { device: Device, dtype: DType },
}

/// How the kernels work.
#[derive(Clone, Copy)]
pub(crate) struct Way {
    pub(crate) instructions: Instructions,
    pub(crate) precision: Precision,
}

/// The opened checkpoint of a model.
pub(crate) struct Weights {
    checkpoints: Vec<Checkpoint>,
    placement: Placement,
    /// What the checkpoint puts before the names of the family's backbone, for example `bert.`.
    prefix: &'static str,
    /// Bytes on the device so far.
    pub(crate) bytes: u64,
}

#[derive(Deserialize)]
struct ShardIndex {
    weight_map: BTreeMap<String, String>,
}

impl Weights {
    /// Opens `model.safetensors`, or the shards that its index names.
    pub(crate) fn open(folder: &Folder, placement: Placement) -> Result<Self, EngineError> {
        let names = if folder.has(WHOLE) {
            vec![WHOLE.to_owned()]
        } else if folder.has(INDEX) {
            shard_names(folder)?
        } else {
            return Err(no_weights(folder));
        };
        Self::open_files(folder, &names, placement)
    }

    /// Opens one safetensors file beside the model's own, for example of a dense module.
    pub(crate) fn open_file(
        folder: &Folder,
        name: &str,
        placement: Placement,
    ) -> Result<Self, EngineError> {
        Self::open_files(folder, &[name.to_owned()], placement)
    }

    fn open_files(
        folder: &Folder,
        names: &[String],
        placement: Placement,
    ) -> Result<Self, EngineError> {
        let checkpoints = names
            .iter()
            .map(|name| Checkpoint::open(folder, name))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            checkpoints,
            placement,
            prefix: "",
            bytes: 0,
        })
    }

    /// Finds which prefix the backbone's names have, by a name that every checkpoint of the
    /// family must have.
    pub(crate) fn find_prefix(&mut self, prefixes: &[&'static str], probe: &str) {
        self.prefix = prefixes
            .iter()
            .copied()
            .find(|prefix| self.has(&format!("{prefix}{probe}")))
            .unwrap_or_default();
    }

    /// The full name of a backbone's tensor in this checkpoint.
    pub(crate) fn backbone(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.checkpoints
            .iter()
            .any(|checkpoint| checkpoint.entries.contains_key(name))
    }

    pub(crate) fn placement(&self) -> &Placement {
        &self.placement
    }

    /// The values of a tensor by its full name, before they go to the device.
    pub(crate) fn values(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, EngineError> {
        for checkpoint in &self.checkpoints {
            let Some(entry) = checkpoint.entries.get(name) else {
                continue;
            };
            if entry.shape != shape {
                return Err(EngineError::unusable(
                    &checkpoint.name,
                    format!(
                        "tensor {name} has the shape {:?}: the configuration needs {shape:?}",
                        entry.shape
                    ),
                ));
            }
            return checkpoint.values(name, entry);
        }
        let file = self.checkpoints.first().map_or(WHOLE, |file| &file.name);
        Err(EngineError::unusable(
            file,
            format!("tensor {name} is missing"),
        ))
    }

    /// Puts values on the device in the model's number format.
    pub(crate) fn place(
        &mut self,
        values: Vec<f32>,
        shape: &[usize],
    ) -> Result<Tensor, EngineError> {
        let Placement::Device { device, dtype } = &self.placement else {
            return Err(EngineError::apart());
        };
        let tensor = Tensor::from_vec(values, shape, device)?.to_dtype(*dtype)?;
        self.bytes += (tensor.elem_count() * dtype.size_in_bytes()) as u64;
        Ok(tensor)
    }
}

fn shard_names(folder: &Folder) -> Result<Vec<String>, EngineError> {
    let index: ShardIndex = folder.json(INDEX)?;
    let names: BTreeSet<String> = index.weight_map.into_values().collect();
    if names.is_empty() || names.len() > SHARDS_MAX {
        return Err(EngineError::unusable(
            INDEX,
            format!(
                "it names {} files: 1 to {SHARDS_MAX} are allowed",
                names.len()
            ),
        ));
    }
    for name in &names {
        // A shard's name is a file's name in the same folder and nothing cleverer.
        let plain = name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
        if !plain || name.starts_with('.') || !name.ends_with(".safetensors") {
            return Err(EngineError::unusable(
                INDEX,
                "it names a file that is no plain *.safetensors name",
            ));
        }
    }
    Ok(names.into_iter().collect())
}

/// Why there are no weights: a pickle is there in their stead, or nothing is.
fn no_weights(folder: &Folder) -> EngineError {
    for name in folder.names() {
        let Ok((file, _)) = folder.file(&name, u64::MAX) else {
            continue;
        };
        let mut head = [0; 16];
        let read = std::os::unix::fs::FileExt::read_at(&file, &mut head, 0).unwrap_or(0);
        if let Err(pickle) = refuse_pickle(&name, &head[..read]) {
            return pickle;
        }
    }
    EngineError::unusable(
        WHOLE,
        "the model folder holds no safetensors weights: convert the model to safetensors",
    )
}
