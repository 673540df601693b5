//! NumPy's .npy files, parsed by the npyz crate. It trusts the header, so that
//! the header's length, nesting and shape are checked before it is parsed.

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use npyz::{DType, Endianness, NpyFile, Order, TypeChar};
use tensor::{Datatype, Shape, Tensor};

const MAGIC: &[u8] = b"\x93NUMPY";
const HEADER_BYTES_MAX: usize = 64 << 10;
/// A header is a dictionary with the shape as a tuple. More brackets make a
/// record array, or nest deeper than a parser should recurse.
const BRACKETS_MAX: usize = 2;

/// Reads a .npy file. The array must be in C order and little-endian.
pub fn parse(file: &Bytes) -> anyhow::Result<Tensor> {
    let shape = shape(header(file)?)?;
    let mut data = &file[..];
    let array = NpyFile::new(&mut data).context("the header is invalid")?;
    ensure!(
        array.order() == Order::C,
        "the array is in Fortran order: save it with numpy.ascontiguousarray"
    );
    let datatype = datatype(&array.dtype())?;
    Ok(Tensor::from_raw(datatype, shape, file.slice_ref(data))?)
}

/// The header's text.
fn header(file: &[u8]) -> anyhow::Result<&str> {
    let rest = file
        .strip_prefix(MAGIC)
        .context("not a .npy file: the magic bytes are missing")?;
    let length = match rest {
        [1, 0, low, high, ..] => u16::from_le_bytes([*low, *high]).into(),
        [2 | 3, 0, length @ ..] => match length.first_chunk() {
            Some(length) => u32::from_le_bytes(*length) as usize,
            None => bail!("the file is truncated"),
        },
        _ => bail!("the .npy version must be 1, 2 or 3"),
    };
    ensure!(
        length <= HEADER_BYTES_MAX,
        "the header is longer than {HEADER_BYTES_MAX} bytes"
    );
    let start = if rest[0] == 1 { 4 } else { 6 };
    let header = rest
        .get(start..start + length)
        .context("the file is truncated")?;
    std::str::from_utf8(header).context("the header is not text")
}

/// The shape, checked before npyz multiplies its lengths.
fn shape(header: &str) -> anyhow::Result<Shape> {
    let brackets = header.matches(['(', '[', '{']).count();
    ensure!(brackets <= BRACKETS_MAX, "record arrays are not supported");
    let (_, rest) = header.split_once('(').context("the header has no shape")?;
    let (lengths, _) = rest.split_once(')').context("the header has no shape")?;
    let lengths = lengths.split(',').map(str::trim);
    let lengths: Vec<i64> = lengths
        .filter(|length| !length.is_empty())
        .map(str::parse)
        .collect::<Result<_, _>>()
        .context("the shape must be a tuple of integers")?;
    Ok(Shape::checked(&lengths)?)
}

