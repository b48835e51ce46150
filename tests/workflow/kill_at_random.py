"""Kill a run with SIGKILL at random moments, resume it, compare what comes out.

    python tests/workflow/kill_at_random.py --kills 50

Prints a line for each kill; the exit code is 1 if a resumed run fails or makes other
bytes than an undisturbed one. Whenever a run ends before it is killed, its results are
removed and it starts again.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from conftest import TINY, Workspace, copy_sources


def made(path):
    copy_sources(path)
    (path / "config.yaml").write_text(yaml.safe_dump(TINY))
    return Workspace(path)


def killed(workspace, seconds):
    """Start a run and kill it, with all its children, after a time.

    Returns whether it was still running.
    """
    process = subprocess.Popen(
        workspace.command(),
        cwd=workspace.path,
        env=workspace.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True
    return False


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=10, help="seconds to a kill")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)

    with tempfile.TemporaryDirectory() as folder:
        undisturbed = made(Path(folder) / "undisturbed")
        done = undisturbed.run()
        if done.returncode:
            sys.exit(done.stdout)
        workspace = made(Path(folder) / "disturbed")
        start, kills, runs = time.monotonic(), 0, 0
        while kills < arguments.kills:
            seconds = rng.uniform(0, arguments.longest)
            if killed(workspace, seconds):
                kills += 1
                n = len(workspace.artefacts())
                print(f"kill {kills} after {seconds:.1f} s: {n} files", flush=True)
            else:
                runs += 1
                if workspace.artefacts() != undisturbed.artefacts():
                    sys.exit("a run that was killed and resumed made other bytes")
                shutil.rmtree(workspace.path / "results")
        done = workspace.run()
        if done.returncode:
            sys.exit(done.stdout)
        if workspace.artefacts() != undisturbed.artefacts():
            sys.exit("a run that was killed and resumed made other bytes")
        print(
            f"{kills} kills, {runs + 1} runs finished in "
            f"{time.monotonic() - start:.0f} s, all bytes as undisturbed"
        )


if __name__ == "__main__":
    main()
