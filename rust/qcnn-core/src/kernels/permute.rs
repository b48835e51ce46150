//! Product-quantised fully connected layers with 16-bit tables in registers.
//!
//! The table of a subspace with up to 64 codewords fits one or two vectors, and
//! a vector of codes is the index of a permutation: one instruction looks up as
//! many outputs as a vector has 16-bit lanes. A lane holds the codes of two to
//! four outputs. Shifts bring one after the other down to the lowest bits; the
//! permutation ignores the bits above.
//!
//! Subspaces are taken in chunks: their tables are built, then used for all
//! outputs. So the tables stay in L1 while the codes stream past once, in order.
//! Within a chunk sums are 16-bit integers in registers, at its end they are
//! scaled back and added to the float32 responses.
//!
//! Many inputs are zero behind a ReLU. A subspace whose inputs all are is left
//! out, except that its codes are fetched: where memory is the limit, gaps that
//! stop the hardware's prefetching cost more than they save.
//!
//! # No sum overflows
//!
//! Let `x` be the inputs of a chunk of `L` subspaces, `w` an output's decoded
//! weights there, and `N` the greatest norm that any output's `w` has. By the
//! Cauchy-Schwarz inequality no `<x, w>` exceeds `B = |x| N`. Table entries
//! `<x_m, c>` are multiplied by a scale and rounded, each by up to 1/2, so an
//! output's sum is at most `scale B + L / 2`. The scale is the one that makes
//! this 2^15 - 1. Partial sums may leave the range: additions modulo 2^16 still
//! end at the right sum. An entry that an output uses is itself within `B`,
//! since `|x_m| <= |x|` and `|c| <= |w|`; others may become any number.
//!
//! float32 arithmetic moves an entry by less than `(C' + 4) 2^-24 |x_m| |c|`:
//! the scale and the scaled inputs are rounded, and so is each of `C'` products
//! with sums. By the same inequality this adds up to less than `(C' + 4) 2^-24
//! B` for an output. [`Chunk::scale`] leaves room for 16 times as much.
//!
//! # The error
//!
//! A chunk's part of a response is off by at most `L / 2` steps of `1 / scale`,
//! and typically by `sqrt(L / 12)` of them. The step grows as `B` does; relative
//! to `|x| |w|` it is constant, but a typical response is only `1 / sqrt(L C')`
//! of that. So the relative error grows as `L sqrt(C')`, and this decides the
//! length of chunks, see [`chunk_len`].

use super::words::transpose_codebooks;
use super::{Candidate, FcLayer, Kernel, Weights, vector_cycles};
use crate::graph::PqGeometry;
use crate::isa::{Simd, Task};

/// Most vectors of codes whose outputs are summed up together.
const BLOCK: usize = 4;

/// Most subspaces in a chunk.
const MAX_CHUNK: usize = 100;

/// Greatest scale: it and its inverse are normal float32 numbers.
const MAX_SCALE: f64 = (1u128 << 126) as f64;

/// Subspaces in a chunk. The relative L2 error of the responses is about 1e-3
/// then on Gaussian weights and inputs, and less on the authors' `AlexNet`.
pub(super) fn chunk_len(subvector_dim: usize) -> usize {
    (MAX_CHUNK * MAX_CHUNK / subvector_dim).isqrt().max(1)
}

/// Codes in a lane, if they have `bits` bits.
const fn lane_codes(bits: u32) -> usize {
    (16 / bits) as usize
}

/// Entries of a table in scratch, see [`Simd::look_up_i16`].
const fn table_len(bits: u32) -> usize {
    if bits == 6 { 64 } else { 32 }
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct PermuteFc<S> {
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
    codebooks: Vec<f32>,
    /// For each chunk the greatest norm of an output's weights.
    norms: Vec<f64>,
    /// For each chunk, for each block of vectors: `(subspaces, vectors)`. A
    /// vector has the codes of `LANES` outputs in the lowest bits of its lanes,
    /// those of the next outputs above them, and so on.
    codes: Vec<Line>,
    /// Padded to whole vectors of codes.
    bias: Vec<f32>,
}

/// A cache line of 16-bit lanes, so that no load straddles two.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(super) struct Line(pub(super) [i16; 32]);

impl Line {
    pub(super) fn flatten(lines: &[Self]) -> &[i16] {
        // SAFETY: a `Line` is 32 lanes without padding (`repr(C)`, 64 bytes), so
        // the lines are that many lanes in a row, borrowed as long as the slice
        // lives.
        unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), lines.len() * 32) }
    }

    pub(super) fn flatten_mut(lines: &mut [Self]) -> &mut [i16] {
        // SAFETY: as in `flatten`, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), lines.len() * 32) }
    }
}

