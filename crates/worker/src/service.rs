//! The calls of a worker: decode, call, convert.

mod inference;
mod statistics;
mod text;

use std::sync::Arc;
use std::time::Instant;

use platform::grpc::{
    BytesHeld, Call, Message, MessageLimits, Messages, Reply, StreamSettings, decode, reject,
    stream, unary,
};
use platform::pot::Holder;
use platform::server::Handler;
use platform::streams::OpenStream;
use platform::telemetry::TraceParent;
use platform::{CommonServices, Process, common_path};
use protocol::inference::{RepositoryModelLoadResponse, RepositoryModelUnloadResponse};
use protocol::{Error, LANE_CROSS_KEY, LANE_DEFERRED_KEY, LANE_KEY, Method};
use tonic::{Code, Status};

use crate::model::ServedModel;
use crate::queue::Lane;
use crate::report;
use crate::repository::Repository;
use crate::work::{Size, Work};
use text::Target;

/// Messages of one stream that may be in flight at once.
const STREAM_CONCURRENCY: usize = 32;
/// Longer messages are decoded and checked on the threads for work.
const INLINE_MESSAGE_BYTES_MAX: usize = 64 << 10;
/// The most bytes of a message that carries no inputs.
const CONTROL_BYTES_MAX: usize = 64 << 10;

/// A decoded message, and what it takes.
type Decoded<Q> = (Q, Option<BytesHeld>);

/// A worker's services. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Service(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    repository: Arc<Repository>,
    common: CommonServices,
    limits: MessageLimits,
    process: Process,
}

impl Service {
    /// Services over a repository.
    pub fn new(
        repository: Arc<Repository>,
        common: CommonServices,
        limits: &MessageLimits,
        process: Process,
    ) -> Self {
        Self(Arc::new(Inner {
            repository,
            common,
            limits: limits.clone(),
            process,
        }))
    }

    /// Health, reflection and unknown paths are the common services'.
    async fn respond(&self, call: Call) -> Result<Reply, Status> {
        let Some(method) = Method::from_path(call.path()) else {
            return Ok(self.0.common.serve(call).await);
        };
        match method {
            Method::ModelInfer => self.model_infer(call).await,
            Method::ModelStreamInfer => self.model_stream_infer(call),
            Method::ServerLive => self.unary(call, Self::server_live).await,
            Method::ServerReady => self.unary(call, Self::server_ready).await,
            Method::ServerMetadata => self.unary(call, Self::server_metadata).await,
            Method::ModelReady => self.unary(call, Self::model_ready).await,
            Method::ModelMetadata => self.unary(call, Self::model_metadata).await,
            Method::ModelConfig => self.unary(call, Self::model_config).await,
            Method::ModelStatistics => self.unary(call, Self::model_statistics).await,
            Method::RepositoryIndex => self.index(call).await,
            Method::RepositoryModelLoad => self.load(call).await,
            Method::RepositoryModelUnload => self.unload(call).await,
            Method::TraceSetting => self.unary(call, Self::trace_setting).await,
            Method::LogSettings => self.unary(call, Self::log_settings).await,
            Method::SystemSharedMemoryStatus
            | Method::SystemSharedMemoryRegister
            | Method::SystemSharedMemoryUnregister
            | Method::CudaSharedMemoryStatus
            | Method::CudaSharedMemoryRegister
            | Method::CudaSharedMemoryUnregister => {
                Err(Status::unimplemented(protocol::SHARED_MEMORY_UNSUPPORTED))
            }
            Method::TeiInfo => self.text(call, Self::info).await,
            Method::Embed => self.text(call, Self::embed).await,
            Method::EmbedStream => self.text_stream(call, Self::embed),
            Method::EmbedAll => self.text(call, Self::embed_all).await,
            Method::EmbedAllStream => self.text_stream(call, Self::embed_all),
            Method::EmbedSparse | Method::EmbedSparseStream => {
                Err(Status::unimplemented(protocol::SPARSE_UNSUPPORTED))
            }
            Method::Predict => self.text(call, Self::predict).await,
            Method::PredictStream => self.text_stream(call, Self::predict),
            Method::PredictPair => self.text(call, Self::predict_pair).await,
            Method::PredictPairStream => self.text_stream(call, Self::predict_pair),
            Method::Rerank => self.text(call, Self::rerank).await,
            Method::RerankStream => self.rerank_stream(call).await,
            Method::Tokenize => self.text(call, Self::tokenize).await,
            Method::TokenizeStream => self.text_stream(call, Self::tokenize),
            Method::Decode => self.text(call, Self::decode_ids).await,
            Method::DecodeStream => self.text_stream(call, Self::decode_ids),
            Method::WatchReport => self.watch_report(call).await,
        }
    }

    /// Responds to a call of one message with one message, at once.
    async fn unary<Q, A>(
        &self,
        call: Call,
        respond: impl FnOnce(&Self, &Q) -> Result<A, Error>,
    ) -> Result<Reply, Status>
    where
        Q: prost::Message + Default,
        A: prost::Message,
    {
        unary(call, &self.control_limits(), |request| async move {
            respond(self, &request).map_err(Status::from)
        })
        .await
    }

    /// The limits of messages that ask about the worker and its models: they
    /// are short, and read where they arrive.
    fn control_limits(&self) -> MessageLimits {
        let mut limits = self.0.limits.clone();
        limits.message_bytes_max = limits.message_bytes_max.min(CONTROL_BYTES_MAX);
        limits
    }

