//! The cache in Redis, which several gateways share. A row that is read from
//! there is used only when its authentication tag is valid.

use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::constant_time::verify_slices_are_equal;
use aws_lc_rs::hmac::{self, HMAC_SHA256};
use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use bytes::{BufMut, Bytes, BytesMut};
use futures::future::BoxFuture;
use platform::files::{ContentError, FileError, FileSource};
use platform::tasks::{OwnedTask, spawn_owned};
use tokio::sync::mpsc;

use super::key::RowKey;
use super::memory::CachedRow;
use crate::redis::Redis;

/// Rows looked up in one round trip; those beyond are misses.
const ROWS_MAX: usize = 256;
/// A larger row is not cached: to fetch it costs more than to compute most rows,
/// and would delay others on the connection.
const ROW_BYTES_MAX: usize = 256 << 10;
/// Bytes of one write: as many as a network carries within the timeout of a
/// command.
const WRITE_BYTES_MAX: usize = 512 << 10;
/// Batches that may wait to be written; further ones are dropped.
const WAITING_MAX: usize = 256;
/// Bytes that may wait to be written.
const WAITING_BYTES_MAX: usize = 16 << 20;
/// The length of the secret in bytes.
const SECRET_BYTES_MIN: usize = 32;
const SECRET_BYTES_MAX: u64 = 4096;

/// A key in Redis and its value.
pub type StoredValue = (String, Bytes);

/// A store of sealed rows. Its methods return soon: with None or false when the
/// store is lost.
pub trait RowStore: Send + Sync + std::fmt::Debug + 'static {
    /// The values of some names, in their order. None when the store is lost.
    fn get(&self, names: Vec<String>) -> BoxFuture<'_, Option<Vec<Option<Vec<u8>>>>>;

    /// Stores values with a TTL; false when the store is lost.
    fn set(&self, values: Vec<StoredValue>, ttl: Duration) -> BoxFuture<'_, bool>;
}

impl RowStore for Redis {
    fn get(&self, names: Vec<String>) -> BoxFuture<'_, Option<Vec<Option<Vec<u8>>>>> {
        Box::pin(async move { self.run(::redis::cmd("MGET").arg(names)).await })
    }

    fn set(&self, values: Vec<StoredValue>, ttl: Duration) -> BoxFuture<'_, bool> {
        Box::pin(async move {
            let ttl_ms = u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX).max(1);
            let mut pipeline = ::redis::pipe();
            for (name, value) in values {
                let set = pipeline.cmd("SET").arg(name).arg(value.as_ref());
                set.arg("PX").arg(ttl_ms).ignore();
            }
            self.run_all::<()>(&pipeline).await.is_some()
        })
    }
}

/// The rows of one response.
type RowBatch = Vec<(RowKey, CachedRow)>;

/// The cache in Redis.
#[derive(Debug)]
pub struct RedisCache {
    store: Arc<dyn RowStore>,
    seal: Seal,
    ttl: Duration,
    queue: mpsc::Sender<RowBatch>,
    /// Until the task that writes takes it.
    queued: Mutex<Option<mpsc::Receiver<RowBatch>>>,
    waiting_bytes: Arc<AtomicUsize>,
    unwritten: Arc<AtomicU64>,
}

impl RedisCache {
    /// Rows are written with this TTL.
    pub fn new(store: Arc<dyn RowStore>, seal: Seal, ttl: Duration) -> Self {
        let (queue, queued) = mpsc::channel(WAITING_MAX);
        Self {
            store,
            seal,
            ttl,
            queue,
            queued: Mutex::new(Some(queued)),
            waiting_bytes: Arc::default(),
            unwritten: Arc::default(),
        }
    }

    /// The number of rows that were not written.
    pub fn unwritten(&self) -> u64 {
        self.unwritten.load(Ordering::Relaxed)
    }

