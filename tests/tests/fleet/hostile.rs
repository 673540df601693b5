//! Requests that are small on the way and much work where they are read: no thread
//! of the network does that work, and the process stays within its memory.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use fleet_tests::costs::{ShardTimes, peak_bytes};
use fleet_tests::process::Andon;
use fleet_tests::{Fleet, raw};
use prost::Message;
use protocol::tei::v1 as tei;
use serde_json::json;

/// A call may keep a thread of the network busy for so long.
const TURN_MAX: Duration = Duration::from_millis(50);
/// What all messages in flight may take.
const IN_FLIGHT: &str = "128MiB";
/// What a process may take above what it has at the start: the bytes in flight, and
/// what its allocator keeps of them.
const MEMORY_MAX: u64 = 256 << 20;

/// A gateway over a worker, with little memory for messages in flight.
struct Bounded {
    fleet: Fleet,
    /// What the gateway has at the start.
    resident: u64,
}

impl Bounded {
    async fn start() -> Result<Self> {
        let flags = [
            "--bytes-in-flight-max",
            IN_FLIGHT,
            "--message-bytes-max",
            "64MiB",
        ];
        let fleet = Fleet::with(1, &[], &flags).await?;
        let resident = fleet.gateway.resident_bytes()?;
        Ok(Self { fleet, resident })
    }

    /// An error if the gateway has had more memory than it may take.
    fn stayed_within(&self) -> Result<()> {
        let peak = peak_bytes(&self.fleet.gateway)?;
        let more = peak.saturating_sub(self.resident);
        ensure!(more <= MEMORY_MAX, "{} MiB more", more >> 20);
        Ok(())
    }
}

fn web() -> Result<reqwest::Client> {
    let web = reqwest::Client::builder().no_proxy();
    Ok(web.timeout(Duration::from_secs(60)).build()?)
}

/// A body that makes work at the HTTP door.
struct Body {
    name: &'static str,
    path: &'static str,
    gzip: bool,
    bytes: Vec<u8>,
}

fn body(name: &'static str, path: &'static str, gzip: bool, text: &str) -> Result<Body> {
    let bytes = if gzip {
        raw::gzip(text.as_bytes())?
    } else {
        text.as_bytes().to_vec()
    };
    Ok(Body {
        name,
        path,
        gzip,
        bytes,
    })
}

const INFER: &str = "/v2/models/digits/infer";
const EMBED: &str = "/v1/embeddings";

fn numbered(count: usize) -> String {
    let entries = (0..count).map(|number| format!("\"parameter{number}\":1"));
    format!("{{{}}}", entries.collect::<Vec<_>>().join(","))
}

/// Bodies in JSON, from a hundred bytes in gzip to megabytes.
fn bodies() -> Result<Vec<Body>> {
    let list = |entry: &str, count: usize| format!("[{}]", vec![entry; count].join(","));
    let tensor = |shape: usize, data: &str| {
        format!(
            "{{\"inputs\":[{{\"name\":\"pixels\",\"datatype\":\"FP64\",\"shape\":[{shape}],\"data\":{data}}}]}}"
        )
    };
    let parameters = numbered(250_000);
    let embed = |input: &str| format!("{{\"model\":\"minilm\",\"input\":{input}}}");
    let rerank = |texts: &str| format!("{{\"query\":\"q\",\"texts\":{texts}}}");
    Ok(vec![
        body(
            "megabytes of parameters",
            INFER,
            true,
            &format!("{{\"inputs\":[],\"parameters\":{parameters}}}"),
        )?,
        body(
            "numbers",
            INFER,
            true,
            &tensor(2_000_000, &list("0.5", 2_000_000)),
        )?,
        body(
            "more numbers than the shape has",
            INFER,
            true,
            &tensor(1, &list("0", 4_000_000)),
        )?,
        body("spaces", INFER, true, &" ".repeat(30 << 20))?,
        body(
            "inputs",
            INFER,
            true,
            &format!("{{\"inputs\":{}}}", list("{}", 2_000_000)),
        )?,
        body("deep", INFER, true, &"[".repeat(30 << 20))?,
        body(
            "token ids",
            EMBED,
            true,
            &embed(&list(&list("7", 1_000), 2_000)),
        )?,
        body("short texts", EMBED, true, &embed(&list("\"\"", 1_150_000)))?,
        body(
            "texts of a reranker",
            "/rerank",
            true,
            &rerank(&list("\"\"", 1_150_000)),
        )?,
        body(
            "messages",
            "/v1/chat/completions",
            true,
            &format!(
                "{{\"model\":\"minilm\",\"messages\":{}}}",
                list("{\"role\":\"user\",\"content\":\"\"}", 150_000)
            ),
        )?,
        body(
            "unknown fields",
            EMBED,
            true,
            &format!("{{\"model\":\"minilm\",\"input\":\"a\",\"more\":{parameters}}}"),
        )?,
    ])
}

