//! Codes on disk: a little-endian bit stream.
//!
//! Code `i` of `b` bits occupies bits `i*b .. (i+1)*b` of the stream, and bit
//! `j` of the stream is bit `j % 8` of byte `j / 8`. Unused bits of the last
//! byte are zero.

use crate::error::{Result, bail_format};

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

/// Unpack `n` codes of `bits` bits (1 to 16), which [`check_packed`] has passed.
pub fn unpack(bytes: &[u8], n: usize, bits: u32) -> Vec<u16> {
    let mut codes = Vec::with_capacity(n.next_multiple_of(8));
    // Eight codes start and end at byte boundaries.
    for chunk in bytes.chunks(bits as usize) {
        let mut eight = [0; 16];
        eight[..chunk.len()].copy_from_slice(chunk);
        let eight = u128::from_le_bytes(eight);
        codes.extend((0..8).map(|i| (eight >> (i * bits)) as u16 & (((1u32 << bits) - 1) as u16)));
    }
    codes.truncate(n);
    codes
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

    proptest! {
        #[test]
        fn round_trip(bits in 1u32..=16, raw in prop::collection::vec(any::<u16>(), 0..200)) {
            let codes: Vec<u16> = raw.iter().map(|c| (u32::from(*c) & ((1 << bits) - 1)) as u16).collect();
            let bytes = pack(&codes, bits);
            prop_assert_eq!(bytes.len(), packed_len(codes.len(), bits));
            prop_assert!(check_packed("x", &bytes, codes.len(), bits).is_ok());
            prop_assert_eq!(unpack(&bytes, codes.len(), bits), codes);
        }
    }
}
