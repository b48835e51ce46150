//! Convolution with decoded weights: a product of matrices of integers.
//!
//! The columns of the im2col matrix are the flat positions of [`Planes`], so that
//! each of its rows is a contiguous piece of a plane.
//!
//! With 16 bits for product-quantised layers whose look-ups would replace too few
//! multiplications, above all those with few input channels; with 8 bits for the same, and
//! for weights of 1 and -1 whose inputs are known to be on a grid of 8 bits: then nothing is
//! rounded. It is the matrix product of [`GemmConv`](crate::ops::conv::GemmConv) with one
//! multiplication for two products, or for four.
//!
//! # Why nothing overflows
//!
//! 16 bits: inputs of an image become integers of at most `X`. The weights of an output
//! are multiplied with a scale such that `X` times the sum of their magnitudes, rounding
//! included, is less than 2^31: no sum of products, complete or not, needs more than 32
//! bits.
//!
//! 8 bits: inputs become integers from 0 to 255, of which one, the *zero*, stands for 0;
//! weights are integers of at most 127. Sums start at the sum of an output's weights times
//! the negative zero, so complete they are the sum of [`MAX_BYTE_DEPTH`] products of at
//! most 255 * 127, less than 2^31. Sums of some of the products may wrap around, which does
//! not change the complete ones.

// As in `tile`: index loops keep the sums in registers.
#![allow(clippy::needless_range_loop)]

use std::marker::PhantomData;
use std::ops::Range;

use super::factors::{Bytes, Factors, MAX_GROUP, Words};
use super::planes::Planes;
use super::tile::pair_rows;
use super::{Candidate, ConvLayer, Grid, Kernel, Levels, Weights, multiply_cycles, vector_cycles};
use crate::geometry::ConvGeometry;
use crate::isa::{Simd, Task};

/// Products per output with 16 bits: more would leave too few bits to each.
const MAX_WORD_DEPTH: usize = 1024;

/// Products per output with 8 bits.
const MAX_BYTE_DEPTH: usize = 1 << 16;

/// Columns of the im2col matrix packed at a time, roughly.
const BLOCK_COLUMNS: usize = 256;

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct IntegerGemmConv<S, F> {
    simd: S,
    name: String,
    geometry: ConvGeometry,
    planes: Planes,
    /// Where each row of the im2col matrix starts in the planes of a group.
    starts: Vec<usize>,
    rounding: Rounding,
    /// For each group panels of `pair_rows` outputs: `(groups of rows of the im2col
    /// matrix, pair_rows)`.
    weights: Vec<i32>,
    /// The sum of each output's integers.
    sums: Vec<i32>,
    /// What 1 stands for in the weights of each output.
    units: Vec<f32>,
    bias: Vec<f32>,
    factors: PhantomData<F>,
}

/// How an image becomes integers.
#[derive(Clone, Copy, Debug)]
pub(super) enum Rounding {
    /// The greatest magnitude becomes this number.
    Peak(f32),
    /// As [`Bytes::scale`] says.
    Range,
    /// They are known.
    Grid(Grid),
}

/// What integers of an image are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scale {
    /// From inputs to integers.
    pub factor: f32,
    /// What they are raised by.
    pub zero: i32,
    /// What 1 stands for.
    pub unit: f32,
}

impl Rounding {
    /// For inputs in a range that 0 lies in. NaN and infinity make all responses NaN.
    pub fn scale(self, [low, high]: [f32; 2]) -> Scale {
        let peak = high.max(-low);
        if !(high - low).is_finite() {
            return Scale {
                factor: 0.0,
                zero: 0,
                unit: f32::NAN,
            };
        }
        let (factor, zero) = match self {
            Self::Peak(greatest) => ((greatest / peak).min(1e30), 0),
            Self::Range => Bytes::scale([low, high]),
            Self::Grid(Grid { step, zero }) => (1.0 / step, zero),
        };
        let unit = match self {
            Self::Grid(Grid { step, .. }) => step,
            _ => 1.0 / factor,
        };
        Scale { factor, zero, unit }
    }
}

