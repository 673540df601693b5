//! The bounded queue of one model instance, and the batches that close on it.
//!
//! A request's rows wait here in parts, each small enough for one batch. The
//! device thread takes the next batch. The request holds the receiving end of
//! each part's reply, so that parts of a cancelled request are seen and dropped.

mod lanes;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use engine::{TextOutput, TokenRow};
use platform::pot::{Held, Pot};
use tokio::sync::oneshot;

use crate::error::ModelError;
pub use lanes::Lane;
use lanes::{Lanes, Waiting};

/// The rows of a part.
#[derive(Debug)]
pub enum Rows {
    /// Tokenized texts and the kind of output of each.
    Text(Vec<(TokenRow, TextOutput)>),
    /// Features, row-major.
    Features {
        /// The values of all rows.
        values: Vec<f32>,
        /// How many rows.
        rows: usize,
    },
}

impl Rows {
    /// How many rows there are.
    pub fn count(&self) -> usize {
        match self {
            Self::Text(rows) => rows.len(),
            Self::Features { rows, .. } => *rows,
        }
    }

    /// How many tokens the rows have; a row of features counts as one.
    pub fn tokens(&self) -> usize {
        match self {
            Self::Text(rows) => rows.iter().map(|(tokens, _)| tokens.ids.len()).sum(),
            Self::Features { rows, .. } => *rows,
        }
    }
}

/// The outputs of a part.
#[derive(Debug)]
pub struct Computed {
    /// One flat vector per row of text; one for all rows of features.
    pub outputs: Vec<Vec<f32>>,
    /// How long the part waited.
    pub queued: Duration,
    /// How long its batch took to compute.
    pub computed: Duration,
}

/// Rows of one request that go to the device together.
#[derive(Debug)]
pub struct Part {
    /// The rows.
    pub rows: Rows,
    /// 1 is served first of its lane; 0 after every other.
    pub priority: u64,
    /// When the caller stops waiting.
    pub deadline: Instant,
    /// When the part was queued.
    pub queued_at: Instant,
    /// Where the outputs go.
    pub reply: oneshot::Sender<Result<Computed, ModelError>>,
}

impl Part {
    /// Whether the request still waits: it is neither cancelled nor late.
    pub fn awaited(&self, now: Instant) -> bool {
        !self.reply.is_closed() && now < self.deadline
    }
}

/// When a batch closes, and how many rows may wait.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueueLimits {
    /// A batch closes before it has more tokens.
    pub batch_tokens_max: usize,
    /// A batch closes before it has more rows.
    pub batch_rows_max: usize,
    /// A batch closes when its first part has waited so long.
    pub delay: Duration,
    /// More waiting rows are refused: backpressure.
    pub rows_max: usize,
}

/// Why parts were refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// The queue is full; it probably has room after this time.
    Full(Duration),
    /// The wait would probably pass the deadline.
    TooLate,
    /// The model is being unloaded.
    Closed,
}

/// Why parts left the queue without being computed.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Dropped {
    /// Rows whose deadline passed.
    pub late_rows: usize,
    /// Rows whose caller cancelled.
    pub abandoned_rows: usize,
}

/// The queue of one model instance.
#[derive(Debug)]
pub struct Queue {
    limits: QueueLimits,
    /// The most tokens, or rows of features, that are computed inline.
    inline_max: usize,
    /// The rows of the requests that wait or are being tokenized.
    rows: Pot,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    lanes: Lanes,
    /// What waits until nothing else does.
    deferred: Lanes,
    closed: bool,
    /// Seconds that one token takes, averaged over the last batches.
    token_seconds: f64,
    /// Batches that are computed now, and their tokens.
    busy_batches: usize,
    busy_tokens: usize,
    /// Rows dropped since the last batch.
    dropped: Dropped,
}

impl State {
    /// How long a part would probably wait after so many tokens.
    fn wait(&self, ahead: usize) -> Duration {
        self.compute(ahead.saturating_add(self.busy_tokens))
    }

    /// How long everything that waits probably takes.
    fn wait_of_all(&self) -> Duration {
        self.wait(self.lanes.tokens + self.deferred.tokens)
    }

    /// How long so many further tokens of a lane would probably wait.
    fn wait_of(&self, lane: &Lane, tokens: usize) -> Duration {
        let ahead = if lane.deferred {
            let ahead = self.deferred.tokens_ahead(&lane.holder, tokens);
            self.lanes.tokens + ahead
        } else {
            self.lanes.tokens_ahead(&lane.holder, tokens)
        };
        self.wait(ahead)
    }

    fn compute(&self, tokens: usize) -> Duration {
        Duration::from_secs_f64((tokens as f64 * self.token_seconds).min(3600.0))
    }

