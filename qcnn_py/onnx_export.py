"""Writing a network as ONNX.

The weights of product-quantised and binary layers are decoded to dense float32, or,
in a compact file, rebuilt by standard operators from the codebooks and the packed codes
or signs of the ``.qcnn`` format; tools that fold constants do so once, when they load
the file.

Operators follow opset 19 of the ONNX standard (https://onnx.ai/onnx/operators/),
the first that says what an average pooling window counts where it hangs over the
edge in ceil mode. SiLU, which that opset lacks, becomes ``x * Sigmoid(x)``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qcnn_py.errors import ModelFormatError

if TYPE_CHECKING:
    from qcnn_py.network import Network, Node

__all__ = ["to_onnx"]

_OPSET = 19
# The file version that belongs to opset 19 (ONNX 1.14); readers refuse later ones
# than they know.
_IR_VERSION = 9
# A protobuf message ends here.
_MAX_BYTES = 2**31 - 1

# Operations that differ from their ONNX operator in name only.
_SAME = {
    "global_average_pool": "GlobalAveragePool",
    "global_max_pool": "GlobalMaxPool",
    "lrn": "LRN",
    "relu": "Relu",
    "leaky_relu": "LeakyRelu",
    "sigmoid": "Sigmoid",
    "tanh": "Tanh",
    "hard_sigmoid": "HardSigmoid",
    "hard_swish": "HardSwish",
}


def to_onnx(
    network: Network, path: str | PathLike[str], *, compact: bool = False
) -> None:
    """Write `network` as an ONNX model with a dynamic batch dimension.

    Values keep their names: the response of node ``conv1`` is the ONNX value
    ``conv1``. Metadata entries become ``metadata_props``, each as JSON.

    Parameters
    ----------
    network : Network
        What to write; layers that are not dense are decoded to float32.
    path : path
        The file, written under a temporary name that is then renamed.
    compact : bool
        Store codebooks and packed codes or signs instead, and the operators that
        decode them.

    Raises
    ------
    ImportError
        If the package ``onnx`` is not installed.
    ModelFormatError
        If the weights exceed the 2 GiB of one ONNX file.
    OSError
        If the file cannot be written.
    """
    try:
        from onnx import TensorProto, checker, helper
    except ImportError as error:
        raise ImportError(
            "writing ONNX needs the package onnx: pip install 'qcnn-py[onnx]'"
        ) from error

    kind = "compact" if compact else "dense"
    layers = network.layers
    size = sum(layer.bytes if compact else layer.dense_bytes for layer in layers)
    if size > _MAX_BYTES:
        raise ModelFormatError(
            f"the network's {kind} weights take {size} bytes, "
            f"expected at most {_MAX_BYTES}, the most one ONNX file holds"
        )

    def value(name: str) -> Any:
        shape: list[str | int | None] = ["N", *network.shapes[name]]
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    nodes, initializers = [], []
    for node in network.nodes:
        written, constants = _translate(network, node, compact)
        nodes += written
        initializers += constants
    graph = helper.make_graph(
        nodes,
        "qcnn",
        [value(network.input_name)],
        [value(network.output)],
        initializers,
    )
    model = helper.make_model(
        graph,
        producer_name="qcnn",
        ir_version=_IR_VERSION,
        opset_imports=[helper.make_opsetid("", _OPSET)],
    )
    helper.set_model_props(
        model,
        {
            key: json.dumps(entry, sort_keys=True)
            for key, entry in sorted(network.metadata.items())
        },
    )
    checker.check_model(model)
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(model.SerializeToString(deterministic=True))
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _translate(
    network: Network, node: Node, compact: bool
) -> tuple[list[Any], list[Any]]:
    """ONNX nodes of one node, and the constants they use."""
    from onnx import helper, numpy_helper

    constants: list[Any] = []

    def constant(suffix: str, array: npt.NDArray[Any]) -> str:
        name = f"{node.name}.{suffix}"
        constants.append(numpy_helper.from_array(array, name))
        return name

    def scalar(suffix: str, number: float) -> str:
        return constant(suffix, np.array(number, dtype=np.float32))

    def integers(suffix: str, numbers: Sequence[int]) -> str:
        return constant(suffix, np.array(numbers, dtype=np.int64))

    def tensor(suffix: str) -> str:
        return constant(suffix, network.tensors[f"{node.name}.{suffix}"])

    inputs, attributes = list(node.inputs), node.attributes
    outputs = [node.name]
    before: list[Any] = []
    match node.op:
        case "conv" | "fc":
            if compact and (node.quantized or node.binary):
                decode = _decode_signs if node.binary else _decode_codes
                parts = _Parts(node.name)
                inputs.append(decode(parts, network, node))
                before, constants = parts.nodes, parts.constants
            else:
                inputs.append(constant("weight", network.dense_weight(node.name)))
            if attributes["bias"]:
                inputs.append(tensor("bias"))
            if node.op == "fc":
                made = helper.make_node("Gemm", inputs, outputs, node.name, transB=1)
            else:
                made = helper.make_node(
                    "Conv",
                    inputs,
                    outputs,
                    node.name,
                    **_window(attributes),
                    dilations=attributes["dilation"],
                    group=attributes["groups"],
                )
        case "max_pool":
            made = helper.make_node(
                "MaxPool",
                inputs,
                outputs,
                node.name,
                **_window(attributes),
                ceil_mode=int(attributes["ceil_mode"]),
            )
        case "average_pool":
            made = helper.make_node(
                "AveragePool",
                inputs,
                outputs,
                node.name,
                **_window(attributes),
                ceil_mode=int(attributes["ceil_mode"]),
                count_include_pad=int(attributes["count_include_pad"]),
            )
        case "clip":
            inputs += [scalar(bound, attributes[bound]) for bound in ("low", "high")]
            made = helper.make_node("Clip", inputs, outputs, node.name)
        case "quantize_linear" | "quantize_log2" | "sign":
            parts = _Parts(node.name)
            _QUANTIZERS[node.op](parts, inputs[0], attributes)
            return parts.nodes, parts.constants
        case "silu":
            gate = f"{node.name}.gate"
            return [
                helper.make_node("Sigmoid", inputs, [gate], gate),
                helper.make_node("Mul", [*inputs, gate], outputs, node.name),
            ], constants
        case "add":
            # Add, which every tool knows, takes two operands only.
            operator = "Add" if len(inputs) == 2 else "Sum"
            made = helper.make_node(operator, inputs, outputs, node.name)
        case "mul":
            # Two operands at a time.
            product = inputs[0]
            for i, operand in enumerate(inputs[1:-1]):
                name = f"{node.name}.{i}"
                before.append(helper.make_node("Mul", [product, operand], [name], name))
                product = name
            made = helper.make_node("Mul", [product, inputs[-1]], outputs, node.name)
        case "slice":
            start, step, shape = (attributes[k] for k in ("start", "step", "shape"))
            ends = [
                a + b * (n - 1) + 1 for a, b, n in zip(start, step, shape, strict=True)
            ]
            inputs += [
                integers("starts", start),
                integers("ends", ends),
                integers("axes", range(1, len(shape) + 1)),
                integers("steps", step),
            ]
            made = helper.make_node("Slice", inputs, outputs, node.name)
        case "pad":
            pads = [0, *attributes["before"], 0, *attributes["after"]]
            inputs += [integers("pads", pads), scalar("value", attributes["value"])]
            made = helper.make_node("Pad", inputs, outputs, node.name)
        case "transpose":
            view, moved = f"{node.name}.view", f"{node.name}.moved"
            extents = integers("extents", [0, *attributes["view"]])
            permutation = [0, *(axis + 1 for axis in attributes["axes"])]
            before = [
                helper.make_node("Reshape", [*inputs, extents], [view], view),
                helper.make_node("Transpose", [view], [moved], moved, perm=permutation),
            ]
            inputs = [moved, integers("shape", [0, *attributes["shape"]])]
            made = helper.make_node("Reshape", inputs, outputs, node.name)
        case "log_softmax":
            made = helper.make_node("LogSoftmax", inputs, outputs, node.name, axis=1)
        case "concat" | "flatten" | "softmax":
            operator = node.op.capitalize()
            made = helper.make_node(operator, inputs, outputs, node.name, axis=1)
        case "reshape":
            # 0 keeps the batch dimension, also where it is 0.
            inputs.append(integers("shape", [0, *attributes["shape"]]))
            made = helper.make_node("Reshape", inputs, outputs, node.name)
        case "batch_norm":
            inputs += [tensor(part) for part in ("scale", "bias", "mean", "variance")]
            made = helper.make_node(
                "BatchNormalization",
                inputs,
                outputs,
                node.name,
                epsilon=attributes["epsilon"],
            )
        case "dropout":
            inputs.append(scalar("rate", attributes["rate"]))
            made = helper.make_node("Dropout", inputs, outputs, node.name)
        case op:
            made = helper.make_node(_SAME[op], inputs, outputs, node.name, **attributes)
    return [*before, made], constants


def _window(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes of a sliding window as ONNX calls them."""
    return {
        "kernel_shape": attributes["kernel"],
        "strides": attributes["stride"],
        "pads": attributes["padding"],
    }


