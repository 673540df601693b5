//! REST v2: the Open Inference Protocol in JSON, with Triton's extensions.

mod answers;
pub mod settings;

use axum::extract::{FromRequestParts, Path, Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use http::HeaderMap;
use http::header::CONTENT_TYPE;
use http::request::Parts;
use platform::grpc::Message;
use protocol::inference::model_repository_parameter::ParameterChoice;
use protocol::inference::{
    ModelConfigRequest, ModelConfigResponse, ModelMetadataRequest, ModelMetadataResponse,
    ModelRepositoryParameter, ModelStatisticsRequest, RepositoryIndexRequest,
    RepositoryModelLoadRequest, RepositoryModelUnloadRequest,
};
use protocol::{Error, Kind, Method};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use super::body;
use super::gate::{Routes, Visit};
use super::openapi::ModelPath;
use super::openapi::rest::{
    IndexedModel, ModelConfiguration, ModelMetadata, ParameterForm, ServerMetadata, Statistics,
};
use super::problem::{Refused, Shape};
use super::strict::strict;
use super::tensors::infer;
use crate::request::ModelSelector;
use crate::stack::Stack;

/// Every route.
pub fn routes(stack: &Stack) -> Router<Stack> {
    let shared_memory = || get(shared_memory).post(shared_memory);
    Routes::new(stack, Shape::Problem)
        .open("/v2/health/live", get(live))
        .open("/v2/health/ready", get(ready))
        .callers("/v2", get(server))
        .callers("/v2/models/{model}", get(metadata))
        .callers("/v2/models/{model}/versions/{version}", get(metadata))
        .callers("/v2/models/{model}/ready", get(model_ready))
        .callers(
            "/v2/models/{model}/versions/{version}/ready",
            get(model_ready),
        )
        .callers("/v2/models/{model}/config", get(config))
        .callers("/v2/models/{model}/versions/{version}/config", get(config))
        .callers("/v2/models/stats", get(statistics))
        .callers("/v2/models/{model}/stats", get(statistics))
        .callers(
            "/v2/models/{model}/versions/{version}/stats",
            get(statistics),
        )
        .callers("/v2/models/{model}/infer", post(infer))
        .callers("/v2/models/{model}/versions/{version}/infer", post(infer))
        .callers("/v2/repository/index", post(index))
        .administrators("/v2/repository/models/{model}/load", post(load))
        .administrators("/v2/repository/models/{model}/unload", post(unload))
        .administrators("/v2/logging", get(settings::log).post(settings::change_log))
        .administrators(
            "/v2/trace/setting",
            get(settings::trace).post(settings::change_trace),
        )
        .administrators(
            "/v2/models/{model}/trace/setting",
            get(settings::trace).post(settings::change_trace),
        )
        .callers("/v2/systemsharedmemory/{*rest}", shared_memory())
        .callers("/v2/cudasharedmemory/{*rest}", shared_memory())
        .into_router()
}

/// The model that a path names. What it is called, and whether there is one,
/// is checked below, as at the other door.
#[derive(Debug, Default)]
pub struct Model {
    /// Its name; empty where the path has none.
    pub name: String,
    /// Its version; empty for the newest.
    pub version: String,
}

impl Model {
    /// The model that a call is for.
    pub fn wanted(&self) -> ModelSelector {
        ModelSelector::Named {
            name: self.name.clone(),
            version: self.version.clone(),
            field: "model_name",
        }
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Model {
    type Rejection = Refused;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refused> {
        let found = Path::<Vec<(String, String)>>::from_request_parts(parts, state).await;
        let Path(found) = found.map_err(|_| Error::invalid("path", "is no Unicode text"))?;
        let mut model = Self::default();
        for (name, value) in found {
            match name.as_str() {
                "model" => model.name = value,
                "version" => model.version = value,
                _ => {}
            }
        }
        Ok(model)
    }
}

/// An error for what is certainly no request of this protocol. Its clients
/// name their JSON as their libraries like: as JSON, as bytes or as text.
pub fn must_be_known(headers: &HeaderMap) -> Result<(), Error> {
    let kind = headers.get(CONTENT_TYPE).map(|kind| kind.as_bytes());
    let known = |kind: &[u8]| {
        let named = kind.split(|byte| *byte == b';').next().unwrap_or_default();
        [&b"application/octet-stream"[..], b"text/plain"]
            .iter()
            .any(|known| named.trim_ascii().eq_ignore_ascii_case(known))
    };
    if kind.is_some_and(known) {
        return Ok(());
    }
    body::must_be_json(headers)
}

/// Settings and names.
const SETTINGS_BYTES_MAX: usize = 1 << 20;

/// The JSON of a body that may be left out.
async fn optional<T: for<'de> Deserialize<'de> + Default>(
    stack: &Stack,
    request: Request,
) -> Result<T, Error> {
    let known = must_be_known(request.headers());
    let limits = body::at_most(&stack.0.limits, SETTINGS_BYTES_MAX);
    let received = body::read(request, &limits).await?;
    if received.length == 0 {
        return Ok(T::default());
    }
    known?;
    body::json(&received.joined())
}

/// Whether the server lives
#[utoipa::path(
    get, path = "/v2/health/live", tag = "Health", operation_id = "server_live",
    responses((status = 200, description = "It lives"))
)]
pub async fn live() {}

/// Whether the server is ready
///
/// It is when a model is ready and it does not drain.
#[utoipa::path(
    get, path = "/v2/health/ready", tag = "Health", operation_id = "server_ready",
    responses((status = 200, description = "A model is ready"))
)]
pub async fn ready(visit: Visit) -> Result<(), Refused> {
    match visit.stack.ready() {
        true => Ok(()),
        false => Err(Error::new(Kind::NotReady, "no model is ready").into()),
    }
}

