//! Anthropic's Messages API.

mod request;

use http::HeaderName;
use protocol::Task;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::text::JoinedText;
use super::{Authentication, Dialect, HttpRequest, ModelOptions};
use crate::chat::{
    ChatChoice, ChatDelta, ChatRequest, FinishReason, ParsedChat, StreamProgress, ToolCall,
    ToolCallDelta,
};
use crate::error::ProviderError;
use crate::reported::{ReportedUsage, reported_usage};
use crate::sse::Event;

/// `/messages`.
#[derive(Debug)]
pub struct Anthropic;

impl Dialect for Anthropic {
    fn kind(&self) -> &'static str {
        "anthropic"
    }

    fn tasks(&self) -> &'static [Task] {
        &[Task::Generation]
    }

    fn rows_max(&self, _task: Task) -> usize {
        1
    }

    fn authentication(&self) -> Authentication {
        Authentication {
            header: HeaderName::from_static("x-api-key"),
            prefix: "",
        }
    }

    fn headers(&self) -> &'static [(&'static str, &'static str)] {
        &[("anthropic-version", "2023-06-01")]
    }

    fn chat_request(
        &self,
        model: &ModelOptions<'_>,
        request: &ChatRequest,
        stream: bool,
    ) -> Result<HttpRequest, ProviderError> {
        request::messages(model, request, stream)
    }

    fn parse_chat(&self, body: &[u8]) -> Result<ParsedChat, ProviderError> {
        let message: Message = serde_json::from_slice(body)
            .map_err(|_| ProviderError::InvalidResponse("not a message in JSON"))?;
        if message.kind.as_deref() == Some("error") || message.error.is_some() {
            return Err(ProviderError::ReportedError);
        }
        let reason = "a message without content";
        let content = message
            .content
            .ok_or(ProviderError::InvalidResponse(reason))?;
        let (mut text, mut tool_calls) = (String::new(), Vec::new());
        for block in content {
            match block.into_call() {
                Ok(call) => tool_calls.push(call),
                Err(block) => text.push_str(&block.into_text()),
            }
        }
        let choice = ChatChoice {
            text,
            tool_calls,
            logprobs: None,
            finish_reason: finish_reason(&message.stop_reason.unwrap_or_default())?,
        };
        Ok(ParsedChat {
            choices: vec![choice],
            usage: message.usage,
        })
    }

    fn parse_chat_event(
        &self,
        event: &Event,
        progress: &mut StreamProgress,
    ) -> Result<(), ProviderError> {
        let data = event.data.trim();
        if event.name == "error" {
            progress.usage.update(reported_usage(data.as_bytes()));
            return Err(ProviderError::ReportedError);
        }
        if data.is_empty() || event.name == "ping" {
            return Ok(());
        }
        // Some proxies end with OpenAI's mark.
        if data == "[DONE]" {
            progress.done = true;
            return Ok(());
        }
        let event: MessageEvent = serde_json::from_str(data)
            .map_err(|_| ProviderError::InvalidResponse("not an event of a message in JSON"))?;
        event.take_into(progress)
    }
}

/// An event of a stream: the members of all types of events.
#[derive(Deserialize)]
struct MessageEvent {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    index: u64,
    #[serde(default)]
    message: Option<MessageStart>,
    #[serde(default)]
    content_block: Option<Block>,
    #[serde(default)]
    delta: Option<Delta>,
    #[serde(default)]
    usage: ReportedUsage,
}

#[derive(Deserialize)]
struct MessageStart {
    #[serde(default)]
    usage: ReportedUsage,
}

#[derive(Deserialize)]
struct Delta {
    #[serde(default)]
    text: Option<String>,
    #[serde(default)]
    partial_json: Option<String>,
    #[serde(default)]
    stop_reason: Option<String>,
}

