//! Instruction sets: names, detection and the vector primitives.
//!
//! # Choosing one
//!
//! [`Isa::detect`] takes the best level the CPU has. The environment variable
//! `QCNN_ISA` (the level's name) forces another one; a level that
//! is unknown or that the CPU lacks is an error, never a silent fallback.
//!
//! | level | needs | vector |
//! |---|---|---|
//! | `portable` | nothing | 4 lanes of plain Rust (SSE2 or NEON registers) |
//! | `neon` | Advanced SIMD of 64-bit ARM, little-endian | 4 lanes |
//! | `avx2` | AVX2, FMA | 8 lanes |
//! | `avx512` | AVX-512 F, BW, DQ, VL and `avx2`'s needs | 16 lanes |
//! | `avx512vnni` | also AVX-512 VNNI | 16 lanes |
//! | `avx512vbmi` | also AVX-512 VBMI and VPOPCNTDQ | 16 lanes |
//! | `avx512fp16` | also AVX-512 FP16 | 16 lanes |
//! | `avx512amx` | also AMX for bytes, on Linux | 16 lanes, and tiles |
//!
//! # How kernels are compiled
//!
//! Hot loops are written once, generic over `Simd`, each as a `Task`.
//! `Simd::call` runs a task inside a function that has the level's
//! `#[target_feature]`s, and because everything a task calls is
//! `#[inline(always)]`, the loop is compiled for that level: the primitives
//! become single instructions and plain loops are vectorised for it as well.
//! The only things that differ between levels are the primitives. What is not
//! hot stays outside of tasks: small functions keep their sums in registers.
//!
//! A level's token is a zero-size value that only its `Simd::new` can make,
//! after asking the CPU: holding one proves that its instructions may be
//! executed.

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(any(test, target_arch = "x86_64"))]
mod half;
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
mod neon;
mod portable;

use std::fmt;
use std::str::FromStr;

#[cfg(target_arch = "x86_64")]
use amx::Amx;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
pub(crate) use neon::Neon;
pub(crate) use portable::Portable;

use crate::error::{Error, Result};

/// Environment variable that forces a level.
pub const ISA_VARIABLE: &str = "QCNN_ISA";

/// An instruction-set level, from the lowest to the highest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Plain Rust for the target's baseline.
    Portable,
    /// NEON, which is Advanced SIMD, on 64-bit ARM.
    Neon,
    /// AVX2 and FMA.
    Avx2,
    /// AVX-512 F, BW, DQ and VL, with AVX2 and FMA.
    Avx512,
    /// The same and AVX-512 VNNI.
    Avx512Vnni,
    /// The same and AVX-512 VBMI and VPOPCNTDQ, which no CPU with VNNI has apart.
    Avx512Vbmi,
    /// The same and AVX-512 FP16.
    Avx512Fp16,
    /// The same and AMX for bytes, if the system lets the process use it.
    Avx512Amx,
}

impl Isa {
    const ALL: [Self; 8] = [
        Self::Portable,
        Self::Neon,
        Self::Avx2,
        Self::Avx512,
        Self::Avx512Vnni,
        Self::Avx512Vbmi,
        Self::Avx512Fp16,
        Self::Avx512Amx,
    ];

    /// The level's name in options, in `QCNN_ISA` and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Neon => "neon",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Vnni => "avx512vnni",
            Self::Avx512Vbmi => "avx512vbmi",
            Self::Avx512Fp16 => "avx512fp16",
            Self::Avx512Amx => "avx512amx",
        }
    }

    /// The levels this CPU has, from the lowest to the highest.
    pub fn available() -> Vec<Self> {
        Self::ALL
            .into_iter()
            .filter(|isa| isa.level().is_some())
            .collect()
    }

    /// The level `QCNN_ISA` names, or else the best one this CPU has. An empty
    /// variable counts as unset.
    pub fn detect() -> Result<Self> {
        match std::env::var_os(ISA_VARIABLE) {
            Some(name) if !name.is_empty() => name
                .to_string_lossy()
                .parse::<Self>()
                .and_then(Self::check_available)
                .map_err(|e| Error::Config(format!("environment variable {ISA_VARIABLE}: {e}"))),
            _ => Ok(Self::ALL
                .into_iter()
                .rfind(|isa| isa.level().is_some())
                .unwrap_or(Self::Portable)),
        }
    }

    /// `self`, or an error that says what the CPU has.
    pub fn check_available(self) -> Result<Self> {
        match self.level() {
            Some(_) => Ok(self),
            None => Err(Error::Config(format!(
                "isa is {:?}, which this CPU does not have; available are {}",
                self.name(),
                names(&Self::available())
            ))),
        }
    }

    /// The proof that this CPU has the level.
    pub(crate) fn level(self) -> Option<Level> {
        match self {
            Self::Portable => Portable::new().map(Level::Portable),
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            Self::Neon => Neon::new().map(Level::Neon),
            #[cfg(not(all(target_arch = "aarch64", target_endian = "little")))]
            Self::Neon => None,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => Avx2::new().map(Level::Avx2),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => Avx512::new().map(Level::Avx512),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni => Avx512::new().map(Level::Avx512Vnni),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vbmi => Avx512::new().map(Level::Avx512Vbmi),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Fp16 => Avx512::new().map(Level::Avx512Fp16),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Amx => Amx::new().map(Level::Avx512Amx),
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx2
            | Self::Avx512
            | Self::Avx512Vnni
            | Self::Avx512Vbmi
            | Self::Avx512Fp16
            | Self::Avx512Amx => None,
        }
    }
}

fn names(isas: &[Isa]) -> String {
    let names: Vec<_> = isas.iter().map(|isa| format!("{:?}", isa.name())).collect();
    names.join(", ")
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Isa {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL
            .into_iter()
            .find(|isa| isa.name() == name)
            .ok_or_else(|| {
                Error::Config(format!(
                    "isa is {name:?}, expected one of {} (available here: {})",
                    names(&Self::ALL),
                    names(&Self::available())
                ))
            })
    }
}

/// A level with its token: what sessions hold to run tasks.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Level {
    /// See [`Portable`].
    Portable(Portable<4>),
    /// See [`Neon`].
    #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
    Neon(Neon),
    /// See [`Avx2`].
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    /// See [`Avx512`].
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512<false, false, false>),
    /// See [`Avx512`].
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni(Avx512<true, false, false>),
    /// See [`Avx512`].
    #[cfg(target_arch = "x86_64")]
    Avx512Vbmi(Avx512<true, true, false>),
    /// See [`Avx512`].
    #[cfg(target_arch = "x86_64")]
    Avx512Fp16(Avx512<true, true, true>),
    /// See [`Amx`].
    #[cfg(target_arch = "x86_64")]
    Avx512Amx(Amx),
}

