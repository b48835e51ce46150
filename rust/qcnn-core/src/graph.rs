//! The network as data: nodes in topological order and the tensors they use.
//!
//! A [`Graph`] is what the JSON in a `.qcnn` file says; [`Network::new`] checks
//! it once (names, order, shapes, tensors, codes), after which every other
//! module may rely on what it holds.

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};

use crate::error::{Result, bail_format, bail_shape};
use crate::geometry::{ConvGeometry, PoolGeometry, checked_product};
use crate::pack::{Codes, SharedBytes, check_packed};

/// Largest codebook: codes are at most 16 bits wide.
pub const MAX_CENTROIDS: usize = 1 << 16;

/// Shape of one value for one image, without the batch dimension: channels,
/// height and width, or features.
pub type Shape = Vec<usize>;

/// Name and shape of the network's input.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Input {
    /// Name nodes refer to.
    pub name: String,
    /// Shape of one image.
    pub shape: Shape,
}

/// One operation and where its operands come from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Node {
    /// Unique name, also the name of the value it computes.
    pub name: String,
    /// Names of the operands.
    pub inputs: Vec<String>,
    /// What it computes.
    pub op: Op,
}

/// How the weights of a convolution or fully connected layer are stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum Weights {
    /// float32, tensor `<node>.weight`.
    Dense {},
    /// Tensors `<node>.codebooks` and `<node>.codes`.
    ProductQuantized {
        /// Subspaces the channels of one group are split into (`M`).
        n_subspaces: usize,
        /// Codewords per subspace (`K`).
        n_centroids: usize,
        /// Channels per subspace (`C'`).
        subvector_dim: usize,
        /// Sets of codebooks: 1 shared by all groups, or one per group.
        codebook_groups: usize,
    },
}

/// Operations. Sizes are `[height, width]`, paddings `[top, left, bottom, right]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
#[expect(
    missing_docs,
    reason = "the attributes are those of ONNX and docs/format.md"
)]
pub enum Op {
    Conv {
        out_channels: usize,
        kernel: [usize; 2],
        stride: [usize; 2],
        padding: [usize; 4],
        dilation: [usize; 2],
        groups: usize,
        bias: bool,
        weights: Weights,
    },
    Fc {
        out_features: usize,
        bias: bool,
        weights: Weights,
    },
    MaxPool {
        kernel: [usize; 2],
        stride: [usize; 2],
        padding: [usize; 4],
        ceil_mode: bool,
    },
    AveragePool {
        kernel: [usize; 2],
        stride: [usize; 2],
        padding: [usize; 4],
        ceil_mode: bool,
        count_include_pad: bool,
    },
    GlobalAveragePool {},
    GlobalMaxPool {},
    Lrn {
        size: usize,
        alpha: f32,
        beta: f32,
        bias: f32,
    },
    Relu {},
    LeakyRelu {
        alpha: f32,
    },
    Clip {
        low: f32,
        high: f32,
    },
    Sigmoid {},
    Tanh {},
    HardSigmoid {
        alpha: f32,
        beta: f32,
    },
    HardSwish {},
    Silu {},
    Add {},
    Concat {},
    Flatten {},
    Reshape {
        shape: Shape,
    },
    BatchNorm {
        epsilon: f32,
    },
    Softmax {},
    Dropout {
        rate: f32,
    },
}

/// A network without its tensors, exactly as in the JSON of a `.qcnn` file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Graph {
    /// The network's input.
    pub input: Input,
    /// Nodes, operands before users.
    pub nodes: Vec<Node>,
    /// Name of the value the network returns.
    pub output: String,
    /// Free-form: preprocessing, class names, origin.
    #[serde(default)]
    pub metadata: serde_json::Map<String, serde_json::Value>,
}

/// Contents of a tensor.
#[derive(Clone, Debug, PartialEq)]
pub enum TensorData {
    /// Parameters.
    F32(Vec<f32>),
    /// Codes, one per sub-vector.
    Codes(Vec<u16>),
    /// The same as a bit stream, see [`crate::pack`]: less than half the memory,
    /// unpacked a layer at a time where they are needed.
    PackedCodes(SharedBytes),
}

/// A tensor with its shape.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Extent of each dimension, outermost first.
    pub shape: Vec<usize>,
    /// Elements, row-major.
    pub data: TensorData,
}

/// Tensors by name, in the order in which they are written.
pub type Tensors = BTreeMap<String, Tensor>;

