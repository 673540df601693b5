//! Logs and traces. Logs go to standard error; traces go to an OTLP collector
//! when one is configured. Log levels and trace sampling can be changed while
//! the process runs.

use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use http::{HeaderMap, HeaderName, HeaderValue};
use opentelemetry::Context;
use opentelemetry::propagation::{Extractor, Injector, TextMapPropagator};
use opentelemetry::trace::{TraceContextExt, TracerProvider};
use opentelemetry_otlp::WithExportConfig;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing::{Level, Metadata, Span};
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};
use tracing_subscriber::{Layer, Registry};

/// The name in traces of a path that nobody serves.
pub const UNKNOWN_PATH: &str = "other";
/// The header of a trace context (W3C).
const PARENT: &str = "traceparent";
/// The target of the spans that are exported.
const REQUEST_TARGET: &str = "andon_request";

/// The format of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// Human-readable lines.
    Text,
    /// One JSON object per line.
    Json,
}

/// Logging and tracing at start.
#[derive(Debug, Clone, clap::Args)]
pub struct TelemetrySettings {
    /// Log level: error, warn, info, debug or trace
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    pub log: Level,
    /// Log format
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    pub log_format: LogFormat,
    /// OTLP collector (gRPC) that traces are sent to, for example
    /// http://127.0.0.1:4317
    #[arg(long, value_name = "URL")]
    pub otlp_endpoint: Option<String>,
    /// Sample one in COUNT of the calls. A trace context that says so leaves a
    /// call out; at the ports of callers none brings a call in. Workers follow
    /// the gateway
    #[arg(long, value_name = "COUNT", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub trace_rate: u32,
}

/// Why telemetry cannot start.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The collector's address cannot be used.
    #[error("--otlp-endpoint cannot be used: {0}")]
    Endpoint(#[from] opentelemetry_otlp::ExporterBuildError),
    /// Another subscriber is set.
    #[error("logging has already been started: {0}")]
    Started(#[from] TryInitError),
}

/// The current log levels and trace sampling. Cheap to clone.
#[derive(Debug, Clone)]
pub struct TelemetryControl(Arc<State>);

#[derive(Debug)]
struct State {
    error: AtomicBool,
    warn: AtomicBool,
    info: AtomicBool,
    /// 0 for the levels above only, 1 for debug, 2 for trace.
    verbose: AtomicU32,
    /// The crates that are logged at INFO and below; other people's crates are
    /// worth a line only when something is wrong.
    crates: &'static [&'static str],
    /// Whether a collector is configured.
    exports: bool,
    trace: AtomicBool,
    trace_rate: AtomicU32,
    /// Calls that the rate was asked about.
    counted: AtomicU64,
}

/// The levels that are logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say everything")]
pub struct LogLevels {
    pub error: bool,
    pub warn: bool,
    pub info: bool,
    /// 0 for none, 1 for debug, 2 and more for trace.
    pub verbose: u32,
}

/// The sampling of traces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceLevels {
    /// Whether a collector is configured: without one nothing is traced.
    pub exports: bool,
    /// Whether calls are traced.
    pub on: bool,
    /// One in `rate` calls is sampled.
    pub rate: u32,
}

/// Whose trace context a call carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TraceParent {
    /// A caller's: anybody may claim that a call is sampled, so that the rate
    /// holds for it too.
    Caller,
    /// A gateway's, which has decided.
    Gateway,
}

