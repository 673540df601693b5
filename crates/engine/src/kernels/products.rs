//! Products of rows with packed weights: the loops that nearly all of a forward pass is spent in.
//!
//! A tile of sums, some rows by one panel, stays in registers while the product walks along a
//! panel; each step loads the panel's next words once and one word of each row (the inner kernel
//! of Goto and van de Geijn, Anatomy of High-Performance Matrix Multiplication, 2008). Panels are
//! the outer loop and rows the inner one, so that a panel is read from memory once and from the
//! second-level cache after that.

#[cfg(target_arch = "x86_64")]
pub(super) mod amx;

use std::ops::Range;

use super::buffer::Buffer;
use super::convert::convert;
use super::functions::{self, Activation};
use super::instructions::Isa;
use super::kernel;
use super::matrix::{Format, Matrix};
use super::pack::{Packed, Precision};
use super::team;

/// Rows of a tile, at most.
pub(super) const TILE_ROWS: usize = 6;
/// Rows that are multiplied at a time where a processor has tiles of its own.
pub(super) const TILES_ROWS: usize = 32;
/// Registers of a tile, at most.
const TILE: usize = TILE_ROWS * 4;
/// Words in a line of the caches.
const LINE_WORDS: usize = 16;
/// Fewer steps than this, words of one input times words of one output, are not worth another
/// thread: some ten microseconds.
const WORDS_PER_SHARE_MIN: usize = 1 << 19;

/// How one step of a product multiplies words and adds them to a sum.
pub(super) trait Dot<I: Isa> {
    /// A register of sums.
    type Sum: Copy;
    /// Whether sums are whole numbers that need their row's and their output's scale.
    const SCALED: bool;
    unsafe fn zero() -> Self::Sum;
    unsafe fn load(from: *const u32) -> Self::Sum;
    unsafe fn step(sum: Self::Sum, input: I::W, weight: I::W) -> Self::Sum;
    unsafe fn floats(sum: Self::Sum) -> I::F;
}

pub(super) struct F32;
pub(super) struct Bf16;
pub(super) struct Int8;

