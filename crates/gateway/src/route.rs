//! Routing: which model version responds to a request, and which workers have
//! it. The routing table is rebuilt whenever a worker comes, goes or serves other
//! models.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use http::HeaderValue;
use protocol::{Error, Kind, ModelName, ModelVersion, Task};
use providers::{Catalogue, Chain, Provider};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::policy::Caller;
use crate::request::ModelSelector;
use crate::upstream::Upstream;

/// How long a gateway with workers and providers waits for its first worker before
/// it is ready.
const STARTUP_GRACE: Duration = Duration::from_secs(10);

/// For how long a model whose workers are gone is known: its callers try again,
/// where NOT_FOUND would end their work.
const KNOWN: Duration = Duration::from_secs(3600);

/// The routing table: the models of all workers.
#[derive(Debug, Default)]
pub struct Table {
    models: HashMap<String, Arc<ModelRoute>>,
    /// Every worker, reachable or not.
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
    /// The workers on which it is ready.
    upstreams: Vec<Arc<Upstream>>,
    /// Those of them that are draining: used only when there is no other.
    draining: Vec<Arc<Upstream>>,
    /// Whether a worker on which it was ready is unreachable.
    unreachable: bool,
    /// Whether a worker reads its files.
    loading: bool,
    /// Whether a worker could not load it.
    failed: bool,
    /// The digest that all its workers report, when it is deterministic.
    digest: Option<Arc<str>>,
    /// Whether a worker has reported a digest.
    has_report: bool,
}

/// The model version that responds to a request.
#[derive(Debug, Clone)]
pub struct Route {
    target: RouteTarget,
    /// The name of the model, for the metadata of a call that names none.
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

/// Which models may respond to a request.
#[derive(Debug, Clone)]
pub enum Plan {
    /// One model.
    One(Route),
    /// The first model of a fallback chain that can respond.
    Chain(Arc<Chain>),
}

impl Plan {
    /// The name in the request, or the name of the chosen model.
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

    /// The name of the model.
    pub fn name(&self) -> &str {
        match &self.target {
            RouteTarget::Workers { model, .. } => model.name.as_str(),
            RouteTarget::Provider(provider) => &provider.name,
        }
    }

    /// The task of the model, for example `embedding`.
    pub fn task(&self) -> &str {
        match &self.target {
            RouteTarget::Workers { model, .. } => &model.task,
            RouteTarget::Provider(provider) => provider.task().as_str(),
        }
    }

    /// The workers on which the version is ready.
    pub fn upstreams(&self) -> &[Arc<Upstream>] {
        self.version().map_or(&[], VersionRoute::ready)
    }

    /// The digest of the model version, when its responses may be cached: its
    /// workers report the same digest, and that it is deterministic.
    pub fn digest(&self) -> Option<&str> {
        if let RouteTarget::Provider(provider) = &self.target {
            return provider.digest.as_deref();
        }
        self.version()?.digest.as_deref()
    }

    /// The provider, for a model of an outside service.
    pub fn provider(&self) -> Option<&Arc<Provider>> {
        match &self.target {
            RouteTarget::Provider(provider) => Some(provider),
            RouteTarget::Workers { .. } => None,
        }
    }

    /// The number of the version; 0 for a model of a provider.
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

/// The current routing table, and the models of providers.
#[derive(Debug, Default)]
pub struct Routes {
    table: RwLock<Arc<Table>>,
    /// When each model was last ready on a worker, as far as it was within
    /// [`KNOWN`].
    known: Mutex<HashMap<String, Instant>>,
    changed: watch::Sender<u64>,
    /// Whether workers are configured, not only providers.
    workers: bool,
    /// Whether a model has been ready on a worker since the start.
    seen_ready: AtomicBool,
    /// When the startup grace period ends.
    startup_ends: Option<Instant>,
    /// The models and chains of outside providers.
    pub catalogue: Arc<Catalogue>,
}

impl Routes {
    /// An empty table; `workers` is whether workers are configured.
    pub fn new(catalogue: Arc<Catalogue>, workers: bool) -> Self {
        Self {
            catalogue,
            workers,
            startup_ends: Some(Instant::now() + STARTUP_GRACE),
            ..Self::default()
        }
    }

