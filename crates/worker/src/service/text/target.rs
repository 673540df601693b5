//! The model that a text call goes to, and the steps that all text calls share.

use std::sync::Arc;
use std::time::{Duration, Instant};

use engine::{TextOutput, Tokenizer, Truncation};
use http::HeaderValue;
use platform::grpc::{Call, Metadata};
use protocol::tei::v1 as tei;
use protocol::{
    DIGEST_KEY, Error, FieldPath, Kind, MODEL_KEY, Method, ModelName, ModelVersion, Task,
    VERSION_KEY, check_text_bytes, insert_compute_metadata, truncation_direction,
};
use tonic::Code;

use super::super::{CallRecord, lane_of};
use crate::error::text_problem;
use crate::model::{OwnedText, PromptChoice, ServedModel, TextError, Texts, Urgency};
use crate::queue::Lane;
use crate::repository::Repository;
use crate::work::Work;

/// The model that a call names, if any, and when the call must be done.
#[derive(Debug, Clone)]
pub struct Target {
    name: Option<ModelName>,
    version: Option<ModelVersion>,
    /// Where the call waits.
    pub lane: Lane,
    /// What is called.
    pub method: Option<Method>,
    started: Instant,
    deadline: Instant,
}

/// The message of a response and the usage of its computation.
pub struct TextResponse<A> {
    pub message: A,
    /// How many messages there are in it: to count its bytes takes so long.
    pub parts: usize,
    metadata: tei::Metadata,
    compute_type: &'static str,
    digest: Option<HeaderValue>,
}

/// The texts of one call and how they are computed.
pub struct TextRequest {
    pub texts: TextsField,
    /// The name of a prompt, if the call may have one and does.
    pub prompt: Option<String>,
    pub output: TextOutput,
    pub truncation: Truncation,
}

/// The texts of a request and the fields that hold them.
pub enum TextsField {
    /// The only text: `inputs`.
    One(String),
    /// The only pair: `inputs[0]` and `inputs[1]`.
    Pair(String, String),
    /// A query with each of several texts: `query` and `texts[…]`.
    Ranked(Arc<str>, Vec<Arc<str>>),
}

impl TextsField {
    fn count(&self) -> usize {
        match self {
            Self::One(_) | Self::Pair(..) => 1,
            Self::Ranked(_, texts) => texts.len(),
        }
    }

    /// Checks each text's length.
    fn prepared(self, model: &ServedModel) -> Result<Vec<OwnedText>, Error> {
        let inputs = |index| FieldPath::from("inputs").index(index);
        match self {
            Self::One(text) => {
                check_length(model, &text, || "inputs".into())?;
                Ok(vec![OwnedText::One(text)])
            }
            Self::Pair(first, second) => {
                check_length(model, &first, || inputs(0))?;
                check_length(model, &second, || inputs(1))?;
                Ok(vec![OwnedText::Pair(first.into(), second.into())])
            }
            Self::Ranked(query, texts) => {
                check_length(model, &query, || "query".into())?;
                let pair = |(index, text): (usize, Arc<str>)| {
                    check_length(model, &text, || texts_field(index))?;
                    Ok(OwnedText::Pair(query.clone(), text))
                };
                texts.into_iter().enumerate().map(pair).collect()
            }
        }
    }
}

fn texts_field(index: usize) -> FieldPath {
    FieldPath::from("texts").index(index)
}

impl Target {
    /// Reads the target of a call from its metadata.
    pub fn of(call: &Call) -> Result<Self, Error> {
        let name = call.metadata_text(MODEL_KEY);
        let version = call.metadata_text(VERSION_KEY).unwrap_or_default();
        Ok(Self {
            name: name
                .map(|name| ModelName::checked(name, MODEL_KEY))
                .transpose()?,
            lane: lane_of(call),
            method: Method::from_path(call.path()),
            version: ModelVersion::optional(version, VERSION_KEY)?,
            started: Instant::now(),
            deadline: call.deadline.into_std(),
        })
    }

