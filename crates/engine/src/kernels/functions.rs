//! Functions of each number in a register.

use super::instructions::Isa;

/// e^x to within 2 units in the last place for x from -87 to 88, and the ends beyond: e^x =
/// 2^n · e^r with |r| at most half the logarithm of 2, and e^r by its Taylor series.
///
/// # Safety
/// The processor has the set.
#[inline(always)]
pub(super) unsafe fn exp<I: Isa>(value: I::F) -> I::F {
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    // SAFETY: arithmetic of a set that the caller has.
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

/// x · Φ(x), the Gaussian error linear unit, by the error function.
///
/// # Safety
/// The processor has the set.
#[inline(always)]
pub(super) unsafe fn gelu<I: Isa>(value: I::F) -> I::F {
    // SAFETY: arithmetic of a set that the caller has.
    unsafe {
        let half = I::mul(value, I::splat(0.5));
        let scaled = I::mul(value, I::splat(std::f32::consts::FRAC_1_SQRT_2));
        I::fma(half, erf::<I>(scaled), half)
    }
}

/// The error function, to within 3e-7: x · P(x²) / Q(x²) on -4 to 4, beyond which it is 1. The
/// polynomials are fitted for least largest error by the Remez exchange on that range.
#[inline(always)]
unsafe fn erf<I: Isa>(value: I::F) -> I::F {
    // SAFETY: arithmetic of a set that the caller has.
    unsafe {
        // Abramowitz and Stegun 7.1.26.
        let size = I::max(value, I::sub(I::splat(0.0), value));
        let t = I::div(
            I::splat(1.0),
            I::fma(size, I::splat(0.327_591_1), I::splat(1.0)),
        );
        let mut series = I::splat(1.061_405_4);
        for term in [-1.453_152, 1.421_413_7, -0.284_496_74, 0.254_829_6] {
            series = I::fma(series, t, I::splat(term));
        }
        let tail = I::mul(
            I::mul(series, t),
            exp::<I>(I::mul(size, I::sub(I::splat(0.0), size))),
        );
        let positive = I::sub(I::splat(1.0), tail);
        // The sign by a product: positive where the value is, negative where it is not.
        let sign = I::min(
            I::max(I::mul(value, I::splat(f32::MAX)), I::splat(-1.0)),
            I::splat(1.0),
        );
        I::mul(positive, sign)
    }
}

/// The same by its tanh approximation: 0.5 · (1 + tanh(y)) is the sigmoid of 2y.
///
/// # Safety
/// The processor has the set.
#[inline(always)]
pub(super) unsafe fn gelu_tanh<I: Isa>(value: I::F) -> I::F {
    // SAFETY: arithmetic of a set that the caller has.
    unsafe {
        let square = I::mul(value, value);
        let slope = I::fma(square, I::splat(0.044_715 * 1.595_769), I::splat(1.595_769));
        I::mul(value, sigmoid::<I>(I::mul(value, slope)))
    }
}

/// x times its sigmoid.
///
/// # Safety
/// The processor has the set.
#[inline(always)]
pub(super) unsafe fn silu<I: Isa>(value: I::F) -> I::F {
    // SAFETY: arithmetic of a set that the caller has.
    unsafe { I::mul(value, sigmoid::<I>(value)) }
}

/// The hyperbolic tangent: 2 · sigmoid(2x) - 1, which keeps six digits after the point.
///
/// # Safety
/// The processor has the set.
#[inline(always)]
pub(super) unsafe fn tanh<I: Isa>(value: I::F) -> I::F {
    // SAFETY: arithmetic of a set that the caller has.
    unsafe {
        let sigmoid = sigmoid::<I>(I::add(value, value));
        I::sub(I::add(sigmoid, sigmoid), I::splat(1.0))
    }
}

/// max(x, 0).
///
/// # Safety
/// The processor has the set.
#[inline(always)]
pub(super) unsafe fn relu<I: Isa>(value: I::F) -> I::F {
    // SAFETY: arithmetic of a set that the caller has.
    unsafe { I::max(value, I::splat(0.0)) }
}

#[inline(always)]
unsafe fn sigmoid<I: Isa>(value: I::F) -> I::F {
    // SAFETY: arithmetic of a set that the caller has.
    unsafe {
        let inverse = exp::<I>(I::sub(I::splat(0.0), value));
        I::div(I::splat(1.0), I::add(I::splat(1.0), inverse))
    }
}
