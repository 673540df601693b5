//! Fair queueing between tenants: for each model, start-time fair queueing of
//! rows (Goyal, Vin and Cheng, "Start-time Fair Queueing", 1996), weighted by
//! tenant. It stands in front of the queues of the workers, which stay short. See
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

/// Models above which empty queues are removed.
const QUEUES_MAX: usize = 1024;
/// Tenants of a queue above which idle tenants are removed.
const TENANTS_BEFORE_CLEANUP: usize = 64;
/// The weight of a new measurement in the exponential moving average.
const SMOOTHING: f64 = 0.05;
/// The retry delay of a refused call, before the service rate is known.
const RETRY: Duration = Duration::from_millis(100);
/// The longest retry delay of a refused call.
const RETRY_MAX: Duration = Duration::from_secs(5);

/// A call that waits for its turn.
#[derive(Debug, Clone, Copy)]
pub struct TurnRequest<'a> {
    /// The model.
    pub model: &'a str,
    /// The workers that serve the model.
    pub workers: usize,
    /// Rows.
    pub items: u64,
    /// When the caller stops waiting.
    pub deadline: Instant,
}

/// The fair queues of all models.
#[derive(Debug)]
pub struct FairQueues {
    /// Rows that may be in flight at each worker.
    rows: u64,
    /// Calls of one tenant that may wait.
    queue_max: usize,
    queues: RwLock<HashMap<String, Arc<Mutex<FairQueue>>>>,
    metrics: LimitMetrics,
}

/// The turn of one call, until it is dropped.
#[derive(Debug, Default)]
pub struct Turn(Option<(Arc<Mutex<FairQueue>>, u64)>);

impl Drop for Turn {
    fn drop(&mut self) {
        if let Some((queue, items)) = self.0.take() {
            lock(&queue).release(items, Instant::now());
        }
    }
}

fn lock(queue: &Mutex<FairQueue>) -> MutexGuard<'_, FairQueue> {
    queue.lock().unwrap_or_else(PoisonError::into_inner)
}

impl FairQueues {
    /// Starts with empty queues.
    pub fn new(settings: &LimitSettings, metrics: &LimitMetrics) -> Self {
        Self {
            rows: u64::from(settings.fair_rows),
            queue_max: settings.fair_queue as usize,
            queues: RwLock::default(),
            metrics: metrics.clone(),
        }
    }

    /// Waits for the turn of a call. A caller that stops waiting leaves the
    /// queue. The error is an overload with a retry delay: the queue is full, or
    /// the turn would come after the deadline.
    pub async fn turn(&self, tenant: &Tenant, request: TurnRequest<'_>) -> Result<Turn, Error> {
        let queue = self.queue(request.model);
        let admission = {
            let mut queue = lock(&queue);
            let workers = u64::try_from(request.workers).unwrap_or(1).max(1);
            queue.window = self.rows.saturating_mul(workers);
            let now = Instant::now();
            let wait_max = request.deadline.saturating_duration_since(now);
            queue.enter(tenant, request.items, self.queue_max, wait_max)
        };
        match admission {
            Admission::Granted => Ok(Turn(Some((queue, request.items)))),
            Admission::Queued(ticket) => {
                let waiting = QueuedTicket::new(queue, ticket, &self.metrics.fair_waiting);
                waiting.turn().await
            }
            Admission::Refused(reason, after) => {
                self.metrics.limited(reason.name()).inc();
                let after = after.clamp(Duration::from_millis(10), RETRY_MAX);
                Err(Error::overloaded(reason.message(), after))
            }
        }
    }

    fn queue(&self, model: &str) -> Arc<Mutex<FairQueue>> {
        let queues = self.queues.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(queue) = queues.get(model) {
            return queue.clone();
        }
        drop(queues);
        let mut queues = self.queues.write().unwrap_or_else(PoisonError::into_inner);
        if queues.len() >= QUEUES_MAX {
            queues.retain(|_, queue| Arc::strong_count(queue) > 1);
        }
        queues.entry(model.to_owned()).or_default().clone()
    }
}

/// The outcome for a new call.
#[derive(Debug)]
enum Admission {
    /// It has its turn at once.
    Granted,
    /// It waits.
    Queued(Ticket),
    /// It is refused; when to try again.
    Refused(FairRefusal, Duration),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FairRefusal {
    /// The tenant has as many calls in the queue as it may have.
    QueueFull,
    /// The turn would come after the deadline.
    TooLate,
}

impl FairRefusal {
    fn name(self) -> &'static str {
        match self {
            Self::QueueFull => "fair_queue",
            Self::TooLate => "fair_deadline",
        }
    }

