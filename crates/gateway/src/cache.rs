//! The response cache of deterministic models, row by row: hits in memory or in
//! Redis, and single-flight (request coalescing) of the misses.

mod key;
mod lookup;
mod memory;
mod metrics;
mod readings;
mod redis;
mod rows;
mod single_flight;

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
use key::KeyContext;
use lookup::{Compute, LookupResult, RowCache};
use memory::{CachedRow, MemoryCache};
use metrics::CacheMetrics;
use readings::CacheCollector;
use redis::{RedisCache, Seal};
use rows::{ComputedUsage, RowRequest};
use single_flight::SingleFlight;

/// The settings of the response cache.
#[derive(Debug, Clone, clap::Args)]
pub struct CacheSettings {
    /// Size of the in-memory response cache of deterministic models, in bytes; 0
    /// disables it
    #[arg(long, value_name = "BYTES", default_value = "128MiB", value_parser = bytes_or_none)]
    pub cache_bytes: usize,
    /// Time to live (TTL) of a cached response
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = platform::config::positive_duration)]
    pub cache_ttl: Duration,
    /// The file with the secret that authenticates cached responses in Redis;
    /// without it responses are cached in memory only
    #[arg(long, value_name = "FILE", requires = "redis")]
    pub cache_secret_file: Option<PathBuf>,
}

fn bytes_or_none(text: &str) -> Result<usize, String> {
    if text == "0" {
        return Ok(0);
    }
    platform::config::bytes(text)
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

/// The longest TTL of a cached row.
const TTL_MAX: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// The response cache.
#[derive(Debug)]
pub struct Cache {
    rows: Arc<RowCache>,
    /// A connection of its own: large values must not delay quotas.
    redis: Option<Arc<Redis>>,
    redis_rows: Option<Arc<RedisCache>>,
}

/// The directive of the caller's `cache-control` header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum CacheControl {
    /// A cached response will do.
    Use,
    /// `no-cache`: the response is computed now, and cached.
    Refresh,
    /// `no-store`: the response is computed now, and not cached.
    Bypass,
}

impl Cache {
    /// An empty cache; nothing is connected yet. An error when the secret or Redis
    /// is misconfigured.
    pub fn new(
        settings: &CacheSettings,
        shared: &RedisSettings,
        metrics: &Metrics,
    ) -> Result<Self, CacheError> {
        let ttl = settings.cache_ttl.min(TTL_MAX);
        let (mut redis, mut redis_rows) = (None, None);
        if let (Some(opened), Some(secret)) = (shared.open()?, &settings.cache_secret_file) {
            let seal = Seal::read(secret)?;
            let help = "1 while responses are cached in Redis";
            opened.register(metrics, "andon_gateway_cache_redis_up", help);
            redis_rows = Some(Arc::new(RedisCache::new(opened.clone(), seal, ttl)));
            redis = Some(opened);
        }
        let bytes = settings.cache_bytes;
        let rows = Arc::new(RowCache {
            memory: (bytes > 0).then(|| MemoryCache::new(bytes, ttl)),
            flights: SingleFlight::default(),
            redis: redis_rows.clone(),
            metrics: CacheMetrics::register(metrics),
        });
        let readings = CacheCollector(rows.clone());
        metrics.register(|registry| registry.register_collector(Box::new(readings)));
        Ok(Self {
            rows,
            redis,
            redis_rows,
        })
    }

    /// Connects to Redis and writes new rows there, until the tasks are dropped.
    pub fn follow(&self) -> Vec<OwnedTask> {
        let connecting = self.redis.as_ref().map(Redis::follow);
        let writing = self.redis_rows.as_ref().and_then(RedisCache::follow);
        connecting.into_iter().chain(writing).collect()
    }

