//! Converts the JSON of an inference request and the binary tensors behind it to
//! the message of a gRPC call.

use std::collections::VecDeque;

use bytes::{BufMut, Bytes, BytesMut};
use platform::grpc::{BytesHeld, Message, MessageLimits};
use platform::pool::Cancelled;
use prost::Message as _;
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint, key_len};
use protocol::inference::ModelInferRequest;
use protocol::inference::infer_parameter::ParameterChoice;
use protocol::inference::model_infer_request::{InferInputTensor, InferRequestedOutputTensor};
use protocol::{Error, PARTS_MAX};
use serde::Deserialize;
use serde_json::value::RawValue;
use tensor::{Datatype, Shape, TensorError};
use utoipa::ToSchema;

use super::super::body::{self, Received};
use super::super::context::hold;
use super::super::model_path::PathModel;
use super::super::schemas::{DatatypeSchema, DimensionSchema, ParameterSchema};
use super::super::strict::strict;
use super::super::waiting::while_waiting;
use super::HEADER_LENGTH;
use super::json_data::{DataError, capacity, parse_data};
use super::parameters::{CountedParameters, Parameter, boolean, checked};
use super::response::OutputFormats;

/// The flag and the length before a message.
const PREFIX_BYTES: usize = 5;
/// `raw_input_contents` of a `ModelInferRequest`.
const RAW_CONTENTS: u32 = 7;
const BINARY_SIZE: &str = "binary_data_size";
/// Dimensions of a tensor.
const DIMENSIONS_MAX: usize = Shape::RANK_MAX;

/// An inference request.
#[derive(Deserialize, ToSchema)]
#[serde(remote = "Self", deny_unknown_fields)]
#[schema(example = json!({"inputs": [
    {"name": "text", "datatype": "BYTES", "shape": [1], "data": ["The lantern is lit."]}
]}))]
pub struct InferRequest<'b> {
    /// The caller's id for the request, which the response repeats.
    #[serde(default)]
    id: Option<String>,
    /// The model: that of the path.
    #[serde(default)]
    model_name: Option<String>,
    /// Parameters of the protocol and of the model.
    #[serde(default, borrow)]
    #[schema(value_type = Option<BTreeMap<String, ParameterSchema>>)]
    parameters: Option<&'b RawValue>,
    /// The input tensors.
    #[serde(borrow, deserialize_with = "body::list::<PARTS_MAX, _, _>")]
    inputs: Vec<InferInput<'b>>,
    /// The requested outputs; all by default.
    #[serde(
        default,
        borrow,
        deserialize_with = "body::optional_list::<PARTS_MAX, _, _>"
    )]
    outputs: Option<Vec<InferRequestedOutput<'b>>>,
}

/// An input tensor.
#[derive(Deserialize, ToSchema)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct InferInput<'b> {
    /// Its name.
    name: String,
    /// The datatype of its elements.
    #[schema(value_type = DatatypeSchema)]
    datatype: String,
    /// Its dimensions.
    #[serde(deserialize_with = "body::list::<DIMENSIONS_MAX, _, _>")]
    #[schema(value_type = Vec<DimensionSchema>)]
    shape: Vec<i64>,
    /// `binary_data_size`, if its data is behind the JSON, and `content_type`, the
    /// codec of MLServer that made it.
    #[serde(default, borrow)]
    #[schema(value_type = Option<BTreeMap<String, ParameterSchema>>)]
    parameters: Option<&'b RawValue>,
    /// Its elements in row-major order, flat or nested.
    #[serde(default, borrow)]
    #[schema(value_type = Option<Vec<serde_json::Value>>)]
    data: Option<&'b RawValue>,
}

/// A requested output.
#[derive(Deserialize, ToSchema)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct InferRequestedOutput<'b> {
    /// Its name.
    name: String,
    /// `binary_data`: whether its data is behind the JSON.
    #[serde(default, borrow)]
    #[schema(value_type = Option<BTreeMap<String, ParameterSchema>>)]
    parameters: Option<&'b RawValue>,
}

strict!(object InferRequest<'b>, InferInput<'b>, InferRequestedOutput<'b>);

/// What bounds the reading of a request.
#[derive(Debug, Clone, Copy)]
pub struct Reading<'r> {
    /// The limits of messages, whose bytes are held for the caller.
    pub limits: &'r MessageLimits,
    /// Whether the caller has left.
    pub cancelled: &'r Cancelled,
}

/// An inference request as a gRPC message.
#[derive(Debug)]
pub struct ParsedRequest {
    /// The message without the bytes of the tensors.
    head: ModelInferRequest,
    /// The bytes of each input, in the chunks that they came in.
    raw: Vec<Vec<Bytes>>,
    /// The formats of the response.
    pub formats: OutputFormats,
    /// What the body and the tensors hold of the bytes in flight.
    held: Vec<BytesHeld>,
    counted: CountedParameters,
}

