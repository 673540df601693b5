//! Rows packed one behind the other.

use candle_core::{Device, Tensor};

use crate::EngineError;

/// A batch of rows without padding: every token of every row, and where each row begins.
///
/// The rows are kept in order of length, so that equally long ones lie side by side: a device
/// that wants few large operations takes each such group as one dense batch.
pub struct Batch {
    /// Token ids, `[tokens]`.
    pub(crate) ids: Tensor,
    /// Token types, `[tokens]`.
    pub(crate) type_ids: Tensor,
    /// Rows of the position table, `[tokens]`.
    pub(crate) positions: Tensor,
    /// First token and length of each packed row.
    pub(crate) spans: Vec<(usize, usize)>,
    /// For each packed row, its place among the caller's rows.
    pub(crate) order: Vec<usize>,
}

/// How the positions of a row's tokens are counted.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Counting {
    /// 0, 1, 2, …
    FromZero,
    /// From one past the padding id; a token that is itself the padding id has that id as its
    /// position and is not counted. This is how fairseq's RoBERTa was trained.
    PastPadding(u32),
}

impl Batch {
    /// Packs rows of token ids and token types.
    ///
    /// # Errors
    /// When the device has no room for the ids.
    pub fn pack(rows: &[(&[u32], &[u32])], device: &Device) -> Result<Self, EngineError> {
        Self::pack_counting(rows, Counting::FromZero, device)
    }

    pub(crate) fn pack_counting(
        rows: &[(&[u32], &[u32])],
        counting: Counting,
        device: &Device,
    ) -> Result<Self, EngineError> {
        let mut order: Vec<usize> = (0..rows.len()).collect();
        order.sort_by_key(|row| rows[*row].0.len());
        let tokens = rows.iter().map(|(ids, _)| ids.len()).sum();
        let mut ids = Vec::with_capacity(tokens);
        let mut type_ids = Vec::with_capacity(tokens);
        let mut positions = Vec::with_capacity(tokens);
        let mut spans = Vec::with_capacity(rows.len());
        for row in &order {
            let (row_ids, row_types) = rows[*row];
            spans.push((ids.len(), row_ids.len()));
            ids.extend_from_slice(row_ids);
            type_ids.extend_from_slice(row_types);
            count(row_ids, counting, &mut positions);
        }
        Ok(Self {
            ids: Tensor::from_vec(ids, tokens, device)?,
            type_ids: Tensor::from_vec(type_ids, tokens, device)?,
            positions: Tensor::from_vec(positions, tokens, device)?,
            spans,
            order,
        })
    }

    /// Tokens of all rows together.
    pub fn tokens(&self) -> usize {
        self.spans
            .last()
            .map_or(0, |(start, length)| start + length)
    }

    /// Groups of packed rows of equal length: first token, rows and length of each.
    pub(crate) fn groups(&self) -> Vec<(usize, usize, usize)> {
        let mut groups: Vec<(usize, usize, usize)> = Vec::new();
        for (start, length) in &self.spans {
            match groups.last_mut() {
                Some((_, rows, group_length)) if group_length == length => *rows += 1,
                _ => groups.push((*start, 1, *length)),
            }
        }
        groups
    }
}

fn count(ids: &[u32], counting: Counting, positions: &mut Vec<u32>) {
    match counting {
        Counting::FromZero => positions.extend(ids.iter().zip(0..).map(|(_, position)| position)),
        Counting::PastPadding(padding) => {
            let mut last = padding;
            positions.extend(ids.iter().map(|id| {
                if *id == padding {
                    return padding;
                }
                last = last.saturating_add(1);
                last
            }));
        }
    }
}
