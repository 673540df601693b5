//! Whose turn it is. For each model, start-time fair queueing (Goyal, Vin and
//! Cheng, "Start-time fair queueing", 1996) of rows across tenants, in front
//! of the workers' own queues, which are kept short. See
//! docs/decisions/fair_turns.md.

#[cfg(test)]
mod tests;

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use prometheus_client::metrics::gauge::Gauge;
use protocol::Error;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::{LimitMetrics, LimitSettings};
use crate::policy::Tenant;

/// Models whose lines are kept although nobody stands in them.
const LINES_MAX: usize = 1024;
/// Tenants' lanes of a line before those that count no more are looked for.
const LANES_MANY: usize = 64;
/// The part of a new measurement in the smoothed one.
const SMOOTHING: f64 = 0.05;
/// When a place in a line will be free, if nothing is known.
const RETRY: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(5);

/// What a call waits for.
#[derive(Debug, Clone, Copy)]
pub struct TurnRequest<'a> {
    /// The model.
    pub model: &'a str,
    /// Workers that have it.
    pub workers: usize,
    /// Rows.
    pub items: u64,
    /// When the caller stops waiting.
    pub deadline: Instant,
}

/// The lines of all models.
#[derive(Debug)]
pub struct Fair {
    /// Rows at each worker.
    rows: u64,
    queue_max: usize,
    lines: RwLock<HashMap<String, Arc<Mutex<Line>>>>,
    metrics: LimitMetrics,
}

/// The turn of one call, until it is dropped.
#[derive(Debug, Default)]
pub struct Turn(Option<(Arc<Mutex<Line>>, u64)>);

impl Drop for Turn {
    fn drop(&mut self) {
        if let Some((line, items)) = self.0.take() {
            lock(&line).release(items, Instant::now());
        }
    }
}

fn lock(line: &Mutex<Line>) -> MutexGuard<'_, Line> {
    line.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Fair {
    /// Lines that are empty.
    pub fn new(settings: &LimitSettings, metrics: &LimitMetrics) -> Self {
        Self {
            rows: u64::from(settings.fair_rows),
            queue_max: settings.fair_queue as usize,
            lines: RwLock::default(),
            metrics: metrics.clone(),
        }
    }

    /// Waits for the turn of a call. A caller that leaves leaves the line.
    pub async fn turn(&self, tenant: &Tenant, wanted: TurnRequest<'_>) -> Result<Turn, Error> {
        let line = self.line(wanted.model);
        let entered = {
            let mut line = lock(&line);
            let workers = u64::try_from(wanted.workers).unwrap_or(1).max(1);
            line.window = self.rows.saturating_mul(workers);
            let now = Instant::now();
            let patience = wanted.deadline.saturating_duration_since(now);
            line.enter(tenant, wanted.items, self.queue_max, patience)
        };
        match entered {
            Entry::Passed => Ok(Turn(Some((line, wanted.items)))),
            Entry::Waits(place) => {
                let waiting = Waiting::new(line, place, &self.metrics.fair_waiting);
                waiting.turn().await
            }
            Entry::Refused(reason, after) => {
                self.metrics.limited(reason.name()).inc();
                let after = after.clamp(Duration::from_millis(10), RETRY_MAX);
                Err(Error::overloaded(reason.message(), after))
            }
        }
    }

    fn line(&self, model: &str) -> Arc<Mutex<Line>> {
        let lines = self.lines.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(line) = lines.get(model) {
            return line.clone();
        }
        drop(lines);
        let mut lines = self.lines.write().unwrap_or_else(PoisonError::into_inner);
        if lines.len() >= LINES_MAX {
            lines.retain(|_, line| Arc::strong_count(line) > 1);
        }
        lines.entry(model.to_owned()).or_default().clone()
    }
}

