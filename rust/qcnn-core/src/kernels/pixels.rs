//! Product-quantised convolution with tables across pixels.
//!
//! The table of a subspace holds, for each codeword, its inner product with
//! every pixel of the (padded) input. For a given output channel, tap and
//! subspace the code is a constant, so looking up is adding a shifted piece of
//! one table row: contiguous loads, no shuffles, and exact float32 sums.
//!
//! For one tile of the map after the other, and for each block of subspaces:
//!
//! 1. build the block's tables into one reused buffer that stays in L2;
//! 2. for each strip, a few vectors of neighbouring positions, add up all rows
//!    for 4 output channels at a time in registers. A strip reads a narrow
//!    window of every table row again and again; it is chosen such that the
//!    windows of all codewords stay in L1.
//!
//! Between blocks the sums are spilled, strip by strip, so that they stream
//! through L1. See [`Planes`] for how stride, dilation and padding become
//! constant offsets.

// As in `tile`: index loops keep the sums in registers.
#![allow(clippy::needless_range_loop)]

use super::planes::Planes;
use super::tile::{TILE_VECTORS, load_tile, store_tile, tile, tile_rows};
use super::{Candidate, ConvLayer, Kernel, Weights, multiply_cycles, vector_cycles};
use crate::geometry::ConvGeometry;
use crate::graph::PqGeometry;
use crate::isa::{Simd, Task};

/// Output channels summed together: each adds `strip` independent chains, and
/// they share the address of the tap.
const OUTPUTS: usize = 4;

/// float32 values of a cache line.
const LINE: usize = 16;

/// What the windows of a strip may take of a 32 KiB L1 cache, through which
/// sums and offsets stream.
const WINDOW_BYTES: usize = 24 << 10;

/// What the tables of a block may take of a 512 KiB L2 cache.
const TABLE_BYTES: usize = 256 << 10;

/// How the work is cut.
#[derive(Clone, Copy, Debug)]
struct Blocking {
    /// Outputs of a tile, height and width.
    tile: [usize; 2],
    /// Vectors of a strip.
    strip: usize,
    /// Subspaces of a block.
    subspaces: usize,
}

/// Row of a table, as the distance from the table's first in units of 8 bytes:
/// x86 adds `8 * offset` within the load's address.
#[derive(Debug)]
enum Offsets {
    /// For tables of up to 512 KiB, all that are meant to be used.
    U16(Vec<u16>),
    /// For very large codebooks.
    U32(Vec<u32>),
}

const OFFSET_BYTES: usize = 8;

trait Offset: Copy {
    fn bytes(self) -> usize;
}

impl Offset for u16 {
    #[inline(always)]
    fn bytes(self) -> usize {
        usize::from(self) * OFFSET_BYTES
    }
}

impl Offset for u32 {
    #[inline(always)]
    fn bytes(self) -> usize {
        self as usize * OFFSET_BYTES
    }
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct PixelsConv<S> {
    simd: S,
    name: String,
    geometry: ConvGeometry,
    pq: PqGeometry,
    blocking: Blocking,
    planes: Planes,
    /// Elements of a table row.
    row_len: usize,
    /// For each set and subspace, panels of `tile_rows` codewords:
    /// `(C', tile_rows)`.
    codebooks: Vec<f32>,
    /// For each group, block of subspaces and block of `OUTPUTS` outputs:
    /// `(subspaces of the block, taps, OUTPUTS)`.
    offsets: Offsets,
    /// Where the first table row lies for each subspace of a block and each
    /// tap, relative to an output's position.
    bases: Vec<usize>,
    /// `(groups, padded outputs)`
    bias: Vec<f32>,
}

/// Elements of a table row for tiles of `tile` outputs.
///
/// Whole lines, an odd number of them: the windows of different codewords then
/// fall into different sets of the cache.
fn row_len<S: Simd>(planes: &Planes, tile: [usize; 2]) -> usize {
    let positions = planes.positions(tile);
    // The last strip reads whole vectors, with the furthest tap.
    let read = planes.len() - positions + positions.next_multiple_of(S::LANES);
    (read.div_ceil(LINE) | 1) * LINE
}

/// Distance between table rows, in the units of [`Offsets`].
fn row_units(row_len: usize) -> usize {
    row_len * size_of::<f32>() / OFFSET_BYTES
}

impl<S: Simd> PixelsConv<S> {
    pub(crate) fn candidate<'a>(simd: S, layer: &'a ConvLayer<'a>) -> Option<Candidate<'a>> {
        let Weights::ProductQuantized {
            geometry: pq,
            codebooks,
            codes,
        } = layer.weights
        else {
            return None;
        };
        let (blocking, cycles) = choose_blocking::<S>(layer.geometry, pq);
        let row_len = row_len::<S>(&Planes::new(layer.geometry, blocking.tile), blocking.tile);
        // Tables of 32 GiB are beyond the offsets.
        u32::try_from((pq.n_centroids - 1) * row_units(row_len)).ok()?;
        Some(Candidate::new(cycles, move || {
            Self::new(simd, layer, (pq, codebooks, codes), blocking)
        }))
    }

