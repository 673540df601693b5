//! One model version that serves: its checks, its tokenizer, its queue and the
//! thread behind it.

mod digest;
mod prompts;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use engine::{
    Card, EngineError, LoadOptions, Model, ModelFolder, Text, TextOutput, TokenRow, Tokenizer,
    Truncation,
};
use futures::future::try_join_all;
use http::HeaderValue;
use platform::pool::Cancelled;
use platform::pot::Held;
use protocol::{ModelName, ModelVersion, Signature};
use tokio::sync::oneshot;

use crate::device::Instance;
use crate::error::ModelError;
use crate::metrics::{ModelMetrics, WorkerMetrics};
use crate::queue::{Lane, Part, Queue, QueueLimits, Refusal, Rows, split};
use crate::work::{Size, Work};
use digest::Reads;
pub use prompts::{PromptChoice, Prompts, prompted};

/// Texts of at most so many bytes together are tokenized inline; longer ones on
/// the threads for work, since the network's threads must not stall.
const INLINE_TEXT_BYTES_MAX: usize = 4096;
/// What a token of a row takes in memory: its id and its type.
const TOKEN_BYTES: usize = 2 * size_of::<u32>();
/// About as many special tokens are around a text.
const SPECIAL_TOKENS: usize = 8;
/// Rows of features that read at most so many bytes of weights, counted once a
/// row, are computed inline: that takes microseconds, and waking the model's
/// thread takes tens of them.
const INLINE_WEIGHT_BYTES_MAX: u64 = 4 << 20;

/// The limits of one model, and the properties that its configuration declares.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelLimits {
    /// Batches and waiting rows.
    pub queue: QueueLimits,
    /// Rows of one request.
    pub request_rows_max: usize,
    /// Bytes of one text.
    pub text_bytes_max: usize,
    /// Whether the same input always has the same output, as the model's
    /// configuration declares: gateways may cache it.
    pub deterministic: bool,
}

/// Loads since the start of the process.
static LOADS: AtomicU64 = AtomicU64::new(1);

/// A model version that is ready.
pub struct ServedModel {
    /// Its name.
    pub name: ModelName,
    /// Its version.
    pub version: ModelVersion,
    /// The digest of its files and of how it computes; empty for a model that
    /// is not declared deterministic.
    pub digest: String,
    /// The number of this load in the process.
    pub generation: u64,
    /// The engine's description of it.
    pub card: Card,
    /// Its limits.
    pub limits: ModelLimits,
    /// Its metrics.
    pub metrics: ModelMetrics,
    /// Its tokenizer, if it reads text.
    pub tokenizer: Option<Arc<Tokenizer>>,
    /// Its prompts.
    pub prompts: Prompts,
    queue: Arc<Queue>,
    instance: Arc<Instance>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl std::fmt::Debug for ServedModel {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "ServedModel({} {})", self.name, self.version)
    }
}

/// One text, a pair, or the token ids of a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OwnedText {
    /// One text.
    One(String),
    /// Two texts. Pairs of one query share it.
    Pair(Arc<str>, Arc<str>),
    /// The token ids of a text.
    Ids(Vec<u32>),
}

impl OwnedText {
    /// The most tokens that it may have without special tokens: each has a byte.
    fn tokens_max(&self) -> usize {
        match self {
            Self::One(text) => text.len(),
            Self::Pair(first, second) => first.len() + second.len(),
            Self::Ids(ids) => ids.len(),
        }
    }
}

/// Texts of one request and what is computed of them.
#[derive(Debug, Clone)]
pub struct Texts {
    /// The texts.
    pub texts: Vec<OwnedText>,
    /// What is put before each [`OwnedText::One`]; token ids are what they are.
    pub prompt: Option<Arc<str>>,
    /// The kind of output of each.
    pub output: TextOutput,
    /// The truncation of those that are too long.
    pub truncation: Truncation,
}

impl Texts {
    fn prompt_bytes(&self) -> usize {
        self.prompt.as_deref().map_or(0, str::len)
    }

