//! The AVX-512 level.

use std::arch::x86_64::{
    __m512, _mm512_add_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_set1_ps, _mm512_storeu_ps,
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
}
