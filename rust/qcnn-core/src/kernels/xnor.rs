//! Layers whose weights and inputs are 1 and -1.
//!
//! Both are packed, one bit a number. The inner product of two vectors of `n` such
//! numbers is `n - 2 d` where `d` counts the bits that differ: an exclusive or and a
//! population count. A vector holds a word of 32 bits for each of `LANES` outputs;
//! a word of the input, the same for all, is compared with it.
//!
//! Bits that fill up the last word are 0 on both sides and never differ. A pixel of
//! the zero padding is a word of 0, too, though it stands for no number: as it counts
//! the weights' ones, what it adds is known. `starts` has, for each set of taps that
//! lie in the padding, what the response is where no bit differs.
//!
//! Everything is exact: counts are integers, small enough for float32, and the bias is
//! added last, in one rounding.
//!
//! Batch normalisation and the sign that follow can be folded in. What they make of a
//! channel's products only rises or only falls with the product, an integer, so it
//! changes its sign once. Where is found by trying the very float32 expression.
//!
//! NaN has no bit. Packing sees whether every value is 1 or -1; in an image with
//! others, which can only be NaN, the outputs that depend on them are overwritten.

// As in `tile`: index loops keep the counts in registers.
#![allow(clippy::needless_range_loop)]

use std::array;

use crate::geometry::ConvGeometry;
use crate::isa::{MAX_LANES, Simd, Task};
use crate::kernels::{Candidate, ConvLayer, FcLayer, Kernel, Levels, Weights};
use crate::ops::norm::BatchNorm;

/// Vectors of outputs in a tile.
const VECTORS: usize = 2;

/// Pixels or images in a tile: with two vectors of counts for each, and what counting
/// needs, they fit 16 registers.
const ROWS: usize = 4;

/// Bits of a word.
const BITS: usize = u32::BITS as usize;

/// Values packed side by side.
const PACKED_LANES: usize = 16;

/// Most terms of a sum: eight times as many are still a float32 number.
const MAX_TERMS: usize = 1 << 21;

/// Outputs of a panel.
const fn columns<S: Simd>() -> usize {
    VECTORS * S::LANES
}

/// Clock cycles of `positions` inner products of `words` words with all outputs.
fn cycles<S: Simd>(words: usize, outputs: usize, positions: usize) -> f64 {
    let vectors = outputs.div_ceil(columns::<S>()) * VECTORS;
    (words * vectors) as f64 * positions as f64 * S::COUNT_CYCLES
}

/// The weights of a layer whose inputs are signs, too.
fn signs_of<'a, C>(weights: &Weights<'a, C>) -> Option<&'a [i8]> {
    match *weights {
        Weights::Binary {
            signs,
            input: Levels::Signs,
        } => Some(signs),
        _ => None,
    }
}

/// Words of weights in panels of outputs, each `(depth, outputs of a panel)`; bit `j` of
/// word `k` of output `o` is set where `positive(o, k, j)`.
fn pack_weights<S: Simd>(
    outputs: usize,
    depth: usize,
    positive: impl Fn(usize, usize, usize) -> bool,
) -> Vec<u32> {
    let mut packed = Vec::with_capacity(outputs.next_multiple_of(columns::<S>()) * depth);
    for panel in (0..outputs).step_by(columns::<S>()) {
        for k in 0..depth {
            packed.extend((panel..panel + columns::<S>()).map(|o| {
                let bit = |j| u32::from(o < outputs && positive(o, k, j)) << j;
                (0..BITS).map(bit).sum::<u32>()
            }));
        }
    }
    packed
}

/// `values` with zeros up to whole panels.
fn whole_panels<S: Simd>(mut values: Vec<f32>) -> Vec<f32> {
    values.resize(values.len().next_multiple_of(columns::<S>()), 0.0);
    values
}

