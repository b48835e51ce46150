//! Product-quantised convolution with tables across pixels, in whole aligned
//! vectors.
//!
//! The table of a subspace holds, for each codeword, its inner product with every
//! pixel of the (padded) input. For a given output channel, tap and subspace the
//! code is a constant, so looking up is adding a piece of one table row, and the
//! work is done as in [`pixels`](super::pixels): tile by tile, strip by strip, such
//! that tables stay in L2 and what a strip reads of them in L1. Here every load is a
//! whole aligned vector:
//!
//! - A vector holds one row of the map, or a part of one, with its halo; where
//!   rows are short, its parts hold rows of different blocks of the map. A tap
//!   in another row is then another vector at the same lanes.
//! - A tap in another column would be a load across two vectors. Instead, the
//!   taps of each column have sums of their own, which are shifted by whole
//!   lanes and added up at the end of a pass.
//! - Rows that whole parts would cover badly are cut into two blocks of columns, each
//!   with parts, and tables, of its own: 16 columns with taps in three become 14, two rows
//!   to a vector, and 2, eight to a vector.
//! - A stride splits the input into phases, each with taps of its own, as if they
//!   were more channels. Their subspaces share the codebooks.
//!
//! Tables hold [`Float`], [`Short`] or, where the CPU computes with them, [`Half`] numbers:
//! see there how 16 bits are kept from overflowing. [`Short`] ones are built from integers
//! of 16 bits ([`WordCodebook`]) or of 8 ([`ByteCodebook`]).

// As in `tile`: index loops keep the sums in registers.
#![allow(clippy::needless_range_loop)]

mod byte;
mod float;
#[cfg(target_arch = "x86_64")]
mod half;
mod layout;
mod short;
mod word;

use std::fmt::Debug;
use std::marker::PhantomData;
use std::ops::Range;

use super::planes::every;
use super::{
    Candidate, ConvLayer, Kernel, Weights, has_wide_units, multiply_cycles, vector_cycles,
};
use crate::geometry::ConvGeometry;
use crate::graph::PqGeometry;
use crate::isa::{Simd, Task};
pub(super) use byte::ByteCodebook;
pub(super) use float::Float;
#[cfg(target_arch = "x86_64")]
pub(super) use half::Half;
use layout::{
    Batch, Cut, LINE_BYTES, Layout, MAX_COLUMNS, OFFSET_BYTES, Phase, Row, Runs, batches,
    most_plane_vectors, seams,
};
pub(super) use short::Short;
pub(super) use word::WordCodebook;

/// float32 values of a cache line.
const LINE: usize = LINE_BYTES / size_of::<f32>();

/// Longest sub-vector: what rounding its inputs may add to the sums stays small.
const MAX_SUBVECTOR_DIM: usize = 1024;

/// What the windows of the tables that are looked up together may take: more than a
/// 32 KiB L1 cache, but less than what they save.
const L1_BYTES: usize = 48 << 10;

/// What tables and accumulators of a tile may take of L2.
const L2_BYTES: usize = 640 << 10;

/// What maps may take of L2 while tiles come and go.
const MAP_BYTES: usize = 1600 << 10;

/// Outputs whose responses are written in turns.
const WRITTEN_TOGETHER: usize = 8;

/// Numbers of sources that may be looked up together.
const TOGETHER: [usize; 8] = [1, 2, 3, 4, 6, 9, 12, 18];

/// What tables hold.
pub(super) trait Cell: Debug + Send + Sync + Sized + 'static {
    /// A number in a table.
    type Element: bytemuck::Pod + Debug;
    /// A vector of them.
    type Vector<S: Simd>: Copy;

    /// Element type in kernel names.
    const NAME: &'static str;
    /// float32 vectors of the CPU that hold as many values as a vector, 1 or 2.
    const HALVES: usize;
    /// Registers that a vector takes.
    const VECTORS: usize;
    /// Terms that may be summed before they go to the accumulators.
    const MAX_TERMS: Option<usize>;
    /// How often they may.
    const MAX_BATCHES: usize;

    /// Codewords whose table rows are built together.
    fn panel_rows<S: Simd>() -> usize;

    /// Vector operations that a vector of a table takes, for sub-vectors of `dim`
    /// channels.
    fn table_cycles<S: Simd>(dim: usize) -> f64;

    /// Vector operations that a vector of inputs takes, with all that looks at it, and those
    /// of adding a batch's sum to accumulators in L2, with what they load and store.
    fn read_and_end_cycles<S: Simd>() -> [f64; 2];

    /// Pack codebooks `(sets, M, K, C')`.
    fn new<S: Simd>(layout: &Layout, codebooks: &[f32], codes: &[u16]) -> Self;

    /// Elements of scratch for [`inspect`](Self::inspect) and
    /// [`build`](Self::build).
    fn scratch_len(layout: &Layout) -> usize;

    /// What [`Inputs::peak`] is to be, of all channels of a group in all phases.
    fn peak<S: Simd>(_: S, _: &[f32]) -> f32 {
        0.0
    }

    /// Look at a tile of a group. Gives each batch's scale, and returns what 1 in the
    /// accumulators stands for.
    fn inspect<S: Simd>(
        &self,
        simd: S,
        inputs: &Inputs<'_>,
        group: usize,
        scales: &mut [Scale],
        scratch: &mut [f32],
    ) -> f32;

    /// Build the table of a source, given the number of its codebook.
    fn build<S: Simd>(
        &self,
        simd: S,
        inputs: &Inputs<'_>,
        source: (usize, usize),
        scale: Scale,
        table: &mut [Self::Element],
        scratch: &mut [f32],
    );

    /// Every lane 0.
    fn zero<S: Simd>(simd: S) -> Self::Vector<S>;

    /// `a + b`
    fn add<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;

    /// Lane `i` becomes lane `i + distance`.
    fn shift<S: Simd>(simd: S, vector: Self::Vector<S>, distance: usize) -> Self::Vector<S>;

    /// # Safety
    ///
    /// `source` is valid for reads of a vector.
    unsafe fn load<S: Simd>(simd: S, source: *const Self::Element) -> Self::Vector<S>;

    /// # Safety
    ///
    /// `target` is valid for writes of a vector.
    unsafe fn store<S: Simd>(simd: S, target: *mut Self::Element, vector: Self::Vector<S>);

    /// Add a batch's sum to the accumulators of a vector, which hold anything if
    /// the sums `begin`.
    ///
    /// # Safety
    ///
    /// `accumulator` is valid for reads and writes of `HALVES` float32 vectors.
    unsafe fn accumulate<S: Simd>(
        simd: S,
        accumulator: *mut f32,
        sum: Self::Vector<S>,
        scale: Scale,
        begin: bool,
    );

    /// What was accumulated, in the order of the lanes.
    ///
    /// # Safety
    ///
    /// `accumulator` is valid for reads of `HALVES` float32 vectors.
    unsafe fn accumulated<S: Simd>(simd: S, accumulator: *const f32) -> [S::F32; 2];
}

