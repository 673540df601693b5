//! Values as people write them, turned into the bytes of a datatype.

use anyhow::{anyhow, bail};
use half::{bf16, f16};
use tensor::{Datatype, encode_bytes_elements};

/// One value of a JSON or .npy file.
#[derive(Debug, Clone, PartialEq)]
pub enum Scalar {
    /// true or false.
    Bool(bool),
    /// An integer of 64 bits, with or without a sign.
    Integer(i128),
    /// Any other number.
    Float(f64),
    /// A text.
    Text(String),
}

/// The raw bytes of values in a datatype. A value that the datatype cannot
/// hold is an error, except that floating-point numbers are rounded.
pub fn encode(datatype: Datatype, values: &[Scalar]) -> anyhow::Result<Vec<u8>> {
    match datatype {
        Datatype::Bytes => texts(values),
        Datatype::Bool => each(values, |value| match value {
            Scalar::Bool(value) => Some([u8::from(*value)]),
            Scalar::Integer(value @ (0 | 1)) => Some([u8::from(*value == 1)]),
            _ => None,
        }),
        Datatype::Uint8 => each(values, |value| Some(integer::<u8>(value)?.to_le_bytes())),
        Datatype::Uint16 => each(values, |value| Some(integer::<u16>(value)?.to_le_bytes())),
        Datatype::Uint32 => each(values, |value| Some(integer::<u32>(value)?.to_le_bytes())),
        Datatype::Uint64 => each(values, |value| Some(integer::<u64>(value)?.to_le_bytes())),
        Datatype::Int8 => each(values, |value| Some(integer::<i8>(value)?.to_le_bytes())),
        Datatype::Int16 => each(values, |value| Some(integer::<i16>(value)?.to_le_bytes())),
        Datatype::Int32 => each(values, |value| Some(integer::<i32>(value)?.to_le_bytes())),
        Datatype::Int64 => each(values, |value| Some(integer::<i64>(value)?.to_le_bytes())),
        Datatype::Fp16 => each(values, |v| Some(f16::from_f64(float(v)?).to_le_bytes())),
        Datatype::Bf16 => each(values, |v| Some(bf16::from_f64(float(v)?).to_le_bytes())),
        Datatype::Fp32 => each(values, |v| Some((float(v)? as f32).to_le_bytes())),
        Datatype::Fp64 => each(values, |value| Some(float(value)?.to_le_bytes())),
    }
    .map_err(|wrong: anyhow::Error| wrong.context(format!("cannot be {datatype}")))
}

fn each<const N: usize>(
    values: &[Scalar],
    to_bytes: impl Fn(&Scalar) -> Option<[u8; N]>,
) -> anyhow::Result<Vec<u8>> {
    let mut raw = Vec::with_capacity(values.len().saturating_mul(N));
    for (element, value) in values.iter().enumerate() {
        match to_bytes(value) {
            Some(bytes) => raw.extend_from_slice(&bytes),
            None => bail!("element {element} is {}", written(value)),
        }
    }
    Ok(raw)
}

fn texts(values: &[Scalar]) -> anyhow::Result<Vec<u8>> {
    let texts = values
        .iter()
        .enumerate()
        .map(|(element, value)| match value {
            Scalar::Text(text) => Ok(text.as_bytes()),
            other => Err(anyhow!("element {element} is {}, no text", written(other))),
        })
        .collect::<anyhow::Result<Vec<&[u8]>>>()?;
    Ok(encode_bytes_elements(&texts)?)
}

fn integer<T: TryFrom<i128>>(value: &Scalar) -> Option<T> {
    match value {
        Scalar::Integer(value) => T::try_from(*value).ok(),
        _ => None,
    }
}

fn float(value: &Scalar) -> Option<f64> {
    match value {
        Scalar::Integer(value) => Some(*value as f64),
        Scalar::Float(value) => Some(*value),
        Scalar::Bool(_) | Scalar::Text(_) => None,
    }
}

fn written(value: &Scalar) -> String {
    match value {
        Scalar::Bool(value) => value.to_string(),
        Scalar::Integer(value) => value.to_string(),
        Scalar::Float(value) => value.to_string(),
        Scalar::Text(_) => "a text".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_take_the_datatype() {
        let one = [Scalar::Integer(1)];
        assert_eq!(encode(Datatype::Fp32, &one).unwrap(), 1f32.to_le_bytes());
        assert_eq!(encode(Datatype::Int64, &one).unwrap(), 1i64.to_le_bytes());
        assert_eq!(encode(Datatype::Bool, &one).unwrap(), [1]);
        assert_eq!(
            encode(Datatype::Fp16, &[Scalar::Float(0.5)]).unwrap(),
            [0, 0x38]
        );
        assert_eq!(
            encode(Datatype::Bytes, &[Scalar::Text("é".into())]).unwrap(),
            [2, 0, 0, 0, 0xc3, 0xa9]
        );
    }

    #[test]
    fn values_that_do_not_fit_are_refused() {
        for (datatype, value) in [
            (Datatype::Uint8, Scalar::Integer(256)),
            (Datatype::Int8, Scalar::Integer(-129)),
            (Datatype::Int64, Scalar::Float(1.5)),
            (Datatype::Uint64, Scalar::Integer(-1)),
            (Datatype::Fp32, Scalar::Text("1".into())),
            (Datatype::Bool, Scalar::Integer(2)),
            (Datatype::Bytes, Scalar::Integer(2)),
        ] {
            let error = encode(datatype, std::slice::from_ref(&value)).unwrap_err();
            assert!(format!("{error:#}").contains("element 0"), "{error:#}");
        }
    }
}
