"""Reading the original implementation's parameter files.

A tiny network stands in for the published ones; the authors' own files are read in
``tests/reference/test_authors_maps.py``.
"""

import struct
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_networks import NetworkBuilder, Quantized
from reference_folder import (
    CODES_SHAPES,
    PREFIX,
    K,
    tiny_network,
    write_bin,
    write_cbn,
    write_dense,
    write_quantized,
)

import qcnn_py
from qcnn_py import ConfigError, ModelFormatError, Network
from qcnn_py.preprocessing import Preprocessing
from qcnn_py.published_networks import PUBLISHED_NETWORKS
from qcnn_py.reference_files import reference_preprocessing
from qcnn_py.reference_format import (
    map_bin,
    read_byte_codes,
    read_packed_codes,
    write_packed_codes,
)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PUBLISHED_NETWORKS, "Tiny", tiny_network())


@pytest.fixture
def folder(tiny: None, tmp_path: Path) -> Path:
    """Return a folder with the tiny network's quantised parameters."""
    write_quantized(tmp_path)
    return tmp_path


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read(folder: Path, **options: Any) -> Network:
    return qcnn_py.read_reference(folder, PREFIX, "Tiny", **options)


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


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("n_subspaces", [1, 7, 700])
def test_codes_of_every_width(tmp_path: Path, bits: int, n_subspaces: int) -> None:
    """Several blocks, and codes that cross byte boundaries."""
    path = tmp_path / "codes.cbn"
    codes = np.random.default_rng(bits).integers(2**bits, size=(99, n_subspaces))
    codes[0, 0] = 2**bits - 1
    write_cbn(path, codes, bits)
    read = read_packed_codes(path, codes.shape, 2**bits)
    assert read.dtype == (np.uint8 if bits <= 8 else np.uint16)
    np.testing.assert_array_equal(read, codes)
    with (tmp_path / "again.cbn").open("wb") as file:
        write_packed_codes(file, read)
    assert (tmp_path / "again.cbn").read_bytes() == path.read_bytes()


def test_many_blocks_of_codes(tmp_path: Path) -> None:
    """More than are unpacked at a time."""
    codes = np.random.default_rng(0).integers(32, size=(1000, 700))
    write_cbn(tmp_path / "codes.cbn", codes, 5)
    read = read_packed_codes(tmp_path / "codes.cbn", codes.shape, 32)
    np.testing.assert_array_equal(read, codes)
    with (tmp_path / "again.cbn").open("wb") as file:
        write_packed_codes(file, read)
    assert len(set(files_of(tmp_path).values())) == 1


def test_dense_parameters(tiny: None, tmp_path: Path) -> None:
    write_dense(tmp_path)
    network = read(tmp_path)
    rng = np.random.default_rng(1)
    for name, shape in (("conv1", (6, 3, 3, 3)), ("fc2", (7, 54))):
        for kind, size in (("bias", shape[0]), ("weight", shape)):
            expected = rng.normal(size=size).astype(np.float32)
            np.testing.assert_array_equal(network.tensors[f"{name}.{kind}"], expected)


def test_a_folder_may_hold_both_forms(folder: Path) -> None:
    write_dense(folder)
    assert all(layer.quantized for layer in read(folder).layers)
    assert all(layer.quantized for layer in read(folder, quantized=True).layers)
    assert not any(layer.quantized for layer in read(folder, quantized=False).layers)


def test_the_form_asked_for_has_to_be_there(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"convKnl\.01"):
        read(folder, quantized=False)
    (folder / "tiny.ctrdLst.04.bin").unlink()
    write_dense(folder)
    with pytest.raises(FileNotFoundError, match=r"ctrdLst\.04"):
        read(folder, quantized=True)
    assert [layer.quantized for layer in read(folder).layers] == [True, False]


def test_codes_in_bytes_count_from_1(folder: Path) -> None:
    expected = read(folder)
    for number, shape in CODES_SHAPES.items():
        path = folder / f"tiny.asmtLst.{number:02}.cbn"
        codes = read_packed_codes(path, shape, K)
        write_bin(path.with_suffix(".bin"), codes + 1, "u1")
        path.unlink()
    network = read(folder)
    for name, tensor in expected.tensors.items():
        np.testing.assert_array_equal(network.tensors[name], tensor)


def test_the_256th_code_is_0_in_a_byte(tmp_path: Path) -> None:
    path = tmp_path / "codes.bin"
    codes = np.arange(256).reshape(32, 8)
    write_bin(path, codes + 1, "u1")
    np.testing.assert_array_equal(read_byte_codes(path, (32, 8), 256), codes)
    with pytest.raises(ModelFormatError, match="a code: got 0, expected 1 to 255"):
        read_byte_codes(path, (32, 8), 255)
    with pytest.raises(ModelFormatError, match="got 100, expected 1 to 99"):
        read_byte_codes(path, (32, 8), 99)
    with pytest.raises(ModelFormatError, match=r"expected a \.cbn file for 257"):
        read_byte_codes(path, (32, 8), 257)


# --- writing --------------------------------------------------------------------------