    /// Bytes to tokenize; a text that several pairs share is tokenized once.
    fn bytes(&self) -> usize {
        let mut shared: Option<&Arc<str>> = None;
        let prompt = self.prompt_bytes();
        let bytes = self.texts.iter().map(|text| match text {
            OwnedText::One(text) => prompt + text.len(),
            OwnedText::Ids(ids) => ids.len() * size_of::<u32>(),
            OwnedText::Pair(first, second) => {
                let same = shared.is_some_and(|shared| Arc::ptr_eq(shared, first));
                shared = Some(first);
                second.len() + if same { 0 } else { first.len() }
            }
        });
        bytes.sum()
    }
}

/// The usage of a response: tokens and time.
#[derive(Debug, Default, Clone, Copy)]
pub struct Usage {
    /// Tokens computed.
    pub tokens: usize,
    /// Characters of the texts without their prompt, as `tei.v1` counts them.
    pub characters: usize,
    /// Tokenizing.
    pub tokenize: Duration,
    /// Waiting.
    pub queue: Duration,
    /// On the device.
    pub compute: Duration,
}

/// When a request is computed, among others.
#[derive(Debug, Clone)]
pub struct Urgency {
    /// Whose it is: lanes take turns.
    pub lane: Lane,
    /// 1 is served first of its lane; 0 after every other.
    pub priority: u64,
    /// When the caller stops waiting.
    pub deadline: Instant,
}

/// Why one of several texts was not tokenized.
#[derive(Debug)]
pub struct TextError {
    /// The text's index.
    pub index: usize,
    /// Why.
    pub error: EngineError,
}

/// A version of a model.
#[derive(Debug, Clone)]
pub struct ModelId {
    /// The model.
    pub name: ModelName,
    /// Its version.
    pub version: ModelVersion,
}

impl ServedModel {
    /// Loads a model folder, computes one row to warm up, and starts its
    /// thread. Blocks for as long as that takes.
    pub fn start(
        id: ModelId,
        mut folder: ModelFolder,
        options: &LoadOptions,
        limits: ModelLimits,
        metrics: &WorkerMetrics,
    ) -> Result<Self, EngineError> {
        let ModelId { name, version } = id;
        let reads = Reads::default();
        if limits.deterministic {
            folder.observe = Some(reads.observer());
        }
        let mut model = engine::load_from(&folder, options)?;
        warm_up(&mut model)?;
        let card = model.card().clone();
        let prompts = Prompts::of(&card)?;
        let tokenizer = model.tokenizer().cloned();
        let digest = if limits.deterministic {
            reads.digest(options, &card)?
        } else {
            String::new()
        };
        let inline_max = if card.task == engine::Task::Tabular {
            INLINE_WEIGHT_BYTES_MAX / card.weight_bytes.max(1)
        } else {
            0
        };
        let inline_max = usize::try_from(inline_max).unwrap_or(usize::MAX);
        let queue = Arc::new(Queue::new(limits.queue.clone(), inline_max));
        let metrics = metrics.model(&name, version, queue.clone());
        let instance = Instance::new(model, queue.clone(), metrics.clone());
        let instance = Arc::new(instance);
        let thread = instance.start(name.as_str()).map_err(|error| {
            EngineError::Device(format!("the thread cannot be started: {error}"))
        })?;
        Ok(Self {
            name,
            version,
            digest,
            generation: LOADS.fetch_add(1, Ordering::Relaxed),
            card,
            limits,
            metrics,
            tokenizer,
            prompts,
            queue,
            instance,
            thread: Mutex::new(Some(thread)),
        })
    }

    /// The model's task.
    pub fn task(&self) -> protocol::Task {
        match self.card.task {
            engine::Task::Embedding => protocol::Task::Embedding,
            engine::Task::Classification => protocol::Task::Classification,
            engine::Task::Rerank => protocol::Task::Rerank,
            engine::Task::Tabular => protocol::Task::Tabular,
        }
    }

