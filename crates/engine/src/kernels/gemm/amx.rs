//! GEMM with bf16 and int8 in tiles: Intel's Advanced Matrix Extensions (AMX) to AVX-512.
//!
//! There are eight tile registers of 16 rows of 64 bytes. One instruction multiplies the words of
//! a tile of inputs (16 rows, 16 words of each) by those of a tile of weights (16 steps, 16
//! outputs) and adds to a tile of sums (16 rows, 16 outputs); a panel of packed weights is laid
//! out in these tiles (Intel 64 and IA-32 Architectures Optimization Reference Manual, the chapter
//! on AMX).
//!
//! Two by two tiles of sums load two tiles of each operand at a step: two multiplications for each
//! load, which is what keeps the multiplier busy. Few rows are one tile high and go along all four
//! tiles of the panel, so that the panel is read once.
//!
//! The compiler does not know tiles. Their contents are made and stored in one block of assembly;
//! only their configuration, which compiled code does not change, outlives a block.

#[cfg(all(test, target_os = "linux", target_env = "gnu"))]
pub(in super::super) mod emulated;
#[cfg(all(test, target_os = "linux", target_env = "gnu"))]
mod tests;

use std::arch::asm;

use super::super::packing::{TILE_WORDS, WeightDtype};
use super::super::simd::{Avx512Bf16, Simd};
use super::{AMX_BLOCK_ROWS, Bf16, DotProduct, GemmJob, Int8, LINE_WORDS, epilogue};

/// The instruction set of the epilogue.
type I = Avx512Bf16;

/// Rows of a tile.
const AMX_TILE_ROWS: usize = AMX_BLOCK_ROWS / 2;
/// Tiles of sums side by side in a panel, as many as registers of floats.
const TILES: usize = 4;
/// Columns of a panel.
const COLUMNS: usize = TILES * TILE_WORDS;
/// Rows of a block, which are two tiles.
const BLOCK_ROWS: usize = AMX_BLOCK_ROWS;
/// Bytes from one row of a panel to the next, and from one row of a block's sums.
const LINE: usize = COLUMNS * size_of::<u32>();

/// The configuration of the tiles, as `ldtilecfg` reads it.
#[repr(C, align(64))]
struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    /// Bytes of a row, and rows, of each tile. There are eight.
    bytes: [u16; 16],
    rows: [u8; 16],
}

/// Configures the tiles for a block of this many rows. All of their contents are lost.
///
/// # Safety
/// The CPU supports AMX; there is at least one row, and at most a block's.
unsafe fn configure(rows: usize) {
    let mut config = TileConfig {
        palette: 1,
        start_row: 0,
        reserved: [0; 14],
        bytes: [0; 16],
        rows: [0; 16],
    };
    let upper = rows.min(AMX_TILE_ROWS) as u8;
    let all = AMX_TILE_ROWS as u8;
    // As `two_by_two` and `one_by_four` use them.
    let heights = if rows > AMX_TILE_ROWS {
        let lower = (rows - AMX_TILE_ROWS) as u8;
        [upper, upper, lower, lower, upper, lower, all, all]
    } else {
        [upper, upper, upper, upper, upper, all, all, all]
    };
    config.bytes[..8].fill((TILE_WORDS * size_of::<u32>()) as u16);
    config.rows[..8].copy_from_slice(&heights);
    // SAFETY: 64 bytes are read at the address, and they are there: the compiler assumes that a
    // block of assembly reads any memory, so that it keeps the stores above. The configuration is
    // one that the CPU allows.
    unsafe {
        asm!(
            "ldtilecfg [{config}]",
            config = in(reg) &raw const config,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack, preserves_flags),
        );
    }
}

/// Releases the tiles, so that the operating system need not save them.
///
/// # Safety
/// The CPU supports AMX.
unsafe fn release() {
    // SAFETY: no tile is in use outside of a block of assembly.
    unsafe {
        asm!(
            "tilerelease",
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack, preserves_flags),
        );
    }
}

/// The sums of a block, stored from the tiles: words of `[rows, columns]`.
#[repr(C, align(64))]
struct BlockSums([u32; BLOCK_ROWS * COLUMNS]);

/// A block: some rows by one panel.
struct RowBlock {
    /// The first row's words.
    input: *const u32,
    /// Bytes from one row to the next.
    stride: usize,
    /// From 1 to [`BLOCK_ROWS`].
    rows: usize,
    /// The panel.
    weights: *const u32,
    /// The initial values of its sums.
    initial_sums: *const u32,
    /// Tiles of a row; at least one.
    steps: usize,
}

/// The multiplication of a block in tiles of one dtype.
trait TileMultiply {
    /// More rows than a tile's, and half of a panel: `pair` is 0 or 1.
    ///
    /// # Safety
    /// The CPU supports AMX, and the tiles are configured for the block's rows; the block's pointers
    /// have what it declares.
    unsafe fn two_by_two(block: &RowBlock, pair: usize, sums: &mut BlockSums);

    /// At most a tile's rows, and a whole panel.
    ///
    /// # Safety
    /// As above.
    unsafe fn one_by_four(block: &RowBlock, sums: &mut BlockSums);
}

