//! Single layers of `AlexNet` at the authors' setting, of VGG-16 with 8-bit tables,
//! and binary ones, one image, one thread: every ISA the CPU has, product-quantised
//! or binary and dense.
//!
//! Items are look-ups of the quantised layer, for the dense kernels too, so
//! that the columns compare; those of binary layers are multiplications. Divided by
//! the clock rate, which is measured and printed first, they are look-ups per cycle:
//! 40 Gitem/s at 4 GHz are 10.

use std::fmt;
use std::hint::black_box;
use std::time::Instant;

use divan::Bencher;
use divan::counter::ItemsCount;
use qcnn_core::geometry::ConvGeometry;
use qcnn_core::graph::{CodebookBits, PqGeometry};
use qcnn_core::kernels::{
    Candidate, ConvLayer, FcLayer, Grid, Kernel, Levels, Weights, conv_kernels, fc_kernels,
};
use qcnn_core::{Isa, Precision};

fn main() {
    println!("clock: {:.2} GHz", clock_rate() / 1e9);
    divan::main();
}

/// Cycles per second of this core, from a chain of multiplications, each of which
/// waits three cycles for the one before, on all CPUs of the last ten years.
fn clock_rate() -> f64 {
    const MULTIPLICATIONS: u64 = 1_000_000;
    let seconds = || {
        let start = Instant::now();
        let mut product = black_box(3u64);
        // Squares: a chain of one constant factor is multiplied out by the compiler.
        for _ in 0..MULTIPLICATIONS {
            product = product.wrapping_mul(product);
        }
        black_box(product);
        start.elapsed().as_secs_f64()
    };
    let least = (0..50).map(|_| seconds()).fold(f64::INFINITY, f64::min);
    3.0 * MULTIPLICATIONS as f64 / least
}

/// `n` numbers in -1..1.
fn floats(n: usize) -> Vec<f32> {
    (0..n)
        .map(|i| (i * 7919 % 2003) as f32 / 1001.0 - 1.0)
        .collect()
}

fn codes(n: usize, n_centroids: usize) -> Vec<u16> {
    (0..n)
        .map(|i| (i * 7919 % 10_007 % n_centroids) as u16)
        .collect()
}

/// `n` zeros on a boundary of 64 bytes, as a session has its buffers.
fn zeros(buffer: &mut Vec<f32>, n: usize) -> &mut [f32] {
    buffer.resize(n + 16, 0.0);
    let first = buffer.as_ptr().align_offset(64);
    &mut buffer[first..][..n]
}

/// Time a kernel for the images `input`, of which each has `items` items.
fn run(
    bencher: Bencher<'_, '_>,
    kernel: &dyn Kernel,
    n: usize,
    input: &[f32],
    out_len: usize,
    items: usize,
) {
    let [mut source, mut target, mut scratch] = [const { Vec::new() }; 3];
    let source = zeros(&mut source, input.len());
    source.copy_from_slice(input);
    let target = zeros(&mut target, n * out_len);
    let scratch = zeros(&mut scratch, kernel.scratch_len(n));
    bencher
        .counter(ItemsCount::new(n * items))
        .bench_local(|| kernel.run(n, source, target, scratch));
}

/// A layer on an ISA for a number of images.
#[derive(Clone, Copy)]
struct Case<L> {
    layer: L,
    isa: Isa,
    n: usize,
}

impl<L: fmt::Display> fmt::Display for Case<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} x{} {}", self.layer, self.n, self.isa)
    }
}

fn cases<L: Copy>(layers: &[L], batches: &[usize]) -> Vec<Case<L>> {
    let mut cases = Vec::new();
    for &layer in layers {
        for &n in batches {
            cases.extend(
                Isa::available()
                    .into_iter()
                    .map(|isa| Case { layer, isa, n }),
            );
        }
    }
    cases
}

/// A convolution of `AlexNet`.
#[derive(Clone, Copy)]
struct Conv {
    name: &'static str,
    input: [usize; 3],
    out_channels: usize,
    kernel: usize,
    stride: usize,
    padding: usize,
    groups: usize,
}

