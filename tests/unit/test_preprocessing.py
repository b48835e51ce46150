"""Preprocessing of single images."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qcnn_py.errors import DatasetError, ModelFormatError
from qcnn_py.preprocessing import Preprocessing, decode_image


def random_image(height: int, width: int, mode: str = "RGB") -> Image.Image:
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8))


def test_rgb_becomes_normalised_nchw() -> None:
    image = random_image(5, 7)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    preprocessing = Preprocessing("rgb", scale=1 / 255, mean=mean, std=std)

    array = preprocessing.apply(image)

    pixels = np.asarray(image).transpose(2, 0, 1) / 255
    expected = (pixels - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    assert array.dtype == np.float32
    np.testing.assert_allclose(array, expected, rtol=0, atol=1e-6)


def test_bgr_reverses_the_channels() -> None:
    image = random_image(4, 4)
    bgr = Preprocessing("bgr").pixels(image)
    np.testing.assert_array_equal(bgr[::-1], Preprocessing("rgb").pixels(image))


@pytest.mark.parametrize(
    ("mode", "channel_order", "n_channels"),
    [("RGB", "gray", 1), ("L", "rgb", 3), ("RGBA", "rgb", 3), ("L", "gray", 1)],
)
def test_modes_are_converted(mode: str, channel_order: Any, n_channels: int) -> None:
    pixels = Preprocessing(channel_order).pixels(random_image(3, 2, mode))
    assert pixels.shape == (n_channels, 3, 2)
    assert pixels.dtype == np.uint8


def test_palette_with_transparency_is_read_without_a_warning() -> None:
    image = random_image(4, 4).quantize(8)
    image.info["transparency"] = bytes(8)
    assert Preprocessing("rgb").pixels(image).shape == (3, 4, 4)


@pytest.mark.parametrize(
    ("size", "resize", "expected"),
    [
        ((20, 10), 5, (10, 5)),
        ((10, 21), 5, (5, 10)),
        ((20, 10), (6, 7), (6, 7)),
        ((3, 3), 6, (6, 6)),
    ],
    ids=["shorter width", "shorter height", "both", "enlarged"],
)
def test_resize(size: tuple[int, int], resize: Any, expected: tuple[int, int]) -> None:
    pixels = Preprocessing("rgb", resize=resize).pixels(random_image(*size))
    assert pixels.shape[1:] == expected


def test_crop_takes_the_centre() -> None:
    image = random_image(9, 8)
    cropped = Preprocessing("rgb", crop=(3, 4)).pixels(image)
    np.testing.assert_array_equal(
        cropped, Preprocessing("rgb").pixels(image)[:, 3:6, 2:6]
    )


def test_crop_larger_than_the_image_is_refused() -> None:
    with pytest.raises(DatasetError, match=r"got 4 x 5 pixels.*crop's 6 x 4"):
        Preprocessing("rgb", crop=(6, 4)).apply(random_image(4, 5))


def test_16_bit_images_are_refused() -> None:
    image = Image.fromarray(np.zeros((3, 3), np.uint16))
    with pytest.raises(DatasetError, match="'I;16', expected 8 bits"):
        Preprocessing("gray").apply(image)


def test_modes_that_pillow_cannot_convert_are_refused() -> None:
    with pytest.raises(DatasetError, match="'LAB', expected one that converts to L"):
        Preprocessing("gray").apply(Image.new("LAB", (4, 4)))


def test_data_that_are_no_pictures_are_refused() -> None:
    with pytest.raises(DatasetError, match="no pictures"):
        Preprocessing(None).apply(random_image(3, 3))


def test_a_path_is_read_and_turned_upright(tmp_path: Path) -> None:
    image = random_image(2, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: to be turned by 90 degrees clockwise.
    path = tmp_path / "turned.png"
    image.save(path, exif=exif)
    pixels = Preprocessing("rgb").pixels(path)
    np.testing.assert_array_equal(
        pixels, np.rot90(np.asarray(image), -1).transpose(2, 0, 1)
    )


@pytest.mark.parametrize(
    "content", [b"", b"no image at all", None], ids=["empty", "text", "truncated"]
)
def test_unreadable_images_are_named(content: bytes | None) -> None:
    if content is None:
        file = io.BytesIO()
        random_image(40, 40).save(file, "png")
        content = file.getvalue()[:300]
    with pytest.raises(DatasetError, match=r"cat\.png: expected a readable image"):
        decode_image(io.BytesIO(content), "cat.png")


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"nothing\.png"):
        Preprocessing("rgb").apply(tmp_path / "nothing.png")


@pytest.mark.parametrize(
    "preprocessing",
    [
        Preprocessing("rgb"),
        Preprocessing(None, scale=1.0),
        Preprocessing(
            "bgr",
            resize=(256, 200),
            resize_method="lanczos",
            crop=(227, 199),
            mean=(1.0, 2.0, 3.0),
            std=(0.5, 0.25, 2.0),
        ),
        Preprocessing("gray", resize=256),
    ],
)
def test_json_round_trip(preprocessing: Preprocessing) -> None:
    assert Preprocessing.from_json(preprocessing.to_json()) == preprocessing


@pytest.mark.parametrize(
    "changes",
    [
        {"channel_order": "rbg"},
        {"resize": 0},
        {"resize": [1, 2, 3]},
        {"resize_method": "magic"},
        {"crop": 5},
        {"scale": float("inf")},
        {"scale": "large"},
        {"mean": []},
        {"mean": 0.5},
        {"std": [0.0]},
        {"tint": "sepia"},
    ],
    ids=str,
)
def test_malformed_json_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ModelFormatError, match=next(iter(changes))):
        Preprocessing.from_json({**Preprocessing("rgb").to_json(), **changes})
