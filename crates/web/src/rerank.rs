//! Documents ranked by their relevance to a query: in the format of Cohere and
//! Jina, and at `/rerank` also in that of Text Embeddings Inference.

use std::fmt;
use std::sync::Arc;

use axum::Router;
use axum::extract::Request;
use axum::response::Response;
use axum::routing::post;
use prost::Message as _;
use protocol::{Error, Method, Segment, Task, tei::v1 as tei};
use serde::de::{self, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Serialize};
use utoipa::openapi::schema::{AdditionalProperties, ObjectBuilder, OneOfBuilder, Type};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use super::body::{self, Json, json};
use super::context::{CallResponse, RequestContext};
use super::endpoint::Endpoints;
use super::error::{ApiError, ErrorFormat};
use super::openai::Usage;
use super::reply;
use super::strict::strict;
use super::texts::{call_model, check_texts, computed_tokens, encoded, select_model};
use gateway::Plan;
use gateway::stack::Stack;

const TASKS: &[Task] = &[Task::Rerank];
/// About the length of a result without its text.
const RANKED_BYTES: usize = 64;

/// A query and documents.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(remote = "Self", deny_unknown_fields)]
#[schema(example = json!({
    "model": "reranker", "query": "What burns in a lantern?",
    "documents": ["A candle stands in the lantern.", "The tide is low."], "top_n": 1
}))]
pub struct RerankRequest {
    /// The model; optional if only one has the task rerank.
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
    /// The documents. One that is too long for the model is truncated.
    #[serde(deserialize_with = "body::texts")]
    #[schema(min_items = 1, max_items = 2048)]
    pub documents: Vec<Document>,
    /// The number of results, the most relevant first; all by default.
    #[serde(default)]
    #[schema(minimum = 1)]
    pub top_n: Option<u32>,
    /// Whether the results have the documents.
    #[serde(default)]
    pub return_documents: Option<bool>,
    /// Accepted for Cohere's clients and not used: documents are truncated at
    /// the model's limit.
    #[serde(default)]
    #[schema(minimum = 1)]
    pub max_tokens_per_doc: Option<u32>,
}

/// A query and texts, in the format of Text Embeddings Inference.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(remote = "Self", deny_unknown_fields)]
#[schema(example = json!({
    "query": "What burns in a lantern?",
    "texts": ["A candle stands in the lantern.", "The tide is low."], "return_text": true
}))]
pub struct RerankTextsRequest {
    /// The model; optional if only one has the task rerank. An extension of Andon.
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
    #[schema(value_type = Vec<NonEmptyText>)]
    pub texts: Vec<String>,
    /// Whether scores are logits instead of probabilities.
    #[serde(default)]
    pub raw_scores: Option<bool>,
    /// Whether the results have the texts.
    #[serde(default)]
    pub return_text: Option<bool>,
    /// Whether a text that is too long is truncated; it is an error otherwise.
    #[serde(default)]
    pub truncate: Option<bool>,
    /// The end that is truncated; the right one by default.
    #[serde(default)]
    pub truncation_direction: Option<TruncationDirection>,
}

strict!(object RerankRequest, RerankTextsRequest);

/// The text of a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document(pub String);

impl<'de> Deserialize<'de> for Document {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(DocumentVisitor)
    }
}

struct DocumentVisitor;

impl<'de> Visitor<'de> for DocumentVisitor {
    type Value = Document;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a string or an object with `text`")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Document, E> {
        Ok(Document(text.to_owned()))
    }

    fn visit_string<E: de::Error>(self, text: String) -> Result<Document, E> {
        Ok(Document(text))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Document, A::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Object {
            text: String,
        }
        let object = Object::deserialize(de::value::MapAccessDeserializer::new(map))?;
        Ok(Document(object.text))
    }
}

