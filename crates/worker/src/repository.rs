//! The models of a worker: their states, and loading and unloading while others
//! serve.

mod files;
mod retries;
mod settings;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use engine::{Description, ModelFolder};
use protocol::{Error, Kind, ModelName, ModelVersion, Task};
use tokio::sync::{Mutex, oneshot, watch};
use tokio::task::JoinSet;

use crate::metrics::WorkerMetrics;
use crate::model::{ModelId, ServedModel};
use files::{Defaults, Plan};
use retries::Retries;
pub use settings::{BareModel, RepositorySettings};

/// What a model folder would be served as, with which settings from which file, and
/// what is missing; nothing is served. Settings are those of `andon.toml` in the
/// folder, or of its model if the folder is a version in a repository.
///
/// # Errors
/// The settings cannot be read, or are not valid.
pub fn check_folder(folder: &Path) -> Result<Description, String> {
    files::described(folder)
}

/// The state of a model version.
#[derive(Debug, Clone)]
pub enum State {
    /// Its files are being read, or will be when its turn comes.
    Loading,
    /// It is ready.
    Ready(Arc<ServedModel>),
    /// It finishes its last rows.
    Unloading,
    /// It could not be loaded, and why.
    Unavailable(String),
    /// It was unloaded, or was never loaded: `unloaded`, or another word for it.
    Absent(&'static str),
}

/// Loads and unloads that may be in flight.
const JOBS_MAX: usize = 64;
/// How long an unload waits for requests that have found the model and not
/// queued their rows yet.
const GRACE_PERIOD: Duration = Duration::from_secs(5);

type Versions = BTreeMap<ModelVersion, State>;

/// The models of a worker.
#[derive(Debug)]
pub struct Repository {
    settings: RepositorySettings,
    metrics: WorkerMetrics,
    models: RwLock<BTreeMap<ModelName, Versions>>,
    /// Loads and unloads of one model take turns.
    turns: std::sync::Mutex<HashMap<ModelName, Arc<Mutex<()>>>>,
    changed: watch::Sender<u64>,
    /// Loads and unloads that run, whether their callers wait or not.
    jobs: std::sync::Mutex<JoinSet<()>>,
    /// Whether the models of the start have been loaded or have failed.
    started: watch::Sender<bool>,
    /// The models that have a version which cannot be loaded.
    retries: Retries,
}

/// Why a model is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cause {
    /// Somebody wants it: all of it is loaded, again if it is there already.
    Wanted,
    /// A version of it could not be loaded: those that serve are left alone.
    Retry,
}

impl Repository {
    /// A repository with no model loaded yet.
    pub fn new(settings: RepositorySettings, metrics: WorkerMetrics) -> Self {
        Self {
            settings,
            metrics,
            models: RwLock::default(),
            turns: std::sync::Mutex::default(),
            changed: watch::Sender::new(0),
            jobs: std::sync::Mutex::default(),
            started: watch::Sender::new(false),
            retries: Retries::default(),
        }
    }

    /// The most bytes of one text of any model.
    pub fn text_bytes_max(&self) -> usize {
        self.settings.text_bytes_max
    }

    /// Changes when a model's state does.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Whether the models of the start have been loaded, or have failed.
    pub fn started(&self) -> bool {
        *self.started.borrow()
    }

    /// Becomes true when the models of the start have been loaded, or have failed.
    pub fn start(&self) -> watch::Receiver<bool> {
        self.started.subscribe()
    }

    /// Makes the models of the start known before their turn comes: whoever calls
    /// one meanwhile reads that it loads, and not that there is none.
    pub fn announce(&self, names: &[ModelName]) {
        for name in names {
            // Why there is no plan is said when the model is loaded.
            let plan = self.plan(name).ok();
            for version in plan.into_iter().flat_map(|plan| plan.versions.into_keys()) {
                self.set_unless_ready(name, version, State::Loading);
            }
        }
    }

    /// Ends the announcement of a model that could not be loaded.
    pub fn give_up(&self, name: &ModelName, error: &Error) {
        for (of, version, state) in self.states() {
            if of == *name && matches!(state, State::Loading) {
                let state = State::Unavailable(error.to_string());
                self.set_unless_ready(name, version, state);
            }
        }
    }

    /// Whether a model is being loaded.
    pub fn is_loading(&self) -> bool {
        let models = self.models.read().unwrap_or_else(PoisonError::into_inner);
        let mut states = models.values().flat_map(BTreeMap::values);
        states.any(|state| matches!(state, State::Loading))
    }

