//! Attention over packed rows: a token sees the tokens of its own row and no other.
//!
//! Scaled dot-product attention (Vaswani and others 2017), with a sliding window where a layer
//! has one (Beltagy and others 2020). For each row and head the keys are transposed and the values
//! laid out as a panel; then a few queries at a time get their scores, the softmax of the scores,
//! and the weighted sum of the values, all of which stays in the first-level cache.

mod workspace;

use super::InstructionSet;
use super::gemm::{Bf16, DotProduct, F32, GEMM_TILE_ROWS};
use super::kernel;
use super::matrix::{Matrix, MatrixDtype};
use super::simd::Simd;
use super::thread_pool;
use workspace::{FloatRows, HeadWorkspace};

/// Multiplications that make the use of another thread worthwhile.
const MULTIPLICATIONS_PER_SHARE_MIN: usize = 1 << 19;

/// Queries, keys and values of a batch, and the parameters of attention.
pub struct AttentionInput<'a> {
    /// Queries, keys and values side by side, `[tokens, 3 · heads · head width]`, of floats.
    pub qkv: &'a Matrix,
    /// Heads, side by side in each of the three.
    pub heads: usize,
    /// First token and length of each row.
    pub spans: &'a [(usize, usize)],
    /// Tokens to each side that a token sees; none where it sees its whole row.
    pub window: Option<usize>,
    /// The dtype of its multiplications and of its output.
    pub dtype: MatrixDtype,
}

/// Attends within each row: `[tokens, heads · head width]`, in the attention's dtype.
///
/// # Panics
/// When the width is not three times a multiple of the heads, a span is outside of the tokens, or
/// the CPU does not support the instruction set.
pub fn attend(instructions: InstructionSet, attention: &AttentionInput<'_>) -> Matrix {
    let qkv = attention.qkv;
    let heads = attention.heads;
    let width = qkv.width() / 3;
    assert!(
        heads > 0 && qkv.width() == 3 * width && width.is_multiple_of(heads),
        "the width is three times a multiple of the heads"
    );
    assert!(
        qkv.dtype() == MatrixDtype::F32,
        "queries, keys and values are floats"
    );
    let inside = |(start, length): &(usize, usize)| start + length <= qkv.rows();
    assert!(
        attention.spans.iter().all(inside),
        "the spans are within the tokens"
    );
    assert!(
        instructions.supported(),
        "{instructions} is not supported by this CPU"
    );
    let mut output = Matrix::from_arena(qkv.rows(), width, attention.dtype);
    let shared = SharedOutput {
        start: output.pointer_mut(),
        stride: output.words_per_row(),
    };
    let squares = attention.spans.iter().map(|(_, length)| length * length);
    let work = squares.sum::<usize>() * width;
    let run = |span: (usize, usize), heads: std::ops::Range<usize>| {
        let job = AttentionJob {
            attention,
            span,
            heads,
            output: &shared,
        };
        // SAFETY: the CPU supports the set, the span and the heads are inside of `qkv`, and the
        // output has as many rows, with as many elements for each head. No two jobs share a head
        // of a row.
        unsafe {
            run_attention(instructions, &job);
        }
    };
    if thread_pool::shares(work, MULTIPLICATIONS_PER_SHARE_MIN) == 1 {
        for span in attention.spans {
            run(*span, 0..heads);
        }
    } else {
        thread_pool::parallel_for(attention.spans.len() * heads, &|task| {
            let head = task % heads;
            run(attention.spans[task / heads], head..head + 1);
        });
    }
    output
}

/// The output matrix, which several threads write.
struct SharedOutput {
    start: *mut u32,
    stride: usize,
}

// SAFETY: each thread writes the columns of its own heads.
unsafe impl Sync for SharedOutput {}

/// Some heads of one row.
struct AttentionJob<'a> {
    attention: &'a AttentionInput<'a>,
    span: (usize, usize),
    heads: std::ops::Range<usize>,
    output: &'a SharedOutput,
}

kernel! {
    /// Runs attention.
    fn run_attention(job: &AttentionJob<'_>) = heads
}

/// # Safety
/// The CPU supports the set; the job's row and heads are inside of its matrices.
#[inline(always)]
unsafe fn heads<I: Simd, const V: usize, const R: usize>(job: &AttentionJob<'_>) {
    // SAFETY: passed on to the caller.
    unsafe {
        match job.attention.dtype {
            MatrixDtype::F32 => each_head::<I, F32, V>(job, 1),
            MatrixDtype::Bf16 => each_head::<I, Bf16, V>(job, 2),
        }
    }
}

#[inline(always)]
unsafe fn each_head<I: Simd, D: DotProduct<I, Sum = I::F>, const V: usize>(
    job: &AttentionJob<'_>,
    elements_per_word: usize,
) {
    let (start, length) = job.span;
    let qkv = job.attention.qkv;
    let hidden = qkv.width() / 3;
    let width = hidden / job.attention.heads;
    let mut workspace = HeadWorkspace::new::<I, V>(length, width, elements_per_word);
    for head in job.heads.clone() {
        // SAFETY: the row's tokens and the head's columns are inside of `qkv`.
        unsafe {
            let first = qkv
                .pointer()
                .cast::<f32>()
                .add(start * 3 * hidden + head * width);
            let part = |index: usize| FloatRows {
                start: first.add(index * hidden),
                stride: 3 * hidden,
            };
            workspace.lay_out_keys::<I>(part(1));
            workspace.lay_out_values::<I>(part(2));
            let mut query = 0;
            while query < length {
                let queries = (length - query).min(GEMM_TILE_ROWS);
                workspace.lay_out_queries::<I>(part(0), query, queries);
                workspace.attend::<I, D, V>(query, queries, job.attention.window);
                let row = job.output.start.add((start + query) * job.output.stride);
                let sums = &workspace.sums;
                for (number, sum) in sums.iter().enumerate().take(queries) {
                    let row = row.add(number * job.output.stride);
                    let from = workspace.outputs.pointer().cast::<f32>();
                    let from = from.add(number * workspace.value_columns);
                    let to = HeadOutput {
                        row,
                        column: head * width,
                        dtype: job.attention.dtype,
                    };
                    store_row::<I>(&to, from, width, 1.0 / sum);
                }
                query += queries;
            }
        }
    }
}

/// Where one head of one token is stored.
struct HeadOutput {
    row: *mut u32,
    column: usize,
    dtype: MatrixDtype,
}

/// Stores `width` elements, scaled.
#[inline(always)]
unsafe fn store_row<I: Simd>(to: &HeadOutput, from: *const f32, width: usize, scale: f32) {
    for at in (0..width).step_by(I::LANES) {
        let count = (width - at).min(I::LANES);
        let column = to.column + at;
        // SAFETY: both rows have `width` elements from their starts on.
        unsafe {
            let values = I::mul(I::load_first(from.add(at), count), I::splat(scale));
            match to.dtype {
                MatrixDtype::F32 => I::store_first(to.row.cast::<f32>().add(column), count, values),
                MatrixDtype::Bf16 => {
                    I::store_bf16_first(to.row.cast::<u16>().add(column), count, values);
                }
            }
        }
    }
}
