//! Dense convolutions.
//!
//! [`GemmConv`] is the product of the weights and the im2col matrix, which
//! exists only in blocks: a block is packed into scratch in the order in which
//! the register tiles read it, and the weights are packed once, when the kernel
//! is made. A general matrix-product crate would pack the constant weights on
//! every call, allocate its packing buffers while running and choose the ISA by
//! itself.
//!
//! [`DirectConv`] serves groups with few outputs, depthwise convolutions above
//! all, where packing would cost more than the product.

// As in `tile`: index loops keep the sums in registers.
#![allow(clippy::needless_range_loop)]

use std::ops::Range;

use crate::geometry::ConvGeometry;
use crate::isa::{Simd, Task};
use crate::kernels::planes::Planes;
use crate::kernels::tile::{
    MAX_COLUMNS, MAX_TILE, TILE_VECTORS, load_tile, store_tile, tile, tile_rows,
};
use crate::kernels::{Candidate, ConvLayer, Kernel, has_wide_units, multiply_cycles};

/// Bytes of one packed panel of im2col columns. It is read again for every
/// panel of weights, so it stays in half of a 32 KiB L1 cache, or in two thirds of
/// one of 48 KiB, beside the weights and outputs that stream through.
fn column_panel_bytes<S: Simd>() -> usize {
    if has_wide_units::<S>() {
        32 << 10
    } else {
        16 << 10
    }
}

/// Bytes of the packed weights that are applied to one column panel after
/// another: at most half of a 512 KiB L2 cache.
const WEIGHT_BLOCK_BYTES: usize = 256 << 10;

/// Columns packed at a time, roughly. Enough that the weights, which are read
/// again for every block, come out of DRAM behind many operations.
const BLOCK_COLUMNS: usize = 768;

/// Groups with at most this many outputs are convolved directly.
const DIRECT_OUTPUTS: usize = 4;

/// Matrix product with packed weights and an implicit im2col matrix.
#[derive(Debug)]
pub(crate) struct GemmConv<S> {
    simd: S,
    name: String,
    geometry: ConvGeometry,
    planes: Planes,
    /// Whether the input's channels serve as planes.
    identity: bool,
    /// For each group, each block of rows of the im2col matrix and each panel
    /// of `tile_rows` outputs: `(rows of the block, tile_rows)`.
    weights: Vec<f32>,
    bias: Vec<f32>,
    /// Rows of the im2col matrix per block.
    depth_block: usize,
}

impl<S: Simd> GemmConv<S> {
    /// Columns of a panel.
    const COLUMNS: usize = TILE_VECTORS * S::LANES;

    pub(crate) fn candidate<'a>(simd: S, layer: &'a ConvLayer<'a>) -> Candidate<'a> {
        let g = layer.geometry;
        let depth = g.group_in_channels() * g.taps();
        let outputs = g.group_out_channels().next_multiple_of(tile_rows::<S>());
        let vectors = g.out_pixels().next_multiple_of(Self::COLUMNS) / S::LANES;
        // Multiplying one vector, packing one.
        let cycles = 1.25 * multiply_cycles::<S>() * outputs as f64 + 4.0;
        let cycles = (g.groups * depth * vectors) as f64 * cycles;
        Candidate::new(cycles, move || Self::new(simd, layer))
    }

    fn new(simd: S, layer: &ConvLayer<'_>) -> Self {
        let geometry = layer.geometry.clone();
        let planes = Planes::new(&geometry, geometry.out_size);
        let depth = geometry.group_in_channels() * geometry.taps();
        let depth_block = depth.min(column_panel_bytes::<S>() / size_of::<f32>() / Self::COLUMNS);
        let dense = layer.dense_weights();
        let outputs = geometry.group_out_channels();
        let rows = tile_rows::<S>();
        let mut weights =
            Vec::with_capacity(geometry.groups * outputs.next_multiple_of(rows) * depth);
        for group in dense.chunks_exact(outputs * depth) {
            for first in (0..depth).step_by(depth_block) {
                let block = first..(first + depth_block).min(depth);
                for panel in (0..outputs).step_by(rows) {
                    for k in block.clone() {
                        weights.extend((panel..panel + rows).map(|o| {
                            // Rows that fill up the last panel.
                            if o < outputs {
                                group[o * depth + k]
                            } else {
                                0.0
                            }
                        }));
                    }
                }
            }
        }
        Self {
            simd,
            name: format!("{}-f32-gemm", S::NAME),
            identity: planes.is_identity(&geometry),
            planes,
            weights,
            bias: layer.bias_or_zeros(),
            depth_block,
            geometry,
        }
    }

