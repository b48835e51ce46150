//! Running a network: everything is planned once, then runs without
//! allocating.

use std::collections::HashMap;

use crate::error::{Error, Result, bail_shape};
use crate::geometry::MAX_ELEMENTS;
use crate::graph::{Geometry, Network, Node, Op, PqGeometry};
use crate::isa::{Isa, Level};
use crate::kernels::{ConvLayer, FcLayer, Grid, Kernel, Levels, Weights, conv_kernels, fc_kernels};
use crate::memory::Buffer;
use crate::ops::activation::Activation;
use crate::ops::elementwise::{self, Combination, Combine};
use crate::ops::lrn::Lrn;
use crate::ops::norm::BatchNorm;
use crate::ops::pool::{self, Pool, Reduction};
use crate::ops::quantize::LinearQuantizer;
use crate::ops::rearrange::Rearrange;
use crate::ops::softmax;
use crate::precision::Precision;

/// How to plan a session.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Level to use; `None` leaves it to [`Isa::detect`].
    pub isa: Option<Isa>,
    /// How exactly to compute.
    pub precision: Precision,
}

/// Where a value lies while the network runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// In the caller's input.
    Input,
    /// In a buffer of the workspace.
    Slot(usize),
}

/// What a step does.
#[derive(Debug)]
enum Action {
    /// Nothing: the value is its operand under another name and shape.
    Alias,
    /// Convolution or fully connected layer.
    Kernel(Box<dyn Kernel>),
    Pool(Pool),
    GlobalPool {
        reduction: Reduction,
        pixels: usize,
    },
    Concat,
    Rearrange(Rearrange),
    // The rest work in place, on a copy of the first operand where that is
    // still needed.
    Activation(Activation),
    Lrn {
        lrn: Lrn,
        channels: usize,
        pixels: usize,
    },
    BatchNorm {
        norm: BatchNorm,
        pixels: usize,
    },
    Softmax {
        logarithm: bool,
        channels: usize,
        pixels: usize,
    },
    /// With each operand but the first.
    Combine(Vec<Combine>),
}

impl Action {
    fn works_in_place(&self) -> bool {
        matches!(
            self,
            Self::Activation(_)
                | Self::Lrn { .. }
                | Self::BatchNorm { .. }
                | Self::Softmax { .. }
                | Self::Combine(_)
        )
    }

    fn scratch_len(&self, n: usize) -> usize {
        match self {
            Self::Kernel(kernel) => kernel.scratch_len(n),
            Self::Pool(pool) => pool.scratch_len(),
            Self::Lrn { lrn, channels, .. } => lrn.scratch_len(*channels),
            _ => 0,
        }
    }
}

/// A value an operation reads: where it lies, elements per image.
#[derive(Clone, Copy, Debug)]
struct Operand {
    place: Place,
    len: usize,
}

/// One node, planned.
#[derive(Debug)]
struct Step {
    name: String,
    action: Action,
    operands: Vec<Operand>,
    output: Operand,
    fused: Fused,
}

/// Steps that a kernel runs with in one go. ReLU that follows is not among them: there all
/// that can do it do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fused {
    None,
    /// The next two, a normalisation and a sign.
    Sign,
    /// Max-pooling that follows, after ReLU or at once.
    Pool {
        relu: bool,
    },
}

impl Step {
    /// Whether this changes `other`'s response in its place: then no other step reads
    /// that response.
    fn changes(&self, other: &Self) -> bool {
        self.operands[0].place == other.output.place && self.output.place == other.output.place
    }

    /// Whether this is nothing but ReLU of `other`'s response, in the same place.
    fn is_relu_of(&self, other: &Self) -> bool {
        matches!(self.action, Action::Activation(Activation::Relu)) && self.changes(other)
    }

