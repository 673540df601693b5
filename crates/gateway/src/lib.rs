//! The gateway: accepts calls, routes them to workers and forwards tensor bytes
//! unchanged. The order of its layers is in [`stack`].

pub mod auth;
mod balance;
mod cache;
mod discover;
mod fleet;
mod grpc;
mod limit;
pub mod policy;
mod readings;
mod redis;
pub mod request;
mod route;
mod shed;
pub mod stack;
mod upstream;

pub use route::{Plan, Table};

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use platform::channel::Target;
use platform::drain::Phase;
use platform::files::FileError;
use platform::health::Health;
use platform::metrics::Metrics;
use platform::server::{CALLER_HEADER_BYTES_MAX, Grpc, Http, Listener, Server, ServerSettings};
use platform::tasks::{OwnedTask, spawn_owned};
use platform::tls::{Tls, TlsSettings};
use platform::{CommonServices, Process};
use protocol::{DESCRIPTORS, SERVICES};
use providers::{Catalogue, ProviderSettings};
use tokio::sync::watch;

use auth::{Auth, AuthSettings};
use balance::{Balance, BalanceMetrics};
use cache::{Cache, CacheError, CacheSettings};
use discover::{DiscoverMetrics, DiscoverSettings};
use grpc::GrpcDoor;
use limit::{Limit, LimitMetrics, LimitSettings};
use readings::Readings;
use redis::{Redis, RedisError, RedisSettings};
use route::Routes;
use shed::Shed;
use stack::{CallMetrics, Layers, Stack};
use upstream::UpstreamMetrics;

/// The workers of a gateway.
#[derive(Debug, Clone, clap::Args)]
pub struct FleetSettings {
    /// Address of a worker; repeat for several
    #[arg(long, value_name = "HOST:PORT", value_parser = host_and_port)]
    pub worker: Vec<String>,
    /// DNS name with a worker at each of its addresses, such as a Kubernetes headless
    /// service; repeat for several
    #[arg(long, value_name = "NAME:PORT", value_parser = host_and_port)]
    pub worker_dns: Vec<String>,
    /// How often the DNS names are resolved
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = platform::config::positive_duration)]
    pub dns_interval: Duration,
}

/// The settings of a gateway.
#[derive(Debug, Clone, clap::Args)]
pub struct GatewaySettings {
    /// Address of the HTTP server
    #[arg(long, value_name = "ADDRESS", default_value = "0.0.0.0:8000")]
    pub http_addr: SocketAddr,
    #[command(flatten)]
    #[allow(missing_docs, reason = "their fields are documented")]
    pub tls: TlsSettings,
    #[command(flatten)]
    #[allow(missing_docs, reason = "their fields are documented")]
    pub auth: AuthSettings,
    #[command(flatten)]
    #[allow(missing_docs, reason = "their fields are documented")]
    pub redis: RedisSettings,
    #[command(flatten)]
    #[allow(missing_docs, reason = "their fields are documented")]
    pub limit: LimitSettings,
    #[command(flatten)]
    #[allow(missing_docs, reason = "their fields are documented")]
    pub cache: CacheSettings,
    #[command(flatten)]
    #[allow(missing_docs, reason = "their fields are documented")]
    pub providers: ProviderSettings,
    /// Calls that may be in flight; more are refused at once (load shedding)
    #[arg(long, value_name = "COUNT", default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..))]
    pub calls_max: u32,
    /// Tokens of each caller's retry budget, as in gRFC A6: half of them are
    /// failures in a row that are retried; all callers together have four times as
    /// many
    #[arg(long, value_name = "COUNT", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub retry_tokens: u32,
    /// Connections to each worker from each thread of the gateway
    #[arg(long, value_name = "COUNT", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub worker_connections: u32,
}

fn host_and_port(text: &str) -> Result<String, String> {
    let valid = text
        .rsplit_once(':')
        .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
    let parses = text.parse::<http::uri::Authority>().is_ok();
    if valid && parses {
        return Ok(text.to_owned());
    }
    Err("write HOST:PORT, for example 127.0.0.1:9001".to_owned())
}

/// A worker of the same process.
#[derive(Debug)]
pub struct InProcess {
    /// Where it serves.
    pub target: Target,
    /// Becomes true when the models of its start have been loaded, or have failed.
    /// The process is not ready before.
    pub started: watch::Receiver<bool>,
}

