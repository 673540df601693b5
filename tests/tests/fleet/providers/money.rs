//! What outside services take, and budgets that refuse when they are spent.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fleet_tests::process::scratch;
use fleet_tests::{calls, until};
use futures::{StreamExt, stream};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tonic::Code;
use tonic_types::StatusExt;
use wiremock::{MockServer, ResponseTemplate};

use super::generation::{COST, OPENAI, prompt};
use super::{Outside, TIMEOUT, embedder, embedding, entry, posts, texts};

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

#[tokio::test]
async fn a_stream_left_before_its_end_pays_for_the_text_that_came() -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}/v1", listener.local_addr()?);
    // One event of two thousand tokens, and no end.
    let event = json!({"choices": [{"delta": {"content": "word".repeat(2000)}}]});
    let response = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\ndata: {event}\n\n"
    );
    let mut service = JoinSet::new();
    service.spawn(async move {
        let (mut stream, _) = listener.accept().await?;
        let mut request = [0; 4096];
        let _ = stream.read(&mut request).await?;
        stream.write_all(response.as_bytes()).await?;
        std::future::pending::<std::io::Result<()>>().await
    });
    let outside = Outside::start(&entry("big", &url, OPENAI)).await?;
    let requests = stream::iter([prompt("big", "1", "hello")]);
    let responses = outside.client.clone().model_stream_infer(requests).await?;
    let mut responses = responses.into_inner();
    let first = responses.next().await.context("no part")??;
    ensure!(first.error_message.is_empty(), "{}", first.error_message);
    drop(responses);
    // Twelve bytes of messages are three tokens; a written one costs two.
    until(TIMEOUT, "the text is charged", || async {
        let counted = outside.gateway.metric(COST).await?.unwrap_or_default();
        Ok((counted - 4003.0).abs() < 1e-6)
    })
    .await
}

#[tokio::test]
async fn a_refusal_in_a_body_of_200_pays_what_was_used() -> Result<()> {
    let server = MockServer::start().await;
    let body = json!({
        "error": {"message": "no"}, "usage": {"prompt_tokens": 3, "completion_tokens": 1},
    });
    posts("/v1/chat/completions")
        .respond_with(ResponseTemplate::new(200).set_body_json(body))
        .mount(&server)
        .await;
    let url = format!("{}/v1", server.uri());
    let outside = Outside::start(&entry("big", &url, OPENAI)).await?;
    outside.fails(prompt("big", "1", "hello")).await?;
    let counted = outside.gateway.metric(COST).await?;
    // Not seven written tokens, which the request allows.
    ensure!(counted == Some(5.0), "{counted:?}");
    Ok(())
}
