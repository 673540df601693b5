//! Version 2 of Cohere's API: embeddings, and the rerank that others have
//! taken over.

use protocol::Task;
use serde::{Deserialize, Serialize};

use super::{Dialect, HttpRequest, ModelOptions};
use crate::embedding::{EmbeddingRequest, Embeddings, JsonVector};
use crate::error::ProviderError;
use crate::reported::{Count, ReportedUsage};
use crate::rerank::{RerankRequest, RerankScores};

/// `/embed`, `/rerank`.
#[derive(Debug)]
pub struct Cohere;

impl Dialect for Cohere {
    fn kind(&self) -> &'static str {
        "cohere"
    }

    fn tasks(&self) -> &'static [Task] {
        &[Task::Embedding, Task::Rerank]
    }

    fn rows_max(&self, task: Task) -> usize {
        match task {
            Task::Embedding => 96,
            Task::Rerank => 1000,
            _ => 1,
        }
    }

    /// A text that is too long is refused, as by a local model, unless the
    /// caller allows truncation.
    fn embedding_request(
        &self,
        model: &ModelOptions<'_>,
        request: &EmbeddingRequest<'_>,
    ) -> Result<HttpRequest, ProviderError> {
        let body = EmbedBody {
            model: model.name,
            texts: request.texts,
            input_type: model.input_type,
            embedding_types: ["float"],
            truncate: if request.truncate { "END" } else { "NONE" },
            output_dimension: request.dimensions,
        };
        Ok(HttpRequest::new("/embed", &body))
    }

    fn parse_embeddings(&self, body: &[u8], texts: usize) -> Result<Embeddings, ProviderError> {
        #[derive(Deserialize)]
        struct EmbeddingsByType {
            float: Vec<JsonVector>,
        }
        #[derive(Deserialize)]
        struct EmbedResponse {
            embeddings: EmbeddingsByType,
            #[serde(default)]
            meta: Option<Meta>,
        }
        let response: EmbedResponse = serde_json::from_slice(body)
            .map_err(|_| ProviderError::InvalidResponse("not embeddings in JSON"))?;
        let vectors = response.embeddings.float.into_iter();
        let vectors: Vec<Vec<f32>> = vectors.map(|vector| vector.0).collect();
        if vectors.len() != texts {
            return Err(ProviderError::InvalidResponse(
                "the number of embeddings differs from the number of texts",
            ));
        }
        let tokens = response.meta.unwrap_or_default().billed().input_tokens.0;
        Embeddings::checked(vectors, tokens.unwrap_or_default())
    }

    fn rerank_request(
        &self,
        model: &ModelOptions<'_>,
        request: &RerankRequest<'_>,
    ) -> Result<HttpRequest, ProviderError> {
        let body = RerankBody {
            model: model.name,
            query: request.query,
            documents: request.texts,
            top_n: request.texts.len(),
        };
        Ok(HttpRequest::new("/rerank", &body))
    }

    fn parse_rerank(&self, body: &[u8], texts: usize) -> Result<RerankScores, ProviderError> {
        parse_rerank(body, texts)
    }
}

#[derive(Serialize)]
struct EmbedBody<'a> {
    model: &'a str,
    texts: &'a [String],
    input_type: &'a str,
    embedding_types: [&'static str; 1],
    truncate: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    output_dimension: Option<usize>,
}

#[derive(Serialize)]
struct RerankBody<'a> {
    model: &'a str,
    query: &'a str,
    documents: &'a [String],
    top_n: usize,
}

#[derive(Deserialize, Default)]
struct BilledUnits {
    #[serde(default)]
    input_tokens: Count,
    #[serde(default)]
    search_units: Count,
}

#[derive(Deserialize, Default)]
struct Meta {
    #[serde(default)]
    billed_units: Option<BilledUnits>,
}

impl Meta {
    fn billed(self) -> BilledUnits {
        self.billed_units.unwrap_or_default()
    }
}

