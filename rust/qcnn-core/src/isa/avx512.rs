//! The AVX-512 level.

use std::arch::x86_64::{
    __m512, __m512i, __mmask16, _CMP_ORD_Q, _mm512_add_epi16, _mm512_add_ps,
    _mm512_castsi256_si512, _mm512_castsi512_si256, _mm512_cmp_ps_mask, _mm512_cvtepi16_epi32,
    _mm512_cvtepi32_ps, _mm512_cvtps_epi32, _mm512_cvtsepi32_epi16, _mm512_extracti64x4_epi64,
    _mm512_fmadd_ps, _mm512_inserti64x4, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_mask_max_ps,
    _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps, _mm512_mul_ps, _mm512_permutex2var_ps,
    _mm512_permutexvar_epi16, _mm512_rsqrt14_ps, _mm512_set1_epi16, _mm512_set1_ps,
    _mm512_setr_epi32, _mm512_setzero_si512, _mm512_storeu_ps, _mm512_storeu_si512,
};

use super::{Simd, Task};

/// Token of the AVX-512 level.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512(());

impl Simd for Avx512 {
    const NAME: &'static str = "x86_64-avx512";
    const LANES: usize = 16;
    const REGISTERS: usize = 32;
    type F32 = __m512;
    type I16 = __m512i;

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
            && is_x86_feature_detected!("fma"))
        .then_some(Self(()))
    }

    #[inline(always)]
    fn call<T: Task>(self, task: T) -> T::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
        fn compiled<T: Task>(simd: Avx512, task: T) -> T::Output {
            task.run(simd)
        }
        // SAFETY: `self` exists, so `new` has found all these features.
        unsafe { compiled(self, task) }
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
