//! What a tenant holds and gives nothing for: answers that it does not read,
//! messages that it sends by half, streams that wait. They are the tenant's, though
//! others call from the same address, and leave these their share.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use fleet_tests::calls::{Client, call, client, texts};
use fleet_tests::flood::{Flood, FloodCall};
use fleet_tests::process::Andon;
use fleet_tests::until;
use protocol::inference::{ModelInferRequest, ModelStreamInferResponse};
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::mpsc;
use tonic::{Code, Streaming};

use super::{QuotaFleet, tenant};

const INFER: &str = "/inference.GRPCInferenceService/ModelInfer";
const INFER_HTTP: &str = "/v2/models/echo/infer";
const BYTES_HELD: &str = "andon_gateway_bytes_in_flight";
const STREAMS_HELD: &str = "andon_waiting_streams";
/// What a client of the h2 crate takes of an answer before it makes room.
const WINDOW: u32 = 64 << 10;
/// Nothing that a test waits for takes so long.
const LIMIT: Duration = Duration::from_secs(20);

/// A gateway with these flags and two tenants, over a server that echoes.
async fn fleet(flags: &[&str]) -> Result<QuotaFleet> {
    let policy = tenant("a", "") + &tenant("b", "");
    QuotaFleet::start(&policy, 1, flags, "0s").await
}

fn key<'f>(fleet: &'f QuotaFleet, tenant: &str) -> Result<&'f str> {
    let key = fleet.keys.get(tenant).context("no such tenant")?;
    Ok(key)
}

fn echo(bytes: usize) -> ModelInferRequest {
    ModelInferRequest {
        model_name: "echo".to_owned(),
        ..texts(&["a".repeat(bytes)])
    }
}

/// A call of a tenant with a text of so many bytes, which come back.
async fn served(fleet: &QuotaFleet, tenant: &str, bytes: usize) -> Result<()> {
    let metadata = [("x-api-key", key(fleet, tenant)?)];
    let status = call(fleet.gateways[0].grpc, INFER, &metadata, &echo(bytes)).await?;
    ensure!(status.code() == Code::Ok, "{status:?}");
    Ok(())
}

async fn held(gateway: &Andon, name: &str) -> Result<f64> {
    gateway.metric(name).await?.context("no such metric")
}

/// Whether a limit was reached.
async fn reached(gateway: &Andon, flag: &str) -> Result<bool> {
    let name = format!("andon_limits_reached_total{{flag=\"{flag}\"}}");
    Ok(held(gateway, &name).await? > 0.0)
}

/// A message of a tenant that claims so many bytes, of which some come.
async fn half_sent(fleet: &QuotaFleet, tenant: &str, claimed: usize, sent: usize) -> Result<Flood> {
    let head = format!("POST {INFER}");
    let headers = [("x-api-key", key(fleet, tenant)?)];
    let call = FloodCall {
        head: &head,
        headers: &headers,
        ended: false,
    };
    let mut prefix = vec![0];
    prefix.extend((claimed as u32).to_be_bytes());
    let mut flood = Flood::connect(fleet.gateways[0].grpc, WINDOW).await?;
    flood.open(call, prefix.into()).await?;
    ensure!(flood.send(0, vec![0_u8; sent].into()), "it was refused");
    Ok(flood)
}

#[tokio::test]
async fn half_sent_messages_are_their_tenants_and_not_their_addresses() -> Result<()> {
    let flags = [
        "--bytes-in-flight-max",
        "16MiB",
        "--message-bytes-max",
        "4MiB",
        "--transfer-grace",
        "40s",
    ];
    let fleet = fleet(&flags).await?;
    let gateway = &fleet.gateways[0];
    // A message of B is on its way as well, so that its share is kept.
    let begun = half_sent(&fleet, "b", 4 << 20, 100).await?;
    until(LIMIT, "it has begun to come", || async {
        Ok(held(gateway, BYTES_HELD).await? > 0.0)
    })
    .await?;
    let mut floods = Vec::new();
    for _ in 0..8 {
        floods.push(half_sent(&fleet, "a", 4 << 20, (4 << 20) - 1000).await?);
    }
    until(LIMIT, "A has what it may have", || async {
        let refused = reached(gateway, "--bytes-in-flight-max").await?;
        Ok(refused && held(gateway, BYTES_HELD).await? >= f64::from(4 << 20))
    })
    .await?;
    let bytes = held(gateway, BYTES_HELD).await?;
    ensure!(bytes <= f64::from(9 << 20), "{bytes} bytes are held");
    for _ in 0..3 {
        // With its answer it is more than would be left to an address.
        served(&fleet, "b", 2 << 20).await?;
    }
    let bytes = held(gateway, BYTES_HELD).await?;
    ensure!(bytes >= f64::from(4 << 20), "the flood has ended: {bytes}");
    drop((begun, floods));
    until(LIMIT, "nothing is held", || async {
        Ok(held(gateway, BYTES_HELD).await? == 0.0)
    })
    .await
}

