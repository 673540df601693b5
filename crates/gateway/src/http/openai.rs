//! The surface that OpenAI's clients speak: models and embeddings. Fields that
//! are not known are ignored, as these clients send what other servers read.

mod input;
mod vectors;

pub use input::{Input, Items};

use std::sync::LazyLock;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use base64::display::Base64Display;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use protocol::inference::ModelInferResponse;
use protocol::{Error, Method, Task};
use serde::ser::SerializeSeq;
use serde::{Deserialize, Serialize, Serializer};
use utoipa::ToSchema;

use super::ask::{self, tokens};
use super::body::Json;
use super::gate::{Answered, Routes, Visit, guarded};
use super::openapi::ModelPath;
use super::problem::{Refused, Shape};
use super::rest;
use super::strict::strict;
use crate::stack::Stack;
use vectors::{decoded, in_terms_of_texts, infer_request, rows};

const INFER: Method = Method::ModelInfer;
const EMBEDDING: &[Task] = &[Task::Embedding];

/// When this gateway began: no model here has a date of its own.
static STARTED_S: LazyLock<u64> = LazyLock::new(|| {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
});

/// Texts to turn into vectors.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(remote = "Self")]
#[schema(example = json!({"model": "minilm", "input": ["The lantern is lit.", "A candle burns."]}))]
pub struct EmbeddingRequest {
    /// The model.
    #[schema(
        min_length = 1,
        max_length = 128,
        pattern = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
    )]
    pub model: String,
    /// The texts or their tokens.
    pub input: Input,
    /// How the vectors are written; numbers if not given.
    #[serde(default)]
    pub encoding_format: Option<EncodingFormat>,
    /// Keep only this many leading dimensions, scaled to length 1 again.
    #[serde(default)]
    #[schema(minimum = 1)]
    pub dimensions: Option<u32>,
    /// Whether a text that is too long is cut; else it is refused. Andon's own.
    #[serde(default)]
    pub truncate: Option<bool>,
    /// Who the request is for; it is not used.
    #[serde(default, rename = "user")]
    #[allow(dead_code, reason = "it is only checked to be a text")]
    user: Option<String>,
}

strict!(object EmbeddingRequest);

/// How vectors are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(remote = "Self", rename_all = "lowercase")]
pub enum EncodingFormat {
    /// Numbers.
    Float,
    /// The bytes of little-endian 32-bit numbers in base64.
    Base64,
}

strict!(word EncodingFormat);

/// Vectors.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = EmbeddingResponse)]
pub struct EmbeddingList {
    /// Always `list`.
    #[schema(example = "list")]
    object: &'static str,
    /// One for each input, in their order.
    data: Vec<Embedding>,
    /// The model.
    #[schema(example = "minilm")]
    model: String,
    /// What it took.
    usage: Usage,
}

/// One vector.
#[derive(Debug, Serialize, ToSchema)]
pub struct Embedding {
    /// Always `embedding`.
    #[schema(example = "embedding")]
    object: &'static str,
    /// The place of its text in the request.
    #[schema(minimum = 0)]
    index: usize,
    /// The vector: numbers, or base64 where that was asked for.
    #[schema(value_type = VectorForm)]
    embedding: Vector,
}

/// How a vector is written.
#[derive(Debug, ToSchema)]
#[schema(as = Vector)]
#[serde(untagged)]
#[allow(dead_code, reason = "it is the schema of `Vector`, which holds bytes")]
pub enum VectorForm {
    /// Numbers.
    #[schema(example = json!([0.0127, -0.0431, 0.0764]))]
    Float(Vec<f32>),
    /// The bytes of little-endian 32-bit numbers.
    Base64(String),
}

/// The bytes of little-endian 32-bit numbers, and how they are written.
#[derive(Debug)]
enum Vector {
    Float(Bytes),
    Base64(Bytes),
}

/// What a request took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
pub struct Usage {
    /// Tokens computed: those of answers that were known count as none.
    pub prompt_tokens: u64,
    /// The same, as nothing is generated.
    pub total_tokens: u64,
}

impl Usage {
    /// Of so many tokens.
    pub fn of(tokens: u64) -> Self {
        Self {
            prompt_tokens: tokens,
            total_tokens: tokens,
        }
    }
}

/// The models that the caller may call.
#[derive(Debug, Serialize, ToSchema)]
pub struct ModelList {
    /// Always `list`.
    #[schema(example = "list")]
    object: &'static str,
    /// By name.
    data: Vec<Model>,
}

/// One model.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ListedModel)]
pub struct Model {
    /// Its name.
    #[schema(example = "minilm")]
    id: String,
    /// Always `model`.
    #[schema(example = "model")]
    object: &'static str,
    /// When this gateway began, in seconds since 1970.
    created: u64,
    /// Always `andon`.
    #[schema(example = "andon")]
    owned_by: &'static str,
}

impl Model {
    fn named(id: String) -> Self {
        Self {
            id,
            object: "model",
            created: *STARTED_S,
            owned_by: "andon",
        }
    }
}

impl Serialize for Vector {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Base64(bytes) => serializer.collect_str(&Base64Display::new(bytes, &STANDARD)),
            Self::Float(bytes) => {
                let numbers = bytes.as_chunks::<4>().0;
                let mut list = serializer.serialize_seq(Some(numbers.len()))?;
                // As 32-bit numbers they have the fewest digits that are read
                // back as the same bits.
                for number in numbers {
                    list.serialize_element(&f32::from_le_bytes(*number))?;
                }
                list.end()
            }
        }
    }
}

