//! The AVX2 level.

use std::arch::x86_64::{
    __m128i, __m256, __m256i, _CMP_UNORD_Q, _MM_HINT_T0, _mm_cvtsi32_si128, _mm_loadu_si128,
    _mm_prefetch, _mm_setr_epi8, _mm256_add_epi8, _mm256_add_epi16, _mm256_add_epi32,
    _mm256_add_ps, _mm256_and_si256, _mm256_andnot_ps, _mm256_andnot_si256, _mm256_blend_epi16,
    _mm256_blendv_epi8, _mm256_blendv_ps, _mm256_broadcastsi128_si256, _mm256_castpd_ps,
    _mm256_castps_pd, _mm256_castsi256_ps, _mm256_castsi256_si128, _mm256_cmp_ps,
    _mm256_cmpgt_epi32, _mm256_cvtepi16_epi32, _mm256_cvtepi32_ps, _mm256_cvtps_epi32,
    _mm256_div_ps, _mm256_extracti128_si256, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_loadu_si256,
    _mm256_madd_epi16, _mm256_maddubs_epi16, _mm256_maskload_ps, _mm256_maskstore_ps,
    _mm256_max_ps, _mm256_min_ps, _mm256_mul_ps, _mm256_mullo_epi16, _mm256_or_si256,
    _mm256_packs_epi16, _mm256_packs_epi32, _mm256_permute2x128_si256, _mm256_permute4x64_epi64,
    _mm256_permute4x64_pd, _mm256_permutevar8x32_epi32, _mm256_permutevar8x32_ps, _mm256_rsqrt_ps,
    _mm256_set1_epi8, _mm256_set1_epi16, _mm256_set1_epi32, _mm256_set1_ps, _mm256_setr_epi32,
    _mm256_setzero_si256, _mm256_shuffle_epi8, _mm256_shuffle_ps, _mm256_sll_epi16,
    _mm256_slli_epi16, _mm256_slli_epi32, _mm256_sllv_epi32, _mm256_srai_epi16, _mm256_srai_epi32,
    _mm256_srl_epi16, _mm256_srl_epi32, _mm256_srli_epi16, _mm256_srli_epi32, _mm256_srlv_epi32,
    _mm256_storeu_ps, _mm256_storeu_si256, _mm256_unpackhi_epi32, _mm256_unpacklo_epi32,
    _mm256_xor_si256,
};

use super::{Simd, Task};

/// Token of the AVX2 level.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx2(());

impl Simd for Avx2 {
    const NAME: &'static str = "x86_64-avx2";
    const LANES: usize = 8;
    const REGISTERS: usize = 16;
    const LOOK_UP_CYCLES: [f64; 3] = [2.9, 4.7, 8.6];
    const BYTE_LOOK_UP_CYCLES: [f64; 3] = [5.0, 8.0, f64::INFINITY];
    const PACKED_LOOK_UP_CYCLES: [f64; 3] = [3.0, 3.5, 5.5];
    const LOOK_UP_F32_CYCLES: [f64; 3] = [2.0, 3.8, 7.5];
    const DOT_BYTES_CYCLES: f64 = 3.0;
    const COUNT_CYCLES: f64 = 2.5;
    // Bytes of counts stay below 2^7.
    const COUNTED_WORDS: usize = 15;
    type F32 = __m256;
    type I16 = __m256i;
    type I32 = __m256i;
    type I8 = __m256i;

