//! Work that may take over a millisecond: it runs on the process's threads for
//! work, on the account of the lane that it is for.

use std::time::Duration;

use platform::grpc::{BytesHeld, MessageLimits};
use platform::pool::{Cancelled, PoolError, WorkPool};
use platform::pot::Holder;
use protocol::{Error, Kind, Outline};

/// Each text or list is an item of work, and each piece of this size too, which
/// has about a thousand tokens.
const ITEM_BYTES: usize = 4096;
/// What a message becomes is not counted when it is smaller.
const UNCOUNTED_BYTES_MAX: usize = 64 << 10;
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

    /// Takes memory out of the bytes in flight for what a message becomes, before
    /// it is decoded. What is small is a part of the cost of every call. An error
    /// says whether it would fit at another time.
    pub fn hold_decoded(
        &self,
        message_bytes: usize,
        outline: Outline,
    ) -> Result<Option<BytesHeld>, Error> {
        let bytes = usize::try_from(outline.decoded_bytes).unwrap_or(usize::MAX);
        if bytes <= UNCOUNTED_BYTES_MAX {
            return Ok(None);
        }
        let (all, most) = (
            bytes.saturating_add(message_bytes),
            self.limits.budget.capacity(),
        );
        if all > most {
            let message = format!(
                "the message takes {all} bytes when it is decoded, over the limit of {most}: send fewer rows"
            );
            return Err(Error::new(Kind::TooLarge, message));
        }
        self.hold(bytes)
    }

    /// Takes memory out of the bytes in flight, before something of that size is
    /// made.
    pub fn hold(&self, bytes: usize) -> Result<Option<BytesHeld>, Error> {
        let held = self.limits.budget.take(bytes);
        held.map_err(|status| Error::overloaded(status.message(), RETRY_AFTER))
    }
}

#[cfg(test)]
mod tests {
    use platform::metrics::Metrics;

    use super::*;

    #[test]
    fn what_a_message_becomes_is_held_refused_for_now_or_refused_for_ever() {
        let pool = WorkPool::start(1, 10, &Metrics::default()).unwrap();
        let limits = MessageLimits::new(1 << 20, 4 << 20);
        let budget = limits.budget.clone();
        let work = Work::new(&pool, limits, Holder::Own);
        let decoded = |bytes: u64| Outline {
            decoded_bytes: bytes,
            ..Outline::default()
        };
        assert!(
            work.hold_decoded(1 << 20, decoded(64 << 10))
                .unwrap()
                .is_none()
        );
        let held = work.hold_decoded(1 << 20, decoded(3 << 20)).unwrap();
        assert_eq!((held.is_some(), budget.used()), (true, 3 << 20));
        let later = work.hold_decoded(1 << 20, decoded(2 << 20)).unwrap_err();
        assert_eq!(later.kind(), Kind::Overloaded);
        assert_eq!(later.retry_after(), Some(RETRY_AFTER));
        drop(held);
        assert!(work.hold_decoded(1 << 20, decoded(2 << 20)).is_ok());
        let never = work.hold_decoded(1 << 20, decoded(4 << 20)).unwrap_err();
        assert_eq!(never.kind(), Kind::TooLarge);
        assert_eq!(budget.used(), 0);
    }
}