    fn new(
        simd: S,
        layer: &ConvLayer<'_>,
        (pq, codebooks, codes): (PqGeometry, &[f32], &[u16]),
        blocking: Blocking,
    ) -> Self {
        let geometry = layer.geometry.clone();
        let planes = Planes::new(&geometry, blocking.tile);
        let row_len = row_len::<S>(&planes, blocking.tile);
        let bases = (0..blocking.subspaces)
            .flat_map(|m| {
                planes
                    .taps()
                    .iter()
                    .map(move |tap| m * pq.n_centroids * row_len + tap)
            })
            .collect();
        let outputs = geometry.group_out_channels();
        let padded_outputs = outputs.next_multiple_of(OUTPUTS);
        let mut bias = vec![0.0; geometry.groups * padded_outputs];
        if let Some(values) = layer.bias {
            for (padded, values) in bias
                .chunks_exact_mut(padded_outputs)
                .zip(values.chunks_exact(outputs))
            {
                padded[..outputs].copy_from_slice(values);
            }
        }
        let row_units = row_units(row_len);
        let units =
            block_codes(&geometry, pq, blocking.subspaces, codes).map(|code| code * row_units);
        let offsets = if u16::try_from((pq.n_centroids - 1) * row_units).is_ok() {
            Offsets::U16(units.map(|u| u as u16).collect())
        } else {
            Offsets::U32(units.map(|u| u as u32).collect())
        };
        Self {
            simd,
            name: format!("{}-f32-pixels", S::NAME),
            codebooks: pack_codebooks(pq, codebooks, pq.n_centroids, tile_rows::<S>()),
            geometry,
            pq,
            blocking,
            planes,
            row_len,
            offsets,
            bases,
            bias,
        }
    }

    fn padded_outputs(&self) -> usize {
        self.geometry.group_out_channels().next_multiple_of(OUTPUTS)
    }

    /// Vectors that hold the positions of a tile.
    fn tile_vectors(&self) -> usize {
        self.planes.positions(self.blocking.tile).div_ceil(S::LANES)
    }

