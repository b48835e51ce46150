//! Activation functions.

use crate::graph::Op;
use crate::isa::{Level, Simd, Task};
use crate::ops::quantize::{LinearQuantizer, Log2Quantizer, sign};

/// A function of one value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// `max(x, 0)`
    Relu,
    /// `x` where positive, else `alpha * x`.
    LeakyRelu {
        /// Slope of the negative part.
        alpha: f32,
    },
    /// `x` limited to `low..=high`.
    Clip {
        /// Lower limit.
        low: f32,
        /// Upper limit.
        high: f32,
    },
    /// `1 / (1 + exp(-x))`
    Sigmoid,
    /// Hyperbolic tangent.
    Tanh,
    /// `clip(alpha * x + beta, 0, 1)`
    HardSigmoid {
        /// Slope.
        alpha: f32,
        /// Value at 0.
        beta: f32,
    },
    /// `x * clip(x / 6 + 1/2, 0, 1)`
    HardSwish,
    /// `x * sigmoid(x)`
    Silu,
    /// The nearest of evenly spaced levels.
    QuantizeLinear(LinearQuantizer),
    /// The nearest power of two.
    QuantizeLog2(Log2Quantizer),
    /// 1 where at least 0, else -1.
    Sign,
}

impl Activation {
    /// The activation `op` is, if it is one.
    pub fn from_op(op: &Op) -> Option<Self> {
        Some(match *op {
            Op::Relu {} => Self::Relu,
            Op::LeakyRelu { alpha } => Self::LeakyRelu { alpha },
            Op::Clip { low, high } => Self::Clip { low, high },
            Op::Sigmoid {} => Self::Sigmoid,
            Op::Tanh {} => Self::Tanh,
            Op::HardSigmoid { alpha, beta } => Self::HardSigmoid { alpha, beta },
            Op::HardSwish {} => Self::HardSwish,
            Op::Silu {} => Self::Silu,
            Op::QuantizeLinear { bits, low, high } => {
                Self::QuantizeLinear(LinearQuantizer::new(op.name(), bits, low, high).ok()?)
            }
            Op::QuantizeLog2 { bits, high } => {
                Self::QuantizeLog2(Log2Quantizer::new(op.name(), bits, high).ok()?)
            }
            Op::Sign {} => Self::Sign,
            _ => return None,
        })
    }

    /// Apply the function to every value of `data`.
    pub(crate) fn run(self, level: Level, data: &mut [f32]) {
        level.call(Apply {
            activation: self,
            data,
        });
    }
}

struct Apply<'a> {
    activation: Activation,
    data: &'a mut [f32],
}

impl Task for Apply<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        // One loop per function, so that each can be vectorised.
        let data = self.data;
        match self.activation {
            Activation::Relu => relu(simd, data),
            // Comparisons that are false for NaN leave it as it is.
            Activation::LeakyRelu { alpha } => {
                map(data, |x| if x < 0.0 { alpha * x } else { x });
            }
            Activation::Clip { low, high } => map(data, |x| x.clamp(low, high)),
            Activation::Sigmoid => map(data, sigmoid),
            Activation::Tanh => map(data, f32::tanh),
            Activation::HardSigmoid { alpha, beta } => {
                map(data, |x| (alpha * x + beta).clamp(0.0, 1.0));
            }
            Activation::HardSwish => map(data, |x| x * (x / 6.0 + 0.5).clamp(0.0, 1.0)),
            Activation::Silu => map(data, |x| x * sigmoid(x)),
            Activation::QuantizeLinear(quantizer) => map(data, |x| quantizer.apply(x)),
            Activation::QuantizeLog2(quantizer) => map(data, |x| quantizer.apply(x)),
            Activation::Sign => map(data, sign),
        }
    }
}

/// The one activation that runs on the largest responses of most networks.
#[inline(always)]
fn relu<S: Simd>(simd: S, data: &mut [f32]) {
    let zero = simd.splat(0.0);
    for i in (0..data.len()).step_by(S::LANES) {
        let x = &mut data[i..];
        simd.store_first(x, simd.max(simd.load_first(x), zero));
    }
}

#[inline(always)]
fn map(data: &mut [f32], f: impl Fn(f32) -> f32) {
    for x in data {
        *x = f(*x);
    }
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    // exp(-x) overflows to infinity for very negative x: 1 / inf = 0.
    1.0 / (1.0 + (-x).exp())
}
