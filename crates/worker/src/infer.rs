//! `ModelInfer` for one model: what the model needs is checked, the rows are
//! computed, and the outputs are made.

use std::time::Instant;

use engine::{Task, TextOutput, Truncation};
use protocol::{Error, InferRequest, Input, Value};
use tensor::{Shape, Tensor, TensorError};

use crate::error::ModelError;
use crate::metrics::Stages;
use crate::model::{OwnedText, ServedModel, Urgency};
use crate::queue::Rows;

/// A model's own parameters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Options {
    /// Whether embeddings are scaled to length 1.
    normalize: bool,
    /// What happens to texts that are too long.
    truncation: Truncation,
    /// How many leading dimensions of embeddings are kept.
    dimensions: usize,
}

/// The outputs that were asked for, by name.
pub type Outputs = Vec<(String, Tensor)>;

/// Answers one request; says also how many tokens it took.
pub async fn infer(
    model: &ServedModel,
    request: InferRequest,
    deadline: Instant,
) -> Result<(Outputs, usize), ModelError> {
    let started = Instant::now();
    let options = options(model, &request)?;
    check_outputs(model, &request.outputs)?;
    let rows = check_inputs(model, &request.inputs)?;
    let patience = request.timeout.map(|timeout| started + timeout);
    let urgency = Urgency {
        priority: request.priority,
        deadline: patience.map_or(deadline, |patience| patience.min(deadline)),
    };
    let (mut stages, mut tokens) = (Stages::default(), 0);
    let vectors = if model.card.task == Task::Tabular {
        let values = features(model, &request.inputs)?;
        stages.input = started.elapsed();
        let (outputs, queue, compute) = model
            .compute(Rows::Features { values, rows }, urgency)
            .await?;
        (stages.queue, stages.compute) = (queue, compute);
        outputs
    } else {
        let texts = texts(model, &request.inputs)?;
        let wanted = match model.card.task {
            Task::Embedding => TextOutput::Embedding,
            _ => TextOutput::Logits,
        };
        let answered = model
            .texts(texts, wanted, options.truncation, urgency)
            .await?;
        let (outputs, cost) =
            answered.map_err(|error| element(&request.inputs, error.index, &error.error))?;
        stages.input = cost.tokenize;
        tokens = cost.tokens;
        (stages.queue, stages.compute) = (cost.queue, cost.compute);
        outputs
    };
    let finished = Instant::now();
    let outputs = make_outputs(model, vectors, rows, options)
        .map_err(|error| ModelError::Engine(error.to_string()))?;
    stages.output = finished.elapsed();
    model.metrics.staged(stages);
    let wanted = outputs
        .into_iter()
        .filter(|(name, _)| request.outputs.is_empty() || request.outputs.contains(name))
        .collect();
    Ok((wanted, tokens))
}

fn options(model: &ServedModel, request: &InferRequest) -> Result<Options, Error> {
    let mut options = Options {
        normalize: true,
        truncation: Truncation::Refuse,
        dimensions: model.card.width,
    };
    let task = model.card.task;
    for (name, value) in &request.parameters {
        let wrong =
            |description: String| Error::invalid(format!("parameters[{name}]"), description);
        match (name.as_str(), value) {
            ("truncate", Value::Bool(on)) if task != Task::Tabular => {
                if *on {
                    options.truncation = Truncation::Right;
                }
            }
            ("normalize", Value::Bool(on)) if task == Task::Embedding => options.normalize = *on,
            ("dimensions", Value::Integer(count)) if task == Task::Embedding => {
                options.dimensions = checked_dimensions(*count, model.card.width).map_err(wrong)?;
            }
            ("truncate", _) if task != Task::Tabular => {
                return Err(wrong("must be a boolean".into()));
            }
            ("normalize", _) if task == Task::Embedding => {
                return Err(wrong("must be a boolean".into()));
            }
            ("dimensions", _) if task == Task::Embedding => {
                return Err(wrong("must be an integer".into()));
            }
            _ => {
                return Err(wrong(format!(
                    "model '{}' has no such parameter",
                    model.name
                )));
            }
        }
    }
    Ok(options)
}

/// Checks how many leading dimensions of an embedding are kept.
pub fn checked_dimensions(count: i64, width: usize) -> Result<usize, String> {
    usize::try_from(count)
        .ok()
        .filter(|count| (1..=width).contains(count))
        .ok_or_else(|| format!("must be from 1 to {width}"))
}

fn check_outputs(model: &ServedModel, outputs: &[String]) -> Result<(), Error> {
    for (index, name) in outputs.iter().enumerate() {
        if !model.card.outputs.iter().any(|spec| spec.name == *name) {
            let known: Vec<&str> = model.card.outputs.iter().map(|s| s.name.as_str()).collect();
            return Err(Error::invalid(
                format!("outputs[{index}].name"),
                format!("unknown output; the outputs are: {}", known.join(", ")),
            ));
        }
    }
    Ok(())
}

