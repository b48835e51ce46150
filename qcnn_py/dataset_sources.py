"""Where images come from: one reader per kind of source.

Every reader returns a `Source`: labels of all items at once, images one by one when
they are asked for.
"""

from __future__ import annotations

import gzip
import io
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image

from qcnn_py.dataset_config import (
    CifarConfig,
    DatasetConfig,
    DigitsConfig,
    IdxConfig,
    ImagesConfig,
    NpzConfig,
    ReferenceConfig,
)
from qcnn_py.errors import DatasetError, ModelFormatError
from qcnn_py.image_files import (
    IMAGE_SUFFIXES,
    ZIP_ERRORS,
    ImageFiles,
    is_visible,
    open_image_files,
)
from qcnn_py.preprocessing import ChannelOrder, Pixels
from qcnn_py.reference_format import map_bin

__all__ = ["SPLITS", "Source", "SplitName", "open_source"]

SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)

IntArray = npt.NDArray[np.int64]

# Deflate makes data at most 1032 times smaller.
_MOST_EXPANSION = 1040
_SPLIT_FOLDERS: Mapping[str, SplitName] = {
    "train": "train",
    "val": "validation",
    "test": "test",
}


@dataclass(frozen=True)
class Source:
    """Labelled items of which single ones can be decoded.

    Attributes
    ----------
    name : str
        What errors call the source.
    class_names : tuple of str
        Name of each label.
    labels : ndarray of int64, shape (items,)
        Label of each item.
    parts : mapping of str to ndarray of int64
        Numbers of the items in each split the source has; ``"train"`` at least.
    channel_order : {"rgb", "gray"} or None
        Channels of its pictures; ``None`` if it does not hold 8-bit pictures.
    read : callable
        Decodes an item: a picture, or an array (C, H, W) where it holds none.
    item_name : callable
        What errors call an item.
    has_every_class : bool
        Whether each class has an image, as training needs; images that are drawn
        for a given network's many classes may lack some.
    """

    name: str
    class_names: tuple[str, ...]
    labels: IntArray
    parts: Mapping[SplitName, IntArray]
    channel_order: ChannelOrder | None
    read: Callable[[int], Image.Image | Pixels]
    item_name: Callable[[int], str]
    has_every_class: bool = True


@contextmanager
def open_source(config: DatasetConfig) -> Iterator[Source]:
    """Open the source that `config` names; it can be read inside the context.

    Raises
    ------
    DatasetError
        If files are missing, unreadable, malformed or do not fit together.
    """
    match config:
        case DigitsConfig():
            yield _read_digits()
        case IdxConfig():
            yield _read_idx_pairs(config)
        case CifarConfig():
            yield _read_cifar(config)
        case NpzConfig():
            yield _read_npz(config)
        case ReferenceConfig():
            yield _read_reference(config)
        case ImagesConfig(path=path):
            with open_image_files(path) as files:
                yield _index_images(files)


# --- image files ----------------------------------------------------------------------


def _index_images(files: ImageFiles) -> Source:
    """Find out splits and classes from the paths of the images."""
    path, images = files.path, files.names
    skipped, has_splits = _find_layout(path, images)
    depth = skipped + has_splits + 2
    expected = f"{'<root>/' * skipped}{'<split>/' * has_splits}<class>/<file>"
    found: dict[SplitName, dict[str, list[str]]] = {}
    for name in images:
        parts = name.split("/")
        if len(parts) != depth:
            raise DatasetError(
                f"{path}: got image {name!r}, expected every image at {expected}"
            )
        split = _SPLIT_FOLDERS[parts[skipped]] if has_splits else "train"
        found.setdefault(split, {}).setdefault(parts[-2], []).append(name)
    used = {name.rpartition("/")[0] for name in images}
    for folder in files.folders:
        if folder.count("/") == depth - 2 and is_visible(folder) and folder not in used:
            raise DatasetError(
                f"{path}: got no image in class folder {folder!r}, expected at least "
                f"one file named {', '.join(IMAGE_SUFFIXES)}"
            )
    class_names = tuple(sorted(found["train"]))
    for split, classes in found.items():
        missing = sorted(set(class_names) - set(classes))
        unknown = sorted(set(classes) - set(class_names))
        if missing or unknown:
            raise DatasetError(
                f"{path}: {split} lacks classes {_listed(missing)} and has others "
                f"{_listed(unknown)}, expected the classes of train"
            )
    names: list[str] = []
    labels: list[int] = []
    items: dict[SplitName, IntArray] = {}
    for split, classes in found.items():
        first = len(names)
        for label, class_name in enumerate(class_names):
            names += classes[class_name]
            labels += [label] * len(classes[class_name])
        items[split] = np.arange(first, len(names))

    def item_name(item: int) -> str:
        return f"{path}/{names[item]}"

    return Source(
        name=str(path),
        class_names=class_names,
        labels=np.array(labels, np.int64),
        parts=items,
        channel_order="rgb",
        read=lambda item: files.decode(names[item]),
        item_name=item_name,
    )


