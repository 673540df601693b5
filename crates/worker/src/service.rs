//! The calls of a worker: decode, call, convert.

mod inference;
mod text;

use std::sync::Arc;

use platform::grpc::{Call, MessageLimits, Reply, StreamSettings, reject, stream, unary};
use platform::server::{Handler, ServerSettings};
use platform::{CommonServices, Process};
use protocol::Error;
use tonic::Status;

use crate::report;
use crate::repository::Repository;

/// Calls of one stream that may be under way at once.
const STREAM_CONCURRENCY: usize = 32;

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
        settings: &ServerSettings,
        process: Process,
    ) -> Self {
        Self(Arc::new(Inner {
            repository,
            common,
            limits: settings.message_limits(),
            process,
        }))
    }

    async fn answer(&self, call: Call) -> Result<Reply, Status> {
        let Some((service, method)) = call
            .path()
            .strip_prefix('/')
            .and_then(|path| path.split_once('/'))
        else {
            return Err(Status::unimplemented("a path is /package.Service/Method"));
        };
        match service {
            "inference.GRPCInferenceService" => {
                let method = method.to_owned();
                self.inference(&method, call).await
            }
            "tei.v1.Info" | "tei.v1.Embed" | "tei.v1.Predict" | "tei.v1.Rerank"
            | "tei.v1.Tokenize" => {
                let method = format!("{service}/{method}");
                self.text(&method, call).await
            }
            "andon.v1.ReportService" if method == "WatchReport" => {
                let (repository, drain) = (self.0.repository.clone(), self.0.process.drain.clone());
                unary_request(call, &self.0.limits).await?;
                Ok(stream(report::watch(repository, drain)))
            }
            _ => Ok(self.0.common.serve(call).await),
        }
    }

    fn stream_settings(&self, call: &Call) -> StreamSettings {
        StreamSettings {
            concurrency: STREAM_CONCURRENCY,
            deadline: call.stream_deadline,
            drain: self.0.process.drain.clone(),
        }
    }
}

/// Reads the only message of a call whose content does not matter.
async fn unary_request(call: Call, limits: &MessageLimits) -> Result<(), Status> {
    call.into_messages(limits).only().await.map(drop)
}

impl Handler for Service {
    async fn handle(&self, call: Call) -> Reply {
        let deadline = call.deadline;
        let span = self
            .0
            .process
            .telemetry
            .request_span(call.path(), call.metadata());
        let answer = tracing::Instrument::instrument(self.answer(call), span);
        match tokio::time::timeout_at(deadline, answer).await {
            Ok(Ok(reply)) => reply,
            Ok(Err(status)) => reject(&status),
            Err(_) => reject(&Error::deadline_passed().to_status()),
        }
    }
}

/// Answers a call of one message with one message.
macro_rules! one {
    ($service:expr, $call:expr, $answer:expr) => {
        unary($call, &$service.0.limits, |request| async move {
            $answer(request).map_err(|error: Error| error.to_status())
        })
        .await
    };
}
use one;
