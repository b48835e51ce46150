//! Tables of 16-bit integers: a vector holds twice as many values as of float32.
//!
//! Tables are built from 16-bit inputs and codewords as well: a multiplication
//! then makes two products of every lane. Sums of a batch have 16 bits, those of
//! all batches 32.
//!
//! # Why nothing overflows
//!
//! The codewords of a subspace are stored as integers, `w * a`. A batch has a
//! scale `s` for its terms, at most [`MAX_TERMS`](Cell::MAX_TERMS), in a tile of
//! an image. The inputs become integers `x * s * 2^16 / a`, and table entries,
//! products divided by 2^16, are `x * w * s`. By Cauchy and Schwarz, what output o
//! adds at pixel p is at most `|x(p)| * |w(o)|`: the norms of all the input that p
//! sees in the terms of the batch, and of all codewords that o uses for them. With
//!
//! `bound = (max over p of |x(p)|) * (max over o of |w(o)|)`
//!
//! the sum is at most `s * bound`. Rounding table entries adds at most 1/2 per
//! term. Rounding inputs adds at most `sqrt(C' * taps) / 2` to the norm of the
//! integers that p sees, so `sqrt(C' * taps) / 2 * |w * a| / 2^16` to the sum,
//! and `a` is such that `|w * a|` is at most 2^15: `sqrt(C') / 4` per term covers
//! that. So with `s <= (32767 - MAX_TERMS * (1/2 + sqrt(C') / 4) - 1) / bound`
//! every complete sum, and every table entry that a complete sum uses, has 16
//! bits. Sums of some of the terms may wrap around, which does not change the
//! complete ones. Inputs have 16 bits because `s` is made smaller if need be.
//!
//! Let `S_b` be the greatest such scale of batch b. With a common scale `c`, the
//! batch gets the weight `w_b = ceil(c / S_b)` and the scale `s_b = c / w_b`, which
//! is at most `S_b`. The sum over all batches of `w_b` times 16-bit sums is then
//! the response times `c`; it has 32 bits as long as the weights add up to at most
//! 2^16, so `c = (2^16 - 1 - batches) / (sum over b of 1 / S_b)`, or less if a
//! weight would not have 16 bits. Weights are large numbers, so `s_b` is close to
//! `S_b`, unless a batch contributes little.

// As in `tile`: index loops keep the sums in registers.
#![allow(clippy::needless_range_loop)]

use std::ops::Range;

use super::layout::{Batch, Layout};
use super::{Cell, Inputs, Scale};
use crate::isa::Simd;
use crate::kernels::tile::pair;

/// Terms summed in 16 bits. Each term's rounding error is up to half a unit of a
/// scale that shrinks with the number of terms: their effect on the response
/// grows with it.
const MAX_TERMS: usize = 36;

/// Sum of the weights of all batches, at most.
const MAX_WEIGHTS: usize = (1 << 16) - 1;

/// Added to squared norms, so that squares too small for float32 do no harm.
const LEAST_SQUARE: f32 = 1e-36;

/// How far ahead the input is fetched: rows of a tile lie too far apart for the CPU to
/// foresee them.
const ROWS_AHEAD: usize = 3;

/// Most lanes of a vector of 16-bit integers on any level.
const MAX_LANES: usize = 32;

/// See the module's documentation.
#[derive(Debug)]
pub(in crate::kernels) struct Short {
    codebooks: Vec<Codebook>,
    /// For each group and batch the greatest norm of the codewords of an output.
    norms: Vec<f32>,
}

/// The codewords of a subspace as 16-bit integers.
#[derive(Clone, Debug)]
struct Codebook {
    /// What they were multiplied with.
    scale: f32,
    /// Panels of `panel_rows` codewords, each `(pairs of channels, panel_rows)`,
    /// the first channel in the lower half.
    pairs: Vec<i32>,
    /// The squared norm of each codeword, of the integers divided by the scale.
    squares: Vec<f32>,
}

impl Cell for Short {
    type Element = i16;
    type Vector<S: Simd> = S::I16;

    const NAME: &'static str = "i16";
    const HALVES: usize = 2;
    const VECTORS: usize = 1;
    const MAX_TERMS: Option<usize> = Some(MAX_TERMS);
    const MAX_BATCHES: usize = MAX_WEIGHTS / 2;

