//! Packing: the rows of a batch one behind the other, without padding.

use candle_core::{Device, Tensor};

use crate::error::EngineError;
use crate::kernels::PooledSpan;

/// A batch of rows without padding: every token of every row, and where each row begins.
///
/// The rows are sorted by length, so that rows of equal length lie side by side: a device that is
/// fast at few large operations takes each such group as one dense batch.
pub(crate) struct Batch {
    /// Token ids, `[tokens]`.
    pub(crate) ids: Vec<u32>,
    /// Token types, `[tokens]`.
    pub(crate) type_ids: Vec<u32>,
    /// Position ids, `[tokens]`.
    pub(crate) positions: Vec<u32>,
    /// First token and length of each packed row.
    pub(crate) spans: Vec<(usize, usize)>,
    /// For each packed row, how many of its first tokens pooling leaves out: fewer than it has.
    skipped: Vec<usize>,
    /// For each packed row, its index among the caller's rows.
    pub(crate) order: Vec<usize>,
    /// The device of the model.
    device: Device,
}

/// How the positions of a row's tokens are counted.
#[derive(Debug, Clone, Copy)]
pub(crate) enum PositionScheme {
    /// 0, 1, 2, …
    FromZero,
    /// From one past the padding id; a token that is itself the padding id has that id as its
    /// position and is not counted. This is how fairseq's RoBERTa was trained.
    PastPadding(u32),
}

/// A row to pack.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PackedRow<'a> {
    /// Its token ids.
    pub(crate) ids: &'a [u32],
    /// The type of each token.
    pub(crate) type_ids: &'a [u32],
    /// How many of its first tokens pooling leaves out.
    pub(crate) skipped: usize,
}

/// Packed rows of equal length, one behind the other.
pub(crate) struct RowGroup {
    /// The first token of the first row.
    pub(crate) start: usize,
    /// The number of rows.
    pub(crate) rows: usize,
    /// Tokens of each row.
    pub(crate) length: usize,
}

impl Batch {
    /// Packs rows of token ids and token types.
    pub(crate) fn pack(
        rows: &[PackedRow<'_>],
        position_scheme: PositionScheme,
        device: &Device,
    ) -> Self {
        let mut order: Vec<usize> = (0..rows.len()).collect();
        order.sort_by_key(|row| rows[*row].ids.len());
        let tokens = rows.iter().map(|row| row.ids.len()).sum();
        let mut ids = Vec::with_capacity(tokens);
        let mut type_ids = Vec::with_capacity(tokens);
        let mut positions = Vec::with_capacity(tokens);
        let mut spans = Vec::with_capacity(rows.len());
        let mut skipped = Vec::with_capacity(rows.len());
        for row in &order {
            let row = rows[*row];
            spans.push((ids.len(), row.ids.len()));
            // A row that is nothing but its prompt keeps its last token.
            skipped.push(row.skipped.min(row.ids.len().saturating_sub(1)));
            ids.extend_from_slice(row.ids);
            type_ids.extend_from_slice(row.type_ids);
            push_positions(row.ids, position_scheme, &mut positions);
        }
        Self {
            ids,
            type_ids,
            positions,
            spans,
            skipped,
            order,
            device: device.clone(),
        }
    }

    /// The tokens of each packed row that are pooled.
    pub(crate) fn pooled_spans(&self) -> Vec<PooledSpan> {
        let rows = self.spans.iter().zip(&self.skipped);
        rows.map(|((start, length), skipped)| PooledSpan {
            start: start + skipped,
            count: length - skipped,
            skipped: *skipped,
        })
        .collect()
    }

    /// Ids or positions of the tokens on the model's device, `[tokens]`.
    pub(crate) fn on_device(&self, indices: &[u32]) -> Result<Tensor, EngineError> {
        Ok(Tensor::from_slice(indices, indices.len(), &self.device)?)
    }

    /// Tokens of all rows together.
    pub(crate) fn tokens(&self) -> usize {
        self.spans
            .last()
            .map_or(0, |(start, length)| start + length)
    }

    /// The rows in groups of equal length.
    pub(crate) fn groups(&self) -> Vec<RowGroup> {
        let mut groups: Vec<RowGroup> = Vec::new();
        for (start, length) in &self.spans {
            match groups.last_mut() {
                Some(group) if group.length == *length => group.rows += 1,
                _ => groups.push(RowGroup {
                    start: *start,
                    rows: 1,
                    length: *length,
                }),
            }
        }
        groups
    }
}

fn push_positions(ids: &[u32], scheme: PositionScheme, positions: &mut Vec<u32>) {
    match scheme {
        PositionScheme::FromZero => {
            positions.extend(ids.iter().zip(0..).map(|(_, position)| position));
        }
        PositionScheme::PastPadding(padding) => {
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
