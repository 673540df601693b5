//! What the Open Inference Protocol asks of a provider's model. The checks, and
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
    DIGEST_KEY, Error, InferRequest, Input, ModelName, ModelVersion, TOKENS_KEY, Value, to_response,
};
use tensor::{Datatype, Shape, Tensor, TensorError};
use tokio::time::Instant;
use tonic::Status;

use super::catalogue::{Task, Used};
use super::chat::ChatUsage;
use super::generation::to_chat;
use super::trouble::Trouble;
use super::{Embedding, Provider, Tab, Terms, VERSION};
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

/// Answers one message, and says what it took.
pub(super) async fn answer(
    provider: &Arc<Provider>,
    method: &str,
    request: &Request,
    tab: &Tab,
) -> Result<(Response, Used), Status> {
    let message = request.message.bytes();
    let deadline = request.deadline;
    match method {
        "ModelInfer" => infer(provider, decode(message)?, Terms { deadline, tab }).await,
        "ModelMetadata" => {
            let _: ModelMetadataRequest = decode(message)?;
            let answer = Response::own(&provider.metadata(), HeaderMap::new());
            Ok((answer, Used::default()))
        }
        "ModelConfig" => {
            let _: ModelConfigRequest = decode(message)?;
            let config = Some(provider.config());
            let answer = Response::own(&ModelConfigResponse { config }, HeaderMap::new());
            Ok((answer, Used::default()))
        }
        _ => Err(provider.lacks(method).into()),
    }
}

impl Provider {
    fn inputs(&self) -> Vec<Spec> {
        let text = |name| spec(name, Datatype::Bytes, &[-1]);
        match self.model.task {
            Task::Embedding => vec![text("text")],
            Task::Rerank => vec![text("query"), text("text")],
            Task::Generation => vec![text("text_input")],
        }
    }

    fn outputs(&self) -> Vec<Spec> {
        let width = self.model.width.and_then(|width| i64::try_from(width).ok());
        match self.model.task {
            Task::Embedding => {
                let shape = [-1, width.unwrap_or(-1)];
                vec![spec("embedding", Datatype::Fp32, &shape)]
            }
            Task::Rerank => vec![spec("score", Datatype::Fp32, &[-1, 1])],
            Task::Generation => vec![spec("text_output", Datatype::Bytes, &[-1])],
        }
    }

    fn metadata(&self) -> ModelMetadataResponse {
        let tensor = |spec: Spec| TensorMetadata {
            name: spec.name.to_owned(),
            datatype: spec.datatype.name().to_owned(),
            shape: spec.shape,
        };
        ModelMetadataResponse {
            name: self.name.clone(),
            versions: vec![VERSION.to_owned()],
            platform: "andon_provider".to_owned(),
            inputs: self.inputs().into_iter().map(tensor).collect(),
            outputs: self.outputs().into_iter().map(tensor).collect(),
        }
    }

