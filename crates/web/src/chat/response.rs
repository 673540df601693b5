//! The response of a chat completion, whole and as events.

use gateway::stack::{ChatChoice, ChatDelta, ChatResponse, TokenUsage, ToolCall, ToolCallDelta};
use serde::Serialize;
use serde_json::value::RawValue;
use utoipa::ToSchema;

use super::super::sse;

/// A completed chat.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChatCompletion {
    /// The request's id.
    id: String,
    /// Always `chat.completion`.
    #[schema(example = "chat.completion")]
    object: &'static str,
    /// When it was created, in seconds since 1970.
    created: u64,
    /// The model.
    model: String,
    /// As many choices as were requested.
    choices: Vec<Choice>,
    /// The token usage.
    usage: ChatTokenUsage,
}

/// A generated message.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ChatChoice)]
pub struct Choice {
    /// The number of the choice, from 0.
    index: u32,
    /// The message.
    message: AssistantMessage,
    /// Why generation stopped: `stop`, `length`, `tool_calls` or
    /// `content_filter`.
    #[schema(example = "stop")]
    finish_reason: &'static str,
    /// The probabilities of the tokens, if they were requested.
    #[schema(value_type = Option<Value>)]
    logprobs: Option<Box<RawValue>>,
}

/// A generated message.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ChatAssistantMessage)]
pub struct AssistantMessage {
    /// Always `assistant`.
    #[schema(example = "assistant")]
    role: &'static str,
    /// The text; null where the model only calls tools.
    content: Option<String>,
    /// The tools that the model asks to call.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<GeneratedToolCall>,
}

/// A call of a tool that the model asks for.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ChatToolCall)]
pub struct GeneratedToolCall {
    /// The id that the result refers to.
    id: String,
    /// Always `function`.
    #[serde(rename = "type")]
    #[schema(example = "function")]
    kind: &'static str,
    /// The function.
    function: GeneratedFunction,
}

/// A function to be called.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ChatFunction)]
pub struct GeneratedFunction {
    /// Its name.
    name: String,
    /// Its arguments, JSON in a text, as the model wrote them.
    arguments: String,
}

/// Token usage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = TokenUsage)]
pub struct ChatTokenUsage {
    /// Tokens of the request's messages.
    prompt_tokens: u64,
    /// Generated tokens.
    completion_tokens: u64,
    /// Their sum.
    total_tokens: u64,
}

impl From<TokenUsage> for ChatTokenUsage {
    fn from(usage: TokenUsage) -> Self {
        Self {
            prompt_tokens: usage.prompt_tokens,
            completion_tokens: usage.completion_tokens,
            total_tokens: usage.prompt_tokens.saturating_add(usage.completion_tokens),
        }
    }
}

/// An event of a chat completion stream.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChatCompletionChunk {
    /// The request's id.
    id: String,
    /// Always `chat.completion.chunk`.
    #[schema(example = "chat.completion.chunk")]
    object: &'static str,
    /// When the stream began, in seconds since 1970.
    created: u64,
    /// The model.
    model: String,
    /// One choice; all of them in the first event, and none in that with the
    /// usage.
    choices: Vec<ChunkChoice>,
    /// The token usage, in the last event alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<ChatTokenUsage>,
}

/// The next part of a choice.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ChatChunkChoice)]
pub struct ChunkChoice {
    /// The number of the choice, from 0.
    index: u32,
    /// The next part of the message.
    delta: Delta,
    /// Why generation stopped, in the last part.
    finish_reason: Option<&'static str>,
    /// The probabilities of the part's tokens, if they were requested.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Value>)]
    logprobs: Option<Box<RawValue>>,
}

/// The next part of a message.
#[derive(Debug, Default, Serialize, ToSchema)]
#[schema(as = ChatDelta)]
pub struct Delta {
    /// `assistant`, in the first event.
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    /// The text.
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
    /// The next parts of tool calls.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<ToolCallPart>,
}