    /// Asks if the CPU has AVX2 and FMA.
    fn new() -> Option<Self> {
        (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")).then_some(Self(()))
    }

    #[inline(always)]
    fn call<T: Task>(self, task: T) -> T::Output {
        #[target_feature(enable = "avx2,fma")]
        fn compiled<T: Task>(simd: Avx2, task: T) -> T::Output {
            task.run(simd)
        }
        // SAFETY: `self` exists, so `new` has found AVX2 and FMA.
        unsafe { compiled(self, task) }
    }

    #[inline(always)]
    fn splat(self, value: f32) -> __m256 {
        // SAFETY: `self` proves AVX, which AVX2 includes.
        unsafe { _mm256_set1_ps(value) }
    }

    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: `self` proves AVX, which AVX2 includes.
        unsafe { _mm256_add_ps(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: `self` proves AVX, which AVX2 includes.
        unsafe { _mm256_mul_ps(a, b) }
    }

    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: `self` proves AVX, which AVX2 includes.
        unsafe {
            // The instruction gives its second operand if either is NaN; where
            // it is `b`, keep that.
            let greater = _mm256_max_ps(b, a);
            _mm256_blendv_ps(greater, b, _mm256_cmp_ps::<_CMP_UNORD_Q>(b, b))
        }
    }

    #[inline(always)]
    fn abs(self, a: __m256) -> __m256 {
        // SAFETY: `self` proves AVX.
        unsafe { _mm256_andnot_ps(_mm256_set1_ps(-0.0), a) }
    }

    #[inline(always)]
    fn max_number(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: `self` proves AVX.
        unsafe { _mm256_max_ps(a, b) }
    }

    #[inline(always)]
    fn min(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: `self` proves AVX.
        unsafe { _mm256_min_ps(a, b) }
    }

    #[inline(always)]
    fn div(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: `self` proves AVX.
        unsafe { _mm256_div_ps(a, b) }
    }

    #[inline(always)]
    fn rsqrt_estimate(self, a: __m256) -> __m256 {
        // SAFETY: `self` proves AVX, which AVX2 includes.
        unsafe { _mm256_rsqrt_ps(a) }
    }

    #[inline(always)]
    fn even(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: `self` proves AVX2.
        unsafe {
            // Shuffling works within halves: a, b, a, b.
            let even = _mm256_shuffle_ps::<0b10_00_10_00>(a, b);
            let pairs = _mm256_permute4x64_pd::<0b11_01_10_00>(_mm256_castps_pd(even));
            _mm256_castpd_ps(pairs)
        }
    }

    #[inline(always)]
    fn odd(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: `self` proves AVX2.
        unsafe {
            // As in `even`.
            let odd = _mm256_shuffle_ps::<0b11_01_11_01>(a, b);
            let pairs = _mm256_permute4x64_pd::<0b11_01_10_00>(_mm256_castps_pd(odd));
            _mm256_castpd_ps(pairs)
        }
    }

    #[inline(always)]
    fn mul_add(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: `self` proves FMA.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn load(self, source: *const f32) -> __m256 {
        // SAFETY: `self` proves AVX; the caller vouches for 8 readable values.
        unsafe { _mm256_loadu_ps(source) }
    }

    #[inline(always)]
    unsafe fn store(self, target: *mut f32, vector: __m256) {
        // SAFETY: `self` proves AVX; the caller vouches for 8 writable values.
        unsafe { _mm256_storeu_ps(target, vector) }
    }

    #[inline(always)]
    unsafe fn load_part(self, source: *const f32, n: usize) -> __m256 {
        // SAFETY: `self` proves AVX; the caller vouches for n readable values,
        // and masked lanes are not read.
        unsafe { _mm256_maskload_ps(source, first_lanes(self, n)) }
    }

    #[inline(always)]
    unsafe fn store_part(self, target: *mut f32, vector: __m256, n: usize) {
        // SAFETY: `self` proves AVX; the caller vouches for n writable values,
        // and masked lanes are not written.
        unsafe { _mm256_maskstore_ps(target, first_lanes(self, n), vector) }
    }

    #[inline(always)]
    unsafe fn load_range(self, source: *const f32, begin: usize, end: usize) -> __m256 {
        // SAFETY: `self` proves AVX2; the caller vouches for the values of the
        // range, and masked lanes are not read.
        unsafe {
            let others = first_lanes(self, begin);
            let mask = _mm256_andnot_si256(others, first_lanes(self, end));
            _mm256_maskload_ps(source, mask)
        }
    }

    #[inline(always)]
    unsafe fn store_range(self, target: *mut f32, vector: __m256, begin: usize, end: usize) {
        // Masked stores are slow on CPUs of AMD.
        let mut lanes = [0.0f32; 8];
        // SAFETY: `lanes` holds a vector; the caller vouches for the values of
        // the range, and that it lies within a vector.
        unsafe {
            if end - begin == Self::LANES {
                self.store(target, vector);
            } else {
                self.store(lanes.as_mut_ptr(), vector);
                let target = target.wrapping_add(begin);
                target.copy_from_nonoverlapping(lanes.as_ptr().add(begin), end - begin);
            }
        }
    }

    #[inline(always)]
    fn shift(self, vector: __m256, distance: usize) -> __m256 {
        // SAFETY: `self` proves AVX2. Of each index only the lowest 3 bits count.
        unsafe {
            let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            let index = _mm256_add_epi32(lanes, _mm256_set1_epi32(distance as i32));
            _mm256_permutevar8x32_ps(vector, index)
        }
    }

    #[inline(always)]
    fn shift_pair(self, pair: [__m256; 2], distance: usize) -> __m256 {
        // Both turned around; the first lanes are those of the first vector.
        let first = self.shift(pair[0], distance);
        let second = self.shift(pair[1], distance);
        // SAFETY: `self` proves AVX2.
        unsafe {
            let mask = first_lanes(self, Self::LANES - distance);
            _mm256_blendv_ps(second, first, _mm256_castsi256_ps(mask))
        }
    }

    #[inline(always)]
    fn zero_i16(self) -> __m256i {
        // SAFETY: `self` proves AVX, which AVX2 includes.
        unsafe { _mm256_setzero_si256() }
    }

    #[inline(always)]
    fn add_i16(self, a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: `self` proves AVX2.
        unsafe { _mm256_add_epi16(a, b) }
    }

    #[inline(always)]
    fn round_i16(self, low: __m256, high: __m256) -> __m256i {
        // SAFETY: `self` proves AVX2.
        unsafe {
            let packed = _mm256_packs_epi32(_mm256_cvtps_epi32(low), _mm256_cvtps_epi32(high));
            // Packing works within halves: low, high, low, high.
            _mm256_permute4x64_epi64::<0b11_01_10_00>(packed)
        }
    }

    #[inline(always)]
    fn round_zip_i16(self, even: __m256, odd: __m256) -> __m256i {
        // SAFETY: `self` proves AVX2.
        unsafe {
            let odd = _mm256_slli_epi32::<16>(_mm256_cvtps_epi32(odd));
            _mm256_blend_epi16::<ODD_LANES>(_mm256_cvtps_epi32(even), odd)
        }
    }

    #[inline(always)]
    fn widen_i16(self, vector: __m256i) -> [__m256; 2] {
        // SAFETY: `self` proves AVX2.
        unsafe {
            let low = _mm256_cvtepi16_epi32(_mm256_castsi256_si128(vector));
            let high = _mm256_cvtepi16_epi32(_mm256_extracti128_si256::<1>(vector));
            [_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high)]
        }
    }

    #[inline(always)]
    fn zip_i16(self, a: __m256i, b: __m256i) -> [__m256i; 2] {
        // SAFETY: `self` proves AVX2.
        unsafe {
            [
                _mm256_blend_epi16::<ODD_LANES>(a, _mm256_slli_epi32::<16>(b)),
                _mm256_blend_epi16::<ODD_LANES>(_mm256_srli_epi32::<16>(a), b),
            ]
        }
    }

    #[inline(always)]
    fn splat_pair(self, pair: i32) -> __m256i {
        // SAFETY: `self` proves AVX, which AVX2 includes.
        unsafe { _mm256_set1_epi32(pair) }
    }

    #[inline(always)]
    fn splat_i32(self, value: i32) -> __m256i {
        // SAFETY: `self` proves AVX, which AVX2 includes.
        unsafe { _mm256_set1_epi32(value) }
    }

    #[inline(always)]
    unsafe fn load_i32(self, source: *const i32) -> __m256i {
        // SAFETY: `self` proves AVX2; the caller vouches for 8 readable values.
        unsafe { _mm256_loadu_si256(source.cast()) }
    }

    #[inline(always)]
    unsafe fn store_i32(self, target: *mut i32, vector: __m256i) {
        // SAFETY: `self` proves AVX2; the caller vouches for 8 writable values.
        unsafe { _mm256_storeu_si256(target.cast(), vector) }
    }

    #[inline(always)]
    fn dot_i16(self, a: __m256i, b: __m256i, c: __m256i) -> __m256i {
        // SAFETY: `self` proves AVX2.
        unsafe { _mm256_add_epi32(_mm256_madd_epi16(a, b), c) }
    }

    #[inline(always)]
    fn upper_halves(self, even: __m256i, odd: __m256i) -> __m256i {
        // SAFETY: `self` proves AVX2.
        unsafe { _mm256_blend_epi16::<ODD_LANES>(_mm256_srli_epi32::<16>(even), odd) }
    }

    #[inline(always)]
    fn shifted_halves(self, even: __m256i, right: __m256i, odd: __m256i, left: __m256i) -> __m256i {
        // SAFETY: `self` proves AVX2.
        unsafe {
            let even = _mm256_srlv_epi32(even, right);
            _mm256_blend_epi16::<ODD_LANES>(even, _mm256_sllv_epi32(odd, left))
        }
    }

    #[inline(always)]
    fn join_bytes(self, low: __m256i, high: __m256i) -> __m256i {
        // SAFETY: `self` proves AVX2.
        unsafe { _mm256_add_epi16(low, _mm256_slli_epi16::<8>(high)) }
    }

    #[inline(always)]
    fn dot_bytes(self, a: __m256i, weights: i32, c: __m256i) -> __m256i {
        // SAFETY: `self` proves AVX2.
        unsafe {
            let weights = _mm256_set1_epi32(weights);
            // Products of bytes would saturate in pairs: they are widened.
            let low = _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(weights));
            let high = _mm256_srai_epi16::<8>(weights);
            let low = _mm256_madd_epi16(_mm256_and_si256(a, _mm256_set1_epi16(255)), low);
            let high = _mm256_madd_epi16(_mm256_srli_epi16::<8>(a), high);
            _mm256_add_epi32(c, _mm256_add_epi32(low, high))
        }
    }