/// The scale of a batch.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(super) struct Scale {
    /// From responses to sums.
    factor: f32,
    /// From sums to what is accumulated.
    weight: i32,
    /// What integers of inputs are raised by.
    zero: i32,
    /// How far products of integers are shifted right.
    shift: i32,
}

// SAFETY: all fields are numbers of 32 bits, one behind the other, and may be 0.
unsafe impl bytemuck::Zeroable for Scale {}

// SAFETY: as above, and any bits are a number.
unsafe impl bytemuck::Pod for Scale {}

/// What a tile sees of one group of one image.
#[derive(Clone, Copy, Debug)]
pub(super) struct Inputs<'a> {
    layout: &'a Layout,
    tile: usize,
    /// Channels of all phases.
    phases: &'a [f32],
    /// The greatest magnitude in them, if the cells need it.
    #[cfg_attr(
        not(target_arch = "x86_64"),
        allow(dead_code, reason = "none there does")
    )]
    peak: f32,
}

/// What a tile sees of some channels in one phase.
struct Planes<'a> {
    runs: Runs,
    channels: &'a [f32],
}

impl<'a> Inputs<'a> {
    /// For vectors of `halves` times `lanes` lanes.
    fn planes(&self, [halves, lanes]: [usize; 2], sources: Range<usize>) -> Planes<'a> {
        let layout = self.layout;
        let (phase, _) = layout.source(sources.start);
        let reach = phase.columns.last().copied().unwrap_or(0);
        let channels = layout.channels(sources.start).start..layout.channels(sources.end - 1).end;
        Planes {
            runs: Runs::new(
                layout.cut,
                [halves, lanes],
                self.tile,
                phase.size,
                phase.padding,
                layout.cut.width + reach,
            ),
            channels: phase.channels(self.phases, channels),
        }
    }
}

impl Planes<'_> {
    /// One of the vectors of a channel in a row.
    #[inline(always)]
    fn load<S: Simd>(&self, simd: S, row: &Row, channel: usize, half: usize) -> S::F32 {
        let pixels = self.runs.pixels();
        let channel = &self.channels[channel * pixels..][..pixels];
        let mut vector = simd.splat(0.0);
        for (i, pixels) in row.of(half).iter().enumerate() {
            // SAFETY: a row has lanes of a vector that lie within a map of as many
            // pixels as the channel has.
            let lanes = unsafe {
                let first = channel.as_ptr().wrapping_offset(pixels.offset);
                simd.load_range(first, pixels.begin, pixels.end)
            };
            vector = if i == 0 {
                lanes
            } else {
                simd.add(vector, lanes)
            };
        }
        vector
    }

    /// Bring what [`load`](Self::load) would read closer.
    #[inline(always)]
    fn prefetch<S: Simd>(&self, simd: S, row: &Row, channel: usize, half: usize) {
        let channel = self.channels[channel * self.runs.pixels()..].as_ptr();
        for pixels in row.of(half) {
            let first = pixels.offset + pixels.begin as isize;
            simd.prefetch(channel.wrapping_offset(first).cast());
        }
    }
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct RowsConv<S, C> {
    name: String,
    /// They cover the map.
    blocks: Vec<Block<S, C>>,
}

/// Columns of the map.
#[derive(Debug)]
struct Block<S, C> {
    simd: S,
    layout: Layout,
    cells: C,
    /// For each group and pass, see [`Layout::offsets`].
    offsets: Vec<u16>,
    /// `(groups, padded outputs)`
    bias: Vec<f32>,
}

/// Lanes of a vector.
const fn lanes<S: Simd, C: Cell>() -> usize {
    C::HALVES * S::LANES
}

/// Outputs summed together with taps in `columns` columns, 4, 2 or 1: as many
/// as leave a quarter of the registers free.
fn outputs_together<S: Simd, C: Cell>(columns: usize) -> usize {
    match S::REGISTERS * 3 / 4 / (columns * C::VECTORS) {
        4.. => 4,
        2 | 3 => 2,
        _ => 1,
    }
}

