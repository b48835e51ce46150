//! Dense fully connected layers.

use crate::isa::{Simd, Task};
use crate::kernels::tile::{MAX_COLUMNS, TILE_VECTORS, load_tile, store_tile, tile};
use crate::kernels::{Candidate, FcLayer, Kernel};

/// Images per register tile.
const ROWS: usize = 6;

/// Bytes of weights that are applied to all images before the next are read:
/// with more images than a tile holds, they come from half of the L1 cache.
const BLOCK_BYTES: usize = 16 << 10;

/// Matrix product of the images, as they are, with packed weights.
///
/// For one image the layer is bound by reading the weights from memory; they
/// are read once, in order, whatever the batch size.
#[derive(Debug)]
pub(crate) struct GemmFc<S> {
    simd: S,
    name: String,
    in_features: usize,
    out_features: usize,
    /// For each panel of `COLUMNS` outputs: `(in_features, COLUMNS)`.
    weights: Vec<f32>,
    /// Padded to whole panels.
    bias: Vec<f32>,
}

impl<S: Simd> GemmFc<S> {
    /// Outputs of a panel.
    const COLUMNS: usize = TILE_VECTORS * S::LANES;

    pub(crate) fn candidate<'a>(simd: S, layer: &'a FcLayer<'a>) -> Candidate<'a> {
        // Bound by memory: what one core reads in a cycle.
        let weights = layer.in_features * layer.out_features.next_multiple_of(Self::COLUMNS);
        let cycles = (weights * size_of::<f32>()) as f64 / 5.0;
        Candidate::new(cycles, move || Self::new(simd, layer))
    }

    fn new(simd: S, layer: &FcLayer<'_>) -> Self {
        let dense = layer.dense_weights();
        let (inputs, outputs) = (layer.in_features, layer.out_features);
        let padded = outputs.next_multiple_of(Self::COLUMNS);
        let mut weights = Vec::with_capacity(padded * inputs);
        for panel in (0..outputs).step_by(Self::COLUMNS) {
            for i in 0..inputs {
                weights.extend((panel..panel + Self::COLUMNS).map(|o| {
                    // Columns that fill up the last panel.
                    if o < outputs {
                        dense[o * inputs + i]
                    } else {
                        0.0
                    }
                }));
            }
        }
        let mut bias = layer.bias_or_zeros();
        bias.resize(padded, 0.0);
        Self {
            simd,
            name: format!("{}-f32-gemm", S::NAME),
            in_features: inputs,
            out_features: outputs,
            weights,
            bias,
        }
    }
}

impl<S: Simd> Kernel for GemmFc<S> {
    fn name(&self) -> &str {
        &self.name
    }

    fn scratch_len(&self, _: usize) -> usize {
        0
    }

    fn run(&self, n: usize, input: &[f32], output: &mut [f32], _: &mut [f32]) {
        let columns = Self::COLUMNS;
        let (inputs, outputs) = (self.in_features, self.out_features);
        let block = if n <= ROWS {
            inputs
        } else {
            BLOCK_BYTES / size_of::<f32>() / columns
        };
        for (i, panel) in self.weights.chunks_exact(inputs * columns).enumerate() {
            let first = i * columns;
            for first_k in (0..inputs).step_by(block) {
                let depth = block.min(inputs - first_k);
                let weights = &panel[first_k * columns..][..depth * columns];
                for image in (0..n).step_by(ROWS) {
                    let product = Product {
                        weights,
                        bias: (first_k == 0).then(|| &self.bias[first..first + columns]),
                        input: &input[image * inputs + first_k..],
                        in_stride: inputs,
                        output: &mut output[image * outputs + first..],
                        out_stride: outputs,
                        width: columns.min(outputs - first),
                    };
                    match n - image {
                        1 => self.simd.call(Images::<1>(product)),
                        2 => self.simd.call(Images::<2>(product)),
                        3 => self.simd.call(Images::<3>(product)),
                        4 => self.simd.call(Images::<4>(product)),
                        5 => self.simd.call(Images::<5>(product)),
                        _ => self.simd.call(Images::<ROWS>(product)),
                    }
                }
            }
        }
    }
}

/// The product of some images and a block of a panel of weights.
struct Product<'a> {
    /// `(depth, columns of a tile)`
    weights: &'a [f32],
    /// What the outputs start at; if there is none they go on.
    bias: Option<&'a [f32]>,
    /// `(images, in_stride)`, of which the first `depth` are used.
    input: &'a [f32],
    in_stride: usize,
    /// `(images, out_stride)`, of which the first `width` are computed.
    output: &'a mut [f32],
    out_stride: usize,
    width: usize,
}

/// [`Product`] for `R` images.
struct Images<'a, const R: usize>(Product<'a>);

impl<const R: usize> Task for Images<'_, R> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let p = self.0;
        let columns = TILE_VECTORS * S::LANES;
        let depth = p.weights.len() / columns;
        let whole = p.width == columns;
        assert!(p.input.len() >= (R - 1) * p.in_stride + depth);
        assert!(p.output.len() >= (R - 1) * p.out_stride + p.width);
        // The last panel is computed in full beside the output.
        let mut part = [[0.0; MAX_COLUMNS]; R];
        let mut sums = [[simd.splat(0.0); TILE_VECTORS]; R];
        // SAFETY: bias, and each of the R rows of output or part, hold a row of
        // the tile: asserted for bias and for the output if it is used, at most
        // MAX_COLUMNS values for the part. Row k < depth of the weights holds
        // one, and the R images at distance in_stride hold depth elements, as
        // asserted.
        unsafe {
            if let Some(bias) = p.bias {
                assert!(bias.len() >= columns);
                load_tile(simd, bias.as_ptr(), 0, &mut sums);
            } else if whole {
                load_tile(simd, p.output.as_ptr(), p.out_stride, &mut sums);
            } else {
                for (i, part) in part.iter_mut().enumerate() {
                    part[..p.width].copy_from_slice(&p.output[i * p.out_stride..][..p.width]);
                }
                load_tile(simd, part.as_ptr().cast(), MAX_COLUMNS, &mut sums);
            }
            let sums = tile(
                simd,
                depth,
                |k, i| *p.input.get_unchecked(i * p.in_stride + k),
                |k| p.weights.as_ptr().add(k * columns),
                sums,
            );
            if whole {
                store_tile(simd, p.output.as_mut_ptr(), p.out_stride, &sums);
            } else {
                store_tile(simd, part.as_mut_ptr().cast(), MAX_COLUMNS, &sums);
                for (i, part) in part.iter().enumerate() {
                    p.output[i * p.out_stride..][..p.width].copy_from_slice(&part[..p.width]);
                }
            }
        }
    }
}
