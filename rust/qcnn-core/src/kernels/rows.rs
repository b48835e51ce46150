//! Product-quantised convolution with 16-bit tables across pixels.
//!
//! As in [`pixels`](super::pixels), the table of a subspace holds the inner
//! products of each codeword with every pixel, and a look-up adds a piece of a
//! table row. Here entries and sums have 16 bits, so that a vector holds twice
//! as many, and every load is a whole aligned vector:
//!
//! - A vector holds one row of the map, or a part of one, with its halo; where
//!   rows are short, its parts hold rows of different blocks of the map. A tap
//!   in another row is then another vector at the same lanes.
//! - A tap in another column would be a load across two vectors. Instead, the
//!   taps of each column have sums of their own, which are shifted by whole
//!   lanes and added up at the end of a pass.
//!
//! Tables are built from 16-bit inputs and codewords as well: a multiplication
//! then makes two products of every lane.
//!
//! # Why nothing overflows
//!
//! The codewords of a subspace are stored as integers, `w * a`. A tile of an
//! image has a scale `s` for all terms that are summed in 16 bits before they go
//! to float32, at most [`MAX_TERMS`], from one or a few subspaces. Its inputs
//! become integers `x * s * 2^16 / a`, and table entries, products divided by
//! 2^16, are `x * w * s`. By Cauchy and Schwarz, what output o adds from
//! subspace m at pixel p is at most `|x_m(p)| * |w_m(o)|`: the norms of all the
//! input that p sees through these taps, and of all codewords that o uses for
//! them. With
//!
//! `bound = max over p of (sum over m of |x_m(p)| * max over o of |w_m(o)|)`
//!
//! the sum is at most `s * bound`. Rounding table entries adds at most 1/2 per
//! term. Rounding inputs adds at most `sqrt(C' * taps) / 2` to the norm of the
//! integers that p sees, so `sqrt(C' * taps) / 2 * |w * a| / 2^16` to the sum,
//! and `a` is such that `|w * a|` is at most 2^15: `sqrt(C') / 4` per term covers
//! that. So with `s = (32767 - MAX_TERMS * (1/2 + sqrt(C') / 4) - 1) / bound`
//! every complete sum, and every table entry that a complete sum uses, has 16
//! bits. Sums of some of the terms may wrap around, which does not change the
//! complete ones. Inputs have 16 bits because `s` is made smaller if need be.

// As in `tile`: index loops keep the sums in registers.
#![allow(clippy::needless_range_loop)]

use std::ops::Range;

use super::planes::Planes;
use super::tile::{pair, pair_rows};
use super::{Candidate, ConvLayer, Kernel, Weights, vector_cycles};
use crate::geometry::{ConvGeometry, Padding};
use crate::graph::PqGeometry;
use crate::isa::{Simd, Task};

/// Terms summed in 16 bits. Each term's rounding error is up to half a unit of a
/// scale that shrinks with the number of terms: their effect on the response
/// grows with it.
const MAX_TERMS: usize = 36;

/// Distinct columns that taps may have, each with sums of its own.
const MAX_COLUMNS: usize = 6;

/// float32 values of a cache line.
const LINE: usize = 16;

/// Table rows are addressed in these units, which x86 multiplies with within the
/// address of a load.
const OFFSET_BYTES: usize = 8;

/// Longest sub-vector: what rounding its inputs may add to the sums stays small.
const MAX_SUBVECTOR_DIM: usize = 1024;

/// What the windows of the tables that are looked up together may take: beyond
/// L1, but less than what they save.
const WINDOWS_BYTES: usize = 64 << 10;

/// What fits a 32 KiB L1 cache beside the sums and offsets that stream through.
const L1_BYTES: usize = 32 << 10;

/// What the table of a subspace may take of a 512 KiB L2 cache.
const TABLE_BYTES: usize = 288 << 10;

/// How a map is cut into tiles of whole vectors.
#[derive(Clone, Copy, Debug)]
struct Cut {
    /// Parts of a vector.
    parts: usize,
    /// Lanes of a part.
    part_lanes: usize,
    /// Outputs of a row that a part holds; the other lanes are its halo.
    width: usize,
    /// Rows that a part of a tile holds: output vectors of a tile.
    rows: usize,
    /// Parts side by side that cover a row of the map.
    parts_across: usize,
    /// Tiles of the map.
    tiles: usize,
}

impl Cut {
    /// Cut into parts of `part_lanes` lanes and about `rows` rows, if they hold
    /// any output.
    fn new<S: Simd>(geometry: &ConvGeometry, part_lanes: usize, rows: usize) -> Option<Self> {
        let reach = (geometry.kernel[1] - 1) * geometry.dilation[1] / geometry.stride[1];
        let width = part_lanes.checked_sub(reach).filter(|width| *width > 0)?;
        let parts = lanes::<S>() / part_lanes;
        let parts_across = geometry.out_size[1].div_ceil(width);
        let parts_down = geometry.out_size[0].div_ceil(rows);
        Some(Self {
            parts,
            part_lanes,
            width,
            rows: geometry.out_size[0].div_ceil(parts_down),
            parts_across,
            tiles: (parts_across * parts_down).div_ceil(parts),
        })
    }

    /// First output (row, column) of part `part` of tile `tile`; it may lie below
    /// the map.
    fn origin(&self, tile: usize, part: usize) -> [usize; 2] {
        let i = tile * self.parts + part;
        [
            i / self.parts_across * self.rows,
            i % self.parts_across * self.width,
        ]
    }
}

/// Subspaces that have a common scale.
#[derive(Clone, Debug)]
struct Batch {
    subspaces: Range<usize>,
    passes: Vec<Pass>,
}

/// A walk through all outputs of a strip.
#[derive(Clone, Debug)]
struct Pass {
    subspaces: Range<usize>,
    steps: Range<usize>,
    /// Whether the 16-bit sums start with this pass.
    start: bool,
    /// Whether they go to the float32 sums after it.
    end: bool,
}