class _Parts:
    """Nodes and constants that stand for one node of the network, named after it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, suffix: str, array: npt.NDArray[Any]) -> str:
        """Add a constant and return its name."""
        from onnx import numpy_helper

        name = f"{self.name}.{suffix}"
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def number(self, suffix: str, value: float | np.floating[Any]) -> str:
        """Add a float32 number."""
        return self.constant(suffix, np.array(value, dtype=np.float32))

    def integers(self, suffix: str, *numbers: int) -> str:
        """Add a list of integers."""
        return self.constant(suffix, np.array(numbers, dtype=np.int64))

    def append(self, op: str, suffix: str, *inputs: str, **attributes: Any) -> str:
        """Add a node; without a suffix its value is that of the network's node."""
        from onnx import helper

        name = f"{self.name}.{suffix}" if suffix else self.name
        self.nodes.append(helper.make_node(op, inputs, [name], name, **attributes))
        return name

    def bits(self, suffix: str, bits: npt.NDArray[np.uint8]) -> str:
        """Add numbers of one bit, 0 or 1, stored eight a byte; the value is uint8."""
        # Bit j of the stream is bit j mod 8 of byte j // 8, as in a .qcnn file.
        packed = np.packbits(bits, bitorder="little")
        places = self.constant("places", np.arange(8, dtype=np.uint8))
        one = self.constant("one", np.array(1, dtype=np.uint8))
        value = self.constant(suffix, packed.reshape(-1, 1))
        value = self.append("BitShift", "shifted", value, places, direction="RIGHT")
        value = self.append("BitwiseAnd", "bits", value, one)
        value = self.append("Reshape", "stream", value, self.integers("all", -1))
        if bits.size % 8:
            ends = self.integers("end", bits.size)
            value = self.append("Slice", "used", value, self.integers("start", 0), ends)
        return value


