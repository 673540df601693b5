//! The elements of tensors: read from raw bytes, and encoded from values of
//! JSON or `.npy` files.

use std::borrow::Cow;
use std::fmt;

use anyhow::{Context, bail};
use half::{bf16, f16};
use tensor::{Datatype, Tensor, encode_bytes_elements};

/// One element.
#[derive(Debug, Clone, PartialEq)]
pub enum Element<'a> {
    /// A BOOL.
    Bool(bool),
    /// A signed integer.
    Signed(i64),
    /// An unsigned integer.
    Unsigned(u64),
    /// A number of 32 bits or fewer.
    Float32(f32),
    /// A number of 64 bits.
    Float64(f64),
    /// An element of BYTES, as text.
    Text(Cow<'a, str>),
}

impl Element<'_> {
    /// The element as a number; none for booleans and texts.
    pub fn number(&self) -> Option<f64> {
        match self {
            Self::Signed(value) => Some(*value as f64),
            Self::Unsigned(value) => Some(*value as f64),
            Self::Float32(value) => Some(f64::from(*value)),
            Self::Float64(value) => Some(*value),
            Self::Bool(_) | Self::Text(_) => None,
        }
    }

    fn integer<T: TryFrom<i128>>(&self) -> Option<T> {
        let integer: i128 = match self {
            Self::Signed(value) => (*value).into(),
            Self::Unsigned(value) => (*value).into(),
            _ => return None,
        };
        T::try_from(integer).ok()
    }

    fn boolean(&self) -> Option<bool> {
        match self {
            Self::Bool(value) => Some(*value),
            _ => self
                .integer::<u8>()
                .filter(|&value| value < 2)
                .map(|value| value == 1),
        }
    }
}

/// For error messages, so that a text is not repeated.
impl fmt::Display for Element<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bool(value) => value.fmt(formatter),
            Self::Signed(value) => value.fmt(formatter),
            Self::Unsigned(value) => value.fmt(formatter),
            Self::Float32(value) => value.fmt(formatter),
            Self::Float64(value) => value.fmt(formatter),
            Self::Text(_) => formatter.write_str("a string"),
        }
    }
}

/// The elements of a tensor by index.
pub struct Elements<'a> {
    datatype: Datatype,
    raw: &'a [u8],
    /// The elements of a BYTES tensor, which have no fixed width.
    texts: Vec<&'a [u8]>,
}

impl<'a> Elements<'a> {
    /// The elements of this tensor.
    pub fn new(tensor: &'a Tensor) -> Self {
        Self {
            datatype: tensor.datatype(),
            raw: tensor.raw(),
            texts: tensor.to_elements().unwrap_or_default(),
        }
    }

    /// The element at an index in row-major order.
    pub fn at(&self, index: usize) -> Element<'a> {
        match self.datatype {
            Datatype::Bool => Element::Bool(self.bytes::<1>(index) == [1]),
            Datatype::Uint8 => Element::Unsigned(u8::from_le_bytes(self.bytes(index)).into()),
            Datatype::Uint16 => Element::Unsigned(u16::from_le_bytes(self.bytes(index)).into()),
            Datatype::Uint32 => Element::Unsigned(u32::from_le_bytes(self.bytes(index)).into()),
            Datatype::Uint64 => Element::Unsigned(u64::from_le_bytes(self.bytes(index))),
            Datatype::Int8 => Element::Signed(i8::from_le_bytes(self.bytes(index)).into()),
            Datatype::Int16 => Element::Signed(i16::from_le_bytes(self.bytes(index)).into()),
            Datatype::Int32 => Element::Signed(i32::from_le_bytes(self.bytes(index)).into()),
            Datatype::Int64 => Element::Signed(i64::from_le_bytes(self.bytes(index))),
            Datatype::Fp16 => Element::Float32(f16::from_le_bytes(self.bytes(index)).to_f32()),
            Datatype::Bf16 => Element::Float32(bf16::from_le_bytes(self.bytes(index)).to_f32()),
            Datatype::Fp32 => Element::Float32(f32::from_le_bytes(self.bytes(index))),
            Datatype::Fp64 => Element::Float64(f64::from_le_bytes(self.bytes(index))),
            Datatype::Bytes => {
                let text = self.texts.get(index).copied().unwrap_or_default();
                Element::Text(String::from_utf8_lossy(text))
            }
        }
    }

    /// The bytes of an element; the tensor was checked, so they are there.
    fn bytes<const N: usize>(&self, index: usize) -> [u8; N] {
        let (elements, _) = self.raw.as_chunks::<N>();
        elements.get(index).copied().unwrap_or([0; N])
    }
}