/// Taps, one of each column at a time, so that each column's sums stay in the
/// same registers.
#[derive(Clone, Debug)]
struct Steps {
    /// Distances in columns between an output and what its taps read.
    columns: Vec<usize>,
    /// For each step the tap of each column; nothing where a column has fewer
    /// taps than another.
    taps: Vec<Vec<Option<usize>>>,
}

impl Steps {
    fn new(planes: &Planes) -> Self {
        let n_taps = planes.taps().len();
        let mut columns: Vec<usize> = (0..n_taps).map(|i| planes.tap(i)[2]).collect();
        columns.sort_unstable();
        columns.dedup();
        let of_column = |column| (0..n_taps).filter(move |&i| planes.tap(i)[2] == column);
        let by_column: Vec<Vec<usize>> = columns
            .iter()
            .map(|&column| of_column(column).collect())
            .collect();
        let n_steps = by_column.iter().map(Vec::len).max().unwrap_or(0);
        let taps = (0..n_steps)
            .map(|step| {
                by_column
                    .iter()
                    .map(|taps| taps.get(step).copied())
                    .collect()
            })
            .collect();
        Self { columns, taps }
    }

    /// Whether a column lacks taps.
    fn has_gaps(&self) -> bool {
        self.taps.iter().flatten().any(Option::is_none)
    }

    /// Cut subspaces and steps such that at most `MAX_TERMS` terms are summed in
    /// 16 bits, and `together` subspaces are looked up in a pass if they may.
    fn batches(&self, n_subspaces: usize, together: usize) -> Vec<Batch> {
        let n_steps = self.taps.len();
        let n_terms = n_steps * self.columns.len();
        if n_terms > MAX_TERMS {
            let parts = n_steps.div_ceil(MAX_TERMS / self.columns.len());
            let part = n_steps.div_ceil(parts);
            let batch = |m: usize| Batch {
                subspaces: m..m + 1,
                passes: (0..n_steps)
                    .step_by(part)
                    .map(|first| Pass {
                        subspaces: m..m + 1,
                        steps: first..(first + part).min(n_steps),
                        start: true,
                        end: true,
                    })
                    .collect(),
            };
            return (0..n_subspaces).map(batch).collect();
        }
        let together = together.min(MAX_TERMS / n_terms);
        let len = MAX_TERMS / n_terms / together * together;
        let batch = |first: usize| {
            let subspaces = first..(first + len).min(n_subspaces);
            let pass = |first: usize| {
                let pass = first..(first + together).min(subspaces.end);
                Pass {
                    start: pass.start == subspaces.start,
                    end: pass.end == subspaces.end,
                    subspaces: pass,
                    steps: 0..n_steps,
                }
            };
            Batch {
                passes: subspaces.clone().step_by(together).map(pass).collect(),
                subspaces,
            }
        };
        (0..n_subspaces).step_by(len).map(batch).collect()
    }
}

