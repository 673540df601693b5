//! Raw BYTES elements, and typed contents to raw bytes.

use crate::{Datatype, ElementError, Shape, TensorError};

/// Typed contents as the protocol carries them: at most one list is filled.
#[derive(Debug, Default, Clone, PartialEq)]
#[allow(missing_docs, reason = "the names are the protocol's")]
pub struct TypedContents {
    pub bool_contents: Vec<bool>,
    pub int_contents: Vec<i32>,
    pub int64_contents: Vec<i64>,
    pub uint_contents: Vec<u32>,
    pub uint64_contents: Vec<u64>,
    pub fp32_contents: Vec<f32>,
    pub fp64_contents: Vec<f64>,
    pub bytes_contents: Vec<bytes::Bytes>,
}

impl TypedContents {
    /// The lists that are not empty, by their protocol names.
    fn filled(&self) -> impl Iterator<Item = &'static str> {
        [
            ("bool_contents", self.bool_contents.len()),
            ("int_contents", self.int_contents.len()),
            ("int64_contents", self.int64_contents.len()),
            ("uint_contents", self.uint_contents.len()),
            ("uint64_contents", self.uint64_contents.len()),
            ("fp32_contents", self.fp32_contents.len()),
            ("fp64_contents", self.fp64_contents.len()),
            ("bytes_contents", self.bytes_contents.len()),
        ]
        .into_iter()
        .filter_map(|(name, length)| (length > 0).then_some(name))
    }
}

/// The list that holds a datatype's contents.
fn typed_field(datatype: Datatype) -> Option<&'static str> {
    Some(match datatype {
        Datatype::Bool => "bool_contents",
        Datatype::Int8 | Datatype::Int16 | Datatype::Int32 => "int_contents",
        Datatype::Int64 => "int64_contents",
        Datatype::Uint8 | Datatype::Uint16 | Datatype::Uint32 => "uint_contents",
        Datatype::Uint64 => "uint64_contents",
        Datatype::Fp32 => "fp32_contents",
        Datatype::Fp64 => "fp64_contents",
        Datatype::Bytes => "bytes_contents",
        Datatype::Fp16 | Datatype::Bf16 => return None,
    })
}

/// Turns typed contents into the raw bytes of a tensor of this datatype and
/// shape. Refuses contents in another datatype's list, a wrong count and
/// integers that the datatype cannot hold.
pub fn encode_typed(
    datatype: Datatype,
    shape: &Shape,
    contents: &TypedContents,
) -> Result<Vec<u8>, TensorError> {
    let expected = typed_field(datatype).ok_or(TensorError::NoTypedForm(datatype))?;
    if let Some(actual) = contents.filled().find(|&name| name != expected) {
        return Err(TensorError::WrongField {
            datatype,
            expected,
            actual,
        });
    }
    let (count, raw) = match datatype {
        Datatype::Bool => (
            contents.bool_contents.len(),
            contents
                .bool_contents
                .iter()
                .map(|&value| u8::from(value))
                .collect(),
        ),
        Datatype::Int8 | Datatype::Int16 | Datatype::Int32 => (
            contents.int_contents.len(),
            narrow(datatype, contents.int_contents.iter().map(|&v| v.into()))?,
        ),
        Datatype::Uint8 | Datatype::Uint16 | Datatype::Uint32 => (
            contents.uint_contents.len(),
            narrow(datatype, contents.uint_contents.iter().map(|&v| v.into()))?,
        ),
        Datatype::Int64 => (
            contents.int64_contents.len(),
            flatten(&contents.int64_contents, |value| value.to_le_bytes()),
        ),
        Datatype::Uint64 => (
            contents.uint64_contents.len(),
            flatten(&contents.uint64_contents, |value| value.to_le_bytes()),
        ),
        Datatype::Fp32 => (
            contents.fp32_contents.len(),
            flatten(&contents.fp32_contents, |value| value.to_le_bytes()),
        ),
        Datatype::Fp64 => (
            contents.fp64_contents.len(),
            flatten(&contents.fp64_contents, |value| value.to_le_bytes()),
        ),
        Datatype::Bytes => (
            contents.bytes_contents.len(),
            encode_bytes_elements(&contents.bytes_contents)?,
        ),
        Datatype::Fp16 | Datatype::Bf16 => return Err(TensorError::NoTypedForm(datatype)),
    };
    if count != shape.elements() {
        return Err(TensorError::ElementCount {
            expected: shape.elements(),
            actual: count,
        });
    }
    Ok(raw)
}

fn flatten<T: Copy, const N: usize>(values: &[T], to_bytes: impl Fn(T) -> [u8; N]) -> Vec<u8> {
    values.iter().flat_map(|&value| to_bytes(value)).collect()
}

/// Writes 32-bit carried integers in the datatype's own width.
fn narrow(
    datatype: Datatype,
    values: impl ExactSizeIterator<Item = i64>,
) -> Result<Vec<u8>, TensorError> {
    let (min, max): (i64, i64) = match datatype {
        Datatype::Int8 => (i8::MIN.into(), i8::MAX.into()),
        Datatype::Int16 => (i16::MIN.into(), i16::MAX.into()),
        Datatype::Int32 => (i32::MIN.into(), i32::MAX.into()),
        Datatype::Uint8 => (0, u8::MAX.into()),
        Datatype::Uint16 => (0, u16::MAX.into()),
        Datatype::Uint32 => (0, u32::MAX.into()),
        _ => return Err(TensorError::NoTypedForm(datatype)),
    };
    let width = datatype.element_bytes().unwrap_or(4);
    let mut raw = Vec::with_capacity(values.len().saturating_mul(width));
    for (element, value) in values.enumerate() {
        if value < min || value > max {
            return Err(TensorError::Element {
                element,
                problem: ElementError::OutOfRange { value, datatype },
            });
        }
        // Two's complement: the low bytes are the narrow integer.
        raw.extend_from_slice(&value.to_le_bytes()[..width]);
    }
    Ok(raw)
}

/// Writes byte strings as raw BYTES. Fails when one is longer than u32 holds.
pub fn encode_bytes_elements<E: AsRef<[u8]>>(elements: &[E]) -> Result<Vec<u8>, TensorError> {
    let total: usize = elements
        .iter()
        .map(|element| element.as_ref().len().saturating_add(4))
        .sum();
    let mut raw = Vec::with_capacity(total);
    for element in elements {
        let element = element.as_ref();
        let length = u32::try_from(element.len()).map_err(|_| TensorError::ShapeOverflow)?;
        raw.extend_from_slice(&length.to_le_bytes());
        raw.extend_from_slice(element);
    }
    Ok(raw)
}

/// The elements of raw BYTES, until the first whose length does not fit the
/// bytes that are left. Allocates nothing, whatever a length claims.
pub fn bytes_elements(raw: &[u8]) -> impl Iterator<Item = Result<&[u8], TensorError>> {
    let mut rest = raw;
    let mut element = 0;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let Some((length, after)) = rest.split_first_chunk::<4>() else {
            rest = &[];
            return Some(Err(TensorError::Element {
                element,
                problem: ElementError::LengthCut,
            }));
        };
        let claimed = u32::from_le_bytes(*length) as usize;
        let Some((content, after)) = after.split_at_checked(claimed) else {
            rest = &[];
            let left = after.len();
            return Some(Err(TensorError::Element {
                element,
                problem: ElementError::Length { claimed, left },
            }));
        };
        rest = after;
        element += 1;
        Some(Ok(content))
    })
}
