//! Conversations that a provider's model continues: the same way as a message's,
//! without a message.

use std::sync::Arc;

use futures::StreamExt;
use http::HeaderValue;
use protocol::{Error, Kind};
use tokio::time::Instant;
use tonic::Status;

use super::Stack;
use super::chain::Descent;
use super::owed::Owed;
use crate::auth::Caller;
use crate::limit::{Counted, Member, Ticket, Usage};
use crate::route::{Plan, Route};
use crate::service::Wanted;
use crate::upstream::provider::{
    ChatAnswer, ChatDelta, ChatRequest, ChatStream, ChatUsage, Provider, Used,
};

/// A conversation that a caller wants continued.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Conversation<'a> {
    /// The model.
    pub wanted: &'a Wanted,
    /// Who asks.
    pub caller: &'a Caller,
    /// The conversation.
    pub chat: &'a ChatRequest,
    /// When the caller stops waiting.
    pub deadline: Instant,
}

/// What continues a conversation, and whose it is.
#[derive(Debug)]
pub(crate) struct Continued<T> {
    /// The answer.
    pub answer: T,
    /// The model that made it.
    pub model: String,
    /// Why it is not the first model of its chain.
    pub fallback: Option<HeaderValue>,
    provider: Arc<Provider>,
    /// What the model of a chain takes of its own quotas.
    member: Option<Ticket>,
}

impl Stack {
    /// Continues a conversation.
    pub(crate) async fn chat(
        &self,
        asked: Conversation<'_>,
    ) -> Result<Continued<ChatAnswer>, Status> {
        let (plan, ticket) = self.plan(asked).await?;
        let mut said = self
            .ask_generating(&plan, asked, |provider, ends| async move {
                let owed = Owed::new(&self.0.limit, asked.caller, &provider);
                let answer = provider.chat(asked.chat, owed.terms(ends)).await?;
                owed.settle();
                Ok::<_, Error>(answer)
            })
            .await?;
        let meter = Meter::new([Some(ticket), said.member.take()], &said.provider, asked);
        meter.charged(said.answer.usage);
        Ok(said)
    }

    /// Continues a conversation part by part. It is charged when the stream
    /// ends, or is dropped.
    pub(crate) async fn chat_stream(
        &self,
        asked: Conversation<'_>,
    ) -> Result<Continued<ChatStream>, Status> {
        let (plan, ticket) = self.plan(asked).await?;
        let mut said = self
            .ask_generating(&plan, asked, |provider, ends| async move {
                // The half of the time is for the beginning: the rest may take
                // as long as the caller waits.
                let owed = Owed::new(&self.0.limit, asked.caller, &provider);
                let (chat, opens) = (asked.chat, owed.terms(ends));
                let parts = provider.chat_stream(chat, opens, asked.deadline).await?;
                owed.settle();
                Ok::<_, Error>(parts)
            })
            .await?;
        let tickets = [Some(ticket), said.member.take()];
        let mut meter = Meter::new(tickets, &said.provider, asked);
        said.answer = said
            .answer
            .map(move |item| {
                meter.saw(&item);
                item
            })
            .boxed();
        Ok(said)
    }

    /// The provider that continues conversations for a request, if one does:
    /// the only model, or the first of its chain.
    pub(crate) fn generates(&self, wanted: &Wanted, caller: &Caller) -> Option<Arc<Provider>> {
        let route = match self.0.routes.choose(wanted, caller).ok()? {
            Plan::One(route) => route,
            Plan::Chain(chain) => {
                let routes = chain.models.iter();
                let mut routes = routes.filter_map(|name| self.0.routes.member(name).ok());
                routes.find(|route| route.provider().is_some())?
            }
        };
        let provider = route.provider()?;
        (provider.task == "generation").then(|| provider.clone())
    }

