//! The OpenAPI document, generated from the types of the handlers. What all
//! operations share, such as their refusals, is added here once.

mod refusals;
pub mod rest;
mod unsigned;

use std::sync::LazyLock;

use axum::Router;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use bytes::Bytes;
use http::header::{CACHE_CONTROL, CONTENT_TYPE};
use serde_json::{Value, json};
use utoipa::OpenApi as _;
use utoipa::openapi::path::{Operation, Parameter, ParameterBuilder, ParameterIn};
use utoipa::openapi::schema::{ObjectBuilder, Type};
use utoipa::openapi::security::{
    ApiKey, ApiKeyValue, HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme,
};
use utoipa::openapi::{
    Header, HeaderBuilder, OpenApi, PathItem, RefOr, Required, Response as Told,
};

use super::gate::Routes;
use super::problem::{OpenAiError, Problem, Shape};
use super::{chat, classify, openai, rerank, rest as rest_v2, tensors};
use crate::stack::Stack;

#[derive(utoipa::OpenApi)]
#[openapi(
    info(
        title = "Andon",
        description = "Models of this fleet, through the surfaces that their callers know: the Open Inference Protocol v2 in JSON and with binary tensors, OpenAI's, Cohere's and Jina's, and that of Text Embeddings Inference.\n\nA model answers alike through every surface, and through gRPC. A key goes into the header Authorization as Bearer, or into x-api-key; a gateway that asks nobody who they are needs none."
    ),
    servers((url = "/", description = "This server")),
    paths(
        openai::list_models,
        openai::show_model,
        openai::embed,
        chat::complete,
        chat::generate::generate,
        chat::generate::generate_stream,
        rerank::rerank_either,
        rerank::rerank_v1,
        rerank::rerank_v2,
        classify::classify,
        rest_v2::live,
        rest_v2::ready,
        rest_v2::server,
        rest_v2::metadata,
        rest_v2::model_ready,
        rest_v2::config,
        rest_v2::statistics,
        rest_v2::index,
        rest_v2::load,
        rest_v2::unload,
        tensors::infer,
        rest_v2::settings::log,
        rest_v2::settings::change_log,
        rest_v2::settings::trace,
        rest_v2::settings::change_trace,
        document_as_json,
    ),
    components(schemas(Problem, OpenAiError)),
    tags(
        (name = "OpenAI", description = "Models, vectors and conversations, as OpenAI's clients ask for them"),
        (name = "Rerank", description = "Documents ordered by how well they answer a query"),
        (name = "Classify", description = "Labels for texts"),
        (name = "Inference", description = "The Open Inference Protocol v2: tensors in and out"),
        (name = "Repository", description = "Which models there are, loading and unloading them"),
        (name = "Settings", description = "What is logged and traced, for administrators"),
        (name = "Health", description = "Whether the server and its models are ready"),
        (name = "Document", description = "This document"),
    )
)]
struct Document;

/// The document as it is sent.
static JSON: LazyLock<Bytes> = LazyLock::new(|| {
    // It has no map with keys that are no texts, which is all that could fail.
    let mut written = serde_json::to_value(document()).unwrap_or_default();
    unsigned::widen(&mut written);
    written.to_string().into()
});

/// The routes.
pub fn routes(stack: &Stack) -> Router<Stack> {
    Routes::new(stack, Shape::Problem)
        .open("/openapi.json", get(document_as_json))
        .into_router()
}

/// This document
#[utoipa::path(
    get, path = "/openapi.json", tag = "Document", operation_id = "openapi",
    responses((status = 200, description = "OpenAPI 3.1", body = Value, content_type = "application/json"))
)]
async fn document_as_json() -> Response {
    let headers = [
        (CONTENT_TYPE, "application/json"),
        (CACHE_CONTROL, "no-cache"),
    ];
    (headers, JSON.clone()).into_response()
}

/// The model of an address.
#[derive(Debug, utoipa::IntoParams)]
#[into_params(parameter_in = Path)]
#[allow(dead_code, reason = "it is a description: `rest::Model` reads it")]
pub struct ModelPath {
    /// The model's name.
    #[param(
        min_length = 1,
        max_length = 128,
        pattern = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$",
        example = "minilm"
    )]
    pub model: String,
}

/// What an operation is, as far as its refusals and headers depend on it.
#[derive(Debug, Clone, Copy)]
struct Kinds<'p> {
    /// Its address.
    path: &'p str,
    shape: Shape,
    /// Whether it needs no key.
    open: bool,
    /// Whether it names a model, in its address or in its body.
    model: bool,
    /// Whether it has a body.
    body: bool,
}

/// Operations that answer anybody.
const OPEN: [&str; 3] = ["/v2/health/live", "/v2/health/ready", "/openapi.json"];

