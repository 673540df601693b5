//! Faults of processes, and of load: how many requests failed and how long each
//! fault was felt.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use fleet_tests::calls::{client, infer, infer_by_server_deadline, pixels, texts};
use fleet_tests::load::{Load, Outcome};
use fleet_tests::{Fleet, until};
use protocol::inference::ModelInferRequest;

/// Repeats of each fault; the median is reported.
const ROUNDS: usize = 3;

fn digits() -> ModelInferRequest {
    pixels(&[[3.0; 64]; 4])
}

/// Injects every fault.
pub async fn report() -> Result<()> {
    println!("| fault | succeeded | failed | measurement | min | median | max |");
    println!("|---|---|---|---|---|---|---|");
    kill().await?;
    freeze().await?;
    restart().await?;
    all_dead().await?;
    deadline().await?;
    drain().await?;
    flood().await
}

fn row(fault: &str, outcome: &Outcome, what: &str, times: &mut [Duration]) {
    times.sort();
    let failed: usize = outcome.failed.values().sum();
    let at = |index: usize| times.get(index).copied().unwrap_or_default();
    let last = times.len().saturating_sub(1);
    let (least, median, most) = (at(0), at(times.len() / 2), at(last));
    println!(
        "| {fault} | {} | {failed} | {what} | {least:.1?} | {median:.1?} | {most:.1?} |",
        outcome.succeeded
    );
    for (error, count) in &outcome.failed {
        println!("  {count} x {error}");
    }
}

fn add(sum: &mut Outcome, outcome: Outcome) {
    sum.succeeded += outcome.succeeded;
    for (error, count) in outcome.failed {
        *sum.failed.entry(error).or_default() += count;
    }
}

async fn kill() -> Result<()> {
    let (mut sum, mut times) = (Outcome::default(), Vec::new());
    for _ in 0..ROUNDS {
        let mut fleet = Fleet::start(3).await?;
        let load = Load::start(&client(fleet.gateway.grpc).await?, &digits(), 32, 100_000);
        load.reached(20_000).await?;
        let killed = fleet.workers[1].take().context("a worker")?;
        killed.signal(libc::SIGKILL)?;
        let started = Instant::now();
        fleet.all_connected(2).await?;
        times.push(started.elapsed());
        add(&mut sum, load.finished().await);
    }
    row(
        "kill -9 of one of three workers",
        &sum,
        "until the gateway has two ready workers",
        &mut times,
    );
    Ok(())
}

async fn freeze() -> Result<()> {
    let (mut sum, mut times) = (Outcome::default(), Vec::new());
    for _ in 0..ROUNDS {
        let fleet = Fleet::start(3).await?;
        let client = client(fleet.gateway.grpc).await?;
        let load = Load::start(&client, &digits(), 32, usize::MAX);
        load.reached(5_000).await?;
        let frozen = fleet.workers[0].as_ref().context("a worker")?;
        frozen.signal(libc::SIGSTOP)?;
        let started = Instant::now();
        fleet.all_connected(2).await?;
        times.push(started.elapsed());
        frozen.signal(libc::SIGCONT)?;
        fleet.all_connected(3).await?;
        add(&mut sum, load.stopped().await);
    }
    row(
        "one of three workers frozen",
        &sum,
        "until it is ejected",
        &mut times,
    );
    Ok(())
}

async fn restart() -> Result<()> {
    let (mut sum, mut times) = (Outcome::default(), Vec::new());
    for _ in 0..ROUNDS {
        let mut fleet = Fleet::start(3).await?;
        let client = client(fleet.gateway.grpc).await?;
        let load = Load::start(&client, &digits(), 32, usize::MAX);
        load.reached(5_000).await?;
        for index in 0..3 {
            let mut old = fleet.workers[index].take().context("a worker")?;
            let started = Instant::now();
            old.signal(libc::SIGTERM)?;
            old.ended(Duration::from_secs(30)).await?;
            times.push(started.elapsed());
            fleet.restart(index, old.grpc)?;
            fleet.all_connected(3).await?;
        }
        add(&mut sum, load.stopped().await);
    }
    row(
        "rolling restart of three workers",
        &sum,
        "SIGTERM to exit",
        &mut times,
    );
    Ok(())
}

