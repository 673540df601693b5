//! `inference.GRPCInferenceService`.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use platform::grpc::{
    BytesHeld, Call, Message, Metadata, Reply, bidirectional, decode, frame, frame_bytes, reply,
};
use prost::Message as _;
use protocol::inference::{
    LogSettingsRequest, LogSettingsResponse, ModelConfig, ModelConfigRequest, ModelConfigResponse,
    ModelDynamicBatching, ModelInferRequest, ModelInferResponse, ModelInstanceGroup,
    ModelMetadataRequest, ModelMetadataResponse, ModelReadyRequest, ModelReadyResponse,
    ModelStatisticsRequest, ModelStatisticsResponse, ModelTransactionPolicy,
    RepositoryIndexRequest, RepositoryIndexResponse, ServerLiveRequest, ServerLiveResponse,
    ServerMetadataRequest, ServerMetadataResponse, ServerReadyRequest, ServerReadyResponse,
    TraceSettingRequest, TraceSettingResponse, model_config::SchedulingChoice,
    model_instance_group::Kind as DeviceKind, repository_index_response::ModelIndex,
};
use protocol::{
    DIGEST_KEY, Error, InferRequest, Kind, LogSettings, Method, ModelName, ModelVersion,
    TEI_ACTIVATION, TOKENS_KEY, Task, TraceSettings, to_response, with_final_response_flag,
};
use tonic::{Code, Status};

use super::{CallRecord, INLINE_MESSAGE_BYTES_MAX, Service, lane_of, statistics};
use crate::infer::{Checked, check, infer};
use crate::model::{ServedModel, Urgency};
use crate::queue::Lane;
use crate::repository::{Repository, State};
use crate::work::{Size, Work};

impl Service {
    pub(super) async fn model_infer(&self, call: Call) -> Result<Reply, Status> {
        let deadline = call.deadline.into_std();
        let lane = lane_of(&call);
        let message = self.messages(call, &lane).only().await?;
        let (response, metadata) = self.infer(message, deadline, lane).await?;
        Ok(reply(frame(&response), metadata))
    }

    /// Responds to each request of a stream in order; an error is a response,
    /// and the stream stays open.
    pub(super) fn model_stream_infer(&self, call: Call) -> Result<Reply, Status> {
        let settings = self.stream_settings(&call)?;
        let deadline = call.stream_deadline.map(tokio::time::Instant::into_std);
        let own = self.clone();
        let timeout = call.deadline - call.arrived;
        let lane = lane_of(&call);
        let messages = self.messages(call, &lane);
        Ok(bidirectional(messages, settings, move |message| {
            let (own, lane) = (own.clone(), lane.clone());
            let deadline = deadline.unwrap_or_else(|| Instant::now() + timeout);
            async move { Ok(own.stream_response(message, deadline, lane).await) }
        }))
    }

    async fn stream_response(&self, message: Message, deadline: Instant, lane: Lane) -> Bytes {
        let id = protocol::peek(&message.bytes())
            .map(|peeked| peeked.id.to_owned())
            .unwrap_or_default();
        match self.infer(message, deadline, lane).await {
            Ok((response, _)) => frame_bytes(&with_final_response_flag(&response.encode_to_vec())),
            Err(status) => frame(&protocol::stream_failure(id, status.message())),
        }
    }

    async fn infer(
        &self,
        message: Message,
        deadline: Instant,
        lane: Lane,
    ) -> Result<(ModelInferResponse, Metadata), Status> {
        let started = Instant::now();
        let work = self.work(&lane);
        let (repository, bytes) = (self.0.repository.clone(), message.bytes());
        let size = bytes.len();
        let memory = work.clone();
        let read = move || read_request(&repository, bytes, &memory);
        let (model, mut checked, _decoded) = if size <= INLINE_MESSAGE_BYTES_MAX {
            read()?
        } else {
            let size = Size {
                items: 1,
                bytes: size,
            };
            work.run(size, move |_| read()).await??
        };
        let id = checked.take_id();
        let urgency = Urgency {
            lane,
            priority: 0,
            deadline,
        };
        let mut record = CallRecord::new(&model, Method::ModelInfer, started);
        let (outputs, tokens) = infer(&model, checked, urgency, &work, started)
            .await
            .map_err(|error| Error::from(error).to_status())
            .inspect_err(|status| record.code = status.code())?;
        record.code = Code::Ok;
        let mut metadata = Metadata::new();
        metadata.insert(TOKENS_KEY, tokens.into());
        if let Some(digest) = model.digest_value() {
            metadata.insert(DIGEST_KEY, digest);
        }
        let response = to_response(&model.name, model.version, id, outputs);
        Ok((response, metadata))
    }

