//! The Open Inference Protocol in front of a provider's model. The checks, and
//! the fields that they name, are those of a local model.

use std::sync::{Arc, LazyLock};

use http::HeaderMap;
use platform::grpc::decode;
use protocol::inference::{
    ModelConfig, ModelConfigRequest, ModelConfigResponse, ModelInferRequest, ModelMetadataRequest,
    ModelMetadataResponse, ModelTransactionPolicy,
};
use protocol::{
    DIGEST_KEY, Error, FieldPath, InferRequest, Kind, Method, ModelName, ModelVersion, PROMPT,
    PROMPT_NAME, Signature, TOKENS_KEY, Task, checked_dimensions, to_response, unknown_prompt,
};
use providers::{
    CallContext, ChatRequest, EmbeddingOptions, MODEL_VERSION, Provider, ProviderError,
    ProviderUsage, UsageMeter,
};
use tensor::{Datatype, Shape, Tensor, TensorError, TensorSpec};
use tokio::time::Instant;
use tonic::Status;

use super::generation::to_chat;
use crate::request::Request;
use crate::upstream::Response;

/// The platform in the metadata of a provider's model.
const PLATFORM: &str = "andon_provider";
/// The most dimensions of an embedding whose width is not configured.
const WIDTH_MAX: usize = 65_536;
/// Texts are bounded by their message alone: the service has its own limit.
const TEXT_BYTES_MAX: usize = usize::MAX;

/// The inputs of the models of each task.
static EMBEDDING_INPUTS: LazyLock<[TensorSpec; 1]> = LazyLock::new(|| [texts("text")]);
static RERANK_INPUTS: LazyLock<[TensorSpec; 2]> = LazyLock::new(|| [texts("query"), texts("text")]);
static GENERATION_INPUTS: LazyLock<[TensorSpec; 1]> = LazyLock::new(|| [texts("text_input")]);

fn texts(name: &str) -> TensorSpec {
    TensorSpec::new(name, Datatype::Bytes, &[-1])
}

/// Responds to one message; the usage is that of all calls of the service.
pub(super) async fn respond(
    provider: &Arc<Provider>,
    request: &Request,
    usage: &UsageMeter,
) -> Result<(Response, ProviderUsage), Status> {
    let message = request.message.bytes();
    let holder = request.caller.holder();
    let context = CallContext {
        deadline: request.deadline,
        usage,
        holder: &holder,
        has_others: request.caller.tenant.has_others,
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

fn inputs(provider: &Provider) -> &'static [TensorSpec] {
    match provider.task() {
        Task::Embedding => &*EMBEDDING_INPUTS,
        Task::Rerank => &*RERANK_INPUTS,
        Task::Generation => &*GENERATION_INPUTS,
        Task::Classification | Task::Tabular => &[],
    }
}

fn outputs(provider: &Provider) -> Vec<TensorSpec> {
    let width = provider.settings().width;
    let width = width.and_then(|width| i64::try_from(width).ok());
    let floats = |name, width| vec![TensorSpec::new(name, Datatype::Fp32, &[-1, width])];
    match provider.task() {
        Task::Embedding => floats("embedding", width.unwrap_or(-1)),
        Task::Rerank => floats("score", 1),
        Task::Generation => vec![texts("text_output")],
        Task::Classification | Task::Tabular => Vec::new(),
    }
}

/// The inputs and outputs of the provider's model.
fn signature<'o>(provider: &Provider, outputs: &'o [TensorSpec]) -> Signature<'o> {
    Signature {
        inputs: inputs(provider),
        takes_ids: false,
        outputs,
        rows_max: provider.settings().rows_max(),
    }
}

fn metadata(provider: &Provider) -> ModelMetadataResponse {
    let (outputs, versions) = (outputs(provider), vec![MODEL_VERSION.to_owned()]);
    let signature = signature(provider, &outputs);
    signature.to_metadata(&provider.name, versions, PLATFORM.to_owned())
}

fn config(provider: &Provider) -> ModelConfig {
    let outputs = outputs(provider);
    let signature = signature(provider, &outputs);
    let concurrency_max = provider.settings().concurrency_max;
    let parameters = [
        ("task", provider.task().to_string()),
        ("concurrency_max", concurrency_max.to_string()),
    ];
    let decoupled = provider.task() == Task::Generation;
    ModelConfig {
        model_transaction_policy: Some(ModelTransactionPolicy { decoupled }),
        ..signature.to_config(&provider.name, 1, PLATFORM.to_owned(), parameters)
    }
}

