//! Matrix multiplication (GEMM) of activations with packed weights: the loops in which a forward
//! pass spends nearly all of its time.
//!
//! A tile of sums, some rows by one panel, stays in registers while the micro-kernel goes along
//! the panel; each step loads the panel's next words once and one word of each row (Goto and van
//! de Geijn, Anatomy of High-Performance Matrix Multiplication, 2008). Panels are the outer loop
//! and rows the inner one, so that a panel is read from memory once and from the second-level
//! cache after that.

#[cfg(target_arch = "x86_64")]
pub(super) mod amx;

use std::ops::Range;

use super::buffer::Buffer;
use super::convert::convert_rows;
use super::functions::{self, Activation};
use super::kernel;
use super::matrix::{Matrix, MatrixDtype};
use super::packing::{PackedWeights, WeightDtype};
use super::simd::Simd;
use super::thread_pool;

/// Maximum number of rows of a tile.
pub(super) const GEMM_TILE_ROWS: usize = 6;
/// Rows that are multiplied at a time in AMX tiles.
pub(super) const AMX_BLOCK_ROWS: usize = 32;
/// Maximum number of registers of a tile.
const TILE_REGISTERS: usize = GEMM_TILE_ROWS * 4;
/// Words in a cache line.
const LINE_WORDS: usize = 16;
/// Multiplications of words that make the use of another thread worthwhile: some ten
/// microseconds.
const WORDS_PER_SHARE_MIN: usize = 1 << 19;

/// How one step of a dot product multiplies words and accumulates them.
pub(super) trait DotProduct<I: Simd> {
    /// A register of sums.
    type Sum: Copy;
    /// Whether sums are quantized, and need the scales of their row and of their output.
    const QUANTIZED: bool;
    unsafe fn zero() -> Self::Sum;
    unsafe fn load(from: *const u32) -> Self::Sum;
    unsafe fn step(sum: Self::Sum, input: I::W, weight: I::W) -> Self::Sum;
    unsafe fn floats(sum: Self::Sum) -> I::F;
}

pub(super) struct F32;
pub(super) struct Bf16;
pub(super) struct Int8;

// SAFETY (this and the next two): the CPU supports the set, and there is a register of words at
// `from`, by the caller's guarantee.
impl<I: Simd> DotProduct<I> for F32 {
    type Sum = I::F;
    const QUANTIZED: bool = false;
    #[inline(always)]
    unsafe fn zero() -> I::F {
        unsafe { I::splat(0.0) }
    }
    #[inline(always)]
    unsafe fn load(from: *const u32) -> I::F {
        unsafe { I::load(from.cast()) }
    }
    #[inline(always)]
    unsafe fn step(sum: I::F, input: I::W, weight: I::W) -> I::F {
        unsafe { I::fma(I::as_floats(input), I::as_floats(weight), sum) }
    }
    #[inline(always)]
    unsafe fn floats(sum: I::F) -> I::F {
        sum
    }
}

impl<I: Simd> DotProduct<I> for Bf16 {
    type Sum = I::F;
    const QUANTIZED: bool = false;
    #[inline(always)]
    unsafe fn zero() -> I::F {
        unsafe { I::splat(0.0) }
    }
    #[inline(always)]
    unsafe fn load(from: *const u32) -> I::F {
        unsafe { I::load(from.cast()) }
    }
    #[inline(always)]
    unsafe fn step(sum: I::F, input: I::W, weight: I::W) -> I::F {
        unsafe { I::add_bf16_products(sum, input, weight) }
    }
    #[inline(always)]
    unsafe fn floats(sum: I::F) -> I::F {
        sum
    }
}

impl<I: Simd> DotProduct<I> for Int8 {
    type Sum = I::W;
    const QUANTIZED: bool = true;
    #[inline(always)]
    unsafe fn zero() -> I::W {
        unsafe { I::zero_words() }
    }
    #[inline(always)]
    unsafe fn load(from: *const u32) -> I::W {
        unsafe { I::load_words(from) }
    }
    #[inline(always)]
    unsafe fn step(sum: I::W, input: I::W, weight: I::W) -> I::W {
        unsafe { I::add_byte_products(sum, input, weight) }
    }
    #[inline(always)]
    unsafe fn floats(sum: I::W) -> I::F {
        unsafe { I::to_floats(sum) }
    }
}

