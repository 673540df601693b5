//! The metrics of the process.

mod text;

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;
use tokio::time::Instant;

/// A limit that refuses again and again is logged once in this time.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// The registry: roles register their metrics, and the admin port serves them.
#[derive(Debug)]
pub struct Metrics {
    registry: Mutex<Registry>,
    limits: Family<FlagLabel, Counter>,
    started: Instant,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FlagLabel {
    flag: &'static str,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::default();
        let build = Info::new([("version", crate::VERSION)]);
        registry.register("andon_build", "The version of the binary", build);
        let limits = Family::default();
        registry.register(
            "andon_limits_reached",
            "Times that a limit refused or ended something, by its flag",
            Family::clone(&limits),
        );
        Self {
            registry: Mutex::new(registry),
            limits,
            started: Instant::now(),
        }
    }
}

/// A limit that an operator can raise: it counts and logs when it refuses or
/// ends something. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Bound(Arc<BoundState>);

#[derive(Debug)]
struct BoundState {
    flag: &'static str,
    reached: Counter,
    started: Instant,
    /// Milliseconds from the start to the last log line, and one more.
    logged: AtomicU64,
}

impl Bound {
    /// The flag that sets the limit.
    pub fn flag(&self) -> &'static str {
        self.0.flag
    }

    /// Counts that the limit was reached, and logs it, but not every time.
    pub fn reached(&self) {
        let state = &*self.0;
        let count = state.reached.inc() + 1;
        if self.may_log() {
            let flag = state.flag;
            tracing::warn!(
                flag,
                count,
                "a limit was reached: raise it if honest callers need more"
            );
        }
    }

    fn may_log(&self) -> bool {
        let state = &*self.0;
        let now = state.started.elapsed().as_millis();
        let now = u64::try_from(now).unwrap_or(u64::MAX - 1) + 1;
        let interval = LOG_INTERVAL.as_millis() as u64;
        let log = |last: u64| (last == 0 || now >= last + interval).then_some(now);
        let logged = &state.logged;
        logged
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, log)
            .is_ok()
    }
}

impl Metrics {
    /// Lets a role register its metrics.
    pub fn register<T>(&self, register: impl FnOnce(&mut Registry) -> T) -> T {
        register(&mut self.registry.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The counter and the log line of the limit that a flag sets, such as
    /// `--connections-max`.
    pub fn bound(&self, flag: &'static str) -> Bound {
        Bound(Arc::new(BoundState {
            flag,
            reached: self.limits.get_or_create_owned(&FlagLabel { flag }),
            started: self.started,
            logged: AtomicU64::new(0),
        }))
    }

    /// Registers a gauge that is read when the metrics are collected.
    pub fn reading(
        &self,
        name: &'static str,
        help: &'static str,
        read: impl Fn() -> usize + Send + Sync + 'static,
    ) {
        let reading = Box::new(Reading { name, help, read });
        self.register(|registry| registry.register_collector(reading));
    }

    /// Every metric in Prometheus's text format, 0.0.4. A collector that declares
    /// its metric `unknown` gets a counter of its own name here.
    pub fn to_text(&self) -> Result<String, fmt::Error> {
        Ok(text::from_open_metrics(&self.to_open_metrics()?))
    }

    /// Every metric in the text format of OpenMetrics 1.0.0.
    pub fn to_open_metrics(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        encode(
            &mut text,
            &self.registry.lock().unwrap_or_else(PoisonError::into_inner),
        )?;
        Ok(text)
    }
}

/// A gauge that is read when the metrics are collected.
struct Reading<F> {
    name: &'static str,
    help: &'static str,
    read: F,
}

impl<F> fmt::Debug for Reading<F> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name)
    }
}

impl<F: Fn() -> usize + Send + Sync + 'static> Collector for Reading<F> {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let now = i64::try_from((self.read)()).unwrap_or(i64::MAX);
        let kind = MetricType::Gauge;
        let metric = encoder.encode_descriptor(self.name, self.help, None, kind)?;
        ConstGauge::new(now).encode(metric)
    }
}

/// A histogram of durations in seconds, from 50 µs to 52 s.
pub fn duration_histogram() -> Histogram {
    Histogram::new((0..21).map(|power| 0.000_05 * f64::from(1 << power)))
}

/// A histogram of counts, from 1 to 32,768.
pub fn count_histogram() -> Histogram {
    Histogram::new((0..16).map(|power| f64::from(1 << power)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_limit_counts_every_time_and_logs_now_and_then() {
        let metrics = Metrics::default();
        let bound = metrics.bound("--things-max");
        let logs = || (0..3).filter(|_| bound.may_log()).count();
        assert_eq!(logs(), 1);
        tokio::time::advance(LOG_INTERVAL).await;
        assert_eq!(logs(), 1);
        bound.reached();
        bound.reached();
        let text = metrics.to_text().unwrap();
        let line = "andon_limits_reached_total{flag=\"--things-max\"} 2";
        assert!(text.contains(line), "{text}");
        let open = metrics.to_open_metrics().unwrap();
        for (page, line) in [
            (&text, "# TYPE andon_limits_reached_total counter"),
            (&text, "# TYPE andon_build_info gauge"),
            (&open, "# TYPE andon_limits_reached counter"),
            (&open, "# TYPE andon_build info"),
        ] {
            assert!(page.lines().any(|one| one == line), "{line}: {page}");
        }
        assert!(open.ends_with("# EOF\n") && !text.contains("EOF"));
    }
}
