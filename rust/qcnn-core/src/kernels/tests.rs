//! Every kernel of every level this CPU has against the reference.

use proptest::prelude::*;

use super::entry::Entry;
use super::{
    Candidate, ConvLayer, FcLayer, Grid, Kernel, Levels, Weights, bytes, channels, scalar,
};
use super::{conv_kernels, conv_kernels_of, fc_kernels, fc_kernels_of};
use crate::geometry::ConvGeometry;
use crate::graph::{CodebookBits, PqGeometry};
use crate::isa::{Isa, Portable, Simd};
use crate::ops::norm::BatchNorm;
use crate::ops::quantize::sign;
use crate::pack::{Codes, pack};
use crate::precision::Precision;

/// Numbers that look random, the same on every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In -1..1.
    fn float(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    /// Nearly: the sum of as many uniform numbers as give a variance of 1.
    fn gaussian(&mut self) -> f32 {
        (0..3).map(|_| self.float()).sum()
    }

    fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.float()).collect()
    }

    fn codes(&mut self, n: usize, n_centroids: usize) -> Vec<u16> {
        (0..n)
            .map(|_| (self.next() % n_centroids as u64) as u16)
            .collect()
    }
}

/// How a test case's weights are quantised.
#[derive(Clone, Copy, Debug)]
struct Pq {
    n_centroids: usize,
    subvector_dim: usize,
    /// Sets of codebooks per group of a convolution, if they can be equal; 0 is one
    /// for all groups.
    parts: usize,
}

/// Parameters of one layer, owned.
struct Parameters {
    geometry: Option<PqGeometry>,
    floats: Vec<f32>,
    codes: Vec<u16>,
    bias: Option<Vec<f32>>,
}

impl Parameters {
    fn new(
        random: &mut Random,
        [outputs, channels, taps, groups]: [usize; 4],
        pq: Option<Pq>,
        bias: bool,
    ) -> Self {
        let bias = bias.then(|| random.floats(outputs));
        let Some(pq) = pq else {
            return Self {
                geometry: None,
                floats: random.floats(outputs * channels * taps),
                codes: Vec::new(),
                bias,
            };
        };
        let geometry = PqGeometry {
            n_subspaces: channels.div_ceil(pq.subvector_dim),
            n_centroids: pq.n_centroids,
            subvector_dim: pq.subvector_dim,
            codebook_groups: match pq.parts {
                0 => 1,
                parts if (outputs / groups).is_multiple_of(parts) => groups * parts,
                _ => groups,
            },
            codebook_bits: CodebookBits::Float32,
        };
        let codebooks =
            geometry.codebook_groups * geometry.n_subspaces * pq.n_centroids * pq.subvector_dim;
        let codes = outputs * taps * geometry.n_subspaces;
        Self {
            geometry: Some(geometry),
            floats: random.floats(codebooks),
            codes: random.codes(codes, pq.n_centroids),
            bias,
        }
    }

    fn weights<'a, C: From<&'a [u16]>>(&'a self) -> Weights<'a, C> {
        match self.geometry {
            None => Weights::Dense(&self.floats),
            Some(geometry) => Weights::ProductQuantized {
                geometry,
                codebooks: &self.floats,
                codes: C::from(&self.codes),
            },
        }
    }

    /// The codes as a file holds them.
    fn packed(&self) -> Vec<u8> {
        let bits = self.geometry.map_or(1, |pq| pq.code_bits());
        pack(&self.codes, bits)
    }

    /// With codes that are [`packed`](Self::packed).
    fn packed_weights<'a>(&'a self, bytes: &'a [u8]) -> Weights<'a, Codes<'a>> {
        match self.geometry {
            None => Weights::Dense(&self.floats),
            Some(geometry) => Weights::ProductQuantized {
                geometry,
                codebooks: &self.floats,
                codes: Codes::Packed {
                    bytes,
                    n: self.codes.len(),
                    bits: geometry.code_bits(),
                },
            },
        }
    }
}

/// The reference's result, and how far a kernel may be from it.
struct Expected {
    values: Vec<f32>,
    /// Sums of the terms' magnitudes.
    magnitudes: Vec<f32>,
    /// For float32 kernels.
    tolerances: Vec<f32>,
    /// What 8-bit tables may add to that.
    byte_tolerances: Vec<f32>,
    /// What inputs and weights of 8 bits may.
    factor_tolerances: Vec<f32>,
}

impl Expected {
    /// `run` computes a layer for given weights, bias and input; `terms` are the
    /// products summed for an output.
    fn new(
        dense: &[f32],
        bias: Option<&[f32]>,
        input: &[f32],
        terms: usize,
        run: impl Fn(&[f32], Option<&[f32]>, &[f32]) -> Vec<f32>,
    ) -> Self {
        let abs = |values: &[f32]| -> Vec<f32> { values.iter().map(|v| v.abs()).collect() };
        let magnitudes = run(&abs(dense), bias.map(abs).as_deref(), &abs(input));
        // Each of the t additions in an order of the kernel's choice rounds by
        // up to 2^-24 of a partial sum, which is at most the sum of magnitudes.
        // Independent errors grow with the square root of t; the factor leaves
        // room for the tail. The 1 is the rounding of the reference's result.
        let factor = (1.0 + 4.0 * (terms as f32 + 1.0).sqrt()) * f32::EPSILON / 2.0;
        Self {
            values: run(dense, bias, input),
            tolerances: magnitudes.iter().map(|m| m * factor).collect(),
            magnitudes,
            byte_tolerances: Vec::new(),
            factor_tolerances: Vec::new(),
        }
    }

    /// What is wrong with `kernel`, if anything.
    fn check(&self, kernel: &dyn Kernel, n: usize, input: &[f32]) -> Result<(), String> {
        // Whatever a kernel does not write, or reads without having written it,
        // shows as NaN.
        let mut output = vec![f32::NAN; self.values.len()];
        let mut scratch = vec![f32::NAN; kernel.scratch_len(n)];
        kernel.run(n, input, &mut output, &mut scratch);
        // The scale of 16-bit kernels follows the greatest values of an image.
        let reduced = kernel.name().contains("-i16-") || kernel.name().contains("-f16-");
        let len = (output.len() / n.max(1)).max(1);
        let greatest: Vec<f32> = self
            .magnitudes
            .chunks(len)
            .map(|image| 2e-3 * image.iter().fold(0.0, |a: f32, b| a.max(*b)))
            .collect();
        let of_image = |i: usize| greatest[i / len];
        let tolerance = |i: usize| {
            if kernel.name().ends_with("-i8-channels") || kernel.name().ends_with("-i8-permute") {
                self.tolerances[i] + self.byte_tolerances[i]
            } else if kernel.name().contains("-i8-") {
                // The scale of 16-bit sums goes in powers of two.
                2.0 * of_image(i) + self.factor_tolerances[i]
            } else if reduced {
                of_image(i)
            } else {
                self.tolerances[i]
            }
        };
        let wrong = (0..output.len()).find(|&i| {
            let error = (output[i] - self.values[i]).abs();
            error.is_nan() || error > tolerance(i)
        });
        if let Some(i) = wrong {
            return Err(format!(
                "{}: element {i} is {}, expected {} +- {:e}",
                kernel.name(),
                output[i],
                self.values[i],
                tolerance(i)
            ));
        }
        let mut relu = vec![f32::NAN; output.len()];
        if kernel.run_relu(n, input, &mut relu, &mut scratch) {
            for (relu, y) in relu.iter_mut().zip(&output) {
                *relu -= y.max(0.0);
            }
            if relu.iter().any(|difference| *difference != 0.0) {
                return Err(format!("{}: ReLU makes a difference", kernel.name()));
            }
        }
        // Alone, an image gives the same bits as in the batch, whatever large
        // numbers the scratch holds.
        scratch.fill(1e30);
        for image in 0..n {
            let input = &input[image * (input.len() / n)..][..input.len() / n];
            let mut alone = vec![f32::NAN; output.len() / n];
            kernel.run(1, input, &mut alone, &mut scratch);
            if alone != output[image * alone.len()..][..alone.len()] {
                return Err(format!(
                    "{}: image {image} depends on the batch",
                    kernel.name()
                ));
            }
        }
        Ok(())
    }
}

