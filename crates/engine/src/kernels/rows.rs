//! Row-wise and elementwise operations between matrix multiplications: embedding lookup, layer
//! normalization, sums, gates, rotary embeddings, pooling.

use super::InstructionSet;
use super::convert::MatrixRow;
use super::kernel;
use super::matrix::{Matrix, MatrixDtype};
use super::simd::Simd;

/// The parameters of a layer normalization: `[width]` each.
#[derive(Clone, Copy)]
pub struct LayerNormParameters<'a> {
    /// The scale (gamma).
    pub weight: &'a [f32],
    /// The bias (beta); empty for a norm without one.
    pub bias: &'a [f32],
    /// The number that is added to the variance.
    pub epsilon: f32,
}

/// Layer normalization of `input`, or of `input + added`, as a new matrix of floats.
pub fn layer_norm(
    instructions: InstructionSet,
    parameters: LayerNormParameters<'_>,
    input: &Matrix,
    added: Option<&Matrix>,
) -> Matrix {
    let width = input.width();
    let same_shape = |other: &Matrix| other.rows() == input.rows() && other.width() == width;
    assert!(
        added.is_none_or(same_shape),
        "the shapes of a residual connection"
    );
    assert_eq!(parameters.weight.len(), width, "the norm's width");
    let bias = parameters.bias.len();
    assert!(bias == 0 || bias == width, "the norm's bias");
    let mut output = Matrix::from_arena(input.rows(), width, MatrixDtype::F32);
    let job = NormJob {
        input,
        added,
        parameters,
        output: output.pointer_mut().cast(),
    };
    assert!(
        instructions.supported(),
        "{instructions} is not supported by this CPU"
    );
    // SAFETY: the CPU supports the set and the shapes match; the output has the input's shape.
    unsafe {
        run_norm(instructions, &job);
    }
    output
}

struct NormJob<'a> {
    input: &'a Matrix,
    added: Option<&'a Matrix>,
    parameters: LayerNormParameters<'a>,
    output: *mut f32,
}