impl Level {
    /// Run `task` compiled for this level. The one place that dispatches.
    pub(crate) fn call<T: Task>(self, task: T) -> T::Output {
        match self {
            Self::Portable(simd) => simd.call(task),
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            Self::Neon(simd) => simd.call(task),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(simd) => simd.call(task),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(simd) => simd.call(task),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni(simd) => simd.call(task),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vbmi(simd) => simd.call(task),
            // Few tasks use 16-bit floats, and none tiles: their kernels hold the tokens.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Fp16(simd) => simd.vbmi().call(task),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Amx(amx) => amx.simd().call(task),
        }
    }
}

/// The most float32 lanes of any level.
pub(crate) const MAX_LANES: usize = 16;

/// The bytes of a vector, zeros behind them.
#[inline(always)]
fn bytes_of<S: Simd>(simd: S, vector: S::I8) -> [u8; 4 * MAX_LANES] {
    let mut bytes = [0u8; 4 * MAX_LANES];
    // SAFETY: there is room for a vector of the most lanes.
    unsafe { simd.store_i8(bytes.as_mut_ptr().cast(), vector) };
    bytes
}

/// `f` of every byte.
#[inline(always)]
fn map_bytes<S: Simd>(simd: S, vector: S::I8, f: impl Fn(u8) -> u8) -> S::I8 {
    let bytes = bytes_of(simd, vector).map(f);
    // SAFETY: there are at least as many bytes as a vector has.
    unsafe { simd.load_i8(bytes.as_ptr().cast()) }
}

/// [`Simd::look_up_64`] byte by byte.
///
/// # Safety
///
/// As there.
#[inline(always)]
unsafe fn look_up_each<S: Simd>(simd: S, table: *const i8, indices: S::I8) -> S::I8 {
    map_bytes(simd, indices, |index| {
        // SAFETY: as promised by the caller.
        unsafe { (*table.add(usize::from(index % 64))).cast_unsigned() }
    })
}

/// Work that is compiled once per level.
pub(crate) trait Task {
    /// What the work returns.
    type Output;

    /// Do it. Implementations are `#[inline(always)]`, see the module's
    /// documentation.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// The vector primitives of one level: `LANES` float32 values at a time.
pub(crate) trait Simd: Copy + fmt::Debug + Send + Sync + 'static {
    /// Prefix of kernel names.
    const NAME: &'static str;
    /// Values in a vector.
    const LANES: usize;
    /// Vectors the architecture's registers hold, which bounds the
    /// accumulators of a kernel.
    const REGISTERS: usize;
    /// Clock cycles that [`look_up_i16`](Self::look_up_i16) takes with 4, 5 and
    /// 6 bits, with the shift and the addition that go with it.
    const LOOK_UP_CYCLES: [f64; 3];
    /// Clock cycles that [`look_up_i8`](Self::look_up_i8) takes with 16 and with 32
    /// entries, and [`look_up_64`](Self::look_up_64), with its share of the sums that go
    /// with it.
    const BYTE_LOOK_UP_CYCLES: [f64; 3];
    /// Clock cycles that [`look_up_packed`](Self::look_up_packed) takes with 4, 5 and 6
    /// bits, with unpacking and adding.
    const PACKED_LOOK_UP_CYCLES: [f64; 3] = [24.0 * Self::LANES as f64; 3];
    /// The same for [`look_up_f32`](Self::look_up_f32).
    const LOOK_UP_F32_CYCLES: [f64; 3];
    /// Clock cycles that [`count_differences`](Self::count_differences) takes, with
    /// its share of the loads and of [`add_counts`](Self::add_counts).
    const COUNT_CYCLES: f64;
    /// Clock cycles that [`dot_bytes`](Self::dot_bytes) takes, as multiples of those of
    /// [`dot_i16`](Self::dot_i16).
    const DOT_BYTES_CYCLES: f64;
    /// How often [`count_differences`](Self::count_differences) may add to the same
    /// counts.
    const COUNTED_WORDS: usize;
    /// A vector.
    type F32: Copy + fmt::Debug;
    /// A vector of 16-bit integers, twice as many.
    type I16: Copy + fmt::Debug;
    /// A vector of 32-bit integers, as many as float32 values.
    type I32: Copy + fmt::Debug;
    /// A vector of 8-bit integers, four times as many.
    type I8: Copy + fmt::Debug;

    /// The token, if the CPU has the level.
    fn new() -> Option<Self>;

    /// Run `task` in a function compiled for this level.
    fn call<T: Task>(self, task: T) -> T::Output;

    /// Every lane `value`.
    fn splat(self, value: f32) -> Self::F32;

    /// `a + b`
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32;

    /// `a * b`
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32;

    /// The greater of each pair of lanes, or NaN if either is NaN.
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32;

    /// As [`max`](Self::max), but either of them if one is NaN.
    fn max_number(self, a: Self::F32, b: Self::F32) -> Self::F32;

    /// The magnitude of every lane.
    fn abs(self, a: Self::F32) -> Self::F32;

    /// The smaller of each pair of lanes, any of them if either is NaN.
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32;

    /// `a / b`
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32;

    /// `1 / sqrt(a)` to a relative error of 2^-11 for positive normal numbers,
    /// anything for others.
    fn rsqrt_estimate(self, a: Self::F32) -> Self::F32;

    /// Lanes 0, 2, 4, … of `a`, then those of `b`.
    fn even(self, a: Self::F32, b: Self::F32) -> Self::F32;

    /// Lanes 1, 3, 5, … of `a`, then those of `b`.
    fn odd(self, a: Self::F32, b: Self::F32) -> Self::F32;

