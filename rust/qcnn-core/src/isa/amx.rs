//! AMX: products of tiles of bytes, on Linux.
//!
//! The CPU has eight registers, `tmm0` to `tmm7`, each a tile of 16 rows of 64 bytes. A
//! multiplication takes 16 rows of weights, 64 bytes each, and 16 columns of inputs, in
//! groups of four bytes as the multiplications of VNNI have them, and adds the products to
//! 16 x 16 sums of 32 bits: 16,384 products.
//!
//! Rust has no stable intrinsics for them, so the loops are in assembly. Nothing else
//! touches these registers: the compiler uses them in functions with AMX's target features
//! only, and there are none.

#![expect(
    clippy::unused_self,
    reason = "a token proves that there are the instructions"
)]

use std::arch::asm;
use std::arch::x86_64::{
    __cpuid_count, __m512i, __mmask16, _mm_mask_storeu_epi8, _mm256_loadu_si256, _mm512_add_epi32,
    _mm512_castsi256_si512, _mm512_cvtepi32_epi8, _mm512_cvtps_epi32, _mm512_inserti64x4,
    _mm512_loadu_si512, _mm512_maskz_loadu_ps, _mm512_mul_ps, _mm512_permutex2var_epi8,
    _mm512_set1_epi32, _mm512_set1_ps, _mm512_srli_epi32, _mm512_storeu_si512, _mm512_xor_si512,
};
use std::marker::PhantomData;
use std::sync::LazyLock;

use super::{Avx512, Simd};

/// Rows of a tile, and 32-bit columns.
pub(crate) const TILE: usize = 16;

/// Bytes of a row of a tile.
pub(crate) const TILE_ROW: usize = 64;

/// Bytes of a tile.
pub(crate) const TILE_BYTES: usize = TILE * TILE_ROW;

/// Columns that [`Amx::interleave`] packs at a time.
pub(crate) const COLUMNS: usize = 2 * TILE;

/// Sums of four tiles.
pub(crate) type Sums = [[[i32; TILE]; TILE]; 4];

/// Token of AMX, beside AVX-512 with VBMI.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Amx(Avx512<true, true>);

/// Tiles of this thread, configured until this is dropped.
#[derive(Debug)]
pub(crate) struct Tiles(PhantomData<*const ()>);

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

static FULL_TILES: Configuration = Configuration {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// Whether the CPU has AMX for bytes and the system lets this process use it. Linux wants
/// to be asked, because the registers make a thread's saved state larger.
static GRANTED: LazyLock<bool> = LazyLock::new(|| {
    #[allow(unused_unsafe, reason = "unsafe in Rust 1.89, not in 1.95")]
    // SAFETY: every x86-64 CPU answers, and this leaf exists where AVX-512 does.
    let features = unsafe { __cpuid_count(7, 0) }.edx;
    // AMX-TILE, AMX-INT8.
    features >> 24 & 3 == 3 && request()
});

#[cfg(target_os = "linux")]
fn request() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: the call takes two numbers and changes nothing but what the process may use.
    unsafe {
        libc::syscall(
            libc::SYS_arch_prctl,
            ARCH_REQ_XCOMP_PERM,
            XFEATURE_XTILEDATA,
        ) == 0
    }
}

#[cfg(not(target_os = "linux"))]
fn request() -> bool {
    false
}

impl Amx {
    /// The token, if the CPU and the system have AMX.
    pub(crate) fn new() -> Option<Self> {
        let simd = Avx512::new()?;
        GRANTED.then_some(Self(simd))
    }

    /// The vectors beside the tiles.
    pub(crate) fn simd(self) -> Avx512<true, true> {
        self.0
    }

    /// Configure the tiles of this thread.
    pub(crate) fn tiles(self) -> Tiles {
        // SAFETY: `self` proves AMX; the configuration is a valid one.
        unsafe {
            asm!(
                "ldtilecfg [{}]",
                in(reg) &raw const FULL_TILES,
                options(nostack, readonly, preserves_flags)
            );
        }
        Tiles(PhantomData)
    }

    /// Make bytes of `values`: `value * factor`, rounded, plus `zero`. All have to be from
    /// -128 to 127.
    pub(crate) fn bytes(self, values: &[f32], factor: f32, zero: i32, target: &mut [u8]) {
        assert_eq!(values.len(), target.len());
        // SAFETY: `self` proves AVX-512 F, BW and VL.
        unsafe { bytes(values, factor, zero, target) }
    }

