//! What processors can do with many numbers at once, behind one interface.
//!
//! The kernels are written once, over [`Isa`], and translated once for each instruction set by
//! [`kernel!`](super::kernel). Nothing here may be called before [`Instructions::supported`] has
//! said that the processor has it.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(super) mod amx;
mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::fmt;

pub(super) use portable::Portable;
#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512, Avx512Bf16, Avx512Vnni};

/// An instruction set that the kernels are translated for, from the widest to the plainest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Instructions {
    /// The next, with tiles of bfloat16 and of 8-bit integers (Intel AMX) for the products.
    Amx,
    /// AVX-512 with products of bfloat16 and of 8-bit integers.
    Avx512Bf16,
    /// AVX-512 with products of 8-bit integers.
    Avx512Vnni,
    /// AVX-512 (F, BW, DQ, VL).
    Avx512,
    /// AVX2 with FMA.
    Avx2,
    /// What every processor has.
    Portable,
}

impl Instructions {
    /// All of them, from the widest to the plainest.
    pub const ALL: [Self; 6] = [
        Self::Amx,
        Self::Avx512Bf16,
        Self::Avx512Vnni,
        Self::Avx512,
        Self::Avx2,
        Self::Portable,
    ];

    /// The widest that this processor has.
    pub fn best() -> Self {
        let best = Self::ALL.into_iter().find(|set| set.supported());
        best.unwrap_or(Self::Portable)
    }

    /// Whether this processor, and the system that runs on it, have the set.
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

    /// Whether it multiplies bfloat16 itself; the others widen it to 32 bits first.
    pub fn multiplies_bf16(self) -> bool {
        matches!(self, Self::Amx | Self::Avx512Bf16)
    }

    /// Its name in flags and in the log.
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

    /// Output columns that the products take at a time, which is the width of a panel of packed
    /// weights, and input rows; of AMX, what its products of floats take.
    pub(super) fn tile(self) -> (usize, usize) {
        match self {
            Self::Amx | Self::Avx512Bf16 | Self::Avx512Vnni | Self::Avx512 => (64, 6),
            Self::Avx2 => (16, 6),
            Self::Portable => (16, 2),
        }
    }
}

impl fmt::Display for Instructions {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.as_str())
    }
}

/// One instruction set's registers and what it does with them.
///
/// A register of floats and one of words hold [`LANES`](Isa::LANES) numbers of 32 bits each. A
/// word is what one step of a product takes from each side: one float, two bfloat16 or four
/// 8-bit integers.
///
/// # Safety
/// Every function may be called only on a processor that has the set; the loads and stores read
/// and write as many numbers at the pointer as they say.
pub(super) trait Isa: Copy + 'static {
    /// Numbers in a register.
    const LANES: usize;
    /// A register of floats.
    type F: Copy;
    /// A register of words.
    type W: Copy;

    unsafe fn splat(value: f32) -> Self::F;
    unsafe fn load(from: *const f32) -> Self::F;
    unsafe fn store(to: *mut f32, values: Self::F);
    /// The first `count` lanes, and zeros.
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
    /// The nearest whole numbers.
    unsafe fn round(a: Self::F) -> Self::F;
    /// `a · 2^n`, for whole numbers `n` from -126 to 127.
    unsafe fn scale_by_power(a: Self::F, n: Self::F) -> Self::F;
    unsafe fn sum(a: Self::F) -> f32;
    unsafe fn largest(a: Self::F) -> f32;
    /// Rounds to bfloat16, to the nearest and of two to the even one.
    unsafe fn store_bf16(to: *mut u16, values: Self::F);
    unsafe fn store_bf16_first(to: *mut u16, count: usize, values: Self::F);
    unsafe fn load_bf16(from: *const u16) -> Self::F;
    unsafe fn load_bf16_first(from: *const u16, count: usize) -> Self::F;
    /// Stores whole numbers from 0 to 255 as bytes.
    unsafe fn store_bytes_first(to: *mut u8, count: usize, values: Self::F);

    /// Asks for a line of memory to be brought to the second-level cache. Any address will do.
    fn prefetch(from: *const u32);

    unsafe fn zero_words() -> Self::W;
    unsafe fn load_words(from: *const u32) -> Self::W;
    unsafe fn splat_word(from: *const u32) -> Self::W;
    /// Words that are floats.
    unsafe fn as_floats(words: Self::W) -> Self::F;
    /// Words that are whole numbers, as floats.
    unsafe fn to_floats(words: Self::W) -> Self::F;
    /// To each lane the products of two pairs of bfloat16.
    unsafe fn add_bf16_products(sum: Self::F, a: Self::W, b: Self::W) -> Self::F;
    /// To each lane the products of four bytes of `a` with four signed bytes of `b`.
    unsafe fn add_byte_products(sum: Self::W, a: Self::W, b: Self::W) -> Self::W;
}
