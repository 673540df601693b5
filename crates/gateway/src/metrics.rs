//! What the gateway did.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use platform::grpc::MessageLimits;
use platform::metrics::{Metrics, duration_histogram};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use tokio::time::Instant;

use crate::redis::Redis;
use crate::route::Routes;
use crate::shed::Shed;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    model: String,
    method: &'static str,
    code: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct MethodLabel {
    method: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WorkerLabel {
    worker: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabel {
    state: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LimitLabel {
    limit: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TenantLabel {
    tenant: String,
}

type Durations<L> = Family<L, Histogram, fn() -> Histogram>;

/// What the gateway counts.
#[derive(Debug, Clone)]
pub struct GatewayMetrics {
    requests: Family<RequestLabels, Counter>,
    durations: Durations<MethodLabel>,
    upstream_durations: Durations<WorkerLabel>,
    shed: Family<ReasonLabel, Counter>,
    /// What quotas count.
    pub limit: LimitMetrics,
    /// What the balancer counts.
    pub balance: BalanceMetrics,
}

/// What is counted of one worker.
#[derive(Debug, Clone)]
pub struct UpstreamNumbers {
    /// From sending a call to its whole answer.
    pub duration: Histogram,
    /// Times that it was left alone because it failed.
    pub ejections: Counter,
}

/// What the balancer counts.
#[derive(Debug, Clone, Default)]
pub struct BalanceMetrics {
    retries: Family<ReasonLabel, Counter>,
    ejections: Family<WorkerLabel, Counter>,
    /// Calls that were not sent again because the budget was spent.
    pub budget_exhausted: Counter,
}

impl BalanceMetrics {
    /// A call is sent again.
    pub fn retried(&self, reason: &'static str) {
        self.retries.get_or_create(&ReasonLabel { reason }).inc();
    }
}

/// What quotas count. Tenants are those of the policy: callers cannot make
/// labels.
#[derive(Debug, Clone, Default)]
pub struct LimitMetrics {
    limited: Family<LimitLabel, Counter>,
    calls: Family<TenantLabel, Counter>,
    tokens: Family<TenantLabel, Counter>,
    cost: Family<TenantLabel, Counter<f64, AtomicU64>>,
    /// Calls that wait for their tenant's turn.
    pub fair_waiting: Gauge,
}

impl LimitMetrics {
    /// Counts the calls that a limit refuses.
    pub fn limited(&self, limit: &'static str) -> Counter {
        self.limited.get_or_create_owned(&LimitLabel { limit })
    }

    /// A call of a tenant's that the policy names.
    pub fn called(&self, tenant: &str) {
        let tenant = tenant.to_owned();
        self.calls.get_or_create(&TenantLabel { tenant }).inc();
    }

    /// What a tenant's answers took.
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

    fn register(&self, registry: &mut Registry) {
        let name = |name: &str| format!("andon_gateway_{name}");
        let help = "Calls refused, by the limit that refused them";
        registry.register(name("limited"), help, self.limited.clone());
        let help = "Calls of each tenant, once it was recognized";
        registry.register(name("tenant_calls"), help, self.calls.clone());
        let help = "Tokens computed for a tenant";
        registry.register(name("tokens"), help, self.tokens.clone());
        let help =
            "What outside providers take for a tenant's calls, in the currency of the price table";
        registry.register(name("cost"), help, self.cost.clone());
        let help = "Calls that wait for their tenant's turn";
        registry.register(name("fair_waiting"), help, self.fair_waiting.clone());
    }
}

/// What is counted of callers that are not recognized.
#[derive(Debug, Clone, Default)]
pub struct AuthMetrics {
    refused: Family<ReasonLabel, Counter>,
}

impl AuthMetrics {
    /// Registers what is counted.
    pub fn register(&self, metrics: &Metrics) {
        metrics.register(|registry| {
            registry.register(
                "andon_gateway_auth_refused",
                "Calls whose caller was not recognized",
                self.refused.clone(),
            );
        });
    }

    /// A call is refused.
    pub fn refused(&self, reason: &'static str) {
        self.refused.get_or_create(&ReasonLabel { reason }).inc();
    }
}

impl GatewayMetrics {
    /// Registers what is counted, and whether Redis answers where there is one.
    pub fn register(metrics: &Metrics, redis: Option<&Redis>) -> Self {
        let made = Self {
            requests: Family::default(),
            durations: Family::new_with_constructor(duration_histogram as fn() -> Histogram),
            upstream_durations: Family::new_with_constructor(
                duration_histogram as fn() -> Histogram,
            ),
            shed: Family::default(),
            limit: LimitMetrics::default(),
            balance: BalanceMetrics::default(),
        };
        for reason in [
            "unavailable",
            "not_found",
            "not_sent",
            "broken",
            "too_large",
        ] {
            drop(made.balance.retries.get_or_create(&ReasonLabel { reason }));
        }
        metrics.register(|registry| {
            let name = |name: &str| format!("andon_gateway_{name}");
            registry.register(name("requests"), "Calls answered", made.requests.clone());
            registry.register(
                name("request_duration_seconds"),
                "From call to the head of its reply",
                made.durations.clone(),
            );
            registry.register(
                name("upstream_duration_seconds"),
                "From sending a call to its whole answer",
                made.upstream_durations.clone(),
            );
            registry.register(name("shed"), "Calls refused at once", made.shed.clone());
            made.limit.register(registry);
            if let Some(redis) = redis {
                registry.register(name("redis_up"), "1 while Redis answers", redis.up());
            }
            let balance = &made.balance;
            registry.register(name("retries"), "Calls sent again", balance.retries.clone());
            registry.register(
                name("ejections"),
                "Times that a worker was left alone because it failed",
                balance.ejections.clone(),
            );
            registry.register(
                name("retry_budget_exhausted"),
                "Failures that were passed on because the budget was spent",
                balance.budget_exhausted.clone(),
            );
        });
        made
    }

    /// Counts the calls that are shed for a reason.
    pub fn shed(&self, reason: &'static str) -> Counter {
        self.shed.get_or_create_owned(&ReasonLabel { reason })
    }

    /// What is counted of one worker.
    pub fn upstream(&self, worker: String) -> UpstreamNumbers {
        let label = WorkerLabel { worker };
        UpstreamNumbers {
            ejections: self.balance.ejections.get_or_create_owned(&label),
            duration: self.upstream_durations.get_or_create_owned(&label),
        }
    }

    /// A call began.
    pub fn begin(&self, method: &'static str, arrived: Instant) -> Record {
        Record {
            metrics: self.clone(),
            method,
            arrived,
            model: String::new(),
        }
    }
}

/// A call that is being answered.
#[derive(Debug)]
pub struct Record {
    metrics: GatewayMetrics,
    method: &'static str,
    arrived: Instant,
    /// The model, once it is known to exist: callers cannot make labels.
    pub model: String,
}

impl Record {
    /// The call ended with the status of this name.
    pub fn end(self, code: &'static str) {
        let labels = RequestLabels {
            model: self.model,
            method: self.method,
            code,
        };
        self.metrics.requests.get_or_create(&labels).inc();
        let method = MethodLabel {
            method: self.method,
        };
        self.metrics
            .durations
            .get_or_create(&method)
            .observe(self.arrived.elapsed().as_secs_f64());
    }
}

/// Numbers that are read when somebody asks.
#[derive(Debug)]
pub struct Readings {
    /// The workers.
    pub routes: Arc<Routes>,
    /// The calls under way.
    pub shed: Arc<Shed>,
    /// The bytes in flight.
    pub limits: MessageLimits,
}

impl Collector for Readings {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let number = |count: usize| ConstGauge::new(i64::try_from(count).unwrap_or(i64::MAX));
        for (name, help, count) in [
            (
                "andon_gateway_in_flight",
                "Calls under way",
                self.shed.in_flight(),
            ),
            (
                "andon_gateway_bytes_in_flight",
                "Message bytes in flight",
                self.limits.budget.used(),
            ),
        ] {
            let gauge = number(count);
            let metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            gauge.encode(metric)?;
        }
        let table = self.routes.table();
        let count = |wanted: &str| {
            let states = table.upstreams.iter().map(|upstream| {
                match (upstream.reachable(), upstream.out()) {
                    (false, _) => "connecting",
                    (true, true) => "ejected",
                    (true, false) => "ready",
                }
            });
            states.filter(|state| *state == wanted).count()
        };
        let name = "andon_gateway_workers";
        let mut family = encoder.encode_descriptor(name, "Workers", None, MetricType::Gauge)?;
        for state in ["ready", "connecting", "ejected"] {
            let label = StateLabel { state };
            number(count(state)).encode(family.encode_family(&label)?)?;
        }
        Ok(())
    }
}
