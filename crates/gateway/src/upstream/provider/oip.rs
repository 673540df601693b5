//! The Open Inference Protocol in front of a provider's model. The checks, and
//! the fields that they name, are those of a local model.

use std::sync::Arc;

use http::HeaderMap;
use platform::grpc::decode;
use protocol::inference::{
    ModelConfig, ModelConfigRequest, ModelConfigResponse, ModelInferRequest, ModelInput,
    ModelMetadataRequest, ModelMetadataResponse, ModelOutput, ModelParameter,
    ModelTransactionPolicy, ModelVersionPolicy,
    model_metadata_response::TensorMetadata,
    model_version_policy::{PolicyChoice, Specific},
};
use protocol::{
    DIGEST_KEY, Error, InferRequest, Input, Method, ModelName, ModelVersion, TOKENS_KEY, Task,
    Value, to_response,
};
use providers::{
    CallContext, ChatRequest, EmbeddingOptions, MODEL_VERSION, Provider, ProviderError,
    ProviderUsage, UsageMeter,
};
use tensor::{Datatype, Shape, Tensor, TensorError};
use tokio::time::Instant;
use tonic::Status;

use super::generation::to_chat;
use crate::request::Request;
use crate::upstream::Response;

/// One input or output.
struct Spec {
    name: &'static str,
    datatype: Datatype,
    shape: Vec<i64>,
}

fn spec(name: &'static str, datatype: Datatype, shape: &[i64]) -> Spec {
    Spec {
        name,
        datatype,
        shape: shape.to_vec(),
    }
}

/// Responds to one message; the usage is that of all calls of the service.
pub(super) async fn respond(
    provider: &Arc<Provider>,
    request: &Request,
    usage: &UsageMeter,
) -> Result<(Response, ProviderUsage), Status> {
    let message = request.message.bytes();
    let context = CallContext {
        deadline: request.deadline,
        usage,
    };
    match request.method {
        Method::ModelInfer => infer(provider, decode(message)?, context).await,
        Method::ModelMetadata => {
            let _: ModelMetadataRequest = decode(message)?;
            let response = Response::own(&metadata(provider), HeaderMap::new());
            Ok((response, ProviderUsage::default()))
        }
        Method::ModelConfig => {
            let _: ModelConfigRequest = decode(message)?;
            let config = Some(config(provider));
            let response = Response::own(&ModelConfigResponse { config }, HeaderMap::new());
            Ok((response, ProviderUsage::default()))
        }
        method => Err(unsupported(provider, method).into()),
    }
}

fn inputs(provider: &Provider) -> Vec<Spec> {
    let text = |name| spec(name, Datatype::Bytes, &[-1]);
    match provider.task() {
        Task::Embedding => vec![text("text")],
        Task::Rerank => vec![text("query"), text("text")],
        Task::Generation => vec![text("text_input")],
        Task::Classification | Task::Tabular => Vec::new(),
    }
}

fn outputs(provider: &Provider) -> Vec<Spec> {
    let width = provider
        .settings()
        .width
        .and_then(|width| i64::try_from(width).ok());
    match provider.task() {
        Task::Embedding => {
            let shape = [-1, width.unwrap_or(-1)];
            vec![spec("embedding", Datatype::Fp32, &shape)]
        }
        Task::Rerank => vec![spec("score", Datatype::Fp32, &[-1, 1])],
        Task::Generation => vec![spec("text_output", Datatype::Bytes, &[-1])],
        Task::Classification | Task::Tabular => Vec::new(),
    }
}

fn metadata(provider: &Provider) -> ModelMetadataResponse {
    let tensor = |spec: Spec| TensorMetadata {
        name: spec.name.to_owned(),
        datatype: spec.datatype.name().to_owned(),
        shape: spec.shape,
    };
    ModelMetadataResponse {
        name: provider.name.clone(),
        versions: vec![MODEL_VERSION.to_owned()],
        platform: "andon_provider".to_owned(),
        inputs: inputs(provider).into_iter().map(tensor).collect(),
        outputs: outputs(provider).into_iter().map(tensor).collect(),
    }
}

