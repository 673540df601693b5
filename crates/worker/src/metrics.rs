//! What models did: Prometheus metrics under Andon's names and Triton's, and
//! the statistics of `ModelStatistics`. Each number is counted once.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use platform::metrics::{Metrics, count_histogram, duration_histogram};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::Histogram;
use protocol::inference::{
    InferBatchStatistics, InferStatistics, ModelStatistics, StatisticDuration,
};
use protocol::{ModelName, ModelVersion};
use tonic::Code;

use crate::queue::{Dropped, Queue};

#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, EncodeLabelSet)]
struct ModelLabels {
    model: String,
    version: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    model: String,
    version: String,
    method: &'static str,
    code: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RefusedLabels {
    model: String,
    version: String,
    reason: &'static str,
}

type Durations = Family<ModelLabels, Histogram, fn() -> Histogram>;

/// The metrics of all models of a worker.
#[derive(Debug, Clone)]
pub struct WorkerMetrics {
    requests: Family<RequestLabels, Counter>,
    refused: Family<RefusedLabels, Counter>,
    request_duration: Durations,
    queue_duration: Durations,
    compute_duration: Durations,
    tokenize_duration: Durations,
    batch_rows: Durations,
    batch_tokens: Durations,
    models: Models,
}

/// The models that are loaded, for what is read when somebody asks.
#[derive(Debug, Clone, Default)]
struct Models(Arc<Mutex<BTreeMap<ModelLabels, Weak<Statistics>>>>);

impl WorkerMetrics {
    /// Registers the metrics of models.
    pub fn register(metrics: &Metrics) -> Self {
        let durations = || Family::new_with_constructor(duration_histogram as fn() -> Histogram);
        let counts = || Family::new_with_constructor(count_histogram as fn() -> Histogram);
        let made = Self {
            requests: Family::default(),
            refused: Family::default(),
            request_duration: durations(),
            queue_duration: durations(),
            compute_duration: durations(),
            tokenize_duration: durations(),
            batch_rows: counts(),
            batch_tokens: counts(),
            models: Models::default(),
        };
        metrics.register(|registry| {
            let requests = made.requests.clone();
            registry.register("andon_worker_requests", "Calls answered", requests);
            let refused = made.refused.clone();
            registry.register("andon_worker_refused", "Rows not computed", refused);
            for (name, help, family) in [
                (
                    "request_duration_seconds",
                    "From call to answer",
                    &made.request_duration,
                ),
                (
                    "queue_duration_seconds",
                    "Waiting for the device",
                    &made.queue_duration,
                ),
                (
                    "compute_duration_seconds",
                    "One batch on the device",
                    &made.compute_duration,
                ),
                (
                    "tokenize_duration_seconds",
                    "Tokenizing a request",
                    &made.tokenize_duration,
                ),
                ("batch_rows", "Rows of a batch", &made.batch_rows),
                ("batch_tokens", "Tokens of a batch", &made.batch_tokens),
            ] {
                registry.register(format!("andon_worker_{name}"), help, family.clone());
            }
            registry.register_collector(Box::new(made.models.clone()));
        });
        made
    }

