//! Pooling: from one vector for each token to one for each row.

use candle_core::Tensor;

use super::{Batch, HiddenStates};
use crate::error::EngineError;
use crate::kernels::{self, Pool};

/// How a row's hidden states become one vector (Sentence-BERT, Reimers and Gurevych 2019).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pooling {
    /// The mean over all tokens, special ones included.
    Mean,
    /// The first token's.
    Cls,
    /// The last token's.
    Last,
    /// The largest of each dimension.
    Max,
}

impl Pooling {
    /// `[tokens, hidden]` to `[rows, hidden]`, in the batch's packed order.
    pub(crate) fn forward(
        self,
        hidden: &HiddenStates,
        batch: &Batch,
    ) -> Result<HiddenStates, EngineError> {
        let hidden = match hidden {
            HiddenStates::Cpu(hidden) => {
                let how = match self {
                    Self::Mean => Pool::Mean,
                    Self::Cls => Pool::First,
                    Self::Last => Pool::Last,
                    Self::Max => Pool::Max,
                };
                return Ok(HiddenStates::Cpu(kernels::pool(how, hidden, &batch.spans)));
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