/// Why a gateway cannot start.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    /// No worker and no provider is configured.
    #[error(
        "no worker or provider is configured: set --worker HOST:PORT, --worker-dns NAME:PORT or --providers FILE"
    )]
    NoWorkers,
    /// A file of certificates, of the policy, of keys or of providers cannot be
    /// used.
    #[error(transparent)]
    File(#[from] FileError),
    /// Redis cannot be used as it is configured.
    #[error(transparent)]
    Redis(#[from] RedisError),
    /// The cache cannot be used as it is configured.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// A public address would be served without authentication.
    #[error(
        "{0} is not a loopback address and authentication is off: set --policy FILE, or --insecure if something else protects the port"
    )]
    Open(SocketAddr),
    /// The embedded descriptors are malformed: a defect of the build.
    #[error("the descriptors of the services cannot be read: {0}")]
    Descriptors(String),
}

/// A gateway that has not opened its port yet.
#[derive(Debug)]
pub struct Gateway {
    stack: Stack,
    common: CommonServices,
    upstream_metrics: UpstreamMetrics,
    server: Server,
    discover: DiscoverSettings,
    redis: Option<Arc<Redis>>,
    process: Process,
    /// The start of the worker of this process.
    starting: Option<watch::Receiver<bool>>,
    /// Follows the workers and the drain.
    pub health: Health,
}

impl GatewaySettings {
    /// The Redis that quotas are shared through, if there is one.
    fn open_redis(&self, metrics: &Metrics) -> Result<Option<Arc<Redis>>, GatewayError> {
        let redis = self.redis.open()?;
        if let Some(redis) = &redis {
            redis.register(metrics, "andon_gateway_redis_up", "1 while Redis responds");
        }
        Ok(redis)
    }
}

impl Gateway {
    /// Checks the settings; no port is open and no worker is connected yet.
    pub fn new(
        fleet: FleetSettings,
        settings: &GatewaySettings,
        server: ServerSettings,
        process: Process,
        in_process: Option<InProcess>,
    ) -> Result<Self, GatewayError> {
        let (own, starting) = in_process.map(|own| (own.target, own.started)).unzip();
        let targets = all_targets(own, fleet.worker);
        let limits = server.message_limits(&process.metrics, &process.pool);
        let catalogue = Arc::new(Catalogue::new(&settings.providers, &limits)?);
        let workers = !targets.is_empty() || !fleet.worker_dns.is_empty();
        if !workers && catalogue.providers.is_empty() {
            return Err(GatewayError::NoWorkers);
        }
        catalogue.metrics.register(&process.metrics);
        let auth = Arc::new(Auth::new(&settings.auth)?);
        auth.metrics().register(&process.metrics);
        let redis = settings.open_redis(&process.metrics)?;
        let limit_metrics = LimitMetrics::default();
        limit_metrics.register(&process.metrics);
        let policy = auth.policy().clone();
        let limit = Limit::new(&settings.limit, policy, redis.clone(), &limit_metrics);
        let health = Health::default();
        let common = CommonServices::new(&health, DESCRIPTORS, &process.streams)
            .map_err(|error| GatewayError::Descriptors(error.to_string()))?;
        let routes = Arc::new(Routes::new(catalogue, workers));
        let shed = Arc::new(Shed::new(settings.calls_max as usize, &process.metrics));
        let readings = Readings {
            routes: routes.clone(),
            shed: shed.clone(),
            limits: limits.clone(),
        };
        readings.register(&process.metrics);
        let balance = BalanceMetrics::register(&process.metrics);
        let stack = Stack(Arc::new(Layers {
            shed,
            auth,
            limit,
            routes,
            cache: Cache::new(&settings.cache, &settings.redis, &process.metrics)?,
            balance: Balance::new(settings.retry_tokens, limits.clone(), balance),
            limits: limits.clone(),
            metrics: CallMetrics::register(&process.metrics),
            telemetry: process.telemetry.clone(),
            streams: process.streams.clone(),
            drain: process.drain.clone(),
            health: health.clone(),
            deadline_max: server.deadline_max,
        }));
        Ok(Self {
            stack,
            common,
            upstream_metrics: UpstreamMetrics::register(&process.metrics),
            discover: DiscoverSettings {
                targets,
                names: fleet.worker_dns,
                interval: fleet.dns_interval,
                connections: settings.worker_connections as usize,
                shards: process.shards.clone(),
                starvation: process.starvation.clone(),
                metrics: DiscoverMetrics::register(&process.metrics),
            },
            server: Server {
                name: "gateway",
                settings: server,
                header_bytes_max: CALLER_HEADER_BYTES_MAX,
                metrics: process.connections.clone(),
                shards: process.shards.clone(),
                limits: Arc::new(limits),
                tls: Tls::new(&settings.tls)?,
            },
            redis,
            process,
            starting,
            health,
        })
    }

