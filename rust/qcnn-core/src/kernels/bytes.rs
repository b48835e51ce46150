//! Product-quantised fully connected layers with tables of bytes in registers.
//!
//! The table of a subspace with up to 64 codewords is one to four shuffles of 16 bytes, and
//! each byte of a vector looks up another output: twice as many as with the 16-bit entries
//! of [`permute`](super::permute), from shuffles that do not have to find two bytes for each.
//! The rest is as there: chunks of subspaces, whose tables stay in L1, are used for all
//! outputs, a few vectors of outputs at a time, which lie far apart; subspaces whose inputs
//! are all zero are left out.
//!
//! The codes of eight subspaces and a vector of outputs are packed without gaps: four
//! vectors have the lowest four bits of two codes in each byte, one or two more the bits
//! above them of all eight. A shuffle takes the former as they are, a blend of shuffles sees
//! the highest bit of each byte, to which the latter are shifted.
//!
//! # The error of 8 bits, and why nothing overflows
//!
//! Entries of a chunk are multiplied by a scale with which the greatest of them all becomes
//! 127 or -127, and rounded. So each is off by up to half a step, the greatest entry divided
//! by 254, and the sum of a chunk by up to half of its active subspaces' number of steps;
//! typically by the square root of a twelfth of it. 128 is added, so that entries are bytes
//! from 1 to 255; sums of up to [`CHUNK`] of them have 16 bits. What 128 added up to is
//! subtracted from the sums, which then are -8128 to 8128.

// As in `tile`: index loops keep the sums in registers.
#![allow(clippy::needless_range_loop)]

use std::ops::Range;

use super::entry::{MAX_CHUNK, MAX_SCALE};
use super::permute::build_tables;
use super::words::transpose_codebooks;
use super::{Candidate, FcLayer, Kernel, Weights, multiply_cycles};
use crate::graph::PqGeometry;
use crate::isa::{MAX_LANES, Simd, Task};
use crate::memory::Buffer;
use crate::pack::Codes;

/// Subspaces whose codes are packed together.
const OCTET: usize = 8;

/// Subspaces in a chunk: whole octets, at most [`MAX_CHUNK`].
pub(super) const CHUNK: usize = 64;

/// Most vectors of outputs that are summed up together.
const BLOCK: usize = 4;

/// Added to a number of at most 2^21, leaves the number, rounded and raised by 128, in the
/// lowest bits of the sum's representation.
const ROUND: f32 = (3 << 22) as f32 + 128.0;

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct BytesFc<S> {
    simd: S,
    name: String,
    in_features: usize,
    out_features: usize,
    subvector_dim: usize,
    n_subspaces: usize,
    /// Bits of a code, 4 to 6, and so vectors that an octet is packed in.
    bits: usize,
    /// Vectors of outputs.
    n_vectors: usize,
    /// `(subspaces, C', 2^bits)`, zeros behind the codewords.
    codebooks: Buffer<f32>,
    /// For each chunk `(vectors of outputs, octets, bits)` vectors.
    codes: Buffer<u8>,
    /// Padded to whole vectors of outputs.
    bias: Vec<f32>,
}

impl<S: Simd> BytesFc<S> {
    /// Bytes of a vector.
    const BYTES: usize = 4 * S::LANES;

    pub(crate) fn candidate<'a>(simd: S, layer: &'a FcLayer<'a>) -> Option<Candidate<'a>> {
        let Weights::ProductQuantized {
            geometry: pq,
            codebooks,
            codes,
        } = layer.weights
        else {
            return None;
        };
        let bits = pq.n_centroids.next_power_of_two().ilog2().max(4) as usize;
        if bits > 6 {
            return None;
        }
        let look_ups = pq.n_subspaces * layer.out_features.div_ceil(Self::BYTES);
        let products = ((pq.n_subspaces * pq.subvector_dim) << bits) / S::LANES;
        let cycles = look_ups as f64 * S::PACKED_LOOK_UP_CYCLES[bits - 4]
            + products as f64 * multiply_cycles::<S>();
        Some(Candidate::new(cycles, move || {
            Self::new(simd, layer, (pq, codebooks, codes), bits)
        }))
    }

