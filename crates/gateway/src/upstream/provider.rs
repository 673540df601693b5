//! Outside services that answer as models.
//!
//! The shapes of the services are in `openai`, `anthropic` and `cohere`; what
//! callers ask, in `oip`, `tei` and `chat`. Between them are `client`, which
//! sends, and the few functions here.

mod anthropic;
mod catalogue;
mod chat;
mod client;
mod cohere;
mod generation;
mod key;
mod metrics;
mod oip;
mod openai;
mod sse;
mod stream;
mod tab;
mod tei;
mod trouble;

pub use catalogue::{Task, Used};
#[cfg(test)]
pub use chat::Finish;
pub use chat::{ChatAnswer, ChatDelta, ChatMessage, ChatRequest, ChatStream, ChatUsage, Role};
pub use generation::{conversation, last_part, part};
pub use metrics::ProviderMetrics;
pub use tab::{Tab, Terms};

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use platform::circuit_breaker::CircuitBreaker;
use platform::grpc::MessageLimits;
use platform::retry_budget::RetryBudget;
use platform::tasks::{Owned, owned};
use protocol::{Error, ModelName, ModelVersion};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tonic::Status;

use super::Response;
use crate::request::Request;
use catalogue::{File, Model, Shape};
use key::Key;
use openai::Embedded;
use trouble::Trouble;

/// The one version that a provider's model has.
pub const VERSION: &str = "1";
/// Failures in a row, less a half, that a provider's calls may be sent again.
const RETRY_TOKENS: u32 = 20;
/// How often the files with keys are looked at.
const LOOK: Duration = Duration::from_secs(1);

/// Which outside services there are.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct ProviderSettings {
    /// Models of outside services, chains of models to fall back along, and
    /// prices, in TOML
    #[arg(long, value_name = "FILE")]
    pub providers: Option<PathBuf>,
}

/// Why a catalogue cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("the file of providers: {0}")]
pub struct CatalogueError(pub String);

/// The models of outside services, and the chains.
#[derive(Debug, Default)]
pub struct Catalogue {
    /// Models by the names that callers know them by.
    pub providers: BTreeMap<String, Arc<Provider>>,
    /// Chains by their names.
    pub chains: BTreeMap<String, Arc<Chain>>,
    /// What is counted of them.
    pub metrics: ProviderMetrics,
}

/// Models that answer for one another, the preferred first.
#[derive(Debug)]
pub struct Chain {
    /// The name that callers know it by.
    pub name: String,
    /// Models of workers or of providers.
    pub models: Vec<String>,
}

/// One model of an outside service.
pub struct Provider {
    /// The name that callers know it by.
    pub name: String,
    /// What it does, in the words of a worker's report.
    pub task: String,
    /// What stands for it when its answers may be kept.
    pub digest: Option<String>,
    model: Model,
    base: reqwest::Url,
    client: reqwest::Client,
    key: Key,
    places: Arc<Semaphore>,
    breaker: CircuitBreaker,
    budget: RetryBudget,
    limits: MessageLimits,
    metrics: ProviderMetrics,
}

impl fmt::Debug for Provider {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Provider({})", self.name)
    }
}

