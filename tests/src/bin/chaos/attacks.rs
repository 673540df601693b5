//! Callers that mean harm, each beside an honest tenant: a few kilobytes that ask
//! for much memory, work or places, and give nothing back.

use std::time::Duration;

use anyhow::Result;
use bytes::Bytes;
use fleet_tests::flood::{Flood, FloodCall};
use fleet_tests::raw;
use prost::Message;
use protocol::inference::ModelInferRequest;
use protocol::inference::model_infer_request::InferRequestedOutputTensor;
use protocol::tei::v1 as tei;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::honest::{Attacked, measure};
use crate::starvation;

/// How long an attack goes on.
pub const ATTACK: Duration = Duration::from_secs(20);
/// The length that a message claims.
const CLAIMED: usize = 60 << 20;
/// What a client of the h2 crate takes of an answer before it makes room.
const WINDOW: u32 = 64 << 10;
const INFER: &str = "POST /inference.GRPCInferenceService/ModelInfer";
const STREAM: &str = "POST /inference.GRPCInferenceService/ModelStreamInfer";

/// Every attack, on a fleet of its own.
pub async fn report() -> Result<()> {
    println!(
        "| attack | honest calls | failed | p99 before | p99 during | ratio | MB before | MB at most | MB 30 s after | workers wrongly lost |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|");
    let attacked = Attacked::start(&[]).await?;
    measure(&attacked, "claimed lengths", claimed_lengths).await?;
    let attacked = Attacked::start(&[]).await?;
    measure(&attacked, "unread answers", unread_answers).await?;
    let attacked = Attacked::start(&["--bytes-in-flight-max", "512MiB"]).await?;
    measure(&attacked, "half-sent messages", half_sent_messages).await?;
    let attacked = Attacked::start(&[]).await?;
    measure(&attacked, "silent streams", silent_streams).await?;
    let attacked = Attacked::start(&[]).await?;
    measure(&attacked, "poisonous requests", poisonous_requests).await?;
    let attacked = Attacked::start(&[]).await?;
    measure(&attacked, "impatient callers", impatient_callers).await?;
    starvation::report().await
}

fn prefix(length: usize) -> Bytes {
    let mut prefix = vec![0];
    prefix.extend((length as u32).to_be_bytes());
    prefix.into()
}

/// Twenty connections of a hundred streams, each of which claims 60 MiB and
/// sends nothing of it.
async fn claimed_lengths(attacked: &Attacked) -> Result<Vec<Flood>> {
    let headers = [("x-api-key", &*attacked.hostile)];
    let mut floods = Vec::new();
    for _ in 0..20 {
        let mut flood = Flood::connect(attacked.fleet.gateway.grpc, WINDOW).await?;
        for _ in 0..100 {
            let call = FloodCall {
                head: INFER,
                headers: &headers,
                ended: false,
            };
            if flood.open(call, prefix(CLAIMED)).await.is_err() {
                break;
            }
        }
        floods.push(flood);
    }
    tokio::time::sleep(ATTACK).await;
    Ok(floods)
}

/// Answers of hundreds of kilobytes, of which no byte may be sent.
async fn unread_answers(attacked: &Attacked) -> Result<Vec<Flood>> {
    let headers = [("x-api-key", &*attacked.hostile)];
    let pages = FloodCall {
        head: "GET /openapi.json",
        headers: &[],
        ended: true,
    };
    let rows = fleet_tests::calls::pixels(&[[1.0; 64]; 200]);
    let rows = raw::framed(&rows.encode_to_vec(), false);
    let calls = FloodCall {
        head: INFER,
        headers: &headers,
        ended: true,
    };
    let gateway = &attacked.fleet.gateway;
    let mut floods = Vec::new();
    let ends = Instant::now() + ATTACK;
    for _ in 0..20 {
        for (address, call, first) in [
            (gateway.http, pages, Bytes::new()),
            (gateway.grpc, calls, rows.clone()),
        ] {
            let mut flood = Flood::connect(address, 0).await?;
            for _ in 0..200 {
                if flood.open(call, first.clone()).await.is_err() {
                    break;
                }
            }
            floods.push(flood);
        }
    }
    tokio::time::sleep_until(ends).await;
    Ok(floods)
}

