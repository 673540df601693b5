//! Fallback chains: the models of a chain are tried in turn, until one responds.

use std::time::Duration;

use http::{HeaderMap, HeaderValue};
use platform::grpc::code_name;
use protocol::{Error, FALLBACK_KEY, Fault, Kind};
use providers::{Chain, ProviderMetrics};
use tokio::time::{Instant, timeout_at};
use tonic::{Code, Status};

use super::{Attempt, Exchange, Stack};
use crate::limit::{QuotaRequest, Reservation};
use crate::route::no_worker_reachable;

/// A provider reports itself that its deadline has passed: it has this long.
const DEADLINE_GRACE: Duration = Duration::from_millis(5);

impl Stack {
    /// Asks the models of a chain in turn. Returns the first output, and the
    /// reservation of the model that it came from.
    pub(super) async fn fall_back<E: Exchange>(
        &self,
        chain: &Chain,
        exchange: &E,
    ) -> Result<(E::Output, Reservation), Status> {
        let metrics = &self.0.routes.catalogue.metrics;
        let mut attempts = Attempts::new(chain, metrics, exchange.deadline());
        for (position, name) in chain.models.iter().enumerate() {
            let deadline = attempts.deadline_of(position);
            let attempt = async {
                let route = self.0.routes.member(name)?;
                let request = QuotaRequest {
                    model: name,
                    chain: Some(&chain.name),
                    rows: exchange.rows(),
                    unit: exchange.unit(),
                };
                let reservation = self.0.limit.reserve(exchange.caller(), request).await?;
                let attempt = Attempt {
                    route: &route,
                    deadline,
                    fallback: Some(&attempts),
                };
                let output = exchange.attempt(self, attempt).await?;
                Ok((exchange.accept(output, &reservation)?, reservation))
            };
            let passed = |_| Err(Error::deadline_passed().to_status());
            let attempted = timeout_at(deadline + DEADLINE_GRACE, attempt).await;
            match attempted.unwrap_or_else(passed) {
                Ok(accepted) => return Ok(accepted),
                Err(status) => attempts.failed(status)?,
            }
        }
        Err(attempts.into_status())
    }
}

/// The attempts at one chain for one exchange.
#[derive(Debug)]
pub struct Attempts<'c> {
    chain: &'c Chain,
    metrics: &'c ProviderMetrics,
    deadline: Instant,
    /// Why the last model failed.
    failure: Option<Status>,
}

impl<'c> Attempts<'c> {
    fn new(chain: &'c Chain, metrics: &'c ProviderMetrics, deadline: Instant) -> Self {
        Self {
            chain,
            metrics,
            deadline,
            failure: None,
        }
    }

    /// When the model at a position must have responded: each but the last has
    /// half of the time that is left.
    fn deadline_of(&self, position: usize) -> Instant {
        if position + 1 >= self.chain.models.len() {
            return self.deadline;
        }
        let left = self.deadline.saturating_duration_since(Instant::now());
        self.deadline - left / 2
    }

    /// Notes why a model failed; an error when no other would do better.
    fn failed(&mut self, status: Status) -> Result<(), Status> {
        if !another_may_respond(status.code()) {
            return Err(status);
        }
        let reason = code_name(status.code());
        self.metrics.fallback(&self.chain.name, reason);
        self.failure = Some(status);
        Ok(())
    }

    /// The status of a chain whose models have all failed: that of the last.
    fn into_status(self) -> Status {
        let failure = self.failure;
        failure.unwrap_or_else(|| no_worker_reachable().to_status())
    }

    /// The value of the fallback header: the model that responds and why the
    /// one before failed; None for the first model.
    pub fn header(&self, model: &str) -> Option<HeaderValue> {
        let reason = code_name(self.failure.as_ref()?.code());
        HeaderValue::try_from(format!("{model}; {reason}")).ok()
    }

    /// Adds the fallback header to the metadata of a response.
    pub fn mark(&self, model: &str, headers: &mut HeaderMap) {
        if let Some(value) = self.header(model) {
            headers.insert(FALLBACK_KEY, value);
        }
    }
}

/// Whether another model of a chain may respond where one failed with a code: the
/// fault is not the caller's, or it is only about this model and its limits.
pub(super) fn another_may_respond(code: Code) -> bool {
    if code == Code::Ok {
        return false;
    }
    let kind = Kind::from_code(code);
    let of_this_model = matches!(kind, Kind::NotFound | Kind::TooLarge | Kind::Unsupported);
    kind.fault() != Fault::Caller || kind.retryable() || of_this_model
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_model_but_the_last_has_half_of_the_time() {
        let chain = Chain {
            name: "any".to_owned(),
            models: ["a", "b", "c"].map(str::to_owned).to_vec(),
        };
        let metrics = ProviderMetrics::default();
        let deadline = Instant::now() + Duration::from_secs(800);
        // Little time passes meanwhile.
        let about = |end: Instant, seconds: u64| {
            let expected = deadline - Duration::from_secs(seconds);
            end >= expected && end < expected + Duration::from_secs(60)
        };
        let mut attempts = Attempts::new(&chain, &metrics, deadline);
        assert_eq!(attempts.header("a"), None);
        assert!(about(attempts.deadline_of(0), 400));
        attempts.failed(Status::unavailable("no")).unwrap();
        assert_eq!(attempts.header("b").unwrap(), "b; UNAVAILABLE");
        assert!(about(attempts.deadline_of(1), 400));
        assert_eq!(attempts.deadline_of(2), deadline);
        let wrong = attempts.failed(Status::invalid_argument("text"));
        assert_eq!(wrong.unwrap_err().code(), Code::InvalidArgument);
    }

    #[test]
    fn a_request_that_fails_everywhere_ends_the_chain() {
        let ends = [
            Code::Ok,
            Code::Cancelled,
            Code::InvalidArgument,
            Code::PermissionDenied,
            Code::FailedPrecondition,
            Code::OutOfRange,
            Code::Unauthenticated,
        ];
        for number in 0..=16 {
            let code = Code::from_i32(number);
            let goes_on = another_may_respond(code);
            assert_eq!(goes_on, !ends.contains(&code), "{code:?}");
        }
    }
}