    /// The response to a request: hits from the cache, and misses computed by the
    /// layers below it.
    pub async fn respond<B: Backend>(
        &self,
        backend: &B,
        route: &Route,
        request: &Request,
    ) -> Result<Response, Status> {
        let Some(digest) = route.digest() else {
            return backend.send(request).await;
        };
        let source = KeyContext {
            scope: &request.caller.tenant.cache_scope,
            model: route.name(),
            version: route.number(),
            digest,
        };
        let control = cache_control(&request.headers);
        if control == CacheControl::Bypass {
            let mut response = backend.send(request).await?;
            let header = HeaderValue::from_static("miss");
            response.metadata_mut().insert(CACHE_KEY, header);
            return Ok(response);
        }
        let Some(rows) = rows::split_request(request, &source) else {
            return backend.send(request).await;
        };
        let call = CachedCall {
            backend,
            request,
            digest,
            rows: rows.as_ref(),
            state: Mutex::default(),
        };
        let looked_up = match control {
            CacheControl::Use => self.rows.get_or_compute(rows.keys(), &call).await,
            _ => self.rows.refresh(rows.keys(), &call).await,
        };
        match looked_up {
            Ok(Some(looked_up)) => call.join(looked_up).await,
            Ok(None) => call.send_whole().await,
            Err(outcome) => (*outcome).map(|response| response.with_usage_of(call.take_usage())),
        }
    }
}

/// Reads the `cache-control` headers; `no-store` wins.
fn cache_control(headers: &HeaderMap) -> CacheControl {
    let mut control = CacheControl::Use;
    for value in headers.get_all(CACHE_CONTROL) {
        for directive in value.to_str().unwrap_or_default().split(',') {
            let directive = directive.trim();
            if directive.eq_ignore_ascii_case("no-store") {
                return CacheControl::Bypass;
            }
            if directive.eq_ignore_ascii_case("no-cache")
                || directive.eq_ignore_ascii_case("max-age=0")
            {
                control = CacheControl::Refresh;
            }
        }
    }
    control
}

/// The layers below the cache, for one request.
pub trait Backend: Sync {
    /// Sends a request, or a part of it, to a worker or provider.
    fn send(&self, request: &Request) -> impl Future<Output = Result<Response, Status>> + Send;

    /// Charges usage that belongs to no response.
    fn charge(&self, usage: Usage);
}

/// One request on its way through the cache. It computes the misses.
struct CachedCall<'a, B: Backend> {
    backend: &'a B,
    request: &'a Request,
    digest: &'a str,
    rows: &'a dyn RowRequest,
    state: Mutex<CallState>,
}

/// Usage that is in no response is charged all the same.
impl<B: Backend> Drop for CachedCall<'_, B> {
    fn drop(&mut self) {
        self.backend.charge(self.take_usage());
    }
}

/// The usage and the response of the calls below the cache.
#[derive(Debug, Default)]
struct CallState {
    pending: ComputedUsage,
    /// The response to the unchanged request, when that was sent.
    whole: Option<Response>,
}

/// The result for the caller when rows cannot be computed: an error, or a
/// response that cannot be split into rows. Boxed, since it is large and rare.
type WholeResult = Box<Result<Response, Status>>;

impl<B: Backend> Compute for CachedCall<'_, B> {
    type Failure = WholeResult;

    async fn compute(&self, indices: &[usize]) -> Result<Vec<CachedRow>, WholeResult> {
        if indices.len() == self.rows.keys().len() {
            let response = self.send(None).await?;
            let Some(rows) = self.read(&response, indices.len()) else {
                return Err(Box::new(Ok(response)));
            };
            self.lock().whole = Some(response);
            return Ok(rows);
        }
        let part = self.request.with_message(self.rows.part(indices));
        let response = self.send(Some(&part)).await?;
        match self.read(&response, indices.len()) {
            Some(rows) => Ok(rows),
            // An error names rows of a part that the caller does not know; another
            // version does not fit the rows that are cached.
            None if matches!(response.code(), Code::Ok | Code::InvalidArgument) => {
                self.add_usage(response.usage());
                Err(Box::new(Ok(self.send(None).await?)))
            }
            None => Err(Box::new(Ok(response))),
        }
    }
}