/// A stream of a tenant that is used now and then.
struct Conversation {
    sender: mpsc::Sender<ModelInferRequest>,
    answers: Streaming<ModelStreamInferResponse>,
    _client: Client,
}

impl Conversation {
    async fn begin(fleet: &QuotaFleet, tenant: &str) -> Result<Self> {
        let (sender, messages) = mpsc::channel(1);
        let messages = futures::stream::unfold(messages, |mut messages| async move {
            let message = messages.recv().await?;
            Some((message, messages))
        });
        let mut request = tonic::Request::new(messages);
        let key = key(fleet, tenant)?.parse()?;
        request.metadata_mut().insert("x-api-key", key);
        sender.send(echo(10)).await?;
        let mut client = client(fleet.gateways[0].grpc).await?;
        let answers = client.model_stream_infer(request).await?.into_inner();
        let mut begun = Self {
            sender,
            answers,
            _client: client,
        };
        begun.is_answered().await?;
        Ok(begun)
    }

    /// Sends a message, which is answered.
    async fn goes_on(&mut self) -> Result<()> {
        self.sender.send(echo(10)).await?;
        self.is_answered().await
    }

    async fn is_answered(&mut self) -> Result<()> {
        let answer = self.answers.message().await?.context("it has ended")?;
        ensure!(answer.error_message.is_empty(), "{answer:?}");
        Ok(())
    }
}

#[tokio::test]
async fn waiting_streams_are_their_tenants_and_not_their_addresses() -> Result<()> {
    let fleet = fleet(&["--waiting-streams-max", "16"]).await?;
    let gateway = &fleet.gateways[0];
    let mut first = Conversation::begin(&fleet, "b").await?;
    let head = format!("POST {INFER}").replace("ModelInfer", "ModelStreamInfer");
    let headers = [("x-api-key", key(&fleet, "a")?)];
    let mut flood = Flood::connect(gateway.grpc, WINDOW).await?;
    for _ in 0..32 {
        let call = FloodCall {
            head: &head,
            headers: &headers,
            ended: false,
        };
        flood.open(call, Bytes::new()).await?;
    }
    // Its share is half of all, and one is B's.
    until(LIMIT, "A has what it may have", || async {
        let refused = reached(gateway, "--waiting-streams-max").await?;
        Ok(refused && held(gateway, STREAMS_HELD).await? == 9.0)
    })
    .await?;
    // The idlest of all goes on: it is not of those who have the most.
    first.goes_on().await?;
    let mut second = Conversation::begin(&fleet, "b").await?;
    second.goes_on().await?;
    first.goes_on().await?;
    let streams = held(gateway, STREAMS_HELD).await?;
    ensure!(streams == 10.0, "{streams} streams wait");
    drop(flood);
    until(LIMIT, "the flood's are given back", || async {
        Ok(held(gateway, STREAMS_HELD).await? == 2.0)
    })
    .await
}

/// A request of 1.5 MiB in the binary form, whose answer in JSON is six times as
/// long: each of its characters is escaped.
struct Escaped {
    body: Vec<u8>,
    json_length: String,
}

impl Escaped {
    fn new() -> Result<Self> {
        let text = [vec![1_u8; 3 << 19]];
        let raw = tensor::encode_bytes_elements(&text)?;
        let input = json!({
            "name": "text", "datatype": "BYTES", "shape": [1],
            "parameters": {"binary_data_size": raw.len()},
        });
        let mut body = json!({"inputs": [input]}).to_string().into_bytes();
        let json_length = body.len().to_string();
        body.extend(raw);
        Ok(Self { body, json_length })
    }

