//! AVX2 and AVX-512, with intrinsics.

use std::arch::x86_64::*;

use super::Simd;

/// AVX2 with FMA: 16 registers of 8 floats.
#[derive(Clone, Copy)]
pub(in super::super) struct Avx2;

/// AVX-512 without instructions for bf16 and int8: 32 registers of 16 floats.
#[derive(Clone, Copy)]
pub(in super::super) struct Avx512;

/// AVX-512 with VNNI.
#[derive(Clone, Copy)]
pub(in super::super) struct Avx512Vnni;

/// AVX-512 with VNNI and BF16.
#[derive(Clone, Copy)]
pub(in super::super) struct Avx512Bf16;

/// All ones in the first `count` lanes of eight.
#[inline(always)]
unsafe fn first_of_8(count: usize) -> __m256i {
    // SAFETY: the CPU supports AVX2, by the caller's guarantee.
    unsafe {
        let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        _mm256_cmpgt_epi32(_mm256_set1_epi32(count as i32), lanes)
    }
}

// SAFETY (whole block): the CPU supports AVX2 and FMA, by the caller's guarantee. Whole loads and
// stores access 8 lanes; the masked ones, and those through an array, only the first `count`.
impl Simd for Avx2 {
    const LANES: usize = 8;
    type F = __m256;
    type W = __m256i;

    #[inline(always)]
    unsafe fn splat(value: f32) -> __m256 {
        unsafe { _mm256_set1_ps(value) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m256 {
        unsafe { _mm256_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, values: __m256) {
        unsafe { _mm256_storeu_ps(to, values) }
    }
    #[inline(always)]
    unsafe fn load_first(from: *const f32, count: usize) -> __m256 {
        unsafe { _mm256_maskload_ps(from, first_of_8(count)) }
    }
    #[inline(always)]
    unsafe fn store_first(to: *mut f32, count: usize, values: __m256) {
        unsafe { _mm256_maskstore_ps(to, first_of_8(count), values) }
    }
    #[inline(always)]
    unsafe fn add(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_sub_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn div(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_div_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn max(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_max_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn min(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_min_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn round(a: __m256) -> __m256 {
        unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
    }
    #[inline(always)]
    unsafe fn scale_by_power(a: __m256, n: __m256) -> __m256 {
        unsafe {
            let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent)))
        }
    }
    #[inline(always)]
    unsafe fn sum(a: __m256) -> f32 {
        unsafe {
            let half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
            _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)))
        }
    }
    #[inline(always)]
    unsafe fn largest(a: __m256) -> f32 {
        unsafe {
            let half = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let quarter = _mm_max_ps(half, _mm_movehl_ps(half, half));
            _mm_cvtss_f32(_mm_max_ss(quarter, _mm_movehdup_ps(quarter)))
        }
    }
    #[inline(always)]
    unsafe fn store_bf16(to: *mut u16, values: __m256) {
        unsafe { _mm_storeu_si128(to.cast(), bf16_of_8(values)) }
    }
    #[inline(always)]
    unsafe fn store_bf16_first(to: *mut u16, count: usize, values: __m256) {
        unsafe {
            let mut all = [0u16; 8];
            _mm_storeu_si128(all.as_mut_ptr().cast(), bf16_of_8(values));
            to.copy_from_nonoverlapping(all.as_ptr(), count.min(8));
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> __m256 {
        unsafe {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        }
    }
    #[inline(always)]
    unsafe fn load_bf16_first(from: *const u16, count: usize) -> __m256 {
        unsafe {
            let mut all = [0u16; 8];
            all.as_mut_ptr()
                .copy_from_nonoverlapping(from, count.min(8));
            Self::load_bf16(all.as_ptr())
        }
    }
    #[inline(always)]
    unsafe fn store_bytes_first(to: *mut u8, count: usize, values: __m256) {
        unsafe {
            let words = _mm256_cvtps_epi32(values);
            let low = _mm256_castsi256_si128(words);
            let pairs = _mm_packus_epi32(low, _mm256_extracti128_si256::<1>(words));
            let mut all = [0u8; 16];
            _mm_storeu_si128(all.as_mut_ptr().cast(), _mm_packus_epi16(pairs, pairs));
            to.copy_from_nonoverlapping(all.as_ptr(), count.min(8));
        }
    }

    #[inline(always)]
    fn prefetch(from: *const u32) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(from.cast()) }
    }

    #[inline(always)]
    unsafe fn zero_words() -> __m256i {
        unsafe { _mm256_setzero_si256() }
    }
    #[inline(always)]
    unsafe fn load_words(from: *const u32) -> __m256i {
        unsafe { _mm256_loadu_si256(from.cast()) }
    }
    #[inline(always)]
    unsafe fn splat_word(from: *const u32) -> __m256i {
        unsafe { _mm256_set1_epi32(*from as i32) }
    }
    #[inline(always)]
    unsafe fn as_floats(words: __m256i) -> __m256 {
        unsafe { _mm256_castsi256_ps(words) }
    }
    #[inline(always)]
    unsafe fn to_floats(words: __m256i) -> __m256 {
        unsafe { _mm256_cvtepi32_ps(words) }
    }
    #[inline(always)]
    unsafe fn add_bf16_products(sum: __m256, a: __m256i, b: __m256i) -> __m256 {
        unsafe {
            let low = |words| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words));
            let high = _mm256_set1_epi32(0xffff_0000_u32 as i32);
            let high = |words| _mm256_castsi256_ps(_mm256_and_si256(words, high));
            let sum = _mm256_fmadd_ps(low(a), low(b), sum);
            _mm256_fmadd_ps(high(a), high(b), sum)
        }
    }
    #[inline(always)]
    unsafe fn add_byte_products(sum: __m256i, a: __m256i, b: __m256i) -> __m256i {
        // Widened to 16 bits first: sums of products of bytes would saturate in 16 bits.
        unsafe {
            let even = _mm256_set1_epi16(0xff);
            let a_even = _mm256_and_si256(a, even);
            let a_odd = _mm256_srli_epi16::<8>(a);
            let b_even = _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(b));
            let b_odd = _mm256_srai_epi16::<8>(b);
            let sum = _mm256_add_epi32(sum, _mm256_madd_epi16(a_even, b_even));
            _mm256_add_epi32(sum, _mm256_madd_epi16(a_odd, b_odd))
        }
    }
}

