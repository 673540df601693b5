//! Answers that are known already, row by row, and rows that are being computed.
//! Only those of models that are declared deterministic.

mod counts;
mod flight;
mod key;
mod known;
mod memory;
mod readings;
mod remote;
mod rows;

use std::future::Future;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::header::CACHE_CONTROL;
use http::{HeaderMap, HeaderValue};
use platform::files::FileError;
use platform::metrics::Metrics;
use platform::tasks::OwnedTask;
use protocol::{CACHE_KEY, DIGEST_KEY};
use tonic::{Code, Status};

use crate::redis::{Redis, RedisError, RedisSettings};
use crate::request::{Request, Usage};
use crate::route::Route;
use crate::upstream::Response;
use counts::Counts;
use flight::Flights;
use key::Source;
use known::{Compute, Found, Known};
use memory::{Memory, Row};
use readings::Readings;
use remote::{Remote, Seal};
use rows::{Paid, Rows};

/// What is kept, and for how long.
#[derive(Debug, Clone, clap::Args)]
pub struct CacheSettings {
    /// Answers of deterministic models that are kept in memory, in bytes; 0
    /// keeps none
    #[arg(long, value_name = "BYTES", default_value = "128MiB", value_parser = bytes_or_none)]
    pub cache_bytes: usize,
    /// How long an answer is kept
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = platform::config::positive_duration)]
    pub cache_ttl: Duration,
    /// The file with the secret that authenticates answers in Redis: only with
    /// it they are kept there too
    #[arg(long, value_name = "FILE", requires = "redis")]
    pub cache_secret_file: Option<PathBuf>,
}

fn bytes_or_none(text: &str) -> Result<usize, String> {
    match text {
        "0" => Ok(0),
        text => platform::config::bytes(text),
    }
}

/// Why a cache cannot be used as it is configured.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// The secret cannot be used.
    #[error("--cache-secret-file: {0}")]
    Secret(#[from] FileError),
    /// Redis cannot be used.
    #[error(transparent)]
    Redis(#[from] RedisError),
}

/// Longer than any answer is worth keeping.
const TTL_MAX: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// Known answers.
#[derive(Debug)]
pub struct Cache {
    known: Arc<Known>,
    /// Its own connection: large values must not keep quotas waiting.
    redis: Option<Arc<Redis>>,
    remote: Option<Arc<Remote>>,
}

/// What the caller wants of the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wish {
    /// An answer, known or not.
    Any,
    /// One that is computed now.
    Fresh,
    /// The same, which is not kept either.
    Unkept,
}

impl Cache {
    /// An empty cache; nothing is connected yet.
    pub fn new(
        settings: &CacheSettings,
        shared: &RedisSettings,
        metrics: &Metrics,
    ) -> Result<Self, CacheError> {
        let ttl = settings.cache_ttl.min(TTL_MAX);
        let (mut redis, mut remote) = (None, None);
        if let (Some(opened), Some(secret)) = (shared.open()?, &settings.cache_secret_file) {
            let seal = Seal::read(secret)?;
            let help = "1 while answers are looked up and kept in Redis";
            metrics.register(|registry| {
                registry.register("andon_gateway_cache_redis_up", help, opened.up());
            });
            remote = Some(Arc::new(Remote::new(opened.clone(), seal, ttl)));
            redis = Some(opened);
        }
        let bytes = settings.cache_bytes;
        let known = Arc::new(Known {
            memory: (bytes > 0).then(|| Memory::new(bytes, ttl)),
            flights: Flights::default(),
            remote: remote.clone(),
            counts: Counts::register(metrics),
        });
        let readings = Readings(known.clone());
        metrics.register(|registry| registry.register_collector(Box::new(readings)));
        Ok(Self {
            known,
            redis,
            remote,
        })
    }

    /// Connects to Redis and writes there, until the tasks are dropped.
    pub fn follow(&self) -> Vec<OwnedTask> {
        let connecting = self.redis.as_ref().map(Redis::follow);
        let writing = self.remote.as_ref().and_then(Remote::follow);
        connecting.into_iter().chain(writing).collect()
    }