    fn new(
        simd: S,
        layer: &FcLayer<'_>,
        (pq, codebooks, codes): (PqGeometry, &[f32], Codes<'_>),
        bits: usize,
    ) -> Self {
        let mut bias = layer.bias_or_zeros();
        bias.resize(layer.out_features.next_multiple_of(Self::BYTES), 0.0);
        let n_vectors = bias.len() / Self::BYTES;
        let octets = pq.n_subspaces.div_ceil(OCTET);
        let mut kernel = Self {
            simd,
            name: format!("{}-i8-permute", S::NAME),
            in_features: layer.in_features,
            out_features: layer.out_features,
            subvector_dim: pq.subvector_dim,
            n_subspaces: pq.n_subspaces,
            bits,
            n_vectors,
            codebooks: Buffer::copy_of(&transpose_codebooks(pq, codebooks, 1 << bits)),
            codes: Buffer::zeroed(octets * bits * n_vectors * Self::BYTES),
            bias,
        };
        kernel.pack(codes);
        kernel
    }

    /// Pack the codes `(outputs, M)`.
    fn pack(&mut self, codes: Codes<'_>) {
        let chunks: Vec<_> = self.chunks().collect();
        let mut buffer = Vec::new();
        for o in 0..self.out_features {
            let row = o * self.n_subspaces..(o + 1) * self.n_subspaces;
            let row = codes.range(row, &mut buffer);
            let (v, o) = (o / Self::BYTES, o % Self::BYTES);
            // Sums of bytes at even positions and those at odd positions come apart: so
            // each have outputs that follow each other.
            let at = o % (Self::BYTES / 2) * 2 + o / (Self::BYTES / 2);
            for chunk in &chunks {
                let range = self.codes_of(chunk, v);
                let octets = self.codes[range].chunks_exact_mut(self.bits * Self::BYTES);
                for (packed, codes) in octets.zip(row[chunk.clone()].chunks(OCTET)) {
                    let mut octet = [0; OCTET];
                    octet[..codes.len()].copy_from_slice(codes);
                    let mut vectors = packed[at..].iter_mut().step_by(Self::BYTES);
                    for (pair, byte) in octet.as_chunks::<2>().0.iter().zip(vectors.by_ref()) {
                        *byte = (pair[0] & 15 | pair[1] << 4) as u8;
                    }
                    for (byte, bit) in vectors.zip(4..) {
                        let bits = octet.iter().enumerate();
                        let bits = bits.map(|(i, code)| (code >> bit & 1) << i);
                        *byte = bits.sum::<u16>() as u8;
                    }
                }
            }
        }
    }

    /// The subspaces of each chunk.
    fn chunks(&self) -> impl Iterator<Item = Range<usize>> + use<S> {
        let end = self.n_subspaces;
        (0..end)
            .step_by(CHUNK)
            .map(move |first| first..(first + CHUNK).min(end))
    }

    /// Where the codes of a chunk are for a vector of outputs.
    fn codes_of(&self, chunk: &Range<usize>, vector: usize) -> Range<usize> {
        let len = chunk.len().div_ceil(OCTET) * self.bits * Self::BYTES;
        let start = chunk.start / OCTET * self.bits * Self::BYTES * self.n_vectors + vector * len;
        start..start + len
    }

    /// float32 elements of scratch: entries of a chunk, as they are and as bytes, sums of
    /// `n` images.
    fn scratch_parts(&self, n: usize) -> [usize; 3] {
        let entries = CHUNK << self.bits;
        [entries, entries / size_of::<f32>(), n * self.bias.len()]
    }
}

impl<S: Simd> Kernel for BytesFc<S> {
    fn name(&self) -> &str {
        &self.name
    }

    fn scratch_len(&self, n: usize) -> usize {
        self.scratch_parts(n).iter().sum()
    }

