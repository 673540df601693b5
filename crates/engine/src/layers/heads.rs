//! The head that turns a row's hidden states into scores.

use super::{Activation, Batch, Linear, Norm, Pooling, States};
use crate::EngineError;
use crate::load::{Config, Weights};

/// What a family calls its head, and what it does between pooling and scores.
pub(crate) struct HeadNames {
    pub(crate) pooling: Pooling,
    pub(crate) dense: String,
    pub(crate) dense_bias: bool,
    pub(crate) activation: Activation,
    pub(crate) norm: Option<&'static str>,
    pub(crate) classifier: &'static str,
}

/// Pooling, a dense layer, an activation, a norm where the family has one, and the scores.
pub(crate) struct ClassificationHead {
    pooling: Pooling,
    dense: Linear,
    activation: Activation,
    norm: Option<Norm>,
    classifier: Linear,
}

impl ClassificationHead {
    pub(crate) fn load(
        weights: &mut Weights,
        config: &Config,
        names: &HeadNames,
    ) -> Result<Self, EngineError> {
        let square = [config.hidden, config.hidden];
        let dense = if names.dense_bias {
            Linear::load(weights, &names.dense, square)?
        } else {
            Linear::load_unbiased(weights, &names.dense, square)?
        };
        let norm = names
            .norm
            .map(|name| Norm::load_unbiased(weights, name, config.hidden, config.epsilon));
        let shape = [config.labels.len(), config.hidden];
        Ok(Self {
            pooling: names.pooling,
            dense,
            activation: names.activation,
            norm: norm.transpose()?,
            classifier: Linear::load(weights, names.classifier, shape)?,
        })
    }

    /// `[tokens, hidden]` to logits of `[rows, labels]`, in the batch's packed order.
    pub(crate) fn forward(&self, hidden: &States, batch: &Batch) -> Result<States, EngineError> {
        let pooled = self.pooling.forward(hidden, batch)?;
        let mut features = self.dense.forward_activated(&pooled, self.activation)?;
        if let Some(norm) = &self.norm {
            features = norm.forward(&features)?;
        }
        self.classifier.forward(&features)
    }
}
