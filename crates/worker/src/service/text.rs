//! `tei.v1`: typed text calls.

mod target;

use std::future::Future;
use std::time::Instant;

use bytes::Bytes;
use engine::{Task, TextOutput, Truncation};
use platform::grpc::{Call, Messages, Reply, bidirectional, decode, frame, reply};
use protocol::Error;
use protocol::tei::v1 as tei;
use tonic::Status;

use super::Service;
use crate::infer::{checked_dimensions, finish_embedding, finish_scores};
use crate::model::OwnedText;
use target::{Answered, Target, Texts, truncation};

impl Service {
    pub(super) async fn text(&self, method: &str, call: Call) -> Result<Reply, Status> {
        match method {
            "tei.v1.Info/Info" => self.one(call, Self::info).await,
            "tei.v1.Embed/Embed" => self.one(call, Self::embed).await,
            "tei.v1.Embed/EmbedStream" => self.many(call, Self::embed),
            "tei.v1.Embed/EmbedAll" => self.one(call, Self::embed_all).await,
            "tei.v1.Embed/EmbedAllStream" => self.many(call, Self::embed_all),
            "tei.v1.Embed/EmbedSparse" | "tei.v1.Embed/EmbedSparseStream" => {
                Err(Status::unimplemented(protocol::SPARSE_UNSUPPORTED))
            }
            "tei.v1.Predict/Predict" => self.one(call, Self::predict).await,
            "tei.v1.Predict/PredictStream" => self.many(call, Self::predict),
            "tei.v1.Predict/PredictPair" => self.one(call, Self::predict_pair).await,
            "tei.v1.Predict/PredictPairStream" => self.many(call, Self::predict_pair),
            "tei.v1.Rerank/Rerank" => self.one(call, Self::rerank).await,
            "tei.v1.Rerank/RerankStream" => self.rerank_stream(call).await,
            "tei.v1.Tokenize/Tokenize" => self.one(call, Self::tokenize).await,
            "tei.v1.Tokenize/TokenizeStream" => self.many(call, Self::tokenize),
            "tei.v1.Tokenize/Decode" => self.one(call, Self::decode_ids).await,
            "tei.v1.Tokenize/DecodeStream" => self.many(call, Self::decode_ids),
            _ => Err(Status::unimplemented(format!("unknown method {method}"))),
        }
    }

    /// Answers one message.
    async fn one<Q, A, F>(
        &self,
        call: Call,
        answer: impl FnOnce(Self, Q, Target) -> F,
    ) -> Result<Reply, Status>
    where
        Q: prost::Message + Default,
        A: prost::Message,
        F: Future<Output = Result<Answered<A>, Error>>,
    {
        let target = Target::of(&call)?;
        let message = call.into_messages(&self.0.limits).only().await?;
        let request = decode(message.bytes())?;
        let answered = answer(self.clone(), request, target).await?;
        Ok(reply(frame(&answered.message), answered.to_metadata()))
    }

    /// Answers each message of a stream.
    fn many<Q, A, F>(
        &self,
        call: Call,
        answer: impl Fn(Self, Q, Target) -> F + Send + Sync + Copy + 'static,
    ) -> Result<Reply, Status>
    where
        Q: prost::Message + Default,
        A: prost::Message,
        F: Future<Output = Result<Answered<A>, Error>> + Send,
    {
        let target = Target::of(&call)?;
        let settings = self.stream_settings(&call);
        let (patience, ends) = (call.deadline - call.arrived, call.stream_deadline);
        let own = self.clone();
        let messages = call.into_messages(&self.0.limits);
        Ok(bidirectional(messages, settings, move |message| {
            let own = own.clone();
            let deadline = ends.map_or_else(|| Instant::now() + patience, |end| end.into_std());
            let target = target.clone().until(deadline);
            async move {
                let request = decode(message.bytes())?;
                let answered = answer(own, request, target).await?;
                Ok::<Bytes, Status>(frame(&answered.message))
            }
        }))
    }

