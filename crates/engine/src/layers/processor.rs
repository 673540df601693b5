//! Steps between matrix products, on the processor.
//!
//! candle does each of these as several passes over memory, and takes `exp` and `erf` one number
//! at a time. Here each is one pass in place, in plain loops that `pulp` lets the compiler
//! translate once for each vector width and that pick theirs at run time.

use std::ops::Deref;

use candle_core::{CpuStorage, DType, InplaceOp1, Layout, Result, Storage, Tensor};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::Activation;

/// Fewer numbers than this are not worth another thread.
const NUMBERS_PER_TASK: usize = 16_384;
const LANES: usize = 16;

/// Whether a tensor is one that these functions take: 32-bit floats without gaps.
pub(super) fn takes(tensor: &Tensor) -> bool {
    tensor.device().is_cpu() && tensor.dtype() == DType::F32 && tensor.is_contiguous()
}

/// Adds a bias to each row and applies an activation, in place.
pub(super) fn bias_activation(
    values: Tensor,
    bias: Option<&Tensor>,
    activation: Activation,
) -> Result<Tensor> {
    let bias = bias.map(Tensor::storage_and_layout);
    let bias = bias.as_ref().map(floats).transpose()?;
    if bias.is_some() || activation != Activation::Identity {
        values.inplace_op1(&BiasActivation { bias, activation })?;
    }
    Ok(values)
}

/// The parameters of a layer normalization: `[width]` each.
pub(super) struct NormParameters<'a> {
    pub(super) weight: &'a Tensor,
    pub(super) bias: &'a Tensor,
    pub(super) epsilon: f32,
}

/// Normalizes each row in place, after another tensor and a bias have been added where given.
pub(super) fn norm(
    values: Tensor,
    parameters: NormParameters<'_>,
    added: Option<(&Tensor, Option<&Tensor>)>,
) -> Result<Tensor> {
    let weight = parameters.weight.storage_and_layout();
    let shift = parameters.bias.storage_and_layout();
    let bias = added.and_then(|(_, bias)| bias.map(Tensor::storage_and_layout));
    let added = added.map(|(added, _)| added.storage_and_layout());
    let bias = bias.as_ref().map(floats).transpose()?;
    let added = added.as_ref().map(floats).transpose()?;
    values.inplace_op1(&Normalize {
        weight: floats(&weight)?,
        shift: floats(&shift)?,
        bias: bias.unwrap_or_default(),
        added: added.unwrap_or_default(),
        epsilon: parameters.epsilon,
    })?;
    Ok(values)
}

/// Which keys a query sees: those at most `reach` places away from it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Window {
    /// The first query's place in its row.
    pub(super) first_query: usize,
    /// The first key's place in the row.
    pub(super) first_key: usize,
    /// Places to each side.
    pub(super) reach: usize,
}

/// Softmax of `scale · scores` over the last dimension of `[heads, queries, keys]`, in place.
/// Keys outside the window get zero.
pub(super) fn softmax(scores: &Tensor, scale: f32, window: Option<Window>) -> Result<()> {
    scores.inplace_op1(&Softmax { scale, window })
}

fn floats<'a, Guard: Deref<Target = Storage>>(
    (storage, layout): &'a (Guard, &Layout),
) -> Result<&'a [f32]> {
    let (Storage::Cpu(storage), Some((start, end))) = (&**storage, layout.contiguous_offsets())
    else {
        candle_core::bail!("a parameter is not on the processor, or has gaps");
    };
    Ok(&storage.as_slice::<f32>()?[start..end])
}

fn floats_mut<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> Result<&'a mut [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(values), Some((start, end))) => Ok(&mut values[start..end]),
        _ => candle_core::bail!("only 32-bit floats without gaps are changed in place"),
    }
}

/// Runs `rows` over whole rows of `width`, on as many threads as there is work for. `rows` gets
/// the number of its first row.
fn in_parallel(values: &mut [f32], width: usize, rows: impl Fn(usize, &mut [f32]) + Sync) {
    let rows_per_task = (NUMBERS_PER_TASK / width.max(1)).max(1);
    let arch = Arch::new();
    let rows = &rows;
    if values.len() <= rows_per_task * width {
        let (first, chunk) = (0, values);
        return arch.dispatch(Chunk { rows, first, chunk });
    }
    let chunks = values.par_chunks_mut(rows_per_task * width).enumerate();
    chunks.for_each(|(task, chunk)| {
        let first = task * rows_per_task;
        arch.dispatch(Chunk { rows, first, chunk });
    });
}

