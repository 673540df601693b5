//! The shape of OpenAI's API, which vLLM, Ollama, another Andon and many hosted
//! services have too.

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::de::{self, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::catalogue::{MaxTokensField, Model};
use super::chat::{ChatAnswer, ChatRequest, ChatUsage, Finish};
use super::client::Outgoing;
use super::sse::Event;
use super::stream::Progress;
use super::trouble::Trouble;

/// Dimensions of one embedding.
const WIDTH_MAX: usize = 65_536;

/// Vectors in the order of their texts, all finite.
#[derive(Debug, Default, PartialEq)]
pub struct Embedded {
    /// One for each text.
    pub vectors: Vec<Vec<f32>>,
    /// Tokens that were read.
    pub tokens: u64,
}

#[derive(Serialize)]
struct EmbeddingRequest<'a> {
    model: &'a str,
    input: &'a [String],
    #[serde(skip_serializing_if = "Option::is_none")]
    dimensions: Option<usize>,
}

/// The call for embeddings. It does not name a format, since some services
/// know only one; both are read.
pub fn embedding(model: &Model, texts: &[String], dimensions: Option<usize>) -> Outgoing {
    let body = EmbeddingRequest {
        model: &model.model,
        input: texts,
        dimensions,
    };
    Outgoing::new("/embeddings", &body)
}

/// Reads embeddings of so many texts.
pub fn read_embedding(bytes: &[u8], texts: usize) -> Result<Embedded, &'static str> {
    #[derive(Deserialize)]
    struct Item {
        embedding: Vector,
        index: Option<usize>,
    }
    #[derive(Deserialize, Default)]
    struct Used {
        #[serde(default)]
        prompt_tokens: u64,
    }
    #[derive(Deserialize)]
    struct Response {
        data: Vec<Item>,
        #[serde(default)]
        usage: Option<Used>,
    }
    let answer: Response = serde_json::from_slice(bytes).map_err(|_| "no embeddings in JSON")?;
    let mut vectors = vec![Vec::new(); texts];
    if answer.data.len() != texts {
        return Err("another number of embeddings than of texts");
    }
    for (place, item) in answer.data.into_iter().enumerate() {
        let own = vectors.get_mut(item.index.unwrap_or(place));
        let own = own.ok_or("an embedding of no text")?;
        if !own.is_empty() {
            return Err("two embeddings of one text");
        }
        *own = item.embedding.0;
    }
    Ok(Embedded {
        vectors: checked(vectors)?,
        tokens: answer.usage.unwrap_or_default().prompt_tokens,
    })
}

/// Vectors that are all finite, of one width and not empty.
pub fn checked(vectors: Vec<Vec<f32>>) -> Result<Vec<Vec<f32>>, &'static str> {
    let width = vectors.first().map_or(0, Vec::len);
    if vectors.iter().any(|vector| vector.len() != width) {
        return Err("embeddings of several widths");
    }
    if width == 0 {
        return Err("an embedding without numbers");
    }
    if vectors.iter().flatten().any(|value| !value.is_finite()) {
        return Err("an embedding with a number that is none");
    }
    Ok(vectors)
}

/// A vector as numbers, or as little-endian FP32 in base64.
#[derive(Debug)]
pub struct Vector(pub Vec<f32>);

impl<'de> Deserialize<'de> for Vector {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Reader;

        impl<'de> Visitor<'de> for Reader {
            type Value = Vector;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("numbers or base64")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut numbers: A) -> Result<Vector, A::Error> {
                let mut vector = Vec::new();
                while let Some(number) = numbers.next_element::<f32>()? {
                    if vector.len() == WIDTH_MAX {
                        return Err(de::Error::custom("too many numbers"));
                    }
                    vector.push(number);
                }
                Ok(Vector(vector))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Vector, E> {
                let bytes = STANDARD.decode(text).map_err(de::Error::custom)?;
                let (chunks, rest) = bytes.as_chunks::<4>();
                if !rest.is_empty() || chunks.len() > WIDTH_MAX {
                    return Err(de::Error::custom("no FP32 in base64"));
                }
                Ok(Vector(
                    chunks.iter().map(|b| f32::from_le_bytes(*b)).collect(),
                ))
            }
        }
        from.deserialize_any(Reader)
    }
}

#[derive(Serialize)]
struct Said<'a> {
    role: &'static str,
    content: &'a str,
}

#[derive(Serialize)]
struct StreamOptions {
    include_usage: bool,
}

#[derive(Serialize)]
struct Asked<'a> {
    model: &'a str,
    messages: Vec<Said<'a>>,
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
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    stream: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    stream_options: Option<StreamOptions>,
}

/// The call for the continuation of a conversation.
pub fn chat(model: &Model, request: &ChatRequest, stream: bool) -> Outgoing {
    let tokens = Some(request.max_tokens.unwrap_or(model.max_tokens));
    let (max_tokens, max_completion_tokens) = match model.max_tokens_field {
        MaxTokensField::MaxTokens => (tokens, None),
        MaxTokensField::MaxCompletionTokens => (None, tokens),
    };
    let messages = request.messages.iter().map(|message| Said {
        role: message.role.name(),
        content: &message.text,
    });
    let body = Asked {
        model: &model.model,
        messages: messages.collect(),
        max_tokens,
        max_completion_tokens,
        temperature: request.temperature,
        top_p: request.top_p,
        stop: &request.stop,
        stream,
        stream_options: stream.then_some(StreamOptions {
            include_usage: true,
        }),
    };
    Outgoing::new("/chat/completions", &body)
}