    /// `a * b + c`, rounded once where the level can.
    fn mul_add(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32;

    /// The `LANES` values at `source`, which needs no alignment.
    ///
    /// # Safety
    ///
    /// `source` is valid for reads of `LANES` values.
    unsafe fn load(self, source: *const f32) -> Self::F32;

    /// Write the `LANES` values to `target`, which needs no alignment.
    ///
    /// # Safety
    ///
    /// `target` is valid for writes of `LANES` values.
    unsafe fn store(self, target: *mut f32, vector: Self::F32);

    /// The `n` values at `source` in the first lanes, zeros in the others;
    /// `n` is at most `LANES`.
    ///
    /// # Safety
    ///
    /// `source` is valid for reads of `n` values.
    unsafe fn load_part(self, source: *const f32, n: usize) -> Self::F32;

    /// Write the first `n` lanes to `target`; `n` is at most `LANES`.
    ///
    /// # Safety
    ///
    /// `target` is valid for writes of `n` values.
    unsafe fn store_part(self, target: *mut f32, vector: Self::F32, n: usize);

    /// The values at `source` in lanes `begin` to `end`, lane i being value i;
    /// zeros in the others.
    ///
    /// # Safety
    ///
    /// `begin <= end <= LANES`, and values `begin` to `end` are valid for reads.
    /// Nothing else need be, not even `source`.
    unsafe fn load_range(self, source: *const f32, begin: usize, end: usize) -> Self::F32;

    /// The inverse of [`load_range`](Self::load_range): write lanes `begin` to
    /// `end`.
    ///
    /// # Safety
    ///
    /// `begin <= end <= LANES`, and values `begin` to `end` are valid for writes.
    /// Nothing else need be, not even `target`.
    unsafe fn store_range(self, target: *mut f32, vector: Self::F32, begin: usize, end: usize);

    /// Lane `i` becomes lane `i + distance`; the last `distance` lanes become
    /// any of the others.
    fn shift(self, vector: Self::F32, distance: usize) -> Self::F32;

    /// Lanes `distance` and following of two vectors; `distance` is less than `LANES`.
    fn shift_pair(self, pair: [Self::F32; 2], distance: usize) -> Self::F32;

    /// The first `LANES` values of a slice, zeros where it is shorter.
    #[inline(always)]
    fn load_first(self, values: &[f32]) -> Self::F32 {
        // SAFETY: the slice holds as many values as are read.
        unsafe {
            if values.len() >= Self::LANES {
                self.load(values.as_ptr())
            } else {
                self.load_part(values.as_ptr(), values.len())
            }
        }
    }

    /// Write as many lanes to the start of a slice as it has room for.
    #[inline(always)]
    fn store_first(self, values: &mut [f32], vector: Self::F32) {
        // SAFETY: the slice holds as many values as are written.
        unsafe {
            if values.len() >= Self::LANES {
                self.store(values.as_mut_ptr(), vector);
            } else {
                self.store_part(values.as_mut_ptr(), vector, values.len());
            }
        }
    }

    /// Every lane 0.
    fn zero_i16(self) -> Self::I16;

    /// `a + b`, modulo 2^16.
    fn add_i16(self, a: Self::I16, b: Self::I16) -> Self::I16;

    /// The values of `low`, then those of `high`, rounded to nearest. Values
    /// beyond the range of the result, and NaN, give any number.
    fn round_i16(self, low: Self::F32, high: Self::F32) -> Self::I16;

    /// The values of `even` and `odd` in turns, rounded to nearest. Values beyond
    /// the range of the result, and NaN, give any number.
    fn round_zip_i16(self, even: Self::F32, odd: Self::F32) -> Self::I16;

    /// The inverse of [`round_i16`](Self::round_i16).
    fn widen_i16(self, vector: Self::I16) -> [Self::F32; 2];

    /// The values of `low`, then those of `high`, rounded to 16-bit floats.
    #[cfg(any(test, target_arch = "x86_64"))]
    #[inline(always)]
    fn narrow_f16(self, low: Self::F32, high: Self::F32) -> Self::I16 {
        half::narrow(self, low, high)
    }

    /// The inverse of [`narrow_f16`](Self::narrow_f16).
    #[cfg(any(test, target_arch = "x86_64"))]
    #[inline(always)]
    fn widen_f16(self, vector: Self::I16) -> [Self::F32; 2] {
        half::widen(self, vector)
    }

    /// `a + b` of 16-bit floats.
    #[cfg(any(test, target_arch = "x86_64"))]
    #[inline(always)]
    fn add_f16(self, a: Self::I16, b: Self::I16) -> Self::I16 {
        half::add(self, a, b)
    }

    /// `a * b + c` of 16-bit floats, rounded once.
    #[cfg(any(test, target_arch = "x86_64"))]
    #[inline(always)]
    fn mul_add_f16(self, a: Self::I16, b: Self::I16, c: Self::I16) -> Self::I16 {
        half::mul_add(self, a, b, c)
    }

    /// Pairs of the lanes of `a` and `b`, those of even lanes and those of odd
    /// lanes: `a[0] b[0] a[2] b[2] ...` and `a[1] b[1] a[3] b[3] ...`.
    fn zip_i16(self, a: Self::I16, b: Self::I16) -> [Self::I16; 2];

    /// Every pair of lanes `pair`, the lower lane in the lower bits.
    fn splat_pair(self, pair: i32) -> Self::I16;

    /// Every lane `value`.
    fn splat_i32(self, value: i32) -> Self::I32;

    /// The `LANES` integers at `source`, which needs no alignment.
    ///
    /// # Safety
    ///
    /// `source` is valid for reads of `LANES` integers.
    unsafe fn load_i32(self, source: *const i32) -> Self::I32;

    /// Write the `LANES` integers to `target`, which needs no alignment.
    ///
    /// # Safety
    ///
    /// `target` is valid for writes of `LANES` integers.
    unsafe fn store_i32(self, target: *mut i32, vector: Self::I32);

    /// `c + a[2i] * b[2i] + a[2i + 1] * b[2i + 1]`, modulo 2^32.
    fn dot_i16(self, a: Self::I16, b: Self::I16, c: Self::I32) -> Self::I32;

    /// The upper halves of each value, those of `even` in even lanes.
    fn upper_halves(self, even: Self::I32, odd: Self::I32) -> Self::I16;

    /// The lower halves of each value of `even` shifted right by `right` in even lanes,
    /// the upper halves of each value of `odd` shifted left by `left` in odd lanes; both
    /// distances are in 0..=16.
    fn shifted_halves(
        self,
        even: Self::I32,
        right: Self::I32,
        odd: Self::I32,
        left: Self::I32,
    ) -> Self::I16;

    /// `low + 2^8 * high`, modulo 2^16.
    fn join_bytes(self, low: Self::I16, high: Self::I16) -> Self::I16;

    /// `c[i] + sum over j < 4 of a[4 * i + j] * weights[j]`, modulo 2^32, where the bytes
    /// of `a`, the lower of each lane first, have no sign, and those of `weights` have.
    fn dot_bytes(self, a: Self::I16, weights: i32, c: Self::I32) -> Self::I32;

    /// As float32, in turns from `even` and `odd`.
    fn interleave_i32(self, even: Self::I32, odd: Self::I32) -> [Self::F32; 2];

    /// As float32.
    fn float_i32(self, vector: Self::I32) -> Self::F32;

    /// Bits 23 to 30 of the lanes of four vectors, one after the other, whose
    /// bit 31 is the same as bit 30.
    fn pack_i8(self, vectors: [Self::I32; 4]) -> Self::I8;

    /// Every lane's entry of a table: lane `i` uses table `i % 4` of four tables,
    /// one behind the other, with `ENTRIES` entries each, 16 or 32. Indices count
    /// from the first entry of the first table.
    ///
    /// # Safety
    ///
    /// `tables` is valid for reads of `4 * ENTRIES` values.
    unsafe fn look_up_i8<const ENTRIES: usize>(
        self,
        tables: *const i8,
        indices: Self::I8,
    ) -> Self::I8;

    /// Every byte's entry of a table of 64, whose number its lowest 6 bits are.
    ///
    /// # Safety
    ///
    /// `table` is valid for reads of 64 values.
    #[inline(always)]
    unsafe fn look_up_64(self, table: *const i8, indices: Self::I8) -> Self::I8 {
        // SAFETY: as promised by the caller.
        unsafe { look_up_each(self, table, indices) }
    }

    /// `a` and `b` with those bytes exchanged whose number has the bit `BIT`.
    #[inline(always)]
    fn exchange_i8<const BIT: usize>(self, a: Self::I8, b: Self::I8) -> [Self::I8; 2] {
        let bytes = [a, b].map(|vector| bytes_of(self, vector));
        std::array::from_fn(|other| {
            let exchanged: [u8; 4 * MAX_LANES] =
                std::array::from_fn(|i| bytes[other ^ usize::from(i & BIT != 0)][i]);
            // SAFETY: there are at least as many bytes as a vector has.
            unsafe { self.load_i8(exchanged.as_ptr().cast()) }
        })
    }

    /// Bits `4 * i` to `4 * i + 3` of every byte, `i` being 0 or 1.
    #[inline(always)]
    fn half_bytes(self, packed: Self::I8, i: usize) -> Self::I8 {
        map_bytes(self, packed, |byte| byte >> (4 * i) & 15)
    }

    /// Bit `i` of every byte becomes its highest; the others become anything.
    #[inline(always)]
    fn raise_bits(self, packed: Self::I8, i: usize) -> Self::I8 {
        map_bytes(self, packed, |byte| byte << (7 - i))
    }

    /// Every byte's entry of a table, whose number has 4 to 6 bits: `low`, at most 15, and
    /// above it the highest bits of each `high`, as far as there are so many.
    ///
    /// # Safety
    ///
    /// `table` is valid for reads of `2^BITS` values.
    #[inline(always)]
    unsafe fn look_up_packed<const BITS: u32>(
        self,
        table: *const u8,
        low: Self::I8,
        high: [Self::I8; 2],
    ) -> Self::I8 {
        let [mut numbers, fours, fives] = [low, high[0], high[1]].map(|v| bytes_of(self, v));
        for i in 0..4 * Self::LANES {
            let upper = usize::from(fours[i] >> 7) << 4 | usize::from(fives[i] >> 7) << 5;
            let number = (usize::from(numbers[i]) | upper) & ((1 << BITS) - 1);
            // SAFETY: as promised by the caller.
            numbers[i] = unsafe { *table.add(number) };
        }
        // SAFETY: there are at least as many bytes as a vector has.
        unsafe { self.load_i8(numbers.as_ptr().cast()) }
    }

    /// Add bytes from 0 to 255, those of even positions to the first sums, modulo 2^16.
    #[inline(always)]
    fn add_bytes(self, sums: [Self::I16; 2], bytes: Self::I8) -> [Self::I16; 2] {
        let bytes = bytes_of(self, bytes);
        std::array::from_fn(|odd| {
            let widened: [i16; 2 * MAX_LANES] = std::array::from_fn(|i| bytes[2 * i + odd].into());
            // SAFETY: there are at least as many numbers as a vector has.
            self.add_i16(sums[odd], unsafe { self.load_i16(widened.as_ptr()) })
        })
    }

    /// `a + b`, modulo 2^8.
    fn add_i8(self, a: Self::I8, b: Self::I8) -> Self::I8;

    /// `c[i] + sum over j < 4 of weights[j] * a[4 * i + j]`, where byte `j` of
    /// `weights`, from the lowest, is in 0..=127 and `a` not -128.
    fn dot_i8(self, weights: u32, a: Self::I8, c: Self::I32) -> Self::I32;

    /// Add the numbers of bits that differ between the lanes of `a` and `b` to
    /// `counts`, which start at 0.
    fn count_differences(self, counts: Self::I32, a: Self::I32, b: Self::I32) -> Self::I32;

    /// Add what [`count_differences`](Self::count_differences) counted in each lane to
    /// `total`.
    fn add_counts(self, total: Self::I32, counts: Self::I32) -> Self::I32;

    /// The `4 * LANES` values at `source`, which needs no alignment.
    ///
    /// # Safety
    ///
    /// `source` is valid for reads of `4 * LANES` values.
    unsafe fn load_i8(self, source: *const i8) -> Self::I8;

    /// Write the `4 * LANES` values to `target`, which needs no alignment.
    ///
    /// # Safety
    ///
    /// `target` is valid for writes of `4 * LANES` values.
    unsafe fn store_i8(self, target: *mut i8, vector: Self::I8);

    /// Transpose a block: value `j` of row `i` of the target is value `i` of row
    /// `j` of the source, for `rows` and `columns` of the target, both at most
    /// `LANES`.
    ///
    /// # Safety
    ///
    /// `source` is valid for reads of `LANES` rows of `LANES` values at distance
    /// `source_stride`, `target` for writes of `rows` rows of `columns` values at
    /// distance `target_stride`.
    #[inline(always)]
    unsafe fn transpose(
        self,
        source: *const f32,
        source_stride: usize,
        target: *mut f32,
        target_stride: usize,
        [rows, columns]: [usize; 2],
    ) {
        for i in 0..rows {
            for j in 0..columns {
                // SAFETY: i < rows <= LANES and j < columns <= LANES.
                unsafe {
                    *target.add(i * target_stride + j) = *source.add(j * source_stride + i);
                }
            }
        }
    }

    /// Lane `i` becomes lane `i + distance`; the last `distance` lanes become
    /// any of the others.
    fn shift_i16(self, vector: Self::I16, distance: usize) -> Self::I16;

    /// Every lane shifted right by `BITS`, 1 to 15, zeros behind.
    fn shift_right_i16<const BITS: u32>(self, vector: Self::I16) -> Self::I16;

    /// Every lane's entry of a table: of the lane, only the lowest `BITS` bits
    /// count, 4 to 6. The fewest entries are 32: of 4 bits, 16 come twice.
    ///
    /// # Safety
    ///
    /// `entries` is valid for reads of 32 values, or of 64 for 6 bits.
    unsafe fn look_up_i16<const BITS: u32>(
        self,
        entries: *const i16,
        indices: Self::I16,
    ) -> Self::I16;

    /// Every lane shifted right by `BITS`, 1 to 31, zeros behind.
    fn shift_right_i32<const BITS: u32>(self, vector: Self::I32) -> Self::I32;

    /// Every lane's entry of a table of `2^BITS`: of the lane, only the lowest
    /// `BITS` bits count, 4 to 6.
    ///
    /// # Safety
    ///
    /// `entries` is valid for reads of `2^BITS` values.
    unsafe fn look_up_f32<const BITS: u32>(
        self,
        entries: *const f32,
        indices: Self::I32,
    ) -> Self::F32;

    /// Bring the cache line at `address`, which may be any, closer.
    fn prefetch(self, address: *const i16);

    /// The `2 * LANES` values at `source`, which needs no alignment.
    ///
    /// # Safety
    ///
    /// `source` is valid for reads of `2 * LANES` values.
    unsafe fn load_i16(self, source: *const i16) -> Self::I16;

    /// Write the `2 * LANES` values to `target`, which needs no alignment.
    ///
    /// # Safety
    ///
    /// `target` is valid for writes of `2 * LANES` values.
    unsafe fn store_i16(self, target: *mut i16, vector: Self::I16);
}

#[cfg(test)]
mod tests {
    use ::half::f16;