    /// Make two digits of `values`: `value * factor`, rounded, is `256 * high + low`, both
    /// of which are from -128 to 127. So it has to be at least -32,896 and at most 32,639.
    pub(crate) fn digits(self, values: &[f32], factor: f32, targets: [&mut [u8]; 2]) {
        assert!(targets.iter().all(|target| target.len() == values.len()));
        // SAFETY: `self` proves AVX-512 F, BW and VL.
        unsafe { digits(values, factor, targets) }
    }

    /// Pack [`COLUMNS`] columns of a matrix whose rows start at `starts`, 64 for each tile,
    /// in tiles of 16 columns: the first half of them at the first target, the second at
    /// the second, for each 64 rows another tile `stride` bytes on.
    ///
    /// # Safety
    ///
    /// Every row is valid for reads of [`COLUMNS`] bytes, and so is `stride` times
    /// `starts.len() / 64`, less what follows the last tile, for writes at the targets.
    pub(crate) unsafe fn interleave(
        self,
        source: *const u8,
        starts: &[u32],
        targets: [*mut u8; 2],
        stride: usize,
    ) {
        // SAFETY: `self` proves AVX-512 BW and VBMI; the rest is the caller's promise.
        unsafe { interleave(source, starts, targets, stride) }
    }
}

/// At most 16 numbers, as [`Amx::bytes`] and [`Amx::digits`] want them.
#[target_feature(enable = "avx512f")]
#[inline]
fn rounded(values: &[f32], factor: f32) -> __m512i {
    // SAFETY: no values are read but those that there are.
    let values = unsafe { _mm512_maskz_loadu_ps(first(values.len()), values.as_ptr()) };
    _mm512_cvtps_epi32(_mm512_mul_ps(values, _mm512_set1_ps(factor)))
}

/// Store the lowest byte of as many lanes as there is room for, at most 16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
fn store_bytes(vector: __m512i, target: &mut [u8]) {
    let bytes = _mm512_cvtepi32_epi8(vector);
    // SAFETY: nothing is written behind the target's end.
    unsafe { _mm_mask_storeu_epi8(target.as_mut_ptr().cast(), first(target.len()), bytes) }
}

/// A mask of the first `n` lanes, at most 16.
fn first(n: usize) -> __mmask16 {
    ((1u32 << n) - 1) as __mmask16
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn bytes(values: &[f32], factor: f32, zero: i32, target: &mut [u8]) {
    let zeros = _mm512_set1_epi32(zero);
    for (values, target) in values.chunks(TILE).zip(target.chunks_mut(TILE)) {
        store_bytes(_mm512_add_epi32(rounded(values, factor), zeros), target);
    }
}

/// With 128 added to both digits they are those of a number without signs.
const RAISED: i32 = 0x8080;

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn digits(values: &[f32], factor: f32, [high, low]: [&mut [u8]; 2]) {
    let raised = _mm512_set1_epi32(RAISED);
    let targets = high.chunks_mut(TILE).zip(low.chunks_mut(TILE));
    for (values, (high, low)) in values.chunks(TILE).zip(targets) {
        let number = _mm512_add_epi32(rounded(values, factor), raised);
        let number = _mm512_xor_si512(number, raised);
        store_bytes(_mm512_srli_epi32::<8>(number), high);
        store_bytes(number, low);
    }
}

/// For each byte of two tiles' rows of 16 columns the one of two pairs of rows, each of 32
/// bytes, that it comes from.
static INTERLEAVED: [[u8; TILE_ROW]; 2] = {
    let mut bytes = [[0; TILE_ROW]; 2];
    let mut column = 0;
    while column < COLUMNS {
        let mut row = 0;
        while row < 4 {
            bytes[column / TILE][column % TILE * 4 + row] = (row * COLUMNS + column) as u8;
            row += 1;
        }
        column += 1;
    }
    bytes
};

/// See [`Amx::interleave`].
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
unsafe fn interleave(source: *const u8, starts: &[u32], targets: [*mut u8; 2], stride: usize) {
    // SAFETY: the orders have 64 bytes; the rest is the caller's promise.
    unsafe {
        let orders = INTERLEAVED.map(|order| _mm512_loadu_si512(order.as_ptr().cast()));
        let row = |start: u32| _mm256_loadu_si256(source.add(start as usize).cast());
        for (i, tile) in starts.as_chunks::<TILE_ROW>().0.iter().enumerate() {
            for (j, rows) in tile.as_chunks::<4>().0.iter().enumerate() {
                let [a, b, c, d] = *rows;
                let ab = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(row(a)), row(b));
                let cd = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(row(c)), row(d));
                for (target, order) in targets.iter().zip(orders) {
                    let packed = _mm512_permutex2var_epi8(ab, order, cd);
                    let target = target.add(i * stride + j * TILE_ROW);
                    _mm512_storeu_si512(target.cast(), packed);
                }
            }
        }
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: `self` proves AMX.
        unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) }
    }
}

