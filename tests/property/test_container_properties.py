"""``.qcnn`` files: round trips, what the format promises, and damage."""

import copy
import json
import struct
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graph_strategies import networks
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from random_networks import Binary, NetworkBuilder, Quantized
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from qcnn_py import ModelFormatError, Network, QcnnError
from qcnn_py.network import rounded_codebooks


def save(network: Network) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.qcnn"
        network.save(path)
        return path.read_bytes()


def load(data: bytes) -> Network:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.qcnn"
        path.write_bytes(data)
        return Network.load(path)


def use_or_refuse(data: bytes) -> None:
    """Load a damaged file; what still loads has to run."""
    try:
        network = load(data)
    except (QcnnError, OSError):
        return
    images = np.zeros((1, *network.input_shape), np.float32)
    # Damage can leave a valid network of another size; only small ones are run.
    if sum(int(np.prod(shape)) for shape in network.shapes.values()) < 1e7:
        model = network.compile(precision="exact")
        assert model(images).shape == (1, *network.shapes[network.output])


@cache
def sample() -> bytes:
    b = NetworkBuilder((6, 5, 5))
    b.conv(4, 3, groups=2, name="conv", quantized=Quantized(5, 2, True, 8))
    b.batch_norm()
    b.add("quantize_linear", bits=3, low=-1.0, high=1.0)
    b.pool("max_pool", 2)
    b.add("sign", name="signs")
    b.conv(3, 3, name="binary", padding=1, bias=False, quantized=Binary())
    b.add("quantize_log2", bits=3, high=2.0)
    b.fc(3, name="fc1", quantized=Quantized(300, 4, codebook_bits=16))
    b.fc(2, name="fc2")
    b.add("softmax", name="prob")
    return save(b.build(metadata={"class_names": ["a", "b"], "mean": [0.5]}))


def header_of(data: bytes) -> dict[str, Any]:
    (length,) = struct.unpack("<Q", data[:8])
    parsed: dict[str, Any] = json.loads(data[8 : 8 + length])
    return parsed


