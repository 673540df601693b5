//! Whose fault it is: requests on which workers break, deadlines that are short,
//! and a gateway that was stopped are held against no worker that is well.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fleet_tests::calls::{self, client, infer_by_server_deadline, pixels, texts};
use fleet_tests::load::Load;
use fleet_tests::process::{Andon, scratch};
use fleet_tests::tenants::Tenants;
use fleet_tests::{Fleet, program, until};
use protocol::inference::ModelInferRequest;
use tokio::task::JoinSet;
use tonic::{Code, Request};

const EJECTIONS: &str = "andon_gateway_ejections_total";
const READY: &str = "andon_gateway_workers{state=\"ready\"}";

/// Three workers that may die of a request, and a gateway with two tenants, of
/// whom one has a key.
struct Fragile {
    gateway: Andon,
    workers: Vec<Andon>,
    key: String,
    _tenants: Tenants,
}

impl Fragile {
    /// Starts workers that each have these flags.
    async fn start(flags: [&[&str]; 3]) -> Result<Self> {
        let policy = "anonymous = \"honest\"\n[tenants.honest]\nmodels = [\"*\"]\n\
                      [tenants.other]\nmodels = [\"*\"]\n";
        let tenants = Tenants::of(policy)?;
        let key = tenants.key("other")?;
        let mut gateway = Vec::from(tenants.flags());
        let mut workers = Vec::new();
        for flags in flags {
            let flags: Vec<String> = flags.iter().map(|flag| (*flag).to_owned()).collect();
            let worker = Andon::run(&mut Command::new(program("echo-worker")?), &flags, None)?;
            gateway.extend(["--worker".to_owned(), worker.grpc.to_string()]);
            workers.push(worker);
        }
        let gateway = Andon::start("gateway", &gateway, None)?;
        gateway.ready().await?;
        let all = || async { Ok(gateway.metric(READY).await? == Some(3.0)) };
        until(Duration::from_secs(20), "all workers are found", all).await?;
        Ok(Self {
            gateway,
            workers,
            key,
            _tenants: tenants,
        })
    }

    /// The status of a request of the tenant with the key.
    async fn other(&self, text: &str) -> Result<Code> {
        let mut request = Request::new(echo(text));
        request.set_timeout(Duration::from_secs(20));
        let key = self.key.parse()?;
        request.metadata_mut().insert("x-api-key", key);
        let sent = client(self.gateway.grpc).await?.model_infer(request).await;
        Ok(sent.err().map_or(Code::Ok, |status| status.code()))
    }