    /// A snapshot of the routing table.
    pub fn table(&self) -> Arc<Table> {
        self.table
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Rebuilds the table from the reports of the workers.
    pub fn rebuild(&self, upstreams: Vec<Arc<Upstream>>) {
        let table = Arc::new(build(upstreams));
        if table.readiness().any(|(_, ready)| ready) {
            self.seen_ready.store(true, Ordering::Release);
        }
        self.remember(&self.table(), &table);
        *self.table.write().unwrap_or_else(PoisonError::into_inner) = table;
        self.changed.send_modify(|count| *count += 1);
    }

    /// Notes which models are ready, or were until now.
    fn remember(&self, before: &Table, after: &Table) {
        let now = Instant::now();
        let mut known = self.known();
        known.retain(|_, seen| now.duration_since(*seen) < KNOWN);
        for (name, ready) in before.readiness().chain(after.readiness()) {
            if ready {
                known.insert(name, now);
            }
        }
    }

    fn known(&self) -> MutexGuard<'_, HashMap<String, Instant>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets a model that was unloaded: it is not expected to come back.
    pub fn forget(&self, name: &str) {
        self.known().remove(name);
    }

    /// Whether the name is that of a model or chain that is served, or was until
    /// lately. What a caller sends is no label of a metric otherwise.
    pub fn is_known(&self, name: &str) -> bool {
        self.catalogue.has(name) || self.table().models.contains_key(name) || self.was_ready(name)
    }

    fn was_ready(&self, name: &str) -> bool {
        let seen = self.known().get(name).copied();
        seen.is_some_and(|seen| seen.elapsed() < KNOWN)
    }

    /// A receiver that is notified when the table changes.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Waits up to two seconds until the table shows a change that a caller has
    /// made.
    pub async fn settle(&self, settled: impl Fn(&Table) -> bool) {
        let mut changes = self.changes();
        let wait = async { while !settled(&self.table()) && changes.changed().await.is_ok() {} };
        // A worker that is slow to report is not the caller's fault.
        let _ = tokio::time::timeout(Duration::from_secs(2), wait).await;
    }

    /// Chooses the models that may respond to a request. The caller must be allowed
    /// to call the model that it names. When it names none, the only model for the
    /// task that it may call is chosen.
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

    /// An error unless a model, alias or version is ready. A chain is ready when one
    /// of its models is.
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
    /// period: it must receive no calls for models that are not in its table yet.
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

    /// The models and chains by name, and whether each is ready. A model of a
    /// provider always is: no outside service takes a gateway out of service.
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

    /// A model of a chain, without a check of the caller: it may call the chain.
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
        let table = self.table();
        let route = table.named(name, version, field);
        if route.is_err() && !table.models.contains_key(name) && self.was_ready(name) {
            return Err(model_unreachable(name));
        }
        route
    }

    /// The only model for one of these tasks that the caller may call.
    fn only_model(&self, tasks: &[Task], caller: &Caller) -> Result<Route, Error> {
        let table = self.table();
        let allowed = |name: &str| caller.tenant.may_call(name);
        let matches = |route: &Route| {
            let mut tasks = tasks.iter();
            tasks.any(|task| task.as_str() == route.task()) && allowed(route.name())
        };
        let providers = &self.catalogue.providers;
        // A model of a provider replaces a model of workers with the same name.
        let of_workers = |route: &Route| !providers.contains_key(route.name());
        let mut able: Vec<Route> = table.ready().filter(matches).filter(of_workers).collect();
        able.extend(providers.values().map(Route::of_provider).filter(matches));
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
            // What a model is for is known when it is loaded.
            [] if table.loading() => Err(Error::no_model_yet(task)),
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

    /// Whether a model that is not ready is being loaded.
    fn loading(&self) -> bool {
        let mut models = self.models.values();
        models.any(|model| {
            model.newest().is_none() && model.versions.values().any(|route| route.loading)
        })
    }

    /// The models by name, and whether each is ready.
    pub fn readiness(&self) -> impl Iterator<Item = (String, bool)> + '_ {
        self.models
            .iter()
            .map(|(name, route)| (name.clone(), route.newest().is_some()))
    }