    /// Fold a normalisation and a sign that follow at once into the kernel.
    fn fold(&mut self, norm: &Self, sign: &Self) {
        if !norm.changes(self) || !sign.changes(norm) {
            return;
        }
        if let (
            Action::Kernel(kernel),
            Action::BatchNorm { norm, .. },
            Action::Activation(Activation::Sign),
        ) = (&mut self.action, &norm.action, &sign.action)
            && kernel.fold(norm)
        {
            self.fused = Fused::Sign;
        }
    }

    /// Run a kernel in another way than alone, up to the step whose response `output` is;
    /// the result is that of `run`.
    fn run_kernel(
        &self,
        workspace: &mut Workspace,
        input: &[f32],
        n: usize,
        output: Operand,
        run: impl FnOnce(&dyn Kernel, &[f32], &mut [f32], &mut [f32]) -> bool,
    ) -> bool {
        let (Action::Kernel(kernel), Place::Slot(slot)) = (&self.action, output.place) else {
            return false;
        };
        let mut buffer = std::mem::take(&mut workspace.slots[slot]);
        let mut scratch = std::mem::take(&mut workspace.scratch);
        let output = &mut buffer[..n * output.len];
        let value = workspace.value(input, self.operands[0], n);
        let done = run(&**kernel, value, output, &mut scratch);
        workspace.scratch = scratch;
        workspace.slots[slot] = buffer;
        done
    }
}

/// A network planned for one ISA: packed weights, kernels, and which buffer
/// every value goes to.
///
/// A session is immutable and may be shared between threads, each with a
/// [`Workspace`] of its own.
#[derive(Debug)]
pub struct Session {
    isa: Isa,
    level: Level,
    precision: Precision,
    input_len: usize,
    steps: Vec<Step>,
    output: Operand,
    /// Elements per image of each buffer.
    slots: Vec<usize>,
}

impl Session {
    /// Plan `network`.
    pub fn new(network: &Network, options: Options) -> Result<Self> {
        let isa = match options.isa {
            Some(isa) => isa.check_available()?,
            None => Isa::detect()?,
        };
        let level = isa.level().expect("the level was just checked");
        let graph = network.graph();
        let levels = known_levels(network);
        // Unpacked codes of one layer at a time.
        let mut codes = Vec::new();
        let actions = graph
            .nodes
            .iter()
            .zip(&network.layout().geometries)
            .map(|(node, geometry)| {
                let input = *levels.get(&*node.inputs[0]).unwrap_or(&Levels::Any);
                let options = (isa, options.precision);
                plan_action(network, node, geometry, input, options, &mut codes)
            })
            .collect::<Result<Vec<_>>>()?;
        let pooled = pooling(network, &actions);
        let plan = BufferPlan::new(network, &actions, &pooled);
        let operand = |name: &String| Operand {
            place: plan.places[name.as_str()],
            len: network.shape(name).iter().product(),
        };
        let mut steps = graph
            .nodes
            .iter()
            .zip(actions)
            .zip(pooled)
            .map(|((node, action), fused)| Step {
                name: node.name.clone(),
                action,
                operands: node.inputs.iter().map(operand).collect(),
                output: operand(&node.name),
                fused,
            })
            .collect::<Vec<_>>();
        for i in 2..steps.len() {
            if let [kernel, norm, sign] = &mut steps[i - 2..=i] {
                kernel.fold(norm, sign);
            }
        }
        Ok(Self {
            isa,
            level,
            precision: options.precision,
            input_len: graph.input.shape.iter().product(),
            steps,
            output: operand(&graph.output),
            slots: plan.slots,
        })
    }

    /// The level the session is planned for.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// The precision it was asked for.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Elements of one image of the input.
    pub fn input_len(&self) -> usize {
        self.input_len
    }

    /// Elements of one image of the output.
    pub fn output_len(&self) -> usize {
        self.output.len
    }

    /// Name of the kernel of each convolution and fully connected layer, by
    /// node, in the network's order.
    pub fn kernels(&self) -> impl Iterator<Item = (&str, &str)> {
        self.steps.iter().filter_map(|step| match &step.action {
            Action::Kernel(kernel) => Some((step.name.as_str(), kernel.name())),
            _ => None,
        })
    }

