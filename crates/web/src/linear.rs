//! Every reader of a body, and the writer of tensors, takes time that grows with
//! the input and no faster: otherwise a few hundred kilobytes keep a thread busy.

use std::time::Duration;

use bytes::Bytes;
use platform::grpc::MessageLimits;
use platform::pool::Cancelled;
use platform::watchdog::thread_time;
use protocol::Error;
use serde_json::{Value, json};

use super::body::{Received, owned};
use super::model_path::PathModel;
use super::{chat, classify, generate, infer, openai, rerank, rest};

/// How much longer twice the input may take.
const GROWTH_MAX: f64 = 2.5;
/// Other work of the machine disturbs a measurement, so that the least counts.
const TRIES: usize = 7;
/// A machine that is busy may disturb all of them.
const ROUNDS: usize = 5;

/// The least processor time of some reads of a body.
fn time(body: &[u8], read: &Read) -> Duration {
    let once = || {
        let begun = thread_time();
        read(body);
        thread_time().saturating_sub(begun)
    };
    (0..TRIES).map(|_| once()).min().unwrap_or_default()
}

type Read = dyn Fn(&[u8]);

/// A reader, and what makes its input of a count.
struct Reader {
    name: &'static str,
    count: usize,
    make: Box<dyn Fn(usize) -> Value>,
    read: Box<Read>,
}

fn reader<T>(
    name: &'static str,
    count: usize,
    read: impl Fn(&[u8]) -> Result<T, Error> + 'static,
    make: impl Fn(usize) -> Value + 'static,
) -> Reader {
    let read = move |body: &[u8]| drop(read(body));
    Reader {
        name,
        count,
        make: Box::new(make),
        read: Box::new(read),
    }
}

/// Reads tensors to the message of a call.
fn tensors(body: &[u8]) -> Result<(), Error> {
    let limits = MessageLimits::new(64 << 20, 1 << 30);
    let received = Received {
        chunks: body.chunks(64 << 10).map(Bytes::copy_from_slice).collect(),
        length: body.len(),
        held: None,
    };
    let reading = infer::request::Reading {
        limits: &limits,
        cancelled: &Cancelled::never(),
    };
    let model = PathModel::default();
    infer::request::parse(received, None, &model, reading)?.into_message(&limits)?;
    Ok(())
}

fn tensor(datatype: &str, shape: &[usize], data: &Value) -> Value {
    json!({"name": "a", "datatype": datatype, "shape": shape, "data": data})
}

fn numbered(count: usize) -> Value {
    let long = "p".repeat(100);
    let entries = (0..count).map(|number| (format!("{long}{number}"), json!(number)));
    Value::Object(entries.collect())
}

fn tensor_readers() -> Vec<Reader> {
    vec![
        reader("numbers", 50_000, tensors, |count| {
            let data = json!(vec![-0.123_456_7_f64; count]);
            json!({"inputs": [tensor("FP64", &[count], &data)]})
        }),
        reader("nested", 20_000, tensors, |count| {
            let data = json!(vec![vec![1]; count]);
            json!({"inputs": [tensor("INT64", &[count, 1], &data)]})
        }),
        reader("escapes", 20_000, tensors, |count| {
            let data = json!(vec!["\u{1}\n\"\\"; count]);
            json!({"inputs": [tensor("BYTES", &[count], &data)]})
        }),
        reader("one long text", 1 << 20, tensors, |count| {
            let data = json!(["\n".repeat(count)]);
            json!({"inputs": [tensor("BYTES", &[1], &data)]})
        }),
        reader("too many elements", 50_000, tensors, |count| {
            let data = json!(vec![1; count]);
            json!({"inputs": [tensor("INT8", &[1], &data)]})
        }),
        reader(
            "inputs",
            2_000,
            tensors,
            |count| json!({"inputs": vec![tensor("INT8", &[0], &json!([])); count]}),
        ),
        reader("outputs", 2_000, tensors, |count| {
            let output = |number| json!({"name": number, "parameters": {"binary_data": true}});
            let names = (0..count).map(|number| output(number.to_string()));
            json!({"inputs": [], "outputs": names.collect::<Vec<_>>()})
        }),
        reader(
            "parameters",
            2_000,
            tensors,
            |count| json!({"inputs": [], "parameters": numbered(count)}),
        ),
        reader(
            "too many parameters",
            50_000,
            tensors,
            |count| json!({"inputs": [], "parameters": numbered(count)}),
        ),
        reader(
            "too many inputs",
            50_000,
            tensors,
            |count| json!({"inputs": vec![json!({}); count]}),
        ),
        reader(
            "dimensions",
            100_000,
            tensors,
            |count| json!({"inputs": [tensor("INT8", &vec![1; count], &json!([]))]}),
        ),
    ]
}

