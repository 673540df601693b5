//! Encoder models: batches of tokenized texts through an encoder, to embeddings or logits.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::Device;

use crate::card::Card;
use crate::error::EngineError;
use crate::families::LoadedEncoder;
use crate::families::embedding_head::EmbeddingHead;
use crate::kernels;
use crate::layers::{Batch, HiddenStates, PackedRow, Placement};
use crate::tokenizer::{TokenRow, Tokenizer};

/// Tokens of a chunk: enough for a matrix multiplication to come near the CPU's peak, and few
/// enough for the activations between two of them to stay in its second-level cache.
const CHUNK_TOKENS: usize = 192;
/// Where the largest chunk has more tokens than its thread's share by this factor, the threads
/// share each multiplication instead.
const SHARE_EXCESS_MAX: f64 = 1.4;

/// The output of a row of text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TextOutput {
    /// The embedding: pooled, not normalized.
    Embedding,
    /// The hidden state of each token.
    TokenEmbeddings,
    /// The logits of the labels.
    Logits,
}

/// One row of a batch.
#[derive(Debug, Clone, Copy)]
pub struct TextRow<'a> {
    /// Its tokens.
    pub tokens: &'a TokenRow,
    /// The requested output.
    pub output: TextOutput,
}

/// An encoder with its tokenizer and its head: rows of tokens to embeddings or logits. One thread
/// owns it.
pub struct EncoderModel {
    card: Card,
    tokenizer: Arc<Tokenizer>,
    placement: Placement,
    encoder: LoadedEncoder,
    head: EmbeddingHead,
}

impl EncoderModel {
    pub(crate) fn new(
        card: Card,
        tokenizer: Tokenizer,
        placement: Placement,
        encoder: LoadedEncoder,
        head: EmbeddingHead,
    ) -> Self {
        Self {
            card,
            tokenizer: Arc::new(tokenizer),
            placement,
            encoder,
            head,
        }
    }

    /// The card of the model.
    pub fn card(&self) -> &Card {
        &self.card
    }

