//! The forward pass on a processor: products with packed weights, attention, and the steps
//! between them.
//!
//! Everything is written once over [`instructions::Isa`] and translated for each instruction set;
//! which one runs is chosen when a model is loaded. Matrices come from an arena, so that a
//! forward pass allocates nothing once it has run. This is the only part of the crate with
//! `unsafe` in it: its public functions check every bound before they hand out a pointer.

#![allow(unsafe_code, reason = "the one place for it")]

mod attention;
mod buffer;
mod convert;
mod functions;
mod instructions;
mod matrix;
mod pack;
mod peak;
mod products;
mod rows;
mod team;
#[cfg(test)]
mod tests;

pub use attention::{Attention, attend};
pub use functions::Activation;
pub use instructions::Instructions;
pub use matrix::{Format, Matrix};
pub use pack::{Packed, Precision};
pub use peak::peak;
pub use products::multiply;
pub(crate) use rows::{Angles, Lookup, Pool, add, embed, multiply_each, pool, rotate};
pub use rows::{NormParameters, norm};
pub use team::set_threads;
pub(crate) use team::{run, threads};

/// Translates a generic function for each instruction set and calls the one that is asked for.
///
/// The body is generic over the set, over how many registers side by side make a panel, and over
/// how many rows a product takes at a time; those fill the set's registers with sums.
///
/// The function it makes is `unsafe`: the processor must have the set, and the body's own
/// conditions hold.
macro_rules! kernel {
    ($(#[$doc:meta])* fn $name:ident($($argument:ident: $kind:ty),* $(,)?) = $body:ident) => {
        $(#[$doc])*
        unsafe fn $name(
            instructions: $crate::kernels::Instructions,
            $($argument: $kind),*
        ) {
            use $crate::kernels::instructions as sets;
            // SAFETY (all): the caller says that the processor has the set.
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
                    // Tiles are for products with narrow weights alone, which go their own way.
                    $crate::kernels::Instructions::Amx
                    | $crate::kernels::Instructions::Avx512Bf16 => {
                        return unsafe { avx512bf16($($argument),*) };
                    }
                    $crate::kernels::Instructions::Avx512Vnni => {
                        return unsafe { avx512vnni($($argument),*) };
                    }
                    $crate::kernels::Instructions::Avx512 => {
                        return unsafe { avx512($($argument),*) };
                    }
                    $crate::kernels::Instructions::Avx2 => {
                        return unsafe { avx2($($argument),*) };
                    }
                    $crate::kernels::Instructions::Portable => {}
                }
            }
            let _ = instructions;
            unsafe { $body::<sets::Portable, 2, 2>($($argument),*) }
        }
    };
}
use kernel;
