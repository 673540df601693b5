//! A worker as an upstream: its connections, its reports, its circuit breaker,
//! and how a call is sent to it.

mod metrics;
pub mod provider;
mod response;

pub use metrics::{UpstreamMetrics, WorkerMetrics};
pub use response::{Response, SendError};

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use bytes::Bytes;
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, HeaderName, HeaderValue, Uri};
use platform::channel::{Channel, ChannelError, Incoming, Target};
use platform::circuit_breaker::CircuitBreaker;
use platform::grpc::{MessageLimits, head_status};
use platform::pot::Holder;
use platform::shards;
use platform::watchdog::Starvation;
use protocol::andon::v1::WatchReportResponse;
use protocol::{Error, LANE_CROSS_KEY, LANE_KEY, MODEL_KEY, Method};
use tokio::time::Instant;
use tonic::{Code, Status};

use crate::request::Request;
use response::read;

/// A worker.
pub struct Upstream {
    /// The address.
    pub target: Target,
    authority: Authority,
    /// By shard: a call stays on the thread of its caller's connection.
    channels: RwLock<Vec<Vec<Arc<Channel>>>>,
    next_channel: AtomicUsize,
    report: RwLock<Arc<WatchReportResponse>>,
    has_reported: AtomicBool,
    created: Instant,
    /// When the last report came, in milliseconds after the creation.
    reported_ms: AtomicU64,
    in_flight: AtomicUsize,
    breaker: CircuitBreaker,
    /// When a connection broke last, in milliseconds after the creation.
    broke_ms: AtomicU64,
    /// The longest response of late, in microseconds; each shorter one takes it
    /// a step down.
    slowest_us: AtomicU64,
    starvation: Starvation,
    metrics: WorkerMetrics,
}

impl fmt::Debug for Upstream {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Upstream({})", self.target)
    }
}

/// How one attempt of a call is sent to a worker.
#[derive(Debug, Clone, Copy)]
pub struct SendOptions<'a> {
    /// The name of the model.
    pub model: &'a str,
    /// The number of earlier attempts.
    pub number: usize,
    /// The name of the model, for a call that names none.
    pub chosen: Option<&'a HeaderValue>,
    /// The limits of the response.
    pub limits: Option<&'a MessageLimits>,
}

/// A connection of a worker: the shard that drives it, and its index there.
#[derive(Debug, Clone, Copy)]
pub struct ChannelIndex {
    /// The shard.
    pub shard: usize,
    index: usize,
}

impl SendOptions<'_> {
    fn first() -> Self {
        Self {
            model: "",
            number: 0,
            chosen: None,
            limits: None,
        }
    }
}

impl Upstream {
    /// A worker that is not connected yet.
    pub fn new(target: Target, metrics: WorkerMetrics, starvation: Starvation) -> Self {
        let authority = match &target {
            Target::Tcp(address) | Target::Tls(address, _) => address.parse().ok(),
            Target::Memory(_) => None,
        };
        Self {
            target,
            authority: authority.unwrap_or_else(|| Authority::from_static("andon")),
            channels: RwLock::default(),
            next_channel: AtomicUsize::new(0),
            report: RwLock::default(),
            has_reported: AtomicBool::new(false),
            created: Instant::now(),
            reported_ms: AtomicU64::new(0),
            in_flight: AtomicUsize::new(0),
            breaker: CircuitBreaker::default(),
            broke_ms: AtomicU64::new(0),
            slowest_us: AtomicU64::new(0),
            starvation,
            metrics,
        }
    }

    /// Replaces the connections of each shard; with none, the worker is lost.
    pub fn set_channels(&self, channels: Vec<Vec<Arc<Channel>>>) {
        *self
            .channels
            .write()
            .unwrap_or_else(PoisonError::into_inner) = channels;
    }

    /// Whether the worker is connected. For some milliseconds all its connections
    /// may have reached their maximum age and not be replaced yet.
    pub fn reachable(&self) -> bool {
        let channels = self.channels.read().unwrap_or_else(PoisonError::into_inner);
        !channels.is_empty()
    }

