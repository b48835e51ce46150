"""The quantisers of :mod:`qcnn_py.activations` as differentiable JAX functions.

They give the numbers of the NumPy reference, and pass gradients on as if they did not
round (straight-through estimator of Hinton; Bengio et al., "Estimating or Propagating
Gradients Through Stochastic Neurons", 2013): unchanged where the value is in the
quantiser's range, 0 where it would be clipped, be there noise or not.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from qcnn_py.activations import SQRT2, LinearLevels, Log2Levels, is_sign

__all__ = ["linear", "log2", "sign"]


def linear(
    x: jax.Array, bits: int, low: float, high: float, key: jax.Array | None = None
) -> jax.Array:
    """Round to the nearest of evenly spaced levels.

    Parameters
    ----------
    x : array of float32
        Values of any shape.
    bits, low, high
        See :func:`qcnn_py.activations.linear`; the gradient passes from `low` to
        `high`.
    key : PRNG key, optional
        Where noise comes from; without one there is none.

    Raises
    ------
    ConfigError
        As the NumPy reference.
    """
    if is_sign(bits, low, high):
        return sign(x, key)
    levels = LinearLevels.of(bits, low, high)
    # Of one number behind a barrier, or a constant, XLA would multiply by the
    # reciprocal, and halves would be others.
    divisors = jax.lax.optimization_barrier(  # type: ignore[no-untyped-call]
        jnp.full(x.shape, levels.step)
    )
    steps = jax.lax.stop_gradient(x) / divisors
    if key is not None:
        steps += jax.random.uniform(key, x.shape, minval=-0.5, maxval=0.5)
    rounded = jnp.clip(jnp.rint(steps) * levels.step, levels.low, levels.high)
    return _straight_through(rounded, x, (levels.low <= x) & (x <= levels.high))


def log2(
    x: jax.Array, bits: int, high: float = 1.0, key: jax.Array | None = None
) -> jax.Array:
    """Round to zero or plus or minus the power of two nearest in the logarithm.

    Parameters
    ----------
    x : array of float32
        Values of any shape.
    bits, high
        See :func:`qcnn_py.activations.log2`; the gradient passes where ``|x|`` is at
        most `high`.
    key : PRNG key, optional
        Where noise comes from; without one there is none.

    Raises
    ------
    ConfigError
        As the NumPy reference.
    """
    levels = Log2Levels.of(bits, high)
    values = jax.lax.stop_gradient(x)
    magnitudes = jnp.minimum(jnp.abs(values), high)
    mantissas, exponents = jnp.frexp(magnitudes)
    if key is None:
        exponents -= mantissas * 2 < SQRT2
        # Not by the threshold: it may be subnormal, which XLA takes for 0.
        zero = (magnitudes == 0) | (exponents < levels.least)
        rounded = jnp.where(zero, 0, _power_of_two(exponents, levels))
    else:
        least = 2.0**levels.least
        floor = jnp.where(magnitudes < least, 0, _power_of_two(exponents - 1, levels))
        gap = jnp.maximum(floor, least)
        up = jax.random.uniform(key, x.shape) < (magnitudes - floor) / gap
        rounded = floor + jnp.where(up, gap, 0)
    signed = jnp.where(jnp.isnan(values), values, jnp.copysign(rounded, values))
    return _straight_through(signed, x, jnp.abs(x) <= high)


def sign(x: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Return 1 where x is at least 0, else -1; NaN stays NaN.

    Parameters
    ----------
    x : array of float32
        Values of any shape; the gradient passes where ``|x|`` is at most 1.
    key : PRNG key, optional
        Where noise comes from, see :func:`qcnn_py.activations.sign`; without one there
        is none.
    """
    values = jax.lax.stop_gradient(x)
    if key is not None:
        values += jax.random.uniform(key, x.shape, minval=-1, maxval=1)
    signs = jnp.where(values >= 0, 1.0, -1.0)
    signs = jnp.where(jnp.isnan(values), values, signs)
    return _straight_through(signs, x, jnp.abs(x) <= 1)


def _power_of_two(exponents: jax.Array, levels: Log2Levels) -> jax.Array:
    """Return 2 to the power of the exponents, limited to those of the levels."""
    # Exponents are those of normal numbers, so the bits can be written down; exp2 would
    # not be exact.
    limited = jnp.clip(exponents, levels.least, levels.most).astype(jnp.int32)
    return jax.lax.bitcast_convert_type((limited + 127) << 23, jnp.float32)


@jax.custom_jvp
def _straight_through(quantized: jax.Array, x: jax.Array, inside: Any) -> jax.Array:
    """Return `quantized` with the gradient of `x` where that is inside the range."""
    return quantized


@_straight_through.defjvp
def _straight_through_jvp(
    primals: tuple[jax.Array, jax.Array, Any], tangents: tuple[Any, jax.Array, Any]
) -> tuple[jax.Array, jax.Array]:
    quantized, _, inside = primals
    return quantized, jnp.where(inside, tangents[1], 0)
