//! Convolution with decoded weights on AMX: a product of matrices of bytes.
//!
//! It is the product of [`gemm`](super::gemm), of the weights and the im2col matrix, in
//! tiles: a multiplication makes 16,384 products of bytes in 16 cycles, where VNNI makes
//! 2,048. That is more than look-ups save, so at this level weights are decoded, most of
//! the time; they take more memory then, not more of a file.
//!
//! # Digits
//!
//! With 8 bits, inputs of an image become integers from 0 to 255, of which one stands for
//! 0; less 128 they are bytes with signs. Weights are integers of at most 127. What the
//! number that stands for 0 adds to a sum is taken away at the end.
//!
//! With 16 bits, inputs and weights become integers of at most 32,639, and each of these
//! two digits: `256 * high + low`, both from -128 to 127. A product then is
//! `65536 * high * high' + 256 * (high * low' + low * high')` and the product of the low
//! digits, which is left out: at most 2^14, where that of the greatest input and the
//! greatest weight is 2^30. It has no preferred sign, so over many products it adds less
//! than rounding the inputs to 16 bits does.
//!
//! # Why nothing overflows
//!
//! A product of bytes with signs is at most 2^14. A sum has one of them for each of
//! [`MAX_DEPTH`] rows of the matrix, or two: at most 2^30. What is taken away is at most
//! 2^14 for each row, too.

use std::ops::Range;

use super::gemm::{Extremes, MAX_PANEL_COLUMNS, Rounding, Run, Scale, depth, peak, runs_of};
use super::planes::Planes;
use super::{Candidate, ConvLayer, Kernel, Weights};
use crate::geometry::ConvGeometry;
use crate::isa::amx::{Amx, COLUMNS, Sums, TILE, TILE_BYTES, TILE_ROW, Tiles};
use crate::isa::{Simd, Task};
use crate::memory::Buffer;

/// Products per output.
const MAX_DEPTH: usize = 1 << 15;

/// Outputs of a panel of weights: two tiles.
const OUTPUTS: usize = 2 * TILE;

/// Greatest integer of two digits.
const GREATEST: f32 = 32_639.0;

/// Bytes of the columns packed at a time, roughly: most of a 2 MiB L2 cache, which no CPU
/// with AMX has less of.
const PACKED_BYTES: usize = 1 << 20;

/// Blocks of 64 rows of the matrices, with one digit, that are multiplied before the next
/// panel of columns has its turn, at most: their weights stay in L1.
const CHUNK: usize = 12;

/// Clock cycles of a multiplication of tiles, with its share of loads.
const MULTIPLY_CYCLES: f64 = 20.0;

/// See the module's documentation. `DIGITS` is 1 for 8 bits, 2 for 16.
#[derive(Debug)]
pub(crate) struct TilesConv<const DIGITS: usize> {
    amx: Amx,
    geometry: ConvGeometry,
    planes: Planes,
    /// Where each row of the im2col matrix starts in the planes of a group; the last
    /// block is filled up.
    starts: Vec<u32>,
    rounding: Rounding,
    /// For each group, panel of outputs and block of 64 rows two tiles, each of all digits,
    /// the high ones first: `(outputs, rows)`.
    weights: Buffer<i8>,
    /// The sum of each output's integers.
    sums: Vec<i32>,
    /// What 1 stands for in the weights of each output.
    units: Vec<f32>,
    bias: Vec<f32>,
}

impl<const DIGITS: usize> TilesConv<DIGITS> {
    /// Columns of a panel: with two digits there is one tile of each.
    const PANEL: usize = COLUMNS / DIGITS;

    /// Multiplications of a block of a panel of weights and one of columns.
    const MULTIPLICATIONS: usize = if DIGITS == 1 { 4 } else { 6 };

