//! Local response normalisation across channels.

use crate::isa::{Level, Simd, Task};

/// Pixels worked on together; their sums stay in registers.
const BLOCK: usize = 32;

/// `y = x / (bias + alpha / size * sum(x^2))^beta`, the sum over a window of
/// `size` channels (ONNX's convention; of an even window, the longer half lies
/// above).
#[derive(Clone, Copy, Debug)]
pub struct Lrn {
    /// Channels in the window.
    pub size: usize,
    /// Weight of the mean square.
    pub alpha: f32,
    /// Exponent.
    pub beta: f32,
    /// Constant in the base.
    pub bias: f32,
}

impl Lrn {
    /// Normalise images of `channels` x `pixels` values.
    pub(crate) fn run(
        &self,
        level: Level,
        channels: usize,
        pixels: usize,
        input: &[f32],
        output: &mut [f32],
    ) {
        level.call(Apply {
            lrn: *self,
            channels,
            pixels,
            input,
            output,
        });
    }
}

struct Apply<'a> {
    lrn: Lrn,
    channels: usize,
    pixels: usize,
    input: &'a [f32],
    output: &'a mut [f32],
}

impl Task for Apply<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let image_len = self.channels * self.pixels;
        let images = self
            .input
            .chunks_exact(image_len)
            .zip(self.output.chunks_exact_mut(image_len));
        for (input, output) in images {
            // The exponent of AlexNet and its descendants needs no powf: two
            // square roots are each rounded correctly, so the result is within
            // 4 units in the last place.
            #[expect(clippy::float_cmp, reason = "exactly this constant")]
            if self.lrn.beta == 0.75 {
                self.lrn.image(self.pixels, input, output, |base| {
                    let root = base.sqrt();
                    root * root.sqrt()
                });
            } else {
                let beta = self.lrn.beta;
                self.lrn
                    .image(self.pixels, input, output, |base| base.powf(beta));
            }
        }
    }
}

impl Lrn {
    #[inline(always)]
    fn image(&self, pixels: usize, input: &[f32], output: &mut [f32], power: impl Fn(f32) -> f32) {
        let channels = input.len() / pixels;
        let (below, above) = ((self.size - 1) / 2, self.size / 2);
        let weight = self.alpha / self.size as f32;
        for c in 0..channels {
            let window = c.saturating_sub(below)..(c + above + 1).min(channels);
            for start in (0..pixels).step_by(BLOCK) {
                let block = BLOCK.min(pixels - start);
                // Summed anew for each channel: a running sum would carry
                // rounding errors, and one infinity, through all channels.
                let mut sums = [0.0f32; BLOCK];
                for other in window.clone() {
                    let at = other * pixels + start;
                    for (sum, x) in sums.iter_mut().zip(&input[at..at + block]) {
                        *sum += x * x;
                    }
                }
                let at = c * pixels + start;
                let values = output[at..at + block]
                    .iter_mut()
                    .zip(&input[at..at + block]);
                for ((y, x), sum) in values.zip(&sums) {
                    *y = x / power(self.bias + weight * sum);
                }
            }
        }
    }
}
