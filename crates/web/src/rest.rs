//! REST v2: the Open Inference Protocol in JSON, with Triton's extensions. Its
//! inference requests are read by [`super::infer`].

mod responses;

use std::collections::HashMap;

use axum::extract::{Request, State};
use axum::response::Response;
use axum::routing::{get, post};
use axum::{Json, Router};
use http::HeaderMap;
use platform::grpc::Message;
use prost::Message as _;
use protocol::inference::log_settings_request::SettingValue as LogSetting;
use protocol::inference::log_settings_request::setting_value::ParameterChoice as LogValue;
use protocol::inference::log_settings_response::setting_value::ParameterChoice as LoggedValue;
use protocol::inference::model_repository_parameter::ParameterChoice;
use protocol::inference::trace_setting_request::SettingValue as TraceSetting;
use protocol::inference::{
    LogSettingsRequest, ModelConfigRequest, ModelConfigResponse, ModelMetadataRequest,
    ModelMetadataResponse, ModelRepositoryParameter, ModelStatisticsRequest,
    RepositoryIndexRequest, RepositoryModelLoadRequest, RepositoryModelUnloadRequest,
    TraceSettingRequest,
};
use protocol::{Error, Kind, Method};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use super::body;
use super::context::RequestContext;
use super::endpoint::Endpoints;
use super::error::{ApiError, ErrorFormat};
use super::infer::infer;
use super::model_path::{ModelPath, PathModel};
use super::reply;
use super::schemas::{
    IndexedModel, ModelConfiguration, ModelMetadata, ModelReady, ParameterSchema, ServerLive,
    ServerMetadata, ServerReady, Statistics,
};
use super::strict::strict;
use gateway::stack::Stack;

/// The endpoints.
pub fn routes(stack: &Stack) -> Router<Stack> {
    let shared_memory = || get(shared_memory).post(shared_memory);
    Endpoints::new(stack, ErrorFormat::Problem)
        .public("/v2/health/live", get(live))
        .public("/v2/health/ready", get(ready))
        .authenticated("/v2", get(server))
        .authenticated("/v2/models/{model}", get(metadata))
        .authenticated("/v2/models/{model}/versions/{version}", get(metadata))
        .authenticated("/v2/models/{model}/ready", get(model_ready))
        .authenticated(
            "/v2/models/{model}/versions/{version}/ready",
            get(model_ready),
        )
        .authenticated("/v2/models/{model}/config", get(config))
        .authenticated("/v2/models/{model}/versions/{version}/config", get(config))
        .authenticated("/v2/models/stats", get(statistics))
        .authenticated("/v2/models/{model}/stats", get(statistics))
        .authenticated(
            "/v2/models/{model}/versions/{version}/stats",
            get(statistics),
        )
        .authenticated("/v2/models/{model}/infer", post(infer))
        .authenticated("/v2/models/{model}/versions/{version}/infer", post(infer))
        .authenticated("/v2/repository/index", post(index))
        .admin("/v2/repository/models/{model}/load", post(load))
        .admin("/v2/repository/models/{model}/unload", post(unload))
        .admin("/v2/logging", get(log).post(change_log))
        .admin("/v2/trace/setting", get(trace).post(change_trace))
        .admin(
            "/v2/models/{model}/trace/setting",
            get(trace).post(change_trace),
        )
        .authenticated("/v2/systemsharedmemory/{*rest}", shared_memory())
        .authenticated("/v2/cudasharedmemory/{*rest}", shared_memory())
        .into_router()
}

/// Bodies of settings and names.
const SETTINGS_BYTES_MAX: usize = 64 << 10;
/// About the length of a model in the statistics, and in the index.
const STATISTICS_BYTES: usize = 2 << 10;
const INDEXED_BYTES: usize = 256;

/// The JSON of an optional body; null is none.
async fn optional_json<T: DeserializeOwned + Default + Send + 'static>(
    context: &RequestContext,
    request: Request,
) -> Result<T, Error> {
    let content_type = body::check_content_type(request.headers());
    let limits = body::at_most(&context.limits, SETTINGS_BYTES_MAX);
    let received = body::read(request, &limits).await?;
    if received.length == 0 {
        return Ok(T::default());
    }
    content_type?;
    let read = body::Json::parse(context, received, body::owned::<Option<T>>).await?;
    Ok(read.value.unwrap_or_default())
}

/// Server liveness
///
/// Succeeds as long as the server responds.
#[utoipa::path(
    get, path = "/v2/health/live", tag = "Health", operation_id = "server_live",
    responses((status = 200, description = "The server is live", body = ServerLive))
)]
pub async fn live() -> Json<Value> {
    Json(json!({ "live": true }))
}

