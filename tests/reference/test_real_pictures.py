"""Real pictures: ``qcnn classify`` against ONNX Runtime and the authors' network, and
how far the peers' int8 models of a trained network are from it."""

import json
import zipfile
from pathlib import Path
from typing import Any

import click.testing
import numpy as np
import onnxruntime
import pytest
from PIL import Image

import qcnn_py
from qcnn_py.cli import cli
from qcnn_py.contenders import _saturates, compile_peers
from qcnn_py.cpu import describe_cpu

AUTHORS = "alexnet-reference"

NORMALISATION = {
    "cifar10_alexnet": ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
    "cifar10_resnet20": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
}


def run(*arguments: object) -> Any:
    result = click.testing.CliRunner().invoke(
        cli, [*map(str, arguments), "--json"], prog_name="qcnn"
    )
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def pictures(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with 4 test images of each class of CIFAR-10."""
    folder = tmp_path_factory.mktemp("cifar10")
    with zipfile.ZipFile(test_data / "cifar10.zip") as archive:
        for name in archive.namelist():
            if (
                "/test/" in name
                and name.endswith(("0.jpg", "5.jpg"))
                and "/000" in name
            ):
                archive.extract(name, folder)
    return folder / "cifar10" / "test"


@pytest.mark.parametrize("name", NORMALISATION)
def test_classes_are_those_of_onnx_runtime(
    name: str, test_data: Path, pictures: Path
) -> None:
    model = test_data / f"{name}.onnx"
    mean, std = NORMALISATION[name]
    found = run(
        "classify",
        model,
        pictures,
        "--top",
        10,
        "--precision",
        "exact",
        "--mean",
        ",".join(map(str, mean)),
        "--std",
        ",".join(map(str, std)),
    )
    assert len(found) == 20
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    for each in found:
        pixels = np.asarray(Image.open(each["image"]), np.float32) / 255
        x = ((pixels - mean) / std).transpose(2, 0, 1)
        feeds = {session.get_inputs()[0].name: x[None].astype(np.float32)}
        (expected,) = session.run(None, feeds)[0]
        if name == "cifar10_resnet20":
            expected = np.exp(expected) / np.exp(expected).sum()
        got = {p["index"]: p["probability"] for p in each["predictions"]}
        order = [p["index"] for p in each["predictions"]]
        assert order[0] == expected.argmax()
        np.testing.assert_allclose(
            [got[i] for i in range(10)], expected, rtol=1e-3, atol=1e-6
        )


@pytest.mark.parametrize("peer", ["onnxruntime-int8", "openvino-int8"])
@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("name", NORMALISATION)
def test_int8_peers_are_near_a_trained_network(
    name: str,
    bits: int,
    peer: str,
    test_data: Path,
    pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Near with 7 bits, which they get where 8 saturate; elsewhere with both."""
    if peer.startswith("openvino"):
        pytest.importorskip("openvino")
    saturates = _saturates(qcnn_py.available_isas(), describe_cpu()[1])
    monkeypatch.setattr("qcnn_py.contenders._saturates", lambda *_: bits == 7)
    network = qcnn_py.read_onnx(test_data / f"{name}.onnx")
    mean, std = NORMALISATION[name]
    images = [
        ((np.asarray(Image.open(path), np.float32) / 255 - mean) / std)
        .transpose(2, 0, 1)[None]
        .astype(np.float32)
        for path in sorted(pictures.rglob("*.jpg"))
    ]
    dense = network.compile("exact")
    expected = [dense(image) for image in images]
    (contender,) = compile_peers([peer], network, images, threads=1)
    outputs = [contender.run(image) for image in images]
    error = np.linalg.norm(np.subtract(outputs, expected)) / np.linalg.norm(expected)
    if bits == 8 and saturates:
        assert error > 0.1
    else:
        assert 0.01 < error < 0.1


def test_the_authors_network(test_data: Path, tmp_path: Path) -> None:
    folder = test_data / AUTHORS
    model = tmp_path / "alexnet.qcnn"
    run(
        "import",
        folder,
        "bvlc_alexnet_aCaF",
        "AlexNet",
        "-o",
        model,
        "--mean-image",
        folder / "imagenet_mean.single.bin",
        "--labels",
        folder / "class_names.txt",
    )
    found = run("classify", model, folder / "images", "--top", 3)
    assert len(found) == 4
    names = (folder / "class_names.txt").read_text().splitlines()
    # The input that the original prepared, of the first image.
    prepared = np.load(folder / "feature_maps.npz")["input"]
    expected = qcnn_py.load(model)(prepared[:1])[0]
    order = np.argsort(-expected, kind="stable")[:3]
    assert [p["index"] for p in found[0]["predictions"]] == order.tolist()
    assert [p["name"] for p in found[0]["predictions"]] == [names[i] for i in order]
    np.testing.assert_allclose(
        [p["probability"] for p in found[0]["predictions"]], expected[order], rtol=1e-6
    )