/// Whether [`Block::look_up`] has strips of so many vectors.
fn strip_fits<S: Simd, C: Cell>(columns: usize, strip: usize) -> bool {
    let sums = strip * outputs_together::<S, C>(columns) * columns * C::VECTORS;
    strip == 1
        || sums <= S::REGISTERS * 3 / 4
            && (columns <= 3 && strip == 2 || columns == 1 && strip == 4)
}

/// Choose blocks of columns and their layouts, and estimate the clock cycles of an image.
/// `None` if there are no good ones.
fn choose_layouts<S: Simd, C: Cell>(
    geometry: &ConvGeometry,
    pq: PqGeometry,
) -> Option<(Vec<Layout>, f64)> {
    let width = geometry.out_size[1];
    let (layout, cycles) = choose_layout::<S, C>(geometry, pq, &(0..width))?;
    let seams = seams(&layout.phases, width, lanes::<S, C>());
    let mut best = (vec![layout], cycles);
    for seam in seams {
        let left = choose_layout::<S, C>(geometry, pq, &(0..seam));
        let right = choose_layout::<S, C>(geometry, pq, &(seam..width));
        if let (Some((left, of_left)), Some((right, of_right))) = (left, right)
            && of_left + of_right < best.1
        {
            best = (vec![left, right], of_left + of_right);
        }
    }
    Some(best)
}

/// Choose the layout of a block of columns, and estimate the clock cycles of an image.
/// `None` if there is no good one.
fn choose_layout<S: Simd, C: Cell>(
    geometry: &ConvGeometry,
    pq: PqGeometry,
    block: &Range<usize>,
) -> Option<(Layout, f64)> {
    let phases = Phase::all(geometry);
    let columns = phases.iter().map(|phase| phase.columns.len()).max()?;
    if columns > MAX_COLUMNS {
        return None;
    }
    let lanes = lanes::<S, C>();
    let mut best: Option<(Cut, usize, usize, f64)> = None;
    let orders = TOGETHER.map(|together| batches(&phases, pq.n_subspaces, together, C::MAX_TERMS));
    for cut in Cut::all(geometry, &phases, block, lanes) {
        for strip in [1, 2, 4] {
            if strip > cut.rows || !strip_fits::<S, C>(columns, strip) {
                continue;
            }
            for (i, batches) in orders.iter().enumerate() {
                if let Some(cycles) = cost::<S, C>(geometry, pq, &phases, cut, strip, batches)
                    && best.is_none_or(|(.., least)| cycles < least)
                {
                    best = Some((cut, strip, i, cycles));
                }
            }
        }
    }
    let (cut, strip, order, cycles) = best?;
    let layout = Layout {
        geometry: geometry.clone(),
        pq,
        cut,
        strip,
        outputs: outputs_together::<S, C>(columns),
        batches: orders[order].clone(),
        lanes,
        row_len: row_len::<C>(&phases, cut, lanes),
        table_rows: pq.n_centroids.next_multiple_of(C::panel_rows::<S>()),
        phases,
    };
    Some((layout, cycles))
}

/// See [`Layout::row_len`].
fn row_len<C: Cell>(phases: &[Phase], cut: Cut, lanes: usize) -> usize {
    let line = LINE_BYTES / size_of::<C::Element>();
    ((most_plane_vectors(phases, cut) * lanes).div_ceil(line) | 1) * line
}