/// Server readiness
///
/// The server is ready when a model is ready and the server is not draining.
#[utoipa::path(
    get, path = "/v2/health/ready", tag = "Health", operation_id = "server_ready",
    responses((status = 200, description = "The server is ready", body = ServerReady))
)]
pub async fn ready(context: RequestContext) -> Result<Json<Value>, ApiError> {
    if context.stack.ready() {
        Ok(Json(json!({ "ready": true })))
    } else {
        Err(Error::not_ready("no model is ready").into())
    }
}

/// Server metadata
#[utoipa::path(
    get, path = "/v2", tag = "Inference", operation_id = "server_metadata",
    responses((status = 200, description = "Its name, version and extensions", body = ServerMetadata))
)]
pub async fn server(context: RequestContext) -> Json<Value> {
    let metadata = context.stack.server_metadata();
    Json(json!({
        "name": metadata.name,
        "version": metadata.version,
        "extensions": metadata.extensions,
    }))
}

/// Model metadata
#[utoipa::path(
    get, path = "/v2/models/{model}", tag = "Inference", operation_id = "model_metadata",
    params(ModelPath),
    responses((status = 200, description = "Its versions, inputs and outputs", body = ModelMetadata))
)]
pub async fn metadata(context: RequestContext, model: PathModel) -> Result<Response, ApiError> {
    let message = Message::encode(&ModelMetadataRequest {
        name: model.name.clone(),
        version: model.version.clone(),
    });
    let plan = context.route(&model.selector())?;
    let response = context
        .call::<ModelMetadataResponse>(Method::ModelMetadata, message, &plan)
        .await?;
    let bytes = response.message.encoded_len();
    let make = move || responses::metadata(&response.message);
    Ok(reply::json(&context, HeaderMap::new(), bytes, make).await?)
}

/// Model readiness
#[utoipa::path(
    get, path = "/v2/models/{model}/ready", tag = "Health", operation_id = "model_ready",
    params(ModelPath),
    responses((status = 200, description = "The model is ready", body = ModelReady))
)]
pub async fn model_ready(
    context: RequestContext,
    model: PathModel,
) -> Result<Json<Value>, ApiError> {
    let (name, version) = (&model.name, &model.version);
    context.stack.check_ready(name, version, &context.caller)?;
    Ok(Json(json!({ "name": name, "ready": true })))
}

/// Model configuration
#[utoipa::path(
    get, path = "/v2/models/{model}/config", tag = "Inference", operation_id = "model_config",
    params(ModelPath),
    responses((status = 200, description = "The configuration in Triton's format", body = ModelConfiguration))
)]
pub async fn config(context: RequestContext, model: PathModel) -> Result<Response, ApiError> {
    let message = Message::encode(&ModelConfigRequest {
        name: model.name.clone(),
        version: model.version.clone(),
    });
    let plan = context.route(&model.selector())?;
    let response = context
        .call::<ModelConfigResponse>(Method::ModelConfig, message, &plan)
        .await?;
    let bytes = response.message.encoded_len();
    let make = move || responses::config(&response.message.config.unwrap_or_default());
    Ok(reply::json(&context, HeaderMap::new(), bytes, make).await?)
}

/// Model statistics
#[utoipa::path(
    get, path = "/v2/models/{model}/stats", tag = "Inference", operation_id = "model_statistics",
    params(ModelPath),
    responses((status = 200, description = "Counts and durations, summed over all workers", body = Statistics))
)]
pub async fn statistics(context: RequestContext, model: PathModel) -> Result<Response, ApiError> {
    let request = ModelStatisticsRequest {
        name: model.name,
        version: model.version,
    };
    let response = context
        .stack
        .statistics(&request, context.deadline, &context.caller)
        .await?;
    let bytes = response.model_stats.len() * STATISTICS_BYTES;
    let make = move || responses::statistics(&response);
    Ok(reply::json(&context, HeaderMap::new(), bytes, make).await?)
}

/// Which models are listed.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(remote = "Self", deny_unknown_fields, default)]
#[schema(as = RepositoryIndexRequest, example = json!({"ready": true}))]
pub struct IndexRequest {
    /// Always empty: there is one repository.
    #[schema(max_length = 0)]
    repository_name: Option<String>,
    /// Whether only ready models are listed.
    ready: Option<bool>,
}