/// Rows of words in memory.
#[derive(Clone, Copy)]
pub(super) struct WordRows {
    pub(super) start: *const u32,
    pub(super) stride: usize,
}

/// The micro-kernel: `R` rows times `V` registers of columns, `steps` words of each.
///
/// # Safety
/// The CPU supports the set; `input` has `R` rows of `steps` words, and `weights` has `steps`
/// rows of `V` registers.
#[inline(always)]
pub(super) unsafe fn micro_kernel<I: Simd, D: DotProduct<I>, const V: usize, const R: usize>(
    input: WordRows,
    weights: WordRows,
    steps: usize,
    initial_sums: [D::Sum; V],
) -> [[D::Sum; V]; R] {
    let mut sums = [initial_sums; R];
    for step in 0..steps {
        // SAFETY: `step` is less than `steps`, and the caller has that many words.
        unsafe {
            let row = weights.start.add(step * weights.stride);
            let mut weight = [I::zero_words(); V];
            for (index, weight) in weight.iter_mut().enumerate() {
                *weight = I::load_words(row.add(index * I::LANES));
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                let input = I::splat_word(input.start.add(row * input.stride + step));
                for (sum, weight) in sums.iter_mut().zip(weight) {
                    *sum = D::step(*sum, input, weight);
                }
            }
        }
    }
    sums
}

/// The output matrix of a GEMM.
#[derive(Clone, Copy)]
struct GemmOutput {
    start: *mut u32,
    /// Elements of a row.
    width: usize,
    /// Words from one row to the next.
    stride: usize,
    dtype: MatrixDtype,
}

/// A GEMM, or one thread's share of its panels.
struct GemmJob<'a> {
    weights: &'a PackedWeights,
    panels: Range<usize>,
    input: WordRows,
    rows: usize,
    /// For int8, of each input row: its scale and its zero point.
    row_scales: *const f32,
    output: GemmOutput,
    activation: Activation,
}

/// `input · weightsᵀ + bias` and an activation, `[rows, outputs]` in `dtype`. The panels are
/// divided among the threads of the pool where there is enough work.
///
/// # Panics
/// When the input's width is not the inputs of the weights.
pub fn matmul(
    weights: &PackedWeights,
    input: &Matrix,
    activation: Activation,
    dtype: MatrixDtype,
) -> Matrix {
    assert_eq!(
        input.width(),
        weights.inputs,
        "the inner dimensions of a matrix multiplication"
    );
    let prepared = GemmInput::new(input, weights);
    let mut output = Matrix::from_arena(input.rows(), weights.outputs, dtype);
    let target = GemmOutput {
        start: output.pointer_mut(),
        width: weights.outputs,
        stride: output.words_per_row(),
        dtype,
    };
    let (source, row_scales) = (prepared.words, prepared.row_scales());
    let shared = SharedGemmJob(GemmJob {
        weights,
        panels: 0..weights.panels(),
        input: source,
        rows: input.rows(),
        row_scales,
        output: target,
        activation,
    });
    let multiplications = input.rows() * weights.outputs * weights.inputs;
    let shares = thread_pool::shares(
        multiplications / weights.dtype.elements_per_word(),
        WORDS_PER_SHARE_MIN,
    );
    let shares = shares.min(weights.panels());
    thread_pool::parallel_for(shares, &|share| {
        let whole = shared.get();
        let bound = |share| weights.panels() * share / shares;
        let job = GemmJob {
            panels: bound(share)..bound(share + 1),
            ..*whole
        };
        // SAFETY: packing has checked that the CPU supports the set. The input has `rows` rows of
        // the weights' words, as `GemmInput` prepared them, and the output `rows` rows of its
        // width; each share writes columns that no other does.
        unsafe {
            #[cfg(target_arch = "x86_64")]
            if weights.dtype.uses_tiles(weights.instructions) {
                return amx::run_gemm(&job);
            }
            run_gemm(weights.instructions, &job);
        }
    });
    output
}

/// A GEMM that several threads share.
struct SharedGemmJob<'a>(GemmJob<'a>);

