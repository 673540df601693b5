//! What outside services take, and budgets that refuse when they are spent.

use std::time::Duration;

use anyhow::{Result, ensure};
use fleet_tests::process::scratch;
use fleet_tests::{calls, until};
use tonic::Code;
use tonic_types::StatusExt;
use wiremock::{MockServer, ResponseTemplate};

use super::{Outside, TIMEOUT, embedder, embedding, posts, texts};

const PRICED: &str = "price = { input_per_million = 50000.0, per_request = 0.1 }";

#[tokio::test]
async fn costs_are_counted_by_the_price_table() -> Result<()> {
    let server = embedder().await;
    let outside = Outside::start(&embedding("small", &server, PRICED)).await?;
    // Two texts have four tokens: 4 × 0.05 + 0.1.
    outside.call(texts("small", &["a", "b"])).await?;
    let cost = "andon_gateway_provider_cost_total{tenant=\"anyone\",model=\"small\"}";
    let counted = outside.gateway.metric(cost).await?.unwrap_or_default();
    ensure!((counted - 0.3).abs() < 1e-9, "{counted}");
    let requests = "andon_gateway_provider_requests_total{model=\"small\",outcome=\"ok\"}";
    ensure!(outside.gateway.metric(requests).await? == Some(1.0));
    Ok(())
}

#[tokio::test]
async fn a_budget_that_is_spent_refuses() -> Result<()> {
    let server = embedder().await;
    let policy = scratch("policy.toml")?;
    let text = "anonymous = \"guest\"\n[tenants.guest]\nmodels = [\"*\"]\n\
                [tenants.guest.quota]\ncost_per_day = 0.5\n";
    std::fs::write(&policy, text)?;
    let flag = policy.display().to_string();
    let catalogue = embedding("small", &server, PRICED);
    let mut outside = Outside::with(&catalogue, &["--policy", &flag]).await?;
    outside.files.push(policy);
    // 0.3 each: the second call goes beyond, and the third finds nothing left.
    outside.call(texts("small", &["a", "b"])).await?;
    outside.call(texts("small", &["a", "b"])).await?;
    let status = outside.fails(texts("small", &["a", "b"])).await?;
    ensure!(status.code() == Code::ResourceExhausted, "{status:?}");
    ensure!(
        status.get_error_details().retry_info().is_some(),
        "{status:?}"
    );
    ensure!(server.received_requests().await.unwrap_or_default().len() == 2);
    Ok(())
}

#[tokio::test]
async fn a_caller_who_does_not_wait_is_charged_an_estimate() -> Result<()> {
    let server = MockServer::start().await;
    let slow = ResponseTemplate::new(200).set_delay(Duration::from_secs(300));
    posts("/v1/embeddings")
        .respond_with(slow)
        .mount(&server)
        .await;
    let outside = Outside::start(&embedding("small", &server, PRICED)).await?;
    let request = texts("small", &["abcdefgh"]);
    let code =
        calls::infer_by_server_deadline(outside.gateway.grpc, &request, Duration::from_secs(1))
            .await?;
    ensure!(code == Code::DeadlineExceeded, "{code:?}");
    // Eight bytes are two tokens: 2 × 0.05 + 0.1.
    let cost = "andon_gateway_provider_cost_total{tenant=\"anyone\",model=\"small\"}";
    until(TIMEOUT, "the guess is charged", || async {
        let counted = outside.gateway.metric(cost).await?.unwrap_or_default();
        Ok((counted - 0.2).abs() < 1e-9)
    })
    .await?;
    // What was refused costs nothing.
    server.reset().await;
    posts("/v1/embeddings")
        .respond_with(ResponseTemplate::new(400))
        .mount(&server)
        .await;
    outside.fails(request).await?;
    let counted = outside.gateway.metric(cost).await?.unwrap_or_default();
    ensure!((counted - 0.2).abs() < 1e-9, "{counted}");
    Ok(())
}
