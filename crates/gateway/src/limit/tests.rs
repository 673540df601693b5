use std::path::Path;

use super::*;
use crate::policy::Policy;
use crate::request::Usage;

fn limit() -> Limit {
    let settings = LimitSettings {
        fair_rows: 64,
        fair_queue: 1000,
    };
    Limit::new(
        &settings,
        PolicyCell::default(),
        None,
        &LimitMetrics::default(),
    )
}

fn caller(quota: &str) -> Caller {
    let text = format!("[tenants.a]\nmodels = [\"*\"]\n{quota}");
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

fn scope(quota: &str) -> Arc<QuotaScope> {
    TenantQuotas::new(&caller(quota).tenant, None).all.clone()
}

fn at(seconds: f64) -> Moment {
    Moment {
        seconds,
        // A minute and a day begin with the test.
        unix_ms: 20_000 * 86_400_000 + (seconds * 1000.0) as u64,
    }
}

const REQUEST: Demand = Demand {
    requests: Some(1),
    items: None,
};

fn items(items: u64) -> Demand {
    Demand {
        requests: None,
        items: Some(items),
    }
}

#[test]
fn a_rate_lets_its_burst_pass_and_then_the_rate() {
    let scope = scope("quota = { requests_per_second = 10, burst = 5 }");
    let take = |now| scope.take(REQUEST, at(now), CountedBy::Gateway);
    assert_eq!((0..100).filter(|_| take(1.0).is_ok()).count(), 5);
    let denied = take(1.0).unwrap_err();
    assert!((denied.retry_after.as_secs_f64() - 0.1).abs() < 1e-6);
    // Ten seconds of a call each millisecond.
    let passed = (0..10_000)
        .filter(|ms| take(1.0 + f64::from(*ms) / 1000.0).is_ok())
        .count();
    assert!((99..=100).contains(&passed), "{passed}");
    // No more than the burst is saved up.
    assert_eq!((0..100).filter(|_| take(1000.0).is_ok()).count(), 5);
}

#[test]
fn a_share_is_the_limit_by_the_replicas() {
    let scope = scope("quota = { requests_per_second = 10, items_per_minute = 100 }");
    let taken = CountedBy::Share(4);
    let take = |needs, now| scope.take(needs, at(now), taken).is_ok();
    let passed = (0..10_000)
        .filter(|ms| take(REQUEST, f64::from(*ms) / 1000.0))
        .count();
    assert!((26..=28).contains(&passed), "{passed}");
    assert_eq!((0..100).filter(|_| take(items(1), 0.0)).count(), 25);
}

#[test]
fn windows_begin_with_the_minute_and_the_day() {
    let scope = scope("quota = { items_per_minute = 10, items_per_day = 25 }");
    let take = |n, now| scope.take(items(n), at(now), CountedBy::Gateway);
    assert!(take(10, 30.0).is_ok());
    let denied = take(1, 45.0).unwrap_err();
    assert_eq!(denied.rule.kind.name(), "items_per_minute");
    assert_eq!(denied.retry_after, Duration::from_secs(15));
    assert!(take(10, 60.0).is_ok());
    assert!(take(6, 120.0).is_err());
    assert!(take(5, 120.0).is_ok());
    let denied = take(1, 180.0).unwrap_err();
    assert_eq!(denied.rule.kind.name(), "items_per_day");
    assert_eq!(denied.retry_after, Duration::from_secs(86_400 - 180));
    assert!(take(10, 86_400.0).is_ok());
}

#[test]
fn tokens_and_costs_are_paid_afterwards() {
    let scope = scope("quota = { tokens_per_minute = 100, cost_per_day = 0.5 }");
    let take = |now| scope.take(items(1), at(now), CountedBy::Gateway);
    let usage = |tokens, cost| Usage { tokens, cost };
    assert!(take(0.0).is_ok());
    scope.charge(usage(99, 0.0), at(1.0));
    assert!(take(2.0).is_ok());
    scope.charge(usage(1, 0.25), at(2.0));
    assert!(take(2.0).is_err());
    assert!(take(60.0).is_ok());
    scope.charge(usage(0, 0.25), at(60.0));
    let denied = take(61.0).unwrap_err();
    assert_eq!(denied.rule.kind.name(), "cost_per_day");
    assert!(take(86_400.0).is_ok());
}

#[tokio::test]
async fn refusals_say_which_limit_and_when() {
    let limit = limit();
    let caller = caller(
        "quota = { requests_per_second = 1, in_flight = 2 }\n\
         [tenants.a.model_quotas.\"mini*\"]\nitems_per_minute = 100",
    );
    let first = limit.enter(&mut caller.clone()).await.unwrap();
    let error = limit.enter(&mut caller.clone()).await.unwrap_err();
    assert_eq!(error.kind(), Kind::QuotaSpent);
    assert!(error.retry_after().unwrap() <= Duration::from_secs(1));
    let expected = "the tenant's limit of 1 requests per second for all models is exceeded";
    assert_eq!(error.to_string(), expected);
    let _reservation = limit
        .reserve(&caller, request("minilm", 100))
        .await
        .unwrap();
    let error = limit
        .reserve(&caller, request("minilm", 1))
        .await
        .unwrap_err();
    let expected = "the tenant's limit of 100 items per minute for 'mini*' is exceeded";
    assert_eq!(error.to_string(), expected);
    // One of another model is not concerned; one without rows takes none.
    limit.reserve(&caller, request("digits", 1)).await.unwrap();
    limit.reserve(&caller, request("minilm", 0)).await.unwrap();
    let error = limit
        .reserve(&caller, request("minilm", 101))
        .await
        .unwrap_err();
    assert_eq!((error.kind(), error.retry_after()), (Kind::TooLarge, None));
    drop(first);
    assert_eq!(limit.0.metrics.limited("items_per_minute").get(), 2);
}

#[tokio::test]
async fn slots_are_given_back_and_refused_calls_take_nothing() {
    let limit = limit();
    let caller = caller(
        "quota = { items_per_minute = 10 }\n\
         [tenants.a.model_quotas.\"m\"]\nin_flight = 1\nitems_per_day = 3",
    );
    let reservation = limit.reserve(&caller, request("m", 3)).await.unwrap();
    let error = limit.reserve(&caller, request("m", 1)).await.unwrap_err();
    let expected = "the tenant's limit of 1 calls in flight for 'm' is reached";
    assert_eq!(error.to_string(), expected);
    drop(reservation);
    // The slot is free, the rows are used.
    let error = limit.reserve(&caller, request("m", 1)).await.unwrap_err();
    assert!(error.to_string().contains("3 items per day"), "{error}");
    let error = limit.reserve(&caller, request("m", 1)).await.unwrap_err();
    assert!(error.to_string().contains("3 items per day"), "{error}");
    // The refused calls have returned what they took of the whole.
    limit.reserve(&caller, request("other", 7)).await.unwrap();
    limit
        .reserve(&caller, request("other", 1))
        .await
        .unwrap_err();
}

#[tokio::test]
async fn a_chain_and_its_model_count_once_in_one_pattern() {
    let limit = limit();
    let caller = caller(
        "[tenants.a.model_quotas.\"*\"]\nin_flight = 1\n\
         [tenants.a.model_quotas.\"m\"]\nitems_per_day = 3\nin_flight = 1",
    );
    let _chain = limit.reserve(&caller, request("any", 3)).await.unwrap();
    let member = |rows, unit| QuotaRequest {
        model: "m",
        chain: Some("any"),
        rows,
        unit,
    };
    let reserve = |rows, unit| limit.reserve(&caller, member(rows, unit));
    let first = reserve(2, QuotaUnit::Request).await.unwrap();
    // One of several calls for a request has its slot already.
    reserve(1, QuotaUnit::Part).await.unwrap();
    let error = reserve(1, QuotaUnit::Request).await;
    assert!(error.unwrap_err().to_string().contains("in flight for 'm'"));
    drop(first);
    // Nothing is given back: it may have computed.
    let error = reserve(1, QuotaUnit::Request).await;
    assert!(error.unwrap_err().to_string().contains("3 items per day"));
}

#[tokio::test]
async fn usage_without_a_reservation_is_charged() {
    let limit = limit();
    let caller = caller("quota = { cost_per_day = 0.5, tokens_per_day = 10 }");
    let charge = |tokens, cost| limit.charge(&caller, "m", Usage { tokens, cost });
    charge(9, 0.25);
    limit.reserve(&caller, request("m", 1)).await.unwrap();
    charge(u64::MAX, 0.0);
    charge(u64::MAX, f64::INFINITY);
    limit.reserve(&caller, request("m", 1)).await.unwrap_err();
}

#[tokio::test]
async fn what_is_counted_outlives_the_policy() {
    let limit = limit();
    let with = |items: u64| {
        caller(&format!(
            "quota = {{ items_per_day = {items}, in_flight = 2 }}"
        ))
    };
    let (before, after) = (with(10), with(20));
    let slot = limit.enter(&mut before.clone()).await.unwrap();
    limit.reserve(&before, request("m", 10)).await.unwrap();
    limit.reserve(&before, request("m", 1)).await.unwrap_err();
    limit.reserve(&after, request("m", 10)).await.unwrap();
    limit.reserve(&after, request("m", 1)).await.unwrap_err();
    let other = limit.enter(&mut after.clone()).await.unwrap();
    limit.enter(&mut after.clone()).await.unwrap_err();
    drop((slot, other));
    limit.enter(&mut after.clone()).await.unwrap();
}