impl<'a> SharedGemmJob<'a> {
    fn get(&self) -> &GemmJob<'a> {
        &self.0
    }
}

// SAFETY: its pointers are read, or written to in columns of one thread alone.
unsafe impl Sync for SharedGemmJob<'_> {}

/// The input rows in the dtype of the weights.
struct GemmInput {
    words: WordRows,
    /// The memory of the words, where it is not the matrix itself.
    _words: Option<Buffer>,
    scales: Option<Buffer>,
}

impl GemmInput {
    fn new(input: &Matrix, weights: &PackedWeights) -> Self {
        let same = match weights.dtype {
            WeightDtype::F32 => input.dtype() == MatrixDtype::F32,
            WeightDtype::Bf16 => input.dtype() == MatrixDtype::Bf16,
            WeightDtype::Int8 => false,
        };
        // For AMX tiles, rows may have to be padded.
        if same && input.words_per_row() == weights.words {
            let words = WordRows {
                start: input.pointer(),
                stride: input.words_per_row(),
            };
            return Self {
                words,
                _words: None,
                scales: None,
            };
        }
        let mut owned = Buffer::from_arena(input.rows() * weights.words);
        let mut scales = Buffer::from_arena(2 * input.rows());
        convert_rows(
            input,
            weights,
            owned.pointer_mut(),
            scales.pointer_mut().cast(),
        );
        let words = WordRows {
            start: owned.pointer(),
            stride: weights.words,
        };
        Self {
            words,
            _words: Some(owned),
            scales: Some(scales),
        }
    }

    fn row_scales(&self) -> *const f32 {
        let scales = self.scales.as_ref();
        scales.map_or(std::ptr::null(), |scales| scales.pointer().cast())
    }
}

