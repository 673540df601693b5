//! Writes an inference response as JSON, with binary tensors behind it.

use std::collections::{HashMap, VecDeque};
use std::pin::Pin;
use std::task::{Context, Poll};

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderName, HeaderValue};
use http_body::{Frame, SizeHint};
use platform::pool::Cancelled;
use prost::Message as _;
use protocol::inference::infer_parameter::ParameterChoice;
use protocol::inference::model_infer_response::InferOutputTensor;
use protocol::inference::{InferParameter, ModelInferResponse};
use protocol::{Error, Kind};
use serde_json::{Map, Value, json};
use tensor::{Datatype, bytes_elements};

use super::super::context::{CallResponse, RequestContext};
use super::super::reply::{Written, counted};
use super::{HEADER_LENGTH, not_json};

/// The formats of the outputs.
#[derive(Debug, Default, PartialEq)]
pub struct OutputFormats {
    /// Whether outputs are binary by default.
    pub binary: bool,
    /// Whether single outputs are binary.
    pub outputs: HashMap<String, bool>,
}

impl OutputFormats {
    /// Whether an output is binary.
    pub fn is_binary(&self, output: &str) -> bool {
        self.outputs.get(output).copied().unwrap_or(self.binary)
    }
}

/// Writes a response in the requested formats: on a thread for work if much of it
/// becomes JSON.
pub async fn write(
    context: &RequestContext,
    response: CallResponse<ModelInferResponse>,
    formats: OutputFormats,
) -> Result<Response, Error> {
    let CallResponse {
        message,
        headers,
        held,
    } = response;
    let json_bytes = message.encoded_len() - binary_bytes(&message, &formats);
    let budget = context.limits.budget.clone();
    let write = move |cancelled: &Cancelled| {
        let mut written = Written::new(&budget, cancelled)?;
        let mut chunks = VecDeque::with_capacity(1 + message.outputs.len());
        json(&mut written, &message, &formats, &mut chunks)?;
        let (json, json_held) = written.into_parts();
        Ok((json, chunks, json_held))
    };
    let (json, chunks, json_held) = context.work(json_bytes, write).await?;
    let mut reply = reply(json, chunks);
    reply.headers_mut().extend(headers);
    Ok(counted(reply, (json_held, held)))
}

/// The bytes of tensors that are not written in JSON.
fn binary_bytes(response: &ModelInferResponse, formats: &OutputFormats) -> usize {
    let tensors = response.outputs.iter().zip(&response.raw_output_contents);
    let binary = tensors.filter(|(output, _)| formats.is_binary(&output.name));
    binary.map(|(_, raw)| raw.len()).sum()
}

fn reply(json: Bytes, mut chunks: VecDeque<Bytes>) -> Response {
    let binary = !chunks.is_empty();
    let length = json.len();
    chunks.push_front(json);
    let mut reply = Response::new(Body::new(Chunks(chunks)));
    let headers = reply.headers_mut();
    let kind = if binary {
        let name = HeaderName::from_static(HEADER_LENGTH);
        headers.insert(name, HeaderValue::from(length));
        "application/octet-stream"
    } else {
        "application/json"
    };
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    reply
}

/// Writes the JSON; binary tensors are appended to `binary`.
fn json(
    written: &mut Written<'_>,
    response: &ModelInferResponse,
    formats: &OutputFormats,
    binary: &mut VecDeque<Bytes>,
) -> Result<(), Error> {
    let mut head = Map::new();
    head.insert("model_name".to_owned(), json!(response.model_name));
    head.insert("model_version".to_owned(), json!(response.model_version));
    if !response.id.is_empty() {
        head.insert("id".to_owned(), json!(response.id));
    }
    let parameters = parameters(&response.parameters);
    if !parameters.is_empty() {
        head.insert("parameters".to_owned(), Value::Object(parameters));
    }
    written.json(&head)?;
    // The outputs follow in the same object.
    written.pop();
    written.text(",\"outputs\":[")?;
    for (index, output) in response.outputs.iter().enumerate() {
        if index > 0 {
            written.text(",")?;
        }
        let raw = response.raw_output_contents.get(index);
        let raw = raw.ok_or_else(|| broken("has no contents"))?;
        if formats.is_binary(&output.name) {
            written.json(&head_of(output, Some(raw.len())))?;
            binary.push_back(raw.clone());
        } else {
            written.json(&head_of(output, None))?;
            written.pop();
            written.text(",\"data\":")?;
            write_data(written, output, raw)?;
            written.text("}")?;
        }
    }
    written.text("]}")
}

