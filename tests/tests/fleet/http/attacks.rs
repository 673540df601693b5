//! Requests that no client sends: each has a response, and others
//! are served.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fleet_tests::calls::pixels;
use fleet_tests::{Fleet, until};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{HEADER_LENGTH, Protocol, digits, fetch, get, in_json, post, send, web};

async fn fleet() -> Result<Fleet> {
    let digits = digits()?;
    Fleet::with(1, &["--model", &digits], &["--message-bytes-max", "1MiB"]).await
}

/// What comes back for bytes that are written as they are.
pub async fn raw(address: SocketAddr, bytes: &[u8]) -> Result<String> {
    let mut stream = TcpStream::connect(address).await?;
    // The server may have closed it before everything is written.
    let _ = stream.write_all(bytes).await;
    let mut answer = vec![0; 4096];
    let read = tokio::time::timeout(Duration::from_secs(20), stream.read(&mut answer));
    let count = read.await.context("no answer")?.unwrap_or_default();
    Ok(String::from_utf8_lossy(&answer[..count]).into_owned())
}

async fn serves(fleet: &Fleet) -> Result<()> {
    let logged = fleet.gateway.logged();
    ensure!(!logged.contains("panicked"), "{logged}");
    let request = pixels(&[[3.0; 64]]);
    let response = send(fleet.gateway.http, Protocol::Http1, &request, true, &[]).await?;
    ensure!(response.status == 200, "{response:?}");
    // Nothing that was taken for a request stays.
    until(
        Duration::from_secs(20),
        "the bytes are given back",
        || async {
            let bytes = fleet
                .gateway
                .metric("andon_gateway_bytes_in_flight")
                .await?;
            let calls = fleet.gateway.metric("andon_gateway_in_flight").await?;
            Ok((bytes, calls) == (Some(0.0), Some(0.0)))
        },
    )
    .await
}

#[tokio::test]
async fn errors_in_json_name_their_field_and_position() -> Result<()> {
    let fleet = fleet().await?;
    let address = fleet.gateway.http;
    let path = "/v2/models/digits/infer";
    let input = |data: &str| {
        format!(
            "{{\"inputs\": [{{\"name\": \"pixels\", \"datatype\": \"FP32\",\n\"shape\": [1, 64], \"data\": {data}}}]}}"
        )
    };
    let deep = "[".repeat(400_000);
    for (body, field, position) in [
        (String::new(), "body", "line 1"),
        (
            "{\"inputs\":\n  [}".to_owned(),
            "inputs[0]",
            "line 2, column 4",
        ),
        ("{\"inputs\": [], \"more\": 1}".to_owned(), "more", "line 1"),
        (input("[NaN]"), "inputs[0].data", "line 2, column 28"),
        (
            input("[1, \"2\"]"),
            "inputs[0].data[1]",
            "line 2, column 31",
        ),
        (input("[1, 2]"), "inputs[0].data", "2 elements"),
        (input("[[[1]]]"), "inputs[0].data", "line 2"),
        (input("[1e40]"), "inputs[0].data[0]", "FP32"),
        (input("7"), "inputs[0].data", "array"),
        (deep.clone(), "body", "must be an object"),
        (input(&deep), "inputs[0].data", "line 2"),
        ("\u{0}\u{1}".to_owned(), "body", "line 1, column 1"),
    ] {
        let response = post(address, path, body).await?;
        ensure!(response.status == 400, "{response:?}");
        ensure!(
            response.text("field")?.as_deref() == Some(field),
            "{response:?}"
        );
        let error = response.text("error")?.unwrap_or_default();
        ensure!(error.contains(position), "{position}: {error}");
    }
    let form = web(Protocol::Http1)?
        .post(format!("http://{address}{path}"))
        .header("content-type", "application/x-www-form-urlencoded");
    let response = fetch(form.body("{}")).await?;
    ensure!(
        response.text("field")?.as_deref() == Some("content-type"),
        "{response:?}"
    );
    serves(&fleet).await
}

/// Bodies that are right but for one value inside, and its field.
fn nested() -> Vec<(&'static str, Value, &'static str)> {
    let chat = json!({"model": "digits", "messages": [{"role": "user", "content": "a"}]});
    let changed = |key: &str, value: Value| {
        let mut body = chat.clone();
        body[key] = value;
        body
    };
    let infer = json!({"name": "pixels", "datatype": "FP32", "shape": [1, 64], "data": [[0]]});
    vec![
        (
            "/v2/models/digits/infer",
            json!({"inputs": [["pixels", "FP32", [1, 64], {}, []]]}),
            "inputs[0]",
        ),
        (
            "/v2/models/digits/infer",
            json!({"inputs": [infer], "outputs": [["digit"]]}),
            "outputs[0]",
        ),
        (
            "/v2/models/digits/generate",
            json!({"text_input": "a", "parameters": [1]}),
            "parameters",
        ),
        (
            "/v1/chat/completions",
            changed("messages", json!([["user", "a"]])),
            "messages[0]",
        ),
        (
            "/v1/chat/completions",
            changed(
                "messages",
                json!([{"role": {"user": null}, "content": "a"}]),
            ),
            "messages[0].role",
        ),
        (
            "/v1/chat/completions",
            changed(
                "messages",
                json!([{"role": "user", "content": [["text", "a"]]}]),
            ),
            "messages[0].content[0]",
        ),
        (
            "/v1/chat/completions",
            changed("stream_options", json!([true])),
            "stream_options",
        ),
        (
            "/v1/chat/completions",
            changed("response_format", json!(["text"])),
            "response_format",
        ),
        (
            "/v1/chat/completions",
            changed("response_format", json!({"type": {"text": null}})),
            "response_format.type",
        ),
        (
            "/v1/embeddings",
            json!({"model": "digits", "input": "a", "encoding_format": {"float": null}}),
            "encoding_format",
        ),
        (
            "/rerank",
            json!({"query": "a", "texts": ["b"], "truncation_direction": {"Left": null}}),
            "truncation_direction",
        ),
    ]
}

