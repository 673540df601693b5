//! Anthropic's Messages API.

use http::HeaderName;
use protocol::Task;
use serde::{Deserialize, Serialize};

use super::{Authentication, Dialect, HttpRequest, ModelOptions};
use crate::chat::{ChatRequest, ChatResponse, FinishReason, Role, StreamProgress, TokenUsage};
use crate::error::ProviderError;
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

    /// System messages stand apart there, joined in one text.
    fn chat_request(
        &self,
        model: &ModelOptions<'_>,
        request: &ChatRequest,
        stream: bool,
    ) -> Result<HttpRequest, ProviderError> {
        let (system, messages): (Vec<_>, Vec<_>) = request
            .messages
            .iter()
            .partition(|message| message.role == Role::System);
        let system: Vec<&str> = system.iter().map(|message| message.text.as_str()).collect();
        let messages = messages.into_iter().map(|message| MessageBody {
            role: message.role.name(),
            content: &message.text,
        });
        let body = MessagesBody {
            model: model.name,
            max_tokens: request.max_tokens.unwrap_or(model.max_tokens),
            system: system.join("\n\n"),
            messages: messages.collect(),
            // The scale there ends at 1.
            temperature: request.temperature.map(|value| value.min(1.0)),
            top_p: request.top_p,
            stop_sequences: &request.stop,
            stream,
        };
        Ok(HttpRequest::new("/messages", &body))
    }

    fn parse_chat(&self, body: &[u8]) -> Result<ChatResponse, ProviderError> {
        let message: Message = serde_json::from_slice(body)
            .map_err(|_| ProviderError::InvalidResponse("not a message in JSON"))?;
        let mut usage = TokenUsage::default();
        message.usage.update(&mut usage);
        let texts = message.content.into_iter().filter_map(|block| block.text);
        Ok(ChatResponse {
            text: texts.collect(),
            finish_reason: finish_reason(&message.stop_reason.unwrap_or_default()),
            usage,
        })
    }

    fn parse_chat_event(
        &self,
        event: &Event,
        progress: &mut StreamProgress,
    ) -> Result<(), ProviderError> {
        let event: MessageEvent = serde_json::from_str(&event.data)
            .map_err(|_| ProviderError::InvalidResponse("not an event of a message in JSON"))?;
        match event {
            MessageEvent::MessageStart { message } => {
                message.usage.update(progress.usage.get_or_insert_default());
            }
            MessageEvent::ContentBlockDelta { delta } => {
                if let Some(text) = delta.text {
                    progress.push_text(text);
                }
            }
            MessageEvent::MessageDelta { delta, usage } => {
                usage.update(progress.usage.get_or_insert_default());
                if let Some(reason) = delta.stop_reason {
                    progress.finish_reason = Some(finish_reason(&reason));
                }
            }
            MessageEvent::MessageStop => progress.done = true,
            MessageEvent::Error => return Err(ProviderError::FailedMidStream),
            MessageEvent::Other => {}
        }
        Ok(())
    }
}

#[derive(Serialize)]
struct MessageBody<'a> {
    role: &'static str,
    content: &'a str,
}

#[derive(Serialize)]
struct MessagesBody<'a> {
    model: &'a str,
    max_tokens: u32,
    #[serde(skip_serializing_if = "String::is_empty")]
    system: String,
    messages: Vec<MessageBody<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    temperature: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_p: Option<f64>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    stop_sequences: &'a [String],
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    stream: bool,
}

#[derive(Deserialize, Default, Clone, Copy)]
struct MessageUsage {
    #[serde(default)]
    input_tokens: Option<u64>,
    #[serde(default)]
    cache_creation_input_tokens: Option<u64>,
    #[serde(default)]
    cache_read_input_tokens: Option<u64>,
    #[serde(default)]
    output_tokens: Option<u64>,
}

impl MessageUsage {
    fn prompt_tokens(&self) -> Option<u64> {
        let cached = [
            self.cache_creation_input_tokens,
            self.cache_read_input_tokens,
        ];
        let cached = cached.into_iter().flatten();
        Some(cached.fold(self.input_tokens?, u64::saturating_add))
    }

    /// A later count of a stream replaces an earlier one.
    fn update(&self, usage: &mut TokenUsage) {
        usage.prompt_tokens = self.prompt_tokens().unwrap_or(usage.prompt_tokens);
        usage.completion_tokens = self.output_tokens.unwrap_or(usage.completion_tokens);
    }
}

#[derive(Deserialize)]
struct ContentBlock {
    #[serde(default)]
    text: Option<String>,
}

#[derive(Deserialize)]
struct Message {
    content: Vec<ContentBlock>,
    #[serde(default)]
    stop_reason: Option<String>,
    #[serde(default)]
    usage: MessageUsage,
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum MessageEvent {
    MessageStart {
        message: MessageStart,
    },
    ContentBlockDelta {
        delta: ContentBlock,
    },
    MessageDelta {
        delta: MessageDelta,
        #[serde(default)]
        usage: MessageUsage,
    },
    MessageStop,
    Error,
    /// Pings, the borders of blocks, and events of later versions.
    #[serde(other)]
    Other,
}

#[derive(Deserialize)]
struct MessageStart {
    #[serde(default)]
    usage: MessageUsage,
}

#[derive(Deserialize)]
struct MessageDelta {
    #[serde(default)]
    stop_reason: Option<String>,
}

fn finish_reason(reason: &str) -> FinishReason {
    match reason {
        "end_turn" | "stop_sequence" => FinishReason::Stop,
        "max_tokens" | "model_context_window_exceeded" => FinishReason::Length,
        "refusal" => FinishReason::ContentFilter,
        _ => FinishReason::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chat::ChatMessage;
    use crate::dialect::tests::{MODEL, json};

    #[test]
    fn a_stream_has_text_a_reason_and_usage() {
        let mut progress = StreamProgress::default();
        for data in [
            r#"{"type":"message_start","message":{"usage":{"input_tokens":9,"cache_read_input_tokens":2,"output_tokens":1}}}"#,
            r#"{"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}"#,
            r#"{"type":"ping"}"#,
            r#"{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"Hel"}}"#,
            r#"{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"lo"}}"#,
            r#"{"type":"content_block_stop","index":0}"#,
            r#"{"type":"message_delta","delta":{"stop_reason":"max_tokens"},"usage":{"output_tokens":7}}"#,
            r#"{"type":"message_stop"}"#,
        ] {
            let event = Event {
                name: String::new(),
                data: data.to_owned(),
            };
            Anthropic.parse_chat_event(&event, &mut progress).unwrap();
        }
        assert_eq!(progress.texts, ["Hel", "lo"]);
        assert_eq!(progress.finish_reason, Some(FinishReason::Length));
        let usage = progress.usage.unwrap();
        assert_eq!((usage.prompt_tokens, usage.completion_tokens), (11, 7));
        assert!(progress.done);
    }

    #[test]
    fn system_messages_stand_apart() {
        let mut request = ChatRequest::from_prompt("a");
        let system = ChatMessage {
            role: Role::System,
            text: "be kind".to_owned(),
        };
        request.messages.insert(0, system);
        let body = json(Anthropic.chat_request(&MODEL, &request, false));
        let expected = serde_json::json!({
            "model": "big", "max_tokens": 1024, "system": "be kind",
            "messages": [{"role": "user", "content": "a"}],
        });
        assert_eq!(body, expected);
    }
}
