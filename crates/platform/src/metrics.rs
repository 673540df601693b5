//! The metrics of the process.

use std::sync::{Mutex, PoisonError};

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

/// The registry: roles register their metrics, and the admin port serves them.
#[derive(Debug)]
pub struct Metrics(Mutex<Registry>);

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::default();
        let build = Info::new([("version", crate::VERSION)]);
        registry.register("andon_build", "The version of the binary", build);
        Self(Mutex::new(registry))
    }
}

impl Metrics {
    /// Lets a role register its metrics.
    pub fn register<T>(&self, register: impl FnOnce(&mut Registry) -> T) -> T {
        register(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Every metric in the OpenMetrics text format.
    pub fn to_text(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        encode(
            &mut text,
            &self.0.lock().unwrap_or_else(PoisonError::into_inner),
        )?;
        Ok(text)
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