/// Nine streams that send nearly 60 MiB each, and then a byte every second.
async fn half_sent_messages(attacked: &Attacked) -> Result<Vec<Flood>> {
    let headers = [("x-api-key", &*attacked.hostile)];
    let call = FloodCall {
        head: INFER,
        headers: &headers,
        ended: false,
    };
    let mut floods = Vec::new();
    let most = Bytes::from(vec![0; CLAIMED - 1000]);
    for _ in 0..9 {
        let mut flood = Flood::connect(attacked.fleet.gateway.grpc, WINDOW).await?;
        flood.open(call, prefix(CLAIMED)).await?;
        flood.send(0, most.clone());
        floods.push(flood);
    }
    for _ in 0..ATTACK.as_secs() {
        tokio::time::sleep(Duration::from_secs(1)).await;
        for flood in &mut floods {
            flood.send(0, Bytes::from_static(&[0]));
        }
    }
    Ok(floods)
}

/// Ten connections of a thousand streams each that never send a message.
async fn silent_streams(attacked: &Attacked) -> Result<Vec<Flood>> {
    let headers = [("x-api-key", &*attacked.hostile), ("grpc-timeout", "1H")];
    let mut floods = Vec::new();
    for _ in 0..10 {
        let mut flood = Flood::connect(attacked.fleet.gateway.grpc, WINDOW).await?;
        for _ in 0..1000 {
            let call = FloodCall {
                head: STREAM,
                headers: &headers,
                ended: false,
            };
            if flood.open(call, Bytes::new()).await.is_err() {
                break;
            }
        }
        floods.push(flood);
    }
    tokio::time::sleep(ATTACK).await;
    Ok(floods)
}

/// Messages that are small on the way and large, or much work, where they are
/// read.
fn poison() -> Result<Vec<(&'static str, &'static str, Bytes)>> {
    let gzip = |message: &[u8]| -> Result<Bytes> { Ok(raw::framed(&raw::gzip(message)?, true)) };
    let output = InferRequestedOutputTensor {
        name: "o".to_owned(),
        ..Default::default()
    };
    let outputs = ModelInferRequest {
        outputs: vec![output; 80_000],
        ..fleet_tests::calls::pixels(&[[1.0; 64]])
    };
    let rerank = tei::RerankRequest {
        query: "q".repeat(8 << 20),
        texts: vec![String::new(); 20_000],
        ..Default::default()
    };
    let decode = tei::DecodeRequest {
        ids: vec![1; 16_000_000],
        skip_special_tokens: true,
    };
    let masks = "[MASK]".repeat((1 << 20) / 6);
    let texts = fleet_tests::calls::texts(&vec![masks; 32]);
    Ok(vec![
        (
            "minilm",
            "/tei.v1.Rerank/Rerank",
            gzip(&rerank.encode_to_vec())?,
        ),
        (
            "minilm",
            "/tei.v1.Tokenize/Decode",
            gzip(&decode.encode_to_vec())?,
        ),
        ("digits", &INFER[5..], gzip(&outputs.encode_to_vec())?),
        ("minilm", &INFER[5..], gzip(&texts.encode_to_vec())?),
    ])
}

/// Each poison again and again.
async fn poisonous_requests(attacked: &Attacked) -> Result<()> {
    let ends = Instant::now() + ATTACK;
    let mut callers = JoinSet::new();
    for (model, path, framed) in poison()? {
        let (address, key) = (attacked.fleet.gateway.grpc, attacked.hostile.clone());
        callers.spawn(async move {
            let metadata = [
                ("x-api-key", &*key),
                ("andon-model", model),
                ("grpc-timeout", "3S"),
            ];
            while Instant::now() < ends {
                // A refusal, an error and a closed connection are all the same.
                if let Ok(channel) = raw::connect(address).await {
                    while Instant::now() < ends
                        && raw::call(&channel, path, &metadata, framed.clone())
                            .await
                            .is_ok()
                    {}
                }
            }
        });
    }
    while callers.join_next().await.is_some() {}
    Ok(())
}

/// Callers whose deadlines are a millisecond or a microsecond.
async fn impatient_callers(attacked: &Attacked) -> Result<()> {
    let ends = Instant::now() + ATTACK;
    let message = fleet_tests::calls::texts(&["a lantern around a candle"; 8]);
    let framed = raw::framed(&message.encode_to_vec(), false);
    let mut callers = JoinSet::new();
    for timeout in ["1m", "1m", "1m", "1m", "1u", "1u"] {
        let (address, key) = (attacked.fleet.gateway.grpc, attacked.hostile.clone());
        let framed = framed.clone();
        callers.spawn(async move {
            let metadata = [("x-api-key", &*key), ("grpc-timeout", timeout)];
            while Instant::now() < ends {
                if let Ok(channel) = raw::connect(address).await {
                    while Instant::now() < ends
                        && raw::call(&channel, &INFER[5..], &metadata, framed.clone())
                            .await
                            .is_ok()
                    {}
                }
            }
        });
    }
    while callers.join_next().await.is_some() {}
    Ok(())
}
