//! Convolution with decoded weights on AMX: a product of matrices of bytes.
//!
//! Weights are decoded, which takes more memory, not more of a file. A multiplication of
//! tiles makes 16,384 products of bytes in 16 cycles, where VNNI makes 2,048: with 8 bits
//! that is more than look-ups save; with 16 it often is.
//!
//! # Tiles of pixels
//!
//! Inputs become an image of bytes in which the channels of a pixel lie side by side. What
//! an output reads of it are *runs*: for each tap the channels of a pixel, or, if these are
//! no whole rows of a tile, for each row of the kernel those of all its pixels. So a block
//! of a run, 64 bytes for each of up to 16 outputs that are neighbours in a row of the map,
//! is a tile as it lies in the image: there is no im2col matrix. All blocks of an output
//! together are multiplied with a panel of weights, which is two tiles wide. A multiplication
//! takes a cycle for each pixel, so the pixels of a row are split evenly. A product is of
//! the tiles of two rows, one below the other: in part they read the same pixels, and
//! windows of max-pooling lie in them.
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
//! [`MAX_DEPTH`] weights of an output, or two: at most 2^30. Other weights of a tile are 0.
//! What is taken away is at most 2^14 for each weight, too.

use std::ops::Range;

use super::gemm::{Extremes, Rounding, Scale, depth, peak};
use super::{Candidate, ConvLayer, Kernel, Weights};
use crate::geometry::ConvGeometry;
use crate::isa::amx::{Amx, Pixels, Sums, TILE, TILE_QUADS, Tiles};
use crate::isa::{Simd, Task};
use crate::memory::Buffer;

/// Products per output.
const MAX_DEPTH: usize = 1 << 15;

/// Quads of an image, a GiB: 32 bits are enough for where blocks start.
const MAX_QUADS: usize = 1 << 28;

/// Channels of a quad: bytes that are multiplied together.
const QUAD: usize = 4;

/// Greatest integer of two digits.
const GREATEST: f32 = 32_639.0;

/// Quads of the image that all panels of weights are multiplied with before the next ones,
/// roughly: half of a 2 MiB L2 cache, which no CPU with AMX has less of.
const BLOCK_QUADS: usize = (1 << 20) / QUAD;

/// Products whose responses are written together, while their sums are in L1.
const WRITTEN_TOGETHER: usize = 8;

/// Pixels of an input that become bytes at a time, roughly.
const STRIP: usize = 256;

/// See the module's documentation. `DIGITS` is 1 for 8 bits, 2 for 16.
#[derive(Debug)]
pub(crate) struct TilesConv<const DIGITS: usize> {
    amx: Amx,
    geometry: ConvGeometry,
    image: Image,
    /// Where in the image the rows of each block start, from an output's first pixel on.
    starts: Vec<u32>,
    rounding: Rounding,
    /// For each group, panel of outputs and block two tiles, of other outputs or of high and
    /// of low digits: `(rows, outputs)`.
    weights: Buffer<u32>,
    /// For each panel of each group.
    panels: Vec<Panel>,
}

/// What makes responses of the sums of a panel of outputs.
#[derive(Clone, Copy, Debug)]
struct Panel {
    /// With one digit, what the zero adds to the sums if it is 1.
    zeros: [f32; 2 * TILE],
    /// What 1 stands for in the weights.
    units: [f32; 2 * TILE],
    bias: [f32; 2 * TILE],
}

/// The bytes of the channels of a group, `(rows, columns, quads)`, padding included, and
/// how outputs read it.
#[derive(Clone, Copy, Debug)]
struct Image {
    /// Quads of a pixel.
    quads: usize,
    /// From a pixel to the next one. In whole rows of tiles it is an odd number of them, so
    /// that those of 16 pixels do not compete for the same places in L1.
    pixel: usize,
    /// From a row to the next one.
    row: usize,
    /// Taps of a run: one, or those of a row of the kernel.
    run_taps: usize,
    /// Tiles of a row of the map, and pixels of each; the last one may have less.
    tiles: usize,
    tile_pixels: usize,
    /// Quads of all pixels, and what else is read behind the last one: pixels of a tile
    /// behind those of the map, quads of a block behind those of a run.
    len: usize,
}

