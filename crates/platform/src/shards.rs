//! One single-threaded runtime per core. A connection and all its calls stay on
//! one of them, so that the many small hand-overs of a call (connection, stream,
//! channel and back) wake no other thread, and small writes are coalesced. See
//! docs/decisions/one_thread_per_call.md.

use std::cell::Cell;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;

thread_local! {
    static CURRENT: Cell<Option<usize>> = const { Cell::new(None) };
}

/// The runtimes. Their tasks end when this is dropped.
#[derive(Debug)]
pub struct Shards {
    handles: Vec<Handle>,
    next: AtomicUsize,
    _stops: Vec<oneshot::Sender<()>>,
}

impl Shards {
    /// Starts `count` threads, at least one.
    pub fn start(count: usize) -> io::Result<Self> {
        let (mut handles, mut stops) = (Vec::new(), Vec::new());
        for index in 0..count.max(1) {
            let runtime = Builder::new_current_thread().enable_all().build()?;
            let (stop, stopped) = oneshot::channel::<()>();
            handles.push(runtime.handle().clone());
            stops.push(stop);
            std::thread::Builder::new()
                .name(format!("shard-{index}"))
                .spawn(move || {
                    CURRENT.set(Some(index));
                    // An error means that the shards were dropped: stop as well.
                    let _ = runtime.block_on(stopped);
                    runtime.shutdown_background();
                })?;
        }
        Ok(Self {
            handles,
            next: AtomicUsize::new(0),
            _stops: stops,
        })
    }

    /// The current runtime as the only shard, whose clock a test may pause.
    #[cfg(test)]
    pub fn current() -> Self {
        Self {
            handles: vec![Handle::current()],
            next: AtomicUsize::new(0),
            _stops: Vec::new(),
        }
    }

    /// The number of shards.
    pub fn count(&self) -> usize {
        self.handles.len()
    }

    /// The runtime of a shard; an index over the count wraps.
    pub fn handle(&self, index: usize) -> &Handle {
        &self.handles[index % self.handles.len()]
    }

    /// The next runtime, round robin.
    pub fn next(&self) -> &Handle {
        self.handle(self.next.fetch_add(1, Ordering::Relaxed))
    }
}

/// The index of the shard that this thread runs; 0 on other threads.
pub fn current() -> usize {
    CURRENT.get().unwrap_or(0)
}
