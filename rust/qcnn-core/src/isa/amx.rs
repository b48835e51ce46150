//! AMX: products of tiles of bytes, on Linux.
//!
//! The CPU has eight registers, `tmm0` to `tmm7`, each a tile of up to 16 rows of 64 bytes.
//! A multiplication takes a tile of inputs, 64 bytes for each of 16 pixels, and one of the
//! weights of 16 outputs, in quads of four bytes as the multiplications of VNNI have them,
//! and adds the products to 16 x 16 sums of 32 bits: 16,384 products.
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
    __cpuid_count, __m512i, _mm512_castps_si512, _mm512_fmadd_ps, _mm512_mask_storeu_epi32,
    _mm512_maskz_loadu_ps, _mm512_set1_epi32, _mm512_set1_ps, _mm512_slli_epi32, _mm512_srli_epi32,
    _mm512_ternarylogic_epi32, _mm512_xor_si512,
};
use std::marker::PhantomData;
use std::sync::LazyLock;

use super::avx512::first_lanes;
use super::{Avx512, Simd};

/// Rows of a tile, and quads of a row: four bytes that are multiplied together.
pub(crate) const TILE: usize = 16;

/// Quads of a tile.
pub(crate) const TILE_QUADS: usize = TILE * TILE;

/// Bytes of a row of a tile.
const ROW_BYTES: usize = 4 * TILE;

/// Sums of two tiles of pixels, `(pixels, kinds, outputs)`: of two tiles of weights, or of
/// two kinds of products.
pub(crate) type Sums = [[[[i32; TILE]; 2]; TILE]; 2];

/// Token of AMX, beside AVX-512 with VBMI and FP16.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Amx(Avx512<true, true, true>);

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
    pub(crate) fn simd(self) -> Avx512<true, true, false> {
        self.0.vbmi()
    }

    /// The same with 16-bit floats.
    pub(crate) fn fp16(self) -> Avx512<true, true, true> {
        self.0
    }

    /// Configure the tiles of this thread: those of inputs and of sums have `pixels` rows,
    /// at most [`TILE`].
    pub(crate) fn tiles(self, pixels: usize) -> Tiles {
        assert!((1..=TILE).contains(&pixels));
        let mut configuration = Configuration {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: [0; 16],
            rows: [0; 16],
        };
        configuration.row_bytes[..8].fill(ROW_BYTES as u16);
        configuration.rows[..6].fill(pixels as u8);
        configuration.rows[6..8].fill(TILE as u8);
        // SAFETY: `self` proves AMX; the configuration is a valid one.
        unsafe {
            asm!(
                "ldtilecfg [{}]",
                in(reg) &raw const configuration,
                options(nostack, readonly, preserves_flags)
            );
        }
        Tiles(PhantomData)
    }

    /// Make a byte of each value of four rows: `value * factor + zero`, rounded. All have
    /// to be from -128 to 127. Those of a column become a quad.
    pub(crate) fn bytes(self, rows: [&[f32]; 4], factor: f32, zero: i32, target: &mut [u32]) {
        assert!(rows.iter().all(|row| row.len() == target.len()));
        // SAFETY: `self` proves AVX-512 F; the rows have the target's length.
        unsafe { bytes(rows, factor, zero, target) }
    }

    /// As [`bytes`](Self::bytes), two digits of each value: `value * factor`, rounded, is
    /// `256 * high + low`, both of which are from -128 to 127. So it has to be at least
    /// -32,896 and at most 32,639.
    pub(crate) fn digits(self, rows: [&[f32]; 4], factor: f32, [high, low]: [&mut [u32]; 2]) {
        assert!(rows.iter().all(|row| row.len() == high.len()) && low.len() == high.len());
        // SAFETY: `self` proves AVX-512 F; the rows have the targets' length.
        unsafe { digits(rows, factor, [high, low]) }
    }
}

/// Added to a number this leaves no bits for a fraction: the lowest bits of the sum are the
/// nearest integer.
const ROUNDING: f32 = 12_582_912.0;

/// With 128 added to both digits they are those of a number without signs.
const RAISED: i32 = 0x8080;

