//! Tables of 16-bit floats, built and summed as such: where the CPU computes with them, a
//! vector holds twice as many values as of float32.
//!
//! Inputs and codewords are multiplied by scales and rounded. An entry is a chain of fused
//! multiplications, and the terms of a batch are summed as they are looked up; batches, of
//! at most [`MAX_TERMS`], are summed in float32.
//!
//! # Why nothing overflows
//!
//! Let `X` be the greatest magnitude of a scaled input in a group of an image, and `W` the
//! greatest sum of magnitudes of all scaled and rounded numbers of codewords that an output
//! uses for the terms of a batch. Then the magnitudes of the products behind a sum, complete
//! or not, add up to at most `X * W`. Each of the roundings on the way makes a number greater
//! by a factor of at most `1 + 2^-11` or by less than 2^-24, for the smallest. There are at
//! most `C' + MAX_TERMS + 1`: one of the input, `C'` in a chain, the others in sums. So with
//! `X * W <= 60,000 / (1 + 2^-11)^(C' + MAX_TERMS + 1)` every sum and every
//! entry that one uses is less than 65,504, the greatest 16-bit float. Inputs are, because
//! `X` is at most 2^15. Codewords that no output uses are cut to 1; their entries may
//! overflow, but nobody looks them up.
//!
//! Scales for the greatest magnitudes possible leave those that there are far below: for
//! floats that costs no precision as long as they are not as small as 2^-14.

// As in `tile`: index loops keep the sums in registers.
#![allow(clippy::needless_range_loop)]

use ::half::f16;

use super::layout::Layout;
use super::short::{add_by_code, greater};
use super::{Cell, Inputs, Scale};
use crate::isa::{MAX_LANES, Simd};
use crate::kernels::tile::pair;

/// Terms summed in 16 bits. Each addition rounds to 11 bits of the sum so far.
const MAX_TERMS: usize = 108;

/// Codewords whose table rows are built together, and vectors of them: with four cycles for
/// a multiplication and two units, half as many chains would do, but more loads.
const PANEL: [usize; 2] = [8, 2];

/// The greatest magnitude that is aimed at in sums, with a margin for the smallest numbers
/// and for scales.
const GREATEST: f64 = 60_000.0;

/// See the module's documentation.
#[derive(Debug)]
pub(in crate::kernels) struct Half {
    /// For each set and subspace, panels of codewords: `(C', codewords of a panel)`, each
    /// number twice in a word.
    codewords: Vec<i32>,
    /// What codewords were multiplied with, a power of two: what is used is at most 1.
    scale: f32,
    /// `W`, for each group.
    norms: Vec<f32>,
}

impl Cell for Half {
    type Element = i16;
    type Vector<S: Simd> = S::I16;

    const NAME: &'static str = "f16";
    const HALVES: usize = 2;
    const VECTORS: usize = 1;
    const MAX_TERMS: Option<usize> = Some(MAX_TERMS);
    const MAX_BATCHES: usize = usize::MAX;

    fn panel_rows<S: Simd>() -> usize {
        PANEL[0]
    }

    fn table_cycles<S: Simd>(dim: usize) -> f64 {
        dim as f64
    }

    fn read_and_end_cycles<S: Simd>() -> [f64; 2] {
        [6.0, 6.0]
    }

    fn new<S: Simd>(layout: &Layout, codebooks: &[f32], codes: &[u16]) -> Self {
        let scale = scale(layout, codebooks, codes);
        let (pq, dim) = (layout.pq, layout.pq.subvector_dim);
        let rounded: Vec<f16> = codebooks
            .iter()
            .map(|c| f16::from_f32((c * scale).clamp(-1.0, 1.0)))
            .collect();
        let mut codewords = Vec::new();
        for codebook in rounded.chunks_exact(pq.n_centroids * dim) {
            for first in (0..layout.table_rows).step_by(PANEL[0]) {
                for j in 0..dim {
                    codewords.extend((first..first + PANEL[0]).map(|k| {
                        let number = codebook.get(k * dim + j).copied().unwrap_or_default();
                        let bits = number.to_bits().cast_signed();
                        pair(bits, bits)
                    }));
                }
            }
        }
        let of_codewords: Vec<f32> = rounded
            .chunks_exact(dim)
            .enumerate()
            .map(|(i, codeword)| {
                let channels = layout.channels(i / pq.n_centroids % pq.n_subspaces);
                let codeword = codeword[..channels.len()].iter();
                codeword.map(|c| c.to_f32().abs()).sum()
            })
            .collect();
        let norms = (0..layout.geometry.groups).map(|group| {
            let of_batches = layout.batches.iter().map(|batch| {
                let mut norms = vec![0.0; layout.geometry.group_out_channels()];
                for pass in &batch.passes {
                    for source in pass.sources.clone() {
                        let (phase, m) = layout.source(source);
                        let taps = phase.taps_of(&pass.rows);
                        let first = layout.codebook(group, m) * pq.n_centroids;
                        let numbers = &of_codewords[first..][..pq.n_centroids];
                        add_by_code(layout, group, m, taps, numbers, codes, &mut norms);
                    }
                }
                norms.into_iter().fold(0.0, f32::max)
            });
            of_batches.fold(0.0, f32::max)
        });
        Self {
            codewords,
            scale,
            norms: norms.collect(),
        }
    }