    pub(crate) fn candidate<'a>(amx: Amx, layer: &'a ConvLayer<'a>) -> Option<Candidate<'a>> {
        // What is dense already is to be exact.
        if !matches!(layer.weights, Weights::ProductQuantized { .. }) {
            return None;
        }
        let g = layer.geometry;
        let planes = Planes::new(g, g.out_size);
        // Rows of the matrix are addressed with 32 bits.
        let planes_len = planes.len().checked_mul(g.group_in_channels())?;
        if depth(g) > MAX_DEPTH || u32::try_from(planes_len).is_err() {
            return None;
        }
        let blocks = depth(g).div_ceil(TILE_ROW) as f64;
        let panels = g.group_out_channels().div_ceil(OUTPUTS) as f64;
        let columns = planes.positions(g.out_size).next_multiple_of(COLUMNS) as f64;
        let multiply = MULTIPLY_CYCLES * Self::MULTIPLICATIONS as f64 / Self::PANEL as f64;
        // Packing 64 rows; what each input and each sum takes.
        let pack = 3.0 * DIGITS as f64;
        let cycles = columns * blocks * (panels * multiply + pack)
            + 0.5 * planes_len as f64
            + columns * panels * OUTPUTS as f64 * 0.4;
        let cycles = g.groups as f64 * cycles;
        Some(Candidate::new(cycles, move || Self::new(amx, layer)))
    }

    fn new(amx: Amx, layer: &ConvLayer<'_>) -> Self {
        let geometry = layer.geometry.clone();
        let planes = Planes::new(&geometry, geometry.out_size);
        let depth = depth(&geometry);
        let channels = 0..geometry.group_in_channels();
        let mut starts: Vec<u32> = channels
            .flat_map(|channel| {
                let first = channel * planes.len();
                planes.taps().iter().map(move |tap| (first + tap) as u32)
            })
            .collect();
        starts.resize(depth.next_multiple_of(TILE_ROW), 0);
        let blocks = starts.len() / TILE_ROW;

        let outputs = geometry.group_out_channels();
        let panels = outputs.div_ceil(OUTPUTS);
        let dense = layer.dense_weights();
        let greatest = if DIGITS == 1 { 127.0 } else { GREATEST };
        let mut weights =
            Buffer::zeroed(geometry.groups * panels * blocks * 2 * DIGITS * TILE_BYTES);
        let mut units = Vec::with_capacity(geometry.out_channels);
        let mut sums = Vec::with_capacity(geometry.out_channels);
        let mut integers = vec![0i32; depth];
        for (o, dense) in dense.chunks_exact(depth).enumerate() {
            let scale = greatest / peak(dense);
            // Without any weights.
            let scale = if scale.is_finite() { scale } else { 1.0 };
            for (integer, weight) in integers.iter_mut().zip(dense) {
                *integer = (weight * scale).round_ties_even() as i32;
            }
            units.push(1.0 / scale);
            sums.push(integers.iter().sum());
            let (group, o) = (o / outputs, o % outputs);
            let panel = group * panels + o / OUTPUTS;
            let (tile, row) = (o % OUTPUTS / TILE, o % TILE);
            for (block, integers) in integers.chunks(TILE_ROW).enumerate() {
                let first = ((panel * blocks + block) * 2 + tile) * DIGITS;
                for digit in 0..DIGITS {
                    let at = (first + digit) * TILE_BYTES + row * TILE_ROW;
                    let bytes = &mut weights[at..][..integers.len()];
                    for (byte, integer) in bytes.iter_mut().zip(integers) {
                        *byte = if digit + 1 == DIGITS {
                            *integer as i8
                        } else {
                            ((integer + 128) >> 8) as i8
                        };
                    }
                }
            }
        }
        Self {
            amx,
            starts,
            planes,
            rounding: if DIGITS == 1 {
                Rounding::Range
            } else {
                Rounding::Peak(GREATEST)
            },
            weights,
            sums,
            units,
            bias: layer.bias_or_zeros(),
            geometry,
        }
    }

    /// Blocks of 64 rows of the matrices.
    fn blocks(&self) -> usize {
        self.starts.len() / TILE_ROW
    }

    /// Bytes of all planes of a group with one digit; some columns more may be read.
    fn planes_len(&self) -> usize {
        (self.geometry.group_in_channels() * self.planes.len() + COLUMNS).next_multiple_of(TILE_ROW)
    }

    /// Columns of the im2col matrix.
    fn columns(&self) -> usize {
        self.planes.positions(self.geometry.out_size)
    }

    /// Columns packed at a time.
    fn block_columns(&self) -> usize {
        let most = PACKED_BYTES / (DIGITS * self.starts.len()) / COLUMNS * COLUMNS;
        self.columns()
            .next_multiple_of(COLUMNS)
            .min(most.max(COLUMNS))
    }

    /// float32 elements of each part of the scratch: one plane, planes of bytes, packed
    /// columns, sums of a panel of outputs.
    fn scratch_parts(&self) -> [usize; 4] {
        let panels = self.block_columns() / Self::PANEL;
        [
            self.planes.len().next_multiple_of(TILE),
            DIGITS * self.planes_len() / 4,
            panels * self.blocks() * 2 * TILE_BYTES / 4,
            panels * size_of::<Sums>() / 4,
        ]
    }
}