#[derive(Clone, Debug)]
struct ConvCase {
    n: usize,
    /// channels, height, width
    input: [usize; 3],
    out_channels: usize,
    kernel: [usize; 2],
    stride: [usize; 2],
    dilation: [usize; 2],
    padding: [usize; 4],
    groups: usize,
    bias: bool,
    pq: Option<Pq>,
}

impl Default for ConvCase {
    fn default() -> Self {
        Self {
            n: 1,
            input: [3, 5, 5],
            out_channels: 4,
            kernel: [3, 3],
            stride: [1, 1],
            dilation: [1, 1],
            padding: [0; 4],
            groups: 1,
            bias: true,
            pq: None,
        }
    }
}

/// Kernels on every ISA of the host, and with the vectors of AVX-512.
fn all_conv_kernels<'a>(layer: &'a ConvLayer<'a>) -> Vec<Candidate<'a>> {
    let isas = Isa::available().into_iter();
    let mut kernels: Vec<_> = isas
        .flat_map(|isa| conv_kernels(layer, isa, Precision::Int8))
        .collect();
    kernels.extend(conv_kernels_of(
        layer,
        Portable::<16>::new().unwrap(),
        Precision::Int8,
    ));
    kernels
}

/// As [`all_conv_kernels`].
fn all_fc_kernels<'a>(layer: &'a FcLayer<'a>) -> Vec<Candidate<'a>> {
    let isas = Isa::available().into_iter();
    let mut kernels: Vec<_> = isas
        .flat_map(|isa| fc_kernels(layer, isa, Precision::Int8))
        .collect();
    kernels.extend(fc_kernels_of(
        layer,
        Portable::<16>::new().unwrap(),
        Precision::Int8,
    ));
    kernels
}

/// The documented bounds of the errors of 8-bit tables, for each output; nothing
/// for dense layers.
fn byte_tolerances(layer: &ConvLayer<'_>, n: usize, input: &[f32]) -> Vec<f32> {
    let Weights::ProductQuantized {
        geometry: pq,
        codebooks,
        ..
    } = layer.weights
    else {
        return Vec::new();
    };
    let g = layer.geometry;
    let (channels, dim) = (g.group_in_channels(), pq.subvector_dim);
    // For each set and channel the greatest component of a codeword.
    let peaks: Vec<f32> = (0..pq.codebook_groups)
        .flat_map(|set| {
            (0..channels).map(move |c| {
                let codebook = (set * pq.n_subspaces + c / dim) * pq.n_centroids * dim;
                let components = codebooks[codebook..][..pq.n_centroids * dim].iter();
                let components = components.skip(c % dim).step_by(dim);
                components.fold(0.0, |peak: f32, c| peak.max(c.abs()))
            })
        })
        .collect();
    let set_peaks = |set: usize| &peaks[set * channels..][..channels];
    let set_outputs = g.out_channels / pq.codebook_groups;
    // The sum of the bounds of all subspaces and taps, which every output has.
    let weights: Vec<f32> = (0..g.out_channels)
        .flat_map(|o| set_peaks(o / set_outputs))
        .flat_map(|peak| std::iter::repeat_n(*peak, g.taps()))
        .collect();
    let magnitudes: Vec<f32> = input.iter().map(|x| x.abs()).collect();
    let bounds = ConvLayer {
        geometry: g,
        weights: Weights::Dense(&weights),
        bias: None,
    };
    let mut sums = vec![0.0; n * g.out_channels * g.out_pixels()];
    scalar::conv(&bounds, n, &magnitudes, &mut sums);
    // The greatest bound of a pair is at most the greatest of all subspaces.
    let part_outputs = set_outputs.min(g.group_out_channels());
    let parts_of_group = g.group_out_channels() / part_outputs;
    let groups = magnitudes.chunks_exact(channels * g.in_pixels());
    let parts = groups.flat_map(|group| std::iter::repeat_n(group, parts_of_group));
    let greatest = parts.enumerate().map(|(i, group)| {
        let set = i % (g.groups * parts_of_group) % pq.codebook_groups;
        (0..g.in_pixels())
            .map(|pixel| {
                let pixels = group[pixel..].iter().step_by(g.in_pixels());
                let products = pixels.zip(set_peaks(set));
                products.map(|(x, peak)| x * peak).sum::<f32>()
            })
            .fold(0.0, f32::max)
    });
    let limit = channels::limit(dim);
    let rounding = 0.5 + dim as f32 / 256.0;
    let pairs = (g.taps() * pq.n_subspaces.div_ceil(8) * 4) as f32;
    let part_len = part_outputs * g.out_pixels();
    for (sums, greatest) in sums.chunks_exact_mut(part_len).zip(greatest) {
        let step = greatest / (127.0 * limit);
        for sum in sums {
            *sum = 2.0 * rounding * (*sum / limit + pairs * step) * 1.001;
        }
    }
    sums
}

/// The documented bound of the errors of a fully connected layer's 8-bit tables, for each
/// image: in every chunk half a step for each subspace.
fn fc_byte_tolerances(parameters: &Parameters, input: &[f32], inputs: usize) -> Vec<f32> {
    let Some(pq) = parameters.geometry else {
        return vec![0.0; input.len() / inputs];
    };
    let codebooks = parameters
        .floats
        .chunks_exact(pq.n_centroids * pq.subvector_dim);
    let codebooks: Vec<&[f32]> = codebooks.collect();
    let of_image = |input: &[f32]| -> f32 {
        let subspaces = input.chunks(pq.subvector_dim).zip(&codebooks);
        let greatest: Vec<f32> = subspaces
            .map(|(input, codewords)| {
                let codewords = codewords.chunks_exact(pq.subvector_dim);
                let products = codewords.map(|codeword| dot(codeword, input).abs() as f32);
                products.fold(0.0, f32::max)
            })
            .collect();
        let chunks = greatest.chunks(bytes::CHUNK);
        let bounds = chunks.map(|chunk| {
            let greatest = chunk.iter().copied().fold(0.0, f32::max);
            chunk.len() as f32 * greatest / 254.0
        });
        1.001 * bounds.sum::<f32>()
    };
    input.chunks_exact(inputs).map(of_image).collect()
}

