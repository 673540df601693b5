//! The shape of Cohere's version 2: embeddings, and the rerank that others
//! have taken over.

use serde::{Deserialize, Serialize};

use super::catalogue::Model;
use super::client::Outgoing;
use super::openai::{Embedded, Vector, checked};

#[derive(Serialize)]
struct EmbedRequest<'a> {
    model: &'a str,
    texts: &'a [String],
    input_type: &'a str,
    embedding_types: [&'static str; 1],
    truncate: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    output_dimension: Option<usize>,
}

/// The call for embeddings. A text that is too long is refused, as by a local
/// model, unless the caller lets it be cut.
pub fn embedding(
    model: &Model,
    texts: &[String],
    dimensions: Option<usize>,
    truncate: bool,
) -> Outgoing {
    let body = EmbedRequest {
        model: &model.model,
        texts,
        input_type: &model.input_type,
        embedding_types: ["float"],
        truncate: if truncate { "END" } else { "NONE" },
        output_dimension: dimensions,
    };
    Outgoing::new("/embed", &body)
}

#[derive(Deserialize, Default)]
struct Billed {
    #[serde(default)]
    input_tokens: f64,
    #[serde(default)]
    search_units: f64,
}

#[derive(Deserialize, Default)]
struct Meta {
    #[serde(default)]
    billed_units: Billed,
}

/// Reads embeddings of so many texts.
pub fn read_embedding(bytes: &[u8], texts: usize) -> Result<Embedded, &'static str> {
    #[derive(Deserialize)]
    struct Vectors {
        float: Vec<Vector>,
    }
    #[derive(Deserialize)]
    struct Response {
        embeddings: Vectors,
        #[serde(default)]
        meta: Meta,
    }
    let answer: Response = serde_json::from_slice(bytes).map_err(|_| "no embeddings in JSON")?;
    let vectors: Vec<Vec<f32>> = answer.embeddings.float.into_iter().map(|v| v.0).collect();
    if vectors.len() != texts {
        return Err("another number of embeddings than of texts");
    }
    Ok(Embedded {
        vectors: checked(vectors)?,
        tokens: count(answer.meta.billed_units.input_tokens),
    })
}

#[derive(Serialize)]
struct RerankRequest<'a> {
    model: &'a str,
    query: &'a str,
    documents: &'a [String],
    top_n: usize,
}

/// The call for the scores of texts.
pub fn rerank(model: &Model, query: &str, texts: &[String]) -> Outgoing {
    let body = RerankRequest {
        model: &model.model,
        query,
        documents: texts,
        top_n: texts.len(),
    };
    Outgoing::new("/rerank", &body)
}

/// Scores in the order of their texts, all finite.
#[derive(Debug, Default, PartialEq)]
pub struct Scored {
    /// One for each text.
    pub scores: Vec<f32>,
    /// Tokens that were read, where the service says so.
    pub tokens: u64,
    /// Searches that are paid for.
    pub searches: u64,
}

/// Reads the scores of so many texts.
pub fn read_rerank(bytes: &[u8], texts: usize) -> Result<Scored, &'static str> {
    #[derive(Deserialize)]
    struct Item {
        index: usize,
        relevance_score: f32,
    }
    #[derive(Deserialize, Default)]
    struct Used {
        #[serde(default)]
        total_tokens: u64,
    }
    #[derive(Deserialize)]
    struct Response {
        results: Vec<Item>,
        #[serde(default)]
        meta: Option<Meta>,
        #[serde(default)]
        usage: Option<Used>,
    }
    let answer: Response = serde_json::from_slice(bytes).map_err(|_| "no scores in JSON")?;
    if answer.results.len() != texts {
        return Err("another number of scores than of texts");
    }
    let mut scores = vec![f32::NAN; texts];
    for item in answer.results {
        let own = scores.get_mut(item.index).ok_or("a score of no text")?;
        *own = item.relevance_score;
    }
    // A text without a score is found here too.
    if scores.iter().any(|score| !score.is_finite()) {
        return Err("a score that is no number, or none");
    }
    let billed = answer.meta.unwrap_or_default().billed_units;
    let tokens = answer.usage.unwrap_or_default().total_tokens;
    Ok(Scored {
        scores,
        tokens: tokens.max(count(billed.input_tokens)),
        searches: count(billed.search_units).max(1),
    })
}

/// A count that a service writes as any number; the cast keeps within bounds.
fn count(number: f64) -> u64 {
    number.ceil() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_stand_in_the_order_of_their_texts() {
        let text = r#"{"results":[{"index":1,"relevance_score":0.9},{"index":0,"relevance_score":0.25}],"meta":{"billed_units":{"search_units":2}}}"#;
        let read = read_rerank(text.as_bytes(), 2).unwrap();
        assert_eq!((read.scores, read.searches), (vec![0.25, 0.9], 2));
        for wrong in [
            "{}",
            r#"{"results":[]}"#,
            r#"{"results":[{"index":0,"relevance_score":1},{"index":0,"relevance_score":1}]}"#,
            r#"{"results":[{"index":0,"relevance_score":1},{"index":2,"relevance_score":1}]}"#,
            r#"{"results":[{"index":0,"relevance_score":1},{"index":1,"relevance_score":null}]}"#,
        ] {
            assert!(read_rerank(wrong.as_bytes(), 2).is_err(), "{wrong}");
        }
    }

    #[test]
    fn embeddings_are_read() {
        let text =
            r#"{"embeddings":{"float":[[1,2],[3,4]]},"meta":{"billed_units":{"input_tokens":6}}}"#;
        let read = read_embedding(text.as_bytes(), 2).unwrap();
        assert_eq!((read.vectors.len(), read.tokens), (2, 6));
        assert!(read_embedding(text.as_bytes(), 3).is_err());
    }
}
