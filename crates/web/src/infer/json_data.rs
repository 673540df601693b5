//! Parses the `data` of a tensor in JSON, flat or nested, to its bytes. The text
//! is known to be valid JSON, so that only its values are checked here.

use platform::pool::Cancelled;
use tensor::{Datatype, Shape};

/// An error of the data.
#[derive(Debug, PartialEq)]
pub struct DataError {
    /// The index of the element, if it is the error of one.
    pub element: Option<usize>,
    /// The offset in the text, in bytes.
    pub offset: usize,
    /// The problem.
    pub reason: String,
}

/// Appends the bytes of one element.
type Push<'p> = dyn Fn(&str, &mut Vec<u8>) -> Result<(), &'static str> + 'p;

/// Elements that are read before the next look at whether the caller has left.
const ELEMENTS_AT_ONCE: usize = 4096;

/// The bytes of a tensor: little-endian and row-major.
pub fn parse_data(
    text: &str,
    datatype: Datatype,
    shape: &Shape,
    cancelled: &Cancelled,
) -> Result<Vec<u8>, DataError> {
    macro_rules! numbers {
        ($kind:ty, $what:literal) => {
            &|text: &str, raw: &mut Vec<u8>| {
                let value: $kind = text.parse().map_err(|_| $what)?;
                raw.extend_from_slice(&value.to_le_bytes());
                Ok(())
            }
        };
    }
    let push: &Push<'_> = match datatype {
        Datatype::Bool => &boolean,
        Datatype::Uint8 => numbers!(u8, "must be an integer from 0 to 255"),
        Datatype::Uint16 => numbers!(u16, "must be an integer from 0 to 65535"),
        Datatype::Uint32 => numbers!(u32, "must be an integer in the range of UINT32"),
        Datatype::Uint64 => numbers!(u64, "must be an integer in the range of UINT64"),
        Datatype::Int8 => numbers!(i8, "must be an integer from -128 to 127"),
        Datatype::Int16 => numbers!(i16, "must be an integer from -32768 to 32767"),
        Datatype::Int32 => numbers!(i32, "must be an integer in the range of INT32"),
        Datatype::Int64 => numbers!(i64, "must be an integer in the range of INT64"),
        Datatype::Fp32 => &|text, raw| {
            let value: f32 = text.parse().map_err(|_| "must be a number")?;
            raw.extend_from_slice(&finite(value)?.to_le_bytes());
            Ok(())
        },
        Datatype::Fp64 => &|text, raw| {
            let value: f64 = text.parse().map_err(|_| "must be a number")?;
            if !value.is_finite() {
                return Err("is out of range for FP64");
            }
            raw.extend_from_slice(&value.to_le_bytes());
            Ok(())
        },
        Datatype::Bytes => &element,
        Datatype::Fp16 | Datatype::Bf16 => {
            return Err(DataError {
                element: None,
                offset: 0,
                reason: format!("{datatype} cannot be written in JSON: send binary data"),
            });
        }
    };
    let mut scanner = Scanner {
        text,
        at: 0,
        counts: Vec::with_capacity(4),
        leaves: None,
        elements: 0,
        raw: Vec::with_capacity(capacity(text, datatype, shape)),
        floats: datatype == Datatype::Fp32,
        cancelled,
    };
    scanner.run(shape, push)?;
    Ok(scanner.raw)
}

/// The capacity for the bytes: at most what the text can fill, whatever the shape.
pub fn capacity(text: &str, datatype: Datatype, shape: &Shape) -> usize {
    match datatype.element_bytes() {
        Some(bytes) => shape.elements().min(text.len() / 2) * bytes,
        // Quotes and a comma are shorter than the length of an element.
        None => text.len() + shape.elements().min(text.len() / 3 + 1),
    }
}

/// Powers of ten that a double holds exactly.
const POWERS_OF_TEN: [f64; 23] = [
    1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9, 1e10, 1e11, 1e12, 1e13, 1e14, 1e15, 1e16,
    1e17, 1e18, 1e19, 1e20, 1e21, 1e22,
];

/// A number at the beginning of a text.
#[derive(Debug, Clone, Copy, PartialEq)]
struct ShortFloat {
    value: f32,
    length: usize,
}

/// Characters of a number that [`short_f32`] reads: its digits are below 2^64.
const SHORT_MAX: usize = 18;

