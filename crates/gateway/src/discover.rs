//! Service discovery: the workers of the fleet and the models of each. Workers are
//! named one by one, or by a DNS name that is resolved periodically. The gateway
//! stays connected to each worker and follows its reports, or polls it.

mod metrics;

pub use metrics::DiscoverMetrics;

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
/// How long a worker that its name no longer lists is kept for its successor.
const LEAVING_MAX: Duration = Duration::from_secs(60);
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
    /// Counts what fails.
    pub metrics: DiscoverMetrics,
}

/// How workers are connected to.
#[derive(Debug, Clone)]
struct Connecting {
    /// The connections to each worker from each shard.
    connections: usize,
    shards: Arc<Shards>,
    metrics: DiscoverMetrics,
}

/// The workers of the fleet now.
#[derive(Debug)]
pub struct Discovery {
    routes: Arc<Routes>,
    metrics: UpstreamMetrics,
    connecting: Connecting,
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
        connecting: Connecting {
            connections: settings.connections,
            shards: settings.shards,
            metrics: settings.metrics,
        },
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
    /// Adds a worker of a source; true when it was not known.
    fn add(self: &Arc<Self>, target: Target, source: &str) -> bool {
        let key = target.to_string();
        if let Some(worker) = self.lock().get_mut(&key) {
            worker.sources.insert(source.to_owned());
            return false;
        }
        let (metrics, starvation) = (self.metrics.of(key.clone()), self.starvation.clone());
        let upstream = Arc::new(Upstream::new(target, metrics, starvation));
        let (discovery, worker) = (Arc::downgrade(self), upstream.clone());
        let connecting = self.connecting.clone();
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
            keep_connected(&worker, &connecting, &changed, &excused).await;
        });
        let worker = DiscoveredWorker {
            upstream,
            sources: [source.to_owned()].into(),
            _task: task,
        };
        self.lock().insert(key, worker);
        self.rebuild();
        true
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

    /// Whether a worker that its name no longer lists may go: it is unreachable,
    /// or each of its models is ready on a worker that stays. Else its successor
    /// has not reported yet, and its models would have no worker meanwhile.
    fn may_leave(&self, address: &str, leaving: &BTreeMap<String, Instant>) -> bool {
        let workers = self.lock();
        let Some(worker) = workers.get(address) else {
            return true;
        };
        let staying = workers
            .iter()
            .filter(|(key, other)| !leaving.contains_key(*key) && other.upstream.reachable());
        let reports: Vec<_> = staying.map(|(_, other)| other.upstream.report()).collect();
        let is_elsewhere = |name: &str| {
            let mut staying = reports.iter().filter(|report| !report.draining);
            staying.any(|report| report.models.iter().any(|m| m.ready && m.name == name))
        };
        let report = worker.upstream.report();
        let mut served = report.models.iter().filter(|model| model.ready);
        !worker.upstream.reachable() || served.all(|model| is_elsewhere(&model.name))
    }

    /// Takes the addresses that a name has now. `leaving` are those that it had,
    /// and since when they are no longer listed.
    fn update(
        self: &Arc<Self>,
        name: &str,
        found: &BTreeSet<String>,
        leaving: &mut BTreeMap<String, Instant>,
    ) {
        let now = Instant::now();
        leaving.retain(|address, _| !found.contains(address));
        for address in found {
            if self.add(Target::Tcp(address.clone()), name) {
                tracing::info!(worker = address, name, "found");
            }
        }
        for address in self.listed_by(name) {
            if !found.contains(&address) {
                leaving.entry(address).or_insert(now);
            }
        }
        let waiting = leaving.clone();
        leaving.retain(|address, since| {
            let late = now.duration_since(*since) >= LEAVING_MAX;
            let leaves = late || self.may_leave(address, &waiting);
            if leaves {
                tracing::info!(worker = address, name, "gone");
                self.remove(address, name);
            }
            !leaves
        });
        if leaving.len() < waiting.len() {
            self.rebuild();
        }
    }

    /// The addresses of the workers that a name lists, or has listed.
    fn listed_by(&self, name: &str) -> Vec<String> {
        let workers = self.lock();
        let listed = workers
            .iter()
            .filter(|(_, worker)| worker.sources.contains(name));
        listed.map(|(address, _)| address.clone()).collect()
    }

    /// Follows the addresses of a DNS name.
    async fn resolve(self: Arc<Self>, name: String, interval: Duration) {
        let (mut leaving, mut fails) = (BTreeMap::new(), false);
        loop {
            match tokio::net::lookup_host(&name).await {
                Ok(found) => {
                    if std::mem::take(&mut fails) {
                        tracing::info!(name, "the name resolves again");
                    }
                    let found: BTreeSet<String> = found.map(|a| a.to_string()).collect();
                    self.update(&name, &found, &mut leaving);
                }
                // A failing name server must not empty the fleet.
                Err(error) => {
                    self.connecting.metrics.resolve.inc();
                    if !std::mem::replace(&mut fails, true) {
                        tracing::warn!(name, %error, "the name of workers does not resolve: known workers stay");
                    }
                }
            }
            tokio::time::sleep(interval).await;
        }
    }
}

/// Keeps a worker connected and follows its reports.
async fn keep_connected(
    upstream: &Upstream,
    connecting: &Connecting,
    changed: &impl Fn(),
    excused: &impl Fn() -> bool,
) {
    let (mut backoff, mut fails) = (BACKOFF, false);
    loop {
        match connect(upstream, connecting).await {
            Ok(()) => {
                if std::mem::take(&mut fails) {
                    tracing::info!(worker = %upstream.target, "reached again");
                }
                backoff = BACKOFF;
                upstream.reset_circuit();
                upstream.heard();
                let reason = tokio::select! {
                    reason = follow(upstream, changed, excused) => reason,
                    reason = replace_closed(upstream, &connecting.shards) => reason,
                };
                tracing::info!(worker = %upstream.target, reason = reason.message(), "lost");
            }
            Err(error) => {
                connecting.metrics.connect.inc();
                // Once, when it begins: a worker may be away for hours.
                if !std::mem::replace(&mut fails, true) {
                    tracing::warn!(worker = %upstream.target, %error, "the worker cannot be reached");
                }
            }
        }
        upstream.set_channels(Vec::new());
        changed();
        tokio::time::sleep(backoff.mul_f64(rand::random_range(0.5..1.5))).await;
        backoff = (backoff * 2).min(BACKOFF_MAX);
    }
}

/// Connects from each shard.
async fn connect(upstream: &Upstream, connecting: &Connecting) -> std::io::Result<()> {
    let shards = &connecting.shards;
    let mut all = Vec::new();
    for shard in 0..shards.count() {
        let mut own = Vec::new();
        for _ in 0..connecting.connections {
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
mod tests;
