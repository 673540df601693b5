//! Models and embeddings in the format of OpenAI's API. Unknown fields are
//! ignored, since its clients also send fields that only other servers know.

mod ids;
mod input;

pub use input::{Input, Items};

use std::sync::LazyLock;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::response::Response;
use axum::routing::{get, post};
use axum::{Extension, Router};
use base64::display::Base64Display;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::HeaderMap;
use protocol::inference::ModelInferResponse;
use protocol::inference::infer_parameter::ParameterChoice;
use protocol::{Error, Kind, Method, PROMPT, PROMPT_NAME, Task};
use serde::ser::SerializeSeq;
use serde::{Deserialize, Serialize, Serializer};
use utoipa::ToSchema;

use super::body::Json;
use super::context::{CallResponse, RequestContext};
use super::endpoint::Endpoints;
use super::error::{ApiError, ErrorFormat};
use super::model_path::{ModelPath, PathModel};
use super::reply;
use super::strict::strict;
use super::texts::{
    InputFields, call_model, computed_tokens, encoded, infer_request, select_model,
};
use gateway::stack::Stack;
use ids::{IdFields, IdTakers};

const TASKS: &[Task] = &[Task::Embedding];

/// About the length of a model in a list.
const LISTED_BYTES: usize = 128;

/// When this gateway started: models have no date of their own.
static STARTED_S: LazyLock<u64> = LazyLock::new(|| {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
});

/// Texts to embed.
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
    /// The texts, or their token ids.
    pub input: Input,
    /// The format of the embeddings; `float` by default.
    #[serde(default)]
    pub encoding_format: Option<EncodingFormat>,
    /// The number of leading dimensions to keep, normalized to length 1 again unless
    /// `normalize` is false.
    #[serde(default)]
    #[schema(minimum = 1)]
    pub dimensions: Option<u32>,
    /// Whether embeddings are normalized to length 1, as those of OpenAI's models
    /// are; true if it is not set. An extension of Andon.
    #[serde(default)]
    pub normalize: Option<bool>,
    /// Whether a text that is too long is truncated; it is an error otherwise. An
    /// extension of Andon.
    #[serde(default)]
    pub truncate: Option<bool>,
    /// The name of the model's prompt that is put before each text; its default
    /// prompt if none is set. Token ids take no prompt. An extension of Andon.
    #[serde(default)]
    pub prompt_name: Option<String>,
    /// The prompt itself, in place of `prompt_name`; no prompt if it is empty. An
    /// extension of Andon.
    #[serde(default)]
    pub prompt: Option<String>,
    /// The end user; accepted and not used.
    #[serde(default, rename = "user")]
    #[allow(dead_code, reason = "it is only checked to be a text")]
    user: Option<String>,
}

strict!(object EmbeddingRequest);

impl EmbeddingRequest {
    /// The parameters of the model's call.
    fn parameters(&self) -> Vec<(&'static str, ParameterChoice)> {
        let normalize = self.normalize.unwrap_or(true);
        let mut parameters = vec![("normalize", ParameterChoice::BoolParam(normalize))];
        if let Some(dimensions) = self.dimensions {
            parameters.push(("dimensions", ParameterChoice::Int64Param(dimensions.into())));
        }
        if self.truncate == Some(true) {
            parameters.push(("truncate", ParameterChoice::BoolParam(true)));
        }
        for (name, text) in [(PROMPT_NAME, &self.prompt_name), (PROMPT, &self.prompt)] {
            if let Some(text) = text {
                parameters.push((name, ParameterChoice::StringParam(text.clone())));
            }
        }
        parameters
    }
}

/// The format of embeddings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(remote = "Self", rename_all = "lowercase")]
pub enum EncodingFormat {
    /// A list of numbers.
    Float,
    /// The bytes of little-endian 32-bit floats in base64.
    Base64,
}

strict!(word EncodingFormat);

/// Embeddings.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = EmbeddingResponse)]
pub struct EmbeddingList {
    /// Always `list`.
    #[schema(example = "list")]
    object: &'static str,
    /// One for each input, in the order of the inputs.
    data: Vec<Embedding>,
    /// The model.
    #[schema(example = "minilm")]
    model: String,
    /// The token usage.
    usage: Usage,
}

/// One embedding.
#[derive(Debug, Serialize, ToSchema)]
pub struct Embedding {
    /// Always `embedding`.
    #[schema(example = "embedding")]
    object: &'static str,
    /// The index of its input in the request.
    #[schema(minimum = 0)]
    index: usize,
    /// The vector, in the format of `encoding_format`.
    #[schema(value_type = VectorSchema)]
    embedding: Vector,
}

