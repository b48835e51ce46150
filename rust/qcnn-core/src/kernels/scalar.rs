//! Reference kernels: plain loops straight from the formulas, summed in
//! float64. They define what every other kernel has to compute.

use super::{ConvLayer, FcLayer, Weights};
use crate::geometry::ConvGeometry;

/// What [`decode`] needs to know of a layer.
#[derive(Clone, Copy)]
struct Extents {
    /// Input channels per group.
    channels: usize,
    outputs: usize,
    taps: usize,
}

impl From<&ConvGeometry> for Extents {
    fn from(geometry: &ConvGeometry) -> Self {
        Self {
            channels: geometry.group_in_channels(),
            outputs: geometry.out_channels,
            taps: geometry.taps(),
        }
    }
}

impl ConvLayer<'_> {
    /// The weights as a dense `(C_out, C_in / groups, kh, kw)` tensor.
    pub fn decode(&self) -> Vec<f32> {
        let extents = Extents::from(self.geometry);
        decode(&self.weights, extents)
    }
}

impl FcLayer<'_> {
    /// The weights as a dense `(C_out, C_in)` tensor.
    pub fn decode(&self) -> Vec<f32> {
        let extents = Extents {
            channels: self.in_features,
            outputs: self.out_features,
            taps: 1,
        };
        let mut buffer = Vec::new();
        decode(&self.weights.unpacked(&mut buffer), extents)
    }
}

/// Dense weights; those of codes are
/// `W[o, m * C' + j, tap] = codebooks[m, codes[o, tap, m], j]`.
fn decode(weights: &Weights<'_>, extents: Extents) -> Vec<f32> {
    let (pq, codebooks, codes) = match *weights {
        Weights::Dense(weight) => return weight.to_vec(),
        Weights::Binary { signs, .. } => return signs.iter().map(|sign| (*sign).into()).collect(),
        Weights::ProductQuantized {
            geometry,
            codebooks,
            codes,
        } => (geometry, codebooks, codes),
    };
    let (taps, dim) = (extents.taps, pq.subvector_dim);
    let mut dense = vec![0.0; extents.outputs * extents.channels * taps];
    let of_outputs = dense
        .chunks_exact_mut(extents.channels * taps)
        .zip(codes.chunks_exact(taps * pq.n_subspaces));
    for (o, (dense, codes)) in of_outputs.enumerate() {
        let set = o / (extents.outputs / pq.codebook_groups);
        for (tap, codes) in codes.chunks_exact(pq.n_subspaces).enumerate() {
            for (m, code) in codes.iter().enumerate() {
                let codeword = (set * pq.n_subspaces + m) * pq.n_centroids + usize::from(*code);
                let codeword = &codebooks[codeword * dim..][..dim];
                // The last subspace may have fewer channels.
                let weights = dense[m * dim * taps + tap..].iter_mut().step_by(taps);
                for (weight, value) in weights.zip(codeword) {
                    *weight = *value;
                }
            }
        }
    }
    dense
}

/// Convolution of `n` images.
pub fn conv(layer: &ConvLayer<'_>, n: usize, input: &[f32], output: &mut [f32]) {
    let g = layer.geometry;
    let weight = layer.decode();
    let channels = g.group_in_channels();
    let mut outputs = output.iter_mut();
    for image in input.chunks_exact(g.in_channels * g.in_pixels()).take(n) {
        for o in 0..g.out_channels {
            let first_channel = o / g.group_out_channels() * channels;
            for oy in 0..g.out_size[0] {
                for ox in 0..g.out_size[1] {
                    let mut sum = layer.bias.map_or(0.0, |bias| f64::from(bias[o]));
                    for c in 0..channels {
                        for ky in 0..g.kernel[0] {
                            for kx in 0..g.kernel[1] {
                                let y = oy * g.stride[0] + ky * g.dilation[0];
                                let x = ox * g.stride[1] + kx * g.dilation[1];
                                // Outside of the image lie zeros.
                                let (Some(y), Some(x)) =
                                    (y.checked_sub(g.padding.top), x.checked_sub(g.padding.left))
                                else {
                                    continue;
                                };
                                if y >= g.in_size[0] || x >= g.in_size[1] {
                                    continue;
                                }
                                let w = weight
                                    [((o * channels + c) * g.kernel[0] + ky) * g.kernel[1] + kx];
                                let pixel =
                                    ((first_channel + c) * g.in_size[0] + y) * g.in_size[1] + x;
                                sum += f64::from(w) * f64::from(image[pixel]);
                            }
                        }
                    }
                    *outputs.next().expect("the output holds n images") = sum as f32;
                }
            }
        }
    }
}

/// Fully connected layer for `n` images.
pub fn fc(layer: &FcLayer<'_>, n: usize, input: &[f32], output: &mut [f32]) {
    let weight = layer.decode();
    let mut outputs = output.iter_mut();
    for image in input.chunks_exact(layer.in_features).take(n) {
        for (o, row) in weight.chunks_exact(layer.in_features).enumerate() {
            let bias = layer.bias.map_or(0.0, |bias| f64::from(bias[o]));
            let products = row
                .iter()
                .zip(image)
                .map(|(w, x)| f64::from(*w) * f64::from(*x));
            *outputs.next().expect("the output holds n images") =
                (bias + products.sum::<f64>()) as f32;
        }
    }
}