/// The clock cycles of an image, for strips of some vectors. `None` if that cannot
/// be done or would not be fast.
fn cost<S: Simd, C: Cell>(
    geometry: &ConvGeometry,
    pq: PqGeometry,
    phases: &[Phase],
    cut: Cut,
    strip: usize,
    batches: &[Batch],
) -> Option<f64> {
    let lanes = lanes::<S, C>();
    let table_rows = pq.n_centroids.next_multiple_of(C::panel_rows::<S>());
    let table_bytes = table_rows * row_len::<C>(phases, cut, lanes) * size_of::<C::Element>();
    if u16::try_from(table_bytes / OFFSET_BYTES).is_err() || batches.len() > C::MAX_BATCHES {
        return None;
    }
    let passes = || batches.iter().flat_map(|batch| &batch.passes);
    let together = passes().map(|pass| pass.sources.len()).max()?;
    let columns = phases.iter().map(|phase| phase.columns.len()).max()?;
    let outputs = geometry
        .group_out_channels()
        .next_multiple_of(outputs_together::<S, C>(columns));
    let accumulators = cut.rows * lanes * size_of::<f32>() * outputs;
    let in_l2 = together * table_bytes + accumulators <= L2_BYTES;

    // Adding a vector from L1, loading where it is, what L2 adds; storing one of a table;
    // writing one of responses.
    let [add, offset, outside_l1, store, write] = if has_wide_units::<S>() {
        [0.5, 0.25, 1.0, 3.0, 10.0]
    } else {
        [1.1, 0.25, 0.64, 0.0, 16.0]
    };
    let [read, end] = C::read_and_end_cycles::<S>();
    let vector = vector_cycles::<S>() * C::VECTORS as f64;
    let dim = pq.subvector_dim.min(geometry.group_in_channels());
    let mut cycles = 0.0;
    for pass in passes() {
        let phase = &phases[pass.phase];
        let sources = pass.sources.len() as f64;
        let plane_vectors = (cut.rows + phase.rows.last().copied().unwrap_or(0)) as f64;
        // Reading the input; multiplying.
        let reads = cut.parts.max(C::HALVES) as f64 * read * dim as f64;
        let entries = multiply_cycles::<S>() * C::table_cycles::<S>(dim) + store;
        let table = (table_rows * C::VECTORS) as f64 * entries;
        cycles += sources * plane_vectors * (reads + table);
        let columns = phase.columns.len() as f64;
        let n_terms = sources * pass.rows.len() as f64 * columns;
        // Where it is is loaded once per strip.
        let halo = phase.rows.last().copied().unwrap_or(0);
        let window = together
            * pq.n_centroids
            * ((halo + strip) * lanes * size_of::<C::Element>()).next_multiple_of(LINE_BYTES);
        let outside = 1.0 - (L1_BYTES as f64 / window as f64).min(1.0);
        let load = add + offset / strip as f64 + outside_l1 * outside;
        let look_up = (vector * load).max(0.7 / strip as f64);
        // Merging columns, loading and storing partial sums or accumulators.
        let partial = if pass.start { 0.0 } else { 0.7 };
        let end = match (pass.end, in_l2) {
            (false, _) => 1.0,
            (true, true) => end,
            (true, false) => end + 8.0,
        };
        let merge = vector * (0.3 * columns + partial + end);
        cycles += (outputs * cut.rows) as f64 * (n_terms * look_up + merge);
    }
    // Splitting the input, once; writing the output.
    if geometry.stride != [1, 1] {
        let pixels = geometry.group_in_channels() * geometry.in_pixels();
        cycles += 1.5 * pixels as f64 / cut.tiles as f64;
    }
    cycles += (outputs * cut.rows * cut.parts.max(C::HALVES)) as f64 * write;
    Some((geometry.groups * cut.tiles) as f64 * cycles)
}

/// Clock cycles of an image that the maps take for which L2 has no room: tiles do not read
/// and write them in the order of memory. Measured where vectors are fast enough to show it.
fn map_cycles<S: Simd>(geometry: &ConvGeometry) -> f64 {
    let input = geometry.in_channels * geometry.in_pixels();
    let output = geometry.out_channels * geometry.out_pixels();
    let beyond = (input + output).saturating_sub(MAP_BYTES / size_of::<f32>());
    if has_wide_units::<S>() {
        0.8 * beyond as f64
    } else {
        0.0
    }
}

impl<S: Simd, C: Cell> RowsConv<S, C> {
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
        let (layouts, cycles) = choose_layouts::<S, C>(layer.geometry, pq)?;
        let cycles = cycles + map_cycles::<S>(layer.geometry);
        Some(Candidate::new(cycles, move || {
            let block =
                |layout: &Layout| Block::new(simd, layer.bias, layout.clone(), codebooks, codes);
            Self {
                name: format!("{}-{}-rows", S::NAME, C::NAME),
                blocks: layouts.iter().map(block).collect(),
            }
        }))
    }
}

impl<S: Simd, C: Cell> Kernel for RowsConv<S, C> {
    fn name(&self) -> &str {
        &self.name
    }

    fn scratch_len(&self, _: usize) -> usize {
        let lens = self.blocks.iter().map(Block::scratch_len);
        lens.max().unwrap_or(0)
    }

    fn run(&self, n: usize, input: &[f32], output: &mut [f32], scratch: &mut [f32]) {
        for block in &self.blocks {
            block.images(n, input, output, scratch, f32::NEG_INFINITY);
        }
    }

    fn run_relu(&self, n: usize, input: &[f32], output: &mut [f32], scratch: &mut [f32]) -> bool {
        for block in &self.blocks {
            block.images(n, input, output, scratch, 0.0);
        }
        true
    }
}

impl<S: Simd, C: Cell> Block<S, C> {
    fn new(
        simd: S,
        bias: Option<&[f32]>,
        layout: Layout,
        codebooks: &[f32],
        codes: &[u16],
    ) -> Self {
        let groups = layout.geometry.groups;
        let mut padded_bias = vec![0.0; groups * layout.padded_outputs()];
        if let Some(bias) = bias {
            let padded = padded_bias.chunks_exact_mut(layout.padded_outputs());
            for (padded, bias) in padded.zip(bias.chunks_exact(bias.len() / groups)) {
                padded[..bias.len()].copy_from_slice(bias);
            }
        }
        let bytes = size_of::<C::Element>();
        let mut offsets = Vec::new();
        for group in 0..groups {
            for pass in layout.passes() {
                offsets.extend(layout.offsets(group, pass, bytes, codes));
            }
        }
        Self {
            simd,
            cells: C::new::<S>(&layout, codebooks, codes),
            offsets,
            layout,
            bias: padded_bias,
        }
    }

    /// float32 elements of each part of the scratch: phases, scales, what the cells
    /// need, tables, partial sums, accumulators.
    fn scratch_parts(&self) -> [usize; 6] {
        let layout = &self.layout;
        let elements = size_of::<f32>() / size_of::<C::Element>();
        let sums = layout.cut.rows * layout.padded_outputs() * layout.lanes;
        let phases = if layout.has_phases() {
            layout.phases_len()
        } else {
            0
        };
        [
            phases,
            size_of::<Scale>() / size_of::<f32>() * layout.batches.len(),
            C::scratch_len(layout),
            layout.most_sources() * layout.table_len() / elements,
            sums / elements,
            sums,
        ]
        .map(|len| len.next_multiple_of(LINE))
    }

