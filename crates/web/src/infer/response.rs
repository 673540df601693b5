//! Writes an inference response as JSON, with binary tensors behind it.

use std::collections::VecDeque;
use std::pin::Pin;
use std::task::{Context, Poll};

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderName, HeaderValue};
use http_body::{Frame, SizeHint};
use protocol::inference::infer_parameter::ParameterChoice;
use protocol::inference::model_infer_response::InferOutputTensor;
use protocol::inference::{InferParameter, ModelInferResponse};
use protocol::{Error, Kind};
use serde::Serialize;
use serde_json::{Map, Value, json};
use tensor::{Datatype, bytes_elements};

use super::request::OutputFormats;
use super::{HEADER_LENGTH, not_json};

/// Writes a response in the requested formats.
pub fn write(response: ModelInferResponse, formats: &OutputFormats) -> Result<Response, Error> {
    let mut chunks = VecDeque::with_capacity(1 + response.outputs.len());
    let json = json(&response, formats, &mut chunks)?;
    let binary = !chunks.is_empty();
    let length = json.len();
    chunks.push_front(Bytes::from(json));
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
    Ok(reply)
}

/// The JSON; binary tensors are appended to `binary`.
fn json(
    response: &ModelInferResponse,
    formats: &OutputFormats,
    binary: &mut VecDeque<Bytes>,
) -> Result<Vec<u8>, Error> {
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
    let mut written = text(&head)?;
    // The outputs follow in the same object.
    written.pop();
    written.extend_from_slice(b",\"outputs\":[");
    for (index, output) in response.outputs.iter().enumerate() {
        if index > 0 {
            written.push(b',');
        }
        let raw = response.raw_output_contents.get(index);
        let raw = raw.ok_or_else(|| broken("has no contents"))?;
        let own = formats.outputs.get(&output.name).copied();
        if own.unwrap_or(formats.binary) {
            write_head(&mut written, output, Some(raw.len()))?;
            binary.push_back(raw.clone());
        } else {
            write_head(&mut written, output, None)?;
            written.pop();
            written.extend_from_slice(b",\"data\":");
            write_data(&mut written, output, raw)?;
            written.push(b'}');
        }
    }
    written.extend_from_slice(b"]}");
    Ok(written)
}

fn write_head(
    written: &mut Vec<u8>,
    output: &InferOutputTensor,
    binary_bytes: Option<usize>,
) -> Result<(), Error> {
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
    written.extend(text(&head)?);
    Ok(())
}

/// The elements as one flat array.
fn write_data(written: &mut Vec<u8>, output: &InferOutputTensor, raw: &[u8]) -> Result<(), Error> {
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
            array(written, values, 4 * raw.len() / size_of::<$kind>())
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
        Datatype::Bool => array(written, raw.iter().map(|byte| *byte != 0), 5 * raw.len()),
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
            let texts = texts.collect::<Result<Vec<&str>, Error>>()?;
            array(written, texts.into_iter(), raw.len())
        }
        Datatype::Fp16 | Datatype::Bf16 => {
            Err(not_json(&output.name, "has a 16-bit float datatype"))
        }
    }
}

fn array<T: Serialize>(
    written: &mut Vec<u8>,
    values: impl Iterator<Item = T>,
    bytes: usize,
) -> Result<(), Error> {
    written.reserve(bytes);
    written.push(b'[');
    for value in values {
        // Floats have the fewest digits that are read back as the same bits.
        serde_json::to_writer(&mut *written, &value).map_err(|_| unwritten())?;
        written.push(b',');
    }
    match written.last_mut() {
        Some(last) if *last == b',' => *last = b']',
        _ => written.push(b']'),
    }
    Ok(())
}

fn text(value: &Map<String, Value>) -> Result<Vec<u8>, Error> {
    serde_json::to_vec(value).map_err(|_| unwritten())
}

fn parameters(given: &std::collections::HashMap<String, InferParameter>) -> Map<String, Value> {
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

fn unwritten() -> Error {
    Error::new(Kind::Internal, "the response cannot be written")
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

    fn data(datatype: &str, raw: &[u8]) -> Result<Value, Error> {
        let mut chunks = VecDeque::new();
        let json = json(
            &response(datatype, &[1], raw),
            &OutputFormats::default(),
            &mut chunks,
        )?;
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
        let response = write(message, &formats).unwrap();
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
                let mut written = Vec::new();
                write_data(&mut written, &response(datatype.name(), &[1], &raw).outputs[0], &raw).unwrap();
                let text = String::from_utf8(written).unwrap();
                prop_assert_eq!(parse_data(&text, datatype, &shape).unwrap(), raw);
            }
        }
    }
}
