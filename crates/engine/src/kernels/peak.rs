//! The peak throughput of the CPU if memory accesses were free: the reference for the GEMM
//! benchmarks.

use std::time::Instant;

use super::InstructionSet;
#[cfg(target_arch = "x86_64")]
use super::gemm::amx;
use super::gemm::{AMX_BLOCK_ROWS, Bf16, DotProduct, F32, Int8, WordRows, micro_kernel};
use super::kernel;
use super::packing::WeightDtype;
use super::simd::Simd;
use super::thread_pool;

/// Steps of one measurement, on words that stay in the first-level cache.
const STEPS: usize = 64;
const ROUNDS: usize = 4_000;

/// GFLOP/s (billions of multiplications and additions per second) of all cores together, by the
/// GEMM micro-kernel on words that never leave the first-level cache. Zero where the CPU does not
/// support the instruction set.
pub fn peak(instructions: InstructionSet, dtype: WeightDtype) -> f64 {
    if !instructions.supported() {
        return 0.0;
    }
    let threads = thread_pool::threads();
    let uses_tiles = dtype.uses_tiles(instructions);
    let run = || {
        let start = Instant::now();
        thread_pool::parallel_for(threads, &|_| {
            let words = [0u32; STEPS * 64];
            let job = PeakJob {
                words: &words,
                dtype,
                rounds: ROUNDS,
            };
            // SAFETY: the CPU supports the set; the words are a tile's rows and a panel of any
            // set.
            unsafe {
                #[cfg(target_arch = "x86_64")]
                if uses_tiles {
                    return amx::repeat(dtype, std::hint::black_box(&words), ROUNDS);
                }
                run_peak(instructions, &job);
            }
        });
        start.elapsed().as_secs_f64()
    };
    let best = (0..5).map(|_| run()).fold(f64::MAX, f64::min);
    let (columns, rows) = instructions.gemm_tile();
    let rows = if uses_tiles { AMX_BLOCK_ROWS } else { rows };
    let products = columns * rows * STEPS * dtype.elements_per_word() * ROUNDS * threads;
    2.0 * products as f64 / best / 1e9
}

struct PeakJob<'a> {
    words: &'a [u32; STEPS * 64],
    dtype: WeightDtype,
    rounds: usize,
}

kernel! {
    /// Runs a measurement.
    fn run_peak(job: &PeakJob<'_>) = rounds
}

/// # Safety
/// The CPU supports the set.
#[inline(always)]
unsafe fn rounds<I: Simd, const V: usize, const R: usize>(job: &PeakJob<'_>) {
    for _ in 0..job.rounds {
        // SAFETY: passed on to the caller.
        unsafe {
            match job.dtype {
                WeightDtype::F32 => round::<I, F32, V, R>(job),
                WeightDtype::Bf16 => round::<I, Bf16, V, R>(job),
                WeightDtype::Int8 => round::<I, Int8, V, R>(job),
            }
        }
    }
}

/// # Safety
/// The CPU supports the set.
#[inline(always)]
unsafe fn round<I: Simd, D: DotProduct<I>, const V: usize, const R: usize>(job: &PeakJob<'_>) {
    let start = std::hint::black_box(job.words.as_ptr());
    let width = V * I::LANES;
    // SAFETY: `STEPS` rows of at most 64 words are there, and `R` rows of `STEPS` words.
    let sums = unsafe {
        let input = WordRows {
            start,
            stride: STEPS,
        };
        let weights = WordRows {
            start,
            stride: width,
        };
        micro_kernel::<I, D, V, R>(input, weights, STEPS, [D::zero(); V])
    };
    std::hint::black_box(&sums);
}