/// Some rows and what happens to them. A type of its own, because it has to be inlined all the
/// way: what is not is translated for the oldest processor.
struct Chunk<'a, Rows> {
    rows: &'a Rows,
    first: usize,
    chunk: &'a mut [f32],
}

impl<Rows: Fn(usize, &mut [f32])> WithSimd for Chunk<'_, Rows> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _simd: S) {
        (self.rows)(self.first, self.chunk);
    }
}

struct BiasActivation<'a> {
    bias: Option<&'a [f32]>,
    activation: Activation,
}

impl InplaceOp1 for BiasActivation<'_> {
    fn name(&self) -> &'static str {
        "bias-activation"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let width = layout.dims().last().copied().unwrap_or(1);
        let values = floats_mut(storage, layout)?;
        let bias = self.bias;
        match self.activation {
            Activation::Identity => activate(values, width, bias, |value| value),
            Activation::Gelu => activate(values, width, bias, gelu),
            Activation::GeluTanh => activate(values, width, bias, gelu_tanh),
            Activation::Relu => activate(values, width, bias, |value| value.max(0.0)),
            Activation::Silu => activate(values, width, bias, |value| value / (1.0 + exp(-value))),
            Activation::Tanh => activate(values, width, bias, f32::tanh),
        }
        Ok(())
    }
}

#[inline(always)]
fn activate(
    values: &mut [f32],
    width: usize,
    bias: Option<&[f32]>,
    function: impl Fn(f32) -> f32 + Sync,
) {
    in_parallel(
        values,
        width,
        #[inline(always)]
        |_, rows| match bias {
            Some(bias) => {
                for row in rows.chunks_exact_mut(width) {
                    for (value, bias) in row.iter_mut().zip(bias) {
                        *value = function(*value + bias);
                    }
                }
            }
            None => {
                for value in rows {
                    *value = function(*value);
                }
            }
        },
    );
}

struct Normalize<'a> {
    weight: &'a [f32],
    shift: &'a [f32],
    /// Empty: none.
    bias: &'a [f32],
    /// Empty: none.
    added: &'a [f32],
    epsilon: f32,
}

impl InplaceOp1 for Normalize<'_> {
    fn name(&self) -> &'static str {
        "normalize"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let width = self.weight.len();
        in_parallel(
            floats_mut(storage, layout)?,
            width,
            #[inline(always)]
            |first, rows| {
                let added = self.added.get(first * width..).unwrap_or_default();
                let mut added = added.chunks_exact(width);
                for row in rows.chunks_exact_mut(width) {
                    for (value, bias) in row.iter_mut().zip(self.bias) {
                        *value += bias;
                    }
                    let addend = added.next().unwrap_or_default();
                    for (value, addend) in row.iter_mut().zip(addend) {
                        *value += addend;
                    }
                    self.row(row);
                }
            },
        );
        Ok(())
    }
}

impl Normalize<'_> {
    #[inline(always)]
    fn row(&self, row: &mut [f32]) {
        let count = row.len() as f32;
        let mean = sum(row, |value| value) / count;
        let variance = sum(row, |value| (value - mean) * (value - mean)) / count;
        let scale = 1.0 / (variance + self.epsilon).sqrt();
        for ((value, weight), shift) in row.iter_mut().zip(self.weight).zip(self.shift) {
            *value = (*value - mean) * scale * weight + shift;
        }
    }
}

struct Softmax {
    scale: f32,
    window: Option<Window>,
}

impl InplaceOp1 for Softmax {
    fn name(&self) -> &'static str {
        "attention-softmax"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let (_, queries, keys) = layout.shape().dims3()?;
        in_parallel(
            floats_mut(storage, layout)?,
            keys,
            #[inline(always)]
            |first, rows| {
                for (place, row) in rows.chunks_exact_mut(keys).enumerate() {
                    let (from, to) = self.seen((first + place) % queries, keys);
                    row[..from].fill(0.0);
                    row[to..].fill(0.0);
                    softmax_row(&mut row[from..to], self.scale);
                }
            },
        );
        Ok(())
    }
}

impl Softmax {
    /// The range of keys that a query sees.
    fn seen(&self, query: usize, keys: usize) -> (usize, usize) {
        let Some(window) = self.window else {
            return (0, keys);
        };
        let place = window.first_query + query;
        let from = place.saturating_sub(window.reach + window.first_key);
        let from = from.min(keys);
        let to = (place + window.reach + 1).saturating_sub(window.first_key);
        (from, to.clamp(from, keys))
    }
}

