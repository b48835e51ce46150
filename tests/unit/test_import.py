"""``import qcnn_py`` needs the standard library and NumPy, nothing else."""

import os
import subprocess
import sys
from pathlib import Path

import qcnn_py

BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names and top not in ("numpy", "qcnn_py"):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)
        return None

sys.meta_path.insert(0, Blocker())
"""


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    # From another folder, so that an installed package is found as users find it.
    return subprocess.run(
        [sys.executable, "-c", BLOCKER + code],
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
    )


def test_imports_and_classifies_with_numpy_only(tmp_path: Path) -> None:
    code = """
import numpy as np
import qcnn_py

nodes = [
    qcnn_py.Node(
        "fc",
        "fc",
        ("input",),
        {"out_features": 2, "bias": False, "weights": {"type": "dense"}},
    )
]
network = qcnn_py.Network(nodes, {"fc.weight": np.eye(2, dtype=np.float32)}, (2,))
network.save("identity.qcnn")
print(qcnn_py.load("identity.qcnn")(np.float32([[3, 4]])).tolist())
"""
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[[3.0, 4.0]]\n"


def test_blocker_blocks(tmp_path: Path) -> None:
    done = run("import safetensors", tmp_path)
    assert "safetensors is blocked" in done.stderr


def test_every_public_name_exists() -> None:
    missing = [name for name in qcnn_py.__all__ if not hasattr(qcnn_py, name)]
    assert not missing
    assert set(dir(qcnn_py)) >= set(qcnn_py.__all__)


def test_a_checkout_without_engine_says_what_to_do(tmp_path: Path) -> None:
    source = Path(qcnn_py.__file__).parent
    copy = tmp_path / "qcnn_py"
    copy.mkdir()
    for path in source.glob("*.py"):
        (copy / path.name).write_bytes(path.read_bytes())
    done = subprocess.run(
        [sys.executable, "-c", "import qcnn_py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: the engine of qcnn is not built in {copy}")
    assert "pip install -e ." in last