fn head_of(output: &InferOutputTensor, binary_bytes: Option<usize>) -> Map<String, Value> {
    let mut head = Map::new();
    head.insert("name".to_owned(), json!(output.name));
    head.insert("datatype".to_owned(), json!(output.datatype));
    head.insert("shape".to_owned(), json!(output.shape));
    let mut parameters = parameters(&output.parameters);
    if let Some(bytes) = binary_bytes {
        parameters.insert("binary_data_size".to_owned(), json!(bytes));
    }
    if !parameters.is_empty() {
        head.insert("parameters".to_owned(), Value::Object(parameters));
    }
    head
}

/// The elements as one flat array.
fn write_data(
    written: &mut Written<'_>,
    output: &InferOutputTensor,
    raw: &[u8],
) -> Result<(), Error> {
    let datatype: Datatype = output
        .datatype
        .parse()
        .map_err(|_| broken("has an unknown datatype"))?;
    macro_rules! numbers {
        ($kind:ty) => {{
            let (values, rest) = raw.as_chunks::<{ size_of::<$kind>() }>();
            if !rest.is_empty() {
                return Err(broken("has too few bytes"));
            }
            let values = values.iter().map(|bytes| <$kind>::from_le_bytes(*bytes));
            written.numbers(values)
        }};
    }
    let check_finite = |finite: bool| {
        if finite {
            Ok(())
        } else {
            Err(not_json(
                &output.name,
                "has values that are NaN or infinite",
            ))
        }
    };
    match datatype {
        Datatype::Bool => written.numbers(raw.iter().map(|byte| *byte != 0)),
        Datatype::Uint8 => numbers!(u8),
        Datatype::Uint16 => numbers!(u16),
        Datatype::Uint32 => numbers!(u32),
        Datatype::Uint64 => numbers!(u64),
        Datatype::Int8 => numbers!(i8),
        Datatype::Int16 => numbers!(i16),
        Datatype::Int32 => numbers!(i32),
        Datatype::Int64 => numbers!(i64),
        Datatype::Fp32 => {
            let (values, _) = raw.as_chunks::<4>();
            let mut values = values.iter().map(|bytes| f32::from_le_bytes(*bytes));
            check_finite(values.all(f32::is_finite))?;
            numbers!(f32)
        }
        Datatype::Fp64 => {
            let (values, _) = raw.as_chunks::<8>();
            let mut values = values.iter().map(|bytes| f64::from_le_bytes(*bytes));
            check_finite(values.all(f64::is_finite))?;
            numbers!(f64)
        }
        Datatype::Bytes => {
            let texts = bytes_elements(raw).map(|element| {
                let element = element.map_err(|_| broken("has wrong element lengths"))?;
                std::str::from_utf8(element)
                    .map_err(|_| not_json(&output.name, "has elements that are not UTF-8"))
            });
            strings(written, texts)
        }
        Datatype::Fp16 | Datatype::Bf16 => {
            Err(not_json(&output.name, "has a 16-bit float datatype"))
        }
    }
}

fn strings<'r>(
    written: &mut Written<'_>,
    values: impl Iterator<Item = Result<&'r str, Error>>,
) -> Result<(), Error> {
    written.text("[")?;
    for (index, value) in values.enumerate() {
        if index > 0 {
            written.text(",")?;
        }
        written.json(value?)?;
    }
    written.text("]")
}

fn parameters(given: &HashMap<String, InferParameter>) -> Map<String, Value> {
    let value = |parameter: &InferParameter| {
        Some(match parameter.parameter_choice.as_ref()? {
            ParameterChoice::BoolParam(value) => json!(value),
            ParameterChoice::Int64Param(value) => json!(value),
            ParameterChoice::StringParam(value) => json!(value),
            ParameterChoice::DoubleParam(value) => json!(value),
            ParameterChoice::Uint64Param(value) => json!(value),
        })
    };
    let named = given
        .iter()
        .filter_map(|(name, parameter)| Some((name.clone(), value(parameter)?)));
    named.collect()
}

fn broken(what: &str) -> Error {
    Error::new(Kind::Internal, format!("an output {what}"))
}

/// A body of chunks that are not joined.
struct Chunks(VecDeque<Bytes>);

