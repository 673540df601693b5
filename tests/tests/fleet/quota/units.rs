//! What counts as one call, where a caller sees one.

use anyhow::{Context, Result, ensure};
use fleet_tests::calls::{client, texts};
use fleet_tests::process::Andon;
use fleet_tests::root;
use protocol::inference::ModelInferRequest;
use serde_json::{Value, json};

use super::{QuotaFleet, SECOND, tenant};

#[tokio::test]
async fn messages_of_a_stream_are_calls_and_the_stream_is_none() -> Result<()> {
    let policy = tenant("a", "in_flight = 1") + "[tenants.a.model_quotas.\"*\"]\nin_flight = 1\n";
    let fleet = QuotaFleet::start(&policy, 1, &[], "0s").await?;
    let (sender, messages) = tokio::sync::mpsc::channel(1);
    let messages = futures::stream::unfold(messages, |mut messages| async move {
        let message = messages.recv().await?;
        Some((message, messages))
    });
    let mut request = tonic::Request::new(messages);
    let key = fleet.keys.get("a").context("a key")?;
    request.metadata_mut().insert("x-api-key", key.parse()?);
    let message = ModelInferRequest {
        model_name: "echo".to_owned(),
        ..texts(&["a text"])
    };
    sender.send(message.clone()).await?;
    let mut client = client(fleet.gateways[0].grpc).await?;
    let mut answers = client.model_stream_infer(request).await?.into_inner();
    for number in 0..5 {
        if number > 0 {
            sender.send(message.clone()).await?;
        }
        let answer = answers.message().await?.context("no answer")?;
        ensure!(answer.error_message.is_empty(), "{number}: {answer:?}");
    }
    Ok(())
}

#[tokio::test]
async fn several_calls_for_one_request_count_once() -> Result<()> {
    let folder = root().join("tests/golden/bert-classification");
    ensure!(
        folder.exists(),
        "{} is missing: run `make test`",
        folder.display()
    );
    let flag = format!("classifier={}", folder.display());
    let worker = Andon::worker(&["--model".to_owned(), flag], None)?;
    worker.ready().await?;
    let policy = tenant("a", "in_flight = 1")
        + "[tenants.a.model_quotas.\"classifier\"]\n\
           in_flight = 1\nrequests_per_second = 0.01\nburst = 1\n";
    let fleet = QuotaFleet::over(worker, &policy, 1, &[]).await?;
    let key = fleet.keys.get("a").context("a key")?;
    let http = reqwest::Client::builder()
        .no_proxy()
        .timeout(30 * SECOND)
        .build()?;
    let address = format!("http://{}/v1/classify", fleet.gateways[0].http);
    let input: Vec<String> = (0..10).map(|number| format!("text {number}")).collect();
    let body = json!({"model": "classifier", "input": input});
    let call = || {
        let request = http.post(&address).header("x-api-key", key);
        request.json(&body).send()
    };
    let response = call().await?;
    let status = response.status();
    let answer: Value = response.json().await?;
    ensure!(status.as_u16() == 200, "{status}: {answer}");
    let count = answer["data"].as_array().map(Vec::len);
    ensure!(count == Some(10), "{answer}");
    // The request itself did count.
    let refused = call().await?;
    ensure!(refused.status().as_u16() == 429, "{}", refused.status());
    Ok(())
}
