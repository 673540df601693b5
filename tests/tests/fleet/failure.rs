//! Workers that die, freeze, restart and leave: what callers notice of it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fleet_tests::calls::{client, infer, pixels};
use fleet_tests::load::Load;
use fleet_tests::{Fleet, until};
use protocol::inference::ModelInferRequest;
use tonic::Code;

fn digits() -> ModelInferRequest {
    pixels(&[[3.0; 64]; 4])
}

#[tokio::test]
async fn a_killed_worker_fails_no_request() -> Result<()> {
    let mut fleet = Fleet::start(3).await?;
    let load = Load::start(&client(fleet.gateway.grpc).await?, &digits(), 32, 10_000);
    load.reached(3_000).await?;
    let killed = fleet.workers[1].take().context("a worker")?;
    killed.signal(libc::SIGKILL)?;
    let outcome = load.finished().await;
    ensure!(outcome.failed.is_empty(), "{:?}", outcome.failed);
    ensure!(outcome.answered == 10_000, "{} answered", outcome.answered);
    Ok(())
}

#[tokio::test]
async fn a_frozen_worker_fails_no_request() -> Result<()> {
    let fleet = Fleet::start(3).await?;
    let load = Load::start(
        &client(fleet.gateway.grpc).await?,
        &digits(),
        16,
        usize::MAX,
    );
    load.reached(1_000).await?;
    let frozen = fleet.workers[0].as_ref().context("a worker")?;
    frozen.signal(libc::SIGSTOP)?;
    // Silence of three seconds is noticed, and its calls go elsewhere.
    fleet.all_connected(2).await?;
    let before = load.answered.load(std::sync::atomic::Ordering::Relaxed);
    load.reached(before + 1_000).await?;
    frozen.signal(libc::SIGCONT)?;
    fleet.all_connected(3).await?;
    let outcome = load.stopped().await;
    ensure!(outcome.failed.is_empty(), "{:?}", outcome.failed);
    Ok(())
}

#[tokio::test]
async fn a_rolling_restart_fails_no_request() -> Result<()> {
    let mut fleet = Fleet::start(3).await?;
    let load = Load::start(
        &client(fleet.gateway.grpc).await?,
        &digits(),
        16,
        usize::MAX,
    );
    load.reached(500).await?;
    for place in 0..3 {
        let mut old = fleet.workers[place].take().context("a worker")?;
        old.signal(libc::SIGTERM)?;
        let status = old.ended(Duration::from_secs(20)).await?;
        ensure!(status.success(), "it ended with {status}");
        fleet.restart(place, old.grpc)?;
        fleet.all_connected(3).await?;
    }
    let outcome = load.stopped().await;
    ensure!(outcome.failed.is_empty(), "{:?}", outcome.failed);
    ensure!(outcome.answered > 1_000, "{} answered", outcome.answered);
    Ok(())
}

#[tokio::test]
async fn a_replaced_set_of_workers_fails_no_request() -> Result<()> {
    // `localhost` stands for the set: its port is taken over by new processes.
    let mut fleet = Fleet::start(1).await?;
    let address = fleet.workers[0].as_ref().context("a worker")?.grpc;
    let dns = format!("localhost:{}", address.port());
    let flags = [
        "--worker-dns".to_owned(),
        dns,
        "--dns-interval".into(),
        "200ms".into(),
    ];
    let gateway = fleet_tests::process::Andon::start("gateway", &flags, None)?;
    gateway.ready().await?;
    let client = client(gateway.grpc).await?;
    ensure!(
        infer(&client, digits(), Duration::from_secs(5))
            .await
            .is_ok()
    );
    let mut old = fleet.workers[0].take().context("a worker")?;
    old.signal(libc::SIGTERM)?;
    old.ended(Duration::from_secs(20)).await?;
    fleet.restart(0, address)?;
    until(Duration::from_secs(20), "served again", || async {
        Ok(infer(&client, digits(), Duration::from_secs(5))
            .await
            .is_ok())
    })
    .await
}

#[tokio::test]
async fn all_workers_dead_is_said_at_once_and_ends_with_their_return() -> Result<()> {
    let mut fleet = Fleet::start(2).await?;
    let client = client(fleet.gateway.grpc).await?;
    let address = fleet.workers[0].as_ref().context("a worker")?.grpc;
    for place in 0..2 {
        let worker = fleet.workers[place].take().context("a worker")?;
        worker.signal(libc::SIGKILL)?;
    }
    for _ in 0..20 {
        let started = Instant::now();
        let refused = infer(&client, digits(), Duration::from_secs(10)).await;
        let code = refused.err().map(|status| status.code());
        ensure!(code == Some(Code::Unavailable), "{code:?}");
        ensure!(
            started.elapsed() < Duration::from_millis(500),
            "{:?}",
            started.elapsed()
        );
    }
    fleet.restart(0, address)?;
    let worker = fleet.workers[0].as_ref().context("a worker")?;
    worker.ready().await?;
    let returned = Instant::now();
    until(Duration::from_secs(10), "served again", || async {
        Ok(infer(&client, digits(), Duration::from_secs(5))
            .await
            .is_ok())
    })
    .await?;
    ensure!(
        returned.elapsed() < Duration::from_secs(5),
        "{:?}",
        returned.elapsed()
    );
    Ok(())
}

#[tokio::test]
async fn sigterm_under_load_drains_without_an_error() -> Result<()> {
    let mut fleet = Fleet::start(2).await?;
    // The gateway itself: callers that still have a connection finish.
    let client = client(fleet.gateway.grpc).await?;
    let load = Load::start(&client, &digits(), 8, 1_000_000);
    load.reached(500).await?;
    fleet.gateway.signal(libc::SIGTERM)?;
    tokio::time::sleep(Duration::from_millis(200)).await;
    let outcome = load.stopped().await;
    ensure!(outcome.failed.is_empty(), "{:?}", outcome.failed);
    let status = fleet.gateway.ended(Duration::from_secs(20)).await?;
    ensure!(status.success(), "it ended with {status}");
    Ok(())
}
