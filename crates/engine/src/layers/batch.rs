//! Rows packed one behind the other.

use candle_core::{Device, Tensor};

use crate::EngineError;

/// A batch of rows without padding: every token of every row, and where each row begins.
///
/// The rows are kept in order of length, so that equally long ones lie side by side: a device
/// that wants few large operations takes each such group as one dense batch.
pub(crate) struct Batch {
    /// Token ids, `[tokens]`.
    pub(crate) ids: Vec<u32>,
    /// Token types, `[tokens]`.
    pub(crate) type_ids: Vec<u32>,
    /// Rows of the position table, `[tokens]`.
    pub(crate) positions: Vec<u32>,
    /// First token and length of each packed row.
    pub(crate) spans: Vec<(usize, usize)>,
    /// For each packed row, its place among the caller's rows.
    pub(crate) order: Vec<usize>,
    /// Where the model is.
    device: Device,
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
    pub(crate) fn pack(rows: &[(&[u32], &[u32])], counting: Counting, device: &Device) -> Self {
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
        Self {
            ids,
            type_ids,
            positions,
            spans,
            order,
            device: device.clone(),
        }
    }

    /// Numbers of each token on the model's device, `[tokens]`.
    pub(crate) fn on(&self, places: &[u32]) -> Result<Tensor, EngineError> {
        Ok(Tensor::from_slice(places, places.len(), &self.device)?)
    }

    /// Tokens of all rows together.
    pub(crate) fn tokens(&self) -> usize {
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