/// The next part of a tool call.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ChatToolCallDelta)]
pub struct ToolCallPart {
    /// The number of the call in its message, from 0.
    index: u32,
    /// The id that the result refers to, in the first part.
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    /// `function`, in the first part.
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    kind: Option<&'static str>,
    /// The function.
    function: FunctionPart,
}

/// The next part of a function to be called.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ChatFunctionDelta)]
pub struct FunctionPart {
    /// Its name, in the first part.
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    /// The next part of its arguments.
    arguments: String,
}

impl Choice {
    fn of(index: u32, choice: ChatChoice) -> Self {
        let calls = choice.tool_calls.into_iter().map(GeneratedToolCall::from);
        let tool_calls: Vec<_> = calls.collect();
        let has_content = !choice.text.is_empty() || tool_calls.is_empty();
        Self {
            index,
            message: AssistantMessage {
                role: "assistant",
                content: has_content.then_some(choice.text),
                tool_calls,
            },
            finish_reason: choice.finish_reason.name(),
            logprobs: choice.logprobs,
        }
    }
}

impl From<ToolCall> for GeneratedToolCall {
    fn from(call: ToolCall) -> Self {
        Self {
            id: call.id,
            kind: "function",
            function: GeneratedFunction {
                name: call.name,
                arguments: call.arguments,
            },
        }
    }
}

impl From<ToolCallDelta> for ToolCallPart {
    fn from(call: ToolCallDelta) -> Self {
        Self {
            index: call.index,
            kind: call.id.is_some().then_some("function"),
            id: call.id,
            function: FunctionPart {
                name: call.name,
                arguments: call.arguments,
            },
        }
    }
}

/// The events of a stream, and the fields of a whole response.
#[derive(Debug, Clone)]
pub struct ChunkFormat {
    /// The request's id.
    pub id: String,
    /// When the response was created, in seconds since 1970.
    pub created: u64,
    /// The model.
    pub model: String,
    /// The number of choices.
    pub choices: u32,
    /// Whether the last event has the token usage.
    pub usage: bool,
}

impl sse::EventFormat for ChunkFormat {
    type Data = ChatCompletionChunk;

    fn first(&self) -> Option<ChatCompletionChunk> {
        let choices = (0..self.choices).map(|index| {
            let delta = Delta {
                role: Some("assistant"),
                content: Some(String::new()),
                tool_calls: Vec::new(),
            };
            choice(index, delta)
        });
        Some(self.chunk(choices.collect(), None))
    }

    fn part(&self, part: ChatDelta) -> Vec<ChatCompletionChunk> {
        let mut chunks = Vec::new();
        let is_empty = part.bytes() == 0 && part.tool_calls.is_empty();
        if !is_empty || part.logprobs.is_some() {
            let delta = Delta {
                role: None,
                content: (!part.text.is_empty()).then_some(part.text),
                tool_calls: part.tool_calls.into_iter().map(Into::into).collect(),
            };
            let next = ChunkChoice {
                logprobs: part.logprobs,
                ..choice(part.choice, delta)
            };
            chunks.push(self.chunk(vec![next], None));
        }
        if let Some(finish) = part.finish_reason {
            let end = ChunkChoice {
                finish_reason: Some(finish.name()),
                ..choice(part.choice, Delta::default())
            };
            chunks.push(self.chunk(vec![end], None));
        }
        if let Some(usage) = part.usage.filter(|_| self.usage) {
            chunks.push(self.chunk(Vec::new(), Some(usage.into())));
        }
        chunks
    }

    fn last(&self) -> Option<&'static str> {
        Some("[DONE]")
    }
}

fn choice(index: u32, delta: Delta) -> ChunkChoice {
    ChunkChoice {
        index,
        delta,
        finish_reason: None,
        logprobs: None,
    }
}

impl ChunkFormat {
    /// A whole response.
    pub fn completion(self, response: ChatResponse) -> ChatCompletion {
        let choices = (0..).zip(response.choices);
        let choices = choices.map(|(index, choice)| Choice::of(index, choice));
        ChatCompletion {
            id: self.id,
            object: "chat.completion",
            created: self.created,
            model: self.model,
            choices: choices.collect(),
            usage: response.usage.into(),
        }
    }