    /// With 2 vectors each, the sums take half of the registers.
    fn panel_rows<S: Simd>() -> usize {
        if S::REGISTERS >= 32 { 8 } else { 4 }
    }

    fn table_cycles(dim: usize) -> f64 {
        0.7 + dim.next_multiple_of(2) as f64
    }

    fn new<S: Simd>(layout: &Layout, codebooks: &[f32], codes: &[u16]) -> Self {
        let codebook_len = layout.pq.n_centroids * layout.pq.subvector_dim;
        let codebooks: Vec<Codebook> = codebooks
            .chunks_exact(codebook_len)
            .enumerate()
            .map(|(i, codewords)| {
                Codebook::new(layout, i, codewords, Self::panel_rows::<S>(), codes)
            })
            .collect();
        let mut norms = Vec::new();
        for group in 0..layout.geometry.groups {
            for batch in &layout.batches {
                let mut squares = vec![0.0; layout.geometry.group_out_channels()];
                for pass in &batch.passes {
                    for source in pass.sources.clone() {
                        let (phase, m) = layout.source(source);
                        let taps = phase.taps_of(&pass.rows);
                        let of_codewords = &codebooks[layout.codebook(group, m)].squares;
                        add_squares(layout, group, m, taps, of_codewords, codes, &mut squares);
                    }
                }
                norms.push(greatest_norm(&squares));
            }
        }
        Self { codebooks, norms }
    }

    /// What [`inspect`](Self::inspect) and [`build`](Self::build) need, at
    /// different times.
    fn scratch_len(layout: &Layout) -> usize {
        let bounds = layout.cut.rows * layout.lanes;
        let squares = layout.most_plane_vectors() * layout.lanes;
        let pairs = layout.pq.subvector_dim.div_ceil(2) * squares;
        (bounds + squares).max(pairs)
    }

