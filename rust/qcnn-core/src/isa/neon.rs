//! The NEON level: Advanced SIMD of 64-bit ARM.

use std::arch::aarch64::{
    float32x4_t, int8x16_t, int8x16x2_t, int8x16x4_t, int16x8_t, int32x4_t, uint8x16_t, vabsq_f32,
    vaddq_f32, vaddq_s8, vaddq_s16, vaddq_s32, vaddq_u8, vandq_s16, vandq_u8, vbslq_s16, vcntq_u8,
    vcvtnq_s32_f32, vcvtq_f32_s32, vdivq_f32, vdupq_n_f32, vdupq_n_s8, vdupq_n_s16, vdupq_n_s32,
    vdupq_n_u8, vdupq_n_u32, veorq_s32, vfmaq_f32, vget_low_s8, vget_low_s16, vld1q_f32, vld1q_s8,
    vld1q_s8_x2, vld1q_s8_x4, vld1q_s16, vld1q_s32, vld1q_u8, vmaxq_f32, vminq_f32, vmlal_high_s16,
    vmlal_s16, vmovl_high_s16, vmovl_s16, vmull_high_s8, vmull_high_s16, vmull_s8, vmull_s16,
    vmulq_f32, vnegq_s32, vpadalq_s16, vpadalq_u16, vpaddlq_u8, vpaddq_s16, vpaddq_s32, vqtbl1q_s8,
    vqtbl2q_s8, vqtbl4q_s8, vqtbx4q_s8, vreinterpretq_f32_s8, vreinterpretq_s8_f32,
    vreinterpretq_s8_s16, vreinterpretq_s8_u8, vreinterpretq_s16_s8, vreinterpretq_s16_s32,
    vreinterpretq_s16_u16, vreinterpretq_s32_u8, vreinterpretq_s32_u32, vreinterpretq_u8_s8,
    vreinterpretq_u8_s32, vreinterpretq_u16_s8, vreinterpretq_u16_s16, vreinterpretq_u16_u32,
    vreinterpretq_u32_s32, vrsqrteq_f32, vrsqrtsq_f32, vshlq_n_s16, vshlq_s32, vshlq_u8, vshlq_u16,
    vshlq_u32, vshrn_high_n_s16, vshrn_n_s16, vshrq_n_s16, vshrq_n_u8, vsliq_n_s8, vsliq_n_s16,
    vsraq_n_u16, vst1q_f32, vst1q_s8, vst1q_s16, vst1q_s32, vsubq_u8, vtrn1q_s16, vtrn2q_s16,
    vuzp1q_f32, vuzp1q_s16, vuzp2q_f32, vuzp2q_s16, vzip1q_s32, vzip2q_s32,
};
use std::arch::asm;

use super::{Simd, Task};

/// Token of the NEON level.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Neon(());

impl Simd for Neon {
    const NAME: &'static str = "aarch64-neon";
    const LANES: usize = 4;
    const REGISTERS: usize = 32;
    // Not measured but computed: llvm-mca's throughput of these instructions on
    // Neoverse N1.
    const LOOK_UP_CYCLES: [f64; 3] = [4.0, 4.8, 8.2];
    const BYTE_LOOK_UP_CYCLES: [f64; 3] = [2.1, 5.0, f64::INFINITY];
    const PACKED_LOOK_UP_CYCLES: [f64; 3] = [4.0, 5.0, 8.0];
    const LOOK_UP_F32_CYCLES: [f64; 3] = [5.5; 3];
    const DOT_BYTES_CYCLES: f64 = 1.6;
    const COUNT_CYCLES: f64 = 2.0;
    // Bytes of counts stay below 2^8.
    const COUNTED_WORDS: usize = 31;
    type F32 = float32x4_t;
    type I16 = int16x8_t;
    type I32 = int32x4_t;
    type I8 = int8x16_t;

    /// Asks if the CPU has Advanced SIMD, as all that run an ordinary system do.
    fn new() -> Option<Self> {
        std::arch::is_aarch64_feature_detected!("neon").then_some(Self(()))
    }

    #[inline(always)]
    fn call<T: Task>(self, task: T) -> T::Output {
        #[target_feature(enable = "neon")]
        fn compiled<T: Task>(simd: Neon, task: T) -> T::Output {
            task.run(simd)
        }
        // SAFETY: `self` exists, so `new` has found NEON.
        unsafe { compiled(self, task) }
    }

