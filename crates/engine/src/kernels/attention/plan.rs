//! One head of one row: its keys, values and queries laid out for the products, and what becomes
//! of them.

use super::super::buffer::Buffer;
use super::super::functions;
use super::super::instructions::Isa;
use super::super::products::{Dot, TILE_ROWS, Words, tile};

/// Rows of floats.
#[derive(Clone, Copy)]
pub(super) struct Floats {
    pub(super) start: *const f32,
    pub(super) stride: usize,
}

/// Copies a row of floats to words of one number or of two.
///
/// # Safety
/// The processor has the set; there are `width` numbers, and as many words as they fill.
#[inline(always)]
unsafe fn narrow<I: Isa>(from: *const f32, width: usize, to: *mut u32, per_word: usize) {
    // SAFETY: no number from `width` on is read or written, but for the last word's other half.
    unsafe {
        if per_word == 2 && width % 2 == 1 {
            *to.add(width / 2) = 0;
        }
        for at in (0..width).step_by(I::LANES) {
            let count = (width - at).min(I::LANES);
            let numbers = I::load_first(from.add(at), count);
            if per_word == 1 {
                I::store_first(to.cast::<f32>().add(at), count, numbers);
            } else {
                I::store_bf16_first(to.cast::<u16>().add(at), count, numbers);
            }
        }
    }
}

/// The memory for one head of one row.
pub(super) struct Plan {
    /// Tokens of the row, and numbers of a head.
    length: usize,
    width: usize,
    /// Numbers in a word.
    per_word: usize,
    /// Columns of a tile.
    panel: usize,
    /// Words of a query or key.
    query_words: usize,
    /// Columns of scores: the keys, filled up to whole panels.
    key_columns: usize,
    /// Words of a query's weights.
    weight_words: usize,
    /// Columns of an output: the head's width, filled up to whole registers.
    pub(super) value_columns: usize,
    /// `[panels, query words, panel]`.
    keys: Buffer,
    /// `[weight words, value columns]`.
    values: Buffer,
    /// `[queries, query words]`.
    queries: Buffer,
    /// One key, or two values, on the way to where they belong.
    row: Buffer,
    /// Floats, `[queries, key columns]`.
    scores: Buffer,
    /// `[queries, weight words]`.
    weights: Buffer,
    /// Floats, `[queries, value columns]`.
    pub(super) outputs: Buffer,
    /// The sum of each query's weights.
    pub(super) sums: [f32; TILE_ROWS],
}

impl Plan {
    pub(super) fn new<I: Isa, const V: usize>(
        length: usize,
        width: usize,
        per_word: usize,
    ) -> Self {
        let panel = V * I::LANES;
        let query_words = width.div_ceil(per_word);
        let key_columns = length.next_multiple_of(panel);
        let weight_words = key_columns / per_word;
        let value_columns = width.next_multiple_of(I::LANES);
        Self {
            length,
            width,
            per_word,
            panel,
            query_words,
            key_columns,
            weight_words,
            value_columns,
            keys: Buffer::take(query_words * key_columns),
            values: Buffer::take(weight_words * value_columns),
            queries: Buffer::take(query_words * TILE_ROWS),
            row: Buffer::take(value_columns),
            scores: Buffer::take(key_columns * TILE_ROWS),
            weights: Buffer::take(weight_words * TILE_ROWS),
            outputs: Buffer::take(value_columns * TILE_ROWS),
            sums: [1.0; TILE_ROWS],
        }
    }

