//! The roles: ports are opened once all settings and files have been checked.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use gateway::{FleetSettings, GatewaySettings, InProcess};
use platform::channel::Target;
use platform::drain::{self, Trigger};
use platform::health::Health;
use platform::metrics::Metrics;
use platform::pool::WorkPool;
use platform::server::{ConnectionMetrics, Http, Listener, ServerSettings, bind};
use platform::shards::Shards;
use platform::tasks::{OwnedTask, spawn_owned};
use platform::telemetry::{self, Telemetry};
use platform::watchdog::Watchdog;
use platform::{Process, admin, descriptors, memory};
use tokio::net::TcpListener;
use web::HttpSettings;

use crate::arguments::Common;
use crate::{allocator, arguments};

/// The crates that are logged at INFO and below: the binary and every library of
/// the workspace. `tests/tidy` holds the list complete.
const CRATES: &[&str] = &[
    "andon",
    "engine",
    "gateway",
    "platform",
    "protocol",
    "providers",
    "tensor",
    "web",
    "worker",
];

/// The parts that every role has, before its ports are open.
struct Role {
    process: Process,
    trigger: Trigger,
    server: ServerSettings,
    grpc_addr: SocketAddr,
    admin_addr: SocketAddr,
    _telemetry: Telemetry,
    _watchdog: Watchdog,
    _memory: OwnedTask,
}

impl Role {
    fn new(common: Common, name: &'static str) -> anyhow::Result<Self> {
        let telemetry = telemetry::start(&common.telemetry, name, CRATES)?;
        let server = common.server.checked().map_err(anyhow::Error::msg)?;
        // A gateway has two ports for callers.
        let ports = if name == "worker" { 1 } else { 2 };
        let server = server.within_descriptors(descriptors::raise(), ports);
        let (trigger, drain) = drain::channel();
        let metrics = Arc::new(Metrics::default());
        let cores = server.cores();
        let shards = Arc::new(Shards::start(cores)?);
        let watchdog = Watchdog::start(&shards, &metrics);
        let work_threads = server.work_threads.map_or(cores, usize::from);
        let work_items_max = server.work_items_max as usize;
        let process = Process {
            connections: ConnectionMetrics::register(&metrics),
            telemetry: telemetry.control.clone(),
            pool: WorkPool::start(work_threads, work_items_max, &metrics)?,
            streams: server.streams(&metrics),
            starvation: watchdog.starvation(),
            cores,
            shards,
            drain,
            metrics,
        };
        Ok(Self {
            process,
            trigger,
            server,
            grpc_addr: common.grpc_addr,
            admin_addr: common.admin_addr,
            _telemetry: telemetry,
            _watchdog: watchdog,
            _memory: allocator::return_memory(),
        })
    }

    /// Opens the two ports that every role has; the second is the gRPC port.
    fn bind(&self) -> anyhow::Result<(TcpListener, TcpListener)> {
        Ok((bind(self.admin_addr)?, bind(self.grpc_addr)?))
    }

    /// Opens the HTTP port of a gateway, if it may serve both addresses.
    fn bind_http(
        &self,
        gateway: &gateway::Gateway,
        settings: &GatewaySettings,
        http: &HttpSettings,
    ) -> anyhow::Result<(TcpListener, Http)> {
        for address in [self.grpc_addr, settings.http_addr] {
            gateway.may_serve(address, settings)?;
        }
        let listener = bind(settings.http_addr)?;
        let exposure = web::Exposure {
            tls: settings.tls.tls_cert.is_some(),
            open_on_loopback: settings.http_addr.ip().is_loopback() && !gateway.authenticates(),
        };
        let routes = web::router(gateway.stack().clone(), http, exposure);
        Ok((listener, Http(routes)))
    }

    fn admin(&self, listener: TcpListener, health: Health) -> OwnedTask {
        spawn_owned(admin::run(listener, self.process.metrics.clone(), health))
    }

    /// Serves until a signal has drained the role, at the latest until the
    /// drain deadline.
    async fn run(&self, serving: impl Future<Output = ()>) -> anyhow::Result<()> {
        let drained = async {
            drain::termination().await?;
            tracing::info!("draining: readiness is off");
            self.trigger.drain(self.server.drain_delay).await;
            tokio::time::sleep(self.server.drain_deadline + Duration::from_secs(2)).await;
            tracing::warn!("the drain deadline passed with calls in flight");
            Ok(())
        };
        tokio::select! {
            () = serving => Ok(()),
            drained = drained => drained,
        }
    }
}

