//! The portable level.

use super::{Simd, Task};

/// Token of the portable level: `LANES` values as an array, which the compiler
/// keeps in the baseline's vector registers.
///
/// Sessions use 4 lanes, the width SSE2 and NEON have. Tests use 16 to run the
/// tile logic of AVX-512 on CPUs without it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Portable<const LANES: usize>(());

impl<const N: usize> Simd for Portable<N> {
    const NAME: &'static str = "portable";
    const LANES: usize = N;
    const REGISTERS: usize = 16;
    const LOOK_UP_CYCLES: [f64; 3] = [12.0 * N as f64; 3];
    const BYTE_LOOK_UP_CYCLES: [f64; 3] = [12.0 * N as f64, 12.0 * N as f64, f64::INFINITY];
    const LOOK_UP_F32_CYCLES: [f64; 3] = [6.0 * N as f64; 3];
    const DOT_BYTES_CYCLES: f64 = 3.0;
    const COUNT_CYCLES: f64 = 4.5;
    const COUNTED_WORDS: usize = usize::MAX;
    type F32 = [f32; N];
    /// The lower and the upper half.
    type I16 = [[i16; N]; 2];
    type I32 = [i32; N];
    /// Four for each lane of 32 bits.
    type I8 = [[i8; 4]; N];

    /// Every CPU has this level.
    fn new() -> Option<Self> {
        Some(Self(()))
    }

    #[inline(always)]
    fn call<T: Task>(self, task: T) -> T::Output {
        task.run(self)
    }

    #[inline(always)]
    fn splat(self, value: f32) -> [f32; N] {
        [value; N]
    }

    #[inline(always)]
    fn add(self, a: [f32; N], b: [f32; N]) -> [f32; N] {
        std::array::from_fn(|i| a[i] + b[i])
    }

    #[inline(always)]
    fn mul(self, a: [f32; N], b: [f32; N]) -> [f32; N] {
        std::array::from_fn(|i| a[i] * b[i])
    }

    #[inline(always)]
    fn max(self, a: [f32; N], b: [f32; N]) -> [f32; N] {
        std::array::from_fn(|i| {
            if (b[i] > a[i]) | b[i].is_nan() {
                b[i]
            } else {
                a[i]
            }
        })
    }

    #[inline(always)]
    fn abs(self, a: [f32; N]) -> [f32; N] {
        a.map(f32::abs)
    }

    #[inline(always)]
    fn max_number(self, a: [f32; N], b: [f32; N]) -> [f32; N] {
        std::array::from_fn(|i| if b[i] > a[i] { b[i] } else { a[i] })
    }

    #[inline(always)]
    fn min(self, a: [f32; N], b: [f32; N]) -> [f32; N] {
        std::array::from_fn(|i| if b[i] < a[i] { b[i] } else { a[i] })
    }

    #[inline(always)]
    fn div(self, a: [f32; N], b: [f32; N]) -> [f32; N] {
        std::array::from_fn(|i| a[i] / b[i])
    }

    #[inline(always)]
    fn rsqrt_estimate(self, a: [f32; N]) -> [f32; N] {
        a.map(|x| 1.0 / x.sqrt())
    }

    #[inline(always)]
    fn even(self, a: [f32; N], b: [f32; N]) -> [f32; N] {
        std::array::from_fn(|i| if 2 * i < N { a[2 * i] } else { b[2 * i - N] })
    }

    #[inline(always)]
    fn odd(self, a: [f32; N], b: [f32; N]) -> [f32; N] {
        std::array::from_fn(|i| {
            let i = 2 * i + 1;
            if i < N { a[i] } else { b[i - N] }
        })
    }

    #[inline(always)]
    fn mul_add(self, a: [f32; N], b: [f32; N], c: [f32; N]) -> [f32; N] {
        // Not f32::mul_add, which is a library call where the baseline has no FMA.
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }

