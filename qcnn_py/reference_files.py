"""Parameter files of the original Quantized-CNN implementation.

The authors of "Quantized Convolutional Neural Networks for Mobile Devices"
(CVPR 2016, https://github.com/jiaxiang-wu/quantized-cnn) keep each parameter in
a file of its own, ``<prefix>.<kind>.<nn>.<bin|cbn>``, where ``nn`` counts all
layers of the network from 1 in two digits, activations and pooling included:

``biasVec``
    bias, float32 (C_out,).
``convKnl``, ``fcntWei``
    dense weights, float32 (C_out, C_in / groups, kh, kw) and (C_out, C_in).
``ctrdLst``
    codebooks, float32 (M, K, dsub), shared by the groups of a convolution.
``asmtLst``
    codes, (C_out, kh, kw, M) and (C_out, M), packed.

A ``.bin`` file is an int32 count of dimensions, the dimensions as int32 and the
raw data, all little-endian. A ``.cbn`` file has, after the dimensions, one int32
with the bits ``b`` of a code, then blocks of 4096 bytes, each holding
``floor(32768 / b)`` codes, most significant bit first.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from qcnn_py.errors import ModelFormatError
from qcnn_py.network import FloatArray, Network, Node
from qcnn_py.published_networks import published_network

__all__ = ["read_reference"]

_BLOCK_BYTES = 4096
# The original keeps codes in bytes.
_MAX_BITS = 8


def read_reference(
    directory: str | PathLike[str], prefix: str, architecture: str
) -> Network:
    """Read a network from the original implementation's parameter files.

    Parameters
    ----------
    directory : path
        Folder of the files.
    prefix : str
        What the files' names begin with, for example ``"bvlc_alexnet_aCaF"``.
    architecture : {"AlexNet", "CaffeNet", "VggCnnS", "VGG16", "CaffeNetFGB", \
"CaffeNetFGD"}
        The network they belong to.

    Returns
    -------
    Network
        Nodes named conv1, norm1, pool1 … fc6, fc7, fc8, prob. A layer with
        codebooks among its files is product-quantised, every other one dense.

    Raises
    ------
    ConfigError
        If the architecture is unknown.
    ModelFormatError
        If a file is truncated or malformed or does not fit the layer.
    OSError
        If a file is missing or cannot be read.
    """
    published = published_network(architecture)
    nodes: list[Node] = []
    tensors: dict[str, npt.NDArray[Any]] = {}
    number = 0
    for node in published.nodes:
        # Flattening is no layer in the original.
        number += node.op != "flatten"
        if node.name in published.weight_shapes:
            shape = published.weight_shapes[node.name]
            files = _LayerFiles(Path(directory), prefix, number)
            weights, parameters = _read_layer(files, node.op, shape)
            node = node.with_attributes(weights=weights)
            tensors |= {f"{node.name}.{key}": part for key, part in parameters.items()}
        nodes.append(node)
    origin = {"format": "quantized-cnn", "architecture": architecture, "prefix": prefix}
    return Network(nodes, tensors, published.input_shape, metadata={"origin": origin})


@dataclass(frozen=True)
class _LayerFiles:
    """Paths of one layer's files."""

    directory: Path
    prefix: str
    number: int

    def path(self, kind: str, extension: str = "bin") -> Path:
        return self.directory / f"{self.prefix}.{kind}.{self.number:02}.{extension}"


