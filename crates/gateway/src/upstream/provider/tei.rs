//! What `tei.v1` asks of a provider's model.

use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue};
use platform::grpc::decode;
use protocol::tei::v1 as tei;
use protocol::{Error, MODEL_KEY};
use tokio::time::Instant;
use tonic::Status;

use super::catalogue::{Task, Used};
use super::trouble::Trouble;
use super::{Embedding, Provider, Tab, Terms, VERSION};
use crate::request::Request;
use crate::upstream::Response;

/// Answers one message, and says what it took.
pub(super) async fn answer(
    provider: &Arc<Provider>,
    method: &str,
    request: &Request,
    tab: &Tab,
) -> Result<(Response, Used), Status> {
    let message = request.message.bytes();
    let call = Call {
        provider,
        started: Instant::now(),
        terms: Terms {
            deadline: request.deadline,
            tab,
        },
    };
    match method {
        "Info/Info" => {
            let _: tei::InfoRequest = decode(message)?;
            let answer = Response::own(&call.info()?, HeaderMap::new());
            Ok((answer, Used::default()))
        }
        "Embed/Embed" => Ok(call.embed(decode(message)?).await?),
        "Rerank/Rerank" => Ok(call.rerank(decode(message)?).await?),
        _ => {
            let method = method.rsplit('/').next().unwrap_or(method);
            Err(provider.lacks(method).into())
        }
    }
}

struct Call<'a> {
    provider: &'a Arc<Provider>,
    started: Instant,
    terms: Terms<'a>,
}

impl Call<'_> {
    fn must_do(&self, wanted: Task) -> Result<(), Error> {
        let (name, task) = (&self.provider.name, self.provider.model.task);
        if task == wanted {
            return Ok(());
        }
        let (task, wanted) = (task.name(), wanted.name());
        let reason = format!("model '{name}' does {task}, not {wanted}");
        Err(Error::invalid(MODEL_KEY, reason))
    }

    fn info(&self) -> Result<tei::InfoResponse, Error> {
        let model = &self.provider.model;
        let model_type = match model.task {
            Task::Embedding => tei::ModelType::Embedding,
            Task::Rerank => tei::ModelType::Reranker,
            Task::Generation => return Err(self.provider.lacks("Info")),
        };
        let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        Ok(tei::InfoResponse {
            version: platform::VERSION.to_owned(),
            model_id: self.provider.name.clone(),
            model_sha: Some(VERSION.to_owned()),
            model_dtype: "float32".to_owned(),
            model_type: model_type.into(),
            max_concurrent_requests: count(model.concurrency_max),
            max_client_batch_size: count(model.rows_max()),
            ..Default::default()
        })
    }

    async fn embed(&self, request: tei::EmbedRequest) -> Result<(Response, Used), Error> {
        self.must_do(Task::Embedding)?;
        let dimensions = match request.dimensions {
            None => None,
            Some(count) => {
                let checked = self.provider.dimensions(count.into());
                Some(checked.map_err(|reason| Error::invalid("dimensions", reason))?)
            }
        };
        if request.prompt_name.is_some() {
            let reason = "unknown prompt; the model has none";
            return Err(Error::invalid("prompt_name", reason));
        }
        checked_direction(request.truncation_direction)?;
        let options = Embedding {
            dimensions,
            normalize: request.normalize,
            truncate: request.truncate,
        };
        let characters = request.inputs.chars().count();
        let embedded = self
            .provider
            .embed(&[request.inputs], options, self.terms)
            .await
            .map_err(|trouble| {
                let field = match trouble {
                    Trouble::Dimensions => "dimensions",
                    _ => "inputs",
                };
                trouble.to_error(&self.provider.name, field)
            })?;
        let used = Used {
            input_tokens: embedded.tokens,
            requests: 1,
            ..Used::default()
        };
        let metadata = self.took(characters, used);
        let message = tei::EmbedResponse {
            embeddings: embedded.vectors.into_iter().next().unwrap_or_default(),
            metadata: Some(metadata),
        };
        Ok((Response::own(&message, self.carried(&metadata, used)), used))
    }

    async fn rerank(&self, request: tei::RerankRequest) -> Result<(Response, Used), Error> {
        self.must_do(Task::Rerank)?;
        if request.texts.is_empty() {
            return Err(Error::invalid("texts", "there are none"));
        }
        let (count, rows_max) = (request.texts.len(), self.provider.model.rows_max());
        if count > rows_max {
            let reason = format!("{count} texts: a request may have {rows_max}");
            return Err(Error::invalid("texts", reason));
        }
        checked_direction(request.truncation_direction)?;
        let characters = request.texts.iter().map(|text| text.chars().count()).sum();
        let texts = request.texts.into_iter();
        let pairs: Vec<_> = texts.map(|text| (request.query.clone(), text)).collect();
        let (scores, used) = self
            .provider
            .rerank(&pairs, self.terms)
            .await
            .map_err(|trouble| trouble.to_error(&self.provider.name, "texts"))?;
        let ranks = pairs.into_iter().zip(scores).enumerate();
        let ranks = ranks.map(|(index, ((_, text), score))| tei::Rank {
            index: u32::try_from(index).unwrap_or(u32::MAX),
            text: request.return_text.then_some(text),
            score,
        });
        let mut ranks: Vec<tei::Rank> = ranks.collect();
        ranks.sort_by(|a, b| b.score.total_cmp(&a.score));
        let metadata = self.took(characters, used);
        let message = tei::RerankResponse {
            ranks,
            metadata: Some(metadata),
        };
        Ok((Response::own(&message, self.carried(&metadata, used)), used))
    }

    fn took(&self, characters: usize, used: Used) -> tei::Metadata {
        let took = self.started.elapsed();
        let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        tei::Metadata {
            compute_chars: u32::try_from(characters).unwrap_or(u32::MAX),
            compute_tokens: u32::try_from(used.input_tokens).unwrap_or(u32::MAX),
            total_time_ns: ns,
            inference_time_ns: ns,
            ..Default::default()
        }
    }

    fn carried(&self, took: &tei::Metadata, used: Used) -> HeaderMap {
        let mut metadata = self.provider.carried(used);
        let ms = Duration::from_nanos(took.total_time_ns).as_millis();
        let ms = HeaderValue::from(u64::try_from(ms).unwrap_or(u64::MAX));
        for (name, value) in [
            ("x-compute-type", HeaderValue::from_static("provider")),
            ("x-compute-time", ms.clone()),
            ("x-compute-characters", took.compute_chars.into()),
            ("x-total-time", ms.clone()),
            ("x-tokenization-time", 0u64.into()),
            ("x-queue-time", 0u64.into()),
            ("x-inference-time", ms),
        ] {
            metadata.insert(HeaderName::from_static(name), value);
        }
        metadata
    }
}

/// A direction that is unknown is an error, though the provider cuts as it
/// likes.
fn checked_direction(direction: i32) -> Result<(), Error> {
    let known = tei::TruncationDirection::try_from(direction);
    let reason = "must be 0 (right) or 1 (left)";
    known
        .map(drop)
        .map_err(|_| Error::invalid("truncation_direction", reason))
}