    #[inline(always)]
    fn interleave_i32(self, even: __m256i, odd: __m256i) -> [__m256; 2] {
        // SAFETY: `self` proves AVX2.
        unsafe {
            // Unpacking works within halves: elements 0 1 | 4 5, 2 3 | 6 7.
            let low = _mm256_unpacklo_epi32(even, odd);
            let high = _mm256_unpackhi_epi32(even, odd);
            [
                _mm256_cvtepi32_ps(_mm256_permute2x128_si256::<0x20>(low, high)),
                _mm256_cvtepi32_ps(_mm256_permute2x128_si256::<0x31>(low, high)),
            ]
        }
    }

    #[inline(always)]
    fn float_i32(self, vector: __m256i) -> __m256 {
        // SAFETY: `self` proves AVX, which AVX2 includes.
        unsafe { _mm256_cvtepi32_ps(vector) }
    }

    #[inline(always)]
    fn pack_i8(self, vectors: [__m256i; 4]) -> __m256i {
        // SAFETY: `self` proves AVX2.
        unsafe {
            let [a, b, c, d] = vectors;
            let ab = _mm256_packs_epi32(_mm256_srai_epi32::<23>(a), _mm256_srai_epi32::<23>(b));
            let cd = _mm256_packs_epi32(_mm256_srai_epi32::<23>(c), _mm256_srai_epi32::<23>(d));
            let packed = _mm256_packs_epi16(ab, cd);
            // Packing works within halves: each has four bytes of each vector.
            let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
            _mm256_permutevar8x32_epi32(packed, order)
        }
    }

