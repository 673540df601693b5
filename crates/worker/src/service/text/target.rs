//! Which model a text call goes to, and what every text call does with it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use engine::{Task, TextOutput, Tokenizer, Truncation};
use http::{HeaderName, HeaderValue};
use platform::grpc::{Call, Metadata};
use protocol::tei::v1 as tei;
use protocol::{DIGEST_KEY, Error, Kind, MODEL_KEY, ModelName, ModelVersion, VERSION_KEY};
use tonic::Code;

use super::super::inference::Counted;
use crate::model::{OwnedText, ServedModel, Urgency};
use crate::repository::Repository;

/// The model that a call names, if any, and when the call must be done.
#[derive(Debug, Clone)]
pub(super) struct Target {
    name: Option<ModelName>,
    version: Option<ModelVersion>,
    started: Instant,
    deadline: Instant,
}

/// An answer and what it cost.
pub(super) struct Answered<A> {
    pub(super) message: A,
    metadata: tei::Metadata,
    compute_type: &'static str,
    digest: Option<HeaderValue>,
}

/// The texts of one call and what is wanted of them.
pub(super) struct Texts {
    pub(super) texts: Vec<OwnedText>,
    /// The request's field that holds the texts.
    pub(super) field: &'static str,
    pub(super) prompt: Option<String>,
    pub(super) wanted: TextOutput,
    pub(super) truncation: Truncation,
}

impl Target {
    pub(super) fn of(call: &Call) -> Result<Self, Error> {
        let name = call.metadata_text(MODEL_KEY);
        let version = call.metadata_text(VERSION_KEY).unwrap_or_default();
        Ok(Self {
            name: name
                .map(|name| ModelName::checked(name, MODEL_KEY))
                .transpose()?,
            version: ModelVersion::optional(version, VERSION_KEY)?,
            started: Instant::now(),
            deadline: call.deadline.into_std(),
        })
    }

    pub(super) fn until(self, deadline: Instant) -> Self {
        Self {
            started: Instant::now(),
            deadline,
            ..self
        }
    }

    /// The model for a task: the one that is named, or the only one.
    pub(super) fn model(
        &self,
        repository: &Repository,
        task: Task,
    ) -> Result<Arc<ServedModel>, Error> {
        if let Some(name) = &self.name {
            let model = repository.find(name, self.version)?;
            if model.card.task == task {
                return Ok(model);
            }
            // Which others do is not for every caller to know.
            return Err(Error::invalid(
                MODEL_KEY,
                format!("model '{name}' does {}, not {task}", model.card.task),
            ));
        }
        only(repository.doing(task), task.as_str())
    }

    /// The model whose tokenizer answers: named, or the only one.
    pub(super) fn any_text_model(
        &self,
        repository: &Repository,
    ) -> Result<Arc<ServedModel>, Error> {
        if let Some(name) = &self.name {
            return repository.find(name, self.version);
        }
        let tasks = [Task::Embedding, Task::Classification, Task::Rerank];
        let models = tasks.into_iter().flat_map(|task| repository.doing(task));
        only(models.collect(), "text")
    }

    /// Computes texts with a model.
    pub(super) async fn run(
        &self,
        model: &ServedModel,
        method: &'static str,
        texts: Texts,
    ) -> Result<Answered<Vec<Vec<f32>>>, Error> {
        let mut counted = Counted::new(model, method, self.started);
        let answered = self.compute(model, texts).await;
        counted.code = match &answered {
            Ok(_) => Code::Ok,
            Err(error) => error.kind().code(),
        };
        answered
    }

    async fn compute(
        &self,
        model: &ServedModel,
        texts: Texts,
    ) -> Result<Answered<Vec<Vec<f32>>>, Error> {
        let rows_max = model.limits.request_rows_max;
        if texts.texts.len() > rows_max {
            let count = texts.texts.len();
            return Err(Error::invalid(
                texts.field,
                format!("{count} texts: a request may have {rows_max}"),
            ));
        }
        let mut prepared = Vec::with_capacity(texts.texts.len());
        for text in texts.texts {
            prepared.push(match text {
                OwnedText::One(text) => {
                    let text = prompted(model, texts.prompt.clone(), text)?;
                    check_length(model, texts.field, &text)?;
                    OwnedText::One(text)
                }
                OwnedText::Pair(first, second) => {
                    check_length(model, texts.field, &first)?;
                    check_length(model, texts.field, &second)?;
                    OwnedText::Pair(first, second)
                }
            });
        }
        let characters: usize = prepared.iter().map(OwnedText::characters).sum();
        let urgency = Urgency {
            priority: 0,
            deadline: self.deadline,
        };
        let (vectors, cost) = model
            .texts(prepared, texts.wanted, texts.truncation, urgency)
            .await?
            .map_err(|failed| {
                let reason = format!("{}; set 'truncate' to cut it", failed.error);
                match failed.error.is_callers_input() {
                    true => Error::invalid(texts.field, reason),
                    false => Error::new(Kind::Internal, failed.error.to_string()),
                }
            })?;
        let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let metadata = tei::Metadata {
            compute_chars: count(characters),
            compute_tokens: count(cost.tokens),
            total_time_ns: ns(self.started.elapsed()),
            tokenization_time_ns: ns(cost.tokenize),
            queue_time_ns: ns(cost.queue),
            inference_time_ns: ns(cost.compute),
        };
        Ok(Answered {
            message: vectors,
            metadata,
            compute_type: compute_type(model),
            digest: model.digest_value(),
        })
    }
}

