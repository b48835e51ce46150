"""What becomes of each ONNX operator: the table behind :func:`qcnn_py.read_onnx`.

Operators are those of https://onnx.ai/onnx/operators/. One function translates one
operator, in all versions from opset 6 on. Run as a program, this module prints the
table of operators in ``docs/onnx.md``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from qcnn_py.errors import UnsupportedOperator
from qcnn_py.onnx_layout import GraphBuilder, Value

__all__ = ["OPERATORS", "Constant", "OnnxNode", "operator_table"]

Array = npt.NDArray[Any]
# Bounds of values that are bounded on one side only.
_LARGEST = float(np.finfo(np.float32).max)
# Slices that one node may become.
_MOST_PIECES = 64


@dataclass(frozen=True)
class Constant:
    """A value that does not depend on the image.

    Attributes
    ----------
    arrays : tuple of ndarray
        The value for each of the probed batch sizes.
    source : str
        Name of the ONNX value it comes from.
    """

    arrays: tuple[Array, ...]
    source: str = ""

    @property
    def fixed(self) -> bool:
        """Whether the value is the same for every batch size."""
        first = self.arrays[0]
        return all(
            a is first or (a.shape == first.shape and np.array_equal(a, first))
            for a in self.arrays[1:]
        )


Result = Value | Constant | Sequence[Value]


@dataclass(frozen=True)
class OnnxNode:
    """One node of an ONNX graph on its way into a network.

    Attributes
    ----------
    op, name : str
        Operator and name.
    inputs : tuple of Value, Constant or None
        Operands; ``None`` where an optional one is left out.
    attributes : mapping
        Those that are given.
    opset : int
        Version of the operator set.
    outputs_used : frozenset of int
        Numbers of the outputs that something needs.
    batches : tuple of int
        Batch sizes for which constants are known.
    graph : GraphBuilder
        Where nodes are appended.
    """

    op: str
    name: str
    inputs: tuple[Value | Constant | None, ...]
    attributes: Mapping[str, Any]
    opset: int
    outputs_used: frozenset[int]
    batches: tuple[int, ...]
    graph: GraphBuilder

    def unsupported(self, reason: str) -> UnsupportedOperator:
        """Return the error that says why the node has no counterpart."""
        return UnsupportedOperator(f"node {self.name!r} ({self.op}): {reason}")

    def given(self, number: int) -> bool:
        """Whether an input is there."""
        return number < len(self.inputs) and self.inputs[number] is not None

    def value(self, number: int = 0) -> Value:
        """Return an input that depends on the image."""
        if number >= len(self.inputs):
            raise self.unsupported(f"input {number} is missing")
        value = self.inputs[number]
        if not isinstance(value, Value):
            raise self.unsupported(
                f"input {number} is constant, expected a value computed from the image"
            )
        return value

    def constant(self, number: int, what: str) -> Array:
        """Return an input that is constant."""
        constant = self.inputs[number] if number < len(self.inputs) else None
        if not isinstance(constant, Constant):
            found = "missing" if constant is None else "computed from the image"
            raise self.unsupported(f"{what} is {found}, expected a constant")
        if not constant.fixed:
            raise self.unsupported(f"{what} depends on the size of the batch")
        return constant.arrays[0]

    def setting(self, key: str, number: int, default: Any = None) -> Any:
        """Return what later versions have as an input and earlier as an attribute."""
        if self.given(number):
            return self.constant(number, key)
        return self.attributes.get(key, default)

    def number(self, key: str, number: int, default: float | None) -> float | None:
        """Return :meth:`setting` as one number."""
        found = self.setting(key, number, default)
        return None if found is None else float(np.asarray(found).reshape(-1)[0])

    def axes(self, found: Any, rank: int) -> list[int]:
        """Return axes of one image, counted without the batch dimension."""
        axes = [int(axis) for axis in np.asarray(found).reshape(-1)]
        counted = [axis + rank + 1 if axis < 0 else axis for axis in axes]
        if any(not 0 <= axis <= rank for axis in counted):
            raise self.unsupported(f"axes are {axes}, expected {rank + 1} at most")
        if 0 in counted:
            raise self.unsupported("it works along the batch and mixes its images")
        return [axis - 1 for axis in counted]

    def per_image(self, constant: Constant, value: Value) -> Array:
        """Return a constant operand so that it is broadcast to a value's shape."""
        array = constant.arrays[0]
        rank = len(value.shape) + 1
        axis = self.attributes.get("axis")
        if self.opset < 7 and axis is not None:
            # Up to opset 6 an operand starts at a given axis.
            axis = axis + rank if axis < 0 else axis
            array = array.reshape(*array.shape, *[1] * (rank - axis - array.ndim))
        if array.ndim == rank:
            if (array != array[:1]).any():
                raise self.unsupported("the constant differs between images of a batch")
            array = array[0]
        elif not constant.fixed:
            raise self.unsupported("the constant depends on the size of the batch")
        if self.broadcast(array.shape, value.shape) != value.shape:
            raise self.unsupported(
                f"a constant of shape {array.shape} would repeat a value of shape "
                f"{value.shape}; expected one that is repeated itself"
            )
        return array.astype(np.float64)

    def broadcast(self, *shapes: Sequence[int]) -> tuple[int, ...]:
        """Return the shape that operands have together."""
        try:
            return np.broadcast_shapes(*map(tuple, shapes))
        except ValueError:
            shown = " and ".join(str(tuple(shape)) for shape in shapes)
            raise self.unsupported(f"shapes {shown} do not fit together") from None


