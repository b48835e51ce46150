//! Quantised activations: the nearest of a few levels.
//!
//! Everything is defined in float32 operations that IEEE 754 rounds in one way
//! only, so every level, NumPy and this engine give the same bits. NaN stays NaN, and
//! zeros are positive.

use crate::error::{Result, bail_format};

/// Evenly spaced levels:
/// `clip(round(x / step) * step, low, high) + 0`, halves rounded to even,
/// `step = (high - low) / (2^bits - 1)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LinearQuantizer {
    step: f32,
    low: f32,
    high: f32,
}

impl LinearQuantizer {
    /// Check the attributes; `what` names the node in errors.
    pub fn new(what: &str, bits: u32, low: f32, high: f32) -> Result<Self> {
        if !(2..=16).contains(&bits) {
            bail_format!("{what}: bits is {bits}, expected 2..=16 (one bit is the operation sign)");
        }
        let step = (high - low) / ((1 << bits) - 1) as f32;
        if !(low < high && step.is_normal()) {
            bail_format!(
                "{what}: low is {low} and high is {high}, expected finite numbers, \
                 low below high, with a step of {bits} bits between"
            );
        }
        Ok(Self { step, low, high })
    }

    /// The distance between neighbouring levels.
    pub fn step(self) -> f32 {
        self.step
    }

    /// The level of `x`.
    #[inline(always)]
    pub fn apply(self, x: f32) -> f32 {
        let level = (x / self.step).round_ties_even() * self.step;
        // Adding 0 makes -0 positive.
        level.clamp(self.low, self.high) + 0.0
    }
}

/// The float32 number nearest to sqrt(2): from it on, mantissas belong to the next
/// power of two.
const SQRT_2: u32 = std::f32::consts::SQRT_2.to_bits();

/// Bits of the mantissa of a float32 number.
const MANTISSA_BITS: u32 = 23;

/// 0 and powers of two of either sign: the one nearest to `x` on a logarithmic scale.
///
/// There are `2^(bits - 1) - 1` powers, the largest of which is `high`. Below the
/// smallest one divided by sqrt(2) the result is 0.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Log2Quantizer {
    /// Bits of the least magnitude that does not become 0.
    threshold: u32,
    /// Bits of the smallest and the largest power.
    smallest: u32,
    largest: u32,
}

impl Log2Quantizer {
    /// Check the attributes; `what` names the node in errors.
    pub fn new(what: &str, bits: u32, high: f32) -> Result<Self> {
        if !(2..=8).contains(&bits) {
            bail_format!("{what}: bits is {bits}, expected 2..=8 (one bit is the operation sign)");
        }
        let largest = high.to_bits();
        let below = ((1 << (bits - 1)) - 2) << MANTISSA_BITS;
        let power_of_two = high.is_normal() && high > 0.0 && largest << (32 - MANTISSA_BITS) == 0;
        // The smallest power has to be a normal number, too.
        if !power_of_two || largest < below + (1 << MANTISSA_BITS) {
            bail_format!(
                "{what}: high is {high}, expected a power of two, from 2^{} on with {bits} bits",
                (1 << (bits - 1)) - 128
            );
        }
        let smallest = largest - below;
        // Halving is exact unless the result is subnormal, and is rounded then.
        let threshold = f32::from_bits(smallest) * 0.5 * f32::from_bits(SQRT_2);
        Ok(Self {
            threshold: threshold.to_bits(),
            smallest,
            largest,
        })
    }

    /// The level of `x`.
    #[inline(always)]
    pub fn apply(self, x: f32) -> f32 {
        const SIGN: u32 = 1 << 31;
        // Positive float32 numbers are ordered like their bits.
        let (sign, magnitude) = (x.to_bits() & SIGN, x.to_bits() & !SIGN);
        // Carries into the exponent where the mantissa is large enough.
        let carry = (1 << MANTISSA_BITS) - (SQRT_2 & ((1 << MANTISSA_BITS) - 1));
        let power = (magnitude + carry) & !((1 << MANTISSA_BITS) - 1);
        let level = power.clamp(self.smallest, self.largest) | sign;
        let level = if magnitude < self.threshold { 0 } else { level };
        if x.is_nan() { x } else { f32::from_bits(level) }
    }
}

/// 1 where `x` is at least 0, else -1.
#[inline(always)]
pub fn sign(x: f32) -> f32 {
    let sign = if x >= 0.0 { 1.0 } else { -1.0 };
    if x.is_nan() { x } else { sign }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_out_of_range_are_refused() {
        for (bits, low, high) in [
            (1, -1.0, 1.0),
            (17, -1.0, 1.0),
            (2, 1.0, 1.0),
            (2, 1.0, -1.0),
            (2, f32::NAN, 1.0),
            (2, 0.0, f32::INFINITY),
            (2, f32::MIN, f32::MAX),
            (8, 0.0, 1e-40),
        ] {
            let message = LinearQuantizer::new("node", bits, low, high);
            assert!(message.is_err(), "{bits} {low} {high}");
        }
        for (bits, high) in [
            (1, 1.0),
            (9, 1.0),
            (4, 3.0),
            (4, -1.0),
            (4, 0.0),
            (4, f32::INFINITY),
            (4, f32::NAN),
            (4, 1e-45),
            (8, 0.5),
        ] {
            assert!(
                Log2Quantizer::new("node", bits, high).is_err(),
                "{bits} {high}"
            );
        }
        assert!(Log2Quantizer::new("node", 8, 1.0).is_ok());
        assert!(Log2Quantizer::new("node", 2, f32::MIN_POSITIVE).is_ok());
    }
}