def _find_layout(path: Path, images: Sequence[str]) -> tuple[int, bool]:
    """Return how many folders around everything to skip, and whether splits follow."""
    paths = [name.split("/") for name in images]
    roots = {parts[0] for parts in paths}
    # <class>/<file> of a single class is no root around <class>/<file>.
    has_root = len(roots) == 1 and min(map(len, paths)) >= 3
    skipped = int(has_root and not roots & _SPLIT_FOLDERS.keys())
    tops = {parts[skipped] for parts in paths if len(parts) > skipped}
    has_splits = bool(tops & _SPLIT_FOLDERS.keys())
    if has_splits and not {"train"} <= tops <= _SPLIT_FOLDERS.keys():
        raise DatasetError(
            f"{path}: got folders {_listed(sorted(tops))}, expected either class "
            "folders, or train, test and perhaps val"
        )
    return skipped, has_splits


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:5])) or "none"
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown


# --- arrays ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Arrays:
    """Images (N, C, H, W) or (N, H, W) and labels (N,) of one part of a source."""

    images: Pixels
    labels: npt.NDArray[np.integer]


def _array_source(
    name: str,
    parts: Mapping[SplitName, _Arrays],
    class_names: Sequence[str] | None,
) -> Source:
    """Make a source of arrays; labels become positions in the class names."""
    for split, part in parts.items():
        if len(part.images) != len(part.labels):
            raise DatasetError(
                f"{name}: got {len(part.images)} {split} images and "
                f"{len(part.labels)} labels, expected as many labels as images"
            )
        if part.images.size == 0:
            raise DatasetError(
                f"{name}: got {split} images of shape {part.images.shape}, expected "
                "at least one pixel"
            )
    train = parts["train"]
    values = np.unique(train.labels)
    if class_names is None:
        class_names = [str(value) for value in values.tolist()]
    else:
        values = np.arange(len(class_names))
        empty = np.setdiff1d(values, train.labels)
        if len(empty):
            raise DatasetError(
                f"{name}: got no training image of class "
                f"{_listed([class_names[label] for label in empty])}, expected at "
                "least one of every class"
            )
    labels: list[IntArray] = []
    items: dict[SplitName, IntArray] = {}
    n_items = 0
    for split, part in parts.items():
        unknown = np.setdiff1d(part.labels, values)
        if len(unknown):
            raise DatasetError(
                f"{name}: got {split} labels {_listed(list(map(str, unknown)))} beyond "
                f"the {len(values)} classes of the training labels or class_names"
            )
        got, expected = (
            f"{images.dtype} of shape {images.shape[1:]}"
            for images in (part.images, train.images)
        )
        if got != expected:
            raise DatasetError(
                f"{name}: got {split} images {got}, expected {expected} like the "
                "training images"
            )
        labels.append(np.searchsorted(values, part.labels).astype(np.int64))
        items[split] = np.arange(n_items, n_items + len(part.labels))
        n_items += len(part.labels)
    orders: Mapping[int, ChannelOrder] = {1: "gray", 3: "rgb"}
    arrays = {
        split: part.images[:, None] if part.images.ndim == 3 else part.images
        for split, part in parts.items()
    }
    channel_order = (
        orders.get(arrays["train"].shape[1])
        if arrays["train"].dtype == np.uint8
        else None
    )

    def locate(item: int) -> tuple[SplitName, int]:
        split = next(split for split, numbers in items.items() if item <= numbers[-1])
        return split, item - int(items[split][0])

    def read(item: int) -> Image.Image | Pixels:
        split, position = locate(item)
        pixels: Pixels = arrays[split][position]
        if channel_order is None:
            return pixels
        if channel_order == "gray":
            return Image.fromarray(pixels[0])
        return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))

    def item_name(item: int) -> str:
        split, position = locate(item)
        return f"{name}, {split} image {position}"

    return Source(
        name=name,
        class_names=tuple(class_names),
        labels=np.concatenate(labels),
        parts=items,
        channel_order=channel_order,
        read=read,
        item_name=item_name,
    )


def _read_digits() -> Source:
    from sklearn.datasets import load_digits

    digits = load_digits()
    # 0 … 16 as gray levels, so that ordinary pictures of digits can be classified.
    gray = np.round(digits.images * (255 / 16)).astype(np.uint8)
    return _array_source("digits", {"train": _Arrays(gray, digits.target)}, None)


