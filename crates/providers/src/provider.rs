//! One model of an outside service: its tasks, on top of the HTTP client.

mod client;
mod pass_through;
mod stream;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use platform::circuit_breaker::CircuitBreaker;
use platform::grpc::MessageLimits;
use platform::pot::{Held, Pot, PotFull};
use platform::retry_budget::RetryBudgets;
use platform::tasks::OwnedTask;
use protocol::{Error, ModelName, ModelVersion, Task};
use tokio::time::Instant;

use crate::chat::{ChatChoice, ChatRequest, ChatResponse, ChatStream, estimate_tokens};
use crate::credential::Credential;
use crate::dialect::HttpRequest;
use crate::embedding::{EmbeddingOptions, EmbeddingRequest, Embeddings, normalize};
use crate::error::ProviderError;
use crate::metrics::ProviderMetrics;
use crate::reported::{TokenUsage, reported_usage};
use crate::rerank::{RerankRequest, RerankScores};
use crate::settings::{InvalidSetting, ModelSettings};
use crate::usage::{CallContext, ProviderUsage};

/// The only version that a provider's model has.
pub const MODEL_VERSION: &str = "1";
/// Tokens of each caller's retry budget for a model.
const RETRY_TOKENS: u32 = 20;

/// One model of an outside service.
pub struct Provider {
    /// The name that callers use.
    pub name: String,
    /// The digest in the cache keys of its responses; none when they are not cached.
    pub digest: Option<String>,
    settings: ModelSettings,
    base_url: reqwest::Url,
    client: reqwest::Client,
    credential: Credential,
    /// The calls that may be in flight, with a share for each tenant.
    permits: Pot,
    breaker: CircuitBreaker,
    retry_budgets: RetryBudgets,
    limits: MessageLimits,
    metrics: ProviderMetrics,
}

impl fmt::Debug for Provider {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Provider({})", self.name)
    }
}

