//! The error responses of operations. Their examples are written by the code that
//! writes the errors themselves.

use std::time::Duration;

use http::{HeaderValue, StatusCode};
use protocol::{Error, Kind, ModelName};
use utoipa::openapi::{ContentBuilder, Ref, Response, ResponseBuilder};

use super::super::error::{ErrorFormat, method_not_allowed, request_aborted, unsupported_encoding};
use super::super::request_id::RequestId;
use super::super::texts::as_model_field;
use super::Traits;

/// Which operations have an error response.
#[derive(Clone, Copy, PartialEq, Eq)]
enum AppliesTo {
    All,
    /// Those that authenticate their caller.
    Authenticated,
    /// Those of one model.
    Models,
    /// Those with a request body.
    Bodies,
}

impl AppliesTo {
    fn includes(self, traits: Traits<'_>) -> bool {
        match self {
            Self::All => true,
            Self::Authenticated => !traits.public,
            Self::Models => traits.model,
            Self::Bodies => traits.body,
        }
    }
}

/// Every error response: its operations, status and description.
const ERRORS: [(AppliesTo, u16, &str); 14] = [
    (
        AppliesTo::All,
        400,
        "A field is invalid; the error names it",
    ),
    (
        AppliesTo::Authenticated,
        401,
        "The credential is missing or unknown",
    ),
    (
        AppliesTo::Authenticated,
        403,
        "The caller is not allowed to do this",
    ),
    (
        AppliesTo::Models,
        404,
        "The model does not exist or is not ready",
    ),
    (
        AppliesTo::All,
        405,
        "The method is not allowed; Allow has the methods of the path",
    ),
    (AppliesTo::Bodies, 413, "The body is too large"),
    (
        AppliesTo::Bodies,
        415,
        "The content encoding is not supported",
    ),
    (
        AppliesTo::Authenticated,
        429,
        "A quota or rate limit of the caller is exceeded; retry after Retry-After",
    ),
    (
        AppliesTo::All,
        431,
        "The headers are too large; the response has no body",
    ),
    (AppliesTo::Bodies, 499, "The client closed the request"),
    (AppliesTo::All, 500, "Internal error"),
    (
        AppliesTo::Models,
        501,
        "The model or its server does not support this",
    ),
    (
        AppliesTo::All,
        503,
        "Overloaded, or no worker or service with the model is available; retry after Retry-After, if it is given",
    ),
    (
        AppliesTo::All,
        504,
        "The timeout of the caller or of the server passed",
    ),
];

/// The error responses of an operation, by status.
pub(super) fn responses(traits: Traits<'_>) -> Vec<(u16, Response)> {
    let applying = ERRORS.iter().filter(|(to, ..)| to.includes(traits));
    applying
        .map(|(_, status, description)| (*status, response(traits, *status, description)))
        .collect()
}

fn response(traits: Traits<'_>, status: u16, description: &str) -> Response {
    let response = ResponseBuilder::new().description(description);
    let (Some(error), Ok(status)) = (error(traits, status), StatusCode::from_u16(status)) else {
        return response.build();
    };
    let id = RequestId(HeaderValue::from_static("3f1c9a52f3c84f0d9d35a1f0a4f1c2d7"));
    let example = traits.format.body(&error, status, &id);
    let (kind, schema) = match traits.format {
        ErrorFormat::OpenAi => ("application/json", "OpenAiError"),
        ErrorFormat::Problem => ("application/problem+json", "Problem"),
    };
    let content = ContentBuilder::new()
        .schema(Some(Ref::from_schema_name(schema)))
        .example(Some(example))
        .build();
    response.content(kind, content).build()
}