    /// Waits until so many workers have ended, and no more.
    async fn died(&mut self, expected: usize) -> Result<()> {
        let started = Instant::now();
        loop {
            let mut count = 0;
            for worker in &mut self.workers {
                count += usize::from(worker.has_ended()?);
            }
            if count == expected {
                return Ok(());
            }
            let waited = started.elapsed();
            ensure!(waited < Duration::from_secs(5), "{count} workers died");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

fn echo(text: &str) -> ModelInferRequest {
    ModelInferRequest {
        model_name: "echo".to_owned(),
        ..texts(&[text])
    }
}

#[tokio::test]
async fn a_poisonous_request_breaks_two_workers_and_is_refused_then() -> Result<()> {
    let mut fleet = Fragile::start([&["--dies-of", "poison"]; 3]).await?;
    let honest = client(fleet.gateway.grpc).await?;
    let load = Load::start(&honest, &echo("a text"), 8, usize::MAX);
    load.reached(200).await?;
    let code = fleet.other("poison").await?;
    ensure!(code == Code::Internal, "{code:?}");
    fleet.died(2).await?;
    // The same bytes are refused for a minute, and others of the tenant are not.
    for _ in 0..3 {
        ensure!(fleet.other("poison").await? == Code::Internal);
    }
    ensure!(fleet.other("a text").await? == Code::Ok);
    let before = load.succeeded.load(std::sync::atomic::Ordering::Relaxed);
    load.reached(before + 200).await?;
    fleet.died(2).await?;
    let refused = "andon_gateway_poisonous_calls_total";
    ensure!(fleet.gateway.metric(refused).await? == Some(4.0));
    // Who was in flight at the workers that died lost nothing.
    let outcome = load.stopped().await;
    ensure!(outcome.failed.is_empty(), "{:?}", outcome.failed);
    Ok(())
}

#[tokio::test]
async fn one_tenants_failures_eject_no_worker_while_others_call() -> Result<()> {
    let flags: &[&str] = &["--fails-on", "poison", "--delay", "5ms"];
    let fleet = Fragile::start([flags; 3]).await?;
    let honest = client(fleet.gateway.grpc).await?;
    let load = Load::start(&honest, &echo("a text"), 1, usize::MAX);
    load.reached(20).await?;
    for _ in 0..20 {
        let failing = (0..10).map(|_| fleet.other("poison"));
        for code in futures::future::join_all(failing).await {
            ensure!(code? == Code::Internal);
        }
    }
    let outcome = load.stopped().await;
    ensure!(outcome.failed.is_empty(), "{:?}", outcome.failed);
    let ejected = fleet.gateway.metric_sum(EJECTIONS).await?;
    ensure!(ejected == 0.0, "{ejected} ejections");
    Ok(())
}

#[tokio::test]
async fn a_call_that_is_late_at_one_worker_is_tried_at_another() -> Result<()> {
    let fleet = Fragile::start([&["--is-late"], &[], &[]]).await?;
    let honest = client(fleet.gateway.grpc).await?;
    let retried = || async {
        // It fails while the other workers have not said what they serve.
        let _ = calls::infer(&honest, echo("a text"), Duration::from_secs(10)).await;
        let retried = "andon_gateway_retries_total{reason=\"late\"}";
        Ok(fleet.gateway.metric(retried).await? > Some(0.0))
    };
    until(Duration::from_secs(10), "a late call is retried", retried).await?;
    for _ in 0..50 {
        calls::infer(&honest, echo("a text"), Duration::from_secs(10)).await?;
    }
    // No worker is to blame for it, and no retry was paid.
    let ejected = fleet.gateway.metric_sum(EJECTIONS).await?;
    ensure!(ejected == 0.0, "{ejected} ejections");
    Ok(())
}

#[tokio::test]
async fn a_call_that_is_late_everywhere_is_refused_at_once() -> Result<()> {
    let fleet = Fragile::start([&["--is-late"]; 3]).await?;
    let timeout = Duration::from_secs(20);
    let started = Instant::now();
    for _ in 0..100 {
        let request = echo("a text");
        let code = infer_by_server_deadline(fleet.gateway.grpc, &request, timeout).await?;
        ensure!(code == Code::DeadlineExceeded, "{code:?}");
    }
    ensure!(started.elapsed() < timeout, "it waited for the deadline");
    // Two attempts a call, and nothing of the retry budget.
    let retried = "andon_gateway_retries_total{reason=\"late\"}";
    ensure!(fleet.gateway.metric(retried).await? == Some(100.0));
    let spent = "andon_gateway_retry_budget_exhausted_total";
    ensure!(fleet.gateway.metric(spent).await? == Some(0.0));
    Ok(())
}

#[tokio::test]
async fn short_deadlines_eject_no_worker() -> Result<()> {
    let fleet = Fleet::start(2).await?;
    let gateway = fleet.gateway.grpc;
    let ended = Instant::now() + Duration::from_secs(4);
    let mut callers = JoinSet::new();
    for _ in 0..4 {
        callers.spawn(async move {
            let mut late = 0;
            while Instant::now() < ended {
                let timeout = Duration::from_millis(1);
                let request = texts(&["a lantern around a candle"; 8]);
                let code = infer_by_server_deadline(gateway, &request, timeout).await?;
                late += usize::from(code == Code::DeadlineExceeded);
            }
            Ok::<_, anyhow::Error>(late)
        });
    }
    let mut late = 0;
    while let Some(count) = callers.join_next().await {
        late += count??;
    }
    ensure!(late > 50, "only {late} deadlines passed");
    let ejected = fleet.gateway.metric_sum(EJECTIONS).await?;
    ensure!(ejected == 0.0, "{ejected} ejections after {late} deadlines");
    // Nothing is missing of what others' retries need.
    let spent = "andon_gateway_retry_budget_exhausted_total";
    ensure!(fleet.gateway.metric(spent).await? == Some(0.0));
    Ok(())
}

#[tokio::test]
async fn a_gateway_that_was_stopped_loses_no_worker() -> Result<()> {
    let fleet = Fleet::start(3).await?;
    let client = client(fleet.gateway.grpc).await?;
    fleet.gateway.signal(libc::SIGSTOP)?;
    tokio::time::sleep(Duration::from_secs(5)).await;
    fleet.gateway.signal(libc::SIGCONT)?;
    // As long as a silence lasts that is noticed.
    let ended = Instant::now() + Duration::from_secs(4);
    while Instant::now() < ended {
        calls::infer(&client, pixels(&[[3.0; 64]]), Duration::from_secs(10)).await?;
        let ready = fleet.gateway.metric(READY).await?;
        ensure!(ready == Some(3.0), "{ready:?} workers are ready");
    }
    let log = fleet.gateway.logged();
    let lost = log.lines().find(|line| line.contains("lost"));
    ensure!(lost.is_none(), "{lost:?}");
    Ok(())
}

#[tokio::test]
async fn a_local_call_whose_caller_leaves_pays_its_tokens() -> Result<()> {
    let policy = scratch("policy.toml")?;
    let text = "anonymous = \"guest\"\n[tenants.guest]\nmodels = [\"*\"]\n\
                quota = { tokens_per_day = 1000 }\n";
    std::fs::write(&policy, text)?;
    let flags = ["--policy", &policy.display().to_string()];
    let fleet = Fleet::with(1, &[], &flags).await?;
    let request = texts(&vec!["a lantern around a candle ".repeat(20); 64]);
    let gateway = fleet.gateway.grpc;
    let code = infer_by_server_deadline(gateway, &request, Duration::from_millis(100)).await?;
    ensure!(code == Code::DeadlineExceeded, "{code:?}");
    let spent = || async {
        let request = texts(&["short"]);
        let code = infer_by_server_deadline(gateway, &request, Duration::from_secs(10)).await?;
        Ok(code == Code::ResourceExhausted)
    };
    until(Duration::from_secs(5), "the tokens are charged", spent).await?;
    std::fs::remove_file(&policy).context("the policy is gone")
}
