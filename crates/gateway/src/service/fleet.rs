//! Calls that the gateway answers itself, from what it knows of all workers or
//! by asking each of them.

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};

use futures::future::join_all;
use platform::grpc::{Call, MessageLimits, Reply, unary};
use platform::telemetry::LogLevels;
use protocol::inference::{
    LogSettingsRequest, LogSettingsResponse, ModelReadyRequest, ModelReadyResponse,
    ModelStatistics, ModelStatisticsRequest, ModelStatisticsResponse, RepositoryIndexRequest,
    RepositoryIndexResponse, RepositoryModelLoadRequest, RepositoryModelLoadResponse,
    RepositoryModelUnloadRequest, RepositoryModelUnloadResponse, ServerLiveRequest,
    ServerLiveResponse, ServerMetadataRequest, ServerMetadataResponse, ServerReadyRequest,
    ServerReadyResponse, TraceSettingRequest, TraceSettingResponse,
    repository_index_response::ModelIndex,
};
use protocol::{Error, Kind, LogSettings, TraceSettings};
use tokio::time::Instant;
use tonic::{Code, Status};

use super::Wanted;
use crate::auth::Caller;
use crate::route::nobody;
use crate::stack::Stack;
use crate::upstream::Upstream;
use crate::upstream::provider::VERSION;

/// What anybody may ask, whoever they are: messages that say nothing. They are
/// not read from what the others have left.
static PROBES: LazyLock<MessageLimits> = LazyLock::new(|| MessageLimits::new(1024, 16 << 20));

/// Answers one of the gateway's own calls.
pub async fn fleet(
    stack: &Stack,
    method: &str,
    call: Call,
    caller: &Caller,
) -> Result<Reply, Status> {
    let limits = &stack.0.limits;
    let deadline = call.deadline;
    match method {
        "ServerLive" => {
            unary(call, &PROBES, |_: ServerLiveRequest| async {
                Ok(ServerLiveResponse { live: true })
            })
            .await
        }
        "ServerReady" => {
            unary(call, &PROBES, |_: ServerReadyRequest| async {
                Ok(ServerReadyResponse {
                    ready: stack.ready(),
                })
            })
            .await
        }
        "ServerMetadata" => {
            unary(call, limits, |_: ServerMetadataRequest| async {
                Ok(ServerMetadataResponse {
                    name: "andon".to_owned(),
                    version: platform::VERSION.to_owned(),
                    extensions: protocol::EXTENSIONS.map(str::to_owned).to_vec(),
                })
            })
            .await
        }
        "ModelReady" => {
            unary(call, limits, |asked| async move {
                stack.model_ready(&asked, caller)
            })
            .await
        }
        "ModelStatistics" => {
            unary(call, limits, |asked| async move {
                stack.statistics(&asked, deadline, caller).await
            })
            .await
        }
        "RepositoryIndex" => {
            unary(call, limits, |asked| async move {
                stack.index(&asked, deadline, caller).await
            })
            .await
        }
        "RepositoryModelLoad" => {
            unary(call, limits, |asked| async move {
                stack.load(&asked, deadline).await
            })
            .await
        }
        "RepositoryModelUnload" => {
            unary(call, limits, |asked| async move {
                stack.unload(&asked, deadline).await
            })
            .await
        }
        "TraceSetting" => unary(call, limits, |asked| async move { stack.trace(&asked) }).await,
        "LogSettings" => unary(call, limits, |asked| async move { stack.log(&asked) }).await,
        "Sparse" => Err(Status::unimplemented(protocol::SPARSE_UNSUPPORTED)),
        _ => Err(Status::unimplemented(protocol::SHARED_MEMORY_UNSUPPORTED)),
    }
}

impl Stack {
    pub(crate) fn ready(&self) -> bool {
        !self.0.drain.draining() && self.0.routes.able()
    }