    fn depth(&self) -> usize {
        self.geometry.group_in_channels() * self.geometry.taps()
    }

    fn planes_len(&self) -> usize {
        if self.identity {
            0
        } else {
            self.geometry.group_in_channels() * self.planes.len()
        }
    }

    /// Columns packed at a time.
    fn block_columns(&self) -> usize {
        self.geometry
            .out_pixels()
            .min(BLOCK_COLUMNS)
            .next_multiple_of(Self::COLUMNS)
    }
}

impl<S: Simd> Kernel for GemmConv<S> {
    fn name(&self) -> &str {
        &self.name
    }

    fn scratch_len(&self, _: usize) -> usize {
        // A vector more, because the last packed run may overshoot.
        self.planes_len() + self.block_columns() * self.depth_block + S::LANES
    }

    fn run(&self, n: usize, input: &[f32], output: &mut [f32], scratch: &mut [f32]) {
        let g = &self.geometry;
        let group_in = g.group_in_channels() * g.in_pixels();
        let group_out = g.group_out_channels() * g.out_pixels();
        let (planes, packed) = scratch.split_at_mut(self.planes_len());
        let inputs = input.chunks_exact(group_in).take(n * g.groups);
        let outputs = output.chunks_exact_mut(group_out);
        for (i, (input, output)) in inputs.zip(outputs).enumerate() {
            if self.identity {
                self.group(i % g.groups, input, packed, output);
            } else {
                let channels = input.chunks_exact(g.in_pixels());
                for (channel, plane) in channels.zip(planes.chunks_exact_mut(self.planes.len())) {
                    self.planes.fill(self.simd, g, [0, 0], channel, plane);
                }
                self.group(i % g.groups, planes, packed, output);
            }
        }
    }
}

impl<S: Simd> GemmConv<S> {
    /// Convolve one group of one image, whose planes are given.
    fn group(&self, group: usize, planes: &[f32], packed: &mut [f32], output: &mut [f32]) {
        let g = &self.geometry;
        let outputs = g.group_out_channels();
        let rows = tile_rows::<S>();
        let padded_outputs = outputs.next_multiple_of(rows);
        let weights = &self.weights[group * padded_outputs * self.depth()..];
        let bias = &self.bias[group * outputs..(group + 1) * outputs];
        let out_pixels = g.out_pixels();
        for first_column in (0..out_pixels).step_by(self.block_columns()) {
            let columns = first_column..(first_column + self.block_columns()).min(out_pixels);
            for first_k in (0..self.depth()).step_by(self.depth_block) {
                let depth = self.depth_block.min(self.depth() - first_k);
                self.simd.call(PackColumns {
                    planes: &self.planes,
                    width: g.out_size[1],
                    rows: first_k..first_k + depth,
                    columns: columns.clone(),
                    source: planes,
                    packed,
                });
                let weights = &weights[first_k * padded_outputs..][..depth * padded_outputs];
                let block_rows =
                    (WEIGHT_BLOCK_BYTES / size_of::<f32>() / depth / rows).max(1) * rows;
                for first_row in (0..outputs).step_by(block_rows) {
                    let end_row = (first_row + block_rows).min(outputs);
                    for column in columns.clone().step_by(Self::COLUMNS) {
                        let product = Product {
                            weights: &weights[first_row * depth..],
                            columns: &packed[(column - first_column) * depth..],
                            depth,
                            bias: (first_k == 0).then(|| &bias[first_row..end_row]),
                            height: end_row - first_row,
                            width: Self::COLUMNS.min(columns.end - column),
                            output: &mut output[first_row * out_pixels + column..],
                            stride: out_pixels,
                        };
                        if rows == 12 {
                            self.simd.call(Rows::<12>(product));
                        } else {
                            self.simd.call(Rows::<6>(product));
                        }
                    }
                }
            }
        }
    }
}

