//! Rows that are known, in the memory of this process.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::key::Key;

/// What an entry takes besides its own bytes: its key, its place in the tables
/// and its part in the choice of what to drop.
const OVERHEAD_BYTES: usize = 256;

/// The answer to one row, in the form of the call that it answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// What the rows of one answer have in common.
    pub head: Bytes,
    /// The row's own.
    pub content: Bytes,
}

impl Row {
    fn bytes(&self) -> usize {
        self.head.len() + self.content.len() + OVERHEAD_BYTES
    }
}

#[derive(Debug, Clone)]
struct Entry {
    row: Row,
    until: Instant,
}

/// A table of rows that is bounded in bytes: rows that are asked for often
/// stay, after W-TinyLFU (Einziger et al., "TinyLFU: a highly efficient cache
/// admission policy", 2017).
#[derive(Debug)]
pub struct Memory {
    entries: moka::sync::Cache<Key, Entry>,
    ttl: Duration,
    /// Bytes that were put in and not yet weighed against the bound.
    unweighed_bytes: AtomicU64,
    unweighed_bytes_max: u64,
}

impl Memory {
    /// An empty table of so many bytes.
    pub fn new(bytes_max: usize, ttl: Duration) -> Self {
        let bytes_max = bytes_max as u64;
        let entries = moka::sync::Cache::builder()
            .max_capacity(bytes_max)
            .weigher(|_: &Key, entry: &Entry| u32::try_from(entry.row.bytes()).unwrap_or(u32::MAX))
            .time_to_live(ttl)
            .build();
        Self {
            entries,
            ttl,
            unweighed_bytes: AtomicU64::new(0),
            unweighed_bytes_max: bytes_max / 16,
        }
    }

    /// A row that is known.
    pub fn get(&self, key: &Key) -> Option<Row> {
        let entry = self.entries.get(key)?;
        (Instant::now() < entry.until).then_some(entry.row)
    }

    /// Keeps a row for so long, at most as long as any.
    pub fn insert(&self, key: Key, row: Row, ttl: Duration) {
        let bytes = row.bytes() as u64;
        let until = Instant::now() + ttl.min(self.ttl);
        self.entries.insert(key, Entry { row, until });
        // The table weighs now and then: a few large rows must not wait for it.
        let unweighed = self.unweighed_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if unweighed > self.unweighed_bytes_max {
            self.unweighed_bytes.store(0, Ordering::Relaxed);
            self.entries.run_pending_tasks();
        }
    }

    /// Rows, and the bytes that they take.
    pub fn size(&self) -> (u64, u64) {
        self.entries.run_pending_tasks();
        (self.entries.entry_count(), self.entries.weighted_size())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn row(text: &str) -> Row {
        Row {
            head: Bytes::from_static(b"head"),
            content: Bytes::copy_from_slice(text.as_bytes()),
        }
    }

    fn key(number: u32) -> Key {
        let mut key = [0; 32];
        key[..4].copy_from_slice(&number.to_le_bytes());
        Key(key)
    }

    #[test]
    fn holds_no_more_than_its_bytes() {
        let memory = Memory::new(1 << 20, Duration::from_secs(60));
        let large = Row {
            head: Bytes::new(),
            content: Bytes::from(vec![7; 64 << 10]),
        };
        for number in 0..200 {
            memory.insert(key(number), large.clone(), Duration::from_secs(60));
            // Never more than the bound and what has not been weighed yet.
            assert!(memory.entries.weighted_size() <= (1 << 20) + (1 << 17));
        }
        let (entries, bytes) = memory.size();
        assert!(entries >= 8, "{entries}");
        assert!(bytes <= 1 << 20, "{bytes}");
    }

    #[test]
    fn an_entry_ends_when_it_is_told_to() {
        let memory = Memory::new(1 << 20, Duration::from_secs(60));
        memory.insert(key(1), row("lasting"), Duration::MAX);
        memory.insert(key(2), row("over"), Duration::ZERO);
        assert_eq!(memory.get(&key(1)), Some(row("lasting")));
        assert_eq!(memory.get(&key(2)), None);
        assert_eq!(memory.get(&key(3)), None);
    }
}
