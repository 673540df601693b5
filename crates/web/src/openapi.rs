//! The OpenAPI document, generated from the types of the handlers. What all
//! operations share, such as their error responses, is added here once.

mod errors;
mod headers;
mod shared;

use std::sync::LazyLock;

use axum::Router;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use bytes::Bytes;
use http::header::{CACHE_CONTROL, CONTENT_TYPE};
use serde_json::{Value, json};
use utoipa::OpenApi as _;
use utoipa::openapi::path::{Operation, ParameterBuilder, ParameterIn};
use utoipa::openapi::schema::{ObjectBuilder, Type};
use utoipa::openapi::security::{
    ApiKey, ApiKeyValue, HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme,
};
use utoipa::openapi::{Components, OpenApi, PathItem, RefOr, Required};

use super::endpoint::Endpoints;
use super::error::{ErrorFormat, OpenAiError, Problem};
use super::{chat, classify, generate, infer, openai, pass_through, rerank, rest};
use gateway::stack::Stack;

#[derive(utoipa::OpenApi)]
#[openapi(
    info(
        title = "Andon",
        description = "The models of this fleet, through the APIs that clients already use: the Open Inference Protocol v2 in JSON and with binary tensors, and the formats of OpenAI, Cohere, Jina and Text Embeddings Inference.\n\nA model gives the same results through every API, and through gRPC. Send the key in the header Authorization as Bearer, or in x-api-key; a gateway without authentication needs none."
    ),
    servers((url = "/", description = "This server")),
    paths(
        openai::list_models,
        openai::show_model,
        openai::embed,
        chat::complete,
        pass_through::complete,
        pass_through::respond,
        generate::generate,
        generate::generate_stream,
        rerank::rerank_either,
        rerank::rerank_v1,
        rerank::rerank_v2,
        classify::classify,
        rest::live,
        rest::ready,
        rest::server,
        rest::metadata,
        rest::model_ready,
        rest::config,
        rest::statistics,
        rest::index,
        rest::load,
        rest::unload,
        infer::infer,
        rest::log,
        rest::change_log,
        rest::trace,
        rest::change_trace,
        document_as_json,
    ),
    components(schemas(Problem, OpenAiError)),
    tags(
        (name = "OpenAI", description = "Models, embeddings, chat completions, and completions and responses that are passed through, in the format of OpenAI's API"),
        (name = "Rerank", description = "Documents ranked by their relevance to a query"),
        (name = "Classify", description = "Classification of texts"),
        (name = "Inference", description = "The Open Inference Protocol v2: inference with tensors, and model metadata"),
        (name = "Repository", description = "Listing, loading and unloading models"),
        (name = "Settings", description = "Log and trace settings, for administrators"),
        (name = "Health", description = "Liveness and readiness of the server and its models"),
        (name = "Document", description = "The OpenAPI document"),
    )
)]
struct Document;

/// The document as JSON.
static JSON: LazyLock<Bytes> = LazyLock::new(|| {
    // No map here has keys that are no strings, which is all that could fail.
    let mut document = serde_json::to_value(document()).unwrap_or_default();
    widen_unsigned(&mut document);
    document.to_string().into()
});

/// The endpoint. The document is made here: on the thread of its first caller it
/// would keep other calls waiting.
pub fn routes(stack: &Stack) -> Router<Stack> {
    LazyLock::force(&JSON);
    Endpoints::new(stack, ErrorFormat::Problem)
        .public("/openapi.json", get(document_as_json))
        .into_router()
}

/// OpenAPI document
#[utoipa::path(
    get, path = "/openapi.json", tag = "Document", operation_id = "openapi",
    responses((status = 200, description = "This document, OpenAPI 3.1", body = Value, content_type = "application/json"))
)]
async fn document_as_json() -> Response {
    let headers = [
        (CONTENT_TYPE, "application/json"),
        (CACHE_CONTROL, "no-cache"),
    ];
    (headers, JSON.clone()).into_response()
}

/// The traits that determine an operation's error responses and headers.
#[derive(Debug, Clone, Copy)]
struct Traits<'p> {
    path: &'p str,
    format: ErrorFormat,
    /// Whether it needs no key.
    public: bool,
    /// Whether it is for one model, named in its path or in its body.
    model: bool,
    /// Whether it has a body.
    body: bool,
}

impl<'p> Traits<'p> {
    fn of(path: &'p str, operation: &Operation) -> Self {
        let body = operation.request_body.is_some();
        Self {
            path,
            format: ErrorFormat::of_path(path),
            public: PUBLIC.contains(&path),
            model: path.contains("{model}") || body,
            body,
        }
    }
}

/// Operations without authentication.
const PUBLIC: [&str; 3] = ["/v2/health/live", "/v2/health/ready", "/openapi.json"];