impl Op {
    /// Name in the JSON.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Conv { .. } => "conv",
            Self::Fc { .. } => "fc",
            Self::MaxPool { .. } => "max_pool",
            Self::AveragePool { .. } => "average_pool",
            Self::GlobalAveragePool {} => "global_average_pool",
            Self::GlobalMaxPool {} => "global_max_pool",
            Self::Lrn { .. } => "lrn",
            Self::Relu {} => "relu",
            Self::LeakyRelu { .. } => "leaky_relu",
            Self::Clip { .. } => "clip",
            Self::Sigmoid {} => "sigmoid",
            Self::Tanh {} => "tanh",
            Self::HardSigmoid { .. } => "hard_sigmoid",
            Self::HardSwish {} => "hard_swish",
            Self::Silu {} => "silu",
            Self::Add {} => "add",
            Self::Concat {} => "concat",
            Self::Flatten {} => "flatten",
            Self::Reshape { .. } => "reshape",
            Self::BatchNorm { .. } => "batch_norm",
            Self::Softmax {} => "softmax",
            Self::Dropout { .. } => "dropout",
        }
    }
}

/// Product-quantisation geometry of one layer, checked against its channels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PqGeometry {
    /// Subspaces per group (`M`).
    pub n_subspaces: usize,
    /// Codewords per subspace (`K`).
    pub n_centroids: usize,
    /// Channels per subspace (`C'`); the last subspace may have fewer real ones.
    pub subvector_dim: usize,
    /// Sets of codebooks: 1, or one per group.
    pub codebook_groups: usize,
}

impl PqGeometry {
    fn new(what: &str, weights: &Weights, channels: usize, groups: usize) -> Result<Option<Self>> {
        let &Weights::ProductQuantized {
            n_subspaces,
            n_centroids,
            subvector_dim,
            codebook_groups,
        } = weights
        else {
            return Ok(None);
        };
        if subvector_dim == 0 || subvector_dim > MAX_CENTROIDS {
            bail_format!("{what}: subvector_dim is {subvector_dim}, expected 1..={MAX_CENTROIDS}");
        }
        if n_subspaces != channels.div_ceil(subvector_dim) {
            bail_format!(
                "{what}: n_subspaces is {n_subspaces}, expected {} ({channels} channels in \
                 sub-vectors of {subvector_dim})",
                channels.div_ceil(subvector_dim)
            );
        }
        if !(1..=MAX_CENTROIDS).contains(&n_centroids) {
            bail_format!("{what}: n_centroids is {n_centroids}, expected 1..={MAX_CENTROIDS}");
        }
        if codebook_groups != 1 && codebook_groups != groups {
            bail_format!("{what}: codebook_groups is {codebook_groups}, expected 1 or {groups}");
        }
        Ok(Some(Self {
            n_subspaces,
            n_centroids,
            subvector_dim,
            codebook_groups,
        }))
    }

    /// Bits of one code on disk: `ceil(log2 K)`, at least 1.
    pub fn code_bits(&self) -> u32 {
        (usize::BITS - (self.n_centroids - 1).leading_zeros()).max(1)
    }

    fn codebooks_shape(&self) -> Vec<usize> {
        let mut shape = vec![self.n_subspaces, self.n_centroids, self.subvector_dim];
        if self.codebook_groups > 1 {
            shape.insert(0, self.codebook_groups);
        }
        shape
    }
}

/// What a tensor of a network has to look like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Extent of each dimension.
    pub shape: Vec<usize>,
    /// For codes, the geometry they index; `None` for float32 parameters.
    pub codes: Option<PqGeometry>,
}

/// Resolved geometry of a node.
#[derive(Clone, Debug, PartialEq)]
pub enum Geometry {
    /// Convolution, and how its weights are quantised.
    Conv(ConvGeometry, Option<PqGeometry>),
    /// Fully connected layer: input and output features, quantisation.
    Fc(usize, usize, Option<PqGeometry>),
    /// Windowed pooling.
    Pool(PoolGeometry),
    /// Everything whose geometry is its operands' shapes.
    Plain,
}

/// Shapes and tensors a [`Graph`] implies.
#[derive(Clone, Debug)]
pub struct Layout {
    /// Shape of every value by name.
    pub shapes: HashMap<String, Shape>,
    /// Geometry of every node, in order.
    pub geometries: Vec<Geometry>,
    /// Tensors the nodes need.
    pub tensors: BTreeMap<String, TensorSpec>,
}

fn check_name(what: &str, name: &str) -> Result<()> {
    if name.is_empty() || name.len() > 256 || name.chars().any(char::is_control) {
        bail_format!(
            "{what}: name {name:?} is empty, longer than 256 bytes or has control characters"
        );
    }
    Ok(())
}

fn check_finite(what: &str, field: &str, value: f32) -> Result<()> {
    if !value.is_finite() {
        bail_format!("{what}: {field} is {value}, expected a finite number");
    }
    Ok(())
}

