//! Product-quantised fully connected layers.
//!
//! Tables are built for a few subspaces at a time and used for all outputs
//! before the next, so they stay in L1 while the codes stream past once, in
//! order: four 16-bit words per output and block, one 64-bit load.
//!
//! A word holds one code, or two where their joint table, the sums of every
//! pair of entries, is small enough: an output then needs half as many
//! look-ups, for some additions that all outputs share.
//!
//! With enough images, a vector has one image per lane: table entries become
//! vectors, and every look-up serves as many images as there are lanes. Such
//! chunks need no joint tables, and take a word's codes apart instead.

use super::tile::{store_tile, tile};
use super::{Candidate, FcLayer, Kernel, Weights};
use crate::graph::PqGeometry;
use crate::isa::{Simd, Task};
use crate::pack::Codes;

/// Words of an output in a block.
const WORDS: usize = 4;

/// Table lengths are multiples of this, the most lanes of any level.
const ALIGNMENT: usize = 16;

/// Codewords computed together for a chunk of images.
const CODEWORDS: usize = 8;

/// Codebooks of up to this size have joint tables: 4 of 16 KiB at most.
const MAX_JOINT_CENTROIDS: usize = 64;

/// As many images, or more, are looked up together even if lanes stay empty;
/// fewer are faster one by one.
const MIN_CHUNK: usize = 4;

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct WordsFc<S> {
    simd: S,
    name: String,
    in_features: usize,
    out_features: usize,
    subvector_dim: usize,
    n_subspaces: usize,
    /// Codes in a word, 1 or 2.
    word_codes: usize,
    /// Length of a subspace's table, at least `n_centroids`. With two codes in
    /// a word a power of two, `1 << shift`; the first code is the lower one.
    table_len: usize,
    shift: u32,
    /// `(subspaces, C', table_len)`, zeros behind the codewords.
    codebooks: Vec<f32>,
    /// `(blocks, outputs)`, each `WORDS` words, the first lowest. Words without
    /// subspaces are 0.
    words: Vec<u64>,
    bias: Vec<f32>,
}

impl<S: Simd> WordsFc<S> {
    pub(crate) fn candidate<'a>(simd: S, layer: &'a FcLayer<'a>) -> Option<Candidate<'a>> {
        let Weights::ProductQuantized {
            geometry: pq,
            codebooks,
            codes,
        } = layer.weights
        else {
            return None;
        };
        let joint_len = pq.n_centroids.next_power_of_two().max(ALIGNMENT);
        // The additions of the joint table have to cost less than the look-ups
        // they save.
        let joint = pq.n_centroids <= MAX_JOINT_CENTROIDS
            && pq.n_subspaces > 1
            && joint_len * joint_len <= 4 * layer.out_features;
        let (word_codes, table_len) = if joint {
            (2, joint_len)
        } else {
            (1, pq.n_centroids.next_multiple_of(ALIGNMENT))
        };
        // A multiplication per vector of the tables, an addition per vector of
        // the joint tables, a look-up per word.
        let words = pq.n_subspaces.div_ceil(word_codes);
        let tables = pq.n_subspaces * pq.subvector_dim * table_len / S::LANES;
        let joint_tables = if joint {
            words * joint_len * joint_len / S::LANES
        } else {
            0
        };
        let cycles = (tables + joint_tables) as f64 + 1.2 * (words * layer.out_features) as f64;
        Some(Candidate::new(cycles, move || {
            Self::new(simd, layer, (pq, codebooks, codes), word_codes, table_len)
        }))
    }