/// The number at the beginning of a text, correctly rounded, if it has few digits
/// and no exponent, as most have that clients write.
///
/// Digits and power of ten are exact as doubles, so that their quotient is the
/// correctly rounded double (Clinger, "How to Read Floating Point Numbers
/// Accurately", 1990). To round it once more to a float is wrong only when it lies
/// halfway between two floats, which is left to the standard library.
fn short_f32(text: &[u8]) -> Option<ShortFloat> {
    let start = usize::from(text.first() == Some(&b'-'));
    let (mut mantissa, mut point, mut end) = (0_u64, None, start);
    for byte in text.iter().skip(start).take(SHORT_MAX) {
        match byte {
            b'0'..=b'9' => mantissa = mantissa * 10 + u64::from(byte - b'0'),
            b'.' if point.is_none() && end > start => point = Some(end),
            b',' | b']' | b' ' | b'\t' | b'\n' | b'\r' => break,
            _ => return None,
        }
        end += 1;
    }
    let decimals = point.map_or(0, |point| end - point - 1);
    // A point is followed by digits, a number by something else, and more than
    // 2^53 may be inexact as a double.
    let is_whole = end > start && end < start + SHORT_MAX && end < text.len();
    if !is_whole || point == Some(end - 1) || mantissa >= 1 << 53 {
        return None;
    }
    #[allow(clippy::cast_precision_loss, reason = "it is below 2^53")]
    let value = mantissa as f64 / POWERS_OF_TEN.get(decimals)?;
    if value.to_bits() & HALF_MASK == HALF {
        return None;
    }
    #[allow(
        clippy::cast_possible_truncation,
        reason = "to round it is the purpose"
    )]
    let value = value as f32;
    let value = if start == 0 { value } else { -value };
    Some(ShortFloat { value, length: end })
}

/// The bits of a double that a float lacks, and their value halfway between two
/// floats.
const HALF_MASK: u64 = (1 << 29) - 1;
const HALF: u64 = 1 << 28;

fn finite(value: f32) -> Result<f32, &'static str> {
    if value.is_finite() {
        Ok(value)
    } else {
        Err("is out of range for FP32")
    }
}

fn boolean(text: &str, raw: &mut Vec<u8>) -> Result<(), &'static str> {
    raw.push(match text {
        "true" => 1,
        "false" => 0,
        _ => return Err("must be true or false"),
    });
    Ok(())
}

fn element(text: &str, raw: &mut Vec<u8>) -> Result<(), &'static str> {
    let mut put = |text: &str| {
        let length = u32::try_from(text.len()).map_err(|_| "is too long")?;
        raw.extend_from_slice(&length.to_le_bytes());
        raw.extend_from_slice(text.as_bytes());
        Ok(())
    };
    let inside = text
        .strip_prefix('"')
        .and_then(|text| text.strip_suffix('"'))
        .ok_or("must be a string")?;
    if !inside.contains('\\') {
        return put(inside);
    }
    let unescaped: String = serde_json::from_str(text).map_err(|_| "is not valid Unicode")?;
    put(&unescaped)
}

struct Scanner<'t> {
    text: &'t str,
    at: usize,
    /// The elements or arrays so far in each open array, the outermost first.
    counts: Vec<usize>,
    /// The depth of the elements.
    leaves: Option<usize>,
    elements: usize,
    raw: Vec<u8>,
    /// Whether short numbers may be read by [`short_f32`].
    floats: bool,
    cancelled: &'t Cancelled,
}

