//! Calls of OpenAI's API that are passed through: what the service gets and
//! what the caller gets, byte by byte, and what is charged.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use fleet_tests::scripts::python;
use fleet_tests::{Fleet, until};
use serde_json::{Value, json};
use wiremock::matchers::body_partial_json;
use wiremock::{MockServer, ResponseTemplate};

use super::generation::{COST, OPENAI};
use super::{EMBEDDING, Outside, SECRET, TIMEOUT, entry, key, posts, quoted};

const COMPLETION: &str = "{\n  \"id\" : \"cmpl-1\", \"object\": \"text_completion\", \"created\": 1, \"model\": \"theirs\",\n\
    \"choices\": [{\"index\": 0, \"text\": \"Good day\", \"logprobs\": null, \"finish_reason\": \"stop\"}],\n\
    \"x\": 1.50, \"usage\": {\"prompt_tokens\": 3, \"completion_tokens\": 2, \"total_tokens\": 5}\n}\n";

const COMPLETION_EVENTS: &str = ": hello\n\n\
    data: {\"id\":\"cmpl-1\", \"object\":\"text_completion\",\"created\":1,\"model\":\"theirs\",\"choices\":[{\"index\":0,\"text\":\"Good \"}],\"usage\":null}\r\n\r\n\
    data: {\"id\":\"cmpl-1\",\"object\":\"text_completion\",\"created\":1,\"model\":\"theirs\",\"choices\":[{\"index\":0,\"text\":\"day\",\"finish_reason\":\"stop\"}],\"usage\":null}\n\n\
    data: {\"id\":\"cmpl-1\",\"object\":\"text_completion\",\"created\":1,\"model\":\"theirs\",\"choices\":[],\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":2,\"total_tokens\":5}}\n\n\
    data: [DONE]\n\n";

const RESPONSE: &str = "{\"id\": \"resp_1\", \"object\": \"response\", \"created_at\": 1, \"status\": \"completed\", \"error\": null,\n\
    \"model\": \"theirs\", \"output\": [{\"type\": \"message\", \"id\": \"msg_1\", \"role\": \"assistant\", \"status\": \"completed\",\n\
    \"content\": [{\"type\": \"output_text\", \"text\": \"Good day\", \"annotations\": []}]}],\n\
    \"usage\": {\"input_tokens\": 3, \"output_tokens\": 2, \"total_tokens\": 5}}";

/// The events of a stream whose last one has the whole response.
fn response_events() -> String {
    let whole = RESPONSE.replace('\n', " ");
    format!(
        "event: response.created\ndata: {{\"type\":\"response.created\",\"sequence_number\":0,\"response\":{{\"id\":\"resp_1\",\"object\":\"response\",\"status\":\"in_progress\",\"output\":[],\"error\":null,\"usage\":null}}}}\n\n\
         event: response.output_text.delta\ndata: {{\"type\":\"response.output_text.delta\",\"sequence_number\":1,\"item_id\":\"msg_1\",\"output_index\":0,\"content_index\":0,\"delta\":\"Good day\",\"logprobs\":[]}}\n\n\
         event: response.completed\ndata: {{\"type\":\"response.completed\",\"sequence_number\":2,\"response\":{whole}}}\n\n"
    )
}

/// A service of both calls; each has a response in one piece, and events.
async fn service(calls: &[(&str, &str, &str)]) -> MockServer {
    let server = MockServer::start().await;
    for (path, whole, events) in calls {
        let sse = ResponseTemplate::new(200).set_body_raw(*events, "text/event-stream");
        posts(path)
            .and(body_partial_json(json!({"stream": true})))
            .respond_with(sse)
            .with_priority(1)
            .mount(&server)
            .await;
        let whole = ResponseTemplate::new(200).set_body_raw(*whole, "application/json");
        posts(path).respond_with(whole).mount(&server).await;
    }
    server
}

async fn writer() -> MockServer {
    let events = response_events();
    service(&[
        ("/v1/completions", COMPLETION, COMPLETION_EVENTS),
        ("/v1/responses", RESPONSE, &events),
    ])
    .await
}

/// What a caller gets.
#[derive(Debug)]
struct Got {
    status: u16,
    kind: String,
    fallback: bool,
    body: String,
}

impl Got {
    /// The error of a refusal.
    fn error(&self) -> Result<Value> {
        let body: Value = serde_json::from_str(&self.body)?;
        Ok(body["error"].clone())
    }
}

/// Sends a body as it is, with a credential that is none of the service's.
async fn send(address: SocketAddr, path: &str, body: &str) -> Result<Got> {
    let client = reqwest::Client::builder().no_proxy().timeout(TIMEOUT);
    let request = client
        .build()?
        .post(format!("http://{address}{path}"))
        .header("content-type", "application/json")
        .header("authorization", "Bearer of-the-caller");
    let response = request.body(body.to_owned()).send().await?;
    let kind = response.headers().get("content-type");
    let kind = kind.context("no content type")?.to_str()?.to_owned();
    Ok(Got {
        status: response.status().as_u16(),
        fallback: response.headers().contains_key("x-andon-fallback"),
        kind,
        body: response.text().await?,
    })
}