/// How the work is done.
#[derive(Clone, Copy, Debug)]
struct Blocking {
    cut: Cut,
    /// Output vectors of a strip.
    strip: usize,
    /// Subspaces looked up together.
    together: usize,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct RowsConv<S> {
    simd: S,
    name: String,
    geometry: ConvGeometry,
    pq: PqGeometry,
    cut: Cut,
    strip: usize,
    planes: Planes,
    steps: Steps,
    batches: Vec<Batch>,
    /// Elements of a table row.
    row_len: usize,
    /// Rows of a table, in whole panels. If steps have gaps the last are zeros.
    table_rows: usize,
    codebooks: Vec<Codebook>,
    /// For each group, pass, block of outputs and subspace of the pass, in units
    /// of `OFFSET_BYTES` from the first output vector's lanes in the first table
    /// row: `(steps of the pass, columns, outputs)`.
    offsets: Vec<u16>,
    /// For each group, pass and subspace of the pass the greatest norm of the
    /// codewords of an output.
    norms: Vec<f32>,
    /// `(groups, padded outputs)`
    bias: Vec<f32>,
}

/// The codewords of a subspace as 16-bit integers.
#[derive(Clone, Debug)]
struct Codebook {
    /// What they were multiplied with.
    scale: f32,
    /// Panels of `pair_rows` codewords, each `(pairs of channels, pair_rows)`,
    /// the first channel in the lower half.
    pairs: Vec<i32>,
    /// The squared norm of each codeword, of the integers divided by the scale.
    squares: Vec<f32>,
}

/// Lanes of a vector of 16-bit integers.
const fn lanes<S: Simd>() -> usize {
    2 * S::LANES
}

/// Outputs summed together with taps in `columns` columns, 4, 2 or 1: as many
/// as leave a quarter of the registers free.
fn outputs_together<S: Simd>(columns: usize) -> usize {
    match S::REGISTERS * 3 / 4 / columns {
        4.. => 4,
        2 | 3 => 2,
        _ => 1,
    }
}

/// The same convolution, with the map as one long row if it looks at single
/// pixels.
fn flattened(geometry: &ConvGeometry) -> ConvGeometry {
    let mut geometry = geometry.clone();
    let pointwise = geometry.kernel == [1, 1]
        && geometry.stride == [1, 1]
        && geometry.padding == Padding::default();
    if pointwise {
        geometry.in_size = [1, geometry.in_pixels()];
        geometry.out_size = geometry.in_size;
    }
    geometry
}

/// Elements of a table row: whole lines, an odd number of them, so that the
/// windows of different codewords fall into different sets of the cache.
fn row_len<S: Simd>(planes: &Planes) -> usize {
    let line = LINE * size_of::<f32>() / size_of::<i16>();
    ((planes.rows() * lanes::<S>()).div_ceil(line) | 1) * line
}

/// Rows of a table, in whole panels.
fn table_rows<S: Simd>(pq: PqGeometry, steps: &Steps) -> usize {
    (pq.n_centroids + usize::from(steps.has_gaps())).next_multiple_of(pair_rows::<S>())
}

/// Choose the blocking, and estimate the clock cycles of an image. `None` if
/// there is no good one.
fn choose_blocking<S: Simd>(geometry: &ConvGeometry, pq: PqGeometry) -> Option<(Blocking, f64)> {
    let mut best: Option<(Blocking, f64)> = None;
    let mut part_lanes = lanes::<S>();
    while part_lanes >= 4 {
        let mut rows = usize::MAX;
        for parts_down in 1..=geometry.out_size[0] {
            let next = geometry.out_size[0].div_ceil(parts_down);
            if next == rows {
                continue;
            }
            rows = next;
            let Some(cut) = Cut::new::<S>(geometry, part_lanes, rows) else {
                break;
            };
            for strip in 1..=3 {
                if let Some((blocking, cycles)) = cost::<S>(geometry, pq, cut, strip)
                    && best.is_none_or(|(_, least)| cycles < least)
                {
                    best = Some((blocking, cycles));
                }
            }
        }
        part_lanes /= 2;
    }
    best
}

/// For strips of some vectors: the blocking and the clock cycles of an image.
/// `None` if that cannot be done or would not be fast.
fn cost<S: Simd>(
    geometry: &ConvGeometry,
    pq: PqGeometry,
    cut: Cut,
    strip: usize,
) -> Option<(Blocking, f64)> {
    let planes = Planes::new(geometry, [cut.rows, cut.width]);
    let steps = Steps::new(&planes);
    let columns = steps.columns.len();
    let together = outputs_together::<S>(columns);
    if columns > MAX_COLUMNS
        || strip > cut.rows
        || strip > 1 && strip * together * columns > S::REGISTERS * 3 / 4
    {
        return None;
    }
    let table_rows = table_rows::<S>(pq, &steps);
    let table_bytes = table_rows * row_len::<S>(&planes) * size_of::<i16>();
    if table_bytes > TABLE_BYTES || u16::try_from(table_bytes / OFFSET_BYTES).is_err() {
        return None;
    }
    let vector_bytes = lanes::<S>() * size_of::<i16>();
    let halo = planes.height() - cut.rows;
    let window_vectors = planes.phases() * (halo + strip);
    let window_bytes = pq.n_centroids * (window_vectors * vector_bytes).next_multiple_of(64);
    let blocking = Blocking {
        cut,
        strip,
        together: (WINDOWS_BYTES / window_bytes).clamp(1, pq.n_subspaces),
    };
    let batches = steps.batches(pq.n_subspaces, blocking.together);
    let passes: usize = batches.iter().map(|batch| batch.passes.len()).sum();
    let ends = batches
        .iter()
        .flat_map(|batch| &batch.passes)
        .filter(|pass| pass.end)
        .count();

    let dim = pq.subvector_dim as f64;
    let plane_vectors = planes.rows() as f64;
    let copies = dim * plane_vectors * (4.0 + 12.0 * cut.parts as f64);
    let tables = table_rows as f64 * plane_vectors * vector_cycles::<S>() * (5.0 + 1.1 * dim);
    // Adding a vector, from L1 or L2, and its address, once per strip.
    let in_l1 = window_bytes * blocking.together <= L1_BYTES;
    let look_up = vector_cycles::<S>() * if in_l1 { 1.1 } else { 1.2 } + 0.35 / strip as f64;
    let n_terms = (steps.taps.len() * columns * pq.n_subspaces) as f64;
    // Merging columns, loading and storing 16-bit sums; adding to float32 sums.
    let sums = passes as f64 * (2.0 + 2.0 * columns as f64) + ends as f64 * 10.0;
    let sums = sums * vector_cycles::<S>();
    let outputs = geometry.group_out_channels().next_multiple_of(together) as f64;
    let look_ups = outputs * cut.rows as f64 * (n_terms * look_up + sums);
    let rows = outputs * (15 * cut.rows * cut.parts) as f64;
    let cycles = pq.n_subspaces as f64 * (copies + tables) + look_ups + rows;
    Some((blocking, (geometry.groups * cut.tiles) as f64 * cycles))
}

impl<S: Simd> RowsConv<S> {
    pub(crate) fn candidate<'a>(simd: S, layer: &'a ConvLayer<'a>) -> Option<Candidate<'a>> {
        let Weights::ProductQuantized {
            geometry: pq,
            codebooks,
            codes,
        } = layer.weights
        else {
            return None;
        };
        if pq.subvector_dim > MAX_SUBVECTOR_DIM {
            return None;
        }
        let (blocking, cycles) = choose_blocking::<S>(&flattened(layer.geometry), pq)?;
        Some(Candidate::new(cycles, move || {
            Self::new(simd, layer, (pq, codebooks, codes), blocking)
        }))
    }

    fn new(
        simd: S,
        layer: &ConvLayer<'_>,
        (pq, codebooks, codes): (PqGeometry, &[f32], &[u16]),
        Blocking {
            cut,
            strip,
            together,
        }: Blocking,
    ) -> Self {
        let geometry = flattened(layer.geometry);
        let planes = Planes::new(&geometry, [cut.rows, cut.width]);
        let steps = Steps::new(&planes);
        let table_rows = table_rows::<S>(pq, &steps);
        let outputs = geometry.group_out_channels();
        let padded_outputs = outputs.next_multiple_of(outputs_together::<S>(steps.columns.len()));
        let mut bias = vec![0.0; geometry.groups * padded_outputs];
        if let Some(values) = layer.bias {
            for (padded, values) in bias
                .chunks_exact_mut(padded_outputs)
                .zip(values.chunks_exact(outputs))
            {
                padded[..outputs].copy_from_slice(values);
            }
        }
        let mut kernel = Self {
            simd,
            name: format!("{}-i16-rows", S::NAME),
            batches: steps.batches(pq.n_subspaces, together),
            row_len: row_len::<S>(&planes),
            codebooks: Vec::new(),
            offsets: Vec::new(),
            norms: Vec::new(),
            geometry,
            pq,
            cut,
            strip,
            planes,
            steps,
            table_rows,
            bias,
        };
        let dim = pq.subvector_dim;
        for (i, codewords) in codebooks.chunks_exact(pq.n_centroids * dim).enumerate() {
            let codebook = kernel.integer_codebook(i, codewords, codes);
            kernel.codebooks.push(codebook);
        }
        for group in 0..kernel.geometry.groups {
            for pass in kernel.batches.iter().flat_map(|batch| &batch.passes) {
                let offsets = kernel.pass_offsets(group, pass, codes);
                kernel.offsets.extend(offsets);
                for m in pass.subspaces.clone() {
                    let squares = &kernel.codebook(group, m).squares;
                    let norm = kernel.greatest_norm(group, &pass.steps, m, squares, codes);
                    kernel.norms.push(norm);
                }
            }
        }
        kernel
    }