impl<S: Simd> PermuteFc<S> {
    /// Lanes of a vector of codes.
    const LANES: usize = 2 * S::LANES;

    /// Vectors of codes in a block: the sums, up to 4 for each of the vectors,
    /// leave registers for the table and the codes.
    const BLOCK: usize = if S::REGISTERS >= 32 { BLOCK } else { 2 };

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
        let n_vectors = layer.out_features.div_ceil(lane_codes(bits) * Self::LANES);
        let look_ups = pq.n_subspaces * n_vectors * lane_codes(bits);
        let products = pq.n_subspaces * pq.subvector_dim * table_len(bits) / S::LANES;
        let cycles = look_ups as f64 * S::LOOK_UP_CYCLES[bits as usize - 4]
            + products as f64 * vector_cycles::<S>();
        Some(Candidate::new(cycles, move || {
            Self::new(simd, layer, (pq, codebooks, codes), bits)
        }))
    }

    fn new(
        simd: S,
        layer: &FcLayer<'_>,
        (pq, codebooks, codes): (PqGeometry, &[f32], &[u16]),
        bits: u32,
    ) -> Self {
        let columns = lane_codes(bits) * Self::LANES;
        let mut bias = layer.bias_or_zeros();
        bias.resize(layer.out_features.next_multiple_of(columns), 0.0);
        let n_vectors = bias.len() / columns;
        let lanes = pq.n_subspaces * n_vectors * Self::LANES;
        let mut kernel = Self {
            simd,
            name: format!("{}-i16-permute", S::NAME),
            in_features: layer.in_features,
            out_features: layer.out_features,
            subvector_dim: pq.subvector_dim,
            n_subspaces: pq.n_subspaces,
            bits,
            n_vectors,
            codebooks: transpose_codebooks(pq, codebooks, 1 << bits),
            norms: Vec::new(),
            codes: vec![Line([0; 32]); lanes.div_ceil(32)],
            bias,
        };
        kernel.norms = kernel.pack(pq, codebooks, codes);
        kernel
    }

    /// Pack the codes `(outputs, M)`. Returns the norms.
    fn pack(&mut self, pq: PqGeometry, codebooks: &[f32], codes: &[u16]) -> Vec<f64> {
        let squares: Vec<f64> = codebooks
            .chunks_exact(pq.subvector_dim)
            .map(|codeword| codeword.iter().map(|c| f64::from(*c).powi(2)).sum())
            .collect();
        let chunks: Vec<_> = self.chunks().collect();
        let mut greatest = vec![0.0f64; chunks.len()];
        let lanes = Self::LANES;
        let packed = Line::flatten_mut(&mut self.codes);
        let columns = lane_codes(self.bits) * lanes;
        // A block for all chunks before the next: its codes come from few pages.
        for (block, rows) in codes
            .chunks(Self::BLOCK * columns * pq.n_subspaces)
            .enumerate()
        {
            let first = block * Self::BLOCK;
            let width = Self::BLOCK.min(self.n_vectors - first);
            for (chunk, greatest) in chunks.iter().zip(&mut greatest) {
                let start = (chunk.start * self.n_vectors + first * chunk.len()) * lanes;
                let squares = &squares[chunk.start * pq.n_centroids..];
                let packed = &mut packed[start..][..width * chunk.len() * lanes];
                // The sums of neighbouring outputs do not wait for each other;
                // eight lie within a vector of every level.
                let eights = rows.chunks_exact(8 * pq.n_subspaces);
                let n_eights = eights.len();
                let rest = eights.remainder().chunks_exact(pq.n_subspaces);
                let position = |o: usize| {
                    let part = o / lanes % lane_codes(self.bits);
                    (o / columns * lanes + o % lanes, part as u32 * self.bits)
                };
                for (i, rows) in eights.enumerate() {
                    let (lane, shift) = position(8 * i);
                    let rows: [_; 8] =
                        std::array::from_fn(|j| &rows[j * pq.n_subspaces..][chunk.clone()]);
                    let packed = &mut packed[lane..];
                    let square = pack_rows(rows, squares, pq, packed, width * lanes, shift);
                    *greatest = greatest.max(square);
                }
                for (i, row) in rest.enumerate() {
                    let (lane, shift) = position(8 * n_eights + i);
                    let rows = [&row[chunk.clone()]];
                    let packed = &mut packed[lane..];
                    let square = pack_rows(rows, squares, pq, packed, width * lanes, shift);
                    *greatest = greatest.max(square);
                }
            }
        }
        greatest.into_iter().map(f64::sqrt).collect()
    }

    /// The subspaces of each chunk.
    fn chunks(&self) -> impl Iterator<Item = std::ops::Range<usize>> + use<S> {
        let (len, end) = (chunk_len(self.subvector_dim), self.n_subspaces);
        (0..end)
            .step_by(len)
            .map(move |first| first..(first + len).min(end))
    }

    /// Elements of scratch that the tables of a chunk take.
    fn tables_len(&self) -> usize {
        chunk_len(self.subvector_dim) * table_len(self.bits) / 2
    }
}

