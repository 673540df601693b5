//! Metrics of outside services.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use platform::metrics::{Metrics, duration_histogram};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabels {
    model: String,
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ModelLabel {
    model: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RetryLabels {
    model: String,
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CostLabels {
    tenant: String,
    model: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FallbackLabels {
    chain: String,
    reason: &'static str,
}

/// The metrics of all providers. Every label is a name of the catalogue, of the
/// policy or of this program. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ProviderMetrics {
    requests: Family<OutcomeLabels, Counter>,
    durations: Family<ModelLabel, Histogram, fn() -> Histogram>,
    retries: Family<RetryLabels, Counter>,
    breakers: Family<ModelLabel, Gauge>,
    costs: Family<CostLabels, Counter<f64, AtomicU64>>,
    fallbacks: Family<FallbackLabels, Counter>,
}

impl Default for ProviderMetrics {
    fn default() -> Self {
        Self {
            requests: Family::default(),
            durations: Family::new_with_constructor(duration_histogram as fn() -> Histogram),
            retries: Family::default(),
            breakers: Family::default(),
            costs: Family::default(),
            fallbacks: Family::default(),
        }
    }
}

impl ProviderMetrics {
    /// Registers the metrics.
    pub fn register(&self, metrics: &Metrics) {
        metrics.register(|registry| {
            let name = |name: &str| format!("andon_gateway_{name}");
            registry.register(
                name("provider_requests"),
                "Calls of outside services by outcome; retries are not counted",
                self.requests.clone(),
            );
            registry.register(
                name("provider_duration_seconds"),
                "Seconds from a call of an outside service to its whole response",
                self.durations.clone(),
            );
            registry.register(
                name("provider_retries"),
                "Retries of calls of outside services",
                self.retries.clone(),
            );
            registry.register(
                name("provider_breaker_open"),
                "1 while the circuit breaker of an outside service is open",
                self.breakers.clone(),
            );
            registry.register(
                name("provider_cost"),
                "Cost of calls of outside services, in the currency of the providers file",
                self.costs.clone(),
            );
            registry.register(
                name("fallbacks"),
                "Failed models of fallback chains, by the status that led to the next model",
                self.fallbacks.clone(),
            );
        });
    }

    /// A call ended.
    pub fn ended(&self, model: &str, outcome: &'static str, took: Duration) {
        let labels = OutcomeLabels {
            model: model.to_owned(),
            outcome,
        };
        self.requests.get_or_create(&labels).inc();
        let label = ModelLabel {
            model: model.to_owned(),
        };
        let duration = self.durations.get_or_create(&label);
        duration.observe(took.as_secs_f64());
    }

    /// A call is retried.
    pub fn retried(&self, model: &str, reason: &'static str) {
        let model = model.to_owned();
        let labels = RetryLabels { model, reason };
        self.retries.get_or_create(&labels).inc();
    }

    /// A circuit breaker opened or closed.
    pub fn breaker(&self, model: &str, open: bool) {
        let model = model.to_owned();
        let gauge = self.breakers.get_or_create(&ModelLabel { model });
        gauge.set(i64::from(open));
    }

    /// A tenant's call cost so much.
    pub fn charged(&self, tenant: &str, model: &str, cost: f64) {
        let labels = CostLabels {
            tenant: tenant.to_owned(),
            model: model.to_owned(),
        };
        self.costs.get_or_create(&labels).inc_by(cost);
    }

    /// A model of a chain failed.
    pub fn fallback(&self, chain: &str, reason: &'static str) {
        let chain = chain.to_owned();
        let labels = FallbackLabels { chain, reason };
        self.fallbacks.get_or_create(&labels).inc();
    }
}