    /// Make integers of the codewords of codebook `i`, `(K, C')`: as large as
    /// possible such that all that an output uses have a norm of 2^15 at most.
    fn integer_codebook(&self, i: usize, codewords: &[f32], codes: &[u16]) -> Codebook {
        let dim = self.pq.subvector_dim;
        let m = i % self.pq.n_subspaces;
        let squares = |codewords: &[f32]| -> Vec<f32> {
            let squares = codewords.chunks_exact(dim);
            squares
                .map(|codeword| codeword.iter().map(|c| c * c).sum())
                .collect()
        };
        let all_steps = 0..self.steps.taps.len();
        let floats = squares(codewords);
        let norm = (0..self.geometry.groups)
            .filter(|&group| self.codebook_index(group, m) == i)
            .map(|group| self.greatest_norm(group, &all_steps, m, &floats, codes))
            .fold(0.0, f32::max);
        let peak = codewords.iter().fold(0.0f32, |peak, c| peak.max(c.abs()));
        // Rounding adds to the norm; so that it stays below 2^15:
        let rounding = 0.5 * ((all_steps.len() * self.steps.columns.len() * dim) as f32).sqrt();
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
            let exists = k < self.pq.n_centroids && j < dim;
            if exists {
                rounded[k * dim + j] as i16
            } else {
                0
            }
        };
        let rows = pair_rows::<S>();
        let mut pairs = Vec::with_capacity(self.table_rows * dim.div_ceil(2));
        for first in (0..self.table_rows).step_by(rows) {
            for j in (0..dim).step_by(2) {
                pairs.extend((first..first + rows).map(|k| pair(channel(k, j), channel(k, j + 1))));
            }
        }
        let mut squares = squares(&rounded);
        for square in &mut squares {
            *square /= scale * scale;
        }
        Codebook {
            scale,
            pairs,
            squares,
        }
    }

    /// Outputs summed together.
    fn outputs_together(&self) -> usize {
        outputs_together::<S>(self.steps.columns.len())
    }

    fn padded_outputs(&self) -> usize {
        self.geometry
            .group_out_channels()
            .next_multiple_of(self.outputs_together())
    }

    /// The code of output `o` of a group.
    fn code(&self, group: usize, o: usize, tap: usize, m: usize, codes: &[u16]) -> usize {
        let o = group * self.geometry.group_out_channels() + o;
        let code = usize::from(codes[(o * self.geometry.taps() + tap) * self.pq.n_subspaces + m]);
        assert!(code < self.pq.n_centroids);
        code
    }

    /// A pass's part of `offsets`.
    fn pass_offsets(&self, group: usize, pass: &Pass, codes: &[u16]) -> Vec<u16> {
        let together = self.outputs_together();
        let outputs = self.geometry.group_out_channels();
        let unit = OFFSET_BYTES / size_of::<i16>();
        let mut offsets = Vec::new();
        for first in (0..outputs).step_by(together) {
            for m in pass.subspaces.clone() {
                for taps in &self.steps.taps[pass.steps.clone()] {
                    for &tap in taps {
                        for o in first..first + together {
                            // Outputs that fill up the last block read anything.
                            let o = o.min(outputs - 1);
                            // The last row is zeros if there are gaps.
                            let (row, vector) = tap.map_or((self.table_rows - 1, 0), |tap| {
                                let [phase, y, _] = self.planes.tap(tap);
                                let vector = phase * self.planes.height() + y;
                                (self.code(group, o, tap, m, codes), vector)
                            });
                            let offset = row * self.row_len + vector * lanes::<S>();
                            offsets.push(
                                u16::try_from(offset / unit).expect("the table is small enough"),
                            );
                        }
                    }
                }
            }
        }
        offsets
    }

    /// The greatest norm of all codewords of subspace `m` that an output adds in
    /// some steps.
    fn greatest_norm(
        &self,
        group: usize,
        steps: &Range<usize>,
        m: usize,
        squares: &[f32],
        codes: &[u16],
    ) -> f32 {
        let of_output = |o: usize| {
            let taps = self.steps.taps[steps.clone()].iter().flatten().flatten();
            taps.map(|&tap| squares[self.code(group, o, tap, m, codes)])
                .sum::<f32>()
        };
        let greatest = (0..self.geometry.group_out_channels())
            .map(of_output)
            .fold(0.0, greater);
        // Rounded up by more than the sums can be wrong.
        greatest.sqrt() * 1.0001
    }

    /// Number of the codebook of subspace `m` of a group.
    fn codebook_index(&self, group: usize, m: usize) -> usize {
        let set = if self.pq.codebook_groups > 1 {
            group
        } else {
            0
        };
        set * self.pq.n_subspaces + m
    }

    fn codebook(&self, group: usize, m: usize) -> &Codebook {
        &self.codebooks[self.codebook_index(group, m)]
    }

    /// Vectors of a plane.
    fn plane_vectors(&self) -> usize {
        self.planes.rows()
    }

