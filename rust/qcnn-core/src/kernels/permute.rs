//! Product-quantised fully connected layers with tables in registers.
//!
//! The table of a subspace with up to 64 codewords fits a few vectors, and a
//! vector of codes is the index of a permutation: one instruction looks up as
//! many outputs as a vector has lanes. Entries are float32 numbers or, for the
//! speed of twice the lanes, 16-bit integers. A lane holds the codes of several
//! outputs. Shifts bring one after the other down to the lowest bits; the
//! permutation ignores the bits above.
//!
//! Subspaces are taken in chunks: their tables are built, then used for all
//! outputs. So the tables stay in L1 while the codes stream past once: those of up to
//! four vectors of outputs at a time, which lie far apart, because memory gives four
//! streams faster than one. Within a chunk sums stay in registers, at its end they are
//! added to the float32 responses, 16-bit ones scaled back.
//!
//! Many inputs are zero behind a ReLU. A subspace whose inputs all are is left
//! out, except that its codes are fetched: where memory is the limit, gaps that
//! stop the hardware's prefetching cost more than they save. Fetching ahead in
//! software, by 0.5 to 6 KiB, was measured to gain nothing on top of it.
//!
//! With enough images, a vector has one image per lane: table entries become
//! vectors, a code says which one is added, and every look-up serves as many
//! images as there are lanes. The terms and the order of their sums are those of
//! a single image.
//!
//! # No sum overflows
//!
//! Let `x` be the inputs of a chunk of `L` subspaces, `w` an output's decoded
//! weights there, and `N` the greatest norm that any output's `w` has. By the
//! Cauchy-Schwarz inequality no `<x, w>` exceeds `B = |x| N`. 16-bit entries
//! are `<x_m, c>` multiplied by a scale and rounded, each by up to 1/2, so an
//! output's sum is at most `scale B + L / 2`. The scale is the one that makes
//! this 2^15 - 1. Partial sums may leave the range: additions modulo 2^16 still
//! end at the right sum. An entry that an output uses is itself within `B`,
//! since `|x_m| <= |x|` and `|c| <= |w|`; others may become any number.
//!
//! float32 arithmetic moves an entry by less than `(C' + 4) 2^-24 |x_m| |c|`:
//! the scale and the scaled inputs are rounded, and so is each of `C'` products
//! with sums. By the same inequality this adds up to less than `(C' + 4) 2^-24
//! B` for an output. The scale leaves room for 16 times as much.
//!
//! # The error of 16 bits
//!
//! A chunk's part of a response is off by at most `L / 2` steps of `1 / scale`,
//! and typically by `sqrt(L / 12)` of them. The step grows as `B` does; relative
//! to `|x| |w|` it is constant, but a typical response is only `1 / sqrt(L C')`
//! of that. So the relative error grows as `L sqrt(C')`, and this decides the
//! length of chunks.

use std::ops::Range;

use super::entry::{Entry, Lane, MAX_CHUNK};
use super::words::{transpose_codebooks, transpose_out};
use super::{Candidate, FcLayer, Kernel, Weights, multiply_cycles};
use crate::graph::PqGeometry;
use crate::isa::{MAX_LANES, Simd, Task};
use crate::memory::Buffer;
use crate::pack::Codes;

/// Most vectors of codes whose outputs are summed up together.
const BLOCK: usize = 4;

/// Most codes in a lane: eight of 4 bits.
const MAX_LANE_CODES: usize = 8;

/// Subspaces whose tables for a batch are used together: 16 KiB of 32 entries.
const BATCH_SUBSPACES: usize = 8;

