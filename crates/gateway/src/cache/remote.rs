//! Rows that are known in Redis, where several gateways keep them. What is read
//! from there is believed only when its seal fits.

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

use super::key::Key;
use super::memory::Row;
use crate::redis::Redis;

/// Rows of one round trip; those beyond are computed.
const ROWS_MAX: usize = 256;
/// A longer row costs more to fetch than most to compute, and would keep the
/// connection from others.
const ROW_BYTES_MAX: usize = 256 << 10;
/// Bytes of one write: as many as pass a network in the time of a command.
const WRITE_BYTES_MAX: usize = 512 << 10;
/// What may wait to be written; what comes then is dropped.
const WAITING_MAX: usize = 256;
const WAITING_BYTES_MAX: usize = 16 << 20;
/// Bytes of the secret.
const SECRET_BYTES_MIN: usize = 32;
const SECRET_BYTES_MAX: u64 = 4096;

/// A name in Redis and what stands there.
pub type Written = (String, Bytes);

/// Where sealed rows are kept. Nothing of it may wait long: it answers none
/// when it is lost.
pub trait Store: Send + Sync + std::fmt::Debug + 'static {
    /// What stands under some names, in their order.
    fn get(&self, names: Vec<String>) -> BoxFuture<'_, Option<Vec<Option<Vec<u8>>>>>;

    /// Keeps values for so long; whether it did.
    fn set(&self, values: Vec<Written>, ttl: Duration) -> BoxFuture<'_, bool>;
}

impl Store for Redis {
    fn get(&self, names: Vec<String>) -> BoxFuture<'_, Option<Vec<Option<Vec<u8>>>>> {
        Box::pin(async move { self.run(::redis::cmd("MGET").arg(names)).await })
    }

    fn set(&self, values: Vec<Written>, ttl: Duration) -> BoxFuture<'_, bool> {
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

/// Rows of one answer.
type Entries = Vec<(Key, Row)>;

/// Rows in Redis.
#[derive(Debug)]
pub struct Remote {
    store: Arc<dyn Store>,
    seal: Seal,
    ttl: Duration,
    queue: mpsc::Sender<Entries>,
    /// Until somebody writes them.
    queued: Mutex<Option<mpsc::Receiver<Entries>>>,
    waiting_bytes: Arc<AtomicUsize>,
    unwritten: Arc<AtomicU64>,
}

impl Remote {
    /// Rows are kept for so long.
    pub fn new(store: Arc<dyn Store>, seal: Seal, ttl: Duration) -> Self {
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

    /// Rows that were not written.
    pub fn unwritten(&self) -> u64 {
        self.unwritten.load(Ordering::Relaxed)
    }

    /// The rows that stand there, and how long they still hold, in the order
    /// of their keys.
    pub async fn get(&self, keys: &[Key]) -> Vec<Option<(Row, Duration)>> {
        let names = keys.iter().take(ROWS_MAX).map(|key| self.seal.name(key));
        let values = self.store.get(names.collect()).await.unwrap_or_default();
        let now_ms = now_ms();
        let opened = keys.iter().zip(values).map(|(key, value)| {
            let (row, until_ms) = self.seal.open(key, value?.into())?;
            let left_ms = until_ms
                .checked_sub(now_ms)
                .filter(|left_ms| *left_ms > 0)?;
            Some((row, Duration::from_millis(left_ms)))
        });
        opened.collect()
    }

    /// Writes rows soon, unless too many wait.
    pub fn write_back(&self, rows: Vec<(Key, Row)>) {
        let count = rows.len() as u64;
        let bytes = bytes(&rows);
        let waiting = self.waiting_bytes.fetch_add(bytes, Ordering::Relaxed);
        let fits = waiting.saturating_add(bytes) <= WAITING_BYTES_MAX;
        if !fits || self.queue.try_send(rows).is_err() {
            self.waiting_bytes.fetch_sub(bytes, Ordering::Relaxed);
            self.unwritten.fetch_add(count, Ordering::Relaxed);
        }
    }

    /// Writes what waits, until the task is dropped.
    pub fn follow(self: &Arc<Self>) -> Option<OwnedTask> {
        let mut queued = self
            .queued
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()?;
        let remote = self.clone();
        Some(spawn_owned(async move {
            while let Some(mut rows) = queued.recv().await {
                // What else waits goes along.
                while bytes(&rows) < WRITE_BYTES_MAX
                    && let Ok(more) = queued.try_recv()
                {
                    rows.extend(more);
                }
                let bytes = bytes(&rows);
                remote.write(rows).await;
                remote.waiting_bytes.fetch_sub(bytes, Ordering::Relaxed);
            }
        }))
    }

    async fn write(&self, rows: Vec<(Key, Row)>) {
        let ttl_ms = u64::try_from(self.ttl.as_millis()).unwrap_or(u64::MAX);
        let until_ms = now_ms().saturating_add(ttl_ms);
        let mut values = Vec::new();
        let mut bytes = 0;
        for (key, row) in &rows {
            if row.head.len() + row.content.len() > ROW_BYTES_MAX {
                self.unwritten.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            let value = self.seal.close(key, row, until_ms);
            if bytes + value.len() > WRITE_BYTES_MAX {
                self.set(std::mem::take(&mut values)).await;
                bytes = 0;
            }
            bytes += value.len();
            values.push((self.seal.name(key), value));
        }
        self.set(values).await;
    }

    async fn set(&self, values: Vec<Written>) {
        let count = values.len() as u64;
        if count > 0 && !self.store.set(values, self.ttl).await {
            self.unwritten.fetch_add(count, Ordering::Relaxed);
        }
    }
}

fn bytes(rows: &[(Key, Row)]) -> usize {
    rows.iter()
        .map(|(_, row)| row.head.len() + row.content.len() + 64)
        .sum()
}

fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| u64::try_from(now.as_millis()).unwrap_or(u64::MAX))
}

