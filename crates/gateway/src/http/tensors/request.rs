//! The JSON of an inference request and the binary tensors behind it, to the
//! message of the gRPC door.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt;

use bytes::{BufMut, Bytes, BytesMut};
use prost::Message;
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint, key_len};
use protocol::Error;
use protocol::inference::infer_parameter::ParameterChoice;
use protocol::inference::model_infer_request::{InferInputTensor, InferRequestedOutputTensor};
use protocol::inference::{InferParameter, ModelInferRequest};
use serde::Deserialize;
use serde::de::{IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;
use tensor::{Datatype, Shape, TensorError};
use utoipa::ToSchema;

use super::super::body::{self, Received};
use super::super::openapi::rest::{DatatypeForm, DimensionForm, ParameterForm};
use super::super::rest::Model;
use super::super::strict::strict;
use super::HEADER_LENGTH;
use super::scan::scan;

/// `raw_input_contents` of a `ModelInferRequest`.
const RAW_CONTENTS: u32 = 7;
const BINARY_SIZE: &str = "binary_data_size";

/// What the caller sends.
#[derive(Deserialize, ToSchema)]
#[serde(remote = "Self", deny_unknown_fields)]
#[schema(as = InferRequest, example = json!({"inputs": [
    {"name": "text", "datatype": "BYTES", "shape": [1], "data": ["The lantern is lit."]}
]}))]
pub struct Asked<'b> {
    /// The caller's id for the request, which comes back.
    #[serde(default)]
    id: String,
    /// Those of the protocol and the model's own.
    #[serde(default)]
    #[schema(value_type = BTreeMap<String, ParameterForm>)]
    parameters: Parameters,
    /// What goes in.
    #[serde(borrow)]
    inputs: Vec<AskedInput<'b>>,
    /// What is wanted; all if there are none.
    #[serde(default)]
    outputs: Vec<AskedOutput>,
}

/// A tensor that goes in.
#[derive(Deserialize, ToSchema)]
#[serde(remote = "Self", deny_unknown_fields)]
#[schema(as = InferInput)]
pub struct AskedInput<'b> {
    /// Its name.
    name: String,
    /// What its elements are.
    #[schema(value_type = DatatypeForm)]
    datatype: String,
    /// Its dimensions.
    #[schema(value_type = Vec<DimensionForm>)]
    shape: Vec<i64>,
    /// `binary_data_size`, where its data comes behind the JSON.
    #[serde(default)]
    #[schema(value_type = BTreeMap<String, ParameterForm>)]
    parameters: Parameters,
    /// Its elements in rows, flat or nested.
    #[serde(default, borrow)]
    #[schema(value_type = Option<Vec<serde_json::Value>>)]
    data: Option<&'b RawValue>,
}

/// An output that is wanted.
#[derive(Deserialize, ToSchema)]
#[serde(remote = "Self", deny_unknown_fields)]
#[schema(as = InferRequestedOutput)]
pub struct AskedOutput {
    /// Its name.
    name: String,
    /// `binary_data`: whether it comes behind the JSON.
    #[serde(default)]
    #[schema(value_type = BTreeMap<String, ParameterForm>)]
    parameters: Parameters,
}

strict!(object Asked<'b>, AskedInput<'b>, AskedOutput);

type Parameters = BTreeMap<String, Parameter>;

/// A parameter's value; none where it is of a kind that no parameter has.
struct Parameter(Option<ParameterChoice>);

impl<'de> Deserialize<'de> for Parameter {
    fn deserialize<D: serde::Deserializer<'de>>(reader: D) -> Result<Self, D::Error> {
        reader.deserialize_any(AnyParameter)
    }
}

struct AnyParameter;

impl<'de> Visitor<'de> for AnyParameter {
    type Value = Parameter;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a boolean, a number or a text")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Parameter, E> {
        Ok(Parameter(Some(ParameterChoice::BoolParam(value))))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Parameter, E> {
        Ok(Parameter(Some(ParameterChoice::Int64Param(value))))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Parameter, E> {
        let choice = match i64::try_from(value) {
            Ok(value) => ParameterChoice::Int64Param(value),
            Err(_) => ParameterChoice::Uint64Param(value),
        };
        Ok(Parameter(Some(choice)))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Parameter, E> {
        Ok(Parameter(Some(ParameterChoice::DoubleParam(value))))
    }

    fn visit_str<E>(self, value: &str) -> Result<Parameter, E> {
        let choice = ParameterChoice::StringParam(value.to_owned());
        Ok(Parameter(Some(choice)))
    }

    fn visit_unit<E>(self) -> Result<Parameter, E> {
        Ok(Parameter(None))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut rest: A) -> Result<Parameter, A::Error> {
        while rest.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Parameter(None))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut rest: A) -> Result<Parameter, A::Error> {
        while rest.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Parameter(None))
    }
}

