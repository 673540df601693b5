//! Calls about the whole fleet: the gateway responds from its routing table, or
//! calls every worker.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures::future::join_all;
use platform::pool::Cancelled;
use protocol::inference::{
    LogSettingsRequest, LogSettingsResponse, ModelReadyRequest, ModelReadyResponse,
    ModelStatistics, ModelStatisticsRequest, ModelStatisticsResponse, RepositoryIndexRequest,
    RepositoryIndexResponse, RepositoryModelLoadRequest, RepositoryModelLoadResponse,
    RepositoryModelUnloadRequest, RepositoryModelUnloadResponse, ServerMetadataResponse,
    TraceSettingRequest, TraceSettingResponse, repository_index_response::ModelIndex,
};
use protocol::{Error, Kind, LogSettings, Method, TraceSettings};
use providers::MODEL_VERSION;
use tokio::time::Instant;
use tonic::{Code, Status};

use crate::policy::Caller;
use crate::request::ModelSelector;
use crate::route::{Table, no_worker_reachable};
use crate::stack::Stack;
use crate::upstream::Upstream;

impl Stack {
    /// Readiness: some model can respond, and the gateway is not draining. It is
    /// what health says, so that probes of all kinds agree.
    pub fn ready(&self) -> bool {
        self.0.health.ready()
    }

    /// The name and version of the server, and the extensions of the protocol
    /// that it has.
    pub fn server_metadata(&self) -> ServerMetadataResponse {
        protocol::server_metadata(platform::VERSION)
    }

    /// Whether a model, alias or chain can respond to the caller.
    pub fn model_ready(
        &self,
        request: &ModelReadyRequest,
        caller: &Caller,
    ) -> Result<ModelReadyResponse, Status> {
        caller.must_be_allowed(&request.name)?;
        match self.0.routes.ready(&request.name, &request.version) {
            Ok(_) => Ok(ModelReadyResponse { ready: true }),
            Err(error) if error.kind() == Kind::Invalid => Err(error.into()),
            Err(_) => Ok(ModelReadyResponse { ready: false }),
        }
    }

    /// An error unless the model or chain can respond to the caller.
    pub fn check_ready(&self, name: &str, version: &str, caller: &Caller) -> Result<(), Error> {
        caller.must_be_allowed(name)?;
        self.0.routes.ready(name, version)
    }