#[derive(Deserialize, Default)]
struct Used {
    #[serde(default)]
    prompt_tokens: u64,
    #[serde(default)]
    completion_tokens: u64,
}

impl From<Used> for ChatUsage {
    fn from(used: Used) -> Self {
        Self {
            prompt_tokens: used.prompt_tokens,
            completion_tokens: used.completion_tokens,
        }
    }
}

#[derive(Deserialize, Default)]
struct Content {
    #[serde(default)]
    content: Option<String>,
}

#[derive(Deserialize)]
struct Choice {
    #[serde(default)]
    message: Option<Content>,
    #[serde(default)]
    delta: Option<Content>,
    #[serde(default)]
    finish_reason: Option<String>,
}

#[derive(Deserialize)]
struct Answered {
    #[serde(default)]
    choices: Vec<Choice>,
    #[serde(default)]
    usage: Option<Used>,
    #[serde(default)]
    error: Option<de::IgnoredAny>,
}

fn finish(reason: &str) -> Finish {
    match reason {
        "stop" => Finish::Stop,
        "length" => Finish::Length,
        "content_filter" => Finish::Filter,
        _ => Finish::Other,
    }
}

/// Reads a whole answer.
pub fn read_chat(bytes: &[u8]) -> Result<ChatAnswer, &'static str> {
    let answer: Answered = serde_json::from_slice(bytes).map_err(|_| "no completion in JSON")?;
    let choice = answer.choices.into_iter().next();
    let choice = choice.ok_or("a completion without choices")?;
    let message = choice.message.ok_or("a choice without a message")?;
    let reason = choice.finish_reason.unwrap_or_default();
    Ok(ChatAnswer {
        text: message.content.unwrap_or_default(),
        finish: finish(&reason),
        usage: answer.usage.unwrap_or_default().into(),
    })
}

/// Reads one event of a stream.
pub fn step(event: &Event, progress: &mut Progress) -> Result<(), Trouble> {
    if event.data.trim() == "[DONE]" {
        progress.done = true;
        return Ok(());
    }
    let answer: Answered = serde_json::from_str(&event.data)
        .map_err(|_| Trouble::Garbage("no part of a completion"))?;
    if answer.error.is_some() {
        return Err(Trouble::Failed);
    }
    if let Some(used) = answer.usage {
        progress.usage = Some(used.into());
    }
    // The last part has the usage, and no choices.
    if let Some(choice) = answer.choices.into_iter().next() {
        if let Some(text) = choice.delta.and_then(|delta| delta.content) {
            progress.say(text);
        }
        if let Some(reason) = choice.finish_reason {
            progress.finish = Some(finish(&reason));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn embeddings_stand_in_the_order_of_their_texts() {
        let text = r#"{"data":[{"index":1,"embedding":"AACAPwAAAEA="},{"index":0,"embedding":[0.1,2e-3]}],"usage":{"prompt_tokens":5}}"#;
        let read = read_embedding(text.as_bytes(), 2).unwrap();
        assert_eq!(read.vectors, [[0.1, 2e-3], [1.0, 2.0]]);
        assert_eq!(read.tokens, 5);
    }

    #[test]
    fn what_are_no_embeddings_is_refused() {
        for text in [
            "",
            "null",
            r#"{"data":[]}"#,
            r#"{"data":[{"embedding":[1]},{"embedding":[2]}]}"#,
            r#"{"data":[{"embedding":[]}]}"#,
            r#"{"data":[{"embedding":[NaN]}]}"#,
            r#"{"data":[{"embedding":[null]}]}"#,
            r#"{"data":[{"embedding":[1e39]}]}"#,
            r#"{"data":[{"embedding":[1e999]}]}"#,
            r#"{"data":[{"embedding":"AADAfw=="}]}"#,
            r#"{"data":[{"embedding":"AADA"}]}"#,
            r#"{"data":[{"index":1,"embedding":[1]}]}"#,
        ] {
            assert!(read_embedding(text.as_bytes(), 1).is_err(), "{text}");
        }
        let twice = r#"{"data":[{"index":0,"embedding":[1]},{"index":0,"embedding":[1]}]}"#;
        assert!(read_embedding(twice.as_bytes(), 2).is_err());
        let widths = r#"{"data":[{"embedding":[1]},{"embedding":[1,2]}]}"#;
        assert!(read_embedding(widths.as_bytes(), 2).is_err());
    }

    proptest! {
        #[test]
        fn numbers_keep_their_bits(values in proptest::collection::vec(-1e30f32..1e30, 1..20)) {
            let text = serde_json::json!({"data": [{"embedding": values}]}).to_string();
            // As a service writes them that keeps them as FP32.
            let own = serde_json::to_string(&values).unwrap();
            let own = format!("{{\"data\":[{{\"embedding\":{own}}}]}}");
            for text in [text, own] {
                let read = read_embedding(text.as_bytes(), 1).unwrap();
                prop_assert_eq!(&read.vectors[0], &values);
            }
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = read_embedding(&bytes, 1);
            let _ = read_chat(&bytes);
        }
    }
}
