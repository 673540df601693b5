//! The load generator: a closed loop over raw connections. It often shares the
//! CPU with the server that it measures, so it encodes nothing, decodes nothing
//! and drives all requests of a connection from one task.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use hdrhistogram::Histogram;
use http::Request;
use platform::channel::{Channel, Target};
use protocol::Method;
use tokio::task::JoinSet;

use super::super::call::{CallError, exchange};
use super::super::connection::Connection;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// The timeout of a request without `--timeout`, so that a server that hangs
/// cannot hang the benchmark.
const TIMEOUT: Duration = Duration::from_secs(60);
/// The pause between attempts to reconnect.
const RECONNECT_BACKOFF: Duration = Duration::from_millis(50);
/// Latencies are recorded with three significant digits, up to an hour.
const DIGITS: u8 = 3;
const LATENCY_NS_MAX: u64 = 3_600_000_000_000;

/// The requests, and the server that they are sent to.
pub struct Load {
    target: Target,
    head: Request<()>,
    requests: Vec<Bytes>,
    timeout: Duration,
    /// Requests started in the current run.
    started: AtomicU64,
}

/// When a run stops sending requests. Those in flight are awaited.
#[derive(Debug, Clone, Copy)]
pub enum StopAfter {
    /// The time since the start of the run.
    Elapsed(Duration),
    /// The number of requests sent.
    Requests(u64),
}

/// The results of a run.
#[derive(Debug)]
pub struct RunResults {
    /// Latencies of the requests that succeeded, in nanoseconds.
    pub latencies: Histogram<u64>,
    /// The requests that failed, by code: their number and the first message.
    pub errors: BTreeMap<&'static str, (u64, String)>,
}

impl Load {
    /// A load of framed requests on one server.
    pub fn new(connection: &Connection, requests: Vec<Bytes>) -> anyhow::Result<Self> {
        Ok(Self {
            target: connection.target()?,
            head: connection.template()?.head(Method::ModelInfer),
            requests,
            timeout: connection.timeout.unwrap_or(TIMEOUT),
            started: AtomicU64::new(0),
        })
    }

    /// Opens this many connections.
    pub async fn connect(&self, connections: u32) -> io::Result<Vec<Arc<Channel>>> {
        let mut channels = Vec::new();
        for _ in 0..connections {
            channels.push(Arc::new(
                Channel::connect(&self.target, CONNECT_TIMEOUT).await?,
            ));
        }
        Ok(channels)
    }

    /// Requests started in the current run.
    pub fn started(&self) -> u64 {
        self.started.load(Ordering::Relaxed)
    }
}

/// Keeps `concurrency` requests in flight over the connections until the run
/// stops, and awaits the last of them.
pub async fn run(
    load: &Arc<Load>,
    channels: &[Arc<Channel>],
    concurrency: u32,
    stop: StopAfter,
) -> anyhow::Result<(RunResults, Duration)> {
    load.started.store(0, Ordering::Relaxed);
    let started = Instant::now();
    let connections = u32::try_from(channels.len())?.max(1);
    let mut drivers = JoinSet::new();
    for (index, channel) in (0u32..).zip(channels) {
        let driver = ConnectionDriver {
            load: load.clone(),
            channel: channel.clone(),
            started,
            stop,
            results: RunResults::new()?,
        };
        let slots = concurrency / connections + u32::from(index < concurrency % connections);
        drivers.spawn(driver.drive(slots));
    }
    let mut results = RunResults::new()?;
    while let Some(driven) = drivers.join_next().await {
        results.add(driven?)?;
    }
    Ok((results, started.elapsed()))
}

/// Keeps the requests of one connection in flight.
struct ConnectionDriver {
    load: Arc<Load>,
    channel: Arc<Channel>,
    started: Instant,
    stop: StopAfter,
    results: RunResults,
}

impl ConnectionDriver {
    async fn drive(mut self, slots: u32) -> RunResults {
        let mut in_flight: FuturesUnordered<_> = (0..slots)
            .filter_map(|_| self.next())
            .map(|number| send(self.load.clone(), self.channel.clone(), number))
            .collect();
        while let Some(completed) = in_flight.next().await {
            if let Some(number) = self.record(completed).await {
                in_flight.push(send(self.load.clone(), self.channel.clone(), number));
            }
        }
        self.results
    }

    /// The number of the next request; none when the run stops.
    fn next(&self) -> Option<u64> {
        if let StopAfter::Elapsed(duration) = self.stop
            && self.started.elapsed() >= duration
        {
            return None;
        }
        let number = self.load.started.fetch_add(1, Ordering::Relaxed);
        match self.stop {
            StopAfter::Requests(requests) if number >= requests => None,
            _ => Some(number),
        }
    }

    /// Records a completed request; returns the number of the one to send.
    async fn record(&mut self, completed: Completed) -> Option<u64> {
        match completed.result {
            Ok(()) => self.results.succeed(completed.latency),
            // The server has not processed it: it is retried on a new connection.
            Err(CallError::Unprocessed(_)) => {
                if !Arc::ptr_eq(&self.channel, &completed.channel) {
                    return Some(completed.number);
                }
                match Channel::connect(&self.load.target, CONNECT_TIMEOUT).await {
                    Ok(channel) => {
                        self.channel = Arc::new(channel);
                        return Some(completed.number);
                    }
                    Err(error) => {
                        self.results.fail(&CallError::Unconnected(error));
                        tokio::time::sleep(RECONNECT_BACKOFF).await;
                    }
                }
            }
            Err(error) => self.results.fail(&error),
        }
        self.next()
    }
}

/// A request that has ended.
struct Completed {
    number: u64,
    channel: Arc<Channel>,
    latency: Duration,
    result: Result<(), CallError>,
}

async fn send(load: Arc<Load>, channel: Arc<Channel>, number: u64) -> Completed {
    let head = load.head.clone();
    let started = Instant::now();
    let framed = load.requests[number as usize % load.requests.len()].clone();
    let response = exchange(&channel, head, framed, |_| Ok(()));
    let result = tokio::time::timeout(load.timeout, response)
        .await
        .unwrap_or(Err(CallError::TimedOut(load.timeout)));
    Completed {
        number,
        latency: started.elapsed(),
        channel,
        result,
    }
}

impl RunResults {
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

    fn fail(&mut self, error: &CallError) {
        let entry = self.errors.entry(error.code());
        entry.or_insert_with(|| (0, error.to_string())).0 += 1;
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

    /// Results with these latencies and this many errors.
    pub fn results(latencies_ns: &[u64], errors: u64) -> RunResults {
        let mut results = RunResults::new().unwrap();
        for &latency in latencies_ns {
            results.succeed(Duration::from_nanos(latency));
        }
        for _ in 0..errors {
            results.fail(&CallError::Status(tonic::Status::unavailable("full")));
        }
        results
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
        let (results, _) = run(&load, &channels, 3, StopAfter::Requests(7))
            .await
            .unwrap();
        assert_eq!(results.latencies.len(), 0);
        let errors: u64 = results.errors.values().map(|(count, _)| count).sum();
        assert_eq!(errors, 7);
    }
}
