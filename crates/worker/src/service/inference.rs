//! `inference.GRPCInferenceService`.

use std::collections::HashMap;
use std::time::Instant;

use bytes::Bytes;
use platform::grpc::{
    Call, Message, Metadata, Reply, bidirectional, decode, frame, frame_bytes, reply,
};
use platform::telemetry::LogLevels;
use prost::Message as _;
use protocol::inference::{
    ModelConfig, ModelConfigRequest, ModelConfigResponse, ModelInferRequest, ModelInferResponse,
    ModelMetadataRequest, ModelMetadataResponse, ModelParameter, ModelReadyRequest,
    ModelReadyResponse, ModelStatisticsRequest, ModelStatisticsResponse, ModelStreamInferResponse,
    RepositoryIndexRequest, RepositoryIndexResponse, RepositoryModelLoadResponse,
    RepositoryModelUnloadResponse, ServerLiveRequest, ServerLiveResponse, ServerMetadataRequest,
    ServerMetadataResponse, ServerReadyRequest, ServerReadyResponse,
    model_metadata_response::TensorMetadata, repository_index_response::ModelIndex,
};
use protocol::{
    DIGEST_KEY, Error, InferRequest, Kind, LogSettings, ModelName, ModelVersion, TOKENS_KEY,
    TraceSettings, to_response, with_final_response_flag,
};
use tonic::{Code, Status};

use super::{Service, one, unary};
use crate::infer::infer;
use crate::model::ServedModel;
use crate::repository::State;

impl Service {
    pub(super) async fn inference(&self, method: &str, call: Call) -> Result<Reply, Status> {
        match method {
            "ModelInfer" => self.model_infer(call).await,
            "ModelStreamInfer" => Ok(self.model_stream_infer(call)),
            "ServerLive" => one!(self, call, |_: ServerLiveRequest| Ok(ServerLiveResponse {
                live: true
            })),
            "ServerReady" => one!(self, call, |_: ServerReadyRequest| Ok(
                ServerReadyResponse {
                    ready: self.ready()
                }
            )),
            "ModelReady" => one!(self, call, |asked: ModelReadyRequest| {
                let ready = match self.model(&asked.name, &asked.version) {
                    Ok(_) => true,
                    Err(error) if error.kind() == Kind::Invalid => return Err(error),
                    Err(_) => false,
                };
                Ok(ModelReadyResponse { ready })
            }),
            "ServerMetadata" => one!(self, call, |_: ServerMetadataRequest| Ok(server_metadata())),
            "ModelMetadata" => one!(self, call, |asked: ModelMetadataRequest| {
                let model = self.model(&asked.name, &asked.version)?;
                Ok(self.metadata(&model))
            }),
            "ModelConfig" => one!(self, call, |asked: ModelConfigRequest| {
                let model = self.model(&asked.name, &asked.version)?;
                Ok(ModelConfigResponse {
                    config: Some(config(&model)),
                })
            }),
            "ModelStatistics" => one!(self, call, |asked| self.statistics(&asked)),
            "RepositoryIndex" => one!(self, call, |asked| self.repository_index(&asked)),
            "RepositoryModelLoad" => {
                unary(call, &self.0.limits, |asked| async move {
                    let name = protocol::load_target(&asked)?;
                    self.0.repository.load(&name).await?;
                    Ok(RepositoryModelLoadResponse {})
                })
                .await
            }
            "RepositoryModelUnload" => {
                unary(call, &self.0.limits, |asked| async move {
                    let name = protocol::unload_target(&asked)?;
                    self.0.repository.unload(&name).await?;
                    Ok(RepositoryModelUnloadResponse {})
                })
                .await
            }
            "TraceSetting" => one!(self, call, |asked| {
                let telemetry = &self.0.process.telemetry;
                let now = telemetry.trace_levels();
                let settings = TraceSettings {
                    exports: now.exports,
                    on: now.on,
                    rate: now.rate,
                };
                let settings = settings.changed_by(&asked)?;
                telemetry.set_trace_levels(settings.on, settings.rate);
                Ok(settings.to_response())
            }),
            "LogSettings" => one!(self, call, |asked| self.log_settings(&asked)),
            method if method.contains("SharedMemory") => {
                Err(Status::unimplemented(protocol::SHARED_MEMORY_UNSUPPORTED))
            }
            _ => Err(Status::unimplemented(format!("unknown method {method}"))),
        }
    }

    async fn model_infer(&self, call: Call) -> Result<Reply, Status> {
        let deadline = call.deadline.into_std();
        let message = call.into_messages(&self.0.limits).only().await?;
        let (answered, metadata) = self.infer(message, deadline).await?;
        Ok(reply(frame(&answered), metadata))
    }

