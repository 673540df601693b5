//! Attention over packed rows: a token sees the tokens of its own row and no other.
//!
//! Scaled dot-product attention (Vaswani and others 2017), with a sliding window where a layer
//! has one (Beltagy and others 2020). For each row and head the keys are turned on their side and
//! the values laid out as a panel; then some queries at a time get their scores, the softmax of
//! them, and the sum of the values, all of which stays in the first-level cache.

mod plan;

use super::Instructions;
use super::instructions::Isa;
use super::kernel;
use super::matrix::{Format, Matrix};
use super::products::{Bf16, Dot, F32, TILE_ROWS};
use super::team;
use plan::{Floats, Plan};

/// Products of a query's and a key's number that make it worth asking another thread.
const PRODUCTS_PER_SHARE_MIN: usize = 1 << 19;

/// What attention is to do.
pub struct Attention<'a> {
    /// Queries, keys and values side by side, `[tokens, 3 · heads · head width]`, of floats.
    pub joined: &'a Matrix,
    /// Heads, side by side in each of the three.
    pub heads: usize,
    /// First token and length of each row.
    pub spans: &'a [(usize, usize)],
    /// Tokens to each side that a token sees; none where it sees its whole row.
    pub window: Option<usize>,
    /// The number format of its products.
    pub format: Format,
}

/// Attends within each row: `[tokens, heads · head width]`, in the attention's format.
pub fn attend(instructions: Instructions, attention: &Attention<'_>) -> Matrix {
    let joined = attention.joined;
    let heads = attention.heads;
    let width = joined.width() / 3;
    assert!(
        heads > 0 && joined.width() == 3 * width && width.is_multiple_of(heads),
        "heads"
    );
    assert!(
        joined.format() == Format::F32,
        "queries, keys and values are floats"
    );
    let inside = |(start, length): &(usize, usize)| start + length <= joined.rows();
    assert!(attention.spans.iter().all(inside), "a row's tokens");
    assert!(instructions.supported(), "{instructions} is not here");
    let mut output = Matrix::take(joined.rows(), width, attention.format);
    let shared = Shared {
        start: output.pointer_mut(),
        stride: output.words_per_row(),
    };
    let squares = attention.spans.iter().map(|(_, length)| length * length);
    let work = squares.sum::<usize>() * width;
    let run = |span: (usize, usize), heads: std::ops::Range<usize>| {
        let job = Job {
            attention,
            span,
            heads,
            output: &shared,
        };
        // SAFETY: the set is there, the span and the heads are inside of `joined`, and the output
        // has as many rows, of one number for each of a head's. No two jobs share a head and row.
        unsafe {
            run_job(instructions, &job);
        }
    };
    if team::shares(work, PRODUCTS_PER_SHARE_MIN) == 1 {
        for span in attention.spans {
            run(*span, 0..heads);
        }
    } else {
        team::run(attention.spans.len() * heads, &|task| {
            let head = task % heads;
            run(attention.spans[task / heads], head..head + 1);
        });
    }
    output
}

struct Shared {
    start: *mut u32,
    stride: usize,
}

// SAFETY: each thread writes the columns of its own heads.
unsafe impl Sync for Shared {}

/// Some heads of one row.
struct Job<'a> {
    attention: &'a Attention<'a>,
    span: (usize, usize),
    heads: std::ops::Range<usize>,
    output: &'a Shared,
}

kernel! {
    /// Runs a job.
    fn run_job(job: &Job<'_>) = heads
}

/// # Safety
/// The processor has the set; the job's row and heads are inside of its matrices.
#[inline(always)]
unsafe fn heads<I: Isa, const V: usize, const R: usize>(job: &Job<'_>) {
    // SAFETY: passed on.
    unsafe {
        match job.attention.format {
            Format::F32 => each_head::<I, F32, V>(job, 1),
            Format::Bf16 => each_head::<I, Bf16, V>(job, 2),
        }
    }
}

#[inline(always)]
unsafe fn each_head<I: Isa, D: Dot<I, Sum = I::F>, const V: usize>(job: &Job<'_>, per_word: usize) {
    let (start, length) = job.span;
    let joined = job.attention.joined;
    let hidden = joined.width() / 3;
    let width = hidden / job.attention.heads;
    let mut plan = Plan::new::<I, V>(length, width, per_word);
    for head in job.heads.clone() {
        // SAFETY: the row's tokens and the head's columns are inside of `joined`.
        unsafe {
            let first = joined
                .pointer()
                .cast::<f32>()
                .add(start * 3 * hidden + head * width);
            let part = |number: usize| Floats {
                start: first.add(number * hidden),
                stride: 3 * hidden,
            };
            plan.lay_out_keys::<I>(part(1));
            plan.lay_out_values::<I>(part(2));
            let mut query = 0;
            while query < length {
                let queries = (length - query).min(TILE_ROWS);
                plan.lay_out_queries::<I>(part(0), query, queries);
                plan.attend::<I, D, V>(query, queries, job.attention.window);
                let row = job.output.start.add((start + query) * job.output.stride);
                let scale = &plan.sums;
                for (number, sum) in scale.iter().enumerate().take(queries) {
                    let row = row.add(number * job.output.stride);
                    let from = plan.outputs.pointer().cast::<f32>();
                    let from = from.add(number * plan.value_columns);
                    let to = Target {
                        row,
                        column: head * width,
                        format: job.attention.format,
                    };
                    store_row::<I>(&to, from, width, 1.0 / sum);
                }
                query += queries;
            }
        }
    }
}

struct Target {
    row: *mut u32,
    column: usize,
    format: Format,
}

/// Stores `width` numbers, scaled.
#[inline(always)]
unsafe fn store_row<I: Isa>(to: &Target, from: *const f32, width: usize, scale: f32) {
    for at in (0..width).step_by(I::LANES) {
        let count = (width - at).min(I::LANES);
        let column = to.column + at;
        // SAFETY: both sides have `width` numbers from their starts on.
        unsafe {
            let values = I::mul(I::load_first(from.add(at), count), I::splat(scale));
            match to.format {
                Format::F32 => I::store_first(to.row.cast::<f32>().add(column), count, values),
                Format::Bf16 => {
                    I::store_bf16_first(to.row.cast::<u16>().add(column), count, values);
                }
            }
        }
    }
}