/// Rounds eight floats to bfloat16, to the nearest and ties to even. A NaN stays a NaN.
#[inline(always)]
unsafe fn bf16_of_8(values: __m256) -> __m128i {
    // SAFETY: the CPU supports AVX2, by the caller's guarantee.
    unsafe {
        let bits = _mm256_castps_si256(values);
        let is_even = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let bias = _mm256_add_epi32(is_even, _mm256_set1_epi32(0x7fff));
        let rounded = _mm256_srli_epi32::<16>(_mm256_add_epi32(bits, bias));
        let is_nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(values, values));
        let rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), is_nan);
        let low = _mm256_castsi256_si128(rounded);
        _mm_packus_epi32(low, _mm256_extracti128_si256::<1>(rounded))
    }
}

/// Rounds sixteen floats to bfloat16, for sets without an instruction for it.
#[inline(always)]
unsafe fn bf16_of_16(values: __m512) -> __m256i {
    // SAFETY: the CPU supports AVX-512 F, BW, DQ and VL, by the caller's guarantee.
    unsafe {
        let low = bf16_of_8(_mm512_castps512_ps256(values));
        let high = bf16_of_8(_mm512_extractf32x8_ps::<1>(values));
        _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(low), high)
    }
}

/// The first `count` lanes of sixteen.
#[inline(always)]
fn first_of_16(count: usize) -> __mmask16 {
    ((1u32 << count.min(16)) - 1) as __mmask16
}