/// Add the codes of neighbouring outputs, `shift` bits up, to lanes `stride`
/// apart for each subspace. Returns the greatest sum of the squares of their
/// codewords, given `(subspaces, K)`.
fn pack_rows<const N: usize>(
    rows: [&[u16]; N],
    squares: &[f64],
    pq: PqGeometry,
    packed: &mut [i16],
    stride: usize,
    shift: u32,
) -> f64 {
    let mut sums = [0.0; N];
    for i in 0..rows[0].len() {
        let squares = &squares[i * pq.n_centroids..][..pq.n_centroids];
        let packed = &mut packed[i * stride..][..N];
        for j in 0..N {
            let code = rows[j][i];
            sums[j] += squares[usize::from(code)];
            packed[j] |= (code << shift) as i16;
        }
    }
    sums.into_iter().fold(0.0, f64::max)
}

impl<S: Simd> Kernel for PermuteFc<S> {
    fn name(&self) -> &str {
        &self.name
    }

    fn scratch_len(&self, n: usize) -> usize {
        self.tables_len() + n * self.bias.len()
    }

    fn run(&self, n: usize, input: &[f32], output: &mut [f32], scratch: &mut [f32]) {
        let (tables, sums) = scratch.split_at_mut(self.tables_len());
        // SAFETY: any bits are valid integers.
        let (_, tables, _) = unsafe { tables.align_to_mut::<i16>() };
        let padded = self.bias.len();
        let sums = &mut sums[..n * padded];
        for sums in sums.chunks_exact_mut(padded) {
            sums.copy_from_slice(&self.bias);
        }
        let codes = Line::flatten(&self.codes);
        let row = self.n_vectors * Self::LANES;
        for (subspaces, norm) in self.chunks().zip(&self.norms) {
            let channels = subspaces.start * self.subvector_dim
                ..(subspaces.end * self.subvector_dim).min(self.in_features);
            let codebook_len = self.subvector_dim << self.bits;
            let chunk = Chunk {
                len: subspaces.len(),
                subvector_dim: self.subvector_dim,
                codebooks: &self.codebooks
                    [subspaces.start * codebook_len..subspaces.end * codebook_len],
                norm: *norm,
                codes: &codes[subspaces.start * row..subspaces.end * row],
            };
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
                    4 => self.simd.call(Responses::<4, { lane_codes(4) }>(image)),
                    5 => self.simd.call(Responses::<5, { lane_codes(5) }>(image)),
                    _ => self.simd.call(Responses::<6, { lane_codes(6) }>(image)),
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
}

/// A chunk of subspaces.
struct Chunk<'a> {
    len: usize,
    subvector_dim: usize,
    /// See [`PermuteFc::codebooks`].
    codebooks: &'a [f32],
    norm: f64,
    /// See [`PermuteFc::codes`].
    codes: &'a [i16],
}

impl Chunk<'_> {
    /// What table entries are multiplied by, see the module's documentation.
    /// Not a number if an input is not, and 0 if one is infinite: the inverse
    /// then is not finite, nor are the responses.
    #[inline(always)]
    fn scale(&self, input: &[f32]) -> f32 {
        // Squares of float32 numbers neither overflow nor vanish in float64.
        let mut squares = [0.0f64; 8];
        let (eights, rest) = input.as_chunks::<8>();
        for eight in eights {
            for (square, x) in squares.iter_mut().zip(eight) {
                *square += f64::from(*x) * f64::from(*x);
            }
        }
        for (square, x) in squares.iter_mut().zip(rest) {
            *square += f64::from(*x) * f64::from(*x);
        }
        let bound = squares.iter().sum::<f64>().sqrt() * self.norm;
        let margin = (self.subvector_dim + 4) as f64 * 8.0 * f64::from(f32::EPSILON);
        let limit = (32767.0 - 0.5 * self.len as f64) / (1.0 + margin);
        (limit / bound).clamp(0.0, MAX_SCALE) as f32
    }
}

