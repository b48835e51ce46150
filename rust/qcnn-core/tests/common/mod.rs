//! Networks for tests, and a plain float64 interpreter to compare with.

#![allow(dead_code, reason = "each test binary uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a test may panic")]
#![allow(clippy::needless_pass_by_value, reason = "reads better with json!")]

use std::collections::HashMap;

use qcnn_core::graph::{Content, Geometry, Node, Op, TensorSpec};
use qcnn_core::kernels::{ConvLayer, FcLayer, Levels, Weights, scalar};
use qcnn_core::{Graph, Network, Tensor, TensorData, Tensors};
use serde_json::{Value, json};

/// Numbers that look random, the same on every run.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In -1..1.
    pub fn float(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.float()).collect()
    }
}

/// A node in the JSON of a graph.
pub fn node(name: &str, inputs: &[&str], op: Value) -> Value {
    json!({"name": name, "inputs": inputs, "op": op})
}

/// A 3 x 3 convolution with padding 1.
pub fn conv(out_channels: usize, weights: Value) -> Value {
    json!({
        "type": "conv", "out_channels": out_channels, "kernel": [3, 3], "stride": [1, 1],
        "padding": [1, 1, 1, 1], "dilation": [1, 1], "groups": 1, "bias": true, "weights": weights,
    })
}

pub fn fc(out_features: usize, weights: Value) -> Value {
    json!({"type": "fc", "out_features": out_features, "bias": true, "weights": weights})
}

pub fn dense() -> Value {
    json!({"type": "dense"})
}

pub fn binary() -> Value {
    json!({"type": "binary"})
}

pub fn quantized(n_subspaces: usize, n_centroids: usize, subvector_dim: usize) -> Value {
    json!({
        "type": "product_quantized", "n_subspaces": n_subspaces, "n_centroids": n_centroids,
        "subvector_dim": subvector_dim, "codebook_groups": 1,
    })
}

fn random_tensor(random: &mut Random, name: &str, spec: &TensorSpec) -> Tensor {
    let len = spec.shape.iter().product();
    let data = match spec.content {
        Content::Codes(pq) => TensorData::Codes(
            (0..len)
                .map(|_| (random.next() % pq.n_centroids as u64) as u16)
                .collect(),
        ),
        Content::Signs => {
            let sign = |_| {
                if random.next().is_multiple_of(2) {
                    1
                } else {
                    -1
                }
            };
            TensorData::Signs((0..len).map(sign).collect())
        }
        Content::Floats if name.ends_with(".variance") => {
            TensorData::F32(random.floats(len).iter().map(|v| v.abs() + 0.1).collect())
        }
        Content::Floats | Content::Codebooks { .. } => TensorData::F32(random.floats(len)),
    };
    Tensor {
        shape: spec.shape.clone(),
        data,
    }
}

/// A network with drawn tensors; its input is called `x`, its output is the
/// last node unless named.
pub fn network(input: &[usize], nodes: &[Value], output: Option<&str>) -> Network {
    let last = nodes
        .last()
        .map_or("x", |node| node["name"].as_str().unwrap());
    let graph = json!({
        "input": {"name": "x", "shape": input},
        "nodes": nodes,
        "output": output.unwrap_or(last),
        "metadata": {},
    });
    let graph = Graph::from_json(&graph.to_string()).unwrap();
    let mut random = Random(7);
    let tensors: Tensors = graph
        .layout()
        .unwrap()
        .tensors
        .iter()
        .map(|(name, spec)| (name.clone(), random_tensor(&mut random, name, spec)))
        .collect();
    Network::new(graph, tensors).unwrap()
}

/// Values of all nodes for one image, in order.
pub fn interpret(network: &Network, input: &[f32]) -> Vec<(String, Vec<f32>)> {
    let graph = network.graph();
    let mut values: HashMap<&str, Vec<f32>> = HashMap::from([(&*graph.input.name, input.to_vec())]);
    let mut all = Vec::new();
    for (node, geometry) in graph.nodes.iter().zip(&network.layout().geometries) {
        let operands: Vec<&Vec<f32>> = node
            .inputs
            .iter()
            .map(|name| &values[name.as_str()])
            .collect();
        let shape = network.shape(&node.inputs[0]);
        let value = interpret_node(network, node, geometry, shape, &operands);
        all.push((node.name.clone(), value.clone()));
        values.insert(&node.name, value);
    }
    all
}