/// Pack `n` rows of values side by side, row `j` to bit `j`: set where 1, clear where
/// -1. Also returns whether there was anything else.
#[inline(always)]
fn pack(n: usize, row: impl Fn(usize) -> [f32; PACKED_LANES]) -> ([u32; PACKED_LANES], bool) {
    const SIGN: u32 = 1 << 31;
    let mut words = [0; PACKED_LANES];
    let mut strange = [0; PACKED_LANES];
    for j in 0..n {
        let bits = row(j).map(f32::to_bits);
        for i in 0..PACKED_LANES {
            words[i] = words[i] >> 1 | !bits[i] & SIGN;
            strange[i] |= bits[i] & !SIGN ^ 1.0f32.to_bits();
        }
    }
    let strange = strange.iter().fold(0, |a, b| a | b) != 0;
    (words.map(|word| word >> (BITS - n)), strange)
}

/// The first values of a slice, -1 where it is shorter.
#[inline(always)]
fn lanes(values: &[f32]) -> [f32; PACKED_LANES] {
    if let Some(lanes) = values.first_chunk() {
        return *lanes;
    }
    let mut lanes = [-1.0; PACKED_LANES];
    lanes[..values.len()].copy_from_slice(values);
    lanes
}

/// How many bits of `R` windows, which start at `bases` of the input, differ from a
/// panel's. Word `k` of a window is `offsets[k]` behind its base.
///
/// # Safety
///
/// All those words are in `input`.
#[inline(always)]
unsafe fn count<S: Simd, const R: usize>(
    simd: S,
    weights: &[u32],
    input: &[u32],
    bases: [usize; R],
    offsets: &[u32],
) -> [[S::I32; VECTORS]; R] {
    let depth = offsets.len();
    assert!(weights.len() >= depth * columns::<S>());
    let mut totals = [[simd.splat_i32(0); VECTORS]; R];
    for first in (0..depth).step_by(S::COUNTED_WORDS) {
        let mut counts = [[simd.splat_i32(0); VECTORS]; R];
        for k in first..depth.min(first.saturating_add(S::COUNTED_WORDS)) {
            // SAFETY: row k < depth of the panel has `columns` words, as asserted;
            // the caller vouches for the input's words.
            unsafe {
                let row = weights.as_ptr().add(k * columns::<S>()).cast::<i32>();
                let row: [_; VECTORS] = array::from_fn(|v| simd.load_i32(row.add(v * S::LANES)));
                let offset = *offsets.get_unchecked(k) as usize;
                for i in 0..R {
                    let word = *input.get_unchecked(bases[i] + offset);
                    let word = simd.splat_i32(word.cast_signed());
                    for v in 0..VECTORS {
                        counts[i][v] = simd.count_differences(counts[i][v], word, row[v]);
                    }
                }
            }
        }
        for i in 0..R {
            for v in 0..VECTORS {
                totals[i][v] = simd.add_counts(totals[i][v], counts[i][v]);
            }
        }
    }
    totals
}

/// What becomes of counts: `scale * count + start`, to which the bias is added, or, where
/// there is none, which is limited to -1 and 1.
#[derive(Debug)]
struct Responses {
    /// For each group, `(outputs)` in whole panels.
    scales: Vec<f32>,
    /// For each group and each class of output positions, the same.
    starts: Vec<f32>,
    /// As `scales`.
    bias: Option<Vec<f32>>,
}

impl Responses {
    /// For `groups` groups of `outputs`, of which `starts(group)` and `bias` have the
    /// numbers.
    fn new<S: Simd>(
        groups: usize,
        outputs: usize,
        starts: impl Fn(usize) -> Vec<Vec<f32>>,
        bias: &[f32],
    ) -> Self {
        let classes = (0..groups).flat_map(starts);
        Self {
            scales: vec![-2.0; groups * outputs.next_multiple_of(columns::<S>())],
            starts: classes.flat_map(whole_panels::<S>).collect(),
            bias: Some(
                bias.chunks_exact(outputs)
                    .flat_map(|own| whole_panels::<S>(own.to_vec()))
                    .collect(),
            ),
        }
    }

