//! Models that answer for one another: each is asked in turn, until one
//! answers.

use std::time::Duration;

use http::HeaderValue;
use protocol::{Error, FALLBACK_KEY};
use tokio::time::{Instant, timeout_at};
use tonic::{Code, Status};

use super::Stack;
use crate::limit::Member;
use crate::route::nobody;
use crate::service::Request;
use crate::upstream::Answer;
use crate::upstream::provider::{Chain, ProviderMetrics};

/// Where a call stands in its chain.
#[derive(Debug)]
pub(super) struct Descent<'c> {
    chain: &'c Chain,
    metrics: &'c ProviderMetrics,
    deadline: Instant,
    /// Why the model before did not answer.
    reason: Option<Status>,
}

impl<'c> Descent<'c> {
    pub(super) fn new(chain: &'c Chain, metrics: &'c ProviderMetrics, deadline: Instant) -> Self {
        Self {
            chain,
            metrics,
            deadline,
            reason: None,
        }
    }

    /// When a model must have answered: one that hangs leaves the next half of
    /// what there is.
    pub(super) fn ends(&self, place: usize) -> Instant {
        if place + 1 >= self.chain.models.len() {
            return self.deadline;
        }
        let left = self.deadline.saturating_duration_since(Instant::now());
        self.deadline - left / 2
    }

    /// A model did not answer; an error when no other would do better.
    pub(super) fn fell(&mut self, status: Status) -> Result<(), Status> {
        if !falls_back(status.code()) {
            return Err(status);
        }
        let reason = platform::grpc::code_name(status.code());
        self.metrics.fell_back(&self.chain.name, reason);
        self.reason = Some(status);
        Ok(())
    }

    /// That another model than the first answers, and why.
    pub(super) fn said(&self, name: &str) -> Option<HeaderValue> {
        let reason = platform::grpc::code_name(self.reason.as_ref()?.code());
        HeaderValue::try_from(format!("{name}; {reason}")).ok()
    }

    /// Nobody answered: what the last one said.
    pub(super) fn status(self) -> Status {
        self.reason.unwrap_or_else(|| nobody().to_status())
    }
}

impl Stack {
    /// Asks the models of a chain in turn, until one answers.
    pub(super) async fn fall_back(
        &self,
        chain: &Chain,
        request: &Request,
    ) -> Result<Answer, Status> {
        let metrics = &self.0.routes.catalogue.metrics;
        let mut descent = Descent::new(chain, metrics, request.deadline);
        for (place, name) in chain.models.iter().enumerate() {
            let mut request = request.renamed(name);
            request.deadline = descent.ends(place);
            let answered = async {
                let route = self.0.routes.member(name)?;
                let (caller, items) = (&request.caller, request.items());
                let limit = &self.0.limit;
                let member = Member {
                    chain: &chain.name,
                    model: name,
                };
                let counted = request.counted;
                let ticket = limit.take_member(caller, member, items, counted).await?;
                let answer = self.0.cache.answer(self, &route, &request).await?;
                ticket.charge(answer.usage());
                Ok(answer)
            };
            // A provider says itself that it is late, a little earlier.
            let answered = timeout_at(request.deadline + WORD, answered).await;
            let late = |_| Err(Error::deadline_passed().to_status());
            let status = match answered.unwrap_or_else(late) {
                Ok(answer) if !falls_back(answer.code()) => {
                    return Ok(fell_back(answer, descent.said(name)));
                }
                Ok(answer) => answer.into_status(),
                Err(status) => status,
            };
            descent.fell(status)?;
        }
        Err(descent.status())
    }
}

/// What a worker has to say that a deadline has passed.
const WORD: Duration = Duration::from_millis(5);

/// Says in an answer that it is not the first model's, and why.
fn fell_back(mut answer: Answer, said: Option<HeaderValue>) -> Answer {
    if let Some(said) = said {
        answer.metadata_mut().insert(FALLBACK_KEY, said);
    }
    answer
}

/// Whether another model may do better: it is about the model or its servers,
/// not about the request.
fn falls_back(code: Code) -> bool {
    matches!(
        code,
        Code::Unavailable
            | Code::DeadlineExceeded
            | Code::NotFound
            | Code::ResourceExhausted
            | Code::Internal
            | Code::Unknown
            | Code::DataLoss
            | Code::Unimplemented
    )
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
            let wanted = deadline - Duration::from_secs(seconds);
            end >= wanted && end < wanted + Duration::from_secs(60)
        };
        let mut descent = Descent::new(&chain, &metrics, deadline);
        assert_eq!(descent.said("a"), None);
        assert!(about(descent.ends(0), 400));
        descent.fell(Status::unavailable("no")).unwrap();
        assert_eq!(descent.said("b").unwrap(), "b; UNAVAILABLE");
        assert!(about(descent.ends(1), 400));
        assert_eq!(descent.ends(2), deadline);
        let wrong = descent.fell(Status::invalid_argument("text"));
        assert_eq!(wrong.unwrap_err().code(), Code::InvalidArgument);
    }
}