impl TelemetryControl {
    fn new(settings: &TelemetrySettings, crates: &'static [&'static str]) -> Self {
        let logs = |level: Level| AtomicBool::new(settings.log >= level);
        let exports = settings.otlp_endpoint.is_some();
        Self(Arc::new(State {
            error: logs(Level::ERROR),
            warn: logs(Level::WARN),
            info: logs(Level::INFO),
            verbose: AtomicU32::new(match settings.log {
                Level::TRACE => 2,
                Level::DEBUG => 1,
                _ => 0,
            }),
            crates,
            exports,
            trace: AtomicBool::new(exports),
            trace_rate: AtomicU32::new(settings.trace_rate),
            counted: AtomicU64::new(0),
        }))
    }

    /// The current log levels.
    pub fn log_levels(&self) -> LogLevels {
        LogLevels {
            error: self.0.error.load(Ordering::Relaxed),
            warn: self.0.warn.load(Ordering::Relaxed),
            info: self.0.info.load(Ordering::Relaxed),
            verbose: self.0.verbose.load(Ordering::Relaxed),
        }
    }

    /// Changes the log levels.
    pub fn set_log_levels(&self, levels: LogLevels) {
        self.0.error.store(levels.error, Ordering::Relaxed);
        self.0.warn.store(levels.warn, Ordering::Relaxed);
        self.0.info.store(levels.info, Ordering::Relaxed);
        self.0.verbose.store(levels.verbose, Ordering::Relaxed);
        tracing::callsite::rebuild_interest_cache();
    }

    /// The current sampling of traces.
    pub fn trace_levels(&self) -> TraceLevels {
        TraceLevels {
            exports: self.0.exports,
            on: self.0.trace.load(Ordering::Relaxed),
            rate: self.0.trace_rate.load(Ordering::Relaxed),
        }
    }

    /// Changes the sampling of traces.
    pub fn set_trace_levels(&self, on: bool, rate: u32) {
        self.0.trace.store(on, Ordering::Relaxed);
        self.0.trace_rate.store(rate.max(1), Ordering::Relaxed);
    }

    fn logs(&self, metadata: &Metadata<'_>) -> bool {
        let levels = self.log_levels();
        let ours = || {
            let name = metadata.target().split("::").next().unwrap_or_default();
            self.0.crates.contains(&name)
        };
        match *metadata.level() {
            Level::ERROR => levels.error,
            Level::WARN => levels.warn,
            Level::INFO => levels.info && ours(),
            Level::DEBUG => levels.verbose >= 1 && ours(),
            Level::TRACE => levels.verbose >= 2 && ours(),
        }
    }

    /// The span of a gRPC call, a child of the caller's span if it carries a
    /// trace context. A disabled span, which costs nothing, when the call is not
    /// sampled. `path` is one that is known, or [`UNKNOWN_PATH`]: a name of the
    /// caller's would be exported.
    pub fn request_span(
        &self,
        path: &'static str,
        headers: &HeaderMap,
        whose: TraceParent,
    ) -> Span {
        let Some(parent) = self.sampled(headers, whose) else {
            return Span::none();
        };
        let span = tracing::info_span!(
            target: REQUEST_TARGET,
            "call",
            otel.name = path,
            otel.kind = "server",
            rpc.system.name = "grpc",
            rpc.method = path,
            rpc.status_code = tracing::field::Empty,
            andon.cache = tracing::field::Empty,
            andon.tenant = tracing::field::Empty,
            andon.credential = tracing::field::Empty,
        );
        // The only error is a span that is not exported.
        let _ = span.set_parent(parent);
        span
    }

    /// The span of an HTTP request, likewise.
    pub fn http_span(&self, route: &'static str, id: &str, headers: &HeaderMap) -> Span {
        let Some(parent) = self.sampled(headers, TraceParent::Caller) else {
            return Span::none();
        };
        let span = tracing::info_span!(
            target: REQUEST_TARGET,
            "call",
            otel.name = route,
            otel.kind = "server",
            http.route = route,
            andon.request.id = id,
            andon.cache = tracing::field::Empty,
            andon.tenant = tracing::field::Empty,
            andon.credential = tracing::field::Empty,
        );
        // The only error is a span that is not exported.
        let _ = span.set_parent(parent);
        span
    }

    /// The parent context of a call's span, if the call is sampled.
    fn sampled(&self, headers: &HeaderMap, whose: TraceParent) -> Option<Context> {
        if !self.0.trace.load(Ordering::Relaxed) {
            return None;
        }
        let parent = TraceContextPropagator::new().extract(&Carrier(headers));
        let caller = parent.span().span_context().clone();
        let due = || {
            let rate = u64::from(self.0.trace_rate.load(Ordering::Relaxed));
            let number = self.0.counted.fetch_add(1, Ordering::Relaxed);
            number.is_multiple_of(rate)
        };
        let sampled = match (caller.is_valid(), whose) {
            (true, TraceParent::Gateway) => caller.is_sampled(),
            (true, TraceParent::Caller) => caller.is_sampled() && due(),
            (false, _) => due(),
        };
        sampled.then_some(parent)
    }
}

/// Writes the trace context of a forwarded call: the span's own context, or the
/// caller's when the call is not sampled, which says so then.
pub fn forward_trace(span: &Span, from: &HeaderMap, to: &mut HeaderMap) {
    if !span.is_none() {
        TraceContextPropagator::new().inject_context(&span.context(), &mut CarrierMut(to));
        return;
    }
    for name in [PARENT, "tracestate"] {
        if let Some(value) = from.get(name) {
            to.insert(HeaderName::from_static(name), value.clone());
        }
    }
    if let Some(parent) = to.get_mut(PARENT)
        && let Some(unsampled) = unsampled(parent)
    {
        *parent = unsampled;
    }
}

/// A trace context without its last flag, which says that the call is sampled.
fn unsampled(parent: &HeaderValue) -> Option<HeaderValue> {
    let (rest, flags) = parent.to_str().ok()?.rsplit_once('-')?;
    let flags = u8::from_str_radix(flags, 16).ok()? & !1;
    HeaderValue::try_from(format!("{rest}-{flags:02x}")).ok()
}

struct Carrier<'h>(&'h HeaderMap);

impl Extractor for Carrier<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(HeaderName::as_str).collect()
    }
}

struct CarrierMut<'h>(&'h mut HeaderMap);

impl Injector for CarrierMut<'_> {
    fn set(&mut self, key: &str, value: String) {
        let name = HeaderName::from_bytes(key.as_bytes());
        if let (Ok(name), Ok(value)) = (name, HeaderValue::try_from(value)) {
            self.0.insert(name, value);
        }
    }
}