kernel! {
    /// Runs a GEMM.
    fn run_gemm(job: &GemmJob<'_>) = gemm
}

/// # Safety
/// The CPU supports the set; the job's pointers have as many rows as it declares.
#[inline(always)]
unsafe fn gemm<I: Simd, const V: usize, const R: usize>(job: &GemmJob<'_>) {
    // SAFETY: passed on to the caller.
    unsafe {
        match job.weights.dtype {
            WeightDtype::F32 => panels::<I, F32, V, R>(job),
            WeightDtype::Bf16 => panels::<I, Bf16, V, R>(job),
            WeightDtype::Int8 => panels::<I, Int8, V, R>(job),
        }
    }
}

#[inline(always)]
unsafe fn panels<I: Simd, D: DotProduct<I>, const V: usize, const R: usize>(job: &GemmJob<'_>) {
    let panel_words = V * I::LANES * job.weights.words;
    // Each tile prefetches some lines of the next panel, so that the first tile of that panel
    // need not wait for memory.
    let tiles = job.rows.div_ceil(R);
    let words_per_tile = panel_words.div_ceil(tiles.max(1));
    for panel in job.panels.clone() {
        let next = job.weights.values().wrapping_add((panel + 1) * panel_words);
        let mut row = 0;
        while row < job.rows {
            let first = row / R * words_per_tile;
            for word in (first..(first + words_per_tile).min(panel_words)).step_by(LINE_WORDS) {
                I::prefetch(next.wrapping_add(word));
            }
            let rows = (job.rows - row).min(R);
            // SAFETY: these rows and this panel are there.
            unsafe {
                match rows {
                    1 => tile::<I, D, V, 1>(job, panel, row),
                    2 => tile::<I, D, V, 2>(job, panel, row),
                    3 => tile::<I, D, V, 3>(job, panel, row),
                    4 => tile::<I, D, V, 4>(job, panel, row),
                    5 => tile::<I, D, V, 5>(job, panel, row),
                    _ => tile::<I, D, V, 6>(job, panel, row),
                }
            }
            row += rows;
        }
    }
}

/// One tile: the micro-kernel, then the epilogue.
#[inline(always)]
unsafe fn tile<I: Simd, D: DotProduct<I>, const V: usize, const R: usize>(
    job: &GemmJob<'_>,
    panel: usize,
    row: usize,
) {
    let width = V * I::LANES;
    let first = panel * width;
    let weights = job.weights;
    // SAFETY: packing made whole panels of values and initial_sums; the rows `row` to `row + R` of the
    // input are there.
    unsafe {
        let mut initial_sums = [D::zero(); V];
        for (index, sum) in initial_sums.iter_mut().enumerate() {
            *sum = D::load(weights.initial_sums().add(first + index * I::LANES));
        }
        let input = WordRows {
            start: job.input.start.add(row * job.input.stride),
            ..job.input
        };
        let values = WordRows {
            start: weights.values().add(first * weights.words),
            stride: width,
        };
        let sums = micro_kernel::<I, D, V, R>(input, values, weights.words, initial_sums);
        let mut results = [I::splat(0.0); TILE_REGISTERS];
        for (results, sums) in results.chunks_exact_mut(V).zip(&sums) {
            for (result, sum) in results.iter_mut().zip(sums) {
                *result = D::floats(*sum);
            }
        }
        epilogue::<I, D, V>(job, row, first, &mut results[..R * V]);
    }
}

/// The epilogue of a GEMM, for some rows of `V` registers of sums from a row and a column on:
/// dequantization, the activation and the store.
///
/// # Safety
/// The CPU supports the set; the rows are there, and the column is one of the weights' panels.
#[inline(always)]
unsafe fn epilogue<I: Simd, D: DotProduct<I>, const V: usize>(
    job: &GemmJob<'_>,
    row: usize,
    first: usize,
    results: &mut [I::F],
) {
    let weights = job.weights;
    // SAFETY: packing made whole panels of scales, sums and biases; `store` writes no column beyond
    // the output's width.
    unsafe {
        if D::QUANTIZED {
            for (number, results) in results.chunks_exact_mut(V).enumerate() {
                for (index, result) in results.iter_mut().enumerate() {
                    let column = first + index * I::LANES;
                    let scale = I::splat(*job.row_scales.add(2 * (row + number)));
                    let zero_point = I::splat(-*job.row_scales.add(2 * (row + number) + 1));
                    // The inputs' zero point has been added with each weight.
                    *result = I::fma(
                        zero_point,
                        I::load(weights.weight_sums().add(column)),
                        *result,
                    );
                    let scale = I::mul(scale, I::load(weights.scales().add(column)));
                    *result = I::fma(*result, scale, I::load(weights.biases().add(column)));
                }
            }
        }
        // Not closures: they would not be compiled for the set.
        macro_rules! apply {
            ($function:ident) => {
                for result in results.iter_mut() {
                    *result = functions::$function::<I>(*result);
                }
            };
        }
        match job.activation {
            Activation::Identity => {}
            Activation::Gelu if job.output.dtype == MatrixDtype::Bf16 => apply!(gelu_rounded),
            Activation::Gelu => apply!(gelu),
            Activation::GeluTanh => apply!(gelu_tanh),
            Activation::Relu => apply!(relu),
            Activation::Silu => apply!(silu),
            Activation::Tanh => apply!(tanh),
        }
        store::<I, V>(&job.output, row, first, results);
    }
}

/// Stores rows of `V` registers, up to the output's width.
#[inline(always)]
unsafe fn store<I: Simd, const V: usize>(
    output: &GemmOutput,
    row: usize,
    column: usize,
    results: &[I::F],
) {
    for (number, results) in results.chunks_exact(V).enumerate() {
        // SAFETY: the rows are there, and no column at or beyond the output's width is written.
        unsafe {
            let start = output.start.add((row + number) * output.stride);
            for (index, result) in results.iter().enumerate() {
                let column = column + index * I::LANES;
                let count = output.width.saturating_sub(column).min(I::LANES);
                match output.dtype {
                    MatrixDtype::F32 if count == I::LANES => {
                        I::store(start.cast::<f32>().add(column), *result);
                    }
                    MatrixDtype::Bf16 if count == I::LANES => {
                        I::store_bf16(start.cast::<u16>().add(column), *result);
                    }
                    _ if count == 0 => {}
                    MatrixDtype::F32 => {
                        I::store_first(start.cast::<f32>().add(column), count, *result);
                    }
                    MatrixDtype::Bf16 => {
                        I::store_bf16_first(start.cast::<u16>().add(column), count, *result);
                    }
                }
            }
        }
    }
}
