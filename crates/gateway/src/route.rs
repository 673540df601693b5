//! Routing: which model version responds to a request, and which workers have
//! it. The routing table is rebuilt whenever a worker comes, goes or serves other
//! models.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use http::HeaderValue;
use protocol::{Error, Kind, ModelName, ModelVersion, Task};
use providers::{Catalogue, Chain, Provider};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::policy::Caller;
use crate::request::ModelSelector;
use crate::upstream::Upstream;

/// How long a gateway that has providers too waits for its first worker before
/// it is ready.
const STARTUP_GRACE: Duration = Duration::from_secs(10);

/// The models of all workers.
#[derive(Debug, Default)]
pub struct Table {
    models: HashMap<String, Arc<ModelRoute>>,
    /// Every worker, whether it can be reached or not.
    pub upstreams: Vec<Arc<Upstream>>,
}

/// One model.
#[derive(Debug)]
pub struct ModelRoute {
    name: ModelName,
    task: String,
    versions: BTreeMap<ModelVersion, VersionRoute>,
}

/// One version of a model.
#[derive(Debug, Default)]
struct VersionRoute {
    /// The workers that have it ready.
    upstreams: Vec<Arc<Upstream>>,
    /// Those that are draining: used only when there is no other.
    draining: Vec<Arc<Upstream>>,
    /// Whether a worker that has it ready is unreachable.
    unreachable: bool,
    /// The digest that all its workers report, when it is deterministic.
    digest: Option<Arc<str>>,
    /// Whether a worker has reported a digest.
    has_report: bool,
}

/// The model version that responds to a request.
#[derive(Debug, Clone)]
pub struct Route {
    target: RouteTarget,
    /// The model's name for the metadata of a call that named none.
    pub chosen: Option<HeaderValue>,
}

#[derive(Debug, Clone)]
enum RouteTarget {
    Workers {
        model: Arc<ModelRoute>,
        version: ModelVersion,
    },
    Provider(Arc<Provider>),
}

/// How a request is answered.
#[derive(Debug, Clone)]
pub enum Plan {
    /// By one model.
    One(Route),
    /// By the first of several that can.
    Chain(Arc<Chain>),
}

impl Plan {
    /// The name that the caller asked for, or the model that was chosen.
    pub fn name(&self) -> &str {
        match self {
            Self::One(route) => route.name(),
            Self::Chain(chain) => &chain.name,
        }
    }
}

impl Route {
    fn workers(model: &Arc<ModelRoute>, version: ModelVersion) -> Self {
        Self {
            target: RouteTarget::Workers {
                model: model.clone(),
                version,
            },
            chosen: None,
        }
    }

    fn of_provider(provider: &Arc<Provider>) -> Self {
        Self {
            target: RouteTarget::Provider(provider.clone()),
            chosen: None,
        }
    }

    /// The model's name.
    pub fn name(&self) -> &str {
        match &self.target {
            RouteTarget::Workers { model, .. } => model.name.as_str(),
            RouteTarget::Provider(provider) => &provider.name,
        }
    }

    /// What the model does, for example `embedding`.
    pub fn task(&self) -> &str {
        match &self.target {
            RouteTarget::Workers { model, .. } => &model.task,
            RouteTarget::Provider(provider) => provider.task().as_str(),
        }
    }

    /// The workers that have the version, ready.
    pub fn upstreams(&self) -> &[Arc<Upstream>] {
        self.version().map_or(&[], VersionRoute::able)
    }

    /// What stands for the model version when its answers may be kept: its
    /// workers agree on it and say that it is deterministic.
    pub fn digest(&self) -> Option<&str> {
        if let RouteTarget::Provider(provider) = &self.target {
            return provider.digest.as_deref();
        }
        self.version()?.digest.as_deref()
    }

