//! Serves models: service → queue → batch → device thread → engine.

mod device;
mod error;
mod infer;
#[cfg(test)]
mod linear;
mod metrics;
mod model;
mod queue;
mod report;
mod repository;
mod service;
mod work;

use std::num::NonZero;
use std::sync::Arc;

pub use engine::{Description, Setting};
use platform::health::Health;
use platform::server::{
    Grpc, Listener, Server, ServerSettings, WORKER_HEADER_BYTES_MAX, WORKER_MESSAGE_BYTES_MORE,
};
use platform::tasks::{OwnedTask, spawn_owned};
use platform::{CommonServices, Process};
use protocol::Error;
use protocol::{DESCRIPTORS, SERVICES};
use tokio::sync::watch;

use metrics::WorkerMetrics;
pub use repository::{BareModel, RepositorySettings, check_folder};
use repository::{Repository, State};
use service::Service;

/// A worker that has not opened its port yet.
#[derive(Debug)]
pub struct Worker {
    repository: Arc<Repository>,
    service: Service,
    server: Server,
    process: Process,
    /// Follows the models and the drain.
    pub health: Health,
}

/// Why a worker cannot start.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// No model is configured.
    #[error("no models: give --repository DIR, or --model NAME=FOLDER")]
    NoModels,
    /// The repository cannot be read, or lacks a model to load.
    #[error(transparent)]
    Repository(#[from] Error),
    /// The descriptors are invalid: a defect of the build.
    #[error("the descriptors of the services cannot be read: {0}")]
    Descriptors(String),
}

impl Worker {
    /// Checks the settings; no port is open and no model is loaded yet.
    pub fn new(
        settings: RepositorySettings,
        server: ServerSettings,
        process: Process,
    ) -> Result<Self, WorkerError> {
        if settings.repository.is_none() && settings.model.is_empty() {
            return Err(WorkerError::NoModels);
        }
        let threads = settings.threads.map_or(process.cores, NonZero::get);
        engine::kernels::set_threads(threads);
        let metrics = WorkerMetrics::register(&process.metrics);
        let repository = Arc::new(Repository::new(settings, metrics));
        repository.announce(&repository.to_load()?);
        let health = Health::default();
        let common = CommonServices::new(&health, DESCRIPTORS, &process.streams)
            .map_err(|error| WorkerError::Descriptors(error.to_string()))?;
        let mut limits = server.message_limits(&process.metrics, &process.pool);
        limits.message_bytes_max = limits
            .message_bytes_max
            .saturating_add(WORKER_MESSAGE_BYTES_MORE);
        let service = Service::new(repository.clone(), common, &limits, process.clone());
        Ok(Self {
            repository,
            service,
            server: Server {
                name: "worker",
                settings: server,
                header_bytes_max: WORKER_HEADER_BYTES_MAX,
                metrics: process.connections.clone(),
                shards: process.shards.clone(),
                limits: Arc::new(limits),
                tls: None,
            },
            process,
            health,
        })
    }

    /// Becomes true when the models of the start have been loaded, or have failed.
    pub fn started(&self) -> watch::Receiver<bool> {
        self.repository.start()
    }

    /// Loads the models and serves calls until the process has drained.
    pub async fn run(self, listener: Listener) {
        let _health = self.follow_health();
        let _loading = self.load_models();
        self.server
            .run(listener, Grpc(self.service), self.process.drain)
            .await;
    }

    /// Loads the models in the background: the port is open meanwhile, so that
    /// probes get a response.
    fn load_models(&self) -> OwnedTask {
        let repository = self.repository.clone();
        spawn_owned(async move {
            let names = match repository.to_load() {
                Ok(names) => names,
                Err(error) => {
                    tracing::error!(%error, "the repository cannot be read");
                    return;
                }
            };
            if names.is_empty() {
                tracing::warn!(
                    "the repository is empty: models can be loaded by RepositoryModelLoad"
                );
            }
            for name in names {
                // It is logged already.
                if let Err(error) = repository.load(&name).await {
                    repository.give_up(&name, &error);
                }
            }
            repository.loaded();
            repository.retry().await;
        })
    }

    /// Keeps health in step with the models and the drain.
    fn follow_health(&self) -> OwnedTask {
        let (repository, health) = (self.repository.clone(), self.health.clone());
        let mut drain = self.process.drain.clone();
        spawn_owned(async move {
            let mut changes = repository.changes();
            loop {
                changes.borrow_and_update();
                let draining = drain.draining();
                let states = repository.states();
                let callable = |state: &State| matches!(state, State::Ready(_)) && !draining;
                let ready = repository.started() && states.iter().any(|(_, _, s)| callable(s));
                let mut models = std::collections::BTreeMap::<String, bool>::new();
                for (name, _, state) in &states {
                    *models.entry(name.to_string()).or_default() |= callable(state);
                }
                health.replace(ready, &SERVICES, models);
                if draining {
                    drain.reached(platform::drain::Phase::Closing).await;
                    return health.close();
                }
                tokio::select! {
                    changed = changes.changed() => if changed.is_err() { return },
                    () = drain.reached(platform::drain::Phase::Draining) => {}
                }
            }
        })
    }
}