    /// With the sign of `norm` of the responses, each of which sums up `terms` numbers.
    fn folded(
        &self,
        groups: usize,
        outputs: usize,
        terms: usize,
        norm: &BatchNorm,
    ) -> Option<Self> {
        let bias = self.bias.as_ref()?;
        let terms = terms as i32;
        let padded = self.scales.len() / groups;
        let classes = self.starts.len() / self.scales.len();
        let mut scales = self.scales.clone();
        let mut starts = self.starts.clone();
        for channel in 0..groups * outputs {
            let (group, output) = (channel / outputs, channel % outputs);
            let [factor, summand] = norm.coefficients(channel);
            if !factor.is_finite() || !summand.is_finite() {
                return None;
            }
            let direction = if factor < 0.0 { -1 } else { 1 };
            let positive = |product: i32| {
                let response = (direction * product) as f32 + bias[group * padded + output];
                norm.apply(channel, response) >= 0.0
            };
            // The least product that gives 1, counted in the direction.
            let (mut low, mut high) = (-terms, terms + 1);
            while low < high {
                let middle = low + (high - low) / 2;
                if positive(middle) {
                    high = middle;
                } else {
                    low = middle + 1;
                }
            }
            // Twice the distance from it, and 1: an odd number, 1 or more from there on.
            let factor = 2.0 * direction as f32;
            scales[group * padded + output] *= factor;
            for class in 0..classes {
                let start = &mut starts[(group * classes + class) * padded + output];
                *start = *start * factor + (1 - 2 * low) as f32;
            }
        }
        Some(Self {
            scales,
            starts,
            bias: None,
        })
    }

    fn of_group(&self, group: usize, groups: usize) -> GroupResponses<'_> {
        fn part(values: &[f32], group: usize, groups: usize) -> &[f32] {
            let len = values.len() / groups;
            &values[group * len..][..len]
        }
        GroupResponses {
            scales: part(&self.scales, group, groups),
            starts: part(&self.starts, group, groups),
            bias: self.bias.as_ref().map(|bias| part(bias, group, groups)),
        }
    }
}

/// [`Responses`] of one group.
#[derive(Clone, Copy)]
struct GroupResponses<'a> {
    scales: &'a [f32],
    starts: &'a [f32],
    bias: Option<&'a [f32]>,
}

impl GroupResponses<'_> {
    /// What becomes of the counts of a vector of outputs, from `first` on, at a
    /// position of the class.
    #[inline(always)]
    fn of<S: Simd>(self, simd: S, first: usize, class: usize, counts: S::I32) -> S::F32 {
        let start = simd.load_first(&self.starts[class * self.scales.len() + first..]);
        let scale = simd.load_first(&self.scales[first..]);
        let y = simd.mul_add(simd.float_i32(counts), scale, start);
        match self.bias {
            Some(bias) => simd.add(y, simd.load_first(&bias[first..])),
            None => simd.min(simd.max(y, simd.splat(-1.0)), simd.splat(1.0)),
        }
    }
}

/// A convolution.
#[derive(Debug)]
pub(crate) struct XnorConv<S> {
    simd: S,
    name: String,
    geometry: ConvGeometry,
    /// Words of a pixel.
    words: usize,
    /// For each group, panels of outputs.
    weights: Vec<u32>,
    responses: Responses,
    /// With what follows.
    folded: Option<Responses>,
    /// Where each pixel of the input lies among the packed words.
    positions: Vec<u32>,
    windows: Windows,
}

/// The windows of all output positions.
#[derive(Debug)]
struct Windows {
    /// Where each begins among the packed words.
    bases: Vec<u32>,
    /// Which of its taps lie in the padding, as the number of a class.
    classes: Vec<u32>,
    /// Its words, counted from there.
    offsets: Vec<u32>,
}

