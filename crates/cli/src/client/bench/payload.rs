//! The requests of a benchmark, encoded before the clock starts.

use std::path::Path;

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use platform::grpc::frame;
use protocol::inference::model_infer_request::InferInputTensor;
use protocol::inference::model_metadata_response::TensorMetadata;
use protocol::inference::{ModelInferRequest, ModelMetadataResponse};
use protocol::{LENGTHS_INPUT, is_optional_input};
use tensor::{Datatype, Shape, encode_bytes_elements};

use super::super::options::parameters;
use super::Bench;

/// The most bytes of all distinct requests together.
const REQUESTS_BYTES_MAX: usize = 1 << 30;
const TEXT_BYTES: usize = 64;
const WORDS: &str = "an andon is a paper lantern around a candle and the light that stops a line ";

/// The distinct requests, which the benchmark cycles through.
pub struct RequestSet {
    /// Encoded messages with their prefix.
    pub framed: Vec<Bytes>,
    /// Rows of each request.
    pub rows: u64,
    /// Mean raw bytes of a request's inputs.
    pub bytes: usize,
}

impl RequestSet {
    /// Requests for a model, by its metadata.
    pub fn build(metadata: &ModelMetadataResponse, options: &Bench) -> anyhow::Result<Self> {
        let first = metadata.inputs.first().context("the model has no inputs")?;
        let texts = match &options.texts {
            Some(path) => {
                ensure!(
                    first.datatype == "BYTES",
                    "--texts needs a model whose first input is text: '{}' has datatype {}",
                    first.name,
                    first.datatype
                );
                read(path).with_context(|| format!("file {}", path.display()))?
            }
            None => Vec::new(),
        };
        let rows = rows(first, options)?;
        // The last request wraps around to the first texts, to have as many rows.
        let distinct = match texts.len().div_ceil(rows) {
            0 => usize::try_from(options.distinct)?,
            distinct => distinct,
        };
        let (mut requests, mut raw_bytes, mut framed_bytes) = (Vec::new(), 0, 0);
        for index in 0..distinct {
            let lines = (index * rows..(index + 1) * rows).map(|line| line % texts.len().max(1));
            let texts: Vec<&str> = lines
                .filter_map(|line| texts.get(line))
                .map(String::as_str)
                .collect();
            let contents = Contents {
                rows,
                texts: &texts,
                index,
            };
            let message = request(metadata, options, contents)?;
            raw_bytes += message
                .raw_input_contents
                .iter()
                .map(Bytes::len)
                .sum::<usize>();
            let framed = frame(&message);
            framed_bytes += framed.len();
            ensure!(
                framed_bytes <= REQUESTS_BYTES_MAX,
                "the distinct requests take more than {} MiB: use fewer or shorter ones",
                REQUESTS_BYTES_MAX >> 20
            );
            requests.push(framed);
        }
        Ok(Self {
            bytes: raw_bytes / requests.len(),
            rows: rows as u64,
            framed: requests,
        })
    }
}

/// The contents of one request.
#[derive(Clone, Copy)]
struct Contents<'a> {
    rows: usize,
    texts: &'a [&'a str],
    /// The request's number, from which its numbers are made: no two requests
    /// have the same.
    index: usize,
}

/// One request; the first input has the size of `--payload-bytes`.
fn request(
    metadata: &ModelMetadataResponse,
    options: &Bench,
    row_values: Contents<'_>,
) -> anyhow::Result<ModelInferRequest> {
    let mut message = ModelInferRequest {
        model_name: options.model.clone(),
        model_version: options.version.clone(),
        parameters: parameters(&options.param),
        ..Default::default()
    };
    let takes_ids = metadata.inputs.iter().any(|it| it.name == LENGTHS_INPUT);
    let inputs = metadata.inputs.iter();
    let inputs = inputs.filter(|it| !takes_ids || !is_optional_input(&it.name));
    for (index, input) in inputs.enumerate() {
        let bytes = options.payload_bytes.filter(|_| index == 0);
        let (shape, raw) = input_contents(input, row_values, bytes)
            .with_context(|| format!("input '{}'", input.name))?;
        message.inputs.push(InferInputTensor {
            name: input.name.clone(),
            datatype: input.datatype.clone(),
            shape,
            ..Default::default()
        });
        message.raw_input_contents.push(raw);
    }
    Ok(message)
}

fn read(path: &Path) -> anyhow::Result<Vec<String>> {
    let text = std::fs::read_to_string(path)?;
    let texts: Vec<String> = text
        .lines()
        .filter(|line| !line.is_empty())
        .map(str::to_owned)
        .collect();
    ensure!(!texts.is_empty(), "the file has no texts");
    Ok(texts)
}

/// Rows of each request: `--rows`, else as many as `--payload-bytes` needs.
fn rows(first: &TensorMetadata, options: &Bench) -> anyhow::Result<usize> {
    if let Some(rows) = options.rows {
        return Ok(usize::try_from(rows)?);
    }
    let datatype: Datatype = first.datatype.parse()?;
    let (Some(bytes), Some(width)) = (options.payload_bytes, datatype.element_bytes()) else {
        return Ok(1);
    };
    let variable_row = first.shape.iter().skip(1).any(|&length| length < 0);
    if variable_row || first.shape.first().is_none_or(|&length| length >= 0) {
        return Ok(1);
    }
    Ok((bytes / (row_elements(first)? * width)).max(1))
}

/// Elements of a row; a variable dimension counts as one.
fn row_elements(input: &TensorMetadata) -> anyhow::Result<usize> {
    let lengths: Vec<i64> = input
        .shape
        .iter()
        .skip(1)
        .map(|&length| length.max(1))
        .collect();
    Ok(Shape::checked(&lengths)?.elements())
}

