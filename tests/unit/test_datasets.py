"""Data sets: every source, the splits, and what is refused."""

import gzip
import io
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter
from reference_folder import write_bin

from qcnn_py.dataset_config import DatasetConfig
from qcnn_py.datasets import SPLITS, Dataset, prepare_dataset
from qcnn_py.errors import ConfigError, DatasetError, ModelFormatError, QcnnError

Files = dict[str, bytes]


def prepare(replicate: int = 0, seed: int = 0, **config: Any) -> Dataset:
    parsed = TypeAdapter(DatasetConfig).validate_python(config)
    return prepare_dataset(parsed, replicate=replicate, seed=seed)


def png(value: int, size: tuple[int, int] = (4, 5), mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size[::-1], (value,) * len(mode)).save(file, "png")
    return file.getvalue()


def image_files(n: int = 3, splits: tuple[str, ...] = ("train/", "test/")) -> Files:
    """Return images of two classes whose pixels tell split, class and number."""
    return {
        f"{split}{name}/{i}.png": png(50 * s + 20 * c + i)
        for s, split in enumerate(splits)
        for c, name in enumerate(("cat", "dog"))
        for i in range(n)
    }


def write_folder(path: Path, files: Files) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def write_zip(path: Path, files: Files) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            # An existing ZipInfo name is kept as it is, backslashes included.
            info = zipfile.ZipInfo("x")
            info.filename = name
            with warnings.catch_warnings(action="ignore"):  # duplicate names
                archive.writestr(info, content)
    return path


def gray_levels(dataset: Dataset, split: str) -> list[int]:
    return dataset.splits[split].images[:, 0, 0, 0].tolist()  # type: ignore[index]


# --- splits and the data set itself ---------------------------------------------------