@pytest.mark.parametrize("write", [write_quantized, write_dense])
def test_what_is_written_is_what_was_read(
    tiny: None, write: Callable[[Path], None], tmp_path: Path
) -> None:
    source, copy = tmp_path / "source", tmp_path / "deep" / "copy"
    source.mkdir()
    write(source)
    network = read(source)
    qcnn_py.write_reference(network, copy, PREFIX)
    again = read(copy)
    assert again.nodes == network.nodes
    for name, tensor in network.tensors.items():
        np.testing.assert_array_equal(again.tensors[name], tensor)
    assert files_of(copy).keys() == files_of(source).keys()
    qcnn_py.write_reference(again, tmp_path / "again", PREFIX)
    assert files_of(tmp_path / "again") == files_of(copy)


def tiny_by_other_names(groups: int = 2, **conv: Any) -> Network:
    """Return the tiny network as another program might make it, without dropout."""
    builder = NetworkBuilder((6, 7, 7), seed=3)
    builder.conv(6, 3, groups=groups, name="first", **conv)
    builder.add("relu", name="second")
    builder.pool("max_pool", 2, stride=2, ceil_mode=True)
    builder.fc(7, name="last")
    return builder.build()


def test_names_and_dropout_are_free(tiny: None, tmp_path: Path) -> None:
    network = tiny_by_other_names()
    qcnn_py.write_reference(network, tmp_path, PREFIX)
    again = read(tmp_path)
    images = np.random.default_rng(0).normal(size=(2, 6, 7, 7)).astype(np.float32)
    np.testing.assert_array_equal(again.compile()(images), network.compile()(images))


def test_networks_that_the_original_does_not_know_are_refused(
    tiny: None, tmp_path: Path
) -> None:
    network = tiny_by_other_names(groups=1)
    message = r"of the closest, Tiny.*'groups': 1.*expected conv .*'groups': 2"
    with pytest.raises(ConfigError, match=message):
        qcnn_py.write_reference(network, tmp_path, PREFIX)
    short = tiny_by_other_names().truncated("second")
    with pytest.raises(ConfigError, match=r"got nothing, expected max_pool"):
        qcnn_py.write_reference(short, tmp_path, PREFIX)
    assert not files_of(tmp_path)


def test_codebooks_of_each_group_are_refused(tiny: None, tmp_path: Path) -> None:
    network = tiny_by_other_names(quantized=Quantized(4, 2, True))
    with pytest.raises(ConfigError, match="'first' has 2 sets of codebooks"):
        qcnn_py.write_reference(network, tmp_path, PREFIX)
    assert not files_of(tmp_path)


def test_dense_layers_beside_older_codebooks_are_refused(folder: Path) -> None:
    before = files_of(folder)
    with pytest.raises(FileExistsError, match=r"ctrdLst\.01.*'first' is dense"):
        qcnn_py.write_reference(tiny_by_other_names(), folder, PREFIX)
    assert files_of(folder) == before


# --- preprocessing --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "size", "mean_size", "resize"),
    [
        ("AlexNet", 227, 256, (256, 256)),
        ("CaffeNet", 227, 227, (256, 256)),
        ("CaffeNetFGB", 227, 256, (256, 256)),
        ("CaffeNetFGD", 227, 256, (256, 256)),
        ("VggCnnS", 224, 224, 256),
    ],
)
def test_preprocessing(
    architecture: str, size: int, mean_size: int, resize: Any, tmp_path: Path
) -> None:
    mean = np.random.default_rng(0).normal(size=(3, mean_size, mean_size))
    write_bin(tmp_path / "mean.bin", mean)
    preprocessing = reference_preprocessing(architecture, tmp_path / "mean.bin")
    assert preprocessing.resize == resize
    assert preprocessing.crop == (size, size)
    offset = (mean_size - size) // 2
    kept = mean[:, offset : offset + size, offset : offset + size]
    np.testing.assert_array_equal(preprocessing.mean.array, kept.astype(np.float32))
    assert Preprocessing.from_json(preprocessing.to_json()) == preprocessing


def test_the_original_has_no_preprocessing_for_vgg16() -> None:
    with pytest.raises(ConfigError, match="'VGG16', which has no preprocessing"):
        reference_preprocessing("VGG16", "mean.bin")


# --- refusals -------------------------------------------------------------------------


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
    "too many bits": ("asmtLst.01.cbn", edited(20, 17), "bits of a code: got 17"),
    "negative bits": ("asmtLst.01.cbn", edited(20, -8), "bits of a code: got -8"),
    "other bits": (
        "asmtLst.04.cbn",
        edited(12, 16),
        r"the largest code: got \d+, expected less than the 5",
    ),
    "hostile product": (
        "ctrdLst.01.bin",
        lambda data: struct.pack("<4i", 3, *[2**31 - 1] * 3) + data[16:],
        f"data after the header: got 80 bytes, expected {4 * (2**31 - 1) ** 3}",
    ),
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


@pytest.mark.parametrize("shape", [(1, 2**16 + 1, 2), (1, 2, 2**16 + 1)])
def test_codebooks_beyond_every_limit(folder: Path, shape: tuple[int, ...]) -> None:
    write_bin(folder / "tiny.ctrdLst.01.bin", np.zeros(shape))
    with pytest.raises(ModelFormatError, match=r"ctrdLst.*got 65537, expected at most"):
        read(folder)


@pytest.mark.parametrize("rank", [0, 5, 2**31 - 1, -1])
def test_dimensions_of_any_array_are_limited(tmp_path: Path, rank: int) -> None:
    path = tmp_path / "array.bin"
    path.write_bytes(struct.pack("<i", rank) + bytes(100))
    with pytest.raises(ModelFormatError, match=f"got {rank}, expected 1 to 4"):
        map_bin(path, "<f4")


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