impl Image {
    fn new(g: &ConvGeometry) -> Self {
        let quads = g.group_in_channels().div_ceil(QUAD);
        let whole = quads.is_multiple_of(TILE);
        let pixel = if whole {
            ((quads / TILE) | 1) * TILE
        } else {
            quads
        };
        let tiles = g.out_size[1].div_ceil(TILE);
        let mut image = Self {
            quads,
            pixel,
            row: g.padded_size()[1] * pixel,
            run_taps: if whole || g.dilation[1] > 1 {
                1
            } else {
                g.kernel[1]
            },
            tiles,
            tile_pixels: g.out_size[1].div_ceil(tiles),
            len: 0,
        };
        let last = image.tile(g, [g.out_size[0] - 1, tiles - 1]);
        let last = last + (image.tile_pixels - 1) * g.stride[1] * pixel;
        let read = last + image.starts(g).max().unwrap_or(0) + TILE;
        let all = g.padded_size()[0] * image.row;
        image.len = read.max(all).next_multiple_of(TILE);
        image
    }

    /// Blocks of a run.
    fn run_blocks(&self) -> usize {
        (self.run_taps * self.quads).div_ceil(TILE)
    }

    /// Blocks of an output.
    fn blocks(&self, g: &ConvGeometry) -> usize {
        g.taps() / self.run_taps * self.run_blocks()
    }

    /// Number of a quad of a tap among the rows of all blocks.
    fn weights_row(&self, tap: usize, quad: usize) -> usize {
        let (run, row) = (tap / self.run_taps, tap % self.run_taps * self.quads + quad);
        (run * self.run_blocks() + row / TILE) * TILE + row % TILE
    }

    /// Where the rows of each block start, from an output's first pixel on.
    fn starts(&self, g: &ConvGeometry) -> impl Iterator<Item = usize> {
        let [dy, dx] = g.dilation;
        (0..g.taps()).step_by(self.run_taps).flat_map(move |tap| {
            (0..self.run_blocks()).map(move |block| {
                let [y, x] = [tap / g.kernel[1], tap % g.kernel[1]];
                y * dy * self.row + x * dx * self.pixel + block * TILE
            })
        })
    }

    /// The upper row and the tile of a product.
    fn place(&self, product: usize) -> [usize; 2] {
        [product / self.tiles * 2, product % self.tiles]
    }

    /// Where the first pixel of a tile of a row of the map is.
    fn tile(&self, g: &ConvGeometry, [y, tile]: [usize; 2]) -> usize {
        y * g.stride[0] * self.row + tile * self.tile_pixels * g.stride[1] * self.pixel
    }
}

impl<const DIGITS: usize> TilesConv<DIGITS> {
    /// Outputs of a panel.
    const OUTPUTS: usize = 2 * TILE / DIGITS;

    pub(crate) fn candidate<'a>(amx: Amx, layer: &'a ConvLayer<'a>) -> Option<Candidate<'a>> {
        // What is dense already is to be exact.
        if !matches!(layer.weights, Weights::ProductQuantized { .. }) {
            return None;
        }
        let g = layer.geometry;
        let image = Image::new(g);
        let pixels = g.padded_size().iter().product::<usize>();
        if depth(g) > MAX_DEPTH || image.len > MAX_QUADS {
            return None;
        }
        let products = image.tiles * g.out_size[0].div_ceil(2);
        let panels = g.group_out_channels().div_ceil(Self::OUTPUTS);
        // For a block of a product: multiplications, or loads, of which some straddle lines
        // where pixels are not whole ones. Beside that, storing sums, and bytes of each input.
        let pixel = if DIGITS == 1 { 6.2 } else { 10.8 };
        let aligned = image.pixel.is_multiple_of(TILE);
        let block = pixel * image.tile_pixels.max(12) as f64 * if aligned { 1.0 } else { 1.2 };
        let product = image.blocks(g) as f64 * block + 100.0;
        let inputs = pixels * g.group_in_channels();
        let cycles = (products * panels) as f64 * product + 1.2 * inputs as f64;
        let cycles = g.groups as f64 * cycles;
        Some(Candidate::new(cycles, move || Self::new(amx, layer)))
    }

