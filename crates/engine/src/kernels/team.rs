//! The processor's other cores, lent to whoever has work that can be cut into tasks.
//!
//! There is one helper for each core but one, whatever runs on them. A caller does its own tasks
//! itself and takes help where a helper is free: it never waits for one that is busy elsewhere.
//! For some microseconds after a task a helper looks for the next without sleeping, because
//! waking takes longer than many tasks do.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// How long a helper looks for work before it sleeps.
const LOOKING: Duration = Duration::from_micros(40);

/// How often a caller looks whether its helpers are done before it lets others run.
const LOOKS_BEFORE_YIELD: u32 = 4_096;

thread_local! {
    /// Whether this thread is inside of a task: then its own tasks are not shared again.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

static THREADS: OnceLock<usize> = OnceLock::new();

/// Sets how many threads work on a batch, before the first batch: not less than one, and all
/// cores that the process may use if this is never called.
pub fn set_threads(threads: usize) {
    let _ = THREADS.set(threads.max(1));
}

/// Threads that work on a batch, helpers and caller together.
pub(crate) fn threads() -> usize {
    *THREADS.get_or_init(|| std::thread::available_parallelism().map_or(1, usize::from))
}

/// Into how many parts work of this size is worth cutting here and now.
pub(super) fn shares(work: usize, least: usize) -> usize {
    if INSIDE.get() {
        return 1;
    }
    (work / least).clamp(1, threads())
}

/// Runs `task(0)` to `task(tasks - 1)`, on this thread and on helpers that are free, and returns
/// when all are done.
pub(crate) fn run(tasks: usize, task: &(dyn Fn(usize) + Sync)) {
    if tasks <= 1 || INSIDE.get() || threads() == 1 {
        let was_inside = INSIDE.get();
        for number in 0..tasks {
            task(number);
        }
        INSIDE.set(was_inside);
        return;
    }
    let work = Arc::new(Work {
        // SAFETY: `run` returns, or goes on to unwind, only once no helper is inside of the
        // work and none can enter it any more; until then the borrow lives.
        task: unsafe {
            std::mem::transmute::<&(dyn Fn(usize) + Sync), &'static (dyn Fn(usize) + Sync)>(task)
        },
        next: AtomicUsize::new(0),
        tasks,
        helpers: AtomicUsize::new(0),
        failed: AtomicBool::new(false),
    });
    let team = team();
    team.offer(&work);
    work.take_tasks();
    team.withdraw(&work);
    let mut looks = 0u32;
    while work.helpers.load(Ordering::Acquire) > 0 {
        looks += 1;
        if looks < LOOKS_BEFORE_YIELD {
            std::hint::spin_loop();
        } else {
            // The helper may be waiting for this very core.
            std::thread::yield_now();
        }
    }
    if work.failed.load(Ordering::Relaxed) {
        std::panic::resume_unwind(Box::new("a task of the forward pass failed"));
    }
}

/// Tasks that somebody waits for.
struct Work {
    task: &'static (dyn Fn(usize) + Sync),
    next: AtomicUsize,
    tasks: usize,
    /// Helpers inside of it.
    helpers: AtomicUsize,
    failed: AtomicBool,
}

impl Work {
    /// Does tasks until none is left. A task that fails is told to the caller.
    fn take_tasks(&self) {
        INSIDE.set(true);
        loop {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            if number >= self.tasks {
                break;
            }
            if catch_unwind(AssertUnwindSafe(|| (self.task)(number))).is_err() {
                self.failed.store(true, Ordering::Relaxed);
            }
        }
        INSIDE.set(false);
    }

    fn has_tasks(&self) -> bool {
        self.next.load(Ordering::Relaxed) < self.tasks
    }
}

struct Team {
    offers: Mutex<Vec<Arc<Work>>>,
    /// Offers so far: what a helper that does not sleep yet looks at.
    count: AtomicUsize,
    sleepers: AtomicUsize,
    wake: Condvar,
}

fn team() -> &'static Team {
    static TEAM: OnceLock<&'static Team> = OnceLock::new();
    TEAM.get_or_init(|| {
        let team: &'static Team = Box::leak(Box::new(Team {
            offers: Mutex::new(Vec::new()),
            count: AtomicUsize::new(0),
            sleepers: AtomicUsize::new(0),
            wake: Condvar::new(),
        }));
        for number in 1..threads() {
            // Without a helper the callers do all of the work themselves.
            let _ = std::thread::Builder::new()
                .name(format!("kernel-{number}"))
                .spawn(|| team.help());
        }
        team
    })
}

impl Team {
    fn offers(&self) -> MutexGuard<'_, Vec<Arc<Work>>> {
        self.offers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn offer(&self, work: &Arc<Work>) {
        let mut offers = self.offers();
        offers.push(Arc::clone(work));
        // Under the lock: a helper that is about to sleep holds it from its last look on.
        self.count.fetch_add(1, Ordering::SeqCst);
        drop(offers);
        // As many as there are tasks for: on a large machine most may sleep on.
        let sleepers = self.sleepers.load(Ordering::SeqCst);
        for _ in 0..sleepers.min(work.tasks - 1) {
            self.wake.notify_one();
        }
    }

    fn withdraw(&self, work: &Arc<Work>) {
        self.offers().retain(|other| !Arc::ptr_eq(other, work));
    }

    /// Work that has tasks left, entered.
    fn enter(&self) -> Option<Arc<Work>> {
        let offers = self.offers();
        let work = offers.iter().find(|work| work.has_tasks())?;
        // Under the lock, so that the caller's withdrawal cannot fall between.
        work.helpers.fetch_add(1, Ordering::AcqRel);
        Some(Arc::clone(work))
    }

    fn help(&self) {
        loop {
            let seen = self.count.load(Ordering::SeqCst);
            while let Some(work) = self.enter() {
                work.take_tasks();
                work.helpers.fetch_sub(1, Ordering::AcqRel);
            }
            if !self.looked_up(seen) {
                self.sleep(seen);
            }
        }
    }

    /// Whether there was a new offer within a short time.
    fn looked_up(&self, seen: usize) -> bool {
        let start = Instant::now();
        loop {
            for _ in 0..64 {
                if self.count.load(Ordering::Relaxed) != seen {
                    return true;
                }
                std::hint::spin_loop();
            }
            if start.elapsed() > LOOKING {
                return false;
            }
        }
    }

    fn sleep(&self, seen: usize) {
        let offers = self.offers();
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        let woken = self
            .wake
            .wait_while(offers, |_| self.count.load(Ordering::SeqCst) == seen);
        drop(woken);
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;

    #[test]
    fn every_task_runs_once_whoever_asks() {
        let rounds: Vec<_> = (0..4)
            .map(|_| {
                std::thread::spawn(|| {
                    for tasks in 0..200 {
                        let counts: Vec<AtomicU64> =
                            (0..tasks).map(|_| AtomicU64::new(0)).collect();
                        run(tasks, &|number| {
                            counts[number].fetch_add(1, Ordering::Relaxed);
                            run(3, &|_| {});
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
            run(8, &|number| assert_ne!(number, 5));
        });
        assert!(outcome.is_err());
        run(8, &|_| {});
    }
}
