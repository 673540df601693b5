//! Documents ordered by how well they answer a query: in the shape of Cohere
//! and Jina, or at `/rerank` also in that of Text Embeddings Inference.

mod document;

pub use document::Document;

use axum::Json as Answer;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Router, response::IntoResponseParts};
use protocol::{Error, Method, Task, tei::v1 as tei};
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use utoipa::openapi::schema::{ObjectBuilder, Type};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use super::ask::{self, check_texts, element, tokens};
use super::body::{self, Json, json, json_limits, must_be_json};
use super::gate::{Answered, Routes, Visit, guarded};
use super::openai::Usage;
use super::problem::{Refused, Shape};
use super::strict::strict;
use crate::route::Plan;
use crate::stack::Stack;

const RERANK: Method = Method::Rerank;
const TASKS: &[Task] = &[Task::Rerank];

/// A query and documents.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(remote = "Self", deny_unknown_fields)]
#[schema(example = json!({
    "model": "reranker", "query": "What burns in a lantern?",
    "documents": ["A candle stands in the lantern.", "The tide is low."], "top_n": 1
}))]
pub struct RerankRequest {
    /// The model; the only one that reranks if none is named.
    #[serde(default)]
    #[schema(
        min_length = 1,
        max_length = 128,
        pattern = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
    )]
    pub model: Option<String>,
    /// The query.
    #[schema(min_length = 1)]
    pub query: String,
    /// The documents. One that is too long for the model is cut.
    #[serde(deserialize_with = "body::texts")]
    #[schema(min_items = 1, max_items = 2048)]
    pub documents: Vec<Document>,
    /// How many of the best are wanted; all if not given.
    #[serde(default)]
    #[schema(minimum = 1)]
    pub top_n: Option<u32>,
    /// Whether the documents come back with their scores.
    #[serde(default)]
    pub return_documents: Option<bool>,
    /// Accepted for Cohere's clients: documents are cut at the model's own
    /// limit.
    #[serde(default)]
    #[schema(minimum = 1)]
    pub max_tokens_per_doc: Option<u32>,
}

/// The same as Text Embeddings Inference has it.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(remote = "Self", deny_unknown_fields)]
#[schema(example = json!({
    "query": "What burns in a lantern?",
    "texts": ["A candle stands in the lantern.", "The tide is low."], "return_text": true
}))]
pub struct RerankTextsRequest {
    /// The model; the only one that reranks if none is named. Andon's own.
    #[serde(default)]
    #[schema(
        min_length = 1,
        max_length = 128,
        pattern = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
    )]
    pub model: Option<String>,
    /// The query.
    #[schema(min_length = 1)]
    pub query: String,
    /// The texts.
    #[serde(deserialize_with = "body::texts")]
    #[schema(min_items = 1, max_items = 2048)]
    #[schema(value_type = Vec<NotEmpty>)]
    pub texts: Vec<String>,
    /// Whether scores stay as the model gives them, else probabilities.
    #[serde(default)]
    pub raw_scores: Option<bool>,
    /// Whether the texts come back with their scores.
    #[serde(default)]
    pub return_text: Option<bool>,
    /// Whether a text that is too long is cut; else it is refused.
    #[serde(default)]
    pub truncate: Option<bool>,
    /// Which end of it is cut; the right one if not given.
    #[serde(default)]
    pub truncation_direction: Option<TruncationDirection>,
}

strict!(object RerankRequest, RerankTextsRequest);

/// A text of one character at least: a schema only.
#[derive(Debug)]
pub struct NotEmpty;

impl PartialSchema for NotEmpty {
    fn schema() -> RefOr<Schema> {
        let text = ObjectBuilder::new()
            .schema_type(Type::String)
            .min_length(Some(1));
        RefOr::T(text.into())
    }
}

impl ToSchema for NotEmpty {
    fn name() -> std::borrow::Cow<'static, str> {
        "Text".into()
    }
}

/// Which end of a long text is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub enum TruncationDirection {
    /// The beginning.
    #[serde(alias = "left")]
    Left,
    /// The end.
    #[serde(alias = "right")]
    Right,
}

strict!(word TruncationDirection);

/// Either form: `texts` makes it that of Text Embeddings Inference.
#[derive(Debug, ToSchema)]
#[schema(as = AnyRerankRequest)]
#[serde(untagged)]
#[allow(
    dead_code,
    reason = "it is a schema only: each form has errors of its own"
)]
pub enum AnyRequest {
    /// Cohere's and Jina's.
    Documents(RerankRequest),
    /// Text Embeddings Inference's.
    Texts(RerankTextsRequest),
}

/// Documents by their relevance.
#[derive(Debug, Serialize, ToSchema)]
pub struct RerankResponse {
    /// The request's id.
    id: String,
    /// The model.
    #[schema(example = "reranker")]
    model: String,
    /// The best first.
    results: Vec<Ranked>,
    /// What it took, as Cohere's clients read it.
    meta: Meta,
    /// What it took, as Jina's clients read it.
    usage: Usage,
}

