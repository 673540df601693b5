//! What servers add to a call, when they differ by less than the machine's
//! noise: one call at a time, to each server in turn, again and again. Calls of
//! one round meet the same noise, so that their differences do not. Every round
//! has another order, since a server is slower after another than after itself.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use fleet_tests::calls::{Client, client, pixels};
use serde_json::json;

#[derive(Debug, Parser)]
struct Arguments {
    /// A server and its model of digits, NAME=HOST:PORT/MODEL; the first is what
    /// the others are compared with
    #[arg(long, required = true)]
    target: Vec<String>,
    /// A name of those that are called with the key
    #[arg(long, requires = "key_file")]
    keyed: Vec<String>,
    /// The file of the key
    #[arg(long)]
    key_file: Option<PathBuf>,
    #[arg(long, default_value_t = 2000)]
    rounds: usize,
}

struct Target {
    name: String,
    client: Client,
    model: String,
    key: Option<String>,
    took: Vec<Duration>,
}

/// Rounds before those that count.
const WARM: usize = 200;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let key = arguments.key_file.as_ref().map(std::fs::read_to_string);
    let key = key.transpose().context("the key's file")?;
    let mut targets = Vec::new();
    for given in &arguments.target {
        let (name, rest) = given.split_once('=').context("NAME=HOST:PORT/MODEL")?;
        let (address, model) = rest.split_once('/').context("NAME=HOST:PORT/MODEL")?;
        let keyed = arguments.keyed.iter().any(|keyed| keyed == name);
        targets.push(Target {
            name: name.to_owned(),
            client: client(address.parse()?).await?,
            model: model.to_owned(),
            key: key.clone().filter(|_| keyed),
            took: Vec::new(),
        });
    }
    let mut order: Vec<usize> = (0..targets.len()).collect();
    let mut chance = 0x9e37_79b9_7f4a_7c15_u64;
    for round in 0..WARM + arguments.rounds {
        for index in (1..order.len()).rev() {
            chance ^= chance << 13;
            chance ^= chance >> 7;
            chance ^= chance << 17;
            order.swap(index, chance as usize % (index + 1));
        }
        for index in &order {
            let target = targets.get_mut(*index).context("a target")?;
            let took = call(target, round).await?;
            if round >= WARM {
                target.took.push(took);
            }
        }
    }
    let first = targets.first().context("a target")?.took.clone();
    let report = targets.iter().map(|target| {
        let alone = target.took.iter().map(Duration::as_secs_f64).collect();
        let pairs = target.took.iter().zip(&first);
        let added = pairs.map(|(took, first)| took.as_secs_f64() - first.as_secs_f64());
        let ([_, p50, _], [low, added, high]) = (middle(alone), middle(added.collect()));
        json!({"name": target.name, "p50_us": p50, "added_us": added, "low_us": low, "high_us": high})
    });
    println!("{}", json!(report.collect::<Vec<_>>()));
    Ok(())
}

/// One call with a row that no call before had.
async fn call(target: &mut Target, round: usize) -> Result<Duration> {
    let mut row = [0.0; 64];
    let mut rest = round;
    for pixel in &mut row {
        *pixel = (rest % 17) as f32;
        rest /= 17;
    }
    let mut message = pixels(&[row]);
    message.model_name.clone_from(&target.model);
    let mut request = tonic::Request::new(message);
    if let Some(key) = &target.key {
        request
            .metadata_mut()
            .insert("x-api-key", key.trim().parse()?);
    }
    let started = Instant::now();
    let response = target.client.model_infer(request).await;
    let took = started.elapsed();
    let answer = response.with_context(|| target.name.clone())?.into_inner();
    ensure!(!answer.outputs.is_empty(), "{}: no outputs", target.name);
    Ok(took)
}

/// The median in µs, between the ends of its interval of 95 % confidence, by
/// the binomial distribution of ranks.
fn middle(mut seconds: Vec<f64>) -> [f64; 3] {
    seconds.sort_unstable_by(f64::total_cmp);
    let (count, last) = (seconds.len() as f64, seconds.len().saturating_sub(1));
    let half = 0.98 * count.sqrt();
    [-half, 0.0, half].map(|off| {
        let rank = (count / 2.0 + off).max(0.0) as usize;
        seconds.get(rank.min(last)).copied().unwrap_or_default() * 1e6
    })
}