/// serde would read an object from a list of its fields' values, and a word
/// from an object of one entry.
#[tokio::test]
async fn objects_are_not_read_from_lists_nor_words_from_objects() -> Result<()> {
    let fleet = fleet().await?;
    let address = fleet.gateway.http;
    let refuse = |path: String, body: Value, field: &'static str| async move {
        let response = post(address, &path, body.to_string()).await?;
        ensure!(response.status == 400, "{path}: {body}: {response:?}");
        let problem = response.json()?;
        let named = [&problem["field"], &problem["error"]["param"]];
        ensure!(named.contains(&&json!(field)), "{path}: {body}: {problem}");
        Ok(())
    };
    let document = get(address, "/openapi.json").await?.json()?;
    let paths = document["paths"].as_object().context("paths")?;
    let read = paths
        .iter()
        .filter(|(_, item)| item["post"]["requestBody"].is_object());
    let read: Vec<&String> = read.map(|(path, _)| path).collect();
    ensure!(read.len() >= 12, "{read:?}");
    for path in read {
        let path = path.replace("{model}", "digits").replace("{version}", "1");
        refuse(path, json!([]), "body").await?;
    }
    for (path, body, field) in nested() {
        refuse(path.to_owned(), body, field).await?;
    }
    serves(&fleet).await
}

#[tokio::test]
async fn heads_and_bodies_that_never_end_are_ended() -> Result<()> {
    let fleet = fleet().await?;
    let address = fleet.gateway.http;
    // A body that stops in the middle holds nothing for longer than it says.
    let slow = "POST /v2/models/digits/infer HTTP/1.1\r\nhost: localhost\r\ntimeout: 300\r\ncontent-length: 1000\r\n\r\n{\"inp";
    let answer = raw(address, slow.as_bytes()).await?;
    ensure!(answer.starts_with("HTTP/1.1 504"), "{answer}");
    let declared = "POST /v2/models/digits/infer HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99999999999\r\n\r\n{";
    let answer = raw(address, declared.as_bytes()).await?;
    ensure!(answer.starts_with("HTTP/1.1 413"), "{answer}");
    let many: String = (0..5_000).map(|n| format!("x-{n}: y\r\n")).collect();
    let bomb = format!("GET /v2 HTTP/1.1\r\nhost: localhost\r\n{many}\r\n");
    let answer = raw(address, bomb.as_bytes()).await?;
    ensure!(
        answer.is_empty() || answer.starts_with("HTTP/1.1 431"),
        "{answer}"
    );
    let long = format!(
        "GET /v2 HTTP/1.1\r\nhost: localhost\r\nx: {}\r\n\r\n",
        "y".repeat(1 << 20)
    );
    let answer = raw(address, long.as_bytes()).await?;
    ensure!(
        answer.is_empty() || answer.starts_with("HTTP/1.1 431"),
        "{answer}"
    );
    let both = "POST /v2/models/digits/infer HTTP/1.1\r\nhost: localhost\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\nGET /v2 HTTP/1.1\r\n\r\n";
    let answer = raw(address, both.as_bytes()).await?;
    ensure!(
        answer.is_empty() || answer.starts_with("HTTP/1.1 400"),
        "{answer}"
    );
    serves(&fleet).await
}

#[tokio::test]
async fn mutated_requests_get_a_status_and_no_process_panics() -> Result<()> {
    let fleet = fleet().await?;
    let address = fleet.gateway.http;
    let client = web(Protocol::Http2)?;
    let mut number = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = |end: usize| {
        number ^= number << 13;
        number ^= number >> 7;
        number ^= number << 17;
        (number % end.max(1) as u64) as usize
    };
    for round in 0..600 {
        let text = round % 2 == 0;
        let (mut body, mut length) = in_json(&pixels(&[[3.0; 64]; 2]), text);
        for _ in 0..=next(4) {
            let position = next(if round % 3 == 0 { body.len() } else { 200 });
            match next(4) {
                0 => body[position] = next(256) as u8,
                1 => body[position] ^= 1 << next(8),
                2 => drop(body.drain(position..(position + next(20)).min(body.len()))),
                _ => body.insert(position, b"[]{}\",:0-"[next(9)]),
            }
        }
        if next(5) == 0 {
            length = next(2 * body.len());
        }
        let url = format!("http://{address}/v2/models/digits/infer");
        let mut call = client.post(url).body(body);
        if !text {
            call = call.header(HEADER_LENGTH, length.to_string());
        }
        let response = fetch(call).await?;
        let known = [200, 400].contains(&response.status);
        ensure!(known, "round {round}: {response:?}");
    }
    serves(&fleet).await
}
