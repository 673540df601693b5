//! Threads for work that may take longer than a millisecond: the threads of the
//! network only move bytes.
//!
//! What waits and runs is counted and bounded, with a share for each holder.
//! The holders take turns, so that much work of one does not delay the others.
//! Work whose caller has left ends: it looks at [`Cancelled`] between its items.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use crate::metrics::{Bound, Metrics};
use crate::pot::{Held, Holder, Pot, PotFull};

/// Whether nobody waits for the result any more.
#[derive(Debug, Clone)]
pub struct Cancelled(Arc<AtomicBool>);

impl Cancelled {
    /// For work that somebody waits for to its end.
    pub fn never() -> Self {
        Self(Arc::default())
    }

    /// Whether the work should end.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Sets the flag when the caller leaves.
struct CancelOnDrop(Arc<AtomicBool>);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Why work has no result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PoolError {
    /// Too much work waits: it may be tried again later.
    #[error("too much work waits for a thread: {0}")]
    Full(PotFull),
    /// The work panicked, which is a defect.
    #[error("the work failed")]
    Failed,
}

type Job = Box<dyn FnOnce() + Send>;

/// The threads. Cheap to clone; they end when the last clone is dropped.
#[derive(Clone)]
pub struct WorkPool(Arc<Owner>);

struct Owner {
    queue: Arc<Queue>,
    items: Pot,
    full: Bound,
}

struct Queue {
    jobs: Mutex<Jobs>,
    wake: Condvar,
}

#[derive(Default)]
struct Jobs {
    by_holder: HashMap<Holder, VecDeque<Job>>,
    /// The holders that have jobs, the next one first.
    turns: VecDeque<Holder>,
    ended: bool,
}

impl WorkPool {
    /// Starts `threads` threads, at least one. At most `items_max` items wait or
    /// run, a limit that `--work-items-max` sets.
    pub fn start(threads: usize, items_max: usize, metrics: &Metrics) -> io::Result<Self> {
        let queue = Arc::new(Queue {
            jobs: Mutex::default(),
            wake: Condvar::new(),
        });
        for index in 0..threads.max(1) {
            let queue = queue.clone();
            std::thread::Builder::new()
                .name(format!("work-{index}"))
                .spawn(move || queue.serve())?;
        }
        let items = Pot::new(items_max);
        let full = metrics.bound("--work-items-max");
        let read = items.clone();
        metrics.reading(
            "andon_work_items",
            "Items that wait for the threads for work or run there",
            move || read.used(),
        );
        Ok(Self(Arc::new(Owner { queue, items, full })))
    }

    /// Items that wait or run.
    pub fn items(&self) -> usize {
        self.0.items.used()
    }

    /// Runs work of `weight` items (texts, lists or pieces of data; at least
    /// one) for the process itself.
    pub async fn run<T: Send + 'static>(
        &self,
        weight: usize,
        work: impl FnOnce(&Cancelled) -> T + Send + 'static,
    ) -> Result<T, PoolError> {
        self.run_for(&Holder::Own, weight, work).await
    }

    /// Runs work for a holder. Refused at once when too much waits. When the
    /// future is dropped, work that has not begun never does, and work that has
    /// is told by [`Cancelled`].
    pub async fn run_for<T: Send + 'static>(
        &self,
        holder: &Holder,
        weight: usize,
        work: impl FnOnce(&Cancelled) -> T + Send + 'static,
    ) -> Result<T, PoolError> {
        let held = self.0.take(holder, weight)?;
        let left = Arc::new(AtomicBool::new(false));
        let _left = CancelOnDrop(left.clone());
        let cancelled = Cancelled(left);
        let (sender, result) = oneshot::channel();
        self.0.queue.push(
            holder,
            Box::new(move || {
                if cancelled.is_set() {
                    return;
                }
                // What the work shares with others are counters and permits,
                // which stay whole when it unwinds.
                let outcome = catch_unwind(AssertUnwindSafe(|| work(&cancelled)));
                drop::<Held>(held);
                // An error means that the caller has left.
                let _ = sender.send(outcome.map_err(|_| PoolError::Failed));
            }),
        );
        result.await.unwrap_or(Err(PoolError::Failed))
    }
}

impl fmt::Debug for WorkPool {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("WorkPool")
            .field("items", &self.items())
            .finish()
    }
}