/// Clock cycles of a look-up for a batch.
const BATCH_LOOK_UP_CYCLES: f64 = 1.8;

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct PermuteFc<S, E: Entry> {
    simd: S,
    name: String,
    in_features: usize,
    out_features: usize,
    subvector_dim: usize,
    n_subspaces: usize,
    /// Bits of a code, 4 to 6.
    bits: u32,
    /// Vectors of codes of a subspace.
    n_vectors: usize,
    /// `(subspaces, C', 2^bits)`, zeros behind the codewords.
    codebooks: Buffer<f32>,
    /// For each chunk the greatest norm of an output's weights, if scales need
    /// it.
    norms: Vec<f64>,
    /// For each chunk `(vectors, subspaces)`. A vector has the codes of as many outputs
    /// as it has lanes in their lowest bits, those of the next outputs above them, and
    /// so on.
    codes: Buffer<E::Lane>,
    /// Padded to whole vectors of codes, never -0.
    bias: Vec<f32>,
}

/// Vectors of codes in a block: the sums leave registers for the table and the
/// codes.
fn block_len<S: Simd, E: Entry>(bits: u32) -> usize {
    let sums = if S::REGISTERS >= 32 { 24 } else { 8 };
    (sums / E::lane_codes(bits)).clamp(1, BLOCK)
}

impl<S: Simd, E: Entry> PermuteFc<S, E> {
    /// Lanes of a vector of codes.
    const LANES: usize = E::WIDTH * S::LANES;

    pub(crate) fn candidate<'a>(simd: S, layer: &'a FcLayer<'a>) -> Option<Candidate<'a>> {
        let Weights::ProductQuantized {
            geometry: pq,
            codebooks,
            codes,
        } = layer.weights
        else {
            return None;
        };
        let bits = pq.n_centroids.next_power_of_two().ilog2().max(4);
        if bits > 6 {
            return None;
        }
        let columns = E::lane_codes(bits) * Self::LANES;
        let look_ups = pq.n_subspaces * layer.out_features.div_ceil(columns) * E::lane_codes(bits);
        let products = pq.n_subspaces * pq.subvector_dim * E::table_len(bits) / S::LANES;
        let cycles =
            look_ups as f64 * Self::look_up_cycles(bits) + products as f64 * multiply_cycles::<S>();
        Some(Candidate::new(cycles, move || {
            Self::new(simd, layer, (pq, codebooks, codes), bits)
        }))
    }

    /// Clock cycles in which a vector of codes is looked up.
    fn look_up_cycles(bits: u32) -> f64 {
        E::look_up_cycles::<S>()[bits as usize - 4]
    }

