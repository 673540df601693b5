//! A service that answers byte for byte as a scenario says, whole and as a
//! stream, ahead of a good one in a fallback chain. Of each scenario is known
//! what the caller gets, what the service's model is charged, and which attempt
//! of the chain responds.

mod anthropic;
mod openai;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fleet_tests::until;
use futures::{StreamExt, stream};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use super::generation::OPENAI;
use super::{Outside, TIMEOUT, entry};

/// Calls that are in flight at once.
const CALLS: usize = 16;
/// Between the comments of a service that keeps its connection alive.
const COMMENT_INTERVAL: Duration = Duration::from_millis(100);
/// What the good model writes.
const BACKUP: &str = "Backup";

/// What the first model of a chain does, and what must come of it.
struct Scenario {
    name: String,
    kind: &'static str,
    /// Whether the caller asks for a stream.
    stream: bool,
    script: Script,
    expected: Expected,
}

/// What a service writes.
#[derive(Clone)]
struct Script {
    bytes: Vec<u8>,
    /// Whether each byte is written by itself.
    byte_by_byte: bool,
    /// Whether the connection stays open after the last byte.
    falls_silent: bool,
    /// Whether comments follow for as long as anybody reads them.
    stays_alive: bool,
}

impl Script {
    /// A response of these headers and this body, which ends with the connection.
    fn new(head: &str, body: impl AsRef<[u8]>) -> Self {
        let head = format!("HTTP/1.1 {head}\r\nconnection: close\r\n\r\n");
        Self {
            bytes: [head.as_bytes(), body.as_ref()].concat(),
            byte_by_byte: false,
            falls_silent: false,
            stays_alive: false,
        }
    }

    /// A response in JSON.
    fn json(body: impl AsRef<[u8]>) -> Self {
        Self::new("200 OK\r\ncontent-type: application/json", body)
    }

    /// A stream of events.
    fn events(body: impl AsRef<[u8]>) -> Self {
        Self::new("200 OK\r\ncontent-type: text/event-stream", body)
    }
}

/// What the caller gets, and what the first model is charged: a token that it
/// read costs one, and one that it wrote two.
#[derive(Clone, Debug, PartialEq)]
struct Expected {
    got: Got,
    cost: f64,
}

/// What the caller gets.
#[derive(Clone, Debug, PartialEq)]
struct Got {
    /// The fallback header, where the second attempt responded.
    fallback: Option<String>,
    text: String,
    /// The finish reason, `error` for a stream that failed, or the status.
    end: String,
}

/// The first model responds.
fn answered(text: &str, finish_reason: &str, cost: f64) -> Expected {
    let got = Got {
        fallback: None,
        text: text.to_owned(),
        end: finish_reason.to_owned(),
    };
    Expected { got, cost }
}

/// The first model's stream fails after this text.
fn failed_after(text: &str, cost: f64) -> Expected {
    answered(text, "error", cost)
}

/// The first model fails with a status, and the second responds.
fn fell_back(code: &str, cost: f64) -> Expected {
    let mut expected = answered(BACKUP, "stop", cost);
    expected.got.fallback = Some(format!("good; {code}"));
    expected
}

/// The first model refuses the request, which no other would take.
fn refused(status: u16) -> Expected {
    answered("", &format!("status {status}"), 0.0)
}

/// The data of events in the usual form.
fn framed(events: &[&str]) -> String {
    let events = events.iter().map(|data| format!("data: {data}\n\n"));
    events.collect()
}

/// Writes the scripts to whoever calls.
struct Service {
    address: SocketAddr,
    _calls: JoinSet<Result<()>>,
}

impl Service {
    async fn start(scripts: Vec<Script>) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let scripts = Arc::new(scripts);
        let mut calls = JoinSet::new();
        calls.spawn(accept(listener, scripts));
        Ok(Self {
            address,
            _calls: calls,
        })
    }
}

async fn accept(listener: TcpListener, scripts: Arc<Vec<Script>>) -> Result<()> {
    let mut calls = JoinSet::new();
    loop {
        let (connection, _) = listener.accept().await?;
        calls.spawn(respond(connection, scripts.clone()));
    }
}