/// What rounding inputs and weights to 8 bits may do to each output, for weights and inputs
/// whose magnitudes give `magnitudes`: half a step each, of the range of an image and of
/// all weights.
fn factor_tolerances(
    layer: &ConvLayer<'_>,
    n: usize,
    input: &[f32],
    magnitudes: &[f32],
) -> Vec<f32> {
    let peak = |values: &[f32]| values.iter().fold(0.0, |peak: f32, x| peak.max(x.abs()));
    let raised = |values: &[f32], by: f32| -> Vec<f32> {
        values.iter().map(|x| x.abs() + by * 1.001).collect()
    };
    let Weights::ProductQuantized { codebooks, .. } = layer.weights else {
        return Vec::new();
    };
    let weights = raised(&layer.decode(), peak(codebooks) / 254.0);
    let images = input.chunks_exact(input.len() / n.max(1));
    let input: Vec<f32> = images.flat_map(|x| raised(x, peak(x) / 254.0)).collect();
    let mut sums = vec![0.0; magnitudes.len()];
    let bias: Option<Vec<f32>> = layer
        .bias
        .map(|bias| bias.iter().map(|b| b.abs()).collect());
    let raised = ConvLayer {
        geometry: layer.geometry,
        weights: Weights::Dense(&weights),
        bias: bias.as_deref(),
    };
    scalar::conv(&raised, n, &input, &mut sums);
    let pairs = sums.iter().zip(magnitudes);
    pairs.map(|(sum, magnitude)| sum - magnitude).collect()
}

impl ConvCase {
    /// The geometry, unless the case is impossible.
    fn geometry(&self) -> Option<ConvGeometry> {
        ConvGeometry::new(
            "case",
            self.input,
            self.out_channels,
            self.kernel,
            self.stride,
            self.dilation,
            self.padding,
            self.groups,
        )
        .ok()
    }

    fn check(&self) -> Result<(), String> {
        let geometry = self.geometry().ok_or("impossible geometry")?;
        let mut random = Random(1);
        let extents = [
            geometry.out_channels,
            geometry.group_in_channels(),
            geometry.taps(),
            geometry.groups,
        ];
        let parameters = Parameters::new(&mut random, extents, self.pq, self.bias);
        let input = random.floats(self.n * self.input.iter().product::<usize>());
        let layer = ConvLayer {
            geometry: &geometry,
            weights: parameters.weights(),
            bias: parameters.bias.as_deref(),
        };
        let terms = geometry.group_in_channels() * geometry.taps();
        let mut expected = Expected::new(
            &layer.decode(),
            layer.bias,
            &input,
            terms,
            |weight, bias, input| {
                let mut output = vec![0.0; self.n * geometry.out_channels * geometry.out_pixels()];
                let layer = ConvLayer {
                    geometry: &geometry,
                    weights: Weights::Dense(weight),
                    bias,
                };
                scalar::conv(&layer, self.n, input, &mut output);
                output
            },
        );
        expected.byte_tolerances = byte_tolerances(&layer, self.n, &input);
        expected.factor_tolerances =
            factor_tolerances(&layer, self.n, &input, &expected.magnitudes);
        let failures: Vec<String> = all_conv_kernels(&layer)
            .iter()
            .filter_map(|kernel| {
                let kernel = kernel.build();
                let result = expected.check(&*kernel, self.n, &input);
                let pooled = || check_pooled(&*kernel, &geometry, self.n, &input);
                result.and_then(|()| pooled()).err()
            })
            .collect();
        if failures.is_empty() {
            Ok(())
        } else {
            Err(format!("{self:?}:\n    {}", failures.join("\n    ")))
        }
    }
}

#[derive(Clone, Debug)]
struct FcCase {
    n: usize,
    inputs: usize,
    outputs: usize,
    bias: bool,
    pq: Option<Pq>,
}

impl FcCase {
    fn check(&self) -> Result<(), String> {
        let mut random = Random(2);
        let extents = [self.outputs, self.inputs, 1, 1];
        let pq = self.pq.map(|pq| Pq { parts: 0, ..pq });
        let parameters = Parameters::new(&mut random, extents, pq, self.bias);
        let input = random.floats(self.n * self.inputs);
        let packed = parameters.packed();
        let layer = FcLayer {
            in_features: self.inputs,
            out_features: self.outputs,
            weights: parameters.packed_weights(&packed),
            bias: parameters.bias.as_deref(),
        };
        let mut expected = Expected::new(
            &layer.decode(),
            layer.bias,
            &input,
            self.inputs,
            |weight, bias, input| {
                let mut output = vec![0.0; self.n * self.outputs];
                let layer = FcLayer {
                    weights: Weights::Dense(weight),
                    bias,
                    ..layer
                };
                scalar::fc(&layer, self.n, input, &mut output);
                output
            },
        );
        expected.byte_tolerances = fc_byte_tolerances(&parameters, &input, self.inputs)
            .into_iter()
            .flat_map(|tolerance| std::iter::repeat_n(tolerance, self.outputs))
            .collect();
        let failures: Vec<String> = all_fc_kernels(&layer)
            .iter()
            .filter_map(|kernel| expected.check(&*kernel.build(), self.n, &input).err())
            .collect();
        if failures.is_empty() {
            Ok(())
        } else {
            Err(format!("{self:?}:\n    {}", failures.join("\n    ")))
        }
    }
}

/// Pooled responses are the greatest of those that are not, to the bit.
fn check_pooled(
    kernel: &dyn Kernel,
    geometry: &ConvGeometry,
    n: usize,
    input: &[f32],
) -> Result<(), String> {
    let [height, width] = geometry.out_size.map(|extent| extent / 2);
    if !kernel.pools() || height * width == 0 {
        return Ok(());
    }
    let mut scratch = vec![f32::NAN; kernel.scratch_len(n)];
    let mut responses = vec![f32::NAN; n * geometry.out_channels * geometry.out_pixels()];
    kernel.run(n, input, &mut responses, &mut scratch);
    for relu in [false, true] {
        let mut pooled = vec![f32::NAN; n * geometry.out_channels * height * width];
        kernel.run_pooled(relu, n, input, &mut pooled, &mut scratch);
        let floor = if relu { 0.0 } else { f32::NEG_INFINITY };
        let maps = responses.chunks_exact(geometry.out_pixels());
        let expected = maps.flat_map(|map| {
            (0..height * width).map(move |i| {
                let first = i / width * 2 * geometry.out_size[1] + i % width * 2;
                [0, 1, geometry.out_size[1], geometry.out_size[1] + 1]
                    .into_iter()
                    .fold(floor, |greatest: f32, at| greatest.max(map[first + at]))
            })
        });
        if !pooled.iter().copied().eq(expected) {
            return Err(format!("{}: pooled responses differ", kernel.name()));
        }
    }
    Ok(())
}

fn report(failures: &[String]) {
    assert!(
        failures.is_empty(),
        "{} failures:\n{}",
        failures.len(),
        failures.join("\n")
    );
}

/// Codebooks shared by all groups.
#[expect(
    clippy::unnecessary_wraps,
    reason = "cases that are not quantised have `None`"
)]
fn pq(n_centroids: usize, subvector_dim: usize) -> Option<Pq> {
    Some(Pq {
        n_centroids,
        subvector_dim,
        parts: 0,
    })
}