/// One of the calls that a provider may have in flight, until it is dropped.
#[derive(Debug)]
struct Permit(#[allow(dead_code, reason = "dropping it returns the permit")] Held);

impl Provider {
    pub(crate) fn new(
        name: &str,
        settings: ModelSettings,
        limits: &MessageLimits,
        metrics: &ProviderMetrics,
    ) -> Result<Self, InvalidSetting> {
        Ok(Self {
            name: name.to_owned(),
            digest: settings.deterministic.then(|| settings.digest()),
            base_url: settings.url()?,
            client: client::build(&settings)?,
            credential: Credential::read(&settings)?,
            permits: Pot::new(settings.concurrency_max),
            breaker: CircuitBreaker::default(),
            retry_budgets: RetryBudgets::new(RETRY_TOKENS),
            limits: limits.clone(),
            metrics: metrics.clone(),
            settings,
        })
    }

    /// The model's settings in the providers file.
    pub fn settings(&self) -> &ModelSettings {
        &self.settings
    }

    /// The model's task.
    pub fn task(&self) -> Task {
        self.settings.task
    }

    /// Whether calls go to the service: its circuit breaker admits them.
    pub fn ready(&self) -> bool {
        !self.breaker.is_ejected()
    }

    /// Checks the version of a request: there is only one.
    pub fn check_version(&self, version: &str) -> Result<(), Error> {
        check_version(&self.name, version)
    }

    /// Reloads the API key when its file changes, until the task is dropped.
    pub(crate) fn follow(&self) -> Option<OwnedTask> {
        self.credential.follow()
    }

    /// Counts the cost of a tenant's call, and returns it, in the currency of the
    /// prices.
    pub fn charge(&self, tenant: &str, usage: ProviderUsage) -> f64 {
        let cost = self.settings.price.cost(usage.bounded());
        if cost > 0.0 {
            self.metrics.charged(tenant, &self.name, cost);
        }
        cost
    }

    /// Continues a conversation.
    pub async fn chat(
        self: &Arc<Self>,
        request: &ChatRequest,
        context: CallContext<'_>,
    ) -> Result<ChatResponse, Error> {
        self.must_generate()?;
        request.check()?;
        self.generate(request, context)
            .await
            .map_err(|error| error.to_error(&self.name, "messages"))
    }

    /// Continues a conversation as a stream. Its first text must have come by the
    /// deadline of `context`: until then, whatever fails is an error of this call.
    /// Then it may go on until `deadline`, and the response is this model's: an
    /// error is the last item.
    pub async fn chat_stream(
        self: &Arc<Self>,
        request: &ChatRequest,
        context: CallContext<'_>,
        deadline: Instant,
    ) -> Result<ChatStream, Error> {
        self.must_generate()?;
        request.check()?;
        let started = Instant::now();
        let failed = |error: ProviderError| error.to_error(&self.name, "messages");
        let permit = self.permit(&context).map_err(failed)?;
        let outgoing = self.chat_request(request, true).map_err(failed)?;
        let prompt_tokens = request.estimated_tokens();
        context.usage.begin(ProviderUsage::of_input(prompt_tokens));
        let opened = self.open(&outgoing, self.within_timeout(context)).await;
        let opened = opened.inspect_err(|error| context.usage.failed(error));
        let open = stream::OpenStream {
            provider: self.clone(),
            response: opened.map_err(failed)?,
            _permit: permit,
            started,
            begins_by: client::report_by(context.deadline),
            deadline,
            prompt_tokens,
            usage: context.usage.clone(),
            caller: context.holder.clone(),
        };
        stream::begin(open).await
    }

    fn must_generate(&self) -> Result<(), Error> {
        if self.settings.task == Task::Generation {
            return Ok(());
        }
        let (name, task) = (&self.name, self.settings.task);
        Err(Error::wrong_task("model", name, task, Task::Generation))
    }

    fn chat_request(
        &self,
        request: &ChatRequest,
        stream: bool,
    ) -> Result<HttpRequest, ProviderError> {
        let settings = &self.settings;
        settings
            .kind
            .chat_request(&settings.options(), request, stream)
    }

    /// Continues a conversation that has been checked.
    pub async fn generate(
        self: &Arc<Self>,
        request: &ChatRequest,
        context: CallContext<'_>,
    ) -> Result<ChatResponse, ProviderError> {
        let _permit = self.permit(&context)?;
        let outgoing = self.chat_request(request, false)?;
        let dialect = self.settings.kind;
        let prompt_tokens = request.estimated_tokens();
        let max_tokens = request.max_tokens.unwrap_or(self.settings.max_tokens);
        let output_tokens = u64::from(max_tokens) * u64::from(request.choices());
        // A service computes to the end, whether anybody waits or not.
        let estimate = ProviderUsage {
            output_tokens,
            ..ProviderUsage::of_input(prompt_tokens)
        };
        let context = self.within_timeout(context);
        // What a body used that is no response, such as a refusal.
        let refused = Arc::new(Mutex::new(None));
        let refusal = refused.clone();
        let parse = move |body: &[u8]| {
            let parsed = dialect.parse_chat(body);
            let used = parsed.as_ref().err().and_then(|error| {
                let reported = reported_usage(body);
                // An error that the service reports costs what it says.
                if !reported.is_known() && !error.may_be_charged() {
                    return None;
                }
                Some(reported.or_estimate(TokenUsage {
                    prompt_tokens,
                    completion_tokens: (body.len() as u64).div_ceil(4).min(output_tokens),
                }))
            });
            *refusal.lock().unwrap_or_else(PoisonError::into_inner) = used;
            parsed
        };
        let result = self.metered(&outgoing, context, estimate, parse).await;
        let used = refused
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(used) = used {
            context.usage.correct(used.into());
        }
        let response = result?;
        let bytes: usize = response.choices.iter().map(ChatChoice::bytes).sum();
        let usage = response.usage.or_estimate(TokenUsage {
            prompt_tokens,
            completion_tokens: (bytes as u64).div_ceil(4),
        });
        context.usage.succeeded(usage.into());
        Ok(ChatResponse {
            choices: response.choices,
            usage,
        })
    }

    /// Embeds texts.
    pub async fn embed(
        self: &Arc<Self>,
        texts: &[String],
        options: EmbeddingOptions,
        context: CallContext<'_>,
    ) -> Result<Embeddings, ProviderError> {
        let _permit = self.permit(&context)?;
        let (dialect, rows) = (self.settings.kind, texts.len());
        let dimensions = options.dimensions;
        let request = EmbeddingRequest {
            texts,
            dimensions,
            truncate: options.truncate,
        };
        let outgoing = dialect.embedding_request(&self.settings.options(), &request)?;
        let width = self.settings.width.filter(|_| dimensions.is_none());
        let parse = move |body: &[u8]| {
            let embeddings = dialect.parse_embeddings(body, rows)?;
            if width.is_some() && width != embeddings.width() {
                return Err(ProviderError::InvalidResponse(
                    "embeddings of another width",
                ));
            }
            Ok(embeddings)
        };
        let tokens = estimate_tokens(texts.iter().map(String::as_str));
        let estimate = ProviderUsage::of_input(tokens);
        let context = self.within_timeout(context);
        let mut embeddings = self.metered(&outgoing, context, estimate, parse).await?;
        let usage = ProviderUsage::of_input(embeddings.tokens);
        context.usage.succeeded(usage);
        // A service that ignores a field that it does not know is healthy: a
        // caller who requests an unsupported width must not eject it.
        if dimensions.is_some() && dimensions != embeddings.width() {
            return Err(ProviderError::UnsupportedDimensions);
        }
        if options.normalize {
            for vector in &mut embeddings.vectors {
                normalize(vector);
            }
        }
        Ok(embeddings)
    }

    /// Scores pairs of a query and a text. A service scores many texts for one
    /// query: each distinct query costs a call.
    pub async fn rerank(
        self: &Arc<Self>,
        pairs: &[(String, String)],
        context: CallContext<'_>,
    ) -> Result<(Vec<f32>, ProviderUsage), ProviderError> {
        let _permit = self.permit(&context)?;
        let context = self.within_timeout(context);
        let mut queries: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
        for (row, (query, _)) in pairs.iter().enumerate() {
            queries.entry(query).or_default().push(row);
        }
        let mut scores = vec![0.0; pairs.len()];
        let mut total = ProviderUsage::default();
        for (query, rows) in queries {
            let texts = rows.iter().filter_map(|row| pairs.get(*row));
            let texts: Vec<String> = texts.map(|(_, text)| text.clone()).collect();
            let scored = self.rerank_one(query, &texts, context).await?;
            let usage = ProviderUsage {
                searches: scored.searches,
                ..ProviderUsage::of_input(scored.tokens)
            };
            context.usage.succeeded(usage);
            total = total.plus(usage);
            for (row, score) in rows.into_iter().zip(scored.scores) {
                if let Some(own) = scores.get_mut(row) {
                    *own = score;
                }
            }
        }
        Ok((scores, total))
    }

    /// Scores texts for one query.
    async fn rerank_one(
        self: &Arc<Self>,
        query: &str,
        texts: &[String],
        context: CallContext<'_>,
    ) -> Result<RerankScores, ProviderError> {
        let (dialect, count) = (self.settings.kind, texts.len());
        let request = RerankRequest { query, texts };
        let outgoing = dialect.rerank_request(&self.settings.options(), &request)?;
        let all = texts.iter().map(String::as_str).chain([query]);
        let estimate = ProviderUsage {
            searches: 1,
            ..ProviderUsage::of_input(estimate_tokens(all))
        };
        let parse = move |body: &[u8]| dialect.parse_rerank(body, count);
        self.metered(&outgoing, context, estimate, parse).await
    }

    /// Takes one of the calls that may be in flight; an error when all are, or
    /// when a tenant has its share of them and others need theirs: where there are
    /// several tenants, none has more than half.
    fn permit(&self, context: &CallContext<'_>) -> Result<Permit, ProviderError> {
        let permits = &self.permits;
        let has_share =
            context.has_others && permits.held_by(context.holder) >= permits.capacity().div_ceil(2);
        let permit = if has_share {
            Err(PotFull::Share)
        } else {
            permits.take(context.holder, 1)
        };
        permit.map(Permit).map_err(|_| {
            let error = ProviderError::ConcurrencyLimit;
            self.metrics
                .ended(&self.name, error.outcome(), Duration::ZERO);
            error
        })
    }

    /// The same context with the model's own timeout, and early enough to say
    /// whose fault it is that there is no response.
    fn within_timeout<'c>(&self, context: CallContext<'c>) -> CallContext<'c> {
        CallContext {
            deadline: self.ends(context.deadline),
            ..context
        }
    }

    /// Makes a call with an estimated usage. The reader of the response records the
    /// usage that it reports.
    async fn metered<T: Send + 'static>(
        self: &Arc<Self>,
        outgoing: &HttpRequest,
        context: CallContext<'_>,
        estimate: ProviderUsage,
        parse: impl Fn(&[u8]) -> Result<T, ProviderError> + Clone + Send + 'static,
    ) -> Result<T, ProviderError> {
        context.usage.begin(estimate);
        let result = self.exchange(outgoing, context, parse).await;
        result.inspect_err(|error| context.usage.failed(error))
    }
}

/// Checks that a version is empty or the only one there is.
pub(crate) fn check_version(name: &str, version: &str) -> Result<(), Error> {
    match ModelVersion::optional(version, "model_version")? {
        Some(other) if other.to_string() != MODEL_VERSION => {
            let name = ModelName::checked(name, "model_name")?;
            Err(Error::unknown_model(&name, Some(other)))
        }
        _ => Ok(()),
    }
}