/// Reads one request, and writes the script that its path names.
async fn respond(mut connection: TcpStream, scripts: Arc<Vec<Script>>) -> Result<()> {
    connection.set_nodelay(true)?;
    let (mut request, mut buffer) = (Vec::new(), [0; 4096]);
    while !is_whole(&request) {
        let count = connection.read(&mut buffer).await?;
        ensure!(count > 0, "a request that ends in the middle");
        request.extend_from_slice(&buffer[..count]);
    }
    let request = String::from_utf8(request)?;
    let path = request.strip_prefix("POST /").context("no POST")?;
    let (name, _) = path.split_once('/').context("no script in the path")?;
    let script = match name {
        "good" => good(request.contains("\"stream\":true")),
        number => {
            let script = scripts.get(number.parse::<usize>()?);
            script.context("no such script")?.clone()
        }
    };
    if script.byte_by_byte {
        for byte in &script.bytes {
            connection.write_all(&[*byte]).await?;
            tokio::task::yield_now().await;
        }
    } else {
        connection.write_all(&script.bytes).await?;
    }
    if script.stays_alive {
        loop {
            connection.write_all(b": hello\n\n").await?;
            tokio::time::sleep(COMMENT_INTERVAL).await;
        }
    }
    if script.falls_silent {
        std::future::pending::<()>().await;
    }
    connection.shutdown().await?;
    Ok(())
}

fn is_whole(request: &[u8]) -> bool {
    let text = String::from_utf8_lossy(request).to_ascii_lowercase();
    let Some((head, body)) = text.split_once("\r\n\r\n") else {
        return false;
    };
    let mut lines = head.lines();
    let length = lines.find_map(|line| line.strip_prefix("content-length:"));
    let length = length.and_then(|length| length.trim().parse().ok());
    body.len() >= length.unwrap_or(0)
}

/// The response of the second model of each chain.
fn good(stream: bool) -> Script {
    let usage = json!({"prompt_tokens": 1, "completion_tokens": 1});
    let content = json!({"content": BACKUP});
    if !stream {
        let choice = json!({"message": content, "finish_reason": "stop"});
        return Script::json(json!({"choices": [choice], "usage": usage}).to_string());
    }
    let choice = json!({"delta": content, "finish_reason": "stop"});
    let chunk = json!({"choices": [choice], "usage": usage}).to_string();
    Script::events(framed(&[&chunk, "[DONE]"]))
}

/// A model and a chain for each scenario: what one does leaves the circuit
/// breakers of the others closed.
fn catalogue(scenarios: &[Scenario], service: SocketAddr) -> String {
    let more = format!("{OPENAI}\nretries_max = 0\ntimeout = \"2s\"");
    let mut catalogue = entry("good", &format!("http://{service}/good/v1"), &more);
    for (index, scenario) in scenarios.iter().enumerate() {
        let more = more.replace("openai", scenario.kind);
        let url = format!("http://{service}/{index}/v1");
        catalogue += &entry(&format!("model{index}"), &url, &more);
        catalogue += &format!("[chains.chain{index}]\nmodels = [\"model{index}\", \"good\"]\n");
    }
    catalogue
}

/// Calls a chain, and reads what comes.
async fn call(url: &str, index: usize, stream: bool) -> Result<Got> {
    let body = json!({
        "model": format!("chain{index}"), "max_tokens": 7, "stream": stream,
        "messages": [{"role": "user", "content": "hello"}],
    });
    let client = reqwest::Client::builder().no_proxy().timeout(TIMEOUT);
    let response = client.build()?.post(url).json(&body).send().await?;
    let status = response.status().as_u16();
    let fallback = response.headers().get("x-andon-fallback");
    let fallback = fallback.map(|value| value.to_str().map(str::to_owned));
    let fallback = fallback.transpose()?;
    let body = response.text().await?;
    let (text, end) = match (status, stream) {
        (200, true) => read_events(&body)?,
        (200, false) => {
            let whole: Value = serde_json::from_str(&body)?;
            let choice = &whole["choices"][0];
            (
                string(&choice["message"]["content"]),
                string(&choice["finish_reason"]),
            )
        }
        _ => (String::new(), format!("status {status}")),
    };
    Ok(Got {
        fallback,
        text,
        end,
    })
}