/// Implements both multiplications with the instruction of a dtype.
///
/// The sums of each row start from the same words: their tiles are loaded with a stride of zero.
macro_rules! tile_multiply {
    ($words:ty, $multiply:literal) => {
        impl TileMultiply for $words {
            #[inline(always)]
            unsafe fn two_by_two(block: &RowBlock, pair: usize, sums: &mut BlockSums) {
                let columns = pair * 2 * TILE_WORDS;
                // SAFETY: `steps` tiles of each row are read, from the lower ones as many rows as
                // the tiles' shape has; `steps` tiles of two columns of tiles of the panel, and
                // two of initial sums. The sums of both are written, and lie within the block's.
                unsafe {
                    asm!(
                        "tileloadd tmm0, [{initial_sums} + {zero}]",
                        "tileloadd tmm1, [{initial_sums} + {zero} + 64]",
                        "tileloadd tmm2, [{initial_sums} + {zero}]",
                        "tileloadd tmm3, [{initial_sums} + {zero} + 64]",
                        "2:",
                        "tileloadd tmm4, [{upper} + {stride}]",
                        "tileloadd tmm6, [{weights} + {line}]",
                        concat!($multiply, " tmm0, tmm4, tmm6"),
                        "tileloadd tmm7, [{weights} + {line} + 64]",
                        concat!($multiply, " tmm1, tmm4, tmm7"),
                        "tileloadd tmm5, [{lower} + {stride}]",
                        concat!($multiply, " tmm2, tmm5, tmm6"),
                        concat!($multiply, " tmm3, tmm5, tmm7"),
                        "add {upper}, 64",
                        "add {lower}, 64",
                        "add {weights}, 4096",
                        "dec {steps}",
                        "jnz 2b",
                        "tilestored [{sums} + {line}], tmm0",
                        "tilestored [{sums} + {line} + 64], tmm1",
                        "tilestored [{sums} + {line} + 4096], tmm2",
                        "tilestored [{sums} + {line} + 4160], tmm3",
                        initial_sums = in(reg) block.initial_sums.add(columns),
                        zero = in(reg) 0usize,
                        upper = inout(reg) block.input => _,
                        lower = inout(reg) block.input.byte_add(AMX_TILE_ROWS * block.stride) => _,
                        stride = in(reg) block.stride,
                        weights = inout(reg) block.weights.add(columns) => _,
                        line = in(reg) LINE,
                        steps = inout(reg) block.steps => _,
                        sums = in(reg) sums.0.as_mut_ptr().add(columns),
                        out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                        out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                        options(nostack),
                    );
                }
            }

            #[inline(always)]
            unsafe fn one_by_four(block: &RowBlock, sums: &mut BlockSums) {
                // SAFETY: as above, with as many rows as the tiles' shape has and the whole panel.
                unsafe {
                    asm!(
                        "tileloadd tmm0, [{initial_sums} + {zero}]",
                        "tileloadd tmm1, [{initial_sums} + {zero} + 64]",
                        "tileloadd tmm2, [{initial_sums} + {zero} + 128]",
                        "tileloadd tmm3, [{initial_sums} + {zero} + 192]",
                        "2:",
                        "tileloadd tmm4, [{input} + {stride}]",
                        "tileloadd tmm5, [{weights} + {line}]",
                        concat!($multiply, " tmm0, tmm4, tmm5"),
                        "tileloadd tmm6, [{weights} + {line} + 64]",
                        concat!($multiply, " tmm1, tmm4, tmm6"),
                        "tileloadd tmm7, [{weights} + {line} + 128]",
                        concat!($multiply, " tmm2, tmm4, tmm7"),
                        "tileloadd tmm5, [{weights} + {line} + 192]",
                        concat!($multiply, " tmm3, tmm4, tmm5"),
                        "add {input}, 64",
                        "add {weights}, 4096",
                        "dec {steps}",
                        "jnz 2b",
                        "tilestored [{sums} + {line}], tmm0",
                        "tilestored [{sums} + {line} + 64], tmm1",
                        "tilestored [{sums} + {line} + 128], tmm2",
                        "tilestored [{sums} + {line} + 192], tmm3",
                        initial_sums = in(reg) block.initial_sums,
                        zero = in(reg) 0usize,
                        input = inout(reg) block.input => _,
                        stride = in(reg) block.stride,
                        weights = inout(reg) block.weights => _,
                        line = in(reg) LINE,
                        steps = inout(reg) block.steps => _,
                        sums = in(reg) sums.0.as_mut_ptr(),
                        out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                        out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                        options(nostack),
                    );
                }
            }
        }
    };
}
tile_multiply!(Bf16, "tdpbf16ps");
// The first source is unsigned, the second signed.
tile_multiply!(Int8, "tdpbusd");

/// The sums of a block.
///
/// # Safety
/// As for [`TileMultiply::two_by_two`].
#[inline(always)]
unsafe fn accumulate<D: TileMultiply>(block: &RowBlock, sums: &mut BlockSums) {
    // SAFETY: passed on to the caller.
    unsafe {
        if block.rows > AMX_TILE_ROWS {
            D::two_by_two(block, 0, sums);
            D::two_by_two(block, 1, sums);
        } else {
            D::one_by_four(block, sums);
        }
    }
}