    fn scratch_len(&self) -> usize {
        self.scratch_parts().iter().sum()
    }

    /// Responses of `n` images, not less than `floor`.
    fn images(&self, n: usize, input: &[f32], output: &mut [f32], scratch: &mut [f32], floor: f32) {
        let layout = &self.layout;
        let g = &layout.geometry;
        let group_in = g.group_in_channels() * g.in_pixels();
        let group_out = g.group_out_channels() * g.out_pixels();
        let inputs = input.chunks_exact(group_in).take(n * g.groups);
        let outputs = output.chunks_exact_mut(group_out);
        let [phases_len, ..] = self.scratch_parts();
        let (phases, scratch) = scratch.split_at_mut(phases_len);
        for (i, (input, output)) in inputs.zip(outputs).enumerate() {
            let phases: &[f32] = if layout.has_phases() {
                self.simd.call(Split {
                    layout,
                    input,
                    phases,
                });
                phases
            } else {
                input
            };
            let peak = self
                .simd
                .call(Peak::<C>(&phases[..layout.phases_len()], PhantomData));
            for tile in 0..layout.cut.tiles {
                let inputs = Inputs {
                    layout,
                    tile,
                    phases,
                    peak,
                };
                self.tile(i % g.groups, &inputs, output, scratch, floor);
            }
        }
    }
}

/// Split the channels of a group into phases.
struct Split<'a> {
    layout: &'a Layout,
    input: &'a [f32],
    phases: &'a mut [f32],
}

impl Task for Split<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let g = &self.layout.geometry;
        let mut rest = self.phases;
        for phase in &self.layout.phases {
            if phase.pixels() == 0 {
                continue;
            }
            for channel in self.input.chunks_exact(g.in_pixels()) {
                let (target, others) = rest.split_at_mut(phase.pixels());
                rest = others;
                for (i, row) in target.chunks_exact_mut(phase.size[1]).enumerate() {
                    let y = phase.first[0] + i * g.stride[0];
                    let source = &channel[y * g.in_size[1]..(y + 1) * g.in_size[1]];
                    every(simd, g.stride[1], &source[phase.first[1]..], row);
                }
            }
        }
    }
}

impl<S: Simd, C: Cell> Block<S, C> {
    /// One tile of one group of one image.
    fn tile(
        &self,
        group: usize,
        inputs: &Inputs<'_>,
        output: &mut [f32],
        scratch: &mut [f32],
        floor: f32,
    ) {
        let [_, scales_len, cells_len, tables_len, partial_len, sums_len] = self.scratch_parts();
        let (scales, rest) = scratch.split_at_mut(scales_len);
        let scales: &mut [Scale] = bytemuck::cast_slice_mut(scales);
        let (cells, rest) = rest.split_at_mut(cells_len);
        let (tables, rest) = rest.split_at_mut(tables_len);
        let (partial, rest) = rest.split_at_mut(partial_len);
        let accumulators = &mut rest[..sums_len];
        let tables: &mut [C::Element] = bytemuck::cast_slice_mut(tables);
        let partial: &mut [C::Element] = bytemuck::cast_slice_mut(partial);

        let layout = &self.layout;
        let lanes = layout.lanes;
        let padded_outputs = layout.padded_outputs();
        let unit = self.simd.call(Inspect {
            block: self,
            group,
            inputs,
            scales,
            scratch: cells,
        });
        let mut offsets = &self.offsets[self.offsets.len() / layout.geometry.groups * group..];
        for (b, batch) in layout.batches.iter().enumerate() {
            let scale = scales[b];
            for pass in &batch.passes {
                let built = tables.chunks_exact_mut(layout.table_len());
                for (source, table) in pass.sources.clone().zip(built) {
                    let codebook = layout.codebook(group, layout.source(source).1);
                    self.simd.call(Build {
                        block: self,
                        inputs,
                        source: (codebook, source),
                        scale,
                        table,
                        scratch: cells,
                    });
                }
                let n_offsets = padded_outputs * layout.pass_terms(pass);
                let (pass_offsets, others) = offsets.split_at(n_offsets);
                offsets = others;
                for first in (0..layout.cut.rows).step_by(layout.strip) {
                    let strip = layout.strip.min(layout.cut.rows - first);
                    let begin = first * lanes * padded_outputs;
                    let sums = begin..begin + strip * lanes * padded_outputs;
                    self.look_up(
                        strip,
                        LookUp {
                            tables: &tables[first * lanes..],
                            table_len: layout.table_len(),
                            n_tables: pass.sources.len(),
                            offsets: pass_offsets,
                            steps: pass.rows.len(),
                            columns: &layout.phases[pass.phase].columns,
                            start: pass.start,
                            end: pass.end.then_some((scale, b == 0)),
                            partial: &mut partial[sums.clone()],
                            accumulators: &mut accumulators[sums],
                        },
                    );
                }
            }
        }
        self.simd.call(Write {
            block: self,
            group,
            tile: inputs.tile,
            unit,
            floor,
            accumulators,
            output,
        });
    }

