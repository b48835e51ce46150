//! Tables of 16-bit integers: a vector holds twice as many values as of float32.
//!
//! Tables are built from integers, too: inputs and codewords of 16 bits, see
//! [`word`](super::word), or of 8, see [`byte`](super::byte). A multiplication then makes
//! two or four products of every lane. Sums of a batch have 16 bits, those of all batches
//! 32.
//!
//! # Why nothing overflows
//!
//! A batch has a scale `s` for its terms, at most [`MAX_TERMS`], in a tile of an image:
//! table entries are `x * w * s`, made of integers and rounded. By Cauchy and Schwarz, what
//! output o adds at pixel p is at most `|x(p)| * |w(o)|`: the norms of all the input that p
//! sees in the terms of the batch, and of all codewords that o uses for them. With
//!
//! `bound = (max over p of |x(p)|) * (max over o of |w(o)|)`
//!
//! the sum is at most `s * bound`. What rounding adds depends on the integers; their modules
//! give the greatest scale with which every complete sum, and every table entry that a
//! complete sum uses, has 16 bits. Sums of some of the terms may wrap around, which does not
//! change the complete ones.
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

use std::fmt::Debug;
use std::ops::Range;

use super::layout::{Batch, Layout};
use super::{Cell, Inputs, Scale};
use crate::isa::Simd;
use crate::kernels::factors::{Factors, MAX_GROUP};
use crate::kernels::has_wide_units;

/// Terms summed in 16 bits. Each term's rounding error is up to half a unit of a
/// scale that shrinks with the number of terms: their effect on the response
/// grows with it.
pub(super) const MAX_TERMS: usize = 36;

/// Sum of the weights of all batches, at most.
const MAX_WEIGHTS: usize = (1 << 16) - 1;

/// Added to squared norms, so that squares too small for float32 do no harm.
const LEAST_SQUARE: f32 = 1e-36;

/// How far ahead the input is fetched: rows of a tile lie too far apart for the CPU to
/// foresee them.
const ROWS_AHEAD: usize = 3;

/// Most lanes of a vector of 16-bit integers on any level.
const MAX_LANES: usize = 32;

/// Numbers for each row of a table that is built: see [`Codebook::prepare`].
pub(in crate::kernels) type Prepared = [i32; 3];

/// See the module's documentation.
#[derive(Debug)]
pub(in crate::kernels) struct Short<B> {
    codebooks: Vec<B>,
    /// For each group and batch the greatest norm of the codewords of an output.
    norms: Vec<f32>,
}

/// The codewords of a subspace as integers.
pub(in crate::kernels) trait Codebook:
    Debug + Send + Sync + Sized + 'static
{
    /// How they are multiplied.
    type Factors: Factors;

    /// See [`Cell::table_cycles`].
    fn table_cycles<S: Simd>(dim: usize) -> f64;

    /// Make integers of all codebooks, `(sets, M, K, C')`, in panels of `panel_rows`
    /// codewords.
    fn all(layout: &Layout, panel_rows: usize, codebooks: &[f32], codes: &[u16]) -> Vec<Self>;

    /// What codewords were multiplied with.
    fn scale(&self) -> f32;

    /// Panels of codewords, each `(groups of channels, panel_rows)`.
    fn groups(&self) -> &[i32];

    /// The squared norm of each codeword, of the integers divided by the scale.
    fn squares(&self) -> &[f32];

    /// The greatest scale of a batch in a tile that sees `seen`, with codewords of at most
    /// the norm `norm` and at least the scale `scale`; of length `dim`. The weight is left
    /// open. The factor is NaN if the input is not finite.
    fn limit(seen: &Seen, norm: f32, scale: f32, dim: usize) -> Scale;

    /// What to multiply inputs with in a batch.
    fn input_factor(&self, scale: Scale) -> f32;

    /// Prepare [`start`](Self::start) and [`entries`](Self::entries) of all rows.
    fn prepare(&self, scale: Scale, rows: &mut [Prepared]);

    /// What sums of products start from.
    fn start<S: Simd>(simd: S, row: &Prepared) -> S::I32;

    /// Table entries, of sums of products in even and in odd lanes.
    fn entries<S: Simd>(simd: S, row: &Prepared, sums: [S::I32; 2]) -> S::I16;
}

