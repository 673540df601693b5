//! Labels for texts.

use axum::Router;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use futures::{StreamExt, TryStreamExt, stream};
use http::{HeaderMap, HeaderValue};
use protocol::inference::{ModelConfigRequest, ModelConfigResponse};
use protocol::{CACHE_KEY, Error, Method, TOKENS_KEY, Task, tei::v1 as tei};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::ask::{self, CALLS_AT_ONCE, check_texts, tokens};
use super::body::Json;
use super::gate::{Answered, Routes, Visit, guarded};
use super::openai::Usage;
use super::problem::{Refused, Shape};
use super::rerank::NotEmpty;
use super::strict::strict;
use crate::route::Plan;
use crate::stack::Stack;

const PREDICT: Method = Method::Predict;
const CONFIG: Method = Method::ModelConfig;
const TASKS: &[Task] = &[Task::Classification];

/// Texts to classify.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(remote = "Self", deny_unknown_fields)]
#[schema(example = json!({"model": "classifier", "input": ["The lantern is beautiful.", "It went out."]}))]
pub struct ClassifyRequest {
    /// The model; the only one that classifies texts if none is named.
    #[serde(default)]
    #[schema(
        min_length = 1,
        max_length = 128,
        pattern = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
    )]
    pub model: Option<String>,
    /// One text or several.
    pub input: OneOrMore,
    /// Whether scores stay as the model gives them, else probabilities.
    #[serde(default)]
    pub raw_scores: Option<bool>,
    /// Whether a text that is too long is cut; else it is refused.
    #[serde(default)]
    pub truncate: Option<bool>,
}

strict!(object ClassifyRequest);

/// One text or several.
#[derive(Debug, Clone)]
pub struct OneOrMore {
    texts: Vec<String>,
    single: bool,
}

/// The labels of texts.
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
    /// One for each text, in their order.
    data: Vec<Classified>,
    /// What it took.
    usage: Usage,
}

/// The labels of one text.
#[derive(Debug, Serialize, ToSchema)]
pub struct Classified {
    /// The place of its text in the request.
    #[schema(minimum = 0)]
    index: usize,
    /// The best label.
    #[schema(example = "positive")]
    label: String,
    /// The scores in the order of the model's labels, where that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    probs: Option<Vec<f32>>,
    /// How many labels there are.
    num_classes: usize,
    /// Every label with its score, the best first.
    predictions: Vec<Prediction>,
}

/// A label and its score.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct Prediction {
    /// The label.
    #[schema(example = "positive")]
    label: String,
    /// Its score.
    score: f32,
}

/// Every route.
pub fn routes(stack: &Stack) -> Router<Stack> {
    Routes::new(stack, Shape::OpenAi)
        .callers("/v1/classify", post(classify))
        .into_router()
}

/// Classify texts
///
/// Every label with its score, for one text or several.
#[utoipa::path(
    post, path = "/v1/classify", tag = "Classify", operation_id = "classify",
    request_body = ClassifyRequest,
    responses((status = 200, description = "The labels of each text", body = ClassifyResponse))
)]
pub async fn classify(visit: Visit, request: Json<ClassifyRequest>) -> Result<Response, Refused> {
    let request = request.value;
    let input = request.input;
    check_texts("input", &input.texts).map_err(|error| single(error, input.single))?;
    let plan = ask::model(&visit, request.model.as_deref(), TASKS)?;
    let order = labels(&visit, &plan).await?;
    let one = input.single;
    let calls = input.texts.into_iter().enumerate().map(|(index, inputs)| {
        let message = tei::PredictRequest {
            inputs,
            truncate: request.truncate.unwrap_or_default(),
            raw_scores: request.raw_scores.unwrap_or_default(),
            ..Default::default()
        };
        predict(&visit, &plan, message, (index, one))
    });
    let answers: Vec<Answered<tei::PredictResponse>> = stream::iter(calls)
        .buffered(CALLS_AT_ONCE)
        .try_collect()
        .await?;
    let cache = cached(answers.iter().map(|answer| &answer.headers));
    let mut headers = HeaderMap::new();
    let (mut data, mut held) = (Vec::with_capacity(answers.len()), Vec::new());
    let mut counted = 0;
    for (index, answer) in answers.into_iter().enumerate() {
        counted += tokens(&answer.headers);
        data.push(classified(index, answer.message, &order));
        headers = answer.headers;
        held.extend(answer.held);
    }
    // What one answer took is not what all did.
    headers.insert(TOKENS_KEY, counted.into());
    if let Some(cache) = cache {
        headers.insert(CACHE_KEY, cache);
    }
    let response = ClassifyResponse {
        id: visit.id.as_str().to_owned(),
        object: "list",
        model: plan.name().to_owned(),
        data,
        usage: Usage::of(counted),
    };
    let response = (headers, axum::Json(response)).into_response();
    Ok(guarded(response, held))
}

/// How many of the texts were known; none where no answer says so.
fn cached<'a>(answers: impl Iterator<Item = &'a HeaderMap>) -> Option<HeaderValue> {
    let said: Vec<&HeaderValue> = answers.filter_map(|all| all.get(CACHE_KEY)).collect();
    let known = said.iter().filter(|said| **said == "hit").count();
    match said.len() {
        0 => None,
        all if known == all => Some(HeaderValue::from_static("hit")),
        _ if known == 0 => Some(HeaderValue::from_static("miss")),
        all => HeaderValue::try_from(format!("{known}/{all}")).ok(),
    }
}

async fn predict(
    visit: &Visit,
    plan: &Plan,
    message: tei::PredictRequest,
    (index, one): (usize, bool),
) -> Result<Answered<tei::PredictResponse>, Error> {
    let answered = ask::call(visit, PREDICT, plan, &message).await;
    answered.map_err(|error| {
        error.renamed(|field, reason| {
            let at = match one {
                true => "input".to_owned(),
                false => format!("input[{index}]"),
            };
            (field == "inputs").then(|| (at, reason.to_owned()))
        })
    })
}