    /// The last report of the worker.
    pub fn report(&self) -> Arc<WatchReportResponse> {
        self.report
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// For how long nothing was heard of the worker.
    pub fn silence(&self) -> Duration {
        let reported = Duration::from_millis(self.reported_ms.load(Ordering::Relaxed));
        self.created.elapsed().saturating_sub(reported)
    }

    /// Records that the worker is heard: by a report, or by a new connection.
    pub fn heard(&self) {
        self.reported_ms.store(self.age_ms(), Ordering::Relaxed);
    }

    /// Whether it has reported since it was found. One that has not may have any
    /// model.
    pub fn has_reported(&self) -> bool {
        self.has_reported.load(Ordering::Acquire)
    }

    /// Milliseconds since the creation.
    fn age_ms(&self) -> u64 {
        u64::try_from(self.created.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Stores a report; true when the worker serves other models than before.
    pub fn set_report(&self, report: WatchReportResponse) -> bool {
        self.heard();
        let serves = |report: &WatchReportResponse| {
            let models = report.models.iter();
            let models = models.map(|m| {
                let cacheable = (m.deterministic, m.digest.clone(), m.generation);
                (
                    m.name.clone(),
                    m.version.clone(),
                    (m.ready, m.loading, m.failed),
                    m.task.clone(),
                    cacheable,
                )
            });
            (report.draining, models.collect::<Vec<_>>())
        };
        let mut current = self.report.write().unwrap_or_else(PoisonError::into_inner);
        let changed = serves(&current) != serves(&report);
        *current = Arc::new(report);
        self.has_reported.store(true, Ordering::Release);
        changed
    }

    /// The load of the worker for a model: the calls of this gateway in flight,
    /// and the rows that it reports as queued.
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

    /// Whether the worker is ejected because it failed. When its time is over,
    /// one call at a time may probe it.
    pub fn ejected(&self) -> bool {
        self.breaker.is_ejected()
    }

    /// Whether the circuit breaker of the worker is open. It starts no probe.
    pub fn circuit_open(&self) -> bool {
        self.breaker.is_open()
    }

    /// Records that the worker responded.
    pub fn succeeded(&self) {
        if self.breaker.succeeded() {
            tracing::info!(worker = %self.target, "responds again: the circuit breaker is closed");
        }
    }

    /// Records that the worker failed at a request of a caller, who may be the
    /// reason. After several failures, or when a probe fails, it is ejected.
    pub fn failed_by(&self, caller: &Holder) {
        self.ejected_for(self.breaker.failed_by(caller));
    }

    fn ejected_for(&self, ejection: Option<Duration>) {
        if let Some(rest) = ejection {
            self.metrics.ejections.inc();
            tracing::warn!(worker = %self.target, ?rest, "ejected after repeated failures");
        }
    }

    /// Records that a connection broke with a call in flight. The other calls on
    /// it fail at the same moment, and show nothing more.
    pub fn broke(&self) {
        let now = self.age_ms();
        let last = self.broke_ms.swap(now, Ordering::Relaxed);
        if last == 0 || now.saturating_sub(last) >= BREAK_MS {
            self.ejected_for(self.breaker.failed());
        } else {
            self.abandoned();
        }
    }

    /// Whether a connection broke within the last second: the process may be gone,
    /// which its other connections learn a moment later.
    pub fn broke_lately(&self) -> bool {
        let last = self.broke_ms.load(Ordering::Relaxed);
        last > 0 && self.age_ms().saturating_sub(last) < BROKE_LATELY_MS
    }

    /// Records that a call said nothing about the worker: another may probe it.
    pub fn abandoned(&self) {
        self.breaker.abandon_probe();
    }

    /// Closes the circuit breaker: the connection is new.
    pub fn reset_circuit(&self) {
        self.breaker.reset();
    }

    fn channel(&self) -> Option<Arc<Channel>> {
        let channels = self.channels.read().unwrap_or_else(PoisonError::into_inner);
        let open = |channel: &&Arc<Channel>| !channel.closed();
        let own = channels
            .get(shards::current())
            .filter(|own| !own.is_empty());
        if let Some(own) = own {
            let start = if own.len() == 1 {
                0
            } else {
                self.next_channel.fetch_add(1, Ordering::Relaxed)
            };
            let mut candidates =
                (0..own.len()).filter_map(|step| own.get((start + step) % own.len()));
            if let Some(channel) = candidates.find(open) {
                return Some(channel.clone());
            }
        }
        channels.iter().flatten().find(open).cloned()
    }

    /// Sends a call and reads its whole response, so that a call whose worker dies
    /// in the middle of a response can be retried.
    pub async fn send(
        &self,
        request: &Request,
        options: SendOptions<'_>,
    ) -> Result<Response, SendError> {
        let channel = self
            .channel()
            .ok_or_else(|| SendError::NotSent("the worker is not connected".to_owned()))?;
        let mut headers = request.headers.clone();
        set_timeout(&mut headers, request.deadline);
        headers.insert(HeaderName::from_static(LANE_KEY), request.caller.lane());
        if request.caller.tenant.priority {
            let crosses = HeaderValue::from_static("true");
            headers.insert(HeaderName::from_static(LANE_CROSS_KEY), crosses);
        }
        if options.number > 0 {
            headers.insert(PREVIOUS_ATTEMPTS, HeaderValue::from(options.number));
        }
        if let Some(chosen) = options.chosen {
            headers.insert(HeaderName::from_static(MODEL_KEY), chosen.clone());
        }
        let head = self.head(request.method, headers);
        let framed = request.message.framed().clone();
        let mut in_flight = InFlightCall::begin(self, request, options.model);
        let result = async {
            let response = self.send_on_any(channel, head, framed).await?;
            read(response, options.limits, &request.caller.holder()).await
        }
        .await;
        in_flight.ended = true;
        // Calls of the gateway itself compute nothing.
        if result.is_ok() && !options.model.is_empty() {
            self.took(in_flight.started.elapsed());
        }
        result
    }

    /// Sends on a connection, or on another one when that has been closed.
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
                result => return result,
            }
        }
    }

