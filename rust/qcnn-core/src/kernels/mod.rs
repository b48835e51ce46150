//! Kernels of convolutions and fully connected layers.
//!
//! A [`Kernel`] holds one layer's weights in the order in which it reads them
//! and runs the layer. [`conv_kernels`] and [`fc_kernels`] list what there is
//! for a layer on an ISA; a session takes the one that a cost model says is the
//! fastest. That may be a dense kernel with decoded weights, where look-ups
//! would replace too few multiplications. The reference they are all tested
//! against is [`scalar`].
//!
//! An image's response does not depend on the batch it comes in: every kernel
//! sums in the same order for one image and for many.

mod bytes;
mod channels;
mod entry;
mod factors;
mod gemm;
mod parts;
mod permute;
mod pixels;
pub(crate) mod planes;
mod rows;
pub mod scalar;
pub(crate) mod tile;
#[cfg(target_arch = "x86_64")]
mod tiles;
mod words;
mod xnor;

use std::borrow::Cow;
use std::fmt::{self, Debug};

use crate::geometry::ConvGeometry;
use crate::graph::PqGeometry;
use crate::isa::{Isa, Level, Simd, Task};
use crate::ops::conv::{DirectConv, GemmConv};
use crate::ops::fc::GemmFc;
use crate::ops::norm::BatchNorm;
use crate::pack::Codes;
use crate::precision::Precision;
use bytes::BytesFc;
use channels::ChannelsConv;
use factors::{Bytes, Words};
use gemm::IntegerGemmConv;
use parts::PartsConv;
use permute::PermuteFc;
use pixels::PixelsConv;
#[cfg(target_arch = "x86_64")]
use rows::Half;
use rows::{ByteCodebook, Float, RowsConv, Short, WordCodebook};
#[cfg(target_arch = "x86_64")]
use tiles::TilesConv;
use words::WordsFc;
use xnor::{XnorConv, XnorFc};

/// A layer, ready to run.
pub trait Kernel: Debug + Send + Sync {
    /// Architecture, ISA, element type and method, such as
    /// `x86_64-avx2-f32-pixels`.
    fn name(&self) -> &str;

    /// Elements of scratch that [`run`](Self::run) needs for `n` images.
    fn scratch_len(&self, n: usize) -> usize;

    /// Compute the responses of `n` images.
    ///
    /// `input` and `output` hold `n` images back to back. The scratch may hold
    /// anything; it starts on a 64-byte boundary when a session runs the kernel
    /// (loads straddle fewer cache lines then, nothing depends on it).
    ///
    /// # Panics
    ///
    /// If a slice is too short.
    fn run(&self, n: usize, input: &[f32], output: &mut [f32], scratch: &mut [f32]);

    /// As [`run`](Self::run), and apply ReLU to the responses while they are at
    /// hand. Kernels that gain nothing by that return false and do nothing.
    fn run_relu(&self, _: usize, _: &[f32], _: &mut [f32], _: &mut [f32]) -> bool {
        false
    }

    /// Whether there is [`run_pooled`](Self::run_pooled).
    fn pools(&self) -> bool {
        false
    }

    /// As [`run`](Self::run), with ReLU if asked for, and write only the greatest response
    /// of each window of 2 x 2: windows lie side by side, a last row or column that fills
    /// none is left out.
    ///
    /// # Panics
    ///
    /// If it does not [pool](Self::pools).
    fn run_pooled(&self, _relu: bool, _: usize, _: &[f32], _: &mut [f32], _: &mut [f32]) {
        unreachable!("does not pool");
    }

    /// Prepare [`run_folded`](Self::run_folded) for a normalisation, or return false.
    fn fold(&mut self, _: &BatchNorm) -> bool {
        false
    }

    /// As [`run`](Self::run), followed by the normalisation that was folded in and the
    /// sign: the same numbers, to the bit.
    ///
    /// # Panics
    ///
    /// If nothing was folded in.
    fn run_folded(&self, _: usize, _: &[f32], _: &mut [f32], _: &mut [f32]) {
        unreachable!("nothing was folded in");
    }
}