    fn new(amx: Amx, layer: &ConvLayer<'_>) -> Self {
        let geometry = layer.geometry.clone();
        let image = Image::new(&geometry);
        let mut kernel = Self {
            amx,
            image,
            starts: image.starts(&geometry).map(|start| start as u32).collect(),
            rounding: if DIGITS == 1 {
                Rounding::Range
            } else {
                Rounding::Peak(GREATEST)
            },
            weights: Buffer::default(),
            panels: Vec::new(),
            geometry,
        };
        kernel.pack(&layer.dense_weights(), &layer.bias_or_zeros());
        kernel
    }

    fn pack(&mut self, dense: &[f32], bias: &[f32]) {
        let g = &self.geometry;
        let (taps, blocks) = (g.taps(), self.starts.len());
        let panels = g.groups * self.group_panels();
        self.weights = Buffer::zeroed(panels * blocks * 2 * TILE_QUADS);
        self.panels = vec![
            Panel {
                zeros: [0.0; 2 * TILE],
                units: [0.0; 2 * TILE],
                bias: [0.0; 2 * TILE],
            };
            panels
        ];
        let greatest = if DIGITS == 1 { 127.0 } else { GREATEST };
        // Where the weights of the first output lie for each quad and tap.
        let quads = 0..self.image.quads;
        let places: Vec<usize> = quads
            .flat_map(|quad| (0..taps).map(move |tap| (tap, quad)))
            .map(|(tap, quad)| self.image.weights_row(tap, quad))
            .map(|row| (row / TILE * 2 * TILE + row % TILE) * TILE)
            .collect();
        let absent = vec![0.0; taps];
        let mut digits = [vec![0u32; taps], vec![0u32; taps]];
        for (o, (dense, bias)) in dense.chunks_exact(depth(g)).zip(bias).enumerate() {
            let scale = greatest / peak(dense);
            // Without any weights.
            let scale = if scale.is_finite() { scale } else { 1.0 };
            let (group, o) = (o / g.group_out_channels(), o % g.group_out_channels());
            let (panel, o) = (
                group * self.group_panels() + o / Self::OUTPUTS,
                o % Self::OUTPUTS,
            );
            let first = panel * blocks * 2 * TILE_QUADS + o / TILE * TILE_QUADS + o % TILE;
            let mut sum = 0;
            let quads = dense.chunks(QUAD * taps);
            for (dense, places) in quads.zip(places.chunks_exact(taps)) {
                let mut channels = dense.chunks_exact(taps);
                let channels = [(); QUAD].map(|()| channels.next().unwrap_or(&absent));
                let [high, low] = &mut digits;
                self.round(channels, scale, 0, [high, low]);
                for (digit, weights) in digits.iter().take(DIGITS).enumerate() {
                    for (place, weights) in places.iter().zip(weights) {
                        self.weights[first + digit * TILE_QUADS + place] = *weights;
                    }
                }
                if DIGITS == 1 {
                    let bytes = digits[0].iter().flat_map(|weights| weights.to_le_bytes());
                    sum += bytes.map(|byte| i32::from(byte.cast_signed())).sum::<i32>();
                }
            }
            let panel = &mut self.panels[panel];
            panel.zeros[o] = sum as f32;
            panel.units[o] = 1.0 / scale;
            panel.bias[o] = *bias;
        }
    }

