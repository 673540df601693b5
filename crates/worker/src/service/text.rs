//! `tei.v1`: typed text calls.

mod target;

use std::future::Future;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use engine::{TextOutput, Token, Truncation};
use platform::grpc::{Call, Reply, bidirectional, frame, reply};
use platform::pool::Cancelled;
use protocol::tei::v1 as tei;
use protocol::{Error, Method, RerankGathering, Task, checked_dimensions};
use tonic::Status;

use super::{INLINE_MESSAGE_BYTES_MAX, Service};
use crate::infer::finish_embedding;
use crate::model::prompted;
use crate::work::{Size, Work};
pub(super) use target::Target;
use target::{TextRequest, TextResponse, TextsField, truncation};

/// Longer texts and lists of ids are tokenized and decoded on the threads for
/// work.
const INLINE_BYTES_MAX: usize = 4096;
/// Responses of more parts are encoded on the threads for work.
const INLINE_PARTS_MAX: usize = 1024;
/// What a token takes while it is told to a caller: its name, its offsets, and the
/// message. A text has at most a token for each byte, and mostly a fourth.
const TOKENIZED_BYTES: usize = 64;

impl Service {
    /// Responds to a call of one message.
    pub(super) async fn text<Q, A, F>(
        &self,
        call: Call,
        respond: impl FnOnce(Self, Q, Target) -> F,
    ) -> Result<Reply, Status>
    where
        Q: prost::Message + Default + 'static,
        A: prost::Message + 'static,
        F: Future<Output = Result<TextResponse<A>, Error>>,
    {
        let target = Target::of(&call)?;
        let message = self.messages(call, &target.lane).only().await?;
        let work = self.work(&target.lane);
        let (request, _decoded) = self.decode(&message, &target).await?;
        let response = respond(self.clone(), request, target).await?;
        let metadata = response.to_metadata();
        Ok(reply(framed(response, &work).await?, metadata))
    }

    /// Responds to each message of a stream.
    pub(super) fn text_stream<Q, A, F>(
        &self,
        call: Call,
        respond: impl Fn(Self, Q, Target) -> F + Send + Sync + Copy + 'static,
    ) -> Result<Reply, Status>
    where
        Q: prost::Message + Default + 'static,
        A: prost::Message + 'static,
        F: Future<Output = Result<TextResponse<A>, Error>> + Send,
    {
        let target = Target::of(&call)?;
        let settings = self.stream_settings(&call)?;
        let (timeout, ends) = (call.deadline - call.arrived, call.stream_deadline);
        let own = self.clone();
        let messages = self.messages(call, &target.lane);
        Ok(bidirectional(messages, settings, move |message| {
            let own = own.clone();
            let deadline = ends.map_or_else(|| Instant::now() + timeout, |end| end.into_std());
            let target = target.clone().until(deadline);
            async move {
                let work = own.work(&target.lane);
                let (request, _decoded) = own.decode(&message, &target).await?;
                let response = respond(own, request, target).await?;
                Ok::<Bytes, Status>(framed(response, &work).await?)
            }
        }))
    }

    pub(super) async fn info(
        self,
        _: tei::InfoRequest,
        target: Target,
    ) -> Result<TextResponse<tei::InfoResponse>, Error> {
        let model = target.any_text_model(&self.0.repository)?;
        let (card, limits) = (&model.card, &model.limits);
        let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let model_type = match model.task() {
            Task::Embedding => tei::ModelType::Embedding,
            Task::Rerank => tei::ModelType::Reranker,
            Task::Classification | Task::Generation | Task::Tabular => tei::ModelType::Classifier,
        };
        let message = tei::InfoResponse {
            version: platform::VERSION.to_owned(),
            model_id: model.name.to_string(),
            model_sha: Some(model.version.to_string()),
            model_dtype: match card.dtype {
                engine::Dtype::F32 | engine::Dtype::Auto => "float32",
                engine::Dtype::F16 => "float16",
                engine::Dtype::Bf16 => "bfloat16",
                engine::Dtype::Int8 => "int8",
            }
            .to_owned(),
            model_type: model_type.into(),
            max_concurrent_requests: count(limits.queue.rows_max),
            max_input_length: count(card.tokens_max),
            max_batch_tokens: count(limits.queue.batch_tokens_max),
            max_batch_requests: Some(count(limits.queue.batch_rows_max)),
            max_client_batch_size: count(limits.request_rows_max),
            tokenization_workers: count(self.0.process.cores),
            ..Default::default()
        };
        Ok(TextResponse::free(message, &model))
    }

