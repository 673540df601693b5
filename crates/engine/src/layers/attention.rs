//! Attention over packed rows: a token sees the tokens of its own row and no other.
//!
//! Scaled dot-product attention (Vaswani and others 2017), with a sliding window where a layer
//! has one (Beltagy and others 2020) and rotated queries and keys where a family has them.

use candle_core::{D, Tensor};

use super::{Batch, Rotary, States, inner_format};
use crate::EngineError;
use crate::kernels::{self, Format, Instructions};
use crate::load::Placement;

/// Attention of some heads.
pub(crate) struct Attention {
    heads: usize,
    /// Tokens to each side that a token sees; none where it sees its whole row.
    window: Option<usize>,
    /// How the processor does it; none on a device.
    on_processor: Option<(Instructions, Format)>,
}

impl Attention {
    pub(crate) fn new(placement: &Placement, heads: usize, window: Option<usize>) -> Self {
        let on_processor = match placement {
            Placement::Processor(way) => Some((way.instructions, inner_format(way.precision))),
            Placement::Device { .. } => None,
        };
        Self {
            heads,
            window,
            on_processor,
        }
    }

    /// Attends within each row: queries, keys and values side by side, `[tokens, 3 · hidden]`,
    /// to `[tokens, hidden]`.
    pub(crate) fn forward(
        &self,
        joined: States,
        batch: &Batch,
        rotary: Option<&Rotary>,
    ) -> Result<States, EngineError> {
        match (joined, self.on_processor) {
            (States::Processor(mut joined), Some((set, format))) => {
                if let Some(rotary) = rotary {
                    joined = kernels::rotate(joined, &rotary.angles(), &batch.positions);
                }
                let attention = kernels::Attention {
                    joined: &joined,
                    heads: self.heads,
                    spans: &batch.spans,
                    window: self.window,
                    format,
                };
                Ok(States::Processor(kernels::attend(set, &attention)))
            }
            (States::Device(joined), None) => {
                let attended = self.by_group(&joined, batch, rotary)?;
                Ok(States::Device(attended))
            }
            _ => Err(EngineError::apart()),
        }
    }

    /// The way of a device, which wants few large operations: rows of equal length as one dense
    /// batch.
    fn by_group(
        &self,
        joined: &Tensor,
        batch: &Batch,
        rotary: Option<&Rotary>,
    ) -> Result<Tensor, EngineError> {
        let (tokens, width) = joined.dims2()?;
        let (heads, head_width) = (self.heads, width / (3 * self.heads));
        let split = joined.reshape((tokens, 3, heads, head_width))?;
        let part = |place| split.narrow(1, place, 1)?.squeeze(1);
        let (mut queries, mut keys, values) = (part(0)?, part(1)?, part(2)?);
        if let Some(rotary) = rotary {
            let (cosines, sines) = rotary.on_device(batch)?;
            queries = rotate(&queries, &cosines, &sines)?;
            keys = rotate(&keys, &cosines, &sines)?;
        }
        let scale = 1.0 / (head_width as f64).sqrt();
        let mut attended = Vec::new();
        for (start, rows, length) in batch.groups() {
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
    let places = 0..length;
    let mask: Vec<f32> = places
        .clone()
        .flat_map(|query| places.clone().map(move |key| query.abs_diff(key)))
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

/// Rotates queries or keys by their positions, halves paired. `[tokens, heads, head width]`, with
/// cosines and sines of `[tokens, head width / 2]`.
fn rotate(heads: &Tensor, cosines: &Tensor, sines: &Tensor) -> Result<Tensor, EngineError> {
    let half = heads.dim(D::Minus1)? / 2;
    let first = heads.narrow(D::Minus1, 0, half)?;
    let second = heads.narrow(D::Minus1, half, half)?;
    let (cosines, sines) = (cosines.unsqueeze(1)?, sines.unsqueeze(1)?);
    let rotated_first = (first.broadcast_mul(&cosines)? - second.broadcast_mul(&sines)?)?;
    let rotated_second = (second.broadcast_mul(&cosines)? + first.broadcast_mul(&sines)?)?;
    Ok(Tensor::cat(&[rotated_first, rotated_second], D::Minus1)?)
}
