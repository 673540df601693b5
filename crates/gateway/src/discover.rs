//! Which workers there are, and what each serves. Workers are named one by one
//! or by a DNS name that is resolved again and again; each is kept connected,
//! and is listened to or asked.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http_body_util::BodyExt;
use platform::channel::{Channel, Target};
use platform::grpc::decode;
use platform::shards::Shards;
use platform::tasks::{OwnedTask, spawn_owned};
use protocol::Method;
use protocol::andon::v1::{ModelReport, WatchReportRequest, WatchReportResponse};
use protocol::inference::{RepositoryIndexRequest, RepositoryIndexResponse};
use tokio::time::Instant;
use tonic::{Code, Status};

use crate::request::Request;
use crate::route::Routes;
use crate::upstream::{Upstream, UpstreamMetrics};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// The first pause before connecting again, and the longest.
const BACKOFF: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(1);
/// A worker reports every second: silence for longer is a frozen one.
const SILENCE_MAX: Duration = Duration::from_secs(3);
/// How often connections are looked after.
const MAINTAIN: Duration = Duration::from_millis(20);
/// How often a worker that does not report is asked.
const ASK: Duration = Duration::from_secs(1);

/// How a gateway finds workers.
#[derive(Debug, Clone)]
pub struct DiscoverSettings {
    /// Workers that are named one by one.
    pub targets: Vec<Target>,
    /// Names that stand for a worker per address, with their port.
    pub names: Vec<String>,
    /// How often names are resolved.
    pub interval: Duration,
    /// Connections to each worker from each shard.
    pub connections: usize,
    /// Where calls run.
    pub shards: Arc<Shards>,
}

/// The workers that are known now.
#[derive(Debug)]
pub struct Discovery {
    routes: Arc<Routes>,
    metrics: UpstreamMetrics,
    connections: usize,
    shards: Arc<Shards>,
    workers: Mutex<BTreeMap<String, Known>>,
}

/// A worker that something names.
#[derive(Debug)]
struct Known {
    upstream: Arc<Upstream>,
    /// What names it; when nothing does any more, it is forgotten.
    sources: BTreeSet<String>,
    _task: OwnedTask,
}

/// The source of workers that are named one by one.
const STATIC: &str = "";

