//! Tables built from inputs and codewords of 16 bits.
//!
//! # Why nothing overflows
//!
//! The codewords of a subspace are stored as integers, `w * a`, those of inputs are
//! `x * s * 2^16 / a`, and table entries are the products divided by 2^16. In the terms of
//! [`short`](super::short), rounding table entries adds at most 1/2 per term. Rounding
//! inputs adds at most `sqrt(C' * taps) / 2` to the norm of the integers that p sees, so
//! `sqrt(C' * taps) / 2 * |w * a| / 2^16` to the sum, and `a` is such that `|w * a|` is at
//! most 2^15: `sqrt(C') / 4` per term covers that. So with
//! `s <= (32767 - MAX_TERMS * (1/2 + sqrt(C') / 4) - 1) / bound` every complete sum has 16
//! bits. Inputs have 16 bits because `s` is made smaller if need be.

use super::Scale;
use super::layout::Layout;
use super::short::{
    Codebook, MAX_TERMS, Prepared, Seen, add_by_code, greatest_norm, pack_groups, squares,
};
use crate::isa::Simd;
use crate::kernels::factors::Words;

/// See the module's documentation.
#[derive(Clone, Debug)]
pub(in crate::kernels) struct WordCodebook {
    scale: f32,
    pairs: Vec<i32>,
    squares: Vec<f32>,
}

impl Codebook for WordCodebook {
    type Factors = Words;

    fn table_cycles<S: Simd>(dim: usize) -> f64 {
        0.7 + dim.next_multiple_of(2) as f64
    }

    fn all(layout: &Layout, panel_rows: usize, codebooks: &[f32], codes: &[u16]) -> Vec<Self> {
        let codebook_len = layout.pq.n_centroids * layout.pq.subvector_dim;
        codebooks
            .chunks_exact(codebook_len)
            .enumerate()
            .map(|(i, codewords)| Self::new(layout, i, panel_rows, codewords, codes))
            .collect()
    }

    fn scale(&self) -> f32 {
        self.scale
    }

    fn groups(&self) -> &[i32] {
        &self.pairs
    }

    fn squares(&self) -> &[f32] {
        &self.squares
    }

    #[inline(always)]
    fn limit(seen: &Seen, norm: f32, scale: f32, dim: usize) -> Scale {
        let [low, high] = seen.range;
        let greatest = high.max(-low);
        // So that inputs have 16 bits, and the factor they are multiplied with is an
        // ordinary number.
        let limit = (32_767.0 / greatest).min(1e30) / 65_536.0 * scale;
        // Of inputs whose squares are too large for float32, at most:
        let root = ((MAX_TERMS * dim) as f32).sqrt();
        let bound = seen.norm.min(greatest * root) * norm;
        let rounding = 0.5 + 0.25 * (dim as f32).sqrt();
        // By more than the rounding of the sums above; a smaller scale is always
        // possible, and one that is not too large keeps all factors normal.
        let factor = (32_766.0 - MAX_TERMS as f32 * rounding) / (bound * 1.0001);
        Scale {
            factor: if bound.is_finite() && !seen.norm.is_nan() {
                factor.min(limit).min(1e25)
            } else {
                f32::NAN
            },
            weight: 0,
            zero: 0,
            shift: 16,
        }
    }

    #[inline(always)]
    fn input_factor(&self, scale: Scale) -> f32 {
        scale.factor * 65_536.0 / self.scale
    }

    #[inline(always)]
    fn prepare(&self, _: Scale, _: &mut [Prepared]) {}

    /// Half a unit, so that cutting bits off rounds.
    #[inline(always)]
    fn start<S: Simd>(simd: S, _: &Prepared) -> S::I32 {
        simd.splat_i32(1 << 15)
    }

    #[inline(always)]
    fn entries<S: Simd>(simd: S, _: &Prepared, [even, odd]: [S::I32; 2]) -> S::I16 {
        simd.upper_halves(even, odd)
    }
}

impl WordCodebook {
    /// Make integers of the codewords of codebook `i`, `(K, C')`: as large as
    /// possible such that all that an output uses have a norm of 2^15 at most.
    fn new(layout: &Layout, i: usize, panel_rows: usize, codewords: &[f32], codes: &[u16]) -> Self {
        let pq = layout.pq;
        let dim = pq.subvector_dim;
        let m = i % pq.n_subspaces;
        let all_taps: Vec<usize> = (0..layout.geometry.taps()).collect();
        let floats = squares(codewords, dim);
        let norm = (0..layout.geometry.groups)
            .filter(|&group| layout.codebook(group, m) == i)
            .map(|group| {
                let mut sums = vec![0.0; layout.geometry.group_out_channels()];
                add_by_code(layout, group, m, &all_taps, &floats, codes, &mut sums);
                greatest_norm(&sums)
            })
            .fold(0.0, f32::max);
        let peak = codewords.iter().fold(0.0f32, |peak, c| peak.max(c.abs()));
        // Rounding adds to the norm; so that it stays below 2^15:
        let rounding = 0.5 * ((all_taps.len() * dim) as f32).sqrt();
        let scale = ((32_768.0 - rounding) / norm).min(32_767.0 / peak);
        // Without any weights, or with none that the norm can be computed of.
        let scale = if scale.is_finite() && scale > 0.0 {
            scale
        } else {
            1.0
        };
        let rounded: Vec<f32> = codewords
            .iter()
            .map(|c| (c * scale).round_ties_even())
            .collect();
        let mut squares = squares(&rounded, dim);
        for square in &mut squares {
            *square /= scale * scale;
        }
        Self {
            scale,
            pairs: pack_groups::<Words>(layout, panel_rows, &rounded),
            squares,
        }
    }
}