    fn run(&self, n: usize, input: &[f32], output: &mut [f32], scratch: &mut [f32]) {
        let [entries_len, bytes_len, sums_len] = self.scratch_parts(n);
        let (entries, rest) = scratch.split_at_mut(entries_len);
        let (bytes, rest) = rest.split_at_mut(bytes_len);
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(bytes);
        let sums = &mut rest[..sums_len];
        let padded = self.bias.len();
        for sums in sums.chunks_exact_mut(padded) {
            sums.copy_from_slice(&self.bias);
        }
        for chunk in self.chunks() {
            let channels = chunk.start * self.subvector_dim
                ..(chunk.end * self.subvector_dim).min(self.in_features);
            let codebook_len = self.subvector_dim << self.bits;
            let codes = self.codes_of(&chunk, 0).start..self.codes_of(&chunk, self.n_vectors).start;
            // The codes of a chunk, if not of a layer, stay in L2 for all images.
            let inputs = input.chunks_exact(self.in_features);
            for (input, sums) in inputs.zip(sums.chunks_exact_mut(padded)) {
                let image = ChunkOfImage {
                    subvector_dim: self.subvector_dim,
                    codebooks: &self.codebooks
                        [chunk.start * codebook_len..chunk.end * codebook_len],
                    codes: &self.codes[codes.clone()],
                    n_vectors: self.n_vectors,
                    input: &input[channels.clone()],
                    entries: &mut *entries,
                    bytes: &mut *bytes,
                    sums,
                };
                match self.bits {
                    4 => self.simd.call(Responses::<4>(image)),
                    5 => self.simd.call(Responses::<5>(image)),
                    _ => self.simd.call(Responses::<6>(image)),
                }
            }
        }
        let outputs = output.chunks_exact_mut(self.out_features);
        for (output, sums) in outputs.zip(sums.chunks_exact(padded)) {
            output.copy_from_slice(&sums[..self.out_features]);
        }
    }
}

/// A chunk of one image.
struct ChunkOfImage<'a> {
    subvector_dim: usize,
    /// See [`BytesFc::codebooks`].
    codebooks: &'a [f32],
    /// See [`BytesFc::codes`].
    codes: &'a [u8],
    n_vectors: usize,
    /// The chunk's channels.
    input: &'a [f32],
    /// Room for the entries of all tables.
    entries: &'a mut [f32],
    bytes: &'a mut [u8],
    /// One per output, padded.
    sums: &'a mut [f32],
}

/// Add what a chunk contributes to the responses. Codes have `BITS` bits.
struct Responses<'a, const BITS: u32>(ChunkOfImage<'a>);

impl<const BITS: u32> Task for Responses<'_, BITS> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let ChunkOfImage {
            subvector_dim,
            codebooks,
            codes,
            n_vectors,
            input,
            entries,
            bytes,
            sums,
        } = self.0;
        let mut subspaces = [0; MAX_CHUNK];
        let codebooks = (subvector_dim, codebooks);
        let n_active =
            build_tables::<S, f32, BITS>(simd, codebooks, input, 1.0, entries, &mut subspaces);
        if n_active == 0 {
            return;
        }
        let entries = &entries[..n_active << BITS];
        let greatest = greatest_of(simd, entries);
        // Not a number if an input is none, or infinite: nor are the responses.
        let scale = if greatest.is_finite() {
            (127.0 / greatest).min(MAX_SCALE as f32)
        } else {
            f32::NAN
        };
        let tables = &mut bytes[..n_active << BITS];
        for i in 0..tables.len() {
            tables[i] = (entries[i] * scale + ROUND).to_bits() as u8;
        }
        let n_blocks = n_vectors.div_ceil(BLOCK);
        for first in 0..n_blocks {
            let block = Block {
                codes,
                len: codes.len() / n_vectors,
                first,
                distance: n_blocks,
                subspaces: &subspaces[..n_active],
                tables,
                step: 1.0 / scale,
                sums,
            };
            match (n_vectors - first).div_ceil(n_blocks) {
                1 => block.add::<S, BITS, 1>(simd),
                2 => block.add::<S, BITS, 2>(simd),
                3 => block.add::<S, BITS, 3>(simd),
                _ => block.add::<S, BITS, BLOCK>(simd),
            }
        }
    }
}

