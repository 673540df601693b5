//! Plain loops, which the compiler vectorizes for the baseline of the target.

use half::bf16;

use super::Simd;

const LANES: usize = 8;

/// No instruction set beyond the baseline.
#[derive(Clone, Copy)]
pub(in super::super) struct Portable;

#[inline(always)]
fn each(value: impl FnMut(usize) -> f32) -> [f32; LANES] {
    std::array::from_fn(value)
}

#[inline(always)]
fn pair(word: u32) -> [f32; 2] {
    [
        f32::from_bits(word << 16),
        f32::from_bits(word & 0xffff_0000),
    ]
}

// SAFETY (whole block): the arithmetic requires no CPU feature. The loads and stores access exactly
// the elements that the trait documents, which exist by the caller's guarantee.
impl Simd for Portable {
    const LANES: usize = LANES;
    type F = [f32; LANES];
    type W = [u32; LANES];

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self::F {
        [value; LANES]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::F {
        unsafe { from.cast::<Self::F>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, values: Self::F) {
        unsafe { to.cast::<Self::F>().write_unaligned(values) }
    }
    #[inline(always)]
    unsafe fn load_first(from: *const f32, count: usize) -> Self::F {
        each(|lane| {
            if lane < count {
                unsafe { *from.add(lane) }
            } else {
                0.0
            }
        })
    }
    #[inline(always)]
    unsafe fn store_first(to: *mut f32, count: usize, values: Self::F) {
        for (lane, value) in values.iter().enumerate().take(count) {
            unsafe { *to.add(lane) = *value };
        }
    }
    #[inline(always)]
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
        each(|lane| a[lane] + b[lane])
    }
    #[inline(always)]
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F {
        each(|lane| a[lane] - b[lane])
    }
    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        each(|lane| a[lane] * b[lane])
    }
    #[inline(always)]
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F {
        each(|lane| a[lane] / b[lane])
    }
    #[inline(always)]
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F {
        each(|lane| if a[lane] > b[lane] { a[lane] } else { b[lane] })
    }
    #[inline(always)]
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F {
        each(|lane| if a[lane] < b[lane] { a[lane] } else { b[lane] })
    }
    #[inline(always)]
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // A fused one would be a call of the math library here.
        each(|lane| a[lane] * b[lane] + c[lane])
    }
    #[inline(always)]
    unsafe fn round(a: Self::F) -> Self::F {
        // Added to a float, it leaves the nearest whole number in the lowest bits.
        const MAGIC: f32 = 12_582_912.0;
        each(|lane| (a[lane] + MAGIC) - MAGIC)
    }
    #[inline(always)]
    unsafe fn scale_by_power(a: Self::F, n: Self::F) -> Self::F {
        each(|lane| a[lane] * f32::from_bits(((n[lane] as i32 + 127) as u32) << 23))
    }
    #[inline(always)]
    unsafe fn sum(a: Self::F) -> f32 {
        a.iter().sum()
    }
    #[inline(always)]
    unsafe fn largest(a: Self::F) -> f32 {
        a.iter().copied().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    unsafe fn store_bf16(to: *mut u16, values: Self::F) {
        unsafe { Self::store_bf16_first(to, LANES, values) }
    }
    #[inline(always)]
    unsafe fn store_bf16_first(to: *mut u16, count: usize, values: Self::F) {
        for (lane, value) in values.iter().enumerate().take(count) {
            unsafe { *to.add(lane) = bf16::from_f32(*value).to_bits() };
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self::F {
        unsafe { Self::load_bf16_first(from, LANES) }
    }
    #[inline(always)]
    unsafe fn load_bf16_first(from: *const u16, count: usize) -> Self::F {
        each(|lane| {
            if lane < count {
                f32::from_bits(u32::from(unsafe { *from.add(lane) }) << 16)
            } else {
                0.0
            }
        })
    }
    #[inline(always)]
    unsafe fn store_bytes_first(to: *mut u8, count: usize, values: Self::F) {
        for (lane, value) in values.iter().enumerate().take(count) {
            unsafe { *to.add(lane) = *value as u8 };
        }
    }

    #[inline(always)]
    fn prefetch(_from: *const u32) {}

    #[inline(always)]
    unsafe fn zero_words() -> Self::W {
        [0; LANES]
    }
    #[inline(always)]
    unsafe fn load_words(from: *const u32) -> Self::W {
        unsafe { from.cast::<Self::W>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn splat_word(from: *const u32) -> Self::W {
        [unsafe { *from }; LANES]
    }
    #[inline(always)]
    unsafe fn as_floats(words: Self::W) -> Self::F {
        words.map(f32::from_bits)
    }
    #[inline(always)]
    unsafe fn to_floats(words: Self::W) -> Self::F {
        words.map(|word| word as i32 as f32)
    }
    #[inline(always)]
    unsafe fn add_bf16_products(sum: Self::F, a: Self::W, b: Self::W) -> Self::F {
        each(|lane| {
            let ([a_low, a_high], [b_low, b_high]) = (pair(a[lane]), pair(b[lane]));
            sum[lane] + a_low * b_low + a_high * b_high
        })
    }
    #[inline(always)]
    unsafe fn add_byte_products(sum: Self::W, a: Self::W, b: Self::W) -> Self::W {
        // Byte by byte over all lanes, which the compiler can vectorize.
        let mut sum = sum.map(|sum| sum as i32);
        for shift in [0, 8, 16, 24] {
            for lane in 0..LANES {
                let a = (a[lane] >> shift & 0xff) as i32;
                let b = (b[lane] << (24 - shift)) as i32 >> 24;
                sum[lane] += a * b;
            }
        }
        sum.map(|sum| sum as u32)
    }
}
