//! Models that answer for one another.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fleet_tests::Fleet;
use fleet_tests::calls::{self, rows};
use fleet_tests::process::{free_port, scratch};
use tonic::Code;
use wiremock::{MockServer, ResponseTemplate};

use super::{EMBEDDING, Outside, embedder, embedding, entry, posts, texts, vector};

fn chain(models: &[&str]) -> String {
    format!("[chains.any]\nmodels = {models:?}\n")
}

#[tokio::test]
async fn a_model_without_workers_falls_back_to_a_provider() -> Result<()> {
    let server = embedder().await;
    let catalogue = embedding("small", &server, "") + &chain(&["minilm", "small"]);
    // A worker that is not there.
    let nowhere = free_port()?.to_string();
    let outside = Outside::with(&catalogue, &["--worker", &nowhere]).await?;
    let (answer, metadata) = outside.call(texts("any", &["one"])).await?;
    ensure!(answer.model_name == "small" && rows(&answer, 0) == [vector("one")]);
    let fallback = metadata.get("x-andon-fallback").context("no reason")?;
    ensure!(fallback.to_str()? == "small; UNAVAILABLE", "{fallback:?}");
    let counted = "andon_gateway_fallbacks_total{chain=\"any\",reason=\"UNAVAILABLE\"}";
    ensure!(outside.gateway.metric(counted).await? == Some(1.0));
    // A request that is wrong is wrong for all of them.
    let mut wrong = texts("any", &["one"]);
    wrong.inputs[0].shape = vec![2];
    wrong.inputs[0].name = "words".to_owned();
    let status = outside.fails(wrong).await?;
    ensure!(status.code() == Code::InvalidArgument, "{status:?}");
    Ok(())
}

#[tokio::test]
async fn an_unreachable_provider_falls_back_to_a_worker() -> Result<()> {
    let url = format!("http://{}/v1", free_port()?);
    let more = format!("{EMBEDDING}\nretries_max = 0");
    let file = scratch("providers.toml")?;
    let catalogue = entry("small", &url, &more) + &chain(&["small", "minilm"]);
    std::fs::write(&file, catalogue)?;
    let flag = file.display().to_string();
    let fleet = Fleet::with(1, &[], &["--providers", &flag]).await?;
    let client = calls::client(fleet.gateway.grpc).await?;
    let timeout = Duration::from_secs(10);
    let direct = calls::infer(&client, texts("minilm", &["one"]), timeout).await?;
    let response = client.clone().model_infer(texts("any", &["one"])).await?;
    let fallback = response.metadata().get("x-andon-fallback");
    ensure!(fallback.context("no reason")?.to_str()? == "minilm; UNAVAILABLE");
    let answer = response.into_inner();
    ensure!(answer.model_name == "minilm");
    ensure!(answer.raw_output_contents == direct.raw_output_contents);
    // The first model's response has no fallback header.
    let own = client
        .clone()
        .model_infer(texts("minilm", &["one"]))
        .await?;
    ensure!(own.metadata().get("x-andon-fallback").is_none());
    std::fs::remove_file(&file)?;
    Ok(())
}

#[tokio::test]
async fn a_model_that_hangs_leaves_time_for_the_next() -> Result<()> {
    let hangs = MockServer::start().await;
    let slow = ResponseTemplate::new(200).set_delay(Duration::from_secs(300));
    posts("/v1/embeddings")
        .respond_with(slow)
        .mount(&hangs)
        .await;
    let works = embedder().await;
    let catalogue = embedding("hangs", &hangs, "timeout = \"60s\"")
        + &embedding("works", &works, "")
        + &chain(&["hangs", "works"]);
    let outside = Outside::start(&catalogue).await?;
    let mut request = tonic::Request::new(texts("any", &["one"]));
    request.set_timeout(Duration::from_secs(6));
    let response = outside.client.clone().model_infer(request).await?;
    let fallback = response.metadata().get("x-andon-fallback");
    ensure!(fallback.context("no reason")?.to_str()? == "works; DEADLINE_EXCEEDED");
    Ok(())
}

#[tokio::test]
async fn a_chain_that_fails_returns_the_error_of_its_last_model() -> Result<()> {
    let url = format!("http://{}/v1", free_port()?);
    let more = format!("{EMBEDDING}\nretries_max = 0");
    let catalogue =
        entry("first", &url, &more) + &entry("last", &url, &more) + &chain(&["first", "last"]);
    let outside = Outside::start(&catalogue).await?;
    let status = outside.fails(texts("any", &["one"])).await?;
    ensure!(status.code() == Code::Unavailable && status.message().contains("'last'"));
    let mut version = texts("any", &["one"]);
    version.model_version = "2".to_owned();
    ensure!(outside.fails(version).await?.code() == Code::NotFound);
    Ok(())
}