    /// The same target for one message of a stream, which begins now.
    pub fn until(self, deadline: Instant) -> Self {
        Self {
            started: Instant::now(),
            deadline,
            ..self
        }
    }

    /// The model for a task: the named one, or the only one.
    pub fn model(&self, repository: &Repository, task: Task) -> Result<Arc<ServedModel>, Error> {
        if let Some(name) = &self.name {
            let model = repository.find(name, self.version)?;
            if model.task() == task {
                return Ok(model);
            }
            // The models of the other task are not for every caller to know.
            let name = name.as_str();
            return Err(Error::wrong_task(MODEL_KEY, name, model.task(), task));
        }
        only(repository, repository.models_for(task), task.as_str())
    }

    /// The model whose tokenizer a call uses: the named one, or the only one.
    pub fn any_text_model(&self, repository: &Repository) -> Result<Arc<ServedModel>, Error> {
        if let Some(name) = &self.name {
            return repository.find(name, self.version);
        }
        let tasks = Task::TEXT.iter();
        let models = tasks.flat_map(|task| repository.models_for(*task));
        only(repository, models.collect(), "text")
    }

    /// Computes texts with a model: one vector for each.
    pub async fn run(
        &self,
        model: &ServedModel,
        method: Method,
        request: TextRequest,
        work: &Work,
    ) -> Result<TextResponse<Vec<Vec<f32>>>, Error> {
        let mut record = CallRecord::new(model, method, self.started);
        let response = self.compute(model, request, work).await;
        record.code = match &response {
            Ok(_) => Code::Ok,
            Err(error) => error.kind().code(),
        };
        response
    }

    async fn compute(
        &self,
        model: &ServedModel,
        request: TextRequest,
        work: &Work,
    ) -> Result<TextResponse<Vec<Vec<f32>>>, Error> {
        check_count(model, request.texts.count())?;
        let ranked = matches!(request.texts, TextsField::Ranked(..));
        let prompt = prompt(model, request.prompt.as_deref())?;
        let texts = request.texts.prepared(model)?;
        let urgency = Urgency {
            lane: self.lane.clone(),
            priority: 0,
            deadline: self.deadline,
        };
        let texts = Texts {
            texts,
            prompt,
            output: request.output,
            truncation: request.truncation,
        };
        let (vectors, usage) = model
            .texts(texts, urgency, work)
            .await?
            .map_err(|error| invalid_text(&error, ranked))?;
        let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let metadata = tei::Metadata {
            compute_chars: count(usage.characters),
            compute_tokens: count(usage.tokens),
            total_time_ns: ns(self.started.elapsed()),
            tokenization_time_ns: ns(usage.tokenize),
            queue_time_ns: ns(usage.queue),
            inference_time_ns: ns(usage.compute),
        };
        Ok(TextResponse {
            message: vectors,
            parts: 0,
            metadata,
            compute_type: compute_type(model),
            digest: model.digest_value(),
        })
    }
}

/// The error of a text that could not be tokenized, in the request's terms.
fn invalid_text(failed: &TextError, ranked: bool) -> Error {
    let TextError { index, error } = failed;
    if !error.is_callers_input() {
        return Error::new(Kind::Internal, error.to_string());
    }
    let field = if ranked {
        texts_field(*index)
    } else {
        "inputs".into()
    };
    Error::invalid(field, text_problem(error))
}

impl<A> TextResponse<A> {
    /// A response that no device computed.
    pub fn free(message: A, model: &ServedModel) -> Self {
        Self {
            message,
            parts: 0,
            metadata: tei::Metadata::default(),
            compute_type: compute_type(model),
            digest: model.digest_value(),
        }
    }

    /// The same response, which has so many messages in it.
    pub fn of_parts(self, parts: usize) -> Self {
        Self { parts, ..self }
    }

    /// The same usage with another message, which may hold it too.
    pub fn with<B>(self, message: impl FnOnce(tei::Metadata) -> B) -> TextResponse<B> {
        TextResponse {
            message: message(self.metadata),
            parts: self.parts,
            metadata: self.metadata,
            compute_type: self.compute_type,
            digest: self.digest,
        }
    }

