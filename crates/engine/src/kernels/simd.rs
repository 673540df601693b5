//! SIMD: the instruction sets of CPUs behind one trait.
//!
//! The kernels are written once, over [`Simd`], and compiled once for each instruction set by
//! [`kernel!`](super::kernel). Nothing here may be called before [`InstructionSet::supported`] has
//! returned true.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(super) mod amx;
mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::fmt;

pub(super) use portable::Portable;
#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512, Avx512Bf16, Avx512Vnni};

/// An instruction set that the kernels are compiled for, from the widest to the most portable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InstructionSet {
    /// The next, with tiles of bfloat16 and int8 (Intel AMX) for GEMM.
    Amx,
    /// AVX-512 with dot products of bfloat16 (BF16) and of int8 (VNNI).
    Avx512Bf16,
    /// AVX-512 with dot products of int8 (VNNI).
    Avx512Vnni,
    /// AVX-512 (F, BW, DQ, VL).
    Avx512,
    /// AVX2 with FMA.
    Avx2,
    /// The baseline of the compilation target, which every CPU of it supports.
    Portable,
}

impl InstructionSet {
    /// All of them, from the widest to the most portable.
    pub const ALL: [Self; 6] = [
        Self::Amx,
        Self::Avx512Bf16,
        Self::Avx512Vnni,
        Self::Avx512,
        Self::Avx2,
        Self::Portable,
    ];

    /// The widest that this CPU supports.
    pub fn best() -> Self {
        let best = Self::ALL.into_iter().find(|set| set.supported());
        best.unwrap_or(Self::Portable)
    }

    /// Whether this CPU and its operating system support the set.
    pub fn supported(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            let avx512 = || {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && Self::Avx2.supported()
            };
            match self {
                #[cfg(target_os = "linux")]
                Self::Amx => Self::Avx512Bf16.supported() && amx::supported(),
                #[cfg(not(target_os = "linux"))]
                Self::Amx => false,
                Self::Avx512Bf16 => {
                    Self::Avx512Vnni.supported() && is_x86_feature_detected!("avx512bf16")
                }
                Self::Avx512Vnni => avx512() && is_x86_feature_detected!("avx512vnni"),
                Self::Avx512 => avx512(),
                Self::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
                Self::Portable => true,
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            self == Self::Portable
        }
    }

    /// Whether it has instructions for bfloat16; the others widen it to 32 bits first.
    pub fn multiplies_bf16(self) -> bool {
        matches!(self, Self::Amx | Self::Avx512Bf16)
    }

    /// Its name in flags, configuration files and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Amx => "amx",
            Self::Avx512Bf16 => "avx512bf16",
            Self::Avx512Vnni => "avx512vnni",
            Self::Avx512 => "avx512",
            Self::Avx2 => "avx2",
            Self::Portable => "portable",
        }
    }

    /// Columns and rows that the micro-kernel multiplies at a time; the columns are the width of a
    /// panel of packed weights. For AMX, those of its micro-kernel for f32.
    pub(super) fn gemm_tile(self) -> (usize, usize) {
        match self {
            Self::Amx | Self::Avx512Bf16 | Self::Avx512Vnni | Self::Avx512 => (64, 6),
            Self::Avx2 => (16, 6),
            Self::Portable => (16, 2),
        }
    }
}

impl fmt::Display for InstructionSet {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.as_str())
    }
}

/// The registers of one instruction set and their operations.
///
/// A register of floats and one of words have [`LANES`](Simd::LANES) lanes of 32 bits each. A word
/// is what one step of a dot product takes from each operand: one float, two bfloat16 or four
/// 8-bit integers.
///
/// # Safety
/// Every function may be called only on a CPU that supports the set; the loads and stores read and
/// write as many elements at the pointer as they document.
pub(super) trait Simd: Copy + 'static {
    /// Lanes of a register.
    const LANES: usize;
    /// A register of floats.
    type F: Copy;
    /// A register of words.
    type W: Copy;

    unsafe fn splat(value: f32) -> Self::F;
    unsafe fn load(from: *const f32) -> Self::F;
    unsafe fn store(to: *mut f32, values: Self::F);
    /// Loads the first `count` lanes; the others are zeros.
    unsafe fn load_first(from: *const f32, count: usize) -> Self::F;
    unsafe fn store_first(to: *mut f32, count: usize, values: Self::F);
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F;
    /// `a · b + c`.
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// Rounds to the nearest whole number.
    unsafe fn round(a: Self::F) -> Self::F;
    /// `a · 2^n`, for whole numbers `n` from -126 to 127.
    unsafe fn scale_by_power(a: Self::F, n: Self::F) -> Self::F;
    /// The sum of all lanes.
    unsafe fn sum(a: Self::F) -> f32;
    /// The largest lane.
    unsafe fn largest(a: Self::F) -> f32;
    /// Rounds to bfloat16, to the nearest and ties to even.
    unsafe fn store_bf16(to: *mut u16, values: Self::F);
    unsafe fn store_bf16_first(to: *mut u16, count: usize, values: Self::F);
    unsafe fn load_bf16(from: *const u16) -> Self::F;
    unsafe fn load_bf16_first(from: *const u16, count: usize) -> Self::F;
    /// Stores whole numbers from 0 to 255 as bytes.
    unsafe fn store_bytes_first(to: *mut u8, count: usize, values: Self::F);

    /// Prefetches a cache line to the second-level cache. Any address is allowed.
    fn prefetch(from: *const u32);

    unsafe fn zero_words() -> Self::W;
    unsafe fn load_words(from: *const u32) -> Self::W;
    unsafe fn splat_word(from: *const u32) -> Self::W;
    /// Reinterprets words as floats.
    unsafe fn as_floats(words: Self::W) -> Self::F;
    /// Converts words from signed integers to floats.
    unsafe fn to_floats(words: Self::W) -> Self::F;
    /// Adds to each lane the dot product of two pairs of bfloat16.
    unsafe fn add_bf16_products(sum: Self::F, a: Self::W, b: Self::W) -> Self::F;
    /// Adds to each lane the dot product of four unsigned bytes of `a` with four signed bytes of `b`.
    unsafe fn add_byte_products(sum: Self::W, a: Self::W, b: Self::W) -> Self::W;
}
