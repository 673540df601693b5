//! `grpc.health.v1`: unknown services are NOT_FOUND when checked and
//! SERVICE_UNKNOWN when watched, and the empty name follows readiness.

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use tokio::sync::watch;
use tonic::Status;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

use crate::grpc::{Call, MessageLimits, Metadata, Reply, decode, frame, reply, stream};
use crate::streams::Streams;

/// A service that is SERVING as long as the process runs: for liveness probes.
pub const LIVE: &str = "andon.live";

/// The limits of requests, which hold the name of a service. Health is served
/// without authentication, so they are small, and share no budget with others.
static LIMITS: LazyLock<MessageLimits> = LazyLock::new(|| MessageLimits::new(1024, 16 << 20));

/// The serving status of each name. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Health(Arc<watch::Sender<Names>>);

#[derive(Debug, PartialEq)]
struct Names {
    serving: BTreeMap<String, bool>,
    /// The server drains, and ends the watches: they would hold it open.
    closed: bool,
}

impl Default for Health {
    fn default() -> Self {
        let names = [(LIVE.to_owned(), true), (String::new(), false)];
        Self(Arc::new(watch::Sender::new(Names {
            serving: names.into(),
            closed: false,
        })))
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
        self.0.send_if_modified(|current| {
            let changed = current.serving != names;
            current.serving = names;
            changed
        });
    }

    /// Ends every watch.
    pub fn close(&self) {
        self.0.send_modify(|names| names.closed = true);
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
        self.0.borrow().serving.get(name).copied()
    }

    /// Serves a call of `grpc.health.v1.Health`.
    pub(crate) async fn serve(&self, call: Call, streams: &Streams) -> Result<Reply, Status> {
        match call.path() {
            "/grpc.health.v1.Health/Check" => {
                let name = service_of(call).await?;
                let serving = self.status(&name);
                let serving = serving.ok_or_else(|| Status::not_found("unknown service"))?;
                Ok(reply(frame(&response(Some(serving))), Metadata::new()))
            }
            "/grpc.health.v1.Health/Watch" => {
                // Where no stream may wait, the watch answers and ends: the caller
                // knows the present state, and watches again.
                let open = streams.open(&call.peer, &call.peer.holder());
                let statuses = self.watch(service_of(call).await?);
                Ok(stream(match open {
                    Ok(open) => open.hold(statuses),
                    Err(_) => statuses.take(1).boxed(),
                }))
            }
            _ => Err(Status::unimplemented("unknown method")),
        }
    }

    /// The status of a name, now and whenever it changes.
    fn watch(&self, name: String) -> BoxStream<'static, Result<Bytes, Status>> {
        let state = (self.0.subscribe(), name, None::<Option<bool>>);
        stream::unfold(state, |(mut names, name, sent)| async move {
            loop {
                let (now, closed) = {
                    let names = names.borrow_and_update();
                    (names.serving.get(&name).copied(), names.closed)
                };
                if closed {
                    return None;
                }
                if sent != Some(now) {
                    return Some((Ok(frame(&response(now))), (names, name, Some(now))));
                }
                names.changed().await.ok()?;
            }
        })
        .boxed()
    }
}

/// The name that a request asks for.
async fn service_of(call: Call) -> Result<String, Status> {
    let message = call.into_messages(&LIMITS).only().await?;
    Ok(decode::<HealthCheckRequest>(message.bytes())?.service)
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