    /// The response to a request: cached rows, and the others computed by what
    /// is below the cache.
    pub async fn respond<B: Backend>(
        &self,
        backend: &B,
        route: &Route,
        request: &Request,
    ) -> Result<Response, Status> {
        let Some(digest) = route.digest() else {
            return backend.send(request).await;
        };
        let source = Source {
            scope: &request.caller.tenant.cache_scope,
            model: route.name(),
            version: route.number(),
            digest,
        };
        let wish = wish(&request.headers);
        if wish == Wish::Unkept {
            let mut answer = backend.send(request).await?;
            let note = HeaderValue::from_static("miss");
            answer.metadata_mut().insert(CACHE_KEY, note);
            return Ok(answer);
        }
        let Some(rows) = rows::of(request, &source) else {
            return backend.send(request).await;
        };
        let asking = Asking {
            backend,
            request,
            digest,
            rows: rows.as_ref(),
            sent: Mutex::default(),
        };
        let found = match wish {
            Wish::Any => self.known.rows(rows.keys(), &asking).await,
            _ => self.known.fresh(rows.keys(), &asking).await,
        };
        match found {
            Ok(Some(found)) => asking.answer(found).await,
            Ok(None) => asking.anew().await,
            Err(instead) => (*instead).map(|answer| answer.also_spent(asking.spent())),
        }
    }
}

/// What the request's metadata asks for.
fn wish(headers: &HeaderMap) -> Wish {
    let mut wish = Wish::Any;
    for value in headers.get_all(CACHE_CONTROL) {
        for directive in value.to_str().unwrap_or_default().split(',') {
            let directive = directive.trim();
            if directive.eq_ignore_ascii_case("no-store") {
                return Wish::Unkept;
            }
            if directive.eq_ignore_ascii_case("no-cache")
                || directive.eq_ignore_ascii_case("max-age=0")
            {
                wish = Wish::Fresh;
            }
        }
    }
    wish
}

/// The layers below the cache, for one request.
pub trait Backend: Sync {
    /// Sends a request, or a part of it, to a worker or provider.
    fn send(&self, request: &Request) -> impl Future<Output = Result<Response, Status>> + Send;

    /// Charges usage that belongs to no response.
    fn charge(&self, usage: Usage);
}

/// One request, some of whose rows have to be computed.
struct Asking<'a, B: Backend> {
    backend: &'a B,
    request: &'a Request,
    digest: &'a str,
    rows: &'a dyn Rows,
    sent: Mutex<Sent>,
}

/// What was spent and is in no answer is charged all the same.
impl<B: Backend> Drop for Asking<'_, B> {
    fn drop(&mut self) {
        self.backend.charge(self.spent());
    }
}

/// What was sent on, and what came back.
#[derive(Debug, Default)]
struct Sent {
    paid: Paid,
    /// The answer to the request as it came.
    whole: Option<Response>,
}

/// What the caller gets when its rows cannot be put together. Boxed, since it
/// is large and rare.
type Instead = Box<Result<Response, Status>>;

impl<B: Backend> Compute for Asking<'_, B> {
    type Instead = Instead;

    async fn compute(&self, places: &[usize]) -> Result<Vec<Row>, Instead> {
        if places.len() == self.rows.keys().len() {
            let answer = self.sent(None).await?;
            let Some(rows) = self.read(&answer, places.len()) else {
                return Err(Box::new(Ok(answer)));
            };
            self.lock().whole = Some(answer);
            return Ok(rows);
        }
        let part = self.request.with_message(self.rows.part(places));
        let answer = self.sent(Some(&part)).await?;
        match self.read(&answer, places.len()) {
            Some(rows) => Ok(rows),
            // It names places of a part that the caller does not know, or
            // comes from another version than the rows that are known.
            None if matches!(answer.code(), Code::Ok | Code::InvalidArgument) => {
                self.pay(answer.usage());
                Err(Box::new(Ok(self.sent(None).await?)))
            }
            None => Err(Box::new(Ok(answer))),
        }
    }
}

