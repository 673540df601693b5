use bytes::Bytes;

use crate::{Datatype, ElementError, Shape, TensorError, bytes_elements, encode_bytes_elements};

/// A tensor whose bytes agree with its datatype and shape: little-endian,
/// row-major, unpadded; an element of BYTES is a u32 length and its bytes.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    datatype: Datatype,
    shape: Shape,
    raw: Bytes,
}

impl Tensor {
    /// Checks raw bytes against a datatype and shape. Copies nothing.
    pub fn from_raw(datatype: Datatype, shape: Shape, raw: Bytes) -> Result<Self, TensorError> {
        match datatype.element_bytes() {
            Some(element_bytes) => {
                let expected = shape
                    .elements()
                    .checked_mul(element_bytes)
                    .ok_or(TensorError::ShapeOverflow)?;
                if raw.len() != expected {
                    return Err(TensorError::ByteCount {
                        expected,
                        actual: raw.len(),
                    });
                }
                if datatype == Datatype::Bool
                    && let Some(element) = raw.iter().position(|&byte| byte > 1)
                {
                    let value = raw[element];
                    return Err(TensorError::Element {
                        element,
                        problem: ElementError::NotBoolean { value },
                    });
                }
            }
            None => {
                let mut count = 0;
                for element in bytes_elements(&raw) {
                    element?;
                    count += 1;
                }
                if count != shape.elements() {
                    return Err(TensorError::ElementCount {
                        expected: shape.elements(),
                        actual: count,
                    });
                }
            }
        }
        Ok(Self {
            datatype,
            shape,
            raw,
        })
    }

    /// A tensor of FP32 values.
    pub fn from_f32(shape: Shape, values: &[f32]) -> Result<Self, TensorError> {
        let raw = values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect::<Vec<u8>>();
        Self::from_raw(Datatype::Fp32, shape, raw.into())
    }

    /// A tensor of INT64 values.
    pub fn from_i64(shape: Shape, values: &[i64]) -> Result<Self, TensorError> {
        let raw = values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect::<Vec<u8>>();
        Self::from_raw(Datatype::Int64, shape, raw.into())
    }

    /// A tensor of byte strings.
    pub fn from_elements<E: AsRef<[u8]>>(
        shape: Shape,
        elements: &[E],
    ) -> Result<Self, TensorError> {
        Self::from_raw(
            Datatype::Bytes,
            shape,
            encode_bytes_elements(elements)?.into(),
        )
    }

    /// The datatype.
    pub fn datatype(&self) -> Datatype {
        self.datatype
    }

    /// The shape.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The bytes as they travel.
    pub fn raw(&self) -> &Bytes {
        &self.raw
    }

    /// Gives up the tensor for its bytes.
    pub fn into_raw(self) -> Bytes {
        self.raw
    }

    /// The values of an FP32 tensor.
    pub fn to_f32(&self) -> Result<Vec<f32>, TensorError> {
        self.expect_datatype(Datatype::Fp32)?;
        let (values, _) = self.raw.as_chunks::<4>();
        Ok(values
            .iter()
            .map(|value| f32::from_le_bytes(*value))
            .collect())
    }

    /// The values of an INT64 tensor.
    pub fn to_i64(&self) -> Result<Vec<i64>, TensorError> {
        self.expect_datatype(Datatype::Int64)?;
        let (values, _) = self.raw.as_chunks::<8>();
        Ok(values
            .iter()
            .map(|value| i64::from_le_bytes(*value))
            .collect())
    }

    /// The elements of a BYTES tensor.
    pub fn to_elements(&self) -> Result<Vec<&[u8]>, TensorError> {
        self.expect_datatype(Datatype::Bytes)?;
        bytes_elements(&self.raw).collect()
    }

    fn expect_datatype(&self, requested: Datatype) -> Result<(), TensorError> {
        if self.datatype == requested {
            return Ok(());
        }
        Err(TensorError::DatatypeMismatch {
            requested,
            actual: self.datatype,
        })
    }
}
