//! Softmax over channels, and its logarithm.

use crate::isa::{Level, Simd, Task};

/// Pixels worked on together: their maxima and sums stay in registers and L1.
const BLOCK: usize = 32;

/// Replace each pixel's channels by `exp(x - max) / sum(exp(x - max))`, or by its
/// logarithm, `x - max - log(sum(exp(x - max)))`.
///
/// Subtracting the maximum keeps every exponential at most 1, so no finite
/// input overflows. A vector of features is one pixel.
pub(crate) fn softmax(
    level: Level,
    logarithm: bool,
    channels: usize,
    pixels: usize,
    data: &mut [f32],
) {
    level.call(Softmax {
        logarithm,
        channels,
        pixels,
        data,
    });
}

struct Softmax<'a> {
    logarithm: bool,
    channels: usize,
    pixels: usize,
    data: &'a mut [f32],
}

impl Task for Softmax<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for image in self.data.chunks_exact_mut(self.channels * self.pixels) {
            for start in (0..self.pixels).step_by(BLOCK) {
                let end = (start + BLOCK).min(self.pixels);
                // One loop for each, compiled without the question.
                if self.logarithm {
                    softmax_block(true, image, self.pixels, start, end);
                } else {
                    softmax_block(false, image, self.pixels, start, end);
                }
            }
        }
    }
}

#[inline(always)]
fn softmax_block(logarithm: bool, image: &mut [f32], pixels: usize, start: usize, end: usize) {
    let mut maxima = [f32::NEG_INFINITY; BLOCK];
    for channel in image.chunks_exact(pixels) {
        for (max, x) in maxima.iter_mut().zip(&channel[start..end]) {
            // A NaN is not lost here: its own exponential below is NaN.
            *max = max.max(*x);
        }
    }
    let mut sums = [0.0f32; BLOCK];
    for channel in image.chunks_exact_mut(pixels) {
        let values = channel[start..end].iter_mut();
        for ((x, max), sum) in values.zip(&maxima).zip(&mut sums) {
            let shifted = *x - max;
            let exponential = shifted.exp();
            *x = if logarithm { shifted } else { exponential };
            *sum += exponential;
        }
    }
    for channel in image.chunks_exact_mut(pixels) {
        for (x, sum) in channel[start..end].iter_mut().zip(&sums) {
            *x = if logarithm { *x - sum.ln() } else { *x / sum };
        }
    }
}