/// Numbers that a value is known to be made of, besides NaN.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Levels {
    /// Any.
    Any,
    /// 1 and -1.
    Signs,
    /// Evenly spaced ones.
    Grid(Grid),
}

/// At most 256 evenly spaced numbers, of which one is 0.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Grid {
    /// The distance between neighbours.
    pub step: f32,
    /// How many are less than 0, at most 255.
    pub zero: i32,
}

/// Weights of a layer as the network stores them.
#[derive(Clone, Copy, Debug)]
pub enum Weights<'a, C = &'a [u16]> {
    /// `(outputs, channels per group, taps)`.
    Dense(&'a [f32]),
    /// Nothing but 1 and -1.
    Binary {
        /// In the order of dense weights.
        signs: &'a [i8],
        /// What is known of the layer's input.
        input: Levels,
    },
    /// Codebooks and codes.
    ProductQuantized {
        /// How the channels of a group are split.
        geometry: PqGeometry,
        /// `(sets, M, K, C')`.
        codebooks: &'a [f32],
        /// `(outputs, taps, M)`, each below `K`.
        codes: C,
    },
}

impl<'a> Weights<'a, Codes<'a>> {
    /// With codes unpacked, to `buffer` if necessary.
    pub fn unpacked<'b>(self, buffer: &'b mut Vec<u16>) -> Weights<'b>
    where
        'a: 'b,
    {
        match self {
            Self::Dense(weight) => Weights::Dense(weight),
            Self::Binary { signs, input } => Weights::Binary { signs, input },
            Self::ProductQuantized {
                geometry,
                codebooks,
                codes,
            } => Weights::ProductQuantized {
                geometry,
                codebooks,
                codes: codes.all(buffer),
            },
        }
    }
}

/// A convolution to make a kernel of.
#[derive(Clone, Copy, Debug)]
pub struct ConvLayer<'a> {
    /// Extents, strides, padding.
    pub geometry: &'a ConvGeometry,
    /// Weights.
    pub weights: Weights<'a>,
    /// One value per output channel.
    pub bias: Option<&'a [f32]>,
}

/// A fully connected layer to make a kernel of.
#[derive(Clone, Copy, Debug)]
pub struct FcLayer<'a> {
    /// Length of the input.
    pub in_features: usize,
    /// Length of the output.
    pub out_features: usize,
    /// Weights, with a single tap. There are many: kernels may unpack the codes
    /// of some outputs at a time.
    pub weights: Weights<'a, Codes<'a>>,
    /// One value per output.
    pub bias: Option<&'a [f32]>,
}

impl<'a> ConvLayer<'a> {
    /// Whether the outputs of a group are in parts with codebooks of their own.
    pub(crate) fn has_parts(&self) -> bool {
        match self.weights {
            Weights::ProductQuantized { geometry, .. } => {
                geometry.codebook_groups > self.geometry.groups
            }
            _ => false,
        }
    }

    /// The weights, decoded if necessary.
    pub(crate) fn dense_weights(&self) -> Cow<'a, [f32]> {
        match self.weights {
            Weights::Dense(weight) => Cow::Borrowed(weight),
            _ => Cow::Owned(self.decode()),
        }
    }

    /// The bias, zeros without one.
    pub(crate) fn bias_or_zeros(&self) -> Vec<f32> {
        match self.bias {
            Some(bias) => bias.to_vec(),
            None => vec![0.0; self.geometry.out_channels],
        }
    }
}

impl<'a> FcLayer<'a> {
    /// The weights, decoded if necessary.
    pub(crate) fn dense_weights(&self) -> Cow<'a, [f32]> {
        match self.weights {
            Weights::Dense(weight) => Cow::Borrowed(weight),
            _ => Cow::Owned(self.decode()),
        }
    }

    /// The bias, zeros without one.
    pub(crate) fn bias_or_zeros(&self) -> Vec<f32> {
        match self.bias {
            Some(bias) => bias.to_vec(),
            None => vec![0.0; self.out_features],
        }
    }
}