impl MessageEvent {
    fn take_into(self, progress: &mut StreamProgress) -> Result<(), ProviderError> {
        progress.usage.update(self.usage);
        match self.kind.as_str() {
            "message_start" => {
                let usage = self.message.map(|message| message.usage);
                progress.usage.update(usage.unwrap_or_default());
                progress.push(ChatDelta::default())
            }
            // Proxies put text here too.
            "content_block_start" => match self.content_block {
                Some(block) => begin_block(self.index, block, progress),
                None => Ok(()),
            },
            "content_block_delta" => {
                let Some(delta) = self.delta else {
                    return Ok(());
                };
                progress.push(ChatDelta::from_text(delta.text.unwrap_or_default()))?;
                match delta.partial_json {
                    Some(json) => continue_call(self.index, json, progress),
                    None => Ok(()),
                }
            }
            "message_delta" => {
                let reason = self.delta.and_then(|delta| delta.stop_reason);
                if let Some(reason) = reason {
                    progress.push(ChatDelta::default())?;
                    progress.finish(0, finish_reason(&reason)?);
                }
                Ok(())
            }
            "message_stop" => {
                progress.done = true;
                Ok(())
            }
            "error" => Err(ProviderError::ReportedError),
            // Pings, the ends of blocks, and events of later versions.
            _ => Ok(()),
        }
    }
}

/// The first part of a block: a call has its id and name there.
fn begin_block(
    number: u64,
    block: Block,
    progress: &mut StreamProgress,
) -> Result<(), ProviderError> {
    match block.into_call() {
        Ok(call) => {
            progress.tool_blocks.push(number);
            // The arguments follow; an empty object stands in their place.
            let arguments = Some(call.arguments).filter(|json| json != "{}");
            let begun = ToolCallDelta {
                index: last_call(progress),
                id: Some(call.id),
                name: Some(call.name),
                arguments: arguments.unwrap_or_default(),
            };
            push_call(progress, begun)
        }
        Err(block) => progress.push(ChatDelta::from_text(block.into_text())),
    }
}

fn continue_call(
    number: u64,
    arguments: String,
    progress: &mut StreamProgress,
) -> Result<(), ProviderError> {
    let calls = &progress.tool_blocks;
    let index = calls.iter().position(|block| *block == number);
    let index = index.and_then(|index| u32::try_from(index).ok());
    let index = index.ok_or(ProviderError::InvalidResponse(
        "arguments of a tool call that has not begun",
    ))?;
    if arguments.is_empty() {
        return Ok(());
    }
    let more = ToolCallDelta {
        index,
        arguments,
        ..ToolCallDelta::default()
    };
    push_call(progress, more)
}

/// The number of the call that began last.
fn last_call(progress: &StreamProgress) -> u32 {
    let last = progress.tool_blocks.len().saturating_sub(1);
    u32::try_from(last).unwrap_or(u32::MAX)
}

fn push_call(progress: &mut StreamProgress, call: ToolCallDelta) -> Result<(), ProviderError> {
    progress.push(ChatDelta {
        tool_calls: vec![call],
        ..ChatDelta::default()
    })
}

/// A part of a message: a text, a call of a tool, or what is neither.
#[derive(Deserialize)]
struct Block {
    #[serde(default, rename = "type")]
    kind: Option<String>,
    #[serde(default)]
    text: JoinedText,
    #[serde(default)]
    id: Option<String>,
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    input: Option<Box<RawValue>>,
}

impl Block {
    /// The call of a tool; the block itself if it is none.
    fn into_call(self) -> Result<ToolCall, Self> {
        if self.kind.as_deref() != Some("tool_use") {
            return Err(self);
        }
        let input = self.input.as_deref().map_or("{}", RawValue::get);
        Ok(ToolCall {
            arguments: input.to_owned(),
            id: self.id.unwrap_or_default(),
            name: self.name.unwrap_or_default(),
        })
    }

    /// The text; what a model thinks is none.
    fn into_text(self) -> String {
        match self.kind.as_deref() {
            None | Some("text") => self.text.0,
            Some(_) => String::new(),
        }
    }
}

#[derive(Deserialize)]
struct Message {
    #[serde(default, rename = "type")]
    kind: Option<String>,
    #[serde(default)]
    error: Option<Box<RawValue>>,
    #[serde(default)]
    content: Option<Vec<Block>>,
    #[serde(default)]
    stop_reason: Option<String>,
    #[serde(default)]
    usage: ReportedUsage,
}

