//! One worker as the gateway sees it: its connections, what it reports, how it
//! fares, and how a call is sent to it.

mod metrics;
pub mod provider;
mod response;

pub use metrics::{UpstreamMetrics, WorkerMetrics};
pub use response::{Response, SendError};

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use bytes::Bytes;
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, HeaderName, HeaderValue, Uri};
use platform::channel::{Channel, ChannelError, Incoming, Target};
use platform::circuit_breaker::CircuitBreaker;
use platform::grpc::{MessageLimits, head_status};
use platform::shards;
use protocol::andon::v1::WatchReportResponse;
use protocol::{Error, MODEL_KEY, Method};
use tokio::time::Instant;
use tonic::{Code, Status};

use crate::request::Request;
use response::read;

/// A worker.
pub struct Upstream {
    /// Where it is.
    pub target: Target,
    authority: Authority,
    /// By shard: a call stays on the thread that its caller's connection is on.
    channels: RwLock<Vec<Vec<Arc<Channel>>>>,
    turn: AtomicUsize,
    report: RwLock<Arc<WatchReportResponse>>,
    in_flight: AtomicUsize,
    breaker: CircuitBreaker,
    metrics: WorkerMetrics,
}

impl fmt::Debug for Upstream {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Upstream({})", self.target)
    }
}

/// One sending of a call.
#[derive(Debug, Clone, Copy)]
pub struct Attempt<'a> {
    /// How often the call was sent before.
    pub number: usize,
    /// The model's name, for a call that named none.
    pub chosen: Option<&'a HeaderValue>,
    /// What answers are held to.
    pub limits: Option<&'a MessageLimits>,
}

impl Attempt<'_> {
    fn first() -> Self {
        Self {
            number: 0,
            chosen: None,
            limits: None,
        }
    }
}

impl Upstream {
    /// A worker that is not connected yet.
    pub fn new(target: Target, metrics: WorkerMetrics) -> Self {
        let authority = match &target {
            Target::Tcp(address) | Target::Tls(address, _) => address.parse().ok(),
            Target::Memory(_) => None,
        };
        Self {
            target,
            authority: authority.unwrap_or_else(|| Authority::from_static("andon")),
            channels: RwLock::default(),
            turn: AtomicUsize::new(0),
            report: RwLock::default(),
            in_flight: AtomicUsize::new(0),
            breaker: CircuitBreaker::default(),
            metrics,
        }
    }

    /// Replaces the connections of each shard.
    pub fn connected(&self, channels: Vec<Vec<Arc<Channel>>>) {
        *self
            .channels
            .write()
            .unwrap_or_else(PoisonError::into_inner) = channels;
    }

    /// Whether calls can be sent: it has not been lost. For some milliseconds
    /// all its connections may be at their age and not replaced yet.
    pub fn reachable(&self) -> bool {
        let channels = self.channels.read().unwrap_or_else(PoisonError::into_inner);
        !channels.is_empty()
    }

