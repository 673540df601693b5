//! What happens to each row between products: embedding, norms, sums, gates, rotations, pooling.

use super::Instructions;
use super::convert::Row;
use super::instructions::Isa;
use super::kernel;
use super::matrix::{Format, Matrix};

/// The parameters of a layer normalization: `[width]` each.
#[derive(Clone, Copy)]
pub struct NormParameters<'a> {
    /// What a normalized number is multiplied by.
    pub weight: &'a [f32],
    /// What is added then; empty: nothing.
    pub bias: &'a [f32],
    /// What is added to the variance.
    pub epsilon: f32,
}

/// Layer normalization of `input`, or of `input + added`, as a new matrix of floats.
pub fn norm(
    instructions: Instructions,
    parameters: NormParameters<'_>,
    input: &Matrix,
    added: Option<&Matrix>,
) -> Matrix {
    let width = input.width();
    let same_shape = |other: &Matrix| other.rows() == input.rows() && other.width() == width;
    assert!(added.is_none_or(same_shape), "the shapes of a sum");
    assert_eq!(parameters.weight.len(), width, "the norm's width");
    let bias = parameters.bias.len();
    assert!(bias == 0 || bias == width, "the norm's bias");
    let mut output = Matrix::take(input.rows(), width, Format::F32);
    let job = NormJob {
        input,
        added,
        parameters,
        output: output.pointer_mut().cast(),
    };
    assert!(instructions.supported(), "{instructions} is not here");
    // SAFETY: the set is there and the shapes were compared; the output has the input's shape.
    unsafe {
        run_norm(instructions, &job);
    }
    output
}

struct NormJob<'a> {
    input: &'a Matrix,
    added: Option<&'a Matrix>,
    parameters: NormParameters<'a>,
    output: *mut f32,
}

kernel! {
    /// Runs a normalization.
    fn run_norm(job: &NormJob<'_>) = norm_rows
}

/// # Safety
/// The processor has the set, and the job's matrices one shape.
#[inline(always)]
unsafe fn norm_rows<I: Isa, const V: usize, const R: usize>(job: &NormJob<'_>) {
    let width = job.input.width();
    for row in 0..job.input.rows() {
        // SAFETY: the row is there in each matrix.
        unsafe {
            let output = job.output.add(row * width);
            let input = Row::<I>::new(job.input, row);
            let mut sum = I::splat(0.0);
            for at in (0..width).step_by(I::LANES) {
                let count = (width - at).min(I::LANES);
                let mut values = input.load(at, count);
                if let Some(added) = job.added {
                    values = I::add(values, Row::<I>::new(added, row).load(at, count));
                }
                sum = I::add(sum, values);
                I::store_first(output.add(at), count, values);
            }
            norm_row::<I>(output, width, I::sum(sum), job.parameters);
        }
    }
}

/// Normalizes a row in place, whose sum is known.
#[inline(always)]
unsafe fn norm_row<I: Isa>(row: *mut f32, width: usize, sum: f32, parameters: NormParameters<'_>) {
    // SAFETY: the caller has the set and `width` numbers in the row and in each parameter.
    unsafe {
        let mean = I::splat(sum / width as f32);
        let mut squares = I::splat(0.0);
        let whole = width / I::LANES * I::LANES;
        for at in (0..whole).step_by(I::LANES) {
            let values = I::sub(I::load(row.add(at)), mean);
            squares = I::fma(values, values, squares);
        }
        let mut squares = I::sum(squares);
        for at in whole..width {
            let value = *row.add(at) - sum / width as f32;
            squares += value * value;
        }
        let scale = 1.0 / (squares / width as f32 + parameters.epsilon).sqrt();
        let scale = I::splat(scale);
        for at in (0..width).step_by(I::LANES) {
            let count = (width - at).min(I::LANES);
            let values = I::mul(I::sub(I::load_first(row.add(at), count), mean), scale);
            let weight = I::load_first(parameters.weight.as_ptr().add(at), count);
            let bias = if parameters.bias.is_empty() {
                I::splat(0.0)
            } else {
                I::load_first(parameters.bias.as_ptr().add(at), count)
            };
            I::store_first(row.add(at), count, I::fma(values, weight, bias));
        }
    }
}

/// A table of vectors and, for each token, which of them it takes.
pub(crate) struct Lookup<'a> {
    /// `[entries, width]`.
    pub(crate) table: &'a [f32],
    /// `[tokens]`, each below the entries.
    pub(crate) indices: &'a [u32],
}

