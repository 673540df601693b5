//! A matrix of activations.

use super::buffer::Buffer;

/// The number format of a matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// 32-bit floats.
    F32,
    /// bfloat16, two to a word.
    Bf16,
}

/// `[rows, width]` in memory of the arena, row after row.
pub struct Matrix {
    buffer: Buffer,
    rows: usize,
    width: usize,
    format: Format,
}

impl Matrix {
    /// A matrix with anything in it.
    pub(super) fn take(rows: usize, width: usize, format: Format) -> Self {
        let words = match format {
            Format::F32 => width,
            Format::Bf16 => width.div_ceil(2),
        };
        let mut matrix = Self {
            buffer: Buffer::take(rows * words),
            rows,
            width,
            format,
        };
        if format == Format::Bf16 && width % 2 == 1 {
            matrix.clear_odd_ends();
        }
        matrix
    }

    /// The half word after a row of odd width is multiplied too, with a weight of zero: it must
    /// not be infinite.
    fn clear_odd_ends(&mut self) {
        let (rows, words) = (self.rows, self.words_per_row());
        let start = self.buffer.pointer_mut();
        for row in 0..rows {
            // SAFETY: the last word of a row; the buffer has `rows · words` words.
            unsafe { *start.add(row * words + words - 1) = 0 };
        }
    }

    /// Copies rows of floats.
    pub fn from_floats(values: &[f32], width: usize) -> Self {
        let rows = values.len().checked_div(width).unwrap_or(0);
        let mut matrix = Self::take(rows, width, Format::F32);
        matrix.floats_mut().copy_from_slice(&values[..rows * width]);
        matrix
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Numbers in a row.
    pub fn width(&self) -> usize {
        self.width
    }

    pub(super) fn format(&self) -> Format {
        self.format
    }

    /// Words from one row to the next.
    pub(super) fn words_per_row(&self) -> usize {
        match self.format {
            Format::F32 => self.width,
            Format::Bf16 => self.width.div_ceil(2),
        }
    }

    pub(super) fn pointer(&self) -> *const u32 {
        self.buffer.pointer()
    }

    pub(super) fn pointer_mut(&mut self) -> *mut u32 {
        self.buffer.pointer_mut()
    }

    /// The numbers of a matrix of floats, row-major; nothing of any other.
    pub fn floats(&self) -> &[f32] {
        let count = self.float_count();
        // SAFETY: the buffer has at least `count` initialized words, and any bits are a float.
        unsafe { std::slice::from_raw_parts(self.buffer.pointer().cast(), count) }
    }

    pub(super) fn floats_mut(&mut self) -> &mut [f32] {
        let count = self.float_count();
        // SAFETY: as above, and the buffer is borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.buffer.pointer_mut().cast(), count) }
    }

    fn float_count(&self) -> usize {
        match self.format {
            Format::F32 => (self.rows * self.width).min(self.buffer.words()),
            Format::Bf16 => 0,
        }
    }
}