    /// Elements of scratch for batches of up to `n` images.
    fn scratch_len(&self, n: usize) -> usize {
        let lens = self.steps.iter().map(|step| step.action.scratch_len(n));
        lens.max().unwrap_or(0)
    }

    /// Bytes of a [`Workspace`] for batches of `n` images.
    pub fn workspace_bytes(&self, n: usize) -> usize {
        let slots: usize = self
            .slots
            .iter()
            .map(|len| Buffer::<f32>::bytes(len.saturating_mul(n)))
            .fold(0, usize::saturating_add);
        slots.saturating_add(Buffer::<f32>::bytes(self.scratch_len(n)))
    }

    /// Compute the network's output for `n` images.
    ///
    /// `input` and `output` hold `n` images back to back. Nothing is allocated.
    /// An image's output is the same to the last bit in every call, whatever the
    /// batch it comes in.
    pub fn run(
        &self,
        workspace: &mut Workspace,
        input: &[f32],
        n: usize,
        output: &mut [f32],
    ) -> Result<()> {
        if output.len() != n.saturating_mul(self.output.len) {
            bail_shape!(
                "output has {} elements, expected {n} images of {} each",
                output.len(),
                self.output.len
            );
        }
        if self.check(workspace, input, n)? {
            let mut steps = self.steps.iter().peekable();
            while let Some(step) = steps.next() {
                if step.fused == Fused::Sign {
                    step.run_kernel(workspace, input, n, step.output, |kernel, x, y, scratch| {
                        kernel.run_folded(n, x, y, scratch);
                        true
                    });
                    // The normalisation and the sign.
                    steps.nth(1);
                    continue;
                }
                if let Fused::Pool { relu } = step.fused {
                    let pool = steps.nth(relu.into()).expect("the pooling was there");
                    step.run_kernel(workspace, input, n, pool.output, |kernel, x, y, scratch| {
                        kernel.run_pooled(relu, n, x, y, scratch);
                        true
                    });
                    continue;
                }
                let relu = steps.next_if(|next| next.is_relu_of(step));
                let fused = relu.is_some()
                    && step.run_kernel(
                        workspace,
                        input,
                        n,
                        step.output,
                        |kernel, x, y, scratch| kernel.run_relu(n, x, y, scratch),
                    );
                if fused {
                    continue;
                }
                self.run_step(step, workspace, input, n);
                if let Some(relu) = relu {
                    self.run_step(relu, workspace, input, n);
                }
            }
            output.copy_from_slice(workspace.value(input, self.output, n));
        }
        Ok(())
    }

    /// Compute every node for `n` images and show each value to `visit`: the
    /// node's name and its response to the `n` images, back to back.
    pub fn trace(
        &self,
        workspace: &mut Workspace,
        input: &[f32],
        n: usize,
        mut visit: impl FnMut(&str, &[f32]),
    ) -> Result<()> {
        if self.check(workspace, input, n)? {
            for step in &self.steps {
                self.run_step(step, workspace, input, n);
                visit(&step.name, workspace.value(input, step.output, n));
            }
        }
        Ok(())
    }

    /// Whether there is anything to compute for `n` images, or what is wrong.
    fn check(&self, workspace: &Workspace, input: &[f32], n: usize) -> Result<bool> {
        if input.len() != n.saturating_mul(self.input_len) {
            bail_shape!(
                "input has {} elements, expected {n} images of {} each",
                input.len(),
                self.input_len
            );
        }
        workspace.check(self, n)?;
        Ok(n > 0)
    }