/// For each output along an axis, the kernel's taps that see the input.
fn seen(geometry: &ConvGeometry, axis: usize) -> Vec<Vec<bool>> {
    let g = geometry;
    let before = [g.padding.top, g.padding.left][axis];
    let inside = before..before + g.in_size[axis];
    let tap = |o: usize, k: usize| inside.contains(&(o * g.stride[axis] + k * g.dilation[axis]));
    (0..g.out_size[axis])
        .map(|o| (0..g.kernel[axis]).map(|k| tap(o, k)).collect())
        .collect()
}

/// The distinct ones of `values`, and which of them each is.
fn distinct<T: PartialEq + Clone>(values: &[T]) -> (Vec<T>, Vec<usize>) {
    let mut found: Vec<T> = Vec::new();
    let classes = values.iter().map(|value| {
        let known = found.iter().position(|v| v == value);
        known.unwrap_or_else(|| {
            found.push(value.clone());
            found.len() - 1
        })
    });
    let classes = classes.collect();
    (found, classes)
}

impl<S: Simd> XnorConv<S> {
    pub(crate) fn candidate<'a>(simd: S, layer: &'a ConvLayer<'a>) -> Option<Candidate<'a>> {
        let signs = signs_of(&layer.weights)?;
        let g = layer.geometry;
        let words = g.group_in_channels().div_ceil(BITS);
        let [height, width] = g.padded_size();
        if g.group_in_channels() * g.taps() > MAX_TERMS
            || u32::try_from(height * width * words).is_err()
        {
            return None;
        }
        let outputs = g.group_out_channels();
        let cycles = cycles::<S>(g.taps() * words, outputs, g.out_pixels());
        let cycles = cycles + (g.group_in_channels() * g.in_pixels()) as f64 / 4.0;
        let cycles = g.groups as f64 * cycles;
        Some(Candidate::new(cycles, move || {
            Self::new(simd, layer, signs)
        }))
    }

    fn new(simd: S, layer: &ConvLayer<'_>, signs: &[i8]) -> Self {
        let geometry = layer.geometry.clone();
        let g = &geometry;
        let (channels, taps, outputs) = (g.group_in_channels(), g.taps(), g.group_out_channels());
        let words = channels.div_ceil(BITS);
        let [_, width] = g.padded_size();
        let at = |y: usize, x: usize| ((y * width + x) * words) as u32;

        let (rows, row_classes) = distinct(&seen(g, 0));
        let (columns_seen, column_classes) = distinct(&seen(g, 1));
        let positive = |group: usize, o: usize, c: usize, tap: usize| {
            signs[((group * outputs + o) * channels + c) * taps + tap] > 0
        };
        let packed = |group| {
            pack_weights::<S>(outputs, taps * words, |o, k, j| {
                let c = k % words * BITS + j;
                c < channels && positive(group, o, c, k / words)
            })
        };
        // What a tap adds where it sees the input and where it does not: there the
        // weights' ones are counted.
        let of_taps = |group, o| -> Vec<[usize; 2]> {
            let ones = |tap| {
                (0..channels)
                    .filter(|&c| positive(group, o, c, tap))
                    .count()
            };
            (0..taps).map(|tap| [2 * ones(tap), channels]).collect()
        };
        let starts = |group| {
            let of_taps: Vec<_> = (0..outputs).map(|o| of_taps(group, o)).collect();
            let start = |row: &[bool], column: &[bool]| {
                let sees = |tap: usize| row[tap / g.kernel[1]] && column[tap % g.kernel[1]];
                let sum = |of_taps: &Vec<[usize; 2]>| {
                    let of_taps = of_taps.iter().enumerate();
                    let sum: usize = of_taps.map(|(tap, add)| add[usize::from(sees(tap))]).sum();
                    sum as f32
                };
                of_taps.iter().map(sum).collect()
            };
            rows.iter()
                .flat_map(|row| columns_seen.iter().map(move |column| (row, column)))
                .map(|(row, column)| start(row, column))
                .collect()
        };
        let bias = layer.bias_or_zeros();
        let outputs_at =
            || (0..g.out_size[0]).flat_map(|y| (0..g.out_size[1]).map(move |x| (y, x)));
        let windows = Windows {
            bases: outputs_at()
                .map(|(y, x)| at(y * g.stride[0], x * g.stride[1]))
                .collect(),
            classes: outputs_at()
                .map(|(y, x)| (row_classes[y] * columns_seen.len() + column_classes[x]) as u32)
                .collect(),
            offsets: (0..taps * words)
                .map(|k| {
                    let (ky, kx) = (k / words / g.kernel[1], k / words % g.kernel[1]);
                    at(ky * g.dilation[0], kx * g.dilation[1]) + (k % words) as u32
                })
                .collect(),
        };
        let positions = (0..g.in_pixels())
            .map(|p| {
                let (y, x) = (p / g.in_size[1], p % g.in_size[1]);
                at(y + g.padding.top, x + g.padding.left)
            })
            .collect();
        Self {
            simd,
            name: format!("{}-b1-xnor", S::NAME),
            words,
            weights: (0..g.groups).flat_map(packed).collect(),
            responses: Responses::new::<S>(g.groups, outputs, starts, &bias),
            folded: None,
            positions,
            windows,
            geometry,
        }
    }