/// An example for a status; none for a response without a body.
fn error(traits: Traits<'_>, status: u16) -> Option<Error> {
    Some(match status {
        400 => invalid_field(traits),
        401 => Error::new(Kind::Unauthenticated, "the API key is unknown"),
        403 => {
            let message = "the caller is not allowed to call this model";
            Error::new(Kind::Forbidden, message)
        }
        404 => unknown_model(traits),
        405 => method_not_allowed(),
        413 => Error::too_large(70_000_000, 64 << 20),
        415 => unsupported_encoding(),
        429 => {
            let message = "the tenant's requests per second are exceeded";
            Error::quota_spent(message, Duration::from_millis(250))
        }
        499 => request_aborted(),
        500 => Error::new(Kind::Internal, "the request failed"),
        501 => Error::new(Kind::Unsupported, "the model does not support this"),
        503 => Error::new(Kind::NotReady, "no worker can be reached"),
        504 => Error::deadline_passed(),
        _ => return None,
    })
}

/// An example of an invalid field of the operation.
fn invalid_field(traits: Traits<'_>) -> Error {
    let (field, reason) = match traits.path {
        "/v1/embeddings" | "/v1/classify" => ("input[1]", "must not be empty"),
        "/v1/chat/completions" => ("messages", "must not be empty"),
        "/rerank" | "/v1/rerank" | "/v2/rerank" => ("documents", "must not be empty"),
        "/v2/repository/index" => (
            "ready",
            "must be a boolean, not integer (at line 1, column 10)",
        ),
        "/v2/logging" if traits.body => ("settings[log_info]", "must be true or false"),
        path if path.ends_with("/infer") => ("inputs[0].shape", "must be [-1, 64]"),
        path if path.contains("/generate") => ("parameters.max_tokens", "must be at least 1"),
        path if path.ends_with("load") => (
            "parameters[config]",
            "must be a boolean, an integer or a string",
        ),
        path if path.starts_with("/v2/models/{model}") => return invalid_name("model_name"),
        "/v1/models/{model}" => return invalid_name("model"),
        _ => ("timeout", "must be a positive whole number of milliseconds"),
    };
    Error::invalid(field, reason)
}

fn invalid_name(field: &str) -> Error {
    match ModelName::checked("a model", field) {
        Err(error) => error,
        Ok(_) => Error::invalid(field, "is not a model name"),
    }
}

/// The error of an unknown model, by the field of the operation.
fn unknown_model(traits: Traits<'_>) -> Error {
    let error = match ModelName::checked("minilm", "model_name") {
        Ok(name) => Error::unknown_model(&name, None),
        Err(error) => error,
    };
    if traits.path.starts_with("/v2/") && traits.path != "/v2/rerank" {
        error
    } else {
        error.map_field(as_model_field)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::super::document;

    /// The example of an operation's error response.
    fn example(path: &str, method: &str, status: &str) -> Value {
        let document = serde_json::to_value(document()).unwrap();
        let response = &document["paths"][path][method]["responses"][status];
        let content = response["content"].as_object().unwrap();
        content.values().next().unwrap()["example"].clone()
    }

    #[test]
    fn examples_are_the_errors_of_the_endpoints() {
        for (status, kind, code) in [
            ("401", "authentication_error", "invalid_api_key"),
            ("404", "invalid_request_error", "model_not_found"),
            ("429", "rate_limit_error", "rate_limit_exceeded"),
        ] {
            let response = &example("/v1/embeddings", "post", status)["error"];
            assert_eq!(response["type"], kind);
            assert_eq!(response["code"], code);
        }
        let response = example("/v2/models/{model}/infer", "post", "404");
        assert_eq!(response["field"], "model_name");
        assert_eq!(response["code"], "NOT_FOUND");
    }

    #[test]
    fn an_invalid_field_is_one_of_the_operation() {
        for (path, field) in [
            ("/v2/models/{model}/infer", "inputs[0].shape"),
            ("/v2/models/{model}/generate", "parameters.max_tokens"),
            ("/v2/rerank", "documents"),
            ("/v2/repository/models/{model}/unload", "parameters[config]"),
        ] {
            assert_eq!(example(path, "post", "400")["field"], field);
        }
        let response = example("/v1/embeddings", "post", "400");
        assert_eq!(response["error"]["param"], "input[1]");
        let response = example("/v1/models/{model}", "get", "400");
        assert_eq!(response["error"]["param"], "model");
    }
}
