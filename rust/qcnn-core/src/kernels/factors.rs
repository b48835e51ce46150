//! Integers that are multiplied: of 16 bits in pairs, of 8 bits in fours.
//!
//! A vector of inputs holds a group of factors in each lane of 32 bits, and a
//! multiplication adds the products of a group to a sum of 32 bits. So one of 8 bits makes
//! twice as many products as one of 16.

use std::fmt::Debug;

use super::tile::pair;
use crate::isa::Simd;

/// Most factors of a group.
pub(super) const MAX_GROUP: usize = 4;

/// How integers are multiplied.
pub(super) trait Factors: Debug + Send + Sync + 'static {
    /// Element type in kernel names.
    const NAME: &'static str;
    /// Factors of a group.
    const GROUP: usize;

    /// Clock cycles of a multiplication, as multiples of those of one with 16 bits.
    fn cycles<S: Simd>() -> f64;

    /// A group of weights, of which those behind [`GROUP`](Self::GROUP) are ignored.
    fn weights(weights: [f32; MAX_GROUP]) -> i32;

    /// Make groups of inputs: lane i of the vectors becomes group i, those of even lanes
    /// first, then those of odd lanes. All inputs are raised by `zero`, which makes them
    /// factors.
    fn inputs<S: Simd>(simd: S, inputs: [S::I16; MAX_GROUP], zero: i32) -> [S::I16; 2];

    /// Add the products of inputs and a group of weights to `sums`, modulo 2^32.
    fn dot<S: Simd>(simd: S, inputs: S::I16, weights: i32, sums: S::I32) -> S::I32;
}

/// 16 bits. Their inputs have signs and are not raised.
#[derive(Debug)]
pub(super) struct Words;

impl Factors for Words {
    const NAME: &'static str = "i16";
    const GROUP: usize = 2;

    fn cycles<S: Simd>() -> f64 {
        1.0
    }

    fn weights([low, high, ..]: [f32; MAX_GROUP]) -> i32 {
        pair(low as i16, high as i16)
    }

    #[inline(always)]
    fn inputs<S: Simd>(simd: S, inputs: [S::I16; MAX_GROUP], _: i32) -> [S::I16; 2] {
        simd.zip_i16(inputs[0], inputs[1])
    }

    #[inline(always)]
    fn dot<S: Simd>(simd: S, inputs: S::I16, weights: i32, sums: S::I32) -> S::I32 {
        simd.dot_i16(inputs, simd.splat_pair(weights), sums)
    }
}

/// 8 bits. Inputs are from 0 to 255 once they are raised, weights from -127 to 127.
#[derive(Debug)]
pub(super) struct Bytes;

impl Bytes {
    /// How integers are made of inputs from `low`, at most 0, to `high`, at least 0:
    /// what to multiply them with, and what to raise the rounded products by.
    ///
    /// All are between 0 and 255 then, and 0 becomes what products are raised by:
    /// rounding adds up to 1/2 at either end of a range of 254.
    pub(super) fn scale([low, high]: [f32; 2]) -> (f32, i32) {
        // So that the factor is an ordinary number.
        let scale = (254.0 / (high - low)).min(1e30);
        (scale, (-low * scale).round_ties_even() as i32)
    }
}

impl Factors for Bytes {
    const NAME: &'static str = "i8";
    const GROUP: usize = 4;

    fn cycles<S: Simd>() -> f64 {
        S::DOT_BYTES_CYCLES
    }

    fn weights(weights: [f32; MAX_GROUP]) -> i32 {
        i32::from_le_bytes(weights.map(|weight| (weight as i8).cast_unsigned()))
    }

    #[inline(always)]
    fn inputs<S: Simd>(simd: S, inputs: [S::I16; MAX_GROUP], zero: i32) -> [S::I16; 2] {
        let zero = simd.splat_pair(zero.wrapping_mul(0x0101_0101));
        let low = simd.add_i16(simd.join_bytes(inputs[0], inputs[1]), zero);
        let high = simd.add_i16(simd.join_bytes(inputs[2], inputs[3]), zero);
        simd.zip_i16(low, high)
    }

    #[inline(always)]
    fn dot<S: Simd>(simd: S, inputs: S::I16, weights: i32, sums: S::I32) -> S::I32 {
        simd.dot_bytes(inputs, weights, sums)
    }
}
