//! OpenAI's API, which vLLM, Ollama, another Andon and many hosted services
//! have too. Such services rerank as Cohere does.

use protocol::Task;
use serde::{Deserialize, Serialize, de};

use super::{Dialect, HttpRequest, ModelOptions, cohere};
use crate::chat::{ChatRequest, ChatResponse, FinishReason, StreamProgress, TokenUsage};
use crate::embedding::{EmbeddingRequest, Embeddings, JsonVector};
use crate::error::ProviderError;
use crate::rerank::{RerankRequest, RerankScores};
use crate::sse::Event;

/// `/embeddings`, `/rerank`, `/chat/completions`.
#[derive(Debug)]
pub struct Openai;

impl Dialect for Openai {
    fn kind(&self) -> &'static str {
        "openai"
    }

    fn tasks(&self) -> &'static [Task] {
        &[Task::Embedding, Task::Rerank, Task::Generation]
    }

    fn rows_max(&self, task: Task) -> usize {
        match task {
            Task::Embedding | Task::Rerank => 2048,
            _ => 1,
        }
    }

    /// Names no format of the numbers, since some services know only one; both
    /// are read.
    fn embedding_request(
        &self,
        model: &ModelOptions<'_>,
        request: &EmbeddingRequest<'_>,
    ) -> Result<HttpRequest, ProviderError> {
        let body = EmbeddingBody {
            model: model.name,
            input: request.texts,
            dimensions: request.dimensions,
        };
        Ok(HttpRequest::new("/embeddings", &body))
    }

    fn parse_embeddings(&self, body: &[u8], texts: usize) -> Result<Embeddings, ProviderError> {
        parse_embeddings(body, texts)
    }

    fn rerank_request(
        &self,
        model: &ModelOptions<'_>,
        request: &RerankRequest<'_>,
    ) -> Result<HttpRequest, ProviderError> {
        cohere::Cohere.rerank_request(model, request)
    }

    fn parse_rerank(&self, body: &[u8], texts: usize) -> Result<RerankScores, ProviderError> {
        cohere::Cohere.parse_rerank(body, texts)
    }

    fn chat_request(
        &self,
        model: &ModelOptions<'_>,
        request: &ChatRequest,
        stream: bool,
    ) -> Result<HttpRequest, ProviderError> {
        let tokens = Some(request.max_tokens.unwrap_or(model.max_tokens));
        let (max_tokens, max_completion_tokens) = match model.max_tokens_field {
            MaxTokensField::MaxTokens => (tokens, None),
            MaxTokensField::MaxCompletionTokens => (None, tokens),
        };
        let messages = request.messages.iter().map(|message| MessageBody {
            role: message.role.name(),
            content: &message.text,
        });
        let body = ChatBody {
            model: model.name,
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
        Ok(HttpRequest::new("/chat/completions", &body))
    }

    fn parse_chat(&self, body: &[u8]) -> Result<ChatResponse, ProviderError> {
        let completion: Completion = serde_json::from_slice(body)
            .map_err(|_| ProviderError::InvalidResponse("not a chat completion in JSON"))?;
        let choice = completion.choices.into_iter().next();
        let choice = choice.ok_or(ProviderError::InvalidResponse(
            "a completion without choices",
        ))?;
        let message = choice
            .message
            .ok_or(ProviderError::InvalidResponse("a choice without a message"))?;
        let reason = choice.finish_reason.unwrap_or_default();
        Ok(ChatResponse {
            text: message.content.unwrap_or_default(),
            finish_reason: finish_reason(&reason),
            usage: completion.usage.unwrap_or_default().into(),
        })
    }

    fn parse_chat_event(
        &self,
        event: &Event,
        progress: &mut StreamProgress,
    ) -> Result<(), ProviderError> {
        if event.data.trim() == "[DONE]" {
            progress.done = true;
            return Ok(());
        }
        let chunk: Completion = serde_json::from_str(&event.data)
            .map_err(|_| ProviderError::InvalidResponse("not a chunk of a completion in JSON"))?;
        if chunk.error.is_some() {
            return Err(ProviderError::FailedMidStream);
        }
        if let Some(usage) = chunk.usage {
            progress.usage = Some(usage.into());
        }
        // The last chunk has the usage, and no choices.
        if let Some(choice) = chunk.choices.into_iter().next() {
            if let Some(text) = choice.delta.and_then(|delta| delta.content) {
                progress.push_text(text);
            }
            if let Some(reason) = choice.finish_reason {
                progress.finish_reason = Some(finish_reason(&reason));
            }
        }
        Ok(())
    }
}

/// How a service of OpenAI's dialect names the limit of tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MaxTokensField {
    /// As most do.
    #[default]
    MaxTokens,
    /// As reasoning models do.
    MaxCompletionTokens,
}

#[derive(Serialize)]
struct EmbeddingBody<'a> {
    model: &'a str,
    input: &'a [String],
    #[serde(skip_serializing_if = "Option::is_none")]
    dimensions: Option<usize>,
}