    /// The usage of the response, as its metadata.
    pub fn to_metadata(&self) -> Metadata {
        let mut metadata = Metadata::new();
        let compute_type = HeaderValue::from_static(self.compute_type);
        let tokens = self.metadata.compute_tokens.into();
        insert_compute_metadata(&mut metadata, Some(compute_type), tokens, &self.metadata);
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
fn only(
    repository: &Repository,
    mut models: Vec<Arc<ServedModel>>,
    task: &str,
) -> Result<Arc<ServedModel>, Error> {
    if models.len() > 1 {
        let names: Vec<&str> = models.iter().map(|model| model.name.as_str()).collect();
        return Err(Error::several_models(task, &names));
    }
    models.pop().ok_or_else(|| {
        // What a model is for is known when it is loaded.
        if repository.is_loading() {
            Error::no_model_yet(task)
        } else {
            Error::no_model(task)
        }
    })
}

/// The truncation of a text that is too long; an unknown direction is an error.
pub fn truncation(truncate: bool, direction: i32) -> Result<Truncation, Error> {
    let direction = truncation_direction(direction)?;
    Ok(match (truncate, direction) {
        (false, _) => Truncation::Refuse,
        (true, tei::TruncationDirection::Right) => Truncation::Right,
        (true, tei::TruncationDirection::Left) => Truncation::Left,
    })
}

/// What is put before a text: the prompt of this name, or the model's default one.
pub fn prompt(model: &ServedModel, name: Option<&str>) -> Result<Option<Arc<str>>, Error> {
    model
        .prompts
        .choose(PromptChoice::from(name), FieldPath::from)
}

/// Refuses more texts than a request may have, before anything is made of them.
pub fn check_count(model: &ServedModel, count: usize) -> Result<(), Error> {
    let rows_max = model.limits.request_rows_max;
    if count > rows_max {
        let reason = format!("has {count} texts, over the limit of {rows_max} for a request");
        return Err(Error::invalid("texts", reason));
    }
    Ok(())
}

/// Tokenizers truncate after tokenizing: the limit comes first.
pub fn check_length(
    model: &ServedModel,
    text: &str,
    field: impl FnOnce() -> FieldPath,
) -> Result<(), Error> {
    check_text_bytes(text.len(), model.limits.text_bytes_max)
        .map_err(|reason| Error::invalid(field(), reason))
}

/// The model's tokenizer, or an error where it has none.
pub fn tokenizer(model: &ServedModel) -> Result<Arc<Tokenizer>, Error> {
    model.tokenizer.clone().ok_or_else(|| {
        let reason = format!("model '{}' has no tokenizer", model.name);
        Error::invalid(MODEL_KEY, reason)
    })
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;
    use crate::linear::{self, doubles};

    /// The bytes of a request.
    fn ranked(query: &str, texts: usize) -> bytes::Bytes {
        let request = tei::RerankRequest {
            query: query.to_owned(),
            texts: vec!["a candle".to_owned(); texts],
            ..Default::default()
        };
        request.encode_to_vec().into()
    }

    #[test]
    fn twice_a_rerank_is_read_in_twice_the_time() {
        let model = linear::model("bert-rerank");
        let read = |message: bytes::Bytes| {
            let rows = Method::Rerank.outline(&message).unwrap().rows;
            let request = tei::RerankRequest::decode(message).unwrap();
            let texts = request.texts.into_iter().map(Arc::from).collect();
            let texts = TextsField::Ranked(request.query.into(), texts);
            assert_eq!(texts.count() as u64, rows);
            let pairs = texts.prepared(&model).unwrap();
            assert_eq!(pairs.len() as u64, rows);
        };
        doubles("texts", 50_000, |n| ranked("a lantern", n), read);
        let long = |n: usize| ranked(&"\u{fc}".repeat(n), 1);
        doubles("a long query", 2 << 20, long, read);
        // If each text copied the query, both would take four times as long.
        let both = |n: usize| ranked(&"\u{fc}".repeat(20 * n), n);
        doubles("texts and a long query", 20_000, both, read);
    }
}
