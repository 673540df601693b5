//! The commands and their flags. The long names are stable: scripts use them.

use std::net::SocketAddr;
use std::num::NonZero;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use gateway::{FleetSettings, GatewaySettings};
use platform::server::ServerSettings;
use platform::telemetry::TelemetrySettings;
use web::HttpSettings;
use worker::RepositorySettings;

use crate::client::{Bench, Infer, Models};
use crate::keys::Keys;

/// Serve AI models over gRPC and HTTP: one gateway in front of many workers
#[derive(Debug, Parser)]
#[command(
    name = "andon",
    version,
    propagate_version = true,
    subcommand_required = true,
    after_help = "Examples:\n  \
                  andon serve --repository models\n  \
                  andon models list\n  \
                  andon infer minilm \"A lantern around a candle\"\n\n\
                  Every flag has an environment variable: --grpc-addr is ANDON_GRPC_ADDR.\n\
                  serve, gateway and worker also read a TOML file, named with --config: grpc_addr."
)]
pub struct Andon {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a gateway and a worker in one process
    #[command(
        after_help = "Example:\n  andon serve --repository models",
        // Without a policy, requests are not authenticated: the default is
        // loopback.
        mut_arg("grpc_addr", |argument| argument.default_value("127.0.0.1:8001")),
        mut_arg("http_addr", |argument| argument.default_value("127.0.0.1:8000")),
        mut_arg("admin_addr", |argument| argument.default_value("127.0.0.1:8002")),
    )]
    Serve(Box<Serve>),
    /// Run a gateway: accept requests and route them to workers
    #[command(
        after_help = "Examples:\n  andon gateway --worker 127.0.0.1:9001 --worker 127.0.0.1:9002 \
                      --grpc-addr 127.0.0.1:8001 --http-addr 127.0.0.1:8000\n  \
                      andon gateway --worker-dns andon-workers:8001 --policy policy.toml --keys keys.toml"
    )]
    Gateway(Box<Gateway>),
    /// Run a worker: load models and run inference
    #[command(
        after_help = "Examples:\n  andon worker --repository models --grpc-addr 127.0.0.1:9001\n  \
                      andon worker --model minilm=./all-MiniLM-L6-v2 --device cuda:0"
    )]
    Worker(Box<Worker>),
    /// List, show, load and unload models
    Models(Models),
    /// Send an inference request
    Infer(Infer),
    /// Benchmark a model: throughput and latency under load
    Bench(Bench),
    /// Create, list and revoke API keys
    Keys(Keys),
    /// Generate shell completions
    #[command(after_help = "Example:\n  andon completions bash > /etc/bash_completion.d/andon")]
    Completions(Completions),
}

impl Command {
    /// The threads that the runtime beside the shards may have.
    pub fn cores(&self) -> usize {
        let common = match self {
            Self::Serve(serve) => &serve.common,
            Self::Gateway(gateway) => &gateway.common,
            Self::Worker(worker) => &worker.common,
            _ => return std::thread::available_parallelism().map_or(1, NonZero::get),
        };
        common.server.cores()
    }
}

/// The flags of every role.
#[derive(Debug, Args)]
pub struct Common {
    /// Listen address for gRPC
    #[arg(long, value_name = "ADDRESS", default_value = "0.0.0.0:8001")]
    pub grpc_addr: SocketAddr,
    /// Listen address for metrics and health probes (HTTP)
    #[arg(long, value_name = "ADDRESS", default_value = "0.0.0.0:8002")]
    pub admin_addr: SocketAddr,
    /// TOML file with a key per flag; flags and variables override it
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    #[command(flatten, next_help_heading = "Server")]
    pub server: ServerSettings,
    #[command(flatten, next_help_heading = "Telemetry")]
    pub telemetry: TelemetrySettings,
}

#[derive(Debug, Args)]
pub struct Serve {
    #[command(flatten)]
    pub common: Common,
    #[command(flatten, next_help_heading = "Models")]
    pub models: RepositorySettings,
    #[command(flatten, next_help_heading = "Gateway")]
    pub gateway: GatewaySettings,
    #[command(flatten, next_help_heading = "Gateway")]
    pub http: HttpSettings,
}

#[derive(Debug, Args)]
pub struct Gateway {
    #[command(flatten)]
    pub common: Common,
    #[command(flatten, next_help_heading = "Workers")]
    pub fleet: FleetSettings,
    #[command(flatten, next_help_heading = "Gateway")]
    pub gateway: GatewaySettings,
    #[command(flatten, next_help_heading = "Gateway")]
    pub http: HttpSettings,
}

#[derive(Debug, Args)]
pub struct Worker {
    #[command(flatten)]
    pub common: Common,
    #[command(flatten, next_help_heading = "Models")]
    pub models: RepositorySettings,
}

#[derive(Debug, Args)]
pub struct Completions {
    /// Shell to generate completions for
    shell: clap_complete::Shell,
}

impl Completions {
    /// Writes the completions to standard output.
    pub fn print(&self, command: &mut clap::Command) {
        clap_complete::generate(self.shell, command, "andon", &mut std::io::stdout());
    }
}
