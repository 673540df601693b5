//! The common parts of the handlers of texts: selection of the model, calls of
//! it, and checks of the texts.

use std::borrow::Borrow;

use http::{HeaderMap, HeaderValue};
use platform::grpc::Message;
use platform::pool::Cancelled;
use protocol::inference::infer_parameter::ParameterChoice;
use protocol::inference::model_infer_request::InferInputTensor;
use protocol::inference::{InferParameter, ModelInferRequest};
use protocol::{Error, FieldPath, MODEL_KEY, Method, Segment, Service, TOKENS_KEY, Task};

use super::context::{CallResponse, RequestContext, hold};
use gateway::Plan;
use gateway::request::ModelSelector;

/// Calls of one request that are in flight at once.
pub const CALLS_AT_ONCE: usize = 32;
/// Texts of one request, the limit of OpenAI's API; a worker may take fewer.
pub const TEXTS_MAX: usize = 2048;

/// The named model, or the only one of these tasks. The caller may call it.
pub fn select_model(
    context: &RequestContext,
    name: Option<&str>,
    tasks: &'static [Task],
) -> Result<Plan, Error> {
    let selector = match name {
        Some(name) => named_model(name),
        None => ModelSelector::Tasks(tasks),
    };
    let plan = context.route(&selector);
    let plan = plan.map_err(|error| error.map_field(as_model_field))?;
    if let Plan::One(route) = &plan
        && !route.task().is_empty()
        && !tasks.iter().any(|task| task.as_str() == route.task())
    {
        let (name, task) = (route.name(), route.task());
        let tasks: Vec<&str> = tasks.iter().map(|task| task.as_str()).collect();
        let tasks = tasks.join(" or ");
        return Err(Error::wrong_task("model", name, task, tasks));
    }
    Ok(plan)
}

/// The selector of a model by its name.
pub fn named_model(name: &str) -> ModelSelector {
    ModelSelector::Named {
        name: name.to_owned(),
        version: String::new(),
        field: "model",
    }
}

/// A message that is made of about so many bytes: on a thread for work if they are
/// many, and counted before it is made.
pub async fn encoded<M: prost::Message, B: Borrow<M>>(
    context: &RequestContext,
    bytes: usize,
    make: impl FnOnce() -> Result<B, Error> + Send + 'static,
) -> Result<Message, Error> {
    let limits = context.limits.clone();
    let encode = move |_: &Cancelled| {
        // The message is there while it is encoded.
        let _made = hold(&limits.budget, bytes)?;
        let made = make()?;
        let message: &M = made.borrow();
        let length = message.encoded_len();
        if length > limits.message_bytes_max {
            return Err(Error::too_large(length, limits.message_bytes_max));
        }
        let held = hold(&limits.budget, length)?;
        Ok(Message::encode(message).with_held(Some(held)))
    };
    context.work(bytes, encode).await
}

/// Calls the model of a plan with one message.
pub async fn call_model<M: prost::Message + Default>(
    context: &RequestContext,
    method: Method,
    plan: &Plan,
    message: Message,
) -> Result<CallResponse<M>, Error> {
    let mut context = context.clone();
    if method.service() != Service::Inference {
        let name = HeaderValue::try_from(plan.name());
        let name = name.map_err(|_| Error::invalid("model", "is not a model name"))?;
        context.headers.insert(MODEL_KEY, name);
    }
    let response = context.call(method, message, plan);
    response
        .await
        .map_err(|error| error.map_field(as_model_field))
}

/// The tokens that were computed for a response.
pub fn computed_tokens(headers: &HeaderMap) -> u64 {
    let tokens = headers.get(TOKENS_KEY);
    let tokens = tokens.and_then(|tokens| tokens.to_str().ok()?.parse().ok());
    tokens.unwrap_or_default()
}

/// An error when a text is empty or there are too many or none.
pub fn check_texts<T: AsRef<str>>(field: &str, texts: &[T]) -> Result<(), Error> {
    if texts.is_empty() {
        return Err(Error::invalid(field, "must not be empty"));
    }
    let count = texts.len();
    if count > TEXTS_MAX {
        let reason = format!("has {count} texts, but the maximum is {TEXTS_MAX}");
        return Err(Error::invalid(field, reason));
    }
    match texts.iter().position(|text| text.as_ref().is_empty()) {
        Some(empty) => Err(Error::invalid(
            format!("{field}[{empty}]"),
            "must not be empty",
        )),
        None => Ok(()),
    }
}

