//! The classification head: from the hidden states of a row to one logit for each label.

use super::{
    Activation, Batch, EncoderConfig, HiddenStates, LayerNorm, Linear, Pooling, WeightLoader,
};
use crate::error::EngineError;

/// The layers and tensor names of a family's head.
pub(crate) struct HeadConfig {
    pub(crate) pooling: Pooling,
    /// Full tensor name of the dense layer, whose weight is `[hidden, hidden]`.
    pub(crate) dense: String,
    pub(crate) dense_bias: bool,
    pub(crate) activation: Activation,
    /// Full tensor name of the norm after the activation, where the family has one.
    pub(crate) norm: Option<&'static str>,
    /// Full tensor name of the layer whose outputs are the logits.
    pub(crate) classifier: &'static str,
    /// The number of labels.
    pub(crate) labels: usize,
}

/// Pooling, a dense layer, an activation, a norm where the family has one, and the logits.
pub(crate) struct ClassificationHead {
    pooling: Pooling,
    dense: Linear,
    activation: Activation,
    norm: Option<LayerNorm>,
    classifier: Linear,
}

impl ClassificationHead {
    pub(crate) fn load(
        weights: &mut WeightLoader,
        config: &EncoderConfig,
        head: &HeadConfig,
    ) -> Result<Self, EngineError> {
        let square = [config.hidden, config.hidden];
        let dense = if head.dense_bias {
            Linear::load(weights, &head.dense, square)?
        } else {
            Linear::load_unbiased(weights, &head.dense, square)?
        };
        let norm = head
            .norm
            .map(|name| LayerNorm::load_unbiased(weights, name, config.hidden, config.epsilon));
        let shape = [head.labels, config.hidden];
        Ok(Self {
            pooling: head.pooling,
            dense,
            activation: head.activation,
            norm: norm.transpose()?,
            classifier: Linear::load(weights, head.classifier, shape)?,
        })
    }

    /// `[tokens, hidden]` to logits of `[rows, labels]`, in the batch's packed order.
    pub(crate) fn forward(
        &self,
        hidden: &HiddenStates,
        batch: &Batch,
    ) -> Result<HiddenStates, EngineError> {
        let pooled = self.pooling.forward(hidden, batch)?;
        let mut features = self.dense.forward_activated(&pooled, self.activation)?;
        if let Some(norm) = &self.norm {
            features = norm.forward(&features)?;
        }
        self.classifier.forward(&features)
    }
}
