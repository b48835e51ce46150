//! Batch normalisation with fixed statistics.

use crate::error::{Result, bail_format};
use crate::isa::{Level, Simd, Task};

/// A factor and a summand per channel.
#[derive(Clone, Debug)]
pub struct BatchNorm {
    factors: Vec<f32>,
    summands: Vec<f32>,
}

impl BatchNorm {
    /// `y = scale * (x - mean) / sqrt(variance + epsilon) + bias`, brought into
    /// the form `factor * x + summand` in float64.
    ///
    /// `what` names the node in errors.
    pub fn new(
        what: &str,
        scale: &[f32],
        bias: &[f32],
        mean: &[f32],
        variance: &[f32],
        epsilon: f32,
    ) -> Result<Self> {
        let (mut factors, mut summands) = (Vec::new(), Vec::new());
        for c in 0..scale.len() {
            let radicand = f64::from(variance[c]) + f64::from(epsilon);
            if radicand <= 0.0 {
                bail_format!(
                    "{what}: variance + epsilon is {radicand} in channel {c}, expected a positive number"
                );
            }
            let factor = f64::from(scale[c]) / radicand.sqrt();
            factors.push(factor as f32);
            summands.push((f64::from(bias[c]) - factor * f64::from(mean[c])) as f32);
        }
        Ok(Self { factors, summands })
    }

    /// Factor and summand of a channel.
    pub(crate) fn coefficients(&self, channel: usize) -> [f32; 2] {
        [self.factors[channel], self.summands[channel]]
    }

    /// The response to a value of a channel, as [`run`](Self::run) computes it.
    pub(crate) fn apply(&self, channel: usize, x: f32) -> f32 {
        x * self.factors[channel] + self.summands[channel]
    }

    /// Apply to images whose channels have `pixels` values each.
    pub(crate) fn run(&self, level: Level, pixels: usize, data: &mut [f32]) {
        level.call(Apply {
            norm: self,
            pixels,
            data,
        });
    }
}

struct Apply<'a> {
    norm: &'a BatchNorm,
    pixels: usize,
    data: &'a mut [f32],
}

impl Task for Apply<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let coefficients = self.norm.factors.iter().zip(&self.norm.summands).cycle();
        for (channel, (factor, summand)) in
            self.data.chunks_exact_mut(self.pixels).zip(coefficients)
        {
            for x in channel {
                *x = *x * factor + summand;
            }
        }
    }
}
