//! The answer: checked like a request is, since the server may be any server of
//! the protocol, and shown as a table or as JSON.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::{Context, ensure};
use bytes::Bytes;
use protocol::inference::infer_parameter::ParameterChoice;
use protocol::inference::model_infer_response::InferOutputTensor;
use protocol::inference::{InferTensorContents, ModelInferResponse};
use serde::ser::{Serialize, SerializeSeq, SerializeStruct, Serializer};
use tensor::{Datatype, Shape, Tensor, TypedContents, encode_typed};

use super::super::print;

const TEXT_COLUMNS: usize = 40;
const FIRST_VALUES: usize = 4;

/// An answer whose tensors agree with their shapes.
#[derive(Debug, serde::Serialize)]
pub struct Answer {
    model_name: String,
    model_version: String,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    parameters: BTreeMap<String, serde_json::Value>,
    outputs: Vec<Output>,
}

#[derive(Debug)]
struct Output {
    name: String,
    tensor: Tensor,
}

impl Answer {
    /// Checks an answer: contents may be raw or typed.
    pub fn checked(answer: ModelInferResponse) -> anyhow::Result<Self> {
        let mut raw = answer.raw_output_contents.into_iter();
        let outputs = answer
            .outputs
            .into_iter()
            .map(|output| {
                let name = output.name.clone();
                self::output(output, raw.next())
                    .with_context(|| format!("the server sent a wrong output '{name}'"))
            })
            .collect::<anyhow::Result<Vec<Output>>>()?;
        ensure!(
            raw.next().is_none(),
            "the server sent more raw contents than outputs"
        );
        let parameters = answer.parameters.into_iter();
        Ok(Self {
            model_name: answer.model_name,
            model_version: answer.model_version,
            parameters: parameters
                .filter_map(|(key, value)| Some((key, json(value.parameter_choice?))))
                .collect(),
            outputs,
        })
    }

    /// A line per row; `label` names the rows.
    pub fn table(&self, label: Option<(String, Vec<String>)>) -> String {
        let columns: Vec<Vec<String>> = self.outputs.iter().map(|o| cells(&o.tensor)).collect();
        let rows_count = columns.iter().map(Vec::len).max().unwrap_or(0);
        // Labels that do not belong to rows one by one would mislead.
        let label = label.filter(|(_, texts)| texts.len() == rows_count);
        let mut heading = vec!["#".to_owned()];
        heading.extend(label.iter().map(|(name, _)| name.to_uppercase()));
        heading.extend(self.outputs.iter().map(|output| output.name.to_uppercase()));
        let rows: Vec<Vec<String>> = (0..rows_count)
            .map(|row| {
                let mut cells = vec![row.to_string()];
                let text = label.iter().filter_map(|(_, texts)| texts.get(row));
                cells.extend(text.map(|text| print::short(text, TEXT_COLUMNS)));
                let outputs = columns.iter().map(|column| column.get(row));
                cells.extend(outputs.map(|cell| cell.cloned().unwrap_or_default()));
                cells
            })
            .collect();
        let heading: Vec<&str> = heading.iter().map(String::as_str).collect();
        let mut text = print::table(&heading, &rows);
        let _ = write!(
            text,
            "\n{} version {}\n",
            print::visible(&self.model_name),
            print::visible(&self.model_version)
        );
        text
    }
}

fn output(output: InferOutputTensor, raw: Option<Bytes>) -> anyhow::Result<Output> {
    let datatype: Datatype = output.datatype.parse()?;
    let shape = Shape::checked(&output.shape)?;
    let raw = match (raw, output.contents) {
        (Some(raw), _) => raw,
        (None, contents) => {
            encode_typed(datatype, &shape, &typed(contents.unwrap_or_default()))?.into()
        }
    };
    Ok(Output {
        name: output.name,
        tensor: Tensor::from_raw(datatype, shape, raw)?,
    })
}

fn typed(contents: InferTensorContents) -> TypedContents {
    TypedContents {
        bool_contents: contents.bool_contents,
        int_contents: contents.int_contents,
        int64_contents: contents.int64_contents,
        uint_contents: contents.uint_contents,
        uint64_contents: contents.uint64_contents,
        fp32_contents: contents.fp32_contents,
        fp64_contents: contents.fp64_contents,
        bytes_contents: contents.bytes_contents,
    }
}

