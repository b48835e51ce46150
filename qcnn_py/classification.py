"""From a picture to class names: what a model makes of an image."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from math import prod
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qcnn_py.errors import ConfigError, ModelFormatError, ShapeError
from qcnn_py.network import FloatArray, Network

if TYPE_CHECKING:
    from PIL import Image

    from qcnn_py.model import Model
    from qcnn_py.preprocessing import Preprocessing

__all__ = [
    "Prediction",
    "classify",
    "preprocessing_of",
    "probabilities",
    "stated_class_names",
]

_BATCH_SIZE = 32


@dataclass(frozen=True)
class Prediction:
    """A class that an image may show.

    Attributes
    ----------
    index : int
        Number of the output, from 0.
    name : str or None
        The class's name, if the model knows one.
    probability : float
        From 0 to 1.
    """

    index: int
    name: str | None
    probability: float


def classify(
    model: Model,
    images: Iterable[Image.Image | str | PathLike[str] | npt.NDArray[Any]],
    top: int = 5,
    preprocessing: Preprocessing | None = None,
    class_names: Sequence[str] | None = None,
) -> Iterator[list[Prediction]]:
    """Yield the likeliest classes of each image.

    Parameters
    ----------
    model : Model
        A classifier: one output per class.
    images : iterable
        Each as `Model.classify` takes it. They are prepared when their turn comes.
    top : int
        Number of classes of each image.
    preprocessing : Preprocessing, optional
        Instead of the one that the network's metadata state.
    class_names : sequence of str, optional
        Name of each output, instead of those that the metadata state.

    Raises
    ------
    ConfigError
        If `top` is below 1, or there are pictures and no preprocessing.
    DatasetError
        If an image cannot be read.
    ModelFormatError
        If the network's metadata do not fit it.
    ShapeError
        If the prepared image is not what the network takes.
    """
    if top < 1:
        raise ConfigError(f"top is {top}, expected at least 1")
    network = model.network
    names = stated_class_names(network) if class_names is None else class_names

    def prepared(image: Any) -> FloatArray:
        nonlocal preprocessing
        if isinstance(image, np.ndarray):
            if image.dtype.kind == "f":
                return _checked(network, image)
            image = _picture(image)
        if preprocessing is None:
            preprocessing = preprocessing_of(network)
        return _checked(network, preprocessing.apply(image))

    remaining = iter(images)
    while batch := [prepared(image) for image in islice(remaining, _BATCH_SIZE)]:
        for row in probabilities(network, model(np.stack(batch))):
            # The first classes win ties.
            best = np.argsort(-row, kind="stable")[:top].tolist()
            yield [
                Prediction(index, names[index] if names else None, float(row[index]))
                for index in best
            ]


def preprocessing_of(network: Network) -> Preprocessing:
    """Return how a picture becomes the network's input, as its metadata say.

    Raises
    ------
    ConfigError
        If they do not say.
    ModelFormatError
        If what they say is malformed.
    """
    stated = network.metadata.get("preprocessing")
    if stated is None:
        raise ConfigError(
            "the network does not say how a picture becomes its input: add "
            "metadata={'preprocessing': Preprocessing(...).to_json()} with "
            "Network.replace, or pass prepared arrays"
        )
    from qcnn_py.preprocessing import Preprocessing

    return Preprocessing.from_json(stated)


def stated_class_names(network: Network) -> list[str] | None:
    """Return the names of the network's outputs, if its metadata have them.

    Raises
    ------
    ModelFormatError
        If they are not one text per output.
    """
    names = network.metadata.get("class_names")
    if names is None:
        return None
    n_outputs = prod(network.shapes[network.output])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelFormatError("metadata, class_names: expected a list of texts")
    if len(names) != n_outputs:
        raise ModelFormatError(
            f"metadata, class_names: got {len(names)} names, expected {n_outputs}, one "
            "for each output"
        )
    return names


def probabilities(network: Network, outputs: FloatArray) -> FloatArray:
    """Return class probabilities.

    Parameters
    ----------
    network : Network
        A classifier whose outputs are probabilities, if it ends in a softmax, or
        else logits (log-probabilities among them).
    outputs : ndarray of float32, shape (N, classes) or (N, classes, 1, 1)
        What it computes.

    Returns
    -------
    ndarray of float32, shape (N, classes)
        Not negative, with sum 1.

    Raises
    ------
    ShapeError
        If outputs are no vector.

    Examples
    --------
    >>> from qcnn_py import Node
    >>> network = Network([Node("out", "flatten", ("input",), {})], {}, (3, 1, 1))
    >>> probabilities(network, np.log(np.float32([[1, 2, 5]]))).round(3)
    array([[0.125, 0.25 , 0.625]], dtype=float32)
    """
    shape = network.shapes[network.output]
    rows = outputs.reshape(len(outputs), -1)
    if rows.shape[1] != shape[0]:
        raise ShapeError(
            f"output {network.output!r} has shape {shape}, expected one value per class"
        )
    if network.final_softmax is not None:
        return rows
    powers = np.exp(rows - rows.max(axis=1, keepdims=True))
    normalized: FloatArray = powers / powers.sum(axis=1, keepdims=True)
    return normalized


def _picture(pixels: npt.NDArray[Any]) -> Image.Image:
    """Make a picture of an array (H, W) or (H, W, channels) of bytes."""
    from PIL import Image

    channels = pixels.shape[2:]
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or channels > (4,):
        raise ShapeError(
            f"image has dtype {pixels.dtype} and shape {pixels.shape}, expected uint8 "
            "of shape (H, W), (H, W, 3) or (H, W, 4), or a prepared float array"
        )
    if channels == (1,):
        pixels = pixels[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(pixels))


def _checked(network: Network, array: FloatArray) -> FloatArray:
    if array.shape != network.input_shape:
        raise ShapeError(
            f"prepared image has shape {array.shape}, expected {network.input_shape}"
        )
    return array
