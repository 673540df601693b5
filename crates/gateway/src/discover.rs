//! Service discovery: the workers of the fleet and the models of each. Workers are
//! named one by one, or by a DNS name that is resolved periodically. The gateway
//! stays connected to each worker and follows its reports, or polls it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http_body_util::BodyExt;
use platform::channel::{Channel, Target};
use platform::grpc::decode;
use platform::shards::Shards;
use platform::tasks::{OwnedTask, spawn_owned};
use platform::watchdog::Starvation;
use protocol::Method;
use protocol::andon::v1::{ModelReport, WatchReportRequest, WatchReportResponse};
use protocol::inference::{RepositoryIndexRequest, RepositoryIndexResponse};
use tokio::time::Instant;
use tonic::{Code, Status};

use crate::request::Request;
use crate::route::Routes;
use crate::upstream::{Upstream, UpstreamMetrics};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// The first backoff before a reconnect, without its jitter.
const BACKOFF: Duration = Duration::from_millis(50);
/// The longest backoff before a reconnect.
const BACKOFF_MAX: Duration = Duration::from_secs(1);
/// The timeout of a report. A worker reports every second; one that is silent for
/// longer hangs.
const REPORT_TIMEOUT: Duration = Duration::from_secs(3);
/// A worker that was not heard of for so long is silent: it reports every second.
const SILENCE: Duration = Duration::from_secs(2);
/// How long the workers are kept when most of them fall silent at once.
const KEPT_MAX: Duration = Duration::from_secs(60);
/// How often closed connections are replaced.
const REPLACE_INTERVAL: Duration = Duration::from_millis(20);
/// How often a worker that sends no reports is polled.
const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// The settings of service discovery.
#[derive(Debug, Clone)]
pub struct DiscoverSettings {
    /// The addresses of workers.
    pub targets: Vec<Target>,
    /// DNS names and ports, with a worker at each address.
    pub names: Vec<String>,
    /// How often names are resolved.
    pub interval: Duration,
    /// The number of connections to each worker from each shard.
    pub connections: usize,
    /// The threads that drive the connections.
    pub shards: Arc<Shards>,
    /// How late this process itself was lately.
    pub starvation: Starvation,
}

/// The workers of the fleet now.
#[derive(Debug)]
pub struct Discovery {
    routes: Arc<Routes>,
    metrics: UpstreamMetrics,
    connections: usize,
    shards: Arc<Shards>,
    starvation: Starvation,
    workers: Mutex<BTreeMap<String, DiscoveredWorker>>,
}

/// A worker that the settings or a DNS name list.
#[derive(Debug)]
struct DiscoveredWorker {
    upstream: Arc<Upstream>,
    /// The names that list it, which is removed with the last of them.
    sources: BTreeSet<String>,
    _task: OwnedTask,
}

/// The source of workers that the settings list by address.
const STATIC: &str = "";

/// Discovers workers until the returned tasks are dropped.
pub fn start(
    settings: DiscoverSettings,
    routes: Arc<Routes>,
    metrics: UpstreamMetrics,
) -> Vec<OwnedTask> {
    let discovery = Arc::new(Discovery {
        routes,
        metrics,
        connections: settings.connections,
        shards: settings.shards,
        starvation: settings.starvation,
        workers: Mutex::default(),
    });
    for target in settings.targets {
        discovery.add(target, STATIC);
    }
    settings
        .names
        .into_iter()
        .map(|name| {
            let (discovery, interval) = (discovery.clone(), settings.interval);
            spawn_owned(async move { discovery.resolve(name, interval).await })
        })
        .chain(std::iter::once(keep(discovery.clone())))
        .collect()
}

/// Holds the workers' tasks.
fn keep(discovery: Arc<Discovery>) -> OwnedTask {
    spawn_owned(async move {
        let _discovery = discovery;
        std::future::pending::<()>().await;
    })
}