    /// The metrics of one model version, which waits in `queue`.
    pub fn model(
        &self,
        name: &ModelName,
        version: ModelVersion,
        queue: Arc<Queue>,
    ) -> ModelMetrics {
        let labels = ModelLabels {
            model: name.to_string(),
            version: version.to_string(),
        };
        let statistics = Arc::new(Statistics::new(queue));
        // Numbers begin at zero, so that their rates are right.
        for reason in ["queue_full", "deadline", "abandoned"] {
            let refused = RefusedLabels {
                model: labels.model.clone(),
                version: labels.version.clone(),
                reason,
            };
            drop(self.refused.get_or_create(&refused));
        }
        self.models
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(labels.clone(), Arc::downgrade(&statistics));
        ModelMetrics {
            infer_ok: self
                .requests
                .get_or_create_owned(&request_labels(&labels, INFER, Code::Ok)),
            request_duration: self.request_duration.get_or_create_owned(&labels),
            queue_duration: self.queue_duration.get_or_create_owned(&labels),
            compute_duration: self.compute_duration.get_or_create_owned(&labels),
            tokenize_duration: self.tokenize_duration.get_or_create_owned(&labels),
            batch_rows: self.batch_rows.get_or_create_owned(&labels),
            batch_tokens: self.batch_tokens.get_or_create_owned(&labels),
            all: self.clone(),
            labels,
            statistics,
        }
    }
}

/// The method whose successes are counted without a look-up.
const INFER: &str = "ModelInfer";

fn request_labels(labels: &ModelLabels, method: &'static str, code: Code) -> RequestLabels {
    RequestLabels {
        model: labels.model.clone(),
        version: labels.version.clone(),
        method,
        code: platform::grpc::code_name(code),
    }
}

/// The metrics of one model version.
#[derive(Debug, Clone)]
pub struct ModelMetrics {
    all: WorkerMetrics,
    labels: ModelLabels,
    statistics: Arc<Statistics>,
    infer_ok: Counter,
    request_duration: Histogram,
    queue_duration: Histogram,
    compute_duration: Histogram,
    tokenize_duration: Histogram,
    batch_rows: Histogram,
    batch_tokens: Histogram,
}

/// How long the stages of an answered request took.
#[derive(Debug, Default, Clone, Copy)]
pub struct Stages {
    /// Checking and tokenizing.
    pub input: Duration,
    /// Waiting.
    pub queue: Duration,
    /// On the device.
    pub compute: Duration,
    /// Making the outputs.
    pub output: Duration,
}

impl ModelMetrics {
    /// A call ended.
    pub fn called(&self, method: &'static str, code: Code, took: Duration) {
        if method == INFER && code == Code::Ok {
            self.infer_ok.inc();
        } else {
            self.all
                .requests
                .get_or_create(&request_labels(&self.labels, method, code))
                .inc();
        }
        self.request_duration.observe(took.as_secs_f64());
        let statistics = &self.statistics;
        match code {
            Code::Ok => statistics.success.add(took),
            _ => statistics.fail.add(took),
        }
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let now_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
        statistics.last_inference_ms.store(now_ms, Relaxed);
    }

    /// The stages of a request that was answered.
    pub fn staged(&self, stages: Stages) {
        self.queue_duration.observe(stages.queue.as_secs_f64());
        self.statistics.input.add(stages.input);
        self.statistics.queue.add(stages.queue);
        self.statistics.compute.add(stages.compute);
        self.statistics.output.add(stages.output);
    }

    /// The tokens of a request are made.
    pub fn tokenized(&self, took: Duration) {
        self.tokenize_duration.observe(took.as_secs_f64());
    }

    /// A batch was computed.
    pub fn computed(&self, rows: usize, tokens: usize, took: Duration) {
        self.compute_duration.observe(took.as_secs_f64());
        self.batch_rows.observe(rows as f64);
        self.batch_tokens.observe(tokens as f64);
        let statistics = &self.statistics;
        statistics.rows.fetch_add(rows as u64, Relaxed);
        statistics.batches.fetch_add(1, Relaxed);
        statistics
            .by_batch_rows
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .entry(rows as u64)
            .or_default()
            .add(took);
    }

    /// Rows did not find a place in the queue.
    pub fn refused(&self, reason: &'static str, rows: usize) {
        let labels = RefusedLabels {
            model: self.labels.model.clone(),
            version: self.labels.version.clone(),
            reason,
        };
        self.all.refused.get_or_create(&labels).inc_by(rows as u64);
    }

    /// Rows left the queue because nobody waited for them.
    pub fn dropped(&self, dropped: Dropped) {
        if dropped.late_rows > 0 {
            self.refused("deadline", dropped.late_rows);
        }
        if dropped.abandoned_rows > 0 {
            self.abandoned(dropped.abandoned_rows);
        }
    }

    /// Rows were given up while they were computed or before.
    pub fn abandoned(&self, rows: usize) {
        self.refused("abandoned", rows);
    }

    /// The model's entry in `ModelStatistics`.
    pub fn statistics(&self) -> ModelStatistics {
        let own = &self.statistics;
        let stage = |sum: &Sum| Some(sum.to_message());
        let by_batch_rows = own
            .by_batch_rows
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        ModelStatistics {
            name: self.labels.model.clone(),
            version: self.labels.version.clone(),
            last_inference: own.last_inference_ms.load(Relaxed),
            inference_count: own.rows.load(Relaxed),
            execution_count: own.batches.load(Relaxed),
            inference_stats: Some(InferStatistics {
                success: stage(&own.success),
                fail: stage(&own.fail),
                queue: stage(&own.queue),
                compute_input: stage(&own.input),
                compute_infer: stage(&own.compute),
                compute_output: stage(&own.output),
                ..Default::default()
            }),
            batch_stats: by_batch_rows
                .iter()
                .map(|(rows, sum)| InferBatchStatistics {
                    batch_size: *rows,
                    compute_infer: stage(sum),
                    ..Default::default()
                })
                .collect(),
            ..Default::default()
        }
    }
}

/// How often and how long altogether.
#[derive(Debug, Default)]
struct Sum {
    count: AtomicU64,
    ns: AtomicU64,
}

impl Sum {
    fn add(&self, took: Duration) {
        self.count.fetch_add(1, Relaxed);
        let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.ns.fetch_add(ns, Relaxed);
    }

    fn to_message(&self) -> StatisticDuration {
        StatisticDuration {
            count: self.count.load(Relaxed),
            ns: self.ns.load(Relaxed),
        }
    }

    fn us(&self) -> u64 {
        self.ns.load(Relaxed) / 1000
    }
}

#[derive(Debug)]
struct Statistics {
    queue_of: Arc<Queue>,
    success: Sum,
    fail: Sum,
    input: Sum,
    queue: Sum,
    compute: Sum,
    output: Sum,
    rows: AtomicU64,
    batches: AtomicU64,
    last_inference_ms: AtomicU64,
    by_batch_rows: Mutex<BTreeMap<u64, Sum>>,
}

impl Statistics {
    fn new(queue_of: Arc<Queue>) -> Self {
        Self {
            queue_of,
            success: Sum::default(),
            fail: Sum::default(),
            input: Sum::default(),
            queue: Sum::default(),
            compute: Sum::default(),
            output: Sum::default(),
            rows: AtomicU64::new(0),
            batches: AtomicU64::new(0),
            last_inference_ms: AtomicU64::new(0),
            by_batch_rows: Mutex::default(),
        }
    }
}

/// A number that is read when somebody asks.
type Reading = (&'static str, &'static str, fn(&Statistics) -> u64);

/// Triton's names, which people's dashboards have, and the queue's depth.
const READINGS: [Reading; 12] = [
    ("nv_inference_request_success", "Requests answered", |s| {
        s.success.count.load(Relaxed)
    }),
    (
        "nv_inference_request_failure",
        "Requests that failed",
        |s| s.fail.count.load(Relaxed),
    ),
    ("nv_inference_count", "Rows computed", |s| {
        s.rows.load(Relaxed)
    }),
    ("nv_inference_exec_count", "Batches computed", |s| {
        s.batches.load(Relaxed)
    }),
    (
        "nv_inference_pending_request_count",
        "Rows that wait",
        |s| s.queue_of.load().0 as u64,
    ),
    (
        "nv_inference_request_duration_us",
        "Requests, altogether",
        |s| s.success.us(),
    ),
    (
        "nv_inference_queue_duration_us",
        "Waiting, altogether",
        |s| s.queue.us(),
    ),
    (
        "nv_inference_compute_input_duration_us",
        "Preparing inputs, altogether",
        |s| s.input.us(),
    ),
    (
        "nv_inference_compute_infer_duration_us",
        "Running the model, altogether",
        |s| s.compute.us(),
    ),
    (
        "nv_inference_compute_output_duration_us",
        "Writing outputs, altogether",
        |s| s.output.us(),
    ),
    ("andon_worker_queue_rows", "Rows that wait", |s| {
        s.queue_of.load().0 as u64
    }),
    (
        "andon_worker_model_ready",
        "Models that can be called",
        |_| 1,
    ),
];

impl Collector for Models {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut models = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // An unloaded model has no numbers any more.
        models.retain(|_, statistics| statistics.strong_count() > 0);
        for (name, help, read) in READINGS {
            // Triton's counters have no `_total`, which a counter would get.
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for (labels, statistics) in models.iter() {
                if let Some(statistics) = statistics.upgrade() {
                    let value = i64::try_from(read(&statistics)).unwrap_or(i64::MAX);
                    ConstGauge::new(value).encode(family.encode_family(labels)?)?;
                }
            }
        }
        Ok(())
    }
}