    pub(super) async fn embed(
        self,
        request: tei::EmbedRequest,
        target: Target,
    ) -> Result<TextResponse<tei::EmbedResponse>, Error> {
        let model = target.model(&self.0.repository, Task::Embedding)?;
        let dimensions = match request.dimensions {
            None => model.card.width,
            Some(count) => checked_dimensions(count.into(), model.card.width)
                .map_err(|reason| Error::invalid("dimensions", reason))?,
        };
        let texts = TextRequest {
            texts: TextsField::One(request.inputs),
            prompt: request.prompt_name,
            output: TextOutput::Embedding,
            truncation: truncation(request.truncate, request.truncation_direction)?,
        };
        let mut vectors = target
            .run(&model, Method::Embed, texts, &self.work(&target.lane))
            .await?;
        let mut embeddings = vectors.message.pop().unwrap_or_default();
        finish_embedding(&mut embeddings, dimensions, request.normalize);
        Ok(vectors.with(|metadata| tei::EmbedResponse {
            embeddings,
            metadata: Some(metadata),
        }))
    }

    pub(super) async fn embed_all(
        self,
        request: tei::EmbedAllRequest,
        target: Target,
    ) -> Result<TextResponse<tei::EmbedAllResponse>, Error> {
        let model = target.model(&self.0.repository, Task::Embedding)?;
        let texts = TextRequest {
            texts: TextsField::One(request.inputs),
            prompt: request.prompt_name,
            output: TextOutput::TokenEmbeddings,
            truncation: truncation(request.truncate, request.truncation_direction)?,
        };
        let mut vectors = target
            .run(&model, Method::EmbedAll, texts, &self.work(&target.lane))
            .await?;
        let states = vectors.message.pop().unwrap_or_default();
        let token_embeddings = states
            .chunks(model.card.hidden.max(1))
            .map(|embeddings| tei::TokenEmbedding {
                embeddings: embeddings.to_vec(),
            })
            .collect();
        Ok(vectors.with(|metadata| tei::EmbedAllResponse {
            token_embeddings,
            metadata: Some(metadata),
        }))
    }

    pub(super) async fn predict(
        self,
        request: tei::PredictRequest,
        target: Target,
    ) -> Result<TextResponse<tei::PredictResponse>, Error> {
        let text = TextsField::One(request.inputs);
        let truncation = truncation(request.truncate, request.truncation_direction)?;
        self.classify(text, truncation, request.raw_scores, target)
            .await
    }

    pub(super) async fn predict_pair(
        self,
        request: tei::PredictPairRequest,
        target: Target,
    ) -> Result<TextResponse<tei::PredictResponse>, Error> {
        let [first, second]: [String; 2] = request
            .inputs
            .try_into()
            .map_err(|_| Error::invalid("inputs", "must have exactly two texts"))?;
        let text = TextsField::Pair(first, second);
        let truncation = truncation(request.truncate, request.truncation_direction)?;
        self.classify(text, truncation, request.raw_scores, target)
            .await
    }

    async fn classify(
        self,
        text: TextsField,
        truncation: Truncation,
        raw_scores: bool,
        target: Target,
    ) -> Result<TextResponse<tei::PredictResponse>, Error> {
        let model = target.model(&self.0.repository, Task::Classification)?;
        let texts = TextRequest {
            texts: text,
            prompt: None,
            output: TextOutput::Logits,
            truncation,
        };
        let mut vectors = target
            .run(&model, Method::Predict, texts, &self.work(&target.lane))
            .await?;
        let mut scores = vectors.message.pop().unwrap_or_default();
        if !raw_scores {
            model.card.tei_activation.apply(&mut scores);
        }
        let mut predictions: Vec<tei::Prediction> = scores
            .into_iter()
            .zip(&model.card.labels)
            .map(|(score, label)| tei::Prediction {
                score,
                label: label.clone(),
            })
            .collect();
        predictions.sort_by(|a, b| b.score.total_cmp(&a.score));
        Ok(vectors.with(|metadata| tei::PredictResponse {
            predictions,
            metadata: Some(metadata),
        }))
    }

    pub(super) async fn rerank(
        self,
        request: tei::RerankRequest,
        target: Target,
    ) -> Result<TextResponse<tei::RerankResponse>, Error> {
        let model = target.model(&self.0.repository, Task::Rerank)?;
        if request.texts.is_empty() {
            return Err(Error::invalid("texts", "must not be empty"));
        }
        target::check_count(&model, request.texts.len())?;
        let texts: Vec<Arc<str>> = request.texts.into_iter().map(Arc::from).collect();
        let returned = request.return_text.then(|| texts.clone());
        let texts = TextRequest {
            texts: TextsField::Ranked(request.query.into(), texts),
            prompt: None,
            output: TextOutput::Logits,
            truncation: truncation(request.truncate, request.truncation_direction)?,
        };
        let mut vectors = target
            .run(&model, Method::Rerank, texts, &self.work(&target.lane))
            .await?;
        let mut ranks: Vec<tei::Rank> = std::mem::take(&mut vectors.message)
            .into_iter()
            .enumerate()
            .map(|(index, mut scores)| {
                if !request.raw_scores {
                    model.card.tei_activation.apply(&mut scores);
                }
                tei::Rank {
                    index: u32::try_from(index).unwrap_or(u32::MAX),
                    text: returned
                        .as_ref()
                        .and_then(|texts| texts.get(index).map(ToString::to_string)),
                    score: scores.first().copied().unwrap_or_default(),
                }
            })
            .collect();
        ranks.sort_by(|a, b| b.score.total_cmp(&a.score));
        Ok(vectors.with(|metadata| tei::RerankResponse {
            ranks,
            metadata: Some(metadata),
        }))
    }

