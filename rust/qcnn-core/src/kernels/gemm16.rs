//! Convolution with decoded weights, inputs and weights of 16 bits.
//!
//! The columns of the im2col matrix are the flat positions of [`Planes`], so that
//! each of its rows is a contiguous piece of a plane.
//!
//! For product-quantised layers whose look-ups would replace too few
//! multiplications, above all those with few input channels. It is the matrix
//! product of [`GemmConv`](crate::ops::conv::GemmConv) with one multiplication
//! for two products.
//!
//! # Why nothing overflows
//!
//! Inputs of an image become integers of at most `X = input_peak`. The weights
//! of an output are multiplied with a scale `a` such that `X` times the sum of
//! their magnitudes, rounding included, is less than 2^31: no sum of products,
//! complete or not, needs more than 32 bits.

// As in `tile`: index loops keep the sums in registers.
#![allow(clippy::needless_range_loop)]

use std::ops::Range;

use super::planes::Planes;
use super::tile::{pair, pair_rows};
use super::{Candidate, ConvLayer, Kernel, Weights, vector_cycles};
use crate::geometry::ConvGeometry;
use crate::isa::{Simd, Task};

/// Products per output: more would leave too few bits to each.
const MAX_DEPTH: usize = 1024;

/// Columns of the im2col matrix packed at a time, roughly.
const BLOCK_COLUMNS: usize = 256;

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Gemm16Conv<S> {
    simd: S,
    name: String,
    geometry: ConvGeometry,
    planes: Planes,
    /// Greatest magnitude of an integer input.
    input_peak: f32,
    /// For each group panels of `pair_rows` outputs: `(pairs of rows of the
    /// im2col matrix, pair_rows)`, the first row in the lower half.
    weights: Vec<i32>,
    /// What 1 stands for in the weights of each output.
    units: Vec<f32>,
    bias: Vec<f32>,
}

/// Columns of a panel: 2 vectors of pairs, of even and of odd columns.
const fn panel_columns<S: Simd>() -> usize {
    2 * S::LANES
}

impl<S: Simd> Gemm16Conv<S> {
    pub(crate) fn candidate<'a>(simd: S, layer: &'a ConvLayer<'a>) -> Option<Candidate<'a>> {
        let g = layer.geometry;
        let depth = g.group_in_channels() * g.taps();
        // What is dense already is to be exact.
        if depth > MAX_DEPTH || !matches!(layer.weights, Weights::ProductQuantized { .. }) {
            return None;
        }
        let outputs = g.group_out_channels().next_multiple_of(pair_rows::<S>());
        let planes = Planes::new(g, g.out_size);
        let panels = planes.positions(g.out_size).div_ceil(panel_columns::<S>());
        // For a panel of columns: multiplying, packing.
        let pairs = depth.div_ceil(2) as f64;
        let cycles = pairs * vector_cycles::<S>() * (2.2 * outputs as f64 + 10.0);
        let cycles = (g.groups * panels) as f64 * cycles;
        Some(Candidate::new(cycles, move || Self::new(simd, layer)))
    }

    fn new(simd: S, layer: &ConvLayer<'_>) -> Self {
        let geometry = layer.geometry.clone();
        let planes = Planes::new(&geometry, geometry.out_size);
        let depth = geometry.group_in_channels() * geometry.taps();
        let outputs = geometry.group_out_channels();
        let dense = layer.dense_weights();
        // Splits the 31 bits such that rounding inputs and rounding weights do
        // about the same harm, if the greatest input is three times the mean and
        // the mean weight is 0.8 of their deviation.
        let input_peak = (3.0 * 2f32.powi(31) / (0.8 * depth as f32))
            .sqrt()
            .min(32_767.0)
            .floor();
        let rows = pair_rows::<S>();
        let mut scales = Vec::with_capacity(geometry.out_channels);
        for weights in dense.chunks_exact(depth) {
            let sum: f32 = weights.iter().map(|w| w.abs()).sum();
            let peak = weights.iter().fold(0.0f32, |peak, w| peak.max(w.abs()));
            // Rounding adds up to 1/2 to each; the factor is for the sum.
            let greatest_sum = 2f32.powi(31) / input_peak * 0.9999 - 0.5 * depth as f32;
            let scale = (greatest_sum / sum).min(32_767.0 / peak);
            // Without any weights.
            scales.push(if scale.is_finite() { scale } else { 1.0 });
        }
        let mut weights = Vec::new();
        for (group, dense) in dense.chunks_exact(outputs * depth).enumerate() {
            let integer = |o: usize, k: usize| {
                if o < outputs && k < depth {
                    (dense[o * depth + k] * scales[group * outputs + o]).round_ties_even() as i16
                } else {
                    0
                }
            };
            for panel in (0..outputs).step_by(rows) {
                for k in (0..depth).step_by(2) {
                    weights.extend(
                        (panel..panel + rows).map(|o| pair(integer(o, k), integer(o, k + 1))),
                    );
                }
            }
        }
        Self {
            simd,
            name: format!("{}-i16-gemm", S::NAME),
            planes,
            input_peak,
            weights,
            units: scales.iter().map(|scale| 1.0 / scale).collect(),
            bias: layer.bias_or_zeros(),
            geometry,
        }
    }