fn config(provider: &Provider) -> ModelConfig {
    // Triton's dims leave out the batch dimension.
    let dims = |spec: &Spec| match spec.shape.get(1..) {
        Some([]) | None => vec![1],
        Some(dims) => dims.to_vec(),
    };
    let input = |spec: Spec| ModelInput {
        name: spec.name.to_owned(),
        data_type: protocol::data_type(spec.datatype).into(),
        dims: dims(&spec),
        optional: false,
    };
    let output = |spec: Spec| ModelOutput {
        name: spec.name.to_owned(),
        data_type: protocol::data_type(spec.datatype).into(),
        dims: dims(&spec),
    };
    let parameters = [
        ("task", provider.task().to_string()),
        (
            "concurrency_max",
            provider.settings().concurrency_max.to_string(),
        ),
    ];
    ModelConfig {
        name: provider.name.clone(),
        platform: "andon_provider".to_owned(),
        backend: "andon".to_owned(),
        version_policy: Some(ModelVersionPolicy {
            policy_choice: Some(PolicyChoice::Specific(Specific { versions: vec![1] })),
        }),
        max_batch_size: i32::try_from(provider.settings().rows_max()).unwrap_or(i32::MAX),
        input: inputs(provider).into_iter().map(input).collect(),
        output: outputs(provider).into_iter().map(output).collect(),
        parameters: parameters
            .map(|(name, string_value)| (name.to_owned(), ModelParameter { string_value }))
            .into(),
        model_transaction_policy: Some(ModelTransactionPolicy {
            decoupled: provider.task() == Task::Generation,
        }),
        ..Default::default()
    }
}

/// The error of a method that providers do not support.
pub(super) fn unsupported(provider: &Provider, method: Method) -> Error {
    let (name, method) = (&provider.name, method.name());
    let reason =
        format!("model '{name}' is served by an outside provider, which does not support {method}");
    Error::new(protocol::Kind::Unsupported, reason)
}

/// The error of a parameter that the model does not have.
fn unknown_parameter(provider: &Provider, name: &str) -> Error {
    let reason = format!("model '{}' has no such parameter", provider.name);
    Error::invalid(format!("parameters[{name}]"), reason)
}

/// Checks outputs, names, datatypes and shapes.
fn check(provider: &Provider, request: &InferRequest) -> Result<(), Error> {
    let outputs = outputs(provider);
    for (index, name) in request.outputs.iter().enumerate() {
        if !outputs.iter().any(|spec| spec.name == *name) {
            let known: Vec<&str> = outputs.iter().map(|spec| spec.name).collect();
            return Err(Error::invalid(
                format!("outputs[{index}].name"),
                format!("unknown output; the outputs are: {}", known.join(", ")),
            ));
        }
    }
    let specs = inputs(provider);
    for spec in &specs {
        if !request.inputs.iter().any(|input| input.name == spec.name) {
            let reason = format!("input '{}' is missing", spec.name);
            return Err(Error::invalid("inputs", reason));
        }
    }
    let mut rows = None;
    for (index, input) in request.inputs.iter().enumerate() {
        let count = check_input(provider, index, input, &specs)?;
        if *rows.get_or_insert(count) != count {
            return Err(Error::invalid(
                format!("inputs[{index}].shape"),
                "all inputs must have the same number of rows",
            ));
        }
    }
    Ok(())
}