    async fn index(&self, call: Call) -> Result<Reply, Status> {
        let lane = lane_of(&call);
        unary(call, &self.control_limits(), |request| async move {
            let index = self.repository_index(request, &lane).await;
            index.map_err(Status::from)
        })
        .await
    }

    async fn load(&self, call: Call) -> Result<Reply, Status> {
        unary(call, &self.control_limits(), |request| async move {
            let name = protocol::load_target(&request)?;
            self.0.repository.load(&name).await?;
            Ok(RepositoryModelLoadResponse {})
        })
        .await
    }

    async fn unload(&self, call: Call) -> Result<Reply, Status> {
        unary(call, &self.control_limits(), |request| async move {
            let name = protocol::unload_target(&request)?;
            self.0.repository.unload(&name).await?;
            Ok(RepositoryModelUnloadResponse {})
        })
        .await
    }

    /// The request has no fields: its content does not matter.
    async fn watch_report(&self, call: Call) -> Result<Reply, Status> {
        let open = self.open_stream(&call)?;
        call.into_messages(&self.control_limits()).only().await?;
        let (repository, drain) = (self.0.repository.clone(), self.0.process.drain.clone());
        Ok(stream(open.hold(report::watch(repository, drain))))
    }

    fn stream_settings(&self, call: &Call) -> Result<StreamSettings, Status> {
        Ok(StreamSettings {
            concurrency: STREAM_CONCURRENCY,
            deadline: call.stream_deadline,
            drain: self.0.process.drain.clone(),
            open: self.open_stream(call)?,
        })
    }

    /// The threads and the memory for the work of a lane.
    fn work(&self, lane: &Lane) -> Work {
        let limits = self.0.limits.held_by(lane.holder.clone());
        Work::new(&self.0.process.pool, limits, lane.holder.clone())
    }

    /// Decodes a message, a long one on a thread for work: what it has is counted
    /// first. What it becomes counts as in flight as long as what is returned
    /// with it.
    async fn decode<Q>(&self, message: &Message, target: &Target) -> Result<Decoded<Q>, Status>
    where
        Q: prost::Message + Default + 'static,
    {
        let (bytes, method) = (message.bytes(), target.method);
        let size = Size {
            items: 1,
            bytes: bytes.len(),
        };
        let work = self.work(&target.lane);
        let memory = work.clone();
        let read = move || -> Result<Decoded<Q>, Status> {
            let held = match method {
                Some(method) => memory.hold_decoded(size.bytes, method.outline(&bytes)?)?,
                None => None,
            };
            Ok((decode(bytes)?, held))
        };
        if size.bytes <= INLINE_MESSAGE_BYTES_MAX {
            return read();
        }
        work.run(size, move |_| read()).await?
    }

    /// The messages of a call. Their bytes are held for its lane.
    fn messages(&self, call: Call, lane: &Lane) -> Messages {
        let mut limits = self.0.limits.held_by(lane.holder.clone());
        if let Some(Method::Decode | Method::DecodeStream) = Method::from_path(call.path()) {
            // No more ids than a text has bytes are decoded. In a message an id
            // has from one byte to five.
            let bytes = self.0.repository.text_bytes_max().saturating_mul(5);
            let bytes = bytes.saturating_add(CONTROL_BYTES_MAX);
            limits.message_bytes_max = limits.message_bytes_max.min(bytes);
        }
        call.into_messages(&limits)
    }

    /// A place for a stream. A worker asks nobody who it is.
    fn open_stream(&self, call: &Call) -> Result<OpenStream, Status> {
        let streams = &self.0.process.streams;
        streams.open(&call.peer, &call.peer.holder())
    }
}

/// The lane of a call: the gateway's word, since it knows the tenants; of a
/// direct caller the peer's own. Who may open a worker's port is trusted with it.
fn lane_of(call: &Call) -> Lane {
    let is_true = |key| call.metadata_text(key) == Some("true");
    let number = call.metadata_text(LANE_KEY).and_then(|it| it.parse().ok());
    Lane {
        holder: number.map_or_else(|| call.peer.holder(), Holder::Lane),
        crosses: is_true(LANE_CROSS_KEY),
        deferred: is_true(LANE_DEFERRED_KEY),
    }
}

impl Handler for Service {
    async fn handle(&self, call: Call) -> Reply {
        let deadline = call.deadline;
        let method = Method::from_path(call.path());
        let path = method.map_or_else(|| common_path(call.path()), Method::path);
        let telemetry = &self.0.process.telemetry;
        let span = telemetry.request_span(path, call.metadata(), TraceParent::Gateway);
        let response = tracing::Instrument::instrument(self.respond(call), span);
        match tokio::time::timeout_at(deadline, response).await {
            Ok(Ok(reply)) => reply,
            Ok(Err(status)) => reject(&status),
            Err(_) => reject(&Error::deadline_passed().to_status()),
        }
    }
}

/// Counts a call when it ends, however it ends: a caller who leaves drops it.
struct CallRecord<'m> {
    model: &'m ServedModel,
    method: Method,
    started: Instant,
    code: Code,
}

impl<'m> CallRecord<'m> {
    fn new(model: &'m ServedModel, method: Method, started: Instant) -> Self {
        Self {
            model,
            method,
            started,
            code: Code::Cancelled,
        }
    }
}

impl Drop for CallRecord<'_> {
    fn drop(&mut self) {
        let took = self.started.elapsed();
        self.model.metrics.called(self.method, self.code, took);
    }
}
