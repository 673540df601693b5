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
use super::parameters::{self, CountedParameters, Parameter, boolean, checked};
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
    id: String,
    /// Parameters of the protocol and of the model.
    #[serde(default, borrow, deserialize_with = "parameters::given")]
    #[schema(value_type = BTreeMap<String, ParameterSchema>)]
    parameters: Option<&'b RawValue>,
    /// The input tensors.
    #[serde(borrow, deserialize_with = "body::list::<PARTS_MAX, _, _>")]
    inputs: Vec<InferInput<'b>>,
    /// The requested outputs; all by default.
    #[serde(default, borrow, deserialize_with = "body::list::<PARTS_MAX, _, _>")]
    outputs: Vec<InferRequestedOutput<'b>>,
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
    /// `binary_data_size`, if its data is behind the JSON.
    #[serde(default, borrow, deserialize_with = "parameters::given")]
    #[schema(value_type = BTreeMap<String, ParameterSchema>)]
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
    #[serde(default, borrow, deserialize_with = "parameters::given")]
    #[schema(value_type = BTreeMap<String, ParameterSchema>)]
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
    let mut parsed = ParsedRequest {
        head: ModelInferRequest {
            model_name: model.name.clone(),
            model_version: model.version.clone(),
            id: request.id,
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
    for (index, output) in request.outputs.into_iter().enumerate() {
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
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn model() -> PathModel {
        PathModel {
            name: "digits".to_owned(),
            version: "1".to_owned(),
        }
    }

    fn received(body: &[u8], chunk_bytes: usize) -> Received {
        Received {
            chunks: body
                .chunks(chunk_bytes)
                .map(Bytes::copy_from_slice)
                .collect(),
            length: body.len(),
            held: None,
        }
    }

    fn parse(
        received: Received,
        json_bytes: Option<usize>,
        model: &PathModel,
    ) -> Result<ParsedRequest, Error> {
        let limits = MessageLimits::new(64 << 20, 256 << 20);
        let reading = Reading {
            limits: &limits,
            cancelled: &Cancelled::never(),
        };
        super::parse(received, json_bytes, model, reading)
    }

    /// The message that a worker reads.
    fn message(parsed: &ParsedRequest) -> ModelInferRequest {
        let framed = parsed.framed();
        let length = u32::from_be_bytes([framed[1], framed[2], framed[3], framed[4]]);
        assert_eq!(length as usize, framed.len() - 5);
        ModelInferRequest::decode(framed.slice(5..)).unwrap()
    }

    fn parse_json(body: &serde_json::Value) -> Result<ParsedRequest, Error> {
        parse(received(body.to_string().as_bytes(), 7), None, &model())
    }

    fn field(body: &serde_json::Value) -> String {
        let error = parse_json(body).unwrap_err();
        error.field().unwrap().to_string()
    }

    #[test]
    fn text_and_bytes_become_the_same_message() {
        let values = [1.5_f32, -2.25, 0.1];
        let raw: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let text = json!({
            "id": "a",
            "parameters": {"truncate": true, "priority": 2, "ratio": 0.5, "mode": "x"},
            "inputs": [{"name": "p", "datatype": "FP32", "shape": [1, 3], "data": [values]}],
            "outputs": [{"name": "o"}],
        });
        let head = json!({
            "id": "a",
            "parameters": {"truncate": true, "priority": 2, "ratio": 0.5, "mode": "x"},
            "inputs": [{"name": "p", "datatype": "FP32", "shape": [1, 3],
                "parameters": {"binary_data_size": raw.len()}}],
            "outputs": [{"name": "o", "parameters": {"binary_data": true}}],
        })
        .to_string();
        let from_text = parse_json(&text).unwrap();
        for chunk_bytes in [1, 5, 1000] {
            let body = [head.as_bytes(), &raw].concat();
            let from_bytes =
                parse(received(&body, chunk_bytes), Some(head.len()), &model()).unwrap();
            assert_eq!(message(&from_bytes), message(&from_text));
            assert!(from_bytes.formats.outputs["o"]);
        }
        let message = message(&from_text);
        assert_eq!(message.model_name, "digits");
        assert_eq!(message.model_version, "1");
        assert_eq!(message.raw_input_contents, [raw]);
        let ratio = message.parameters["ratio"].parameter_choice.clone();
        assert_eq!(ratio, Some(ParameterChoice::DoubleParam(0.5)));
    }

    #[test]
    fn binary_tensors_are_not_copied_before_the_message() {
        let head = json!({"inputs": [
            {"name": "a", "datatype": "UINT8", "shape": [3], "parameters": {"binary_data_size": 3}},
            {"name": "b", "datatype": "UINT8", "shape": [2], "parameters": {"binary_data_size": 2}},
        ]})
        .to_string();
        let body = Bytes::from([head.as_bytes(), b"abcde"].concat());
        let received = Received {
            length: body.len(),
            chunks: vec![body.clone()],
            held: None,
        };
        let parsed = parse(received, Some(head.len()), &model()).unwrap();
        assert_eq!(parsed.raw[0][0].as_ptr(), body[head.len()..].as_ptr());
        assert_eq!(message(&parsed).raw_input_contents, ["abc", "de"]);
    }

    #[test]
    fn invalid_fields_are_named() {
        let input = |part: serde_json::Value| {
            let mut input = json!({"name": "p", "datatype": "FP32", "shape": [2], "data": [1, 2]});
            for (key, value) in part.as_object().unwrap() {
                let input = input.as_object_mut().unwrap();
                if value.is_null() {
                    input.remove(key);
                } else {
                    input.insert(key.clone(), value.clone());
                }
            }
            json!({"inputs": [input]})
        };
        for (body, expected) in [
            (json!({}), "inputs"),
            (json!({"inputs": 5}), "inputs"),
            (json!({"inputs": [], "extra": 1}), "extra"),
            (input(json!({"extra": 1})), "inputs[0].extra"),
            (input(json!({"name": null})), "inputs[0].name"),
            (input(json!({"shape": [1, "2"]})), "inputs[0].shape[1]"),
            (input(json!({"shape": [-2]})), "inputs[0].shape"),
            (input(json!({"datatype": "FLOAT"})), "inputs[0].datatype"),
            (input(json!({"data": [1, "NaN"]})), "inputs[0].data[1]"),
            (input(json!({"data": [1]})), "inputs[0].data"),
            (input(json!({"data": null})), "inputs[0].data"),
            (
                input(json!({"parameters": {"binary_data_size": 4}})),
                "inputs[0].data",
            ),
            (
                input(json!({"data": null, "parameters": {"binary_data_size": 4}})),
                "inputs[0].parameters[binary_data_size]",
            ),
            (
                input(json!({"parameters": {"x": [[1]]}})),
                "inputs[0].parameters[x]",
            ),
            (
                json!({"inputs": [], "parameters": {"binary_data_output": 1}}),
                "parameters[binary_data_output]",
            ),
            (
                json!({"inputs": [], "outputs": [{"name": "o", "parameters": {"binary_data": 1}}]}),
                "outputs[0].parameters[binary_data]",
            ),
        ] {
            assert_eq!(field(&body), expected, "{body}");
        }
    }

    #[test]
    fn a_wrong_element_has_its_line_and_column() {
        let body = "{\"inputs\": [{\"name\": \"p\", \"datatype\": \"INT8\",\n \"shape\": [2],\n \"data\": [1,\n  300]}]}";
        let error = parse(received(body.as_bytes(), 1000), None, &model()).unwrap_err();
        assert_eq!(error.violation().unwrap().field, "inputs[0].data[1]");
        assert!(error.to_string().contains("line 4, column 3"), "{error}");
        let error = parse(
            received(body.replace("300", "NaN").as_bytes(), 1000),
            None,
            &model(),
        )
        .unwrap_err();
        assert_eq!(error.violation().unwrap().field, "inputs[0].data");
        assert!(error.to_string().contains("line 4, column 3"), "{error}");
    }

    #[test]
    fn counts_are_bounded_while_they_are_read() {
        let input = |shape: &str, parameters: &str| {
            format!(
                r#"{{"name": "p", "datatype": "INT8", "shape": {shape}, "parameters": {parameters}, "data": []}}"#
            )
        };
        let map = |from: usize, count: usize| {
            let entries = (from..from + count).map(|number| format!("\"p{number}\": 1"));
            format!("{{{}}}", entries.collect::<Vec<_>>().join(","))
        };
        let list = |entry: &str, count: usize| vec![entry; count].join(",");
        let one = input("[0]", "{}");
        let most = format!(r#"{{"inputs": [{}]}}"#, list(&one, PARTS_MAX));
        let of = |body: &str| parse(received(body.as_bytes(), 1 << 20), None, &model());
        assert_eq!(of(&most).unwrap().head.inputs.len(), PARTS_MAX);
        let dimensions = format!("[{}]", list("0", DIMENSIONS_MAX + 1));
        let half = map(0, PARTS_MAX / 2);
        for (body, field) in [
            (
                format!(r#"{{"inputs": [{}]}}"#, list(&one, PARTS_MAX + 1)),
                "inputs",
            ),
            (
                format!(
                    r#"{{"inputs": [], "outputs": [{}]}}"#,
                    list(r#"{"name": "o"}"#, PARTS_MAX + 1)
                ),
                "outputs",
            ),
            (
                format!(r#"{{"inputs": [{}]}}"#, input(&dimensions, "{}")),
                "inputs[0].shape",
            ),
            (
                format!(
                    r#"{{"inputs": [], "parameters": {}}}"#,
                    map(0, PARTS_MAX + 1)
                ),
                "parameters",
            ),
            (
                format!(
                    r#"{{"inputs": [{one}, {}], "parameters": {half}}}"#,
                    input("[0]", &map(0, PARTS_MAX / 2 + 1))
                ),
                "inputs[1].parameters",
            ),
        ] {
            let error = of(&body).unwrap_err();
            assert_eq!(error.violation().unwrap().field, field);
            assert!(error.to_string().contains("4096") || field.ends_with("shape"));
        }
    }

    #[test]
    fn what_numbers_become_is_reserved_before_it_is_made() {
        let count = 100_000;
        let data = vec!["0"; count].join(",");
        let body = format!(
            r#"{{"inputs": [{{"name": "p", "datatype": "FP64", "shape": [{count}], "data": [{data}]}}]}}"#
        );
        let read = |limits: &MessageLimits| {
            let reading = Reading {
                limits,
                cancelled: &Cancelled::never(),
            };
            let received = received(body.as_bytes(), 1 << 20);
            super::parse(received, None, &model(), reading)?.into_message(limits)
        };
        let limits = MessageLimits::new(1 << 20, 4 << 20);
        let (message, _) = read(&limits).unwrap();
        assert_eq!(limits.budget.used(), message.framed().len());
        // The tensor's bytes and the message are there at the same time.
        let full = read(&MessageLimits::new(1 << 20, 15 * count)).unwrap_err();
        assert_eq!(full.kind(), protocol::Kind::Overloaded);
        let long = read(&MessageLimits::new(7 * count, 4 << 20)).unwrap_err();
        assert_eq!(long.kind(), protocol::Kind::TooLarge);
        drop(message);
        assert_eq!(limits.budget.used(), 0);
    }

    #[test]
    fn wrong_lengths_are_refused() {
        let head = r#"{"inputs": []}"#;
        let over = parse(received(head.as_bytes(), 100), Some(100), &model()).unwrap_err();
        assert_eq!(over.violation().unwrap().field, HEADER_LENGTH);
        let body = format!("{head}rest");
        let left = parse(received(body.as_bytes(), 100), Some(head.len()), &model()).unwrap_err();
        assert_eq!(left.violation().unwrap().field, "inputs");
    }

    proptest! {
        #[test]
        fn no_bytes_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..300),
            json_bytes in proptest::option::of(0_usize..400),
            chunk_bytes in 1_usize..50,
        ) {
            let _ = parse(received(&bytes, chunk_bytes), json_bytes, &model());
        }

        #[test]
        fn no_json_panics(
            data in "[\\[\\]{}\",0-9a-z.+\\\\ -]{0,40}",
            datatype in proptest::sample::select(&Datatype::ALL[..]),
            shape in proptest::collection::vec(-1_i64..5, 0..4),
            size in proptest::option::of(any::<i64>()),
        ) {
            let parameters = size.map_or(json!({}), |size| json!({"binary_data_size": size}));
            let body = format!(
                "{{\"inputs\": [{{\"name\": \"p\", \"datatype\": \"{datatype}\", \"shape\": {shape:?}, \"parameters\": {parameters}, \"data\": {data}}}]}}"
            );
            if let Ok(parsed) = parse(received(body.as_bytes(), 11), None, &model()) {
                message(&parsed);
            }
        }

        #[test]
        fn floats_keep_their_bits(values in proptest::collection::vec(any::<f32>(), 1..50)) {
            let values: Vec<f32> = values.into_iter().filter(|v| v.is_finite()).collect();
            let body = json!({"inputs": [
                {"name": "p", "datatype": "FP32", "shape": [values.len()], "data": values}
            ]});
            let raw: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            prop_assert_eq!(&message(&parse_json(&body).unwrap()).raw_input_contents[0], &raw);
        }
    }
}