/// The whole document.
pub fn document() -> OpenApi {
    let mut document = Document::openapi();
    platform::VERSION.clone_into(&mut document.info.version);
    let components = document.components.get_or_insert_default();
    let bearer = HttpBuilder::new()
        .scheme(HttpAuthScheme::Bearer)
        .description(Some("An API key of Andon, or a JWT"))
        .build();
    components.add_security_scheme("bearer", SecurityScheme::Http(bearer));
    let key = ApiKeyValue::with_description("x-api-key", "An API key of Andon");
    components.add_security_scheme("key", SecurityScheme::ApiKey(ApiKey::Header(key)));
    add_versions(&mut document);
    let components = document.components.get_or_insert_default();
    for (path, item) in &mut document.paths.paths {
        for operation in operations(item) {
            let traits = Traits::of(path, operation);
            complete(operation, traits, components);
        }
    }
    document
}

fn operations(item: &mut PathItem) -> impl Iterator<Item = &mut Operation> {
    [&mut item.get, &mut item.post].into_iter().flatten()
}

/// Adds the paths with a version of the model.
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
    // Statistics of all models, at a path that no model can have.
    if let Some(mut item) = paths.get("/v2/models/{model}/stats").cloned() {
        for operation in operations(&mut item) {
            operation.operation_id = Some("all_statistics".to_owned());
            operation.summary = Some("Statistics of all models".to_owned());
            operation.parameters = None;
        }
        paths.insert("/v2/models/stats".to_owned(), item);
    }
}

/// Adds the parts that all operations with these traits have. All but the response
/// of success stand among the components.
fn complete(operation: &mut Operation, traits: Traits<'_>, components: &mut Components) {
    let parameters = operation.parameters.get_or_insert_default();
    for parameter in parameters.iter_mut() {
        if let RefOr::T(own) = parameter {
            let component = match own.name.as_str() {
                "model" => "ModelName",
                "version" => "ModelVersion",
                _ => continue,
            };
            let own = own.clone();
            *parameter = shared::parameter(components, component, own);
        }
    }
    for (component, header) in headers::of_requests(traits) {
        parameters.push(shared::parameter(components, component, header));
    }
    if !traits.public {
        let anonymous = SecurityRequirement::default();
        let schemes = ["bearer", "key"];
        let requirement = |scheme| SecurityRequirement::new::<&str, [&str; 0], &str>(scheme, []);
        let mut all: Vec<SecurityRequirement> = schemes.map(requirement).into();
        all.push(anonymous);
        operation.security = Some(all);
    }
    let responses = &mut operation.responses.responses;
    for (status, response) in responses.iter_mut() {
        if let RefOr::T(response) = response {
            headers::add(status, response, traits, components);
        }
    }
    for error in errors::responses(traits) {
        let (status, mut response) = (error.status.to_string(), error.response);
        responses.entry(status.clone()).or_insert_with(|| {
            headers::add(&status, &mut response, traits, components);
            shared::response(components, &error.name, response)
        });
    }
}

/// Corrects unsigned numbers of 32 bits, which the generated schemas call `int32`,
/// to their whole range.
fn widen_unsigned(node: &mut Value) {
    let children: Vec<&mut Value> = match node {
        Value::Object(fields) => {
            let unsigned = fields
                .get("minimum")
                .is_some_and(|least| least.as_f64() >= Some(0.0));
            if unsigned && fields.get("format").is_some_and(|format| format == "int32") {
                fields.insert("format".to_owned(), json!("int64"));
                fields.entry("maximum").or_insert(json!(u32::MAX));
            }
            fields.values_mut().collect()
        }
        Value::Array(elements) => elements.iter_mut().collect(),
        _ => return,
    };
    children.into_iter().for_each(widen_unsigned);
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::shared::tests::resolved;
    use super::*;

    fn written() -> Value {
        serde_json::from_slice(&JSON).unwrap()
    }

    #[test]
    fn every_operation_has_a_response_and_errors() {
        let document = written();
        assert_eq!(document["openapi"], "3.1.0");
        let mut ids = BTreeSet::new();
        for (path, item) in document["paths"].as_object().unwrap() {
            for (method, operation) in item.as_object().unwrap() {
                let name = format!("{method} {path}");
                let responses = operation["responses"].as_object().unwrap();
                assert!(responses.contains_key("200"), "{name}");
                for status in ["400", "405", "500", "503", "504"] {
                    let response = resolved(&document, &responses[status]);
                    let id = resolved(&document, &response["headers"]["x-request-id"]);
                    assert_eq!(id["schema"]["type"], "string", "{name} {status}");
                    let content = response["content"].as_object().unwrap();
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
    fn own_surfaces_are_closed() {
        let document = written();
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

    #[test]
    fn unsigned_numbers_have_their_whole_range() {
        let number = json!({"type": "integer", "format": "int32", "minimum": 1});
        let signed = json!({"type": "integer", "format": "int32"});
        let mut document = json!({"properties": [number, signed]});
        widen_unsigned(&mut document);
        let wide = json!({
            "type": "integer", "format": "int64", "minimum": 1, "maximum": u32::MAX
        });
        assert_eq!(document, json!({"properties": [wide, signed]}));
    }
}