    /// Panels of the outputs of a group.
    fn group_panels(&self) -> usize {
        self.geometry.group_out_channels().div_ceil(Self::OUTPUTS)
    }

    /// Make integers of four rows of values, in quads, for each digit.
    fn round(&self, rows: [&[f32]; QUAD], factor: f32, zero: i32, [high, low]: [&mut [u32]; 2]) {
        if DIGITS == 1 {
            self.amx.bytes(rows, factor, zero, high);
        } else {
            self.amx.digits(rows, factor, [high, low]);
        }
    }

    /// Pairs of rows of the map that are multiplied with all weights before the next ones.
    fn block_pairs(&self) -> usize {
        let pair = 2 * DIGITS * self.geometry.stride[0] * self.image.row;
        (BLOCK_QUADS / pair).max(1)
    }

    /// Rows of an input that become bytes at a time.
    fn strip_rows(&self) -> usize {
        (STRIP / self.geometry.in_size[1]).clamp(1, self.geometry.in_size[0])
    }

    /// Quads of a strip; more are read.
    fn strip_stride(&self) -> usize {
        (self.strip_rows() * self.geometry.in_size[1]).next_multiple_of(TILE) + TILE
    }

    /// 32-bit elements of each part of the scratch: quads of a strip, the image, sums; all
    /// but the last for each digit.
    fn scratch_parts(&self) -> [usize; 3] {
        [
            DIGITS * TILE * self.strip_stride(),
            DIGITS * self.image.len,
            WRITTEN_TOGETHER * size_of::<Sums>() / size_of::<i32>(),
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
        let finish = Finish {
            floor: f32::NEG_INFINITY,
            pooled: false,
        };
        self.images(n, input, output, scratch, finish);
    }

    fn run_relu(&self, n: usize, input: &[f32], output: &mut [f32], scratch: &mut [f32]) -> bool {
        let finish = Finish {
            floor: 0.0,
            pooled: false,
        };
        self.images(n, input, output, scratch, finish);
        true
    }

    fn pools(&self) -> bool {
        // Windows may not begin in one tile and end in another.
        self.image.tiles == 1 || self.image.tile_pixels.is_multiple_of(2)
    }

    fn run_pooled(
        &self,
        relu: bool,
        n: usize,
        input: &[f32],
        output: &mut [f32],
        scratch: &mut [f32],
    ) {
        let finish = Finish {
            floor: if relu { 0.0 } else { f32::NEG_INFINITY },
            pooled: true,
        };
        self.images(n, input, output, scratch, finish);
    }
}

/// What happens to responses before they are written.
#[derive(Clone, Copy, Debug)]
struct Finish {
    /// None is less.
    floor: f32,
    /// Only the greatest of each window of 2 x 2 is written.
    pooled: bool,
}

impl Finish {
    /// Extent of the map that is written.
    fn size(self, g: &ConvGeometry) -> [usize; 2] {
        if self.pooled {
            g.out_size.map(|extent| extent / 2)
        } else {
            g.out_size
        }
    }
}

impl<const DIGITS: usize> TilesConv<DIGITS> {
    /// Responses of `n` images.
    fn images(
        &self,
        n: usize,
        input: &[f32],
        output: &mut [f32],
        scratch: &mut [f32],
        finish: Finish,
    ) {
        let g = &self.geometry;
        let group_in = g.group_in_channels() * g.in_pixels();
        let group_out = g.group_out_channels() * finish.size(g).iter().product::<usize>();
        let [strip_len, image_len, sums_len] = self.scratch_parts();
        let (strip, rest) = scratch.split_at_mut(strip_len);
        let (image, rest) = rest.split_at_mut(image_len);
        let strip: &mut [u32] = bytemuck::cast_slice_mut(strip);
        let image: &mut [u32] = bytemuck::cast_slice_mut(image);
        let sums: &mut [Sums] = bytemuck::cast_slice_mut(&mut rest[..sums_len]);
        let tiles = self.amx.tiles(self.image.tile_pixels);
        let inputs = input.chunks_exact(group_in).take(n * g.groups);
        let outputs = output.chunks_exact_mut(group_out);
        for (i, (input, output)) in inputs.zip(outputs).enumerate() {
            let mut group = GroupOutput {
                group: i % g.groups,
                scale: self.rounding.scale(self.amx.simd().call(Extremes(input))),
                finish,
                output,
            };
            self.fill(input, group.scale, strip, image);
            let pairs = g.out_size[0].div_ceil(2);
            for first in (0..pairs).step_by(self.block_pairs()) {
                let pairs = first..(first + self.block_pairs()).min(pairs);
                self.products(&tiles, image, pairs, sums, &mut group);
            }
        }
    }

