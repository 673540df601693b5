//! The shape of Anthropic's messages.

use serde::{Deserialize, Serialize};

use super::catalogue::Model;
use super::chat::{ChatAnswer, ChatRequest, ChatUsage, Finish, Role};
use super::client::Outgoing;
use super::sse::Event;
use super::stream::Progress;
use super::trouble::Trouble;

#[derive(Serialize)]
struct Said<'a> {
    role: &'static str,
    content: &'a str,
}

#[derive(Serialize)]
struct Asked<'a> {
    model: &'a str,
    max_tokens: u32,
    #[serde(skip_serializing_if = "String::is_empty")]
    system: String,
    messages: Vec<Said<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    temperature: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_p: Option<f64>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    stop_sequences: &'a [String],
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    stream: bool,
}

/// The call for the continuation of a conversation. What the system says
/// stands apart there, in one text.
pub fn chat(model: &Model, request: &ChatRequest, stream: bool) -> Outgoing {
    let (system, said): (Vec<_>, Vec<_>) = request
        .messages
        .iter()
        .partition(|message| message.role == Role::System);
    let system: Vec<&str> = system.iter().map(|message| message.text.as_str()).collect();
    let body = Asked {
        model: &model.model,
        max_tokens: request.max_tokens.unwrap_or(model.max_tokens),
        system: system.join("\n\n"),
        messages: said
            .into_iter()
            .map(|message| Said {
                role: message.role.name(),
                content: &message.text,
            })
            .collect(),
        // The scale there ends at 1.
        temperature: request.temperature.map(|value| value.min(1.0)),
        top_p: request.top_p,
        stop_sequences: &request.stop,
        stream,
    };
    Outgoing::new("/messages", &body)
}

#[derive(Deserialize, Default, Clone, Copy)]
struct Used {
    #[serde(default)]
    input_tokens: Option<u64>,
    #[serde(default)]
    cache_creation_input_tokens: Option<u64>,
    #[serde(default)]
    cache_read_input_tokens: Option<u64>,
    #[serde(default)]
    output_tokens: Option<u64>,
}

impl Used {
    fn prompt_tokens(&self) -> Option<u64> {
        let cached = [
            self.cache_creation_input_tokens,
            self.cache_read_input_tokens,
        ];
        let cached = cached.into_iter().flatten();
        Some(cached.fold(self.input_tokens?, u64::saturating_add))
    }

    /// What is said of usage replaces what was said before.
    fn added_to(&self, usage: &mut ChatUsage) {
        usage.prompt_tokens = self.prompt_tokens().unwrap_or(usage.prompt_tokens);
        usage.completion_tokens = self.output_tokens.unwrap_or(usage.completion_tokens);
    }
}

#[derive(Deserialize)]
struct Block {
    #[serde(default)]
    text: Option<String>,
}

#[derive(Deserialize)]
struct Answered {
    content: Vec<Block>,
    #[serde(default)]
    stop_reason: Option<String>,
    #[serde(default)]
    usage: Used,
}

fn finish(reason: &str) -> Finish {
    match reason {
        "end_turn" | "stop_sequence" => Finish::Stop,
        "max_tokens" | "model_context_window_exceeded" => Finish::Length,
        "refusal" => Finish::Filter,
        _ => Finish::Other,
    }
}

/// Reads a whole answer.
pub fn read_chat(bytes: &[u8]) -> Result<ChatAnswer, &'static str> {
    let answer: Answered = serde_json::from_slice(bytes).map_err(|_| "no message in JSON")?;
    let mut usage = ChatUsage::default();
    answer.usage.added_to(&mut usage);
    let texts = answer.content.into_iter().filter_map(|block| block.text);
    Ok(ChatAnswer {
        text: texts.collect(),
        finish: finish(&answer.stop_reason.unwrap_or_default()),
        usage,
    })
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Part {
    MessageStart {
        message: Started,
    },
    ContentBlockDelta {
        delta: Block,
    },
    MessageDelta {
        delta: Ended,
        #[serde(default)]
        usage: Used,
    },
    MessageStop,
    Error,
    /// Pings, the borders of blocks, and what comes to be.
    #[serde(other)]
    Else,
}

#[derive(Deserialize)]
struct Started {
    #[serde(default)]
    usage: Used,
}

#[derive(Deserialize)]
struct Ended {
    #[serde(default)]
    stop_reason: Option<String>,
}

/// Reads one event of a stream.
pub fn step(event: &Event, progress: &mut Progress) -> Result<(), Trouble> {
    let part: Part =
        serde_json::from_str(&event.data).map_err(|_| Trouble::Garbage("no part of a message"))?;
    match part {
        Part::MessageStart { message } => {
            message
                .usage
                .added_to(progress.usage.get_or_insert_default());
        }
        Part::ContentBlockDelta { delta } => {
            if let Some(text) = delta.text {
                progress.say(text);
            }
        }
        Part::MessageDelta { delta, usage } => {
            usage.added_to(progress.usage.get_or_insert_default());
            if let Some(reason) = delta.stop_reason {
                progress.finish = Some(finish(&reason));
            }
        }
        Part::MessageStop => progress.done = true,
        Part::Error => return Err(Trouble::Failed),
        Part::Else => {}
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_has_text_a_reason_and_usage() {
        let mut progress = Progress::default();
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
            step(&event, &mut progress).unwrap();
        }
        assert_eq!(progress.texts, ["Hel", "lo"]);
        assert_eq!(progress.finish, Some(Finish::Length));
        let usage = progress.usage.unwrap();
        assert_eq!((usage.prompt_tokens, usage.completion_tokens), (11, 7));
        assert!(progress.done);
    }

    #[test]
    fn what_the_system_says_stands_apart() {
        let mut request = ChatRequest::asking("a");
        request.messages.insert(
            0,
            super::super::chat::ChatMessage {
                role: Role::System,
                text: "be kind".to_owned(),
            },
        );
        let file = "[models.m]\nkind = \"anthropic\"\nbase_url = \"http://h\"\nmodel = \"big\"\ntask = \"generation\"";
        let file = super::super::catalogue::File::read(file).unwrap();
        let sent = chat(&file.models["m"], &request, false);
        let body: serde_json::Value = serde_json::from_slice(&sent.body).unwrap();
        let wanted = serde_json::json!({
            "model": "big", "max_tokens": 1024, "system": "be kind",
            "messages": [{"role": "user", "content": "a"}],
        });
        assert_eq!(body, wanted);
    }
}