    fn scratch_len(layout: &Layout) -> usize {
        let values = layout.pq.subvector_dim * plane_len(layout);
        values * size_of::<i16>() / size_of::<f32>()
    }

    #[inline(always)]
    fn peak<S: Simd>(simd: S, channels: &[f32]) -> f32 {
        let mut greatest = simd.splat(0.0);
        for values in channels.chunks(S::LANES) {
            greatest = simd.max(greatest, simd.abs(simd.load_first(values)));
        }
        let mut lanes = [0.0f32; MAX_LANES];
        simd.store_first(&mut lanes[..S::LANES], greatest);
        lanes.into_iter().fold(0.0, greater)
    }

    #[inline(always)]
    fn inspect<S: Simd>(
        &self,
        _: S,
        inputs: &Inputs<'_>,
        group: usize,
        scales: &mut [Scale],
        _: &mut [f32],
    ) -> f32 {
        let (peak, norm) = (inputs.peak, self.norms[group]);
        let roundings = inputs.layout.pq.subvector_dim + MAX_TERMS + 1;
        let growth = (1.0 + 0.5f64.powi(11)).powi(roundings as i32);
        let greatest = (GREATEST / growth / f64::from(norm)).min(32_768.0);
        let valid = (peak * norm / self.scale).is_finite();
        // Not too large either, so that all factors are normal.
        let factor = (greatest / f64::from(peak)).min(1e25);
        for scale in scales.iter_mut().take(inputs.layout.batches.len()) {
            scale.factor = if valid { factor as f32 } else { 0.0 };
        }
        if valid {
            (1.0 / (factor * f64::from(self.scale))) as f32
        } else {
            f32::NAN
        }
    }

    #[inline(always)]
    fn build<S: Simd>(
        &self,
        simd: S,
        inputs: &Inputs<'_>,
        (codebook, source): (usize, usize),
        scale: Scale,
        table: &mut [i16],
        scratch: &mut [f32],
    ) {
        let layout = inputs.layout;
        let codebook_len = layout.table_rows * layout.pq.subvector_dim;
        let build = BuildTable {
            inputs,
            source,
            codewords: &self.codewords[codebook * codebook_len..][..codebook_len],
            factor: scale.factor,
            planes: bytemuck::cast_slice_mut(scratch),
            table,
        };
        build.run(simd);
    }

    #[inline(always)]
    fn zero<S: Simd>(simd: S) -> S::I16 {
        simd.zero_i16()
    }

    #[inline(always)]
    fn add<S: Simd>(simd: S, a: S::I16, b: S::I16) -> S::I16 {
        simd.add_f16(a, b)
    }

    #[inline(always)]
    fn shift<S: Simd>(simd: S, vector: S::I16, distance: usize) -> S::I16 {
        simd.shift_i16(vector, distance)
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, source: *const i16) -> S::I16 {
        // SAFETY: the caller vouches for a vector.
        unsafe { simd.load_i16(source) }
    }

    #[inline(always)]
    unsafe fn store<S: Simd>(simd: S, target: *mut i16, vector: S::I16) {
        // SAFETY: the caller vouches for a vector.
        unsafe { simd.store_i16(target, vector) }
    }

    #[inline(always)]
    unsafe fn accumulate<S: Simd>(
        simd: S,
        accumulator: *mut f32,
        sum: S::I16,
        _: Scale,
        begin: bool,
    ) {
        let sums = simd.widen_f16(sum);
        for half in 0..2 {
            // SAFETY: the caller vouches for two vectors.
            unsafe {
                let accumulator = accumulator.add(half * S::LANES);
                let sum = if begin {
                    sums[half]
                } else {
                    simd.add(simd.load(accumulator), sums[half])
                };
                simd.store(accumulator, sum);
            }
        }
    }

    #[inline(always)]
    unsafe fn accumulated<S: Simd>(simd: S, accumulator: *const f32) -> [S::F32; 2] {
        // SAFETY: the caller vouches for two vectors.
        unsafe { [simd.load(accumulator), simd.load(accumulator.add(S::LANES))] }
    }
}

