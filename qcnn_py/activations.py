"""Quantisers of activations: linear, log2 and sign, in NumPy.

They are the reference of the operations ``quantize_linear``, ``quantize_log2`` and
``sign`` (``docs/format.md``), which give the same float32 numbers in the engine, and of
their differentiable forms in :mod:`qcnn_py.jax_activations`. Zeros are +0.

``noise`` makes them stochastic, as in training: the value moves by a random amount with
mean zero, as wide as the distance of two levels, before it is rounded. The expectation
of the result is then the value itself, as long as that lies between two levels.
"""

from __future__ import annotations

from math import frexp, isfinite
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qcnn_py.errors import ConfigError, ShapeError

__all__ = ["LinearLevels", "Log2Levels", "linear", "log2", "sign"]

FloatArray = npt.NDArray[np.float32]

# Magnitudes whose log2 rounds up to the next integer have at least this mantissa: the
# float32 number nearest to the square root of 2.
SQRT2 = np.float32(np.sqrt(2.0))

_LEAST_NORMAL_EXPONENT = -126


class LinearLevels(NamedTuple):
    """Levels of a linear quantiser: the multiples of `step` from `low` to `high`.

    Where `low` or `high` are no multiples of it, they are levels, too.
    """

    low: np.float32
    high: np.float32
    step: np.float32

    @classmethod
    def of(cls, bits: int, low: float, high: float) -> LinearLevels:
        """Return the levels: ``step = (high - low) / (2**bits - 1)`` in float32.

        Raises
        ------
        ConfigError
            If `bits` is not 2 to 16, or the limits are not finite numbers, the lower
            one first, that far apart that float32 knows the step between levels.
        """
        _check_bits(bits, 2, 16)
        if not (isfinite(low) and isfinite(high) and low < high):
            raise ConfigError(
                f"low is {low} and high is {high}, expected finite numbers, the lower "
                "one first"
            )
        with np.errstate(over="ignore", under="ignore"):
            first, last = np.float32(low), np.float32(high)
            step = (last - first) / np.float32(2**bits - 1)
        if not (np.isfinite(step) and step >= np.finfo(np.float32).tiny):
            raise ConfigError(
                f"low is {low} and high is {high}, which gives a step of {step} with "
                f"{bits} bits, expected a normal float32 number"
            )
        return cls(first, last, step)


class Log2Levels(NamedTuple):
    """Levels of a log2 quantiser: 0 and plus or minus ``2**e``, least <= e <= most."""

    least: int
    most: int

    @property
    def threshold(self) -> np.float32:
        """Least magnitude that is not rounded to 0; it may be subnormal."""
        return np.float32(float(SQRT2) * 2.0 ** (self.least - 1))

    @classmethod
    def of(cls, bits: int, high: float) -> Log2Levels:
        """Return the levels: ``2**most = high`` and ``2**(bits - 1) - 1`` exponents.

        Raises
        ------
        ConfigError
            If `bits` is not 2 to 8, `high` is no power of two, or a level is no normal
            float32 number.
        """
        _check_bits(bits, 2, 8)
        # Attributes of networks are the shortest decimals of float32 numbers.
        with np.errstate(over="ignore"):
            largest = float(np.float32(high))
        mantissa, exponent = frexp(largest) if isfinite(largest) else (0.0, 0)
        if mantissa != 0.5:
            raise ConfigError(f"high is {high}, expected a power of two")
        most = exponent - 1
        least = most - (2 ** (bits - 1) - 1) + 1
        if least < _LEAST_NORMAL_EXPONENT or most > 127:
            raise ConfigError(
                f"high is {high}, which gives levels from 2**{least} to 2**{most} with "
                f"{bits} bits, expected normal float32 numbers"
            )
        return cls(least, most)


def is_sign(bits: int, low: float, high: float) -> bool:
    """Return whether linear levels are those of the sign: one bit, -1 and 1.

    Raises
    ------
    ConfigError
        If there is one bit with another range.
    """
    if bits == 1 and (low, high) != (-1, 1):
        raise ConfigError(
            f"low is {low} and high is {high} with 1 bit, expected -1 and 1: one bit "
            "is the sign"
        )
    return bits == 1


