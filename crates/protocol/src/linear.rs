//! What a request brings is read in a time that grows with it and no faster:
//! otherwise a few megabytes of ids or texts keep a thread busy.

use std::time::Duration;

use bytes::Bytes;
use prost::Message;

use crate::inference::model_infer_request::InferInputTensor;
use crate::inference::{InferTensorContents, ModelInferRequest};
use crate::tei::v1::{RerankRequest, RerankStreamRequest};
use crate::{Error, IDS_INPUT, InferRequest, LENGTHS_INPUT, Method, RerankGathering};

/// How much longer twice the input may take.
const GROWTH_MAX: f64 = 2.5;
/// Times of a few ticks say nothing.
const SLACK: Duration = Duration::from_millis(20);
/// Other work of the machine disturbs a measurement, so that the least counts.
const TRIES: usize = 3;
/// A machine that is busy may disturb all of them.
const ROUNDS: usize = 3;
/// No limit of a model is reached: they would hide the growth.
const BYTES_MAX: usize = 1 << 30;

/// The processor time of this thread.
fn processor_time() -> Duration {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    let nanoseconds = stat.split(' ').next().unwrap().parse().unwrap();
    Duration::from_nanos(nanoseconds)
}

/// Reads an input of a count, and one of twice as much.
fn doubles<I>(name: &str, count: usize, make: impl Fn(usize) -> I, read: impl Fn(I)) {
    let least = |count: usize| {
        let tries = (0..TRIES).map(|_| {
            let input = make(count);
            let before = processor_time();
            read(input);
            processor_time().saturating_sub(before)
        });
        tries.min().unwrap()
    };
    let mut found = Vec::new();
    for _ in 0..ROUNDS {
        let (one, two) = (least(count), least(2 * count));
        if two <= one.mul_f64(GROWTH_MAX) + SLACK {
            return;
        }
        found.push((one, two));
    }
    panic!("{name}: twice the input takes {found:?}");
}

fn input(name: &str, datatype: &str, elements: usize) -> InferInputTensor {
    InferInputTensor {
        name: name.into(),
        datatype: datatype.into(),
        shape: vec![elements as i64],
        ..Default::default()
    }
}

/// A message of lists of these lengths, with these ids.
fn lists(lengths: &[i64], ids: &[i64]) -> ModelInferRequest {
    let raw = |values: &[i64]| -> Bytes {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes());
        bytes.collect::<Vec<u8>>().into()
    };
    ModelInferRequest {
        model_name: "m".into(),
        inputs: vec![
            input(LENGTHS_INPUT, "INT64", lengths.len()),
            input(IDS_INPUT, "INT64", ids.len()),
        ],
        raw_input_contents: vec![raw(lengths), raw(ids)],
        ..Default::default()
    }
}

/// The error of a message that is refused names this field.
fn refused<T: std::fmt::Debug>(read: Result<T, Error>, field: &str) {
    let error = read.unwrap_err();
    assert_eq!(error.field().unwrap(), field, "{error}");
}

#[test]
fn twice_as_many_ids_take_twice_the_time() {
    let read = |message| InferRequest::checked(message)?.id_lists(BYTES_MAX);
    let whole = |message: ModelInferRequest| {
        let lists = read(message).unwrap().unwrap();
        assert!(lists.iter().all(|list| list.iter().all(|id| *id == 7)));
    };
    let count = 100_000;
    doubles(
        "lists of one id",
        count,
        |n| lists(&vec![1; n], &vec![7; n]),
        whole,
    );
    doubles(
        "one list",
        count,
        |n| lists(&[n as i64], &vec![7; n]),
        whole,
    );
    let last = |n: usize| {
        let mut ids = vec![7; n];
        ids[n - 1] = -1;
        lists(&vec![1; n], &ids)
    };
    doubles(
        "a last id that is none",
        count,
        last,
        |message: ModelInferRequest| {
            let field = format!("inputs[1].contents[{}]", message.inputs[1].shape[0] - 1);
            refused(read(message), &field);
        },
    );
    doubles(
        "more ids than the lengths say",
        count,
        |n| lists(&vec![1; n], &vec![7; n + 1]),
        |message: ModelInferRequest| refused(read(message), "inputs[1].contents"),
    );
}