/// Columns of a panel: 2 vectors of groups, of even and of odd columns.
const fn panel_columns<S: Simd>() -> usize {
    2 * S::LANES
}

impl<S: Simd> IntegerGemmConv<S, Words> {
    pub(crate) fn candidate<'a>(simd: S, layer: &'a ConvLayer<'a>) -> Option<Candidate<'a>> {
        // What is dense already is to be exact.
        if !matches!(layer.weights, Weights::ProductQuantized { .. }) {
            return None;
        }
        let depth = depth(layer.geometry);
        // Splits the 31 bits such that rounding inputs and rounding weights do
        // about the same harm, if the greatest input is three times the mean and
        // the mean weight is 0.8 of their deviation.
        let input_peak = (3.0 * 2f32.powi(31) / (0.8 * depth as f32))
            .sqrt()
            .min(32_767.0)
            .floor();
        let scale = move |weights: &[f32]| {
            let sum: f32 = weights.iter().map(|w| w.abs()).sum();
            // Rounding adds up to 1/2 to each; the factor is for the sum.
            let greatest_sum = 2f32.powi(31) / input_peak * 0.9999 - 0.5 * depth as f32;
            (greatest_sum / sum).min(32_767.0 / peak(weights))
        };
        let rounding = Rounding::Peak(input_peak);
        (depth <= MAX_WORD_DEPTH).then(|| Self::with(simd, layer, rounding, scale))
    }
}

impl<S: Simd> IntegerGemmConv<S, Bytes> {
    pub(crate) fn candidate<'a>(simd: S, layer: &'a ConvLayer<'a>) -> Option<Candidate<'a>> {
        // As above.
        if !matches!(layer.weights, Weights::ProductQuantized { .. }) {
            return None;
        }
        let scale = |weights: &[f32]| 127.0 / peak(weights);
        let fits = depth(layer.geometry) <= MAX_BYTE_DEPTH;
        fits.then(|| Self::with(simd, layer, Rounding::Range, scale))
    }

    /// For weights and inputs that are integers as they are.
    pub(crate) fn exact<'a>(simd: S, layer: &'a ConvLayer<'a>) -> Option<Candidate<'a>> {
        let Weights::Binary {
            input: Levels::Grid(grid),
            ..
        } = layer.weights
        else {
            return None;
        };
        let fits = depth(layer.geometry) <= MAX_BYTE_DEPTH;
        fits.then(|| Self::with(simd, layer, Rounding::Grid(grid), |_| 1.0))
    }
}

/// The greatest magnitude.
pub(super) fn peak(weights: &[f32]) -> f32 {
    weights.iter().fold(0.0f32, |peak, w| peak.max(w.abs()))
}

/// Products per output.
pub(super) fn depth(geometry: &ConvGeometry) -> usize {
    geometry.group_in_channels() * geometry.taps()
}