/// A stream is charged when its end has been read, or when it is dropped.
async fn costs(outside: &Outside, expected: f64) -> Result<()> {
    let charged = until(TIMEOUT, "it is charged", || async {
        let cost = outside.gateway.metric(COST).await?;
        Ok(cost.unwrap_or_default() == expected)
    });
    let charged = charged.await;
    let cost = outside.gateway.metric(COST).await?;
    charged.with_context(|| format!("{cost:?}, not {expected}"))
}

#[tokio::test]
async fn bytes_pass_through_and_only_the_model_is_another() -> Result<()> {
    let (server, key) = (writer().await, key()?);
    let more = format!("{OPENAI}\nkey_file = {}", quoted(&key));
    let url = format!("{}/v1", server.uri());
    let mut outside = Outside::start(&entry("big", &url, &more)).await?;
    outside.files.push(key);
    let events = response_events();
    let mut cost = 0.0;
    for (path, content, whole, events) in [
        ("/v1/completions", "prompt", COMPLETION, COMPLETION_EVENTS),
        ("/v1/responses", "input", RESPONSE, &*events),
    ] {
        for stream in [false, true] {
            let body = format!(
                "{{ \"seed\":18446744073709551616,\n\"top_p\":0.50, \"model\" : \"big\",\t\
                 \"{content}\":\"h\\u00e9llo \u{1f3ee}\", \"stream\": {stream}, \"x\":{{\"model\":\"big2\"}} }}\n"
            );
            let got = send(outside.gateway.http, path, &body).await?;
            let (expected, kind) = match stream {
                true => (events, "text/event-stream; charset=utf-8"),
                false => (whole, "application/json"),
            };
            ensure!(got.status == 200 && !got.fallback, "{got:?}");
            ensure!(got.body == expected && got.kind == kind, "{got:?}");
            let sent = server.received_requests().await.unwrap_or_default();
            let sent = sent.last().context("nothing was sent")?;
            let passed = body.replace("\"big\"", "\"theirs\"");
            ensure!(sent.body == passed.as_bytes(), "{sent:?}");
            let bearer = sent.headers.get_all("authorization").iter();
            let bearer: Vec<&str> = bearer.filter_map(|value| value.to_str().ok()).collect();
            ensure!(bearer == [format!("Bearer {SECRET}")], "{bearer:?}");
            // Three tokens that it read, and two that it wrote.
            cost += 7.0;
            costs(&outside, cost).await?;
        }
    }
    let requests = "andon_gateway_provider_requests_total{model=\"big\",outcome=\"ok\"}";
    ensure!(outside.gateway.metric(requests).await? == Some(4.0));
    Ok(())
}

