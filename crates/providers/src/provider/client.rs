//! HTTP to outside services: retries within a budget, a circuit breaker, and
//! bounds on the bytes read.
//!
//! Each model has one client for all shards. A connection is driven by the
//! thread that opened it, and a call from another thread costs two hand-overs:
//! microseconds, where the service is milliseconds away. In return its few
//! connections stay warm, which a pool for each thread would not manage.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::header::CONTENT_TYPE;
use platform::files::FileSource;
use platform::grpc::BytesHeld;
use platform::pot::Holder;
use reqwest::{Certificate, Client, Proxy, Response, Url, redirect};
use tokio::time::{Instant, timeout_at};

use super::Provider;
use crate::credential::printable;
use crate::dialect::HttpRequest;
use crate::error::{Health, ProviderError};
use crate::settings::{InvalidSetting, ModelSettings};
use crate::usage::CallContext;

/// The longest response of a service.
const RESPONSE_BYTES_MAX: usize = 64 << 20;
/// The maximum bytes read of an error response.
const ERROR_BYTES_MAX: usize = 16 << 10;
/// How far a service may be ahead of a slow reader of one stream.
const WINDOW_BYTES: u32 = 1 << 20;
/// A file with certificate authorities has less.
const CA_BYTES_MAX: u64 = 4 << 20;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const IDLE_TIMEOUT: Duration = Duration::from_secs(90);
/// Before the first retry; twice as long before each further one, with jitter.
const BACKOFF: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(2);
/// A longer response is parsed on a blocking thread, so that a shard does not
/// stall.
const INLINE_PARSE_BYTES_MAX: usize = 256 << 10;
/// A call that times out sooner proves nothing against a service, nor does one
/// that times out within a quarter of the model's own timeout.
const TIMEOUT_BLAME_MIN: Duration = Duration::from_secs(1);
/// The part of a deadline that is reserved for reporting a timeout.
const REPORT_MARGIN: Duration = Duration::from_millis(10);

/// The client of one model; the error says which field is wrong.
pub(crate) fn build(model: &ModelSettings) -> Result<Client, InvalidSetting> {
    // A slow reader of one stream must not keep others from the connection.
    let calls = u32::try_from(model.concurrency_max).unwrap_or(u32::MAX);
    let window = WINDOW_BYTES.saturating_mul(calls).min(1 << 30);
    let mut builder = Client::builder()
        .user_agent(concat!("andon/", env!("CARGO_PKG_VERSION")))
        .redirect(redirect::Policy::none())
        .referer(false)
        .no_proxy()
        .connect_timeout(CONNECT_TIMEOUT)
        .pool_idle_timeout(IDLE_TIMEOUT)
        .pool_max_idle_per_host(model.concurrency_max)
        .http2_initial_stream_window_size(WINDOW_BYTES)
        .http2_initial_connection_window_size(window)
        .http2_keep_alive_interval(Duration::from_secs(20))
        .http2_keep_alive_timeout(Duration::from_secs(10));
    if let Some(path) = &model.ca_file {
        let invalid = |reason| InvalidSetting::new("ca_file", reason);
        let source = FileSource::new(path, "CA certificates", CA_BYTES_MAX);
        let pem = source.read().map_err(|error| invalid(error.to_string()))?;
        let authorities = Certificate::from_pem_bundle(&pem).unwrap_or_default();
        if authorities.is_empty() {
            return Err(invalid(format!("{source} has no certificate in PEM")));
        }
        builder = builder.tls_certs_only(authorities);
    } else if model.base_url.starts_with("http://") {
        // Without TLS, a machine without certificate authorities will do.
        builder = builder.tls_certs_only([]);
    }
    if let Some(proxy) = &model.proxy {
        let reason = "must be a URL such as http://host:port";
        let proxy = Proxy::all(proxy).map_err(|_| InvalidSetting::new("proxy", reason))?;
        builder = builder.proxy(proxy);
    }
    builder.build().map_err(|error| {
        let reason = root_cause(&error);
        InvalidSetting::new(
            "base_url",
            format!("the HTTP client cannot be created: {reason}"),
        )
    })
}

/// The URL of a call.
fn url(base: &Url, path: &str) -> Url {
    let mut url = base.clone();
    let joined = format!("{}{path}", base.path().trim_end_matches('/'));
    url.set_path(&joined);
    url
}

/// When a timeout must be known, so that it can be reported by the deadline.
pub(super) fn report_by(deadline: Instant) -> Instant {
    let left = deadline.saturating_duration_since(Instant::now());
    deadline - REPORT_MARGIN.min(left / 10)
}

/// The body of a response; its bytes count as in flight.
struct ResponseBody {
    bytes: Bytes,
    _held: Vec<BytesHeld>,
}