impl<S: Simd, F: Factors> IntegerGemmConv<S, F> {
    /// Given what the weights of an output are to be multiplied with.
    fn with<'a>(
        simd: S,
        layer: &'a ConvLayer<'a>,
        rounding: Rounding,
        scale: impl Fn(&[f32]) -> f32 + 'a,
    ) -> Candidate<'a> {
        let g = layer.geometry;
        let outputs = g.group_out_channels().next_multiple_of(pair_rows::<S>());
        let planes = Planes::new(g, g.out_size);
        let panels = planes.positions(g.out_size).div_ceil(panel_columns::<S>());
        // For a panel of columns: multiplying, packing, making responses of sums.
        let multiply = 2.2 * F::cycles::<S>() * multiply_cycles::<S>() * outputs as f64;
        let pack = 5.0 * vector_cycles::<S>() * F::GROUP as f64;
        let responses = 10.0 * vector_cycles::<S>() * outputs as f64;
        let cycles = depth(g).div_ceil(F::GROUP) as f64 * (multiply + pack) + responses;
        let cycles = (g.groups * panels) as f64 * cycles;
        Candidate::new(cycles, move || Self::new(simd, layer, rounding, &scale))
    }

    fn new(
        simd: S,
        layer: &ConvLayer<'_>,
        rounding: Rounding,
        scale: &impl Fn(&[f32]) -> f32,
    ) -> Self {
        let geometry = layer.geometry.clone();
        let planes = Planes::new(&geometry, geometry.out_size);
        let depth = depth(&geometry);
        let outputs = geometry.group_out_channels();
        let mut integers = layer.dense_weights().into_owned();
        let mut units = Vec::with_capacity(geometry.out_channels);
        let mut sums = Vec::with_capacity(geometry.out_channels);
        for weights in integers.chunks_exact_mut(depth) {
            let scale = scale(weights);
            // Without any weights.
            let scale = if scale.is_finite() { scale } else { 1.0 };
            for weight in &mut *weights {
                *weight = (*weight * scale).round_ties_even();
            }
            units.push(1.0 / scale);
            sums.push(weights.iter().map(|weight| *weight as i32).sum());
        }
        let channels = (0..geometry.group_in_channels()).map(|channel| channel * planes.len());
        let starts =
            channels.flat_map(|channel| planes.taps().iter().map(move |tap| channel + tap));
        let starts: Vec<usize> = starts.collect();
        let rows = pair_rows::<S>();
        let mut packed = Vec::new();
        for integers in integers.chunks_exact(outputs * depth) {
            let integer = |o: usize, k: usize| {
                if o < outputs && k < depth {
                    integers[o * depth + k]
                } else {
                    0.0
                }
            };
            for panel in (0..outputs).step_by(rows) {
                for k in (0..depth).step_by(F::GROUP) {
                    let group = |o| F::weights(std::array::from_fn(|i| integer(o, k + i)));
                    packed.extend((panel..panel + rows).map(group));
                }
            }
        }
        Self {
            simd,
            name: format!("{}-{}-gemm", S::NAME, F::NAME),
            starts,
            planes,
            rounding,
            weights: packed,
            sums,
            units,
            bias: layer.bias_or_zeros(),
            geometry,
            factors: PhantomData,
        }
    }

    /// Groups of rows of the im2col matrix.
    fn depth_groups(&self) -> usize {
        depth(&self.geometry).div_ceil(F::GROUP)
    }

    /// 16-bit elements of all planes of a group; a vector more may be read.
    fn planes_len(&self) -> usize {
        self.geometry.group_in_channels() * self.planes.len() + panel_columns::<S>()
    }

    /// Columns of the im2col matrix.
    fn columns(&self) -> usize {
        self.planes.positions(self.geometry.out_size)
    }

    /// Columns packed at a time.
    fn block_columns(&self) -> usize {
        self.columns()
            .min(BLOCK_COLUMNS)
            .next_multiple_of(panel_columns::<S>())
    }

    /// float32 elements of each part of the scratch: one plane, integer planes,
    /// packed columns.
    fn scratch_parts(&self) -> [usize; 3] {
        [
            self.planes.len().next_multiple_of(16),
            self.planes_len().div_ceil(2).next_multiple_of(16),
            self.block_columns() * self.depth_groups(),
        ]
    }
}

impl<S: Simd, F: Factors> Kernel for IntegerGemmConv<S, F> {
    fn name(&self) -> &str {
        &self.name
    }

    fn scratch_len(&self, _: usize) -> usize {
        self.scratch_parts().iter().sum()
    }

    fn run(&self, n: usize, input: &[f32], output: &mut [f32], scratch: &mut [f32]) {
        self.images(n, input, output, scratch, f32::NEG_INFINITY);
    }

    fn run_relu(&self, n: usize, input: &[f32], output: &mut [f32], scratch: &mut [f32]) -> bool {
        self.images(n, input, output, scratch, 0.0);
        true
    }
}