/// `andon serve`
pub async fn serve(arguments: arguments::Serve) -> anyhow::Result<()> {
    let role = Role::new(arguments.common, "serve")?;
    let (connector, acceptor) = memory::pair();
    // The worker drains after the gateway, whose calls it serves until then.
    let (worker_trigger, worker_drain) = drain::channel();
    let worker_process = Process {
        drain: worker_drain,
        ..role.process.clone()
    };
    let worker = worker::Worker::new(arguments.models, role.server.clone(), worker_process)?;
    let fleet = FleetSettings {
        worker: Vec::new(),
        worker_dns: Vec::new(),
        dns_interval: Duration::from_secs(5),
    };
    let inside = InProcess {
        target: Target::Memory(connector),
        started: worker.started(),
    };
    let server = role.server.clone();
    let gateway = gateway::Gateway::new(
        fleet,
        &arguments.gateway,
        server,
        role.process.clone(),
        Some(inside),
    )?;
    let (http, routes) = role.bind_http(&gateway, &arguments.gateway, &arguments.http)?;
    let (admin, grpc) = role.bind()?;
    let addresses = Addresses {
        grpc: grpc.local_addr()?,
        http: http.local_addr()?,
        admin: admin.local_addr()?,
    };
    // The gateway's health waits for the worker's models: every door says the same.
    let _admin = role.admin(admin, gateway.health.clone());
    let _examples = spawn_owned(print_examples(addresses, gateway.health.clone()));
    let serving = async {
        let gateway = async {
            let (grpc, http) = (Listener::Tcp(grpc), Listener::Tcp(http));
            gateway.run(grpc, http, routes).await;
            worker_trigger.drain(Duration::ZERO).await;
        };
        tokio::join!(worker.run(Listener::Memory(acceptor)), gateway);
    };
    role.run(serving).await
}

/// `andon gateway`
pub async fn gateway(arguments: arguments::Gateway) -> anyhow::Result<()> {
    allocator::use_small_pages();
    let role = Role::new(arguments.common, "gateway")?;
    let server = role.server.clone();
    let gateway = gateway::Gateway::new(
        arguments.fleet,
        &arguments.gateway,
        server,
        role.process.clone(),
        None,
    )?;
    let (http, routes) = role.bind_http(&gateway, &arguments.gateway, &arguments.http)?;
    let (admin, grpc) = role.bind()?;
    tracing::info!(grpc = %grpc.local_addr()?, http = %http.local_addr()?, admin = %admin.local_addr()?, "gateway");
    let _admin = role.admin(admin, gateway.health.clone());
    let serving = gateway.run(Listener::Tcp(grpc), Listener::Tcp(http), routes);
    role.run(serving).await
}

/// `andon worker`
pub async fn worker(arguments: arguments::Worker) -> anyhow::Result<()> {
    let role = Role::new(arguments.common, "worker")?;
    let worker = worker::Worker::new(arguments.models, role.server.clone(), role.process.clone())
        .context("the worker cannot start")?;
    let (admin, grpc) = role.bind()?;
    tracing::info!(grpc = %grpc.local_addr()?, admin = %admin.local_addr()?, "worker");
    let _admin = role.admin(admin, worker.health.clone());
    role.run(worker.run(Listener::Tcp(grpc))).await
}

/// The open ports of `andon serve`.
struct Addresses {
    grpc: SocketAddr,
    http: SocketAddr,
    admin: SocketAddr,
}

/// Prints example calls once the models are ready.
async fn print_examples(addresses: Addresses, health: Health) {
    while !health.ready() {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let local = |address: SocketAddr| {
        if address.ip().is_unspecified() {
            format!("localhost:{}", address.port())
        } else {
            address.to_string()
        }
    };
    let grpc = local(addresses.grpc);
    let http = local(addresses.http);
    let admin = local(addresses.admin);
    let andon = std::env::args()
        .next()
        .unwrap_or_else(|| "andon".to_owned());
    println!(
        "\nAndon is ready: gRPC on {grpc}, HTTP on http://{http}, metrics on http://{admin}/metrics\n\n\
         Try it in a browser: http://{http}/docs\nOr paste:\n  \
         {andon} models list --address {grpc}\n  \
         grpcurl -plaintext {grpc} list"
    );
    if health.serving("minilm") {
        println!(
            "  {andon} infer minilm \"A lantern around a candle\" --address {grpc}\n  \
             curl http://{http}/v1/embeddings -H 'content-type: application/json' -d '{{\"model\":\"minilm\",\"input\":\"A lantern around a candle\"}}'\n  \
             grpcurl -plaintext -H 'andon-model: minilm' -d '{{\"inputs\":\"A lantern around a candle\",\"normalize\":true}}' {grpc} tei.v1.Embed/Embed\n  \
             grpcurl -plaintext -d '{{\"model_name\":\"minilm\",\"inputs\":[{{\"name\":\"text\",\"datatype\":\"BYTES\",\"shape\":[1],\
             \"contents\":{{\"bytes_contents\":[\"aGVsbG8=\"]}}}}]}}' {grpc} inference.GRPCInferenceService/ModelInfer"
        );
    }
    println!();
}