/// How outputs are answered.
#[derive(Debug, Default, PartialEq)]
pub struct Forms {
    /// As bytes, unless an output says otherwise.
    pub binary: bool,
    /// What single outputs say.
    pub outputs: HashMap<String, bool>,
}

/// A request in the terms of the gRPC door.
#[derive(Debug)]
pub struct Read {
    /// Everything but the tensors' bytes.
    head: ModelInferRequest,
    /// The bytes of each input, in the pieces that they came in.
    raw: Vec<Vec<Bytes>>,
    /// How the answer is to be written.
    pub forms: Forms,
}

/// Reads a body. `json_bytes` is how much of it is JSON, if not all.
pub fn read(received: Received, json_bytes: Option<usize>, model: &Model) -> Result<Read, Error> {
    let json_bytes = json_bytes.unwrap_or(received.length);
    if json_bytes > received.length {
        return Err(Error::invalid(HEADER_LENGTH, "is more than the body has"));
    }
    let mut blobs = Blobs {
        left: received.length,
        chunks: received.chunks.into(),
    };
    let json = joined(blobs.take(json_bytes).unwrap_or_default());
    let asked: Asked<'_> = body::json(&json)?;
    let mut read = Read {
        head: ModelInferRequest {
            model_name: model.name.clone(),
            model_version: model.version.clone(),
            id: asked.id,
            ..Default::default()
        },
        raw: Vec::with_capacity(asked.inputs.len()),
        forms: Forms::default(),
    };
    read.take_parameters(asked.parameters)?;
    for (index, input) in asked.inputs.into_iter().enumerate() {
        read.take_input(index, input, &json, &mut blobs)?;
    }
    if blobs.left > 0 {
        let left = blobs.left;
        let reason = format!("{left} bytes of the body belong to no input");
        return Err(Error::invalid("inputs", reason));
    }
    for (index, output) in asked.outputs.into_iter().enumerate() {
        read.take_output(index, output)?;
    }
    Ok(read)
}

impl Read {
    fn take_parameters(&mut self, mut parameters: Parameters) -> Result<(), Error> {
        const BINARY_OUTPUT: &str = "binary_data_output";
        if let Some(value) = parameters.remove(BINARY_OUTPUT) {
            self.forms.binary = boolean(value, || format!("parameters[{BINARY_OUTPUT}]"))?;
        }
        self.head.parameters = checked(parameters, "")?;
        Ok(())
    }

    fn take_input(
        &mut self,
        index: usize,
        mut input: AskedInput<'_>,
        json: &Bytes,
        blobs: &mut Blobs,
    ) -> Result<(), Error> {
        let at = |part: &str| format!("inputs[{index}].{part}");
        let size = input.parameters.remove(BINARY_SIZE);
        let elsewhere = input
            .parameters
            .keys()
            .any(|key| key.starts_with("shared_"));
        let raw = match (size, input.data) {
            (Some(_), Some(_)) => {
                let reason = "stands in the JSON and behind it: give one";
                return Err(Error::invalid(at("data"), reason));
            }
            (Some(size), None) => {
                let field = || at(&format!("parameters[{BINARY_SIZE}]"));
                let size = match size.0 {
                    Some(ParameterChoice::Int64Param(size)) => usize::try_from(size).ok(),
                    _ => None,
                };
                let size =
                    size.ok_or_else(|| Error::invalid(field(), "must be a number of bytes"))?;
                let left = blobs.left;
                blobs.take(size).ok_or_else(|| {
                    let reason = format!("is {size}, but {left} bytes are left of the body");
                    Error::invalid(field(), reason)
                })?
            }
            (None, Some(data)) => vec![from_text(index, &input, data, json)?.into()],
            // The worker says what is wrong with shared memory.
            (None, None) if elsewhere => Vec::new(),
            (None, None) => return Err(Error::invalid(at("data"), "is missing")),
        };
        self.raw.push(raw);
        self.head.inputs.push(InferInputTensor {
            name: input.name,
            datatype: input.datatype,
            shape: input.shape,
            parameters: checked(input.parameters, &at(""))?,
            contents: None,
        });
        Ok(())
    }

