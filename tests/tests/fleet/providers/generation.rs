//! Texts that providers' models write, whole and in parts.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::StreamExt;
use protocol::inference::model_infer_request::InferInputTensor;
use protocol::inference::{
    InferParameter, ModelInferRequest, ModelInferResponse, ModelStreamInferResponse,
    infer_parameter::ParameterChoice,
};
use serde_json::{Value, json};
use tonic::Code;
use wiremock::matchers::{body_partial_json, header};
use wiremock::{MockServer, ResponseTemplate};

use super::{Outside, SECRET, entry, key, posts, quoted, texts};

/// A request for a text.
pub(super) fn prompt(model: &str, id: &str, text: &str) -> ModelInferRequest {
    let raw = tensor::encode_bytes_elements(&[text]).unwrap_or_default();
    let parameter = |choice| InferParameter {
        parameter_choice: Some(choice),
    };
    ModelInferRequest {
        model_name: model.to_owned(),
        id: id.to_owned(),
        parameters: [
            ("max_tokens", ParameterChoice::Int64Param(7)),
            ("temperature", ParameterChoice::DoubleParam(0.5)),
            ("stop", ParameterChoice::StringParam("END".to_owned())),
            ("system", ParameterChoice::StringParam("be kind".to_owned())),
        ]
        .map(|(name, choice)| (name.to_owned(), parameter(choice)))
        .into(),
        inputs: vec![InferInputTensor {
            name: "text_input".to_owned(),
            datatype: "BYTES".to_owned(),
            shape: vec![1],
            ..Default::default()
        }],
        raw_input_contents: vec![raw.into()],
        ..Default::default()
    }
}

fn generated(response: &ModelInferResponse) -> Result<String> {
    let raw = response.raw_output_contents.first().context("no output")?;
    let text = raw.get(4..).context("no element")?;
    Ok(String::from_utf8(text.to_vec())?)
}

pub(super) const OPENAI: &str = "kind = \"openai\"\ntask = \"generation\"\n\
                      price = { input_per_million = 1e6, output_per_million = 2e6 }";

fn openai_request() -> Value {
    json!({
        "model": "theirs", "max_tokens": 7, "temperature": 0.5, "stop": ["END"],
        "messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}],
    })
}

/// Responds whole, or with these events when a stream is requested.
pub(super) async fn writer(
    path: &str,
    received: Value,
    response: Value,
    events: &str,
) -> MockServer {
    let server = MockServer::start().await;
    let sse = ResponseTemplate::new(200).set_body_raw(events.to_owned(), "text/event-stream");
    posts(path)
        .and(body_partial_json(received.clone()))
        .and(body_partial_json(json!({"stream": true})))
        .respond_with(sse)
        .with_priority(1)
        .mount(&server)
        .await;
    posts(path)
        .and(body_partial_json(received))
        .respond_with(ResponseTemplate::new(200).set_body_json(response))
        .mount(&server)
        .await;
    server
}

pub(super) const OPENAI_EVENTS: &str = "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\n\n\
    data: {\"choices\":[{\"delta\":{\"content\":\"Good \"}}]}\n\n\
    data: {\"choices\":[{\"delta\":{\"content\":\"day\"}}]}\n\n\
    data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"length\"}]}\n\n\
    data: {\"choices\":[],\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":2}}\n\n\
    data: [DONE]\n\n";

