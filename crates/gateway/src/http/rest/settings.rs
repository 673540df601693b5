//! What is logged and traced, as Triton's JSON has it.

use std::collections::HashMap;

use axum::Json;
use axum::extract::{Request, State};
use protocol::Error;
use protocol::inference::log_settings_request::SettingValue as LogAsked;
use protocol::inference::log_settings_request::setting_value::ParameterChoice as Asked;
use protocol::inference::log_settings_response::setting_value::ParameterChoice as Answered;
use protocol::inference::trace_setting_request::SettingValue as TraceAsked;
use protocol::inference::{LogSettingsRequest, TraceSettingRequest};
use serde_json::{Map, Value, json};

use super::super::problem::Refused;
use super::{Model, optional};
use crate::stack::Stack;

/// What is logged
///
/// For administrators.
#[utoipa::path(
    get, path = "/v2/logging", tag = "Settings", operation_id = "log_settings",
    responses((status = 200, description = "The settings", body = BTreeMap<String, Value>))
)]
pub async fn log(State(stack): State<Stack>) -> Result<Json<Value>, Refused> {
    answer_log(&stack, LogSettingsRequest::default())
}

/// Change what is logged
///
/// For administrators.
#[utoipa::path(
    post, path = "/v2/logging", tag = "Settings", operation_id = "change_log_settings",
    request_body(content = Option<BTreeMap<String, Value>>, example = json!({"log_verbose_level": 1})),
    responses((status = 200, description = "The settings", body = BTreeMap<String, Value>))
)]
pub async fn change_log(
    State(stack): State<Stack>,
    request: Request,
) -> Result<Json<Value>, Refused> {
    let asked: Map<String, Value> = optional(&stack, request).await?;
    let setting = |(name, value): (String, Value)| {
        let parameter_choice = match value {
            Value::Bool(on) => Some(Asked::BoolParam(on)),
            Value::Number(number) => number
                .as_u64()
                .and_then(|number| u32::try_from(number).ok())
                .map(Asked::Uint32Param),
            Value::String(text) => Some(Asked::StringParam(text)),
            _ => None,
        };
        (name, LogAsked { parameter_choice })
    };
    let settings = asked.into_iter().map(setting).collect();
    answer_log(&stack, LogSettingsRequest { settings })
}

fn answer_log(stack: &Stack, asked: LogSettingsRequest) -> Result<Json<Value>, Refused> {
    let answer = stack.log(&asked)?;
    let setting = |(name, value): (String, Option<Answered>)| {
        let value = match value {
            Some(Answered::BoolParam(on)) => json!(on),
            Some(Answered::Uint32Param(number)) => json!(number),
            Some(Answered::StringParam(text)) => json!(text),
            None => Value::Null,
        };
        (name, value)
    };
    let settings = answer
        .settings
        .into_iter()
        .map(|(name, value)| setting((name, value.parameter_choice)));
    Ok(Json(Value::Object(settings.collect())))
}

/// What is traced
///
/// For administrators.
#[utoipa::path(
    get, path = "/v2/trace/setting", tag = "Settings", operation_id = "trace_settings",
    responses((status = 200, description = "The settings", body = BTreeMap<String, Value>))
)]
pub async fn trace(State(stack): State<Stack>, model: Model) -> Result<Json<Value>, Refused> {
    answer_trace(&stack, model, HashMap::new())
}

/// Change what is traced
///
/// For administrators.
#[utoipa::path(
    post, path = "/v2/trace/setting", tag = "Settings", operation_id = "change_trace_settings",
    request_body(content = Option<BTreeMap<String, Value>>, example = json!({"trace_rate": "100"})),
    responses((status = 200, description = "The settings", body = BTreeMap<String, Value>))
)]
pub async fn change_trace(
    State(stack): State<Stack>,
    model: Model,
    request: Request,
) -> Result<Json<Value>, Refused> {
    let asked: Map<String, Value> = optional(&stack, request).await?;
    let setting = |(name, value): (String, Value)| {
        let value = texts(&value).ok_or_else(|| {
            let reason = "must be a text, a number, a list of texts or null";
            Error::invalid(format!("settings[{name}]"), reason)
        })?;
        Ok((name, TraceAsked { value }))
    };
    let settings = asked.into_iter().map(setting);
    answer_trace(&stack, model, settings.collect::<Result<_, Error>>()?)
}

/// The values of a setting; none of them clears it.
fn texts(value: &Value) -> Option<Vec<String>> {
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

fn answer_trace(
    stack: &Stack,
    model: Model,
    settings: HashMap<String, TraceAsked>,
) -> Result<Json<Value>, Refused> {
    let asked = TraceSettingRequest {
        settings,
        model_name: model.name,
    };
    let answer = stack.trace(&asked)?;
    let setting = |(name, value): (String, Vec<String>)| {
        // Of the level there may be several.
        let value = match value.as_slice() {
            [one] if name != "trace_level" => json!(one),
            values => json!(values),
        };
        (name, value)
    };
    let settings = answer
        .settings
        .into_iter()
        .map(|(name, value)| setting((name, value.value)));
    Ok(Json(Value::Object(settings.collect())))
}
