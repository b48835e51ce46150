"""Error-corrected quantisation: codewords that keep a layer's response.

The response error of a layer's weights ``W`` is the quadratic
``tr(W^T H W) - 2 tr(G^T W) + const`` (:mod:`qcnn_py.quadratics`). Block coordinate
descent lowers it over codes and codewords: Wu et al., "Quantized Convolutional Neural
Networks for Mobile Devices", CVPR 2016, sections 3.2 and 3.3, here with second moments
in place of samples. Where it ends depends on where it starts: lower than from k-means
on the weights with error feedback (GPTVQ, van Baalen et al., 2024) and some rounds of
stochastic relaxation (LSQ++, Martinez et al., ECCV 2018).

The weights of an output are a row, ordered by (subspace, kernel position,
coordinate): what one codeword covers, and what one subspace covers, is contiguous.
The last subspace has only the rows of its real channels, so padding is no part of the
problem.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.linalg import cho_factor, cho_solve

from qcnn_py import _engine
from qcnn_py.product_quantizer import cluster
from qcnn_py.quadratics import MomentQuadratic, Quadratic, SampleQuadratic
from qcnn_py.statistics import (
    Array64,
    ResponseError,
    SampleError,
    outputs_in_parts,
)

__all__ = ["CoordinateDescent", "available_threads"]

Codes = npt.NDArray[np.int64]

# Rows of weights that are changed before the residual of all other rows follows.
# Enough for that update to be bound by arithmetic, not by memory.
_WINDOW_ROWS = 64

# Clustering is a start that is improved on at once: its last digits are not needed.
_CLUSTER_TOLERANCE = 1e-4


@dataclass
class _Window:
    """Some rows of all outputs: Hessian (groups, w, w), (groups, outputs, w) others."""

    start: int
    gram: Array64
    weight: Array64
    residual: Array64


class CoordinateDescent:
    """Codebooks and codes of one layer, descending on its damped response error.

    Damping adds ``damping * mean(diag H) * |W - W0|^2``: in directions that the
    inputs never take, the weights stay near the original ones, ``W0``.

    Parameters
    ----------
    error : ResponseError or SampleError
        Response error; rows ordered by (channel, kernel position).
    original : ndarray of float64, shape (groups, p, outputs)
        Original weights, rows ordered like those of `error`.
    n_positions : int
        Kernel positions; 1 for a fully connected layer.
    n_centroids, subvector_dim : int
        Codewords per subspace and their length.
    n_sets : int
        Sets of codebooks: 1, or one each for equal parts of the outputs of every group.
    damping : float
        See above.
    """

    def __init__(
        self,
        error: ResponseError | SampleError,
        original: Array64,
        *,
        n_positions: int,
        n_centroids: int,
        subvector_dim: int,
        n_sets: int,
        damping: float,
    ) -> None:
        parts = max(1, n_sets // len(original))
        if parts > 1:
            # Groups of a set each, some of which read the same inputs. Layers whose
            # samples are kept have one set.
            assert isinstance(error, ResponseError)
            error = error.in_parts(parts)
            original = outputs_in_parts(original, parts)
        groups, n_rows, n_outputs = original.shape
        channels = n_rows // n_positions
        starts = range(0, channels, subvector_dim)
        self._dims = [min(subvector_dim, channels - start) for start in starts]
        self._subspaces = [
            slice(start * n_positions, (start + dim) * n_positions)
            for start, dim in zip(starts, self._dims, strict=True)
        ]
        by_channel = np.arange(n_rows).reshape(channels, n_positions)
        order = np.concatenate(
            [by_channel[start : start + subvector_dim].T.ravel() for start in starts]
        )
        ordered = np.ascontiguousarray(original[:, order].swapaxes(1, 2))
        self._objective: Quadratic = (
            SampleQuadratic(error, ordered, order, damping)
            if isinstance(error, SampleError)
            else MomentQuadratic(error, ordered, order, damping)
        )
        set_groups = groups // n_sets
        self._sets = [slice(g, g + set_groups) for g in range(0, groups, set_groups)]
        self._shape = (len(self._sets), len(starts), n_centroids, subvector_dim)
        self._books = [
            np.zeros((len(self._sets), n_centroids, dim)) for dim in self._dims
        ]
        self._codes = np.zeros((len(starts), groups, n_outputs, n_positions), np.int64)
        self._threads = available_threads()

    @property
    def codebooks(self) -> Array64:
        """Codewords, shape (sets, M, K, dsub); zero where padded."""
        books = np.zeros(self._shape)
        for m, book in enumerate(self._books):
            books[:, m, :, : book.shape[2]] = book
        return books

    @property
    def codes(self) -> Codes:
        """Codes, shape (groups, outputs, positions, M)."""
        return np.moveaxis(self._codes, 0, 3)

    def start(self, codebooks: npt.NDArray[Any], codes: npt.NDArray[Any]) -> None:
        """Begin with these codewords and codes.

        Parameters
        ----------
        codebooks : ndarray, shape ([sets,] M, K, dsub)
            Codewords; what pads the last subspace is ignored.
        codes : ndarray of int, shape (outputs of all groups, [positions,] M)
            Codes, positions in one dimension or two.
        """
        books = codebooks.reshape(self._shape).astype(np.float64)
        self._books = [books[:, m, :, :dim].copy() for m, dim in enumerate(self._dims)]
        ordered = codes.reshape(*self._codes.shape[1:], len(self._dims))
        self._codes[...] = np.moveaxis(ordered, 3, 0)
        self._sweep(lambda window, m: self._assign(window, m, choose=False))

    def seed_with_feedback(self, n_init: int, seed: int, rounds: int) -> None:
        """Choose first codebooks and codes, passing each subspace's error on.

        Weights start where the response error is least. When a subspace gets its
        codewords, everything still to come takes up the error that they make, as
        well as it can; distances are measured by what is then left of it.

        Parameters
        ----------
        n_init : int
            Starts of k-means.
        seed : int
            Seed of the starts.
        rounds : int
            Alternations between codes and codewords in each subspace.
        """
        elimination = self._objective.eliminate()
        settled = np.empty_like(self._objective.weight)
        for subspaces, rows in self._windows():
            hessian, target = elimination.plane(rows)
            # The same again inside of the window.
            flipped = np.linalg.cholesky(hessian[:, ::-1, ::-1])
            factor = flipped[:, ::-1, ::-1]
            error = np.zeros_like(target)
            for m in subspaces:
                own = self._local(rows.start, m)
                triangle = factor[:, own, own]
                passed = error[:, :, : own.start] @ factor[:, : own.start, own]
                wanted = target[:, :, own] - passed @ np.linalg.inv(triangle)
                window = _Window(
                    start=self._subspaces[m].start,
                    gram=triangle @ triangle.swapaxes(1, 2),
                    weight=wanted,
                    residual=np.zeros_like(wanted),
                )
                self._cluster(window, m, n_init, seed)
                for _ in range(rounds):
                    self._improve(window, m)
                error[:, :, own] = window.weight - target[:, :, own]
            settled[:, :, rows] = target + error
            elimination.settle(rows, settled[:, :, rows])
        self._move_to(settled)

    def relax(self, rounds: int, temperature: float, seed: int) -> None:
        """Descend with noise on the codewords that dies away, out of local optima.

        Ends where it was if that has less error than what it found.

        Parameters
        ----------
        rounds : int
            Rounds over all subspaces.
        temperature : float
            Standard deviation of the noise at first, as a multiple of the error that
            K codewords of that dimension leave, ``K^(-1/dim)`` of their own deviation.
        seed : int
            Seed of the noise.
        """
        if not rounds:
            return
        books, codes = [book.copy() for book in self._books], self._codes.copy()
        weight, before = self._objective.weight.copy(), self.objective()
        random = np.random.default_rng(seed)
        for left in range(rounds - 1, -1, -1):

            def visit(window: _Window, m: int, heat: float = left / rounds) -> None:
                book = self._books[m]
                scale = book.shape[1] ** (-1 / book.shape[2]) * temperature * heat
                noise = random.standard_normal(book.shape)
                book += scale * book.std(axis=1, keepdims=True) * noise
                self._assign(window, m, choose=False)
                self._improve(window, m)

            self._sweep(visit)
        if self.objective() > before:
            self._books, self._codes = books, codes
            self._move_to(weight)

    def run(self, max_rounds: int, tolerance: float) -> list[float]:
        """Descend over all subspaces until the objective hardly falls any more.

        Parameters
        ----------
        max_rounds : int
            Most rounds.
        tolerance : float
            Stop after a round that lowers the objective by less than this share.

        Returns
        -------
        list of float
            The objective at the start and after each round; it never rises.
        """
        trace = [self.objective()]
        for _ in range(max_rounds):
            self._sweep(self._improve)
            trace.append(self.objective())
            if trace[-2] - trace[-1] <= tolerance * trace[-2]:
                break
        return trace

    def objective(self) -> float:
        """Return the damped squared response error."""
        return self._objective.value()

    def _windows(self) -> Iterator[tuple[range, slice]]:
        """Yield subspaces that share one update of the residual, and their rows."""
        first = 0
        for m, rows in enumerate(self._subspaces):
            start = self._subspaces[first].start
            if rows.stop - start >= _WINDOW_ROWS or m + 1 == len(self._subspaces):
                yield range(first, m + 1), slice(start, rows.stop)
                first = m + 1

    def _sweep(self, visit: Callable[[_Window, int], None]) -> None:
        """Visit all subspaces."""
        objective = self._objective
        for subspaces, rows in self._windows():
            window = _Window(
                start=rows.start,
                gram=objective.block(rows),
                weight=objective.weight[:, :, rows].copy(),
                residual=objective.residual(rows),
            )
            for m in subspaces:
                visit(window, m)
            objective.move(rows, window.weight)

    def _move_to(self, weight: Array64) -> None:
        for _, rows in self._windows():
            self._objective.move(rows, weight[:, :, rows])

    def _local(self, start: int, m: int) -> slice:
        """Rows of a subspace, counted from row `start`."""
        rows = self._subspaces[m]
        return slice(rows.start - start, rows.stop - start)

    def _vectors(self, rows: Array64, m: int) -> Array64:
        """View a subspace's rows as sub-vectors (groups, outputs, positions, dim)."""
        return rows.reshape(*rows.shape[:2], -1, self._dims[m])

    def _blocks(self, gram: Array64, m: int) -> Array64:
        """View a subspace's Gram matrices as (groups, t, u, dim, dim)."""
        dim = self._dims[m]
        n = gram.shape[1] // dim
        return gram.reshape(len(gram), n, dim, n, dim).swapaxes(2, 3)

    def _improve(self, window: _Window, m: int) -> None:
        self._assign(window, m, choose=True)
        for chosen in range(len(self._sets)):
            self._revive_codewords(window, m, chosen)
            self._update_codewords(window, m, chosen)

    def _assign(self, window: _Window, m: int, *, choose: bool) -> None:
        """Choose codes of a subspace, or keep them, and set its weights to match."""
        _engine.assign(
            window.gram,
            window.weight,
            window.residual,
            self._books[m],
            self._codes[m],
            self._subspaces[m].start - window.start,
            choose,
            self._threads,
        )

    def _cluster(self, window: _Window, m: int, n_init: int, seed: int) -> None:
        """Cluster the weights of a subspace that would correct all errors so far."""
        own = self._local(window.start, m)
        gram = window.gram[:, own, own]
        step = np.linalg.solve(gram, window.residual[:, :, own].swapaxes(1, 2))
        corrected = window.weight[:, :, own] + step.swapaxes(1, 2)
        wanted = self._vectors(corrected, m)
        blocks = self._blocks(gram, m)
        dim = self._dims[m]
        for chosen, groups in enumerate(self._sets):
            # Mean effect on the response of an error at one kernel position.
            metric = np.einsum("gttij->ij", blocks[groups])
            labels, centroids = cluster(
                wanted[groups].reshape(-1, dim),
                self._shape[2],
                scale=np.linalg.cholesky(metric),
                n_init=n_init,
                seed=seed,
                tolerance=_CLUSTER_TOLERANCE,
            )
            self._codes[m, groups] = labels.reshape(self._codes[m, groups].shape)
            self._books[m][chosen] = centroids
        self._assign(window, m, choose=False)

    def _revive_codewords(self, window: _Window, m: int, chosen: int) -> None:
        """Move unused codewords to where a codeword of its own helps most.

        At most one sub-vector of each output changes, so that the gains add up.
        """
        groups, dim = self._sets[chosen], self._dims[m]
        codes = self._codes[m, groups]
        counts = np.bincount(codes.ravel(), minlength=self._shape[2])
        unused = np.flatnonzero(counts == 0)
        if not unused.size:
            return
        own = self._local(window.start, m)
        gains, words = [], []
        for start in range(own.start, own.stop, dim):
            rows = slice(start, start + dim)
            residual = window.residual[groups, :, rows]
            gram = window.gram[groups, rows, rows]
            step = np.linalg.solve(gram, residual.swapaxes(1, 2)).swapaxes(1, 2)
            gains.append((residual * step).sum(axis=2))
            words.append(window.weight[groups, :, rows] + step)
        gain = np.stack(gains)
        worst = np.argsort(-gain.max(axis=0), axis=None, kind="stable")[: unused.size]
        group, output = np.unravel_index(worst, gain.shape[1:])
        position = gain[:, group, output].argmax(axis=0)
        helps = gain[position, group, output] > 0
        unused = unused[: helps.size][helps]
        group, output, position = group[helps], output[helps], position[helps]
        self._books[m][chosen, unused] = np.stack(words)[position, group, output]
        codes[group, output, position] = unused
        self._assign(window, m, choose=False)

    def _update_codewords(self, window: _Window, m: int, chosen: int) -> None:
        """Solve the least-squares problem of all codewords of one subspace at once.

        Codewords that meet in one output are coupled, see
        ``qcnn_quantizer::descent::normal_matrix``.
        """
        groups, dim, own = (
            self._sets[chosen],
            self._dims[m],
            self._local(window.start, m),
        )
        n_centroids = self._shape[2]
        gram = np.ascontiguousarray(window.gram[groups, own, own])
        codes = self._codes[m, groups]
        flat = codes.ravel()
        residual = self._vectors(window.residual[groups, :, own], m).reshape(-1, dim)
        gradient = np.stack(
            [np.bincount(flat, part, minlength=n_centroids) for part in residual.T],
            axis=1,
        )
        unused = np.bincount(flat, minlength=n_centroids) == 0
        if codes.shape[2] == 1:
            # An output has one codeword: nothing is coupled.
            counts = np.stack(
                [np.bincount(group.ravel(), minlength=n_centroids) for group in codes]
            )
            normal = np.tensordot(counts, gram, axes=(0, 0))
            normal[unused] = np.eye(dim)
            step = np.linalg.solve(normal, gradient[:, :, None])[:, :, 0]
        else:
            size = n_centroids * dim
            normal = _engine.normal_matrix(gram, codes, n_centroids).reshape(size, size)
            free = np.flatnonzero(np.repeat(unused, dim))
            normal[free, free] = 1.0
            factor = cho_factor(
                normal, lower=True, overwrite_a=True, check_finite=False
            )
            step = cho_solve(factor, gradient.ravel(), check_finite=False)
        self._books[m][chosen] += step.reshape(n_centroids, dim)
        self._assign(window, m, choose=False)


def available_threads() -> int:
    """Return the threads of what the engine computes: those BLAS has, or all cores.

    No result depends on them.
    """
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() else len(os.sched_getaffinity(0))