/// The text of a stream, and how it ends: `[DONE]` follows a finish reason, and
/// never an error.
fn read_events(body: &str) -> Result<(String, String)> {
    let (mut text, mut end, mut done) = (String::new(), String::new(), false);
    for data in body.split_terminator("\n\n") {
        let data = data
            .strip_prefix("data: ")
            .context("an event has no data")?;
        ensure!(!done && end != "error", "an event after the last: {body}");
        if data == "[DONE]" {
            done = true;
            continue;
        }
        let event: Value = serde_json::from_str(data)?;
        if event["error"].is_object() {
            ensure!(end.is_empty(), "an error after a finish reason: {body}");
            end = "error".to_owned();
            continue;
        }
        let choice = &event["choices"][0];
        text += &string(&choice["delta"]["content"]);
        if choice["finish_reason"].is_string() {
            end = string(&choice["finish_reason"]);
        }
    }
    ensure!(done != (end == "error" || end.is_empty()), "no end: {body}");
    Ok((text, end))
}

fn string(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

#[tokio::test]
async fn every_answer_of_a_service_is_used_charged_or_failed_as_it_must_be() -> Result<()> {
    let scenarios = [openai::scenarios(), anthropic::scenarios()];
    let scenarios: Vec<Scenario> = scenarios.into_iter().flatten().collect();
    ensure!(scenarios.len() >= 100, "{}", scenarios.len());
    let scripts = scenarios.iter().map(|scenario| scenario.script.clone());
    let service = Service::start(scripts.collect()).await?;
    let outside = Outside::start(&catalogue(&scenarios, service.address)).await?;
    let url = format!("http://{}/v1/chat/completions", outside.gateway.http);
    let calls = scenarios.iter().enumerate();
    let calls = calls.map(|(index, scenario)| call(&url, index, scenario.stream));
    let got: Vec<Result<Got>> = stream::iter(calls).buffered(CALLS).collect().await;
    let costs = || async {
        let page = outside.gateway.get("/metrics").await?;
        let costs = (0..scenarios.len()).map(|index| cost(&page, &format!("model{index}")));
        anyhow::Ok(costs.collect::<Vec<f64>>())
    };
    // A stream is charged when its end has been read, or when it is dropped.
    let charged = until(TIMEOUT, "all are charged", || async {
        let expected = scenarios.iter().map(|scenario| scenario.expected.cost);
        Ok(expected.eq(costs().await?))
    });
    // What is charged wrongly is told below, with the scenario's name.
    let _ = charged.await;
    let mut wrong = Vec::new();
    for ((scenario, got), cost) in scenarios.iter().zip(got).zip(costs().await?) {
        let expected = &scenario.expected;
        let got = got.map(|got| Expected { got, cost });
        if !matches!(&got, Ok(got) if got == expected) {
            let (name, kind) = (&scenario.name, scenario.kind);
            let form = if scenario.stream { "stream" } else { "whole" };
            wrong.push(format!("{kind}, {form}, {name}: {got:?}, not {expected:?}"));
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    // The good model was asked as often as the first one failed, and no more.
    let fallbacks = scenarios.iter();
    let fallbacks = fallbacks.filter(|scenario| scenario.expected.got.fallback.is_some());
    let expected = 3.0 * fallbacks.count() as f64;
    let page = outside.gateway.get("/metrics").await?;
    ensure!(cost(&page, "good") == expected, "{}", cost(&page, "good"));
    Ok(())
}

/// What a model has cost; nothing where nothing was counted.
fn cost(page: &str, model: &str) -> f64 {
    let name = format!("andon_gateway_provider_cost_total{{tenant=\"anyone\",model=\"{model}\"}} ");
    let line = page.lines().find_map(|line| line.strip_prefix(&name));
    let cost = line.and_then(|cost| cost.trim().parse().ok());
    cost.unwrap_or_default()
}