/// A kernel that can run a certain layer.
pub struct Candidate<'a> {
    cycles: f64,
    build: Box<dyn Fn() -> Box<dyn Kernel> + 'a>,
}

impl<'a> Candidate<'a> {
    pub(crate) fn new<K: Kernel + 'static>(cycles: f64, build: impl Fn() -> K + 'a) -> Self {
        Self {
            cycles,
            build: Box::new(move || Box::new(build())),
        }
    }

    /// Clock cycles that one image takes, by a rough model whose constants were
    /// measured on Zen 3, Zen 4 and Emerald Rapids cores, those of NEON's look-ups computed.
    /// Only comparisons mean something.
    pub fn cycles(&self) -> f64 {
        self.cycles
    }

    /// Pack the weights.
    pub fn build(&self) -> Box<dyn Kernel> {
        (self.build)()
    }
}

impl fmt::Debug for Candidate<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Candidate")
            .field("cycles", &self.cycles)
            .finish_non_exhaustive()
    }
}

/// Clock cycles of a vector operation, or of an aligned load: vectors of 64
/// bytes have half the throughput, on the CPUs that the models describe.
pub(crate) const fn vector_cycles<S: Simd>() -> f64 {
    if S::LANES >= 16 { 1.0 } else { 0.5 }
}

/// Clock cycles of a multiplication of vectors.
pub(crate) fn multiply_cycles<S: Simd>() -> f64 {
    if has_wide_units::<S>() {
        0.5
    } else {
        vector_cycles::<S>()
    }
}

/// Whether vectors have 64 bytes and the CPU loads and multiplies two of them a cycle, as
/// those do that have 16-bit floats: Intel's since Sapphire Rapids.
pub(crate) fn has_wide_units<S: Simd>() -> bool {
    #[cfg(target_arch = "x86_64")]
    if S::LANES >= 16 {
        return std::arch::is_x86_feature_detected!("avx512fp16");
    }
    false
}

/// Every kernel on `isa` that can run `layer` at `precision`, from the fastest to the slowest
/// by the model. There is always one if the CPU has the level.
pub fn conv_kernels<'a>(
    layer: &'a ConvLayer<'a>,
    isa: Isa,
    precision: Precision,
) -> Vec<Candidate<'a>> {
    struct List<'a>(&'a ConvLayer<'a>, Precision);
    impl<'a> Task for List<'a> {
        type Output = Vec<Candidate<'a>>;

        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> Vec<Candidate<'a>> {
            conv_kernels_of(self.0, simd, self.1)
        }
    }
    let Some(level) = isa.level() else {
        return Vec::new();
    };
    let mut candidates = level.call(List(layer, precision));
    candidates.extend(kernels_of_level(level, layer, precision));
    candidates.sort_by(|a, b| a.cycles.total_cmp(&b.cycles));
    candidates
}

/// Those that only some levels have: with 16-bit floats, or with tiles.
#[cfg(target_arch = "x86_64")]
fn kernels_of_level<'a>(
    level: Level,
    layer: &'a ConvLayer<'a>,
    precision: Precision,
) -> Vec<Candidate<'a>> {
    let (fp16, amx) = match level {
        Level::Avx512Fp16(simd) => (simd, None),
        Level::Avx512Amx(amx) => (amx.fp16(), Some(amx)),
        _ => return Vec::new(),
    };
    let mut candidates = Vec::new();
    if precision >= Precision::Fast && !layer.has_parts() {
        candidates.extend(RowsConv::<_, Half>::candidate(fp16, layer));
    }
    if precision >= Precision::Fast {
        candidates.extend(amx.and_then(|amx| TilesConv::<2>::candidate(amx, layer)));
    }
    if precision >= Precision::Int8 {
        candidates.extend(amx.and_then(|amx| TilesConv::<1>::candidate(amx, layer)));
    }
    candidates
}

