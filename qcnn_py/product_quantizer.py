"""Product quantisation of vectors: k-means in every subspace."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, TransformerMixin

from qcnn_py import _engine
from qcnn_py.errors import ConfigError, NotFittedError, ShapeError

__all__ = ["ProductQuantizer", "cluster"]

Array64 = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int64]

# Bytes of distances computed at a time while encoding.
_CHUNK_BYTES = 64 << 20

# Iterations of one start of k-means.
_MOST_ROUNDS = 300


class ProductQuantizer(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Replace sub-vectors by the nearest of a few codewords.

    A vector is cut into ``n_subspaces = ceil(dim / subvector_dim)`` sub-vectors, the
    last one padded with zeros where `subvector_dim` does not divide ``dim``. Each
    subspace has its own codebook, found by k-means.

    Parameters
    ----------
    n_centroids : int
        Codewords per subspace.
    subvector_dim : int
        Length of a sub-vector.
    n_init : int
        Starts of k-means (k-means++); the one with the least error is kept.
    random_state : int
        Seed. Equal data and seed give bit-identical codebooks and codes.

    Attributes
    ----------
    codebooks_ : ndarray of float64, shape (n_subspaces, n_centroids, subvector_dim)
        Codewords; exactly zero in padded coordinates.
    codes_ : ndarray of uint8 or uint16, shape (n_vectors, n_subspaces)
        Codes of the vectors given to :meth:`fit`; uint8 up to 256 codewords.
    n_features_in_ : int
        Length of the vectors.
    n_subspaces_ : int
        Number of subspaces.

    Examples
    --------
    >>> import numpy as np
    >>> vectors = np.array([[0.0, 1.0, 5.0], [0.0, 1.0, 6.0], [2.0, 3.0, 5.0]])
    >>> quantizer = ProductQuantizer(n_centroids=2, subvector_dim=2).fit(vectors)
    >>> quantizer.codebooks_.shape
    (2, 2, 2)
    >>> bool((quantizer.decode(quantizer.codes_) == vectors).all())
    True
    """

    def __init__(
        self,
        n_centroids: int = 64,
        subvector_dim: int = 4,
        *,
        n_init: int = 3,
        random_state: int = 0,
    ) -> None:
        self.n_centroids = n_centroids
        self.subvector_dim = subvector_dim
        self.n_init = n_init
        self.random_state = random_state

    def fit(
        self,
        X: npt.ArrayLike,
        y: None = None,
        *,
        coordinate_weight: npt.ArrayLike | None = None,
    ) -> Self:
        """Find codebooks.

        Parameters
        ----------
        X : array, shape (n_vectors, dim)
            Vectors.
        y : None
            Ignored; there for scikit-learn's conventions.
        coordinate_weight : array, shape (dim,), optional
            Weight of each coordinate's squared error in the choice of clusters,
            not negative.

        Returns
        -------
        ProductQuantizer
            Itself.

        Raises
        ------
        ConfigError
            If a parameter is out of range, or `n_centroids` exceeds the number of
            vectors.
        ShapeError
            If the vectors are not a matrix of finite numbers.
        """
        for name in ("n_centroids", "subvector_dim", "n_init"):
            value = getattr(self, name)
            if not isinstance(value, int | np.integer) or value < 1:
                raise ConfigError(f"{name} is {value!r}, expected an integer from 1")
        vectors = _matrix(X)
        n_vectors, dim = vectors.shape
        most = min(n_vectors, 65536)
        if self.n_centroids > most:
            raise ConfigError(
                f"n_centroids is {self.n_centroids}, expected at most {most}: "
                f"there are {n_vectors} vectors, and codes have 16 bits"
            )
        scale = np.ones(dim)
        if coordinate_weight is not None:
            weight = np.asarray(coordinate_weight, dtype=np.float64)
            if weight.shape != (dim,) or not (weight >= 0).all():
                raise ShapeError(
                    f"coordinate_weight has shape {weight.shape}, expected ({dim},), "
                    "without negative values"
                )
            scale = np.sqrt(weight)
        self.n_features_in_ = dim
        self.n_subspaces_ = -(-dim // self.subvector_dim)
        self.codebooks_ = np.zeros(
            (self.n_subspaces_, self.n_centroids, self.subvector_dim)
        )
        dtype = np.uint8 if self.n_centroids <= 256 else np.uint16
        self.codes_ = np.empty((n_vectors, self.n_subspaces_), dtype=dtype)
        for m, part in enumerate(self._parts(dim)):
            codes, codebook = cluster(
                vectors[:, part],
                self.n_centroids,
                scale=np.diag(scale[part]),
                n_init=self.n_init,
                seed=self.random_state,
            )
            self.codes_[:, m] = codes
            self.codebooks_[m, :, : codebook.shape[1]] = codebook
        return self

    def encode(self, X: npt.ArrayLike) -> npt.NDArray[Any]:
        """Return the code of the nearest codeword of each sub-vector.

        Parameters
        ----------
        X : array, shape (n_vectors, dim)
            Vectors.

        Returns
        -------
        ndarray of uint8 or uint16, shape (n_vectors, n_subspaces)
            Codes; the lowest one where several codewords are equally near.

        Raises
        ------
        NotFittedError
            If called before :meth:`fit`.
        ShapeError
            If the vectors do not have the length of those given to :meth:`fit`.
        """
        self._check_fitted()
        vectors = _matrix(X)
        if vectors.shape[1] != self.n_features_in_:
            raise ShapeError(
                f"vectors have length {vectors.shape[1]}, "
                f"expected {self.n_features_in_}"
            )
        codes = np.empty((len(vectors), self.n_subspaces_), dtype=self.codes_.dtype)
        chunk = max(1, _CHUNK_BYTES // (8 * self.n_centroids))
        for m, part in enumerate(self._parts(self.n_features_in_)):
            codebook = self.codebooks_[m, :, : part.stop - part.start]
            norms = np.einsum("kd,kd->k", codebook, codebook)
            for start in range(0, len(vectors), chunk):
                rows = slice(start, start + chunk)
                # |x - c|^2 without |x|^2, which no choice of c changes.
                distances = norms - 2 * (vectors[rows, part] @ codebook.T)
                codes[rows, m] = distances.argmin(axis=1)
        return codes

    def decode(self, codes: npt.ArrayLike) -> Array64:
        """Return the vectors that codes stand for.

        Parameters
        ----------
        codes : array of int, shape (n_vectors, n_subspaces)
            Codes.

        Returns
        -------
        ndarray of float64, shape (n_vectors, dim)
            Vectors.

        Raises
        ------
        NotFittedError
            If called before :meth:`fit`.
        ShapeError
            If `codes` is not a matrix of known codes.
        """
        self._check_fitted()
        index = np.asarray(codes)
        if (
            index.ndim != 2
            or index.shape[1] != self.n_subspaces_
            or index.dtype.kind not in "iu"
            or (index.size and not 0 <= index.min() <= index.max() < self.n_centroids)
        ):
            raise ShapeError(
                f"codes have shape {index.shape} and dtype {index.dtype}, expected "
                f"(n, {self.n_subspaces_}) integers from 0 to {self.n_centroids - 1}"
            )
        parts = self.codebooks_[np.arange(self.n_subspaces_), index]
        vectors: Array64 = parts.reshape(len(index), -1)[:, : self.n_features_in_]
        return vectors

    def transform(self, X: npt.ArrayLike) -> npt.NDArray[Any]:
        """Return the codes of vectors, as :meth:`encode` does."""
        return self.encode(X)

    def inverse_transform(self, X: npt.ArrayLike) -> Array64:
        """Return the vectors of codes, as :meth:`decode` does."""
        return self.decode(X)

    def _parts(self, dim: int) -> list[slice]:
        """Coordinates of each subspace, without padding."""
        starts = range(0, dim, self.subvector_dim)
        return [slice(start, min(start + self.subvector_dim, dim)) for start in starts]

    def _check_fitted(self) -> None:
        if not hasattr(self, "codebooks_"):
            raise NotFittedError("this ProductQuantizer is not fitted; call fit first")


def cluster(
    vectors: Array64,
    n_clusters: int,
    *,
    scale: Array64,
    n_init: int,
    seed: int,
    tolerance: float = 0.0,
) -> tuple[Codes, Array64]:
    """Cluster vectors by k-means under a quadratic metric.

    Parameters
    ----------
    vectors : ndarray of float64, shape (n, d)
        Vectors, at least one.
    n_clusters : int
        Clusters. Where there are fewer distinct vectors, each of these is a
        centroid and the centroids left over repeat them, unused.
    scale : ndarray of float64, shape (d, d)
        The distance of ``x`` and ``c`` is ``|(x - c) @ scale|``.
    n_init : int
        Starts (k-means++); the best is kept.
    seed : int
        Seed of the starts.
    tolerance : float
        A start ends when an iteration lowers the error by this share or less.

    Returns
    -------
    labels : ndarray of int, shape (n,)
        Cluster of each vector.
    centroids : ndarray of float64, shape (n_clusters, d)
        Mean of each cluster, which is its best codeword under every metric.
    """
    distinct, labels = np.unique(vectors, axis=0, return_inverse=True)
    if len(distinct) <= n_clusters:
        return labels.reshape(-1), np.resize(distinct, (n_clusters, distinct.shape[1]))
    random = np.random.default_rng(seed)
    scaled = np.ascontiguousarray(vectors @ scale)
    # Trials per seed as in scikit-learn's k-means++.
    trials = 2 + int(np.log(n_clusters))
    starts = (
        _engine.cluster(
            scaled, random.random((n_clusters, trials)), _MOST_ROUNDS, tolerance, 1
        )
        for _ in range(n_init)
    )
    labels, _ = min(starts, key=lambda start: start[1])
    return split_empty_clusters(vectors, labels, n_clusters)


def split_empty_clusters(
    vectors: Array64, labels: Codes, n_clusters: int
) -> tuple[Codes, Array64]:
    """Give every empty cluster a part of the cluster with the largest error.

    The member farthest from that cluster's mean takes with it all members that are
    nearer to it than to the mean.

    Parameters
    ----------
    vectors : ndarray of float64, shape (n, d)
        Vectors, at least `n_clusters` of them distinct.
    labels : ndarray of int, shape (n,)
        Cluster of each vector.
    n_clusters : int
        Clusters.

    Returns
    -------
    labels : ndarray of int, shape (n,)
        New labels; each cluster has a member.
    centroids : ndarray of float64, shape (n_clusters, d)
        Mean of each cluster.
    """
    labels = labels.copy()
    centroids = _means(vectors, labels, n_clusters)
    counts = np.bincount(labels, minlength=n_clusters)
    for empty in np.flatnonzero(counts == 0):
        errors = ((vectors - centroids[labels]) ** 2).sum(axis=1)
        donor = np.bincount(labels, errors, minlength=n_clusters).argmax()
        members = np.flatnonzero(labels == donor)
        farthest = vectors[members[errors[members].argmax()]]
        distances = ((vectors[members] - farthest) ** 2).sum(axis=1)
        labels[members[distances < errors[members]]] = empty
        centroids = _means(vectors, labels, n_clusters)
    return labels, centroids


def _means(vectors: Array64, labels: Codes, n_clusters: int) -> Array64:
    """Mean of each cluster; zero where a cluster is empty."""
    sums = np.stack(
        [np.bincount(labels, column, minlength=n_clusters) for column in vectors.T],
        axis=1,
    )
    counts = np.bincount(labels, minlength=n_clusters)
    means: Array64 = sums / np.maximum(counts, 1)[:, None]
    return means


def _matrix(X: npt.ArrayLike) -> Array64:
    vectors = np.asarray(X, dtype=np.float64)
    if vectors.ndim != 2 or 0 in vectors.shape or not np.isfinite(vectors).all():
        raise ShapeError(
            f"vectors have shape {vectors.shape}, expected (n_vectors, dim), neither "
            "of them zero, with finite values"
        )
    return vectors
