//! How a layer is laid out: phases of the input, tiles of the map, the order in
//! which terms are summed.

use std::ops::Range;

use crate::geometry::ConvGeometry;
use crate::graph::PqGeometry;

/// Distinct columns that the taps of a phase may have, each with sums of its own.
pub(in crate::kernels) const MAX_COLUMNS: usize = 7;

/// Table rows are addressed in these units, which x86 multiplies with within the
/// address of a load.
pub(in crate::kernels) const OFFSET_BYTES: usize = 8;

/// Bytes of a cache line.
pub(in crate::kernels) const LINE_BYTES: usize = 64;

/// Parts that a float32 vector may be made of.
const MAX_PIECES: usize = 4;

/// Least lanes of a part.
const MIN_PART_LANES: usize = 4;

/// Every `stride`-th pixel of the padded input, from one of its first `stride`
/// rows and columns on, and the taps that read it. With stride 1 there is one
/// phase, the input.
#[derive(Clone, Debug)]
pub(in crate::kernels) struct Phase {
    /// First pixel in the input.
    pub first: [usize; 2],
    /// Extent, padding not counted.
    pub size: [usize; 2],
    /// Rows of padding above it, columns to the left.
    pub padding: [usize; 2],
    /// Where the phase of the first channel lies among all phases of a group.
    begin: usize,
    /// Distances in rows between what the first tap reads and what others read; the
    /// first is 0.
    pub rows: Vec<usize>,
    /// The same in columns.
    pub columns: Vec<usize>,
    /// Number of the tap for each of these rows and columns.
    taps: Vec<usize>,
}

/// What the phases have in common along one axis.
struct Axis {
    first: usize,
    size: usize,
    padding: usize,
    /// Number and distance of each tap.
    taps: Vec<(usize, usize)>,
}

impl Axis {
    /// Along one axis, a phase for each remainder of a tap's position by the
    /// stride. It starts with what the first of its taps reads.
    fn all(geometry: &ConvGeometry, axis: usize) -> Vec<Self> {
        let stride = geometry.stride[axis];
        let padding = [geometry.padding.top, geometry.padding.left][axis];
        let mut phases: Vec<(usize, Vec<(usize, usize)>)> = Vec::new();
        for tap in 0..geometry.kernel[axis] {
            let position = tap * geometry.dilation[axis];
            let same = |start: usize| position % stride == start % stride;
            match phases.iter_mut().find(|(start, _)| same(*start)) {
                Some((start, taps)) => taps.push((tap, (position - *start) / stride)),
                None => phases.push((position, vec![(tap, 0)])),
            }
        }
        phases
            .into_iter()
            .map(|(start, taps)| {
                let outside = padding.saturating_sub(start).div_ceil(stride);
                let first = outside * stride + start - padding;
                Self {
                    first,
                    size: geometry.in_size[axis]
                        .saturating_sub(first)
                        .div_ceil(stride),
                    padding: outside,
                    taps,
                }
            })
            .collect()
    }
}

impl Phase {
    pub fn all(geometry: &ConvGeometry) -> Vec<Self> {
        let (vertical, horizontal) = (Axis::all(geometry, 0), Axis::all(geometry, 1));
        let mut phases = Vec::with_capacity(vertical.len() * horizontal.len());
        for y in &vertical {
            for x in &horizontal {
                let taps = y.taps.iter().flat_map(|(row, _)| {
                    let of_row = x.taps.iter();
                    of_row.map(move |(column, _)| row * geometry.kernel[1] + column)
                });
                phases.push(Self {
                    first: [y.first, x.first],
                    size: [y.size, x.size],
                    padding: [y.padding, x.padding],
                    begin: 0,
                    rows: y.taps.iter().map(|(_, distance)| *distance).collect(),
                    columns: x.taps.iter().map(|(_, distance)| *distance).collect(),
                    taps: taps.collect(),
                });
            }
        }
        // Sources with taps alike can be looked up together.
        phases.sort_by(|a, b| (&b.rows, &b.columns).cmp(&(&a.rows, &a.columns)));
        let mut begin = 0;
        for phase in &mut phases {
            phase.begin = begin;
            begin += geometry.group_in_channels() * phase.pixels();
        }
        phases
    }