    /// Packed words of one group.
    fn packed_len(&self) -> usize {
        let [height, width] = self.geometry.padded_size();
        height * width * self.words
    }

    /// Make NaN of the outputs of a group that see one.
    #[cold]
    fn spread_nan(&self, input: &[f32], output: &mut [f32]) {
        let g = &self.geometry;
        let is_nan = |pixel: usize| {
            input[pixel..]
                .iter()
                .step_by(g.in_pixels())
                .any(|x| x.is_nan())
        };
        for pixel in 0..g.out_pixels() {
            let (oy, ox) = (pixel / g.out_size[1], pixel % g.out_size[1]);
            let sees_nan = (0..g.taps()).any(|tap| {
                let (ky, kx) = (tap / g.kernel[1], tap % g.kernel[1]);
                let y = (oy * g.stride[0] + ky * g.dilation[0]).wrapping_sub(g.padding.top);
                let x = (ox * g.stride[1] + kx * g.dilation[1]).wrapping_sub(g.padding.left);
                y < g.in_size[0] && x < g.in_size[1] && is_nan(y * g.in_size[1] + x)
            });
            if sees_nan {
                let outputs = output[pixel..].iter_mut().step_by(g.out_pixels());
                outputs.for_each(|y| *y = f32::NAN);
            }
        }
    }
}

impl<S: Simd> Kernel for XnorConv<S> {
    fn name(&self) -> &str {
        &self.name
    }

    fn scratch_len(&self, _: usize) -> usize {
        self.packed_len()
    }

    fn run(&self, n: usize, input: &[f32], output: &mut [f32], scratch: &mut [f32]) {
        self.convolve(&self.responses, n, input, output, scratch);
    }

    fn fold(&mut self, norm: &BatchNorm) -> bool {
        let g = &self.geometry;
        let terms = g.group_in_channels() * g.taps();
        self.folded = self
            .responses
            .folded(g.groups, g.group_out_channels(), terms, norm);
        self.folded.is_some()
    }

    fn run_folded(&self, n: usize, input: &[f32], output: &mut [f32], scratch: &mut [f32]) {
        let folded = self.folded.as_ref().expect("the kernel was folded");
        self.convolve(folded, n, input, output, scratch);
    }
}

