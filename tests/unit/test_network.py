"""Networks as data: checks, derived figures, transformations."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy_executor import execute
from random_networks import NetworkBuilder, Quantized, relative_error

from qcnn_py import (
    ModelFormatError,
    Network,
    Node,
    QcnnError,
    QuantizedWeights,
    ShapeError,
)


def residual() -> NetworkBuilder:
    """Return a network with a branch, two convolutions and a classifier."""
    b = NetworkBuilder((4, 6, 6))
    b.conv(6, 3, padding=1, groups=2, name="conv1", quantized=Quantized(5, 2, True))
    b.add("relu", name="relu1")
    b.conv(6, 1, name="conv2")
    b.add("add", "relu1", "conv2", name="sum")
    b.pool("max_pool", 2, stride=2)
    b.fc(7, name="fc1", quantized=Quantized(300, 4))
    b.add("relu", name="relu2")
    b.fc(3, name="fc2", bias=False)
    b.add("softmax", name="prob")
    return b


def test_parts_as_given() -> None:
    builder = residual()
    network = builder.build(metadata={"class_names": ["a", "b", "c"]})
    assert [n.name for n in network.nodes] == [n.name for n in builder.nodes]
    assert network.node("sum").inputs == ("relu1", "conv2")
    assert network.node("conv1").attributes["groups"] == 2
    assert (network.input_name, network.input_shape) == ("input", (4, 6, 6))
    assert network.output == "prob"
    assert network.conv_layers == ["conv1", "conv2"]
    assert network.fc_layers == ["fc1", "fc2"]
    assert network.shapes["input"] == (4, 6, 6)
    assert network.shapes["conv1"] == (6, 6, 6)
    assert network.shapes["prob"] == (3,)
    assert network.metadata == {"class_names": ["a", "b", "c"]}
    assert "2 of 4 layers quantised" in repr(network)
    for name, tensor in builder.tensors.items():
        np.testing.assert_array_equal(network.tensors[name], tensor)


def test_tensors_and_metadata_cannot_be_changed() -> None:
    network = residual().build(metadata={"key": [1]})
    with pytest.raises(ValueError, match="read-only"):
        network.tensors["conv2.weight"][0] = 0
    with pytest.raises(TypeError):
        network.tensors["conv2.weight"] = 0  # type: ignore[index]
    network.metadata["key"].append(2)
    assert network.metadata == {"key": [1]}


def test_output_need_not_be_the_last_node() -> None:
    network = residual().build(output="relu1")
    assert network.output == "relu1"


def test_layer_figures() -> None:
    conv1, conv2, fc1, fc2 = residual().build().layers
    assert (conv1.kind, conv1.groups, conv1.kernel) == ("conv", 2, (3, 3))
    assert (conv1.n_subspaces, conv1.n_centroids, conv1.subvector_dim) == (1, 5, 2)
    assert conv1.input_shape == (4, 6, 6)
    assert conv1.output_shape == (6, 6, 6)
    assert conv1.channels == 2
    # 6 filters of 2 x 3 x 3 weights, one bias each, at 36 positions.
    assert conv1.dense_bytes == 4 * (6 * 18 + 6)
    assert conv1.dense_operations == 36 * 6 * 18
    # Two sets of 5 codewords of 2 numbers; 54 codes of 3 bits; the biases.
    assert conv1.bytes == 4 * 2 * 5 * 2 + -(-54 * 3 // 8) + 4 * 6
    # A table of 5 products for each of 4 x 36 inputs, then one addition a look-up.
    assert conv1.operations == 4 * 36 * 5 + 36 * 54
    assert not conv2.quantized
    assert conv2.n_centroids is None
    assert (conv2.bytes, conv2.operations) == (4 * (36 + 6), 36 * 36)
    assert (conv2.bytes, conv2.operations) == (
        conv2.dense_bytes,
        conv2.dense_operations,
    )
    # 54 inputs make 14 sub-vectors of 4, the last half empty: the file leaves it out.
    assert (fc1.channels, fc1.n_subspaces) == (54, 14)
    assert fc1.bytes == 4 * 300 * 54 + -(-7 * 14 * 9 // 8) + 4 * 7
    assert fc1.operations == 54 * 300 + 7 * 14
    assert fc2.dense_bytes == 4 * 3 * 7
    assert fc2.dense_operations == 21


def test_figures_count_every_set_of_codebooks() -> None:
    layers = []
    for parts in (1, 3):
        builder = NetworkBuilder((4, 6, 6))
        builder.conv(6, 3, groups=2, padding=1, quantized=Quantized(5, 2, parts))
        layers.append(builder.build().layers[0])
    # Two more sets for each group of 2 channels, and tables of them.
    assert layers[1].bytes - layers[0].bytes == 4 * 2 * 2 * 5 * 2
    assert layers[1].operations - layers[0].operations == 2 * 4 * 36 * 5


@pytest.mark.parametrize("n_sets", [3, 4])
def test_sets_of_unequal_parts_are_refused(n_sets: int) -> None:
    network = residual().build()
    codebooks = np.zeros((n_sets, 1, 5, 2), np.float32)
    weights = QuantizedWeights(codebooks, network.tensors["conv1.codes"], None)
    message = (
        f"codebook_groups is {n_sets}, expected 1 or a multiple of 2 that divides 6"
    )
    with pytest.raises(ModelFormatError, match=message):
        network.with_quantized_layer("conv1", weights)


def test_decoded() -> None:
    network = residual().build()
    decoded = network.decoded()
    assert not any(layer.quantized for layer in decoded.layers)
    images = residual().images(2)
    expected, output = execute(network, images), execute(decoded, images)
    assert relative_error(output["prob"], expected["prob"]) < 1e-12
    assert decoded.tensors["conv2.weight"] is not None
    np.testing.assert_array_equal(
        decoded.tensors["conv1.bias"], network.tensors["conv1.bias"]
    )


@pytest.mark.parametrize("bias", [True, False])
def test_binary_layer_replaces_dense_and_back(bias: bool) -> None:
    network = residual().build()
    signs = np.random.default_rng(0).choice(np.int8([-1, 1]), (6, 6, 1, 1))
    binary = network.with_binary_layer("conv2", signs, np.ones(6, np.float32))
    if not bias:
        binary = network.with_binary_layer("conv2", signs, None)
    assert binary.node("conv2").binary
    assert not binary.node("conv2").quantized
    assert "conv2.weight" not in binary.tensors
    info = next(layer for layer in binary.layers if layer.name == "conv2")
    assert (info.binary, info.quantized, info.n_centroids) == (True, False, None)
    # 36 weights of a bit.
    assert info.bytes == 5 + 4 * 6 * bias
    assert info.operations == info.dense_operations
    decoded = binary.decoded()
    np.testing.assert_array_equal(decoded.tensors["conv2.weight"], signs)
    assert "conv2.signs" not in decoded.tensors
    assert ("conv2.bias" in decoded.tensors) is bias
    images = residual().images(2)
    expected = execute(binary, images)["prob"]
    assert relative_error(decoded.compile("exact")(images), expected) < 1e-5
    assert relative_error(binary.compile("exact")(images), expected) < 1e-5


@pytest.mark.parametrize(
    ("signs", "message"),
    [
        (np.zeros((6, 6, 1, 1), np.int8), "is 0 at element 0, expected 1 or -1"),
        (np.ones((6, 6, 1, 1), np.uint8), "holds codes, expected signs"),
        (np.ones((6, 6, 1, 1), np.float32), "holds float32, expected signs"),
        (np.ones((6, 6), np.int8), r"shape \[6, 6\], expected \[6, 6, 1, 1\]"),
        (np.ones((6, 6, 1, 1)), "dtype float64, expected float32"),
    ],
)
def test_bad_signs_are_refused(signs: Any, message: str) -> None:
    with pytest.raises((ModelFormatError, ShapeError), match=message):
        residual().build().with_binary_layer("conv2", signs, None)


def test_signs_are_no_codes() -> None:
    network = residual().build()
    codes = network.tensors["conv1.codes"]
    signs = np.ones(codes.shape, np.int8)
    with pytest.raises(ModelFormatError, match="holds signs, expected codes"):
        network.replace(tensors={"conv1.codes": signs})


@pytest.mark.parametrize("bias", [True, False])
def test_quantized_layer_replaces_dense_and_back(bias: bool) -> None:
    network = residual().build()
    rng = np.random.default_rng(0)
    weights = QuantizedWeights(
        codebooks=rng.standard_normal((3, 4, 2)).astype(np.float32),
        codes=rng.integers(4, size=(6, 1, 1, 3)).astype(np.uint8),
        bias=np.zeros(6, np.float32) if bias else None,
    )
    quantized = network.with_quantized_layer("conv2", weights)
    assert quantized.node("conv2").quantized
    assert quantized.node("conv2").attributes["bias"] is bias
    assert "conv2.weight" not in quantized.tensors
    again = quantized.quantized_weights("conv2")
    np.testing.assert_array_equal(again.codes, weights.codes)
    dense = quantized.with_dense_layer("conv2", weights.decode(6), weights.bias)
    np.testing.assert_array_equal(
        dense.tensors["conv2.weight"], quantized.decoded().tensors["conv2.weight"]
    )
    assert not network.node("conv2").quantized


@pytest.mark.parametrize("groups", [1, 3])
def test_decode_follows_the_definition(groups: int) -> None:
    rng = np.random.default_rng(0)
    codebooks = rng.standard_normal((groups, 2, 5, 3)).astype(np.float32)
    codes = rng.integers(5, size=(6, 2, 4, 2)).astype(np.uint16)
    books = codebooks if groups > 1 else codebooks[0]
    weight = QuantizedWeights(books, codes, None).decode(5)
    assert weight.shape == (6, 5, 2, 4)
    assert weight.flags.c_contiguous
    for o, c, y, x in np.ndindex(weight.shape):
        codebook = codebooks[o // (6 // groups), c // 3]
        assert weight[o, c, y, x] == codebook[codes[o, y, x, c // 3], c % 3]


def test_truncated_and_subgraph_compute_the_same() -> None:
    builder = residual()
    network, images = builder.build(), builder.images(2)
    values = execute(network, images)
    head = network.truncated("sum")
    assert head.output == "sum"
    assert "fc1.codes" not in head.tensors
    np.testing.assert_array_equal(execute(head, images)["sum"], values["sum"])
    tail = network.subgraph("sum")
    assert (tail.input_name, tail.input_shape) == ("sum", (6, 6, 6))
    tail_values = execute(tail, values["sum"])
    np.testing.assert_array_equal(tail_values["prob"], values["prob"])
    middle = network.subgraph("relu1", "sum")
    assert [node.name for node in middle.nodes] == ["conv2", "sum"]


@pytest.mark.parametrize(
    ("start", "output", "message"),
    [
        ("conv2", None, "'conv2' does not cut the graph.*'input'"),
        ("nothing", None, "no value called 'nothing'"),
        ("input", "nothing", "no value called 'nothing'"),
        ("prob", "sum", "'prob' does not cut the graph"),
    ],
)
def test_subgraph_needs_a_cut(start: str, output: str | None, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        residual().build().subgraph(start, output)


def test_fold_batch_norms() -> None:
    b = NetworkBuilder((3, 6, 6))
    b.conv(4, 3, name="conv1", bias=False)
    b.batch_norm()
    first = b.add("relu")
    b.conv(4, 3, name="conv2", groups=2)
    second = b.batch_norm()
    # Kept: two users, a quantised layer, no layer before it.
    b.conv(4, 3, second, padding=1, name="conv3")
    third = b.batch_norm()
    b.add("add", "conv3", third)
    b.conv(4, 1, quantized=Quantized(4, 2))
    b.batch_norm()
    b.batch_norm(first)
    b.fc(5, name="fc", bias=True)
    b.batch_norm()
    network, images = b.build(), b.images(3)
    folded = network.fold_batch_norms()
    assert [node.op for node in folded.nodes].count("batch_norm") == 3
    assert folded.output == "fc"
    expected = execute(network, images)[network.output]
    assert relative_error(execute(folded, images)["fc"], expected) < 1e-6


def test_replace_shares_and_keeps() -> None:
    network = residual().build(metadata={"a": 1, "b": 2})
    replaced = network.replace(
        tensors={"conv2.bias": np.ones(6, np.float32)}, metadata={"b": 3, "c": 4}
    )
    assert replaced.metadata == {"a": 1, "b": 3, "c": 4}
    assert replaced.tensors["conv2.bias"].tolist() == [1] * 6
    assert network.tensors["conv2.bias"].tolist() != [1] * 6
    weight = network.tensors["conv2.weight"]
    assert np.shares_memory(replaced.tensors["conv2.weight"], weight)


def without(**changes: Any) -> Callable[[Node], Node]:
    return lambda node: node.with_attributes(**changes)


def dropping(key: str) -> Callable[[Node], Node]:
    def change(node: Node) -> Node:
        attributes = {k: v for k, v in node.attributes.items() if k != key}
        return Node(node.name, node.op, node.inputs, attributes)

    return change


def over(*inputs: str) -> Callable[[Node], Node]:
    return lambda node: Node(node.name, node.op, inputs, node.attributes)


def dense(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


# What is wrong, where, and what the message has to name.
REFUSED_NODES = {
    "unknown input": ("conv2", over("nothing"), ModelFormatError, "'?\"?nothing"),
    "later input": ("conv2", over("prob"), ModelFormatError, "prob"),
    "no input": ("relu1", over(), ModelFormatError, "0 inputs"),
    "one operand to add": ("sum", over("conv2"), ModelFormatError, "1 inputs"),
    "different shapes": ("sum", over("input", "conv2"), ShapeError, r"\[4, 6, 6\]"),
    "groups": ("conv1", without(groups=3), ShapeError, "groups is 3"),
    "no groups": ("conv1", without(groups=0), ShapeError, "groups is 0"),
    "stride": ("conv2", without(stride=[0, 1]), ShapeError, "stride"),
    "dilation": ("conv2", without(dilation=[1, 0]), ShapeError, "dilation"),
    "kernel": ("conv2", without(kernel=[7, 1]), ShapeError, "spans 7 pixels"),
    "huge kernel": ("conv2", without(kernel=[2**62, 1]), ShapeError, "kernel"),
    "huge padding": ("conv2", without(padding=[2**62] * 4), ShapeError, "padding"),
    "negative": ("conv2", without(kernel=[-1, 1]), ModelFormatError, "-1"),
    "fraction": ("conv2", without(kernel=[1.5, 1]), ModelFormatError, "1.5"),
    "three numbers": ("conv2", without(kernel=[1, 1, 1]), ModelFormatError, "length"),
    "text": ("conv2", without(bias="yes"), ModelFormatError, "yes"),
    "missing": ("conv2", dropping("dilation"), ModelFormatError, "dilation"),
    "unknown": ("conv2", without(dialation=[1, 1]), ModelFormatError, "dialation"),
    "weights": (
        "conv2",
        without(weights={"type": "sparse"}),
        ModelFormatError,
        "sparse",
    ),
    "channels": ("conv2", without(out_channels=5), ShapeError, r"\[5, 6, 6\]"),
    "fc on an image": ("fc1", over("sum"), ShapeError, "flatten"),
}


@pytest.mark.parametrize(
    ("name", "change", "error", "message"), REFUSED_NODES.values(), ids=REFUSED_NODES
)
def test_refused_node(
    name: str,
    change: Callable[[Node], Node],
    error: type[Exception],
    message: str,
) -> None:
    network = residual().build()
    with pytest.raises(error, match=message):
        network.replace(nodes={name: change(network.node(name))})


REFUSED_TENSORS = {
    "missing": ("conv2.weight", None, ModelFormatError, r"\[6, 6, 1, 1\]"),
    "not needed": ("conv2.scale", dense(6), ModelFormatError, "no node"),
    "shape": ("conv2.weight", dense(6, 6, 1, 2), ShapeError, r"\[6, 6, 1, 2\]"),
    "dtype": ("conv2.bias", np.zeros(6), ShapeError, "float64"),
    "codes for floats": ("conv2.bias", np.zeros(6, np.uint8), ModelFormatError, "code"),
    "floats for codes": (
        "conv1.codes",
        dense(6, 3, 3, 1),
        ModelFormatError,
        "conv1.codes",
    ),
    "NaN": ("conv2.bias", dense(6) * np.nan, ModelFormatError, "NaN at element 0"),
    "infinity": (
        "conv1.codebooks",
        dense(2, 1, 5, 2) + np.inf,
        ModelFormatError,
        "inf",
    ),
    "code beyond": (
        "conv1.codes",
        np.full((6, 3, 3, 1), 5, np.uint8),
        ModelFormatError,
        "below n_centroids = 5",
    ),
}


@pytest.mark.parametrize(
    ("name", "array", "error", "message"), REFUSED_TENSORS.values(), ids=REFUSED_TENSORS
)
def test_refused_tensor(
    name: str, array: np.ndarray | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        residual().build().replace(tensors={name: array})
    assert name in str(caught.value)


def relu(name: str = "relu", attributes: dict[str, Any] | None = None) -> Node:
    return Node(name, "relu", ("input",), attributes or {})


REFUSED_GRAPHS: dict[str, tuple[list[Node], tuple[int, ...], dict[str, Any]]] = {
    "unknown operation": ([Node("x", "rotate", ("input",), {})], (3,), {}),
    "name twice": ([relu(), relu()], (3,), {}),
    "name of the input": ([relu("input")], (3,), {}),
    "no name": ([relu("")], (3,), {}),
    "unknown output": ([relu()], (3,), {"output": "nothing"}),
    "two dimensions": ([relu()], (3, 4), {}),
    "no pixels": ([relu()], (3, 0, 4), {}),
    "negative": ([relu()], (-3,), {}),
    "more than memory": ([relu()], (2**40, 2**40, 2**40), {}),
    "NaN attribute": (
        [Node("x", "leaky_relu", ("input",), {"alpha": float("nan")})],
        (3,),
        {},
    ),
    "infinite attribute": (
        [Node("x", "leaky_relu", ("input",), {"alpha": 1e300})],
        (3,),
        {},
    ),
    "crossed bounds": (
        [Node("x", "clip", ("input",), {"low": 1.0, "high": 0.0})],
        (3,),
        {},
    ),
    "certain dropout": ([Node("x", "dropout", ("input",), {"rate": 1.0})], (3,), {}),
    "empty window": (
        [Node("x", "lrn", ("input",), {"size": 0, "alpha": 1, "beta": 1, "bias": 1})],
        (3, 1, 1),
        {},
    ),
    "no epsilon": ([Node("x", "batch_norm", ("input",), {"epsilon": -1.0})], (3,), {}),
    "pooling padding": (
        [
            Node(
                "x",
                "max_pool",
                ("input",),
                {
                    "kernel": [2, 2],
                    "stride": [1, 1],
                    "padding": [2, 0, 0, 0],
                    "ceil_mode": False,
                },
            )
        ],
        (1, 4, 4),
        {},
    ),
    "reshape": ([Node("x", "reshape", ("input",), {"shape": [2, 2]})], (4,), {}),
    "reshape size": ([Node("x", "reshape", ("input",), {"shape": [5]})], (4,), {}),
    "NaN metadata": ([relu()], (3,), {"metadata": {"mean": float("nan")}}),
    "array metadata": ([relu()], (3,), {"metadata": {"mean": np.zeros(3)}}),
}


@pytest.mark.parametrize("graph", REFUSED_GRAPHS.values(), ids=REFUSED_GRAPHS)
def test_refused_graph(
    graph: tuple[list[Node], tuple[int, ...], dict[str, Any]],
) -> None:
    nodes, shape, options = graph
    with pytest.raises(QcnnError):
        Network(nodes, {}, shape, **options)


def test_file_is_deterministic_and_replaced_whole(tmp_path: Path) -> None:
    network = residual().build(metadata={"b": 1, "a": {"y": 2, "x": 3}})
    path = tmp_path / "model.qcnn"
    network.save(path)
    first = path.read_bytes()
    Network.load(path).save(path)
    assert path.read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == ["model.qcnn"]
    assert json.dumps(Network.load(path).metadata) == json.dumps(network.metadata)


def test_missing_and_unwritable_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        Network.load(tmp_path / "missing.qcnn")
    with pytest.raises(QcnnError, match="not a regular file"):
        Network.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        residual().build().save(tmp_path / "no" / "folder.qcnn")