impl<S: Simd, F: Factors> IntegerGemmConv<S, F> {
    /// Responses of `n` images, not less than `floor`.
    fn images(&self, n: usize, input: &[f32], output: &mut [f32], scratch: &mut [f32], floor: f32) {
        let g = &self.geometry;
        let group_in = g.group_in_channels() * g.in_pixels();
        let group_out = g.group_out_channels() * g.out_pixels();
        let [plane_len, planes_len, packed_len] = self.scratch_parts();
        let (plane, rest) = scratch.split_at_mut(plane_len);
        let (planes, rest) = rest.split_at_mut(planes_len);
        let planes: &mut [i16] = bytemuck::cast_slice_mut(planes);
        let packed: &mut [i16] = bytemuck::cast_slice_mut(&mut rest[..packed_len]);
        let inputs = input.chunks_exact(group_in).take(n * g.groups);
        let outputs = output.chunks_exact_mut(group_out);
        for (i, (input, output)) in inputs.zip(outputs).enumerate() {
            let scale = self.rounding.scale(self.simd.call(Extremes(input)));
            let plane = &mut plane[..self.planes.len()];
            let channels = input.chunks_exact(g.in_pixels());
            for (channel, target) in channels.zip(planes.chunks_exact_mut(self.planes.len())) {
                self.planes.fill(self.simd, g, [0, 0], channel, plane);
                self.simd.call(Round {
                    plane,
                    factor: scale.factor,
                    target,
                });
            }
            for first in (0..self.columns()).step_by(self.block_columns()) {
                let columns = first..(first + self.block_columns()).min(self.columns());
                self.simd.call(PackColumns {
                    kernel: self,
                    columns: columns.clone(),
                    planes,
                    zero: scale.zero,
                    packed,
                });
                self.products(i % g.groups, &columns, packed, (scale, floor), output);
            }
        }
    }

    /// Compute some columns of one group of one image.
    fn products(
        &self,
        group: usize,
        columns: &Range<usize>,
        packed: &[i16],
        (scale, floor): (Scale, f32),
        output: &mut [f32],
    ) {
        let g = &self.geometry;
        let outputs = g.group_out_channels();
        let depth = self.depth_groups();
        let rows = pair_rows::<S>();
        let panel_len = 2 * depth * panel_columns::<S>();
        let weights = self.weights.len() / g.groups * group;
        for first in (0..outputs).step_by(rows) {
            let outputs = first..(first + rows).min(outputs);
            let of_group = group * g.group_out_channels();
            for (i, column) in columns.clone().step_by(panel_columns::<S>()).enumerate() {
                let product = Product {
                    weights: &self.weights[weights + first * depth..][..rows * depth],
                    columns: &packed[i * panel_len..][..panel_len],
                    depth,
                    scale,
                    floor,
                    sums: &self.sums[of_group + outputs.start..of_group + outputs.end],
                    units: &self.units[of_group + outputs.start..of_group + outputs.end],
                    bias: &self.bias[of_group + outputs.start..of_group + outputs.end],
                    positions: column..(column + panel_columns::<S>()).min(columns.end),
                    row_len: self.planes.width(),
                    width: g.out_size[1],
                    output: &mut output[outputs.start * g.out_pixels()..],
                    stride: g.out_pixels(),
                };
                if rows == 12 {
                    self.simd.call(Rows::<F, 12>(product, PhantomData));
                } else {
                    self.simd.call(Rows::<F, 6>(product, PhantomData));
                }
            }
        }
    }
}

/// The least and the greatest number, 0 included; NaN if there is one.
pub(super) struct Extremes<'a>(pub &'a [f32]);

impl Task for Extremes<'_> {
    type Output = [f32; 2];

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> [f32; 2] {
        let minus = simd.splat(-1.0);
        // Of the numbers, and of the negative numbers.
        let mut peaks = [simd.splat(0.0); 2];
        for values in self.0.chunks(S::LANES) {
            let x = simd.load_first(values);
            peaks[0] = simd.max(peaks[0], x);
            peaks[1] = simd.max(peaks[1], simd.mul(x, minus));
        }
        let mut greatest = [0.0f32; 2];
        for (peak, greatest) in peaks.into_iter().zip(&mut greatest) {
            let mut lanes = [0.0f32; MAX_LANES];
            simd.store_first(&mut lanes, peak);
            *greatest = lanes
                .into_iter()
                .fold(0.0, |a, b| if b > a || b.is_nan() { b } else { a });
        }
        [-greatest[1], greatest[0]]
    }
}