    fn depth(&self) -> usize {
        self.geometry.group_in_channels() * self.geometry.taps()
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
        let packed = self.block_columns() * self.depth().next_multiple_of(2);
        [
            self.planes.len().next_multiple_of(16),
            self.planes_len().div_ceil(2).next_multiple_of(16),
            packed / 2,
        ]
    }
}

impl<S: Simd> Kernel for Gemm16Conv<S> {
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

impl<S: Simd> Gemm16Conv<S> {
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
            let peak = self.simd.call(Peak(input));
            // Without any signal, all integers are 0. NaN and infinity make all
            // responses NaN.
            let (scale, unit) = if peak == 0.0 {
                (0.0, 0.0)
            } else if peak.is_finite() {
                let scale = (self.input_peak / peak).min(1e30);
                (scale, 1.0 / scale)
            } else {
                (0.0, f32::NAN)
            };
            let plane = &mut plane[..self.planes.len()];
            let channels = input.chunks_exact(g.in_pixels());
            for (channel, target) in channels.zip(planes.chunks_exact_mut(self.planes.len())) {
                self.planes.fill(self.simd, g, [0, 0], channel, plane);
                self.simd.call(Round {
                    plane,
                    scale,
                    target,
                });
            }
            for first in (0..self.columns()).step_by(self.block_columns()) {
                let columns = first..(first + self.block_columns()).min(self.columns());
                self.simd.call(PackColumns {
                    kernel: self,
                    columns: columns.clone(),
                    planes,
                    packed,
                });
                self.products(i % g.groups, &columns, packed, [unit, floor], output);
            }
        }
    }

    /// Compute some columns of one group of one image.
    fn products(
        &self,
        group: usize,
        columns: &Range<usize>,
        packed: &[i16],
        [unit, floor]: [f32; 2],
        output: &mut [f32],
    ) {
        let g = &self.geometry;
        let outputs = g.group_out_channels();
        let pairs = self.depth().div_ceil(2);
        let rows = pair_rows::<S>();
        let panel_len = 2 * pairs * panel_columns::<S>();
        let weights = self.weights.len() / g.groups * group;
        for first in (0..outputs).step_by(rows) {
            let outputs = first..(first + rows).min(outputs);
            let of_group = group * g.group_out_channels();
            for (i, column) in columns.clone().step_by(panel_columns::<S>()).enumerate() {
                let product = Product {
                    weights: &self.weights[weights + first * pairs..][..rows * pairs],
                    columns: &packed[i * panel_len..][..panel_len],
                    pairs,
                    unit,
                    floor,
                    units: &self.units[of_group + outputs.start..of_group + outputs.end],
                    bias: &self.bias[of_group + outputs.start..of_group + outputs.end],
                    positions: column..(column + panel_columns::<S>()).min(columns.end),
                    row_len: self.planes.width(),
                    width: g.out_size[1],
                    output: &mut output[outputs.start * g.out_pixels()..],
                    stride: g.out_pixels(),
                };
                if rows == 12 {
                    self.simd.call(Rows::<12>(product));
                } else {
                    self.simd.call(Rows::<4>(product));
                }
            }
        }
    }
}

/// The greatest magnitude, or NaN if there is one.
struct Peak<'a>(&'a [f32]);

impl Task for Peak<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        let minus = simd.splat(-1.0);
        // Two chains, as maxima take their time.
        let mut peaks = [simd.splat(0.0); 2];
        for pair in self.0.chunks(2 * S::LANES) {
            for (peak, values) in peaks.iter_mut().zip(pair.chunks(S::LANES)) {
                let x = simd.load_first(values);
                *peak = simd.max(*peak, simd.max(x, simd.mul(x, minus)));
            }
        }
        let mut lanes = [0.0f32; MAX_LANES];
        simd.store_first(&mut lanes, simd.max(peaks[0], peaks[1]));
        lanes
            .into_iter()
            .fold(0.0, |a, b| if b > a || b.is_nan() { b } else { a })
    }
}

/// Make integers of a plane.
struct Round<'a> {
    plane: &'a [f32],
    scale: f32,
    target: &'a mut [i16],
}