    pub(super) fn server_live(&self, _: &ServerLiveRequest) -> Result<ServerLiveResponse, Error> {
        Ok(ServerLiveResponse { live: true })
    }

    pub(super) fn server_ready(
        &self,
        _: &ServerReadyRequest,
    ) -> Result<ServerReadyResponse, Error> {
        // As health says it: probes of all kinds must agree.
        let ready = self.0.common.ready();
        Ok(ServerReadyResponse { ready })
    }

    pub(super) fn server_metadata(
        &self,
        _: &ServerMetadataRequest,
    ) -> Result<ServerMetadataResponse, Error> {
        Ok(protocol::server_metadata(platform::VERSION))
    }

    pub(super) fn model_ready(
        &self,
        request: &ModelReadyRequest,
    ) -> Result<ModelReadyResponse, Error> {
        match self.model(&request.name, &request.version) {
            Ok(_) => Ok(ModelReadyResponse { ready: true }),
            Err(error) if error.kind() == Kind::Invalid => Err(error),
            Err(_) => Ok(ModelReadyResponse { ready: false }),
        }
    }

    pub(super) fn model_metadata(
        &self,
        request: &ModelMetadataRequest,
    ) -> Result<ModelMetadataResponse, Error> {
        let model = self.model(&request.name, &request.version)?;
        let ready = self.0.repository.ready();
        let versions = ready.iter().filter(|other| other.name == model.name);
        let versions = versions.map(|other| other.version.to_string()).collect();
        let signature = model.signature();
        Ok(signature.to_metadata(model.name.as_str(), versions, platform_name(&model)))
    }

    pub(super) fn model_config(
        &self,
        request: &ModelConfigRequest,
    ) -> Result<ModelConfigResponse, Error> {
        let model = self.model(&request.name, &request.version)?;
        Ok(ModelConfigResponse {
            config: Some(config(&model)),
        })
    }

    fn model(&self, name: &str, version: &str) -> Result<Arc<ServedModel>, Error> {
        let name = ModelName::checked(name, "name")?;
        let version = ModelVersion::optional(version, "version")?;
        self.0.repository.find(&name, version)
    }

    pub(super) fn model_statistics(
        &self,
        request: &ModelStatisticsRequest,
    ) -> Result<ModelStatisticsResponse, Error> {
        let mut models = self.0.repository.ready();
        if !request.name.is_empty() {
            let newest = self.model(&request.name, &request.version)?;
            let every_version = request.version.is_empty();
            models.retain(|model| {
                model.name == newest.name && (every_version || model.version == newest.version)
            });
        }
        Ok(ModelStatisticsResponse {
            model_stats: models.iter().map(|m| statistics::to_message(m)).collect(),
        })
    }

    /// Reads the folders of the repository, on a thread for work.
    pub(super) async fn repository_index(
        &self,
        request: RepositoryIndexRequest,
        lane: &Lane,
    ) -> Result<RepositoryIndexResponse, Error> {
        protocol::check_repository_name(&request.repository_name)?;
        let repository = self.0.repository.clone();
        let size = Size { items: 1, bytes: 0 };
        let work = self.work(lane);
        let index = work.run(size, move |_| repository.index()).await??;
        let models = index
            .into_iter()
            .filter(|(_, _, state)| !request.ready || matches!(state, State::Ready(_)))
            .map(|(name, version, state)| ModelIndex {
                name: name.to_string(),
                version: version.to_string(),
                state: state.name().to_owned(),
                reason: state.reason().to_owned(),
            })
            .collect();
        Ok(RepositoryIndexResponse { models })
    }

    pub(super) fn trace_setting(
        &self,
        request: &TraceSettingRequest,
    ) -> Result<TraceSettingResponse, Error> {
        let telemetry = &self.0.process.telemetry;
        let mut levels = telemetry.trace_levels();
        let settings = TraceSettings {
            exports: levels.exports,
            on: &mut levels.on,
            rate: &mut levels.rate,
        };
        let response = settings.apply(request)?;
        telemetry.set_trace_levels(levels.on, levels.rate);
        Ok(response)
    }

