import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from random_networks import NetworkBuilder
from safetensors.numpy import save_file

from qcnn_py import workflow
from qcnn_py.errors import ModelFormatError
from qcnn_py.workflow import (
    code_fingerprint,
    folder_fingerprint,
    modules_of,
    read_layer_shapes,
)

MODULE = '''
"""A stage."""
from package.helper import f  # the helper


def stage(x):
    """Do it."""
    return f(x) + 1
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of a stage that uses a helper that uses the engine."""
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "__init__.py").write_text("from package.helper import f\n")
    (folder / "stage.py").write_text(MODULE)
    (folder / "helper.py").write_text("def f(x):\n    from package import _engine\n")
    (folder / "other.py").write_text("def g(x):\n    return x\n")
    (folder / "config.py").write_text("A = 1\n")
    (folder / "_engine.abi3.so").write_bytes(b"machine code")
    (folder / "script.py").write_text("import package.config\nimport package.stage\n")
    monkeypatch.setattr(workflow, "_PACKAGE", folder)
    monkeypatch.setattr(workflow, "__package__", "package")
    return folder


def fingerprint(package):
    for function in vars(workflow).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()
    return code_fingerprint(package / "script.py")


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("stage.py", "# the helper", "# what helps"),
        ("stage.py", '"""Do it."""', '"""Do something else."""'),
        ("stage.py", '    """Do it."""\n', ""),
        ("stage.py", "f(x) + 1", "(\n        f(x)\n        + 1  # one\n    )"),
        ("script.py", "import package.stage", "# A comment.\n\nimport package.stage"),
        ("other.py", "return x", "return -x"),
        ("config.py", "A = 1", "A = 2"),
    ],
    ids=[
        "comment",
        "docstring",
        "no docstring",
        "layout",
        "comment in the script",
        "module not used",
        "settings",
    ],
)
def test_fingerprint_stays(package, name, old, new):
    before = fingerprint(package)
    path = package / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    assert fingerprint(package) == before


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("script.py", "import package.stage", "import package.stage as s"),
        ("stage.py", "+ 1", "+ 2"),
        ("helper.py", "def f(x)", "def f(x, y=0)"),
        ("_engine.abi3.so", "machine", "other"),
    ],
    ids=["script", "stage", "what the stage uses", "engine"],
)
def test_fingerprint_changes(package, name, old, new):
    before = fingerprint(package)
    path = package / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    assert fingerprint(package) != before


def test_fingerprint_follows_names_of_the_package(package):
    (package / "script.py").write_text("from package import f\n")
    before = fingerprint(package)
    (package / "helper.py").write_text("def f(x):\n    return 3\n")
    assert fingerprint(package) != before


def test_only_stages_that_use_the_engine_depend_on_it():
    scripts = Path(__file__).parents[2] / "workflow" / "scripts"
    assert "_engine" not in modules_of(scripts / "prepare_dataset.py")
    assert "_engine" in modules_of(scripts / "evaluate_models.py")


STAGE = """
import logging
import sys

from qcnn_py.errors import DatasetError
from qcnn_py.workflow import reporting

with reporting("stage.log"):
    logging.getLogger("qcnn_py.stage").info("reading")
    {statement}
"""


@pytest.mark.parametrize(
    ("statement", "stderr"),
    [
        ("raise DatasetError('x.png: truncated')", "error: x.png: truncated\n"),
        (
            "open('missing')",
            "error: [Errno 2] No such file or directory: 'missing'\n",
        ),
    ],
    ids=["expected", "system"],
)
def test_an_error_is_one_line(tmp_path, statement, stderr):
    done = subprocess.run(
        [sys.executable, "-c", STAGE.format(statement=statement)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, stderr)
    log = (tmp_path / "stage.log").read_text().splitlines()
    assert log[0].endswith("INFO qcnn_py.stage: reading")
    assert log[1].endswith("ERROR qcnn_py.workflow: " + stderr.strip()[7:])


def test_a_bug_leaves_its_traceback_in_the_log(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", STAGE.format(statement="1 / 0")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "ZeroDivisionError: division by zero" in (tmp_path / "stage.log").read_text()


def test_layer_shapes_come_from_the_header(tmp_path):
    nodes = [
        {"name": "c", "op": {"type": "conv", "groups": 2}},
        {"name": "r", "op": {"type": "relu"}},
        {"name": "d", "op": {"type": "conv", "groups": 4}},
        {"name": "f", "op": {"type": "fc"}},
    ]
    path = tmp_path / "network.qcnn"
    graph = json.dumps({"version": 1, "graph": {"nodes": nodes}})
    weights = {"c.weight": (8, 3, 5, 2), "d.weight": (4, 1, 3, 3), "f.weight": (7, 20)}
    tensors = {name: np.zeros(shape, np.float32) for name, shape in weights.items()}
    save_file(tensors, path, metadata={"qcnn": graph})
    assert read_layer_shapes(path) == [
        ("c", "conv", 80, 30, 2, False, 10),
        ("d", "conv", 36, 9, 4, True, 9),
        ("f", "fc", 7, 20, 1, False, 1),
    ]


def test_layer_shapes_of_an_onnx_model(tmp_path):
    builder = NetworkBuilder((4, 6, 6))
    builder.conv(4, 3, name="depthwise", groups=4)
    builder.conv(6, 1, name="pointwise")
    builder.fc(3, name="logits")
    network = builder.build()
    network.to_onnx(tmp_path / "network.onnx")
    network.save(tmp_path / "network.qcnn")
    shapes = read_layer_shapes(tmp_path / "network.qcnn")
    assert [(shape.name, shape.kind, shape.depthwise) for shape in shapes] == [
        ("depthwise", "conv", True),
        ("pointwise", "conv", False),
        ("logits", "fc", False),
    ]
    assert read_layer_shapes(tmp_path / "network.onnx") == shapes


@pytest.mark.parametrize("metadata", [None, {"qcnn": "{"}, {"qcnn": "[]"}, {"a": ""}])
def test_other_files_have_no_layer_shapes(tmp_path, metadata):
    path = tmp_path / "network.qcnn"
    save_file({"c.bias": np.zeros(1, np.float32)}, path, metadata=metadata)
    with pytest.raises(ModelFormatError, match=r"network\.qcnn: expected a \.qcnn"):
        read_layer_shapes(path)


def _rewrite_with_the_same_size(folder):
    path = folder / "train" / "cat" / "1.png"
    path.write_bytes(b"two")
    # Not every file system tells apart two moments of a test.
    os.utime(path, ns=(0, 0))


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "train" / "cat" / "2.png").write_bytes(b"new"),
        lambda folder: (folder / "train" / "cat" / "1.png").unlink(),
        lambda folder: (folder / "train" / "cat" / "1.png").rename(folder / "1.png"),
        lambda folder: (folder / "train" / "dog").mkdir(),
        _rewrite_with_the_same_size,
    ],
    ids=["added", "removed", "moved", "empty folder", "rewritten"],
)
def test_folder_fingerprint_follows_files_further_down(tmp_path, change):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    (tmp_path / "train" / "cat" / "1.png").write_bytes(b"one")
    before = folder_fingerprint(tmp_path)
    assert folder_fingerprint(tmp_path) == before
    change(tmp_path)
    assert folder_fingerprint(tmp_path) != before


def test_folder_fingerprint_leaves_out_what_is_no_image(tmp_path):
    before = folder_fingerprint(tmp_path)
    (tmp_path / ".DS_Store").write_bytes(b"x")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "link.png").symlink_to("nowhere")
    assert folder_fingerprint(tmp_path / "link.png") is None
    (tmp_path / "link.png").unlink()
    assert folder_fingerprint(tmp_path) == before
