//! Local response normalisation across channels.

use crate::isa::{Level, Simd, Task};

/// Vectors of pixels worked on together in windows of 5 channels: the squares take 20
/// registers where there are 32.
const STRIP: usize = 4;

/// Pixels of all channels worked on together otherwise: the squares of an ordinary
/// window stay in L1. A multiple of every level's lanes, and an odd number of
/// cache lines, so that rows do not compete for the same ones.
const BLOCK: usize = 496;

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
    /// Channels of the window below and above its centre, of those that a
    /// network of `channels` can have.
    fn reach(&self, channels: usize) -> [usize; 2] {
        [(self.size - 1) / 2, self.size / 2].map(|reach| reach.min(channels - 1))
    }

    /// Elements of scratch that [`run`](Self::run) needs: the squares of a
    /// window, and what is raised to the power.
    pub fn scratch_len(&self, channels: usize) -> usize {
        let [below, above] = self.reach(channels);
        (below + 1 + above) * BLOCK + BLOCK
    }

    /// Factor of the sum of squares.
    fn weight(&self) -> f32 {
        self.alpha / self.size as f32
    }

    /// Normalise images of `channels` x `pixels` values in place.
    pub(crate) fn run(
        &self,
        level: Level,
        [channels, pixels]: [usize; 2],
        data: &mut [f32],
        scratch: &mut [f32],
    ) {
        let [below, above] = self.reach(channels);
        let n_rows = below + 1 + above;
        let (squares, rest) = scratch.split_at_mut(n_rows * BLOCK);
        level.call(Apply {
            lrn: *self,
            channels,
            pixels,
            data,
            squares,
            bases: &mut rest[..BLOCK],
        });
    }
}

struct Apply<'a> {
    lrn: Lrn,
    channels: usize,
    pixels: usize,
    data: &'a mut [f32],
    /// Of each channel of the window `BLOCK` values. Channel `c` has row `c`
    /// modulo the number of rows.
    squares: &'a mut [f32],
    /// What is raised to the power, `BLOCK` values.
    bases: &'a mut [f32],
}

impl Task for Apply<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self {
            lrn,
            channels,
            pixels,
            data,
            squares,
            bases,
        } = self;
        let [below, above] = lrn.reach(channels);
        let n_rows = below + 1 + above;
        #[expect(clippy::float_cmp, reason = "exactly this exponent")]
        let three_quarters_of_positive =
            lrn.beta == 0.75 && lrn.alpha >= 0.0 && lrn.bias >= f32::MIN_POSITIVE;
        for image in data.chunks_exact_mut(channels * pixels) {
            if three_quarters_of_positive && lrn.size == 5 {
                fives(simd, lrn, [channels, pixels], image);
                continue;
            }
            for start in (0..pixels).step_by(BLOCK) {
                let len = BLOCK.min(pixels - start);
                // Channels below the first and above the last are zeros, and so
                // is what a last block lacks.
                squares.fill(0.0);
                for c in 0..channels + above {
                    let row = &mut squares[c % n_rows * BLOCK..][..BLOCK];
                    if c < channels {
                        square(simd, &image[c * pixels + start..][..len], row);
                    } else {
                        row.fill(0.0);
                    }
                    let Some(c) = c.checked_sub(above) else {
                        continue;
                    };
                    let values = &mut image[c * pixels + start..][..len];
                    if three_quarters_of_positive {
                        three_quarters(simd, lrn, n_rows, squares, values);
                    } else {
                        for i in (0..BLOCK).step_by(S::LANES) {
                            let base = base(simd, lrn, n_rows, squares, i);
                            simd.store_first(&mut bases[i..], base);
                        }
                        for (x, base) in values.iter_mut().zip(&*bases) {
                            *x /= base.powf(lrn.beta);
                        }
                    }
                }
            }
        }
    }
}

/// Write the squares of at most `BLOCK` values to the row of a channel.
#[inline(always)]
fn square<S: Simd>(simd: S, values: &[f32], row: &mut [f32]) {
    assert!(values.len() <= BLOCK && row.len() == BLOCK);
    for i in (0..values.len()).step_by(S::LANES) {
        let x = simd.load_first(&values[i..]);
        // SAFETY: `i` is a multiple of the lanes below BLOCK, which is one, too.
        unsafe { simd.store(row.as_mut_ptr().add(i), simd.mul(x, x)) };
    }
}

