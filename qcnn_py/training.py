"""The network that is going to be quantised: trained here, or read from a file."""

from __future__ import annotations

from math import prod
from typing import Any

from qcnn_py.architectures import conv_fc
from qcnn_py.config import NetworkConfig, TrainedNetworkConfig
from qcnn_py.dataset_sources import SplitName
from qcnn_py.datasets import Dataset
from qcnn_py.errors import ConfigError
from qcnn_py.fitting import Examples, fit
from qcnn_py.network import Network
from qcnn_py.network_files import read_network

__all__ = ["prepare_network", "train_network"]


def train_network(
    dataset: Dataset, config: TrainedNetworkConfig, seed: int
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

    Returns
    -------
    network : Network
        Dense; the metadata hold preprocessing and class names.
    history : dict
        See `qcnn_py.fitting.fit`.

    Raises
    ------
    ConfigError
        If the architecture does not fit the images, or as `fit`.
    """
    network = conv_fc(
        dataset.input_shape,
        config.conv_channels,
        config.fc_features,
        len(dataset.class_names),
        kernel_size=config.kernel_size,
        pool_after=config.pool_after,
        dropout=config.dropout,
        seed=seed,
        metadata=dataset.metadata(),
    )

    def examples(split: SplitName) -> Examples:
        return Examples(dataset.splits[split].images, dataset.labels(split))

    return fit(
        network,
        examples("train"),
        examples("validation"),
        config.training,
        seed,
        prepare=dataset.preprocessing.normalize,
    )


def prepare_network(
    config: NetworkConfig, dataset: Dataset, seed: int
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

    Returns
    -------
    network : Network
        Dense, batch normalisation folded; the metadata hold class names and
        preprocessing, the data set's or, where its images were prepared before, the
        file's.
    history : dict
        See `qcnn_py.fitting.fit`; without epochs if the network was read.

    Raises
    ------
    ConfigError
        If the file's network does not fit the images and classes, or as `fit`.
    ModelFormatError
        If the file is malformed.
    UnsupportedOperator
        If an ONNX model has an operator that networks do not have.
    OSError
        If the file cannot be read.
    """
    if isinstance(config, TrainedNetworkConfig):
        return train_network(dataset, config, seed)
    network = read_network(config.path)
    class_names = network.metadata.get("class_names", list(dataset.class_names))
    requirements: tuple[tuple[str, Any, Any], ...] = (
        ("input shape", network.input_shape, dataset.input_shape),
        ("outputs", prod(network.shapes[network.output]), len(dataset.class_names)),
        ("class names", class_names, list(dataset.class_names)),
        ("quantised layers", [x.name for x in network.layers if x.quantized], []),
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