    /// Planes of pairs of channels.
    fn pair_planes(&self) -> usize {
        self.pq.subvector_dim.div_ceil(2)
    }

    /// Elements of a plane, with room to read beyond its end.
    fn plane_len(&self) -> usize {
        (self.plane_vectors() + 1) * lanes::<S>()
    }

    /// Most subspaces with a common scale, and looked up together.
    fn most_subspaces(&self) -> [usize; 2] {
        let batches = self.batches.iter();
        let passes = batches.clone().flat_map(|batch| &batch.passes);
        [
            batches
                .map(|batch| batch.subspaces.len())
                .max()
                .unwrap_or(0),
            passes.map(|pass| pass.subspaces.len()).max().unwrap_or(0),
        ]
    }

    /// float32 elements of each part of the scratch: planes, squared norms of
    /// their sub-vectors, bounds, integer planes, tables, 16-bit and float32 sums.
    fn scratch_parts(&self) -> [usize; 7] {
        let [batch, pass] = self.most_subspaces();
        let vectors = self.cut.rows * self.padded_outputs();
        [
            batch * self.pq.subvector_dim * self.plane_len(),
            batch * self.plane_len(),
            (self.cut.rows * lanes::<S>()).next_multiple_of(LINE),
            self.pair_planes() * self.plane_vectors() * lanes::<S>(),
            pass * self.table_rows * self.row_len / 2,
            (vectors * S::LANES).next_multiple_of(LINE),
            vectors * lanes::<S>(),
        ]
    }
}

impl<S: Simd> Kernel for RowsConv<S> {
    fn name(&self) -> &str {
        &self.name
    }

    fn scratch_len(&self, _: usize) -> usize {
        self.scratch_parts().iter().sum()
    }

    fn run(&self, n: usize, input: &[f32], output: &mut [f32], scratch: &mut [f32]) {
        let g = &self.geometry;
        let group_in = g.group_in_channels() * g.in_pixels();
        let group_out = g.group_out_channels() * g.out_pixels();
        let inputs = input.chunks_exact(group_in).take(n * g.groups);
        let outputs = output.chunks_exact_mut(group_out);
        for (i, (input, output)) in inputs.zip(outputs).enumerate() {
            for tile in 0..self.cut.tiles {
                self.tile(i % g.groups, tile, input, output, scratch);
            }
        }
    }
}

impl<S: Simd> RowsConv<S> {
    /// One tile of one group of one image.
    fn tile(
        &self,
        group: usize,
        tile: usize,
        input: &[f32],
        output: &mut [f32],
        scratch: &mut [f32],
    ) {
        let [
            planes_len,
            squares_len,
            bounds_len,
            pairs_len,
            tables_len,
            partial_len,
            sums_len,
        ] = self.scratch_parts();
        let (planes, rest) = scratch.split_at_mut(planes_len);
        let (squares, rest) = rest.split_at_mut(squares_len);
        let (bounds, rest) = rest.split_at_mut(bounds_len);
        let (pairs, rest) = rest.split_at_mut(pairs_len);
        let (tables, rest) = rest.split_at_mut(tables_len);
        let (partial, rest) = rest.split_at_mut(partial_len);
        let sums = &mut rest[..sums_len];
        let pairs: &mut [i16] = bytemuck::cast_slice_mut(pairs);
        let tables: &mut [i16] = bytemuck::cast_slice_mut(tables);
        let partial: &mut [i16] = bytemuck::cast_slice_mut(partial);

        let padded_outputs = self.padded_outputs();
        let columns = self.steps.columns.len();
        let bias = &self.bias[group * padded_outputs..][..padded_outputs];
        let mut offsets = &self.offsets[self.offsets.len() / self.geometry.groups * group..];
        let mut norms = &self.norms[self.norms.len() / self.geometry.groups * group..];
        let mut bias = Some(bias);
        for batch in &self.batches {
            let planes_of = self.pq.subvector_dim * self.plane_len();
            // The greatest scale that leaves 16 bits to each subspace's inputs.
            let mut limit = f32::INFINITY;
            for (i, m) in batch.subspaces.clone().enumerate() {
                let planes = &mut planes[i * planes_of..];
                let squares = &mut squares[i * self.plane_len()..][..self.plane_len()];
                let peak = self.fill_planes(tile, m, input, planes, squares);
                limit = limit.min(32_767.0 / 65_536.0 * self.codebook(group, m).scale / peak);
            }
            let bound = self.simd.call(Bound {
                kernel: self,
                batch,
                norms,
                squares,
                bounds: &mut bounds[..self.cut.rows * lanes::<S>()],
            });
            let (scale, unit) = self.scale_and_unit(bound, limit);
            for pass in &batch.passes {
                if pass.steps.start == 0 {
                    for (i, m) in pass.subspaces.clone().enumerate() {
                        let codebook = self.codebook(group, m);
                        let depth = self.channels(m).len();
                        self.simd.call(PackPlanes {
                            planes: &planes[(m - batch.subspaces.start) * planes_of..],
                            plane_len: self.plane_len(),
                            depth,
                            scale: scale * 65_536.0 / codebook.scale,
                            vectors: self.plane_vectors(),
                            pairs,
                        });
                        let table_len = self.table_rows * self.row_len;
                        self.simd.call(BuildTable {
                            codewords: &codebook.pairs,
                            panel_pairs: self.pair_planes(),
                            depth: depth.div_ceil(2),
                            planes: pairs,
                            vectors: self.plane_vectors(),
                            table: &mut tables[i * table_len..][..table_len],
                            row_len: self.row_len,
                        });
                    }
                }
                let n_offsets = padded_outputs * pass.subspaces.len() * pass.steps.len() * columns;
                let (pass_offsets, others) = offsets.split_at(n_offsets);
                offsets = others;
                norms = &norms[pass.subspaces.len()..];
                // The float32 sums start at the bias.
                let end = pass.end.then(|| End {
                    unit,
                    bias: bias.take(),
                });
                for first in (0..self.cut.rows).step_by(self.strip) {
                    let strip = self.strip.min(self.cut.rows - first);
                    let begin = first * lanes::<S>() * padded_outputs;
                    let strip_sums = begin..begin + strip * lanes::<S>() * padded_outputs;
                    self.look_up(
                        strip,
                        LookUp {
                            tables: &tables[first * lanes::<S>()..],
                            table_len: self.table_rows * self.row_len,
                            n_tables: pass.subspaces.len(),
                            offsets: pass_offsets,
                            steps: pass.steps.len(),
                            columns: &self.steps.columns,
                            start: pass.start,
                            end,
                            partial: &mut partial[strip_sums.clone()],
                            sums: &mut sums[strip_sums],
                        },
                    );
                }
            }
        }
        self.write_output(tile, sums, output);
    }

