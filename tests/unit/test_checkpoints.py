"""Trainings that are cut off and go on."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from random_networks import NetworkBuilder

from qcnn_py.checkpoints import Checkpoint
from qcnn_py.config import OptimizerConfig
from qcnn_py.fitting import Examples, Training
from qcnn_py.network import Network
from qcnn_py.workflow import checkpoint_of

CONFIG = OptimizerConfig(
    epochs=8, batch_size=20, learning_rate=5e-2, patience=3, dropout=0.3
)


class CutOffError(Exception):
    """What ends a training, as a signal would."""


def examples(n: int, seed: int) -> Examples:
    rng = np.random.default_rng(seed)
    labels = rng.integers(3, size=n)
    noise = rng.normal(scale=0.9, size=(n, 6))
    return Examples((np.eye(3, 6)[labels] + noise).astype(np.float32), labels)


def classifier() -> Network:
    builder = NetworkBuilder((6,))
    builder.fc(5, name="hidden")
    builder.add("relu")
    builder.add("dropout", rate=0.3)
    builder.fc(3, name="scores")
    builder.add("softmax")
    return builder.build()


def trained(
    checkpoint: Checkpoint | None, *, cut_off_after: int | None = None
) -> tuple[Network, dict[str, Any]]:
    """Train; batches of training and validation images count for being cut off."""
    n_batches = 0

    def prepare(inputs: npt.NDArray[Any]) -> npt.NDArray[Any]:
        nonlocal n_batches
        n_batches += 1
        if n_batches == cut_off_after:
            raise CutOffError
        return inputs

    network = classifier()
    return Training(network, CONFIG).fit(
        network, examples(100, 0), examples(60, 1), 7, prepare, checkpoint
    )


def at(folder: Path, fingerprint: str = "this training") -> Checkpoint:
    return Checkpoint(folder, fingerprint, seconds_between=0)


@pytest.mark.parametrize("cut_off_after", [3, 13, 27])
def test_what_was_cut_off_ends_as_if_it_was_not(
    tmp_path: Path, cut_off_after: int, caplog: pytest.LogCaptureFixture
) -> None:
    """There are 6 batches in an epoch, and one before the first."""
    expected, history = trained(None)
    with pytest.raises(CutOffError):
        trained(at(tmp_path), cut_off_after=cut_off_after)
    with caplog.at_level(logging.INFO, "qcnn_py"):
        network, continued = trained(at(tmp_path))
    went_on = [x for x in caplog.messages if x.startswith("goes on after epoch")]
    assert len(went_on) == (cut_off_after > 7)
    assert continued == history
    for name, tensor in network.tensors.items():
        np.testing.assert_array_equal(tensor, expected.tensors[name])


def test_what_has_ended_is_not_trained_again(tmp_path: Path) -> None:
    expected, history = trained(at(tmp_path))
    network, continued = trained(at(tmp_path), cut_off_after=1)
    assert continued == history
    np.testing.assert_array_equal(
        network.tensors["hidden.weight"], expected.tensors["hidden.weight"]
    )


def test_another_training_begins_anew(tmp_path: Path) -> None:
    trained(at(tmp_path, "another"))
    with pytest.raises(CutOffError):
        trained(at(tmp_path), cut_off_after=1)


def test_a_damaged_file_is_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, history = trained(at(tmp_path))
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    assert trained(at(tmp_path))[1] == history
    assert f"{file} is ignored" in caplog.text


def test_parts_are_apart(tmp_path: Path) -> None:
    checkpoint = at(tmp_path)
    checkpoint.part("0").offer([np.arange(3.0)], {"epoch": 1})
    assert checkpoint.part("1").latest() is None
    assert checkpoint.latest() is None
    arrays, record = checkpoint.part("0").latest() or ([], {})
    np.testing.assert_array_equal(arrays, [[0, 1, 2]])
    assert record == {"epoch": 1}


def test_not_every_state_is_kept(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, "this training", seconds_between=1e6)
    checkpoint.offer([np.zeros(3)], {})
    assert checkpoint.latest() is None


def stage(tmp_path: Path, **params: Any) -> Any:
    return SimpleNamespace(
        input=[str(tmp_path / "input")],
        output=[str(tmp_path / "output")],
        params={"seed": 1, **params},
    )


def test_a_stage_removes_its_checkpoint_when_it_succeeds(tmp_path: Path) -> None:
    (tmp_path / "input").touch()
    folder = tmp_path / "output.checkpoint"

    def run(stage: Any, *, fails: bool) -> object:
        with checkpoint_of(stage) as checkpoint:
            found = checkpoint.latest()
            # Of a training that takes long.
            checkpoint = Checkpoint(folder, checkpoint.fingerprint, seconds_between=0)
            checkpoint.offer([], {"epoch": 1})
            if fails:
                raise CutOffError
        return found

    for changed in (stage(tmp_path), stage(tmp_path, seed=2)):
        with pytest.raises(CutOffError):
            run(changed, fails=True)
    assert run(stage(tmp_path, seed=2), fails=False) is not None
    assert not folder.exists()
    for change in (lambda: None, lambda: (tmp_path / "input").write_text("new")):
        with pytest.raises(CutOffError):
            run(stage(tmp_path), fails=True)
        change()
    assert run(stage(tmp_path), fails=False) is None