    /// The outside service that answers, where one does.
    pub fn provider(&self) -> Option<&Arc<Provider>> {
        match &self.target {
            RouteTarget::Provider(provider) => Some(provider),
            RouteTarget::Workers { .. } => None,
        }
    }

    /// The version's number; 0 for a model of a provider.
    pub fn number(&self) -> u64 {
        match &self.target {
            RouteTarget::Workers { version, .. } => version.number(),
            RouteTarget::Provider(_) => 0,
        }
    }

    fn version(&self) -> Option<&VersionRoute> {
        match &self.target {
            RouteTarget::Workers { model, version } => model.versions.get(version),
            RouteTarget::Provider(_) => None,
        }
    }
}

/// The table as it stands now.
#[derive(Debug, Default)]
pub struct Routes {
    table: RwLock<Arc<Table>>,
    changed: watch::Sender<u64>,
    /// Whether workers are configured, and not providers alone.
    workers: bool,
    /// Whether a worker has had a model ready since the start.
    seen_ready: AtomicBool,
    /// When the startup grace period ends.
    startup_ends: Option<Instant>,
    /// The models and chains of outside providers.
    pub catalogue: Arc<Catalogue>,
}

impl Routes {
    /// No workers yet, and whether there are to be any.
    pub fn new(catalogue: Arc<Catalogue>, workers: bool) -> Self {
        Self {
            catalogue,
            workers,
            startup_ends: Some(Instant::now() + STARTUP_GRACE),
            ..Self::default()
        }
    }

