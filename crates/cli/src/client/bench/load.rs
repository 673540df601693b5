//! The load: a closed loop over raw connections. It shares the processor with
//! what it measures, so it encodes nothing, decodes nothing and drives all
//! requests of a connection from one task.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use hdrhistogram::Histogram;
use http::{HeaderMap, HeaderValue, Method, Request, Uri, Version};
use http_body_util::BodyExt;
use platform::channel::{Channel, ChannelError, Target};
use platform::grpc::{code_name, head_code, head_status};
use tokio::task::JoinSet;
use tonic::Code;

use super::super::connection::Connection;

const PATH: &str = "/inference.GRPCInferenceService/ModelInfer";
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// A request that is not answered by then has failed, so that a server that
/// hangs cannot hang the measurement.
const TIMEOUT: Duration = Duration::from_secs(60);
/// Between attempts to reach a server that is not there.
const RECONNECT_PAUSE: Duration = Duration::from_millis(50);
/// A latency is kept to about a thousandth of itself; none is longer than an
/// hour.
const DIGITS: u8 = 3;
const LATENCY_NS_MAX: u64 = 3_600_000_000_000;

/// What is sent and where.
pub struct Load {
    target: Target,
    uri: Uri,
    headers: HeaderMap,
    requests: Vec<Bytes>,
    timeout: Duration,
    /// Requests of the present run that were begun.
    begun: AtomicU64,
}

/// When a run ends: then no request is begun, and those in flight are awaited.
#[derive(Debug, Clone, Copy)]
pub enum Until {
    /// So long after the start.
    Elapsed(Duration),
    /// When so many requests were begun.
    Requests(u64),
}

/// What came of a run.
#[derive(Debug)]
pub struct Tally {
    /// Nanoseconds of the requests that succeeded.
    pub latencies: Histogram<u64>,
    /// The others by their code: how many, and what the first one said.
    pub errors: BTreeMap<&'static str, (u64, String)>,
}

impl Load {
    /// A load on one server.
    pub fn new(connection: &Connection, requests: Vec<Bytes>) -> anyhow::Result<Self> {
        let mut headers = connection.headers()?;
        headers.insert("content-type", HeaderValue::from_static("application/grpc"));
        headers.insert("te", HeaderValue::from_static("trailers"));
        if let Some(timeout) = connection.timeout {
            // The protocol allows eight digits.
            let millis = timeout.as_millis().clamp(1, 99_999_999);
            headers.insert("grpc-timeout", HeaderValue::try_from(format!("{millis}m"))?);
        }
        Ok(Self {
            target: connection.target()?,
            uri: format!("{}{PATH}", connection.origin()).parse()?,
            headers,
            requests,
            timeout: connection.timeout.unwrap_or(TIMEOUT),
            begun: AtomicU64::new(0),
        })
    }

    /// Opens so many connections.
    pub async fn connect(&self, connections: u32) -> io::Result<Vec<Arc<Channel>>> {
        let mut channels = Vec::new();
        for _ in 0..connections {
            channels.push(Arc::new(
                Channel::connect(&self.target, CONNECT_TIMEOUT).await?,
            ));
        }
        Ok(channels)
    }

    /// Requests of the present run that were begun.
    pub fn begun(&self) -> u64 {
        self.begun.load(Ordering::Relaxed)
    }
}

/// Keeps `concurrency` requests in flight over the connections until the end,
/// and awaits the last of them.
pub async fn run(
    load: &Arc<Load>,
    channels: &[Arc<Channel>],
    concurrency: u32,
    until: Until,
) -> anyhow::Result<(Tally, Duration)> {
    load.begun.store(0, Ordering::Relaxed);
    let started = Instant::now();
    let connections = u32::try_from(channels.len())?.max(1);
    let mut drivers = JoinSet::new();
    for (place, channel) in (0u32..).zip(channels) {
        let driver = Driver {
            load: load.clone(),
            channel: channel.clone(),
            started,
            until,
            tally: Tally::new()?,
        };
        let slots = concurrency / connections + u32::from(place < concurrency % connections);
        drivers.spawn(driver.drive(slots));
    }
    let mut tally = Tally::new()?;
    while let Some(driven) = drivers.join_next().await {
        tally.add(driven?)?;
    }
    Ok((tally, started.elapsed()))
}

/// The requests in flight over one connection.
struct Driver {
    load: Arc<Load>,
    channel: Arc<Channel>,
    started: Instant,
    until: Until,
    tally: Tally,
}

impl Driver {
    async fn drive(mut self, slots: u32) -> Tally {
        let mut in_flight: FuturesUnordered<_> = (0..slots)
            .filter_map(|_| self.next())
            .map(|number| exchange(self.load.clone(), self.channel.clone(), number))
            .collect();
        while let Some(exchanged) = in_flight.next().await {
            if let Some(number) = self.settle(exchanged).await {
                in_flight.push(exchange(self.load.clone(), self.channel.clone(), number));
            }
        }
        self.tally
    }

    /// The number of the next request; none at the end of the run.
    fn next(&self) -> Option<u64> {
        if let Until::Elapsed(duration) = self.until
            && self.started.elapsed() >= duration
        {
            return None;
        }
        let number = self.load.begun.fetch_add(1, Ordering::Relaxed);
        match self.until {
            Until::Requests(requests) if number >= requests => None,
            _ => Some(number),
        }
    }

