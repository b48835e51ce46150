"""A clone of the workflow with a tiny configuration, run once and copied."""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock

ROOT = Path(__file__).parents[2]

TINY = {
    "runs": {
        "tiny": {
            "kind": "pipeline",
            "replicates": 1,
            "dataset": {
                "source": "digits",
                "limit": {"train": 200, "validation": 50, "test": 50},
            },
            "network": {
                "source": "train",
                "conv_channels": [4, 8],
                "fc_features": [32],
                "training": {"epochs": 3, "batch_size": 16, "learning_rate": 0.003},
            },
            "quantize": {
                "n_centroids": 8,
                "calibration_images": 100,
                "max_rounds": 3,
            },
            "finetune": {"epochs": 1, "batch_size": 16},
            "distill": {"epochs": 1, "images": 50},
            "benchmark": {"repeats": 1, "batches": 2, "warmup": 1},
        }
    }
}


@dataclass(frozen=True)
class Plan:
    """What a dry run would do."""

    jobs: Counter[str]
    layers: set[str]


@dataclass(frozen=True)
class Workspace:
    """A folder with its own copy of the workflow, the package and the results."""

    path: Path

    @property
    def replicate(self) -> Path:
        return self.path / "results" / "tiny" / "replicates" / "0"

    def command(self, *arguments: str) -> list[str]:
        # The console script beside this interpreter: the command that users type.
        snakemake = Path(sys.executable).with_name("snakemake")
        return [str(snakemake), "--cores", "1", *(arguments or ["all"])]

    @property
    def environment(self) -> dict[str, str]:
        # The copy of the package comes before the installed one.
        paths = [str(self.path), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}

    def run(
        self, *arguments: str, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run Snakemake, with other environment variables if wanted."""
        return subprocess.run(
            self.command(*arguments),
            cwd=self.path,
            env={**self.environment, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )

    def plan(self) -> Plan:
        done = self.run("--dry-run", "all")
        assert done.returncode == 0, done.stdout
        table = done.stdout.rpartition("Job stats:")[2].partition("total")[0]
        jobs = {name: int(n) for name, n in re.findall(r"^(\w+) +(\d+)$", table, re.M)}
        return Plan(
            Counter({name: n for name, n in jobs.items() if name != "all"}),
            set(re.findall(r"quantising (\S+)", done.stdout)),
        )

    def edit_config(self, edit: Callable[[dict[str, Any]], object]) -> None:
        path = self.path / "config.yaml"
        config = yaml.safe_load(path.read_text())
        edit(config)
        path.write_text(yaml.safe_dump(config))

    def artefacts(self) -> dict[str, bytes]:
        """Return the files that have to be the same whenever they are made."""
        folder = self.path / "results"
        return {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.suffix in (".safetensors", ".qcnn", ".json")
            and path.name not in ("benchmark.json", "report.json")
        }


def copy_sources(path: Path) -> None:
    path.mkdir()
    for name in ("Snakefile", "profiles", "workflow", "qcnn_py"):
        source = ROOT / name
        if source.is_symlink() or source.is_file():
            shutil.copy2(source, path / name, follow_symlinks=False)
        else:
            ignored = shutil.ignore_patterns("__pycache__", ".*")
            shutil.copytree(source, path / name, symlinks=True, ignore=ignored)


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Workspace]:
    """Return a function that makes a workspace of a name where nothing is done."""

    def make(name: str) -> Workspace:
        path = tmp_path_factory.mktemp("workflow") / name
        copy_sources(path)
        (path / "config.yaml").write_text(yaml.safe_dump(TINY))
        return Workspace(path)

    return make


@pytest.fixture(scope="session")
def finished(
    fresh: Callable[[str], Workspace],
    tmp_path_factory: pytest.TempPathFactory,
    worker_id: str,
) -> Workspace:
    """Return a workspace where everything is done, not to be changed.

    All workers of pytest-xdist have the one that the first of them makes.
    """
    base = tmp_path_factory.getbasetemp()
    common = (base if worker_id == "master" else base.parent) / "finished"
    with FileLock(common.with_suffix(".lock")):
        if not common.exists():
            workspace = fresh("finished")
            done = workspace.run("--cores", "2", "all")
            assert done.returncode == 0, done.stdout
            workspace.path.rename(common)
    return Workspace(common)


@pytest.fixture
def workspace(finished: Workspace, tmp_path: Path) -> Workspace:
    """Return a copy of the finished workspace, times of files included."""
    path = tmp_path / "workspace"
    shutil.copytree(finished.path, path, symlinks=True)
    return Workspace(path)
