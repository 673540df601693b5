//! Conversations that the model of a provider continues: exchanges without a
//! message of gRPC, whole or as a stream.

mod pass_through;

pub use pass_through::{Passed, PassingThrough};

use std::sync::Arc;

use futures::StreamExt;
use http::HeaderValue;
use protocol::{Error, Kind, Task};
use providers::{
    ChatDelta, ChatRequest, ChatResponse, ChatStream, Provider, ProviderUsage, UsageMeter,
};
use tokio::time::Instant;
use tonic::Status;

use super::{Attempt, Exchange, PendingCharge, Reservations, Stack};
use crate::limit::Reservation;
use crate::policy::Caller;
use crate::request::{QuotaUnit, Usage};
use crate::route::{Plan, Route};

/// A conversation whose continuation is returned whole.
#[derive(Debug, Clone, Copy)]
pub struct Chat<'a> {
    /// The caller.
    pub caller: &'a Caller,
    /// The conversation.
    pub request: &'a ChatRequest,
    /// When the caller stops waiting.
    pub deadline: Instant,
}

/// A conversation whose continuation is returned part by part. Its deadline is
/// that of the last part.
#[derive(Debug, Clone, Copy)]
pub struct ChatStreaming<'a>(pub Chat<'a>);

/// The output of a model.
#[derive(Debug)]
pub struct Generated<T> {
    /// The text, or the stream of its parts.
    pub content: T,
    /// The model that generated it.
    pub model: String,
    /// The fallback header, when it is not the first model of its chain.
    pub fallback: Option<HeaderValue>,
    provider: Arc<Provider>,
    /// Of a stream: what has come of it so far.
    usage: UsageMeter,
}

impl Stack {
    /// The provider that continues conversations for a plan, if one does: the
    /// only model, or the first of its chain that a provider has.
    pub fn generator(&self, plan: &Plan) -> Option<Arc<Provider>> {
        let route = match plan {
            Plan::One(route) => route.clone(),
            Plan::Chain(chain) => {
                let routes = chain.models.iter();
                let mut routes = routes.filter_map(|name| self.0.routes.member(name).ok());
                routes.find(|route| route.provider().is_some())?
            }
        };
        generator(&route).ok()
    }
}

/// The provider of a model that continues conversations.
fn generator(route: &Route) -> Result<Arc<Provider>, Error> {
    let generation = Task::Generation;
    let provider = route.provider().filter(|p| p.task() == generation);
    provider.cloned().ok_or_else(|| {
        let (name, task) = (route.name(), route.task());
        let message = format!("model '{name}' is for the task '{task}', not '{generation}'");
        Error::new(Kind::Unsupported, message)
    })
}

impl Exchange for Chat<'_> {
    type Output = Generated<ChatResponse>;

    fn caller(&self) -> &Caller {
        self.caller
    }

    fn deadline(&self) -> Instant {
        self.deadline
    }

    fn rows(&self) -> u64 {
        1
    }

    fn unit(&self) -> QuotaUnit {
        QuotaUnit::Request
    }

    async fn attempt(&self, stack: &Stack, attempt: Attempt<'_>) -> Result<Self::Output, Status> {
        let provider = generator(attempt.route)?;
        stack.0.limit.sent(self.caller);
        let pending = PendingCharge::new(&stack.0.limit, self.caller, &provider);
        let context = pending.context(attempt.deadline);
        let content = provider.chat(self.request, context).await?;
        pending.settle();
        Ok(Generated::new(content, provider, attempt))
    }

    fn accept(&self, output: Self::Output, _: &Reservation) -> Result<Self::Output, Status> {
        Ok(output)
    }

    fn charge(&self, output: Self::Output, reservations: Reservations) -> Self::Output {
        let mut meter = Meter::new(reservations, &output, self.caller);
        meter.charge(output.content.usage.into());
        output
    }
}

impl Exchange for ChatStreaming<'_> {
    type Output = Generated<ChatStream>;

    fn caller(&self) -> &Caller {
        self.0.caller
    }

    fn deadline(&self) -> Instant {
        self.0.deadline
    }

    fn rows(&self) -> u64 {
        self.0.rows()
    }

    fn unit(&self) -> QuotaUnit {
        self.0.unit()
    }

    async fn attempt(&self, stack: &Stack, attempt: Attempt<'_>) -> Result<Self::Output, Status> {
        let chat = &self.0;
        let provider = generator(attempt.route)?;
        stack.0.limit.sent(chat.caller);
        let pending = PendingCharge::new(&stack.0.limit, chat.caller, &provider);
        // The deadline of the attempt is that of the first part, until which
        // another model of a chain may respond: the others may take as long as
        // the caller waits.
        let context = pending.context(attempt.deadline);
        let parts = provider.chat_stream(chat.request, context, chat.deadline);
        let content = parts.await?;
        let usage = pending.usage().clone();
        pending.settle();
        let mut generated = Generated::new(content, provider, attempt);
        generated.usage = usage;
        Ok(generated)
    }

    fn accept(&self, output: Self::Output, _: &Reservation) -> Result<Self::Output, Status> {
        Ok(output)
    }

    /// The stream charges when it ends, or is dropped.
    fn charge(&self, mut output: Self::Output, reservations: Reservations) -> Self::Output {
        let mut meter = Meter::new(reservations, &output, self.0.caller);
        let metered = output.content.map(move |part| {
            meter.observe(&part);
            part
        });
        output.content = metered.boxed();
        output
    }
}

impl<T> Generated<T> {
    fn new(content: T, provider: Arc<Provider>, attempt: Attempt<'_>) -> Self {
        let model = provider.name.clone();
        Self {
            content,
            fallback: attempt.fallback.and_then(|chain| chain.header(&model)),
            model,
            provider,
            usage: UsageMeter::default(),
        }
    }
}

/// Charges a conversation once. A caller who leaves is charged for the text that
/// has come until then, whether it took it or not.
struct Meter {
    reservations: Reservations,
    charged: bool,
    provider: Arc<Provider>,
    tenant: String,
    usage: UsageMeter,
}

impl Meter {
    fn new<T>(reservations: Reservations, output: &Generated<T>, caller: &Caller) -> Self {
        Self {
            reservations,
            charged: false,
            provider: output.provider.clone(),
            tenant: caller.tenant.name.clone(),
            usage: output.usage.clone(),
        }
    }

    fn observe(&mut self, part: &Result<ChatDelta, Error>) {
        if let Ok(delta) = part
            && let Some(usage) = delta.usage
        {
            self.charge(usage.into());
        }
    }

    fn charge(&mut self, usage: ProviderUsage) {
        if std::mem::replace(&mut self.charged, true) {
            return;
        }
        let usage = Usage {
            tokens: usage.tokens(),
            cost: self.provider.charge(&self.tenant, usage),
        };
        for reservation in self.reservations.iter_mut().filter_map(Option::take) {
            reservation.charge(usage);
        }
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.charge(self.usage.total());
    }
}
