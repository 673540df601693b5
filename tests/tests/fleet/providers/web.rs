//! Models of outside services through the HTTP door.

use anyhow::{Context, Result, ensure};
use fleet_tests::calls::rows;
use protocol::inference::InferParameter;
use protocol::inference::infer_parameter::ParameterChoice;
use reqwest::Response;
use serde_json::{Value, json};
use wiremock::MockServer;

use super::generation::{OPENAI, OPENAI_EVENTS, writer};
use super::vectors::score;
use super::{Outside, TIMEOUT, embedder, embedding, entry, posts, texts};

pub(super) async fn post(outside: &Outside, path: &str, body: &Value) -> Result<Response> {
    let client = reqwest::Client::builder().no_proxy().timeout(TIMEOUT);
    let url = format!("http://{}{path}", outside.gateway.http);
    Ok(client.build()?.post(url).json(body).send().await?)
}

/// The body of an answer that must be one.
pub(super) async fn success(outside: &Outside, path: &str, body: &Value) -> Result<Value> {
    let response = post(outside, path, body).await?;
    let status = response.status();
    let body: Value = response.json().await?;
    ensure!(status == 200, "{path}: {status} {body}");
    Ok(body)
}

/// The data of the events of an answer that must be one.
pub(super) async fn events(outside: &Outside, path: &str, body: &Value) -> Result<Vec<String>> {
    let response = post(outside, path, body).await?;
    let status = response.status();
    let kind = response.headers().get("content-type").cloned();
    let text = response.text().await?;
    ensure!(status == 200, "{path}: {status} {text}");
    let kind = kind.context("no content type")?;
    ensure!(kind.to_str()?.starts_with("text/event-stream"), "{kind:?}");
    let events = text.split_terminator("\n\n").map(|event| {
        let data = event.strip_prefix("data: ").context("an event has no data");
        Ok(data?.to_owned())
    });
    events.collect()
}

pub(super) fn read(events: &[String]) -> Result<Vec<Value>> {
    let read = events.iter().map(|event| Ok(serde_json::from_str(event)?));
    read.collect()
}

