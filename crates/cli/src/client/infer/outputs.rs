//! The response: checked like a request, since the server may be any server of
//! the protocol, and printed as a table or as JSON.

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
use super::elements::{Element, Elements};

const TEXT_COLUMNS: usize = 40;
const FIRST_VALUES: usize = 4;

/// A response whose tensors agree with their shapes.
#[derive(Debug, serde::Serialize)]
pub struct InferResponse {
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

impl InferResponse {
    /// Checks a response; contents may be raw or typed.
    pub fn checked(response: ModelInferResponse) -> anyhow::Result<Self> {
        let mut raw = response.raw_output_contents.into_iter();
        let outputs = response
            .outputs
            .into_iter()
            .map(|output| {
                let name = output.name.clone();
                self::output(output, raw.next())
                    .with_context(|| format!("the server sent an invalid output '{name}'"))
            })
            .collect::<anyhow::Result<Vec<Output>>>()?;
        ensure!(
            raw.next().is_none(),
            "the server sent more raw contents than outputs"
        );
        let parameters = response.parameters.into_iter();
        Ok(Self {
            model_name: response.model_name,
            model_version: response.model_version,
            parameters: parameters
                .filter_map(|(key, value)| Some((key, json(value.parameter_choice?))))
                .collect(),
            outputs,
        })
    }

    /// A line per row; `label` is the name and the texts of a first column.
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

/// An element in a table.
fn element_text(element: &Element) -> String {
    match element {
        Element::Bool(value) => value.to_string(),
        Element::Signed(value) => value.to_string(),
        Element::Unsigned(value) => value.to_string(),
        Element::Float32(value) => format!("{value:.4}"),
        Element::Float64(value) => format!("{value:.4}"),
        Element::Text(text) => print::short(text, TEXT_COLUMNS),
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
        return element_text(&elements.at(first));
    }
    let indices = first..first + width;
    let mut text: Vec<String> = indices
        .clone()
        .take(FIRST_VALUES)
        .map(|index| element_text(&elements.at(index)))
        .collect();
    if width > FIRST_VALUES {
        text.push("…".to_owned());
    }
    let mut text = text.join(" ");
    let squares: Option<f64> = indices
        .map(|index| elements.at(index).number().map(|value| value * value))
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
            &NestedArray {
                elements: &elements,
                sizes: sizes_written,
                first: 0,
            },
        )?;
        output.end()
    }
}

/// A part of a tensor as nested arrays.
struct NestedArray<'a> {
    elements: &'a Elements<'a>,
    sizes: &'a [usize],
    first: usize,
}

impl Serialize for NestedArray<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Some((&length, sizes)) = self.sizes.split_first() else {
            return match self.elements.at(self.first) {
                Element::Bool(value) => serializer.serialize_bool(value),
                Element::Signed(value) => serializer.serialize_i64(value),
                Element::Unsigned(value) => serializer.serialize_u64(value),
                Element::Float32(value) => serializer.serialize_f32(value),
                Element::Float64(value) => serializer.serialize_f64(value),
                Element::Text(text) => serializer.serialize_str(&text),
            };
        };
        let stride: usize = sizes.iter().product();
        let mut array = serializer.serialize_seq(Some(length))?;
        for index in 0..length {
            array.serialize_element(&NestedArray {
                elements: self.elements,
                sizes,
                first: self.first + index * stride,
            })?;
        }
        array.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn response(datatype: &str, shape: &[i64], raw: Vec<u8>) -> anyhow::Result<InferResponse> {
        InferResponse::checked(ModelInferResponse {
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
        let response = response("FP32", &[2, 2], floats(&[0.1, 2.0, -3.5, 4.0])).unwrap();
        assert_eq!(
            serde_json::to_string(&response).unwrap(),
            "{\"model_name\":\"m\",\"model_version\":\"1\",\"outputs\":[{\"name\":\"out\",\
             \"datatype\":\"FP32\",\"shape\":[2,2],\"data\":[[0.1,2.0],[-3.5,4.0]]}]}"
        );
    }

    #[test]
    fn vectors_are_abbreviated_in_the_table() {
        let response = response("FP32", &[1, 6], floats(&[3.0, 4.0, 0.0, 0.0, 0.0, 0.0])).unwrap();
        let table = response.table(Some(("text".into(), vec!["a lantern".into()])));
        assert!(table.contains("TEXT"), "{table}");
        assert!(
            table.contains("3.0000 4.0000 0.0000 0.0000 … (6, norm 5.0000)"),
            "{table}"
        );
    }

    #[test]
    fn responses_that_contradict_themselves_are_refused() {
        assert!(response("FP32", &[2, 2], floats(&[1.0])).is_err());
        assert!(response("FP99", &[1], floats(&[1.0])).is_err());
        assert!(response("FP32", &[-1], floats(&[1.0])).is_err());
        let empty = response("FP32", &[1 << 40, 0], Vec::new()).unwrap();
        assert!(
            serde_json::to_string(&empty)
                .unwrap()
                .contains("\"data\":[]")
        );
        assert!(empty.table(None).starts_with('#'));
    }
}
