"""Intermediate files of the workflow: arrays as safetensors, everything else as JSON.

A file appears under its name only when it is complete, and equal content makes equal
bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from qcnn_py.errors import ModelFormatError

# One entry only: safetensors does not promise an order of several.
_METADATA_KEY = "qcnn"


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary name beside `path` that becomes `path` on success.

    The name is always the same, so what a killed process leaves behind is
    overwritten by the next. An ``OSError`` that names no file, as of a full disk, is
    raised again with the name of this one.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.tmp")
    try:
        yield temporary
        temporary.replace(target)
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(target)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def save_json(path: str | os.PathLike[str], data: Any) -> None:
    """Write `data` as JSON with sorted keys; ``ValueError`` for NaN and infinity."""
    text = json.dumps(data, indent=2, sort_keys=True, allow_nan=False)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def load_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file.

    Raises
    ------
    ModelFormatError
        If the file is no JSON.
    OSError
        If the file cannot be read.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelFormatError(f"{path}: expected JSON, got {error}") from error


def save_arrays(
    path: str | os.PathLike[str],
    arrays: Mapping[str, npt.NDArray[Any]],
    metadata: Any,
) -> None:
    """Write named arrays and a JSON value.

    Parameters
    ----------
    path : path
        A ``.safetensors`` file; its folder is made where it does not exist.
    arrays : mapping of str to ndarray
        Any shapes; dtypes that safetensors knows.
    metadata : JSON value
        Stored beside the arrays.
    """
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    text = json.dumps(metadata, sort_keys=True, allow_nan=False)
    with replacing(path) as temporary:
        # Not save_file: it makes files that only their owner may read.
        temporary.write_bytes(save(contiguous, metadata={_METADATA_KEY: text}))


def load_arrays(
    path: str | os.PathLike[str],
) -> tuple[dict[str, npt.NDArray[Any]], Any]:
    """Read what `save_arrays` wrote.

    Returns
    -------
    arrays : dict of str to ndarray
        The arrays by name.
    metadata : JSON value
        What was stored beside them.

    Raises
    ------
    ModelFormatError
        If the file is malformed or was not written by `save_arrays`.
    OSError
        If the file cannot be read.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = json.loads((file.metadata() or {})[_METADATA_KEY])
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, metadata
    except (SafetensorError, KeyError, ValueError) as error:
        raise ModelFormatError(
            f"{path}: expected a safetensors file of this package, got {error}"
        ) from error
