//! The headers of requests and of responses.

use serde_json::{Value, json};
use utoipa::openapi::path::{Parameter, ParameterBuilder, ParameterIn};
use utoipa::openapi::schema::{ObjectBuilder, Type};
use utoipa::openapi::{Components, HeaderBuilder, Response};

use super::super::error::ErrorFormat;
use super::{Traits, shared};

/// The end of the paths of inference with tensors.
const INFER: &str = "/infer";
const JSON_BYTES: &str = "The length of the JSON in bytes, if binary tensors follow it";

/// The headers of an operation's requests, by their names among the components: the
/// timeout, the request's id, the use of the cache, and the length of the JSON
/// before binary tensors.
pub(super) fn of_requests(traits: Traits<'_>) -> Vec<(&'static str, Parameter)> {
    let integer = || ObjectBuilder::new().schema_type(Type::Integer);
    let string = || ObjectBuilder::new().schema_type(Type::String);
    let header = |name: &str, schema: ObjectBuilder, description: &str, example: Value| {
        ParameterBuilder::new()
            .name(name)
            .parameter_in(ParameterIn::Header)
            .description(Some(description))
            .schema(Some(schema))
            .example(Some(example))
            .build()
    };
    let ms = integer()
        .minimum(Some(1))
        .maximum(Some(999_999_999_999_u64));
    let (timeout, description) = match traits.format {
        ErrorFormat::OpenAi => (
            "OpenAiTimeout",
            "The timeout of the request in milliseconds; the server's maximum by default. X-Stainless-Timeout of OpenAI's clients is used in its absence",
        ),
        ErrorFormat::Problem => (
            "Timeout",
            "The timeout of the request in milliseconds; the server's maximum by default",
        ),
    };
    let id = "The id of the request: up to 128 printable ASCII characters; generated if it is absent or invalid";
    let mut headers = vec![
        (timeout, header("timeout", ms, description, json!(10_000))),
        (
            "RequestId",
            header("x-request-id", string(), id, json!("request-1")),
        ),
    ];
    if traits.body {
        let cache =
            "no-cache to bypass cached results, no-store to keep the results out of the cache";
        headers.push((
            "CacheControl",
            header("cache-control", string(), cache, json!("no-cache")),
        ));
    }
    if traits.path.ends_with(INFER) {
        let length = header(
            "Inference-Header-Content-Length",
            integer().minimum(Some(0)),
            JSON_BYTES,
            json!(158),
        );
        headers.push(("InferenceHeaderContentLength", length));
    }
    headers
}

/// A header of responses.
struct ResponseHeader {
    /// Its name among the components.
    component: &'static str,
    name: &'static str,
    kind: Type,
    description: &'static str,
}

static REQUEST_ID: ResponseHeader = ResponseHeader {
    component: "RequestId",
    name: "x-request-id",
    kind: Type::String,
    description: "The id of the request: the caller's, or a generated one",
};

/// What a response says of the model and of the cache.
static RESULT: [ResponseHeader; 4] = [
    ResponseHeader {
        component: "AndonCache",
        name: "x-andon-cache",
        kind: Type::String,
        description: "hit, miss, or the number of rows found in the cache, such as 2/3",
    },
    ResponseHeader {
        component: "AndonDigest",
        name: "x-andon-digest",
        kind: Type::String,
        description: "The digest of the model version, part of the cache key",
    },
    ResponseHeader {
        component: "AndonFallback",
        name: "x-andon-fallback",
        kind: Type::String,
        description: "The model of a fallback chain that responded instead of the first, and why",
    },
    ResponseHeader {
        component: "ComputeTokens",
        name: "x-compute-tokens",
        kind: Type::Integer,
        description: "The number of computed tokens",
    },
];

static CONTENT_LENGTH: ResponseHeader = ResponseHeader {
    component: "InferenceHeaderContentLength",
    name: "Inference-Header-Content-Length",
    kind: Type::Integer,
    description: JSON_BYTES,
};

static AUTHENTICATE: ResponseHeader = ResponseHeader {
    component: "WwwAuthenticate",
    name: "www-authenticate",
    kind: Type::String,
    description: "The authentication scheme",
};

static ALLOW: ResponseHeader = ResponseHeader {
    component: "Allow",
    name: "allow",
    kind: Type::String,
    description: "The methods that the path allows",
};

/// When to come back.
static RETRY: [ResponseHeader; 2] = [
    ResponseHeader {
        component: "RetryAfter",
        name: "retry-after",
        kind: Type::Integer,
        description: "The time to wait before a retry, in seconds",
    },
    ResponseHeader {
        component: "RetryAfterMs",
        name: "retry-after-ms",
        kind: Type::Integer,
        description: "The same in milliseconds",
    },
];

/// Adds the headers of a response, which depend on its status.
pub(super) fn add(
    status: &str,
    response: &mut Response,
    traits: Traits<'_>,
    components: &mut Components,
) {
    for header in of_response(status, traits) {
        let schema = ObjectBuilder::new().schema_type(header.kind.clone());
        let specified = HeaderBuilder::new()
            .schema(Some(schema))
            .description(Some(header.description))
            .build();
        let shared = shared::header(components, header.component, specified);
        response.headers.insert(header.name.to_owned(), shared);
    }
}

fn of_response(status: &str, traits: Traits<'_>) -> Vec<&'static ResponseHeader> {
    let mut headers = Vec::new();
    // A request that is refused before it is read has no id.
    if status != "431" {
        headers.push(&REQUEST_ID);
    }
    match status {
        "200" if traits.body => {
            headers.extend(&RESULT);
            if traits.path.ends_with(INFER) {
                headers.push(&CONTENT_LENGTH);
            }
        }
        "401" => headers.push(&AUTHENTICATE),
        "405" => headers.push(&ALLOW),
        "429" | "503" => headers.extend(&RETRY),
        _ => {}
    }
    headers
}
