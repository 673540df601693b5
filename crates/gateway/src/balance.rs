//! Load balancing and retries: which worker a call is sent to, and which one it is
//! retried at.
//!
//! A worker is chosen by the power of two choices: the less loaded of two random
//! workers (Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing",
//! 2001). Failed calls are retried at another worker within a retry budget, after
//! gRFC A6: a failure costs one token, a success returns a tenth of one, and no
//! call is retried while half of the tokens or fewer are left. Each caller has a
//! budget of its own. A call that no worker has processed is retried at no cost.
//! A call on which workers break is contained by `suspects`.

mod metrics;
mod suspects;

pub use metrics::BalanceMetrics;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use http::StatusCode;
use platform::grpc::MessageLimits;
use platform::pot::Holder;
use platform::retry_budget::RetryBudgets;
use protocol::{Error, Kind};
use tokio::time::Instant;
use tonic::Code;

use crate::request::Request;
use crate::route::{Route, no_worker_reachable};
use crate::upstream::{Response, SendError, SendOptions, Upstream};
use suspects::Suspects;

/// Attempts of one call, the first included.
const ATTEMPTS_MAX: usize = 5;
/// Workers that may break on a call before it is refused for it.
const LOSSES_MAX: usize = 1;
/// The backoff, before its doubling, at a worker that has just failed the same
/// call.
const BACKOFF: Duration = Duration::from_millis(20);
const NOT_FOUND: &str = "not_found";
const LATE: &str = "late";

/// The load balancer.
#[derive(Debug)]
pub struct Balance {
    budgets: RetryBudgets,
    suspects: Suspects,
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
    /// Whether the worker, its connection or the stream broke with the call in
    /// flight: the call itself may be the reason.
    lost: bool,
    /// The retry delay that the worker requests (pushback).
    pause: Option<Duration>,
}

impl Balance {
    /// Balances with a retry budget of `retry_tokens` for each caller; `limits`
    /// bounds responses.
    pub fn new(retry_tokens: u32, limits: MessageLimits, metrics: BalanceMetrics) -> Self {
        Self {
            budgets: RetryBudgets::new(retry_tokens),
            suspects: Suspects::default(),
            limits,
            metrics,
        }
    }

    /// Sends a call until a worker responds, the deadline or the retry budget
    /// forbids a further attempt, or no worker is left. Every call that comes here
    /// is idempotent: it computes and changes nothing, and may be sent twice. After
    /// a worker broke on it, it is sent to at most one more.
    /// `at_worker` is true while a worker has the call.
    pub async fn send(
        &self,
        route: &Route,
        request: &Request,
        at_worker: &AtomicBool,
    ) -> Result<Response, Error> {
        if self.suspects.refuses(request) {
            self.metrics.poisonous.inc();
            return Err(poisonous());
        }
        let holder = request.caller.holder();
        // By address: a worker is tried again only when no other is left.
        let mut tried: Vec<usize> = Vec::new();
        let mut last = Err(no_worker_reachable());
        let (mut losses, mut late, mut retried) = (0, 0, None);
        for number in 0..ATTEMPTS_MAX {
            let apart = if losses > 0 {
                self.suspects.pick(route, &tried, &holder).await
            } else {
                None
            };
            let picked = apart.as_ref().map(|apart| (&apart.upstream, false));
            let Some((upstream, tried_before)) = picked.or_else(|| pick(route, &tried)) else {
                break;
            };
            // The worker that refused a call as late would do so again.
            if tried_before && late > 0 {
                break;
            }
            if let Some(reason) = retried {
                self.metrics.retried(reason);
            }
            if tried_before && number > 0 {
                tokio::time::sleep(BACKOFF * (1 << number.min(4))).await;
            }
            tried.push(Arc::as_ptr(upstream).addr());
            let options = SendOptions {
                model: route.name(),
                number,
                chosen: route.chosen.as_ref(),
                limits: Some(&self.limits),
            };
            at_worker.store(true, Ordering::Relaxed);
            let sent = upstream.send(request, options).await;
            at_worker.store(false, Ordering::Relaxed);
            let failure = match self.classify(upstream, sent, request) {
                Outcome::Responded(response) => return Ok(response),
                Outcome::Failed(error) => return Err(error),
                Outcome::Retryable(failure) => failure,
            };
            last = failure.last;
            losses += usize::from(failure.lost);
            if losses > LOSSES_MAX {
                return Err(self.poisonous(route, request));
            }
            let pause = failure.pause.unwrap_or_default();
            if Instant::now() + pause >= request.deadline {
                break;
            }
            // What was refused because its caller does not wait for long enough
            // shows no fault of a worker: it costs nothing, and is tried once more
            // where less may wait.
            let is_late = failure.reason == LATE || is_late(&last, request.deadline);
            late += usize::from(is_late);
            if late > 1 || (failure.reason == NOT_FOUND && number > 0) {
                break;
            }
            if failure.costs && !is_late && !self.budgets.failed(&holder) {
                self.metrics.budget_exhausted.inc();
                break;
            }
            retried = Some(failure.reason);
            if number + 1 < ATTEMPTS_MAX {
                tokio::time::sleep(pause).await;
            }
        }
        last
    }

    /// The error of a call after which two workers were lost.
    fn poisonous(&self, route: &Route, request: &Request) -> Error {
        tracing::error!(
            model = route.name(),
            method = request.method.name(),
            tenant = request.caller.tenant.name,
            "two workers broke on one request: it is refused for a minute"
        );
        self.suspects.refuse(request);
        self.metrics.poisonous.inc();
        poisonous()
    }

