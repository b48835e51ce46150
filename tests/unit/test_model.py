"""Models: what they accept, what they refuse, what they say of themselves."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_networks import NetworkBuilder, Quantized

import qcnn_py
from qcnn_py import ConfigError, Model, ShapeError


@pytest.fixture
def builder() -> NetworkBuilder:
    b = NetworkBuilder((2, 4, 5))
    b.conv(6, 3, name="conv", quantized=Quantized(16, 2))
    b.add("relu")
    b.fc(3, name="fc")
    return b


@pytest.fixture
def model(builder: NetworkBuilder) -> Model:
    return builder.build().compile(precision="exact")


def test_description(builder: NetworkBuilder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QCNN_ISA", raising=False)
    model = builder.build().compile(precision="exact")
    assert model.input_shape == (None, 2, 4, 5)
    assert model.precision == "exact"
    assert model.isa == qcnn_py.available_isas()[-1]
    assert model.threads == 1
    conv, fc = model.layers
    assert (conv["name"], conv["kind"], conv["n_centroids"]) == ("conv", "conv", 16)
    assert (fc["name"], fc["quantized"]) == ("fc", False)
    assert all(layer["kernel_name"] for layer in model.layers)
    assert "isa=" in repr(model)


def test_available_isas() -> None:
    isas = qcnn_py.available_isas()
    assert isas[0] == "portable"
    assert len(set(isas)) == len(isas)


def test_save_and_load(model: Model, builder: NetworkBuilder, tmp_path: Path) -> None:
    model.save(tmp_path / "model.qcnn")
    again = qcnn_py.load(tmp_path / "model.qcnn", precision="exact")
    images = builder.images(3)
    np.testing.assert_array_equal(again(images), model(images))


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.astype(np.float64),
        lambda x: np.asfortranarray(x),
        lambda x: np.repeat(x, 2, axis=3)[..., ::2],
        lambda x: x[::-1][::-1],
        lambda x: x.tolist(),
        lambda x: x.astype(">f4"),
    ],
    ids=["float64", "fortran", "strided", "reversed", "list", "big-endian"],
)
def test_equal_input_in_other_forms(
    model: Model, builder: NetworkBuilder, change: Any
) -> None:
    images = builder.images(3)
    np.testing.assert_array_equal(model(change(images)), model(images))


def test_input_is_left_alone(model: Model, builder: NetworkBuilder) -> None:
    images = builder.images(2)
    before = images.copy()
    images.flags.writeable = False
    model(images)
    model.trace(images)
    np.testing.assert_array_equal(images, before)


@pytest.mark.parametrize(
    "shape",
    [(2, 4, 5), (1, 2, 5, 4), (1, 3, 4, 5), (1, 1, 2, 4, 5), (40,), ()],
    ids=str,
)
def test_wrong_shape(model: Model, shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"expected \(N, 2, 4, 5\)"):
        model(np.zeros(shape, np.float32))


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, bool, complex, object], ids=str)
def test_wrong_dtype(model: Model, dtype: type) -> None:
    with pytest.raises(ShapeError, match="expected float32"):
        model(np.zeros((1, 2, 4, 5), dtype))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "double"}, "double"),
        ({"isa": "mmx"}, "mmx"),
        ({"threads": 0}, "threads is 0"),
        ({"threads": -1}, "threads is -1"),
        ({"threads": 1.5}, r"threads is 1\.5"),
    ],
)
def test_wrong_options(
    builder: NetworkBuilder, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        builder.build().compile(**options)


def isa_chosen_under(value: str, folder: Path) -> subprocess.CompletedProcess[str]:
    code = f"import qcnn_py; print(qcnn_py.load({str(folder / 'm.qcnn')!r}).isa)"
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "QCNN_ISA": value},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_environment_chooses_the_isa(model: Model, tmp_path: Path, isa: str) -> None:
    model.save(tmp_path / "m.qcnn")
    assert isa_chosen_under(isa, tmp_path).stdout == f"{isa}\n"


def test_unknown_isa_in_the_environment(model: Model, tmp_path: Path) -> None:
    model.save(tmp_path / "m.qcnn")
    done = isa_chosen_under("mmx", tmp_path)
    assert done.returncode != 0
    assert "ConfigError" in done.stderr
    assert "QCNN_ISA" in done.stderr


PEAK_SCRIPT = """
import sys
from pathlib import Path

import numpy as np

import qcnn_py

def peak():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])

before = peak()
model = qcnn_py.load(sys.argv[1])
model(np.zeros((1, *model.input_shape[1:]), np.float32))
print(peak() - before)
"""


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="peak memory is read from /proc"
)
def test_loading_takes_little_memory(tmp_path: Path) -> None:
    builder = NetworkBuilder((4096,))
    for number in range(4):
        builder.fc(4096, name=f"fc{number}", quantized=Quantized(32, 4))
    path = tmp_path / "model.qcnn"
    builder.build().save(path)
    done = subprocess.run(
        [sys.executable, "-c", PEAK_SCRIPT, str(path)],
        capture_output=True,
        text=True,
        check=True,
    )
    # The file, one unpacked layer, all packed ones: 3.5 times the file. All codes
    # unpacked at once, or arrays of them in Python, are far more.
    assert int(done.stdout) < 4.5 * path.stat().st_size