/// Every route.
pub fn routes(stack: &Stack) -> Router<Stack> {
    Routes::new(stack, Shape::OpenAi)
        .callers("/v1/models", get(list_models))
        .callers("/v1/models/{model}", get(show_model))
        .callers("/v1/embeddings", post(embed))
        .into_router()
}

/// List models
///
/// Those that can be called now and that the caller may call: models of
/// workers, models of outside services, and chains.
#[utoipa::path(
    get, path = "/v1/models", tag = "OpenAI", operation_id = "list_models",
    responses((status = 200, description = "The models by name", body = ModelList))
)]
pub async fn list_models(visit: Visit) -> axum::Json<ModelList> {
    let routes = &visit.stack.0.routes;
    let table = routes.table();
    let mut names: Vec<String> = table
        .ready()
        .map(|route| route.name().to_owned())
        .chain(routes.catalogue.providers.keys().cloned())
        .chain(routes.catalogue.chains.keys().cloned())
        .filter(|name| visit.caller.tenant.may_call(name))
        .collect();
    names.sort_unstable();
    names.dedup();
    axum::Json(ModelList {
        object: "list",
        data: names.into_iter().map(Model::named).collect(),
    })
}

/// Show a model
///
/// Whether one model can be called now.
#[utoipa::path(
    get, path = "/v1/models/{model}", tag = "OpenAI", operation_id = "show_model",
    params(ModelPath),
    responses((status = 200, description = "The model", body = Model))
)]
pub async fn show_model(visit: Visit, asked: rest::Model) -> Result<axum::Json<Model>, Refused> {
    visit.caller.must_be_allowed(&asked.name)?;
    let ready = visit.stack.0.routes.ready(&asked.name, "");
    ready.map_err(|error| error.renamed(|_, reason| Some(("model".into(), reason.into()))))?;
    Ok(axum::Json(Model::named(asked.name)))
}

/// Turn texts into vectors
///
/// As OpenAI's clients ask. Fields that are not known are ignored, as these
/// clients send what other servers read.
///
/// Tokens are turned into the text that they stand for, by the tokenizer of
/// the model; models of outside services take texts only.
#[utoipa::path(
    post, path = "/v1/embeddings", tag = "OpenAI", operation_id = "create_embedding",
    request_body = EmbeddingRequest,
    responses((status = 200, description = "One vector for each input", body = EmbeddingList))
)]
pub async fn embed(visit: Visit, request: Json<EmbeddingRequest>) -> Result<Response, Refused> {
    let request = request.value;
    let input = request.input.checked()?;
    if request.dimensions == Some(0) {
        return Err(Error::invalid("dimensions", "must be at least 1").into());
    }
    let plan = ask::model(&visit, Some(&request.model), EMBEDDING)?;
    let model = plan.name().to_owned();
    let single = input.single;
    let texts = match input.items {
        Items::Texts(texts) => texts,
        Items::Tokens(lists) => decoded(&visit, &plan, lists, single).await?,
    };
    let count = texts.len();
    let message = infer_request(&model, &texts, request.dimensions, request.truncate)?;
    let answered = ask::call(&visit, INFER, &plan, &message).await;
    let answered: Answered<ModelInferResponse> = answered.map_err(|error: Error| {
        error.renamed(|field, reason| Some(in_terms_of_texts(field, reason, single)))
    })?;
    let form = match request.encoding_format {
        Some(EncodingFormat::Base64) => Vector::Base64,
        _ => Vector::Float,
    };
    let rows = rows(&answered.message, count)?.into_iter().enumerate();
    let data = rows.map(|(index, bytes)| Embedding {
        object: "embedding",
        index,
        embedding: form(bytes),
    });
    let list = EmbeddingList {
        object: "list",
        data: data.collect(),
        model,
        usage: Usage::of(tokens(&answered.headers)),
    };
    let response = (answered.headers, axum::Json(list)).into_response();
    Ok(guarded(response, answered.held))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_have_the_same_bits() {
        let values = [
            0.1_f32,
            -1.0e-7,
            3.402_823_5e38,
            1.0,
            -0.0,
            f32::MIN_POSITIVE,
        ];
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let bytes = Bytes::from(bytes);
        let rows = [bytes.slice(..12), bytes.slice(12..)];
        let json = serde_json::to_string(&Vector::Float(rows[0].clone())).unwrap();
        let read: Vec<f32> = serde_json::from_str(&json).unwrap();
        let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&read), bits(&values[..3]));
        assert!(json.starts_with("[0.1,"), "{json}");
        let json = serde_json::to_string(&Vector::Base64(rows[1].clone())).unwrap();
        let text: String = serde_json::from_str(&json).unwrap();
        let bytes = base64::Engine::decode(&STANDARD, text).unwrap();
        assert_eq!(bytes, rows[1]);
    }

    #[test]
    fn unknown_fields_are_ignored_and_known_ones_checked() {
        let read = |json: &str| serde_json::from_str::<EmbeddingRequest>(json);
        let request =
            read(r#"{"model": "a", "input": "b", "extra": 1, "encoding_format": "base64"}"#);
        assert_eq!(
            request.unwrap().encoding_format,
            Some(EncodingFormat::Base64)
        );
        for wrong in [
            r#"{"input": "b"}"#,
            r#"{"model": "a", "input": "b", "encoding_format": "hex"}"#,
            r#"{"model": "a", "input": "b", "dimensions": -1}"#,
            r#"{"model": "a", "input": "b", "user": 1}"#,
        ] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }
}
