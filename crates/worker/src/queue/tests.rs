use platform::pot::Holder;

use super::*;

type Reply = oneshot::Receiver<Result<Computed, ModelError>>;

fn limits() -> QueueLimits {
    QueueLimits {
        batch_tokens_max: 100,
        batch_rows_max: 4,
        delay: Duration::ZERO,
        rows_max: 10,
    }
}

fn part(tokens: &[usize], timeout: Duration) -> (Part, Reply) {
    let (reply, wait) = oneshot::channel();
    let row = |length: &usize| {
        let tokens = TokenRow {
            ids: vec![1; *length],
            type_ids: vec![0; *length],
            skipped: 0,
        };
        (tokens, TextOutput::Embedding)
    };
    let now = Instant::now();
    let part = Part {
        rows: Rows::Text(tokens.iter().map(row).collect()),
        priority: 0,
        deadline: now + timeout,
        queued_at: now,
        reply,
    };
    (part, wait)
}

fn push(queue: &Queue, parts: Vec<Part>) -> Result<Option<Batch>, Refusal> {
    let lane = Lane::default();
    let rows = parts.iter().map(|part| part.rows.count()).sum();
    let deadline = parts.iter().map(|part| part.deadline).min();
    let held = queue.reserve(&lane, rows, deadline.unwrap())?;
    queue.push(parts, &lane, held)
}

const LONG: Duration = Duration::from_secs(60);

#[test]
fn a_batch_closes_on_the_token_budget_and_on_the_row_budget() {
    let queue = Queue::new(limits(), 0);
    let (parts, _waits): (Vec<_>, Vec<_>) =
        [60, 30, 30].map(|t| part(&[t], LONG)).into_iter().unzip();
    push(&queue, parts).unwrap();
    assert_eq!(queue.next_batch().map(|batch| batch.tokens), Some(90));
    assert_eq!(queue.next_batch().map(|batch| batch.tokens), Some(30));
    let (parts, _waits): (Vec<_>, Vec<_>) = [1; 6].map(|t| part(&[t], LONG)).into_iter().unzip();
    push(&queue, parts).unwrap();
    assert_eq!(queue.next_batch().map(|batch| batch.rows), Some(4));
    assert_eq!(queue.next_batch().map(|batch| batch.rows), Some(2));
}

#[test]
fn a_batch_waits_for_its_delay_but_not_past_a_deadline() {
    let queue = Queue::new(
        QueueLimits {
            delay: Duration::from_millis(200),
            ..limits()
        },
        0,
    );
    let started = Instant::now();
    let (waits_long, _wait) = part(&[1], LONG);
    push(&queue, vec![waits_long]).unwrap();
    assert_eq!(queue.next_batch().map(|batch| batch.rows), Some(1));
    assert!(started.elapsed() >= Duration::from_millis(200));
    // A token takes 10 ms: the batch must close 15 ms before the deadline.
    queue.finished(1, Duration::from_millis(10));
    let started = Instant::now();
    let (hurried, _wait) = part(&[1], Duration::from_millis(80));
    push(&queue, vec![hurried]).unwrap();
    assert_eq!(queue.next_batch().map(|batch| batch.rows), Some(1));
    assert!(started.elapsed() < Duration::from_millis(80));
}

#[test]
fn a_full_queue_refuses_and_cancelled_rows_make_room() {
    let queue = Queue::new(limits(), 0);
    let (first, wait) = part(&[1; 10], LONG);
    push(&queue, vec![first]).unwrap();
    let (second, _wait) = part(&[1], LONG);
    assert!(matches!(push(&queue, vec![second]), Err(Refusal::Full(_))));
    drop(wait);
    let (third, _wait) = part(&[1; 2], LONG);
    push(&queue, vec![third]).unwrap();
    let batch = queue.next_batch().unwrap();
    assert_eq!((batch.rows, batch.dropped.abandoned_rows), (2, 10));
}

#[test]
fn a_wait_longer_than_the_deadline_is_refused_at_once() {
    let queue = Queue::new(limits(), 0);
    queue.finished(1, Duration::from_secs(1));
    let (first, _wait) = part(&[5], LONG);
    push(&queue, vec![first]).unwrap();
    let (hurried, _wait) = part(&[1], Duration::from_millis(100));
    assert!(matches!(push(&queue, vec![hurried]), Err(Refusal::TooLate)));
}

#[test]
fn priorities_go_first_and_zero_goes_last() {
    let queue = Queue::new(
        QueueLimits {
            batch_rows_max: 1,
            ..limits()
        },
        0,
    );
    let mut waits = Vec::new();
    for (tokens, priority) in [(1, 0), (2, 2), (3, 1), (4, 2)] {
        let (mut next, wait) = part(&[tokens], LONG);
        next.priority = priority;
        waits.push(wait);
        push(&queue, vec![next]).unwrap();
    }
    let order: Vec<usize> = (0..4)
        .filter_map(|_| queue.next_batch())
        .map(|b| b.tokens)
        .collect();
    assert_eq!(order, [3, 2, 4, 1]);
}