    /// Gathers the texts of a stream into one request, and responds to that.
    pub(super) async fn rerank_stream(&self, call: Call) -> Result<Reply, Status> {
        let target = Target::of(&call)?;
        let model = target.model(&self.0.repository, Task::Rerank)?;
        let (bytes_max, texts_max) = (
            self.0.limits.message_bytes_max,
            model.limits.request_rows_max,
        );
        drop(model);
        let mut messages = self.messages(call, &target.lane);
        let mut gathering = RerankGathering::default();
        let work = self.work(&target.lane);
        // What is gathered stays counted as in flight until the response.
        let mut held = Vec::new();
        while let Some(message) = messages.next().await? {
            gathering.reserve(message.bytes().len(), bytes_max)?;
            held.push(work.hold(message.bytes().len())?);
            let (part, decoded) = self.decode(&message, &target).await?;
            held.push(decoded);
            gathering.push(part, texts_max)?;
        }
        let request = gathering.into_request();
        let response = self.clone().rerank(request, target).await?;
        Ok(reply(frame(&response.message), response.to_metadata()))
    }

    pub(super) async fn tokenize(
        self,
        request: tei::EncodeRequest,
        target: Target,
    ) -> Result<TextResponse<tei::EncodeResponse>, Error> {
        let model = target.any_text_model(&self.0.repository)?;
        target::check_length(&model, &request.inputs, || "inputs".into())?;
        let prompt = target::prompt(&model, request.prompt_name.as_deref())?;
        let text = prompted(prompt.as_deref(), &request.inputs).into_owned();
        let tokenizer = target::tokenizer(&model)?;
        let work = self.work(&target.lane);
        let bytes = text.len();
        let _memory = work.hold(bytes * TOKENIZED_BYTES)?;
        let special = request.add_special_tokens;
        let tokenize = move |cancelled: &Cancelled| {
            let tokens = tokenizer.tokens(&text, special, &|| !cancelled.is_set());
            tokens.map(|tokens| tei::EncodeResponse {
                tokens: tokens.into_iter().map(simple_token).collect(),
            })
        };
        let tokens = if bytes <= INLINE_BYTES_MAX {
            tokenize(&Cancelled::never())
        } else {
            work.run(Size { items: 1, bytes }, tokenize).await?
        };
        let message = tokens.map_err(|error| Error::invalid("inputs", error.to_string()))?;
        let parts = message.tokens.len();
        Ok(TextResponse::free(message, &model).of_parts(parts))
    }

    pub(super) async fn decode_ids(
        self,
        request: tei::DecodeRequest,
        target: Target,
    ) -> Result<TextResponse<tei::DecodeResponse>, Error> {
        let model = target.any_text_model(&self.0.repository)?;
        let tokenizer = target::tokenizer(&model)?;
        let (count, ids_max) = (request.ids.len(), model.limits.text_bytes_max);
        if count > ids_max {
            let reason = format!("has {count} ids, over the limit of {ids_max}");
            return Err(Error::invalid("ids", reason));
        }
        let work = self.work(&target.lane);
        let bytes = count * size_of::<u32>();
        let _memory = work.hold(count * TOKENIZED_BYTES)?;
        let decode = move || tokenizer.decode(&request.ids, request.skip_special_tokens);
        let text = if bytes <= INLINE_BYTES_MAX {
            decode()
        } else {
            work.run(Size { items: 1, bytes }, move |_| decode())
                .await?
        };
        let text = text.map_err(|error| Error::invalid("ids", error.to_string()))?;
        Ok(TextResponse::free(tei::DecodeResponse { text }, &model))
    }
}

/// A token as messages have it.
fn simple_token(token: Token) -> tei::SimpleToken {
    let offset = |offset: Option<usize>| offset.and_then(|offset| u32::try_from(offset).ok());
    tei::SimpleToken {
        id: token.id,
        text: token.text,
        special: token.special,
        start: offset(token.start),
        stop: offset(token.stop),
    }
}

/// A response with its prefix; a long one is encoded on a thread for work, where
/// its length is counted too if it has many parts.
async fn framed<A>(response: TextResponse<A>, work: &Work) -> Result<Bytes, Error>
where
    A: prost::Message + 'static,
{
    let TextResponse { message, parts, .. } = response;
    if parts <= INLINE_PARTS_MAX && message.encoded_len() <= INLINE_MESSAGE_BYTES_MAX {
        return Ok(frame(&message));
    }
    let size = Size {
        items: 1,
        bytes: parts * size_of::<tei::SimpleToken>(),
    };
    work.run(size, move |_| frame(&message)).await
}