    fn new(
        simd: S,
        layer: &FcLayer<'_>,
        (pq, codebooks, codes): (PqGeometry, &[f32], Codes<'_>),
        word_codes: usize,
        table_len: usize,
    ) -> Self {
        let shift = table_len.ilog2();
        Self {
            simd,
            name: format!("{}-f32-words{word_codes}", S::NAME),
            in_features: layer.in_features,
            out_features: layer.out_features,
            subvector_dim: pq.subvector_dim,
            n_subspaces: pq.n_subspaces,
            word_codes,
            table_len,
            shift,
            codebooks: transpose_codebooks(pq, codebooks, table_len),
            words: pack_words(
                pq,
                codes.all(&mut Vec::new()),
                layer.out_features,
                word_codes,
                shift,
            ),
            bias: layer.bias_or_zeros(),
        }
    }

    /// Subspaces of a block.
    fn block_subspaces(&self) -> usize {
        WORDS * self.word_codes
    }

    /// Elements of the table of one word.
    fn word_table_len(&self) -> usize {
        if self.word_codes == 2 {
            self.table_len << self.shift
        } else {
            self.table_len
        }
    }

    /// Channels of subspace `m`.
    fn channels(&self, m: usize) -> std::ops::Range<usize> {
        let first = m * self.subvector_dim;
        first..(first + self.subvector_dim).min(self.in_features)
    }

    /// The transposed codewords of subspace `m`, real channels only.
    fn codebook(&self, m: usize) -> &[f32] {
        let len = self.subvector_dim * self.table_len;
        &self.codebooks[m * len..][..self.channels(m).len() * self.table_len]
    }

    /// Blocks of words, each with its first subspace.
    fn blocks(&self) -> impl Iterator<Item = (usize, &[u64])> {
        let firsts = (0..self.n_subspaces).step_by(self.block_subspaces());
        firsts.zip(self.words.chunks_exact(self.out_features))
    }

    /// Elements of scratch for a single image: the tables of a pair of
    /// subspaces, the tables of a block's words.
    fn single_parts(&self) -> [usize; 2] {
        [2 * self.table_len, WORDS * self.word_table_len()]
    }

    /// Elements of scratch for a chunk of images: input, tables, output.
    fn chunk_parts(&self) -> [usize; 3] {
        [
            self.in_features * S::LANES,
            self.block_subspaces() * self.table_len * S::LANES,
            self.out_features * S::LANES,
        ]
    }

    fn single(&self, input: &[f32], output: &mut [f32], scratch: &mut [f32]) {
        let [pair_len, tables_len] = self.single_parts();
        let (pair, rest) = scratch.split_at_mut(pair_len);
        let tables = &mut rest[..tables_len];
        output.copy_from_slice(&self.bias);
        for (first, words) in self.blocks() {
            for (i, table) in tables.chunks_exact_mut(self.word_table_len()).enumerate() {
                for (j, table) in pair.chunks_exact_mut(self.table_len).enumerate() {
                    let m = first + i * self.word_codes + j;
                    if m < self.n_subspaces {
                        self.simd.call(Table {
                            input: &input[self.channels(m)],
                            codebook: self.codebook(m),
                            products: table,
                        });
                    } else {
                        // Words that fill up the last block.
                        table.fill(0.0);
                    }
                }
                let (lower, upper) = pair.split_at(self.table_len);
                if self.word_codes == 2 {
                    self.simd.call(JointTable {
                        lower,
                        upper,
                        sums: table,
                    });
                } else {
                    table.copy_from_slice(lower);
                }
            }
            self.simd.call(LookUp {
                words,
                tables,
                table_len: self.word_table_len(),
                output,
            });
        }
    }

    /// Up to `LANES` images.
    fn chunk(&self, input: &[f32], output: &mut [f32], scratch: &mut [f32]) {
        let [inputs_len, tables_len, outputs_len] = self.chunk_parts();
        let (inputs, rest) = scratch.split_at_mut(inputs_len);
        let (tables, rest) = rest.split_at_mut(tables_len);
        let outputs = &mut rest[..outputs_len];
        transpose_in(input, self.in_features, inputs, S::LANES);
        for (lanes, bias) in outputs.chunks_exact_mut(S::LANES).zip(&self.bias) {
            lanes.fill(*bias);
        }
        let table_len = self.table_len * S::LANES;
        for (first, words) in self.blocks() {
            for (i, table) in tables.chunks_exact_mut(table_len).enumerate() {
                let m = first + i;
                if m < self.n_subspaces {
                    let channels = self.channels(m);
                    self.simd.call(ChunkTable {
                        inputs: &inputs[channels.start * S::LANES..channels.end * S::LANES],
                        codebook: self.codebook(m),
                        table,
                    });
                } else {
                    table.fill(0.0);
                }
            }
            let look_up = ChunkLookUp {
                words,
                tables,
                table_len: self.table_len,
                shift: self.shift,
                outputs,
            };
            if self.word_codes == 2 {
                self.simd.call(ChunkWords::<2>(look_up));
            } else {
                self.simd.call(ChunkWords::<1>(look_up));
            }
        }
        transpose_out(outputs, S::LANES, output, self.out_features);
    }
}

/// Codebooks `(M, K, C')` as `(M, C', table_len)`.
pub(super) fn transpose_codebooks(pq: PqGeometry, codebooks: &[f32], table_len: usize) -> Vec<f32> {
    let dim = pq.subvector_dim;
    let mut transposed = vec![0.0; pq.n_subspaces * dim * table_len];
    let pairs = transposed
        .chunks_exact_mut(dim * table_len)
        .zip(codebooks.chunks_exact(pq.n_centroids * dim));
    for (target, source) in pairs {
        for (k, codeword) in source.chunks_exact(dim).enumerate() {
            for (j, value) in codeword.iter().enumerate() {
                target[j * table_len + k] = *value;
            }
        }
    }
    transposed
}

/// Codes `(outputs, M)` as [`WordsFc::words`].
fn pack_words(
    pq: PqGeometry,
    codes: &[u16],
    outputs: usize,
    word_codes: usize,
    shift: u32,
) -> Vec<u64> {
    let block = WORDS * word_codes;
    let mut words = Vec::with_capacity(pq.n_subspaces.div_ceil(block) * outputs);
    for first in (0..pq.n_subspaces).step_by(block) {
        for codes in codes.chunks_exact(pq.n_subspaces) {
            let mut packed = 0;
            for (i, &code) in codes[first..].iter().take(block).enumerate() {
                assert!(usize::from(code) < pq.n_centroids);
                let word = i / word_codes;
                let position = 16 * word as u32 + shift * (i % word_codes) as u32;
                packed |= u64::from(code) << position;
            }
            words.push(packed);
        }
    }
    words
}

/// Images `(n, len)` as `(len, lanes)`, zeros in the lanes of missing images.
fn transpose_in(images: &[f32], len: usize, lanes: &mut [f32], n_lanes: usize) {
    if images.len() < len * n_lanes {
        lanes.fill(0.0);
    }
    for (lane, image) in images.chunks_exact(len).enumerate() {
        for (target, x) in lanes[lane..].iter_mut().step_by(n_lanes).zip(image) {
            *target = *x;
        }
    }
}

/// The inverse of [`transpose_in`].
pub(super) fn transpose_out(lanes: &[f32], n_lanes: usize, images: &mut [f32], len: usize) {
    for (lane, image) in images.chunks_exact_mut(len).enumerate() {
        for (y, source) in image.iter_mut().zip(lanes[lane..].iter().step_by(n_lanes)) {
            *y = *source;
        }
    }
}

impl<S: Simd> Kernel for WordsFc<S> {
    fn name(&self) -> &str {
        &self.name
    }