    /// The table as it stands now.
    pub fn table(&self) -> Arc<Table> {
        self.table
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Makes the table anew from what the workers report.
    pub fn rebuild(&self, upstreams: Vec<Arc<Upstream>>) {
        let table = Arc::new(build(upstreams));
        if table.readiness().any(|(_, ready)| ready) {
            self.seen_ready.store(true, Ordering::Release);
        }
        *self.table.write().unwrap_or_else(PoisonError::into_inner) = table;
        self.changed.send_modify(|count| *count += 1);
    }

    /// Tells when the table changes.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Waits a little until the table is as a caller expects it to be after
    /// what it has just changed.
    pub async fn settle(&self, settled: impl Fn(&Table) -> bool) {
        let mut changes = self.changes();
        let wait = async { while !settled(&self.table()) && changes.changed().await.is_ok() {} };
        // A worker that is slow to report is not the caller's fault.
        let _ = tokio::time::timeout(Duration::from_secs(2), wait).await;
    }

    /// How a request is answered. The model that is named must be one that the
    /// caller may call; where none is named, one of those is chosen.
    pub fn choose(&self, selector: &ModelSelector, caller: &Caller) -> Result<Plan, Error> {
        match selector {
            ModelSelector::Named {
                name,
                version,
                field,
            } => {
                caller.must_be_allowed(name)?;
                if let Some(chain) = self.catalogue.chains.get(name) {
                    chain.check_version(version)?;
                    return Ok(Plan::Chain(chain.clone()));
                }
                self.model(name, version, field).map(Plan::One)
            }
            ModelSelector::Tasks(tasks) => self.only_model(tasks, caller).map(Plan::One),
        }
    }

    /// An error unless a model, an alias or a version of it can be called. A
    /// chain can be, when one of its models can.
    pub fn ready(&self, name: &str, version: &str) -> Result<(), Error> {
        let Some(chain) = self.catalogue.chains.get(name) else {
            return self.model_ready(name, version);
        };
        chain.check_version(version)?;
        let mut ready = chain.models.iter().map(|name| self.model_ready(name, ""));
        let first = ready.next().unwrap_or_else(|| Err(no_worker_reachable()));
        ready.fold(first, Result::or)
    }

    fn model_ready(&self, name: &str, version: &str) -> Result<(), Error> {
        let route = self.model(name, version, "name")?;
        match route.provider() {
            Some(provider) if !provider.ready() => Err(Error::new(
                Kind::NotReady,
                format!("the circuit breaker of the provider of model '{name}' is open"),
            )),
            _ => Ok(()),
        }
    }

    /// Whether some model can respond. A gateway with workers and providers is
    /// not ready before the first worker, or the end of the startup grace
    /// period: it must not be sent calls for models that it does not know yet.
    pub fn ready_to_serve(&self) -> bool {
        let started =
            !self.workers || self.seen_ready.load(Ordering::Acquire) || !self.in_startup();
        started && self.readiness().into_values().any(|ready| ready)
    }

    fn in_startup(&self) -> bool {
        self.startup_ends.is_some_and(|end| Instant::now() < end)
    }

    /// Returns when the startup grace period is over.
    pub async fn startup_ended(&self) {
        match self.startup_ends {
            Some(end) if self.in_startup() => tokio::time::sleep_until(end).await,
            _ => std::future::pending().await,
        }
    }

    /// The models and chains by name, and whether one can be called. A model
    /// of a provider can, whatever the provider says: no outside service takes
    /// a gateway out of service.
    pub fn readiness(&self) -> BTreeMap<String, bool> {
        let mut readiness: BTreeMap<String, bool> = self.table().readiness().collect();
        let providers = self.catalogue.providers.keys();
        readiness.extend(providers.map(|name| (name.clone(), true)));
        for (name, chain) in &self.catalogue.chains {
            let ready = |name: &String| readiness.get(name) == Some(&true);
            let ready = chain.models.iter().any(ready);
            readiness.insert(name.clone(), ready);
        }
        readiness
    }

    /// A model of a chain, whoever asks: they may call the chain.
    pub fn member(&self, name: &str) -> Result<Route, Error> {
        self.model(name, "", "model_name")
    }

    /// A model of a provider or of workers.
    fn model(&self, name: &str, version: &str, field: &'static str) -> Result<Route, Error> {
        if let Some(provider) = self.catalogue.providers.get(name) {
            provider.check_version(version)?;
            return Ok(Route::of_provider(provider));
        }
        if !self.workers {
            ModelVersion::optional(version, "model_version")?;
            let name = ModelName::checked(name, field)?;
            return Err(Error::unknown_model(&name, None));
        }
        self.table().named(name, version, field)
    }

    /// The only model for one of these tasks that the caller may call.
    fn only_model(&self, tasks: &[Task], caller: &Caller) -> Result<Route, Error> {
        let table = self.table();
        let may = |name: &str| caller.tenant.may_call(name);
        let does = |route: &Route| {
            let mut tasks = tasks.iter();
            tasks.any(|task| task.as_str() == route.task()) && may(route.name())
        };
        let providers = &self.catalogue.providers;
        // A provider's model takes the place of a worker's of the same name.
        let own = |route: &Route| !providers.contains_key(route.name());
        let mut able: Vec<Route> = table.ready().filter(does).filter(own).collect();
        able.extend(providers.values().map(Route::of_provider).filter(does));
        able.sort_by(|a, b| a.name().cmp(b.name()));
        let task = if let [task] = tasks {
            task.as_str()
        } else {
            "text"
        };
        match able.as_slice() {
            [route] => Ok(Route {
                chosen: HeaderValue::try_from(route.name()).ok(),
                ..route.clone()
            }),
            [] if self.workers && !table.reachable() => Err(no_worker_reachable()),
            [] => Err(Error::no_model(task)),
            several => {
                let names: Vec<&str> = several.iter().map(Route::name).collect();
                Err(Error::several_models(task, &names))
            }
        }
    }
}

impl Table {
    fn reachable(&self) -> bool {
        self.upstreams.iter().any(|upstream| upstream.reachable())
    }

    /// The models by name, and whether one can be called.
    pub fn readiness(&self) -> impl Iterator<Item = (String, bool)> + '_ {
        self.models
            .iter()
            .map(|(name, route)| (name.clone(), route.newest().is_some()))
    }

