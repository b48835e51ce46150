//! What the tables of the kernel with tables in registers hold.

use std::fmt::Debug;
use std::ops::BitOrAssign;

use bytemuck::Pod;

use crate::isa::Simd;

/// Greatest scale: it and its inverse are normal float32 numbers.
pub(super) const MAX_SCALE: f64 = (1u128 << 126) as f64;

/// Most subspaces in a chunk.
pub(super) const MAX_CHUNK: usize = 100;

/// An integer that codes are packed in.
pub(crate) trait Lane: Pod + Debug + Default + Send + Sync + BitOrAssign {
    /// Its value.
    fn bits(self) -> usize;

    /// `code`, `shift` bits up.
    fn from_code(code: u16, shift: u32) -> Self;
}

impl Lane for i16 {
    #[inline(always)]
    fn bits(self) -> usize {
        self.cast_unsigned().into()
    }

    #[inline(always)]
    fn from_code(code: u16, shift: u32) -> Self {
        (code << shift).cast_signed()
    }
}

impl Lane for i32 {
    #[inline(always)]
    fn bits(self) -> usize {
        self.cast_unsigned() as usize
    }

    #[inline(always)]
    fn from_code(code: u16, shift: u32) -> Self {
        (u32::from(code) << shift).cast_signed()
    }
}

/// The type of table entries, and of their sums within a chunk of subspaces.
pub(crate) trait Entry: Copy + Debug + Default + Send + Sync + 'static {
    /// In kernel names.
    const NAME: &'static str;
    /// Vectors of float32 values that have as many lanes as a vector of entries.
    const WIDTH: usize;
    /// If entries are multiplied by a scale, which the norms of weights bound.
    const SCALED: bool;
    /// An integer of the same size.
    type Lane: Lane;
    /// A vector of codes.
    type Codes<S: Simd>: Copy;
    /// A vector of entries or sums.
    type Vector<S: Simd>: Copy;

    /// Codes in a lane, if they have `bits` bits.
    fn lane_codes(bits: u32) -> usize {
        8 * size_of::<Self>() / bits as usize
    }

    /// Entries of a table in scratch, for codes of `bits` bits.
    fn table_len(bits: u32) -> usize;

    /// Clock cycles of a look-up with 4, 5 and 6 bits.
    fn look_up_cycles<S: Simd>() -> [f64; 3];

    /// Subspaces in a chunk, at most [`MAX_CHUNK`].
    fn chunk_len(subvector_dim: usize) -> usize;

    /// What the entries of a chunk of `len` subspaces are multiplied by. No
    /// output's weights there have a greater norm than `norm`.
    fn scale(input: &[f32], len: usize, subvector_dim: usize, norm: f64) -> f32;

    /// Every lane 0.
    fn zero<S: Simd>(simd: S) -> Self::Vector<S>;

    /// `a + b`
    fn add<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;

    /// The values of the first `WIDTH` vectors.
    fn narrow<S: Simd>(simd: S, values: [S::F32; 2]) -> Self::Vector<S>;

    /// The inverse of [`narrow`](Self::narrow).
    fn widen<S: Simd>(simd: S, vector: Self::Vector<S>) -> [S::F32; 2];

    /// The vector at `source`.
    ///
    /// # Safety
    ///
    /// `source` is valid for reads of as many values.
    unsafe fn load<S: Simd>(simd: S, source: *const Self) -> Self::Vector<S>;

    /// Write a vector to `target`.
    ///
    /// # Safety
    ///
    /// `target` is valid for writes of as many values.
    unsafe fn store<S: Simd>(simd: S, target: *mut Self, vector: Self::Vector<S>);

    /// The vector of codes at `source`.
    ///
    /// # Safety
    ///
    /// `source` is valid for reads of as many lanes.
    unsafe fn load_codes<S: Simd>(simd: S, source: *const Self::Lane) -> Self::Codes<S>;

    /// The next codes of every lane.
    fn shift<S: Simd, const BITS: u32>(simd: S, codes: Self::Codes<S>) -> Self::Codes<S>;

    /// Every lane's entry, chosen by its lowest `BITS` bits.
    ///
    /// # Safety
    ///
    /// `table` is valid for reads of `table_len(BITS)` values.
    unsafe fn look_up<S: Simd, const BITS: u32>(
        simd: S,
        table: *const Self,
        codes: Self::Codes<S>,
    ) -> Self::Vector<S>;
}

impl Entry for f32 {
    const NAME: &'static str = "f32";
    const WIDTH: usize = 1;
    const SCALED: bool = false;
    type Lane = i32;
    type Codes<S: Simd> = S::I32;
    type Vector<S: Simd> = S::F32;

    fn table_len(bits: u32) -> usize {
        1 << bits
    }

    fn look_up_cycles<S: Simd>() -> [f64; 3] {
        S::LOOK_UP_F32_CYCLES
    }

    /// Tables of 32 entries take a quarter of L1.
    fn chunk_len(_: usize) -> usize {
        64
    }

    #[inline(always)]
    fn scale(_: &[f32], _: usize, _: usize, _: f64) -> f32 {
        1.0
    }

    #[inline(always)]
    fn zero<S: Simd>(simd: S) -> S::F32 {
        simd.splat(0.0)
    }

