//! The workspace of one head of one row: its keys, values and queries laid out for the
//! micro-kernel, its scores, weights and outputs.

use super::super::buffer::Buffer;
use super::super::functions;
use super::super::gemm::{DotProduct, GEMM_TILE_ROWS, WordRows, micro_kernel};
use super::super::simd::Simd;

/// Rows of floats in memory.
#[derive(Clone, Copy)]
pub(super) struct FloatRows {
    pub(super) start: *const f32,
    pub(super) stride: usize,
}

/// Copies a row of floats to words of one element (f32) or of two (bf16).
///
/// # Safety
/// The CPU supports the set; there are `width` elements, and as many words as they fill.
#[inline(always)]
unsafe fn narrow<I: Simd>(from: *const f32, width: usize, to: *mut u32, elements_per_word: usize) {
    // SAFETY: no element from `width` on is read or written, but for the last word's other half.
    unsafe {
        if elements_per_word == 2 && width % 2 == 1 {
            *to.add(width / 2) = 0;
        }
        for at in (0..width).step_by(I::LANES) {
            let count = (width - at).min(I::LANES);
            let elements = I::load_first(from.add(at), count);
            if elements_per_word == 1 {
                I::store_first(to.cast::<f32>().add(at), count, elements);
            } else {
                I::store_bf16_first(to.cast::<u16>().add(at), count, elements);
            }
        }
    }
}

/// The memory for one head of one row.
pub(super) struct HeadWorkspace {
    /// Tokens of the row, and width of a head.
    length: usize,
    width: usize,
    /// Elements in a word.
    elements_per_word: usize,
    /// Columns of a tile.
    panel: usize,
    /// Words of a query or key.
    query_words: usize,
    /// Columns of scores: the keys, padded to whole panels.
    key_columns: usize,
    /// Words of a query's weights.
    weight_words: usize,
    /// Columns of an output: the head's width, padded to whole registers.
    pub(super) value_columns: usize,
    /// `[panels, query words, panel]`.
    keys: Buffer,
    /// `[weight words, value columns]`.
    values: Buffer,
    /// `[queries, query words]`.
    queries: Buffer,
    /// Scratch for one key, or for two values.
    row: Buffer,
    /// FloatRows, `[queries, key columns]`.
    scores: Buffer,
    /// `[queries, weight words]`.
    weights: Buffer,
    /// FloatRows, `[queries, value columns]`.
    pub(super) outputs: Buffer,
    /// The sum of each query's weights.
    pub(super) sums: [f32; GEMM_TILE_ROWS],
}

impl HeadWorkspace {
    pub(super) fn new<I: Simd, const V: usize>(
        length: usize,
        width: usize,
        elements_per_word: usize,
    ) -> Self {
        let panel = V * I::LANES;
        let query_words = width.div_ceil(elements_per_word);
        let key_columns = length.next_multiple_of(panel);
        let weight_words = key_columns / elements_per_word;
        let value_columns = width.next_multiple_of(I::LANES);
        Self {
            length,
            width,
            elements_per_word,
            panel,
            query_words,
            key_columns,
            weight_words,
            value_columns,
            keys: Buffer::from_arena(query_words * key_columns),
            values: Buffer::from_arena(weight_words * value_columns),
            queries: Buffer::from_arena(query_words * GEMM_TILE_ROWS),
            row: Buffer::from_arena(value_columns),
            scores: Buffer::from_arena(key_columns * GEMM_TILE_ROWS),
            weights: Buffer::from_arena(weight_words * GEMM_TILE_ROWS),
            outputs: Buffer::from_arena(value_columns * GEMM_TILE_ROWS),
            sums: [1.0; GEMM_TILE_ROWS],
        }
    }

    /// Transposes the keys, a panel of keys at a time.
    ///
    /// # Safety
    /// The CPU supports the set, and `keys` are the row's tokens.
    #[inline(always)]
    pub(super) unsafe fn lay_out_keys<I: Simd>(&mut self, keys: FloatRows) {
        let to = self.keys.pointer_mut();
        let row = self.row.pointer_mut();
        for key in 0..self.length.next_multiple_of(I::LANES) {
            let panel = key / self.panel * self.panel * self.query_words + key % self.panel;
            // SAFETY: `[panels, query words, panel]` words are there; only keys of the row are
            // read, and one row of words is there for them.
            unsafe {
                if key < self.length {
                    let from = keys.start.add(key * keys.stride);
                    narrow::<I>(from, self.width, row, self.elements_per_word);
                }
                for word in 0..self.query_words {
                    let value = if key < self.length { *row.add(word) } else { 0 };
                    *to.add(panel + word * self.panel) = value;
                }
            }
        }
    }