    pub fn pixels(&self) -> usize {
        self.size[0] * self.size[1]
    }

    /// Whether the taps lie alike.
    fn is_like(&self, other: &Self) -> bool {
        (&self.rows, &self.columns) == (&other.rows, &other.columns)
    }

    /// Furthest row that a tap reads.
    fn reach(&self) -> usize {
        self.rows.last().copied().unwrap_or(0)
    }

    /// Number of the tap in row `row` and column `column` of the phase's taps.
    pub fn tap(&self, row: usize, column: usize) -> usize {
        self.taps[row * self.columns.len() + column]
    }

    /// Taps in some of the rows.
    pub fn taps_of(&self, rows: &Range<usize>) -> &[usize] {
        let columns = self.columns.len();
        &self.taps[rows.start * columns..rows.end * columns]
    }

    /// Some channels' phases, among all phases of a group.
    pub fn channels<'a>(&self, phases: &'a [f32], channels: Range<usize>) -> &'a [f32] {
        let pixels = self.pixels();
        &phases[self.begin + channels.start * pixels..][..channels.len() * pixels]
    }
}

/// How a map, or some columns of it, is cut into tiles of whole vectors.
#[derive(Clone, Copy, Debug)]
pub(in crate::kernels) struct Cut {
    /// First column of the map.
    first_column: usize,
    /// Parts of a vector, each with a block of the map of its own.
    pub parts: usize,
    /// Lanes of a part.
    pub part_lanes: usize,
    /// Outputs of a row that a part holds; the other lanes are its halo.
    pub width: usize,
    /// Rows that a part of a tile holds: output vectors of a tile.
    pub rows: usize,
    /// Parts side by side that cover a row.
    parts_across: usize,
    /// How many there are.
    pub tiles: usize,
}

impl Cut {
    /// Cut into parts of `part_lanes` of `lanes` lanes and about `rows` rows, if
    /// they hold any output.
    fn new(
        geometry: &ConvGeometry,
        phases: &[Phase],
        columns: &Range<usize>,
        [lanes, part_lanes]: [usize; 2],
        rows: usize,
    ) -> Option<Self> {
        let width = part_width(phases, part_lanes)?;
        let parts = lanes / part_lanes;
        let parts_across = columns.len().div_ceil(width);
        let parts_down = geometry.out_size[0].div_ceil(rows);
        Some(Self {
            first_column: columns.start,
            parts,
            part_lanes,
            width,
            rows: geometry.out_size[0].div_ceil(parts_down),
            parts_across,
            tiles: (parts_across * parts_down).div_ceil(parts),
        })
    }

    /// All reasonable ways to cut some columns of a map.
    pub fn all(
        geometry: &ConvGeometry,
        phases: &[Phase],
        columns: &Range<usize>,
        lanes: usize,
    ) -> Vec<Self> {
        let mut heights: Vec<usize> = (1..=geometry.out_size[0])
            .map(|parts| geometry.out_size[0].div_ceil(parts))
            .collect();
        heights.dedup();
        let mut cuts = Vec::new();
        for part_lanes in all_part_lanes(lanes) {
            let cut = |&rows| Self::new(geometry, phases, columns, [lanes, part_lanes], rows);
            cuts.extend(heights.iter().filter_map(cut));
        }
        cuts
    }

    /// First output (row, column) of part `part` of tile `tile`; it may lie below
    /// the map.
    pub fn origin(&self, tile: usize, part: usize) -> [usize; 2] {
        let i = tile * self.parts + part;
        [
            i / self.parts_across * self.rows,
            self.first_column + i % self.parts_across * self.width,
        ]
    }
}

/// Lanes that the parts of a vector may have.
fn all_part_lanes(lanes: usize) -> impl Iterator<Item = usize> {
    std::iter::successors(Some(lanes), |lanes| Some(lanes / 2))
        .take_while(|lanes| *lanes >= MIN_PART_LANES)
}

/// Outputs that a part holds beside its halo, if any.
fn part_width(phases: &[Phase], part_lanes: usize) -> Option<usize> {
    let columns = phases.iter().flat_map(|phase| &phase.columns);
    let reach = columns.copied().max().unwrap_or(0);
    part_lanes.checked_sub(reach).filter(|width| *width > 0)
}