    /// Elements of each part of the scratch: the planes of one subspace, the
    /// tables of a block, the sums of a tile, one channel of a tile.
    fn scratch_parts(&self) -> [usize; 4] {
        let table_rows = self.blocking.subspaces * self.pq.n_centroids;
        // The last panel of codewords may reach beyond the last row.
        let overshoot = tile_rows::<S>() - 1;
        let positions = self.tile_vectors() * S::LANES;
        [
            self.pq.subvector_dim * self.row_len,
            (table_rows + overshoot) * self.row_len,
            (self.padded_outputs() * positions).next_multiple_of(LINE),
            positions,
        ]
    }
}

/// The codes in the order in which the kernel reads them, 0 for outputs that
/// fill up the last block.
fn block_codes(
    geometry: &ConvGeometry,
    pq: PqGeometry,
    block: usize,
    codes: &[u16],
) -> impl Iterator<Item = usize> {
    let outputs = geometry.group_out_channels();
    let taps = geometry.taps();
    let mut ordered = Vec::with_capacity(
        geometry.groups * outputs.next_multiple_of(OUTPUTS) * taps * pq.n_subspaces,
    );
    for group in 0..geometry.groups {
        for first_m in (0..pq.n_subspaces).step_by(block) {
            for first_o in (0..outputs).step_by(OUTPUTS) {
                for m in first_m..(first_m + block).min(pq.n_subspaces) {
                    for tap in 0..taps {
                        for o in first_o..first_o + OUTPUTS {
                            let output = group * outputs + o;
                            let code = if o < outputs {
                                usize::from(codes[(output * taps + tap) * pq.n_subspaces + m])
                            } else {
                                0
                            };
                            assert!(code < pq.n_centroids);
                            ordered.push(code);
                        }
                    }
                }
            }
        }
    }
    ordered.into_iter()
}

/// Codebooks `(sets, M, K, C')` as panels of `rows` codewords for [`tile`], at
/// least `n_rows` in all. Codewords beyond the last are zeros.
pub(super) fn pack_codebooks(
    pq: PqGeometry,
    codebooks: &[f32],
    n_rows: usize,
    rows: usize,
) -> Vec<f32> {
    let mut packed = Vec::new();
    for codebook in codebooks.chunks_exact(pq.n_centroids * pq.subvector_dim) {
        for first in (0..n_rows).step_by(rows) {
            for j in 0..pq.subvector_dim {
                packed.extend((first..first + rows).map(|k| {
                    if k < pq.n_centroids {
                        codebook[k * pq.subvector_dim + j]
                    } else {
                        0.0
                    }
                }));
            }
        }
    }
    packed
}

/// Choose the blocking, and estimate the clock cycles of an image.
fn choose_blocking<S: Simd>(geometry: &ConvGeometry, pq: PqGeometry) -> (Blocking, f64) {
    // Every way to cut an extent into even parts.
    let parts = |extent: usize| {
        let mut sizes: Vec<usize> = (1..=extent).map(|parts| extent.div_ceil(parts)).collect();
        sizes.dedup();
        sizes
    };
    let mut best: Option<(bool, f64, Blocking)> = None;
    for height in parts(geometry.out_size[0]) {
        for width in parts(geometry.out_size[1]) {
            for strip in 1..=max_strip::<S>() {
                let (large, cycles, blocking) = cost::<S>(geometry, pq, [height, width], strip);
                // Tables that leave the cache are a last resort.
                let better = best.as_ref().is_none_or(|b| (large, cycles) < (b.0, b.1));
                if better {
                    best = Some((large, cycles, blocking));
                }
            }
        }
    }
    let (_, cycles, blocking) = best.expect("a map has at least one pixel");
    (blocking, cycles)
}

/// For tiles of a given extent and strips of some vectors: whether a table is
/// too large for the cache, the clock cycles of an image, and the blocking.
fn cost<S: Simd>(
    geometry: &ConvGeometry,
    pq: PqGeometry,
    tile: [usize; 2],
    strip: usize,
) -> (bool, f64, Blocking) {
    let planes = Planes::new(geometry, tile);
    let row_len = row_len::<S>(&planes, tile);
    let table_bytes = pq.n_centroids * row_len * size_of::<f32>();
    // What a strip reads of a table row: in each phase everything between its
    // first position with the first tap and its last with the last.
    let lines = (planes.reach() + strip * S::LANES).div_ceil(LINE) * planes.phases();
    let window_bytes = (pq.n_centroids * lines * LINE * size_of::<f32>()).min(table_bytes);
    let subspaces = (WINDOW_BYTES / window_bytes)
        .min(TABLE_BYTES / table_bytes)
        .clamp(1, pq.n_subspaces);

    let tiles = geometry.out_size[0].div_ceil(tile[0]) * geometry.out_size[1].div_ceil(tile[1]);
    let row_vectors = (row_len / S::LANES) as f64;
    // Copying the planes, row by row; multiplying and storing.
    let dim = pq.subvector_dim as f64;
    let copies = dim * (2.0 * row_vectors + 15.0 * planes.rows() as f64);
    let tables =
        copies + pq.n_centroids as f64 * row_vectors * multiply_cycles::<S>() * (3.0 + dim);
    // Adding a vector, from L1 or L2; the address, once per strip; loading and
    // storing the sums, once per block.
    let look_up = if window_bytes <= WINDOW_BYTES {
        1.0
    } else {
        1.1
    };
    // Twice as many loads of 64 bytes straddle two lines.
    let look_up = 2.0 * vector_cycles::<S>() * look_up + 0.4 / strip as f64;
    let outputs = geometry.group_out_channels().next_multiple_of(OUTPUTS) as f64;
    let look_ups = outputs
        * planes.positions(tile).div_ceil(S::LANES) as f64
        * (look_up * geometry.taps() as f64 + 2.0 / subspaces as f64);
    // Copying rows to the output.
    let rows = outputs * 15.0 * tile[0] as f64;
    let cycles = pq.n_subspaces as f64 * (tables + look_ups) + rows;
    let cycles = (geometry.groups * tiles) as f64 * cycles;
    let blocking = Blocking {
        tile,
        strip,
        subspaces,
    };
    (table_bytes > TABLE_BYTES, cycles, blocking)
}

impl<S: Simd> Kernel for PixelsConv<S> {
    fn name(&self) -> &str {
        &self.name
    }

