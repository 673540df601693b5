use std::path::Path;

use proptest::prelude::*;
use protocol::Kind;

use super::*;
use crate::limit::{LimitMetrics, LimitSettings};
use crate::policy::{Policy, PolicyCell};

const BURST: u64 = 200;
const ITEMS: u64 = 10_000;
const TOKENS: u64 = 100_000;

fn limit() -> Limit {
    let settings = LimitSettings {
        fair_rows: 64,
        fair_queue: 1000,
    };
    let metrics = LimitMetrics::default();
    Limit::new(&settings, PolicyCell::default(), None, &metrics)
}

/// A caller with a limit of each kind, and a smaller one for a model.
fn caller() -> Caller {
    let text = format!(
        "[tenants.a]\nmodels = [\"*\"]\n\
         quota = {{ requests_per_second = 0.000001, burst = {BURST}, items_per_day = {ITEMS}, tokens_per_day = {TOKENS} }}\n\
         [tenants.a.model_quotas.\"small\"]\nitems_per_day = 5"
    );
    let policy = Policy::parse(&text, Path::new("policy.toml")).unwrap();
    Caller::new(policy.tenants["a"].clone(), "key")
}

fn request(model: &str, rows: u64) -> QuotaRequest<'_> {
    QuotaRequest {
        model,
        chain: None,
        rows,
        unit: QuotaUnit::Request,
    }
}

fn tokens(tokens: u64) -> Usage {
    Usage { tokens, cost: 0.0 }
}

/// What the tenant has used.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Used {
    requests: u64,
    rows: u64,
    tokens: u64,
}

/// What is left is exactly what was not used: one more of each kind is refused.
async fn assert_used(limit: &Limit, caller: &Caller, used: Used) {
    let rows = ITEMS - used.rows;
    let mut all = limit.reserve(caller, request("m", rows)).await.unwrap();
    limit.reserve(caller, request("m", 1)).await.unwrap_err();
    // It is given back, as that of any call that a later limit refuses.
    all.entries.give_back();
    limit.charge(caller, "m", tokens(TOKENS - used.tokens - 1));
    let mut one = limit.reserve(caller, request("m", 1)).await.unwrap();
    one.entries.give_back();
    limit.charge(caller, "m", tokens(1));
    limit.reserve(caller, request("m", 1)).await.unwrap_err();
    let mut requests = 0;
    while limit.enter(&mut caller.clone()).await.is_ok() {
        requests += 1;
    }
    assert_eq!(requests, BURST - used.requests);
}

#[tokio::test]
async fn what_a_later_limit_refuses_takes_nothing() {
    let (limit, anyone) = (limit(), caller());
    for _ in 0..3 {
        let mut caller = anyone.clone();
        let admission = limit.enter(&mut caller).await.unwrap();
        // The whole has room for the rows, the model has not.
        let refused = limit.reserve(&caller, request("small", 6)).await;
        assert_eq!(refused.unwrap_err().kind(), Kind::TooLarge);
        drop(admission);
    }
    // The rows are reserved, and the tenant gets no turn.
    let mut caller = anyone.clone();
    let admission = limit.enter(&mut caller).await.unwrap();
    let reservation = limit.reserve(&caller, request("small", 5)).await.unwrap();
    note_refusal(&caller);
    drop((reservation, admission));
    assert_used(&limit, &anyone, Used::default()).await;
}

#[tokio::test]
async fn what_was_sent_is_used_whatever_is_refused_after_it() {
    let (limit, anyone) = (limit(), caller());
    let mut caller = anyone.clone();
    let admission = limit.enter(&mut caller).await.unwrap();
    let first = limit.reserve(&caller, request("small", 5)).await.unwrap();
    limit.sent(&caller);
    limit
        .reserve(&caller, request("small", 1))
        .await
        .unwrap_err();
    first.charge(tokens(7));
    drop((first, admission));
    let used = Used {
        requests: 1,
        rows: 5,
        tokens: 7,
    };
    assert_used(&limit, &anyone, used).await;
}

#[test]
fn tokens_are_estimated_by_the_last_responses() {
    let estimates = Estimates::default();
    assert_eq!(estimates.tokens("m", 400), 100);
    estimates.learn("m", 400, 40);
    assert_eq!(estimates.tokens("m", 400), 40);
    for _ in 0..100 {
        estimates.learn("m", 100, 1);
    }
    assert!((4..=5).contains(&estimates.tokens("m", 400)), "rounded up");
    assert_eq!(estimates.tokens("other", 400), 100);
    estimates.learn("m", 0, u64::MAX);
    assert!(estimates.tokens("m", usize::MAX) <= AMOUNT_MAX);
}

/// What happens to one of the calls.
#[derive(Debug, Clone, Copy)]
enum Event {
    Enter,
    Reserve(u64),
    ReserveTooMuch,
    NoTurn,
    Send,
    Respond(u64),
    Leave(u64),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        Just(Event::Enter),
        (1_u64..6).prop_map(Event::Reserve),
        Just(Event::ReserveTooMuch),
        Just(Event::NoTurn),
        Just(Event::Send),
        (1_u64..50).prop_map(Event::Respond),
        (1_u64..50).prop_map(Event::Leave),
    ]
}

/// A call as the stack would hold it.
#[derive(Default)]
struct Call {
    caller: Option<Caller>,
    admission: Option<Admission>,
    reservation: Option<Reservation>,
    rows: u64,
    sent: bool,
}

impl Call {
    async fn apply(&mut self, event: Event, limit: &Limit, used: &mut Used) {
        let Some(caller) = self.caller.clone() else {
            if let Event::Enter = event {
                let mut caller = caller();
                self.admission = limit.enter(&mut caller).await.ok();
                self.caller = Some(caller);
            }
            return;
        };
        let is_reserved = self.reservation.is_some();
        match event {
            Event::Reserve(rows) if !is_reserved => {
                self.reservation = limit.reserve(&caller, request("m", rows)).await.ok();
                self.rows = rows;
            }
            Event::ReserveTooMuch if !is_reserved => {
                limit
                    .reserve(&caller, request("small", 6))
                    .await
                    .unwrap_err();
                *self = Self::default();
            }
            Event::NoTurn if is_reserved && !self.sent => {
                note_refusal(&caller);
                *self = Self::default();
            }
            Event::Send if is_reserved && !self.sent => {
                limit.sent(&caller);
                self.sent = true;
            }
            Event::Respond(count) if self.sent => {
                if let Some(reservation) = &self.reservation {
                    reservation.charge(tokens(count));
                }
                used.tokens += count;
                self.end(used);
            }
            Event::Leave(count) => {
                if self.sent {
                    limit.charge(&caller, "m", tokens(count));
                    used.tokens += count;
                }
                self.end(used);
            }
            _ => {}
        }
    }

    /// Nothing refused it: what it took is used.
    fn end(&mut self, used: &mut Used) {
        used.requests += 1;
        if self.reservation.is_some() {
            used.rows += self.rows;
        }
        *self = Self::default();
    }
}

proptest! {
    #[test]
    fn the_sum_is_right_in_any_order(events in proptest::collection::vec((0_usize..4, event()), 0..120)) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let limit = limit();
            let mut calls: Vec<Call> = (0..4).map(|_| Call::default()).collect();
            let mut used = Used::default();
            for (index, event) in events {
                calls[index].apply(event, &limit, &mut used).await;
            }
            for call in &mut calls {
                if call.caller.is_some() {
                    call.apply(Event::Leave(1), &limit, &mut used).await;
                }
            }
            assert_used(&limit, &caller(), used).await;
        });
    }
}
