//! The AVX-512 levels, with and without VNNI, VBMI and FP16.

use std::arch::asm;
use std::arch::x86_64::{
    __m512, __m512i, __mmask16, _CMP_ORD_Q, _MM_FROUND_NO_EXC, _MM_FROUND_TO_NEAREST_INT,
    _MM_HINT_T0, _mm_loadu_si128, _mm_prefetch, _mm_setr_epi8, _mm512_abs_ps, _mm512_add_epi8,
    _mm512_add_epi16, _mm512_add_epi32, _mm512_add_ps, _mm512_and_si512, _mm512_broadcast_i32x4,
    _mm512_castsi256_si512, _mm512_castsi512_si256, _mm512_cmp_ps_mask, _mm512_cvtepi16_epi32,
    _mm512_cvtepi32_ps, _mm512_cvtph_ps, _mm512_cvtps_epi32, _mm512_cvtps_ph,
    _mm512_cvtsepi32_epi16, _mm512_div_ps, _mm512_dpbusd_epi32, _mm512_dpwssd_epi32,
    _mm512_extracti64x4_epi64, _mm512_fmadd_ps, _mm512_inserti64x4, _mm512_loadu_ps,
    _mm512_loadu_si512, _mm512_madd_epi16, _mm512_maddubs_epi16, _mm512_mask_blend_epi8,
    _mm512_mask_blend_epi16, _mm512_mask_blend_ps, _mm512_mask_max_ps, _mm512_mask_shuffle_epi8,
    _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps, _mm512_max_ps, _mm512_min_ps,
    _mm512_movepi8_mask, _mm512_mul_ps, _mm512_packs_epi16, _mm512_packs_epi32,
    _mm512_permutex2var_epi8, _mm512_permutex2var_epi16, _mm512_permutex2var_epi32,
    _mm512_permutex2var_ps, _mm512_permutexvar_epi8, _mm512_permutexvar_epi16,
    _mm512_permutexvar_epi32, _mm512_permutexvar_ps, _mm512_popcnt_epi32, _mm512_rsqrt14_ps,
    _mm512_set1_epi8, _mm512_set1_epi16, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setr_epi32,
    _mm512_setzero_ps, _mm512_setzero_si512, _mm512_shuffle_epi8, _mm512_shuffle_f32x4,
    _mm512_shuffle_ps, _mm512_slli_epi16, _mm512_slli_epi32, _mm512_sllv_epi32, _mm512_srai_epi16,
    _mm512_srai_epi32, _mm512_srli_epi16, _mm512_srli_epi32, _mm512_srlv_epi32, _mm512_storeu_ps,
    _mm512_storeu_si512, _mm512_test_epi32_mask, _mm512_unpackhi_ps, _mm512_unpacklo_ps,
    _mm512_xor_si512,
};

use super::{Simd, Task, half, look_up_each};

/// Token of an AVX-512 level. VNNI multiplies 8- or 16-bit integers and adds the
/// products up in one instruction, VBMI permutes bytes and stands for VPOPCNTDQ, too,
/// which counts bits, FP16 computes with 16-bit floats.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512<const VNNI: bool, const VBMI: bool, const FP16: bool>(());

impl Avx512<true, true, true> {
    /// The token of the level below.
    #[expect(clippy::unused_self, reason = "a token proves the other")]
    pub(crate) fn vbmi(self) -> Avx512<true, true, false> {
        Avx512(())
    }
}

