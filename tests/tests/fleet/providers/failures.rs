//! What outside services do wrong, and what comes of it.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fleet_tests::process::{free_port, scratch};
use fleet_tests::tenants::Tenants;
use fleet_tests::{calls, program, until};
use protocol::inference::ModelReadyRequest;
use serde_json::json;
use tonic::Code;
use tonic_types::StatusExt;
use wiremock::matchers::header;
use wiremock::{MockServer, ResponseTemplate};

use super::texts;
use super::{EMBEDDING, Outside, SECRET, TIMEOUT, embed, embedding, entry, key, posts, quoted};

/// A service that answers so, with its key in the words where it says any.
async fn answering(response: ResponseTemplate) -> MockServer {
    let server = MockServer::start().await;
    posts("/v1/embeddings")
        .respond_with(response)
        .mount(&server)
        .await;
    server
}

/// A gateway with a key, and a model at a service.
async fn keyed(server: &MockServer, more: &str) -> Result<Outside> {
    let key = key()?;
    let more = format!("key_file = {}\n{more}", quoted(&key));
    let mut outside = Outside::start(&embedding("small", server, &more)).await?;
    outside.files.push(key);
    Ok(outside)
}

#[tokio::test]
async fn a_service_that_is_full_is_called_again_when_it_says() -> Result<()> {
    let server = MockServer::start().await;
    let full = ResponseTemplate::new(429).insert_header("retry-after", "1");
    posts("/v1/embeddings")
        .respond_with(full)
        .up_to_n_times(1)
        .with_priority(1)
        .mount(&server)
        .await;
    posts("/v1/embeddings")
        .respond_with(embed)
        .mount(&server)
        .await;
    let outside = keyed(&server, "").await?;
    let started = Instant::now();
    outside.call(texts("small", &["a"])).await?;
    ensure!(
        started.elapsed() >= Duration::from_secs(1),
        "it did not wait"
    );
    let retries = "andon_gateway_provider_retries_total{model=\"small\",reason=\"limited\"}";
    ensure!(outside.gateway.metric(retries).await? == Some(1.0));
    Ok(())
}

#[tokio::test]
async fn a_service_that_is_full_for_longer_than_the_caller_waits_is_not_called_again() -> Result<()>
{
    let full = ResponseTemplate::new(429).insert_header("retry-after", "3600");
    let server = answering(full).await;
    let outside = keyed(&server, "").await?;
    let status = outside.fails(texts("small", &["a"])).await?;
    ensure!(status.code() == Code::Unavailable, "{status:?}");
    let details = status.get_error_details();
    let retry = details.retry_info().and_then(|info| info.retry_delay);
    ensure!(retry == Some(Duration::from_secs(3600)), "{status:?}");
    ensure!(server.received_requests().await.unwrap_or_default().len() == 1);
    Ok(())
}

#[tokio::test]
async fn a_service_that_fails_once_costs_the_caller_nothing() -> Result<()> {
    let server = MockServer::start().await;
    posts("/v1/embeddings")
        .respond_with(ResponseTemplate::new(500))
        .up_to_n_times(1)
        .with_priority(1)
        .mount(&server)
        .await;
    posts("/v1/embeddings")
        .respond_with(embed)
        .mount(&server)
        .await;
    let outside = keyed(&server, "").await?;
    outside.call(texts("small", &["a"])).await?;
    Ok(())
}

#[tokio::test]
async fn a_failing_service_opens_its_circuit_breaker_and_comes_back() -> Result<()> {
    let server = answering(ResponseTemplate::new(500).set_body_string(SECRET)).await;
    let outside = keyed(&server, "").await?;
    let open = "andon_gateway_provider_breaker_open{model=\"small\"}";
    ensure!(outside.gateway.metric(open).await? == Some(0.0));
    let ready = || async {
        let message = ModelReadyRequest {
            name: "small".to_owned(),
            ..Default::default()
        };
        let response = outside.client.clone().model_ready(message).await?;
        anyhow::Ok(response.into_inner().ready)
    };
    ensure!(ready().await?, "not ready at first");
    until(TIMEOUT, "the circuit breaker opens", || async {
        let status = outside.fails(texts("small", &["a"])).await?;
        ensure!(status.code() == Code::Unavailable, "{status:?}");
        ensure!(status.message().contains("'small'"), "{status:?}");
        Ok(outside.gateway.metric(open).await? == Some(1.0))
    })
    .await?;
    ensure!(outside.gateway.get("/readyz").await?.starts_with("ready"));
    server.reset().await;
    posts("/v1/embeddings")
        .respond_with(embed)
        .mount(&server)
        .await;
    until(TIMEOUT, "the service is probed", || async {
        Ok(outside.call(texts("small", &["a"])).await.is_ok())
    })
    .await?;
    ensure!(outside.gateway.metric(open).await? == Some(0.0));
    ensure!(ready().await?, "not ready again");
    Ok(())
}

