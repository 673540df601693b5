//! How the memory of the process is taken from the system, and given back after
//! a load.

use std::hint::black_box;
use std::time::Duration;

use platform::tasks::{OwnedTask, spawn_owned};

/// As long as mimalloc keeps what is free before it gives it back.
const INTERVAL: Duration = Duration::from_secs(1);
/// Such an allocation has a page of its own, and nobody writes to it.
const BYTES: usize = 2 << 20;

/// Takes memory in pages of 4 KiB from now on. A gateway holds many small buffers
/// and no weights: huge pages (2 MiB) would stay resident for the few buffers
/// that outlive a load. See docs/decisions/mimalloc.md.
pub fn use_small_pages() {
    if let Err(error) = rustix::thread::disable_transparent_huge_pages(true) {
        tracing::debug!(%error, "huge pages stay enabled");
    }
}

/// Gives free memory back until the task is dropped. mimalloc does so when it
/// frees a page and the delay of earlier ones has passed: a process that has
/// become idle frees none, and would keep all that its last load took.
pub fn return_memory() -> OwnedTask {
    spawn_owned(async {
        loop {
            tokio::time::sleep(INTERVAL).await;
            drop(black_box(Vec::<u8>::with_capacity(BYTES)));
        }
    })
}