/// What a call that comes is told.
#[derive(Debug)]
enum Entry {
    Passed,
    Waits(Place),
    Refused(Reason, Duration),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reason {
    Full,
    TooLate,
}

impl Reason {
    fn name(self) -> &'static str {
        match self {
            Self::Full => "fair_queue",
            Self::TooLate => "fair_deadline",
        }
    }

    fn message(self) -> &'static str {
        match self {
            Self::Full => "too many calls of the tenant wait for their turn",
            Self::TooLate => "the call's turn would come after its deadline",
        }
    }
}

/// A place in a lane.
#[derive(Debug)]
struct Place {
    tenant: String,
    number: u64,
    items: u64,
    called: oneshot::Receiver<()>,
}

/// Who stands in a line, until it is called or leaves.
#[derive(Debug)]
struct Waiting {
    line: Arc<Mutex<Line>>,
    place: Place,
    turned: bool,
    gauge: Gauge,
}

impl Waiting {
    fn new(line: Arc<Mutex<Line>>, place: Place, gauge: &Gauge) -> Self {
        gauge.inc();
        Self {
            line,
            place,
            turned: false,
            gauge: gauge.clone(),
        }
    }

    async fn turn(mut self) -> Result<Turn, Error> {
        match (&mut self.place.called).await {
            Ok(()) => {
                self.turned = true;
                Ok(Turn(Some((self.line.clone(), self.place.items))))
            }
            // A line that is dropped has nobody waiting: this cannot be.
            Err(_) => Err(Error::overloaded(Reason::Full.message(), RETRY)),
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.gauge.dec();
        if self.turned {
            return;
        }
        let mut line = lock(&self.line);
        match self.place.called.try_recv() {
            // It was called at the same moment: the next takes its turn.
            Ok(()) => line.release(self.place.items, Instant::now()),
            Err(_) => line.leave(&self.place),
        }
    }
}

/// The calls of one model.
#[derive(Debug, Default)]
struct Line {
    /// Rows that have their turn.
    under_way: u64,
    /// Rows that may have it at once.
    window: u64,
    /// The start tag of the call that had its turn last.
    time: f64,
    lanes: HashMap<String, Lane>,
    waiting: usize,
    number: u64,
    service: Service,
}

/// The calls of one tenant, in the order in which they came.
#[derive(Debug)]
struct Lane {
    weight: f64,
    /// The start tag of its next call.
    start: f64,
    rows: u64,
    waiters: VecDeque<Waiter>,
}

#[derive(Debug)]
struct Waiter {
    number: u64,
    items: u64,
    call: oneshot::Sender<()>,
}

/// How fast rows are answered while others wait.
#[derive(Debug, Default)]
struct Service {
    last: Option<Instant>,
    seconds: f64,
    rows: f64,
}

impl Service {
    fn ended(&mut self, rows: u64, now: Instant, busy: bool) {
        if let Some(last) = self.last {
            let passed = now.saturating_duration_since(last).as_secs_f64();
            let smooth = |old: f64, new: f64| old + (new - old) * SMOOTHING;
            self.seconds = smooth(self.seconds, passed);
            self.rows = smooth(self.rows, rows as f64);
        }
        self.last = busy.then_some(now);
    }

    fn estimate(&self, rows: f64) -> Option<Duration> {
        let each = self.seconds / self.rows;
        Duration::try_from_secs_f64(each * rows).ok()
    }
}

impl Line {
    fn enter(
        &mut self,
        tenant: &Tenant,
        items: u64,
        queue_max: usize,
        patience: Duration,
    ) -> Entry {
        let (time, room) = (self.time, self.under_way < self.window);
        let lane = self.lane(tenant);
        if lane.waiters.is_empty() {
            lane.start = lane.start.max(time);
        }
        if room && self.waiting == 0 {
            self.serve(&tenant.name, items);
            return Entry::Passed;
        }
        let (ahead, length) = self.ahead(tenant);
        let estimate = self.service.estimate(ahead);
        if length >= queue_max {
            return Entry::Refused(Reason::Full, estimate.unwrap_or(RETRY));
        }
        if let Some(wait) = estimate.filter(|wait| *wait > patience) {
            return Entry::Refused(Reason::TooLate, wait);
        }
        let (call, called) = oneshot::channel();
        self.number += 1;
        self.waiting += 1;
        let number = self.number;
        if let Some(lane) = self.lanes.get_mut(&tenant.name) {
            lane.rows = lane.rows.saturating_add(items);
            lane.waiters.push_back(Waiter {
                number,
                items,
                call,
            });
        }
        self.dispatch();
        Entry::Waits(Place {
            tenant: tenant.name.clone(),
            number,
            items,
            called,
        })
    }