    fn take_output(&mut self, index: usize, mut output: AskedOutput) -> Result<(), Error> {
        let at = format!("outputs[{index}].");
        if let Some(value) = output.parameters.remove("binary_data") {
            let binary = boolean(value, || format!("{at}parameters[binary_data]"))?;
            self.forms.outputs.insert(output.name.clone(), binary);
        }
        self.head.outputs.push(InferRequestedOutputTensor {
            name: output.name,
            parameters: checked(output.parameters, &at)?,
        });
        Ok(())
    }

    /// The encoded message with its prefix. The tensors' bytes are its last
    /// fields, and are copied here and nowhere else.
    pub fn framed(&self) -> Bytes {
        let bytes = |pieces: &[Bytes]| pieces.iter().map(Bytes::len).sum::<usize>();
        let field =
            |length: usize| key_len(RAW_CONTENTS) + encoded_len_varint(length as u64) + length;
        let raw: usize = self.raw.iter().map(|pieces| field(bytes(pieces))).sum();
        let length = self.head.encoded_len() + raw;
        let mut framed = BytesMut::with_capacity(5 + length);
        framed.put_u8(0);
        framed.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
        // The buffer has the length that prost asked for.
        let _ = self.head.encode(&mut framed);
        for pieces in &self.raw {
            encode_key(RAW_CONTENTS, WireType::LengthDelimited, &mut framed);
            encode_varint(bytes(pieces) as u64, &mut framed);
            for piece in pieces {
                framed.put_slice(piece);
            }
        }
        framed.freeze()
    }
}

fn boolean(value: Parameter, field: impl Fn() -> String) -> Result<bool, Error> {
    match value.0 {
        Some(ParameterChoice::BoolParam(value)) => Ok(value),
        _ => Err(Error::invalid(field(), "must be a boolean")),
    }
}

fn checked(parameters: Parameters, before: &str) -> Result<HashMap<String, InferParameter>, Error> {
    let checked = |(key, value): (String, Parameter)| match value.0 {
        None => {
            let field = format!("{before}parameters[{key}]");
            Err(Error::invalid(
                field,
                "must be a boolean, a number or a text",
            ))
        }
        parameter_choice => Ok((key, InferParameter { parameter_choice })),
    };
    parameters.into_iter().map(checked).collect()
}

/// The bytes of a tensor in JSON. Its datatype and shape are checked as the
/// worker would, in the same words.
fn from_text(
    index: usize,
    input: &AskedInput<'_>,
    data: &RawValue,
    json: &Bytes,
) -> Result<Vec<u8>, Error> {
    let at = |part: &str| format!("inputs[{index}].{part}");
    let datatype: Datatype = input
        .datatype
        .parse()
        .map_err(|error: TensorError| Error::invalid(at("datatype"), error.to_string()))?;
    let shape = Shape::checked(&input.shape)
        .map_err(|error| Error::invalid(at("shape"), error.to_string()))?;
    let text = data.get();
    scan(text, datatype, &shape).map_err(|wrong| {
        let field = match wrong.element {
            Some(element) => at(&format!("data[{element}]")),
            None => at("data"),
        };
        // The text is a part of the JSON.
        let begins = (text.as_ptr() as usize).saturating_sub(json.as_ptr() as usize);
        let before = json.get(..begins + wrong.offset).unwrap_or_default();
        let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
        let column = before
            .iter()
            .rev()
            .take_while(|byte| **byte != b'\n')
            .count()
            + 1;
        let reason = wrong.reason;
        Error::invalid(field, format!("{reason} (line {line}, column {column})"))
    })
}

/// A body's bytes in the pieces that they came in.
struct Blobs {
    chunks: VecDeque<Bytes>,
    left: usize,
}

impl Blobs {
    /// The next bytes, without a copy; none if there are not so many.
    fn take(&mut self, count: usize) -> Option<Vec<Bytes>> {
        self.left = self.left.checked_sub(count)?;
        let (mut pieces, mut wanted) = (Vec::new(), count);
        while wanted > 0 {
            let mut chunk = self.chunks.pop_front()?;
            if chunk.len() > wanted {
                self.chunks.push_front(chunk.split_off(wanted));
            }
            wanted -= chunk.len();
            pieces.push(chunk);
        }
        Some(pieces)
    }
}

fn joined(pieces: Vec<Bytes>) -> Bytes {
    Received {
        chunks: pieces,
        ..Received::default()
    }
    .joined()
}

#[cfg(test)]
mod tests;
