//! HTTP to outside services: sent again within limits, and left alone when
//! they fail.
//!
//! Each provider has one client for all shards. A connection is driven by the
//! thread that opened it, and a call from another thread costs two hand-overs:
//! microseconds, where the service is milliseconds away. In return its few
//! connections stay warm, which a pool for each thread would not manage.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::header::{AUTHORIZATION, CONTENT_TYPE};
use platform::grpc::BytesHeld;
use reqwest::{Certificate, Client, Proxy, Response, Url, redirect};
use serde::Serialize;
use tokio::time::{Instant, timeout_at};

use super::Provider;
use super::catalogue::{Model, Shape};
use super::trouble::{Health, Trouble};

/// The longest answer of a service.
const ANSWER_BYTES_MAX: usize = 64 << 20;
/// What is read of an answer that is no success.
const REFUSAL_BYTES_MAX: usize = 16 << 10;
/// How far a service may be ahead of a slow reader of one stream.
const WINDOW_BYTES: u32 = 1 << 20;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const IDLE: Duration = Duration::from_secs(90);
/// Before a call is sent again; twice as long each time again, give or take
/// half by lot.
const PAUSE: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(2);
/// A longer answer is read on a blocking thread, so that a shard does not stall.
const READ_BYTES_MAX: usize = 256 << 10;
/// A caller who waits less proves nothing against a service, nor does one who
/// waits less than a quarter of the model's own time.
const PATIENCE: Duration = Duration::from_secs(1);
/// What is left of a deadline to say whose fault it is that it passes.
const WORD: Duration = Duration::from_millis(10);
const ANTHROPIC_VERSION: &str = "2023-06-01";

/// The client of one model; the error says which field is wrong.
pub fn build(model: &Model) -> Result<Client, (&'static str, String)> {
    // A slow reader of one stream must not keep others from the connection.
    let calls = u32::try_from(model.concurrency_max).unwrap_or(u32::MAX);
    let window = WINDOW_BYTES.saturating_mul(calls).min(1 << 30);
    let mut builder = Client::builder()
        .user_agent(concat!("andon/", env!("CARGO_PKG_VERSION")))
        .redirect(redirect::Policy::none())
        .referer(false)
        .no_proxy()
        .connect_timeout(CONNECT_TIMEOUT)
        .pool_idle_timeout(IDLE)
        .pool_max_idle_per_host(model.concurrency_max)
        .http2_initial_stream_window_size(WINDOW_BYTES)
        .http2_initial_connection_window_size(window)
        .http2_keep_alive_interval(Duration::from_secs(20))
        .http2_keep_alive_timeout(Duration::from_secs(10));
    if let Some(path) = &model.ca_file {
        let wrong = |reason: String| ("ca_file", reason);
        let pem = std::fs::read(path)
            .map_err(|error| wrong(format!("the file cannot be read: {error}")))?;
        let authorities = Certificate::from_pem_bundle(&pem).unwrap_or_default();
        if authorities.is_empty() {
            return Err(wrong("the file holds no certificate in PEM".to_owned()));
        }
        builder = builder.tls_certs_only(authorities);
    } else if model.base_url.starts_with("http://") {
        // Nobody vouches for it: a machine without authorities is fine.
        builder = builder.tls_certs_only([]);
    }
    if let Some(proxy) = &model.proxy {
        let proxy = Proxy::all(proxy).map_err(|_| {
            (
                "proxy",
                "must be an address such as http://host:port".to_owned(),
            )
        })?;
        builder = builder.proxy(proxy);
    }
    builder.build().map_err(|error| {
        let reason = root(&error);
        ("base_url", format!("no client can be made: {reason}"))
    })
}

/// The address of each of a model's calls.
pub fn address(base: &Url, path: &str) -> Url {
    let mut url = base.clone();
    let joined = format!("{}{path}", base.path().trim_end_matches('/'));
    url.set_path(&joined);
    url
}

/// A call to a service.
#[derive(Debug, Clone)]
pub struct Outgoing {
    /// What is called, after the part of the path that all calls share.
    pub path: &'static str,
    /// The body, in JSON.
    pub body: Bytes,
}

impl Outgoing {
    /// A call with a body.
    pub fn new(path: &'static str, body: &impl Serialize) -> Self {
        Self {
            path,
            // What these bodies hold can always be written.
            body: serde_json::to_vec(body).unwrap_or_default().into(),
        }
    }
}