    async fn plan(&self, asked: Conversation<'_>) -> Result<(Plan, Ticket), Status> {
        let plan = self.0.routes.choose(asked.wanted, asked.caller)?;
        let ticket = self
            .0
            .limit
            .take(asked.caller, plan.name(), 1, Counted::Request)
            .await?;
        Ok((plan, ticket))
    }

    /// Asks the model, or those of a chain in turn.
    async fn ask_generating<T, F>(
        &self,
        plan: &Plan,
        asked: Conversation<'_>,
        attempt: impl Fn(Arc<Provider>, Instant) -> F,
    ) -> Result<Continued<T>, Status>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let chain = match plan {
            Plan::One(route) => {
                let provider = generating(route)?;
                let answer = attempt(provider.clone(), asked.deadline).await?;
                return Ok(Continued {
                    member: None,
                    answer,
                    model: provider.name.clone(),
                    fallback: None,
                    provider,
                });
            }
            Plan::Chain(chain) => chain,
        };
        let metrics = &self.0.routes.catalogue.metrics;
        let mut descent = Descent::new(chain, metrics, asked.deadline);
        for (place, name) in chain.models.iter().enumerate() {
            let answered = async {
                let route = self.0.routes.member(name)?;
                let provider = generating(&route)?;
                let limit = &self.0.limit;
                let member = Member {
                    chain: &chain.name,
                    model: name,
                };
                let ticket = limit.take_member(asked.caller, member, 1, Counted::Request);
                let ticket = ticket.await?;
                let answer = attempt(provider.clone(), descent.ends(place)).await?;
                Ok::<_, Error>((answer, provider, ticket))
            };
            match answered.await {
                Ok((answer, provider, ticket)) => {
                    return Ok(Continued {
                        member: Some(ticket),
                        answer,
                        model: name.clone(),
                        fallback: descent.said(name),
                        provider,
                    });
                }
                Err(error) => descent.fell(error.to_status())?,
            }
        }
        Err(descent.status())
    }
}

/// The provider of a model that continues conversations.
fn generating(route: &Route) -> Result<Arc<Provider>, Error> {
    let provider = route.provider().filter(|p| p.task == "generation");
    provider.cloned().ok_or_else(|| {
        let (name, task) = (route.name(), route.task());
        let message = format!("model '{name}' does {task}, not generation");
        Error::new(Kind::Unsupported, message)
    })
}

/// Charges a conversation once. A caller who leaves is charged for what came
/// until then, as far as that can be told.
struct Meter {
    /// The request's, and that of the model of a chain.
    tickets: [Option<Ticket>; 2],
    charged: bool,
    provider: Arc<Provider>,
    tenant: String,
    prompt_tokens: u64,
    parts: u64,
}

impl Meter {
    fn new(
        tickets: [Option<Ticket>; 2],
        provider: &Arc<Provider>,
        asked: Conversation<'_>,
    ) -> Self {
        Self {
            tickets,
            charged: false,
            provider: provider.clone(),
            tenant: asked.caller.tenant.name.clone(),
            prompt_tokens: asked.chat.tokens_guessed(),
            parts: 0,
        }
    }

    fn saw(&mut self, item: &Result<ChatDelta, Error>) {
        if let Ok(delta) = item {
            self.parts += u64::from(!delta.text.is_empty());
            if let Some((_, usage)) = delta.end {
                self.charge(usage);
            }
        }
    }

    fn charged(mut self, usage: ChatUsage) {
        self.charge(usage);
    }

    fn charge(&mut self, usage: ChatUsage) {
        if std::mem::replace(&mut self.charged, true) {
            return;
        }
        let usage = Usage {
            tokens: usage.prompt_tokens.saturating_add(usage.completion_tokens),
            cost: self.provider.spend(&self.tenant, Used::from(usage)),
        };
        for ticket in self.tickets.iter_mut().filter_map(Option::take) {
            ticket.charge(usage);
        }
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.charge(ChatUsage {
            prompt_tokens: self.prompt_tokens,
            completion_tokens: self.parts,
        });
    }
}