/// Make integers of a plane.
struct Round<'a> {
    plane: &'a [f32],
    factor: f32,
    target: &'a mut [i16],
}

impl Task for Round<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let lanes = panel_columns::<S>();
        let whole = self.plane.len() / lanes * lanes;
        assert_eq!(self.target.len(), self.plane.len());
        let factor = simd.splat(self.factor);
        let zero = simd.splat(0.0);
        for at in (0..whole).step_by(lanes) {
            // SAFETY: plane and target hold a vector of 16-bit integers, two of
            // float32, at `at`.
            unsafe {
                let source = self.plane.as_ptr().add(at);
                let low = simd.mul_add(simd.load(source), factor, zero);
                let high = simd.mul_add(simd.load(source.add(S::LANES)), factor, zero);
                let rounded = simd.round_i16(low, high);
                simd.store_i16(self.target.as_mut_ptr().add(at), rounded);
            }
        }
        for (target, x) in self.target[whole..].iter_mut().zip(&self.plane[whole..]) {
            *target = (x * self.factor).round_ties_even() as i16;
        }
    }
}

/// Packs columns of the im2col matrix in panels, each `(groups of rows, 2)` vectors of
/// groups: of even, then of odd columns.
struct PackColumns<'a, K, F> {
    kernel: &'a IntegerGemmConv<K, F>,
    columns: Range<usize>,
    planes: &'a [i16],
    /// What integers are raised by.
    zero: i32,
    packed: &'a mut [i16],
}

impl<K: Simd, F: Factors> Task for PackColumns<'_, K, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let lanes = panel_columns::<S>();
        let mut packed = self.packed.chunks_exact_mut(2 * lanes);
        for first in self.columns.step_by(lanes) {
            for starts in self.kernel.starts.chunks(F::GROUP) {
                let mut rows = [simd.zero_i16(); MAX_GROUP];
                for i in 0..F::GROUP {
                    if let Some(start) = starts.get(i) {
                        let source = &self.planes[start + first..][..lanes];
                        // SAFETY: the slice has the length of a vector.
                        rows[i] = unsafe { simd.load_i16(source.as_ptr()) };
                    }
                }
                let groups = F::inputs(simd, rows, self.zero);
                let target = packed.next().expect("there is room for all panels");
                for i in 0..2 {
                    // SAFETY: the chunk holds two vectors.
                    unsafe { simd.store_i16(target.as_mut_ptr().add(i * lanes), groups[i]) };
                }
            }
        }
    }
}

/// The product of a panel of weights and one of columns.
struct Product<'a> {
    /// `(depth, pair_rows)`
    weights: &'a [i32],
    /// `(depth, 2)` vectors
    columns: &'a [i16],
    /// Groups of rows.
    depth: usize,
    /// Of the inputs.
    scale: Scale,
    /// The least response.
    floor: f32,
    /// The sum of each output's weights.
    sums: &'a [i32],
    /// What 1 stands for in them.
    units: &'a [f32],
    bias: &'a [f32],
    /// Positions of the columns; the last panel may not be full.
    positions: Range<usize>,
    /// Positions of a row of the map, of which `width` are outputs.
    row_len: usize,
    width: usize,
    /// `(outputs, stride)`
    output: &'a mut [f32],
    stride: usize,
}

/// [`Product`] for panels of `R` outputs.
struct Rows<'a, F, const R: usize>(Product<'a>, PhantomData<F>);

