"""Small networks with random parameters, for tests."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy_executor import OPERATIONS

import qcnn_py
from qcnn_py import Node
from qcnn_py.network import rounded_codebooks

Size = int | tuple[int, int]


@dataclass(frozen=True)
class Quantized:
    """How a layer's random weights are product-quantised."""

    n_centroids: int
    subvector_dim: int
    # Sets of codebooks per group of a convolution, if they can be equal; 0 is one for
    # all groups.
    parts: int = 0
    codebook_bits: int = 32


@dataclass(frozen=True)
class Binary:
    """A layer's random weights are 1 and -1."""


def pair(size: Size) -> list[int]:
    """``[height, width]`` of one number or two."""
    return [size, size] if isinstance(size, int) else list(size)


class NetworkBuilder:
    """Builds a network node by node; a node takes the one before it by default.

    Every method that adds a node returns its name. Weights, unless binary, are scaled
    so that responses stay near one.
    """

    def __init__(self, input_shape: Sequence[int], seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.input_shape = tuple(input_shape)
        self.nodes: list[Node] = []
        self.tensors: dict[str, np.ndarray] = {}
        self.last = "input"
        # Shapes come from running the oracle on a batch of no images.
        self._values = {"input": np.zeros((0, *self.input_shape))}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a value for one image."""
        return self._values[name].shape[1:]

    def images(self, n: int) -> np.ndarray:
        """Random float32 input."""
        return self.normal(n, *self.input_shape)

    def normal(self, *shape: int, scale: float = 1.0) -> np.ndarray:
        """Normally distributed float32 numbers."""
        return (scale * self.rng.standard_normal(shape)).astype(np.float32)

    def signs(self, *shape: int) -> np.ndarray:
        """Draw 1 and -1, as int8."""
        return self.rng.choice(np.int8([-1, 1]), shape)

    def add(
        self,
        op: str,
        *inputs: str,
        name: str | None = None,
        tensors: dict[str, np.ndarray] | None = None,
        **attributes: Any,
    ) -> str:
        """Append a node with the given attributes."""
        name = name or f"{op}{len(self.nodes)}"
        inputs = inputs or (self.last,)
        self.nodes.append(Node(name, op, inputs, attributes))
        tensors = tensors or {}
        self.tensors |= {f"{name}.{key}": tensor for key, tensor in tensors.items()}
        operands = [self._values[i] for i in inputs]
        self._values[name] = OPERATIONS[op](operands, attributes, tensors)
        self.last = name
        return name

    def conv(
        self,
        out_channels: int,
        kernel: Size = 3,
        *inputs: str,
        stride: Size = 1,
        padding: int | Sequence[int] = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        quantized: Quantized | Binary | None = None,
        name: str | None = None,
    ) -> str:
        """Append a convolution; ``padding`` is one number or [t, l, b, r]."""
        channels = self.shape((inputs or (self.last,))[0])[0] // groups
        taps = pair(kernel)
        weights, tensors = self._weights(
            out_channels, channels, taps, groups, bias, quantized
        )
        return self.add(
            "conv",
            *inputs,
            name=name,
            tensors=tensors,
            out_channels=out_channels,
            kernel=taps,
            stride=pair(stride),
            padding=[padding] * 4 if isinstance(padding, int) else list(padding),
            dilation=pair(dilation),
            groups=groups,
            bias=bias,
            weights=weights,
        )

    def fc(
        self,
        out_features: int,
        *inputs: str,
        bias: bool = True,
        quantized: Quantized | Binary | None = None,
        name: str | None = None,
    ) -> str:
        """Append a fully connected layer, after a flatten node where needed."""
        source = (inputs or (self.last,))[0]
        if len(self.shape(source)) == 3:
            source = self.add("flatten", source)
        weights, tensors = self._weights(
            out_features, self.shape(source)[0], [], 1, bias, quantized
        )
        return self.add(
            "fc",
            source,
            name=name,
            tensors=tensors,
            out_features=out_features,
            bias=bias,
            weights=weights,
        )

    def pool(
        self,
        op: str,
        kernel: Size,
        *inputs: str,
        stride: Size = 1,
        padding: int | Sequence[int] = 0,
        ceil_mode: bool = False,
        **attributes: Any,
    ) -> str:
        """Append ``max_pool`` or ``average_pool``."""
        return self.add(
            op,
            *inputs,
            kernel=pair(kernel),
            stride=pair(stride),
            padding=[padding] * 4 if isinstance(padding, int) else list(padding),
            ceil_mode=ceil_mode,
            **attributes,
        )

    def batch_norm(self, *inputs: str, epsilon: float = 1e-5) -> str:
        """Append a batch normalisation."""
        channels = self.shape((inputs or (self.last,))[0])[0]
        tensors = {name: self.normal(channels) for name in ("scale", "bias", "mean")}
        tensors["variance"] = self.rng.uniform(0.5, 2, channels).astype(np.float32)
        return self.add("batch_norm", *inputs, tensors=tensors, epsilon=epsilon)

    def build(self, output: str | None = None, **options: Any) -> qcnn_py.Network:
        """Return the network, which the engine checks."""
        return qcnn_py.Network(
            self.nodes, self.tensors, self.input_shape, output=output, **options
        )

    def _weights(
        self,
        outputs: int,
        channels: int,
        taps: list[int],
        groups: int,
        bias: bool,
        quantized: Quantized | Binary | None,
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        scale = 1 / math.sqrt(channels * math.prod(taps))
        tensors = {"bias": self.normal(outputs, scale=0.1)} if bias else {}
        if quantized is None:
            tensors["weight"] = self.normal(outputs, channels, *taps, scale=scale)
            return {"type": "dense"}, tensors
        if isinstance(quantized, Binary):
            tensors["signs"] = self.signs(outputs, channels, *taps)
            return {"type": "binary"}, tensors
        k, dsub = quantized.n_centroids, quantized.subvector_dim
        m = -(-channels // dsub)
        parts = quantized.parts
        if parts and (not taps or outputs // groups % parts):
            parts = 1
        sets = groups * parts or 1
        codebooks = self.normal(sets, m, k, dsub, scale=scale)
        codebooks[:, -1, :, channels - (m - 1) * dsub :] = 0
        codebooks = rounded_codebooks(codebooks, quantized.codebook_bits)
        codes = self.rng.integers(k, size=(outputs, *taps, m))
        tensors["codebooks"] = codebooks if sets > 1 else codebooks[0]
        tensors["codes"] = codes.astype(np.uint8 if k <= 256 else np.uint16)
        weights = {
            "type": "product_quantized",
            "n_subspaces": m,
            "n_centroids": k,
            "subvector_dim": dsub,
            "codebook_groups": sets,
            "codebook_bits": quantized.codebook_bits,
        }
        return weights, tensors


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Larger of the relative L2 error and the relative maximal error.

    Infinite where shapes, NaN or infinities differ; 0 for two empty arrays.
    """
    actual = np.asarray(actual, dtype=np.float64)
    expected = np.asarray(expected, dtype=np.float64)
    if actual.shape != expected.shape:
        return math.inf
    finite = np.isfinite(expected)
    if not np.array_equal(actual[~finite], expected[~finite], equal_nan=True):
        return math.inf
    actual, expected = actual[finite], expected[finite]
    if not np.isfinite(actual).all():
        return math.inf
    difference = actual - expected
    worst = 0.0
    for order in (2, np.inf):
        if error := np.linalg.norm(difference, order) if difference.size else 0.0:
            norm = np.linalg.norm(expected, order)
            worst = max(worst, error / norm if norm else math.inf)
    return float(worst)