/// The whole document.
pub fn document() -> OpenApi {
    let mut document = Document::openapi();
    platform::VERSION.clone_into(&mut document.info.version);
    let components = document.components.get_or_insert_default();
    let bearer = HttpBuilder::new()
        .scheme(HttpAuthScheme::Bearer)
        .description(Some("A key of Andon or a signed token"))
        .build();
    components.add_security_scheme("bearer", SecurityScheme::Http(bearer));
    let key = ApiKeyValue::with_description("x-api-key", "A key of Andon");
    components.add_security_scheme("key", SecurityScheme::ApiKey(ApiKey::Header(key)));
    add_versions(&mut document);
    for (path, item) in &mut document.paths.paths {
        for operation in operations(item) {
            let kinds = Kinds {
                path,
                shape: Shape::of_path(path),
                open: OPEN.contains(&path.as_str()),
                model: path.contains("{model}") || operation.request_body.is_some(),
                body: operation.request_body.is_some(),
            };
            complete(operation, kinds);
        }
    }
    document
}

fn operations(item: &mut PathItem) -> impl Iterator<Item = &mut Operation> {
    [&mut item.get, &mut item.post].into_iter().flatten()
}

/// The operations that also take a version of the model, in their address.
fn add_versions(document: &mut OpenApi) {
    const MODEL: &str = "/v2/models/{model}";
    let version = ObjectBuilder::new()
        .schema_type(Type::String)
        .pattern(Some("^[1-9][0-9]{0,17}$"));
    let version = ParameterBuilder::new()
        .name("version")
        .parameter_in(ParameterIn::Path)
        .required(Required::True)
        .description(Some("The version of the model"))
        .schema(Some(version))
        .example(Some(json!("1")))
        .build();
    let paths = &mut document.paths.paths;
    let versioned: Vec<(String, PathItem)> = paths
        .iter()
        .filter_map(|(path, item)| {
            let rest = path.strip_prefix(MODEL)?;
            if rest.starts_with("/trace") {
                return None;
            }
            let mut item = item.clone();
            for operation in operations(&mut item) {
                let id = operation.operation_id.take().unwrap_or_default();
                operation.operation_id = Some(format!("{id}_version"));
                let parameters = operation.parameters.get_or_insert_default();
                parameters.push(RefOr::T(version.clone()));
            }
            Some((format!("{MODEL}/versions/{{version}}{rest}"), item))
        })
        .collect();
    paths.extend(versioned);
    // Those of all models, at an address that no model can have.
    if let Some(mut item) = paths.get("/v2/models/{model}/stats").cloned() {
        for operation in operations(&mut item) {
            operation.operation_id = Some("all_statistics".to_owned());
            operation.summary = Some("What all models have done".to_owned());
            operation.parameters = None;
        }
        paths.insert("/v2/models/stats".to_owned(), item);
    }
}

/// Adds what holds for every operation of its kind.
fn complete(operation: &mut Operation, kinds: Kinds<'_>) {
    let parameters = operation.parameters.get_or_insert_default();
    parameters.extend(request_headers(kinds).map(RefOr::T));
    if !kinds.open {
        let nobody = SecurityRequirement::default();
        let schemes = ["bearer", "key"];
        let requirement = |scheme| SecurityRequirement::new::<&str, [&str; 0], &str>(scheme, []);
        let mut all: Vec<SecurityRequirement> = schemes.map(requirement).into();
        all.push(nobody);
        operation.security = Some(all);
    }
    let responses = &mut operation.responses.responses;
    for (status, told) in responses.iter_mut() {
        if let RefOr::T(told) = told {
            add_headers(status, told, kinds);
        }
    }
    for (status, mut told) in refusals::refusals(kinds) {
        let status = status.to_string();
        responses.entry(status.clone()).or_insert_with(|| {
            add_headers(&status, &mut told, kinds);
            RefOr::T(told)
        });
    }
}

/// The headers that requests may have: the caller's patience, and what the
/// request is called; whether an answer may be one that is known; where the
/// JSON of tensors ends.
fn request_headers(kinds: Kinds<'_>) -> impl Iterator<Item = Parameter> {
    let whole = || ObjectBuilder::new().schema_type(Type::Integer);
    let text = || ObjectBuilder::new().schema_type(Type::String);
    let header = |name: &str, schema: ObjectBuilder, says: &str, example: Value| {
        ParameterBuilder::new()
            .name(name)
            .parameter_in(ParameterIn::Header)
            .description(Some(says))
            .schema(Some(schema))
            .example(Some(example))
            .build()
    };
    let ms = whole().minimum(Some(1)).maximum(Some(999_999_999_999_u64));
    let patience = match kinds.shape {
        Shape::OpenAi => {
            "Milliseconds that the caller waits; at most what the server allows, which also holds if it is not given. What OpenAI's clients say in X-Stainless-Timeout is read where this is not given"
        }
        Shape::Problem => {
            "Milliseconds that the caller waits; at most what the server allows, which also holds if it is not given"
        }
    };
    let id = "What the request is called: up to 128 printable characters; a new name if it is not given or not fit";
    let mut headers = vec![
        header("timeout", ms, patience, json!(10_000)),
        header("x-request-id", text(), id, json!("request-1")),
    ];
    if kinds.body {
        let fresh =
            "no-cache for an answer that is computed anew, no-store for one that is not kept";
        headers.push(header("cache-control", text(), fresh, json!("no-cache")));
    }
    if kinds.path.ends_with(INFER) {
        headers.push(header(
            "Inference-Header-Content-Length",
            whole().minimum(Some(0)),
            JSON_BYTES,
            json!(158),
        ));
    }
    headers.into_iter()
}