#[cfg(not(target_arch = "x86_64"))]
fn kernels_of_level<'a>(_: Level, _: &'a ConvLayer<'a>, _: Precision) -> Vec<Candidate<'a>> {
    Vec::new()
}

/// Those that all levels have, in no order; also for levels that no session uses.
fn conv_kernels_of<'a, S: Simd>(
    layer: &'a ConvLayer<'a>,
    simd: S,
    precision: Precision,
) -> Vec<Candidate<'a>> {
    let mut candidates = if layer.has_parts() {
        PartsConv::candidates(simd, layer, precision)
    } else {
        look_up_kernels(layer, simd, precision)
    };
    if precision >= Precision::Fast {
        candidates.extend(IntegerGemmConv::<_, Words>::candidate(simd, layer));
    }
    if precision >= Precision::Int8 {
        candidates.extend(IntegerGemmConv::<_, Bytes>::candidate(simd, layer));
    }
    candidates.extend(XnorConv::candidate(simd, layer));
    candidates.extend(IntegerGemmConv::<_, Bytes>::exact(simd, layer));
    candidates.extend(DirectConv::candidate(simd, layer));
    candidates.push(GemmConv::candidate(simd, layer));
    candidates
}

/// Those of a convolution that has one set of codebooks, or one per group, at most.
fn look_up_kernels<'a, S: Simd>(
    layer: &'a ConvLayer<'a>,
    simd: S,
    precision: Precision,
) -> Vec<Candidate<'a>> {
    let int8 = [
        ChannelsConv::candidate(simd, layer),
        RowsConv::<_, Short<ByteCodebook>>::candidate(simd, layer),
    ];
    let fast = [RowsConv::<_, Short<WordCodebook>>::candidate(simd, layer)];
    let exact = [
        RowsConv::<_, Float<1>>::candidate(simd, layer),
        RowsConv::<_, Float<2>>::candidate(simd, layer),
        PixelsConv::candidate(simd, layer),
    ];
    int8.into_iter()
        .filter(|_| precision >= Precision::Int8)
        .chain(fast.into_iter().filter(|_| precision >= Precision::Fast))
        .chain(exact)
        .flatten()
        .collect()
}

/// Every kernel on `isa` that can run `layer` at `precision`, from the fastest to the slowest
/// by the model. There is always one if the CPU has the level.
pub fn fc_kernels<'a>(
    layer: &'a FcLayer<'a>,
    isa: Isa,
    precision: Precision,
) -> Vec<Candidate<'a>> {
    struct List<'a>(&'a FcLayer<'a>, Precision);
    impl<'a> Task for List<'a> {
        type Output = Vec<Candidate<'a>>;

        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> Vec<Candidate<'a>> {
            fc_kernels_of(self.0, simd, self.1)
        }
    }
    isa.level()
        .map_or_else(Vec::new, |level| level.call(List(layer, precision)))
}

/// As [`fc_kernels`], also for levels that no session uses.
fn fc_kernels_of<'a, S: Simd>(
    layer: &'a FcLayer<'a>,
    simd: S,
    precision: Precision,
) -> Vec<Candidate<'a>> {
    let int8 = [BytesFc::candidate(simd, layer)];
    let fast = [PermuteFc::<S, i16>::candidate(simd, layer)];
    let exact = [
        PermuteFc::<S, f32>::candidate(simd, layer),
        WordsFc::candidate(simd, layer),
        XnorFc::candidate(simd, layer),
        Some(GemmFc::candidate(simd, layer)),
    ];
    let mut candidates: Vec<_> = int8
        .into_iter()
        .filter(|_| precision >= Precision::Int8)
        .chain(fast.into_iter().filter(|_| precision >= Precision::Fast))
        .chain(exact)
        .flatten()
        .collect();
    candidates.sort_by(|a, b| a.cycles.total_cmp(&b.cycles));
    candidates
}

#[cfg(test)]
mod tests;