fn check_input(
    provider: &Provider,
    index: usize,
    input: &Input,
    specs: &[Spec],
) -> Result<usize, Error> {
    let at = |part: &str| format!("inputs[{index}].{part}");
    let Some(spec) = specs.iter().find(|spec| spec.name == input.name) else {
        let known: Vec<&str> = specs.iter().map(|spec| spec.name).collect();
        return Err(Error::invalid(
            at("name"),
            format!("unknown input; the inputs are: {}", known.join(", ")),
        ));
    };
    if input.tensor.datatype() != spec.datatype {
        let reason = format!("must be {}", spec.datatype);
        return Err(Error::invalid(at("datatype"), reason));
    }
    let sizes = input.tensor.shape().to_wire();
    if sizes.len() != spec.shape.len() {
        let reason = format!("is {sizes:?}, but must be {:?}", spec.shape);
        return Err(Error::invalid(at("shape"), reason));
    }
    let count = input.tensor.shape().sizes().first().copied().unwrap_or(0);
    if count == 0 {
        return Err(Error::invalid(at("shape"), "the batch is empty"));
    }
    let rows_max = provider.settings().rows_max();
    if count > rows_max {
        let reason = format!("{count} rows: a request may have {rows_max}");
        return Err(Error::invalid(at("shape"), reason));
    }
    Ok(count)
}

fn embedding_options(
    provider: &Provider,
    request: &InferRequest,
) -> Result<EmbeddingOptions, Error> {
    let mut options = EmbeddingOptions::default();
    for (name, value) in &request.parameters {
        let wrong = |reason: String| Error::invalid(format!("parameters[{name}]"), reason);
        match (name.as_str(), value) {
            ("truncate", Value::Bool(on)) => options.truncate = *on,
            ("normalize", Value::Bool(on)) => options.normalize = *on,
            ("dimensions", Value::Integer(count)) => {
                options.dimensions = Some(dimensions(provider, *count).map_err(wrong)?);
            }
            ("truncate" | "normalize", _) => return Err(wrong("must be a boolean".into())),
            ("dimensions", _) => return Err(wrong("must be an integer".into())),
            _ => return Err(unknown_parameter(provider, name)),
        }
    }
    Ok(options)
}

/// Checks how many leading dimensions of an embedding are kept.
pub(super) fn dimensions(provider: &Provider, count: i64) -> Result<usize, String> {
    let width = provider.settings().width.unwrap_or(65_536);
    usize::try_from(count)
        .ok()
        .filter(|count| (1..=width).contains(count))
        .ok_or_else(|| format!("must be from 1 to {width}"))
}

async fn infer(
    provider: &Arc<Provider>,
    message: ModelInferRequest,
    mut context: CallContext<'_>,
) -> Result<(Response, ProviderUsage), Status> {
    let request = InferRequest::checked(message)?;
    check(provider, &request)?;
    if let Some(timeout) = request.timeout {
        context.deadline = context.deadline.min(Instant::now() + timeout);
    }
    let (output, usage) = match provider.task() {
        Task::Embedding => embed(provider, &request, context).await?,
        Task::Rerank => rerank(provider, &request, context).await?,
        Task::Generation => generate(provider, &request, context).await?,
        Task::Classification | Task::Tabular => {
            return Err(unsupported(provider, Method::ModelInfer).into());
        }
    };
    let name = ModelName::checked(&provider.name, "model_name")?;
    let version = ModelVersion::checked(MODEL_VERSION, "model_version")?;
    let message = to_response(&name, version, request.id, vec![output]);
    Ok((
        Response::own(&message, response_metadata(provider, usage)),
        usage,
    ))
}

/// The metadata of a response.
pub(super) fn response_metadata(provider: &Provider, usage: ProviderUsage) -> HeaderMap {
    let mut metadata = HeaderMap::new();
    metadata.insert(TOKENS_KEY, usage.tokens().into());
    let digest = provider.digest.as_deref().map(http::HeaderValue::try_from);
    if let Some(Ok(digest)) = digest {
        metadata.insert(DIGEST_KEY, digest);
    }
    metadata
}

type Output = (String, Tensor);

/// An output whose shape this program chose.
fn output(name: &str, tensor: Result<Tensor, TensorError>) -> Result<Output, Error> {
    let tensor = tensor.map_err(|error| Error::new(protocol::Kind::Internal, error.to_string()))?;
    Ok((name.to_owned(), tensor))
}

