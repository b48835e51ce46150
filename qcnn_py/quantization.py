"""Quantising the layers of a network, one after another.

Each layer's codewords are chosen so that, fed by the layers quantised before it, it
gives the responses that it gave in the original network.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from math import prod
from os import PathLike
from typing import Any, Self, cast, get_args

import numpy as np
import numpy.typing as npt

from qcnn_py.artefacts import load_arrays, save_arrays
from qcnn_py.augmentation import NUMBERS_PER_IMAGE, augmented
from qcnn_py.channel_order import order_channels
from qcnn_py.config import (
    LayerKind,
    LayerSettings,
    LayerShape,
    Method,
    QuantizeConfig,
    check_possible,
)
from qcnn_py.error_correction import CoordinateDescent, available_threads
from qcnn_py.errors import ConfigError, DatasetError, ModelFormatError
from qcnn_py.network import (
    FloatArray,
    LayerInfo,
    Network,
    QuantizedWeights,
    rounded_codebooks,
)
from qcnn_py.product_quantizer import ProductQuantizer
from qcnn_py.statistics import (
    Array64,
    LayerGeometry,
    Samples,
    SecondMoments,
    draw_positions,
)

__all__ = [
    "KeptResponses",
    "LayerMetrics",
    "QuantizedLayer",
    "apply_layers",
    "collect_moments",
    "quantize",
    "quantize_from_moments",
    "quantize_layer",
]

logger = logging.getLogger(__name__)

Statistics = SecondMoments | Samples
Images = npt.NDArray[Any] | Iterable[npt.NDArray[Any]]
_Map = Callable[[FloatArray], FloatArray]

# Images run through the networks at a time: as many as make matrix products of
# the samples efficient, but their inputs and responses have to fit into memory.
_MOST_IMAGES = 256
_MOST_BYTES = 256 << 20

# What responses may take that are kept, see KeptResponses; twice as much while they
# give way to others.
_MOST_KEPT_BYTES = 2 << 30


@dataclass(frozen=True)
class LayerMetrics:
    """How well a quantised layer keeps its response on the calibration images.

    Attributes
    ----------
    relative_error : float
        ``||T - T_hat|| / ||T||``, Frobenius norms of the original responses ``T``
        (with bias) and the quantised layer's ``T_hat``, of codewords as they are
        stored, over all samples.
    kmeans_relative_error : float
        The same for plain k-means on the weights with the original bias.
    compared : dict of str to float
        The same for every method, by name, if ``compare_methods`` is set; else empty.
    samples : int
        Output positions of all images and augmented copies.
    rounds : int
        Rounds of coordinate descent.
    objective : tuple of float
        Damped squared response error before the first and after each round, as a
        multiple of ``||T||^2``, of codewords that are not rounded yet; empty for
        plain k-means.
    """

    relative_error: float
    kmeans_relative_error: float
    compared: dict[str, float]
    samples: int
    rounds: int
    objective: tuple[float, ...]


@dataclass(frozen=True)
class QuantizedLayer:
    """Outcome of quantising one layer.

    Attributes
    ----------
    layer : str
        The layer's name.
    weights : QuantizedWeights
        Codebooks, codes and bias.
    settings : LayerSettings
        Settings that were used.
    seed : int
        Seed that was used.
    metrics : LayerMetrics
        Response errors.
    """

    layer: str
    weights: QuantizedWeights
    settings: LayerSettings
    seed: int
    metrics: LayerMetrics

    def save(self, path: str | PathLike[str]) -> None:
        """Write the layer as a safetensors file; equal layers give equal bytes."""
        tensors: dict[str, npt.NDArray[Any]] = {
            "codebooks": self.weights.codebooks,
            "codes": self.weights.codes,
        }
        if self.weights.bias is not None:
            tensors["bias"] = self.weights.bias
        metadata = {
            "layer": self.layer,
            "settings": self.settings.model_dump(mode="json"),
            "seed": self.seed,
            "metrics": asdict(self.metrics),
        }
        save_arrays(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """Read a layer that :meth:`save` wrote.

        Raises
        ------
        ModelFormatError
            If the file is malformed.
        OSError
            If it cannot be read.
        """
        tensors, metadata = load_arrays(path)
        try:
            metrics = metadata["metrics"]
            settings = LayerSettings.from_mapping(metadata["settings"])
            return cls(
                layer=metadata["layer"],
                weights=QuantizedWeights(
                    codebooks=tensors["codebooks"],
                    codes=tensors["codes"],
                    bias=tensors.get("bias"),
                    codebook_bits=settings.codebook_bits,
                ),
                settings=settings,
                seed=metadata["seed"],
                metrics=LayerMetrics(
                    **{**metrics, "objective": tuple(metrics["objective"])}
                ),
            )
        except (ConfigError, KeyError, TypeError) as error:
            raise ModelFormatError(
                f"{path}: expected a quantised layer, got {error}"
            ) from error


def apply_layers(network: Network, paths: Iterable[str | PathLike[str]]) -> Network:
    """Put quantised layers into a network.

    Parameters
    ----------
    network : Network
        The network they were made from.
    paths : iterable of path
        Files that :meth:`QuantizedLayer.save` wrote.

    Raises
    ------
    ModelFormatError
        If a file is malformed.
    OSError
        If it cannot be read.
    ShapeError
        If a layer does not fit the network.
    """
    for layer in map(QuantizedLayer.load, paths):
        network = network.with_quantized_layer(layer.layer, layer.weights)
    return network


def quantize(
    network: Network,
    calibration: Images,
    config: Mapping[str, Any] | QuantizeConfig,
    seed: int = 0,
    *,
    original: Network | None = None,
    on_layer: Callable[[QuantizedLayer], None] | None = None,
) -> Network:
    """Quantise the convolutions, then the fully connected layers, of a network.

    Parameters
    ----------
    network : Network
        Trained network. Layers that are quantised already stay as they are.
    calibration : ndarray of float32, shape (N, C, H, W), or iterable of such batches
        Preprocessed images, without labels. Of each layer's
        ``calibration_images``, those that come first are used.
    config : mapping or QuantizeConfig
        Settings, as under ``quantize:`` in ``config.yaml``.
    seed : int
        Seed of all random choices.
    original : Network, optional
        Network whose responses are to be kept: the one that `network` was before its
        activations were quantised. By default `network` itself.
    on_layer : callable, optional
        Called with each layer when it is quantised.

    Returns
    -------
    Network
        The quantised network. With ``reorder_inputs``, values between its layers have
        their channels in another order than those of `network`.

    Raises
    ------
    ConfigError
        If a setting is unknown, out of range or impossible for its layer.
    DatasetError
        If there are no calibration images, or responses to them are not finite.
    ShapeError
        If the images do not fit the network.

    Examples
    --------
    >>> from qcnn_py.architectures import conv_fc
    >>> network = conv_fc((1, 8, 8), (8,), (16,), 10, seed=0)
    >>> images = np.random.default_rng(0).random((20, 1, 8, 8), np.float32)
    >>> quantize(network, images, {"n_centroids": 8, "exclude": ["conv1"]})
    <Network (1, 8, 8) -> (10,), 9 nodes, 2 of 3 layers quantised>
    >>> quantize(network, images, {"n_centroid": 8})
    Traceback (most recent call last):
    qcnn_py.errors.ConfigError: n_centroid: unknown key; did you mean 'n_centroids'?
    """
    if isinstance(config, Mapping):
        config = QuantizeConfig.from_mapping(config)
    layers = network.layers
    # All of them before the first one is quantised, which takes its time.
    plans = config.plan([layer_shape(layer) for layer in layers])
    for name, plan in plans.items():
        if plan.adaptation:
            logger.info("%s: %s", name, plan.adaptation)
    chosen = [
        (layer.name, plans[layer.name].settings)
        for layer in sorted(layers, key=lambda layer: layer.kind != "conv")
        if not plans[layer.name].settings.dense and not layer.quantized
    ]
    if not isinstance(calibration, np.ndarray):
        calibration = list(calibration)
    quantized = order_channels(network, dict(chosen))
    original = order_channels(original, dict(chosen)) if original else quantized
    n_images = max((settings.calibration_images for _, settings in chosen), default=0)
    kept = KeptResponses(original, calibration, n_images)
    names = [name for name, _ in chosen]
    for i, (name, settings) in enumerate(chosen):
        kept.advance(quantized, names[i:])
        result = quantize_layer(
            original, quantized, name, calibration, settings, seed, kept
        )
        quantized = quantized.with_quantized_layer(name, result.weights)
        if on_layer is not None:
            on_layer(result)
    return quantized


def quantize_layer(
    original: Network,
    quantized_prefix: Network,
    layer: str,
    images: Images,
    settings: LayerSettings,
    seed: int = 0,
    kept: KeptResponses | None = None,
) -> QuantizedLayer:
    """Quantise one layer.

    Parameters
    ----------
    original : Network
        Network whose responses are to be kept.
    quantized_prefix : Network
        The same network with all layers before `layer` as they will be, and quantised
        activations where there will be such; what comes after does not matter.
    layer : str
        Name of a dense convolution or fully connected layer of `original`.
    images : ndarray of float32, shape (N, C, H, W), or iterable of such batches
        Preprocessed images; the first ``settings.calibration_images`` are used.
    settings : LayerSettings
        How to quantise.
    seed : int
        Seed of all random choices. Equal arguments give bit-identical results on
        the same machine.
    kept : KeptResponses, optional
        Responses to the images that were computed before; they do not change the
        result.

    Returns
    -------
    QuantizedLayer
        Codebooks, codes, bias and response errors.

    Raises
    ------
    ConfigError
        If a setting is impossible for the layer.
    DatasetError
        If there are no images, or responses to them are not finite.
    ShapeError
        If the images do not fit the network.
    """
    check_possible(settings, layer_shape(_dense_layer(original, layer)))
    moments = collect_moments(
        original, quantized_prefix, layer, images, settings, seed, kept=kept
    )
    return quantize_from_moments(original, layer, moments, settings, seed)


def collect_moments(
    original: Network,
    quantized_prefix: Network,
    layer: str,
    images: Images,
    settings: LayerSettings,
    seed: int = 0,
    first: int = 0,
    kept: KeptResponses | None = None,
) -> Statistics:
    """Gather the statistics of one layer in one pass over the images.

    Those of several parts of the calibration images may be merged; the parts do not
    change the result beyond rounding.

    Parameters
    ----------
    original, quantized_prefix, layer, images, settings, seed, kept
        See :func:`quantize_layer`.
    first : int
        Calibration images before those given.

    Returns
    -------
    SecondMoments or Samples
        Of the layer's inputs in `quantized_prefix` and of its responses in `original`;
        samples where ``settings`` allow fewer of them than the layer has inputs.
        Augmented copies count as further images.
    """
    node = original.node(layer)
    # Behind a quantiser of activations that the original may not have.
    source = quantized_prefix.node(layer).inputs[0]

    def prefixes(start: str) -> tuple[_Map, _Map]:
        return (
            _between(original, start, layer),
            _between(quantized_prefix, start, source),
        )

    geometry = LayerGeometry.of(node)
    shape = original.shapes[layer]
    weight = original.tensors[f"{layer}.weight"]
    moments: Statistics
    if node.op == "fc" and settings.augmented_images < weight.shape[1]:
        moments = Samples(weight.shape[1], shape[0])
    else:
        moments = SecondMoments(
            geometry.groups, prod(weight.shape[1:]), shape[0] // geometry.groups
        )
    n_positions = prod(shape[1:])
    n_drawn = settings.positions_per_image or n_positions

    def random(key: list[int], numbers_per_image: int) -> np.random.Generator:
        # Every image has its own part of a stream, whatever came before it.
        skipped = first * numbers_per_image
        return np.random.Generator(np.random.PCG64(key).advance(skipped))

    copies = [
        (random([seed, copy], n_positions), random([seed, copy, 1], NUMBERS_PER_IMAGE))
        for copy in range(1 + settings.augmented_copies)
    ]
    n_inputs = prod(quantized_prefix.shapes[source])
    values = prod(original.input_shape) + n_inputs + prod(shape)
    batch_size = _batch_size(values)
    whole: tuple[_Map, _Map] | None = None
    short: tuple[_Map, _Map] | None = None
    done = 0
    for originals in _batches(images, settings.calibration_images, batch_size):
        for copy, (places, changes) in enumerate(copies):
            if copy == 0 and kept is not None and kept.pairs is not None:
                short = short or prefixes(kept.value)
                maps, batches = short, kept.batch(done, len(originals))
            else:
                batch = originals
                if copy:
                    batch = augmented(originals, settings.flip, settings.shift, changes)
                whole = whole or prefixes(original.input_name)
                maps, batches = whole, (batch, batch)
            targets, inputs = (run(x) for run, x in zip(maps, batches, strict=True))
            positions = None
            if n_drawn < n_positions:
                positions = draw_positions(places, len(originals), n_positions, n_drawn)
            moments.add_images(inputs, targets, geometry, positions)
        done += len(originals)
    return moments


class KeptResponses:
    """Responses of the original and the quantised network to the calibration images.

    Layers are quantised one after another, and each needs responses of all layers
    before it. Kept are those at the last value that does not change any more and that
    all layers to come depend on alone, if they take no more than 2 GiB.

    Parameters
    ----------
    original : Network
        Network whose responses are to be kept.
    images : ndarray of float32, shape (N, C, H, W), or sequence of such batches
        Preprocessed images.
    limit : int
        How many images count, the first ones.

    Attributes
    ----------
    value : str
        Name of the value; at first the input of the networks.
    pairs : tuple of ndarray of float32, shape (N, ...), or None
        The value in the original and in the quantised network; None for the images
        themselves.
    """

    def __init__(self, original: Network, images: Images, limit: int) -> None:
        self._original = original
        self._images = images
        self._limit = limit
        self.value = original.input_name
        self.pairs: tuple[FloatArray, FloatArray] | None = None

    def batch(self, first: int, count: int) -> tuple[FloatArray, FloatArray]:
        """Return both networks' responses to some of the images."""
        assert self.pairs is not None
        original, quantized = self.pairs
        return original[first : first + count], quantized[first : first + count]

    def advance(self, quantized: Network, layers: list[str]) -> None:
        """Go on to a later value if there is one.

        Parameters
        ----------
        quantized : Network
            The quantised network so far.
        layers : list of str
            All layers that are still to be quantised.
        """
        shapes = quantized.shapes
        common = set(_cuts(self._original, layers))
        cuts = [cut for cut in _cuts(quantized, layers) if cut in common]
        batches = list(_batches(self._images, self._limit, _MOST_IMAGES))
        n_images = sum(map(len, batches))
        fitting = [
            cut
            for cut in cuts[cuts.index(self.value) + 1 :]
            if 2 * 4 * n_images * prod(shapes[cut]) <= _MOST_KEPT_BYTES
        ]
        if not fitting or not n_images:
            return
        value = fitting[-1]
        maps = [
            _between(network, self.value, value)
            for network in (self._original, quantized)
        ]
        pairs = tuple(
            np.empty((n_images, *shapes[value]), np.float32) for _ in range(2)
        )
        values = max(prod(shape) for shape in shapes.values())
        size = _batch_size(values)
        done = 0
        for batch in batches:
            for start in range(0, len(batch), size):
                part = batch[start : start + size]
                before = (part, part)
                if self.pairs is not None:
                    before = self.batch(done, len(part))
                for target, run, x in zip(pairs, maps, before, strict=True):
                    target[done : done + len(part)] = run(x)
                done += len(part)
        self.value, self.pairs = value, (pairs[0], pairs[1])


