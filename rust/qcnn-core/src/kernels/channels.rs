//! Product-quantised convolution with 8-bit tables across output channels.
//!
//! For small codebooks the tables of four subspaces of one input pixel fill a
//! vector or two, and the codes of as many output channels as a vector has lanes
//! are the index of a permutation: it looks up four times as many entries. The
//! results for two such groups are added as they are, then a product with
//! small integer weights adds up the four bytes of each output in 32 bits. The
//! codes serve several neighbouring output pixels, whose sums stay in registers
//! for all subspaces and taps.
//!
//! Tables are built row by row of the input, each once: a ring holds as many rows
//! as a row of outputs sees, small enough for L2.
//!
//! # Tables of 64 entries
//!
//! Then the table of one subspace fills a vector of 64 bytes, and a permutation looks up
//! one entry for each of four times as many outputs as there are lanes. The entries of the
//! two halves are added as before, which leaves the four sums of an output in four
//! vectors, where the product wants them in one lane. Byte `i` of a lane of pair `j`'s
//! vector is for vector `i ^ j` of the block's outputs: so that of vector `v` takes its
//! byte `i` from pair `i ^ v`. Bytes change vectors but never places, which takes
//! eight blends for the four products, and the weights of a pixel are stored in four
//! orders. (Products with one weight and three zeros would need no blends, but be 16.)
//!
//! Only AVX-512 VBMI has such a permutation. What other levels do instead is
//! for tests: their cost is infinite.
//!
//! # Scales
//!
//! Subspaces are taken by eight: `A_j` and `B_j` for `j < 4` share a weight. An
//! image (a group of its channels) has a scale `s`. For input pixel `p` and pair
//! `j` the weight is an integer `w` in `1..=127`, and the tables hold
//! `<x, c> s / w`, rounded: so small inputs keep nearly as many bits as large
//! ones, and an output is the sum of `w * (A entry + B entry)`, divided by `s`.
//!
//! Let `b_m(p)` bound `|<x_m(p), c>|` for all codewords `c` of subspace m: the
//! smaller one of `sum of |x_i| max |c_i|` and `max |x_i| * max |c|_1`. With
//! `L` as [`limit`] says, `w = ceil(s (b_A + b_B) / L)`, which is within 127 because `s` is
//! `127 L / max (b_A + b_B)`, the maximum over all pixels and pairs.
//!
//! # Why nothing overflows
//!
//! - Entries are computed from integers: the i-th component of the codewords is
//!   multiplied by `a_i = 32767 / max |c_i|` and rounded, that of the input by
//!   `2^23 s / (w a_i)`. That is at most `256 |x_i| max |c_i| s / w <= 256 L`,
//!   less than 2^15. Products then have the unit `2^-23`, and their sum is within
//!   `2^23 L`, but for rounding, which adds less than `2^15` for each of the `C'`
//!   components: `C' / 256` of an entry. All of it is less than 2^31.
//! - The sum of an entry of `A` and one of `B` is at most `L`, plus twice the
//!   `C' / 256` and twice 1/2 for rounding to 8 bits. [`limit`] is what makes this
//!   127, with a margin for float32 arithmetic: their sum has 8 bits, and no
//!   entry is -128.
//! - An output adds `4 * taps` products of at most 127 * 127 for eight subspaces.
//!   [`ChannelsConv::candidate`] refuses layers where they could exceed 2^31.
//!
//! # The error
//!
//! An entry is off by at most `(1/2 + C' / 256) w / s`, and `w / s` is less than
//! `(b_A + b_B) / L + 1 / s`.

// As in `tile`: index loops keep the sums in registers.
#![allow(clippy::needless_range_loop)]

use std::ops::Range;

use super::tile::pair;
use super::{
    Candidate, ConvLayer, Kernel, Weights, has_wide_units, multiply_cycles, vector_cycles,
};
use crate::geometry::ConvGeometry;
use crate::graph::PqGeometry;
use crate::isa::{MAX_LANES, Simd, Task};
use crate::memory::Buffer;

/// Subspaces of a group: a pair of them for each byte of a lane.
const OCTET: usize = 8;

/// Subspaces of half a group, bytes of a lane.
const HALF: usize = 4;

/// Pixels of which products with codewords are in registers at a time.
const PRODUCTS: usize = 4;

/// Vectors of outputs summed together. For 64 entries a vector of codes has as many
/// outputs.
const fn block(entries: usize) -> usize {
    if entries == 64 { 4 } else { 2 }
}

/// Output pixels summed together: 16 sums leave registers for the codes of a step, which
/// are twice as many vectors as a block has, and for tables.
const fn strips(entries: usize) -> [usize; 3] {
    if entries == 64 { [2, 3, 4] } else { [4, 7, 8] }
}

/// Orders that the weights of an octet are stored in, see [`in_order`].
const fn orders(entries: usize) -> usize {
    if entries == 64 { HALF } else { 1 }
}

/// Weights of four bytes, of which byte `i` becomes byte `i ^ order`.
#[inline(always)]
fn in_order(weights: u32, order: usize) -> u32 {
    let bytes = weights.to_le_bytes();
    u32::from_le_bytes(std::array::from_fn(|i| bytes[i ^ order]))
}

/// Greatest weight of a pair.
const MAX_WEIGHT: f32 = 127.0;