    #[inline(always)]
    unsafe fn look_up_i8<const ENTRIES: usize>(
        self,
        tables: *const i8,
        indices: __m256i,
    ) -> __m256i {
        // SAFETY: `self` proves AVX2; the caller vouches for 4 * ENTRIES entries.
        unsafe {
            // A shuffle sees the lowest 4 bits, a blend the highest. A shuffle
            // gives 0 where the highest bit is set: in the lanes of other tables.
            let by_bit_4 = _mm256_slli_epi16::<3>(indices);
            let mut found = _mm256_setzero_si256();
            for table in 0..4 {
                let others =
                    _mm256_set1_epi32((0x8080_8080u32 ^ 0x80 << (8 * table)).cast_signed());
                let indices = _mm256_or_si256(indices, others);
                let sixteen = |i: usize| {
                    let source = tables.add(table * ENTRIES + 16 * i);
                    let entries = _mm256_broadcastsi128_si256(_mm_loadu_si128(source.cast()));
                    _mm256_shuffle_epi8(entries, indices)
                };
                let entries = if ENTRIES == 32 {
                    _mm256_blendv_epi8(sixteen(0), sixteen(1), by_bit_4)
                } else {
                    sixteen(0)
                };
                found = _mm256_or_si256(found, entries);
            }
            found
        }
    }

    #[inline(always)]
    fn half_bytes(self, packed: __m256i, i: usize) -> __m256i {
        // SAFETY: `self` proves AVX2.
        unsafe {
            let shifted = _mm256_srl_epi16(packed, _mm_cvtsi32_si128(4 * i as i32));
            _mm256_and_si256(shifted, _mm256_set1_epi8(15))
        }
    }

    #[inline(always)]
    fn raise_bits(self, packed: __m256i, i: usize) -> __m256i {
        // SAFETY: `self` proves AVX2.
        unsafe { _mm256_sll_epi16(packed, _mm_cvtsi32_si128(7 - i as i32)) }
    }

