//! Attention over packed rows: a token sees the tokens of its own row and no other.
//!
//! Scaled dot-product attention (Vaswani and others 2017), with a sliding window where a layer
//! has one (Beltagy and others 2020) and rotated queries and keys where a family has them.

use candle_core::{D, Tensor};

use super::batch::RowGroup;
use super::{Batch, HiddenStates, Placement, RotaryEmbedding, inner_dtype};
use crate::error::EngineError;
use crate::kernels::{self, InstructionSet, MatrixDtype};

/// Multi-head self-attention.
pub(crate) struct SelfAttention {
    heads: usize,
    /// Tokens to each side that a token sees; none where it sees its whole row.
    window: Option<usize>,
    /// The kernels and the dtype of their output; none on a device.
    on_cpu: Option<(InstructionSet, MatrixDtype)>,
}

impl SelfAttention {
    pub(crate) fn new(placement: &Placement, heads: usize, window: Option<usize>) -> Self {
        let on_cpu = match placement {
            Placement::Cpu(cpu) => Some((cpu.instructions, inner_dtype(cpu.dtype))),
            Placement::Device { .. } => None,
        };
        Self {
            heads,
            window,
            on_cpu,
        }
    }

    /// Attends within each row: queries, keys and values side by side, `[tokens, 3 · hidden]`,
    /// to `[tokens, hidden]`.
    pub(crate) fn forward(
        &self,
        qkv: HiddenStates,
        batch: &Batch,
        rotary: Option<&RotaryEmbedding>,
    ) -> Result<HiddenStates, EngineError> {
        match (qkv, self.on_cpu) {
            (HiddenStates::Cpu(mut qkv), Some((set, dtype))) => {
                if let Some(rotary) = rotary {
                    qkv = kernels::rotate(qkv, &rotary.angles(), &batch.positions);
                }
                let attention = kernels::AttentionInput {
                    qkv: &qkv,
                    heads: self.heads,
                    spans: &batch.spans,
                    window: self.window,
                    dtype,
                };
                Ok(HiddenStates::Cpu(kernels::attend(set, &attention)))
            }
            (HiddenStates::Device(qkv), None) => {
                let attended = self.forward_on_device(&qkv, batch, rotary)?;
                Ok(HiddenStates::Device(attended))
            }
            _ => Err(EngineError::device_mismatch()),
        }
    }

    /// On a device, which is fast at few large operations: rows of equal length are one dense
    /// batch.
    fn forward_on_device(
        &self,
        qkv: &Tensor,
        batch: &Batch,
        rotary: Option<&RotaryEmbedding>,
    ) -> Result<Tensor, EngineError> {
        let (tokens, width) = qkv.dims2()?;
        let (heads, head_width) = (self.heads, width / (3 * self.heads));
        let split = qkv.reshape((tokens, 3, heads, head_width))?;
        let part = |index| split.narrow(1, index, 1)?.squeeze(1);
        let (mut queries, mut keys, values) = (part(0)?, part(1)?, part(2)?);
        if let Some(rotary) = rotary {
            let (cosines, sines) = rotary.on_device(batch)?;
            queries = rotate(&queries, &cosines, &sines)?;
            keys = rotate(&keys, &cosines, &sines)?;
        }
        let scale = 1.0 / (head_width as f64).sqrt();
        let mut attended = Vec::new();
        for RowGroup {
            start,
            rows,
            length,
        } in batch.groups()
        {
            let dense = |tensor: &Tensor| {
                tensor
                    .narrow(0, start, rows * length)?
                    .reshape((rows, length, heads, head_width))?
                    .transpose(1, 2)?
                    .contiguous()
            };
            let keys = dense(&keys)?.transpose(2, 3)?;
            let mut scores = (dense(&queries)?.matmul(&keys)? * scale)?;
            if let Some(reach) = self.window.filter(|reach| *reach + 1 < length) {
                scores = scores.broadcast_add(&window_mask(length, reach, &scores)?)?;
            }
            let weights = candle_nn::ops::softmax_last_dim(&scores.contiguous()?)?;
            let context = weights.matmul(&dense(&values)?)?.transpose(1, 2)?;
            attended.push(context.reshape((rows * length, heads * head_width))?);
        }
        Ok(Tensor::cat(&attended, 0)?)
    }
}

/// `[length, length]`: 0 where a query sees a key, and minus infinity where it does not.
fn window_mask(length: usize, reach: usize, like: &Tensor) -> Result<Tensor, EngineError> {
    let mask: Vec<f32> = (0..length)
        .flat_map(|query| (0..length).map(move |key| query.abs_diff(key)))
        .map(|distance| {
            if distance <= reach {
                0.0
            } else {
                f32::NEG_INFINITY
            }
        })
        .collect();
    let mask = Tensor::from_vec(mask, (length, length), like.device())?;
    Ok(mask.to_dtype(like.dtype())?)
}

/// Rotates queries or keys of `[tokens, heads, head width]` by their positions, with cosines and
/// sines of `[tokens, head width / 2]`; element i of a head is paired with element i of its second
/// half.
fn rotate(heads: &Tensor, cosines: &Tensor, sines: &Tensor) -> Result<Tensor, EngineError> {
    let half = heads.dim(D::Minus1)? / 2;
    let first = heads.narrow(D::Minus1, 0, half)?;
    let second = heads.narrow(D::Minus1, half, half)?;
    let (cosines, sines) = (cosines.unsqueeze(1)?, sines.unsqueeze(1)?);
    let rotated_first = (first.broadcast_mul(&cosines)? - second.broadcast_mul(&sines)?)?;
    let rotated_second = (second.broadcast_mul(&cosines)? + first.broadcast_mul(&sines)?)?;
    Ok(Tensor::cat(&[rotated_first, rotated_second], D::Minus1)?)
}
