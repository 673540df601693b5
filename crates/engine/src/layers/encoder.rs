//! The interface of an encoder: a stack of layers over packed token ids.

use super::{Activation, Batch, HiddenStates, PositionScheme};
use crate::error::EngineError;

/// A stack of layers that turns packed token ids into hidden states.
pub(crate) trait Encoder: Send + Sync {
    /// How the positions of a row's tokens are counted.
    fn position_scheme(&self) -> PositionScheme {
        PositionScheme::FromZero
    }

    /// Layers after the embedding.
    fn depth(&self) -> usize;

    /// The embeddings of the tokens, `[tokens, hidden]`.
    fn embed(&self, batch: &Batch) -> Result<HiddenStates, EngineError>;

    /// Runs layer `number`, which replaces the hidden states of the pass.
    fn layer(&self, number: usize, pass: &mut ForwardPass<'_>) -> Result<(), EngineError>;

    /// Runs the part after the last layer.
    fn finish(&self, hidden: HiddenStates) -> Result<HiddenStates, EngineError> {
        Ok(hidden)
    }

    /// The whole forward pass: the last hidden states, `[tokens, hidden]`. `should_continue` is
    /// called before each layer.
    ///
    /// # Errors
    /// [`EngineError::Cancelled`] once `should_continue` returns false.
    fn forward(
        &self,
        batch: &Batch,
        should_continue: &dyn Fn() -> bool,
    ) -> Result<HiddenStates, EngineError> {
        if !should_continue() {
            return Err(EngineError::Cancelled);
        }
        let hidden = self.embed(batch)?;
        let mut pass = ForwardPass { batch, hidden };
        for number in 0..self.depth() {
            if !should_continue() {
                return Err(EngineError::Cancelled);
            }
            self.layer(number, &mut pass)?;
        }
        self.finish(pass.hidden)
    }
}

/// The state of the sequences of one batch, from layer to layer. What a layer needs beyond its
/// weights is here, and nothing of it is in the layers: one model may run several passes at a
/// time. (A decoder's key-value cache is such state.)
pub(crate) struct ForwardPass<'a> {
    /// The packed rows.
    pub(crate) batch: &'a Batch,
    /// The output of the last layer that ran, `[tokens, hidden]`.
    pub(crate) hidden: HiddenStates,
}

/// The sizes and choices that the layers of an encoder are built by, as its family has checked
/// them.
#[derive(Debug, Clone)]
pub(crate) struct EncoderConfig {
    /// Width of a hidden state, a multiple of `heads`.
    pub(crate) hidden: usize,
    pub(crate) layers: usize,
    /// Attention heads.
    pub(crate) heads: usize,
    /// Width of the feed-forward network between its two linear layers.
    pub(crate) intermediate: usize,
    /// Tokens in the vocabulary.
    pub(crate) vocabulary: usize,
    /// Positions, of the table or of the rotary embedding.
    pub(crate) positions: usize,
    /// Token types; none for a family without them.
    pub(crate) token_types: Option<usize>,
    /// The epsilon of layer normalization, added to the variance.
    pub(crate) epsilon: f64,
    /// The activation of the feed-forward network.
    pub(crate) activation: Activation,
}