    fn run_step(&self, step: &Step, workspace: &mut Workspace, input: &[f32], n: usize) {
        let level = self.level;
        let Place::Slot(slot) = step.output.place else {
            // Only aliases lie in the input.
            return;
        };
        if matches!(step.action, Action::Alias) {
            return;
        }
        // Taken out, so that the other buffers can be borrowed beside it.
        let mut buffer = std::mem::take(&mut workspace.slots[slot]);
        let output = &mut buffer[..n * step.output.len];
        let mut scratch = std::mem::take(&mut workspace.scratch);
        let scratch_slice = &mut scratch;
        let first = step.operands[0];
        if step.action.works_in_place() && first.place != step.output.place {
            output.copy_from_slice(workspace.value(input, first, n));
        }
        match &step.action {
            Action::Alias => {}
            Action::Kernel(kernel) => {
                kernel.run(n, workspace.value(input, first, n), output, scratch_slice);
            }
            Action::Pool(pool) => {
                pool.run(
                    level,
                    workspace.value(input, first, n),
                    output,
                    scratch_slice,
                );
            }
            Action::GlobalPool { reduction, pixels } => {
                pool::global(
                    level,
                    *reduction,
                    *pixels,
                    workspace.value(input, first, n),
                    output,
                );
            }
            Action::Lrn {
                lrn,
                channels,
                pixels,
            } => lrn.run(level, [*channels, *pixels], output, scratch_slice),
            Action::Concat => {
                let mut offset = 0;
                for operand in &step.operands {
                    let value = workspace.value(input, *operand, n);
                    elementwise::concat_one(value, operand.len, output, step.output.len, offset);
                    offset += operand.len;
                }
            }
            Action::Rearrange(plan) => {
                let value = workspace.value(input, first, n);
                plan.run(level, [first.len, step.output.len], value, output);
            }
            Action::Activation(activation) => activation.run(level, output),
            Action::BatchNorm { norm, pixels } => norm.run(level, *pixels, output),
            Action::Softmax {
                logarithm,
                channels,
                pixels,
            } => softmax::softmax(level, *logarithm, *channels, *pixels, output),
            Action::Combine(plans) => {
                for (plan, operand) in plans.iter().zip(&step.operands[1..]) {
                    plan.run(level, output, workspace.value(input, *operand, n));
                }
            }
        }
        workspace.scratch = scratch;
        workspace.slots[slot] = buffer;
    }
}

/// What is known of values.
fn known_levels(network: &Network) -> HashMap<&str, Levels> {
    let mut known: HashMap<&str, Levels> = HashMap::new();
    for node in &network.graph().nodes {
        let mut inputs = node.inputs.iter().map(|name| known.get(&**name).copied());
        let first = inputs.next().flatten();
        let levels = match node.op {
            Op::Sign {} => Some(Levels::Signs),
            Op::QuantizeLinear { bits, low, high } => grid(bits, low, high),
            Op::Flatten {}
            | Op::Reshape { .. }
            | Op::Dropout { .. }
            | Op::MaxPool { .. }
            | Op::GlobalMaxPool {}
            | Op::Slice { .. }
            | Op::Transpose { .. }
            | Op::Concat {} => first,
            // 0 is one of the levels of a grid.
            Op::Relu {} => first.filter(|levels| *levels != Levels::Signs),
            Op::Mul {} => first.filter(|levels| *levels == Levels::Signs),
            _ => None,
        };
        if let Some(levels) = levels.filter(|_| inputs.all(|input| input == first)) {
            known.insert(&node.name, levels);
        }
    }
    known
}

/// The levels of a linear quantiser, if there are few enough and 0 is one of them.
fn grid(bits: u32, low: f32, high: f32) -> Option<Levels> {
    let quantizer = LinearQuantizer::new("node", bits, low, high).ok()?;
    let (step, zero) = (quantizer.step(), (-low / quantizer.step()).round());
    // Or the least and the greatest lie between two levels.
    let exact = (zero * step + low).abs() <= 1e-5 * step;
    let fits = bits <= 8 && (0.0..=255.0).contains(&zero) && exact;
    let zero = zero as i32;
    fits.then_some(Levels::Grid(Grid { step, zero }))
}

