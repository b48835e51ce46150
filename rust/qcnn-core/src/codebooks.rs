//! Codebooks as they are stored: without padding, in 32, 16 or 8 bits a number.
//!
//! In memory codebooks are f32 of shape `(sets, M, K, C')`; stored, they are
//! `(sets, K, channels)`. Eight-bit numbers are integers from -127 to 127, and a
//! subspace's scale makes its largest one ±127. So the scale follows from the
//! codewords, `max |codeword| / 127`, and is not kept in memory. It has at most
//! 16 significant bits: products of scale and integer are exact, and what is
//! read is written again to the bit.

use half::f16;
use half::slice::HalfFloatSliceExt;
use half::vec::HalfFloatVecExt;

use crate::graph::{CodebookBits, PqGeometry};

/// Largest integer in a codebook of 8 bits.
const LARGEST: f32 = 127.0;

/// The bytes of codebooks, little-endian.
pub fn encode(pq: PqGeometry, channels: usize, books: &[f32]) -> Vec<u8> {
    let mut stored = vec![0.0; pq.codebook_groups * pq.n_centroids * channels];
    let scales = match pq.codebook_bits {
        CodebookBits::Int8 => scales(pq, channels, books),
        CodebookBits::Float16 | CodebookBits::Float32 => Vec::new(),
    };
    for_each_codeword(pq, channels, |codebook, in_memory, on_disk| {
        let codeword = &books[in_memory..][..on_disk.len()];
        match scales.get(codebook) {
            // A codebook of zeros has the scale 0.
            Some(scale) if *scale > 0.0 => {
                let integers = codeword.iter().map(|v| (v / scale).round());
                for (number, integer) in stored[on_disk].iter_mut().zip(integers) {
                    *number = integer;
                }
            }
            _ => stored[on_disk].copy_from_slice(codeword),
        }
    });
    match pq.codebook_bits {
        CodebookBits::Float32 => stored.iter().flat_map(|v| v.to_le_bytes()).collect(),
        CodebookBits::Float16 => Vec::from_f32_slice(&stored)
            .iter()
            .flat_map(|v: &f16| v.to_le_bytes())
            .collect(),
        CodebookBits::Int8 => stored
            .iter()
            .flat_map(|v| (*v as i8).to_le_bytes())
            .collect(),
    }
}

/// The inverse of [`encode`]. `bytes` has the length that geometry and bits imply,
/// `scales` that of [`scales`].
pub fn decode(pq: PqGeometry, channels: usize, bytes: &[u8], scales: &[f32]) -> Vec<f32> {
    let stored: Vec<f32> = match pq.codebook_bits {
        CodebookBits::Float32 => {
            let (numbers, _) = bytes.as_chunks::<4>();
            numbers.iter().map(|b| f32::from_le_bytes(*b)).collect()
        }
        CodebookBits::Float16 => {
            let (numbers, _) = bytes.as_chunks::<2>();
            let numbers: Vec<_> = numbers.iter().map(|b| f16::from_le_bytes(*b)).collect();
            numbers.to_f32_vec()
        }
        CodebookBits::Int8 => bytes
            .iter()
            .map(|b| f32::from(i8::from_le_bytes([*b])))
            .collect(),
    };
    let mut books =
        vec![0.0; pq.codebook_groups * pq.n_subspaces * pq.n_centroids * pq.subvector_dim];
    for_each_codeword(pq, channels, |codebook, in_memory, on_disk| {
        let scale = scales.get(codebook).copied().unwrap_or(1.0);
        let codeword = &mut books[in_memory..][..on_disk.len()];
        for (value, number) in codeword.iter_mut().zip(&stored[on_disk]) {
            *value = number * scale;
        }
    });
    books
}

/// The scale of each subspace, sets outermost, for 8-bit codebooks.
pub fn scales(pq: PqGeometry, channels: usize, books: &[f32]) -> Vec<f32> {
    let mut scales = vec![0.0_f32; pq.codebook_groups * pq.n_subspaces];
    for_each_codeword(pq, channels, |codebook, in_memory, on_disk| {
        for value in &books[in_memory..][..on_disk.len()] {
            scales[codebook] = scales[codebook].max(value.abs());
        }
    });
    for scale in &mut scales {
        *scale /= LARGEST;
    }
    scales
}

/// Index of a number that the stored form would not give back, if there is one.
pub fn first_inexact(pq: PqGeometry, channels: usize, books: &[f32]) -> Option<usize> {
    if pq.codebook_bits == CodebookBits::Float32 {
        return None;
    }
    let scales = match pq.codebook_bits {
        CodebookBits::Int8 => scales(pq, channels, books),
        CodebookBits::Float16 | CodebookBits::Float32 => Vec::new(),
    };
    let again = decode(pq, channels, &encode(pq, channels, books), &scales);
    let mut found = None;
    for_each_codeword(pq, channels, |_, in_memory, on_disk| {
        let mut indices = in_memory..in_memory + on_disk.len();
        #[expect(clippy::float_cmp, reason = "the stored form is exact or refused")]
        let differs = |&i: &usize| again[i] != books[i];
        found = found.or_else(|| indices.find(differs));
    });
    found
}

/// Call `visit(number of the codebook, start of the codeword in memory, its range
/// on disk)` for each codeword.
fn for_each_codeword(
    pq: PqGeometry,
    channels: usize,
    mut visit: impl FnMut(usize, usize, std::ops::Range<usize>),
) {
    for set in 0..pq.codebook_groups {
        for m in 0..pq.n_subspaces {
            let codebook = set * pq.n_subspaces + m;
            let first = m * pq.subvector_dim;
            let real = pq.subvector_dim.min(channels - first);
            for k in 0..pq.n_centroids {
                let in_memory = (codebook * pq.n_centroids + k) * pq.subvector_dim;
                let on_disk = (set * pq.n_centroids + k) * channels + first;
                visit(codebook, in_memory, on_disk..on_disk + real);
            }
        }
    }
}