    /// Who has a model version.
    pub fn named(&self, name: &str, version: &str, field: &'static str) -> Result<Route, Error> {
        let version = ModelVersion::optional(version, "model_version")?;
        let Some(model) = self.models.get(name) else {
            let name = ModelName::checked(name, field)?;
            if !self.reachable() {
                return Err(no_worker_reachable());
            }
            return Err(Error::unknown_model(&name, None));
        };
        let version = match version {
            None => model.newest().ok_or_else(|| model.not_ready())?,
            Some(version) => match model.versions.get(&version) {
                None => return Err(Error::unknown_model(&model.name, Some(version))),
                Some(route) if route.able().is_empty() => {
                    return Err(Error::new(
                        Kind::NotReady,
                        format!("version {version} of model '{name}' is not ready"),
                    ));
                }
                Some(_) => version,
            },
        };
        Ok(Route::workers(model, version))
    }

    /// The newest ready version of each model.
    pub fn ready(&self) -> impl Iterator<Item = Route> + '_ {
        self.models
            .values()
            .filter_map(|model| Some(Route::workers(model, model.newest()?)))
    }
}

/// No worker can be reached at all.
pub fn no_worker_reachable() -> Error {
    Error::new(Kind::NotReady, "no worker is reachable")
}

impl VersionRoute {
    fn able(&self) -> &[Arc<Upstream>] {
        if self.upstreams.is_empty() {
            return &self.draining;
        }
        &self.upstreams
    }
}

impl ModelRoute {
    fn newest(&self) -> Option<ModelVersion> {
        let ready = |(version, route): (&ModelVersion, &VersionRoute)| {
            (!route.able().is_empty()).then_some(*version)
        };
        self.versions.iter().rev().find_map(ready)
    }

    /// Why no version can be called.
    fn not_ready(&self) -> Error {
        let name = &self.name;
        if self.versions.values().any(|route| route.unreachable) {
            return Error::new(
                Kind::NotReady,
                format!("no worker with model '{name}' is reachable"),
            );
        }
        Error::new(
            Kind::NotFound,
            format!("model '{name}' has no ready version"),
        )
    }
}

/// A model that is known stays known while its workers are out of reach: its
/// callers are told to try again, not that there is no such model.
fn build(upstreams: Vec<Arc<Upstream>>) -> Table {
    let mut models: HashMap<String, ModelRoute> = HashMap::new();
    for upstream in &upstreams {
        let report = upstream.report();
        let reachable = upstream.reachable();
        for reported in &report.models {
            let name = ModelName::checked(&reported.name, "name");
            let version = ModelVersion::checked(&reported.version, "version");
            // A worker of another make may have names that no caller can use.
            let (Ok(name), Ok(version)) = (name, version) else {
                continue;
            };
            let model = models
                .entry(name.to_string())
                .or_insert_with(|| ModelRoute {
                    name,
                    task: String::new(),
                    versions: BTreeMap::new(),
                });
            if !reported.task.is_empty() {
                model.task.clone_from(&reported.task);
            }
            let route = model.versions.entry(version).or_default();
            if reported.ready && reachable {
                let digest = (reported.deterministic && !reported.digest.is_empty())
                    .then(|| Arc::from(reported.digest.as_str()));
                route.digest = match (route.has_report, route.digest.take()) {
                    (true, agreed) if agreed != digest => None,
                    _ => digest,
                };
                route.has_report = true;
            }
            match (reported.ready, reachable, report.draining) {
                (true, true, false) => route.upstreams.push(upstream.clone()),
                (true, true, true) => route.draining.push(upstream.clone()),
                (true, false, _) => route.unreachable = true,
                (false, ..) => {}
            }
        }
    }
    Table {
        models: models
            .into_iter()
            .map(|(name, model)| (name, Arc::new(model)))
            .collect(),
        upstreams,
    }
}