/// Packs a block of the im2col matrix in panels of columns, each `(rows,
/// columns of a tile)`.
struct PackColumns<'a> {
    planes: &'a Planes,
    /// Of the output map.
    width: usize,
    rows: Range<usize>,
    columns: Range<usize>,
    /// All planes of the group.
    source: &'a [f32],
    packed: &'a mut [f32],
}

impl Task for PackColumns<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let panel_columns = TILE_VECTORS * S::LANES;
        let panel_len = self.rows.len() * panel_columns;
        let taps = self.planes.taps();
        for (i, first) in self.columns.clone().step_by(panel_columns).enumerate() {
            let panel = &mut self.packed[i * panel_len..][..panel_len + S::LANES];
            let end = (first + panel_columns).min(self.columns.end);
            // The columns of a panel are a few runs, each within one row of the
            // map: where they lie in a plane and in the panel, how many.
            let mut runs = [(0, 0, 0); MAX_COLUMNS];
            let mut n_runs = 0;
            let mut column = first;
            while column < end {
                let (y, x) = (column / self.width, column % self.width);
                let run = (self.width - x).min(end - column);
                runs[n_runs] = (y * self.planes.width() + x, column - first, run);
                n_runs += 1;
                column += run;
            }
            for (row, k) in self.rows.clone().enumerate() {
                let offset = k / taps.len() * self.planes.len() + taps[k % taps.len()];
                for &(from, to, run) in &runs[..n_runs] {
                    let from = &self.source[offset + from..];
                    let to = &mut panel[row * panel_columns + to..];
                    let copied = run.next_multiple_of(S::LANES);
                    // Whole vectors; what is too much is overwritten by the
                    // next run, or lies behind the last.
                    if from.len() >= copied {
                        assert!(to.len() >= copied);
                        for at in (0..run).step_by(S::LANES) {
                            // SAFETY: both slices hold `copied` values, which
                            // end with the vector that starts at `at < run`.
                            unsafe {
                                let v = simd.load(from.as_ptr().add(at));
                                simd.store(to.as_mut_ptr().add(at), v);
                            }
                        }
                    } else {
                        to[..run].copy_from_slice(&from[..run]);
                    }
                }
            }
        }
    }
}

/// The product of a block of weights and one panel of columns.
struct Product<'a> {
    /// Panels of `tile_rows` outputs, each `(depth, tile_rows)`.
    weights: &'a [f32],
    /// `(depth, columns of a tile)`
    columns: &'a [f32],
    depth: usize,
    /// What the outputs start at; if there is none they go on.
    bias: Option<&'a [f32]>,
    /// Outputs.
    height: usize,
    /// Columns of the panel that exist.
    width: usize,
    /// `(height, stride)`, of which the first `width` columns are computed.
    output: &'a mut [f32],
    stride: usize,
}

/// [`Product`] in tiles of `R` rows.
struct Rows<'a, const R: usize>(Product<'a>);

impl<const R: usize> Task for Rows<'_, R> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let p = self.0;
        let columns = TILE_VECTORS * S::LANES;
        for row in (0..p.height).step_by(R) {
            let height = R.min(p.height - row);
            let weights = &p.weights[row * p.depth..];
            let bias = p.bias.map(|bias| &bias[row..row + height]);
            let output = &mut p.output[row * p.stride..];
            if height == R && p.width == columns {
                product_tile::<S, R>(simd, p.depth, weights, p.columns, bias, output, p.stride);
            } else {
                // Computed in full beside the output.
                let mut part = [0.0; MAX_TILE];
                for i in 0..height {
                    part[i * columns..][..p.width]
                        .copy_from_slice(&output[i * p.stride..][..p.width]);
                }
                product_tile::<S, R>(simd, p.depth, weights, p.columns, bias, &mut part, columns);
                for i in 0..height {
                    output[i * p.stride..][..p.width]
                        .copy_from_slice(&part[i * columns..][..p.width]);
                }
            }
        }
    }
}

