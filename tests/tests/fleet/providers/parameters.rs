//! Parameters and tools of chats: passed on, or refused by their names.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use wiremock::MockServer;

use super::generation::{OPENAI, writer};
use super::web::{events, post, read, success};
use super::{Outside, entry};

const PATH: &str = "/v1/chat/completions";

/// A conversation in which a tool was called and is called again.
fn chat() -> Value {
    let function = json!({"name": "burns", "arguments": "{\"what\":\"oil\"}"});
    let call = json!({"id": "call_1", "type": "function", "function": function});
    json!({
        "model": "big", "max_tokens": 7,
        "messages": [
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": "What burns?"},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "yes"},
        ],
        "tools": [{"type": "function", "function": {
            "name": "burns", "description": "whether it burns",
            "parameters": {"type": "object", "properties": {"what": {"type": "string"}}},
        }}],
    })
}

/// The body that a service received last.
async fn received(server: &MockServer) -> Result<Value> {
    let requests = server.received_requests().await.unwrap_or_default();
    Ok(requests.last().context("nothing was sent")?.body_json()?)
}

/// The call that both services ask for, in the caller's format.
fn is_called(message: &Value) -> bool {
    let call = &message["tool_calls"][0];
    call["id"] == "call_2"
        && call["type"] == "function"
        && call["function"] == json!({"name": "burns", "arguments": "{\"what\":\"wax\"}"})
}

/// The same, put together from the parts of a stream.
async fn is_called_in_parts(outside: &Outside, mut body: Value) -> Result<()> {
    body["stream"] = json!(true);
    let events = events(outside, PATH, &body).await?;
    let (last, parts) = events.split_last().context("no events")?;
    ensure!(last == "[DONE]", "{last}");
    let (mut call, mut arguments) = (Value::Null, String::new());
    let mut finish = Value::Null;
    for part in read(parts)? {
        let choice = &part["choices"][0];
        let next = &choice["delta"]["tool_calls"][0];
        if next.is_object() {
            ensure!(next["index"] == 0, "{part}");
            arguments += next["function"]["arguments"]
                .as_str()
                .context("no arguments")?;
        }
        if next["id"].is_string() {
            ensure!(call.is_null(), "it began twice: {part}");
            call = next.clone();
        }
        if choice["finish_reason"].is_string() {
            finish = choice["finish_reason"].clone();
        }
    }
    call["function"]["arguments"] = json!(arguments);
    ensure!(is_called(&json!({"tool_calls": [call]})), "{call}");
    ensure!(finish == "tool_calls", "{finish}");
    Ok(())
}

#[tokio::test]
async fn tools_go_both_ways_to_an_openai_shaped_service() -> Result<()> {
    let function = json!({"name": "burns", "arguments": "{\"what\":\"wax\"}"});
    let call = json!({"id": "call_2", "type": "function", "function": function});
    let message = json!({"role": "assistant", "content": null, "tool_calls": [call]});
    let answer = json!({"choices": [{"message": message, "finish_reason": "tool_calls"}]});
    let parts = [
        json!({"index": 0, "id": "call_2", "type": "function", "function": {"name": "burns", "arguments": ""}}),
        json!({"index": 0, "function": {"arguments": "{\"what\":"}}),
        json!({"index": 0, "function": {"arguments": "\"wax\"}"}}),
    ];
    let parts = parts.map(|part| {
        let chunk = json!({"choices": [{"delta": {"tool_calls": [part]}}]});
        format!("data: {chunk}\n\n")
    });
    let end =
        "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"tool_calls\"}]}\n\ndata: [DONE]\n\n";
    let events = parts.concat() + end;
    let server = writer(PATH, json!({"model": "theirs"}), answer, &events).await;
    let outside = Outside::start(&entry("big", &format!("{}/v1", server.uri()), OPENAI)).await?;
    let mut body = chat();
    body["tool_choice"] = json!({"type": "function", "function": {"name": "burns"}});
    let whole = success(&outside, PATH, &body).await?;
    let choice = &whole["choices"][0];
    ensure!(is_called(&choice["message"]), "{whole}");
    ensure!(choice["message"]["content"].is_null(), "{whole}");
    ensure!(choice["finish_reason"] == "tool_calls", "{whole}");
    let sent = received(&server).await?;
    for name in ["messages", "tools", "tool_choice"] {
        ensure!(sent[name] == body[name], "{name}: {sent}");
    }
    is_called_in_parts(&outside, body).await
}