def with_header(data: bytes, header: dict[str, Any]) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def contents_of(data: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the ``qcnn`` entry and the stored tensors, by safetensors alone."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.qcnn"
        path.write_bytes(data)
        with safe_open(path, framework="numpy") as file:
            entry = json.loads(file.metadata()["qcnn"])
        return entry, load_file(path)


def file_of(entry: dict[str, Any], tensors: dict[str, np.ndarray]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.qcnn"
        save_file(tensors, path, metadata={"qcnn": json.dumps(entry)})
        return path.read_bytes()


# Round trips


@given(networks(quantizers=True))
def test_round_trip(builder: NetworkBuilder) -> None:
    metadata = {"class_names": ["ä", "b\n"], "nested": {"x": [1, 2.5, None, True]}}
    network = builder.build(metadata=metadata)
    data = save(network)
    again = load(data)
    assert again.nodes == network.nodes
    assert again.metadata == metadata
    assert again.output == network.output
    assert dict(again.shapes) == dict(network.shapes)
    assert set(again.tensors) == set(network.tensors)
    for name, tensor in network.tensors.items():
        assert again.tensors[name].dtype == tensor.dtype
        np.testing.assert_array_equal(again.tensors[name], tensor)
    assert save(again) == data


@given(networks())
def test_layer_bytes_are_those_of_the_file(builder: NetworkBuilder) -> None:
    network = builder.build()
    _, stored = contents_of(save(network))
    for layer in network.layers:
        parts = ("weight", "bias", "codebooks", "codebook_scales", "codes", "signs")
        size = sum(
            stored[f"{layer.name}.{p}"].nbytes
            for p in parts
            if f"{layer.name}.{p}" in stored
        )
        assert layer.bytes == size


@given(
    st.sampled_from([1, 2, 3, 5, 16, 100, 128, 255, 256, 257, 300, 65536]),
    st.integers(1, 5),
    st.integers(1, 3),
)
def test_codes_can_be_unpacked_with_numpy(k: int, dsub: int, groups: int) -> None:
    """The few lines of docs/format.md."""
    builder = NetworkBuilder((4 * groups, 3, 3))
    quantized = Quantized(k, dsub, parts=1)
    builder.conv(2 * groups, 2, groups=groups, name="conv", quantized=quantized)
    network = builder.build()
    entry, stored = contents_of(save(network))
    attributes = entry["graph"]["nodes"][0]["op"]
    pq = attributes["weights"]
    shape = (attributes["out_channels"], *attributes["kernel"], pq["n_subspaces"])

    bits = max(1, (pq["n_centroids"] - 1).bit_length())
    n = int(np.prod(shape))
    stream = np.unpackbits(stored["conv.codes"], bitorder="little")
    digits = stream[: n * bits].reshape(n, bits).astype(np.int64)
    codes = (digits << np.arange(bits)).sum(axis=1).reshape(shape)

    assert len(stored["conv.codes"]) == -(-n * bits // 8)
    assert not stream[n * bits :].any()
    np.testing.assert_array_equal(codes, network.tensors["conv.codes"])
    # Codebooks are stored without padding: codeword k side by side in row k.
    books = stored["conv.codebooks"].reshape(groups, k, 4)
    weight = network.decoded().tensors["conv.weight"]
    for o, c, y, x in np.ndindex(weight.shape):
        assert weight[o, c, y, x] == books[o // 2, codes[o, y, x, c // dsub], c]


@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 3))
def test_signs_can_be_unpacked_with_numpy(outputs: int, channels: int, k: int) -> None:
    builder = NetworkBuilder((channels, 3, 3))
    builder.conv(outputs, k, name="conv", quantized=Binary())
    network = builder.build()
    signs = network.tensors["conv.signs"]
    _, stored = contents_of(save(network))
    bits = np.unpackbits(stored["conv.signs"], bitorder="little")
    assert len(stored["conv.signs"]) == -(-signs.size // 8)
    assert not bits[signs.size :].any()
    unpacked = bits[: signs.size].reshape(signs.shape)
    np.testing.assert_array_equal(2 * unpacked.astype(np.int8) - 1, signs)
    weight = network.decoded().tensors["conv.weight"]
    np.testing.assert_array_equal(weight, signs)
    assert weight.dtype == np.float32


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (np.zeros(3, np.uint8), r"U8 of shape \[3\], expected U8 of shape \[2\]"),
        (np.zeros(2, np.int8), r"I8 of shape \[2\], expected U8 of shape \[2\]"),
        (np.uint8([0, 2]), "unused bits of the last byte are not zero"),
    ],
)
def test_signs_that_are_none(stored: np.ndarray, message: str) -> None:
    builder = NetworkBuilder((1, 3, 3))
    builder.conv(1, 3, name="conv", bias=False, quantized=Binary())
    entry, tensors = contents_of(save(builder.build()))
    with pytest.raises(ModelFormatError, match=message):
        load(file_of(entry, tensors | {"conv.signs": stored}))


def test_reading_example_of_the_format_description(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (Path(__file__).parents[2] / "docs" / "format.md").read_text("utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    (tmp_path / "model.qcnn").write_bytes(sample())
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    expected = load(sample()).decoded().tensors["fc1.weight"]
    np.testing.assert_array_equal(namespace["weight"], expected)


# Damage


@given(st.integers(0, len(sample()) - 1), st.integers(1, 255))
def test_flipped_bits(position: int, flip: int) -> None:
    data = bytearray(sample())
    data[position] ^= flip
    use_or_refuse(bytes(data))


@given(st.integers(0, len(sample()) - 1))
def test_truncated(length: int) -> None:
    with pytest.raises(ModelFormatError):
        load(sample()[:length])


@given(st.binary(max_size=300))
def test_noise(data: bytes) -> None:
    with pytest.raises(ModelFormatError):
        load(data)


@given(st.binary(min_size=1, max_size=20))
def test_trailing_bytes(extra: bytes) -> None:
    with pytest.raises(ModelFormatError):
        load(sample() + extra)


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value."""
    yield path
    if isinstance(value, dict):
        for key, part in value.items():
            yield from paths_in(part, (*path, key))
    elif isinstance(value, list):
        for i, part in enumerate(value):
            yield from paths_in(part, (*path, i))


ENTRY_PATHS = list(paths_in(contents_of(sample())[0]))
HEADER_PATHS = list(paths_in(header_of(sample())))

SIZES = [-1, 0, 1, 2, 7, 255, 2**16, 2**31, 2**32, 2**53, 2**63, 2**64, 10**30]
OTHERS = [0.5, 1e39, 1e308, -0.0, True, False, None, "", "conv", "input", "x" * 300]
NESTED = [[], [0], [1, 1], [2**32, 2**32], {}, {"type": "dense"}, {"type": "relu"}]
replacements = st.sampled_from([*SIZES, *OTHERS, *NESTED])


def edit(value: Any, path: tuple[Any, ...], change: str, new: Any) -> Any:
    """Return a copy with the place `path` replaced, removed or added to."""
    if not path:
        return new
    changed = copy.deepcopy(value)
    place = changed
    for key in path[:-1]:
        place = place[key]
    if change == "remove":
        del place[path[-1]]
    elif change == "add" and isinstance(place, dict):
        place["unexpected"] = new
    elif change == "add":
        place.insert(path[-1], new)
    else:
        place[path[-1]] = new
    return changed


changes = st.sampled_from(["replace", "remove", "add"])


@given(st.sampled_from(ENTRY_PATHS), changes, replacements)
def test_edited_graph(path: tuple[Any, ...], change: str, new: Any) -> None:
    entry, tensors = contents_of(sample())
    use_or_refuse(file_of(edit(entry, path, change, new), tensors))


@given(st.sampled_from(HEADER_PATHS), changes, replacements)
def test_edited_header(path: tuple[Any, ...], change: str, new: Any) -> None:
    data = sample()
    use_or_refuse(with_header(data, edit(header_of(data), path, change, new)))


@given(st.integers(0, 2**64 - 1))
def test_any_header_length(length: int) -> None:
    use_or_refuse(struct.pack("<Q", length) + sample()[8:])


def test_deeply_nested_header() -> None:
    entry, tensors = contents_of(sample())
    nested = "[" * 100_000 + "]" * 100_000
    text = json.dumps(entry).replace(
        '"class_names"', f'"deep": {nested}, "class_names"'
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.qcnn"
        save_file(tensors, path, metadata={"qcnn": text})
        with pytest.raises(ModelFormatError):
            Network.load(path)


def test_code_beyond_the_codebook() -> None:
    entry, tensors = contents_of(sample())
    # 3 bits a code: all ones are code 7 of 5 codewords.
    tensors["conv.codes"] = np.full_like(tensors["conv.codes"], 0xFF)
    with pytest.raises(ModelFormatError, match=r"conv\.codes.* 7 .*n_centroids = 5"):
        load(file_of(entry, tensors))


@pytest.mark.parametrize("name", ["fc1.codebooks", "fc2.weight", "conv.bias"])
@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
def test_non_finite_parameters(name: str, value: float) -> None:
    entry, tensors = contents_of(sample())
    tensors[name].flat[1] = value
    with pytest.raises(ModelFormatError, match=name):
        load(file_of(entry, tensors))


@pytest.mark.parametrize("name", sorted(contents_of(sample())[1]))
def test_missing_reshaped_or_retyped_tensor(name: str) -> None:
    entry, tensors = contents_of(sample())
    original = tensors[name]
    for wrong in (
        None,
        original[..., None],
        original[:-1],
        original.astype(np.float64),
        original.astype(np.int32),
    ):
        changed = {k: v for k, v in tensors.items() if k != name}
        if wrong is not None:
            changed[name] = np.ascontiguousarray(wrong)
        with pytest.raises(QcnnError, match=name):
            load(file_of(entry, changed))


@given(
    arrays(
        np.float32,
        st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 4)),
        elements=st.floats(-60000, 60000, width=32),
    ),
    st.sampled_from([32, 16, 8]),
)
def test_rounded_codebooks_are_stored_exactly(books: np.ndarray, bits: int) -> None:
    rounded = rounded_codebooks(books, bits)
    n_subspaces, n_centroids, dsub = books.shape
    builder = NetworkBuilder((n_subspaces * dsub, 1, 1))
    quantized = Quantized(n_centroids, dsub, codebook_bits=bits)
    builder.conv(2, 1, name="conv", quantized=quantized)
    network = builder.build().replace(tensors={"conv.codebooks": rounded})
    np.testing.assert_array_equal(
        load(save(network)).tensors["conv.codebooks"], rounded
    )
    # Half a unit in the last place of float16, half a step of 8 bits.
    largest = np.abs(books).max(axis=(1, 2), keepdims=True)
    allowed = {
        32: 0.0,
        16: np.maximum(np.abs(books) * 2.0**-11, 2.0**-25),
        8: largest / 127 * 0.501 + 1e-27,
    }
    assert (np.abs(rounded - books) <= allowed[bits]).all()
    np.testing.assert_array_equal(rounded_codebooks(rounded, bits), rounded)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        # Without a 127 in each subspace its scale is another one.
        ("conv.codebooks", lambda integers: integers // 2),
        ("conv.codebook_scales", lambda scales: scales * np.float32(np.inf)),
    ],
    ids=["integers", "infinite"],
)
def test_codebooks_that_would_not_be_written_like_this(name: str, change: Any) -> None:
    entry, tensors = contents_of(sample())
    tensors[name] = change(tensors[name])
    with pytest.raises(ModelFormatError, match=r"conv\.codebooks"):
        load(file_of(entry, tensors))


@pytest.mark.parametrize("bits", [0, 7, 15, 64, 300, -8, "8"])
def test_unknown_codebook_bits(bits: Any) -> None:
    entry, tensors = contents_of(sample())
    entry["graph"]["nodes"][0]["op"]["weights"]["codebook_bits"] = bits
    with pytest.raises(ModelFormatError, match=r"codebook_bits|u8|integer"):
        load(file_of(entry, tensors))


def test_unknown_version_is_named() -> None:
    entry, tensors = contents_of(sample())
    with pytest.raises(ModelFormatError, match="version is 2, expected 1"):
        load(file_of({**entry, "version": 2}, tensors))


def test_other_safetensors_file(tmp_path: Path) -> None:
    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "model.qcnn")
    with pytest.raises(ModelFormatError, match=r"not a \.qcnn file"):
        Network.load(tmp_path / "model.qcnn")
