//! The AVX-512 levels, with and without VNNI.

use std::arch::x86_64::{
    __m512, __m512i, __mmask16, _CMP_ORD_Q, _MM_HINT_T0, _mm_prefetch, _mm512_add_epi16,
    _mm512_add_epi32, _mm512_add_ps, _mm512_castsi256_si512, _mm512_castsi512_si256,
    _mm512_cmp_ps_mask, _mm512_cvtepi16_epi32, _mm512_cvtepi32_ps, _mm512_cvtps_epi32,
    _mm512_cvtsepi32_epi16, _mm512_dpwssd_epi32, _mm512_extracti64x4_epi64, _mm512_fmadd_ps,
    _mm512_inserti64x4, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_madd_epi16,
    _mm512_mask_blend_epi16, _mm512_mask_blend_ps, _mm512_mask_max_ps, _mm512_mask_storeu_ps,
    _mm512_maskz_loadu_ps, _mm512_mul_ps, _mm512_permutex2var_epi16, _mm512_permutex2var_epi32,
    _mm512_permutex2var_ps, _mm512_permutexvar_epi16, _mm512_permutexvar_ps, _mm512_rsqrt14_ps,
    _mm512_set1_epi16, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setr_epi32, _mm512_setzero_si512,
    _mm512_slli_epi32, _mm512_srli_epi16, _mm512_srli_epi32, _mm512_storeu_ps, _mm512_storeu_si512,
    _mm512_test_epi32_mask,
};

use super::{Simd, Task};

/// Token of an AVX-512 level. VNNI multiplies 16-bit integers and adds the
/// products up in one instruction.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512<const VNNI: bool>(());

