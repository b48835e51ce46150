//! Convolutions whose groups have several sets of codebooks: one convolution for each
//! part of the outputs that shares a set, by whatever kernel.
//!
//! Each part makes tables of the same input anew, which is what more exact weights cost.

use std::ops::Range;

use super::{Candidate, ConvLayer, Kernel, Weights, look_up_kernels};
use crate::geometry::ConvGeometry;
use crate::graph::PqGeometry;
use crate::isa::Simd;
use crate::precision::Precision;

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct PartsConv {
    /// Elements of an image's input and output.
    lens: [usize; 2],
    parts: Vec<Part>,
}

/// Outputs that share a set of codebooks.
#[derive(Debug)]
struct Part {
    input: Range<usize>,
    output: Range<usize>,
    kernel: Box<dyn Kernel>,
}

impl PartsConv {
    /// One candidate for each kernel that a part may have; none for other layers.
    pub(crate) fn candidates<'a, S: Simd>(
        simd: S,
        layer: &'a ConvLayer<'a>,
        precision: Precision,
    ) -> Vec<Candidate<'a>> {
        let Weights::ProductQuantized {
            geometry: pq,
            codebooks,
            codes,
        } = layer.weights
        else {
            return Vec::new();
        };
        let geometry = part_geometry(layer.geometry, pq);
        let first = part_layer(layer, &geometry, (pq, codebooks, codes), 0);
        look_up_kernels(&first, simd, precision)
            .iter()
            .map(Candidate::cycles)
            .enumerate()
            .map(|(index, cycles)| {
                let geometry = geometry.clone();
                Candidate::new(pq.codebook_groups as f64 * cycles, move || {
                    Self::new(layer, &geometry, pq, |part| {
                        let part = part_layer(layer, &geometry, (pq, codebooks, codes), part);
                        // Cost, and so the order, depends on the extents alone.
                        look_up_kernels(&part, simd, precision)[index].build()
                    })
                })
            })
            .collect()
    }

    fn new(
        layer: &ConvLayer<'_>,
        part: &ConvGeometry,
        pq: PqGeometry,
        kernel: impl Fn(usize) -> Box<dyn Kernel>,
    ) -> Self {
        let g = layer.geometry;
        let input_len = part.in_channels * part.in_pixels();
        let output_len = part.out_channels * part.out_pixels();
        let parts_of_group = pq.codebook_groups / g.groups;
        let parts = (0..pq.codebook_groups)
            .map(|i| {
                let (input, output) = (i / parts_of_group * input_len, i * output_len);
                Part {
                    input: input..input + input_len,
                    output: output..output + output_len,
                    kernel: kernel(i),
                }
            })
            .collect();
        Self {
            lens: [
                g.in_channels * g.in_pixels(),
                g.out_channels * g.out_pixels(),
            ],
            parts,
        }
    }

    /// Visit the parts of `n` images until one says that it did nothing.
    fn images(
        &self,
        n: usize,
        input: &[f32],
        output: &mut [f32],
        mut run: impl FnMut(&dyn Kernel, &[f32], &mut [f32]) -> bool,
    ) -> bool {
        let [input_len, output_len] = self.lens;
        let images = input.chunks_exact(input_len).take(n);
        images
            .zip(output.chunks_exact_mut(output_len))
            .all(|(input, output)| {
                self.parts.iter().all(|part| {
                    let output = &mut output[part.output.clone()];
                    run(&*part.kernel, &input[part.input.clone()], output)
                })
            })
    }
}

impl Kernel for PartsConv {
    fn name(&self) -> &str {
        self.parts[0].kernel.name()
    }

    fn scratch_len(&self, _: usize) -> usize {
        // One image at a time, one part after the other.
        self.parts[0].kernel.scratch_len(1)
    }

    fn run(&self, n: usize, input: &[f32], output: &mut [f32], scratch: &mut [f32]) {
        self.images(n, input, output, |kernel, input, output| {
            kernel.run(1, input, output, scratch);
            true
        });
    }

    fn run_relu(&self, n: usize, input: &[f32], output: &mut [f32], scratch: &mut [f32]) -> bool {
        // All kernels are of one kind: where the first one can, they all can.
        self.images(n, input, output, |kernel, input, output| {
            kernel.run_relu(1, input, output, scratch)
        })
    }
}

/// Extents of each part.
fn part_geometry(whole: &ConvGeometry, pq: PqGeometry) -> ConvGeometry {
    ConvGeometry {
        in_channels: whole.group_in_channels(),
        out_channels: whole.out_channels / pq.codebook_groups,
        groups: 1,
        ..whole.clone()
    }
}

/// Part `part` of a layer, a layer itself.
fn part_layer<'b>(
    whole: &ConvLayer<'b>,
    geometry: &'b ConvGeometry,
    (pq, codebooks, codes): (PqGeometry, &'b [f32], &'b [u16]),
    part: usize,
) -> ConvLayer<'b> {
    let outputs = geometry.out_channels;
    let books_len = codebooks.len() / pq.codebook_groups;
    let codes_len = codes.len() / pq.codebook_groups;
    ConvLayer {
        geometry,
        weights: Weights::ProductQuantized {
            geometry: PqGeometry {
                codebook_groups: 1,
                ..pq
            },
            codebooks: &codebooks[part * books_len..][..books_len],
            codes: &codes[part * codes_len..][..codes_len],
        },
        bias: whole.bias.map(|bias| &bias[part * outputs..][..outputs]),
    }
}