    /// Answers each request of a stream in order; an error is an answer, and
    /// the stream stays open.
    fn model_stream_infer(&self, call: Call) -> Reply {
        let settings = self.stream_settings(&call);
        let deadline = call.stream_deadline.map(tokio::time::Instant::into_std);
        let own = self.clone();
        let patience = call.deadline - call.arrived;
        let messages = call.into_messages(&self.0.limits);
        bidirectional(messages, settings, move |message| {
            let own = own.clone();
            let deadline = deadline.unwrap_or_else(|| Instant::now() + patience);
            async move { Ok(own.stream_answer(message, deadline).await) }
        })
    }

    async fn stream_answer(&self, message: Message, deadline: Instant) -> Bytes {
        let id = protocol::peek(&message.bytes())
            .map(|peeked| peeked.id.to_owned())
            .unwrap_or_default();
        match self.infer(message, deadline).await {
            Ok((answer, _)) => frame_bytes(&with_final_response_flag(&answer.encode_to_vec())),
            Err(status) => frame(&ModelStreamInferResponse {
                error_message: status.message().to_owned(),
                infer_response: Some(ModelInferResponse {
                    id,
                    ..Default::default()
                }),
            }),
        }
    }

    async fn infer(
        &self,
        message: Message,
        deadline: Instant,
    ) -> Result<(ModelInferResponse, Metadata), Status> {
        let started = Instant::now();
        let request: ModelInferRequest = decode(message.bytes())?;
        let mut request = InferRequest::checked(request)?;
        let model = self.0.repository.find(&request.model, request.version)?;
        let id = std::mem::take(&mut request.id);
        let mut counted = Counted::new(&model, "ModelInfer", started);
        let (outputs, tokens) = infer(&model, request, deadline)
            .await
            .map_err(|error| Error::from(error).to_status())
            .inspect_err(|status| counted.code = status.code())?;
        counted.code = Code::Ok;
        let mut metadata = Metadata::new();
        metadata.insert(TOKENS_KEY, tokens.into());
        if let Some(digest) = model.digest_value() {
            metadata.insert(DIGEST_KEY, digest);
        }
        let answer = to_response(&model.name, model.version, id, outputs);
        Ok((answer, metadata))
    }

    fn ready(&self) -> bool {
        !self.0.process.drain.draining() && !self.0.repository.ready().is_empty()
    }

    fn model(&self, name: &str, version: &str) -> Result<std::sync::Arc<ServedModel>, Error> {
        let name = ModelName::checked(name, "name")?;
        let version = ModelVersion::optional(version, "version")?;
        self.0.repository.find(&name, version)
    }

    fn metadata(&self, model: &ServedModel) -> ModelMetadataResponse {
        let tensor = |spec: &engine::TensorSpec| TensorMetadata {
            name: spec.name.clone(),
            datatype: spec.datatype.name().to_owned(),
            shape: spec.shape.clone(),
        };
        let ready = self.0.repository.ready();
        let versions = ready.iter().filter(|other| other.name == model.name);
        ModelMetadataResponse {
            name: model.name.to_string(),
            versions: versions.map(|other| other.version.to_string()).collect(),
            platform: format!("andon_{}", model.card.family),
            inputs: model.card.inputs.iter().map(tensor).collect(),
            outputs: model.card.outputs.iter().map(tensor).collect(),
        }
    }

    fn statistics(&self, asked: &ModelStatisticsRequest) -> Result<ModelStatisticsResponse, Error> {
        if asked.name.is_empty() {
            let models = self.0.repository.ready();
            return Ok(ModelStatisticsResponse {
                model_stats: models.iter().map(|m| m.metrics.statistics()).collect(),
            });
        }
        let newest = self.model(&asked.name, &asked.version)?;
        let models = self.0.repository.ready();
        let wanted = models.iter().filter(|model| {
            model.name == newest.name
                && (asked.version.is_empty() || model.version == newest.version)
        });
        Ok(ModelStatisticsResponse {
            model_stats: wanted.map(|model| model.metrics.statistics()).collect(),
        })
    }

    fn repository_index(
        &self,
        asked: &RepositoryIndexRequest,
    ) -> Result<RepositoryIndexResponse, Error> {
        if !asked.repository_name.is_empty() {
            return Err(Error::invalid(
                "repository_name",
                "a server has one repository: leave it empty",
            ));
        }
        let models = self
            .0
            .repository
            .index()?
            .into_iter()
            .filter(|(_, _, state)| !asked.ready || matches!(state, State::Ready(_)))
            .map(|(name, version, state)| ModelIndex {
                name: name.to_string(),
                version: version.to_string(),
                state: state.name().to_owned(),
                reason: state.reason().to_owned(),
            })
            .collect();
        Ok(RepositoryIndexResponse { models })
    }