    fn scratch_len(&self, _: usize) -> usize {
        self.scratch_parts().iter().sum()
    }

    fn run(&self, n: usize, input: &[f32], output: &mut [f32], scratch: &mut [f32]) {
        match &self.offsets {
            Offsets::U16(offsets) => self.images(offsets, n, input, output, scratch),
            Offsets::U32(offsets) => self.images(offsets, n, input, output, scratch),
        }
    }
}

impl<S: Simd> PixelsConv<S> {
    fn images<T: Offset>(
        &self,
        offsets: &[T],
        n: usize,
        input: &[f32],
        output: &mut [f32],
        scratch: &mut [f32],
    ) {
        let g = &self.geometry;
        let group_in = g.group_in_channels() * g.in_pixels();
        let group_out = g.group_out_channels() * g.out_pixels();
        let inputs = input.chunks_exact(group_in).take(n * g.groups);
        let outputs = output.chunks_exact_mut(group_out);
        for (i, (input, output)) in inputs.zip(outputs).enumerate() {
            for y in (0..g.out_size[0]).step_by(self.blocking.tile[0]) {
                for x in (0..g.out_size[1]).step_by(self.blocking.tile[1]) {
                    self.tile(i % g.groups, [y, x], offsets, input, output, scratch);
                }
            }
        }
    }

    /// One tile of one group of one image.
    fn tile<T: Offset>(
        &self,
        group: usize,
        origin: [usize; 2],
        offsets: &[T],
        input: &[f32],
        output: &mut [f32],
        scratch: &mut [f32],
    ) {
        let g = &self.geometry;
        let pq = self.pq;
        let [planes_len, table_len, sums_len, channel_len] = self.scratch_parts();
        let (planes, rest) = scratch.split_at_mut(planes_len);
        let (table, rest) = rest.split_at_mut(table_len);
        let (sums, rest) = rest.split_at_mut(sums_len);
        let positions = &mut rest[..channel_len];

        // Tiles at the lower and right edge may be smaller.
        let size = [0, 1].map(|axis| self.blocking.tile[axis].min(g.out_size[axis] - origin[axis]));
        let vectors = self.planes.positions(size).div_ceil(S::LANES);
        let padded_outputs = self.padded_outputs();
        let offsets_len = padded_outputs * g.taps() * pq.n_subspaces;
        let mut offsets = &offsets[group * offsets_len..(group + 1) * offsets_len];
        let bias = &self.bias[group * padded_outputs..][..padded_outputs];
        let set = if pq.codebook_groups > 1 { group } else { 0 };

        for first in (0..pq.n_subspaces).step_by(self.blocking.subspaces) {
            let block = first..(first + self.blocking.subspaces).min(pq.n_subspaces);
            for m in block.clone() {
                let channels =
                    m * pq.subvector_dim..((m + 1) * pq.subvector_dim).min(g.group_in_channels());
                let depth = channels.len();
                for (c, plane) in channels.zip(planes.chunks_exact_mut(self.row_len)) {
                    let channel = &input[c * g.in_pixels()..(c + 1) * g.in_pixels()];
                    let (pixels, padding) = plane.split_at_mut(self.planes.len());
                    self.planes.fill(self.simd, g, origin, channel, pixels);
                    padding.fill(0.0);
                }
                let table = &mut table[(m - first) * pq.n_centroids * self.row_len..];
                let codebook = set * pq.n_subspaces + m;
                let codebook_len =
                    pq.n_centroids.next_multiple_of(tile_rows::<S>()) * pq.subvector_dim;
                self.simd.call(BuildTable {
                    codewords: &self.codebooks[codebook * codebook_len..][..codebook_len],
                    dim: pq.subvector_dim,
                    depth,
                    planes,
                    row_len: self.row_len,
                    table,
                });
            }
            let bases = &self.bases[..block.len() * g.taps()];
            let (block_offsets, others) = offsets.split_at(padded_outputs * bases.len());
            offsets = others;
            let start = (first == 0).then_some(bias);
            for vector in (0..vectors).step_by(self.blocking.strip) {
                let table = &table[vector * S::LANES..];
                let strip = self.blocking.strip.min(vectors - vector);
                let sums = &mut sums[vector * S::LANES * padded_outputs..]
                    [..strip * S::LANES * padded_outputs];
                let work = LookUp {
                    table,
                    bases,
                    offsets: block_offsets,
                    bias: start,
                    sums,
                };
                match strip {
                    1 => self.simd.call(Strip::<T, 1>(work)),
                    2 => self.simd.call(Strip::<T, 2>(work)),
                    3 => self.simd.call(Strip::<T, 3>(work)),
                    4 if S::REGISTERS >= 32 => self.simd.call(Strip::<T, 4>(work)),
                    5 if S::REGISTERS >= 32 => self.simd.call(Strip::<T, 5>(work)),
                    6 if S::REGISTERS >= 32 => self.simd.call(Strip::<T, 6>(work)),
                    _ => unreachable!("strips have at most {} vectors", max_strip::<S>()),
                }
            }
        }
        self.write_output(origin, size, vectors, sums, positions, output);
    }

