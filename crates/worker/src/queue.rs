//! The bounded queue of one model instance, and the batches that close on it.
//!
//! A request's rows wait here in parts, each small enough for one batch. The
//! device thread takes the next batch. The request holds the receiving end of
//! each part's reply, so that parts of a cancelled request are seen and dropped.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use engine::{TextOutput, TokenRow};
use tokio::sync::oneshot;

use crate::error::ModelError;

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
    /// 1 is served first; 0 after every other.
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

    fn rank(&self) -> u64 {
        if self.priority == 0 {
            u64::MAX
        } else {
            self.priority
        }
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
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    parts: VecDeque<Part>,
    rows: usize,
    tokens: usize,
    closed: bool,
    /// Seconds that one token takes, averaged over the last batches.
    token_seconds: f64,
    /// Tokens of the batch that the device computes now.
    busy_tokens: usize,
    /// Rows dropped since the last batch.
    dropped: Dropped,
}

impl State {
    fn wait(&self) -> Duration {
        let tokens = self.tokens.saturating_add(self.busy_tokens);
        Duration::from_secs_f64((tokens as f64 * self.token_seconds).min(3600.0))
    }

    fn compute(&self, tokens: usize) -> Duration {
        Duration::from_secs_f64((tokens as f64 * self.token_seconds).min(3600.0))
    }

    fn remove(&mut self, index: usize) -> Option<Part> {
        let part = self.parts.remove(index)?;
        self.rows -= part.rows.count();
        self.tokens -= part.rows.tokens();
        Some(part)
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
        (state.rows, state.wait())
    }

    /// How long a token takes to compute; zero before the first batch.
    pub fn token_time(&self) -> Duration {
        self.lock().compute(1)
    }

    /// Whether so many rows would be queued now. Checked before they are
    /// tokenized, so that shed load costs no tokenization.
    pub fn admits(&self, rows: usize, deadline: Instant) -> Result<(), Refusal> {
        let mut state = self.lock();
        if state.closed {
            return Err(Refusal::Closed);
        }
        let overloaded = |state: &State| {
            state.rows.saturating_add(rows) > self.limits.rows_max
                || Instant::now() + state.wait() >= deadline
        };
        if overloaded(&state) {
            drop_unawaited(&mut state);
        }
        if state.rows.saturating_add(rows) > self.limits.rows_max {
            return Err(Refusal::Full(state.wait()));
        }
        if Instant::now() + state.wait() >= deadline {
            return Err(Refusal::TooLate);
        }
        Ok(())
    }

    /// Queues the parts of one request together, or refuses them at once.
    ///
    /// When the queue and the device are idle and the parts have at most
    /// `inline_max` tokens, they come back as a batch for the caller to compute
    /// inline: waking the device thread would take longer.
    pub fn push(&self, parts: Vec<Part>) -> Result<Option<Batch>, Refusal> {
        let rows: usize = parts.iter().map(|part| part.rows.count()).sum();
        let tokens: usize = parts.iter().map(|part| part.rows.tokens()).sum();
        let mut state = self.lock();
        if state.closed {
            return Err(Refusal::Closed);
        }
        let now = Instant::now();
        let overloaded = |state: &State| {
            state.rows.saturating_add(rows) > self.limits.rows_max
                || parts.iter().any(|part| now + state.wait() >= part.deadline)
        };
        if overloaded(&state) {
            // Rows of cancelled requests must not take the place of others.
            drop_unawaited(&mut state);
        }
        let wait = state.wait();
        if state.rows.saturating_add(rows) > self.limits.rows_max {
            return Err(Refusal::Full(wait));
        }
        if parts.iter().any(|part| now + wait >= part.deadline) {
            return Err(Refusal::TooLate);
        }
        let inline = state.parts.is_empty() && self.is_inline(&state, rows, tokens);
        state.rows += rows;
        state.tokens += tokens;
        for part in parts {
            let rank = part.rank();
            // Almost always the end: priorities are rare.
            let mut position = state.parts.len();
            while position > 0
                && state
                    .parts
                    .get(position - 1)
                    .is_some_and(|p| p.rank() > rank)
            {
                position -= 1;
            }
            state.parts.insert(position, part);
        }
        if inline {
            let count = state.parts.len();
            return Ok(Some(take(&mut state, count)));
        }
        drop(state);
        self.changed.notify_one();
        Ok(None)
    }

    fn is_inline(&self, state: &State, rows: usize, tokens: usize) -> bool {
        let fits = rows <= self.limits.batch_rows_max && tokens <= self.limits.batch_tokens_max;
        fits && tokens <= self.inline_max && state.busy_tokens == 0 && self.limits.delay.is_zero()
    }