    /// Channels of subspace `m` within a group.
    fn channels(&self, m: usize) -> Range<usize> {
        let first = m * self.pq.subvector_dim;
        first..(first + self.pq.subvector_dim).min(self.geometry.group_in_channels())
    }

    /// Copy what a tile sees of subspace `m`, sum up the squares of each
    /// sub-vector, and return the greatest magnitude.
    fn fill_planes(
        &self,
        tile: usize,
        m: usize,
        input: &[f32],
        planes: &mut [f32],
        squares: &mut [f32],
    ) -> f32 {
        let g = &self.geometry;
        squares.fill(0.0);
        let mut peak = 0.0;
        for (c, plane) in self
            .channels(m)
            .zip(planes.chunks_exact_mut(self.plane_len()))
        {
            let channel = &input[c * g.in_pixels()..(c + 1) * g.in_pixels()];
            let plane = &mut plane[..self.plane_vectors() * lanes::<S>()];
            for part in 0..self.cut.parts {
                let origin = self.cut.origin(tile, part);
                let plane = &mut plane[part * self.cut.part_lanes..];
                self.planes
                    .fill_rows(g, origin, channel, plane, lanes::<S>());
            }
            peak = greater(peak, self.simd.call(AddSquares { plane, squares }));
        }
        peak
    }

    /// The factor from float32 to 16-bit values, at most `limit`, such that sums
    /// within `bound` fit, and the one back.
    ///
    /// Without any signal both are 0. If the bound is NaN or infinite, because
    /// the input is or because its squares are, the responses become NaN.
    fn scale_and_unit(&self, bound: f32, limit: f32) -> (f32, f32) {
        if bound == 0.0 {
            return (0.0, 0.0);
        }
        if !bound.is_finite() {
            return (0.0, f32::NAN);
        }
        let rounding = 0.5 + 0.25 * (self.pq.subvector_dim as f32).sqrt();
        let greatest = 32_766.0 - MAX_TERMS as f32 * rounding;
        // A smaller scale is always possible; this one keeps all factors normal.
        let scale = (greatest / bound).min(limit).min(1e25);
        (scale, 1.0 / scale)
    }

    fn look_up(&self, strip: usize, work: LookUp<'_>) {
        let simd = self.simd;
        match (work.columns.len(), self.outputs_together(), strip) {
            (1, 4, 1) => simd.call(Strip::<1, 4, 1>(work)),
            (1, 4, 2) => simd.call(Strip::<1, 4, 2>(work)),
            (1, 4, 3) => simd.call(Strip::<1, 4, 3>(work)),
            (2, 4, 1) => simd.call(Strip::<2, 4, 1>(work)),
            (2, 4, 2) => simd.call(Strip::<2, 4, 2>(work)),
            (2, 4, 3) => simd.call(Strip::<2, 4, 3>(work)),
            (3, 4, 1) => simd.call(Strip::<3, 4, 1>(work)),
            (3, 4, 2) => simd.call(Strip::<3, 4, 2>(work)),
            (4, 4, 1) => simd.call(Strip::<4, 4, 1>(work)),
            (5, 4, 1) => simd.call(Strip::<5, 4, 1>(work)),
            (6, 4, 1) => simd.call(Strip::<6, 4, 1>(work)),
            (4, 2, 1) => simd.call(Strip::<4, 2, 1>(work)),
            (5, 2, 1) => simd.call(Strip::<5, 2, 1>(work)),
            (6, 2, 1) => simd.call(Strip::<6, 2, 1>(work)),
            other => unreachable!("no blocking has (columns, outputs, strip) {other:?}"),
        }
    }

    /// Copy the sums of a tile to the output, without the lanes of the halo.
    fn write_output(&self, tile: usize, sums: &[f32], output: &mut [f32]) {
        let g = &self.geometry;
        let [height, width] = g.out_size;
        let padded_outputs = self.padded_outputs();
        for part in 0..self.cut.parts {
            let [y0, x0] = self.cut.origin(tile, part);
            let rows = self.cut.rows.min(height.saturating_sub(y0));
            let columns = self.cut.width.min(width - x0);
            for (o, channel) in output.chunks_exact_mut(g.out_pixels()).enumerate() {
                for y in 0..rows {
                    let first = y / self.strip * self.strip;
                    let strip = self.strip.min(self.cut.rows - first);
                    let vector = first * padded_outputs + o * strip + y - first;
                    let from = vector * lanes::<S>() + part * self.cut.part_lanes;
                    channel[(y0 + y) * width + x0..][..columns]
                        .copy_from_slice(&sums[from..from + columns]);
                }
            }
        }
    }
}

/// The greater value, or NaN if either is NaN.
#[inline(always)]
fn greater(a: f32, b: f32) -> f32 {
    if b > a || b.is_nan() { b } else { a }
}

/// Add the squares of a plane; the greatest magnitude of its values that are
/// not NaN.
struct AddSquares<'a> {
    plane: &'a [f32],
    squares: &'a mut [f32],
}