/// Implements [`Simd`] for AVX-512 and its extensions, which differ in bf16 and int8.
macro_rules! avx512 {
    ($set:ty, $to_bf16:expr, $bf16_products:expr, $byte_products:expr) => {
        // SAFETY (whole block): the CPU supports the set, by the caller's guarantee. Whole loads
        // and stores access 16 lanes; the masked ones only the first `count`.
        impl Simd for $set {
            const LANES: usize = 16;
            type F = __m512;
            type W = __m512i;

            #[inline(always)]
            unsafe fn splat(value: f32) -> __m512 {
                unsafe { _mm512_set1_ps(value) }
            }
            #[inline(always)]
            unsafe fn load(from: *const f32) -> __m512 {
                unsafe { _mm512_loadu_ps(from) }
            }
            #[inline(always)]
            unsafe fn store(to: *mut f32, values: __m512) {
                unsafe { _mm512_storeu_ps(to, values) }
            }
            #[inline(always)]
            unsafe fn load_first(from: *const f32, count: usize) -> __m512 {
                unsafe { _mm512_maskz_loadu_ps(first_of_16(count), from) }
            }
            #[inline(always)]
            unsafe fn store_first(to: *mut f32, count: usize, values: __m512) {
                unsafe { _mm512_mask_storeu_ps(to, first_of_16(count), values) }
            }
            #[inline(always)]
            unsafe fn add(a: __m512, b: __m512) -> __m512 {
                unsafe { _mm512_add_ps(a, b) }
            }
            #[inline(always)]
            unsafe fn sub(a: __m512, b: __m512) -> __m512 {
                unsafe { _mm512_sub_ps(a, b) }
            }
            #[inline(always)]
            unsafe fn mul(a: __m512, b: __m512) -> __m512 {
                unsafe { _mm512_mul_ps(a, b) }
            }
            #[inline(always)]
            unsafe fn div(a: __m512, b: __m512) -> __m512 {
                unsafe { _mm512_div_ps(a, b) }
            }
            #[inline(always)]
            unsafe fn max(a: __m512, b: __m512) -> __m512 {
                unsafe { _mm512_max_ps(a, b) }
            }
            #[inline(always)]
            unsafe fn min(a: __m512, b: __m512) -> __m512 {
                unsafe { _mm512_min_ps(a, b) }
            }
            #[inline(always)]
            unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
                unsafe { _mm512_fmadd_ps(a, b, c) }
            }
            #[inline(always)]
            unsafe fn round(a: __m512) -> __m512 {
                unsafe { _mm512_roundscale_ps::<_MM_FROUND_TO_NEAREST_INT>(a) }
            }
            #[inline(always)]
            unsafe fn scale_by_power(a: __m512, n: __m512) -> __m512 {
                unsafe { _mm512_scalef_ps(a, n) }
            }
            #[inline(always)]
            unsafe fn sum(a: __m512) -> f32 {
                unsafe { _mm512_reduce_add_ps(a) }
            }
            #[inline(always)]
            unsafe fn largest(a: __m512) -> f32 {
                unsafe { _mm512_reduce_max_ps(a) }
            }
            #[inline(always)]
            unsafe fn store_bf16(to: *mut u16, values: __m512) {
                unsafe { _mm256_storeu_si256(to.cast(), $to_bf16(values)) }
            }
            #[inline(always)]
            unsafe fn store_bf16_first(to: *mut u16, count: usize, values: __m512) {
                unsafe {
                    _mm256_mask_storeu_epi16(to.cast(), first_of_16(count), $to_bf16(values));
                }
            }
            #[inline(always)]
            unsafe fn load_bf16(from: *const u16) -> __m512 {
                unsafe {
                    let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
                }
            }
            #[inline(always)]
            unsafe fn load_bf16_first(from: *const u16, count: usize) -> __m512 {
                unsafe {
                    let mask = first_of_16(count);
                    let narrow = _mm256_maskz_loadu_epi16(mask, from.cast());
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(narrow)))
                }
            }
            #[inline(always)]
            unsafe fn store_bytes_first(to: *mut u8, count: usize, values: __m512) {
                unsafe {
                    let bytes = _mm512_cvtusepi32_epi8(_mm512_cvtps_epu32(values));
                    _mm_mask_storeu_epi8(to.cast(), first_of_16(count), bytes);
                }
            }

            #[inline(always)]
            fn prefetch(from: *const u32) {
                unsafe { _mm_prefetch::<_MM_HINT_T1>(from.cast()) }
            }

            #[inline(always)]
            unsafe fn zero_words() -> __m512i {
                unsafe { _mm512_setzero_si512() }
            }
            #[inline(always)]
            unsafe fn load_words(from: *const u32) -> __m512i {
                unsafe { _mm512_loadu_si512(from.cast()) }
            }
            #[inline(always)]
            unsafe fn splat_word(from: *const u32) -> __m512i {
                unsafe { _mm512_set1_epi32(from.cast::<i32>().read_unaligned()) }
            }
            #[inline(always)]
            unsafe fn as_floats(words: __m512i) -> __m512 {
                unsafe { _mm512_castsi512_ps(words) }
            }
            #[inline(always)]
            unsafe fn to_floats(words: __m512i) -> __m512 {
                unsafe { _mm512_cvtepi32_ps(words) }
            }
            #[inline(always)]
            unsafe fn add_bf16_products(sum: __m512, a: __m512i, b: __m512i) -> __m512 {
                unsafe { $bf16_products(sum, a, b) }
            }
            #[inline(always)]
            unsafe fn add_byte_products(sum: __m512i, a: __m512i, b: __m512i) -> __m512i {
                unsafe { $byte_products(sum, a, b) }
            }
        }
    };
}