// SAFETY (this and the next two): the caller has the set, and a register of words at `from`.
impl<I: Isa> Dot<I> for F32 {
    type Sum = I::F;
    const SCALED: bool = false;
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

impl<I: Isa> Dot<I> for Bf16 {
    type Sum = I::F;
    const SCALED: bool = false;
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

impl<I: Isa> Dot<I> for Int8 {
    type Sum = I::W;
    const SCALED: bool = true;
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

/// Words in memory, one row after the other.
#[derive(Clone, Copy)]
pub(super) struct Words {
    pub(super) start: *const u32,
    pub(super) stride: usize,
}

/// `rows` rows of words times `V` registers of columns: `steps` words of each.
///
/// # Safety
/// The processor has the set; `input` has `R` rows of `steps` words, and `weights` has `steps`
/// rows of `V` registers.
#[inline(always)]
pub(super) unsafe fn tile<I: Isa, D: Dot<I>, const V: usize, const R: usize>(
    input: Words,
    weights: Words,
    steps: usize,
    starts: [D::Sum; V],
) -> [[D::Sum; V]; R] {
    let mut sums = [starts; R];
    for step in 0..steps {
        // SAFETY: `step` is less than `steps`, and the caller has that many words.
        unsafe {
            let row = weights.start.add(step * weights.stride);
            let mut weight = [I::zero_words(); V];
            for (place, weight) in weight.iter_mut().enumerate() {
                *weight = I::load_words(row.add(place * I::LANES));
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

/// Where a product's results go.
#[derive(Clone, Copy)]
struct Output {
    start: *mut u32,
    /// Numbers in a row, and from one row to the next.
    width: usize,
    /// Words from one row to the next.
    stride: usize,
    format: Format,
}

/// One product, or a thread's share of one.
struct Job<'a> {
    weights: &'a Packed,
    panels: Range<usize>,
    input: Words,
    rows: usize,
    /// For 8-bit integers, of each input row: its scale, and what stands for zero.
    row_scales: *const f32,
    output: Output,
    activation: Activation,
}

/// `input · weightsᵀ + bias` and an activation, `[rows, outputs]` in the wanted format. Panels are
/// shared with other threads where there is work for them.
pub fn multiply(
    weights: &Packed,
    input: &Matrix,
    activation: Activation,
    format: Format,
) -> Matrix {
    assert_eq!(input.width(), weights.inputs, "the product's inner widths");
    let prepared = Prepared::new(input, weights);
    let mut output = Matrix::take(input.rows(), weights.outputs, format);
    let target = Output {
        start: output.pointer_mut(),
        width: weights.outputs,
        stride: output.words_per_row(),
        format,
    };
    let (source, row_scales) = (prepared.words, prepared.row_scales());
    let whole = Shared(Job {
        weights,
        panels: 0..weights.panels(),
        input: source,
        rows: input.rows(),
        row_scales,
        output: target,
        activation,
    });
    let products = input.rows() * weights.outputs * weights.inputs;
    let shares = team::shares(products / weights.precision.per_word(), WORDS_PER_SHARE_MIN);
    let shares = shares.min(weights.panels());
    team::run(shares, &|share| {
        let whole = whole.get();
        let bound = |share| weights.panels() * share / shares;
        let job = Job {
            panels: bound(share)..bound(share + 1),
            ..*whole
        };
        // SAFETY: packing has asked the processor for the set. The input has `rows` rows of the
        // weights' words, as `Prepared` made them, and the output `rows` rows of its width; each
        // share writes columns that no other does.
        unsafe {
            #[cfg(target_arch = "x86_64")]
            if weights.precision.in_tiles(weights.instructions) {
                return amx::run_job(&job);
            }
            run_job(weights.instructions, &job);
        }
    });
    output
}

/// A job that several threads take their shares of.
struct Shared<'a>(Job<'a>);

impl<'a> Shared<'a> {
    fn get(&self) -> &Job<'a> {
        &self.0
    }
}

// SAFETY: its pointers are read, or written to in columns that belong to one thread alone.
unsafe impl Sync for Shared<'_> {}

/// The rows of a product in the format of its weights.
struct Prepared {
    words: Words,
    /// What holds the words, where the matrix itself does not.
    _words: Option<Buffer>,
    scales: Option<Buffer>,
}

impl Prepared {
    fn new(input: &Matrix, weights: &Packed) -> Self {
        let same = match weights.precision {
            Precision::F32 => input.format() == Format::F32,
            Precision::Bf16 => input.format() == Format::Bf16,
            Precision::Int8 => false,
        };
        // Where products go in tiles, rows may have to be filled up.
        if same && input.words_per_row() == weights.words {
            let words = Words {
                start: input.pointer(),
                stride: input.words_per_row(),
            };
            return Self {
                words,
                _words: None,
                scales: None,
            };
        }
        let mut owned = Buffer::take(input.rows() * weights.words);
        let mut scales = Buffer::take(2 * input.rows());
        convert(
            input,
            weights,
            owned.pointer_mut(),
            scales.pointer_mut().cast(),
        );
        let words = Words {
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
    /// Runs a product.
    fn run_job(job: &Job<'_>) = product
}

/// # Safety
/// The processor has the set; the job's pointers have the rows that it says.
#[inline(always)]
unsafe fn product<I: Isa, const V: usize, const R: usize>(job: &Job<'_>) {
    // SAFETY: passed on.
    unsafe {
        match job.weights.precision {
            Precision::F32 => panels::<I, F32, V, R>(job),
            Precision::Bf16 => panels::<I, Bf16, V, R>(job),
            Precision::Int8 => panels::<I, Int8, V, R>(job),
        }
    }
}

#[inline(always)]
unsafe fn panels<I: Isa, D: Dot<I>, const V: usize, const R: usize>(job: &Job<'_>) {
    let panel_words = V * I::LANES * job.weights.words;
    // Lines of the next panel that each tile brings nearer, so that its first tile need not wait
    // for memory.
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
                    1 => part::<I, D, V, 1>(job, panel, row),
                    2 => part::<I, D, V, 2>(job, panel, row),
                    3 => part::<I, D, V, 3>(job, panel, row),
                    4 => part::<I, D, V, 4>(job, panel, row),
                    5 => part::<I, D, V, 5>(job, panel, row),
                    _ => part::<I, D, V, 6>(job, panel, row),
                }
            }
            row += rows;
        }
    }
}

/// One tile: its sums, then what comes after them.
#[inline(always)]
unsafe fn part<I: Isa, D: Dot<I>, const V: usize, const R: usize>(
    job: &Job<'_>,
    panel: usize,
    row: usize,
) {
    let width = V * I::LANES;
    let first = panel * width;
    let weights = job.weights;
    // SAFETY: packing made whole panels of values and starts; the rows `row` to `row + R` of the
    // input are there.
    unsafe {
        let mut starts = [D::zero(); V];
        for (place, start) in starts.iter_mut().enumerate() {
            *start = D::load(weights.starts().add(first + place * I::LANES));
        }
        let input = Words {
            start: job.input.start.add(row * job.input.stride),
            ..job.input
        };
        let values = Words {
            start: weights.values().add(first * weights.words),
            stride: width,
        };
        let sums = tile::<I, D, V, R>(input, values, weights.words, starts);
        let mut results = [I::splat(0.0); TILE];
        for (results, sums) in results.chunks_exact_mut(V).zip(&sums) {
            for (result, sum) in results.iter_mut().zip(sums) {
                *result = D::floats(*sum);
            }
        }
        finish::<I, D, V>(job, (row, first), &mut results[..R * V]);
    }
}

/// What comes after the sums of some rows of `V` registers, from a row and a column on: scales,
/// the activation and the store.
///
/// # Safety
/// The processor has the set; the rows are there, and the column is one of the weights' panels.
#[inline(always)]
unsafe fn finish<I: Isa, D: Dot<I>, const V: usize>(
    job: &Job<'_>,
    (row, first): (usize, usize),
    results: &mut [I::F],
) {
    let weights = job.weights;
    // SAFETY: packing made whole panels of scales, totals and biases; `store` writes no further than the
    // output's width.
    unsafe {
        if D::SCALED {
            for (number, results) in results.chunks_exact_mut(V).enumerate() {
                for (place, result) in results.iter_mut().enumerate() {
                    let column = first + place * I::LANES;
                    let scale = I::splat(*job.row_scales.add(2 * (row + number)));
                    let zero = I::splat(-*job.row_scales.add(2 * (row + number) + 1));
                    // What stands for zero in the inputs has been added with each weight.
                    *result = I::fma(zero, I::load(weights.totals().add(column)), *result);
                    let scale = I::mul(scale, I::load(weights.scales().add(column)));
                    *result = I::fma(*result, scale, I::load(weights.biases().add(column)));
                }
            }
        }
        // Not closures: they would not be translated for the set.
        macro_rules! apply {
            ($function:ident) => {
                for result in results.iter_mut() {
                    *result = functions::$function::<I>(*result);
                }
            };
        }
        match job.activation {
            Activation::Identity => {}
            Activation::Gelu if job.output.format == Format::Bf16 => apply!(gelu_rounded),
            Activation::Gelu => apply!(gelu),
            Activation::GeluTanh => apply!(gelu_tanh),
            Activation::Relu => apply!(relu),
            Activation::Silu => apply!(silu),
            Activation::Tanh => apply!(tanh),
        }
        store::<I, V>(&job.output, (row, first), results);
    }
}

/// Stores rows of `V` registers, as far as the output is wide.
#[inline(always)]
unsafe fn store<I: Isa, const V: usize>(
    output: &Output,
    (row, column): (usize, usize),
    results: &[I::F],
) {
    for (number, results) in results.chunks_exact(V).enumerate() {
        // SAFETY: the rows are there, and no column at or beyond the output's width is written.
        unsafe {
            let start = output.start.add((row + number) * output.stride);
            for (place, result) in results.iter().enumerate() {
                let column = column + place * I::LANES;
                let count = output.width.saturating_sub(column).min(I::LANES);
                match output.format {
                    Format::F32 if count == I::LANES => {
                        I::store(start.cast::<f32>().add(column), *result);
                    }
                    Format::Bf16 if count == I::LANES => {
                        I::store_bf16(start.cast::<u16>().add(column), *result);
                    }
                    _ if count == 0 => {}
                    Format::F32 => {
                        I::store_first(start.cast::<f32>().add(column), count, *result);
                    }
                    Format::Bf16 => {
                        I::store_bf16_first(start.cast::<u16>().add(column), count, *result);
                    }
                }
            }
        }
    }
}
