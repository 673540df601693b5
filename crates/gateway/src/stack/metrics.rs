//! The metrics of calls at both doors.

use platform::metrics::{Metrics, duration_histogram};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use protocol::{Error, Method};
use tokio::time::Instant;

use super::Stack;
use crate::policy::Caller;
use crate::request::ModelSelector;
use crate::route::Plan;

/// The code of a call whose caller left before there was a response.
const CANCELLED: &str = "CANCELLED";
/// The codes that alerts count: their series are there when a model is known, and
/// from the first call of any other method, so that failures are an increase.
const COUNTED_CODES: [&str; 6] = [
    "OK",
    "UNKNOWN",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "DEADLINE_EXCEEDED",
];

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

/// The metrics of calls at both doors.
#[derive(Debug, Clone)]
pub struct CallMetrics {
    requests: Family<RequestLabels, Counter>,
    durations: Family<MethodLabel, Histogram, fn() -> Histogram>,
}

impl CallMetrics {
    /// Registers the metrics.
    pub fn register(metrics: &Metrics) -> Self {
        let new = Self {
            requests: Family::default(),
            durations: Family::new_with_constructor(duration_histogram as fn() -> Histogram),
        };
        metrics.register(|registry| {
            registry.register(
                "andon_gateway_requests",
                "Calls by model, method and status code",
                new.requests.clone(),
            );
            registry.register(
                "andon_gateway_request_duration_seconds",
                "From the call to the head of its response",
                new.durations.clone(),
            );
        });
        new
    }

    fn count(&self, labels: &RequestLabels) {
        if let Some(counter) = self.requests.get(labels) {
            counter.inc();
            return;
        }
        self.begin_at_zero(&labels.model, labels.method);
        self.requests.get_or_create(labels).inc();
    }

    /// A model is known: it may be called.
    pub fn known(&self, model: &str) {
        self.begin_at_zero(model, Method::ModelInfer.name());
    }

    fn begin_at_zero(&self, model: &str, method: &'static str) {
        for code in COUNTED_CODES {
            let labels = RequestLabels {
                model: model.to_owned(),
                method,
                code,
            };
            drop(self.requests.get_or_create(&labels));
        }
    }

    /// Begins the record of a call.
    pub fn begin(&self, method: &'static str, arrived: Instant) -> CallRecord {
        CallRecord {
            metrics: self.clone(),
            method,
            arrived,
            model: String::new(),
            code: None,
        }
    }
}

/// The record of one call. It is counted when it is dropped: as cancelled, when
/// its caller left before there was a response.
#[derive(Debug)]
pub struct CallRecord {
    metrics: CallMetrics,
    method: &'static str,
    arrived: Instant,
    code: Option<&'static str>,
    /// The model, once it is known to exist: no caller creates a label.
    pub model: String,
}

impl CallRecord {
    /// route: decides which model responds to the call, and counts it for that,
    /// or for the one that it names and that cannot respond now.
    pub fn route(
        &mut self,
        stack: &Stack,
        selector: &ModelSelector,
        caller: &Caller,
    ) -> Result<Plan, Error> {
        let plan = stack.route(selector, caller);
        let name = match &plan {
            Ok(plan) => Some(plan.name()),
            Err(_) => stack.label(selector),
        };
        name.unwrap_or_default().clone_into(&mut self.model);
        plan
    }

    /// Ends the call with the name of a status code.
    pub fn end(mut self, code: &'static str) {
        self.code = Some(code);
    }
}

impl Drop for CallRecord {
    fn drop(&mut self) {
        let method = self.method;
        let labels = RequestLabels {
            model: std::mem::take(&mut self.model),
            method,
            code: self.code.unwrap_or(CANCELLED),
        };
        self.metrics.count(&labels);
        if self.code.is_some() {
            let elapsed = self.arrived.elapsed().as_secs_f64();
            let durations = &self.metrics.durations;
            durations
                .get_or_create(&MethodLabel { method })
                .observe(elapsed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_whose_caller_left_is_counted_as_cancelled() {
        let registry = Metrics::default();
        let metrics = CallMetrics::register(&registry);
        metrics.known("digits");
        metrics.begin("ModelInfer", Instant::now()).end("OK");
        let mut left = metrics.begin("ModelInfer", Instant::now());
        left.model.push_str("minilm");
        drop(left);
        let text = registry.to_text().unwrap();
        for line in [
            r#"andon_gateway_requests_total{model="",method="ModelInfer",code="OK"} 1"#,
            r#"andon_gateway_requests_total{model="minilm",method="ModelInfer",code="CANCELLED"} 1"#,
            r#"andon_gateway_requests_total{model="minilm",method="ModelInfer",code="UNAVAILABLE"} 0"#,
            r#"andon_gateway_requests_total{model="digits",method="ModelInfer",code="UNAVAILABLE"} 0"#,
            r#"andon_gateway_request_duration_seconds_count{method="ModelInfer"} 1"#,
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
    }
}