/// What the terms of a batch see in a tile.
#[derive(Debug)]
pub(in crate::kernels) struct Seen {
    /// The least and the greatest input, 0 included.
    pub range: [f32; 2],
    /// The greatest norm of all that an output sees, NaN if it sees one.
    pub norm: f32,
}

impl<B: Codebook> Cell for Short<B> {
    type Element = i16;
    type Vector<S: Simd> = S::I16;

    const NAME: &'static str = B::Factors::NAME;
    const HALVES: usize = 2;
    const VECTORS: usize = 1;
    const MAX_TERMS: Option<usize> = Some(MAX_TERMS);
    const MAX_BATCHES: usize = MAX_WEIGHTS / 2;

    /// With 2 vectors each, the sums take half of the registers.
    fn panel_rows<S: Simd>() -> usize {
        if S::REGISTERS >= 32 { 8 } else { 4 }
    }

    fn table_cycles<S: Simd>(dim: usize) -> f64 {
        B::table_cycles::<S>(dim)
    }

    fn read_and_end_cycles<S: Simd>() -> [f64; 2] {
        if has_wide_units::<S>() {
            [16.0, 12.0]
        } else {
            [12.0, 4.0]
        }
    }

    fn new<S: Simd>(layout: &Layout, codebooks: &[f32], codes: &[u16]) -> Self {
        let codebooks = B::all(layout, Self::panel_rows::<S>(), codebooks, codes);
        let mut norms = Vec::new();
        for group in 0..layout.geometry.groups {
            for batch in &layout.batches {
                let mut squares = vec![0.0; layout.geometry.group_out_channels()];
                for pass in &batch.passes {
                    for source in pass.sources.clone() {
                        let (phase, m) = layout.source(source);
                        let taps = phase.taps_of(&pass.rows);
                        let of_codewords = codebooks[layout.codebook(group, m)].squares();
                        add_by_code(layout, group, m, taps, of_codewords, codes, &mut squares);
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
        let prepared = layout.table_rows * size_of::<Prepared>() / size_of::<f32>();
        let groups = layout.pq.subvector_dim.div_ceil(B::Factors::GROUP) * squares;
        (bounds + squares).max(prepared + groups)
    }

    #[inline(always)]
    fn inspect<S: Simd>(
        &self,
        simd: S,
        inputs: &Inputs<'_>,
        group: usize,
        scales: &mut [Scale],
        scratch: &mut [f32],
    ) -> f32 {
        let layout = inputs.layout;
        let n_batches = layout.batches.len();
        let norms = &self.norms[n_batches * group..][..n_batches];
        // Of 1 / S_b.
        let (mut sum, mut greatest) = (0.0f64, 0.0f64);
        let batches = layout.batches.iter().zip(norms.iter().copied());
        for ((batch, norm), scale) in batches.zip(&mut *scales) {
            let seen = see(simd, inputs, batch, scratch);
            let least = self.least_scale(layout, group, batch);
            *scale = B::limit(&seen, norm, least, layout.pq.subvector_dim);
            let inverse = 1.0 / f64::from(scale.factor);
            sum += inverse;
            greatest = greatest.max(inverse);
        }
        let common = ((MAX_WEIGHTS - n_batches) as f64 / sum).min(32_766.0 / greatest);
        let valid = common.is_finite() && common > 0.0;
        for scale in scales.iter_mut().take(n_batches) {
            let weight = if valid {
                (common / f64::from(scale.factor)).ceil().max(1.0)
            } else {
                1.0
            };
            scale.factor = if valid { (common / weight) as f32 } else { 0.0 };
            scale.weight = weight as i32;
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
        let prepared = layout.table_rows * size_of::<Prepared>() / size_of::<f32>();
        let (rows, planes) = scratch.split_at_mut(prepared);
        let rows: &mut [Prepared] = bytemuck::cast_slice_mut(rows);
        codebook.prepare(scale, rows);
        let build = BuildTable {
            codebook,
            rows,
            factor: codebook.input_factor(scale),
            zero: scale.zero,
            vectors: layout.plane_vectors(layout.source(source).0),
            planes: bytemuck::cast_slice_mut(planes),
            table,
        };
        if Self::panel_rows::<S>() == 8 {
            build.panels::<S, 8>(simd, inputs, source);
        } else {
            build.panels::<S, 4>(simd, inputs, source);
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

impl<B: Codebook> Short<B> {
    /// The least scale of the codebooks of a batch.
    fn least_scale(&self, layout: &Layout, group: usize, batch: &Batch) -> f32 {
        let sources = batch.passes.iter().flat_map(|pass| pass.sources.clone());
        let codebooks = sources.map(|source| layout.codebook(group, layout.source(source).1));
        let scales = codebooks.map(|codebook| self.codebooks[codebook].scale());
        scales.fold(f32::INFINITY, f32::min)
    }
}

/// What a batch sees.
#[inline(always)]
fn see<S: Simd>(simd: S, inputs: &Inputs<'_>, batch: &Batch, scratch: &mut [f32]) -> Seen {
    let layout = inputs.layout;
    let lanes = 2 * S::LANES;
    // For each output the squared norm of all that it sees.
    let (bounds, squares) = scratch.split_at_mut(layout.cut.rows * lanes);
    bounds.fill(0.0);
    let mut range = [0.0f32; 2];
    for pass in &batch.passes {
        let phase = &layout.phases[pass.phase];
        let [low, high] = sum_squares(simd, inputs, pass.sources.clone(), squares);
        range = [range[0].min(low), range[1].max(high)];
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
    Seen {
        range,
        norm: greatest.sqrt(),
    }
}

/// Add to `sums`, one for each output of a group, the numbers of the codewords of subspace
/// `m` that it adds through some taps.
pub(super) fn add_by_code(
    layout: &Layout,
    group: usize,
    m: usize,
    taps: &[usize],
    numbers: &[f32],
    codes: &[u16],
    sums: &mut [f32],
) {
    for (o, sum) in sums.iter_mut().enumerate() {
        *sum += taps
            .iter()
            .map(|&tap| numbers[layout.code(group, o, tap, m, codes)])
            .sum::<f32>();
    }
}

/// The greatest of the norms with these squares, rounded up by more than sums of
/// squares can be wrong.
pub(super) fn greatest_norm(squares: &[f32]) -> f32 {
    squares.iter().copied().fold(0.0, greater).sqrt() * 1.0001
}

/// The greater value, or NaN if either is NaN.
#[inline(always)]
pub(super) fn greater(a: f32, b: f32) -> f32 {
    if b > a || b.is_nan() { b } else { a }
}

/// Squared norms of what a tile sees of some sources with taps alike, for each pixel.
/// Returns the least and the greatest number, 0 included, or any of them where one is NaN.
#[inline(always)]
fn sum_squares<S: Simd>(
    simd: S,
    inputs: &Inputs<'_>,
    sources: Range<usize>,
    squares: &mut [f32],
) -> [f32; 2] {
    let layout = inputs.layout;
    let vectors = layout.plane_vectors(layout.source(sources.start).0);
    let squares = &mut squares[..2 * vectors * S::LANES];
    squares.fill(LEAST_SQUARE);
    let mut range = [simd.splat(0.0); 2];
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
                    range = [simd.min(range[0], x), simd.max_number(range[1], x)];
                }
                simd.store_first(squares, sum);
            }
        }
    }
    let mut lanes = [[0.0f32; MAX_LANES / 2]; 2];
    for (lanes, vector) in lanes.iter_mut().zip(range) {
        simd.store_first(lanes, vector);
    }
    let [low, high] = lanes;
    [
        low.into_iter().fold(0.0, f32::min),
        high.into_iter().fold(0.0, f32::max),
    ]
}

/// Inner products of the codewords of a subspace with what a tile sees.
struct BuildTable<'a, B> {
    codebook: &'a B,
    /// For each row of the table.
    rows: &'a [Prepared],
    /// What inputs are multiplied with, and what their integers are raised by.
    factor: f32,
    zero: i32,
    /// Vectors of a plane.
    vectors: usize,
    /// Room for groups of channels `(groups, vectors, 2)`: even, then odd lanes.
    planes: &'a mut [i16],
    /// `(codewords, row_len)`
    table: &'a mut [i16],
}

impl<B: Codebook> BuildTable<'_, B> {
    #[inline(always)]
    fn panels<S: Simd, const R: usize>(self, simd: S, inputs: &Inputs<'_>, source: usize) {
        let layout = inputs.layout;
        let lanes = 2 * S::LANES;
        // Of the last subspace may be fewer.
        let channels = layout.channels(source).len();
        let depth = channels.div_ceil(B::Factors::GROUP);
        let panel_len = R * layout.pq.subvector_dim.div_ceil(B::Factors::GROUP);
        let panels = layout.table_rows / R;
        let codewords = self.codebook.groups();
        let (vectors, row_len) = (self.vectors, layout.row_len);
        assert!(depth * R <= panel_len && vectors * lanes <= row_len);
        assert!(codewords.len() >= panels * panel_len && self.rows.len() >= panels * R);
        assert!(self.planes.len() >= depth * vectors * 2 * lanes);
        assert!(self.table.len() >= panels * R * row_len);

        let factor = simd.splat(self.factor);
        let seen = inputs.planes([2, S::LANES], source..source + 1);
        for y in 0..vectors {
            let row = seen.runs.row(y);
            for group in 0..depth {
                let mut rounded = [simd.zero_i16(); MAX_GROUP];
                for i in 0..B::Factors::GROUP {
                    let c = B::Factors::GROUP * group + i;
                    if c < channels {
                        let low = simd.mul(seen.load(simd, &row, c, 0), factor);
                        let high = simd.mul(seen.load(simd, &row, c, 1), factor);
                        rounded[i] = simd.round_i16(low, high);
                    }
                }
                let groups = B::Factors::inputs(simd, rounded, self.zero);
                for i in 0..2 {
                    let at = ((group * vectors + y) * 2 + i) * lanes;
                    // SAFETY: `planes` holds two vectors for each vector of each
                    // group, as asserted; y is less than `vectors`.
                    unsafe { simd.store_i16(self.planes.as_mut_ptr().add(at), groups[i]) };
                }
            }
        }
        for vector in 0..vectors {
            for panel in 0..panels {
                let rows = &self.rows[panel * R..][..R];
                let mut products = [[simd.splat_i32(0); 2]; R];
                for i in 0..R {
                    products[i] = [B::start(simd, &rows[i]); 2];
                }
                // SAFETY: there are `depth` planes of `vectors` times 2 vectors, R
                // rows of the table, each of at least `vectors` vectors, for each
                // of the panels, and each panel has R groups for at least `depth`
                // planes, as asserted.
                unsafe {
                    let codewords = codewords.as_ptr().add(panel * panel_len);
                    for group in 0..depth {
                        let at = (group * vectors + vector) * 2 * lanes;
                        let source = self.planes.as_ptr().add(at);
                        let inputs = [simd.load_i16(source), simd.load_i16(source.add(lanes))];
                        for i in 0..R {
                            let codeword = *codewords.add(group * R + i);
                            for v in 0..2 {
                                products[i][v] =
                                    B::Factors::dot(simd, inputs[v], codeword, products[i][v]);
                            }
                        }
                    }
                    let at = panel * R * row_len + vector * lanes;
                    let table = self.table.as_mut_ptr().add(at);
                    for i in 0..R {
                        let entries = B::entries(simd, &rows[i], products[i]);
                        simd.store_i16(table.add(i * row_len), entries);
                    }
                }
            }
        }
    }
}

/// The squared norms of codewords of `dim` numbers.
pub(super) fn squares(codewords: &[f32], dim: usize) -> Vec<f32> {
    let codewords = codewords.chunks_exact(dim);
    codewords
        .map(|codeword| codeword.iter().map(|c| c * c).sum())
        .collect()
}

/// Pack codewords of integers, `(K, C')`, in panels of `panel_rows` codewords.
pub(super) fn pack_groups<F: Factors>(
    layout: &Layout,
    panel_rows: usize,
    integers: &[f32],
) -> Vec<i32> {
    let dim = layout.pq.subvector_dim;
    let channel = |k: usize, j: usize| {
        let exists = k < layout.pq.n_centroids && j < dim;
        if exists { integers[k * dim + j] } else { 0.0 }
    };
    let mut groups = Vec::with_capacity(layout.table_rows * dim.div_ceil(F::GROUP));
    for first in (0..layout.table_rows).step_by(panel_rows) {
        for j in (0..dim).step_by(F::GROUP) {
            let group = |k| F::weights(std::array::from_fn(|i| channel(k, j + i)));
            groups.extend((first..first + panel_rows).map(group));
        }
    }
    groups
}