/// List model versions
///
/// The body is optional.
#[utoipa::path(
    post, path = "/v2/repository/index", tag = "Repository", operation_id = "repository_index",
    request_body = Option<IndexRequest>,
    responses((status = 200, description = "Every version of every model, with its state", body = Vec<IndexedModel>))
)]
pub async fn index(
    State(stack): State<Stack>,
    context: RequestContext,
    request: Request,
) -> Result<Response, ApiError> {
    let request: IndexRequest = optional_json(&context, request).await?;
    let request = RepositoryIndexRequest {
        repository_name: request.repository_name.unwrap_or_default(),
        ready: request.ready.unwrap_or_default(),
    };
    let response = stack
        .index(&request, context.deadline, &context.caller)
        .await?;
    let bytes = response.models.len() * INDEXED_BYTES;
    let make = move || responses::index(&response);
    Ok(reply::json(&context, HeaderMap::new(), bytes, make).await?)
}

/// Parameters of loading or unloading a model.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(remote = "Self", deny_unknown_fields, default)]
#[schema(as = RepositoryModelRequest, example = json!({}))]
pub struct LoadRequest {
    /// The parameters of Triton's repository extension.
    #[schema(value_type = Option<BTreeMap<String, ParameterSchema>>)]
    parameters: Option<Map<String, Value>>,
}

strict!(object IndexRequest, LoadRequest);

impl LoadRequest {
    fn parameters(self) -> Result<HashMap<String, ModelRepositoryParameter>, Error> {
        let parameter = |(name, value): (String, Value)| {
            let choice = match value {
                Value::Bool(value) => ParameterChoice::BoolParam(value),
                Value::String(value) => ParameterChoice::StringParam(value),
                Value::Number(value) if value.is_i64() => {
                    ParameterChoice::Int64Param(value.as_i64().unwrap_or_default())
                }
                _ => {
                    let reason = "must be a boolean, an integer or a string";
                    return Err(Error::invalid(format!("parameters[{name}]"), reason));
                }
            };
            let parameter_choice = Some(choice);
            Ok((name, ModelRepositoryParameter { parameter_choice }))
        };
        let given = self.parameters.into_iter().flatten();
        // A parameter that is null is absent.
        let given = given.filter(|(_, value)| !value.is_null());
        given.map(parameter).collect()
    }
}

/// Load a model
///
/// For administrators. Every worker loads the model, again if it has it already.
#[utoipa::path(
    post, path = "/v2/repository/models/{model}/load", tag = "Repository", operation_id = "load_model",
    params(ModelPath), request_body = Option<LoadRequest>,
    responses((status = 200, description = "The model is loaded"))
)]
pub async fn load(
    State(stack): State<Stack>,
    context: RequestContext,
    model: PathModel,
    request: Request,
) -> Result<(), ApiError> {
    let request: LoadRequest = optional_json(&context, request).await?;
    let request = RepositoryModelLoadRequest {
        model_name: model.name,
        parameters: request.parameters()?,
        ..Default::default()
    };
    stack.load(&request, context.deadline).await?;
    Ok(())
}

/// Unload a model
///
/// For administrators. Requests in flight finish first.
#[utoipa::path(
    post, path = "/v2/repository/models/{model}/unload", tag = "Repository", operation_id = "unload_model",
    params(ModelPath), request_body = Option<LoadRequest>,
    responses((status = 200, description = "The model is unloaded"))
)]
pub async fn unload(
    State(stack): State<Stack>,
    context: RequestContext,
    model: PathModel,
    request: Request,
) -> Result<(), ApiError> {
    let request: LoadRequest = optional_json(&context, request).await?;
    let request = RepositoryModelUnloadRequest {
        model_name: model.name,
        parameters: request.parameters()?,
        ..Default::default()
    };
    stack.unload(&request, context.deadline).await?;
    Ok(())
}

/// Log settings
///
/// For administrators.
#[utoipa::path(
    get, path = "/v2/logging", tag = "Settings", operation_id = "log_settings",
    responses((status = 200, description = "The settings", body = BTreeMap<String, Value>))
)]
pub async fn log(State(stack): State<Stack>) -> Result<Json<Value>, ApiError> {
    log_settings(&stack, LogSettingsRequest::default())
}