impl PartialSchema for Document {
    fn schema() -> RefOr<Schema> {
        let text = || {
            ObjectBuilder::new()
                .schema_type(Type::String)
                .min_length(Some(1))
        };
        let object = ObjectBuilder::new()
            .property("text", text().description(Some("The text")))
            .required("text")
            .additional_properties(Some(AdditionalProperties::<Schema>::FreeForm(false)));
        let one_of = OneOfBuilder::new()
            .description(Some("A text, or an object with a text"))
            .item(text())
            .item(object);
        RefOr::T(Schema::from(one_of))
    }
}

impl ToSchema for Document {
    fn name() -> std::borrow::Cow<'static, str> {
        "RerankDocument".into()
    }
}

/// The schema of a text with at least one character.
#[derive(Debug)]
pub struct NonEmptyText;

impl PartialSchema for NonEmptyText {
    fn schema() -> RefOr<Schema> {
        let text = ObjectBuilder::new()
            .schema_type(Type::String)
            .min_length(Some(1));
        RefOr::T(text.into())
    }
}

impl ToSchema for NonEmptyText {
    fn name() -> std::borrow::Cow<'static, str> {
        "Text".into()
    }
}

/// The end of a text that is truncated.
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

/// Either format: `texts` makes it that of Text Embeddings Inference.
#[derive(Debug, ToSchema)]
#[schema(as = AnyRerankRequest)]
#[serde(untagged)]
#[allow(
    dead_code,
    reason = "it is a schema only: each format has errors of its own"
)]
pub enum AnyRequest {
    /// Cohere's and Jina's format.
    Documents(RerankRequest),
    /// The format of Text Embeddings Inference.
    Texts(RerankTextsRequest),
}

/// Ranked documents.
#[derive(Debug, Serialize, ToSchema)]
pub struct RerankResponse {
    /// The request's id.
    id: String,
    /// The model.
    #[schema(example = "reranker")]
    model: String,
    /// The most relevant document first.
    results: Vec<RankedIndex>,
    /// Usage in Cohere's format.
    meta: Meta,
    /// Usage in Jina's format.
    usage: Usage,
}

/// The relevance of one document.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = RerankResult)]
pub struct RankedIndex {
    /// The index of the document in the request.
    #[schema(minimum = 0)]
    index: u32,
    /// The relevance score, from 0 to 1 unless the model's settings say otherwise.
    relevance_score: f32,
    /// The document, with `return_documents`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    document: Option<RankedDocument>,
}

/// A document of the request.
#[derive(Debug, Serialize, ToSchema)]
pub struct RankedDocument {
    /// Its text.
    text: String,
}

/// Usage.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = RerankMeta)]
pub struct Meta {
    /// The version of the API.
    api_version: ApiVersion,
    /// The billed units.
    billed_units: BilledUnits,
    /// The computed tokens.
    tokens: Tokens,
}

/// The version of the API.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = RerankApiVersion)]
pub struct ApiVersion {
    /// `1` or `2`.
    version: &'static str,
}

/// Billed units.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = RerankBilledUnits)]
pub struct BilledUnits {
    /// The number of queries: always 1.
    search_units: u32,
}

/// Computed tokens.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = RerankTokens)]
pub struct Tokens {
    /// Tokens of the query and the documents.
    input_tokens: u64,
}

/// The relevance of one text, in the format of Text Embeddings Inference.
#[derive(Debug, Serialize, ToSchema)]
pub struct RankedText {
    /// The index of the text in the request.
    #[schema(minimum = 0)]
    index: u32,
    /// The score.
    score: f32,
    /// The text, with `return_text`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    text: Option<String>,
}

/// Either format, that of the request.
#[derive(Debug, ToSchema)]
#[schema(as = AnyRerankResponse)]
#[serde(untagged)]
#[allow(dead_code, reason = "it is a schema only")]
pub enum AnyResponse {
    /// Cohere's and Jina's format.
    Documents(RerankResponse),
    /// The format of Text Embeddings Inference, the most relevant text first.
    Texts(Vec<RankedText>),
}

/// The endpoints.
pub fn routes(stack: &Stack) -> Router<Stack> {
    let problem = Endpoints::new(stack, ErrorFormat::Problem)
        .authenticated("/rerank", post(rerank_either))
        .authenticated("/v2/rerank", post(rerank_v2));
    let openai =
        Endpoints::new(stack, ErrorFormat::OpenAi).authenticated("/v1/rerank", post(rerank_v1));
    problem.into_router().merge(openai.into_router())
}