    /// Notes that the models of the start have been loaded, or have failed.
    pub fn loaded(&self) {
        self.started.send_replace(true);
        self.changed.send_modify(|count| *count += 1);
    }

    /// The names of all models, loaded or not.
    pub fn names(&self) -> Result<Vec<ModelName>, Error> {
        let mut names: Vec<ModelName> = self
            .settings
            .model
            .iter()
            .filter_map(|bare| ModelName::checked(&bare.name, "name").ok())
            .collect();
        if let Some(root) = &self.settings.repository {
            let found = files::names(root)
                .map_err(|error| Error::new(Kind::Internal, format!("the repository {error}")))?;
            names.extend(found);
        }
        names.sort();
        names.dedup();
        Ok(names)
    }

    /// The names of the models to load at the start.
    pub fn to_load(&self) -> Result<Vec<ModelName>, Error> {
        let chosen = &self.settings.models;
        let names = self.names()?;
        for name in chosen {
            if !names.iter().any(|known| known.as_str() == name) {
                return Err(Error::new(
                    Kind::NotFound,
                    format!("the repository has no model '{name}'"),
                ));
            }
        }
        let bare = |name: &ModelName| self.settings.model.iter().any(|b| b.name == name.as_str());
        Ok(names
            .into_iter()
            .filter(|name| {
                chosen.is_empty() || bare(name) || chosen.iter().any(|c| c == name.as_str())
            })
            .collect())
    }

    /// The model version of a request: the newest ready one when it names none.
    pub fn find(
        &self,
        name: &ModelName,
        version: Option<ModelVersion>,
    ) -> Result<Arc<ServedModel>, Error> {
        let models = self.models.read().unwrap_or_else(PoisonError::into_inner);
        let versions = models
            .get(name)
            .ok_or_else(|| Error::unknown_model(name, None))?;
        match version {
            None => versions
                .values()
                .rev()
                .find_map(|state| match state {
                    State::Ready(model) => Some(model.clone()),
                    _ => None,
                })
                .ok_or_else(|| none_ready(name, versions)),
            Some(number) => match versions.get(&number) {
                Some(State::Ready(model)) => Ok(model.clone()),
                Some(state) => Err(Error::not_ready(format!(
                    "version {number} of model '{name}' is {}",
                    state.name()
                ))),
                None => Err(Error::unknown_model(name, version)),
            },
        }
    }

    /// Every model that is ready.
    pub fn ready(&self) -> Vec<Arc<ServedModel>> {
        let models = self.models.read().unwrap_or_else(PoisonError::into_inner);
        models
            .values()
            .flat_map(BTreeMap::values)
            .filter_map(|state| match state {
                State::Ready(model) => Some(model.clone()),
                _ => None,
            })
            .collect()
    }

    /// The models for a task; the newest ready version of each.
    pub fn models_for(&self, task: Task) -> Vec<Arc<ServedModel>> {
        let mut models: BTreeMap<ModelName, Arc<ServedModel>> = BTreeMap::new();
        for model in self.ready() {
            // Versions come in order: the newest stays.
            if model.task() == task {
                models.insert(model.name.clone(), model);
            }
        }
        models.into_values().collect()
    }

    /// Every model version and its state. Versions that were never loaded are
    /// unavailable.
    pub fn index(&self) -> Result<Vec<(ModelName, ModelVersion, State)>, Error> {
        let mut all: BTreeMap<(ModelName, ModelVersion), State> = BTreeMap::new();
        if let Some(root) = &self.settings.repository {
            for name in self.names()? {
                for version in files::versions(root, &name).into_keys() {
                    let state = State::Absent("not loaded");
                    all.insert((name.clone(), version), state);
                }
            }
        }
        for (name, version, state) in self.states() {
            all.insert((name, version), state);
        }
        Ok(all
            .into_iter()
            .map(|((name, version), state)| (name, version, state))
            .collect())
    }

    /// The model versions that are or were loaded; reads nothing from disk.
    pub fn states(&self) -> Vec<(ModelName, ModelVersion, State)> {
        let models = self.models.read().unwrap_or_else(PoisonError::into_inner);
        models
            .iter()
            .flat_map(|(name, versions)| {
                versions
                    .iter()
                    .map(|(version, state)| (name.clone(), *version, state.clone()))
            })
            .collect()
    }

