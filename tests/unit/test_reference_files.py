"""Reading the original implementation's parameter files.

A tiny network stands in for the published ones; the authors' own files are read in
``tests/reference/test_authors_maps.py``.
"""

import struct
from collections.abc import Callable
from math import prod
from pathlib import Path

import numpy as np
import pytest

import qcnn_py
from qcnn_py import ConfigError, ModelFormatError, Node
from qcnn_py.published_networks import PUBLISHED_NETWORKS, PublishedNetwork

PREFIX = "tiny"
BITS = 3
K = 5
CODES_SHAPES = {1: (6, 3, 3, 2), 4: (7, 18)}


def write_bin(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f"<{array.ndim + 1}i", array.ndim, *array.shape)
    path.write_bytes(header + array.astype("<f4").tobytes())


def write_cbn(path: Path, codes: np.ndarray, bits: int) -> None:
    """Write codes as the original does, one bit after the other."""
    header = struct.pack(f"<{codes.ndim + 2}i", codes.ndim, *codes.shape, bits)
    per_block = 8 * 4096 // bits
    flat = codes.ravel()
    blocks = b""
    for start in range(0, flat.size, per_block):
        digits = "".join(f"{c:0{bits}b}" for c in flat[start : start + per_block])
        digits = digits.ljust(8 * 4096, "0")
        blocks += int(digits, 2).to_bytes(4096, "big")
    path.write_bytes(header + blocks)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Publish a network of one convolution and one fully connected layer."""
    dense = {"weights": {"type": "dense"}, "bias": True}
    conv = {
        "out_channels": 6,
        "kernel": [3, 3],
        "stride": [1, 1],
        "padding": [0, 0, 0, 0],
        "dilation": [1, 1],
        "groups": 2,
        **dense,
    }
    pool = {
        "kernel": [2, 2],
        "stride": [2, 2],
        "padding": [0, 0, 0, 0],
        "ceil_mode": True,
    }
    nodes = (
        Node("conv1", "conv", ("input",), conv),
        Node("relu1", "relu", ("conv1",), {}),
        Node("pool1", "max_pool", ("relu1",), pool),
        Node("flatten", "flatten", ("pool1",), {}),
        Node("fc2", "fc", ("flatten",), {"out_features": 7, **dense}),
    )
    shapes = {"conv1": (6, 3, 3, 3), "fc2": (7, 54)}
    monkeypatch.setitem(
        PUBLISHED_NETWORKS, "Tiny", PublishedNetwork((6, 7, 7), nodes, shapes)
    )


@pytest.fixture
def folder(tiny: None, tmp_path: Path) -> Path:
    """Return a folder with the tiny network's quantised parameters."""
    rng = np.random.default_rng(0)
    for number, shape in CODES_SHAPES.items():
        write_bin(tmp_path / f"tiny.biasVec.{number:02}.bin", rng.normal(size=shape[0]))
        # Two channels or three by sub-vectors: the convolution's last has one pad.
        dsub = 2 if number == 1 else 3
        codebooks = rng.normal(size=(shape[-1], K, dsub))
        write_bin(tmp_path / f"tiny.ctrdLst.{number:02}.bin", codebooks)
        codes = rng.integers(K, size=shape)
        write_cbn(tmp_path / f"tiny.asmtLst.{number:02}.cbn", codes, BITS)
    return tmp_path


def read(folder: Path) -> qcnn_py.Network:
    return qcnn_py.read_reference(folder, PREFIX, "Tiny")


def test_quantized_parameters(folder: Path) -> None:
    network = read(folder)
    rng = np.random.default_rng(0)
    for name, shape in zip(("conv1", "fc2"), CODES_SHAPES.values(), strict=True):
        weights = network.quantized_weights(name)
        bias = rng.normal(size=shape[0]).astype(np.float32)
        np.testing.assert_array_equal(weights.bias, bias)
        dsub = 2 if name == "conv1" else 3
        codebooks = rng.normal(size=(shape[-1], K, dsub)).astype(np.float32)
        if name == "conv1":
            codebooks[-1, :, 1:] = 0
        np.testing.assert_array_equal(weights.codebooks, codebooks)
        np.testing.assert_array_equal(weights.codes, rng.integers(K, size=shape))
    assert network.metadata["origin"]["architecture"] == "Tiny"


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("n_subspaces", [1, 7, 700])
def test_codes_of_every_width(tmp_path: Path, bits: int, n_subspaces: int) -> None:
    """Several blocks, and codes that cross byte boundaries."""
    from qcnn_py.reference_files import _read_codes

    codes = np.random.default_rng(bits).integers(2**bits, size=(99, n_subspaces))
    write_cbn(tmp_path / "codes.cbn", codes, bits)
    read = _read_codes(tmp_path / "codes.cbn", codes.shape, 2**bits)
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, codes)