/// What the ring of tables may take of a 1 MiB L2 cache.
const RING_BYTES: usize = 512 << 10;

/// Longest sub-vector, so that rounding its inputs stays small.
const MAX_SUBVECTOR_DIM: usize = 256;

/// Sum of two entries before rounding, see the module's documentation.
pub(super) fn limit(subvector_dim: usize) -> f32 {
    125.9 - subvector_dim as f32 / 128.0
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct ChannelsConv<S> {
    simd: S,
    name: String,
    geometry: ConvGeometry,
    pq: PqGeometry,
    /// Entries of a table: 16, 32 or 64.
    entries: usize,
    /// Output pixels summed together.
    strip: usize,
    /// For each set of codebooks those of all octets, without channels where they
    /// fill up the last one.
    subspaces: Vec<Subspace>,
    /// For each set of codebooks, octet and half: `(pairs of channels, 4 tables
    /// of entries)`, the first channel in the lower half.
    codewords: Vec<i32>,
    /// For each group, block of outputs, octet and tap as many vectors of indices as
    /// a block has for half A, then for half B. With 64 entries these are the four
    /// subspaces, else the vectors of outputs.
    codes: Buffer<u8>,
    /// `(groups, padded outputs)`
    bias: Vec<f32>,
}

/// What is to be known of a codebook, in the channels of a group that there are.
#[derive(Clone, Debug)]
struct Subspace {
    channels: Range<usize>,
    /// Greatest magnitude of each component.
    peaks: Vec<f32>,
    /// Greatest sum of magnitudes of a codeword.
    norm: f32,
    /// What inputs are multiplied by, divided by the unit of the entries.
    factors: Vec<f32>,
}

/// Entries that tables of `n_centroids` codewords may have, if the kernel has such.
fn entries<S: Simd>(n_centroids: usize) -> &'static [usize] {
    match n_centroids {
        0..=16 => &[16],
        // Where a permutation of two vectors takes more than twice the time of one.
        17..=32 if has_wide_units::<S>() => &[32, 64],
        17..=32 => &[32],
        33..=64 => &[64],
        _ => &[],
    }
}

/// Rows of the input that a row of outputs sees, and pixels of such a row up to
/// the last that a strip reads.
fn ring_extent(geometry: &ConvGeometry, strip: usize) -> [usize; 2] {
    let reach = |axis: usize| (geometry.kernel[axis] - 1) * geometry.dilation[axis] + 1;
    let outputs = geometry.out_size[1].next_multiple_of(strip);
    [reach(0), (outputs - 1) * geometry.stride[1] + reach(1)]
}

impl<S: Simd> ChannelsConv<S> {
    /// Outputs of a block.
    const fn outputs(entries: usize) -> usize {
        block(entries) * S::LANES
    }

    pub(crate) fn candidate<'a>(simd: S, layer: &'a ConvLayer<'a>) -> Option<Candidate<'a>> {
        let Weights::ProductQuantized {
            geometry: pq,
            codebooks,
            codes,
        } = layer.weights
        else {
            return None;
        };
        let g = layer.geometry;
        let octets = pq.n_subspaces.div_ceil(OCTET);
        let greatest = (127 * 127 * HALF).checked_mul(g.taps() * octets)?;
        if pq.subvector_dim > MAX_SUBVECTOR_DIM || i32::try_from(greatest).is_err() {
            return None;
        }
        let cost = |entries: usize, strip: usize| {
            let [rows, row_pixels] = ring_extent(g, strip);
            let ring_bytes = rows * row_pixels * octets * OCTET * entries;
            if ring_bytes > RING_BYTES {
                return None;
            }
            // Of the eight subspaces of a pixel: bounds and inputs, products,
            // rounding them to 8 bits.
            let dim = pq.subvector_dim as f64;
            let products = (OCTET * entries / S::LANES) as f64 * (0.6 * dim + 2.0);
            let build =
                multiply_cycles::<S>() * products + vector_cycles::<S>() * (2.0 * dim + 20.0);
            let tables = (g.in_size[0] * g.in_size[1].next_multiple_of(S::LANES) * octets) as f64;
            // Of a pixel and a vector of outputs: the look-ups of both halves;
            // loading codes.
            let mut look_up = 2.0 * S::BYTE_LOOK_UP_CYCLES[entries / 32];
            if has_wide_units::<S>() {
                // They load more, but permute two vectors no faster than Zen 4.
                look_up *= [0.83, 1.0, 0.9][entries / 32];
            }
            let strips = g.out_size[1].div_ceil(strip) as f64;
            let step = block(entries) as f64 * (strip as f64 * look_up + 2.0);
            let blocks = g.group_out_channels().div_ceil(Self::outputs(entries)) as f64;
            let steps = (octets * g.taps()) as f64;
            let sums = (strip * Self::outputs(entries)) as f64;
            let look_ups = g.out_size[0] as f64 * blocks * strips * (steps * step + sums);
            // Reading the input to find its peak.
            let peaks = (g.group_in_channels() * g.in_pixels()) as f64 / 16.0;
            Some(g.groups as f64 * (tables * build + look_ups + peaks * 3.0))
        };
        let choices = entries::<S>(pq.n_centroids).iter();
        let (entries, strip, cycles) = choices
            .flat_map(|&entries| strips(entries).map(|strip| (entries, strip)))
            .filter_map(|(entries, strip)| Some((entries, strip, cost(entries, strip)?)))
            .min_by(|a, b| a.2.total_cmp(&b.2))?;
        Some(Candidate::new(cycles, move || {
            Self::new(simd, layer, (pq, codebooks, codes), entries, strip)
        }))
    }