    /// Make the image of a group's inputs.
    fn fill(&self, input: &[f32], scale: Scale, strip: &mut [u32], image: &mut [u32]) {
        let g = &self.geometry;
        let [height, width] = g.in_size;
        // Padding is 0.
        let zero = if DIGITS == 1 { scale.zero - 128 } else { 0 };
        let padding = u32::from_le_bytes([zero.to_le_bytes()[0]; QUAD]);
        let inner = g.padding.left * self.image.pixel..(g.padding.left + width) * self.image.pixel;
        for image in image.chunks_exact_mut(self.image.len) {
            for (y, row) in image.chunks_mut(self.image.row).enumerate() {
                if (g.padding.top..g.padding.top + height).contains(&y) {
                    row[..inner.start].fill(padding);
                    row[inner.end..].fill(padding);
                } else {
                    row.fill(padding);
                }
            }
        }
        let (high, low) = strip.split_at_mut(TILE * self.strip_stride());
        for y in (0..height).step_by(self.strip_rows()) {
            let rows = y..(y + self.strip_rows()).min(height);
            let pixels = rows.start * width..rows.end * width;
            for first in (0..self.image.quads).step_by(TILE) {
                let quads = first..(first + TILE).min(self.image.quads);
                for quad in quads.clone() {
                    // Weights of channels that there are not are 0.
                    let last = g.group_in_channels() - 1;
                    let inputs: [&[f32]; QUAD] = std::array::from_fn(|channel| {
                        let channel = (quad * QUAD + channel).min(last) * g.in_pixels();
                        &input[channel + pixels.start..channel + pixels.end]
                    });
                    let place = (quad - first) * self.strip_stride();
                    let place = place..place + pixels.len();
                    let of_low = if DIGITS == 1 { 0..0 } else { place.clone() };
                    let targets = [&mut high[place], &mut low[of_low]];
                    self.round(inputs, scale.factor, zero, targets);
                }
                let strips = [&*high, &*low].into_iter();
                let images = image.chunks_exact_mut(self.image.len);
                for (strip, image) in strips.zip(images) {
                    self.amx.simd().call(Place {
                        kernel: self,
                        strip,
                        rows: rows.clone(),
                        quads: quads.clone(),
                        image,
                    });
                }
            }
        }
    }

    /// Compute some pairs of rows of the map of a group.
    fn products(
        &self,
        tiles: &Tiles,
        image: &[u32],
        pairs: Range<usize>,
        sums: &mut [Sums],
        group: &mut GroupOutput<'_>,
    ) {
        let g = &self.geometry;
        assert!(image.len() >= DIGITS * self.image.len);
        let products = pairs.start * self.image.tiles..pairs.end * self.image.tiles;
        let weights = self
            .weights
            .chunks_exact(2 * self.starts.len() * TILE_QUADS);
        let weights = weights.skip(group.group * self.group_panels());
        for (panel, weights) in weights.take(self.group_panels()).enumerate() {
            for first in products.clone().step_by(WRITTEN_TOGETHER) {
                let products = first..(first + WRITTEN_TOGETHER).min(products.end);
                for (product, sums) in products.clone().zip(&mut *sums) {
                    let [y, tile] = self.image.place(product);
                    // The last row may have none below it.
                    let rows = [y, (y + 1).min(g.out_size[0] - 1)];
                    let pixels = Pixels {
                        tiles: rows.map(|y| image[self.image.tile(g, [y, tile])..].as_ptr()),
                        low: self.image.len,
                        starts: &self.starts,
                        stride: g.stride[1] * self.image.pixel,
                    };
                    // SAFETY: there are two tiles of weights for each block, and an image
                    // has all that its last tile reads, see `Image::len`.
                    unsafe { tiles.multiply::<DIGITS>(pixels, weights.as_ptr(), sums) }
                }
                self.amx.simd().call(Write {
                    kernel: self,
                    panel,
                    products,
                    sums,
                    group,
                });
            }
        }
    }
}

/// The map of a group of an image, and what makes it.
struct GroupOutput<'a> {
    group: usize,
    /// Of the inputs.
    scale: Scale,
    finish: Finish,
    output: &'a mut [f32],
}

