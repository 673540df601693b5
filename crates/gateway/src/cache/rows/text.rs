//! Calls of `tei.v1` that have one row: the message itself.

use std::marker::PhantomData;

use bytes::{BufMut, Bytes, BytesMut};
use http::HeaderMap;
use platform::grpc::{Message, frame_bytes};
use protocol::Method;
use protocol::tei::v1 as tei;

use super::super::key::{Key, KeyWriter, Source};
use super::super::memory::Row;
use super::{Paid, Rows, Split, compute_type, text_headers};

/// A message that may say what it took.
pub trait Timed: prost::Message + Default {
    /// What it took.
    fn took(&mut self) -> Option<&mut tei::Metadata>;
}

macro_rules! timed {
    ($($message:ident)*) => {$(
        impl Timed for tei::$message {
            fn took(&mut self) -> Option<&mut tei::Metadata> {
                self.metadata.as_mut()
            }
        }
    )*};
}

timed!(EmbedResponse EmbedAllResponse PredictResponse);

impl Timed for tei::EncodeResponse {
    fn took(&mut self) -> Option<&mut tei::Metadata> {
        None
    }
}

impl Timed for tei::DecodeResponse {
    fn took(&mut self) -> Option<&mut tei::Metadata> {
        None
    }
}

/// A request of type `Q`, answered with an `A`.
#[derive(Debug)]
pub struct Text<Q, A> {
    /// The message in its one form.
    message: Vec<u8>,
    key: [Key; 1],
    types: PhantomData<fn(Q) -> A>,
}

impl<Q, A> Text<Q, A>
where
    Q: prost::Message + Default + 'static,
    A: Timed + 'static,
{
    /// Reads a message; none when it is no `Q`, or has fields that are unknown
    /// here: they may change the answer.
    pub fn read(message: Bytes, method: Method, source: &Source<'_>) -> Option<Box<dyn Rows>> {
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

impl<Q, A> Rows for Text<Q, A>
where
    Q: prost::Message,
    A: Timed,
{
    fn keys(&self) -> &[Key] {
        &self.key
    }

    fn part(&self, _places: &[usize]) -> Message {
        Message::from_framed(frame_bytes(&self.message))
    }

    /// The head has the characters and the kind of device; the content is the
    /// answer as a repeated one has it, whose times are none.
    fn split(&self, answer: Bytes, headers: &HeaderMap, count: usize) -> Option<Split> {
        if count != 1 {
            return None;
        }
        let mut answer = A::decode(answer).ok()?;
        let mut took = tei::Metadata::default();
        if let Some(metadata) = answer.took() {
            took = *metadata;
            *metadata = tei::Metadata {
                compute_chars: took.compute_chars,
                compute_tokens: took.compute_tokens,
                ..Default::default()
            };
        }
        let kind = compute_type(headers);
        let mut head = BytesMut::with_capacity(4 + kind.len());
        head.put_u32(took.compute_chars);
        head.put_slice(kind);
        let row = Row {
            head: head.freeze(),
            content: answer.encode_to_vec().into(),
        };
        Some(Split {
            rows: vec![row],
            took,
        })
    }

    fn join(&self, rows: &[Row], paid: &Paid, headers: &mut HeaderMap) -> Option<Bytes> {
        let [row] = rows else { return None };
        let (characters, kind) = row.head.split_first_chunk::<4>()?;
        text_headers(kind, u32::from_be_bytes(*characters), paid, headers);
        Some(frame_bytes(&row.content))
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;

    const SOURCE: Source<'_> = Source {
        scope: "team",
        model: "minilm",
        version: 1,
        digest: "abc",
    };

    fn embed(request: &tei::EmbedRequest) -> Box<dyn Rows> {
        let message = request.encode_to_vec().into();
        Text::<tei::EmbedRequest, tei::EmbedResponse>::read(message, Method::Embed, &SOURCE)
            .unwrap()
    }

    #[test]
    fn a_repeated_answer_took_no_time() {
        let request = tei::EmbedRequest {
            inputs: "a text".to_owned(),
            ..Default::default()
        };
        let rows = embed(&request);
        let mut answer = tei::EmbedResponse {
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
            .split(answer.encode_to_vec().into(), &headers, 1)
            .unwrap();
        assert_eq!(Some(split.took), answer.metadata);
        let mut joined = HeaderMap::new();
        let framed = rows
            .join(&split.rows, &Paid::default(), &mut joined)
            .unwrap();
        answer.metadata = Some(tei::Metadata {
            compute_chars: 6,
            compute_tokens: 4,
            ..Default::default()
        });
        assert_eq!(tei::EmbedResponse::decode(&framed[5..]).unwrap(), answer);
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
    fn every_field_counts_and_unknown_ones_are_not_passed_over() {
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
        let read = Text::<tei::EmbedRequest, tei::EmbedResponse>::read;
        assert!(read(message.into(), Method::Embed, &SOURCE).is_none());
        assert!(read(no_message, Method::Embed, &SOURCE).is_none());
    }
}
