//! Work that may take over a millisecond: it runs on the process's threads for
//! work, on the account of the lane that it is for.

use std::time::Duration;

use platform::grpc::{BytesHeld, MessageLimits};
use platform::pool::{Cancelled, PoolError, WorkPool};
use platform::pot::Holder;
use protocol::{Error, Kind};

/// Each text or list is an item of work, and each piece of this size too, which
/// has about a thousand tokens.
const ITEM_BYTES: usize = 4096;
/// When a caller may try again who was refused because too much is held.
const RETRY_AFTER: Duration = Duration::from_millis(100);

/// How much there is to do.
#[derive(Debug, Clone, Copy)]
pub struct Size {
    /// Texts or lists.
    pub items: usize,
    /// Their bytes.
    pub bytes: usize,
}

/// The threads and the memory that a lane shares with others. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Work {
    pool: WorkPool,
    limits: MessageLimits,
    holder: Holder,
}

impl Work {
    /// For a lane. The limits are those of its messages.
    pub fn new(pool: &WorkPool, limits: MessageLimits, holder: Holder) -> Self {
        Self {
            pool: pool.clone(),
            limits,
            holder,
        }
    }

    /// Runs work, which should look between its items at whether its caller has
    /// left.
    pub async fn run<T: Send + 'static>(
        &self,
        size: Size,
        work: impl FnOnce(&Cancelled) -> T + Send + 'static,
    ) -> Result<T, Error> {
        let weight = size.items + size.bytes / ITEM_BYTES;
        let done = self.pool.run_for(&self.holder, weight, work).await;
        done.map_err(|error| match error {
            PoolError::Full(_) => Error::overloaded(format!("overloaded: {error}"), RETRY_AFTER),
            PoolError::Failed => Error::new(Kind::Internal, error.to_string()),
        })
    }

    /// Takes memory out of the bytes in flight, before something of that size is
    /// made.
    pub fn hold(&self, bytes: usize) -> Result<Option<BytesHeld>, Error> {
        let held = self.limits.budget.take(bytes);
        held.map_err(|status| Error::overloaded(status.message(), RETRY_AFTER))
    }
}