def linear(
    x: npt.ArrayLike,
    bits: int,
    low: float,
    high: float,
    noise: np.random.Generator | None = None,
) -> FloatArray:
    """Round to the nearest of evenly spaced levels.

    ``clip(rint(x / step) * step, low, high) + 0`` with
    ``step = (high - low) / (2**bits - 1)``, in float32 operation by operation, halves
    to the even multiple (Hubara et al., "Quantized Neural Networks", 2016, section 3;
    the step is where their note prints the number of bits). There are ``2**bits``
    levels if `low` and `high` are multiples of the step, for example 0 and anything, or
    ``-2**(bits - 1) * step`` and ``(2**(bits - 1) - 1) * step``.

    Parameters
    ----------
    x : array of float32
        Values of any shape; float64 is converted. Infinities give `low` and `high`,
        NaN stays NaN.
    bits : int
        1 to 16; 1 is :func:`sign`.
    low, high : float
        Range; -1 and 1 where `bits` is 1, which has no other levels.
    noise : Generator, optional
        Adds noise of U(-1/2, 1/2) steps before rounding. The mean of the result is `x`
        where it lies between two multiples of the step that are in the range.

    Returns
    -------
    ndarray of float32
        Of the shape of `x`.

    Raises
    ------
    ConfigError
        If `bits` or the range are not as above, or the step is no normal number.
    ShapeError
        If `x` does not hold floating-point numbers.
    """
    if is_sign(bits, low, high):
        return sign(x, noise)
    levels = LinearLevels.of(bits, low, high)
    values = _floats(x)
    # What overflows is clipped.
    with np.errstate(over="ignore", under="ignore"):
        steps = values / levels.step
        if noise is not None:
            steps += _uniform(noise, steps.shape) - np.float32(0.5)
        rounded = np.rint(steps) * levels.step
    return np.asarray(np.clip(rounded, levels.low, levels.high) + np.float32(0))


def log2(
    x: npt.ArrayLike,
    bits: int,
    high: float = 1.0,
    noise: np.random.Generator | None = None,
) -> FloatArray:
    """Round to zero or plus or minus the power of two nearest in the logarithm.

    ``sign(x) * 2**round(log2|x|)``, 0 for 0 (AP2 of Hubara et al., "Quantized Neural
    Networks", 2016), limited to the ``n = 2**(bits - 1) - 1`` powers up to `high`: a
    code has a sign and zero or one of `n` exponents. What would round to less is 0.
    Whether an exponent rounds up is told by the mantissa: at least ``SQRT2`` does.

    Parameters
    ----------
    x : array of float32
        Values of any shape; float64 is converted. Infinities give plus and minus
        `high`, NaN stays NaN.
    bits : int
        2 to 8.
    high : float
        Largest level, a power of two.
    noise : Generator, optional
        Rounds up or down at random instead, with probabilities linear in the value
        between the two neighbouring levels (noise as wide as their distance, before
        rounding to the nearest in value). The mean of the result is `x` where ``|x|``
        is at most `high`.

    Returns
    -------
    ndarray of float32
        Of the shape of `x`.

    Raises
    ------
    ConfigError
        If `bits` or `high` are not as above, or a level is no normal number.
    ShapeError
        If `x` does not hold floating-point numbers.
    """
    levels = Log2Levels.of(bits, high)
    values = _floats(x)
    magnitudes = np.minimum(np.abs(values), np.float32(high))
    least = np.float32(2.0**levels.least)
    # In [1/2, 1) times a power of two; NaN has an exponent without meaning.
    mantissas, exponents = np.frexp(magnitudes)
    if noise is None:
        exponents = exponents - (mantissas * 2 < SQRT2)
        power = np.ldexp(np.float32(1), np.clip(exponents, levels.least, levels.most))
        rounded = np.where(magnitudes < levels.threshold, np.float32(0), power)
    else:
        # Floor and distance of the levels around each magnitude.
        floor = np.ldexp(np.float32(1), np.maximum(exponents - 1, levels.least))
        floor = np.where(magnitudes < least, np.float32(0), floor)
        gap = np.maximum(floor, least)
        up = _uniform(noise, values.shape) < (magnitudes - floor) / gap
        rounded = floor + np.where(up, gap, np.float32(0))
    signed = np.copysign(rounded, values) + np.float32(0)
    return np.asarray(np.where(np.isnan(values), values, signed))


def sign(x: npt.ArrayLike, noise: np.random.Generator | None = None) -> FloatArray:
    """Return 1 where x is at least 0 (-0.0 included), else -1.

    Parameters
    ----------
    x : array of float32
        Values of any shape; float64 is converted. NaN stays NaN.
    noise : Generator, optional
        Adds noise of U(-1, 1) first, which gives 1 with the probability
        ``clip((x + 1) / 2, 0, 1)`` and the mean ``clip(x, -1, 1)`` (Courbariaux et
        al., "BinaryNet", 2016).

    Returns
    -------
    ndarray of float32
        Of the shape of `x`.

    Raises
    ------
    ShapeError
        If `x` does not hold floating-point numbers.
    """
    values = _floats(x)
    if noise is not None:
        values = values + (2 * _uniform(noise, values.shape) - 1)
    signs = np.where(values >= 0, np.float32(1), np.float32(-1))
    return np.asarray(np.where(np.isnan(values), values, signs))


def _floats(x: npt.ArrayLike) -> FloatArray:
    values = np.asarray(x)
    if values.dtype.kind != "f":
        raise ShapeError(f"x has dtype {values.dtype}, expected float32")
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def _uniform(noise: np.random.Generator, shape: tuple[int, ...]) -> FloatArray:
    return noise.random(shape, np.float32)


def _check_bits(bits: Any, least: int, most: int) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise ConfigError(f"bits is {bits!r}, expected an integer")
    if not least <= bits <= most:
        raise ConfigError(f"bits is {bits}, expected {least} to {most}")