/// The model's labels in their order; none where its server does not say.
async fn labels(visit: &Visit, plan: &Plan) -> Result<Vec<String>, Error> {
    let message = ModelConfigRequest {
        name: plan.name().to_owned(),
        ..Default::default()
    };
    let told: Answered<ModelConfigResponse> = ask::call(visit, CONFIG, plan, &message).await?;
    let config = told.message.config.unwrap_or_default();
    let labels = config.parameters.get("labels");
    let labels = labels.and_then(|labels| serde_json::from_str(&labels.string_value).ok());
    Ok(labels.unwrap_or_default())
}

fn classified(index: usize, answer: tei::PredictResponse, order: &[String]) -> Classified {
    let predictions: Vec<Prediction> = answer
        .predictions
        .into_iter()
        .map(|prediction| Prediction {
            label: prediction.label,
            score: prediction.score,
        })
        .collect();
    let score = |label: &String| {
        let found = predictions.iter().find(|p| p.label == *label);
        found.map(|prediction| prediction.score)
    };
    let probs: Option<Vec<f32>> = order.iter().map(score).collect();
    Classified {
        index,
        label: predictions
            .first()
            .map_or_else(String::new, |p| p.label.clone()),
        probs: probs.filter(|probs| probs.len() == predictions.len() && !probs.is_empty()),
        num_classes: predictions.len(),
        predictions,
    }
}

/// An only text stands in no list.
fn single(error: Error, single: bool) -> Error {
    error.renamed(|field, reason| {
        (single && field.starts_with("input[")).then(|| ("input".to_owned(), reason.to_owned()))
    })
}

mod one_or_more {
    //! Reads one text or several; paths of errors name the element.

    use std::fmt;

    use serde::de::{self, Deserialize, Deserializer, SeqAccess, Visitor};
    use utoipa::openapi::schema::{ArrayBuilder, OneOfBuilder};
    use utoipa::openapi::{RefOr, Schema};
    use utoipa::{PartialSchema, ToSchema};

    use super::super::ask::TEXTS_MAX;
    use super::super::body::none_left;
    use super::{NotEmpty, OneOrMore};

    struct TextsVisitor;

    impl<'de> Visitor<'de> for TextsVisitor {
        type Value = OneOrMore;

        fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
            formatter.write_str("a text or a list of texts")
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<OneOrMore, E> {
            Ok(OneOrMore {
                texts: vec![text.to_owned()],
                single: true,
            })
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<OneOrMore, A::Error> {
            let mut texts = Vec::new();
            while texts.len() < TEXTS_MAX
                && let Some(text) = list.next_element()?
            {
                texts.push(text);
            }
            if texts.len() == TEXTS_MAX {
                none_left(&mut list, TEXTS_MAX, |count| {
                    format!("{count} texts: a request may have {TEXTS_MAX}")
                })?;
            }
            Ok(OneOrMore {
                texts,
                single: false,
            })
        }
    }

    impl<'de> Deserialize<'de> for OneOrMore {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            deserializer.deserialize_any(TextsVisitor)
        }
    }

    impl PartialSchema for OneOrMore {
        fn schema() -> RefOr<Schema> {
            let list = ArrayBuilder::new()
                .items(NotEmpty::schema())
                .min_items(Some(1))
                .max_items(Some(TEXTS_MAX));
            let one_of = OneOfBuilder::new()
                .description(Some("One text or several"))
                .item(NotEmpty::schema())
                .item(list);
            RefOr::T(Schema::from(one_of))
        }
    }

    impl ToSchema for OneOrMore {
        fn name() -> std::borrow::Cow<'static, str> {
            "OneOrMoreTexts".into()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::body::json;
    use super::*;

    fn predictions(of: &[(&str, f32)]) -> tei::PredictResponse {
        let prediction = |(label, score): &(&str, f32)| tei::Prediction {
            score: *score,
            label: (*label).to_owned(),
        };
        tei::PredictResponse {
            predictions: of.iter().map(prediction).collect(),
            metadata: None,
        }
    }

    #[test]
    fn probabilities_have_the_order_of_the_labels() {
        let order = ["bad".to_owned(), "good".to_owned()];
        let told = classified(3, predictions(&[("good", 0.75), ("bad", 0.25)]), &order);
        assert_eq!(
            (told.index, told.label.as_str(), told.num_classes),
            (3, "good", 2)
        );
        assert_eq!(told.probs, Some(vec![0.25, 0.75]));
        let told = classified(0, predictions(&[("good", 0.75), ("bad", 0.25)]), &[]);
        assert_eq!(told.probs, None);
        let told = classified(0, predictions(&[("good", 0.75)]), &order);
        assert_eq!(told.probs, None);
    }

    #[test]
    fn how_many_texts_were_known_is_said_of_all() {
        for (said, wanted) in [
            (&[][..], None),
            (&["hit", "hit"], Some("hit")),
            (&["miss"], Some("miss")),
            (&["hit", "miss", "hit"], Some("2/3")),
        ] {
            let headers = |said: &&'static str| {
                HeaderMap::from_iter([(
                    http::HeaderName::from_static(CACHE_KEY),
                    HeaderValue::from_static(said),
                )])
            };
            let answers: Vec<HeaderMap> = said.iter().map(headers).collect();
            let told = cached(answers.iter());
            assert_eq!(told, wanted.map(HeaderValue::from_static));
        }
        let unsaid = [HeaderMap::new(), HeaderMap::new()];
        assert_eq!(cached(unsaid.iter()), None);
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