fn parse_embeddings(body: &[u8], texts: usize) -> Result<Embeddings, ProviderError> {
    #[derive(Deserialize)]
    struct Item {
        embedding: JsonVector,
        index: Option<usize>,
    }
    #[derive(Deserialize, Default)]
    struct Usage {
        #[serde(default)]
        prompt_tokens: u64,
    }
    #[derive(Deserialize)]
    struct EmbeddingList {
        data: Vec<Item>,
        #[serde(default)]
        usage: Option<Usage>,
    }
    let invalid = ProviderError::InvalidResponse;
    let list: EmbeddingList =
        serde_json::from_slice(body).map_err(|_| invalid("not embeddings in JSON"))?;
    let mut vectors = vec![Vec::new(); texts];
    if list.data.len() != texts {
        return Err(invalid(
            "the number of embeddings differs from the number of texts",
        ));
    }
    for (position, item) in list.data.into_iter().enumerate() {
        let vector = vectors.get_mut(item.index.unwrap_or(position));
        let vector = vector.ok_or(invalid("the index of an embedding is out of range"))?;
        if !vector.is_empty() {
            return Err(invalid("two embeddings of one text"));
        }
        *vector = item.embedding.0;
    }
    Embeddings::checked(vectors, list.usage.unwrap_or_default().prompt_tokens)
}

#[derive(Serialize)]
struct MessageBody<'a> {
    role: &'static str,
    content: &'a str,
}

#[derive(Serialize)]
struct StreamOptions {
    include_usage: bool,
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
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    stream: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    stream_options: Option<StreamOptions>,
}

#[derive(Deserialize, Default)]
struct CompletionUsage {
    #[serde(default)]
    prompt_tokens: u64,
    #[serde(default)]
    completion_tokens: u64,
}

impl From<CompletionUsage> for TokenUsage {
    fn from(usage: CompletionUsage) -> Self {
        Self {
            prompt_tokens: usage.prompt_tokens,
            completion_tokens: usage.completion_tokens,
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

/// A whole completion, or a chunk of a streamed one.
#[derive(Deserialize)]
struct Completion {
    #[serde(default)]
    choices: Vec<Choice>,
    #[serde(default)]
    usage: Option<CompletionUsage>,
    #[serde(default)]
    error: Option<de::IgnoredAny>,
}

fn finish_reason(reason: &str) -> FinishReason {
    match reason {
        "stop" => FinishReason::Stop,
        "length" => FinishReason::Length,
        "content_filter" => FinishReason::ContentFilter,
        _ => FinishReason::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dialect::tests::{MODEL, json};
    use proptest::prelude::*;

    #[test]
    fn a_request_limits_tokens_by_the_field_that_the_service_knows() {
        let request = ChatRequest {
            max_tokens: Some(7),
            stop: vec!["x".to_owned()],
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
    fn embeddings_stand_in_the_order_of_their_texts() {
        let text = r#"{"data":[{"index":1,"embedding":"AACAPwAAAEA="},{"index":0,"embedding":[0.1,2e-3]}],"usage":{"prompt_tokens":5}}"#;
        let read = parse_embeddings(text.as_bytes(), 2).unwrap();
        assert_eq!(read.vectors, [[0.1, 2e-3], [1.0, 2.0]]);
        assert_eq!(read.tokens, 5);
    }

    #[test]
    fn a_response_that_is_no_embeddings_is_refused() {
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
            assert!(parse_embeddings(text.as_bytes(), 1).is_err(), "{text}");
        }
        let twice = r#"{"data":[{"index":0,"embedding":[1]},{"index":0,"embedding":[1]}]}"#;
        assert!(parse_embeddings(twice.as_bytes(), 2).is_err());
        let widths = r#"{"data":[{"embedding":[1]},{"embedding":[1,2]}]}"#;
        assert!(parse_embeddings(widths.as_bytes(), 2).is_err());
    }

    #[test]
    fn a_stream_has_text_a_reason_and_usage() {
        let mut progress = StreamProgress::default();
        let mut parse = |data: &str| {
            let event = Event {
                name: String::new(),
                data: data.to_owned(),
            };
            Openai.parse_chat_event(&event, &mut progress)
        };
        for data in [
            r#"{"choices":[{"delta":{"role":"assistant","content":""}}]}"#,
            r#"{"choices":[{"delta":{"content":"Hel"}}]}"#,
            r#"{"choices":[{"delta":{"content":"lo"},"finish_reason":"length"}]}"#,
            r#"{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}"#,
            "[DONE]",
        ] {
            parse(data).unwrap();
        }
        let failed = parse(r#"{"error":{"message":"no"}}"#);
        assert_eq!(failed, Err(ProviderError::FailedMidStream));
        assert!(parse("no JSON").is_err());
        assert_eq!(progress.texts, ["Hel", "lo"]);
        assert_eq!(progress.finish_reason, Some(FinishReason::Length));
        let usage = progress.usage.unwrap();
        assert_eq!((usage.prompt_tokens, usage.completion_tokens), (3, 2));
        assert!(progress.done);
    }

    proptest! {
        #[test]
        fn numbers_keep_their_bits(values in proptest::collection::vec(-1e30f32..1e30, 1..20)) {
            let text = serde_json::json!({"data": [{"embedding": values}]}).to_string();
            // As a service writes them that keeps them as FP32.
            let own = serde_json::to_string(&values).unwrap();
            let own = format!("{{\"data\":[{{\"embedding\":{own}}}]}}");
            for text in [text, own] {
                let read = parse_embeddings(text.as_bytes(), 1).unwrap();
                prop_assert_eq!(&read.vectors[0], &values);
            }
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse_embeddings(&bytes, 1);
            let _ = Openai.parse_chat(&bytes);
        }
    }
}
