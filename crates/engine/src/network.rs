//! The forward pass: packed rows through a family's layers, then pooling or scores.

use candle_core::{DType, Device, Tensor};

use crate::families::Built;
use crate::families::tabular::Tabular;
use crate::layers::{Batch, Pooling};
use crate::load::Dense;
use crate::{EngineError, TokenRow};

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
    device: Device,
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
    pub(crate) fn text(network: TextNetwork, device: Device) -> Self {
        Self {
            device,
            kind: Kind::Text(Box::new(network)),
        }
    }

    pub(crate) fn tabular(network: Tabular, device: Device) -> Self {
        Self {
            device,
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
        go_on: &dyn Fn() -> bool,
    ) -> Result<Vec<Vec<f32>>, EngineError> {
        let Kind::Text(network) = &self.kind else {
            return Err(EngineError::WrongOutput("a tabular model takes no text"));
        };
        network.check(rows)?;
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        let batch = network.pack(rows, &self.device)?;
        let hidden = network.hidden(&batch, &self.device, go_on)?;
        self.device
            .with_context(|| network.outputs(rows, &batch, &hidden))
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
        go_on: &dyn Fn() -> bool,
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
        let logits = network.forward(features, &self.device, go_on)?;
        values(&logits)
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

    fn pack(&self, rows: &[TextRow<'_>], device: &Device) -> Result<Batch, EngineError> {
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
        Batch::pack_counting(&packed, self.built.encoder.counting(), device)
    }

    /// The hidden states of all tokens, layer by layer.
    fn hidden(
        &self,
        batch: &Batch,
        device: &Device,
        go_on: &dyn Fn() -> bool,
    ) -> Result<Tensor, EngineError> {
        let encoder = self.built.encoder.as_ref();
        if !go_on() {
            return Err(EngineError::Abandoned);
        }
        let mut hidden = device.with_context(|| encoder.embed(batch))?;
        for number in 0..encoder.depth() {
            if !go_on() {
                return Err(EngineError::Abandoned);
            }
            hidden = device.with_context(|| encoder.layer(number, hidden, batch))?;
        }
        device.with_context(|| encoder.finish(hidden))
    }

    /// What each row wants, in the caller's order.
    fn outputs(
        &self,
        rows: &[TextRow<'_>],
        batch: &Batch,
        hidden: &Tensor,
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
        (wanted, tensor): (Wanted, &Tensor),
    ) -> Result<(), EngineError> {
        let width = tensor.dim(1)?;
        let all = values(tensor)?;
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

/// A tensor's values as 32-bit floats, row-major.
fn values(tensor: &Tensor) -> Result<Vec<f32>, EngineError> {
    Ok(tensor
        .to_dtype(DType::F32)?
        .flatten_all()?
        .to_vec1::<f32>()?)
}
