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

/// Every error response: its operations, status, name and description.
const ERRORS: [(AppliesTo, u16, &str, &str); 14] = [
    (
        AppliesTo::All,
        400,
        "BadRequest",
        "A field is invalid; the error names it",
    ),
    (
        AppliesTo::Authenticated,
        401,
        "Unauthorized",
        "The credential is missing or unknown",
    ),
    (
        AppliesTo::Authenticated,
        403,
        "Forbidden",
        "The caller is not allowed to do this",
    ),
    (
        AppliesTo::Models,
        404,
        "NotFound",
        "The model does not exist or is not ready",
    ),
    (
        AppliesTo::All,
        405,
        "MethodNotAllowed",
        "The method is not allowed; Allow has the methods of the path",
    ),
    (
        AppliesTo::Bodies,
        413,
        "ContentTooLarge",
        "The body is too large",
    ),
    (
        AppliesTo::Bodies,
        415,
        "Unsupported",
        "The content encoding is not supported",
    ),
    (
        AppliesTo::Authenticated,
        429,
        "TooManyRequests",
        "A quota or rate limit of the caller is exceeded; retry after Retry-After",
    ),
    (
        AppliesTo::All,
        431,
        "HeadersTooLarge",
        "The headers are too large; the response has no body",
    ),
    (
        AppliesTo::Bodies,
        499,
        "ClientClosedRequest",
        "The client closed the request",
    ),
    (AppliesTo::All, 500, "InternalServerError", "Internal error"),
    (
        AppliesTo::Models,
        501,
        "NotImplemented",
        "The model or its server does not support this",
    ),
    (
        AppliesTo::All,
        503,
        "ServiceUnavailable",
        "Overloaded, or no worker or service with the model is available; retry after Retry-After, if it is given",
    ),
    (
        AppliesTo::All,
        504,
        "GatewayTimeout",
        "The timeout of the caller or of the server passed",
    ),
];

/// An error response of an operation.
pub(super) struct ErrorResponse {
    pub(super) status: u16,
    /// Its name among the components, the same for operations with the same response.
    pub(super) name: String,
    /// The response without its headers.
    pub(super) response: Response,
}

/// The error responses of an operation.
pub(super) fn responses(traits: Traits<'_>) -> Vec<ErrorResponse> {
    let applying = ERRORS.iter().filter(|(to, ..)| to.includes(traits));
    applying
        .map(|&(_, status, name, description)| {
            let error = error(traits, status);
            ErrorResponse {
                status,
                name: match &error {
                    Some(error) => component(traits, name, error),
                    None => name.to_owned(),
                },
                response: response(traits, status, error.as_ref())
                    .description(description)
                    .build(),
            }
        })
        .collect()
}

/// The name of a response with a body: operations have errors in two formats, and
/// their examples are about different fields.
fn component(traits: Traits<'_>, name: &str, error: &Error) -> String {
    let format = match traits.format {
        ErrorFormat::OpenAi => "OpenAi",
        ErrorFormat::Problem => "",
    };
    let field = error.field().map(|field| words(field.as_str()));
    format!("{format}{name}{}", field.unwrap_or_default())
}

/// The words of a field's path: `InputsShape` of `inputs[0].shape`.
fn words(field: &str) -> String {
    field
        .split(|letter: char| !letter.is_ascii_alphabetic())
        .filter_map(|word| word.split_at_checked(1))
        .map(|(first, rest)| first.to_ascii_uppercase() + rest)
        .collect()
}

fn response(traits: Traits<'_>, status: u16, error: Option<&Error>) -> ResponseBuilder {
    let response = ResponseBuilder::new();
    let (Some(error), Ok(status)) = (error, StatusCode::from_u16(status)) else {
        return response;
    };
    let id = RequestId(HeaderValue::from_static("3f1c9a52f3c84f0d9d35a1f0a4f1c2d7"));
    let example = traits.format.body(error, status, &id);
    let (kind, schema) = match traits.format {
        ErrorFormat::OpenAi => ("application/json", "OpenAiError"),
        ErrorFormat::Problem => ("application/problem+json", "Problem"),
    };
    let content = ContentBuilder::new()
        .schema(Some(Ref::from_schema_name(schema)))
        .example(Some(example))
        .build();
    response.content(kind, content)
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
            "must be a boolean, not an integer (at line 1, column 10)",
        ),
        "/v2/logging" if traits.body => ("settings[log_info]", "must be true or false"),
        path if path.ends_with("/infer") => ("inputs[0].shape", "must be [-1, 64]"),
        path if path.contains("/generate") => ("parameters.max_tokens", "must be at least 1"),
        path if path.ends_with("load") => (
            "parameters[config]",
            "must be a boolean, an integer or a string",
        ),
        path if path.starts_with("/v2/models/{model}") => return invalid_name("model_name"),
        "/v1/completions" | "/v1/responses" => return invalid_name("model"),
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
    use std::collections::BTreeMap;

    use serde_json::Value;

    use super::super::shared::tests::resolved;
    use super::super::{document, operations};
    use super::*;

    /// The example of an operation's error response.
    fn example(path: &str, method: &str, status: &str) -> Value {
        let document = serde_json::to_value(document()).unwrap();
        let response = &document["paths"][path][method]["responses"][status];
        let response = resolved(&document, response);
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

    #[test]
    fn a_name_stands_for_one_response() {
        let mut named = BTreeMap::new();
        for (path, mut item) in document().paths.paths {
            for operation in operations(&mut item) {
                for error in responses(Traits::of(&path, operation)) {
                    let response = serde_json::to_value(&error.response).unwrap();
                    let part = (error.status, response);
                    let first = named.entry(error.name).or_insert_with(|| part.clone());
                    assert_eq!(*first, part, "{path}");
                }
            }
        }
        assert!(named.contains_key("OpenAiTooManyRequests"));
        assert!(named.contains_key("BadRequestInputsShape"));
        assert!(named.contains_key("NotFoundModelName"));
    }
}
