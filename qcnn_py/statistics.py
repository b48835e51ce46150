"""Second moments of a layer's inputs and responses.

A layer is linear in its weights, so its squared response error over any number
of samples depends on the samples only through their second moments: with inputs
``s`` and target responses ``t``, ``sum |t - W^T s - b|^2`` needs no more than
``sum s s^T``, ``sum s t^T``, ``sum |t|^2`` and the two sums themselves. They are
gathered in one pass whose memory does not depend on the number of images, and
moments of disjoint shards add up.

Everything is float64. Error-corrected layers reach relative errors of 1e-3 and
below, where the squared error is 1e-6 of the terms whose difference it is:
float32 products would leave one or two valid digits of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from qcnn_py.artefacts import load_arrays, save_arrays
from qcnn_py.errors import DatasetError, ModelFormatError, ShapeError
from qcnn_py.network import Node

__all__ = [
    "LayerGeometry",
    "ResponseError",
    "SampleError",
    "Samples",
    "SecondMoments",
    "draw_positions",
    "load_merged",
    "load_statistics",
    "outputs_in_parts",
]

Array64 = npt.NDArray[np.float64]

# Bytes of patches gathered at a time: large enough for full-speed matrix
# products, small beside the moments of a large layer.
_CHUNK_BYTES = 64 << 20

# An input that varies by less of its energy is constant; the rest is rounding.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class LayerGeometry:
    """Which inputs of a layer each of its outputs sees.

    A fully connected layer is a convolution of a 1x1 image with a 1x1 kernel.

    Attributes
    ----------
    groups : int
        Groups of input and output channels.
    kernel, stride, dilation : tuple of int
        Height and width, in pixels.
    padding : tuple of int
        Zeros added at the top, left, bottom and right.
    """

    groups: int = 1
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)

    @classmethod
    def of(cls, node: Node) -> Self:
        """Return the geometry of a ``conv`` or ``fc`` node."""
        if node.op == "fc":
            return cls()
        attributes = node.attributes
        return cls(
            groups=attributes["groups"],
            kernel=tuple(attributes["kernel"]),
            stride=tuple(attributes["stride"]),
            padding=tuple(attributes["padding"]),
            dilation=tuple(attributes["dilation"]),
        )

    def windows(self, inputs: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the inputs that each output position sees, without copying them.

        Parameters
        ----------
        inputs : array, shape (N, C, H, W) or (N, features)
            Input of the layer.

        Returns
        -------
        ndarray, shape (N, C, rows, columns, kernel height, kernel width)
            Read-only view of the (padded) input.
        """
        top, left, bottom, right = self.padding
        padded = np.pad(
            _as_images(inputs), ((0, 0), (0, 0), (top, bottom), (left, right))
        )
        (rows, columns), (row_step, column_step) = self.kernel, self.dilation
        reach = ((rows - 1) * row_step + 1, (columns - 1) * column_step + 1)
        windows = sliding_window_view(padded, reach, axis=(2, 3))
        strided = windows[:, :, :: self.stride[0], :: self.stride[1]]
        return strided[..., ::row_step, ::column_step]


@dataclass(frozen=True)
class ResponseError:
    """Squared response error of a layer as a function of its weights.

    ``error(W) = sum over groups of tr(W^T gram W) - 2 tr(cross^T W) + constant``.

    Attributes
    ----------
    gram : ndarray of float64, shape (groups, p, p)
        Second moments of the inputs.
    cross : ndarray of float64, shape (groups, p, outputs)
        Products of inputs and targets; outputs of one group.
    constant : float
        Squared norm of the targets.
    """

    gram: Array64
    cross: Array64
    constant: float

    def __call__(self, weight: Array64) -> float:
        """Return the error of weights of shape (groups, p, outputs)."""
        product = self.gram @ weight
        product -= 2 * self.cross
        # Rounding may push an exact fit below zero.
        return max(0.0, float(np.vdot(product, weight)) + self.constant)

    def in_parts(self, parts: int) -> ResponseError:
        """Return the same with equal parts of each group's outputs as groups.

        The weights that it takes are those that :func:`outputs_in_parts` returns.
        """
        cross = outputs_in_parts(self.cross, parts)
        return ResponseError(np.repeat(self.gram, parts, axis=0), cross, self.constant)