/// Runs a GEMM with bf16 or int8 weights, of however few rows: with few, memory is the limit, with
/// tiles or without.
///
/// # Safety
/// The CPU supports AMX; the job's pointers have as many rows as it declares.
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
pub(super) unsafe fn run_gemm(job: &GemmJob<'_>) {
    // SAFETY: passed on to the caller.
    unsafe {
        match job.weights.dtype {
            WeightDtype::Bf16 => panels::<Bf16>(job),
            WeightDtype::Int8 => panels::<Int8>(job),
            // Never multiplied in tiles.
            WeightDtype::F32 => {}
        }
    }
}

#[inline(always)]
unsafe fn panels<D: DotProduct<I> + TileMultiply>(job: &GemmJob<'_>) {
    let panel_words = COLUMNS * job.weights.words;
    // Each block prefetches some lines of the next panel.
    let blocks = job.rows.div_ceil(BLOCK_ROWS);
    let words_per_block = panel_words.div_ceil(blocks.max(1));
    let mut sums = BlockSums([0; BLOCK_ROWS * COLUMNS]);
    let mut configured_for = 0;
    for panel in job.panels.clone() {
        let next = job.weights.values().wrapping_add((panel + 1) * panel_words);
        for turn in 0..blocks {
            // Every other panel begins where the one before it ended, because changing the
            // configuration for the last rows and back takes as long as a few tiles.
            let block = if panel % 2 == 0 {
                turn
            } else {
                blocks - 1 - turn
            };
            let row = block * BLOCK_ROWS;
            let rows = (job.rows - row).min(BLOCK_ROWS);
            let first = turn * words_per_block;
            for word in (first..(first + words_per_block).min(panel_words)).step_by(LINE_WORDS) {
                I::prefetch(next.wrapping_add(word));
            }
            // SAFETY: these rows and this panel are there, and the tiles are configured for the
            // rows.
            unsafe {
                if rows != configured_for {
                    configure(rows);
                    configured_for = rows;
                }
                run_block::<D>(job, panel, row..row + rows, &mut sums);
            }
        }
    }
    // SAFETY: the CPU supports AMX, by the caller's guarantee.
    unsafe {
        release();
    }
}

/// One block: its sums, then the epilogue.
///
/// # Safety
/// The CPU supports AMX, and the tiles are configured for the rows; the rows and the panel are the
/// job's.
#[inline(always)]
unsafe fn run_block<D: DotProduct<I> + TileMultiply>(
    job: &GemmJob<'_>,
    panel: usize,
    rows: std::ops::Range<usize>,
    sums: &mut BlockSums,
) {
    let weights = job.weights;
    let first = panel * COLUMNS;
    // SAFETY: packing made whole panels of values and initial sums, with whole tiles of each output's
    // words, and `GemmInput` rows of as many; with no word there is no output and no panel.
    unsafe {
        let block = RowBlock {
            input: job.input.start.add(rows.start * job.input.stride),
            stride: job.input.stride * size_of::<u32>(),
            rows: rows.len(),
            weights: weights.values().add(first * weights.words),
            initial_sums: weights.initial_sums().add(first),
            steps: weights.words / TILE_WORDS,
        };
        accumulate::<D>(&block, sums);
        for (row, sums) in rows.zip(sums.0.chunks_exact(COLUMNS)) {
            let mut results = [I::splat(0.0); TILES];
            for (result, sums) in results.iter_mut().zip(sums.chunks_exact(I::LANES)) {
                *result = D::floats(D::load(sums.as_ptr()));
            }
            epilogue::<I, D, TILES>(job, row, first, &mut results);
        }
    }
}

/// Multiplies a whole block, `rounds` times, on words that stay in the cache: the peak of GEMM if
/// memory accesses were free.
///
/// # Safety
/// The CPU supports AMX.
pub(in super::super) unsafe fn repeat<const WORDS: usize>(
    dtype: WeightDtype,
    words: &[u32; WORDS],
    rounds: usize,
) {
    const { assert!(WORDS >= COLUMNS * TILE_WORDS) };
    let mut sums = BlockSums([0; BLOCK_ROWS * COLUMNS]);
    let words_per_row = WORDS / COLUMNS / TILE_WORDS * TILE_WORDS;
    let block = RowBlock {
        input: words.as_ptr(),
        stride: words_per_row * size_of::<u32>(),
        rows: BLOCK_ROWS,
        weights: words.as_ptr(),
        initial_sums: words.as_ptr(),
        steps: words_per_row / TILE_WORDS,
    };
    // SAFETY: the words are 64 columns of as many steps, and so of more rows than a block has.
    unsafe {
        configure(BLOCK_ROWS);
        for _ in 0..rounds {
            match dtype {
                WeightDtype::Bf16 => accumulate::<Bf16>(&block, &mut sums),
                WeightDtype::Int8 => accumulate::<Int8>(&block, &mut sums),
                WeightDtype::F32 => {}
            }
        }
        release();
    }
}