def _read_bytes(path: Path, expected: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DatasetError(f"{path}: not found, expected {expected}") from error
    except OSError as error:
        raise DatasetError(f"{path}: expected {expected}, got {error}") from error


def _read_idx_pairs(config: IdxConfig) -> Source:
    parts: dict[SplitName, _Arrays] = {
        "train": _Arrays(
            _read_idx(config.train_images, 3), _read_idx(config.train_labels, 1)
        )
    }
    if config.test_images is not None and config.test_labels is not None:
        parts["test"] = _Arrays(
            _read_idx(config.test_images, 3), _read_idx(config.test_labels, 1)
        )
    return _array_source(str(config.train_images), parts, config.class_names)


def _read_idx(path: Path, n_dimensions: int) -> npt.NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes.

    A big-endian 32-bit magic number 0x000008dd (08: unsigned bytes, dd: number of
    dimensions), as many 32-bit lengths, then the values, last dimension fastest.
    """
    data = _read_bytes(path, "an IDX file")
    packed = data.startswith(b"\x1f\x8b")
    file = gzip.GzipFile(fileobj=io.BytesIO(data)) if packed else io.BytesIO(data)
    header_size = 4 + 4 * n_dimensions
    magic = 0x800 + n_dimensions
    try:
        header = file.read(header_size)
        if len(header) < header_size:
            raise DatasetError(
                f"{path}: truncated, got {len(header)} bytes, expected an IDX header "
                f"of {header_size}"
            )
        got, *shape = np.frombuffer(header, ">u4").tolist()
        if got != magic:
            raise DatasetError(
                f"{path}: got magic number 0x{got:08x}, expected 0x{magic:08x} "
                f"(unsigned bytes, {n_dimensions} dimensions)"
            )
        size = math.prod(shape)
        # What the header does not announce is not unpacked.
        values = file.read(min(size, _MOST_EXPANSION * len(data)) + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetError(f"{path}: damaged gzip data: {error}") from error
    if len(values) != size:
        more = "more than " * (len(values) > size)
        raise DatasetError(
            f"{path}: got {more}{header_size + min(len(values), size)} bytes, expected "
            f"{header_size + size} for shape {tuple(shape)}"
        )
    try:
        return np.frombuffer(values, np.uint8).reshape(shape)
    except ValueError as error:  # No element, but another extent beyond all bounds.
        raise DatasetError(f"{path}: got shape {tuple(shape)}: {error}") from error


def _read_cifar(config: CifarConfig) -> Source:
    folder = config.path
    if not folder.is_dir():
        raise DatasetError(
            f"{folder}: not found, expected the folder of CIFAR's binary version"
        )
    if (folder / "train.bin").exists():
        files: dict[SplitName, list[str]] = {
            "train": ["train.bin"],
            "test": ["test.bin"],
        }
        n_label_bytes, label_byte = 2, 1 if config.labels == "fine" else 0
        names_file = f"{config.labels}_label_names.txt"
        n_classes = 100 if config.labels == "fine" else 20
    else:
        files = {
            "train": [f"data_batch_{number}.bin" for number in range(1, 6)],
            "test": ["test_batch.bin"],
        }
        n_label_bytes, label_byte = 1, 0
        names_file, n_classes = "batches.meta.txt", 10
    parts = {
        split: _read_cifar_records(
            [folder / name for name in names], n_label_bytes, label_byte
        )
        for split, names in files.items()
    }
    class_names = [str(number) for number in range(n_classes)]
    if (folder / names_file).exists():
        text = _read_bytes(folder / names_file, "class names").decode(
            "utf-8", "replace"
        )
        class_names = text.split()
        if len(class_names) != n_classes:
            raise DatasetError(
                f"{folder / names_file}: got {len(class_names)} class names, expected "
                f"{n_classes}"
            )
    return _array_source(str(folder), parts, class_names)


def _read_cifar_records(
    paths: Sequence[Path], n_label_bytes: int, label_byte: int
) -> _Arrays:
    """Read records of label bytes and 3 x 32 x 32 pixels, channels outermost."""
    record_size = n_label_bytes + 3 * 32 * 32
    records = []
    for path in paths:
        data = _read_bytes(path, "a file of CIFAR's binary version")
        if not data or len(data) % record_size:
            raise DatasetError(
                f"{path}: got {len(data)} bytes, expected a multiple of {record_size} "
                "(one record per image)"
            )
        records.append(np.frombuffer(data, np.uint8).reshape(-1, record_size))
    table = np.concatenate(records)
    images = table[:, n_label_bytes:].reshape(-1, 3, 32, 32)
    return _Arrays(images, table[:, label_byte])


def _read_npz(config: NpzConfig) -> Source:
    path = config.path
    data = io.BytesIO(_read_bytes(path, "a .npz file"))
    try:
        loaded = np.load(data, allow_pickle=False)
        # Any other member of the archive is given as bytes.
        members = {name: loaded[name] for name in loaded.files}
        arrays = {
            name: member
            for name, member in members.items()
            if isinstance(member, np.ndarray)
        }
    except (AttributeError, *ZIP_ERRORS) as error:
        raise DatasetError(f"{path}: expected a .npz file, got {error}") from error
    except ValueError as error:
        raise DatasetError(
            f"{path}: expected plain numeric arrays, got {error}"
        ) from error
    parts: dict[SplitName, _Arrays] = {
        "train": _npz_part(config, arrays, config.images, config.labels)
    }
    if config.test_images in arrays or config.test_labels in arrays:
        parts["test"] = _npz_part(
            config, arrays, config.test_images, config.test_labels
        )
    return _array_source(str(path), parts, config.class_names)


def _npz_part(
    config: NpzConfig,
    arrays: Mapping[str, npt.NDArray[Any]],
    images_name: str,
    labels_name: str,
) -> _Arrays:
    path = config.path
    for name in (images_name, labels_name):
        if name not in arrays:
            raise DatasetError(
                f"{path}: got arrays {_listed(sorted(arrays))}, expected one called "
                f"{name!r}"
            )
    images, labels = arrays[images_name], arrays[labels_name]
    if images.ndim not in (3, 4) or images.dtype.kind not in "fu":
        raise DatasetError(
            f"{path}: {images_name!r} has dtype {images.dtype} and shape {images.shape}"
            ", expected uint8 or floating point and 3 or 4 dimensions"
        )
    if images.dtype.kind == "u" and images.dtype != np.uint8:
        raise DatasetError(
            f"{path}: {images_name!r} has dtype {images.dtype}, expected uint8 or "
            "floating point"
        )
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DatasetError(
            f"{path}: {labels_name!r} has dtype {labels.dtype} and shape {labels.shape}"
            ", expected integers of one dimension"
        )
    if images.dtype.kind == "f":
        images = images.astype(np.float32)
        if not np.isfinite(images).all():
            raise DatasetError(
                f"{path}: {images_name!r} has values that are no finite float32"
            )
    if images.ndim == 4 and config.layout == "nhwc":
        images = images.transpose(0, 3, 1, 2)
    return _Arrays(images, labels)


def _read_reference(config: ReferenceConfig) -> Source:
    """Index the original implementation's files, float32 (N, C, H, W) and labels."""
    images = _map_bin(config.images, "<f4", (None, None, None, None))
    # One label per image; whether as a row or a column is not documented.
    labels = _map_bin(config.labels, "<u2", None)
    if labels.size != len(images) or max(labels.shape) != labels.size:
        raise DatasetError(
            f"{config.labels}: got labels of shape {labels.shape}, expected one for "
            f"each of the {len(images)} images of {config.images.name}"
        )
    largest = int(labels.max())
    if largest >= config.n_classes:
        raise DatasetError(
            f"{config.labels}: got label {largest}, expected less than "
            f"dataset.n_classes, {config.n_classes}"
        )
    class_names = [str(number) for number in range(config.n_classes)]
    if config.class_names is not None:
        text = _read_bytes(config.class_names, "class names").decode("utf-8", "replace")
        class_names = text.splitlines()
        if len(class_names) != config.n_classes:
            raise DatasetError(
                f"{config.class_names}: got {len(class_names)} lines, expected "
                f"{config.n_classes} class names, as dataset.n_classes says"
            )

    def item_name(item: int) -> str:
        return f"{config.images}, image {item}"

    def read(item: int) -> Pixels:
        image: Pixels = np.array(images[item], np.float32)
        if not np.isfinite(image).all():
            raise DatasetError(
                f"{item_name(item)}: got NaN or infinite values, expected finite ones"
            )
        return image

    return Source(
        name=str(config.path),
        class_names=tuple(class_names),
        labels=labels.reshape(-1).astype(np.int64),
        parts={"train": np.arange(len(images))},
        channel_order=None,
        read=read,
        item_name=item_name,
        has_every_class=False,
    )


def _map_bin(
    path: Path, dtype: str, expected: Sequence[None] | None
) -> npt.NDArray[Any]:
    try:
        return map_bin(path, dtype, expected)
    except FileNotFoundError as error:
        raise DatasetError(
            f"{path}: not found, expected a file of the original implementation"
        ) from error
    except ModelFormatError as error:
        raise DatasetError(str(error)) from error
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {error}") from error
