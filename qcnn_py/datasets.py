"""Preparing data sets: read, split, resize, store.

A `Dataset` keeps its images as they are after resize and crop (8-bit where the source
is), and normalises them when they are asked for. Everything random is drawn from the
seed: the same settings give the same file.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from PIL import Image

from qcnn_py.artefacts import load_arrays, save_arrays
from qcnn_py.dataset_config import DatasetConfig
from qcnn_py.dataset_sources import (
    SPLITS,
    IntArray,
    Source,
    SplitName,
    open_source,
)
from qcnn_py.errors import ConfigError, DatasetError, ModelFormatError
from qcnn_py.preprocessing import MeanImage, Pixels, Preprocessing

__all__ = ["Dataset", "Split", "prepare_dataset"]

logger = logging.getLogger(__name__)

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Split:
    """Images and labels of one split.

    Attributes
    ----------
    images : ndarray of uint8 or float32, shape (N, C, H, W)
        Resized and cropped, not normalised.
    labels : ndarray of int64, shape (N,)
        Positions in the data set's class names.
    """

    images: Pixels
    labels: IntArray


@dataclass(frozen=True)
class Dataset:
    """Images in three splits, ready for a network.

    Attributes
    ----------
    splits : mapping of str to Split
        ``"train"``, ``"validation"`` (may be empty) and ``"test"``.
    class_names : tuple of str
        Name of each label.
    preprocessing : Preprocessing
        How an image becomes an input.
    """

    splits: Mapping[SplitName, Split]
    class_names: tuple[str, ...]
    preprocessing: Preprocessing

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of an image."""
        _, channels, height, width = self.splits["train"].images.shape
        return channels, height, width

    def size(self, split: SplitName) -> int:
        """Return the number of images in a split."""
        return len(self.splits[split].labels)

    def labels(self, split: SplitName) -> IntArray:
        """Return the labels of a split, int64, shape (N,)."""
        return self.splits[split].labels

    def images(self, split: SplitName) -> FloatArray:
        """Return the normalised images of a split, float32, shape (N, C, H, W)."""
        return self.preprocessing.normalize(self.splits[split].images)

    def batches(self, split: SplitName, batch_size: int) -> Iterator[FloatArray]:
        """Yield the normalised images of a split in order, `batch_size` at a time."""
        images = self.splits[split].images
        for start in range(0, len(images), batch_size):
            yield self.preprocessing.normalize(images[start : start + batch_size])

    def calibration(
        self, n_images: int, seed: int, shard: int = 0, shards: int = 1
    ) -> tuple[FloatArray, int]:
        """Draw training images, without labels, to quantise with.

        Parameters
        ----------
        n_images : int
            How many; all training images if there are not that many.
        seed : int
            Seed of the draw.
        shard, shards : int
            Which of how many parts of the drawn images to return.

        Returns
        -------
        images : ndarray of float32, shape (n, C, H, W)
            Normalised images in the order of the training split.
        first : int
            Drawn images in the parts before.
        """
        n_train = self.size("train")
        rng = np.random.default_rng(seed)
        drawn = rng.choice(n_train, min(n_images, n_train), replace=False)
        first, stop = (len(drawn) * i // shards for i in (shard, shard + 1))
        part = np.sort(drawn)[first:stop]
        return self.preprocessing.normalize(self.splits["train"].images[part]), first

    def metadata(self) -> dict[str, Any]:
        """Return what a network trained on the data set says about its input."""
        return {
            "preprocessing": self.preprocessing.to_json(),
            "class_names": list(self.class_names),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the data set as a ``.safetensors`` file."""
        arrays: dict[str, npt.NDArray[Any]] = {}
        for name, split in self.splits.items():
            arrays[f"{name}.images"] = split.images
            arrays[f"{name}.labels"] = split.labels
        save_arrays(path, arrays, self.metadata())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote.

        Raises
        ------
        ModelFormatError
            If the file is malformed or no data set.
        OSError
            If the file cannot be read.
        """
        arrays, metadata = load_arrays(path)
        try:
            return cls(
                splits={
                    name: Split(arrays[f"{name}.images"], arrays[f"{name}.labels"])
                    for name in SPLITS
                },
                class_names=tuple(metadata["class_names"]),
                preprocessing=Preprocessing.from_json(metadata["preprocessing"]),
            )
        except (KeyError, TypeError) as error:
            raise ModelFormatError(
                f"{path}: expected a data set, lacks {error}"
            ) from error


def prepare_dataset(
    config: DatasetConfig, replicate: int = 0, seed: int = 0
) -> Dataset:
    """Read a source, split it and prepare its images.

    Parameters
    ----------
    config : DatasetConfig
        The source and its options.
    replicate : int
        Number of the replicate, from 0. With ``test_split: folds`` it is tested on
        the fold of that number; the folds are the same for all replicates.
    seed : int
        Seed of folds, validation split and limits.

    Returns
    -------
    Dataset
        The three splits; no image is in two of them.

    Raises
    ------
    DatasetError
        If files are missing, unreadable, malformed or do not fit together.
    ConfigError
        If an option does not fit the source or the replicate.
    """
    if config.test_split == "folds" and replicate >= config.folds:
        raise ConfigError(
            f"dataset.folds is {config.folds}, expected more for replicate {replicate} "
            "(counted from 0): each is tested on its own fold"
        )
    with open_source(config) as source:
        members = _split(source, config, replicate, seed)
        preprocessing = _resolve_preprocessing(source, config)
        splits = {
            name: Split(
                _gather(source, preprocessing, members[name]),
                source.labels[members[name]],
            )
            for name in SPLITS
        }
    if preprocessing.resize is None and preprocessing.crop is None:
        # All images have this size; others that come later are brought to it.
        size = splits["train"].images.shape[-2:]
        preprocessing = replace(preprocessing, resize=size)
    dataset = Dataset(splits, source.class_names, preprocessing)
    logger.info(
        "%s images of %d x %d x %d, %d classes: %s",
        config.source,
        *dataset.input_shape,
        len(dataset.class_names),
        ", ".join(f"{dataset.size(name)} {name}" for name in SPLITS),
    )
    return dataset


def _split(
    source: Source, config: DatasetConfig, replicate: int, seed: int
) -> dict[SplitName, IntArray]:
    """Return the numbers of the items in each split, ascending."""
    labels = source.labels
    members: dict[SplitName, IntArray] = {**source.parts}
    rng = np.random.default_rng([seed, replicate])
    if config.test_split == "folds":
        pool = np.concatenate(list(members.values()))
        if len(pool) < config.folds:
            raise DatasetError(
                f"{source.name}: got {len(pool)} images, expected at least "
                f"{config.folds} for as many folds"
            )
        smallest = int(np.bincount(labels[pool]).min())
        if source.has_every_class and smallest < config.folds:
            raise DatasetError(
                f"{source.name}: the smallest class has {smallest} images, expected at "
                f"least {config.folds} for as many folds"
            )
        # Not from `rng`: the folds have to be those of the other replicates.
        dealt = _by_class(pool, labels, np.random.default_rng(seed))
        in_fold = np.arange(len(dealt)) % config.folds == replicate
        members = {"train": np.sort(dealt[~in_fold]), "test": np.sort(dealt[in_fold])}
    elif "test" not in members:
        raise DatasetError(
            f"{source.name}: got no test images, expected them with test_split: own; "
            "test_split: folds does without"
        )
    if "validation" not in members:
        members["validation"] = _draw(
            members["train"], labels, _validation_size(members["train"], config), rng
        )
        members["train"] = np.setdiff1d(members["train"], members["validation"])
    return {
        name: _draw(members[name], labels, getattr(config.limit, name), rng)
        for name in SPLITS
    }


def _validation_size(train: IntArray, config: DatasetConfig) -> int:
    size = round(config.validation * len(train))
    if size == len(train):
        raise ConfigError(
            f"dataset.validation is {config.validation} of {len(train)} training "
            "images, expected a share that leaves some to train on"
        )
    return size


def _by_class(items: IntArray, labels: IntArray, rng: np.random.Generator) -> IntArray:
    """Order items by class, shuffled within each.

    Taking them at even intervals is then a stratified draw, dealing them out in turn
    a stratified partition, both exact to one image per class and in total.
    """
    shuffled = rng.permutation(items)
    return shuffled[np.argsort(labels[shuffled], kind="stable")]


def _draw(
    items: IntArray, labels: IntArray, n: int | None, rng: np.random.Generator
) -> IntArray:
    """Draw `n` items stratified by class, ascending; all if `n` is None or too many."""
    if n is None or n >= len(items):
        return items
    at_intervals = (np.arange(n) * len(items)) // max(n, 1)
    return np.sort(_by_class(items, labels, rng)[at_intervals])


def _resolve_preprocessing(source: Source, config: DatasetConfig) -> Preprocessing:
    first = source.read(int(source.parts["train"][0]))
    is_picture = source.channel_order is not None
    for option in ("resize", "crop", "channel_order"):
        if not is_picture and getattr(config, option) is not None:
            raise ConfigError(
                f"dataset.{option}: got {getattr(config, option)!r} for arrays that "
                "are no 8-bit pictures of 1 or 3 channels, expected null"
            )
    channel_order = config.channel_order or source.channel_order
    if isinstance(first, Image.Image):
        is_8_bit, n_channels = True, 1 if channel_order == "gray" else 3
    else:
        is_8_bit, n_channels = first.dtype == np.uint8, len(first)
    crop = config.crop
    preprocessing = Preprocessing(
        channel_order=channel_order,
        resize=None if config.resize is None else config.resize.size,
        resize_method="bilinear" if config.resize is None else config.resize.method,
        crop=(crop, crop) if isinstance(crop, int) else crop,
        scale=config.scale or (1 / 255 if is_8_bit else 1.0),
        std=_per_channel("std", config.std, n_channels),
    )
    mean: tuple[float, ...] | MeanImage
    if isinstance(config.mean, Path):
        shape = _prepared(first, preprocessing, source.name).shape
        mean = MeanImage.read(config.mean, shape, preprocessing.resize)
    else:
        mean = _per_channel("mean", config.mean, n_channels)
    return replace(preprocessing, mean=mean)


def _per_channel(
    option: str, value: float | tuple[float, ...], n_channels: int
) -> tuple[float, ...]:
    values = value if isinstance(value, tuple) else (value,)
    if len(values) not in (1, n_channels):
        raise ConfigError(
            f"dataset.{option}: got {len(values)} numbers for images of {n_channels} "
            f"channels, expected 1 or {n_channels}"
        )
    return values


def _prepared(
    decoded: Image.Image | Pixels, preprocessing: Preprocessing, name: str
) -> Pixels:
    """Return an item as an array (C, H, W), not normalised."""
    if isinstance(decoded, Image.Image):
        return preprocessing.pixels(decoded, name=name)
    return decoded


def _gather(source: Source, preprocessing: Preprocessing, members: IntArray) -> Pixels:
    """Decode items one after the other into an array (N, C, H, W)."""

    def prepared(item: int) -> Pixels:
        return _prepared(source.read(item), preprocessing, source.item_name(item))

    # The shape comes from the first training image, also for a split without images.
    first = prepared(int(source.parts["train"][0]))
    images = np.empty((len(members), *first.shape), first.dtype)
    for position, item in enumerate(members.tolist()):
        image = prepared(item)
        if image.shape != first.shape:
            raise DatasetError(
                f"{source.item_name(item)}: got shape {image.shape} (channels, height, "
                f"width), expected {first.shape} like the first training image; set "
                "dataset.resize to two numbers, or dataset.crop"
            )
        images[position] = image
        if (position + 1) % 5000 == 0:
            logger.info("%d of %d images read", position + 1, len(members))
    return images