async fn openai_writer() -> MockServer {
    let response = json!({
        "choices": [{"message": {"role": "assistant", "content": "Good day"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2},
    });
    writer(
        "/v1/chat/completions",
        openai_request(),
        response,
        OPENAI_EVENTS,
    )
    .await
}

/// Sends messages on one stream and gathers what comes back.
async fn streamed(
    outside: &Outside,
    requests: Vec<ModelInferRequest>,
) -> Result<Vec<ModelStreamInferResponse>> {
    let requests = futures::stream::iter(requests);
    let responses = outside.client.clone().model_stream_infer(requests).await?;
    let responses: Vec<_> = responses.into_inner().collect().await;
    Ok(responses.into_iter().collect::<Result<_, _>>()?)
}

/// The id, the text and whether it is the last, of each part.
fn parts(responses: &[ModelStreamInferResponse]) -> Result<Vec<(String, String, bool)>> {
    let parts = responses.iter().map(|response| {
        ensure!(
            response.error_message.is_empty(),
            "{}",
            response.error_message
        );
        let part = response.infer_response.as_ref().context("no response")?;
        let last = part.parameters.get("triton_final_response");
        let last = last.and_then(|last| last.parameter_choice.clone());
        let last = last == Some(ParameterChoice::BoolParam(true));
        Ok((part.id.clone(), generated(part)?, last))
    });
    parts.collect()
}

fn expected(id: &str) -> Vec<(String, String, bool)> {
    [("Good ", false), ("day", false), ("", true)]
        .map(|(text, last)| (id.to_owned(), text.to_owned(), last))
        .to_vec()
}

pub(super) const COST: &str = "andon_gateway_provider_cost_total{tenant=\"anyone\",model=\"big\"}";

#[tokio::test]
async fn an_openai_shaped_service_writes_whole_and_in_parts() -> Result<()> {
    let server = openai_writer().await;
    let url = format!("{}/v1", server.uri());
    let outside = Outside::start(&entry("big", &url, OPENAI)).await?;
    let (response, metadata) = outside.call(prompt("big", "1", "hello")).await?;
    ensure!(generated(&response)? == "Good day" && response.id == "1");
    ensure!(
        metadata
            .get("x-compute-tokens")
            .context("no tokens")?
            .to_str()?
            == "5"
    );
    ensure!(outside.gateway.metric(COST).await? == Some(7.0));

    // The responses to two requests of one stream keep their order.
    let requests = vec![prompt("big", "a", "hello"), prompt("big", "b", "hello")];
    let responses = streamed(&outside, requests).await?;
    ensure!(
        parts(&responses)? == [expected("a"), expected("b")].concat(),
        "{responses:?}"
    );
    let last = responses
        .last()
        .and_then(|last| last.infer_response.as_ref());
    let reason = last.and_then(|last| last.parameters.get("finish_reason").cloned());
    let length = ParameterChoice::StringParam("length".to_owned());
    ensure!(reason.and_then(|reason| reason.parameter_choice) == Some(length));
    ensure!(outside.gateway.metric(COST).await? == Some(21.0));
    Ok(())
}

#[tokio::test]
async fn an_anthropic_shaped_service_writes_whole_and_in_parts() -> Result<()> {
    let received = json!({
        "model": "theirs", "max_tokens": 7, "system": "be kind", "stop_sequences": ["END"],
        "messages": [{"role": "user", "content": "hello"}],
    });
    let response = json!({
        "content": [{"type": "text", "text": "Good day"}], "stop_reason": "end_turn",
        "usage": {"input_tokens": 3, "output_tokens": 2},
    });
    let events = "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"usage\":{\"input_tokens\":3}}}\n\n\
        event: ping\ndata: {\"type\":\"ping\"}\n\n\
        event: content_block_delta\ndata: {\"type\":\"content_block_delta\",\"delta\":{\"type\":\"text_delta\",\"text\":\"Good \"}}\n\n\
        event: content_block_delta\ndata: {\"type\":\"content_block_delta\",\"delta\":{\"type\":\"text_delta\",\"text\":\"day\"}}\n\n\
        event: message_delta\ndata: {\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"end_turn\"},\"usage\":{\"output_tokens\":2}}\n\n\
        event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n";
    let server = writer("/v1/messages", received, response, events).await;
    let (url, key) = (format!("{}/v1", server.uri()), key()?);
    let more = format!(
        "{}\nkey_file = {}",
        OPENAI.replace("openai", "anthropic"),
        quoted(&key)
    );
    let mut outside = Outside::start(&entry("big", &url, &more)).await?;
    outside.files.push(key);
    let (response, _) = outside.call(prompt("big", "", "hello")).await?;
    ensure!(generated(&response)? == "Good day");
    let responses = streamed(&outside, vec![prompt("big", "a", "hello")]).await?;
    ensure!(parts(&responses)? == expected("a"), "{responses:?}");
    ensure!(outside.gateway.metric(COST).await? == Some(14.0));
    let received = server.received_requests().await.unwrap_or_default();
    for request in received {
        let sent = |name: &str| request.headers.get(name).and_then(|v| v.to_str().ok());
        ensure!(sent("x-api-key") == Some(SECRET) && sent("anthropic-version").is_some());
    }
    Ok(())
}

#[tokio::test]
async fn a_broken_stream_is_an_error_and_the_next_request_succeeds() -> Result<()> {
    let (whole, _) = OPENAI_EVENTS
        .split_once("data: {\"choices\":[{\"delta\":{}")
        .context("events")?;
    let response = json!({"choices": [{"message": {"content": "Good day"}}]});
    for events in [
        whole.to_owned(),
        format!("{whole}data: {{\"error\":{{\"message\":\"no\"}}}}\n\n"),
        format!("{whole}data: rubbish\n\n"),
    ] {
        let received = json!({"model": "theirs"});
        let server = writer("/v1/chat/completions", received, response.clone(), &events).await;
        let url = format!("{}/v1", server.uri());
        let outside = Outside::start(&entry("big", &url, OPENAI)).await?;
        let requests = vec![prompt("big", "a", "hello"), texts("nobody", &["a"])];
        let responses = streamed(&outside, requests).await?;
        ensure!(responses.len() == 4, "{responses:?}");
        ensure!(parts(&responses[..2])? == expected("a")[..2]);
        ensure!(
            responses[2].error_message.contains("'big'"),
            "{responses:?}"
        );
        ensure!(
            responses[3].error_message.contains("nobody"),
            "{responses:?}"
        );
        // What came is charged all the same: the parts, and a guess at what was read.
        let cost = outside.gateway.metric(COST).await?.unwrap_or_default();
        ensure!(cost >= 4.0, "{cost}");
    }
    Ok(())
}

#[tokio::test]
async fn a_streamed_text_falls_back_until_it_begins() -> Result<()> {
    let good = openai_writer().await;
    let received = json!({"model": "theirs"});
    let response = json!({"error": {"message": "no"}});
    let error = "data: {\"error\":{\"message\":\"no\"}}\n\n";
    let bad = writer("/v1/chat/completions", received, response, error).await;
    let catalogue = entry("bad", &format!("{}/v1", bad.uri()), OPENAI)
        + &entry("big", &format!("{}/v1", good.uri()), OPENAI)
        + "[chains.any]\nmodels = [\"bad\", \"big\"]\n";
    let outside = Outside::start(&catalogue).await?;
    let responses = streamed(&outside, vec![prompt("any", "a", "hello")]).await?;
    ensure!(parts(&responses)? == expected("a"), "{responses:?}");
    let models = responses.iter().flat_map(|part| &part.infer_response);
    ensure!(
        models
            .map(|part| &part.model_name)
            .all(|name| name == "big")
    );
    let fallbacks = "andon_gateway_fallbacks_total{chain=\"any\",reason=\"UNAVAILABLE\"}";
    ensure!(outside.gateway.metric(fallbacks).await? == Some(1.0));
    ensure!(outside.gateway.metric(COST).await? == Some(7.0));
    Ok(())
}

#[tokio::test]
async fn a_service_that_falls_silent_in_the_middle_is_given_up() -> Result<()> {
    let server = MockServer::start().await;
    let slow = ResponseTemplate::new(200).set_delay(Duration::from_secs(300));
    posts("/v1/chat/completions")
        .respond_with(slow)
        .mount(&server)
        .await;
    let url = format!("{}/v1", server.uri());
    let more = format!("{OPENAI}\ntimeout = \"1s\"");
    let outside = Outside::start(&entry("big", &url, &more)).await?;
    let responses = streamed(&outside, vec![prompt("big", "a", "hello")]).await?;
    ensure!(
        responses.len() == 1 && responses[0].error_message.contains("'big'"),
        "{responses:?}"
    );
    let status = outside.fails(prompt("big", "a", "hello")).await?;
    ensure!(status.code() == Code::DeadlineExceeded, "{status:?}");
    Ok(())
}

#[tokio::test]
async fn errors_in_a_prompt_name_their_field() -> Result<()> {
    let server = openai_writer().await;
    let url = format!("{}/v1", server.uri());
    let outside = Outside::start(&entry("big", &url, OPENAI)).await?;
    for (name, choice) in [
        ("max_tokens", ParameterChoice::Int64Param(0)),
        ("temperature", ParameterChoice::DoubleParam(f64::NAN)),
        ("top_p", ParameterChoice::DoubleParam(1.5)),
        ("stop", ParameterChoice::StringParam(String::new())),
        ("system", ParameterChoice::BoolParam(true)),
        ("color", ParameterChoice::BoolParam(true)),
    ] {
        let mut request = prompt("big", "a", "hello");
        let value = InferParameter {
            parameter_choice: Some(choice),
        };
        request.parameters.insert(name.to_owned(), value);
        let status = outside.fails(request).await?;
        ensure!(status.code() == Code::InvalidArgument, "{name}: {status:?}");
        let field = format!("parameters[{name}]");
        ensure!(status.message().contains(&field), "{status:?}");
    }
    Ok(())
}

#[tokio::test]
async fn a_bearer_is_sent_only_where_there_is_a_key() -> Result<()> {
    let server = openai_writer().await;
    let guarded = MockServer::start().await;
    posts("/v1/chat/completions")
        .and(header("authorization", "x"))
        .respond_with(ResponseTemplate::new(500))
        .mount(&guarded)
        .await;
    let url = format!("{}/v1", server.uri());
    let outside = Outside::start(&entry("big", &url, OPENAI)).await?;
    outside.call(prompt("big", "a", "hello")).await?;
    let received = server.received_requests().await.unwrap_or_default();
    ensure!(
        received
            .iter()
            .all(|request| !request.headers.contains_key("authorization"))
    );
    Ok(())
}