impl<A> Answered<A> {
    /// An answer that no device computed.
    pub(super) fn free(message: A, model: &ServedModel) -> Self {
        Self {
            message,
            metadata: tei::Metadata::default(),
            compute_type: compute_type(model),
            digest: model.digest_value(),
        }
    }

    /// The same costs with another message, which may hold them too.
    pub(super) fn with<B>(self, message: impl FnOnce(tei::Metadata) -> B) -> Answered<B> {
        Answered {
            message: message(self.metadata),
            metadata: self.metadata,
            compute_type: self.compute_type,
            digest: self.digest,
        }
    }

    /// The costs as the metadata of the answer; times in milliseconds.
    pub(super) fn to_metadata(&self) -> Metadata {
        let cost = &self.metadata;
        let ms = |ns: u64| HeaderValue::from(ns / 1_000_000);
        let mut metadata = Metadata::new();
        for (name, value) in [
            (
                "x-compute-type",
                HeaderValue::from_static(self.compute_type),
            ),
            ("x-compute-time", ms(cost.total_time_ns)),
            ("x-compute-characters", cost.compute_chars.into()),
            ("x-compute-tokens", cost.compute_tokens.into()),
            ("x-total-time", ms(cost.total_time_ns)),
            ("x-tokenization-time", ms(cost.tokenization_time_ns)),
            ("x-queue-time", ms(cost.queue_time_ns)),
            ("x-inference-time", ms(cost.inference_time_ns)),
        ] {
            metadata.insert(HeaderName::from_static(name), value);
        }
        if let Some(digest) = &self.digest {
            metadata.insert(DIGEST_KEY, digest.clone());
        }
        metadata
    }
}

fn compute_type(model: &ServedModel) -> &'static str {
    if model.card.device == "cpu" {
        "cpu"
    } else {
        "gpu"
    }
}

fn ns(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// The only model of several candidates.
fn only(mut models: Vec<Arc<ServedModel>>, task: &str) -> Result<Arc<ServedModel>, Error> {
    match (models.len(), models.pop()) {
        (1, Some(model)) => Ok(model),
        (_, None) => Err(Error::new(
            Kind::NotFound,
            format!("no model that does {task} is ready"),
        )),
        (_, Some(last)) => {
            models.push(last);
            let able = listed(&models);
            Err(Error::invalid(
                MODEL_KEY,
                format!("several models do {task}: name one of {able} in the metadata"),
            ))
        }
    }
}

fn listed(models: &[Arc<ServedModel>]) -> String {
    let names: Vec<&str> = models.iter().map(|model| model.name.as_str()).collect();
    names.join(", ")
}

/// What happens to a text that is too long; an unknown direction is an error.
pub(super) fn truncation(truncate: bool, direction: i32) -> Result<Truncation, Error> {
    let direction = tei::TruncationDirection::try_from(direction)
        .map_err(|_| Error::invalid("truncation_direction", "must be 0 (right) or 1 (left)"))?;
    Ok(match (truncate, direction) {
        (false, _) => Truncation::Refuse,
        (true, tei::TruncationDirection::Right) => Truncation::Right,
        (true, tei::TruncationDirection::Left) => Truncation::Left,
    })
}

/// Puts a prompt of the model's configuration before a text.
pub(super) fn prompted(
    model: &ServedModel,
    prompt: Option<String>,
    text: String,
) -> Result<String, Error> {
    let Some(name) = prompt.or_else(|| model.card.default_prompt.clone()) else {
        return Ok(text);
    };
    let prompt = model.card.prompts.get(&name).ok_or_else(|| {
        let known: Vec<&str> = model.card.prompts.keys().map(String::as_str).collect();
        Error::invalid(
            "prompt_name",
            format!(
                "unknown prompt; the model's prompts are: {}",
                known.join(", ")
            ),
        )
    })?;
    Ok(format!("{prompt}{text}"))
}

/// Tokenizers cut after tokenizing: the cap comes first.
pub(super) fn check_length(model: &ServedModel, field: &str, text: &str) -> Result<(), Error> {
    let bytes_max = model.limits.text_bytes_max;
    if text.len() > bytes_max {
        let bytes = text.len();
        return Err(Error::invalid(
            field,
            format!("has {bytes} bytes: a text may have {bytes_max}"),
        ));
    }
    Ok(())
}

pub(super) fn tokenizer(model: &ServedModel) -> Result<&Tokenizer, Error> {
    model
        .tokenizer
        .as_deref()
        .ok_or_else(|| Error::invalid(MODEL_KEY, format!("model '{}' reads no text", model.name)))
}