impl<const DIGITS: usize> Kernel for TilesConv<DIGITS> {
    fn name(&self) -> &str {
        if DIGITS == 1 {
            "x86_64-avx512amx-i8-tiles"
        } else {
            "x86_64-avx512amx-i16-tiles"
        }
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

impl<const DIGITS: usize> TilesConv<DIGITS> {
    /// Responses of `n` images, not less than `floor`.
    fn images(&self, n: usize, input: &[f32], output: &mut [f32], scratch: &mut [f32], floor: f32) {
        let g = &self.geometry;
        let group_in = g.group_in_channels() * g.in_pixels();
        let group_out = g.group_out_channels() * g.out_pixels();
        let [plane_len, bytes_len, packed_len, sums_len] = self.scratch_parts();
        let (plane, rest) = scratch.split_at_mut(plane_len);
        let (bytes, rest) = rest.split_at_mut(bytes_len);
        let (packed, rest) = rest.split_at_mut(packed_len);
        let plane = &mut plane[..self.planes.len()];
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(bytes);
        let packed: &mut [u8] = bytemuck::cast_slice_mut(packed);
        let sums: &mut [Sums] = bytemuck::cast_slice_mut(&mut rest[..sums_len]);
        let tiles = self.amx.tiles();
        let inputs = input.chunks_exact(group_in).take(n * g.groups);
        let outputs = output.chunks_exact_mut(group_out);
        for (i, (input, output)) in inputs.zip(outputs).enumerate() {
            let scale = self.rounding.scale(self.amx.simd().call(Extremes(input)));
            let channels = input.chunks_exact(g.in_pixels());
            let (high, low) = bytes.split_at_mut(self.planes_len());
            for (c, channel) in channels.enumerate() {
                self.planes.fill(self.amx.simd(), g, [0, 0], channel, plane);
                let place = c * plane.len()..(c + 1) * plane.len();
                if DIGITS == 1 {
                    let zero = scale.zero - 128;
                    self.amx.bytes(plane, scale.factor, zero, &mut high[place]);
                } else {
                    let targets = [&mut high[place.clone()], &mut low[place]];
                    self.amx.digits(plane, scale.factor, targets);
                }
            }
            for first in (0..self.columns()).step_by(self.block_columns()) {
                let columns = first..(first + self.block_columns()).min(self.columns());
                self.pack(&columns, bytes, packed);
                self.products(
                    &tiles,
                    i % g.groups,
                    &columns,
                    packed,
                    sums,
                    (scale, floor),
                    output,
                );
            }
        }
    }

    /// Pack columns in panels, each of two tiles for each block.
    fn pack(&self, columns: &Range<usize>, bytes: &[u8], packed: &mut [u8]) {
        let panel_len = self.blocks() * 2 * TILE_BYTES;
        let last = self.starts.iter().max().map_or(0, |start| *start as usize);
        for (i, first) in columns.clone().step_by(COLUMNS).enumerate() {
            // Of one digit the two tiles of a panel, of two digits those of two panels.
            let panels = &mut packed[i * DIGITS * panel_len..][..DIGITS * panel_len];
            for digit in 0..DIGITS {
                let bytes = &bytes[digit * self.planes_len()..][..self.planes_len()];
                assert!(last + first + COLUMNS <= bytes.len());
                let target = panels.as_mut_ptr();
                let second = if DIGITS == 1 { TILE_BYTES } else { panel_len };
                // SAFETY: as asserted, a row of which the last column may be packed has
                // COLUMNS more bytes. The targets are the tiles of all blocks of one panel,
                // or those of one digit of two panels.
                unsafe {
                    let target = target.add(digit * TILE_BYTES);
                    let targets = [target, target.add(second)];
                    let source = bytes.as_ptr().add(first);
                    self.amx
                        .interleave(source, &self.starts, targets, 2 * TILE_BYTES);
                }
            }
        }
    }

    /// Compute some columns of one group of one image.
    #[expect(clippy::too_many_arguments, reason = "a part of a loop's body")]
    fn products(
        &self,
        tiles: &Tiles,
        group: usize,
        columns: &Range<usize>,
        packed: &[u8],
        sums: &mut [Sums],
        (scale, floor): (Scale, f32),
        output: &mut [f32],
    ) {
        let g = &self.geometry;
        let blocks = self.blocks();
        let block_len = 2 * DIGITS * TILE_BYTES;
        let panels = g.group_out_channels().div_ceil(OUTPUTS);
        let chunk = blocks.div_ceil(blocks.div_ceil(CHUNK / DIGITS));
        for panel in 0..panels {
            let weights = &self.weights[(group * panels + panel) * blocks * block_len..];
            for first in (0..blocks).step_by(chunk) {
                let n = chunk.min(blocks - first);
                let weights = &weights[first * block_len..][..n * block_len];
                let of_panels = packed.chunks_exact(blocks * 2 * TILE_BYTES);
                let of_panels = of_panels.take(columns.len().div_ceil(Self::PANEL));
                for (packed, sums) in of_panels.zip(&mut *sums) {
                    let packed = &packed[first * 2 * TILE_BYTES..][..n * 2 * TILE_BYTES];
                    let (weights, packed) = (weights.as_ptr(), packed.as_ptr());
                    // SAFETY: both were just cut to `n` blocks.
                    unsafe {
                        if DIGITS == 1 {
                            tiles.multiply(weights, packed, n, first == 0, sums);
                        } else {
                            tiles.multiply_digits(weights, packed, n, first == 0, sums);
                        }
                    }
                }
            }
            let outputs = panel * OUTPUTS..((panel + 1) * OUTPUTS).min(g.group_out_channels());
            self.amx.simd().call(Write {
                kernel: self,
                first: group * g.group_out_channels() + outputs.start,
                columns: columns.clone(),
                sums,
                scale,
                floor,
                output: &mut output[outputs.start * g.out_pixels()..outputs.end * g.out_pixels()],
            });
        }
    }
}

/// Make responses of the sums of a panel of outputs.
struct Write<'a, const DIGITS: usize> {
    kernel: &'a TilesConv<DIGITS>,
    /// First of the outputs, among those of all groups.
    first: usize,
    columns: Range<usize>,
    sums: &'a [Sums],
    scale: Scale,
    floor: f32,
    /// Maps of the outputs that there are.
    output: &'a mut [f32],
}

impl<const DIGITS: usize> Task for Write<'_, DIGITS> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let kernel = self.kernel;
        let g = &kernel.geometry;
        let size = [kernel.planes.width(), g.out_size[1]];
        let floor = simd.splat(self.floor);
        let mut runs = [Run::default(); MAX_PANEL_COLUMNS + 1];
        let panel = TilesConv::<DIGITS>::PANEL;
        for (first, sums) in self.columns.clone().step_by(panel).zip(self.sums) {
            let positions = first..(first + panel).min(self.columns.end);
            let runs = runs_of(positions, size, [g.out_pixels(), S::LANES], &mut runs);
            let outputs = self.output.chunks_exact_mut(g.out_pixels());
            for (i, output) in outputs.enumerate() {
                let bias = kernel.bias[self.first + i];
                // What stands for 0, less 128, was multiplied with all weights.
                let zero = if DIGITS == 1 {
                    kernel.sums[self.first + i] * (128 - self.scale.zero)
                } else {
                    0
                };
                let mut halves = [simd.splat(0.0); 2];
                for (j, half) in halves.iter_mut().enumerate() {
                    let mut sums = sums[2 * (i / TILE) + j][i % TILE];
                    for sum in &mut sums {
                        *sum += zero;
                    }
                    // SAFETY: there are as many sums as a vector has lanes on this level.
                    *half = simd.float_i32(unsafe { simd.load_i32(sums.as_ptr()) });
                }
                let mut unit = kernel.units[self.first + i] * self.scale.unit;
                if DIGITS == 2 {
                    halves = [simd.mul_add(halves[0], simd.splat(256.0), halves[1]); 2];
                    unit *= 256.0;
                }
                let (unit, bias) = (simd.splat(unit), simd.splat(bias));
                for run in runs {
                    let response = simd.mul_add(halves[run.half], unit, bias);
                    let response = simd.max(response, floor);
                    // SAFETY: the run's outputs lie within the map, see `runs_of`, of which
                    // `output` has all pixels.
                    unsafe {
                        let target = output.as_mut_ptr().wrapping_offset(run.offset);
                        simd.store_range(target, response, run.begin, run.end);
                    }
                }
            }
        }
    }
}