def _decode_signs(parts: _Parts, network: Network, node: Node) -> str:
    """Nodes that rebuild a binary layer's weight."""
    from onnx import TensorProto

    signs = network.tensors[f"{node.name}.signs"]
    value = parts.bits("signs", (signs > 0).astype(np.uint8).ravel())
    value = parts.append("Cast", "digits", value, to=TensorProto.FLOAT)
    value = parts.append("Mul", "doubled", value, parts.number("two", 2))
    value = parts.append("Sub", "flat", value, parts.number("unit", 1))
    shape = parts.integers("shape", *signs.shape)
    return parts.append("Reshape", "weight", value, shape)


def _decode_codes(parts: _Parts, network: Network, node: Node) -> str:
    """Nodes that rebuild a product-quantised layer's weight."""
    from onnx import TensorProto

    weights = network.quantized_weights(node.name)
    books, codes = weights.codebooks, weights.codes
    sets = books.shape[0] if books.ndim == 4 else 1
    n_subspaces, n_centroids, dsub = books.shape[-3:]
    channels = network.shapes[node.inputs[0]][0] // node.attributes.get("groups", 1)
    bits = max(1, (n_centroids - 1).bit_length())
    append, integers = parts.append, parts.integers
    if bits == 8:
        value = parts.constant("codes", codes.astype(np.uint8).reshape(-1))
    else:
        stream = codes.reshape(-1, 1) >> np.arange(bits, dtype=codes.dtype) & 1
        value = parts.bits("codes", stream.astype(np.uint8).ravel())
        powers = np.exp2(np.arange(bits), dtype=np.float32).reshape(bits, 1)
        value = append("Reshape", "rows", value, integers("row", -1, bits))
        value = append("Cast", "digits", value, to=TensorProto.FLOAT)
        powers_of_two = parts.constant("powers", powers)
        value = append("MatMul", "numbers", value, powers_of_two)
    value = append("Cast", "indices", value, to=TensorProto.INT32)
    value = append(
        "Reshape", "table", value, integers("table_shape", sets, -1, n_subspaces)
    )
    # Rows of all codebooks below each other.
    first = n_centroids * np.arange(sets * n_subspaces).reshape(sets, 1, n_subspaces)
    places = parts.constant("first", first.astype(np.int32))
    value = append("Add", "placed", value, places)
    rows = parts.constant("codebooks", books.reshape(-1, dsub))
    value = append("Gather", "vectors", rows, value, axis=0)
    shape = (*codes.shape[:-1], n_subspaces * dsub)
    last = "weight" if codes.ndim == 2 else "channels_last"
    padded = n_subspaces * dsub > channels
    value = append(
        "Reshape",
        "padded" if padded else last,
        value,
        integers("vectors_shape", *shape),
    )
    if padded:
        cut = [integers(k, n) for k, n in {"from": 0, "to": channels, "of": -1}.items()]
        value = append("Slice", last, value, *cut)
    if codes.ndim == 4:
        value = append("Transpose", "weight", value, perm=[0, 3, 1, 2])
    return value


