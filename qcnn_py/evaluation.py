"""Accuracy of a network on labelled images."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from qcnn_py.datasets import Dataset
from qcnn_py.errors import DatasetError, ShapeError
from qcnn_py.model import Model
from qcnn_py.network import FloatArray, Network

__all__ = ["BATCH_SIZE", "evaluate", "score"]

BATCH_SIZE = 100
"""Images classified at a time."""


def evaluate(
    network: Network, dataset: Dataset, precision: str = "fast", threads: int = 1
) -> dict[str, Any]:
    """Classify the test images.

    Parameters
    ----------
    network : Network
        One output per class: probabilities or logits.
    dataset : Dataset
        Its test split is used.
    precision, threads
        See `Network.compile`.

    Returns
    -------
    dict
        ``n``: number of images; ``top1`` and ``top5``: share of the images, 0 to 1,
        whose class has the largest or one of the five largest outputs (the first
        classes win ties); ``predictions``: class number with the largest output, per
        image.

    Raises
    ------
    DatasetError
        If the data set has no test images.
    ShapeError
        If the network's outputs are not one per class.
    """
    labels = dataset.labels("test")
    n_classes = len(dataset.class_names)
    if not len(labels):
        raise DatasetError("the test split has no images, expected at least one")
    shape = network.shapes[network.output]
    if shape not in ((n_classes,), (n_classes, 1, 1)):
        raise ShapeError(
            f"output {network.output!r} has shape {shape}, expected ({n_classes},), "
            "one value per class"
        )
    model = network.compile(precision=precision, threads=threads)
    return score(model, dataset.batches("test", BATCH_SIZE), labels)


def score(
    model: Model, batches: Iterable[FloatArray], labels: npt.NDArray[np.integer]
) -> dict[str, Any]:
    """Classify images and compare with their labels.

    Parameters
    ----------
    model : Model
        One output per class.
    batches : iterable of ndarray of float32, shape (N, C, H, W)
        Preprocessed images.
    labels : ndarray of int, shape (images,)
        Number of each image's class.

    Returns
    -------
    dict
        See `evaluate`.
    """
    outputs = [model(batch).reshape(len(batch), -1) for batch in batches]
    best = np.argsort(-np.concatenate(outputs), axis=1, kind="stable")[:, :5]
    hits = best == labels[:, None]
    return {
        "n": len(labels),
        "top1": float(hits[:, 0].mean()),
        "top5": float(hits.any(axis=1).mean()),
        "predictions": best[:, 0].tolist(),
    }
