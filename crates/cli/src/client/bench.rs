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
use super::options::{Format, parameter};
use super::print;
use load::{Load, Until};
use payload::Payload;
use report::{Level, Report};

/// Requests that one connection carries at once, unless told otherwise.
const IN_FLIGHT_PER_CONNECTION: u32 = 32;

/// `andon bench`
#[derive(Debug, clap::Args)]
#[command(
    disable_version_flag = true,
    after_help = "Each level keeps so many requests in flight: the next is sent when one is\n\
                  answered. `requests` and the latencies are those that succeeded; errors are\n\
                  counted by their code. Tensors go raw, encoded before the clock starts.\n\n\
                  Examples:\n  \
                  andon bench minilm\n  \
                  andon bench minilm --texts sentences.txt --rows 8 --concurrency 1,8,64\n  \
                  andon bench digits --payload-bytes 600000 --concurrency 32 --duration 30s\n  \
                  andon bench minilm --requests 10000 --output json > report.json"
)]
pub struct Bench {
    /// The model's name
    model: String,
    /// Requests in flight, one level after the other
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "1,8,32",
          value_parser = clap::value_parser!(u32).range(1..=4096))]
    concurrency: Vec<u32>,
    /// How long each level lasts
    #[arg(long, value_name = "DURATION", default_value = "10s", conflicts_with = "requests",
          value_parser = platform::config::duration)]
    duration: Duration,
    /// How many requests each level sends, instead of a duration
    #[arg(long, value_name = "COUNT", value_parser = RangedU64ValueParser::<u64>::new().range(1..))]
    requests: Option<u64>,
    /// How long each level runs before it is measured
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = platform::config::duration)]
    warmup: Duration,
    /// About how many raw bytes the first input has; for texts, each text
    #[arg(long, value_name = "BYTES", conflicts_with = "texts", value_parser = platform::config::bytes)]
    payload_bytes: Option<usize>,
    /// A file with a text per line, which the requests take in turn
    #[arg(long, value_name = "FILE")]
    texts: Option<PathBuf>,
    /// So many different requests in turn, for a server that keeps answers;
    /// models of numbers only
    #[arg(long, value_name = "COUNT", default_value_t = 1, conflicts_with = "texts",
          value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    distinct: u32,
    /// Rows of each request
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=65_536))]
    rows: Option<u32>,
    /// Connections; one for every 32 requests in flight if not given
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=1024))]
    connections: Option<u32>,
    /// A parameter of each request; repeatable
    #[arg(long, value_name = "KEY=VALUE", value_parser = parameter)]
    param: Vec<(String, ParameterChoice)>,
    /// The model's version; the newest ready one if not given
    #[arg(long, value_name = "N", default_value = "", hide_default_value = true)]
    version: String,
    #[command(flatten)]
    connection: Connection,
    /// A table for people, JSON for programs
    #[arg(long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

/// Runs `andon bench`.
pub async fn bench(arguments: Bench) -> anyhow::Result<()> {
    let metadata = Client::connect(&arguments.connection)
        .await?
        .metadata(&arguments.model, &arguments.version)
        .await?;
    let payload = Payload::build(&metadata, &arguments)?;
    let mut report = Report {
        model: arguments.model.clone(),
        address: arguments.connection.address.clone(),
        payload_bytes: payload.bytes,
        levels: Vec::new(),
    };
    let rows = payload.rows;
    let load = Arc::new(Load::new(&arguments.connection, payload.requests)?);
    if arguments.output == Format::Table {
        print::out(&report.heading())?;
    }
    for &concurrency in &arguments.concurrency {
        let level = level(&arguments, &load, concurrency, rows).await?;
        if arguments.output == Format::Table {
            print::out(&level.line())?;
        }
        for line in level.error_lines() {
            eprintln!("{line}");
        }
        report.levels.push(level);
    }
    if arguments.output == Format::Json {
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
        let until = Until::Elapsed(arguments.warmup);
        let warmup = load::run(load, &channels, concurrency, until);
        warmup.await.context("the warm-up broke off")?;
    }
    let until = match arguments.requests {
        Some(requests) => Until::Requests(requests),
        None => Until::Elapsed(arguments.duration),
    };
    let bar = report::progress(&name, &until);
    let run = load::run(load, &channels, concurrency, until);
    let (tally, elapsed) = report::watched(&bar, load, until, run).await?;
    bar.finish_and_clear();
    Ok(Level::new(concurrency, rows, tally, elapsed))
}