def _quantize_linear(parts: _Parts, x: str, attributes: Mapping[str, Any]) -> None:
    low, high = (np.float32(attributes[bound]) for bound in ("low", "high"))
    step = parts.number("step", (high - low) / np.float32(2 ** attributes["bits"] - 1))
    value = parts.append("Div", "steps", x, step)
    value = parts.append("Round", "rounded", value)
    value = parts.append("Mul", "level", value, step)
    bounds = parts.number("low", low), parts.number("high", high)
    parts.append("Clip", "", value, *bounds)


def _quantize_log2(parts: _Parts, x: str, attributes: Mapping[str, Any]) -> None:
    """Count the thresholds that a magnitude reaches: exact, without logarithms."""
    from onnx import TensorProto

    n_powers = 2 ** (attributes["bits"] - 1) - 1
    powers = np.ldexp(
        np.float32(attributes["high"]), np.arange(1 - n_powers, 1)
    ).astype(np.float32)
    levels = parts.constant("levels", np.append(np.float32(0), powers))
    # Halves of subnormal powers would be rounded before the product.
    thresholds = (powers.astype(np.float64) / 2 * np.sqrt(np.float32(2))).astype(
        np.float32
    )
    value = parts.append("Abs", "magnitude", x)
    last = parts.integers("last", -1)
    value = parts.append("Unsqueeze", "column", value, last)
    limits = parts.constant("thresholds", thresholds)
    value = parts.append("GreaterOrEqual", "reached", value, limits)
    value = parts.append("Cast", "ones", value, to=TensorProto.INT32)
    value = parts.append("ReduceSum", "index", value, last, keepdims=0)
    value = parts.append("Gather", "power", levels, value)
    value = parts.append("Mul", "level", value, parts.append("Sign", "sign", x))
    _keep_nan(parts, x, value)


def _sign(parts: _Parts, x: str, attributes: Mapping[str, Any]) -> None:
    value = parts.append("GreaterOrEqual", "positive", x, parts.number("zero", 0))
    signs = parts.number("plus", 1), parts.number("minus", -1)
    _keep_nan(parts, x, parts.append("Where", "sign", value, *signs))


def _keep_nan(parts: _Parts, x: str, value: str) -> None:
    parts.append("Where", "", parts.append("IsNaN", "nan", x), x, value)


_QUANTIZERS = {
    "quantize_linear": _quantize_linear,
    "quantize_log2": _quantize_log2,
    "sign": _sign,
}
