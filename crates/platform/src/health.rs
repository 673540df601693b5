//! `grpc.health.v1`: unknown services are NOT_FOUND when checked and
//! SERVICE_UNKNOWN when watched, and the empty name follows readiness.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;

use futures::stream::{self, Stream};
use tokio::sync::{Semaphore, watch};
use tonic::{Request, Response, Status};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_server::{Health as HealthService, HealthServer};
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

/// A service that is SERVING as long as the process runs: for liveness probes.
pub const LIVE: &str = "andon.live";

/// A request holds the name of a service. Health is served without
/// authentication, so its requests are kept small.
const MESSAGE_BYTES_MAX: usize = 1024;
/// Open watches: they have no deadline.
const WATCHES_MAX: usize = 1024;

/// The serving status of each name. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Health {
    names: Arc<watch::Sender<Names>>,
    watches: Arc<Semaphore>,
}

#[derive(Debug, PartialEq)]
struct Names {
    serving: BTreeMap<String, bool>,
    /// The server drains, and ends the watches: they would hold it open.
    closed: bool,
}

impl Default for Health {
    fn default() -> Self {
        let names = [(LIVE.to_owned(), true), (String::new(), false)];
        Self {
            names: Arc::new(watch::Sender::new(Names {
                serving: names.into(),
                closed: false,
            })),
            watches: Arc::new(Semaphore::new(WATCHES_MAX)),
        }
    }
}

impl Health {
    /// Replaces every name but [`LIVE`], and notifies the watches of changed
    /// names. `ready` is the status of the empty name and of each of `services`.
    pub fn replace(
        &self,
        ready: bool,
        services: &[&str],
        models: impl IntoIterator<Item = (String, bool)>,
    ) {
        let mut names: BTreeMap<String, bool> = models.into_iter().collect();
        names.extend(services.iter().map(|name| ((*name).to_owned(), ready)));
        names.insert(String::new(), ready);
        names.insert(LIVE.to_owned(), true);
        self.names.send_if_modified(|current| {
            let changed = current.serving != names;
            current.serving = names;
            changed
        });
    }

    /// Ends every watch.
    pub fn close(&self) {
        self.names.send_modify(|names| names.closed = true);
    }

    /// Whether the empty name is serving.
    pub fn ready(&self) -> bool {
        self.serving("")
    }

    /// Whether a name is known and serving.
    pub fn serving(&self, name: &str) -> bool {
        self.status(name) == Some(true)
    }

    fn status(&self, name: &str) -> Option<bool> {
        self.names.borrow().serving.get(name).copied()
    }

    /// The service to route `grpc.health.v1.Health` to.
    pub fn service(&self) -> HealthServer<Self> {
        HealthServer::new(self.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX)
    }
}

fn response(serving: Option<bool>) -> HealthCheckResponse {
    let status = match serving {
        Some(true) => ServingStatus::Serving,
        Some(false) => ServingStatus::NotServing,
        None => ServingStatus::ServiceUnknown,
    };
    HealthCheckResponse {
        status: status.into(),
    }
}

#[tonic::async_trait]
impl HealthService for Health {
    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        let name = request.into_inner().service;
        match self.status(&name) {
            Some(serving) => Ok(Response::new(response(Some(serving)))),
            None => Err(Status::not_found("unknown service")),
        }
    }

    type WatchStream =
        Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send + 'static>>;

    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let name = request.into_inner().service;
        let permit = self.watches.clone().try_acquire_owned();
        let permit = permit.map_err(|_| Status::unavailable("too many open watches"))?;
        let names = self.names.subscribe();
        let statuses = stream::unfold(
            (names, name, None::<Option<bool>>, permit),
            |(mut names, name, sent, permit)| async move {
                loop {
                    let (now, closed) = {
                        let names = names.borrow_and_update();
                        (names.serving.get(&name).copied(), names.closed)
                    };
                    if closed {
                        return None;
                    }
                    if sent != Some(now) {
                        return Some((Ok(response(now)), (names, name, Some(now), permit)));
                    }
                    names.changed().await.ok()?;
                }
            },
        );
        Ok(Response::new(Box::pin(statuses)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn open_watches_are_bounded() {
        let health = Health::default();
        let watch = || health.watch(Request::new(HealthCheckRequest::default()));
        let mut open = Vec::new();
        for _ in 0..WATCHES_MAX {
            open.push(watch().await.unwrap());
        }
        let refused = watch().await.err().map(|status| status.code());
        assert_eq!(refused, Some(tonic::Code::Unavailable));
        open.pop();
        assert!(watch().await.is_ok());
    }
}