    use super::*;

    #[test]
    fn names_round_trip() {
        for isa in Isa::ALL {
            assert_eq!(isa.name().parse::<Isa>().unwrap(), isa);
        }
        let message = "sse9".parse::<Isa>().unwrap_err().to_string();
        assert!(
            message.contains("sse9") && message.contains("\"portable\""),
            "{message}"
        );
    }

    #[test]
    fn portable_is_always_available() {
        assert_eq!(Isa::available()[0], Isa::Portable);
    }

    #[test]
    fn an_absent_level_is_an_error() {
        for isa in Isa::ALL {
            assert_eq!(
                isa.check_available().is_ok(),
                Isa::available().contains(&isa)
            );
        }
    }

    /// All primitives of every level against plain arithmetic on small
    /// integers, which no rounding disturbs.
    struct CheckPrimitives;

    impl Task for CheckPrimitives {
        type Output = ();

        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            let source: Vec<f32> = (0..=S::LANES).map(|i| i as f32).collect();
            let mut target = vec![-1.0f32; S::LANES + 2];
            // SAFETY: both buffers hold LANES values beyond element 1.
            unsafe {
                let v = s.load(source.as_ptr().add(1));
                let v = s.add(s.mul_add(v, s.splat(3.0), s.splat(-2.0)), v);
                s.store(target.as_mut_ptr().add(1), v);
            }
            let mut expected: Vec<f32> = (1..=S::LANES).map(|i| 4.0 * i as f32 - 2.0).collect();
            expected.insert(0, -1.0);
            expected.push(-1.0);
            assert_eq!(target, expected, "{}", S::NAME);