/// `value * factor + zero` as integers, of which the lowest 16 bits count, of lanes `lanes`
/// of the columns from `first` on.
///
/// # Safety
///
/// The rows have these columns.
#[target_feature(enable = "avx512f")]
unsafe fn rounded(
    rows: [&[f32]; 4],
    first: usize,
    lanes: u16,
    factor: f32,
    zero: i32,
) -> [__m512i; 4] {
    let (factor, zero) = (
        _mm512_set1_ps(factor),
        _mm512_set1_ps(ROUNDING + zero as f32),
    );
    rows.map(|row| {
        // SAFETY: other lanes are not read.
        let values = unsafe { _mm512_maskz_loadu_ps(lanes, row.as_ptr().add(first)) };
        _mm512_castps_si512(_mm512_fmadd_ps(values, factor, zero))
    })
}

/// The lowest bytes of each lane, side by side.
#[target_feature(enable = "avx512f")]
fn join([a, b, c, d]: [__m512i; 4]) -> __m512i {
    // Bits of the second number where those of the first one are set, else of the third.
    const SELECT: i32 = 0xCA;
    let (byte, half) = (_mm512_set1_epi32(0xFF), _mm512_set1_epi32(0xFFFF));
    let ab = _mm512_ternarylogic_epi32::<SELECT>(byte, a, _mm512_slli_epi32::<8>(b));
    let cd = _mm512_ternarylogic_epi32::<SELECT>(byte, c, _mm512_slli_epi32::<8>(d));
    _mm512_ternarylogic_epi32::<SELECT>(half, ab, _mm512_slli_epi32::<16>(cd))
}

/// See [`Amx::bytes`].
#[target_feature(enable = "avx512f")]
unsafe fn bytes(rows: [&[f32]; 4], factor: f32, zero: i32, target: &mut [u32]) {
    for (i, target) in target.chunks_mut(TILE).enumerate() {
        let lanes = first_lanes(target.len());
        // SAFETY: the rows are as long as the target.
        unsafe {
            let quads = join(rounded(rows, i * TILE, lanes, factor, zero));
            _mm512_mask_storeu_epi32(target.as_mut_ptr().cast(), lanes, quads);
        }
    }
}

/// See [`Amx::digits`].
#[target_feature(enable = "avx512f")]
unsafe fn digits(rows: [&[f32]; 4], factor: f32, [high, low]: [&mut [u32]; 2]) {
    let raised = _mm512_set1_epi32(RAISED);
    let targets = high.chunks_mut(TILE).zip(low.chunks_mut(TILE));
    for (i, (high, low)) in targets.enumerate() {
        let lanes = first_lanes(low.len());
        // SAFETY: the rows are as long as the targets.
        unsafe {
            let numbers = rounded(rows, i * TILE, lanes, factor, RAISED);
            let lows = numbers.map(|number| _mm512_xor_si512(number, raised));
            let highs = lows.map(|number| _mm512_srli_epi32::<8>(number));
            _mm512_mask_storeu_epi32(low.as_mut_ptr().cast(), lanes, join(lows));
            _mm512_mask_storeu_epi32(high.as_mut_ptr().cast(), lanes, join(highs));
        }
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: `self` proves AMX.
        unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) }
    }
}

/// Where inputs of a product are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pixels<'a> {
    /// The first pixels of two tiles.
    pub tiles: [*const u32; 2],
    /// Quads from the high digits of a pixel to the low ones.
    pub low: usize,
    /// Quads from the first pixel to the first of the 16 quads of each block.
    pub starts: &'a [u32],
    /// Quads from a pixel to the next one.
    pub stride: usize,
}