    #[inline(always)]
    fn add<S: Simd>(simd: S, a: S::F32, b: S::F32) -> S::F32 {
        simd.add(a, b)
    }

    #[inline(always)]
    fn narrow<S: Simd>(_: S, values: [S::F32; 2]) -> S::F32 {
        values[0]
    }

    #[inline(always)]
    fn widen<S: Simd>(simd: S, vector: S::F32) -> [S::F32; 2] {
        [vector, simd.splat(0.0)]
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, source: *const f32) -> S::F32 {
        // SAFETY: as promised by the caller.
        unsafe { simd.load(source) }
    }

    #[inline(always)]
    unsafe fn store<S: Simd>(simd: S, target: *mut f32, vector: S::F32) {
        // SAFETY: as promised by the caller.
        unsafe { simd.store(target, vector) }
    }

    #[inline(always)]
    unsafe fn load_codes<S: Simd>(simd: S, source: *const i32) -> S::I32 {
        // SAFETY: as promised by the caller.
        unsafe { simd.load_i32(source) }
    }

    #[inline(always)]
    fn shift<S: Simd, const BITS: u32>(simd: S, codes: S::I32) -> S::I32 {
        simd.shift_right_i32::<BITS>(codes)
    }

    #[inline(always)]
    unsafe fn look_up<S: Simd, const BITS: u32>(
        simd: S,
        table: *const f32,
        codes: S::I32,
    ) -> S::F32 {
        // SAFETY: as promised by the caller.
        unsafe { simd.look_up_f32::<BITS>(table, codes) }
    }
}

impl Entry for i16 {
    const NAME: &'static str = "i16";
    const WIDTH: usize = 2;
    const SCALED: bool = true;
    type Lane = i16;
    type Codes<S: Simd> = S::I16;
    type Vector<S: Simd> = S::I16;

    /// See [`Simd::look_up_i16`].
    fn table_len(bits: u32) -> usize {
        if bits == 6 { 64 } else { 32 }
    }

    fn look_up_cycles<S: Simd>() -> [f64; 3] {
        S::LOOK_UP_CYCLES
    }

    /// The relative L2 error of the responses is about 1e-3 then on Gaussian
    /// weights and inputs, and less on the authors' `AlexNet`.
    fn chunk_len(subvector_dim: usize) -> usize {
        (MAX_CHUNK * MAX_CHUNK / subvector_dim).isqrt().max(1)
    }

    /// See the documentation of [`permute`](super::permute). Not a number if an
    /// input is not, and 0 if one is infinite: the inverse then is not finite,
    /// nor are the responses.
    #[inline(always)]
    fn scale(input: &[f32], len: usize, subvector_dim: usize, norm: f64) -> f32 {
        // Squares of float32 numbers neither overflow nor vanish in float64.
        let mut squares = [0.0f64; 8];
        let (eights, rest) = input.as_chunks::<8>();
        for eight in eights {
            for (square, x) in squares.iter_mut().zip(eight) {
                *square += f64::from(*x) * f64::from(*x);
            }
        }
        for (square, x) in squares.iter_mut().zip(rest) {
            *square += f64::from(*x) * f64::from(*x);
        }
        let bound = squares.iter().sum::<f64>().sqrt() * norm;
        let margin = (subvector_dim + 4) as f64 * 8.0 * f64::from(f32::EPSILON);
        let limit = (32767.0 - 0.5 * len as f64) / (1.0 + margin);
        (limit / bound).clamp(0.0, MAX_SCALE) as f32
    }

    #[inline(always)]
    fn zero<S: Simd>(simd: S) -> S::I16 {
        simd.zero_i16()
    }

    #[inline(always)]
    fn add<S: Simd>(simd: S, a: S::I16, b: S::I16) -> S::I16 {
        simd.add_i16(a, b)
    }

    #[inline(always)]
    fn narrow<S: Simd>(simd: S, values: [S::F32; 2]) -> S::I16 {
        simd.round_i16(values[0], values[1])
    }

    #[inline(always)]
    fn widen<S: Simd>(simd: S, vector: S::I16) -> [S::F32; 2] {
        simd.widen_i16(vector)
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, source: *const i16) -> S::I16 {
        // SAFETY: as promised by the caller.
        unsafe { simd.load_i16(source) }
    }

    #[inline(always)]
    unsafe fn store<S: Simd>(simd: S, target: *mut i16, vector: S::I16) {
        // SAFETY: as promised by the caller.
        unsafe { simd.store_i16(target, vector) }
    }

    #[inline(always)]
    unsafe fn load_codes<S: Simd>(simd: S, source: *const i16) -> S::I16 {
        // SAFETY: as promised by the caller.
        unsafe { simd.load_i16(source) }
    }

    #[inline(always)]
    fn shift<S: Simd, const BITS: u32>(simd: S, codes: S::I16) -> S::I16 {
        simd.shift_right_i16::<BITS>(codes)
    }

    #[inline(always)]
    unsafe fn look_up<S: Simd, const BITS: u32>(
        simd: S,
        table: *const i16,
        codes: S::I16,
    ) -> S::I16 {
        // SAFETY: as promised by the caller.
        unsafe { simd.look_up_i16::<BITS>(table, codes) }
    }
}