    fn new(
        simd: S,
        layer: &ConvLayer<'_>,
        (pq, codebooks, codes): (PqGeometry, &[f32], &[u16]),
        entries: usize,
        strip: usize,
    ) -> Self {
        let geometry = layer.geometry.clone();
        let outputs = geometry.group_out_channels();
        let padded = outputs.next_multiple_of(Self::outputs(entries));
        let mut bias = vec![0.0; geometry.groups * padded];
        if let Some(values) = layer.bias {
            let rows = bias.chunks_exact_mut(padded);
            for (row, values) in rows.zip(values.chunks_exact(outputs)) {
                row[..outputs].copy_from_slice(values);
            }
        }
        let mut kernel = Self {
            simd,
            name: format!("{}-i8-channels", S::NAME),
            geometry,
            pq,
            entries,
            strip,
            subspaces: Vec::new(),
            codewords: Vec::new(),
            codes: Buffer::default(),
            bias,
        };
        let channels = kernel.geometry.group_in_channels();
        for set in codebooks.chunks_exact(codebooks.len() / pq.codebook_groups) {
            let mut codebooks = set.chunks_exact(pq.n_centroids * pq.subvector_dim);
            for m in 0..kernel.octets() * OCTET {
                let first = (m * pq.subvector_dim).min(channels);
                let channels = first..(first + pq.subvector_dim).min(channels);
                let codebook = codebooks.next().unwrap_or_default();
                let subspace = Subspace::new(channels, codebook, pq.subvector_dim);
                kernel.subspaces.push(subspace);
            }
        }
        kernel.codewords = kernel.pack_codewords(codebooks);
        kernel.codes = kernel.pack_codes(codes);
        kernel
    }

    fn octets(&self) -> usize {
        self.pq.n_subspaces.div_ceil(OCTET)
    }

    /// Pairs of channels of a sub-vector.
    fn pairs(&self) -> usize {
        self.pq.subvector_dim.div_ceil(2)
    }

    /// Codewords of half an octet, pair by pair.
    fn half_len(&self) -> usize {
        self.pairs() * HALF * self.entries
    }

    /// Elements of `codewords` for a set.
    fn set_len(&self) -> usize {
        self.octets() * 2 * self.half_len()
    }

    /// Bytes of the tables of an octet for one pixel.
    fn table_len(&self) -> usize {
        OCTET * self.entries
    }

    fn pack_codewords(&self, codebooks: &[f32]) -> Vec<i32> {
        let (pq, dim) = (self.pq, self.pq.subvector_dim);
        let mut packed = vec![0; pq.codebook_groups * self.set_len()];
        for (i, codebook) in codebooks.chunks_exact(pq.n_centroids * dim).enumerate() {
            let (set, m) = (i / pq.n_subspaces, i % pq.n_subspaces);
            let peaks = &self.subspaces[set * self.octets() * OCTET + m].peaks;
            let half = &mut packed[set * self.set_len() + m / HALF * self.half_len()..];
            for (k, codeword) in codebook.chunks_exact(dim).enumerate() {
                let integer = |j: usize| match peaks.get(j) {
                    Some(&peak) if peak > 0.0 => {
                        (codeword[j] * (32_767.0 / peak)).round_ties_even() as i16
                    }
                    _ => 0,
                };
                for q in 0..self.pairs() {
                    half[(q * HALF + m % HALF) * self.entries + k] =
                        pair(integer(2 * q), integer(2 * q + 1));
                }
            }
        }
        packed
    }

    fn pack_codes(&self, codes: &[u16]) -> Buffer<u8> {
        let g = &self.geometry;
        let (taps, outputs) = (g.taps(), g.group_out_channels());
        let block = Self::outputs(self.entries);
        let padded = outputs.next_multiple_of(block);
        let len = g.groups * padded * self.octets() * taps * OCTET;
        let mut packed = Buffer::zeroed(len);
        let mut halves = packed.chunks_exact_mut(block * HALF);
        for group in 0..g.groups {
            for first in (0..padded).step_by(block) {
                for octet in 0..self.octets() {
                    for tap in 0..taps {
                        for half in 0..2 {
                            let bytes = halves.next().expect("there is room for all codes");
                            for (i, byte) in bytes.iter_mut().enumerate() {
                                let (o, j) = self.place(i);
                                let o = first + o;
                                let m = octet * OCTET + half * HALF + j;
                                // Of tables that are zeros, or for no output: any entry.
                                let mut code = 0;
                                if o < outputs && m < self.pq.n_subspaces {
                                    let o = group * outputs + o;
                                    code = codes[(o * taps + tap) * self.pq.n_subspaces + m];
                                }
                                assert!(usize::from(code) < self.pq.n_centroids);
                                *byte = code as u8;
                                if self.entries < 64 {
                                    *byte += (j * self.entries) as u8;
                                }
                            }
                        }
                    }
                }
            }
        }
        packed
    }

