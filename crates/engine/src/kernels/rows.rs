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
    /// The sum over all tokens by the square root of their number.
    MeanSqrt,
    /// The mean over all tokens, each weighted by its position in the row from 1.
    WeightedMean,
    /// The first token's, which is the classification token.
    Cls,
    /// The last token's.
    Last,
    /// The maximum of each dimension.
    Max,
}

/// The tokens of a row that are pooled.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PooledSpan {
    /// The first of them.
    pub(crate) start: usize,
    /// How many there are, one at least.
    pub(crate) count: usize,
    /// How many tokens of the row are before the first one, for example of a prompt.
    pub(crate) skipped: usize,
}

/// One vector for each span of tokens: `[spans, poolings · width]`, with the poolings side by side.
pub(crate) fn pool(poolings: &[Pooling], input: &Matrix, spans: &[PooledSpan]) -> Matrix {
    let width = input.width();
    let whole = width * poolings.len();
    let mut output = Matrix::from_arena(spans.len(), whole, MatrixDtype::F32);
    let values = input.floats();
    let rows = output.floats_mut().chunks_exact_mut(whole.max(1));
    for (pooled, span) in rows.zip(spans) {
        let parts = pooled.chunks_exact_mut(width.max(1));
        for (part, pooling) in parts.zip(poolings) {
            pool_one(*pooling, part, values, *span);
        }
    }
    output
}

/// Pools the tokens of one span of `values` into one vector.
fn pool_one(pooling: Pooling, pooled: &mut [f32], values: &[f32], span: PooledSpan) {
    let width = pooled.len();
    let (start, count) = (span.start, span.count);
    let (first, end) = match pooling {
        Pooling::Cls => (start, start + 1),
        Pooling::Last => (start + count - 1, start + count),
        _ => (start, start + count),
    };
    // Positions count from the beginning of the row, so that leaving out a prompt changes no
    // token's weight.
    let weight = |index: usize| match pooling {
        Pooling::WeightedMean => (span.skipped + index + 1) as f32,
        _ => 1.0,
    };
    pooled.copy_from_slice(&values[first * width..(first + 1) * width]);
    if pooling == Pooling::WeightedMean {
        pooled.iter_mut().for_each(|value| *value *= weight(0));
    }
    let others = values[(first + 1) * width..end * width].chunks_exact(width);
    for (index, row) in others.enumerate() {
        for (sum, value) in pooled.iter_mut().zip(row) {
            *sum = match pooling {
                Pooling::Max => sum.max(*value),
                Pooling::WeightedMean => *sum + value * weight(index + 1),
                _ => *sum + value,
            };
        }
    }
    let share = match pooling {
        Pooling::Mean => 1.0 / count as f32,
        Pooling::MeanSqrt => 1.0 / (count as f32).sqrt(),
        Pooling::WeightedMean => 1.0 / (0..count).map(weight).sum::<f32>(),
        Pooling::Cls | Pooling::Last | Pooling::Max => return,
    };
    pooled.iter_mut().for_each(|value| *value *= share);
}

/// Scales each row to Euclidean length 1.
pub(crate) fn normalize_rows(input: &mut Matrix) {
    let width = input.width().max(1);
    for row in input.floats_mut().chunks_exact_mut(width) {
        crate::post::normalize(row);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pooled(pooling: Pooling, skipped: usize) -> Vec<f32> {
        // Another row is before and behind the one of three tokens.
        let values = [9.0, 9.0, 1.0, 8.0, 2.0, 5.0, 6.0, 2.0, 9.0, 9.0];
        let span = PooledSpan {
            start: 1 + skipped,
            count: 3 - skipped,
            skipped,
        };
        let input = Matrix::from_floats(&values, 2);
        pool(&[pooling], &input, &[span]).floats().to_vec()
    }

    #[test]
    fn each_pooling_is_that_of_its_definition() {
        assert_eq!(pooled(Pooling::Cls, 0), [1.0, 8.0]);
        assert_eq!(pooled(Pooling::Last, 0), [6.0, 2.0]);
        assert_eq!(pooled(Pooling::Max, 0), [6.0, 8.0]);
        let near = |pooling, skipped, expected: [f32; 2]| {
            for (value, expected) in pooled(pooling, skipped).iter().zip(expected) {
                assert!((value - expected).abs() < 1e-5, "{pooling:?}: {value}");
            }
        };
        near(Pooling::Mean, 0, [3.0, 5.0]);
        near(
            Pooling::MeanSqrt,
            0,
            [9.0 / 3f32.sqrt(), 15.0 / 3f32.sqrt()],
        );
        near(Pooling::WeightedMean, 0, [23.0 / 6.0, 24.0 / 6.0]);
        // The first token is a prompt's: it is in no pooling, and the others keep their weights.
        near(Pooling::Mean, 1, [4.0, 3.5]);
        near(Pooling::WeightedMean, 1, [22.0 / 5.0, 16.0 / 5.0]);
        assert_eq!(pooled(Pooling::Cls, 1), [2.0, 5.0]);
    }

    #[test]
    fn several_poolings_lie_side_by_side() {
        let input = Matrix::from_floats(&[1.0, 8.0, 2.0, 5.0], 2);
        let span = PooledSpan {
            start: 0,
            count: 2,
            skipped: 0,
        };
        let pooled = pool(&[Pooling::Cls, Pooling::Max], &input, &[span]);
        assert_eq!(pooled.floats(), [1.0, 8.0, 2.0, 8.0]);
    }
}