    /// Copy the sums of a tile to the output, without the positions between the
    /// end of a row and the start of the next.
    fn write_output(
        &self,
        origin: [usize; 2],
        size: [usize; 2],
        vectors: usize,
        sums: &[f32],
        positions: &mut [f32],
        output: &mut [f32],
    ) {
        let g = &self.geometry;
        let padded_outputs = self.padded_outputs();
        for (o, channel) in output.chunks_exact_mut(g.out_pixels()).enumerate() {
            for vector in (0..vectors).step_by(self.blocking.strip) {
                let len = self.blocking.strip.min(vectors - vector) * S::LANES;
                let from = vector * S::LANES * padded_outputs + o * len;
                positions[vector * S::LANES..][..len].copy_from_slice(&sums[from..from + len]);
            }
            let rows = channel
                .chunks_exact_mut(g.out_size[1])
                .skip(origin[0])
                .take(size[0]);
            for (row, positions) in rows.zip(positions.chunks(self.planes.width())) {
                row[origin[1]..origin[1] + size[1]].copy_from_slice(&positions[..size[1]]);
            }
        }
    }
}

/// Most vectors of a strip: with `OUTPUTS` sums each they fill three quarters of
/// the registers.
const fn max_strip<S: Simd>() -> usize {
    S::REGISTERS * 3 / 4 / OUTPUTS
}

/// Inner products of the codewords of a subspace with its planes.
struct BuildTable<'a> {
    /// Panels of `tile_rows` codewords, each `(dim, tile_rows)`.
    codewords: &'a [f32],
    dim: usize,
    /// Planes, of which the last subspace may have fewer than `dim`.
    depth: usize,
    /// `(depth, row_len)`
    planes: &'a [f32],
    row_len: usize,
    /// `(codewords, row_len)`
    table: &'a mut [f32],
}

impl Task for BuildTable<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let columns = TILE_VECTORS * S::LANES;
        let whole = self.row_len / columns * columns;
        for column in (0..whole).step_by(columns) {
            if tile_rows::<S>() == 12 {
                self.columns::<S, 12, TILE_VECTORS>(simd, column);
            } else {
                self.columns::<S, 6, TILE_VECTORS>(simd, column);
            }
        }
        for column in (whole..self.row_len).step_by(S::LANES) {
            if tile_rows::<S>() == 12 {
                self.columns::<S, 12, 1>(simd, column);
            } else {
                self.columns::<S, 6, 1>(simd, column);
            }
        }
    }
}