Translate = Callable[[OnnxNode], Result]


@dataclass(frozen=True)
class Operator:
    """How an operator is translated, and what ``docs/onnx.md`` says about it."""

    translate: Translate
    becomes: str


OPERATORS: dict[str, Operator] = {}


def _operator(becomes: str, *names: str) -> Callable[[Translate], Translate]:
    """Register the translation of operators; `becomes` is for the documentation."""

    def register(translate: Translate) -> Translate:
        OPERATORS.update(dict.fromkeys(names, Operator(translate, becomes)))
        return translate

    return register


def operator_table() -> str:
    """Return the table of operators in ``docs/onnx.md``."""
    rows: dict[int, tuple[list[str], str]] = {}
    for name, operator in sorted(OPERATORS.items()):
        rows.setdefault(id(operator), ([], operator.becomes))[0].append(f"`{name}`")
    lines = [f"| {', '.join(names)} | {becomes} |" for names, becomes in rows.values()]
    return "\n".join(["| operator | becomes |", "|---|---|", *lines]) + "\n"


# --- layers with weights


@_operator(
    "`conv`, all attributes; 1-D too, as an image of one column. Padding with zeros "
    "before it becomes its own. Weights have to be constant",
    "Conv",
)
def _conv(node: OnnxNode) -> Value:
    value = node.value()
    weight = node.constant(1, "the weight").astype(np.float32)
    n_spatial = _spatial(node, value)
    if weight.ndim != n_spatial + 2:
        raise node.unsupported(
            f"the weight has shape {weight.shape}, expected {n_spatial + 2} axes"
        )
    outputs = weight.shape[0]
    taps = weight.shape[2:]
    extents, kernel, stride, padding, dilation = _window(node, value, taps)
    source = _image(node, value).name
    pad = node.graph.node(source)
    if pad is not None and pad.op == "pad" and pad.attributes["value"] == 0:
        before, after = pad.attributes["before"], pad.attributes["after"]
        if len(before) == 3 and not before[0] and not after[0]:
            source = pad.inputs[0]
            padding = [
                a + b for a, b in zip(padding, before[1:] + after[1:], strict=True)
            ]
    tensors = {"weight": weight.reshape(*weight.shape[:2], *kernel)}
    if bias := node.given(2):
        tensors["bias"] = node.constant(2, "the bias")
    attributes = {
        "out_channels": outputs,
        "kernel": kernel,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": int(node.attributes.get("group", 1)),
        "bias": bias,
        "weights": {"type": "dense"},
    }
    shape = (outputs, *_filled(extents, 1))
    name = node.graph.append("conv", [source], shape, attributes, tensors)
    return Value.contiguous(name, (outputs, *extents))


@_operator(
    "`fc`; `transA` is refused, weights have to be constant",
    "Gemm",
)
def _gemm(node: OnnxNode) -> Value:
    value = node.value()
    if node.attributes.get("transA", 0):
        raise node.unsupported("transA is 1, which mixes the images of a batch")
    weight = _scaled(node.constant(1, "the weight"), node.attributes.get("alpha", 1))
    if not node.attributes.get("transB", 0):
        weight = weight.T
    bias = None
    if node.given(2):
        bias = _scaled(node.constant(2, "the bias"), node.attributes.get("beta", 1))
        if bias.ndim == 2 and len(bias) > 1:
            raise node.unsupported("the bias differs between images of a batch")
        bias = np.broadcast_to(bias.reshape(-1), len(weight))
    return _fully_connected(node, value, weight, bias)


@_operator(
    "`fc` of features, a 1x1 `conv` of what has more axes; the second operand is a "
    "constant matrix. An `Add` behind it becomes its bias",
    "MatMul",
)
def _matmul(node: OnnxNode) -> Value:
    value = node.value()
    weight = node.constant(1, "the second operand")
    if weight.ndim != 2:
        raise node.unsupported(f"the second operand has {weight.ndim} axes, expected 2")
    return _fully_connected(node, value, weight.T, None)


def _scaled(array: Array, factor: float) -> Array:
    return array if factor == 1 else array * np.float32(factor)


