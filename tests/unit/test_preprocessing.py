"""Preprocessing of single images."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from reference_folder import write_bin

from qcnn_py.errors import ConfigError, DatasetError, ModelFormatError, ShapeError
from qcnn_py.preprocessing import MeanImage, Preprocessing, decode_image


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


def corner_aligned(pixels: np.ndarray, target: Any) -> np.ndarray:
    """Resize one value after the other, with the original's roundings."""
    f = np.float32
    height, width = pixels.shape[:2]
    both = (target, target) if isinstance(target, int) else target
    steps = [f(n - 1) / f(m - 1) for n, m in zip((height, width), both, strict=True)]
    if isinstance(target, int):
        steps = [min(steps)] * 2
        both = [int(float(f(n - 1) / steps[0]) + 1e-7) + 1 for n in (height, width)]
    resized = np.empty((*both, *pixels.shape[2:]), np.float32)
    for index in np.ndindex(resized.shape):
        y, x = steps[0] * f(index[0]), steps[1] * f(index[1])
        top, left = int(y), int(x)
        bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
        total = weights = f(0)
        for row, near_row in ((top, 1 - (y - f(top))), (bottom, 1 - (f(bottom) - y))):
            for col, near_col in (
                (left, 1 - (x - f(left))),
                (right, 1 - (f(right) - x)),
            ):
                weight = near_row * near_col
                total += f(pixels[(row, col, *index[2:])]) * weight
                weights += weight
        resized[index] = total / weights
    return resized


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(
    ("size", "target"),
    [
        ((9, 7), (4, 5)),
        ((4, 5), (9, 8)),
        ((6, 6), (6, 6)),
        ((1, 9), (3, 4)),
        ((13, 11), (2, 2)),
        ((12, 9), 5),
        ((8, 21), 6),
        ((3, 4), 7),
        ((2, 2), 3),
    ],
    ids=str,
)
def test_corner_aligned_resize(size: tuple[int, int], target: Any, mode: Any) -> None:
    image = random_image(*size, mode)
    order = "rgb" if mode == "RGB" else "gray"
    pixels = Preprocessing(order, resize=target, resize_method="corner_aligned").pixels(
        image
    )
    assert pixels.dtype == np.float32
    expected = corner_aligned(np.asarray(image), target)
    expected = expected[None] if mode == "L" else expected.transpose(2, 0, 1)
    np.testing.assert_array_equal(pixels, expected)
    # Corners stay what they are.
    for row, column in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        if isinstance(target, tuple):
            corner = np.asarray(image)[row, column]
            np.testing.assert_allclose(pixels[:, row, column], corner, rtol=1e-5)


def test_a_corner_aligned_resize_to_one_pixel() -> None:
    pixels = Preprocessing("gray", resize=(1, 1), resize_method="corner_aligned")
    image = random_image(5, 4, "L")
    assert pixels.pixels(image) == np.asarray(image)[0, 0]


def test_corners_that_are_one_are_refused() -> None:
    preprocessing = Preprocessing("rgb", resize=8, resize_method="corner_aligned")
    with pytest.raises(DatasetError, match=r"got 1 x 9 pixels.*at least 2 x 2"):
        preprocessing.apply(random_image(1, 9))


def mean_file(path: Path, array: np.ndarray) -> Path:
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        write_bin(path, array)
    return path