#[test]
fn a_closed_queue_finishes_its_rows_and_takes_no_more() {
    let queue = Queue::new(limits(), 0);
    let (first, _wait) = part(&[1], LONG);
    push(&queue, vec![first]).unwrap();
    queue.close();
    let (second, _wait) = part(&[1], LONG);
    assert!(matches!(push(&queue, vec![second]), Err(Refusal::Closed)));
    assert!(queue.next_batch().is_some());
    assert!(queue.next_batch().is_none());
}

#[test]
fn large_requests_are_split_into_parts_that_fit() {
    let (text, _) = part(&[60, 30, 30, 5, 1, 1, 1], LONG);
    let parts = split(text.rows, &limits());
    let tokens: Vec<usize> = parts.iter().map(Rows::tokens).collect();
    assert_eq!(tokens, [90, 37, 1]);
    let features = Rows::Features {
        values: vec![0.5; 9 * 3],
        rows: 9,
    };
    let rows: Vec<usize> = split(features, &limits()).iter().map(Rows::count).collect();
    assert_eq!(rows, [4, 4, 1]);
}

#[test]
fn a_small_request_is_computed_inline_when_idle() {
    let queue = Queue::new(limits(), 20);
    let (first, _wait) = part(&[20], LONG);
    let batch = push(&queue, vec![first]).unwrap();
    assert_eq!(batch.map(|batch| batch.tokens), Some(20));
    let (second, _wait) = part(&[20], LONG);
    assert!(
        push(&queue, vec![second]).unwrap().is_none(),
        "one computes"
    );
    assert_eq!(queue.next_batch().map(|batch| batch.tokens), Some(20));
    queue.finished(20, Duration::from_micros(200));
    let (long, _wait) = part(&[21], LONG);
    assert!(push(&queue, vec![long]).unwrap().is_none(), "too long");
}

#[test]
fn a_lane_that_fills_the_queue_leaves_the_others_their_share() {
    let queue = Queue::new(limits(), 0);
    queue.finished(1, Duration::from_secs(1));
    let lane = |number| Lane {
        holder: Holder::Lane(number),
        ..Lane::default()
    };
    let mut waits = Vec::new();
    let mut push = |lane: &Lane, tokens: usize, priority| {
        let (mut part, wait) = part(&[tokens], Duration::from_secs(20));
        part.priority = priority;
        waits.push(wait);
        let held = queue.reserve(lane, 1, part.deadline)?;
        queue.push(vec![part], lane, held)
    };
    // Two that take turns have half of the rows each.
    push(&lane(2), 1, 0).unwrap();
    for _ in 0..5 {
        push(&lane(1), 3, 1).unwrap();
    }
    assert!(matches!(push(&lane(1), 3, 1), Err(Refusal::Full(_))));
    // The others' wait is not that of the flood.
    push(&lane(2), 2, 0).unwrap();
    assert!(matches!(push(&lane(1), 9, 1), Err(Refusal::Full(_))));
    let batch = queue.next_batch().unwrap();
    let tokens: Vec<usize> = batch.parts.iter().map(|part| part.rows.tokens()).collect();
    assert_eq!(tokens, [1, 3, 2, 3]);
}

#[test]
fn deferred_work_waits_until_nothing_else_does() {
    let queue = Queue::new(limits(), 0);
    let mut waits = Vec::new();
    for (tokens, deferred) in [(1, true), (2, false), (3, true), (4, false)] {
        let lane = Lane {
            deferred,
            ..Lane::default()
        };
        let (mut part, wait) = part(&[tokens], LONG);
        part.priority = u64::from(deferred);
        waits.push(wait);
        let held = queue.reserve(&lane, 1, part.deadline).unwrap();
        queue.push(vec![part], &lane, held).unwrap();
    }
    let batches: Vec<usize> = (0..2)
        .filter_map(|_| queue.next_batch())
        .map(|batch| batch.tokens)
        .collect();
    assert_eq!(batches, [6, 4]);
    assert_eq!(queue.load().0, 0);
}

#[test]
fn no_batch_is_inline_while_another_is_computed() {
    let queue = Queue::new(limits(), 20);
    let (first, _wait) = part(&[1], LONG);
    assert!(push(&queue, vec![first]).unwrap().is_some());
    let (second, _wait) = part(&[2], LONG);
    assert!(push(&queue, vec![second]).unwrap().is_none());
    assert_eq!(queue.next_batch().map(|batch| batch.tokens), Some(2));
    // The first has ended; the device thread still computes the second.
    queue.finished(1, Duration::from_micros(1));
    let (third, _wait) = part(&[1], LONG);
    assert!(push(&queue, vec![third]).unwrap().is_none());
}
