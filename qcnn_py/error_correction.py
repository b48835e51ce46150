"""Error-corrected quantisation: codewords that keep a layer's response.

The response error of a layer's weights ``W`` is the quadratic
``tr(W^T H W) - 2 tr(G^T W) + const`` (:class:`qcnn_py.statistics.ResponseError`).
Block coordinate descent lowers it over codes and codewords: Wu et al., "Quantized
Convolutional Neural Networks for Mobile Devices", CVPR 2016, sections 3.2 and 3.3,
here with second moments in place of samples.

The weights of a group are kept as a matrix with one column per output, whose rows
are ordered by (subspace, kernel position, coordinate): what one codeword covers, and
what one subspace covers, are contiguous rows. The last subspace has only the rows of
its real channels, so padding is no part of the problem.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy.linalg import cho_factor, cho_solve
from scipy.sparse import coo_array, csr_array

from qcnn_py.product_quantizer import cluster
from qcnn_py.statistics import Array64, ResponseError

__all__ = ["CoordinateDescent"]

Codes = npt.NDArray[np.intp]

# Rows of weights that are changed before the residual of all other rows follows.
# Enough for that update to be bound by arithmetic, not by memory.
_WINDOW_ROWS = 128

# Least damping. Keeps Gram matrices of dead or duplicate inputs well away from
# singular in float64, and is far too small to show in a response.
_LEAST_DAMPING = 1e-8


class CoordinateDescent:
    """Codebooks and codes of one layer, descending on its damped response error.

    Damping adds ``damping * mean(diag H) * |W - W0|^2``: in directions that the
    inputs never take, the weights stay near the original ones, ``W0``.

    Parameters
    ----------
    error : ResponseError
        Response error; rows ordered by (channel, kernel position).
    original : ndarray of float64, shape (groups, p, outputs)
        Original weights, rows ordered like those of `error`.
    n_positions : int
        Kernel positions; 1 for a fully connected layer.
    n_centroids, subvector_dim : int
        Codewords per subspace and their length.
    shared : bool
        One set of codebooks for all groups instead of one per group.
    damping : float
        See above.

    Attributes
    ----------
    codebooks : ndarray of float64, shape (sets, M, K, dsub)
        Codewords; zero where the last subspace is padded.
    """

    def __init__(
        self,
        error: ResponseError,
        original: Array64,
        *,
        n_positions: int,
        n_centroids: int,
        subvector_dim: int,
        shared: bool,
        damping: float,
    ) -> None:
        groups, n_rows, n_outputs = original.shape
        channels = n_rows // n_positions
        starts = range(0, channels, subvector_dim)
        self._n_positions = n_positions
        self._subspaces = [
            slice(
                start * n_positions,
                min(start + subvector_dim, channels) * n_positions,
            )
            for start in starts
        ]
        by_channel = np.arange(n_rows).reshape(channels, n_positions)
        order = np.concatenate(
            [by_channel[start : start + subvector_dim].T.ravel() for start in starts]
        )
        self._gram = error.gram[:, order[:, None], order]
        self._weight = original[:, order]
        self._cross = error.cross[:, order]
        diagonal = np.einsum("gpp->gp", self._gram)
        ridge = max(damping, _LEAST_DAMPING) * diagonal.mean(axis=1)
        # Inputs that never vary: the response says nothing, the weights decide.
        ridge[ridge == 0] = 1.0
        diagonal += ridge[:, None]
        self._cross += ridge[:, None, None] * self._weight
        energy = np.einsum("gpo,gpo->g", self._weight, self._weight)
        self._constant = error.constant + float(ridge @ energy)
        # The negative half gradient of the objective, kept up to date throughout;
        # outside the window, as of the last end of a window.
        self._residual = self._cross - self._gram @ self._weight
        self._window = slice(0, 0)
        self._sets = (
            [slice(0, groups)] if shared else [slice(g, g + 1) for g in range(groups)]
        )
        n_subspaces = len(self._subspaces)
        self.codebooks = np.zeros(
            (len(self._sets), n_subspaces, n_centroids, subvector_dim)
        )
        self._codes = np.zeros((n_subspaces, n_positions, groups, n_outputs), np.intp)

    @property
    def codes(self) -> Codes:
        """Codes, shape (groups, outputs, positions, M)."""
        return self._codes.transpose(2, 3, 1, 0)

    def seed(self, n_init: int, seed: int) -> None:
        """Choose first codebooks and codes by k-means, one subspace after another.

        Each subspace's weights first take up the response error that those before
        it have made; subspaces still to come keep the original weights meanwhile.
        Distances are measured by what they do to the response.

        Parameters
        ----------
        n_init : int
            Starts of k-means.
        seed : int
            Seed of the starts.
        """

        def visit(m: int) -> None:
            self._cluster(m, n_init, seed)
            self._improve(m)

        self._sweep(visit)

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
        # W^T H W = W^T (G - R) with the residual R.
        explained = np.vdot(self._weight, self._cross)
        explained += np.vdot(self._weight, self._residual)
        return max(0.0, self._constant - float(explained))

    def _sweep(self, visit: Callable[[int], None]) -> None:
        """Visit all subspaces, in windows that share one update of the residual."""
        m = 0
        while m < len(self._subspaces):
            first, start = m, self._subspaces[m].start
            while m < len(self._subspaces):
                stop = self._subspaces[m].stop
                m += 1
                if stop - start >= _WINDOW_ROWS:
                    break
            self._window = window = slice(start, stop)
            before = self._weight[:, window].copy()
            for subspace in range(first, m):
                visit(subspace)
            change = self._weight[:, window] - before
            for others in (slice(0, start), slice(stop, None)):
                self._residual[:, others] -= self._gram[:, others, window] @ change

    def _improve(self, m: int) -> None:
        self._update_codes(m)
        for chosen in range(len(self._sets)):
            self._revive_codewords(m, chosen)
            self._update_codewords(m, chosen)

    def _cluster(self, m: int, n_init: int, seed: int) -> None:
        """Cluster the weights of subspace `m` that would correct all errors so far."""
        rows = self._subspaces[m]
        gram = self._gram[:, rows, rows]
        step = np.linalg.solve(gram, self._residual[:, rows])
        wanted = self._vectors(self._weight[:, rows] + step)
        blocks = self._blocks(gram)
        dim = blocks.shape[-1]
        for chosen, groups in enumerate(self._sets):
            # Mean effect on the response of an error at one kernel position.
            metric = np.einsum("gttij->ij", blocks[groups])
            labels, centroids = cluster(
                wanted[:, groups].reshape(-1, dim),
                self.codebooks.shape[2],
                scale=np.linalg.cholesky(metric),
                n_init=n_init,
                seed=seed,
            )
            shape = self._codes[m, :, groups].shape
            self._codes[m, :, groups] = labels.reshape(shape)
            self.codebooks[chosen, m, :, :dim] = centroids
        self._decode(m)

    def _update_codes(self, m: int) -> None:
        """Give each sub-vector its best codeword, all others of its output fixed."""
        book = self._book(m)
        for position in range(self._n_positions):
            rows = self._block(m, position)
            gram = self._gram[:, rows, rows]
            # Adding c^T H c - 2 c^T target to the objective of all other blocks.
            target = self._residual[:, rows] + gram @ self._weight[:, rows]
            energy = ((book @ gram) * book).sum(axis=2)
            cost = target.transpose(0, 2, 1) @ book.transpose(0, 2, 1)
            cost *= -2
            cost += energy[:, None, :]
            old = self._codes[m, position]
            new = cost.argmin(axis=2)
            old_cost = np.take_along_axis(cost, old[:, :, None], axis=2)
            new_cost = np.take_along_axis(cost, new[:, :, None], axis=2)
            better = (new_cost < old_cost)[:, :, 0]
            self._codes[m, position] = np.where(better, new, old)
            self._set_weight(rows, self._words(m, self._codes[m, position]))

    def _revive_codewords(self, m: int, chosen: int) -> None:
        """Move unused codewords to where a codeword of its own helps most.

        At most one sub-vector of each output changes, so that the gains add up.
        """
        groups = self._sets[chosen]
        codes = self._codes[m, :, groups]
        counts = np.bincount(codes.ravel(), minlength=self.codebooks.shape[2])
        unused = np.flatnonzero(counts == 0)
        if not unused.size:
            return
        gains, words = [], []
        for position in range(self._n_positions):
            rows = self._block(m, position)
            residual = self._residual[groups, rows]
            step = np.linalg.solve(self._gram[groups, rows, rows], residual)
            gains.append((residual * step).sum(axis=1))
            words.append(self._weight[groups, rows] + step)
        gain = np.stack(gains)
        worst = np.argsort(-gain.max(axis=0), axis=None, kind="stable")[: unused.size]
        group, output = np.unravel_index(worst, gain.shape[1:])
        position_of = gain[:, group, output].argmax(axis=0)
        helps = gain[position_of, group, output] > 0
        unused = unused[: helps.size][helps]
        group, output, position_of = group[helps], output[helps], position_of[helps]
        vectors = np.stack(words)[position_of, group, :, output]
        self.codebooks[chosen, m, unused, : vectors.shape[1]] = vectors
        codes[position_of, group, output] = unused
        self._decode(m)

    def _update_codewords(self, m: int, chosen: int) -> None:
        """Solve the least-squares problem of all codewords of one subspace at once.

        Codewords that meet in one output are coupled: the normal matrix is
        ``A[k, i, l, j] = sum over t, u of N_tu[k, l] H_tu[i, j]``, where ``N_tu``
        counts the outputs with codeword ``k`` at position ``t`` and ``l`` at ``u``,
        and ``H_tu`` is the Gram matrix of the inputs at ``t`` and ``u``.
        """
        groups, rows = self._sets[chosen], self._subspaces[m]
        blocks = self._blocks(self._gram[groups, rows, rows])
        residual = self._vectors(self._residual[groups, rows])
        # Only codewords in use, numbered without gaps.
        used, codes = np.unique(self._codes[m, :, groups], return_inverse=True)
        codes = codes.reshape(residual.shape[:-1])
        n_used, dim = used.size, residual.shape[-1]
        membership = csr_array(
            (np.ones(codes.size), codes.ravel(), np.arange(codes.size + 1)),
            shape=(codes.size, n_used),
        )
        gradient = membership.T @ residual.reshape(-1, dim)
        if self._n_positions == 1:
            # An output has one codeword: nothing is coupled.
            counts = np.stack(
                [np.bincount(group.ravel(), minlength=n_used) for group in codes[0]]
            )
            normal = np.tensordot(counts, blocks[:, 0, 0], axes=(0, 0))
            step = np.linalg.solve(normal, gradient[:, :, None])[:, :, 0]
        else:
            # As a sparse matrix of counts, rows (k, l), columns (group, t, u).
            by_output = codes.transpose(1, 2, 0)
            pairs = by_output[..., :, None] * n_used + by_output[..., None, :]
            columns = np.arange(blocks[..., 0, 0].size).reshape(blocks.shape[:3])
            columns = np.broadcast_to(columns[:, None], pairs.shape)
            counts = coo_array(
                (np.ones(pairs.size), (pairs.ravel(), columns.ravel())),
                shape=(n_used * n_used, blocks[..., 0, 0].size),
            ).tocsr()
            normal = (counts @ blocks.reshape(-1, dim * dim)).reshape(
                n_used, n_used, dim, dim
            )
            normal = normal.transpose(0, 2, 1, 3).reshape(n_used * dim, n_used * dim)
            factor = cho_factor(normal, lower=True, overwrite_a=True)
            step = cho_solve(factor, gradient.ravel()).reshape(n_used, dim)
        self.codebooks[chosen, m, used, :dim] += step
        self._decode(m)

    def _block(self, m: int, position: int) -> slice:
        """Rows of one sub-vector."""
        rows = self._subspaces[m]
        dim = (rows.stop - rows.start) // self._n_positions
        start = rows.start + position * dim
        return slice(start, start + dim)

    def _blocks(self, gram: Array64) -> Array64:
        """View a subspace's Gram matrices as (groups, t, u, dim, dim)."""
        n = self._n_positions
        return gram.reshape(len(gram), n, -1, n, gram.shape[1] // n).swapaxes(2, 3)

    def _vectors(self, matrix: Array64) -> Array64:
        """View a subspace's rows as sub-vectors (positions, groups, outputs, dim)."""
        groups, n_rows, n_outputs = matrix.shape
        n = self._n_positions
        split = matrix.reshape(groups, n, n_rows // n, n_outputs)
        return split.transpose(1, 0, 3, 2)

    def _book(self, m: int) -> Array64:
        """Codewords of a subspace, without padding, shape (sets, K, dim)."""
        rows = self._block(m, 0)
        return self.codebooks[:, m, :, : rows.stop - rows.start]

    def _words(self, m: int, codes: Codes) -> Array64:
        """Weights, shape (groups, dim, outputs), that codes of one block stand for."""
        sets = np.arange(len(self._sets))[:, None]
        return self._book(m)[sets, codes].transpose(0, 2, 1)

    def _decode(self, m: int) -> None:
        """Set the weights of a subspace to its codewords."""
        words = [self._words(m, codes) for codes in self._codes[m]]
        self._set_weight(self._subspaces[m], np.concatenate(words, axis=1))

    def _set_weight(self, rows: slice, weight: Array64) -> None:
        change = weight - self._weight[:, rows]
        window = self._window
        self._residual[:, window] -= self._gram[:, window, rows] @ change
        self._weight[:, rows] = weight
