//! A safetensors file, whose header is checked before anything in it is believed.
//!
//! MatrixDtype: <https://huggingface.co/docs/safetensors>. Eight bytes of little-endian header
//! length, the header as JSON, and the bytes of the tensors without gaps.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

use serde::Deserialize;

use super::folder::{Folder, Observe, check_head};
use crate::error::EngineError;

const FILE_BYTES_MAX: u64 = 64 << 30;
const HEADER_BYTES_MAX: u64 = 16 << 20;
const TENSORS_MAX: usize = 65_536;
const RANK_MAX: usize = 8;

/// A dtype of a safetensors file that weights are read from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum StoredDtype {
    F32,
    F16,
    Bf16,
    F64,
}

/// One tensor of a file: its shape, and where its bytes are.
pub(super) struct StoredTensor {
    pub(super) shape: Vec<usize>,
    /// None for a dtype that no weight has, for example of a saved buffer of position ids.
    dtype: Option<StoredDtype>,
    begin: u64,
    end: u64,
}

/// An opened safetensors file.
pub(super) struct SafetensorsFile {
    pub(super) name: String,
    pub(super) tensors: BTreeMap<String, StoredTensor>,
    file: File,
    data_start: u64,
    observe: Option<Observe>,
}

/// The header of one tensor.
#[derive(Deserialize)]
#[serde(expecting = "an object")]
struct TensorHeader {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

impl SafetensorsFile {
    /// Opens a file and checks its header: lengths, counts, products, and that the tensors cover
    /// the data exactly, so that no byte belongs to two of them.
    pub(super) fn open(folder: &Folder, name: &str) -> Result<Self, EngineError> {
        let (file, size) = folder.file(name, FILE_BYTES_MAX)?;
        let invalid = |reason: String| EngineError::invalid_file(name, reason);
        let mut head = [0; 16];
        let head_bytes = usize::try_from(size.min(16)).unwrap_or(16);
        read_at(&file, name, &mut head[..head_bytes], 0)?;
        check_head(name, &head[..head_bytes])?;
        let mut length = [0; 8];
        length.copy_from_slice(&head[..8]);
        let length = u64::from_le_bytes(length);
        let data_start = length.checked_add(8).filter(|start| *start <= size);
        let Some(data_start) = data_start else {
            return Err(invalid(format!(
                "the header is longer than the file, which has {size} bytes"
            )));
        };
        if length > HEADER_BYTES_MAX {
            return Err(invalid(format!(
                "the header has {length} bytes, but at most {HEADER_BYTES_MAX} are allowed"
            )));
        }
        let mut header = vec![0; usize::try_from(length).unwrap_or(0)];
        read_at(&file, name, &mut header, 8)?;
        folder.observe(name, 8, &header);
        let header: BTreeMap<String, serde_json::Value> = serde_json::from_slice(&header)
            .map_err(|error| invalid(format!("the header is not valid: {error}")))?;
        if header.len() > TENSORS_MAX {
            return Err(invalid(format!(
                "the header has {} tensors, but at most {TENSORS_MAX} are allowed",
                header.len()
            )));
        }
        let mut tensors = BTreeMap::new();
        for (key, value) in header {
            if key != "__metadata__" {
                let tensor = check_tensor(value)
                    .map_err(|reason| invalid(format!("tensor {key}: {reason}")))?;
                tensors.insert(key, tensor);
            }
        }
        check_coverage(&tensors, size - data_start).map_err(invalid)?;
        Ok(Self {
            name: name.to_owned(),
            tensors,
            file,
            data_start,
            observe: folder.observer(),
        })
    }