    fn new(
        simd: S,
        layer: &FcLayer<'_>,
        (pq, codebooks, codes): (PqGeometry, &[f32], Codes<'_>),
        bits: u32,
    ) -> Self {
        let columns = E::lane_codes(bits) * Self::LANES;
        // Adding 0 makes a positive one of -0: that no sum is -0 allows to leave
        // terms out that are 0.
        let mut bias = layer.bias_or_zeros();
        for b in &mut bias {
            *b += 0.0;
        }
        bias.resize(layer.out_features.next_multiple_of(columns), 0.0);
        let n_vectors = bias.len() / columns;
        let lanes = pq.n_subspaces * n_vectors * Self::LANES;
        let mut kernel = Self {
            simd,
            name: format!("{}-{}-permute", S::NAME, E::NAME),
            in_features: layer.in_features,
            out_features: layer.out_features,
            subvector_dim: pq.subvector_dim,
            n_subspaces: pq.n_subspaces,
            bits,
            n_vectors,
            codebooks: Buffer::copy_of(&transpose_codebooks(pq, codebooks, 1 << bits)),
            norms: Vec::new(),
            codes: Buffer::zeroed(lanes),
            bias,
        };
        kernel.norms = kernel.pack(pq, codebooks, codes);
        kernel
    }

    /// Pack the codes `(outputs, M)`. Returns the norms.
    fn pack(&mut self, pq: PqGeometry, codebooks: &[f32], codes: Codes<'_>) -> Vec<f64> {
        let squares: Vec<f64> = codebooks
            .chunks_exact(pq.subvector_dim)
            .map(|codeword| codeword.iter().map(|c| f64::from(*c).powi(2)).sum())
            .collect();
        let chunks: Vec<_> = self.chunks().collect();
        let mut greatest = vec![0.0f64; chunks.len()];
        let (lanes, lane_codes) = (Self::LANES, E::lane_codes(self.bits));
        // Of a vector and a chunk: the codes, then lane by lane what is packed.
        let mut rows = vec![0; lane_codes * lanes * MAX_CHUNK];
        let mut words = vec![E::Lane::default(); lanes * MAX_CHUNK];
        let mut buffer = Vec::new();
        for v in 0..self.n_vectors {
            let columns = lane_codes * lanes;
            let outputs = v * columns..((v + 1) * columns).min(self.out_features);
            let range = outputs.start * pq.n_subspaces..outputs.end * pq.n_subspaces;
            let outputs = codes.range(range, &mut buffer);
            for (chunk, greatest) in chunks.iter().zip(&mut greatest) {
                let len = chunk.len();
                let outputs = outputs.chunks_exact(pq.n_subspaces);
                let n_codes = outputs.len() * len;
                for (row, codes) in rows.chunks_exact_mut(len).zip(outputs) {
                    row.copy_from_slice(&codes[chunk.clone()]);
                }
                // Lanes that fill up the last vector.
                rows[n_codes..].fill(0);
                if E::SCALED {
                    let squares = &squares[chunk.start * pq.n_centroids..];
                    let square = greatest_square(&rows[..n_codes], len, squares, pq.n_centroids);
                    *greatest = greatest.max(square);
                }
                let words = &mut words[..lanes * len];
                words.fill(E::Lane::default());
                for (part, rows) in rows.chunks_exact(lanes * len).take(lane_codes).enumerate() {
                    let shift = part as u32 * self.bits;
                    for (word, code) in words.iter_mut().zip(rows) {
                        *word |= E::Lane::from_code(*code, shift);
                    }
                }
                let start = (chunk.start * self.n_vectors + v * len) * lanes;
                let packed = self.codes[start..].chunks_exact_mut(lanes);
                for (m, row) in packed.take(len).enumerate() {
                    for (lane, target) in row.iter_mut().enumerate() {
                        *target = words[lane * len + m];
                    }
                }
            }
        }
        greatest.into_iter().map(f64::sqrt).collect()
    }

    /// The subspaces of each chunk.
    fn chunks(&self) -> impl Iterator<Item = Range<usize>> + use<S, E> {
        let (len, end) = (E::chunk_len(self.subvector_dim), self.n_subspaces);
        (0..end)
            .step_by(len)
            .map(move |first| first..(first + len).min(end))
    }

    /// Chunks with their channels.
    fn chunks_and_channels(&self) -> impl Iterator<Item = (Chunk<'_, E>, Range<usize>)> {
        let row = self.n_vectors * Self::LANES;
        self.chunks()
            .zip(&self.norms)
            .map(move |(subspaces, norm)| {
                let channels = subspaces.start * self.subvector_dim
                    ..(subspaces.end * self.subvector_dim).min(self.in_features);
                let codebook_len = self.subvector_dim << self.bits;
                let chunk = Chunk {
                    len: subspaces.len(),
                    subvector_dim: self.subvector_dim,
                    codebooks: &self.codebooks
                        [subspaces.start * codebook_len..subspaces.end * codebook_len],
                    norm: *norm,
                    codes: &self.codes[subspaces.start * row..subspaces.end * row],
                };
                (chunk, channels)
            })
    }

    /// Images from which on a batch is faster than one after the other.
    #[expect(clippy::cast_sign_loss, reason = "clock cycles are positive")]
    fn min_batch(&self) -> usize {
        let images = BATCH_LOOK_UP_CYCLES * Self::LANES as f64 / Self::look_up_cycles(self.bits);
        (images as usize).clamp(2, Self::LANES)
    }

    /// Bytes of scratch for images one after the other: the tables of a chunk,
    /// the sums of `n` images.
    fn single_parts(&self, n: usize) -> [usize; 2] {
        let tables = E::chunk_len(self.subvector_dim) * E::table_len(self.bits) * size_of::<E>();
        [tables / size_of::<f32>(), n * self.bias.len()]
    }

    /// Elements of scratch for a batch: tables, a chunk's inputs, its sums, the
    /// sums of all chunks.
    fn batch_parts(&self) -> [usize; 4] {
        // A vector of entries takes as much as one of float32 values.
        let table = S::LANES << self.bits;
        let inputs = E::chunk_len(self.subvector_dim) * self.subvector_dim;
        [
            BATCH_SUBSPACES * table,
            inputs * Self::LANES,
            self.bias.len() * S::LANES,
            self.bias.len() * Self::LANES,
        ]
    }

    /// Images one after the other.
    fn singles(&self, n: usize, input: &[f32], output: &mut [f32], scratch: &mut [f32]) {
        let [tables_len, sums_len] = self.single_parts(n);
        let (tables, rest) = scratch.split_at_mut(tables_len);
        let (tables, sums) = (as_entries::<E>(tables), &mut rest[..sums_len]);
        let padded = self.bias.len();
        for sums in sums.chunks_exact_mut(padded) {
            sums.copy_from_slice(&self.bias);
        }
        for (chunk, channels) in self.chunks_and_channels() {
            // The codes of a chunk, if not of a layer, stay in L2 for all images.
            for (input, sums) in input
                .chunks_exact(self.in_features)
                .zip(sums.chunks_exact_mut(padded))
            {
                let image = ChunkOfImage {
                    chunk: &chunk,
                    input: &input[channels.clone()],
                    tables,
                    sums,
                };
                match self.bits {
                    4 => self.simd.call(Responses::<E, 4>(image)),
                    5 => self.simd.call(Responses::<E, 5>(image)),
                    _ => self.simd.call(Responses::<E, 6>(image)),
                }
            }
        }
        for (output, sums) in output
            .chunks_exact_mut(self.out_features)
            .zip(sums.chunks_exact(padded))
        {
            output.copy_from_slice(&sums[..self.out_features]);
        }
    }

    /// Up to as many images as there are lanes.
    fn batch(&self, input: &[f32], output: &mut [f32], scratch: &mut [f32]) {
        let [tables_len, inputs_len, chunk_sums_len, sums_len] = self.batch_parts();
        let (tables, rest) = scratch.split_at_mut(tables_len);
        let (inputs, rest) = rest.split_at_mut(inputs_len);
        let (chunk_sums, rest) = rest.split_at_mut(chunk_sums_len);
        let sums = &mut rest[..sums_len];
        let (tables, chunk_sums) = (as_entries::<E>(tables), as_entries::<E>(chunk_sums));
        // Lanes without an image.
        inputs.fill(0.0);
        for (sums, bias) in sums.chunks_exact_mut(Self::LANES).zip(&self.bias) {
            sums.fill(*bias);
        }
        for (chunk, channels) in self.chunks_and_channels() {
            let mut steps = [0.0; 2 * MAX_LANES];
            for (i, image) in input.chunks_exact(self.in_features).enumerate() {
                let image = &image[channels.clone()];
                let scale = self.simd.call(Scale::<E>(&chunk, image));
                steps[i] = 1.0 / scale;
                let lane = inputs[i..].iter_mut().step_by(Self::LANES);
                for (target, x) in lane.zip(image) {
                    *target = *x * scale;
                }
            }
            let batch = ChunkOfBatch {
                chunk: &chunk,
                inputs: &inputs[..channels.len() * Self::LANES],
                steps: &steps,
                tables: &mut *tables,
                chunk_sums: &mut *chunk_sums,
                sums: &mut *sums,
            };
            match self.bits {
                4 => self.simd.call(BatchResponses::<E, 4>(batch)),
                5 => self.simd.call(BatchResponses::<E, 5>(batch)),
                _ => self.simd.call(BatchResponses::<E, 6>(batch)),
            }
        }
        transpose_out(sums, Self::LANES, output, self.out_features);
    }
}

/// Scratch as entries.
fn as_entries<E: Entry>(scratch: &mut [f32]) -> &mut [E] {
    // SAFETY: entries are numbers: any bits are valid.
    let (before, entries, after) = unsafe { scratch.align_to_mut() };
    debug_assert!(before.is_empty() && after.is_empty());
    entries
}

/// The greatest sum of the squares of the codewords of an output, given the
/// codes `(outputs, len)` and the squares `(subspaces, K)`.
fn greatest_square(codes: &[u16], len: usize, squares: &[f64], n_centroids: usize) -> f64 {
    let mut greatest = 0.0f64;
    // The sums of several outputs do not wait for each other.
    let eights = codes.chunks_exact(8 * len);
    let rest = eights.remainder();
    for eight in eights {
        let rows: [&[u16]; 8] = std::array::from_fn(|i| &eight[i * len..][..len]);
        let mut sums = [0.0; 8];
        for (m, squares) in squares.chunks_exact(n_centroids).take(len).enumerate() {
            for (sum, row) in sums.iter_mut().zip(rows) {
                *sum += squares[usize::from(row[m])];
            }
        }
        greatest = sums.into_iter().fold(greatest, f64::max);
    }
    for row in rest.chunks_exact(len) {
        let terms = row.iter().zip(squares.chunks_exact(n_centroids));
        greatest = greatest.max(
            terms
                .map(|(code, squares)| squares[usize::from(*code)])
                .sum(),
        );
    }
    greatest
}

impl<S: Simd, E: Entry> Kernel for PermuteFc<S, E> {
    fn name(&self) -> &str {
        &self.name
    }