#[expect(clippy::too_many_lines, reason = "one arm per operation")]
fn interpret_node(
    network: &Network,
    node: &Node,
    geometry: &Geometry,
    shape: &[usize],
    operands: &[&Vec<f32>],
) -> Vec<f32> {
    let Node { name, op, .. } = node;
    let x = operands[0];
    let channels = shape[0];
    let pixels: usize = shape[1..].iter().product();
    let parameter = |suffix: &str| network.floats(name, suffix);
    let signs = network.signs(name);
    let weights = |pq: &Option<_>| match *pq {
        None => match &signs {
            Some(signs) => Weights::Binary {
                signs,
                input: Levels::Any,
            },
            None => Weights::Dense(parameter("weight").unwrap()),
        },
        Some(geometry) => Weights::ProductQuantized {
            geometry,
            codebooks: parameter("codebooks").unwrap(),
            codes: network.codes(name).unwrap(),
        },
    };
    let map = |f: &dyn Fn(f64) -> f64| x.iter().map(|v| f(f64::from(*v)) as f32).collect();
    match (op, geometry) {
        (Op::Conv { .. }, Geometry::Conv(geometry, pq)) => {
            let mut buffer = Vec::new();
            let layer = ConvLayer {
                geometry,
                weights: weights(pq).unpacked(&mut buffer),
                bias: parameter("bias"),
            };
            let mut out = vec![0.0; geometry.out_channels * geometry.out_pixels()];
            scalar::conv(&layer, 1, x, &mut out);
            out
        }
        (Op::Fc { .. }, Geometry::Fc(in_features, out_features, pq)) => {
            let layer = FcLayer {
                in_features: *in_features,
                out_features: *out_features,
                weights: weights(pq),
                bias: parameter("bias"),
            };
            let mut out = vec![0.0; *out_features];
            scalar::fc(&layer, 1, x, &mut out);
            out
        }
        (Op::MaxPool { .. } | Op::AveragePool { .. }, Geometry::Pool(g)) => {
            let mut out = Vec::new();
            for plane in x.chunks_exact(pixels) {
                for oy in 0..g.out_size[0] {
                    for ox in 0..g.out_size[1] {
                        // Of the window: real values, and cells of the padded input.
                        let (mut values, mut cells) = (Vec::new(), 0);
                        for ky in 0..g.kernel[0] {
                            for kx in 0..g.kernel[1] {
                                // In the padded input.
                                let [y, x] = [oy * g.stride[0] + ky, ox * g.stride[1] + kx];
                                let rows = g.padding.top..g.padding.top + g.in_size[0];
                                let columns = g.padding.left..g.padding.left + g.in_size[1];
                                if y < rows.end + g.padding.bottom
                                    && x < columns.end + g.padding.right
                                {
                                    cells += 1;
                                }
                                if rows.contains(&y) && columns.contains(&x) {
                                    let at = (y - rows.start) * g.in_size[1] + x - columns.start;
                                    values.push(f64::from(plane[at]));
                                }
                            }
                        }
                        let sum: f64 = values.iter().sum();
                        let nan = values.iter().any(|v| v.is_nan());
                        out.push(match op {
                            Op::MaxPool { .. } if nan => f32::NAN,
                            Op::MaxPool { .. } => {
                                values.iter().fold(f64::NEG_INFINITY, |a, b| a.max(*b)) as f32
                            }
                            Op::AveragePool {
                                count_include_pad: true,
                                ..
                            } => (sum / f64::from(cells)) as f32,
                            _ => (sum / values.len() as f64) as f32,
                        });
                    }
                }
            }
            out
        }
        (Op::GlobalMaxPool {}, _) => x
            .chunks_exact(pixels)
            .map(|plane| {
                plane.iter().fold(f32::NEG_INFINITY, |a, b| {
                    if b.is_nan() || a.is_nan() {
                        f32::NAN
                    } else {
                        a.max(*b)
                    }
                })
            })
            .collect(),
        (Op::GlobalAveragePool {}, _) => x
            .chunks_exact(pixels)
            .map(|plane| (plane.iter().map(|v| f64::from(*v)).sum::<f64>() / pixels as f64) as f32)
            .collect(),
        (
            Op::Lrn {
                size,
                alpha,
                beta,
                bias,
            },
            _,
        ) => {
            let mut out = Vec::new();
            for c in 0..channels {
                let low = c.saturating_sub((size - 1) / 2);
                let high = (c + size / 2).min(channels - 1);
                for p in 0..pixels {
                    let squares: f64 = (low..=high)
                        .map(|c| f64::from(x[c * pixels + p]).powi(2))
                        .sum();
                    let base = f64::from(*bias) + f64::from(*alpha) / *size as f64 * squares;
                    out.push((f64::from(x[c * pixels + p]) / base.powf(f64::from(*beta))) as f32);
                }
            }
            out
        }
        (Op::Relu {}, _) => map(&|v| if v.is_nan() { v } else { v.max(0.0) }),
        (Op::LeakyRelu { alpha }, _) => map(&|v| if v < 0.0 { f64::from(*alpha) * v } else { v }),
        (Op::Clip { low, high }, _) => map(&|v| v.clamp(f64::from(*low), f64::from(*high))),
        (Op::Sigmoid {}, _) => map(&|v| 1.0 / (1.0 + (-v).exp())),
        (Op::Tanh {}, _) => map(&f64::tanh),
        (Op::HardSigmoid { alpha, beta }, _) => {
            map(&|v| (f64::from(*alpha) * v + f64::from(*beta)).clamp(0.0, 1.0))
        }
        (Op::HardSwish {}, _) => map(&|v| v * (v / 6.0 + 0.5).clamp(0.0, 1.0)),
        (Op::Silu {}, _) => map(&|v| v / (1.0 + (-v).exp())),
        (Op::Add {} | Op::Mul {}, _) => {
            let mut out = x.clone();
            for (name, operand) in node.inputs.iter().zip(operands).skip(1) {
                let extents = network.shape(name);
                for (i, y) in out.iter_mut().enumerate() {
                    let at = position(i, shape).into_iter().zip(extents);
                    let from: Vec<_> = at.map(|(at, n)| at.min(n - 1)).collect();
                    let value = operand[element(&from, extents)];
                    match op {
                        Op::Add {} => *y += value,
                        _ => *y *= value,
                    }
                }
            }
            out
        }
        (
            Op::Slice {
                start,
                step,
                shape: taken,
            },
            _,
        ) => (0..taken.iter().product())
            .map(|i| {
                let at = position(i, taken).into_iter().zip(start.iter().zip(step));
                let from: Vec<_> = at.map(|(at, (start, step))| start + at * step).collect();
                x[element(&from, shape)]
            })
            .collect(),
        (Op::Pad { before, value, .. }, _) => {
            let padded = network.shape(&node.name);
            (0..padded.iter().product())
                .map(|i| {
                    let at = position(i, padded).into_iter().zip(before);
                    let from: Vec<_> = at.map(|(at, before)| at.wrapping_sub(*before)).collect();
                    let inside = from.iter().zip(shape).all(|(at, n)| at < n);
                    if inside {
                        x[element(&from, shape)]
                    } else {
                        *value
                    }
                })
                .collect()
        }
        (Op::Transpose { view, axes, .. }, _) => {
            let transposed: Vec<_> = axes.iter().map(|&axis| view[axis]).collect();
            (0..x.len())
                .map(|i| {
                    let mut from = vec![0; view.len()];
                    for (at, &axis) in position(i, &transposed).into_iter().zip(axes) {
                        from[axis] = at;
                    }
                    x[element(&from, view)]
                })
                .collect()
        }
        (Op::Concat {}, _) => operands.iter().flat_map(|o| o.iter().copied()).collect(),
        (Op::BatchNorm { epsilon }, _) => {
            let [scale, bias, mean, variance] =
                ["scale", "bias", "mean", "variance"].map(|suffix| parameter(suffix).unwrap());
            let at = |values: &[f32], i: usize| f64::from(values[i / pixels]);
            (0..x.len())
                .map(|i| {
                    let normed = (f64::from(x[i]) - at(mean, i))
                        / (at(variance, i) + f64::from(*epsilon)).sqrt();
                    (normed * at(scale, i) + at(bias, i)) as f32
                })
                .collect()
        }
        (Op::Softmax {} | Op::LogSoftmax {}, _) => {
            let mut out = vec![0.0; x.len()];
            for p in 0..pixels {
                let logits: Vec<f64> = (0..channels)
                    .map(|c| f64::from(x[c * pixels + p]))
                    .collect();
                let max = logits.iter().fold(f64::NEG_INFINITY, |a, b| a.max(*b));
                let sum: f64 = logits.iter().map(|v| (v - max).exp()).sum();
                for c in 0..channels {
                    let log = logits[c] - max - sum.ln();
                    out[c * pixels + p] = match op {
                        Op::Softmax {} => log.exp(),
                        _ => log,
                    } as f32;
                }
            }
            out
        }
        (Op::Flatten {} | Op::Reshape { .. } | Op::Dropout { .. }, _) => x.clone(),
        (op, geometry) => panic!("{op:?} with {geometry:?}"),
    }
}