/// The sum of what each token takes from each table, `[tokens, width]`.
pub(crate) fn embed(lookups: &[Lookup<'_>], tokens: usize, width: usize) -> Matrix {
    let mut output = Matrix::take(tokens, width, Format::F32);
    let rows = output.floats_mut().chunks_exact_mut(width.max(1));
    for (token, row) in rows.enumerate() {
        let entries = lookups.iter().map(|lookup| {
            let place = lookup.indices[token] as usize * width;
            &lookup.table[place..place + width]
        });
        for (number, entry) in entries.enumerate() {
            if number == 0 {
                row.copy_from_slice(entry);
            } else {
                for (sum, value) in row.iter_mut().zip(entry) {
                    *sum += value;
                }
            }
        }
    }
    output
}

/// `a + b`, both of floats.
pub(crate) fn add(mut a: Matrix, b: &Matrix) -> Matrix {
    assert_eq!((a.rows(), a.width()), (b.rows(), b.width()), "a sum");
    for (a, b) in a.floats_mut().iter_mut().zip(b.floats()) {
        *a += b;
    }
    a
}

/// `a · b`, number by number, both of floats.
pub(crate) fn multiply_each(mut a: Matrix, b: &Matrix) -> Matrix {
    assert_eq!((a.rows(), a.width()), (b.rows(), b.width()), "a product");
    for (a, b) in a.floats_mut().iter_mut().zip(b.floats()) {
        *a *= b;
    }
    a
}

/// Cosines and sines of each position's angles, `[positions, half]` each.
pub(crate) struct Angles<'a> {
    pub(crate) cosines: &'a [f32],
    pub(crate) sines: &'a [f32],
    pub(crate) half: usize,
}

/// Rotates queries and keys in `[tokens, 3 · heads · 2 · half]` by their positions, halves
/// paired (RoFormer, Su and others 2021).
pub(crate) fn rotate(mut joined: Matrix, angles: &Angles<'_>, positions: &[u32]) -> Matrix {
    let (half, width) = (angles.half, joined.width());
    let tokens = joined.floats_mut().chunks_exact_mut(width.max(1));
    for (token, position) in tokens.zip(positions) {
        let place = *position as usize * half;
        let cosines = &angles.cosines[place..place + half];
        let sines = &angles.sines[place..place + half];
        let (turned, _values) = token.split_at_mut(width / 3 * 2);
        for head in turned.chunks_exact_mut(2 * half) {
            let (first, second) = head.split_at_mut(half);
            let pairs = first.iter_mut().zip(second);
            for ((first, second), (cosine, sine)) in pairs.zip(cosines.iter().zip(sines)) {
                let (a, b) = (*first, *second);
                *first = a * cosine - b * sine;
                *second = b * cosine + a * sine;
            }
        }
    }
    joined
}

/// How rows become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pool {
    /// The mean of all.
    Mean,
    /// The first.
    First,
    /// The last.
    Last,
    /// The largest of each column.
    Max,
}

/// One row out of each span of rows, given by first row and count.
pub(crate) fn pool(how: Pool, input: &Matrix, spans: &[(usize, usize)]) -> Matrix {
    let width = input.width();
    let mut output = Matrix::take(spans.len(), width, Format::F32);
    let values = input.floats();
    let rows = output.floats_mut().chunks_exact_mut(width.max(1));
    for (pooled, (start, count)) in rows.zip(spans) {
        let (first, end) = match how {
            Pool::First => (*start, start + 1),
            Pool::Last => (start + count - 1, start + count),
            Pool::Mean | Pool::Max => (*start, start + count),
        };
        pooled.copy_from_slice(&values[first * width..(first + 1) * width]);
        for row in values[(first + 1) * width..end * width].chunks_exact(width) {
            for (sum, value) in pooled.iter_mut().zip(row) {
                *sum = match how {
                    Pool::Max => sum.max(*value),
                    _ => *sum + value,
                };
            }
        }
        if how == Pool::Mean {
            let share = 1.0 / (end - first) as f32;
            pooled.iter_mut().for_each(|value| *value *= share);
        }
    }
    output
}
