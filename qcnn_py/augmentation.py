"""Images changed at random without changing what they show."""

from __future__ import annotations

import numpy as np

from qcnn_py.errors import ConfigError
from qcnn_py.network import FloatArray

__all__ = ["NUMBERS_PER_IMAGE", "augmented"]

NUMBERS_PER_IMAGE = 3
"""Random numbers that :func:`augmented` takes for each image, whatever is done to it.

Whoever starts with a later image can skip those of the images before it.
"""


def augmented(
    images: FloatArray, flip: bool, shift: int, rng: np.random.Generator
) -> FloatArray:
    """Mirror and move images at random.

    Parameters
    ----------
    images : ndarray of float32, shape (N, C, H, W)
        Images.
    flip : bool
        Mirror each image with a probability of one half.
    shift : int
        Move each image by up to so many pixels up or down and left or right; its
        border pixels fill what that leaves free.
    rng : numpy.random.Generator
        Source of randomness.

    Returns
    -------
    ndarray of float32, shape (N, C, H, W)
        New images, or `images` if nothing is to be done.

    Raises
    ------
    ConfigError
        If something is to be done to what has no height and width.
    """
    if (flip or shift) and images.ndim != 4:
        raise ConfigError(
            f"flip is {flip} and shift is {shift} for inputs of shape "
            f"{images.shape[1:]}, expected false and 0 for what is no image"
        )
    n = len(images)
    mirror, *move = rng.random((n, NUMBERS_PER_IMAGE)).T
    if flip:
        mirrored = mirror < 0.5
        images = np.where(mirrored[:, None, None, None], images[..., ::-1], images)
    if shift:
        beside = (shift, shift)
        padded = np.pad(images, ((0, 0), (0, 0), beside, beside), mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(
            padded, images.shape[2:], axis=(2, 3)
        )
        rows, columns = (
            (numbers * (2 * shift + 1)).astype(np.intp) for numbers in move
        )
        images = windows[np.arange(n), :, rows, columns]
    return images