    fn log_settings(
        &self,
        asked: &protocol::inference::LogSettingsRequest,
    ) -> Result<protocol::inference::LogSettingsResponse, Error> {
        let telemetry = &self.0.process.telemetry;
        let now = telemetry.log_levels();
        let settings = LogSettings {
            error: now.error,
            warning: now.warn,
            info: now.info,
            verbose_level: now.verbose,
        };
        let settings = settings.changed_by(asked)?;
        telemetry.set_log_levels(LogLevels {
            error: settings.error,
            warn: settings.warning,
            info: settings.info,
            verbose: settings.verbose_level,
        });
        Ok(settings.to_response())
    }
}

/// Counts a call when it ends, however it ends: a caller who leaves drops it.
pub(super) struct Counted<'m> {
    model: &'m ServedModel,
    method: &'static str,
    started: Instant,
    pub(super) code: Code,
}

impl<'m> Counted<'m> {
    pub(super) fn new(model: &'m ServedModel, method: &'static str, started: Instant) -> Self {
        Self {
            model,
            method,
            started,
            code: Code::Cancelled,
        }
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        let took = self.started.elapsed();
        self.model.metrics.called(self.method, self.code, took);
    }
}

fn server_metadata() -> ServerMetadataResponse {
    ServerMetadataResponse {
        name: "andon".to_owned(),
        version: platform::VERSION.to_owned(),
        extensions: protocol::EXTENSIONS.map(str::to_owned).to_vec(),
    }
}

fn config(model: &ServedModel) -> ModelConfig {
    use protocol::inference::{
        ModelDynamicBatching, ModelInput, ModelInstanceGroup, ModelOutput, ModelTransactionPolicy,
        ModelVersionPolicy,
        model_config::SchedulingChoice,
        model_instance_group::Kind as DeviceKind,
        model_version_policy::{PolicyChoice, Specific},
    };
    let (card, limits) = (&model.card, &model.limits);
    let data_type = |spec: &engine::TensorSpec| protocol::data_type(spec.datatype).into();
    // Triton's dims leave out the batch dimension.
    let dims = |spec: &engine::TensorSpec| match spec.shape.get(1..) {
        Some([]) | None => vec![1],
        Some(dims) => dims.to_vec(),
    };
    let gpu = card
        .device
        .strip_prefix("cuda:")
        .and_then(|n| n.parse().ok());
    ModelConfig {
        name: model.name.to_string(),
        platform: format!("andon_{}", card.family),
        backend: "andon".to_owned(),
        version_policy: Some(ModelVersionPolicy {
            policy_choice: Some(PolicyChoice::Specific(Specific {
                versions: vec![i64::try_from(model.version.number()).unwrap_or(i64::MAX)],
            })),
        }),
        max_batch_size: i32::try_from(limits.request_rows_max).unwrap_or(i32::MAX),
        input: card
            .inputs
            .iter()
            .map(|spec| ModelInput {
                name: spec.name.clone(),
                data_type: data_type(spec),
                dims: dims(spec),
                optional: false,
            })
            .collect(),
        output: card
            .outputs
            .iter()
            .map(|spec| ModelOutput {
                name: spec.name.clone(),
                data_type: data_type(spec),
                dims: dims(spec),
            })
            .collect(),
        instance_group: vec![ModelInstanceGroup {
            name: model.name.to_string(),
            count: 1,
            gpus: gpu.into_iter().collect(),
            kind: gpu.map_or(DeviceKind::Cpu, |_| DeviceKind::Gpu).into(),
        }],
        parameters: config_parameters(model),
        model_transaction_policy: Some(ModelTransactionPolicy { decoupled: false }),
        scheduling_choice: Some(SchedulingChoice::DynamicBatching(ModelDynamicBatching {
            preferred_batch_size: Vec::new(),
            max_queue_delay_microseconds: u64::try_from(limits.queue.delay.as_micros())
                .unwrap_or(u64::MAX),
        })),
    }
}

/// What is worth knowing of a model and has no place of its own in Triton's
/// configuration.
fn config_parameters(model: &ServedModel) -> HashMap<String, ModelParameter> {
    let (card, queue) = (&model.card, &model.limits.queue);
    let mut parameters: HashMap<String, ModelParameter> = [
        ("task", card.task.to_string()),
        ("dtype", card.dtype.to_string()),
        ("device", card.device.clone()),
        ("kernels", card.kernels.to_owned()),
        ("tokens_max", card.tokens_max.to_string()),
        ("batch_tokens_max", queue.batch_tokens_max.to_string()),
        ("queue_rows_max", queue.rows_max.to_string()),
    ]
    .map(|(name, string_value)| (name.to_owned(), ModelParameter { string_value }))
    .into();
    // In the order of the scores, as a list of JSON: a label may hold anything.
    if let Ok(string_value) = serde_json::to_string(&card.labels)
        && !card.labels.is_empty()
    {
        parameters.insert("labels".to_owned(), ModelParameter { string_value });
    }
    parameters
}