    /// The rows of some keys and the rest of their TTL, in the order of the keys;
    /// None for a miss.
    pub async fn get(&self, keys: &[RowKey]) -> Vec<Option<(CachedRow, Duration)>> {
        let names = keys.iter().take(ROWS_MAX).map(|key| self.seal.name(key));
        let values = self.store.get(names.collect()).await.unwrap_or_default();
        let now_ms = now_ms();
        let opened = keys.iter().zip(values).map(|(key, value)| {
            let (row, expires_ms) = self.seal.unseal(key, value?.into())?;
            let left_ms = expires_ms
                .checked_sub(now_ms)
                .filter(|left_ms| *left_ms > 0)?;
            Some((row, Duration::from_millis(left_ms)))
        });
        opened.collect()
    }

    /// Queues rows to be written; they are dropped when too many wait.
    pub fn write_back(&self, rows: Vec<(RowKey, CachedRow)>) {
        let count = rows.len() as u64;
        let bytes = bytes(&rows);
        let waiting = self.waiting_bytes.fetch_add(bytes, Ordering::Relaxed);
        let fits = waiting.saturating_add(bytes) <= WAITING_BYTES_MAX;
        if !fits || self.queue.try_send(rows).is_err() {
            self.waiting_bytes.fetch_sub(bytes, Ordering::Relaxed);
            self.unwritten.fetch_add(count, Ordering::Relaxed);
        }
    }

    /// Writes the queued rows, until the task is dropped.
    pub fn follow(self: &Arc<Self>) -> Option<OwnedTask> {
        let mut queued = self
            .queued
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()?;
        let redis = self.clone();
        Some(spawn_owned(async move {
            while let Some(mut rows) = queued.recv().await {
                // Further batches are written along.
                while bytes(&rows) < WRITE_BYTES_MAX
                    && let Ok(more) = queued.try_recv()
                {
                    rows.extend(more);
                }
                let bytes = bytes(&rows);
                redis.write(rows).await;
                redis.waiting_bytes.fetch_sub(bytes, Ordering::Relaxed);
            }
        }))
    }

    async fn write(&self, rows: Vec<(RowKey, CachedRow)>) {
        let ttl_ms = u64::try_from(self.ttl.as_millis()).unwrap_or(u64::MAX);
        let expires_ms = now_ms().saturating_add(ttl_ms);
        let mut values = Vec::new();
        let mut bytes = 0;
        for (key, row) in &rows {
            if row.head.len() + row.content.len() > ROW_BYTES_MAX {
                self.unwritten.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            let value = self.seal.seal(key, row, expires_ms);
            if bytes + value.len() > WRITE_BYTES_MAX {
                self.set(std::mem::take(&mut values)).await;
                bytes = 0;
            }
            bytes += value.len();
            values.push((self.seal.name(key), value));
        }
        self.set(values).await;
    }

    async fn set(&self, values: Vec<StoredValue>) {
        let count = values.len() as u64;
        if count > 0 && !self.store.set(values, self.ttl).await {
            self.unwritten.fetch_add(count, Ordering::Relaxed);
        }
    }
}

fn bytes(rows: &[(RowKey, CachedRow)]) -> usize {
    rows.iter()
        .map(|(_, row)| row.head.len() + row.content.len() + 64)
        .sum()
}

fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| u64::try_from(now.as_millis()).unwrap_or(u64::MAX))
}

/// Derives the names of rows and authenticates them with HMAC-SHA256: a valid row
/// was written by a gateway with the same secret. Rows are not encrypted.
pub struct Seal {
    names: hmac::Key,
    values: hmac::Key,
}

impl std::fmt::Debug for Seal {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Seal")
    }
}

/// The format version of a value.
const FORMAT: u8 = 1;
const TAG_BYTES: usize = 32;
/// The format, the tag and the time of expiry.
const PREFIX_BYTES: usize = 1 + TAG_BYTES + 8;

