//! What the messages of a process may take together: bytes, time and work.

use std::sync::Arc;
use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::metrics::{Bound, Metrics};
use crate::pace::Pace;
use crate::peer::Peer;
use crate::pool::{Cancelled, PoolError, WorkPool};
use crate::pot::{Held, Holder, Pot, PotFull};

/// When bytes in flight will probably have been released.
const RETRY: Duration = Duration::from_millis(100);
/// Work on more bytes is done on a thread for work.
const INLINE_BYTES: usize = 64 << 10;

/// Bytes in flight, released when this is dropped.
pub type BytesHeld = Held;

/// Limits the bytes of all messages in flight together, with a share for each
/// holder. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ByteBudget {
    shared: Arc<SharedBudget>,
    holder: Holder,
}

#[derive(Debug)]
struct SharedBudget {
    pot: Pot,
    full: Option<Bound>,
}

impl ByteBudget {
    /// A budget of `bytes_max` bytes.
    pub fn new(bytes_max: usize) -> Self {
        Self::of(Pot::new(bytes_max), None)
    }

    fn of(pot: Pot, full: Option<Bound>) -> Self {
        Self {
            shared: Arc::new(SharedBudget { pot, full }),
            holder: Holder::Own,
        }
    }

    /// The most bytes in flight.
    pub fn capacity(&self) -> usize {
        self.shared.pot.capacity()
    }

    /// Bytes in flight now.
    pub fn used(&self) -> usize {
        self.shared.pot.used()
    }

    /// Takes bytes from the budget for its holder, or fails at once: to wait would
    /// hold the connection's flow-control window with the message half read.
    pub fn take(&self, bytes: usize) -> Result<Option<BytesHeld>, Status> {
        if bytes == 0 {
            return Ok(None);
        }
        self.hold(bytes).map(Some)
    }

    /// The same; a holding that may grow.
    pub fn hold(&self, bytes: usize) -> Result<BytesHeld, Status> {
        let held = self.shared.pot.take(&self.holder, bytes);
        held.map_err(|full| self.refuse(full))
    }

    /// Takes more bytes for what is held.
    pub fn grow(&self, held: &mut BytesHeld, bytes: usize) -> Result<(), Status> {
        held.grow(bytes).map_err(|full| self.refuse(full))
    }

    fn count_refused(&self) {
        if let Some(bound) = &self.shared.full {
            bound.reached();
        }
    }

    fn refuse(&self, full: PotFull) -> Status {
        self.count_refused();
        overloaded(match full {
            PotFull::Whole => "overloaded: too many message bytes in flight",
            PotFull::Share => "overloaded: the caller has its share of the message bytes in flight",
        })
    }
}

fn overloaded(message: &str) -> Status {
    let details = ErrorDetails::with_retry_info(Some(RETRY));
    Status::with_error_details(Code::Unavailable, message, details)
}

/// The limits of messages. Cheap to clone.
#[derive(Debug, Clone)]
pub struct MessageLimits {
    /// The maximum size of one message, decompressed, in bytes.
    pub message_bytes_max: usize,
    /// The bytes of all messages in flight together.
    pub budget: ByteBudget,
    /// How fast a message that has begun must arrive.
    pub pace: Pace,
    shared: Arc<SharedLimits>,
}

/// What all clones have in common: each call makes several.
#[derive(Debug, Default)]
struct SharedLimits {
    pool: Option<WorkPool>,
    slow: Option<Bound>,
}

impl MessageLimits {
    /// Limits with nothing in flight.
    pub fn new(message_bytes_max: usize, bytes_in_flight_max: usize) -> Self {
        Self {
            message_bytes_max,
            budget: ByteBudget::new(bytes_in_flight_max.max(message_bytes_max)),
            pace: Pace::default(),
            shared: Arc::default(),
        }
    }

    /// The same limits at this pace, counted in the metrics of a process, with
    /// its threads for work.
    #[must_use]
    pub fn with(mut self, pace: Pace, metrics: &Metrics, pool: &WorkPool) -> Self {
        let full = metrics.bound("--bytes-in-flight-max");
        self.budget = ByteBudget::of(self.budget.shared.pot.clone(), Some(full));
        self.pace = pace;
        self.shared = Arc::new(SharedLimits {
            pool: Some(pool.clone()),
            slow: Some(metrics.bound("--transfer-rate-min")),
        });
        self
    }

    /// The same limits; bytes are held for this holder.
    #[must_use]
    pub fn held_by(&self, holder: Holder) -> Self {
        let mut limits = self.clone();
        limits.budget.holder = holder;
        limits
    }

    /// The same limits; bytes are held for the peer if nobody is known to send
    /// them.
    pub(crate) fn or_held_by(&self, peer: &Peer) -> Self {
        match self.budget.holder {
            Holder::Own => self.held_by(peer.holder()),
            _ => self.clone(),
        }
    }

    /// Counts bytes as in flight for a holder, which need not be that of the
    /// limits.
    pub fn hold_for(&self, holder: &Holder, bytes: usize) -> Result<BytesHeld, PotFull> {
        let held = self.budget.shared.pot.take(holder, bytes);
        held.inspect_err(|_| self.budget.count_refused())
    }

    /// Runs work on so many bytes: here when they are few, else on a thread for
    /// work, which refuses it when too much waits.
    pub async fn work<T: Send + 'static>(
        &self,
        bytes: usize,
        work: impl FnOnce(&Cancelled) -> T + Send + 'static,
    ) -> Result<T, Status> {
        let pool = self.shared.pool.as_ref().filter(|_| bytes > INLINE_BYTES);
        let Some(pool) = pool else {
            return Ok(work(&Cancelled::never()));
        };
        let done = pool.run_for(&self.budget.holder, 1, work).await;
        done.map_err(|error| match error {
            PoolError::Full(_) => overloaded("overloaded: too much work waits for a thread"),
            PoolError::Failed => Status::internal("the request could not be read or answered"),
        })
    }

    /// Counts a message that arrived too slowly, or an answer that was read so.
    pub fn too_slow(&self) {
        if let Some(bound) = &self.shared.slow {
            bound.reached();
        }
    }
}