/// A service that says "Good day", and a gateway before it.
async fn kind_words() -> Result<(MockServer, Outside)> {
    let answer = json!({
        "choices": [{"message": {"role": "assistant", "content": "Good day"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2},
    });
    let path = "/v1/chat/completions";
    let server = writer(path, json!({"model": "theirs"}), answer, OPENAI_EVENTS).await;
    let url = format!("{}/v1", server.uri());
    let outside = Outside::start(&entry("big", &url, OPENAI)).await?;
    Ok((server, outside))
}

#[tokio::test]
async fn a_conversation_goes_on_whole_and_in_parts() -> Result<()> {
    let (server, outside) = kind_words().await?;
    let path = "/v1/chat/completions";
    let mut body = json!({
        "model": "big", "max_tokens": 7, "stop": ["END"],
        "messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}],
    });
    let whole = success(&outside, path, &body).await?;
    ensure!(whole["object"] == "chat.completion", "{whole}");
    ensure!(whole["model"] == "big", "{whole}");
    let choice = &whole["choices"][0];
    ensure!(choice["message"]["content"] == "Good day", "{whole}");
    ensure!(choice["finish_reason"] == "stop", "{whole}");
    ensure!(whole["usage"]["total_tokens"] == 5, "{whole}");
    let sent = server.received_requests().await.unwrap_or_default();
    let sent: Value = sent.last().context("nothing was sent")?.body_json()?;
    ensure!(sent["messages"] == body["messages"], "{sent}");
    ensure!(
        sent["max_tokens"] == 7 && sent["stop"] == json!(["END"]),
        "{sent}"
    );

    body["stream"] = json!(true);
    let plain = events(&outside, path, &body).await?;
    body["stream_options"] = json!({"include_usage": true});
    let counted = events(&outside, path, &body).await?;
    // The usage is one part more.
    ensure!(counted.len() == plain.len() + 1, "{counted:?} {plain:?}");
    for events in [&plain, &counted] {
        let (last, parts) = events.split_last().context("no events")?;
        ensure!(last == "[DONE]", "{last}");
        let parts = read(parts)?;
        let content = parts.iter();
        let content = content.filter_map(|part| part["choices"][0]["delta"]["content"].as_str());
        ensure!(content.collect::<String>() == "Good day", "{parts:?}");
        let ends = parts.iter();
        let ends = ends.filter_map(|part| part["choices"][0]["finish_reason"].as_str());
        ensure!(ends.collect::<Vec<_>>() == ["length"], "{parts:?}");
        let kinds = parts
            .iter()
            .all(|part| part["object"] == "chat.completion.chunk");
        ensure!(kinds, "{parts:?}");
    }
    let parts = read(&counted[..counted.len() - 1])?;
    let took = parts.last().context("no part")?;
    ensure!(took["choices"] == json!([]), "{took}");
    ensure!(took["usage"]["total_tokens"] == 5, "{took}");
    Ok(())
}

#[tokio::test]
async fn a_text_goes_on_whole_and_in_parts() -> Result<()> {
    let (_server, outside) = kind_words().await?;
    let body = json!({"text_input": "hello", "id": "7", "parameters": {"max_tokens": 7}});
    for path in ["/v2/models/big", "/v2/models/big/versions/1"] {
        let whole = success(&outside, &format!("{path}/generate"), &body).await?;
        ensure!(whole["text_output"] == "Good day", "{whole}");
        ensure!(
            whole["model_version"] == "1" && whole["id"] == "7",
            "{whole}"
        );
        let parts = events(&outside, &format!("{path}/generate_stream"), &body).await?;
        let parts = read(&parts)?;
        let content = parts.iter().filter_map(|part| part["text_output"].as_str());
        ensure!(content.collect::<Vec<_>>() == ["Good ", "day"], "{parts:?}");
        let named = parts.iter().all(|part| part["model_name"] == "big");
        ensure!(named, "{parts:?}");
    }
    for (path, field) in [
        ("/v2/models/big/versions/2", "model_version"),
        ("/v2/models/nobody", "model_name"),
    ] {
        for method in ["generate", "generate_stream"] {
            let response = post(&outside, &format!("{path}/{method}"), &body).await?;
            let status = response.status();
            let problem: Value = response.json().await?;
            ensure!(status == 404, "{path}: {status} {problem}");
            ensure!(problem["code"] == "NOT_FOUND", "{problem}");
            ensure!(problem["field"] == field, "{problem}");
        }
    }
    Ok(())
}

#[tokio::test]
async fn vectors_have_the_same_bits_at_both_doors() -> Result<()> {
    let server = embedder().await;
    let outside = Outside::start(&embedding("small", &server, "width = 3")).await?;
    let inputs = ["one", "other text"];
    let mut request = texts("small", &inputs);
    let parameter_choice = Some(ParameterChoice::BoolParam(true));
    let normalize = InferParameter { parameter_choice };
    request.parameters.insert("normalize".to_owned(), normalize);
    let (answer, _) = outside.call(request).await?;
    let known = rows(&answer, 0);
    let body = json!({"model": "small", "input": inputs});
    let list = success(&outside, "/v1/embeddings", &body).await?;
    for (index, known) in known.iter().enumerate() {
        let entry = &list["data"][index];
        let vector: Vec<f32> = serde_json::from_value(entry["embedding"].clone())?;
        let bits = |vector: &[f32]| vector.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        ensure!(bits(&vector) == bits(known), "{entry} {known:?}");
    }
    ensure!(list["usage"]["prompt_tokens"] == 4, "{list}");
    // What its tokens stand for is not known here.
    let body = json!({"model": "small", "input": [[1], [2]]});
    let response = post(&outside, "/v1/embeddings", &body).await?;
    ensure!(response.status() == 400, "{}", response.text().await?);
    // Nor are its prompts.
    for field in ["prompt_name", "prompt"] {
        let mut body = json!({"model": "small", "input": "a"});
        body[field] = json!("query");
        let response = post(&outside, "/v1/embeddings", &body).await?;
        let status = response.status();
        let error: Value = response.json().await?;
        ensure!(status == 400, "{status} {error}");
        ensure!(error["error"]["param"] == field, "{error}");
    }
    Ok(())
}

#[tokio::test]
async fn documents_are_ranked_in_every_shape() -> Result<()> {
    let server = MockServer::start().await;
    posts("/v2/rerank").respond_with(score).mount(&server).await;
    let url = format!("{}/v2", server.uri());
    let more = "kind = \"cohere\"\ntask = \"rerank\"";
    let outside = Outside::start(&entry("judge", &url, more)).await?;
    let body = json!({"query": "q", "documents": ["four", {"text": "eight888"}]});
    for path in ["/rerank", "/v1/rerank", "/v2/rerank"] {
        let ranked = success(&outside, path, &body).await?;
        let results = &ranked["results"];
        ensure!(
            results[0]["index"] == 1 && results[1]["index"] == 0,
            "{ranked}"
        );
        ensure!(results[0]["relevance_score"] == 0.5, "{ranked}");
        ensure!(ranked["model"] == "judge", "{ranked}");
    }
    let body = json!({"query": "q", "texts": ["four", "eight888"], "return_text": true});
    let ranked = success(&outside, "/rerank", &body).await?;
    ensure!(
        ranked[0] == json!({"index": 1, "score": 0.5, "text": "eight888"}),
        "{ranked}"
    );
    Ok(())
}
