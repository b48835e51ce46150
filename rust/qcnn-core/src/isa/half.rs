//! 16-bit floats in software: what levels without instructions for them do in tests.

use ::half::f16;

use super::{MAX_LANES, Simd};

/// The 16-bit floats of a vector, zeros behind them.
#[inline(always)]
fn halves_of<S: Simd>(simd: S, vector: S::I16) -> [f16; 2 * MAX_LANES] {
    let mut bits = [0i16; 2 * MAX_LANES];
    // SAFETY: there is room for a vector of the most lanes.
    unsafe { simd.store_i16(bits.as_mut_ptr(), vector) };
    bits.map(|bits| f16::from_bits(bits.cast_unsigned()))
}

/// The inverse.
#[inline(always)]
fn from_halves<S: Simd>(simd: S, halves: [f16; 2 * MAX_LANES]) -> S::I16 {
    let bits = halves.map(|half| half.to_bits().cast_signed());
    // SAFETY: there are at least as many numbers as a vector has.
    unsafe { simd.load_i16(bits.as_ptr()) }
}

/// [`Simd::narrow_f16`].
#[inline(always)]
pub(super) fn narrow<S: Simd>(simd: S, low: S::F32, high: S::F32) -> S::I16 {
    let mut floats = [0.0f32; 2 * MAX_LANES];
    simd.store_first(&mut floats[..S::LANES], low);
    simd.store_first(&mut floats[S::LANES..2 * S::LANES], high);
    from_halves(simd, floats.map(f16::from_f32))
}

/// [`Simd::widen_f16`].
#[inline(always)]
pub(super) fn widen<S: Simd>(simd: S, vector: S::I16) -> [S::F32; 2] {
    let floats = halves_of(simd, vector).map(f16::to_f32);
    [0, S::LANES].map(|first| simd.load_first(&floats[first..]))
}

/// [`Simd::add_f16`], as if rounded once, because float32 has more than twice the bits.
#[inline(always)]
pub(super) fn add<S: Simd>(simd: S, a: S::I16, b: S::I16) -> S::I16 {
    let [a, b] = [a, b].map(|v| halves_of(simd, v).map(f16::to_f32));
    from_halves(simd, std::array::from_fn(|i| f16::from_f32(a[i] + b[i])))
}

/// [`Simd::mul_add_f16`]: float64 holds all sums exactly but those of numbers of very
/// different size.
#[inline(always)]
pub(super) fn mul_add<S: Simd>(simd: S, a: S::I16, b: S::I16, c: S::I16) -> S::I16 {
    let [a, b, c] = [a, b, c].map(|v| halves_of(simd, v).map(f16::to_f64));
    let sum = |i: usize| f16::from_f32(round_to_odd(a[i] * b[i] + c[i]));
    from_halves(simd, std::array::from_fn(sum))
}

/// The float32 next to a number that is none and whose last bit is set: rounding it further
/// gives the same as rounding the number at once.
#[inline(always)]
pub(super) fn round_to_odd(number: f64) -> f32 {
    let rounded = number as f32;
    let error = number - f64::from(rounded);
    let bits = rounded.to_bits();
    if error == 0.0 || rounded == 0.0 || !rounded.is_finite() || bits & 1 == 1 {
        return rounded;
    }
    // The other neighbour is greater or less in magnitude.
    let outwards = (error > 0.0) == (rounded > 0.0);
    f32::from_bits(if outwards { bits + 1 } else { bits - 1 })
}