    fn scratch_len(&self, n: usize) -> usize {
        let single: usize = self.single_parts().iter().sum();
        let chunk: usize = self.chunk_parts().iter().sum();
        if n < MIN_CHUNK {
            single
        } else {
            single.max(chunk)
        }
    }

    fn run(&self, n: usize, input: &[f32], output: &mut [f32], scratch: &mut [f32]) {
        let (inputs, outputs) = (self.in_features, self.out_features);
        let mut image = 0;
        while image < n {
            let rest = n - image;
            let count = if rest < MIN_CHUNK {
                1
            } else {
                rest.min(S::LANES)
            };
            let input = &input[image * inputs..(image + count) * inputs];
            let output = &mut output[image * outputs..(image + count) * outputs];
            if count == 1 {
                self.single(input, output, scratch);
            } else {
                self.chunk(input, output, scratch);
            }
            image += count;
        }
    }
}

/// Inner products of a sub-vector with all codewords.
struct Table<'a> {
    input: &'a [f32],
    /// `(input, products)`
    codebook: &'a [f32],
    products: &'a mut [f32],
}

impl Task for Table<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let len = self.products.len();
        assert!(len.is_multiple_of(S::LANES) && self.codebook.len() >= self.input.len() * len);
        for k in (0..len).step_by(S::LANES) {
            let mut sum = simd.splat(0.0);
            for j in 0..self.input.len() {
                // SAFETY: the vector lies within row j of the codebook, as
                // asserted.
                let codewords = unsafe { simd.load(self.codebook.as_ptr().add(j * len + k)) };
                sum = simd.mul_add(simd.splat(self.input[j]), codewords, sum);
            }
            // SAFETY: the vector lies within the table, as asserted.
            unsafe { simd.store(self.products.as_mut_ptr().add(k), sum) };
        }
    }
}

/// Sums of every pair of entries: `sums[u][l] = upper[u] + lower[l]`.
struct JointTable<'a> {
    lower: &'a [f32],
    upper: &'a [f32],
    sums: &'a mut [f32],
}