/// What the server is
#[utoipa::path(
    get, path = "/v2", tag = "Inference", operation_id = "server_metadata",
    responses((status = 200, description = "Its name, version and extensions", body = ServerMetadata))
)]
pub async fn server() -> Json<Value> {
    Json(json!({
        "name": "andon",
        "version": platform::VERSION,
        "extensions": protocol::EXTENSIONS,
    }))
}

/// What a model takes and gives
#[utoipa::path(
    get, path = "/v2/models/{model}", tag = "Inference", operation_id = "model_metadata",
    params(ModelPath),
    responses((status = 200, description = "Its versions, inputs and outputs", body = ModelMetadata))
)]
pub async fn metadata(visit: Visit, model: Model) -> Result<Response, Refused> {
    let asked = Message::encode(&ModelMetadataRequest {
        name: model.name.clone(),
        version: model.version.clone(),
    });
    let plan = visit.route(&model.wanted())?;
    let answered = visit
        .ask::<ModelMetadataResponse>(Method::ModelMetadata, asked, &plan)
        .await?;
    Ok(Json(answers::metadata(&answered.message)).into_response())
}

/// Whether a model is ready
#[utoipa::path(
    get, path = "/v2/models/{model}/ready", tag = "Health", operation_id = "model_ready",
    params(ModelPath),
    responses((status = 200, description = "It can be called"))
)]
pub async fn model_ready(visit: Visit, model: Model) -> Result<(), Refused> {
    visit.caller.must_be_allowed(&model.name)?;
    let routes = &visit.stack.0.routes;
    Ok(routes.ready(&model.name, &model.version)?)
}

/// How a model is configured
#[utoipa::path(
    get, path = "/v2/models/{model}/config", tag = "Inference", operation_id = "model_config",
    params(ModelPath),
    responses((status = 200, description = "As Triton writes it", body = ModelConfiguration))
)]
pub async fn config(visit: Visit, model: Model) -> Result<Response, Refused> {
    let asked = Message::encode(&ModelConfigRequest {
        name: model.name.clone(),
        version: model.version.clone(),
    });
    let plan = visit.route(&model.wanted())?;
    let answered = visit
        .ask::<ModelConfigResponse>(Method::ModelConfig, asked, &plan)
        .await?;
    let config = answered.message.config.unwrap_or_default();
    Ok(Json(answers::config(&config)).into_response())
}

/// What a model has done
#[utoipa::path(
    get, path = "/v2/models/{model}/stats", tag = "Inference", operation_id = "model_statistics",
    params(ModelPath),
    responses((status = 200, description = "Counts and times, summed over the workers", body = Statistics))
)]
pub async fn statistics(visit: Visit, model: Model) -> Result<Json<Value>, Refused> {
    let asked = ModelStatisticsRequest {
        name: model.name,
        version: model.version,
    };
    let answer = visit
        .stack
        .statistics(&asked, visit.deadline, &visit.caller)
        .await?;
    Ok(Json(answers::statistics(&answer)))
}