    /// The inputs and outputs of the model.
    pub fn signature(&self) -> Signature<'_> {
        Signature {
            inputs: &self.card.inputs,
            takes_ids: self.takes_ids(),
            outputs: &self.card.outputs,
            rows_max: self.limits.request_rows_max,
        }
    }

    /// Whether it takes lists of token ids in place of texts: a pair's two texts
    /// could not be told apart in them.
    pub fn takes_ids(&self) -> bool {
        use engine::Task::{Classification, Embedding};
        matches!(self.card.task, Embedding | Classification)
    }

    /// The digest as an entry of metadata, for a model that has one.
    pub fn digest_value(&self) -> Option<HeaderValue> {
        let digest = Some(&self.digest).filter(|digest| !digest.is_empty())?;
        HeaderValue::try_from(digest).ok()
    }

    /// Lets the waiting rows finish, ends the thread and frees the memory.
    /// Blocks for as long as that takes.
    pub fn stop(&self) {
        self.queue.close();
        let thread = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            tracing::error!(model = %self.name, "the model's thread panicked");
        }
    }

    /// Waiting rows, and how long a new row will probably wait.
    pub fn load(&self) -> (usize, Duration) {
        self.queue.load()
    }

    /// How long a token takes to compute, in nanoseconds; 0 before the first batch.
    pub fn token_ns(&self) -> u64 {
        let time = self.queue.token_time();
        u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
    }

    /// Tokenizes texts, computes them and returns one vector for each.
    pub async fn texts(
        &self,
        request: Texts,
        urgency: Urgency,
        work: &Work,
    ) -> Result<Result<(Vec<Vec<f32>>, Usage), TextError>, ModelError> {
        let Some(tokenizer) = self.tokenizer.clone() else {
            return Err(ModelError::Engine("the model has no tokenizer".to_owned()));
        };
        let items = request.texts.len();
        let held = self.reserve(items, &urgency)?;
        let _memory = work.hold(self.row_bytes(&request))?;
        let started = Instant::now();
        let bytes = request.bytes();
        let rows = if bytes <= INLINE_TEXT_BYTES_MAX {
            tokenize(&tokenizer, &request, &Cancelled::never())
        } else {
            let tokenize = move |cancelled: &Cancelled| tokenize(&tokenizer, &request, cancelled);
            work.run(Size { items, bytes }, tokenize).await?
        };
        let (rows, characters) = match rows {
            Ok((rows, characters)) => (Rows::Text(rows), characters),
            Err(error) => return Ok(Err(error)),
        };
        let tokenize = started.elapsed();
        self.metrics.tokenized(tokenize);
        let tokens = rows.tokens();
        let (outputs, queue, compute) = self.compute(rows, held, urgency).await?;
        let usage = Usage {
            tokens,
            characters,
            tokenize,
            queue,
            compute,
        };
        Ok(Ok((outputs, usage)))
    }

    /// The most memory that the rows of texts take: a short request may have a
    /// long query, or a prompt, in each of its rows.
    fn row_bytes(&self, request: &Texts) -> usize {
        let tokens_max = self.card.tokens_max;
        let added = SPECIAL_TOKENS + request.prompt_bytes();
        let tokens = |text: &OwnedText| {
            let tokens = text.tokens_max().saturating_add(added);
            tokens.min(tokens_max) * TOKEN_BYTES
        };
        request.texts.iter().map(tokens).sum()
    }

    /// Holds room in the queue for the rows of a request.
    pub fn reserve(&self, rows: usize, urgency: &Urgency) -> Result<Held, ModelError> {
        let held = self.queue.reserve(&urgency.lane, rows, urgency.deadline);
        held.map_err(|refusal| self.refuse(&refusal, rows))
    }

    /// Queues rows, for which room is held, and waits until every part of them is
    /// computed. Returns one vector a row, the longest wait of a part and the compute time of all.
    /// Dropping the future cancels them, in the queue or on the device.
    pub async fn compute(
        &self,
        rows: Rows,
        held: Held,
        urgency: Urgency,
    ) -> Result<(Vec<Vec<f32>>, Duration, Duration), ModelError> {
        let count = rows.count();
        let queued_at = Instant::now();
        let mut waits = Vec::new();
        let parts = split(rows, &self.limits.queue)
            .into_iter()
            .map(|rows| {
                let (reply, wait) = oneshot::channel();
                waits.push(wait);
                Part {
                    rows,
                    priority: urgency.priority,
                    deadline: urgency.deadline,
                    queued_at,
                    reply,
                }
            })
            .collect();
        let own = self.queue.push(parts, &urgency.lane, held);
        if let Some(batch) = own.map_err(|refusal| self.refuse(&refusal, count))? {
            self.instance.compute(batch);
        }
        let parts = try_join_all(waits.into_iter().map(|wait| async {
            // The thread only drops a reply when it ends.
            wait.await.unwrap_or(Err(ModelError::Unloading))
        }));
        let parts = tokio::time::timeout_at(urgency.deadline.into(), parts)
            .await
            .map_err(|_| ModelError::DeadlinePassed)??;
        let queue = parts.iter().map(|p| p.queued).max().unwrap_or_default();
        let compute = parts.iter().map(|part| part.computed).sum();
        let outputs = parts.into_iter().flat_map(|part| part.outputs).collect();
        Ok((outputs, queue, compute))
    }

    fn refuse(&self, refusal: &Refusal, rows: usize) -> ModelError {
        match refusal {
            Refusal::Full(wait) => {
                self.metrics.refused("queue_full", rows);
                ModelError::QueueFull { retry_after: *wait }
            }
            Refusal::TooLate => {
                self.metrics.refused("deadline", rows);
                ModelError::TooLate
            }
            Refusal::Closed => ModelError::Unloading,
        }
    }
}

