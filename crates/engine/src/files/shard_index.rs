//! `model.safetensors.index.json`: the names of the files that a large checkpoint is split into.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use super::folder::Folder;
use crate::error::EngineError;

/// The name of the index file.
pub(super) const INDEX: &str = "model.safetensors.index.json";

const SHARDS_MAX: usize = 1_024;

#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct ShardIndex {
    /// From the name of a tensor to the name of its file.
    weight_map: BTreeMap<String, String>,
}

/// The names of the shards, each a plain file name in the model folder.
pub(super) fn shard_names(folder: &Folder) -> Result<Vec<String>, EngineError> {
    let index: ShardIndex = folder.json(INDEX)?;
    let names: BTreeSet<String> = index.weight_map.into_values().collect();
    if names.is_empty() || names.len() > SHARDS_MAX {
        return Err(EngineError::invalid_file(
            INDEX,
            format!(
                "weight_map names {} files, but must name from 1 to {SHARDS_MAX}",
                names.len()
            ),
        ));
    }
    for name in &names {
        // Neither a path nor a hidden file: nothing outside the model folder can be named.
        let is_plain = name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
        if !is_plain || name.starts_with('.') || !name.ends_with(".safetensors") {
            return Err(EngineError::invalid_file(
                INDEX,
                "weight_map must name files of this folder that end in .safetensors",
            ));
        }
    }
    Ok(names.into_iter().collect())
}
