//! Gives the memory of a load that has ended back to the system.

use std::hint::black_box;
use std::time::Duration;

use platform::tasks::{OwnedTask, spawn_owned};

/// As long as mimalloc keeps what is free before it gives it back.
const INTERVAL: Duration = Duration::from_secs(1);
/// Such an allocation has a page of its own, and nobody writes to it.
const BYTES: usize = 2 << 20;

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
