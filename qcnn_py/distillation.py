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

from qcnn_py.augmentation import augmented
from qcnn_py.checkpoints import Checkpoint
from qcnn_py.config import DistillConfig
from qcnn_py.errors import DatasetError, ShapeError
from qcnn_py.fitting import NOT_LEARNT, Descent, mean_over_batches, without_softmax
from qcnn_py.jax_graph import Parameters, decoding_function, values_function
from qcnn_py.network import FloatArray, Network, rounded_codebooks

__all__ = ["distill_codebooks"]

# Keeps the relative error of what is always 0 finite.
_TINY = 1e-30


def distill_codebooks(
    original: Network,
    quantized: Network,
    images: FloatArray,
    config: DistillConfig,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
) -> tuple[Network, dict[str, Any]]:
    """Bring what a quantised network computes closer to the original.

    The loss is the divergence of Kullback and Leibler between the class probabilities
    at a temperature, times the temperature's square; added to it, with
    ``response_weight``, is the squared error of what the layers read, relative to its
    square and averaged over the layers. Few images say more that way. Each tensor is
    trained relative to its root mean square, so that one step size suits all layers.

    Parameters
    ----------
    original : Network
        Dense; its outputs are what is wanted.
    quantized : Network
        The same nodes, some of them quantised, and quantisers of activations.
    images : ndarray of float32, shape (N, C, H, W)
        Preprocessed images, at least two.
    config : DistillConfig
        Optimiser, schedule, early stopping, temperature, augmentation.
    seed : int
        Seed of the held-out images, the order of the others and their augmentation.
    checkpoint : Checkpoint, optional
        Where to go on from, and to keep how far this got.

    Returns
    -------
    network : Network
        `quantized` with other codebooks, biases and dense weights: those, rounded as
        they are stored, with the lowest loss on the held-out images. That may be
        `quantized` itself.
    history : dict
        See `qcnn_py.fitting.Training.fit`; ``validation_loss`` is that on the held-out
        images.

    Raises
    ------
    DatasetError
        If there are less than two images.
    ShapeError
        If the networks or the images do not fit together.
    ConfigError
        If `original` is quantised.
    QcnnError
        If the loss becomes infinite or NaN.
    """
    teacher, student = without_softmax(original), without_softmax(quantized)
    wanted_shapes = dict(teacher.shapes)
    shapes = {k: v for k, v in student.shapes.items() if k in wanted_shapes}
    for what, got, expected in (
        ("quantised network has values of shape", shapes, wanted_shapes),
        ("images have shape", images.shape[1:], teacher.input_shape),
    ):
        if got != expected:
            raise ShapeError(
                f"the {what} {got}, expected {expected} like the original network"
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
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(images))
    lessons = images[order[n_held_out:]]
    # Augmented, too: as they are, the quantiser may have seen them.
    held_out = augmented(images[order[:n_held_out]], config.flip, config.shift, rng)

    wanted_values = values_function(teacher)
    values = values_function(student.decoded())
    decoded = decoding_function(student)
    teacher_parameters = {k: jnp.asarray(v) for k, v in teacher.tensors.items()}
    parameters = {k: v for k, v in student.tensors.items() if not k.endswith(".codes")}
    fixed = {k: v for k, v in parameters.items() if k.endswith(NOT_LEARNT)}
    scales = {k: _scale(v) for k, v in parameters.items() if k not in fixed}
    # What each layer reads, in both: with activations quantised it has another name.
    read = {
        tuple(network.node(layer.name).inputs[0] for network in (student, teacher))
        for layer in student.layers
    }
    read -= {(student.input_name, teacher.input_name)}

    def distance(parameters: Parameters, x: jax.Array) -> jax.Array:
        wanted = wanted_values(teacher_parameters, x, None)
        got = values(decoded(parameters), x, None)
        p, q = (
            jax.nn.log_softmax(
                scores[student.output].reshape(len(x), -1) / config.temperature
            )
            for scores in (wanted, got)
        )
        divergence = jnp.sum(jnp.exp(p) * (p - q), axis=1).mean()
        loss = divergence * config.temperature**2
        for value, original_value in sorted(read):
            target = wanted[original_value]
            error = jnp.sum(jnp.square(got[value] - target))
            share = error / (jnp.sum(jnp.square(target)) + _TINY)
            loss += config.response_weight / len(read) * share
        return loss

    def absolute(learnt: Parameters) -> dict[str, Any]:
        return fixed | {name: array * scales[name] for name, array in learnt.items()}

    def loss(
        learnt: Parameters, _: jax.Array, x: jax.Array
    ) -> tuple[jax.Array, Parameters]:
        return distance(absolute(learnt), x), {}

    def stored(learnt: Parameters) -> dict[str, npt.NDArray[Any]]:
        tensors = {name: np.asarray(array) for name, array in absolute(learnt).items()}
        for layer in student.layers:
            if layer.codebook_bits is not None:
                name = f"{layer.name}.codebooks"
                tensors[name] = rounded_codebooks(tensors[name], layer.codebook_bits)
        return tensors

    assess = jax.jit(distance)

    def validate(learnt: Parameters) -> dict[str, float]:
        tensors = stored(learnt)
        (value,) = mean_over_batches(
            lambda part: [assess(tensors, held_out[part])], n_held_out
        )
        return {"validation_loss": value}

    best, history = Descent(loss, config).minimize(
        {k: jnp.asarray(parameters[k] / scale) for k, scale in scales.items()},
        n_examples=len(lessons),
        batch=lambda chosen, rng: (
            augmented(lessons[chosen], config.flip, config.shift, rng),
        ),
        validate=validate,
        seed=seed,
        checkpoint=checkpoint,
    )
    if not history["best_epoch"]:
        return quantized, history
    return quantized.replace(tensors=stored(best)), history


def _scale(array: npt.NDArray[Any]) -> np.float32:
    """Return the root mean square, or 1 if that is 0."""
    return np.float32(np.sqrt(np.mean(np.square(array, dtype=np.float64))) or 1.0)
