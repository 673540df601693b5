//! Workers that die, freeze, restart and leave: what callers notice of it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fleet_tests::calls::{client, infer, infer_by_server_deadline, pixels, texts};
use fleet_tests::load::Load;
use fleet_tests::process::{Andon, free_port};
use fleet_tests::{Fleet, until};
use protocol::inference::ModelInferRequest;
use tonic::Code;
use tonic_types::StatusExt;

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
    ensure!(
        outcome.succeeded == 10_000,
        "{} succeeded",
        outcome.succeeded
    );
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
    let before = load.succeeded.load(std::sync::atomic::Ordering::Relaxed);
    load.reached(before + 1_000).await?;
    // Still frozen: its calls must have succeeded on other workers.
    let outcome = load.stopped().await;
    ensure!(outcome.failed.is_empty(), "{:?}", outcome.failed);
    frozen.signal(libc::SIGCONT)?;
    fleet.all_connected(3).await
}

#[tokio::test]
async fn workers_whose_connections_come_to_their_age_fail_no_request() -> Result<()> {
    let fleet = Fleet::with(1, &["--connection-age", "400ms"], &[]).await?;
    let client = client(fleet.gateway.grpc).await?;
    let worker = fleet.workers[0].as_ref().context("a worker")?;
    let accepted = async || worker.metric_sum("andon_connections_accepted_total").await;
    let before = accepted().await?;
    let load = Load::start(&client, &digits(), 8, usize::MAX);
    until(
        Duration::from_secs(60),
        "connections are replaced again and again",
        || async { Ok(accepted().await? >= before + 20.0) },
    )
    .await?;
    load.reached(1_001).await?;
    let outcome = load.stopped().await;
    ensure!(outcome.failed.is_empty(), "{:?}", outcome.failed);
    ensure!(outcome.succeeded > 1_000, "{} succeeded", outcome.succeeded);
    let ejections = fleet
        .gateway
        .metric_sum("andon_gateway_ejections_total")
        .await?;
    ensure!(ejections == 0.0, "a healthy worker was ejected");
    Ok(())
}

/// Waits until a terminating process is not ready, and calls still succeed.
async fn goes_on_while_draining(process: &Andon, load: &Load) -> Result<()> {
    until(Duration::from_secs(5), "draining", || async {
        Ok(!process.get("/readyz").await?.starts_with("ready"))
    })
    .await?;
    let before = load.succeeded.load(std::sync::atomic::Ordering::Relaxed);
    load.reached(before + 20).await
}

#[tokio::test]
async fn all_in_one_drains_without_an_error() -> Result<()> {
    let flags = [
        "--repository".to_owned(),
        fleet_tests::models()?.display().to_string(),
    ];
    let mut serve = Andon::start("serve", &flags, None)?;
    serve.ready().await?;
    let load = Load::start(&client(serve.grpc).await?, &digits(), 8, usize::MAX);
    load.reached(500).await?;
    serve.signal(libc::SIGTERM)?;
    goes_on_while_draining(&serve, &load).await?;
    let outcome = load.stopped().await;
    ensure!(outcome.failed.is_empty(), "{:?}", outcome.failed);
    let status = serve.ended(Duration::from_secs(20)).await?;
    ensure!(status.success(), "it ended with {status}");
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
    for index in 0..3 {
        let mut old = fleet.workers[index].take().context("a worker")?;
        old.signal(libc::SIGTERM)?;
        let status = old.ended(Duration::from_secs(20)).await?;
        ensure!(status.success(), "it ended with {status}");
        fleet.restart(index, old.grpc)?;
        fleet.all_connected(3).await?;
    }
    let outcome = load.stopped().await;
    ensure!(outcome.failed.is_empty(), "{:?}", outcome.failed);
    ensure!(outcome.succeeded > 1_000, "{} succeeded", outcome.succeeded);
    Ok(())
}

#[tokio::test]
async fn a_replaced_upstream_set_fails_no_request() -> Result<()> {
    // Two names, each of which stands for one worker after another.
    let mut fleet = Fleet::start(2).await?;
    let mut flags = vec!["--dns-interval".to_owned(), "200ms".to_owned()];
    for worker in fleet.workers.iter().flatten() {
        let name = format!("localhost:{}", worker.grpc.port());
        flags.extend(["--worker-dns".to_owned(), name]);
    }
    let gateway = Andon::start("gateway", &flags, None)?;
    gateway.ready().await?;
    let ready = "andon_gateway_workers{state=\"ready\"}";
    let both = || async { Ok(gateway.metric(ready).await? == Some(2.0)) };
    until(Duration::from_secs(20), "both workers are found", both).await?;
    let load = Load::start(&client(gateway.grpc).await?, &digits(), 16, usize::MAX);
    load.reached(500).await?;
    for index in 0..2 {
        let mut old = fleet.workers[index].take().context("a worker")?;
        old.signal(libc::SIGTERM)?;
        old.ended(Duration::from_secs(20)).await?;
        fleet.restart(index, old.grpc)?;
        until(Duration::from_secs(20), "the new worker is found", both).await?;
    }
    load.reached(1_000).await?;
    let outcome = load.stopped().await;
    ensure!(outcome.failed.is_empty(), "{:?}", outcome.failed);
    Ok(())
}