    /// Lays the values out in words of one column each: two tokens make a word of bfloat16.
    ///
    /// # Safety
    /// The CPU supports the set, and `values` are the row's tokens.
    #[inline(always)]
    pub(super) unsafe fn lay_out_values<I: Simd>(&mut self, values: FloatRows) {
        let to = self.values.pointer_mut();
        let columns = self.value_columns;
        let words = self.length.next_multiple_of(I::LANES) / self.elements_per_word;
        // Two rows of bfloat16, one behind the other.
        let pair = self.row.pointer_mut().cast::<u16>();
        for word in 0..words {
            // SAFETY: `[weight words, value columns]` words are there, and two rows of half as
            // many; only tokens of the row and columns of the head are read.
            unsafe {
                for half in 0..self.elements_per_word {
                    let token = word * self.elements_per_word + half;
                    for at in (0..columns).step_by(I::LANES) {
                        let count = self.width.saturating_sub(at).min(I::LANES);
                        let elements = if token < self.length {
                            I::load_first(values.start.add(token * values.stride + at), count)
                        } else {
                            I::splat(0.0)
                        };
                        if self.elements_per_word == 1 {
                            I::store(to.cast::<f32>().add(word * columns + at), elements);
                        } else {
                            I::store_bf16(pair.add(half * columns + at), elements);
                        }
                    }
                }
                if self.elements_per_word == 2 {
                    for column in 0..columns {
                        let (low, high) = (*pair.add(column), *pair.add(columns + column));
                        *to.add(word * columns + column) = u32::from(low) | u32::from(high) << 16;
                    }
                }
            }
        }
    }

    /// Copies queries `first` to `first + count` as words, rounded to bf16 where that is the dtype.
    ///
    /// # Safety
    /// The CPU supports the set, and `queries` has these tokens.
    #[inline(always)]
    pub(super) unsafe fn lay_out_queries<I: Simd>(
        &mut self,
        queries: FloatRows,
        first: usize,
        count: usize,
    ) {
        let to = self.queries.pointer_mut();
        for number in 0..count {
            // SAFETY: `[queries, query words]` words are there, as are the queries.
            unsafe {
                let from = queries.start.add((first + number) * queries.stride);
                let to = to.add(number * self.query_words);
                narrow::<I>(from, self.width, to, self.elements_per_word);
            }
        }
    }

    /// Scores, weights and outputs of `count` queries from `first` on.
    ///
    /// # Safety
    /// The CPU supports the set, and keys, values and queries are laid out.
    #[inline(always)]
    pub(super) unsafe fn attend<I: Simd, D: DotProduct<I, Sum = I::F>, const V: usize>(
        &mut self,
        first: usize,
        count: usize,
        window: Option<usize>,
    ) {
        // The keys that one of the queries sees, from a whole panel to a whole register.
        let reach = window.unwrap_or(self.length);
        let from = first.saturating_sub(reach) / self.panel * self.panel;
        let to = (first + count).saturating_add(reach).min(self.length);
        let to = to.next_multiple_of(I::LANES);
        // SAFETY: rows beyond `count` are computed from arbitrary values and not used: the memory
        // is there for all of a tile's rows.
        unsafe {
            for key in (from..to).step_by(self.panel) {
                match (to - key) / I::LANES {
                    1 => self.score::<I, D, 1>(key),
                    2 => self.score::<I, D, 2>(key),
                    3 if V > 2 => self.score::<I, D, 3>(key),
                    _ => self.score::<I, D, V>(key),
                }
            }
            for number in 0..count {
                let position = first + number;
                let seen = position.saturating_sub(reach)..(position + 1).saturating_add(reach);
                let seen = seen.start..seen.end.min(self.length);
                self.softmax::<I>(number, from..to, seen);
            }
            let mut column = 0;
            while column < self.value_columns {
                let registers = ((self.value_columns - column) / I::LANES).min(V);
                match registers {
                    1 => self.add_values::<I, D, 1>(from..to, column),
                    2 => self.add_values::<I, D, 2>(from..to, column),
                    3 if V > 2 => self.add_values::<I, D, 3>(from..to, column),
                    _ => self.add_values::<I, D, V>(from..to, column),
                }
                column += registers * I::LANES;
            }
        }
    }