/// A chunk of one image.
struct ChunkOfImage<'a> {
    chunk: &'a Chunk<'a>,
    /// The chunk's channels.
    input: &'a [f32],
    /// Room for the tables.
    tables: &'a mut [i16],
    /// One per output, padded.
    sums: &'a mut [f32],
}

/// Add what a chunk contributes to the responses. A lane holds `FIELDS` codes
/// of `BITS` bits.
struct Responses<'a, const BITS: u32, const FIELDS: usize>(ChunkOfImage<'a>);

impl<const BITS: u32, const FIELDS: usize> Task for Responses<'_, BITS, FIELDS> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let ChunkOfImage {
            chunk,
            input,
            tables,
            sums,
        } = self.0;
        let lanes = 2 * S::LANES;
        let n_vectors = chunk.codes.len() / (chunk.len * lanes);
        assert!(chunk.len <= MAX_CHUNK && sums.len() == n_vectors * FIELDS * lanes);
        let scale = chunk.scale(input);
        let mut subspaces = [0; MAX_CHUNK];
        let n_active = build_tables::<S, BITS>(simd, chunk, input, scale, tables, &mut subspaces);
        if n_active == 0 {
            return;
        }
        let step = PermuteFc::<S>::BLOCK;
        for first in (0..n_vectors).step_by(step) {
            let width = step.min(n_vectors - first);
            let block = Block {
                codes: &chunk.codes[first * chunk.len * lanes..][..width * chunk.len * lanes],
                subspaces: &subspaces[..n_active],
                tables,
                step: 1.0 / scale,
                sums: &mut sums[first * FIELDS * lanes..][..width * FIELDS * lanes],
            };
            match width {
                1 => block.add::<S, BITS, FIELDS, 1>(simd),
                2 => block.add::<S, BITS, FIELDS, 2>(simd),
                3 => block.add::<S, BITS, FIELDS, 3>(simd),
                _ => block.add::<S, BITS, FIELDS, BLOCK>(simd),
            }
        }
    }
}