#[tokio::test]
async fn a_service_that_hangs_takes_no_more_than_its_time() -> Result<()> {
    let slow = ResponseTemplate::new(200).set_delay(Duration::from_secs(300));
    let server = answering(slow).await;
    // By the caller's deadline, and by the model's own.
    let outside = keyed(&server, "timeout = \"60s\"").await?;
    let request = texts("small", &["a"]);
    let code =
        calls::infer_by_server_deadline(outside.gateway.grpc, &request, Duration::from_secs(2))
            .await?;
    ensure!(code == Code::DeadlineExceeded, "{code:?}");
    let outside = keyed(&server, "timeout = \"1s\"").await?;
    let status = outside.fails(texts("small", &["a"])).await?;
    ensure!(status.code() == Code::DeadlineExceeded, "{status:?}");
    ensure!(status.message().contains("'small'"), "{status:?}");
    Ok(())
}

#[tokio::test]
async fn an_answer_that_is_none_is_the_providers_fault() -> Result<()> {
    let data = |text: &str| format!("{{\"data\":[{text}]}}");
    for body in [
        String::new(),
        "<html>hello</html>".to_owned(),
        "[[[[[[[[".repeat(1000),
        data(""),
        data("{\"embedding\":[0.5]},{\"embedding\":[0.5]}"),
        data("{\"embedding\":[NaN]}"),
        data("{\"embedding\":[1e99]}"),
        data("{\"embedding\":[]}"),
        data("{\"embedding\":[\"a\"]}"),
        data("{\"embedding\":[0.5,0.5]}"),
    ] {
        let answer = ResponseTemplate::new(200).set_body_raw(body.clone(), "application/json");
        let server = answering(answer).await;
        let outside = keyed(&server, "width = 1").await?;
        let status = outside.fails(texts("small", &["a"])).await?;
        ensure!(status.code() == Code::Unavailable, "{body:.40}: {status:?}");
        ensure!(status.message().contains("'small'"), "{status:?}");
        ensure!(server.received_requests().await.unwrap_or_default().len() == 1);
    }
    Ok(())
}

#[tokio::test]
async fn statuses_are_the_callers_fault_only_where_the_caller_is_at_fault() -> Result<()> {
    for (response, expected, words) in [
        (400, Code::InvalidArgument, "the text is too long"),
        (422, Code::InvalidArgument, "the text is too long"),
        (401, Code::Unavailable, "key"),
        (403, Code::Unavailable, "key"),
        (404, Code::Unavailable, "does not know"),
        (302, Code::Unavailable, "failed"),
        (503, Code::Unavailable, "failed"),
    ] {
        let reason = format!("the text is too long for {SECRET}");
        let answer = ResponseTemplate::new(response)
            .insert_header("location", "http://127.0.0.1:1/")
            .set_body_json(json!({"error": {"message": reason}}));
        let server = answering(answer).await;
        let outside = keyed(&server, "retries_max = 0").await?;
        let status = outside.fails(texts("small", &["a"])).await?;
        ensure!(status.code() == expected, "{response}: {status:?}");
        let message = status.message();
        ensure!(
            message.contains("'small'") && message.contains(words),
            "{status:?}"
        );
        ensure!(message.contains("too long") == (expected == Code::InvalidArgument));
    }
    Ok(())
}

/// A service that reads one call and writes these bytes, again and again.
fn broken(written: &'static [u8]) -> Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let mut buffer = [0; 65_536];
            // Whatever goes wrong here is what the caller is to bear.
            let _ = stream.read(&mut buffer);
            let _ = stream.write_all(written);
        }
    });
    Ok(address)
}