/// Choose the action of `node`, given what is known of its first input, and pack its
/// weights. `codes` may hold anything.
#[expect(clippy::too_many_lines, reason = "one arm per operation")]
fn plan_action(
    network: &Network,
    node: &Node,
    geometry: &Geometry,
    input: Levels,
    (isa, precision): (Isa, Precision),
    codes: &mut Vec<u16>,
) -> Result<Action> {
    // Channels and pixels; a vector of features is one pixel.
    let shape = network.shape(&node.inputs[0]);
    let (channels, pixels) = (shape[0], shape[1..].iter().product());
    let parameter = |suffix: &str| network.floats(&node.name, suffix);
    let signs = network.signs(&node.name);
    let weights = |pq: &Option<PqGeometry>| match *pq {
        None => match &signs {
            Some(signs) => Weights::Binary { signs, input },
            None => Weights::Dense(parameter("weight").expect("checked by Network::new")),
        },
        Some(geometry) => Weights::ProductQuantized {
            geometry,
            codebooks: parameter("codebooks").expect("checked by Network::new"),
            codes: network.codes(&node.name).expect("checked by Network::new"),
        },
    };
    let combine = |combination| {
        let operands = node.inputs[1..].iter();
        operands
            .map(|name| Combine::new(combination, shape, network.shape(name)))
            .collect()
    };
    Ok(match (&node.op, geometry) {
        (Op::Conv { .. }, Geometry::Conv(geometry, pq)) => {
            let layer = ConvLayer {
                geometry,
                weights: weights(pq).unpacked(codes),
                bias: parameter("bias"),
            };
            Action::Kernel(conv_kernels(&layer, isa, precision)[0].build())
        }
        (Op::Fc { .. }, Geometry::Fc(in_features, out_features, pq)) => {
            let layer = FcLayer {
                in_features: *in_features,
                out_features: *out_features,
                weights: weights(pq),
                bias: parameter("bias"),
            };
            Action::Kernel(fc_kernels(&layer, isa, precision)[0].build())
        }
        (Op::MaxPool { .. }, Geometry::Pool(geometry)) => {
            Action::Pool(Pool::new(geometry, Reduction::Max))
        }
        (
            &Op::AveragePool {
                count_include_pad, ..
            },
            Geometry::Pool(geometry),
        ) => Action::Pool(Pool::new(
            geometry,
            Reduction::Average { count_include_pad },
        )),
        (Op::GlobalMaxPool {}, _) => Action::GlobalPool {
            reduction: Reduction::Max,
            pixels,
        },
        (Op::GlobalAveragePool {}, _) => Action::GlobalPool {
            reduction: Reduction::Average {
                count_include_pad: false,
            },
            pixels,
        },
        (
            &Op::Lrn {
                size,
                alpha,
                beta,
                bias,
            },
            _,
        ) => Action::Lrn {
            lrn: Lrn {
                size,
                alpha,
                beta,
                bias,
            },
            channels,
            pixels,
        },
        (&Op::BatchNorm { epsilon }, _) => {
            let channel = |suffix| parameter(suffix).expect("checked by Network::new");
            let norm = BatchNorm::new(
                &format!("node {:?}", node.name),
                channel("scale"),
                channel("bias"),
                channel("mean"),
                channel("variance"),
                epsilon,
            )?;
            Action::BatchNorm { norm, pixels }
        }
        (Op::Softmax {} | Op::LogSoftmax {}, _) => Action::Softmax {
            logarithm: node.op == Op::LogSoftmax {},
            channels,
            pixels,
        },
        (Op::Add {}, _) => Action::Combine(combine(Combination::Sum)),
        (Op::Mul {}, _) => Action::Combine(combine(Combination::Product)),
        (Op::Concat {}, _) => Action::Concat,
        (
            Op::Slice {
                start,
                step,
                shape: taken,
            },
            _,
        ) => Action::Rearrange(Rearrange::slice(shape, start, step, taken)),
        (
            &Op::Pad {
                ref before, value, ..
            },
            _,
        ) => {
            let padded = network.shape(&node.name);
            Action::Rearrange(Rearrange::pad(shape, before, padded, value))
        }
        (Op::Transpose { view, axes, .. }, _) => {
            Action::Rearrange(Rearrange::transpose(view, axes))
        }
        (Op::Flatten {} | Op::Reshape { .. } | Op::Dropout { .. }, _) => Action::Alias,
        (op, _) => Action::Activation(
            Activation::from_op(op).expect("every other operation is an activation"),
        ),
    })
}