    /// Loads or reloads a model: the old version serves until the new one is
    /// ready. Returns when it is.
    pub async fn load(self: &Arc<Self>, name: &ModelName) -> Result<(), Error> {
        self.load_for(name, Cause::Wanted).await
    }

    async fn load_for(self: &Arc<Self>, name: &ModelName, cause: Cause) -> Result<(), Error> {
        let name = name.clone();
        let job = |own: Arc<Self>| async move {
            let turn = own.turn(&name);
            let _turn = turn.lock().await;
            // It may have been unloaded, or loaded, since the retry was due.
            if cause == Cause::Retry && !own.retries.has(&name) {
                return Ok(());
            }
            let loaded = own.load_now(&name, cause).await;
            match &loaded {
                Err(error) if error.kind() != Kind::NotFound => own.retries.failed(&name),
                _ => own.retries.forget(&name),
            }
            loaded
        };
        self.finish(job).await
    }

    /// Loads models again that have a version which could not be loaded, such as
    /// one whose files were still being copied, until this is dropped.
    pub async fn retry(self: &Arc<Self>) {
        loop {
            let name = self.retries.due().await;
            // An error is logged when it is a new one, and is in the index.
            let loaded = self.load_for(&name, Cause::Retry).await;
            // Too many loads were in flight, and this one was not begun.
            if loaded.is_err_and(|error| error.kind() == Kind::Overloaded) {
                self.retries.failed(&name);
            }
        }
    }

    async fn load_now(self: &Arc<Self>, name: &ModelName, cause: Cause) -> Result<(), Error> {
        let plan = self.planned(name).await?;
        let served: Vec<ModelVersion> = plan.versions.keys().copied().collect();
        let mut failed = None;
        for (version, folder) in plan.versions {
            let serves = self.find(name, Some(version)).is_ok();
            match cause {
                Cause::Retry if serves => continue,
                // Its state says why it could not be loaded until it is.
                Cause::Retry => {}
                Cause::Wanted => self.set_unless_ready(name, version, State::Loading),
            }
            let repository = self.clone();
            let (options, limits) = (plan.options.clone(), plan.limits.clone());
            let folder = ModelFolder {
                path: folder,
                boundary: plan.boundary.clone(),
                observe: None,
            };
            let id = ModelId {
                name: name.clone(),
                version,
            };
            let loaded = tokio::task::spawn_blocking(move || {
                ServedModel::start(id, folder, &options, limits, &repository.metrics)
            })
            .await
            .map_err(|error| Error::new(Kind::Internal, error.to_string()))?;
            match loaded {
                Ok(model) => {
                    let card = &model.card;
                    tracing::info!(model = %name, %version, family = card.family, task = %card.task,
                        device = card.device, kernels = card.kernels, dtype = %card.dtype, "ready");
                    let old = self.set(name, version, Some(State::Ready(Arc::new(model))));
                    stop(old).await;
                }
                Err(error) => {
                    let reason = error.to_string();
                    if self.retries.is_new(name, &reason) {
                        tracing::error!(model = %name, %version, reason, "the model cannot be loaded");
                    }
                    let state = State::Unavailable(reason.clone());
                    self.set_unless_ready(name, version, state);
                    failed = Some(reason);
                }
            }
        }
        // The old versions keep serving when a new one fails to load.
        if let Some(reason) = failed {
            return Err(unloadable(name, &reason));
        }
        for version in self.versions_of(name) {
            if !served.contains(&version) {
                self.drop_version(name, version, None).await;
            }
        }
        Ok(())
    }

    /// How a model is to be loaded.
    async fn planned(self: &Arc<Self>, name: &ModelName) -> Result<Plan, Error> {
        let (own, of) = (self.clone(), name.clone());
        // Reads folders and files.
        let planned = tokio::task::spawn_blocking(move || {
            let known = own.names()?.contains(&of);
            Ok::<_, Error>(known.then(|| own.plan(&of)))
        });
        let planned = planned.await;
        let planned = planned.map_err(|error| Error::new(Kind::Internal, error.to_string()))?;
        let Some(plan) = planned? else {
            return Err(Error::unknown_model(name, None));
        };
        plan.map_err(|reason| {
            if self.retries.is_new(name, &reason) {
                tracing::error!(model = %name, reason, "the model cannot be loaded");
            }
            self.fail_all(name, &reason);
            unloadable(name, &reason)
        })
    }

