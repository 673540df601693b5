//! `/chat/completions`: its requests, and its responses as services of many
//! makers write them.

use serde::{Deserialize, Serialize, Serializer};
use serde_json::value::RawValue;

use super::super::text::JoinedText;
use super::super::{HttpRequest, ModelOptions};
use super::MaxTokensField;
use crate::chat::{
    ChatChoice, ChatDelta, ChatMessage, ChatOption, ChatRequest, FinishReason, ParsedChat,
    StreamProgress, ToolCall, ToolCallDelta,
};
use crate::error::ProviderError;
use crate::reported::{ReportedUsage, reported_usage};
use crate::sse::Event;

/// Every parameter is passed on as it came.
pub fn request(model: &ModelOptions<'_>, request: &ChatRequest, stream: bool) -> HttpRequest {
    let tokens = Some(request.max_tokens.unwrap_or(model.max_tokens));
    let (max_tokens, max_completion_tokens) = match model.max_tokens_field {
        MaxTokensField::MaxTokens => (tokens, None),
        MaxTokensField::MaxCompletionTokens => (None, tokens),
    };
    let body = ChatBody {
        model: model.name,
        messages: request.messages.iter().map(MessageBody::of).collect(),
        max_tokens,
        max_completion_tokens,
        temperature: request.temperature,
        top_p: request.top_p,
        stop: &request.stop,
        n: request.n.filter(|n| *n != 1),
        tools: request.tools.iter().map(|tool| &*tool.0).collect(),
        options: Options(&request.options),
        stream,
        stream_options: stream.then_some(StreamOptions {
            include_usage: true,
        }),
    };
    HttpRequest::new("/chat/completions", &body)
}

/// Reads a whole response.
pub fn parse(body: &[u8]) -> Result<ParsedChat, ProviderError> {
    let body = body.strip_prefix("\u{feff}".as_bytes()).unwrap_or(body);
    let completion: Completion<'_> = serde_json::from_slice(body)
        .map_err(|_| ProviderError::InvalidResponse("not a chat completion in JSON"))?;
    if completion.is_error() {
        return Err(ProviderError::ReportedError);
    }
    let mut usage = completion.usage;
    let mut choices = completion.choices.unwrap_or_default();
    if choices.is_empty() {
        let reason = "a completion without choices";
        return Err(ProviderError::InvalidResponse(reason));
    }
    choices.sort_by_key(|choice| choice.index);
    let choices = choices.into_iter().map(|choice| {
        usage.update(choice.usage);
        choice.into_whole()
    });
    Ok(ParsedChat {
        choices: choices.collect::<Result<_, _>>()?,
        usage,
    })
}

/// Reads one event of a stream.
pub fn parse_event(event: &Event, progress: &mut StreamProgress) -> Result<(), ProviderError> {
    let data = event.data.trim();
    if data == "[DONE]" {
        progress.done = true;
        return Ok(());
    }
    if event.name == "error" {
        progress.usage.update(reported_usage(data.as_bytes()));
        return Err(ProviderError::ReportedError);
    }
    if data.is_empty() || event.name == "ping" {
        return Ok(());
    }
    let chunk: Completion<'_> = serde_json::from_str(data)
        .map_err(|_| ProviderError::InvalidResponse("not a chunk of a completion in JSON"))?;
    progress.usage.update(chunk.usage);
    if chunk.is_error() {
        return Err(ProviderError::ReportedError);
    }
    // The last chunk has the usage, and no choices.
    for (position, choice) in (0..).zip(chunk.choices.unwrap_or_default()) {
        progress.usage.update(choice.usage);
        choice.take_part(position, progress)?;
    }
    Ok(())
}

#[derive(Serialize)]
struct MessageBody<'a> {
    role: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<CallBody<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_call_id: Option<&'a str>,
    #[serde(flatten)]
    options: Options<'a>,
}