    fn took(&self, time: Duration) {
        let us = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let slowest = self.slowest_us.load(Ordering::Relaxed);
        // Two that write at once lose one measure, which does not matter.
        let slowest = us.max(slowest - slowest / SLOWEST_STEPS);
        self.slowest_us.store(slowest, Ordering::Relaxed);
    }

    /// How long a worker needs for a call, with its message of so many bytes, by
    /// its own reports and by its last responses. A caller who waits for less
    /// shows nothing about the worker.
    fn needs(&self, model: &str, bytes: usize) -> Duration {
        let report = self.report();
        let reported = report
            .models
            .iter()
            .filter(|reported| reported.name == model);
        let reported = reported.map(|model| {
            // No text or row has more tokens than bytes.
            let compute = model.token_ns.saturating_mul(bytes as u64);
            let wait = Duration::from_micros(model.queue_wait_us);
            wait.saturating_add(Duration::from_nanos(compute))
        });
        let slowest = Duration::from_micros(self.slowest_us.load(Ordering::Relaxed));
        let known = reported.fold(slowest, Duration::max);
        if known.is_zero() && report.models.iter().any(|model| !model.digest.is_empty()) {
            // It reports its times, but has computed nothing yet.
            return NEEDS_UNKNOWN;
        }
        known.saturating_mul(2).saturating_add(NEEDS_MIN)
    }

    /// Breaks every connection, so that the calls in flight are retried elsewhere.
    pub fn abort(&self) {
        let channels = self.channels.read().unwrap_or_else(PoisonError::into_inner);
        channels
            .iter()
            .flatten()
            .for_each(|channel| channel.abort());
    }

    /// The connections that take no more calls.
    pub fn closed_channels(&self) -> Vec<ChannelIndex> {
        let channels = self.channels.read().unwrap_or_else(PoisonError::into_inner);
        let closed = channels.iter().enumerate().flat_map(|(shard, own)| {
            let closed = own
                .iter()
                .enumerate()
                .filter(|(_, channel)| channel.closed());
            closed.map(move |(index, _)| ChannelIndex { shard, index })
        });
        closed.collect()
    }

    /// Replaces a connection. The calls in flight on the old one continue.
    pub fn replace(&self, at: ChannelIndex, channel: Arc<Channel>) {
        let mut channels = self
            .channels
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let own = channels.get_mut(at.shard);
        if let Some(old) = own.and_then(|own| own.get_mut(at.index)) {
            *old = channel;
        }
    }

    /// Calls the worker with a message of the gateway itself, and decodes the
    /// response.
    pub async fn call<Q: prost::Message, A: prost::Message + Default>(
        &self,
        method: Method,
        message: &Q,
        deadline: Instant,
    ) -> Result<A, Status> {
        let request = Request::internal(method, message, deadline);
        let sent =
            tokio::time::timeout_at(deadline, self.send(&request, SendOptions::first())).await;
        let response = match sent {
            Ok(Ok(response)) => response,
            Ok(Err(error)) => {
                tracing::debug!(worker = %self.target, %error, "a call failed");
                return Err(Status::unavailable(format!("a worker failed: {error}")));
            }
            Err(_) => return Err(Error::deadline_passed().to_status()),
        };
        platform::grpc::decode(response.into_message()?)
    }

