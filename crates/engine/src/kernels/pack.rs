//! Weights of a linear layer, laid out once for the products.

use half::bf16;

use super::Instructions;
use super::buffer::{Buffer, Zeroed};

/// The number format of packed weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// 32-bit floats.
    F32,
    /// bfloat16, added up in 32 bits.
    Bf16,
    /// 8-bit integers with a scale for each output, added up in 32 bits; each input row is
    /// rounded to 8 bits with a scale of its own.
    Int8,
}

impl Precision {
    /// Numbers in a word.
    pub(super) fn per_word(self) -> usize {
        match self {
            Self::F32 => 1,
            Self::Bf16 => 2,
            Self::Int8 => 4,
        }
    }

    /// Whether a set multiplies these numbers in tiles.
    pub(super) fn in_tiles(self, instructions: Instructions) -> bool {
        instructions == Instructions::Amx && self != Self::F32
    }
}

/// Words of one row of a tile of inputs, which is what each step of a product takes there.
pub(super) const TILE_WORDS: usize = 16;

/// The largest weight in 8 bits.
const BYTE_MAX: f32 = 127.0;

/// A linear layer's weights and bias.
///
/// Outputs are cut into panels as wide as the instruction set's sums. Within a panel, step by
/// step of the product, the words of its outputs lie side by side: a product reads a panel from
/// front to back and nothing else. The last panel is filled up with zeros, and so is each output
/// where products go in tiles.
pub struct Packed {
    pub(super) instructions: Instructions,
    pub(super) precision: Precision,
    pub(super) outputs: usize,
    pub(super) inputs: usize,
    /// Words of one output, in whole tiles where it is multiplied in tiles.
    pub(super) words: usize,
    values: Vec<Zeroed>,
    /// What sums start from, a word for each output: the bias, or zero for 8-bit integers.
    starts: Vec<Zeroed>,
    /// For 8-bit integers, of each output: its scale, the sum of its weights, its bias.
    scales: Vec<Zeroed>,
    totals: Vec<Zeroed>,
    biases: Vec<Zeroed>,
}

impl Packed {
    /// Packs `[outputs, inputs]` weights, row-major, and a bias where there is one.
    pub fn new(
        instructions: Instructions,
        precision: Precision,
        weights: &[f32],
        bias: Option<&[f32]>,
        inputs: usize,
    ) -> Self {
        assert!(instructions.supported(), "{instructions} is not here");
        let outputs = weights.len().checked_div(inputs).unwrap_or(0);
        let mut words = inputs.div_ceil(precision.per_word());
        if precision.in_tiles(instructions) {
            words = words.next_multiple_of(TILE_WORDS);
        }
        let columns = outputs.next_multiple_of(instructions.tile().0);
        let mut packed = Self {
            instructions,
            precision,
            outputs,
            inputs,
            words,
            values: Buffer::zeros(columns * words),
            starts: Buffer::zeros(columns),
            scales: Buffer::zeros(columns),
            totals: Buffer::zeros(columns),
            biases: Buffer::zeros(columns),
        };
        let bias = bias.unwrap_or_default();
        for (output, row) in weights.chunks_exact(inputs.max(1)).enumerate() {
            let bias = bias.get(output).copied().unwrap_or(0.0);
            packed.set_output(output, row, bias);
        }
        packed
    }

    /// Bytes of the weights.
    pub(crate) fn bytes(&self) -> u64 {
        let lines = self.values.len() + 4 * self.starts.len();
        (lines * size_of::<Zeroed>()) as u64
    }

    /// The number format of the weights.
    pub(crate) fn precision(&self) -> Precision {
        self.precision
    }

    fn set_output(&mut self, output: usize, row: &[f32], bias: f32) {
        let panel = self.instructions.tile().0;
        let first = output / panel * panel * self.words + output % panel;
        let (place, stride) = (
            |word: usize| first + word * panel,
            self.precision.per_word(),
        );
        let pieces = row.chunks(stride).enumerate();
        match self.precision {
            Precision::F32 => {
                for (word, piece) in pieces {
                    set(&mut self.values, place(word), piece[0].to_bits());
                }
                set(&mut self.starts, output, bias.to_bits());
            }
            Precision::Bf16 => {
                for (word, piece) in pieces {
                    let bits =
                        |at: usize| piece.get(at).map_or(0, |v| bf16::from_f32(*v).to_bits());
                    let both = u32::from(bits(0)) | u32::from(bits(1)) << 16;
                    set(&mut self.values, place(word), both);
                }
                set(&mut self.starts, output, bias.to_bits());
            }
            Precision::Int8 => {
                let scale = row.iter().fold(0.0, |most: f32, v| most.max(v.abs())) / BYTE_MAX;
                let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
                let mut sum = 0;
                for (word, piece) in pieces {
                    let mut bytes = [0; 4];
                    for (byte, value) in bytes.iter_mut().zip(piece) {
                        let whole = (value * inverse).round() as i8;
                        sum += i32::from(whole);
                        *byte = whole as u8;
                    }
                    set(&mut self.values, place(word), u32::from_le_bytes(bytes));
                }
                set(&mut self.totals, output, (sum as f32).to_bits());
                set(&mut self.scales, output, scale.to_bits());
                set(&mut self.biases, output, bias.to_bits());
            }
        }
    }

    /// Panels of outputs.
    pub(super) fn panels(&self) -> usize {
        self.outputs.div_ceil(self.instructions.tile().0)
    }

    /// `panels · words · panel width` words.
    pub(super) fn values(&self) -> *const u32 {
        self.values.as_ptr().cast()
    }

    /// `panels · panel width` words, as are the next three.
    pub(super) fn starts(&self) -> *const u32 {
        self.starts.as_ptr().cast()
    }

    pub(super) fn scales(&self) -> *const f32 {
        self.scales.as_ptr().cast()
    }

    pub(super) fn totals(&self) -> *const f32 {
        self.totals.as_ptr().cast()
    }

    pub(super) fn biases(&self) -> *const f32 {
        self.biases.as_ptr().cast()
    }
}

fn set(lines: &mut [Zeroed], place: usize, word: u32) {
    if let Some(line) = lines.get_mut(place / Zeroed::WORDS) {
        line.set(place % Zeroed::WORDS, word);
    }
}