    pub(crate) fn model_ready(
        &self,
        asked: &ModelReadyRequest,
        caller: &Caller,
    ) -> Result<ModelReadyResponse, Status> {
        caller.must_be_allowed(&asked.name)?;
        match self.0.routes.ready(&asked.name, &asked.version) {
            Ok(_) => Ok(ModelReadyResponse { ready: true }),
            Err(error) if error.kind() == Kind::Invalid => Err(error.into()),
            Err(_) => Ok(ModelReadyResponse { ready: false }),
        }
    }

    fn reachable(&self) -> Result<Vec<Arc<Upstream>>, Status> {
        let table = self.0.routes.table();
        let mut upstreams = table.upstreams.clone();
        upstreams.retain(|upstream| upstream.reachable());
        if upstreams.is_empty() {
            return Err(nobody().into());
        }
        Ok(upstreams)
    }

    /// Asks every worker that can be reached.
    async fn ask<Q: prost::Message, A: prost::Message + Default>(
        &self,
        path: &'static str,
        asked: &Q,
        deadline: Instant,
    ) -> Result<Vec<Result<A, Status>>, Status> {
        let upstreams = self.reachable()?;
        let calls = upstreams
            .iter()
            .map(|upstream| upstream.call(path, asked, deadline));
        Ok(join_all(calls).await)
    }

    /// The same; nobody to ask is no error where providers answer.
    async fn ask_if_any<Q: prost::Message, A: prost::Message + Default>(
        &self,
        path: &'static str,
        asked: &Q,
        deadline: Instant,
    ) -> Result<Vec<Result<A, Status>>, Status> {
        if self.reachable().is_err() && !self.0.routes.catalogue.providers.is_empty() {
            return Ok(Vec::new());
        }
        self.ask(path, asked, deadline).await
    }

    /// The sums over all workers.
    pub(crate) async fn statistics(
        &self,
        asked: &ModelStatisticsRequest,
        deadline: Instant,
        caller: &Caller,
    ) -> Result<ModelStatisticsResponse, Status> {
        if !asked.name.is_empty() {
            caller.must_be_allowed(&asked.name)?;
        }
        let catalogue = &self.0.routes.catalogue;
        if catalogue.has(&asked.name) {
            // What providers do is in the metrics alone.
            self.0.routes.choose(&asked_for(asked), caller)?;
            return Ok(ModelStatisticsResponse::default());
        }
        let path = "/inference.GRPCInferenceService/ModelStatistics";
        let answers = self
            .ask_if_any::<_, ModelStatisticsResponse>(path, asked, deadline)
            .await?;
        let mut sums: BTreeMap<(String, String), ModelStatistics> = BTreeMap::new();
        for statistics in unless_all_failed(answers)?
            .into_iter()
            .flat_map(|a| a.model_stats)
            .filter(|statistics| caller.tenant.may_call(&statistics.name))
        {
            let key = (statistics.name.clone(), statistics.version.clone());
            match sums.get_mut(&key) {
                Some(sum) => protocol::add_statistics(sum, &statistics),
                None => {
                    sums.insert(key, statistics);
                }
            }
        }
        Ok(ModelStatisticsResponse {
            model_stats: sums.into_values().collect(),
        })
    }

    /// Every model version of any worker; ready if one has it ready.
    pub(crate) async fn index(
        &self,
        asked: &RepositoryIndexRequest,
        deadline: Instant,
        caller: &Caller,
    ) -> Result<RepositoryIndexResponse, Status> {
        if !asked.repository_name.is_empty() {
            let reason = "a server has one repository: leave it empty";
            return Err(Error::invalid("repository_name", reason).into());
        }
        let path = "/inference.GRPCInferenceService/RepositoryIndex";
        let answers = self
            .ask_if_any::<_, RepositoryIndexResponse>(path, asked, deadline)
            .await?;
        let mut models: BTreeMap<(String, String), ModelIndex> = BTreeMap::new();
        for model in unless_all_failed(answers)?
            .into_iter()
            .flat_map(|a| a.models)
            .filter(|model| caller.tenant.may_call(&model.name))
        {
            let key = (model.name.clone(), model.version.clone());
            let known = models.get(&key).is_some_and(|known| known.state == "READY");
            if !known && !self.0.routes.catalogue.has(&model.name) {
                models.insert(key, model);
            }
        }
        for (name, reason) in self.0.routes.catalogue.names() {
            if caller.tenant.may_call(name) {
                let model = outside(name, reason);
                models.insert((model.name.clone(), model.version.clone()), model);
            }
        }
        Ok(RepositoryIndexResponse {
            models: models.into_values().collect(),
        })
    }