impl Task for AddSquares<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> f32 {
        let mut peaks = [0.0f32; MAX_LANES];
        let squares = self.squares.chunks_exact_mut(S::LANES);
        for (squares, plane) in squares.zip(self.plane.chunks_exact(S::LANES)) {
            for ((square, x), peak) in squares.iter_mut().zip(plane).zip(&mut peaks) {
                *square += x * x;
                *peak = if x.abs() > *peak { x.abs() } else { *peak };
            }
        }
        peaks.into_iter().fold(0.0, f32::max)
    }
}

/// Make integers of planes, as pairs of channels.
struct PackPlanes<'a> {
    /// `(depth, plane_len)`
    planes: &'a [f32],
    plane_len: usize,
    depth: usize,
    scale: f32,
    /// Vectors of a plane.
    vectors: usize,
    /// `(pairs of channels, vectors, 2)`: even, then odd lanes.
    pairs: &'a mut [i16],
}

impl Task for PackPlanes<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let lanes = lanes::<S>();
        let scale = simd.splat(self.scale);
        let zero = simd.splat(0.0);
        assert!(self.planes.len() >= self.depth * self.plane_len);
        assert!(self.plane_len >= self.vectors * lanes);
        assert!(self.pairs.len() >= self.depth.div_ceil(2) * self.vectors * 2 * lanes);
        for pair in 0..self.depth.div_ceil(2) {
            for vector in 0..self.vectors {
                let mut rounded = [simd.zero_i16(); 2];
                for i in 0..2 {
                    let channel = 2 * pair + i;
                    if channel < self.depth {
                        // SAFETY: there are `depth` planes of at least `vectors`
                        // vectors, as asserted.
                        unsafe {
                            let plane = self.planes.as_ptr().add(channel * self.plane_len);
                            let source = plane.add(vector * lanes);
                            let low = simd.mul_add(simd.load(source), scale, zero);
                            let high = simd.load(source.add(S::LANES));
                            let high = simd.mul_add(high, scale, zero);
                            rounded[i] = simd.round_i16(low, high);
                        }
                    }
                }
                let zipped = simd.zip_i16(rounded[0], rounded[1]);
                let at = (pair * self.vectors + vector) * 2 * lanes;
                for i in 0..2 {
                    // SAFETY: `pairs` holds two vectors for each vector of each
                    // pair, as asserted.
                    unsafe {
                        let target = self.pairs.as_mut_ptr().add(at + i * lanes);
                        simd.store_i16(target, zipped[i]);
                    }
                }
            }
        }
    }
}

/// The bound of the 16-bit sums of a batch, see the module's documentation.
struct Bound<'a, S> {
    kernel: &'a RowsConv<S>,
    batch: &'a Batch,
    /// From the batch's first pass on.
    norms: &'a [f32],
    /// For each subspace of the batch the squared norms of its sub-vectors.
    squares: &'a [f32],
    /// One for each output lane of a tile.
    bounds: &'a mut [f32],
}

impl<K: Simd> Task for Bound<'_, K> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> f32 {
        let kernel = self.kernel;
        let lanes = lanes::<S>();
        let mut norms = self.norms.iter();
        let mut greatest = 0.0;
        for pass in &self.batch.passes {
            if pass.start {
                self.bounds.fill(0.0);
            }
            for m in pass.subspaces.clone() {
                let norm = norms.next().expect("one for each subspace of each pass");
                let first = (m - self.batch.subspaces.start) * kernel.plane_len();
                let squares = &self.squares[first..first + kernel.plane_len()];
                for (y, bounds) in self.bounds.chunks_exact_mut(lanes).enumerate() {
                    let mut sums = [0.0f32; MAX_LANES];
                    for tap in kernel.steps.taps[pass.steps.clone()]
                        .iter()
                        .flatten()
                        .flatten()
                    {
                        let [phase, row, column] = kernel.planes.tap(*tap);
                        let from = (phase * kernel.planes.height() + row + y) * lanes + column;
                        for (sum, square) in sums.iter_mut().zip(&squares[from..from + lanes]) {
                            *sum += square;
                        }
                    }
                    for (bound, sum) in bounds.iter_mut().zip(&sums) {
                        *bound += norm * sum.sqrt();
                    }
                }
            }
            if pass.end {
                for part in self.bounds.chunks_exact(kernel.cut.part_lanes) {
                    for &bound in &part[..kernel.cut.width] {
                        greatest = greater(greatest, bound);
                    }
                }
            }
        }
        // By more than the rounding of the sums above.
        greatest * 1.0001
    }
}

/// Most lanes of a vector of 16-bit integers on any level.
const MAX_LANES: usize = 32;

/// Inner products of the codewords of a subspace with its planes, divided by
/// 2^16 and rounded.
struct BuildTable<'a> {
    /// Panels of `pair_rows` codewords, each `(panel_pairs, pair_rows)`.
    codewords: &'a [i32],
    panel_pairs: usize,
    /// Pairs of channels, of which the last subspace may have fewer.
    depth: usize,
    /// See [`PackPlanes`].
    planes: &'a [i16],
    /// Vectors of a plane.
    vectors: usize,
    /// `(codewords, row_len)`
    table: &'a mut [i16],
    row_len: usize,
}

impl Task for BuildTable<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        if pair_rows::<S>() == 12 {
            self.panels::<S, 12>(simd);
        } else {
            self.panels::<S, 4>(simd);
        }
    }
}