    #[inline(always)]
    unsafe fn look_up_packed<const BITS: u32>(
        self,
        table: *const u8,
        low: __m256i,
        high: [__m256i; 2],
    ) -> __m256i {
        // SAFETY: `self` proves AVX2; the caller vouches for 2^BITS entries. A blend sees
        // the highest bit of each byte.
        unsafe {
            let sixteen = |i: usize| {
                let entries = _mm_loadu_si128(table.add(16 * i).cast());
                _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(entries), low)
            };
            let thirty_two =
                |i: usize| _mm256_blendv_epi8(sixteen(2 * i), sixteen(2 * i + 1), high[0]);
            match BITS {
                4 => sixteen(0),
                5 => thirty_two(0),
                _ => _mm256_blendv_epi8(thirty_two(0), thirty_two(1), high[1]),
            }
        }
    }

    #[inline(always)]
    fn add_bytes(self, [even, odd]: [__m256i; 2], bytes: __m256i) -> [__m256i; 2] {
        // SAFETY: `self` proves AVX2.
        unsafe {
            let of_even = _mm256_and_si256(bytes, _mm256_set1_epi16(255));
            [
                _mm256_add_epi16(even, of_even),
                _mm256_add_epi16(odd, _mm256_srli_epi16::<8>(bytes)),
            ]
        }
    }

    #[inline(always)]
    fn add_i8(self, a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: `self` proves AVX2.
        unsafe { _mm256_add_epi8(a, b) }
    }

    #[inline(always)]
    fn dot_i8(self, weights: u32, a: __m256i, c: __m256i) -> __m256i {
        // SAFETY: `self` proves AVX2.
        unsafe {
            // Two products have at most 2 * 127 * 127 < 2^15: nothing saturates.
            let pairs = _mm256_maddubs_epi16(_mm256_set1_epi32(weights.cast_signed()), a);
            _mm256_add_epi32(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)), c)
        }
    }

    #[inline(always)]
    fn count_differences(self, counts: __m256i, a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: `self` proves AVX2.
        unsafe {
            // The ones of each number of four bits.
            let ones = _mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
            let ones = _mm256_broadcastsi128_si256(ones);
            let digit = _mm256_set1_epi8(15);
            let differences = _mm256_xor_si256(a, b);
            let low = _mm256_and_si256(differences, digit);
            let high = _mm256_and_si256(_mm256_srli_epi32::<4>(differences), digit);
            let low = _mm256_shuffle_epi8(ones, low);
            let high = _mm256_shuffle_epi8(ones, high);
            _mm256_add_epi8(counts, _mm256_add_epi8(low, high))
        }
    }

    #[inline(always)]
    fn add_counts(self, total: __m256i, counts: __m256i) -> __m256i {
        self.dot_i8(0x0101_0101, counts, total)
    }

    #[inline(always)]
    unsafe fn load_i8(self, source: *const i8) -> __m256i {
        // SAFETY: `self` proves AVX; the caller vouches for 32 readable values.
        unsafe { _mm256_loadu_si256(source.cast()) }
    }

    #[inline(always)]
    unsafe fn store_i8(self, target: *mut i8, vector: __m256i) {
        // SAFETY: `self` proves AVX; the caller vouches for 32 writable values.
        unsafe { _mm256_storeu_si256(target.cast(), vector) }
    }

    #[inline(always)]
    fn shift_i16(self, vector: __m256i, distance: usize) -> __m256i {
        // SAFETY: `self` proves AVX2.
        unsafe {
            // By pairs of lanes; of each index only the lowest 3 bits count.
            let first = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            let index = _mm256_add_epi32(first, _mm256_set1_epi32((distance / 2) as i32));
            let even = _mm256_permutevar8x32_epi32(vector, index);
            if distance.is_multiple_of(2) {
                return even;
            }
            let next = _mm256_add_epi32(index, _mm256_set1_epi32(1));
            let next = _mm256_permutevar8x32_epi32(vector, next);
            _mm256_or_si256(_mm256_srli_epi32::<16>(even), _mm256_slli_epi32::<16>(next))
        }
    }

    #[inline(always)]
    fn shift_right_i16<const BITS: u32>(self, vector: __m256i) -> __m256i {
        // SAFETY: `self` proves AVX2.
        unsafe { _mm256_srl_epi16(vector, _mm_cvtsi32_si128(BITS as i32)) }
    }

    #[inline(always)]
    unsafe fn look_up_i16<const BITS: u32>(self, entries: *const i16, indices: __m256i) -> __m256i {
        // SAFETY: `self` proves AVX2; the caller vouches for 2^BITS entries,
        // of which each step of the loop reads 16.
        unsafe {
            // The positions of an entry's two bytes.
            let mask = _mm256_set1_epi16((1 << BITS) - 1);
            let twice =
                _mm256_mullo_epi16(_mm256_and_si256(indices, mask), _mm256_set1_epi16(0x0202));
            let bytes = _mm256_or_si256(twice, _mm256_set1_epi16(0x0100));
            // A shuffle sees the lowest 4 bits and takes from 8 entries; the
            // bits above them choose between shuffles. A blend sees the highest
            // bit of each byte.
            let by_bit_4 = _mm256_slli_epi16::<3>(bytes);
            let by_bit_5 = _mm256_slli_epi16::<2>(bytes);
            let by_bit_6 = _mm256_slli_epi16::<1>(bytes);
            let mut sixteen = [bytes; 4];
            for (i, sixteen) in sixteen.iter_mut().take((1 << BITS) / 16).enumerate() {
                let source: *const __m128i = entries.add(16 * i).cast();
                let low = _mm256_broadcastsi128_si256(_mm_loadu_si128(source));
                let high = _mm256_broadcastsi128_si256(_mm_loadu_si128(source.add(1)));
                *sixteen = _mm256_blendv_epi8(
                    _mm256_shuffle_epi8(low, bytes),
                    _mm256_shuffle_epi8(high, bytes),
                    by_bit_4,
                );
            }
            let [a, b, c, d] = sixteen;
            match BITS {
                4 => a,
                5 => _mm256_blendv_epi8(a, b, by_bit_5),
                _ => _mm256_blendv_epi8(
                    _mm256_blendv_epi8(a, b, by_bit_5),
                    _mm256_blendv_epi8(c, d, by_bit_5),
                    by_bit_6,
                ),
            }
        }
    }

    #[inline(always)]
    fn shift_right_i32<const BITS: u32>(self, vector: __m256i) -> __m256i {
        // SAFETY: `self` proves AVX2.
        unsafe { _mm256_srl_epi32(vector, _mm_cvtsi32_si128(BITS as i32)) }
    }

    #[inline(always)]
    unsafe fn look_up_f32<const BITS: u32>(self, entries: *const f32, indices: __m256i) -> __m256 {
        // SAFETY: `self` proves AVX2; the caller vouches for 2^BITS entries.
        unsafe {
            // A permutation sees the lowest 3 bits and takes from 8 entries; the
            // bits above them choose between permutations. A blend sees the
            // highest bit.
            let by_bit_3 = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(indices));
            let by_bit_4 = _mm256_castsi256_ps(_mm256_slli_epi32::<27>(indices));
            let by_bit_5 = _mm256_castsi256_ps(_mm256_slli_epi32::<26>(indices));
            let eight =
                |i: usize| _mm256_permutevar8x32_ps(_mm256_loadu_ps(entries.add(8 * i)), indices);
            let sixteen = |i: usize| _mm256_blendv_ps(eight(2 * i), eight(2 * i + 1), by_bit_3);
            let thirty_two =
                |i: usize| _mm256_blendv_ps(sixteen(2 * i), sixteen(2 * i + 1), by_bit_4);
            match BITS {
                4 => sixteen(0),
                5 => thirty_two(0),
                _ => _mm256_blendv_ps(thirty_two(0), thirty_two(1), by_bit_5),
            }
        }
    }

    #[inline(always)]
    fn prefetch(self, address: *const i16) {
        // SAFETY: a prefetch does not fault.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
    }

    #[inline(always)]
    unsafe fn load_i16(self, source: *const i16) -> __m256i {
        // SAFETY: `self` proves AVX; the caller vouches for 16 readable values.
        unsafe { _mm256_loadu_si256(source.cast()) }
    }

    #[inline(always)]
    unsafe fn store_i16(self, target: *mut i16, vector: __m256i) {
        // SAFETY: `self` proves AVX; the caller vouches for 16 writable values.
        unsafe { _mm256_storeu_si256(target.cast(), vector) }
    }
}

/// Every second lane of 16 bits, of 8.
const ODD_LANES: i32 = 0b1010_1010;
/// All bits of the first `n` lanes.
#[inline(always)]
fn first_lanes(_: Avx2, n: usize) -> __m256i {
    // SAFETY: the token proves AVX2.
    unsafe {
        let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        _mm256_cmpgt_epi32(_mm256_set1_epi32(n as i32), lanes)
    }
}
