"""Training the fully connected layers on what a quantised conv part gives them.

The conv part is frozen, so its output, the features, is computed once.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from qcnn_py.activation_quantization import QUANTIZERS
from qcnn_py.artefacts import load_arrays, save_arrays
from qcnn_py.checkpoints import Checkpoint
from qcnn_py.config import OptimizerConfig
from qcnn_py.dataset_sources import SplitName
from qcnn_py.datasets import Dataset
from qcnn_py.errors import ConfigError, ModelFormatError, ShapeError
from qcnn_py.fitting import Examples, fit
from qcnn_py.network import Network

__all__ = ["Features", "extract_features", "finetune_fc"]

_BATCH_SIZE = 100


@dataclass(frozen=True)
class Features:
    """Inputs of a network's first fully connected layer, with labels.

    Attributes
    ----------
    value : str
        Name of the value in the network.
    train, validation : Examples
        ``inputs`` float32, shape (N, features).
    """

    value: str
    train: Examples
    validation: Examples

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the features as a ``.safetensors`` file."""
        arrays = {
            "train.inputs": self.train.inputs,
            "train.labels": self.train.labels,
            "validation.inputs": self.validation.inputs,
            "validation.labels": self.validation.labels,
        }
        save_arrays(path, arrays, {"value": self.value})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote.

        Raises
        ------
        ModelFormatError
            If the file is malformed or holds no features.
        OSError
            If the file cannot be read.
        """
        arrays, metadata = load_arrays(path)
        try:
            return cls(
                metadata["value"],
                Examples(arrays["train.inputs"], arrays["train.labels"]),
                Examples(arrays["validation.inputs"], arrays["validation.labels"]),
            )
        except (KeyError, TypeError) as error:
            raise ModelFormatError(
                f"{path}: expected features, lacks {error}"
            ) from error


def extract_features(network: Network, dataset: Dataset, threads: int = 1) -> Features:
    """Compute the inputs of the first fully connected layer for a data set.

    Parameters
    ----------
    network : Network
        Its conv part may be quantised.
    dataset : Dataset
        Its training and validation images are used.
    threads : int
        Threads of the engine.

    Returns
    -------
    Features
        Computed with float32 tables (precision ``exact``).

    Raises
    ------
    ConfigError
        If the network has no fully connected layer.
    ShapeError
        If the images do not fit the network.
    """
    value = _tail_input(network)
    model = network.truncated(value).compile(precision="exact", threads=threads)

    def examples(split: SplitName) -> Examples:
        features = np.empty((dataset.size(split), *network.shapes[value]), np.float32)
        done = 0
        for batch in dataset.batches(split, _BATCH_SIZE):
            features[done : done + len(batch)] = model(batch)
            done += len(batch)
        return Examples(features, dataset.labels(split))

    return Features(value, examples("train"), examples("validation"))


def finetune_fc(
    network: Network,
    features: Features,
    config: OptimizerConfig,
    seed: int,
    noise: bool = False,
    checkpoint: Checkpoint | None = None,
) -> tuple[Network, dict[str, Any]]:
    """Train what follows the features; everything before stays as it is.

    Parameters
    ----------
    network : Network
        Its fully connected layers are dense.
    features : Features
        What its conv part gives them.
    config : OptimizerConfig
        Optimiser, schedule, regularisation, early stopping.
    seed : int
        Seed of the order of the images, of dropout and noise.
    noise : bool
        Whether quantised activations get noise in training.
    checkpoint : Checkpoint, optional
        Where to go on from, and to keep how far this got.

    Returns
    -------
    network : Network
        The network with new fully connected layers.
    history : dict
        See `qcnn_py.fitting.Training.fit`.

    Raises
    ------
    ConfigError
        If the network has no fully connected layer, one is quantised, or as `fit`.
    ShapeError
        If the features are not those of the network, or other values than they lead
        past them.
    """
    value = _tail_input(network)
    got = (features.value, features.train.inputs.shape[1:])
    expected = (value, network.shapes[value])
    if got != expected:
        raise ShapeError(
            f"features are of value {got[0]!r} with shape {got[1]}, expected "
            f"{expected[0]!r} with shape {expected[1]}"
        )
    tail = network.subgraph(value)
    trained, history = fit(
        tail,
        features.train,
        features.validation,
        config,
        seed,
        noise=noise,
        checkpoint=checkpoint,
    )
    return network.replace(tensors=trained.tensors), history


def _tail_input(network: Network) -> str:
    """Return the value that the first fully connected layer reads.

    It is the value in front of its dropout and of the quantiser of its inputs, both of
    which change in training.
    """
    if not network.fc_layers:
        raise ConfigError(
            "the network has no fully connected layer, expected one to fine-tune"
        )
    value = network.node(network.fc_layers[0]).inputs[0]
    changing = ("dropout", *QUANTIZERS)
    while value != network.input_name and network.node(value).op in changing:
        value = network.node(value).inputs[0]
    return value