impl<B: Backend> CachedCall<'_, B> {
    /// Sends a part of the request, or the unchanged request.
    async fn send(&self, part: Option<&Request>) -> Result<Response, WholeResult> {
        let request = part.unwrap_or(self.request);
        let sent = self.backend.send(request).await;
        sent.map_err(|status| Box::new(Err(status)))
    }

    /// Splits a response into rows and adds its usage. None when the response has
    /// another form, or is of another version.
    fn read(&self, response: &Response, count: usize) -> Option<Vec<CachedRow>> {
        let digest = response.metadata().get(DIGEST_KEY)?;
        if digest.as_bytes() != self.digest.as_bytes() {
            return None;
        }
        let split = self
            .rows
            .split(response.message()?, response.metadata(), count)?;
        self.add_usage(response.usage());
        let pending = &mut self.lock().pending;
        let (sum, timing) = (&mut pending.timing, split.timing);
        sum.compute_chars = sum.compute_chars.saturating_add(timing.compute_chars);
        sum.compute_tokens = sum.compute_tokens.saturating_add(timing.compute_tokens);
        for (sum, ns) in [
            (&mut sum.total_time_ns, timing.total_time_ns),
            (&mut sum.tokenization_time_ns, timing.tokenization_time_ns),
            (&mut sum.queue_time_ns, timing.queue_time_ns),
            (&mut sum.inference_time_ns, timing.inference_time_ns),
        ] {
            *sum = sum.saturating_add(ns);
        }
        Some(split.rows)
    }

    fn add_usage(&self, usage: Usage) {
        let pending = &mut self.lock().pending;
        pending.tokens = pending.tokens.saturating_add(usage.tokens);
        pending.cost += usage.cost;
    }

    /// Takes the usage that is not charged yet.
    fn take_usage(&self) -> Usage {
        let pending = std::mem::take(&mut self.lock().pending);
        Usage {
            tokens: pending.tokens,
            cost: pending.cost,
        }
    }

    /// Sends the unchanged request, when its rows cannot be put together.
    async fn send_whole(&self) -> Result<Response, Status> {
        let response = self.backend.send(self.request).await?;
        Ok(response.with_usage_of(self.take_usage()))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, CallState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Joins the rows to a response.
    async fn join(&self, looked_up: LookupResult) -> Result<Response, Status> {
        let header = cache_header(&looked_up);
        tracing::Span::current().record("andon.cache", header.to_str().unwrap_or_default());
        let whole = self.lock().whole.take();
        if let Some(mut whole) = whole {
            // It reports its usage itself, and nothing else was sent.
            self.take_usage();
            whole.metadata_mut().insert(CACHE_KEY, header);
            return Ok(whole);
        }
        let mut headers = HeaderMap::with_capacity(16);
        let pending = self.lock().pending;
        let Some(framed) = self.rows.join(&looked_up.rows, &pending, &mut headers) else {
            return self.send_whole().await;
        };
        let cost = self.take_usage().cost;
        headers.insert(CACHE_KEY, header);
        if let Ok(digest) = HeaderValue::try_from(self.digest) {
            headers.insert(DIGEST_KEY, digest);
        }
        Ok(Response::of_framed(framed, headers).with_cost(cost))
    }
}

/// The value of the cache header: how many of the rows were hits.
fn cache_header(looked_up: &LookupResult) -> HeaderValue {
    let (count, computed) = (looked_up.rows.len(), looked_up.computed);
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
    fn cache_control_is_read() {
        let headers = |values: &[&'static str]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(CACHE_CONTROL, HeaderValue::from_static(value));
            }
            headers
        };
        for (values, expected) in [
            (&[][..], CacheControl::Use),
            (&["max-age=60"], CacheControl::Use),
            (&["no-cache"], CacheControl::Refresh),
            (&["max-age=60, No-Cache"], CacheControl::Refresh),
            (&["max-age=0"], CacheControl::Refresh),
            (&["no-cache", "no-store"], CacheControl::Bypass),
            (&["no-store,no-cache"], CacheControl::Bypass),
        ] {
            assert_eq!(cache_control(&headers(values)), expected, "{values:?}");
        }
    }

    #[test]
    fn the_cache_header_counts_hits() {
        let looked_up = |count: usize, computed| LookupResult {
            rows: vec![memory::tests::row("a"); count],
            computed,
        };
        assert_eq!(cache_header(&looked_up(4, 0)), "hit");
        assert_eq!(cache_header(&looked_up(4, 1)), "3/4");
        assert_eq!(cache_header(&looked_up(4, 4)), "miss");
        assert_eq!(cache_header(&looked_up(1, 1)), "miss");
    }
}
