//! Products in tiles: what Intel's Advanced Matrix Extensions add to AVX-512.
//!
//! There are eight registers of 16 rows of 64 bytes. One instruction multiplies the words of a
//! tile of inputs (16 rows, 16 words of each) by those of a tile of weights (16 steps, 16 outputs)
//! and adds to a tile of sums (16 rows, 16 outputs); a panel of packed weights holds its tiles as
//! they are wanted (Intel 64 and IA-32 Architectures Optimization Reference Manual, the chapter
//! on AMX).
//!
//! Two by two tiles of sums need two tiles of each side at a step: twice the work of one load,
//! which is what the multiplier needs to be busy. Few rows are one tile high and go along all
//! four tiles of the panel, so that it is walked once.
//!
//! The compiler knows nothing of tiles. Everything that one holds is made and stored in one block
//! of assembly; only their shapes, which compiled code does not change, outlive a block.

#[cfg(all(test, target_os = "linux", target_env = "gnu"))]
pub(in super::super) mod emulated;
#[cfg(all(test, target_os = "linux", target_env = "gnu"))]
mod tests;

use std::arch::asm;

use super::super::instructions::{Avx512Bf16, Isa};
use super::super::pack::{Precision, TILE_WORDS};
use super::{Bf16, Dot, Int8, Job, LINE_WORDS, TILES_ROWS, finish};

/// The set for what comes after the sums.
type I = Avx512Bf16;

/// Rows of a tile.
const TILE_ROWS: usize = TILES_ROWS / 2;
/// Tiles of sums side by side in a panel, which are as many registers of floats.
const TILES: usize = 4;
/// Columns of a panel.
const COLUMNS: usize = TILES * TILE_WORDS;
/// Rows of a block, which are two tiles.
const BLOCK_ROWS: usize = TILES_ROWS;
/// Bytes from one row of a panel to the next, and from one row of a block's sums.
const LINE: usize = COLUMNS * size_of::<u32>();

/// What the tiles are, as `ldtilecfg` reads it.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    /// Bytes of a row, and rows, of each tile. There are eight.
    bytes: [u16; 16],
    rows: [u8; 16],
}

/// Gives the tiles the shapes for a block of so many rows. All of their contents are lost.
///
/// # Safety
/// The processor has the set; there is a row, and no more than a block's.
unsafe fn shape(rows: usize) {
    let mut shapes = Shapes {
        palette: 1,
        start_row: 0,
        reserved: [0; 14],
        bytes: [0; 16],
        rows: [0; 16],
    };
    let upper = rows.min(TILE_ROWS) as u8;
    let all = TILE_ROWS as u8;
    // As `two_by_two` and `one_by_four` use them.
    let heights = if rows > TILE_ROWS {
        let lower = (rows - TILE_ROWS) as u8;
        [upper, upper, lower, lower, upper, lower, all, all]
    } else {
        [upper, upper, upper, upper, upper, all, all, all]
    };
    shapes.bytes[..8].fill((TILE_WORDS * size_of::<u32>()) as u16);
    shapes.rows[..8].copy_from_slice(&heights);
    // SAFETY: 64 bytes are read at the address, and they are there: a block of assembly may read
    // any memory unless it says otherwise, so that none of the stores above can be left out. The
    // shapes are those that the processor allows.
    unsafe {
        asm!(
            "ldtilecfg [{shapes}]",
            shapes = in(reg) &raw const shapes,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack, preserves_flags),
        );
    }
}

/// Tells the processor that the tiles hold nothing, so that the system need not keep them.
///
/// # Safety
/// The processor has the set.
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

/// Sums on their way from the tiles: words of `[rows, columns]`.
#[repr(C, align(64))]
struct Sums([u32; BLOCK_ROWS * COLUMNS]);

/// Some rows by one panel.
struct Block {
    /// The first row's words.
    input: *const u32,
    /// Bytes from one row to the next.
    stride: usize,
    /// From one to a block's rows.
    rows: usize,
    /// The panel, and what its sums start from.
    weights: *const u32,
    starts: *const u32,
    /// Tiles that each row is long; at least one.
    steps: usize,
}

/// The two ways to a block's sums, for one kind of words.
trait InTiles {
    /// More rows than a tile's, and half of a panel: `pair` is 0 or 1.
    ///
    /// # Safety
    /// The processor has the set, and tiles have the shapes for the block's rows; the block's
    /// pointers have what it says.
    unsafe fn two_by_two(block: &Block, pair: usize, sums: &mut Sums);

    /// At most a tile's rows, and a whole panel.
    ///
    /// # Safety
    /// As above.
    unsafe fn one_by_four(block: &Block, sums: &mut Sums);
}

