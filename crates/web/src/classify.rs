//! Classification of texts: every label with its score.
//!
//! The texts of a request are the rows of one `ModelInfer` call, or of several
//! if the model takes fewer rows in a call. `Predict` is called once for each
//! text where that cannot be: for raw scores, which `ModelInfer` does not give,
//! and for models whose scores there are no probabilities, or whose configuration
//! does not have their labels.

mod classifier;

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use axum::response::Response;
use axum::routing::post;
use axum::{Extension, Router};
use futures::{StreamExt, TryStreamExt, stream};
use http::{HeaderMap, HeaderValue};
use platform::grpc::BytesHeld;
use protocol::inference::ModelInferResponse;
use protocol::inference::infer_parameter::ParameterChoice;
use protocol::{CACHE_KEY, Error, Method, TOKENS_KEY, Task, tei::v1 as tei};
use serde::de::{self, Deserializer, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use utoipa::openapi::schema::{ArrayBuilder, OneOfBuilder};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use super::body::{Bounded, Json};
use super::context::{CallResponse, RequestContext};
use super::endpoint::Endpoints;
use super::error::{ApiError, ErrorFormat};
use super::openai::Usage;
use super::reply;
use super::rerank::NonEmptyText;
use super::strict::strict;
use super::texts::{
    CALLS_AT_ONCE, InputFields, TEXTS_MAX, call_model, check_texts, computed_tokens, encoded,
    infer_request, select_model,
};
use classifier::{Classifier, Classifiers, find};
use gateway::Plan;
use gateway::stack::Stack;

const TASKS: &[Task] = &[Task::Classification];

/// Texts to classify.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(remote = "Self", deny_unknown_fields)]
#[schema(example = json!({"model": "classifier", "input": ["The lantern is beautiful.", "It went out."]}))]
pub struct ClassifyRequest {
    /// The model; optional if only one has the task classification.
    #[serde(default)]
    #[schema(
        min_length = 1,
        max_length = 128,
        pattern = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
    )]
    pub model: Option<String>,
    /// One text or several.
    pub input: OneOrMoreTexts,
    /// Whether scores are logits instead of probabilities.
    #[serde(default)]
    pub raw_scores: Option<bool>,
    /// Whether a text that is too long is truncated; it is an error otherwise.
    #[serde(default)]
    pub truncate: Option<bool>,
}

strict!(object ClassifyRequest);

/// One text or several.
#[derive(Debug, Clone)]
pub struct OneOrMoreTexts {
    texts: Vec<String>,
    /// Whether there is one text, which is not in a list.
    single: bool,
}

/// The classification of texts.
#[derive(Debug, Serialize, ToSchema)]
pub struct ClassifyResponse {
    /// The request's id.
    id: String,
    /// Always `list`.
    #[schema(example = "list")]
    object: &'static str,
    /// The model.
    #[schema(example = "classifier")]
    model: String,
    /// One for each text, in the order of the texts.
    data: Vec<Classification>,
    /// The token usage.
    usage: Usage,
}

/// The classification of one text.
#[derive(Debug, Serialize, ToSchema)]
pub struct Classification {
    /// The index of the text in the request.
    #[schema(minimum = 0)]
    index: usize,
    /// The label with the highest score.
    #[schema(example = "positive")]
    label: String,
    /// The scores in the order of the model's labels, if that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    probs: Option<Vec<f32>>,
    /// The number of labels.
    num_classes: usize,
    /// Every label with its score, the highest score first.
    predictions: Vec<Prediction>,
}

/// A label and its score.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct Prediction {
    /// The label.
    #[schema(example = "positive")]
    label: String,
    /// The score.
    score: f32,
}

/// About the length of a label with its score.
const PREDICTION_BYTES: usize = 64;

/// Rows of one call: the cache looks up as many rows in Redis at once, and the
/// queue of a busy worker has room for them.
const ROWS_MAX: usize = 256;

/// The endpoint.
pub fn routes(stack: &Stack) -> Router<Stack> {
    Endpoints::new(stack, ErrorFormat::OpenAi)
        .authenticated("/v1/classify", post(classify))
        .into_router()
        .layer(Extension(Classifiers::default()))
}