/// The place of one document.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = RerankResult)]
pub struct Ranked {
    /// Its place in the request.
    #[schema(minimum = 0)]
    index: u32,
    /// Its relevance, from 0 to 1.
    relevance_score: f32,
    /// The document, if it was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    document: Option<RankedDocument>,
}

/// A document that was asked for.
#[derive(Debug, Serialize, ToSchema)]
pub struct RankedDocument {
    /// Its text.
    text: String,
}

/// What it took.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = RerankMeta)]
pub struct Meta {
    /// The surface.
    api_version: ApiVersion,
    /// What is counted.
    billed_units: BilledUnits,
    /// Tokens computed.
    tokens: Tokens,
}

/// The surface.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = RerankApiVersion)]
pub struct ApiVersion {
    /// `1` or `2`.
    version: &'static str,
}

/// What is counted.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = RerankBilledUnits)]
pub struct BilledUnits {
    /// Queries: always one.
    search_units: u32,
}

/// Tokens computed.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = RerankTokens)]
pub struct Tokens {
    /// Of the query and the documents.
    input_tokens: u64,
}

/// The place of one text, as Text Embeddings Inference has it.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = RankedText)]
pub struct Rank {
    /// Its place in the request.
    #[schema(minimum = 0)]
    index: u32,
    /// Its score.
    score: f32,
    /// The text, if it was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    text: Option<String>,
}

/// Either form of answer, by that of the request.
#[derive(Debug, ToSchema)]
#[schema(as = AnyRerankResponse)]
#[serde(untagged)]
#[allow(dead_code, reason = "it is a schema only")]
pub enum AnyResponse {
    /// Cohere's and Jina's.
    Documents(RerankResponse),
    /// Text Embeddings Inference's: the best first.
    Texts(Vec<Rank>),
}

/// Every route.
pub fn routes(stack: &Stack) -> Router<Stack> {
    let problem = Routes::new(stack, Shape::Problem)
        .callers("/rerank", post(rerank_either))
        .callers("/v2/rerank", post(rerank_v2));
    let openai = Routes::new(stack, Shape::OpenAi).callers("/v1/rerank", post(rerank_v1));
    problem.into_router().merge(openai.into_router())
}

/// Order documents by a query
///
/// As Cohere's and Jina's clients ask.
#[utoipa::path(
    post, path = "/v1/rerank", tag = "Rerank", operation_id = "rerank_v1",
    request_body = RerankRequest,
    responses((status = 200, description = "The documents, the best first", body = RerankResponse))
)]
pub async fn rerank_v1(visit: Visit, request: Json<RerankRequest>) -> Result<Response, Refused> {
    Ok(documents(&visit, request.value, "1").await?)
}

/// Order documents by a query
///
/// As Cohere's clients of version 2 ask.
#[utoipa::path(
    post, path = "/v2/rerank", tag = "Rerank", operation_id = "rerank_v2",
    request_body = RerankRequest,
    responses((status = 200, description = "The documents, the best first", body = RerankResponse))
)]
pub async fn rerank_v2(visit: Visit, request: Json<RerankRequest>) -> Result<Response, Refused> {
    Ok(documents(&visit, request.value, "2").await?)
}

/// Order documents or texts by a query
///
/// With `documents` as Cohere's and Jina's clients ask, with `texts` as those
/// of Text Embeddings Inference do; the answer has the same form.
#[utoipa::path(
    post, path = "/rerank", tag = "Rerank", operation_id = "rerank",
    request_body = AnyRequest,
    responses((status = 200, description = "The best first", body = AnyResponse))
)]
pub async fn rerank_either(
    State(stack): State<Stack>,
    visit: Visit,
    request: Request,
) -> Result<Response, Refused> {
    #[derive(Deserialize)]
    #[serde(remote = "Self")]
    struct Form {
        texts: Option<IgnoredAny>,
    }
    strict!(object Form);
    let right = must_be_json(request.headers());
    let received = body::read(request, &json_limits(&stack.0.limits)).await?;
    right?;
    let bytes = received.joined();
    let form: Form = json(&bytes)?;
    match form.texts {
        Some(_) => Ok(texts(&visit, json(&bytes)?).await?),
        None => Ok(documents(&visit, json(&bytes)?, "2").await?),
    }
}

