//! The bounded queue of one model instance, and the batches that close on it.
//!
//! A request's rows wait here in parts, each small enough for one batch. The
//! device thread takes the next batch. The request holds the receiving end of
//! each part's reply, so that parts of a cancelled request are seen and dropped.

mod lanes;

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

#[cfg(test)]
mod tests {
    use platform::pot::Holder;

    use super::*;

    type Reply = oneshot::Receiver<Result<Computed, ModelError>>;

    fn limits() -> QueueLimits {
        QueueLimits {
            batch_tokens_max: 100,
            batch_rows_max: 4,
            delay: Duration::ZERO,
            rows_max: 10,
        }
    }

    fn part(tokens: &[usize], timeout: Duration) -> (Part, Reply) {
        let (reply, wait) = oneshot::channel();
        let row = |length: &usize| {
            let tokens = TokenRow {
                ids: vec![1; *length],
                type_ids: vec![0; *length],
            };
            (tokens, TextOutput::Embedding)
        };
        let now = Instant::now();
        let part = Part {
            rows: Rows::Text(tokens.iter().map(row).collect()),
            priority: 0,
            deadline: now + timeout,
            queued_at: now,
            reply,
        };
        (part, wait)
    }

    fn push(queue: &Queue, parts: Vec<Part>) -> Result<Option<Batch>, Refusal> {
        let lane = Lane::default();
        let rows = parts.iter().map(|part| part.rows.count()).sum();
        let deadline = parts.iter().map(|part| part.deadline).min();
        let held = queue.reserve(&lane, rows, deadline.unwrap())?;
        queue.push(parts, &lane, held)
    }

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn a_batch_closes_on_the_token_budget_and_on_the_row_budget() {
        let queue = Queue::new(limits(), 0);
        let (parts, _waits): (Vec<_>, Vec<_>) =
            [60, 30, 30].map(|t| part(&[t], LONG)).into_iter().unzip();
        push(&queue, parts).unwrap();
        assert_eq!(queue.next_batch().map(|batch| batch.tokens), Some(90));
        assert_eq!(queue.next_batch().map(|batch| batch.tokens), Some(30));
        let (parts, _waits): (Vec<_>, Vec<_>) =
            [1; 6].map(|t| part(&[t], LONG)).into_iter().unzip();
        push(&queue, parts).unwrap();
        assert_eq!(queue.next_batch().map(|batch| batch.rows), Some(4));
        assert_eq!(queue.next_batch().map(|batch| batch.rows), Some(2));
    }

    #[test]
    fn a_batch_waits_for_its_delay_but_not_past_a_deadline() {
        let queue = Queue::new(
            QueueLimits {
                delay: Duration::from_millis(200),
                ..limits()
            },
            0,
        );
        let started = Instant::now();
        let (waits_long, _wait) = part(&[1], LONG);
        push(&queue, vec![waits_long]).unwrap();
        assert_eq!(queue.next_batch().map(|batch| batch.rows), Some(1));
        assert!(started.elapsed() >= Duration::from_millis(200));
        // A token takes 10 ms: the batch must close 15 ms before the deadline.
        queue.finished(1, Duration::from_millis(10));
        let started = Instant::now();
        let (hurried, _wait) = part(&[1], Duration::from_millis(80));
        push(&queue, vec![hurried]).unwrap();
        assert_eq!(queue.next_batch().map(|batch| batch.rows), Some(1));
        assert!(started.elapsed() < Duration::from_millis(80));
    }

    #[test]
    fn a_full_queue_refuses_and_cancelled_rows_make_room() {
        let queue = Queue::new(limits(), 0);
        let (first, wait) = part(&[1; 10], LONG);
        push(&queue, vec![first]).unwrap();
        let (second, _wait) = part(&[1], LONG);
        assert!(matches!(push(&queue, vec![second]), Err(Refusal::Full(_))));
        drop(wait);
        let (third, _wait) = part(&[1; 2], LONG);
        push(&queue, vec![third]).unwrap();
        let batch = queue.next_batch().unwrap();
        assert_eq!((batch.rows, batch.dropped.abandoned_rows), (2, 10));
    }

    #[test]
    fn a_wait_longer_than_the_deadline_is_refused_at_once() {
        let queue = Queue::new(limits(), 0);
        queue.finished(1, Duration::from_secs(1));
        let (first, _wait) = part(&[5], LONG);
        push(&queue, vec![first]).unwrap();
        let (hurried, _wait) = part(&[1], Duration::from_millis(100));
        assert!(matches!(push(&queue, vec![hurried]), Err(Refusal::TooLate)));
    }

    #[test]
    fn priorities_go_first_and_zero_goes_last() {
        let queue = Queue::new(
            QueueLimits {
                batch_rows_max: 1,
                ..limits()
            },
            0,
        );
        let mut waits = Vec::new();
        for (tokens, priority) in [(1, 0), (2, 2), (3, 1), (4, 2)] {
            let (mut next, wait) = part(&[tokens], LONG);
            next.priority = priority;
            waits.push(wait);
            push(&queue, vec![next]).unwrap();
        }
        let order: Vec<usize> = (0..4)
            .filter_map(|_| queue.next_batch())
            .map(|b| b.tokens)
            .collect();
        assert_eq!(order, [3, 2, 4, 1]);
    }

