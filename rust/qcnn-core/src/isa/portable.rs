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
    type F32 = [f32; N];

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
}