#[tokio::test]
async fn no_usage_spoils_a_response_that_is_passed_through() -> Result<()> {
    // What the request has is estimated as two tokens, and the text as two.
    for (usage, whole_cost, stream_cost) in [
        ("null", 16.0, 6.0),
        (
            "{\"prompt_tokens\":3.0,\"completion_tokens\":2.0}",
            7.0,
            7.0,
        ),
        (
            "{\"prompt_tokens\":0,\"completion_tokens\":0,\"total_tokens\":0}",
            0.0,
            0.0,
        ),
        ("{\"total_tokens\":5}", 8.0, 8.0),
    ] {
        let whole = format!("{{\"choices\":[{{\"text\":\"Good day\"}}],\"usage\":{usage}}}");
        let events = format!(
            "data: {{\"choices\":[{{\"text\":\"Good day\",\"finish_reason\":\"stop\"}}]}}\n\n\
             data: {{\"choices\":[],\"usage\":{usage}}}\n\ndata: [DONE]"
        );
        let server = service(&[("/v1/completions", &whole, &events)]).await;
        let url = format!("{}/v1", server.uri());
        let outside = Outside::start(&entry("big", &url, OPENAI)).await?;
        for (stream, expected, cost) in [
            (true, &events, stream_cost),
            (false, &whole, stream_cost + whole_cost),
        ] {
            let body =
                json!({"model": "big", "prompt": "hello", "max_tokens": 7, "stream": stream});
            let got = send(outside.gateway.http, "/v1/completions", &body.to_string()).await?;
            ensure!(
                got.status == 200 && &got.body == expected,
                "{usage}: {got:?}"
            );
            costs(&outside, cost).await.context(usage)?;
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_failed_attempt_falls_back_and_a_broken_stream_ends_with_an_error() -> Result<()> {
    let good = writer().await;
    let error = "{\"error\":{\"message\":\"no\"}}";
    let broken = "data: {\"choices\":[{\"text\":\"Good \"}]}\n\n";
    let bad = service(&[
        ("/v1/completions", error, &format!("data: {error}\n\n")),
        ("/v1/responses", "<html></html>", ": nothing\n\n"),
    ])
    .await;
    let breaks = service(&[("/v1/completions", error, broken)]).await;
    let model = |name: &str, server: &MockServer| {
        let more = format!("{OPENAI}\nretries_max = 0");
        entry(name, &format!("{}/v1", server.uri()), &more)
    };
    let catalogue = model("bad", &bad)
        + &model("breaks", &breaks)
        + &model("big", &good)
        + "[chains.any]\nmodels = [\"bad\", \"big\"]\n";
    let outside = Outside::start(&catalogue).await?;
    let (address, events) = (outside.gateway.http, response_events());
    for (path, content, whole, events) in [
        ("/v1/completions", "prompt", COMPLETION, COMPLETION_EVENTS),
        ("/v1/responses", "input", RESPONSE, &*events),
    ] {
        for (stream, expected) in [(false, whole), (true, events)] {
            let mut body = json!({"model": "any", content: "hello", "stream": stream});
            let got = send(address, path, &body.to_string()).await?;
            ensure!(got.status == 200 && got.fallback, "{got:?}");
            ensure!(got.body == expected, "{got:?}");
            // Without a chain the failure is the caller's response.
            body["model"] = json!("bad");
            let got = send(address, path, &body.to_string()).await?;
            ensure!(got.status == 503, "{got:?}");
            ensure!(got.error()?["message"].is_string(), "{got:?}");
        }
    }
    let body = json!({"model": "breaks", "prompt": "hello", "stream": true});
    let got = send(address, "/v1/completions", &body.to_string()).await?;
    let error = got.body.strip_prefix(broken).context("other bytes")?;
    let error = error.trim().strip_prefix("data: ").context("no error")?;
    let error: Value = serde_json::from_str(error)?;
    ensure!(error["error"]["type"] == "server_error", "{error}");
    Ok(())
}

#[tokio::test]
async fn other_providers_and_requests_without_a_model_are_refused_by_name() -> Result<()> {
    let server = MockServer::start().await;
    let too_long = json!({"error": {"message": "too long"}});
    posts("/v1/completions")
        .respond_with(ResponseTemplate::new(400).set_body_json(too_long))
        .mount(&server)
        .await;
    let url = format!("{}/v1", server.uri());
    let catalogue = entry("big", &url, OPENAI)
        + &entry("claude", &url, &OPENAI.replace("openai", "anthropic"))
        + &entry("small", &url, EMBEDDING);
    let outside = Outside::start(&catalogue).await?;
    for (body, status, param, part) in [
        (json!({"model": "claude"}), 501, None, "kind 'openai'"),
        (json!({"model": "small"}), 400, Some("model"), "'small'"),
        (json!({"model": "nobody"}), 404, Some("model"), "'nobody'"),
        (json!({"prompt": "a"}), 400, Some("model"), "required"),
        (json!({"model": 7}), 400, Some("model"), "string"),
        (json!(["big"]), 400, Some("body"), "object"),
        (json!({"model": "big"}), 400, Some("prompt"), "too long"),
    ] {
        let got = send(outside.gateway.http, "/v1/completions", &body.to_string()).await?;
        let error = got.error()?;
        ensure!(got.status == status, "{body}: {got:?}");
        ensure!(error["param"].as_str() == param, "{body}: {error}");
        let message = error["message"].as_str().context("no message")?;
        ensure!(message.contains(part), "{body}: {message}");
    }
    // Only the last was sent.
    let sent = server.received_requests().await.unwrap_or_default();
    ensure!(sent.len() == 1, "{sent:?}");
    Ok(())
}

#[tokio::test]
async fn a_model_of_workers_is_refused_by_name() -> Result<()> {
    let fleet = Fleet::start(1).await?;
    for path in ["/v1/completions", "/v1/responses"] {
        let body = "{\"model\": \"minilm\", \"prompt\": \"a\"}";
        let got = send(fleet.gateway.http, path, body).await?;
        ensure!(got.status == 501, "{got:?}");
        let error = got.error()?;
        let message = error["message"].as_str().context("no message")?;
        ensure!(
            message.contains("'minilm' is served by workers"),
            "{message}"
        );
        ensure!(message.contains(path), "{message}");
    }
    Ok(())
}

#[tokio::test]
async fn openais_client_completes_and_responds() -> Result<()> {
    let server = writer().await;
    let url = format!("{}/v1", server.uri());
    let outside = Outside::start(&entry("big", &url, OPENAI)).await?;
    let http = outside.gateway.http.to_string();
    python("openai_pass_through.py", &["--http", &http]).await?;
    costs(&outside, 28.0).await
}
