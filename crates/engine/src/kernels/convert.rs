//! Rows of activations, rounded to the format of the weights that they meet next.

use super::instructions::Isa;
use super::kernel;
use super::matrix::{Format, Matrix};
use super::pack::{Packed, Precision};

/// Rounds `input` to the words of `weights`, `[rows, words]`, and for 8-bit integers puts
/// each row's scale and what stands for zero into `scales`. Both must have room for all rows.
pub(super) fn convert(input: &Matrix, weights: &Packed, words: *mut u32, scales: *mut f32) {
    let job = Job {
        input,
        words: weights.words,
        precision: weights.precision,
        output: words,
        scales,
    };
    // SAFETY: packing has asked the processor for the set, and the caller has the room.
    unsafe {
        run_job(weights.instructions, &job);
    }
}

/// The largest input in 8 bits. Unlike weights, inputs use all of it: many have nearly no numbers
/// below zero, and some a few very large ones on one side.
const BYTE_MAX: f32 = 255.0;

struct Job<'a> {
    input: &'a Matrix,
    words: usize,
    precision: Precision,
    output: *mut u32,
    scales: *mut f32,
}

kernel! {
    /// Runs a conversion.
    fn run_job(job: &Job<'_>) = rows
}

/// # Safety
/// The processor has the set; the job's output and scales have room for the input's rows.
#[inline(always)]
unsafe fn rows<I: Isa, const V: usize, const R: usize>(job: &Job<'_>) {
    let width = job.input.width();
    let whole_words = width / job.precision.per_word();
    for row in 0..job.input.rows() {
        // SAFETY: the row is there on both sides. What lies between the row's last number and
        // its last word is cleared first: it is multiplied too.
        unsafe {
            let output = job.output.add(row * job.words);
            for word in whole_words..job.words {
                *output.add(word) = 0;
            }
            let row_start = Row::<I>::new(job.input, row);
            match job.precision {
                Precision::F32 => {
                    for at in (0..width).step_by(I::LANES) {
                        let count = (width - at).min(I::LANES);
                        let values = row_start.load(at, count);
                        I::store_first(output.cast::<f32>().add(at), count, values);
                    }
                }
                Precision::Bf16 => {
                    for at in (0..width).step_by(I::LANES) {
                        let count = (width - at).min(I::LANES);
                        let to = output.cast::<u16>().add(at);
                        let values = row_start.load(at, count);
                        if count == I::LANES {
                            I::store_bf16(to, values);
                        } else {
                            I::store_bf16_first(to, count, values);
                        }
                    }
                }
                Precision::Int8 => {
                    let (low, high) = row_start.range(width);
                    let scale = (high - low) / BYTE_MAX;
                    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
                    // Zero falls on a whole number, so that it stays exact.
                    let zero = (-low * inverse).round();
                    *job.scales.add(2 * row) = scale;
                    *job.scales.add(2 * row + 1) = zero;
                    let (inverse, zero) = (I::splat(inverse), I::splat(zero));
                    for at in (0..width).step_by(I::LANES) {
                        let count = (width - at).min(I::LANES);
                        let values = I::round(I::fma(row_start.load(at, count), inverse, zero));
                        // Rounding of the inverse can reach past the end by one.
                        let values = I::max(I::min(values, I::splat(BYTE_MAX)), I::splat(0.0));
                        I::store_bytes_first(output.cast::<u8>().add(at), count, values);
                    }
                }
            }
        }
    }
}

/// A row of a matrix of either format.
pub(super) struct Row<I> {
    start: *const u32,
    format: Format,
    set: std::marker::PhantomData<I>,
}

impl<I: Isa> Row<I> {
    /// # Safety
    /// The row is one of the matrix, which outlives this.
    #[inline(always)]
    pub(super) unsafe fn new(matrix: &Matrix, row: usize) -> Self {
        Self {
            // SAFETY: the row is there.
            start: unsafe { matrix.pointer().add(row * matrix.words_per_row()) },
            format: matrix.format(),
            set: std::marker::PhantomData,
        }
    }

    /// # Safety
    /// The processor has the set, and the row `count` numbers from `at` on.
    #[inline(always)]
    pub(super) unsafe fn load(&self, at: usize, count: usize) -> I::F {
        // SAFETY: the caller's.
        unsafe {
            match self.format {
                Format::F32 if count == I::LANES => I::load(self.start.cast::<f32>().add(at)),
                Format::F32 => I::load_first(self.start.cast::<f32>().add(at), count),
                Format::Bf16 if count == I::LANES => I::load_bf16(self.start.cast::<u16>().add(at)),
                Format::Bf16 => I::load_bf16_first(self.start.cast::<u16>().add(at), count),
            }
        }
    }

    /// The least and the largest number of the row and zero.
    #[inline(always)]
    unsafe fn range(&self, width: usize) -> (f32, f32) {
        // SAFETY: the caller has the set and `width` numbers. Lanes beyond them are zeros.
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
