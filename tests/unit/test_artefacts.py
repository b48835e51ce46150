"""Files of arrays and JSON: whole or not at all, and the same bytes every time."""

from pathlib import Path

import numpy as np
import pytest

from qcnn_py.artefacts import (
    load_arrays,
    load_json,
    replacing,
    save_arrays,
    save_json,
)
from qcnn_py.errors import ModelFormatError


def test_arrays_round_trip(tmp_path: Path) -> None:
    arrays = {
        "codes": np.arange(6, dtype=np.uint16).reshape(2, 3),
        "view": np.arange(12, dtype=np.float32).reshape(3, 4).T,
        "empty": np.empty((0, 2), np.int64),
    }
    save_arrays(tmp_path / "new" / "a.safetensors", arrays, {"b": [1, None], "a": "é"})
    loaded, metadata = load_arrays(tmp_path / "new" / "a.safetensors")
    assert metadata == {"a": "é", "b": [1, None]}
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        assert loaded[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded[name], array)


def test_equal_content_makes_equal_bytes(tmp_path: Path) -> None:
    arrays = {name: np.full(3, ord(name), np.float32) for name in "abcdef"}
    metadata = dict.fromkeys("abcdef", 1)

    def reversed_order(mapping: dict[str, object]) -> dict[str, object]:
        return dict(reversed(mapping.items()))

    save_arrays(tmp_path / "1", arrays, metadata)
    save_arrays(tmp_path / "2", reversed_order(arrays), reversed_order(metadata))
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    save_json(tmp_path / "1", metadata)
    save_json(tmp_path / "2", reversed_order(metadata))
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert load_json(tmp_path / "1") == metadata


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    save_json(path, 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_json(path, float("nan"))

    def write_half() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert load_json(path) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["file.json"]


def test_files_get_the_ordinary_permissions(tmp_path: Path) -> None:
    save_arrays(tmp_path / "arrays", {"a": np.zeros(1)}, {})
    (tmp_path / "other").touch()
    modes = {file.name: file.stat().st_mode for file in tmp_path.iterdir()}
    assert modes["arrays"] == modes["other"]


def test_malformed_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in (b"", b"{", b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(ModelFormatError, match="file: expected JSON"):
            load_json(path)
        with pytest.raises(ModelFormatError, match="file: expected a safetensors"):
            load_arrays(path)
    with pytest.raises(FileNotFoundError):
        load_arrays(tmp_path / "missing")