    #[test]
    fn a_closed_queue_finishes_its_rows_and_takes_no_more() {
        let queue = Queue::new(limits(), 0);
        let (first, _wait) = part(&[1], LONG);
        push(&queue, vec![first]).unwrap();
        queue.close();
        let (second, _wait) = part(&[1], LONG);
        assert!(matches!(push(&queue, vec![second]), Err(Refusal::Closed)));
        assert!(queue.next_batch().is_some());
        assert!(queue.next_batch().is_none());
    }

    #[test]
    fn large_requests_are_split_into_parts_that_fit() {
        let (text, _) = part(&[60, 30, 30, 5, 1, 1, 1], LONG);
        let parts = split(text.rows, &limits());
        let tokens: Vec<usize> = parts.iter().map(Rows::tokens).collect();
        assert_eq!(tokens, [90, 37, 1]);
        let features = Rows::Features {
            values: vec![0.5; 9 * 3],
            rows: 9,
        };
        let rows: Vec<usize> = split(features, &limits()).iter().map(Rows::count).collect();
        assert_eq!(rows, [4, 4, 1]);
    }

    #[test]
    fn a_small_request_is_computed_inline_when_idle() {
        let queue = Queue::new(limits(), 20);
        let (first, _wait) = part(&[20], LONG);
        let batch = push(&queue, vec![first]).unwrap();
        assert_eq!(batch.map(|batch| batch.tokens), Some(20));
        let (second, _wait) = part(&[20], LONG);
        assert!(
            push(&queue, vec![second]).unwrap().is_none(),
            "one computes"
        );
        assert_eq!(queue.next_batch().map(|batch| batch.tokens), Some(20));
        queue.finished(20, Duration::from_micros(200));
        let (long, _wait) = part(&[21], LONG);
        assert!(push(&queue, vec![long]).unwrap().is_none(), "too long");
    }

    #[test]
    fn a_lane_that_fills_the_queue_leaves_the_others_their_share() {
        let queue = Queue::new(limits(), 0);
        queue.finished(1, Duration::from_secs(1));
        let lane = |number| Lane {
            holder: Holder::Lane(number),
            ..Lane::default()
        };
        let mut waits = Vec::new();
        let mut push = |lane: &Lane, tokens: usize, priority| {
            let (mut part, wait) = part(&[tokens], Duration::from_secs(20));
            part.priority = priority;
            waits.push(wait);
            let held = queue.reserve(lane, 1, part.deadline)?;
            queue.push(vec![part], lane, held)
        };
        // Two that take turns have half of the rows each.
        push(&lane(2), 1, 0).unwrap();
        for _ in 0..5 {
            push(&lane(1), 3, 1).unwrap();
        }
        assert!(matches!(push(&lane(1), 3, 1), Err(Refusal::Full(_))));
        // The others' wait is not that of the flood.
        push(&lane(2), 2, 0).unwrap();
        assert!(matches!(push(&lane(1), 9, 1), Err(Refusal::Full(_))));
        let batch = queue.next_batch().unwrap();
        let tokens: Vec<usize> = batch.parts.iter().map(|part| part.rows.tokens()).collect();
        assert_eq!(tokens, [1, 3, 2, 3]);
    }

    #[test]
    fn deferred_work_waits_until_nothing_else_does() {
        let queue = Queue::new(limits(), 0);
        let mut waits = Vec::new();
        for (tokens, deferred) in [(1, true), (2, false), (3, true), (4, false)] {
            let lane = Lane {
                deferred,
                ..Lane::default()
            };
            let (mut part, wait) = part(&[tokens], LONG);
            part.priority = u64::from(deferred);
            waits.push(wait);
            let held = queue.reserve(&lane, 1, part.deadline).unwrap();
            queue.push(vec![part], &lane, held).unwrap();
        }
        let batches: Vec<usize> = (0..2)
            .filter_map(|_| queue.next_batch())
            .map(|batch| batch.tokens)
            .collect();
        assert_eq!(batches, [6, 4]);
        assert_eq!(queue.load().0, 0);
    }

    #[test]
    fn no_batch_is_inline_while_another_is_computed() {
        let queue = Queue::new(limits(), 20);
        let (first, _wait) = part(&[1], LONG);
        assert!(push(&queue, vec![first]).unwrap().is_some());
        let (second, _wait) = part(&[2], LONG);
        assert!(push(&queue, vec![second]).unwrap().is_none());
        assert_eq!(queue.next_batch().map(|batch| batch.tokens), Some(2));
        // The first has ended; the device thread still computes the second.
        queue.finished(1, Duration::from_micros(1));
        let (third, _wait) = part(&[1], LONG);
        assert!(push(&queue, vec![third]).unwrap().is_none());
    }
}