    /// The output of a block and the subspace of a half that byte `i` of the half's
    /// indices is for.
    fn place(&self, i: usize) -> (usize, usize) {
        if self.entries < 64 {
            return (i / HALF, i % HALF);
        }
        let (j, i) = (i / (4 * S::LANES), i % (4 * S::LANES));
        (((i % 4) ^ j) * S::LANES + i / 4, j)
    }

    /// float32 elements of each part of the scratch: tables of the ring, weights,
    /// integer inputs of a vector of pixels, the sums of a row for a block of outputs.
    fn scratch_parts(&self) -> [usize; 4] {
        let [rows, row_pixels] = ring_extent(&self.geometry, self.strip);
        let pixels = rows * row_pixels * self.octets();
        let row = self.geometry.out_size[1].next_multiple_of(self.strip);
        [
            (pixels * self.table_len() / 4).next_multiple_of(16),
            (pixels * orders(self.entries)).next_multiple_of(16),
            2 * self.pairs() * HALF * S::LANES,
            (row + S::LANES) * Self::outputs(self.entries),
        ]
    }
}

impl Subspace {
    fn new(channels: Range<usize>, codebook: &[f32], dim: usize) -> Self {
        let mut peaks = vec![0.0f32; channels.len()];
        let mut norm = 0.0f32;
        for codeword in codebook.chunks_exact(dim) {
            let codeword = &codeword[..channels.len()];
            for (peak, c) in peaks.iter_mut().zip(codeword) {
                *peak = peak.max(c.abs());
            }
            norm = norm.max(codeword.iter().map(|c| c.abs()).sum());
        }
        let unit = (1 << 23) as f32 / 32_767.0;
        Self {
            channels,
            factors: peaks.iter().map(|peak| unit * peak).collect(),
            peaks,
            norm,
        }
    }
}

impl<S: Simd> Kernel for ChannelsConv<S> {
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

impl<S: Simd> ChannelsConv<S> {
    /// Responses of `n` images, not less than `floor`.
    fn images(&self, n: usize, input: &[f32], output: &mut [f32], scratch: &mut [f32], floor: f32) {
        let g = &self.geometry;
        let group_in = g.group_in_channels() * g.in_pixels();
        let group_out = g.group_out_channels() * g.out_pixels();
        let inputs = input.chunks_exact(group_in).take(n * g.groups);
        let outputs = output.chunks_exact_mut(group_out);
        for (i, (input, output)) in inputs.zip(outputs).enumerate() {
            self.group(i % g.groups, input, output, scratch, floor);
        }
    }

    /// One group of one image.
    fn group(
        &self,
        group: usize,
        input: &[f32],
        output: &mut [f32],
        scratch: &mut [f32],
        floor: f32,
    ) {
        let g = &self.geometry;
        let set = if self.pq.codebook_groups > 1 {
            group
        } else {
            0
        };
        let subspaces = &self.subspaces[set * self.octets() * OCTET..][..self.octets() * OCTET];
        let codewords = &self.codewords[set * self.set_len()..][..self.set_len()];
        let padded = g
            .group_out_channels()
            .next_multiple_of(Self::outputs(self.entries));
        let codes: &[i8] = bytemuck::cast_slice(&self.codes);
        let codes_len = padded * self.octets() * g.taps() * OCTET;
        let codes = &codes[group * codes_len..][..codes_len];
        let bias = &self.bias[group * padded..][..padded];

        let [tables_len, weights_len, pairs_len, sums_len] = self.scratch_parts();
        let (tables, rest) = scratch.split_at_mut(tables_len);
        let (weights, rest) = rest.split_at_mut(weights_len);
        let (pairs, rest) = rest.split_at_mut(pairs_len);
        let sums = &mut rest[..sums_len];
        let tables: &mut [i8] = bytemuck::cast_slice_mut(tables);
        let weights: &mut [u32] = bytemuck::cast_slice_mut(weights);
        let pairs: &mut [i32] = bytemuck::cast_slice_mut(pairs);

        let peak = self.simd.call(Peak {
            kernel: self,
            subspaces,
            input,
        });
        // Without any signal, all entries are 0. NaN and infinity make all
        // responses NaN.
        let (scale, unit) = if peak == 0.0 {
            (1.0, 0.0)
        } else if peak.is_finite() {
            let scale = (limit(self.pq.subvector_dim) * MAX_WEIGHT / peak).min(1e30);
            (scale, 1.0 / scale)
        } else {
            (0.0, f32::NAN)
        };

        // Padding has tables of zeros.
        tables.fill(0);
        weights.fill(0);
        let [ring_rows, row_pixels] = ring_extent(g, self.strip);
        let row_len = self.octets() * row_pixels;
        let mut next = 0;
        for y in 0..g.out_size[0] {
            let first = y * g.stride[0];
            for row in next.max(first)..first + ring_rows {
                let slot = row % ring_rows * row_len;
                let tables = &mut tables[slot * self.table_len()..][..row_len * self.table_len()];
                let orders = orders(self.entries);
                let weights = &mut weights[slot * orders..][..row_len * orders];
                let in_y = row.wrapping_sub(g.padding.top);
                if in_y < g.in_size[0] {
                    let row = Row {
                        kernel: self,
                        subspaces,
                        codewords,
                        channels: Channels {
                            values: &input[in_y * g.in_size[1]..],
                            pixels: g.in_pixels(),
                            width: g.in_size[1],
                        },
                        scale,
                        pitch: row_pixels,
                        pairs,
                        tables,
                        weights,
                    };
                    match self.entries {
                        16 => self.simd.call(BuildRow::<_, 16>(row)),
                        32 => self.simd.call(BuildRow::<_, 32>(row)),
                        _ => self.simd.call(BuildRow::<_, 64>(row)),
                    }
                } else {
                    tables.fill(0);
                }
            }
            next = first + ring_rows;
            self.look_up_row(LookUp {
                geometry: g,
                octets: self.octets(),
                first_row: first % ring_rows,
                tables,
                weights,
                codes,
                bias,
                unit,
                floor,
                sums,
                output: &mut output[y * g.out_size[1]..],
            });
        }
    }