fn parse_rerank(body: &[u8], texts: usize) -> Result<RerankScores, ProviderError> {
    #[derive(Deserialize)]
    struct Item {
        index: usize,
        relevance_score: f32,
    }
    #[derive(Deserialize)]
    struct RerankResponse {
        results: Vec<Item>,
        #[serde(default)]
        meta: Option<Meta>,
        #[serde(default)]
        usage: ReportedUsage,
    }
    let invalid = ProviderError::InvalidResponse;
    let response: RerankResponse =
        serde_json::from_slice(body).map_err(|_| invalid("not scores in JSON"))?;
    if response.results.len() != texts {
        return Err(invalid(
            "the number of scores differs from the number of texts",
        ));
    }
    let mut scores = vec![f32::NAN; texts];
    for item in response.results {
        let score = scores.get_mut(item.index);
        *score.ok_or(invalid("the index of a score is out of range"))? = item.relevance_score;
    }
    // A text without a score is found here too.
    if scores.iter().any(|score| !score.is_finite()) {
        return Err(invalid("a score that is missing or not finite"));
    }
    let billed = response.meta.unwrap_or_default().billed();
    let tokens = response.usage.total_tokens;
    Ok(RerankScores {
        scores,
        tokens: tokens.max(billed.input_tokens.0).unwrap_or_default(),
        // A service that names no searches made one.
        searches: billed.search_units.0.unwrap_or(1),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dialect::tests::{MODEL, json};

    #[test]
    fn requests_name_what_the_texts_are() {
        let texts = ["a".to_owned(), "b".to_owned()];
        let request = EmbeddingRequest {
            texts: &texts,
            dimensions: Some(2),
            truncate: true,
        };
        let expected = serde_json::json!({
            "model": "big", "texts": ["a", "b"], "input_type": "clustering",
            "embedding_types": ["float"], "truncate": "END", "output_dimension": 2,
        });
        assert_eq!(json(Cohere.embedding_request(&MODEL, &request)), expected);
        let request = RerankRequest {
            query: "q",
            texts: &texts,
        };
        let expected = serde_json::json!({
            "model": "big", "query": "q", "documents": ["a", "b"], "top_n": 2,
        });
        assert_eq!(json(Cohere.rerank_request(&MODEL, &request)), expected);
    }

    #[test]
    fn scores_stand_in_the_order_of_their_texts() {
        let text = r#"{"results":[{"index":1,"relevance_score":0.9},{"index":0,"relevance_score":0.25}],"meta":{"billed_units":{"search_units":2}}}"#;
        let read = parse_rerank(text.as_bytes(), 2).unwrap();
        assert_eq!((read.scores, read.searches), (vec![0.25, 0.9], 2));
        for wrong in [
            "{}",
            r#"{"results":[]}"#,
            r#"{"results":[{"index":0,"relevance_score":1},{"index":0,"relevance_score":1}]}"#,
            r#"{"results":[{"index":0,"relevance_score":1},{"index":2,"relevance_score":1}]}"#,
            r#"{"results":[{"index":0,"relevance_score":1},{"index":1,"relevance_score":null}]}"#,
        ] {
            assert!(parse_rerank(wrong.as_bytes(), 2).is_err(), "{wrong}");
        }
    }

    #[test]
    fn usage_that_is_missing_or_odd_spoils_no_scores() {
        for (rest, tokens, searches) in [
            ("", 0, 1),
            (r#","meta":null,"usage":null"#, 0, 1),
            (r#","meta":{"billed_units":null}"#, 0, 1),
            (
                r#","meta":{"billed_units":{"search_units":null,"input_tokens":null}}"#,
                0,
                1,
            ),
            (r#","meta":{"billed_units":{"search_units":0}}"#, 0, 0),
            (
                r#","meta":{"billed_units":{"search_units":2.0,"input_tokens":6.5}}"#,
                7,
                2,
            ),
            (r#","usage":{"total_tokens":null}"#, 0, 1),
            (r#","usage":{"total_tokens":9}"#, 9, 1),
            (r#","usage":{"total_tokens":9.0},"meta":{}"#, 9, 1),
        ] {
            let text = format!(r#"{{"results":[{{"index":0,"relevance_score":0.5}}]{rest}}}"#);
            let read = parse_rerank(text.as_bytes(), 1).unwrap();
            assert_eq!((read.tokens, read.searches), (tokens, searches), "{rest}");
        }
        let text = r#"{"embeddings":{"float":[[1]]},"meta":null}"#;
        assert_eq!(
            Cohere.parse_embeddings(text.as_bytes(), 1).unwrap().tokens,
            0
        );
    }

    #[test]
    fn embeddings_are_read() {
        let text =
            r#"{"embeddings":{"float":[[1,2],[3,4]]},"meta":{"billed_units":{"input_tokens":6}}}"#;
        let read = Cohere.parse_embeddings(text.as_bytes(), 2).unwrap();
        assert_eq!((read.vectors.len(), read.tokens), (2, 6));
        assert!(Cohere.parse_embeddings(text.as_bytes(), 3).is_err());
    }
}
