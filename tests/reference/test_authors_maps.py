"""The authors' quantised AlexNet against the responses of their implementation."""

from pathlib import Path

import numpy as np
import pytest
from random_networks import relative_error

import qcnn_py
from qcnn_py import Network

TOLERANCE = 1e-5

CONVOLUTIONAL = ["conv1", "norm1", "pool1", "conv2", "norm2", "pool2"]
CONVOLUTIONAL += ["conv3", "conv4", "conv5", "pool5"]
# Our name of a response, and the authors'.
CLASSIFIER = {"fc7": "fc7", "relu7": "fc7_relu", "fc8": "fc8", "prob": "prob"}


@pytest.fixture(scope="module")
def folder(test_data: Path) -> Path:
    return test_data / "alexnet-reference"


@pytest.fixture(scope="module")
def maps(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "feature_maps.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def alexnet(folder: Path) -> Network:
    return qcnn_py.read_reference(folder, "bvlc_alexnet_aCaF", "AlexNet")


def relative_l2(actual: np.ndarray, expected: np.ndarray) -> float:
    difference = actual.astype(np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected))


def test_convolutional_part(alexnet, maps, isa):
    part = alexnet.truncated("pool5")
    traced = part.compile(precision="exact", isa=isa).trace(maps["input"])
    errors = {name: relative_l2(traced[name], maps[name]) for name in CONVOLUTIONAL}
    assert max(errors.values()) < TOLERANCE, errors


def test_classifier(alexnet, maps, isa):
    # The vector enters fc7, so it stands for the response of the dropout before it.
    part = alexnet.subgraph("drop6")
    traced = part.compile(precision="exact", isa=isa).trace(maps["fc7_in"])
    errors = {
        node: relative_l2(traced[node], maps[array])
        for node, array in CLASSIFIER.items()
    }
    assert max(errors.values()) < TOLERANCE, errors


def test_dense_execution_of_the_decoded_weights(alexnet, maps, isa):
    part = alexnet.truncated("pool5")
    quantized = part.compile(precision="exact", isa=isa)(maps["input"])
    dense = part.decoded().compile(precision="exact", isa=isa)(maps["input"])
    assert relative_error(quantized, dense) < TOLERANCE


def test_published_costs(alexnet):
    layers = alexnet.layers
    dense = [layer.dense_operations for layer in layers]
    quantized = [layer.operations for layer in layers]
    speed_ups = [round(d / q, 2) for d, q in zip(dense, quantized, strict=True)]
    assert speed_ups == [1.92, 6.06, 6.17, 5.02, 4.24, 3.88, 3.88, 0.98]
    assert round(sum(dense) / 1e6, 1) == 724.4
    assert round(sum(quantized) / 1e6, 1) == 174.3
    # The authors' files, block padding and all, give 18.48.
    size = sum(layer.dense_bytes for layer in layers)
    assert 18.4 < size / sum(layer.bytes for layer in layers) < 18.6


def test_qcnn_file_round_trip(alexnet, tmp_path):
    alexnet.save(tmp_path / "alexnet.qcnn")
    again = Network.load(tmp_path / "alexnet.qcnn")
    assert again.nodes == alexnet.nodes
    assert set(again.tensors) == set(alexnet.tensors)
    for name, tensor in alexnet.tensors.items():
        np.testing.assert_array_equal(again.tensors[name], tensor)