    fn config(&self) -> ModelConfig {
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
            ("task", self.task.clone()),
            ("concurrency_max", self.model.concurrency_max.to_string()),
        ];
        ModelConfig {
            name: self.name.clone(),
            platform: "andon_provider".to_owned(),
            backend: "andon".to_owned(),
            version_policy: Some(ModelVersionPolicy {
                policy_choice: Some(PolicyChoice::Specific(Specific { versions: vec![1] })),
            }),
            max_batch_size: i32::try_from(self.model.rows_max()).unwrap_or(i32::MAX),
            input: self.inputs().into_iter().map(input).collect(),
            output: self.outputs().into_iter().map(output).collect(),
            parameters: parameters
                .map(|(name, string_value)| (name.to_owned(), ModelParameter { string_value }))
                .into(),
            model_transaction_policy: Some(ModelTransactionPolicy {
                decoupled: self.model.task == Task::Generation,
            }),
            ..Default::default()
        }
    }

    /// A call that no provider answers.
    pub(super) fn lacks(&self, method: &str) -> Error {
        let name = &self.name;
        let reason = format!("model '{name}' is an outside provider's, which has no {method}");
        Error::new(protocol::Kind::Unsupported, reason)
    }

    /// Whether a parameter of the request is none of the model's.
    fn no_parameter(&self, name: &str) -> Error {
        let reason = format!("model '{}' has no such parameter", self.name);
        Error::invalid(format!("parameters[{name}]"), reason)
    }

    /// Checks outputs, names, datatypes and shapes.
    pub(super) fn check(&self, request: &InferRequest) -> Result<(), Error> {
        let outputs = self.outputs();
        for (index, name) in request.outputs.iter().enumerate() {
            if !outputs.iter().any(|spec| spec.name == *name) {
                let known: Vec<&str> = outputs.iter().map(|spec| spec.name).collect();
                return Err(Error::invalid(
                    format!("outputs[{index}].name"),
                    format!("unknown output; the outputs are: {}", known.join(", ")),
                ));
            }
        }
        let specs = self.inputs();
        for spec in &specs {
            if !request.inputs.iter().any(|input| input.name == spec.name) {
                let reason = format!("input '{}' is missing", spec.name);
                return Err(Error::invalid("inputs", reason));
            }
        }
        let mut rows = None;
        for (index, input) in request.inputs.iter().enumerate() {
            let count = self.check_input(index, input, &specs)?;
            if *rows.get_or_insert(count) != count {
                return Err(Error::invalid(
                    format!("inputs[{index}].shape"),
                    "all inputs must have the same number of rows",
                ));
            }
        }
        Ok(())
    }

    fn check_input(&self, index: usize, input: &Input, specs: &[Spec]) -> Result<usize, Error> {
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
        let rows_max = self.model.rows_max();
        if count > rows_max {
            let reason = format!("{count} rows: a request may have {rows_max}");
            return Err(Error::invalid(at("shape"), reason));
        }
        Ok(count)
    }

    fn embedding(&self, request: &InferRequest) -> Result<Embedding, Error> {
        let mut options = Embedding::default();
        for (name, value) in &request.parameters {
            let wrong = |reason: String| Error::invalid(format!("parameters[{name}]"), reason);
            match (name.as_str(), value) {
                ("truncate", Value::Bool(on)) => options.truncate = *on,
                ("normalize", Value::Bool(on)) => options.normalize = *on,
                ("dimensions", Value::Integer(count)) => {
                    options.dimensions = Some(self.dimensions(*count).map_err(wrong)?);
                }
                ("truncate" | "normalize", _) => return Err(wrong("must be a boolean".into())),
                ("dimensions", _) => return Err(wrong("must be an integer".into())),
                _ => return Err(self.no_parameter(name)),
            }
        }
        Ok(options)
    }

    /// Checks how many leading dimensions of an embedding are kept.
    pub(super) fn dimensions(&self, count: i64) -> Result<usize, String> {
        let width = self.model.width.unwrap_or(65_536);
        usize::try_from(count)
            .ok()
            .filter(|count| (1..=width).contains(count))
            .ok_or_else(|| format!("must be from 1 to {width}"))
    }
}

async fn infer(
    provider: &Arc<Provider>,
    message: ModelInferRequest,
    mut terms: Terms<'_>,
) -> Result<(Response, Used), Status> {
    let request = InferRequest::checked(message)?;
    provider.check(&request)?;
    let patience = request.timeout.map(|timeout| Instant::now() + timeout);
    terms.deadline = patience.map_or(terms.deadline, |patience| patience.min(terms.deadline));
    let (output, used) = match provider.model.task {
        Task::Embedding => embed(provider, &request, terms).await?,
        Task::Rerank => rerank(provider, &request, terms).await?,
        Task::Generation => generate(provider, &request, terms).await?,
    };
    let name = ModelName::checked(&provider.name, "model_name")?;
    let version = ModelVersion::checked(VERSION, "model_version")?;
    let answer = to_response(&name, version, request.id, vec![output]);
    Ok((Response::own(&answer, provider.carried(used)), used))
}