/// Columns of a map at which parts of some width end, where cutting what is left in
/// another way takes clearly fewer vectors.
pub(in crate::kernels) fn seams(phases: &[Phase], columns: usize, lanes: usize) -> Vec<usize> {
    let widths: Vec<(usize, usize)> = all_part_lanes(lanes)
        .filter_map(|part_lanes| Some((lanes / part_lanes, part_width(phases, part_lanes)?)))
        .collect();
    // Vectors that a row of the map takes.
    let vectors = |columns: usize| {
        let ways = widths.iter();
        ways.map(|(parts, width)| columns.div_ceil(*width) as f64 / *parts as f64)
            .fold(f64::INFINITY, f64::min)
    };
    let mut seams: Vec<usize> = widths
        .iter()
        .map(|(_, width)| columns / width * width)
        .filter(|seam| vectors(*seam) + vectors(columns - seam) < 0.95 * vectors(columns))
        .collect();
    seams.sort_unstable();
    seams.dedup();
    seams
}

/// Terms that are summed before they go to the accumulators: some of the taps of
/// some sources.
#[derive(Clone, Debug)]
pub(in crate::kernels) struct Batch {
    pub passes: Vec<Pass>,
}

/// A walk through all outputs of a strip, for sources of phases with taps alike.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::kernels) struct Pass {
    /// One of the phases.
    pub phase: usize,
    pub sources: Range<usize>,
    /// Which of the phases' rows of taps.
    pub rows: Range<usize>,
    /// Whether the batch starts with this pass.
    pub start: bool,
    /// Whether it ends with it.
    pub end: bool,
}

/// How the work is done. A *source* is a subspace of a phase, with a table of its
/// own; the sources of a phase follow each other.
#[derive(Clone, Debug)]
pub(in crate::kernels) struct Layout {
    pub geometry: ConvGeometry,
    pub pq: PqGeometry,
    pub phases: Vec<Phase>,
    pub cut: Cut,
    /// Output vectors of a strip.
    pub strip: usize,
    /// Outputs summed together.
    pub outputs: usize,
    pub batches: Vec<Batch>,
    /// Lanes of a vector.
    pub lanes: usize,
    /// Elements of a table row: whole cache lines, an odd number of them, so that
    /// the windows of different codewords fall into different sets of the cache.
    pub row_len: usize,
    /// Rows of a table: codewords, in whole panels.
    pub table_rows: usize,
}

impl Layout {
    /// Phase and subspace of a source.
    pub fn source(&self, source: usize) -> (&Phase, usize) {
        let m = self.pq.n_subspaces;
        (&self.phases[source / m], source % m)
    }

    /// Some sources, by phase.
    pub fn by_phase(&self, sources: Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
        let m = self.pq.n_subspaces;
        (sources.start / m..sources.end.div_ceil(m))
            .map(move |phase| sources.start.max(phase * m)..sources.end.min((phase + 1) * m))
    }

    /// Channels of a source within its group.
    pub fn channels(&self, source: usize) -> Range<usize> {
        let first = self.source(source).1 * self.pq.subvector_dim;
        first..(first + self.pq.subvector_dim).min(self.geometry.group_in_channels())
    }

    /// Whether the phases of an input are more than the input itself.
    pub fn has_phases(&self) -> bool {
        self.geometry.stride != [1, 1]
    }

    /// Elements of all phases of a group.
    pub fn phases_len(&self) -> usize {
        let pixels: usize = self.phases.iter().map(Phase::pixels).sum();
        self.geometry.group_in_channels() * pixels
    }

    /// Vectors of what a tile reads of a channel in some phase.
    pub fn plane_vectors(&self, phase: &Phase) -> usize {
        self.cut.rows + phase.reach()
    }

    /// The most that any phase has.
    pub fn most_plane_vectors(&self) -> usize {
        most_plane_vectors(&self.phases, self.cut)
    }

    pub fn table_len(&self) -> usize {
        self.table_rows * self.row_len
    }

    pub fn padded_outputs(&self) -> usize {
        self.geometry
            .group_out_channels()
            .next_multiple_of(self.outputs)
    }

    pub fn passes(&self) -> impl Iterator<Item = &Pass> {
        self.batches.iter().flat_map(|batch| &batch.passes)
    }

