//! The forward pass: packed rows through a family's layers, then pooling or scores.

use std::sync::{Mutex, PoisonError};

use candle_core::Device;

use crate::families::Built;
use crate::families::tabular::Tabular;
use crate::layers::{Batch, Pooling, States};
use crate::load::{Dense, Placement};
use crate::{EngineError, TokenRow, kernels};

/// Tokens of a chunk: enough for the products to be near the processor's peak, and few enough
/// for what lies between two of them to stay in its second-level cache.
const CHUNK_TOKENS: usize = 192;
/// Where the largest chunk has more than its thread's share by this factor, threads had better
/// share each product.
const SHARE_EXCESS_MAX: f64 = 1.4;

/// What a row is to give.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// The pooled vector, not normalized.
    Pooled,
    /// The hidden state of each token.
    AllTokens,
    /// The logits.
    Scores,
}

/// One row of a batch.
#[derive(Debug, Clone, Copy)]
pub struct TextRow<'a> {
    /// Its tokens.
    pub tokens: &'a TokenRow,
    /// What it is to give.
    pub wanted: Wanted,
}

/// The weights of one model and its forward pass. One thread owns it; the processor's other
/// threads help where there is work for them.
pub struct Network {
    placement: Placement,
    kind: Kind,
}

enum Kind {
    Text(Box<TextNetwork>),
    Tabular(Tabular),
}

pub(crate) struct TextNetwork {
    pub(crate) built: Built,
    pub(crate) pooling: Pooling,
    pub(crate) dense: Vec<Dense>,
    pub(crate) tokens_max: usize,
}

impl Network {
    pub(crate) fn text(network: TextNetwork, placement: Placement) -> Self {
        Self {
            placement,
            kind: Kind::Text(Box::new(network)),
        }
    }

    pub(crate) fn tabular(network: Tabular, placement: Placement) -> Self {
        Self {
            placement,
            kind: Kind::Tabular(network),
        }
    }

