//! Load that counts what was lost.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::Result;
use protocol::inference::ModelInferRequest;
use tokio::task::JoinSet;

use crate::calls::{self, Client};

/// The result of a load.
#[derive(Debug, Default, Clone)]
pub struct Outcome {
    /// Requests that succeeded.
    pub succeeded: usize,
    /// Requests that failed, by their error.
    pub failed: BTreeMap<String, usize>,
}

/// A load that is running.
#[derive(Debug)]
pub struct Load {
    slots: JoinSet<Outcome>,
    /// Requests that have succeeded so far.
    pub succeeded: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
}

impl Load {
    /// Sends a request again and again with so many in flight, until it is
    /// finished or has sent so many.
    pub fn start(
        client: &Client,
        request: &ModelInferRequest,
        in_flight: usize,
        requests_max: usize,
    ) -> Self {
        let (succeeded, stop) = (
            Arc::new(AtomicUsize::new(0)),
            Arc::new(AtomicBool::new(false)),
        );
        let sent = Arc::new(AtomicUsize::new(0));
        let mut slots = JoinSet::new();
        for _ in 0..in_flight {
            let (client, request) = (client.clone(), request.clone());
            let (succeeded, stop, sent) = (succeeded.clone(), stop.clone(), sent.clone());
            slots.spawn(async move {
                let mut outcome = Outcome::default();
                while !stop.load(Ordering::Relaxed)
                    && sent.fetch_add(1, Ordering::Relaxed) < requests_max
                {
                    let timeout = Duration::from_secs(20);
                    match calls::infer(&client, request.clone(), timeout).await {
                        Ok(_) => {
                            outcome.succeeded += 1;
                            succeeded.fetch_add(1, Ordering::Relaxed);
                        }
                        Err(status) => {
                            let error = format!("{:?}: {}", status.code(), status.message());
                            *outcome.failed.entry(error).or_default() += 1;
                        }
                    }
                }
                outcome
            });
        }
        Self {
            slots,
            succeeded,
            stop,
        }
    }

    /// Waits until so many succeeded.
    pub async fn reached(&self, succeeded: usize) -> Result<()> {
        crate::until(Duration::from_secs(120), "the load goes on", || async {
            Ok(self.succeeded.load(Ordering::Relaxed) >= succeeded)
        })
        .await
    }

    /// Waits for the last request.
    pub async fn finished(mut self) -> Outcome {
        let mut all = Outcome::default();
        while let Some(outcome) = self.slots.join_next().await {
            let outcome = outcome.unwrap_or_default();
            all.succeeded += outcome.succeeded;
            for (error, count) in outcome.failed {
                *all.failed.entry(error).or_default() += count;
            }
        }
        all
    }

    /// Sends no more and waits for the requests in flight.
    pub async fn stopped(self) -> Outcome {
        self.stop.store(true, Ordering::Relaxed);
        self.finished().await
    }
}