    /// The values of a tensor as 32-bit floats. Only its own bytes are read, so that a model that
    /// loads takes the memory of its weights and of one tensor.
    pub(super) fn values(&self, key: &str, tensor: &StoredTensor) -> Result<Vec<f32>, EngineError> {
        let invalid =
            |reason: &str| EngineError::invalid_file(&self.name, format!("tensor {key}: {reason}"));
        let Some(dtype) = tensor.dtype else {
            return Err(invalid("its dtype must be F16, BF16, F32 or F64"));
        };
        let length = usize::try_from(tensor.end - tensor.begin);
        let length = length.map_err(|_| invalid("is too large for this machine"))?;
        let mut bytes = Vec::new();
        bytes
            .try_reserve_exact(length)
            .map_err(|_| EngineError::OutOfMemory)?;
        bytes.resize(length, 0);
        let offset = self.data_start + tensor.begin;
        read_at(&self.file, &self.name, &mut bytes, offset)?;
        if let Some(observe) = &self.observe {
            observe(&self.name, offset, &bytes);
        }
        Ok(decode(dtype, &bytes))
    }
}

fn read_at(file: &File, name: &str, bytes: &mut [u8], offset: u64) -> Result<(), EngineError> {
    file.read_exact_at(bytes, offset).map_err(|error| {
        EngineError::invalid_file(name, format!("cannot be read: {}", error.kind()))
    })
}

fn check_tensor(value: serde_json::Value) -> Result<StoredTensor, String> {
    let header: TensorHeader = serde_json::from_value(value).map_err(|error| error.to_string())?;
    let (dtype, bits) = match header.dtype.as_str() {
        "F32" => (Some(StoredDtype::F32), 32),
        "F16" => (Some(StoredDtype::F16), 16),
        "BF16" => (Some(StoredDtype::Bf16), 16),
        "F64" => (Some(StoredDtype::F64), 64),
        "I64" | "U64" => (None, 64),
        "I32" | "U32" => (None, 32),
        "I16" | "U16" => (None, 16),
        "BOOL" | "U8" | "I8" | "F8_E4M3" | "F8_E5M2" | "F8_E8M0" => (None, 8),
        other => return Err(format!("dtype '{other}' is not supported")),
    };
    if header.shape.len() > RANK_MAX {
        return Err(format!(
            "shape has {} dimensions, but at most {RANK_MAX} are allowed",
            header.shape.len()
        ));
    }
    let bytes = header
        .shape
        .iter()
        .try_fold(1u64, |product, size| product.checked_mul(*size))
        .and_then(|elements| elements.checked_mul(bits / 8))
        .ok_or("the number of elements of its shape overflows")?;
    let [begin, end] = header.data_offsets;
    if end.checked_sub(begin) != Some(bytes) {
        return Err(format!(
            "its shape and dtype require {bytes} bytes, but data_offsets are {begin} and {end}"
        ));
    }
    let shape = header.shape.into_iter().map(usize::try_from);
    Ok(StoredTensor {
        shape: shape
            .collect::<Result<_, _>>()
            .map_err(|error| error.to_string())?,
        dtype,
        begin,
        end,
    })
}

/// Checks that the tensors lie one behind the other and end where the file ends.
fn check_coverage(tensors: &BTreeMap<String, StoredTensor>, data_bytes: u64) -> Result<(), String> {
    let mut ranges: Vec<(u64, u64)> = tensors
        .values()
        .map(|tensor| (tensor.begin, tensor.end))
        .collect();
    ranges.sort_unstable();
    let mut covered = 0;
    for (begin, end) in ranges {
        if begin != covered {
            return Err(format!(
                "the tensors overlap or leave a gap at byte {covered} of the data"
            ));
        }
        covered = end;
    }
    if covered != data_bytes {
        return Err(format!(
            "the tensors require {covered} bytes of data, but the file has {data_bytes}"
        ));
    }
    Ok(())
}

fn decode(dtype: StoredDtype, bytes: &[u8]) -> Vec<f32> {
    match dtype {
        StoredDtype::F32 => decode_each(bytes, f32::from_le_bytes),
        StoredDtype::F16 => decode_each(bytes, |bits| half::f16::from_le_bytes(bits).to_f32()),
        StoredDtype::Bf16 => decode_each(bytes, |bits| half::bf16::from_le_bytes(bits).to_f32()),
        StoredDtype::F64 => decode_each(bytes, |bits| f64::from_le_bytes(bits) as f32),
    }
}

fn decode_each<const BYTES: usize>(bytes: &[u8], value: impl Fn([u8; BYTES]) -> f32) -> Vec<f32> {
    let (elements, _) = bytes.as_chunks::<BYTES>();
    elements.iter().map(|bits| value(*bits)).collect()
}