/// The error of a method that providers do not support.
pub(super) fn unsupported(provider: &Provider, method: Method) -> Error {
    let (name, method) = (&provider.name, method.name());
    let reason =
        format!("model '{name}' is served by an outside provider, which does not support {method}");
    Error::new(Kind::Unsupported, reason)
}

/// Checks the requested outputs, and names, datatypes and shapes of the inputs.
fn check(provider: &Provider, request: &InferRequest) -> Result<(), Error> {
    let outputs = outputs(provider);
    signature(provider, &outputs).check(request).map(drop)
}

fn embedding_options(
    provider: &Provider,
    request: &InferRequest,
) -> Result<EmbeddingOptions, Error> {
    let mut options = EmbeddingOptions::default();
    for (name, value) in &request.parameters {
        match name.as_str() {
            "truncate" => options.truncate = value.boolean(name)?,
            "normalize" => options.normalize = value.boolean(name)?,
            "dimensions" => {
                let dimensions = dimensions(provider, value.integer(name)?)
                    .map_err(|reason| Error::invalid(FieldPath::parameter(name), reason))?;
                options.dimensions = Some(dimensions);
            }
            PROMPT_NAME | PROMPT => {
                let field = FieldPath::parameter(name);
                return Err(unknown_prompt(field, std::iter::empty()));
            }
            _ => return Err(request.unknown_parameter(name)),
        }
    }
    Ok(options)
}

/// Checks how many leading dimensions of an embedding are returned.
pub(super) fn dimensions(provider: &Provider, count: i64) -> Result<usize, String> {
    checked_dimensions(count, provider.settings().width.unwrap_or(WIDTH_MAX))
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
    let tensor = tensor.map_err(|error| Error::new(Kind::Internal, error.to_string()))?;
    Ok((name.to_owned(), tensor))
}

async fn embed(
    provider: &Arc<Provider>,
    request: &InferRequest,
    context: CallContext<'_>,
) -> Result<(Output, ProviderUsage), Error> {
    let options = embedding_options(provider, request)?;
    let texts = request.texts("text", TEXT_BYTES_MAX)?;
    let embeddings =
        provider
            .embed(&texts, options, context)
            .await
            .map_err(|error| match error {
                ProviderError::UnsupportedDimensions => {
                    error.to_error(&provider.name, "parameters[dimensions]")
                }
                error => failed(&error, provider, request, "text"),
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
        if name != "truncate" {
            return Err(request.unknown_parameter(name));
        }
        value.boolean(name)?;
    }
    let queries = request.texts("query", TEXT_BYTES_MAX)?;
    let texts = request.texts("text", TEXT_BYTES_MAX)?;
    let pairs: Vec<_> = queries.into_iter().zip(texts).collect();
    let (scores, usage) = provider
        .rerank(&pairs, context)
        .await
        .map_err(|error| failed(&error, provider, request, "text"))?;
    let shape = Shape::from_sizes(vec![scores.len(), 1]);
    let tensor = shape.and_then(|shape| Tensor::from_f32(shape, &scores));
    Ok((output("score", tensor)?, usage))
}

async fn generate(
    provider: &Arc<Provider>,
    request: &InferRequest,
    context: CallContext<'_>,
) -> Result<(Output, ProviderUsage), Error> {
    let chat = chat_request(request)?;
    let response = provider
        .generate(&chat, context)
        .await
        .map_err(|error| failed(&error, provider, request, "text_input"))?;
    let usage = ProviderUsage::from(response.usage);
    let (shape, text) = (Shape::from_sizes(vec![1]), response.into_text());
    let tensor = shape.and_then(|shape| Tensor::from_elements(shape, &[text.as_bytes()]));
    Ok((output("text_output", tensor)?, usage))
}

/// The conversation that a message of a stream stands for, and its id. The
/// checks are those of one call.
pub fn conversation(
    provider: &Provider,
    request: &Request,
) -> Result<(ChatRequest, String), Status> {
    let request = InferRequest::checked(decode(request.message.bytes())?)?;
    check(provider, &request)?;
    let chat = chat_request(&request)?;
    Ok((chat, request.id))
}

/// The conversation of a request for generation.
fn chat_request(request: &InferRequest) -> Result<ChatRequest, Error> {
    let mut texts = request.texts("text_input", TEXT_BYTES_MAX)?;
    to_chat(request, texts.pop().unwrap_or_default())
}

/// The error of a call that was about the texts of an input.
fn failed(
    error: &ProviderError,
    provider: &Provider,
    request: &InferRequest,
    input: &str,
) -> Error {
    error.to_error(&provider.name, request.contents_field(input).as_str())
}
