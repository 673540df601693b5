//! The thread pool of the kernels: one thread for each further core, whatever the number of
//! models.
//!
//! A caller runs its tasks itself and gets help from pool threads that are free: it never waits
//! for one that is busy with another caller's work. For some microseconds after a task a pool
//! thread spins for the next one before it sleeps, because waking takes longer than many tasks do.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// How long a pool thread spins before it sleeps.
const SPIN_TIME: Duration = Duration::from_micros(40);

/// How often a caller checks whether the pool threads are done before it yields its core.
const SPINS_BEFORE_YIELD: u32 = 4_096;

thread_local! {
    /// Whether this thread is running a task: then its own tasks are not shared again.
    static IN_TASK: Cell<bool> = const { Cell::new(false) };
}

static THREADS: OnceLock<usize> = OnceLock::new();

/// Sets how many threads compute a batch, at least one, before the first batch. The default is all
/// cores that the process may use.
pub fn set_threads(threads: usize) {
    let _ = THREADS.set(threads.max(1));
}

/// Threads that compute a batch, pool threads and caller together.
pub(crate) fn threads() -> usize {
    *THREADS.get_or_init(|| std::thread::available_parallelism().map_or(1, usize::from))
}

/// How many shares work of this size is worth dividing into here and now, where a share should have
/// at least `share_min`.
pub(super) fn shares(work: usize, share_min: usize) -> usize {
    if IN_TASK.get() {
        return 1;
    }
    (work / share_min).clamp(1, threads())
}

/// Runs `task(0)` to `task(tasks - 1)`, on this thread and on pool threads that are free, and
/// returns when all are done.
pub(crate) fn parallel_for(tasks: usize, task: &(dyn Fn(usize) + Sync)) {
    if tasks <= 1 || IN_TASK.get() || threads() == 1 {
        let was_in_task = IN_TASK.get();
        for number in 0..tasks {
            task(number);
        }
        IN_TASK.set(was_in_task);
        return;
    }
    let work = Arc::new(ParallelWork {
        // SAFETY: `parallel_for` returns, or goes on to unwind, only once no pool thread is in
        // the work and none can enter it any more; until then the borrow lives.
        task: unsafe {
            std::mem::transmute::<&(dyn Fn(usize) + Sync), &'static (dyn Fn(usize) + Sync)>(task)
        },
        next: AtomicUsize::new(0),
        tasks,
        helpers: AtomicUsize::new(0),
        failed: AtomicBool::new(false),
    });
    let pool = pool();
    pool.publish(&work);
    work.run_tasks();
    pool.retract(&work);
    let mut spins = 0u32;
    while work.helpers.load(Ordering::Acquire) > 0 {
        spins += 1;
        if spins < SPINS_BEFORE_YIELD {
            std::hint::spin_loop();
        } else {
            // The pool thread may be waiting for this very core.
            std::thread::yield_now();
        }
    }
    if work.failed.load(Ordering::Relaxed) {
        std::panic::resume_unwind(Box::new("a task of the forward pass failed"));
    }
}

/// The tasks of one call of [`parallel_for`].
struct ParallelWork {
    task: &'static (dyn Fn(usize) + Sync),
    next: AtomicUsize,
    tasks: usize,
    /// Pool threads that are running its tasks.
    helpers: AtomicUsize,
    failed: AtomicBool,
}

impl ParallelWork {
    /// Runs tasks until none is left. A task that panics fails the work, not the pool thread.
    fn run_tasks(&self) {
        IN_TASK.set(true);
        loop {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            if number >= self.tasks {
                break;
            }
            if catch_unwind(AssertUnwindSafe(|| (self.task)(number))).is_err() {
                self.failed.store(true, Ordering::Relaxed);
            }
        }
        IN_TASK.set(false);
    }

    fn has_tasks(&self) -> bool {
        self.next.load(Ordering::Relaxed) < self.tasks
    }
}

