//! Convolution with decoded weights on AMX: a product of matrices of bytes.
//!
//! It is the product of [`gemm`](super::gemm), of the weights and the im2col matrix, in
//! tiles: a multiplication makes 16,384 products of bytes in 16 cycles, where VNNI makes
//! 2,048. With 8 bits that is more than look-ups save; with 16 it often is. Weights are
//! decoded then, which takes more memory, not more of a file.
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
//! greatest weight is 2^30. It has no preferred sign: with Gaussian weights and inputs it
//! is about twice what rounding them to 16 bits adds, all together less than 3e-4 of the
//! responses.
//!
//! # Why nothing overflows
//!
//! A product of bytes with signs is at most 2^14. A sum has one of them for each of
//! [`MAX_DEPTH`] rows of the matrix, or two: at most 2^30. What is taken away is at most
//! 2^14 for each row, too.

use std::ops::Range;

use super::gemm::{Extremes, Rounding, Scale, depth, peak};
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

/// Bytes of the columns packed at a time, roughly: half of a 2 MiB L2 cache, which no CPU
/// with AMX has less of.
const PACKED_BYTES: usize = 1 << 20;

/// Panels of columns whose responses are written together: so many columns of an output lie
/// side by side, and their sums are still in L1.
const WRITTEN_TOGETHER: usize = 8;

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
    /// The sum of each output's integers, with one digit.
    sums: Vec<i32>,
    /// What 1 stands for in the weights of each output.
    units: Vec<f32>,
    bias: Vec<f32>,
}