    /// Counts what came of a request; returns the number of the one to send.
    async fn settle(&mut self, exchanged: Exchanged) -> Option<u64> {
        match exchanged.outcome {
            Outcome::Answered => self.tally.succeed(exchanged.latency),
            Outcome::Failed(code, message) => self.tally.fail(code, message),
            // The server never saw it: it is sent again over a new connection.
            Outcome::Unsent => {
                if !Arc::ptr_eq(&self.channel, &exchanged.channel) {
                    return Some(exchanged.number);
                }
                match self.reconnect().await {
                    Ok(()) => return Some(exchanged.number),
                    Err(error) => {
                        let message = format!("cannot connect: {error}");
                        self.tally.fail(code_name(Code::Unavailable), message);
                        tokio::time::sleep(RECONNECT_PAUSE).await;
                    }
                }
            }
        }
        self.next()
    }

    async fn reconnect(&mut self) -> io::Result<()> {
        let channel = Channel::connect(&self.load.target, CONNECT_TIMEOUT).await?;
        self.channel = Arc::new(channel);
        Ok(())
    }
}

struct Exchanged {
    number: u64,
    channel: Arc<Channel>,
    latency: Duration,
    outcome: Outcome,
}

enum Outcome {
    Answered,
    Failed(&'static str, String),
    Unsent,
}

async fn exchange(load: Arc<Load>, channel: Arc<Channel>, number: u64) -> Exchanged {
    let place = number as usize % load.requests.len();
    let mut request = Request::new(());
    *request.method_mut() = Method::POST;
    *request.version_mut() = Version::HTTP_2;
    *request.uri_mut() = load.uri.clone();
    *request.headers_mut() = load.headers.clone();
    let started = Instant::now();
    let message = load.requests[place].clone();
    let answered = tokio::time::timeout(load.timeout, answer(&channel, request, message)).await;
    let outcome = answered.unwrap_or_else(|_| {
        let message = format!("no answer within {:?}", load.timeout);
        Outcome::Failed(code_name(Code::DeadlineExceeded), message)
    });
    Exchanged {
        number,
        latency: started.elapsed(),
        channel,
        outcome,
    }
}

/// Sends a request and reads its answer to the trailers, which have the status.
async fn answer(channel: &Channel, head: Request<()>, message: Bytes) -> Outcome {
    let response = match channel.send(head, message).await {
        Ok(response) => response,
        Err(ChannelError::Unprocessed(_)) => return Outcome::Unsent,
        Err(error) => return broken(&error),
    };
    if response.status() != http::StatusCode::OK {
        return Outcome::Failed("HTTP", format!("the server answered {}", response.status()));
    }
    if response.headers().contains_key("grpc-status") {
        return of_status(response.headers());
    }
    let mut body = response.into_body();
    while let Some(frame) = body.frame().await {
        match frame.map(|frame| frame.into_trailers()) {
            Ok(Ok(trailers)) if trailers.contains_key("grpc-status") => {
                return of_status(&trailers);
            }
            Ok(_) => {}
            Err(error) => return broken(&error),
        }
    }
    Outcome::Failed(
        code_name(Code::Internal),
        "the answer has no status".to_owned(),
    )
}

fn of_status(headers: &HeaderMap) -> Outcome {
    match head_code(headers) {
        Code::Ok => Outcome::Answered,
        code => {
            let status = head_status(headers);
            let message = status.map(|status| status.message().to_owned());
            Outcome::Failed(code_name(code), message.unwrap_or_default())
        }
    }
}

fn broken(error: &ChannelError) -> Outcome {
    Outcome::Failed(code_name(Code::Unavailable), error.to_string())
}

impl Tally {
    fn new() -> anyhow::Result<Self> {
        Ok(Self {
            latencies: Histogram::new_with_bounds(1, LATENCY_NS_MAX, DIGITS)?,
            errors: BTreeMap::new(),
        })
    }

    fn succeed(&mut self, latency: Duration) {
        let nanos = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        self.latencies.saturating_record(nanos);
    }

    fn fail(&mut self, code: &'static str, message: String) {
        self.errors.entry(code).or_insert((0, message)).0 += 1;
    }

    fn add(&mut self, other: Self) -> anyhow::Result<()> {
        self.latencies.add(other.latencies)?;
        for (code, (count, message)) in other.errors {
            self.errors.entry(code).or_insert((0, message)).0 += count;
        }
        Ok(())
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use platform::server::bind;

    /// A tally of these latencies and so many errors.
    pub fn tally(latencies_ns: &[u64], errors: u64) -> Tally {
        let mut tally = Tally::new().unwrap();
        for &latency in latencies_ns {
            tally.succeed(Duration::from_nanos(latency));
        }
        for _ in 0..errors {
            tally.fail("UNAVAILABLE", "full".to_owned());
        }
        tally
    }

    #[tokio::test]
    async fn a_server_that_is_gone_is_counted_and_ends_the_run() {
        let listener = bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let connection = Connection {
            key_file: None,
            tls_ca: None,
            address: listener.local_addr().unwrap().to_string(),
            header: Vec::new(),
            timeout: None,
        };
        let load =
            Arc::new(Load::new(&connection, vec![Bytes::from_static(b"\0\0\0\0\0")]).unwrap());
        let channels = load.connect(1).await.unwrap();
        drop(listener);
        let (tally, _) = run(&load, &channels, 3, Until::Requests(7)).await.unwrap();
        assert_eq!(tally.latencies.len(), 0);
        let errors: u64 = tally.errors.values().map(|(count, _)| count).sum();
        assert_eq!(errors, 7);
    }
}