#[inline(always)]
fn softmax_row(row: &mut [f32], scale: f32) {
    let largest = largest(row) * scale;
    for value in row.iter_mut() {
        *value = exp(*value * scale - largest);
    }
    let inverse = 1.0 / sum(row, |value| value);
    for value in row {
        *value *= inverse;
    }
}

/// Sums in sixteen lanes, which the compiler may keep in one register: a single running sum
/// would have to be added in order.
#[inline(always)]
fn sum(row: &[f32], term: impl Fn(f32) -> f32) -> f32 {
    let (whole, rest) = row.as_chunks::<LANES>();
    let mut lanes = [0.0; LANES];
    for chunk in whole {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane += term(*value);
        }
    }
    lanes.iter().sum::<f32>() + rest.iter().map(|value| term(*value)).sum::<f32>()
}

#[inline(always)]
fn largest(row: &[f32]) -> f32 {
    let (whole, rest) = row.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in whole {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane = if *value > *lane { *value } else { *lane };
        }
    }
    let values = lanes.iter().chain(rest);
    values.copied().fold(f32::NEG_INFINITY, f32::max)
}

/// The exponential function to within 2 units in the last place, between 2^-126 and 2^127:
/// e^x = 2^n · e^r with |r| at most half the logarithm of 2, and e^r by its Taylor series.
#[inline(always)]
fn exp(value: f32) -> f32 {
    // Added to a float, it leaves the nearest whole number in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let value = value.clamp(-87.0, 88.0);
    let shifted = value * std::f32::consts::LOG2_E + ROUND;
    let whole = shifted - ROUND;
    let rest = value - whole * LN_2_HIGH - whole * LN_2_LOW;
    let series = 1.0 / 5_040.0;
    let series = series * rest + 1.0 / 720.0;
    let series = series * rest + 1.0 / 120.0;
    let series = series * rest + 1.0 / 24.0;
    let series = series * rest + 1.0 / 6.0;
    let series = series * rest + 0.5;
    let series = series * rest * rest + rest + 1.0;
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits());
    series * f32::from_bits(exponent.wrapping_add(127) << 23)
}

/// The error function to within 1.5e-7: formula 7.1.26 of Abramowitz and Stegun, Handbook of
/// Mathematical Functions (1964).
#[inline(always)]
fn erf(value: f32) -> f32 {
    let size = value.abs();
    let t = 1.0 / (1.0 + 0.327_591_1 * size);
    let series = 1.061_405_4 * t - 1.453_152;
    let series = series * t + 1.421_413_7;
    let series = series * t - 0.284_496_74;
    let series = series * t + 0.254_829_6;
    (1.0 - series * t * exp(-size * size)).copysign(value)
}

#[inline(always)]
fn gelu(value: f32) -> f32 {
    0.5 * value * (1.0 + erf(value * std::f32::consts::FRAC_1_SQRT_2))
}

#[inline(always)]
fn gelu_tanh(value: f32) -> f32 {
    // 0.5 · (1 + tanh(y)) is the sigmoid of 2y.
    let inner = 1.595_769 * (value + 0.044_715 * value * value * value);
    value / (1.0 + exp(-inner))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_agrees_with_the_library() {
        for step in -8_700..8_800 {
            let value = step as f32 / 100.0;
            let exact = f64::from(value).exp();
            let error = (f64::from(exp(value)) - exact).abs() / exact;
            assert!(error < 2.5e-7, "exp({value}): relative error {error:e}");
        }
    }

    #[test]
    fn gelu_agrees_with_candles() {
        let values: Vec<f32> = (-800..800).map(|step| step as f32 / 100.0).collect();
        let tensor = Tensor::from_vec(values.clone(), 1_600, &candle_core::Device::Cpu).unwrap();
        let exact = tensor.gelu_erf().unwrap().to_vec1::<f32>().unwrap();
        for (value, exact) in values.iter().zip(exact) {
            let error = (gelu(*value) - exact).abs();
            assert!(error < 1e-6, "gelu({value}): error {error:e}");
        }
    }

    #[test]
    fn a_window_hides_far_keys() {
        let softmax = Softmax {
            scale: 1.0,
            window: Some(Window {
                first_query: 4,
                first_key: 2,
                reach: 2,
            }),
        };
        assert_eq!(softmax.seen(0, 8), (0, 5));
        assert_eq!(softmax.seen(3, 8), (3, 8));
    }
}
