//! `ModelInfer` for one model: the request is checked against the model, its
//! rows are computed, and the outputs are made.

use std::time::Instant;

use engine::{TextOutput, Truncation};
use protocol::{Error, FieldPath, InferRequest, Task, checked_dimensions};
use tensor::{Shape, Tensor, TensorError};

use crate::error::{ModelError, text_problem};
use crate::metrics::Stages;
use crate::model::{OwnedText, ServedModel, TextError, Urgency};
use crate::queue::{Lane, Rows};

/// The input of a model of texts, and of a reranker besides.
const TEXT: &str = "text";
const QUERY: &str = "query";

/// The parameters of a request that are the model's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Options {
    /// Whether embeddings are scaled to length 1.
    normalize: bool,
    /// The truncation of texts that are too long.
    truncation: Truncation,
    /// The number of leading dimensions of embeddings to return.
    dimensions: usize,
}

/// The requested outputs, by name.
pub type Outputs = Vec<(String, Tensor)>;

/// Runs one request; returns also how many tokens it took.
pub async fn infer(
    model: &ServedModel,
    request: InferRequest,
    deadline: Instant,
    lane: Lane,
) -> Result<(Outputs, usize), ModelError> {
    let started = Instant::now();
    let options = options(model, &request)?;
    let rows = model.signature().check(&request)?;
    let timeout_at = request.timeout.map(|timeout| started + timeout);
    let urgency = Urgency {
        lane,
        priority: request.priority,
        deadline: timeout_at.map_or(deadline, |timeout_at| timeout_at.min(deadline)),
    };
    let (mut stages, mut tokens) = (Stages::default(), 0);
    let vectors = if model.task() == Task::Tabular {
        let held = model.reserve(rows, &urgency)?;
        let values = features(model, &request)?;
        stages.input = started.elapsed();
        let (outputs, queue, compute) = model
            .compute(Rows::Features { values, rows }, held, urgency)
            .await?;
        (stages.queue, stages.compute) = (queue, compute);
        outputs
    } else {
        let texts = texts(model, &request)?;
        let output = if model.task() == Task::Embedding {
            TextOutput::Embedding
        } else {
            TextOutput::Logits
        };
        let (outputs, usage) = model
            .texts(texts, output, options.truncation, urgency)
            .await?
            .map_err(|error| invalid_text(&request, &error))?;
        stages.input = usage.tokenize;
        tokens = usage.tokens;
        (stages.queue, stages.compute) = (usage.queue, usage.compute);
        outputs
    };
    let finished = Instant::now();
    let outputs = make_outputs(model, vectors, rows, options)
        .map_err(|error| ModelError::Engine(error.to_string()))?;
    stages.output = finished.elapsed();
    model.metrics.staged(stages);
    let requested = outputs
        .into_iter()
        .filter(|(name, _)| request.outputs.is_empty() || request.outputs.contains(name))
        .collect();
    Ok((requested, tokens))
}

fn options(model: &ServedModel, request: &InferRequest) -> Result<Options, Error> {
    let width = model.card.width;
    let mut options = Options {
        normalize: true,
        truncation: Truncation::Refuse,
        dimensions: width,
    };
    let task = model.task();
    for (name, value) in &request.parameters {
        match name.as_str() {
            "truncate" if task != Task::Tabular => {
                if value.boolean(name)? {
                    options.truncation = Truncation::Right;
                }
            }
            "normalize" if task == Task::Embedding => options.normalize = value.boolean(name)?,
            "dimensions" if task == Task::Embedding => {
                let dimensions = checked_dimensions(value.integer(name)?, width);
                options.dimensions = dimensions
                    .map_err(|reason| Error::invalid(FieldPath::parameter(name), reason))?;
            }
            _ => return Err(request.unknown_parameter(name)),
        }
    }
    Ok(options)
}

fn features(model: &ServedModel, request: &InferRequest) -> Result<Vec<f32>, Error> {
    let Some(input) = request.inputs.first() else {
        return Err(Error::invalid("inputs", "must not be empty"));
    };
    let contents = || request.contents_field(&input.name);
    let values = input
        .tensor
        .to_f32()
        .map_err(|error| Error::invalid_input(&input.name, contents(), error.to_string()))?;
    let (low, high) = model.card.feature_range.unwrap_or((f32::MIN, f32::MAX));
    // Written so that NaN is outside too.
    let outside = |value: &f32| !(low..=high).contains(value);
    if let Some((index, value)) = values.iter().enumerate().find(|(_, value)| outside(value)) {
        let reason = format!("is {value}, but must be from {low} to {high}");
        return Err(Error::invalid_input(
            &input.name,
            contents().index(index),
            reason,
        ));
    }
    Ok(values)
}

fn texts(model: &ServedModel, request: &InferRequest) -> Result<Vec<OwnedText>, Error> {
    let bytes_max = model.limits.text_bytes_max;
    if model.task() != Task::Rerank {
        let texts = request.texts(TEXT, bytes_max)?;
        return Ok(texts.into_iter().map(OwnedText::One).collect());
    }
    let queries = request.texts(QUERY, bytes_max)?;
    let texts = request.texts(TEXT, bytes_max)?;
    let pairs = queries.into_iter().zip(texts);
    Ok(pairs
        .map(|(query, text)| OwnedText::Pair(query, text))
        .collect())
}

/// The error of a text that could not be tokenized, in the request's terms.
fn invalid_text(request: &InferRequest, failed: &TextError) -> ModelError {
    if !failed.error.is_callers_input() {
        return ModelError::Engine(failed.error.to_string());
    }
    let field = request.contents_field(TEXT).index(failed.index);
    Error::invalid_input(TEXT, field, text_problem(&failed.error)).into()
}

/// Truncates an embedding to its leading dimensions and normalizes it.
pub fn finish_embedding(vector: &mut Vec<f32>, dimensions: usize, normalize: bool) {
    vector.truncate(dimensions);
    if normalize {
        engine::normalize(vector);
    }
}

/// Turns raw scores into probabilities.
pub fn finish_scores(model: &ServedModel, scores: &mut [f32]) {
    if scores.len() == 1 || model.card.multi_label {
        engine::sigmoid(scores);
    } else {
        engine::softmax(scores);
    }
}

fn make_outputs(
    model: &ServedModel,
    mut vectors: Vec<Vec<f32>>,
    rows: usize,
    options: Options,
) -> Result<Outputs, TensorError> {
    let name = |index: usize| {
        model
            .card
            .outputs
            .get(index)
            .map_or_else(String::new, |spec| spec.name.clone())
    };
    if model.task() == Task::Embedding {
        for vector in &mut vectors {
            finish_embedding(vector, options.dimensions, options.normalize);
        }
        let shape = Shape::from_sizes(vec![rows, options.dimensions])?;
        return Ok(vec![(name(0), Tensor::from_f32(shape, &vectors.concat())?)]);
    }
    let width = model.card.width;
    let mut scores = vectors.concat();
    for row in scores.chunks_mut(width.max(1)) {
        finish_scores(model, row);
    }
    let labels: Vec<i64> = scores
        .chunks(width.max(1))
        .map(|row| engine::argmax(row) as i64)
        .collect();
    let shape = Shape::from_sizes(vec![rows, width])?;
    let mut outputs = vec![(name(0), Tensor::from_f32(shape, &scores)?)];
    if model.card.outputs.len() > 1 {
        let shape = Shape::from_sizes(vec![rows])?;
        outputs.push((name(1), Tensor::from_i64(shape, &labels)?));
    }
    Ok(outputs)
}