    /// Asks over HTTP/2; no byte of the answer may be sent.
    async fn over_http2(&self, fleet: &QuotaFleet) -> Result<Flood> {
        let head = format!("POST {INFER_HTTP}");
        let headers = [
            ("x-api-key", key(fleet, "a")?),
            ("inference-header-content-length", &*self.json_length),
        ];
        let call = FloodCall {
            head: &head,
            headers: &headers,
            ended: true,
        };
        let mut flood = Flood::connect(fleet.gateways[0].http, 0).await?;
        flood.open(call, self.body.clone().into()).await?;
        Ok(flood)
    }

    /// Asks over HTTP/1.1, on a connection that takes little at a time.
    async fn over_http1(&self, fleet: &QuotaFleet) -> Result<TcpStream> {
        let socket = TcpSocket::new_v4()?;
        socket.set_recv_buffer_size(4 << 10)?;
        let mut stream = socket.connect(fleet.gateways[0].http).await?;
        let head = format!(
            "POST {INFER_HTTP} HTTP/1.1\r\nhost: localhost\r\nx-api-key: {}\r\n\
             inference-header-content-length: {}\r\ncontent-length: {}\r\n\r\n",
            key(fleet, "a")?,
            self.json_length,
            self.body.len(),
        );
        stream.write_all(head.as_bytes()).await?;
        // One that is refused may be closed before everything is written.
        let _ = stream.write_all(&self.body).await;
        Ok(stream)
    }
}

/// B is served at both doors while the answers of A wait, and these end though
/// their connections stay open.
async fn unread_answers_end(fleet: &QuotaFleet) -> Result<()> {
    let gateway = &fleet.gateways[0];
    until(LIMIT, "an answer waits", || async {
        let in_flight = held(gateway, "andon_gateway_in_flight").await?;
        let bytes = held(gateway, BYTES_HELD).await?;
        Ok(in_flight >= 1.0 && bytes > f64::from(8 << 20))
    })
    .await?;
    let web = reqwest::Client::builder().no_proxy().timeout(LIMIT);
    let web = web.build()?;
    let body = json!({
        "inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["a text"]}],
    });
    for _ in 0..5 {
        served(fleet, "b", 1 << 20).await?;
        let url = format!("http://{}{INFER_HTTP}", gateway.http);
        let sent = web.post(url).header("x-api-key", key(fleet, "b")?);
        let answer = sent.body(body.to_string()).send().await?;
        ensure!(answer.status() == 200, "{answer:?}");
    }
    let bytes = held(gateway, BYTES_HELD).await?;
    ensure!(bytes > f64::from(8 << 20), "they have ended: {bytes} bytes");
    until(5 * LIMIT, "the answers have ended", || async {
        let in_flight = held(gateway, "andon_gateway_in_flight").await?;
        Ok(in_flight == 0.0 && held(gateway, BYTES_HELD).await? == 0.0)
    })
    .await?;
    ensure!(reached(gateway, "--transfer-rate-min").await?, "not slow");
    Ok(())
}

/// Four answers have their room, of which two are a share.
const UNREAD_FLAGS: [&str; 8] = [
    "--message-bytes-max",
    "16MiB",
    "--bytes-in-flight-max",
    "64MiB",
    "--transfer-grace",
    "10s",
    // What the buffers of the system take up earns no time.
    "--transfer-rate-min",
    "1MiB",
];

#[tokio::test]
async fn answers_that_nobody_reads_over_http2_end_and_starve_nobody() -> Result<()> {
    let fleet = fleet(&UNREAD_FLAGS).await?;
    served(&fleet, "b", 1).await?;
    let escaped = Escaped::new()?;
    let mut unread = Vec::new();
    for _ in 0..4 {
        unread.push(escaped.over_http2(&fleet).await?);
    }
    unread_answers_end(&fleet).await?;
    drop(unread);
    Ok(())
}

#[tokio::test]
async fn answers_that_nobody_reads_over_http1_end_and_starve_nobody() -> Result<()> {
    let fleet = fleet(&UNREAD_FLAGS).await?;
    served(&fleet, "b", 1).await?;
    let escaped = Escaped::new()?;
    let mut unread = Vec::new();
    for _ in 0..4 {
        unread.push(escaped.over_http1(&fleet).await?);
    }
    unread_answers_end(&fleet).await?;
    drop(unread);
    Ok(())
}