    #[inline(always)]
    fn splat(self, value: f32) -> float32x4_t {
        // SAFETY: `self` proves NEON.
        unsafe { vdupq_n_f32(value) }
    }

    #[inline(always)]
    fn add(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: `self` proves NEON.
        unsafe { vaddq_f32(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: `self` proves NEON.
        unsafe { vmulq_f32(a, b) }
    }

    #[inline(always)]
    fn max(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: `self` proves NEON.
        unsafe { vmaxq_f32(a, b) }
    }

    #[inline(always)]
    fn max_number(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        self.max(a, b)
    }

    #[inline(always)]
    fn abs(self, a: float32x4_t) -> float32x4_t {
        // SAFETY: `self` proves NEON.
        unsafe { vabsq_f32(a) }
    }

    #[inline(always)]
    fn min(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: `self` proves NEON.
        unsafe { vminq_f32(a, b) }
    }

    #[inline(always)]
    fn div(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: `self` proves NEON.
        unsafe { vdivq_f32(a, b) }
    }

    #[inline(always)]
    fn rsqrt_estimate(self, a: float32x4_t) -> float32x4_t {
        // SAFETY: `self` proves NEON.
        unsafe {
            // The instruction's estimate is good to 2^-8; a step of Newton's method
            // squares its error.
            let estimate = vrsqrteq_f32(a);
            vmulq_f32(estimate, vrsqrtsq_f32(vmulq_f32(a, estimate), estimate))
        }
    }

    #[inline(always)]
    fn even(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: `self` proves NEON.
        unsafe { vuzp1q_f32(a, b) }
    }

    #[inline(always)]
    fn odd(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: `self` proves NEON.
        unsafe { vuzp2q_f32(a, b) }
    }

    #[inline(always)]
    fn mul_add(self, a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        // SAFETY: `self` proves NEON.
        unsafe { vfmaq_f32(c, a, b) }
    }

    #[inline(always)]
    unsafe fn load(self, source: *const f32) -> float32x4_t {
        // SAFETY: `self` proves NEON; the caller vouches for 4 readable values.
        unsafe { vld1q_f32(source) }
    }

    #[inline(always)]
    unsafe fn store(self, target: *mut f32, vector: float32x4_t) {
        // SAFETY: `self` proves NEON; the caller vouches for 4 writable values.
        unsafe { vst1q_f32(target, vector) }
    }

    #[inline(always)]
    unsafe fn load_part(self, source: *const f32, n: usize) -> float32x4_t {
        // SAFETY: the caller vouches for n readable values.
        unsafe { self.load_range(source, 0, n) }
    }

    #[inline(always)]
    unsafe fn store_part(self, target: *mut f32, vector: float32x4_t, n: usize) {
        // SAFETY: the caller vouches for n writable values.
        unsafe { self.store_range(target, vector, 0, n) }
    }

    #[inline(always)]
    unsafe fn load_range(self, source: *const f32, begin: usize, end: usize) -> float32x4_t {
        let mut lanes = [0.0f32; 4];
        for (i, lane) in lanes.iter_mut().enumerate() {
            if (begin..end).contains(&i) {
                // SAFETY: the caller vouches for the values of the range.
                *lane = unsafe { source.wrapping_add(i).read() };
            }
        }
        // SAFETY: `lanes` holds a vector.
        unsafe { self.load(lanes.as_ptr()) }
    }

    #[inline(always)]
    unsafe fn store_range(self, target: *mut f32, vector: float32x4_t, begin: usize, end: usize) {
        let mut lanes = [0.0f32; 4];
        // SAFETY: `lanes` holds a vector.
        unsafe { self.store(lanes.as_mut_ptr(), vector) };
        for (i, lane) in lanes.iter().enumerate() {
            if (begin..end).contains(&i) {
                // SAFETY: the caller vouches for the values of the range.
                unsafe { target.wrapping_add(i).write(*lane) };
            }
        }
    }

    #[inline(always)]
    fn shift(self, vector: float32x4_t, distance: usize) -> float32x4_t {
        // SAFETY: `self` proves NEON.
        unsafe {
            let bytes = vreinterpretq_s8_f32(vector);
            vreinterpretq_f32_s8(vqtbl1q_s8(bytes, turned_bytes(self, 4 * distance)))
        }
    }

    #[inline(always)]
    fn shift_pair(self, pair: [float32x4_t; 2], distance: usize) -> float32x4_t {
        // SAFETY: `self` proves NEON.
        unsafe {
            let [a, b] = pair;
            let bytes = int8x16x2_t(vreinterpretq_s8_f32(a), vreinterpretq_s8_f32(b));
            vreinterpretq_f32_s8(vqtbl2q_s8(bytes, bytes_from(self, 4 * distance)))
        }
    }

    #[inline(always)]
    fn zero_i16(self) -> int16x8_t {
        // SAFETY: `self` proves NEON.
        unsafe { vdupq_n_s16(0) }
    }

    #[inline(always)]
    fn add_i16(self, a: int16x8_t, b: int16x8_t) -> int16x8_t {
        // SAFETY: `self` proves NEON.
        unsafe { vaddq_s16(a, b) }
    }

    #[inline(always)]
    fn round_i16(self, low: float32x4_t, high: float32x4_t) -> int16x8_t {
        // SAFETY: `self` proves NEON.
        unsafe {
            let low = vreinterpretq_s16_s32(vcvtnq_s32_f32(low));
            vuzp1q_s16(low, vreinterpretq_s16_s32(vcvtnq_s32_f32(high)))
        }
    }

    #[inline(always)]
    fn round_zip_i16(self, even: float32x4_t, odd: float32x4_t) -> int16x8_t {
        // SAFETY: `self` proves NEON.
        unsafe {
            let even = vreinterpretq_s16_s32(vcvtnq_s32_f32(even));
            vtrn1q_s16(even, vreinterpretq_s16_s32(vcvtnq_s32_f32(odd)))
        }
    }

    #[inline(always)]
    fn widen_i16(self, vector: int16x8_t) -> [float32x4_t; 2] {
        // SAFETY: `self` proves NEON.
        unsafe {
            [
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(vector))),
                vcvtq_f32_s32(vmovl_high_s16(vector)),
            ]
        }
    }

