//! Attention over packed rows: a token sees the tokens of its own row and no other.
//!
//! Scaled dot-product attention (Vaswani and others 2017), with a sliding window where a layer
//! has one (Beltagy and others 2020). Why two ways: docs/decisions/padding_free_batches.md.

use candle_core::{D, Tensor};
use rayon::prelude::*;

use super::batch::Batch;
use super::processor::{self, Window};
use crate::EngineError;

/// Scores that one task may hold, so that a long row's are computed in parts that stay in cache.
const SCORES_PER_TASK: usize = 1 << 20;
/// Fewer queries than this are not worth a task of their own.
const QUERIES_PER_TASK_MIN: usize = 8;

/// Queries, keys and values, each `[tokens, heads, head width]`, in any layout.
pub struct Heads {
    /// What each token asks for.
    pub queries: Tensor,
    /// What each token is found by.
    pub keys: Tensor,
    /// What each token gives.
    pub values: Tensor,
}

impl Heads {
    /// Splits `[tokens, 3 · heads · head width]` without a copy.
    ///
    /// # Errors
    /// When the width is no multiple of three times the heads.
    pub fn split(joined: &Tensor, heads: usize) -> Result<Self, EngineError> {
        let (tokens, width) = joined.dims2()?;
        let split = joined.reshape((tokens, 3, heads, width / (3 * heads)))?;
        let part = |place| split.narrow(1, place, 1)?.squeeze(1);
        Ok(Self {
            queries: part(0)?,
            keys: part(1)?,
            values: part(2)?,
        })
    }

    fn scale(&self) -> Result<f32, EngineError> {
        Ok(1.0 / (self.queries.dim(2)? as f32).sqrt())
    }
}

/// Attends within each row, `[tokens, heads · head width]`. With a window, a token sees those at
/// most that many places away.
///
/// # Errors
/// When the device fails or has no room.
pub fn attend(heads: &Heads, batch: &Batch, window: Option<usize>) -> Result<Tensor, EngineError> {
    let on_processor =
        heads.queries.device().is_cpu() && heads.queries.dtype() == candle_core::DType::F32;
    if on_processor {
        attend_by_row(heads, batch, window)
    } else {
        attend_by_group(heads, batch, window)
    }
}

/// Part of a row's queries.
struct Part {
    row_start: usize,
    row_length: usize,
    first_query: usize,
    queries: usize,
}

/// The processor's way: each row by itself, rows and parts of rows spread over the threads.
///
/// # Errors
/// When candle refuses an operation.
pub fn attend_by_row(
    heads: &Heads,
    batch: &Batch,
    window: Option<usize>,
) -> Result<Tensor, EngineError> {
    let (tokens, head_count, head_width) = heads.queries.dims3()?;
    let scale = heads.scale()?;
    let parts = parts(batch, head_count, rayon::current_num_threads());
    let attended = parts
        .par_iter()
        .map(|part| attend_part(heads, part, scale, window))
        .collect::<Result<Vec<_>, _>>()?;
    let attended = match attended.as_slice() {
        [one] => one.clone(),
        several => Tensor::cat(several, 0)?,
    };
    Ok(attended.reshape((tokens, head_count * head_width))?)
}

/// Cuts rows into parts: small enough for the cache, and enough of them for every thread.
fn parts(batch: &Batch, heads: usize, threads: usize) -> Vec<Part> {
    let shares = threads.div_ceil(batch.spans.len().max(1));
    let mut parts = Vec::with_capacity(batch.spans.len() * shares);
    for (row_start, row_length) in &batch.spans {
        let fits = SCORES_PER_TASK / (heads * row_length).max(1);
        let queries = fits.min(row_length.div_ceil(shares));
        let queries = queries.max(QUERIES_PER_TASK_MIN);
        for first_query in (0..*row_length).step_by(queries) {
            parts.push(Part {
                row_start: *row_start,
                row_length: *row_length,
                first_query,
                queries: queries.min(row_length - first_query),
            });
        }
    }
    parts
}