impl Provider {
    /// When a call must have its response: early enough to say whose fault it
    /// is that there is none.
    pub(crate) fn ends(&self, deadline: Instant) -> Instant {
        (Instant::now() + self.settings.timeout).min(report_by(deadline))
    }

    /// Whether the service is to blame for having no response at the deadline of
    /// a call that began then. A service that makes callers time out is as bad as
    /// one that fails; a caller who had little time proves nothing.
    pub(super) fn is_late(&self, started: Instant) -> bool {
        let timeout = self.settings.timeout;
        let blame_after = TIMEOUT_BLAME_MIN.max(timeout / 4).min(timeout);
        started.elapsed() >= blame_after
    }

    /// Makes a call, with retries, until `parse` accepts a response, and
    /// counts the outcome.
    pub(crate) async fn exchange<T>(
        self: &Arc<Self>,
        outgoing: &HttpRequest,
        context: CallContext<'_>,
        parse: impl Fn(&[u8]) -> Result<T, ProviderError> + Clone + Send + 'static,
    ) -> Result<T, ProviderError>
    where
        T: Send + 'static,
    {
        let (started, ends) = (Instant::now(), context.deadline);
        let attempts = self.retry(context, || async {
            let response = self.send(outgoing).await?;
            let body = self.read_body(response, context.holder).await?;
            if body.bytes.len() <= INLINE_PARSE_BYTES_MAX {
                return parse(&body.bytes);
            }
            let parse = parse.clone();
            tokio::task::spawn_blocking(move || parse(&body.bytes))
                .await
                .unwrap_or(Err(ProviderError::InvalidResponse("parsing it failed")))
        });
        let result = match timeout_at(ends, attempts).await {
            Ok(result) => result.map(|(response, mut attempt)| {
                attempt.end(None);
                response
            }),
            Err(_) => Err(ProviderError::Timeout),
        };
        let outcome = result.as_ref().err().map_or("ok", ProviderError::outcome);
        self.metrics.ended(&self.name, outcome, started.elapsed());
        result
    }

    /// Makes a call, with retries, until a response begins. Whether it ends
    /// well is recorded by its reader.
    pub(crate) async fn open(
        self: &Arc<Self>,
        outgoing: &HttpRequest,
        context: CallContext<'_>,
    ) -> Result<Response, ProviderError> {
        let started = Instant::now();
        let attempts = self.retry(context, || self.send(outgoing));
        let opened = timeout_at(context.deadline, attempts).await;
        match opened.unwrap_or(Err(ProviderError::Timeout)) {
            Ok((response, mut attempt)) => {
                attempt.opened();
                Ok(response)
            }
            Err(error) => {
                let took = started.elapsed();
                self.metrics.ended(&self.name, error.outcome(), took);
                Err(error)
            }
        }
    }

    /// Attempts a call until it succeeds, within the retries, the retry budget
    /// and the time.
    async fn retry<T, F>(
        self: &Arc<Self>,
        context: CallContext<'_>,
        call: impl Fn() -> F,
    ) -> Result<(T, Attempt), ProviderError>
    where
        F: Future<Output = Result<T, ProviderError>>,
    {
        let (ends, holder) = (context.deadline, context.holder);
        let mut retries = 0;
        let mut last = None;
        loop {
            if let Err(ejection) = self.breaker.admit() {
                return Err(last.unwrap_or(ProviderError::CircuitOpen(ejection)));
            }
            self.breaker.called_by(holder);
            let mut attempt = Attempt::begin(self.clone(), ends, holder);
            let error = match call().await {
                Ok(response) => {
                    self.retry_budgets.succeeded(holder);
                    return Ok((response, attempt));
                }
                Err(error) => error,
            };
            attempt.end(Some(&error));
            let pause = error.retry_after().unwrap_or_else(|| backoff(retries));
            // What its caller has no time for costs nothing of the budget.
            let again = error.is_retryable()
                && retries < self.settings.retries_max
                && Instant::now() + pause < ends
                && self.retry_budgets.failed(holder);
            if !again {
                return Err(error);
            }
            self.metrics.retried(&self.name, error.outcome());
            tokio::time::sleep(pause).await;
            retries += 1;
            last = Some(error);
        }
    }