impl Graph {
    /// Parse the JSON of a `.qcnn` file.
    pub fn from_json(json: &str) -> Result<Self> {
        match serde_json::from_str(json) {
            Ok(graph) => Ok(graph),
            Err(e) => bail_format!("graph: {e}"),
        }
    }

    /// The JSON of a `.qcnn` file: the same graph always gives the same bytes.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("a graph has only string keys")
    }

    /// Check names, order and attributes; infer every shape and tensor.
    pub fn layout(&self) -> Result<Layout> {
        check_name("input", &self.input.name)?;
        check_value_shape("input", &self.input.shape)?;
        let mut layout = Layout {
            shapes: HashMap::from([(self.input.name.clone(), self.input.shape.clone())]),
            geometries: Vec::with_capacity(self.nodes.len()),
            tensors: BTreeMap::new(),
        };
        for node in &self.nodes {
            check_name("node", &node.name)?;
            let what = format!("node {:?} ({})", node.name, node.op.name());
            if layout.shapes.contains_key(&node.name) {
                bail_format!("{what}: the name is already taken by another value");
            }
            let mut operands = Vec::with_capacity(node.inputs.len());
            for input in &node.inputs {
                match layout.shapes.get(input) {
                    Some(shape) => operands.push(shape.as_slice()),
                    None => bail_format!(
                        "{what}: input {input:?} is not the network's input nor an earlier node"
                    ),
                }
            }
            let arity_ok = match node.op {
                Op::Add {} | Op::Concat {} => operands.len() >= 2,
                _ => operands.len() == 1,
            };
            if !arity_ok {
                bail_format!("{what}: has {} inputs", operands.len());
            }
            let (shape, geometry) = infer(&what, &node.op, &operands)?;
            check_value_shape(&what, &shape)?;
            for (suffix, spec) in node_tensors(&what, &node.op, &geometry, operands[0])? {
                layout
                    .tensors
                    .insert(format!("{}.{suffix}", node.name), spec);
            }
            layout.geometries.push(geometry);
            layout.shapes.insert(node.name.clone(), shape);
        }
        if !layout.shapes.contains_key(&self.output) {
            bail_format!(
                "output {:?} is not the network's input nor a node",
                self.output
            );
        }
        Ok(layout)
    }
}

fn check_value_shape(what: &str, shape: &[usize]) -> Result<()> {
    if !matches!(shape.len(), 1 | 3) || shape.contains(&0) {
        bail_shape!(
            "{what}: shape is {shape:?}, expected (channels, height, width) or (features,), all at least 1"
        );
    }
    checked_product(what, shape)?;
    Ok(())
}

fn image_shape(what: &str, shape: &[usize]) -> Result<[usize; 3]> {
    match *shape {
        [c, h, w] => Ok([c, h, w]),
        _ => bail_shape!("{what}: input has shape {shape:?}, expected (channels, height, width)"),
    }
}