/// Checks names, datatypes and shapes against the model's, and returns how many
/// rows there are.
fn check_inputs(model: &ServedModel, inputs: &[Input]) -> Result<usize, Error> {
    let specs = &model.card.inputs;
    for spec in specs {
        if !inputs.iter().any(|input| input.name == spec.name) {
            return Err(Error::invalid(
                "inputs",
                format!("input '{}' is missing", spec.name),
            ));
        }
    }
    let mut rows = None;
    for (index, input) in inputs.iter().enumerate() {
        let at = |part: &str| format!("inputs[{index}].{part}");
        let Some(spec) = specs.iter().find(|spec| spec.name == input.name) else {
            let known: Vec<&str> = specs.iter().map(|spec| spec.name.as_str()).collect();
            return Err(Error::invalid(
                at("name"),
                format!("unknown input; the inputs are: {}", known.join(", ")),
            ));
        };
        if input.tensor.datatype() != spec.datatype {
            return Err(Error::invalid(
                at("datatype"),
                format!("must be {}", spec.datatype),
            ));
        }
        let sizes = input.tensor.shape().to_wire();
        let fits = sizes.len() == spec.shape.len()
            && sizes
                .iter()
                .zip(&spec.shape)
                .all(|(size, wanted)| *wanted < 0 || size == wanted);
        if !fits {
            return Err(Error::invalid(
                at("shape"),
                format!("is {sizes:?}, but must be {:?}", spec.shape),
            ));
        }
        let count = input.tensor.shape().sizes().first().copied().unwrap_or(0);
        if count == 0 {
            return Err(Error::invalid(at("shape"), "the batch is empty"));
        }
        let rows_max = model.limits.request_rows_max;
        if count > rows_max {
            return Err(Error::invalid(
                at("shape"),
                format!("{count} rows: a request may have {rows_max}"),
            ));
        }
        if *rows.get_or_insert(count) != count {
            return Err(Error::invalid(
                at("shape"),
                "all inputs must have the same number of rows",
            ));
        }
    }
    rows.ok_or_else(|| Error::invalid("inputs", "there are none"))
}

fn contents(inputs: &[Input], name: &str) -> (String, usize) {
    let index = inputs.iter().position(|input| input.name == name);
    let index = index.unwrap_or(0);
    (format!("inputs[{index}].contents"), index)
}

fn features(model: &ServedModel, inputs: &[Input]) -> Result<Vec<f32>, Error> {
    let Some(input) = inputs.first() else {
        return Err(Error::invalid("inputs", "there are none"));
    };
    let (field, _) = contents(inputs, &input.name);
    let values = input
        .tensor
        .to_f32()
        .map_err(|error| Error::invalid(&field, error.to_string()))?;
    let (low, high) = model.card.feature_range.unwrap_or((f32::MIN, f32::MAX));
    // Written so that NaN is outside too.
    if let Some(index) = values.iter().position(|v| !(low..=high).contains(v)) {
        return Err(Error::invalid(
            field,
            format!(
                "element {index} is {}: must be from {low} to {high}",
                values[index]
            ),
        ));
    }
    Ok(values)
}

fn texts(model: &ServedModel, inputs: &[Input]) -> Result<Vec<OwnedText>, Error> {
    let column = |name: &str| -> Result<Vec<String>, Error> {
        let (field, index) = contents(inputs, name);
        let input = inputs
            .get(index)
            .ok_or_else(|| Error::invalid("inputs", "there are none"))?;
        let elements = input
            .tensor
            .to_elements()
            .map_err(|error| Error::invalid(&field, error.to_string()))?;
        elements
            .into_iter()
            .enumerate()
            .map(|(element, bytes)| {
                checked_text(bytes, model.limits.text_bytes_max)
                    .map_err(|reason| Error::invalid(&field, format!("element {element} {reason}")))
            })
            .collect()
    };
    if model.card.task == Task::Rerank {
        let queries = column("query")?;
        let texts = column("text")?;
        return Ok(queries
            .into_iter()
            .zip(texts)
            .map(|(query, text)| OwnedText::Pair(query, text))
            .collect());
    }
    Ok(column("text")?.into_iter().map(OwnedText::One).collect())
}

/// Checks one text. Tokenizers cut after tokenizing: the cap comes first.
fn checked_text(bytes: &[u8], bytes_max: usize) -> Result<String, String> {
    if bytes.len() > bytes_max {
        return Err(format!(
            "has {} bytes: a text may have {bytes_max}",
            bytes.len()
        ));
    }
    std::str::from_utf8(bytes)
        .map(str::to_owned)
        .map_err(|_| "is not UTF-8".to_owned())
}

/// What is wrong with one element, in the terms of the request.
fn element(inputs: &[Input], index: usize, error: &engine::EngineError) -> ModelError {
    if error.is_callers_input() {
        let name = inputs.last().map_or("", |input| input.name.as_str());
        let (field, _) = contents(inputs, name);
        return Error::invalid(
            field,
            format!("element {index}: {error}; set the parameter 'truncate' to cut it"),
        )
        .into();
    }
    ModelError::Engine(error.to_string())
}

/// Scales and cuts an embedding.
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
    if model.card.task == Task::Embedding {
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
