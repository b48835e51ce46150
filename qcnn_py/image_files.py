"""Image files in a folder or a zip of one."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from PIL import Image

from qcnn_py.errors import DatasetError
from qcnn_py.preprocessing import decode_image

__all__ = [
    "IMAGE_SUFFIXES",
    "ZIP_ERRORS",
    "ImageFiles",
    "is_visible",
    "open_image_files",
]

IMAGE_SUFFIXES = (
    ".bmp",
    ".gif",
    ".jpeg",
    ".jpg",
    ".pgm",
    ".png",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
)

ZIP_ERRORS = (
    OSError,
    EOFError,
    RuntimeError,
    UnicodeDecodeError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What zipfile raises for damaged, encrypted and exotic archives and members."""


@dataclass(frozen=True)
class ImageFiles:
    """The images of a folder or zip.

    Attributes
    ----------
    path : Path
        The folder or zip.
    names : tuple of str
        Paths of the images below it, with forward slashes, sorted.
    folders : tuple of str
        Paths of all folders below it that are stated, sorted.
    open : callable
        Opens an image by its name.
    """

    path: Path
    names: tuple[str, ...]
    folders: tuple[str, ...]
    open: Callable[[str], IO[bytes]]

    def decode(self, name: str) -> Image.Image:
        """Read an image.

        Raises
        ------
        DatasetError
            If it cannot be read.
        """
        full_name = f"{self.path}/{name}"
        try:
            with self.open(name) as file:
                return decode_image(file, full_name)
        except ZIP_ERRORS as error:
            raise DatasetError(f"{full_name}: cannot be read: {error}") from error


@contextmanager
def open_image_files(path: str | os.PathLike[str]) -> Iterator[ImageFiles]:
    """List the images of a folder or zip; they can be read inside the context.

    Raises
    ------
    DatasetError
        If there is no such folder or zip, or no image in it.
    """
    path = Path(path)
    if path.is_dir():
        names, folders = _list_folder(path)
        yield _image_files(path, names, folders, lambda name: (path / name).open("rb"))
        return
    with _open_zip(path) as archive:
        members, folders = _list_zip(path, archive)
        yield _image_files(
            path, list(members), folders, lambda name: archive.open(members[name])
        )


def is_visible(name: str) -> bool:
    """Whether a path is free of hidden parts and of macOS's resource forks."""
    return not any(
        part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts
    )


def _image_files(
    path: Path, names: list[str], folders: list[str], open_: Callable[[str], IO[bytes]]
) -> ImageFiles:
    images = tuple(
        name
        for name in sorted(names)
        if is_visible(name) and name.lower().endswith(IMAGE_SUFFIXES)
    )
    if not images:
        raise DatasetError(
            f"{path}: got no image, expected files named {', '.join(IMAGE_SUFFIXES)}"
        )
    return ImageFiles(path, images, tuple(sorted(folders)), open_)


def _list_folder(path: Path) -> tuple[list[str], list[str]]:
    """Return files and folders below a folder, relative, with forward slashes."""
    files: list[str] = []
    folders: list[str] = []
    for root, below, names in os.walk(path, followlinks=True):
        base = Path(root).relative_to(path)
        files += [(base / name).as_posix() for name in names]
        folders += [(base / name).as_posix() for name in below]
    return files, folders


@contextmanager
def _open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        archive = zipfile.ZipFile(path)
    except FileNotFoundError as error:
        raise DatasetError(
            f"{path}: not found, expected a folder of images or a zip of one"
        ) from error
    except ZIP_ERRORS as error:
        raise DatasetError(
            f"{path}: expected a folder of images or a zip of one, got {error}"
        ) from error
    with archive:
        yield archive


def _list_zip(
    path: Path, archive: zipfile.ZipFile
) -> tuple[dict[str, zipfile.ZipInfo], list[str]]:
    """Return files by name and folders, with forward slashes."""
    files: dict[str, zipfile.ZipInfo] = {}
    folders: list[str] = []
    for info in archive.infolist():
        # Some archivers on Windows write backslashes.
        name = info.filename.replace("\\", "/")
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts:
            raise DatasetError(
                f"{path}: got entry {info.filename!r}, expected relative paths inside "
                "the archive"
            )
        tidy = "/".join(parts)
        if name.endswith("/"):
            folders.append(tidy)
        elif tidy in files:
            raise DatasetError(f"{path}: got entry {tidy!r} twice, expected it once")
        else:
            files[tidy] = info
    return files, folders
