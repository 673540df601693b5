//! A model instance: one thread at a time touches its network.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use engine::{EncoderModel, EngineError, Model, TabularModel, TextRow};

use crate::error::ModelError;
use crate::metrics::ModelMetrics;
use crate::queue::{Batch, Computed, Part, Queue, Rows};

/// A network and the queue that feeds it.
pub struct Instance {
    /// None once the queue is closed and empty: the memory is freed.
    network: Mutex<Option<Model>>,
    queue: Arc<Queue>,
    metrics: ModelMetrics,
}

impl Instance {
    pub fn new(network: Model, queue: Arc<Queue>, metrics: ModelMetrics) -> Self {
        Self {
            network: Mutex::new(Some(network)),
            queue,
            metrics,
        }
    }

    /// Starts the instance's thread, which takes batches until the queue is
    /// closed and empty.
    pub fn start(self: &Arc<Self>, name: &str) -> io::Result<JoinHandle<()>> {
        let instance = Arc::clone(self);
        Builder::new().name(format!("model-{name}")).spawn(move || {
            while let Some(batch) = instance.queue.next_batch() {
                instance.compute(batch);
            }
            let mut network = instance.network.lock();
            *network
                .as_deref_mut()
                .unwrap_or_else(|poisoned| poisoned.get_mut()) = None;
        })
    }

    /// Computes a batch and replies to its parts.
    pub fn compute(&self, batch: Batch) {
        self.metrics.dropped(batch.dropped);
        let tokens = batch.tokens;
        let started = Instant::now();
        let mut network = self.network.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(network) = network.as_mut() {
            compute_parts(network, batch, &self.metrics);
        }
        drop(network);
        self.queue.finished(tokens, started.elapsed());
    }
}

/// Computes a batch and replies to its parts. When a batch of several parts
/// fails, each is computed alone, so that a bad one does not fail its neighbours.
fn compute_parts(network: &mut Model, batch: Batch, metrics: &ModelMetrics) {
    match compute(network, &batch.parts) {
        Ok((outputs, started, took)) => {
            // First: a caller that has its response finds it counted.
            metrics.computed(batch.rows, batch.tokens, took);
            reply(batch.parts, outputs, started, took);
        }
        Err(EngineError::Cancelled) => {
            metrics.abandoned(batch.rows);
            for part in batch.parts {
                // A receiver that is still there is past its deadline.
                let _ = part.reply.send(Err(ModelError::DeadlinePassed));
            }
        }
        Err(error) if batch.parts.len() == 1 => {
            for part in batch.parts {
                let _ = part.reply.send(Err(ModelError::Engine(error.to_string())));
            }
        }
        Err(_) => {
            for part in batch.parts {
                let alone = Batch {
                    rows: part.rows.count(),
                    tokens: part.rows.tokens(),
                    dropped: batch.dropped,
                    parts: vec![part],
                };
                compute_parts(network, alone, metrics);
            }
        }
    }
}

/// The outputs of each part, when their computation began and how long it took.
type Outputs = (Vec<Vec<Vec<f32>>>, Instant, Duration);

fn compute(network: &mut Model, parts: &[Part]) -> Result<Outputs, EngineError> {
    let started = Instant::now();
    // Checked between layers: a batch whose requests are all cancelled stops.
    let go_on = || {
        let now = Instant::now();
        parts.iter().any(|part| part.awaited(now))
    };
    let forward = AssertUnwindSafe(|| match network {
        Model::Tabular(model) => features(model, parts, &go_on),
        Model::Encoder(model) => text(model, parts, &go_on),
    });
    // A panic in the engine fails its batch; the instance continues.
    let outputs = catch_unwind(forward)
        .unwrap_or_else(|_| Err(EngineError::Device("the forward pass panicked".to_owned())))?;
    Ok((outputs, started, started.elapsed()))
}

fn text(
    model: &mut EncoderModel,
    parts: &[Part],
    go_on: &(dyn Fn() -> bool + Sync),
) -> Result<Vec<Vec<Vec<f32>>>, EngineError> {
    let mut rows = Vec::new();
    for part in parts {
        let Rows::Text(texts) = &part.rows else {
            return Err(EngineError::UnsupportedOutput(
                "a text model takes no features",
            ));
        };
        rows.extend(texts.iter().map(|(tokens, output)| TextRow {
            tokens,
            output: *output,
        }));
    }
    let mut outputs = model.forward(&rows, go_on)?.into_iter();
    Ok(parts
        .iter()
        .map(|part| outputs.by_ref().take(part.rows.count()).collect())
        .collect())
}

fn features(
    model: &mut TabularModel,
    parts: &[Part],
    go_on: &dyn Fn() -> bool,
) -> Result<Vec<Vec<Vec<f32>>>, EngineError> {
    let rows_of = |part: &Part| part.rows.count();
    let rows: usize = parts.iter().map(rows_of).sum();
    let joined;
    let features = match parts {
        [
            Part {
                rows: Rows::Features { values, .. },
                ..
            },
        ] => values,
        parts => {
            joined = parts
                .iter()
                .filter_map(|part| match &part.rows {
                    Rows::Features { values, .. } => Some(values.as_slice()),
                    Rows::Text(_) => None,
                })
                .collect::<Vec<_>>()
                .concat();
            &joined
        }
    };
    let outputs = model.forward(features, rows, go_on)?;
    let width = outputs.len() / rows.max(1);
    let mut rest = outputs.as_slice();
    Ok(parts
        .iter()
        .map(|part| {
            let (own, after) = rest.split_at((part.rows.count() * width).min(rest.len()));
            rest = after;
            vec![own.to_vec()]
        })
        .collect())
}

fn reply(parts: Vec<Part>, outputs: Vec<Vec<Vec<f32>>>, started: Instant, computed: Duration) {
    for (part, outputs) in parts.into_iter().zip(outputs) {
        let computed = Computed {
            outputs,
            queued: started.saturating_duration_since(part.queued_at),
            computed,
        };
        // A request that was cancelled in the meantime has no receiver.
        let _ = part.reply.send(Ok(computed));
    }
}