    fn scratch_len(&self, n: usize) -> usize {
        let singles = n.min(self.min_batch() - 1);
        let singles = self.single_parts(singles).iter().sum();
        if n < self.min_batch() {
            singles
        } else {
            self.batch_parts().iter().sum::<usize>().max(singles)
        }
    }

    fn run(&self, n: usize, input: &[f32], output: &mut [f32], scratch: &mut [f32]) {
        let (inputs, outputs) = (self.in_features, self.out_features);
        let mut image = 0;
        while image < n {
            let count = (n - image).min(Self::LANES);
            let input = &input[image * inputs..(image + count) * inputs];
            let output = &mut output[image * outputs..(image + count) * outputs];
            if count < self.min_batch() {
                self.singles(count, input, output, scratch);
            } else {
                self.batch(input, output, scratch);
            }
            image += count;
        }
    }
}

/// A chunk of subspaces.
struct Chunk<'a, E: Entry> {
    len: usize,
    subvector_dim: usize,
    /// See [`PermuteFc::codebooks`].
    codebooks: &'a [f32],
    norm: f64,
    /// See [`PermuteFc::codes`].
    codes: &'a [E::Lane],
}

/// What the table entries of a chunk are multiplied by for the inputs of an
/// image.
struct Scale<'a, E: Entry>(&'a Chunk<'a, E>, &'a [f32]);

