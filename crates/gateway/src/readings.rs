//! Gauges that are read when the metrics are collected.

use std::sync::Arc;

use platform::grpc::MessageLimits;
use platform::metrics::Metrics;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::gauge::ConstGauge;

use crate::route::Routes;
use crate::shed::Shed;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabel {
    state: &'static str,
}

/// The gauges of a gateway.
#[derive(Debug)]
pub struct Readings {
    /// The workers.
    pub routes: Arc<Routes>,
    /// The calls in flight.
    pub shed: Arc<Shed>,
    /// The bytes in flight.
    pub limits: MessageLimits,
}

impl Readings {
    /// Reads the gauges whenever the metrics are collected.
    pub fn register(self, metrics: &Metrics) {
        metrics.register(|registry| registry.register_collector(Box::new(self)));
    }
}

impl Collector for Readings {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let number = |count: usize| ConstGauge::new(i64::try_from(count).unwrap_or(i64::MAX));
        for (name, help, count) in [
            (
                "andon_gateway_in_flight",
                "Calls in flight",
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
        let count = |state: &str| {
            let states = table.upstreams.iter().map(|upstream| {
                match (upstream.reachable(), upstream.circuit_open()) {
                    (false, _) => "connecting",
                    (true, true) => "ejected",
                    (true, false) => "ready",
                }
            });
            states.filter(|other| *other == state).count()
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