    /// Turns the keys on their side, a panel of keys at a time.
    ///
    /// # Safety
    /// The processor has the set, and `keys` the row's tokens.
    #[inline(always)]
    pub(super) unsafe fn lay_out_keys<I: Isa>(&mut self, keys: Floats) {
        let to = self.keys.pointer_mut();
        let row = self.row.pointer_mut();
        for key in 0..self.length.next_multiple_of(I::LANES) {
            let panel = key / self.panel * self.panel * self.query_words + key % self.panel;
            // SAFETY: `[panels, query words, panel]` words are there; only keys of the row are
            // read, and one row of words is there for them.
            unsafe {
                if key < self.length {
                    let from = keys.start.add(key * keys.stride);
                    narrow::<I>(from, self.width, row, self.per_word);
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
    /// The processor has the set, and `values` the row's tokens.
    #[inline(always)]
    pub(super) unsafe fn lay_out_values<I: Isa>(&mut self, values: Floats) {
        let to = self.values.pointer_mut();
        let columns = self.value_columns;
        let words = self.length.next_multiple_of(I::LANES) / self.per_word;
        // Two rows of bfloat16, one behind the other.
        let pair = self.row.pointer_mut().cast::<u16>();
        for word in 0..words {
            // SAFETY: `[weight words, value columns]` words are there, and two rows of half as
            // many; only tokens of the row and columns of the head are read.
            unsafe {
                for half in 0..self.per_word {
                    let token = word * self.per_word + half;
                    for at in (0..columns).step_by(I::LANES) {
                        let count = self.width.saturating_sub(at).min(I::LANES);
                        let numbers = if token < self.length {
                            I::load_first(values.start.add(token * values.stride + at), count)
                        } else {
                            I::splat(0.0)
                        };
                        if self.per_word == 1 {
                            I::store(to.cast::<f32>().add(word * columns + at), numbers);
                        } else {
                            I::store_bf16(pair.add(half * columns + at), numbers);
                        }
                    }
                }
                if self.per_word == 2 {
                    for column in 0..columns {
                        let (low, high) = (*pair.add(column), *pair.add(columns + column));
                        *to.add(word * columns + column) = u32::from(low) | u32::from(high) << 16;
                    }
                }
            }
        }
    }

    /// Queries `first` to `first + count` as words: where they are, or rounded.
    ///
    /// # Safety
    /// The processor has the set, and `queries` these tokens.
    #[inline(always)]
    pub(super) unsafe fn lay_out_queries<I: Isa>(
        &mut self,
        queries: Floats,
        first: usize,
        count: usize,
    ) {
        let to = self.queries.pointer_mut();
        for number in 0..count {
            // SAFETY: `[queries, query words]` words are there, as are the queries.
            unsafe {
                let from = queries.start.add((first + number) * queries.stride);
                let to = to.add(number * self.query_words);
                narrow::<I>(from, self.width, to, self.per_word);
            }
        }
    }

    /// Scores, weights and outputs of `count` queries from `first` on.
    ///
    /// # Safety
    /// The processor has the set, and keys, values and queries are laid out.
    #[inline(always)]
    pub(super) unsafe fn attend<I: Isa, D: Dot<I, Sum = I::F>, const V: usize>(
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
        // SAFETY: rows beyond `count` are computed from what was left there and not used: the
        // memory is there for all of a tile's rows.
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
                let place = first + number;
                let seen = place.saturating_sub(reach)..(place + 1).saturating_add(reach);
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
    /// As of `attend`.
    #[inline(always)]
    unsafe fn add_values<I: Isa, D: Dot<I, Sum = I::F>, const V: usize>(
        &mut self,
        keys: std::ops::Range<usize>,
        column: usize,
    ) {
        let first = keys.start / self.per_word;
        let steps = keys.len() / self.per_word;
        // SAFETY: weights, values and outputs are there for these keys, columns and a tile's rows.
        unsafe {
            let values = Words {
                start: self
                    .values
                    .pointer()
                    .add(first * self.value_columns + column),
                stride: self.value_columns,
            };
            let weights = Words {
                start: self.weights.pointer().add(first),
                stride: self.weight_words,
            };
            let zero = [D::zero(); V];
            let sums = tile::<I, D, V, TILE_ROWS>(weights, values, steps, zero);
            let start = self.outputs.pointer_mut().cast::<f32>().add(column);
            for (number, sums) in sums.iter().enumerate() {
                let start = start.add(number * self.value_columns);
                for (place, sum) in sums.iter().enumerate() {
                    I::store(start.add(place * I::LANES), *sum);
                }
            }
        }
    }

    /// Scores of a tile's queries and `V` registers of keys from `key` on.
    ///
    /// # Safety
    /// As of `attend`.
    #[inline(always)]
    unsafe fn score<I: Isa, D: Dot<I, Sum = I::F>, const V: usize>(&mut self, key: usize) {
        // SAFETY: a panel of keys begins at `key`, and a tile's rows of queries and scores are
        // there.
        unsafe {
            let keys = Words {
                start: self.keys.pointer().add(key * self.query_words),
                stride: self.panel,
            };
            let queries = Words {
                start: self.queries.pointer(),
                stride: self.query_words,
            };
            let zero = [D::zero(); V];
            let scores = tile::<I, D, V, TILE_ROWS>(queries, keys, self.query_words, zero);
            let start = self.scores.pointer_mut().cast::<f32>().add(key);
            for (number, scores) in scores.iter().enumerate() {
                let start = start.add(number * self.key_columns);
                for (place, scores) in scores.iter().enumerate() {
                    I::store(start.add(place * I::LANES), *scores);
                }
            }
        }
    }

    /// The weights of one query: e to the scaled scores less the largest, and zero for columns
    /// that it does not see. Their sum is kept for the end.
    ///
    /// # Safety
    /// The processor has the set; `columns` are whole registers, and `seen` lies within them.
    #[inline(always)]
    unsafe fn softmax<I: Isa>(
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
            let mut most = I::splat(f32::NEG_INFINITY);
            for column in columns.clone().step_by(I::LANES) {
                most = I::max(most, I::load(scores.add(column)));
            }
            let most = I::splat(I::largest(most) * -scale);
            let scale = I::splat(scale);
            let mut sum = I::splat(0.0);
            let weights = self.weights.pointer_mut().add(query * self.weight_words);
            for column in columns.step_by(I::LANES) {
                let score = I::fma(I::load(scores.add(column)), scale, most);
                // Of a hidden column this is 1e-38, where the function ends.
                let weight = functions::power_of_two::<I>(score);
                sum = I::add(sum, weight);
                if self.per_word == 1 {
                    I::store(weights.cast::<f32>().add(column), weight);
                } else {
                    I::store_bf16(weights.cast::<u16>().add(column), weight);
                }
            }
            self.sums[query] = I::sum(sum);
        }
    }
}
