//! Tables built from inputs and codewords of 8 bits, which multiply twice as fast as those
//! of 16.
//!
//! Inputs become integers from 0 to 255, `x * t` rounded and raised by the number that
//! stands for 0: `t` is as large as all that the batch sees in the tile allows. Codewords
//! become integers of at most 127, `w * a * 2^e`: `a` is common to the layer, as the sums
//! of a batch are of one unit, and the power of two is a codeword's own, so that small
//! codewords do not lose their digits. Products are shifted right by `b + e` bits, where
//! `b` is common to the batch. So entries are `x * w * s` with `s = t * a / 2^b`. Raised
//! inputs add the sum of a codeword's integers times the number that stands for 0: sums of
//! products start at the negative of that.
//!
//! # Why nothing overflows
//!
//! In the terms of [`short`](super::short), with `n = MAX_TERMS * C'` inputs at most that p
//! sees: their integers have a norm of at most `X = |x(p)| * t + sqrt(n) / 2`, or
//! `255 * sqrt(n)` if that is less. The norms of codewords are those of their integers, so
//! without the shift by `b` a complete sum is at most `X * |w(o)| * a`. Rounding entries
//! adds at most 1/2 per term. So `b` is the least number with
//! `max over p of X * max over o of |w(o)| * a / 2^b <= 32767 - MAX_TERMS / 2 - 1`.
//! As integers of codewords, divided by 2^e, are at most 127, `b` is at most
//! `log2(255 * 127 * n / 32748)`, rounded up, so at most [`most_shift`]; `e` is at most what
//! is missing to 16. Sums of products have 32 bits: at most `255 * 127 * C'`, and as much
//! again for the numbers they start from.

use super::layout::Layout;
use super::short::{Codebook, MAX_TERMS, Prepared, Seen, pack_groups, squares};
use super::{MAX_SUBVECTOR_DIM, Scale};
use crate::isa::Simd;
use crate::kernels::factors::{Bytes, Factors};

/// See the module's documentation.
#[derive(Clone, Debug)]
pub(in crate::kernels) struct ByteCodebook {
    scale: f32,
    groups: Vec<i32>,
    squares: Vec<f32>,
    /// Of each row of a table the sum of the codeword's integers, and the power of two in
    /// them.
    rows: Vec<[i32; 2]>,
}

/// The furthest shift without those of codewords.
fn most_shift(dim: usize) -> u32 {
    const { assert!((MAX_TERMS * MAX_SUBVECTOR_DIM).next_power_of_two().ilog2() <= 16) };
    (MAX_TERMS * dim).next_power_of_two().ilog2()
}

impl Codebook for ByteCodebook {
    type Factors = Bytes;

    fn table_cycles<S: Simd>(dim: usize) -> f64 {
        1.5 + Bytes::cycles::<S>() * (dim.next_multiple_of(Bytes::GROUP) / 2) as f64
    }

    fn all(layout: &Layout, panel_rows: usize, codebooks: &[f32], _: &[u16]) -> Vec<Self> {
        let pq = layout.pq;
        let dim = pq.subvector_dim;
        let mut codewords = codebooks.to_vec();
        // The last subspace may have fewer channels: what fills it up counts for nothing.
        let filling = pq.n_subspaces * dim - layout.geometry.group_in_channels();
        let codebook_len = pq.n_centroids * dim;
        for set in codewords.chunks_exact_mut(pq.n_subspaces * codebook_len) {
            let last = &mut set[(pq.n_subspaces - 1) * codebook_len..];
            for codeword in last.chunks_exact_mut(dim) {
                codeword[dim - filling..].fill(0.0);
            }
        }
        let peak = greatest(&codewords);
        // Without any weights.
        let scale = 127.0 / peak;
        let scale = if scale.is_finite() { scale } else { 1.0 };
        codewords
            .chunks_exact(codebook_len)
            .map(|codewords| Self::new(layout, panel_rows, codewords, scale))
            .collect()
    }

    fn scale(&self) -> f32 {
        self.scale
    }

    fn groups(&self) -> &[i32] {
        &self.groups
    }

    fn squares(&self) -> &[f32] {
        &self.squares
    }

    #[inline(always)]
    fn limit(seen: &Seen, norm: f32, scale: f32, dim: usize) -> Scale {
        let [low, high] = seen.range;
        let (factor, zero) = Bytes::scale(seen.range);
        let root = ((MAX_TERMS * dim) as f32).sqrt();
        let inputs = (seen.norm * factor * 1.0001 + 0.5 * root).min(255.0 * root);
        let bound = inputs * norm * scale;
        let greatest = 32_766.0 - 0.5 * MAX_TERMS as f32;
        let mut shift = 0;
        let mut room = greatest;
        while room < bound && shift < 16 {
            shift += 1;
            room *= 2.0;
        }
        // Less by more than rounding: inputs must not become more than 255. Not too
        // large, so that all factors are normal.
        let factor = (factor * scale / (1 << shift) as f32 * 0.999_999).min(1e25);
        let valid = (high - low).is_finite() && !seen.norm.is_nan();
        Scale {
            factor: if valid { factor } else { f32::NAN },
            weight: 0,
            zero,
            shift,
        }
    }

    #[inline(always)]
    fn input_factor(&self, scale: Scale) -> f32 {
        scale.factor * (1 << scale.shift) as f32 / self.scale
    }

    #[inline(always)]
    fn prepare(&self, scale: Scale, rows: &mut [Prepared]) {
        for (row, [sum, power]) in rows.iter_mut().zip(&self.rows) {
            let shift = scale.shift + power;
            // Half a unit, so that cutting bits off rounds.
            let half = (1 << shift) >> 1;
            *row = [half - scale.zero * sum, shift, 16 - shift];
        }
    }

    #[inline(always)]
    fn start<S: Simd>(simd: S, [start, ..]: &Prepared) -> S::I32 {
        simd.splat_i32(*start)
    }

    #[inline(always)]
    fn entries<S: Simd>(simd: S, [_, right, left]: &Prepared, [even, odd]: [S::I32; 2]) -> S::I16 {
        simd.shifted_halves(even, simd.splat_i32(*right), odd, simd.splat_i32(*left))
    }
}

impl ByteCodebook {
    /// Make integers of codewords, `(K, C')`.
    fn new(layout: &Layout, panel_rows: usize, codewords: &[f32], scale: f32) -> Self {
        let dim = layout.pq.subvector_dim;
        let most_power = 16 - most_shift(dim);
        let mut integers = Vec::with_capacity(codewords.len());
        let mut rows = vec![[0; 2]; layout.table_rows];
        for (codeword, row) in codewords.chunks_exact(dim).zip(&mut rows) {
            let mut scale = scale;
            let peak = greatest(codeword);
            let mut power = 0;
            while power < most_power && peak * scale * 2.0 <= 127.0 {
                scale *= 2.0;
                power += 1;
            }
            let codeword = codeword.iter().map(|c| (c * scale).round_ties_even());
            let first = integers.len();
            integers.extend(codeword);
            *row = [
                integers[first..].iter().sum::<f32>() as i32,
                power.cast_signed(),
            ];
        }
        let mut squares = squares(&integers, dim);
        for (square, [_, power]) in squares.iter_mut().zip(&rows) {
            let scale = scale * (1 << power) as f32;
            *square /= scale * scale;
        }
        Self {
            scale,
            groups: pack_groups::<Bytes>(layout, panel_rows, &integers),
            squares,
            rows,
        }
    }
}

/// The greatest magnitude.
fn greatest(numbers: &[f32]) -> f32 {
    numbers.iter().fold(0.0, |peak: f32, x| peak.max(x.abs()))
}
