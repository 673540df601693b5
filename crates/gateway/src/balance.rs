//! Load balancing and retries: which worker a call is sent to, and which one it is
//! retried at.
//!
//! A worker is chosen by the power of two choices: the less loaded of two random
//! workers (Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing",
//! 2001). Failed calls are retried at another worker within a retry budget, after
//! gRFC A6: a failure costs one token, a success returns a tenth of one, and no
//! call is retried while half of the tokens or fewer are left. A call that no
//! worker has processed is retried at no cost.

mod metrics;

pub use metrics::BalanceMetrics;

use std::sync::Arc;
use std::time::Duration;

use platform::grpc::MessageLimits;
use platform::retry_budget::RetryBudget;
use protocol::{Error, Kind};
use tokio::time::Instant;
use tonic::Code;

use crate::request::Request;
use crate::route::{Route, no_worker_reachable};
use crate::upstream::{Response, SendError, SendOptions, Upstream};

/// Attempts of one call, the first included.
const ATTEMPTS_MAX: usize = 5;
/// The backoff, before its doubling, at a worker that has just failed the same
/// call.
const BACKOFF: Duration = Duration::from_millis(20);
const NOT_FOUND: &str = "not_found";

/// The load balancer.
#[derive(Debug)]
pub struct Balance {
    budget: RetryBudget,
    limits: MessageLimits,
    metrics: BalanceMetrics,
}

/// The outcome of an attempt.
enum Outcome {
    /// The caller gets this response.
    Responded(Response),
    /// The caller gets this error: no other worker would do better.
    Failed(Error),
    /// Another worker may do better.
    Retryable(RetryableFailure),
}

/// A failed attempt that may be retried.
struct RetryableFailure {
    /// The result for the caller when there is no further attempt.
    last: Result<Response, Error>,
    /// The reason, for the metric.
    reason: &'static str,
    /// Whether a retry costs a token.
    costs: bool,
    /// The retry delay that the worker requests (pushback).
    pause: Option<Duration>,
}

impl Balance {
    /// Balances with a retry budget of `retry_tokens`; `limits` bounds responses.
    pub fn new(retry_tokens: u32, limits: MessageLimits, metrics: BalanceMetrics) -> Self {
        Self {
            budget: RetryBudget::new(retry_tokens),
            limits,
            metrics,
        }
    }

    /// Sends a call until a worker responds, the deadline or the retry budget
    /// forbids a further attempt, or no worker is left. Every call that comes here
    /// is idempotent: it computes and changes nothing, and may be sent twice.
    pub async fn send(&self, route: &Route, request: &Request) -> Result<Response, Error> {
        // By address: a worker is tried again only when no other is left.
        let mut tried: Vec<usize> = Vec::new();
        let mut last = Err(no_worker_reachable());
        for number in 0..ATTEMPTS_MAX {
            let Some((upstream, tried_before)) = pick(route, &tried) else {
                break;
            };
            if tried_before && number > 0 {
                tokio::time::sleep(BACKOFF * (1 << number.min(4))).await;
            }
            tried.push(Arc::as_ptr(upstream).addr());
            let options = SendOptions {
                number,
                chosen: route.chosen.as_ref(),
                limits: Some(&self.limits),
            };
            let sent = upstream.send(request, options).await;
            let failure = match self.classify(upstream, sent) {
                Outcome::Responded(response) => return Ok(response),
                Outcome::Failed(error) => return Err(error),
                Outcome::Retryable(failure) => failure,
            };
            last = failure.last;
            if failure.costs && !self.budget.failed() {
                self.metrics.budget_exhausted.inc();
                break;
            }
            let pause = failure.pause.unwrap_or_default();
            if Instant::now() + pause >= request.deadline {
                break;
            }
            if failure.reason == NOT_FOUND && number > 0 {
                break;
            }
            if number + 1 < ATTEMPTS_MAX {
                self.metrics.retried(failure.reason);
                tokio::time::sleep(pause).await;
            }
        }
        last
    }