/// Place up to 16 quads of some rows of the input in the image.
struct Place<'a, const DIGITS: usize> {
    kernel: &'a TilesConv<DIGITS>,
    /// `(quads, pixels)`, of one digit.
    strip: &'a [u32],
    rows: Range<usize>,
    quads: Range<usize>,
    image: &'a mut [u32],
}

impl<const DIGITS: usize> Task for Place<'_, DIGITS> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let g = &self.kernel.geometry;
        let image = &self.kernel.image;
        let (width, stride) = (g.in_size[1], self.kernel.strip_stride());
        for (i, y) in self.rows.enumerate() {
            let first = (y + g.padding.top) * image.row + g.padding.left * image.pixel;
            let row = &mut self.image[first..][..width * image.pixel];
            let strip = &self.strip[i * width..];
            if image.pixel == 1 {
                row.copy_from_slice(&strip[..width]);
                continue;
            }
            for x in (0..width).step_by(S::LANES) {
                let pixels = S::LANES.min(width - x);
                let source = &strip[x..][..(S::LANES - 1) * stride + S::LANES];
                let target = &mut row[x * image.pixel + self.quads.start..];
                assert!((pixels - 1) * image.pixel + self.quads.len() <= target.len());
                // SAFETY: the source has a row for each lane, the target all pixels.
                unsafe {
                    simd.transpose(
                        source.as_ptr().cast(),
                        stride,
                        target.as_mut_ptr().cast(),
                        image.pixel,
                        [pixels, self.quads.len()],
                    );
                }
            }
        }
    }
}

/// Make responses of the sums of some products, for a panel of outputs.
struct Write<'a, 'b, const DIGITS: usize> {
    kernel: &'a TilesConv<DIGITS>,
    panel: usize,
    products: Range<usize>,
    sums: &'a [Sums],
    group: &'a mut GroupOutput<'b>,
}

impl<const DIGITS: usize> Task for Write<'_, '_, DIGITS> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let kernel = self.kernel;
        let (g, image) = (&kernel.geometry, &kernel.image);
        let GroupOutput {
            group,
            scale,
            finish,
            ..
        } = *self.group;
        let panel = &kernel.panels[group * kernel.group_panels() + self.panel];
        let [height, width] = finish.size(g);
        let maps = self.group.output.chunks_mut(TILE * height * width);
        let n = TilesConv::<DIGITS>::OUTPUTS / TILE;
        for (half, maps) in maps.skip(n * self.panel).take(n).enumerate() {
            let rescale = Rescale::<S, DIGITS>::new(simd, panel, half, scale, finish.floor);
            let mut responses = [[0.0f32; TILE]; TILE];
            for (product, sums) in self.products.clone().zip(self.sums) {
                let [y, tile] = image.place(product);
                let x = tile * image.tile_pixels;
                let pixels = image.tile_pixels.min(g.out_size[1] - x);
                if !finish.pooled {
                    for (y, sums) in (y..height).zip(sums) {
                        for (sums, responses) in sums[..pixels].iter().zip(&mut responses) {
                            simd.store_first(responses, rescale.responses(simd, sums));
                        }
                        write_maps(
                            simd,
                            &responses,
                            pixels,
                            &mut maps[y * width + x..],
                            height * width,
                        );
                    }
                } else if y / 2 < height && pixels > 1 {
                    let windows = sums[0][..pixels].chunks_exact(2);
                    let windows = windows.zip(sums[1][..pixels].chunks_exact(2));
                    for ((upper, lower), greatest) in windows.zip(&mut responses) {
                        let upper = rescale.greatest(simd, [&upper[0], &upper[1]]);
                        let lower = rescale.greatest(simd, [&lower[0], &lower[1]]);
                        simd.store_first(greatest, simd.max(upper, lower));
                    }
                    let maps = &mut maps[y / 2 * width + x / 2..];
                    write_maps(simd, &responses, pixels / 2, maps, height * width);
                }
            }
        }
    }
}