impl Seal {
    /// Derives the keys from a secret.
    pub fn new(secret: &[u8]) -> Self {
        let secret = hmac::Key::new(HMAC_SHA256, secret);
        let derived = |purpose: &str| {
            let key = hmac::sign(&secret, purpose.as_bytes());
            hmac::Key::new(HMAC_SHA256, key.as_ref())
        };
        Self {
            names: derived("andon cache names 1"),
            values: derived("andon cache values 1"),
        }
    }

    /// Reads the secret from a file.
    pub fn read(path: &Path) -> Result<Self, FileError> {
        let source = FileSource::new(path, "cache secret file", SECRET_BYTES_MAX);
        let secret = source.read()?;
        let secret = secret.trim_ascii();
        if secret.len() < SECRET_BYTES_MIN {
            let reason = format!("it has fewer than {SECRET_BYTES_MIN} bytes");
            return Err(source.invalid(ContentError::new(reason)));
        }
        Ok(Self::new(secret))
    }

    /// The name of a row in Redis: without the secret it reveals nothing about the
    /// text, not even to a guess.
    fn name(&self, key: &RowKey) -> String {
        let name = hmac::sign(&self.names, &key.0);
        let mut text = "andon:row:".to_owned();
        BASE64_URL_SAFE_NO_PAD.encode_string(name.as_ref(), &mut text);
        text
    }

    fn tag(&self, key: &RowKey, expires: &[u8], body: &[u8]) -> hmac::Tag {
        let mut context = hmac::Context::with_key(&self.values);
        // The first two have a fixed length, so that parts cannot be moved.
        context.update(&key.0);
        context.update(expires);
        context.update(body);
        context.sign()
    }

    /// The authenticated value of a row.
    fn seal(&self, key: &RowKey, row: &CachedRow, expires_ms: u64) -> Bytes {
        let length = PREFIX_BYTES + 4 + row.head.len() + row.content.len();
        let mut value = BytesMut::with_capacity(length);
        value.put_u8(FORMAT);
        value.put_bytes(0, TAG_BYTES);
        value.put_u64(expires_ms);
        value.put_u32(u32::try_from(row.head.len()).unwrap_or(u32::MAX));
        value.put_slice(&row.head);
        value.put_slice(&row.content);
        let (prefix, body) = value.split_at(PREFIX_BYTES);
        let tag = self.tag(key, &prefix[1 + TAG_BYTES..], body);
        value[1..=TAG_BYTES].copy_from_slice(tag.as_ref());
        value.freeze()
    }