    #[inline(always)]
    fn zip_i16(self, a: int16x8_t, b: int16x8_t) -> [int16x8_t; 2] {
        // SAFETY: `self` proves NEON.
        unsafe { [vtrn1q_s16(a, b), vtrn2q_s16(a, b)] }
    }

    #[inline(always)]
    fn splat_pair(self, pair: i32) -> int16x8_t {
        // SAFETY: `self` proves NEON.
        unsafe { vreinterpretq_s16_s32(vdupq_n_s32(pair)) }
    }

    #[inline(always)]
    fn splat_i32(self, value: i32) -> int32x4_t {
        // SAFETY: `self` proves NEON.
        unsafe { vdupq_n_s32(value) }
    }

    #[inline(always)]
    unsafe fn load_i32(self, source: *const i32) -> int32x4_t {
        // SAFETY: `self` proves NEON; the caller vouches for 4 readable values.
        unsafe { vld1q_s32(source) }
    }

    #[inline(always)]
    unsafe fn store_i32(self, target: *mut i32, vector: int32x4_t) {
        // SAFETY: `self` proves NEON; the caller vouches for 4 writable values.
        unsafe { vst1q_s32(target, vector) }
    }

    #[inline(always)]
    fn dot_i16(self, a: int16x8_t, b: int16x8_t, c: int32x4_t) -> int32x4_t {
        // SAFETY: `self` proves NEON.
        unsafe {
            let low = vmull_s16(vget_low_s16(a), vget_low_s16(b));
            vaddq_s32(c, vpaddq_s32(low, vmull_high_s16(a, b)))
        }
    }

    #[inline(always)]
    fn upper_halves(self, even: int32x4_t, odd: int32x4_t) -> int16x8_t {
        // SAFETY: `self` proves NEON.
        unsafe { vtrn2q_s16(vreinterpretq_s16_s32(even), vreinterpretq_s16_s32(odd)) }
    }