def outputs_in_parts(columns: Array64, parts: int) -> Array64:
    """Cut the outputs of each group into equal parts, groups of their own.

    Parameters
    ----------
    columns : ndarray of float64, shape (groups, p, outputs)
        A column for each output.
    parts : int
        Divides the outputs of a group.

    Returns
    -------
    ndarray of float64, shape (groups * parts, p, outputs / parts)
    """
    groups, n_rows, _ = columns.shape
    cut = columns.reshape(groups, n_rows, parts, -1).swapaxes(1, 2)
    return cut.reshape(groups * parts, n_rows, -1)


@dataclass(frozen=True)
class SampleError:
    """Squared response error of a layer of one group, from its samples.

    ``error(W) = |targets - inputs W|^2``.

    Attributes
    ----------
    inputs : ndarray of float64, shape (n, p)
    targets : ndarray of float64, shape (n, outputs)
    """

    inputs: Array64
    targets: Array64


class SecondMoments:
    """Streaming sums over samples of a layer's inputs and target responses.

    Parameters
    ----------
    groups : int
        Independent groups of inputs and outputs (grouped convolution).
    n_inputs : int
        Inputs of one output, ``p``: input channels of a group times kernel
        positions, in the order of the weights (channel, row, column).
    n_outputs : int
        Outputs of one group.

    Attributes
    ----------
    count : int
        Samples seen.
    sum_inputs : ndarray of float64, shape (groups, n_inputs)
    sum_targets : ndarray of float64, shape (groups, n_outputs)
    gram : ndarray of float64, shape (groups, n_inputs, n_inputs)
        ``H = S S^T``.
    cross : ndarray of float64, shape (groups, n_inputs, n_outputs)
        ``G = S T^T``.
    sum_squared_targets : float
        Squared Euclidean norm of all targets.
    """

    def __init__(self, groups: int, n_inputs: int, n_outputs: int) -> None:
        self.count = 0
        self.sum_inputs = np.zeros((groups, n_inputs))
        self.sum_targets = np.zeros((groups, n_outputs))
        self.gram = np.zeros((groups, n_inputs, n_inputs))
        self.cross = np.zeros((groups, n_inputs, n_outputs))
        self.sum_squared_targets = 0.0

    @property
    def shape(self) -> tuple[int, int, int]:
        """Groups, inputs and outputs per group."""
        groups, n_inputs, n_outputs = self.cross.shape
        return groups, n_inputs, n_outputs

    def add(self, inputs: npt.ArrayLike, targets: npt.ArrayLike) -> None:
        """Add samples.

        Parameters
        ----------
        inputs : array, shape (samples, groups, n_inputs)
            Inputs of the layer.
        targets : array, shape (samples, groups, n_outputs)
            Responses that the layer should give.

        Raises
        ------
        ShapeError
            If the shapes do not fit.
        DatasetError
            If there is an infinity or NaN.
        """
        s = np.asarray(inputs, dtype=np.float64)
        t = np.asarray(targets, dtype=np.float64)
        groups, n_inputs, n_outputs = self.shape
        for name, array, last in (("inputs", s, n_inputs), ("targets", t, n_outputs)):
            if array.shape != (s.shape[0], groups, last):
                raise ShapeError(
                    f"{name} have shape {array.shape}, "
                    f"expected (samples, {groups}, {last})"
                )
            _check_finite(name, array)
        self.count += s.shape[0]
        self.sum_inputs += s.sum(axis=0)
        self.sum_targets += t.sum(axis=0)
        self.sum_squared_targets += float(np.vdot(t, t))
        for group in range(groups):
            transposed = s[:, group].T
            self.gram[group] += transposed @ s[:, group]
            self.cross[group] += transposed @ t[:, group]

    def add_images(
        self,
        inputs: npt.NDArray[Any],
        responses: npt.NDArray[Any],
        geometry: LayerGeometry,
        positions: npt.NDArray[np.intp] | None = None,
    ) -> None:
        """Add the samples of a batch of images, one per output position.

        Parameters
        ----------
        inputs : array, shape (N, C, H, W) or (N, features)
            Input of the layer.
        responses : array, shape (N, C_out, H_out, W_out) or (N, C_out)
            Target responses.
        geometry : LayerGeometry
            How inputs and outputs of the layer correspond.
        positions : array of int, shape (N, positions), optional
            Flat indices of the output positions to use of each image; all by
            default. See :func:`draw_positions`.

        Raises
        ------
        ShapeError
            If the shapes do not fit.
        """
        windows = geometry.windows(inputs)
        responses = _as_images(responses)
        groups, n_inputs, n_outputs = self.shape
        n_images, rows, columns = len(windows), *windows.shape[2:4]
        expected = (n_images, groups * n_outputs, rows, columns)
        if responses.shape != expected:
            raise ShapeError(
                f"responses have shape {responses.shape}, expected {expected}"
            )
        per_image = rows * columns if positions is None else positions.shape[1]
        chunk = max(1, _CHUNK_BYTES // (8 * groups * (n_inputs + n_outputs)))
        for start in range(0, n_images * per_image, chunk):
            sample = np.arange(start, min(start + chunk, n_images * per_image))
            image, place = np.divmod(sample, per_image)
            if positions is not None:
                place = positions[image, place]
            row, column = np.divmod(place, columns)
            self.add(
                windows[image, :, row, column].reshape(-1, groups, n_inputs),
                responses[image, :, row, column].reshape(-1, groups, n_outputs),
            )

    def merge(self, other: SecondMoments | Samples) -> None:
        """Add the samples that `other` has seen.

        Raises
        ------
        ShapeError
            If `other` belongs to a layer of another shape.
        """
        if not isinstance(other, SecondMoments) or other.shape != self.shape:
            raise ShapeError(
                f"{type(other).__name__} has shape (groups, inputs, outputs) = "
                f"{other.shape}, expected SecondMoments of {self.shape}"
            )
        self.count += other.count
        self.sum_inputs += other.sum_inputs
        self.sum_targets += other.sum_targets
        self.gram += other.gram
        self.cross += other.cross
        self.sum_squared_targets += other.sum_squared_targets

    def error_with_bias(self, bias: npt.ArrayLike) -> ResponseError:
        """Return the response error of weights beside a given bias.

        Parameters
        ----------
        bias : array, shape (groups, n_outputs)
            Bias of each output.
        """
        b = np.asarray(bias, dtype=np.float64)
        cross = self.cross - self.sum_inputs[:, :, None] * b[:, None, :]
        constant = (
            self.sum_squared_targets
            - 2 * float(np.vdot(b, self.sum_targets))
            + self.count * float(np.vdot(b, b))
        )
        return ResponseError(self.gram, cross, constant)

    def error_with_best_bias(self) -> ResponseError:
        """Return the response error of weights beside :meth:`best_bias`.

        Those are the centred moments: the best bias takes the means out.
        """
        s, t = self.sum_inputs, self.sum_targets
        scaled = s[:, :, None] / self.count
        gram = self.gram - scaled * s[:, None, :]
        cross = self.cross - scaled * t[:, None, :]
        constant = self.sum_squared_targets - float(np.vdot(t, t)) / self.count
        still = np.einsum("gpp->gp", gram) <= _ROUNDING * np.einsum(
            "gpp->gp", self.gram
        )
        gram[still] = 0
        gram.swapaxes(1, 2)[still] = 0
        cross[still] = 0
        return ResponseError(gram, cross, max(0.0, constant))

    def best_bias(self, weight: Array64) -> Array64:
        """Return the bias with the least response error for some weights.

        Parameters
        ----------
        weight : ndarray of float64, shape (groups, n_inputs, n_outputs)
            Weights.

        Returns
        -------
        ndarray of float64, shape (groups, n_outputs)
            Mean target minus mean response without bias.
        """
        response = (self.sum_inputs[:, None, :] @ weight)[:, 0]
        bias: Array64 = (self.sum_targets - response) / self.count
        return bias

    def relative_error(self, weight: Array64, bias: npt.ArrayLike) -> float:
        """Return ``||T - T_hat|| / ||T||`` over all samples.

        Parameters
        ----------
        weight : ndarray of float64, shape (groups, n_inputs, n_outputs)
            Weights.
        bias : array, shape (groups, n_outputs)
            Bias.

        Returns
        -------
        float
            The ratio of Frobenius norms; where all targets are zero, the norm
            of the responses.
        """
        error = self.error_with_bias(bias)(weight)
        return float(np.sqrt(error / (self.sum_squared_targets or 1.0)))

    def save(self, path: str | PathLike[str]) -> None:
        """Write the moments as a safetensors file."""
        save_arrays(path, self._tensors(), metadata={})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """Read moments that :meth:`save` wrote.

        Raises
        ------
        ModelFormatError
            If the file is not one, or its arrays do not fit each other.
        OSError
            If it cannot be read.
        """
        tensors, _ = load_arrays(path)
        cross = tensors.get("cross")
        if cross is None or cross.ndim != 3:
            raise ModelFormatError(f"{path}: no second moments of a layer")
        groups, n_inputs, n_outputs = cross.shape
        moments = cls(groups, n_inputs, n_outputs)
        expected = {n: (a.dtype, a.shape) for n, a in moments._tensors().items()}
        found = {n: (a.dtype, a.shape) for n, a in tensors.items()}
        if found != expected:
            raise ModelFormatError(f"{path}: holds {found}, expected {expected}")
        moments.count = int(tensors["count"][0])
        moments.sum_inputs = tensors["sum_inputs"]
        moments.sum_targets = tensors["sum_targets"]
        moments.gram = tensors["gram"]
        moments.cross = tensors["cross"]
        moments.sum_squared_targets = float(tensors["sum_squared_targets"][0])
        return moments

    def _tensors(self) -> dict[str, npt.NDArray[Any]]:
        return {
            "count": np.array([self.count], dtype=np.int64),
            "sum_inputs": self.sum_inputs,
            "sum_targets": self.sum_targets,
            "gram": self.gram,
            "cross": self.cross,
            "sum_squared_targets": np.array([self.sum_squared_targets]),
        }


class Samples:
    """The samples themselves, where they take less room than their second moments.

    It stands in for :class:`SecondMoments` in a fully connected layer with more inputs
    than samples. Kept in float32, the type they are computed in.

    Parameters
    ----------
    n_inputs, n_outputs : int
        Features of the layer.

    Attributes
    ----------
    inputs : ndarray of float32, shape (count, n_inputs)
    targets : ndarray of float32, shape (count, n_outputs)
    """

    def __init__(self, n_inputs: int, n_outputs: int) -> None:
        self._parts = [
            (np.empty((0, n_inputs), np.float32), np.empty((0, n_outputs), np.float32))
        ]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Groups (one), inputs and outputs."""
        inputs, targets = self._parts[0]
        return 1, inputs.shape[1], targets.shape[1]

    @property
    def count(self) -> int:
        """Samples seen."""
        return sum(len(inputs) for inputs, _ in self._parts)

    @property
    def inputs(self) -> npt.NDArray[np.float32]:
        """All inputs."""
        return self._joined()[0]

    @property
    def targets(self) -> npt.NDArray[np.float32]:
        """All target responses."""
        return self._joined()[1]

    @property
    def sum_squared_targets(self) -> float:
        """Squared Euclidean norm of all targets."""
        targets = self.targets.astype(np.float64)
        return float(np.vdot(targets, targets))

    def add_images(
        self,
        inputs: npt.NDArray[Any],
        responses: npt.NDArray[Any],
        geometry: LayerGeometry,
        positions: npt.NDArray[np.intp] | None = None,
    ) -> None:
        """Add a batch; as :meth:`SecondMoments.add_images` with one position each.

        Raises
        ------
        ShapeError
            If the shapes do not fit.
        DatasetError
            If there is an infinity or NaN.
        """
        _, n_inputs, n_outputs = self.shape
        arrays = []
        for name, array, last in (
            ("inputs", inputs, n_inputs),
            ("targets", responses, n_outputs),
        ):
            if array.shape != (len(inputs), last):
                raise ShapeError(
                    f"{name} have shape {array.shape}, expected (samples, {last})"
                )
            _check_finite(name, array)
            arrays.append(np.array(array, dtype=np.float32))
        self._parts.append((arrays[0], arrays[1]))

    def merge(self, other: SecondMoments | Samples) -> None:
        """Add the samples that `other` has seen.

        Raises
        ------
        ShapeError
            If `other` belongs to a layer of another shape.
        """
        if not isinstance(other, Samples) or other.shape != self.shape:
            raise ShapeError(
                f"{type(other).__name__} has shape (groups, inputs, outputs) = "
                f"{other.shape}, expected Samples of {self.shape}"
            )
        self._parts += other._parts

    def error_with_bias(self, bias: npt.ArrayLike) -> SampleError:
        """Return the response error of weights beside a given bias."""
        targets = self.targets - np.asarray(bias, dtype=np.float64).reshape(-1)
        return SampleError(self.inputs.astype(np.float64), targets)

    def error_with_best_bias(self) -> SampleError:
        """Return the response error of weights beside :meth:`best_bias`."""
        inputs, targets = (part.astype(np.float64) for part in self._joined())
        energy = np.einsum("np,np->p", inputs, inputs)
        inputs -= inputs.mean(axis=0)
        inputs[:, np.einsum("np,np->p", inputs, inputs) <= _ROUNDING * energy] = 0
        targets -= targets.mean(axis=0)
        return SampleError(inputs, targets)

    def best_bias(self, weight: Array64) -> Array64:
        """Return the bias, shape (1, outputs), with the least error for weights."""
        inputs, targets = (
            part.mean(axis=0, dtype=np.float64) for part in self._joined()
        )
        bias: Array64 = targets - inputs @ weight[0]
        return bias[None]

    def relative_error(self, weight: Array64, bias: npt.ArrayLike) -> float:
        """Return what :meth:`SecondMoments.relative_error` does."""
        error = self.error_with_bias(bias)
        misses = error.targets - error.inputs @ weight[0]
        squares = float(np.vdot(misses, misses))
        return float(np.sqrt(squares / (self.sum_squared_targets or 1.0)))

    def save(self, path: str | PathLike[str]) -> None:
        """Write the samples as a safetensors file."""
        inputs, targets = self._joined()
        save_arrays(path, {"inputs": inputs, "targets": targets}, metadata={})

    def _joined(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        if len(self._parts) > 1:
            inputs, targets = zip(*self._parts, strict=True)
            self._parts = [(np.concatenate(inputs), np.concatenate(targets))]
        return self._parts[0]


def load_statistics(path: str | PathLike[str]) -> SecondMoments | Samples:
    """Read what :meth:`SecondMoments.save` or :meth:`Samples.save` wrote.

    Raises
    ------
    ModelFormatError
        If the file is neither, or its arrays do not fit each other.
    OSError
        If it cannot be read.
    """
    tensors, _ = load_arrays(path)
    if tensors.keys() != {"inputs", "targets"}:
        return SecondMoments.load(path)
    inputs, targets = tensors["inputs"], tensors["targets"]
    if (
        inputs.dtype != np.float32
        or targets.dtype != np.float32
        or inputs.ndim != 2
        or targets.ndim != 2
        or len(inputs) != len(targets)
    ):
        raise ModelFormatError(
            f"{path}: holds inputs {inputs.dtype} {inputs.shape} and targets "
            f"{targets.dtype} {targets.shape}, expected two float32 matrices "
            "with as many rows"
        )
    samples = Samples(inputs.shape[1], targets.shape[1])
    samples._parts = [(inputs, targets)]
    return samples


def load_merged(paths: Iterable[str | PathLike[str]]) -> SecondMoments | Samples:
    """Read the statistics of all shards of the images, at least one, and add them up.

    One shard at a time is in memory beside the sum.

    Raises
    ------
    ModelFormatError, OSError
        See :func:`load_statistics`.
    ShapeError
        If they belong to different layers.
    """
    first, *others = paths
    merged = load_statistics(first)
    for path in others:
        merged.merge(load_statistics(path))
    return merged


def draw_positions(
    random: np.random.Generator, n_images: int, n_positions: int, n_drawn: int
) -> npt.NDArray[np.intp]:
    """Draw output positions of each image, without repetition.

    Drawing for one batch after another gives the same positions as drawing for
    all images at once.

    Parameters
    ----------
    random : Generator
        Source of randomness.
    n_images, n_positions : int
        Images, and output positions of each.
    n_drawn : int
        Positions to draw per image, at most `n_positions`.

    Returns
    -------
    ndarray of int, shape (n_images, n_drawn)
        Flat indices of the positions, ascending.
    """
    keys = random.random((n_images, n_positions))
    drawn: npt.NDArray[np.intp] = np.argsort(keys, axis=1, kind="stable")[:, :n_drawn]
    return np.sort(drawn, axis=1)


def _check_finite(name: str, array: npt.NDArray[Any]) -> None:
    if not np.isfinite(array).all():
        raise DatasetError(
            f"calibration {name}: got infinity or NaN, expected finite values"
        )


def _as_images(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """View features (N, features) as images (N, features, 1, 1)."""
    return values[:, :, None, None] if values.ndim == 2 else values