impl Task for JointTable<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let len = self.lower.len();
        assert!(len.is_multiple_of(S::LANES) && self.sums.len() >= self.upper.len() * len);
        for l in (0..len).step_by(S::LANES) {
            // SAFETY: the vector lies within `lower`, as asserted.
            let lower = unsafe { simd.load(self.lower.as_ptr().add(l)) };
            for u in 0..self.upper.len() {
                let sum = simd.add(simd.splat(self.upper[u]), lower);
                // SAFETY: the vector lies within row u of the sums, as
                // asserted.
                unsafe { simd.store(self.sums.as_mut_ptr().add(u * len + l), sum) };
            }
        }
    }
}

/// Add the entries of a block's words to each output.
struct LookUp<'a> {
    /// One per output.
    words: &'a [u64],
    /// `(WORDS, table_len)`
    tables: &'a [f32],
    table_len: usize,
    output: &'a mut [f32],
}

impl Task for LookUp<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        assert!(self.tables.len() >= WORDS * self.table_len);
        for (words, output) in self.words.iter().zip(self.output) {
            // SAFETY: `pack_words` has checked that codes are less than
            // `n_centroids`, so words are less than the length of their table;
            // there are WORDS tables, as asserted.
            let entry = |i: usize| unsafe {
                let word = (*words >> (16 * i)) as usize & 0xffff;
                *self.tables.get_unchecked(i * self.table_len + word)
            };
            // As a tree: a short chain of dependent additions.
            *output += (entry(0) + entry(1)) + (entry(2) + entry(3));
        }
    }
}

/// Inner products of a chunk of sub-vectors with all codewords.
struct ChunkTable<'a> {
    /// `(channels, LANES)`
    inputs: &'a [f32],
    /// `(channels, codewords)`
    codebook: &'a [f32],
    /// `(codewords, LANES)`
    table: &'a mut [f32],
}

impl Task for ChunkTable<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let depth = self.inputs.len() / S::LANES;
        let codewords = self.table.len() / S::LANES;
        assert!(codewords.is_multiple_of(CODEWORDS) && self.codebook.len() >= depth * codewords);
        for k in (0..codewords).step_by(CODEWORDS) {
            // SAFETY: the codebook has `codewords` values for each of the
            // `depth` vectors of inputs; k + CODEWORDS is at most `codewords`,
            // the vectors of the table.
            unsafe {
                let products = tile::<S, CODEWORDS, 1>(
                    simd,
                    depth,
                    |j, i| *self.codebook.get_unchecked(j * codewords + k + i),
                    |j| self.inputs.as_ptr().add(j * S::LANES),
                    [[simd.splat(0.0)]; CODEWORDS],
                );
                let table = self.table.as_mut_ptr().add(k * S::LANES);
                store_tile(simd, table, S::LANES, &products);
            }
        }
    }
}

/// Add the entries of a block's words to each output of a chunk of images.
struct ChunkLookUp<'a> {
    /// One per output.
    words: &'a [u64],
    /// `(subspaces of the block, table_len, LANES)`
    tables: &'a [f32],
    table_len: usize,
    /// Bits of the lower code of two.
    shift: u32,
    /// `(outputs, LANES)`
    outputs: &'a mut [f32],
}

/// [`ChunkLookUp`] for words of `N` codes.
struct ChunkWords<'a, const N: usize>(ChunkLookUp<'a>);

impl<const N: usize> Task for ChunkWords<'_, N> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let ChunkLookUp {
            words,
            tables,
            table_len,
            shift,
            outputs,
        } = self.0;
        assert!(tables.len() >= WORDS * N * table_len * S::LANES);
        assert!(outputs.len() >= words.len() * S::LANES);
        let mask = (1usize << shift) - 1;
        for (o, packed) in words.iter().enumerate() {
            // SAFETY: `pack_words` has checked that codes are less than
            // `n_centroids`, so at most `table_len`; there are WORDS * N tables
            // of vectors and a vector for each output, as asserted.
            unsafe {
                let entry = |i: usize, code: usize| {
                    simd.load(tables.as_ptr().add((i * table_len + code) * S::LANES))
                };
                let target = outputs.as_mut_ptr().add(o * S::LANES);
                let word = |i: usize| {
                    let word = (*packed >> (16 * i)) as usize & 0xffff;
                    if N == 2 {
                        simd.add(entry(2 * i + 1, word >> shift), entry(2 * i, word & mask))
                    } else {
                        entry(i, word)
                    }
                };
                // In the order of `LookUp` and `JointTable`, so that an image's
                // response does not depend on the batch it comes in.
                let sum = simd.add(simd.add(word(0), word(1)), simd.add(word(2), word(3)));
                simd.store(target, simd.add(simd.load(target), sum));
            }
        }
    }
}