impl Tiles {
    /// Products of two tiles of pixels with two of weights, summed over all blocks.
    ///
    /// With one digit the tiles of weights are those of 32 outputs, and so are the sums.
    /// With two digits they are the high and the low digits of 16 outputs; sums are those of
    /// products of high digits, then of a high and a low one.
    ///
    /// # Safety
    ///
    /// `weights` is valid for reads of two tiles for each block, and so are the 16 quads of
    /// all blocks, of all digits, for all pixels that the tiles are configured for.
    pub(crate) unsafe fn multiply<const DIGITS: usize>(
        &self,
        pixels: Pixels<'_>,
        mut weights: *const u32,
        sums: &mut Sums,
    ) {
        const { assert!(DIGITS == 1 || DIGITS == 2) };
        self.clear();
        // Loads are between multiplications: both go on at the same time.
        for start in pixels.starts {
            // SAFETY: `self` proves AMX with tiles that are configured; the caller vouches
            // for what is read.
            unsafe {
                let [first, second] = pixels.tiles.map(|tile| tile.add(*start as usize));
                if DIGITS == 1 {
                    asm!(
                        "tileloadd tmm6, [{weights} + {row}*1]",
                        "tileloadd tmm4, [{first} + {stride}*4]",
                        "tdpbssd tmm0, tmm4, tmm6",
                        "tileloadd tmm5, [{second} + {stride}*4]",
                        "tdpbssd tmm2, tmm5, tmm6",
                        "tileloadd tmm7, [{weights} + {row}*1 + 1024]",
                        "tdpbssd tmm1, tmm4, tmm7",
                        "tdpbssd tmm3, tmm5, tmm7",
                        weights = in(reg) weights,
                        first = in(reg) first,
                        second = in(reg) second,
                        stride = in(reg) pixels.stride,
                        row = in(reg) ROW_BYTES,
                        options(nostack, readonly, preserves_flags)
                    );
                } else {
                    asm!(
                        "tileloadd tmm6, [{weights} + {row}*1]",
                        "tileloadd tmm4, [{first} + {stride}*4]",
                        "tdpbssd tmm0, tmm4, tmm6",
                        "tileloadd tmm7, [{weights} + {row}*1 + 1024]",
                        "tdpbssd tmm1, tmm4, tmm7",
                        "tileloadd tmm5, [{second} + {stride}*4]",
                        "tdpbssd tmm2, tmm5, tmm6",
                        "tileloadd tmm4, [{first_low} + {stride}*4]",
                        "tdpbssd tmm3, tmm5, tmm7",
                        "tdpbssd tmm1, tmm4, tmm6",
                        "tileloadd tmm5, [{second_low} + {stride}*4]",
                        "tdpbssd tmm3, tmm5, tmm6",
                        weights = in(reg) weights,
                        first = in(reg) first,
                        second = in(reg) second,
                        first_low = in(reg) first.add(pixels.low),
                        second_low = in(reg) second.add(pixels.low),
                        stride = in(reg) pixels.stride,
                        row = in(reg) ROW_BYTES,
                        options(nostack, readonly, preserves_flags)
                    );
                }
                weights = weights.add(2 * TILE_QUADS);
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
        // SAFETY: `self` proves AMX with tiles that are configured, of at most 16 rows; the
        // sums are four of them, two in each row of 128 bytes.
        unsafe {
            asm!(
                "tilestored [{sums} + {row}*2], tmm0",
                "tilestored [{sums} + {row}*2 + 64], tmm1",
                "tilestored [{sums} + {row}*2 + 2048], tmm2",
                "tilestored [{sums} + {row}*2 + 2112], tmm3",
                sums = in(reg) sums,
                row = in(reg) ROW_BYTES,
                options(nostack, preserves_flags)
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers that look random, of all bits.
    fn quads(n: usize, seed: u64) -> Vec<u32> {
        let mut state = seed;
        let mut next = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 32) as u32
        };
        (0..n).map(|_| next()).collect()
    }

    /// Four rows whose values differ, the first of which is `row`.
    fn rows(row: &[f32]) -> [Vec<f32>; 4] {
        std::array::from_fn(|i| {
            let mut row = row.to_vec();
            let distance = i * row.len() / 4;
            row.rotate_left(distance);
            row
        })
    }

    fn byte(quad: u32, i: usize) -> i32 {
        i32::from(quad.to_le_bytes()[i].cast_signed())
    }

    #[test]
    fn numbers_of_two_digits() {
        let Some(amx) = Amx::new() else { return };
        // In whole vectors and less.
        let numbers: Vec<i32> = (-32_896..=32_639).collect();
        for numbers in [&numbers[..], &numbers[65_000..65_535], &numbers[..15], &[]] {
            let values: Vec<f32> = numbers.iter().map(|x| *x as f32 * 0.5).collect();
            let rows = rows(&values);
            let mut high = vec![0; numbers.len()];
            let mut low = vec![0; numbers.len()];
            amx.digits(
                rows.each_ref().map(|row| &**row),
                2.0,
                [&mut high, &mut low],
            );
            for (i, (high, low)) in high.iter().zip(&low).enumerate() {
                for (row, values) in rows.iter().enumerate() {
                    let number = 256 * byte(*high, row) + byte(*low, row);
                    assert_eq!(number, (values[i] * 2.0) as i32);
                }
            }
        }
    }

    #[test]
    fn numbers_of_one_digit() {
        let Some(amx) = Amx::new() else { return };
        for n in [0, 1, 16, 250] {
            // Halves are rounded to the even one of their neighbours.
            let values: Vec<f32> = (0..n).map(|x| x as f32 * 0.25).collect();
            let rows = rows(&values);
            let mut got = vec![0; n];
            amx.bytes(rows.each_ref().map(|row| &**row), 2.0, -128, &mut got);
            for (i, quad) in got.iter().enumerate() {
                for (row, values) in rows.iter().enumerate() {
                    let expected = (values[i] * 2.0 - 128.0).round_ties_even() as i32;
                    assert_eq!(byte(*quad, row), expected);
                }
            }
        }
    }

    /// Sums of all tiles, of all their pixels and of some.
    #[test]
    fn sums_of_products() {
        let Some(amx) = Amx::new() else { return };
        let (stride, low) = (37, 2000);
        for (n, pixels) in [(0, 16), (1, 16), (3, 16), (2, 13), (1, 1)] {
            let tiles = amx.tiles(pixels);
            // Blocks in an order that is not theirs, with rows that are not aligned.
            let starts: Vec<u32> = (0..n).map(|block| 5 + (2 * block + 1) % 3 * 600).collect();
            // Of each digit.
            let images = [quads(2 * low, 1), quads(2 * low, 2)];
            let weights = quads(n as usize * 2 * TILE_QUADS, 3);
            // Of a digit of one tile of pixels and one tile of weights.
            let product = |image: &[u32], tile: usize, pixel: usize, output: usize| {
                let blocks = starts.iter().enumerate();
                let quads = blocks.flat_map(|(block, start)| {
                    let inputs = &image[*start as usize + pixel * stride..][..TILE];
                    let weights = &weights[(block * 2 + tile) * TILE_QUADS..][..TILE_QUADS];
                    inputs.iter().zip(weights[output..].iter().step_by(TILE))
                });
                let products = quads.flat_map(|(inputs, weights)| {
                    (0..4).map(|i| byte(*inputs, i) * byte(*weights, i))
                });
                products.sum::<i32>()
            };
            let mut sums: Sums = [[[[12_345; TILE]; 2]; TILE]; 2];
            let mut of_digits = sums;
            let inputs = Pixels {
                tiles: images.each_ref().map(Vec::as_ptr),
                low,
                starts: &starts,
                stride,
            };
            // SAFETY: there are as many tiles of weights and pixels with as many quads.
            unsafe {
                tiles.multiply::<1>(inputs, weights.as_ptr(), &mut sums);
                tiles.multiply::<2>(inputs, weights.as_ptr(), &mut of_digits);
            }
            for (pixel, i) in (0..pixels).flat_map(|pixel| (0..TILE).map(move |i| (pixel, i))) {
                for (tile, image) in images.iter().enumerate() {
                    let of = |weights| product(image, weights, pixel, i);
                    let got = sums[tile][pixel].map(|sums| sums[i]);
                    assert_eq!(got, [of(0), of(1)], "{n} {tile} {pixel} {i}");
                    let of_low = product(&image[low..], 0, pixel, i);
                    let got = of_digits[tile][pixel].map(|sums| sums[i]);
                    assert_eq!(got, [of(0), of(1) + of_low], "{n} {tile} {pixel} {i}");
                }
            }
        }
    }
}
