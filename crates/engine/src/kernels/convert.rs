//! Conversion of activations to the dtype of the weights that multiply them: rounding to bf16, or
//! dynamic quantization to int8 row by row.

use super::kernel;
use super::matrix::{Matrix, MatrixDtype};
use super::packing::{PackedWeights, WeightDtype};
use super::simd::Simd;

/// Converts `input` to the words of `weights`, `[rows, words]`, and for int8 writes the scale and
/// the zero point of each row to `scales`. Both must have room for all rows.
pub(super) fn convert_rows(
    input: &Matrix,
    weights: &PackedWeights,
    words: *mut u32,
    scales: *mut f32,
) {
    let job = ConversionJob {
        input,
        words: weights.words,
        dtype: weights.dtype,
        output: words,
        scales,
    };
    // SAFETY: packing has checked that the CPU supports the set, and there is room by the caller's
    // guarantee.
    unsafe {
        run_conversion(weights.instructions, &job);
    }
}

/// The largest quantized input. Unlike weights, inputs are quantized asymmetrically: many have
/// nearly no values below zero, and some a few outliers on one side.
const UINT8_MAX: f32 = 255.0;

struct ConversionJob<'a> {
    input: &'a Matrix,
    words: usize,
    dtype: WeightDtype,
    output: *mut u32,
    scales: *mut f32,
}

kernel! {
    /// Runs a conversion.
    fn run_conversion(job: &ConversionJob<'_>) = rows
}

/// # Safety
/// The CPU supports the set; the job's output and scales have room for the input's rows.
#[inline(always)]
unsafe fn rows<I: Simd, const V: usize, const R: usize>(job: &ConversionJob<'_>) {
    let width = job.input.width();
    let whole_words = width / job.dtype.elements_per_word();
    for row in 0..job.input.rows() {
        // SAFETY: the row is there in both matrices. The words after the row's last element are
        // cleared first: they are multiplied too.
        unsafe {
            let output = job.output.add(row * job.words);
            for word in whole_words..job.words {
                *output.add(word) = 0;
            }
            let input = MatrixRow::<I>::new(job.input, row);
            match job.dtype {
                WeightDtype::F32 => {
                    for at in (0..width).step_by(I::LANES) {
                        let count = (width - at).min(I::LANES);
                        let values = input.load(at, count);
                        I::store_first(output.cast::<f32>().add(at), count, values);
                    }
                }
                WeightDtype::Bf16 => {
                    for at in (0..width).step_by(I::LANES) {
                        let count = (width - at).min(I::LANES);
                        let to = output.cast::<u16>().add(at);
                        let values = input.load(at, count);
                        if count == I::LANES {
                            I::store_bf16(to, values);
                        } else {
                            I::store_bf16_first(to, count, values);
                        }
                    }
                }
                WeightDtype::Int8 => {
                    let (low, high) = input.range(width);
                    let scale = (high - low) / UINT8_MAX;
                    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
                    // The zero point is a whole number, so that zero is exact.
                    let zero_point = (-low * inverse).round();
                    *job.scales.add(2 * row) = scale;
                    *job.scales.add(2 * row + 1) = zero_point;
                    let (inverse, zero_point) = (I::splat(inverse), I::splat(zero_point));
                    for at in (0..width).step_by(I::LANES) {
                        let count = (width - at).min(I::LANES);
                        let values = I::round(I::fma(input.load(at, count), inverse, zero_point));
                        // Rounding of the inverse can go beyond the range by one.
                        let values = I::max(I::min(values, I::splat(UINT8_MAX)), I::splat(0.0));
                        I::store_bytes_first(output.cast::<u8>().add(at), count, values);
                    }
                }
            }
        }
    }
}

/// A row of a matrix of either dtype.
pub(super) struct MatrixRow<I> {
    start: *const u32,
    dtype: MatrixDtype,
    set: std::marker::PhantomData<I>,
}

impl<I: Simd> MatrixRow<I> {
    /// # Safety
    /// The row is one of the matrix, which outlives this.
    #[inline(always)]
    pub(super) unsafe fn new(matrix: &Matrix, row: usize) -> Self {
        Self {
            // SAFETY: the row is there.
            start: unsafe { matrix.pointer().add(row * matrix.words_per_row()) },
            dtype: matrix.dtype(),
            set: std::marker::PhantomData,
        }
    }

    /// # Safety
    /// The CPU supports the set, and the row has `count` elements from `at` on.
    #[inline(always)]
    pub(super) unsafe fn load(&self, at: usize, count: usize) -> I::F {
        // SAFETY: passed on to the caller.
        unsafe {
            match self.dtype {
                MatrixDtype::F32 if count == I::LANES => I::load(self.start.cast::<f32>().add(at)),
                MatrixDtype::F32 => I::load_first(self.start.cast::<f32>().add(at), count),
                MatrixDtype::Bf16 if count == I::LANES => {
                    I::load_bf16(self.start.cast::<u16>().add(at))
                }
                MatrixDtype::Bf16 => I::load_bf16_first(self.start.cast::<u16>().add(at), count),
            }
        }
    }

    /// The smallest and the largest element of the row, zero included.
    #[inline(always)]
    unsafe fn range(&self, width: usize) -> (f32, f32) {
        // SAFETY: the CPU supports the set and the row has `width` elements, by the caller's
        // guarantee. Lanes beyond them are zeros.
        unsafe {
            let zero = I::splat(0.0);
            let (mut low, mut high) = (zero, zero);
            for at in (0..width).step_by(I::LANES) {
                let values = self.load(at, (width - at).min(I::LANES));
                low = I::min(low, values);
                high = I::max(high, values);
            }
            (-I::largest(I::sub(zero, low)), I::largest(high))
        }
    }
}
