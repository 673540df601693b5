//! `ModelInfer` for one model: the request is checked against the model, its
//! rows are computed, and the outputs are made.

use std::sync::Arc;
use std::time::Instant;

use engine::{EngineError, TextOutput, Truncation};
use platform::pool::Cancelled;
use protocol::{
    Error, FieldPath, IDS_INPUT, InferRequest, LENGTHS_INPUT, PROMPT, PROMPT_NAME, Task,
    checked_dimensions,
};
use tensor::{Shape, Tensor, TensorError};

use crate::error::{ModelError, text_problem};
use crate::metrics::Stages;
use crate::model::{OwnedText, PromptChoice, ServedModel, TextError, Texts, Urgency};
use crate::queue::Rows;
use crate::work::{Size, Work};

/// The input of a model of texts, and of a reranker besides.
const TEXT: &str = "text";
const QUERY: &str = "query";
/// Outputs of more values are made on the threads for work.
const INLINE_VALUES_MAX: usize = 64 << 10;

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

/// A request that agrees with its model.
#[derive(Debug)]
pub struct Checked {
    request: InferRequest,
    options: Options,
    prompt: Option<Arc<str>>,
    rows: usize,
    contents: Contents,
}

impl Checked {
    /// The caller's id for the request, which its response has too.
    pub fn take_id(&mut self) -> String {
        std::mem::take(&mut self.request.id)
    }
}

/// What is computed.
#[derive(Debug)]
enum Contents {
    Features(Vec<f32>),
    Texts(Vec<OwnedText>),
}

/// Checks a request against its model.
pub fn check(model: &ServedModel, request: InferRequest) -> Result<Checked, Error> {
    let options = options(model, &request)?;
    let prompt = prompt(model, &request)?;
    let rows = model.signature().check(&request)?;
    let contents = if model.task() == Task::Tabular {
        Contents::Features(features(model, &request)?)
    } else {
        Contents::Texts(texts(model, &request)?)
    };
    Ok(Checked {
        request,
        options,
        prompt,
        rows,
        contents,
    })
}

/// Runs one request, which came at `started`; returns also how many tokens it
/// took.
pub async fn infer(
    model: &Arc<ServedModel>,
    checked: Checked,
    mut urgency: Urgency,
    work: &Work,
    started: Instant,
) -> Result<(Outputs, usize), ModelError> {
    let Checked {
        request,
        options,
        prompt,
        rows,
        contents,
    } = checked;
    urgency.priority = request.priority;
    if let Some(timeout) = request.timeout {
        urgency.deadline = urgency.deadline.min(started + timeout);
    }
    let (mut stages, mut tokens) = (Stages::default(), 0);
    let vectors = match contents {
        Contents::Features(values) => {
            let held = model.reserve(rows, &urgency)?;
            stages.input = started.elapsed();
            let values = Rows::Features { values, rows };
            let (outputs, queue, compute) = model.compute(values, held, urgency).await?;
            (stages.queue, stages.compute) = (queue, compute);
            outputs
        }
        Contents::Texts(texts) => {
            let texts = Texts {
                texts,
                prompt,
                output: match model.task() {
                    Task::Embedding => TextOutput::Embedding,
                    _ => TextOutput::Logits,
                },
                truncation: options.truncation,
            };
            let computed = model.texts(texts, urgency, work).await?;
            let (outputs, usage) = computed.map_err(|error| invalid_text(&request, &error))?;
            stages.input = usage.tokenize;
            tokens = usage.tokens;
            (stages.queue, stages.compute) = (usage.queue, usage.compute);
            outputs
        }
    };
    let finished = Instant::now();
    let values: usize = vectors.iter().map(Vec::len).sum();
    let outputs = if values <= INLINE_VALUES_MAX {
        make_outputs(model, vectors, rows, options)
    } else {
        let (model, bytes) = (model.clone(), values * size_of::<f32>());
        let make = move |_: &Cancelled| make_outputs(&model, vectors, rows, options);
        work.run(Size { items: 1, bytes }, make).await?
    };
    let outputs = outputs.map_err(|error| ModelError::Engine(error.to_string()))?;
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
        normalize: model.card.normalize,
        truncation: model.card.truncation,
        dimensions: width,
    };
    let task = model.task();
    for (name, value) in &request.parameters {
        match name.as_str() {
            "truncate" if task != Task::Tabular => {
                options.truncation = if value.boolean(name)? {
                    model.card.truncation_side.into()
                } else {
                    Truncation::Refuse
                };
            }
            "normalize" if task == Task::Embedding => options.normalize = value.boolean(name)?,
            "dimensions" if task == Task::Embedding => {
                let dimensions = checked_dimensions(value.integer(name)?, width);
                options.dimensions = dimensions
                    .map_err(|reason| Error::invalid(FieldPath::parameter(name), reason))?;
            }
            // `prompt` reads them.
            PROMPT_NAME | PROMPT if task == Task::Embedding => {}
            _ => return Err(request.unknown_parameter(name)),
        }
    }
    Ok(options)
}