def _read_layer(
    files: _LayerFiles, op: str, weight_shape: tuple[int, ...]
) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """Attribute ``weights`` of a layer, and its tensors."""
    outputs, channels, *taps = weight_shape
    bias = _read_floats(files.path("biasVec"), (outputs,))
    dense_file = files.path("convKnl" if op == "conv" else "fcntWei")
    codebooks_file = files.path("ctrdLst")
    if not codebooks_file.exists():
        if not dense_file.exists():
            raise FileNotFoundError(
                f"neither {codebooks_file} nor {dense_file} exists, expected one"
            )
        weight = _read_floats(dense_file, weight_shape)
        return {"type": "dense"}, {"weight": weight, "bias": bias}

    codebooks = _read_floats(codebooks_file, (None, None, None))
    n_subspaces, n_centroids, dsub = codebooks.shape
    if n_subspaces != -(-channels // dsub):
        raise _malformed(
            codebooks_file,
            "the number of subspaces",
            n_subspaces,
            f"{-(-channels // dsub)} ({channels} channels by {dsub})",
        )
    # The padding of the last sub-vector meets no input; its content is arbitrary.
    codebooks[-1, :, channels - (n_subspaces - 1) * dsub :] = 0
    codes = _read_codes(
        files.path("asmtLst", "cbn"), (outputs, *taps, n_subspaces), n_centroids
    )
    weights = {
        "type": "product_quantized",
        "n_subspaces": n_subspaces,
        "n_centroids": n_centroids,
        "subvector_dim": dsub,
        "codebook_groups": 1,
    }
    return weights, {"codebooks": codebooks, "codes": codes, "bias": bias}


def _read_floats(path: Path, expected: Sequence[int | None]) -> FloatArray:
    """Read a ``.bin`` file of float32; ``None`` stands for any extent."""
    with path.open("rb") as file:
        shape = _read_shape(file, path, expected)
        data = _read_rest(file, path, 4 * prod(shape))
    array: FloatArray = np.frombuffer(data, "<f4").astype(np.float32).reshape(shape)
    if not np.isfinite(array).all():
        raise _malformed(path, "a value", "NaN or infinite", "finite numbers")
    return array


def _read_codes(
    path: Path, shape: tuple[int, ...], n_centroids: int
) -> npt.NDArray[np.uint8]:
    """Read a ``.cbn`` file, codes from 0."""
    with path.open("rb") as file:
        _read_shape(file, path, shape)
        (bits,) = _read_integers(file, path, "bits of a code", 1)
        if not 1 <= bits <= _MAX_BITS:
            raise _malformed(path, "bits of a code", bits, f"1 to {_MAX_BITS}")
        n_codes = prod(shape)
        per_block = 8 * _BLOCK_BYTES // bits
        n_blocks = -(-n_codes // per_block)
        data = _read_rest(file, path, n_blocks * _BLOCK_BYTES)
    blocks = np.frombuffer(data, np.uint8).reshape(n_blocks, _BLOCK_BYTES)
    stream = np.unpackbits(blocks, axis=1)[:, : per_block * bits]
    digits = stream.reshape(-1, bits)[:n_codes]
    codes = np.zeros(n_codes, np.uint8)
    for bit in range(bits):
        codes <<= 1
        codes |= digits[:, bit]
    largest = int(codes.max())
    if largest >= n_centroids:
        raise _malformed(
            path, "the largest code", largest, f"less than the {n_centroids} codewords"
        )
    return codes.reshape(shape)


def _read_shape(
    file: BinaryIO, path: Path, expected: Sequence[int | None]
) -> tuple[int, ...]:
    """Read the header's dimensions and compare them; ``None`` fits any from 1."""
    (rank,) = _read_integers(file, path, "number of dimensions", 1)
    if rank != len(expected):
        raise _malformed(path, "number of dimensions", rank, len(expected))
    shape = _read_integers(file, path, "dimensions", rank)
    if any(
        got < 1 or got != (got if want is None else want)
        for got, want in zip(shape, expected, strict=True)
    ):
        wanted = ", ".join("any" if n is None else str(n) for n in expected)
        raise _malformed(path, "dimensions", shape, f"({wanted})")
    return shape


def _read_integers(
    file: BinaryIO, path: Path, field: str, count: int
) -> tuple[int, ...]:
    data = file.read(4 * count)
    if len(data) != 4 * count:
        raise _malformed(path, field, "cut off", f"{4 * count} bytes")
    return struct.unpack(f"<{count}i", data)


def _read_rest(file: BinaryIO, path: Path, size: int) -> bytes:
    """Read the `size` bytes that have to follow, and know before that they do."""
    rest = os.fstat(file.fileno()).st_size - file.tell()
    if rest != size:
        raise _malformed(path, "data after the header", f"{rest} bytes", f"{size}")
    return file.read(size)


def _malformed(path: Path, field: str, got: object, expected: object) -> Exception:
    return ModelFormatError(f"{path}: {field}: got {got}, expected {expected}")