            check_floats(s);
            check_bytes(s);

            let lanes = 2 * S::LANES;
            let halves: Vec<f32> = (0..lanes).map(|i| i as f32 * 0.75 - 3.0).collect();
            let mut words = vec![7i16; lanes + 2];
            // SAFETY: `halves` holds two vectors, `words` one beyond element 1.
            let widened = unsafe {
                let rounded = s.round_i16(
                    s.load(halves.as_ptr()),
                    s.load(halves.as_ptr().add(S::LANES)),
                );
                s.store_i16(words.as_mut_ptr().add(1), rounded);
                let loaded = s.load_i16(words.as_ptr().add(1));
                s.widen_i16(s.add_i16(s.add_i16(loaded, s.zero_i16()), loaded))
            };
            let mut expected: Vec<i16> =
                halves.iter().map(|x| x.round_ties_even() as i16).collect();
            let mut doubled = vec![0.0f32; lanes];
            for (vector, target) in widened.into_iter().zip(doubled.chunks_exact_mut(S::LANES)) {
                // SAFETY: the chunk holds one vector.
                unsafe { s.store(target.as_mut_ptr(), vector) };
            }
            let twice: Vec<f32> = expected.iter().map(|x| f32::from(2 * x)).collect();
            assert_eq!(doubled, twice, "{}", S::NAME);
            check_look_up::<S, 4>(s);
            check_look_up::<S, 5>(s);
            check_look_up::<S, 6>(s);
            check_look_up_f32::<S, 4>(s);
            check_look_up_f32::<S, 5>(s);
            check_look_up_f32::<S, 6>(s);
            for distance in 0..lanes {
                let mut shifted = vec![0i16; lanes];
                // SAFETY: both buffers hold a vector where they are used.
                unsafe {
                    let vector = s.load_i16(words.as_ptr().add(1));
                    s.store_i16(shifted.as_mut_ptr(), s.shift_i16(vector, distance));
                }
                let kept = lanes - distance;
                assert_eq!(
                    shifted[..kept],
                    expected[distance..],
                    "{} {distance}",
                    S::NAME
                );
            }
            expected.insert(0, 7);
            expected.push(7);
            assert_eq!(words, expected, "{}", S::NAME);

            let a: Vec<i16> = (0..lanes).map(|i| 1000 * i as i16 - 15_000).collect();
            let b: Vec<i16> = (0..lanes).map(|i| 77 - 501 * i as i16).collect();
            let pair = 3 | (-2 << 16);
            let mut products = vec![0i16; lanes];
            let mut floats = vec![0f32; lanes];
            // SAFETY: all buffers hold a vector of 16-bit lanes, `floats` two.
            unsafe {
                let [even, odd] = s.zip_i16(s.load_i16(a.as_ptr()), s.load_i16(b.as_ptr()));
                let even = s.dot_i16(even, s.splat_pair(pair), s.splat_i32(1 << 15));
                let odd = s.dot_i16(odd, s.splat_pair(pair), s.splat_i32(1 << 15));
                s.store_i16(products.as_mut_ptr(), s.upper_halves(even, odd));
                let [low, high] = s.interleave_i32(even, odd);
                s.store(floats.as_mut_ptr(), low);
                s.store(floats.as_mut_ptr().add(S::LANES), high);
            }
            // SAFETY: both buffers hold LANES integers beyond element 1.
            unsafe {
                let source: Vec<i32> = (0..=S::LANES as i32).map(|i| i * 70_000).collect();
                let mut target = vec![-1; S::LANES + 2];
                s.store_i32(
                    target.as_mut_ptr().add(1),
                    s.load_i32(source.as_ptr().add(1)),
                );
                assert_eq!(target[1..=S::LANES], source[1..], "{}", S::NAME);
                assert_eq!([target[0], target[S::LANES + 1]], [-1; 2], "{}", S::NAME);
            }
            for i in 0..lanes {
                let sum = 3 * i32::from(a[i]) - 2 * i32::from(b[i]) + (1 << 15);
                assert_eq!(i32::from(products[i]), sum >> 16, "{} {i}", S::NAME);
                assert_eq!(floats[i] as i32, sum, "{} {i}", S::NAME);
            }
        }
    }

