"""ONNX export of whole networks. Each operation is in ``test_operations.py``."""

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy_executor import execute
from random_networks import Binary, NetworkBuilder, Quantized, relative_error
from test_quantized_layers import mixed_network

from qcnn_py import ModelFormatError, Network, Node


def onnx_runtime(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("n", [0, 1, 5])
def test_quantized_network_with_any_batch(n: int, tmp_path: Path) -> None:
    network, builder = mixed_network()
    network.to_onnx(tmp_path / "network.onnx")
    session = onnx_runtime(tmp_path / "network.onnx")
    images = builder.images(n)
    (output,) = session.run(["prob"], {"input": images})
    assert relative_error(output, execute(network, images)["prob"]) < 1e-5


@pytest.mark.parametrize("n_centroids", [1, 2, 5, 128, 256, 300])
def test_compact_weights_are_those_of_the_codes(
    n_centroids: int, tmp_path: Path
) -> None:
    builder = NetworkBuilder((6, 9, 9))
    builder.conv(8, 3, groups=2, quantized=Quantized(n_centroids, 2, parts=1))
    builder.conv(6, 1, groups=2, quantized=Quantized(n_centroids, 2, parts=3))
    builder.conv(15, 2, groups=1, quantized=Quantized(n_centroids, 3))
    builder.fc(7, quantized=Quantized(n_centroids, 4))
    network, images = builder.build(), builder.images(2)
    network.to_onnx(tmp_path / "network.onnx", compact=True)
    (output,) = onnx_runtime(tmp_path / "network.onnx").run(None, {"input": images})
    assert relative_error(output, execute(network, images)[network.output]) < 1e-5
    # Nothing is stored dense.
    stored = onnx.load(tmp_path / "network.onnx").graph.initializer
    assert not any(tensor.name.endswith(".weight") for tensor in stored)


@pytest.mark.parametrize("compact", [False, True])
def test_binary_weights(compact: bool, tmp_path: Path) -> None:
    builder = NetworkBuilder((3, 7, 7))
    builder.conv(5, 3, quantized=Binary())
    builder.fc(16, bias=False, quantized=Binary())
    network, images = builder.build(), builder.images(2)
    network.to_onnx(tmp_path / "network.onnx", compact=compact)
    (output,) = onnx_runtime(tmp_path / "network.onnx").run(None, {"input": images})
    assert relative_error(output, execute(network, images)[network.output]) < 1e-5
    stored = onnx.load(tmp_path / "network.onnx").graph.initializer
    assert any(tensor.name.endswith(".weight") for tensor in stored) is not compact


def test_compact_file_is_small(tmp_path: Path) -> None:
    builder = NetworkBuilder((2048,))
    builder.fc(512, quantized=Quantized(32, 4))
    network = builder.build()
    sizes = []
    for compact in (False, True):
        network.to_onnx(tmp_path / "network.onnx", compact=compact)
        sizes.append((tmp_path / "network.onnx").stat().st_size)
    dense, compact_size = sizes
    assert dense > 4 * 2048 * 512
    # Codes of 5 bits and codebooks, and some nodes.
    assert compact_size < 512 * 512 * 5 / 8 + 4 * 32 * 2048 + 4 * 512 + 5000


def test_names_shapes_and_metadata(tmp_path: Path) -> None:
    builder = NetworkBuilder((2, 4, 4))
    builder.conv(3, 3, name="conv", quantized=Quantized(4, 2))
    builder.add("silu", name="out")
    metadata = {"class_names": ["ä", "b"], "scale": 0.5}
    builder.build(metadata=metadata).to_onnx(str(tmp_path / "network.onnx"))
    session = onnx_runtime(tmp_path / "network.onnx")
    (given,), (returned,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape) == ("input", ["N", 2, 4, 4])
    assert (returned.name, returned.shape) == ("out", ["N", 3, 2, 2])
    stored = session.get_modelmeta().custom_metadata_map
    assert {key: json.loads(text) for key, text in stored.items()} == metadata
    graph = onnx.load(tmp_path / "network.onnx").graph
    assert "conv" in {name for node in graph.node for name in node.output}
    assert {tensor.name for tensor in graph.initializer} == {"conv.weight", "conv.bias"}


def test_output_inside_the_graph(tmp_path: Path) -> None:
    builder = NetworkBuilder((2, 4, 4))
    inner = builder.conv(3, 3)
    builder.add("relu")
    network, images = builder.build(output=inner), builder.images(2)
    network.to_onnx(tmp_path / "network.onnx")
    (output,) = onnx_runtime(tmp_path / "network.onnx").run(None, {"input": images})
    assert relative_error(output, execute(network, images)[inner]) < 1e-5


def test_file_is_deterministic_and_replaced_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, _ = mixed_network()
    path = tmp_path / "network.onnx"
    network.to_onnx(path)
    first = path.read_bytes()
    network.to_onnx(path)
    assert path.read_bytes() == first

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        network.to_onnx(path)
    assert path.read_bytes() == first
    assert [file.name for file in tmp_path.iterdir()] == ["network.onnx"]


def test_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    network, _ = mixed_network()
    with pytest.raises(ImportError, match=r"pip install 'qcnn-py\[onnx\]'"):
        network.to_onnx(tmp_path / "network.onnx")


def test_more_than_a_file_holds(tmp_path: Path) -> None:
    # One codeword a subspace: small here, 2 GiB when decoded.
    tensors = {
        "fc.codebooks": np.zeros((8, 1, 2**16), np.float32),
        "fc.codes": np.zeros((1024, 8), np.uint8),
    }
    weights = {
        "type": "product_quantized",
        "n_subspaces": 8,
        "n_centroids": 1,
        "subvector_dim": 2**16,
        "codebook_groups": 1,
    }
    attributes = {"out_features": 1024, "bias": False, "weights": weights}
    network = Network([Node("fc", "fc", ("input",), attributes)], tensors, (2**19,))
    with pytest.raises(ModelFormatError, match="2147483648 bytes, expected at most"):
        network.to_onnx(tmp_path / "network.onnx")
