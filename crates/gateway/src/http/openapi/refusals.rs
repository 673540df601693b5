//! How operations refuse: each example is what a caller would be told, written
//! by what writes it.

use std::time::Duration;

use http::{HeaderValue, StatusCode};
use protocol::{Error, Kind, ModelName};
use utoipa::openapi::{ContentBuilder, Ref, Response, ResponseBuilder};

use super::super::ask::of_model;
use super::super::gate::RequestId;
use super::super::problem::{Shape, broken_off, unknown_encoding, wrong_method};
use super::Kinds;

/// Which operations can be refused in a way.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Who {
    Always,
    /// Those that ask who calls.
    Callers,
    /// Those that name a model.
    Models,
    /// Those that have a body.
    Bodies,
}

impl Who {
    fn includes(self, kinds: Kinds<'_>) -> bool {
        match self {
            Self::Always => true,
            Self::Callers => !kinds.open,
            Self::Models => kinds.model,
            Self::Bodies => kinds.body,
        }
    }
}

/// Every refusal: who has it, its status, and what it says.
const REFUSALS: [(Who, u16, &str); 14] = [
    (Who::Always, 400, "A field is wrong; it is named"),
    (Who::Callers, 401, "No key, or one that is not known"),
    (Who::Callers, 403, "The caller may not do this"),
    (
        Who::Models,
        404,
        "There is no such model, or none that is ready",
    ),
    (
        Who::Always,
        405,
        "The path takes other methods, which Allow names",
    ),
    (Who::Bodies, 413, "The body is too large"),
    (Who::Bodies, 415, "The content encoding is not known"),
    (
        Who::Callers,
        429,
        "A quota of the caller is spent; Retry-After says when there is something of it again",
    ),
    (
        Who::Always,
        431,
        "The headers are too large; nothing is said about it, as they were not read",
    ),
    (
        Who::Bodies,
        499,
        "The caller left before there was an answer",
    ),
    (Who::Always, 500, "The server is at fault"),
    (Who::Models, 501, "The model or its server does not do this"),
    (
        Who::Always,
        503,
        "Overloaded, or nobody who has the model can be reached; Retry-After says when to come back, where that is known",
    ),
    (
        Who::Always,
        504,
        "The caller's patience or the server's own ended",
    ),
];

/// How a request can be refused, by status.
pub(super) fn refusals(kinds: Kinds<'_>) -> Vec<(u16, Response)> {
    let given = REFUSALS.iter().filter(|(who, ..)| who.includes(kinds));
    given
        .map(|(_, status, says)| (*status, refusal(kinds, *status, says)))
        .collect()
}

fn refusal(kinds: Kinds<'_>, status: u16, says: &str) -> Response {
    let response = ResponseBuilder::new().description(says);
    let (Some(error), Ok(status)) = (error(kinds, status), StatusCode::from_u16(status)) else {
        return response.build();
    };
    let id = RequestId(HeaderValue::from_static("3f1c9a52f3c84f0d9d35a1f0a4f1c2d7"));
    let example = kinds.shape.body(&error, status, &id);
    let (kind, schema) = match kinds.shape {
        Shape::OpenAi => ("application/json", "OpenAiError"),
        Shape::Problem => ("application/problem+json", "Problem"),
    };
    let content = ContentBuilder::new()
        .schema(Some(Ref::from_schema_name(schema)))
        .example(Some(example))
        .build();
    response.content(kind, content).build()
}