/// Classify texts
///
/// Every label with its score, for one text or several.
#[utoipa::path(
    post, path = "/v1/classify", tag = "Classify", operation_id = "classify",
    request_body = ClassifyRequest,
    responses((status = 200, description = "The labels of each text", body = ClassifyResponse))
)]
pub async fn classify(
    Extension(classifiers): Extension<Classifiers>,
    context: RequestContext,
    request: Json<ClassifyRequest>,
) -> Result<Response, ApiError> {
    let request = request.value;
    let OneOrMoreTexts { texts, single } = request.input;
    let fields = InputFields { single, first: 0 };
    check_texts("input", &texts).map_err(|error| fields.of_texts(error))?;
    let plan = select_model(&context, request.model.as_deref(), TASKS)?;
    let classifier = find(&classifiers, &context, &plan).await?;
    let calls = Calls {
        context: &context,
        plan: &plan,
        classifier: &classifier,
        single,
        raw_scores: request.raw_scores.unwrap_or_default(),
        truncate: request.truncate.unwrap_or_default(),
    };
    let texts = Arc::new(texts);
    let results = match calls.infer(&texts).await? {
        Some(results) => results,
        None => calls.predict(Arc::unwrap_or_clone(texts)).await?,
    };
    let headers = results.headers();
    let labels = classifier.labels.len().max(1);
    let bytes = results.classifications.len() * labels * PREDICTION_BYTES;
    let id = context.id.as_str().to_owned();
    let model = plan.name().to_owned();
    let make = move || ClassifyResponse {
        id,
        object: "list",
        model,
        data: results.classifications,
        usage: Usage::of(results.tokens),
    };
    Ok(reply::json(&context, headers, bytes, make).await?)
}

/// The upstream calls of one request.
struct Calls<'r> {
    context: &'r RequestContext,
    plan: &'r Plan,
    classifier: &'r Classifier,
    single: bool,
    raw_scores: bool,
    truncate: bool,
}

impl Calls<'_> {
    /// Classifies texts as the rows of a tensor. None if that is not possible,
    /// or if the scores are of another model or version than the labels.
    async fn infer(&self, texts: &Arc<Vec<String>>) -> Result<Option<Results>, Error> {
        let Some(rows_max) = self.classifier.rows_max.filter(|_| !self.raw_scores) else {
            return Ok(None);
        };
        let mut results = Results::default();
        // One call after another: the model's queue need not hold more rows than
        // one call may have.
        let rows_max = rows_max.min(ROWS_MAX);
        for first in (0..texts.len()).step_by(rows_max) {
            let rows = first..texts.len().min(first + rows_max);
            let part = texts.get(rows.clone()).unwrap_or_default();
            let fields = InputFields {
                single: self.single,
                first,
            };
            let truncate = ("truncate", ParameterChoice::BoolParam(true));
            let parameters = self.truncate.then_some(truncate);
            let bytes = part.iter().map(String::len).sum();
            let (model, all) = (self.plan.name().to_owned(), texts.clone());
            let make = move || {
                let part = all.get(rows).unwrap_or_default();
                infer_request(&model, part, parameters)
            };
            let message = encoded(self.context, bytes, make).await?;
            let response = call_model(self.context, Method::ModelInfer, self.plan, message).await;
            let response: CallResponse<ModelInferResponse> =
                response.map_err(|error: Error| fields.of_infer(error))?;
            let Some(scores) = self.classifier.scores(&response.message, part.len()) else {
                return Ok(None);
            };
            for row in scores.chunks_exact(self.classifier.labels.len()) {
                let predictions = self.classifier.predictions(row);
                results.push(predictions, &self.classifier.labels);
            }
            results.finish(part.len(), response.headers, response.held);
        }
        Ok(Some(results))
    }

    /// Classifies texts with a call for each.
    async fn predict(&self, texts: Vec<String>) -> Result<Results, Error> {
        let calls = texts
            .into_iter()
            .enumerate()
            .map(|(index, inputs)| async move {
                let message = tei::PredictRequest {
                    inputs,
                    truncate: self.truncate,
                    raw_scores: self.raw_scores,
                    ..Default::default()
                };
                let fields = InputFields {
                    single: self.single,
                    first: index,
                };
                let bytes = message.inputs.len();
                let message = encoded(self.context, bytes, move || Ok(message)).await?;
                let response = call_model(self.context, Method::Predict, self.plan, message).await;
                response.map_err(|error: Error| {
                    error.map_field(|field| (*field == "inputs").then(|| fields.at(0).into()))
                })
            });
        let responses: Vec<CallResponse<tei::PredictResponse>> = stream::iter(calls)
            .buffered(CALLS_AT_ONCE)
            .try_collect()
            .await?;
        let mut results = Results::default();
        for response in responses {
            let predictions = response.message.predictions.into_iter();
            let predictions = predictions.map(|prediction| Prediction {
                label: prediction.label,
                score: prediction.score,
            });
            results.push(predictions.collect(), &self.classifier.labels);
            results.finish(1, response.headers, response.held);
        }
        Ok(results)
    }
}

