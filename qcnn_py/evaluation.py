"""Accuracy of a network on a data set's test images."""

from __future__ import annotations

from typing import Any

import numpy as np

from qcnn_py.datasets import Dataset
from qcnn_py.errors import DatasetError, ShapeError
from qcnn_py.network import Network

__all__ = ["evaluate"]

_BATCH_SIZE = 100


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
    outputs = [
        model(batch).reshape(-1, n_classes)
        for batch in dataset.batches("test", _BATCH_SIZE)
    ]
    best = np.argsort(-np.concatenate(outputs), axis=1, kind="stable")[:, :5]
    hits = best == labels[:, None]
    return {
        "n": len(labels),
        "top1": float(hits[:, 0].mean()),
        "top5": float(hits.any(axis=1).mean()),
        "predictions": best[:, 0].tolist(),
    }
