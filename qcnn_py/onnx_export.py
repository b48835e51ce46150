"""Writing a network as ONNX.

The weights of product-quantised layers are decoded to dense float32, or, in a compact
file, rebuilt by standard operators from the codebooks and the packed codes of the
``.qcnn`` format; tools that fold constants do so once, when they load the file.

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
        What to write; product-quantised layers are decoded to dense float32.
    path : path
        The file, written under a temporary name that is then renamed.
    compact : bool
        Store codebooks and packed codes instead, and the operators that decode them.

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
            "writing ONNX needs the package onnx: pip install 'qcnn[onnx]'"
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
            if compact and node.quantized:
                before, stored = _decoding(network, node)
                constants += stored
                inputs.append(f"{node.name}.weight")
            else:
                inputs.append(constant("weight", _dense_weight(network, node)))
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


def _dense_weight(network: Network, node: Node) -> npt.NDArray[np.float32]:
    if not node.quantized:
        weight: npt.NDArray[np.float32] = network.tensors[f"{node.name}.weight"]
        return weight
    channels = network.shapes[node.inputs[0]][0] // node.attributes.get("groups", 1)
    return network.quantized_weights(node.name).decode(channels)


def _decoding(network: Network, node: Node) -> tuple[list[Any], list[Any]]:
    """Nodes that rebuild a quantised layer's weight, and what they are made from."""
    from onnx import TensorProto, helper, numpy_helper

    weights = network.quantized_weights(node.name)
    books, codes = weights.codebooks, weights.codes
    sets = books.shape[0] if books.ndim == 4 else 1
    n_subspaces, n_centroids, dsub = books.shape[-3:]
    channels = network.shapes[node.inputs[0]][0] // node.attributes.get("groups", 1)
    bits = max(1, (n_centroids - 1).bit_length())
    nodes: list[Any] = []
    constants: list[Any] = []

    def constant(suffix: str, array: npt.NDArray[Any]) -> str:
        name = f"{node.name}.{suffix}"
        constants.append(numpy_helper.from_array(array, name))
        return name

    def integers(suffix: str, *numbers: int) -> str:
        return constant(suffix, np.array(numbers, dtype=np.int64))

    def append(op: str, suffix: str, *inputs: str, **attributes: Any) -> str:
        name = f"{node.name}.{suffix}"
        nodes.append(helper.make_node(op, inputs, [name], name, **attributes))
        return name

    if bits == 8:
        value = constant("codes", codes.astype(np.uint8).reshape(-1))
    else:
        # Bit j of the stream is bit j mod 8 of byte j // 8, as in a .qcnn file.
        stream = codes.reshape(-1, 1) >> np.arange(bits, dtype=codes.dtype) & 1
        packed = np.packbits(stream.astype(np.uint8).ravel(), bitorder="little")
        places = constant("places", np.arange(8, dtype=np.uint8))
        one = constant("one", np.array(1, dtype=np.uint8))
        powers = np.exp2(np.arange(bits), dtype=np.float32).reshape(bits, 1)
        value = constant("codes", packed.reshape(-1, 1))
        value = append("BitShift", "shifted", value, places, direction="RIGHT")
        value = append("BitwiseAnd", "bits", value, one)
        value = append("Reshape", "stream", value, integers("all", -1))
        if stream.size % 8:
            ends = integers("end", stream.size)
            value = append("Slice", "used", value, integers("start", 0), ends)
        value = append("Reshape", "rows", value, integers("row", -1, bits))
        value = append("Cast", "digits", value, to=TensorProto.FLOAT)
        value = append("MatMul", "numbers", value, constant("powers", powers))
    value = append("Cast", "indices", value, to=TensorProto.INT32)
    value = append(
        "Reshape", "table", value, integers("table_shape", sets, -1, n_subspaces)
    )
    # Rows of all codebooks below each other.
    first = n_centroids * np.arange(sets * n_subspaces).reshape(sets, 1, n_subspaces)
    value = append("Add", "placed", value, constant("first", first.astype(np.int32)))
    rows = constant("codebooks", books.reshape(-1, dsub))
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
        append("Transpose", "weight", value, perm=[0, 3, 1, 2])
    return nodes, constants