    fn chunk(
        &self,
        choices: Vec<ChunkChoice>,
        usage: Option<ChatTokenUsage>,
    ) -> ChatCompletionChunk {
        ChatCompletionChunk {
            id: self.id.clone(),
            object: "chat.completion.chunk",
            created: self.created,
            model: self.model.clone(),
            choices,
            usage,
        }
    }
}

#[cfg(test)]
mod tests {
    use gateway::stack::FinishReason;
    use serde_json::json;

    use super::sse::EventFormat;
    use super::*;

    const USAGE: TokenUsage = TokenUsage {
        prompt_tokens: 3,
        completion_tokens: 2,
    };

    fn format(choices: u32) -> ChunkFormat {
        ChunkFormat {
            id: "chatcmpl-1".into(),
            created: 1,
            model: "a".into(),
            choices,
            usage: true,
        }
    }

    #[test]
    fn the_last_event_has_the_usage() {
        let format = format(1);
        let chunks = format.part(ChatDelta {
            finish_reason: Some(FinishReason::Stop),
            usage: Some(USAGE),
            ..ChatDelta::from_text("b")
        });
        let chunks = serde_json::to_value(&chunks).unwrap();
        assert_eq!(chunks.as_array().unwrap().len(), 3);
        assert_eq!(chunks[0]["choices"][0]["delta"], json!({"content": "b"}));
        assert_eq!(chunks[1]["choices"][0]["finish_reason"], "stop");
        assert_eq!(chunks[2]["choices"], json!([]));
        assert_eq!(chunks[2]["usage"]["total_tokens"], 5);
        let first = serde_json::to_value(format.first().unwrap()).unwrap();
        assert_eq!(first["choices"][0]["delta"]["role"], "assistant");
    }

    #[test]
    fn every_choice_has_its_number() {
        let first = serde_json::to_value(format(2).first().unwrap()).unwrap();
        assert_eq!(first["choices"][1]["index"], 1);
        let part = ChatDelta {
            choice: 1,
            ..ChatDelta::from_text("b")
        };
        let chunks = serde_json::to_value(format(2).part(part)).unwrap();
        assert_eq!(chunks[0]["choices"][0]["index"], 1);
    }

    #[test]
    fn calls_of_tools_are_written_whole_and_in_parts() {
        let call = |id: Option<&str>, arguments: &str| ToolCallDelta {
            index: 1,
            id: id.map(str::to_owned),
            name: id.map(|_| "f".to_owned()),
            arguments: arguments.to_owned(),
        };
        let written = |call: ToolCallDelta| {
            let part = ChatDelta {
                tool_calls: vec![call],
                ..ChatDelta::default()
            };
            let chunks = serde_json::to_value(format(1).part(part)).unwrap();
            chunks[0]["choices"][0]["delta"].clone()
        };
        let function = json!({"name": "f", "arguments": ""});
        let begun = json!({"index": 1, "id": "7", "type": "function", "function": function});
        assert_eq!(written(call(Some("7"), "")), json!({"tool_calls": [begun]}));
        let more = json!({"index": 1, "function": {"arguments": "{}"}});
        assert_eq!(written(call(None, "{}")), json!({"tool_calls": [more]}));
        let response = ChatResponse {
            choices: vec![ChatChoice {
                text: String::new(),
                tool_calls: vec![ToolCall {
                    id: "7".into(),
                    name: "f".into(),
                    arguments: "{}".into(),
                }],
                logprobs: None,
                finish_reason: FinishReason::ToolCalls,
            }],
            usage: USAGE,
        };
        let whole = serde_json::to_value(format(1).completion(response)).unwrap();
        let function = json!({"name": "f", "arguments": "{}"});
        let expected = json!({
            "index": 0, "finish_reason": "tool_calls", "logprobs": null,
            "message": {"role": "assistant", "content": null,
                "tool_calls": [{"id": "7", "type": "function", "function": function}]},
        });
        assert_eq!(whole["choices"][0], expected);
    }
}