/// One tile of `R` rows, which start at `bias` or go on from their present
/// values.
#[inline(always)]
fn product_tile<S: Simd, const R: usize>(
    simd: S,
    depth: usize,
    weights: &[f32],
    columns: &[f32],
    bias: Option<&[f32]>,
    output: &mut [f32],
    stride: usize,
) {
    let width = TILE_VECTORS * S::LANES;
    assert!(weights.len() >= depth * R && columns.len() >= depth * width);
    assert!(output.len() >= (R - 1) * stride + width);
    let mut sums = [[simd.splat(0.0); TILE_VECTORS]; R];
    if let Some(bias) = bias {
        // The last tile may have fewer than R rows.
        for i in 0..R.min(bias.len()) {
            sums[i] = [simd.splat(bias[i]); TILE_VECTORS];
        }
    } else {
        // SAFETY: R rows of `width` values, TILE_VECTORS vectors, at distance
        // `stride` lie in `output`, as asserted.
        unsafe { load_tile(simd, output.as_ptr(), stride, &mut sums) };
    }
    // SAFETY: `columns` has `depth` rows of `width` values and `weights` has R
    // per row, as asserted. Storing is as loading.
    unsafe {
        let sums = tile(
            simd,
            depth,
            |k, i| *weights.get_unchecked(k * R + i),
            |k| columns.as_ptr().add(k * width),
            sums,
        );
        store_tile(simd, output.as_mut_ptr(), stride, &sums);
    }
}

/// Vectors of positions per tile of [`DirectConv`]; with at most
/// `DIRECT_OUTPUTS` outputs the sums fit 16 registers.
const DIRECT_VECTORS: usize = 3;

/// Sums straight from the planes, for all outputs of a group at a time.
#[derive(Debug)]
pub(crate) struct DirectConv<S> {
    simd: S,
    name: String,
    geometry: ConvGeometry,
    planes: Planes,
    /// `(groups, channels, taps, outputs)`
    weights: Vec<f32>,
    bias: Vec<f32>,
    /// Offset in the planes for each channel and tap.
    offsets: Vec<usize>,
}

impl<S: Simd> DirectConv<S> {
    /// Positions of a tile.
    const COLUMNS: usize = DIRECT_VECTORS * S::LANES;

    pub(crate) fn candidate<'a>(simd: S, layer: &'a ConvLayer<'a>) -> Option<Candidate<'a>> {
        let g = layer.geometry;
        let outputs = g.group_out_channels();
        if outputs > DIRECT_OUTPUTS {
            return None;
        }
        let planes = Planes::new(g, g.out_size);
        let depth = g.group_in_channels() * g.taps();
        let vectors = planes.positions(g.out_size).div_ceil(Self::COLUMNS) * DIRECT_VECTORS;
        // Loading one vector and multiplying it for each output.
        let cycles = 1.0 + 0.6 * outputs as f64;
        let cycles = (g.groups * depth * vectors) as f64 * cycles;
        Some(Candidate::new(cycles, move || Self::new(simd, layer)))
    }

    fn new(simd: S, layer: &ConvLayer<'_>) -> Self {
        let geometry = layer.geometry.clone();
        let outputs = geometry.group_out_channels();
        let planes = Planes::new(&geometry, geometry.out_size);
        let offsets: Vec<usize> = (0..geometry.group_in_channels())
            .flat_map(|channel| planes.taps().iter().map(move |tap| (channel, tap)))
            .map(|(channel, tap)| channel * planes.len() + tap)
            .collect();
        let depth = offsets.len();
        let dense = layer.dense_weights();
        let weights = dense
            .chunks_exact(outputs * depth)
            .flat_map(|group| {
                (0..depth).flat_map(move |k| (0..outputs).map(move |o| group[o * depth + k]))
            })
            .collect();
        Self {
            simd,
            name: format!("{}-f32-direct", S::NAME),
            planes,
            weights,
            bias: layer.bias_or_zeros(),
            offsets,
            geometry,
        }
    }

    /// Planes of a group, and what the last tile reads beyond them.
    fn planes_len(&self) -> usize {
        self.geometry.group_in_channels() * self.planes.len() + Self::COLUMNS
    }

