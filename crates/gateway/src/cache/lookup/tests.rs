use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::future::join_all;
use tokio::sync::Semaphore;

use super::super::memory::tests::row;
use super::super::redis::tests::{Fake, redis};
use super::*;

/// Computes rows whose text is their index. It waits for a permit, and fails as
/// often as it is configured to.
struct Model {
    calls: Mutex<Vec<Vec<usize>>>,
    may: Semaphore,
    failures: AtomicUsize,
}

impl Model {
    fn ready() -> Self {
        Self::waiting(Semaphore::MAX_PERMITS)
    }

    fn waiting(permits: usize) -> Self {
        Self {
            calls: Mutex::default(),
            may: Semaphore::new(permits),
            failures: AtomicUsize::new(0),
        }
    }

    fn calls(&self) -> Vec<Vec<usize>> {
        self.calls.lock().unwrap().clone()
    }

    async fn called(&self, times: usize) {
        while self.calls.lock().unwrap().len() < times {
            tokio::task::yield_now().await;
        }
    }
}

impl Compute for Model {
    type Failure = &'static str;

    async fn compute(&self, indices: &[usize]) -> Result<Vec<CachedRow>, &'static str> {
        self.calls.lock().unwrap().push(indices.to_vec());
        self.may.acquire().await.unwrap().forget();
        let fails = |left: usize| left.checked_sub(1);
        let order = Ordering::SeqCst;
        if self.failures.fetch_update(order, order, fails).is_ok() {
            return Err("failed");
        }
        Ok(indices
            .iter()
            .map(|index| row(&index.to_string()))
            .collect())
    }
}

fn cache(bytes: usize) -> RowCache {
    RowCache {
        memory: (bytes > 0).then(|| MemoryCache::new(bytes, Duration::from_secs(60))),
        flights: SingleFlight::default(),
        redis: None,
        metrics: CacheMetrics::default(),
    }
}

fn keys(texts: &[&str]) -> Vec<RowKey> {
    let key = |text: &&str| {
        let mut key = [0; 32];
        key[..text.len()].copy_from_slice(text.as_bytes());
        RowKey(key)
    };
    texts.iter().map(key).collect()
}

async fn found(cache: &RowCache, keys: &[RowKey], model: &Model) -> (Vec<String>, usize) {
    let found = cache.get_or_compute(keys, model).await.unwrap().unwrap();
    let text = |row: &CachedRow| String::from_utf8(row.content.to_vec()).unwrap();
    (found.rows.iter().map(text).collect(), found.computed)
}

#[tokio::test]
async fn only_misses_are_computed_and_once() {
    let (cache, model) = (cache(1 << 20), Model::ready());
    let (_, computed) = found(&cache, &keys(&["a", "b", "a"]), &model).await;
    assert_eq!((computed, model.calls()), (2, vec![vec![0, 1]]));
    let keys = keys(&["c", "b", "d", "a", "c"]);
    let (rows, computed) = found(&cache, &keys, &model).await;
    assert_eq!(rows, ["0", "1", "2", "0", "0"]);
    assert_eq!((computed, model.calls().len()), (2, 2));
    assert_eq!(model.calls()[1], [0, 2]);
    let (_, computed) = found(&cache, &keys, &model).await;
    assert_eq!((computed, model.calls().len()), (0, 2));
    let metrics = &cache.metrics;
    assert_eq!(
        (
            metrics.memory.get(),
            metrics.coalesced.get(),
            metrics.computed.get()
        ),
        (7, 2, 4)
    );
}

#[tokio::test]
async fn a_refresh_computes_and_caches() {
    let (cache, model) = (cache(1 << 20), Model::ready());
    let keys = keys(&["a", "b"]);
    for _ in 0..2 {
        let fresh = cache.refresh(&keys, &model).await.unwrap().unwrap();
        assert_eq!(fresh.computed, 2);
    }
    assert_eq!(model.calls().len(), 2);
    assert_eq!(found(&cache, &keys, &model).await.1, 0);
}

#[tokio::test]
async fn a_thousand_identical_calls_are_one_computation() {
    for bytes in [1 << 20, 0] {
        let (cache, model) = (cache(bytes), Model::waiting(0));
        let keys = keys(&["a", "b"]);
        let calls = join_all((0..1000).map(|_| found(&cache, &keys, &model)));
        let release = async {
            model.called(1).await;
            model.may.add_permits(Semaphore::MAX_PERMITS);
        };
        let (results, ()) = tokio::join!(calls, release);
        assert_eq!(model.calls(), [[0, 1]]);
        assert_eq!(
            results.iter().map(|(_, computed)| computed).sum::<usize>(),
            2
        );
        assert!(results.iter().all(|(rows, _)| rows == &["0", "1"]));
        assert_eq!(cache.flights.count(), 0);
    }
}