    #[inline(always)]
    fn shifted_halves(
        self,
        even: int32x4_t,
        right: int32x4_t,
        odd: int32x4_t,
        left: int32x4_t,
    ) -> int16x8_t {
        // SAFETY: `self` proves NEON.
        unsafe {
            // A negative distance shifts right.
            let even = vshlq_u32(vreinterpretq_u32_s32(even), vnegq_s32(right));
            let low = vreinterpretq_u16_u32(vdupq_n_u32(0xffff));
            vbslq_s16(
                low,
                vreinterpretq_s16_s32(vreinterpretq_s32_u32(even)),
                vreinterpretq_s16_s32(vshlq_s32(odd, left)),
            )
        }
    }

    #[inline(always)]
    fn join_bytes(self, low: int16x8_t, high: int16x8_t) -> int16x8_t {
        // SAFETY: `self` proves NEON.
        unsafe { vaddq_s16(low, vshlq_n_s16::<8>(high)) }
    }

    #[inline(always)]
    fn dot_bytes(self, a: int16x8_t, weights: i32, c: int32x4_t) -> int32x4_t {
        // SAFETY: `self` proves NEON.
        unsafe {
            let weights = self.splat_pair(weights);
            // The lower bytes of 16 bits, then the upper ones.
            let low = vandq_s16(a, vdupq_n_s16(255));
            let high = vreinterpretq_s16_u16(vshlq_u16(vreinterpretq_u16_s16(a), vdupq_n_s16(-8)));
            let low_weights = vshrq_n_s16::<8>(vshlq_n_s16::<8>(weights));
            let high_weights = vshrq_n_s16::<8>(weights);
            // Pairs of products of the first two lanes, then of the last two.
            let first = vmull_s16(vget_low_s16(low), vget_low_s16(low_weights));
            let first = vmlal_s16(first, vget_low_s16(high), vget_low_s16(high_weights));
            let last = vmull_high_s16(low, low_weights);
            let last = vmlal_high_s16(last, high, high_weights);
            vaddq_s32(c, vpaddq_s32(first, last))
        }
    }

    #[inline(always)]
    fn interleave_i32(self, even: int32x4_t, odd: int32x4_t) -> [float32x4_t; 2] {
        // SAFETY: `self` proves NEON.
        unsafe {
            [
                vcvtq_f32_s32(vzip1q_s32(even, odd)),
                vcvtq_f32_s32(vzip2q_s32(even, odd)),
            ]
        }
    }

    #[inline(always)]
    fn float_i32(self, vector: int32x4_t) -> float32x4_t {
        // SAFETY: `self` proves NEON.
        unsafe { vcvtq_f32_s32(vector) }
    }

    #[inline(always)]
    fn pack_i8(self, vectors: [int32x4_t; 4]) -> int8x16_t {
        // SAFETY: `self` proves NEON.
        unsafe {
            // Of the upper halves, bits 7 to 14.
            let [a, b, c, d] = vectors.map(|vector| vreinterpretq_s16_s32(vector));
            vshrn_high_n_s16::<7>(vshrn_n_s16::<7>(vuzp2q_s16(a, b)), vuzp2q_s16(c, d))
        }
    }

    #[inline(always)]
    unsafe fn look_up_i8<const ENTRIES: usize>(
        self,
        tables: *const i8,
        indices: int8x16_t,
    ) -> int8x16_t {
        // SAFETY: `self` proves NEON; the caller vouches for 4 * ENTRIES entries, which
        // are one table to the instruction.
        unsafe { look_up_bytes(self, tables, 4 * ENTRIES, vreinterpretq_u8_s8(indices)) }
    }

    #[inline(always)]
    fn half_bytes(self, packed: int8x16_t, i: usize) -> int8x16_t {
        // SAFETY: `self` proves NEON.
        unsafe {
            let right = vdupq_n_s8(-4 * i as i8);
            let shifted = vshlq_u8(vreinterpretq_u8_s8(packed), right);
            vreinterpretq_s8_u8(vandq_u8(shifted, vdupq_n_u8(15)))
        }
    }

    #[inline(always)]
    fn raise_bits(self, packed: int8x16_t, i: usize) -> int8x16_t {
        // SAFETY: `self` proves NEON.
        unsafe {
            let left = vdupq_n_s8(7 - i as i8);
            vreinterpretq_s8_u8(vshlq_u8(vreinterpretq_u8_s8(packed), left))
        }
    }

