"""The network that is going to be quantised: trained here, or read from a file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from qcnn_py.architectures import conv_fc
from qcnn_py.checkpoints import Checkpoint
from qcnn_py.config import NetworkConfig, TrainedNetworkConfig
from qcnn_py.dataset_sources import SplitName
from qcnn_py.datasets import Dataset
from qcnn_py.errors import ConfigError
from qcnn_py.evaluation import evaluate
from qcnn_py.fitting import Examples, LatentWeights, Training
from qcnn_py.network import Network, QuantizedWeights
from qcnn_py.network_files import read_network

__all__ = ["prepare_network", "train_cell", "train_network"]

logger = logging.getLogger(__name__)


def train_network(
    dataset: Dataset,
    config: TrainedNetworkConfig,
    seed: int,
    checkpoint: Checkpoint | None = None,
) -> tuple[Network, dict[str, Any]]:
    """Build a network for a data set and train it.

    Parameters
    ----------
    dataset : Dataset
        Trained on its training split, watched on its validation split.
    config : TrainedNetworkConfig
        Architecture and training.
    seed : int
        Seed of the parameters, the order of the images and dropout.
    checkpoint : Checkpoint, optional
        Where to go on from, and to keep how far this got.

    Returns
    -------
    network : Network
        The metadata hold preprocessing and class names.
    history : dict
        See `qcnn_py.fitting.Training.fit`.

    Raises
    ------
    ConfigError
        If the architecture does not fit the images, or as `Training.fit`.
    """
    network = _draw(dataset, config, seed)
    training = _training(network, config)
    return _train(training, network, dataset, config, seed, checkpoint)


def _draw(dataset: Dataset, config: TrainedNetworkConfig, seed: int) -> Network:
    """Return the network before training."""
    network = conv_fc(
        dataset.input_shape,
        config.conv_channels,
        config.fc_features,
        len(dataset.class_names),
        kernel_size=config.kernel_size,
        pool_after=config.pool_after,
        dropout=config.dropout,
        batch_norm=config.batch_norm,
        activations=config.activations,
        seed=seed,
        metadata=dataset.metadata(),
    )
    if config.weights == "linear":
        network = _with_wide_weights(network, LatentWeights(config.weight_bits))
    return network


def _training(network: Network, config: TrainedNetworkConfig) -> Training:
    """Return what trains networks like this one."""
    bits = {"float": None, "binary": 1, "linear": config.weight_bits}[config.weights]
    return Training(
        network,
        config.training,
        latent=None if bits is None else LatentWeights(bits),
        noise=config.activations.noise,
        normalize_batches=config.batch_norm,
    )


def _train(
    training: Training,
    network: Network,
    dataset: Dataset,
    config: TrainedNetworkConfig,
    seed: int,
    checkpoint: Checkpoint | None,
) -> tuple[Network, dict[str, Any]]:
    """Return the trained network, as it is stored, and its history."""

    def examples(split: SplitName) -> Examples:
        return Examples(dataset.splits[split].images, dataset.labels(split))

    trained, history = training.fit(
        network,
        examples("train"),
        examples("validation"),
        seed,
        prepare=dataset.preprocessing.normalize,
        checkpoint=checkpoint,
    )
    return _stored(trained, config), history


def _with_wide_weights(network: Network, latent: LatentWeights) -> Network:
    """Return the network with drawn weights that spread over more than one level."""
    weights = {k: v for k, v in network.tensors.items() if k.endswith(".weight")}
    wide = {k: v * max(1.0, latent.step / v.std()) for k, v in weights.items()}
    return network.replace(
        tensors={
            name: np.clip(array, *latent.limits).astype(np.float32)
            for name, array in wide.items()
        }
    )


def _stored(network: Network, config: TrainedNetworkConfig) -> Network:
    """Return the network with weights of few levels in their smallest form.

    Those of more than one bit become codes of so many bits, of codewords of one number,
    if that is less than float32 with the codewords, which every input channel has.
    """
    for layer in network.layers:
        weight = network.tensors[f"{layer.name}.weight"]
        bias = network.tensors.get(f"{layer.name}.bias")
        if config.weights == "binary":
            signs = weight.astype(np.int8)
            network = network.with_binary_layer(layer.name, signs, bias)
        elif config.weights == "linear":
            n_levels = 2**config.weight_bits
            levels = np.arange(-n_levels // 2, n_levels // 2) / np.float32(n_levels / 2)
            codes = np.searchsorted(levels, weight).astype(np.uint8)
            weights = QuantizedWeights(
                np.tile(levels.astype(np.float32)[:, None], (layer.channels, 1, 1)),
                np.moveaxis(codes, 1, -1),
                bias,
                codebook_bits=16,
            )
            coded = network.with_quantized_layer(layer.name, weights)
            sizes = {info.name: info.bytes for info in coded.layers}
            if sizes[layer.name] < layer.bytes:
                network = coded
    return network


def train_cell(
    datasets: Sequence[Dataset],
    config: TrainedNetworkConfig,
    seed: int,
    checkpoint: Checkpoint | None = None,
) -> tuple[Network, dict[str, Any]]:
    """Train a network once per replicate and measure its accuracy.

    Parameters
    ----------
    datasets : sequence of Dataset
        One for each replicate.
    config : TrainedNetworkConfig
        See `train_network`.
    seed : int
        Replicate `i` uses ``seed + i``.
    checkpoint : Checkpoint, optional
        Where to go on from, and to keep how far this got.

    Returns
    -------
    network : Network
        The first replicate's.
    result : dict
        ``replicates``: of each its ``top1``, ``top5`` and number of test images ``n``
        (see `qcnn_py.evaluation.evaluate`), and ``history`` (see
        `qcnn_py.fitting.Training.fit`).

    Raises
    ------
    ConfigError, DatasetError
        As `train_network` and `evaluate`.
    """
    networks, replicates = [], []
    training = None
    for number, dataset in enumerate(datasets):
        drawn = _draw(dataset, config, seed + number)
        # Replicates differ in images and parameters, not in what is compiled.
        training = training or _training(drawn, config)
        part = checkpoint and checkpoint.part(str(number))
        network, history = _train(training, drawn, dataset, config, seed + number, part)
        accuracy = evaluate(network, dataset)
        del accuracy["predictions"]
        logger.info("replicate %d: top-1 %.4f", number, accuracy["top1"])
        networks.append(network)
        replicates.append({**accuracy, "history": history})
    return networks[0], {"replicates": replicates}


def prepare_network(
    config: NetworkConfig,
    dataset: Dataset,
    seed: int,
    checkpoint: Checkpoint | None = None,
) -> tuple[Network, dict[str, Any]]:
    """Train a network, or read a trained one and see that it fits the data set.

    Parameters
    ----------
    config : NetworkConfig
        What to train or where to read.
    dataset : Dataset
        The images the network is for.
    seed : int
        See `train_network`.
    checkpoint : Checkpoint, optional
        See `train_network`.

    Returns
    -------
    network : Network
        Dense, batch normalisation folded; the metadata hold class names and
        preprocessing, the data set's or, where its images were prepared before, the
        file's.
    history : dict
        See `qcnn_py.fitting.Training.fit`; without epochs if the network was read.

    Raises
    ------
    ConfigError
        If the file's network does not fit the images and classes, or as `Training.fit`.
    ModelFormatError
        If the file is malformed.
    UnsupportedOperator
        If an ONNX model has an operator that networks do not have.
    OSError
        If the file cannot be read.
    """
    if isinstance(config, TrainedNetworkConfig):
        return train_network(dataset, config, seed, checkpoint)
    network = read_network(config.path)
    class_names = network.metadata.get("class_names", list(dataset.class_names))
    requirements: tuple[tuple[str, Any, Any], ...] = (
        ("input shape", network.input_shape, dataset.input_shape),
        ("outputs", prod(network.shapes[network.output]), len(dataset.class_names)),
        ("class names", class_names, list(dataset.class_names)),
        (
            "quantised layers",
            [x.name for x in network.layers if x.quantized or x.binary],
            [],
        ),
    )
    for what, got, expected in requirements:
        if got != expected:
            raise ConfigError(
                f"network.path: {config.path} has {what} {got}, expected {expected} "
                "for this data set"
            )
    metadata = dataset.metadata()
    own = network.metadata.get("preprocessing")
    if dataset.preprocessing.channel_order is None and own is not None:
        # The data set does not know how a picture becomes an input.
        metadata["preprocessing"] = own
    return network.fold_batch_norms().replace(metadata=metadata), {"epochs": []}
