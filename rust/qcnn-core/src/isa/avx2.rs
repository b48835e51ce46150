//! The AVX2 level.

use std::arch::x86_64::{
    __m256, _mm256_add_ps, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_set1_ps, _mm256_storeu_ps,
};

use super::{Simd, Task};

/// Token of the AVX2 level.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx2(());

impl Simd for Avx2 {
    const NAME: &'static str = "x86_64-avx2";
    const LANES: usize = 8;
    const REGISTERS: usize = 16;
    type F32 = __m256;

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
}