    /// What the worker said last.
    pub fn report(&self) -> Arc<WatchReportResponse> {
        self.report
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Keeps what the worker says; true when it serves other models than
    /// before.
    pub fn reported(&self, report: WatchReportResponse) -> bool {
        let serves = |report: &WatchReportResponse| {
            let models = report.models.iter();
            let models = models.map(|m| {
                let kept = (m.deterministic, m.digest.clone());
                (
                    m.name.clone(),
                    m.version.clone(),
                    m.ready,
                    m.task.clone(),
                    kept,
                )
            });
            (report.draining, models.collect::<Vec<_>>())
        };
        let mut current = self.report.write().unwrap_or_else(PoisonError::into_inner);
        let changed = serves(&current) != serves(&report);
        *current = Arc::new(report);
        changed
    }

    /// How loaded the worker is for a model: calls of this gateway that it
    /// has, and rows that it says wait.
    pub fn load(&self, model: &str) -> u64 {
        let report = self.report.read().unwrap_or_else(PoisonError::into_inner);
        let waiting: u64 = report
            .models
            .iter()
            .filter(|reported| reported.name == model)
            .map(|reported| reported.queue_rows)
            .sum();
        waiting + self.in_flight.load(Ordering::Relaxed) as u64
    }

    /// Whether the worker is left alone because it failed. When its time is
    /// over, one call at a time may try it.
    pub fn ejected(&self) -> bool {
        self.breaker.is_ejected()
    }

    /// Whether the worker is being left alone, without trying it.
    pub fn out(&self) -> bool {
        self.breaker.is_open()
    }

    /// The worker answered.
    pub fn succeeded(&self) {
        if self.breaker.succeeded() {
            tracing::info!(worker = %self.target, "answers again");
        }
    }

    /// The worker failed: after several times, or when it was being tried, it
    /// is left alone.
    pub fn failed(&self) {
        if let Some(rest) = self.breaker.failed() {
            self.metrics.ejections.inc();
            tracing::warn!(worker = %self.target, ?rest, "left alone: it failed repeatedly");
        }
    }

    /// Forgets that the worker was left alone: its connection is new.
    pub fn returned(&self) {
        self.breaker.reset();
    }

    fn channel(&self) -> Option<Arc<Channel>> {
        let channels = self.channels.read().unwrap_or_else(PoisonError::into_inner);
        let open = |channel: &&Arc<Channel>| !channel.closed();
        let own = channels
            .get(shards::current())
            .filter(|own| !own.is_empty());
        if let Some(own) = own {
            let start = match own.len() {
                1 => 0,
                _ => self.turn.fetch_add(1, Ordering::Relaxed),
            };
            let mut turns = (0..own.len()).filter_map(|step| own.get((start + step) % own.len()));
            if let Some(channel) = turns.find(open) {
                return Some(channel.clone());
            }
        }
        channels.iter().flatten().find(open).cloned()
    }

    /// Sends a call and reads its whole answer, so that a worker that dies in
    /// the middle of one costs the caller nothing.
    pub async fn send(
        &self,
        request: &Request,
        attempt: Attempt<'_>,
    ) -> Result<Response, SendError> {
        let channel = self
            .channel()
            .ok_or_else(|| SendError::NotSent("not connected".to_owned()))?;
        let mut headers = request.headers.clone();
        set_timeout(&mut headers, request.deadline);
        if attempt.number > 0 {
            headers.insert(PREVIOUS_ATTEMPTS, HeaderValue::from(attempt.number));
        }
        if let Some(chosen) = attempt.chosen {
            headers.insert(HeaderName::from_static(MODEL_KEY), chosen.clone());
        }
        let head = self.head(request.method, headers);
        let framed = request.message.framed().clone();
        let mut sending = Sending::begin(self, request.deadline);
        let answered = async {
            let response = self.send_on_any(channel, head, framed).await?;
            read(response, attempt.limits).await
        }
        .await;
        sending.ended = true;
        answered
    }

    /// Sends on a connection, or on the next when it turns out to be ending.
    async fn send_on_any(
        &self,
        mut channel: Arc<Channel>,
        head: http::Request<()>,
        framed: Bytes,
    ) -> Result<http::Response<Incoming>, ChannelError> {
        loop {
            match channel.send(head.clone(), framed.clone()).await {
                Err(ChannelError::Unprocessed(error)) if channel.closed() => {
                    channel = self.channel().ok_or(ChannelError::Unprocessed(error))?;
                }
                sent => return sent,
            }
        }
    }

    /// Breaks every connection, so that the calls that they have go elsewhere.
    pub fn abort(&self) {
        let channels = self.channels.read().unwrap_or_else(PoisonError::into_inner);
        channels
            .iter()
            .flatten()
            .for_each(|channel| channel.abort());
    }

    /// The places of the connections that take no more calls.
    pub fn closed_places(&self) -> Vec<(usize, usize)> {
        let channels = self.channels.read().unwrap_or_else(PoisonError::into_inner);
        let places = channels.iter().enumerate().flat_map(|(shard, own)| {
            let closed = own
                .iter()
                .enumerate()
                .filter(|(_, channel)| channel.closed());
            closed.map(move |(index, _)| (shard, index))
        });
        places.collect()
    }

    /// Puts a new connection in a place. Calls that the old one has go on.
    pub fn replace(&self, shard: usize, index: usize, channel: Arc<Channel>) {
        let mut channels = self
            .channels
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(place) = channels.get_mut(shard).and_then(|own| own.get_mut(index)) {
            *place = channel;
        }
    }

    /// Calls the worker with a message of the gateway's own.
    pub async fn call<Q: prost::Message, A: prost::Message + Default>(
        &self,
        method: Method,
        message: &Q,
        deadline: Instant,
    ) -> Result<A, Status> {
        let request = Request::internal(method, message, deadline);
        let sent = tokio::time::timeout_at(deadline, self.send(&request, Attempt::first())).await;
        let answer = match sent {
            Ok(Ok(answer)) => answer,
            Ok(Err(error)) => {
                return Err(Status::unavailable(format!(
                    "worker {}: {error}",
                    self.target
                )));
            }
            Err(_) => return Err(Error::deadline_passed().to_status()),
        };
        platform::grpc::decode(answer.into_message()?)
    }

    /// Opens a stream of messages on one connection; they stay framed.
    pub async fn open(&self, channel: &Channel, request: &Request) -> Result<Incoming, Status> {
        let head = self.head(request.method, request.headers.clone());
        let response = channel
            .send(head, request.message.framed().clone())
            .await
            .map_err(|error| Status::unavailable(error.to_string()))?;
        match head_status(response.headers()) {
            Some(status) if status.code() != Code::Ok => Err(status),
            _ => Ok(response.into_body()),
        }
    }

    fn head(&self, method: Method, headers: HeaderMap) -> http::Request<()> {
        let mut parts = http::uri::Parts::default();
        parts.scheme = Some(Scheme::HTTP);
        parts.authority = Some(self.authority.clone());
        parts.path_and_query = Some(PathAndQuery::from_static(method.path()));
        let mut request = http::Request::new(());
        *request.method_mut() = http::Method::POST;
        // All three parts are there, so that they always make an address.
        *request.uri_mut() = Uri::from_parts(parts).unwrap_or_default();
        *request.headers_mut() = headers;
        request
    }
}

const PREVIOUS_ATTEMPTS: HeaderName = HeaderName::from_static("grpc-previous-rpc-attempts");
const TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");

/// Forwards what remains of the deadline.
fn set_timeout(headers: &mut HeaderMap, deadline: Instant) {
    let left = deadline.saturating_duration_since(Instant::now());
    let us = left.as_micros();
    // At most eight digits are allowed.
    let text = if us < 100_000_000 {
        format!("{us}u")
    } else {
        format!("{}m", left.as_millis().min(99_999_999))
    };
    if let Ok(value) = HeaderValue::try_from(text) {
        headers.insert(TIMEOUT, value);
    }
}

/// A call that is under way, however it ends.
struct Sending<'u> {
    upstream: &'u Upstream,
    started: Instant,
    deadline: Instant,
    /// Whether the worker answered or broke, and not the caller's patience.
    ended: bool,
}

impl<'u> Sending<'u> {
    fn begin(upstream: &'u Upstream, deadline: Instant) -> Self {
        upstream.in_flight.fetch_add(1, Ordering::Relaxed);
        upstream.breaker.begin_probe();
        Self {
            upstream,
            started: Instant::now(),
            deadline,
            ended: false,
        }
    }
}

impl Drop for Sending<'_> {
    fn drop(&mut self) {
        let upstream = self.upstream;
        upstream.in_flight.fetch_sub(1, Ordering::Relaxed);
        let took = self.started.elapsed();
        upstream.metrics.duration.observe(took.as_secs_f64());
        if self.ended {
            return;
        }
        // A worker that keeps callers waiting past their deadlines, call after
        // call, is as bad as one that breaks; a caller who left proves nothing.
        if Instant::now() >= self.deadline {
            upstream.failed();
        } else {
            upstream.breaker.abandon_probe();
        }
    }
}
