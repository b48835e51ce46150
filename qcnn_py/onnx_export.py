"""Writing a network as ONNX, with every layer's weights decoded to dense float32.

Operators follow opset 19 of the ONNX standard (https://onnx.ai/onnx/operators/),
the first that says what an average pooling window counts where it hangs over the
edge in ceil mode. SiLU, which that opset lacks, becomes ``x * Sigmoid(x)``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
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


def to_onnx(network: Network, path: str | PathLike[str]) -> None:
    """Write `network` as an ONNX model with a dynamic batch dimension.

    Values keep their names: the response of node ``conv1`` is the ONNX value
    ``conv1``. Metadata entries become ``metadata_props``, each as JSON.

    Parameters
    ----------
    network : Network
        What to write; product-quantised layers are decoded to dense float32.
    path : path
        The file, written under a temporary name that is then renamed.

    Raises
    ------
    ImportError
        If the package ``onnx`` is not installed.
    ModelFormatError
        If the dense weights exceed the 2 GiB of one ONNX file.
    OSError
        If the file cannot be written.
    """
    try:
        from onnx import TensorProto, checker, helper
    except ImportError as error:
        raise ImportError(
            "writing ONNX needs the package onnx: pip install 'qcnn[bench]'"
        ) from error

    size = sum(layer.dense_bytes for layer in network.layers)
    if size > _MAX_BYTES:
        raise ModelFormatError(
            f"the network's dense weights take {size} bytes, "
            f"expected at most {_MAX_BYTES}, the most one ONNX file holds"
        )

    def value(name: str) -> Any:
        shape: list[str | int | None] = ["N", *network.shapes[name]]
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    nodes, initializers = [], []
    for node in network.nodes:
        written, constants = _translate(network, node)
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


def _translate(network: Network, node: Node) -> tuple[list[Any], list[Any]]:
    """ONNX nodes of one node, and the constants they use."""
    from onnx import helper, numpy_helper

    constants: list[Any] = []

    def constant(suffix: str, array: npt.NDArray[Any]) -> str:
        name = f"{node.name}.{suffix}"
        constants.append(numpy_helper.from_array(array, name))
        return name

    def scalar(suffix: str, number: float) -> str:
        return constant(suffix, np.array(number, dtype=np.float32))

    def tensor(suffix: str) -> str:
        return constant(suffix, network.tensors[f"{node.name}.{suffix}"])

    inputs, attributes = list(node.inputs), node.attributes
    outputs = [node.name]
    match node.op:
        case "conv" | "fc":
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
        case "concat" | "flatten" | "softmax":
            operator = node.op.capitalize()
            made = helper.make_node(operator, inputs, outputs, node.name, axis=1)
        case "reshape":
            # 0 keeps the batch dimension, also where it is 0.
            shape = np.array([0, *attributes["shape"]], dtype=np.int64)
            inputs.append(constant("shape", shape))
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
    return [made], constants


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