/// The `ModelInfer` request of a model whose one input is the column `text`.
pub fn infer_request(
    model: &str,
    texts: &[String],
    parameters: impl IntoIterator<Item = (&'static str, ParameterChoice)>,
) -> Result<ModelInferRequest, Error> {
    let raw = tensor::encode_bytes_elements(texts)
        .map_err(|error| Error::invalid("input", error.to_string()))?;
    let parameter = |(name, choice): (&str, ParameterChoice)| {
        let parameter_choice = Some(choice);
        (name.to_owned(), InferParameter { parameter_choice })
    };
    Ok(ModelInferRequest {
        model_name: model.to_owned(),
        parameters: parameters.into_iter().map(parameter).collect(),
        inputs: vec![InferInputTensor {
            name: "text".to_owned(),
            datatype: "BYTES".to_owned(),
            shape: vec![i64::try_from(texts.len()).unwrap_or(i64::MAX)],
            ..Default::default()
        }],
        raw_input_contents: vec![raw.into()],
        ..Default::default()
    })
}

/// The fields of the texts of a call, `input` or the elements of `input`.
#[derive(Debug, Clone, Copy)]
pub struct InputFields {
    /// Whether there is one text, which is not in a list.
    pub single: bool,
    /// The index of the call's first text in the request.
    pub first: usize,
}

impl InputFields {
    /// The field of a text, by its index in the call.
    pub fn at(self, index: usize) -> String {
        if self.single {
            "input".to_owned()
        } else {
            format!("input[{}]", self.first + index)
        }
    }

    /// The error of [`check_texts`] with the field of a single text.
    pub fn of_texts(self, error: Error) -> Error {
        error.map_field(|field| match field.segments().as_slice() {
            [Segment::Name("input"), Segment::Index(_), ..] if self.single => {
                Some(self.at(0).into())
            }
            _ => None,
        })
    }

    /// An error of a `ModelInfer` call with the fields of the request.
    pub fn of_infer(self, error: Error) -> Error {
        error.map_field(|field| self.map(field))
    }

    fn map(self, field: &FieldPath) -> Option<FieldPath> {
        match field.segments().as_slice() {
            [Segment::Name("parameters"), Segment::Key(name)] => Some((*name).into()),
            [
                Segment::Name("inputs"),
                Segment::Index(_),
                Segment::Name("contents"),
                Segment::Index(element),
            ] => Some(self.at(*element).into()),
            [Segment::Name("inputs" | "raw_input_contents"), ..] => Some("input".into()),
            _ => None,
        }
    }
}

/// The field that names the model in these APIs.
pub fn as_model_field(field: &FieldPath) -> Option<FieldPath> {
    let fields = ["model_name", "model_version", "name", MODEL_KEY];
    fields.contains(&field.as_str()).then(|| "model".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_named_by_the_field_of_these_apis() {
        let name = protocol::ModelName::checked("x", "name").unwrap();
        let error = Error::unknown_model(&name, None).map_field(as_model_field);
        assert_eq!(error.violation().unwrap().field, "model");
        assert_eq!(error.to_string(), "unknown model 'x'");
    }

    #[test]
    fn texts_are_checked() {
        let field = |texts: &[&str]| {
            let error = check_texts("texts", texts).err()?;
            Some(error.field().unwrap().to_string())
        };
        assert_eq!(field(&["a", "b"]), None);
        assert_eq!(field(&["a", ""]).as_deref(), Some("texts[1]"));
        assert_eq!(field(&[]).as_deref(), Some("texts"));
        assert_eq!(field(&["a"; TEXTS_MAX + 1]).as_deref(), Some("texts"));
    }

    #[test]
    fn fields_are_those_of_the_request() {
        let several = InputFields {
            single: false,
            first: 40,
        };
        let one = InputFields {
            single: true,
            first: 0,
        };
        for (fields, field, expected) in [
            (several, "parameters[dimensions]", Some("dimensions")),
            (several, "inputs[0].contents[2]", Some("input[42]")),
            (several, "inputs[0].shape", Some("input")),
            (several, "raw_input_contents[0]", Some("input")),
            (several, "model", None),
            (one, "inputs[0].contents[0]", Some("input")),
        ] {
            let mapped = fields.map(&field.into());
            assert_eq!(mapped.as_ref().map(FieldPath::as_str), expected);
        }
    }
}