/// Where element `i` of a contiguous array lies along each axis.
fn position(mut i: usize, shape: &[usize]) -> Vec<usize> {
    let mut at: Vec<_> = shape
        .iter()
        .rev()
        .map(|n| {
            let along = i % n;
            i /= n;
            along
        })
        .collect();
    at.reverse();
    at
}

/// The inverse of [`position`].
fn element(at: &[usize], shape: &[usize]) -> usize {
    at.iter().zip(shape).fold(0, |i, (at, n)| i * n + at)
}

/// Whether two results agree to float32 rounding of a small network: within
/// `1e-5` of the largest magnitude, NaN where NaN is expected, the same
/// infinities.
#[expect(clippy::float_cmp, reason = "infinities are equal")]
pub fn agree(got: &[f32], expected: &[f32]) -> Result<(), String> {
    let finite = expected.iter().filter(|v| v.is_finite());
    let scale = finite.fold(1e-3f32, |a, b| a.max(b.abs()));
    if got.len() != expected.len() {
        return Err(format!(
            "{} elements, expected {}",
            got.len(),
            expected.len()
        ));
    }
    for (i, (g, e)) in got.iter().zip(expected).enumerate() {
        let same = (g.is_nan() && e.is_nan()) || g == e || (g - e).abs() <= 1e-5 * scale;
        if !same {
            return Err(format!("element {i} is {g}, expected {e}"));
        }
    }
    Ok(())
}
