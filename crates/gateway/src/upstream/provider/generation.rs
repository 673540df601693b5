//! Generation by the Open Inference Protocol: one text in, and one out, whole
//! or in parts, as Triton's generate extension has it.

use protocol::inference::{
    InferParameter, ModelInferResponse, ModelStreamInferResponse, infer_parameter::ParameterChoice,
    model_infer_response::InferOutputTensor,
};
use protocol::{Error, FieldPath, InferRequest, Value};
use providers::{ChatMessage, ChatRequest, FinishReason, MODEL_VERSION, Role, TokenUsage};
use tensor::Datatype;

/// The conversation that a request for generation stands for: a text, and the
/// parameters of the request.
pub(super) fn to_chat(request: &InferRequest, text: String) -> Result<ChatRequest, Error> {
    let mut chat = ChatRequest::from_prompt(text);
    for (name, value) in &request.parameters {
        let invalid = |reason: &str| Error::invalid(FieldPath::parameter(name), reason);
        match (name.as_str(), value) {
            ("max_tokens", value) => {
                let count = u32::try_from(value.integer(name)?).ok();
                let count = count.filter(|count| *count > 0);
                chat.max_tokens = Some(count.ok_or_else(|| invalid("must be at least 1"))?);
            }
            ("temperature", value) => chat.temperature = Some(number(name, value, 2.0)?),
            ("top_p", value) => chat.top_p = Some(number(name, value, 1.0)?),
            ("stop", Value::Text(text)) if !text.is_empty() => chat.stop = vec![text.clone()],
            ("system", Value::Text(text)) => {
                let message = ChatMessage::new(Role::System, text.as_str());
                chat.messages.insert(0, message);
            }
            ("stop", _) => return Err(invalid("must be a string that is not empty")),
            ("system", _) => return Err(invalid("must be a string")),
            _ => return Err(request.unknown_parameter(name)),
        }
    }
    Ok(chat)
}

/// The number of a parameter, from 0 to a bound.
fn number(name: &str, value: &Value, max: f64) -> Result<f64, Error> {
    let invalid = |reason: String| Err(Error::invalid(FieldPath::parameter(name), reason));
    let number = match value {
        Value::Number(number) => *number,
        Value::Integer(number) => *number as f64,
        _ => return invalid("must be a number".to_owned()),
    };
    // Written so that NaN is outside too.
    if !(0.0..=max).contains(&number) {
        return invalid(format!("must be from 0 to {max}"));
    }
    Ok(number)
}

/// One part of a response to a message of a stream.
pub fn part(model: &str, id: &str, text: &str) -> ModelStreamInferResponse {
    response(model, id, text, &[("triton_final_response", flag(false))])
}

/// The last part, which says why the response ended, and its tokens.
pub fn last_part(
    model: &str,
    id: &str,
    reason: FinishReason,
    usage: TokenUsage,
) -> ModelStreamInferResponse {
    let integer =
        |count: u64| ParameterChoice::Int64Param(i64::try_from(count).unwrap_or(i64::MAX));
    let parameters = [
        ("triton_final_response", flag(true)),
        (
            "finish_reason",
            ParameterChoice::StringParam(reason.name().to_owned()),
        ),
        ("prompt_tokens", integer(usage.prompt_tokens)),
        ("completion_tokens", integer(usage.completion_tokens)),
    ];
    response(model, id, "", &parameters)
}

fn flag(on: bool) -> ParameterChoice {
    ParameterChoice::BoolParam(on)
}

fn response(
    model: &str,
    id: &str,
    text: &str,
    parameters: &[(&str, ParameterChoice)],
) -> ModelStreamInferResponse {
    let output = InferOutputTensor {
        name: "text_output".to_owned(),
        datatype: Datatype::Bytes.name().to_owned(),
        shape: vec![1],
        ..Default::default()
    };
    let parameters = parameters.iter().map(|(name, choice)| {
        let parameter_choice = Some(choice.clone());
        ((*name).to_owned(), InferParameter { parameter_choice })
    });
    // One element is always short enough to be encoded: messages are bounded.
    let raw = tensor::encode_bytes_elements(&[text]).unwrap_or_default();
    ModelStreamInferResponse {
        error_message: String::new(),
        infer_response: Some(ModelInferResponse {
            model_name: model.to_owned(),
            model_version: MODEL_VERSION.to_owned(),
            id: id.to_owned(),
            parameters: parameters.collect(),
            outputs: vec![output],
            raw_output_contents: vec![raw.into()],
        }),
    }
}
