"""The workflow on a real Slurm cluster, of one node, that the test starts itself."""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from importlib import util
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SINGLE_NODE = ROOT / "workflow" / "profiles" / "slurm" / "single-node"
COMMANDS = ("slurmctld", "slurmd", "sbatch", "munged")

pytestmark = [
    pytest.mark.skipif(
        not all(map(shutil.which, COMMANDS)),
        reason=f"Slurm is not installed: {', '.join(COMMANDS)} are needed",
    ),
    pytest.mark.skipif(
        util.find_spec("snakemake_executor_plugin_slurm") is None,
        reason="needs the extra slurm",
    ),
]


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Return the environment of Slurm's commands."""
    folder = tmp_path / "slurm"
    done = subprocess.run(
        [SINGLE_NODE, "start", folder], capture_output=True, text=True, check=False
    )
    try:
        assert done.returncode == 0, done.stderr
        exported = dict(re.findall(r'(\w+)=([^" ]+)', done.stdout))
        yield {
            "SLURM_CONF": exported["SLURM_CONF"],
            "PATH": exported["PATH"].rstrip(":") + os.pathsep + os.environ["PATH"],
        }
    finally:
        subprocess.run([SINGLE_NODE, "stop", folder], check=True)


def test_results_are_those_of_a_local_run(
    finished: Any, workspace: Any, slurm: dict[str, str]
) -> None:
    expected = finished.artefacts()
    shutil.rmtree(workspace.path / "results")
    options = (
        "--profile workflow/profiles/slurm --slurm-no-account "
        "--slurm-status-command squeue --slurm-init-seconds-before-status-checks 1"
    )
    command = [*workspace.command(*shlex.split(options)), "results/tiny/model.qcnn"]
    # The profile states the cores of a job.
    del command[1:3]
    done = subprocess.run(
        command,
        cwd=workspace.path,
        env={**workspace.environment, **slurm},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    # Every job of the workflow was one of Slurm's.
    submitted = re.findall(r"Job \d+ has been submitted with SLURM jobid", done.stdout)
    (planned,) = re.findall(r"^total +(\d+)$", done.stdout, re.M)
    assert len(submitted) == int(planned)
    made = workspace.artefacts()
    assert "tiny/model.qcnn" in made
    assert made == {name: expected[name] for name in made}