struct ThreadPool {
    published: Mutex<Vec<Arc<ParallelWork>>>,
    /// Work published so far; spinning threads poll it.
    count: AtomicUsize,
    sleepers: AtomicUsize,
    wake: Condvar,
}

fn pool() -> &'static ThreadPool {
    static POOL: OnceLock<&'static ThreadPool> = OnceLock::new();
    POOL.get_or_init(|| {
        let pool: &'static ThreadPool = Box::leak(Box::new(ThreadPool {
            published: Mutex::new(Vec::new()),
            count: AtomicUsize::new(0),
            sleepers: AtomicUsize::new(0),
            wake: Condvar::new(),
        }));
        for number in 1..threads() {
            // Without a pool thread the callers run all tasks themselves.
            let _ = std::thread::Builder::new()
                .name(format!("kernel-{number}"))
                .spawn(|| pool.run_thread());
        }
        pool
    })
}

impl ThreadPool {
    fn published(&self) -> MutexGuard<'_, Vec<Arc<ParallelWork>>> {
        self.published
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn publish(&self, work: &Arc<ParallelWork>) {
        let mut published = self.published();
        published.push(Arc::clone(work));
        // Under the lock: a thread that is about to sleep holds it from its last check on.
        self.count.fetch_add(1, Ordering::SeqCst);
        drop(published);
        // As many as there are tasks for: on a large machine most may sleep on.
        let sleepers = self.sleepers.load(Ordering::SeqCst);
        for _ in 0..sleepers.min(work.tasks - 1) {
            self.wake.notify_one();
        }
    }

    fn retract(&self, work: &Arc<ParallelWork>) {
        self.published().retain(|other| !Arc::ptr_eq(other, work));
    }

    /// Work that has tasks left, entered.
    fn enter(&self) -> Option<Arc<ParallelWork>> {
        let published = self.published();
        let work = published.iter().find(|work| work.has_tasks())?;
        // Under the lock, so that the caller cannot retract the work in between.
        work.helpers.fetch_add(1, Ordering::AcqRel);
        Some(Arc::clone(work))
    }

    fn run_thread(&self) {
        loop {
            let seen = self.count.load(Ordering::SeqCst);
            while let Some(work) = self.enter() {
                work.run_tasks();
                work.helpers.fetch_sub(1, Ordering::AcqRel);
            }
            if !self.spin(seen) {
                self.sleep(seen);
            }
        }
    }

    /// Whether new work was published within [`SPIN_TIME`].
    fn spin(&self, seen: usize) -> bool {
        let start = Instant::now();
        loop {
            for _ in 0..64 {
                if self.count.load(Ordering::Relaxed) != seen {
                    return true;
                }
                std::hint::spin_loop();
            }
            if start.elapsed() > SPIN_TIME {
                return false;
            }
        }
    }

    fn sleep(&self, seen: usize) {
        let published = self.published();
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        let woken = self
            .wake
            .wait_while(published, |_| self.count.load(Ordering::SeqCst) == seen);
        drop(woken);
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;

    #[test]
    fn every_task_runs_once_whoever_calls() {
        let rounds: Vec<_> = (0..4)
            .map(|_| {
                std::thread::spawn(|| {
                    for tasks in 0..200 {
                        let counts: Vec<AtomicU64> =
                            (0..tasks).map(|_| AtomicU64::new(0)).collect();
                        parallel_for(tasks, &|number| {
                            counts[number].fetch_add(1, Ordering::Relaxed);
                            parallel_for(3, &|_| {});
                        });
                        assert!(
                            counts
                                .iter()
                                .all(|count| count.load(Ordering::Relaxed) == 1)
                        );
                    }
                })
            })
            .collect();
        for round in rounds {
            round.join().unwrap();
        }
    }

    #[test]
    fn a_failed_task_is_the_callers() {
        let outcome = catch_unwind(|| {
            parallel_for(8, &|number| assert_ne!(number, 5));
        });
        assert!(outcome.is_err());
        parallel_for(8, &|_| {});
    }
}
