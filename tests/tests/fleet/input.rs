//! Bytes that are no calls: no process panics, and other callers are served.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fleet_tests::Fleet;
use fleet_tests::calls::{client, infer, pixels, texts};
use platform::channel::{Channel, Target};
use prost::Message;

/// Numbers that look random and are the same in every run (xorshift64).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }
}

/// A message with some bytes changed, cut out or put in.
fn mutated(message: &[u8], numbers: &mut Numbers) -> Vec<u8> {
    let mut bytes = message.to_vec();
    for _ in 0..=numbers.below(6) {
        let position = numbers.below(bytes.len().max(1));
        match numbers.below(4) {
            0 if !bytes.is_empty() => bytes[position] = numbers.next() as u8,
            1 if !bytes.is_empty() => bytes[position] ^= 1 << numbers.below(8),
            2 => bytes.truncate(position),
            _ => bytes.insert(position.min(bytes.len()), numbers.next() as u8),
        }
    }
    bytes
}

/// A message with its prefix, or with a prefix that lies.
fn framed(message: &[u8], numbers: &mut Numbers) -> Vec<u8> {
    let mut length = message.len() as u32;
    let mut flag = 0;
    match numbers.below(12) {
        0 => length = numbers.next() as u32,
        1 => flag = numbers.next() as u8,
        _ => {}
    }
    let mut framed = vec![flag];
    framed.extend(length.to_be_bytes());
    framed.extend(message);
    framed
}

async fn send(channel: &Channel, address: SocketAddr, path: &str, framed: Vec<u8>) -> Result<()> {
    let call = http::Request::post(format!("http://{address}{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("grpc-timeout", "5S")
        .body(())?;
    let sent = channel.send(call, framed.into());
    let response = tokio::time::timeout(Duration::from_secs(10), sent).await??;
    let body = http_body_util::BodyExt::collect(response.into_body());
    tokio::time::timeout(Duration::from_secs(10), body).await??;
    Ok(())
}

async fn attack(address: SocketAddr, seed: u64) -> Result<()> {
    let mut numbers = Numbers(seed);
    let channel =
        Channel::connect(&Target::Tcp(address.to_string()), Duration::from_secs(5)).await?;
    let messages = [
        pixels(&[[3.0; 64]; 2]).encode_to_vec(),
        texts(&["a text", "日本語", ""]).encode_to_vec(),
        b"\x0a\x06a text\x10\x01".to_vec(),
    ];
    let paths = [
        "/inference.GRPCInferenceService/ModelInfer",
        "/inference.GRPCInferenceService/ModelStreamInfer",
        "/inference.GRPCInferenceService/ModelMetadata",
        "/inference.GRPCInferenceService/ModelStatistics",
        "/inference.GRPCInferenceService/TraceSetting",
        "/tei.v1.Embed/Embed",
        "/tei.v1.Embed/EmbedAllStream",
        "/tei.v1.Tokenize/Tokenize",
        "/tei.v1.Tokenize/Decode",
        "/tei.v1.Rerank/RerankStream",
        "/nobody.Knows/This",
        "/",
    ];
    for round in 0..1_200 {
        let message = &messages[numbers.below(messages.len())];
        let path = paths[round % paths.len()];
        let message = mutated(message, &mut numbers);
        let framed = framed(&message, &mut numbers);
        send(&channel, address, path, framed)
            .await
            .with_context(|| format!("round {round} to {path}"))?;
    }
    Ok(())
}

#[tokio::test]
async fn mutated_messages_get_a_status_and_no_process_panics() -> Result<()> {
    let fleet = Fleet::start(1).await?;
    let worker = fleet.workers[0].as_ref().context("a worker")?;
    let (gateway, direct) = (fleet.gateway.grpc, worker.grpc);
    tokio::try_join!(
        attack(gateway, 0x9e37_79b9_7f4a_7c15),
        attack(direct, 0xd1b5_4a32_d192_ed03)
    )?;
    for andon in [&fleet.gateway, worker] {
        let logged = andon.logged();
        ensure!(!logged.contains("panicked"), "{logged}");
        ensure!(
            andon.get("/readyz").await?.starts_with("ready"),
            "not ready"
        );
        let client = client(andon.grpc).await?;
        infer(&client, pixels(&[[3.0; 64]]), Duration::from_secs(5)).await?;
        infer(&client, texts(&["a text"]), Duration::from_secs(5)).await?;
    }
    Ok(())
}