    /// The primitives for 8-bit tables.
    #[inline(always)]
    fn check_bytes<S: Simd>(s: S) {
        let n = 4 * S::LANES;
        let a: Vec<i8> = (0..n).map(|i| (i * 37 % 255) as i8).collect();
        let b: Vec<i8> = (0..n).map(|i| (i * 91 % 255) as i8).collect();
        let weights = [127, 0, 1, 100];
        let mut bytes = vec![0i8; n];
        let mut sums = vec![0.0f32; S::LANES];
        // SAFETY: all buffers hold one vector.
        unsafe {
            let [a, b] = [s.load_i8(a.as_ptr()), s.load_i8(b.as_ptr())];
            s.store_i8(bytes.as_mut_ptr(), s.add_i8(a, b));
            let total = s.dot_i8(u32::from_le_bytes(weights), a, s.splat_i32(-7));
            s.store(sums.as_mut_ptr(), s.float_i32(total));
        }
        let added: Vec<i8> = a.iter().zip(&b).map(|(a, b)| a.wrapping_add(*b)).collect();
        assert_eq!(bytes, added, "{}", S::NAME);
        for (sum, a) in sums.iter().zip(a.chunks_exact(4)) {
            let products = a.iter().zip(weights);
            let total: i32 = products.map(|(a, w)| i32::from(*a) * i32::from(w)).sum();
            assert_eq!(*sum as i32, total - 7, "{}", S::NAME);
        }

        // 2 * 2^8 * 2^14 times the byte.
        let factors: Vec<i16> = a.iter().flat_map(|a| [i16::from(*a) << 8; 2]).collect();
        // SAFETY: there are two factors for each of the lanes of four vectors.
        unsafe {
            let mut vectors = [s.splat_i32(0x7f_ffff); 4];
            for (i, vector) in vectors.iter_mut().enumerate() {
                let factors = s.load_i16(factors.as_ptr().add(i * 2 * S::LANES));
                *vector = s.dot_i16(factors, s.splat_pair(0x4000_4000), *vector);
            }
            s.store_i8(bytes.as_mut_ptr(), s.pack_i8(vectors));
        }
        assert_eq!(bytes, a, "{}", S::NAME);

        check_counts(s);
        check_unsigned_bytes(s);

        check_byte_look_up::<S, 16>(s);
        check_byte_look_up::<S, 32>(s);
        check_look_up_64(s);
        check_exchange::<S, 1>(s);
        check_exchange::<S, 2>(s);
        check_packed_look_up::<S, 4>(s);
        check_packed_look_up::<S, 5>(s);
        check_packed_look_up::<S, 6>(s);

        let source: Vec<f32> = (0..S::LANES * (S::LANES + 1)).map(|i| i as f32).collect();
        for [rows, columns] in [[S::LANES; 2], [1, S::LANES], [S::LANES, 3], [2, 1]] {
            let mut target = vec![-1.0; rows * (S::LANES + 2)];
            // SAFETY: the source has LANES rows at distance LANES + 1, the target
            // `rows` at distance LANES + 2.
            unsafe {
                let extent = [rows, columns];
                let strides = [S::LANES + 1, S::LANES + 2];
                let (source, target) = (source.as_ptr(), target.as_mut_ptr());
                s.transpose(source, strides[0], target, strides[1], extent);
            }
            for (i, row) in target.chunks_exact(S::LANES + 2).enumerate() {
                for (j, value) in row.iter().enumerate() {
                    let expected = if j < columns {
                        (j * (S::LANES + 1) + i) as i32
                    } else {
                        -1
                    };
                    assert_eq!(*value as i32, expected, "{} {rows} {columns}", S::NAME);
                }
            }
        }
    }

    /// The primitives for products of 8-bit integers, at the greatest, too.
    #[inline(always)]
    fn check_unsigned_bytes<S: Simd>(s: S) {
        let lanes = 2 * S::LANES;
        let bytes = |seed: usize| -> Vec<i16> {
            (0..lanes)
                .map(|i| [255, 0, 128, 127, 1, 77][(i * seed + i / 5) % 6])
                .collect()
        };
        let (low, high) = (bytes(1), bytes(5));
        let mut joined = vec![0i16; lanes];
        let mut halves = vec![0i16; lanes];
        for (weights, right) in [
            ([127i8; 4], 0),
            ([-127; 4], 3),
            ([-128, 127, 0, 1], 11),
            ([3, -100, 127, -127], 16),
        ] {
            let word = i32::from_le_bytes(weights.map(i8::cast_unsigned));
            // Of each pair of lanes four products and what they are added to.
            let sum = |i: usize, begin: i32| {
                let bytes = [low[2 * i], high[2 * i], low[2 * i + 1], high[2 * i + 1]];
                let products = bytes.iter().zip(weights);
                begin
                    + products
                        .map(|(a, w)| i32::from(*a) * i32::from(w))
                        .sum::<i32>()
            };
            // SAFETY: all buffers hold a vector of 16-bit lanes.
            unsafe {
                let a = s.join_bytes(s.load_i16(low.as_ptr()), s.load_i16(high.as_ptr()));
                s.store_i16(joined.as_mut_ptr(), a);
                let even = s.dot_bytes(a, word, s.splat_i32(-7));
                let odd = s.dot_bytes(a, word, s.splat_i32(40_000));
                let distances = [right, 16 - right].map(|distance| s.splat_i32(distance));
                let shifted = s.shifted_halves(even, distances[0], odd, distances[1]);
                s.store_i16(halves.as_mut_ptr(), shifted);
            }
            for i in 0..S::LANES {
                let expected = [sum(i, -7), sum(i, 40_000)].map(|sum| (sum >> right) as i16);
                assert_eq!(halves[2 * i..][..2], expected, "{} {weights:?}", S::NAME);
            }
        }
        for ((joined, low), high) in joined.iter().zip(&low).zip(&high) {
            assert_eq!(*joined, low.wrapping_add(high << 8), "{}", S::NAME);
        }
    }

    /// As many counts as may be added up before they are taken out, all of 32 bits.
    #[inline(always)]
    fn check_counts<S: Simd>(s: S) {
        let words = S::COUNTED_WORDS.min(100);
        let a: Vec<i32> = (0..S::LANES as i32)
            .map(|i| i.wrapping_mul(0x0973_0b5d))
            .collect();
        let mut sums = vec![0.0; S::LANES];
        // SAFETY: both buffers hold one vector.
        unsafe {
            let a = s.load_i32(a.as_ptr());
            let mut counts = s.count_differences(s.splat_i32(0), a, s.splat_i32(0));
            for _ in 1..words {
                counts = s.count_differences(counts, s.splat_i32(-1), s.splat_i32(0));
            }
            s.store(sums.as_mut_ptr(), s.float_i32(s.add_counts(a, counts)));
        }
        for (sum, a) in sums.iter().zip(&a) {
            let counted = a.count_ones() + 32 * (words as u32 - 1);
            let expected = a.wrapping_add(counted as i32) as f32;
            assert_eq!(sum.to_bits(), expected.to_bits(), "{}", S::NAME);
        }
    }

    #[inline(always)]
    fn check_byte_look_up<S: Simd, const ENTRIES: usize>(s: S) {
        let tables: Vec<i8> = (0..4 * ENTRIES).map(|i| (i * 5 % 251) as i8).collect();
        for first in (0..ENTRIES).step_by(7) {
            let index = |i: usize| i % 4 * ENTRIES + (first + i) % ENTRIES;
            let indices: Vec<i8> = (0..4 * S::LANES).map(|i| index(i) as i8).collect();
            let mut found = vec![0i8; 4 * S::LANES];
            // SAFETY: there are four tables and a vector of indices.
            unsafe {
                let indices = s.load_i8(indices.as_ptr());
                let vector = s.look_up_i8::<ENTRIES>(tables.as_ptr(), indices);
                s.store_i8(found.as_mut_ptr(), vector);
            }
            let expected: Vec<i8> = (0..4 * S::LANES).map(|i| tables[index(i)]).collect();
            assert_eq!(found, expected, "{} {ENTRIES}", S::NAME);
        }
    }

