//! Which worker answers, and which next when it does not.
//!
//! The lesser load of two random choices (Mitzenmacher, "The power of two
//! choices in randomized load balancing", 2001). Calls that fail go to another
//! worker within a budget, after gRFC A6: a failure costs one token, a success
//! gives a tenth back, and nothing is sent again while half of them are gone.
//! Calls that the worker never began are sent again for nothing.

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
use crate::upstream::{Attempt, Response, SendError, Upstream};

/// Sends of one call, the first included.
const ATTEMPTS_MAX: usize = 5;
/// Before a worker is asked that has just failed the same call.
const PAUSE: Duration = Duration::from_millis(20);
const NOT_FOUND: &str = "not_found";

/// The choice of workers.
#[derive(Debug)]
pub struct Balance {
    budget: RetryBudget,
    limits: MessageLimits,
    metrics: BalanceMetrics,
}

/// What an attempt came to.
enum Outcome {
    /// The caller gets this.
    Answered(Response),
    /// The caller gets this: no other worker would do better.
    Failed(Error),
    /// Another worker may do better.
    Elsewhere(Failure),
}

struct Failure {
    last: Result<Response, Error>,
    reason: &'static str,
    /// Whether sending again costs a token.
    costs: bool,
    pause: Option<Duration>,
}

impl Balance {
    /// A budget of so many tokens, and what answers are held to.
    pub fn new(retry_tokens: u32, limits: MessageLimits, metrics: BalanceMetrics) -> Self {
        Self {
            budget: RetryBudget::new(retry_tokens),
            limits,
            metrics,
        }
    }

    /// Sends a call until a worker answers, the deadline or the budget says
    /// no, or there is no_worker_reachable left. Every call that comes here computes and
    /// changes nothing: it may be sent twice.
    pub async fn send(&self, route: &Route, request: &Request) -> Result<Response, Error> {
        // By address: a worker may be asked again only when no other is left.
        let mut tried: Vec<usize> = Vec::new();
        let mut last = Err(no_worker_reachable());
        for number in 0..ATTEMPTS_MAX {
            let Some((upstream, again)) = pick(route, &tried) else {
                break;
            };
            if again && number > 0 {
                tokio::time::sleep(PAUSE * (1 << number.min(4))).await;
            }
            tried.push(Arc::as_ptr(upstream).addr());
            let attempt = Attempt {
                number,
                chosen: route.chosen.as_ref(),
                limits: Some(&self.limits),
            };
            let sent = upstream.send(request, attempt).await;
            let failure = match self.judge(upstream, sent) {
                Outcome::Answered(answer) => return Ok(answer),
                Outcome::Failed(error) => return Err(error),
                Outcome::Elsewhere(failure) => failure,
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

    fn judge(&self, upstream: &Upstream, sent: Result<Response, SendError>) -> Outcome {
        let answer = match sent {
            Ok(answer) => answer,
            Err(unanswered) => return self.unanswered(upstream, unanswered),
        };
        if matches!(
            answer.code(),
            Code::Internal | Code::Unknown | Code::DataLoss
        ) {
            upstream.failed();
            return Outcome::Answered(answer);
        }
        // Any other answer is one of a worker that is well.
        upstream.succeeded();
        let reason = match answer.code() {
            // Full: another worker may have room.
            Code::Unavailable => "unavailable",
            // The model left this worker a moment ago; once is enough to see.
            Code::NotFound => NOT_FOUND,
            _ => {
                self.budget.succeeded();
                return Outcome::Answered(answer);
            }
        };
        let pushback = answer
            .status_metadata("grpc-retry-pushback-ms")
            .map(str::parse::<u64>);
        match pushback {
            // A worker that says so, or says nothing readable, wants no more.
            Some(Err(_)) => Outcome::Answered(answer),
            pushback => Outcome::Elsewhere(Failure {
                last: Ok(answer),
                reason,
                costs: reason != NOT_FOUND,
                pause: pushback.and_then(Result::ok).map(Duration::from_millis),
            }),
        }
    }

    fn unanswered(&self, upstream: &Upstream, unanswered: SendError) -> Outcome {
        let message = format!("worker {}: {unanswered}", upstream.target);
        let (reason, costs) = match unanswered {
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
        // A connection that ended in order is no fault of the worker's.
        if costs {
            upstream.failed();
        }
        Outcome::Elsewhere(Failure {
            last: Err(Error::new(Kind::NotReady, message)),
            reason,
            costs,
            pause: None,
        })
    }
}

/// A worker that has not been tried, the less loaded of two; else one that has
/// been, which is said in the second place. Workers that are left alone are
/// taken only when there is no other.
fn pick<'r>(route: &'r Route, tried: &[usize]) -> Option<(&'r Arc<Upstream>, bool)> {
    let reachable = || route.upstreams().iter().filter(|u| u.reachable());
    let untried = |upstream: &&Arc<Upstream>| !tried.contains(&Arc::as_ptr(upstream).addr());
    let well = lesser(route.name(), || {
        reachable()
            .filter(untried)
            .filter(|upstream| !upstream.ejected())
    });
    if let Some(upstream) = well {
        return Some((upstream, false));
    }
    let unwell = lesser(route.name(), || reachable().filter(untried));
    if let Some(upstream) = unwell {
        return Some((upstream, false));
    }
    lesser(route.name(), reachable).map(|upstream| (upstream, true))
}

fn lesser<'r, I>(model: &str, candidates: impl Fn() -> I) -> Option<&'r Arc<Upstream>>
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
