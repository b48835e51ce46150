//! Codes and signs on disk: a little-endian bit stream.
//!
//! Code `i` of `b` bits occupies bits `i*b .. (i+1)*b` of the stream, and bit
//! `j` of the stream is bit `j % 8` of byte `j / 8`. Unused bits of the last
//! byte are zero. A sign is a code of one bit, 1 for 1 and 0 for -1.

use std::ops::{Deref, Range};
use std::sync::Arc;

use crate::error::{Result, bail_format};

/// A part of a buffer that others share, such as the codes of one layer in the
/// bytes of a file.
#[derive(Clone, Debug)]
pub struct SharedBytes {
    buffer: Arc<Vec<u8>>,
    range: Range<usize>,
}

impl SharedBytes {
    /// The bytes `range` of `buffer`, which has to have them.
    pub fn new(buffer: Arc<Vec<u8>>, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= buffer.len());
        Self { buffer, range }
    }
}

impl Deref for SharedBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.buffer[self.range.clone()]
    }
}

impl PartialEq for SharedBytes {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

/// Bytes that `n` codes of `bits` bits take.
pub fn packed_len(n: usize, bits: u32) -> usize {
    (n * bits as usize).div_ceil(8)
}

/// Pack codes, each below `2^bits`.
pub fn pack(codes: &[u16], bits: u32) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(packed_len(codes.len(), bits));
    // Bits that wait for a full byte: at most 7 old ones and 16 new ones.
    let (mut pending, mut n_pending) = (0u32, 0u32);
    for &code in codes {
        debug_assert!(
            u32::from(code) >> bits == 0,
            "code {code} needs more than {bits} bits"
        );
        pending |= u32::from(code) << n_pending;
        n_pending += bits;
        while n_pending >= 8 {
            bytes.push(pending as u8);
            pending >>= 8;
            n_pending -= 8;
        }
    }
    if n_pending > 0 {
        bytes.push(pending as u8);
    }
    bytes
}

/// Pack signs, each 1 or -1.
pub fn pack_signs(signs: &[i8]) -> Vec<u8> {
    let bit = |(j, sign): (usize, &i8)| u8::from(*sign > 0) << j;
    let byte = |signs: &[i8]| signs.iter().enumerate().map(bit).sum();
    signs.chunks(8).map(byte).collect()
}

/// The inverse of [`pack_signs`].
pub fn unpack_signs(bytes: &[u8], n: usize) -> Vec<i8> {
    let sign = |i: usize| 2 * (bytes[i / 8] >> (i % 8) & 1) as i8 - 1;
    (0..n).map(sign).collect()
}

/// Check the length of `n` packed codes and the unused bits; `what` names them
/// in errors.
pub fn check_packed(what: &str, bytes: &[u8], n: usize, bits: u32) -> Result<()> {
    if bytes.len() != packed_len(n, bits) {
        bail_format!(
            "{what}: {} bytes of packed codes, expected {} ({n} codes of {bits} bits)",
            bytes.len(),
            packed_len(n, bits)
        );
    }
    let unused = bytes.len() * 8 - n * bits as usize;
    if bytes
        .last()
        .is_some_and(|last| last.leading_zeros() < unused as u32)
    {
        bail_format!("{what}: unused bits of the last byte are not zero");
    }
    Ok(())
}

/// Codes of a layer, as they are stored.
#[derive(Clone, Copy, Debug)]
pub enum Codes<'a> {
    /// One in each number.
    Unpacked(&'a [u16]),
    /// Packed, which [`check_packed`] has passed.
    Packed {
        /// The bit stream.
        bytes: &'a [u8],
        /// Number of codes.
        n: usize,
        /// Bits of each, 1 to 16.
        bits: u32,
    },
}

impl<'a> From<&'a [u16]> for Codes<'a> {
    fn from(codes: &'a [u16]) -> Self {
        Self::Unpacked(codes)
    }
}

impl<'a> Codes<'a> {
    /// All codes, unpacked to `buffer` if necessary.
    pub fn all<'b>(&self, buffer: &'b mut Vec<u16>) -> &'b [u16]
    where
        'a: 'b,
    {
        match *self {
            Self::Unpacked(codes) => codes,
            Self::Packed { n, .. } => self.range(0..n, buffer),
        }
    }

    /// The codes of a range, unpacked to `buffer` if necessary.
    ///
    /// A buffer that is used again, and stays in the caches, is much faster than
    /// one for all codes: most of the time would go into fresh pages.
    pub fn range<'b>(&self, range: Range<usize>, buffer: &'b mut Vec<u16>) -> &'b [u16]
    where
        'a: 'b,
    {
        match *self {
            Self::Unpacked(codes) => &codes[range],
            Self::Packed { bytes, n, bits } => {
                assert!(range.start <= range.end && range.end <= n);
                // Eight codes start at a byte.
                let before = range.start % 8;
                let first = range.start / 8 * bits as usize;
                unpack(&bytes[first..], before + range.len(), bits, buffer);
                &buffer[before..]
            }
        }
    }
}