/// Build the tables of those subspaces that have inputs other than zero, one
/// after the other, and list the subspaces. Returns how many there are.
#[inline(always)]
fn build_tables<S: Simd, const BITS: u32>(
    simd: S,
    chunk: &Chunk<'_>,
    input: &[f32],
    scale: f32,
    tables: &mut [i16],
    subspaces: &mut [u16; MAX_CHUNK],
) -> usize {
    let codewords = 1 << BITS;
    let dim = chunk.subvector_dim;
    assert!(chunk.codebooks.len() >= input.len() * codewords);
    let mut tables = tables.chunks_exact_mut(table_len(BITS));
    let mut n_active = 0;
    for (m, input) in input.chunks(dim).enumerate() {
        if input.iter().all(|x| *x == 0.0) {
            continue;
        }
        let table = tables.next().expect("there is room for all subspaces");
        for k in (0..table_len(BITS)).step_by(2 * S::LANES) {
            let mut sums = [simd.splat(0.0); 2];
            for (j, x) in input.iter().enumerate() {
                let x = simd.splat(*x * scale);
                for (half, sum) in sums.iter_mut().enumerate() {
                    // Entries come again where the table has more of them.
                    let k = (k + half * S::LANES) % codewords;
                    // SAFETY: channel m * dim + j has a row of `codewords`
                    // values, as asserted; k is a multiple of the lanes, as
                    // `codewords` is.
                    let codewords = unsafe {
                        let row = chunk.codebooks.as_ptr().add((m * dim + j) * codewords);
                        simd.load(row.add(k))
                    };
                    *sum = simd.mul_add(x, codewords, *sum);
                }
            }
            // SAFETY: k is below the length of the table, and both are multiples
            // of the lanes.
            unsafe { simd.store_i16(table.as_mut_ptr().add(k), simd.round_i16(sums[0], sums[1])) };
        }
        subspaces[n_active] = m as u16;
        n_active += 1;
    }
    n_active
}

/// A block of vectors of codes.
struct Block<'a> {
    /// `(subspaces, vectors)`
    codes: &'a [i16],
    /// Those that have tables.
    subspaces: &'a [u16],
    tables: &'a [i16],
    /// What 1 in the tables means.
    step: f32,
    /// Those of the block's outputs.
    sums: &'a mut [f32],
}

impl Block<'_> {
    /// Look up and sum the entries of `V` vectors of codes.
    // Plain index loops, see `tile`.
    #[allow(clippy::needless_range_loop)]
    #[inline(always)]
    fn add<S: Simd, const BITS: u32, const FIELDS: usize, const V: usize>(self, simd: S) {
        let lanes = 2 * S::LANES;
        let rows = self.codes.len() / (V * lanes);
        assert!(self.sums.len() >= V * FIELDS * lanes);
        let mut totals = [[simd.zero_i16(); FIELDS]; V];
        let mut tables = self.tables.chunks_exact(table_len(BITS));
        let mut next = 0;
        for &m in self.subspaces {
            let m = usize::from(m);
            assert!(m < rows);
            self.skip::<S, V>(simd, next..m);
            next = m + 1;
            let table = tables.next().expect("every subspace has a table");
            for v in 0..V {
                // SAFETY: the block has `rows` rows of V vectors, of which m is
                // one, as asserted; the table has the length that look-ups of
                // BITS bits ask for.
                unsafe {
                    let codes = self.codes.as_ptr().add((m * V + v) * lanes);
                    let mut codes = simd.load_i16(codes);
                    for field in 0..FIELDS {
                        let entries = simd.look_up_i16::<BITS>(table.as_ptr(), codes);
                        totals[v][field] = simd.add_i16(totals[v][field], entries);
                        codes = simd.shift_right_i16::<BITS>(codes);
                    }
                }
            }
        }
        self.skip::<S, V>(simd, next..rows);
        let step = simd.splat(self.step);
        for v in 0..V {
            for field in 0..FIELDS {
                let [low, high] = simd.widen_i16(totals[v][field]);
                // SAFETY: there are V * FIELDS vectors of `lanes` sums, as
                // asserted, two vectors of float32 values each.
                unsafe {
                    let low_sums = self.sums.as_mut_ptr().add((v * FIELDS + field) * lanes);
                    let high_sums = low_sums.add(S::LANES);
                    simd.store(low_sums, simd.mul_add(low, step, simd.load(low_sums)));
                    simd.store(high_sums, simd.mul_add(high, step, simd.load(high_sums)));
                }
            }
        }
    }

    /// Fetch the codes of rows that nothing is looked up in.
    #[inline(always)]
    fn skip<S: Simd, const V: usize>(&self, simd: S, rows: std::ops::Range<usize>) {
        for v in rows.start * V..rows.end * V {
            simd.prefetch(self.codes.as_ptr().wrapping_add(v * 2 * S::LANES));
        }
    }
}
