//! Elementwise functions over a SIMD register: exponentials and activation functions.

use super::simd::Simd;

/// An activation function, applied to each element.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// No change.
    Identity,
    /// Gaussian error linear unit by the error function (Hendrycks and Gimpel 2016).
    Gelu,
    /// The same by its tanh approximation.
    GeluTanh,
    /// max(x, 0).
    Relu,
    /// x times its sigmoid.
    Silu,
    /// Hyperbolic tangent.
    Tanh,
}

/// e^x to within 2 units in the last place for x from -87 to 88, clamped beyond: e^x =
/// 2^n · e^r with |r| at most half the logarithm of 2, and e^r by its Taylor series.
///
/// # Safety
/// The CPU supports the instruction set.
#[inline(always)]
pub(super) unsafe fn exp<I: Simd>(value: I::F) -> I::F {
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    // SAFETY: arithmetic of a set that the CPU supports, by the caller's guarantee.
    unsafe {
        let value = I::min(I::max(value, I::splat(-87.0)), I::splat(88.0));
        let power = I::round(I::mul(value, I::splat(std::f32::consts::LOG2_E)));
        let rest = I::fma(power, I::splat(-LN_2_HIGH), value);
        let rest = I::fma(power, I::splat(-LN_2_LOW), rest);
        let mut series = I::splat(1.0 / 720.0);
        for term in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
            series = I::fma(series, rest, I::splat(term));
        }
        I::scale_by_power(series, power)
    }
}

/// 2^x to within 1 unit in the last place for x up to 0; no less than 2^-126.
///
/// # Safety
/// The CPU supports the instruction set.
#[inline(always)]
pub(super) unsafe fn power_of_two<I: Simd>(value: I::F) -> I::F {
    // Fitted to 2^r for |r| at most a half, for the least largest relative error.
    const SERIES: [f32; 5] = [0.009_675_542, 0.055_507_133, 0.240_221_2, 0.693_146_97, 1.0];
    // SAFETY: arithmetic of a set that the CPU supports, by the caller's guarantee.
    unsafe {
        let value = I::max(value, I::splat(-126.0));
        let power = I::round(value);
        let rest = I::sub(value, power);
        let mut series = I::splat(0.001_327_647_2);
        for term in SERIES {
            series = I::fma(series, rest, I::splat(term));
        }
        I::scale_by_power(series, power)
    }
}

/// A polynomial for the Gaussian error linear unit.
///
/// x · Φ(x) is x · (½ + x · q(x²)), and q is smooth: here a polynomial in 2x²/end² - 1, fitted on
/// -end to end for the least largest error of the whole (Lawson's iteration). Beyond the end the
/// function is x or 0.
struct GeluPolynomial<const TERMS: usize> {
    end: f32,
    first: f32,
    terms: [f32; TERMS],
}

/// Within 1.5e-6 everywhere.
const GELU: GeluPolynomial<12> = GeluPolynomial {
    end: 5.0,
    first: 0.000_492_969,
    terms: [
        -0.001_514_153_9,
        0.002_001_861_6,
        -0.002_915_672_7,
        0.006_165_429,
        -0.010_973_232,
        0.016_497_657,
        -0.023_336_73,
        0.031_426_23,
        -0.040_432_95,
        0.051_521_42,
        -0.070_296_65,
        0.141_363_78,
    ],
};

/// Within 3.4e-5 everywhere: enough where the result is rounded to bfloat16.
const GELU_ROUNDED: GeluPolynomial<8> = GeluPolynomial {
    end: 4.5,
    first: 0.003_353_687_5,
    terms: [
        -0.009_328_535,
        0.012_208_528,
        -0.016_744_05,
        0.027_629_402,
        -0.040_555_768,
        0.054_818_567,
        -0.077_171_96,
        0.156_902_12,
    ],
};

/// x · Φ(x), the Gaussian error linear unit by the error function.
///
/// # Safety
/// The CPU supports the instruction set.
#[inline(always)]
pub(super) unsafe fn gelu<I: Simd>(value: I::F) -> I::F {
    // SAFETY: passed on to the caller.
    unsafe { gelu_polynomial::<I, 12>(value, &GELU) }
}

/// The same, to be rounded to bfloat16.
///
/// # Safety
/// The CPU supports the instruction set.
#[inline(always)]
pub(super) unsafe fn gelu_rounded<I: Simd>(value: I::F) -> I::F {
    // SAFETY: passed on to the caller.
    unsafe { gelu_polynomial::<I, 8>(value, &GELU_ROUNDED) }
}

#[inline(always)]
unsafe fn gelu_polynomial<I: Simd, const TERMS: usize>(
    value: I::F,
    polynomial: &GeluPolynomial<TERMS>,
) -> I::F {
    // SAFETY: arithmetic of a set that the CPU supports, by the caller's guarantee.
    unsafe {
        let square = I::mul(value, value);
        let scale = I::splat(2.0 / (polynomial.end * polynomial.end));
        let argument = I::min(I::fma(square, scale, I::splat(-1.0)), I::splat(1.0));
        let mut series = I::splat(polynomial.first);
        for term in polynomial.terms {
            series = I::fma(series, argument, I::splat(term));
        }
        let share = I::mul(series, value);
        let share = I::min(I::max(share, I::splat(-0.5)), I::splat(0.5));
        I::fma(value, share, I::mul(value, I::splat(0.5)))
    }
}

/// The same by its tanh approximation: 0.5 · (1 + tanh(y)) is the sigmoid of 2y.
///
/// # Safety
/// The CPU supports the instruction set.
#[inline(always)]
pub(super) unsafe fn gelu_tanh<I: Simd>(value: I::F) -> I::F {
    // SAFETY: arithmetic of a set that the CPU supports, by the caller's guarantee.
    unsafe {
        let square = I::mul(value, value);
        let slope = I::fma(square, I::splat(0.044_715 * 1.595_769), I::splat(1.595_769));
        I::mul(value, sigmoid::<I>(I::mul(value, slope)))
    }
}

/// x times its sigmoid.
///
/// # Safety
/// The CPU supports the instruction set.
#[inline(always)]
pub(super) unsafe fn silu<I: Simd>(value: I::F) -> I::F {
    // SAFETY: arithmetic of a set that the CPU supports, by the caller's guarantee.
    unsafe { I::mul(value, sigmoid::<I>(value)) }
}

/// The hyperbolic tangent: 2 · sigmoid(2x) - 1, which keeps six digits after the point.
///
/// # Safety
/// The CPU supports the instruction set.
#[inline(always)]
pub(super) unsafe fn tanh<I: Simd>(value: I::F) -> I::F {
    // SAFETY: arithmetic of a set that the CPU supports, by the caller's guarantee.
    unsafe {
        let sigmoid = sigmoid::<I>(I::add(value, value));
        I::sub(I::add(sigmoid, sigmoid), I::splat(1.0))
    }
}

/// max(x, 0).
///
/// # Safety
/// The CPU supports the instruction set.
#[inline(always)]
pub(super) unsafe fn relu<I: Simd>(value: I::F) -> I::F {
    // SAFETY: arithmetic of a set that the CPU supports, by the caller's guarantee.
    unsafe { I::max(value, I::splat(0.0)) }
}

#[inline(always)]
unsafe fn sigmoid<I: Simd>(value: I::F) -> I::F {
    // SAFETY: arithmetic of a set that the CPU supports, by the caller's guarantee.
    unsafe {
        let inverse = exp::<I>(I::sub(I::splat(0.0), value));
        I::div(I::splat(1.0), I::add(I::splat(1.0), inverse))
    }
}
