"""Training a quantised network to give back what the original one puts out.

Codes stay as they are, so size and speed do, too; codebooks, biases and the weights of
layers left dense learn by back-propagation. The original network is the teacher
(Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015), so no
labels are needed.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from qcnn_py.config import DistillConfig
from qcnn_py.errors import DatasetError, ShapeError
from qcnn_py.fitting import NOT_LEARNT, mean_over_batches, minimize, without_softmax
from qcnn_py.jax_graph import Parameters, decoding_function, forward_function
from qcnn_py.network import FloatArray, Network, rounded_codebooks

__all__ = ["augmented", "distill_codebooks"]


def distill_codebooks(
    original: Network,
    quantized: Network,
    images: FloatArray,
    config: DistillConfig,
    seed: int = 0,
) -> tuple[Network, dict[str, Any]]:
    """Lower the divergence of a quantised network's outputs from the original's.

    The divergence is that of Kullback and Leibler between the class probabilities at
    a temperature, times the temperature's square. Each tensor is trained relative to
    its root mean square, so that one step size suits all layers.

    Parameters
    ----------
    original : Network
        Dense; its outputs are what is wanted.
    quantized : Network
        Same inputs and outputs.
    images : ndarray of float32, shape (N, C, H, W)
        Preprocessed images, at least two.
    config : DistillConfig
        Optimiser, schedule, early stopping, temperature, augmentation.
    seed : int
        Seed of the held-out images, the order of the others and their augmentation.

    Returns
    -------
    network : Network
        `quantized` with other codebooks, biases and dense weights: those, rounded as
        they are stored, with the lowest divergence on the held-out images. That may
        be `quantized` itself.
    history : dict
        See `qcnn_py.fitting.fit`; losses are divergences, ``validation_loss`` that on
        the held-out images.

    Raises
    ------
    DatasetError
        If there are less than two images.
    ShapeError
        If the networks or the images do not fit together.
    ConfigError
        If `original` is quantised.
    QcnnError
        If the divergence becomes infinite or NaN.
    """
    teacher, student = without_softmax(original), without_softmax(quantized)
    for what, got, expected in (
        ("quantised network's inputs", student.input_shape, teacher.input_shape),
        ("quantised network's outputs", _outputs(student), _outputs(teacher)),
        ("images", images.shape[1:], teacher.input_shape),
    ):
        if got != expected:
            raise ShapeError(
                f"the {what} have shape {got}, expected {expected} like the original's"
            )
    if not config.epochs:
        return quantized, {
            "initial": {},
            "epochs": [],
            "best_epoch": 0,
            "stopped_early": False,
        }
    if len(images) < 2:
        raise DatasetError(
            f"got {len(images)} images to distil with, expected at least 2: one to "
            "learn from and one held out"
        )
    n_held_out = min(max(1, round(config.held_out * len(images))), len(images) - 1)
    order = np.random.default_rng(seed).permutation(len(images))
    held_out, lessons = images[order[:n_held_out]], images[order[n_held_out:]]

    wanted_logits = forward_function(teacher)
    logits = forward_function(student.decoded())
    decoded = decoding_function(student)
    teacher_parameters = {k: jnp.asarray(v) for k, v in teacher.tensors.items()}
    parameters = {k: v for k, v in student.tensors.items() if not k.endswith(".codes")}
    fixed = {k: v for k, v in parameters.items() if k.endswith(NOT_LEARNT)}
    scales = {k: _scale(v) for k, v in parameters.items() if k not in fixed}

    def divergence(parameters: Parameters, x: jax.Array) -> jax.Array:
        p, q = (
            jax.nn.log_softmax(scores.reshape(len(x), -1) / config.temperature)
            for scores in (
                wanted_logits(teacher_parameters, x, None),
                logits(decoded(parameters), x, None),
            )
        )
        each = jnp.sum(jnp.exp(p) * (p - q), axis=1)
        return each.mean() * config.temperature**2

    def absolute(learnt: Parameters) -> dict[str, Any]:
        return fixed | {name: array * scales[name] for name, array in learnt.items()}

    def loss(learnt: Parameters, _: jax.Array, x: jax.Array) -> jax.Array:
        return divergence(absolute(learnt), x)

    def stored(learnt: Parameters) -> dict[str, npt.NDArray[Any]]:
        tensors = {name: np.asarray(array) for name, array in absolute(learnt).items()}
        for layer in student.layers:
            if layer.codebook_bits is not None:
                name = f"{layer.name}.codebooks"
                tensors[name] = rounded_codebooks(tensors[name], layer.codebook_bits)
        return tensors

    assess = jax.jit(divergence)

    def validate(learnt: Parameters) -> dict[str, float]:
        tensors = stored(learnt)
        (value,) = mean_over_batches(
            lambda part: [assess(tensors, held_out[part])], n_held_out
        )
        return {"validation_loss": value}

    best, history = minimize(
        loss,
        {name: parameters[name] / scale for name, scale in scales.items()},
        n_examples=len(lessons),
        batch=lambda chosen, rng: (
            augmented(lessons[chosen], config.flip, config.shift, rng),
        ),
        validate=validate,
        config=config,
        seed=seed,
    )
    if not history["best_epoch"]:
        return quantized, history
    return quantized.replace(tensors=stored(best)), history


def augmented(
    images: FloatArray, flip: bool, shift: int, rng: np.random.Generator
) -> FloatArray:
    """Mirror and move images at random.

    Parameters
    ----------
    images : ndarray of float32, shape (N, C, H, W)
        Images.
    flip : bool
        Mirror each image with a probability of one half.
    shift : int
        Move each image by up to so many pixels up or down and left or right; its
        border pixels fill what that leaves free.
    rng : numpy.random.Generator
        Source of randomness.

    Returns
    -------
    ndarray of float32, shape (N, C, H, W)
        New images, or `images` if nothing is to be done.
    """
    n = len(images)
    if flip:
        mirrored = rng.random(n) < 0.5
        images = np.where(mirrored[:, None, None, None], images[..., ::-1], images)
    if shift:
        beside = (shift, shift)
        padded = np.pad(images, ((0, 0), (0, 0), beside, beside), mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(
            padded, images.shape[2:], axis=(2, 3)
        )
        rows, columns = rng.integers(0, 2 * shift + 1, (2, n))
        images = windows[np.arange(n), :, rows, columns]
    return images


def _outputs(network: Network) -> tuple[int, ...]:
    return network.shapes[network.output]


def _scale(array: npt.NDArray[Any]) -> np.float32:
    """Return the root mean square, or 1 if that is 0."""
    return np.float32(np.sqrt(np.mean(np.square(array, dtype=np.float64))) or 1.0)
