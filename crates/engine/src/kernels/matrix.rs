//! A matrix of activations.

use super::buffer::Buffer;

/// The dtype of a matrix of activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MatrixDtype {
    /// 32-bit floats.
    F32,
    /// bfloat16, two in a word.
    Bf16,
}

/// `[rows, width]`, row-major, in memory of the arena.
pub struct Matrix {
    buffer: Buffer,
    rows: usize,
    width: usize,
    dtype: MatrixDtype,
}

impl Matrix {
    /// A matrix from the arena, with arbitrary values.
    pub(super) fn from_arena(rows: usize, width: usize, dtype: MatrixDtype) -> Self {
        let words = match dtype {
            MatrixDtype::F32 => width,
            MatrixDtype::Bf16 => width.div_ceil(2),
        };
        let mut matrix = Self {
            buffer: Buffer::from_arena(rows * words),
            rows,
            width,
            dtype,
        };
        if dtype == MatrixDtype::Bf16 && width % 2 == 1 {
            matrix.clear_odd_ends();
        }
        matrix
    }

    /// The half word after a row of odd width is multiplied too, with a weight of zero: it must
    /// not be infinite or NaN.
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
        let mut matrix = Self::from_arena(rows, width, MatrixDtype::F32);
        matrix.floats_mut().copy_from_slice(&values[..rows * width]);
        matrix
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Elements of a row.
    pub fn width(&self) -> usize {
        self.width
    }

    pub(super) fn dtype(&self) -> MatrixDtype {
        self.dtype
    }

    /// Words from one row to the next.
    pub(super) fn words_per_row(&self) -> usize {
        match self.dtype {
            MatrixDtype::F32 => self.width,
            MatrixDtype::Bf16 => self.width.div_ceil(2),
        }
    }

    pub(super) fn pointer(&self) -> *const u32 {
        self.buffer.pointer()
    }

    pub(super) fn pointer_mut(&mut self) -> *mut u32 {
        self.buffer.pointer_mut()
    }

    /// The elements of a matrix of floats, row-major; empty for any other dtype.
    pub fn floats(&self) -> &[f32] {
        let count = self.float_count();
        // SAFETY: the buffer has at least `count` initialized words, and any bits are a valid float.
        unsafe { std::slice::from_raw_parts(self.buffer.pointer().cast(), count) }
    }

    pub(super) fn floats_mut(&mut self) -> &mut [f32] {
        let count = self.float_count();
        // SAFETY: as above, and the buffer is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.buffer.pointer_mut().cast(), count) }
    }

    fn float_count(&self) -> usize {
        match self.dtype {
            MatrixDtype::F32 => (self.rows * self.width).min(self.buffer.words()),
            MatrixDtype::Bf16 => 0,
        }
    }
}