    pub(crate) async fn load(
        &self,
        asked: &RepositoryModelLoadRequest,
        deadline: Instant,
    ) -> Result<RepositoryModelLoadResponse, Status> {
        let name = protocol::load_target(asked)?;
        self.0.routes.catalogue.must_be_workers(name.as_str())?;
        let path = "/inference.GRPCInferenceService/RepositoryModelLoad";
        let answers = self.ask(path, asked, deadline).await?;
        let answer = unless_one_failed(answers)?;
        let name = name.as_str();
        let settled = |table: &crate::route::Table| table.named(name, "", "model_name").is_ok();
        self.0.routes.settle(settled).await;
        Ok(answer)
    }

    pub(crate) async fn unload(
        &self,
        asked: &RepositoryModelUnloadRequest,
        deadline: Instant,
    ) -> Result<RepositoryModelUnloadResponse, Status> {
        let name = protocol::unload_target(asked)?;
        self.0.routes.catalogue.must_be_workers(name.as_str())?;
        let path = "/inference.GRPCInferenceService/RepositoryModelUnload";
        let answers = self.ask(path, asked, deadline).await?;
        let answer = unless_one_failed(answers)?;
        let name = name.as_str();
        let settled = |table: &crate::route::Table| table.named(name, "", "model_name").is_err();
        self.0.routes.settle(settled).await;
        Ok(answer)
    }

    pub(crate) fn trace(
        &self,
        asked: &TraceSettingRequest,
    ) -> Result<TraceSettingResponse, Status> {
        let telemetry = &self.0.telemetry;
        let now = telemetry.trace_levels();
        let settings = TraceSettings {
            exports: now.exports,
            on: now.on,
            rate: now.rate,
        };
        let settings = settings.changed_by(asked)?;
        telemetry.set_trace_levels(settings.on, settings.rate);
        Ok(settings.to_response())
    }

    pub(crate) fn log(&self, asked: &LogSettingsRequest) -> Result<LogSettingsResponse, Status> {
        let telemetry = &self.0.telemetry;
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

/// A model that needs no loading.
fn outside(name: &str, reason: &str) -> ModelIndex {
    ModelIndex {
        name: name.to_owned(),
        version: VERSION.to_owned(),
        state: "READY".to_owned(),
        reason: reason.to_owned(),
    }
}

fn asked_for(asked: &ModelStatisticsRequest) -> Wanted {
    Wanted::Named {
        name: asked.name.clone(),
        version: asked.version.clone(),
        field: "name",
    }
}

/// The answers that there are; an error when there is none.
fn unless_all_failed<A>(answers: Vec<Result<A, Status>>) -> Result<Vec<A>, Status> {
    let mut error = None;
    let mut answered = Vec::new();
    for answer in answers {
        match answer {
            Ok(answer) => answered.push(answer),
            Err(status) => error = Some(status),
        }
    }
    match error {
        Some(status) if answered.is_empty() => Err(status),
        _ => Ok(answered),
    }
}

/// One answer, if every worker that has the model gave one.
fn unless_one_failed<A>(answers: Vec<Result<A, Status>>) -> Result<A, Status> {
    let mut answered = None;
    let mut unknown = None;
    for answer in answers {
        match answer {
            Ok(answer) => answered = Some(answer),
            Err(status) if status.code() == Code::NotFound => unknown = Some(status),
            Err(status) => return Err(status),
        }
    }
    answered.ok_or_else(|| unknown.unwrap_or_else(|| nobody().to_status()))
}