/// How the addresses of operations on tensors end.
const INFER: &str = "/infer";
const JSON_BYTES: &str = "Bytes of the JSON, where the bytes of tensors follow it";

/// The headers of answers.
fn add_headers(status: &str, told: &mut Told, kinds: Kinds<'_>) {
    let mut add = |name: &str, kind: Type, says: &str| {
        told.headers
            .insert(name.to_owned(), RefOr::T(header(kind, says)));
    };
    // What is refused before it is read has no name.
    if status != "431" {
        add(
            "x-request-id",
            Type::String,
            "The caller's id for the request, or a new one",
        );
    }
    match status {
        "200" if kinds.body => {
            add(
                "x-andon-cache",
                Type::String,
                "hit, miss, or how many of the rows were known",
            );
            add(
                "x-andon-digest",
                Type::String,
                "What stands for the model version where its answers are kept",
            );
            add(
                "x-andon-fallback",
                Type::String,
                "Which model of a chain answered in place of the first, and why",
            );
            add("x-compute-tokens", Type::Integer, "Tokens computed");
            if kinds.path.ends_with(INFER) {
                add("Inference-Header-Content-Length", Type::Integer, JSON_BYTES);
            }
        }
        "401" => add("www-authenticate", Type::String, "How to say who calls"),
        "405" => add("allow", Type::String, "The methods that the path takes"),
        "429" | "503" => {
            let says = "Seconds after which to try again";
            add("retry-after", Type::Integer, says);
            let says = "The same in milliseconds";
            add("retry-after-ms", Type::Integer, says);
        }
        _ => {}
    }
}

fn header(kind: Type, says: &str) -> Header {
    HeaderBuilder::new()
        .schema(Some(ObjectBuilder::new().schema_type(kind)))
        .description(Some(says))
        .build()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn written() -> Value {
        serde_json::from_slice(&JSON).unwrap()
    }

    #[test]
    fn every_operation_has_its_refusals_and_an_answer() {
        let document = written();
        assert_eq!(document["openapi"], "3.1.0");
        let mut ids = BTreeSet::new();
        for (path, item) in document["paths"].as_object().unwrap() {
            for (method, operation) in item.as_object().unwrap() {
                let name = format!("{method} {path}");
                let responses = operation["responses"].as_object().unwrap();
                assert!(responses.contains_key("200"), "{name}");
                for status in ["400", "405", "500", "503", "504"] {
                    let told = &responses[status];
                    assert!(
                        told["headers"]["x-request-id"].is_object(),
                        "{name} {status}"
                    );
                    let content = told["content"].as_object().unwrap();
                    let (kind, content) = content.iter().next().unwrap();
                    let openai = path.starts_with("/v1/");
                    assert_eq!(kind == "application/json", openai, "{name}");
                    assert!(content["example"].is_object(), "{name}");
                }
                assert!(operation["summary"].is_string(), "{name}");
                assert!(ids.insert(operation["operationId"].to_string()), "{name}");
                if operation.get("requestBody").is_some() {
                    assert!(responses.contains_key("413"), "{name}");
                    assert!(operation["security"].is_array(), "{name}");
                }
            }
        }
    }

    #[test]
    fn every_reference_is_there_and_own_surfaces_are_closed() {
        let document = written();
        let text = document.to_string();
        for reference in text.split("\"#/components/schemas/").skip(1) {
            let name = reference.split('"').next().unwrap();
            let schema = &document["components"]["schemas"][name];
            assert!(schema.is_object(), "{name}");
        }
        for name in [
            "RerankRequest",
            "RerankTextsRequest",
            "ClassifyRequest",
            "GenerateRequest",
        ] {
            let schema = &document["components"]["schemas"][name];
            assert_eq!(schema["additionalProperties"], false, "{name}");
        }
        let embedding = &document["components"]["schemas"]["EmbeddingRequest"];
        assert!(embedding.get("additionalProperties").is_none());
    }
}