#[tokio::test]
async fn tools_go_both_ways_to_an_anthropic_shaped_service() -> Result<()> {
    let block =
        json!({"type": "tool_use", "id": "call_2", "name": "burns", "input": {"what": "wax"}});
    let answer = json!({"content": [block], "stop_reason": "tool_use"});
    let begun = json!({"type": "tool_use", "id": "call_2", "name": "burns", "input": {}});
    let delta = |json: &str| json!({"type": "input_json_delta", "partial_json": json});
    let data = [
        json!({"type": "content_block_start", "index": 0, "content_block": begun}),
        json!({"type": "content_block_delta", "index": 0, "delta": delta("{\"what\":")}),
        json!({"type": "content_block_delta", "index": 0, "delta": delta("\"wax\"}")}),
        json!({"type": "message_delta", "delta": {"stop_reason": "tool_use"}}),
        json!({"type": "message_stop"}),
    ];
    let events = data.map(|data| format!("data: {data}\n\n")).concat();
    let server = writer("/v1/messages", json!({"model": "theirs"}), answer, &events).await;
    let url = format!("{}/v1", server.uri());
    let more = OPENAI.replace("openai", "anthropic");
    let outside = Outside::start(&entry("big", &url, &more)).await?;
    let mut body = chat();
    body["tool_choice"] = json!("required");
    let whole = success(&outside, PATH, &body).await?;
    ensure!(is_called(&whole["choices"][0]["message"]), "{whole}");
    let sent = received(&server).await?;
    let called =
        json!({"type": "tool_use", "id": "call_1", "name": "burns", "input": {"what": "oil"}});
    let result = json!({"type": "tool_result", "tool_use_id": "call_1", "content": "yes"});
    let expected = json!([
        {"role": "user", "content": "What burns?"},
        {"role": "assistant", "content": [called]},
        {"role": "user", "content": [result]},
    ]);
    ensure!(sent["messages"] == expected, "{sent}");
    ensure!(sent["tool_choice"] == json!({"type": "any"}), "{sent}");
    let given = &body["tools"][0]["function"];
    ensure!(sent["tools"][0]["name"] == given["name"], "{sent}");
    ensure!(
        sent["tools"][0]["description"] == given["description"],
        "{sent}"
    );
    ensure!(
        sent["tools"][0]["input_schema"] == given["parameters"],
        "{sent}"
    );
    is_called_in_parts(&outside, body).await
}