    #[inline(always)]
    unsafe fn look_up_packed<const BITS: u32>(
        self,
        table: *const u8,
        low: int8x16_t,
        high: [int8x16_t; 2],
    ) -> int8x16_t {
        // SAFETY: `self` proves NEON; the caller vouches for 2^BITS entries.
        unsafe {
            let [four, five] =
                high.map(|bits| vreinterpretq_s8_u8(vshrq_n_u8::<7>(vreinterpretq_u8_s8(bits))));
            // Bits are put in from the given one on; those below it stay.
            let mut numbers = low;
            if BITS > 4 {
                numbers = vsliq_n_s8::<4>(numbers, four);
            }
            if BITS > 5 {
                numbers = vsliq_n_s8::<5>(numbers, five);
            }
            look_up_bytes(self, table.cast(), 1 << BITS, vreinterpretq_u8_s8(numbers))
        }
    }

    #[inline(always)]
    fn add_bytes(self, [even, odd]: [int16x8_t; 2], bytes: int8x16_t) -> [int16x8_t; 2] {
        // SAFETY: `self` proves NEON.
        unsafe {
            let of_even = vandq_s16(vreinterpretq_s16_s8(bytes), vdupq_n_s16(255));
            let odd = vsraq_n_u16::<8>(vreinterpretq_u16_s16(odd), vreinterpretq_u16_s8(bytes));
            [vaddq_s16(even, of_even), vreinterpretq_s16_u16(odd)]
        }
    }

    #[inline(always)]
    fn add_i8(self, a: int8x16_t, b: int8x16_t) -> int8x16_t {
        // SAFETY: `self` proves NEON.
        unsafe { vaddq_s8(a, b) }
    }

    #[inline(always)]
    fn dot_i8(self, weights: u32, a: int8x16_t, c: int32x4_t) -> int32x4_t {
        // SAFETY: `self` proves NEON.
        unsafe {
            let weights =
                vreinterpretq_s8_u8(vreinterpretq_u8_s32(vdupq_n_s32(weights.cast_signed())));
            // Two products have at most 2 * 127 * 127 < 2^15.
            let low = vmull_s8(vget_low_s8(a), vget_low_s8(weights));
            vpadalq_s16(c, vpaddq_s16(low, vmull_high_s8(a, weights)))
        }
    }

    #[inline(always)]
    fn count_differences(self, counts: int32x4_t, a: int32x4_t, b: int32x4_t) -> int32x4_t {
        // SAFETY: `self` proves NEON.
        unsafe {
            let ones = vcntq_u8(vreinterpretq_u8_s32(veorq_s32(a, b)));
            let counts = vaddq_u8(vreinterpretq_u8_s32(counts), ones);
            vreinterpretq_s32_u8(counts)
        }
    }

    #[inline(always)]
    fn add_counts(self, total: int32x4_t, counts: int32x4_t) -> int32x4_t {
        // SAFETY: `self` proves NEON.
        unsafe {
            let pairs = vpaddlq_u8(vreinterpretq_u8_s32(counts));
            vreinterpretq_s32_u32(vpadalq_u16(vreinterpretq_u32_s32(total), pairs))
        }
    }

    #[inline(always)]
    unsafe fn load_i8(self, source: *const i8) -> int8x16_t {
        // SAFETY: `self` proves NEON; the caller vouches for 16 readable values.
        unsafe { vld1q_s8(source) }
    }

    #[inline(always)]
    unsafe fn store_i8(self, target: *mut i8, vector: int8x16_t) {
        // SAFETY: `self` proves NEON; the caller vouches for 16 writable values.
        unsafe { vst1q_s8(target, vector) }
    }

    #[inline(always)]
    fn shift_i16(self, vector: int16x8_t, distance: usize) -> int16x8_t {
        // SAFETY: `self` proves NEON.
        unsafe {
            let bytes = vreinterpretq_s8_s16(vector);
            vreinterpretq_s16_s8(vqtbl1q_s8(bytes, turned_bytes(self, 2 * distance)))
        }
    }

    #[inline(always)]
    fn shift_right_i16<const BITS: u32>(self, vector: int16x8_t) -> int16x8_t {
        // SAFETY: `self` proves NEON.
        unsafe {
            // A negative distance shifts right.
            let right = vdupq_n_s16(-(BITS as i16));
            vreinterpretq_s16_u16(vshlq_u16(vreinterpretq_u16_s16(vector), right))
        }
    }