async fn embed(
    provider: &Arc<Provider>,
    request: &InferRequest,
    context: CallContext<'_>,
) -> Result<(Output, ProviderUsage), Error> {
    let options = embedding_options(provider, request)?;
    let (texts, field) = column(request, "text")?;
    let embeddings =
        provider
            .embed(&texts, options, context)
            .await
            .map_err(|error| match error {
                ProviderError::UnsupportedDimensions => {
                    error.to_error(&provider.name, "parameters[dimensions]")
                }
                error => error.to_error(&provider.name, &field),
            })?;
    let width = embeddings.vectors.first().map_or(0, Vec::len);
    let shape = Shape::from_sizes(vec![texts.len(), width]);
    let tensor = shape.and_then(|shape| Tensor::from_f32(shape, &embeddings.vectors.concat()));
    let usage = ProviderUsage::of_input(embeddings.tokens);
    Ok((output("embedding", tensor)?, usage))
}

async fn rerank(
    provider: &Arc<Provider>,
    request: &InferRequest,
    context: CallContext<'_>,
) -> Result<(Output, ProviderUsage), Error> {
    for (name, value) in &request.parameters {
        match (name.as_str(), value) {
            ("truncate", Value::Bool(_)) => {}
            ("truncate", _) => {
                let field = format!("parameters[{name}]");
                return Err(Error::invalid(field, "must be a boolean"));
            }
            _ => return Err(unknown_parameter(provider, name)),
        }
    }
    let (queries, _) = column(request, "query")?;
    let (texts, field) = column(request, "text")?;
    let pairs: Vec<_> = queries.into_iter().zip(texts).collect();
    let (scores, usage) = provider
        .rerank(&pairs, context)
        .await
        .map_err(|error| error.to_error(&provider.name, &field))?;
    let shape = Shape::from_sizes(vec![scores.len(), 1]);
    let tensor = shape.and_then(|shape| Tensor::from_f32(shape, &scores));
    Ok((output("score", tensor)?, usage))
}

async fn generate(
    provider: &Arc<Provider>,
    request: &InferRequest,
    context: CallContext<'_>,
) -> Result<(Output, ProviderUsage), Error> {
    let (chat, field) = chat_request(request)?;
    let response = provider
        .generate(&chat, context)
        .await
        .map_err(|error| error.to_error(&provider.name, &field))?;
    let shape = Shape::from_sizes(vec![1]);
    let tensor = shape.and_then(|shape| Tensor::from_elements(shape, &[response.text.as_bytes()]));
    Ok((
        output("text_output", tensor)?,
        ProviderUsage::from(response.usage),
    ))
}

/// The conversation that a message of a stream stands for, and its id. The
/// checks are those of one call.
pub fn conversation(
    provider: &Provider,
    request: &Request,
) -> Result<(ChatRequest, String), Status> {
    let request = InferRequest::checked(decode(request.message.bytes())?)?;
    check(provider, &request)?;
    let (chat, _) = chat_request(&request)?;
    Ok((chat, request.id))
}

/// The conversation that a request for generation stands for, and the field
/// that holds its text.
fn chat_request(request: &InferRequest) -> Result<(ChatRequest, String), Error> {
    let (mut texts, field) = column(request, "text_input")?;
    let chat = to_chat(request, texts.pop().unwrap_or_default())?;
    Ok((chat, field))
}

/// The texts of an input, and the field that holds them.
fn column(request: &InferRequest, name: &str) -> Result<(Vec<String>, String), Error> {
    let position = request.inputs.iter().position(|input| input.name == name);
    let index = position.unwrap_or(0);
    let field = format!("inputs[{index}].contents");
    let Some(input) = request.inputs.get(index) else {
        return Err(Error::invalid("inputs", "there are none"));
    };
    let elements = input
        .tensor
        .to_elements()
        .map_err(|error| Error::invalid(&field, error.to_string()))?;
    let texts = elements.into_iter().enumerate().map(|(element, bytes)| {
        std::str::from_utf8(bytes)
            .map(str::to_owned)
            .map_err(|_| Error::invalid(&field, format!("element {element} is not UTF-8")))
    });
    Ok((texts.collect::<Result<_, _>>()?, field))
}
