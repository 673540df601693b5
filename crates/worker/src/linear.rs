//! What a worker makes of a request takes time that grows with it and no faster:
//! otherwise one request keeps a thread for work from all others. The measure is
//! also for the tests of readers that are private to their files.

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use engine::{LoadOptions, ModelFolder};
use platform::metrics::Metrics;
use platform::watchdog::thread_time;
use protocol::inference::ModelInferRequest;
use protocol::inference::model_infer_request::InferInputTensor;
use protocol::{IDS_INPUT, InferRequest, LENGTHS_INPUT, ModelName, ModelVersion};

use crate::infer::check;
use crate::metrics::WorkerMetrics;
use crate::model::{ModelId, ModelLimits, ServedModel};
use crate::queue::QueueLimits;

/// How much longer twice the input may take.
const GROWTH_MAX: f64 = 2.5;
/// Other work of the machine disturbs a measurement, so that the least counts.
const TRIES: usize = 3;
/// A machine that is busy may disturb all of them.
const ROUNDS: usize = 5;

/// Reads an input of a count, and one of twice as much.
pub fn doubles<I>(name: &str, count: usize, make: impl Fn(usize) -> I, read: impl Fn(I)) {
    let least = |count: usize| {
        let tries = (0..TRIES).map(|_| {
            let input = make(count);
            let begun = thread_time();
            read(input);
            thread_time().saturating_sub(begun)
        });
        tries.min().unwrap_or_default()
    };
    let mut found = Vec::new();
    for _ in 0..ROUNDS {
        let (one, two) = (least(count), least(2 * count));
        if two <= one.mul_f64(GROWTH_MAX) {
            return;
        }
        found.push((one, two));
    }
    panic!("{name}: twice the input takes {found:?}");
}

/// A small model of this task, whose limits no test reaches: they would hide the
/// growth.
pub fn model(folder: &str) -> ServedModel {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden");
    let id = ModelId {
        name: ModelName::checked("m", "name").unwrap(),
        version: ModelVersion::checked("1", "version").unwrap(),
    };
    let limits = ModelLimits {
        queue: QueueLimits {
            batch_tokens_max: 1000,
            batch_rows_max: 8,
            delay: Duration::ZERO,
            rows_max: 100,
        },
        request_rows_max: usize::MAX,
        text_bytes_max: 1 << 30,
        deterministic: false,
    };
    let folder = ModelFolder::bare(&golden.join(folder));
    let metrics = WorkerMetrics::register(&Metrics::default());
    ServedModel::start(id, folder, &LoadOptions::default(), limits, &metrics).unwrap()
}

/// An input of a request.
struct Given {
    name: &'static str,
    datatype: &'static str,
    elements: usize,
    raw: Bytes,
}

fn texts(name: &'static str, texts: &[String]) -> Given {
    Given {
        name,
        datatype: "BYTES",
        elements: texts.len(),
        raw: tensor::encode_bytes_elements(texts).unwrap().into(),
    }
}

fn numbers(name: &'static str, values: &[i64]) -> Given {
    let raw = values.iter().flat_map(|value| value.to_le_bytes());
    Given {
        name,
        datatype: "INT64",
        elements: values.len(),
        raw: raw.collect::<Vec<u8>>().into(),
    }
}

fn message(given: Vec<Given>) -> ModelInferRequest {
    let input = |given: &Given| InferInputTensor {
        name: given.name.to_owned(),
        datatype: given.datatype.to_owned(),
        shape: vec![given.elements as i64],
        ..Default::default()
    };
    ModelInferRequest {
        model_name: "m".to_owned(),
        inputs: given.iter().map(input).collect(),
        raw_input_contents: given.into_iter().map(|given| given.raw).collect(),
        ..Default::default()
    }
}

/// Reads messages as a call of `ModelInfer` does.
fn reader(model: &ServedModel) -> impl Fn(ModelInferRequest) + Copy {
    move |message| {
        let request = InferRequest::checked(message).unwrap();
        let checked = check(model, request);
        assert!(checked.is_ok(), "{:?}", checked.err());
    }
}

#[test]
fn twice_as_many_texts_and_ids_take_twice_the_time() {
    let model = model("bert-embedding");
    let read = reader(&model);
    let many = |n: usize| message(vec![texts("text", &vec!["a lantern".to_owned(); n])]);
    doubles("texts", 50_000, many, read);
    let long = |n: usize| message(vec![texts("text", &["\u{fc}".repeat(n)])]);
    doubles("a long text", 2 << 20, long, read);
    let ids = |lengths: &[i64], ids: &[i64]| {
        let lengths = numbers(LENGTHS_INPUT, lengths);
        message(vec![lengths, numbers(IDS_INPUT, ids)])
    };
    let lists = |n: usize| ids(&vec![1; n], &vec![7; n]);
    doubles("lists of ids", 50_000, lists, read);
    let list = |n: usize| ids(&[n as i64], &vec![7; n]);
    doubles("a list of ids", 200_000, list, read);
}

#[test]
fn twice_as_many_pairs_take_twice_the_time() {
    let model = model("bert-rerank");
    let read = reader(&model);
    let pairs = |queries: Vec<String>| {
        let words = vec!["a candle".to_owned(); queries.len()];
        message(vec![texts("query", &queries), texts("text", &words)])
    };
    let same = |n: usize| pairs(vec!["a lantern ".repeat(20); n]);
    doubles("pairs of one query", 20_000, same, read);
    // Those that differ do so at their ends alone.
    let query = "a lantern ".repeat(20);
    let differ = |n: usize| pairs((0..n).map(|number| format!("{query}{number}")).collect());
    doubles("pairs of many queries", 20_000, differ, read);
    let long = |n: usize| pairs(vec!["\u{fc}".repeat(n); 2]);
    doubles("pairs of a long query", 1 << 20, long, read);
}