impl<E: Entry> Task for Scale<'_, E> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> f32 {
        let Self(chunk, input) = self;
        E::scale(input, chunk.len, chunk.subvector_dim, chunk.norm)
    }
}

/// A chunk of one image.
struct ChunkOfImage<'a, E: Entry> {
    chunk: &'a Chunk<'a, E>,
    /// The chunk's channels.
    input: &'a [f32],
    /// Room for the tables.
    tables: &'a mut [E],
    /// One per output, padded.
    sums: &'a mut [f32],
}

/// Add what a chunk contributes to the responses. Codes have `BITS` bits.
struct Responses<'a, E: Entry, const BITS: u32>(ChunkOfImage<'a, E>);

impl<E: Entry, const BITS: u32> Task for Responses<'_, E, BITS> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let ChunkOfImage {
            chunk,
            input,
            tables,
            sums,
        } = self.0;
        let lanes = E::WIDTH * S::LANES;
        let columns = E::lane_codes(BITS) * lanes;
        let n_vectors = chunk.codes.len() / (chunk.len * lanes);
        assert!(chunk.len <= MAX_CHUNK && sums.len() == n_vectors * columns);
        let scale = Scale(chunk, input).run(simd);
        let mut subspaces = [0; MAX_CHUNK];
        let codebooks = (chunk.subvector_dim, chunk.codebooks);
        let n_active =
            build_tables::<S, E, BITS>(simd, codebooks, input, scale, tables, &mut subspaces);
        if n_active == 0 {
            return;
        }
        let n_blocks = n_vectors.div_ceil(block_len::<S, E>(BITS));
        for first in 0..n_blocks {
            let block = Block {
                codes: chunk.codes,
                len: chunk.len,
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

/// Build the tables of those subspaces that have inputs other than zero, one
/// after the other, and list the subspaces. Returns how many there are. Codebooks of
/// sub-vectors of length `dim` are `(subspaces, C', 2^BITS)`.
#[inline(always)]
pub(super) fn build_tables<S: Simd, E: Entry, const BITS: u32>(
    simd: S,
    (dim, codebooks): (usize, &[f32]),
    input: &[f32],
    scale: f32,
    tables: &mut [E],
    subspaces: &mut [u16; MAX_CHUNK],
) -> usize {
    let codewords = 1 << BITS;
    assert!(codebooks.len() >= input.len() * codewords);
    let mut tables = tables.chunks_exact_mut(E::table_len(BITS));
    let mut n_active = 0;
    for (m, input) in input.chunks(dim).enumerate() {
        if input.iter().all(|x| *x == 0.0) {
            continue;
        }
        let table = tables.next().expect("there is room for all subspaces");
        for k in (0..table.len()).step_by(E::WIDTH * S::LANES) {
            let mut sums = [simd.splat(0.0); 2];
            for (j, x) in input.iter().enumerate() {
                let x = simd.splat(*x * scale);
                for (part, sum) in sums.iter_mut().take(E::WIDTH).enumerate() {
                    // Entries come again where the table has more of them.
                    let k = (k + part * S::LANES) % codewords;
                    // SAFETY: channel m * dim + j has a row of `codewords`
                    // values, as asserted; k is a multiple of the lanes, as
                    // `codewords` is.
                    let codewords = unsafe {
                        let row = codebooks.as_ptr().add((m * dim + j) * codewords);
                        simd.load(row.add(k))
                    };
                    *sum = simd.mul_add(x, codewords, *sum);
                }
            }
            // SAFETY: k is below the length of the table, and both are multiples
            // of the lanes.
            unsafe { E::store(simd, table.as_mut_ptr().add(k), E::narrow(simd, sums)) };
        }
        subspaces[n_active] = m as u16;
        n_active += 1;
    }
    n_active
}

/// A block of vectors of codes: some that lie far apart, because memory gives several
/// streams faster than one.
struct Block<'a, E: Entry> {
    /// Those of the chunk, `(vectors, subspaces)`.
    codes: &'a [E::Lane],
    /// Subspaces.
    len: usize,
    /// The first vector.
    first: usize,
    /// From one vector to the next.
    distance: usize,
    /// Those that have tables.
    subspaces: &'a [u16],
    tables: &'a [E],
    /// What 1 in the tables means.
    step: f32,
    /// One per output, padded.
    sums: &'a mut [f32],
}

impl<E: Entry> Block<'_, E> {
    /// Look up and sum the entries of `V` vectors of codes.
    // Plain index loops, see `tile`.
    #[allow(clippy::needless_range_loop)]
    #[inline(always)]
    fn add<S: Simd, const BITS: u32, const V: usize>(self, simd: S) {
        let lanes = E::WIDTH * S::LANES;
        let lane_codes = E::lane_codes(BITS);
        let vector = |v: usize| self.first + v * self.distance;
        assert!(self.codes.len() >= (vector(V - 1) + 1) * self.len * lanes);
        assert!(self.sums.len() >= (vector(V - 1) + 1) * lane_codes * lanes);
        let mut codes = [self.codes.as_ptr(); V];
        for v in 0..V {
            codes[v] = codes[v].wrapping_add(vector(v) * self.len * lanes);
        }
        let mut totals = [[E::zero(simd); MAX_LANE_CODES]; V];
        let mut tables = self.tables.chunks_exact(E::table_len(BITS));
        let mut next = 0;
        for &m in self.subspaces {
            let m = usize::from(m);
            assert!(m < self.len);
            skip(simd, &codes, next * lanes..m * lanes);
            next = m + 1;
            let table = tables.next().expect("every subspace has a table");
            for v in 0..V {
                // SAFETY: there are `len` codes of each vector, of which m is one, as
                // asserted; the table has the length that look-ups of BITS bits ask
                // for.
                unsafe {
                    let mut codes = E::load_codes(simd, codes[v].add(m * lanes));
                    for i in 0..lane_codes {
                        let entries = E::look_up::<S, BITS>(simd, table.as_ptr(), codes);
                        totals[v][i] = E::add(simd, totals[v][i], entries);
                        codes = E::shift::<S, BITS>(simd, codes);
                    }
                }
            }
        }
        skip(simd, &codes, next * lanes..self.len * lanes);
        let step = simd.splat(self.step);
        for v in 0..V {
            for i in 0..lane_codes {
                let sums = &mut self.sums[(vector(v) * lane_codes + i) * lanes..][..lanes];
                // SAFETY: there are as many sums as lanes.
                unsafe { add_scaled::<S, E>(simd, totals[v][i], [step; 2], sums.as_mut_ptr()) };
            }
        }
    }
}