impl<'a> MessageBody<'a> {
    fn of(message: &'a ChatMessage) -> Self {
        let calls = message.tool_calls.iter().map(|call| CallBody {
            id: &call.id,
            kind: "function",
            function: FunctionBody {
                name: &call.name,
                arguments: &call.arguments,
            },
        });
        // A message that only calls tools has no text.
        let has_content = !message.text.is_empty() || message.tool_calls.is_empty();
        Self {
            role: message.role.name(),
            content: has_content.then_some(message.text.as_str()),
            tool_calls: calls.collect(),
            tool_call_id: message.tool_call_id.as_deref(),
            options: Options(&message.options),
        }
    }
}

#[derive(Serialize)]
struct CallBody<'a> {
    id: &'a str,
    #[serde(rename = "type")]
    kind: &'static str,
    function: FunctionBody<'a>,
}

#[derive(Serialize)]
struct FunctionBody<'a> {
    name: &'a str,
    arguments: &'a str,
}

#[derive(Serialize)]
struct StreamOptions {
    include_usage: bool,
}

/// The parameters that are passed on by their names.
struct Options<'a>(&'a [ChatOption]);

impl Serialize for Options<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|option| (&*option.name, &option.value)))
    }
}

#[derive(Serialize)]
struct ChatBody<'a> {
    model: &'a str,
    messages: Vec<MessageBody<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_tokens: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_completion_tokens: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    temperature: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_p: Option<f64>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    stop: &'a [String],
    #[serde(skip_serializing_if = "Option::is_none")]
    n: Option<u32>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tools: Vec<&'a RawValue>,
    #[serde(flatten)]
    options: Options<'a>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    stream: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    stream_options: Option<StreamOptions>,
}

/// A whole completion, a chunk of a streamed one, or an error in their place.
#[derive(Deserialize)]
struct Completion<'a> {
    #[serde(default)]
    choices: Option<Vec<Choice>>,
    #[serde(default)]
    usage: ReportedUsage,
    #[serde(default, borrow)]
    error: Option<&'a RawValue>,
    #[serde(default, borrow)]
    object: Option<&'a RawValue>,
    #[serde(default, borrow, rename = "type")]
    kind: Option<&'a RawValue>,
    #[serde(default, borrow)]
    message: Option<&'a RawValue>,
    #[serde(default, borrow)]
    detail: Option<&'a RawValue>,
}

impl Completion<'_> {
    /// Some services put an error under `error`, others in place of the object.
    fn is_error(&self) -> bool {
        let is_word = |value: Option<&RawValue>| value.is_some_and(|v| v.get() == "\"error\"");
        let is_text = |value: Option<&RawValue>| value.is_some_and(|v| v.get().starts_with('"'));
        let has_words = self.detail.is_some() || is_text(self.message);
        is_error(self.error)
            || is_word(self.object)
            || is_word(self.kind)
            || (self.choices.is_none() && has_words)
    }
}

fn is_error(value: Option<&RawValue>) -> bool {
    value.is_some_and(|value| !matches!(value.get(), "null" | "false" | "\"\""))
}

#[derive(Deserialize)]
struct Choice {
    #[serde(default)]
    index: Option<u32>,
    #[serde(default)]
    message: Option<Content>,
    #[serde(default)]
    delta: Option<Content>,
    #[serde(default)]
    finish_reason: Option<String>,
    #[serde(default)]
    logprobs: Option<Box<RawValue>>,
    #[serde(default)]
    error: Option<Box<RawValue>>,
    #[serde(default)]
    usage: ReportedUsage,
}

impl Choice {
    /// Why it ended, if it did; an error in its place.
    fn finish_reason(&self) -> Result<Option<FinishReason>, ProviderError> {
        if is_error(self.error.as_deref()) {
            return Err(ProviderError::ReportedError);
        }
        match self.finish_reason.as_deref() {
            None | Some("") => Ok(None),
            Some("error") => Err(ProviderError::ReportedError),
            Some(reason) => Ok(Some(finish_reason(reason))),
        }
    }