    fn lane(&mut self, tenant: &Tenant) -> &mut Lane {
        let time = self.time;
        if self.lanes.len() >= LANES_MANY && !self.lanes.contains_key(&tenant.name) {
            // A tenant that is not ahead of the others counts as a new one.
            self.lanes
                .retain(|_, lane| !lane.waiters.is_empty() || lane.start > time);
        }
        let lane = self
            .lanes
            .entry(tenant.name.clone())
            .or_insert_with(|| Lane {
                weight: 1.0,
                start: time,
                rows: 0,
                waiters: VecDeque::new(),
            });
        lane.weight = f64::from(tenant.weight.max(1));
        lane
    }

    /// Rows that have their turn before a further call of a lane: its own, and
    /// of each other lane as many as its weight gives it meanwhile. And the
    /// calls in the lane.
    fn ahead(&self, tenant: &Tenant) -> (f64, usize) {
        let Some(lane) = self.lanes.get(&tenant.name) else {
            return (0.0, 0);
        };
        let own = lane.rows as f64;
        let others = self.lanes.values().map(|other| {
            let meanwhile = own * other.weight / lane.weight;
            meanwhile.min(other.rows as f64)
        });
        let over = self.under_way.saturating_sub(self.window) as f64;
        // The lane itself is among the others.
        (others.sum::<f64>() + over, lane.waiters.len())
    }

    /// Counts a call that has its turn.
    fn serve(&mut self, tenant: &str, items: u64) {
        self.under_way = self.under_way.saturating_add(items);
        if let Some(lane) = self.lanes.get_mut(tenant) {
            self.time = lane.start;
            lane.start += items as f64 / lane.weight;
        }
    }

    /// Calls whoever has room, the least start tag first.
    fn dispatch(&mut self) {
        while self.waiting > 0 && self.under_way < self.window {
            let lanes = self.lanes.iter_mut();
            let waiting = lanes.filter(|(_, lane)| !lane.waiters.is_empty());
            let Some((tenant, lane)) = waiting.min_by(|(_, a), (_, b)| a.start.total_cmp(&b.start))
            else {
                return;
            };
            let Some(waiter) = lane.waiters.pop_front() else {
                return;
            };
            self.waiting -= 1;
            lane.rows = lane.rows.saturating_sub(waiter.items);
            // Who has left takes no turn.
            if waiter.call.send(()).is_ok() {
                let tenant = tenant.clone();
                self.serve(&tenant, waiter.items);
            }
        }
    }

    /// A call has ended.
    fn release(&mut self, items: u64, now: Instant) {
        self.under_way = self.under_way.saturating_sub(items);
        self.service.ended(items, now, self.waiting > 0);
        self.dispatch();
        if self.under_way == 0 && self.waiting == 0 {
            // Nobody is ahead of anybody.
            self.lanes.clear();
            self.time = 0.0;
        }
    }

    /// A caller leaves before its turn.
    fn leave(&mut self, place: &Place) {
        let Some(lane) = self.lanes.get_mut(&place.tenant) else {
            return;
        };
        let found = lane
            .waiters
            .binary_search_by_key(&place.number, |waiter| waiter.number);
        if let Ok(index) = found {
            lane.waiters.remove(index);
            lane.rows = lane.rows.saturating_sub(place.items);
            self.waiting -= 1;
        }
    }
}
