"""From an image to the array a network takes.

The same `Preprocessing` prepares a data set and, stored in the model's metadata under
``"preprocessing"``, classifies single images later.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from os import PathLike
from pathlib import Path
from typing import IO, Any, Literal, Self, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from qcnn_py.errors import ConfigError, DatasetError, ModelFormatError, ShapeError
from qcnn_py.reference_format import malformed, map_bin

__all__ = [
    "ChannelOrder",
    "MeanImage",
    "Pixels",
    "Preprocessing",
    "ResizeMethod",
    "decode_image",
]

ChannelOrder = Literal["rgb", "bgr", "gray"]
ResizeMethod = Literal[
    "nearest", "box", "bilinear", "bicubic", "lanczos", "corner_aligned"
]

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.intp]
Pixels = npt.NDArray[np.uint8] | FloatArray

# Their range is not known, other than that of 16 bits.
_MODES_OF_ANY_RANGE = ("I", "F")


@dataclass(frozen=True)
class MeanImage:
    """A mean for each pixel of the input and channel.

    A network's metadata hold it as text, so that the one ``.qcnn`` file is all
    that classifying takes: 0.8 MB for 3 x 227 x 227, exact to the bit.

    Attributes
    ----------
    shape : (int, int, int)
        Channels, height and width, those of the input.
    data : bytes
        As many little-endian float32, last dimension fastest.
    """

    shape: tuple[int, int, int]
    data: bytes

    @classmethod
    def read(
        cls,
        path: str | PathLike[str],
        shape: tuple[int, ...],
        resize: int | tuple[int, int] | None,
    ) -> Self:
        """Read a mean image.

        Parameters
        ----------
        path : path
            A ``.npy`` file of floats, or a ``.bin`` file of the original
            implementation. It has the shape of the input, or the size that
            images are resized to and is cropped with them: that changes nothing,
            and what the crop leaves is all that is kept.
        shape : tuple of int
            Channels, height and width of the input.
        resize : int or (int, int) or None
            See `Preprocessing`.

        Raises
        ------
        ConfigError
            If the path ends otherwise.
        ModelFormatError
            If the file is malformed, or has another shape or values that are no
            finite float32.
        OSError
            If it is missing or cannot be read.
        """
        path = Path(path)
        match path.suffix:
            case ".npy":
                array = _map_npy(path)
            case ".bin":
                array = map_bin(path, "<f4")
            case _:
                raise ConfigError(f"mean is {path}, expected a .npy or .bin file")
        shapes = [shape]
        if isinstance(resize, tuple):
            shapes.append((shape[0], *resize))
        if array.shape not in shapes:
            wanted = " or ".join(map(str, dict.fromkeys(shapes)))
            raise malformed(path, "dimensions", array.shape, wanted)
        _, height, width = shape
        with np.errstate(over="ignore"):
            kept = _center_cropped(array, (height, width)).astype(np.float32)
        if not np.isfinite(kept).all():
            raise malformed(path, "a value", "NaN or infinite", "finite float32")
        return cls.from_array(kept)

    @classmethod
    def from_array(cls, array: npt.NDArray[Any]) -> Self:
        """Take an array of shape (C, H, W)."""
        channels, height, width = array.shape
        return cls((channels, height, width), array.astype("<f4").tobytes())

    @property
    def array(self) -> FloatArray:
        """Read-only array of shape (C, H, W)."""
        return np.frombuffer(self.data, "<f4").reshape(self.shape)

    def to_json(self) -> dict[str, Any]:
        """Return the shape, and the values in base64."""
        text = base64.b64encode(self.data).decode("ascii")
        return {"shape": list(self.shape), "float32": text}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_json` returned; ``ValueError`` if it is malformed."""
        shape = data.get("shape")
        text = data.get("float32")
        if (
            data.keys() != {"shape", "float32"}
            or not isinstance(shape, list)
            or len(shape) != 3
            or not all(map(_is_length, shape))
            or not isinstance(text, str)
        ):
            raise ValueError(
                f"mean is an object with {', '.join(map(str, data))}, expected shape, "
                "three lengths, and float32, text"
            )
        try:
            values = base64.b64decode(text, validate=True)
        except ValueError as error:
            raise ValueError(f"mean, float32: expected base64, got {error}") from error
        if len(values) != 4 * prod(shape):
            raise ValueError(
                f"mean, float32: got {len(values)} bytes, expected {4 * prod(shape)} "
                f"for shape {shape}"
            )
        mean = cls((shape[0], shape[1], shape[2]), values)
        if not np.isfinite(mean.array).all():
            raise ValueError("mean, float32: got NaN or infinite, expected numbers")
        return mean


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
    resize_method : {"nearest", "box", "bilinear", "bicubic", "lanczos", \
"corner_aligned"}
        Pillow's filter; all but nearest are anti-aliased. ``"corner_aligned"`` is
        the original implementation's: bilinear between the four nearest pixels,
        corners on corners, not anti-aliased and not rounded to whole numbers.
    crop : (int, int) or None
        Height and width of the centre crop.
    scale : float
        Factor on the stored values.
    mean : tuple of float or MeanImage
        One number, one per channel, or one per value of the input.
    std : tuple of float
        One number, or one per channel.

    Examples
    --------
    >>> preprocessing = Preprocessing("rgb", resize=(2, 3), mean=(0.5,), std=(0.25,))
    >>> array = preprocessing.apply(Image.new("L", (7, 5), color=255))
    >>> array.shape, array.min(), array.max()
    ((3, 2, 3), np.float32(2.0), np.float32(2.0))
    >>> Preprocessing.from_json(preprocessing.to_json()) == preprocessing
    True
    """

    channel_order: ChannelOrder | None
    resize: int | tuple[int, int] | None = None
    resize_method: ResizeMethod = "bilinear"
    crop: tuple[int, int] | None = None
    scale: float = 1 / 255
    mean: tuple[float, ...] | MeanImage = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def to_json(self) -> dict[str, Any]:
        """Return the settings as plain JSON values."""
        data = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }
        if isinstance(self.mean, MeanImage):
            data["mean"] = self.mean.to_json()
        return data

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
            if isinstance(values.get("mean"), dict):
                values["mean"] = MeanImage.from_json(values["mean"])
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
            "mean": (
                isinstance(self.mean, MeanImage) or _are_finite(self.mean),
                "a list of numbers or an image",
            ),
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
            Any size, 8 or 16 bits per channel. Transparency is dropped.

        Returns
        -------
        ndarray of float32, shape (C, H, W)
            The network's input.

        Raises
        ------
        DatasetError
            If the image cannot be read, is smaller than the crop or has more than 16
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
            See `apply`.
        name : str, optional
            What an error calls the image; its path by default.

        Returns
        -------
        ndarray of uint8 or, if resized corner-aligned, float32, shape (C, H, W)
            What `normalize` takes.

        Raises
        ------
        DatasetError
            See `apply`.
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
        if (
            self.resize_method == "corner_aligned"
            and isinstance(self.resize, int)
            and min(image.size) < 2
        ):
            raise DatasetError(
                f"{name}: got {image.height} x {image.width} pixels (height x width), "
                "expected at least 2 x 2, as the corners are aligned"
            )
        resized = self._resized(image)
        pixels = resized[None] if resized.ndim == 2 else resized.transpose(2, 0, 1)
        if self.channel_order == "bgr":
            pixels = pixels[::-1]
        if self.crop is not None:
            _, height, width = pixels.shape
            if height < self.crop[0] or width < self.crop[1]:
                raise DatasetError(
                    f"{name}: got {height} x {width} pixels (height x width), "
                    f"expected at least the crop's {self.crop[0]} x {self.crop[1]}"
                )
            pixels = _center_cropped(pixels, self.crop)
        return pixels.copy("C")

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

        Raises
        ------
        ShapeError
            If the mean is an image of another shape.
        """
        normalized: FloatArray = pixels.astype(np.float32)
        std = np.array(self.std)[:, None, None]
        if isinstance(self.mean, MeanImage):
            if pixels.shape[-3:] != self.mean.shape:
                raise ShapeError(
                    f"images have shape {pixels.shape}, expected that of the mean "
                    f"image, {self.mean.shape}, in the last three dimensions"
                )
            # In this order, with scale and std 1, the original's to the bit.
            normalized *= np.float32(self.scale)
            normalized -= self.mean.array
            normalized /= std.astype(np.float32)
            return normalized
        mean = np.array(self.mean)[:, None, None]
        gain = (self.scale / std).astype(np.float32)
        offset = (-mean / std).astype(np.float32)
        normalized *= gain
        normalized += offset
        return normalized

    def _resized(self, image: Image.Image) -> Pixels:
        """Return pixels (H, W) or (H, W, channels)."""
        if self.resize is None:
            return np.asarray(image)
        if self.resize_method == "corner_aligned":
            return _corner_aligned(np.asarray(image), self.resize)
        if isinstance(self.resize, tuple):
            height, width = self.resize
        else:
            shorter = min(image.size)
            width, height = (
                max(self.resize, side * self.resize // shorter) for side in image.size
            )
        method = Image.Resampling[self.resize_method.upper()]
        return np.asarray(image.resize((width, height), method))


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
    if image.mode in _MODES_OF_ANY_RANGE:
        raise DatasetError(
            f"{name}: got pixel mode {image.mode!r}, expected 8 or 16 bits per channel"
        )
    if image.mode.startswith("I;16"):
        # As Pillow reads colour images of 16 bits: their upper 8.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
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


def _center_cropped(array: npt.NDArray[Any], size: tuple[int, int]) -> npt.NDArray[Any]:
    """Cut the centre out of the last two dimensions."""
    top, left = (
        (got - kept) // 2 for got, kept in zip(array.shape[-2:], size, strict=True)
    )
    return array[..., top : top + size[0], left : left + size[1]]


def _corner_aligned(
    pixels: npt.NDArray[np.uint8], target: int | tuple[int, int]
) -> FloatArray:
    """Resize like the original implementation, bit for bit.

    The first and the last pixel fall on the first and the last; each pixel is the
    mean of its four neighbours, weighted by nearness. Everything is float32, in
    the order of the original; no product may be fused with a sum.

    Parameters
    ----------
    pixels : ndarray of uint8, shape (H, W) or (H, W, channels)
        The image.
    target : int or (int, int)
        Pixels of the shorter side, aspect ratio kept, or (height, width).
    """
    source = pixels.shape[:2]
    if isinstance(target, tuple):
        size = target
        steps = [_step(n, kept) for n, kept in zip(source, target, strict=True)]
    else:
        step = min(_step(n, target) for n in source)
        # A whole number of steps that rounding has put below itself counts.
        size = (
            int(float(np.float32(source[0] - 1) / step) + 1e-7) + 1,
            int(float(np.float32(source[1] - 1) / step) + 1e-7) + 1,
        )
        steps = [step, step]
    (top, bottom, near_top, near_bottom), (left, right, near_left, near_right) = (
        _neighbours(*axis) for axis in zip(source, size, steps, strict=True)
    )
    corners = (
        (top, near_top, left, near_left),
        (top, near_top, right, near_right),
        (bottom, near_bottom, left, near_left),
        (bottom, near_bottom, right, near_right),
    )
    channels = (1,) * (pixels.ndim - 2)
    total = np.zeros((*size, *pixels.shape[2:]), np.float32)
    weights = np.zeros((*size, *channels), np.float32)
    for row, near_row, column, near_column in corners:
        weight = (near_row[:, None] * near_column).reshape(weights.shape)
        total += pixels[row[:, None], column].astype(np.float32) * weight
        weights += weight
    total /= weights
    return total


def _step(source: int, target: int) -> np.float32:
    """Return how many pixels of the source one of the target is."""
    return np.float32(source - 1) / np.float32(max(target - 1, 1))


def _neighbours(
    source: int, target: int, step: np.float32
) -> tuple[IntArray, IntArray, FloatArray, FloatArray]:
    """Return the two neighbours of each pixel along an axis, and their nearness."""
    position = step * np.arange(target, dtype=np.float32)
    before = position.astype(np.intp)
    after = np.minimum(before + 1, source - 1)
    one = np.float32(1)
    near_before = one - (position - before.astype(np.float32))
    near_after = one - (after.astype(np.float32) - position)
    return before, after, near_before, near_after


def _map_npy(path: Path) -> npt.NDArray[np.floating]:
    """Map a ``.npy`` file of floats: no header makes this allocate."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    # The header's parser lets through whatever it trips over.
    except Exception as error:
        raise malformed(path, "content", error, "a .npy file of numbers") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        got = getattr(array, "dtype", type(array).__name__)
        raise malformed(path, "type", got, "floating-point numbers")
    return array


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
