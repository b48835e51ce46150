//! The network as data: nodes in topological order and the tensors they use.
//!
//! A [`Graph`] is what the JSON in a `.qcnn` file says; [`Network::new`] checks
//! it once (names, order, shapes, tensors, codes), after which every other
//! module may rely on what it holds.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};

use crate::codebooks::first_inexact;
use crate::error::{Result, bail_format, bail_shape};
use crate::geometry::{ConvGeometry, PoolGeometry, checked_product};
use crate::ops::quantize::{LinearQuantizer, Log2Quantizer};
use crate::ops::strided::MAX_AXES;
use crate::pack::{Codes, SharedBytes, check_packed, unpack_signs};

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
        /// Sets of codebooks: 1 for all outputs, or one each for equal parts of the
        /// outputs of every group.
        codebook_groups: usize,
        /// How codewords are stored.
        #[serde(default)]
        codebook_bits: CodebookBits,
    },
    /// 1 and -1, tensor `<node>.signs`.
    Binary {},
}

/// Bits of a number in a codebook on disk. In memory it is an f32, one of those
/// that the stored form gives back exactly.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "u8", try_from = "u8")]
pub enum CodebookBits {
    /// f32; also what files say that do not say anything.
    #[default]
    Float32,
    /// IEEE half precision.
    Float16,
    /// Integers from -127 to 127, with one scale per subspace.
    Int8,
}

impl From<CodebookBits> for u8 {
    fn from(bits: CodebookBits) -> Self {
        match bits {
            CodebookBits::Float32 => 32,
            CodebookBits::Float16 => 16,
            CodebookBits::Int8 => 8,
        }
    }
}

impl TryFrom<u8> for CodebookBits {
    type Error = String;

    fn try_from(bits: u8) -> std::result::Result<Self, String> {
        match bits {
            32 => Ok(Self::Float32),
            16 => Ok(Self::Float16),
            8 => Ok(Self::Int8),
            _ => Err(format!("codebook_bits is {bits}, expected 32, 16 or 8")),
        }
    }
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
    QuantizeLinear {
        bits: u32,
        low: f32,
        high: f32,
    },
    QuantizeLog2 {
        bits: u32,
        high: f32,
    },
    Sign {},
    Add {},
    Mul {},
    Concat {},
    Flatten {},
    Reshape {
        shape: Shape,
    },
    Slice {
        start: Shape,
        step: Shape,
        shape: Shape,
    },
    Pad {
        before: Shape,
        after: Shape,
        value: f32,
    },
    Transpose {
        view: Shape,
        axes: Vec<usize>,
        shape: Shape,
    },
    BatchNorm {
        epsilon: f32,
    },
    Softmax {},
    LogSoftmax {},
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
    /// Binary weights, each 1 or -1.
    Signs(Vec<i8>),
    /// Codes or signs as a bit stream, see [`crate::pack`]: less than half the
    /// memory, unpacked a layer at a time where they are needed. The bit of a
    /// sign is 1 for 1, 0 for -1.
    Packed(SharedBytes),
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
            Self::QuantizeLinear { .. } => "quantize_linear",
            Self::QuantizeLog2 { .. } => "quantize_log2",
            Self::Sign {} => "sign",
            Self::Add {} => "add",
            Self::Mul {} => "mul",
            Self::Concat {} => "concat",
            Self::Flatten {} => "flatten",
            Self::Reshape { .. } => "reshape",
            Self::Slice { .. } => "slice",
            Self::Pad { .. } => "pad",
            Self::Transpose { .. } => "transpose",
            Self::BatchNorm { .. } => "batch_norm",
            Self::Softmax {} => "softmax",
            Self::LogSoftmax {} => "log_softmax",
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
    /// Sets of codebooks: 1, or one each for equal parts of the outputs; a part has
    /// outputs of one group only.
    pub codebook_groups: usize,
    /// How codewords are stored.
    pub codebook_bits: CodebookBits,
}