fn finish_reason(reason: &str) -> Result<FinishReason, ProviderError> {
    Ok(match reason {
        "end_turn" | "stop_sequence" => FinishReason::Stop,
        "max_tokens" | "model_context_window_exceeded" => FinishReason::Length,
        "tool_use" => FinishReason::ToolCalls,
        "refusal" => FinishReason::ContentFilter,
        "error" => return Err(ProviderError::ReportedError),
        _ => FinishReason::Other,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reported::TokenUsage;

    fn read(events: &[&str]) -> Result<StreamProgress, ProviderError> {
        let mut progress = StreamProgress::default();
        for data in events {
            let event = Event {
                name: String::new(),
                data: (*data).to_owned(),
            };
            Anthropic.parse_chat_event(&event, &mut progress)?;
        }
        Ok(progress)
    }

    #[test]
    fn a_stream_has_text_a_reason_and_usage() {
        let progress = read(&[
            r#"{"type":"message_start","message":{"usage":{"input_tokens":9,"cache_read_input_tokens":2,"output_tokens":1}}}"#,
            r#"{"type":"content_block_start","index":0,"content_block":{"type":"text","text":"Hel"}}"#,
            r#"{"type":"ping"}"#,
            r#"{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"lo"}}"#,
            r#"{"type":"content_block_delta","index":0,"delta":{"type":"thinking_delta","thinking":"no"}}"#,
            r#"{"type":"content_block_start","index":1,"content_block":{"type":"thinking","text":"no"}}"#,
            r#"{"type":"content_block_stop","index":0}"#,
            r#"{"type":"message_delta","delta":{"stop_reason":"max_tokens"},"usage":{"output_tokens":7.0}}"#,
            r#"{"type":"message_stop"}"#,
        ])
        .unwrap();
        let texts: Vec<_> = progress.parts.iter().map(|part| &*part.text).collect();
        assert_eq!(texts, ["Hel", "lo"]);
        assert_eq!(progress.choices[&0], Some(FinishReason::Length));
        let usage = progress.usage.or_estimate(TokenUsage::default());
        assert_eq!((usage.prompt_tokens, usage.completion_tokens), (11, 7));
        assert!(progress.done);
    }

    #[test]
    fn tool_calls_are_numbered_by_themselves() {
        let progress = read(&[
            r#"{"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}"#,
            r#"{"type":"content_block_start","index":1,"content_block":{"type":"tool_use","id":"1","name":"f","input":{}}}"#,
            r#"{"type":"content_block_delta","index":1,"delta":{"type":"input_json_delta","partial_json":"{\"a\":"}}"#,
            r#"{"type":"content_block_start","index":2,"content_block":{"type":"tool_use","id":"2","name":"g","input":{}}}"#,
            r#"{"type":"content_block_delta","index":1,"delta":{"type":"input_json_delta","partial_json":"1}"}}"#,
            r#"{"type":"message_delta","delta":{"stop_reason":"tool_use"}}"#,
        ])
        .unwrap();
        let calls = progress.parts.iter().flat_map(|part| &part.tool_calls);
        let calls: Vec<_> = calls
            .map(|call| (call.index, call.id.as_deref(), &*call.arguments))
            .collect();
        let expected = [
            (0, Some("1"), ""),
            (0, None, "{\"a\":"),
            (1, Some("2"), ""),
            (0, None, "1}"),
        ];
        assert_eq!(calls, expected);
        assert_eq!(progress.choices[&0], Some(FinishReason::ToolCalls));
        let unknown = r#"{"type":"content_block_delta","index":1,"delta":{"partial_json":"1"}}"#;
        assert!(read(&[unknown]).is_err());
    }

    #[test]
    fn a_message_has_texts_and_calls() {
        let text = r#"{"type":"message","content":[{"type":"thinking","text":"no"},{"type":"text","text":"a"},
            {"type":"tool_use","id":"1","name":"f","input":{"b": 1}},{"text":"c"}],
            "stop_reason":"tool_use","usage":null}"#;
        let parsed = Anthropic.parse_chat(text.as_bytes()).unwrap();
        let choice = &parsed.choices[0];
        assert_eq!(choice.text, "ac");
        assert_eq!(choice.tool_calls[0].arguments, "{\"b\": 1}");
        assert_eq!(choice.finish_reason, FinishReason::ToolCalls);
        for error in [
            r#"{"type":"error","error":{"type":"overloaded_error"}}"#,
            r#"{"type":"message","content":[],"stop_reason":"error"}"#,
        ] {
            let parsed = Anthropic.parse_chat(error.as_bytes()).err();
            assert_eq!(parsed, Some(ProviderError::ReportedError), "{error}");
        }
        for wrong in ["", "{}", r#"{"content":null}"#, r#"{"content":"a"}"#] {
            assert!(Anthropic.parse_chat(wrong.as_bytes()).is_err(), "{wrong}");
        }
    }
}