/// What makes responses of the sums of 16 outputs.
struct Rescale<S: Simd, const DIGITS: usize> {
    /// Of the outputs of a panel, which 16.
    half: usize,
    units: S::F32,
    zeros: S::F32,
    bias: S::F32,
    floor: S::F32,
}

impl<S: Simd, const DIGITS: usize> Rescale<S, DIGITS> {
    #[inline(always)]
    fn new(simd: S, panel: &Panel, half: usize, scale: Scale, floor: f32) -> Self {
        let outputs = half * TILE..(half + 1) * TILE;
        let unit = if DIGITS == 1 {
            scale.unit
        } else {
            256.0 * scale.unit
        };
        let units = simd.load_first(&panel.units[outputs.clone()]);
        // What stands for 0, less 128, was multiplied with all weights.
        let zeros = simd.load_first(&panel.zeros[outputs.clone()]);
        Self {
            half,
            units: simd.mul(units, simd.splat(unit)),
            zeros: simd.mul(zeros, simd.splat((128 - scale.zero) as f32)),
            bias: simd.load_first(&panel.bias[outputs]),
            floor: simd.splat(floor),
        }
    }

    /// Those of a pixel.
    #[inline(always)]
    fn responses(&self, simd: S, sums: &[[i32; TILE]; 2]) -> S::F32 {
        // SAFETY: there are as many sums as a vector has lanes on this level.
        let [first, second] = unsafe {
            [
                simd.float_i32(simd.load_i32(sums[0].as_ptr())),
                simd.float_i32(simd.load_i32(sums[1].as_ptr())),
            ]
        };
        let sums = match (DIGITS, self.half) {
            (1, 0) => simd.add(first, self.zeros),
            (1, _) => simd.add(second, self.zeros),
            _ => simd.mul_add(first, simd.splat(256.0), second),
        };
        simd.max(simd.mul_add(sums, self.units, self.bias), self.floor)
    }

    /// The greater ones of two pixels.
    #[inline(always)]
    fn greatest(&self, simd: S, [a, b]: [&[[i32; TILE]; 2]; 2]) -> S::F32 {
        simd.max(self.responses(simd, a), self.responses(simd, b))
    }
}

/// Write the responses of some pixels, for each of up to 16 outputs, to their maps, which
/// are `map` apart; the target starts where the first one's are.
#[inline(always)]
fn write_maps<S: Simd>(
    simd: S,
    responses: &[[f32; TILE]; TILE],
    pixels: usize,
    target: &mut [f32],
    map: usize,
) {
    // The rest of the first map is there, too.
    let maps = target.len().div_ceil(map);
    assert!(pixels <= TILE && (maps - 1) * map + pixels <= target.len());
    // SAFETY: the source has a row for each lane, the target the pixels of all maps.
    unsafe {
        let (source, target) = (responses.as_ptr().cast(), target.as_mut_ptr());
        simd.transpose(source, TILE, target, map, [maps, pixels]);
    }
}
