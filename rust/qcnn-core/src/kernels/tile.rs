//! The register tile every float32 kernel with multiplications is built on.

// The compiler unrolls plain index loops and keeps the sums in registers. Calls
// into iterators it may leave as calls, with the sums in memory.
#![allow(clippy::needless_range_loop)]

use crate::isa::Simd;

/// `C[i][j] += sum over k < depth of A[k][i] * B[k][j]` for `R` rows and `V`
/// vectors of columns, all of it in registers.
///
/// `a(k, i)` is an element of A, `b(k)` points to row `k` of B. The `R * V`
/// sums, the `V` vectors of B's row and one broadcast element have to fit the
/// registers: 6 x 2 of 16, 12 x 2 of 32. Both also give more than the 8
/// independent sums (4 cycles of latency, 2 units) that keep the FMA units of
/// current x86 cores busy, and fewer loads than FMAs can hide.
///
/// # Safety
///
/// For every `k < depth`, `b(k)` is valid for reads of `V * S::LANES` values.
#[inline(always)]
pub(crate) unsafe fn tile<S: Simd, const R: usize, const V: usize>(
    simd: S,
    depth: usize,
    a: impl Fn(usize, usize) -> f32,
    b: impl Fn(usize) -> *const f32,
    mut c: [[S::F32; V]; R],
) -> [[S::F32; V]; R] {
    for k in 0..depth {
        let source = b(k);
        let mut row = [simd.splat(0.0); V];
        for v in 0..V {
            // SAFETY: the caller vouches for V vectors at b(k).
            row[v] = unsafe { simd.load(source.add(v * S::LANES)) };
        }
        for i in 0..R {
            let a = simd.splat(a(k, i));
            for v in 0..V {
                c[i][v] = simd.mul_add(a, row[v], c[i][v]);
            }
        }
    }
    c
}

/// Rows of the tile of matrix products on this level.
pub(crate) const fn tile_rows<S: Simd>() -> usize {
    if S::REGISTERS >= 32 { 12 } else { 6 }
}

/// Vectors of columns of the tile of matrix products, on all levels.
pub(crate) const TILE_VECTORS: usize = 2;

/// Most columns that tile has on any level.
pub(crate) const MAX_COLUMNS: usize = TILE_VECTORS * 16;

/// Most elements that tile has on any level.
pub(crate) const MAX_TILE: usize = 12 * MAX_COLUMNS;

/// Load a tile whose rows lie at distance `stride`.
///
/// # Safety
///
/// `source` is valid for reads of R rows of V vectors at distance `stride`.
#[inline(always)]
pub(crate) unsafe fn load_tile<S: Simd, const R: usize, const V: usize>(
    simd: S,
    source: *const f32,
    stride: usize,
    sums: &mut [[S::F32; V]; R],
) {
    for i in 0..R {
        for v in 0..V {
            // SAFETY: i < R and v < V.
            sums[i][v] = unsafe { simd.load(source.add(i * stride + v * S::LANES)) };
        }
    }
}

/// Store a tile whose rows lie at distance `stride`.
///
/// # Safety
///
/// `target` is valid for writes of R rows of V vectors at distance `stride`.
#[inline(always)]
pub(crate) unsafe fn store_tile<S: Simd, const R: usize, const V: usize>(
    simd: S,
    target: *mut f32,
    stride: usize,
    sums: &[[S::F32; V]; R],
) {
    for i in 0..R {
        for v in 0..V {
            // SAFETY: i < R and v < V.
            unsafe { simd.store(target.add(i * stride + v * S::LANES), sums[i][v]) };
        }
    }
}

/// Rows of the tile of 16-bit matrix products on this level: with 2 vectors each
/// the sums take three quarters of the registers.
pub(crate) const fn pair_rows<S: Simd>() -> usize {
    if S::REGISTERS >= 32 { 12 } else { 6 }
}

/// Two 16-bit factors for [`Simd::splat_pair`].
pub(crate) fn pair(low: i16, high: i16) -> i32 {
    i32::from(low) & 0xffff | i32::from(high) << 16
}
