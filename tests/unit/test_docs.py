"""Documentation that runs: examples, the notebook, the reference, links."""

import doctest
import pkgutil
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import nbclient
import nbformat
import pytest

import qcnn_py

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = [
    f"qcnn_py.{module.name}"
    for module in pkgutil.iter_modules(qcnn_py.__path__)
    if not module.name.startswith("_")
]


def test_examples_in_docstrings() -> None:
    results = {name: doctest.testmod(import_module(name)) for name in MODULES}
    assert not {name: each for name, each in results.items() if each.failed}
    # Those that there were when this was written, or more.
    assert sum(each.attempted for each in results.values()) >= 25


def test_notebook(tmp_path: Path) -> None:
    notebook = nbformat.read(ROOT / "docs" / "notebook.ipynb", as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()
    printed = "".join(
        output.get("text", "")
        for cell in notebook.cells
        for output in cell.get("outputs", ())
    )
    right = [float(value) for value in re.findall(r"([\d.]+)% of 360", printed)]
    (after,) = re.findall(r"([\d.]+)% instead of", printed)
    assert right[0] > 90
    assert float(after) > right[0] - 3


def test_reference_of_the_api(tmp_path: Path) -> None:
    command = ["pdoc", "--docformat", "numpy", "-o", str(tmp_path), "qcnn_py"]
    done = subprocess.run(
        [sys.executable, "-m", *command],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    page = (tmp_path / "qcnn_py.html").read_text(encoding="utf-8")
    missing = [name for name in qcnn_py.__all__ if f'id="{name}"' not in page]
    assert missing in ([], ["__version__"])
    assert "Name what an image shows" in page


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in kept}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if path.startswith("http"):
            continue
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken
