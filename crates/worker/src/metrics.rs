//! The metrics of models: Prometheus metrics under Andon's names and Triton's,
//! and the statistics since a model was loaded. Each number is counted once.

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
use protocol::{Method, ModelName, ModelVersion};
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

/// The models that are loaded, for the numbers that are read on a scrape.
#[derive(Debug, Clone, Default)]
struct Models(Arc<Mutex<BTreeMap<ModelLabels, Weak<Counters>>>>);

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
            registry.register(
                "andon_worker_requests",
                "Calls that ended, by code",
                requests,
            );
            let refused = made.refused.clone();
            registry.register(
                "andon_worker_refused",
                "Rows that were refused or dropped, by reason",
                refused,
            );
            for (name, help, family) in [
                (
                    "request_duration_seconds",
                    "Duration of a call",
                    &made.request_duration,
                ),
                (
                    "queue_duration_seconds",
                    "Wait of a request in the queue",
                    &made.queue_duration,
                ),
                (
                    "compute_duration_seconds",
                    "Duration of one batch on the device",
                    &made.compute_duration,
                ),
                (
                    "tokenize_duration_seconds",
                    "Duration of the tokenization of a request",
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
        let counters = Arc::new(Counters::new(queue));
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
            .insert(labels.clone(), Arc::downgrade(&counters));
        ModelMetrics {
            infer_ok: self.requests.get_or_create_owned(&request_labels(
                &labels,
                Method::ModelInfer,
                Code::Ok,
            )),
            request_duration: self.request_duration.get_or_create_owned(&labels),
            queue_duration: self.queue_duration.get_or_create_owned(&labels),
            compute_duration: self.compute_duration.get_or_create_owned(&labels),
            tokenize_duration: self.tokenize_duration.get_or_create_owned(&labels),
            batch_rows: self.batch_rows.get_or_create_owned(&labels),
            batch_tokens: self.batch_tokens.get_or_create_owned(&labels),
            all: self.clone(),
            labels,
            counters,
        }
    }
}

fn request_labels(labels: &ModelLabels, method: Method, code: Code) -> RequestLabels {
    RequestLabels {
        model: labels.model.clone(),
        version: labels.version.clone(),
        method: method.name(),
        code: platform::grpc::code_name(code),
    }
}

/// The metrics of one model version.
#[derive(Debug, Clone)]
pub struct ModelMetrics {
    all: WorkerMetrics,
    labels: ModelLabels,
    counters: Arc<Counters>,
    /// Successes of `ModelInfer`, which are counted without a lookup.
    infer_ok: Counter,
    request_duration: Histogram,
    queue_duration: Histogram,
    compute_duration: Histogram,
    tokenize_duration: Histogram,
    batch_rows: Histogram,
    batch_tokens: Histogram,
}

/// How long the stages of a request that succeeded took.
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
    pub fn called(&self, method: Method, code: Code, took: Duration) {
        if method == Method::ModelInfer && code == Code::Ok {
            self.infer_ok.inc();
        } else {
            self.all
                .requests
                .get_or_create(&request_labels(&self.labels, method, code))
                .inc();
        }
        self.request_duration.observe(took.as_secs_f64());
        let counters = &self.counters;
        match code {
            Code::Ok => counters.success.add(took),
            _ => counters.fail.add(took),
        }
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let now_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
        counters.last_inference_ms.store(now_ms, Relaxed);
    }

    /// The stages of a request that succeeded.
    pub fn staged(&self, stages: Stages) {
        self.queue_duration.observe(stages.queue.as_secs_f64());
        self.counters.input.add(stages.input);
        self.counters.queue.add(stages.queue);
        self.counters.compute.add(stages.compute);
        self.counters.output.add(stages.output);
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
        let counters = &self.counters;
        counters.rows.fetch_add(rows as u64, Relaxed);
        counters.batches.fetch_add(1, Relaxed);
        counters
            .by_batch_rows
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .entry(rows as u64)
            .or_default()
            .add(took);
    }

    /// Rows were not queued.
    pub fn refused(&self, reason: &'static str, rows: usize) {
        let labels = RefusedLabels {
            model: self.labels.model.clone(),
            version: self.labels.version.clone(),
            reason,
        };
        self.all.refused.get_or_create(&labels).inc_by(rows as u64);
    }

    /// Rows left the queue because their requests were cancelled or late.
    pub fn dropped(&self, dropped: Dropped) {
        if dropped.late_rows > 0 {
            self.refused("deadline", dropped.late_rows);
        }
        if dropped.abandoned_rows > 0 {
            self.abandoned(dropped.abandoned_rows);
        }
    }

    /// Rows were abandoned while they were computed or before.
    pub fn abandoned(&self, rows: usize) {
        self.refused("abandoned", rows);
    }

    /// The numbers since the model was loaded.
    pub fn statistics(&self) -> Statistics {
        let counters = &self.counters;
        let by_batch_rows = counters
            .by_batch_rows
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        Statistics {
            last_inference_ms: counters.last_inference_ms.load(Relaxed),
            rows: counters.rows.load(Relaxed),
            batches: counters.batches.load(Relaxed),
            success: counters.success.total(),
            fail: counters.fail.total(),
            queue: counters.queue.total(),
            input: counters.input.total(),
            compute: counters.compute.total(),
            output: counters.output.total(),
            by_batch_rows: by_batch_rows
                .iter()
                .map(|(rows, sum)| (*rows, sum.total()))
                .collect(),
        }
    }
}

/// How often something happened, and how long it took altogether.
#[derive(Debug, Clone, Copy)]
pub struct Total {
    /// How often.
    pub count: u64,
    /// How long, in nanoseconds.
    pub ns: u64,
}

/// The statistics of a model since it was loaded.
#[derive(Debug)]
pub struct Statistics {
    /// When the last call ended, in milliseconds since 1970.
    pub last_inference_ms: u64,
    /// Rows computed.
    pub rows: u64,
    /// Batches computed.
    pub batches: u64,
    /// Calls that succeeded.
    pub success: Total,
    /// Calls that failed.
    pub fail: Total,
    /// Waiting in the queue.
    pub queue: Total,
    /// Checking and tokenizing.
    pub input: Total,
    /// On the device.
    pub compute: Total,
    /// Making the outputs.
    pub output: Total,
    /// Batches by their rows.
    pub by_batch_rows: Vec<(u64, Total)>,
}

/// A [`Total`] that grows.
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

    fn total(&self) -> Total {
        Total {
            count: self.count.load(Relaxed),
            ns: self.ns.load(Relaxed),
        }
    }

    fn us(&self) -> u64 {
        self.ns.load(Relaxed) / 1000
    }
}

/// The counters of one model.
#[derive(Debug)]
struct Counters {
    waiting: Arc<Queue>,
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

impl Counters {
    fn new(waiting: Arc<Queue>) -> Self {
        Self {
            waiting,
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

/// Name, help and value of a number that is read on a scrape.
type Reading = (&'static str, &'static str, fn(&Counters) -> u64);

/// Counters under Triton's names, which people's dashboards have. They have no
/// `_total`, without which OpenMetrics has no counter: they are of no known type
/// there, and counters in Prometheus's own format.
const COUNTED: [Reading; 9] = [
    (
        "nv_inference_request_success",
        "Requests that succeeded",
        |s| s.success.count.load(Relaxed),
    ),
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
        "nv_inference_request_duration_us",
        "Total duration of requests",
        |s| s.success.us(),
    ),
    (
        "nv_inference_queue_duration_us",
        "Total wait in the queue",
        |s| s.queue.us(),
    ),
    (
        "nv_inference_compute_input_duration_us",
        "Total duration of preparing inputs",
        |s| s.input.us(),
    ),
    (
        "nv_inference_compute_infer_duration_us",
        "Total duration of running the model",
        |s| s.compute.us(),
    ),
    (
        "nv_inference_compute_output_duration_us",
        "Total duration of writing outputs",
        |s| s.output.us(),
    ),
];

/// Numbers that rise and fall: the queue's depth, under Triton's name and
/// Andon's, and what is ready.
const GAUGES: [Reading; 3] = [
    (
        "nv_inference_pending_request_count",
        "Rows waiting in the queue",
        |s| s.waiting.load().0 as u64,
    ),
    (
        "andon_worker_queue_rows",
        "Rows waiting in the queue",
        |s| s.waiting.load().0 as u64,
    ),
    ("andon_worker_model_ready", "Models that are ready", |_| 1),
];

impl Collector for Models {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut models = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // An unloaded model has no numbers any more.
        models.retain(|_, counters| counters.strong_count() > 0);
        let counted = COUNTED.map(|reading| (reading, MetricType::Unknown));
        let gauges = GAUGES.map(|reading| (reading, MetricType::Gauge));
        for ((name, help, read), kind) in counted.into_iter().chain(gauges) {
            let mut family = encoder.encode_descriptor(name, help, None, kind)?;
            for (labels, counters) in models.iter() {
                if let Some(counters) = counters.upgrade() {
                    let value = i64::try_from(read(&counters)).unwrap_or(i64::MAX);
                    ConstGauge::new(value).encode(family.encode_family(labels)?)?;
                }
            }
        }
        Ok(())
    }
}
