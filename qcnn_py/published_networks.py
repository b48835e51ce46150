"""Geometry of the networks that the Quantized-CNN paper compresses.

As the authors' implementation builds them
(https://github.com/jiaxiang-wu/quantized-cnn): plain chains in Caffe's names,
pooling with rounded-up sizes, no padding in pooling.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain
from typing import Any

from qcnn_py.errors import ConfigError
from qcnn_py.network import Node

__all__ = ["PUBLISHED_NETWORKS", "PublishedNetwork", "published_network"]


@dataclass(frozen=True)
class PublishedNetwork:
    """A network without parameters.

    Attributes
    ----------
    input_shape : tuple of int
        Shape of one image, (C, H, W).
    nodes : tuple of Node
        The layers, every one with dense weights, each fed by the one before.
    weight_shapes : mapping of str to tuple of int
        Shape of the dense weights of each convolution, (C_out, C_in / groups, kh,
        kw), and fully connected layer, (C_out, C_in), in order.
    """

    input_shape: tuple[int, int, int]
    nodes: tuple[Node, ...]
    weight_shapes: Mapping[str, tuple[int, ...]]


def published_network(name: str) -> PublishedNetwork:
    """Return the network called `name`, a key of ``PUBLISHED_NETWORKS``.

    Raises
    ------
    ConfigError
        If there is none of that name.
    """
    try:
        return PUBLISHED_NETWORKS[name]
    except KeyError:
        close = get_close_matches(name, PUBLISHED_NETWORKS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(
            f"architecture is {name!r}, "
            f"expected one of {', '.join(PUBLISHED_NETWORKS)}{hint}"
        ) from None


# Name, operation and attributes of a node.
_Spec = tuple[str, str, dict[str, Any]]


def _conv(
    label: str,
    out_channels: int,
    kernel: int,
    *,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
) -> list[_Spec]:
    attributes = {
        "out_channels": out_channels,
        "kernel": [kernel, kernel],
        "stride": [stride, stride],
        "padding": [padding] * 4,
        "dilation": [1, 1],
        "groups": groups,
        "bias": True,
        "weights": {"type": "dense"},
    }
    return [(f"conv{label}", "conv", attributes), (f"relu{label}", "relu", {})]


def _norm(label: str, *, alpha: float = 1e-4, bias: float = 1.0) -> list[_Spec]:
    attributes = {"size": 5, "alpha": alpha, "beta": 0.75, "bias": bias}
    return [(f"norm{label}", "lrn", attributes)]


def _pool(label: str, kernel: int, stride: int) -> list[_Spec]:
    attributes = {
        "kernel": [kernel, kernel],
        "stride": [stride, stride],
        "padding": [0, 0, 0, 0],
        "ceil_mode": True,
    }
    return [(f"pool{label}", "max_pool", attributes)]


def _fc(label: str, out_features: int) -> list[_Spec]:
    attributes = {
        "out_features": out_features,
        "bias": True,
        "weights": {"type": "dense"},
    }
    return [(f"fc{label}", "fc", attributes)]


def _classifier(n_classes: int, dropout: float = 0.5) -> list[_Spec]:
    specs: list[_Spec] = [("flatten", "flatten", {})]
    for label in ("6", "7"):
        specs += _fc(label, 4096)
        specs.append((f"relu{label}", "relu", {}))
        specs.append((f"drop{label}", "dropout", {"rate": dropout}))
    return [*specs, *_fc("8", n_classes), ("prob", "softmax", {})]


def _network(size: int, *parts: Iterable[_Spec]) -> PublishedNetwork:
    input_shape = (3, size, size)
    nodes: list[Node] = []
    weight_shapes: dict[str, tuple[int, ...]] = {}
    previous, channels, features = "input", 3, 0
    for name, op, attributes in chain(*parts):
        nodes.append(Node(name, op, (previous,), attributes))
        previous = name
        match op:
            case "conv":
                outputs, kernel = attributes["out_channels"], attributes["kernel"][0]
                weight_shapes[name] = (
                    outputs,
                    channels // attributes["groups"],
                    kernel,
                    kernel,
                )
                travel = size + 2 * attributes["padding"][0] - kernel
                size = travel // attributes["stride"][0] + 1
                channels = outputs
            case "max_pool":
                travel = size - attributes["kernel"][0]
                size = -(-travel // attributes["stride"][0]) + 1
            case "flatten":
                features = channels * size**2
            case "fc":
                weight_shapes[name] = (attributes["out_features"], features)
                features = attributes["out_features"]
    return PublishedNetwork(input_shape, tuple(nodes), weight_shapes)


def _alexnet(
    n_classes: int, *, pool_first: bool, dropout: float = 0.5
) -> PublishedNetwork:
    """Return AlexNet, or CaffeNet, which pools before it normalises."""

    def reduced(label: str) -> list[_Spec]:
        norm, pool = _norm(label), _pool(label, 3, 2)
        return pool + norm if pool_first else norm + pool

    return _network(
        227,
        _conv("1", 96, 11, stride=4),
        reduced("1"),
        _conv("2", 256, 5, padding=2, groups=2),
        reduced("2"),
        _conv("3", 384, 3, padding=1),
        _conv("4", 384, 3, padding=1, groups=2),
        _conv("5", 256, 3, padding=1, groups=2),
        _pool("5", 3, 2),
        _classifier(n_classes, dropout),
    )


def _vgg_cnn_s() -> PublishedNetwork:
    """Return CNN-S of Chatfield et al., BMVC 2014."""
    return _network(
        224,
        _conv("1", 96, 7, stride=2),
        _norm("1", alpha=5e-4, bias=2.0),
        _pool("1", 3, 3),
        _conv("2", 256, 5, padding=1),
        _pool("2", 2, 2),
        *(_conv(label, 512, 3, padding=1) for label in ("3", "4", "5")),
        _pool("5", 3, 3),
        _classifier(1000),
    )


def _vgg16() -> PublishedNetwork:
    """Return VGG-16, configuration D of Simonyan and Zisserman, ICLR 2015."""
    blocks = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))
    parts: list[list[_Spec]] = []
    for block, (n_convs, channels) in enumerate(blocks, start=1):
        for i in range(1, n_convs + 1):
            parts.append(_conv(f"{block}_{i}", channels, 3, padding=1))
        parts.append(_pool(str(block), 2, 2))
    return _network(224, *parts, _classifier(1000))


PUBLISHED_NETWORKS = {
    "AlexNet": _alexnet(1000, pool_first=False),
    "CaffeNet": _alexnet(1000, pool_first=True),
    "VggCnnS": _vgg_cnn_s(),
    "VGG16": _vgg16(),
    # CaffeNet fine-tuned for fine-grained classification of birds and of dogs. The
    # authors give 0.7 as the share that the first one's dropout preserves.
    "CaffeNetFGB": _alexnet(518, pool_first=True, dropout=0.3),
    "CaffeNetFGD": _alexnet(200, pool_first=True),
}