/// Encodes values as the raw bytes of a datatype. A value that the datatype
/// cannot hold is an error, except that floating-point numbers are rounded.
pub fn encode<'a>(
    datatype: Datatype,
    values: impl ExactSizeIterator<Item = Element<'a>>,
) -> anyhow::Result<Vec<u8>> {
    let float = |value: &Element| value.number();
    match datatype {
        Datatype::Bytes => encode_texts(values),
        Datatype::Bool => fixed(values, |value| Some([u8::from(value.boolean()?)])),
        Datatype::Uint8 => fixed(values, |v| Some(v.integer::<u8>()?.to_le_bytes())),
        Datatype::Uint16 => fixed(values, |v| Some(v.integer::<u16>()?.to_le_bytes())),
        Datatype::Uint32 => fixed(values, |v| Some(v.integer::<u32>()?.to_le_bytes())),
        Datatype::Uint64 => fixed(values, |v| Some(v.integer::<u64>()?.to_le_bytes())),
        Datatype::Int8 => fixed(values, |v| Some(v.integer::<i8>()?.to_le_bytes())),
        Datatype::Int16 => fixed(values, |v| Some(v.integer::<i16>()?.to_le_bytes())),
        Datatype::Int32 => fixed(values, |v| Some(v.integer::<i32>()?.to_le_bytes())),
        Datatype::Int64 => fixed(values, |v| Some(v.integer::<i64>()?.to_le_bytes())),
        Datatype::Fp16 => fixed(values, |v| Some(f16::from_f64(float(v)?).to_le_bytes())),
        Datatype::Bf16 => fixed(values, |v| Some(bf16::from_f64(float(v)?).to_le_bytes())),
        Datatype::Fp32 => fixed(values, |v| Some((float(v)? as f32).to_le_bytes())),
        Datatype::Fp64 => fixed(values, |v| Some(float(v)?.to_le_bytes())),
    }
    .with_context(|| format!("the values do not fit {datatype}"))
}

fn fixed<'a, const N: usize>(
    values: impl ExactSizeIterator<Item = Element<'a>>,
    to_bytes: impl Fn(&Element) -> Option<[u8; N]>,
) -> anyhow::Result<Vec<u8>> {
    let mut raw = Vec::with_capacity(values.len().saturating_mul(N));
    for (index, value) in values.enumerate() {
        match to_bytes(&value) {
            Some(bytes) => raw.extend_from_slice(&bytes),
            None => bail!("element {index} is {value}"),
        }
    }
    Ok(raw)
}

fn encode_texts<'a>(values: impl Iterator<Item = Element<'a>>) -> anyhow::Result<Vec<u8>> {
    let mut texts = Vec::new();
    for (index, value) in values.enumerate() {
        match value {
            Element::Text(text) => texts.push(text),
            other => bail!("element {index} is {other}, but must be a string"),
        }
    }
    let texts: Vec<&[u8]> = texts.iter().map(|text| text.as_bytes()).collect();
    Ok(encode_bytes_elements(&texts)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encode_one(datatype: Datatype, value: Element) -> anyhow::Result<Vec<u8>> {
        encode(datatype, std::iter::once(value))
    }

    #[test]
    fn values_take_the_datatype() {
        for (datatype, value, raw) in [
            (Datatype::Fp32, Element::Signed(1), &1f32.to_le_bytes()[..]),
            (Datatype::Int64, Element::Signed(1), &1i64.to_le_bytes()),
            (Datatype::Bool, Element::Signed(1), &[1]),
            (Datatype::Bool, Element::Bool(false), &[0]),
            (Datatype::Fp16, Element::Float64(0.5), &[0, 0x38]),
            (Datatype::Uint64, Element::Unsigned(u64::MAX), &[255; 8]),
            (
                Datatype::Bytes,
                Element::Text("é".into()),
                &[2, 0, 0, 0, 0xc3, 0xa9],
            ),
        ] {
            assert_eq!(encode_one(datatype, value).unwrap(), raw, "{datatype}");
        }
    }

    #[test]
    fn values_that_do_not_fit_are_refused() {
        for (datatype, value) in [
            (Datatype::Uint8, Element::Signed(256)),
            (Datatype::Int8, Element::Signed(-129)),
            (Datatype::Int64, Element::Float64(1.5)),
            (Datatype::Uint64, Element::Signed(-1)),
            (Datatype::Fp32, Element::Text("1".into())),
            (Datatype::Bool, Element::Signed(2)),
            (Datatype::Bytes, Element::Signed(2)),
        ] {
            let error = encode_one(datatype, value).unwrap_err();
            assert!(format!("{error:#}").contains("element 0"), "{error:#}");
        }
    }

    #[test]
    fn elements_are_read_in_every_datatype() {
        for (datatype, raw, element) in [
            (Datatype::Uint8, vec![255], Element::Unsigned(255)),
            (Datatype::Int8, vec![255], Element::Signed(-1)),
            (Datatype::Uint64, vec![255; 8], Element::Unsigned(u64::MAX)),
            (
                Datatype::Fp64,
                0.25f64.to_le_bytes().to_vec(),
                Element::Float64(0.25),
            ),
            (Datatype::Fp16, vec![0, 0x38], Element::Float32(0.5)),
            (Datatype::Bool, vec![1], Element::Bool(true)),
        ] {
            let shape = tensor::Shape::checked(&[1]).unwrap();
            let tensor = Tensor::from_raw(datatype, shape, raw.into()).unwrap();
            assert_eq!(Elements::new(&tensor).at(0), element, "{datatype}");
        }
    }
}
