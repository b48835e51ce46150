"""Accuracy on test images."""

import numpy as np
import pytest
from random_networks import NetworkBuilder

from qcnn_py.datasets import Dataset, Split
from qcnn_py.errors import DatasetError, ShapeError
from qcnn_py.evaluation import evaluate
from qcnn_py.network import Network, Node
from qcnn_py.preprocessing import Preprocessing


def scores_as_images(scores: np.ndarray, labels: list[int]) -> Dataset:
    """Return a data set whose images are the outputs of a network that does nothing."""
    images = np.asarray(scores, np.float32)[:, None, None, :]
    split = Split(images, np.array(labels, np.int64))
    class_names = tuple(f"class {i}" for i in range(images.shape[-1]))
    preprocessing = Preprocessing(None, scale=1.0)
    return Dataset(
        {"train": split, "validation": split, "test": split}, class_names, preprocessing
    )


def identity(n_classes: int) -> Network:
    return Network([Node("out", "flatten", ("input",), {})], {}, (1, 1, n_classes))


def test_top1_and_top5() -> None:
    scores = np.array(
        [
            [7, 6, 5, 4, 3, 2, 1],
            [7, 6, 5, 4, 3, 2, 1],
            [7, 6, 5, 4, 3, 2, 1],
            [1, 1, 1, 1, 1, 1, 9],
        ]
    )
    result = evaluate(identity(7), scores_as_images(scores, [0, 4, 5, 6]))
    assert result == {"n": 4, "top1": 0.5, "top5": 0.75, "predictions": [0, 0, 0, 6]}


def test_ties_go_to_the_first_classes() -> None:
    # A network that gives equal scores must not look right by luck of the sorting.
    scores = np.zeros((8, 8))
    result = evaluate(identity(8), scores_as_images(scores, list(range(8))))
    assert (result["top1"], result["top5"]) == (1 / 8, 5 / 8)


def test_fewer_than_five_classes_and_several_batches() -> None:
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(250, 3)), rng.integers(3, size=250)
    result = evaluate(identity(3), scores_as_images(scores, labels.tolist()))
    assert result["predictions"] == scores.argmax(axis=1).tolist()
    assert result["top1"] == np.mean(scores.argmax(axis=1) == labels)
    assert result["top5"] == 1


def test_outputs_that_are_no_class_scores_are_refused() -> None:
    dataset = scores_as_images(np.zeros((2, 4)), [0, 1])
    builder = NetworkBuilder((1, 1, 4))
    builder.fc(5, name="scores")
    with pytest.raises(ShapeError, match=r"'scores' has shape \(5,\), expected \(4,\)"):
        evaluate(builder.build(), dataset)


def test_no_test_images_are_refused() -> None:
    dataset = scores_as_images(np.zeros((0, 4)), [])
    with pytest.raises(DatasetError, match="test split has no images"):
        evaluate(identity(4), dataset)