/// Parses a body, of which the first `json_bytes` are JSON, or all of it.
pub fn parse(
    received: Received,
    json_bytes: Option<usize>,
    model: &PathModel,
    reading: Reading<'_>,
) -> Result<ParsedRequest, Error> {
    let json_bytes = json_bytes.unwrap_or(received.length);
    if json_bytes > received.length {
        return Err(Error::invalid(
            HEADER_LENGTH,
            "must be at most the length of the body",
        ));
    }
    let mut binary = BinaryData {
        left: received.length,
        chunks: received.chunks.into(),
    };
    let json = Received {
        length: json_bytes,
        chunks: binary.take(json_bytes).unwrap_or_default(),
        held: None,
    };
    let json = json.joined(&reading.limits.budget)?;
    let request: InferRequest<'_> = while_waiting(reading.cancelled, || body::json(&json))?;
    if request.model_name.is_some_and(|name| name != model.name) {
        return Err(Error::invalid("model_name", "is not the model of the path"));
    }
    let mut parsed = ParsedRequest {
        head: ModelInferRequest {
            model_name: model.name.clone(),
            model_version: model.version.clone(),
            id: request.id.unwrap_or_default(),
            ..Default::default()
        },
        raw: Vec::with_capacity(request.inputs.len()),
        formats: OutputFormats::default(),
        held: received.held.into_iter().collect(),
        counted: CountedParameters::default(),
    };
    parsed.take_parameters(request.parameters)?;
    let mut source = Source {
        json: &json,
        binary: &mut binary,
        reading,
        bytes: 0,
    };
    for (index, input) in request.inputs.into_iter().enumerate() {
        parsed.take_input(index, input, &mut source)?;
    }
    if binary.left > 0 {
        let left = binary.left;
        let reason = format!("{left} bytes of the body belong to no input");
        return Err(Error::invalid("inputs", reason));
    }
    for (index, output) in request.outputs.into_iter().flatten().enumerate() {
        parsed.take_output(index, output)?;
    }
    Ok(parsed)
}

/// Where the bytes of tensors come from.
struct Source<'s> {
    json: &'s Bytes,
    binary: &'s mut BinaryData,
    reading: Reading<'s>,
    /// The bytes of the tensors so far.
    bytes: usize,
}

impl ParsedRequest {
    fn take_parameters(&mut self, parameters: Option<&RawValue>) -> Result<(), Error> {
        const BINARY_OUTPUT: &str = "binary_data_output";
        let mut parameters = self.counted.read(parameters, "")?;
        if let Some(value) = parameters.remove(BINARY_OUTPUT) {
            self.formats.binary = boolean(value, || format!("parameters[{BINARY_OUTPUT}]"))?;
        }
        self.head.parameters = checked(parameters, "")?;
        Ok(())
    }

    fn take_input(
        &mut self,
        index: usize,
        input: InferInput<'_>,
        source: &mut Source<'_>,
    ) -> Result<(), Error> {
        let at = |part: &str| format!("inputs[{index}].{part}");
        let mut parameters = self.counted.read(input.parameters, &at(""))?;
        let size = parameters.remove(BINARY_SIZE);
        let shared_memory = parameters.keys().any(|key| key.starts_with("shared_"));
        let raw = match (size, input.data) {
            (Some(_), Some(_)) => {
                let reason = "must be either in the JSON or behind it";
                return Err(Error::invalid(at("data"), reason));
            }
            (Some(size), None) => {
                source.binary(size, || at(&format!("parameters[{BINARY_SIZE}]")))?
            }
            (None, Some(data)) => {
                let (raw, held) = source.text(index, &input, data)?;
                self.held.push(held);
                vec![raw]
            }
            // The worker reports the error of shared memory.
            (None, None) if shared_memory => Vec::new(),
            (None, None) => return Err(Error::invalid(at("data"), "is required")),
        };
        self.raw.push(raw);
        self.head.inputs.push(InferInputTensor {
            name: input.name,
            datatype: input.datatype,
            shape: input.shape,
            parameters: checked(parameters, &at(""))?,
            contents: None,
        });
        Ok(())
    }

    fn take_output(&mut self, index: usize, output: InferRequestedOutput<'_>) -> Result<(), Error> {
        let at = format!("outputs[{index}].");
        let mut parameters = self.counted.read(output.parameters, &at)?;
        if let Some(value) = parameters.remove("binary_data") {
            let binary = boolean(value, || format!("{at}parameters[binary_data]"))?;
            self.formats.outputs.insert(output.name.clone(), binary);
        }
        self.head.outputs.push(InferRequestedOutputTensor {
            name: output.name,
            parameters: checked(parameters, &at)?,
        });
        Ok(())
    }

    /// The message, which has the limits of one that came by gRPC, and the formats
    /// of the response. The body is given back.
    pub fn into_message(self, limits: &MessageLimits) -> Result<(Message, OutputFormats), Error> {
        let length = PREFIX_BYTES + self.message_bytes();
        if length > limits.message_bytes_max {
            return Err(Error::too_large(length, limits.message_bytes_max));
        }
        let held = hold(&limits.budget, length)?;
        let message = Message::from_framed(self.framed()).with_held(Some(held));
        Ok((message, self.formats))
    }