    /// Most sources of a pass.
    pub fn most_sources(&self) -> usize {
        let sources = self.passes().map(|pass| pass.sources.len());
        sources.max().unwrap_or(0)
    }

    /// Terms that a pass adds to each output, and offsets to them.
    pub fn pass_terms(&self, pass: &Pass) -> usize {
        pass.sources.len() * pass.rows.len() * self.phases[pass.phase].columns.len()
    }

    /// The code of output `o` of a group.
    pub fn code(&self, group: usize, o: usize, tap: usize, m: usize, codes: &[u16]) -> usize {
        let o = group * self.geometry.group_out_channels() + o;
        let code = usize::from(codes[(o * self.geometry.taps() + tap) * self.pq.n_subspaces + m]);
        assert!(code < self.pq.n_centroids);
        code
    }

    /// Number of the codebook of subspace `m` of a group.
    pub fn codebook(&self, group: usize, m: usize) -> usize {
        let set = if self.pq.codebook_groups > 1 {
            group
        } else {
            0
        };
        set * self.pq.n_subspaces + m
    }

    /// Where the table rows are that a pass adds up, for each block of outputs
    /// `(sources, rows of taps, columns, outputs)`, in units of [`OFFSET_BYTES`]
    /// from what the first output vector reads with the first tap.
    pub fn offsets(&self, group: usize, pass: &Pass, bytes: usize, codes: &[u16]) -> Vec<u16> {
        let columns = self.phases[pass.phase].columns.len();
        let outputs = self.geometry.group_out_channels();
        let mut offsets = Vec::with_capacity(self.pass_terms(pass) * self.padded_outputs());
        for first in (0..outputs).step_by(self.outputs) {
            for source in pass.sources.clone() {
                let (phase, m) = self.source(source);
                for row in pass.rows.clone() {
                    for column in 0..columns {
                        for o in first..first + self.outputs {
                            // Outputs that fill up the last block read anything.
                            let o = o.min(outputs - 1);
                            let code = self.code(group, o, phase.tap(row, column), m, codes);
                            let offset = code * self.row_len + phase.rows[row] * self.lanes;
                            let offset = u16::try_from(offset * bytes / OFFSET_BYTES);
                            offsets.push(offset.expect("the table is small enough"));
                        }
                    }
                }
            }
        }
        offsets
    }
}

/// Vectors of what a tile reads of a channel in the phase where that is most.
pub(in crate::kernels) fn most_plane_vectors(phases: &[Phase], cut: Cut) -> usize {
    let reach = phases.iter().map(Phase::reach).max().unwrap_or(0);
    cut.rows + reach
}

/// Order the terms such that `together` sources are looked up in a pass if they
/// may, and at most `max_terms` terms, if there is such a limit, come before the
/// end of a batch.
pub(in crate::kernels) fn batches(
    phases: &[Phase],
    n_subspaces: usize,
    together: usize,
    max_terms: Option<usize>,
) -> Vec<Batch> {
    let mut batches: Vec<Batch> = Vec::new();
    // Terms of the last batch.
    let mut n_terms = usize::MAX;
    for source in 0..phases.len() * n_subspaces {
        let phase = source / n_subspaces;
        let (n_rows, n_columns) = (phases[phase].rows.len(), phases[phase].columns.len());
        let terms = n_rows * n_columns;
        let pass = |rows: Range<usize>| Pass {
            phase,
            sources: source..source + 1,
            rows,
            start: true,
            end: true,
        };
        if let Some(max_terms) = max_terms
            && terms > max_terms
        {
            let part = n_rows.div_ceil(n_rows.div_ceil((max_terms / n_columns).max(1)));
            batches.extend((0..n_rows).step_by(part).map(|first| Batch {
                passes: vec![pass(first..(first + part).min(n_rows))],
            }));
            n_terms = usize::MAX;
            continue;
        }
        let last = batches.last_mut().and_then(|batch| batch.passes.last_mut());
        let fits = max_terms.is_none_or(|max| n_terms.saturating_add(terms) <= max);
        match last {
            Some(last)
                if fits
                    && phases[last.phase].is_like(&phases[phase])
                    && last.sources.len() < together =>
            {
                last.sources.end += 1;
                n_terms += terms;
            }
            Some(last) if fits && max_terms.is_some() => {
                last.end = false;
                let start = false;
                let next = Pass {
                    start,
                    ..pass(0..n_rows)
                };
                let batch = batches.last_mut().expect("it has a last pass");
                batch.passes.push(next);
                n_terms += terms;
            }
            _ => {
                batches.push(Batch {
                    passes: vec![pass(0..n_rows)],
                });
                n_terms = terms;
            }
        }
    }
    batches
}