def _fully_connected(
    node: OnnxNode, value: Value, weight: Array, bias: Array | None
) -> Value:
    features = value.shape[-1] if value.shape else 1
    if weight.ndim != 2 or weight.shape[1] != features:
        raise node.unsupported(
            f"the weights have shape {weight.shape}, but the input {features} features"
        )
    outputs = len(weight)
    tensors = {} if bias is None else {"bias": bias}
    attributes = {"bias": bias is not None, "weights": {"type": "dense"}}
    if len(value.shape) <= 1:
        # As the features lie in memory.
        tensors["weight"] = value.permuted(weight.T.reshape(*value.shape, outputs)).T
        source = node.graph.placed(value, value.order, (features,))
        attributes["out_features"] = outputs
        name = node.graph.append("fc", [source], (outputs,), attributes, tensors)
        return Value.contiguous(name, (outputs,))
    last = len(value.shape) - 1
    rest = value.shape[:-1]
    order = value.numbers([last, *range(last)])
    pixels = rest if len(rest) == 2 else (prod(rest), 1)
    source = node.graph.placed(value, order, (features, *pixels))
    tensors["weight"] = weight.reshape(outputs, features, 1, 1)
    attributes |= {
        "out_channels": outputs,
        "kernel": [1, 1],
        "stride": [1, 1],
        "padding": [0] * 4,
        "dilation": [1, 1],
        "groups": 1,
    }
    name = node.graph.append("conv", [source], (outputs, *pixels), attributes, tensors)
    return Value.contiguous(name, (outputs, *rest)).transposed([*range(1, last + 1), 0])


# --- windows


@_operator(
    "`max_pool`, with dilation of a `slice` for each window; no `Indices`, padding "
    "narrower than the kernel",
    "MaxPool",
)
def _max_pool(node: OnnxNode) -> Value:
    if 1 in node.outputs_used:
        raise node.unsupported("its output Indices is used")
    return _pool(node, "max_pool", {})


@_operator(
    "`average_pool`, with dilation of a `slice` for each window; padding narrower "
    "than the kernel",
    "AveragePool",
)
def _average_pool(node: OnnxNode) -> Value:
    counted = bool(node.attributes.get("count_include_pad", 0))
    return _pool(node, "average_pool", {"count_include_pad": counted})


def _pool(node: OnnxNode, op: str, attributes: dict[str, Any]) -> Value:
    value = node.value()
    _spatial(node, value)
    taps = node.attributes["kernel_shape"]
    extents, kernel, stride, padding, dilation = _window(node, value, taps)
    if kernel == stride == [1, 1] and not any(padding):
        return value
    channels = value.shape[0]
    if any(d > 1 and k > 1 for d, k in zip(dilation, kernel, strict=True)):
        return _dilated_pool(
            node, op, attributes, extents, kernel, stride, padding, dilation
        )
    attributes |= {
        "kernel": kernel,
        "stride": stride,
        "padding": padding,
        "ceil_mode": bool(node.attributes.get("ceil_mode", 0)),
    }
    shape = (channels, *_filled(extents, 1))
    name = node.graph.append(op, [_image(node, value).name], shape, attributes)
    return Value.contiguous(name, (channels, *extents))