/// A body that counts as in flight.
pub struct Held {
    /// The body.
    pub bytes: Bytes,
    _held: Vec<BytesHeld>,
}

impl Provider {
    /// When a call must have its answer: early enough to say whose fault it is
    /// that there is none.
    pub(super) fn ends(&self, deadline: Instant) -> Instant {
        let left = deadline.saturating_duration_since(Instant::now());
        let word = WORD.min(left / 10);
        (Instant::now() + self.model.timeout).min(deadline - word)
    }

    /// Sends a call until there is an answer that `read` can use, and counts
    /// what it comes to.
    pub(super) async fn exchange<T>(
        self: &Arc<Self>,
        outgoing: &Outgoing,
        ends: Instant,
        read: impl Fn(&[u8]) -> Result<T, &'static str> + Clone + Send + 'static,
    ) -> Result<T, Trouble>
    where
        T: Send + 'static,
    {
        let started = Instant::now();
        let attempts = self.attempts(ends, || async {
            let response = self.send(outgoing).await?;
            let held = self.whole(response).await?;
            let answer = if held.bytes.len() > READ_BYTES_MAX {
                let read = read.clone();
                tokio::task::spawn_blocking(move || read(&held.bytes))
                    .await
                    .unwrap_or(Err("reading it failed"))
            } else {
                read(&held.bytes)
            };
            answer.map_err(Trouble::Garbage)
        });
        let answered = match timeout_at(ends, attempts).await {
            Ok(answered) => answered.map(|(answer, mut trial)| {
                trial.end(None);
                answer
            }),
            Err(_) => Err(Trouble::Late),
        };
        let outcome = answered.as_ref().err().map_or("ok", Trouble::outcome);
        self.metrics.ended(&self.name, outcome, started.elapsed());
        answered
    }

    /// Sends a call until an answer begins. It is not known yet whether it
    /// will end well: that is settled then.
    pub(super) async fn open(
        self: &Arc<Self>,
        outgoing: &Outgoing,
        ends: Instant,
    ) -> Result<Response, Trouble> {
        let started = Instant::now();
        let attempts = self.attempts(ends, || self.send(outgoing));
        let opened = timeout_at(ends, attempts).await;
        let opened = opened.unwrap_or(Err(Trouble::Late));
        match opened {
            Ok((response, mut trial)) => {
                trial.opened();
                Ok(response)
            }
            Err(trouble) => {
                let took = started.elapsed();
                self.metrics.ended(&self.name, trouble.outcome(), took);
                Err(trouble)
            }
        }
    }

    /// Tries until it succeeds, within the retries, the budget and the time.
    async fn attempts<T, F>(
        self: &Arc<Self>,
        ends: Instant,
        attempt: impl Fn() -> F,
    ) -> Result<(T, Trial), Trouble>
    where
        F: Future<Output = Result<T, Trouble>>,
    {
        let mut number = 0;
        let mut last = None;
        loop {
            if let Err(rest) = self.breaker.admit() {
                return Err(last.unwrap_or(Trouble::LeftAlone(rest)));
            }
            let mut trial = Trial::begin(self.clone(), ends);
            let trouble = match attempt().await {
                Ok(answer) => {
                    self.budget.succeeded();
                    return Ok((answer, trial));
                }
                Err(trouble) => trouble,
            };
            trial.end(Some(&trouble));
            let pause = trouble.after().unwrap_or_else(|| backoff(number));
            let again = trouble.passes()
                && self.budget.failed()
                && number < self.model.retries_max
                && Instant::now() + pause < ends;
            if !again {
                return Err(trouble);
            }
            self.metrics.retried(&self.name, trouble.outcome());
            tokio::time::sleep(pause).await;
            number += 1;
            last = Some(trouble);
        }
    }

    /// Sends once; a status that is no success is trouble.
    async fn send(&self, outgoing: &Outgoing) -> Result<Response, Trouble> {
        let mut request = self
            .client
            .post(address(&self.base, outgoing.path))
            .header(CONTENT_TYPE, "application/json")
            .body(outgoing.body.clone());
        if self.model.kind == Shape::Anthropic {
            request = request.header("anthropic-version", ANTHROPIC_VERSION);
        }
        let secret = self.key.current();
        if let Some(key) = secret.as_ref().map(|secret| secret.header()) {
            request = match self.model.kind {
                Shape::Anthropic => request.header("x-api-key", key),
                Shape::Openai | Shape::Cohere => request.header(AUTHORIZATION, key),
            };
        }
        let response = request.send().await.map_err(|error| self.broken(&error))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let headers = response.headers().clone();
        let body = refusal(response).await;
        let secret = secret.as_deref();
        Err(Trouble::of_status(status.as_u16(), &headers, &body, secret))
    }