/// A vector in one of the formats.
#[derive(Debug, ToSchema)]
#[schema(as = Vector)]
#[serde(untagged)]
#[allow(dead_code, reason = "it is the schema of `Vector`, which holds bytes")]
pub enum VectorSchema {
    /// A list of numbers.
    #[schema(example = json!([0.0127, -0.0431, 0.0764]))]
    Float(Vec<f32>),
    /// The bytes of little-endian 32-bit floats in base64.
    Base64(String),
}

/// The bytes of little-endian 32-bit floats, in the format to write them in.
#[derive(Debug)]
enum Vector {
    Float(Bytes),
    Base64(Bytes),
}

/// Token usage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
pub struct Usage {
    /// Tokens computed for the request: rows found in the cache count as none.
    pub prompt_tokens: u64,
    /// The same, since nothing is generated.
    pub total_tokens: u64,
}

impl Usage {
    /// The usage of a request for which so many tokens were computed.
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
    /// Sorted by name.
    data: Vec<ListedModel>,
}

/// A model.
#[derive(Debug, Serialize, ToSchema)]
pub struct ListedModel {
    /// Its name.
    #[schema(example = "minilm")]
    id: String,
    /// Always `model`.
    #[schema(example = "model")]
    object: &'static str,
    /// When this gateway started, in seconds since 1970.
    created: u64,
    /// Always `andon`.
    #[schema(example = "andon")]
    owned_by: &'static str,
}

impl ListedModel {
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

/// The endpoints.
pub fn routes(stack: &Stack) -> Router<Stack> {
    Endpoints::new(stack, ErrorFormat::OpenAi)
        .authenticated("/v1/models", get(list_models))
        .authenticated("/v1/models/{model}", get(show_model))
        .authenticated("/v1/embeddings", post(embed))
        .into_router()
        .layer(Extension(IdTakers::default()))
}

/// List models
///
/// The models that are ready and that the caller may call: models of workers,
/// models of outside services, and fallback chains.
#[utoipa::path(
    get, path = "/v1/models", tag = "OpenAI", operation_id = "list_models",
    responses((status = 200, description = "The models, sorted by name", body = ModelList))
)]
pub async fn list_models(context: RequestContext) -> Result<Response, ApiError> {
    let names = context.stack.ready_models(&context.caller);
    let bytes = names.len() * LISTED_BYTES;
    let make = move || ModelList {
        object: "list",
        data: names.into_iter().map(ListedModel::named).collect(),
    };
    Ok(reply::json(&context, HeaderMap::new(), bytes, make).await?)
}

/// Retrieve model
///
/// An error if the model is not ready.
#[utoipa::path(
    get, path = "/v1/models/{model}", tag = "OpenAI", operation_id = "show_model",
    params(ModelPath),
    responses((status = 200, description = "The model", body = ListedModel))
)]
pub async fn show_model(
    context: RequestContext,
    model: PathModel,
) -> Result<axum::Json<ListedModel>, ApiError> {
    let ready = context.stack.check_ready(&model.name, "", &context.caller);
    ready.map_err(|error| error.map_field(|_| Some("model".into())))?;
    Ok(axum::Json(ListedModel::named(model.name)))
}