/// The bases of the powers of the vector of pixels from `i` on, a multiple of
/// the lanes below `BLOCK`, given the squares of the window's `n_rows`.
#[inline(always)]
fn base<S: Simd>(simd: S, lrn: Lrn, n_rows: usize, squares: &[f32], i: usize) -> S::F32 {
    assert!(i + S::LANES <= BLOCK && squares.len() >= n_rows * BLOCK);
    // Summed anew for each channel: a running sum would carry rounding errors,
    // and one infinity, through all channels.
    let mut sum = simd.splat(0.0);
    for row in 0..n_rows {
        // SAFETY: the vector ends within the row, of which there are n_rows.
        sum = simd.add(sum, unsafe {
            simd.load(squares.as_ptr().add(row * BLOCK + i))
        });
    }
    simd.mul_add(sum, simd.splat(lrn.weight()), simd.splat(lrn.bias))
}

/// Multiply `values` by their bases to the power of -3/4.
#[inline(always)]
fn three_quarters<S: Simd>(simd: S, lrn: Lrn, n_rows: usize, squares: &[f32], values: &mut [f32]) {
    let whole = values.len() - values.len() % S::LANES;
    for i in (0..whole).step_by(S::LANES) {
        // SAFETY: `values` has a whole vector from element i on.
        unsafe {
            let target = values.as_mut_ptr().add(i);
            let x = simd.load(target);
            simd.store(target, divide(simd, x, base(simd, lrn, n_rows, squares, i)));
        }
    }
    let rest = &mut values[whole..];
    if !rest.is_empty() {
        let x = simd.load_first(rest);
        simd.store_first(
            rest,
            divide(simd, x, base(simd, lrn, n_rows, squares, whole)),
        );
    }
}

/// Windows of 5 channels, the usual ones, of an image: strip by strip.
#[inline(always)]
fn fives<S: Simd>(simd: S, lrn: Lrn, extent: [usize; 2], image: &mut [f32]) {
    let mut start = 0;
    while start < extent[1] {
        let strip = &mut image[start..];
        let rest = extent[1] - start;
        if rest >= STRIP * S::LANES {
            strip_of_fives::<S, STRIP>(simd, lrn, extent, S::LANES, strip);
            start += STRIP * S::LANES;
        } else {
            strip_of_fives::<S, 1>(simd, lrn, extent, rest.min(S::LANES), strip);
            start += S::LANES;
        }
    }
}

/// Normalise `V` vectors of pixels of all channels; of the last one, `lanes` pixels. The
/// squares of a window stay in registers.
// Plain index loops, see `tile`.
#[allow(clippy::needless_range_loop)]
#[inline(always)]
fn strip_of_fives<S: Simd, const V: usize>(
    simd: S,
    lrn: Lrn,
    [channels, pixels]: [usize; 2],
    lanes: usize,
    strip: &mut [f32],
) {
    assert!(
        lanes <= S::LANES && strip.len() >= (channels - 1) * pixels + (V - 1) * S::LANES + lanes
    );
    let (weight, bias) = (simd.splat(lrn.weight()), simd.splat(lrn.bias));
    let strip = strip.as_mut_ptr();
    let mut squares = [[simd.splat(0.0); V]; 5];
    for c in 0..channels + 2 {
        for i in 0..4 {
            squares[i] = squares[i + 1];
        }
        for v in 0..V {
            squares[4][v] = if c < channels {
                // SAFETY: the strip has `lanes` values, or whole vectors of them, of
                // each channel, as asserted.
                let x = unsafe { simd.load_part(strip.add(c * pixels + v * S::LANES), lanes) };
                simd.mul(x, x)
            } else {
                simd.splat(0.0)
            };
        }
        if c < 2 {
            continue;
        }
        for v in 0..V {
            let mut sum = squares[0][v];
            for i in 1..5 {
                sum = simd.add(sum, squares[i][v]);
            }
            let base = simd.mul_add(sum, weight, bias);
            // SAFETY: as above, of the channel in the middle of the window.
            unsafe {
                let target = strip.add((c - 2) * pixels + v * S::LANES);
                let x = simd.load_part(target, lanes);
                simd.store_part(target, divide(simd, x, base), lanes);
            }
        }
    }
}

