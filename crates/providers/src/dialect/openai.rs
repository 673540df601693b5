//! OpenAI's API, which vLLM, Ollama, another Andon and many hosted services
//! have too. Such services rerank as Cohere does.

mod chat;

use protocol::Task;
use serde::{Deserialize, Serialize};

use super::{Dialect, HttpRequest, ModelOptions, cohere};
use crate::chat::{ChatRequest, ParsedChat, StreamProgress};
use crate::embedding::{EmbeddingRequest, Embeddings, JsonVector};
use crate::error::ProviderError;
use crate::reported::ReportedUsage;
use crate::rerank::{RerankRequest, RerankScores};
use crate::sse::Event;

/// `/embeddings`, `/rerank`, `/chat/completions`, and those that are passed through.
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

    fn passes_through(&self) -> bool {
        true
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
        Ok(chat::request(model, request, stream))
    }

    fn parse_chat(&self, body: &[u8]) -> Result<ParsedChat, ProviderError> {
        chat::parse(body)
    }

    fn parse_chat_event(
        &self,
        event: &Event,
        progress: &mut StreamProgress,
    ) -> Result<(), ProviderError> {
        chat::parse_event(event, progress)
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
    #[derive(Deserialize)]
    struct EmbeddingList {
        data: Vec<Item>,
        #[serde(default)]
        usage: ReportedUsage,
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
    let tokens = list.usage.prompt_tokens.or(list.usage.total_tokens);
    Embeddings::checked(vectors, tokens.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

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
    fn the_usage_of_embeddings_is_read_however_it_is_written() {
        for (usage, tokens) in [
            (r#"{"prompt_tokens":5,"total_tokens":5}"#, 5),
            (r#"{"prompt_tokens":5.0}"#, 5),
            (r#"{"prompt_tokens":null,"total_tokens":4}"#, 4),
            (r#"{"total_tokens":4}"#, 4),
            (r#"{"prompt_tokens":0,"total_tokens":4}"#, 0),
            ("null", 0),
        ] {
            let text = format!(r#"{{"data":[{{"embedding":[1]}}],"usage":{usage}}}"#);
            let read = parse_embeddings(text.as_bytes(), 1).unwrap();
            assert_eq!(read.tokens, tokens, "{usage}");
        }
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