    /// Runs rows of any lengths as one batch; each costs its own tokens. One flat vector for each
    /// row, in order: the embedding's width, tokens times the hidden width, or the labels.
    /// `go_on` is asked between layers.
    ///
    /// # Errors
    /// [`EngineError::Abandoned`] once `go_on` says no; the caller's errors for rows that the
    /// model cannot take; [`EngineError::OutOfMemory`] and [`EngineError::Device`].
    pub fn forward_text(
        &mut self,
        rows: &[TextRow<'_>],
        go_on: &(dyn Fn() -> bool + Sync),
    ) -> Result<Vec<Vec<f32>>, EngineError> {
        let Kind::Text(network) = &self.kind else {
            return Err(EngineError::WrongOutput("a tabular model takes no text"));
        };
        network.check(rows)?;
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        match &self.placement {
            Placement::Processor(_) => network.forward_chunks(rows, go_on),
            Placement::Device { device, .. } => {
                device.with_context(|| network.forward(rows, device, go_on))
            }
        }
    }

    /// Runs `rows` rows of features, row-major, to as many rows of logits.
    ///
    /// # Errors
    /// [`EngineError::BadInput`] when the features do not fill the rows;
    /// [`EngineError::Abandoned`] once `go_on` says no.
    pub fn forward_features(
        &mut self,
        features: &[f32],
        rows: usize,
        go_on: &(dyn Fn() -> bool + Sync),
    ) -> Result<Vec<f32>, EngineError> {
        let Kind::Tabular(network) = &self.kind else {
            return Err(EngineError::WrongOutput("a text model takes no features"));
        };
        if rows.checked_mul(network.width()) != Some(features.len()) {
            return Err(EngineError::BadInput(format!(
                "{} features do not fill {rows} rows of {}",
                features.len(),
                network.width()
            )));
        }
        if rows == 0 {
            return Ok(Vec::new());
        }
        let logits = network.forward(features, &self.placement, go_on)?;
        logits.values()
    }
}

impl TextNetwork {
    /// Refuses rows that would read past a table.
    fn check(&self, rows: &[TextRow<'_>]) -> Result<(), EngineError> {
        for row in rows {
            let TokenRow { ids, type_ids } = row.tokens;
            if ids.is_empty() || ids.len() != type_ids.len() {
                return Err(EngineError::BadInput(
                    "a row needs tokens, and a type for each".to_owned(),
                ));
            }
            if ids.len() > self.tokens_max {
                return Err(EngineError::TooLong {
                    tokens: ids.len(),
                    tokens_max: self.tokens_max,
                });
            }
            let unknown = |id: &&u32| **id as usize >= self.built.vocabulary;
            if let Some(id) = ids.iter().find(unknown) {
                return Err(EngineError::BadToken { id: *id });
            }
            match (row.wanted, &self.built.head) {
                (Wanted::Scores, None) => {
                    return Err(EngineError::WrongOutput("an embedding model has no scores"));
                }
                (Wanted::Pooled | Wanted::AllTokens, Some(_)) => {
                    return Err(EngineError::WrongOutput(
                        "a classification model has no embeddings",
                    ));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The processor's way: chunks of rows, each on a thread of its own from the first layer to
    /// the last, so that no thread waits for another in between. Where rows cannot be shared out
    /// evenly, above all where there is one alone, the threads share each product instead.
    fn forward_chunks(
        &self,
        rows: &[TextRow<'_>],
        go_on: &(dyn Fn() -> bool + Sync),
    ) -> Result<Vec<Vec<f32>>, EngineError> {
        let chunks = chunks(rows, kernels::threads());
        if chunks.len() <= 1 {
            return self.forward(rows, &Device::Cpu, go_on);
        }
        let outputs = Mutex::new(vec![Vec::new(); rows.len()]);
        let failure = Mutex::new(None);
        kernels::run(chunks.len(), &|number| {
            let places = &chunks[number];
            let of_chunk: Vec<_> = places.iter().map(|place| rows[*place]).collect();
            match self.forward(&of_chunk, &Device::Cpu, go_on) {
                Ok(of_chunk) => {
                    let mut outputs = outputs.lock().unwrap_or_else(PoisonError::into_inner);
                    for (place, output) in places.iter().zip(of_chunk) {
                        outputs[*place] = output;
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

    /// Rows as one batch, from ids to outputs.
    fn forward(
        &self,
        rows: &[TextRow<'_>],
        device: &Device,
        go_on: &dyn Fn() -> bool,
    ) -> Result<Vec<Vec<f32>>, EngineError> {
        let batch = self.pack(rows, device);
        let encoder = self.built.encoder.as_ref();
        if !go_on() {
            return Err(EngineError::Abandoned);
        }
        let mut hidden = encoder.embed(&batch)?;
        for number in 0..encoder.depth() {
            if !go_on() {
                return Err(EngineError::Abandoned);
            }
            hidden = encoder.layer(number, hidden, &batch)?;
        }
        self.outputs(rows, &batch, &encoder.finish(hidden)?)
    }

    fn pack(&self, rows: &[TextRow<'_>], device: &Device) -> Batch {
        // A model with one token type was not taught the difference, whatever a tokenizer says.
        let types = self.built.token_types.unwrap_or(1);
        let longest = rows.iter().map(|row| row.tokens.ids.len()).max();
        let zeros = vec![0; longest.unwrap_or(0)];
        let packed: Vec<(&[u32], &[u32])> = rows
            .iter()
            .map(|row| {
                let TokenRow { ids, type_ids } = row.tokens;
                let fits = type_ids.iter().all(|kind| (*kind as usize) < types);
                let no_types = zeros.get(..ids.len()).unwrap_or_default();
                (
                    ids.as_slice(),
                    if fits { type_ids.as_slice() } else { no_types },
                )
            })
            .collect();
        Batch::pack(&packed, self.built.encoder.counting(), device)
    }

    /// What each row wants, in the caller's order.
    fn outputs(
        &self,
        rows: &[TextRow<'_>],
        batch: &Batch,
        hidden: &States,
    ) -> Result<Vec<Vec<f32>>, EngineError> {
        let mut outputs = vec![Vec::new(); rows.len()];
        let wants = |wanted| rows.iter().any(|row| row.wanted == wanted);
        if let Some(head) = &self.built.head {
            let scores = head.forward(hidden, batch)?;
            self.fill(&mut outputs, rows, batch, (Wanted::Scores, &scores))?;
        }
        if wants(Wanted::Pooled) {
            let mut pooled = self.pooling.forward(hidden, batch)?;
            for dense in &self.dense {
                pooled = dense.forward(&pooled)?;
            }
            self.fill(&mut outputs, rows, batch, (Wanted::Pooled, &pooled))?;
        }
        if wants(Wanted::AllTokens) {
            self.fill(&mut outputs, rows, batch, (Wanted::AllTokens, hidden))?;
        }
        Ok(outputs)
    }

    /// Copies a tensor's rows to the outputs that want them.
    fn fill(
        &self,
        outputs: &mut [Vec<f32>],
        rows: &[TextRow<'_>],
        batch: &Batch,
        (wanted, states): (Wanted, &States),
    ) -> Result<(), EngineError> {
        let width = states.width()?;
        let all = states.values()?;
        for (packed, (place, (start, length))) in batch.order.iter().zip(&batch.spans).enumerate() {
            let range = match wanted {
                Wanted::AllTokens => start * width..(start + length) * width,
                Wanted::Pooled | Wanted::Scores => packed * width..(packed + 1) * width,
            };
            let is_wanted = rows.get(*place).is_some_and(|row| row.wanted == wanted);
            if let (Some(output), true) = (outputs.get_mut(*place), is_wanted) {
                *output = all.get(range).unwrap_or_default().to_vec();
            }
        }
        Ok(())
    }
}

/// Cuts rows into chunks, by their places: the longest first, each to where the fewest tokens
/// are. One chunk of all where that leaves a thread with much more than its share.
fn chunks(rows: &[TextRow<'_>], threads: usize) -> Vec<Vec<usize>> {
    let tokens = |place: usize| rows[place].tokens.ids.len();
    let all: usize = (0..rows.len()).map(tokens).sum();
    let whole = || vec![(0..rows.len()).collect()];
    let count = all.div_ceil(CHUNK_TOKENS).next_multiple_of(threads);
    let count = count.min(rows.len());
    if count <= 1 || threads == 1 && all <= CHUNK_TOKENS {
        return whole();
    }
    let mut places: Vec<usize> = (0..rows.len()).collect();
    places.sort_by_key(|place| std::cmp::Reverse(tokens(*place)));
    let mut chunks = vec![(0, Vec::new()); count];
    for place in places {
        if let Some((sum, chunk)) = chunks.iter_mut().min_by_key(|(sum, _)| *sum) {
            *sum += tokens(place);
            chunk.push(place);
        }
    }
    let largest = chunks.iter().map(|(sum, _)| *sum).max().unwrap_or(0);
    if (largest * threads) as f64 > all as f64 * SHARE_EXCESS_MAX {
        return whole();
    }
    chunks.into_iter().map(|(_, chunk)| chunk).collect()
}
