//! The header of a safetensors file, checked before anything is believed.
//!
//! Format: <https://huggingface.co/docs/safetensors>. Eight bytes of little-endian header
//! length, the header as JSON, and the tensors' bytes without gaps.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

use serde::Deserialize;

use super::folder::{Folder, refuse_pickle};
use crate::EngineError;

const FILE_BYTES_MAX: u64 = 64 << 30;
const HEADER_BYTES_MAX: u64 = 16 << 20;
const TENSORS_MAX: usize = 65_536;
const RANK_MAX: usize = 8;

/// A number format of a safetensors file that the engine reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stored {
    F32,
    F16,
    Bf16,
    F64,
}

/// One tensor of a file: its shape and where its bytes are.
pub(super) struct Entry {
    pub(super) shape: Vec<usize>,
    /// None: a format that no weight has, for example a saved buffer of position ids.
    stored: Option<Stored>,
    begin: u64,
    end: u64,
}

/// An opened safetensors file.
pub(super) struct Checkpoint {
    pub(super) name: String,
    pub(super) entries: BTreeMap<String, Entry>,
    file: File,
    data_start: u64,
}

#[derive(Deserialize)]
struct RawEntry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

impl Checkpoint {
    /// Opens a file and checks its header: lengths, counts, products, and that the tensors fill
    /// the file's data exactly, so that no byte is claimed twice.
    pub(super) fn open(folder: &Folder, name: &str) -> Result<Self, EngineError> {
        let (file, size) = folder.file(name, FILE_BYTES_MAX)?;
        let bad = |reason: String| EngineError::unusable(name, reason);
        let mut head = [0; 16];
        let head_bytes = usize::try_from(size.min(16)).unwrap_or(16);
        read_at(&file, name, &mut head[..head_bytes], 0)?;
        refuse_pickle(name, &head[..head_bytes])?;
        let mut length = [0; 8];
        length.copy_from_slice(&head[..8]);
        let length = u64::from_le_bytes(length);
        let data_start = length.checked_add(8).filter(|start| *start <= size);
        let Some(data_start) = data_start else {
            return Err(bad("the header does not fit in the file".to_owned()));
        };
        if length > HEADER_BYTES_MAX {
            return Err(bad(format!(
                "the header has {length} bytes: at most {HEADER_BYTES_MAX} are allowed"
            )));
        }
        let mut header = vec![0; usize::try_from(length).unwrap_or(0)];
        read_at(&file, name, &mut header, 8)?;
        let raw: BTreeMap<String, serde_json::Value> = serde_json::from_slice(&header)
            .map_err(|error| bad(format!("the header is not the expected JSON: {error}")))?;
        if raw.len() > TENSORS_MAX {
            return Err(bad(format!("more than {TENSORS_MAX} tensors")));
        }
        let mut entries = BTreeMap::new();
        for (key, value) in raw {
            if key != "__metadata__" {
                let entry =
                    entry(value).map_err(|reason| bad(format!("tensor {key}: {reason}")))?;
                entries.insert(key, entry);
            }
        }
        check_coverage(&entries, size - data_start).map_err(bad)?;
        Ok(Self {
            name: name.to_owned(),
            entries,
            file,
            data_start,
        })
    }

    /// The values of a tensor as 32-bit floats. The bytes are read alone, so that a model's
    /// memory while it loads is its weights and one tensor.
    pub(super) fn values(&self, key: &str, entry: &Entry) -> Result<Vec<f32>, EngineError> {
        let bad =
            |reason: &str| EngineError::unusable(&self.name, format!("tensor {key}: {reason}"));
        let Some(stored) = entry.stored else {
            return Err(bad("its number format is no float of 16, 32 or 64 bits"));
        };
        let length = usize::try_from(entry.end - entry.begin).map_err(|_| bad("too large"))?;
        let mut bytes = Vec::new();
        bytes
            .try_reserve_exact(length)
            .map_err(|_| EngineError::OutOfMemory)?;
        bytes.resize(length, 0);
        read_at(
            &self.file,
            &self.name,
            &mut bytes,
            self.data_start + entry.begin,
        )?;
        Ok(decode(stored, &bytes))
    }
}

fn read_at(file: &File, name: &str, bytes: &mut [u8], offset: u64) -> Result<(), EngineError> {
    file.read_exact_at(bytes, offset)
        .map_err(|error| EngineError::unusable(name, format!("cannot be read: {}", error.kind())))
}

fn entry(value: serde_json::Value) -> Result<Entry, String> {
    let raw: RawEntry = serde_json::from_value(value).map_err(|error| error.to_string())?;
    let (stored, bits) = match raw.dtype.as_str() {
        "F32" => (Some(Stored::F32), 32),
        "F16" => (Some(Stored::F16), 16),
        "BF16" => (Some(Stored::Bf16), 16),
        "F64" => (Some(Stored::F64), 64),
        "I64" | "U64" => (None, 64),
        "I32" | "U32" => (None, 32),
        "I16" | "U16" => (None, 16),
        "BOOL" | "U8" | "I8" | "F8_E4M3" | "F8_E5M2" | "F8_E8M0" => (None, 8),
        other => return Err(format!("unknown number format '{other}'")),
    };
    if raw.shape.len() > RANK_MAX {
        return Err(format!("more than {RANK_MAX} dimensions"));
    }
    let bytes = raw
        .shape
        .iter()
        .try_fold(1u64, |product, size| product.checked_mul(*size))
        .and_then(|elements| elements.checked_mul(bits / 8))
        .ok_or("its element count overflows")?;
    let [begin, end] = raw.data_offsets;
    if end.checked_sub(begin) != Some(bytes) {
        return Err("its shape and its offsets disagree".to_owned());
    }
    let shape = raw.shape.into_iter().map(usize::try_from);
    Ok(Entry {
        shape: shape
            .collect::<Result<_, _>>()
            .map_err(|error| error.to_string())?,
        stored,
        begin,
        end,
    })
}

/// Checks that the tensors lie one behind the other and end where the file ends.
fn check_coverage(entries: &BTreeMap<String, Entry>, data_bytes: u64) -> Result<(), String> {
    let mut ranges: Vec<(u64, u64)> = entries
        .values()
        .map(|entry| (entry.begin, entry.end))
        .collect();
    ranges.sort_unstable();
    let mut reached = 0;
    for (begin, end) in ranges {
        if begin != reached {
            return Err("the tensors overlap, or leave a gap".to_owned());
        }
        reached = end;
    }
    if reached != data_bytes {
        return Err(format!(
            "the tensors need {reached} bytes, but the file holds {data_bytes}"
        ));
    }
    Ok(())
}

fn decode(stored: Stored, bytes: &[u8]) -> Vec<f32> {
    match stored {
        Stored::F32 => chunks(bytes, f32::from_le_bytes),
        Stored::F16 => chunks(bytes, |bits| half::f16::from_le_bytes(bits).to_f32()),
        Stored::Bf16 => chunks(bytes, |bits| half::bf16::from_le_bytes(bits).to_f32()),
        Stored::F64 => chunks(bytes, |bits| f64::from_le_bytes(bits) as f32),
    }
}

fn chunks<const BYTES: usize>(bytes: &[u8], value: impl Fn([u8; BYTES]) -> f32) -> Vec<f32> {
    let (whole, _) = bytes.as_chunks::<BYTES>();
    whole.iter().map(|bits| value(*bits)).collect()
}
