"""Settings of a data set: where the images come from and how they are prepared.

``DatasetConfig`` is a union that pydantic resolves by the field ``source``. Whether
the files exist and agree with each other is checked when the data set is prepared
(`qcnn_py.datasets`), not here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from qcnn_py.preprocessing import ChannelOrder, ResizeMethod

Size = PositiveInt | tuple[PositiveInt, PositiveInt]


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ResizeConfig(_Settings):
    """Target size and method of a resize."""

    size: Size = Field(
        description="One number: the shorter side in pixels, aspect ratio kept. "
        "Two numbers: [height, width], aspect ratio not kept.",
    )
    method: ResizeMethod = Field(
        default="bilinear",
        description="Pillow's filter of that name; every one but nearest is "
        "anti-aliased when it shrinks. corner_aligned is the one of the original "
        "Quantized-CNN implementation: bilinear, corner pixels on corner pixels, "
        "neither anti-aliased nor rounded to whole values.",
    )


class SplitLimits(_Settings):
    """Largest number of images kept per split; null keeps all."""

    train: PositiveInt | None = Field(
        default=None,
        description="Training images kept (a seeded stratified draw); null: all.",
    )
    validation: PositiveInt | None = Field(
        default=None,
        description="Validation images kept (a seeded stratified draw); null: all.",
    )
    test: PositiveInt | None = Field(
        default=None,
        description="Test images kept (a seeded stratified draw); null: all.",
    )


class _DatasetSettings(_Settings):
    """What every source has in common."""

    resize: ResizeConfig | None = Field(
        default=None, description="Resize applied first; null: none."
    )
    crop: Size | None = Field(
        default=None,
        description="Centre crop after the resize: one number for a square, or "
        "[height, width]; null: none.",
    )
    channel_order: ChannelOrder | None = Field(
        default=None,
        description="Colour channels the network sees. null keeps those of the "
        "source: rgb for image files and CIFAR, gray for digits and IDX, the "
        "array's own for npz.",
    )
    scale: PositiveFloat | None = Field(
        default=None,
        description="Factor on the stored values, before mean and std. null: 1/255 "
        "for 8-bit images, 1 for floating-point arrays.",
    )
    mean: Annotated[
        float | tuple[float, ...] | Path, Field(union_mode="left_to_right")
    ] = Field(
        default=0.0,
        description="Subtracted after scaling; one number, or one per channel in "
        "channel_order, or a mean image: a .npy file, or a .bin file of the original "
        "Quantized-CNN implementation, of the size that images are resized to or of "
        "the crop, channels (in channel_order) first.",
    )
    std: PositiveFloat | tuple[PositiveFloat, ...] = Field(
        default=1.0,
        description="Divisor after the mean; one number, or one per channel in "
        "channel_order.",
    )
    test_split: Literal["own", "folds"] = Field(
        default="own",
        description="own: the source's own test images. folds: all images of the "
        "source are pooled and cut into stratified folds; replicate i is tested on "
        "fold i and sees nothing of it before.",
    )
    folds: Annotated[int, Field(ge=2)] = Field(
        default=5,
        description="Number of folds when test_split is folds; at least the number "
        "of replicates.",
    )
    validation: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.1,
        description="Share of the training images held out (stratified, seeded) for "
        "early stopping; 0: none. Not used where the source brings a validation "
        "split of its own and test_split is own.",
    )
    limit: SplitLimits = Field(
        default_factory=SplitLimits,
        description="Largest number of images per split.",
    )

    @property
    def known_classes(self) -> int | None:
        """Number of classes, where no image has to be read to know it."""
        return None

    @property
    def source_paths(self) -> tuple[Path, ...]:
        """Files and folders that images, labels and class names are read from."""
        return ()

    @property
    def input_paths(self) -> tuple[Path, ...]:
        """Files and folders that the data set is made from."""
        means = (self.mean,) if isinstance(self.mean, Path) else ()
        return (*self.source_paths, *means)


class DigitsConfig(_DatasetSettings):
    """The 1797 handwritten digits (8 x 8, gray) bundled with scikit-learn.

    Their values 0 … 16 are stored as 8-bit gray levels, round(255 v / 16).
    """

    source: Literal["digits"] = Field(
        default="digits", description="scikit-learn's bundled handwritten digits."
    )
    test_split: Literal["folds"] = Field(
        default="folds",
        description="The digits have no test set of their own: stratified folds; "
        "replicate i is tested on fold i.",
    )

    @property
    def known_classes(self) -> int:
        """Number of classes."""
        return 10


class ImagesConfig(_DatasetSettings):
    """A folder of images, or a zip of one; the folder of an image is its class."""

    source: Literal["images"] = Field(
        description="Image files in one folder per class, or a zip of that."
    )
    path: Path = Field(
        description="Folder or zip holding <class>/<file>, or train/<class>/<file> "
        "and test/<class>/<file>, and val/<class>/<file> where there is one. A "
        "single folder around all of it is skipped.",
    )

    @property
    def source_paths(self) -> tuple[Path, ...]:
        """Files and folders that images, labels and class names are read from."""
        return (self.path,)


class IdxConfig(_DatasetSettings):
    """IDX files (MNIST and its family), gzip-compressed or not."""

    source: Literal["idx"] = Field(description="IDX files (MNIST family).")
    train_images: Path = Field(description="Training images, e.g. *-images-idx3-ubyte.")
    train_labels: Path = Field(description="Labels of the training images.")
    test_images: Path | None = Field(
        default=None, description="Test images; needed when test_split is own."
    )
    test_labels: Path | None = Field(
        default=None, description="Labels of the test images."
    )
    class_names: tuple[str, ...] | None = Field(
        default=None,
        description="Names of labels 0, 1, …; null: the numbers themselves.",
    )

    @model_validator(mode="after")
    def _check_test_pair(self) -> IdxConfig:
        if (self.test_images is None) != (self.test_labels is None):
            raise ValueError("test_images and test_labels: give both or neither")
        if self.test_split == "own" and self.test_images is None:
            raise ValueError(
                "test_split: got own without test_images, expected test_images and "
                "test_labels, or test_split: folds"
            )
        return self

    @property
    def source_paths(self) -> tuple[Path, ...]:
        """Files and folders that images, labels and class names are read from."""
        paths = (
            self.train_images,
            self.train_labels,
            self.test_images,
            self.test_labels,
        )
        return tuple(path for path in paths if path is not None)


class CifarConfig(_DatasetSettings):
    """CIFAR-10 or CIFAR-100, the "binary version" (``.bin``); nothing is unpickled."""

    source: Literal["cifar"] = Field(description="CIFAR-10/100, binary version.")
    path: Path = Field(
        description="Folder with data_batch_1.bin … and test_batch.bin (CIFAR-10), "
        "or train.bin and test.bin (CIFAR-100).",
    )
    labels: Literal["fine", "coarse"] = Field(
        default="fine",
        description="CIFAR-100 only: its 100 fine or its 20 coarse classes.",
    )

    @property
    def source_paths(self) -> tuple[Path, ...]:
        """Files and folders that images, labels and class names are read from."""
        return (self.path,)


class NpzConfig(_DatasetSettings):
    """Arrays in a NumPy ``.npz`` file; object arrays are refused."""

    source: Literal["npz"] = Field(description="Arrays in a NumPy .npz file.")
    path: Path = Field(description="The .npz file.")
    layout: Literal["nchw", "nhwc"] = Field(
        default="nchw",
        description="Axis order of four-dimensional image arrays; three-dimensional "
        "ones are (image, height, width).",
    )
    images: str = Field(
        default="images",
        description="Name of the training images; uint8, or floating point (kept as "
        "float32; no resize, crop or channel_order then).",
    )
    labels: str = Field(
        default="labels", description="Name of the training labels: integers from 0."
    )
    test_images: str = Field(
        default="test_images",
        description="Name of the test images, read where the file has them.",
    )
    test_labels: str = Field(
        default="test_labels", description="Name of the test labels."
    )
    class_names: tuple[str, ...] | None = Field(
        default=None,
        description="Names of labels 0, 1, …; null: the numbers themselves.",
    )

    @property
    def source_paths(self) -> tuple[Path, ...]:
        """Files and folders that images, labels and class names are read from."""
        return (self.path,)


class ReferenceConfig(_DatasetSettings):
    """The files of the original Quantized-CNN implementation's speed test.

    1000 images of ILSVRC-12, prepared: the network's input as it is.
    """

    source: Literal["reference"] = Field(
        description="Prepared images of the original Quantized-CNN implementation."
    )
    path: Path = Field(
        description="Folder with dataMatTst.single.bin and lablVecTst.uint16.bin."
    )
    test_split: Literal["folds"] = Field(
        default="folds",
        description="The files have no training images: stratified folds; replicate "
        "i is tested on fold i, and the others' images calibrate. Classes may lack "
        "images.",
    )
    n_classes: PositiveInt = Field(
        default=1000, description="Classes that the labels number from 0."
    )
    class_names: Path | None = Field(
        default=None,
        description="Text file with the name of each class in a line, for example "
        "class_names.txt; null: the numbers themselves.",
    )

    @property
    def known_classes(self) -> int:
        """Number of classes."""
        return self.n_classes

    @property
    def source_paths(self) -> tuple[Path, ...]:
        """Files and folders that images, labels and class names are read from."""
        names = () if self.class_names is None else (self.class_names,)
        return (self.images, self.labels, *names)

    @property
    def images(self) -> Path:
        """File of the images."""
        return self.path / "dataMatTst.single.bin"

    @property
    def labels(self) -> Path:
        """File of the labels."""
        return self.path / "lablVecTst.uint16.bin"


DatasetConfig = Annotated[
    DigitsConfig | ImagesConfig | IdxConfig | CifarConfig | NpzConfig | ReferenceConfig,
    Field(discriminator="source"),
]