impl<S: Simd> XnorConv<S> {
    fn convolve(
        &self,
        responses: &Responses,
        n: usize,
        input: &[f32],
        output: &mut [f32],
        scratch: &mut [f32],
    ) {
        let g = &self.geometry;
        let (in_len, out_len) = (
            g.group_in_channels() * g.in_pixels(),
            g.group_out_channels() * g.out_pixels(),
        );
        let packed: &mut [u32] = bytemuck::cast_slice_mut(&mut scratch[..self.packed_len()]);
        // Packing writes all but the padding.
        packed.fill(0);
        let group_weights = self.weights.len() / g.groups;
        let groups = input.chunks_exact(in_len).take(n * g.groups);
        for (i, (input, output)) in groups.zip(output.chunks_exact_mut(out_len)).enumerate() {
            let strange = self.simd.call(PackPixels {
                input,
                words: self.words,
                positions: &self.positions,
                packed,
            });
            let group = i % g.groups;
            self.simd.call(Convolve {
                weights: &self.weights[group * group_weights..][..group_weights],
                responses: responses.of_group(group, g.groups),
                windows: &self.windows,
                packed,
                outputs: g.group_out_channels(),
                output,
            });
            if strange {
                self.spread_nan(input, output);
            }
        }
    }
}

/// Packs the channels of a group pixel by pixel. Returns whether anything was neither
/// 1 nor -1.
struct PackPixels<'a> {
    /// `(channels, pixels)`
    input: &'a [f32],
    words: usize,
    positions: &'a [u32],
    packed: &'a mut [u32],
}

impl Task for PackPixels<'_> {
    type Output = bool;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> bool {
        let pixels = self.positions.len();
        let mut strange = false;
        for word in 0..self.words {
            let planes = &self.input[word * BITS * pixels..];
            let n = BITS.min(planes.len() / pixels);
            for first in (0..pixels).step_by(PACKED_LANES) {
                let end = pixels.min(first + PACKED_LANES);
                let row = |j: usize| {
                    // The lanes behind the end are of the next plane, and dropped.
                    let values = &planes[j * pixels + first..];
                    if values.len() >= PACKED_LANES && end - first == PACKED_LANES {
                        lanes(values)
                    } else {
                        lanes(&values[..end - first])
                    }
                };
                let (packed, unlike) = pack(n, row);
                strange |= unlike;
                for (value, position) in packed.iter().zip(&self.positions[first..end]) {
                    self.packed[*position as usize + word] = *value;
                }
            }
        }
        strange
    }
}

/// One group of one image, packed.
struct Convolve<'a> {
    weights: &'a [u32],
    responses: GroupResponses<'a>,
    windows: &'a Windows,
    packed: &'a [u32],
    outputs: usize,
    /// `(outputs, pixels)`
    output: &'a mut [f32],
}

impl Task for Convolve<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let columns = columns::<S>();
        let Windows {
            bases,
            classes,
            offsets,
        } = self.windows;
        let pixels = bases.len();
        let furthest = |values: &[u32]| values.iter().max().map_or(0, |v| *v as usize);
        assert!(furthest(bases) + furthest(offsets) < self.packed.len());
        let panels = self.weights.chunks_exact(offsets.len() * columns);
        for (panel, weights) in panels.enumerate() {
            let first_output = panel * columns;
            for first in (0..pixels).step_by(S::LANES) {
                let width = S::LANES.min(pixels - first);
                // `(pixels, columns)`
                let mut block = [0.0; MAX_LANES * VECTORS * MAX_LANES];
                for row in (0..width).step_by(ROWS) {
                    // The last ones come again to fill up a tile.
                    let tile: [usize; ROWS] = array::from_fn(|i| (first + row + i).min(pixels - 1));
                    // SAFETY: the furthest word of all windows is in `packed`.
                    let counts = unsafe {
                        let bases = tile.map(|pixel| bases[pixel] as usize);
                        count::<S, ROWS>(simd, weights, self.packed, bases, offsets)
                    };
                    for i in 0..ROWS {
                        let class = classes[tile[i]] as usize;
                        let row = &mut block[(row + i) * columns..][..columns];
                        for v in 0..VECTORS {
                            let output = first_output + v * S::LANES;
                            let y = self.responses.of(simd, output, class, counts[i][v]);
                            simd.store_first(&mut row[v * S::LANES..], y);
                        }
                    }
                }
                for v in 0..VECTORS {
                    let output = first_output + v * S::LANES;
                    let height = S::LANES.min(self.outputs.saturating_sub(output));
                    if height == 0 {
                        break;
                    }
                    let target = &mut self.output[output * pixels + first..];
                    assert!(target.len() >= (height - 1) * pixels + width);
                    let extent = [height, width];
                    // SAFETY: the block has LANES rows of LANES values at this
                    // distance from element v * LANES on; the target has room for
                    // `height` rows, as asserted.
                    unsafe {
                        let source = block.as_ptr().add(v * S::LANES);
                        simd.transpose(source, columns, target.as_mut_ptr(), pixels, extent);
                    }
                }
            }
        }
    }
}

