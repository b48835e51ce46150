"""What goes wrong: other surroundings, full disks, damaged files."""

import os
import shutil
import subprocess

import pytest

MODEL = "results/tiny/model.qcnn"

pytestmark = pytest.mark.long


def errors(done):
    """Return what the stages of a failed run say, one line each."""
    assert done.returncode == 1, done.stdout
    assert "Traceback" not in done.stdout
    lines = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert lines, done.stdout
    return lines


def remade(workspace, finished, path):
    """Run for everything and a file; return whether all files are what they were."""
    # What nothing needs any more is made if it is asked for only.
    done = workspace.run("all", str(path.relative_to(workspace.path)))
    assert done.returncode == 0, done.stdout
    return workspace.artefacts() == finished.artefacts()


def test_surroundings_change_nothing(fresh, finished):
    workspace = fresh("späße & mehr")
    done = workspace.run(
        "--cores",
        "1",
        MODEL,
        "results/tiny/replicates/0/evaluation.json",
        PYTHONHASHSEED="4711",
        LC_ALL="C",
        LANG="tr_TR.UTF-8",
        TZ="Pacific/Kiritimati",
    )
    assert done.returncode == 0, done.stdout
    made = workspace.artefacts()
    assert "tiny/model.qcnn" in made
    assert made.items() <= finished.artefacts().items()


@pytest.fixture
def disk(workspace):
    """Move the results to a disk of their own; return where it is mounted."""
    results = workspace.path / "results"
    kept = results.rename(workspace.path / "kept")
    results.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(results)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    shutil.copytree(kept, results, dirs_exist_ok=True)
    yield results
    subprocess.run(["umount", "--lazy", str(results)], check=True)


@pytest.fixture
def small_disk(disk):
    """Return a function that fills the disk with the results."""
    ballast = disk / "ballast"

    def leave(room):
        state = os.statvfs(disk)
        ballast.write_bytes(bytes(state.f_bavail * state.f_frsize - room))
        return ballast

    return leave


def test_full_disk(small_disk, workspace, finished):
    path = workspace.replicate / "dataset.safetensors"
    size = path.stat().st_size
    path.unlink()
    # The log still fits.
    ballast = small_disk(room=4096 + size // 2)
    folder = workspace.replicate.relative_to(workspace.path)
    (error,) = errors(workspace.run(str(folder / path.name)))
    assert "No space left on device" in error
    assert str(folder) in error
    assert not path.exists()
    ballast.unlink()
    assert remade(workspace, finished, path)


def test_read_only_results(disk, workspace, finished):
    path = workspace.replicate / "dataset.safetensors"
    path.unlink()
    kept = workspace.artefacts()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    done = workspace.run(str(path.relative_to(workspace.path)))
    assert done.returncode == 1
    assert "results: expected a folder to write to: Read-only file" in done.stdout
    assert "Traceback" not in done.stdout
    assert workspace.artefacts() == kept
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert remade(workspace, finished, path)


@pytest.mark.parametrize(
    ("damage", "name", "user"),
    [
        ("truncated", "dataset.safetensors", "features.safetensors"),
        ("another file", "finetuned.qcnn", "requantized/fc1.safetensors"),
    ],
)
def test_damaged_intermediate(name, user, damage, workspace, finished):
    path, made_of_it = workspace.replicate / name, workspace.replicate / user
    content = path.read_bytes()
    path.write_bytes(
        {
            "truncated": content[:-5],
            "another file": (
                workspace.replicate / "quantized/conv1.safetensors"
            ).read_bytes(),
        }[damage]
    )
    made_of_it.unlink()
    done = workspace.run(str(made_of_it.relative_to(workspace.path)))
    assert all(str(path.relative_to(workspace.path)) in error for error in errors(done))
    path.unlink()
    assert remade(workspace, finished, path)
