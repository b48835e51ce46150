"""What the rules and scripts of the Snakemake workflow share."""

from __future__ import annotations

import ast
import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from qcnn_py.checkpoints import Checkpoint
from qcnn_py.config import LayerShape
from qcnn_py.errors import ModelFormatError, QcnnError

_PACKAGE = Path(__file__).parent

# Modules that cannot change what a stage computes: it does not use them, or settings
# reach it as parameters of its rule, which Snakemake compares by itself.
_WITHOUT_EFFECT = frozenset(
    {
        "classification",
        "config",
        "dataset_config",
        "errors",
        "inspection",
        "workflow",
    }
)

# Files beside the modules that a module reads.
_ASSETS = {"report_page": "report_assets"}

logger = logging.getLogger(__name__)


def code_fingerprint(script: str | os.PathLike[str]) -> str:
    """Return a hash of the code that a script runs.

    It covers the script, :func:`modules_of` it with the files they bring and the
    built engine if one of them uses it. Comments, docstrings and layout do not count.

    Parameters
    ----------
    script : path
        A Python file.
    """
    digest = hashlib.sha256(_normalized(Path(script)).encode())
    for name in modules_of(script):
        digest.update(_module_content(name))
    return digest.hexdigest()[:16]


def folder_fingerprint(path: str | os.PathLike[str]) -> str | None:
    """Return a hash of names, sizes and times of what is below a folder.

    It stands in for the time of a folder, which stays when a file deeper in it is
    added, changed or removed. Hidden files do not count.

    Parameters
    ----------
    path : path
        Anything; ``None`` is returned for what is no folder.
    """
    if not Path(path).is_dir():
        return None
    digest = hashlib.sha256()
    for root, folders, files in os.walk(path, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        digest.update(f"{os.path.relpath(root, path)}\0".encode("utf-8", "replace"))
        for name in sorted(files):
            if name.startswith("."):
                continue
            file = Path(root, name)
            # A link to nothing is what the job will complain about.
            state = file.stat() if file.exists() else file.lstat()
            entry = f"{name}\0{state.st_size}\0{state.st_mtime_ns}\0"
            digest.update(entry.encode("utf-8", "replace"))
    return digest.hexdigest()[:16]


def modules_of(script: str | os.PathLike[str]) -> list[str]:
    """Return the modules of this package that a script imports, directly or not.

    Those that cannot change what a stage computes are left out.
    """
    names = list(_imports(Path(script)))
    found: set[str] = set()
    while names:
        name = names.pop()
        if name in found or name in _WITHOUT_EFFECT:
            continue
        found.add(name)
        if (source := _PACKAGE / f"{name}.py").exists():
            names += _imports(source)
    return sorted(found)


@contextmanager
def reporting(log: str | os.PathLike[str]) -> Iterator[None]:
    """Run a stage: log to a file, end an expected error with one line.

    On a terminal the log is also shown as it grows.

    A :class:`~qcnn_py.errors.QcnnError` or ``OSError`` is written to the log and to
    stderr without a traceback and ends the process with exit code 1. The log keeps
    the traceback of any other exception.
    """
    # One job, one thread: what a reduction adds up first must not depend on the
    # cores that happen to be free. XLA sizes its thread pool by this when JAX starts
    # its first computation; Snakemake limits the threads of BLAS.
    os.environ["NPROC"] = "1"
    on_terminal = sys.stderr.isatty()
    handlers: list[logging.Handler] = [logging.FileHandler(log, mode="w")]
    if on_terminal:
        handlers.append(logging.StreamHandler())
    logging.basicConfig(
        handlers=handlers,
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        force=True,
    )
    logging.captureWarnings(True)
    try:
        yield
    except (QcnnError, OSError) as error:
        logger.error("%s", error)
        if not on_terminal:
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except Exception:
        logger.exception("unexpected error")
        raise


@contextmanager
def checkpoint_of(stage: Any) -> Iterator[Checkpoint]:
    """Yield a checkpoint beside a stage's first output, removed when it has succeeded.

    It fits the same stage alone: settings and code as the stage's parameters have them,
    and input files that nobody wrote since.

    Parameters
    ----------
    stage : snakemake.script.Snakemake
        The object that Snakemake gives a script.
    """
    files = {path: Path(path).stat() for path in stage.input}
    state = {
        "parameters": dict(stage.params.items()),
        "files": {path: (x.st_size, x.st_mtime_ns) for path, x in files.items()},
    }
    text = json.dumps(state, sort_keys=True)
    folder = Path(f"{stage.output[0]}.checkpoint")
    yield Checkpoint(folder, hashlib.sha256(text.encode()).hexdigest())
    shutil.rmtree(folder, ignore_errors=True)


def read_layer_shapes(path: str | os.PathLike[str]) -> list[LayerShape]:
    """Return the conv and fc layers of a file of dense weights, in order.

    Only the header of a ``.qcnn`` file is read. What an ONNX model's layers are is
    known when it is translated.

    Raises
    ------
    ModelFormatError
        If the file is neither a ``.qcnn`` file nor an ONNX model, or one of its
        layers is quantised.
    UnsupportedOperator
        If an ONNX model has an operator that networks do not have.
    OSError
        If it cannot be read.
    """
    if Path(path).suffix == ".onnx":
        from qcnn_py.onnx_import import read_onnx
        from qcnn_py.quantization import layer_shape

        return [layer_shape(layer) for layer in read_onnx(path).layers]
    try:
        with safe_open(path, framework="numpy") as file:
            graph = json.loads(file.metadata()["qcnn"])["graph"]
            shapes = []
            for node in graph["nodes"]:
                name, op = node["name"], node["op"]
                if op["type"] in ("conv", "fc"):
                    size = file.get_slice(f"{name}.weight").get_shape()
                    groups = op.get("groups", 1)
                    shapes.append(
                        LayerShape(
                            name=name,
                            kind=op["type"],
                            n_vectors=size[0] * prod(size[2:]),
                            n_inputs=prod(size[1:]),
                            groups=groups,
                            depthwise=groups > 1 and size[1] == 1,
                            n_positions=prod(size[2:]),
                        )
                    )
            return shapes
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ModelFormatError(
            f"{path}: expected a .qcnn file of dense weights, got {error}"
        ) from error


@cache
def _module_content(name: str) -> bytes:
    source = _PACKAGE / f"{name}.py"
    content = _normalized(source).encode() if source.exists() else b""
    libraries = [
        path for path in _PACKAGE.glob(f"{name}.*") if path.suffix in (".so", ".pyd")
    ]
    assets = _PACKAGE.glob(f"{_ASSETS[name]}/*") if name in _ASSETS else []
    for path in (*libraries, *sorted(assets)):
        content += hashlib.sha256(path.read_bytes()).digest()
    return content


@cache
def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


@cache
def _normalized(path: Path) -> str:
    """Return the source without comments, docstrings and layout."""
    return ast.unparse(_WithoutDocstrings().visit(_parse(path)))


class _WithoutDocstrings(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        """Remove a string that stands alone: it does nothing."""
        text = isinstance(node.value, ast.Constant) and isinstance(
            node.value.value, str
        )
        return None if text else node


def _module(name: str) -> str:
    """Return `name` if it is a module of this package, else where it comes from."""
    return name if any(_PACKAGE.glob(f"{name}.*")) else "__init__"


@cache
def _imports(path: Path) -> frozenset[str]:
    """Return the names of this package's modules that a file imports anywhere."""
    names: set[str] = set()
    for node in ast.walk(_parse(path)):
        if isinstance(node, ast.ImportFrom) and node.module:
            full_names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            full_names = [alias.name for alias in node.names]
        else:
            continue
        for package, _, rest in (name.partition(".") for name in full_names):
            if package == __package__:
                names.add(_module(rest.partition(".")[0]))
    return frozenset(names)
