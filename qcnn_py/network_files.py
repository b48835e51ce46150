"""Networks from files of any kind."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from qcnn_py.errors import ModelFormatError
from qcnn_py.network import Network
from qcnn_py.onnx_import import read_onnx

__all__ = ["read_network"]


def read_network(path: str | PathLike[str]) -> Network:
    """Read a ``.qcnn`` file, or an ONNX model if that is what it is called.

    Raises
    ------
    ModelFormatError
        If the file is malformed.
    UnsupportedOperator
        If an ONNX model has an operator that networks do not have.
    OSError
        If the file cannot be read.
    """
    suffix = Path(path).suffix
    if suffix == ".onnx":
        return read_onnx(path)
    try:
        return Network.load(path)
    except ModelFormatError as error:
        if suffix == ".qcnn":
            raise
        raise ModelFormatError(
            f"{error}; expected a .qcnn file, or an ONNX model called .onnx"
        ) from error
