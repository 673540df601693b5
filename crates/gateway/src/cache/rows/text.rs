//! Calls of `tei.v1` with one row: the message itself.

use std::marker::PhantomData;

use bytes::{BufMut, Bytes, BytesMut};
use http::HeaderMap;
use platform::grpc::{Message, frame_bytes};
use protocol::Method;
use protocol::tei::v1 as tei;

use super::super::key::{KeyContext, KeyWriter, RowKey};
use super::super::memory::CachedRow;
use super::{ComputedUsage, RowRequest, SplitResponse, compute_type, text_headers};

/// A response that may report its timing.
pub trait TextResponse: prost::Message + Default {
    /// Its timing and token counts.
    fn timing(&mut self) -> Option<&mut tei::Metadata>;
}

macro_rules! text_response {
    ($($message:ident)*) => {$(
        impl TextResponse for tei::$message {
            fn timing(&mut self) -> Option<&mut tei::Metadata> {
                self.metadata.as_mut()
            }
        }
    )*};
}

text_response!(EmbedResponse EmbedAllResponse PredictResponse);

impl TextResponse for tei::EncodeResponse {
    fn timing(&mut self) -> Option<&mut tei::Metadata> {
        None
    }
}

impl TextResponse for tei::DecodeResponse {
    fn timing(&mut self) -> Option<&mut tei::Metadata> {
        None
    }
}

/// A request of type `Q` with a response of type `A`.
#[derive(Debug)]
pub struct TextRow<Q, A> {
    /// The message in its canonical encoding.
    message: Vec<u8>,
    key: [RowKey; 1],
    types: PhantomData<fn(Q) -> A>,
}

impl<Q, A> TextRow<Q, A>
where
    Q: prost::Message + Default + 'static,
    A: TextResponse + 'static,
{
    /// Reads a message; None when it is no `Q`, or has fields that are unknown
    /// here: they may change the response.
    pub fn read(
        message: Bytes,
        method: Method,
        source: &KeyContext<'_>,
    ) -> Option<Box<dyn RowRequest>> {
        let bytes = message.len();
        let message = Q::decode(message).ok()?.encode_to_vec();
        if message.len() != bytes {
            return None;
        }
        let key = KeyWriter::new(method.path(), source).part(&message).key();
        Some(Box::new(Self {
            message,
            key: [key],
            types: PhantomData,
        }))
    }
}

impl<Q, A> RowRequest for TextRow<Q, A>
where
    Q: prost::Message,
    A: TextResponse,
{
    fn keys(&self) -> &[RowKey] {
        &self.key
    }

    fn part(&self, _indices: &[usize]) -> Message {
        Message::from_framed(frame_bytes(&self.message))
    }

    /// The head of the row holds the number of characters and the kind of device.
    /// Its content is the response of a hit: without times.
    fn split(&self, response: Bytes, headers: &HeaderMap, count: usize) -> Option<SplitResponse> {
        if count != 1 {
            return None;
        }
        let mut response = A::decode(response).ok()?;
        let mut timing = tei::Metadata::default();
        if let Some(metadata) = response.timing() {
            timing = *metadata;
            *metadata = tei::Metadata {
                compute_chars: timing.compute_chars,
                compute_tokens: timing.compute_tokens,
                ..Default::default()
            };
        }
        let kind = compute_type(headers);
        let mut head = BytesMut::with_capacity(4 + kind.len());
        head.put_u32(timing.compute_chars);
        head.put_slice(kind);
        let row = CachedRow {
            head: head.freeze(),
            content: response.encode_to_vec().into(),
        };
        Some(SplitResponse {
            rows: vec![row],
            timing,
        })
    }

    fn join(
        &self,
        rows: &[CachedRow],
        usage: &ComputedUsage,
        headers: &mut HeaderMap,
    ) -> Option<Bytes> {
        let [row] = rows else { return None };
        let (characters, kind) = row.head.split_first_chunk::<4>()?;
        text_headers(kind, u32::from_be_bytes(*characters), usage, headers);
        Some(frame_bytes(&row.content))
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;

    const SOURCE: KeyContext<'_> = KeyContext {
        scope: "team",
        model: "minilm",
        version: 1,
        digest: "abc",
    };

    fn embed(request: &tei::EmbedRequest) -> Box<dyn RowRequest> {
        let message = request.encode_to_vec().into();
        TextRow::<tei::EmbedRequest, tei::EmbedResponse>::read(message, Method::Embed, &SOURCE)
            .unwrap()
    }

    #[test]
    fn a_hit_reports_no_time() {
        let request = tei::EmbedRequest {
            inputs: "a text".to_owned(),
            ..Default::default()
        };
        let rows = embed(&request);
        let mut response = tei::EmbedResponse {
            embeddings: vec![0.5, -1.0, f32::MIN_POSITIVE],
            metadata: Some(tei::Metadata {
                compute_chars: 6,
                compute_tokens: 4,
                total_time_ns: 9_000_000,
                tokenization_time_ns: 1,
                queue_time_ns: 2,
                inference_time_ns: 3,
            }),
        };
        let mut headers = HeaderMap::new();
        headers.insert("x-compute-type", "cpu".parse().unwrap());
        let split = rows
            .split(response.encode_to_vec().into(), &headers, 1)
            .unwrap();
        assert_eq!(Some(split.timing), response.metadata);
        let mut joined = HeaderMap::new();
        let framed = rows
            .join(&split.rows, &ComputedUsage::default(), &mut joined)
            .unwrap();
        response.metadata = Some(tei::Metadata {
            compute_chars: 6,
            compute_tokens: 4,
            ..Default::default()
        });
        assert_eq!(tei::EmbedResponse::decode(&framed[5..]).unwrap(), response);
        for (name, value) in [
            ("x-compute-type", "cpu"),
            ("x-compute-characters", "6"),
            ("x-compute-tokens", "0"),
            ("x-total-time", "0"),
        ] {
            assert_eq!(joined[name], value, "{name}");
        }
    }

    #[test]
    fn every_field_changes_the_key_and_unknown_fields_are_not_ignored() {
        let plain = tei::EmbedRequest {
            inputs: "a text".to_owned(),
            ..Default::default()
        };
        let others = [
            tei::EmbedRequest {
                inputs: "a text ".to_owned(),
                ..plain.clone()
            },
            tei::EmbedRequest {
                truncate: true,
                ..plain.clone()
            },
            tei::EmbedRequest {
                normalize: true,
                ..plain.clone()
            },
            tei::EmbedRequest {
                truncation_direction: 1,
                ..plain.clone()
            },
            tei::EmbedRequest {
                prompt_name: Some(String::new()),
                ..plain.clone()
            },
            tei::EmbedRequest {
                dimensions: Some(0),
                ..plain.clone()
            },
        ];
        let mut keys = vec![embed(&plain).keys()[0]];
        for other in &others {
            let key = embed(other).keys()[0];
            assert!(!keys.contains(&key), "{other:?}");
            keys.push(key);
        }
        let mut message = plain.encode_to_vec();
        message.extend([0xf8, 0x07, 0x01]);
        let no_message = Bytes::from_static(b"\xff\xff");
        let read = TextRow::<tei::EmbedRequest, tei::EmbedResponse>::read;
        assert!(read(message.into(), Method::Embed, &SOURCE).is_none());
        assert!(read(no_message, Method::Embed, &SOURCE).is_none());
    }
}