impl Task for Round<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let lanes = panel_columns::<S>();
        let whole = self.plane.len() / lanes * lanes;
        assert!(self.target.len() == self.plane.len());
        let scale = simd.splat(self.scale);
        let zero = simd.splat(0.0);
        for at in (0..whole).step_by(lanes) {
            // SAFETY: plane and target hold a vector of 16-bit integers, two of
            // float32, at `at`.
            unsafe {
                let source = self.plane.as_ptr().add(at);
                let low = simd.mul_add(simd.load(source), scale, zero);
                let high = simd.mul_add(simd.load(source.add(S::LANES)), scale, zero);
                let rounded = simd.round_i16(low, high);
                simd.store_i16(self.target.as_mut_ptr().add(at), rounded);
            }
        }
        for (target, x) in self.target[whole..].iter_mut().zip(&self.plane[whole..]) {
            *target = (x * self.scale).round_ties_even() as i16;
        }
    }
}

/// Packs columns of the im2col matrix in panels, each `(pairs of rows, 2)`
/// vectors of pairs: of even, then of odd columns.
struct PackColumns<'a, K> {
    kernel: &'a Gemm16Conv<K>,
    columns: Range<usize>,
    planes: &'a [i16],
    packed: &'a mut [i16],
}

impl<K: Simd> Task for PackColumns<'_, K> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let lanes = panel_columns::<S>();
        let planes = &self.kernel.planes;
        let taps = planes.taps();
        let depth = self.kernel.depth();
        let mut packed = self.packed.chunks_exact_mut(2 * lanes);
        for first in self.columns.step_by(lanes) {
            let row = |k: usize| {
                if k == depth {
                    return simd.zero_i16();
                }
                let offset = k / taps.len() * planes.len() + taps[k % taps.len()];
                let row = &self.planes[offset + first..][..lanes];
                // SAFETY: the slice has the length of a vector.
                unsafe { simd.load_i16(row.as_ptr()) }
            };
            for k in (0..depth).step_by(2) {
                let zipped = simd.zip_i16(row(k), row(k + 1));
                let target = packed.next().expect("there is room for all panels");
                for i in 0..2 {
                    // SAFETY: the chunk holds two vectors.
                    unsafe { simd.store_i16(target.as_mut_ptr().add(i * lanes), zipped[i]) };
                }
            }
        }
    }
}

/// The product of a panel of weights and one of columns.
struct Product<'a> {
    /// `(pairs, pair_rows)`
    weights: &'a [i32],
    /// `(pairs, 2)` vectors
    columns: &'a [i16],
    pairs: usize,
    /// What 1 stands for in the inputs.
    unit: f32,
    /// The least response.
    floor: f32,
    /// What 1 stands for in the weights of each output.
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
struct Rows<'a, const R: usize>(Product<'a>);

impl<const R: usize> Task for Rows<'_, R> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let p = self.0;
        let lanes = panel_columns::<S>();
        assert!(p.weights.len() >= p.pairs * R && p.columns.len() >= p.pairs * 2 * lanes);
        let mut sums = [[simd.splat_i32(0); 2]; R];
        for pair in 0..p.pairs {
            // SAFETY: there are R pairs of weights and two vectors of columns for
            // each of `pairs`, as asserted.
            unsafe {
                let source = p.columns.as_ptr().add(pair * 2 * lanes);
                let inputs = [simd.load_i16(source), simd.load_i16(source.add(lanes))];
                for i in 0..R {
                    let weight = simd.splat_pair(*p.weights.get_unchecked(pair * R + i));
                    for v in 0..2 {
                        sums[i][v] = simd.dot_i16(inputs[v], weight, sums[i][v]);
                    }
                }
            }
        }
        let mut responses = [[0.0f32; MAX_PANEL_COLUMNS]; R];
        for i in 0..R {
            let halves = simd.interleave_i32(sums[i][0], sums[i][1]);
            for half in 0..2 {
                // SAFETY: a row of responses has room for two vectors.
                unsafe {
                    let target = responses[i].as_mut_ptr().add(half * S::LANES);
                    simd.store(target, halves[half]);
                }
            }
        }
        let outputs = p.units.iter().zip(p.bias).zip(&responses);
        for (((unit, bias), responses), output) in outputs.zip(p.output.chunks_mut(p.stride)) {
            let unit = unit * p.unit;
            let mut position = p.positions.start;
            while position < p.positions.end {
                let (y, x) = (position / p.row_len, position % p.row_len);
                let run = (p.row_len - x).min(p.positions.end - position);
                // Some positions, at the end of each row, are no outputs.
                let used = run.min(p.width.saturating_sub(x));
                let from = y * p.width + x.min(p.width);
                let row = &mut output[from..from + used];
                for (y, response) in row
                    .iter_mut()
                    .zip(&responses[position - p.positions.start..])
                {
                    let response = response * unit + bias;
                    // False for NaN.
                    let is_less = response < p.floor;
                    *y = if is_less { p.floor } else { response };
                }
                position += run;
            }
        }
    }
}

/// Most float32 lanes of a vector on any level.
const MAX_LANES: usize = 16;

/// Most columns of a panel on any level.
const MAX_PANEL_COLUMNS: usize = 32;