impl Scanner<'_> {
    fn error(&self, reason: impl Into<String>) -> DataError {
        DataError {
            element: None,
            offset: self.at,
            reason: reason.into(),
        }
    }

    fn run(&mut self, shape: &Shape, push: &Push<'_>) -> Result<(), DataError> {
        while let Some(byte) = self.text.as_bytes().get(self.at) {
            match byte {
                b' ' | b'\t' | b'\n' | b'\r' | b',' => self.at += 1,
                b'[' => self.open(shape)?,
                b']' => self.close(shape)?,
                _ => self.element(shape, push)?,
            }
        }
        let (actual, expected) = (self.elements, shape.elements());
        if actual == expected {
            return Ok(());
        }
        Err(self.error(format!(
            "has {actual} elements, but the shape needs {expected}"
        )))
    }

    fn open(&mut self, shape: &Shape) -> Result<(), DataError> {
        if self.counts.len() >= shape.sizes().len().max(1) {
            return Err(self.error("is nested deeper than the shape"));
        }
        if let Some(count) = self.counts.last_mut() {
            *count += 1;
        }
        self.counts.push(0);
        self.at += 1;
        Ok(())
    }

    /// Flat data has one array; the sizes of nested arrays must agree with the
    /// shape.
    fn close(&mut self, shape: &Shape) -> Result<(), DataError> {
        let count = self.counts.pop().unwrap_or_default();
        let depth = self.counts.len();
        let size = shape.sizes().get(depth).copied().unwrap_or_default();
        if self.leaves.is_some_and(|leaves| leaves > 1) && count != size {
            return Err(self.error(format!(
                "an array has {count} entries, but dimension {depth} of the shape is {size}"
            )));
        }
        self.at += 1;
        Ok(())
    }

    fn element(&mut self, shape: &Shape, push: &Push<'_>) -> Result<(), DataError> {
        let depth = self.counts.len();
        if depth == 0 {
            return Err(self.error("must be an array"));
        }
        let leaves = *self.leaves.get_or_insert(depth);
        let whole = depth == 1 || depth == shape.sizes().len();
        let error = |reason: &str| DataError {
            element: Some(self.elements),
            offset: self.at,
            reason: reason.to_owned(),
        };
        if self.elements.is_multiple_of(ELEMENTS_AT_ONCE) && self.cancelled.is_set() {
            return Err(error("is not read: the caller left"));
        }
        // There is no memory for more than the shape needs: they are only counted.
        let is_needed = self.elements < shape.elements();
        let bytes = self.text.as_bytes().get(self.at..).unwrap_or_default();
        let short = if self.floats && is_needed {
            short_f32(bytes)
        } else {
            None
        };
        let length = if let Some(short) = short {
            self.raw.extend_from_slice(&short.value.to_le_bytes());
            short.length
        } else {
            let rest = self.text.get(self.at..).unwrap_or_default();
            let token = token(rest).ok_or_else(|| error("must not be an object"))?;
            if is_needed {
                push(token, &mut self.raw).map_err(error)?;
            }
            token.len()
        };
        if leaves != depth || !whole {
            return Err(error("is nested at another depth than the shape"));
        }
        self.at += length;
        self.elements += 1;
        if let Some(count) = self.counts.last_mut() {
            *count += 1;
        }
        Ok(())
    }
}