fn json(choice: ParameterChoice) -> serde_json::Value {
    match choice {
        ParameterChoice::BoolParam(value) => value.into(),
        ParameterChoice::Int64Param(value) => value.into(),
        ParameterChoice::StringParam(value) => value.into(),
        ParameterChoice::DoubleParam(value) => value.into(),
        ParameterChoice::Uint64Param(value) => value.into(),
    }
}

/// One element.
enum Cell<'a> {
    Bool(bool),
    Signed(i64),
    Unsigned(u64),
    Single(f32),
    Double(f64),
    Text(Cow<'a, str>),
}

impl Cell<'_> {
    fn number(&self) -> Option<f64> {
        match self {
            Self::Signed(value) => Some(*value as f64),
            Self::Unsigned(value) => Some(*value as f64),
            Self::Single(value) => Some(f64::from(*value)),
            Self::Double(value) => Some(*value),
            Self::Bool(_) | Self::Text(_) => None,
        }
    }

    fn text(&self) -> String {
        match self {
            Self::Bool(value) => value.to_string(),
            Self::Signed(value) => value.to_string(),
            Self::Unsigned(value) => value.to_string(),
            Self::Single(value) => format!("{value:.4}"),
            Self::Double(value) => format!("{value:.4}"),
            Self::Text(text) => print::short(text, TEXT_COLUMNS),
        }
    }
}

/// The elements of a tensor by their place.
struct Elements<'a> {
    datatype: Datatype,
    raw: &'a [u8],
    /// The elements of a BYTES tensor, which have no fixed width.
    texts: Vec<&'a [u8]>,
}

impl<'a> Elements<'a> {
    fn new(tensor: &'a Tensor) -> Self {
        Self {
            datatype: tensor.datatype(),
            raw: tensor.raw(),
            texts: tensor.to_elements().unwrap_or_default(),
        }
    }

    fn at(&self, place: usize) -> Cell<'a> {
        match self.datatype {
            Datatype::Bool => Cell::Bool(self.word::<1>(place) == [1]),
            Datatype::Uint8 => Cell::Unsigned(u8::from_le_bytes(self.word(place)).into()),
            Datatype::Uint16 => Cell::Unsigned(u16::from_le_bytes(self.word(place)).into()),
            Datatype::Uint32 => Cell::Unsigned(u32::from_le_bytes(self.word(place)).into()),
            Datatype::Uint64 => Cell::Unsigned(u64::from_le_bytes(self.word(place))),
            Datatype::Int8 => Cell::Signed(i8::from_le_bytes(self.word(place)).into()),
            Datatype::Int16 => Cell::Signed(i16::from_le_bytes(self.word(place)).into()),
            Datatype::Int32 => Cell::Signed(i32::from_le_bytes(self.word(place)).into()),
            Datatype::Int64 => Cell::Signed(i64::from_le_bytes(self.word(place))),
            Datatype::Fp16 => Cell::Single(half::f16::from_le_bytes(self.word(place)).to_f32()),
            Datatype::Bf16 => Cell::Single(half::bf16::from_le_bytes(self.word(place)).to_f32()),
            Datatype::Fp32 => Cell::Single(f32::from_le_bytes(self.word(place))),
            Datatype::Fp64 => Cell::Double(f64::from_le_bytes(self.word(place))),
            Datatype::Bytes => {
                let text = self.texts.get(place).copied().unwrap_or_default();
                Cell::Text(String::from_utf8_lossy(text))
            }
        }
    }

    /// The bytes of an element; the tensor was checked, so they are there.
    fn word<const N: usize>(&self, place: usize) -> [u8; N] {
        let (words, _) = self.raw.as_chunks::<N>();
        words.get(place).copied().unwrap_or([0; N])
    }
}

/// A cell of the table for each row.
fn cells(tensor: &Tensor) -> Vec<String> {
    let elements = Elements::new(tensor);
    let count = tensor.shape().elements();
    let rows = tensor.shape().sizes().first().copied().unwrap_or(1);
    if count == 0 || rows == 0 {
        return Vec::new();
    }
    let width = count / rows;
    (0..rows)
        .map(|row| abbreviated(&elements, row * width, width))
        .collect()
}

