"""Gradient descent on the parameters of a network: the loop that all training shares.

On a CPU the same seed gives the same bits for the same number of XLA's threads: one
per core, unless the environment variable ``NPROC`` said otherwise when JAX started.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax

from qcnn_py import jax_activations
from qcnn_py.checkpoints import Checkpoint
from qcnn_py.config import DescentConfig, OptimizerConfig
from qcnn_py.errors import ConfigError, QcnnError
from qcnn_py.jax_graph import Parameters, batch_moments, values_function
from qcnn_py.network import FloatArray, Network

__all__ = [
    "NOT_LEARNT",
    "Descent",
    "Examples",
    "LatentWeights",
    "Training",
    "build_optimizer",
    "build_schedule",
    "fit",
    "mean_over_batches",
    "without_softmax",
]

logger = logging.getLogger(__name__)

_VALIDATION_BATCH = 1000

# Share of a batch in the running averages of batch normalisation.
_NEW_SHARE = 0.1

# Statistics of batch normalisation: not changed by gradients.
NOT_LEARNT = (".mean", ".variance")


@dataclass(frozen=True)
class Examples:
    """Inputs with their labels.

    Attributes
    ----------
    inputs : ndarray, shape (N, …)
        What `fit`'s ``prepare`` takes, in the simplest case float32 inputs of the
        network.
    labels : ndarray of int64, shape (N,)
        Class numbers.
    """

    inputs: npt.NDArray[Any]
    labels: npt.NDArray[np.int64]


@dataclass(frozen=True)
class LatentWeights:
    """Weights of a few levels, by those that learn in their place.

    A small step may change a latent weight by less than what separates two levels; the
    gradient passes through the rounding (Courbariaux et al., "BinaryConnect", 2015).

    Attributes
    ----------
    bits : int
        1: the sign. More: ``2**bits`` levels ``q * 2**(1 - bits)``, `q` from
        ``-2**(bits - 1)`` to ``2**(bits - 1) - 1``, see
        :func:`qcnn_py.activations.linear`. Latent weights stay in the range of the
        levels.
    """

    bits: int

    @property
    def step(self) -> float:
        """Distance of two levels."""
        return float(2.0 ** (1 - self.bits)) if self.bits > 1 else 2.0

    @property
    def limits(self) -> tuple[float, float]:
        """Lowest and highest level."""
        return (-1.0, 1.0 - self.step) if self.bits > 1 else (-1.0, 1.0)

    def used(self, parameters: Parameters) -> Parameters:
        """Return parameters with the weights that the network computes with."""
        low, high = self.limits
        return self._changed(
            parameters, lambda x: jax_activations.linear(x, self.bits, low, high)
        )

    def constrained(self, parameters: Parameters) -> Parameters:
        """Return parameters with latent weights in the range of the levels."""
        return self._changed(parameters, lambda x: jnp.clip(x, *self.limits))

    @staticmethod
    def _changed(
        parameters: Parameters, change: Callable[[jax.Array], jax.Array]
    ) -> Parameters:
        return {
            name: change(array) if name.endswith(".weight") else array
            for name, array in parameters.items()
        }


def _unchanged(parameters: Parameters) -> Parameters:
    return parameters


class Training:
    """Training of networks that differ in their parameters alone.

    They minimise the cross-entropy of the output. What JAX compiles is compiled once.

    Parameters
    ----------
    network : Network
        Dense; its output are class probabilities (softmax) or logits.
    config : OptimizerConfig
        Optimiser, schedule, regularisation, early stopping.
    latent : LatentWeights, optional
        How the weights that the network computes with come from those that learn; they
        are the same by default.
    noise : bool
        Whether quantised activations get noise in training.
    normalize_batches : bool
        Whether batch normalisation uses the mean and variance of each batch in
        training, and learns the running averages of both. By default they stay as they
        are.

    Raises
    ------
    ConfigError
        If a layer is quantised.
    """

    def __init__(
        self,
        network: Network,
        config: OptimizerConfig,
        *,
        latent: LatentWeights | None = None,
        noise: bool = False,
        normalize_batches: bool = False,
    ) -> None:
        trained = _with_dropout(without_softmax(network), config.dropout)
        compute = values_function(
            trained, noise=noise, normalize_batches=normalize_batches
        )
        norms = [node for node in trained.nodes if node.op == "batch_norm"]
        used = latent.used if latent else _unchanged

        def losses(scores: jax.Array, labels: jax.Array) -> jax.Array:
            flat = scores.reshape(len(labels), -1)
            each: jax.Array = optax.softmax_cross_entropy_with_integer_labels(
                flat, labels
            )
            return each

        def loss(
            learnt: Parameters,
            key: jax.Array,
            fixed: Parameters,
            x: jax.Array,
            labels: jax.Array,
        ) -> tuple[jax.Array, dict[str, jax.Array]]:
            values = compute(used({**fixed, **learnt}), x, key)
            averages = {}
            for norm in norms if normalize_batches else ():
                for part, moment in batch_moments(values[norm.inputs[0]]).items():
                    name = f"{norm.name}.{part}"
                    averages[name] = learnt[name] + _NEW_SHARE * (moment - learnt[name])
            return losses(values[trained.output], labels).mean(), averages

        def assess(
            parameters: Parameters, x: jax.Array, labels: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            values = compute(used(parameters), x, None)
            scores = values[trained.output].reshape(len(x), -1)
            hits = scores.argmax(axis=1) == labels
            return losses(scores, labels).mean(), hits.mean()

        self._config = config
        self._used = used
        self._fixed = () if normalize_batches else NOT_LEARNT
        self._assess = jax.jit(assess)
        self._descent = Descent(
            loss,
            config,
            weight_decay=config.weight_decay,
            constrain=latent.constrained if latent else _unchanged,
        )

    def fit(
        self,
        network: Network,
        train: Examples,
        validation: Examples,
        seed: int,
        prepare: Callable[[npt.NDArray[Any]], FloatArray] | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> tuple[Network, dict[str, Any]]:
        """Train a network.

        Every epoch visits the training examples once in a new order, except for those
        that do not fill a last batch.

        Parameters
        ----------
        network : Network
            The graph of the network that this object was made for.
        train, validation : Examples
            To learn from, and to watch; `validation` may be empty if
            ``config.patience`` is 0.
        seed : int
            Seed of the order of the examples, of dropout and noise.
        prepare : callable, optional
            Makes network inputs of a batch of ``inputs``.
        checkpoint : Checkpoint, optional
            See :meth:`Descent.minimize`.

        Returns
        -------
        network : Network
            The same graph with new parameters: the last ones, or with early stopping
            those of the epoch with the lowest validation loss. Weights are those that
            the network computes with.
        history : dict
            ``epochs``: per epoch its number, ``learning_rate`` at its end, mean
            ``train_loss`` and, with validation examples, ``validation_loss`` and
            ``validation_accuracy`` (0 to 1); the same two under ``initial`` for the
            parameters before; ``best_epoch``: the one whose parameters were kept, 0
            for the initial ones; ``stopped_early``.

        Raises
        ------
        ConfigError
            If early stopping lacks validation examples.
        QcnnError
            If the loss becomes infinite or NaN.
        """
        patience = self._config.patience
        if patience and not len(validation.labels):
            raise ConfigError(
                f"patience is {patience} without validation images, expected 0, or "
                "dataset.validation above 0"
            )
        parameters = {name: jnp.asarray(x) for name, x in network.tensors.items()}
        fixed = {k: v for k, v in parameters.items() if k.endswith(self._fixed)}
        learnt = {k: v for k, v in parameters.items() if k not in fixed}

        def batch(examples: Examples, chosen: Any) -> tuple[Any, Any]:
            inputs = examples.inputs[chosen]
            return prepare(inputs) if prepare else inputs, examples.labels[chosen]

        def validate(learnt: Parameters) -> dict[str, float]:
            if not len(validation.labels):
                return {}
            loss, accuracy = mean_over_batches(
                lambda part: self._assess(
                    {**fixed, **learnt}, *batch(validation, part)
                ),
                len(validation.labels),
            )
            return {"validation_loss": loss, "validation_accuracy": accuracy}

        best, history = self._descent.minimize(
            learnt,
            n_examples=len(train.labels),
            batch=lambda chosen, _: (fixed, *batch(train, chosen)),
            validate=validate,
            seed=seed,
            checkpoint=checkpoint,
        )
        tensors = {name: np.asarray(array) for name, array in self._used(best).items()}
        return network.replace(tensors=tensors), history


def fit(
    network: Network,
    train: Examples,
    validation: Examples,
    config: OptimizerConfig,
    seed: int,
    *,
    noise: bool = False,
    checkpoint: Checkpoint | None = None,
) -> tuple[Network, dict[str, Any]]:
    """Train one network, whose batch normalisation stays as it is.

    Parameters, results and errors are those of :class:`Training` and its ``fit``.
    """
    training = Training(network, config, noise=noise)
    return training.fit(network, train, validation, seed, checkpoint=checkpoint)


class Descent:
    """Gradient descent on a loss, compiled once for any number of starts.

    Parameters
    ----------
    loss : callable
        ``loss(parameters, key, *arrays)``: a scalar, differentiable, and new values
        of parameters that it does not depend on (running averages); `key` is a new
        random key for each step.
    config : DescentConfig
        Optimiser, schedule, early stopping.
    weight_decay : float
        Decoupled decay of the parameters called ``*.weight``.
    constrain : callable
        Brings parameters back to where they may be, after each step.
    """

    def __init__(
        self,
        loss: Callable[..., tuple[jax.Array, Parameters]],
        config: DescentConfig,
        *,
        weight_decay: float = 0.0,
        constrain: Callable[[Parameters], Parameters] = _unchanged,
    ) -> None:
        self._config = config

        def compiled(n_steps: int) -> tuple[Any, ...]:
            schedule = build_schedule(config, n_steps)
            optimizer = build_optimizer(config, schedule, weight_decay)

            @jax.jit
            def step(
                parameters: Parameters,
                state: Any,
                key: jax.Array,
                number: int,
                *arrays: Any,
            ) -> tuple[Parameters, Any, jax.Array]:
                (value, averages), gradient = jax.value_and_grad(loss, has_aux=True)(
                    parameters, jax.random.fold_in(key, number), *arrays
                )
                updates, state = optimizer.update(gradient, state, parameters)
                moved = {**optax.apply_updates(parameters, updates), **averages}
                return constrain(moved), state, value

            return schedule, optimizer, step

        # The step size depends on the number of steps in an epoch.
        self._steps = cache(compiled)

    def minimize(
        self,
        parameters: Parameters,
        *,
        n_examples: int,
        batch: Callable[[npt.NDArray[np.intp], np.random.Generator], tuple[Any, ...]],
        validate: Callable[[Parameters], dict[str, float]],
        seed: int,
        checkpoint: Checkpoint | None = None,
    ) -> tuple[Parameters, dict[str, Any]]:
        """Descend; every epoch visits the examples once in a new order.

        Examples that do not fill a last batch are left out of an epoch.

        Parameters
        ----------
        parameters : mapping of str to array
            Where to start.
        n_examples : int
            Number of examples.
        batch : callable
            ``batch(numbers, rng)``: the arrays of the examples with these numbers.
        validate : callable
            Measures of some parameters, ``validation_loss`` among them, or none.
        seed : int
            Seed of the order, of `batch` and of the keys.
        checkpoint : Checkpoint, optional
            Where to go on from, and to keep how far this got.

        Returns
        -------
        parameters : mapping of str to array
            The last ones, or with early stopping those of the lowest validation loss.
        history : dict
            See :meth:`Training.fit`.

        Raises
        ------
        QcnnError
            If the loss becomes infinite or NaN.
        """
        config = self._config
        batch_size = min(config.batch_size, n_examples)
        n_steps = n_examples // batch_size
        schedule, optimizer, step = self._steps(n_steps)
        progress = _Progress(
            parameters, optimizer.init(parameters), np.random.default_rng(seed)
        )
        if checkpoint is None or not progress.restore(checkpoint):
            progress.initial = validate(parameters)
            if progress.initial:
                logger.info("before: %s", _shown(progress.initial))
        key = jax.random.key(seed)
        while not progress.finished(config):
            order = progress.rng.permutation(n_examples)[: n_steps * batch_size]
            n_done = len(progress.epochs) * n_steps
            step_losses: list[jax.Array] = []
            for chosen in order.reshape(n_steps, batch_size):
                progress.parameters, progress.state, value = step(
                    progress.parameters,
                    progress.state,
                    key,
                    n_done + len(step_losses),
                    *batch(chosen, progress.rng),
                )
                step_losses.append(value)
            entry: dict[str, float] = {
                "epoch": len(progress.epochs) + 1,
                "learning_rate": float(schedule(n_done + n_steps)),
                "train_loss": float(np.mean(step_losses, dtype=np.float64)),
                **validate(progress.parameters),
            }
            logger.info(_shown(entry))
            if not all(map(math.isfinite, entry.values())):
                raise QcnnError(
                    f"training diverged: {entry}, expected finite losses; a lower "
                    "learning_rate or some warmup_epochs may help"
                )
            progress.add(entry, config)
            if checkpoint is not None:
                progress.offer(checkpoint)
        history = {
            "initial": progress.initial,
            "epochs": progress.epochs,
            "best_epoch": progress.best_epoch,
            "stopped_early": len(progress.epochs) < config.epochs,
        }
        return progress.best, history


class _Progress:
    """How far a descent got: all that its next epoch depends on."""

    def __init__(
        self, parameters: Parameters, state: Any, rng: np.random.Generator
    ) -> None:
        self.parameters = parameters
        self.state = state
        self.best = parameters
        self.rng = rng
        self.initial: dict[str, float] = {}
        self.epochs: list[dict[str, float]] = []
        self.best_epoch = 0

    def add(self, entry: dict[str, float], config: DescentConfig) -> None:
        """Add an epoch, and see whether it is the best one."""
        best = self.epochs[self.best_epoch - 1] if self.best_epoch else self.initial
        self.epochs.append(entry)
        if not config.patience or (
            entry["validation_loss"] < best.get("validation_loss", math.inf)
        ):
            self.best_epoch, self.best = len(self.epochs), self.parameters

    def finished(self, config: DescentConfig) -> bool:
        """Whether there is no next epoch."""
        n_epochs = len(self.epochs)
        waited = config.patience and n_epochs - self.best_epoch >= config.patience
        return n_epochs >= config.epochs or bool(waited)

    def _tree(self) -> Any:
        return self.parameters, self.state, self.best

    def offer(self, checkpoint: Checkpoint) -> None:
        """Have this kept."""
        record = {
            "initial": self.initial,
            "epochs": self.epochs,
            "best_epoch": self.best_epoch,
            "rng": self.rng.bit_generator.state,
        }
        checkpoint.offer(
            [np.asarray(leaf) for leaf in jax.tree.leaves(self._tree())], record
        )

    def restore(self, checkpoint: Checkpoint) -> bool:
        """Become what was kept. Returns whether there is something."""
        kept = checkpoint.latest()
        if kept is None:
            return False
        arrays, record = kept
        tree = self._tree()
        leaves = [
            jnp.asarray(array.reshape(leaf.shape))
            for array, leaf in zip(arrays, jax.tree.leaves(tree), strict=True)
        ]
        restored = jax.tree.unflatten(jax.tree.structure(tree), leaves)
        self.parameters, self.state, self.best = restored
        self.initial = record["initial"]
        self.epochs = record["epochs"]
        self.best_epoch = record["best_epoch"]
        self.rng.bit_generator.state = record["rng"]
        logger.info("goes on after epoch %d, from a checkpoint", len(self.epochs))
        return True


def _shown(measures: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in measures.items())


def mean_over_batches(
    measure: Callable[[slice], Sequence[Any]], n_examples: int
) -> list[float]:
    """Return the means of some measures over all examples, taken in batches.

    Parameters
    ----------
    measure : callable
        Means over the examples of a slice.
    n_examples : int
        Number of examples, at least one.
    """
    starts = range(0, n_examples, _VALIDATION_BATCH)
    parts = [measure(slice(i, i + _VALIDATION_BATCH)) for i in starts]
    weights = [min(_VALIDATION_BATCH, n_examples - i) for i in starts]
    means = np.average(np.array(parts, np.float64), axis=0, weights=weights)
    return [float(mean) for mean in means]


def without_softmax(network: Network) -> Network:
    """Return the network up to its logits."""
    softmax = network.final_softmax
    return network if softmax is None else network.truncated(softmax.inputs[0])


def _with_dropout(network: Network, rate: float | None) -> Network:
    if rate is None:
        return network
    dropouts = [node for node in network.nodes if node.op == "dropout"]
    return network.replace(
        nodes={node.name: node.with_attributes(rate=rate) for node in dropouts}
    )


def build_schedule(config: DescentConfig, n_steps: int) -> optax.Schedule:
    """Return the step size as a function of the steps done, `n_steps` an epoch."""
    warmup = config.warmup_epochs * n_steps
    rate = config.learning_rate
    match config.schedule:
        case "constant":
            main = optax.constant_schedule(rate)
        case "cosine":
            n_main = max(1, config.epochs * n_steps - warmup)
            main = optax.cosine_decay_schedule(rate, n_main)
        case "step":
            main = optax.exponential_decay(
                rate,
                transition_steps=config.step_epochs * n_steps,
                decay_rate=config.step_factor,
                staircase=True,
            )
    if not warmup:
        return main
    return optax.join_schedules(
        [optax.linear_schedule(0.0, rate, warmup), main], [warmup]
    )


def build_optimizer(
    config: DescentConfig, schedule: optax.Schedule, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """Return Adam or Nesterov's method; weights decay with the step size."""
    direction = (
        optax.scale_by_adam()
        if config.optimizer == "adam"
        else optax.trace(config.momentum, nesterov=True)
    )

    def decayed(parameters: Parameters) -> dict[str, bool]:
        return {name: name.endswith(".weight") for name in parameters}

    return optax.chain(
        direction,
        optax.add_decayed_weights(weight_decay, decayed),
        optax.scale_by_learning_rate(schedule),
    )