impl fmt::Display for Conv {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

const fn conv(
    name: &'static str,
    input: [usize; 3],
    out_channels: usize,
    [kernel, stride, padding, groups]: [usize; 4],
) -> Conv {
    Conv {
        name,
        input,
        out_channels,
        kernel,
        stride,
        padding,
        groups,
    }
}

const CONVS: [Conv; 5] = [
    conv("conv1", [3, 227, 227], 96, [11, 4, 0, 1]),
    conv("conv2", [96, 27, 27], 256, [5, 1, 2, 2]),
    conv("conv3", [256, 13, 13], 384, [3, 1, 1, 1]),
    conv("conv4", [384, 13, 13], 384, [3, 1, 1, 2]),
    conv("conv5", [384, 13, 13], 256, [3, 1, 1, 2]),
];

/// Convolutions of VGG-16, of each size of the map the one that is there most.
const VGG_CONVS: [Conv; 5] = [
    conv("conv1_2", [64, 224, 224], 64, [3, 1, 1, 1]),
    conv("conv2_2", [128, 112, 112], 128, [3, 1, 1, 1]),
    conv("conv3_2", [256, 56, 56], 256, [3, 1, 1, 1]),
    conv("conv4_2", [512, 28, 28], 512, [3, 1, 1, 1]),
    conv("conv5_2", [512, 14, 14], 512, [3, 1, 1, 1]),
];

/// How the weights of a layer are quantised.
#[derive(Clone, Copy)]
struct Setting {
    subvector_dim: usize,
    n_centroids: usize,
    precision: Precision,
}

/// The authors' setting for `AlexNet`.
const PAPER: Setting = paper(Precision::Fast);

const fn paper(precision: Precision) -> Setting {
    Setting {
        subvector_dim: 8,
        n_centroids: 128,
        precision,
    }
}

fn geometry_of(conv: &Conv) -> ConvGeometry {
    ConvGeometry::new(
        conv.name,
        conv.input,
        conv.out_channels,
        [conv.kernel; 2],
        [conv.stride; 2],
        [1; 2],
        [conv.padding; 4],
        conv.groups,
    )
    .expect("published networks are possible")
}

fn bench_conv(bencher: Bencher<'_, '_>, case: &Case<Conv>, setting: Option<Setting>) {
    bench_kernel(bencher, case, setting, "");
}

/// The kernel that is thought the fastest of those whose names end with `name`.
fn kernel_called(
    layer: &ConvLayer<'_>,
    isa: Isa,
    precision: Precision,
    name: &str,
) -> Box<dyn Kernel> {
    let kernels = conv_kernels(layer, isa, precision);
    let mut kernels = kernels.iter().map(Candidate::build);
    let kernel = kernels.find(|kernel| kernel.name().ends_with(name));
    kernel.expect("every layer here has all kernels that are asked for")
}

/// With the kernel that [`kernel_called`] gives.
fn bench_kernel(bencher: Bencher<'_, '_>, case: &Case<Conv>, setting: Option<Setting>, name: &str) {
    let geometry = geometry_of(&case.layer);
    let channels = geometry.group_in_channels();
    let Setting {
        subvector_dim,
        n_centroids,
        precision,
    } = setting.unwrap_or(PAPER);
    let pq = PqGeometry {
        n_subspaces: channels.div_ceil(subvector_dim),
        n_centroids,
        subvector_dim,
        codebook_groups: 1,
        codebook_bits: CodebookBits::Float32,
    };
    let codes_len = geometry.out_channels * geometry.taps() * pq.n_subspaces;
    let codebooks = floats(pq.n_subspaces * pq.n_centroids * pq.subvector_dim);
    let codes = codes(codes_len, pq.n_centroids);
    let dense = floats(geometry.out_channels * channels * geometry.taps());
    let layer = ConvLayer {
        geometry: &geometry,
        weights: if setting.is_some() {
            Weights::ProductQuantized {
                geometry: pq,
                codebooks: &codebooks,
                codes: &codes,
            }
        } else {
            Weights::Dense(&dense)
        },
        bias: None,
    };
    let kernel = kernel_called(&layer, case.isa, precision, name);
    run(
        bencher,
        &*kernel,
        case.n,
        &floats(case.n * geometry.in_channels * geometry.in_pixels()),
        geometry.out_channels * geometry.out_pixels(),
        codes_len * geometry.out_pixels(),
    );
}

#[divan::bench(args = cases(&CONVS, &[1]))]
fn conv_quantized(bencher: Bencher<'_, '_>, case: &Case<Conv>) {
    bench_conv(bencher, case, Some(PAPER));
}

/// The same in float32.
#[divan::bench(args = cases(&CONVS, &[1]))]
fn conv_exact(bencher: Bencher<'_, '_>, case: &Case<Conv>) {
    bench_conv(bencher, case, Some(paper(Precision::Exact)));
}

/// The same with inputs and codewords of 8 bits.
#[divan::bench(args = cases(&CONVS, &[1]))]
fn conv_int8(bencher: Bencher<'_, '_>, case: &Case<Conv>) {
    bench_conv(bencher, case, Some(paper(Precision::Int8)));
}

/// Tables of 32 entries: two registers for each four, or one for each, or rows.
const TWO_REGISTERS: Setting = Setting {
    subvector_dim: 8,
    n_centroids: 32,
    precision: Precision::Int8,
};

#[divan::bench(args = cases(&CONVS[1..], &[1]))]
fn k32_channels(bencher: Bencher<'_, '_>, case: &Case<Conv>) {
    bench_kernel(bencher, case, Some(TWO_REGISTERS), "-i8-channels");
}

#[divan::bench(args = cases(&CONVS[1..], &[1]))]
fn k32_rows(bencher: Bencher<'_, '_>, case: &Case<Conv>) {
    bench_kernel(bencher, case, Some(TWO_REGISTERS), "-i8-rows");
}

/// Tables of 64 entries: a register for each, or rows.
const EIGHT_REGISTERS: Setting = Setting {
    n_centroids: 64,
    ..TWO_REGISTERS
};

#[divan::bench(args = cases(&CONVS[1..], &[1]))]
fn k64_channels(bencher: Bencher<'_, '_>, case: &Case<Conv>) {
    bench_kernel(bencher, case, Some(EIGHT_REGISTERS), "-i8-channels");
}

#[divan::bench(args = cases(&CONVS[1..], &[1]))]
fn k64_rows(bencher: Bencher<'_, '_>, case: &Case<Conv>) {
    bench_kernel(bencher, case, Some(EIGHT_REGISTERS), "-i8-rows");
}

/// With one output per group nearly all time is the tables'.
fn bench_tables(bencher: Bencher<'_, '_>, case: &Case<Conv>, precision: Precision, name: &str) {
    let out_channels = case.layer.groups;
    let layer = Conv {
        out_channels,
        ..case.layer
    };
    let case = Case { layer, ..*case };
    bench_kernel(bencher, &case, Some(paper(precision)), name);
}

/// Tables of float32.
#[divan::bench(args = cases(&CONVS, &[1]))]
fn tables_exact(bencher: Bencher<'_, '_>, case: &Case<Conv>) {
    bench_tables(bencher, case, Precision::Exact, "-f32-rows");
}

/// Tables of 16 bits, of inputs of 16 bits.
#[divan::bench(args = cases(&CONVS, &[1]))]
fn tables_fast(bencher: Bencher<'_, '_>, case: &Case<Conv>) {
    bench_tables(bencher, case, Precision::Fast, "-i16-rows");
}

/// Tables of 16 bits, of inputs of 8 bits.
#[divan::bench(args = cases(&CONVS, &[1]))]
fn tables_int8(bencher: Bencher<'_, '_>, case: &Case<Conv>) {
    bench_tables(bencher, case, Precision::Int8, "-i8-rows");
}

#[divan::bench(args = cases(&CONVS, &[1]))]
fn conv_dense(bencher: Bencher<'_, '_>, case: &Case<Conv>) {
    bench_conv(bencher, case, None);
}

/// At a setting that 8-bit tables are for.
#[divan::bench(args = cases(&VGG_CONVS, &[1]))]
fn conv_vgg_int8(bencher: Bencher<'_, '_>, case: &Case<Conv>) {
    let setting = Setting {
        subvector_dim: 4,
        n_centroids: 16,
        precision: Precision::Int8,
    };
    bench_conv(bencher, case, Some(setting));
}

const BINARY_CONVS: [Conv; 4] = [
    conv("128@28", [128, 28, 28], 128, [3, 1, 1, 1]),
    conv("256@28", [256, 28, 28], 256, [3, 1, 1, 1]),
    conv("256@14", [256, 14, 14], 256, [3, 1, 1, 1]),
    conv("512@14", [512, 14, 14], 512, [3, 1, 1, 1]),
];

/// The first layer of a binary network: its input is an image, here of 8 bits.
const FIRST: [Conv; 1] = [conv("3@32", [3, 32, 32], 128, [3, 1, 1, 1])];

/// With inputs of 1 and -1 the same weights are packed, with those of 8 bits they become
/// bytes, with others they are dense.
fn bench_binary(bencher: Bencher<'_, '_>, case: &Case<Conv>, input: Levels, name: &str) {
    let geometry = geometry_of(&case.layer);
    let weights = geometry.out_channels * geometry.group_in_channels() * geometry.taps();
    let sign = |i: usize| {
        if (i * 7919 % 2003).is_multiple_of(2) {
            1
        } else {
            -1
        }
    };
    let signs: Vec<i8> = (0..weights).map(sign).collect();
    let layer = ConvLayer {
        geometry: &geometry,
        weights: Weights::Binary {
            signs: &signs,
            input,
        },
        bias: None,
    };
    let kernel = kernel_called(&layer, case.isa, Precision::Exact, name);
    let in_len = geometry.in_channels * geometry.in_pixels();
    let values: Vec<f32> = (0..in_len).map(|i| f32::from(sign(i))).collect();
    let out_len = geometry.out_channels * geometry.out_pixels();
    let products = weights * geometry.out_pixels();
    run(bencher, &*kernel, 1, &values, out_len, products);
}

#[divan::bench(args = cases(&BINARY_CONVS, &[1]))]
fn conv_binary(bencher: Bencher<'_, '_>, case: &Case<Conv>) {
    bench_binary(bencher, case, Levels::Signs, "");
}

#[divan::bench(args = cases(&BINARY_CONVS, &[1]))]
fn conv_binary_dense(bencher: Bencher<'_, '_>, case: &Case<Conv>) {
    bench_binary(bencher, case, Levels::Any, "");
}

/// Products of bytes.
#[divan::bench(args = cases(&FIRST, &[1]))]
fn first_binary_bytes(bencher: Bencher<'_, '_>, case: &Case<Conv>) {
    let (step, zero) = (1.0, 128);
    let levels = Levels::Grid(Grid { step, zero });
    bench_binary(bencher, case, levels, "-i8-gemm");
}

/// One of the eight planes of bits that an image could be taken apart to.
#[divan::bench(args = cases(&FIRST, &[1]))]
fn first_binary_plane(bencher: Bencher<'_, '_>, case: &Case<Conv>) {
    bench_binary(bencher, case, Levels::Signs, "-b1-xnor");
}

#[divan::bench(args = cases(&FIRST, &[1]))]
fn first_binary_dense(bencher: Bencher<'_, '_>, case: &Case<Conv>) {
    bench_binary(bencher, case, Levels::Any, "");
}

/// A fully connected layer of `AlexNet`.
#[derive(Clone, Copy)]
struct Fc {
    name: &'static str,
    inputs: usize,
    outputs: usize,
    n_centroids: usize,
    subvector_dim: usize,
}

impl fmt::Display for Fc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

const FCS: [Fc; 3] = [
    Fc {
        name: "fc6",
        inputs: 9216,
        outputs: 4096,
        n_centroids: 32,
        subvector_dim: 4,
    },
    Fc {
        name: "fc7",
        inputs: 4096,
        outputs: 4096,
        n_centroids: 32,
        subvector_dim: 4,
    },
    Fc {
        name: "fc8",
        inputs: 4096,
        outputs: 1000,
        n_centroids: 16,
        subvector_dim: 1,
    },
];

/// Product-quantised for a precision, or dense.
fn bench_fc(bencher: Bencher<'_, '_>, case: &Case<Fc>, precision: Option<Precision>) {
    let fc = &case.layer;
    let quantized = precision.is_some();
    let pq = PqGeometry {
        n_subspaces: fc.inputs.div_ceil(fc.subvector_dim),
        n_centroids: fc.n_centroids,
        subvector_dim: fc.subvector_dim,
        codebook_groups: 1,
        codebook_bits: CodebookBits::Float32,
    };
    let codes_len = fc.outputs * pq.n_subspaces;
    let codebooks = floats(pq.n_subspaces * pq.n_centroids * pq.subvector_dim);
    let codes = codes(codes_len, pq.n_centroids);
    let dense = floats(if quantized { 0 } else { fc.inputs * fc.outputs });
    let layer = FcLayer {
        in_features: fc.inputs,
        out_features: fc.outputs,
        weights: if quantized {
            Weights::ProductQuantized {
                geometry: pq,
                codebooks: &codebooks,
                codes: codes.as_slice().into(),
            }
        } else {
            Weights::Dense(&dense)
        },
        bias: None,
    };
    let precision = precision.unwrap_or_default();
    let kernel = fc_kernels(&layer, case.isa, precision)[0].build();
    run(
        bencher,
        &*kernel,
        case.n,
        &floats(case.n * fc.inputs),
        fc.outputs,
        codes_len,
    );
}

#[divan::bench(args = cases(&FCS, &[1, 16]))]
fn fc_quantized(bencher: Bencher<'_, '_>, case: &Case<Fc>) {
    bench_fc(bencher, case, Some(Precision::Fast));
}

/// The same with 8-bit tables, where they are faster.
#[divan::bench(args = cases(&FCS, &[1, 16]))]
fn fc_int8(bencher: Bencher<'_, '_>, case: &Case<Fc>) {
    bench_fc(bencher, case, Some(Precision::Int8));
}

#[divan::bench(args = cases(&FCS, &[1, 16]))]
fn fc_dense(bencher: Bencher<'_, '_>, case: &Case<Fc>) {
    bench_fc(bencher, case, None);
}