/// Rerank documents
///
/// In the format of Cohere's API, version 1, and of Jina's.
#[utoipa::path(
    post, path = "/v1/rerank", tag = "Rerank", operation_id = "rerank_v1",
    request_body = RerankRequest,
    responses((status = 200, description = "The ranked documents, the most relevant first", body = RerankResponse))
)]
pub async fn rerank_v1(
    context: RequestContext,
    request: Json<RerankRequest>,
) -> Result<Response, ApiError> {
    Ok(rerank_documents(&context, request.value, "1").await?)
}

/// Rerank documents (version 2)
///
/// In the format of Cohere's API, version 2.
#[utoipa::path(
    post, path = "/v2/rerank", tag = "Rerank", operation_id = "rerank_v2",
    request_body = RerankRequest,
    responses((status = 200, description = "The ranked documents, the most relevant first", body = RerankResponse))
)]
pub async fn rerank_v2(
    context: RequestContext,
    request: Json<RerankRequest>,
) -> Result<Response, ApiError> {
    Ok(rerank_documents(&context, request.value, "2").await?)
}

/// Rerank documents or texts
///
/// With `documents` in the format of Cohere and Jina, with `texts` in that of
/// Text Embeddings Inference; the response has the format of the request.
#[utoipa::path(
    post, path = "/rerank", tag = "Rerank", operation_id = "rerank",
    request_body = AnyRequest,
    responses((status = 200, description = "The ranked documents or texts, the most relevant first", body = AnyResponse))
)]
pub async fn rerank_either(
    context: RequestContext,
    request: Request,
) -> Result<Response, ApiError> {
    #[derive(Deserialize)]
    #[serde(remote = "Self")]
    struct FormatProbe {
        texts: Option<IgnoredAny>,
    }
    strict!(object FormatProbe);
    let read = Json::read(&context, request, |bytes| {
        let probe: FormatProbe = json(bytes)?;
        match probe.texts {
            Some(_) => json(bytes).map(Either::Texts),
            None => json(bytes).map(Either::Documents),
        }
    });
    let request = read.await?;
    let response = match request.value {
        Either::Texts(request) => rerank_texts(&context, request).await?,
        Either::Documents(request) => rerank_documents(&context, request, "2").await?,
    };
    Ok(response)
}

/// A request in either format.
enum Either {
    Documents(RerankRequest),
    Texts(RerankTextsRequest),
}

async fn rerank_documents(
    context: &RequestContext,
    request: RerankRequest,
    version: &'static str,
) -> Result<Response, Error> {
    let texts: Vec<String> = request.documents.into_iter().map(|d| d.0).collect();
    check_query(&request.query)?;
    check_texts("documents", &texts)?;
    if request.top_n == Some(0) {
        return Err(Error::invalid("top_n", "must be at least 1"));
    }
    if request.max_tokens_per_doc == Some(0) {
        return Err(Error::invalid("max_tokens_per_doc", "must be at least 1"));
    }
    let plan = select_model(context, request.model.as_deref(), TASKS)?;
    let message = Arc::new(tei::RerankRequest {
        query: request.query,
        texts,
        truncate: true,
        ..Default::default()
    });
    let response = call_rerank(context, &plan, &message, "documents").await?;
    let most = request.top_n.map_or(usize::MAX, |count| count as usize);
    let mut ranks = response.message.ranks;
    ranks.truncate(most);
    let texts =
        (request.return_documents == Some(true)).then(|| Arc::unwrap_or_clone(message).texts);
    let bytes = ranked_bytes(ranks.len(), texts.as_deref());
    let id = context.id.as_str().to_owned();
    let model = plan.name().to_owned();
    let tokens = computed_tokens(&response.headers);
    let make = move || RerankResponse {
        id,
        model,
        results: ranked_documents(ranks, texts),
        meta: Meta {
            api_version: ApiVersion { version },
            billed_units: BilledUnits { search_units: 1 },
            tokens: Tokens {
                input_tokens: tokens,
            },
        },
        usage: Usage::of(tokens),
    };
    reply::json(context, response.headers, bytes, make).await
}