/// Which kernels can run with a max-pooling that follows: nothing else may read what is in
/// between.
fn pooling(network: &Network, actions: &[Action]) -> Vec<Fused> {
    let graph = network.graph();
    let mut readers: HashMap<&str, usize> = HashMap::from([(&*graph.output, 1)]);
    for input in graph.nodes.iter().flat_map(|node| &node.inputs) {
        *readers.entry(input).or_default() += 1;
    }
    // What reads the response of node `i`, if the next one alone does.
    let only_reader = |i: usize| {
        let (name, next) = (&graph.nodes[i].name, graph.nodes.get(i + 1)?);
        let only = next.inputs.contains(name) && readers[name.as_str()] == 1;
        only.then(|| &actions[i + 1])
    };
    let fused = |i: usize| {
        let relu = matches!(only_reader(i), Some(Action::Activation(Activation::Relu)));
        match (&actions[i], only_reader(i + usize::from(relu))) {
            (Action::Kernel(kernel), Some(Action::Pool(pool)))
                if kernel.pools() && pool.is_max_of_two_by_two() =>
            {
                Fused::Pool { relu }
            }
            _ => Fused::None,
        }
    };
    (0..actions.len()).map(fused).collect()
}

/// Assignment of values to buffers.
struct BufferPlan<'a> {
    places: HashMap<&'a str, Place>,
    slots: Vec<usize>,
}

impl<'a> BufferPlan<'a> {
    /// Walk through the steps and give each value a buffer that no value still
    /// needed occupies.
    fn new(network: &'a Network, actions: &[Action], fused: &[Fused]) -> Self {
        let graph = network.graph();
        // Aliases share the storage of the value they stand for.
        let mut storage: HashMap<&str, &str> =
            HashMap::from([(&*graph.input.name, &*graph.input.name)]);
        // The last step that reads or makes a storage.
        let mut last_use: HashMap<&str, usize> = HashMap::new();
        for (i, (node, action)) in graph.nodes.iter().zip(actions).enumerate() {
            for input in &node.inputs {
                last_use.insert(storage[input.as_str()], i);
            }
            let own = match action {
                Action::Alias => storage[node.inputs[0].as_str()],
                _ => node.name.as_str(),
            };
            storage.insert(&node.name, own);
            last_use.insert(own, i);
        }
        last_use.insert(storage[graph.output.as_str()], usize::MAX);
        // A kernel still reads its input while it writes what is pooled.
        for (i, (node, fused)) in graph.nodes.iter().zip(fused).enumerate() {
            if let Fused::Pool { relu } = *fused {
                let last = last_use
                    .get_mut(storage[node.inputs[0].as_str()])
                    .expect("the node uses it");
                *last = (*last).max(i + 1 + usize::from(relu));
            }
        }

        let mut places = HashMap::from([(&*graph.input.name, Place::Input)]);
        let mut slots: Vec<usize> = Vec::new();
        let mut free: Vec<usize> = Vec::new();
        // Buffers in use, with the storage they hold.
        let mut held: Vec<(usize, &str)> = Vec::new();
        for (i, (node, action)) in graph.nodes.iter().zip(actions).enumerate() {
            let operands: Vec<&str> = node
                .inputs
                .iter()
                .map(|name| storage[name.as_str()])
                .collect();
            let first = places[node.inputs[0].as_str()];
            let place = if matches!(action, Action::Alias) {
                first
            } else if action.works_in_place()
                && first != Place::Input
                && last_use[operands[0]] == i
                // `add(x, x)` may not change `x` before it has read it twice.
                && !operands[1..].contains(&operands[0])
            {
                held.retain(|(_, name)| *name != operands[0]);
                first
            } else {
                let len = network.shape(&node.name).iter().product();
                Place::Slot(take_slot(&mut slots, &mut free, len))
            };
            places.insert(&node.name, place);
            if let (Place::Slot(slot), false) = (place, matches!(action, Action::Alias)) {
                held.push((slot, &node.name));
            }
            held.retain(|(slot, name)| {
                let needed = last_use[name] > i;
                if !needed {
                    free.push(*slot);
                }
                needed
            });
        }
        Self { places, slots }
    }
}

