//! Calls of different tenants take turns in a worker's queue.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fleet_tests::calls::{Client, client, texts};
use fleet_tests::process::Andon;
use fleet_tests::root;
use protocol::inference::{InferParameter, ModelInferRequest, infer_parameter::ParameterChoice};
use tokio::task::JoinSet;
use tonic::{Request, Status};

use super::{QuotaFleet, SECOND, tenant};

fn with_key(
    message: ModelInferRequest,
    key: &str,
    timeout: Duration,
) -> Result<Request<ModelInferRequest>> {
    let mut request = Request::new(message);
    request.set_timeout(timeout);
    request.metadata_mut().insert("x-api-key", key.parse()?);
    Ok(request)
}

/// Half a batch of work, before that of every other call of its tenant.
fn urgent() -> ModelInferRequest {
    let text = "a lantern around a candle stops the line when quality slips ".repeat(15);
    let mut request = texts(&vec![text; 64]);
    for (name, choice) in [
        ("priority", ParameterChoice::Int64Param(1)),
        ("truncate", ParameterChoice::BoolParam(true)),
    ] {
        let parameter_choice = Some(choice);
        let parameter = InferParameter { parameter_choice };
        request.parameters.insert(name.to_owned(), parameter);
    }
    request
}

/// Sends again and again, whatever the response, until it is dropped.
async fn flood(mut client: Client, key: String) -> Result<()> {
    loop {
        let call = client.model_infer(with_key(urgent(), &key, 60 * SECOND)?);
        // What a flood is told does not matter here.
        drop(call.await);
    }
}

#[tokio::test]
async fn one_tenants_priority_starves_no_other() -> Result<()> {
    let policy = tenant("a", "") + &tenant("b", "");
    // The gateway's own fair queueing lets all of the flood pass.
    let flags = ["--fair-rows", "4096"];
    // A small model: its batches are short, also where the machine is busy.
    let model = root().join("tests/golden/bert-embedding");
    let model = format!("minilm={}", model.display());
    let worker = Andon::worker(&["--model".to_owned(), model], None)?;
    let fleet = QuotaFleet::over(worker, &policy, 1, &flags).await?;
    let key = |tenant| fleet.keys.get(tenant).context("a key").cloned();
    let address = fleet.gateways[0].grpc;
    let (flooder, mut other) = (client(address).await?, client(address).await?);
    let mut floods = JoinSet::new();
    for _ in 0..40 {
        floods.spawn(flood(flooder.clone(), key("a")?));
    }
    // The flood has filled the queue when the first of its calls are computed.
    let worker = &fleet.worker;
    fleet_tests::until(60 * SECOND, "the flood waits", || async {
        let waiting = worker.metric_sum("andon_worker_queue_rows").await?;
        Ok(waiting > 100.0)
    })
    .await?;
    for _ in 0..2 {
        let call = other.model_infer(with_key(texts(&["short"]), &key("b")?, 30 * SECOND)?);
        let response: Result<_, Status> = call.await;
        ensure!(response.is_ok(), "{response:?}");
        ensure!(floods.try_join_next().is_none(), "the flood has ended");
    }
    Ok(())
}