/// The greatest magnitude of whole vectors of entries, NaN if one is NaN.
#[inline(always)]
fn greatest_of<S: Simd>(simd: S, entries: &[f32]) -> f32 {
    let mut greatest = simd.splat(0.0);
    for vector in entries.chunks_exact(S::LANES) {
        greatest = simd.max(greatest, simd.abs(simd.load_first(vector)));
    }
    let mut lanes = [0.0; MAX_LANES];
    simd.store_first(&mut lanes, greatest);
    let greater = |a: f32, b: f32| if b > a || b.is_nan() { b } else { a };
    lanes.into_iter().fold(0.0, greater)
}

/// A block of vectors of outputs, which lie far apart, see [`permute`](super::permute).
struct Block<'a> {
    /// Those of the chunk.
    codes: &'a [u8],
    /// Bytes of a vector of outputs.
    len: usize,
    /// The first vector.
    first: usize,
    /// From one vector to the next.
    distance: usize,
    /// Those that have tables.
    subspaces: &'a [u16],
    tables: &'a [u8],
    /// What 1 in the tables means.
    step: f32,
    /// One per output, padded.
    sums: &'a mut [f32],
}

impl Block<'_> {
    /// Look up and sum the entries of `V` vectors of outputs.
    #[inline(always)]
    fn add<S: Simd, const BITS: u32, const V: usize>(self, simd: S) {
        let bytes = 4 * S::LANES;
        let octet_len = BITS as usize * bytes;
        let vector = |v: usize| self.first + v * self.distance;
        assert!(self.codes.len() >= (vector(V - 1) + 1) * self.len);
        assert!(self.sums.len() >= (vector(V - 1) + 1) * bytes);
        // What is added to the entries, negative.
        let bias = -128 * self.subspaces.len() as i32;
        let bias = simd.splat_pair(bias << 16 | bias & 0xffff);
        let mut totals = [[bias; 2]; V];
        assert!(self.tables.len() >= self.subspaces.len() << BITS);
        for active in 0..self.subspaces.len() {
            let m = usize::from(self.subspaces[active]);
            let (octet, i) = (m / OCTET, m % OCTET);
            assert!((octet + 1) * octet_len <= self.len);
            for v in 0..V {
                // SAFETY: the chunk has `len` codes of each vector, as asserted, among
                // them BITS vectors for the octet; there are tables of 2^BITS entries for
                // all active subspaces, as asserted.
                unsafe {
                    let table = self.tables.as_ptr().add(active << BITS);
                    let codes = self.codes.as_ptr().add(vector(v) * self.len);
                    let codes: *const i8 = codes.add(octet * octet_len).cast();
                    let low = simd.half_bytes(simd.load_i8(codes.add(i / 2 * bytes)), i % 2);
                    let mut high = [low; 2];
                    for bit in 4..BITS as usize {
                        let bits = simd.load_i8(codes.add(bit * bytes));
                        high[bit - 4] = simd.raise_bits(bits, i);
                    }
                    let entries = simd.look_up_packed::<BITS>(table, low, high);
                    totals[v] = simd.add_bytes(totals[v], entries);
                }
            }
        }
        let step = simd.splat(self.step);
        for v in 0..V {
            let sums = self.sums[vector(v) * bytes..][..bytes].as_mut_ptr();
            for half in 0..2 {
                let parts = simd.widen_i16(totals[v][half]);
                for i in 0..2 {
                    // SAFETY: there are four vectors of sums.
                    unsafe {
                        let sums = sums.add((2 * half + i) * S::LANES);
                        simd.store(sums, simd.mul_add(parts[i], step, simd.load(sums)));
                    }
                }
            }
        }
    }
}