    async fn info(
        self,
        _: tei::InfoRequest,
        target: Target,
    ) -> Result<Answered<tei::InfoResponse>, Error> {
        let model = target.any_text_model(&self.0.repository)?;
        let (card, limits) = (&model.card, &model.limits);
        let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let model_type = match card.task {
            Task::Embedding => tei::ModelType::Embedding,
            Task::Rerank => tei::ModelType::Reranker,
            Task::Classification | Task::Tabular => tei::ModelType::Classifier,
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
            tokenization_workers: count(
                std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            ),
            ..Default::default()
        };
        Ok(Answered::free(message, &model))
    }

    async fn embed(
        self,
        request: tei::EmbedRequest,
        target: Target,
    ) -> Result<Answered<tei::EmbedResponse>, Error> {
        let model = target.model(&self.0.repository, Task::Embedding)?;
        let dimensions = match request.dimensions {
            None => model.card.width,
            Some(count) => checked_dimensions(count.into(), model.card.width)
                .map_err(|reason| Error::invalid("dimensions", reason))?,
        };
        let texts = Texts {
            texts: vec![OwnedText::One(request.inputs)],
            field: "inputs",
            prompt: request.prompt_name,
            wanted: TextOutput::Embedding,
            truncation: truncation(request.truncate, request.truncation_direction)?,
        };
        let mut vectors = target.run(&model, "Embed", texts).await?;
        let mut embeddings = vectors.message.pop().unwrap_or_default();
        finish_embedding(&mut embeddings, dimensions, request.normalize);
        Ok(vectors.with(|metadata| tei::EmbedResponse {
            embeddings,
            metadata: Some(metadata),
        }))
    }

