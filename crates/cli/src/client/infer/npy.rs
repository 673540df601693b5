//! NumPy's .npy files, versions 1 to 3, after the format's specification
//! (NEP 1): a magic, a version, the header's length, a Python dictionary, data.

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use tensor::{Datatype, Shape, Tensor};

use super::scalar::Scalar;

const MAGIC: &[u8] = b"\x93NUMPY";
/// A header holds one datatype and at most sixteen lengths.
const HEADER_BYTES_MAX: usize = 64 << 10;

/// Reads a .npy file. The array must be in C order and little-endian.
pub fn parse(file: &Bytes) -> anyhow::Result<Tensor> {
    let (header, data) = split(file)?;
    let header = Reader { rest: header }.header()?;
    ensure!(
        !header.fortran_order,
        "the array is in Fortran order: save it with numpy.ascontiguousarray"
    );
    let datatype = datatype(header.descr)?;
    let shape = Shape::checked(&header.shape)?;
    Ok(Tensor::from_raw(datatype, shape, data)?)
}

/// The header's text and the data after it.
fn split(file: &Bytes) -> anyhow::Result<(&str, Bytes)> {
    let rest = file
        .strip_prefix(MAGIC)
        .context("not a .npy file: the magic is missing")?;
    let (version, rest) = rest.split_at_checked(2).context("the file is cut")?;
    let (length, rest) = match version {
        [1, _] => {
            let (length, rest) = rest.split_first_chunk().context("the file is cut")?;
            (usize::from(u16::from_le_bytes(*length)), rest)
        }
        [2 | 3, _] => {
            let (length, rest) = rest.split_first_chunk().context("the file is cut")?;
            (usize::try_from(u32::from_le_bytes(*length))?, rest)
        }
        _ => bail!("the version of the .npy file is none of 1, 2 and 3"),
    };
    ensure!(
        length <= HEADER_BYTES_MAX,
        "the header claims {length} bytes"
    );
    let (header, data) = rest.split_at_checked(length).context("the file is cut")?;
    let header = std::str::from_utf8(header).context("the header is no text")?;
    Ok((header, file.slice_ref(data)))
}

fn datatype(descr: &str) -> anyhow::Result<Datatype> {
    ensure!(
        !descr.starts_with('>'),
        "the array is big-endian ({descr}): save it with astype('<f4') or the like"
    );
    Ok(match descr.trim_start_matches(['<', '|', '=']) {
        "b1" | "?" => Datatype::Bool,
        "u1" => Datatype::Uint8,
        "u2" => Datatype::Uint16,
        "u4" => Datatype::Uint32,
        "u8" => Datatype::Uint64,
        "i1" => Datatype::Int8,
        "i2" => Datatype::Int16,
        "i4" => Datatype::Int32,
        "i8" => Datatype::Int64,
        "f2" => Datatype::Fp16,
        "f4" => Datatype::Fp32,
        "f8" => Datatype::Fp64,
        _ => bail!(
            "arrays of '{descr}' are not read: numbers and booleans are; texts go in .json or .txt"
        ),
    })
}

/// The values of an array, to be written in another datatype.
pub fn scalars(array: &Tensor) -> Vec<Scalar> {
    let integers = |values: Vec<i128>| values.into_iter().map(Scalar::Integer).collect();
    let floats = |values: Vec<f64>| values.into_iter().map(Scalar::Float).collect();
    let raw = array.raw();
    match array.datatype() {
        Datatype::Bool => raw.iter().map(|&byte| Scalar::Bool(byte == 1)).collect(),
        Datatype::Uint8 => integers(read(raw, |b| u8::from_le_bytes(b).into())),
        Datatype::Uint16 => integers(read(raw, |b| u16::from_le_bytes(b).into())),
        Datatype::Uint32 => integers(read(raw, |b| u32::from_le_bytes(b).into())),
        Datatype::Uint64 => integers(read(raw, |b| u64::from_le_bytes(b).into())),
        Datatype::Int8 => integers(read(raw, |b| i8::from_le_bytes(b).into())),
        Datatype::Int16 => integers(read(raw, |b| i16::from_le_bytes(b).into())),
        Datatype::Int32 => integers(read(raw, |b| i32::from_le_bytes(b).into())),
        Datatype::Int64 => integers(read(raw, |b| i64::from_le_bytes(b).into())),
        Datatype::Fp16 => floats(read(raw, |b| half::f16::from_le_bytes(b).to_f64())),
        Datatype::Bf16 => floats(read(raw, |b| half::bf16::from_le_bytes(b).to_f64())),
        Datatype::Fp32 => floats(read(raw, |b| f32::from_le_bytes(b).into())),
        Datatype::Fp64 => floats(read(raw, f64::from_le_bytes)),
        // No .npy file that is read has texts.
        Datatype::Bytes => Vec::new(),
    }
}

fn read<const N: usize, T>(raw: &[u8], value: impl Fn([u8; N]) -> T) -> Vec<T> {
    let (chunks, _) = raw.as_chunks::<N>();
    chunks.iter().map(|bytes| value(*bytes)).collect()
}

struct Header<'a> {
    descr: &'a str,
    fortran_order: bool,
    shape: Vec<i64>,
}

/// Reads the little of Python that a header may hold; nothing is evaluated.
struct Reader<'a> {
    rest: &'a str,
}