    fn look_up(&self, strip: usize, work: LookUp<'_, C>) {
        macro_rules! strips {
            ($(($n:literal, $o:literal, $v:literal)),* $(,)?) => {
                match (work.columns.len(), self.layout.outputs, strip) {
                    $(($n, $o, $v) => self.simd.call(Strip::<C, $n, $o, $v>(work)),)*
                    other => unreachable!("no layout has (columns, outputs, strip) {other:?}"),
                }
            };
        }
        // Phases may have fewer columns than the one that the outputs follow from.
        strips!(
            (1, 4, 1),
            (2, 4, 1),
            (3, 4, 1),
            (4, 4, 1),
            (5, 4, 1),
            (6, 4, 1),
            (1, 2, 1),
            (2, 2, 1),
            (3, 2, 1),
            (4, 2, 1),
            (5, 2, 1),
            (6, 2, 1),
            (7, 2, 1),
            (1, 1, 1),
            (2, 1, 1),
            (3, 1, 1),
            (4, 1, 1),
            (5, 1, 1),
            (6, 1, 1),
            (7, 1, 1),
            (1, 4, 2),
            (2, 4, 2),
            (3, 4, 2),
            (1, 4, 3),
            (1, 4, 4),
        );
    }
}

/// [`Cell::peak`].
struct Peak<'a, C>(&'a [f32], PhantomData<C>);

impl<C: Cell> Task for Peak<'_, C> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        C::peak(simd, self.0)
    }
}

/// [`Cell::inspect`].
struct Inspect<'a, S, C> {
    block: &'a Block<S, C>,
    group: usize,
    inputs: &'a Inputs<'a>,
    scales: &'a mut [Scale],
    scratch: &'a mut [f32],
}

impl<K, C: Cell> Task for Inspect<'_, K, C> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        let cells = &self.block.cells;
        cells.inspect(simd, self.inputs, self.group, self.scales, self.scratch)
    }
}

/// [`Cell::build`].
struct Build<'a, S, C: Cell> {
    block: &'a Block<S, C>,
    inputs: &'a Inputs<'a>,
    source: (usize, usize),
    scale: Scale,
    table: &'a mut [C::Element],
    scratch: &'a mut [f32],
}

impl<K, C: Cell> Task for Build<'_, K, C> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let cells = &self.block.cells;
        cells.build(
            simd,
            self.inputs,
            self.source,
            self.scale,
            self.table,
            self.scratch,
        );
    }
}

/// Add the table rows of a pass to the sums of a strip.
struct LookUp<'a, C: Cell> {
    /// The pass's tables, from the strip's first vector on.
    tables: &'a [C::Element],
    table_len: usize,
    n_tables: usize,
    /// See [`Layout::offsets`].
    offsets: &'a [u16],
    /// Rows of taps of the pass.
    steps: usize,
    /// Of the pass's phase.
    columns: &'a [usize],
    /// Whether the partial sums start here; else they go on.
    start: bool,
    /// Whether they go to the accumulators, with which scale, and whether those
    /// start here. If not, they are stored.
    end: Option<(Scale, bool)>,
    /// `(outputs, vectors of the strip)`
    partial: &'a mut [C::Element],
    /// `(outputs, vectors of the strip)`
    accumulators: &'a mut [f32],
}

/// [`LookUp`] for `N` columns, `O` outputs at a time and `V` vectors.
struct Strip<'a, C: Cell, const N: usize, const O: usize, const V: usize>(LookUp<'a, C>);

impl<C: Cell, const N: usize, const O: usize, const V: usize> Task for Strip<'_, C, N, O, V> {
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
            accumulators,
        } = self.0;
        let lanes = lanes::<S, C>();
        let n_offsets = n_tables * steps * N * O;
        let blocks = partial.len() / (O * V * lanes);
        let columns: [usize; N] = columns.try_into().expect("as the caller chose N");
        assert_eq!(accumulators.len(), partial.len());
        assert!(offsets.len() >= blocks * n_offsets);
        for block in 0..blocks {
            let partial = &mut partial[block * O * V * lanes..][..O * V * lanes];
            let accumulators = &mut accumulators[block * O * V * lanes..][..O * V * lanes];
            let mut registers = [[[C::zero(simd); V]; O]; N];
            // SAFETY: there are `n_offsets` offsets for each block, as asserted.
            // `tables` starts at the strip's first vector of the first row of the
            // first of `n_tables` tables, `table_len` apart. An offset leads from
            // there to what a tap reads in row code < n_centroids (made and checked
            // in `Layout::offsets`): for V vectors of the strip no further than the
            // last vector of a plane, which a row of the table holds. `partial` and
            // `accumulators` have O * V vectors.
            unsafe {
                let mut offset = offsets.as_ptr().add(block * n_offsets);
                for table in 0..n_tables {
                    let table = tables.as_ptr().add(table * table_len);
                    for _ in 0..steps {
                        for n in 0..N {
                            let rows = Offsets::read::<O>(offset);
                            offset = offset.add(O);
                            for o in 0..O {
                                let source = table.byte_add(rows.bytes(o));
                                for v in 0..V {
                                    let row = C::load(simd, source.add(v * lanes));
                                    registers[n][o][v] = C::add(simd, registers[n][o][v], row);
                                }
                            }
                        }
                    }
                }
                for o in 0..O {
                    for v in 0..V {
                        let mut sum = registers[0][o][v];
                        for n in 1..N {
                            let shifted = C::shift(simd, registers[n][o][v], columns[n]);
                            sum = C::add(simd, sum, shifted);
                        }
                        let at = (o * V + v) * lanes;
                        let partial = partial.as_mut_ptr().add(at);
                        if !start {
                            sum = C::add(simd, sum, C::load(simd, partial));
                        }
                        if let Some((scale, begin)) = end {
                            let accumulator = accumulators.as_mut_ptr().add(at);
                            C::accumulate(simd, accumulator, sum, scale, begin);
                        } else {
                            C::store(simd, partial, sum);
                        }
                    }
                }
            }
        }
    }
}