    /// Runs a load or an unload to its end, even if its caller leaves.
    async fn finish<F>(self: &Arc<Self>, job: impl FnOnce(Arc<Self>) -> F) -> Result<(), Error>
    where
        F: Future<Output = Result<(), Error>> + Send + 'static,
    {
        let (done, result) = oneshot::channel();
        let job = job(self.clone());
        {
            let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
            while jobs.try_join_next().is_some() {}
            if jobs.len() >= JOBS_MAX {
                let message = format!("{JOBS_MAX} loads and unloads are in flight already");
                return Err(Error::overloaded(message, Duration::from_secs(1)));
            }
            jobs.spawn(async move {
                // A caller who left has no receiver; the index has the result.
                let _ = done.send(job.await);
            });
        }
        let ended = || Error::new(Kind::Internal, "the load or unload was aborted");
        result.await.unwrap_or_else(|_| Err(ended()))
    }

    /// Unloads every version of a model; returns when its memory is freed.
    pub async fn unload(self: &Arc<Self>, name: &ModelName) -> Result<(), Error> {
        let name = name.clone();
        self.finish(|own| async move { own.unload_now(&name).await })
            .await
    }

    async fn unload_now(&self, name: &ModelName) -> Result<(), Error> {
        let turn = self.turn(name);
        let _turn = turn.lock().await;
        self.retries.forget(name);
        let versions = self.versions_of(name);
        if versions.is_empty() {
            return Err(Error::unknown_model(name, None));
        }
        for version in versions {
            let state = State::Absent("unloaded");
            self.drop_version(name, version, Some(state)).await;
        }
        tracing::info!(model = %name, "unloaded");
        Ok(())
    }

    fn plan(&self, name: &ModelName) -> Result<Plan, String> {
        let defaults = Defaults {
            device: self.settings.device,
            dtype: self.settings.dtype,
            kernels: self.settings.kernels,
            text_bytes_max: self.settings.text_bytes_max,
        };
        let mut bare = self.settings.model.iter();
        if let Some(bare) = bare.find(|bare| bare.name == name.as_str()) {
            return files::bare_plan(&bare.folder, defaults);
        }
        let root = self.settings.repository.as_ref();
        files::plan(root.ok_or("there is no repository")?, name, defaults)
    }

    fn turn(&self, name: &ModelName) -> Arc<Mutex<()>> {
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        turns.entry(name.clone()).or_default().clone()
    }

    fn versions_of(&self, name: &ModelName) -> Vec<ModelVersion> {
        let models = self.models.read().unwrap_or_else(PoisonError::into_inner);
        models
            .get(name)
            .map(|versions| versions.keys().copied().collect())
            .unwrap_or_default()
    }

    /// Replaces a version's state, or removes the version; returns the old
    /// state.
    fn set(&self, name: &ModelName, version: ModelVersion, state: Option<State>) -> Option<State> {
        let mut models = self.models.write().unwrap_or_else(PoisonError::into_inner);
        let versions = models.entry(name.clone()).or_default();
        let old = match state {
            Some(state) => versions.insert(version, state),
            None => versions.remove(&version),
        };
        drop(models);
        self.changed.send_modify(|count| *count += 1);
        old
    }

    fn set_unless_ready(&self, name: &ModelName, version: ModelVersion, state: State) {
        let ready = self.find(name, Some(version)).is_ok();
        if !ready {
            self.set(name, version, Some(state));
        }
    }

    fn fail_all(&self, name: &ModelName, reason: &str) {
        let Some(root) = &self.settings.repository else {
            return;
        };
        for version in files::versions(root, name).into_keys() {
            self.set_unless_ready(name, version, State::Unavailable(reason.to_owned()));
        }
    }

    async fn drop_version(&self, name: &ModelName, version: ModelVersion, then: Option<State>) {
        let old = self.set(name, version, Some(State::Unloading));
        stop(old).await;
        self.set(name, version, then);
    }
}

impl State {
    /// The name that the repository index has for it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Loading => "LOADING",
            Self::Ready(_) => "READY",
            Self::Unloading => "UNLOADING",
            Self::Unavailable(_) | Self::Absent(_) => "UNAVAILABLE",
        }
    }

    /// Why it is not ready.
    pub fn reason(&self) -> &str {
        match self {
            Self::Unavailable(reason) => reason,
            Self::Absent(reason) => reason,
            _ => "",
        }
    }
}

