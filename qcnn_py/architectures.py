"""Networks with drawn parameters: one to train, one to time."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import prod, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from qcnn_py.activation_quantization import quantizer_of
from qcnn_py.config import ActivationsConfig, LayerSettings
from qcnn_py.errors import ConfigError
from qcnn_py.network import Network, Node, rounded_codebooks
from qcnn_py.published_networks import published_network

__all__ = ["conv_fc", "drawn_network"]

_DENSE = {"type": "dense"}

NOT_QUANTIZED = ActivationsConfig()
"""Activations in float32."""

# Added to a variance before its root is taken.
_NORM_EPSILON = 1e-4


def conv_fc(
    input_shape: tuple[int, int, int],
    conv_channels: Sequence[int],
    fc_features: Sequence[int],
    n_classes: int,
    *,
    kernel_size: int = 3,
    pool_after: Collection[int] | None = None,
    dropout: float = 0.5,
    batch_norm: bool = False,
    activations: ActivationsConfig = NOT_QUANTIZED,
    seed: int = 0,
    metadata: Mapping[str, Any] | None = None,
) -> Network:
    """Build a chain of convolutions and fully connected layers, ready to be trained.

    Every convolution keeps height and width and is followed by ReLU; every hidden
    fully connected layer is followed by ReLU and dropout. Nodes are called
    ``conv1``, ``conv1_relu``, ``pool1``, … ``flatten``, ``fc1``, ``fc1_relu``,
    ``fc1_dropout``, … ``prob``.

    With `batch_norm` layers have no bias, and every layer, or its pooling, is followed
    by ``…_norm`` (as in BinaryNet: the largest of normalised values is not the largest
    of the sums, whose scale may be negative). With `activations` a ReLU is followed by
    ``…_quantized`` or replaced by ``…_sign``.

    Parameters
    ----------
    input_shape : tuple of int
        Shape (C, H, W) of an image.
    conv_channels : sequence of int
        Output channels of each convolution.
    fc_features : sequence of int
        Features of each hidden fully connected layer.
    n_classes : int
        Features of the last fully connected layer.
    kernel_size : int
        Height and width of the kernels; odd.
    pool_after : collection of int, optional
        Numbers, from 1, of the convolutions followed by 2 x 2 max pooling; every one
        by default.
    dropout : float
        Dropout rate; no node with 0.
    batch_norm : bool
        Whether batches are normalised.
    activations : ActivationsConfig
        How the inputs of all layers but the first are quantised.
    seed : int
        Seed of the parameters: weights normal with variance 2 / fan-in (He et al.,
        "Delving Deep into Rectifiers", 2015), biases zero.
    metadata : mapping, optional
        The network's metadata.

    Raises
    ------
    ConfigError
        If the kernel size is even, `pool_after` names no convolution, pooling
        leaves nothing of the image, or `activations` name a layer that is not there.
    """
    if kernel_size % 2 == 0:
        raise ConfigError(f"kernel_size is {kernel_size}, expected an odd number")
    numbers = range(1, len(conv_channels) + 1)
    pooled = set(numbers if pool_after is None else pool_after)
    if not pooled <= set(numbers):
        raise ConfigError(
            f"pool_after is {sorted(pooled)}, expected numbers of convolutions, 1 to "
            f"{len(conv_channels)}"
        )
    n_channels, height, width = input_shape
    if min(height, width) >> len(pooled) == 0:
        raise ConfigError(
            f"{len(pooled)} poolings halve an image of {height} x {width} to nothing, "
            "expected fewer"
        )
    rng = np.random.default_rng(seed)
    nodes: list[Node] = []
    tensors: dict[str, npt.NDArray[np.float32]] = {}

    def append(name: str, op: str, **attributes: Any) -> None:
        previous = nodes[-1].name if nodes else "input"
        nodes.append(Node(name, op, (previous,), attributes))

    def draw(name: str, *shape: int) -> None:
        tensors[f"{name}.weight"] = _he_normal(shape, prod(shape[1:]), rng)
        if not batch_norm:
            tensors[f"{name}.bias"] = np.zeros(shape[0], np.float32)

    def append_norm(name: str, n_features: int) -> None:
        append(f"{name}_norm", "batch_norm", epsilon=_NORM_EPSILON)
        for part, value in (("scale", 1), ("bias", 0), ("mean", 0), ("variance", 1)):
            tensors[f"{name}_norm.{part}"] = np.full(n_features, value, np.float32)

    layers = [f"conv{number}" for number in numbers]
    layers += [f"fc{i + 1}" for i in range(len(fc_features) + 1)]
    quantized = activations.quantized(layers, layers[:1])

    def append_activation(name: str) -> None:
        following = layers[layers.index(name) + 1]
        if following not in quantized:
            append(f"{name}_relu", "relu")
        elif activations.scheme == "sign":
            append(f"{name}_sign", "sign")
        else:
            append(f"{name}_relu", "relu")
            op, attributes = quantizer_of(activations)
            append(f"{name}_quantized", op, **attributes)

    for number, out_channels in zip(numbers, conv_channels, strict=True):
        name = f"conv{number}"
        append(
            name,
            "conv",
            out_channels=out_channels,
            kernel=[kernel_size] * 2,
            stride=[1, 1],
            padding=[kernel_size // 2] * 4,
            dilation=[1, 1],
            groups=1,
            bias=not batch_norm,
            weights=_DENSE,
        )
        draw(name, out_channels, n_channels, kernel_size, kernel_size)
        if not batch_norm:
            append_activation(name)
        n_channels = out_channels
        if number in pooled:
            append(
                f"pool{number}",
                "max_pool",
                kernel=[2, 2],
                stride=[2, 2],
                padding=[0] * 4,
                ceil_mode=False,
            )
            height, width = height // 2, width // 2
        if batch_norm:
            append_norm(name, out_channels)
            append_activation(name)
    append("flatten", "flatten")
    n_features = n_channels * height * width
    for number, out_features in enumerate((*fc_features, n_classes), start=1):
        name = f"fc{number}"
        append(
            name,
            "fc",
            out_features=out_features,
            bias=not batch_norm,
            weights=_DENSE,
        )
        draw(name, out_features, n_features)
        n_features = out_features
        if batch_norm:
            append_norm(name, out_features)
        if number <= len(fc_features):
            append_activation(name)
            if dropout:
                append(f"{name}_dropout", "dropout", rate=dropout)
    append("prob", "softmax")
    return Network(nodes, tensors, input_shape, metadata=metadata)


def drawn_network(
    architecture: str, settings: Mapping[str, LayerSettings], seed: int = 0
) -> Network:
    """Build a published network, product-quantised, with drawn codebooks and codes.

    What it computes means nothing; how long it takes depends on the geometry only.
    Codewords are normal with the variance of He initialisation, so that responses
    keep an ordinary range, and codes uniform. The metadata say that all of it is
    drawn.

    Parameters
    ----------
    architecture : str
        A key of ``qcnn_py.published_networks.PUBLISHED_NETWORKS``.
    settings : mapping of str to LayerSettings
        Settings of each of its conv and fc layers; a layer with ``dense`` gets dense
        weights.
    seed : int
        Seed of the parameters.

    Raises
    ------
    ConfigError
        If there is no such architecture or a layer has no settings.
    """
    published = published_network(architecture)
    rng = np.random.default_rng(seed)
    nodes: list[Node] = []
    tensors: dict[str, npt.NDArray[Any]] = {}
    for node in published.nodes:
        if node.name not in published.weight_shapes:
            nodes.append(node)
            continue
        if node.name not in settings:
            raise ConfigError(
                f"got settings of layers {', '.join(settings)}, expected {node.name} "
                "among them"
            )
        shape = published.weight_shapes[node.name]
        weights, arrays = _draw_weights(
            shape, node.attributes.get("groups", 1), settings[node.name], rng
        )
        nodes.append(node.with_attributes(weights=weights))
        tensors |= {f"{node.name}.{suffix}": array for suffix, array in arrays.items()}
        tensors[f"{node.name}.bias"] = np.zeros(shape[0], np.float32)
    origin = {"architecture": architecture, "parameters": "drawn", "seed": seed}
    return Network(nodes, tensors, published.input_shape, metadata={"origin": origin})


def _draw_weights(
    shape: tuple[int, ...],
    groups: int,
    settings: LayerSettings,
    rng: np.random.Generator,
) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """Draw one layer; return its ``weights`` attribute and tensors."""
    out_channels, channels, *kernel = shape
    fan_in = prod(shape[1:])
    if settings.dense:
        return _DENSE, {"weight": _he_normal(shape, fan_in, rng)}
    n_centroids, dsub = settings.n_centroids, settings.subvector_dim
    n_subspaces = -(-channels // dsub)
    n_sets = settings.codebook_sets(groups)
    codebooks = _he_normal((n_sets, n_subspaces, n_centroids, dsub), fan_in, rng)
    # Coordinates behind the last channel are padding.
    padding = n_subspaces * dsub - channels
    codebooks[:, -1, :, dsub - padding :] = 0
    codebooks = rounded_codebooks(codebooks, settings.codebook_bits)
    codes = rng.integers(
        n_centroids,
        size=(out_channels, *kernel, n_subspaces),
        dtype=np.uint8 if n_centroids <= 256 else np.uint16,
    )
    weights = {
        "type": "product_quantized",
        "n_subspaces": n_subspaces,
        "n_centroids": n_centroids,
        "subvector_dim": dsub,
        "codebook_groups": n_sets,
        "codebook_bits": settings.codebook_bits,
    }
    return weights, {
        "codebooks": codebooks if n_sets > 1 else codebooks[0],
        "codes": codes,
    }


def _he_normal(
    shape: Sequence[int], fan_in: int, rng: np.random.Generator
) -> npt.NDArray[np.float32]:
    values = rng.standard_normal(shape, np.float32)
    values *= np.float32(sqrt(2 / fan_in))
    return values