/// What is put before each text of a request, which may name or bring it. Ids of
/// tokens take no prompt: whoever made them has put it before their text.
fn prompt(model: &ServedModel, request: &InferRequest) -> Result<Option<Arc<str>>, Error> {
    let text = |name: &str| {
        let value = request.parameters.get(name);
        value.map(|value| value.text(name)).transpose()
    };
    let choice = match (text(PROMPT_NAME)?, text(PROMPT)?) {
        (name, None) => PromptChoice::from(name),
        (None, Some(prompt)) => PromptChoice::Given(prompt),
        (Some(_), Some(_)) => {
            let reason = format!("must not be set beside {PROMPT_NAME}");
            return Err(Error::invalid(FieldPath::parameter(PROMPT), reason));
        }
    };
    let has_ids = request.inputs.iter().any(|input| input.name == IDS_INPUT);
    let chosen = match choice {
        PromptChoice::Default if has_ids => return Ok(None),
        PromptChoice::Named(_) if has_ids => PROMPT_NAME,
        PromptChoice::Given(_) if has_ids => PROMPT,
        choice => return model.prompts.choose(choice, FieldPath::parameter),
    };
    let reason = "must not be set with token ids, which take no prompt";
    Err(Error::invalid(FieldPath::parameter(chosen), reason))
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
        // A token has a byte at least.
        let lists = if model.takes_ids() {
            request.id_lists(bytes_max)?
        } else {
            None
        };
        if let Some(lists) = lists {
            return Ok(lists.into_iter().map(OwnedText::Ids).collect());
        }
        let texts = request.texts(TEXT, bytes_max)?;
        return Ok(texts.into_iter().map(OwnedText::One).collect());
    }
    let queries = request.texts(QUERY, bytes_max)?;
    let texts = request.texts(TEXT, bytes_max)?;
    // Rows of the same query share it, so that it is tokenized once.
    let mut shared: Arc<str> = "".into();
    let pairs = queries.into_iter().zip(texts).map(|(query, text)| {
        if *shared != *query {
            shared = query.into();
        }
        OwnedText::Pair(shared.clone(), text.into())
    });
    Ok(pairs.collect())
}

/// The error of a text that could not be tokenized, in the request's terms.
fn invalid_text(request: &InferRequest, failed: &TextError) -> ModelError {
    if !failed.error.is_callers_input() {
        return ModelError::Engine(failed.error.to_string());
    }
    let ids = request.inputs.iter().find(|input| input.name == IDS_INPUT);
    let name = match (ids, &failed.error) {
        (Some(ids), EngineError::UnknownTokenId { id }) => {
            // The lists before have only known ids: this is its first place.
            let ids = ids.tensor.to_i64().unwrap_or_default();
            let place = ids.iter().position(|other| *other == i64::from(*id));
            return request.unknown_id(place.unwrap_or_default(), id).into();
        }
        (Some(_), _) => LENGTHS_INPUT,
        (None, _) => TEXT,
    };
    let field = request.contents_field(name).index(failed.index);
    Error::invalid_input(name, field, text_problem(&failed.error)).into()
}

