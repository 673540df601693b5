use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::future::join_all;
use tokio::sync::Semaphore;

use super::super::memory::tests::row;
use super::super::remote::tests::{Fake, remote};
use super::*;

/// Computes rows whose text is their place; waits until it may, and fails as
/// often as it should.
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
    type Instead = &'static str;

    async fn compute(&self, places: &[usize]) -> Result<Vec<Row>, &'static str> {
        self.calls.lock().unwrap().push(places.to_vec());
        self.may.acquire().await.unwrap().forget();
        let fails = |left: usize| left.checked_sub(1);
        let order = Ordering::SeqCst;
        if self.failures.fetch_update(order, order, fails).is_ok() {
            return Err("failed");
        }
        Ok(places.iter().map(|place| row(&place.to_string())).collect())
    }
}

fn known(bytes: usize) -> Known {
    Known {
        memory: (bytes > 0).then(|| Memory::new(bytes, Duration::from_secs(60))),
        flights: Flights::default(),
        remote: None,
        counts: Counts::default(),
    }
}

fn keys(texts: &[&str]) -> Vec<Key> {
    let key = |text: &&str| {
        let mut key = [0; 32];
        key[..text.len()].copy_from_slice(text.as_bytes());
        Key(key)
    };
    texts.iter().map(key).collect()
}

async fn found(known: &Known, keys: &[Key], model: &Model) -> (Vec<String>, usize) {
    let found = known.rows(keys, model).await.unwrap().unwrap();
    let text = |row: &Row| String::from_utf8(row.content.to_vec()).unwrap();
    (found.rows.iter().map(text).collect(), found.computed)
}

#[tokio::test]
async fn only_what_is_not_known_is_computed_and_once() {
    let (known, model) = (known(1 << 20), Model::ready());
    let (_, computed) = found(&known, &keys(&["a", "b", "a"]), &model).await;
    assert_eq!((computed, model.calls()), (2, vec![vec![0, 1]]));
    let asked = keys(&["c", "b", "d", "a", "c"]);
    let (rows, computed) = found(&known, &asked, &model).await;
    assert_eq!(rows, ["0", "1", "2", "0", "0"]);
    assert_eq!((computed, model.calls().len()), (2, 2));
    assert_eq!(model.calls()[1], [0, 2]);
    let (_, computed) = found(&known, &asked, &model).await;
    assert_eq!((computed, model.calls().len()), (0, 2));
    let counts = &known.counts;
    assert_eq!(
        (
            counts.memory.get(),
            counts.coalesced.get(),
            counts.computed.get()
        ),
        (7, 2, 4)
    );
}

#[tokio::test]
async fn a_fresh_answer_is_computed_and_kept() {
    let (known, model) = (known(1 << 20), Model::ready());
    let asked = keys(&["a", "b"]);
    for _ in 0..2 {
        let fresh = known.fresh(&asked, &model).await.unwrap().unwrap();
        assert_eq!(fresh.computed, 2);
    }
    assert_eq!(model.calls().len(), 2);
    assert_eq!(found(&known, &asked, &model).await.1, 0);
}

#[tokio::test]
async fn a_thousand_identical_calls_are_one_computation() {
    for bytes in [1 << 20, 0] {
        let (known, model) = (known(bytes), Model::waiting(0));
        let asked = keys(&["a", "b"]);
        let calls = join_all((0..1000).map(|_| found(&known, &asked, &model)));
        let release = async {
            model.called(1).await;
            model.may.add_permits(Semaphore::MAX_PERMITS);
        };
        let (answers, ()) = tokio::join!(calls, release);
        assert_eq!(model.calls(), [[0, 1]]);
        assert_eq!(
            answers.iter().map(|(_, computed)| computed).sum::<usize>(),
            2
        );
        assert!(answers.iter().all(|(rows, _)| rows == &["0", "1"]));
        assert_eq!(known.flights.count(), 0);
    }
}