#[tokio::test]
async fn when_a_leader_leaves_a_follower_computes() {
    let (cache, model) = (cache(0), Model::waiting(0));
    let keys = keys(&["a"]);
    let mut leader = Box::pin(found(&cache, &keys, &model));
    assert!(futures::poll!(&mut leader).is_pending());
    let followers = join_all((0..10).map(|_| found(&cache, &keys, &model)));
    let leave = async {
        assert_eq!(model.calls().len(), 1);
        drop(leader);
        model.called(2).await;
        model.may.add_permits(10);
    };
    let (results, ()) = tokio::join!(followers, leave);
    assert_eq!(model.calls().len(), 2);
    assert_eq!(
        results.iter().map(|(_, computed)| computed).sum::<usize>(),
        1
    );
    assert_eq!(cache.flights.count(), 0);
}

#[tokio::test]
async fn a_failure_is_its_own_callers_alone() {
    let (cache, model) = (cache(0), Model::waiting(0));
    model.failures.store(1, Ordering::SeqCst);
    let keys = keys(&["a"]);
    let calls = join_all((0..10).map(|_| cache.get_or_compute(&keys, &model)));
    let release = async {
        for called in [1, 2] {
            model.called(called).await;
            model.may.add_permits(1);
        }
    };
    let (results, ()) = tokio::join!(calls, release);
    assert_eq!(results.iter().filter(|result| result.is_err()).count(), 1);
    assert_eq!(model.calls().len(), 2);
}

#[tokio::test]
async fn a_call_waits_for_at_most_two_failures_of_others() {
    let (cache, model) = (cache(0), Model::waiting(0));
    model.failures.store(1000, Ordering::SeqCst);
    let keys = keys(&["a"]);
    let calls = join_all((0..10).map(|_| cache.get_or_compute(&keys, &model)));
    let release = async {
        // One, then another, then all that are left at once.
        for (called, permits) in [(1, 1), (2, 1), (10, 8)] {
            model.called(called).await;
            model.may.add_permits(permits);
        }
    };
    let (results, ()) = tokio::join!(calls, release);
    assert!(results.iter().all(Result::is_err));
    assert_eq!(cache.flights.count(), 0);
}

#[tokio::test]
async fn calls_that_need_each_others_rows_do_not_wait_in_a_circle() {
    let (cache, model) = (cache(0), Model::waiting(0));
    let (one, other) = (keys(&["a", "b", "c"]), keys(&["d", "b", "a"]));
    let third = keys(&["d", "c"]);
    let release = async {
        model.called(2).await;
        model.may.add_permits(100);
    };
    let ((one, _), (other, _), (third, _), ()) = tokio::join!(
        found(&cache, &one, &model),
        found(&cache, &other, &model),
        found(&cache, &third, &model),
        release,
    );
    assert_eq!(one, ["0", "1", "2"]);
    assert_eq!(other, ["0", "1", "0"]);
    assert_eq!(third, ["0", "2"]);
}

#[tokio::test]
async fn too_few_rows_are_no_result() {
    struct Mute;
    impl Compute for Mute {
        type Failure = ();
        async fn compute(&self, _indices: &[usize]) -> Result<Vec<CachedRow>, ()> {
            Ok(Vec::new())
        }
    }
    let keys = keys(&["a", "b"]);
    assert!(
        cache(0)
            .get_or_compute(&keys, &Mute)
            .await
            .unwrap()
            .is_none()
    );
    assert!(cache(0).refresh(&keys, &Mute).await.unwrap().is_none());
}

#[tokio::test]
async fn rows_of_another_gateway_are_found_in_one_round_trip() {
    let store = std::sync::Arc::new(Fake::default());
    let gateway = || {
        let redis = std::sync::Arc::new(redis(store.clone()));
        let writing = redis.follow();
        let cache = RowCache {
            redis: Some(redis),
            ..cache(1 << 20)
        };
        (cache, writing)
    };
    let ((one, _one), (other, _other)) = (gateway(), gateway());
    let model = Model::ready();
    found(&one, &keys(&["a", "b"]), &model).await;
    while store.values.lock().unwrap().len() < 2 {
        tokio::task::yield_now().await;
    }
    let before = store.round_trips.load(Ordering::Relaxed);
    let (rows, computed) = found(&other, &keys(&["b", "c", "a"]), &model).await;
    assert_eq!(
        (rows, computed),
        (vec!["1".into(), "1".into(), "0".into()], 1)
    );
    assert_eq!(other.metrics.shared.get(), 2);
    assert_eq!(store.round_trips.load(Ordering::Relaxed), before + 1);
    // Cached here from now on.
    found(&other, &keys(&["b", "a"]), &model).await;
    assert_eq!(store.round_trips.load(Ordering::Relaxed), before + 1);
    // A changed value is ignored, and a lost one is computed.
    for value in store.values.lock().unwrap().values_mut() {
        let mut poisoned = value.to_vec();
        *poisoned.last_mut().unwrap() ^= 1;
        *value = poisoned.into();
    }
    let (third, _third) = gateway();
    assert_eq!(found(&third, &keys(&["a"]), &model).await.1, 1);
    store.lost.store(true, Ordering::Relaxed);
    assert_eq!(found(&third, &keys(&["e"]), &model).await.1, 1);
}
