"""A tiny network's parameter files, as the original implementation writes them."""

import struct
from pathlib import Path

import numpy as np

from qcnn_py import Node
from qcnn_py.published_networks import PublishedNetwork

PREFIX = "tiny"
BITS = 3
K = 5
# By the number of the layer.
CODES_SHAPES = {1: (6, 3, 3, 2), 4: (7, 18)}


def write_bin(path: Path, array: np.ndarray, dtype: str = "<f4") -> None:
    header = struct.pack(f"<{array.ndim + 1}i", array.ndim, *array.shape)
    path.write_bytes(header + array.astype(dtype).tobytes())


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


def tiny_network() -> PublishedNetwork:
    """Return a network of one convolution and one fully connected layer."""
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
        Node("drop2", "dropout", ("fc2",), {"rate": 0.5}),
    )
    shapes = {"conv1": (6, 3, 3, 3), "fc2": (7, 54)}
    return PublishedNetwork((6, 7, 7), nodes, shapes)


def write_quantized(folder: Path) -> None:
    """Write quantised parameters of the tiny network."""
    rng = np.random.default_rng(0)
    for number, shape in CODES_SHAPES.items():
        write_bin(folder / f"tiny.biasVec.{number:02}.bin", rng.normal(size=shape[0]))
        # Two channels or three by sub-vectors: the convolution's last has one pad.
        dsub = 2 if number == 1 else 3
        codebooks = rng.normal(size=(shape[-1], K, dsub))
        write_bin(folder / f"tiny.ctrdLst.{number:02}.bin", codebooks)
        codes = rng.integers(K, size=shape)
        write_cbn(folder / f"tiny.asmtLst.{number:02}.cbn", codes, BITS)


def write_dense(folder: Path) -> None:
    """Write dense parameters of the tiny network."""
    rng = np.random.default_rng(1)
    for name, shape in (("convKnl.01", (6, 3, 3, 3)), ("fcntWei.04", (7, 54))):
        write_bin(folder / f"tiny.biasVec.{name[-2:]}.bin", rng.normal(size=shape[0]))
        write_bin(folder / f"tiny.{name}.bin", rng.normal(size=shape))