impl BuildTable<'_> {
    /// All codewords at `V` vectors of positions.
    #[inline(always)]
    fn columns<S: Simd, const R: usize, const V: usize>(&mut self, simd: S, column: usize) {
        let panel_len = R * self.dim;
        let panels = self.codewords.len() / panel_len;
        let end = column + V * S::LANES;
        assert!(self.depth <= self.dim && end <= self.row_len);
        assert!(self.planes.len() >= self.depth * self.row_len);
        assert!(self.table.len() >= panels * R * self.row_len);
        for panel in 0..panels {
            // SAFETY: the V vectors at `column` lie within a row. There are
            // `depth` rows of planes, R rows of the table for each of the
            // panels, and each panel has R values for `dim` >= `depth` rows, as
            // asserted.
            unsafe {
                let codewords = self.codewords.as_ptr().add(panel * panel_len);
                let planes = self.planes.as_ptr().add(column);
                let products = tile::<S, R, V>(
                    simd,
                    self.depth,
                    |j, i| *codewords.add(j * R + i),
                    |j| planes.add(j * self.row_len),
                    [[simd.splat(0.0); V]; R],
                );
                let table = self
                    .table
                    .as_mut_ptr()
                    .add(panel * R * self.row_len + column);
                store_tile(simd, table, self.row_len, &products);
            }
        }
    }
}

/// Add the rows of a block of subspaces to the sums of a strip.
struct LookUp<'a, T> {
    /// The block's tables, from the strip's first position on.
    table: &'a [f32],
    /// See [`PixelsConv::bases`].
    bases: &'a [usize],
    /// For each block of outputs `(bases, OUTPUTS)`, see [`PixelsConv::offsets`].
    offsets: &'a [T],
    /// What the sums start at; if there is none they go on.
    bias: Option<&'a [f32]>,
    /// `(outputs, vectors of the strip)`
    sums: &'a mut [f32],
}

/// [`LookUp`] for a strip of `V` vectors.
struct Strip<'a, T, const V: usize>(LookUp<'a, T>);

impl<T: Offset, const V: usize> Task for Strip<'_, T, V> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let LookUp {
            table,
            bases,
            offsets,
            bias,
            sums,
        } = self.0;
        let sums_len = OUTPUTS * V * S::LANES;
        let blocks = sums.len() / sums_len;
        assert!(offsets.len() >= blocks * bases.len() * OUTPUTS);
        for block in 0..blocks {
            let sums = &mut sums[block * sums_len..][..sums_len];
            let mut registers = [[simd.splat(0.0); V]; OUTPUTS];
            if let Some(bias) = bias {
                for o in 0..OUTPUTS {
                    registers[o] = [simd.splat(bias[block * OUTPUTS + o]); V];
                }
            } else {
                // SAFETY: `sums` holds OUTPUTS rows of V vectors.
                unsafe { load_tile(simd, sums.as_ptr(), V * S::LANES, &mut registers) };
            }
            // SAFETY: there are OUTPUTS offsets for each block and base, as
            // asserted. `table` starts at the strip's first position p of the
            // first row. A base leads to the first row of a subspace of the
            // block and on to what a tap reads there; an offset from there to
            // row code < n_centroids (both made and checked in `new`). So the
            // load is at p + tap, plus less than V vectors, of a row of the
            // tables; `row_len` covers the last position's vector with the
            // furthest tap, and the tables hold all rows of the block. The sums
            // are as for loading.
            unsafe {
                let offsets = offsets.as_ptr().add(block * bases.len() * OUTPUTS);
                for i in 0..bases.len() {
                    let base = table.as_ptr().add(*bases.get_unchecked(i));
                    for o in 0..OUTPUTS {
                        // Volatile, or the compiler loads several into a vector,
                        // only to take them apart.
                        let offset = offsets.add(i * OUTPUTS + o).read_volatile();
                        let source = base.byte_add(offset.bytes());
                        for v in 0..V {
                            let row = simd.load(source.add(v * S::LANES));
                            registers[o][v] = simd.add(registers[o][v], row);
                        }
                    }
                }
                store_tile(simd, sums.as_mut_ptr(), V * S::LANES, &registers);
            }
        }
    }
}
