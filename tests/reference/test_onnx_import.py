"""ONNX models read back: ours, and graphs as other tools write them.

The judge is ONNX Runtime. The graphs are small and have the nodes that exporters make:
both of PyTorch's, and those that turn channels-last networks into ONNX.
"""

import contextlib
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from graph_strategies import agree, networks
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from random_networks import NetworkBuilder, Quantized, relative_error

import qcnn_py
from qcnn_py import (
    ModelFormatError,
    QcnnError,
    ShapeError,
    UnsupportedOperator,
    read_onnx,
)
from qcnn_py.onnx_operators import operator_table

TOLERANCE = 1e-5


class Graph:
    """An ONNX graph in the making. Every method that adds a node returns its output."""

    def __init__(self, shape: Sequence[int | str], opset: int = 17) -> None:
        self.opset = opset
        self.shape = shape
        self.rng = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.extra: dict[str, Any] = {}

    def const(self, value: Any, name: str | None = None, dtype: Any = None) -> str:
        array = np.asarray(value, dtype)
        if array.dtype == np.float64:
            array = array.astype(np.float32)
        name = name or f"const{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def normal(self, *shape: int, name: str | None = None) -> str:
        return self.const(0.3 * self.rng.standard_normal(shape), name)

    def add(
        self, op: str, *inputs: str, out: str | None = None, **attributes: Any
    ) -> str:
        out = out or f"{op.lower()}_{len(self.nodes)}"
        name = f"/{out}/{op}"
        self.nodes.append(helper.make_node(op, inputs, [out], name, **attributes))
        return out

    def old(self, **attributes: int) -> dict[str, int]:
        """Attributes of operators that broadcast only when they are told to."""
        return {"broadcast": 1, **attributes} if self.opset < 7 else {}

    def conv(
        self, x: str, out_channels: int, channels: int, kernel: int = 3, **a: Any
    ) -> str:
        number = len(self.nodes)
        weight = self.normal(
            out_channels, channels, kernel, kernel, name=f"features.{number}.weight"
        )
        bias = self.normal(out_channels, name=f"features.{number}.bias")
        return self.add("Conv", x, weight, bias, kernel_shape=[kernel, kernel], **a)

    def model(self, output: str, *others: str) -> onnx.ModelProto:
        def value(name: str, shape: Any = None) -> onnx.ValueInfoProto:
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

        graph = helper.make_graph(
            self.nodes,
            "graph",
            [value("image", self.shape)],
            [value(name) for name in (output, *others)],
            self.constants,
        )
        opsets = [helper.make_opsetid("", self.opset)]
        return helper.make_model(
            graph, opset_imports=opsets, ir_version=8, **self.extra
        )


