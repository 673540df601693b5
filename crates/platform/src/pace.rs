//! How fast data that has begun must move. Who sends or reads a message slower
//! than this holds its memory for others' loss; who sends none owes nothing.

use std::future::Future;
use std::time::Duration;

use tokio::time::{Instant, timeout_at};

/// The least speed of a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// How long a transfer may take whatever its speed.
    pub grace: Duration,
    /// Bytes a second that it must move on average after that.
    pub bytes_per_second: usize,
    /// How long it may take in all.
    pub longest: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            grace: Duration::from_secs(5),
            bytes_per_second: 16 << 10,
            longest: Duration::from_secs(60),
        }
    }
}

impl Pace {
    /// A transfer that begins now.
    pub fn begin(self) -> Progress {
        Progress {
            pace: self,
            begun: Instant::now(),
            moved: 0,
        }
    }
}

/// A transfer that has begun.
#[derive(Debug, Clone, Copy)]
pub struct Progress {
    pace: Pace,
    begun: Instant,
    moved: usize,
}

/// A transfer was slower than it must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the data moved too slowly")]
pub struct TooSlow;

impl Progress {
    /// Counts bytes that have moved.
    pub fn moved(&mut self, bytes: usize) {
        self.moved = self.moved.saturating_add(bytes);
    }

    /// When it is too slow, if nothing more moves until then.
    pub fn due(&self) -> Instant {
        let rate = self.pace.bytes_per_second.max(1);
        let earned = Duration::from_secs_f64(self.moved as f64 / rate as f64);
        let most = self.pace.longest.max(self.pace.grace);
        self.begun + self.pace.grace.saturating_add(earned).min(most)
    }

    /// Waits for the next part, until the transfer is too slow.
    pub async fn within<T>(&self, next: impl Future<Output = T>) -> Result<T, TooSlow> {
        timeout_at(self.due(), next).await.map_err(|_| TooSlow)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_transfer_keeps_its_speed_and_its_end() {
        let pace = Pace::default();
        let begun = Instant::now();
        let seconds = |progress: &Progress| (progress.due() - begun).as_secs();
        let mut progress = pace.begin();
        assert_eq!(seconds(&progress), 5);
        progress.moved(10 * pace.bytes_per_second);
        assert_eq!(seconds(&progress), 15);
        let slow = progress.within(std::future::pending::<()>()).await;
        assert_eq!((slow, begun.elapsed().as_secs()), (Err(TooSlow), 15));
        progress.moved(1 << 30);
        assert_eq!(seconds(&progress), 60);
    }
}