    /// Indices of any bytes.
    #[inline(always)]
    fn check_look_up_64<S: Simd>(s: S) {
        let table: Vec<i8> = (0..64).map(|i| (i * 37 % 255) as i8).collect();
        for first in (0..256).step_by(4 * S::LANES) {
            let indices: Vec<u8> = (0..4 * S::LANES).map(|i| (first + i) as u8).collect();
            let mut found = vec![0i8; indices.len()];
            // SAFETY: there are 64 entries and a vector of indices.
            unsafe {
                let vector = s.look_up_64(table.as_ptr(), s.load_i8(indices.as_ptr().cast()));
                s.store_i8(found.as_mut_ptr(), vector);
            }
            let entry = |index: &u8| table[usize::from(*index) % 64];
            let expected: Vec<i8> = indices.iter().map(entry).collect();
            assert_eq!(found, expected, "{} {first}", S::NAME);
        }
    }

    #[inline(always)]
    fn check_exchange<S: Simd, const BIT: usize>(s: S) {
        let a: Vec<i8> = (0..4 * S::LANES as i8).collect();
        let b: Vec<i8> = a.iter().map(|a| -1 - a).collect();
        let mut exchanged = [a.clone(), b.clone()];
        for i in (0..a.len()).filter(|i| i & BIT != 0) {
            exchanged[0][i] = b[i];
            exchanged[1][i] = a[i];
        }
        // SAFETY: both have the bytes of a vector.
        let [a, b] = [a, b].map(|bytes| unsafe { s.load_i8(bytes.as_ptr()) });
        let vectors = s.exchange_i8::<BIT>(a, b);
        let bytes = vectors.map(|vector| {
            let mut bytes = vec![0i8; 4 * S::LANES];
            // SAFETY: there is room for a vector.
            unsafe { s.store_i8(bytes.as_mut_ptr(), vector) };
            bytes
        });
        assert_eq!(bytes, exchanged, "{} {BIT}", S::NAME);
    }

    /// Numbers of `BITS` bits, of which eight are packed in as many bits of a vector each.
    #[inline(always)]
    fn check_packed_look_up<S: Simd, const BITS: u32>(s: S) {
        let n = 1usize << BITS;
        let table: Vec<u8> = (0..n).map(|i| (i * 37 + 200) as u8).collect();
        let number = |i: usize, j: usize| (i * 13 + j * 7 + i * j) % n;
        let packed: Vec<Vec<u8>> = (0..BITS as usize)
            .map(|vector| {
                let byte = |i: usize| match vector {
                    0..4 => (number(i, 2 * vector) % 16) | ((number(i, 2 * vector + 1) % 16) << 4),
                    _ => (0..8).fold(0, |byte, j| byte | (number(i, j) >> vector & 1) << j),
                };
                (0..4 * S::LANES).map(|i| byte(i) as u8).collect()
            })
            .collect();
        // SAFETY: each has the bytes of a vector.
        let load = |vector: usize| unsafe { s.load_i8(packed[vector].as_ptr().cast()) };
        for j in 0..8 {
            let low = s.half_bytes(load(j / 2), j % 2);
            let four = s.raise_bits(load(4.min(BITS as usize - 1)), j);
            let five = s.raise_bits(load(5.min(BITS as usize - 1)), j);
            let mut sums = [vec![0i16; 2 * S::LANES], vec![0i16; 2 * S::LANES]];
            // SAFETY: the table has 2^BITS entries, the sums hold a vector each.
            unsafe {
                let entries = s.look_up_packed::<BITS>(table.as_ptr(), low, [four, five]);
                let before = [s.splat_pair(0x0001_0001), s.splat_pair(-1)];
                let added = s.add_bytes(before, entries);
                for (sums, added) in sums.iter_mut().zip(added) {
                    s.store_i16(sums.as_mut_ptr(), added);
                }
            }
            for i in 0..4 * S::LANES {
                let expected = i16::from(table[number(i, j)]) + [1, -1][i % 2];
                assert_eq!(sums[i % 2][i / 2], expected, "{} {BITS} {i} {j}", S::NAME);
            }
        }
    }

    /// Indices of `BITS` bits with others above them.
    #[inline(always)]
    fn check_look_up<S: Simd, const BITS: u32>(s: S) {
        let n = 1usize << BITS;
        let entries: Vec<i16> = (0..n.max(32))
            .map(|i| (i % n) as i16 * 517 - 9000)
            .collect();
        for first in (0..n).step_by(2 * S::LANES) {
            let word = |i: usize| ((first + i) << 3 | 0x9005) as i16;
            let words: Vec<i16> = (0..2 * S::LANES).map(word).collect();
            let mut found = vec![0i16; words.len()];
            // SAFETY: there are 32 entries or n, and a vector of words.
            unsafe {
                let indices = s.shift_right_i16::<3>(s.load_i16(words.as_ptr()));
                s.store_i16(
                    found.as_mut_ptr(),
                    s.look_up_i16::<BITS>(entries.as_ptr(), indices),
                );
            }
            let index = |word: &i16| usize::from(word.cast_unsigned() >> 3) % n;
            let expected: Vec<i16> = words.iter().map(|word| entries[index(word)]).collect();
            assert_eq!(found, expected, "{} {BITS}", S::NAME);
        }
    }

    /// As [`check_look_up`].
    #[inline(always)]
    fn check_look_up_f32<S: Simd, const BITS: u32>(s: S) {
        let n = 1usize << BITS;
        let entries: Vec<f32> = (0..n).map(|i| i as f32 * 1.5 - 20.0).collect();
        for first in (0..n).step_by(S::LANES) {
            let word = |i: usize| ((first + i) << 3) as i32 | 0x9000_7005_u32.cast_signed();
            let words: Vec<i32> = (0..S::LANES).map(word).collect();
            // SAFETY: there are 2^BITS entries and a vector of words.
            let found = unsafe {
                let indices = s.shift_right_i32::<3>(s.load_i32(words.as_ptr()));
                s.look_up_f32::<BITS>(entries.as_ptr(), indices)
            };
            let mut values = vec![0.0; S::LANES];
            s.store_first(&mut values, found);
            let index = |word: &i32| (word.cast_unsigned() >> 3) as usize % n;
            let expected: Vec<f32> = words.iter().map(|word| entries[index(word)]).collect();
            assert_eq!(values, expected, "{} {BITS}", S::NAME);
        }
    }