impl Owner {
    fn take(&self, holder: &Holder, weight: usize) -> Result<Held, PoolError> {
        self.items.take(holder, weight.max(1)).map_err(|full| {
            self.full.reached();
            PoolError::Full(full)
        })
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.queue.lock().ended = true;
        self.queue.wake.notify_all();
    }
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Jobs> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, holder: &Holder, job: Job) {
        let mut jobs = self.lock();
        let own = jobs.by_holder.entry(holder.clone()).or_default();
        own.push_back(job);
        if own.len() == 1 {
            jobs.turns.push_back(holder.clone());
        }
        drop(jobs);
        self.wake.notify_one();
    }

    /// Runs jobs until the pool ends.
    fn serve(&self) {
        loop {
            let mut jobs = self.lock();
            let job = loop {
                if let Some(job) = jobs.next() {
                    break job;
                }
                if jobs.ended {
                    return;
                }
                jobs = self.wake.wait(jobs).unwrap_or_else(PoisonError::into_inner);
            };
            drop(jobs);
            job();
        }
    }
}

impl Jobs {
    /// The first job of the holder whose turn it is.
    fn next(&mut self) -> Option<Job> {
        let holder = self.turns.pop_front()?;
        let own = self.by_holder.get_mut(&holder)?;
        let job = own.pop_front();
        if own.is_empty() {
            self.by_holder.remove(&holder);
        } else {
            self.turns.push_back(holder);
        }
        job
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;
    use crate::tasks::{OwnedTask, spawn_owned};

    fn tenant(name: &str) -> Holder {
        Holder::Tenant(name.into())
    }

    /// A pool of one thread, which is busy until the sender is dropped.
    async fn busy(items_max: usize) -> Busy {
        let pool = WorkPool::start(1, items_max, &Metrics::default()).unwrap();
        let (release, released) = mpsc::channel::<()>();
        let (begun, begins) = oneshot::channel();
        let own = pool.clone();
        let task = spawn_owned(async move {
            own.run(1, move |_| {
                begun.send(()).unwrap();
                released.recv().unwrap_err();
            })
            .await
        });
        begins.await.unwrap();
        Busy {
            pool,
            release,
            task,
        }
    }

    struct Busy {
        pool: WorkPool,
        release: mpsc::Sender<()>,
        task: OwnedTask<Result<(), PoolError>>,
    }

    #[tokio::test]
    async fn work_is_refused_when_too_much_waits() {
        let Busy {
            pool,
            release,
            task,
        } = busy(10).await;
        let refused = pool.run(10, |_| ()).await;
        assert_eq!(refused, Err(PoolError::Full(PotFull::Whole)));
        drop(release);
        task.await.unwrap().unwrap();
        assert_eq!(pool.run(10, |_| 7).await, Ok(7));
        assert_eq!(pool.items(), 0);
    }

    #[tokio::test]
    async fn holders_take_turns() {
        let Busy {
            pool,
            release,
            task,
        } = busy(100).await;
        let (order, ran) = mpsc::channel();
        let mut waiting = Vec::new();
        for name in ["a", "a", "a", "b"] {
            let (pool, order) = (pool.clone(), order.clone());
            let holder = tenant(name);
            waiting.push(spawn_owned(async move {
                pool.run_for(&holder, 1, move |_| order.send(name).unwrap())
                    .await
            }));
            tokio::task::yield_now().await;
        }
        drop(release);
        task.await.unwrap().unwrap();
        for task in waiting {
            task.await.unwrap().unwrap();
        }
        drop(order);
        assert_eq!(ran.iter().collect::<Vec<_>>(), ["a", "b", "a", "a"]);
    }

    #[tokio::test]
    async fn work_ends_with_its_caller() {
        let Busy {
            pool,
            release,
            task,
        } = busy(100).await;
        let (sender, ran) = mpsc::channel();
        let waiting = {
            let (pool, sender) = (pool.clone(), sender.clone());
            spawn_owned(async move { pool.run(1, move |_| sender.send("waited")).await })
        };
        tokio::task::yield_now().await;
        waiting.abort();
        assert!(waiting.await.is_none());
        drop(release);
        task.await.unwrap().unwrap();
        // Work that runs is told, and ends.
        let (begun, begins) = oneshot::channel();
        let running = {
            let pool = pool.clone();
            spawn_owned(async move {
                pool.run(1, move |cancelled| {
                    begun.send(()).unwrap();
                    while !cancelled.is_set() {
                        std::thread::yield_now();
                    }
                    sender.send("ended").unwrap();
                })
                .await
            })
        };
        begins.await.unwrap();
        running.abort();
        assert!(running.await.is_none());
        assert_eq!(ran.recv(), Ok("ended"));
        let failed = pool.run(1, |_| -> () { panic!("a defect") }).await;
        assert_eq!(failed, Err(PoolError::Failed));
        assert_eq!(pool.run(1, |_| 1).await, Ok(1));
    }
}
