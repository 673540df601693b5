//! The report: a readable table, or JSON for programs.

use std::future::Future;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use super::super::print::visible;
use super::load::{Load, RunResults, StopAfter};

/// How often the progress bar is drawn: rarely, since it takes CPU time from
/// the server that is measured.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(250);

/// The results of all levels.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The model's name.
    pub model: String,
    /// The server's address.
    pub address: String,
    /// Raw bytes of a request's inputs.
    pub payload_bytes: usize,
    /// The results by concurrency.
    pub levels: Vec<Level>,
}

/// The results at one concurrency.
#[derive(Debug, Serialize)]
pub struct Level {
    concurrency: u32,
    /// Requests that succeeded; rates and latencies are theirs.
    pub requests: u64,
    errors: u64,
    seconds: f64,
    requests_per_second: f64,
    rows_per_second: f64,
    mean_us: f64,
    p50_us: f64,
    p90_us: f64,
    p99_us: f64,
    p999_us: f64,
    max_us: f64,
    #[serde(skip)]
    errors_by_code: Vec<(&'static str, u64, String)>,
}

impl Level {
    /// The results of one run of requests with this many rows each.
    pub fn new(concurrency: u32, rows: u64, results: RunResults, elapsed: Duration) -> Self {
        let latencies = &results.latencies;
        let seconds = elapsed.as_secs_f64();
        let per_second = latencies.len() as f64 / seconds.max(f64::MIN_POSITIVE);
        let micros = |nanos: f64| tenths(nanos / 1000.0);
        let quantile = |quantile| micros(latencies.value_at_quantile(quantile) as f64);
        let errors = results.errors.into_iter();
        let errors_by_code: Vec<_> = errors
            .map(|(code, (count, message))| (code, count, message))
            .collect();
        Self {
            concurrency,
            requests: latencies.len(),
            errors: errors_by_code.iter().map(|(_, count, _)| count).sum(),
            seconds: (seconds * 1000.0).round() / 1000.0,
            requests_per_second: tenths(per_second),
            rows_per_second: tenths(per_second * rows as f64),
            mean_us: if latencies.is_empty() {
                0.0
            } else {
                micros(latencies.mean())
            },
            p50_us: quantile(0.5),
            p90_us: quantile(0.9),
            p99_us: quantile(0.99),
            p999_us: quantile(0.999),
            max_us: micros(latencies.max() as f64),
            errors_by_code,
        }
    }

    /// The level's line of the table.
    pub fn line(&self) -> String {
        format!(
            "{:>9} {:>10} {:>8} {:>10.1} {:>10.1} {:>10.1} {:>10.1} {:>10.1} {:>10.1} {:>10.1} {:>10.1}\n",
            self.concurrency,
            self.requests,
            self.errors,
            self.requests_per_second,
            self.rows_per_second,
            self.mean_us,
            self.p50_us,
            self.p90_us,
            self.p99_us,
            self.p999_us,
            self.max_us,
        )
    }

    /// A line for each code among the errors.
    pub fn error_lines(&self) -> Vec<String> {
        let lines = self.errors_by_code.iter().map(|(code, count, message)| {
            let concurrency = self.concurrency;
            format!(
                "{concurrency} in flight: {code} × {count}, for example: {}",
                visible(message)
            )
        });
        lines.collect()
    }
}

impl Report {
    /// The head of the table.
    pub fn heading(&self) -> String {
        format!(
            "{} at {}, {} raw bytes per request, latencies in µs\n\n\
             {:>9} {:>10} {:>8} {:>10} {:>10} {:>10} {:>10} {:>10} {:>10} {:>10} {:>10}\n",
            self.model,
            self.address,
            self.payload_bytes,
            "IN FLIGHT",
            "REQUESTS",
            "ERRORS",
            "REQUESTS/S",
            "ROWS/S",
            "MEAN",
            "P50",
            "P90",
            "P99",
            "P99.9",
            "MAX",
        )
    }
}

fn tenths(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

/// A progress bar on standard error, if that is a terminal.
pub fn progress(name: &str, stop: &StopAfter) -> ProgressBar {
    let (length, template) = match stop {
        StopAfter::Elapsed(duration) => (
            u64::try_from(duration.as_millis()).unwrap_or(u64::MAX),
            "{prefix} {bar:32} {elapsed} {msg}",
        ),
        StopAfter::Requests(requests) => (*requests, "{prefix} {bar:32} {pos}/{len} {msg}"),
    };
    let bar = ProgressBar::with_draw_target(Some(length), ProgressDrawTarget::stderr());
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.set_prefix(name.to_owned());
    bar
}

/// Draws the progress bar while the load runs.
pub async fn with_progress<T>(
    bar: &ProgressBar,
    load: &Load,
    stop: StopAfter,
    run: impl Future<Output = T>,
) -> T {
    let mut run = std::pin::pin!(run);
    if bar.is_hidden() {
        return run.await;
    }
    let started = std::time::Instant::now();
    let mut ticks = tokio::time::interval(PROGRESS_INTERVAL);
    loop {
        tokio::select! {
            outcome = &mut run => return outcome,
            _ = ticks.tick() => {
                let (sent, elapsed) = (load.started(), started.elapsed());
                bar.set_position(match stop {
                    StopAfter::Elapsed(_) => u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX),
                    StopAfter::Requests(_) => sent,
                });
                let seconds = elapsed.as_secs_f64().max(f64::MIN_POSITIVE);
                bar.set_message(format!("{:.0}/s", sent as f64 / seconds));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_has_the_keys_that_programs_read() {
        let results = super::super::load::tests::results(&[1_000_000, 3_000_000], 1);
        let level = Level::new(8, 4, results, Duration::from_secs(2));
        let lines = level.error_lines();
        assert_eq!(lines, ["8 in flight: UNAVAILABLE × 1, for example: full"]);
        let report = Report {
            model: "m".into(),
            address: "a:1".into(),
            payload_bytes: 5,
            levels: vec![level],
        };
        let json = serde_json::to_value(&report).unwrap();
        let level = &json["levels"][0];
        let keys: Vec<&String> = level.as_object().unwrap().keys().collect();
        assert_eq!(keys.len(), 12, "{keys:?}");
        assert_eq!(
            (level["requests"].as_u64(), level["errors"].as_u64()),
            (Some(2), Some(1))
        );
        assert_eq!(level["requests_per_second"], 1.0);
        assert_eq!(level["rows_per_second"], 4.0);
        let p50 = level["p50_us"].as_f64().unwrap();
        assert!((p50 - 1000.0).abs() < 1.0, "{p50}");
    }
}
