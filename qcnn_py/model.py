"""Running a network: the engine's session behind a callable object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from os import PathLike
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from qcnn_py import _engine
from qcnn_py.classification import Prediction, classify
from qcnn_py.errors import ConfigError, ShapeError
from qcnn_py.network import FloatArray, Network

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Model", "available_isas", "load"]


def available_isas() -> list[str]:
    """Return the instruction-set levels this machine has, slowest first."""
    return _engine.available_isas()


def load(
    path: str | PathLike[str],
    precision: str = "fast",
    isa: str | None = None,
    threads: int = 1,
) -> Model:
    """Read a ``.qcnn`` file and plan it for this machine.

    Parameters
    ----------
    path : path
        The file.
    precision, isa, threads
        See :meth:`qcnn_py.Network.compile`.

    Raises
    ------
    ModelFormatError
        If the file is truncated, malformed or inconsistent.
    ConfigError
        If the precision or ISA is unknown or not available.
    OSError
        If the file cannot be read.
    """
    return Network.load(path).compile(precision=precision, isa=isa, threads=threads)


class Model:
    """A network planned for one machine; call it with a batch of images.

    Made by :func:`load` or :meth:`Network.compile`. It does not change and may be
    used from several threads at once. A pickled model is planned anew for the machine
    that reads it.

    Parameters
    ----------
    network : Network
        What to run.
    precision, isa, threads
        See :meth:`Network.compile`.

    Examples
    --------
    >>> from qcnn_py.architectures import conv_fc
    >>> model = conv_fc((1, 8, 8), (4,), (), 10, seed=0).compile("exact", "portable")
    >>> model
    <Model (None, 1, 8, 8) -> (10,), isa=portable, precision=exact, threads=1>
    >>> model(np.zeros((2, 1, 8, 8))).shape
    (2, 10)
    >>> list(model.trace(np.zeros((2, 1, 8, 8))))[:2]
    ['conv1', 'conv1_relu']
    >>> model.layers[0]["kernel_name"]
    'portable-f32-direct'
    """

    def __init__(
        self,
        network: Network,
        *,
        precision: str = "fast",
        isa: str | None = None,
        threads: int = 1,
    ) -> None:
        if not isinstance(threads, int) or threads < 1:
            raise ConfigError(f"threads is {threads!r}, expected an integer from 1")
        self._network = network
        self._isa = isa
        self._threads = threads
        self._session = _engine.Session(network.to_engine(), precision, isa)

    @property
    def network(self) -> Network:
        """The network that this model runs."""
        return self._network

    @property
    def input_shape(self) -> tuple[int | None, ...]:
        """Shape of the input; ``None`` stands for the batch."""
        return (None, *self._network.input_shape)

    @property
    def layers(self) -> list[dict[str, Any]]:
        """Geometry, storage, cost and kernel of each layer with weights."""
        kernels: Mapping[str, str] = self._session.kernels
        return [
            {**asdict(layer), "kernel_name": kernels[layer.name]}
            for layer in self._network.layers
        ]

    @property
    def isa(self) -> str:
        """Instruction-set level in use."""
        return self._session.isa

    @property
    def precision(self) -> str:
        """Precision the model was compiled for."""
        return self._session.precision

    @property
    def threads(self) -> int:
        """Threads that share a batch."""
        return self._threads

    def __call__(self, x: npt.ArrayLike) -> FloatArray:
        """Compute the network's output.

        Parameters
        ----------
        x : array of float32, shape (N, C, H, W)
            Preprocessed images; float64 is converted. N may be 0.

        Returns
        -------
        ndarray of float32, shape (N, …)
            The output value of each image.

        Raises
        ------
        ShapeError
            If the shape or dtype does not fit.
        """
        return self._session.run(self._images(x), self._threads)

    def classify(
        self,
        image: Image.Image | str | PathLike[str] | npt.NDArray[Any],
        top: int = 5,
    ) -> list[Prediction]:
        """Name what an image shows.

        Pictures are prepared as the network's metadata say, which needs the package
        Pillow (extra ``cli``).

        Parameters
        ----------
        image : path, PIL image or ndarray
            A picture: file, image, or uint8 array of shape (H, W) or (H, W, channels).
            Or the network's input, prepared: a float array of shape (C, H, W).
        top : int
            Number of classes wanted.

        Returns
        -------
        list of Prediction
            The likeliest first; names are those of the metadata, or ``None``.

        Raises
        ------
        ConfigError
            If `top` is below 1, or the metadata do not say how a picture is prepared.
        DatasetError
            If the image cannot be read.
        ShapeError
            If the prepared image is not what the network takes, or the network's
            output is not one value per class.
        """
        return next(classify(self, [image], top))

    def trace(self, x: npt.ArrayLike) -> dict[str, FloatArray]:
        """Compute the response of every node.

        Parameters
        ----------
        x : array of float32, shape (N, C, H, W)
            Preprocessed images.

        Returns
        -------
        dict of str to ndarray of float32, shape (N, …)
            By node name, in the order of computation.
        """
        return self._session.trace(self._images(x))

    def save(self, path: str | PathLike[str]) -> None:
        """Write the network as a ``.qcnn`` file."""
        self._network.save(path)

    def _images(self, x: npt.ArrayLike) -> FloatArray:
        images = np.asarray(x)
        expected = self._network.input_shape
        shown = ", ".join(map(str, ("N", *expected)))
        if images.dtype.kind != "f":
            raise ShapeError(
                f"images have dtype {images.dtype}, expected float32 of shape ({shown})"
            )
        if images.ndim != len(expected) + 1 or images.shape[1:] != expected:
            raise ShapeError(
                f"images have shape {images.shape}, expected ({shown}); "
                "a single image needs a leading axis of length 1"
            )
        return np.ascontiguousarray(images, dtype=np.float32)

    def __copy__(self) -> Self:
        """Return the model itself, which does not change."""
        return self

    def __deepcopy__(self, memo: object) -> Self:
        """Return the model itself, which does not change."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Keep the network and what was asked for, not the plan for this machine."""
        return _compiled, (self._network, self.precision, self._isa, self._threads)

    def __repr__(self) -> str:
        """Return a one-line summary."""
        return (
            f"<Model {self.input_shape} -> {self._network.shapes[self._network.output]}"
            f", isa={self.isa}, precision={self.precision}, threads={self.threads}>"
        )

    def _repr_html_(self) -> str:
        """Return the summary and a table of the layers, for notebooks."""
        from qcnn_py.inspection import html_table

        return html_table(self)


def _compiled(network: Network, precision: str, isa: str | None, threads: int) -> Model:
    """Read a pickled model."""
    return Model(network, precision=precision, isa=isa, threads=threads)
