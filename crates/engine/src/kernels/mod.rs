//! The kernels of the forward pass on a CPU: matrix multiplication (GEMM) with packed and, for
//! int8, quantized weights, attention, and the row-wise operations between them.
//!
//! Each kernel is written once over [`simd::Simd`] and compiled for each instruction set; the set
//! that runs is chosen when a model is loaded. Matrices come from an arena, so that a forward pass
//! allocates nothing once it has run. This is the only part of the crate with `unsafe` in it: its
//! public functions check every bound before they pass on a pointer.

#![allow(
    unsafe_code,
    reason = "SIMD on raw pointers into matrices: the only part of the crate with unsafe code"
)]

mod attention;
mod buffer;
mod convert;
mod functions;
mod gemm;
mod matrix;
mod packing;
mod peak;
mod rows;
mod simd;
#[cfg(test)]
mod tests;
mod thread_pool;

pub use attention::{AttentionInput, attend};
pub use functions::Activation;
pub use gemm::matmul;
pub use matrix::{Matrix, MatrixDtype};
pub use packing::{PackedWeights, WeightDtype};
pub use peak::peak;
pub(crate) use rows::{
    EmbeddingLookup, PooledSpan, Pooling, RotaryAngles, add, embed, multiply_elementwise,
    normalize_rows, pool, rotate,
};
pub use rows::{LayerNormParameters, layer_norm};
pub use simd::InstructionSet;
pub use thread_pool::set_threads;
pub(crate) use thread_pool::{parallel_for, threads};

/// Compiles a generic function for each instruction set, and dispatches to the requested one.
///
/// The body is generic over the instruction set, the number of registers side by side in a panel,
/// and the number of rows that the micro-kernel multiplies at a time; together these fill the
/// registers of the set with sums.
///
/// The generated function is `unsafe`: the CPU must support the set, and the body's own conditions
/// must hold.
macro_rules! kernel {
    ($(#[$doc:meta])* fn $name:ident($($argument:ident: $kind:ty),* $(,)?) = $body:ident) => {
        $(#[$doc])*
        unsafe fn $name(
            instructions: $crate::kernels::InstructionSet,
            $($argument: $kind),*
        ) {
            use $crate::kernels::simd as sets;
            // SAFETY (all): the caller guarantees that the CPU supports the set.
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(
                    enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16"
                )]
                unsafe fn avx512bf16($($argument: $kind),*) {
                    unsafe { $body::<sets::Avx512Bf16, 4, 6>($($argument),*) }
                }
                #[target_feature(
                    enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"
                )]
                unsafe fn avx512vnni($($argument: $kind),*) {
                    unsafe { $body::<sets::Avx512Vnni, 4, 6>($($argument),*) }
                }
                #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
                unsafe fn avx512($($argument: $kind),*) {
                    unsafe { $body::<sets::Avx512, 4, 6>($($argument),*) }
                }
                #[target_feature(enable = "avx2,fma")]
                unsafe fn avx2($($argument: $kind),*) {
                    unsafe { $body::<sets::Avx2, 2, 6>($($argument),*) }
                }
                match instructions {
                    // AMX tiles are for GEMM with bf16 and int8 weights, which has its own kernel.
                    $crate::kernels::InstructionSet::Amx
                    | $crate::kernels::InstructionSet::Avx512Bf16 => {
                        return unsafe { avx512bf16($($argument),*) };
                    }
                    $crate::kernels::InstructionSet::Avx512Vnni => {
                        return unsafe { avx512vnni($($argument),*) };
                    }
                    $crate::kernels::InstructionSet::Avx512 => {
                        return unsafe { avx512($($argument),*) };
                    }
                    $crate::kernels::InstructionSet::Avx2 => {
                        return unsafe { avx2($($argument),*) };
                    }
                    $crate::kernels::InstructionSet::Portable => {}
                }
            }
            let _ = instructions;
            unsafe { $body::<sets::Portable, 2, 2>($($argument),*) }
        }
    };
}
use kernel;