/// Create embeddings
///
/// Unknown fields are ignored.
///
/// Token ids go to the model as they are, if its metadata has the inputs
/// input_ids and input_lengths; other models take texts only.
#[utoipa::path(
    post, path = "/v1/embeddings", tag = "OpenAI", operation_id = "create_embedding",
    request_body = EmbeddingRequest,
    responses((status = 200, description = "One embedding for each input", body = EmbeddingList))
)]
pub async fn embed(
    Extension(takers): Extension<IdTakers>,
    context: RequestContext,
    request: Json<EmbeddingRequest>,
) -> Result<Response, ApiError> {
    let request = request.value;
    let parameters = request.parameters();
    let input = request.input.checked()?;
    if request.dimensions == Some(0) {
        return Err(Error::invalid("dimensions", "must be at least 1").into());
    }
    let plan = select_model(&context, Some(&request.model), TASKS)?;
    let fields = InputFields {
        single: input.single,
        first: 0,
    };
    let count = input.len();
    let model = plan.name().to_owned();
    let (message, ids) = match input.items {
        Items::Texts(texts) => {
            let bytes = texts.iter().map(String::len).sum();
            let make = move || infer_request(&model, &texts, parameters);
            (encoded(&context, bytes, make).await?, None)
        }
        Items::Tokens(lists) => {
            ids::must_be_taken(&takers, &context, &plan, fields).await?;
            let fields = IdFields::of(&lists, input.single);
            let bytes = fields.message_bytes();
            let make = move || Ok(ids::infer_request(&model, &lists, parameters));
            (encoded(&context, bytes, make).await?, Some(fields))
        }
    };
    let response = call_model(&context, Method::ModelInfer, &plan, message).await;
    let response: CallResponse<ModelInferResponse> =
        response.map_err(|error: Error| match &ids {
            Some(ids) => ids.of_infer(error),
            None => fields.of_infer(error),
        })?;
    let format = match request.encoding_format {
        Some(EncodingFormat::Base64) => Vector::Base64,
        _ => Vector::Float,
    };
    let vectors = vectors(&response.message, count)?;
    let bytes = vectors.iter().map(Bytes::len).sum();
    let tokens = computed_tokens(&response.headers);
    let (model, held) = (plan.name().to_owned(), response.held);
    let make = move || {
        // The vectors are parts of the upstream's message.
        let _held = held;
        list(model, vectors.into_iter().map(format), Usage::of(tokens))
    };
    Ok(reply::json(&context, response.headers, bytes, make).await?)
}

fn list(model: String, vectors: impl Iterator<Item = Vector>, usage: Usage) -> EmbeddingList {
    let data = vectors.enumerate().map(|(index, embedding)| Embedding {
        object: "embedding",
        index,
        embedding,
    });
    EmbeddingList {
        object: "list",
        data: data.collect(),
        model,
        usage,
    }
}

/// The bytes of each vector: FP32, little-endian.
fn vectors(response: &ModelInferResponse, count: usize) -> Result<Vec<Bytes>, Error> {
    let output = response.outputs.first();
    let raw = response.raw_output_contents.first();
    let (Some(output), Some(raw)) = (output, raw) else {
        return Err(no_vectors());
    };
    let width = match output.shape.as_slice() {
        [rows, width] if usize::try_from(*rows).ok() == Some(count) => usize::try_from(*width).ok(),
        _ => None,
    };
    let bytes = width.and_then(|width| width.checked_mul(4));
    let whole = bytes.and_then(|bytes| bytes.checked_mul(count)) == Some(raw.len());
    match bytes {
        Some(bytes) if whole && bytes > 0 && output.datatype == "FP32" => {
            let row = |index: usize| raw.slice(index * bytes..(index + 1) * bytes);
            Ok((0..count).map(row).collect())
        }
        _ => Err(no_vectors()),
    }
}

fn no_vectors() -> Error {
    let reason = "the model's output is not one FP32 vector for each text";
    Error::new(Kind::Unsupported, reason)
}

#[cfg(test)]
mod tests {
    use protocol::inference::model_infer_response::InferOutputTensor;

    use super::*;

    #[test]
    fn both_formats_have_the_same_bits() {
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
            r#"{"model": "a", "input": "b", "normalize": "no"}"#,
            r#"{"model": "a", "input": "b", "prompt_name": 1}"#,
            r#"{"model": "a", "input": "b", "prompt": ["c"]}"#,
        ] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn embeddings_are_normalized_unless_the_request_says_no() {
        for (field, normalize) in [
            ("", true),
            (r#", "normalize": null"#, true),
            (r#", "normalize": true"#, true),
            (r#", "normalize": false"#, false),
        ] {
            let json = format!(r#"{{"model": "a", "input": "b"{field}}}"#);
            let request: EmbeddingRequest = serde_json::from_str(&json).unwrap();
            let expected = ("normalize", ParameterChoice::BoolParam(normalize));
            assert_eq!(request.parameters(), [expected], "{json}");
        }
    }

    fn response(shape: &[i64], values: &[f32]) -> ModelInferResponse {
        let raw: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        ModelInferResponse {
            outputs: vec![InferOutputTensor {
                name: "embedding".into(),
                datatype: "FP32".into(),
                shape: shape.to_vec(),
                ..Default::default()
            }],
            raw_output_contents: vec![raw.into()],
            ..Default::default()
        }
    }

    #[test]
    fn what_is_no_vector_is_an_error() {
        for (shape, count) in [(&[2_i64, 3][..], 3), (&[2, 2], 2), (&[6], 6), (&[-1, 3], 2)] {
            let response = response(shape, &[0.0; 6]);
            assert_eq!(
                vectors(&response, count).unwrap_err().kind(),
                Kind::Unsupported
            );
        }
    }
}
