//! What the handlers of texts share: the model that a request names, and calls
//! to it.

use http::{HeaderMap, HeaderValue};
use platform::grpc::Message;
use protocol::{Error, MODEL_KEY, Method, Service, TOKENS_KEY, Task};

use super::gate::{Answered, Visit};
use crate::request::ModelSelector;
use crate::route::Plan;

/// Calls of one request that are under way at once.
pub const CALLS_AT_ONCE: usize = 32;
/// Texts of one request, as OpenAI has it; a worker may take fewer.
pub const TEXTS_MAX: usize = 2048;

/// The model that is named, or the only one that does a task. It is one that
/// the caller may call.
pub fn model(visit: &Visit, named: Option<&str>, tasks: &'static [Task]) -> Result<Plan, Error> {
    let selector = match named {
        Some(name) => of_name(name),
        None => ModelSelector::Tasks(tasks),
    };
    let plan = visit.route(&selector);
    let plan = plan.map_err(|error| error.renamed(of_model))?;
    if let Plan::One(route) = &plan
        && !route.task().is_empty()
        && !tasks.iter().any(|task| task.as_str() == route.task())
    {
        let (name, task) = (route.name(), route.task());
        let tasks: Vec<&str> = tasks.iter().map(|task| task.as_str()).collect();
        let reason = format!("model '{name}' does {task}, not {}", tasks.join(" or "));
        return Err(Error::invalid("model", reason));
    }
    Ok(plan)
}

/// A model by its name.
pub fn of_name(name: &str) -> ModelSelector {
    ModelSelector::Named {
        name: name.to_owned(),
        version: String::new(),
        field: "model",
    }
}

/// Asks a model with one message.
pub async fn call<A: prost::Message + Default>(
    visit: &Visit,
    method: Method,
    plan: &Plan,
    message: &impl prost::Message,
) -> Result<Answered<A>, Error> {
    let mut visit = visit.clone();
    if method.service() != Service::Inference {
        let name = HeaderValue::try_from(plan.name());
        let name = name.map_err(|_| Error::invalid("model", "is no model's name"))?;
        visit.headers.insert(MODEL_KEY, name);
    }
    let answered = visit.ask(method, Message::encode(message), plan);
    answered.await.map_err(|error| error.renamed(of_model))
}

/// Tokens that an answer took to compute.
pub fn tokens(headers: &HeaderMap) -> u64 {
    let tokens = headers.get(TOKENS_KEY);
    let tokens = tokens.and_then(|tokens| tokens.to_str().ok()?.parse().ok());
    tokens.unwrap_or_default()
}

/// An error when a text is empty or there are too many or none.
pub fn check_texts<T: AsRef<str>>(field: &str, texts: &[T]) -> Result<(), Error> {
    if texts.is_empty() {
        return Err(Error::invalid(field, "there are none"));
    }
    let count = texts.len();
    if count > TEXTS_MAX {
        let reason = format!("{count} texts: a request may have {TEXTS_MAX}");
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

/// The model's field, in the terms of these surfaces.
pub fn of_model(field: &str, reason: &str) -> Option<(String, String)> {
    let known = matches!(field, "model_name" | "model_version" | "name" | MODEL_KEY);
    known.then(|| ("model".to_owned(), reason.replace(" in the metadata", "")))
}

/// An element's number and the rest of the sentence, where a worker says which
/// element of a tensor is wrong.
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
    fn the_element_that_is_wrong_is_found() {
        let told = element("element 3: the text has 300 tokens");
        assert_eq!(told, Some((3, "the text has 300 tokens".to_owned())));
        let told = element("element 12 is not UTF-8");
        assert_eq!(told, Some((12, "is not UTF-8".to_owned())));
        for other in ["has 3 bytes", "element", "element x", "elements 3: a"] {
            assert_eq!(element(other), None, "{other}");
        }
    }

    #[test]
    fn a_model_is_named_in_the_terms_of_http() {
        let name = protocol::ModelName::checked("x", "name").unwrap();
        let error = Error::unknown_model(&name, None).renamed(of_model);
        assert_eq!(error.violation().unwrap().field, "model");
        assert_eq!(error.to_string(), "unknown model 'x'");
    }

    #[test]
    fn texts_are_some_and_none_is_empty() {
        let field = |texts: &[&str]| {
            let error = check_texts("texts", texts).err()?;
            Some(error.violation().unwrap().field.clone())
        };
        assert_eq!(field(&["a", "b"]), None);
        assert_eq!(field(&["a", ""]).as_deref(), Some("texts[1]"));
        assert_eq!(field(&[]).as_deref(), Some("texts"));
        assert_eq!(field(&["a"; TEXTS_MAX + 1]).as_deref(), Some("texts"));
    }
}