    /// Whether callers must authenticate.
    pub fn authenticates(&self) -> bool {
        self.stack.0.auth.is_required()
    }

    /// An error when an address is public and authentication is off. On a public
    /// address without TLS whoever is on the way reads the credentials.
    pub fn may_serve(
        &self,
        address: SocketAddr,
        settings: &GatewaySettings,
    ) -> Result<(), GatewayError> {
        if address.ip().is_loopback() {
            return Ok(());
        }
        let auth = &self.stack.0.auth;
        if !auth.is_required() {
            return if settings.auth.insecure {
                Ok(())
            } else {
                Err(GatewayError::Open(address))
            };
        }
        if self.server.tls.is_some() {
            return Ok(());
        }
        if settings.auth.require_tls {
            auth.refuse_clear_text();
            tracing::warn!(%address, "no key and no token is accepted over clear text: set --tls-cert, or unset --require-tls");
        } else {
            tracing::warn!(%address, "keys and tokens are sent in clear text: set --tls-cert, and --require-tls to accept none without");
        }
        Ok(())
    }

    /// The layers that calls of both doors pass.
    pub fn stack(&self) -> &Stack {
        &self.stack
    }

    /// Finds workers and serves both doors until the process has drained: gRPC,
    /// and the HTTP door's routes.
    pub async fn run(self, grpc: Listener, http: Listener, routes: Http) {
        let layers = &self.stack.0;
        let _health = self.follow_health();
        let _discovery = discover::start(
            self.discover.clone(),
            layers.routes.clone(),
            self.upstream_metrics.clone(),
        );
        let _certificates = self.server.tls.as_ref().map(Tls::follow);
        let _policy = layers.auth.follow();
        let _redis = self.redis.as_ref().map(Redis::follow);
        let _quotas = layers.limit.follow();
        let _secrets = layers.routes.catalogue.follow();
        let _cache = layers.cache.follow();
        let web = Server {
            name: "http",
            ..self.server.clone()
        };
        let drain = self.process.drain.clone();
        let door = GrpcDoor {
            stack: self.stack.clone(),
            common: self.common.clone(),
        };
        tokio::join!(
            self.server.run(grpc, Grpc(door), drain.clone()),
            web.run(http, routes, drain),
        );
    }

    /// Keeps the health service in step with the workers and the drain.
    fn follow_health(&self) -> OwnedTask {
        let (routes, health) = (self.stack.0.routes.clone(), self.health.clone());
        let metrics = self.stack.0.metrics.clone();
        let mut starting = self.starting.clone();
        let mut drain = self.process.drain.clone();
        spawn_owned(async move {
            let mut changes = routes.changes();
            loop {
                changes.borrow_and_update();
                let draining = drain.draining();
                let models: Vec<(String, bool)> = routes
                    .readiness()
                    .into_iter()
                    .map(|(name, ready)| (name, ready && !draining))
                    .collect();
                for (name, _) in &models {
                    metrics.known(name);
                }
                let ready = routes.ready_to_serve() && starting.is_none() && !draining;
                health.replace(ready, &SERVICES, models);
                if draining {
                    drain.reached(Phase::Closing).await;
                    return health.close();
                }
                tokio::select! {
                    changed = changes.changed() => if changed.is_err() { return },
                    () = drain.reached(Phase::Draining) => {}
                    () = routes.startup_ended() => {}
                    () = has_started(&mut starting) => {}
                }
            }
        })
    }
}

/// The worker of this process, if there is one, and the others.
fn all_targets(own: Option<Target>, others: Vec<String>) -> Vec<Target> {
    let others = others.into_iter().map(Target::Tcp);
    own.into_iter().chain(others).collect()
}

/// Returns when the worker of this process has started, once.
async fn has_started(starting: &mut Option<watch::Receiver<bool>>) {
    match starting {
        Some(started) => {
            // A worker that has gone starts nothing more.
            let _ = started.wait_for(|started| *started).await;
            *starting = None;
        }
        None => std::future::pending().await,
    }
}