/// Which models are asked for.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(remote = "Self", deny_unknown_fields, default)]
#[schema(as = RepositoryIndexRequest, example = json!({"ready": true}))]
pub struct IndexAsked {
    /// A server has one repository: empty.
    #[schema(max_length = 0)]
    repository_name: String,
    /// Whether only those that are ready are wanted.
    ready: bool,
}

/// Which models there are
///
/// The body may be left out.
#[utoipa::path(
    post, path = "/v2/repository/index", tag = "Repository", operation_id = "repository_index",
    request_body = Option<IndexAsked>,
    responses((status = 200, description = "Every version of every model, and its state", body = Vec<IndexedModel>))
)]
pub async fn index(
    State(stack): State<Stack>,
    visit: Visit,
    request: Request,
) -> Result<Json<Value>, Refused> {
    let asked: IndexAsked = optional(&stack, request).await?;
    let asked = RepositoryIndexRequest {
        repository_name: asked.repository_name,
        ready: asked.ready,
    };
    let answer = stack.index(&asked, visit.deadline, &visit.caller).await?;
    Ok(Json(answers::index(&answer)))
}

/// How a model is loaded or unloaded.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(remote = "Self", deny_unknown_fields, default)]
#[schema(as = RepositoryModelRequest, example = json!({}))]
pub struct LoadAsked {
    /// Triton's parameters.
    #[schema(value_type = BTreeMap<String, ParameterForm>)]
    parameters: Map<String, Value>,
}

strict!(object IndexAsked, LoadAsked);

impl LoadAsked {
    fn parameters(
        self,
    ) -> Result<std::collections::HashMap<String, ModelRepositoryParameter>, Error> {
        let parameter = |(name, value): (String, Value)| {
            let choice = match value {
                Value::Bool(value) => ParameterChoice::BoolParam(value),
                Value::String(value) => ParameterChoice::StringParam(value),
                Value::Number(value) if value.is_i64() => {
                    ParameterChoice::Int64Param(value.as_i64().unwrap_or_default())
                }
                _ => {
                    let reason = "must be a boolean, a whole number or a text";
                    return Err(Error::invalid(format!("parameters[{name}]"), reason));
                }
            };
            let parameter_choice = Some(choice);
            Ok((name, ModelRepositoryParameter { parameter_choice }))
        };
        self.parameters.into_iter().map(parameter).collect()
    }
}

/// Load a model
///
/// For administrators. Every worker loads it, or loads it again.
#[utoipa::path(
    post, path = "/v2/repository/models/{model}/load", tag = "Repository", operation_id = "load_model",
    params(ModelPath), request_body = Option<LoadAsked>,
    responses((status = 200, description = "It is loaded"))
)]
pub async fn load(
    State(stack): State<Stack>,
    visit: Visit,
    model: Model,
    request: Request,
) -> Result<(), Refused> {
    let asked: LoadAsked = optional(&stack, request).await?;
    let asked = RepositoryModelLoadRequest {
        model_name: model.name,
        parameters: asked.parameters()?,
        ..Default::default()
    };
    stack.load(&asked, visit.deadline).await?;
    Ok(())
}

/// Unload a model
///
/// For administrators. What is under way finishes first.
#[utoipa::path(
    post, path = "/v2/repository/models/{model}/unload", tag = "Repository", operation_id = "unload_model",
    params(ModelPath), request_body = Option<LoadAsked>,
    responses((status = 200, description = "It is unloaded"))
)]
pub async fn unload(
    State(stack): State<Stack>,
    visit: Visit,
    model: Model,
    request: Request,
) -> Result<(), Refused> {
    let asked: LoadAsked = optional(&stack, request).await?;
    let asked = RepositoryModelUnloadRequest {
        model_name: model.name,
        parameters: asked.parameters()?,
        ..Default::default()
    };
    stack.unload(&asked, visit.deadline).await?;
    Ok(())
}

async fn shared_memory(request: Request) -> Refused {
    platform::body::discard(request.into_body()).await;
    Error::new(Kind::Unsupported, protocol::SHARED_MEMORY_UNSUPPORTED).into()
}
