"""Images changed at random."""

import numpy as np
import pytest

from qcnn_py.augmentation import NUMBERS_PER_IMAGE, augmented
from qcnn_py.errors import ConfigError


def test_images_are_mirrored_and_moved() -> None:
    image = np.arange(12, dtype=np.float32).reshape(1, 3, 4)
    batch = np.repeat(image[None], 200, axis=0)
    rng = np.random.default_rng(0)
    assert augmented(batch, flip=False, shift=0, rng=rng) is batch
    mirrored = augmented(batch, flip=True, shift=0, rng=rng)
    same = (mirrored == image).all(axis=(1, 2, 3))
    assert 60 < same.sum() < 140
    np.testing.assert_array_equal(mirrored[~same][0], image[..., ::-1])
    moved = augmented(batch, flip=False, shift=1, rng=rng)
    padded = np.pad(image[0], 1, mode="edge")
    expected = {
        padded[y : y + 3, x : x + 4].tobytes() for y in range(3) for x in range(3)
    }
    assert {each.tobytes() for each in moved} == expected


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("shift", [0, 2])
def test_each_image_has_its_own_random_numbers(flip: bool, shift: int) -> None:
    batch = np.arange(20 * 12, dtype=np.float32).reshape(20, 1, 3, 4)

    def changed(first: int, stop: int) -> np.ndarray:
        rng = np.random.Generator(np.random.PCG64(3).advance(first * NUMBERS_PER_IMAGE))
        return augmented(batch[first:stop], flip, shift, rng)

    parts = [changed(0, 7), changed(7, 8), changed(8, 20)]
    np.testing.assert_array_equal(np.concatenate(parts), changed(0, 20))


def test_features_are_no_images() -> None:
    features = np.zeros((3, 7), np.float32)
    rng = np.random.default_rng(0)
    assert augmented(features, flip=False, shift=0, rng=rng) is features
    with pytest.raises(ConfigError, match=r"flip is True.*\(7,\)"):
        augmented(features, flip=True, shift=0, rng=rng)