/// The results of the calls of one request.
#[derive(Default)]
struct Results {
    classifications: Vec<Classification>,
    tokens: u64,
    /// Rows whose response has the cache header, and those found in the cache.
    cache_rows: usize,
    cache_hits: usize,
    /// The headers of the last response.
    headers: HeaderMap,
    held: Vec<BytesHeld>,
}

impl Results {
    /// Adds the predictions of the next text, the highest score first.
    fn push(&mut self, predictions: Vec<Prediction>, labels: &[String]) {
        let index = self.classifications.len();
        self.classifications
            .push(classification(index, predictions, labels));
    }

    /// Adds the rest of a response of so many rows.
    fn finish(&mut self, rows: usize, headers: HeaderMap, held: Vec<BytesHeld>) {
        self.tokens += computed_tokens(&headers);
        if let Some(cache) = headers.get(CACHE_KEY) {
            self.cache_rows += rows;
            self.cache_hits += cache_hits(cache, rows);
        }
        self.headers = headers;
        self.held.extend(held);
    }

    /// The headers of the last response, with the sums of all.
    fn headers(&self) -> HeaderMap {
        let mut headers = self.headers.clone();
        headers.insert(TOKENS_KEY, self.tokens.into());
        let cache = match (self.cache_hits, self.cache_rows) {
            (_, 0) => return headers,
            (0, _) => Ok(HeaderValue::from_static("miss")),
            (hits, rows) if hits == rows => Ok(HeaderValue::from_static("hit")),
            (hits, rows) => HeaderValue::try_from(format!("{hits}/{rows}")),
        };
        if let Ok(cache) = cache {
            headers.insert(CACHE_KEY, cache);
        }
        headers
    }
}

/// The rows found in the cache, by the header of a response: `hit`, `miss` or
/// `2/3`.
fn cache_hits(header: &HeaderValue, rows: usize) -> usize {
    let text = header.to_str().unwrap_or_default();
    if text == "hit" {
        return rows;
    }
    let hits = text.split_once('/').map(|(hits, _)| hits);
    hits.and_then(|hits| hits.parse().ok()).unwrap_or_default()
}

fn classification(index: usize, predictions: Vec<Prediction>, labels: &[String]) -> Classification {
    let scores = predictions.iter().map(|p| (p.label.as_str(), p.score));
    let scores: HashMap<&str, f32> = scores.collect();
    let score = |label: &String| scores.get(label.as_str()).copied();
    let probs: Option<Vec<f32>> = labels.iter().map(score).collect();
    Classification {
        index,
        label: predictions
            .first()
            .map_or_else(String::new, |p| p.label.clone()),
        probs: probs.filter(|probs| probs.len() == predictions.len() && !probs.is_empty()),
        num_classes: predictions.len(),
        predictions,
    }
}

struct TextsVisitor;