async fn documents(
    visit: &Visit,
    request: RerankRequest,
    version: &'static str,
) -> Result<Response, Error> {
    let mut texts: Vec<String> = request.documents.into_iter().map(|d| d.0).collect();
    check_query(&request.query)?;
    check_texts("documents", &texts)?;
    if request.top_n == Some(0) {
        return Err(Error::invalid("top_n", "must be at least 1"));
    }
    if request.max_tokens_per_doc == Some(0) {
        return Err(Error::invalid("max_tokens_per_doc", "must be at least 1"));
    }
    let plan = ask::model(visit, request.model.as_deref(), TASKS)?;
    let message = tei::RerankRequest {
        query: request.query,
        texts,
        truncate: true,
        ..Default::default()
    };
    let answered = ask(visit, &plan, &message, "documents").await?;
    texts = message.texts;
    let ranks = answered.message.ranks;
    let most = request.top_n.map_or(usize::MAX, |count| count as usize);
    let results = ranks.into_iter().take(most).map(|rank| Ranked {
        index: rank.index,
        relevance_score: rank.score,
        document: (request.return_documents == Some(true)).then(|| RankedDocument {
            text: texts.get(rank.index as usize).cloned().unwrap_or_default(),
        }),
    });
    let tokens = tokens(&answered.headers);
    let response = RerankResponse {
        id: visit.id.as_str().to_owned(),
        model: plan.name().to_owned(),
        results: results.collect(),
        meta: Meta {
            api_version: ApiVersion { version },
            billed_units: BilledUnits { search_units: 1 },
            tokens: Tokens {
                input_tokens: tokens,
            },
        },
        usage: Usage::of(tokens),
    };
    Ok(sent(answered.headers, response, answered.held))
}

async fn texts(visit: &Visit, request: RerankTextsRequest) -> Result<Response, Error> {
    check_query(&request.query)?;
    check_texts("texts", &request.texts)?;
    let plan = ask::model(visit, request.model.as_deref(), TASKS)?;
    let direction = match request.truncation_direction {
        Some(TruncationDirection::Left) => tei::TruncationDirection::Left,
        _ => tei::TruncationDirection::Right,
    };
    let message = tei::RerankRequest {
        query: request.query,
        texts: request.texts,
        truncate: request.truncate.unwrap_or_default(),
        raw_scores: request.raw_scores.unwrap_or_default(),
        return_text: false,
        truncation_direction: direction.into(),
    };
    let answered = ask(visit, &plan, &message, "texts").await?;
    let ranks = answered.message.ranks.into_iter().map(|rank| Rank {
        index: rank.index,
        score: rank.score,
        text: (request.return_text == Some(true))
            .then(|| message.texts.get(rank.index as usize).cloned())
            .flatten(),
    });
    let ranks: Vec<Rank> = ranks.collect();
    Ok(sent(answered.headers, ranks, answered.held))
}

fn check_query(query: &str) -> Result<(), Error> {
    match query.is_empty() {
        true => Err(Error::invalid("query", "must not be empty")),
        false => Ok(()),
    }
}

/// Asks the model, whose words about `texts` are about the request's field.
async fn ask(
    visit: &Visit,
    plan: &Plan,
    message: &tei::RerankRequest,
    field: &'static str,
) -> Result<Answered<tei::RerankResponse>, Error> {
    let answered: Result<Answered<tei::RerankResponse>, Error> =
        ask::call(visit, RERANK, plan, message).await;
    let mut answered = answered.map_err(|error| {
        error.renamed(|at, reason| {
            (at == "texts").then(|| match element(reason) {
                Some((index, reason)) => (format!("{field}[{index}]"), reason),
                None => (field.to_owned(), reason.to_owned()),
            })
        })
    })?;
    // Outside services need not keep the order.
    let ranks = &mut answered.message.ranks;
    ranks.sort_by(|a, b| b.score.total_cmp(&a.score));
    Ok(answered)
}

/// The response, whose bytes count as in flight until it is sent.
fn sent(
    headers: impl IntoResponseParts,
    body: impl Serialize,
    held: impl Send + Sync + 'static,
) -> Response {
    guarded((headers, Answer(body)).into_response(), held)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_of_document_are_read() {
        let read: RerankRequest =
            json(br#"{"query": "q", "documents": ["a", {"text": "b"}]}"#).unwrap();
        let texts: Vec<&str> = read.documents.iter().map(|d| d.0.as_str()).collect();
        assert_eq!(texts, ["a", "b"]);
    }

    #[test]
    fn what_is_not_known_is_refused_with_its_place() {
        for (text, field) in [
            (
                &br#"{"query": "q", "documents": ["a"], "top": 1}"#[..],
                "top",
            ),
            (br#"{"query": "q", "documents": ["a", 1]}"#, "documents[1]"),
            (
                br#"{"query": "q", "documents": [{"text": "a", "title": "b"}]}"#,
                "documents[0].title",
            ),
            (br#"{"query": "q", "documents": [{}]}"#, "documents[0].text"),
            (br#"{"documents": ["a"]}"#, "query"),
            (
                br#"{"query": "q", "documents": ["a"], "top_n": -1}"#,
                "top_n",
            ),
        ] {
            let error = json::<RerankRequest>(text).unwrap_err();
            assert_eq!(error.violation().unwrap().field, field);
        }
    }

    #[test]
    fn a_document_is_left_out_unless_it_was_asked_for() {
        let ranked = Ranked {
            index: 1,
            relevance_score: 0.5,
            document: None,
        };
        let json = serde_json::to_string(&ranked).unwrap();
        assert_eq!(json, r#"{"index":1,"relevance_score":0.5}"#);
    }
}