/// `x` by `base` to the power of 3/4, the exponent of `AlexNet` and its
/// descendants, without a division or a root. The base is positive, infinity or NaN.
#[inline(always)]
fn divide<S: Simd>(s: S, x: S::F32, base: S::F32) -> S::F32 {
    // A guess of base^(-3/4). Multiplied in this order nothing underflows. An infinite
    // base makes it 0, as no root of a finite one is below the limit.
    let root = s.rsqrt_estimate(base);
    let fourth = s.rsqrt_estimate(s.max_number(root, s.splat(LEAST_ROOT)));
    let guess = s.mul(root, s.mul(root, fourth));
    // error = base^3 * guess^4 - 1, from factors of moderate size.
    let quarter = s.mul(s.min(base, s.splat(f32::MAX)), guess);
    let half = s.mul(quarter, guess);
    let error = s.mul_add(s.mul(quarter, quarter), half, s.splat(-1.0));
    // guess / (1 + error)^(1/4), by the first terms of its series. The error is
    // below 2^-7, so the next term is below 2^-24.
    let series = s.mul(error, s.mul_add(error, s.splat(5.0 / 32.0), s.splat(-0.25)));
    let y = s.mul(x, guess);
    s.mul_add(y, series, y)
}

/// Less than the reciprocal root of any float32 number.
const LEAST_ROOT: f32 = 1e-20;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;

    /// Normalise and compare with float64, on every level.
    fn check(lrn: Lrn, [channels, pixels]: [usize; 2], input: &[f32]) {
        let wide: Vec<f64> = input.iter().map(|x| f64::from(*x)).collect();
        let [below, above] = lrn.reach(channels);
        let mut expected = Vec::new();
        for c in 0..channels {
            for p in 0..pixels {
                let window = c.saturating_sub(below)..(c + above + 1).min(channels);
                let sum: f64 = window.map(|c| wide[c * pixels + p].powi(2)).sum();
                let base = f64::from(lrn.bias) + f64::from(lrn.alpha) / lrn.size as f64 * sum;
                expected.push(wide[c * pixels + p] / base.powf(f64::from(lrn.beta)));
            }
        }
        for isa in Isa::available() {
            let mut data = input.to_vec();
            // Scratch may hold anything.
            let mut scratch = vec![f32::NAN; lrn.scratch_len(channels)];
            let level = isa.level().unwrap();
            lrn.run(level, [channels, pixels], &mut data, &mut scratch);
            for (i, (got, expected)) in data.iter().zip(&expected).enumerate() {
                let wide = f64::from(*got);
                let same = if expected.is_finite() {
                    (wide - expected).abs() <= 1e-6 * expected.abs()
                } else {
                    wide.total_cmp(expected).is_eq() || wide.is_nan() && expected.is_nan()
                };
                assert!(
                    same,
                    "{isa} {lrn:?} {channels} x {pixels}: element {i} is {got}, expected {expected}"
                );
            }
        }
    }

    fn input(n: usize, scale: f32) -> Vec<f32> {
        (0..n)
            .map(|i| ((i * 7919 % 2003) as f32 / 1001.0 - 1.0) * scale)
            .collect()
    }

    #[test]
    fn errors_are_those_of_float32() {
        for beta in [0.75, 0.5, 1.3] {
            for (size, bias) in [(1, 1.0), (4, 2.0), (5, 1.0), (50, 1e-3)] {
                for pixels in [1, 15, 16, 17, BLOCK - 1, BLOCK, 2 * BLOCK + 3] {
                    for (channels, scale) in [(1, 1.0), (2, 1e3), (7, 1e-3), (12, 1e9)] {
                        let lrn = Lrn {
                            size,
                            alpha: 0.3,
                            beta,
                            bias,
                        };
                        let input = input(channels * pixels, scale);
                        check(lrn, [channels, pixels], &input);
                    }
                }
            }
        }
    }

    /// The reciprocal root of such bases is infinite, NaN or an estimate of a
    /// number that is not normal.
    #[test]
    fn exceptional_bases() {
        for (alpha, bias) in [(1.0, 0.0), (0.0, 0.0), (-1.0, 0.0), (1.0, 1e-40)] {
            let lrn = Lrn {
                size: 3,
                alpha,
                beta: 0.75,
                bias,
            };
            let mut input = input(5 * 19, 1.5);
            input[20..60].fill(0.0);
            check(lrn, [5, 19], &input);
        }
    }

    #[test]
    fn infinity_stays_in_its_window() {
        for (size, pixels) in [(3, 40), (5, 40), (5, 200)] {
            let lrn = Lrn {
                size,
                alpha: 1.0,
                beta: 0.75,
                bias: 1.0,
            };
            for special in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
                let mut input = input(8 * pixels, 1.5);
                input[2 * pixels + 5] = special;
                check(lrn, [8, pixels], &input);
            }
        }
    }
}
