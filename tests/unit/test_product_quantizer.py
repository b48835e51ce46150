"""ProductQuantizer: scikit-learn's conventions, and the corners of k-means."""

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.pipeline import make_pipeline

from qcnn_py import ConfigError, NotFittedError, ProductQuantizer, ShapeError
from qcnn_py.product_quantizer import cluster, split_empty_clusters


@pytest.fixture
def vectors() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((60, 10)).astype(np.float32)


def test_parameters() -> None:
    quantizer = ProductQuantizer(8, 3, n_init=1)
    assert quantizer.get_params() == {
        "n_centroids": 8,
        "subvector_dim": 3,
        "n_init": 1,
        "random_state": 0,
    }
    copy = clone(quantizer).set_params(n_centroids=4)
    assert repr(copy) == "ProductQuantizer(n_centroids=4, n_init=1, subvector_dim=3)"


def test_fit_returns_self_and_learns(vectors: np.ndarray) -> None:
    quantizer = ProductQuantizer(n_centroids=16, subvector_dim=4)
    assert quantizer.fit(vectors) is quantizer
    assert quantizer.n_features_in_ == 10
    assert quantizer.n_subspaces_ == 3
    assert quantizer.codebooks_.shape == (3, 16, 4)
    assert quantizer.codes_.shape == (60, 3)
    assert quantizer.codes_.dtype == np.uint8
    np.testing.assert_array_equal(quantizer.encode(vectors), quantizer.codes_)
    error = np.linalg.norm(quantizer.decode(quantizer.codes_) - vectors)
    assert error < 0.6 * np.linalg.norm(vectors)


def test_padding_stays_zero(vectors: np.ndarray) -> None:
    quantizer = ProductQuantizer(8, 4).fit(vectors)
    assert (quantizer.codebooks_[-1, :, 2:] == 0).all()
    assert quantizer.decode(quantizer.codes_).shape == vectors.shape


def test_same_seed_same_bits(vectors: np.ndarray) -> None:
    first, second = (ProductQuantizer(16, 4).fit(vectors) for _ in range(2))
    assert first.codebooks_.tobytes() == second.codebooks_.tobytes()
    assert first.codes_.tobytes() == second.codes_.tobytes()


def test_codewords_are_means_of_their_members(vectors: np.ndarray) -> None:
    quantizer = ProductQuantizer(8, 5).fit(vectors)
    for k in range(8):
        members = vectors[quantizer.codes_[:, 1] == k, 5:]
        np.testing.assert_allclose(
            quantizer.codebooks_[1, k], members.mean(axis=0), rtol=1e-6
        )


def test_pipeline(vectors: np.ndarray) -> None:
    pipeline = make_pipeline(ProductQuantizer(8, 4))
    codes = pipeline.fit_transform(vectors)
    assert codes.shape == (60, 3)
    assert pipeline.inverse_transform(codes).shape == vectors.shape


def test_more_centroids_than_a_byte_counts() -> None:
    vectors = np.arange(300.0)[:, None]
    quantizer = ProductQuantizer(280, 1, n_init=1).fit(vectors)
    assert quantizer.codes_.dtype == np.uint16
    assert len(np.unique(quantizer.codes_)) == 280


def test_as_many_centroids_as_vectors(vectors: np.ndarray) -> None:
    quantizer = ProductQuantizer(60, 4).fit(vectors)
    np.testing.assert_array_equal(quantizer.decode(quantizer.codes_), vectors)


def test_fewer_distinct_vectors_than_centroids() -> None:
    vectors = np.repeat([[1.0, 2.0], [3.0, 4.0]], 10, axis=0)
    quantizer = ProductQuantizer(8, 2).fit(vectors)
    np.testing.assert_array_equal(quantizer.decode(quantizer.codes_), vectors)
    np.testing.assert_array_equal(quantizer.encode(vectors), quantizer.codes_)
    assert {tuple(word) for word in quantizer.codebooks_[0]} == {(1, 2), (3, 4)}