    /// The primitives that rounding, NaN or parts of vectors concern.
    #[inline(always)]
    fn check_floats<S: Simd>(s: S) {
        let get = |vector: S::F32| {
            let mut lanes = vec![0.0; S::LANES];
            s.store_first(&mut lanes, vector);
            lanes
        };
        let a: Vec<f32> = (0..S::LANES).map(|i| i as f32 - 2.5).collect();
        let b: Vec<f32> = (0..S::LANES).map(|i| 1.5 - i as f32).collect();
        let (va, vb) = (s.load_first(&a), s.load_first(&b));
        let pairs = || a.iter().zip(&b);
        let products: Vec<f32> = pairs().map(|(a, b)| a * b).collect();
        assert_eq!(get(s.mul(va, vb)), products, "{}", S::NAME);
        let maxima: Vec<f32> = pairs().map(|(a, b)| a.max(*b)).collect();
        assert_eq!(get(s.max(va, vb)), maxima, "{}", S::NAME);
        assert_eq!(get(s.max_number(va, vb)), maxima, "{}", S::NAME);
        let nan = s.splat(f32::NAN);
        for vector in [s.max(nan, va), s.max(va, nan)] {
            assert!(get(vector).iter().all(|x| x.is_nan()), "{}", S::NAME);
        }
        let minima: Vec<f32> = pairs().map(|(a, b)| a.min(*b)).collect();
        assert_eq!(get(s.min(va, vb)), minima, "{}", S::NAME);
        let magnitudes: Vec<f32> = a.iter().map(|a| a.abs()).collect();
        assert_eq!(get(s.abs(va)), magnitudes, "{}", S::NAME);
        let quotients: Vec<f32> = pairs().map(|(a, b)| a / b).collect();
        assert_eq!(get(s.div(va, vb)), quotients, "{}", S::NAME);
        let zipped: Vec<i16> = pairs()
            .flat_map(|(a, b)| [a.round_ties_even() as i16, b.round_ties_even() as i16])
            .collect();
        let mut words = vec![0i16; 2 * S::LANES];
        // SAFETY: there is room for a vector.
        unsafe { s.store_i16(words.as_mut_ptr(), s.round_zip_i16(va, vb)) };
        assert_eq!(words, zipped, "{}", S::NAME);
        let even: Vec<f32> = a.iter().chain(&b).copied().step_by(2).collect();
        assert_eq!(get(s.even(va, vb)), even, "{}", S::NAME);
        let odd: Vec<f32> = a.iter().chain(&b).copied().skip(1).step_by(2).collect();
        assert_eq!(get(s.odd(va, vb)), odd, "{}", S::NAME);
        for exponent in -126..=127 {
            for mantissa in [1.0, 1.1, 1.37, 1.999] {
                let x = mantissa * 2.0f32.powi(exponent);
                let got = f64::from(get(s.rsqrt_estimate(s.splat(x)))[0]);
                let error = got * f64::from(x).sqrt() - 1.0;
                assert!(error.abs() < 1.0 / 2048.0, "{}: {x} {error}", S::NAME);
            }
        }
        for distance in 0..S::LANES {
            let shifted = get(s.shift(va, distance));
            let kept = S::LANES - distance;
            assert_eq!(shifted[..kept], a[distance..], "{} {distance}", S::NAME);
            let both: Vec<f32> = a.iter().chain(&b).copied().collect();
            let shifted = get(s.shift_pair([va, vb], distance));
            assert_eq!(
                shifted,
                both[distance..][..S::LANES],
                "{} {distance}",
                S::NAME
            );
        }
        check_halves(s, &a, &b);
        for (begin, end) in (0..=S::LANES).flat_map(|end| (0..=end).map(move |b| (b, end))) {
            // Of the slices only the range exists.
            let range = a[begin..end].to_vec();
            let mut expected = vec![0.0; S::LANES];
            expected[begin..end].copy_from_slice(&range);
            let mut target = vec![7.0; end - begin];
            // SAFETY: both hold the range; other lanes are not touched.
            unsafe {
                let loaded = s.load_range(range.as_ptr().wrapping_sub(begin), begin, end);
                assert_eq!(get(loaded), expected, "{} {begin}..{end}", S::NAME);
                s.store_range(target.as_mut_ptr().wrapping_sub(begin), va, begin, end);
            }
            assert_eq!(target, range, "{} {begin}..{end}", S::NAME);
        }
        for n in 0..=S::LANES {
            let mut expected = vec![0.0; S::LANES];
            expected[..n].copy_from_slice(&a[..n]);
            assert_eq!(get(s.load_first(&a[..n])), expected, "{} {n}", S::NAME);
            let mut target = vec![7.0; S::LANES + 1];
            s.store_first(&mut target[..n], va);
            let mut expected = vec![7.0; S::LANES + 1];
            expected[..n].copy_from_slice(&a[..n]);
            assert_eq!(target, expected, "{} {n}", S::NAME);
        }
    }

    /// The primitives for 16-bit floats, those that are no numbers and those that are small
    /// included.
    #[inline(always)]
    fn check_halves<S: Simd>(s: S, a: &[f32], b: &[f32]) {
        let special = [f32::INFINITY, 70_000.0, 1e-7, -3e-6, 2049.0, 1.0 / 3.0];
        let numbers = |first: &[f32], turn: usize| -> Vec<f32> {
            let mut numbers: Vec<f32> = first.iter().chain(b).map(|x| 0.37 * x).collect();
            for (i, x) in special.iter().enumerate() {
                let i = (i * 5 + turn) % numbers.len();
                numbers[i] = *x;
            }
            numbers
        };
        let sources = [numbers(a, 0), numbers(b, 1), numbers(a, 3)];
        let [x, y, z] = sources.each_ref().map(|numbers| {
            let (low, high) = numbers.split_at(S::LANES);
            s.narrow_f16(s.load_first(low), s.load_first(high))
        });
        let rounded = sources.map(|numbers| numbers.into_iter().map(f16::from_f32));
        let [xs, ys, zs] = rounded.map(|numbers| numbers.map(f32::from).collect::<Vec<f32>>());
        let check = |name: &str, vector: S::I16, expected: &dyn Fn(usize) -> f64| {
            let mut values = vec![0.0; 2 * S::LANES];
            for (half, values) in s
                .widen_f16(vector)
                .into_iter()
                .zip(values.chunks_exact_mut(S::LANES))
            {
                s.store_first(values, half);
            }
            for (i, value) in values.iter().enumerate() {
                let expected = f16::from_f32(half::round_to_odd(expected(i))).to_f32();
                assert_eq!(
                    value.to_bits(),
                    expected.to_bits(),
                    "{} {name} {i}",
                    S::NAME
                );
            }
        };
        check("narrow", x, &|i| xs[i].into());
        check("add", s.add_f16(x, y), &|i| {
            f64::from(xs[i]) + f64::from(ys[i])
        });
        check("mul_add", s.mul_add_f16(x, y, z), &|i| {
            f64::from(xs[i]) * f64::from(ys[i]) + f64::from(zs[i])
        });
    }

    #[test]
    fn primitives() {
        for isa in Isa::available() {
            isa.level().unwrap().call(CheckPrimitives);
        }
        // Levels do not call tasks with this token.
        #[cfg(target_arch = "x86_64")]
        if let Some(simd) = Avx512::<true, true, true>::new() {
            simd.call(CheckPrimitives);
        }
        Portable::<16>::new().unwrap().call(CheckPrimitives);
    }
}