/// A message of texts, in the bytes behind it or in its fields.
fn texts(texts: &[Bytes], raw: bool) -> ModelInferRequest {
    let mut text = input("text", "BYTES", texts.len());
    let mut message = ModelInferRequest {
        model_name: "m".into(),
        ..Default::default()
    };
    if raw {
        let bytes = tensor::encode_bytes_elements(texts).unwrap();
        message.raw_input_contents = vec![bytes.into()];
    } else {
        text.contents = Some(InferTensorContents {
            bytes_contents: texts.to_vec(),
            ..Default::default()
        });
    }
    message.inputs = vec![text];
    message
}

#[test]
fn twice_as_many_texts_take_twice_the_time() {
    let read = |message| InferRequest::checked(message)?.texts("text", BYTES_MAX);
    let whole = |message: ModelInferRequest| {
        let count = message.inputs[0].shape[0];
        assert_eq!(read(message).unwrap().len() as i64, count);
    };
    for raw in [true, false] {
        let many = |n: usize| texts(&vec![Bytes::from_static(b"ab"); n], raw);
        doubles(&format!("many texts, raw {raw}"), 50_000, many, whole);
        // Each of its characters is looked at.
        let long = |n: usize| texts(&["\u{fc}".repeat(n).into()], raw);
        doubles(&format!("a long text, raw {raw}"), 2 << 20, long, whole);
        let last = |n: usize| {
            let mut all = vec![Bytes::from_static(b"ab"); n];
            all[n - 1] = Bytes::from_static(b"\xff");
            texts(&all, raw)
        };
        let name = format!("a last text that is none, raw {raw}");
        doubles(&name, 50_000, last, |message: ModelInferRequest| {
            let last = message.inputs[0].shape[0] - 1;
            refused(read(message), &format!("inputs[0].contents[{last}]"));
        });
    }
}

/// Reads the messages of a stream as gateways and workers do, up to the one
/// request.
fn gathered(messages: Vec<Bytes>) -> Result<RerankRequest, Error> {
    let mut gathering = RerankGathering::default();
    for message in messages {
        gathering.reserve(message.len(), BYTES_MAX)?;
        Method::RerankStream.outline(&message)?;
        let message = RerankStreamRequest::decode(message).unwrap();
        gathering.push(message, usize::MAX)?;
    }
    let request = gathering.into_request();
    Method::Rerank.outline(&request.encode_to_vec())?;
    Ok(request)
}

/// The messages of a stream of so many texts.
fn stream(query: &str, text: &str, count: usize) -> Vec<Bytes> {
    let message = RerankStreamRequest {
        query: query.into(),
        text: text.into(),
        ..Default::default()
    };
    vec![message.encode_to_vec().into(); count]
}

#[test]
fn a_rerank_stream_of_twice_the_length_takes_twice_the_time() {
    let whole = |messages: Vec<Bytes>| {
        let count = messages.len();
        assert_eq!(gathered(messages).unwrap().texts.len(), count);
    };
    let query = "a lantern ".repeat(100);
    doubles("many texts", 20_000, |n| stream("a", "b", n), whole);
    doubles(
        "texts and a query",
        5_000,
        |n| stream(&query, "b", n),
        whole,
    );
    let long = |n: usize| stream(&"\u{fc}".repeat(n), "b", 4);
    doubles("a long query", 1 << 20, long, whole);
    // The one that is wrong comes after all the others.
    let last = |n: usize| {
        let mut messages = stream(&query, "b", n);
        messages.extend(stream(&format!("{query}?"), "b", 1));
        messages
    };
    doubles(
        "a last query that differs",
        5_000,
        last,
        |messages: Vec<Bytes>| {
            refused(gathered(messages), "query");
        },
    );
}

/// A request that came whole has its query once, and each text of it is counted.
#[test]
fn a_rerank_request_of_twice_the_length_takes_twice_the_time() {
    let request = |query: usize, texts: usize| -> Bytes {
        let request = RerankRequest {
            query: "\u{fc}".repeat(query),
            texts: vec!["b".into(); texts],
            ..Default::default()
        };
        request.encode_to_vec().into()
    };
    let read = |message: Bytes| {
        let outline = Method::Rerank.outline(&message).unwrap();
        let request = RerankRequest::decode(message).unwrap();
        assert_eq!(outline.rows, request.texts.len() as u64);
    };
    doubles("many texts", 50_000, |n| request(1, n), read);
    doubles("a long query", 2 << 20, |n| request(n, 1), read);
    doubles("both", 50_000, |n| request(20 * n, n), read);
}