/// The shape and raw bytes of one input.
fn input_contents(
    input: &TensorMetadata,
    contents: Contents<'_>,
    bytes: Option<usize>,
) -> anyhow::Result<(Vec<i64>, Bytes)> {
    let Contents { rows, texts, index } = contents;
    let datatype: Datatype = input.datatype.parse()?;
    let mut shape = input.shape.clone();
    if let Some(batch) = shape.first_mut().filter(|length| **length < 0) {
        *batch = i64::try_from(rows)?;
    }
    // One variable dimension inside a row is as long as the size requires.
    let width = datatype.element_bytes();
    let mut variable = bytes.zip(width).map(|(bytes, width)| bytes / width / rows);
    for length in shape.iter_mut().rev().filter(|length| **length < 0) {
        let elements = variable.take().unwrap_or(1) / row_elements(input)?;
        *length = i64::try_from(elements.max(1))?;
    }
    let elements = Shape::checked(&shape)?.elements();
    let raw = match width {
        Some(width) => numbers(datatype, elements, width, index)?,
        None if texts.is_empty() => {
            let text = text(bytes.unwrap_or(TEXT_BYTES));
            ensure_fits(elements, text.len())?;
            encode_bytes_elements(&vec![text; elements])?
        }
        None => {
            let elements: Vec<&str> = texts.iter().copied().cycle().take(elements).collect();
            encode_bytes_elements(&elements)?
        }
    };
    Ok((shape, raw.into()))
}

/// Numbers from 0 to 16, which are valid pixels of the demo model. The first
/// are the digits of `index` to the base 17, so that no two requests are equal.
fn numbers(
    datatype: Datatype,
    elements: usize,
    width: usize,
    index: usize,
) -> anyhow::Result<Vec<u8>> {
    ensure_fits(elements, width)?;
    let mut quotient = index;
    let raw = (0..elements).flat_map(move |element| {
        let value = ((element + quotient % 17) % 17) as u8;
        quotient /= 17;
        let mut bytes = [0; 8];
        match datatype {
            Datatype::Bool => bytes[0] = value & 1,
            Datatype::Fp16 => bytes[..2].copy_from_slice(&half::f16::from(value).to_le_bytes()),
            Datatype::Bf16 => {
                bytes[..2].copy_from_slice(&half::bf16::from_f32(value.into()).to_le_bytes());
            }
            Datatype::Fp32 => bytes[..4].copy_from_slice(&f32::from(value).to_le_bytes()),
            Datatype::Fp64 => bytes.copy_from_slice(&f64::from(value).to_le_bytes()),
            // The first byte of a little-endian integer.
            _ => bytes[0] = value,
        }
        bytes.into_iter().take(width)
    });
    Ok(raw.collect())
}

fn ensure_fits(elements: usize, width: usize) -> anyhow::Result<()> {
    match elements.checked_mul(width) {
        Some(bytes) if bytes <= REQUESTS_BYTES_MAX => Ok(()),
        _ => bail!("{elements} elements of {width} bytes do not fit into one request"),
    }
}

/// Words of exactly this many bytes.
fn text(bytes: usize) -> String {
    WORDS.chars().cycle().take(bytes).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn input(datatype: &str, shape: &[i64]) -> TensorMetadata {
        TensorMetadata {
            name: "in".into(),
            datatype: datatype.into(),
            shape: shape.to_vec(),
        }
    }

    fn rows_of<'a>(rows: usize, texts: &'a [&'a str]) -> Contents<'a> {
        Contents {
            rows,
            texts,
            index: 0,
        }
    }

    #[test]
    fn requests_of_other_numbers_have_other_rows_of() {
        let made: std::collections::HashSet<Vec<u8>> = (0..5000)
            .map(|index| numbers(Datatype::Fp32, 64, 4, index).unwrap())
            .collect();
        assert_eq!(made.len(), 5000);
    }

    #[test]
    fn payloads_have_about_the_given_size() {
        for (datatype, shape, rows, expected, bytes) in [
            ("FP32", vec![-1, 64], 4, vec![4, 64], 1024),
            ("FP32", vec![-1], 256, vec![256], 1024),
            ("FP32", vec![-1, -1], 1, vec![1, 256], 1024),
            ("FP32", vec![-1, -1, 8], 2, vec![2, 16, 8], 1024),
            ("UINT8", vec![-1], 1024, vec![1024], 1024),
            ("BYTES", vec![-1], 1, vec![1], 1028),
            ("INT64", vec![3], 1, vec![3], 24),
        ] {
            let input = input(datatype, &shape);
            let (shape, raw) = input_contents(&input, rows_of(rows, &[]), Some(1024)).unwrap();
            assert_eq!((shape, raw.len()), (expected, bytes), "{datatype}");
        }
    }

    #[test]
    fn requests_cycle_through_the_texts() {
        let (shape, raw) =
            input_contents(&input("BYTES", &[-1]), rows_of(3, &["a", "b"]), None).unwrap();
        let texts: Vec<&[u8]> = tensor::bytes_elements(&raw)
            .collect::<Result<_, _>>()
            .unwrap();
        assert_eq!((shape, texts), (vec![3], vec![&b"a"[..], b"b", b"a"]));
    }

    #[test]
    fn a_payload_that_fits_no_request_is_refused() {
        assert!(input_contents(&input("FP32", &[-1, i64::MAX]), rows_of(2, &[]), None).is_err());
        assert!(input_contents(&input("FP32", &[-1, 1 << 40]), rows_of(1, &[]), None).is_err());
        assert!(input_contents(&input("FP99", &[-1]), rows_of(1, &[]), None).is_err());
    }
}