/// Fetch codes that nothing is looked up in.
#[inline(always)]
fn skip<S: Simd, L>(simd: S, codes: &[*const L], range: Range<usize>) {
    for at in range.step_by(2 * S::LANES) {
        for codes in codes {
            simd.prefetch(codes.wrapping_add(at).cast());
        }
    }
}

/// Add a vector of a chunk's sums, multiplied by `steps`, to those of all chunks.
///
/// # Safety
///
/// `sums` is valid for as many values as the vector has.
#[inline(always)]
unsafe fn add_scaled<S: Simd, E: Entry>(
    simd: S,
    chunk_sums: E::Vector<S>,
    steps: [S::F32; 2],
    sums: *mut f32,
) {
    let parts = E::widen(simd, chunk_sums);
    for i in 0..E::WIDTH {
        // SAFETY: the vector has WIDTH * LANES values.
        unsafe {
            let sums = sums.add(i * S::LANES);
            simd.store(sums, simd.mul_add(parts[i], steps[i], simd.load(sums)));
        }
    }
}

/// A chunk of a batch of images, one in each lane.
struct ChunkOfBatch<'a, E: Entry> {
    chunk: &'a Chunk<'a, E>,
    /// `(channels, lanes)`, multiplied by the images' scales.
    inputs: &'a [f32],
    /// What 1 in the tables means for each image.
    steps: &'a [f32; 2 * MAX_LANES],
    /// Room for the tables of `BATCH_SUBSPACES`.
    tables: &'a mut [E],
    /// Room for a vector per output.
    chunk_sums: &'a mut [E],
    /// `(outputs, lanes)`, padded.
    sums: &'a mut [f32],
}

