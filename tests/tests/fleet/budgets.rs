//! What calls that nobody wrote by hand may cost, at every door: processor time on
//! a thread of the network, memory, and the length of the answer.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fleet_tests::costs::{ShardTimes, peak_bytes};
use fleet_tests::generate::Generator;
use fleet_tests::process::Andon;
use fleet_tests::{Fleet, raw};
use protocol::{Method, Service};
use serde_json::Value;

/// The most bytes of a generated message or body.
const SENT_BYTES_MAX: usize = 64 << 10;
/// A call may keep a thread of the network busy for so long: every other call there
/// waits as long.
const TURN_MAX: Duration = Duration::from_millis(50);
/// What all messages in flight may take, and one of them.
const IN_FLIGHT: &str = "64MiB";
const MESSAGE: &str = "8MiB";
/// What a process may take at most above what it has at the start: all bytes in
/// flight, and as much again for the values that are made of them.
const MEMORY_MAX: u64 = 128 << 20;
/// An error repeats little of what was sent: its status has at most 4 KiB, with the
/// details in base64 and the same again in JSON.
const ERROR_BYTES_MAX: usize = 16 << 10;
/// An answer to so many bytes that were sent, in gzip or not: 2,048 short texts have
/// vectors of 384 numbers each.
const ANSWER_BYTES_MAX: usize = 16 << 20;

/// A call of the generator, as a test reports it.
#[derive(Debug)]
struct Made {
    door: String,
    sent: usize,
    answered: usize,
    ok: bool,
}

/// One seed's calls, for so long.
struct Calls {
    numbers: Generator,
    web: reqwest::Client,
    routes: Vec<String>,
}

impl Calls {
    async fn new(gateway: &Andon, seed: u64) -> Result<Self> {
        let web = reqwest::Client::builder().no_proxy();
        let web = web.timeout(Duration::from_secs(30)).build()?;
        let document = web.get(format!("http://{}/openapi.json", gateway.http));
        let document: Value = document.send().await?.json().await?;
        let paths = document["paths"].as_object().context("paths")?;
        let read = paths.iter().filter(|(_, item)| item["post"].is_object());
        let routes = read.map(|(path, _)| path.replace("{model}", "digits"));
        // A model that is unloaded has no reader any more.
        let routes = routes.filter(|path| !path.ends_with("load"));
        Ok(Self {
            numbers: Generator::new(seed),
            routes: routes.collect(),
            web,
        })
    }

    /// A call of a method, with a message that has the fields of many.
    async fn grpc(&mut self, address: std::net::SocketAddr, method: Method) -> Result<Made> {
        let message = self.numbers.message(SENT_BYTES_MAX, 3);
        let (packed, gzip) = self.numbers.packed(message);
        let framed = raw::framed(&packed, gzip);
        let sent = framed.len();
        let channel = raw::connect(address).await?;
        let metadata = [("andon-model", "minilm"), ("grpc-timeout", "3S")];
        let reply = raw::call(&channel, method.path(), &metadata, framed).await?;
        Ok(Made {
            door: method.path().to_owned(),
            sent,
            answered: reply.bytes.len() + reply.header_bytes,
            ok: reply.status.code() == tonic::Code::Ok,
        })
    }

    /// A call of a route.
    async fn http(&mut self, address: std::net::SocketAddr, index: usize) -> Result<Made> {
        let path = self.routes[index % self.routes.len()].clone();
        let body = self.numbers.body(SENT_BYTES_MAX);
        let (packed, gzip) = self.numbers.packed(body);
        let sent = packed.len();
        let mut call = self
            .web
            .post(format!("http://{address}{path}"))
            .body(packed);
        call = call.header("content-type", "application/json");
        call = call.header("timeout", "3000");
        if gzip {
            call = call.header("content-encoding", "gzip");
        }
        let response = call.send().await?;
        let ok = response.status().is_success();
        Ok(Made {
            door: path,
            sent,
            answered: response.bytes().await?.len(),
            ok,
        })
    }
}

/// Every method that takes one message.
fn methods() -> impl Iterator<Item = Method> {
    let own = Method::ALL.into_iter();
    own.filter(|method| method.service() != Service::Report && !method.is_client_streaming())
}

fn check(made: &Made, turn: Duration) -> Result<()> {
    let door = &made.door;
    ensure!(
        turn <= TURN_MAX,
        "{door}: a thread was busy for {turn:?}: {made:?}"
    );
    let most = if made.ok {
        ANSWER_BYTES_MAX
    } else {
        ERROR_BYTES_MAX
    };
    ensure!(made.answered <= most, "{door}: a long answer: {made:?}");
    Ok(())
}

/// It takes half a minute; in `make soak` ten, with a seed of its own.
#[tokio::test]
async fn generated_calls_stay_within_their_budgets_at_every_door() -> Result<()> {
    let (seconds, seed) = match std::env::var_os("SOAK") {
        Some(_) => (600, u64::from(std::process::id())),
        None => (30, 20),
    };
    println!("the seed is {seed}");
    let ends = Instant::now() + Duration::from_secs(seconds);
    let flags = [
        "--message-bytes-max",
        MESSAGE,
        "--bytes-in-flight-max",
        IN_FLIGHT,
    ];
    let fleet = Fleet::with(1, &[], &flags).await?;
    let gateway = &fleet.gateway;
    let mut calls = Calls::new(gateway, seed).await?;
    let before = gateway.resident_bytes()?;
    let (mut most, mut count, mut longest) = (Duration::ZERO, 0_usize, 0);
    while Instant::now() < ends {
        for (index, method) in methods().enumerate() {
            let begun = ShardTimes::of(gateway)?;
            let made = calls.grpc(gateway.grpc, method).await?;
            let middle = ShardTimes::of(gateway)?;
            check(&made, middle.most_since(&begun))?;
            let posted = calls.http(gateway.http, count + index).await?;
            let turn = ShardTimes::of(gateway)?.most_since(&middle);
            check(&posted, turn)?;
            most = most.max(turn).max(middle.most_since(&begun));
            longest = longest.max(made.answered).max(posted.answered);
            ensure!(made.sent + posted.sent <= 3 * SENT_BYTES_MAX, "{made:?}");
        }
        count += methods().count();
    }
    let peak = peak_bytes(gateway)?;
    ensure!(
        peak <= before + MEMORY_MAX,
        "{} MiB at most, {} MiB before",
        peak >> 20,
        before >> 20
    );
    let logged = gateway.logged();
    ensure!(!logged.contains("panicked"), "{logged}");
    println!(
        "{} calls, at most {most:?} of a thread, an answer of {longest} bytes, {} MiB more",
        2 * count,
        (peak - before) >> 20
    );
    Ok(())
}