/// Both ways, with the instruction that multiplies.
///
/// The sums of each row start from the same words: their tiles are loaded with a stride of zero.
macro_rules! in_tiles {
    ($words:ty, $multiply:literal) => {
        impl InTiles for $words {
            #[inline(always)]
            unsafe fn two_by_two(block: &Block, pair: usize, sums: &mut Sums) {
                let columns = pair * 2 * TILE_WORDS;
                // SAFETY: `steps` tiles of each row are read, from the lower ones as many rows as
                // the tiles' shape has; `steps` tiles of two columns of tiles of the panel, and
                // two of starts. The sums of both are written, and lie within the block's.
                unsafe {
                    asm!(
                        "tileloadd tmm0, [{starts} + {zero}]",
                        "tileloadd tmm1, [{starts} + {zero} + 64]",
                        "tileloadd tmm2, [{starts} + {zero}]",
                        "tileloadd tmm3, [{starts} + {zero} + 64]",
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
                        starts = in(reg) block.starts.add(columns),
                        zero = in(reg) 0usize,
                        upper = inout(reg) block.input => _,
                        lower = inout(reg) block.input.byte_add(TILE_ROWS * block.stride) => _,
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
            unsafe fn one_by_four(block: &Block, sums: &mut Sums) {
                // SAFETY: as above, with as many rows as the tiles' shape has and the whole panel.
                unsafe {
                    asm!(
                        "tileloadd tmm0, [{starts} + {zero}]",
                        "tileloadd tmm1, [{starts} + {zero} + 64]",
                        "tileloadd tmm2, [{starts} + {zero} + 128]",
                        "tileloadd tmm3, [{starts} + {zero} + 192]",
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
                        starts = in(reg) block.starts,
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
in_tiles!(Bf16, "tdpbf16ps");
// The first source is unsigned, the second signed.
in_tiles!(Int8, "tdpbusd");

/// The sums of a block.
///
/// # Safety
/// As of [`InTiles::two_by_two`].
#[inline(always)]
unsafe fn add_up<D: InTiles>(block: &Block, sums: &mut Sums) {
    // SAFETY: passed on.
    unsafe {
        if block.rows > TILE_ROWS {
            D::two_by_two(block, 0, sums);
            D::two_by_two(block, 1, sums);
        } else {
            D::one_by_four(block, sums);
        }
    }
}

/// Runs a product with bfloat16 or 8-bit integers, of however few rows: those wait for the panels
/// to come from memory, with tiles or without.
///
/// # Safety
/// The processor has AMX; the job's pointers have the rows that it says.
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
pub(super) unsafe fn run_job(job: &Job<'_>) {
    // SAFETY: passed on.
    unsafe {
        match job.weights.precision {
            Precision::Bf16 => panels::<Bf16>(job),
            Precision::Int8 => panels::<Int8>(job),
            // Never in tiles.
            Precision::F32 => {}
        }
    }
}

#[inline(always)]
unsafe fn panels<D: Dot<I> + InTiles>(job: &Job<'_>) {
    let panel_words = COLUMNS * job.weights.words;
    // Lines of the next panel that each block brings nearer.
    let blocks = job.rows.div_ceil(BLOCK_ROWS);
    let words_per_block = panel_words.div_ceil(blocks.max(1));
    let mut sums = Sums([0; BLOCK_ROWS * COLUMNS]);
    let mut shaped_for = 0;
    for panel in job.panels.clone() {
        let next = job.weights.values().wrapping_add((panel + 1) * panel_words);
        for turn in 0..blocks {
            // Every other panel begins where the one before it ended, because to change the shapes
            // for the last rows and back takes as long as a few tiles.
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
            // SAFETY: these rows and this panel are there, and the tiles have the rows' shapes.
            unsafe {
                if rows != shaped_for {
                    shape(rows);
                    shaped_for = rows;
                }
                part::<D>(job, panel, row..row + rows, &mut sums);
            }
        }
    }
    // SAFETY: the caller has the set.
    unsafe {
        release();
    }
}

/// One block: its sums, then what comes after them.
///
/// # Safety
/// The processor has the set, and tiles have the shapes for the rows; the rows and the panel are
/// the job's.
#[inline(always)]
unsafe fn part<D: Dot<I> + InTiles>(
    job: &Job<'_>,
    panel: usize,
    rows: std::ops::Range<usize>,
    sums: &mut Sums,
) {
    let weights = job.weights;
    let first = panel * COLUMNS;
    // SAFETY: packing made whole panels of values and starts, with whole tiles of each output's
    // words, and `Prepared` rows of as many; with no word there is no output and no panel.
    unsafe {
        let block = Block {
            input: job.input.start.add(rows.start * job.input.stride),
            stride: job.input.stride * size_of::<u32>(),
            rows: rows.len(),
            weights: weights.values().add(first * weights.words),
            starts: weights.starts().add(first),
            steps: weights.words / TILE_WORDS,
        };
        add_up::<D>(&block, sums);
        for (row, sums) in rows.zip(sums.0.chunks_exact(COLUMNS)) {
            let mut results = [I::splat(0.0); TILES];
            for (result, sums) in results.iter_mut().zip(sums.chunks_exact(I::LANES)) {
                *result = D::floats(D::load(sums.as_ptr()));
            }
            finish::<I, D, TILES>(job, (row, first), &mut results);
        }
    }
}

/// The sums of a whole block, `rounds` times, of a row for each of 64 words that is as long as the
/// words allow: what products could do if memory cost nothing.
///
/// # Safety
/// The processor has AMX.
pub(in super::super) unsafe fn repeat<const WORDS: usize>(
    precision: Precision,
    words: &[u32; WORDS],
    rounds: usize,
) {
    const { assert!(WORDS >= COLUMNS * TILE_WORDS) };
    let mut sums = Sums([0; BLOCK_ROWS * COLUMNS]);
    let words_per_row = WORDS / COLUMNS / TILE_WORDS * TILE_WORDS;
    let block = Block {
        input: words.as_ptr(),
        stride: words_per_row * size_of::<u32>(),
        rows: BLOCK_ROWS,
        weights: words.as_ptr(),
        starts: words.as_ptr(),
        steps: words_per_row / TILE_WORDS,
    };
    // SAFETY: the words are 64 columns of as many steps, and so of more rows than a block has.
    unsafe {
        shape(BLOCK_ROWS);
        for _ in 0..rounds {
            match precision {
                Precision::Bf16 => add_up::<Bf16>(&block, &mut sums),
                Precision::Int8 => add_up::<Int8>(&block, &mut sums),
                Precision::F32 => {}
            }
        }
        release();
    }
}
