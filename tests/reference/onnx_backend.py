"""The importer and the engine behind the interface of the ONNX project's test suite.

The suite hands everything over as inputs, weights too. Here the first input is the
batch of images and the others become constants of the model. Where an operator
combines several inputs of one batch size, they are handed over as pieces of one batch.
What networks take as input has two or four axes; other
inputs arrive as features and get their shape in the model.
"""

import tempfile
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.backend.base import Backend, BackendRep

import qcnn_py

# Operators whose operands may all depend on the image.
JOINING = frozenset({"Add", "Concat", "Mean", "Mul", "Sub", "Sum"})


class Representation(BackendRep):
    """A model of the suite, imported when its constants are known."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model

    def run(self, inputs: Sequence[Any], **kwargs: Any) -> tuple[np.ndarray, ...]:
        first, *others = inputs
        operators = {node.op_type for node in self.model.graph.node}
        # One value for each image of the batch.
        alike = all(np.shape(other)[:1] == first.shape[:1] for other in others)
        joined = len(inputs) if operators <= JOINING and alike else 1
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        # The first that allows initializers which are no inputs.
        model.ir_version = max(model.ir_version, 4)
        known = {tensor.name for tensor in model.graph.initializer}
        names = [v.name for v in model.graph.input if v.name not in known]
        for name, array in list(zip(names, inputs, strict=True))[joined:]:
            model.graph.initializer.append(numpy_helper.from_array(array, name))
        images = list(inputs[:joined])
        if joined > 1 or images[0].ndim not in (2, 4):
            images = [_from_features(model, dict(zip(names, images, strict=False)))]
        results = []
        for output in model.graph.output:
            network = read(model, output.name)
            result = network.compile(precision="exact")(images[0])
            # Networks return vectors and images; the elements are the same.
            shape = [dim.dim_value for dim in output.type.tensor_type.shape.dim]
            results.append(result.reshape(shape))
        return tuple(results)


def _from_features(model: onnx.ModelProto, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Let a model take its inputs as pieces of one vector of features."""
    pieces = {
        name: array.reshape(len(array), prod(array.shape[1:]))
        for name, array in arrays.items()
    }
    batch = np.concatenate(list(pieces.values()), axis=1)
    opset = next(o.version for o in model.opset_import if o.domain == "")
    before, start = [], 0
    for name, piece in pieces.items():
        cut = {"starts": start, "ends": start + piece.shape[1], "axes": 1}
        start += piece.shape[1]
        constants = [
            numpy_helper.from_array(np.array([n], np.int64), f"{name}.{key}")
            for key, n in cut.items()
        ]
        shape = np.array(arrays[name].shape, np.int64)
        constants.append(numpy_helper.from_array(shape, f"{name}.shape"))
        model.graph.initializer.extend(constants)
        slice_inputs = [c.name for c in constants[:3]] if opset >= 10 else []
        attributes = {} if opset >= 10 else {k: [n] for k, n in cut.items()}
        before += [
            helper.make_node(
                "Slice", ["features", *slice_inputs], [f"{name}.piece"], **attributes
            ),
            helper.make_node("Reshape", [f"{name}.piece", f"{name}.shape"], [name]),
        ]
    kept = [value for value in model.graph.input if value.name not in arrays]
    nodes = list(model.graph.node)
    del model.graph.input[:], model.graph.node[:]
    features = helper.make_tensor_value_info("features", TensorProto.FLOAT, batch.shape)
    model.graph.input.extend([features, *kept])
    model.graph.node.extend(before + nodes)
    return batch


def read(model: onnx.ModelProto, output: str | None = None) -> qcnn_py.Network:
    """Write a model to a file and read that."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, path)
        return qcnn_py.read_onnx(path, output=output)


class EngineBackend(Backend):
    """The backend that the suite's runner asks for."""

    @classmethod
    def prepare(
        cls, model: onnx.ModelProto, device: str = "CPU", **kwargs: Any
    ) -> Representation:
        return Representation(model)

    @classmethod
    def supports_device(cls, device: str) -> bool:
        return device == "CPU"