    fn look_up_row(&self, row: LookUp<'_>) {
        let simd = self.simd;
        match (self.entries, self.strip) {
            (16, 4) => simd.call(LookUpRow::<16, 2, 4>(row)),
            (16, 7) => simd.call(LookUpRow::<16, 2, 7>(row)),
            (16, 8) => simd.call(LookUpRow::<16, 2, 8>(row)),
            (32, 4) => simd.call(LookUpRow::<32, 2, 4>(row)),
            (32, 7) => simd.call(LookUpRow::<32, 2, 7>(row)),
            (32, 8) => simd.call(LookUpRow::<32, 2, 8>(row)),
            (64, 2) => simd.call(LookUpRow::<64, 4, 2>(row)),
            (64, 3) => simd.call(LookUpRow::<64, 4, 3>(row)),
            (64, 4) => simd.call(LookUpRow::<64, 4, 4>(row)),
            other => unreachable!("no candidate has (entries, strip) {other:?}"),
        }
    }
}

/// Channels one after the other, of which `width` pixels are there from the first
/// element on, at distance `pixels`.
#[derive(Clone, Copy)]
struct Channels<'a> {
    values: &'a [f32],
    pixels: usize,
    width: usize,
}

impl Channels<'_> {
    /// Pixels of channel `c` from `x` on, zeros where it ends.
    #[inline(always)]
    fn load<S: Simd>(&self, simd: S, c: usize, x: usize) -> S::F32 {
        simd.load_first(&self.values[c * self.pixels + x..c * self.pixels + self.width])
    }

    /// Fetch the next row of a channel.
    #[inline(always)]
    fn prefetch_row<S: Simd>(&self, simd: S, c: usize, x: usize) {
        let next = c * self.pixels + x + self.width;
        simd.prefetch(self.values.as_ptr().wrapping_add(next).cast());
    }
}

/// The two subspaces of pair `j` of an octet.
#[inline(always)]
fn pair_of(octet: usize, j: usize) -> [usize; 2] {
    [octet * OCTET + j, octet * OCTET + HALF + j]
}

/// For each of a vector of pixels the bound of the sum of two entries of a pair of
/// subspaces. Not finite where an input is not.
#[inline(always)]
fn bound<S: Simd>(
    simd: S,
    subspaces: &[Subspace],
    pair: [usize; 2],
    channels: Channels<'_>,
    x: usize,
) -> S::F32 {
    let mut bound = simd.splat(0.0);
    for half in 0..2 {
        let subspace = &subspaces[pair[half]];
        let first = subspace.channels.start;
        let peaks = &subspace.peaks[..];
        let mut sum = simd.splat(0.0);
        let mut greatest = simd.splat(0.0);
        for j in 0..peaks.len() {
            let x = simd.abs(channels.load(simd, first + j, x));
            // Not fused on any level: all have the same bounds.
            sum = simd.add(simd.mul(x, simd.splat(peaks[j])), sum);
            greatest = simd.max(greatest, x);
        }
        let other = simd.mul(greatest, simd.splat(subspace.norm));
        bound = simd.add(bound, simd.min(sum, other));
    }
    bound
}

/// The greatest bound of a pair of subspaces at any pixel. Not finite if an input
/// is not.
struct Peak<'a, K> {
    kernel: &'a ChannelsConv<K>,
    subspaces: &'a [Subspace],
    input: &'a [f32],
}

impl<K: Simd> Task for Peak<'_, K> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        let pixels = self.kernel.geometry.in_pixels();
        let channels = Channels {
            values: self.input,
            pixels,
            width: pixels,
        };
        let mut greatest = simd.splat(0.0);
        for octet in 0..self.kernel.octets() {
            for j in 0..HALF {
                let pair = pair_of(octet, j);
                for x in (0..pixels).step_by(S::LANES) {
                    let bound = bound(simd, self.subspaces, pair, channels, x);
                    greatest = simd.max(greatest, bound);
                }
            }
        }
        let mut lanes = [0.0f32; MAX_LANES];
        simd.store_first(&mut lanes[..S::LANES], greatest);
        let mut peak = 0.0f32;
        for lane in lanes {
            if lane > peak || lane.is_nan() {
                peak = lane;
            }
        }
        peak
    }
}

