//! `tei.v1` in front of a provider's model.

use std::sync::Arc;

use http::{HeaderMap, HeaderValue};
use platform::grpc::decode;
use protocol::tei::v1 as tei;
use protocol::{
    Error, MODEL_KEY, Method, PROMPT_NAME, Task, insert_compute_metadata, truncation_direction,
    unknown_prompt,
};
use providers::{
    CallContext, EmbeddingOptions, MODEL_VERSION, Provider, ProviderError, ProviderUsage,
    UsageMeter,
};
use tokio::time::Instant;
use tonic::Status;

use super::oip::{dimensions, response_metadata, unsupported};
use crate::request::Request;
use crate::upstream::Response;

/// Responds to one message; the usage is that of all calls of the service.
pub(super) async fn respond(
    provider: &Arc<Provider>,
    request: &Request,
    usage: &UsageMeter,
) -> Result<(Response, ProviderUsage), Status> {
    let message = request.message.bytes();
    let holder = request.caller.holder();
    let call = Call {
        provider,
        started: Instant::now(),
        context: CallContext {
            deadline: request.deadline,
            usage,
            holder: &holder,
            has_others: request.caller.tenant.has_others,
        },
    };
    match request.method {
        Method::TeiInfo => {
            let _: tei::InfoRequest = decode(message)?;
            let response = Response::own(&call.info()?, HeaderMap::new());
            Ok((response, ProviderUsage::default()))
        }
        Method::Embed => Ok(call.embed(decode(message)?).await?),
        Method::Rerank => Ok(call.rerank(decode(message)?).await?),
        method => Err(unsupported(provider, method).into()),
    }
}

struct Call<'a> {
    provider: &'a Arc<Provider>,
    started: Instant,
    context: CallContext<'a>,
}

impl Call<'_> {
    fn must_do(&self, expected: Task) -> Result<(), Error> {
        let (name, task) = (&self.provider.name, self.provider.task());
        if task == expected {
            return Ok(());
        }
        Err(Error::wrong_task(MODEL_KEY, name, task, expected))
    }

    fn info(&self) -> Result<tei::InfoResponse, Error> {
        let settings = self.provider.settings();
        let model_type = match settings.task {
            Task::Embedding => tei::ModelType::Embedding,
            Task::Rerank => tei::ModelType::Reranker,
            Task::Generation | Task::Classification | Task::Tabular => {
                return Err(unsupported(self.provider, Method::TeiInfo));
            }
        };
        let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        Ok(tei::InfoResponse {
            version: platform::VERSION.to_owned(),
            model_id: self.provider.name.clone(),
            model_sha: Some(MODEL_VERSION.to_owned()),
            model_dtype: "float32".to_owned(),
            model_type: model_type.into(),
            max_concurrent_requests: count(settings.concurrency_max),
            max_client_batch_size: count(settings.rows_max()),
            ..Default::default()
        })
    }

    async fn embed(&self, request: tei::EmbedRequest) -> Result<(Response, ProviderUsage), Error> {
        self.must_do(Task::Embedding)?;
        let dimensions = match request.dimensions {
            None => None,
            Some(count) => {
                let checked = dimensions(self.provider, count.into());
                Some(checked.map_err(|reason| Error::invalid("dimensions", reason))?)
            }
        };
        if request.prompt_name.is_some() {
            return Err(unknown_prompt(PROMPT_NAME, std::iter::empty()));
        }
        // The provider chooses where it truncates.
        truncation_direction(request.truncation_direction)?;
        let options = EmbeddingOptions {
            dimensions,
            normalize: request.normalize,
            truncate: request.truncate,
        };
        let characters = request.inputs.chars().count();
        let embeddings = self
            .provider
            .embed(&[request.inputs], options, self.context)
            .await
            .map_err(|error| {
                let field = match error {
                    ProviderError::UnsupportedDimensions => "dimensions",
                    _ => "inputs",
                };
                error.to_error(&self.provider.name, field)
            })?;
        let usage = ProviderUsage::of_input(embeddings.tokens);
        let metadata = self.metadata(characters, usage);
        let message = tei::EmbedResponse {
            embeddings: embeddings.vectors.into_iter().next().unwrap_or_default(),
            metadata: Some(metadata),
        };
        Ok((
            Response::own(&message, self.response_metadata(&metadata, usage)),
            usage,
        ))
    }

    async fn rerank(
        &self,
        request: tei::RerankRequest,
    ) -> Result<(Response, ProviderUsage), Error> {
        self.must_do(Task::Rerank)?;
        if request.texts.is_empty() {
            return Err(Error::invalid("texts", "must not be empty"));
        }
        let (count, rows_max) = (request.texts.len(), self.provider.settings().rows_max());
        if count > rows_max {
            let reason = format!("has {count} texts, over the limit of {rows_max} for a request");
            return Err(Error::invalid("texts", reason));
        }
        // The provider chooses where it truncates.
        truncation_direction(request.truncation_direction)?;
        let characters = request.texts.iter().map(|text| text.chars().count()).sum();
        let texts = request.texts.into_iter();
        let pairs: Vec<_> = texts.map(|text| (request.query.clone(), text)).collect();
        let (scores, usage) = self
            .provider
            .rerank(&pairs, self.context)
            .await
            .map_err(|error| error.to_error(&self.provider.name, "texts"))?;
        let ranks = pairs.into_iter().zip(scores).enumerate();
        let ranks = ranks.map(|(index, ((_, text), score))| tei::Rank {
            index: u32::try_from(index).unwrap_or(u32::MAX),
            text: request.return_text.then_some(text),
            score,
        });
        let mut ranks: Vec<tei::Rank> = ranks.collect();
        ranks.sort_by(|a, b| b.score.total_cmp(&a.score));
        let metadata = self.metadata(characters, usage);
        let message = tei::RerankResponse {
            ranks,
            metadata: Some(metadata),
        };
        Ok((
            Response::own(&message, self.response_metadata(&metadata, usage)),
            usage,
        ))
    }

    fn metadata(&self, characters: usize, usage: ProviderUsage) -> tei::Metadata {
        let elapsed = self.started.elapsed();
        let ns = u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX);
        tei::Metadata {
            compute_chars: u32::try_from(characters).unwrap_or(u32::MAX),
            compute_tokens: u32::try_from(usage.input_tokens).unwrap_or(u32::MAX),
            total_time_ns: ns,
            inference_time_ns: ns,
            ..Default::default()
        }
    }

    fn response_metadata(&self, timing: &tei::Metadata, usage: ProviderUsage) -> HeaderMap {
        let mut metadata = response_metadata(self.provider, usage);
        let compute_type = Some(HeaderValue::from_static("provider"));
        insert_compute_metadata(&mut metadata, compute_type, usage.tokens(), timing);
        metadata
    }
}
