//! `andon bench`

mod load;
mod payload;
mod report;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, ensure};
use clap::builder::RangedU64ValueParser;
use protocol::inference::infer_parameter::ParameterChoice;

use super::connection::{Client, Connection};
use super::options::{OutputFormat, parameter};
use super::print;
use load::{Load, StopAfter};
use payload::RequestSet;
use report::{Level, Report};

/// Requests in flight per connection, without `--connections`.
const IN_FLIGHT_PER_CONNECTION: u32 = 32;

/// `andon bench`
#[derive(Debug, clap::Args)]
#[command(
    disable_version_flag = true,
    after_help = "Each level keeps CONCURRENCY requests in flight: when one completes, the next is\n\
                  sent (a closed loop). Latencies are those of the requests that succeeded; errors\n\
                  are counted by code. Requests are encoded before the clock starts.\n\n\
                  Examples:\n  \
                  andon bench minilm\n  \
                  andon bench minilm --texts sentences.txt --rows 8 --concurrency 1,8,64\n  \
                  andon bench digits --payload-bytes 600000 --concurrency 32 --duration 30s\n  \
                  andon bench minilm --requests 10000 --output json > report.json"
)]
pub struct Bench {
    /// Name of the model
    model: String,
    /// Requests in flight; each value is one level
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "1,8,32",
          value_parser = clap::value_parser!(u32).range(1..=4096))]
    concurrency: Vec<u32>,
    /// Duration of each level
    #[arg(long, value_name = "DURATION", default_value = "10s", conflicts_with = "requests",
          value_parser = platform::config::duration)]
    duration: Duration,
    /// Number of requests of each level, instead of a duration
    #[arg(long, value_name = "COUNT", value_parser = RangedU64ValueParser::<u64>::new().range(1..))]
    requests: Option<u64>,
    /// Warm-up before each level, not measured
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = platform::config::duration)]
    warmup: Duration,
    /// Approximate size of the first input in raw bytes; for texts, of each text
    #[arg(long, value_name = "BYTES", conflicts_with = "texts", value_parser = platform::config::bytes)]
    payload_bytes: Option<usize>,
    /// File with one text per line; the requests cycle through them
    #[arg(long, value_name = "FILE")]
    texts: Option<PathBuf>,
    /// Number of distinct requests to cycle through, for a server with a
    /// response cache; for numeric models only
    #[arg(long, value_name = "COUNT", default_value_t = 1, conflicts_with = "texts",
          value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    distinct: u32,
    /// Rows (batch size) of each request
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=65_536))]
    rows: Option<u32>,
    /// Number of connections; defaults to one per 32 requests in flight
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=1024))]
    connections: Option<u32>,
    /// Request parameter; repeatable
    #[arg(long, value_name = "KEY=VALUE", value_parser = parameter)]
    param: Vec<(String, ParameterChoice)>,
    /// Version of the model; defaults to the newest ready version
    #[arg(long, value_name = "N", default_value = "", hide_default_value = true)]
    version: String,
    #[command(flatten)]
    connection: Connection,
    /// Output format
    #[arg(long, value_enum, default_value_t = OutputFormat::Table)]
    output: OutputFormat,
}

/// Runs `andon bench`.
pub async fn bench(arguments: Bench) -> anyhow::Result<()> {
    let metadata = Client::connect(&arguments.connection)
        .await?
        .metadata(&arguments.model, &arguments.version)
        .await?;
    let requests = RequestSet::build(&metadata, &arguments)?;
    let mut report = Report {
        model: arguments.model.clone(),
        address: arguments.connection.address.clone(),
        payload_bytes: requests.bytes,
        levels: Vec::new(),
    };
    let rows = requests.rows;
    let load = Arc::new(Load::new(&arguments.connection, requests.framed)?);
    if arguments.output == OutputFormat::Table {
        print::out(&report.heading())?;
    }
    for &concurrency in &arguments.concurrency {
        let level = level(&arguments, &load, concurrency, rows).await?;
        if arguments.output == OutputFormat::Table {
            print::out(&level.line())?;
        }
        for line in level.error_lines() {
            eprintln!("{line}");
        }
        report.levels.push(level);
    }
    if arguments.output == OutputFormat::Json {
        print::json(&report)?;
    }
    ensure!(
        report.levels.iter().any(|level| level.requests > 0),
        "no request succeeded"
    );
    Ok(())
}

/// Connects, warms up and measures one level.
async fn level(
    arguments: &Bench,
    load: &Arc<Load>,
    concurrency: u32,
    rows: u64,
) -> anyhow::Result<Level> {
    let connections = arguments
        .connections
        .unwrap_or_else(|| concurrency.div_ceil(IN_FLIGHT_PER_CONNECTION))
        .min(concurrency);
    let channels = load
        .connect(connections)
        .await
        .map_err(|error| arguments.connection.unreachable(&error.to_string()))?;
    let name = format!("{concurrency:>4} in flight");
    if !arguments.warmup.is_zero() {
        let stop = StopAfter::Elapsed(arguments.warmup);
        let warmup = load::run(load, &channels, concurrency, stop);
        warmup.await.context("the warm-up failed")?;
    }
    let stop = match arguments.requests {
        Some(requests) => StopAfter::Requests(requests),
        None => StopAfter::Elapsed(arguments.duration),
    };
    let bar = report::progress(&name, &stop);
    let run = load::run(load, &channels, concurrency, stop);
    let (results, elapsed) = report::with_progress(&bar, load, stop, run).await?;
    bar.finish_and_clear();
    Ok(Level::new(concurrency, rows, results, elapsed))
}
