//! Measures how long the threads of the network were busy or stopped.
//!
//! A task on each of them sleeps for a few milliseconds and measures how late it
//! wakes up. What it was late in wall time is what every other task there had
//! to wait, whether for a long turn of one of them or because the system gave
//! the thread no time. The thread's own processor time tells the two apart.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use prometheus_client::metrics::histogram::Histogram;
use rustix::time::{ClockId, clock_gettime};
use tokio::runtime::Handle;
use tokio::task::JoinSet;

use crate::metrics::{Metrics, duration_histogram};
use crate::shards::Shards;

/// How long the tasks sleep.
const INTERVAL: Duration = Duration::from_millis(10);
/// Shorter delays are those of the timer, and no stalls.
const STALL_MIN: Duration = Duration::from_millis(2);
/// How long a delay of this process is an excuse for others.
const RECENT: Duration = Duration::from_secs(10);

/// Watches threads until it is dropped.
#[derive(Debug)]
pub struct Watchdog {
    starvation: Starvation,
    _tasks: JoinSet<()>,
}

/// How late the tasks of this process were. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Starvation(Arc<State>);

#[derive(Debug)]
struct State {
    started: Instant,
    stalls: Histogram,
    threads: Vec<Thread>,
}

#[derive(Debug, Default)]
struct Thread {
    /// Nanoseconds from the start to when its task must have woken up next.
    due: AtomicU64,
    /// The most processor time between two wake-ups, in nanoseconds.
    turn: AtomicU64,
    /// The longest delays of the last seconds.
    late: Mutex<Late>,
}

/// The longest delay of each half of the time that counts.
#[derive(Debug, Default)]
struct Late {
    begun: Duration,
    now: Duration,
    before: Duration,
}

impl Watchdog {
    /// Watches every shard and the current runtime.
    pub fn start(shards: &Shards, metrics: &Metrics) -> Self {
        let stalls = duration_histogram();
        metrics.register(|registry| {
            registry.register(
                "andon_shard_stall_seconds",
                "How long the tasks of a thread waited for it",
                stalls.clone(),
            );
        });
        let count = shards.count() + 1;
        let state = Arc::new(State {
            started: Instant::now(),
            stalls,
            threads: (0..count).map(|_| Thread::default()).collect(),
        });
        let mut tasks = JoinSet::new();
        for index in 0..count {
            let watching = watch(state.clone(), index);
            if index < shards.count() {
                tasks.spawn_on(watching, shards.handle(index))
            } else {
                tasks.spawn_on(watching, &Handle::current())
            };
        }
        Self {
            starvation: Starvation(state),
            _tasks: tasks,
        }
    }

    /// How late this process was.
    pub fn starvation(&self) -> Starvation {
        self.starvation.clone()
    }
}

impl Starvation {
    /// A process that is never late.
    pub fn none() -> Self {
        Self(Arc::new(State {
            started: Instant::now(),
            stalls: duration_histogram(),
            threads: Vec::new(),
        }))
    }

    /// The longest time within the last ten seconds that the tasks of some thread
    /// waited for it, up to now. Others must be given that much more time: what
    /// they sent meanwhile has not been read yet.
    pub fn recent(&self) -> Duration {
        let now = self.0.started.elapsed();
        let late = self.0.threads.iter().map(|thread| thread.recent(now));
        late.max().unwrap_or_default()
    }

    /// The most processor time that a shard took between two wake-ups of its
    /// watchdog, since the last call: its longest turn, and up to ten
    /// milliseconds more.
    pub fn take_turn(&self) -> Duration {
        let turns = self.0.threads.iter();
        // The last thread is no shard.
        let shards = turns.rev().skip(1);
        let longest = shards.map(|thread| thread.turn.swap(0, Ordering::Relaxed));
        Duration::from_nanos(longest.max().unwrap_or_default())
    }
}

impl Thread {
    fn recent(&self, now: Duration) -> Duration {
        let due = Duration::from_nanos(self.due.load(Ordering::Relaxed));
        // A thread that has not woken up yet is late as well.
        let overdue = if due.is_zero() {
            Duration::ZERO
        } else {
            now.saturating_sub(due)
        };
        let late = self.late.lock().unwrap_or_else(PoisonError::into_inner);
        late.longest(now).max(overdue)
    }
}

