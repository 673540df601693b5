//! The models that have a version which could not be loaded, and when each is
//! tried again.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use protocol::ModelName;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

/// The first wait before a retry; it doubles.
const BACKOFF: Duration = Duration::from_secs(1);
/// The longest wait. To read the files of a large model takes seconds.
const BACKOFF_MAX: Duration = Duration::from_secs(30);

/// The models to try again.
#[derive(Debug, Default)]
pub struct Retries {
    models: Mutex<BTreeMap<ModelName, Retry>>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Retry {
    /// None while a retry runs.
    at: Option<Instant>,
    backoff: Duration,
    reason: String,
}

impl Retries {
    /// Whether a model is to be tried again.
    pub fn has(&self, name: &ModelName) -> bool {
        self.lock().contains_key(name)
    }

    /// Notes why a model could not be loaded; true when it is not what was noted
    /// before.
    pub fn is_new(&self, name: &ModelName, reason: &str) -> bool {
        let mut models = self.lock();
        let retry = models.entry(name.clone()).or_default();
        let is_new = retry.reason != reason;
        reason.clone_into(&mut retry.reason);
        is_new
    }

    /// Notes that a model could not be loaded: it is tried again, each time later.
    pub fn failed(&self, name: &ModelName) {
        let mut models = self.lock();
        let retry = models.entry(name.clone()).or_default();
        retry.backoff = (retry.backoff * 2).clamp(BACKOFF, BACKOFF_MAX);
        retry.at = Some(Instant::now() + retry.backoff);
        drop(models);
        self.changed.notify_one();
    }

    /// Tries a model no more.
    pub fn forget(&self, name: &ModelName) {
        self.lock().remove(name);
    }

    /// Waits for the next model to try, which is then not due before it fails
    /// again.
    pub async fn due(&self) -> ModelName {
        loop {
            let next = self.next();
            let wait = async {
                match next {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = wait => {}
                () = self.changed.notified() => {}
            }
            if let Some(name) = self.take(Instant::now()) {
                return name;
            }
        }
    }

    fn next(&self) -> Option<Instant> {
        self.lock().values().filter_map(|retry| retry.at).min()
    }

    fn take(&self, now: Instant) -> Option<ModelName> {
        let mut models = self.lock();
        let (name, retry) = models
            .iter_mut()
            .find(|(_, retry)| retry.at.is_some_and(|at| at <= now))?;
        retry.at = None;
        Some(name.clone())
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<ModelName, Retry>> {
        self.models.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_broken_model_is_tried_again_less_and_less_often() {
        let retries = Retries::default();
        let name = ModelName::checked("minilm", "name").unwrap();
        assert!(retries.is_new(&name, "no file") && !retries.is_new(&name, "no file"));
        assert!(retries.is_new(&name, "a short file"));
        let mut waits = Vec::new();
        for _ in 0..7 {
            retries.failed(&name);
            let begun = Instant::now();
            assert_eq!(retries.due().await, name);
            waits.push(begun.elapsed().as_secs());
        }
        assert_eq!(waits, [1, 2, 4, 8, 16, 30, 30]);
        // While a retry runs, and when it is no longer wanted, nothing is due.
        let hour = Duration::from_secs(3600);
        assert!(tokio::time::timeout(hour, retries.due()).await.is_err());
        retries.failed(&name);
        retries.forget(&name);
        assert!(!retries.has(&name));
        assert!(tokio::time::timeout(hour, retries.due()).await.is_err());
    }
}