impl http_body::Body for Chunks {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        Poll::Ready(
            self.get_mut()
                .0
                .pop_front()
                .map(|chunk| Ok(Frame::data(chunk))),
        )
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.0.iter().map(|chunk| chunk.len() as u64).sum())
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;
    use platform::grpc::MessageLimits;
    use proptest::prelude::*;

    use super::*;
    use crate::infer::json_data::parse_data;

    fn response(datatype: &str, shape: &[i64], raw: &[u8]) -> ModelInferResponse {
        ModelInferResponse {
            model_name: "m".into(),
            model_version: "2".into(),
            outputs: vec![InferOutputTensor {
                name: "o".into(),
                datatype: datatype.into(),
                shape: shape.to_vec(),
                ..Default::default()
            }],
            raw_output_contents: vec![Bytes::copy_from_slice(raw)],
            ..Default::default()
        }
    }

    fn written(write: impl FnOnce(&mut Written<'_>) -> Result<(), Error>) -> Result<Bytes, Error> {
        let limits = MessageLimits::new(1 << 20, 1 << 20);
        let never = Cancelled::never();
        let mut written = Written::new(&limits.budget, &never)?;
        write(&mut written)?;
        Ok(written.into_parts().0)
    }

    fn data(datatype: &str, raw: &[u8]) -> Result<Value, Error> {
        let mut chunks = VecDeque::new();
        let response = response(datatype, &[1], raw);
        let formats = OutputFormats::default();
        let json = written(|written| json(written, &response, &formats, &mut chunks))?;
        assert!(chunks.is_empty());
        let json: Value = serde_json::from_slice(&json).unwrap();
        assert_eq!(json["model_version"], "2");
        Ok(json["outputs"][0]["data"].clone())
    }

    #[tokio::test]
    async fn bytes_follow_the_json_without_a_copy() {
        let formats = OutputFormats {
            binary: true,
            ..OutputFormats::default()
        };
        let message = response("UINT8", &[3], b"abc");
        let address = message.raw_output_contents[0].as_ptr();
        assert_eq!(binary_bytes(&message, &formats), 3);
        let mut chunks = VecDeque::new();
        let json = written(|written| json(written, &message, &formats, &mut chunks)).unwrap();
        let response = reply(json, chunks);
        let length: usize = response.headers()[HEADER_LENGTH]
            .to_str()
            .unwrap()
            .parse()
            .unwrap();
        assert_eq!(
            http_body::Body::size_hint(response.body()).exact(),
            Some(length as u64 + 3)
        );
        let mut body = response.into_body();
        let head = body.frame().await.unwrap().unwrap().into_data().unwrap();
        assert_eq!(head.len(), length);
        let head: Value = serde_json::from_slice(&head).unwrap();
        assert_eq!(head["outputs"][0]["parameters"]["binary_data_size"], 3);
        let blob = body.frame().await.unwrap().unwrap().into_data().unwrap();
        assert_eq!((blob.as_ref(), blob.as_ptr()), (b"abc".as_ref(), address));
    }

    #[test]
    fn what_json_cannot_represent_must_be_requested_as_bytes() {
        assert_eq!(data("FP32", &0.1_f32.to_le_bytes()).unwrap(), json!([0.1]));
        assert_eq!(data("BOOL", &[1, 0]).unwrap(), json!([true, false]));
        assert_eq!(data("INT64", &(-5_i64).to_le_bytes()).unwrap(), json!([-5]));
        assert_eq!(
            data("BYTES", b"\x02\0\0\0hi\0\0\0\0").unwrap(),
            json!(["hi", ""])
        );
        assert_eq!(data("INT8", b"").unwrap(), json!([]));
        for (datatype, raw) in [
            ("FP32", f32::NAN.to_le_bytes().to_vec()),
            ("FP64", f64::INFINITY.to_le_bytes().to_vec()),
            ("BYTES", b"\x01\0\0\0\xff".to_vec()),
            ("FP16", vec![0, 0]),
        ] {
            let error = data(datatype, &raw).unwrap_err();
            assert_eq!(error.kind(), Kind::Unsupported, "{datatype}");
            assert!(error.to_string().contains("binary_data"));
        }
        assert_eq!(data("FP32", &[0]).unwrap_err().kind(), Kind::Internal);
    }

    proptest! {
        #[test]
        fn every_datatype_comes_back_with_its_bits(
            bytes in proptest::collection::vec(any::<u8>(), 0..96),
            datatype in proptest::sample::select(&Datatype::ALL[..]),
        ) {
            let width = datatype.element_bytes().unwrap_or(8);
            let mut raw = bytes[..bytes.len() / width * width].to_vec();
            if datatype == Datatype::Bool {
                raw.iter_mut().for_each(|byte| *byte &= 1);
            }
            if datatype == Datatype::Bytes {
                let texts: Vec<String> =
                    raw.chunks(8).map(|c| String::from_utf8_lossy(c).into_owned()).collect();
                raw = tensor::encode_bytes_elements(&texts).unwrap();
            }
            // What has no form in JSON is refused, and anything else returns.
            if let Ok(data) = data(datatype.name(), &raw) {
                let count = data.as_array().unwrap().len();
                let shape = tensor::Shape::from_sizes(vec![count]).unwrap();
                let output = &response(datatype.name(), &[1], &raw).outputs[0];
                let text = written(|written| write_data(written, output, &raw)).unwrap();
                let text = String::from_utf8(text.to_vec()).unwrap();
                let never = Cancelled::never();
                prop_assert_eq!(parse_data(&text, datatype, &shape, &never).unwrap(), raw);
            }
        }
    }
}
