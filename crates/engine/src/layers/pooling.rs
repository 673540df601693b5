//! Pooling: from one vector for each token to one for each row.

use candle_core::Tensor;

pub(crate) use crate::kernels::Pooling;

use super::{Batch, HiddenStates};
use crate::error::EngineError;
use crate::kernels::{self, PooledSpan};
use crate::options::PoolingMode;

impl From<PoolingMode> for Pooling {
    fn from(mode: PoolingMode) -> Self {
        match mode {
            PoolingMode::Cls => Self::Cls,
            PoolingMode::Max => Self::Max,
            PoolingMode::Mean => Self::Mean,
            PoolingMode::MeanSqrtLen => Self::MeanSqrt,
            PoolingMode::WeightedMean => Self::WeightedMean,
            PoolingMode::LastToken => Self::Last,
        }
    }
}

impl Pooling {
    /// `[tokens, hidden]` to `[rows, hidden]`, in the batch's packed order.
    pub(crate) fn forward(
        self,
        hidden: &HiddenStates,
        batch: &Batch,
    ) -> Result<HiddenStates, EngineError> {
        Self::forward_all(&[self], hidden, batch)
    }

    /// The same for several poolings, whose vectors lie side by side.
    pub(crate) fn forward_all(
        poolings: &[Self],
        hidden: &HiddenStates,
        batch: &Batch,
    ) -> Result<HiddenStates, EngineError> {
        let spans = batch.pooled_spans();
        let hidden = match hidden {
            HiddenStates::Cpu(hidden) => {
                let pooled = kernels::pool(poolings, hidden, &spans);
                return Ok(HiddenStates::Cpu(pooled));
            }
            HiddenStates::Device(hidden) => hidden,
        };
        let mut parts = Vec::with_capacity(poolings.len());
        for pooling in poolings {
            let rows = spans.iter().map(|span| pooling.on_device(hidden, *span));
            let rows = rows.collect::<candle_core::Result<Vec<_>>>()?;
            parts.push(Tensor::cat(&rows, 0)?);
        }
        Ok(HiddenStates::Device(Tensor::cat(&parts, 1)?))
    }

    /// `[tokens, hidden]` to `[1, hidden]`, of one row.
    fn on_device(self, hidden: &Tensor, span: PooledSpan) -> candle_core::Result<Tensor> {
        let row = hidden.narrow(0, span.start, span.count)?;
        match self {
            Self::Mean => row.mean_keepdim(0),
            Self::MeanSqrt => row.mean_keepdim(0)? * (span.count as f64).sqrt(),
            Self::WeightedMean => {
                let first = span.skipped + 1;
                let weights: Vec<f32> = (first..first + span.count).map(|at| at as f32).collect();
                let all: f32 = weights.iter().sum();
                let weights: Vec<f32> = weights.iter().map(|weight| weight / all).collect();
                let weights = Tensor::from_vec(weights, (span.count, 1), row.device())?;
                row.broadcast_mul(&weights.to_dtype(row.dtype())?)?
                    .sum_keepdim(0)
            }
            Self::Max => row.max_keepdim(0),
            Self::Cls => row.narrow(0, 0, 1),
            Self::Last => row.narrow(0, span.count - 1, 1),
        }
    }
}