@pytest.mark.parametrize("name", ["mean.npy", "mean.bin"])
def test_a_mean_image_is_cropped_like_the_images(name: str, tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal(100, 20, (3, 9, 8)).astype(np.float32)
    path = mean_file(tmp_path / name, array)
    mean = MeanImage.read(path, (3, 4, 5), (9, 8))
    np.testing.assert_array_equal(mean.array, array[:, 2:6, 1:6])
    small = mean_file(tmp_path / f"small_{name}", mean.array)
    assert MeanImage.read(small, (3, 4, 5), (9, 8)) == mean

    image = random_image(11, 12)
    method: Any = "corner_aligned"
    prepared = Preprocessing(
        "bgr",
        resize=(9, 8),
        resize_method=method,
        crop=(4, 5),
        scale=1.0,
        mean=mean,
        std=(2.0,),
    )
    plain = Preprocessing("bgr", resize=(9, 8), resize_method=method, scale=1.0)
    expected = (plain.apply(image) - array)[:, 2:6, 1:6] / np.float32(2)
    np.testing.assert_array_equal(prepared.apply(image), expected)


def test_float64_means_become_float32(tmp_path: Path) -> None:
    path = mean_file(tmp_path / "mean.npy", np.full((1, 2, 2), 0.1))
    mean = MeanImage.read(path, (1, 2, 2), None)
    np.testing.assert_array_equal(mean.array, np.full((1, 2, 2), np.float32(0.1)))


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("mean.npy", np.zeros((3, 9, 9)), r"got \(3, 9, 9\), expected \(3, 4, 5\) or"),
        ("mean.bin", np.zeros((3, 9, 9)), r"got \(3, 9, 9\), expected \(3, 4, 5\) or"),
        ("mean.npy", np.zeros(3), r"got \(3,\)"),
        ("mean.npy", np.zeros((3, 4, 5), int), "type: got int64"),
        ("mean.npy", np.array([None]), "expected a .npy file of numbers"),
        ("mean.npy", np.full((3, 4, 5), np.nan), "got NaN or infinite"),
        ("mean.npy", np.full((3, 4, 5), 1e99), "got NaN or infinite"),
        ("mean.bin", np.full((3, 4, 5), np.inf), "got NaN or infinite"),
    ],
    ids=["npy", "bin", "list", "integers", "objects", "nan", "large", "infinite"],
)
def test_odd_mean_images_are_refused(
    name: str, array: np.ndarray, message: str, tmp_path: Path
) -> None:
    path = mean_file(tmp_path / name, array)
    with pytest.raises(ModelFormatError, match=message) as caught:
        MeanImage.read(path, (3, 4, 5), (9, 8))
    assert str(path) in str(caught.value)


def test_mean_images_of_other_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"mean is .*mean\.png, expected a \.npy"):
        MeanImage.read(tmp_path / "mean.png", (3, 4, 5), None)
    with pytest.raises(FileNotFoundError, match=r"mean\.npy"):
        MeanImage.read(tmp_path / "mean.npy", (3, 4, 5), None)


def test_images_of_another_size_than_their_mean_are_refused() -> None:
    mean = MeanImage.from_array(np.zeros((3, 4, 5)))
    with pytest.raises(ShapeError, match=r"shape \(3, 5, 4\), expected .*\(3, 4, 5\)"):
        Preprocessing("rgb", mean=mean).apply(random_image(5, 4))


def test_16_bit_images_lose_their_lower_bits(tmp_path: Path) -> None:
    values = np.array([[0, 255, 256], [0x1234, 0xFF00, 0xFFFF]], np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    Image.fromarray((values >> 8).astype(np.uint8)).save(tmp_path / "flat.png")
    for order in ("gray", "rgb"):
        deep, flat = (
            Preprocessing(order).pixels(tmp_path / f"{name}.png")
            for name in ("deep", "flat")
        )
        np.testing.assert_array_equal(deep, flat)


def test_images_of_unknown_range_are_refused() -> None:
    image = Image.fromarray(np.zeros((3, 3), np.float32))
    with pytest.raises(DatasetError, match="'F', expected 8 or 16 bits"):
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
        Preprocessing(
            "rgb",
            resize=9,
            resize_method="corner_aligned",
            mean=MeanImage.from_array(np.arange(12.0).reshape(3, 2, 2) / 7),
        ),
    ],
)
def test_json_round_trip(preprocessing: Preprocessing) -> None:
    text = json.dumps(preprocessing.to_json())
    assert Preprocessing.from_json(json.loads(text)) == preprocessing


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
        {"mean": {"shape": [1, 1, 1]}},
        {"mean": {"shape": [1, 1], "float32": "AAAAAA=="}},
        {"mean": {"shape": [1, 1, -1], "float32": "AAAAAA=="}},
        {"mean": {"shape": [1, 1, 2], "float32": "AAAAAA=="}},
        {"mean": {"shape": [1, 1, 1], "float32": "AAAAAA"}},
        {"mean": {"shape": [1, 1, 1], "float32": "AADAfw=="}},
        {"mean": {"shape": [1, 1, 1], "float32": 3}},
        {"std": [0.0]},
        {"tint": "sepia"},
    ],
    ids=str,
)
def test_malformed_json_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ModelFormatError, match=next(iter(changes))):
        Preprocessing.from_json({**Preprocessing("rgb").to_json(), **changes})
