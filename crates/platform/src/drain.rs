//! Graceful shutdown: not ready, finish, GOAWAY, exit before the hard deadline.

use std::time::Duration;

use tokio::sync::watch;

/// The phase of a graceful shutdown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Calls are accepted.
    Serving,
    /// Not ready: load balancers send new calls elsewhere, and those that still
    /// arrive are served.
    Draining,
    /// No new connections and calls; those in flight finish.
    Closing,
}

/// Starts the drain.
#[derive(Debug)]
pub struct Trigger(watch::Sender<Phase>);

/// Observes the drain.
#[derive(Debug, Clone)]
pub struct Drain(watch::Receiver<Phase>);

/// A trigger, and the drain that it starts.
pub fn channel() -> (Trigger, Drain) {
    let (sender, receiver) = watch::channel(Phase::Serving);
    (Trigger(sender), Drain(receiver))
}

impl Trigger {
    /// Becomes not ready, waits `delay` for load balancers to notice, then closes.
    pub async fn drain(&self, delay: Duration) {
        self.0.send_replace(Phase::Draining);
        tokio::time::sleep(delay).await;
        self.0.send_replace(Phase::Closing);
    }
}

impl Drain {
    /// Whether the drain has begun.
    pub fn draining(&self) -> bool {
        *self.0.borrow() >= Phase::Draining
    }

    /// Returns when the phase is reached or the trigger was dropped.
    pub async fn reached(&mut self, phase: Phase) {
        // An error means that the trigger was dropped: the server has ended.
        let _ = self.0.wait_for(|now| *now >= phase).await;
    }
}

/// Returns at SIGTERM or SIGINT.
pub async fn termination() -> std::io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}