impl PqGeometry {
    /// `outputs` are those that may have codebooks of their own.
    fn new(
        what: &str,
        weights: &Weights,
        channels: usize,
        groups: usize,
        outputs: usize,
    ) -> Result<Option<Self>> {
        let &Weights::ProductQuantized {
            n_subspaces,
            n_centroids,
            subvector_dim,
            codebook_groups,
            codebook_bits,
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
        let parts_of_groups = codebook_groups.is_multiple_of(groups);
        if codebook_groups != 1 && !(parts_of_groups && outputs.is_multiple_of(codebook_groups)) {
            bail_format!(
                "{what}: codebook_groups is {codebook_groups}, expected 1 or a multiple of \
                 {groups} that divides {outputs}"
            );
        }
        Ok(Some(Self {
            n_subspaces,
            n_centroids,
            subvector_dim,
            codebook_groups,
            codebook_bits,
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
    /// What its elements are.
    pub content: Content,
}

impl TensorSpec {
    /// For codes, the geometry they index.
    pub fn codes(&self) -> Option<PqGeometry> {
        match self.content {
            Content::Codes(pq) => Some(pq),
            Content::Floats | Content::Codebooks { .. } | Content::Signs => None,
        }
    }
}

/// What the elements of a tensor are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Finite float32 parameters.
    Floats,
    /// Codebooks for so many channels.
    Codebooks {
        /// Shape, and how they are stored.
        pq: PqGeometry,
        /// Channels of one group.
        channels: usize,
    },
    /// Codes below the geometry's number of codewords.
    Codes(PqGeometry),
    /// 1 or -1.
    Signs,
}

impl Content {
    /// Bits of an element on disk and what there can be, if it is stored as a bit
    /// stream.
    pub fn packed(&self) -> Option<(u32, usize)> {
        match self {
            Self::Codes(pq) => Some((pq.code_bits(), pq.n_centroids)),
            Self::Signs => Some((1, 2)),
            Self::Floats | Self::Codebooks { .. } => None,
        }
    }

    /// What it is called in errors.
    fn name(&self) -> &'static str {
        match self {
            Self::Codes(_) => "codes",
            Self::Signs => "signs",
            Self::Floats | Self::Codebooks { .. } => "float32",
        }
    }
}

/// Resolved geometry of a node.
#[derive(Clone, Debug, PartialEq)]
pub enum Geometry {
    /// Convolution, and how its weights are product-quantised, if they are.
    Conv(ConvGeometry, Option<PqGeometry>),
    /// Fully connected layer: input and output features, the same.
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
                Op::Add {} | Op::Mul {} | Op::Concat {} => operands.len() >= 2,
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

fn check_reshape(what: &str, from: &[usize], to: &[usize]) -> Result<()> {
    if checked_product(what, to)? != checked_product(what, from)? {
        bail_shape!("{what}: cannot reshape {from:?} to {to:?}");
    }
    Ok(())
}

fn check_rank(what: &str, field: &str, values: &[usize], input: &[usize]) -> Result<()> {
    if values.len() != input.len() {
        bail_shape!(
            "{what}: {field} is {values:?}, expected one number for each axis of {input:?}"
        );
    }
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
            let pq = PqGeometry::new(
                what,
                weights,
                conv.group_in_channels(),
                *groups,
                *out_channels,
            )?;
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
            // Its kernels have one set of codebooks.
            let pq = PqGeometry::new(what, weights, in_features, 1, 1)?;
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
        Op::QuantizeLinear { bits, low, high } => {
            LinearQuantizer::new(what, *bits, *low, *high)?;
            keep()
        }
        Op::QuantizeLog2 { bits, high } => {
            Log2Quantizer::new(what, *bits, *high)?;
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
        | Op::Sign {}
        | Op::Softmax {}
        | Op::LogSoftmax {} => keep(),
        Op::Add {} | Op::Mul {} => {
            let fits = |other: &[usize]| {
                let mut extents = other.iter().zip(first);
                other.len() == first.len() && extents.all(|(n, all)| n == all || *n == 1)
            };
            if let Some(other) = operands.iter().find(|s| !fits(s)) {
                bail_shape!(
                    "{what}: operands have shapes {first:?} and {other:?}, \
                     expected the same, or extents of 1 in all but the first"
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
            check_reshape(what, first, shape)?;
            (shape.clone(), Geometry::Plain)
        }
        Op::Slice { start, step, shape } => {
            for (field, values) in [("start", start), ("step", step), ("shape", shape)] {
                check_rank(what, field, values, first)?;
            }
            for (axis, extent) in first.iter().enumerate() {
                let last = (shape[axis].max(1) - 1)
                    .checked_mul(step[axis])
                    .and_then(|n| n.checked_add(start[axis]));
                if step[axis] == 0 || last.is_none_or(|last| last >= *extent) {
                    bail_shape!(
                        "{what}: start {start:?}, step {step:?} and shape {shape:?} leave \
                         the input of shape {first:?}"
                    );
                }
            }
            (shape.clone(), Geometry::Plain)
        }
        Op::Pad {
            before,
            after,
            value,
        } => {
            check_finite(what, "value", *value)?;
            check_rank(what, "before", before, first)?;
            check_rank(what, "after", after, first)?;
            let padded = |(axis, extent): (usize, &usize)| {
                extent.checked_add(before[axis])?.checked_add(after[axis])
            };
            match first.iter().enumerate().map(padded).collect() {
                Some(shape) => (shape, Geometry::Plain),
                None => bail_shape!("{what}: too much padding"),
            }
        }
        Op::Transpose { view, axes, shape } => {
            check_reshape(what, first, view)?;
            check_reshape(what, first, shape)?;
            let mut sorted = axes.clone();
            sorted.sort_unstable();
            if view.len() > MAX_AXES || !sorted.into_iter().eq(0..view.len()) {
                bail_format!(
                    "{what}: axes are {axes:?}, expected an order of the axes of \
                     view {view:?}, at most {MAX_AXES}"
                );
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
    let float = |shape: Vec<usize>| TensorSpec {
        shape,
        content: Content::Floats,
    };
    let weights =
        |dense: Vec<usize>, codes: Vec<usize>, form: &Weights, pq: Option<PqGeometry>| match pq {
            None if *form == Weights::Binary {} => vec![(
                "signs",
                TensorSpec {
                    shape: dense,
                    content: Content::Signs,
                },
            )],
            None => vec![("weight", float(dense))],
            Some(pq) => vec![
                (
                    "codebooks",
                    TensorSpec {
                        shape: pq.codebooks_shape(),
                        content: Content::Codebooks {
                            pq,
                            channels: dense[1],
                        },
                    },
                ),
                (
                    "codes",
                    TensorSpec {
                        shape: codes,
                        content: Content::Codes(pq),
                    },
                ),
            ],
        };
    let (mut specs, bias, outputs) = match (op, geometry) {
        (
            Op::Conv {
                bias,
                weights: form,
                ..
            },
            Geometry::Conv(conv, pq),
        ) => {
            let [kh, kw] = conv.kernel;
            let out = conv.out_channels;
            let dense = vec![out, conv.group_in_channels(), kh, kw];
            let codes = vec![out, kh, kw, pq.map_or(0, |p| p.n_subspaces)];
            (weights(dense, codes, form, *pq), *bias, out)
        }
        (
            Op::Fc {
                bias,
                weights: form,
                ..
            },
            &Geometry::Fc(inputs, outputs, pq),
        ) => {
            let codes = vec![outputs, pq.map_or(0, |p| p.n_subspaces)];
            let specs = weights(vec![outputs, inputs], codes, form, pq);
            (specs, *bias, outputs)
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
            TensorData::Codes(_) | TensorData::Signs(_) | TensorData::Packed(_) => None,
        }
    }

    /// The weights of a binary node, each 1 or -1, in the order of a dense weight.
    pub fn signs(&self, node: &str) -> Option<Cow<'_, [i8]>> {
        let tensor = self.tensors.get(&format!("{node}.signs"))?;
        match &tensor.data {
            TensorData::Signs(signs) => Some(Cow::Borrowed(signs)),
            TensorData::Packed(bytes) => {
                let n = tensor.shape.iter().product();
                Some(Cow::Owned(unpack_signs(bytes, n)))
            }
            TensorData::F32(_) | TensorData::Codes(_) => None,
        }
    }

    /// The codes of a product-quantised node.
    pub fn codes(&self, node: &str) -> Option<Codes<'_>> {
        let name = format!("{node}.codes");
        let spec = self.layout.tensors.get(&name)?;
        let pq = spec.codes()?;
        match &self.tensors[&name].data {
            TensorData::Codes(codes) => Some(Codes::Unpacked(codes)),
            TensorData::Packed(bytes) => Some(Codes::Packed {
                bytes,
                n: spec.shape.iter().product(),
                bits: pq.code_bits(),
            }),
            TensorData::F32(_) | TensorData::Signs(_) => None,
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
    let too_large = |codes: &[u16], n_centroids: usize| {
        let i = codes.iter().position(|&c| usize::from(c) >= n_centroids)?;
        Some(format!(
            "is {} at element {i}, expected codes below n_centroids = {n_centroids}",
            codes[i]
        ))
    };
    let no_sign = |signs: &[i8]| {
        let i = signs.iter().position(|s| !matches!(s, 1 | -1))?;
        Some(format!("is {} at element {i}, expected 1 or -1", signs[i]))
    };
    let not_finite = |data: &[f32]| {
        let i = data.iter().position(|v| !v.is_finite())?;
        Some(format!(
            "is {} at element {i}, expected finite numbers",
            data[i]
        ))
    };
    let inexact = |data: &[f32], pq: PqGeometry, channels: usize| {
        // Of another length it is refused below.
        let i = (data.len() == elements).then(|| first_inexact(pq, channels, data))??;
        Some(format!(
            "is {} at element {i}, which codebooks of {} bits do not give back, \
             expected numbers rounded to them",
            data[i],
            u8::from(pq.codebook_bits)
        ))
    };
    let (found, problem) = match (&tensor.data, spec.content, spec.content.packed()) {
        (TensorData::F32(data), Content::Floats, _) => (data.len(), not_finite(data)),
        (TensorData::F32(data), Content::Codebooks { pq, channels }, _) => {
            let problem = not_finite(data).or_else(|| inexact(data, pq, channels));
            (data.len(), problem)
        }
        (TensorData::Codes(data), Content::Codes(pq), _) => {
            (data.len(), too_large(data, pq.n_centroids))
        }
        (TensorData::Signs(data), Content::Signs, _) => (data.len(), no_sign(data)),
        (TensorData::Packed(bytes), _, Some((bits, n_values))) => {
            check_packed(name, bytes, elements, bits)?;
            // Where everything that fits the bits is valid, there is nothing to
            // look for.
            let problem = if n_values == 1 << bits {
                None
            } else {
                let n = elements;
                let codes = Codes::Packed { bytes, n, bits };
                too_large(codes.all(&mut Vec::new()), n_values)
            };
            (elements, problem)
        }
        (data, content, _) => {
            let found = match data {
                TensorData::F32(_) => "float32",
                TensorData::Codes(_) => "codes",
                TensorData::Signs(_) => "signs",
                TensorData::Packed(_) => "packed bits",
            };
            let expected = content.name();
            bail_format!("tensor {name:?} holds {found}, expected {expected}")
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