def test_dense_parameters(folder: Path) -> None:
    rng = np.random.default_rng(1)
    for number, kind, shape in ((1, "convKnl", (6, 3, 3, 3)), (5, "fcntWei", (7, 54))):
        number = 4 if number == 5 else number
        (folder / f"tiny.ctrdLst.{number:02}.bin").unlink()
        write_bin(folder / f"tiny.{kind}.{number:02}.bin", rng.normal(size=shape))
    network = read(folder)
    rng = np.random.default_rng(1)
    for name, shape in (("conv1", (6, 3, 3, 3)), ("fc2", (7, 54))):
        expected = rng.normal(size=shape).astype(np.float32)
        np.testing.assert_array_equal(network.tensors[f"{name}.weight"], expected)


def test_unknown_architecture() -> None:
    with pytest.raises(ConfigError, match=r"'Alexnet'.*did you mean AlexNet"):
        qcnn_py.read_reference("nowhere", "x", "Alexnet")


def test_missing_file(folder: Path) -> None:
    (folder / "tiny.asmtLst.01.cbn").unlink()
    with pytest.raises(FileNotFoundError, match=r"tiny\.asmtLst\.01\.cbn"):
        read(folder)


def test_missing_weights(folder: Path) -> None:
    (folder / "tiny.ctrdLst.01.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"ctrdLst\.01.*convKnl\.01"):
        read(folder)


def edited(offset: int, value: int) -> Callable[[bytes], bytes]:
    """Return an edit that puts a little-endian int32 at a byte offset."""
    return lambda data: data[:offset] + struct.pack("<i", value) + data[offset + 4 :]


NAN = struct.unpack("<i", struct.pack("<f", float("nan")))[0]

MALFORMED = {
    "empty": ("biasVec.01.bin", lambda data: b"", "number of dimensions: got cut off"),
    "cut header": ("ctrdLst.01.bin", lambda data: data[:9], "dimensions: got cut off"),
    "cut data": (
        "ctrdLst.01.bin",
        lambda data: data[:-1],
        "data after the header: got 79 bytes, expected 80",
    ),
    "trailing data": (
        "biasVec.01.bin",
        lambda data: data + b"\0",
        "data after the header: got 25 bytes, expected 24",
    ),
    "hostile rank": (
        "biasVec.01.bin",
        edited(0, 2**31 - 1),
        "number of dimensions: got 2147483647, expected 1",
    ),
    "negative rank": ("biasVec.01.bin", edited(0, -1), "number of dimensions: got -1"),
    "hostile dimension": (
        "ctrdLst.01.bin",
        edited(8, 2**31 - 1),
        "data after the header: got 80 bytes",
    ),
    "zero dimension": ("ctrdLst.01.bin", edited(8, 0), r"dimensions: got \(2, 0, 2\)"),
    "negative dimension": ("ctrdLst.01.bin", edited(8, -5), "dimensions: got"),
    "wrong bias": (
        "biasVec.01.bin",
        edited(4, 5),
        r"dimensions: got \(5,\), expected \(6\)",
    ),
    "wrong subspaces": (
        "ctrdLst.01.bin",
        edited(4, 1),
        "data after the header: got 80 bytes, expected 40",
    ),
    "swapped dimensions": (
        "ctrdLst.01.bin",
        lambda data: edited(12, 5)(edited(8, 2)(data)),
        "number of subspaces: got 2, expected 1",
    ),
    "NaN": ("ctrdLst.01.bin", edited(16, NAN), "got NaN or infinite"),
    "wrong codes": (
        "asmtLst.01.cbn",
        edited(16, 3),
        r"dimensions: got \(6, 3, 3, 3\), expected \(6, 3, 3, 2\)",
    ),
    "no bits": ("asmtLst.01.cbn", edited(20, 0), "bits of a code: got 0, expected 1"),
    "too many bits": ("asmtLst.01.cbn", edited(20, 9), "bits of a code: got 9"),
    "cut block": (
        "asmtLst.04.cbn",
        lambda data: data[:-1],
        "data after the header: got 4095 bytes, expected 4096",
    ),
    "code beyond the codebook": (
        "asmtLst.01.cbn",
        edited(24, -1),
        "the largest code: got 7, expected less than the 5",
    ),
}


@pytest.mark.parametrize(("file", "edit", "message"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_file(
    folder: Path, file: str, edit: Callable[[bytes], bytes], message: str
) -> None:
    path = folder / f"tiny.{file}"
    path.write_bytes(edit(path.read_bytes()))
    with pytest.raises(ModelFormatError, match=message) as caught:
        read(folder)
    assert str(path) in str(caught.value)


# Published: parameters in millions, and the shape that enters the classifier.
SIZES = {
    "AlexNet": (60_965_224, 256 * 6 * 6),
    "CaffeNet": (60_965_224, 256 * 6 * 6),
    "VggCnnS": (102_908_520, 512 * 6 * 6),
    "VGG16": (138_357_544, 512 * 7 * 7),
}


@pytest.mark.parametrize(("name", "size"), SIZES.items(), ids=SIZES)
def test_published_sizes(name: str, size: tuple[int, int]) -> None:
    shapes = PUBLISHED_NETWORKS[name].weight_shapes
    parameters = sum(prod(shape) + shape[0] for shape in shapes.values())
    assert (parameters, shapes["fc6"][1]) == size