/// A place among a provider's calls under way, until it is dropped.
#[derive(Debug)]
struct Place(#[allow(dead_code, reason = "it is given back when dropped")] OwnedSemaphorePermit);

impl Catalogue {
    /// Reads the file, if one is named, and the keys. `limits` is what answers
    /// are held to.
    pub fn new(
        settings: &ProviderSettings,
        limits: &MessageLimits,
    ) -> Result<Self, CatalogueError> {
        let Some(path) = &settings.providers else {
            return Ok(Self::default());
        };
        let text = std::fs::read_to_string(path)
            .map_err(|error| CatalogueError(format!("it cannot be read: {error}")))?;
        let file = File::read(&text)?;
        let mut catalogue = Self::default();
        for (name, model) in file.models {
            let provider = Provider::new(&name, model, limits, &catalogue.metrics)
                .map_err(|(field, why)| CatalogueError(format!("models.{name}.{field}: {why}")))?;
            catalogue.metrics.known(&name);
            catalogue.providers.insert(name, Arc::new(provider));
        }
        for (name, chain) in file.chains {
            let models = chain.models;
            let chain = Chain {
                name: name.clone(),
                models,
            };
            catalogue.chains.insert(name, Arc::new(chain));
        }
        Ok(catalogue)
    }

    /// Whether a name is a provider's model or a chain.
    pub fn has(&self, name: &str) -> bool {
        self.providers.contains_key(name) || self.chains.contains_key(name)
    }

    /// Every name, and what it is.
    pub fn names(&self) -> impl Iterator<Item = (&str, &'static str)> {
        let providers = self
            .providers
            .keys()
            .map(|name| (name.as_str(), "provider"));
        providers.chain(self.chains.keys().map(|name| (name.as_str(), "chain")))
    }

    /// An error when there is nothing of a model's to load or unload.
    pub fn must_be_workers(&self, name: &str) -> Result<(), Error> {
        if !self.has(name) {
            return Ok(());
        }
        let reason = "the model is an outside provider's: it is neither loaded nor unloaded";
        Err(Error::invalid("model_name", reason))
    }

    /// Reads the keys again when their files change, until the tasks are
    /// dropped.
    pub fn follow(&self) -> Vec<Owned> {
        let providers: Vec<Arc<Provider>> = self.providers.values().cloned().collect();
        if providers.is_empty() {
            return Vec::new();
        }
        vec![owned(async move {
            loop {
                tokio::time::sleep(LOOK).await;
                for provider in &providers {
                    if provider.key.read_again() {
                        tracing::info!(model = %provider.name, "a provider's key was read again");
                    }
                }
            }
        })]
    }
}

impl Chain {
    /// An error unless the chain has a version.
    pub fn must_have(&self, version: &str) -> Result<(), Error> {
        must_be_first(&self.name, version)
    }
}

/// Every name of the catalogue has one version.
fn must_be_first(name: &str, version: &str) -> Result<(), Error> {
    match ModelVersion::optional(version, "model_version")? {
        Some(other) if other.to_string() != VERSION => {
            let name = ModelName::checked(name, "model_name")?;
            Err(Error::unknown_model(&name, Some(other)))
        }
        _ => Ok(()),
    }
}

impl Provider {
    fn new(
        name: &str,
        model: Model,
        limits: &MessageLimits,
        metrics: &ProviderMetrics,
    ) -> Result<Self, (&'static str, String)> {
        Ok(Self {
            name: name.to_owned(),
            task: model.task.name().to_owned(),
            digest: model.deterministic.then(|| model.digest()),
            base: model.url().map_err(|reason| ("base_url", reason))?,
            client: client::build(&model)?,
            key: Key::of(&model)?,
            places: Arc::new(Semaphore::new(model.concurrency_max)),
            breaker: CircuitBreaker::default(),
            budget: RetryBudget::new(RETRY_TOKENS),
            limits: limits.clone(),
            metrics: metrics.clone(),
            model,
        })
    }

    /// Whether it is called: it has not just failed repeatedly.
    pub fn ready(&self) -> bool {
        !self.breaker.is_ejected()
    }

    /// An error unless the model has a version.
    pub fn must_have(&self, version: &str) -> Result<(), Error> {
        must_be_first(&self.name, version)
    }

    /// Answers one message of the Open Inference Protocol or of `tei.v1`. An
    /// answer has its cost; what else the call took is on the tab.
    pub async fn answer(
        self: &Arc<Self>,
        request: &Request,
        tab: &Tab,
    ) -> Result<Response, Status> {
        let path = request.method.path();
        let (answer, used) = match path.strip_prefix("/inference.GRPCInferenceService/") {
            Some(method) => oip::answer(self, method, request, tab).await?,
            None => {
                let method = path.strip_prefix("/tei.v1.").unwrap_or(path);
                tei::answer(self, method, request, tab).await?
            }
        };
        let cost = self.spend(&request.caller.tenant.name, used);
        Ok(answer.costing(cost))
    }

    /// Continues a conversation.
    pub async fn chat(
        self: &Arc<Self>,
        request: &ChatRequest,
        terms: Terms<'_>,
    ) -> Result<ChatAnswer, Error> {
        self.must_generate()?;
        request.check()?;
        self.generate(request, terms)
            .await
            .map_err(|trouble| trouble.to_error(&self.name, "messages"))
    }

    /// Continues a conversation part by part. Parts must come by the deadline
    /// of `opens`, and may then come until `deadline`. Once they come, the
    /// answer is this model's: what fails then is the last item.
    pub async fn chat_stream(
        self: &Arc<Self>,
        request: &ChatRequest,
        opens: Terms<'_>,
        deadline: Instant,
    ) -> Result<ChatStream, Error> {
        self.must_generate()?;
        request.check()?;
        let started = Instant::now();
        let failed = |trouble: Trouble| trouble.to_error(&self.name, "messages");
        let place = self.place().map_err(failed)?;
        let outgoing = self.asked(request, true);
        opens.tab.sending(Used {
            input_tokens: request.tokens_guessed(),
            requests: 1,
            ..Used::default()
        });
        let opened = self.open(&outgoing, self.ends(opens.deadline)).await;
        let opened = opened.inspect_err(|trouble| opens.tab.failed(trouble));
        Ok(stream::deltas(stream::Begun {
            provider: self.clone(),
            response: opened.map_err(failed)?,
            _place: place,
            started,
            ends: deadline,
            prompt_tokens: request.tokens_guessed(),
        }))
    }

    /// What an answer costs, counted for a tenant.
    pub fn spend(&self, tenant: &str, used: Used) -> f64 {
        let cost = self.model.price.of(used.bounded());
        if cost > 0.0 {
            self.metrics.spent(tenant, &self.name, cost);
        }
        cost
    }

    fn must_generate(&self) -> Result<(), Error> {
        if self.model.task == Task::Generation {
            return Ok(());
        }
        let (name, task) = (&self.name, &self.task);
        let reason = format!("model '{name}' does {task}, not generation");
        Err(Error::invalid("model", reason))
    }

    /// A place among the calls under way; none is trouble.
    fn place(&self) -> Result<Place, Trouble> {
        let place = self.places.clone().try_acquire_owned();
        place.map(Place).map_err(|_| {
            self.metrics
                .ended(&self.name, Trouble::Full.outcome(), Duration::ZERO);
            Trouble::Full
        })
    }

    /// The call that continues a conversation.
    fn asked(&self, request: &ChatRequest, stream: bool) -> client::Outgoing {
        match self.model.kind {
            Shape::Anthropic => anthropic::chat(&self.model, request, stream),
            Shape::Openai | Shape::Cohere => openai::chat(&self.model, request, stream),
        }
    }

    async fn generate(
        self: &Arc<Self>,
        request: &ChatRequest,
        terms: Terms<'_>,
    ) -> Result<ChatAnswer, Trouble> {
        let _place = self.place()?;
        let outgoing = self.asked(request, false);
        let read = match self.model.kind {
            Shape::Anthropic => anthropic::read_chat,
            Shape::Openai | Shape::Cohere => openai::read_chat,
        };
        let prompt_tokens = request.tokens_guessed();
        // A service goes on to the end, whether anybody waits or not.
        let guess = Used {
            input_tokens: prompt_tokens,
            output_tokens: request.max_tokens.unwrap_or(self.model.max_tokens).into(),
            searches: 0,
            requests: 1,
        };
        let terms = self.held_to(terms);
        let mut said = self.paying(&outgoing, terms, guess, read).await?;
        said.usage = said.usage.or(ChatUsage {
            prompt_tokens,
            completion_tokens: chat::tokens_of(std::iter::once(said.text.as_str())),
        });
        terms.tab.took(said.usage.into());
        Ok(said)
    }

    /// The vectors of texts.
    async fn embed(
        self: &Arc<Self>,
        texts: &[String],
        options: Embedding,
        terms: Terms<'_>,
    ) -> Result<Embedded, Trouble> {
        let _place = self.place()?;
        let (rows, model) = (texts.len(), &self.model);
        let dimensions = options.dimensions;
        let cohere = model.kind == Shape::Cohere;
        let outgoing = match cohere {
            true => cohere::embedding(model, texts, dimensions, options.truncate),
            false => openai::embedding(model, texts, dimensions),
        };
        let width = model.width.filter(|_| dimensions.is_none());
        let read = move |bytes: &[u8]| {
            let read = match cohere {
                true => cohere::read_embedding(bytes, rows)?,
                false => openai::read_embedding(bytes, rows)?,
            };
            match read.vectors.first() {
                Some(first) if width.is_some_and(|width| width != first.len()) => {
                    Err("embeddings of another width")
                }
                _ => Ok(read),
            }
        };
        let guess = Used {
            input_tokens: chat::tokens_of(texts.iter().map(String::as_str)),
            requests: 1,
            ..Used::default()
        };
        let terms = self.held_to(terms);
        let mut embedded = self.paying(&outgoing, terms, guess, read).await?;
        terms.tab.took(Used {
            input_tokens: embedded.tokens,
            requests: 1,
            ..Used::default()
        });
        // A service that passes over what it does not know is well: whoever
        // asks for what it has not must not keep others from it.
        let narrow = embedded.vectors.first().map(Vec::len);
        if dimensions.is_some() && dimensions != narrow {
            return Err(Trouble::Dimensions);
        }
        if options.normalize {
            embedded
                .vectors
                .iter_mut()
                .for_each(|vector| normalize(vector));
        }
        Ok(embedded)
    }

    /// The scores of texts for their queries. A service takes one query for
    /// many texts: each query that there is costs a call.
    async fn rerank(
        self: &Arc<Self>,
        pairs: &[(String, String)],
        terms: Terms<'_>,
    ) -> Result<(Vec<f32>, Used), Trouble> {
        let _place = self.place()?;
        let terms = self.held_to(terms);
        let mut queries: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
        for (index, (query, _)) in pairs.iter().enumerate() {
            queries.entry(query).or_default().push(index);
        }
        let mut scores = vec![0.0; pairs.len()];
        let mut used = Used::default();
        for (query, places) in queries {
            let texts = places.iter().filter_map(|place| pairs.get(*place));
            let texts: Vec<String> = texts.map(|(_, text)| text.clone()).collect();
            let count = texts.len();
            let outgoing = cohere::rerank(&self.model, query, &texts);
            let read = move |bytes: &[u8]| cohere::read_rerank(bytes, count);
            let said = texts.iter().map(String::as_str).chain([query]);
            let guess = Used {
                input_tokens: chat::tokens_of(said),
                output_tokens: 0,
                searches: 1,
                requests: 1,
            };
            let scored = self.paying(&outgoing, terms, guess, read).await?;
            let took = Used {
                input_tokens: scored.tokens,
                output_tokens: 0,
                searches: scored.searches,
                requests: 1,
            };
            terms.tab.took(took);
            used = used.plus(took);
            for (place, score) in places.into_iter().zip(scored.scores) {
                if let Some(own) = scores.get_mut(place) {
                    *own = score;
                }
            }
        }
        Ok((scores, used))
    }
}

/// What is wanted of embeddings.
#[derive(Debug, Clone, Copy, Default)]
struct Embedding {
    /// How many leading dimensions are kept.
    dimensions: Option<usize>,
    /// Whether they are scaled to length 1.
    normalize: bool,
    /// Whether a text that is too long is cut.
    truncate: bool,
}

/// Scales a vector to length 1. One that has it already keeps its bits, as far
/// as FP32 can tell: most services send such vectors.
fn normalize(vector: &mut [f32]) {
    let squares: f64 = vector.iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
    let length = squares.sqrt();
    if length > 0.0 && (length - 1.0).abs() > 1e-5 {
        for value in vector.iter_mut() {
            *value = (f64::from(*value) / length) as f32;
        }
    }
}