    /// The row of a value and its expiry in Unix milliseconds. None unless the
    /// value was made for this key with this secret, and is unchanged.
    fn unseal(&self, key: &RowKey, value: Bytes) -> Option<(CachedRow, u64)> {
        let (prefix, body) = value.split_at_checked(PREFIX_BYTES)?;
        let (tag, expires) = prefix
            .strip_prefix(&[FORMAT])?
            .split_at_checked(TAG_BYTES)?;
        verify_slices_are_equal(self.tag(key, expires, body).as_ref(), tag).ok()?;
        let expires_ms = u64::from_be_bytes(expires.try_into().ok()?);
        let (length, _) = body.split_first_chunk::<4>()?;
        let rest = value.slice(PREFIX_BYTES + 4..);
        let length = usize::try_from(u32::from_be_bytes(*length)).ok()?;
        if length > rest.len() {
            return None;
        }
        let row = CachedRow {
            head: rest.slice(..length),
            content: rest.slice(length..),
        };
        Some((row, expires_ms))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::super::memory::tests::row;
    use super::*;

    const KEY: RowKey = RowKey([7; 32]);

    fn seal() -> Seal {
        Seal::new(b"a secret of the tests, long enough")
    }

    /// A store in memory.
    #[derive(Debug, Default)]
    pub struct Fake {
        pub values: Mutex<HashMap<String, Bytes>>,
        pub round_trips: AtomicUsize,
        pub lost: std::sync::atomic::AtomicBool,
    }

    impl RowStore for Fake {
        fn get(&self, names: Vec<String>) -> BoxFuture<'_, Option<Vec<Option<Vec<u8>>>>> {
            self.round_trips.fetch_add(1, Ordering::Relaxed);
            let values = self.values.lock().unwrap();
            let found = names.iter().map(|name| Some(values.get(name)?.to_vec()));
            let found = found.collect();
            let lost = self.lost.load(Ordering::Relaxed);
            Box::pin(std::future::ready((!lost).then_some(found)))
        }

        fn set(&self, values: Vec<StoredValue>, _ttl: Duration) -> BoxFuture<'_, bool> {
            self.values.lock().unwrap().extend(values);
            Box::pin(std::future::ready(true))
        }
    }

    pub fn redis(store: Arc<Fake>) -> RedisCache {
        RedisCache::new(store, seal(), Duration::from_secs(60))
    }

    #[test]
    fn a_seal_opens_its_own_values_and_no_others() {
        let value = seal().seal(&KEY, &row("answer"), 1234);
        assert_eq!(
            seal().unseal(&KEY, value.clone()),
            Some((row("answer"), 1234))
        );
        // Another row's value, and another secret's.
        assert_eq!(seal().unseal(&RowKey([8; 32]), value.clone()), None);
        let other = Seal::new(b"another secret of the tests, long enough");
        assert_eq!(other.unseal(&KEY, value.clone()), None);
        assert_ne!(other.name(&KEY), seal().name(&KEY));
        for length in 0..value.len() {
            assert_eq!(seal().unseal(&KEY, value.slice(..length)), None);
        }
        for index in 0..value.len() {
            let mut poisoned = value.to_vec();
            poisoned[index] ^= 1;
            assert_eq!(seal().unseal(&KEY, poisoned.into()), None, "{index}");
        }
        let mut longer = value.to_vec();
        longer.push(0);
        assert_eq!(seal().unseal(&KEY, longer.into()), None);
    }

    proptest! {
        #[test]
        fn no_bytes_open_or_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert_eq!(seal().unseal(&KEY, bytes.into()), None);
        }
    }

    #[tokio::test]
    async fn what_is_written_back_is_found_and_names_no_text() {
        let store = Arc::new(Fake::default());
        let redis = Arc::new(redis(store.clone()));
        let large = CachedRow {
            head: Bytes::new(),
            content: vec![0; ROW_BYTES_MAX + 1].into(),
        };
        redis.write_back(vec![(KEY, row("a")), (RowKey([9; 32]), large)]);
        let _writing = redis.follow();
        while store.values.lock().unwrap().is_empty() {
            tokio::task::yield_now().await;
        }
        let found = redis.get(&[RowKey([9; 32]), KEY]).await;
        assert_eq!(found[0], None);
        let (found, left) = found[1].clone().unwrap();
        assert_eq!(found, row("a"));
        assert!(left <= Duration::from_secs(60));
        assert_eq!(redis.unwritten(), 1);
        let names: Vec<String> = store.values.lock().unwrap().keys().cloned().collect();
        assert_eq!(names, [seal().name(&KEY)]);
        // An expired value is a miss.
        let over = seal().seal(&KEY, &row("a"), now_ms() - 1);
        store.values.lock().unwrap().insert(seal().name(&KEY), over);
        assert_eq!(redis.get(&[KEY]).await, [None]);
    }

    #[tokio::test]
    async fn a_full_queue_drops_and_counts() {
        let redis = redis(Arc::default());
        let rows = |bytes: usize| {
            let content = vec![0; bytes].into();
            vec![(
                KEY,
                CachedRow {
                    head: Bytes::new(),
                    content,
                },
            )]
        };
        redis.write_back(rows(WAITING_BYTES_MAX));
        assert_eq!(redis.unwritten(), 1);
        for _ in 0..WAITING_MAX + 5 {
            redis.write_back(rows(1));
        }
        assert_eq!(redis.unwritten(), 6);
    }
}