/// Keeps finding workers until the returned tasks are dropped.
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
        if let Some(known) = self.lock().get_mut(&key) {
            known.sources.insert(source.to_owned());
            return;
        }
        let upstream = Arc::new(Upstream::new(target, self.metrics.of(key.clone())));
        let (discovery, kept) = (Arc::downgrade(self), upstream.clone());
        let (connections, shards) = (self.connections, self.shards.clone());
        let task = spawn_owned(async move {
            let changed = || {
                if let Some(discovery) = discovery.upgrade() {
                    discovery.rebuild();
                }
            };
            attend(&kept, connections, &shards, changed).await;
        });
        let known = Known {
            upstream,
            sources: [source.to_owned()].into(),
            _task: task,
        };
        self.lock().insert(key, known);
        self.rebuild();
    }

    /// A source names a worker no more. Calls that it still has hold its
    /// connection.
    fn remove(&self, address: &str, source: &str) {
        let mut workers = self.lock();
        let unnamed = workers.get_mut(address).is_some_and(|known| {
            known.sources.remove(source);
            known.sources.is_empty()
        });
        if unnamed {
            workers.remove(address);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Known>> {
        self.workers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn rebuild(&self) {
        let workers = self.lock();
        let upstreams = workers.values().map(|known| known.upstream.clone());
        // Under the lock, so that an older table never replaces a newer one.
        self.routes.rebuild(upstreams.collect());
    }

    /// Follows the addresses of one name.
    async fn resolve(self: Arc<Self>, name: String, interval: Duration) {
        let mut known = BTreeSet::new();
        loop {
            match tokio::net::lookup_host(&name).await {
                Ok(found) => {
                    let found: BTreeSet<String> = found.map(|a| a.to_string()).collect();
                    for address in found.difference(&known) {
                        tracing::info!(worker = address, name, "found");
                        self.add(Target::Tcp(address.clone()), &name);
                    }
                    for address in known.difference(&found) {
                        tracing::info!(worker = address, name, "gone");
                        self.remove(address, &name);
                    }
                    if found != known {
                        self.rebuild();
                    }
                    known = found;
                }
                // A name server that fails must not empty the fleet.
                Err(error) => tracing::debug!(name, %error, "the name cannot be resolved"),
            }
            tokio::time::sleep(interval).await;
        }
    }
}

/// Keeps a worker connected and follows what it serves.
async fn attend(upstream: &Upstream, connections: usize, shards: &Shards, changed: impl Fn()) {
    let mut backoff = BACKOFF;
    loop {
        match connect(upstream, connections, shards).await {
            Ok(()) => {
                backoff = BACKOFF;
                upstream.returned();
                let reason = tokio::select! {
                    reason = follow(upstream, &changed) => reason,
                    reason = maintain(upstream, shards) => reason,
                };
                tracing::info!(worker = %upstream.target, reason = reason.message(), "lost");
            }
            Err(error) => {
                tracing::debug!(worker = %upstream.target, %error, "cannot be reached");
            }
        }
        upstream.connected(Vec::new());
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
    upstream.connected(all);
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

/// Replaces connections that have come to their age.
async fn maintain(upstream: &Upstream, shards: &Shards) -> Status {
    loop {
        tokio::time::sleep(MAINTAIN).await;
        for (shard, index) in upstream.closed_places() {
            // A worker that cannot be reached is seen by its reports.
            if let Ok(channel) = connect_from(shard, upstream, shards).await {
                upstream.replace(shard, index, channel);
            }
        }
    }
}

/// Follows a worker's reports, on a connection of their own, for as long as
/// there can be one. Returns why there cannot.
async fn follow(upstream: &Upstream, changed: &impl Fn()) -> Status {
    loop {
        let channel = match Channel::connect(&upstream.target, CONNECT_TIMEOUT).await {
            Ok(channel) => channel,
            Err(error) => return Status::unavailable(error.to_string()),
        };
        match listen(upstream, &channel, changed).await {
            Err(status) if status.code() == Code::DeadlineExceeded => {
                // Frozen: its calls end here, and go elsewhere.
                upstream.abort();
                return status;
            }
            // Its connection came to its age, or it ended: the next says.
            _ => tokio::time::sleep(MAINTAIN).await,
        }
    }
}

/// Follows a worker's reports until it ends, breaks or falls silent.
async fn listen(upstream: &Upstream, channel: &Channel, changed: &impl Fn()) -> Result<(), Status> {
    let deadline = Instant::now() + Duration::from_secs(365 * 24 * 3600);
    let request = Request::internal(Method::WatchReport, &WatchReportRequest {}, deadline);
    let mut body = match upstream.open(channel, &request).await {
        Ok(body) => body,
        Err(status) if status.code() == Code::Unimplemented => {
            return ask(upstream, channel, changed).await;
        }
        Err(status) => return Err(status),
    };
    // The connection is new even if the report is not.
    changed();
    let mut gathered = bytes::BytesMut::new();
    loop {
        let frame = tokio::time::timeout(SILENCE_MAX, body.frame())
            .await
            .map_err(|_| Status::deadline_exceeded("it is silent"))?;
        let Some(frame) = frame else {
            return Ok(());
        };
        let frame = frame.map_err(|error| Status::unavailable(error.to_string()))?;
        let Ok(data) = frame.into_data() else {
            return Ok(());
        };
        gathered.extend_from_slice(&data);
        while let Some(report) = next_report(&mut gathered)? {
            if upstream.reported(report) {
                changed();
            }
        }
    }
}

fn next_report(gathered: &mut bytes::BytesMut) -> Result<Option<WatchReportResponse>, Status> {
    let Some((prefix, rest)) = gathered.split_first_chunk::<5>() else {
        return Ok(None);
    };
    let length = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]) as usize;
    if length > 16 << 20 {
        return Err(Status::internal("a report is too long"));
    }
    if rest.len() < length {
        return Ok(None);
    }
    let _ = gathered.split_to(5);
    decode(gathered.split_to(length).freeze()).map(Some)
}

/// Asks a server of another make what it serves, again and again.
async fn ask(upstream: &Upstream, channel: &Channel, changed: &impl Fn()) -> Result<(), Status> {
    loop {
        let deadline = Instant::now() + SILENCE_MAX;
        let asked = RepositoryIndexRequest::default();
        let index: RepositoryIndexResponse = upstream
            .call(Method::RepositoryIndex, &asked, deadline)
            .await?;
        let models = index
            .models
            .into_iter()
            .map(|model| ModelReport {
                name: model.name,
                // KServe's servers leave versions out.
                version: if model.version.is_empty() {
                    "1".to_owned()
                } else {
                    model.version
                },
                ready: model.state == "READY",
                ..Default::default()
            })
            .collect();
        let report = WatchReportResponse {
            draining: false,
            models,
        };
        if upstream.reported(report) {
            changed();
        }
        if channel.closed() {
            return Err(Status::unavailable("the connection closed"));
        }
        tokio::time::sleep(ASK).await;
    }
}