impl Drop for ServedModel {
    fn drop(&mut self) {
        // The thread ends by itself when its queue is closed and empty.
        self.queue.close();
    }
}

/// The rows of texts, and how many characters these have.
fn tokenize(
    tokenizer: &Tokenizer,
    request: &Texts,
    cancelled: &Cancelled,
) -> Result<(Vec<(TokenRow, TextOutput)>, usize), TextError> {
    let prompt = request.prompt.as_deref();
    let skipped = tokenizer.skipped(prompt.unwrap_or_default());
    let skipped = skipped.map_err(|error| TextError { index: 0, error })?;
    let mut tokenizing = Tokenizing {
        tokenizer,
        prompt,
        skipped,
        truncation: request.truncation,
        cancelled,
        shared: None,
        characters: 0,
    };
    let mut rows = Vec::with_capacity(request.texts.len());
    for (index, text) in request.texts.iter().enumerate() {
        let row = tokenizing.row(text);
        let row = row.map_err(|error| TextError { index, error })?;
        rows.push((row, request.output));
    }
    Ok((rows, tokenizing.characters))
}

/// Tokenizes the texts of one request, one after the other.
struct Tokenizing<'r> {
    tokenizer: &'r Tokenizer,
    prompt: Option<&'r str>,
    /// Tokens of the prompt that pooling leaves out.
    skipped: usize,
    truncation: Truncation,
    cancelled: &'r Cancelled,
    /// The first text of the last pair.
    shared: Option<First<'r>>,
    characters: usize,
}

/// The first text of a pair, and what is needed of it again.
struct First<'r> {
    text: &'r Arc<str>,
    ids: Vec<u32>,
    characters: usize,
}

impl<'r> Tokenizing<'r> {
    fn row(&mut self, text: &'r OwnedText) -> Result<TokenRow, EngineError> {
        let cancelled = self.cancelled;
        let should_continue = || !cancelled.is_set();
        if !should_continue() {
            return Err(EngineError::Cancelled);
        }
        let (tokenizer, truncation) = (self.tokenizer, self.truncation);
        match text {
            OwnedText::One(text) => {
                self.characters += text.chars().count();
                let text = prompted(self.prompt, text);
                let row = tokenizer.encode_while(Text::Single(&text), truncation, &should_continue);
                row.map(|row| TokenRow {
                    skipped: self.skipped,
                    ..row
                })
            }
            OwnedText::Ids(ids) => tokenizer.encode_ids(ids, truncation),
            OwnedText::Pair(first, second) => {
                let known = self.shared.take();
                let first = match known.filter(|known| Arc::ptr_eq(known.text, first)) {
                    Some(known) => known,
                    None => First {
                        text: first,
                        ids: tokenizer.ids(first, &should_continue)?,
                        characters: first.chars().count(),
                    },
                };
                self.characters += first.characters + second.chars().count();
                let second = tokenizer.ids(second, &should_continue)?;
                let row = tokenizer.encode_pair(&first.ids, &second, truncation);
                self.shared = Some(first);
                row
            }
        }
    }
}

