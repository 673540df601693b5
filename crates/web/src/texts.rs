//! What the handlers of texts share: the model that a request is for, calls of
//! it, and checks of the texts.

use http::{HeaderMap, HeaderValue};
use platform::grpc::Message;
use protocol::inference::infer_parameter::ParameterChoice;
use protocol::inference::model_infer_request::InferInputTensor;
use protocol::inference::{InferParameter, ModelInferRequest};
use protocol::{Error, MODEL_KEY, Method, Service, TOKENS_KEY, Task};

use super::context::{CallResponse, RequestContext};
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
    let plan = plan.map_err(|error| error.renamed(as_model_field))?;
    if let Plan::One(route) = &plan
        && !route.task().is_empty()
        && !tasks.iter().any(|task| task.as_str() == route.task())
    {
        let (name, task) = (route.name(), route.task());
        let tasks: Vec<&str> = tasks.iter().map(|task| task.as_str()).collect();
        let tasks = tasks.join(" or ");
        let reason = format!("the task of model '{name}' is {task}, not {tasks}");
        return Err(Error::invalid("model", reason));
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

/// Calls the model of a plan with one message.
pub async fn call_model<M: prost::Message + Default>(
    context: &RequestContext,
    method: Method,
    plan: &Plan,
    message: &impl prost::Message,
) -> Result<CallResponse<M>, Error> {
    let mut context = context.clone();
    if method.service() != Service::Inference {
        let name = HeaderValue::try_from(plan.name());
        let name = name.map_err(|_| Error::invalid("model", "is not a model name"))?;
        context.headers.insert(MODEL_KEY, name);
    }
    let response = context.call(method, Message::encode(message), plan);
    response
        .await
        .map_err(|error| error.renamed(as_model_field))
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
        error.renamed(|field, reason| {
            let one = self.single && field.starts_with("input[");
            one.then(|| (self.at(0), reason.to_owned()))
        })
    }

    /// An error of a `ModelInfer` call with the fields of the request.
    pub fn of_infer(self, error: Error) -> Error {
        error.renamed(|field, reason| Some(self.rename(field, reason)))
    }

    fn rename(self, field: &str, reason: &str) -> (String, String) {
        let parameter = field.strip_prefix("parameters[");
        if let Some(name) = parameter.and_then(|field| field.strip_suffix(']')) {
            return (name.to_owned(), reason.to_owned());
        }
        if !field.starts_with("inputs") && !field.starts_with("raw_input_contents") {
            return (field.to_owned(), reason.to_owned());
        }
        match element(reason) {
            Some((index, reason)) => (self.at(index), reason),
            None => ("input".to_owned(), reason.to_owned()),
        }
    }
}

/// The field that names the model in these APIs.
pub fn as_model_field(field: &str, reason: &str) -> Option<(String, String)> {
    let known = matches!(field, "model_name" | "model_version" | "name" | MODEL_KEY);
    known.then(|| ("model".to_owned(), reason.replace(" in the metadata", "")))
}

/// The index of the invalid element of a tensor and the reason without it, where
/// a worker names the element.
pub fn element(reason: &str) -> Option<(usize, String)> {
    let rest = reason.strip_prefix("element ")?;
    let digits = rest.find(|c: char| !c.is_ascii_digit())?;
    let (number, rest) = rest.split_at(digits);
    let rest = rest.trim_start_matches([':', ' ']);
    Some((number.parse().ok()?, rest.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_invalid_element_is_found() {
        let found = element("element 3: the text has 300 tokens");
        assert_eq!(found, Some((3, "the text has 300 tokens".to_owned())));
        let found = element("element 12 is not UTF-8");
        assert_eq!(found, Some((12, "is not UTF-8".to_owned())));
        for other in ["has 3 bytes", "element", "element x", "elements 3: a"] {
            assert_eq!(element(other), None, "{other}");
        }
    }

    #[test]
    fn a_model_is_named_by_the_field_of_these_apis() {
        let name = protocol::ModelName::checked("x", "name").unwrap();
        let error = Error::unknown_model(&name, None).renamed(as_model_field);
        assert_eq!(error.violation().unwrap().field, "model");
        assert_eq!(error.to_string(), "unknown model 'x'");
    }

    #[test]
    fn texts_are_checked() {
        let field = |texts: &[&str]| {
            let error = check_texts("texts", texts).err()?;
            Some(error.violation().unwrap().field.clone())
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
        let renamed = |field, reason| several.rename(field, reason);
        assert_eq!(renamed("parameters[dimensions]", "x").0, "dimensions");
        assert_eq!(
            renamed("raw_input_contents[0]", "element 2: too long"),
            ("input[42]".to_owned(), "too long".to_owned())
        );
        let one = InputFields {
            single: true,
            first: 0,
        };
        let (field, _) = one.rename("inputs[0].contents", "element 0: too long");
        assert_eq!(field, "input");
        assert_eq!(renamed("model", "x").0, "model");
    }
}