    #[inline(always)]
    fn inspect<S: Simd>(
        &self,
        simd: S,
        inputs: &Inputs<'_>,
        group: usize,
        scales: &mut [f32],
        scratch: &mut [f32],
    ) -> f32 {
        let layout = inputs.layout;
        let n_batches = layout.batches.len();
        let norms = &self.norms[n_batches * group..][..n_batches];
        // Of 1 / S_b.
        let (mut sum, mut greatest) = (0.0f64, 0.0f64);
        let batches = layout.batches.iter().zip(norms.iter().copied());
        for (batch, scale) in batches.zip(scales.chunks_exact_mut(2)) {
            let limit = self.scale_of_batch(simd, inputs, group, batch, scratch);
            scale[0] = limit;
            let inverse = 1.0 / f64::from(limit);
            sum += inverse;
            greatest = greatest.max(inverse);
        }
        let common = ((MAX_WEIGHTS - n_batches) as f64 / sum).min(32_766.0 / greatest);
        let valid = common.is_finite() && common > 0.0;
        for scale in scales.chunks_exact_mut(2).take(n_batches) {
            let weight = if valid {
                (common / f64::from(scale[0])).ceil().max(1.0)
            } else {
                1.0
            };
            scale[0] = if valid { (common / weight) as f32 } else { 0.0 };
            scale[1] = weight as f32;
        }
        if valid {
            (1.0 / common) as f32
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
        let codebook = &self.codebooks[codebook];
        let layout = inputs.layout;
        let build = BuildTable {
            codewords: &codebook.pairs,
            vectors: layout.plane_vectors(layout.source(source).0),
            planes: bytemuck::cast_slice_mut(scratch),
            table,
        };
        let scale = scale.factor * 65_536.0 / codebook.scale;
        if Self::panel_rows::<S>() == 8 {
            build.panels::<S, 8>(simd, inputs, source, scale);
        } else {
            build.panels::<S, 4>(simd, inputs, source, scale);
        }
    }

    #[inline(always)]
    fn zero<S: Simd>(simd: S) -> S::I16 {
        simd.zero_i16()
    }

    #[inline(always)]
    fn add<S: Simd>(simd: S, a: S::I16, b: S::I16) -> S::I16 {
        simd.add_i16(a, b)
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

    /// Those of even lanes, then those of odd lanes.
    #[inline(always)]
    unsafe fn accumulate<S: Simd>(
        simd: S,
        accumulator: *mut f32,
        sum: S::I16,
        scale: Scale,
        begin: bool,
    ) {
        let accumulator: *mut i32 = accumulator.cast();
        // One of each pair of lanes counts.
        let weights = [scale.weight, scale.weight << 16];
        for half in 0..2 {
            // SAFETY: the caller vouches for two vectors.
            unsafe {
                let accumulator = accumulator.add(half * S::LANES);
                let before = if begin {
                    simd.splat_i32(0)
                } else {
                    simd.load_i32(accumulator)
                };
                let weight = simd.splat_pair(weights[half]);
                simd.store_i32(accumulator, simd.dot_i16(sum, weight, before));
            }
        }
    }

    #[inline(always)]
    unsafe fn accumulated<S: Simd>(simd: S, accumulator: *const f32) -> [S::F32; 2] {
        let accumulator: *const i32 = accumulator.cast();
        // SAFETY: the caller vouches for two vectors.
        let [even, odd] = unsafe {
            [
                simd.load_i32(accumulator),
                simd.load_i32(accumulator.add(S::LANES)),
            ]
        };
        simd.interleave_i32(even, odd)
    }
}

impl Short {
    /// The greatest scale of a batch, see the module's documentation. It is NaN if
    /// the input is not finite, or its squares are not.
    #[inline(always)]
    fn scale_of_batch<S: Simd>(
        &self,
        simd: S,
        inputs: &Inputs<'_>,
        group: usize,
        (batch, norm): (&Batch, f32),
        scratch: &mut [f32],
    ) -> f32 {
        let layout = inputs.layout;
        let lanes = 2 * S::LANES;
        // For each output the squared norm of all that it sees.
        let (bounds, squares) = scratch.split_at_mut(layout.cut.rows * lanes);
        bounds.fill(0.0);
        let mut limit = f32::INFINITY;
        for pass in &batch.passes {
            let phase = &layout.phases[pass.phase];
            let peak = sum_squares(simd, inputs, pass.sources.clone(), squares).sqrt();
            for source in pass.sources.clone() {
                let m = layout.source(source).1;
                let scale = self.codebooks[layout.codebook(group, m)].scale;
                // So that inputs have 16 bits, and the factor they are multiplied
                // with is an ordinary number.
                limit = limit.min((32_767.0 / peak).min(1e30) / 65_536.0 * scale);
            }
            for (y, bounds) in bounds.chunks_exact_mut(lanes).enumerate() {
                // The taps of each column, then all columns.
                let mut sums = [0.0f32; 2 * MAX_LANES];
                for half in 0..2 {
                    let mut sum = simd.splat(0.0);
                    for &row in &phase.rows[pass.rows.clone()] {
                        let squares = &squares[(y + row) * lanes + half * S::LANES..];
                        sum = simd.add(sum, simd.load_first(&squares[..S::LANES]));
                    }
                    simd.store_first(&mut sums[half * S::LANES..][..S::LANES], sum);
                }
                for (half, bounds) in bounds.chunks_exact_mut(S::LANES).enumerate() {
                    let mut bound = simd.load_first(bounds);
                    for &column in &phase.columns {
                        let sums = &sums[column + half * S::LANES..];
                        bound = simd.add(bound, simd.load_first(&sums[..S::LANES]));
                    }
                    simd.store_first(bounds, bound);
                }
            }
        }
        // Of all rows, then of the lanes that are no halo.
        let (first, others) = bounds.split_at_mut(lanes);
        for bounds in others.chunks_exact(lanes) {
            for half in 0..2 {
                let half = half * S::LANES..(half + 1) * S::LANES;
                let bound = simd.load_first(&bounds[half.clone()]);
                let greatest = simd.max(simd.load_first(&first[half.clone()]), bound);
                simd.store_first(&mut first[half], greatest);
            }
        }
        let mut greatest = 0.0;
        for part in first.chunks_exact(layout.cut.part_lanes) {
            for &bound in &part[..layout.cut.width] {
                greatest = greater(greatest, bound);
            }
        }
        let bound = greatest.sqrt() * norm;
        let rounding = 0.5 + 0.25 * (layout.pq.subvector_dim as f32).sqrt();
        // By more than the rounding of the sums above; a smaller scale is always
        // possible, and one that is not too large keeps all factors normal.
        let scale = (32_766.0 - MAX_TERMS as f32 * rounding) / (bound * 1.0001);
        if bound.is_finite() {
            scale.min(limit).min(1e25)
        } else {
            f32::NAN
        }
    }
}

impl Codebook {
    /// Make integers of the codewords of codebook `i`, `(K, C')`: as large as
    /// possible such that all that an output uses have a norm of 2^15 at most.
    fn new(layout: &Layout, i: usize, codewords: &[f32], panel_rows: usize, codes: &[u16]) -> Self {
        let pq = layout.pq;
        let dim = pq.subvector_dim;
        let m = i % pq.n_subspaces;
        let squares = |codewords: &[f32]| -> Vec<f32> {
            let squares = codewords.chunks_exact(dim);
            squares
                .map(|codeword| codeword.iter().map(|c| c * c).sum())
                .collect()
        };
        let all_taps: Vec<usize> = (0..layout.geometry.taps()).collect();
        let floats = squares(codewords);
        let norm = (0..layout.geometry.groups)
            .filter(|&group| layout.codebook(group, m) == i)
            .map(|group| {
                let mut sums = vec![0.0; layout.geometry.group_out_channels()];
                add_squares(layout, group, m, &all_taps, &floats, codes, &mut sums);
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
        let channel = |k: usize, j: usize| {
            let exists = k < pq.n_centroids && j < dim;
            if exists {
                rounded[k * dim + j] as i16
            } else {
                0
            }
        };
        let mut pairs = Vec::with_capacity(layout.table_rows * dim.div_ceil(2));
        for first in (0..layout.table_rows).step_by(panel_rows) {
            for j in (0..dim).step_by(2) {
                pairs.extend(
                    (first..first + panel_rows).map(|k| pair(channel(k, j), channel(k, j + 1))),
                );
            }
        }
        let mut squares = squares(&rounded);
        for square in &mut squares {
            *square /= scale * scale;
        }
        Self {
            scale,
            pairs,
            squares,
        }
    }
}

/// Add to `sums`, one for each output of a group, the squared norms of the
/// codewords of subspace `m` that it adds through some taps.
fn add_squares(
    layout: &Layout,
    group: usize,
    m: usize,
    taps: &[usize],
    squares: &[f32],
    codes: &[u16],
    sums: &mut [f32],
) {
    for (o, sum) in sums.iter_mut().enumerate() {
        *sum += taps
            .iter()
            .map(|&tap| squares[layout.code(group, o, tap, m, codes)])
            .sum::<f32>();
    }
}

/// The greatest of the norms with these squares, rounded up by more than sums of
/// squares can be wrong.
fn greatest_norm(squares: &[f32]) -> f32 {
    squares.iter().copied().fold(0.0, greater).sqrt() * 1.0001
}

/// The greater value, or NaN if either is NaN.
#[inline(always)]
fn greater(a: f32, b: f32) -> f32 {
    if b > a || b.is_nan() { b } else { a }
}

/// Squared norms of what a tile sees of some sources with taps alike, for each pixel.
/// Returns the greatest that is finite.
#[inline(always)]
fn sum_squares<S: Simd>(
    simd: S,
    inputs: &Inputs<'_>,
    sources: Range<usize>,
    squares: &mut [f32],
) -> f32 {
    let layout = inputs.layout;
    let vectors = layout.plane_vectors(layout.source(sources.start).0);
    let squares = &mut squares[..2 * vectors * S::LANES];
    squares.fill(LEAST_SQUARE);
    for sources in layout.by_phase(sources) {
        let seen = inputs.planes([2, S::LANES], sources);
        let depth = seen.channels.len() / seen.runs.pixels().max(1);
        for (y, squares) in squares.chunks_exact_mut(2 * S::LANES).enumerate() {
            let row = seen.runs.row(y);
            let ahead = seen.runs.row(y + ROWS_AHEAD);
            for half in 0..2 {
                let squares = &mut squares[half * S::LANES..][..S::LANES];
                let mut sum = simd.load_first(squares);
                for c in 0..depth {
                    seen.prefetch(simd, &ahead, c, half);
                    let x = seen.load(simd, &row, c, half);
                    sum = simd.mul_add(x, x, sum);
                }
                simd.store_first(squares, sum);
            }
        }
    }
    let mut peaks = [0.0f32; MAX_LANES];
    for squares in squares.chunks_exact(2 * S::LANES) {
        for lane in 0..2 * S::LANES {
            let higher = squares[lane] > peaks[lane] && squares[lane] < f32::INFINITY;
            peaks[lane] = if higher { squares[lane] } else { peaks[lane] };
        }
    }
    peaks.into_iter().fold(0.0, f32::max)
}

/// Inner products of the codewords of a subspace with what a tile sees, divided by
/// 2^16 and rounded.
struct BuildTable<'a> {
    /// Panels of `R` codewords, each `(pairs of channels, R)`.
    codewords: &'a [i32],
    /// Vectors of a plane.
    vectors: usize,
    /// Room for pairs of channels `(pairs, vectors, 2)`: even, then odd lanes.
    planes: &'a mut [i16],
    /// `(codewords, row_len)`
    table: &'a mut [i16],
}

impl BuildTable<'_> {
    #[inline(always)]
    fn panels<S: Simd, const R: usize>(
        self,
        simd: S,
        inputs: &Inputs<'_>,
        source: usize,
        scale: f32,
    ) {
        let layout = inputs.layout;
        let lanes = 2 * S::LANES;
        // Of the last subspace may be fewer.
        let channels = layout.channels(source).len();
        let depth = channels.div_ceil(2);
        let panel_len = R * layout.pq.subvector_dim.div_ceil(2);
        let panels = layout.table_rows / R;
        let (vectors, row_len) = (self.vectors, layout.row_len);
        assert!(depth * R <= panel_len && vectors * lanes <= row_len);
        assert!(self.codewords.len() >= panels * panel_len);
        assert!(self.planes.len() >= depth * vectors * 2 * lanes);
        assert!(self.table.len() >= panels * R * row_len);

        let scale = simd.splat(scale);
        let seen = inputs.planes([2, S::LANES], source..source + 1);
        for y in 0..vectors {
            let row = seen.runs.row(y);
            for pair in 0..depth {
                let mut rounded = [simd.zero_i16(); 2];
                for i in 0..2 {
                    let c = 2 * pair + i;
                    if c < channels {
                        let low = simd.mul(seen.load(simd, &row, c, 0), scale);
                        let high = simd.mul(seen.load(simd, &row, c, 1), scale);
                        rounded[i] = simd.round_i16(low, high);
                    }
                }
                let zipped = simd.zip_i16(rounded[0], rounded[1]);
                for i in 0..2 {
                    let at = ((pair * vectors + y) * 2 + i) * lanes;
                    // SAFETY: `planes` holds two vectors for each vector of each
                    // pair, as asserted; y is less than `vectors`.
                    unsafe { simd.store_i16(self.planes.as_mut_ptr().add(at), zipped[i]) };
                }
            }
        }
        for vector in 0..vectors {
            for panel in 0..panels {
                // Half a unit, so that cutting bits off rounds.
                let mut products = [[simd.splat_i32(1 << 15); 2]; R];
                // SAFETY: there are `depth` planes of `vectors` times 2 vectors, R
                // rows of the table, each of at least `vectors` vectors, for each
                // of the panels, and each panel has R pairs for at least `depth`
                // planes, as asserted.
                unsafe {
                    let codewords = self.codewords.as_ptr().add(panel * panel_len);
                    for pair in 0..depth {
                        let at = (pair * vectors + vector) * 2 * lanes;
                        let source = self.planes.as_ptr().add(at);
                        let inputs = [simd.load_i16(source), simd.load_i16(source.add(lanes))];
                        for i in 0..R {
                            let codeword = simd.splat_pair(*codewords.add(pair * R + i));
                            for v in 0..2 {
                                products[i][v] = simd.dot_i16(inputs[v], codeword, products[i][v]);
                            }
                        }
                    }
                    let at = panel * R * row_len + vector * lanes;
                    let table = self.table.as_mut_ptr().add(at);
                    for i in 0..R {
                        let entries = simd.upper_halves(products[i][0], products[i][1]);
                        simd.store_i16(table.add(i * row_len), entries);
                    }
                }
            }
        }
    }
}