#[test]
#[expect(clippy::float_cmp, reason = "no number here needs rounding")]
fn reference_on_a_case_done_by_hand() {
    let geometry =
        ConvGeometry::new("x", [2, 2, 2], 1, [2, 1], [1, 1], [1, 1], [1, 0, 0, 0], 1).unwrap();
    let layer = ConvLayer {
        geometry: &geometry,
        weights: Weights::ProductQuantized {
            geometry: PqGeometry {
                n_subspaces: 1,
                n_centroids: 2,
                subvector_dim: 3,
                codebook_groups: 1,
                codebook_bits: CodebookBits::Float32,
            },
            // The third channel of each codeword is padding.
            codebooks: &[1.0, 2.0, 99.0, 10.0, 20.0, 99.0],
            codes: &[1, 0],
        },
        bias: Some(&[0.5]),
    };
    assert_eq!(layer.decode(), [10.0, 1.0, 20.0, 2.0]);
    let mut output = [0.0; 4];
    scalar::conv(
        &layer,
        1,
        &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
        &mut output,
    );
    assert_eq!(output, [11.5, 14.5, 127.5, 160.5]);
}

#[test]
fn conv_map_widths_around_the_vectors() {
    let mut failures = Vec::new();
    for pq in [None, pq(5, 2), pq(64, 3)] {
        for width in (1..=19).chain([31, 32, 33, 47, 48, 49, 63, 64, 65, 97]) {
            for kernel in [[1, 1], [3, 3], [1, 4]] {
                let case = ConvCase {
                    n: 2,
                    input: [3, 4, width],
                    kernel,
                    padding: [1, 1, 1, 2],
                    pq,
                    ..ConvCase::default()
                };
                failures.extend(case.check().err());
            }
        }
    }
    report(&failures);
}

#[test]
fn conv_channels_around_the_tiles() {
    let mut failures = Vec::new();
    for pq in [None, pq(7, 4)] {
        for out_channels in (1..=14).chain([23, 24, 25, 47]) {
            for in_channels in [1, 2, 4, 5, 8, 9] {
                let case = ConvCase {
                    input: [in_channels, 6, 7],
                    out_channels,
                    pq,
                    bias: out_channels % 2 == 0,
                    ..ConvCase::default()
                };
                failures.extend(case.check().err());
            }
        }
    }
    report(&failures);
}

#[test]
fn conv_outputs_around_the_blocks_of_tables_in_registers() {
    let mut failures = Vec::new();
    for n_centroids in [16, 32, 33, 64] {
        for out_channels in [15, 16, 17, 31, 32, 33, 63, 64, 65, 130] {
            // Octets that are full and that are not, and strips of all lengths.
            for (in_channels, width) in [(7, 4), (8, 5), (9, 6), (17, 9)] {
                let case = ConvCase {
                    input: [in_channels, 4, width],
                    out_channels,
                    padding: [0, 1, 1, 0],
                    pq: pq(n_centroids, 1),
                    ..ConvCase::default()
                };
                failures.extend(case.check().err());
            }
        }
    }
    report(&failures);
}

#[test]
fn conv_blocks() {
    // More products, outputs and pixels than one block of any kernel holds.
    let mut failures = Vec::new();
    for pq in [None, pq(16, 8), pq(128, 6), pq(300, 8)] {
        for (input, out_channels, kernel) in [
            ([300, 4, 5], 9, [3, 3]),
            ([40, 5, 5], 190, [3, 3]),
            ([5, 40, 45], 7, [3, 3]),
            ([64, 15, 15], 40, [1, 1]),
            ([3, 70, 70], 5, [5, 5]),
        ] {
            let case = ConvCase {
                input,
                out_channels,
                kernel,
                padding: [1; 4],
                pq,
                ..ConvCase::default()
            };
            failures.extend(case.check().err());
        }
    }
    report(&failures);
}

/// Input, kernel and stride of layers with 96 outputs whose maps whole vectors, or equal
/// parts of them, cover badly.
pub(super) const UNEVEN: [([usize; 3], [usize; 2], [usize; 2]); 4] = [
    ([4, 8, 16], [3, 3], [1, 1]),
    ([4, 8, 32], [3, 3], [1, 1]),
    ([4, 8, 34], [5, 5], [1, 1]),
    ([4, 16, 32], [3, 3], [1, 2]),
];

#[test]
fn conv_columns_in_two_blocks() {
    let mut failures = Vec::new();
    for (input, kernel, stride) in UNEVEN {
        let case = ConvCase {
            input,
            out_channels: 96,
            kernel,
            stride,
            padding: [1; 4],
            pq: pq(16, 4),
            ..ConvCase::default()
        };
        failures.extend(case.check().err());
    }
    report(&failures);
}

/// Rows of tiles of pixels, the last of which has one, or whose windows end in the next.
#[test]
fn conv_tiles_of_few_pixels() {
    let mut failures = Vec::new();
    for width in [1, 17, 32, 47, 241] {
        let case = ConvCase {
            input: [4, 3, width],
            out_channels: 1,
            kernel: [1, 1],
            pq: pq(4, 4),
            ..ConvCase::default()
        };
        failures.extend(case.check().err());
    }
    report(&failures);
}

#[test]
fn conv_strides_dilations_groups() {
    let mut failures = Vec::new();
    for pq in [
        None,
        pq(4, 2),
        Some(Pq {
            n_centroids: 6,
            subvector_dim: 2,
            parts: 1,
        }),
        Some(Pq {
            n_centroids: 5,
            subvector_dim: 3,
            parts: 2,
        }),
        // Registers of 64 entries.
        Some(Pq {
            n_centroids: 40,
            subvector_dim: 1,
            parts: 1,
        }),
    ] {
        for (kernel, stride, dilation, groups) in [
            ([3, 3], [2, 2], [1, 1], 1),
            ([3, 3], [2, 2], [1, 1], 2),
            ([3, 3], [1, 1], [2, 2], 3),
            ([3, 2], [3, 2], [2, 3], 6),
            ([1, 1], [2, 2], [1, 1], 2),
            ([2, 2], [5, 4], [1, 1], 1),
            ([11, 11], [4, 4], [1, 1], 1),
            ([11, 10], [4, 4], [1, 1], 3),
            ([5, 1], [1, 3], [2, 1], 3),
            // More taps than are summed in 16 bits, and more columns than fit the
            // registers of one sum.
            ([7, 7], [1, 1], [1, 1], 2),
            ([9, 5], [1, 1], [1, 1], 1),
            ([7, 7], [2, 1], [2, 2], 1),
            ([2, 9], [1, 1], [1, 1], 1),
            ([3, 3], [1, 1], [1, 6], 1),
        ] {
            let case = ConvCase {
                n: 3,
                input: [6, 13, 14],
                out_channels: 12,
                kernel,
                stride,
                dilation,
                padding: [2, 0, 1, 3],
                groups,
                pq,
                ..ConvCase::default()
            };
            failures.extend(case.check().err());
        }
    }
    report(&failures);
}

#[test]
fn conv_codebook_sizes() {
    let mut failures = Vec::new();
    for n_centroids in [
        1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 256, 257, 1000, 65536,
    ] {
        let case = ConvCase {
            input: [3, 9, 9],
            pq: pq(n_centroids, 2),
            ..ConvCase::default()
        };
        failures.extend(case.check().err());
    }
    report(&failures);
}