kernel! {
    /// Runs a normalization.
    fn run_norm(job: &NormJob<'_>) = norm_rows
}

/// # Safety
/// The CPU supports the set, and the job's matrices have one shape.
#[inline(always)]
unsafe fn norm_rows<I: Simd, const V: usize, const R: usize>(job: &NormJob<'_>) {
    let width = job.input.width();
    for row in 0..job.input.rows() {
        // SAFETY: the row is there in each matrix.
        unsafe {
            let output = job.output.add(row * width);
            let input = MatrixRow::<I>::new(job.input, row);
            let mut sum = I::splat(0.0);
            for at in (0..width).step_by(I::LANES) {
                let count = (width - at).min(I::LANES);
                let mut values = input.load(at, count);
                if let Some(added) = job.added {
                    values = I::add(values, MatrixRow::<I>::new(added, row).load(at, count));
                }
                sum = I::add(sum, values);
                I::store_first(output.add(at), count, values);
            }
            norm_row::<I>(output, width, I::sum(sum), job.parameters);
        }
    }
}

/// Normalizes a row in place, given its sum.
#[inline(always)]
unsafe fn norm_row<I: Simd>(
    row: *mut f32,
    width: usize,
    sum: f32,
    parameters: LayerNormParameters<'_>,
) {
    // SAFETY: the CPU supports the set, and the row and each parameter have `width` elements, by
    // the caller's guarantee.
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

/// An embedding table, and the index of each token's entry in it.
pub(crate) struct EmbeddingLookup<'a> {
    /// `[entries, width]`.
    pub(crate) table: &'a [f32],
    /// `[tokens]`, each below the number of entries.
    pub(crate) indices: &'a [u32],
}

/// The sum of each token's entries in the tables, `[tokens, width]`.
pub(crate) fn embed(lookups: &[EmbeddingLookup<'_>], tokens: usize, width: usize) -> Matrix {
    let mut output = Matrix::from_arena(tokens, width, MatrixDtype::F32);
    let rows = output.floats_mut().chunks_exact_mut(width.max(1));
    for (token, row) in rows.enumerate() {
        let entries = lookups.iter().map(|lookup| {
            let start = lookup.indices[token] as usize * width;
            &lookup.table[start..start + width]
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

/// `a + b`, both matrices of floats.
pub(crate) fn add(mut a: Matrix, b: &Matrix) -> Matrix {
    assert_eq!((a.rows(), a.width()), (b.rows(), b.width()), "a sum");
    for (a, b) in a.floats_mut().iter_mut().zip(b.floats()) {
        *a += b;
    }
    a
}

/// The elementwise product of `a` and `b`, both matrices of floats.
pub(crate) fn multiply_elementwise(mut a: Matrix, b: &Matrix) -> Matrix {
    assert_eq!((a.rows(), a.width()), (b.rows(), b.width()), "a product");
    for (a, b) in a.floats_mut().iter_mut().zip(b.floats()) {
        *a *= b;
    }
    a
}

/// Cosines and sines of the angles of each position, `[positions, half]` each.
pub(crate) struct RotaryAngles<'a> {
    pub(crate) cosines: &'a [f32],
    pub(crate) sines: &'a [f32],
    pub(crate) half: usize,
}

/// Rotary embedding of queries and keys in `[tokens, 3 · heads · 2 · half]` by their positions;
/// element i of a head is paired with element i of its second half (RoFormer, Su and others 2021).
pub(crate) fn rotate(mut qkv: Matrix, angles: &RotaryAngles<'_>, positions: &[u32]) -> Matrix {
    let (half, width) = (angles.half, qkv.width());
    let tokens = qkv.floats_mut().chunks_exact_mut(width.max(1));
    for (token, position) in tokens.zip(positions) {
        let start = *position as usize * half;
        let cosines = &angles.cosines[start..start + half];
        let sines = &angles.sines[start..start + half];
        let (queries_and_keys, _values) = token.split_at_mut(width / 3 * 2);
        for head in queries_and_keys.chunks_exact_mut(2 * half) {
            let (first, second) = head.split_at_mut(half);
            let pairs = first.iter_mut().zip(second);
            for ((first, second), (cosine, sine)) in pairs.zip(cosines.iter().zip(sines)) {
                let (a, b) = (*first, *second);
                *first = a * cosine - b * sine;
                *second = b * cosine + a * sine;
            }
        }
    }
    qkv
}

/// How the hidden states of a row become one vector (Sentence-BERT, Reimers and Gurevych 2019).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pooling {
    /// The mean over all tokens, special tokens included.
    Mean,
    /// The first token's, which is the classification token.
    Cls,
    /// The last token's.
    Last,
    /// The maximum of each dimension.
    Max,
}

/// One vector for each span of tokens, given by its first token and length: `[spans, width]`.
pub(crate) fn pool(pooling: Pooling, input: &Matrix, spans: &[(usize, usize)]) -> Matrix {
    let width = input.width();
    let mut output = Matrix::from_arena(spans.len(), width, MatrixDtype::F32);
    let values = input.floats();
    let rows = output.floats_mut().chunks_exact_mut(width.max(1));
    for (pooled, (start, count)) in rows.zip(spans) {
        let (first, end) = match pooling {
            Pooling::Cls => (*start, start + 1),
            Pooling::Last => (start + count - 1, start + count),
            Pooling::Mean | Pooling::Max => (*start, start + count),
        };
        pooled.copy_from_slice(&values[first * width..(first + 1) * width]);
        for row in values[(first + 1) * width..end * width].chunks_exact(width) {
            for (sum, value) in pooled.iter_mut().zip(row) {
                *sum = match pooling {
                    Pooling::Max => sum.max(*value),
                    _ => *sum + value,
                };
            }
        }
        if pooling == Pooling::Mean {
            let share = 1.0 / (end - first) as f32;
            pooled.iter_mut().for_each(|value| *value *= share);
        }
    }
    output
}