impl<'a> Reader<'a> {
    fn header(mut self) -> anyhow::Result<Header<'a>> {
        let (mut descr, mut fortran_order, mut shape) = (None, None, None);
        self.symbol('{')?;
        while !self.taken("}") {
            let key = self.quoted()?;
            self.symbol(':')?;
            match key {
                "descr" => descr = Some(self.quoted().context("fields of records are not read")?),
                "fortran_order" => fortran_order = Some(self.boolean()?),
                "shape" => shape = Some(self.lengths()?),
                _ => bail!("the header has an unknown key"),
            }
            if !self.taken(",") {
                self.symbol('}')?;
                break;
            }
        }
        ensure!(self.rest.trim().is_empty(), "text follows the header");
        Ok(Header {
            descr: descr.context("the header lacks 'descr'")?,
            fortran_order: fortran_order.context("the header lacks 'fortran_order'")?,
            shape: shape.context("the header lacks 'shape'")?,
        })
    }

    /// Whether the word comes next; then it is taken.
    fn taken(&mut self, word: &str) -> bool {
        self.rest = self.rest.trim_start();
        match self.rest.strip_prefix(word) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    fn symbol(&mut self, symbol: char) -> anyhow::Result<()> {
        let mut word = [0; 4];
        ensure!(
            self.taken(symbol.encode_utf8(&mut word)),
            "the header lacks a '{symbol}'"
        );
        Ok(())
    }

    fn quoted(&mut self) -> anyhow::Result<&'a str> {
        let quote = if self.taken("'") {
            '\''
        } else {
            self.symbol('"')?;
            '"'
        };
        let (text, rest) = self
            .rest
            .split_once(quote)
            .context("a text of the header has no end")?;
        self.rest = rest;
        Ok(text)
    }

    fn boolean(&mut self) -> anyhow::Result<bool> {
        let value = self.taken("True");
        ensure!(
            value || self.taken("False"),
            "'fortran_order' is no boolean"
        );
        Ok(value)
    }

    fn lengths(&mut self) -> anyhow::Result<Vec<i64>> {
        let mut lengths = Vec::new();
        self.symbol('(')?;
        while !self.taken(")") {
            ensure!(
                lengths.len() < Shape::RANK_MAX,
                "the array has too many dimensions"
            );
            self.rest = self.rest.trim_start();
            let end = self
                .rest
                .find(|character: char| !character.is_ascii_digit());
            let (digits, rest) = self.rest.split_at(end.unwrap_or(self.rest.len()));
            lengths.push(
                digits
                    .parse()
                    .context("'shape' holds something else than lengths")?,
            );
            self.rest = rest;
            if !self.taken(",") {
                self.symbol(')')?;
                break;
            }
        }
        Ok(lengths)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn file(version: u8, header: &str, data: &[u8]) -> Bytes {
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

    fn header(descr: &str, shape: &str) -> String {
        format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}     \n")
    }

    #[test]
    fn arrays_are_read() {
        for version in [1, 2, 3] {
            let data: Vec<u8> = [1.5f32, -2.0]
                .iter()
                .flat_map(|v| v.to_le_bytes())
                .collect();
            let array = parse(&file(version, &header("<f4", "(2,)"), &data)).unwrap();
            assert_eq!(array.to_f32().unwrap(), [1.5, -2.0]);
        }
        let array = parse(&file(1, &header("|b1", "(2, 2)"), &[1, 0, 0, 1])).unwrap();
        assert_eq!(
            (array.datatype(), array.shape().sizes()),
            (Datatype::Bool, &[2, 2][..])
        );
        let scalar = parse(&file(1, &header("<i8", "()"), &7i64.to_le_bytes())).unwrap();
        assert_eq!(scalars(&scalar), [Scalar::Integer(7)]);
    }

    #[test]
    fn values_are_read_in_any_datatype() {
        for (descr, data, value) in [
            ("|u1", vec![255], Scalar::Integer(255)),
            ("|i1", vec![255], Scalar::Integer(-1)),
            (
                "<u8",
                u64::MAX.to_le_bytes().to_vec(),
                Scalar::Integer(u64::MAX.into()),
            ),
            ("<f8", 0.25f64.to_le_bytes().to_vec(), Scalar::Float(0.25)),
            ("<f2", vec![0, 0x38], Scalar::Float(0.5)),
            ("|b1", vec![1], Scalar::Bool(true)),
        ] {
            let array = parse(&file(1, &header(descr, "(1,)"), &data)).unwrap();
            assert_eq!(scalars(&array), [value], "{descr}");
        }
    }

    #[test]
    fn what_cannot_be_read_is_refused() {
        let four = [0; 4];
        let fortran = header("<f4", "(1,)").replace("False", "True");
        for (wrong, data) in [
            (header("<f4", "(2,)"), &four[..]),
            (header("<f4", "(1,)"), &four[..3]),
            (header("<f4", "(-1,)"), &four),
            (header("<f4", "(4294967296, 4294967296)"), &four),
            (header("<f4", "(99999999999999999999,)"), &four),
            (
                header("<f4", "(1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1)"),
                &four,
            ),
            (header(">f4", "(1,)"), &four),
            (header("<U1", "(1,)"), &four),
            (header("|O", "(1,)"), &four),
            (header("|b1", "(1,)"), &[2]),
            (fortran, &four),
            ("{}".to_owned(), &four),
            ("{'descr': '<f4".to_owned(), &four),
            (format!("{}__import__('os')", header("<f4", "(1,)")), &four),
        ] {
            assert!(parse(&file(1, &wrong, data)).is_err(), "{wrong}");
        }
        let lying = [MAGIC, &[2, 0, 255, 255, 255, 255]].concat();
        assert!(parse(&lying.into()).is_err());
        assert!(parse(&file(9, &header("<f4", "(1,)"), &four)).is_err());
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
            let _ = parse(&file(1, &text, &data));
            if let Ok(array) = parse(&file(2, &header("<i2", &shape), &data)) {
                prop_assert_eq!(array.shape().elements() * 2, data.len());
            }
        }
    }
}