#[test]
fn fc_sizes_around_the_tiles() {
    let mut failures = Vec::new();
    for pq in [None, pq(5, 3), pq(32, 4), pq(16, 1)] {
        for outputs in (1..=9).chain([15, 16, 17, 31, 32, 33, 100]) {
            for inputs in [1, 2, 7, 8, 9, 63, 300] {
                for n in [1, 2, 5, 6, 7, 9, 17] {
                    let case = FcCase {
                        n,
                        inputs,
                        outputs,
                        bias: inputs % 2 == 0,
                        pq,
                    };
                    failures.extend(case.check().err());
                }
            }
        }
    }
    report(&failures);
}

#[test]
fn fc_joint_tables() {
    // Enough outputs for a joint table of two codes, or one too few.
    let mut failures = Vec::new();
    for (n_centroids, outputs) in [
        (16, 63),
        (16, 64),
        (20, 256),
        (32, 300),
        (33, 1024),
        (64, 1030),
        (65, 5000),
    ] {
        for inputs in [3, 17, 64] {
            let case = FcCase {
                n: 5,
                inputs,
                outputs,
                bias: true,
                pq: pq(n_centroids, 2),
            };
            failures.extend(case.check().err());
        }
    }
    report(&failures);
}

#[test]
fn fc_codebook_sizes() {
    let mut failures = Vec::new();
    for n_centroids in [
        1, 2, 3, 15, 16, 17, 32, 33, 64, 65, 128, 255, 256, 257, 1000, 65536,
    ] {
        for n in [1, 10] {
            let case = FcCase {
                n,
                inputs: 11,
                outputs: 70,
                bias: true,
                pq: pq(n_centroids, 2),
            };
            failures.extend(case.check().err());
        }
    }
    report(&failures);
}

#[test]
fn fc_blocks() {
    // More outputs and subspaces than one block of any kernel holds.
    let mut failures = Vec::new();
    for pq in [pq(16, 1), pq(32, 4), pq(64, 2)] {
        for (n, inputs, outputs) in [(3, 101, 513), (37, 211, 385), (8, 450, 1100)] {
            let case = FcCase {
                n,
                inputs,
                outputs,
                bias: true,
                pq,
            };
            failures.extend(case.check().err());
        }
    }
    report(&failures);
}

/// A fully connected layer of Gaussian codewords, and its decoded weights.
fn gaussian_fc(
    inputs: usize,
    outputs: usize,
    [n_centroids, subvector_dim]: [usize; 2],
    bias: bool,
) -> (Parameters, Vec<f32>) {
    let mut random = Random(3);
    let pq = pq(n_centroids, subvector_dim);
    let mut parameters = Parameters::new(&mut random, [outputs, inputs, 1, 1], pq, bias);
    parameters.floats.fill_with(|| random.gaussian());
    let layer = FcLayer {
        in_features: inputs,
        out_features: outputs,
        weights: parameters.weights(),
        bias: None,
    };
    let decoded = layer.decode();
    (parameters, decoded)
}

/// The responses of every kernel whose name ends with `name` to one image.
fn permuted(
    name: &str,
    parameters: &Parameters,
    outputs: usize,
    input: &[f32],
) -> Vec<(String, Vec<f32>)> {
    let layer = FcLayer {
        in_features: input.len(),
        out_features: outputs,
        weights: parameters.weights(),
        bias: parameters.bias.as_deref(),
    };
    let kernels = all_fc_kernels(&layer)
        .into_iter()
        .map(|kernel| kernel.build());
    let responses: Vec<_> = kernels
        .filter(|kernel| kernel.name().ends_with(name))
        .map(|kernel| {
            let mut output = vec![f32::NAN; outputs];
            let mut scratch = vec![f32::NAN; kernel.scratch_len(1)];
            kernel.run(1, input, &mut output, &mut scratch);
            (kernel.name().to_owned(), output)
        })
        .collect();
    assert!(!responses.is_empty());
    responses
}

/// `<weights, input> + bias` in float64.
fn responses(decoded: &[f32], bias: Option<&[f32]>, input: &[f32]) -> Vec<f64> {
    let rows = decoded.chunks_exact(input.len()).enumerate();
    rows.map(|(o, row)| dot(row, input) + bias.map_or(0.0, |bias| f64::from(bias[o])))
        .collect()
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    let products = a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b));
    products.sum()
}

fn norm(values: &[f32]) -> f64 {
    dot(values, values).sqrt()
}

#[test]
fn fc_16_bit_errors_are_bounded() {
    for [n_centroids, dim] in [[16, 1], [32, 4], [50, 3]] {
        let (inputs, outputs) = (dim * 150 - dim / 2, 200);
        let (parameters, decoded) = gaussian_fc(inputs, outputs, [n_centroids, dim], true);
        let mut random = Random(4);
        let relu: Vec<f32> = (0..inputs).map(|_| random.gaussian().max(0.0)).collect();
        // The greatest response there can be: if the bound that the scale comes
        // from were not one, here the sums would overflow.
        let greatest = (0..outputs).map(|o| &decoded[o * inputs..][..inputs]);
        let greatest = greatest.max_by(|a, b| norm(a).total_cmp(&norm(b))).unwrap();
        for input in [&relu, greatest] {
            // In every chunk, half a step of rounding for each of its terms. On
            // top, twice as much as the scale leaves room for, and the float32
            // sum of chunks.
            let len = i16::chunk_len(dim);
            let bound: f64 = (0..inputs)
                .step_by(len * dim)
                .map(|first| {
                    let channels = first..(first + len * dim).min(inputs);
                    let weights = decoded.chunks_exact(inputs);
                    let greatest = weights.map(|row| norm(&row[channels.clone()]));
                    let bound = norm(&input[channels.clone()]) * greatest.fold(0.0, f64::max);
                    let half_steps = channels.len().div_ceil(dim) as f64 / 2.0;
                    bound * (half_steps / (32767.0 - half_steps) + 2e-5)
                })
                .sum();
            let expected = responses(&decoded, parameters.bias.as_deref(), input);
            for (name, output) in permuted("-i16-permute", &parameters, outputs, input) {
                for (y, expected) in output.iter().zip(&expected) {
                    let error = (f64::from(*y) - expected).abs();
                    assert!(
                        error <= bound,
                        "{name}: {y}, expected {expected} +- {bound}"
                    );
                }
            }
        }
    }
}