/// Names rows and proves that they were written by a gateway of the same
/// secret. The rows themselves are not hidden.
pub struct Seal {
    names: hmac::Key,
    values: hmac::Key,
}

impl std::fmt::Debug for Seal {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Seal")
    }
}

/// The form of a value.
const FORM: u8 = 1;
const TAG_BYTES: usize = 32;
/// The form, the tag and until when the value holds.
const PREFIX_BYTES: usize = 1 + TAG_BYTES + 8;

impl Seal {
    /// Seals with keys that are made from a secret.
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

    /// The name of a row: without the secret nobody can tell what text it
    /// stands for, not even by trying.
    fn name(&self, key: &Key) -> String {
        let name = hmac::sign(&self.names, &key.0);
        let mut text = "andon:row:".to_owned();
        BASE64_URL_SAFE_NO_PAD.encode_string(name.as_ref(), &mut text);
        text
    }

    fn tag(&self, key: &Key, until: &[u8], body: &[u8]) -> hmac::Tag {
        let mut context = hmac::Context::with_key(&self.values);
        // The first two have one length each, so that parts cannot be moved.
        context.update(&key.0);
        context.update(until);
        context.update(body);
        context.sign()
    }

    /// The value that stands for a row.
    fn close(&self, key: &Key, row: &Row, until_ms: u64) -> Bytes {
        let length = PREFIX_BYTES + 4 + row.head.len() + row.content.len();
        let mut value = BytesMut::with_capacity(length);
        value.put_u8(FORM);
        value.put_bytes(0, TAG_BYTES);
        value.put_u64(until_ms);
        value.put_u32(u32::try_from(row.head.len()).unwrap_or(u32::MAX));
        value.put_slice(&row.head);
        value.put_slice(&row.content);
        let (prefix, body) = value.split_at(PREFIX_BYTES);
        let tag = self.tag(key, &prefix[1 + TAG_BYTES..], body);
        value[1..=TAG_BYTES].copy_from_slice(tag.as_ref());
        value.freeze()
    }