def test_vectors_too_close_to_tell_apart() -> None:
    # Distinct numbers that k-means rounds together.
    vectors = 1.0 + np.arange(20)[:, None] * np.finfo(float).eps
    quantizer = ProductQuantizer(4, 1).fit(vectors)
    np.testing.assert_allclose(quantizer.decode(quantizer.codes_), vectors)


def test_weighted_coordinates() -> None:
    # Two coordinates ask for different clusters; the weight decides which.
    vectors = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], dtype=float)
    for weight, decided in (((1, 0.01), 0), ((0.01, 1), 1)):
        quantizer = ProductQuantizer(2, 2).fit(vectors, coordinate_weight=weight)
        decoded = quantizer.decode(quantizer.codes_)
        np.testing.assert_array_equal(decoded[:, decided], vectors[:, decided])
        np.testing.assert_array_equal(decoded[:, 1 - decided], 0.5)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"n_centroids": 0}, "n_centroids is 0, expected an integer from 1"),
        ({"n_centroids": 61}, "n_centroids is 61, expected at most 60"),
        ({"subvector_dim": 2.0}, "subvector_dim is 2.0"),
        ({"n_init": -1}, "n_init is -1"),
    ],
)
def test_bad_parameters(vectors, parameters: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ProductQuantizer(**parameters).fit(vectors)


@pytest.mark.parametrize(
    "bad",
    [np.zeros(3), np.zeros((0, 3)), np.zeros((3, 0)), np.full((70, 2), np.nan)],
    ids=["rank", "no vectors", "no coordinates", "nan"],
)
def test_bad_vectors(bad: np.ndarray) -> None:
    with pytest.raises(ShapeError, match="vectors have shape"):
        ProductQuantizer(2, 2).fit(bad)


@pytest.mark.parametrize("weight", [np.ones(9), -np.ones(10), np.full(10, np.nan)])
def test_bad_weights(vectors: np.ndarray, weight: np.ndarray) -> None:
    with pytest.raises(ShapeError, match="coordinate_weight"):
        ProductQuantizer(2, 2).fit(vectors, coordinate_weight=weight)


def test_not_fitted(vectors: np.ndarray) -> None:
    with pytest.raises(NotFittedError, match="call fit first"):
        ProductQuantizer().encode(vectors)
    with pytest.raises(NotFittedError, match="call fit first"):
        ProductQuantizer().decode(np.zeros((1, 1), dtype=int))


def test_data_of_other_shape(vectors: np.ndarray) -> None:
    quantizer = ProductQuantizer(4, 4).fit(vectors)
    with pytest.raises(ShapeError, match="length 9, expected 10"):
        quantizer.encode(vectors[:, :9])
    for codes in ([[0, 0]], [[0, 0, 4]], [[0, 0, -1]], [[0.0, 0.0, 0.0]], [0, 0, 0]):
        with pytest.raises(ShapeError, match="integers from 0 to 3"):
            quantizer.decode(codes)


def test_empty_clusters_are_split() -> None:
    vectors = np.array([[0.0], [1.0], [10.0], [11.0], [50.0]])
    labels, centroids = split_empty_clusters(vectors, np.array([2, 2, 2, 2, 0]), 4)
    # 10 and 11 leave the cluster of four, then one of the remaining pairs parts.
    assert len(set(labels)) == 4
    assert labels[4] == 0
    assert labels[1] != labels[2]
    assert len(set(labels[:4])) == 3
    np.testing.assert_array_equal(centroids[labels[4]], vectors[4])


def test_metric_of_clusters() -> None:
    # Far apart in the plane, but not along the direction that counts.
    vectors = np.array([[0.0, 0], [5, -5], [1, 1], [6, -4]])
    scale = np.array([[1.0, 0], [1, 0.01]])
    labels, centroids = cluster(vectors, 2, scale=scale, n_init=2, seed=0)
    assert labels[0] == labels[1] != labels[2] == labels[3]
    np.testing.assert_allclose(centroids[labels[0]], [2.5, -2.5])