/// A fully connected layer. Bit `j` of word `k` is feature `j * words + k`: what is
/// packed side by side lies side by side.
#[derive(Debug)]
pub(crate) struct XnorFc<S> {
    simd: S,
    name: String,
    in_features: usize,
    out_features: usize,
    /// Panels of outputs.
    weights: Vec<u32>,
    responses: Responses,
    /// With what follows.
    folded: Option<Responses>,
    /// The words of an input, 0, 1, …
    offsets: Vec<u32>,
}

impl<S: Simd> XnorFc<S> {
    pub(crate) fn candidate<'a>(simd: S, layer: &'a FcLayer<'a>) -> Option<Candidate<'a>> {
        let signs = signs_of(&layer.weights)?;
        if layer.in_features > MAX_TERMS {
            return None;
        }
        let words = layer.in_features.div_ceil(BITS);
        let cycles = cycles::<S>(words, layer.out_features, 1) + layer.in_features as f64 / 4.0;
        Some(Candidate::new(cycles, move || {
            Self::new(simd, layer, signs)
        }))
    }

    fn new(simd: S, layer: &FcLayer<'_>, signs: &[i8]) -> Self {
        let (inputs, outputs) = (layer.in_features, layer.out_features);
        let words = inputs.div_ceil(BITS);
        let weights = pack_weights::<S>(outputs, words, |o, k, j| {
            let feature = j * words + k;
            feature < inputs && signs[o * inputs + feature] > 0
        });
        Self {
            simd,
            name: format!("{}-b1-xnor", S::NAME),
            in_features: inputs,
            out_features: outputs,
            weights,
            responses: Responses::new::<S>(
                1,
                outputs,
                |_| vec![vec![inputs as f32; outputs]],
                &layer.bias_or_zeros(),
            ),
            folded: None,
            offsets: (0..words as u32).collect(),
        }
    }
}

impl<S: Simd> Kernel for XnorFc<S> {
    fn name(&self) -> &str {
        &self.name
    }

    fn scratch_len(&self, n: usize) -> usize {
        n * self.offsets.len()
    }

    fn run(&self, n: usize, input: &[f32], output: &mut [f32], scratch: &mut [f32]) {
        self.multiply(&self.responses, n, input, output, scratch);
    }

    fn fold(&mut self, norm: &BatchNorm) -> bool {
        self.folded = self
            .responses
            .folded(1, self.out_features, self.in_features, norm);
        self.folded.is_some()
    }

    fn run_folded(&self, n: usize, input: &[f32], output: &mut [f32], scratch: &mut [f32]) {
        let folded = self.folded.as_ref().expect("the kernel was folded");
        self.multiply(folded, n, input, output, scratch);
    }
}