/// What a service of OpenAI's API has, and one of Anthropic's has not.
fn parameters() -> [(&'static str, Value); 17] {
    let schema = json!({"name": "a", "schema": {"type": "object"}});
    [
        ("n", json!(2)),
        ("seed", json!(7)),
        ("presence_penalty", json!(0.5)),
        ("frequency_penalty", json!(-0.5)),
        ("logit_bias", json!({"50256": -100})),
        ("logprobs", json!(true)),
        ("top_logprobs", json!(2)),
        ("reasoning_effort", json!("high")),
        ("store", json!(true)),
        ("metadata", json!({"a": "b"})),
        ("service_tier", json!("flex")),
        ("prompt_cache_key", json!("a")),
        ("prediction", json!({"type": "content", "content": "a"})),
        ("web_search_options", json!({})),
        ("of_another_server", json!([{"a": 1.5}])),
        ("response_format", json!({"type": "json_object"})),
        (
            "response_format",
            json!({"type": "json_schema", "json_schema": schema}),
        ),
    ]
}

#[tokio::test]
async fn parameters_are_passed_on_or_refused_by_their_names() -> Result<()> {
    let choice = |index: u32, text: &str| {
        let logprobs = json!({"content": [{"token": text, "logprob": -0.25}]});
        json!({"index": index, "message": {"content": text}, "logprobs": logprobs, "finish_reason": "stop"})
    };
    let answer = json!({"choices": [choice(1, "b"), choice(0, "a")]});
    let chunks = [
        json!({"choices": [{"index": 1, "delta": {"content": "b"}, "logprobs": {"content": []}}]}),
        json!({"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": "stop"}]}),
        json!({"choices": [{"index": 1, "delta": {}, "finish_reason": "length"}]}),
    ];
    let stream = chunks.map(|chunk| format!("data: {chunk}\n\n")).concat();
    let server = writer(PATH, json!({"model": "theirs"}), answer, &stream).await;
    let url = format!("{}/v1", server.uri());
    let other = OPENAI.replace("openai", "anthropic");
    let catalogue = entry("big", &url, OPENAI) + &entry("other", &url, &other);
    let outside = Outside::start(&catalogue).await?;
    for (name, value) in parameters() {
        let mut body = json!({"model": "big", "messages": [{"role": "user", "content": "hello"}]});
        body[name] = value.clone();
        let whole = success(&outside, PATH, &body).await?;
        ensure!(received(&server).await?[name] == value, "{name}");
        // The choices stand in their order, each with its probabilities.
        let texts = whole["choices"].as_array().context("no choices")?.iter();
        let texts: Vec<_> = texts.map(|choice| &choice["message"]["content"]).collect();
        ensure!(texts == ["a", "b"], "{whole}");
        ensure!(
            whole["choices"][1]["logprobs"]["content"][0]["token"] == "b",
            "{whole}"
        );
        body["model"] = json!("other");
        let response = post(&outside, PATH, &body).await?;
        let status = response.status();
        let error: Value = response.json().await?;
        ensure!(status == 400, "{name}: {status} {error}");
        ensure!(error["error"]["param"] == name, "{error}");
    }
    let body = json!({
        "model": "big", "n": 2, "stream": true,
        "messages": [{"role": "user", "content": "hello"}],
    });
    let events = events(&outside, PATH, &body).await?;
    let parts = read(&events[..events.len() - 1])?;
    let choices = parts[1..]
        .iter()
        .flat_map(|part| part["choices"].as_array());
    let ends: Vec<_> = choices
        .flatten()
        .filter(|choice| choice["finish_reason"].is_string())
        .map(|choice| (choice["index"].as_u64(), choice["finish_reason"].as_str()))
        .collect();
    ensure!(
        ends == [(Some(0), Some("stop")), (Some(1), Some("length"))],
        "{parts:?}"
    );
    ensure!(
        parts[0]["choices"][1]["delta"]["role"] == "assistant",
        "{parts:?}"
    );
    ensure!(parts[1]["choices"][0]["index"] == 1, "{parts:?}");
    Ok(())
}

#[tokio::test]
async fn the_end_user_and_the_names_of_authors_are_never_dropped() -> Result<()> {
    let message = json!({"role": "assistant", "content": "a"});
    let answer = json!({
        "choices": [{"message": message, "finish_reason": "stop"}],
        "content": [{"type": "text", "text": "a"}], "stop_reason": "end_turn",
    });
    let theirs = || json!({"model": "theirs"});
    let server = writer(PATH, theirs(), answer.clone(), "").await;
    let other = writer("/v1/messages", theirs(), answer, "").await;
    let shaped = OPENAI.replace("openai", "anthropic");
    let catalogue = entry("big", &format!("{}/v1", server.uri()), OPENAI)
        + &entry("other", &format!("{}/v1", other.uri()), &shaped);
    let outside = Outside::start(&catalogue).await?;
    let mut body = json!({
        "model": "big", "user": "anna",
        "messages": [{"role": "user", "content": "hello", "name": "anna"}],
    });
    success(&outside, PATH, &body).await?;
    let sent = received(&server).await?;
    for name in ["user", "messages"] {
        ensure!(sent[name] == body[name], "{name}: {sent}");
    }
    body["model"] = json!("other");
    let response = post(&outside, PATH, &body).await?;
    let status = response.status();
    let error: Value = response.json().await?;
    ensure!(status == 400, "{status} {error}");
    ensure!(error["error"]["param"] == "messages[0].name", "{error}");
    body["messages"] = json!([{"role": "user", "content": "hello"}]);
    success(&outside, PATH, &body).await?;
    let sent = received(&other).await?;
    ensure!(sent["metadata"] == json!({"user_id": "anna"}), "{sent}");
    ensure!(sent["messages"] == body["messages"], "{sent}");
    Ok(())
}
