"""From an image to the array a network takes.

The same `Preprocessing` prepares a data set and, stored in the model's metadata under
``"preprocessing"``, classifies single images later.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from typing import IO, Any, Literal, Self, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from qcnn_py.errors import DatasetError, ModelFormatError

__all__ = ["ChannelOrder", "Preprocessing", "ResizeMethod", "decode_image"]

ChannelOrder = Literal["rgb", "bgr", "gray"]
ResizeMethod = Literal["nearest", "box", "bilinear", "bicubic", "lanczos"]

FloatArray = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]

_MODES_WITH_MORE_THAN_8_BITS = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")


@dataclass(frozen=True)
class Preprocessing:
    """Geometry, colour and value range of a network's input.

    In this order: resize, centre crop, ``(scale * pixels - mean) / std``.

    Attributes
    ----------
    channel_order : {"rgb", "bgr", "gray"} or None
        Channels of the array; ``None`` for data that is no picture, which `apply`
        and `pixels` refuse.
    resize : int or (int, int) or None
        Pixels of the shorter side, aspect ratio kept, or (height, width).
    resize_method : {"nearest", "box", "bilinear", "bicubic", "lanczos"}
        Pillow's filter; all but nearest are anti-aliased.
    crop : (int, int) or None
        Height and width of the centre crop.
    scale : float
        Factor on the stored values.
    mean, std : tuple of float
        One number, or one per channel.
    """

    channel_order: ChannelOrder | None
    resize: int | tuple[int, int] | None = None
    resize_method: ResizeMethod = "bilinear"
    crop: tuple[int, int] | None = None
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def to_json(self) -> dict[str, Any]:
        """Return the settings as plain JSON values."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_json` returned.

        Raises
        ------
        ModelFormatError
            If an entry is missing, unknown or of the wrong kind.
        """
        try:
            values: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in data.items()
            }
            preprocessing = cls(**values)
            preprocessing._check()
        except (TypeError, ValueError, AttributeError) as error:
            raise ModelFormatError(f"metadata, preprocessing: {error}") from error
        return preprocessing

    def _check(self) -> None:
        expected: dict[str, tuple[bool, str]] = {
            "channel_order": (
                self.channel_order in (None, *get_args(ChannelOrder)),
                "rgb, bgr, gray or null",
            ),
            "resize": (
                self.resize is None or _is_length(self.resize) or _is_size(self.resize),
                "pixels of the shorter side, [height, width] or null",
            ),
            "resize_method": (
                self.resize_method in get_args(ResizeMethod),
                ", ".join(get_args(ResizeMethod)),
            ),
            "crop": (
                self.crop is None or _is_size(self.crop),
                "[height, width] or null",
            ),
            "scale": (_is_finite(self.scale) and self.scale > 0, "a number above 0"),
            "mean": (_are_finite(self.mean), "a list of numbers"),
            "std": (
                _are_finite(self.std) and min(self.std) > 0,
                "a list of numbers above 0",
            ),
        }
        for name, (valid, wanted) in expected.items():
            if not valid:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, expected {wanted}"
                )

    def apply(self, image: Image.Image | str | PathLike[str]) -> FloatArray:
        """Prepare one image.

        Parameters
        ----------
        image : PIL image or path
            Any size and 8-bit mode.

        Returns
        -------
        ndarray of float32, shape (C, H, W)
            The network's input.

        Raises
        ------
        DatasetError
            If the image cannot be read, is smaller than the crop or has more than 8
            bits per channel.
        """
        return self.normalize(self.pixels(image))

    def pixels(
        self, image: Image.Image | str | PathLike[str], name: str | None = None
    ) -> Pixels:
        """Resize, crop and order the channels, values not scaled.

        Parameters
        ----------
        image : PIL image or path
            Any size and 8-bit mode.
        name : str, optional
            What an error calls the image; its path by default.

        Returns
        -------
        ndarray of uint8, shape (C, H, W)
            What `normalize` takes.
        """
        if isinstance(image, Image.Image):
            name = name or "image"
        else:
            name = name or str(image)
            image = decode_image(image, name)
        if self.channel_order is None:
            raise DatasetError(
                f"{name}: the model was made from arrays that are no pictures, "
                "expected an array as its input"
            )
        image = _to_mode(image, "L" if self.channel_order == "gray" else "RGB", name)
        if self.resize is not None:
            image = self._resized(image, self.resize)
        if self.crop is not None:
            image = _center_cropped(image, self.crop, name)
        pixels = np.asarray(image)
        if pixels.ndim == 2:
            return pixels[None].copy()
        if self.channel_order == "bgr":
            pixels = pixels[:, :, ::-1]
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def normalize(self, pixels: npt.NDArray[Any]) -> FloatArray:
        """Scale, subtract the mean and divide by the standard deviation.

        Parameters
        ----------
        pixels : ndarray of uint8 or float32, shape (…, C, H, W)
            One image or several.

        Returns
        -------
        ndarray of float32, shape (…, C, H, W)
            ``(scale * pixels - mean) / std``.
        """
        mean = np.array(self.mean)[:, None, None]
        std = np.array(self.std)[:, None, None]
        gain = (self.scale / std).astype(np.float32)
        offset = (-mean / std).astype(np.float32)
        normalized: FloatArray = pixels.astype(np.float32)
        normalized *= gain
        normalized += offset
        return normalized

    def _resized(
        self, image: Image.Image, target: int | tuple[int, int]
    ) -> Image.Image:
        if isinstance(target, tuple):
            height, width = target
        else:
            shorter = min(image.size)
            width, height = (
                max(target, side * target // shorter) for side in image.size
            )
        method = Image.Resampling[self.resize_method.upper()]
        return image.resize((width, height), method)


def decode_image(file: str | PathLike[str] | IO[bytes], name: str) -> Image.Image:
    """Decode an image file completely and turn it upright (EXIF).

    Parameters
    ----------
    file : path or binary file
        What to read.
    name : str
        What an error calls the image.

    Raises
    ------
    DatasetError
        If the file is missing or is no readable image.
    """
    try:
        with Image.open(file) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    # Besides OSError, Pillow's decoders let through what they trip over.
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        Image.DecompressionBombError,
    ) as error:
        raise DatasetError(
            f"{name}: expected a readable image, got {type(error).__name__}: {error}"
        ) from error


def _to_mode(image: Image.Image, mode: Literal["L", "RGB"], name: str) -> Image.Image:
    if image.mode in _MODES_WITH_MORE_THAN_8_BITS:
        raise DatasetError(
            f"{name}: got pixel mode {image.mode!r}, expected 8 bits per channel"
        )
    if "transparency" in image.info:
        # Straight from a palette, Pillow warns that the transparency is lost.
        image = image.convert("RGBA")
    try:
        return image.convert(mode)
    except ValueError as error:
        raise DatasetError(
            f"{name}: got pixel mode {image.mode!r}, expected one that converts to "
            f"{mode}: {error}"
        ) from error


def _center_cropped(
    image: Image.Image, size: tuple[int, int], name: str
) -> Image.Image:
    height, width = size
    if image.height < height or image.width < width:
        raise DatasetError(
            f"{name}: got {image.height} x {image.width} pixels (height x width), "
            f"expected at least the crop's {height} x {width}"
        )
    left = (image.width - width) // 2
    top = (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _is_length(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_size(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(map(_is_length, value))


def _is_finite(value: object) -> bool:
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and bool(np.isfinite(value))
    )


def _are_finite(values: object) -> bool:
    return isinstance(values, tuple) and bool(values) and all(map(_is_finite, values))