impl<S: Simd> XnorFc<S> {
    fn multiply(
        &self,
        responses: &Responses,
        n: usize,
        input: &[f32],
        output: &mut [f32],
        scratch: &mut [f32],
    ) {
        let words = self.offsets.len();
        let packed: &mut [u32] = bytemuck::cast_slice_mut(&mut scratch[..n * words]);
        let input = &input[..n * self.in_features];
        let output = &mut output[..n * self.out_features];
        let strange = self.simd.call(PackFeatures {
            input,
            in_features: self.in_features,
            packed,
        });
        let tiles = packed.chunks(ROWS * words);
        for (packed, output) in tiles.zip(output.chunks_mut(ROWS * self.out_features)) {
            let multiply = Multiply {
                weights: &self.weights,
                responses: responses.of_group(0, 1),
                offsets: &self.offsets,
                out_features: self.out_features,
                packed,
                output,
            };
            match packed.len() / words {
                1 => self.simd.call(MultiplyRows::<1>(multiply)),
                2 => self.simd.call(MultiplyRows::<2>(multiply)),
                3 => self.simd.call(MultiplyRows::<3>(multiply)),
                _ => self.simd.call(MultiplyRows::<ROWS>(multiply)),
            }
        }
        if strange {
            let images = input.chunks_exact(self.in_features);
            for (image, output) in images.zip(output.chunks_exact_mut(self.out_features)) {
                if image.iter().any(|x| x.is_nan()) {
                    output.fill(f32::NAN);
                }
            }
        }
    }
}

/// Packs images. Returns whether anything was neither 1 nor -1.
struct PackFeatures<'a> {
    input: &'a [f32],
    in_features: usize,
    packed: &'a mut [u32],
}

impl Task for PackFeatures<'_> {
    type Output = bool;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> bool {
        let words = self.in_features.div_ceil(BITS);
        // The last rows may be shorter, or there are fewer.
        let rows = self.in_features.div_ceil(words);
        let mut strange = false;
        let images = self.input.chunks_exact(self.in_features);
        for (image, packed) in images.zip(self.packed.chunks_exact_mut(words)) {
            for (i, packed) in packed.chunks_mut(PACKED_LANES).enumerate() {
                let first = i * PACKED_LANES;
                let row = |j: usize| {
                    let start = (j * words + first).min(image.len());
                    let end = (start + packed.len()).min(image.len());
                    lanes(&image[start..end])
                };
                let (values, unlike) = pack(rows, row);
                packed.copy_from_slice(&values[..packed.len()]);
                strange |= unlike;
            }
        }
        strange
    }
}

/// The responses to a few packed images.
struct Multiply<'a> {
    weights: &'a [u32],
    responses: GroupResponses<'a>,
    offsets: &'a [u32],
    out_features: usize,
    /// `(images, words)`
    packed: &'a [u32],
    /// `(images, outputs)`
    output: &'a mut [f32],
}

/// [`Multiply`] for `R` images.
struct MultiplyRows<'a, const R: usize>(Multiply<'a>);

impl<const R: usize> Task for MultiplyRows<'_, R> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let m = self.0;
        let words = m.offsets.len();
        assert!(m.packed.len() >= R * words);
        let panels = m.weights.chunks_exact(words * columns::<S>());
        for (panel, weights) in panels.enumerate() {
            let bases = array::from_fn(|i| i * words);
            // SAFETY: there are R inputs of `words` words, as asserted.
            let counts = unsafe { count::<S, R>(simd, weights, m.packed, bases, m.offsets) };
            for i in 0..R {
                for v in 0..VECTORS {
                    let first = panel * columns::<S>() + v * S::LANES;
                    let end = m.out_features.min(first + S::LANES);
                    if first < end {
                        let y = m.responses.of(simd, first, 0, counts[i][v]);
                        let output = &mut m.output[i * m.out_features..];
                        simd.store_first(&mut output[first..end], y);
                    }
                }
            }
        }
    }
}