/// The first value of the text; none if it is an object.
fn token(text: &str) -> Option<&str> {
    let bytes = text.as_bytes();
    let length = match bytes.first()? {
        b'"' => {
            let mut escaped = false;
            let end = bytes.iter().skip(1).position(|byte| {
                let ends = *byte == b'"' && !escaped;
                escaped = *byte == b'\\' && !escaped;
                ends
            });
            end? + 2
        }
        b'{' => return None,
        _ => bytes
            .iter()
            .position(|byte| matches!(byte, b',' | b']' | b' ' | b'\t' | b'\n' | b'\r'))
            .unwrap_or(bytes.len()),
    };
    text.get(..length)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str, datatype: Datatype, shape: &Shape) -> Result<Vec<u8>, DataError> {
        let raw = parse_data(text, datatype, shape, &Cancelled::never())?;
        assert!(raw.capacity() <= capacity(text, datatype, shape).max(8));
        Ok(raw)
    }

    fn shape(dimensions: &[i64]) -> Shape {
        Shape::checked(dimensions).unwrap()
    }

    fn refused(text: &str, datatype: Datatype, dimensions: &[i64]) -> (Option<usize>, String) {
        let error = parse(text, datatype, &shape(dimensions)).unwrap_err();
        (error.element, error.reason)
    }

    #[test]
    fn flat_and_nested_data_are_the_same_tensor() {
        let expected: Vec<u8> = [1.5_f32, -2.0, 3e-4, 0.1]
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect();
        for text in ["[1.5,-2,3e-4,0.1]", "[ [1.5, -2],\n [3e-4, 0.1] ]"] {
            let raw = parse(text, Datatype::Fp32, &shape(&[2, 2])).unwrap();
            assert_eq!(raw, expected, "{text}");
        }
        assert_eq!(parse("[]", Datatype::Int8, &shape(&[0, 3])), Ok(vec![]));
        assert_eq!(parse("[7]", Datatype::Int8, &shape(&[])), Ok(vec![7]));
    }

    #[test]
    fn every_datatype_has_its_range() {
        use Datatype::{Bf16, Bool, Bytes, Fp16, Fp32, Fp64, Int8, Int64, Uint8, Uint64};
        let one = |text: &str, datatype| parse(&format!("[{text}]"), datatype, &shape(&[1]));
        assert_eq!(one("true", Bool), Ok(vec![1]));
        assert_eq!(one("-128", Int8), Ok(vec![128]));
        assert_eq!(one("255", Uint8), Ok(vec![255]));
        assert_eq!(one(&u64::MAX.to_string(), Uint64), Ok(vec![255; 8]));
        assert_eq!(
            one(&i64::MIN.to_string(), Int64),
            Ok(i64::MIN.to_le_bytes().to_vec())
        );
        assert_eq!(one("0.1", Fp64), Ok(0.1_f64.to_le_bytes().to_vec()));
        assert_eq!(
            one(r#""a\u00e9\"""#, Bytes),
            Ok(vec![4, 0, 0, 0, 97, 195, 169, 34])
        );
        for (text, datatype) in [
            ("1", Bool),
            ("128", Int8),
            ("-1", Uint8),
            ("1.0", Int8),
            ("1e2", Uint64),
            ("1e39", Fp32),
            ("1e309", Fp64),
            (r#""NaN""#, Fp32),
            ("null", Fp32),
            ("true", Fp64),
            ("1", Bytes),
            (r#""\ud800""#, Bytes),
            ("{}", Fp32),
        ] {
            let error = one(text, datatype).unwrap_err();
            assert_eq!((error.element, error.offset), (Some(0), 1), "{text}");
        }
        assert!(one("1", Fp16).is_err() && one("1", Bf16).is_err());
    }

    #[test]
    fn wrong_elements_and_wrong_shapes_are_refused() {
        let (element, _) = refused(r#"[[1,2],[3,"x"]]"#, Datatype::Int32, &[2, 2]);
        assert_eq!(element, Some(3));
        for text in ["[1,2,3]", "[]", "[1,2,3,4,5]"] {
            let (element, reason) = refused(text, Datatype::Int32, &[2, 2]);
            assert_eq!(element, None);
            assert!(
                reason.ends_with("elements, but the shape needs 4"),
                "{reason}"
            );
        }
        for text in [
            "[[1],[2,3,4]]",
            "[[1,2,3,4]]",
            "[1,[2,3,4]]",
            "[[[1,2,3,4]]]",
            "4",
        ] {
            refused(text, Datatype::Int32, &[2, 2]);
        }
        refused("[[1],[2]]", Datatype::Int32, &[2, 1, 1]);
    }

    /// The number of a whole text.
    fn short(text: &str) -> Option<f32> {
        let read = short_f32(format!("{text}]").as_bytes())?;
        assert_eq!(read.length, text.len());
        Some(read.value)
    }

    #[test]
    fn short_numbers_are_the_floats_of_the_standard_library() {
        for text in ["0", "-0", "-0.0", "1", "0.1", "-12.5", "0.000000000000001"] {
            let expected: f32 = text.parse().unwrap();
            assert_eq!(short(text).map(f32::to_bits), Some(expected.to_bits()));
        }
        for text in [
            "16777216.5",
            "16777217",
            "9007199254740991",
            "9007199254740993",
            "1.0000000178813943",
            "123456789012345.6",
        ] {
            let expected: f32 = text.parse().unwrap();
            assert!(short(text).is_none_or(|read| read == expected), "{text}");
        }
        for text in [
            "", "-", ".", "1.", ".5", "-.5", "+1", "1e3", "1.2.3", "--1", "NaN", "true",
        ] {
            assert_eq!(short(text), None, "{text}");
        }
        assert_eq!(short("16777217"), None, "halfway between two floats");
        assert_eq!(short_f32(b"1"), None, "it may go on");
    }

    proptest! {
        #[test]
        fn digits_are_the_float_of_the_standard_library(
            digits in 0_u64..10_000_000_000_000_000,
            decimals in 0_usize..16,
            negative in proptest::bool::ANY,
        ) {
            let mut text = format!("{digits:0width$}", width = decimals + 1);
            if decimals > 0 {
                text.insert(text.len() - decimals, '.');
            }
            if negative {
                text.insert(0, '-');
            }
            let expected: f32 = text.parse().unwrap();
            if let Some(read) = short(&text) {
                prop_assert_eq!(read.to_bits(), expected.to_bits(), "{}", text);
            }
        }

        #[test]
        fn floats_are_read_back_from_their_shortest_digits(bits in proptest::num::u32::ANY) {
            let value = f32::from_bits(bits);
            let text = serde_json::to_string(&value).unwrap();
            if let Some(read) = short(&text) {
                prop_assert_eq!(read.to_bits(), bits, "{}", text);
            }
        }
    }
}