    fn into_whole(self) -> Result<ChatChoice, ProviderError> {
        let reason = self.finish_reason()?;
        let message = self
            .message
            .ok_or(ProviderError::InvalidResponse("a choice without a message"))?;
        let calls = message.tool_calls.unwrap_or_default();
        Ok(ChatChoice {
            text: message.content.0,
            tool_calls: calls.into_iter().map(CallPart::into_whole).collect(),
            logprobs: self.logprobs,
            finish_reason: reason.unwrap_or(FinishReason::Other),
        })
    }

    fn take_part(self, position: u32, progress: &mut StreamProgress) -> Result<(), ProviderError> {
        let reason = self.finish_reason()?;
        let delta = self.delta.unwrap_or_default();
        let calls = delta.tool_calls.unwrap_or_default();
        let calls = (0..).zip(calls);
        let calls = calls.map(|(position, call)| call.into_part(position));
        let choice = self.index.unwrap_or(position);
        progress.push(ChatDelta {
            choice,
            text: delta.content.0,
            tool_calls: calls.collect(),
            logprobs: self.logprobs,
            ..ChatDelta::default()
        })?;
        if let Some(reason) = reason {
            progress.finish(choice, reason);
        }
        Ok(())
    }
}

#[derive(Deserialize, Default)]
struct Content {
    #[serde(default)]
    content: JoinedText,
    #[serde(default)]
    tool_calls: Option<Vec<CallPart>>,
}

#[derive(Deserialize)]
struct CallPart {
    #[serde(default)]
    index: Option<u32>,
    #[serde(default)]
    id: Option<String>,
    #[serde(default)]
    function: Option<FunctionPart>,
}

#[derive(Deserialize, Default)]
struct FunctionPart {
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    arguments: Option<Box<RawValue>>,
}

impl FunctionPart {
    /// JSON in a text; some services send the JSON itself.
    fn arguments(&self) -> String {
        let json = self.arguments.as_deref().map_or("\"\"", RawValue::get);
        serde_json::from_str(json).unwrap_or_else(|_| json.to_owned())
    }
}

impl CallPart {
    fn into_whole(self) -> ToolCall {
        let function = self.function.unwrap_or_default();
        ToolCall {
            id: self.id.unwrap_or_default(),
            arguments: function.arguments(),
            name: function.name.unwrap_or_default(),
        }
    }

    fn into_part(self, position: u32) -> ToolCallDelta {
        let function = self.function.unwrap_or_default();
        ToolCallDelta {
            index: self.index.unwrap_or(position),
            id: self.id,
            arguments: function.arguments(),
            name: function.name,
        }
    }
}

