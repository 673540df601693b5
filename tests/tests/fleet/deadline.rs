//! Deadlines and callers who leave: both stop the work.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fleet_tests::calls::{client, infer, infer_by_server_deadline, texts};
use fleet_tests::{Fleet, until};
use protocol::inference::ModelInferRequest;
use tonic::Code;

/// A second of work or so that takes no time to tokenize.
fn slow() -> ModelInferRequest {
    let text = "a lantern around a candle stops the line when quality slips ".repeat(20);
    let mut request = texts(&vec![text; 16]);
    request.parameters.insert(
        "truncate".to_owned(),
        protocol::inference::InferParameter {
            parameter_choice: Some(
                protocol::inference::infer_parameter::ParameterChoice::BoolParam(true),
            ),
        },
    );
    request
}

async fn abandoned(fleet: &Fleet) -> Result<f64> {
    let worker = fleet.workers[0].as_ref().context("a worker")?;
    let abandoned =
        "andon_worker_refused_total{model=\"minilm\",version=\"1\",reason=\"abandoned\"}";
    let late = "andon_worker_refused_total{model=\"minilm\",version=\"1\",reason=\"deadline\"}";
    let (abandoned, late) = (worker.metric(abandoned).await?, worker.metric(late).await?);
    Ok(abandoned.unwrap_or(0.0) + late.unwrap_or(0.0))
}

#[tokio::test]
async fn a_deadline_ends_the_call_and_the_compute() -> Result<()> {
    let fleet = Fleet::start(1).await?;
    let client = client(fleet.gateway.grpc).await?;
    for _ in 0..3 {
        let started = Instant::now();
        let timeout = Duration::from_millis(50);
        let code = infer_by_server_deadline(fleet.gateway.grpc, &slow(), timeout).await?;
        let took = started.elapsed();
        ensure!(code == Code::DeadlineExceeded, "{code:?}");
        ensure!(took < Duration::from_millis(500), "{took:?}");
    }
    // The instance is free again at once: a short text succeeds.
    let started = Instant::now();
    infer(&client, texts(&["short"]), Duration::from_secs(5)).await?;
    ensure!(
        started.elapsed() < Duration::from_secs(2),
        "{:?}",
        started.elapsed()
    );
    ensure!(abandoned(&fleet).await? > 0.0, "no row was given up");
    Ok(())
}

#[tokio::test]
async fn a_caller_who_leaves_stops_the_work() -> Result<()> {
    let fleet = Fleet::start(1).await?;
    let client = client(fleet.gateway.grpc).await?;
    let timeout = Duration::from_millis(150);
    let left = tokio::time::timeout(timeout, infer(&client, slow(), Duration::from_secs(30)));
    ensure!(left.await.is_err(), "it succeeded within {timeout:?}");
    until(Duration::from_secs(5), "the rows are given up", || async {
        Ok(abandoned(&fleet).await? > 0.0)
    })
    .await?;
    infer(&client, texts(&["short"]), Duration::from_secs(5)).await?;
    Ok(())
}