impl<const VNNI: bool> Simd for Avx512<VNNI> {
    const NAME: &'static str = if VNNI {
        "x86_64-avx512vnni"
    } else {
        "x86_64-avx512"
    };
    const LANES: usize = 16;
    const REGISTERS: usize = 32;
    const LOOK_UP_CYCLES: [f64; 3] = [2.0, 2.0, 2.2];
    const LOOK_UP_F32_CYCLES: [f64; 3] = [2.5, 2.7, 3.6];
    type F32 = __m512;
    type I16 = __m512i;
    type I32 = __m512i;

    /// Asks if the CPU has AVX-512 F, BW, DQ and VL, and AVX2 and FMA.
    ///
    /// Every CPU with these four has the other two; they are asked for because
    /// the compiled code may use them.
    fn new() -> Option<Self> {
        (is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && (!VNNI || is_x86_feature_detected!("avx512vnni")))
        .then_some(Self(()))
    }

    #[inline(always)]
    fn call<T: Task>(self, task: T) -> T::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
        fn plain<T: Task, const VNNI: bool>(simd: Avx512<VNNI>, task: T) -> T::Output {
            task.run(simd)
        }
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,avx512vnni")]
        fn vnni<T: Task, const VNNI: bool>(simd: Avx512<VNNI>, task: T) -> T::Output {
            task.run(simd)
        }
        // SAFETY: `self` exists, so `new` has found all these features.
        unsafe {
            if VNNI {
                vnni(self, task)
            } else {
                plain(self, task)
            }
        }
    }

    #[inline(always)]
    fn splat(self, value: f32) -> __m512 {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves AVX-512 F.
        unsafe {
            // The instruction gives its second operand if either is NaN; where
            // it is `b`, keep that. Chains of maxima go through `a`: nothing
            // waits for the comparison.
            let number = _mm512_cmp_ps_mask::<_CMP_ORD_Q>(b, b);
            _mm512_mask_max_ps(b, number, b, a)
        }
    }

    #[inline(always)]
    fn rsqrt_estimate(self, a: __m512) -> __m512 {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_rsqrt14_ps(a) }
    }

    #[inline(always)]
    fn even(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves AVX-512 F.
        unsafe {
            let index =
                _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
            _mm512_permutex2var_ps(a, index, b)
        }
    }

    #[inline(always)]
    fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn load(self, source: *const f32) -> __m512 {
        // SAFETY: `self` proves AVX-512 F; the caller vouches for 16 readable values.
        unsafe { _mm512_loadu_ps(source) }
    }

    #[inline(always)]
    unsafe fn store(self, target: *mut f32, vector: __m512) {
        // SAFETY: `self` proves AVX-512 F; the caller vouches for 16 writable values.
        unsafe { _mm512_storeu_ps(target, vector) }
    }

    #[inline(always)]
    unsafe fn load_part(self, source: *const f32, n: usize) -> __m512 {
        // SAFETY: `self` proves AVX-512 F; the caller vouches for n readable
        // values, and masked lanes are not read.
        unsafe { _mm512_maskz_loadu_ps(first_lanes(n), source) }
    }

    #[inline(always)]
    unsafe fn store_part(self, target: *mut f32, vector: __m512, n: usize) {
        // SAFETY: `self` proves AVX-512 F; the caller vouches for n writable
        // values, and masked lanes are not written.
        unsafe { _mm512_mask_storeu_ps(target, first_lanes(n), vector) }
    }

    #[inline(always)]
    unsafe fn load_range(self, source: *const f32, begin: usize, end: usize) -> __m512 {
        // SAFETY: `self` proves AVX-512 F; the caller vouches for the values of
        // the range, and masked lanes are not read.
        unsafe { _mm512_maskz_loadu_ps(first_lanes(end) & !first_lanes(begin), source) }
    }

    #[inline(always)]
    unsafe fn store_range(self, target: *mut f32, vector: __m512, begin: usize, end: usize) {
        // SAFETY: `self` proves AVX-512 F; the caller vouches for the values of
        // the range, and masked lanes are not written.
        unsafe {
            _mm512_mask_storeu_ps(target, first_lanes(end) & !first_lanes(begin), vector);
        }
    }

    #[inline(always)]
    fn shift(self, vector: __m512, distance: usize) -> __m512 {
        // SAFETY: `self` proves AVX-512 F. Of each index only the lowest 4 bits
        // count.
        unsafe {
            let lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            let index = _mm512_add_epi32(lanes, _mm512_set1_epi32(distance as i32));
            _mm512_permutexvar_ps(index, vector)
        }
    }

    #[inline(always)]
    fn shift_pair(self, pair: [__m512; 2], distance: usize) -> __m512 {
        // SAFETY: `self` proves AVX-512 F. Of each index only the lowest 5 bits
        // count.
        unsafe {
            let lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            let index = _mm512_add_epi32(lanes, _mm512_set1_epi32(distance as i32));
            _mm512_permutex2var_ps(pair[0], index, pair[1])
        }
    }

    #[inline(always)]
    fn zero_i16(self) -> __m512i {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_setzero_si512() }
    }

    #[inline(always)]
    fn add_i16(self, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: `self` proves AVX-512 BW.
        unsafe { _mm512_add_epi16(a, b) }
    }

    #[inline(always)]
    fn round_i16(self, low: __m512, high: __m512) -> __m512i {
        // SAFETY: `self` proves AVX-512 F.
        unsafe {
            let low = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(low));
            let high = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(high));
            _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high)
        }
    }

    #[inline(always)]
    fn widen_i16(self, vector: __m512i) -> [__m512; 2] {
        // SAFETY: `self` proves AVX-512 F.
        unsafe {
            let low = _mm512_cvtepi16_epi32(_mm512_castsi512_si256(vector));
            let high = _mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64::<1>(vector));
            [_mm512_cvtepi32_ps(low), _mm512_cvtepi32_ps(high)]
        }
    }

    #[inline(always)]
    fn zip_i16(self, a: __m512i, b: __m512i) -> [__m512i; 2] {
        // SAFETY: `self` proves AVX-512 BW.
        unsafe {
            [
                _mm512_mask_blend_epi16(ODD_LANES, a, _mm512_slli_epi32::<16>(b)),
                _mm512_mask_blend_epi16(ODD_LANES, _mm512_srli_epi32::<16>(a), b),
            ]
        }
    }

    #[inline(always)]
    fn splat_pair(self, pair: i32) -> __m512i {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_set1_epi32(pair) }
    }

    #[inline(always)]
    fn splat_i32(self, value: i32) -> __m512i {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_set1_epi32(value) }
    }

    #[inline(always)]
    unsafe fn load_i32(self, source: *const i32) -> __m512i {
        // SAFETY: `self` proves AVX-512 F; the caller vouches for 16 readable values.
        unsafe { _mm512_loadu_si512(source.cast()) }
    }

    #[inline(always)]
    unsafe fn store_i32(self, target: *mut i32, vector: __m512i) {
        // SAFETY: `self` proves AVX-512 F; the caller vouches for 16 writable values.
        unsafe { _mm512_storeu_si512(target.cast(), vector) }
    }

    #[inline(always)]
    fn dot_i16(self, a: __m512i, b: __m512i, c: __m512i) -> __m512i {
        // SAFETY: `self` proves AVX-512 BW, and VNNI where it is used.
        unsafe {
            if VNNI {
                _mm512_dpwssd_epi32(c, a, b)
            } else {
                _mm512_add_epi32(_mm512_madd_epi16(a, b), c)
            }
        }
    }

    #[inline(always)]
    fn upper_halves(self, even: __m512i, odd: __m512i) -> __m512i {
        // SAFETY: `self` proves AVX-512 BW.
        unsafe { _mm512_mask_blend_epi16(ODD_LANES, _mm512_srli_epi32::<16>(even), odd) }
    }

    #[inline(always)]
    fn interleave_i32(self, even: __m512i, odd: __m512i) -> [__m512; 2] {
        // SAFETY: `self` proves AVX-512 F. The indices have one element per lane.
        unsafe {
            let low = _mm512_loadu_si512(INTERLEAVED.as_ptr().cast());
            let high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
            let low = _mm512_permutex2var_epi32(even, low, odd);
            let high = _mm512_permutex2var_epi32(even, high, odd);
            [_mm512_cvtepi32_ps(low), _mm512_cvtepi32_ps(high)]
        }
    }

    #[inline(always)]
    fn shift_i16(self, vector: __m512i, distance: usize) -> __m512i {
        // SAFETY: `self` proves AVX-512 BW. The index has one element per lane;
        // of each element only the lowest 5 bits count.
        unsafe {
            let lanes = _mm512_loadu_si512(LANE_NUMBERS.as_ptr().cast());
            let index = _mm512_add_epi16(lanes, _mm512_set1_epi16(distance as i16));
            _mm512_permutexvar_epi16(index, vector)
        }
    }

    #[inline(always)]
    fn shift_right_i16<const BITS: u32>(self, vector: __m512i) -> __m512i {
        // SAFETY: `self` proves AVX-512 BW.
        unsafe { _mm512_srli_epi16::<BITS>(vector) }
    }

    #[inline(always)]
    unsafe fn look_up_i16<const BITS: u32>(self, entries: *const i16, indices: __m512i) -> __m512i {
        // SAFETY: `self` proves AVX-512 BW; the caller vouches for 32 entries,
        // and for 32 more if there are 6 bits. Both permutations ignore bits
        // that choose among more entries than they have.
        unsafe {
            let lower = _mm512_loadu_si512(entries.cast());
            if BITS == 6 {
                let upper = _mm512_loadu_si512(entries.add(32).cast());
                _mm512_permutex2var_epi16(lower, indices, upper)
            } else {
                _mm512_permutexvar_epi16(indices, lower)
            }
        }
    }

    #[inline(always)]
    fn shift_right_i32<const BITS: u32>(self, vector: __m512i) -> __m512i {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_srli_epi32::<BITS>(vector) }
    }

    #[inline(always)]
    unsafe fn look_up_f32<const BITS: u32>(self, entries: *const f32, indices: __m512i) -> __m512 {
        // SAFETY: `self` proves AVX-512 F; the caller vouches for 2^BITS
        // entries. Permutations ignore bits that choose among more entries than
        // they have.
        unsafe {
            let sixteen = |i: usize| _mm512_loadu_ps(entries.add(16 * i));
            match BITS {
                4 => _mm512_permutexvar_ps(indices, sixteen(0)),
                5 => _mm512_permutex2var_ps(sixteen(0), indices, sixteen(1)),
                _ => {
                    let lower = _mm512_permutex2var_ps(sixteen(0), indices, sixteen(1));
                    let upper = _mm512_permutex2var_ps(sixteen(2), indices, sixteen(3));
                    let is_upper = _mm512_test_epi32_mask(indices, _mm512_set1_epi32(32));
                    _mm512_mask_blend_ps(is_upper, lower, upper)
                }
            }
        }
    }

    #[inline(always)]
    fn prefetch(self, address: *const i16) {
        // SAFETY: a prefetch does not fault.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
    }

    #[inline(always)]
    unsafe fn load_i16(self, source: *const i16) -> __m512i {
        // SAFETY: `self` proves AVX-512 F; the caller vouches for 32 readable values.
        unsafe { _mm512_loadu_si512(source.cast()) }
    }

    #[inline(always)]
    unsafe fn store_i16(self, target: *mut i16, vector: __m512i) {
        // SAFETY: `self` proves AVX-512 F; the caller vouches for 32 writable values.
        unsafe { _mm512_storeu_si512(target.cast(), vector) }
    }
}

/// Every second lane of 16 bits.
const ODD_LANES: u32 = 0xaaaa_aaaa;

/// Lanes of 32 bits in turns from the first half of two vectors.
const INTERLEAVED: [i32; 16] = [0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23];
/// A mask of the first `n` lanes.
#[inline(always)]
fn first_lanes(n: usize) -> __mmask16 {
    ((1u32 << n) - 1) as __mmask16
}

/// Each lane of 16 bits its number.
const LANE_NUMBERS: [i16; 32] = {
    let mut numbers = [0; 32];
    let mut i = 0;
    while i < 32 {
        numbers[i] = i as i16;
        i += 1;
    }
    numbers
};