    pub(super) fn log_settings(
        &self,
        request: &LogSettingsRequest,
    ) -> Result<LogSettingsResponse, Error> {
        let telemetry = &self.0.process.telemetry;
        let mut levels = telemetry.log_levels();
        let settings = LogSettings {
            error: &mut levels.error,
            warning: &mut levels.warn,
            info: &mut levels.info,
            verbose_level: &mut levels.verbose,
        };
        let response = settings.apply(request)?;
        telemetry.set_log_levels(levels);
        Ok(response)
    }
}

/// Decodes a request and checks it against its model: how much there is of it,
/// and whether there is memory for what it becomes, first.
fn read_request(
    repository: &Repository,
    message: Bytes,
    work: &Work,
) -> Result<(Arc<ServedModel>, Checked, Option<BytesHeld>), Status> {
    let started = Instant::now();
    let outline = Method::ModelInfer.outline(&message)?;
    let held = work.hold_decoded(message.len(), outline)?;
    let message: ModelInferRequest = decode(message)?;
    let name = ModelName::checked(&message.model_name, "model_name")?;
    let version = ModelVersion::optional(&message.model_version, "model_version")?;
    let model = repository.find(&name, version)?;
    let checked = model
        .signature()
        .check_counts(&message)
        .and_then(|()| InferRequest::checked(message))
        .and_then(|request| check(&model, request));
    match checked {
        Ok(checked) => Ok((model, checked, held)),
        Err(error) => {
            let mut record = CallRecord::new(&model, Method::ModelInfer, started);
            record.code = error.kind().code();
            Err(error.into())
        }
    }
}

/// The platform in a model's metadata and configuration.
fn platform_name(model: &ServedModel) -> String {
    format!("andon_{}", model.card.family)
}

fn config(model: &ServedModel) -> ModelConfig {
    let (card, queue) = (&model.card, &model.limits.queue);
    let mut parameters = vec![
        ("task", model.task().to_string()),
        ("dtype", card.dtype.to_string()),
        ("device", card.device.clone()),
        ("kernels", card.kernels.to_owned()),
        ("tokens_max", card.tokens_max.to_string()),
        ("batch_tokens_max", queue.batch_tokens_max.to_string()),
        ("queue_rows_max", queue.rows_max.to_string()),
    ];
    match model.task() {
        Task::Embedding => parameters.push(("normalize", card.normalize.to_string())),
        Task::Tabular => {}
        _ => parameters.push(("activation", card.activation.to_string())),
    }
    if card.tei_activation != card.activation {
        parameters.push((TEI_ACTIVATION, card.tei_activation.to_string()));
    }
    if model.task() != Task::Tabular {
        let side = card.truncation_side.as_str().to_owned();
        parameters.push(("truncation_side", side));
    }
    // In the order of the scores, as a list of JSON: a label may hold anything.
    if let Ok(labels) = serde_json::to_string(&card.labels)
        && !card.labels.is_empty()
    {
        parameters.push(("labels", labels));
    }
    let prompts: Vec<&str> = model.prompts.names().collect();
    if let Ok(names) = serde_json::to_string(&prompts)
        && !prompts.is_empty()
    {
        parameters.push(("prompts", names));
    }
    if let Some(name) = model.prompts.default_name() {
        parameters.push(("default_prompt_name", name.to_owned()));
    }
    let gpu = card
        .device
        .strip_prefix("cuda:")
        .and_then(|n| n.parse().ok());
    let (name, version) = (model.name.as_str(), model.version.number());
    let delay = u64::try_from(queue.delay.as_micros()).unwrap_or(u64::MAX);
    ModelConfig {
        instance_group: vec![ModelInstanceGroup {
            name: name.to_owned(),
            count: 1,
            gpus: gpu.into_iter().collect(),
            kind: gpu.map_or(DeviceKind::Cpu, |_| DeviceKind::Gpu).into(),
        }],
        model_transaction_policy: Some(ModelTransactionPolicy { decoupled: false }),
        scheduling_choice: Some(SchedulingChoice::DynamicBatching(ModelDynamicBatching {
            preferred_batch_size: Vec::new(),
            max_queue_delay_microseconds: delay,
        })),
        ..model
            .signature()
            .to_config(name, version, platform_name(model), parameters)
    }
}