/// A row of the input.
struct Row<'a, K> {
    kernel: &'a ChannelsConv<K>,
    subspaces: &'a [Subspace],
    codewords: &'a [i32],
    channels: Channels<'a>,
    scale: f32,
    /// Pixels of a row of tables.
    pitch: usize,
    /// Integer inputs of a vector of pixels: `(2 halves, pairs of channels, 4)`.
    pairs: &'a mut [i32],
    /// `(octets, pitch)`
    tables: &'a mut [i8],
    /// `(octets, pitch, orders)`
    weights: &'a mut [u32],
}

/// Build the tables of a row.
struct BuildRow<'a, K, const ENTRIES: usize>(Row<'a, K>);

impl<K: Simd, const ENTRIES: usize> Task for BuildRow<'_, K, ENTRIES> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let row = self.0;
        let g = &row.kernel.geometry;
        let left = g.padding.left;
        let width = g.in_size[1].min(row.pitch.saturating_sub(left));
        let half_len = row.kernel.half_len();
        let table_len = OCTET * ENTRIES;
        for octet in 0..row.kernel.octets() {
            for x in (0..width).step_by(S::LANES) {
                let n = S::LANES.min(width - x);
                let at = octet * row.pitch + left + x;
                let weights = row.kernel.scale_inputs(
                    simd,
                    octet,
                    x,
                    row.subspaces,
                    row.channels,
                    row.scale,
                    row.pairs,
                );
                let targets = row.weights[at * orders(ENTRIES)..].chunks_exact_mut(orders(ENTRIES));
                for (target, weights) in targets.zip(&weights[..n]) {
                    for (order, target) in target.iter_mut().enumerate() {
                        *target = in_order(*weights, order);
                    }
                }
                for half in 0..2 {
                    let products = Products {
                        codewords: &row.codewords[(2 * octet + half) * half_len..][..half_len],
                        pairs: &row.pairs[half * row.pairs.len() / 2..][..row.pairs.len() / 2],
                        n,
                        tables: &mut row.tables[at * table_len..][..n * table_len],
                        offset: half * HALF * ENTRIES,
                    };
                    products.run::<S, ENTRIES>(simd);
                }
            }
        }
    }
}

impl<K: Simd> ChannelsConv<K> {
    /// Inputs of an octet as integers, for a vector of pixels from `x` on. Returns
    /// the weights of their pairs.
    #[expect(clippy::too_many_arguments, reason = "a part of a loop's body")]
    #[inline(always)]
    fn scale_inputs<S: Simd>(
        &self,
        simd: S,
        octet: usize,
        x: usize,
        subspaces: &[Subspace],
        channels: Channels<'_>,
        scale: f32,
        pairs: &mut [i32],
    ) -> [u32; MAX_LANES] {
        // Numbers added to this one are rounded to integers.
        const MAGIC: f32 = 12_582_912.0;
        let n_pairs = self.pairs();
        let half_pairs = n_pairs * HALF * S::LANES;
        assert!(pairs.len() >= 2 * half_pairs);
        let magic = simd.splat(MAGIC);
        let minus_magic = simd.splat(-MAGIC);
        let half = simd.splat(0.5);
        let zero = simd.splat(0.0);
        let per_limit = simd.splat(scale / limit(self.pq.subvector_dim));
        let scale = simd.splat(scale);
        let mut weights = [zero; HALF];
        for j in 0..HALF {
            let pair = pair_of(octet, j);
            let bound = bound(simd, subspaces, pair, channels, x);
            // Rounding up: what is lost where 1/2 is not exact is within the
            // margin of the limit.
            let weight = simd.add(simd.mul(bound, per_limit), half);
            let weight = simd.add(simd.add(weight, magic), minus_magic);
            let weight = simd.min(weight, simd.splat(MAX_WEIGHT));
            let weight = simd.max(weight, simd.splat(1.0));
            weights[j] = weight;
            let per_weight = simd.div(scale, weight);
            for half in 0..2 {
                let subspace = &subspaces[pair[half]];
                let first = subspace.channels.start;
                for q in 0..n_pairs {
                    let mut scaled = [zero; 2];
                    for side in 0..2 {
                        let i = 2 * q + side;
                        if i < subspace.factors.len() {
                            channels.prefetch_row(simd, first + i, x);
                            let factor = simd.splat(subspace.factors[i]);
                            let x = channels.load(simd, first + i, x);
                            scaled[side] = simd.mul(simd.mul(x, per_weight), factor);
                        }
                    }
                    let at = half * half_pairs + (q * HALF + j) * S::LANES;
                    // SAFETY: there are `half_pairs` for each half, as asserted, in
                    // vectors of which this is one.
                    unsafe {
                        let target = pairs.as_mut_ptr().add(at);
                        simd.store_i16(target.cast(), simd.round_zip_i16(scaled[0], scaled[1]));
                    }
                }
            }
        }
        // Two weights are a number of 15 bits, two of those are four bytes.
        let byte = simd.splat(256.0);
        let low = simd.add(simd.mul(weights[1], byte), weights[0]);
        let high = simd.add(simd.mul(weights[3], byte), weights[2]);
        let mut packed = [0u32; MAX_LANES];
        // SAFETY: there is room for the lanes of any level.
        unsafe { simd.store_i16(packed.as_mut_ptr().cast(), simd.round_zip_i16(low, high)) };
        packed
    }
}