/// Up to four offsets, read with one load: loads are what limits look-ups.
#[derive(Clone, Copy)]
struct Offsets(u64);

/// A word that may lie anywhere.
#[repr(C, packed)]
struct Unaligned<T>(T);

impl Offsets {
    /// # Safety
    ///
    /// `source` is valid for reads of O offsets; O is 4, 2 or 1.
    #[inline(always)]
    unsafe fn read<const O: usize>(source: *const u16) -> Self {
        // SAFETY: the caller vouches for O offsets. Volatile, or the compiler loads
        // several words into a vector, only to take them apart.
        Self(unsafe {
            match O {
                4 => source.cast::<Unaligned<u64>>().read_volatile().0,
                2 => u64::from(source.cast::<Unaligned<u32>>().read_volatile().0),
                _ => u64::from(source.read_volatile()),
            }
        })
    }

    /// Bytes from the first table row that offset `i` stands for.
    #[inline(always)]
    fn bytes(self, i: usize) -> usize {
        // In memory the first comes first: the word is little-endian.
        usize::from((u64::from_le(self.0) >> (16 * i)) as u16) * OFFSET_BYTES
    }
}

/// Write the responses of a tile, without the lanes of the halo.
struct Write<'a, S, C> {
    block: &'a Block<S, C>,
    group: usize,
    tile: usize,
    /// What 1 in the accumulators stands for.
    unit: f32,
    /// Least response.
    floor: f32,
    /// For each strip `(outputs, vectors of the strip)`
    accumulators: &'a [f32],
    output: &'a mut [f32],
}