/// Truncates an embedding to its leading dimensions and normalizes it.
pub fn finish_embedding(vector: &mut Vec<f32>, dimensions: usize, normalize: bool) {
    vector.truncate(dimensions);
    if normalize {
        engine::normalize(vector);
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
        model.card.activation.apply(row);
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

#[cfg(test)]
mod tests {
    use protocol::{Input, ModelName, Value};

    use super::*;
    use crate::linear;

    fn request(inputs: Vec<Input>, parameters: &[(&str, Value)]) -> InferRequest {
        let parameters = parameters.iter();
        InferRequest {
            model: ModelName::checked("m", "name").unwrap(),
            version: None,
            id: String::new(),
            priority: 0,
            timeout: None,
            parameters: parameters
                .map(|(name, value)| ((*name).to_owned(), value.clone()))
                .collect(),
            inputs,
            outputs: Vec::new(),
            text_outputs: Vec::new(),
        }
    }

    fn text(name: &str) -> Input {
        let shape = Shape::from_sizes(vec![1]).unwrap();
        Input {
            name: name.to_owned(),
            tensor: Tensor::from_elements(shape, &["lantern"]).unwrap(),
        }
    }

    fn numbers(name: &str, values: &[i64]) -> Input {
        let shape = Shape::from_sizes(vec![values.len()]).unwrap();
        Input {
            name: name.to_owned(),
            tensor: Tensor::from_i64(shape, values).unwrap(),
        }
    }

    fn string(text: &str) -> Value {
        Value::Text(text.to_owned())
    }

    #[test]
    fn a_request_chooses_its_prompt_by_name_or_brings_it() {
        let model = linear::model("bert-dense");
        for (parameters, expected) in [
            (vec![], None),
            (vec![(PROMPT_NAME, string("query"))], Some("query: ")),
            (vec![(PROMPT, string("title: "))], Some("title: ")),
            (vec![(PROMPT, string(""))], None),
        ] {
            let checked = check(&model, request(vec![text(TEXT)], &parameters)).unwrap();
            assert_eq!(checked.prompt.as_deref(), expected, "{parameters:?}");
        }
    }

    #[test]
    fn a_prompt_that_cannot_be_applied_is_refused_by_name() {
        let embedder = linear::model("bert-dense");
        let reranker = linear::model("bert-rerank");
        let texts = || vec![text(TEXT)];
        let ids = || vec![numbers(LENGTHS_INPUT, &[2]), numbers(IDS_INPUT, &[7, 8])];
        let named = || (PROMPT_NAME, string("query"));
        let given = || (PROMPT, string("title: "));
        let unknown = (PROMPT_NAME, string("passage"));
        for (model, inputs, parameters, sentence) in [
            (
                &embedder,
                texts(),
                vec![unknown],
                "parameters[prompt_name]: must be one of the model's prompts: query",
            ),
            (
                &embedder,
                texts(),
                vec![(PROMPT_NAME, Value::Integer(1))],
                "parameters[prompt_name]: must be a string",
            ),
            (
                &embedder,
                texts(),
                vec![named(), given()],
                "parameters[prompt]: must not be set beside prompt_name",
            ),
            (
                &embedder,
                ids(),
                vec![named()],
                "parameters[prompt_name]: must not be set with token ids, which take no prompt",
            ),
            (
                &embedder,
                ids(),
                vec![given()],
                "parameters[prompt]: must not be set with token ids, which take no prompt",
            ),
            (
                &reranker,
                vec![text(QUERY), text(TEXT)],
                vec![named()],
                "parameters[prompt_name]: is not a parameter of model 'm'",
            ),
        ] {
            let error = check(model, request(inputs, &parameters)).unwrap_err();
            assert_eq!(error.to_string(), sentence);
        }
    }
}