/// Neighbouring pixels of a map in the lanes of a float32 vector.
#[derive(Clone, Copy, Debug, Default)]
struct Run {
    /// First of the lanes.
    begin: usize,
    /// Behind the last of them.
    end: usize,
    /// Row of the map where the part of the tile starts.
    row: isize,
    /// Column of the map that lane 0 would have.
    column: isize,
}

/// Where the lanes of the one or two float32 vectors that hold as many values as a
/// vector of a table lie in a map.
#[derive(Clone, Copy, Debug)]
pub(in crate::kernels) struct Runs {
    /// Extent of the map.
    size: [usize; 2],
    vectors: [[Run; MAX_PIECES]; 2],
    /// Runs of each vector.
    n: usize,
}

/// A run in one row: pixels `offset + i` in lanes i of `begin..end`.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::kernels) struct Pixels {
    pub begin: usize,
    pub end: usize,
    pub offset: isize,
}

impl Runs {
    /// For `halves` vectors of `lanes` lanes and a map of extent `size`, where tile
    /// `tile` starts at its origin less some padding, and of each part the first
    /// `width` lanes count.
    pub fn new(
        cut: Cut,
        [halves, lanes]: [usize; 2],
        tile: usize,
        size: [usize; 2],
        padding: [usize; 2],
        width: usize,
    ) -> Self {
        let n = (lanes / cut.part_lanes).max(1);
        let mut runs = [[Run::default(); MAX_PIECES]; 2];
        for (half, runs) in runs.iter_mut().enumerate().take(halves) {
            for (i, run) in runs.iter_mut().enumerate().take(n) {
                let lane = half * lanes + i * cut.part_lanes;
                let [y, x] = cut.origin(tile, lane / cut.part_lanes);
                // Column of the part, then of the map, that lane 0 would have.
                let first = (lane % cut.part_lanes) as isize - (i * cut.part_lanes) as isize;
                let column = x as isize - padding[1] as isize + first;
                let begin = (-column).max((i * cut.part_lanes) as isize);
                let end = (size[1] as isize - column)
                    .min(width as isize - first)
                    .min((i * cut.part_lanes + cut.part_lanes.min(lanes)) as isize);
                if begin < end {
                    *run = Run {
                        begin: begin.cast_unsigned(),
                        end: end.cast_unsigned(),
                        row: y as isize - padding[0] as isize,
                        column,
                    };
                }
            }
        }
        Self {
            size,
            vectors: runs,
            n,
        }
    }

    /// The pixels of each vector in row `y` of the tile.
    #[inline(always)]
    pub fn row(&self, y: usize) -> Row {
        let mut row = Row {
            pixels: [[Pixels::default(); MAX_PIECES]; 2],
            n: self.n,
        };
        for (pixels, runs) in row.pixels.iter_mut().zip(&self.vectors) {
            for (pixels, run) in pixels.iter_mut().zip(runs).take(self.n) {
                let y = run.row + y as isize;
                if (0..self.size[0] as isize).contains(&y) {
                    *pixels = Pixels {
                        begin: run.begin,
                        end: run.end,
                        offset: y * self.size[1] as isize + run.column,
                    };
                }
            }
        }
        row
    }

    /// Pixels of the map.
    pub fn pixels(&self) -> usize {
        self.size[0] * self.size[1]
    }
}

/// The pixels of a row of a tile.
#[derive(Clone, Copy, Debug)]
pub(in crate::kernels) struct Row {
    pixels: [[Pixels; MAX_PIECES]; 2],
    n: usize,
}

impl Row {
    /// Those of one of the vectors, in lanes that do not overlap; all lie in the
    /// map that the row is of.
    #[inline(always)]
    pub fn of(&self, half: usize) -> &[Pixels] {
        &self.pixels[half][..self.n]
    }
}
