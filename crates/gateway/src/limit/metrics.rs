//! The metrics of quotas.

use std::sync::atomic::AtomicU64;

use platform::metrics::Metrics;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;

/// The limits that refuse calls: their series are there from the start, so that
/// the first refusals are an increase.
const LIMITS: [&str; 12] = [
    "cost_per_day",
    "cost_per_month",
    "fair_deadline",
    "fair_queue",
    "in_flight",
    "items_per_day",
    "items_per_minute",
    "redis_busy",
    "redis_lost",
    "requests_per_second",
    "tokens_per_day",
    "tokens_per_minute",
];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LimitLabel {
    limit: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TenantLabel {
    tenant: String,
}

/// The metrics of quotas. Tenants are those of the policy: no caller creates a
/// label.
#[derive(Debug, Clone, Default)]
pub struct LimitMetrics {
    limited: Family<LimitLabel, Counter>,
    calls: Family<TenantLabel, Counter>,
    tokens: Family<TenantLabel, Counter>,
    cost: Family<TenantLabel, Counter<f64, AtomicU64>>,
    /// Calls waiting for their tenant's turn.
    pub fair_waiting: Gauge,
}

impl LimitMetrics {
    /// The calls that a limit refused.
    pub fn limited(&self, limit: &'static str) -> Counter {
        self.limited.get_or_create_owned(&LimitLabel { limit })
    }

    /// Counts a call of a tenant.
    pub fn called(&self, tenant: &str) {
        let tenant = tenant.to_owned();
        self.calls.get_or_create(&TenantLabel { tenant }).inc();
    }

    /// Counts the usage of a tenant's responses.
    pub fn used(&self, tenant: &str, tokens: u64, cost: f64) {
        let label = TenantLabel {
            tenant: tenant.to_owned(),
        };
        if tokens > 0 {
            self.tokens.get_or_create(&label).inc_by(tokens);
        }
        if cost > 0.0 {
            self.cost.get_or_create(&label).inc_by(cost);
        }
    }

    /// Registers the metrics.
    pub fn register(&self, metrics: &Metrics) {
        for limit in LIMITS {
            drop(self.limited.get_or_create(&LimitLabel { limit }));
        }
        metrics.register(|registry| {
            let name = |name: &str| format!("andon_gateway_{name}");
            let help = "Calls refused by a limit";
            registry.register(name("limited"), help, self.limited.clone());
            let help = "Calls of each tenant after authentication";
            registry.register(name("tenant_calls"), help, self.calls.clone());
            let help = "Tokens computed for a tenant";
            registry.register(name("tokens"), help, self.tokens.clone());
            let help = "Cost of outside providers for a tenant's calls, in the currency of the price table";
            registry.register(name("cost"), help, self.cost.clone());
            let help = "Calls waiting for their tenant's turn";
            registry.register(name("fair_waiting"), help, self.fair_waiting.clone());
        });
    }
}