    #[inline(always)]
    unsafe fn load(self, source: *const f32) -> [f32; N] {
        // SAFETY: the caller vouches for N readable values.
        unsafe { source.cast::<[f32; N]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store(self, target: *mut f32, vector: [f32; N]) {
        // SAFETY: the caller vouches for N writable values.
        unsafe { target.cast::<[f32; N]>().write_unaligned(vector) }
    }

    #[inline(always)]
    unsafe fn load_part(self, source: *const f32, n: usize) -> [f32; N] {
        // SAFETY: the caller vouches for n readable values.
        let values = unsafe { std::slice::from_raw_parts(source, n) };
        let mut vector = [0.0; N];
        for (lane, value) in vector.iter_mut().zip(values) {
            *lane = *value;
        }
        vector
    }

    #[inline(always)]
    unsafe fn store_part(self, target: *mut f32, vector: [f32; N], n: usize) {
        // SAFETY: the caller vouches for n writable values.
        let values = unsafe { std::slice::from_raw_parts_mut(target, n) };
        for (value, lane) in values.iter_mut().zip(vector) {
            *value = lane;
        }
    }

    #[inline(always)]
    unsafe fn load_range(self, source: *const f32, begin: usize, end: usize) -> [f32; N] {
        std::array::from_fn(|i| {
            if (begin..end).contains(&i) {
                // SAFETY: the caller vouches for the values of the range.
                unsafe { source.wrapping_add(i).read() }
            } else {
                0.0
            }
        })
    }

    #[inline(always)]
    unsafe fn store_range(self, target: *mut f32, vector: [f32; N], begin: usize, end: usize) {
        for (i, lane) in vector.iter().enumerate().take(end).skip(begin) {
            // SAFETY: the caller vouches for the values of the range.
            unsafe { target.wrapping_add(i).write(*lane) };
        }
    }

    #[inline(always)]
    fn shift(self, vector: [f32; N], distance: usize) -> [f32; N] {
        std::array::from_fn(|i| vector[(i + distance) % N])
    }

    #[inline(always)]
    fn shift_pair(self, pair: [[f32; N]; 2], distance: usize) -> [f32; N] {
        std::array::from_fn(|i| pair[(i + distance) / N][(i + distance) % N])
    }

    #[inline(always)]
    fn zero_i16(self) -> [[i16; N]; 2] {
        [[0; N]; 2]
    }

    #[inline(always)]
    fn add_i16(self, a: [[i16; N]; 2], b: [[i16; N]; 2]) -> [[i16; N]; 2] {
        std::array::from_fn(|half| std::array::from_fn(|i| a[half][i].wrapping_add(b[half][i])))
    }

    #[inline(always)]
    fn round_i16(self, low: [f32; N], high: [f32; N]) -> [[i16; N]; 2] {
        // Added to this number, a value keeps its integer part in the lowest
        // bits: rounding without a library call.
        const MAGIC: f32 = 12_582_912.0;
        [low, high].map(|half| half.map(|x| (x + MAGIC).to_bits() as i16))
    }

    #[inline(always)]
    fn round_zip_i16(self, even: [f32; N], odd: [f32; N]) -> [[i16; N]; 2] {
        let [even, odd] = self.round_i16(even, odd);
        std::array::from_fn(|half| {
            std::array::from_fn(|i| {
                let lane = half * N + i;
                [even, odd][lane % 2][lane / 2]
            })
        })
    }

    #[inline(always)]
    fn widen_i16(self, vector: [[i16; N]; 2]) -> [[f32; N]; 2] {
        vector.map(|half| half.map(f32::from))
    }

    #[inline(always)]
    fn zip_i16(self, a: [[i16; N]; 2], b: [[i16; N]; 2]) -> [[[i16; N]; 2]; 2] {
        let (a, b) = (a.as_flattened(), b.as_flattened());
        std::array::from_fn(|odd| {
            std::array::from_fn(|half| {
                std::array::from_fn(|i| {
                    let lane = half * N + i;
                    [a, b][lane % 2][lane / 2 * 2 + odd]
                })
            })
        })
    }

    #[inline(always)]
    fn splat_pair(self, pair: i32) -> [[i16; N]; 2] {
        let lanes = [pair as i16, (pair >> 16) as i16];
        std::array::from_fn(|half| std::array::from_fn(|i| lanes[(half * N + i) % 2]))
    }

    #[inline(always)]
    fn splat_i32(self, value: i32) -> [i32; N] {
        [value; N]
    }

    #[inline(always)]
    unsafe fn load_i32(self, source: *const i32) -> [i32; N] {
        // SAFETY: the caller vouches for N readable values.
        unsafe { source.cast::<[i32; N]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store_i32(self, target: *mut i32, vector: [i32; N]) {
        // SAFETY: the caller vouches for N writable values.
        unsafe { target.cast::<[i32; N]>().write_unaligned(vector) }
    }

    #[inline(always)]
    fn dot_i16(self, a: [[i16; N]; 2], b: [[i16; N]; 2], c: [i32; N]) -> [i32; N] {
        let (a, b) = (a.as_flattened(), b.as_flattened());
        let product = |i: usize| i32::from(a[i]) * i32::from(b[i]);
        std::array::from_fn(|i| c[i].wrapping_add(product(2 * i).wrapping_add(product(2 * i + 1))))
    }

    #[inline(always)]
    fn upper_halves(self, even: [i32; N], odd: [i32; N]) -> [[i16; N]; 2] {
        std::array::from_fn(|half| {
            std::array::from_fn(|i| {
                let lane = half * N + i;
                ([even, odd][lane % 2][lane / 2] >> 16) as i16
            })
        })
    }

    #[inline(always)]
    fn shifted_halves(
        self,
        even: [i32; N],
        right: [i32; N],
        odd: [i32; N],
        left: [i32; N],
    ) -> [[i16; N]; 2] {
        std::array::from_fn(|half| {
            std::array::from_fn(|i| {
                let lane = half * N + i;
                let i = lane / 2;
                if lane.is_multiple_of(2) {
                    (even[i] >> right[i]) as i16
                } else {
                    ((odd[i] << left[i]) >> 16) as i16
                }
            })
        })
    }

    #[inline(always)]
    fn join_bytes(self, low: [[i16; N]; 2], high: [[i16; N]; 2]) -> [[i16; N]; 2] {
        std::array::from_fn(|half| {
            std::array::from_fn(|i| low[half][i].wrapping_add(high[half][i] << 8))
        })
    }

    #[inline(always)]
    fn dot_bytes(self, a: [[i16; N]; 2], weights: i32, c: [i32; N]) -> [i32; N] {
        let a = a.as_flattened();
        let weights = weights.to_le_bytes().map(u8::cast_signed);
        std::array::from_fn(|i| {
            let [low, high] = [a[2 * i].to_le_bytes(), a[2 * i + 1].to_le_bytes()];
            let bytes = [low[0], low[1], high[0], high[1]].into_iter().zip(weights);
            let products = bytes.map(|(a, weight)| i32::from(a) * i32::from(weight));
            products.fold(c[i], i32::wrapping_add)
        })
    }

    #[inline(always)]
    fn interleave_i32(self, even: [i32; N], odd: [i32; N]) -> [[f32; N]; 2] {
        std::array::from_fn(|half| {
            std::array::from_fn(|i| {
                let lane = half * N + i;
                [even, odd][lane % 2][lane / 2] as f32
            })
        })
    }

    #[inline(always)]
    fn float_i32(self, vector: [i32; N]) -> [f32; N] {
        vector.map(|x| x as f32)
    }

    #[inline(always)]
    fn pack_i8(self, vectors: [[i32; N]; 4]) -> [[i8; 4]; N] {
        let lanes = vectors.as_flattened();
        std::array::from_fn(|i| std::array::from_fn(|j| (lanes[4 * i + j] >> 23) as i8))
    }

    #[inline(always)]
    unsafe fn look_up_i8<const ENTRIES: usize>(
        self,
        tables: *const i8,
        indices: [[i8; 4]; N],
    ) -> [[i8; 4]; N] {
        indices.map(|indices| {
            std::array::from_fn(|j| {
                let entry = usize::from(indices[j].cast_unsigned()) % ENTRIES;
                // SAFETY: j < 4 and entry < ENTRIES.
                unsafe { *tables.add(j * ENTRIES + entry) }
            })
        })
    }

    #[inline(always)]
    fn add_i8(self, a: [[i8; 4]; N], b: [[i8; 4]; N]) -> [[i8; 4]; N] {
        std::array::from_fn(|i| std::array::from_fn(|j| a[i][j].wrapping_add(b[i][j])))
    }

    #[inline(always)]
    fn dot_i8(self, weights: u32, a: [[i8; 4]; N], c: [i32; N]) -> [i32; N] {
        let weights = weights.to_le_bytes();
        std::array::from_fn(|i| {
            let products = a[i].iter().zip(weights);
            let products = products.map(|(a, weight)| i32::from(*a) * i32::from(weight));
            products.fold(c[i], i32::wrapping_add)
        })
    }

    #[inline(always)]
    fn count_differences(self, counts: [i32; N], a: [i32; N], b: [i32; N]) -> [i32; N] {
        std::array::from_fn(|i| counts[i] + (a[i] ^ b[i]).count_ones().cast_signed())
    }

    #[inline(always)]
    fn add_counts(self, total: [i32; N], counts: [i32; N]) -> [i32; N] {
        std::array::from_fn(|i| total[i].wrapping_add(counts[i]))
    }

    #[inline(always)]
    unsafe fn load_i8(self, source: *const i8) -> [[i8; 4]; N] {
        // SAFETY: the caller vouches for 4 * N readable values.
        unsafe { source.cast::<[[i8; 4]; N]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store_i8(self, target: *mut i8, vector: [[i8; 4]; N]) {
        // SAFETY: the caller vouches for 4 * N writable values.
        unsafe { target.cast::<[[i8; 4]; N]>().write_unaligned(vector) }
    }

    #[inline(always)]
    fn shift_i16(self, vector: [[i16; N]; 2], distance: usize) -> [[i16; N]; 2] {
        let lanes = vector.as_flattened();
        std::array::from_fn(|half| {
            std::array::from_fn(|i| lanes[(half * N + i + distance) % (2 * N)])
        })
    }

    #[inline(always)]
    fn shift_right_i16<const BITS: u32>(self, vector: [[i16; N]; 2]) -> [[i16; N]; 2] {
        std::array::from_fn(|half| {
            std::array::from_fn(|i| (vector[half][i].cast_unsigned() >> BITS).cast_signed())
        })
    }

    #[inline(always)]
    unsafe fn look_up_i16<const BITS: u32>(
        self,
        entries: *const i16,
        indices: [[i16; N]; 2],
    ) -> [[i16; N]; 2] {
        let mask = (1usize << BITS) - 1;
        // SAFETY: the index is below 2^BITS; the caller vouches for as many
        // entries.
        let entry = |index: i16| unsafe { *entries.add(usize::from(index.cast_unsigned()) & mask) };
        std::array::from_fn(|half| std::array::from_fn(|i| entry(indices[half][i])))
    }

    #[inline(always)]
    fn shift_right_i32<const BITS: u32>(self, vector: [i32; N]) -> [i32; N] {
        vector.map(|x| (x.cast_unsigned() >> BITS).cast_signed())
    }

    #[inline(always)]
    unsafe fn look_up_f32<const BITS: u32>(
        self,
        entries: *const f32,
        indices: [i32; N],
    ) -> [f32; N] {
        let mask = (1usize << BITS) - 1;
        // SAFETY: the index is below 2^BITS; the caller vouches for as many
        // entries.
        indices.map(|index| unsafe { *entries.add(index.cast_unsigned() as usize & mask) })
    }

    #[inline(always)]
    fn prefetch(self, _: *const i16) {}

    #[inline(always)]
    unsafe fn load_i16(self, source: *const i16) -> [[i16; N]; 2] {
        // SAFETY: the caller vouches for 2 * N readable values.
        unsafe { source.cast::<[[i16; N]; 2]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store_i16(self, target: *mut i16, vector: [[i16; N]; 2]) {
        // SAFETY: the caller vouches for 2 * N writable values.
        unsafe { target.cast::<[[i16; N]; 2]>().write_unaligned(vector) }
    }
}
