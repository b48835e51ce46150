"""Quantising what the layers of a network read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import ceil, frexp, ldexp, log2
from typing import Any

import numpy as np
import numpy.typing as npt

from qcnn_py.config import ActivationsConfig
from qcnn_py.errors import ConfigError, DatasetError, ShapeError
from qcnn_py.network import FloatArray, Network, Node

__all__ = [
    "QUANTIZERS",
    "quantize_activations",
    "quantizer_of",
]

QUANTIZERS = ("quantize_linear", "quantize_log2", "sign")
"""Operations that quantise activations."""

Images = npt.NDArray[Any] | Iterable[npt.NDArray[Any]]

# Images whose values are in memory at a time.
_BATCH_SIZE = 16


def quantizer_of(
    config: ActivationsConfig, low: float | None = None, high: float | None = None
) -> tuple[str, dict[str, Any]]:
    """Return operation and attributes that quantise a value.

    Parameters
    ----------
    config : ActivationsConfig
        Scheme, not none, and bits.
    low, high : float, optional
        Range; the configuration's own by default.

    """
    low = config.low if low is None else low
    high = config.high if high is None else high
    match config.scheme:
        case "linear":
            return "quantize_linear", {"bits": config.bits, "low": low, "high": high}
        case "log2":
            return "quantize_log2", {"bits": config.bits, "high": high}
        case "sign":
            return "sign", {}
    raise ConfigError("activations.scheme: got none, expected a way to quantise")


def quantize_activations(
    network: Network,
    config: Mapping[str, Any] | ActivationsConfig,
    calibration: Images = (),
) -> Network:
    """Quantise what the conv and fc layers of a network read.

    The operation is put behind the value that a layer reads, under the name of that
    value with ``_quantized`` behind it, and in front of dropout, which scales values in
    training; other operations go on reading the value as it is. Layers that read the
    network's input are left alone if they are not named.

    The range of a layer's inputs ends at a percentile of them. Where none is negative,
    it starts at 0; else it is ``2**bits`` steps wide, from
    ``-2**(bits - 1)`` to ``2**(bits - 1) - 1`` steps, and the percentile is one of
    magnitudes. All levels are multiples of the step. With log2, the range ends at the
    power of two nearest in the logarithm.

    Parameters
    ----------
    network : Network
        Trained network.
    config : mapping or ActivationsConfig
        Settings, as under ``activations:`` in ``config.yaml``.
    calibration : ndarray of float32, shape (N, C, H, W), or iterable of such batches
        Preprocessed images; the first ``calibration_images`` are used, and none with
        a range that is given, or without.

    Returns
    -------
    Network
        The network with one more node for each value that layers read.

    Raises
    ------
    ConfigError
        If a setting is unknown, out of range, or names a layer that is not there, or
        the scheme cannot have the range found.
    DatasetError
        If there are no calibration images, or a value of theirs is not finite or
        always zero.
    ShapeError
        If images do not fit the network, or a name is taken.
    """
    if isinstance(config, Mapping):
        config = ActivationsConfig.from_mapping(config)
    layers = {layer.name: _source(network, layer.name) for layer in network.layers}
    first = [x for x, (value, _) in layers.items() if value == network.input_name]
    chosen = [layers[name] for name in config.quantized(list(layers), first)]
    # Several layers may read one value.
    values = dict.fromkeys(value for value, _ in chosen)
    readers = {reader for _, reader in chosen}
    quantizers = {value: quantizer_of(config) for value in values}
    if config.scheme in ("linear", "log2") and config.range == "percentile":
        for value, (least, magnitude) in _ranges(
            network, list(values), config, calibration
        ).items():
            quantizers[value] = quantizer_of(
                config, *_range_of(config, least, magnitude)
            )
    added = {}
    for value, quantizer in quantizers.items():
        name = f"{value}_quantized"
        if name in network.shapes:
            raise ShapeError(f"the network has a value called {name!r} already")
        added[value] = Node(name, quantizer[0], (value,), quantizer[1])
    nodes = [added[network.input_name]] if network.input_name in added else []
    for node in network.nodes:
        if node.name in readers:
            node = replace(node, inputs=(added[node.inputs[0]].name,))
        nodes.append(node)
        if node.name in added:
            nodes.append(added[node.name])
    return Network(
        nodes,
        network.tensors,
        network.input_shape,
        output=network.output,
        input_name=network.input_name,
        metadata=network.metadata,
    )


def _source(network: Network, layer: str) -> tuple[str, str]:
    """Return the value that a layer reads, and which node reads it: dropout is none."""
    reader = network.node(layer)
    while (value := reader.inputs[0]) != network.input_name:
        node = network.node(value)
        if node.op != "dropout":
            break
        reader = node
    return value, reader.name


def _range_of(
    config: ActivationsConfig, least: float, magnitude: float
) -> tuple[float, float]:
    """Return the range for values from `least`, most of them up to `magnitude`."""
    if config.scheme == "log2":
        return 0.0, 2.0 ** round(log2(magnitude))
    if least >= 0:
        return 0.0, float(np.float32(magnitude))
    n = 2 ** (config.bits - 1)
    # So few bits that multiples of the step are exact in float32.
    mantissa, exponent = frexp(magnitude / (n - 1))
    n_bits = 24 - config.bits
    step = ldexp(ceil(ldexp(mantissa, n_bits)), exponent - n_bits)
    return -n * step, (n - 1) * step


def _ranges(
    network: Network,
    values: Sequence[str],
    config: ActivationsConfig,
    calibration: Images,
) -> dict[str, tuple[float, float]]:
    """Return the least number and the percentile of magnitudes of each value."""
    if not isinstance(calibration, np.ndarray):
        calibration = np.concatenate(list(calibration) or [np.empty(0, np.float32)])
    images = calibration[: config.calibration_images]
    if not len(images):
        raise DatasetError("calibration images: got none, expected at least one")
    model = network.compile(precision="exact")
    least = dict.fromkeys(values, np.inf)
    # Enough of the largest magnitudes to hold the percentile.
    largest = {value: np.empty(0, np.float32) for value in values}
    share = 1 - config.percentile / 100
    for start in range(0, len(images), _BATCH_SIZE):
        batch = images[start : start + _BATCH_SIZE]
        responses = {network.input_name: batch, **model.trace(batch)}
        for value in values:
            numbers = responses[value].reshape(-1)
            if not np.isfinite(numbers).all():
                raise DatasetError(
                    f"calibration: value {value!r} got infinity or NaN, expected "
                    "finite numbers"
                )
            least[value] = min(least[value], float(numbers.min()))
            n_kept = 1 + int(share * len(images) * len(numbers) / len(batch))
            largest[value] = _largest(
                np.concatenate([largest[value], np.abs(numbers)]), n_kept
            )
    percentiles = {value: float(kept.min()) for value, kept in largest.items()}
    for value, magnitude in percentiles.items():
        if not magnitude:
            raise DatasetError(
                f"calibration: percentile {config.percentile} of value {value!r} is 0, "
                "expected a number above"
            )
    return {value: (least[value], percentiles[value]) for value in values}


def _largest(numbers: FloatArray, count: int) -> FloatArray:
    if len(numbers) <= count:
        return numbers
    return np.partition(numbers, len(numbers) - count)[-count:]