/// About the length of a response with so many results.
fn ranked_bytes(count: usize, texts: Option<&[String]>) -> usize {
    let texts = texts.unwrap_or_default();
    count * RANKED_BYTES + texts.iter().map(String::len).sum::<usize>()
}

fn ranked_documents(ranks: Vec<tei::Rank>, texts: Option<Vec<String>>) -> Vec<RankedIndex> {
    let mut texts = texts;
    let results = ranks.into_iter().map(|rank| RankedIndex {
        index: rank.index,
        relevance_score: rank.score,
        document: texts.as_mut().map(|texts| RankedDocument {
            text: taken(texts, rank.index),
        }),
    });
    results.collect()
}

/// Each text is in a response once, however often it was ranked.
fn taken(texts: &mut [String], index: u32) -> String {
    let text = texts.get_mut(index as usize);
    text.map(std::mem::take).unwrap_or_default()
}

async fn rerank_texts(
    context: &RequestContext,
    request: RerankTextsRequest,
) -> Result<Response, Error> {
    check_query(&request.query)?;
    check_texts("texts", &request.texts)?;
    let plan = select_model(context, request.model.as_deref(), TASKS)?;
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
    let message = Arc::new(message);
    let response = call_rerank(context, &plan, &message, "texts").await?;
    let ranks = response.message.ranks;
    let mut texts =
        (request.return_text == Some(true)).then(|| Arc::unwrap_or_clone(message).texts);
    let bytes = ranked_bytes(ranks.len(), texts.as_deref());
    let make = move || {
        let ranks = ranks.into_iter().map(|rank| RankedText {
            index: rank.index,
            score: rank.score,
            text: texts.as_mut().map(|texts| taken(texts, rank.index)),
        });
        ranks.collect::<Vec<_>>()
    };
    reply::json(context, response.headers, bytes, make).await
}

fn check_query(query: &str) -> Result<(), Error> {
    if query.is_empty() {
        return Err(Error::invalid("query", "must not be empty"));
    }
    Ok(())
}

/// Calls the model. An error of its `texts` is one of the request's `field`.
async fn call_rerank(
    context: &RequestContext,
    plan: &Plan,
    message: &Arc<tei::RerankRequest>,
    field: &'static str,
) -> Result<CallResponse<tei::RerankResponse>, Error> {
    let (bytes, shared) = (message.encoded_len(), message.clone());
    let message = encoded::<tei::RerankRequest, _>(context, bytes, move || Ok(shared)).await?;
    let response: Result<CallResponse<tei::RerankResponse>, Error> =
        call_model(context, Method::Rerank, plan, message).await;
    let mut response = response.map_err(|error| {
        error.map_field(|at| match at.segments().as_slice() {
            [Segment::Name("texts"), rest @ ..] => {
                let mapped = [&[Segment::Name(field)], rest].concat();
                Some(mapped.into_iter().collect())
            }
            _ => None,
        })
    })?;
    // Outside services need not sort by score.
    let ranks = &mut response.message.ranks;
    ranks.sort_by(|a, b| b.score.total_cmp(&a.score));
    Ok(response)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_of_document_are_read() {
        let read: RerankRequest =
            json(br#"{"query": "q", "documents": ["a", {"text": "b"}]}"#).unwrap();
        let texts: Vec<&str> = read.documents.iter().map(|d| d.0.as_str()).collect();
        assert_eq!(texts, ["a", "b"]);
    }

    #[test]
    fn unknown_and_wrong_fields_are_refused_by_their_path() {
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
    fn a_document_is_omitted_unless_it_was_requested() {
        let ranked = RankedIndex {
            index: 1,
            relevance_score: 0.5,
            document: None,
        };
        let json = serde_json::to_string(&ranked).unwrap();
        assert_eq!(json, r#"{"index":1,"relevance_score":0.5}"#);
    }
}
