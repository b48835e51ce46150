"""The command ``qcnn``: what it prints, what it writes, how it fails."""

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import click.testing
import numpy as np
import onnx
import pytest
from PIL import Image
from random_networks import NetworkBuilder, Quantized

import qcnn_py
from qcnn_py import Network, cli
from qcnn_py.config import PRESETS
from qcnn_py.preprocessing import Preprocessing

NAMES = ("ant", "bee", "cat")
PREPROCESSING = Preprocessing("rgb", resize=(6, 5), mean=(0.4, 0.5, 0.6), std=(0.2,))
MEAN = ("--mean", "0.4,0.5,0.6", "--std", "0.2")

QUANTIZE = ("quantize", "model.qcnn", "--data", "pictures", "-o", "x.qcnn")

Run = Callable[..., click.testing.Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, code: int = 0) -> click.testing.Result:
        runner = click.testing.CliRunner()
        result = runner.invoke(cli.cli, list(map(str, arguments)), prog_name="qcnn")
        assert result.exit_code == code, result.output + repr(result.exception)
        assert isinstance(result.exception, (SystemExit, type(None)))
        return result

    return run


def failure(result: click.testing.Result) -> str:
    """Return the one line that a failed command prints."""
    assert result.stdout == ""
    assert result.stderr.startswith("qcnn: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def dense_network(**metadata: object) -> Network:
    builder = NetworkBuilder((3, 6, 5))
    builder.conv(16, 3, name="conv")
    builder.add("relu")
    builder.fc(32, name="fc1")
    builder.add("relu")
    builder.fc(3, name="fc2")
    builder.add("softmax")
    return builder.build(metadata=metadata)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Return a folder of six random pictures in three class folders."""
    rng = np.random.default_rng(0)
    for number in range(6):
        folder = tmp_path / "pictures" / NAMES[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (9, 11, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "pictures"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.qcnn"
    stated = {"preprocessing": PREPROCESSING.to_json(), "class_names": list(NAMES)}
    dense_network(**stated).save(path)
    return path


def test_classify(run: Run, model: Path, pictures: Path) -> None:
    files = sorted(pictures.glob("*/*"))
    result = run("classify", model, *files, "--json", "--top", 2)
    found = json.loads(result.stdout)
    assert [each["image"] for each in found] == list(map(str, files))
    loaded = qcnn_py.load(model)
    for each, file in zip(found, files, strict=True):
        assert each["predictions"] == [
            {"index": p.index, "name": p.name, "probability": p.probability}
            for p in loaded.classify(file, 2)
        ]


def test_classify_folders_and_zips(run: Run, model: Path, pictures: Path) -> None:
    files = sorted(pictures.glob("*/*"))
    with zipfile.ZipFile("pictures.zip", "w") as archive:
        for file in files:
            archive.write(file, file.relative_to(pictures))
    expected = run("classify", model, *files).stdout
    assert run("classify", model, pictures).stdout == expected
    zipped = run("classify", model, "pictures.zip").stdout
    assert zipped == expected.replace(str(pictures), "pictures.zip")
    first = expected.splitlines()
    assert first[0] == str(files[0])
    assert sorted(line.split()[2] for line in first[1:4]) == list(NAMES)


def test_classify_with_other_names_and_pixels(
    run: Run, model: Path, pictures: Path
) -> None:
    Path("names.txt").write_text("one\ntwo\nthree\n")
    dense_network().save("bare.qcnn")
    named = run("classify", model, pictures).stdout
    for old, new in zip(NAMES, ("one", "two", "three"), strict=True):
        named = named.replace(f"  {old}\n", f"  {new}\n")
    bare = run("classify", "bare.qcnn", pictures, "--labels", "names.txt", *MEAN)
    assert bare.stdout == named
    other = run("classify", model, pictures, "--std", "0.3", "--labels", "names.txt")
    assert other.stdout != named


def test_quantize_then_evaluate(run: Run, pictures: Path) -> None:
    dense_network().to_onnx("net.onnx")
    settings = ("--calibration", 5, "--exclude", "fc2")
    quantize = ("quantize", "net.onnx", "--data", pictures, *MEAN, *settings)
    Path("settings.yaml").write_text("n_centroids: 8\nconv: {subvector_dim: 3}\n")
    quantize += ("--config", "settings.yaml")
    result = json.loads(run(*quantize, "-o", "a.qcnn", "--json").stdout)
    assert result["calibration_images"] == 5
    assert [each["quantized"] for each in result["layers"]] == [True, True, False]
    assert all(0 < each["relative_error"] < 1 for each in result["layers"][:2])
    network = Network.load("a.qcnn")
    conv, fc, _ = network.layers
    assert (conv.subvector_dim, conv.n_centroids) == (3, 8)
    assert (fc.subvector_dim, fc.n_centroids) == (4, 8)
    # Those of the folders; the preprocessing is stored as given.
    assert network.metadata["class_names"] == list(NAMES)
    assert network.metadata["preprocessing"] == PREPROCESSING.to_json()
    again = run(*quantize, "-o", "b.qcnn").stdout
    assert Path("a.qcnn").read_bytes() == Path("b.qcnn").read_bytes()
    assert "b.qcnn: " in again
    distilled = run(*quantize, "-o", "c.qcnn", "--distill", 2, "--json").stdout
    assert len(json.loads(distilled)["distillation"]["epochs"]) == 2

    evaluated = run("evaluate", "a.qcnn", "--data", pictures, "--json")
    found = json.loads(evaluated.stdout)
    predictions = json.loads(run("classify", "a.qcnn", pictures, "--json").stdout)
    right = [
        Path(each["image"]).parent.name == each["predictions"][0]["name"]
        for each in predictions
    ]
    assert found["n"] == 6
    assert found["top1"] == np.mean(right)
    assert found["top5"] == 1
    assert "6 images" in run("evaluate", "a.qcnn", "--data", pictures).stdout


def test_calibration_keeps_to_training_images(run: Run, pictures: Path) -> None:
    # An image that cannot be read among those of the test.
    (pictures / "test" / "ant").mkdir(parents=True)
    (pictures / "test" / "ant" / "0.png").write_bytes(b"")
    train = pictures / "train"
    train.mkdir()
    for name in NAMES:
        (pictures / name).rename(train / name)
    dense_network().save("net.qcnn")
    result = run(
        "quantize", "net.qcnn", "--data", pictures, *MEAN, "-o", "m.qcnn", "--json"
    )
    assert json.loads(result.stdout)["calibration_images"] == 6


def test_quantized_without_class_names(run: Run, pictures: Path) -> None:
    # Two folders are no three classes.
    for file in (pictures / "cat").iterdir():
        file.rename(pictures / "bee" / file.name)
    dense_network().save("net.qcnn")
    result = run("quantize", "net.qcnn", "--data", pictures, *MEAN, "-o", "m.qcnn")
    assert "without class names (see --labels)" in result.stdout
    assert "left dense" in result.stdout
    assert "class_names" not in Network.load("m.qcnn").metadata


def test_evaluate_matches_classes_by_name(
    run: Run, model: Path, pictures: Path
) -> None:
    network = Network.load(model)
    shuffled = [NAMES[i] for i in (2, 0, 1)]
    network.replace(metadata={"class_names": shuffled}).save("shuffled.qcnn")
    found = json.loads(
        run("evaluate", "shuffled.qcnn", "--data", pictures, "--json").stdout
    )
    predictions = qcnn_py.load("shuffled.qcnn")
    right = [
        predictions.classify(file, 1)[0].name == file.parent.name
        for file in pictures.glob("*/*")
    ]
    assert found["top1"] == np.mean(right)
    (pictures / "bee").rename(pictures / "wasp")
    result = run("evaluate", model, "--data", pictures, code=2)
    assert "'wasp', which is no class of the model" in failure(result)


def test_inspect(run: Run, model: Path) -> None:
    loaded = qcnn_py.load(model)
    found = json.loads(run("inspect", model, "--json").stdout)
    assert found["layers"] == json.loads(json.dumps(loaded.layers))
    assert found["metadata"]["class_names"] == list(NAMES)
    text = run("inspect", model).stdout
    for layer in loaded.layers:
        assert any(
            line.startswith(layer["name"]) and layer["kernel_name"] in line
            for line in text.splitlines()
        )
    page = run("inspect", model, "--html").stdout
    HTMLParser().feed(page)
    assert page.startswith("<!doctype html>")
    assert "model.qcnn" in page
    assert "not both" in failure(run("inspect", model, "--html", "--json", code=2))


def test_inspect_for_other_engines(run: Run, model: Path) -> None:
    found = json.loads(
        run(
            "inspect", model, "--json", "--isa", "portable", "--precision", "exact"
        ).stdout
    )
    assert (found["isa"], found["precision"]) == ("portable", "exact")


def test_import_and_export(run: Run, model: Path, tmp_path: Path) -> None:
    run("export", model, "-o", "net.onnx")
    onnx.checker.check_model("net.onnx")
    Path("names.txt").write_text("\n".join(NAMES))
    run("import", "net.onnx", "-o", "again.qcnn", *MEAN, "--labels", "names.txt")
    network, again = Network.load(model), Network.load("again.qcnn")
    x = NetworkBuilder((3, 6, 5)).images(3)
    np.testing.assert_allclose(
        again.compile("exact")(x), network.compile("exact")(x), rtol=1e-5
    )
    assert again.metadata["class_names"] == list(NAMES)
    assert again.metadata["preprocessing"] == PREPROCESSING.to_json()


def test_compact_export_is_smaller(run: Run) -> None:
    builder = NetworkBuilder((64,))
    builder.fc(256, quantized=Quantized(16, 4))
    builder.build().save("net.qcnn")
    sizes = [
        json.loads(run("export", "net.qcnn", "-o", "n.onnx", "--json", *option).stdout)
        for option in ((), ("--compact",))
    ]
    assert sizes[1]["bytes"] < sizes[0]["bytes"] / 4


def test_benchmark(run: Run) -> None:
    builder = NetworkBuilder((3, 6, 5))
    builder.fc(32, quantized=Quantized(16, 4))
    builder.build().save("net.qcnn")
    options = ("--repeats", 1, "--batches", 2, "--precision", "exact")
    (found,) = json.loads(run("benchmark", "net.qcnn", *options, "--json").stdout)
    assert found["model"] == "net.qcnn"
    names = [each["name"] for each in found["contenders"]]
    assert names == ["dense", "quantized-exact"]
    text = run("benchmark", "net.qcnn", "net.qcnn", *options).stdout
    assert text.count("theoretical speed-up") == 2


def test_doctor(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QCNN_ISA", raising=False)
    found = json.loads(run("doctor", "--json").stdout)
    assert found["isa"] == found["isas"][-1]
    assert found["problems"] == []
    assert found["extras"]["test"]["pytest"] == pytest.__version__
    assert "computes right" in run("doctor").stdout
    monkeypatch.setenv("QCNN_ISA", "mmx")
    result = run("doctor", code=1)
    assert "QCNN_ISA" in result.stderr


def test_presets_are_those_of_the_configuration() -> None:
    assert set(cli._PRESETS) == set(PRESETS)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(run: Run, shell: str) -> None:
    assert "_QCNN_COMPLETE" in run("completion", shell).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("clasify",), "Did you mean 'classify'?"),
        (("classify",), "Missing argument 'MODEL'"),
        (("classify", "nowhere.qcnn", "x"), "'nowhere.qcnn' does not exist"),
        (("inspect", "model.qcnn", "--isa", "mmx"), "'mmx' is not one of"),
        (("classify", "model.qcnn", "pictures", "--top", "0"), "0 is not in the range"),
        (("classify", "model.qcnn", "pictures", "--std", "x"), "numbers like 0.5"),
        (("classify", "model.qcnn", "pictures", "--std", "0"), "std is (0.0,)"),
        (("classify", "model.qcnn", "pictures", "--size", "0"), "pixels like 224"),
        (("classify", "model.qcnn", "pictures", "--mean", "1,2"), "got 2 numbers"),
        (("classify", "bare.qcnn", "pictures"), "give --mean and --std"),
        (("classify", "vector.qcnn", "pictures", *MEAN), "arrays of shape (4,)"),
        (("classify", "model.qcnn", "pictures", "--labels", "x.txt"), "got 1 lines"),
        (("export", "model.qcnn", "-o", "no/x.onnx"), "there is no folder no"),
        (("export", "model.qcnn", "-o", "pictures"), "pictures is a folder"),
        (("import", "pictures", "-o", "x.qcnn"), "give PREFIX and ARCHITECTURE"),
        (("import", "model.qcnn", "tiny", "-o", "x.qcnn"), "are for folders"),
        (("evaluate", "bare.qcnn", "--data", "none", *MEAN), "does not exist"),
        (
            (*QUANTIZE, "--config", "misspelt.yaml"),
            "misspelt.yaml: n_centroid: unknown key; did you mean 'n_centroids'?",
        ),
        (
            (*QUANTIZE, "--exclude", "conv9"),
            "no such layer",
        ),
        (
            (*QUANTIZE, "--exclude", "conv", "--exclude", "fc1"),
            "no layer to quantise",
        ),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, tuple) else "",
)
@pytest.mark.usefixtures("model", "pictures")
def test_bad_use(run: Run, arguments: tuple[str, ...], message: str) -> None:
    dense_network().save("bare.qcnn")
    Path("x.txt").write_text("one name\n")
    Path("misspelt.yaml").write_text("n_centroid: 8\n")
    vector = NetworkBuilder((4,))
    vector.fc(3)
    vector.build().save("vector.qcnn")
    assert message in failure(run(*arguments, code=2))
    assert not Path("x.qcnn").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "README.md"), "expected a .qcnn file, or an ONNX model"),
        (("inspect", "odd.onnx"), "not a valid ONNX model"),
        (("classify", "model.qcnn", "README.md"), "expected a readable image"),
        (("classify", "model.qcnn", "empty"), "got no image"),
        (("evaluate", "model.qcnn", "--data", "README.md"), "folder of images or a"),
        (
            ("classify", "model.qcnn", "pictures", "--size", "7x7"),
            "shape (3, 7, 7), expected (3, 6, 5)",
        ),
        (
            (*QUANTIZE, "--size", "7x7"),
            "expected (3, 6, 5), the network's input",
        ),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, tuple) else "",
)
@pytest.mark.usefixtures("model", "pictures")
def test_failed_jobs(run: Run, arguments: tuple[str, ...], message: str) -> None:
    Path("README.md").write_text("This is neither a model nor an image.\n")
    Path("odd.onnx").write_bytes(b"\xff\xfe")
    Path("empty").mkdir()
    assert message in failure(run(*arguments, code=1))
    assert not Path("x.qcnn").exists()


# --- the real process -----------------------------------------------------------------

BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
from qcnn_py.__main__ import main
main()
"""


def start(*arguments: object, blocked: tuple[str, ...] = ()) -> list[str]:
    code = f"BLOCKED = {blocked}\n{BLOCKER}"
    return [sys.executable, "-c", code, *map(str, arguments)]


@pytest.mark.parametrize(
    ("blocked", "arguments", "extra"),
    [
        ("rich_click", ("--help",), "cli"),
        ("PIL", ("doctor",), "cli"),
        ("pydantic", ("quantize", "model.qcnn", "--data", ".", "-o", "x"), "pipeline"),
        ("onnx", ("export", "model.qcnn", "-o", "x"), "onnx"),
        ("openvino", ("benchmark", "model.qcnn", "--peers"), "bench"),
    ],
)
def test_missing_extras(
    blocked: str, arguments: tuple[str, ...], extra: str, model: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        start(*arguments, blocked=(blocked,)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (1, 2)
    assert done.stderr.count("\n") == 1
    assert f"pip install 'qcnn-py[{extra}]'" in done.stderr


def test_classifies_without_the_pipeline(
    model: Path, pictures: Path, tmp_path: Path
) -> None:
    heavy = ("jax", "onnx", "pydantic", "safetensors", "scipy", "sklearn", "yaml")
    for arguments in (("doctor",), ("inspect", model), ("classify", model, pictures)):
        done = subprocess.run(
            start(*arguments, blocked=heavy),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")


def test_completion_of_a_command_and_a_choice(tmp_path: Path) -> None:
    for words, expected in (
        ("qcnn cla", {"plain,classify"}),
        ("qcnn quantize --preset pa", {f"plain,{p}" for p in PRESETS if p[:2] == "pa"}),
    ):
        completed = subprocess.check_output(
            [sys.executable, "-m", "qcnn_py"],
            env={
                **os.environ,
                "_QCNN_COMPLETE": "bash_complete",
                "COMP_WORDS": words,
                "COMP_CWORD": str(words.count(" ")),
            },
            text=True,
            cwd=tmp_path,
        )
        assert set(completed.split()) == expected


def test_module_and_closed_pipe(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "qcnn_py"]
    version = subprocess.check_output([*command, "--version"], text=True, cwd=tmp_path)
    assert version == f"qcnn, version {qcnn_py.__version__}\n"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [*command, "inspect", model, "--json"],
        stdout=write,
        stderr=subprocess.PIPE,
        check=False,
        cwd=tmp_path,
    )
    os.close(write)
    assert done.stderr == b""
