//! Reads the few fields that routing needs from an encoded message, without
//! decoding or copying the rest.

use bytes::{BufMut, Bytes, BytesMut};
use prost::encoding::{WireType, decode_key, decode_varint, encode_key, encode_varint};

use crate::outline::malformed;
use crate::{Error, inference};

/// The leading text fields of a message, which borrow from it.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Peeked<'m> {
    /// Field 1: the model's name, in every message of the protocol that has one.
    pub name: &'m str,
    /// Field 2: the model's version.
    pub version: &'m str,
    /// Field 3: the request's id.
    pub id: &'m str,
}

/// Reads text fields 1 to 3 at the top level of a message; the last of a
/// repeated field wins, as in any protobuf reader. Errors when the bytes are
/// not a message.
pub fn peek(message: &[u8]) -> Result<Peeked<'_>, Error> {
    let mut rest = message;
    let mut peeked = Peeked::default();
    while !rest.is_empty() {
        let (tag, wire_type) = decode_key(&mut rest).map_err(malformed)?;
        match wire_type {
            WireType::LengthDelimited => {
                let length = decode_varint(&mut rest).map_err(malformed)?;
                let (content, after) = usize::try_from(length)
                    .ok()
                    .and_then(|length| rest.split_at_checked(length))
                    .ok_or_else(|| malformed("a field is longer than the message"))?;
                rest = after;
                match tag {
                    1 => peeked.name = text(content)?,
                    2 => peeked.version = text(content)?,
                    3 => peeked.id = text(content)?,
                    _ => {}
                }
            }
            WireType::Varint => {
                decode_varint(&mut rest).map_err(malformed)?;
            }
            WireType::ThirtyTwoBit => rest = skip(rest, 4)?,
            WireType::SixtyFourBit => rest = skip(rest, 8)?,
            WireType::StartGroup | WireType::EndGroup => {
                return Err(malformed("it has a group, which the protocol does not use"));
            }
        }
    }
    Ok(peeked)
}

/// The same message for another model: protobuf takes the last of a field that
/// is there twice. Fields 1 and 2 are the name and the version, as in every
/// message of the protocol that has them.
pub fn renamed(message: &[u8], name: &str) -> Bytes {
    let mut renamed = BytesMut::with_capacity(message.len() + name.len() + 8);
    renamed.put_slice(message);
    for (tag, text) in [(1, name), (2, "")] {
        encode_key(tag, WireType::LengthDelimited, &mut renamed);
        encode_varint(text.len() as u64, &mut renamed);
        renamed.put_slice(text.as_bytes());
    }
    renamed.freeze()
}

fn skip(bytes: &[u8], count: usize) -> Result<&[u8], Error> {
    bytes
        .get(count..)
        .ok_or_else(|| malformed("a field is longer than the message"))
}

fn text(bytes: &[u8]) -> Result<&str, Error> {
    std::str::from_utf8(bytes).map_err(malformed)
}

/// Wraps an encoded `ModelInferResponse` as an encoded
/// `ModelStreamInferResponse` with the flag of the last response to a request.
/// The response's bytes are copied once and never decoded: protobuf merges
/// concatenated messages.
pub fn with_final_response_flag(response: &[u8]) -> Bytes {
    let parameter = inference::ModelInferResponse {
        parameters: [(
            "triton_final_response".to_owned(),
            inference::InferParameter {
                parameter_choice: Some(inference::infer_parameter::ParameterChoice::BoolParam(
                    true,
                )),
            },
        )]
        .into(),
        ..Default::default()
    };
    let flag = prost::Message::encode_to_vec(&parameter);
    let length = response.len() + flag.len();
    let mut wrapped = BytesMut::with_capacity(length + 12);
    encode_key(2, WireType::LengthDelimited, &mut wrapped);
    encode_varint(length as u64, &mut wrapped);
    wrapped.put_slice(response);
    wrapped.put_slice(&flag);
    wrapped.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use prost::Message;

    #[test]
    fn reads_what_prost_writes() {
        let request = inference::ModelInferRequest {
            model_name: "digits".into(),
            model_version: "3".into(),
            id: "a-1".into(),
            raw_input_contents: vec![Bytes::from(vec![7; 1000])],
            ..Default::default()
        };
        let bytes = request.encode_to_vec();
        let peeked = peek(&bytes).unwrap();
        assert_eq!(
            (peeked.name, peeked.version, peeked.id),
            ("digits", "3", "a-1")
        );
    }

    #[test]
    fn models_are_renamed() {
        let request = inference::ModelInferRequest {
            model_name: "chain".into(),
            model_version: "7".into(),
            inputs: vec![inference::model_infer_request::InferInputTensor {
                shape: vec![300, 2],
                ..Default::default()
            }],
            ..Default::default()
        };
        let bytes = request.encode_to_vec();
        let renamed = inference::ModelInferRequest::decode(renamed(&bytes, "minilm")).unwrap();
        assert_eq!(
            (renamed.model_name.as_str(), renamed.model_version.as_str()),
            ("minilm", "")
        );
        assert_eq!(renamed.inputs, request.inputs);
    }

    #[test]
    fn a_wrapped_response_decodes() {
        let response = inference::ModelInferResponse {
            id: "a-1".into(),
            raw_output_contents: vec![Bytes::from_static(b"1234")],
            ..Default::default()
        };
        let wrapped = with_final_response_flag(&response.encode_to_vec());
        let decoded = inference::ModelStreamInferResponse::decode(wrapped).unwrap();
        let inner = decoded.infer_response.unwrap();
        assert_eq!(inner.raw_output_contents, response.raw_output_contents);
        assert!(inner.parameters.contains_key("triton_final_response"));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = peek(&bytes);
        }

        #[test]
        fn agrees_with_prost(name in ".{0,20}", version in ".{0,5}", id in ".{0,20}") {
            let request = inference::ModelInferRequest {
                model_name: name.clone(), model_version: version.clone(), id: id.clone(), ..Default::default()
            };
            let bytes = request.encode_to_vec();
            let peeked = peek(&bytes).unwrap();
            prop_assert_eq!((peeked.name, peeked.version, peeked.id), (name.as_str(), version.as_str(), id.as_str()));
        }
    }
}