impl<B: Backend> Asking<'_, B> {
    /// Sends a part of the request, or the request as it came.
    async fn sent(&self, part: Option<&Request>) -> Result<Response, Instead> {
        let request = part.unwrap_or(self.request);
        let sent = self.backend.send(request).await;
        sent.map_err(|status| Box::new(Err(status)))
    }

    /// The rows of an answer, and what they took; none when the answer is no
    /// such answer, or that of another version.
    fn read(&self, answer: &Response, count: usize) -> Option<Vec<Row>> {
        let digest = answer.metadata().get(DIGEST_KEY)?;
        if digest.as_bytes() != self.digest.as_bytes() {
            return None;
        }
        let split = self
            .rows
            .split(answer.message()?, answer.metadata(), count)?;
        self.pay(answer.usage());
        let paid = &mut self.lock().paid;
        let (sum, took) = (&mut paid.took, split.took);
        sum.compute_chars = sum.compute_chars.saturating_add(took.compute_chars);
        sum.compute_tokens = sum.compute_tokens.saturating_add(took.compute_tokens);
        for (sum, ns) in [
            (&mut sum.total_time_ns, took.total_time_ns),
            (&mut sum.tokenization_time_ns, took.tokenization_time_ns),
            (&mut sum.queue_time_ns, took.queue_time_ns),
            (&mut sum.inference_time_ns, took.inference_time_ns),
        ] {
            *sum = sum.saturating_add(ns);
        }
        Some(split.rows)
    }

    fn pay(&self, usage: Usage) {
        let paid = &mut self.lock().paid;
        paid.tokens = paid.tokens.saturating_add(usage.tokens);
        paid.cost += usage.cost;
    }

    /// What was spent until now, for who charges it.
    fn spent(&self) -> Usage {
        let paid = std::mem::take(&mut self.lock().paid);
        Usage {
            tokens: paid.tokens,
            cost: paid.cost,
        }
    }

    /// The answer to the request as it came, when there is no other.
    async fn anew(&self) -> Result<Response, Status> {
        let answer = self.backend.send(self.request).await?;
        Ok(answer.also_spent(self.spent()))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Sent> {
        self.sent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The answer of the rows that were found.
    async fn answer(&self, found: Found) -> Result<Response, Status> {
        let note = note(&found);
        tracing::Span::current().record("andon.cache", note.to_str().unwrap_or_default());
        let whole = self.lock().whole.take();
        if let Some(mut whole) = whole {
            // It says itself what it took, and nothing else was sent.
            self.spent();
            whole.metadata_mut().insert(CACHE_KEY, note);
            return Ok(whole);
        }
        let mut headers = HeaderMap::with_capacity(16);
        let paid = self.lock().paid;
        let Some(framed) = self.rows.join(&found.rows, &paid, &mut headers) else {
            return self.anew().await;
        };
        let cost = self.spent().cost;
        headers.insert(CACHE_KEY, note);
        if let Ok(digest) = HeaderValue::try_from(self.digest) {
            headers.insert(DIGEST_KEY, digest);
        }
        Ok(Response::of_framed(framed, headers).costing(cost))
    }
}

/// How many of the rows were known.
fn note(found: &Found) -> HeaderValue {
    let (count, computed) = (found.rows.len(), found.computed);
    match computed {
        0 => HeaderValue::from_static("hit"),
        computed if computed >= count => HeaderValue::from_static("miss"),
        computed => HeaderValue::try_from(format!("{}/{count}", count - computed))
            .unwrap_or_else(|_| HeaderValue::from_static("miss")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_metadata_asks_for_freshness() {
        let headers = |values: &[&'static str]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(CACHE_CONTROL, HeaderValue::from_static(value));
            }
            headers
        };
        for (values, wanted) in [
            (&[][..], Wish::Any),
            (&["max-age=60"], Wish::Any),
            (&["no-cache"], Wish::Fresh),
            (&["max-age=60, No-Cache"], Wish::Fresh),
            (&["max-age=0"], Wish::Fresh),
            (&["no-cache", "no-store"], Wish::Unkept),
            (&["no-store,no-cache"], Wish::Unkept),
        ] {
            assert_eq!(wish(&headers(values)), wanted, "{values:?}");
        }
    }

    #[test]
    fn the_note_counts_known_rows() {
        let found = |count: usize, computed| Found {
            rows: vec![memory::tests::row("a"); count],
            computed,
        };
        assert_eq!(note(&found(4, 0)), "hit");
        assert_eq!(note(&found(4, 1)), "3/4");
        assert_eq!(note(&found(4, 4)), "miss");
        assert_eq!(note(&found(1, 1)), "miss");
    }
}
