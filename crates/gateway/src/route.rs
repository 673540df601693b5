//! Which model version answers a request, and which workers have it. The table
//! is made anew whenever a worker comes, goes or serves other models.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use http::HeaderValue;
use protocol::{Error, Kind, MODEL_KEY, ModelName, ModelVersion};
use tokio::sync::watch;

use crate::service::{Request, Wanted};
use crate::upstream::Upstream;

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
    /// Who can answer.
    upstreams: Vec<Arc<Upstream>>,
    /// Who can answer but is about to end: asked only when nobody else can.
    leaving: Vec<Arc<Upstream>>,
    /// Whether a worker that has it ready is out of reach or leaving.
    lost: bool,
}

/// Who can answer one request.
#[derive(Debug, Clone)]
pub struct Route {
    model: Arc<ModelRoute>,
    version: ModelVersion,
    /// The model's name for the metadata of a call that named none.
    pub chosen: Option<HeaderValue>,
}

impl Route {
    /// The model's name.
    pub fn name(&self) -> &str {
        self.model.name.as_str()
    }

    /// The workers that have the version, ready.
    pub fn upstreams(&self) -> &[Arc<Upstream>] {
        self.model
            .versions
            .get(&self.version)
            .map_or(&[], VersionRoute::able)
    }
}

/// The table as it stands now.
#[derive(Debug, Default)]
pub struct Routes {
    table: RwLock<Arc<Table>>,
    changed: watch::Sender<u64>,
}

impl Routes {
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

    /// The model version for a request, and who has it.
    pub fn choose(&self, request: &Request) -> Result<Route, Error> {
        let table = self.table();
        match &request.wanted {
            Wanted::Named {
                name,
                version,
                field,
            } => table.named(name, version, field),
            Wanted::Doing(tasks) => table.doing(tasks),
        }
    }
}

impl Table {
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
            if !self.upstreams.iter().any(|upstream| upstream.reachable()) {
                return Err(nobody());
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
        Ok(Route {
            model: model.clone(),
            version,
            chosen: None,
        })
    }

    /// The only model that does one of these tasks.
    fn doing(&self, tasks: &[&str]) -> Result<Route, Error> {
        let mut able: Vec<(&Arc<ModelRoute>, ModelVersion)> = self
            .models
            .values()
            .filter(|model| tasks.contains(&model.task.as_str()))
            .filter_map(|model| Some((model, model.newest()?)))
            .collect();
        able.sort_by(|(a, _), (b, _)| a.name.cmp(&b.name));
        let task = if let [task] = tasks { task } else { "text" };
        match able.as_slice() {
            [(model, version)] => Ok(Route {
                model: (*model).clone(),
                version: *version,
                chosen: HeaderValue::try_from(model.name.as_str()).ok(),
            }),
            [] if !self.upstreams.iter().any(|upstream| upstream.reachable()) => Err(nobody()),
            [] => Err(Error::new(
                Kind::NotFound,
                format!("no model that does {task} is ready"),
            )),
            several => {
                let names: Vec<&str> = several.iter().map(|(m, _)| m.name.as_str()).collect();
                Err(Error::invalid(
                    MODEL_KEY,
                    format!(
                        "several models do {task}: name one of {} in the metadata",
                        names.join(", ")
                    ),
                ))
            }
        }
    }
}

/// No worker can be reached at all.
pub fn nobody() -> Error {
    Error::new(Kind::NotReady, "no worker can be reached")
}

impl VersionRoute {
    fn able(&self) -> &[Arc<Upstream>] {
        if self.upstreams.is_empty() {
            return &self.leaving;
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
        if self.versions.values().any(|route| route.lost) {
            return Error::new(
                Kind::NotReady,
                format!("no worker that has model '{name}' can be reached"),
            );
        }
        Error::new(
            Kind::NotFound,
            format!("model '{name}' has no version that is ready"),
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
            match (reported.ready, reachable, report.draining) {
                (true, true, false) => route.upstreams.push(upstream.clone()),
                (true, true, true) => route.leaving.push(upstream.clone()),
                (true, false, _) => route.lost = true,
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