/// The free buffer that fits best, grown if none is large enough.
fn take_slot(slots: &mut Vec<usize>, free: &mut Vec<usize>, len: usize) -> usize {
    let fits = |slot: &usize| slots[*slot] >= len;
    // The smallest that is large enough, or else the largest.
    let best = free
        .iter()
        .enumerate()
        .min_by_key(|(_, slot)| (!fits(slot), slots[**slot].abs_diff(len)))
        .map(|(i, _)| i);
    if let Some(i) = best {
        let slot = free.swap_remove(i);
        slots[slot] = slots[slot].max(len);
        slot
    } else {
        slots.push(len);
        slots.len() - 1
    }
}

/// All memory a [`Session`] needs to run batches of up to a given size.
#[derive(Debug)]
pub struct Workspace {
    max_batch: usize,
    slots: Vec<Buffer<f32>>,
    scratch: Buffer<f32>,
}

impl Workspace {
    /// Allocate for batches of up to `max_batch` images.
    pub fn new(session: &Session, max_batch: usize) -> Result<Self> {
        let slots = session
            .slots
            .iter()
            .map(|len| match len.checked_mul(max_batch) {
                Some(len) if len <= MAX_ELEMENTS => allocate(len),
                _ => Err(Error::Config(format!(
                    "batch is {max_batch}, but values of {len} elements allow at most {}",
                    MAX_ELEMENTS / len
                ))),
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            max_batch,
            slots,
            scratch: allocate(session.scratch_len(max_batch))?,
        })
    }

    /// Largest batch it has room for.
    pub fn max_batch(&self) -> usize {
        self.max_batch
    }

    /// That the buffers suffice for `n` images of `session`.
    fn check(&self, session: &Session, n: usize) -> Result<()> {
        if n > self.max_batch {
            return Err(Error::Config(format!(
                "batch is {n}, but the workspace was made for at most {}",
                self.max_batch
            )));
        }
        let suffices = self.slots.len() == session.slots.len()
            && self
                .slots
                .iter()
                .zip(&session.slots)
                .all(|(buffer, len)| buffer.len() >= len * n)
            && self.scratch.len() >= session.scratch_len(n);
        if suffices {
            Ok(())
        } else {
            Err(Error::Config(
                "workspace was made for another session".to_owned(),
            ))
        }
    }

    /// The `n` images of a value.
    fn value<'a>(&'a self, input: &'a [f32], operand: Operand, n: usize) -> &'a [f32] {
        match operand.place {
            Place::Input => input,
            Place::Slot(slot) => &self.slots[slot][..n * operand.len],
        }
    }
}

/// Memory for `len` values.
fn allocate(len: usize) -> Result<Buffer<f32>> {
    Buffer::try_zeroed(len).ok_or_else(|| {
        Error::Config(format!(
            "batch: cannot allocate a buffer of {} bytes",
            Buffer::<f32>::bytes(len)
        ))
    })
}
