//! Embeddings of texts, in the terms of no provider.

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::de::{self, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::error::ProviderError;

/// Dimensions of one embedding.
pub const WIDTH_MAX: usize = 65_536;

/// How a caller wants its embeddings.
#[derive(Debug, Clone, Copy, Default)]
pub struct EmbeddingOptions {
    /// The number of leading dimensions to return; all of them without it.
    pub dimensions: Option<usize>,
    /// Whether vectors are scaled to length 1.
    pub normalize: bool,
    /// Whether a text that is too long is truncated.
    pub truncate: bool,
}

/// The texts of one call, and the options of their embedding.
#[derive(Debug, Clone, Copy)]
pub struct EmbeddingRequest<'a> {
    /// The texts.
    pub texts: &'a [String],
    /// The number of leading dimensions to return; all of them without it.
    pub dimensions: Option<usize>,
    /// Whether a text that is too long is truncated.
    pub truncate: bool,
}

/// Embeddings in the order of their texts: of one width, all numbers finite.
#[derive(Debug, Default, PartialEq)]
pub struct Embeddings {
    /// One vector for each text.
    pub vectors: Vec<Vec<f32>>,
    /// Tokens that were read.
    pub tokens: u64,
}

impl Embeddings {
    /// Checks that the vectors have one width, which is not 0, and that their
    /// numbers are finite.
    pub fn checked(vectors: Vec<Vec<f32>>, tokens: u64) -> Result<Self, ProviderError> {
        let width = vectors.first().map_or(0, Vec::len);
        if vectors.iter().any(|vector| vector.len() != width) {
            return Err(ProviderError::InvalidResponse(
                "embeddings of different widths",
            ));
        }
        if width == 0 {
            return Err(ProviderError::InvalidResponse("an empty embedding"));
        }
        if vectors.iter().flatten().any(|value| !value.is_finite()) {
            let reason = "an embedding with a number that is not finite";
            return Err(ProviderError::InvalidResponse(reason));
        }
        Ok(Self { vectors, tokens })
    }

    /// Dimensions of each vector.
    pub fn width(&self) -> Option<usize> {
        self.vectors.first().map(Vec::len)
    }
}

/// Scales a vector to length 1. One that has it already keeps its bits, as far
/// as FP32 can tell: most services send such vectors.
pub fn normalize(vector: &mut [f32]) {
    let squares: f64 = vector.iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
    let length = squares.sqrt();
    if length > 0.0 && (length - 1.0).abs() > 1e-5 {
        for value in vector.iter_mut() {
            *value = (f64::from(*value) / length) as f32;
        }
    }
}

/// A vector in JSON: an array of numbers, or little-endian FP32 in base64.
#[derive(Debug)]
pub struct JsonVector(pub Vec<f32>);

impl<'de> Deserialize<'de> for JsonVector {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct VectorVisitor;

        impl<'de> Visitor<'de> for VectorVisitor {
            type Value = JsonVector;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("numbers or base64")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut numbers: A) -> Result<JsonVector, A::Error> {
                let mut vector = Vec::new();
                while let Some(number) = numbers.next_element::<f32>()? {
                    if vector.len() == WIDTH_MAX {
                        return Err(de::Error::custom("too many numbers"));
                    }
                    vector.push(number);
                }
                Ok(JsonVector(vector))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<JsonVector, E> {
                let bytes = STANDARD.decode(text).map_err(de::Error::custom)?;
                let (chunks, rest) = bytes.as_chunks::<4>();
                if !rest.is_empty() || chunks.len() > WIDTH_MAX {
                    return Err(de::Error::custom("not FP32 in base64"));
                }
                Ok(JsonVector(
                    chunks.iter().map(|b| f32::from_le_bytes(*b)).collect(),
                ))
            }
        }
        from.deserialize_any(VectorVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vector_of_length_1_keeps_its_bits() {
        let mut unit = [0.6, 0.8];
        normalize(&mut unit);
        assert_eq!(unit, [0.6, 0.8]);
        let mut long = [3.0, 4.0];
        normalize(&mut long);
        assert_eq!(long, [0.6, 0.8]);
        let mut zero = [0.0, 0.0];
        normalize(&mut zero);
        assert_eq!(zero, [0.0, 0.0]);
    }
}
