"""The two kinds of file that the original implementation keeps arrays in.

A ``.bin`` file is an int32 count of dimensions, the dimensions as int32 and the
raw values, last dimension fastest, all little-endian; the type of the values is
known from the file's name only. A ``.cbn`` file holds codes: after the
dimensions one int32 with the bits ``b`` of a code, then blocks of 4096 bytes,
each with ``floor(32768 / b)`` codes, most significant bit first. Codes count from
0 in ``.cbn`` files, and from 1 as the bytes of a ``.bin`` file.

Every size is checked against the file's before anything is allocated.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from qcnn_py.errors import ModelFormatError

__all__ = [
    "malformed",
    "map_bin",
    "read_byte_codes",
    "read_floats",
    "read_packed_codes",
    "write_bin",
    "write_packed_codes",
]

FloatArray = npt.NDArray[np.float32]
CodeArray = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]

# The original's matrices have no more.
_MAX_DIMENSIONS = 4
_BLOCK_BYTES = 4096
_BLOCK_BITS = 8 * _BLOCK_BYTES
# The original keeps codes in bytes; the format itself goes on.
_MAX_BITS = 16
# Blocks that are unpacked to one byte per bit at a time: 2 MiB.
_BLOCKS_AT_ONCE = 64


def malformed(path: Path, field: str, got: object, expected: object) -> Exception:
    """Return the error that a file of another content than expected is."""
    return ModelFormatError(f"{path}: {field}: got {got}, expected {expected}")


def map_bin(
    path: Path, dtype: npt.DTypeLike, expected: Sequence[int | None] | None = None
) -> npt.NDArray[Any]:
    """Map a ``.bin`` file into memory.

    Parameters
    ----------
    path : Path
        The file.
    dtype : dtype
        Type of its values, little-endian.
    expected : sequence of int or None, optional
        The shape it has to have; ``None`` in it stands for any extent. Any shape
        by default.

    Returns
    -------
    ndarray
        Read-only view of the file.

    Raises
    ------
    ModelFormatError
        If the file is truncated, too long or of another shape.
    OSError
        If it is missing or cannot be read.
    """
    with path.open("rb") as file:
        shape = _read_shape(file, path, expected)
        _check_rest(file, path, np.dtype(dtype).itemsize * prod(shape))
        return np.memmap(file, dtype, "r", file.tell(), shape)


def read_floats(path: Path, expected: Sequence[int | None]) -> FloatArray:
    """Read a ``.bin`` file of finite float32; see `map_bin`."""
    array: FloatArray = np.array(map_bin(path, "<f4", expected), np.float32)
    if not np.isfinite(array).all():
        raise malformed(path, "a value", "NaN or infinite", "finite numbers")
    return array


def read_byte_codes(
    path: Path, shape: tuple[int, ...], n_centroids: int
) -> npt.NDArray[np.uint8]:
    """Read a ``.bin`` file of codes, bytes that count from 1.

    Parameters
    ----------
    path : Path
        The file.
    shape : tuple of int
        The shape it has to have.
    n_centroids : int
        The codewords there are.

    Returns
    -------
    ndarray of uint8
        Codes from 0.

    Raises
    ------
    ModelFormatError
        If the file is truncated, too long, of another shape or a code is beyond
        the codewords.
    OSError
        If it is missing or cannot be read.
    """
    if n_centroids > 256:
        raise malformed(
            path, "codes", "bytes", f"a .cbn file for {n_centroids} codewords"
        )
    # The 256th codeword's 256 is 0 in a byte, and becomes 255 again here.
    codes: npt.NDArray[np.uint8] = map_bin(path, np.uint8, shape) - np.uint8(1)
    if int(codes.max()) >= n_centroids:
        got = int(codes[codes >= n_centroids][0]) + 1 & 0xFF
        raise malformed(path, "a code", got, f"1 to {n_centroids}")
    return np.array(codes)


def read_packed_codes(
    path: Path, shape: tuple[int, ...], n_centroids: int
) -> CodeArray:
    """Read a ``.cbn`` file.

    Parameters
    ----------
    path : Path
        The file.
    shape : tuple of int
        The shape it has to have.
    n_centroids : int
        The codewords there are.

    Returns
    -------
    ndarray of uint8 or, for more than 256 codewords, uint16
        Codes from 0.

    Raises
    ------
    ModelFormatError
        If the file is truncated, too long, of another shape or a code is beyond
        the codewords.
    OSError
        If it is missing or cannot be read.
    """
    n_codes = prod(shape)
    with path.open("rb") as file:
        _read_shape(file, path, shape)
        (bits,) = _read_integers(file, path, "bits of a code", 1)
        if not 1 <= bits <= _MAX_BITS:
            raise malformed(path, "bits of a code", bits, f"1 to {_MAX_BITS}")
        per_block = _BLOCK_BITS // bits
        n_blocks = -(-n_codes // per_block)
        _check_rest(file, path, n_blocks * _BLOCK_BYTES)
        codes: CodeArray = (
            np.empty(n_codes, np.uint8)
            if n_centroids <= 256
            else np.empty(n_codes, np.uint16)
        )
        for start in range(0, n_codes, _BLOCKS_AT_ONCE * per_block):
            part = _unpack(file.read(_BLOCKS_AT_ONCE * _BLOCK_BYTES), bits)
            part = part[: n_codes - start]
            largest = int(part.max())
            if largest >= n_centroids:
                raise malformed(
                    path,
                    "the largest code",
                    largest,
                    f"less than the {n_centroids} codewords",
                )
            codes[start : start + len(part)] = part
    shaped: CodeArray = codes.reshape(shape)
    return shaped


def write_bin(file: BinaryIO, array: npt.NDArray[Any]) -> None:
    """Write an array as a ``.bin`` file, little-endian."""
    file.write(_integers(array.ndim, *array.shape))
    file.write(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())


def write_packed_codes(file: BinaryIO, codes: CodeArray) -> None:
    """Write codes as a ``.cbn`` file, as many bits each as the largest one needs."""
    bits = max(1, int(codes.max()).bit_length())
    file.write(_integers(codes.ndim, *codes.shape, bits))
    flat = codes.reshape(-1)
    at_once = _BLOCKS_AT_ONCE * (_BLOCK_BITS // bits)
    for start in range(0, flat.size, at_once):
        file.write(_pack(flat[start : start + at_once], bits))


def _unpack(data: bytes, bits: int) -> npt.NDArray[np.uint16]:
    """Return the codes in some blocks."""
    per_block = _BLOCK_BITS // bits
    blocks = np.frombuffer(data, np.uint8).reshape(-1, _BLOCK_BYTES)
    stream = np.unpackbits(blocks, axis=1)[:, : per_block * bits].reshape(-1, bits)
    codes = np.zeros(len(stream), np.uint16)
    for bit in range(bits):
        codes <<= 1
        codes |= stream[:, bit]
    return codes


def _pack(codes: CodeArray, bits: int) -> bytes:
    """Return the blocks that hold some codes, unused bits 0."""
    per_block = _BLOCK_BITS // bits
    n_blocks = -(-codes.size // per_block)
    padded = np.zeros((n_blocks, per_block), np.uint16)
    padded.reshape(-1)[: codes.size] = codes
    stream = np.zeros((n_blocks, _BLOCK_BITS), np.uint8)
    for bit in range(bits):
        digits = padded >> np.uint16(bits - 1 - bit) & 1
        stream[:, bit : per_block * bits : bits] = digits
    return np.packbits(stream, axis=1).tobytes()


def _read_shape(
    file: BinaryIO, path: Path, expected: Sequence[int | None] | None
) -> tuple[int, ...]:
    """Read the header's dimensions and compare them; ``None`` fits any from 1."""
    (rank,) = _read_integers(file, path, "number of dimensions", 1)
    if expected is None:
        if not 1 <= rank <= _MAX_DIMENSIONS:
            wanted = f"1 to {_MAX_DIMENSIONS}"
            raise malformed(path, "number of dimensions", rank, wanted)
        expected = [None] * rank
    if rank != len(expected):
        raise malformed(path, "number of dimensions", rank, len(expected))
    shape = _read_integers(file, path, "dimensions", rank)
    if any(
        got < 1 or got != (got if want is None else want)
        for got, want in zip(shape, expected, strict=True)
    ):
        wanted = ", ".join("any" if n is None else str(n) for n in expected)
        raise malformed(path, "dimensions", shape, f"({wanted})")
    return shape


def _read_integers(
    file: BinaryIO, path: Path, field: str, count: int
) -> tuple[int, ...]:
    data = file.read(4 * count)
    if len(data) != 4 * count:
        raise malformed(path, field, "cut off", f"{4 * count} bytes")
    return struct.unpack(f"<{count}i", data)


def _integers(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}i", *values)


def _check_rest(file: BinaryIO, path: Path, size: int) -> None:
    """See that `size` bytes follow, and nothing else."""
    rest = os.fstat(file.fileno()).st_size - file.tell()
    if rest != size:
        raise malformed(path, "data after the header", f"{rest} bytes", f"{size}")