    /// Sends once; a status that is no success is an error.
    async fn send(&self, outgoing: &HttpRequest) -> Result<Response, ProviderError> {
        let dialect = self.settings.kind;
        let mut request = self
            .client
            .post(url(&self.base_url, &outgoing.path))
            .header(CONTENT_TYPE, "application/json")
            .body(outgoing.body.clone());
        for (name, value) in dialect.headers() {
            request = request.header(*name, *value);
        }
        let secret = self.credential.current();
        if let Some(secret) = &secret {
            request = request.header(self.credential.header_name(), secret.header());
        }
        let response = request.send().await.map_err(|e| self.transport(&e))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let headers = response.headers().clone();
        let body = read_error_body(response).await;
        let message = dialect.error_message(&body).unwrap_or_default();
        let message = printable(&message, secret.as_deref());
        Err(ProviderError::from_status(
            status.as_u16(),
            &headers,
            message,
        ))
    }

    /// An error of the connection. Its cause is for the log of the gateway, and not
    /// for callers.
    fn transport(&self, error: &reqwest::Error) -> ProviderError {
        let reason = root_cause(error);
        tracing::debug!(model = %self.name, %reason, "a provider could not be called");
        ProviderError::from_transport(error)
    }

    async fn read_body(
        &self,
        mut response: Response,
        holder: &Holder,
    ) -> Result<ResponseBody, ProviderError> {
        let limits = self.limits.held_by(holder.clone());
        let mut held = Vec::new();
        let mut body = BytesMut::new();
        while let Some(chunk) = response.chunk().await.map_err(|e| self.transport(&e))? {
            if body.len() + chunk.len() > RESPONSE_BYTES_MAX {
                return Err(ProviderError::ResponseTooLarge);
            }
            let more = limits.budget.take(chunk.len());
            held.extend(more.map_err(|_| ProviderError::BytesInFlight)?);
            body.extend_from_slice(&chunk);
        }
        Ok(ResponseBody {
            bytes: body.freeze(),
            _held: held,
        })
    }

    /// Tells the circuit breaker the outcome of a call.
    pub(crate) fn record_outcome(&self, error: Option<&ProviderError>, caller: &Holder) {
        match error.map_or(Health::Healthy, ProviderError::health) {
            Health::Healthy => self.record_success(),
            Health::Unhealthy => {
                self.record_failure(error.map_or("", ProviderError::outcome), caller);
            }
            Health::Unknown => self.breaker.abandon_probe(),
        }
    }

    /// Records a failure at a request of a caller, who may be the reason.
    fn record_failure(&self, reason: &'static str, caller: &Holder) {
        if let Some(ejection) = self.breaker.failed_by(caller) {
            self.metrics.breaker(&self.name, true);
            let model = &self.name;
            tracing::warn!(%model, reason, ?ejection, "a provider failed repeatedly: its circuit breaker is open");
        }
    }

    fn record_success(&self) {
        if self.breaker.succeeded() {
            self.metrics.breaker(&self.name, false);
            tracing::info!(model = %self.name, "a provider responds again: its circuit breaker is closed");
        }
    }
}

/// The beginning of a response that is no success.
async fn read_error_body(mut response: Response) -> Vec<u8> {
    let mut body = Vec::new();
    while let Ok(Some(chunk)) = response.chunk().await {
        let room = ERROR_BYTES_MAX - body.len();
        body.extend_from_slice(&chunk[..chunk.len().min(room)]);
        if body.len() == ERROR_BYTES_MAX {
            break;
        }
    }
    body
}

fn backoff(retries: u32) -> Duration {
    let backoff = BACKOFF.saturating_mul(1 << retries.min(10));
    backoff
        .min(BACKOFF_MAX)
        .mul_f64(rand::random_range(0.5..1.5))
}

/// The innermost cause of an error: reqwest's own messages hold the URL.
fn root_cause(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    if cause.is::<reqwest::Error>() {
        "the connection failed".to_owned()
    } else {
        cause.to_string()
    }
}

/// A call in flight. The circuit breaker learns of it however it ends.
struct Attempt {
    provider: Arc<Provider>,
    started: Instant,
    ends: Instant,
    caller: Holder,
    ended: bool,
}

impl Attempt {
    fn begin(provider: Arc<Provider>, ends: Instant, caller: &Holder) -> Self {
        Self {
            provider,
            started: Instant::now(),
            ends,
            caller: caller.clone(),
            ended: false,
        }
    }

    /// The call succeeded or failed.
    fn end(&mut self, error: Option<&ProviderError>) {
        self.ended = true;
        self.provider.record_outcome(error, &self.caller);
    }

    /// A response has begun. That is enough to close an open circuit: whether
    /// it ends well may take long to see.
    fn opened(&mut self) {
        self.ended = true;
        if self.provider.breaker.is_open() {
            self.provider.record_success();
        }
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        // A caller who left proves nothing.
        if Instant::now() >= self.ends && self.provider.is_late(self.started) {
            self.provider.record_failure("late", &self.caller);
        } else {
            self.provider.breaker.abandon_probe();
        }
    }
}
