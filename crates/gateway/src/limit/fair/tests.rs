use super::*;

fn tenant(name: &str, weight: u32) -> Tenant {
    Tenant {
        name: name.to_owned(),
        weight,
        ..Tenant::anyone()
    }
}

fn queue(window: u64) -> FairQueue {
    FairQueue {
        window,
        ..FairQueue::default()
    }
}

const LONG: Duration = Duration::from_secs(3600);

/// Removes the waiting calls whose turn has come, in no order.
fn granted(waiting: &mut Vec<(usize, Ticket)>) -> Vec<(usize, u64)> {
    let mut out = Vec::new();
    waiting.retain_mut(|(who, ticket)| match ticket.granted.try_recv() {
        Ok(()) => {
            out.push((*who, ticket.items));
            false
        }
        Err(_) => true,
    });
    out
}

fn join(
    queue: &mut FairQueue,
    tenants: &[Tenant],
    who: usize,
    items: u64,
) -> Option<(usize, Ticket)> {
    match queue.enter(&tenants[who], items, 100_000, LONG) {
        Admission::Granted => None,
        Admission::Queued(ticket) => Some((who, ticket)),
        Admission::Refused(reason, _) => panic!("{reason:?}"),
    }
}

/// Rows by tenant that are served while all have calls waiting.
fn shares(weights: &[u32], rows: impl Fn(usize, u64) -> u64, turns: usize) -> Vec<u64> {
    let tenants: Vec<Tenant> = weights
        .iter()
        .enumerate()
        .map(|(index, weight)| tenant(&index.to_string(), *weight))
        .collect();
    let mut queue = queue(8);
    let (mut waiting, mut running) = (Vec::new(), VecDeque::new());
    let mut number = 0;
    for who in (0..tenants.len()).cycle().take(tenants.len() * 40) {
        number += 1;
        match join(&mut queue, &tenants, who, rows(who, number)) {
            Some(ticket) => waiting.push(ticket),
            None => running.push_back((who, rows(who, number))),
        }
    }
    let mut served = vec![0; tenants.len()];
    for _ in 0..turns {
        let (_, items) = running.pop_front().unwrap();
        queue.release(items, Instant::now());
        for (who, items) in granted(&mut waiting) {
            served[who] += items;
            running.push_back((who, items));
            number += 1;
            // The same tenant calls again at once.
            waiting.extend(join(&mut queue, &tenants, who, rows(who, number)));
        }
        assert!(!running.is_empty(), "rows wait and no call is served");
    }
    served
}

#[test]
fn rows_are_shared_by_weight() {
    for weights in [vec![1, 1], vec![1, 3], vec![1, 2, 5]] {
        let served = shares(
            &weights,
            |who, number| 1 + (who as u64 + number) % 4,
            20_000,
        );
        let total: u64 = served.iter().sum();
        let weight: u32 = weights.iter().sum();
        for (served, own) in served.iter().zip(&weights) {
            let (share, expected) = (
                *served as f64 / total as f64,
                f64::from(*own) / f64::from(weight),
            );
            assert!(
                (share / expected - 1.0).abs() < 0.03,
                "{share} of {expected}, {weights:?}"
            );
        }
    }
}

#[test]
fn large_calls_take_no_more_than_small_ones() {
    let served = shares(&[1, 1], |who, _| if who == 0 { 32 } else { 1 }, 20_000);
    let ratio = served[0] as f64 / served[1] as f64;
    assert!((ratio - 1.0).abs() < 0.05, "{served:?}");
}

#[test]
fn a_tenant_that_comes_new_is_next() {
    let tenants = [tenant("many", 1), tenant("few", 1)];
    let mut queue = queue(4);
    let mut waiting: Vec<_> = (0..1000)
        .filter_map(|_| join(&mut queue, &tenants, 0, 1))
        .collect();
    for _ in 0..500 {
        queue.release(1, Instant::now());
    }
    granted(&mut waiting);
    waiting.extend(join(&mut queue, &tenants, 1, 1));
    queue.release(1, Instant::now());
    queue.release(1, Instant::now());
    assert!(granted(&mut waiting).iter().any(|(who, _)| *who == 1));
}