/// Runs a first forward pass, which does the lazy initialization.
fn warm_up(model: &mut Model) -> Result<(), EngineError> {
    match model {
        Model::Encoder(model) => {
            let tokens = model
                .tokenizer()
                .encode(Text::Single("warm up"), Truncation::Right)?;
            let output = if model.card().task == engine::Task::Embedding {
                TextOutput::Embedding
            } else {
                TextOutput::Logits
            };
            let row = engine::TextRow {
                tokens: &tokens,
                output,
            };
            model.forward(&[row], &|| true)?;
        }
        Model::Tabular(model) => {
            let input = model.card().inputs.first();
            let width = input.and_then(|input| input.shape.last().copied());
            let width = width.and_then(|width| usize::try_from(width).ok());
            model.forward(&vec![0.0; width.unwrap_or(0)], 1, &|| true)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linear::{self, doubles};

    /// Pairs of one query.
    fn ranked(query: &str, texts: usize) -> Texts {
        let query: Arc<str> = query.into();
        let pair = |_| OwnedText::Pair(query.clone(), "a candle".into());
        Texts {
            texts: (0..texts).map(pair).collect(),
            prompt: None,
            output: TextOutput::Logits,
            truncation: Truncation::Right,
        }
    }

    #[test]
    fn a_prompt_is_before_a_text_and_not_before_ids() {
        let model = linear::model("bert-embedding");
        let tokenizer = model.tokenizer.clone().unwrap();
        let request = |text: &OwnedText, prompt: Option<&str>| Texts {
            texts: vec![text.clone()],
            prompt: prompt.map(Arc::from),
            output: TextOutput::Embedding,
            truncation: Truncation::Right,
        };
        let ids = |request: &Texts| {
            let (rows, characters) = tokenize(&tokenizer, request, &Cancelled::never()).unwrap();
            assert!(rows[0].0.ids.len() * TOKEN_BYTES <= model.row_bytes(request));
            (rows[0].0.ids.clone(), characters)
        };
        let lantern = OwnedText::One("lantern".to_owned());
        let whole = OwnedText::One("query: lantern".to_owned());
        let (with_prompt, characters) = ids(&request(&lantern, Some("query: ")));
        assert_eq!(with_prompt, ids(&request(&whole, None)).0);
        assert_ne!(with_prompt, ids(&request(&lantern, None)).0);
        assert_eq!(characters, "lantern".len());
        let prompted = request(&lantern, Some("query: "));
        assert_eq!(prompted.bytes(), "query: lantern".len());
        let list = OwnedText::Ids(vec![7, 8]);
        assert_eq!(
            ids(&request(&list, Some("query: "))),
            ids(&request(&list, None))
        );
    }

    #[test]
    fn twice_a_rerank_is_tokenized_in_twice_the_time() {
        let model = linear::model("bert-rerank");
        let tokenizer = model.tokenizer.clone().unwrap();
        let read = |request: Texts| {
            let most = model.row_bytes(&request);
            let (rows, _) = tokenize(&tokenizer, &request, &Cancelled::never()).unwrap();
            let tokens: usize = rows.iter().map(|(row, _)| row.ids.len()).sum();
            assert!(tokens * TOKEN_BYTES <= most, "{tokens} tokens");
            assert!(request.bytes() > 0 && rows.len() == request.texts.len());
        };
        doubles("texts", 10_000, |n| ranked("a lantern", n), read);
        let long = |n: usize| ranked(&"a lantern ".repeat(n), 4);
        doubles("a long query", 20_000, long, read);
        // If each text read the query again, both would take four times as long.
        let both = |n: usize| ranked(&"a lantern ".repeat(n), n);
        doubles("texts and a long query", 10_000, both, read);
    }
}