    fn message_bytes(&self) -> usize {
        let field =
            |length: usize| key_len(RAW_CONTENTS) + encoded_len_varint(length as u64) + length;
        let raw = self.raw.iter().map(|chunks| field(bytes(chunks)));
        self.head.encoded_len() + raw.sum::<usize>()
    }

    /// The encoded message with its prefix. The tensors' bytes are its last
    /// fields, and are copied here and nowhere else.
    fn framed(&self) -> Bytes {
        let length = self.message_bytes();
        let mut framed = BytesMut::with_capacity(PREFIX_BYTES + length);
        framed.put_u8(0);
        framed.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
        // The buffer has the length that prost requested.
        let _ = self.head.encode(&mut framed);
        for chunks in &self.raw {
            encode_key(RAW_CONTENTS, WireType::LengthDelimited, &mut framed);
            encode_varint(bytes(chunks) as u64, &mut framed);
            for chunk in chunks {
                framed.put_slice(chunk);
            }
        }
        framed.freeze()
    }
}

fn bytes(chunks: &[Bytes]) -> usize {
    chunks.iter().map(Bytes::len).sum()
}

impl Source<'_> {
    /// The next bytes behind the JSON.
    fn binary(&mut self, size: Parameter, field: impl Fn() -> String) -> Result<Vec<Bytes>, Error> {
        let size = match size.0 {
            Some(ParameterChoice::Int64Param(size)) => usize::try_from(size).ok(),
            _ => None,
        };
        let size = size.ok_or_else(|| Error::invalid(field(), "must be a number of bytes"))?;
        let left = self.binary.left;
        let taken = self.binary.take(size);
        taken.ok_or_else(|| {
            let reason = format!("is {size}, but {left} bytes are left of the body");
            Error::invalid(field(), reason)
        })
    }

    /// The bytes of a tensor in JSON. Its datatype and shape are checked with the
    /// worker's own checks and messages, and the memory of its bytes is counted
    /// before it is made.
    fn text(
        &mut self,
        index: usize,
        input: &InferInput<'_>,
        data: &RawValue,
    ) -> Result<(Bytes, BytesHeld), Error> {
        let at = |part: &str| format!("inputs[{index}].{part}");
        let datatype: Datatype = input
            .datatype
            .parse()
            .map_err(|error: TensorError| Error::invalid(at("datatype"), error.to_string()))?;
        let shape = Shape::checked(&input.shape)
            .map_err(|error| Error::invalid(at("shape"), error.to_string()))?;
        let text = data.get();
        let capacity = capacity(text, datatype, &shape);
        let limits = self.reading.limits;
        self.bytes = self.bytes.saturating_add(capacity);
        if datatype != Datatype::Bytes && self.bytes > limits.message_bytes_max {
            return Err(Error::too_large(self.bytes, limits.message_bytes_max));
        }
        let mut held = hold(&limits.budget, capacity)?;
        let raw = parse_data(text, datatype, &shape, self.reading.cancelled);
        let raw = raw.map_err(|error| self.data_error(index, text, &error))?;
        held.shrink(raw.capacity());
        Ok((raw.into(), held))
    }

    /// An error of the data, with its line and column in the JSON.
    fn data_error(&self, index: usize, text: &str, error: &DataError) -> Error {
        let at = |part: &str| format!("inputs[{index}].{part}");
        let field = match error.element {
            Some(element) => at(&format!("data[{element}]")),
            None => at("data"),
        };
        // The text is a slice of the JSON.
        let json = self.json;
        let begins = (text.as_ptr() as usize).saturating_sub(json.as_ptr() as usize);
        let before = json.get(..begins + error.offset).unwrap_or_default();
        let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
        let column = before
            .iter()
            .rev()
            .take_while(|byte| **byte != b'\n')
            .count()
            + 1;
        let reason = &error.reason;
        Error::invalid(field, format!("{reason} (line {line}, column {column})"))
    }
}

/// The bytes of a body in the chunks that they came in.
struct BinaryData {
    chunks: VecDeque<Bytes>,
    left: usize,
}

impl BinaryData {
    /// The next `count` bytes, without a copy; none if fewer are left.
    fn take(&mut self, count: usize) -> Option<Vec<Bytes>> {
        self.left = self.left.checked_sub(count)?;
        let (mut chunks, mut remaining) = (Vec::new(), count);
        while remaining > 0 {
            let mut chunk = self.chunks.pop_front()?;
            if chunk.len() > remaining {
                self.chunks.push_front(chunk.split_off(remaining));
            }
            remaining -= chunk.len();
            chunks.push(chunk);
        }
        Some(chunks)
    }
}

#[cfg(test)]
mod tests;