    fn classify(&self, upstream: &Upstream, sent: Result<Response, SendError>) -> Outcome {
        let response = match sent {
            Ok(response) => response,
            Err(error) => return self.classify_error(upstream, error),
        };
        if matches!(
            response.code(),
            Code::Internal | Code::Unknown | Code::DataLoss
        ) {
            upstream.failed();
            return Outcome::Responded(response);
        }
        // Any other response is that of a healthy worker.
        upstream.succeeded();
        let reason = match response.code() {
            // Overloaded: another worker may have room.
            Code::Unavailable => "unavailable",
            // The model left this worker a moment ago: one retry is enough.
            Code::NotFound => NOT_FOUND,
            _ => {
                self.budget.succeeded();
                return Outcome::Responded(response);
            }
        };
        let pushback = response
            .status_metadata("grpc-retry-pushback-ms")
            .map(str::parse::<u64>);
        match pushback {
            // A negative or malformed pushback forbids a retry (gRFC A6).
            Some(Err(_)) => Outcome::Responded(response),
            pushback => Outcome::Retryable(RetryableFailure {
                last: Ok(response),
                reason,
                costs: reason != NOT_FOUND,
                pause: pushback.and_then(Result::ok).map(Duration::from_millis),
            }),
        }
    }

    fn classify_error(&self, upstream: &Upstream, error: SendError) -> Outcome {
        // The log has the worker's address; callers get none.
        tracing::debug!(worker = %upstream.target, %error, "a call failed");
        let message = format!("a worker failed: {error}");
        let (reason, costs) = match error {
            SendError::NotSent(_) => ("not_sent", false),
            SendError::Broken(_) => ("broken", true),
            SendError::TooLarge(_) => {
                upstream.succeeded();
                return Outcome::Failed(Error::new(Kind::TooLarge, message));
            }
            SendError::NoRoom => {
                upstream.succeeded();
                let retry_after = Duration::from_millis(100);
                return Outcome::Failed(Error::overloaded(message, retry_after));
            }
        };
        // A connection that was closed in order is no fault of the worker.
        if costs {
            upstream.failed();
        }
        Outcome::Retryable(RetryableFailure {
            last: Err(Error::new(Kind::NotReady, message)),
            reason,
            costs,
            pause: None,
        })
    }
}

/// Picks a worker that has not been tried, else one that has; the flag tells them apart.
/// Ejected workers are picked only when there is no other.
fn pick<'r>(route: &'r Route, tried: &[usize]) -> Option<(&'r Arc<Upstream>, bool)> {
    let reachable = || route.upstreams().iter().filter(|u| u.reachable());
    let untried = |upstream: &&Arc<Upstream>| !tried.contains(&Arc::as_ptr(upstream).addr());
    let healthy = less_loaded(route.name(), || {
        reachable()
            .filter(untried)
            .filter(|upstream| !upstream.ejected())
    });
    if let Some(upstream) = healthy {
        return Some((upstream, false));
    }
    let ejected = less_loaded(route.name(), || reachable().filter(untried));
    if let Some(upstream) = ejected {
        return Some((upstream, false));
    }
    less_loaded(route.name(), reachable).map(|upstream| (upstream, true))
}

/// The less loaded of two random candidates.
fn less_loaded<'r, I>(model: &str, candidates: impl Fn() -> I) -> Option<&'r Arc<Upstream>>
where
    I: Iterator<Item = &'r Arc<Upstream>>,
{
    let all: Vec<&Arc<Upstream>> = candidates().collect();
    match all.as_slice() {
        [] => None,
        [only] => Some(only),
        several => {
            let first = rand::random_range(0..several.len());
            let step = rand::random_range(1..several.len());
            let (a, b) = (several[first], several[(first + step) % several.len()]);
            Some(if a.load(model) <= b.load(model) { a } else { b })
        }
    }
}