def _dilated_pool(
    node: OnnxNode,
    op: str,
    attributes: dict[str, Any],
    extents: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Value:
    """Pooling whose windows have gaps: they are taken apart and laid side by side."""
    value, graph = node.value(), node.graph
    shares = np.ones(1)
    for i, count in enumerate(extents):
        axis, extent = i + 1, value.shape[i + 1]
        before, after = padding[i], padding[i + 2]
        # Places of each window in the padded axis.
        places = np.add.outer(
            stride[i] * np.arange(count), dilation[i] * np.arange(kernel[i])
        )
        behind = max(int(places.max()) + 1 - extent - before, 0)
        if before or behind:
            number = -_LARGEST if op == "max_pool" else 0.0
            value = graph.padded(value, {axis: (before, behind)}, number)
        value = _taken(node, value, axis, places.ravel().tolist())
        inside = places < before + extent
        if attributes.get("count_include_pad"):
            inside = places < before + extent + after
        else:
            inside &= places >= before
        shares = np.multiply.outer(shares, kernel[i] / inside.sum(1))
    shape = (value.shape[0], *_filled(extents, 1))
    attributes |= {
        "kernel": kernel,
        "stride": kernel,
        "padding": [0] * 4,
        "ceil_mode": False,
    }
    name = graph.append(op, [_image(node, value).name], shape, attributes)
    pooled = Value.contiguous(name, (value.shape[0], *extents))
    return pooled if op == "max_pool" else graph.affine(pooled, shares, 0)


def _spatial(node: OnnxNode, value: Value) -> int:
    n_spatial = len(value.shape) - 1
    if n_spatial not in (1, 2):
        raise node.unsupported(
            f"an image of its input has shape {value.shape}, expected channels and one "
            "or two spatial axes"
        )
    return n_spatial


def _image(node: OnnxNode, value: Value) -> Value:
    """Return the value as the network sees it: (channels, height, width)."""
    return node.graph.ordered(value, (value.shape[0], *_filled(value.shape[1:], 1)))


def _filled(values: Sequence[int], other: int) -> list[int]:
    """Two numbers, of which the second may be missing."""
    return [*map(int, values), *[other] * (2 - len(values))]


def _window(
    node: OnnxNode, value: Value, taps: Sequence[int]
) -> tuple[list[int], list[int], list[int], list[int], list[int]]:
    """Extents of the result, then kernel, stride, padding and dilation in 2-D."""
    n = len(taps)
    spatial = value.shape[1:]
    strides = node.attributes.get("strides", [1] * n)
    dilations = node.attributes.get("dilations", [1] * n)
    auto = node.attributes.get("auto_pad", "NOTSET")
    spans = [d * (k - 1) + 1 for d, k in zip(dilations, taps, strict=True)]
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        before, after = [], []
        for extent, stride, span in zip(spatial, strides, spans, strict=True):
            missing = max((-(-extent // stride) - 1) * stride + span - extent, 0)
            half = (missing + (auto == "SAME_LOWER")) // 2
            before.append(half)
            after.append(missing - half)
    else:
        pads = (
            [0] * 2 * n if auto == "VALID" else node.attributes.get("pads", [0] * 2 * n)
        )
        before, after = list(pads[:n]), list(pads[n:])
    if any(pad < 0 for pad in before + after):
        raise node.unsupported(f"pads are {before + after}, expected at least 0")
    extents = []
    for i, extent in enumerate(spatial):
        travel = extent + before[i] + after[i] - spans[i]
        count = travel // strides[i] + 1
        # A last window that would start behind the input is left out.
        if (
            node.attributes.get("ceil_mode", 0)
            and travel % strides[i]
            and count * strides[i] < extent + before[i]
        ):
            count += 1
        if travel < 0:
            raise node.unsupported(f"its window of {spans[i]} does not fit the input")
        extents.append(count)
    return (
        extents,
        _filled(taps, 1),
        _filled(strides, 1),
        _filled(before, 0) + _filled(after, 0),
        _filled(dilations, 1),
    )


@_operator(
    "`global_average_pool`",
    "GlobalAveragePool",
)
def _global_average_pool(node: OnnxNode) -> Value:
    return _over_pixels(node, "global_average_pool")


@_operator(
    "`global_max_pool`",
    "GlobalMaxPool",
)
def _global_max_pool(node: OnnxNode) -> Value:
    return _over_pixels(node, "global_max_pool")


def _over_pixels(node: OnnxNode, op: str) -> Value:
    value = node.value()
    return node.graph.reduced(op, value, range(1, len(value.shape)))


@_operator(
    "`global_average_pool` over the given axes",
    "ReduceMean",
)
def _reduce_mean(node: OnnxNode) -> Value:
    return _reduce(node, "global_average_pool")[0]


@_operator(
    "`global_max_pool` over the given axes",
    "ReduceMax",
)
def _reduce_max(node: OnnxNode) -> Value:
    return _reduce(node, "global_max_pool")[0]


@_operator(
    "`global_average_pool` over the given axes, times their extent",
    "ReduceSum",
)
def _reduce_sum(node: OnnxNode) -> Value:
    value, count = _reduce(node, "global_average_pool")
    return node.graph.affine(value, count, 0)


def _reduce(node: OnnxNode, op: str) -> tuple[Value, int]:
    value = node.value()
    found = node.setting("axes", 1)
    if found is None or np.size(found) == 0:
        if node.attributes.get("noop_with_empty_axes", 0):
            return value, 1
        raise node.unsupported("it reduces all axes and mixes the images of a batch")
    axes = node.axes(found, len(value.shape))
    count = prod(value.shape[axis] for axis in axes)
    reduced = node.graph.reduced(op, value, axes)
    if not node.attributes.get("keepdims", 1):
        kept = [n for axis, n in enumerate(value.shape) if axis not in axes]
        reduced = node.graph.reshaped(reduced, kept)
    return reduced, count


# --- normalisation


@_operator(
    "A factor and a summand per channel (`batch_norm`), folded into the layer "
    "before where that is its only user; inference mode only",
    "BatchNormalization",
)
def _batch_normalization(node: OnnxNode) -> Value:
    value = node.value()
    if node.attributes.get("training_mode", 0) or node.outputs_used - {0}:
        raise node.unsupported(
            "it is in training mode, expected the mode for inference"
        )
    if not node.attributes.get("spatial", 1):
        raise node.unsupported("spatial is 0, expected statistics for each channel")
    names = ("scale", "bias", "mean", "variance")
    shape = (-1, *[1] * (len(value.shape) - 1))
    scale, bias, mean, variance = (
        node.constant(i, name).astype(np.float64).reshape(shape)
        for i, name in enumerate(names, start=1)
    )
    radicand = variance + node.attributes.get("epsilon", 1e-5)
    if not (radicand > 0).all():
        raise node.unsupported("variance + epsilon is not positive in every channel")
    factor = scale / np.sqrt(radicand)
    return node.graph.affine(value, factor, bias - mean * factor)


@_operator(
    "`lrn`",
    "LRN",
)
def _lrn(node: OnnxNode) -> Value:
    value = node.value()
    _spatial(node, value)
    attributes = {
        "size": int(node.attributes["size"]),
        "alpha": float(node.attributes.get("alpha", 1e-4)),
        "beta": float(node.attributes.get("beta", 0.75)),
        "bias": float(node.attributes.get("bias", 1.0)),
    }
    return node.graph.apply("lrn", _image(node, value), **attributes)


@_operator(
    "`softmax`, `log_softmax` over any axis; up to opset 12 over the given axis and "
    "all behind it",
    "Softmax",
    "LogSoftmax",
)
def _softmax(node: OnnxNode) -> Value:
    value = node.value()
    rank = len(value.shape)
    (axis,) = node.axes(
        node.attributes.get("axis", -1 if node.opset >= 13 else 1), rank
    )
    axes = [axis] if node.opset >= 13 else range(axis, rank)
    op = "softmax" if node.op == "Softmax" else "log_softmax"
    return node.graph.normalized(op, value, list(axes))


# --- functions of each element


@_operator(
    "The activation of the same name",
    "Relu",
    "Sigmoid",
    "Tanh",
    "HardSwish",
)
def _activation(node: OnnxNode) -> Value:
    names = {"HardSwish": "hard_swish"}
    op = names.get(node.op, node.op.lower())
    return node.graph.apply(op, node.value())


@_operator(
    "`leaky_relu`",
    "LeakyRelu",
)
def _leaky_relu(node: OnnxNode) -> Value:
    alpha = float(node.attributes.get("alpha", 0.01))
    return node.graph.apply("leaky_relu", node.value(), alpha=alpha)


@_operator(
    "`leaky_relu` for one slope, else `relu(x) - slope * relu(-x)`",
    "PRelu",
)
def _prelu(node: OnnxNode) -> Value:
    value, graph = node.value(), node.graph
    constant = node.inputs[1]
    if not isinstance(constant, Constant):
        raise node.unsupported("the slope is computed from the image")
    if node.opset < 7 and constant.arrays[0].ndim == 1:
        # One slope for each channel then; later versions broadcast.
        shape = (-1, *[1] * (len(value.shape) - 1))
        constant = Constant(tuple(a.reshape(shape) for a in constant.arrays))
    slope = node.per_image(constant, value)
    if slope.size == 1:
        return graph.apply("leaky_relu", value, alpha=float(slope.reshape(-1)[0]))
    positive = graph.apply("relu", value)
    negative = graph.apply("relu", graph.affine(value, -1, 0))
    return graph.combined("add", positive, graph.affine(negative, -slope, 0))


@_operator(
    "`silu`; with another `alpha` than 1, `mul` and `sigmoid`",
    "Swish",
)
def _swish(node: OnnxNode) -> Value:
    value, graph = node.value(), node.graph
    alpha = float(node.attributes.get("alpha", 1.0))
    if alpha == 1:
        return graph.apply("silu", value)
    gate = graph.apply("sigmoid", graph.affine(value, alpha, 0))
    return _broadcast(node, "mul", value, gate)


@_operator(
    "`hard_sigmoid`",
    "HardSigmoid",
)
def _hard_sigmoid(node: OnnxNode) -> Value:
    alpha = float(node.attributes.get("alpha", 0.2))
    beta = float(node.attributes.get("beta", 0.5))
    return node.graph.apply("hard_sigmoid", node.value(), alpha=alpha, beta=beta)


@_operator(
    "`clip` (ReLU6, for example), or `relu` without an upper bound",
    "Clip",
)
def _clip(node: OnnxNode) -> Value:
    low = node.number("min", 1, None)
    high = node.number("max", 2, None)
    return _clipped(node, node.value(), low, high)


def _clipped(
    node: OnnxNode, value: Value, low: float | None, high: float | None
) -> Value:
    if low is None and high is None:
        return value
    if low == 0 and high is None:
        return node.graph.apply("relu", value)
    high = _LARGEST if high is None else min(high, _LARGEST)
    # The upper bound wins where the lower one is above it.
    low = -_LARGEST if low is None else min(max(low, -_LARGEST), high)
    return node.graph.apply("clip", value, low=low, high=high)


@_operator(
    "`clip` or `relu`; one operand and constants that are single numbers",
    "Max",
    "Min",
)
def _bound(node: OnnxNode) -> Value:
    values = [v for v in node.inputs if isinstance(v, Value)]
    numbers = [
        node.constant(i, "an operand").reshape(-1)
        for i, v in enumerate(node.inputs)
        if isinstance(v, Constant)
    ]
    if len(values) != 1 or any(n.size != 1 for n in numbers):
        raise node.unsupported("expected one value and constants of one number each")
    bounds = [float(n[0]) for n in numbers]
    if node.op == "Max":
        return _clipped(node, values[0], max(bounds, default=None), None)
    return _clipped(node, values[0], None, min(bounds, default=None))


@_operator(
    "A factor of -1 (`batch_norm`)",
    "Neg",
)
def _negative(node: OnnxNode) -> Value:
    return node.graph.affine(node.value(), -1, 0)


# --- sums and products


@_operator(
    "`add`; constants are summands of `batch_norm`. One operand has the shape of "
    "the result, the others may be repeated",
    "Add",
    "Sum",
    "Mean",
)
def _add(node: OnnxNode) -> Value:
    values = [v for v in node.inputs if isinstance(v, Value)]
    total = values[0]
    for value in values[1:]:
        total = _broadcast(node, "add", total, value)
    for constant in node.inputs:
        if isinstance(constant, Constant):
            total = node.graph.affine(total, 1, node.per_image(constant, total))
    if node.op == "Mean":
        total = node.graph.affine(total, 1 / len(node.inputs), 0)
    return total


@_operator(
    "The sum with the second operand times -1",
    "Sub",
)
def _sub(node: OnnxNode) -> Value:
    first, second = node.inputs
    if isinstance(first, Value) and isinstance(second, Value):
        negative = node.graph.affine(second, -1, 0)
        return _broadcast(node, "add", first, negative)
    if isinstance(second, Constant):
        value = node.value(0)
        return node.graph.affine(value, 1, -node.per_image(second, value))
    assert isinstance(first, Constant)
    value = node.value(1)
    return node.graph.affine(value, -1, node.per_image(first, value))


@_operator(
    "`mul`; constants are factors of `batch_norm`; `x * Sigmoid(x)` is `silu`, `x * "
    "HardSigmoid(x)` with the usual slope `hard_swish`",
    "Mul",
)
def _mul(node: OnnxNode) -> Value:
    first, second = node.inputs
    if isinstance(first, Value) and isinstance(second, Value):
        for value, gate in ((first, second), (second, first)):
            if op := _self_gate(node, value, gate):
                return node.graph.apply(op, value)
        return _broadcast(node, "mul", first, second)
    own = 0 if isinstance(first, Value) else 1
    value, constant = node.value(own), node.inputs[1 - own]
    assert isinstance(constant, Constant)
    return node.graph.affine(value, node.per_image(constant, value), 0)


def _self_gate(node: OnnxNode, value: Value, gate: Value) -> str | None:
    """Activation that a value times a function of itself is, if it is one."""
    if (value.axes, value.order) != (gate.axes, gate.order):
        return None
    made = node.graph.node(gate.name)
    if made is None or made.inputs[0] != value.name:
        return None
    if made.op == "sigmoid":
        return "silu"
    usual = {"alpha": 1 / 6, "beta": 0.5}
    if made.op == "hard_sigmoid" and all(
        abs(made.attributes[key] - number) < 1e-6 for key, number in usual.items()
    ):
        return "hard_swish"
    return None


@_operator(
    "A factor of `batch_norm`; the divisor has to be constant",
    "Div",
)
def _div(node: OnnxNode) -> Value:
    value, divisor = node.value(0), node.inputs[1]
    if not isinstance(divisor, Constant):
        raise node.unsupported("the divisor is computed from the image")
    array = node.per_image(divisor, value)
    if not array.all():
        raise node.unsupported("the divisor is 0")
    return node.graph.affine(value, 1 / array, 0)


def _broadcast(node: OnnxNode, op: str, first: Value, second: Value) -> Value:
    if len(first.shape) != len(second.shape):
        raise node.unsupported(
            f"operands have shapes {first.shape} and {second.shape} for each image, "
            "expected as many axes"
        )
    shape = node.broadcast(first.shape, second.shape)
    if first.shape != shape:
        first, second = second, first
    if first.shape != shape:
        raise node.unsupported(
            f"both operands, of shapes {first.shape} and {second.shape}, are repeated; "
            "expected one that has the shape of the result"
        )
    return node.graph.combined(op, first, second)


# --- pieces


@_operator(
    "`concat` along any axis but the batch; a constant operand of one number "
    "repeated is a `pad`",
    "Concat",
)
def _concat(node: OnnxNode) -> Value:
    values = [v for v in node.inputs if isinstance(v, Value)]
    (axis,) = node.axes(node.attributes.get("axis", 1), len(values[0].shape))
    pieces: list[Value] = []
    # Constant elements in front of the first value.
    front = 0
    number = 0.0
    for operand in node.inputs:
        if isinstance(operand, Constant):
            array = operand.arrays[0]
            if not array.size:
                continue
            if (array != array.flat[0]).any() or (front and array.flat[0] != number):
                raise node.unsupported("constant operands hold different numbers")
            number = float(array.flat[0])
            count = array.shape[axis + 1]
            if pieces:
                pieces[-1] = node.graph.padded(pieces[-1], {axis: (0, count)}, number)
            else:
                front += count
        elif operand is not None:
            widths = {axis: (front, 0)}
            value = node.graph.padded(operand, widths, number) if front else operand
            pieces.append(value)
            front = 0
    if len(pieces) == 1:
        return pieces[0]
    return node.graph.concatenated(pieces, axis)


@_operator(
    "A `slice` for each output that is used",
    "Split",
)
def _split(node: OnnxNode) -> Sequence[Value]:
    value = node.value()
    (axis,) = node.axes(node.attributes.get("axis", 0), len(value.shape))
    extent = value.shape[axis]
    sizes = node.setting("split", 1)
    if sizes is None:
        n = node.attributes.get("num_outputs", max(node.outputs_used) + 1)
        if node.opset < 18:
            # All outputs are equal: their number is known where all are named.
            n = node.attributes["n_outputs"]
        whole = -(-extent // n)
        sizes = [min(whole, extent - i * whole) for i in range(n)]
    pieces = []
    start = 0
    for i, size in enumerate(int(size) for size in sizes):
        used = i in node.outputs_used
        cut = {axis: (start, 1, size)}
        if used and not size:
            raise node.unsupported(f"output {i} is empty")
        pieces.append(node.graph.sliced(value, cut) if used else value)
        start += size
    return pieces


@_operator(
    "`slice`, backwards a `concat` of several; the batch stays whole",
    "Slice",
)
def _slice(node: OnnxNode) -> Value:
    value = node.value()
    rank = len(value.shape)
    starts = np.atleast_1d(node.setting("starts", 1))
    ends = np.atleast_1d(node.setting("ends", 2))
    axes = np.atleast_1d(node.setting("axes", 3, np.arange(len(starts))))
    steps = np.atleast_1d(node.setting("steps", 4, np.ones(len(starts), np.int64)))
    cuts = {}
    for number, *numbers in zip(axes, starts, ends, steps, strict=True):
        wanted = slice(*map(int, numbers))
        if number in (0, -rank - 1) and _keeps_batch(node, wanted):
            continue
        (axis,) = node.axes(number, rank)
        extent = value.shape[axis]
        taken = range(extent)[wanted]
        if not taken:
            raise node.unsupported(f"nothing is left of axis {axis + 1}")
        if taken.step < 0:
            value = _taken(node, value, axis, taken)
        elif taken != range(extent):
            cuts[axis] = (taken.start, taken.step, len(taken))
    return node.graph.sliced(value, cuts) if cuts else value


def _keeps_batch(node: OnnxNode, wanted: slice) -> bool:
    return all(range(n)[wanted] == range(n) for n in node.batches)


@_operator(
    "`slice`, or `concat` of several; the indices have to be constant",
    "Gather",
)
def _gather(node: OnnxNode) -> Value:
    value = node.value()
    (axis,) = node.axes(node.attributes.get("axis", 0), len(value.shape))
    indices = node.constant(1, "the list of indices")
    whole = _taken(node, value, axis, [int(i) for i in indices.reshape(-1)])
    shape = value.shape[:axis] + indices.shape + value.shape[axis + 1 :]
    return node.graph.reshaped(whole, shape)


def _taken(node: OnnxNode, value: Value, axis: int, indices: Sequence[int]) -> Value:
    """Elements of an axis in any order: slices of those equally far apart, joined."""
    extent = value.shape[axis]
    found = [i + extent if i < 0 else i for i in indices]
    if not found or min(found) < 0 or max(found) >= extent:
        raise node.unsupported(
            f"it takes elements beyond those of an axis of {extent}, or none"
        )
    cuts: list[tuple[int, int, int]] = []
    first = 0
    while first < len(found):
        start = found[first]
        ahead = found[first + 1] - start if first + 1 < len(found) else 1
        step, count = max(ahead, 1), 1
        while first + count < len(found) and found[first + count] == (
            start + count * step
        ):
            count += 1
        cuts.append((start, step, count))
        first += count
        if len(cuts) > _MOST_PIECES:
            raise node.unsupported(
                f"it takes an axis apart into more than {_MOST_PIECES} pieces"
            )
    parts = [
        value if cut == (0, 1, extent) else node.graph.sliced(value, {axis: cut})
        for cut in cuts
    ]
    return parts[0] if len(parts) == 1 else node.graph.concatenated(parts, axis)


@_operator(
    "`pad`, `slice` where it is negative; modes other than `constant` become "
    "`slice` and `concat`",
    "Pad",
)
def _pad(node: OnnxNode) -> Value:
    value = node.value()
    mode = node.attributes.get("mode", "constant")
    pads = np.asarray(node.setting("pads", 1)).reshape(2, -1)
    rank = len(value.shape)
    axes = node.setting("axes", 3)
    listed = range(rank + 1) if axes is None else np.asarray(axes).reshape(-1)
    widths = {}
    for axis, before, after in zip(listed, *pads.tolist(), strict=True):
        if before or after:
            (own,) = node.axes(axis, rank)
            widths[own] = (before, after)
    if mode != "constant":
        # NumPy knows the same modes.
        for axis, width in widths.items():
            if max(width) > _MOST_PIECES:
                raise node.unsupported(
                    f"pads are {width}, expected at most {_MOST_PIECES}"
                )
            indices = np.pad(np.arange(value.shape[axis]), width, mode)
            value = _taken(node, value, axis, indices.tolist())
        return value
    cut = {}
    for axis, (before, after) in widths.items():
        count = value.shape[axis] + min(before, 0) + min(after, 0)
        if count < 1:
            raise node.unsupported(f"nothing is left of axis {axis + 1}")
        if count < value.shape[axis]:
            cut[axis] = (max(-before, 0), 1, count)
    if cut:
        value = node.graph.sliced(value, cut)
    grown = {
        axis: (max(before, 0), max(after, 0))
        for axis, (before, after) in widths.items()
        if before > 0 or after > 0
    }
    number = node.number("value", 2, 0.0)
    assert number is not None
    return node.graph.padded(value, grown, number) if grown else value


# --- other views of the same elements


@_operator(
    "Bookkeeping; a `transpose` where memory has to change. The batch stays",
    "Reshape",
)
def _reshape(node: OnnxNode) -> Value:
    value = node.value()
    targets = node.inputs[1] if node.given(1) else None
    shapes = (
        targets.arrays
        if isinstance(targets, Constant)
        else (node.attributes["shape"],) * len(node.batches)
    )
    if isinstance(targets, Value):
        raise node.unsupported("the shape is computed from the image")
    full = []
    for n, wanted in zip(node.batches, shapes, strict=True):
        given = (n, *value.shape)
        shape = [int(extent) for extent in wanted]
        if not node.attributes.get("allowzero", 0):
            shape = [given[i] if e == 0 else e for i, e in enumerate(shape)]
        if -1 in shape:
            known = -prod(shape)
            shape[shape.index(-1)] = prod(given) // known if known else 0
        if prod(shape) != prod(given):
            raise node.unsupported(f"{given} cannot become {shape}")
        full.append(shape)
    return _viewed(node, value, full)


def _viewed(node: OnnxNode, value: Value, full: Sequence[Sequence[int]]) -> Value:
    """See a value in another shape, given for each batch size."""
    shape = list(full[0][1:])
    for n, whole in zip(node.batches, full, strict=True):
        if not whole or whole[0] != n or list(whole[1:]) != shape:
            raise node.unsupported(
                f"it makes {list(whole)} of a batch of {n} images, expected that the "
                "first axis stays the batch"
            )
    return node.graph.reshaped(value, shape)


@_operator(
    "As `Reshape`",
    "Flatten",
)
def _flatten(node: OnnxNode) -> Value:
    value = node.value()
    rank = len(value.shape) + 1
    axis = node.attributes.get("axis", 1)
    axis = axis + rank if axis < 0 else axis
    given = [(n, *value.shape) for n in node.batches]
    full = [[prod(shape[:axis]), prod(shape[axis:])] for shape in given]
    return _viewed(node, value, full)


@_operator(
    "As `Reshape`",
    "Squeeze",
)
def _squeeze(node: OnnxNode) -> Value:
    value = node.value()
    found = node.setting("axes", 1)
    rank = len(value.shape)
    if found is None:
        axes = [axis for axis in range(rank) if value.shape[axis] == 1]
    else:
        axes = node.axes(found, rank)
    return node.graph.reshaped(
        value, [n for axis, n in enumerate(value.shape) if axis not in axes]
    )


@_operator(
    "As `Reshape`",
    "Unsqueeze",
)
def _unsqueeze(node: OnnxNode) -> Value:
    value = node.value()
    found = np.asarray(node.setting("axes", 1)).reshape(-1)
    axes = node.axes(found, len(value.shape) + len(found))
    shape = list(value.shape)
    for axis in sorted(axes):
        shape.insert(axis, 1)
    return node.graph.reshaped(value, shape)


@_operator(
    "Bookkeeping; a `transpose` where memory has to change. The batch stays first",
    "Transpose",
)
def _transpose(node: OnnxNode) -> Value:
    value = node.value()
    rank = len(value.shape) + 1
    permutation = list(node.attributes.get("perm", range(rank)[::-1]))
    if permutation[0] != 0:
        raise node.unsupported(
            f"perm is {permutation}, expected that the batch stays first"
        )
    return value.transposed([axis - 1 for axis in permutation[1:]])


@_operator(
    "Nothing; a value that would be repeated is refused",
    "Expand",
)
def _expand(node: OnnxNode) -> Value:
    value = node.value()
    targets = node.inputs[1]
    if not isinstance(targets, Constant):
        raise node.unsupported("the shape is computed from the image")
    for n, wanted in zip(node.batches, targets.arrays, strict=True):
        given = (n, *value.shape)
        if node.broadcast(given, [int(extent) for extent in wanted]) != given:
            raise node.unsupported(f"it repeats a value of shape {given}")
    return value


@_operator(
    "Nothing",
    "Identity",
)
def _identity(node: OnnxNode) -> Value:
    return node.value()


@_operator(
    "Nothing; to float32 only",
    "Cast",
)
def _cast(node: OnnxNode) -> Value:
    from onnx import TensorProto

    target = node.attributes["to"]
    if target != TensorProto.FLOAT:
        name = TensorProto.DataType.Name(target)
        raise node.unsupported(f"it casts to {name}, expected FLOAT")
    return node.value()


@_operator(
    "`dropout`, which does nothing at inference; not in training mode",
    "Dropout",
)
def _dropout(node: OnnxNode) -> Value:
    value = node.value()
    rate = node.number("ratio", 1, 0.5)
    assert rate is not None
    if node.given(2) and bool(node.constant(2, "training_mode")) and rate:
        raise node.unsupported("training_mode is set")
    if 1 in node.outputs_used:
        raise node.unsupported("its output mask is used")
    return node.graph.apply("dropout", value, rate=rate) if 0 <= rate < 1 else value


@_operator(
    "A constant, which may depend on the size of the batch",
    "Shape",
    "Size",
)
def _shape(node: OnnxNode) -> Constant:
    value = node.value()
    shapes = [np.array([n, *value.shape], np.int64) for n in node.batches]
    if node.op == "Size":
        return Constant(tuple(np.array(prod(shape), np.int64) for shape in shapes))
    part = slice(node.attributes.get("start", 0), node.attributes.get("end"))
    return Constant(tuple(shape[part] for shape in shapes))


if __name__ == "__main__":
    sys.stdout.write(operator_table())