#[tokio::test]
async fn connections_that_break_are_the_providers_fault() -> Result<()> {
    let cut = broken(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n{\"data\":[")?;
    let rubbish = broken(b"\x00\x01\x02 hello\r\n\r\n")?;
    let silent = broken(b"")?;
    let refused = free_port()?;
    for address in [cut, rubbish, silent, refused] {
        let url = format!("http://{address}/v1");
        let outside = Outside::start(&entry("small", &url, EMBEDDING)).await?;
        let status = outside.fails(texts("small", &["a"])).await?;
        ensure!(status.code() == Code::Unavailable, "{status:?}");
        ensure!(status.message().contains("'small'"), "{status:?}");
        ensure!(!status.message().contains("127.0.0.1"), "{status:?}");
    }
    Ok(())
}

#[tokio::test]
async fn calls_over_the_cap_are_refused_at_once() -> Result<()> {
    let slow = ResponseTemplate::new(200).set_delay(Duration::from_secs(300));
    let server = answering(slow).await;
    let outside = keyed(&server, "concurrency_max = 1\ntimeout = \"60s\"").await?;
    let first = outside.call(texts("small", &["a"]));
    let second = async {
        until(TIMEOUT, "the first call is in flight", || async {
            Ok(!server
                .received_requests()
                .await
                .unwrap_or_default()
                .is_empty())
        })
        .await?;
        outside.fails(texts("small", &["b"])).await
    };
    let status = tokio::select! {
        _ = first => anyhow::bail!("the first succeeded"),
        status = second => status?,
    };
    ensure!(status.code() == Code::Unavailable, "{status:?}");
    let details = status.get_error_details();
    ensure!(details.retry_info().is_some(), "{status:?}");
    Ok(())
}

#[tokio::test]
async fn one_tenant_has_half_of_a_providers_calls() -> Result<()> {
    let slow = ResponseTemplate::new(200).set_delay(Duration::from_secs(300));
    let server = answering(slow).await;
    let policy = "anonymous = \"guest\"\n[tenants.guest]\nmodels = [\"*\"]\n\
                  [tenants.other]\nmodels = [\"*\"]\n";
    let tenants = Tenants::of(policy)?;
    let key = tenants.key("other")?;
    let catalogue = embedding("small", &server, "concurrency_max = 2\ntimeout = \"60s\"");
    let flags = tenants.flags();
    let flags = flags.each_ref().map(String::as_str);
    let outside = Outside::with(&catalogue, &flags).await?;
    let in_flight = async |count: usize| {
        until(TIMEOUT, "the calls are in flight", || async {
            Ok(server.received_requests().await.unwrap_or_default().len() == count)
        })
        .await
    };
    let first = outside.call(texts("small", &["a"]));
    let mut others = tonic::Request::new(texts("small", &["c"]));
    others.metadata_mut().insert("x-api-key", key.parse()?);
    let mut client = outside.client.clone();
    let checks = async {
        in_flight(1).await?;
        // One is free, and it is not for the same tenant.
        let status = outside.fails(texts("small", &["b"])).await?;
        ensure!(status.code() == Code::Unavailable, "{status:?}");
        tokio::select! {
            second = client.model_infer(others) => anyhow::bail!("it ended: {second:?}"),
            both = in_flight(2) => both,
        }
    };
    tokio::select! {
        _ = first => anyhow::bail!("the first succeeded"),
        checked = checks => checked,
    }
}

#[tokio::test]
async fn a_key_that_changes_is_read_again() -> Result<()> {
    let server = MockServer::start().await;
    posts("/v1/embeddings")
        .and(header("authorization", "Bearer sk-new"))
        .respond_with(embed)
        .with_priority(1)
        .mount(&server)
        .await;
    let refusing = ResponseTemplate::new(401).set_body_string(SECRET);
    posts("/v1/embeddings")
        .respond_with(refusing)
        .mount(&server)
        .await;
    let outside = keyed(&server, "").await?;
    let status = outside.fails(texts("small", &["a"])).await?;
    ensure!(status.code() == Code::Unavailable, "{status:?}");
    let file = outside.files.last().context("no key")?;
    std::fs::write(file, "sk-new")?;
    until(TIMEOUT, "the new key is used", || async {
        Ok(outside.call(texts("small", &["a"])).await.is_ok())
    })
    .await?;
    ensure!(!outside.gateway.logged().contains("sk-new"));
    Ok(())
}

#[tokio::test]
async fn a_catalogue_that_is_wrong_is_refused_before_a_port_opens() -> Result<()> {
    let file = scratch("wrong.toml")?;
    let good = entry("small", "http://127.0.0.1:1/v1", EMBEDDING);
    for (more, words) in [
        (format!("key = \"{SECRET}\""), "line 6"),
        (
            "key_file = \"/nowhere/key\"".to_owned(),
            "models.small.key_file",
        ),
        ("key_variable = \"NO_SUCH_KEY\"".to_owned(), "NO_SUCH_KEY"),
        (
            "ca_file = \"/nowhere/ca\"".to_owned(),
            "models.small.ca_file",
        ),
        ("timeout = \"soon\"".to_owned(), "line 6"),
        (
            "[chains.small]\nmodels = [\"a\"]".to_owned(),
            "chains.small.models",
        ),
    ] {
        std::fs::write(&file, format!("{good}{more}\n"))?;
        let output = Command::new(program("andon")?)
            .args(["gateway", "--providers"])
            .arg(&file)
            .output()?;
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(!output.status.success(), "{more}: it started");
        ensure!(error.contains(words), "{more}: {error}");
        ensure!(!error.contains(SECRET), "{error}");
    }
    std::fs::remove_file(&file)?;
    Ok(())
}