async fn all_dead() -> Result<()> {
    let (mut refusals, mut returns) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let mut fleet = Fleet::start(1).await?;
        let client = client(fleet.gateway.grpc).await?;
        let worker = fleet.workers[0].take().context("a worker")?;
        worker.signal(libc::SIGKILL)?;
        for _ in 0..20 {
            let started = Instant::now();
            let refused = infer(&client, digits(), Duration::from_secs(5)).await;
            anyhow::ensure!(refused.is_err(), "a dead worker responded");
            refusals.push(started.elapsed());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        fleet.restart(0, worker.grpc)?;
        fleet.workers[0]
            .as_ref()
            .context("a worker")?
            .ready()
            .await?;
        let started = Instant::now();
        until(Duration::from_secs(20), "served again", || async {
            Ok(infer(&client, digits(), Duration::from_secs(5))
                .await
                .is_ok())
        })
        .await?;
        returns.push(started.elapsed());
    }
    let none = Outcome::default();
    row(
        "all workers dead",
        &none,
        "until UNAVAILABLE",
        &mut refusals,
    );
    row(
        "all workers dead",
        &none,
        "from a worker's readiness to the first response",
        &mut returns,
    );
    Ok(())
}

async fn deadline() -> Result<()> {
    let fleet = Fleet::start(1).await?;
    let client = client(fleet.gateway.grpc).await?;
    let text = "a lantern around a candle stops the line when quality slips ".repeat(8);
    let slow = texts(&vec![text; 128]);
    let (mut times, mut frees) = (Vec::new(), Vec::new());
    for _ in 0..10 {
        let started = Instant::now();
        let timeout = Duration::from_millis(50);
        let code = infer_by_server_deadline(fleet.gateway.grpc, &slow, timeout).await?;
        anyhow::ensure!(code == tonic::Code::DeadlineExceeded, "{code:?}");
        times.push(started.elapsed());
        let started = Instant::now();
        infer(&client, texts(&["short"]), Duration::from_secs(10)).await?;
        frees.push(started.elapsed());
    }
    let none = Outcome::default();
    row(
        "50 ms deadline against seconds of work",
        &none,
        "until the caller gets DEADLINE_EXCEEDED",
        &mut times,
    );
    row(
        "50 ms deadline against seconds of work",
        &none,
        "the next caller's response",
        &mut frees,
    );
    Ok(())
}

async fn drain() -> Result<()> {
    let (mut sum, mut times) = (Outcome::default(), Vec::new());
    for _ in 0..ROUNDS {
        let mut fleet = Fleet::start(2).await?;
        let client = client(fleet.gateway.grpc).await?;
        let load = Load::start(&client, &digits(), 32, usize::MAX);
        load.reached(5_000).await?;
        let started = Instant::now();
        fleet.gateway.signal(libc::SIGTERM)?;
        tokio::time::sleep(Duration::from_millis(200)).await;
        add(&mut sum, load.stopped().await);
        fleet.gateway.ended(Duration::from_secs(30)).await?;
        times.push(started.elapsed());
    }
    row(
        "SIGTERM of the gateway under load",
        &sum,
        "SIGTERM to exit",
        &mut times,
    );
    Ok(())
}

/// Three times the load that one worker can do: what is refused is refused at
/// once, and responses come as fast as before.
async fn flood() -> Result<()> {
    let fleet = Fleet::start(1).await?;
    let client = client(fleet.gateway.grpc).await?;
    let request = texts(&vec!["words that take a while to compute ".repeat(4); 64]);
    let mut rates = Vec::new();
    for in_flight in [4, 12, 400] {
        let load = Load::start(&client, &request, in_flight, usize::MAX);
        tokio::time::sleep(Duration::from_secs(15)).await;
        let succeeded = load.succeeded.load(std::sync::atomic::Ordering::Relaxed);
        let outcome = load.stopped().await;
        rates.push(succeeded as f64 / 15.0);
        let what = format!(
            "{in_flight} in flight: {:.1} requests/s",
            succeeded as f64 / 15.0
        );
        row("flood", &outcome, &what, &mut []);
    }
    println!(
        "goodput of the flood against the lightest load: {:.2}",
        rates[2] / rates[0]
    );
    Ok(())
}