    async fn embed_all(
        self,
        request: tei::EmbedAllRequest,
        target: Target,
    ) -> Result<Answered<tei::EmbedAllResponse>, Error> {
        let model = target.model(&self.0.repository, Task::Embedding)?;
        let texts = Texts {
            texts: vec![OwnedText::One(request.inputs)],
            field: "inputs",
            prompt: request.prompt_name,
            wanted: TextOutput::TokenEmbeddings,
            truncation: truncation(request.truncate, request.truncation_direction)?,
        };
        let mut vectors = target.run(&model, "EmbedAll", texts).await?;
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

    async fn predict(
        self,
        request: tei::PredictRequest,
        target: Target,
    ) -> Result<Answered<tei::PredictResponse>, Error> {
        let text = OwnedText::One(request.inputs);
        let truncation = truncation(request.truncate, request.truncation_direction)?;
        self.classify(text, truncation, request.raw_scores, target)
            .await
    }

    async fn predict_pair(
        self,
        request: tei::PredictPairRequest,
        target: Target,
    ) -> Result<Answered<tei::PredictResponse>, Error> {
        let [first, second]: [String; 2] = request
            .inputs
            .try_into()
            .map_err(|_| Error::invalid("inputs", "must be exactly two texts"))?;
        let text = OwnedText::Pair(first, second);
        let truncation = truncation(request.truncate, request.truncation_direction)?;
        self.classify(text, truncation, request.raw_scores, target)
            .await
    }

    async fn classify(
        self,
        text: OwnedText,
        truncation: Truncation,
        raw_scores: bool,
        target: Target,
    ) -> Result<Answered<tei::PredictResponse>, Error> {
        let model = target.model(&self.0.repository, Task::Classification)?;
        let texts = Texts {
            texts: vec![text],
            field: "inputs",
            prompt: None,
            wanted: TextOutput::Logits,
            truncation,
        };
        let mut vectors = target.run(&model, "Predict", texts).await?;
        let mut scores = vectors.message.pop().unwrap_or_default();
        if !raw_scores {
            finish_scores(&model, &mut scores);
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

    async fn rerank(
        self,
        request: tei::RerankRequest,
        target: Target,
    ) -> Result<Answered<tei::RerankResponse>, Error> {
        let model = target.model(&self.0.repository, Task::Rerank)?;
        if request.texts.is_empty() {
            return Err(Error::invalid("texts", "there are none"));
        }
        let returned = request.return_text.then(|| request.texts.clone());
        let query = request.query;
        let texts = Texts {
            texts: request
                .texts
                .into_iter()
                .map(|text| OwnedText::Pair(query.clone(), text))
                .collect(),
            field: "texts",
            prompt: None,
            wanted: TextOutput::Logits,
            truncation: truncation(request.truncate, request.truncation_direction)?,
        };
        let mut vectors = target.run(&model, "Rerank", texts).await?;
        let mut ranks: Vec<tei::Rank> = std::mem::take(&mut vectors.message)
            .into_iter()
            .enumerate()
            .map(|(index, mut scores)| {
                if !request.raw_scores {
                    finish_scores(&model, &mut scores);
                }
                tei::Rank {
                    index: u32::try_from(index).unwrap_or(u32::MAX),
                    text: returned
                        .as_ref()
                        .and_then(|texts| texts.get(index).cloned()),
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

    /// Gathers the texts of a stream, then answers once.
    async fn rerank_stream(&self, call: Call) -> Result<Reply, Status> {
        let target = Target::of(&call)?;
        let mut messages = call.into_messages(&self.0.limits);
        let gathered = gather(&mut messages, self.0.limits.message_bytes_max).await?;
        let answered = self.clone().rerank(gathered, target).await?;
        Ok(reply(frame(&answered.message), answered.to_metadata()))
    }

    async fn tokenize(
        self,
        request: tei::EncodeRequest,
        target: Target,
    ) -> Result<Answered<tei::EncodeResponse>, Error> {
        let model = target.any_text_model(&self.0.repository)?;
        let text = target::prompted(&model, request.prompt_name, request.inputs)?;
        target::check_length(&model, "inputs", &text)?;
        let tokenizer = target::tokenizer(&model)?;
        let tokens = tokenizer
            .tokens(&text, request.add_special_tokens)
            .map_err(|error| Error::invalid("inputs", error.to_string()))?;
        let place = |place: Option<usize>| place.and_then(|place| u32::try_from(place).ok());
        let message = tei::EncodeResponse {
            tokens: tokens
                .into_iter()
                .map(|token| tei::SimpleToken {
                    id: token.id,
                    text: token.text,
                    special: token.special,
                    start: place(token.start),
                    stop: place(token.stop),
                })
                .collect(),
        };
        Ok(Answered::free(message, &model))
    }

    async fn decode_ids(
        self,
        request: tei::DecodeRequest,
        target: Target,
    ) -> Result<Answered<tei::DecodeResponse>, Error> {
        let model = target.any_text_model(&self.0.repository)?;
        let text = target::tokenizer(&model)?
            .decode(&request.ids, request.skip_special_tokens)
            .map_err(|error| Error::invalid("ids", error.to_string()))?;
        Ok(Answered::free(tei::DecodeResponse { text }, &model))
    }
}

/// The messages of a rerank stream as one request, of at most `bytes_max`.
async fn gather(messages: &mut Messages, bytes_max: usize) -> Result<tei::RerankRequest, Status> {
    let mut gathered = tei::RerankRequest::default();
    let mut bytes = 0;
    while let Some(message) = messages.next().await? {
        bytes += message.bytes().len();
        if bytes > bytes_max {
            return Err(Error::too_large(bytes, bytes_max).to_status());
        }
        let next: tei::RerankStreamRequest = decode(message.bytes())?;
        if gathered.texts.is_empty() {
            gathered = tei::RerankRequest {
                query: next.query,
                texts: Vec::new(),
                truncate: next.truncate,
                raw_scores: next.raw_scores,
                return_text: next.return_text,
                truncation_direction: next.truncation_direction,
            };
        } else if next.query != gathered.query {
            let reason = "must be the same in every message of the stream";
            return Err(Error::invalid("query", reason).to_status());
        }
        gathered.texts.push(next.text);
    }
    Ok(gathered)
}