/// The greatest power of two that makes no number that an output uses greater than 1.
fn scale(layout: &Layout, codebooks: &[f32], codes: &[u16]) -> f32 {
    let (pq, dim) = (layout.pq, layout.pq.subvector_dim);
    let mut greatest = 0.0f32;
    for group in 0..layout.geometry.groups {
        for m in 0..pq.n_subspaces {
            let channels = layout.channels(m).len();
            let first = layout.codebook(group, m) * pq.n_centroids;
            let peak = |k: usize| {
                let codeword = &codebooks[(first + k) * dim..][..channels];
                codeword.iter().fold(0.0f32, |peak, c| peak.max(c.abs()))
            };
            let peaks: Vec<f32> = (0..pq.n_centroids).map(peak).collect();
            for o in 0..layout.geometry.group_out_channels() {
                for tap in 0..layout.geometry.taps() {
                    greatest = greatest.max(peaks[layout.code(group, o, tap, m, codes)]);
                }
            }
        }
    }
    if greatest == 0.0 {
        return 1.0;
    }
    // Within what float32 has on both sides.
    2.0f32.powi(-(greatest.log2().ceil() as i32).clamp(-100, 100))
}

/// Elements of a plane: whole tiles of products.
fn plane_len(layout: &Layout) -> usize {
    layout.most_plane_vectors().next_multiple_of(PANEL[1]) * layout.lanes
}

/// Inner products of the codewords of a subspace with what a tile sees.
struct BuildTable<'a> {
    inputs: &'a Inputs<'a>,
    source: usize,
    /// Panels of codewords, each `(C', PANEL[0])`.
    codewords: &'a [i32],
    /// What inputs are multiplied with.
    factor: f32,
    /// Room for `(C', plane_len)`.
    planes: &'a mut [i16],
    /// `(codewords, row_len)`
    table: &'a mut [i16],
}

impl BuildTable<'_> {
    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let layout = self.inputs.layout;
        let dim = layout.pq.subvector_dim;
        // Of the last subspace there may be fewer.
        let depth = layout.channels(self.source).len();
        let vectors = layout.plane_vectors(layout.source(self.source).0);
        let lanes = 2 * S::LANES;
        let plane_len = plane_len(layout);
        assert!(depth <= dim && vectors.next_multiple_of(PANEL[1]) * lanes <= plane_len);
        assert!(self.planes.len() >= dim * plane_len);
        let factor = simd.splat(self.factor);
        let sources = self.source..self.source + 1;
        let seen = self.inputs.planes([2, S::LANES], sources);
        for y in 0..vectors {
            let row = seen.runs.row(y);
            for c in 0..depth {
                let low = simd.mul(seen.load(simd, &row, c, 0), factor);
                let high = simd.mul(seen.load(simd, &row, c, 1), factor);
                let at = c * plane_len + y * lanes;
                // SAFETY: there are `dim` >= `depth` planes, each of which holds `vectors`
                // vectors, as asserted.
                unsafe {
                    let target = self.planes.as_mut_ptr().add(at);
                    simd.store_i16(target, simd.narrow_f16(low, high));
                }
            }
        }
        for first in (0..vectors).step_by(PANEL[1]) {
            if first + PANEL[1] <= vectors {
                self.panels::<S, { PANEL[1] }>(simd, depth, first);
            } else {
                self.panels::<S, 1>(simd, depth, first);
            }
        }
    }

    /// `V` vectors of all rows of the table, from vector `first` on, of `depth` planes.
    #[inline(always)]
    fn panels<S: Simd, const V: usize>(&mut self, simd: S, depth: usize, first: usize) {
        const R: usize = PANEL[0];
        let layout = self.inputs.layout;
        let lanes = 2 * S::LANES;
        let (plane_len, row_len) = (plane_len(layout), layout.row_len);
        let panel_len = R * layout.pq.subvector_dim;
        let panels = layout.table_rows / R;
        assert!((first + V) * lanes <= row_len.min(plane_len) && depth * R <= panel_len);
        assert!(self.planes.len() >= depth * plane_len);
        assert!(self.codewords.len() >= panels * panel_len);
        assert!(self.table.len() >= panels * R * row_len);
        for panel in 0..panels {
            let mut products = [[simd.zero_i16(); V]; R];
            // SAFETY: there are `depth` planes, R numbers of codewords for each of them in
            // each panel, and R rows of the table for each panel; planes and rows have V
            // vectors from `first` on: all as asserted.
            unsafe {
                let codewords = self.codewords.as_ptr().add(panel * panel_len);
                for j in 0..depth {
                    let source = self.planes.as_ptr().add(j * plane_len + first * lanes);
                    let mut inputs = [simd.zero_i16(); V];
                    for v in 0..V {
                        inputs[v] = simd.load_i16(source.add(v * lanes));
                    }
                    for i in 0..R {
                        let number = simd.splat_pair(*codewords.add(j * R + i));
                        for v in 0..V {
                            products[i][v] = simd.mul_add_f16(inputs[v], number, products[i][v]);
                        }
                    }
                }
                let table = self.table.as_mut_ptr();
                let table = table.add(panel * R * row_len + first * lanes);
                for i in 0..R {
                    for v in 0..V {
                        simd.store_i16(table.add(i * row_len + v * lanes), products[i][v]);
                    }
                }
            }
        }
    }
}