    /// Sums of one output channel, by flat position.
    fn sums_len(&self) -> usize {
        self.planes
            .positions(self.geometry.out_size)
            .next_multiple_of(Self::COLUMNS)
    }
}

impl<S: Simd> Kernel for DirectConv<S> {
    fn name(&self) -> &str {
        &self.name
    }

    fn scratch_len(&self, _: usize) -> usize {
        self.planes_len() + self.geometry.group_out_channels() * self.sums_len()
    }

    fn run(&self, n: usize, input: &[f32], output: &mut [f32], scratch: &mut [f32]) {
        let g = &self.geometry;
        let group_in = g.group_in_channels() * g.in_pixels();
        let group_out = g.group_out_channels() * g.out_pixels();
        let depth = self.offsets.len();
        let outputs = g.group_out_channels();
        let (planes, sums) = scratch.split_at_mut(self.planes_len());
        let images = input.chunks_exact(group_in).take(n * g.groups);
        for (i, (input, output)) in images.zip(output.chunks_exact_mut(group_out)).enumerate() {
            let mut filled = planes.chunks_exact_mut(self.planes.len());
            for (channel, plane) in input.chunks_exact(g.in_pixels()).zip(&mut filled) {
                self.planes.fill(self.simd, g, [0, 0], channel, plane);
            }
            planes[g.group_in_channels() * self.planes.len()..].fill(0.0);
            let group = i % g.groups;
            let direct = Direct {
                weights: &self.weights[group * depth * outputs..][..depth * outputs],
                offsets: &self.offsets,
                bias: &self.bias[group * outputs..][..outputs],
                planes,
                sums,
                sums_len: self.sums_len(),
            };
            match outputs {
                1 => self.simd.call(DirectOutputs::<1>(direct)),
                2 => self.simd.call(DirectOutputs::<2>(direct)),
                3 => self.simd.call(DirectOutputs::<3>(direct)),
                _ => self.simd.call(DirectOutputs::<DIRECT_OUTPUTS>(direct)),
            }
            let channels = output.chunks_exact_mut(g.out_pixels());
            for (channel, sums) in channels.zip(sums.chunks_exact(self.sums_len())) {
                let rows = channel.chunks_exact_mut(g.out_size[1]);
                for (row, sums) in rows.zip(sums.chunks(self.planes.width())) {
                    row.copy_from_slice(&sums[..row.len()]);
                }
            }
        }
    }
}

/// Sums of the outputs of a group at all flat positions.
struct Direct<'a> {
    /// `(depth, outputs)`
    weights: &'a [f32],
    /// Where the planes are read for each channel and tap.
    offsets: &'a [usize],
    bias: &'a [f32],
    planes: &'a [f32],
    /// `(outputs, sums_len)`
    sums: &'a mut [f32],
    sums_len: usize,
}

/// [`Direct`] for `R` outputs.
struct DirectOutputs<'a, const R: usize>(Direct<'a>);

impl<const R: usize> Task for DirectOutputs<'_, R> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let d = self.0;
        let columns = DIRECT_VECTORS * S::LANES;
        let furthest = d.offsets.iter().max().map_or(0, |offset| *offset);
        assert!(d.sums_len.is_multiple_of(columns) && furthest + d.sums_len <= d.planes.len());
        assert!(d.sums.len() >= R * d.sums_len && d.weights.len() >= d.offsets.len() * R);
        let mut start = [[simd.splat(0.0); DIRECT_VECTORS]; R];
        for i in 0..R {
            start[i] = [simd.splat(d.bias[i]); DIRECT_VECTORS];
        }
        for position in (0..d.sums_len).step_by(columns) {
            // SAFETY: there are R weights for each offset. The `columns` values
            // behind any offset and position end within the planes, and those
            // stored in each of the R rows within `sums`; all as asserted.
            unsafe {
                let sums = tile(
                    simd,
                    d.offsets.len(),
                    |k, i| *d.weights.get_unchecked(k * R + i),
                    |k| d.planes.as_ptr().add(d.offsets.get_unchecked(k) + position),
                    start,
                );
                store_tile(simd, d.sums.as_mut_ptr().add(position), d.sums_len, &sums);
            }
        }
    }
}