/// The tables of half an octet for `n` pixels.
struct Products<'a> {
    /// `(pairs of channels, 4 tables of entries)`
    codewords: &'a [i32],
    /// `(pairs of channels, 4, LANES)`
    pairs: &'a [i32],
    n: usize,
    /// `(n, 8 tables of entries)`
    tables: &'a mut [i8],
    /// Where the half's tables start.
    offset: usize,
}

impl Products<'_> {
    #[inline(always)]
    fn run<S: Simd, const ENTRIES: usize>(self, simd: S) {
        let table_len = OCTET * ENTRIES;
        let row = HALF * ENTRIES;
        let depth = self.codewords.len() / row;
        assert!(self.pairs.len() >= depth * HALF * S::LANES);
        assert!(self.tables.len() >= self.n * table_len && self.n <= S::LANES);
        assert!(self.offset <= row);
        // Rounds to nearest.
        let half = simd.splat_i32(1 << 22);
        for first in (0..row).step_by(4 * S::LANES) {
            for pixel in (0..self.n).step_by(PRODUCTS) {
                let mut sums = [[half; 4]; PRODUCTS];
                for q in 0..depth {
                    for v in 0..4 {
                        let at = first + v * S::LANES;
                        // SAFETY: there are `depth` rows of `row` codewords, and
                        // as many rows of HALF vectors of pairs, of which
                        // each has a multiple of PRODUCTS.
                        unsafe {
                            let codewords = self.codewords.as_ptr().add(q * row + at);
                            let codewords = simd.load_i16(codewords.cast());
                            let pairs = self.pairs.as_ptr();
                            let pairs = pairs.add((q * HALF + at / ENTRIES) * S::LANES + pixel);
                            for p in 0..PRODUCTS {
                                let x = simd.splat_pair(*pairs.add(p));
                                sums[p][v] = simd.dot_i16(codewords, x, sums[p][v]);
                            }
                        }
                    }
                }
                for p in 0..PRODUCTS.min(self.n - pixel) {
                    // SAFETY: the tables of pixel + p < n have `row` bytes from
                    // `offset` on, of which these are a vector.
                    unsafe {
                        let at = (pixel + p) * table_len + self.offset + first;
                        simd.store_i8(self.tables.as_mut_ptr().add(at), simd.pack_i8(sums[p]));
                    }
                }
            }
        }
    }
}

/// A row of outputs of a group.
struct LookUp<'a> {
    geometry: &'a ConvGeometry,
    octets: usize,
    /// Row of the ring that the first tap reads.
    first_row: usize,
    /// `(rows of the ring, octets, pixels of a row)` of 8 tables.
    tables: &'a [i8],
    /// The same of the weights in all orders.
    weights: &'a [u32],
    /// See [`ChannelsConv::codes`].
    codes: &'a [i8],
    /// Of the group.
    bias: &'a [f32],
    /// What 1 stands for in the sums.
    unit: f32,
    /// The least response.
    floor: f32,
    /// Room for the responses of a block of outputs, pixel by pixel.
    sums: &'a mut [f32],
    /// From the row's first pixel in the first channel on.
    output: &'a mut [f32],
}

/// [`LookUp`] in strips of `P` pixels and blocks of `V` vectors of outputs.
struct LookUpRow<'a, const ENTRIES: usize, const V: usize, const P: usize>(LookUp<'a>);

impl<const ENTRIES: usize, const V: usize, const P: usize> Task for LookUpRow<'_, ENTRIES, V, P> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        const { assert!(V == block(ENTRIES)) }
        let row = self.0;
        let g = row.geometry;
        let [ring_rows, row_pixels] = ring_extent(g, P);
        let width = g.out_size[1];
        let block = V * S::LANES;
        let codes_len = row.octets * g.taps() * OCTET * block;
        let padded = width.next_multiple_of(P);
        let pixels = ring_rows * row.octets * row_pixels;
        assert!(row.weights.len() >= pixels * orders(ENTRIES));
        assert!(row.tables.len() >= pixels * OCTET * ENTRIES);
        assert!(row.sums.len() >= (padded + S::LANES) * block && row.first_row < ring_rows);
        for (i, bias) in row.bias.chunks_exact(block).enumerate() {
            let codes = &row.codes[i * codes_len..][..codes_len];
            for x in (0..padded).step_by(P) {
                let strip = Strip {
                    geometry: g,
                    octets: row.octets,
                    first_row: row.first_row,
                    row_pixels,
                    tables: row.tables,
                    weights: row.weights,
                    codes,
                    x,
                };
                // SAFETY: the tables and weights are those of ring_rows rows with
                // row_pixels pixels, and the codes those of a block, as asserted;
                // x is the first pixel of a strip.
                let sums = unsafe { strip.run::<S, ENTRIES, V, P>(simd) };
                let unit = simd.splat(row.unit);
                let floor = simd.splat(row.floor);
                for p in 0..P {
                    for v in 0..V {
                        let sum = simd.float_i32(sums[p][v]);
                        // SAFETY: bias has V vectors, sums as many for each of
                        // the padded pixels, as asserted.
                        unsafe {
                            let bias = simd.load(bias.as_ptr().add(v * S::LANES));
                            let target = row.sums.as_mut_ptr();
                            let target = target.add((x + p) * block + v * S::LANES);
                            // Not fused on any level: all have the same responses.
                            simd.store(
                                target,
                                simd.max(simd.add(simd.mul(sum, unit), bias), floor),
                            );
                        }
                    }
                }
            }
            let outputs = g.group_out_channels() - i * block;
            for v in 0..V {
                let outputs = S::LANES.min(outputs.saturating_sub(v * S::LANES));
                for x in (0..width).step_by(S::LANES) {
                    if outputs == 0 {
                        break;
                    }
                    let columns = S::LANES.min(width - x);
                    let first = (i * block + v * S::LANES) * g.out_pixels() + x;
                    let last = first + (outputs - 1) * g.out_pixels() + columns;
                    let target = &mut row.output[first..last];
                    // SAFETY: the sums have room for a vector more of pixels than
                    // the row has; the target was just cut to what is written.
                    unsafe {
                        simd.transpose(
                            row.sums.as_ptr().add(x * block + v * S::LANES),
                            block,
                            target.as_mut_ptr(),
                            g.out_pixels(),
                            [outputs, columns],
                        );
                    }
                }
            }
        }
    }
}