impl<K, C: Cell> Task for Write<'_, K, C> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let layout = &self.block.layout;
        let cut = layout.cut;
        let g = &layout.geometry;
        let padded_outputs = layout.padded_outputs();
        let bias = &self.block.bias[self.group * padded_outputs..][..padded_outputs];
        let unit = simd.splat(self.unit);
        let floor = simd.splat(self.floor);
        let lanes = lanes::<S, C>();
        assert!(self.accumulators.len() >= cut.rows * padded_outputs * lanes);
        let size = [C::HALVES, S::LANES];
        let runs = Runs::new(cut, size, self.tile, g.out_size, [0, 0], cut.width);
        // Some outputs at a time, so that neither accumulators nor responses come from
        // too many pages.
        let blocks = self.output.chunks_mut(WRITTEN_TOGETHER * g.out_pixels());
        for (block, channels) in blocks.enumerate() {
            for y in 0..cut.rows {
                let row = runs.row(y);
                let first = y / layout.strip * layout.strip;
                let strip = layout.strip.min(cut.rows - first);
                for (i, channel) in channels.chunks_exact_mut(g.out_pixels()).enumerate() {
                    let o = block * WRITTEN_TOGETHER + i;
                    let at = (first * padded_outputs + o * strip + y - first) * lanes;
                    // SAFETY: there is a vector of accumulators for each output and row.
                    let sums = unsafe { C::accumulated(simd, self.accumulators.as_ptr().add(at)) };
                    let bias = simd.splat(bias[o]);
                    for half in 0..C::HALVES {
                        let response = simd.max(simd.mul_add(sums[half], unit, bias), floor);
                        for pixels in row.of(half) {
                            // SAFETY: a row has lanes of a vector that lie within a map
                            // of as many pixels as the channel has.
                            unsafe {
                                let target = channel.as_mut_ptr().wrapping_offset(pixels.offset);
                                simd.store_range(target, response, pixels.begin, pixels.end);
                            }
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::CodebookBits;
    use crate::isa::{Isa, Portable};
    use crate::kernels::tests::UNEVEN;

    /// A layer of numbers of all sizes, some of them negative, and an input.
    struct Case {
        geometry: ConvGeometry,
        pq: PqGeometry,
        codebooks: Vec<f32>,
        codes: Vec<u16>,
        input: Vec<f32>,
    }

    impl Case {
        fn new(geometry: ConvGeometry, n_centroids: usize, subvector_dim: usize) -> Self {
            let pq = PqGeometry {
                n_subspaces: geometry.group_in_channels().div_ceil(subvector_dim),
                n_centroids,
                subvector_dim,
                codebook_groups: 1,
                codebook_bits: CodebookBits::Float32,
            };
            let number = |i: usize| ((i * 7919 % 2003) as f32 / 1001.0 - 0.7).powi(3);
            let codebooks = (0..pq.n_subspaces * n_centroids * subvector_dim)
                .map(|i| number(i) * [1.0, 0.1, 0.003][i / subvector_dim % 3]);
            let n_codes = geometry.out_channels * geometry.taps() * pq.n_subspaces;
            let codes = (0..n_codes).map(|i| (i * 31 % n_centroids) as u16);
            let input = (0..geometry.in_channels * geometry.in_pixels()).map(|i| number(i * 3));
            Self {
                pq,
                codebooks: codebooks.collect(),
                codes: codes.collect(),
                input: input.collect(),
                geometry,
            }
        }

        fn all() -> impl Iterator<Item = Self> {
            [
                ([12, 13, 14], 10, [3, 3], [1, 1], 1),
                ([6, 27, 27], 6, [5, 5], [1, 1], 2),
                ([5, 9, 40], 7, [7, 7], [2, 1], 1),
                ([130, 3, 5], 3, [1, 2], [1, 1], 1),
            ]
            .into_iter()
            .flat_map(|(input, outputs, kernel, stride, groups)| {
                [(1, 1), (9, 3), (16, 4), (128, 8), (5, 130)].map(|(n_centroids, dim)| {
                    let geometry = ConvGeometry::new(
                        "x",
                        input,
                        outputs,
                        kernel,
                        stride,
                        [1, 1],
                        [1; 4],
                        groups,
                    );
                    Self::new(geometry.unwrap(), n_centroids, dim)
                })
            })
        }

        /// The layout on a level, in whole panels of any.
        fn layout<S: Simd, C: Cell>(&self) -> Layout {
            let columns = 0..self.geometry.out_size[1];
            let (mut layout, _) = choose_layout::<S, C>(&self.geometry, self.pq, &columns).unwrap();
            layout.table_rows = self.pq.n_centroids.next_multiple_of(8);
            layout
        }
    }

    /// The responses of a kernel with a given layout, on levels that have its vectors.
    struct Run<'a, C> {
        case: &'a Case,
        layout: &'a Layout,
        cells: PhantomData<C>,
    }

    impl<'a, C> Run<'a, C> {
        fn new(case: &'a Case, layout: &'a Layout) -> Self {
            Self {
                case,
                layout,
                cells: PhantomData,
            }
        }
    }

    impl<C: Cell> Task for Run<'_, C> {
        type Output = Option<Vec<f32>>;

        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> Option<Vec<f32>> {
            if lanes::<S, C>() != self.layout.lanes {
                return None;
            }
            let case = self.case;
            let g = &case.geometry;
            let layout = self.layout.clone();
            let block = Block::<S, C>::new(simd, None, layout, &case.codebooks, &case.codes);
            let mut output = vec![f32::NAN; g.out_channels * g.out_pixels()];
            let mut scratch = vec![f32::NAN; block.scratch_len()];
            block.images(1, &case.input, &mut output, &mut scratch, f32::NEG_INFINITY);
            Some(output)
        }
    }

    fn check_bytes<const N: usize>(case: &Case) {
        type Bytes = Short<ByteCodebook>;
        let layout = case.layout::<Portable<N>, Bytes>();
        let expected = Run::<Bytes>::new(case, &layout).run(Portable::<N>::new().unwrap());
        let expected = expected.unwrap();
        assert!(expected.iter().all(|y| y.is_finite()));
        for isa in Isa::available() {
            let run = Run::<Bytes>::new(case, &layout);
            if let Some(output) = isa.level().unwrap().call(run) {
                assert_eq!(output, expected, "{isa} {:?} {:?}", case.geometry, case.pq);
            }
        }
    }

    #[test]
    fn products_of_bytes_have_the_same_bits_on_all_levels() {
        for case in Case::all() {
            check_bytes::<8>(&case);
            check_bytes::<16>(&case);
        }
    }

    /// In software, which any CPU can, they agree with the reference; the CPU's instructions
    /// give the same bits.
    #[cfg(target_arch = "x86_64")]
    #[test]
    fn sums_of_16_bit_floats() {
        use crate::isa::Avx512;
        use crate::kernels::scalar;

        for case in Case::all() {
            let g = &case.geometry;
            let layout = case.layout::<Portable<16>, Half>();
            let output = Run::<Half>::new(&case, &layout).run(Portable::<16>::new().unwrap());
            let output = output.unwrap();
            let layer = ConvLayer {
                geometry: g,
                weights: Weights::ProductQuantized {
                    geometry: case.pq,
                    codebooks: &case.codebooks,
                    codes: &case.codes,
                },
                bias: None,
            };
            let mut expected = vec![0.0; output.len()];
            scalar::conv(&layer, 1, &case.input, &mut expected);
            let norm = |values: &mut dyn Iterator<Item = f32>| -> f32 {
                values.map(|x| x * x).sum::<f32>().sqrt()
            };
            let error = norm(
                &mut output
                    .iter()
                    .zip(&expected)
                    .map(|(y, expected)| y - expected),
            );
            let relative = error / norm(&mut expected.iter().copied());
            assert!(relative < 1.5e-3, "{relative} {g:?} {:?}", case.pq);
            if let Some(simd) = Avx512::<true, true, true>::new() {
                let same = simd.call(Run::<Half>::new(&case, &layout));
                assert_eq!(same, Some(output), "{g:?} {:?}", case.pq);
            }
        }
    }

    /// So that a test of all kernels sees such layouts.
    #[test]
    fn uneven_maps_are_cut_into_two_blocks() {
        let pq = PqGeometry {
            n_subspaces: 1,
            n_centroids: 16,
            subvector_dim: 4,
            codebook_groups: 1,
            codebook_bits: CodebookBits::Float32,
        };
        for (input, kernel, stride) in UNEVEN {
            let geometry =
                ConvGeometry::new("x", input, 96, kernel, stride, [1, 1], [1; 4], 1).unwrap();
            let chosen = choose_layouts::<Portable<16>, Short<WordCodebook>>(&geometry, pq);
            let (layouts, _) = chosen.unwrap();
            assert_eq!(layouts.len(), 2, "{geometry:?}");
        }
    }
}