    /// The values of some keys, weighted and summed: `V` registers of columns from `column` on.
    ///
    /// # Safety
    /// As for `attend`.
    #[inline(always)]
    unsafe fn add_values<I: Simd, D: DotProduct<I, Sum = I::F>, const V: usize>(
        &mut self,
        keys: std::ops::Range<usize>,
        column: usize,
    ) {
        let first = keys.start / self.elements_per_word;
        let steps = keys.len() / self.elements_per_word;
        // SAFETY: weights, values and outputs are there for these keys, columns and a tile's rows.
        unsafe {
            let values = WordRows {
                start: self
                    .values
                    .pointer()
                    .add(first * self.value_columns + column),
                stride: self.value_columns,
            };
            let weights = WordRows {
                start: self.weights.pointer().add(first),
                stride: self.weight_words,
            };
            let zero = [D::zero(); V];
            let sums = micro_kernel::<I, D, V, GEMM_TILE_ROWS>(weights, values, steps, zero);
            let start = self.outputs.pointer_mut().cast::<f32>().add(column);
            for (number, sums) in sums.iter().enumerate() {
                let start = start.add(number * self.value_columns);
                for (index, sum) in sums.iter().enumerate() {
                    I::store(start.add(index * I::LANES), *sum);
                }
            }
        }
    }

    /// Scores of a tile's queries and `V` registers of keys from `key` on.
    ///
    /// # Safety
    /// As for `attend`.
    #[inline(always)]
    unsafe fn score<I: Simd, D: DotProduct<I, Sum = I::F>, const V: usize>(&mut self, key: usize) {
        // SAFETY: a panel of keys begins at `key`, and a tile's rows of queries and scores are
        // there.
        unsafe {
            let keys = WordRows {
                start: self.keys.pointer().add(key * self.query_words),
                stride: self.panel,
            };
            let queries = WordRows {
                start: self.queries.pointer(),
                stride: self.query_words,
            };
            let zero = [D::zero(); V];
            let scores =
                micro_kernel::<I, D, V, GEMM_TILE_ROWS>(queries, keys, self.query_words, zero);
            let start = self.scores.pointer_mut().cast::<f32>().add(key);
            for (number, scores) in scores.iter().enumerate() {
                let start = start.add(number * self.key_columns);
                for (index, scores) in scores.iter().enumerate() {
                    I::store(start.add(index * I::LANES), *scores);
                }
            }
        }
    }

    /// The softmax weights of one query before normalization: e to the scaled scores less the
    /// largest, and zero for columns outside of its window. Their sum is kept in `sums`.
    ///
    /// # Safety
    /// The CPU supports the set; `columns` are whole registers, and `seen` lies within them.
    #[inline(always)]
    unsafe fn softmax<I: Simd>(
        &mut self,
        query: usize,
        columns: std::ops::Range<usize>,
        seen: std::ops::Range<usize>,
    ) {
        // Powers of two are cheaper than powers of e.
        let scale = std::f32::consts::LOG2_E / (self.width as f32).sqrt();
        // SAFETY: the scores and the weights of this query are there for all columns.
        unsafe {
            let scores = self.scores.pointer_mut().cast::<f32>();
            let scores = scores.add(query * self.key_columns);
            for column in columns.start..seen.start {
                *scores.add(column) = f32::NEG_INFINITY;
            }
            for column in seen.end..columns.end {
                *scores.add(column) = f32::NEG_INFINITY;
            }
            let mut largest = I::splat(f32::NEG_INFINITY);
            for column in columns.clone().step_by(I::LANES) {
                largest = I::max(largest, I::load(scores.add(column)));
            }
            let largest = I::splat(I::largest(largest) * -scale);
            let scale = I::splat(scale);
            let mut sum = I::splat(0.0);
            let weights = self.weights.pointer_mut().add(query * self.weight_words);
            for column in columns.step_by(I::LANES) {
                let score = I::fma(I::load(scores.add(column)), scale, largest);
                // For a masked column this is 1e-38, the smallest value of the function.
                let weight = functions::power_of_two::<I>(score);
                sum = I::add(sum, weight);
                if self.elements_per_word == 1 {
                    I::store(weights.cast::<f32>().add(column), weight);
                } else {
                    I::store_bf16(weights.cast::<u16>().add(column), weight);
                }
            }
            self.sums[query] = I::sum(sum);
        }
    }
}