fn attend_part(
    heads: &Heads,
    part: &Part,
    scale: f32,
    window: Option<usize>,
) -> Result<Tensor, EngineError> {
    // A windowed part multiplies only the keys that one of its queries sees.
    let reach = window.unwrap_or(part.row_length);
    let first_key = part.first_query.saturating_sub(reach);
    let keys_end = (part.first_query + part.queries)
        .saturating_add(reach)
        .min(part.row_length);
    let rows = |tensor: &Tensor, first, count| {
        tensor
            .narrow(0, part.row_start + first, count)?
            .transpose(0, 1)
    };
    let queries = rows(&heads.queries, part.first_query, part.queries)?;
    let keys = rows(&heads.keys, first_key, keys_end - first_key)?;
    let values = rows(&heads.values, first_key, keys_end - first_key)?;
    let scores = queries.matmul(&keys.transpose(1, 2)?)?;
    let window = window.map(|reach| Window {
        first_query: part.first_query,
        first_key,
        reach,
    });
    processor::softmax(&scores, scale, window)?;
    Ok(scores.matmul(&values)?.transpose(0, 1)?.contiguous()?)
}

/// The way of a device that wants few large operations: rows of equal length as one dense batch.
///
/// # Errors
/// When the device fails or has no room.
pub fn attend_by_group(
    heads: &Heads,
    batch: &Batch,
    window: Option<usize>,
) -> Result<Tensor, EngineError> {
    let (_, head_count, head_width) = heads.queries.dims3()?;
    let scale = f64::from(heads.scale()?);
    let mut attended = Vec::new();
    for (start, rows, length) in batch.groups() {
        let dense = |tensor: &Tensor| {
            tensor
                .narrow(0, start, rows * length)?
                .reshape((rows, length, head_count, head_width))?
                .transpose(1, 2)?
                .contiguous()
        };
        let keys = dense(&heads.keys)?.transpose(2, 3)?;
        let mut scores = (dense(&heads.queries)?.matmul(&keys)? * scale)?;
        if let Some(reach) = window.filter(|reach| *reach + 1 < length) {
            scores = scores.broadcast_add(&window_mask(length, reach, &scores)?)?;
        }
        let weights = candle_nn::ops::softmax_last_dim(&scores.contiguous()?)?;
        let context = weights.matmul(&dense(&heads.values)?)?.transpose(1, 2)?;
        attended.push(context.reshape((rows * length, head_count * head_width))?);
    }
    Ok(Tensor::cat(&attended, 0)?)
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

/// Rotates queries or keys by their positions (RoFormer, Su and others 2021), halves paired.
/// `[tokens, heads, head width]`, with cosines and sines of `[tokens, head width / 2]`.
pub(crate) fn rotate(
    heads: &Tensor,
    cosines: &Tensor,
    sines: &Tensor,
) -> Result<Tensor, EngineError> {
    let half = heads.dim(D::Minus1)? / 2;
    let first = heads.narrow(D::Minus1, 0, half)?;
    let second = heads.narrow(D::Minus1, half, half)?;
    let (cosines, sines) = (cosines.unsqueeze(1)?, sines.unsqueeze(1)?);
    let rotated_first = (first.broadcast_mul(&cosines)? - second.broadcast_mul(&sines)?)?;
    let rotated_second = (second.broadcast_mul(&cosines)? + first.broadcast_mul(&sines)?)?;
    Ok(Tensor::cat(&[rotated_first, rotated_second], D::Minus1)?)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn both_ways_agree_with_and_without_a_window() {
        let lengths = [1, 3, 3, 40, 17, 40];
        let ids = [0; 40];
        let rows = lengths.map(|length| (&ids[..length], &ids[..length]));
        let batch = Batch::pack(&rows, &Device::Cpu).unwrap();
        let joined = Tensor::randn(0f32, 1.0, (batch.tokens(), 3 * 24), &Device::Cpu).unwrap();
        let heads = Heads::split(&joined, 3).unwrap();
        for window in [None, Some(0), Some(4), Some(100)] {
            let by_row = attend_by_row(&heads, &batch, window).unwrap();
            let by_group = attend_by_group(&heads, &batch, window).unwrap();
            let difference = (by_row - by_group).unwrap().abs().unwrap();
            let largest = difference.max_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(largest < 1e-5, "window {window:?}: {largest:e} apart");
        }
    }
}
