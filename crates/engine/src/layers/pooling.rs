//! Pooling: from one vector for each token to one for each row.

use candle_core::Tensor;

pub(crate) use crate::kernels::Pooling;

use super::{Batch, HiddenStates};
use crate::error::EngineError;
use crate::kernels;

impl Pooling {
    /// `[tokens, hidden]` to `[rows, hidden]`, in the batch's packed order.
    pub(crate) fn forward(
        self,
        hidden: &HiddenStates,
        batch: &Batch,
    ) -> Result<HiddenStates, EngineError> {
        let hidden = match hidden {
            HiddenStates::Cpu(hidden) => {
                let pooled = kernels::pool(self, hidden, &batch.spans);
                return Ok(HiddenStates::Cpu(pooled));
            }
            HiddenStates::Device(hidden) => hidden,
        };
        let each = |pool: &dyn Fn(Tensor) -> candle_core::Result<Tensor>| {
            let rows = batch.spans.iter();
            let pooled = rows.map(|(start, length)| pool(hidden.narrow(0, *start, *length)?));
            Tensor::cat(&pooled.collect::<candle_core::Result<Vec<_>>>()?, 0)
        };
        Ok(HiddenStates::Device(match self {
            Self::Mean => each(&|row| row.mean_keepdim(0))?,
            Self::Max => each(&|row| row.max_keepdim(0))?,
            Self::Cls => each(&|row| row.narrow(0, 0, 1))?,
            Self::Last => each(&|row| row.narrow(0, row.dim(0)? - 1, 1))?,
        }))
    }
}