def save(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    onnx.save(model, path)
    return path


def onnx_runtime(path: Path, images: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        path, options, providers=["CPUExecutionProvider"]
    )
    (given,) = session.get_inputs()
    output: np.ndarray = session.run(None, {given.name: images})[0]
    return output


def flattened(g: Graph) -> str:
    """What ``x.view(x.size(0), -1)`` becomes."""
    x = g.conv("image", 4, 3)
    n = g.add("Gather", g.add("Shape", x), g.const(0, dtype=np.int64), axis=0)
    n = g.add("Unsqueeze", n, g.const([0]))
    shape = g.add("Concat", n, g.const([-1]), axis=0)
    x = g.add("Reshape", x, shape)
    return g.add("Gemm", x, g.normal(5, 144, name="fc.weight"), transB=1)


def shortcut(g: Graph) -> str:
    """``pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 2))`` as PyTorch writes it."""
    x = "image"
    for axis in (2, 3):
        x = g.add("Slice", x, *(g.const([n]) for n in (0, 2**63 - 1, axis, 2)))
    zeros = g.add("ConstantOfShape", g.const([2]))
    pads = g.add("Cast", g.const([0, 0, 0, 0, 1, 2]), to=TensorProto.FLOAT)
    pads = g.add("Reshape", g.add("Concat", pads, zeros, axis=0), g.const([-1, 2]))
    pads = g.add("Slice", pads, *(g.const([n]) for n in (-1, -(2**63) + 1, 0, -1)))
    pads = g.add("Reshape", g.add("Transpose", pads, perm=[1, 0]), g.const([-1]))
    pads = g.add("Cast", pads, to=TensorProto.INT64)
    y = g.conv("image", 6, 3, strides=[2, 2], pads=[1] * 4)
    return g.add("Add", y, g.add("Pad", x, pads))


def zero_channels(g: Graph) -> str:
    """``cat([x, zeros(x.shape[0], 2, 8, 8)])``, which depends on the batch."""
    n = g.add("Gather", g.add("Shape", "image"), g.const([0]), axis=0)
    zeros = g.add("ConstantOfShape", g.add("Concat", n, g.const([2, 8, 8]), axis=0))
    return g.conv(g.add("Concat", zeros, "image", zeros, axis=1), 4, 7)


def squeeze_excitation(g: Graph) -> str:
    x = g.conv("image", 8, 3, pads=[1] * 4)
    x = g.add("Mul", x, g.add("Sigmoid", x))
    s = g.add("ReduceMean", x, axes=[2, 3], keepdims=1)
    s = g.add("Relu", g.conv(s, 4, 8, 1))
    s = g.add("HardSigmoid", g.conv(s, 8, 4, 1), alpha=1 / 6)
    return g.add("HardSwish", g.add("Mul", s, x))


def hard_swish_of_old_exporters(g: Graph) -> str:
    x = g.conv("image", 4, 3)
    y = g.add("Clip", g.add("Add", x, g.const(3.0)), g.const(0.0), g.const(6.0))
    return g.add("Div", g.add("Mul", x, y), g.const(6.0))


def channel_shuffle(g: Graph) -> str:
    x = g.conv("image", 6, 3)
    shape = g.add("Shape", x)
    parts = [g.add("Gather", shape, g.const(i, dtype=np.int64)) for i in range(4)]
    n, c, h, w = (g.add("Unsqueeze", part, g.const([0])) for part in parts)
    half = g.add("Div", c, g.const([2], dtype=np.int64))
    two = g.const([2], dtype=np.int64)
    x = g.add("Reshape", x, g.add("Concat", n, two, half, h, w, axis=0))
    x = g.add("Transpose", x, perm=[0, 2, 1, 3, 4])
    x = g.add("Reshape", x, g.add("Concat", n, g.const([-1]), h, w, axis=0))
    left, right = f"left_{len(g.nodes)}", f"right_{len(g.nodes)}"
    sizes = g.const([2, 4], dtype=np.int64)
    g.nodes.append(helper.make_node("Split", [x, sizes], [left, right], axis=1))
    return g.add("Concat", right, left, axis=1)


def depthwise_block(g: Graph) -> str:
    x = g.add("Clip", g.conv("image", 6, 3), g.const(0.0), g.const(6.0))
    x = g.conv(x, 6, 1, group=6, pads=[1, 1, 1, 1], strides=[2, 2])
    x = g.add("Clip", x, g.const(0.0), g.const(6.0))
    return g.conv(x, 3, 6, 1)


def batch_norms(g: Graph) -> str:
    """Before a convolution, behind one, and behind a matrix product."""

    def norm(x: str, n: int) -> str:
        variance = g.const(g.rng.uniform(0.5, 2, n))
        parts = [g.normal(n) for _ in range(3)]
        return g.add("BatchNormalization", x, *parts, variance, epsilon=1e-3)

    x = g.add("Relu", norm("image", 3))
    x = g.add("Relu", norm(g.conv(x, 4, 3), 4))
    x = g.add("GlobalMaxPool", x)
    x = g.add("Squeeze", x, g.const([2, 3]))
    x = g.add("MatMul", x, g.normal(4, 5))
    return norm(g.add("Add", x, g.normal(5)), 5)


def log_probabilities(g: Graph) -> str:
    x = g.add("AveragePool", g.conv("image", 4, 3), kernel_shape=[6, 6])
    return g.add("LogSoftmax", g.add("Flatten", x), axis=-1)


def parametric_relu(g: Graph) -> str:
    return g.add("PRelu", g.conv("image", 4, 3), g.normal(4, 1, 1))


def normalized_input(g: Graph) -> str:
    """Mean and deviation per channel, a mean image, RGB to BGR."""
    x = g.add("Sub", "image", g.normal(1, 3, 1, 1))
    x = g.add("Div", x, g.const([[[0.2]], [[0.3]], [[0.4]]]))
    x = g.add("Sub", x, g.normal(3, 8, 8))
    planes = [
        g.add("Unsqueeze", g.add("Gather", x, g.const(i), axis=1), g.const([1]))
        for i in (2, 1, 0)
    ]
    return g.conv(g.add("Concat", *planes, axis=1), 4, 3)


def padded_convolution(g: Graph) -> str:
    pads = g.const([0, 0, 1, 2, 0, 0, 0, 1])
    x = g.conv(g.add("Pad", "image", pads), 4, 3, strides=[2, 2])
    return g.add("Pad", x, g.const([0, 0, 1, 1, 0, 0, 1, 1]), mode="reflect")


def auto_padding(g: Graph) -> str:
    x = g.conv("image", 4, 3, auto_pad="SAME_UPPER", strides=[2, 2])
    x = g.conv(x, 4, 4, 2, auto_pad="SAME_LOWER")
    return g.add("MaxPool", x, kernel_shape=[2, 2], auto_pad="SAME_UPPER")


def dilated(g: Graph) -> str:
    return g.conv("image", 4, 3, dilations=[2, 2], pads=[2, 0, 1, 2])


def dilated_pools(g: Graph) -> str:
    x = g.add(
        "MaxPool", "image", kernel_shape=[3, 2], dilations=[2, 3], pads=[2, 1, 1, 1]
    )
    return g.add(
        "AveragePool",
        x,
        kernel_shape=[2, 2],
        dilations=[2, 1],
        strides=[2, 1],
        pads=[1, 1, 1, 0],
        ceil_mode=1,
    )


def pixel_attention(g: Graph) -> str:
    x = g.conv("image", 4, 3)
    mean = g.add("ReduceMean", x, axes=[1], keepdims=1)
    top = g.add("ReduceMax", x, axes=[1], keepdims=1)
    gate = g.add(
        "Sigmoid", g.conv(g.add("Concat", mean, top, axis=1), 1, 2, pads=[1] * 4)
    )
    return g.add("Mul", x, gate)


def depth_to_space(g: Graph) -> str:
    x = g.conv("image", 8, 3)
    x = g.add("Reshape", x, g.const([0, 2, 2, 2, 6, 6]))
    x = g.add("Transpose", x, perm=[0, 1, 4, 2, 5, 3])
    return g.conv(g.add("Reshape", x, g.const([0, 2, 12, 12])), 3, 2)


def tokens(g: Graph) -> str:
    """A matrix product over the last of three axes, and a softmax over another."""
    x = g.add("Reshape", g.conv("image", 4, 3), g.const([0, 4, -1]))
    x = g.add("Transpose", x, perm=[0, 2, 1])
    x = g.add("Add", g.add("MatMul", x, g.normal(4, 5)), g.normal(5))
    return g.add("Softmax", x, axis=1)


def constant_condition(g: Graph) -> str:
    """A branch that an exporter left open although it is decided."""
    x = g.conv("image", 1, 3)
    branches = {}
    for name, op in {"then_branch": "Relu", "else_branch": "Neg"}.items():
        out = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        node = helper.make_node(op, [x], [name])
        branches[name] = helper.make_graph([node], name, [], [out])
    shape = g.add("Shape", x)
    channels = g.add("Gather", shape, g.const(1, dtype=np.int64))
    decided = g.add("Equal", channels, g.const(1, dtype=np.int64))
    return g.add("If", decided, **branches)


GRAPHS: dict[str, Callable[[Graph], str]] = {
    function.__name__: function
    for function in (
        flattened,
        shortcut,
        zero_channels,
        squeeze_excitation,
        hard_swish_of_old_exporters,
        channel_shuffle,
        depthwise_block,
        batch_norms,
        log_probabilities,
        parametric_relu,
        normalized_input,
        padded_convolution,
        auto_padding,
        dilated,
        dilated_pools,
        pixel_attention,
        depth_to_space,
        tokens,
        constant_condition,
    )
}


@pytest.mark.parametrize("batch", ["N", 2], ids=["dynamic", "fixed"])
@pytest.mark.parametrize("fill", GRAPHS.values(), ids=GRAPHS)
def test_graph_agrees_with_onnx_runtime(
    fill: Callable[[Graph], str], batch: int | str, tmp_path: Path
) -> None:
    # Average pooling has dilations from opset 19 on.
    g = Graph([batch, 3, 8, 8], opset=19 if fill is dilated_pools else 17)
    path = save(g.model(fill(g)), tmp_path)
    images = g.rng.standard_normal((2, 3, 8, 8)).astype(np.float32)
    network = read_onnx(path)
    expected = onnx_runtime(path, images)
    output = network.compile(precision="exact")(images)
    assert relative_error(output.reshape(expected.shape), expected) < TOLERANCE


def operations(network: qcnn_py.Network) -> list[str]:
    return [node.op for node in network.nodes]


def imported(
    fill: Callable[[Graph], str], folder: Path, **graph: Any
) -> qcnn_py.Network:
    g = Graph(**{"shape": ["N", 3, 8, 8], **graph})
    return read_onnx(save(g.model(fill(g)), folder))


def test_nothing_is_left_of_shape_arithmetic(tmp_path: Path) -> None:
    assert operations(imported(flattened, tmp_path)) == ["conv", "flatten", "fc"]


def test_padding_becomes_the_convolutions(tmp_path: Path) -> None:
    network = imported(padded_convolution, tmp_path)
    assert network.nodes[0].attributes["padding"] == [1, 2, 0, 1]
    assert "pad" not in operations(network)


def test_normalisation_is_folded(tmp_path: Path) -> None:
    network = imported(batch_norms, tmp_path)
    # What a convolution follows stays.
    assert operations(network) == [
        "batch_norm",
        "relu",
        "conv",
        "relu",
        "global_max_pool",
        "flatten",
        "fc",
    ]


def test_gates_are_recognised(tmp_path: Path) -> None:
    network = imported(squeeze_excitation, tmp_path)
    expected = ["conv", "silu", "global_average_pool", "conv", "relu", "conv"]
    assert operations(network) == [*expected, "hard_sigmoid", "mul", "hard_swish"]


def test_layers_are_called_like_their_weights(tmp_path: Path) -> None:
    network = imported(flattened, tmp_path)
    assert [layer.name for layer in network.layers] == ["features.0", "fc"]
    # PyTorch's older exporter numbers what it has changed, but names the modules.
    g = Graph(["N", 3, 8, 8])
    g.add(
        "Conv",
        "image",
        g.normal(4, 3, 3, 3, name="onnx::Conv_12"),
        out="/layer1/layer1.0/conv1/Conv_output_0",
    )
    g.nodes[-1].name = "/layer1/layer1.0/conv1/Conv"
    network = read_onnx(save(g.model(g.nodes[-1].output[0]), tmp_path))
    assert network.output == "layer1.0.conv1"


def channels_last(g: Graph) -> str:
    """What tools make of a channels-last network: transpositions around every layer."""

    def layer(x: str, node: Callable[[str], str]) -> str:
        x = g.add("Transpose", x, perm=[0, 3, 1, 2])
        return g.add("Transpose", node(x), perm=[0, 2, 3, 1])

    x = g.add("Sub", "image", g.const([0.1, 0.2, 0.3]))
    x = layer(x, lambda x: g.conv(x, 4, 3, auto_pad="SAME_UPPER"))
    x = g.add("Relu", g.add("Add", x, g.normal(4)))
    y = layer(x, lambda x: g.add("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2]))
    y = layer(y, lambda x: g.conv(x, 4, 4, 1))
    x = layer(x, lambda x: g.conv(x, 4, 4, 1, strides=[2, 2]))
    x = g.add("Concat", g.add("Add", x, y), y, axis=3)
    x = g.add("Mul", x, g.add("ReduceMean", x, axes=[1, 2], keepdims=1))
    x = g.add("Reshape", x, g.const([-1, 4 * 5 * 8]))
    x = g.add("Add", g.add("MatMul", x, g.normal(160, 6)), g.normal(6))
    return g.add("Softmax", x, axis=-1)


def test_channels_last_networks_take_channels_first(tmp_path: Path) -> None:
    g = Graph(["N", 8, 10, 3])
    path = save(g.model(channels_last(g)), tmp_path)
    network = read_onnx(path)
    assert network.input_shape == (3, 8, 10)
    assert "transpose" not in operations(network)
    # The summands of all layers but the first image's mean are biases now.
    assert operations(network).count("batch_norm") == 1
    images = g.rng.standard_normal((3, 8, 10, 3)).astype(np.float32)
    expected = onnx_runtime(path, images)
    output = network.compile(precision="exact")(images.transpose(0, 3, 1, 2))
    assert relative_error(output, expected) < TOLERANCE


def test_image_that_is_returned_channels_last(tmp_path: Path) -> None:
    g = Graph(["N", 3, 4, 5])
    x = g.add("Transpose", g.add("Relu", "image"), perm=[0, 2, 3, 1])
    path = save(g.model(x), tmp_path)
    network = read_onnx(path)
    assert network.shapes[network.output] == (4, 5, 3)
    images = g.rng.standard_normal((2, 3, 4, 5)).astype(np.float32)
    np.testing.assert_array_equal(network.compile()(images), onnx_runtime(path, images))


@given(networks())
def test_own_files_come_back(
    tmp_path_factory: pytest.TempPathFactory, builder: Any
) -> None:
    network, images = builder.build(), builder.images(2)
    path = tmp_path_factory.mktemp("own") / "network.onnx"
    expected = network.decoded().compile(precision="exact")(images)
    for compact in (False, True):
        network.to_onnx(path, compact=compact)
        again = read_onnx(path)
        assert agree(again.compile(precision="exact")(images), expected, 1e-4)


def test_metadata_and_names_of_own_files_come_back(tmp_path: Path) -> None:
    builder = NetworkBuilder((3, 6, 6))
    builder.conv(4, 3, name="conv1", quantized=Quantized(8, 2))
    builder.add("relu", name="relu1")
    builder.fc(3, name="fc1")
    network = builder.build(metadata={"class_names": ["a", "b", "c"]})
    for compact in (False, True):
        network.to_onnx(tmp_path / "network.onnx", compact=compact)
        again = read_onnx(tmp_path / "network.onnx")
        assert again.metadata == network.metadata
        assert [layer.name for layer in again.layers] == ["conv1", "fc1"]


def classifier(opset: int) -> Graph:
    """One network in the first and in a late version of its operators."""
    old = opset < 7
    g = Graph([2, 3, 8, 8], opset=opset)
    x = g.conv("image", 4, 3)
    x = g.add("Add", x, g.normal(4) if old else g.normal(4, 1, 1), **g.old(axis=1))
    parts = [g.normal(4) for _ in range(3)]
    variance = g.const(g.rng.uniform(1, 2, 4))
    given = {"is_test": 1} if old else {}
    x = g.add("BatchNormalization", x, *parts, variance, **given)
    if old:
        x = g.add("Dropout", g.add("Clip", x, min=0.0, max=6.0), is_test=1)
        x = g.add("Pad", x, pads=[0, 0, 1, 0, 0, 0, 0, 2], value=0.5)
        x = g.add("Unsqueeze", g.add("GlobalAveragePool", x), axes=[4])
        x = g.add("Squeeze", x, axes=[3, 4])
    else:
        x = g.add("Clip", x, g.const(0.0), g.const(6.0))
        x = g.add("Pad", x, g.const([0, 0, 1, 0, 0, 0, 0, 2]), g.const(0.5))
        x = g.add("Squeeze", g.add("GlobalAveragePool", x), g.const([3]))
    x = g.add("Reshape", x, g.const([2, 4]))
    x = g.add("Gemm", x, g.normal(4, 5), g.normal(5), **g.old())
    g.add("Softmax", x, axis=1, out="prob")
    return g


def test_opset_6(tmp_path: Path) -> None:
    images = np.random.default_rng(1).standard_normal((2, 3, 8, 8)).astype(np.float32)
    # ONNX Runtime begins with opset 7.
    expected = onnx_runtime(save(classifier(17).model("prob"), tmp_path), images)
    network = read_onnx(save(classifier(6).model("prob"), tmp_path))
    output = network.compile(precision="exact")(images)
    assert relative_error(output, expected) < TOLERANCE
    assert "dropout" in operations(network)


def test_external_data(tmp_path: Path) -> None:
    g = Graph(["N", 3, 8, 8])
    model = g.model(flattened(g))
    path = tmp_path / "model.onnx"
    onnx.save(
        model, path, save_as_external_data=True, location="weights", size_threshold=100
    )
    images = g.rng.standard_normal((2, 3, 8, 8)).astype(np.float32)
    expected = onnx_runtime(path, images)
    output = read_onnx(path).compile(precision="exact")(images)
    assert relative_error(output, expected) < TOLERANCE
    (tmp_path / "weights").unlink()
    with pytest.raises((OSError, ModelFormatError), match="weights"):
        read_onnx(path)


def _unknown(g: Graph) -> str:
    return g.add("Relu", g.add("Erf", "image", out="gelu"))


def _mixing(g: Graph) -> str:
    return g.add("Transpose", "image", perm=[1, 0, 2, 3])


def _two_images(g: Graph) -> str:
    return g.add("Div", "image", "image")


def _pool_indices(g: Graph) -> str:
    g.nodes.append(
        helper.make_node("MaxPool", ["image"], ["y", "i"], kernel_shape=[2, 2])
    )
    return g.add("Add", "y", g.add("Cast", "i", to=TensorProto.FLOAT))


REFUSED: Mapping[str, tuple[Callable[[Graph], str], str]] = {
    "operator": (_unknown, r"node '/gelu/Erf' \(Erf\): networks have no such operator"),
    "batch": (
        _mixing,
        r"\(Transpose\): perm is \[1, 0, 2, 3\], expected that the batch",
    ),
    "operands": (_two_images, r"\(Div\): the divisor is computed from the image"),
    "indices": (_pool_indices, "its output Indices is used"),
    "weights": (
        lambda g: g.add("MatMul", "image", g.add("Relu", "image")),
        "the second operand is computed from the image, expected a constant",
    ),
    "images of a batch": (
        lambda g: g.add("Reshape", "image", g.const([-1, 8])),
        "expected that the first axis stays the batch",
    ),
    "training": (
        lambda g: g.add("Dropout", "image", g.const(0.5), g.const(True)),
        "training_mode is set",
    ),
    "repetition": (
        lambda g: g.add("Add", "image", g.normal(2, 3, 8, 8)),
        "the constant differs between images of a batch",
    ),
}


@pytest.mark.parametrize(("fill", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(fill: Callable[[Graph], str], message: str, tmp_path: Path) -> None:
    g = Graph(["N", 3, 8, 8])
    with pytest.raises(UnsupportedOperator, match=rf"model\.onnx: .*{message}"):
        read_onnx(save(g.model(fill(g)), tmp_path))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (["N", 3, "H", "W"], r"shape \(N, 3, H, W\), which is open; give input_shape"),
        (["N", 3, 8], r"expected \(N, features\) or \(N, channels, H, W\)"),
        (["N", 3, 0, 8], "expected extents of at least 1"),
        (["N", 4, 8, 8], "Conv"),
    ],
)
def test_refused_shape(shape: Any, message: str, tmp_path: Path) -> None:
    g = Graph(shape)
    path = save(g.model(g.conv("image", 2, 3)), tmp_path)
    with pytest.raises((ShapeError, ModelFormatError), match=message):
        read_onnx(path)


def test_open_shape_is_given(tmp_path: Path) -> None:
    g = Graph(["N", 3, "H", "W"])
    path = save(g.model(g.add("GlobalMaxPool", g.conv("image", 2, 3))), tmp_path)
    network = read_onnx(path, input_shape=(3, 9, 7))
    assert network.input_shape == (3, 9, 7)
    with pytest.raises(ShapeError, match=r"but input_shape is \(4, 9, 7\)"):
        read_onnx(path, input_shape=(4, 9, 7))


def test_output_is_chosen(tmp_path: Path) -> None:
    g = Graph(["N", 3, 8, 8])
    # The other output's operator is not supported, and not needed.
    x, y = g.add("Relu", "image", out="x"), g.add("Erf", "image", out="y")
    path = save(g.model(x, y), tmp_path)
    assert read_onnx(path, output="x").output == "x"
    for wanted in (None, "z"):
        with pytest.raises(ModelFormatError, match="expected one of x, y"):
            read_onnx(path, output=wanted)


def test_malformed_files(tmp_path: Path) -> None:
    g = Graph(["N", 3, 8, 8])
    path = save(g.model(flattened(g)), tmp_path)
    content = path.read_bytes()
    for bad in (b"", b"not ONNX", content[: len(content) // 2]):
        path.write_bytes(bad)
        with pytest.raises(ModelFormatError, match=r"model\.onnx: "):
            read_onnx(path)
    with pytest.raises(FileNotFoundError):
        read_onnx(tmp_path / "missing.onnx")


@given(data=st.data())
def test_changed_bytes_raise_nothing_unforeseen(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    g = Graph([data.draw(st.sampled_from(["N", 2])), 3, 8, 8])
    fill = data.draw(st.sampled_from(list(GRAPHS.values())))
    path = save(g.model(fill(g)), tmp_path_factory.mktemp("changed"))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(
            st.integers(0, 255)
        )
    path.write_bytes(content)
    # Some changes give another valid model.
    with contextlib.suppress(QcnnError, OSError):
        read_onnx(path)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"pip install 'qcnn-py\[onnx\]'"):
        read_onnx("model.onnx")


def test_documented_operators_are_those_of_the_code() -> None:
    documentation = Path(__file__).parents[2] / "docs" / "onnx.md"
    # To be updated with: python -m qcnn_py.onnx_operators
    assert operator_table() in documentation.read_text("utf-8")


REAL_NETWORKS = {
    "cifar10_alexnet": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), 7903),
    "cifar10_resnet20": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 8103),
}


@pytest.mark.parametrize("name", REAL_NETWORKS)
def test_real_network(name: str, test_data: Path) -> None:
    mean, std, correct = REAL_NETWORKS[name]
    with zipfile.ZipFile(test_data / "cifar10.zip") as archive:
        test = sorted(
            n for n in archive.namelist() if "/test/" in n and n[-4:] == ".jpg"
        )
        files = test[::25]
        pixels = np.stack([np.asarray(Image.open(archive.open(n))) for n in files])
    classes = sorted({n.split("/")[-2] for n in test})
    labels = np.array([classes.index(n.split("/")[-2]) for n in files])
    scaled = (pixels / 255 - np.array(mean)) / np.array(std)
    images = np.ascontiguousarray(scaled.transpose(0, 3, 1, 2), np.float32)
    path = test_data / f"{name}.onnx"
    expected = onnx_runtime(path, images)
    output = read_onnx(path).compile(precision="exact")(images)
    assert relative_error(output, expected) < 1e-4
    np.testing.assert_array_equal(output.argmax(1), expected.argmax(1))
    # All 10,000 images give the noted accuracy; 400 of them, nearly.
    accuracy = (output.argmax(1) == labels).mean()
    assert accuracy == pytest.approx(correct / 10_000, abs=0.04)