#[expect(clippy::too_many_lines, reason = "one arm per operation")]
fn infer(what: &str, op: &Op, operands: &[&[usize]]) -> Result<(Shape, Geometry)> {
    let first = operands[0];
    let keep = || (first.to_vec(), Geometry::Plain);
    Ok(match op {
        Op::Conv {
            out_channels,
            kernel,
            stride,
            padding,
            dilation,
            groups,
            weights,
            ..
        } => {
            let input = image_shape(what, first)?;
            let conv = ConvGeometry::new(
                what,
                input,
                *out_channels,
                *kernel,
                *stride,
                *dilation,
                *padding,
                *groups,
            )?;
            let pq = PqGeometry::new(what, weights, conv.group_in_channels(), *groups)?;
            let shape = vec![*out_channels, conv.out_size[0], conv.out_size[1]];
            (shape, Geometry::Conv(conv, pq))
        }
        Op::Fc {
            out_features,
            weights,
            ..
        } => {
            let &[in_features] = first else {
                bail_shape!(
                    "{what}: input has shape {first:?}, expected (features,); flatten it first"
                );
            };
            checked_product(what, &[in_features, *out_features])?;
            let pq = PqGeometry::new(what, weights, in_features, 1)?;
            (
                vec![*out_features],
                Geometry::Fc(in_features, *out_features, pq),
            )
        }
        Op::MaxPool {
            kernel,
            stride,
            padding,
            ceil_mode,
        }
        | Op::AveragePool {
            kernel,
            stride,
            padding,
            ceil_mode,
            ..
        } => {
            let input = image_shape(what, first)?;
            let pool = PoolGeometry::new(what, input, *kernel, *stride, *padding, *ceil_mode)?;
            let shape = vec![input[0], pool.out_size[0], pool.out_size[1]];
            (shape, Geometry::Pool(pool))
        }
        Op::GlobalAveragePool {} | Op::GlobalMaxPool {} => {
            let [channels, ..] = image_shape(what, first)?;
            (vec![channels, 1, 1], Geometry::Plain)
        }
        Op::Lrn {
            size,
            alpha,
            beta,
            bias,
        } => {
            image_shape(what, first)?;
            if !(1..=1 << 16).contains(size) {
                bail_format!("{what}: size is {size}, expected 1..=65536");
            }
            check_finite(what, "alpha", *alpha)?;
            check_finite(what, "beta", *beta)?;
            check_finite(what, "bias", *bias)?;
            keep()
        }
        Op::LeakyRelu { alpha } => {
            check_finite(what, "alpha", *alpha)?;
            keep()
        }
        Op::HardSigmoid { alpha, beta } => {
            check_finite(what, "alpha", *alpha)?;
            check_finite(what, "beta", *beta)?;
            keep()
        }
        Op::Clip { low, high } => {
            check_finite(what, "low", *low)?;
            check_finite(what, "high", *high)?;
            if low > high {
                bail_format!("{what}: low is {low}, expected at most high ({high})");
            }
            keep()
        }
        Op::BatchNorm { epsilon } => {
            check_finite(what, "epsilon", *epsilon)?;
            if *epsilon < 0.0 {
                bail_format!("{what}: epsilon is {epsilon}, expected at least 0");
            }
            keep()
        }
        Op::Dropout { rate } => {
            if !(0.0..1.0).contains(rate) {
                bail_format!("{what}: rate is {rate}, expected 0 <= rate < 1");
            }
            keep()
        }
        Op::Relu {}
        | Op::Sigmoid {}
        | Op::Tanh {}
        | Op::HardSwish {}
        | Op::Silu {}
        | Op::Softmax {} => keep(),
        Op::Add {} => {
            if let Some(other) = operands.iter().find(|s| **s != first) {
                bail_shape!(
                    "{what}: operands have shapes {first:?} and {other:?}, expected the same"
                );
            }
            keep()
        }
        Op::Concat {} => {
            let mut shape = first.to_vec();
            for other in &operands[1..] {
                if other.len() != shape.len() || other[1..] != first[1..] {
                    bail_shape!(
                        "{what}: operands have shapes {first:?} and {other:?}, expected the same but for the channels"
                    );
                }
                shape[0] = match shape[0].checked_add(other[0]) {
                    Some(sum) => sum,
                    None => bail_shape!("{what}: too many channels"),
                };
            }
            (shape, Geometry::Plain)
        }
        Op::Flatten {} => (vec![checked_product(what, first)?], Geometry::Plain),
        Op::Reshape { shape } => {
            if checked_product(what, shape)? != checked_product(what, first)? {
                bail_shape!("{what}: cannot reshape {first:?} to {shape:?}");
            }
            (shape.clone(), Geometry::Plain)
        }
    })
}

fn node_tensors(
    what: &str,
    op: &Op,
    geometry: &Geometry,
    input: &[usize],
) -> Result<Vec<(&'static str, TensorSpec)>> {
    let float = |shape: Vec<usize>| TensorSpec { shape, codes: None };
    let weights = |dense: Vec<usize>, codes: Vec<usize>, pq: Option<PqGeometry>| match pq {
        None => vec![("weight", float(dense))],
        Some(pq) => vec![
            ("codebooks", float(pq.codebooks_shape())),
            (
                "codes",
                TensorSpec {
                    shape: codes,
                    codes: Some(pq),
                },
            ),
        ],
    };
    let (mut specs, bias, outputs) = match (op, geometry) {
        (Op::Conv { bias, .. }, Geometry::Conv(conv, pq)) => {
            let [kh, kw] = conv.kernel;
            let out = conv.out_channels;
            let dense = vec![out, conv.group_in_channels(), kh, kw];
            let codes = vec![out, kh, kw, pq.map_or(0, |p| p.n_subspaces)];
            (weights(dense, codes, *pq), *bias, out)
        }
        (Op::Fc { bias, .. }, &Geometry::Fc(inputs, outputs, pq)) => {
            let codes = vec![outputs, pq.map_or(0, |p| p.n_subspaces)];
            (weights(vec![outputs, inputs], codes, pq), *bias, outputs)
        }
        (Op::BatchNorm { .. }, _) => {
            let channel = || float(vec![input[0]]);
            let specs = vec![
                ("scale", channel()),
                ("mean", channel()),
                ("variance", channel()),
            ];
            (specs, true, input[0])
        }
        _ => return Ok(Vec::new()),
    };
    if bias {
        specs.push(("bias", float(vec![outputs])));
    }
    for (_, spec) in &specs {
        checked_product(what, &spec.shape)?;
    }
    Ok(specs)
}