#[tokio::test]
async fn a_stuck_worker_is_ejected_and_probed() -> Result<()> {
    // Both are servers of another make; one answers nothing in time.
    let echo = |delay: &str| {
        let program = fleet_tests::program("echo-worker")?;
        let flags = ["--delay".to_owned(), delay.to_owned()];
        Andon::run(&mut std::process::Command::new(program), &flags, None)
    };
    let (well, stuck) = (echo("0s")?, echo("1h")?);
    let worker = |andon: &Andon| ["--worker".to_owned(), andon.grpc.to_string()];
    let flags = [worker(&well), worker(&stuck)].concat();
    let gateway = Andon::start("gateway", &flags, None)?;
    let ready = "andon_gateway_workers{state=\"ready\"}";
    let both = || async { Ok(gateway.metric(ready).await? == Some(2.0)) };
    until(Duration::from_secs(20), "both workers are found", both).await?;
    let request = ModelInferRequest {
        model_name: "echo".to_owned(),
        ..texts(&["a text"])
    };
    let out = "andon_gateway_ejections_total";
    // Long enough for a worker that is well, on a busy machine too.
    let timeout = Duration::from_millis(200);
    let mut calls = 0;
    while gateway.metric_sum(out).await? < 1.0 {
        infer_by_server_deadline(gateway.grpc, &request, timeout).await?;
        calls += 1;
        ensure!(calls < 200, "the stuck worker is not ejected");
    }
    // While it is ejected, every call goes to the other.
    for _ in 0..10 {
        let code = infer_by_server_deadline(gateway.grpc, &request, Duration::from_secs(5)).await?;
        ensure!(code == Code::Ok, "{code:?}");
    }
    // Its time passes, one call probes it, and it is ejected again.
    let before = gateway.metric_sum(out).await?;
    let started = Instant::now();
    while gateway.metric_sum(out).await? <= before {
        infer_by_server_deadline(gateway.grpc, &request, timeout).await?;
        ensure!(
            started.elapsed() < Duration::from_secs(20),
            "it is not probed"
        );
    }
    Ok(())
}

#[tokio::test]
async fn calls_without_workers_fail_at_once_until_workers_return() -> Result<()> {
    let mut fleet = Fleet::start(2).await?;
    let client = client(fleet.gateway.grpc).await?;
    let address = fleet.workers[0].as_ref().context("a worker")?.grpc;
    for index in 0..2 {
        let worker = fleet.workers[index].take().context("a worker")?;
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
    // Calls that are still in flight when the gateway closes.
    let mut slow = tokio::task::JoinSet::new();
    for _ in 0..4 {
        let client = client.clone();
        let text = "words that take a while to compute ".repeat(12);
        let request = texts(&vec![text; 16]);
        slow.spawn(async move { infer(&client, request, Duration::from_secs(30)).await });
    }
    let in_flight =
        || async { Ok(fleet.gateway.metric("andon_gateway_in_flight").await? >= Some(4.0)) };
    until(
        Duration::from_secs(5),
        "the slow calls are in flight",
        in_flight,
    )
    .await?;
    fleet.gateway.signal(libc::SIGTERM)?;
    goes_on_while_draining(&fleet.gateway, &load).await?;
    let outcome = load.stopped().await;
    ensure!(outcome.failed.is_empty(), "{:?}", outcome.failed);
    while let Some(succeeded) = slow.join_next().await {
        succeeded??;
    }
    let status = fleet.gateway.ended(Duration::from_secs(20)).await?;
    ensure!(status.success(), "it ended with {status}");
    Ok(())
}

#[tokio::test]
async fn what_discovery_cannot_find_is_said_when_it_begins_and_ends() -> Result<()> {
    let address = free_port()?;
    let flags = ["--worker", &address.to_string()].map(ToString::to_string);
    let name = [
        "--worker-dns",
        "no-workers.invalid:1",
        "--dns-interval",
        "100ms",
    ];
    let flags = [&flags[..], &name.map(ToString::to_string)[..]].concat();
    let gateway = Andon::start("gateway", &flags, None)?;
    let failed = async |reason: &str| {
        let name = format!("andon_discovery_errors_total{{reason=\"{reason}\"}}");
        gateway.metric(&name).await
    };
    let begins = "the worker cannot be reached";
    until(Duration::from_secs(60), "errors are counted", || async {
        Ok(failed("connect").await? >= Some(3.0) && failed("resolve").await? >= Some(1.0))
    })
    .await?;
    let logged = gateway.logged();
    ensure!(logged.matches(begins).count() == 1, "{logged}");
    ensure!(logged.contains("does not resolve"), "{logged}");
    ensure!(!logged.contains("reached again"), "{logged}");
    let worker = Andon::worker(&[], Some(address))?;
    worker.ready().await?;
    gateway.ready().await?;
    let logged = gateway.logged();
    ensure!(logged.contains("reached again"), "{logged}");
    ensure!(logged.matches(begins).count() == 1, "{logged}");
    Ok(())
}

#[tokio::test]
async fn a_model_without_workers_is_unavailable_and_counts_for_itself() -> Result<()> {
    let mut fleet = Fleet::start(1).await?;
    let client = client(fleet.gateway.grpc).await?;
    let refusals =
        "andon_gateway_requests_total{model=\"digits\",method=\"ModelInfer\",code=\"UNAVAILABLE\"}";
    let begun = fleet.gateway.metric(refusals).await?;
    ensure!(begun == Some(0.0), "it does not begin at zero: {begun:?}");
    fleet.workers[0] = None;
    fleet.all_connected(0).await?;
    let refused = infer(&client, digits(), Duration::from_secs(5)).await.err();
    let refused = refused.context("it was served")?;
    ensure!(refused.code() == Code::Unavailable, "{refused:?}");
    let retry = refused.get_error_details();
    ensure!(retry.retry_info().is_some(), "{refused:?}");
    let counted = fleet.gateway.metric(refusals).await?;
    ensure!(counted == Some(1.0), "{counted:?}");
    Ok(())
}