impl Discovery {
    fn add(self: &Arc<Self>, target: Target, source: &str) {
        let key = target.to_string();
        if let Some(worker) = self.lock().get_mut(&key) {
            worker.sources.insert(source.to_owned());
            return;
        }
        let (metrics, starvation) = (self.metrics.of(key.clone()), self.starvation.clone());
        let upstream = Arc::new(Upstream::new(target, metrics, starvation));
        let (discovery, worker) = (Arc::downgrade(self), upstream.clone());
        let (connections, shards) = (self.connections, self.shards.clone());
        let task = spawn_owned(async move {
            let changed = || {
                if let Some(discovery) = discovery.upgrade() {
                    discovery.rebuild();
                }
            };
            let excused = || {
                let discovery = discovery.upgrade();
                discovery.is_some_and(|discovery| discovery.excuses(&worker))
            };
            keep_connected(&worker, connections, &shards, &changed, &excused).await;
        });
        let worker = DiscoveredWorker {
            upstream,
            sources: [source.to_owned()].into(),
            _task: task,
        };
        self.lock().insert(key, worker);
        self.rebuild();
    }

    /// Removes a worker from a source. Its calls in flight hold its connection.
    fn remove(&self, address: &str, source: &str) {
        let mut workers = self.lock();
        let unlisted = workers.get_mut(address).is_some_and(|worker| {
            worker.sources.remove(source);
            worker.sources.is_empty()
        });
        if unlisted {
            workers.remove(address);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, DiscoveredWorker>> {
        self.workers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn rebuild(&self) {
        let workers = self.lock();
        let upstreams = workers.values().map(|worker| worker.upstream.clone());
        // Under the lock, so that an older table never replaces a newer one.
        self.routes.rebuild(upstreams.collect());
    }

    /// Whether the silence of a worker is no fault of its own: this process was
    /// late itself, and has not read what the worker sent meanwhile; or most
    /// workers fell silent at once, which is a fault on this side too.
    fn excuses(&self, silent: &Upstream) -> bool {
        let silence = silent.silence();
        let late = self.starvation.recent();
        if silence < REPORT_TIMEOUT + late {
            return true;
        }
        let workers = self.lock();
        let reachable = workers.values().map(|worker| &worker.upstream);
        let reachable: Vec<_> = reachable.filter(|one| one.reachable()).collect();
        let count = reachable
            .iter()
            .filter(|one| one.silence() >= SILENCE)
            .count();
        let most = reachable.len() > 1 && count * 2 > reachable.len();
        let kept = most && silence < KEPT_MAX;
        if kept {
            tracing::warn!(
                worker = %silent.target,
                silent = count,
                of = reachable.len(),
                "most workers are silent at once: they are kept, the fault may be here"
            );
        }
        kept
    }

    /// Follows the addresses of a DNS name.
    async fn resolve(self: Arc<Self>, name: String, interval: Duration) {
        let mut addresses = BTreeSet::new();
        loop {
            match tokio::net::lookup_host(&name).await {
                Ok(found) => {
                    let found: BTreeSet<String> = found.map(|a| a.to_string()).collect();
                    for address in found.difference(&addresses) {
                        tracing::info!(worker = address, name, "found");
                        self.add(Target::Tcp(address.clone()), &name);
                    }
                    for address in addresses.difference(&found) {
                        tracing::info!(worker = address, name, "gone");
                        self.remove(address, &name);
                    }
                    if found != addresses {
                        self.rebuild();
                    }
                    addresses = found;
                }
                // A failing name server must not empty the fleet.
                Err(error) => tracing::debug!(name, %error, "cannot resolve the name"),
            }
            tokio::time::sleep(interval).await;
        }
    }
}

/// Keeps a worker connected and follows its reports.
async fn keep_connected(
    upstream: &Upstream,
    connections: usize,
    shards: &Shards,
    changed: &impl Fn(),
    excused: &impl Fn() -> bool,
) {
    let mut backoff = BACKOFF;
    loop {
        match connect(upstream, connections, shards).await {
            Ok(()) => {
                backoff = BACKOFF;
                upstream.reset_circuit();
                upstream.heard();
                let reason = tokio::select! {
                    reason = follow(upstream, changed, excused) => reason,
                    reason = replace_closed(upstream, shards) => reason,
                };
                tracing::info!(worker = %upstream.target, reason = reason.message(), "lost");
            }
            Err(error) => {
                tracing::debug!(worker = %upstream.target, %error, "cannot be reached");
            }
        }
        upstream.set_channels(Vec::new());
        changed();
        tokio::time::sleep(backoff.mul_f64(rand::random_range(0.5..1.5))).await;
        backoff = (backoff * 2).min(BACKOFF_MAX);
    }
}

/// Connects from each shard.
async fn connect(upstream: &Upstream, connections: usize, shards: &Shards) -> std::io::Result<()> {
    let mut all = Vec::new();
    for shard in 0..shards.count() {
        let mut own = Vec::new();
        for _ in 0..connections {
            own.push(connect_from(shard, upstream, shards).await?);
        }
        all.push(own);
    }
    upstream.set_channels(all);
    Ok(())
}

/// Connects from one shard, which drives the connection.
async fn connect_from(
    shard: usize,
    upstream: &Upstream,
    shards: &Shards,
) -> std::io::Result<Arc<Channel>> {
    let target = upstream.target.clone();
    let connect = async move { Channel::connect(&target, CONNECT_TIMEOUT).await };
    Ok(Arc::new(shards.handle(shard).spawn(connect).await??))
}

/// Replaces connections that have been closed at their maximum age.
async fn replace_closed(upstream: &Upstream, shards: &Shards) -> Status {
    loop {
        tokio::time::sleep(REPLACE_INTERVAL).await;
        for at in upstream.closed_channels() {
            // The missing reports show that a worker is unreachable.
            if let Ok(channel) = connect_from(at.shard, upstream, shards).await {
                upstream.replace(at, channel);
            }
        }
    }
}

/// Follows the reports of a worker on a connection of their own, until the worker
/// is unreachable or hangs. Returns the reason.
async fn follow(upstream: &Upstream, changed: &impl Fn(), excused: &impl Fn() -> bool) -> Status {
    loop {
        let channel = match Channel::connect(&upstream.target, CONNECT_TIMEOUT).await {
            Ok(channel) => channel,
            Err(error) => return Status::unavailable(error.to_string()),
        };
        match watch_reports(upstream, &channel, changed).await {
            Err(status) if status.code() == Code::DeadlineExceeded => {
                if excused() {
                    continue;
                }
                // It hangs: its calls in flight are aborted, and retried elsewhere.
                upstream.abort();
                return status;
            }
            // The connection was closed at its maximum age, or the worker ended:
            // the next connection shows which.
            _ => tokio::time::sleep(REPLACE_INTERVAL).await,
        }
    }
}

/// Follows the reports on one connection until it ends, breaks or times out.
async fn watch_reports(
    upstream: &Upstream,
    channel: &Channel,
    changed: &impl Fn(),
) -> Result<(), Status> {
    let deadline = Instant::now() + Duration::from_secs(365 * 24 * 3600);
    let request = Request::internal(Method::WatchReport, &WatchReportRequest {}, deadline);
    let silent = || Status::deadline_exceeded("no report within the timeout");
    // A worker of this process shares its threads: it is late with them, never silent.
    let timeout = match upstream.target {
        Target::Memory(_) => deadline.saturating_duration_since(Instant::now()),
        Target::Tcp(_) | Target::Tls(..) => REPORT_TIMEOUT,
    };
    let opened = tokio::time::timeout(timeout, upstream.open(channel, &request)).await;
    let mut body = match opened.map_err(|_| silent())? {
        Ok(body) => body,
        Err(status) if status.code() == Code::Unimplemented => {
            return poll_index(upstream, channel, changed).await;
        }
        Err(status) => return Err(status),
    };
    // The connection is new even if the report is unchanged.
    changed();
    let mut buffer = bytes::BytesMut::new();
    loop {
        let frame = tokio::time::timeout(timeout, body.frame())
            .await
            .map_err(|_| silent())?;
        let Some(frame) = frame else {
            return Ok(());
        };
        let frame = frame.map_err(|error| Status::unavailable(error.to_string()))?;
        let Ok(data) = frame.into_data() else {
            return Ok(());
        };
        buffer.extend_from_slice(&data);
        while let Some(report) = next_report(&mut buffer)? {
            if upstream.set_report(report) {
                changed();
            }
        }
    }
}

fn next_report(buffer: &mut bytes::BytesMut) -> Result<Option<WatchReportResponse>, Status> {
    let Some((prefix, rest)) = buffer.split_first_chunk::<5>() else {
        return Ok(None);
    };
    let length = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]) as usize;
    if length > 16 << 20 {
        return Err(Status::internal("a report is larger than 16 MiB"));
    }
    if rest.len() < length {
        return Ok(None);
    }
    let _ = buffer.split_to(5);
    decode(buffer.split_to(length).freeze()).map(Some)
}

/// Polls the repository index of a server that sends no reports: another
/// implementation of the Open Inference Protocol.
async fn poll_index(
    upstream: &Upstream,
    channel: &Channel,
    changed: &impl Fn(),
) -> Result<(), Status> {
    loop {
        let deadline = Instant::now() + REPORT_TIMEOUT;
        let request = RepositoryIndexRequest::default();
        let index: RepositoryIndexResponse = upstream
            .call(Method::RepositoryIndex, &request, deadline)
            .await?;
        let models = index
            .models
            .into_iter()
            .map(|model| ModelReport {
                name: model.name,
                // The servers of KServe leave versions out.
                version: if model.version.is_empty() {
                    "1".to_owned()
                } else {
                    model.version
                },
                ready: model.state == "READY",
                loading: model.state == "LOADING",
                ..Default::default()
            })
            .collect();
        let report = WatchReportResponse {
            draining: false,
            models,
        };
        if upstream.set_report(report) {
            changed();
        }
        if channel.closed() {
            return Err(Status::unavailable("the connection closed"));
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use platform::memory::{Acceptor, pair};
    use platform::metrics::Metrics;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

    use super::*;

    /// Workers that are connected and have just reported.
    fn discovery(addresses: &[&str]) -> Discovery {
        let metrics = UpstreamMetrics::register(&Metrics::default());
        let worker = |address: &&str| {
            let target = Target::Tcp((*address).to_owned());
            let own = metrics.of((*address).to_owned());
            let upstream = Arc::new(Upstream::new(target, own, Starvation::none()));
            upstream.set_channels(vec![Vec::new()]);
            upstream.heard();
            let worker = DiscoveredWorker {
                upstream,
                sources: BTreeSet::new(),
                _task: spawn_owned(async {}),
            };
            ((*address).to_owned(), worker)
        };
        Discovery {
            routes: Arc::default(),
            metrics: metrics.clone(),
            connections: 1,
            shards: Arc::new(Shards::start(1).unwrap()),
            starvation: Starvation::none(),
            workers: Mutex::new(addresses.iter().map(worker).collect()),
        }
    }

    fn upstream(discovery: &Discovery, address: &str) -> Arc<Upstream> {
        discovery.lock()[address].upstream.clone()
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_worker_is_lost_and_most_at_once_are_kept() {
        let discovery = discovery(&["a", "b", "c"]);
        let silent = upstream(&discovery, "a");
        tokio::time::advance(REPORT_TIMEOUT / 2).await;
        assert!(
            discovery.excuses(&silent),
            "it is not silent for long enough"
        );
        tokio::time::advance(REPORT_TIMEOUT / 2).await;
        assert!(discovery.excuses(&silent), "all are silent");
        upstream(&discovery, "b").heard();
        assert!(discovery.excuses(&silent), "two of three are silent");
        upstream(&discovery, "c").heard();
        assert!(!discovery.excuses(&silent), "it alone is silent");
        tokio::time::advance(KEPT_MAX).await;
        assert!(!discovery.excuses(&silent), "they are not kept for ever");
    }

    #[tokio::test(start_paused = true)]
    async fn the_only_worker_is_lost_when_it_is_silent() {
        let discovery = discovery(&["a"]);
        tokio::time::advance(REPORT_TIMEOUT).await;
        assert!(!discovery.excuses(&upstream(&discovery, "a")));
    }

    #[tokio::test]
    async fn a_model_that_loads_is_not_ready_and_one_that_was_unloaded_is_unknown() {
        let discovery = discovery(&["a"]);
        let reported = |change: fn(&mut ModelReport)| {
            let mut model = ModelReport {
                name: "slow".to_owned(),
                version: "1".to_owned(),
                ..Default::default()
            };
            change(&mut model);
            let report = WatchReportResponse {
                draining: false,
                models: vec![model],
            };
            assert!(upstream(&discovery, "a").set_report(report), "no change");
            discovery.rebuild();
            let table = discovery.routes.table();
            ["", "1"].map(|version| table.named("slow", version, "model_name").err())
        };
        let [newest, named] = reported(|model| model.loading = true);
        for error in [newest.unwrap(), named.unwrap()] {
            assert_eq!(error.kind(), protocol::Kind::NotReady, "{error}");
            assert!(error.retry_after().is_some(), "{error}");
            assert!(error.to_string().ends_with("is LOADING"), "{error}");
        }
        let [newest, _] = reported(|model| model.failed = true);
        assert_eq!(newest.unwrap().kind(), protocol::Kind::NotReady);
        let [newest, _] = reported(|_| {});
        assert_eq!(newest.unwrap().kind(), protocol::Kind::NotFound);
        assert_eq!(reported(|model| model.ready = true), [None, None]);
    }

    /// Takes a request and sends one report without a field, in the frames of HTTP/2.
    async fn report(io: &mut DuplexStream) -> std::io::Result<()> {
        const HEADERS: u8 = 1;
        let mut preface = [0; 24];
        io.read_exact(&mut preface).await?;
        let mut kind = 0;
        while kind != HEADERS {
            let mut head = [0; 9];
            io.read_exact(&mut head).await?;
            kind = head[3];
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
            io.read_exact(&mut vec![0; length as usize]).await?;
        }
        // The settings, the status 200 of the first stream, and its message.
        io.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await?;
        io.write_all(&[0, 0, 1, 1, 4, 0, 0, 0, 1, 0x88]).await?;
        io.write_all(&[0, 0, 5, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0])
            .await
    }

    /// A server that is silent after its first report, and keeps its connections.
    fn silent_server(mut acceptor: Acceptor) -> OwnedTask {
        spawn_owned(async move {
            let mut open = Vec::new();
            while let Some(mut io) = acceptor.accept().await {
                report(&mut io).await.unwrap();
                open.push(io);
            }
        })
    }

    #[tokio::test(start_paused = true)]
    async fn a_worker_of_this_process_is_never_declared_silent() {
        let (connector, acceptor) = pair();
        let _server = silent_server(acceptor);
        let metrics = UpstreamMetrics::register(&Metrics::default());
        let worker = |target| Upstream::new(target, metrics.of("a".to_owned()), Starvation::none());
        let opened = Cell::new(0);
        let changed = || opened.set(opened.get() + 1);
        // Another worker that behaves so is declared silent at the timeout.
        let memory = Target::Memory(connector);
        let channel = Channel::connect(&memory, CONNECT_TIMEOUT).await.unwrap();
        let other = worker(Target::Tcp("a".to_owned()));
        let begun = Instant::now();
        let silent = watch_reports(&other, &channel, &changed).await.unwrap_err();
        assert_eq!(silent.code(), Code::DeadlineExceeded);
        assert_eq!(begun.elapsed().as_secs(), REPORT_TIMEOUT.as_secs());
        assert_eq!(opened.get(), 1, "the first report came");

        let day = Duration::from_secs(24 * 3600);
        let own = worker(memory);
        let asked = Cell::new(false);
        let excused = || {
            asked.set(true);
            false
        };
        let followed = tokio::time::timeout(day, follow(&own, &changed, &excused)).await;
        assert!(followed.is_err(), "it is lost: {followed:?}");
        assert!(!asked.get(), "nobody asks for an excuse");
        assert_eq!(opened.get(), 2, "its first report came");
        assert!(own.silence() >= day - REPORT_TIMEOUT);
    }
}