impl<'de> Visitor<'de> for TextsVisitor {
    type Value = OneOrMoreTexts;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a string or a list of strings")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<OneOrMoreTexts, E> {
        Ok(OneOrMoreTexts {
            texts: vec![text.to_owned()],
            single: true,
        })
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<OneOrMoreTexts, A::Error> {
        let texts = Bounded::new("texts", TEXTS_MAX).visit_seq(list)?;
        Ok(OneOrMoreTexts {
            texts,
            single: false,
        })
    }
}

impl<'de> Deserialize<'de> for OneOrMoreTexts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(TextsVisitor)
    }
}

impl PartialSchema for OneOrMoreTexts {
    fn schema() -> RefOr<Schema> {
        let list = ArrayBuilder::new()
            .items(NonEmptyText::schema())
            .min_items(Some(1))
            .max_items(Some(TEXTS_MAX));
        let one_of = OneOfBuilder::new()
            .description(Some("One text or several"))
            .item(NonEmptyText::schema())
            .item(list);
        RefOr::T(Schema::from(one_of))
    }
}

impl ToSchema for OneOrMoreTexts {
    fn name() -> std::borrow::Cow<'static, str> {
        "OneOrMoreTexts".into()
    }
}

#[cfg(test)]
mod tests {
    use super::super::body::json;
    use super::*;

    fn predictions(of: &[(&str, f32)]) -> Vec<Prediction> {
        let prediction = |(label, score): &(&str, f32)| Prediction {
            score: *score,
            label: (*label).to_owned(),
        };
        of.iter().map(prediction).collect()
    }

    #[test]
    fn probabilities_have_the_order_of_the_labels() {
        let labels = ["bad".to_owned(), "good".to_owned()];
        let both = || predictions(&[("good", 0.75), ("bad", 0.25)]);
        let found = classification(3, both(), &labels);
        assert_eq!(
            (found.index, found.label.as_str(), found.num_classes),
            (3, "good", 2)
        );
        assert_eq!(found.probs, Some(vec![0.25, 0.75]));
        let found = classification(0, both(), &[]);
        assert_eq!(found.probs, None);
        let found = classification(0, predictions(&[("good", 0.75)]), &labels);
        assert_eq!(found.probs, None);
    }

    #[test]
    fn cache_hits_are_summed_over_the_responses() {
        for (responses, expected) in [
            (&[][..], None),
            (&[(1, "hit"), (1, "hit")], Some("hit")),
            (&[(1, "miss")], Some("miss")),
            (&[(1, "hit"), (1, "miss"), (1, "hit")], Some("2/3")),
            (&[(4, "1/4"), (3, "hit"), (2, "miss")], Some("4/9")),
        ] {
            let mut results = Results::default();
            for (rows, cache) in responses {
                let headers = HeaderMap::from_iter([(
                    http::HeaderName::from_static(CACHE_KEY),
                    HeaderValue::from_static(cache),
                )]);
                results.finish(*rows, headers, Vec::new());
            }
            let headers = results.headers();
            let found = headers.get(CACHE_KEY);
            assert_eq!(found, expected.map(HeaderValue::from_static).as_ref());
        }
        let mut results = Results::default();
        results.finish(2, HeaderMap::new(), Vec::new());
        assert_eq!(results.headers().get(CACHE_KEY), None);
    }

    #[test]
    fn one_text_and_several_are_read() {
        let one: ClassifyRequest = json(br#"{"input": "a"}"#).unwrap();
        assert!(one.input.single);
        let two: ClassifyRequest = json(br#"{"input": ["a", "b"]}"#).unwrap();
        assert_eq!(two.input.texts, ["a", "b"]);
        for (text, field) in [
            (&br#"{"input": ["a", 1]}"#[..], "input[1]"),
            (br#"{"input": 1}"#, "input"),
            (br#"{"input": "a", "inputs": "b"}"#, "inputs"),
            (br#"{}"#, "input"),
        ] {
            let error = json::<ClassifyRequest>(text).unwrap_err();
            assert_eq!(error.violation().unwrap().field, field);
        }
    }
}