/// Unpack `n` codes of `bits` bits (1 to 16) in place of what `codes` holds.
fn unpack(bytes: &[u8], n: usize, bits: u32, codes: &mut Vec<u16>) {
    codes.resize(n.next_multiple_of(8), 0);
    match bits {
        1 => unpack_bits::<1>(bytes, codes),
        2 => unpack_bits::<2>(bytes, codes),
        3 => unpack_bits::<3>(bytes, codes),
        4 => unpack_bits::<4>(bytes, codes),
        5 => unpack_bits::<5>(bytes, codes),
        6 => unpack_bits::<6>(bytes, codes),
        7 => unpack_bits::<7>(bytes, codes),
        8 => unpack_bits::<8>(bytes, codes),
        9 => unpack_bits::<9>(bytes, codes),
        10 => unpack_bits::<10>(bytes, codes),
        11 => unpack_bits::<11>(bytes, codes),
        12 => unpack_bits::<12>(bytes, codes),
        13 => unpack_bits::<13>(bytes, codes),
        14 => unpack_bits::<14>(bytes, codes),
        15 => unpack_bits::<15>(bytes, codes),
        _ => unpack_bits::<16>(bytes, codes),
    }
    codes.truncate(n);
}

/// [`unpack`] for a constant number of bits, eight codes at a time: they start
/// and end at byte boundaries.
fn unpack_bits<const BITS: usize>(bytes: &[u8], codes: &mut [u16]) {
    let mask = u16::MAX >> (16 - BITS);
    for (i, eight) in codes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        let rest = &bytes[i * BITS..];
        if let (1..=8, Some(bytes)) = (BITS, rest.first_chunk()) {
            // Shifts of 64 bits are much faster than those below.
            let word = u64::from_le_bytes(*bytes);
            for (i, code) in eight.iter_mut().enumerate() {
                *code = (word >> (i * BITS)) as u16 & mask;
            }
            continue;
        }
        let mut bytes = [0; 16];
        let n = rest.len().min(16);
        bytes[..n].copy_from_slice(&rest[..n]);
        let word = u128::from_le_bytes(bytes);
        for (i, code) in eight.iter_mut().enumerate() {
            *code = (word >> (i * BITS)) as u16 & mask;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn layout_is_little_endian() {
        assert_eq!(pack(&[1, 2, 3], 3), [0b1101_0001, 0]);
        assert_eq!(pack(&[0x1ff], 9), [0xff, 1]);
        assert_eq!(pack(&[], 5), [0u8; 0]);
    }

    #[test]
    fn refuses_wrong_lengths_and_stray_bits() {
        assert!(check_packed("x", &[0, 0, 0], 3, 3).is_err());
        assert!(check_packed("x", &[0], 3, 3).is_err());
        assert!(check_packed("x", &[0, 0b10], 3, 3).is_err());
        assert!(check_packed("x", &[0, 0b1], 3, 3).is_ok());
        assert!(check_packed("x", &[], 0, 3).is_ok());
    }

    #[test]
    fn signs_are_codes_of_one_bit() {
        let signs = [1, -1, -1, 1, 1, -1, 1, -1, -1, 1];
        let bytes = pack_signs(&signs);
        assert_eq!(bytes, [0b0101_1001, 0b10]);
        assert_eq!(bytes, pack(&signs.map(|s| u16::from(s > 0)), 1));
        assert_eq!(unpack_signs(&bytes, signs.len()), signs);
        assert_eq!(pack_signs(&[]), [0u8; 0]);
    }

    proptest! {
        #[test]
        fn round_trip(bits in 1u32..=16, raw in prop::collection::vec(any::<u16>(), 0..200)) {
            let codes: Vec<u16> = raw.iter().map(|c| (u32::from(*c) & ((1 << bits) - 1)) as u16).collect();
            let bytes = pack(&codes, bits);
            prop_assert_eq!(bytes.len(), packed_len(codes.len(), bits));
            prop_assert!(check_packed("x", &bytes, codes.len(), bits).is_ok());
            // Longer or shorter than the result.
            let mut buffer = vec![1; 100];
            let packed = Codes::Packed { bytes: &bytes, n: codes.len(), bits };
            prop_assert_eq!(packed.all(&mut buffer), &codes);
            let range = codes.len() / 3..codes.len() - codes.len() / 4;
            prop_assert_eq!(packed.range(range.clone(), &mut buffer), &codes[range]);
        }
    }
}