    #[inline(always)]
    unsafe fn look_up_i16<const BITS: u32>(
        self,
        entries: *const i16,
        indices: int16x8_t,
    ) -> int16x8_t {
        // SAFETY: `self` proves NEON; the caller vouches for 2^BITS entries.
        unsafe {
            // The positions of an entry's two bytes.
            let mask = vdupq_n_s16((1 << BITS) - 1);
            let twice = vshlq_n_s16::<1>(vandq_s16(indices, mask));
            let bytes = vaddq_s16(vsliq_n_s16::<8>(twice, twice), vdupq_n_s16(0x0100));
            let bytes = vreinterpretq_u8_s8(vreinterpretq_s8_s16(bytes));
            vreinterpretq_s16_s8(look_up_bytes(self, entries.cast(), 2 << BITS, bytes))
        }
    }

    #[inline(always)]
    fn shift_right_i32<const BITS: u32>(self, vector: int32x4_t) -> int32x4_t {
        // SAFETY: `self` proves NEON.
        unsafe {
            // A negative distance shifts right.
            let right = vdupq_n_s32(-(BITS as i32));
            vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(vector), right))
        }
    }

    #[inline(always)]
    unsafe fn look_up_f32<const BITS: u32>(
        self,
        entries: *const f32,
        indices: int32x4_t,
    ) -> float32x4_t {
        // SAFETY: the caller vouches for 2^BITS entries, of which the masked indices
        // are some.
        unsafe {
            let mut numbers = [0i32; 4];
            self.store_i32(numbers.as_mut_ptr(), indices);
            let found =
                numbers.map(|i| *entries.add(i.cast_unsigned() as usize & ((1 << BITS) - 1)));
            self.load(found.as_ptr())
        }
    }

    #[inline(always)]
    fn prefetch(self, address: *const i16) {
        // SAFETY: a prefetch does not fault, and changes neither memory nor flags.
        unsafe {
            asm!(
                "prfm pldl1keep, [{}]",
                in(reg) address,
                options(nostack, readonly, preserves_flags)
            );
        }
    }

    #[inline(always)]
    unsafe fn load_i16(self, source: *const i16) -> int16x8_t {
        // SAFETY: `self` proves NEON; the caller vouches for 8 readable values.
        unsafe { vld1q_s16(source) }
    }

    #[inline(always)]
    unsafe fn store_i16(self, target: *mut i16, vector: int16x8_t) {
        // SAFETY: `self` proves NEON; the caller vouches for 8 writable values.
        unsafe { vst1q_s16(target, vector) }
    }
}

/// The numbers of 16 bytes from the given one on.
#[inline(always)]
fn bytes_from(_: Neon, first: usize) -> uint8x16_t {
    const NUMBERS: [u8; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
    // SAFETY: the token proves NEON; there are 16 numbers.
    unsafe { vaddq_u8(vld1q_u8(NUMBERS.as_ptr()), vdupq_n_u8(first as u8)) }
}

/// The same within a vector: behind its last byte comes its first.
#[inline(always)]
fn turned_bytes(simd: Neon, first: usize) -> uint8x16_t {
    // SAFETY: the token proves NEON.
    unsafe { vandq_u8(bytes_from(simd, first), vdupq_n_u8(15)) }
}

/// Every byte's entry of a table of 16, 32, 64 or 128 entries; indices are less.
///
/// # Safety
///
/// `table` is valid for reads of as many values.
#[inline(always)]
unsafe fn look_up_bytes(
    _: Neon,
    table: *const i8,
    entries: usize,
    indices: uint8x16_t,
) -> int8x16_t {
    // SAFETY: the token proves NEON; the caller vouches for the entries.
    unsafe {
        match entries {
            16 => vqtbl1q_s8(vld1q_s8(table), indices),
            32 => vqtbl2q_s8(vld1q_s8_x2(table), indices),
            64 => vqtbl4q_s8(vld1q_s8_x4(table), indices),
            _ => {
                // The first look-up gives 0 for indices beyond its table. To the second
                // one those of the first table are beyond, and what was found stays.
                let first: int8x16x4_t = vld1q_s8_x4(table);
                let second = vld1q_s8_x4(table.add(64));
                let found = vqtbl4q_s8(first, indices);
                vqtbx4q_s8(found, second, vsubq_u8(indices, vdupq_n_u8(64)))
            }
        }
    }
}