/// [`Responses`] of a batch.
struct BatchResponses<'a, E: Entry, const BITS: u32>(ChunkOfBatch<'a, E>);

impl<E: Entry, const BITS: u32> Task for BatchResponses<'_, E, BITS> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let ChunkOfBatch {
            chunk,
            inputs,
            steps,
            tables,
            chunk_sums,
            sums,
        } = self.0;
        let lanes = E::WIDTH * S::LANES;
        chunk_sums.fill(E::default());
        for first in (0..chunk.len).step_by(BATCH_SUBSPACES) {
            let subspaces = first..(first + BATCH_SUBSPACES).min(chunk.len);
            build_batch_tables::<S, E, BITS>(simd, chunk, inputs, subspaces.clone(), tables);
            look_up_batch::<S, E, BITS>(simd, chunk, subspaces, tables, chunk_sums);
        }
        let (low, high) = (&steps[..], &steps[(E::WIDTH - 1) * S::LANES..]);
        let steps = [simd.load_first(low), simd.load_first(high)];
        let vectors = chunk_sums.chunks_exact(lanes);
        for (chunk_sums, sums) in vectors.zip(sums.chunks_exact_mut(lanes)) {
            // SAFETY: both slices have as many values as there are lanes.
            unsafe {
                let chunk_sums = E::load(simd, chunk_sums.as_ptr());
                add_scaled::<S, E>(simd, chunk_sums, steps, sums.as_mut_ptr());
            }
        }
    }
}