/// Neighbouring output pixels of a row, for a block of outputs.
struct Strip<'a> {
    geometry: &'a ConvGeometry,
    octets: usize,
    first_row: usize,
    row_pixels: usize,
    tables: &'a [i8],
    weights: &'a [u32],
    /// Of the block.
    codes: &'a [i8],
    /// The first pixel.
    x: usize,
}

impl Strip<'_> {
    /// The sums of `P` pixels.
    ///
    /// # Safety
    ///
    /// Tables and weights are a ring for the geometry with strips of `P`, the codes
    /// are those of a block for all octets and taps, and `x` is less than the
    /// width of the output in whole strips.
    #[inline(always)]
    unsafe fn run<S: Simd, const ENTRIES: usize, const V: usize, const P: usize>(
        self,
        simd: S,
    ) -> [[S::I32; V]; P] {
        let g = self.geometry;
        let ring_rows = ring_extent(g, P)[0];
        let vector = 4 * S::LANES;
        let table_len = OCTET * ENTRIES;
        let orders = orders(ENTRIES);
        let mut codes = self.codes.as_ptr();
        let mut sums = [[simd.splat_i32(0); V]; P];
        for octet in 0..self.octets {
            for ky in 0..g.kernel[0] {
                let row = (self.first_row + ky * g.dilation[0]) % ring_rows;
                let row = (row * self.octets + octet) * self.row_pixels;
                for kx in 0..g.kernel[1] {
                    let first = row + self.x * g.stride[1] + kx * g.dilation[1];
                    // SAFETY: the furthest pixel that a strip reads is the last of
                    // its row; each step has 2 * V vectors of codes, of indices
                    // into the tables of a half.
                    unsafe {
                        let mut index = [[simd.load_i8(codes); V]; 2];
                        for half in 0..2 {
                            for v in 0..V {
                                let codes = codes.add((half * V + v) * vector);
                                index[half][v] = simd.load_i8(codes);
                            }
                        }
                        codes = codes.add(2 * V * vector);
                        for p in 0..P {
                            let pixel = first + p * g.stride[1];
                            let tables = self.tables.as_ptr().add(pixel * table_len);
                            let weights = self.weights.as_ptr().add(pixel * orders);
                            let found = look_up_octet::<S, ENTRIES, V>(simd, tables, index);
                            for v in 0..V {
                                let weights = *weights.add(v % orders);
                                sums[p][v] = simd.dot_i8(weights, found[v], sums[p][v]);
                            }
                        }
                    }
                }
            }
        }
        sums
    }
}

/// For each of a block of outputs the sums of the entries of four pairs of subspaces in
/// the bytes of a lane: pair `i` in byte `i`, or with 64 entries pair `i ^ v` of vector `v`.
///
/// # Safety
///
/// `tables` is valid for reads of the tables of an octet.
#[inline(always)]
unsafe fn look_up_octet<S: Simd, const ENTRIES: usize, const V: usize>(
    simd: S,
    tables: *const i8,
    index: [[S::I8; V]; 2],
) -> [S::I8; V] {
    let mut found = index[0];
    for v in 0..V {
        // SAFETY: the caller vouches for twice HALF tables. With 64 entries V is HALF.
        let [a, b] = unsafe {
            let other = tables.add(HALF * ENTRIES);
            if ENTRIES == 64 {
                [
                    simd.look_up_64(tables.add(v * ENTRIES), index[0][v]),
                    simd.look_up_64(other.add(v * ENTRIES), index[1][v]),
                ]
            } else {
                [
                    simd.look_up_i8::<ENTRIES>(tables, index[0][v]),
                    simd.look_up_i8::<ENTRIES>(other, index[1][v]),
                ]
            }
        };
        found[v] = simd.add_i8(a, b);
    }
    if ENTRIES == 64 {
        // From vectors of a pair to vectors of outputs.
        for v in [0, 2] {
            [found[v], found[v + 1]] = simd.exchange_i8::<1>(found[v], found[v + 1]);
        }
        for v in [0, 1] {
            [found[v], found[v + 2]] = simd.exchange_i8::<2>(found[v], found[v + 2]);
        }
    }
    found
}
