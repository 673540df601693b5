//! Refuses calls at once when the gateway holds as many as it may.

use std::sync::Arc;
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use protocol::Error;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// How many calls may be under way.
#[derive(Debug)]
pub struct Shed {
    places: Arc<Semaphore>,
    calls_max: usize,
    shed: Counter,
}

impl Shed {
    /// At most so many calls; those refused are counted.
    pub fn new(calls_max: usize, shed: Counter) -> Self {
        Self {
            places: Arc::new(Semaphore::new(calls_max)),
            calls_max,
            shed,
        }
    }

    /// Calls under way.
    pub fn in_flight(&self) -> usize {
        self.calls_max - self.places.available_permits()
    }

    /// A place that is held until the reply has been sent.
    pub fn admit(&self) -> Result<OwnedSemaphorePermit, Error> {
        self.places.clone().try_acquire_owned().map_err(|_| {
            self.shed.inc();
            Error::overloaded(
                format!("the gateway holds {} calls already", self.calls_max),
                Duration::from_millis(100),
            )
        })
    }
}