/// A checked network: graph, inferred layout and tensors.
#[derive(Clone, Debug)]
pub struct Network {
    graph: Graph,
    layout: Layout,
    tensors: Tensors,
}

impl Network {
    /// Check `graph` and that `tensors` are exactly those it needs.
    ///
    /// Floats must be finite and codes below their layer's `n_centroids`, so
    /// that look-ups need no bounds checks later.
    pub fn new(graph: Graph, tensors: Tensors) -> Result<Self> {
        let layout = graph.layout()?;
        for name in tensors.keys() {
            if !layout.tensors.contains_key(name) {
                bail_format!("tensor {name:?} belongs to no node of the graph");
            }
        }
        for (name, spec) in &layout.tensors {
            let Some(tensor) = tensors.get(name) else {
                bail_format!(
                    "tensor {name:?} is missing, expected shape {:?}",
                    spec.shape
                );
            };
            check_tensor(name, spec, tensor)?;
        }
        Ok(Self {
            graph,
            layout,
            tensors,
        })
    }

    /// The graph.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// Shapes and geometries.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// All tensors.
    pub fn tensors(&self) -> &Tensors {
        &self.tensors
    }

    /// Shape of the value called `name`, which must exist.
    pub fn shape(&self, name: &str) -> &[usize] {
        &self.layout.shapes[name]
    }

    /// The float32 tensor `<node>.<suffix>`, if the node has one.
    pub fn floats(&self, node: &str, suffix: &str) -> Option<&[f32]> {
        match &self.tensors.get(&format!("{node}.{suffix}"))?.data {
            TensorData::F32(data) => Some(data),
            TensorData::Codes(_) | TensorData::PackedCodes(_) => None,
        }
    }

    /// The codes of a product-quantised node.
    pub fn codes(&self, node: &str) -> Option<Codes<'_>> {
        let name = format!("{node}.codes");
        let spec = self.layout.tensors.get(&name)?;
        let pq = spec.codes?;
        match &self.tensors[&name].data {
            TensorData::Codes(codes) => Some(Codes::Unpacked(codes)),
            TensorData::PackedCodes(bytes) => Some(Codes::Packed {
                bytes,
                n: spec.shape.iter().product(),
                bits: pq.code_bits(),
            }),
            TensorData::F32(_) => None,
        }
    }
}

fn check_tensor(name: &str, spec: &TensorSpec, tensor: &Tensor) -> Result<()> {
    if tensor.shape != spec.shape {
        bail_shape!(
            "tensor {name:?} has shape {:?}, expected {:?}",
            tensor.shape,
            spec.shape
        );
    }
    let elements: usize = spec.shape.iter().product();
    let too_large = |codes: &[u16], pq: &PqGeometry| {
        let i = codes
            .iter()
            .position(|&c| usize::from(c) >= pq.n_centroids)?;
        Some(format!(
            "is {} at element {i}, expected codes below n_centroids = {}",
            codes[i], pq.n_centroids
        ))
    };
    let (found, problem) = match (&tensor.data, &spec.codes) {
        (TensorData::F32(data), None) => (
            data.len(),
            data.iter()
                .position(|v| !v.is_finite())
                .map(|i| format!("is {} at element {i}, expected finite numbers", data[i])),
        ),
        (TensorData::Codes(data), Some(pq)) => (data.len(), too_large(data, pq)),
        (TensorData::PackedCodes(bytes), Some(pq)) => {
            let bits = pq.code_bits();
            check_packed(name, bytes, elements, bits)?;
            // Where every code that fits the bits is one, there is nothing to
            // look for.
            let problem = if pq.n_centroids == 1 << bits {
                None
            } else {
                let n = elements;
                too_large(Codes::Packed { bytes, n, bits }.all(&mut Vec::new()), pq)
            };
            (elements, problem)
        }
        (TensorData::F32(_), Some(_)) => bail_format!("tensor {name:?} is float32, expected codes"),
        (TensorData::Codes(_) | TensorData::PackedCodes(_), None) => {
            bail_format!("tensor {name:?} holds codes, expected float32")
        }
    };
    if found != elements {
        bail_format!("tensor {name:?} has {found} elements, expected {elements}");
    }
    if let Some(problem) = problem {
        bail_format!("tensor {name:?} {problem}");
    }
    Ok(())
}