/// Exports traces until it is dropped, which flushes the rest.
#[derive(Debug)]
pub struct Telemetry {
    /// Changes log levels and sampling.
    pub control: TelemetryControl,
    exporter: Option<SdkTracerProvider>,
}

impl Drop for Telemetry {
    fn drop(&mut self) {
        if let Some(exporter) = self.exporter.take()
            && let Err(error) = exporter.shutdown()
        {
            tracing::warn!(%error, "the last traces could not be exported");
        }
    }
}

/// Starts logging, and tracing when a collector is configured. Must be called
/// inside a runtime. `role` is the service name of the traces. Of crates that are
/// not in `crates` only warnings and errors are logged.
pub fn start(
    settings: &TelemetrySettings,
    role: &str,
    crates: &'static [&'static str],
) -> Result<Telemetry, TelemetryError> {
    let control = TelemetryControl::new(settings, crates);
    let filter = control.clone();
    let exporter = settings
        .otlp_endpoint
        .as_deref()
        .map(|endpoint| exporter(endpoint, role))
        .transpose()?;
    let logged = match settings.log_format {
        LogFormat::Text => tracing_subscriber::fmt::layer()
            .with_ansi(std::io::stderr().is_terminal())
            .with_writer(std::io::stderr)
            .with_filter(filter_fn(is_not_request_span))
            .boxed(),
        LogFormat::Json => tracing_subscriber::fmt::layer()
            .json()
            .flatten_event(true)
            .with_writer(std::io::stderr)
            .with_filter(filter_fn(is_not_request_span))
            .boxed(),
    };
    let exported = exporter
        .as_ref()
        .map(|exporter| tracing_opentelemetry::layer().with_tracer(exporter.tracer("andon")));
    // One filter before all layers: with a level filter on each layer, the spans
    // that h2 opens for every frame would be created and discarded at every call.
    Registry::default()
        .with(filter_fn(move |metadata| {
            metadata.target() == REQUEST_TARGET || filter.logs(metadata)
        }))
        .with(exported)
        .with(logged)
        .try_init()?;
    Ok(Telemetry { control, exporter })
}

/// Whether the log may show a span or an event: request spans hold user data,
/// and are for traces only.
fn is_not_request_span(metadata: &Metadata<'_>) -> bool {
    metadata.target() != REQUEST_TARGET
}

fn exporter(endpoint: &str, role: &str) -> Result<SdkTracerProvider, TelemetryError> {
    let exporter = opentelemetry_otlp::SpanExporter::builder()
        .with_tonic()
        .with_endpoint(endpoint)
        .build()?;
    let resource = opentelemetry_sdk::Resource::builder()
        .with_service_name(format!("andon-{role}"))
        .build();
    Ok(SdkTracerProvider::builder()
        .with_batch_exporter(exporter)
        .with_resource(resource)
        .build())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn control(rate: u32) -> TelemetryControl {
        let settings = TelemetrySettings {
            log: Level::ERROR,
            log_format: LogFormat::Text,
            otlp_endpoint: Some("http://127.0.0.1:1".to_owned()),
            trace_rate: rate,
        };
        TelemetryControl::new(&settings, &[])
    }

    fn with_parent(flags: &str) -> HeaderMap {
        let parent = format!("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-{flags}");
        let name = HeaderName::from_static(PARENT);
        HeaderMap::from_iter([(name, HeaderValue::try_from(parent).unwrap())])
    }

    #[test]
    fn a_strangers_trace_context_does_not_beat_the_rate() {
        let counted = |headers: &HeaderMap, whose: TraceParent| {
            let control = control(100);
            let calls = (0..3000).filter(|_| control.sampled(headers, whose).is_some());
            calls.count()
        };
        let (caller, gateway) = (TraceParent::Caller, TraceParent::Gateway);
        assert_eq!(counted(&HeaderMap::new(), caller), 30);
        assert_eq!(counted(&with_parent("01"), caller), 30);
        assert_eq!(counted(&with_parent("00"), caller), 0);
        assert_eq!(counted(&with_parent("01"), gateway), 3000);
        assert_eq!(counted(&with_parent("00"), gateway), 0);
    }

    #[test]
    fn what_is_not_sampled_is_not_sampled_further_on() {
        for (flags, forwarded) in [("01", "00"), ("00", "00"), ("03", "02")] {
            let mut to = HeaderMap::new();
            forward_trace(&Span::none(), &with_parent(flags), &mut to);
            assert_eq!(to, with_parent(forwarded));
            // Also what is forwarded as it came.
            let mut to = with_parent(flags);
            forward_trace(&Span::none(), &HeaderMap::new(), &mut to);
            assert_eq!(to, with_parent(forwarded));
        }
        for wrong in ["", "-", "00-0-zz", "-é"] {
            let mut to = HeaderMap::new();
            to.insert(PARENT, HeaderValue::try_from(wrong).unwrap());
            let before = to.clone();
            forward_trace(&Span::none(), &HeaderMap::new(), &mut to);
            assert_eq!(to, before);
        }
    }
}
