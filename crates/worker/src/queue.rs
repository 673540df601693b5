//! The bounded queue of one model instance, and the batches that close on it.
//!
//! A request's rows stand here as parts, each small enough for one batch. The
//! device thread takes the next batch; who waits for a part holds the other end
//! of its reply, so that a part nobody waits for is seen and dropped.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use engine::{TextOutput, TokenRow};
use tokio::sync::oneshot;

use crate::error::ModelError;

/// The rows of a part.
#[derive(Debug)]
pub enum Rows {
    /// Tokenized texts and what is wanted of each.
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

/// What a part's rows became.
#[derive(Debug)]
pub struct Computed {
    /// One flat vector per row of text; one for all rows of features.
    pub outputs: Vec<Vec<f32>>,
    /// How long the part waited.
    pub queued: Duration,
    /// How long its batch was computed.
    pub computed: Duration,
}

/// Rows that wait for the device.
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
    /// Whether somebody still waits.
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

/// When a batch closes and how much may wait.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueueLimits {
    /// A batch closes before it has more tokens.
    pub batch_tokens_max: usize,
    /// A batch closes before it has more rows.
    pub batch_rows_max: usize,
    /// A batch closes when its first part has waited so long.
    pub delay: Duration,
    /// More rows do not wait: they are refused.
    pub rows_max: usize,
}

/// Why parts were refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// So many rows wait already; a place is probably free after the time.
    Full(Duration),
    /// The wait is probably longer than the caller's patience.
    TooLate,
    /// The model is being unloaded.
    Closed,
}

/// Why parts left the queue without being computed.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Dropped {
    /// Rows whose deadline passed.
    pub late_rows: usize,
    /// Rows whose caller left.
    pub abandoned_rows: usize,
}

/// The queue.
#[derive(Debug)]
pub struct Queue {
    limits: QueueLimits,
    /// So many tokens, or rows of numbers, their caller may compute itself.
    at_once_max: usize,
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
    /// What was dropped since the last batch.
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
    /// What was dropped on the way.
    pub dropped: Dropped,
}

impl Queue {
    /// An empty queue. `at_once_max`: see [`push`](Self::push).
    pub fn new(limits: QueueLimits, at_once_max: usize) -> Self {
        Self {
            limits,
            at_once_max,
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic inside leaves counters at most stale, never unsafe.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Rows that wait, and how long a row that comes now will probably wait.
    pub fn load(&self) -> (usize, Duration) {
        let state = self.lock();
        (state.rows, state.wait())
    }

    /// Whether so many rows would find a place now: asked before they are
    /// tokenized, so that a flood costs no more than its refusal.
    pub fn admits(&self, rows: usize, deadline: Instant) -> Result<(), Refusal> {
        let mut state = self.lock();
        if state.closed {
            return Err(Refusal::Closed);
        }
        let crowded = |state: &State| {
            state.rows.saturating_add(rows) > self.limits.rows_max
                || Instant::now() + state.wait() >= deadline
        };
        if crowded(&state) {
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
    /// Where nothing waits or computes and they have at most `at_once_max`
    /// tokens, they come back as a batch: the caller had better compute it than
    /// wake another thread, which would take longer.
    pub fn push(&self, parts: Vec<Part>) -> Result<Option<Batch>, Refusal> {
        let rows: usize = parts.iter().map(|part| part.rows.count()).sum();
        let tokens: usize = parts.iter().map(|part| part.rows.tokens()).sum();
        let mut state = self.lock();
        if state.closed {
            return Err(Refusal::Closed);
        }
        let now = Instant::now();
        let crowded = |state: &State| {
            state.rows.saturating_add(rows) > self.limits.rows_max
                || parts.iter().any(|part| now + state.wait() >= part.deadline)
        };
        if crowded(&state) {
            // Rows that nobody waits for must not crowd out others.
            drop_unawaited(&mut state);
        }
        let wait = state.wait();
        if state.rows.saturating_add(rows) > self.limits.rows_max {
            return Err(Refusal::Full(wait));
        }
        if parts.iter().any(|part| now + wait >= part.deadline) {
            return Err(Refusal::TooLate);
        }
        let at_once = state.parts.is_empty() && self.is_at_once(&state, rows, tokens);
        state.rows += rows;
        state.tokens += tokens;
        for part in parts {
            let rank = part.rank();
            // Almost always the end: priorities are rare.
            let mut place = state.parts.len();
            while place > 0 && state.parts.get(place - 1).is_some_and(|p| p.rank() > rank) {
                place -= 1;
            }
            state.parts.insert(place, part);
        }
        if at_once {
            let count = state.parts.len();
            return Ok(Some(take(&mut state, count)));
        }
        drop(state);
        self.changed.notify_one();
        Ok(None)
    }

    fn is_at_once(&self, state: &State, rows: usize, tokens: usize) -> bool {
        let fits = rows <= self.limits.batch_rows_max && tokens <= self.limits.batch_tokens_max;
        fits && tokens <= self.at_once_max && state.busy_tokens == 0 && self.limits.delay.is_zero()
    }

    /// Refuses every further part and wakes the device thread, which finishes
    /// what waits.
    pub fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    /// Tells how long a batch took, for the estimate of waits.
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
            // Who waits may be gone: then nobody needs the answer.
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

/// Cuts a request's rows into parts that fit a batch each.
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
mod tests;
