"""The damped response error as a quadratic of the weights, in two forms.

Both serve a window of rows at a time: its Hessian, the *residual* (negative half
gradient) and the change of its weights. :class:`MomentQuadratic` keeps the Hessian
``H`` itself, p x p. :class:`SampleQuadratic` keeps the n samples that it is made of,
which is smaller and faster where there are fewer samples than inputs: fully connected
layers, whose inputs are counted in thousands and have one sample per image.

Both can also *eliminate* windows one after another: what is left of the objective for
a window when the windows before it are settled and those after it will do their best
is a quadratic again. Choosing weights by that one and passing the error on is the
error feedback of GPTQ (Frantar et al., ICLR 2023), without its inverse of ``H``: it is
Babai's nearest plane in the lattice of the Cholesky factor. With targets from the
original network and inputs from the quantised one, its start is the shifted optimum
``H^-1 G`` instead of the original weights (GPTAQ, Li et al., ICML 2025).

Weights are (groups, outputs, rows), contiguous: what is done to an output does not
touch another one.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from scipy.linalg import cholesky, solve_triangular
from scipy.linalg import inv as inverse

from qcnn_py.statistics import Array64, ResponseError, SampleError

__all__ = ["Elimination", "MomentQuadratic", "Quadratic", "SampleQuadratic"]

# Least damping. Keeps Gram matrices of dead or duplicate inputs well away from
# singular in float64, and is far too small to show in a response.
_LEAST_DAMPING = 1e-8


class Elimination(Protocol):
    """Windows of rows, settled one after another from the first row on."""

    def plane(self, rows: slice) -> tuple[Array64, Array64]:
        """Return Hessian and minimiser of what the next window still decides.

        Shapes (groups, w, w) and (groups, outputs, w).
        """

    def settle(self, rows: slice, weight: Array64) -> None:
        """Fix the weights of that window."""


class Quadratic(Protocol):
    """Sum over groups and outputs of ``w' H w - 2 g' w``, plus a constant.

    Attributes
    ----------
    weight : ndarray of float64, shape (groups, outputs, p)
        Where the quadratic is looked at; changed by :meth:`move` only.
    """

    weight: Array64

    def block(self, rows: slice) -> Array64:
        """Return the Hessian of a window, shape (groups, w, w)."""

    def residual(self, rows: slice) -> Array64:
        """Return ``g - H w`` of a window, shape (groups, outputs, w)."""

    def move(self, rows: slice, weight: Array64) -> None:
        """Set the weights of a window."""

    def value(self) -> float:
        """Return the value at the weights."""

    def eliminate(self) -> Elimination:
        """Begin an elimination; it reads the quadratic and leaves it alone."""


def _ridge(diagonal: Array64, damping: float) -> Array64:
    """Return the damping of each group, from (groups, p) second moments."""
    ridge: Array64 = max(damping, _LEAST_DAMPING) * diagonal.mean(axis=1)
    # Inputs that never vary: the response says nothing, the weights decide.
    ridge[ridge == 0] = 1.0
    return ridge


class MomentQuadratic:
    """The damped response error, from second moments.

    Parameters
    ----------
    error : ResponseError
        Response error.
    original : ndarray of float64, shape (groups, outputs, p)
        Weights to stay near, rows ordered by `order`.
    order : ndarray of int, shape (p,)
        Row of `error` that comes to each place.
    damping : float
        ``damping * mean(diag H) * |w - original|^2`` is added.
    """

    def __init__(
        self, error: ResponseError, original: Array64, order: Array64, damping: float
    ) -> None:
        self._gram = error.gram[:, order[:, None], order]
        diagonal = np.einsum("gpp->gp", self._gram)
        ridge = _ridge(diagonal, damping)
        diagonal += ridge[:, None]
        self._cross = np.ascontiguousarray(error.cross[:, order].swapaxes(1, 2))
        self._cross += ridge[:, None, None] * original
        energy = np.einsum("gop,gop->g", original, original)
        self._constant = error.constant + float(ridge @ energy)
        self.weight = original.copy()
        self._residual = self._cross - self.weight @ self._gram

    def block(self, rows: slice) -> Array64:
        """Return the Hessian of a window."""
        return self._gram[:, rows, rows].copy()

    def residual(self, rows: slice) -> Array64:
        """Return the residual of a window."""
        return self._residual[:, :, rows].copy()

    def move(self, rows: slice, weight: Array64) -> None:
        """Set the weights of a window."""
        change = weight - self.weight[:, :, rows]
        self._residual -= change @ self._gram[:, rows]
        self.weight[:, :, rows] = weight

    def value(self) -> float:
        """Return the damped squared response error."""
        # w' H w = w' (g - r) with the residual r.
        explained = np.vdot(self.weight, self._cross)
        explained += np.vdot(self.weight, self._residual)
        return max(0.0, self._constant - float(explained))

    def eliminate(self) -> Elimination:
        """Begin an elimination."""
        return _MomentElimination(self._gram, self._cross)


class _MomentElimination:
    """``H = U U'`` with ``U`` upper triangular: row j of ``U' w`` ends with w_j.

    The objective is ``|U' (w - w*)|^2``, so a window adds to it the squared norm of
    ``U_ww' d_w + U_<w' d_<``, whose minimum, zero, the windows after it do not touch.
    """

    def __init__(self, gram: Array64, cross: Array64) -> None:
        self._factor = np.empty_like(gram)
        self._optimum = np.empty_like(cross)
        for group, matrix in enumerate(gram):
            flipped = cholesky(matrix[::-1, ::-1], lower=True, check_finite=False)
            factor = self._factor[group]
            factor[...] = flipped[::-1, ::-1]
            half = solve_triangular(factor, cross[group].T, check_finite=False)
            self._optimum[group] = solve_triangular(
                factor, half, trans="T", overwrite_b=True, check_finite=False
            ).T
        self._error = np.zeros_like(cross)

    def plane(self, rows: slice) -> tuple[Array64, Array64]:
        """Return Hessian and minimiser of the next window."""
        own = self._factor[:, rows, rows]
        before = slice(0, rows.start)
        passed_on = self._error[:, :, before] @ self._factor[:, before, rows]
        target = self._optimum[:, :, rows] - passed_on @ np.linalg.inv(own)
        return own @ own.swapaxes(1, 2), target

    def settle(self, rows: slice, weight: Array64) -> None:
        """Fix the weights of that window."""
        self._error[:, :, rows] = weight - self._optimum[:, :, rows]


class SampleQuadratic:
    """The damped response error of one group, from samples.

    Parameters
    ----------
    error : SampleError
        Response error over n samples.
    original, order, damping
        See :class:`MomentQuadratic`.
    """

    def __init__(
        self, error: SampleError, original: Array64, order: Array64, damping: float
    ) -> None:
        self._inputs = np.ascontiguousarray(error.inputs[:, order])
        diagonal = np.einsum("np,np->p", self._inputs, self._inputs)
        self._ridge = float(_ridge(diagonal[None], damping)[0])
        self._original = original
        self.weight = original.copy()
        # Targets minus responses, (n, outputs).
        self._misses = error.targets - self._inputs @ self.weight[0].T

    def block(self, rows: slice) -> Array64:
        """Return the Hessian of a window."""
        inputs = self._inputs[:, rows]
        gram = inputs.T @ inputs
        gram[np.diag_indices_from(gram)] += self._ridge
        return gram[None]

    def residual(self, rows: slice) -> Array64:
        """Return the residual of a window."""
        away = self._original[:, :, rows] - self.weight[:, :, rows]
        residual: Array64 = self._ridge * away
        residual[0] += self._misses.T @ self._inputs[:, rows]
        return residual

    def move(self, rows: slice, weight: Array64) -> None:
        """Set the weights of a window."""
        change = weight[0] - self.weight[0, :, rows]
        self._misses -= self._inputs[:, rows] @ change.T
        self.weight[:, :, rows] = weight

    def value(self) -> float:
        """Return the damped squared response error."""
        away = self.weight - self._original
        misses = float(np.vdot(self._misses, self._misses))
        return misses + self._ridge * float(np.vdot(away, away))

    def eliminate(self) -> Elimination:
        """Begin an elimination."""
        misses = self._misses + self._inputs @ (self.weight - self._original)[0].T
        return _SampleElimination(self._inputs, misses, self._original, self._ridge)


class _SampleElimination:
    """The same in the space of samples, by recursive least squares.

    With inputs ``F`` (n x p) of the rows that are not settled, ``K = F F' + ridge I``
    and misses ``e`` of the original weights behind what is settled, the best weights
    are ``w0 + F' K^-1 e``. Settling a window takes its columns out of ``K``.
    """

    def __init__(
        self, inputs: Array64, misses: Array64, original: Array64, ridge: float
    ) -> None:
        self._inputs, self._original, self._ridge = inputs, original, ridge
        kernel: Array64 = inputs @ inputs.T
        kernel[np.diag_indices_from(kernel)] += ridge
        self._inverse: Array64 = inverse(kernel, check_finite=False)
        self._solution: Array64 = self._inverse @ misses

    def plane(self, rows: slice) -> tuple[Array64, Array64]:
        """Return Hessian and minimiser of the next window."""
        inputs = self._inputs[:, rows]
        hessian = self._ridge * self._opened(inputs)
        target = self._original[:, :, rows] + self._solution.T @ inputs
        return (hessian + hessian.T)[None] / 2, target

    def settle(self, rows: slice, weight: Array64) -> None:
        """Fix the weights of that window."""
        inputs = self._inputs[:, rows]
        changed = self._inverse @ inputs
        gain = changed @ self._opened(inputs)
        change = (weight - self._original[:, :, rows])[0]
        self._solution += gain @ (inputs.T @ self._solution - change.T)
        self._inverse += gain @ changed.T

    def _opened(self, inputs: Array64) -> Array64:
        """``(I - F_w' K^-1 F_w)^-1``, where the brackets hold the ridge's share."""
        share: Array64 = -(inputs.T @ self._inverse @ inputs)
        share[np.diag_indices_from(share)] += 1.0
        opened: Array64 = inverse(share, check_finite=False)
        return opened