def test_digits() -> None:
    dataset = prepare(source="digits", replicate=1)
    assert dataset.input_shape == (1, 8, 8)
    assert dataset.class_names == tuple("0123456789")
    assert sum(dataset.size(split) for split in SPLITS) == 1797
    images = dataset.images("train")
    assert images.dtype == np.float32
    assert (images.min(), images.max()) == (0, 1)
    # 0 … 16 are still told apart.
    assert len(np.unique(images)) == 17


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return 103 images whose pixels are their number, in classes of unequal size."""
    path = tmp_path_factory.mktemp("numbered") / "data.npz"
    images = np.broadcast_to(np.arange(103, dtype=np.uint8)[:, None, None], (103, 2, 2))
    np.savez(path, images=images, labels=np.repeat([7, 8, 9], [50, 43, 10]))
    return path


def test_folds_are_a_stratified_partition(numbered: Path) -> None:
    tests = []
    for replicate in range(5):
        dataset = prepare(
            replicate, source="npz", path=numbered, test_split="folds", validation=0.2
        )
        members = [gray_levels(dataset, split) for split in SPLITS]
        assert sorted(chain(*members)) == list(range(103))
        counts = np.bincount(dataset.labels("test"))
        np.testing.assert_allclose(counts, [10, 8.6, 2], atol=1)
        counts = np.bincount(dataset.labels("validation"))
        np.testing.assert_allclose(counts, np.array([40, 34.4, 8]) / 5, atol=1.3)
        tests.append(members[2])
    assert sorted(chain(*tests)) == list(range(103))


def test_labels_follow_their_images(numbered: Path) -> None:
    dataset = prepare(source="npz", path=numbered, test_split="folds")
    for split in SPLITS:
        expected = np.digitize(gray_levels(dataset, split), [50, 93])
        np.testing.assert_array_equal(dataset.labels(split), expected)
    assert dataset.class_names == ("7", "8", "9")


def test_limits_draw_stratified_subsets(numbered: Path) -> None:
    config = {"source": "npz", "path": numbered, "test_split": "folds"}
    full = prepare(**config)
    dataset = prepare(**config, limit={"train": 20, "test": 1000})
    assert dataset.size("train") == 20
    np.testing.assert_allclose(
        np.bincount(dataset.labels("train")), [9.7, 8.3, 2], atol=1.1
    )
    assert dataset.size("test") == full.size("test")
    assert set(gray_levels(dataset, "train")) < set(gray_levels(full, "train"))


def test_the_seed_decides(numbered: Path, tmp_path: Path) -> None:
    def saved(seed: int) -> bytes:
        dataset = prepare(source="npz", path=numbered, test_split="folds", seed=seed)
        dataset.save(tmp_path / "d.safetensors")
        return (tmp_path / "d.safetensors").read_bytes()

    assert saved(3) == saved(3)
    assert saved(3) != saved(4)


def test_save_and_load(tmp_path: Path) -> None:
    write_folder(tmp_path / "images", image_files())
    dataset = prepare(source="images", path=tmp_path / "images", mean=0.5)
    path = tmp_path / "deep" / "dataset.safetensors"
    dataset.save(path)
    loaded = Dataset.load(path)
    assert loaded.class_names == dataset.class_names
    assert loaded.preprocessing == dataset.preprocessing
    for split in SPLITS:
        np.testing.assert_array_equal(loaded.images(split), dataset.images(split))
        np.testing.assert_array_equal(loaded.labels(split), dataset.labels(split))
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_loading_other_files_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "dataset.safetensors"
    path.write_bytes(b"nonsense")
    with pytest.raises(ModelFormatError, match=r"dataset\.safetensors"):
        Dataset.load(path)


def test_calibration_images_come_from_the_training_split(numbered: Path) -> None:
    dataset = prepare(source="npz", path=numbered, test_split="folds")
    drawn, _ = dataset.calibration(30, seed=1)
    assert drawn.shape == (30, 1, 2, 2)
    assert drawn.dtype == np.float32
    numbers = np.rint(drawn[:, 0, 0, 0] * 255).astype(int).tolist()
    assert len(set(numbers)) == 30
    assert set(numbers) <= set(gray_levels(dataset, "train"))
    assert len(dataset.calibration(10_000, seed=1)[0]) == dataset.size("train")


def test_batches_are_the_images_in_order(numbered: Path) -> None:
    dataset = prepare(source="npz", path=numbered, test_split="folds")
    batches = list(dataset.batches("train", 16))
    assert {len(batch) for batch in batches[:-1]} == {16}
    np.testing.assert_array_equal(np.concatenate(batches), dataset.images("train"))


# --- sources --------------------------------------------------------------------------


@pytest.mark.parametrize("write", [write_folder, write_zip])
@pytest.mark.parametrize("root", ["", "root/"])
def test_image_folder(
    write: Callable[[Path, Files], Path], root: str, tmp_path: Path
) -> None:
    files = {f"{root}{name}": data for name, data in image_files().items()}
    files[f"{root}train/cat/notes.txt"] = b"not an image"
    files[f"{root}train/.cache/0.png"] = b"hidden"
    files["__MACOSX/._train/cat/0.png"] = b"resource fork"
    path = write(tmp_path / "images.zip", files)
    dataset = prepare(source="images", path=path, validation=0)
    assert dataset.class_names == ("cat", "dog")
    assert dataset.input_shape == (3, 4, 5)
    assert gray_levels(dataset, "train") == [0, 1, 2, 20, 21, 22]
    assert gray_levels(dataset, "test") == [50, 51, 52, 70, 71, 72]
    assert dataset.labels("test").tolist() == [0, 0, 0, 1, 1, 1]


def test_own_validation_split(tmp_path: Path) -> None:
    files = image_files(splits=("train/", "test/", "val/"))
    path = write_folder(tmp_path, files)
    dataset = prepare(source="images", path=path)
    assert gray_levels(dataset, "validation") == [100, 101, 102, 120, 121, 122]
    assert dataset.size("train") == 6


def test_class_folders_without_splits(tmp_path: Path) -> None:
    path = write_folder(tmp_path, image_files(n=4, splits=("",)))
    dataset = prepare(
        source="images", path=path, test_split="folds", folds=2, validation=0
    )
    members = gray_levels(dataset, "train") + gray_levels(dataset, "test")
    assert sorted(members) == [0, 1, 2, 3, 20, 21, 22, 23]


def test_backslashes_in_a_zip(tmp_path: Path) -> None:
    files = {name.replace("/", "\\"): data for name, data in image_files().items()}
    dataset = prepare(source="images", path=write_zip(tmp_path / "i.zip", files))
    assert dataset.class_names == ("cat", "dog")


def test_images_are_resized_and_cropped(tmp_path: Path) -> None:
    files = image_files()
    files["train/cat/0.png"] = png(9, (30, 20))
    dataset = prepare(
        source="images",
        path=write_folder(tmp_path, files),
        resize={"size": 8, "method": "nearest"},
        crop=[7, 6],
        channel_order="gray",
        scale=1.0,
        mean=[100.0],
        std=2.0,
        validation=0,
    )
    assert dataset.input_shape == (1, 7, 6)
    assert dataset.images("train")[0, 0, 0, 0] == pytest.approx((9 - 100) / 2)


def test_other_images_are_brought_to_the_size_of_the_data_set(tmp_path: Path) -> None:
    dataset = prepare(source="images", path=write_folder(tmp_path, image_files()))
    assert dataset.preprocessing.apply(Image.new("RGB", (50, 40))).shape == (3, 4, 5)


def idx(array: np.ndarray[Any, Any]) -> bytes:
    header = struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def idx_config(folder: Path, **changes: bytes) -> dict[str, Any]:
    """Write the four files of a tiny MNIST; `changes` replaces contents."""
    rng = np.random.default_rng(0)
    files = {
        "train_images": idx(rng.integers(0, 256, (8, 3, 4))),
        "train_labels": idx(np.arange(8) % 4 + 1),
        "test_images": idx(rng.integers(0, 256, (4, 3, 4))),
        "test_labels": idx(np.arange(4) % 4 + 1),
    }
    write_folder(folder, files | changes)
    return {"source": "idx", **{name: folder / name for name in files}}


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_idx(pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    images = np.random.default_rng(1).integers(0, 256, (8, 3, 4))
    config = idx_config(tmp_path, train_images=pack(idx(images)))
    dataset = prepare(**config, validation=0)
    np.testing.assert_array_equal(dataset.splits["train"].images[:, 0], images)
    # Labels that do not start at 0, as in EMNIST's letters.
    assert dataset.class_names == ("1", "2", "3", "4")
    assert dataset.labels("train").tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


def cifar_files(variant: int, n: int = 10) -> Files:
    rng = np.random.default_rng(variant)

    def records() -> bytes:
        pixels = rng.integers(0, 256, (n, 3072), np.uint8)
        fine = np.arange(n, dtype=np.uint8)[:, None]
        labels = fine if variant == 10 else np.hstack([fine // 5, fine])
        return np.hstack([labels, pixels]).tobytes()

    if variant == 10:
        names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
        lists = {"batches.meta.txt": "\n".join(f"c{i}" for i in range(10)) + "\n\n"}
    else:
        names = ["train.bin", "test.bin"]
        lists = {"coarse_label_names.txt": "\n".join(f"s{i}" for i in range(20))}
    files = {name: records() for name in names}
    return files | {name: text.encode() for name, text in lists.items()}


def test_cifar10(tmp_path: Path) -> None:
    files = cifar_files(10)
    path = write_folder(tmp_path, files)
    dataset = prepare(source="cifar", path=path, validation=0)
    assert dataset.class_names == tuple(f"c{i}" for i in range(10))
    assert dataset.splits["train"].images.shape == (50, 3, 32, 32)
    third = np.frombuffer(files["test_batch.bin"], np.uint8).reshape(10, -1)[3]
    np.testing.assert_array_equal(
        dataset.splits["test"].images[3].reshape(-1), third[1:]
    )


@pytest.mark.parametrize(("labels", "n_classes"), [("fine", 100), ("coarse", 20)])
def test_cifar100(labels: str, n_classes: int, tmp_path: Path) -> None:
    path = write_folder(tmp_path, cifar_files(100, n=100))
    dataset = prepare(source="cifar", path=path, labels=labels, validation=0)
    assert len(dataset.class_names) == n_classes
    expected = np.arange(100) // (1 if labels == "fine" else 5)
    np.testing.assert_array_equal(dataset.labels("train"), expected)
    assert dataset.class_names[1] == ("1" if labels == "fine" else "s1")


def test_float_npz(tmp_path: Path) -> None:
    images = np.random.default_rng(0).normal(size=(6, 2, 3, 5))
    np.savez(
        tmp_path / "data.npz",
        x=images.transpose(0, 2, 3, 1),
        y=[0, 1] * 3,
        test_images=images[:2].transpose(0, 2, 3, 1),
        test_labels=[0, 1],
    )
    dataset = prepare(
        source="npz",
        path=tmp_path / "data.npz",
        images="x",
        labels="y",
        layout="nhwc",
        mean=[1.0, 2.0],
        std=2.0,
        class_names=["no", "yes"],
        validation=0,
    )
    expected = (images - np.reshape([1, 2], (2, 1, 1))) / 2
    np.testing.assert_allclose(dataset.images("train"), expected, rtol=1e-5, atol=1e-6)
    assert dataset.splits["train"].images.dtype == np.float32
    assert dataset.class_names == ("no", "yes")


def reference_files(folder: Path, **changes: Any) -> dict[str, Any]:
    """Write a tiny speed test of 12 images; `changes` replaces arrays and types."""
    arrays = {
        "dataMatTst.single": (
            np.random.default_rng(0).normal(size=(12, 3, 4, 5)),
            "<f4",
        ),
        "lablVecTst.uint16": (np.array([7, 2, 900, 2, 2, 0] * 2), "<u2"),
    }
    for name, (array, dtype) in arrays.items():
        array = changes.get(name.partition(".")[0], array)
        write_bin(folder / f"{name}.bin", array, dtype)
    return {"source": "reference", "path": folder}


def test_the_speed_test_of_the_original(tmp_path: Path) -> None:
    config = reference_files(tmp_path)
    images = np.random.default_rng(0).normal(size=(12, 3, 4, 5)).astype(np.float32)
    labels = np.array([7, 2, 900, 2, 2, 0] * 2)
    tested = []
    for replicate in range(3):
        dataset = prepare(replicate, **config, folds=3, validation=0)
        assert dataset.input_shape == (3, 4, 5)
        assert dataset.class_names == tuple(map(str, range(1000)))
        assert dataset.size("test") == 4
        for split in ("train", "test"):
            for image, label in zip(
                dataset.images(split), dataset.labels(split), strict=True
            ):
                # As they are: prepared before.
                item = (images == image).all((1, 2, 3)).argmax()
                np.testing.assert_array_equal(images[item], image)
                assert labels[item] == label
                tested += [int(item)] * (split == "test")
    assert sorted(tested) == list(range(12))


def test_class_names_of_the_speed_test(tmp_path: Path) -> None:
    config = reference_files(tmp_path, lablVecTst=np.arange(12).reshape(12, 1) % 3)
    names = tmp_path / "names.txt"
    names.write_text("tench, Tinca tinca\ngoldfish\nray\n", "utf-8")
    dataset = prepare(**config, n_classes=3, class_names=names)
    assert dataset.class_names == ("tench, Tinca tinca", "goldfish", "ray")
    parsed = TypeAdapter(DatasetConfig).validate_python(
        {**config, "class_names": names}
    )
    assert [path.name for path in parsed.input_paths] == [
        "dataMatTst.single.bin",
        "lablVecTst.uint16.bin",
        "names.txt",
    ]


@pytest.mark.parametrize("crop", [None, [3, 2]])
def test_a_mean_image(crop: Any, tmp_path: Path) -> None:
    path = write_folder(tmp_path / "images", image_files())
    mean = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    np.save(tmp_path / "mean.npy", mean)
    config = {
        "source": "images",
        "path": path,
        "resize": {"size": [4, 5], "method": "corner_aligned"},
        "crop": crop,
        "scale": 1.0,
    }
    plain = prepare(**config)
    config["mean"] = str(tmp_path / "mean.npy")
    dataset = prepare(**config)
    kept = mean if crop is None else mean[:, 0:3, 1:3]
    np.testing.assert_array_equal(dataset.images("test"), plain.images("test") - kept)
    # What classifies later, from the file that was saved.
    dataset.save(tmp_path / "dataset.safetensors")
    loaded = Dataset.load(tmp_path / "dataset.safetensors")
    assert loaded.preprocessing == dataset.preprocessing
    np.testing.assert_array_equal(
        loaded.preprocessing.apply(path / "test" / "cat" / "0.png"),
        dataset.images("test")[0],
    )
    parsed = TypeAdapter(DatasetConfig).validate_python(config)
    assert parsed.input_paths == (path, tmp_path / "mean.npy")


def test_a_mean_image_of_arrays(numbered: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "mean.npy", np.full((1, 2, 2), 0.25))
    config = {"source": "npz", "path": numbered, "test_split": "folds"}
    dataset = prepare(**config, mean=tmp_path / "mean.npy")
    np.testing.assert_array_equal(
        dataset.images("test"), prepare(**config).images("test") - np.float32(0.25)
    )


# --- refusals -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train/cat/1.png": b"GIF?"}, r"train/cat/1\.png: expected a readable image"),
        ({"train/cat/1.png": png(0, (9, 9))}, r"1\.png: got shape \(3, 9, 9\)"),
        ({"train/cow/0.png": png(0)}, "test lacks classes 'cow' and has others none"),
        ({"test/cow/0.png": png(0)}, "test lacks classes none and has others 'cow'"),
        ({"other/cat/0.png": png(0)}, "got folders 'other', 'test', 'train'"),
        ({"train/0.png": png(0)}, r"got image 'train/0\.png', expected .*<split>"),
        ({"train/cat/deep/0.png": png(0)}, r"'train/cat/deep/0\.png', expected"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("write", [write_folder, write_zip])
def test_odd_image_folders_are_refused(
    write: Callable[[Path, Files], Path],
    changes: Files,
    message: str,
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "data", image_files() | changes)
    with pytest.raises(DatasetError, match=message):
        prepare(source="images", path=path)


def test_empty_class_folders_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "data", image_files() | {"train/cow/notes.txt": b""})
    with pytest.raises(DatasetError, match=r"class folder 'train/cow'"):
        prepare(source="images", path=tmp_path / "data")
    archive = shutil.make_archive(str(tmp_path / "data"), "zip", tmp_path / "data")
    with pytest.raises(DatasetError, match=r"class folder 'train/cow'"):
        prepare(source="images", path=archive)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../train/cat/9.png", "expected relative paths"),
        ("/train/cat/9.png", "expected relative paths"),
        ("train//cat/./0.png", r"'train/cat/0\.png' twice"),
    ],
)
def test_odd_names_in_a_zip_are_refused(
    name: str, message: str, tmp_path: Path
) -> None:
    path = write_zip(tmp_path / "data.zip", image_files() | {name: png(0)})
    with pytest.raises(DatasetError, match=message):
        prepare(source="images", path=path)


def test_damaged_zip_members_are_named(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "data.zip", image_files())
    content = bytearray(path.read_bytes())
    # In the first member's pixels: its checksum does not fit any more.
    content[content.index(b"IDAT") + 6] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=r"data\.zip/train/cat/0\.png"):
        prepare(source="images", path=path)


@pytest.mark.parametrize("start", ["find", "rfind"], ids=["member", "directory"])
def test_names_that_are_no_text_are_refused(start: str, tmp_path: Path) -> None:
    files = {name.replace("cat", "cät"): data for name, data in image_files().items()}
    path = write_zip(tmp_path / "data.zip", files)
    content = path.read_bytes()
    place = getattr(content, start)("ä".encode())
    path.write_bytes(content[:place] + b"\xff\xff" + content[place + 2 :])
    with pytest.raises(DatasetError, match=r"data\.zip.*codec can't decode"):
        prepare(source="images", path=path)


@pytest.mark.parametrize("content", [None, b"no zip"], ids=["missing", "text"])
def test_images_that_are_no_zip_are_refused(
    content: bytes | None, tmp_path: Path
) -> None:
    path = tmp_path / "data.zip"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DatasetError, match=r"data\.zip.*expected a folder"):
        prepare(source="images", path=path)


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="got no image"):
        prepare(source="images", path=tmp_path)


def test_missing_test_images_are_refused(tmp_path: Path) -> None:
    path = write_folder(tmp_path, image_files(splits=("",)))
    with pytest.raises(DatasetError, match="got no test images"):
        prepare(source="images", path=path)


_IMAGES = idx(np.zeros((8, 3, 4)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_images": _IMAGES[:-1]}, "got 111 bytes, expected 112"),
        ({"train_images": _IMAGES + b"!"}, "got more than 112 bytes, expected 112"),
        ({"train_images": _IMAGES[:9]}, "truncated, got 9 bytes.*header of 16"),
        ({"train_images": b""}, "truncated, got 0 bytes"),
        ({"train_images": gzip.compress(_IMAGES)[:-9]}, "damaged gzip"),
        ({"train_images": b"\x1f\x8bnonsense"}, "damaged gzip"),
        # 16 MB of zeros that the header says nothing of are not unpacked.
        (
            {"train_images": gzip.compress(_IMAGES + bytes(2**24))},
            "got more than 112 bytes, expected 112 for shape",
        ),
        (
            {
                "train_images": gzip.compress(
                    idx(np.zeros((1, 1, 1)))[:4] + b"\xff" * 12
                )
            },
            "got 16 bytes, expected 79228162458924105385300197391",
        ),
        ({"train_images": idx(np.arange(30))}, "0x00000801, expected 0x00000803"),
        ({"train_labels": b"\0\0\x0d\1\0\0\0\1\0\0\0\0"}, "0x00000d01"),
        ({"train_labels": idx(np.arange(5))}, "got 8 train images and 5 labels"),
        ({"test_labels": idx(np.arange(6, 10))}, "got test labels '6', '7', '8', '9'"),
        (
            {"test_images": idx(np.zeros((4, 3, 5)))},
            r"shape \(3, 5\), expected.*\(3, 4\)",
        ),
        ({"train_images": idx(np.zeros((0, 3, 4)))}, "expected as many labels"),
        (
            {"train_images": _IMAGES[:4] + b"\xff" * 8 + bytes(4)},
            r"got shape \(4294967295, 4294967295, 0\)",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else None,
)
def test_malformed_idx_files_are_refused(
    changes: Mapping[str, bytes], message: str, tmp_path: Path
) -> None:
    config = idx_config(tmp_path, **changes)
    with pytest.raises(DatasetError, match=message):
        prepare(**config)


def test_npz_members_that_are_no_arrays_are_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "data.npz", {"images": b"text", "labels": b"text"})
    with pytest.raises(
        DatasetError, match=r"got arrays .*expected one called 'images'"
    ):
        prepare(source="npz", path=path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    config = idx_config(tmp_path)
    config["test_labels"].unlink()
    with pytest.raises(DatasetError, match="test_labels: not found"):
        prepare(**config)
    with pytest.raises(DatasetError, match="nowhere: not found"):
        prepare(source="cifar", path=tmp_path / "nowhere")
    with pytest.raises(DatasetError, match=r"data_batch_1\.bin: not found"):
        prepare(source="cifar", path=tmp_path)
    with pytest.raises(DatasetError, match=r"x\.npz: not found"):
        prepare(source="npz", path=tmp_path / "x.npz")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_batch_3.bin": bytes(3072)}, "got 3072 bytes, expected a multiple of"),
        ({"test_batch.bin": b""}, "got 0 bytes"),
        ({"test_batch.bin": b"\x0a" + bytes(3072)}, "test labels '10' beyond the 10"),
        ({"batches.meta.txt": b"cat\ndog"}, "got 2 class names, expected 10"),
    ],
    ids=lambda value: "" if isinstance(value, str) else None,
)
def test_malformed_cifar_files_are_refused(
    changes: Files, message: str, tmp_path: Path
) -> None:
    path = write_folder(tmp_path, cifar_files(10) | changes)
    with pytest.raises(DatasetError, match=message):
        prepare(source="cifar", path=path)


_NPZ: dict[str, Any] = {
    "images": np.zeros((4, 3, 2, 2), np.uint8),
    "labels": np.array([0, 1, 0, 1]),
    "test_images": np.zeros((2, 3, 2, 2), np.uint8),
    "test_labels": np.array([0, 1]),
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": np.array([None] * 4)}, "plain numeric arrays"),
        ({"labels": np.zeros(4)}, "'labels' has dtype float64"),
        ({"labels": np.zeros((4, 2), int)}, r"shape \(4, 2\)"),
        ({"labels": np.zeros(3, int)}, "got 4 train images and 3 labels"),
        ({"test_labels": np.array([0, 2])}, "test labels '2' beyond"),
        ({"images": np.zeros((4, 2))}, "'images' has dtype float64 and shape"),
        ({"images": np.zeros((4, 2, 2), np.uint16)}, "dtype uint16"),
        ({"images": np.full((4, 3, 2, 2), np.nan)}, "no finite float32"),
        ({"images": np.zeros((4, 3, 2, 2))}, "got test images uint8"),
        ({"images": np.zeros((4, 3, 0, 2), np.uint8)}, "at least one pixel"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_odd_npz_files_are_refused(
    changes: Mapping[str, Any], message: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "data.npz", **{**_NPZ, **changes})
    with pytest.raises(DatasetError, match=message):
        prepare(source="npz", path=tmp_path / "data.npz")


def write_unknown_compression(file: Any) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **_NPZ)
    data = bytearray(buffer.getvalue())
    # The method, in the first entry of the central directory.
    data[data.index(b"PK\x01\x02") + 10] = 255
    file.write(data)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"dataMatTst": np.zeros((12, 60))}, {}, "number of dimensions: got 2"),
        (
            {"dataMatTst": np.full((12, 3, 4, 5), np.nan)},
            {},
            r"dataMatTst.single.bin, image \d+: got NaN or infinite",
        ),
        ({"lablVecTst": np.arange(11)}, {}, r"shape \(11,\), expected one .* 12"),
        ({"lablVecTst": np.zeros((3, 4))}, {}, r"shape \(3, 4\), expected one"),
        ({}, {"n_classes": 900}, "got label 900, expected less than .*n_classes, 900"),
        ({}, {"class_names": "names.txt"}, r"names\.txt: got 2 lines, expected 1000"),
        ({}, {"class_names": "none.txt"}, r"none\.txt: not found"),
        ({}, {"folds": 13}, "got 12 images, expected at least 13"),
    ],
    ids=["rank", "nan", "count", "table", "label", "names", "no names", "folds"],
)
def test_odd_speed_tests_are_refused(
    changes: Mapping[str, Any],
    options: dict[str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    config = reference_files(tmp_path, **changes)
    with pytest.raises(DatasetError, match=message):
        prepare(**config, **options)


@pytest.mark.parametrize("name", ["dataMatTst.single.bin", "lablVecTst.uint16.bin"])
def test_damaged_speed_tests_are_refused(name: str, tmp_path: Path) -> None:
    config = reference_files(tmp_path)
    path = tmp_path / name
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(DatasetError, match=rf"{name}: data after the header: got \d+"):
        prepare(**config)
    path.write_bytes(b"")
    with pytest.raises(DatasetError, match=rf"{name}: number of dimensions: got cut"):
        prepare(**config)
    path.unlink()
    with pytest.raises(DatasetError, match=rf"{name}: not found"):
        prepare(**config)


def test_a_mean_image_of_another_size_is_refused(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "images", image_files())
    np.save(tmp_path / "mean.npy", np.zeros((3, 5, 5)))
    with pytest.raises(
        ModelFormatError, match=r"got \(3, 5, 5\), expected \(3, 4, 5\)"
    ):
        prepare(source="images", path=path, mean=tmp_path / "mean.npy")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda file: np.save(file, np.zeros(3)), "expected a .npz file"),
        (lambda file: file.write(b"text"), "data.npz: expected"),
        (write_unknown_compression, "expected a .npz file, got That compression"),
        (
            lambda file: np.savez(file, x=np.zeros(3)),
            "'x', expected one called 'images",
        ),
    ],
    ids=["npy", "text", "unknown compression", "other names"],
)
def test_files_that_are_no_data_set_are_refused(
    write: Callable[[Any], object], message: str, tmp_path: Path
) -> None:
    with (tmp_path / "data.npz").open("wb") as file:
        write(file)
    with pytest.raises(DatasetError, match=message):
        prepare(source="npz", path=tmp_path / "data.npz")


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"folds": 5, "replicate": 5}, ConfigError, "dataset.folds is 5"),
        ({"folds": 11}, DatasetError, "smallest class has 10 images"),
        ({"class_names": ["a", "b"]}, DatasetError, "labels '7', '8', '9'|no training"),
        ({"mean": [0.1, 0.2]}, ConfigError, "dataset.mean: got 2 numbers.*expected 1"),
        ({"validation": 0.999}, ConfigError, "dataset.validation"),
        ({"crop": 3}, DatasetError, r"train image \d+: got 2 x 2 pixels"),
        ({"test_split": "own"}, DatasetError, "got no test images"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_that_do_not_fit_are_refused(
    config: dict[str, Any], error: type[QcnnError], message: str, numbered: Path
) -> None:
    options = {"source": "npz", "path": numbered, "test_split": "folds", **config}
    with pytest.raises(error, match=message):
        prepare(**options)


def test_geometry_of_arrays_that_are_no_pictures_is_refused(tmp_path: Path) -> None:
    floats = {k: v.astype(np.float32) if v.ndim > 1 else v for k, v in _NPZ.items()}
    np.savez(tmp_path / "data.npz", **floats)
    with pytest.raises(ConfigError, match=r"dataset\.crop"):
        prepare(source="npz", path=tmp_path / "data.npz", crop=1)


# --- real data ------------------------------------------------------------------------


def test_cifar10_as_zip_of_images(test_data: Path) -> None:
    dataset = prepare(
        source="images",
        path=test_data / "cifar10.zip",
        limit={"train": 200, "validation": 50, "test": 100},
    )
    assert dataset.input_shape == (3, 32, 32)
    assert dataset.class_names[:2] == ("airplane", "automobile")
    assert np.bincount(dataset.labels("train")).tolist() == [20] * 10
    assert np.bincount(dataset.labels("test")).tolist() == [10] * 10
    # Photographs, not noise: neighbouring pixels are alike.
    images = dataset.images("train")
    assert np.abs(np.diff(images, axis=-1)).mean() < 0.1 < images.std()