/// Update log settings
///
/// For administrators.
#[utoipa::path(
    post, path = "/v2/logging", tag = "Settings", operation_id = "change_log_settings",
    request_body(content = Option<BTreeMap<String, Value>>, example = json!({"log_verbose_level": 1})),
    responses((status = 200, description = "The settings", body = BTreeMap<String, Value>))
)]
pub async fn change_log(
    State(stack): State<Stack>,
    context: RequestContext,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let request: Map<String, Value> = optional_json(&context, request).await?;
    let setting = |(name, value): (String, Value)| {
        let parameter_choice = match value {
            Value::Bool(on) => Some(LogValue::BoolParam(on)),
            Value::Number(number) => number
                .as_u64()
                .and_then(|number| u32::try_from(number).ok())
                .map(LogValue::Uint32Param),
            Value::String(text) => Some(LogValue::StringParam(text)),
            _ => None,
        };
        (name, LogSetting { parameter_choice })
    };
    let settings = request.into_iter().map(setting).collect();
    log_settings(&stack, LogSettingsRequest { settings })
}

fn log_settings(stack: &Stack, request: LogSettingsRequest) -> Result<Json<Value>, ApiError> {
    let response = stack.log(&request)?;
    let setting = |(name, value): (String, Option<LoggedValue>)| {
        let value = match value {
            Some(LoggedValue::BoolParam(on)) => json!(on),
            Some(LoggedValue::Uint32Param(number)) => json!(number),
            Some(LoggedValue::StringParam(text)) => json!(text),
            None => Value::Null,
        };
        (name, value)
    };
    let settings = response
        .settings
        .into_iter()
        .map(|(name, value)| setting((name, value.parameter_choice)));
    Ok(Json(Value::Object(settings.collect())))
}

/// Trace settings
///
/// For administrators.
#[utoipa::path(
    get, path = "/v2/trace/setting", tag = "Settings", operation_id = "trace_settings",
    responses((status = 200, description = "The settings", body = BTreeMap<String, Value>))
)]
pub async fn trace(State(stack): State<Stack>, model: PathModel) -> Result<Json<Value>, ApiError> {
    trace_settings(&stack, model, HashMap::new())
}

/// Update trace settings
///
/// For administrators.
#[utoipa::path(
    post, path = "/v2/trace/setting", tag = "Settings", operation_id = "change_trace_settings",
    request_body(content = Option<BTreeMap<String, Value>>, example = json!({"trace_rate": "100"})),
    responses((status = 200, description = "The settings", body = BTreeMap<String, Value>))
)]
pub async fn change_trace(
    State(stack): State<Stack>,
    context: RequestContext,
    model: PathModel,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let request: Map<String, Value> = optional_json(&context, request).await?;
    let setting = |(name, value): (String, Value)| {
        let value = setting_values(&value).ok_or_else(|| {
            let reason = "must be a string, a number, a list of strings or null";
            Error::invalid(format!("settings[{name}]"), reason)
        })?;
        Ok((name, TraceSetting { value }))
    };
    let settings = request.into_iter().map(setting);
    trace_settings(&stack, model, settings.collect::<Result<_, Error>>()?)
}

/// The values of a setting; an empty list clears it.
fn setting_values(value: &Value) -> Option<Vec<String>> {
    let one = |value: &Value| match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    };
    match value {
        Value::Null => Some(Vec::new()),
        Value::Array(values) => values.iter().map(one).collect(),
        value => Some(vec![one(value)?]),
    }
}

fn trace_settings(
    stack: &Stack,
    model: PathModel,
    settings: HashMap<String, TraceSetting>,
) -> Result<Json<Value>, ApiError> {
    let request = TraceSettingRequest {
        settings,
        model_name: model.name,
    };
    let response = stack.trace(&request)?;
    let setting = |(name, value): (String, Vec<String>)| {
        // The level may have several values.
        let value = match value.as_slice() {
            [one] if name != "trace_level" => json!(one),
            values => json!(values),
        };
        (name, value)
    };
    let settings = response
        .settings
        .into_iter()
        .map(|(name, value)| setting((name, value.value)));
    Ok(Json(Value::Object(settings.collect())))
}

async fn shared_memory(request: Request) -> ApiError {
    platform::body::discard(request.into_body()).await;
    Error::new(Kind::Unsupported, protocol::SHARED_MEMORY_UNSUPPORTED).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn null_parameters_are_absent() {
        for (text, count) in [
            ("{}", 0),
            (r#"{"parameters": null}"#, 0),
            (r#"{"parameters": {"a": null, "b": 1}}"#, 1),
        ] {
            let request: LoadRequest = body::owned(text.as_bytes()).unwrap();
            assert_eq!(request.parameters().unwrap().len(), count, "{text}");
        }
        let list: LoadRequest = body::owned(br#"{"parameters": {"a": []}}"#).unwrap();
        let error = list.parameters().unwrap_err();
        assert_eq!(error.field().unwrap(), "parameters[a]");
    }
}