impl<const VNNI: bool, const VBMI: bool, const FP16: bool> Simd for Avx512<VNNI, VBMI, FP16> {
    const NAME: &'static str = if FP16 {
        "x86_64-avx512fp16"
    } else if VBMI {
        "x86_64-avx512vbmi"
    } else if VNNI {
        "x86_64-avx512vnni"
    } else {
        "x86_64-avx512"
    };
    const LANES: usize = 16;
    const REGISTERS: usize = 32;
    const LOOK_UP_CYCLES: [f64; 3] = [2.0, 2.0, 2.2];
    const BYTE_LOOK_UP_CYCLES: [f64; 3] = if VBMI {
        [1.35, 2.1, 1.75]
    } else {
        [5.0, 14.0, f64::INFINITY]
    };
    const LOOK_UP_F32_CYCLES: [f64; 3] = [2.5, 2.7, 3.6];
    const DOT_BYTES_CYCLES: f64 = if VNNI { 1.0 } else { 3.0 };
    const COUNT_CYCLES: f64 = if VBMI { 1.6 } else { 5.0 };
    // Bytes of counts stay below 2^7.
    const COUNTED_WORDS: usize = if VBMI { usize::MAX } else { 15 };
    type F32 = __m512;
    type I16 = __m512i;
    type I32 = __m512i;
    type I8 = __m512i;

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
            && (!VNNI || is_x86_feature_detected!("avx512vnni"))
            && (!VBMI || is_x86_feature_detected!("avx512vbmi"))
            && (!VBMI || is_x86_feature_detected!("avx512vpopcntdq"))
            && (!FP16 || is_x86_feature_detected!("avx512fp16")))
        .then_some(Self(()))
    }

    #[inline(always)]
    fn call<T: Task>(self, task: T) -> T::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
        fn plain<T: Task, S: Simd>(simd: S, task: T) -> T::Output {
            task.run(simd)
        }
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,avx512vnni")]
        fn vnni<T: Task, S: Simd>(simd: S, task: T) -> T::Output {
            task.run(simd)
        }
        #[target_feature(
            enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,avx512vnni,avx512vbmi,avx512vpopcntdq"
        )]
        fn vbmi<T: Task, S: Simd>(simd: S, task: T) -> T::Output {
            task.run(simd)
        }
        // SAFETY: `self` exists, so `new` has found all these features.
        unsafe {
            if VBMI {
                vbmi(self, task)
            } else if VNNI {
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
    fn abs(self, a: __m512) -> __m512 {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_abs_ps(a) }
    }

    #[inline(always)]
    fn max_number(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_max_ps(a, b) }
    }

    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_min_ps(a, b) }
    }

    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_div_ps(a, b) }
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
    fn odd(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves AVX-512 F.
        unsafe {
            let index =
                _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
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
    fn round_zip_i16(self, even: __m512, odd: __m512) -> __m512i {
        // SAFETY: `self` proves AVX-512 BW.
        unsafe {
            let odd = _mm512_slli_epi32::<16>(_mm512_cvtps_epi32(odd));
            _mm512_mask_blend_epi16(ODD_LANES, _mm512_cvtps_epi32(even), odd)
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
    fn narrow_f16(self, low: __m512, high: __m512) -> __m512i {
        // SAFETY: `self` proves AVX-512 F.
        unsafe {
            let low = _mm512_cvtps_ph::<TO_NEAREST>(low);
            let high = _mm512_cvtps_ph::<TO_NEAREST>(high);
            _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high)
        }
    }

    #[inline(always)]
    fn widen_f16(self, vector: __m512i) -> [__m512; 2] {
        // SAFETY: `self` proves AVX-512 F.
        unsafe {
            [
                _mm512_cvtph_ps(_mm512_castsi512_si256(vector)),
                _mm512_cvtph_ps(_mm512_extracti64x4_epi64::<1>(vector)),
            ]
        }
    }

    #[inline(always)]
    fn add_f16(self, a: __m512i, b: __m512i) -> __m512i {
        if FP16 {
            // SAFETY: `self` proves AVX-512 FP16.
            unsafe { add_f16(a, b) }
        } else {
            half::add(self, a, b)
        }
    }

    #[inline(always)]
    fn mul_add_f16(self, a: __m512i, b: __m512i, c: __m512i) -> __m512i {
        if FP16 {
            // SAFETY: `self` proves AVX-512 FP16.
            unsafe { mul_add_f16(a, b, c) }
        } else {
            half::mul_add(self, a, b, c)
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
    fn shifted_halves(self, even: __m512i, right: __m512i, odd: __m512i, left: __m512i) -> __m512i {
        // SAFETY: `self` proves AVX-512 BW.
        unsafe {
            let even = _mm512_srlv_epi32(even, right);
            _mm512_mask_blend_epi16(ODD_LANES, even, _mm512_sllv_epi32(odd, left))
        }
    }

    #[inline(always)]
    fn join_bytes(self, low: __m512i, high: __m512i) -> __m512i {
        // SAFETY: `self` proves AVX-512 BW.
        unsafe { _mm512_add_epi16(low, _mm512_slli_epi16::<8>(high)) }
    }

    #[inline(always)]
    fn dot_bytes(self, a: __m512i, weights: i32, c: __m512i) -> __m512i {
        // SAFETY: `self` proves AVX-512 BW, and VNNI where it is used.
        unsafe {
            let weights = _mm512_set1_epi32(weights);
            if VNNI {
                return _mm512_dpbusd_epi32(c, a, weights);
            }
            // Products of bytes would saturate in pairs: they are widened.
            let low = _mm512_srai_epi16::<8>(_mm512_slli_epi16::<8>(weights));
            let high = _mm512_srai_epi16::<8>(weights);
            let low = _mm512_madd_epi16(_mm512_and_si512(a, _mm512_set1_epi16(255)), low);
            let high = _mm512_madd_epi16(_mm512_srli_epi16::<8>(a), high);
            _mm512_add_epi32(c, _mm512_add_epi32(low, high))
        }
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
    fn float_i32(self, vector: __m512i) -> __m512 {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_cvtepi32_ps(vector) }
    }

    #[inline(always)]
    fn pack_i8(self, vectors: [__m512i; 4]) -> __m512i {
        // SAFETY: `self` proves AVX-512 BW. The index has one element per lane.
        unsafe {
            let [a, b, c, d] = vectors;
            let ab = _mm512_packs_epi32(_mm512_srai_epi32::<23>(a), _mm512_srai_epi32::<23>(b));
            let cd = _mm512_packs_epi32(_mm512_srai_epi32::<23>(c), _mm512_srai_epi32::<23>(d));
            let packed = _mm512_packs_epi16(ab, cd);
            // Packing works within quarters: quarter i has four bytes of each.
            let order = _mm512_loadu_si512(UNPACKED.as_ptr().cast());
            _mm512_permutexvar_epi32(order, packed)
        }
    }

    #[inline(always)]
    unsafe fn look_up_i8<const ENTRIES: usize>(
        self,
        tables: *const i8,
        indices: __m512i,
    ) -> __m512i {
        // SAFETY: `self` proves AVX-512 BW, and VBMI where it is used; the caller
        // vouches for 4 * ENTRIES entries, 64 in a vector. Shuffles of 16 see the
        // lowest 4 bits.
        unsafe {
            let first = || _mm512_loadu_si512(tables.cast());
            if VBMI && ENTRIES == 16 {
                return _mm512_permutexvar_epi8(indices, first());
            }
            if VBMI {
                let second = _mm512_loadu_si512(tables.add(64).cast());
                return _mm512_permutex2var_epi8(first(), indices, second);
            }
            let sixteen = |i: usize| {
                let table = _mm_loadu_si128(tables.add(16 * i).cast());
                _mm512_broadcast_i32x4(table)
            };
            // Which lanes have bit 4 of their index set.
            let upper = _mm512_movepi8_mask(_mm512_slli_epi16::<3>(indices));
            let mut found = _mm512_setzero_si512();
            for table in 0..4 {
                let lanes = EACH_FOURTH << table;
                let first = sixteen(table * ENTRIES / 16);
                found = _mm512_mask_shuffle_epi8(found, lanes, first, indices);
                if ENTRIES == 32 {
                    let second = sixteen(table * 2 + 1);
                    found = _mm512_mask_shuffle_epi8(found, lanes & upper, second, indices);
                }
            }
            found
        }
    }

    #[inline(always)]
    unsafe fn look_up_64(self, table: *const i8, indices: __m512i) -> __m512i {
        // SAFETY: `self` proves AVX-512 F, and VBMI where it is used; the caller vouches
        // for 64 entries.
        unsafe {
            if VBMI {
                return _mm512_permutexvar_epi8(indices, _mm512_loadu_si512(table.cast()));
            }
            look_up_each(self, table, indices)
        }
    }

    #[inline(always)]
    fn exchange_i8<const BIT: usize>(self, a: __m512i, b: __m512i) -> [__m512i; 2] {
        // Bytes whose number has the bit.
        let odd = if BIT == 1 {
            0xaaaa_aaaa_aaaa_aaaa
        } else {
            0xcccc_cccc_cccc_cccc
        };
        // SAFETY: `self` proves AVX-512 BW.
        unsafe {
            [
                _mm512_mask_blend_epi8(odd, a, b),
                _mm512_mask_blend_epi8(odd, b, a),
            ]
        }
    }

    #[inline(always)]
    fn add_i8(self, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: `self` proves AVX-512 BW.
        unsafe { _mm512_add_epi8(a, b) }
    }

    #[inline(always)]
    fn dot_i8(self, weights: u32, a: __m512i, c: __m512i) -> __m512i {
        // SAFETY: `self` proves AVX-512 BW, and VNNI where it is used.
        unsafe {
            let weights = _mm512_set1_epi32(weights.cast_signed());
            if VNNI {
                _mm512_dpbusd_epi32(c, weights, a)
            } else {
                // Two products have at most 2 * 127 * 127 < 2^15: nothing
                // saturates.
                let pairs = _mm512_maddubs_epi16(weights, a);
                _mm512_add_epi32(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)), c)
            }
        }
    }

    #[inline(always)]
    fn count_differences(self, counts: __m512i, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: `self` proves AVX-512 F and BW, and VPOPCNTDQ where it is used.
        unsafe {
            let differences = _mm512_xor_si512(a, b);
            if VBMI {
                return _mm512_add_epi32(counts, _mm512_popcnt_epi32(differences));
            }
            // The ones of each number of four bits.
            let ones = _mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
            let ones = _mm512_broadcast_i32x4(ones);
            let digit = _mm512_set1_epi8(15);
            let low = _mm512_and_si512(differences, digit);
            let high = _mm512_and_si512(_mm512_srli_epi32::<4>(differences), digit);
            let low = _mm512_shuffle_epi8(ones, low);
            let high = _mm512_shuffle_epi8(ones, high);
            _mm512_add_epi8(counts, _mm512_add_epi8(low, high))
        }
    }

    #[inline(always)]
    fn add_counts(self, total: __m512i, counts: __m512i) -> __m512i {
        if VBMI {
            // SAFETY: `self` proves AVX-512 F.
            unsafe { _mm512_add_epi32(total, counts) }
        } else {
            self.dot_i8(0x0101_0101, counts, total)
        }
    }

    #[inline(always)]
    unsafe fn load_i8(self, source: *const i8) -> __m512i {
        // SAFETY: `self` proves AVX-512 F; the caller vouches for 64 readable values.
        unsafe { _mm512_loadu_si512(source.cast()) }
    }

    #[inline(always)]
    unsafe fn store_i8(self, target: *mut i8, vector: __m512i) {
        // SAFETY: `self` proves AVX-512 F; the caller vouches for 64 writable values.
        unsafe { _mm512_storeu_si512(target.cast(), vector) }
    }

    // Plain index loops, see `tile`.
    #[allow(clippy::needless_range_loop)]
    #[inline(always)]
    unsafe fn transpose(
        self,
        source: *const f32,
        source_stride: usize,
        target: *mut f32,
        target_stride: usize,
        [rows, columns]: [usize; 2],
    ) {
        // SAFETY: `self` proves AVX-512 F and DQ; the caller vouches for 16 rows of 16
        // readable values and for what is written.
        unsafe {
            // Lane l of quarter q of vector 4 * a + b: row 4 * a + b, column 4 * q + l.
            let mut v = [_mm512_setzero_ps(); 16];
            for i in 0..16 {
                v[i] = _mm512_loadu_ps(source.add(i * source_stride));
            }
            // Quarters of 4 x 4: vector 4 * a + l has rows 4 * a + lane, columns
            // 4 * q + l.
            for a in 0..4 {
                let low = _mm512_unpacklo_ps(v[4 * a], v[4 * a + 1]);
                let high = _mm512_unpackhi_ps(v[4 * a], v[4 * a + 1]);
                let next_low = _mm512_unpacklo_ps(v[4 * a + 2], v[4 * a + 3]);
                let next_high = _mm512_unpackhi_ps(v[4 * a + 2], v[4 * a + 3]);
                v[4 * a] = _mm512_shuffle_ps::<0b01_00_01_00>(low, next_low);
                v[4 * a + 1] = _mm512_shuffle_ps::<0b11_10_11_10>(low, next_low);
                v[4 * a + 2] = _mm512_shuffle_ps::<0b01_00_01_00>(high, next_high);
                v[4 * a + 3] = _mm512_shuffle_ps::<0b11_10_11_10>(high, next_high);
            }
            // Then the quarters themselves.
            for l in 0..4 {
                let [a, b, c, d] = [v[l], v[4 + l], v[8 + l], v[12 + l]];
                let ab = _mm512_shuffle_f32x4::<0b10_00_10_00>(a, b);
                let cd = _mm512_shuffle_f32x4::<0b10_00_10_00>(c, d);
                v[l] = _mm512_shuffle_f32x4::<0b10_00_10_00>(ab, cd);
                v[8 + l] = _mm512_shuffle_f32x4::<0b11_01_11_01>(ab, cd);
                let ab = _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b);
                let cd = _mm512_shuffle_f32x4::<0b11_01_11_01>(c, d);
                v[4 + l] = _mm512_shuffle_f32x4::<0b10_00_10_00>(ab, cd);
                v[12 + l] = _mm512_shuffle_f32x4::<0b11_01_11_01>(ab, cd);
            }
            if [rows, columns] == [16, 16] {
                for i in 0..16 {
                    _mm512_storeu_ps(target.add(i * target_stride), v[i]);
                }
                return;
            }
            for i in 0..16 {
                if i < rows {
                    let target = target.add(i * target_stride);
                    _mm512_mask_storeu_ps(target, first_lanes(columns), v[i]);
                }
            }
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

/// Every fourth lane of 8 bits.
const EACH_FOURTH: u64 = 0x1111_1111_1111_1111;

/// Lanes of 32 bits, the first of each quarter, then the second, and so on.
const UNPACKED: [i32; 16] = [0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15];

/// Every second lane of 16 bits.
const ODD_LANES: u32 = 0xaaaa_aaaa;

/// Lanes of 32 bits in turns from the first half of two vectors.
const INTERLEAVED: [i32; 16] = [0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23];

/// Round to nearest, without exceptions.
const TO_NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

/// `a + b` of 16-bit floats. In assembly, as the intrinsics are younger than the Rust that
/// this crate asks for; all that the compiler has to know of are the registers.
///
/// # Safety
///
/// The CPU has AVX-512 FP16.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn add_f16(a: __m512i, b: __m512i) -> __m512i {
    let sum;
    // SAFETY: as promised by the caller.
    unsafe {
        asm!(
            "vaddph {sum}, {a}, {b}",
            sum = lateout(zmm_reg) sum,
            a = in(zmm_reg) a,
            b = in(zmm_reg) b,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sum
}

/// `a * b + c` of 16-bit floats, as [`add_f16`].
///
/// # Safety
///
/// The CPU has AVX-512 FP16.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn mul_add_f16(a: __m512i, b: __m512i, mut c: __m512i) -> __m512i {
    // SAFETY: as promised by the caller.
    unsafe {
        asm!(
            "vfmadd231ph {c}, {a}, {b}",
            c = inout(zmm_reg) c,
            a = in(zmm_reg) a,
            b = in(zmm_reg) b,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    c
}

/// A mask of the first `n` lanes.
#[inline(always)]
pub(super) fn first_lanes(n: usize) -> __mmask16 {
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