def _between(network: Network, start: str, end: str) -> _Map:
    """Return what computes one value of a network from another."""
    if start == end:
        return lambda values: values
    return network.subgraph(start, end).compile("exact", threads=available_threads())


def _cuts(network: Network, layers: list[str]) -> list[str]:
    """Return the values, in order, that some layers depend on alone.

    None of the layers is before them.
    """
    needed = set(layers)
    for node in reversed(network.nodes):
        if node.name in needed:
            needed.update(node.inputs)
    nodes = [node for node in network.nodes if node.name in needed]
    # Number of the last node that reads each value.
    last_read = {value: i for i, node in enumerate(nodes) for value in node.inputs}
    cuts, open_until = [], -1
    value = network.input_name
    for i, node in enumerate(nodes):
        # Whatever comes before `value` has been read by now.
        if open_until < i:
            cuts.append(value)
        if node.name in layers:
            break
        open_until = max(open_until, last_read[value])
        value = node.name
    return cuts


def _batch_size(values: int) -> int:
    """Return how many images of so many values each are run at a time."""
    return max(1, min(_MOST_IMAGES, _MOST_BYTES // (4 * values)))


def quantize_from_moments(
    original: Network,
    layer: str,
    moments: Statistics,
    settings: LayerSettings,
    seed: int = 0,
) -> QuantizedLayer:
    """Quantise one layer whose second moments are known.

    Parameters
    ----------
    original, layer, settings, seed
        See :func:`quantize_layer`.
    moments : SecondMoments or Samples
        What :func:`collect_moments` returned, for all images.

    Returns
    -------
    QuantizedLayer
        Codebooks, codes, bias and response errors.
    """
    info = _dense_layer(original, layer)
    check_possible(settings, layer_shape(info))
    if moments.count == 0:
        raise DatasetError("calibration images: got none, expected at least one")
    weight = original.tensors[f"{layer}.weight"]
    bias = original.tensors.get(f"{layer}.bias")
    group_bias = np.zeros((info.groups, info.output_shape[0] // info.groups))
    if bias is not None:
        group_bias += bias.reshape(group_bias.shape)

    clustered = _cluster_weights(weight, info, settings, seed)

    def quantized(method: Method) -> tuple[QuantizedWeights, list[float], float]:
        """Return weights, objectives and relative error of a method."""
        start = time.perf_counter()
        weights, objective = clustered, list[float]()
        if method != "kmeans":
            weights, objective = _correct_weights(
                weight,
                group_bias,
                info,
                moments,
                settings,
                seed,
                start=None if method == "gptvq" else clustered,
            )
        columns = _columns(weights.decode(info.channels), info.groups)
        new_bias = bias
        if settings.bias_correction:
            new_bias = moments.best_bias(columns).astype(np.float32).reshape(-1)
        used = np.zeros_like(group_bias)
        if new_bias is not None:
            used += new_bias.reshape(used.shape)
        error = moments.relative_error(columns, used)
        logger.info(
            "%s: %s, relative response error %.4g after %d rounds, %.1f s",
            layer,
            method,
            error,
            max(0, len(objective) - 1),
            time.perf_counter() - start,
        )
        return replace(weights, bias=new_bias), objective, error

    weights, objective, relative_error = quantized(settings.method)
    compared = {}
    if settings.compare_methods:
        compared = {
            method: relative_error
            if method == settings.method
            else quantized(method)[2]
            for method in get_args(Method)
        }
    columns = _columns(clustered.decode(info.channels), info.groups)
    metrics = LayerMetrics(
        relative_error=relative_error,
        kmeans_relative_error=moments.relative_error(columns, group_bias),
        compared=compared,
        samples=moments.count,
        rounds=max(0, len(objective) - 1),
        objective=tuple(
            value / (moments.sum_squared_targets or 1.0) for value in objective
        ),
    )
    return QuantizedLayer(
        layer=layer, weights=weights, settings=settings, seed=seed, metrics=metrics
    )


def _correct_weights(
    weight: FloatArray,
    bias: Array64,
    layer: LayerInfo,
    moments: Statistics,
    settings: LayerSettings,
    seed: int,
    start: QuantizedWeights | None,
) -> tuple[QuantizedWeights, list[float]]:
    """Descend on the response error from `start`, or else from error feedback.

    Returns objectives, too.
    """
    descent = CoordinateDescent(
        moments.error_with_best_bias()
        if settings.bias_correction
        else moments.error_with_bias(bias),
        _columns(weight, layer.groups),
        n_positions=prod(layer.kernel),
        n_centroids=settings.n_centroids,
        subvector_dim=settings.subvector_dim,
        n_sets=settings.codebook_sets(layer.groups),
        damping=settings.damping,
    )
    if start:
        descent.start(start.codebooks, start.codes)
    else:
        descent.seed_with_feedback(
            settings.kmeans_restarts, seed, settings.feedback_rounds
        )
        descent.relax(settings.relaxation_rounds, settings.temperature, seed)
    objective = descent.run(settings.max_rounds, settings.tolerance)
    weights = _pack(
        descent.codebooks, descent.codes, weight.shape, settings.codebook_bits
    )
    return weights, objective


def _dense_layer(network: Network, name: str) -> LayerInfo:
    layers = {layer.name: layer for layer in network.layers}
    if name not in layers:
        raise ConfigError(
            f"layer is {name!r}, expected one of {', '.join(map(repr, layers))}"
        )
    if layers[name].quantized:
        raise ConfigError(f"layer {name!r} is quantised already, expected a dense one")
    return layers[name]


def layer_shape(layer: LayerInfo) -> LayerShape:
    """Return what the configuration has to know of a layer."""
    positions = prod(layer.kernel)
    return LayerShape(
        name=layer.name,
        kind=cast(LayerKind, layer.kind),
        n_vectors=layer.output_shape[0] * positions,
        n_inputs=layer.channels * positions,
        groups=layer.groups,
        depthwise=layer.depthwise,
        n_positions=positions,
    )


def _batches(images: Images, limit: int, size: int) -> Iterator[FloatArray]:
    """Yield the first `limit` images, those of an array in batches of `size`."""
    if isinstance(images, np.ndarray):
        array = images[:limit]
        images = (array[i : i + size] for i in range(0, len(array), size))
    for batch in images:
        yield batch[:limit]
        limit -= len(batch)
        if limit <= 0:
            return


def _cluster_weights(
    weight: FloatArray, layer: LayerInfo, settings: LayerSettings, seed: int
) -> QuantizedWeights:
    """Quantise weights by plain k-means."""
    # (groups, outputs of a group, kernel positions, channels)
    vectors = weight.reshape(layer.groups, -1, layer.channels, prod(layer.kernel))
    vectors = vectors.swapaxes(2, 3)
    n_sets = settings.codebook_sets(layer.groups)
    quantizers = [
        ProductQuantizer(
            settings.n_centroids,
            settings.subvector_dim,
            n_init=settings.kmeans_restarts,
            random_state=seed,
        ).fit(part)
        for part in vectors.reshape(n_sets, -1, layer.channels)
    ]
    return _pack(
        np.stack([quantizer.codebooks_ for quantizer in quantizers]),
        np.stack([quantizer.codes_ for quantizer in quantizers]),
        weight.shape,
        settings.codebook_bits,
    )


def _columns(weight: FloatArray, groups: int) -> Array64:
    """Weights as float64 of shape (groups, inputs of an output, outputs)."""
    rows = weight.reshape(groups, weight.shape[0] // groups, -1)
    return rows.swapaxes(1, 2).astype(np.float64)


def _pack(
    codebooks: Array64,
    codes: npt.NDArray[Any],
    shape: tuple[int, ...],
    codebook_bits: int,
) -> QuantizedWeights:
    """Bring codebooks (sets, M, K, dsub) and codes (..., M) into the stored form."""
    n_sets, n_subspaces, n_centroids, _ = codebooks.shape
    books = codebooks if n_sets > 1 else codebooks[0]
    stored = codes.reshape(shape[0], *shape[2:], n_subspaces)
    return QuantizedWeights(
        codebooks=rounded_codebooks(books, codebook_bits),
        codes=(
            stored.astype(np.uint8) if n_centroids <= 256 else stored.astype(np.uint16)
        ),
        bias=None,
        codebook_bits=codebook_bits,
    )
