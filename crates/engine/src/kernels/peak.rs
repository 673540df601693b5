//! What the processor could do if memory cost nothing: the measure for the products.

use std::time::Instant;

use super::Instructions;
use super::instructions::Isa;
use super::kernel;
use super::pack::Precision;
#[cfg(target_arch = "x86_64")]
use super::products::amx;
use super::products::{Bf16, Dot, F32, Int8, TILES_ROWS, Words, tile};
use super::team;

/// Steps of one measurement, on numbers that stay in the first-level cache.
const STEPS: usize = 64;
const ROUNDS: usize = 4_000;

/// Billions of multiplications and additions in a second, on all cores together, by the products'
/// own inner kernel on numbers that never leave the first-level cache. Zero where the processor
/// does not have the set.
pub fn peak(instructions: Instructions, precision: Precision) -> f64 {
    if !instructions.supported() {
        return 0.0;
    }
    let threads = team::threads();
    let in_tiles = precision.in_tiles(instructions);
    let run = || {
        let start = Instant::now();
        team::run(threads, &|_| {
            let words = [0u32; STEPS * 64];
            let job = Job {
                words: &words,
                precision,
                rounds: ROUNDS,
            };
            // SAFETY: the set is there; the words are a tile's rows, and a panel of any set.
            unsafe {
                #[cfg(target_arch = "x86_64")]
                if in_tiles {
                    return amx::repeat(precision, std::hint::black_box(&words), ROUNDS);
                }
                run_job(instructions, &job);
            }
        });
        start.elapsed().as_secs_f64()
    };
    let best = (0..5).map(|_| run()).fold(f64::MAX, f64::min);
    let (columns, rows) = instructions.tile();
    let rows = if in_tiles { TILES_ROWS } else { rows };
    let products = columns * rows * STEPS * precision.per_word() * ROUNDS * threads;
    2.0 * products as f64 / best / 1e9
}

struct Job<'a> {
    words: &'a [u32; STEPS * 64],
    precision: Precision,
    rounds: usize,
}

kernel! {
    /// Runs a measurement.
    fn run_job(job: &Job<'_>) = rounds
}

/// # Safety
/// The processor has the set.
#[inline(always)]
unsafe fn rounds<I: Isa, const V: usize, const R: usize>(job: &Job<'_>) {
    for _ in 0..job.rounds {
        // SAFETY: passed on.
        unsafe {
            match job.precision {
                Precision::F32 => round::<I, F32, V, R>(job),
                Precision::Bf16 => round::<I, Bf16, V, R>(job),
                Precision::Int8 => round::<I, Int8, V, R>(job),
            }
        }
    }
}

/// # Safety
/// The processor has the set.
#[inline(always)]
unsafe fn round<I: Isa, D: Dot<I>, const V: usize, const R: usize>(job: &Job<'_>) {
    let start = std::hint::black_box(job.words.as_ptr());
    let width = V * I::LANES;
    // SAFETY: `STEPS` rows of at most 64 words are there, and `R` rows of `STEPS` words.
    let sums = unsafe {
        let input = Words {
            start,
            stride: STEPS,
        };
        let weights = Words {
            start,
            stride: width,
        };
        tile::<I, D, V, R>(input, weights, STEPS, [D::zero(); V])
    };
    std::hint::black_box(&sums);
}
