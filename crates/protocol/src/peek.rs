//! Reads the few fields that routing needs from an encoded message, without
//! decoding or copying the rest.

use bytes::{BufMut, Bytes, BytesMut};
use prost::encoding::{WireType, decode_key, decode_varint, encode_key, encode_varint};

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

/// The rows of an encoded `ModelInferRequest`: the first dimension of its first
/// input. One when it cannot be read, or when the message has less than a byte
/// for each of them; the worker's check finds what is invalid.
pub fn peek_rows(message: &[u8]) -> u64 {
    let rows_max = message.len() as u64;
    first_dimension(message)
        .filter(|rows| (1..=rows_max).contains(rows))
        .unwrap_or(1)
}

/// Field 5 is the inputs, and field 3 of an input its shape, packed in one
/// piece or in several, of which some may be empty.
fn first_dimension(message: &[u8]) -> Option<u64> {
    let mut input = length_delimited(message, 5)?;
    while !input.is_empty() {
        match decode_key(&mut input).ok()? {
            (3, WireType::LengthDelimited) => {
                let length = usize::try_from(decode_varint(&mut input).ok()?).ok()?;
                let (mut packed, after) = input.split_at_checked(length)?;
                if !packed.is_empty() {
                    return decode_varint(&mut packed).ok();
                }
                input = after;
            }
            (3, WireType::Varint) => return decode_varint(&mut input).ok(),
            (_, wire_type) => input = skip_field(input, wire_type)?,
        }
    }
    None
}

/// How often a field is at the top level of a message.
pub fn peek_count(message: &[u8], field: u32) -> u64 {
    let (mut rest, mut count) = (message, 0);
    while let Ok((tag, wire_type)) = decode_key(&mut rest) {
        count += u64::from(tag == field);
        match skip_field(rest, wire_type) {
            Some(after) => rest = after,
            None => break,
        }
    }
    count
}

/// The content of the first length-delimited field of a number.
fn length_delimited(message: &[u8], field: u32) -> Option<&[u8]> {
    let mut rest = message;
    while !rest.is_empty() {
        let (tag, wire_type) = decode_key(&mut rest).ok()?;
        if tag == field && wire_type == WireType::LengthDelimited {
            let length = usize::try_from(decode_varint(&mut rest).ok()?).ok()?;
            return rest.get(..length);
        }
        rest = skip_field(rest, wire_type)?;
    }
    None
}

fn skip_field(bytes: &[u8], wire_type: WireType) -> Option<&[u8]> {
    let mut rest = bytes;
    match wire_type {
        WireType::Varint => decode_varint(&mut rest).ok().map(|_| rest),
        WireType::ThirtyTwoBit => rest.get(4..),
        WireType::SixtyFourBit => rest.get(8..),
        WireType::LengthDelimited => {
            let length = usize::try_from(decode_varint(&mut rest).ok()?).ok()?;
            rest.get(length..)
        }
        WireType::StartGroup | WireType::EndGroup => None,
    }
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

fn malformed(reason: impl std::fmt::Display) -> Error {
    Error::invalid(
        "message",
        format!("is not a message of this method: {reason}"),
    )
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
    fn rows_are_counted_and_models_renamed() {
        let mut request = inference::ModelInferRequest {
            model_name: "chain".into(),
            model_version: "7".into(),
            ..Default::default()
        };
        assert_eq!(peek_rows(&request.encode_to_vec()), 1);
        request.inputs = vec![inference::model_infer_request::InferInputTensor {
            name: "text".into(),
            datatype: "BYTES".into(),
            shape: vec![300, 2],
            ..Default::default()
        }];
        request.raw_input_contents = vec![Bytes::from(vec![0; 600])];
        let bytes = request.encode_to_vec();
        assert_eq!(peek_rows(&bytes), 300);
        let renamed = inference::ModelInferRequest::decode(renamed(&bytes, "minilm")).unwrap();
        assert_eq!(
            (renamed.model_name.as_str(), renamed.model_version.as_str()),
            ("minilm", "")
        );
        assert_eq!(renamed.inputs, request.inputs);
        let rerank = crate::tei::v1::RerankRequest {
            query: "q".into(),
            texts: vec!["a".into(), "b".into()],
            ..Default::default()
        };
        assert_eq!(peek_count(&rerank.encode_to_vec(), 2), 2);
    }

    #[test]
    fn rows_are_those_that_a_reader_finds() {
        // An input with these bytes, and some contents after it.
        let with = |input: &[u8]| {
            let mut message = vec![(5 << 3) | 2, input.len() as u8];
            message.extend(input);
            message.extend([(7 << 3) | 2, 127]);
            message.extend([0; 127]);
            message
        };
        let packed = [(3 << 3) | 2, 2, 100, 2];
        assert_eq!(peek_rows(&with(&packed)), 100);
        // An empty piece has no dimension; the next one has.
        let empty = [&[(3 << 3) | 2, 0][..], &packed].concat();
        assert_eq!(peek_rows(&with(&empty)), 100);
        let message = with(&empty);
        let read = inference::ModelInferRequest::decode(message.as_slice()).unwrap();
        assert_eq!(read.inputs[0].shape, [100, 2]);
        assert_eq!(peek_rows(&with(&[3 << 3, 9])), 9);
        for shape in [
            vec![-1],
            vec![0],
            vec![i64::MIN],
            vec![i64::MAX],
            vec![1000],
        ] {
            let input = inference::model_infer_request::InferInputTensor {
                shape,
                ..Default::default()
            };
            assert_eq!(peek_rows(&with(&input.encode_to_vec())), 1);
        }
        // A piece that is longer than its input, and no piece at all.
        assert_eq!(peek_rows(&with(&[(3 << 3) | 2, 9, 50])), 1);
        assert_eq!(peek_rows(&with(&[])), 1);
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
            let _ = (peek(&bytes), peek_count(&bytes, 2));
            prop_assert!(peek_rows(&bytes) <= (bytes.len() as u64).max(1));
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