fn text_readers() -> Vec<Reader> {
    let embed = |body: &[u8]| owned::<openai::EmbeddingRequest>(body)?.input.checked();
    vec![
        reader(
            "ids",
            20,
            embed,
            |count| json!({"model": "a", "input": vec![vec![7; 5_000]; count]}),
        ),
        reader(
            "too many ids",
            100_000,
            embed,
            |count| json!({"model": "a", "input": vec![7; count]}),
        ),
        reader(
            "texts",
            1_000,
            embed,
            |count| json!({"model": "a", "input": vec!["a lantern ".repeat(50); count]}),
        ),
        reader(
            "unknown fields",
            20_000,
            embed,
            |count| json!({"model": "a", "input": "b", "more": numbered(count)}),
        ),
        reader(
            "documents",
            1_000,
            owned::<rerank::RerankRequest>,
            |count| {
                let document = json!({"text": "a lantern ".repeat(50)});
                json!({"query": "a", "documents": vec![document; count]})
            },
        ),
        reader(
            "too many texts",
            50_000,
            owned::<rerank::RerankTextsRequest>,
            |count| json!({"query": "a", "texts": vec!["b"; count]}),
        ),
    ]
}

fn chat_readers() -> Vec<Reader> {
    let chat = |body: &[u8]| owned::<chat::ChatCompletionRequest>(body);
    let message = |text: Value| json!({"role": "user", "content": text});
    vec![
        reader(
            "classify",
            1_000,
            owned::<classify::ClassifyRequest>,
            |count| json!({"input": vec!["a lantern ".repeat(50); count]}),
        ),
        reader(
            "messages",
            2_000,
            chat,
            move |count| json!({"model": "a", "messages": vec![message(json!("b")); count]}),
        ),
        reader("parts", 2_000, chat, move |count| {
            let part = json!({"type": "text", "text": "a lantern "});
            json!({"model": "a", "messages": [message(json!(vec![part; count]))]})
        }),
        reader(
            "tools",
            50_000,
            chat,
            move |count| json!({"model": "a", "messages": [message(json!("b"))], "tools": vec![json!({}); count]}),
        ),
        reader(
            "stops",
            50_000,
            owned::<generate::GenerateRequest>,
            |count| json!({"text_input": "a", "parameters": {"stop": vec!["b"; count]}}),
        ),
        reader(
            "settings",
            20_000,
            owned::<rest::LoadRequest>,
            |count| json!({"parameters": numbered(count)}),
        ),
    ]
}

#[test]
fn twice_the_input_takes_twice_the_time() {
    let readers = [tensor_readers(), text_readers(), chat_readers()];
    for reader in readers.into_iter().flatten() {
        let body = |count: usize| (reader.make)(count).to_string().into_bytes();
        let (one, two) = (body(reader.count), body(2 * reader.count));
        let longer = two.len() as f64 / one.len() as f64 / 2.0;
        let most = GROWTH_MAX * longer.max(1.0);
        let growth = || {
            let [first, second] = [&one, &two].map(|body| time(body, &reader.read));
            second.as_secs_f64() / first.as_secs_f64().max(1e-6)
        };
        assert!(
            (0..ROUNDS).any(|_| growth() <= most),
            "{}: {} times as long for {} bytes as for {}",
            reader.name,
            growth(),
            two.len(),
            one.len()
        );
    }
}