impl Tiles {
    /// Products of tiles of weights with tiles of columns, summed over `n` blocks of 64 rows
    /// of the matrices.
    ///
    /// With one digit there are two tiles of each: sums are (weights 0, columns 0), (0, 1),
    /// (1, 0), (1, 1). With two digits there are two tiles of weights, each of all digits,
    /// the high ones first, and one of columns, likewise: for each tile of weights, sums of
    /// products of high digits, then those of a high and a low one.
    ///
    /// # Safety
    ///
    /// `weights` is valid for reads of `n` times `2 * DIGITS` tiles, `columns` of `n` times
    /// two.
    pub(crate) unsafe fn multiply<const DIGITS: usize>(
        &self,
        mut weights: *const i8,
        mut columns: *const u8,
        n: usize,
        sums: &mut Sums,
    ) {
        const { assert!(DIGITS == 1 || DIGITS == 2) };
        self.clear();
        // Loads are between multiplications: both go on at the same time.
        for _ in 0..n {
            // SAFETY: `self` proves AMX with tiles that are configured; the caller vouches
            // for what is read.
            unsafe {
                if DIGITS == 1 {
                    asm!(
                        "tileloadd tmm6, [{columns} + {row}*1]",
                        "tileloadd tmm4, [{weights} + {row}*1]",
                        "tdpbssd tmm0, tmm4, tmm6",
                        "tileloadd tmm5, [{weights} + {row}*1 + 1024]",
                        "tdpbssd tmm2, tmm5, tmm6",
                        "tileloadd tmm7, [{columns} + {row}*1 + 1024]",
                        "tdpbssd tmm1, tmm4, tmm7",
                        "tdpbssd tmm3, tmm5, tmm7",
                        weights = in(reg) weights,
                        columns = in(reg) columns,
                        row = in(reg) TILE_ROW,
                        options(nostack, readonly, preserves_flags)
                    );
                } else {
                    asm!(
                        "tileloadd tmm6, [{columns} + {row}*1]",
                        "tileloadd tmm4, [{weights} + {row}*1]",
                        "tdpbssd tmm0, tmm4, tmm6",
                        "tileloadd tmm7, [{columns} + {row}*1 + 1024]",
                        "tdpbssd tmm1, tmm4, tmm7",
                        "tileloadd tmm5, [{weights} + {row}*1 + 1024]",
                        "tileloadd tmm4, [{weights} + {row}*1 + 2048]",
                        "tdpbssd tmm2, tmm4, tmm6",
                        "tdpbssd tmm1, tmm5, tmm6",
                        "tileloadd tmm5, [{weights} + {row}*1 + 3072]",
                        "tdpbssd tmm3, tmm4, tmm7",
                        "tdpbssd tmm3, tmm5, tmm6",
                        weights = in(reg) weights,
                        columns = in(reg) columns,
                        row = in(reg) TILE_ROW,
                        options(nostack, readonly, preserves_flags)
                    );
                }
                weights = weights.add(2 * DIGITS * TILE_BYTES);
                columns = columns.add(2 * TILE_BYTES);
            }
        }
        self.store(sums);
    }