    /// Refuses every further part and wakes the device thread, which computes
    /// the waiting ones.
    pub fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    /// Records how long a batch took, for the estimate of waits.
    pub fn finished(&self, tokens: usize, computed: Duration) {
        let mut state = self.lock();
        state.busy_tokens = 0;
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
        let mut state = self.lock();
        loop {
            drop_unawaited(&mut state);
            if state.parts.is_empty() {
                if state.closed {
                    return None;
                }
                state = self
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let (count, full, closes_at) = self.candidate(&state);
            let now = Instant::now();
            if full || state.closed || now >= closes_at {
                return Some(take(&mut state, count));
            }
            (state, _) = self
                .changed
                .wait_timeout(state, closes_at - now)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// How many parts the next batch would have, whether it is full, and when
    /// it must close.
    fn candidate(&self, state: &State) -> (usize, bool, Instant) {
        let (mut count, mut rows, mut tokens) = (0, 0, 0);
        let mut full = false;
        let mut oldest = None::<Instant>;
        let mut earliest = None::<Instant>;
        for part in &state.parts {
            let (part_rows, part_tokens) = (part.rows.count(), part.rows.tokens());
            let fits = rows + part_rows <= self.limits.batch_rows_max
                && tokens + part_tokens <= self.limits.batch_tokens_max;
            if !fits && count > 0 {
                full = true;
                break;
            }
            count += 1;
            rows += part_rows;
            tokens += part_tokens;
            oldest = Some(oldest.map_or(part.queued_at, |at| at.min(part.queued_at)));
            earliest = Some(earliest.map_or(part.deadline, |at| at.min(part.deadline)));
        }
        full |= rows >= self.limits.batch_rows_max || tokens >= self.limits.batch_tokens_max;
        let now = Instant::now();
        let by_delay = oldest.map_or(now, |at| at + self.limits.delay);
        // Half of the compute time again, since the estimate is one.
        let compute = state.compute(tokens).mul_f64(1.5);
        let by_deadline = earliest
            .and_then(|at| at.checked_sub(compute))
            .unwrap_or(now);
        (count, full, by_delay.min(by_deadline))
    }
}

fn drop_unawaited(state: &mut State) {
    let now = Instant::now();
    let mut index = 0;
    while let Some(part) = state.parts.get(index) {
        if part.awaited(now) {
            index += 1;
            continue;
        }
        let rows = part.rows.count();
        if part.reply.is_closed() {
            state.dropped.abandoned_rows += rows;
        } else {
            state.dropped.late_rows += rows;
        }
        if let Some(part) = state.remove(index) {
            // A cancelled request has dropped its receiver.
            let _ = part.reply.send(Err(ModelError::DeadlinePassed));
        }
    }
}

fn take(state: &mut State, count: usize) -> Batch {
    let parts: Vec<Part> = (0..count).filter_map(|_| state.remove(0)).collect();
    let rows = parts.iter().map(|part| part.rows.count()).sum();
    let tokens = parts.iter().map(|part| part.rows.tokens()).sum();
    state.busy_tokens = tokens;
    Batch {
        parts,
        rows,
        tokens,
        dropped: std::mem::take(&mut state.dropped),
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

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn a_batch_closes_on_the_token_budget_and_on_the_row_budget() {
        let queue = Queue::new(limits(), 0);
        let (parts, _waits): (Vec<_>, Vec<_>) =
            [60, 30, 30].map(|t| part(&[t], LONG)).into_iter().unzip();
        queue.push(parts).unwrap();
        assert_eq!(queue.next_batch().map(|batch| batch.tokens), Some(90));
        assert_eq!(queue.next_batch().map(|batch| batch.tokens), Some(30));
        let (parts, _waits): (Vec<_>, Vec<_>) =
            [1; 6].map(|t| part(&[t], LONG)).into_iter().unzip();
        queue.push(parts).unwrap();
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
        queue.push(vec![waits_long]).unwrap();
        assert_eq!(queue.next_batch().map(|batch| batch.rows), Some(1));
        assert!(started.elapsed() >= Duration::from_millis(200));
        // A token takes 10 ms: the batch must close 15 ms before the deadline.
        queue.finished(1, Duration::from_millis(10));
        let started = Instant::now();
        let (hurried, _wait) = part(&[1], Duration::from_millis(80));
        queue.push(vec![hurried]).unwrap();
        assert_eq!(queue.next_batch().map(|batch| batch.rows), Some(1));
        assert!(started.elapsed() < Duration::from_millis(80));
    }

    #[test]
    fn a_full_queue_refuses_and_cancelled_rows_make_room() {
        let queue = Queue::new(limits(), 0);
        let (first, wait) = part(&[1; 10], LONG);
        queue.push(vec![first]).unwrap();
        let (second, _wait) = part(&[1], LONG);
        assert!(matches!(queue.push(vec![second]), Err(Refusal::Full(_))));
        drop(wait);
        let (third, _wait) = part(&[1; 2], LONG);
        queue.push(vec![third]).unwrap();
        let batch = queue.next_batch().unwrap();
        assert_eq!((batch.rows, batch.dropped.abandoned_rows), (2, 10));
    }

    #[test]
    fn a_wait_longer_than_the_deadline_is_refused_at_once() {
        let queue = Queue::new(limits(), 0);
        queue.finished(1, Duration::from_secs(1));
        let (first, _wait) = part(&[5], LONG);
        queue.push(vec![first]).unwrap();
        let (hurried, _wait) = part(&[1], Duration::from_millis(100));
        assert!(matches!(queue.push(vec![hurried]), Err(Refusal::TooLate)));
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
            queue.push(vec![next]).unwrap();
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
        queue.push(vec![first]).unwrap();
        queue.close();
        let (second, _wait) = part(&[1], LONG);
        assert!(matches!(queue.push(vec![second]), Err(Refusal::Closed)));
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
        let batch = queue.push(vec![first]).unwrap();
        assert_eq!(batch.map(|batch| batch.tokens), Some(20));
        let (second, _wait) = part(&[20], LONG);
        assert!(queue.push(vec![second]).unwrap().is_none(), "one computes");
        assert_eq!(queue.next_batch().map(|batch| batch.tokens), Some(20));
        queue.finished(20, Duration::from_micros(200));
        let (long, _wait) = part(&[21], LONG);
        assert!(queue.push(vec![long]).unwrap().is_none(), "too long");
    }
}