/// One value as it is; of many, the first ones, how many and their norm.
fn abbreviated(elements: &Elements, first: usize, width: usize) -> String {
    if width == 1 {
        return elements.at(first).text();
    }
    let places = first..first + width;
    let mut text: Vec<String> = places
        .clone()
        .take(FIRST_VALUES)
        .map(|place| elements.at(place).text())
        .collect();
    if width > FIRST_VALUES {
        text.push("…".to_owned());
    }
    let mut text = text.join(" ");
    let squares: Option<f64> = places
        .map(|place| elements.at(place).number().map(|value| value * value))
        .sum();
    let _ = match squares {
        Some(squares) => write!(text, " ({width}, norm {:.4})", squares.sqrt()),
        None => write!(text, " ({width})"),
    };
    text
}

impl Serialize for Output {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let sizes = self.tensor.shape().sizes();
        let elements = Elements::new(&self.tensor);
        // An empty tensor may claim endless rows of nothing.
        let sizes_written = if self.tensor.shape().elements() == 0 {
            &[0][..]
        } else {
            sizes
        };
        let mut output = serializer.serialize_struct("Output", 4)?;
        output.serialize_field("name", &self.name)?;
        output.serialize_field("datatype", self.tensor.datatype().name())?;
        output.serialize_field("shape", sizes)?;
        output.serialize_field(
            "data",
            &Nested {
                elements: &elements,
                sizes: sizes_written,
                first: 0,
            },
        )?;
        output.end()
    }
}

/// Part of a tensor as nested arrays.
struct Nested<'a> {
    elements: &'a Elements<'a>,
    sizes: &'a [usize],
    first: usize,
}

impl Serialize for Nested<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Some((&length, sizes)) = self.sizes.split_first() else {
            return match self.elements.at(self.first) {
                Cell::Bool(value) => serializer.serialize_bool(value),
                Cell::Signed(value) => serializer.serialize_i64(value),
                Cell::Unsigned(value) => serializer.serialize_u64(value),
                Cell::Single(value) => serializer.serialize_f32(value),
                Cell::Double(value) => serializer.serialize_f64(value),
                Cell::Text(text) => serializer.serialize_str(&text),
            };
        };
        let stride: usize = sizes.iter().product();
        let mut array = serializer.serialize_seq(Some(length))?;
        for place in 0..length {
            array.serialize_element(&Nested {
                elements: self.elements,
                sizes,
                first: self.first + place * stride,
            })?;
        }
        array.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(datatype: &str, shape: &[i64], raw: Vec<u8>) -> anyhow::Result<Answer> {
        Answer::checked(ModelInferResponse {
            model_name: "m".into(),
            model_version: "1".into(),
            outputs: vec![InferOutputTensor {
                name: "out".into(),
                datatype: datatype.into(),
                shape: shape.to_vec(),
                ..Default::default()
            }],
            raw_output_contents: vec![raw.into()],
            ..Default::default()
        })
    }

    fn floats(values: &[f32]) -> Vec<u8> {
        values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect()
    }

    #[test]
    fn json_is_complete_and_nested() {
        let answer = answer("FP32", &[2, 2], floats(&[0.1, 2.0, -3.5, 4.0])).unwrap();
        assert_eq!(
            serde_json::to_string(&answer).unwrap(),
            "{\"model_name\":\"m\",\"model_version\":\"1\",\"outputs\":[{\"name\":\"out\",\
             \"datatype\":\"FP32\",\"shape\":[2,2],\"data\":[[0.1,2.0],[-3.5,4.0]]}]}"
        );
    }

    #[test]
    fn vectors_are_abbreviated_in_the_table() {
        let answer = answer("FP32", &[1, 6], floats(&[3.0, 4.0, 0.0, 0.0, 0.0, 0.0])).unwrap();
        let table = answer.table(Some(("text".into(), vec!["a lantern".into()])));
        assert!(table.contains("TEXT"), "{table}");
        assert!(
            table.contains("3.0000 4.0000 0.0000 0.0000 … (6, norm 5.0000)"),
            "{table}"
        );
    }

    #[test]
    fn answers_that_lie_are_refused() {
        assert!(answer("FP32", &[2, 2], floats(&[1.0])).is_err());
        assert!(answer("FP99", &[1], floats(&[1.0])).is_err());
        assert!(answer("FP32", &[-1], floats(&[1.0])).is_err());
        let empty = answer("FP32", &[1 << 40, 0], Vec::new()).unwrap();
        assert!(
            serde_json::to_string(&empty)
                .unwrap()
                .contains("\"data\":[]")
        );
        assert!(empty.table(None).starts_with('#'));
    }
}