/// The most processor time of a thread of the network during a call: the least of
/// three tries, since what runs beside it on the core makes it slower.
async fn turn(andon: &Andon, call: impl AsyncFn() -> Result<()>) -> Result<Duration> {
    let mut least = Duration::MAX;
    for _ in 0..3 {
        let before = ShardTimes::of(andon)?;
        call().await?;
        least = least.min(ShardTimes::of(andon)?.most_since(&before));
        if least <= TURN_MAX {
            break;
        }
    }
    Ok(least)
}

#[tokio::test]
async fn hostile_bodies_keep_no_thread_of_the_network_busy() -> Result<()> {
    let bounded = Bounded::start().await?;
    let gateway = &bounded.fleet.gateway;
    let web = web()?;
    for body in bodies()? {
        let call = async || {
            let url = format!("http://{}{}", gateway.http, body.path);
            let mut call = web.post(url).header("content-type", "application/json");
            if body.gzip {
                call = call.header("content-encoding", "gzip");
            }
            let response = call.body(body.bytes.clone()).send().await?;
            let status = response.status().as_u16();
            // Unknown fields are no error.
            let expected = [200, 400, 413, 503].contains(&status);
            ensure!(expected, "{}: {status}", body.name);
            let answer = response.bytes().await?;
            ensure!(
                answer.len() <= 16 << 10,
                "{}: {} bytes",
                body.name,
                answer.len()
            );
            Ok(())
        };
        let turn = turn(gateway, call).await?;
        ensure!(turn <= TURN_MAX, "{}: {turn:?}", body.name);
    }
    bounded.stayed_within()?;
    let logged = gateway.logged();
    ensure!(!logged.contains("panicked"), "{logged}");
    Ok(())
}

#[tokio::test]
async fn large_answers_are_written_beside_the_threads_of_the_network() -> Result<()> {
    let fleet = Fleet::start(1).await?;
    let gateway = &fleet.gateway;
    let web = web()?;
    let texts: Vec<String> = (0..256).map(|number| format!("text {number}")).collect();
    let body = json!({"model": "minilm", "input": texts}).to_string();
    for encoding in ["identity", "gzip"] {
        let call = async || {
            let url = format!("http://{}{EMBED}", gateway.http);
            let call = web.post(url).header("content-type", "application/json");
            let call = call.header("accept-encoding", encoding).body(body.clone());
            let response = call.send().await?;
            ensure!(response.status() == 200, "{response:?}");
            let gzip = response.headers().get("content-encoding").is_some();
            ensure!(gzip == (encoding == "gzip"), "{:?}", response.headers());
            let answer = response.bytes().await?;
            ensure!(answer.len() > 300_000, "{} bytes", answer.len());
            if gzip {
                ensure!(answer.starts_with(&[0x1f, 0x8b]), "no gzip");
            }
            Ok(())
        };
        let turn = turn(gateway, call).await?;
        ensure!(turn <= TURN_MAX, "{encoding}: {turn:?}");
    }
    Ok(())
}

#[tokio::test]
async fn compressed_messages_keep_no_thread_of_the_gateway_busy() -> Result<()> {
    let bounded = Bounded::start().await?;
    let gateway = &bounded.fleet.gateway;
    // Special tokens, which are skipped: the answer is short.
    let decode = tei::DecodeRequest {
        ids: vec![0; 4_000_000],
        skip_special_tokens: true,
    };
    let decode = raw::framed(&raw::gzip(&decode.encode_to_vec())?, true);
    // Blocks that hold nothing: megabytes of them are decompressed to no byte.
    let mut empty = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0];
    for _ in 0..1_000_000 {
        empty.extend([0, 0, 0, 0xff, 0xff]);
    }
    let empty = raw::framed(&empty, true);
    for (name, framed) in [("ids", decode), ("empty blocks", empty)] {
        let path = "/tei.v1.Tokenize/Decode";
        let call = async || {
            let channel = raw::connect(gateway.grpc).await?;
            let metadata = [("andon-model", "minilm"), ("grpc-timeout", "10S")];
            let reply = raw::call(&channel, path, &metadata, Bytes::clone(&framed));
            let reply = reply.await.context(name)?;
            let answered = reply.bytes.len() + reply.header_bytes;
            ensure!(answered <= 8 << 10, "{name}: {answered} bytes");
            Ok(())
        };
        let turn = turn(gateway, call).await?;
        ensure!(turn <= TURN_MAX, "{name}: {turn:?}");
    }
    bounded.stayed_within()
}