    fn is_empty(&self) -> bool {
        self.lanes.is_empty() && self.deferred.is_empty()
    }

    /// What the next batch is taken from.
    fn next_lanes(&mut self) -> &mut Lanes {
        if self.lanes.is_empty() {
            &mut self.deferred
        } else {
            &mut self.lanes
        }
    }

    /// Takes out and counts the parts that nobody waits for.
    fn remove_unawaited(&mut self) -> Unawaited {
        let now = Instant::now();
        let mut removed = self.lanes.remove_unawaited(now);
        removed.extend(self.deferred.remove_unawaited(now));
        for Waiting { part, rows, .. } in &removed {
            if part.reply.is_closed() {
                self.dropped.abandoned_rows += rows;
            } else {
                self.dropped.late_rows += rows;
            }
        }
        Unawaited(removed)
    }

    fn begin(&mut self, tokens: usize) -> Dropped {
        self.busy_batches += 1;
        self.busy_tokens += tokens;
        std::mem::take(&mut self.dropped)
    }
}

/// Parts that left the queue: they are told so without its lock.
#[must_use]
struct Unawaited(Vec<Waiting>);

impl Unawaited {
    fn reply(self) {
        for waiting in self.0 {
            // A cancelled request has dropped its receiver.
            let _ = waiting.part.reply.send(Err(ModelError::DeadlinePassed));
        }
    }
}

/// Parts that go to the device together.
#[derive(Debug)]
pub struct Batch {
    /// The parts.
    pub parts: Vec<Part>,
    /// Rows of all parts.
    pub rows: usize,
    /// Tokens of all parts.
    pub tokens: usize,
    /// Rows dropped since the batch before.
    pub dropped: Dropped,
}