    /// The names of the models and chains that can respond and that the caller
    /// may call, sorted.
    pub fn ready_models(&self, caller: &Caller) -> Vec<String> {
        let routes = &self.0.routes;
        let table = routes.table();
        let mut names: Vec<String> = table
            .ready()
            .map(|route| route.name().to_owned())
            .chain(routes.catalogue.providers.keys().cloned())
            .chain(routes.catalogue.chains.keys().cloned())
            .filter(|name| caller.tenant.may_call(name))
            .collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    fn reachable(&self) -> Result<Vec<Arc<Upstream>>, Status> {
        let table = self.0.routes.table();
        let mut upstreams = table.upstreams.clone();
        upstreams.retain(|upstream| upstream.reachable());
        if upstreams.is_empty() {
            return Err(no_worker_reachable().into());
        }
        Ok(upstreams)
    }

    /// Calls every reachable worker.
    async fn call_workers<Q: prost::Message, A: prost::Message + Default>(
        &self,
        method: Method,
        request: &Q,
        deadline: Instant,
    ) -> Result<Vec<Result<A, Status>>, Status> {
        let upstreams = self.reachable()?;
        let calls = upstreams
            .iter()
            .map(|upstream| upstream.call(method, request, deadline));
        Ok(join_all(calls).await)
    }

    /// Calls every reachable worker. No worker is no error when there are providers.
    async fn call_workers_if_any<Q: prost::Message, A: prost::Message + Default>(
        &self,
        method: Method,
        request: &Q,
        deadline: Instant,
    ) -> Result<Vec<Result<A, Status>>, Status> {
        if self.reachable().is_err() && !self.0.routes.catalogue.providers.is_empty() {
            return Ok(Vec::new());
        }
        self.call_workers(method, request, deadline).await
    }

    /// The statistics of models, summed over all workers.
    pub async fn statistics(
        &self,
        request: &ModelStatisticsRequest,
        deadline: Instant,
        caller: &Caller,
    ) -> Result<ModelStatisticsResponse, Status> {
        if !request.name.is_empty() {
            caller.must_be_allowed(&request.name)?;
        }
        let catalogue = &self.0.routes.catalogue;
        if catalogue.has(&request.name) {
            // The statistics of providers are in the metrics only.
            self.route(&selector(request), caller)?;
            return Ok(ModelStatisticsResponse::default());
        }
        let responses = self
            .call_workers_if_any::<_, ModelStatisticsResponse>(
                Method::ModelStatistics,
                request,
                deadline,
            )
            .await?;
        let responses = unless_all_failed(responses)?;
        self.merge(responses, caller, Self::sum).await
    }

    /// Merges the responses of workers: on a thread for work if they are long,
    /// since a fleet may have many models, and each of them many batch sizes.
    async fn merge<A: prost::Message + 'static, T: Send + 'static>(
        &self,
        responses: Vec<A>,
        caller: &Caller,
        merge: fn(&Self, Vec<A>, &Caller) -> T,
    ) -> Result<T, Status> {
        let bytes = responses.iter().map(A::encoded_len).sum();
        let limits = self.0.limits.held_by(caller.holder());
        let (stack, caller) = (self.clone(), caller.clone());
        let work = move |_: &Cancelled| merge(&stack, responses, &caller);
        limits.work(bytes, work).await
    }

    /// The sums of statistics that the caller may read.
    fn sum(
        &self,
        responses: Vec<ModelStatisticsResponse>,
        caller: &Caller,
    ) -> ModelStatisticsResponse {
        let mut sums: BTreeMap<(String, String), ModelStatistics> = BTreeMap::new();
        for statistics in responses
            .into_iter()
            .flat_map(|response| response.model_stats)
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
        ModelStatisticsResponse {
            model_stats: sums.into_values().collect(),
        }
    }

    /// Every model version of the workers, ready if it is ready on one of them, and
    /// the models and chains of providers.
    pub async fn index(
        &self,
        request: &RepositoryIndexRequest,
        deadline: Instant,
        caller: &Caller,
    ) -> Result<RepositoryIndexResponse, Status> {
        protocol::check_repository_name(&request.repository_name)?;
        let responses = self
            .call_workers_if_any::<_, RepositoryIndexResponse>(
                Method::RepositoryIndex,
                request,
                deadline,
            )
            .await?;
        let responses = unless_all_failed(responses)?;
        self.merge(responses, caller, Self::list).await
    }

    /// The models of workers and of providers that the caller may call.
    fn list(
        &self,
        responses: Vec<RepositoryIndexResponse>,
        caller: &Caller,
    ) -> RepositoryIndexResponse {
        let mut models: BTreeMap<(String, String), ModelIndex> = BTreeMap::new();
        for model in responses
            .into_iter()
            .flat_map(|response| response.models)
            .filter(|model| caller.tenant.may_call(&model.name))
        {
            let key = (model.name.clone(), model.version.clone());
            let listed = models.get(&key);
            let ready = listed.is_some_and(|model| model.state == "READY");
            if !ready && !self.0.routes.catalogue.has(&model.name) {
                models.insert(key, model);
            }
        }
        for (name, reason) in self.0.routes.catalogue.names() {
            if caller.tenant.may_call(name) {
                let model = provider_index(name, reason);
                models.insert((model.name.clone(), model.version.clone()), model);
            }
        }
        RepositoryIndexResponse {
            models: models.into_values().collect(),
        }
    }

    /// Loads a model on every worker, and waits until the routing table has it.
    pub async fn load(
        &self,
        request: &RepositoryModelLoadRequest,
        deadline: Instant,
    ) -> Result<RepositoryModelLoadResponse, Status> {
        let name = protocol::load_target(request)?;
        self.0.routes.catalogue.must_be_workers(name.as_str())?;
        let responses = self
            .call_workers(Method::RepositoryModelLoad, request, deadline)
            .await?;
        let response = unless_one_failed(responses)?;
        let name = name.as_str();
        let settled = |table: &Table| table.named(name, "", "model_name").is_ok();
        self.0.routes.settle(settled).await;
        Ok(response)
    }

    /// Unloads a model on every worker, and waits until it has left the routing table.
    pub async fn unload(
        &self,
        request: &RepositoryModelUnloadRequest,
        deadline: Instant,
    ) -> Result<RepositoryModelUnloadResponse, Status> {
        let name = protocol::unload_target(request)?;
        self.0.routes.catalogue.must_be_workers(name.as_str())?;
        let responses = self
            .call_workers(Method::RepositoryModelUnload, request, deadline)
            .await?;
        let response = unless_one_failed(responses)?;
        let name = name.as_str();
        let settled = |table: &Table| table.named(name, "", "model_name").is_err();
        self.0.routes.settle(settled).await;
        self.0.routes.forget(name);
        Ok(response)
    }

    /// Reads and changes the trace settings.
    pub fn trace(&self, request: &TraceSettingRequest) -> Result<TraceSettingResponse, Status> {
        let telemetry = &self.0.telemetry;
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

    /// Reads and changes the log settings.
    pub fn log(&self, request: &LogSettingsRequest) -> Result<LogSettingsResponse, Status> {
        let telemetry = &self.0.telemetry;
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

/// The index entry of a model or chain of providers.
fn provider_index(name: &str, reason: &str) -> ModelIndex {
    ModelIndex {
        name: name.to_owned(),
        version: MODEL_VERSION.to_owned(),
        state: "READY".to_owned(),
        reason: reason.to_owned(),
    }
}

fn selector(request: &ModelStatisticsRequest) -> ModelSelector {
    ModelSelector::Named {
        name: request.name.clone(),
        version: request.version.clone(),
        field: "name",
    }
}

/// The successful responses; an error when all workers failed.
fn unless_all_failed<A>(responses: Vec<Result<A, Status>>) -> Result<Vec<A>, Status> {
    let mut error = None;
    let mut succeeded = Vec::new();
    for response in responses {
        match response {
            Ok(response) => succeeded.push(response),
            Err(status) => error = Some(status),
        }
    }
    match error {
        Some(status) if succeeded.is_empty() => Err(status),
        _ => Ok(succeeded),
    }
}

/// One response, if every worker that has the model succeeded.
fn unless_one_failed<A>(responses: Vec<Result<A, Status>>) -> Result<A, Status> {
    let mut succeeded = None;
    let mut not_found = None;
    for response in responses {
        match response {
            Ok(response) => succeeded = Some(response),
            Err(status) if status.code() == Code::NotFound => not_found = Some(status),
            Err(status) => return Err(status),
        }
    }
    succeeded.ok_or_else(|| not_found.unwrap_or_else(|| no_worker_reachable().to_status()))
}