impl Late {
    fn longest(&self, now: Duration) -> Duration {
        match now.saturating_sub(self.begun) {
            age if age < RECENT => self.now.max(self.before),
            age if age < RECENT * 2 => self.now,
            _ => Duration::ZERO,
        }
    }

    fn add(&mut self, now: Duration, delay: Duration) {
        if now.saturating_sub(self.begun) >= RECENT {
            *self = Self {
                begun: now,
                now: Duration::ZERO,
                before: if now.saturating_sub(self.begun) < RECENT * 2 {
                    self.now
                } else {
                    Duration::ZERO
                },
            };
        }
        self.now = self.now.max(delay);
    }
}

/// The processor time of this thread.
pub fn thread_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or_default();
    let nanoseconds = u32::try_from(time.tv_nsec).unwrap_or_default();
    Duration::new(seconds, nanoseconds)
}

async fn watch(state: Arc<State>, index: usize) {
    let Some(thread) = state.threads.get(index) else {
        return;
    };
    let nanoseconds = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    let mut computed = thread_time();
    loop {
        let due = state.started.elapsed() + INTERVAL;
        thread.due.store(nanoseconds(due), Ordering::Relaxed);
        tokio::time::sleep(INTERVAL).await;
        let now = state.started.elapsed();
        let delay = now.saturating_sub(due);
        let computed_now = thread_time();
        // A runtime of several threads may have moved the task.
        let turn = computed_now.saturating_sub(computed);
        computed = computed_now;
        thread.turn.fetch_max(nanoseconds(turn), Ordering::Relaxed);
        if delay >= STALL_MIN {
            state.stalls.observe(delay.as_secs_f64());
            let mut late = thread.late.lock().unwrap_or_else(PoisonError::into_inner);
            late.add(now, delay);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn a_turn_is_measured_in_wall_time_and_processor_time() {
        let shards = Shards::start(1).unwrap();
        let metrics = Metrics::default();
        let watchdog = Watchdog::start(&shards, &metrics);
        let starvation = watchdog.starvation();
        let stall = async |busy: Duration| {
            let turn = async move {
                let begun = thread_time();
                std::thread::sleep(Duration::from_millis(150));
                while thread_time().saturating_sub(begun) < busy {}
            };
            // The watchdog is asleep, and late then.
            tokio::time::sleep(Duration::from_millis(50)).await;
            shards.handle(0).spawn(turn).await.unwrap();
            while starvation.recent() < Duration::from_millis(100) {
                tokio::time::sleep(INTERVAL).await;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
            starvation.take_turn()
        };
        assert!(stall(Duration::ZERO).await < Duration::from_millis(50));
        assert!(stall(Duration::from_millis(60)).await >= Duration::from_millis(60));
        assert!(starvation.take_turn() < Duration::from_millis(60));
        let text = metrics.to_text().unwrap();
        assert!(text.contains("andon_shard_stall_seconds_count"), "{text}");
    }

    #[test]
    fn a_delay_counts_for_ten_seconds_and_is_forgotten_then() {
        let seconds = Duration::from_secs;
        let mut late = Late::default();
        late.add(seconds(1), seconds(5));
        late.add(seconds(2), seconds(1));
        assert_eq!(late.longest(seconds(9)), seconds(5));
        late.add(seconds(11), seconds(1));
        assert_eq!(
            late.longest(seconds(12)),
            seconds(5),
            "ten seconds at least"
        );
        assert_eq!(late.longest(seconds(21)), seconds(1));
        assert_eq!(late.longest(seconds(40)), Duration::ZERO);
        late.add(seconds(60), seconds(2));
        assert_eq!(late.longest(seconds(60)), seconds(2));
    }

    #[test]
    fn a_thread_that_has_not_woken_up_is_late() {
        let thread = Thread::default();
        assert_eq!(thread.recent(Duration::from_secs(9)), Duration::ZERO);
        thread.due.store(1_000_000_000, Ordering::Relaxed);
        assert_eq!(
            thread.recent(Duration::from_secs(9)),
            Duration::from_secs(8)
        );
    }
}