impl<F: Factors, const R: usize> Task for Rows<'_, F, R> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let p = self.0;
        let lanes = panel_columns::<S>();
        assert!(p.weights.len() >= p.depth * R && p.columns.len() >= p.depth * 2 * lanes);
        let mut sums = [[simd.splat_i32(0); 2]; R];
        for i in 0..R {
            // The last panel may have fewer outputs.
            let sum = p.sums.get(i).copied().unwrap_or(0);
            sums[i] = [simd.splat_i32(sum.wrapping_mul(-p.scale.zero)); 2];
        }
        for group in 0..p.depth {
            // SAFETY: there are R groups of weights and two vectors of columns for
            // each of `depth`, as asserted.
            unsafe {
                let source = p.columns.as_ptr().add(group * 2 * lanes);
                let inputs = [simd.load_i16(source), simd.load_i16(source.add(lanes))];
                for i in 0..R {
                    let weights = *p.weights.get_unchecked(group * R + i);
                    for v in 0..2 {
                        sums[i][v] = F::dot(simd, inputs[v], weights, sums[i][v]);
                    }
                }
            }
        }
        let mut responses = [[0.0f32; MAX_PANEL_COLUMNS]; R];
        for i in 0..R {
            let halves = simd.interleave_i32(sums[i][0], sums[i][1]);
            for half in 0..2 {
                let target = &mut responses[i][half * S::LANES..][..S::LANES];
                simd.store_first(target, halves[half]);
            }
        }
        let mut runs = [Run::default(); MAX_PANEL_COLUMNS + 1];
        let runs = p.runs(S::LANES, &mut runs);
        let floor = simd.splat(p.floor);
        let outputs = p.units.iter().zip(p.bias).zip(&responses);
        for (((unit, bias), responses), output) in outputs.zip(p.output.chunks_exact_mut(p.stride))
        {
            let unit = simd.splat(unit * p.scale.unit);
            let bias = simd.splat(*bias);
            for run in runs {
                let sums = simd.load_first(&responses[run.half * S::LANES..][..S::LANES]);
                let response = simd.max(simd.add(simd.mul(sums, unit), bias), floor);
                // SAFETY: the run's outputs lie within the map, see `Product::runs`, of
                // which `output` has all pixels.
                unsafe {
                    let target = output.as_mut_ptr().wrapping_offset(run.offset);
                    simd.store_range(target, response, run.begin, run.end);
                }
            }
        }
    }
}

/// Lanes of one of the two vectors of a panel that are neighbouring outputs: lane i is
/// pixel `offset + i` of the map.
#[derive(Clone, Copy, Default)]
struct Run {
    half: usize,
    begin: usize,
    end: usize,
    offset: isize,
}

impl Product<'_> {
    /// What the panel's positions are in the map, for vectors of `lanes` lanes. Some, at
    /// the end of each row, are no outputs.
    fn runs<'a>(&self, lanes: usize, runs: &'a mut [Run; MAX_PANEL_COLUMNS + 1]) -> &'a [Run] {
        // Rows without such positions follow each other.
        let [row_len, width] = if self.row_len == self.width {
            [usize::MAX; 2]
        } else {
            [self.row_len, self.width]
        };
        let mut n = 0;
        let mut position = self.positions.start;
        while position < self.positions.end {
            let (y, x) = (position / row_len, position % row_len);
            let len = (row_len - x).min(self.positions.end - position);
            let first = position - self.positions.start;
            let end = first + len.min(width.saturating_sub(x));
            for half in 0..2 {
                let lane = half * lanes;
                let (begin, end) = (first.max(lane), end.min(lane + lanes));
                if begin < end {
                    let pixel = y * self.width + x;
                    assert!(pixel + end - first <= self.stride);
                    runs[n] = Run {
                        half,
                        begin: begin - lane,
                        end: end - lane,
                        offset: pixel as isize - first as isize + lane as isize,
                    };
                    n += 1;
                }
            }
            position += len;
        }
        &runs[..n]
    }
}

/// Most float32 lanes of a vector on any level.
const MAX_LANES: usize = 16;

/// Most columns of a panel on any level.
const MAX_PANEL_COLUMNS: usize = 32;