    #[inline(always)]
    fn clear(&self) {
        // SAFETY: `self` proves AMX with tiles that are configured.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                options(nomem, nostack, preserves_flags)
            );
        }
    }

    #[inline(always)]
    fn store(&self, sums: &mut Sums) {
        // SAFETY: as above; the sums are four tiles.
        unsafe {
            asm!(
                "tilestored [{sums} + {row}*1], tmm0",
                "tilestored [{sums} + {row}*1 + 1024], tmm1",
                "tilestored [{sums} + {row}*1 + 2048], tmm2",
                "tilestored [{sums} + {row}*1 + 3072], tmm3",
                sums = in(reg) sums,
                row = in(reg) TILE_ROW,
                options(nostack, preserves_flags)
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers that look random, of all bits.
    fn bytes(n: usize, seed: u64) -> Vec<u8> {
        let mut state = seed;
        let mut next = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        };
        (0..n).map(|_| next()).collect()
    }

    #[test]
    fn numbers_of_two_digits() {
        let Some(amx) = Amx::new() else { return };
        // In whole vectors and less.
        let numbers: Vec<i32> = (-32_896..=32_639).collect();
        for numbers in [&numbers[..], &numbers[65_000..65_535], &numbers[..15], &[]] {
            let values: Vec<f32> = numbers.iter().map(|x| *x as f32 * 0.5).collect();
            let mut high = vec![0; numbers.len()];
            let mut low = vec![0; numbers.len()];
            amx.digits(&values, 2.0, [&mut high, &mut low]);
            for ((number, high), low) in numbers.iter().zip(&high).zip(&low) {
                let digits = [high, low].map(|digit| i32::from(digit.cast_signed()));
                assert_eq!(256 * digits[0] + digits[1], *number);
            }
        }
        for n in [0, 1, 16, 250] {
            let values: Vec<f32> = (0..n).map(|x| x as f32 * 0.5).collect();
            let mut got = vec![0; n];
            amx.bytes(&values, 2.0, -128, &mut got);
            let expected: Vec<u8> = (0..n).map(|x| (x as u8).wrapping_sub(128)).collect();
            assert_eq!(got, expected);
        }
    }

    /// Tiles of four products, the two of weights and of columns in each block.
    #[test]
    fn sums_of_products() {
        let Some(amx) = Amx::new() else { return };
        let tiles = amx.tiles();
        for n in [0, 1, 3] {
            // A row of the matrix behind the other, in an order that is not theirs.
            let matrix = bytes(n * TILE_ROW * COLUMNS + 7, 1);
            let rows = n * TILE_ROW;
            let start = |k: usize| 7 + (k * 5 + 3) % rows * COLUMNS;
            let starts: Vec<u32> = (0..rows).map(|k| start(k) as u32).collect();
            let mut columns = vec![0u8; n * 2 * TILE_BYTES];
            let target = columns.as_mut_ptr();
            // SAFETY: rows and targets have the columns that are packed.
            unsafe {
                let targets = [target, target.wrapping_add(TILE_BYTES)];
                amx.interleave(matrix.as_ptr(), &starts, targets, 2 * TILE_BYTES);
            }
            let weights: Vec<i8> = bytes(n * 4 * TILE_BYTES, 2)
                .into_iter()
                .map(u8::cast_signed)
                .collect();
            let product = |weight: usize, tiles: usize, column: usize, i: usize, j: usize| {
                (0..rows)
                    .map(|k| {
                        let tile = (k / TILE_ROW * tiles + weight) * TILE_BYTES;
                        let weight = weights[tile + i * TILE_ROW + k % TILE_ROW];
                        let input = matrix[start(k) + column * TILE + j].cast_signed();
                        i32::from(weight) * i32::from(input)
                    })
                    .sum::<i32>()
            };
            let mut sums = [[[12_345; TILE]; TILE]; 4];
            let mut of_digits = sums;
            // SAFETY: there are as many tiles of each.
            unsafe {
                let (weights, columns) = (weights.as_ptr(), columns.as_ptr());
                tiles.multiply::<1>(weights, columns, n, &mut sums);
                tiles.multiply::<2>(weights, columns, n, &mut of_digits);
            }
            for (i, j) in (0..TILE).flat_map(|i| (0..TILE).map(move |j| (i, j))) {
                for (tile, sums) in sums.iter().enumerate() {
                    let expected = product(tile / 2, 2, tile % 2, i, j);
                    assert_eq!(sums[i][j], expected, "{n} {tile} {i} {j}");
                }
                for tile in 0..2 {
                    // Here the columns are the digits, the high one first.
                    let of = |weight, column| product(2 * tile + weight, 4, column, i, j);
                    let expected = [of(0, 0), of(0, 1) + of(1, 0)];
                    let got = [0, 1].map(|digit| of_digits[2 * tile + digit][i][j]);
                    assert_eq!(got, expected, "{n} {tile} {i} {j}");
                }
            }
        }
    }
}