/// The error when no version of a known model is ready. It is worth a retry where
/// one loads or will be loaded again, and not where it was unloaded.
fn none_ready(name: &ModelName, versions: &Versions) -> Error {
    let any = |is: fn(&State) -> bool| versions.values().rev().find(|state| is(state));
    let loading = any(|state| matches!(state, State::Loading));
    match loading.or_else(|| any(|state| matches!(state, State::Unavailable(_)))) {
        Some(state) => Error::not_ready(format!("model '{name}' is {}", state.name())),
        None => Error::new(
            Kind::NotFound,
            format!("model '{name}' has no version that is ready"),
        ),
    }
}

fn unloadable(name: &ModelName, reason: &str) -> Error {
    Error::invalid(
        "model_name",
        format!("model '{name}' cannot be loaded: {reason}"),
    )
}

async fn stop(state: Option<State>) {
    if let Some(State::Ready(model)) = state {
        // Requests that found it a moment ago may not have queued their rows.
        let deadline = Instant::now() + GRACE_PERIOD;
        while Arc::strong_count(&model) > 1 && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        // Joining the thread blocks: not here.
        let stopped = tokio::task::spawn_blocking(move || model.stop()).await;
        if let Err(error) = stopped {
            tracing::error!(%error, "a model could not be stopped");
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use platform::metrics::Metrics;

    use super::*;

    #[derive(Parser)]
    struct Flags {
        #[command(flatten)]
        settings: RepositorySettings,
    }

    fn name(text: &str) -> ModelName {
        ModelName::checked(text, "name").unwrap()
    }

    /// A repository with the model `slow`, whose folder has no files yet.
    fn repository(of: &str) -> (std::path::PathBuf, Arc<Repository>) {
        let root = format!("andon-repository-{}-{of}", std::process::id());
        let root = std::env::temp_dir().join(root);
        std::fs::create_dir_all(root.join("slow/1")).unwrap();
        std::fs::create_dir_all(root.join("slow/2")).unwrap();
        let flags = ["test", "--repository", root.to_str().unwrap()];
        let settings = Flags::try_parse_from(flags).unwrap().settings;
        let metrics = WorkerMetrics::register(&Metrics::default());
        (root, Arc::new(Repository::new(settings, metrics)))
    }

    #[tokio::test]
    async fn a_model_that_waits_for_its_turn_is_loading_and_not_unknown() {
        let (root, repository) = repository("announced");
        let names = repository.to_load().unwrap();
        let slow = name("slow");
        assert_eq!(names, std::slice::from_ref(&slow));
        let found = |version| repository.find(&slow, version).err().unwrap();
        assert_eq!(found(None).kind(), Kind::NotFound);
        repository.announce(&names);
        assert!(repository.is_loading());
        let newest = ModelVersion::checked("2", "version").ok();
        for version in [None, newest] {
            let error = found(version);
            assert_eq!(error.kind(), Kind::NotReady, "{error}");
            assert!(error.retry_after().is_some(), "{error}");
            assert!(error.to_string().ends_with("is LOADING"), "{error}");
        }
        // The newest version alone is served.
        let oldest = ModelVersion::checked("1", "version").ok();
        assert_eq!(found(oldest).kind(), Kind::NotFound);

        // It has no files: it is known, and cannot be called.
        let error = repository.load(&slow).await.err().unwrap();
        repository.give_up(&slow, &error);
        assert!(!repository.is_loading());
        let error = found(None);
        assert_eq!(error.kind(), Kind::NotReady, "{error}");
        assert!(error.to_string().ends_with("is UNAVAILABLE"), "{error}");
        // What an administrator has unloaded is gone.
        repository.unload(&slow).await.unwrap();
        assert_eq!(found(None).kind(), Kind::NotFound);
        std::fs::remove_dir_all(root).unwrap();
    }

    #[tokio::test]
    async fn the_announcement_of_a_model_ends_when_it_is_not_loaded() {
        let (root, repository) = repository("gone");
        let slow = name("slow");
        repository.announce(std::slice::from_ref(&slow));
        std::fs::remove_dir_all(&root).unwrap();
        let error = repository.load(&slow).await.err().unwrap();
        repository.give_up(&slow, &error);
        assert!(!repository.is_loading());
        let mut start = repository.start();
        assert!(!*start.borrow_and_update() && !repository.started());
        repository.loaded();
        assert!(*start.borrow_and_update() && repository.started());
    }
}