impl Queue {
    /// An empty queue. `inline_max`: see [`push`](Self::push).
    pub fn new(limits: QueueLimits, inline_max: usize) -> Self {
        Self {
            rows: Pot::new(limits.rows_max),
            limits,
            inline_max,
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic inside leaves counters at most stale, never unsafe.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waiting rows, and how long a new row will probably wait.
    pub fn load(&self) -> (usize, Duration) {
        let state = self.lock();
        let rows = state.lanes.rows + state.deferred.rows;
        (rows, state.wait_of_all())
    }

    /// How long a token takes to compute; zero before the first batch.
    pub fn token_time(&self) -> Duration {
        self.lock().compute(1)
    }

    /// Holds room for the rows of a request. It is asked for before they are
    /// tokenized, so that shed load costs no tokenization.
    pub fn reserve(&self, lane: &Lane, rows: usize, deadline: Instant) -> Result<Held, Refusal> {
        if self.lock().closed {
            return Err(Refusal::Closed);
        }
        let mut held = self.rows.take(&lane.holder, rows);
        let late = |state: &State| Instant::now() + state.wait_of(lane, 0) >= deadline;
        if held.is_err() || late(&self.lock()) {
            // Rows of cancelled requests must not take the place of others.
            let unawaited = self.lock().remove_unawaited();
            unawaited.reply();
            if held.is_err() {
                held = self.rows.take(&lane.holder, rows);
            }
        }
        let state = self.lock();
        let held = held.map_err(|_| Refusal::Full(state.wait_of_all()))?;
        if late(&state) {
            return Err(Refusal::TooLate);
        }
        Ok(held)
    }

    /// Queues the parts of one request together, whose rows are held, or refuses
    /// them at once.
    ///
    /// When the queue and the device are idle and the parts have at most
    /// `inline_max` tokens, they come back as a batch for the caller to compute
    /// inline: waking the device thread would take longer.
    pub fn push(
        &self,
        parts: Vec<Part>,
        lane: &Lane,
        held: Held,
    ) -> Result<Option<Batch>, Refusal> {
        let rows: usize = parts.iter().map(|part| part.rows.count()).sum();
        let tokens: usize = parts.iter().map(|part| part.rows.tokens()).sum();
        let mut state = self.lock();
        if state.closed {
            return Err(Refusal::Closed);
        }
        let expected = Instant::now() + state.wait_of(lane, tokens);
        if parts.iter().any(|part| expected >= part.deadline) {
            return Err(Refusal::TooLate);
        }
        if self.is_inline(&state, rows, tokens) {
            let dropped = state.begin(tokens);
            return Ok(Some(Batch {
                parts,
                rows,
                tokens,
                dropped,
            }));
        }
        let held = Arc::new(held);
        let lanes = if lane.deferred {
            &mut state.deferred
        } else {
            &mut state.lanes
        };
        for part in parts {
            lanes.push(lane, Waiting::new(part, held.clone()));
        }
        drop(state);
        self.changed.notify_one();
        Ok(None)
    }

    fn is_inline(&self, state: &State, rows: usize, tokens: usize) -> bool {
        let fits = rows <= self.limits.batch_rows_max && tokens <= self.limits.batch_tokens_max;
        let idle = state.is_empty() && state.busy_batches == 0;
        idle && fits && tokens <= self.inline_max && self.limits.delay.is_zero()
    }

    /// Refuses every further part and wakes the device thread, which computes
    /// the waiting ones.
    pub fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    /// Records that a batch has ended and how long it took, for the estimate of
    /// waits.
    pub fn finished(&self, tokens: usize, computed: Duration) {
        let mut state = self.lock();
        state.busy_batches = state.busy_batches.saturating_sub(1);
        state.busy_tokens = state.busy_tokens.saturating_sub(tokens);
        if tokens > 0 {
            let token_seconds = computed.as_secs_f64() / tokens as f64;
            state.token_seconds = if state.token_seconds == 0.0 {
                token_seconds
            } else {
                0.8 * state.token_seconds + 0.2 * token_seconds
            };
        }
    }

    /// Waits for the next batch. It closes on the token budget, the row
    /// budget, the queue delay of its first part, or when waiting longer would
    /// miss its earliest deadline. None when the queue is closed and empty.
    pub fn next_batch(&self) -> Option<Batch> {
        loop {
            let mut state = self.lock();
            let unawaited = state.remove_unawaited();
            if !unawaited.0.is_empty() {
                drop(state);
                unawaited.reply();
                continue;
            }
            let now = Instant::now();
            let closes_at = self.closes_at(&mut state, now);
            match closes_at {
                Some(at) if now >= at => return Some(self.take(&mut state)),
                Some(at) => {
                    let waited = self.changed.wait_timeout(state, at - now);
                    drop(waited.unwrap_or_else(PoisonError::into_inner));
                }
                None if state.closed => return None,
                None => {
                    let waited = self.changed.wait(state);
                    drop(waited.unwrap_or_else(PoisonError::into_inner));
                }
            }
        }
    }

    /// When the next batch closes; none when nothing waits.
    fn closes_at(&self, state: &mut State, now: Instant) -> Option<Instant> {
        if state.is_empty() {
            return None;
        }
        let closed = state.closed;
        let lanes = state.next_lanes();
        let tokens = lanes.tokens;
        let full =
            lanes.rows >= self.limits.batch_rows_max || tokens >= self.limits.batch_tokens_max;
        if full || closed || self.limits.delay.is_zero() {
            return Some(now);
        }
        // All that waits would be in the batch.
        let (oldest, earliest) = lanes.earliest()?;
        // Half of the compute time again, since the estimate is one.
        let compute = state.compute(tokens).mul_f64(1.5);
        let by_deadline = earliest.checked_sub(compute).unwrap_or(now);
        Some(by_deadline.min(oldest + self.limits.delay))
    }

    /// Takes parts until the next one does not fit.
    fn take(&self, state: &mut State) -> Batch {
        let lanes = state.next_lanes();
        let (mut parts, mut rows, mut tokens) = (Vec::new(), 0, 0);
        while let Some((next_rows, next_tokens)) = lanes.peek() {
            let fits = rows + next_rows <= self.limits.batch_rows_max
                && tokens + next_tokens <= self.limits.batch_tokens_max;
            if !fits && !parts.is_empty() {
                break;
            }
            let Some(waiting) = lanes.pop() else { break };
            rows += next_rows;
            tokens += next_tokens;
            parts.push(waiting.part);
        }
        let dropped = state.begin(tokens);
        Batch {
            parts,
            rows,
            tokens,
            dropped,
        }
    }
}

/// Splits a request's rows into parts that each fit a batch.
pub fn split(rows: Rows, limits: &QueueLimits) -> Vec<Rows> {
    if rows.count() <= limits.batch_rows_max && rows.tokens() <= limits.batch_tokens_max {
        return vec![rows];
    }
    match rows {
        Rows::Text(rows) => {
            let mut parts = Vec::new();
            let (mut part, mut tokens) = (Vec::new(), 0);
            for row in rows {
                let length = row.0.ids.len();
                let full = part.len() == limits.batch_rows_max
                    || tokens + length > limits.batch_tokens_max;
                if full && !part.is_empty() {
                    parts.push(Rows::Text(std::mem::take(&mut part)));
                    tokens = 0;
                }
                part.push(row);
                tokens += length;
            }
            parts.push(Rows::Text(part));
            parts
        }
        Rows::Features { values, rows } => {
            let width = values.len() / rows.max(1);
            let rows_max = limits.batch_rows_max.min(limits.batch_tokens_max);
            values
                .chunks(width.max(1) * rows_max)
                .map(|values| Rows::Features {
                    rows: values.len() / width.max(1),
                    values: values.to_vec(),
                })
                .collect()
        }
    }
}
