//! Local response normalisation across channels.

use crate::isa::{Level, MAX_LANES, Simd, Task};

/// Pixels of all channels worked on together: the squares of an ordinary
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
    /// window, their sums over pixels, and what is raised to the power.
    pub fn scratch_len(&self, channels: usize) -> usize {
        let [below, above] = self.reach(channels);
        let n_rows = below + 1 + above;
        n_rows * BLOCK + n_rows + BLOCK
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
        let (bases, rest) = rest.split_at_mut(BLOCK);
        level.call(Apply {
            lrn: *self,
            channels,
            pixels,
            data,
            squares,
            totals: &mut rest[..n_rows],
            bases,
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
    /// The sum of each row.
    totals: &'a mut [f32],
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
            totals,
            bases,
        } = self;
        let [below, above] = lrn.reach(channels);
        let n_rows = below + 1 + above;
        #[expect(clippy::float_cmp, reason = "exactly this constant")]
        let three_quarters_of_positive =
            lrn.beta == 0.75 && lrn.alpha >= 0.0 && lrn.bias >= f32::MIN_POSITIVE;
        for image in data.chunks_exact_mut(channels * pixels) {
            for start in (0..pixels).step_by(BLOCK) {
                let len = BLOCK.min(pixels - start);
                // Channels below the first and above the last are zeros, and so
                // is what a last block lacks.
                squares.fill(0.0);
                totals.fill(0.0);
                for c in 0..channels + above {
                    let row = &mut squares[c % n_rows * BLOCK..][..BLOCK];
                    totals[c % n_rows] = if c < channels {
                        square(simd, &image[c * pixels + start..][..len], row)
                    } else {
                        row.fill(0.0);
                        0.0
                    };
                    let Some(c) = c.checked_sub(above) else {
                        continue;
                    };
                    let values = &mut image[c * pixels + start..][..len];
                    // No base exceeds this one, but for rounding: far from it.
                    let greatest = lrn.bias + lrn.weight() * totals.iter().sum::<f32>();
                    if three_quarters_of_positive && greatest < 0.5 * f32::MAX {
                        // The usual window is compiled without a loop.
                        match n_rows {
                            5 => three_quarters(simd, lrn, 5, squares, values),
                            n => three_quarters(simd, lrn, n, squares, values),
                        }
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

/// Write the squares of at most `BLOCK` values to the row of a channel. Returns
/// their sum, infinity or NaN if one of them is.
#[inline(always)]
fn square<S: Simd>(simd: S, values: &[f32], row: &mut [f32]) -> f32 {
    assert!(values.len() <= BLOCK && row.len() == BLOCK);
    let mut total = simd.splat(0.0);
    for i in (0..values.len()).step_by(S::LANES) {
        let x = simd.load_first(&values[i..]);
        let square = simd.mul(x, x);
        total = simd.add(total, square);
        // SAFETY: `i` is a multiple of the lanes below BLOCK, which is one, too.
        unsafe { simd.store(row.as_mut_ptr().add(i), square) };
    }
    let mut lanes = [0.0; MAX_LANES];
    simd.store_first(&mut lanes, total);
    lanes.into_iter().sum()
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

/// `x` by `base` to the power of 3/4, the exponent of `AlexNet` and its
/// descendants, without a division or a root. The base is positive and finite.
#[inline(always)]
fn divide<S: Simd>(s: S, x: S::F32, base: S::F32) -> S::F32 {
    // A guess of base^(-3/4). Multiplied in this order nothing underflows.
    let root = s.rsqrt_estimate(base);
    let guess = s.mul(root, s.mul(root, s.rsqrt_estimate(root)));
    // error = base^3 * guess^4 - 1, from factors of moderate size.
    let quarter = s.mul(base, guess);
    let half = s.mul(quarter, guess);
    let error = s.mul_add(s.mul(quarter, quarter), half, s.splat(-1.0));
    // guess / (1 + error)^(1/4), by the first terms of its series. The error is
    // below 2^-7, so the next term is below 2^-24.
    let series = s.mul(error, s.mul_add(error, s.splat(5.0 / 32.0), s.splat(-0.25)));
    let y = s.mul(x, guess);
    s.mul_add(y, series, y)
}

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
        let lrn = Lrn {
            size: 3,
            alpha: 1.0,
            beta: 0.75,
            bias: 1.0,
        };
        for special in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
            let mut input = input(6 * 40, 1.5);
            input[2 * 40 + 5] = special;
            check(lrn, [6, 40], &input);
        }
    }
}