    fn message(self) -> &'static str {
        match self {
            Self::QueueFull => "too many calls of the tenant are queued for this model",
            Self::TooLate => "the queue of this model is too long for the call's deadline",
        }
    }
}

/// The position of a call in the queue of its tenant.
#[derive(Debug)]
struct Ticket {
    tenant: String,
    number: u64,
    items: u64,
    granted: oneshot::Receiver<()>,
}

/// A call in a queue, until its turn comes or its caller leaves.
#[derive(Debug)]
struct QueuedTicket {
    queue: Arc<Mutex<FairQueue>>,
    ticket: Ticket,
    served: bool,
    gauge: Gauge,
}

impl QueuedTicket {
    fn new(queue: Arc<Mutex<FairQueue>>, ticket: Ticket, gauge: &Gauge) -> Self {
        gauge.inc();
        Self {
            queue,
            ticket,
            served: false,
            gauge: gauge.clone(),
        }
    }

    async fn turn(mut self) -> Result<Turn, Error> {
        match (&mut self.ticket.granted).await {
            Ok(()) => {
                self.served = true;
                Ok(Turn(Some((self.queue.clone(), self.ticket.items))))
            }
            // Cannot happen: a queue is not dropped while calls wait in it.
            Err(_) => Err(Error::overloaded(FairRefusal::QueueFull.message(), RETRY)),
        }
    }
}

impl Drop for QueuedTicket {
    fn drop(&mut self) {
        self.gauge.dec();
        if self.served {
            return;
        }
        let mut queue = lock(&self.queue);
        match self.ticket.granted.try_recv() {
            // The turn came at the same moment: the next call takes it.
            Ok(()) => queue.release(self.ticket.items, Instant::now()),
            Err(_) => queue.leave(&self.ticket),
        }
    }
}

/// The fair queue of one model.
#[derive(Debug, Default)]
struct FairQueue {
    /// Rows whose turn has come and has not ended.
    in_flight: u64,
    /// Rows that may be in flight at once.
    window: u64,
    /// The start tag of the call that was served last.
    virtual_time: f64,
    tenants: HashMap<String, TenantQueue>,
    /// Calls that wait.
    waiting: usize,
    /// The number of the call that came last.
    number: u64,
    service_rate: ServiceRate,
}

/// The waiting calls of one tenant, in order of arrival.
#[derive(Debug)]
struct TenantQueue {
    weight: f64,
    /// The start tag of its next call.
    start_tag: f64,
    /// The rows of the calls.
    rows: u64,
    calls: VecDeque<QueuedCall>,
}

#[derive(Debug)]
struct QueuedCall {
    number: u64,
    items: u64,
    sender: oneshot::Sender<()>,
}

/// How fast rows end while others wait: exponential moving averages of the rows
/// of a call and of the seconds between the ends of two calls.
#[derive(Debug, Default)]
struct ServiceRate {
    last: Option<Instant>,
    seconds: f64,
    rows: f64,
}

impl ServiceRate {
    fn ended(&mut self, rows: u64, now: Instant, busy: bool) {
        if let Some(last) = self.last {
            let elapsed = now.saturating_duration_since(last).as_secs_f64();
            let smooth = |old: f64, new: f64| old + (new - old) * SMOOTHING;
            self.seconds = smooth(self.seconds, elapsed);
            self.rows = smooth(self.rows, rows as f64);
        }
        self.last = busy.then_some(now);
    }

    fn estimate(&self, rows: f64) -> Option<Duration> {
        let each = self.seconds / self.rows;
        Duration::try_from_secs_f64(each * rows).ok()
    }
}

