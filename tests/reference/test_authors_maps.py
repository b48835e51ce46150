"""The authors' files: their AlexNet's responses, their images, their bytes."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from random_networks import relative_error

import qcnn_py
from qcnn_py import Network
from qcnn_py.preprocessing import Preprocessing

PREFIX = "bvlc_alexnet_aCaF"
# Relative L2 error, by precision. With 8 bits rounding is off by up to half of 254
# steps of the range of inputs and codewords: 1 % where that is some ten times their
# deviation, more where smooth pixels cancel out, as in conv1. Errors of all layers
# before add up; the greatest seen is 4.8 %, of norm2.
TOLERANCES = {"exact": 1e-5, "fast": 3e-3, "int8": 6e-2}

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
    mean = folder / "imagenet_mean.single.bin"
    return qcnn_py.read_reference(folder, PREFIX, "AlexNet", mean=mean)


def relative_l2(actual: np.ndarray, expected: np.ndarray) -> float:
    difference = actual.astype(np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected))


@pytest.mark.parametrize("precision", TOLERANCES)
def test_convolutional_part(alexnet, maps, isa, precision):
    part = alexnet.truncated("pool5")
    traced = part.compile(precision=precision, isa=isa).trace(maps["input"])
    errors = {
        (name, image): relative_l2(traced[name][image], maps[name][image])
        for name in CONVOLUTIONAL
        for image in range(len(maps["input"]))
    }
    assert len(errors) == 2 * 10
    assert max(errors.values()) < TOLERANCES[precision], errors


@pytest.mark.parametrize("precision", TOLERANCES)
def test_classifier(alexnet, maps, isa, precision):
    # The vector enters fc7, so it stands for the response of the dropout before it.
    part = alexnet.subgraph("drop6")
    traced = part.compile(precision=precision, isa=isa).trace(maps["fc7_in"])
    errors = {
        node: relative_l2(traced[node], maps[array])
        for node, array in CLASSIFIER.items()
    }
    assert max(errors.values()) < TOLERANCES[precision], errors


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("form", ["bmp", "png", "tiff"])
def test_images_become_the_authors_input(alexnet, maps, folder, number, form, tmp_path):
    """Bit for bit, by what the ``.qcnn`` file alone says."""
    path = folder / "images" / f"ILSVRC2012_val_{number:08}.BMP"
    if form != "bmp":
        Image.open(path).save(tmp_path / f"image.{form}")
        path = tmp_path / f"image.{form}"
    alexnet.truncated("conv1").save(tmp_path / "alexnet.qcnn")
    metadata = Network.load(tmp_path / "alexnet.qcnn").metadata
    preprocessing = Preprocessing.from_json(metadata["preprocessing"])
    np.testing.assert_array_equal(preprocessing.apply(path), maps["input"][number - 1])


def test_the_same_files_are_written(alexnet, folder, tmp_path):
    """Byte for byte, codebooks and biases included."""
    qcnn_py.write_reference(alexnet, tmp_path, PREFIX)
    written = {path.name: path for path in tmp_path.iterdir()}
    assert written.keys() == {path.name for path in folder.glob(f"{PREFIX}.*")}
    for name, path in written.items():
        assert path.read_bytes() == (folder / name).read_bytes(), name


def test_dense_execution_of_the_decoded_weights(alexnet, maps, isa):
    part = alexnet.truncated("pool5")
    quantized = part.compile(precision="exact", isa=isa)(maps["input"])
    dense = part.decoded().compile(precision="exact", isa=isa)(maps["input"])
    assert relative_error(quantized, dense) < TOLERANCES["exact"]


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