    fn classify(
        &self,
        upstream: &Upstream,
        sent: Result<Response, SendError>,
        request: &Request,
    ) -> Outcome {
        let holder = request.caller.holder();
        let response = match sent {
            Ok(response) => response,
            Err(error) => return classify_error(upstream, error, &holder),
        };
        if matches!(
            response.code(),
            Code::Internal | Code::Unknown | Code::DataLoss
        ) {
            upstream.failed_by(&holder);
            return Outcome::Responded(response);
        }
        // Any other response is that of a healthy worker.
        upstream.succeeded();
        let reason = match response.code() {
            // Overloaded: another worker may have room.
            Code::Unavailable => "unavailable",
            // The model left this worker a moment ago: one retry is enough.
            Code::NotFound => NOT_FOUND,
            // More waits there than the caller has time for.
            Code::DeadlineExceeded if Instant::now() < request.deadline => LATE,
            _ => {
                self.budgets.succeeded(&holder);
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
                costs: reason == "unavailable",
                lost: false,
                pause: pushback.and_then(Result::ok).map(Duration::from_millis),
            }),
        }
    }
}

/// Whether a server that says UNAVAILABLE refused a call because it would wait
/// for longer than its caller does.
fn is_late(last: &Result<Response, Error>, deadline: Instant) -> bool {
    let Ok(response) = last else { return false };
    let status = response.status();
    let retry_after = status.and_then(|status| Error::from_status(&status).retry_after());
    retry_after.is_some_and(|after| Instant::now() + after >= deadline)
}

fn poisonous() -> Error {
    let message = "two workers failed while they processed this request: it is not sent again";
    Error::new(Kind::Internal, message)
}

/// What an error says about the worker and about the call.
fn classify_error(upstream: &Upstream, error: SendError, caller: &Holder) -> Outcome {
    // The log has the worker's address; callers get none.
    tracing::debug!(worker = %upstream.target, %error, "a call failed");
    let message = format!("a worker failed: {error}");
    let failed = |error| {
        upstream.succeeded();
        Outcome::Failed(error)
    };
    let retryable = |reason, lost| {
        Outcome::Retryable(RetryableFailure {
            last: Err(Error::new(Kind::NotReady, message.clone())),
            reason,
            costs: reason != "not_sent",
            lost,
            pause: None,
        })
    };
    match error {
        // A connection that was closed in order is no fault of the worker.
        SendError::NotSent(_) => {
            upstream.abandoned();
            retryable("not_sent", false)
        }
        SendError::Broken(_) => {
            upstream.broke();
            retryable("broken", true)
        }
        // The other calls on the connection go on, so that the worker is well.
        SendError::Reset(_) => {
            upstream.abandoned();
            retryable("reset", true)
        }
        SendError::Http(status) if is_of_request(status) => failed(of_request(status)),
        SendError::Http(_) => {
            upstream.failed_by(caller);
            retryable("unavailable", false)
        }
        SendError::TooLarge(_) => failed(Error::new(Kind::TooLarge, message)),
        SendError::NoRoom => failed(Error::overloaded(message, Duration::from_millis(100))),
    }
}

/// Whether a status of HTTP is about the request: the next worker would refuse it
/// as well.
fn is_of_request(status: StatusCode) -> bool {
    status.is_client_error() && status != StatusCode::TOO_MANY_REQUESTS
}

fn of_request(status: StatusCode) -> Error {
    match status {
        StatusCode::PAYLOAD_TOO_LARGE => Error::new(
            Kind::TooLarge,
            "the message is over the limit of the worker",
        ),
        StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE => {
            Error::invalid("metadata", "is over the limit of the worker")
        }
        status => {
            let reason = format!(
                "was refused by the worker with HTTP status {}",
                status.as_u16()
            );
            Error::invalid("message", reason)
        }
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

#[cfg(test)]
mod tests {
    use platform::channel::Target;
    use platform::metrics::Metrics;
    use platform::watchdog::Starvation;

    use super::*;
    use crate::upstream::UpstreamMetrics;

    fn upstream() -> Upstream {
        let metrics = UpstreamMetrics::register(&Metrics::default());
        let target = Target::Tcp("127.0.0.1:1".to_owned());
        Upstream::new(target, metrics.of("w".to_owned()), Starvation::none())
    }

    #[tokio::test(start_paused = true)]
    async fn what_a_request_is_to_blame_for_ejects_no_worker() {
        let reset = || SendError::Reset("PROTOCOL_ERROR".to_owned());
        let too_long = StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE;
        let upstream = upstream();
        for _ in 0..20 {
            for error in [
                SendError::NotSent("closed".to_owned()),
                reset(),
                SendError::Http(too_long),
                SendError::Http(StatusCode::PAYLOAD_TOO_LARGE),
                SendError::TooLarge(1),
                SendError::NoRoom,
            ] {
                classify_error(&upstream, error, &Holder::Own);
                assert!(!upstream.circuit_open());
            }
        }
        let Outcome::Failed(error) =
            classify_error(&upstream, SendError::Http(too_long), &Holder::Own)
        else {
            panic!("the next worker would refuse it too");
        };
        assert_eq!(error.kind(), Kind::Invalid);
        assert!(matches!(
            classify_error(&upstream, reset(), &Holder::Own),
            Outcome::Retryable(RetryableFailure { lost: true, .. })
        ));
        let broken = || SendError::Broken("reset".to_owned());
        tokio::time::advance(Duration::from_secs(1)).await;
        for _ in 0..100 {
            classify_error(&upstream, broken(), &Holder::Own);
        }
        assert!(!upstream.circuit_open(), "one connection broke");
        for _ in 0..4 {
            tokio::time::advance(Duration::from_secs(1)).await;
            classify_error(&upstream, broken(), &Holder::Own);
        }
        assert!(upstream.circuit_open(), "a broken connection is evidence");
    }
}
