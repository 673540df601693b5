//! What people type. The long names are stable: people script them.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use gateway::{FleetSettings, GatewaySettings};
use platform::server::ServerSettings;
use platform::telemetry::TelemetrySettings;
use web::HttpSettings;
use worker::RepositorySettings;

use crate::client::{Bench, Infer, Models};
use crate::keys::Keys;

/// A fleet of AI model services behind one gateway.
#[derive(Debug, Parser)]
#[command(
    name = "andon",
    version,
    propagate_version = true,
    subcommand_required = true,
    after_help = "Every flag has an environment variable: --grpc-addr is ANDON_GRPC_ADDR.\n\
                  Every flag of a role has a key in the file that --config names: grpc_addr."
)]
pub struct Andon {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Gateway and worker in one process
    #[command(
        after_help = "Example:\n  andon serve --repository models",
        // Without a policy nobody is asked, so that loopback is the default.
        mut_arg("grpc_addr", |argument| argument.default_value("127.0.0.1:8001")),
        mut_arg("http_addr", |argument| argument.default_value("127.0.0.1:8000")),
        mut_arg("admin_addr", |argument| argument.default_value("127.0.0.1:8002")),
    )]
    Serve(Box<Serve>),
    /// Takes calls and forwards them to workers
    #[command(
        after_help = "Examples:\n  andon gateway --worker 127.0.0.1:9001 --worker 127.0.0.1:9002 \
                      --grpc-addr 127.0.0.1:8001 --http-addr 127.0.0.1:8000\n  \
                      andon gateway --worker-dns andon-workers:8001 --policy policy.toml --keys keys.toml"
    )]
    Gateway(Box<Gateway>),
    /// Serves models
    #[command(
        after_help = "Examples:\n  andon worker --repository models --grpc-addr 127.0.0.1:9001\n  \
                      andon worker --model minilm=./all-MiniLM-L6-v2 --device cuda:0"
    )]
    Worker(Box<Worker>),
    /// Lists and describes models of a running server
    Models(Models),
    /// Calls a model
    Infer(Infer),
    /// Measures a model under load
    Bench(Bench),
    /// Makes, lists and revokes the API keys of a gateway
    Keys(Keys),
    /// Prints completions for a shell
    #[command(after_help = "Example:\n  andon completions bash > /etc/bash_completion.d/andon")]
    Completions(Completions),
}

/// What every role has.
#[derive(Debug, Args)]
pub struct Common {
    /// Where gRPC is served
    #[arg(long, value_name = "ADDRESS", default_value = "0.0.0.0:8001")]
    pub grpc_addr: SocketAddr,
    /// Where metrics and probes are served, over HTTP
    #[arg(long, value_name = "ADDRESS", default_value = "0.0.0.0:8002")]
    pub admin_addr: SocketAddr,
    /// A TOML file with a key for each flag; flags and variables override it
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
    /// The shell
    shell: clap_complete::Shell,
}

impl Completions {
    /// Writes the completions to standard output.
    pub fn print(&self, command: &mut clap::Command) {
        clap_complete::generate(self.shell, command, "andon", &mut std::io::stdout());
    }
}