#[test]
fn a_call_larger_than_the_window_passes() {
    let tenants = [tenant("a", 1)];
    let mut queue = queue(4);
    assert!(join(&mut queue, &tenants, 0, 100).is_none());
    let mut waiting: Vec<_> = join(&mut queue, &tenants, 0, 100).into_iter().collect();
    assert!(granted(&mut waiting).is_empty());
    queue.release(100, Instant::now());
    assert_eq!(granted(&mut waiting), [(0, 100)]);
}

#[test]
fn what_cannot_be_in_time_is_refused() {
    let tenants = [tenant("a", 1)];
    let mut queue = queue(1);
    let start = Instant::now();
    let mut waiting: Vec<_> = (0..50)
        .filter_map(|_| join(&mut queue, &tenants, 0, 1))
        .collect();
    // A row in 10 ms.
    for number in 1..30 {
        queue.release(1, start + Duration::from_millis(10) * number);
    }
    granted(&mut waiting);
    assert_eq!(waiting.len(), 20);
    let refused = queue.enter(&tenants[0], 1, 1000, Duration::from_millis(100));
    assert!(
        matches!(refused, Admission::Refused(FairRefusal::TooLate, _)),
        "{refused:?}"
    );
    let waits = queue.enter(&tenants[0], 1, 1000, Duration::from_millis(400));
    assert!(matches!(waits, Admission::Queued(_)), "{waits:?}");
    let refused = queue.enter(&tenants[0], 1, 21, LONG);
    assert!(
        matches!(refused, Admission::Refused(FairRefusal::QueueFull, _)),
        "{refused:?}"
    );
    let other = queue.enter(&tenant("b", 1), 1, 21, Duration::from_millis(100));
    assert!(matches!(other, Admission::Queued(_)), "{other:?}");
}

fn fair(rows: u32) -> (FairQueues, LimitMetrics) {
    let settings = LimitSettings {
        fair_rows: rows,
        fair_queue: 1000,
    };
    let metrics = LimitMetrics::default();
    (FairQueues::new(&settings, &metrics), metrics)
}

fn request(items: u64) -> TurnRequest<'static> {
    TurnRequest {
        model: "m",
        workers: 1,
        items,
        deadline: Instant::now() + LONG,
    }
}

/// A caller who leaves, before or after its turn comes, makes room for the next.
#[tokio::test]
async fn callers_who_leave_lose_no_turn() {
    use futures::FutureExt;
    use rand::{RngExt, SeedableRng};
    let mut random = rand::rngs::StdRng::seed_from_u64(7);
    for _ in 0..50 {
        let (fair, metrics) = fair(4);
        let fair = &fair;
        let tenants: Vec<Tenant> = (1..4).map(|w| tenant(&w.to_string(), w)).collect();
        let (mut turns, mut waiting) = (Vec::new(), Vec::new());
        for _ in 0..300 {
            // The runtime lets a task poll only so much at once.
            tokio::task::yield_now().await;
            match random.random_range(0..5) {
                0 | 1 => {
                    let who = tenants[random.random_range(0..3)].clone();
                    let items = random.random_range(1..6);
                    let mut call = async move { fair.turn(&who, request(items)).await }.boxed();
                    match (&mut call).now_or_never() {
                        Some(turn) => turns.push(turn.unwrap()),
                        None => waiting.push(call),
                    }
                }
                2 if !turns.is_empty() => {
                    turns.swap_remove(random.random_range(0..turns.len()));
                }
                3 if !waiting.is_empty() => {
                    drop(waiting.swap_remove(random.random_range(0..waiting.len())));
                }
                _ if !waiting.is_empty() => {
                    let index = random.random_range(0..waiting.len());
                    if let Some(turn) = (&mut waiting[index]).now_or_never() {
                        turns.push(turn.unwrap());
                        drop(waiting.swap_remove(index));
                    }
                }
                _ => {}
            }
            let queue = fair.queue("m");
            let queue = lock(&queue);
            assert!(queue.waiting == 0 || queue.in_flight >= queue.window);
        }
        drop(turns);
        // In any order; each round serves at least one call.
        for _ in 0..300 {
            tokio::task::yield_now().await;
            waiting.retain_mut(|call| call.now_or_never().is_none());
        }
        assert!(waiting.is_empty(), "{} are never served", waiting.len());
        drop(waiting);
        let queue = fair.queue("m");
        let queue = lock(&queue);
        assert_eq!(
            (queue.in_flight, queue.waiting, queue.tenants.len()),
            (0, 0, 0)
        );
        assert_eq!(metrics.fair_waiting.get(), 0);
    }
}