impl<const DIGITS: usize> TilesConv<DIGITS> {
    /// Columns of a panel: with two digits there is one tile of each.
    const PANEL: usize = COLUMNS / DIGITS;

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
        // Multiplying a block, with loads from L2; packing it; each input and each output.
        let multiply = if DIGITS == 1 { 4.0 * 37.0 } else { 6.0 * 34.0 };
        let pack = 6.0 * DIGITS as f64;
        let cycles = columns * blocks * (panels * multiply / Self::PANEL as f64 + pack)
            + 1.5 * (planes_len + g.group_out_channels() * g.out_pixels()) as f64;
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
        let mut bytes = [vec![0u8; depth], vec![0u8; depth]];
        for (o, dense) in dense.chunks_exact(depth).enumerate() {
            let scale = greatest / peak(dense);
            // Without any weights.
            let scale = if scale.is_finite() { scale } else { 1.0 };
            let [high, low] = &mut bytes;
            if DIGITS == 1 {
                amx.bytes(dense, scale, 0, high);
            } else {
                amx.digits(dense, scale, [high, low]);
            }
            units.push(1.0 / scale);
            sums.push(high.iter().map(|byte| i32::from(byte.cast_signed())).sum());
            let (group, o) = (o / outputs, o % outputs);
            let panel = group * panels + o / OUTPUTS;
            let (tile, row) = (o % OUTPUTS / TILE, o % TILE);
            for (digit, bytes) in bytes.iter().take(DIGITS).enumerate() {
                for (block, bytes) in bytes.chunks(TILE_ROW).enumerate() {
                    let tile = ((panel * blocks + block) * 2 + tile) * DIGITS + digit;
                    let target = &mut weights[tile * TILE_BYTES + row * TILE_ROW..];
                    target[..bytes.len()].copy_from_slice(bytemuck::cast_slice(bytes));
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
    /// columns, sums.
    fn scratch_parts(&self) -> [usize; 4] {
        let panels = self.block_columns() / Self::PANEL;
        [
            self.planes.len().next_multiple_of(TILE),
            DIGITS * self.planes_len() / 4,
            panels * self.blocks() * 2 * TILE_BYTES / 4,
            WRITTEN_TOGETHER * size_of::<Sums>() / 4,
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
        let plane = &mut plane[..self.planes.len()];
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(bytes);
        let (packed, rest) = rest.split_at_mut(packed_len);
        let packed: &mut [u8] = bytemuck::cast_slice_mut(packed);
        let sums: &mut [Sums] = bytemuck::cast_slice_mut(&mut rest[..sums_len]);
        let tiles = self.amx.tiles();
        let inputs = input.chunks_exact(group_in).take(n * g.groups);
        let outputs = output.chunks_exact_mut(group_out);
        for (i, (input, output)) in inputs.zip(outputs).enumerate() {
            let scale = self.rounding.scale(self.amx.simd().call(Extremes(input)));
            let channels = input.chunks_exact(g.in_pixels());
            let (high, low) = bytes.split_at_mut(self.planes_len());
            let len = plane.len();
            for (c, channel) in channels.enumerate() {
                let place = c * len..(c + 1) * len;
                let of_low = if DIGITS == 1 { 0..0 } else { place.clone() };
                self.round(channel, scale, plane, [&mut high[place], &mut low[of_low]]);
            }
            for first in (0..self.columns()).step_by(self.block_columns()) {
                let columns = first..(first + self.block_columns()).min(self.columns());
                self.pack(&columns, bytes, packed);
                let block = Block {
                    group: i % g.groups,
                    columns,
                    scale,
                    floor,
                };
                self.products(&tiles, &block, packed, sums, output);
            }
        }
    }

    /// Make bytes of a channel: a plane of each digit.
    fn round(&self, channel: &[f32], scale: Scale, plane: &mut [f32], targets: [&mut [u8]; 2]) {
        let g = &self.geometry;
        let zero = scale.zero - 128;
        let round = |values: &[f32], [high, low]: [&mut [u8]; 2]| {
            if DIGITS == 1 {
                self.amx.bytes(values, scale.factor, zero, high);
            } else {
                self.amx.digits(values, scale.factor, [high, low]);
            }
        };
        if g.stride != [1, 1] {
            self.planes.fill(self.amx.simd(), g, [0, 0], channel, plane);
            round(plane, targets);
            return;
        }
        // The plane is the channel and its padding.
        let [high, low] = targets;
        high.fill(if DIGITS == 1 {
            zero.to_le_bytes()[0]
        } else {
            0
        });
        low.fill(0);
        for (y, row) in channel.chunks_exact(g.in_size[1]).enumerate() {
            let first = (y + g.padding.top) * self.planes.width() + g.padding.left;
            let place = first..first + row.len();
            let of_low = if DIGITS == 1 { 0..0 } else { place.clone() };
            round(row, [&mut high[place], &mut low[of_low]]);
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

    /// Compute a block of columns.
    fn products(
        &self,
        tiles: &Tiles,
        block: &Block,
        packed: &[u8],
        sums: &mut [Sums],
        output: &mut [f32],
    ) {
        let g = &self.geometry;
        let panel_len = self.blocks() * 2 * TILE_BYTES;
        let panels = g.group_out_channels().div_ceil(OUTPUTS);
        let weights = self.weights.chunks_exact(DIGITS * panel_len);
        let weights = weights.skip(block.group * panels).take(panels);
        let maps = output.chunks_mut(OUTPUTS * g.out_pixels());
        let columns = block.columns.clone();
        for (panel, (weights, output)) in weights.zip(maps).enumerate() {
            let together = WRITTEN_TOGETHER * Self::PANEL;
            let packed = packed.chunks(WRITTEN_TOGETHER * panel_len);
            for (first, packed) in columns.clone().step_by(together).zip(packed) {
                let positions = first..(first + together).min(columns.end);
                let packed = packed.chunks_exact(panel_len);
                let packed = packed.take(positions.len().div_ceil(Self::PANEL));
                for (packed, sums) in packed.zip(&mut *sums) {
                    let (weights, packed) = (weights.as_ptr(), packed.as_ptr());
                    // SAFETY: both have tiles for all blocks.
                    unsafe { tiles.multiply::<DIGITS>(weights, packed, self.blocks(), sums) }
                }
                self.amx.simd().call(Write {
                    kernel: self,
                    first: block.group * g.group_out_channels() + panel * OUTPUTS,
                    positions,
                    sums,
                    scale: block.scale,
                    floor: block.floor,
                    output,
                });
            }
        }
    }
}

/// Columns of one group of one image.
struct Block {
    group: usize,
    columns: Range<usize>,
    /// Of the inputs.
    scale: Scale,
    /// The least response.
    floor: f32,
}

/// Make responses of the sums of some columns, for a panel of outputs.
struct Write<'a, const DIGITS: usize> {
    kernel: &'a TilesConv<DIGITS>,
    /// First of the outputs, among those of all groups.
    first: usize,
    /// Of the columns.
    positions: Range<usize>,
    /// Of their panels.
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
        let (row_len, width) = (kernel.planes.width(), g.out_size[1]);
        let floor = simd.splat(self.floor);
        let panel = TilesConv::<DIGITS>::PANEL;
        let n = self.positions.len();
        let first_row = self.positions.start / row_len;
        let first_column = self.positions.start % row_len;
        let mut responses = [0.0f32; COLUMNS * WRITTEN_TOGETHER];
        let panels = self.sums.iter().take(n.div_ceil(panel));
        for (i, output) in self.output.chunks_exact_mut(g.out_pixels()).enumerate() {
            let mut unit = kernel.units[self.first + i] * self.scale.unit;
            let bias = simd.splat(kernel.bias[self.first + i]);
            if DIGITS == 2 {
                unit *= 256.0;
            }
            let unit = simd.splat(unit);
            for (sums, responses) in panels.clone().zip(responses.chunks_exact_mut(panel)) {
                let mut halves = [simd.splat(0.0); 2];
                for (j, half) in halves.iter_mut().enumerate() {
                    let mut sums = sums[i / TILE * 2 + j][i % TILE];
                    if DIGITS == 1 {
                        // What stands for 0, less 128, was multiplied with all weights.
                        let zero = kernel.sums[self.first + i] * (128 - self.scale.zero);
                        for sum in &mut sums {
                            *sum += zero;
                        }
                    }
                    // SAFETY: there are as many sums as a vector has lanes on this level.
                    *half = simd.float_i32(unsafe { simd.load_i32(sums.as_ptr()) });
                }
                if DIGITS == 2 {
                    halves[0] = simd.mul_add(halves[0], simd.splat(256.0), halves[1]);
                }
                for (response, half) in responses.chunks_exact_mut(TILE).zip(halves) {
                    simd.store_first(response, simd.max(simd.mul_add(half, unit, bias), floor));
                }
            }
            // Of the positions of a row the first are outputs.
            let (mut at, mut y, mut x) = (0, first_row, first_column);
            while at < n {
                let len = (row_len - x).min(n - at);
                if x < width {
                    let outputs = &mut output[y * width + x..][..len.min(width - x)];
                    let responses = responses[at..].chunks(S::LANES);
                    for (outputs, responses) in outputs.chunks_mut(S::LANES).zip(responses) {
                        simd.store_first(outputs, simd.load_first(responses));
                    }
                }
                at += len;
                (y, x) = (y + 1, 0);
            }
        }
    }
}
