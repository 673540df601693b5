//! Reports to gateways: the models of the worker and its load.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt};
use platform::drain::{Drain, Phase};
use platform::grpc::frame;
use protocol::andon::v1::{ModelReport, WatchReportResponse};
use tokio::time::Instant;
use tonic::Status;

use crate::repository::{Repository, State};

/// How often the load is read.
const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// The longest time between reports: a longer silence means that the worker is
/// gone.
const HEARTBEAT: Duration = Duration::from_secs(1);

/// The reports of a worker, from now until it closes.
pub fn watch(
    repository: Arc<Repository>,
    drain: Drain,
) -> BoxStream<'static, Result<Bytes, Status>> {
    let state = (repository, drain, None::<(WatchReportResponse, Instant)>);
    stream::unfold(state, |(repository, mut drain, mut sent)| async move {
        let mut changes = repository.changes();
        let report = loop {
            let report = make(&repository, &drain);
            let due = sent
                .as_ref()
                .is_none_or(|(last, at)| *last != report || at.elapsed() >= HEARTBEAT);
            if due {
                break report;
            }
            let mut closing = drain.clone();
            tokio::select! {
                () = closing.reached(Phase::Closing) => return None,
                _ = changes.changed() => {}
                // The drain's first phase must be reported at once.
                () = drain.reached(Phase::Draining), if !drain.draining() => {}
                () = tokio::time::sleep(POLL_INTERVAL) => {}
            }
        };
        let framed = frame(&report);
        sent = Some((report, Instant::now()));
        Some((Ok(framed), (repository, drain, sent)))
    })
    .boxed()
}

fn make(repository: &Repository, drain: &Drain) -> WatchReportResponse {
    WatchReportResponse {
        draining: drain.draining(),
        models: repository
            .states()
            .into_iter()
            .map(|(name, version, state)| {
                let model = match &state {
                    State::Ready(model) => Some(model),
                    _ => None,
                };
                let (rows, wait) = model.map(|model| model.load()).unwrap_or_default();
                ModelReport {
                    name: name.to_string(),
                    version: version.to_string(),
                    ready: model.is_some(),
                    loading: matches!(state, State::Loading),
                    failed: matches!(state, State::Unavailable(_)),
                    task: model.map_or_else(String::new, |m| m.task().to_string()),
                    digest: model.map_or_else(String::new, |m| m.digest.clone()),
                    generation: model.map_or(0, |m| m.generation),
                    deterministic: model.is_some_and(|m| m.limits.deterministic),
                    queue_rows: rows as u64,
                    token_ns: model.map_or(0, |m| m.token_ns()),
                    queue_wait_us: u64::try_from(wait.as_micros()).unwrap_or(u64::MAX),
                }
            })
            .collect(),
    }
}