    /// The row that a value stands for, and until when; none unless the value
    /// was made for this key, with this secret, and not changed since.
    fn open(&self, key: &Key, value: Bytes) -> Option<(Row, u64)> {
        let (prefix, body) = value.split_at_checked(PREFIX_BYTES)?;
        let (tag, until) = prefix.strip_prefix(&[FORM])?.split_at_checked(TAG_BYTES)?;
        verify_slices_are_equal(self.tag(key, until, body).as_ref(), tag).ok()?;
        let until_ms = u64::from_be_bytes(until.try_into().ok()?);
        let (length, _) = body.split_first_chunk::<4>()?;
        let rest = value.slice(PREFIX_BYTES + 4..);
        let length = usize::try_from(u32::from_be_bytes(*length)).ok()?;
        if length > rest.len() {
            return None;
        }
        let row = Row {
            head: rest.slice(..length),
            content: rest.slice(length..),
        };
        Some((row, until_ms))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::super::memory::tests::row;
    use super::*;

    const KEY: Key = Key([7; 32]);

    fn seal() -> Seal {
        Seal::new(b"a secret of the tests, long enough")
    }

    /// A Redis of the test.
    #[derive(Debug, Default)]
    pub struct Fake {
        pub values: Mutex<HashMap<String, Bytes>>,
        pub round_trips: AtomicUsize,
        pub lost: std::sync::atomic::AtomicBool,
    }

    impl Store for Fake {
        fn get(&self, names: Vec<String>) -> BoxFuture<'_, Option<Vec<Option<Vec<u8>>>>> {
            self.round_trips.fetch_add(1, Ordering::Relaxed);
            let values = self.values.lock().unwrap();
            let found = names.iter().map(|name| Some(values.get(name)?.to_vec()));
            let found = found.collect();
            let lost = self.lost.load(Ordering::Relaxed);
            Box::pin(std::future::ready((!lost).then_some(found)))
        }

        fn set(&self, values: Vec<Written>, _ttl: Duration) -> BoxFuture<'_, bool> {
            self.values.lock().unwrap().extend(values);
            Box::pin(std::future::ready(true))
        }
    }

    pub fn remote(store: Arc<Fake>) -> Remote {
        Remote::new(store, seal(), Duration::from_secs(60))
    }

    #[test]
    fn opens_what_it_closed_and_nothing_else() {
        let value = seal().close(&KEY, &row("answer"), 1234);
        assert_eq!(
            seal().open(&KEY, value.clone()),
            Some((row("answer"), 1234))
        );
        // Another row's value, and another secret's.
        assert_eq!(seal().open(&Key([8; 32]), value.clone()), None);
        let other = Seal::new(b"another secret of the tests, long enough");
        assert_eq!(other.open(&KEY, value.clone()), None);
        assert_ne!(other.name(&KEY), seal().name(&KEY));
        for length in 0..value.len() {
            assert_eq!(seal().open(&KEY, value.slice(..length)), None);
        }
        for place in 0..value.len() {
            let mut poisoned = value.to_vec();
            poisoned[place] ^= 1;
            assert_eq!(seal().open(&KEY, poisoned.into()), None, "{place}");
        }
        let mut longer = value.to_vec();
        longer.push(0);
        assert_eq!(seal().open(&KEY, longer.into()), None);
    }

    proptest! {
        #[test]
        fn no_bytes_open_or_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert_eq!(seal().open(&KEY, bytes.into()), None);
        }
    }

    #[tokio::test]
    async fn what_is_written_back_is_found_and_names_no_text() {
        let store = Arc::new(Fake::default());
        let remote = Arc::new(remote(store.clone()));
        let large = Row {
            head: Bytes::new(),
            content: vec![0; ROW_BYTES_MAX + 1].into(),
        };
        remote.write_back(vec![(KEY, row("a")), (Key([9; 32]), large)]);
        let _writing = remote.follow();
        while store.values.lock().unwrap().is_empty() {
            tokio::task::yield_now().await;
        }
        let found = remote.get(&[Key([9; 32]), KEY]).await;
        assert_eq!(found[0], None);
        let (found, left) = found[1].clone().unwrap();
        assert_eq!(found, row("a"));
        assert!(left <= Duration::from_secs(60));
        assert_eq!(remote.unwritten(), 1);
        let names: Vec<String> = store.values.lock().unwrap().keys().cloned().collect();
        assert_eq!(names, [seal().name(&KEY)]);
        // A value that is over is none.
        let over = seal().close(&KEY, &row("a"), now_ms() - 1);
        store.values.lock().unwrap().insert(seal().name(&KEY), over);
        assert_eq!(remote.get(&[KEY]).await, [None]);
    }

    #[tokio::test]
    async fn a_full_queue_drops_and_counts() {
        let remote = remote(Arc::default());
        let rows = |bytes: usize| {
            let content = vec![0; bytes].into();
            vec![(
                KEY,
                Row {
                    head: Bytes::new(),
                    content,
                },
            )]
        };
        remote.write_back(rows(WAITING_BYTES_MAX));
        assert_eq!(remote.unwritten(), 1);
        for _ in 0..WAITING_MAX + 5 {
            remote.write_back(rows(1));
        }
        assert_eq!(remote.unwritten(), 6);
    }
}
