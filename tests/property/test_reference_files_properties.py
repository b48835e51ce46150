"""The authors' file formats: round trips and damage."""

import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from reference_folder import (
    CODES_SHAPES,
    PREFIX,
    K,
    tiny_network,
    write_bin,
    write_dense,
    write_quantized,
)

from qcnn_py import ModelFormatError, Network, read_reference, write_reference
from qcnn_py.preprocessing import MeanImage
from qcnn_py.published_networks import PUBLISHED_NETWORKS
from qcnn_py.reference_format import (
    map_bin,
    read_packed_codes,
    write_packed_codes,
)
from qcnn_py.reference_format import write_bin as write_array


@pytest.fixture(scope="module", autouse=True)
def _tiny() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PUBLISHED_NETWORKS, "Tiny", tiny_network())
        yield


# Arrays


@given(
    arrays.arrays(
        np.uint16,
        arrays.array_shapes(max_dims=4, max_side=40),
        elements=st.integers(0, 2**16 - 1),
    ),
    st.integers(1, 16),
)
def test_codes_round_trip(codes: np.ndarray, bits: int) -> None:
    codes = codes & np.uint16(2**bits - 1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "codes.cbn"
        with path.open("wb") as file:
            write_packed_codes(file, codes)
        np.testing.assert_array_equal(
            read_packed_codes(path, codes.shape, 2**bits), codes
        )


@given(
    st.sampled_from(["<f4", "<u2", "u1"]).flatmap(
        lambda dtype: arrays.arrays(dtype, arrays.array_shapes(max_dims=4))
    )
)
def test_arrays_round_trip(array: np.ndarray) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "array.bin"
        with path.open("wb") as file:
            write_array(file, array)
        read = map_bin(path, array.dtype)
        assert read.shape == array.shape
        # NaN and all: the bytes.
        assert read.tobytes() == array.tobytes()


# Damage


@cache
def sample(form: str) -> dict[str, bytes]:
    """Return the tiny network's files, codes packed, codes as bytes or dense."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (write_dense if form == "dense" else write_quantized)(folder)
        if form == "bytes":
            for number, shape in CODES_SHAPES.items():
                path = folder / f"tiny.asmtLst.{number:02}.cbn"
                codes = read_packed_codes(path, shape, K)
                write_bin(path.with_suffix(".bin"), codes + 1, "u1")
                path.unlink()
        return {path.name: path.read_bytes() for path in folder.iterdir()}


def use_or_refuse(files: dict[str, bytes]) -> None:
    """Read a folder; what can still be read has to run and to be written again."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, content in files.items():
            (folder / file).write_bytes(content)
        try:
            network = read_reference(folder, PREFIX, "Tiny")
        except ModelFormatError:
            return
        images = np.zeros((1, 6, 7, 7), np.float32)
        assert np.isfinite(network.compile(precision="exact")(images)).all()
        write_reference(network, folder / "again", PREFIX)
        assert_same(read_reference(folder / "again", PREFIX, "Tiny"), network)


def assert_same(one: Network, other: Network) -> None:
    assert one.nodes == other.nodes
    for name, tensor in other.tensors.items():
        np.testing.assert_array_equal(one.tensors[name], tensor)


forms = st.sampled_from(["packed", "bytes", "dense"])
# The header more often than the rest: most of the rest are any numbers.
places = st.integers(0, 30) | st.integers(0, 10**5)


@given(forms, st.data(), st.lists(st.tuples(places, st.integers(0, 255)), min_size=1))
def test_overwritten_bytes(
    form: str, data: st.DataObject, edits: list[tuple[int, int]]
) -> None:
    files = dict(sample(form))
    name = data.draw(st.sampled_from(sorted(files)))
    content = bytearray(files[name])
    for place, value in edits:
        content[place % len(content)] = value
    files[name] = bytes(content)
    use_or_refuse(files)


@given(forms, st.data(), places, st.binary(max_size=9))
def test_cut_and_prolonged_files(
    form: str, data: st.DataObject, length: int, tail: bytes
) -> None:
    files = dict(sample(form))
    name = data.draw(st.sampled_from(sorted(files)))
    files[name] = files[name][:length] + tail
    use_or_refuse(files)


@given(forms, st.data())
def test_swapped_files(form: str, data: st.DataObject) -> None:
    files = dict(sample(form))
    one, other = data.draw(st.permutations(sorted(files)))[:2]
    files[one], files[other] = files[other], files[one]
    with tempfile.TemporaryDirectory() as name:
        for file, content in files.items():
            (Path(name) / file).write_bytes(content)
        with pytest.raises(ModelFormatError):
            read_reference(name, PREFIX, "Tiny")


@cache
def mean_file(suffix: str) -> bytes:
    array = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"mean{suffix}"
        if suffix == ".npy":
            np.save(path, array)
        else:
            write_bin(path, array)
        return path.read_bytes()


@given(
    st.sampled_from([".npy", ".bin"]),
    st.lists(st.tuples(places, st.integers(0, 255)), max_size=9),
    st.integers(0, 10**5),
)
def test_damaged_mean_images(
    suffix: str, edits: list[tuple[int, int]], length: int
) -> None:
    content = bytearray(mean_file(suffix))
    for place, value in edits:
        content[place % len(content)] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"mean{suffix}"
        path.write_bytes(content[:length])
        try:
            mean = MeanImage.read(path, (3, 4, 5), None)
        except ModelFormatError:
            return
        assert np.isfinite(mean.array).all()
        assert MeanImage.from_json(mean.to_json()) == mean