#[inline(always)]
unsafe fn widened_bf16_products(sum: __m512, a: __m512i, b: __m512i) -> __m512 {
    // SAFETY: the CPU supports AVX-512 F, by the caller's guarantee.
    unsafe {
        let high = _mm512_set1_epi32(0xffff_0000_u32 as i32);
        let a_low = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(a));
        let b_low = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(b));
        let a_high = _mm512_castsi512_ps(_mm512_and_si512(a, high));
        let b_high = _mm512_castsi512_ps(_mm512_and_si512(b, high));
        _mm512_fmadd_ps(a_high, b_high, _mm512_fmadd_ps(a_low, b_low, sum))
    }
}

#[inline(always)]
unsafe fn widened_byte_products(sum: __m512i, a: __m512i, b: __m512i) -> __m512i {
    // SAFETY: the CPU supports AVX-512 BW, by the caller's guarantee. Widened to 16 bits, since sums
    // of products of bytes would saturate in 16 bits.
    unsafe {
        let a_even = _mm512_and_si512(a, _mm512_set1_epi16(0xff));
        let a_odd = _mm512_srli_epi16::<8>(a);
        let b_even = _mm512_srai_epi16::<8>(_mm512_slli_epi16::<8>(b));
        let b_odd = _mm512_srai_epi16::<8>(b);
        let sum = _mm512_add_epi32(sum, _mm512_madd_epi16(a_even, b_even));
        _mm512_add_epi32(sum, _mm512_madd_epi16(a_odd, b_odd))
    }
}

#[inline(always)]
unsafe fn native_bf16(values: __m512) -> __m256i {
    // SAFETY: the CPU supports AVX-512 BF16; both types are 256 bits.
    unsafe { std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(values)) }
}

#[inline(always)]
unsafe fn native_bf16_products(sum: __m512, a: __m512i, b: __m512i) -> __m512 {
    // SAFETY: the CPU supports AVX-512 BF16; both types are 512 bits.
    unsafe {
        let a = std::mem::transmute::<__m512i, __m512bh>(a);
        let b = std::mem::transmute::<__m512i, __m512bh>(b);
        _mm512_dpbf16_ps(sum, a, b)
    }
}

avx512!(
    Avx512,
    bf16_of_16,
    widened_bf16_products,
    widened_byte_products
);
avx512!(
    Avx512Vnni,
    bf16_of_16,
    widened_bf16_products,
    _mm512_dpbusd_epi32
);
avx512!(
    Avx512Bf16,
    native_bf16,
    native_bf16_products,
    _mm512_dpbusd_epi32
);