fn finish_reason(reason: &str) -> FinishReason {
    match reason {
        "stop" => FinishReason::Stop,
        "length" | "max_tokens" => FinishReason::Length,
        "tool_calls" | "function_call" => FinishReason::ToolCalls,
        "content_filter" => FinishReason::ContentFilter,
        _ => FinishReason::Other,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::chat::{Role, Tool};
    use crate::dialect::Dialect;
    use crate::dialect::openai::Openai;
    use crate::dialect::tests::{MODEL, json};
    use crate::reported::TokenUsage;

    fn raw(json: &str) -> Box<RawValue> {
        RawValue::from_string(json.to_owned()).unwrap()
    }

    fn event(name: &str, data: &str) -> Event {
        Event {
            name: name.to_owned(),
            data: data.to_owned(),
        }
    }

    #[test]
    fn a_request_limits_tokens_by_the_field_that_the_service_knows() {
        let request = ChatRequest {
            max_tokens: Some(7),
            stop: vec!["x".to_owned()],
            n: Some(1),
            ..ChatRequest::from_prompt("a")
        };
        let body = json(Openai.chat_request(&MODEL, &request, false));
        let expected = serde_json::json!({
            "model": "big", "max_tokens": 7, "stop": ["x"],
            "messages": [{"role": "user", "content": "a"}],
        });
        assert_eq!(body, expected);
        let reasoning = ModelOptions {
            max_tokens_field: MaxTokensField::MaxCompletionTokens,
            ..MODEL
        };
        let body = json(Openai.chat_request(&reasoning, &request, true));
        let expected = serde_json::json!({
            "model": "big", "max_completion_tokens": 7, "stop": ["x"],
            "messages": [{"role": "user", "content": "a"}],
            "stream": true, "stream_options": {"include_usage": true},
        });
        assert_eq!(body, expected);
    }

    #[test]
    fn tools_and_parameters_are_passed_on_as_they_came() {
        let option = |name: &'static str, value| ChatOption {
            name: name.into(),
            value: raw(value),
        };
        let mut request = ChatRequest {
            n: Some(2),
            tools: vec![Tool(raw(r#"{"type":"function","function":{"name":"f"}}"#))],
            options: vec![option("seed", "7"), option("logit_bias", r#"{"5":-1.5}"#)],
            ..ChatRequest::from_prompt("a")
        };
        request.messages[0].options = vec![option("name", "\"anna\"")];
        request.messages.push(ChatMessage {
            tool_calls: vec![ToolCall {
                id: "1".to_owned(),
                name: "f".to_owned(),
                arguments: "{}".to_owned(),
            }],
            ..ChatMessage::new(Role::Assistant, "")
        });
        request.messages.push(ChatMessage {
            tool_call_id: Some("1".to_owned()),
            ..ChatMessage::new(Role::Tool, "b")
        });
        let body = json(Openai.chat_request(&MODEL, &request, false));
        let call = serde_json::json!({"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}});
        let expected = serde_json::json!({
            "model": "big", "max_tokens": 1024, "n": 2, "seed": 7, "logit_bias": {"5": -1.5},
            "tools": [{"type": "function", "function": {"name": "f"}}],
            "messages": [
                {"role": "user", "content": "a", "name": "anna"},
                {"role": "assistant", "tool_calls": [call]},
                {"role": "tool", "content": "b", "tool_call_id": "1"},
            ],
        });
        assert_eq!(body, expected);
    }

    #[test]
    fn a_stream_has_texts_reasons_and_usage() {
        let mut progress = StreamProgress::default();
        for data in [
            r#"{"choices":null,"usage":null}"#,
            r#"{"choices":[{"delta":{"role":"assistant","content":""}}]}"#,
            r#"{"choices":[{"delta":{"content":[{"type":"text","text":"Hel"}]}}]}"#,
            r#"{"choices":[{"index":1,"delta":{"content":"lo"},"finish_reason":"length"}]}"#,
            r#"{"choices":[{"index":0,"delta":null,"finish_reason":"stop"}]}"#,
        ] {
            assert!(!progress.is_complete(), "{data}");
            let parsed = parse_event(&event("", data), &mut progress);
            assert_eq!(parsed, Ok(()), "{data}");
        }
        assert!(progress.is_complete() && !progress.done);
        let usage = r#"{"choices":[],"usage":{"prompt_tokens":3.0,"completion_tokens":2}}"#;
        for data in [usage, "", "[DONE]"] {
            parse_event(&event("", data), &mut progress).unwrap();
        }
        let parts = progress.parts.iter();
        let parts: Vec<_> = parts
            .map(|part| (part.choice, part.text.as_str()))
            .collect();
        assert_eq!(parts, [(0, "Hel"), (1, "lo")]);
        let reasons = [
            (0, Some(FinishReason::Stop)),
            (1, Some(FinishReason::Length)),
        ];
        assert_eq!(progress.choices, BTreeMap::from(reasons));
        let usage = progress.usage.or_estimate(TokenUsage::default());
        assert_eq!((usage.prompt_tokens, usage.completion_tokens), (3, 2));
        assert!(progress.done);
    }

    #[test]
    fn tool_calls_come_whole_and_in_parts() {
        let text = r#"{"choices":[{"message":{"content":null,"tool_calls":[
            {"id":"1","type":"function","function":{"name":"f","arguments":"{\"a\":1}"}},
            {"id":"2","function":{"name":"g","arguments":{"b":2}}}]},"finish_reason":"tool_calls"}]}"#;
        let parsed = parse(text.as_bytes()).unwrap();
        let choice = &parsed.choices[0];
        let calls = choice.tool_calls.iter();
        let calls: Vec<_> = calls
            .map(|call| (&*call.id, &*call.name, &*call.arguments))
            .collect();
        assert_eq!(calls, [("1", "f", "{\"a\":1}"), ("2", "g", "{\"b\":2}")]);
        assert_eq!(choice.finish_reason, FinishReason::ToolCalls);
        let mut progress = StreamProgress::default();
        for data in [
            r#"{"choices":[{"delta":{"tool_calls":[{"index":1,"id":"2","function":{"name":"g","arguments":""}}]}}]}"#,
            r#"{"choices":[{"delta":{"tool_calls":[{"index":1,"function":{"arguments":"{}"}}]}}]}"#,
        ] {
            parse_event(&event("", data), &mut progress).unwrap();
        }
        let calls: Vec<_> = progress
            .parts
            .iter()
            .flat_map(|part| &part.tool_calls)
            .collect();
        assert_eq!(calls[0].name.as_deref(), Some("g"));
        assert_eq!((calls[1].index, &*calls[1].arguments), (1, "{}"));
    }

    #[test]
    fn an_error_is_found_wherever_it_stands() {
        for body in [
            r#"{"error":{"message":"no"}}"#,
            r#"{"error":"no","choices":[{"message":{"content":"a"}}]}"#,
            r#"{"object":"error","message":"no","code":500}"#,
            r#"{"type":"error"}"#,
            r#"{"message":"no"}"#,
            r#"{"detail":[{"loc":1}]}"#,
            r#"{"choices":[{"error":{"code":502},"message":{"content":""},"delta":{}}]}"#,
            r#"{"choices":[{"finish_reason":"error","message":{"content":"a"},"delta":{"content":"a"}}]}"#,
        ] {
            let error = Some(ProviderError::ReportedError);
            assert_eq!(parse(body.as_bytes()).err(), error, "{body}");
            let mut progress = StreamProgress::default();
            let parsed = parse_event(&event("", body), &mut progress);
            assert_eq!(parsed.err(), error, "{body}");
            assert!(progress.parts.is_empty(), "{body}");
        }
        let mut progress = StreamProgress::default();
        let named = event("error", r#"{"usage":{"prompt_tokens":3}}"#);
        assert!(parse_event(&named, &mut progress).is_err());
        assert_eq!(progress.usage.prompt_tokens, Some(3));
        for body in [
            "",
            "null",
            "<html>",
            "{}",
            r#"{"choices":[]}"#,
            r#"{"choices":[{}]}"#,
        ] {
            assert!(parse(body.as_bytes()).is_err(), "{body}");
        }
        assert!(parse_event(&event("", "no JSON"), &mut progress).is_err());
        assert_eq!(parse_event(&event("ping", "ping"), &mut progress), Ok(()));
    }

    #[test]
    fn a_response_that_has_no_error_is_none() {
        for body in [
            r#"{"error":null,"choices":[{"error":null,"message":{"content":"a"},"finish_reason":null}]}"#,
            r#"{"error":"","usage":null,"choices":[{"message":{"content":[{"type":"text","text":"a"}]}}]}"#,
            "\u{feff}{\"usage\":[],\"choices\":[{\"message\":{\"content\":\"a\"},\"logprobs\":null}]}",
        ] {
            let parsed = parse(body.as_bytes()).unwrap();
            assert_eq!(parsed.choices[0].text, "a", "{body}");
            assert!(!parsed.usage.is_known(), "{body}");
        }
    }
}