    /// Opens a stream of messages on one connection; the messages stay framed.
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
        // All three parts are set, so that they always make a URI.
        *request.uri_mut() = Uri::from_parts(parts).unwrap_or_default();
        *request.headers_mut() = headers;
        request
    }
}

const PREVIOUS_ATTEMPTS: HeaderName = HeaderName::from_static("grpc-previous-rpc-attempts");
const TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");

/// Forwards the rest of the deadline.
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

/// Calls that break within so many milliseconds were on one connection.
const BREAK_MS: u64 = 100;
/// For so many milliseconds after a connection broke the process may be gone.
const BROKE_LATELY_MS: u64 = 1000;
/// What a worker is given in any case: what passes on the way, and for a turn on
/// a busy processor.
const NEEDS_MIN: Duration = Duration::from_millis(20);
/// What a worker is given before its first batch.
const NEEDS_UNKNOWN: Duration = Duration::from_secs(1);
/// The longest response is forgotten by this part for each shorter one.
const SLOWEST_STEPS: u64 = 32;

/// A call in flight, until it is dropped: however it ends, it is counted and
/// judged by the circuit breaker.
struct InFlightCall<'u> {
    upstream: &'u Upstream,
    request: &'u Request,
    model: &'u str,
    started: Instant,
    /// Whether the worker responded or failed, before the caller stopped waiting.
    ended: bool,
}

impl<'u> InFlightCall<'u> {
    fn begin(upstream: &'u Upstream, request: &'u Request, model: &'u str) -> Self {
        upstream.in_flight.fetch_add(1, Ordering::Relaxed);
        upstream.breaker.begin_probe();
        // Calls of the gateway itself are no caller's.
        if !model.is_empty() {
            upstream.breaker.called_by(&request.caller.holder());
        }
        Self {
            upstream,
            request,
            model,
            started: Instant::now(),
            ended: false,
        }
    }
}

impl Drop for InFlightCall<'_> {
    fn drop(&mut self) {
        let upstream = self.upstream;
        upstream.in_flight.fetch_sub(1, Ordering::Relaxed);
        let elapsed = self.started.elapsed();
        upstream.metrics.duration.observe(elapsed.as_secs_f64());
        if self.ended {
            return;
        }
        // A worker that lets deadline after deadline pass is as bad as one that
        // fails; a caller who left says nothing about the worker.
        if Instant::now() >= self.request.deadline && self.had_long_enough() {
            upstream.failed_by(&self.request.caller.holder());
        } else {
            upstream.abandoned();
        }
    }
}

impl InFlightCall<'_> {
    /// Whether the worker could have responded before the deadline, by what it
    /// needs and without the time that this process itself was late.
    fn had_long_enough(&self) -> bool {
        let given = self
            .request
            .deadline
            .saturating_duration_since(self.started);
        let given = given.saturating_sub(self.upstream.starvation.recent());
        given >= self.upstream.needs(self.model, self.request.bytes().len())
    }
}

#[cfg(test)]
mod tests {
    use platform::metrics::Metrics;
    use protocol::andon::v1::ModelReport;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_worker_needs_what_it_reports_and_what_it_took() {
        let metrics = UpstreamMetrics::register(&Metrics::default());
        let target = Target::Tcp("127.0.0.1:1".to_owned());
        let upstream = Upstream::new(target, metrics.of("w".to_owned()), Starvation::none());
        let ms = Duration::from_millis;
        // Nothing is known of a server of another make.
        assert_eq!(upstream.needs("m", 1000), NEEDS_MIN);
        let report = |queue_wait_us, token_ns| WatchReportResponse {
            models: vec![ModelReport {
                name: "m".to_owned(),
                digest: "d".to_owned(),
                queue_wait_us,
                token_ns,
                ..Default::default()
            }],
            ..Default::default()
        };
        upstream.set_report(report(0, 0));
        assert_eq!(upstream.needs("m", 1000), NEEDS_UNKNOWN);
        upstream.set_report(report(30_000, 1_000_000));
        // 30 ms of waiting and a millisecond for each byte.
        assert_eq!(upstream.needs("m", 70), ms(200) + NEEDS_MIN);
        upstream.set_report(report(0, 1));
        upstream.took(ms(320));
        assert_eq!(upstream.needs("m", 1000), ms(640) + NEEDS_MIN);
        for _ in 0..200 {
            upstream.took(ms(1));
        }
        assert!(upstream.needs("m", 1000) < ms(30));
        upstream.took(Duration::MAX);
        upstream.took(Duration::MAX);
    }
}