    /// What is wrong with the connection, which those who run the gateway may
    /// read, and no caller.
    fn broken(&self, error: &reqwest::Error) -> Trouble {
        let reason = root(error);
        tracing::debug!(model = %self.name, %reason, "a provider could not be called");
        Trouble::of_error(error)
    }

    /// Reads an answer to its end.
    async fn whole(&self, mut response: Response) -> Result<Held, Trouble> {
        let mut held = Vec::new();
        let mut gathered = BytesMut::new();
        while let Some(chunk) = response.chunk().await.map_err(|e| self.broken(&e))? {
            if gathered.len() + chunk.len() > ANSWER_BYTES_MAX {
                return Err(Trouble::TooLong);
            }
            let more = self.limits.budget.take(chunk.len());
            held.extend(more.map_err(|_| Trouble::NoRoom)?);
            gathered.extend_from_slice(&chunk);
        }
        Ok(Held {
            bytes: gathered.freeze(),
            _held: held,
        })
    }

    /// Keeps what a call says of the service.
    pub(super) fn settle(&self, trouble: Option<&Trouble>) {
        match trouble.map_or(Health::Well, Trouble::health) {
            Health::Well => self.succeeded(),
            Health::Ill => self.failed(trouble.map_or("", Trouble::outcome)),
            Health::Unknown => self.breaker.abandon_probe(),
        }
    }

    /// Counts a failure; after several the service is left alone.
    fn failed(&self, reason: &'static str) {
        if let Some(rest) = self.breaker.failed() {
            self.metrics.breaker(&self.name, true);
            let model = &self.name;
            tracing::warn!(%model, reason, ?rest, "a provider failed repeatedly and is left alone");
        }
    }

    fn succeeded(&self) {
        if self.breaker.succeeded() {
            self.metrics.breaker(&self.name, false);
            tracing::info!(model = %self.name, "a provider answers again");
        }
    }
}

/// The beginning of an answer that is no success.
async fn refusal(mut response: Response) -> Vec<u8> {
    let mut body = Vec::new();
    while let Ok(Some(chunk)) = response.chunk().await {
        let room = REFUSAL_BYTES_MAX - body.len();
        body.extend_from_slice(&chunk[..chunk.len().min(room)]);
        if body.len() == REFUSAL_BYTES_MAX {
            break;
        }
    }
    body
}

fn backoff(number: u32) -> Duration {
    let pause = PAUSE.saturating_mul(1 << number.min(10)).min(PAUSE_MAX);
    pause.mul_f64(rand::random_range(0.5..1.5))
}

/// What is at the bottom of an error: reqwest's own words hold the address.
fn root(error: &reqwest::Error) -> String {
    let mut at: &dyn std::error::Error = error;
    while let Some(source) = at.source() {
        at = source;
    }
    match at.is::<reqwest::Error>() {
        true => "the connection failed".to_owned(),
        false => at.to_string(),
    }
}

/// A call that is under way, however it ends.
struct Trial {
    provider: Arc<Provider>,
    started: Instant,
    ends: Instant,
    ended: bool,
}

impl Trial {
    fn begin(provider: Arc<Provider>, ends: Instant) -> Self {
        Self {
            provider,
            started: Instant::now(),
            ends,
            ended: false,
        }
    }

    /// The call was answered, or there was trouble.
    fn end(&mut self, trouble: Option<&Trouble>) {
        self.ended = true;
        self.provider.settle(trouble);
    }

    /// An answer has begun: enough for a service that was left alone, for
    /// whether it ends well may take long to see.
    fn opened(&mut self) {
        self.ended = true;
        if self.provider.breaker.is_open() {
            self.provider.succeeded();
        }
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        // A service that keeps callers waiting is as bad as one that breaks; a
        // caller who left, or who had no time, proves nothing.
        let timeout = self.provider.model.timeout;
        let patience = PATIENCE.max(timeout / 4).min(timeout);
        if Instant::now() >= self.ends && self.started.elapsed() >= patience {
            self.provider.failed("late");
        } else {
            self.provider.breaker.abandon_probe();
        }
    }
}