fn datatype(dtype: &DType) -> anyhow::Result<Datatype> {
    let DType::Plain(dtype) = dtype else {
        bail!("record arrays are not supported");
    };
    ensure!(
        dtype.endianness() != Endianness::Big,
        "the array is big-endian ({dtype}): save it with astype('<f4') or the like"
    );
    Ok(match (dtype.type_char(), dtype.size_field()) {
        (TypeChar::Bool, 1) => Datatype::Bool,
        (TypeChar::Uint, 1) => Datatype::Uint8,
        (TypeChar::Uint, 2) => Datatype::Uint16,
        (TypeChar::Uint, 4) => Datatype::Uint32,
        (TypeChar::Uint, 8) => Datatype::Uint64,
        (TypeChar::Int, 1) => Datatype::Int8,
        (TypeChar::Int, 2) => Datatype::Int16,
        (TypeChar::Int, 4) => Datatype::Int32,
        (TypeChar::Int, 8) => Datatype::Int64,
        (TypeChar::Float, 2) => Datatype::Fp16,
        (TypeChar::Float, 4) => Datatype::Fp32,
        (TypeChar::Float, 8) => Datatype::Fp64,
        _ => bail!(
            "dtype '{dtype}' is not supported, only numbers and booleans: give texts as .json or .txt"
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn npy(version: u8, header: &str, data: &[u8]) -> Bytes {
        let mut file = MAGIC.to_vec();
        file.extend([version, 0]);
        if version == 1 {
            file.extend(u16::try_from(header.len()).unwrap().to_le_bytes());
        } else {
            file.extend(u32::try_from(header.len()).unwrap().to_le_bytes());
        }
        file.extend(header.as_bytes());
        file.extend(data);
        file.into()
    }

    fn dictionary(descr: &str, shape: &str) -> String {
        format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}     \n")
    }

    #[test]
    fn arrays_are_read() {
        for version in [1, 2, 3] {
            let data: Vec<u8> = [1.5f32, -2.0]
                .iter()
                .flat_map(|v| v.to_le_bytes())
                .collect();
            let array = parse(&npy(version, &dictionary("<f4", "(2,)"), &data)).unwrap();
            assert_eq!(array.to_f32().unwrap(), [1.5, -2.0]);
        }
        let array = parse(&npy(1, &dictionary("|b1", "(2, 2)"), &[1, 0, 0, 1])).unwrap();
        assert_eq!(
            (array.datatype(), array.shape().sizes()),
            (Datatype::Bool, &[2, 2][..])
        );
        let scalar = parse(&npy(1, &dictionary("<i8", "()"), &7i64.to_le_bytes())).unwrap();
        assert_eq!(scalar.shape().sizes(), [] as [usize; 0]);
    }

    #[test]
    fn every_datatype_is_read() {
        for (descr, width, datatype) in [
            ("|b1", 1, Datatype::Bool),
            ("|u1", 1, Datatype::Uint8),
            ("<u2", 2, Datatype::Uint16),
            ("<u4", 4, Datatype::Uint32),
            ("<u8", 8, Datatype::Uint64),
            ("|i1", 1, Datatype::Int8),
            ("<i2", 2, Datatype::Int16),
            ("<i4", 4, Datatype::Int32),
            ("<i8", 8, Datatype::Int64),
            ("<f2", 2, Datatype::Fp16),
            ("<f4", 4, Datatype::Fp32),
            ("<f8", 8, Datatype::Fp64),
        ] {
            let array = parse(&npy(1, &dictionary(descr, "(3,)"), &vec![1; 3 * width])).unwrap();
            assert_eq!(array.datatype(), datatype, "{descr}");
        }
    }

    #[test]
    fn what_cannot_be_read_is_refused() {
        let four = [0; 4];
        let fortran = dictionary("<f4", "(1,)").replace("False", "True");
        for (wrong, data) in [
            (dictionary("<f4", "(2,)"), &four[..]),
            (dictionary("<f4", "(1,)"), &four[..3]),
            (dictionary("<f4", "(-1,)"), &four),
            (dictionary("<f4", "(4294967296, 4294967296)"), &four),
            (dictionary("<f4", "(99999999999999999999,)"), &four),
            (
                dictionary("<f4", "(1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1)"),
                &four,
            ),
            (dictionary(">f4", "(1,)"), &four),
            (dictionary("<U1", "(1,)"), &four),
            (dictionary("|O", "(1,)"), &four),
            (dictionary("|b1", "(1,)"), &[2]),
            (fortran, &four),
            ("{}".to_owned(), &four),
            ("{'descr': '<f4".to_owned(), &four),
            (
                format!("{}__import__('os')", dictionary("<f4", "(1,)")),
                &four,
            ),
            (dictionary("<f4", "[1]"), &four),
            (dictionary("<f4", "[4294967296, 4294967296]"), &four),
            ("[".repeat(60_000), &four),
            (
                "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,)}".to_owned(),
                &four,
            ),
        ] {
            assert!(parse(&npy(1, &wrong, data)).is_err(), "{wrong}");
        }
        let lying = [MAGIC, &[2, 0, 255, 255, 255, 255]].concat();
        assert!(parse(&lying.into()).is_err());
        assert!(parse(&npy(9, &dictionary("<f4", "(1,)"), &four)).is_err());
    }

    proptest! {
        #[test]
        fn hostile_bytes_do_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(&bytes.clone().into());
            let _ = parse(&[MAGIC, &[1, 0], &bytes].concat().into());
        }

        #[test]
        fn hostile_headers_do_no_harm(
            text in "[{}'\"a-z:,() <|>0-9]{0,80}", shape in "[0-9, ()-]{0,40}", data in prop::collection::vec(any::<u8>(), 0..20)
        ) {
            let _ = parse(&npy(1, &text, &data));
            if let Ok(array) = parse(&npy(2, &dictionary("<i2", &shape), &data)) {
                prop_assert_eq!(array.shape().elements() * 2, data.len());
            }
        }
    }
}