impl BuildTable<'_> {
    #[inline(always)]
    fn panels<S: Simd, const R: usize>(self, simd: S) {
        let lanes = lanes::<S>();
        let panel_len = R * self.panel_pairs;
        let panels = self.codewords.len() / panel_len;
        assert!(self.depth <= self.panel_pairs && self.vectors * lanes <= self.row_len);
        assert!(self.planes.len() >= self.depth * self.vectors * 2 * lanes);
        assert!(self.table.len() >= panels * R * self.row_len);
        for vector in 0..self.vectors {
            for panel in 0..panels {
                // Half a unit, so that cutting bits off rounds.
                let mut products = [[simd.splat_i32(1 << 15); 2]; R];
                // SAFETY: there are `depth` planes of `vectors` times 2 vectors, R
                // rows of the table, each of at least `vectors` vectors, for each
                // of the panels, and each panel has R pairs for `panel_pairs` >=
                // `depth` planes, as asserted.
                unsafe {
                    let codewords = self.codewords.as_ptr().add(panel * panel_len);
                    for pair in 0..self.depth {
                        let at = (pair * self.vectors + vector) * 2 * lanes;
                        let source = self.planes.as_ptr().add(at);
                        let inputs = [simd.load_i16(source), simd.load_i16(source.add(lanes))];
                        for i in 0..R {
                            let codeword = simd.splat_pair(*codewords.add(pair * R + i));
                            for v in 0..2 {
                                products[i][v] = simd.dot_i16(inputs[v], codeword, products[i][v]);
                            }
                        }
                    }
                    let at = panel * R * self.row_len + vector * lanes;
                    let table = self.table.as_mut_ptr().add(at);
                    for i in 0..R {
                        let entries = simd.upper_halves(products[i][0], products[i][1]);
                        simd.store_i16(table.add(i * self.row_len), entries);
                    }
                }
            }
        }
    }
}

/// What happens to complete 16-bit sums.
#[derive(Clone, Copy)]
struct End<'a> {
    /// What 1 stands for.
    unit: f32,
    /// What the float32 sums start at; if there is none they go on.
    bias: Option<&'a [f32]>,
}

/// Add the table rows of a pass to the sums of a strip.
struct LookUp<'a> {
    /// The pass's tables, from the strip's first vector on.
    tables: &'a [i16],
    table_len: usize,
    n_tables: usize,
    /// See [`RowsConv::offsets`].
    offsets: &'a [u16],
    /// Steps of the pass.
    steps: usize,
    /// See [`Steps::columns`].
    columns: &'a [usize],
    /// Whether the 16-bit sums start here; else they go on.
    start: bool,
    /// If there is none, they are stored.
    end: Option<End<'a>>,
    /// `(outputs, vectors of the strip)`
    partial: &'a mut [i16],
    /// `(outputs, vectors of the strip)`
    sums: &'a mut [f32],
}

/// [`LookUp`] for `C` columns, `O` outputs at a time and `V` vectors.
struct Strip<'a, const C: usize, const O: usize, const V: usize>(LookUp<'a>);

impl<const C: usize, const O: usize, const V: usize> Task for Strip<'_, C, O, V> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let LookUp {
            tables,
            table_len,
            n_tables,
            offsets,
            steps,
            columns,
            start,
            end,
            partial,
            sums,
        } = self.0;
        let lanes = lanes::<S>();
        let n_offsets = n_tables * steps * C * O;
        let blocks = sums.len() / (O * V * lanes);
        let columns: [usize; C] = columns.try_into().expect("as the caller chose C");
        assert!(partial.len() == sums.len());
        assert!(offsets.len() >= blocks * n_offsets);
        for block in 0..blocks {
            let partial = &mut partial[block * O * V * lanes..][..O * V * lanes];
            let sums = &mut sums[block * O * V * lanes..][..O * V * lanes];
            let mut registers = [[[simd.zero_i16(); V]; O]; C];
            // SAFETY: there are `n_offsets` offsets for each block, as asserted.
            // `tables` starts at the strip's first vector of the first row of the
            // first of `n_tables` tables, `table_len` apart. An offset leads from
            // there to what a tap reads in row code < n_centroids, or to the
            // last row (both made and checked in `new`): for V vectors of the
            // strip no further than the last vector of a plane, which a row of
            // the table holds. `partial` and `sums` have O * V vectors.
            unsafe {
                let mut offset = offsets.as_ptr().add(block * n_offsets);
                for table in 0..n_tables {
                    let table = tables.as_ptr().add(table * table_len);
                    for _ in 0..steps {
                        for c in 0..C {
                            for o in 0..O {
                                // Volatile, or the compiler loads several into a
                                // vector, only to take them apart.
                                let bytes = usize::from(offset.read_volatile()) * OFFSET_BYTES;
                                offset = offset.add(1);
                                let source = table.byte_add(bytes);
                                for v in 0..V {
                                    let row = simd.load_i16(source.add(v * lanes));
                                    registers[c][o][v] = simd.add_i16(registers[c][o][v], row);
                                }
                            }
                        }
                    }
                }
                let mut sum = registers[0];
                for c in 1..C {
                    for o in 0..O {
                        for v in 0..V {
                            let shifted = simd.shift_i16(registers[c][o][v], columns[c]);
                            sum[o][v] = simd.add_i16(sum[o][v], shifted);
                        }
                    }
                }
                let partial = partial.as_mut_ptr();
                if !start {
                    for o in 0..O {
                        for v in 0..V {
                            let before = simd.load_i16(partial.add((o * V + v) * lanes));
                            sum[o][v] = simd.add_i16(sum[o][v], before);
                        }
                    }
                }
                let Some(end) = end else {
                    for o in 0..O {
                        for v in 0..V {
                            simd.store_i16(partial.add((o * V + v) * lanes), sum[o][v]);
                        }
                    }
                    continue;
                };
                let unit = simd.splat(end.unit);
                for o in 0..O {
                    let bias = end.bias.map(|bias| bias[block * O + o]);
                    for v in 0..V {
                        let halves = simd.widen_i16(sum[o][v]);
                        for half in 0..2 {
                            let at = (2 * (o * V + v) + half) * S::LANES;
                            let target = sums.as_mut_ptr().add(at);
                            let before = match bias {
                                Some(bias) => simd.splat(bias),
                                None => simd.load(target),
                            };
                            simd.store(target, simd.mul_add(halves[half], unit, before));
                        }
                    }
                }
            }
        }
    }
}