    /// The route to a model version; without a version, to the newest that is ready.
    pub fn named(&self, name: &str, version: &str, field: &'static str) -> Result<Route, Error> {
        let version = ModelVersion::optional(version, "model_version")?;
        let Some(model) = self.models.get(name) else {
            let name = ModelName::checked(name, field)?;
            if !self.reachable() {
                return Err(no_worker_reachable());
            }
            let mut upstreams = self.upstreams.iter();
            if upstreams.any(|upstream| upstream.reachable() && !upstream.has_reported()) {
                // It is connected, and tells what it has in a moment.
                return Err(Error::not_ready("a worker has not reported its models yet"));
            }
            return Err(Error::unknown_model(&name, None));
        };
        let version = match version {
            None => model.newest().ok_or_else(|| model.not_ready())?,
            Some(version) => match model.versions.get(&version) {
                None => return Err(Error::unknown_model(&model.name, Some(version))),
                Some(route) if route.ready().is_empty() => {
                    let state = if route.loading {
                        "LOADING"
                    } else {
                        "not ready"
                    };
                    return Err(Error::not_ready(format!(
                        "version {version} of model '{name}' is {state}"
                    )));
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

/// The error when no worker is reachable.
pub fn no_worker_reachable() -> Error {
    Error::not_ready("no worker is reachable")
}

/// The error when no worker that has the model is reachable.
fn model_unreachable(name: &str) -> Error {
    Error::not_ready(format!("no worker with model '{name}' is reachable"))
}

impl VersionRoute {
    fn ready(&self) -> &[Arc<Upstream>] {
        if self.upstreams.is_empty() {
            return &self.draining;
        }
        &self.upstreams
    }
}

impl ModelRoute {
    fn newest(&self) -> Option<ModelVersion> {
        let ready = |(version, route): (&ModelVersion, &VersionRoute)| {
            (!route.ready().is_empty()).then_some(*version)
        };
        self.versions.iter().rev().find_map(ready)
    }

    /// The error when no version is ready.
    fn not_ready(&self) -> Error {
        let name = &self.name;
        let any = |is: fn(&VersionRoute) -> bool| self.versions.values().any(is);
        if any(|route| route.loading) {
            return Error::not_ready(format!("model '{name}' is LOADING"));
        }
        if any(|route| route.unreachable) {
            return model_unreachable(name.as_str());
        }
        if any(|route| route.failed) {
            return Error::not_ready(format!("model '{name}' is UNAVAILABLE"));
        }
        Error::new(
            Kind::NotFound,
            format!("model '{name}' has no ready version"),
        )
    }
}

/// Builds the table. A model stays in it while its workers are unreachable: its
/// callers get an error to retry, not that there is no such model.
fn build(upstreams: Vec<Arc<Upstream>>) -> Table {
    let mut models: HashMap<String, ModelRoute> = HashMap::new();
    for upstream in &upstreams {
        let report = upstream.report();
        let reachable = upstream.reachable();
        for reported in &report.models {
            let name = ModelName::checked(&reported.name, "name");
            let version = ModelVersion::checked(&reported.version, "version");
            // Another implementation may have names that no caller can use.
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
                    (true, reported) if reported != digest => None,
                    _ => digest,
                };
                route.has_report = true;
            }
            route.loading |= reported.loading;
            route.failed |= reported.failed;
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

#[cfg(test)]
mod tests {
    use platform::channel::Target;
    use platform::metrics::Metrics;
    use platform::watchdog::Starvation;
    use protocol::andon::v1::{ModelReport, WatchReportResponse};

    use super::*;
    use crate::upstream::UpstreamMetrics;

    /// A worker that is connected and reports these models, ready or not.
    fn worker(models: &[(&str, bool)]) -> Arc<Upstream> {
        let metrics = UpstreamMetrics::register(&Metrics::default());
        let target = Target::Tcp("a".to_owned());
        let upstream = Upstream::new(target, metrics.of("a".to_owned()), Starvation::none());
        upstream.set_channels(vec![Vec::new()]);
        let report = |(name, ready): &(&str, bool)| ModelReport {
            name: (*name).to_owned(),
            version: "1".to_owned(),
            ready: *ready,
            ..Default::default()
        };
        upstream.set_report(WatchReportResponse {
            draining: false,
            models: models.iter().map(report).collect(),
        });
        Arc::new(upstream)
    }

    fn refusal(routes: &Routes, name: &str) -> (Kind, Option<Duration>) {
        let error = routes.member(name).unwrap_err();
        (error.kind(), error.retry_after())
    }

    #[tokio::test(start_paused = true)]
    async fn a_model_whose_workers_are_gone_is_unavailable_for_an_hour() {
        let routes = Routes::new(Arc::default(), true);
        let (minilm, digits) = (worker(&[("minilm", true)]), worker(&[("digits", true)]));
        routes.rebuild(vec![minilm, digits.clone()]);
        assert!(routes.member("minilm").is_ok());
        // However long it has been ready.
        tokio::time::advance(2 * KNOWN).await;
        routes.rebuild(vec![digits.clone()]);
        let unavailable = (Kind::NotReady, Some(Duration::from_secs(1)));
        assert_eq!(refusal(&routes, "minilm"), unavailable);
        assert!(routes.is_known("minilm"), "its label stays");
        assert_eq!(refusal(&routes, "other"), (Kind::NotFound, None));
        assert!(!routes.is_known("other"), "a caller makes no label");
        tokio::time::advance(KNOWN - Duration::from_secs(1)).await;
        assert_eq!(refusal(&routes, "minilm"), unavailable);
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(refusal(&routes, "minilm"), (Kind::NotFound, None));
        assert!(routes.member("digits").is_ok());
        // Without any worker as well.
        routes.rebuild(Vec::new());
        assert_eq!(refusal(&routes, "digits"), unavailable);
    }

    #[tokio::test(start_paused = true)]
    async fn a_model_that_was_unloaded_is_not_found() {
        let routes = Routes::new(Arc::default(), true);
        let other = worker(&[("digits", true)]);
        routes.rebuild(vec![worker(&[("minilm", true)]), other.clone()]);
        routes.rebuild(vec![worker(&[("minilm", false)]), other.clone()]);
        assert_eq!(refusal(&routes, "minilm").0, Kind::NotFound);
        routes.forget("minilm");
        routes.rebuild(vec![other]);
        assert_eq!(refusal(&routes, "minilm").0, Kind::NotFound);
    }
}
