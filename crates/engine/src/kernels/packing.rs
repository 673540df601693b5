//! Packing: the weights of a linear layer, quantized where the dtype is int8 and laid out once in
//! the order in which the GEMM micro-kernel reads them.

use half::bf16;

use super::InstructionSet;
use super::buffer::{Buffer, ZeroedLine};

/// The dtype of packed weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightDtype {
    /// 32-bit floats.
    F32,
    /// bfloat16, accumulated in 32 bits.
    Bf16,
    /// 8-bit integers with a scale for each output (symmetric quantization), accumulated in 32
    /// bits; each input row is quantized to 8 bits with a scale and a zero point of its own.
    Int8,
}

impl WeightDtype {
    /// Elements in a word.
    pub(super) fn elements_per_word(self) -> usize {
        match self {
            Self::F32 => 1,
            Self::Bf16 => 2,
            Self::Int8 => 4,
        }
    }

    /// Whether an instruction set multiplies this dtype in AMX tiles.
    pub(super) fn uses_tiles(self, instructions: InstructionSet) -> bool {
        instructions == InstructionSet::Amx && self != Self::F32
    }
}

/// Words of one row of an AMX tile of inputs.
pub(super) const TILE_WORDS: usize = 16;

/// The largest quantized weight.
const INT8_MAX: f32 = 127.0;

/// The packed weights and the bias of a linear layer.
///
/// Outputs are cut into panels as wide as the registers of sums of the instruction set. Within a
/// panel, for each step of the multiplication, the words of its outputs lie side by side: a GEMM
/// reads a panel from front to back and nothing else. The last panel is padded with zeros, and so
/// is each output for AMX tiles.
pub struct PackedWeights {
    pub(super) instructions: InstructionSet,
    pub(super) dtype: WeightDtype,
    pub(super) outputs: usize,
    pub(super) inputs: usize,
    /// Words of one output; a multiple of the tile width for AMX tiles.
    pub(super) words: usize,
    values: Vec<ZeroedLine>,
    /// Initial value of the sums, a word for each output: the bias, or zero for int8.
    initial_sums: Vec<ZeroedLine>,
    /// For int8, of each output: its scale, the sum of its quantized weights, its bias.
    scales: Vec<ZeroedLine>,
    weight_sums: Vec<ZeroedLine>,
    biases: Vec<ZeroedLine>,
}

impl PackedWeights {
    /// Packs `[outputs, inputs]` weights, row-major, and a bias where the layer has one.
    pub fn new(
        instructions: InstructionSet,
        dtype: WeightDtype,
        weights: &[f32],
        bias: Option<&[f32]>,
        inputs: usize,
    ) -> Self {
        assert!(
            instructions.supported(),
            "{instructions} is not supported by this CPU"
        );
        let outputs = weights.len().checked_div(inputs).unwrap_or(0);
        let mut words = inputs.div_ceil(dtype.elements_per_word());
        if dtype.uses_tiles(instructions) {
            words = words.next_multiple_of(TILE_WORDS);
        }
        let columns = outputs.next_multiple_of(instructions.gemm_tile().0);
        let mut packed = Self {
            instructions,
            dtype,
            outputs,
            inputs,
            words,
            values: Buffer::zeros(columns * words),
            initial_sums: Buffer::zeros(columns),
            scales: Buffer::zeros(columns),
            weight_sums: Buffer::zeros(columns),
            biases: Buffer::zeros(columns),
        };
        let bias = bias.unwrap_or_default();
        for (output, row) in weights.chunks_exact(inputs.max(1)).enumerate() {
            let bias = bias.get(output).copied().unwrap_or(0.0);
            packed.set_output(output, row, bias);
        }
        packed
    }

    /// Bytes of memory that the weights take.
    pub(crate) fn bytes(&self) -> u64 {
        let lines = self.values.len() + 4 * self.initial_sums.len();
        (lines * size_of::<ZeroedLine>()) as u64
    }

    /// The dtype of the weights.
    pub(crate) fn dtype(&self) -> WeightDtype {
        self.dtype
    }

    fn set_output(&mut self, output: usize, row: &[f32], bias: f32) {
        let panel = self.instructions.gemm_tile().0;
        let first = output / panel * panel * self.words + output % panel;
        let index = |word: usize| first + word * panel;
        let pieces = row.chunks(self.dtype.elements_per_word()).enumerate();
        match self.dtype {
            WeightDtype::F32 => {
                for (word, piece) in pieces {
                    set(&mut self.values, index(word), piece[0].to_bits());
                }
                set(&mut self.initial_sums, output, bias.to_bits());
            }
            WeightDtype::Bf16 => {
                for (word, piece) in pieces {
                    let bits =
                        |at: usize| piece.get(at).map_or(0, |v| bf16::from_f32(*v).to_bits());
                    let both = u32::from(bits(0)) | u32::from(bits(1)) << 16;
                    set(&mut self.values, index(word), both);
                }
                set(&mut self.initial_sums, output, bias.to_bits());
            }
            WeightDtype::Int8 => {
                let scale = row.iter().fold(0.0, |most: f32, v| most.max(v.abs())) / INT8_MAX;
                let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
                let mut sum = 0;
                for (word, piece) in pieces {
                    let mut bytes = [0; 4];
                    for (byte, value) in bytes.iter_mut().zip(piece) {
                        let quantized = (value * inverse).round() as i8;
                        sum += i32::from(quantized);
                        *byte = quantized as u8;
                    }
                    set(&mut self.values, index(word), u32::from_le_bytes(bytes));
                }
                set(&mut self.weight_sums, output, (sum as f32).to_bits());
                set(&mut self.scales, output, scale.to_bits());
                set(&mut self.biases, output, bias.to_bits());
            }
        }
    }

    /// Panels of outputs.
    pub(super) fn panels(&self) -> usize {
        self.outputs.div_ceil(self.instructions.gemm_tile().0)
    }

    /// `[panels, words, panel width]` words.
    pub(super) fn values(&self) -> *const u32 {
        self.values.as_ptr().cast()
    }

    /// `[panels, panel width]` words, as are the next three.
    pub(super) fn initial_sums(&self) -> *const u32 {
        self.initial_sums.as_ptr().cast()
    }

    pub(super) fn scales(&self) -> *const f32 {
        self.scales.as_ptr().cast()
    }

    pub(super) fn weight_sums(&self) -> *const f32 {
        self.weight_sums.as_ptr().cast()
    }

    pub(super) fn biases(&self) -> *const f32 {
        self.biases.as_ptr().cast()
    }
}

fn set(lines: &mut [ZeroedLine], index: usize, word: u32) {
    if let Some(line) = lines.get_mut(index / ZeroedLine::WORDS) {
        line.set(index % ZeroedLine::WORDS, word);
    }
}
