//! One single-threaded runtime per core. A connection and all its calls stay on
//! one of them, so that the many small hand-overs of a call (connection, stream,
//! channel and back) wake no other thread, and small writes can wait for each
//! other. See docs/decisions/one_thread_per_call.md.

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
    /// Starts so many threads.
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
                    // An error says that the shards were dropped: the same.
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

    /// How many there are.
    pub fn count(&self) -> usize {
        self.handles.len()
    }

    /// One of them.
    pub fn handle(&self, index: usize) -> &Handle {
        &self.handles[index % self.handles.len()]
    }

    /// The one whose turn it is.
    pub fn next(&self) -> &Handle {
        self.handle(self.next.fetch_add(1, Ordering::Relaxed))
    }
}

/// The shard that this thread is; 0 for a thread that is none.
pub fn current() -> usize {
    CURRENT.get().unwrap_or(0)
}
