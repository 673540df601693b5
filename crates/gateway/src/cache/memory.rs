//! The cache in the memory of this process: bounded in bytes, with a TTL and
//! eviction by frequency of use.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::key::RowKey;

/// The bytes of an entry besides its row: its key, its slots in the tables and
/// its part in the eviction policy.
const OVERHEAD_BYTES: usize = 256;

/// One row of a response, in the encoding of its method.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CachedRow {
    /// The part that all rows of a response have in common.
    pub head: Bytes,
    /// The part of this row.
    pub content: Bytes,
}

impl CachedRow {
    fn bytes(&self) -> usize {
        self.head.len() + self.content.len() + OVERHEAD_BYTES
    }
}

#[derive(Debug, Clone)]
struct CacheEntry {
    row: CachedRow,
    expires: Instant,
}

/// A table of rows that is bounded in bytes. Rarely used rows are evicted first,
/// after W-TinyLFU (Einziger et al., "TinyLFU: a highly efficient cache
/// admission policy", 2017).
#[derive(Debug)]
pub struct MemoryCache {
    entries: moka::sync::Cache<RowKey, CacheEntry>,
    ttl: Duration,
    /// Bytes that were inserted since the last eviction.
    unweighed_bytes: AtomicU64,
    unweighed_bytes_max: u64,
}

impl MemoryCache {
    /// An empty table of at most `bytes_max` bytes, whose rows expire after `ttl`.
    pub fn new(bytes_max: usize, ttl: Duration) -> Self {
        let bytes_max = bytes_max as u64;
        let entries = moka::sync::Cache::builder()
            .max_capacity(bytes_max)
            .weigher(|_: &RowKey, entry: &CacheEntry| {
                u32::try_from(entry.row.bytes()).unwrap_or(u32::MAX)
            })
            .time_to_live(ttl)
            .build();
        Self {
            entries,
            ttl,
            unweighed_bytes: AtomicU64::new(0),
            unweighed_bytes_max: bytes_max / 16,
        }
    }

    /// A row; None on a miss, or when it has expired.
    pub fn get(&self, key: &RowKey) -> Option<CachedRow> {
        let entry = self.entries.get(key)?;
        (Instant::now() < entry.expires).then_some(entry.row)
    }

    /// Caches a row for `ttl`, at most for the TTL of the table.
    pub fn insert(&self, key: RowKey, row: CachedRow, ttl: Duration) {
        let bytes = row.bytes() as u64;
        let expires = Instant::now() + ttl.min(self.ttl);
        self.entries.insert(key, CacheEntry { row, expires });
        // The table evicts now and then; a few large rows must not wait for that.
        let unweighed = self.unweighed_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if unweighed > self.unweighed_bytes_max {
            self.unweighed_bytes.store(0, Ordering::Relaxed);
            self.entries.run_pending_tasks();
        }
    }

    /// The number of rows, and their bytes.
    pub fn size(&self) -> (u64, u64) {
        self.entries.run_pending_tasks();
        (self.entries.entry_count(), self.entries.weighted_size())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn row(text: &str) -> CachedRow {
        CachedRow {
            head: Bytes::from_static(b"head"),
            content: Bytes::copy_from_slice(text.as_bytes()),
        }
    }

    fn key(number: u32) -> RowKey {
        let mut key = [0; 32];
        key[..4].copy_from_slice(&number.to_le_bytes());
        RowKey(key)
    }

    #[test]
    fn holds_no_more_than_its_bytes() {
        let memory = MemoryCache::new(1 << 20, Duration::from_secs(60));
        let large = CachedRow {
            head: Bytes::new(),
            content: Bytes::from(vec![7; 64 << 10]),
        };
        for number in 0..200 {
            memory.insert(key(number), large.clone(), Duration::from_secs(60));
            // Never more than the bound and what was inserted since the last
            // eviction.
            assert!(memory.entries.weighted_size() <= (1 << 20) + (1 << 17));
        }
        let (entries, bytes) = memory.size();
        assert!(entries >= 8, "{entries}");
        assert!(bytes <= 1 << 20, "{bytes}");
    }

    #[test]
    fn an_entry_expires_after_its_ttl() {
        let memory = MemoryCache::new(1 << 20, Duration::from_secs(60));
        memory.insert(key(1), row("lasting"), Duration::MAX);
        memory.insert(key(2), row("over"), Duration::ZERO);
        assert_eq!(memory.get(&key(1)), Some(row("lasting")));
        assert_eq!(memory.get(&key(2)), None);
        assert_eq!(memory.get(&key(3)), None);
    }
}