#[test]
fn fc_reduced_errors_are_small() {
    for pq in [[16, 1], [32, 4], [64, 8]] {
        let (inputs, outputs) = (1024, 500);
        let (parameters, decoded) = gaussian_fc(inputs, outputs, pq, false);
        let mut random = Random(5);
        for sparsity in [-10.0, 0.0, 1.0] {
            let input: Vec<f32> = (0..inputs)
                .map(|_| (random.gaussian() - sparsity).max(0.0))
                .collect();
            // Neither tiny nor huge inputs lose anything.
            for unit in [1e-30, 1.0, 1e25] {
                let input: Vec<f32> = input.iter().map(|x| x * unit).collect();
                let expected = responses(&decoded, None, &input);
                for (kernel, most) in [("-i16-permute", 2e-3), ("-i8-permute", 2e-2)] {
                    for (name, output) in permuted(kernel, &parameters, outputs, &input) {
                        let squares = output.iter().zip(&expected);
                        let error: f64 = squares.map(|(y, e)| (f64::from(*y) - e).powi(2)).sum();
                        let whole: f64 = expected.iter().map(|e| e * e).sum();
                        let relative = (error / whole).sqrt();
                        assert!(
                            relative < most,
                            "{name} {pq:?} {sparsity} {unit}: {relative}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn fc_reduced_special_inputs() {
    let (parameters, _) = gaussian_fc(300, 70, [32, 4], true);
    for kernel in ["-i16-permute", "-i8-permute"] {
        let mut input = vec![0.0; 300];
        for (name, output) in permuted(kernel, &parameters, 70, &input) {
            assert_eq!(Some(&output), parameters.bias.as_ref(), "{name}");
        }
        input.fill(0.5);
        for special in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            input[123] = special;
            for (name, output) in permuted(kernel, &parameters, 70, &input) {
                let finite = output.iter().any(|y| y.is_finite());
                assert!(!finite, "{name} {special}: {output:?}");
            }
        }
    }
}

/// Ends of the names of kernels with tables, inputs or weights of fewer bits.
const REDUCED_KERNELS: [&str; 6] = [
    "-i8-channels",
    "-i8-rows",
    "-i8-gemm",
    "-i8-tiles",
    "-i16-rows",
    "-f16-rows",
];

/// The responses of every kernel whose name ends with `name` to one image, one for each
/// level.
fn reduced_responses(layer: &ConvLayer<'_>, name: &str, input: &[f32]) -> Vec<(String, Vec<f32>)> {
    let g = layer.geometry;
    let kernels = all_conv_kernels(layer);
    let kernels = kernels.into_iter().map(|kernel| kernel.build());
    let responses: Vec<_> = kernels
        .filter(|kernel| kernel.name().ends_with(name))
        .map(|kernel| {
            let mut output = vec![f32::NAN; g.out_channels * g.out_pixels()];
            let mut scratch = vec![f32::NAN; kernel.scratch_len(1)];
            kernel.run(1, input, &mut output, &mut scratch);
            (kernel.name().to_owned(), output)
        })
        .collect();
    let isas = Isa::available();
    let from = |least: Isa| isas.iter().filter(|isa| **isa >= least).count();
    if name.ends_with("-tiles") {
        assert_eq!(responses.len(), from(Isa::Avx512Amx));
    } else if name == "-f16-rows" {
        assert_eq!(responses.len(), from(Isa::Avx512Fp16));
    } else {
        assert!(responses.len() > isas.len());
    }
    responses
}

/// A convolution of Gaussian codewords, for [`reduced_responses`].
fn gaussian_conv(geometry: &ConvGeometry, pq: Option<Pq>) -> Parameters {
    let mut random = Random(6);
    let extents = [
        geometry.out_channels,
        geometry.group_in_channels(),
        geometry.taps(),
        geometry.groups,
    ];
    let mut parameters = Parameters::new(&mut random, extents, pq, true);
    parameters.floats.fill_with(|| random.gaussian());
    parameters
}

#[test]
fn conv_reduced_errors_are_small_and_the_same_on_all_levels() {
    let geometry =
        ConvGeometry::new("x", [64, 9, 11], 40, [3, 3], [1, 1], [1, 1], [1; 4], 1).unwrap();
    // The longer the sub-vectors, the less tight are the bounds.
    for (pq, limit) in [
        (pq(16, 4), 1.5e-2),
        (pq(32, 4), 1.5e-2),
        (pq(32, 8), 2.5e-2),
        (pq(64, 4), 1.5e-2),
        (pq(64, 8), 2.5e-2),
    ] {
        let mut parameters = gaussian_conv(&geometry, pq);
        parameters.bias = None;
        let layer = ConvLayer {
            geometry: &geometry,
            weights: parameters.weights(),
            bias: None,
        };
        let mut random = Random(7);
        for sparsity in [-10.0, 0.0, 1.0] {
            let input: Vec<f32> = (0..64 * 99)
                .map(|_| (random.gaussian() - sparsity).max(0.0))
                .collect();
            // Neither tiny nor huge inputs lose anything.
            for unit in [1e-20, 1.0, 1e20] {
                let input: Vec<f32> = input.iter().map(|x| x * unit).collect();
                let mut expected = vec![0.0; 40 * 99];
                scalar::conv(&layer, 1, &input, &mut expected);
                for name in REDUCED_KERNELS {
                    let limit = match name {
                        "-f16-rows" => 1.5e-3,
                        // More than usual where squares are too small for float32.
                        "-i16-rows" => 6e-3,
                        _ => limit,
                    };
                    let responses = reduced_responses(&layer, name, &input);
                    for (name, output) in &responses {
                        let difference: Vec<f32> = output
                            .iter()
                            .zip(&expected)
                            .map(|(y, expected)| y - expected)
                            .collect();
                        let relative = norm(&difference) / norm(&expected);
                        assert!(
                            relative < limit,
                            "{name} {pq:?} {sparsity} {unit}: {relative}"
                        );
                        // Tiles, which have scales of their own, depend on the level.
                        if !name.ends_with("-rows") {
                            assert_eq!(*output, responses[0].1, "{name}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn conv_reduced_sums_do_not_overflow() {
    // Codewords that are all the same: the greatest products at every pixel and tap.
    let geometry =
        ConvGeometry::new("x", [80, 5, 5], 3, [5, 5], [1, 1], [1, 1], [0; 4], 1).unwrap();
    for [n_centroids, dim] in [[1, 1], [1, 8], [1, 80], [32, 8], [64, 1], [64, 8]] {
        let mut parameters = gaussian_conv(&geometry, pq(n_centroids, dim));
        for [weight, x] in [[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]] {
            parameters.floats.fill(weight);
            let layer = ConvLayer {
                geometry: &geometry,
                weights: parameters.weights(),
                bias: None,
            };
            let input = vec![x; 80 * 25];
            for name in REDUCED_KERNELS {
                // Tables of 8 bits are not for such sub-vectors.
                if name == REDUCED_KERNELS[0] && dim > 8 {
                    continue;
                }
                for (name, output) in reduced_responses(&layer, name, &input) {
                    for y in output {
                        let error = (y * weight * x - 2000.0).abs() / 2000.0;
                        assert!(error < 8e-3, "{name} {n_centroids} {dim}: {y}");
                    }
                }
            }
        }
    }
}

/// Those of two digits: what is left out shows least where it is summed up most.
#[test]
fn conv_errors_of_two_digits_are_small() {
    for (channels, limit) in [(3, 3e-4), (80, 3e-4), (700, 3e-4)] {
        let geometry = ConvGeometry::new(
            "x",
            [channels, 9, 11],
            40,
            [3, 3],
            [1, 1],
            [1, 1],
            [1; 4],
            1,
        );
        let geometry = geometry.unwrap();
        let parameters = gaussian_conv(&geometry, pq(32, 4));
        let layer = ConvLayer {
            geometry: &geometry,
            weights: parameters.weights(),
            bias: None,
        };
        let mut random = Random(7);
        for sparsity in [-10.0, 0.0, 1.0] {
            let input: Vec<f32> = (0..channels * 99)
                .map(|_| (random.gaussian() - sparsity).max(0.0))
                .collect();
            let mut expected = vec![0.0; 40 * 99];
            scalar::conv(&layer, 1, &input, &mut expected);
            for (name, output) in reduced_responses(&layer, "-i16-tiles", &input) {
                let pairs = output.iter().zip(&expected);
                let difference: Vec<f32> = pairs.map(|(y, expected)| y - expected).collect();
                let relative = norm(&difference) / norm(&expected);
                assert!(relative < limit, "{name} {channels} {sparsity}: {relative}");
            }
        }
    }
}

#[test]
fn conv_reduced_special_inputs() {
    let geometry = ConvGeometry::new("x", [7, 6, 5], 5, [2, 2], [1, 1], [1, 1], [1; 4], 1).unwrap();
    for n_centroids in [9, 64] {
        let parameters = gaussian_conv(&geometry, pq(n_centroids, 3));
        let layer = ConvLayer {
            geometry: &geometry,
            weights: parameters.weights(),
            bias: parameters.bias.as_deref(),
        };
        for name in REDUCED_KERNELS {
            let mut input = vec![0.0; 7 * 30];
            for (name, output) in reduced_responses(&layer, name, &input) {
                let bias = parameters.bias.as_ref().unwrap();
                for (channel, bias) in output.chunks_exact(geometry.out_pixels()).zip(bias) {
                    assert_eq!(channel, vec![*bias; channel.len()], "{name}");
                }
            }
            // One number that is much greater than all others leaves room for no others.
            input.fill(0.5);
            input[123] = 1e30;
            let mut expected = vec![0.0; 5 * geometry.out_pixels()];
            scalar::conv(&layer, 1, &input, &mut expected);
            for (name, output) in reduced_responses(&layer, name, &input) {
                for (y, expected) in output.iter().zip(&expected) {
                    let error = (y - expected).abs();
                    assert!(error <= 1.5e28, "{name}: {y}, expected {expected}");
                }
            }
            // What sees the number, in row 0 and column 3 of channel 4, has no response.
            for special in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                input[123] = special;
                for (name, output) in reduced_responses(&layer, name, &input) {
                    for channel in output.chunks_exact(7 * 6) {
                        for i in [3, 4, 9, 10] {
                            assert!(!channel[i].is_finite(), "{name} {special}: {output:?}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn nothing_to_do() {
    let mut failures = Vec::new();
    let case = ConvCase {
        n: 0,
        ..ConvCase::default()
    };
    failures.extend(case.check().err());
    failures.extend(
        FcCase {
            n: 0,
            inputs: 3,
            outputs: 4,
            bias: true,
            pq: pq(4, 2),
        }
        .check()
        .err(),
    );
    report(&failures);
}

fn any_pq() -> impl Strategy<Value = Option<Pq>> {
    prop::option::of((1usize..200, 1usize..10, 0usize..5).prop_map(
        |(n_centroids, subvector_dim, parts)| Pq {
            n_centroids,
            subvector_dim,
            parts,
        },
    ))
}

prop_compose! {
    fn any_conv()(
        n in 1usize..4,
        group_channels in (1usize..12, 1usize..12),
        groups in 1usize..4,
        size in (1usize..24, 1usize..40),
        kernel in (1usize..6, 1usize..6),
        stride in (1usize..4, 1usize..4),
        dilation in (1usize..3, 1usize..3),
        padding in prop::array::uniform4(0usize..4),
        bias in any::<bool>(),
        pq in any_pq(),
    ) -> ConvCase {
        ConvCase {
            n,
            input: [group_channels.0 * groups, size.0, size.1],
            out_channels: group_channels.1 * groups,
            kernel: kernel.into(),
            stride: stride.into(),
            dilation: dilation.into(),
            padding,
            groups,
            bias,
            pq,
        }
    }
}

proptest! {
    #[test]
    fn any_conv_agrees(case in any_conv().prop_filter("possible", |c| c.geometry().is_some())) {
        prop_assert_eq!(case.check(), Ok(()));
    }

    #[test]
    fn any_fc_agrees(
        n in 1usize..20,
        inputs in 1usize..200,
        outputs in 1usize..100,
        bias in any::<bool>(),
        pq in any_pq(),
    ) {
        prop_assert_eq!(FcCase { n, inputs, outputs, bias, pq }.check(), Ok(()));
    }
}

impl Random {
    fn sign(&mut self) -> i8 {
        if self.next().is_multiple_of(2) { 1 } else { -1 }
    }

    fn signs(&mut self, n: usize) -> Vec<i8> {
        (0..n).map(|_| self.sign()).collect()
    }
}

/// What is wrong with the kernels that count bits, of which there is one for each
/// level: they have to give the reference's bits, alone and in a batch, with NaN where
/// `input` has one and without, and those of a normalisation and the sign that follow.
fn check_counting(
    kernels: &[Candidate<'_>],
    random: &mut Random,
    n: usize,
    input: &mut [f32],
    channels: usize,
    run: impl Fn(&[f32]) -> Vec<f32>,
) -> Result<(), String> {
    let mut kernels: Vec<_> = kernels.iter().map(Candidate::build).collect();
    kernels.retain(|kernel| kernel.name().ends_with("-b1-xnor"));
    if kernels.len() != Isa::available().len() + 1 {
        return Err("a level has no kernel that counts bits".to_owned());
    }
    // Some channels do not depend on their input.
    let scale: Vec<_> = (0..channels).map(|_| random.float().round()).collect();
    let (bias, mean) = (random.floats(channels), random.floats(channels));
    let norm = BatchNorm::new("norm", &scale, &bias, &mean, &vec![1.0; channels], 0.1);
    let norm = norm.unwrap();
    if !kernels.iter_mut().all(|kernel| kernel.fold(&norm)) {
        return Err("a kernel does not fold".to_owned());
    }
    let nan = random.next() as usize;
    for spoilt in [false, true] {
        if spoilt {
            input[nan % input.len()] = f32::NAN;
        }
        let expected = run(input);
        let mut signs = expected.clone();
        let planes = signs.chunks_exact_mut(expected.len() / n / channels);
        for (i, plane) in planes.enumerate() {
            for y in plane {
                *y = sign(norm.apply(i % channels, *y));
            }
        }
        for kernel in &kernels {
            let compare = |output: &[f32], expected: &[f32]| {
                let same =
                    |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
                match output.iter().zip(expected).position(|pair| !same(pair)) {
                    None => Ok(()),
                    Some(i) => Err(format!(
                        "{}: element {i} is {}, expected {}",
                        kernel.name(),
                        output[i],
                        expected[i]
                    )),
                }
            };
            let mut scratch = vec![f32::NAN; kernel.scratch_len(n)];
            let mut output = vec![f32::INFINITY; expected.len()];
            kernel.run(n, input, &mut output, &mut scratch);
            compare(&output, &expected)?;
            kernel.run_folded(n, input, &mut output, &mut scratch);
            compare(&output, &signs)?;
            let last = (n - 1) * (input.len() / n);
            let alone = &mut output[..expected.len() / n];
            kernel.run(1, &input[last..], alone, &mut scratch);
            compare(alone, &expected[expected.len() - alone.len()..])?;
        }
    }
    Ok(())
}

fn check_sign_conv(case: &ConvCase, seed: u64) -> Result<(), String> {
    let mut random = Random(seed);
    let geometry = ConvGeometry::new(
        "case",
        case.input,
        case.out_channels,
        case.kernel,
        case.stride,
        case.dilation,
        case.padding,
        case.groups,
    )
    .unwrap();
    let weights = case.out_channels * geometry.group_in_channels() * geometry.taps();
    let signs = random.signs(weights);
    let bias = case.bias.then(|| random.floats(case.out_channels));
    let layer = ConvLayer {
        geometry: &geometry,
        weights: Weights::Binary {
            signs: &signs,
            input: Levels::Signs,
        },
        bias: bias.as_deref(),
    };
    let image: usize = case.input.iter().product();
    let mut input: Vec<f32> = random
        .signs(case.n * image)
        .into_iter()
        .map(f32::from)
        .collect();
    let kernels = all_conv_kernels(&layer);
    let run = |input: &[f32]| {
        let mut output = vec![0.0; case.n * case.out_channels * geometry.out_pixels()];
        scalar::conv(&layer, case.n, input, &mut output);
        output
    };
    let channels = case.out_channels;
    check_counting(&kernels, &mut random, case.n, &mut input, channels, run)
        .map_err(|e| format!("{case:?}: {e}"))
}

#[test]
fn convolutions_that_count_bits() {
    let mut failures = Vec::new();
    let mut seed = 0;
    let mut check = |case: ConvCase| {
        seed += 1;
        failures.extend(check_sign_conv(&case, seed).err());
    };
    for channels in [1, 31, 32, 33, 65, 128] {
        for out_channels in [1, 8, 33] {
            check(ConvCase {
                n: 2,
                input: [channels, 5, 4],
                out_channels,
                padding: [1; 4],
                ..ConvCase::default()
            });
        }
    }
    // More words than bytes can count at a time.
    let input = [512, 3, 3];
    check(ConvCase {
        input,
        padding: [1; 4],
        ..ConvCase::default()
    });
    for size in [[1, 1], [1, 7], [4, 4], [5, 13], [16, 17]] {
        check(ConvCase {
            input: [40, size[0], size[1]],
            kernel: [1, 1],
            bias: false,
            ..ConvCase::default()
        });
        check(ConvCase {
            input: [7, size[0], size[1]],
            out_channels: 70,
            kernel: [2, 3],
            padding: [1, 2, 3, 0],
            ..ConvCase::default()
        });
    }
    check(ConvCase {
        input: [12, 11, 10],
        out_channels: 9,
        stride: [2, 3],
        dilation: [3, 2],
        padding: [2, 0, 5, 1],
        groups: 3,
        ..ConvCase::default()
    });
    // Some windows see nothing but padding.
    check(ConvCase {
        input: [3, 2, 2],
        padding: [4; 4],
        ..ConvCase::default()
    });
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn fully_connected_layers_that_count_bits() {
    for in_features in [1, 31, 32, 33, 64, 65, 500, 513, 1056] {
        for out_features in [1, 15, 16, 40] {
            for n in [1, 2, 3, 4, 7] {
                let mut random = Random((in_features * out_features + n) as u64);
                let signs = random.signs(in_features * out_features);
                let bias = random.floats(out_features);
                let layer = FcLayer {
                    in_features,
                    out_features,
                    weights: Weights::Binary {
                        signs: &signs,
                        input: Levels::Signs,
                    },
                    bias: (n != 2).then_some(&bias),
                };
                let signs = random.signs(n * in_features).into_iter();
                let mut input: Vec<f32> = signs.map(f32::from).collect();
                let kernels = all_fc_kernels(&layer);
                let run = |input: &[f32]| {
                    let mut output = vec![0.0; n * out_features];
                    scalar::fc(&layer, n, input, &mut output);
                    output
                };
                check_counting(&kernels, &mut random, n, &mut input, out_features, run)
                    .unwrap_or_else(|e| panic!("{in_features} to {out_features}, {n} images: {e}"));
            }
        }
    }
}

#[test]
fn bits_are_counted_only_where_all_numbers_are_signs() {
    let geometry = ConvGeometry::new("case", [4, 3, 3], 2, [3; 2], [1; 2], [1; 2], [0; 4], 1);
    let geometry = geometry.unwrap();
    let signs = Random(1).signs(2 * 4 * 9);
    let grid = Levels::Grid(Grid { step: 1.0, zero: 0 });
    for (input, special) in [
        (Levels::Any, None),
        (Levels::Signs, Some("-b1-xnor")),
        (grid, Some("-i8-gemm")),
    ] {
        let layer = ConvLayer {
            geometry: &geometry,
            weights: Weights::Binary {
                signs: &signs,
                input,
            },
            bias: None,
        };
        let kernels = all_conv_kernels(&layer);
        let kernels = kernels.iter().map(Candidate::build);
        let names: Vec<_> = kernels.map(|kernel| kernel.name().to_owned()).collect();
        for name in ["-b1-xnor", "-i8-gemm"] {
            let found = names.iter().filter(|n| n.ends_with(name)).count();
            let expected = if special == Some(name) {
                Isa::available().len() + 1
            } else {
                0
            };
            assert_eq!(found, expected, "{input:?} {names:?}");
        }
    }
}

#[test]
fn signs_times_a_grid_are_exact() {
    let mut random = Random(8);
    for (input, kernel, stride, groups) in [
        ([3, 32, 32], [3, 3], [1, 1], 1),
        ([3, 9, 30], [5, 4], [2, 3], 3),
        ([1, 1, 1], [1, 1], [1, 1], 1),
        ([130, 4, 5], [3, 3], [1, 1], 2),
    ] {
        let outputs = 30;
        let geometry =
            ConvGeometry::new("x", input, outputs, kernel, stride, [1, 1], [1; 4], groups).unwrap();
        let weights = outputs * geometry.group_in_channels() * geometry.taps();
        let signs = random.signs(weights);
        for (step, zero, levels) in [
            (1.0, 0, 256),
            (0.01, 128, 256),
            (3e-9, 255, 256),
            (0.5, 1, 4),
        ] {
            let layer = ConvLayer {
                geometry: &geometry,
                weights: Weights::Binary {
                    signs: &signs,
                    input: Levels::Grid(Grid { step, zero }),
                },
                bias: None,
            };
            let n: usize = input.iter().product();
            let integers: Vec<f32> = random
                .codes(n, levels)
                .into_iter()
                .map(|code| f32::from(code) - zero as f32)
                .collect();
            let numbers: Vec<f32> = integers.iter().map(|x| x * step).collect();
            // Sums of integers below 2^24 are exact in float32.
            let mut expected = vec![0.0; outputs * geometry.out_pixels()];
            scalar::conv(&layer, 1, &integers, &mut expected);
            for y in &mut expected {
                *y *= step;
            }
            for (name, output) in reduced_responses(&layer, "-i8-gemm", &numbers) {
                assert_eq!(output, expected, "{name} {step} {zero}");
            }
        }
    }
}