/// An error of a status; none for what is refused without a body.
fn error(kinds: Kinds<'_>, status: u16) -> Option<Error> {
    Some(match status {
        400 => wrong_field(kinds),
        401 => Error::new(Kind::Unauthenticated, "the key is not known"),
        403 => {
            let message = "the model is not among those that this caller may call";
            Error::new(Kind::Forbidden, message)
        }
        404 => unknown_model(kinds),
        405 => wrong_method(),
        413 => Error::too_large(70_000_000, 64 << 20),
        415 => unknown_encoding(),
        429 => {
            let message = "the tenant's requests per second are spent";
            Error::quota_spent(message, Duration::from_millis(250))
        }
        499 => broken_off(),
        500 => Error::new(Kind::Internal, "the request could not be answered"),
        501 => Error::new(Kind::Unsupported, "the model does not do this"),
        503 => Error::new(Kind::NotReady, "no worker can be reached"),
        504 => Error::deadline_passed(),
        _ => return None,
    })
}

/// An error of a field that the operation has.
fn wrong_field(kinds: Kinds<'_>) -> Error {
    let (field, reason) = match kinds.path {
        "/v1/embeddings" | "/v1/classify" => ("input[1]", "must not be empty"),
        "/v1/chat/completions" => ("messages", "there are none"),
        "/rerank" | "/v1/rerank" | "/v2/rerank" => ("documents", "there are none"),
        "/v2/repository/index" => (
            "ready",
            "must be a boolean, not integer at line 1, column 10",
        ),
        "/v2/logging" if kinds.body => ("settings[log_info]", "must be true or false"),
        path if path.ends_with("/infer") => ("inputs[0].shape", "must be [-1, 64]"),
        path if path.contains("/generate") => ("parameters.max_tokens", "must be at least 1"),
        path if path.ends_with("load") => (
            "parameters[config]",
            "must be a boolean, a whole number or a text",
        ),
        path if path.starts_with("/v2/models/{model}") => return wrong_name("model_name"),
        "/v1/models/{model}" => return wrong_name("model"),
        _ => ("timeout", "must be a positive whole number of milliseconds"),
    };
    Error::invalid(field, reason)
}

fn wrong_name(field: &str) -> Error {
    match ModelName::checked("a model", field) {
        Err(error) => error,
        Ok(_) => Error::invalid(field, "is no model's name"),
    }
}

/// A model is named in the terms of the operation.
fn unknown_model(kinds: Kinds<'_>) -> Error {
    let error = match ModelName::checked("minilm", "model_name") {
        Ok(name) => Error::unknown_model(&name, None),
        Err(error) => error,
    };
    match kinds.path.starts_with("/v2/") && kinds.path != "/v2/rerank" {
        true => error,
        false => error.renamed(of_model),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::super::document;

    /// The example of an operation's refusal.
    fn example(path: &str, method: &str, status: &str) -> Value {
        let document = serde_json::to_value(document()).unwrap();
        let told = &document["paths"][path][method]["responses"][status];
        let content = told["content"].as_object().unwrap();
        content.values().next().unwrap()["example"].clone()
    }

    #[test]
    fn examples_are_what_callers_are_told() {
        for (status, kind, code) in [
            ("401", "authentication_error", "invalid_api_key"),
            ("404", "invalid_request_error", "model_not_found"),
            ("429", "rate_limit_error", "rate_limit_exceeded"),
        ] {
            let told = &example("/v1/embeddings", "post", status)["error"];
            assert_eq!(told["type"], kind);
            assert_eq!(told["code"], code);
        }
        let told = example("/v2/models/{model}/infer", "post", "404");
        assert_eq!(told["field"], "model_name");
        assert_eq!(told["code"], "NOT_FOUND");
    }

    #[test]
    fn a_wrong_field_is_one_of_the_operation() {
        for (path, field) in [
            ("/v2/models/{model}/infer", "inputs[0].shape"),
            ("/v2/models/{model}/generate", "parameters.max_tokens"),
            ("/v2/rerank", "documents"),
            ("/v2/repository/models/{model}/unload", "parameters[config]"),
        ] {
            assert_eq!(example(path, "post", "400")["field"], field);
        }
        let told = example("/v1/embeddings", "post", "400");
        assert_eq!(told["error"]["param"], "input[1]");
        let told = example("/v1/models/{model}", "get", "400");
        assert_eq!(told["error"]["param"], "model");
    }
}