impl Provider {
    /// The metadata of an answer.
    pub(super) fn carried(&self, used: Used) -> HeaderMap {
        let mut metadata = HeaderMap::new();
        metadata.insert(TOKENS_KEY, used.tokens().into());
        let digest = self.digest.as_deref().map(http::HeaderValue::try_from);
        if let Some(Ok(digest)) = digest {
            metadata.insert(DIGEST_KEY, digest);
        }
        metadata
    }
}

type Output = (String, Tensor);

/// A tensor whose shape this program chose.
fn made(name: &str, tensor: Result<Tensor, TensorError>) -> Result<Output, Error> {
    let tensor = tensor.map_err(|error| Error::new(protocol::Kind::Internal, error.to_string()))?;
    Ok((name.to_owned(), tensor))
}

async fn embed(
    provider: &Arc<Provider>,
    request: &InferRequest,
    terms: Terms<'_>,
) -> Result<(Output, Used), Error> {
    let options = provider.embedding(request)?;
    let (texts, field) = column(request, "text")?;
    let embedded =
        provider
            .embed(&texts, options, terms)
            .await
            .map_err(|trouble| match trouble {
                Trouble::Dimensions => trouble.to_error(&provider.name, "parameters[dimensions]"),
                trouble => trouble.to_error(&provider.name, &field),
            })?;
    let width = embedded.vectors.first().map_or(0, Vec::len);
    let shape = Shape::from_sizes(vec![texts.len(), width]);
    let tensor = shape.and_then(|shape| Tensor::from_f32(shape, &embedded.vectors.concat()));
    let used = Used {
        input_tokens: embedded.tokens,
        requests: 1,
        ..Used::default()
    };
    Ok((made("embedding", tensor)?, used))
}

async fn rerank(
    provider: &Arc<Provider>,
    request: &InferRequest,
    terms: Terms<'_>,
) -> Result<(Output, Used), Error> {
    for (name, value) in &request.parameters {
        match (name.as_str(), value) {
            ("truncate", Value::Bool(_)) => {}
            ("truncate", _) => {
                let field = format!("parameters[{name}]");
                return Err(Error::invalid(field, "must be a boolean"));
            }
            _ => return Err(provider.no_parameter(name)),
        }
    }
    let (queries, _) = column(request, "query")?;
    let (texts, field) = column(request, "text")?;
    let pairs: Vec<_> = queries.into_iter().zip(texts).collect();
    let (scores, used) = provider
        .rerank(&pairs, terms)
        .await
        .map_err(|trouble| trouble.to_error(&provider.name, &field))?;
    let shape = Shape::from_sizes(vec![scores.len(), 1]);
    let tensor = shape.and_then(|shape| Tensor::from_f32(shape, &scores));
    Ok((made("score", tensor)?, used))
}

async fn generate(
    provider: &Arc<Provider>,
    request: &InferRequest,
    terms: Terms<'_>,
) -> Result<(Output, Used), Error> {
    let (chat, field) = to_chat(request)?;
    let said = provider
        .generate(&chat, terms)
        .await
        .map_err(|trouble| trouble.to_error(&provider.name, &field))?;
    let shape = Shape::from_sizes(vec![1]);
    let tensor = shape.and_then(|shape| Tensor::from_elements(shape, &[said.text.as_bytes()]));
    Ok((made("text_output", tensor)?, Used::from(said.usage)))
}

impl From<ChatUsage> for Used {
    fn from(usage: ChatUsage) -> Self {
        Self {
            input_tokens: usage.prompt_tokens,
            output_tokens: usage.completion_tokens,
            searches: 0,
            requests: 1,
        }
    }
}

/// The texts of an input, and the field that holds them.
pub(super) fn column(request: &InferRequest, name: &str) -> Result<(Vec<String>, String), Error> {
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