impl FairQueue {
    fn enter(
        &mut self,
        tenant: &Tenant,
        items: u64,
        queue_max: usize,
        wait_max: Duration,
    ) -> Admission {
        let virtual_time = self.virtual_time;
        let room = self.in_flight < self.window;
        let queue = self.queue_of(tenant);
        if queue.calls.is_empty() {
            queue.start_tag = queue.start_tag.max(virtual_time);
        }
        if room && self.waiting == 0 {
            self.start_service(&tenant.name, items);
            return Admission::Granted;
        }
        let (rows_ahead, length) = self.rows_ahead(tenant);
        let estimate = self.service_rate.estimate(rows_ahead);
        if length >= queue_max {
            return Admission::Refused(FairRefusal::QueueFull, estimate.unwrap_or(RETRY));
        }
        if let Some(wait) = estimate.filter(|wait| *wait > wait_max) {
            return Admission::Refused(FairRefusal::TooLate, wait);
        }
        let (sender, granted) = oneshot::channel();
        self.number += 1;
        self.waiting += 1;
        let number = self.number;
        if let Some(queue) = self.tenants.get_mut(&tenant.name) {
            queue.rows = queue.rows.saturating_add(items);
            queue.calls.push_back(QueuedCall {
                number,
                items,
                sender,
            });
        }
        self.dispatch();
        Admission::Queued(Ticket {
            tenant: tenant.name.clone(),
            number,
            items,
            granted,
        })
    }

    fn queue_of(&mut self, tenant: &Tenant) -> &mut TenantQueue {
        let virtual_time = self.virtual_time;
        if self.tenants.len() >= TENANTS_BEFORE_CLEANUP && !self.tenants.contains_key(&tenant.name)
        {
            // An idle tenant that is not ahead of the others counts as new.
            self.tenants
                .retain(|_, queue| !queue.calls.is_empty() || queue.start_tag > virtual_time);
        }
        let queue = self
            .tenants
            .entry(tenant.name.clone())
            .or_insert_with(|| TenantQueue {
                weight: 1.0,
                start_tag: virtual_time,
                rows: 0,
                calls: VecDeque::new(),
            });
        queue.weight = f64::from(tenant.weight.max(1));
        queue
    }

    /// The rows that are served before a further call of a tenant: its own, and
    /// of each other tenant as many as its weight gives it meanwhile. Also the
    /// calls of the tenant that wait.
    fn rows_ahead(&self, tenant: &Tenant) -> (f64, usize) {
        let Some(queue) = self.tenants.get(&tenant.name) else {
            return (0.0, 0);
        };
        let own = queue.rows as f64;
        let others = self.tenants.values().map(|other| {
            let meanwhile = own * other.weight / queue.weight;
            meanwhile.min(other.rows as f64)
        });
        let over = self.in_flight.saturating_sub(self.window) as f64;
        // `others` includes the tenant itself.
        (others.sum::<f64>() + over, queue.calls.len())
    }

    /// Counts a call whose turn has come.
    fn start_service(&mut self, tenant: &str, items: u64) {
        self.in_flight = self.in_flight.saturating_add(items);
        if let Some(queue) = self.tenants.get_mut(tenant) {
            self.virtual_time = queue.start_tag;
            queue.start_tag += items as f64 / queue.weight;
        }
    }

    /// Gives calls their turn while there is room, the least start tag first.
    fn dispatch(&mut self) {
        while self.waiting > 0 && self.in_flight < self.window {
            let tenants = self.tenants.iter_mut();
            let waiting = tenants.filter(|(_, queue)| !queue.calls.is_empty());
            let Some((tenant, queue)) =
                waiting.min_by(|(_, a), (_, b)| a.start_tag.total_cmp(&b.start_tag))
            else {
                return;
            };
            let Some(call) = queue.calls.pop_front() else {
                return;
            };
            self.waiting -= 1;
            queue.rows = queue.rows.saturating_sub(call.items);
            // A caller that has left takes no turn.
            if call.sender.send(()).is_ok() {
                let tenant = tenant.clone();
                self.start_service(&tenant, call.items);
            }
        }
    }

    /// A call has ended.
    fn release(&mut self, items: u64, now: Instant) {
        self.in_flight = self.in_flight.saturating_sub(items);
        self.service_rate.ended(items, now, self.waiting > 0);
        self.dispatch();
        if self.in_flight == 0 && self.waiting == 0 {
            // An idle queue starts again: no tenant is ahead of another.
            self.tenants.clear();
            self.virtual_time = 0.0;
        }
    }

    /// Removes a call whose caller leaves before its turn.
    fn leave(&mut self, ticket: &Ticket) {
        let Some(queue) = self.tenants.get_mut(&ticket.tenant) else {
            return;
        };
        let found = queue
            .calls
            .binary_search_by_key(&ticket.number, |call| call.number);
        if let Ok(index) = found {
            queue.calls.remove(index);
            queue.rows = queue.rows.saturating_sub(ticket.items);
            self.waiting -= 1;
        }
    }
}