    /// The tokenizer, which any number of threads may share.
    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.tokenizer
    }

    /// Runs rows of any lengths as one batch, without padding. One flat vector for each row, in
    /// order: `[width]` for an embedding, `[tokens, hidden]` for token embeddings, `[labels]` for
    /// logits. `should_continue` is called before each layer.
    ///
    /// # Errors
    /// [`EngineError::Cancelled`] once `should_continue` returns false; an error for which
    /// [`EngineError::is_callers_input`] holds for rows that the model cannot take;
    /// [`EngineError::OutOfMemory`] and [`EngineError::Device`].
    pub fn forward(
        &mut self,
        rows: &[TextRow<'_>],
        should_continue: &(dyn Fn() -> bool + Sync),
    ) -> Result<Vec<Vec<f32>>, EngineError> {
        self.check(rows)?;
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        match &self.placement {
            Placement::Cpu(_) => self.forward_chunks(rows, should_continue),
            Placement::Device { device, .. } => {
                device.with_context(|| self.forward_batch(rows, device, should_continue))
            }
        }
    }

    /// Refuses rows that would read past an embedding table, and outputs that the model does not
    /// have.
    fn check(&self, rows: &[TextRow<'_>]) -> Result<(), EngineError> {
        for row in rows {
            let TokenRow { ids, type_ids, .. } = row.tokens;
            if ids.is_empty() || ids.len() != type_ids.len() {
                return Err(EngineError::InvalidInput(
                    "a row must have at least one token, and a token type for each".to_owned(),
                ));
            }
            if ids.len() > self.card.tokens_max {
                return Err(EngineError::TooManyTokens {
                    tokens: ids.len(),
                    tokens_max: self.card.tokens_max,
                });
            }
            let is_unknown = |id: &&u32| **id as usize >= self.encoder.vocabulary;
            if let Some(id) = ids.iter().find(is_unknown) {
                return Err(EngineError::UnknownTokenId { id: *id });
            }
            match (row.output, &self.encoder.head) {
                (TextOutput::Logits, None) => {
                    return Err(EngineError::UnsupportedOutput(
                        "an embedding model has no scores",
                    ));
                }
                (TextOutput::Embedding | TextOutput::TokenEmbeddings, Some(_)) => {
                    return Err(EngineError::UnsupportedOutput(
                        "a classification model has no embeddings",
                    ));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// On the CPU: chunks of rows, each on one thread from the first layer to the last, so that
    /// no thread waits for another between layers. Where rows cannot be shared out evenly, above
    /// all where there is only one, the threads share each matrix multiplication instead.
    fn forward_chunks(
        &self,
        rows: &[TextRow<'_>],
        should_continue: &(dyn Fn() -> bool + Sync),
    ) -> Result<Vec<Vec<f32>>, EngineError> {
        let chunks = chunks(rows, kernels::threads());
        if chunks.len() <= 1 {
            return self.forward_batch(rows, &Device::Cpu, should_continue);
        }
        let outputs = Mutex::new(vec![Vec::new(); rows.len()]);
        let failure = Mutex::new(None);
        kernels::parallel_for(chunks.len(), &|number| {
            let indices = &chunks[number];
            let chunk: Vec<_> = indices.iter().map(|index| rows[*index]).collect();
            match self.forward_batch(&chunk, &Device::Cpu, should_continue) {
                Ok(chunk) => {
                    let mut outputs = outputs.lock().unwrap_or_else(PoisonError::into_inner);
                    for (index, output) in indices.iter().zip(chunk) {
                        outputs[*index] = output;
                    }
                }
                Err(error) => {
                    *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                }
            }
        });
        let failure = failure.into_inner();
        match failure.unwrap_or_else(PoisonError::into_inner) {
            Some(error) => Err(error),
            None => Ok(outputs.into_inner().unwrap_or_else(PoisonError::into_inner)),
        }
    }

    /// Rows as one batch, from token ids to outputs.
    fn forward_batch(
        &self,
        rows: &[TextRow<'_>],
        device: &Device,
        should_continue: &dyn Fn() -> bool,
    ) -> Result<Vec<Vec<f32>>, EngineError> {
        let batch = self.pack(rows, device);
        let hidden = self.encoder.encoder.forward(&batch, should_continue)?;
        self.outputs(rows, &batch, &hidden)
    }

    fn pack(&self, rows: &[TextRow<'_>], device: &Device) -> Batch {
        // A model with one token type was not trained on the second, whatever a tokenizer writes.
        let types = self.encoder.token_types.unwrap_or(1);
        let longest = rows.iter().map(|row| row.tokens.ids.len()).max();
        let zeros = vec![0; longest.unwrap_or(0)];
        let packed: Vec<PackedRow<'_>> = rows
            .iter()
            .map(|row| {
                let TokenRow { ids, type_ids, .. } = row.tokens;
                let fits = type_ids.iter().all(|type_id| (*type_id as usize) < types);
                let no_types = zeros.get(..ids.len()).unwrap_or_default();
                PackedRow {
                    ids,
                    type_ids: if fits { type_ids.as_slice() } else { no_types },
                    skipped: row.tokens.skipped,
                }
            })
            .collect();
        Batch::pack(&packed, self.encoder.encoder.position_scheme(), device)
    }

    /// The requested output of each row, in the caller's order.
    fn outputs(
        &self,
        rows: &[TextRow<'_>],
        batch: &Batch,
        hidden: &HiddenStates,
    ) -> Result<Vec<Vec<f32>>, EngineError> {
        let mut outputs = BatchOutputs {
            rows,
            batch,
            outputs: vec![Vec::new(); rows.len()],
        };
        let is_requested = |output| rows.iter().any(|row| row.output == output);
        if let Some(head) = &self.encoder.head {
            outputs.fill(TextOutput::Logits, &head.forward(hidden, batch)?)?;
        }
        if is_requested(TextOutput::Embedding) || is_requested(TextOutput::TokenEmbeddings) {
            let changed = self.head.tokens(hidden)?;
            let hidden = changed.as_ref().unwrap_or(hidden);
            if is_requested(TextOutput::Embedding) {
                outputs.fill(TextOutput::Embedding, &self.head.forward(hidden, batch)?)?;
            }
            if is_requested(TextOutput::TokenEmbeddings) {
                outputs.fill(TextOutput::TokenEmbeddings, hidden)?;
            }
        }
        Ok(outputs.outputs)
    }
}

/// The outputs of a batch, in the order of the caller's rows.
struct BatchOutputs<'a> {
    rows: &'a [TextRow<'a>],
    batch: &'a Batch,
    outputs: Vec<Vec<f32>>,
}

impl BatchOutputs<'_> {
    /// Copies states, in packed order, to the rows that requested this output.
    fn fill(&mut self, output: TextOutput, states: &HiddenStates) -> Result<(), EngineError> {
        let width = states.width()?;
        let values = states.values()?;
        let packed = self.batch.order.iter().zip(&self.batch.spans);
        for (number, (index, (start, length))) in packed.enumerate() {
            let range = match output {
                TextOutput::TokenEmbeddings => start * width..(start + length) * width,
                TextOutput::Embedding | TextOutput::Logits => number * width..(number + 1) * width,
            };
            let is_requested = self
                .rows
                .get(*index)
                .is_some_and(|row| row.output == output);
            if let (Some(row), true) = (self.outputs.get_mut(*index), is_requested) {
                *row = values.get(range).unwrap_or_default().to_vec();
            }
        }
        Ok(())
    }
}

/// Divides rows into chunks, by their indices: the longest first, each into the chunk with the
/// fewest tokens. One chunk of all where that leaves a thread with much more than its share.
fn chunks(rows: &[TextRow<'_>], threads: usize) -> Vec<Vec<usize>> {
    let tokens = |index: usize| rows[index].tokens.ids.len();
    let all: usize = (0..rows.len()).map(tokens).sum();
    let whole = || vec![(0..rows.len()).collect()];
    let count = all.div_ceil(CHUNK_TOKENS).next_multiple_of(threads);
    let count = count.min(rows.len());
    if count <= 1 || threads == 1 && all <= CHUNK_TOKENS {
        return whole();
    }
    let mut indices: Vec<usize> = (0..rows.len()).collect();
    indices.sort_by_key(|index| std::cmp::Reverse(tokens(*index)));
    let mut chunks = vec![(0, Vec::new()); count];
    for index in indices {
        if let Some((sum, chunk)) = chunks.iter_mut().min_by_key(|(sum, _)| *sum) {
            *sum += tokens(index);
            chunk.push(index);
        }
    }
    let largest = chunks.iter().map(|(sum, _)| *sum).max().unwrap_or(0);
    if (largest * threads) as f64 > all as f64 * SHARE_EXCESS_MAX {
        return whole();
    }
    chunks.into_iter().map(|(_, chunk)| chunk).collect()
}