#[tokio::test]
async fn when_a_leader_leaves_a_follower_computes() {
    let (known, model) = (known(0), Model::waiting(0));
    let asked = keys(&["a"]);
    let mut leader = Box::pin(found(&known, &asked, &model));
    assert!(futures::poll!(&mut leader).is_pending());
    let followers = join_all((0..10).map(|_| found(&known, &asked, &model)));
    let leave = async {
        assert_eq!(model.calls().len(), 1);
        drop(leader);
        model.called(2).await;
        model.may.add_permits(10);
    };
    let (answers, ()) = tokio::join!(followers, leave);
    assert_eq!(model.calls().len(), 2);
    assert_eq!(
        answers.iter().map(|(_, computed)| computed).sum::<usize>(),
        1
    );
    assert_eq!(known.flights.count(), 0);
}

#[tokio::test]
async fn a_failure_is_its_own_callers_alone() {
    let (known, model) = (known(0), Model::waiting(0));
    model.failures.store(1, Ordering::SeqCst);
    let asked = keys(&["a"]);
    let calls = join_all((0..10).map(|_| known.rows(&asked, &model)));
    let release = async {
        for called in [1, 2] {
            model.called(called).await;
            model.may.add_permits(1);
        }
    };
    let (answers, ()) = tokio::join!(calls, release);
    assert_eq!(answers.iter().filter(|answer| answer.is_err()).count(), 1);
    assert_eq!(model.calls().len(), 2);
}

#[tokio::test]
async fn nobody_waits_for_more_than_two_failures_of_others() {
    let (known, model) = (known(0), Model::waiting(0));
    model.failures.store(1000, Ordering::SeqCst);
    let asked = keys(&["a"]);
    let calls = join_all((0..10).map(|_| known.rows(&asked, &model)));
    let release = async {
        // One, then another, then all who are left at once.
        for (called, permits) in [(1, 1), (2, 1), (10, 8)] {
            model.called(called).await;
            model.may.add_permits(permits);
        }
    };
    let (answers, ()) = tokio::join!(calls, release);
    assert!(answers.iter().all(Result::is_err));
    assert_eq!(known.flights.count(), 0);
}

#[tokio::test]
async fn calls_that_need_each_others_rows_do_not_wait_in_a_circle() {
    let (known, model) = (known(0), Model::waiting(0));
    let (one, other) = (keys(&["a", "b", "c"]), keys(&["d", "b", "a"]));
    let third = keys(&["d", "c"]);
    let release = async {
        model.called(2).await;
        model.may.add_permits(100);
    };
    let ((one, _), (other, _), (third, _), ()) = tokio::join!(
        found(&known, &one, &model),
        found(&known, &other, &model),
        found(&known, &third, &model),
        release,
    );
    assert_eq!(one, ["0", "1", "2"]);
    assert_eq!(other, ["0", "1", "0"]);
    assert_eq!(third, ["0", "2"]);
}

#[tokio::test]
async fn too_few_rows_are_no_answer() {
    struct Mute;
    impl Compute for Mute {
        type Instead = ();
        async fn compute(&self, _places: &[usize]) -> Result<Vec<Row>, ()> {
            Ok(Vec::new())
        }
    }
    let asked = keys(&["a", "b"]);
    assert!(known(0).rows(&asked, &Mute).await.unwrap().is_none());
    assert!(known(0).fresh(&asked, &Mute).await.unwrap().is_none());
}

#[tokio::test]
async fn rows_of_another_gateway_are_found_in_one_round_trip() {
    let store = std::sync::Arc::new(Fake::default());
    let gateway = || {
        let remote = std::sync::Arc::new(remote(store.clone()));
        let writing = remote.follow();
        let known = Known {
            remote: Some(remote),
            ..known(1 << 20)
        };
        (known, writing)
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
    assert_eq!(other.counts.shared.get(), 2);
    assert_eq!(store.round_trips.load(Ordering::Relaxed), before + 1);
    // Kept here from now on.
    found(&other, &keys(&["b", "a"]), &model).await;
    assert_eq!(store.round_trips.load(Ordering::Relaxed), before + 1);
    // What is changed there is not believed, and what is lost is computed.
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