/// Build the tables `(subspaces, codewords, lanes)` of up to `BATCH_SUBSPACES`.
#[inline(always)]
fn build_batch_tables<S: Simd, E: Entry, const BITS: u32>(
    simd: S,
    chunk: &Chunk<'_, E>,
    inputs: &[f32],
    subspaces: Range<usize>,
    tables: &mut [E],
) {
    let (dim, codewords, lanes) = (chunk.subvector_dim, 1 << BITS, E::WIDTH * S::LANES);
    let tables = tables.chunks_exact_mut(codewords * lanes);
    for (m, table) in subspaces.zip(tables) {
        let channels = m * dim..((m + 1) * dim).min(inputs.len() / lanes);
        let codebook = &chunk.codebooks[channels.start * codewords..channels.end * codewords];
        let inputs = &inputs[channels.start * lanes..channels.end * lanes];
        for (k, entries) in table.chunks_exact_mut(lanes).enumerate() {
            let mut sums = [simd.splat(0.0); 2];
            for (x, row) in inputs
                .chunks_exact(lanes)
                .zip(codebook.chunks_exact(codewords))
            {
                for (sum, x) in sums.iter_mut().zip(x.chunks_exact(S::LANES)) {
                    *sum = simd.mul_add(simd.load_first(x), simd.splat(row[k]), *sum);
                }
            }
            // SAFETY: there are as many entries as lanes.
            unsafe { E::store(simd, entries.as_mut_ptr(), E::narrow(simd, sums)) };
        }
    }
}

/// Add the entries of some subspaces to the sums of every output.
// Plain index loops, see `tile`.
#[allow(clippy::needless_range_loop)]
#[inline(always)]
fn look_up_batch<S: Simd, E: Entry, const BITS: u32>(
    simd: S,
    chunk: &Chunk<'_, E>,
    subspaces: Range<usize>,
    tables: &[E],
    chunk_sums: &mut [E],
) {
    let (lanes, lane_codes) = (E::WIDTH * S::LANES, E::lane_codes(BITS));
    let mask = (1 << BITS) - 1;
    assert!(tables.len() >= (subspaces.len() << BITS) * lanes);
    let vectors = chunk.codes.chunks_exact(chunk.len * lanes);
    let vector_len = lane_codes * lanes * lanes;
    for (codes, sums) in vectors.zip(chunk_sums.chunks_exact_mut(vector_len)) {
        let codes = &codes[subspaces.start * lanes..subspaces.end * lanes];
        for lane in 0..lanes {
            let target = |i: usize| (i * lanes + lane) * lanes;
            let mut totals = [E::zero(simd); MAX_LANE_CODES];
            for i in 0..lane_codes {
                // SAFETY: i and lane are below lane_codes and lanes.
                totals[i] = unsafe { E::load(simd, sums.as_ptr().add(target(i))) };
            }
            for m in 0..subspaces.len() {
                let word = codes[m * lanes + lane].bits();
                for i in 0..lane_codes {
                    let code = word >> (i as u32 * BITS) & mask;
                    // SAFETY: there are tables of 2^BITS vectors for all
                    // subspaces, as asserted.
                    let entries =
                        unsafe { E::load(simd, tables.as_ptr().add(((m << BITS) + code) * lanes)) };
                    totals[i] = E::add(simd, totals[i], entries);
                }
            }
            for i in 0..lane_codes {
                // SAFETY: as for loading.
                unsafe { E::store(simd, sums.as_mut_ptr().add(target(i)), totals[i]) };
            }
        }
    }
}
