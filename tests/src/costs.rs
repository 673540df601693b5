//! What a call costs the process that takes it: processor time of the threads of
//! the network, and memory.

use std::time::Duration;

use anyhow::{Context, Result};

use crate::process::Andon;

/// The processor time of each thread of the network so far.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardTimes(Vec<Duration>);

impl ShardTimes {
    /// Those of a process.
    pub fn of(andon: &Andon) -> Result<Self> {
        let mut times = Vec::new();
        for task in std::fs::read_dir(format!("/proc/{}/task", andon.id()))? {
            let task = task?.path();
            // A thread may have ended since the list was made.
            let read = |name: &str| std::fs::read_to_string(task.join(name)).unwrap_or_default();
            if read("comm").starts_with("shard-") {
                let statistics = read("schedstat");
                let computed = statistics.split_whitespace().next();
                let computed = computed.context("no schedstat: the kernel does not count")?;
                times.push(Duration::from_nanos(computed.parse()?));
            }
        }
        Ok(Self(times))
    }

    /// The most that one thread has computed since.
    pub fn most_since(&self, before: &Self) -> Duration {
        let pairs = self.0.iter().zip(&before.0);
        let since = pairs.map(|(now, before)| now.saturating_sub(*before));
        since.max().unwrap_or_default()
    }
}

/// The most memory that a process has had, in bytes.
pub fn peak_bytes(andon: &Andon) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", andon.id()))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kilobytes = line.and_then(|line| line.split_whitespace().next());
    let kilobytes: u64 = kilobytes.context("no VmHWM")?.parse()?;
    Ok(kilobytes * 1024)
}
