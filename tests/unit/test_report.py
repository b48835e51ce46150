import copy
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import jsonschema
import numpy as np
import pytest

from qcnn_py import ModelFormatError, Network, QuantizedWeights
from qcnn_py.architectures import conv_fc
from qcnn_py.artefacts import save_json
from qcnn_py.benchmarking import Contender, benchmark, race
from qcnn_py.config import CellConfig, LayerSettings
from qcnn_py.datasets import Dataset, Split
from qcnn_py.preprocessing import Preprocessing
from qcnn_py.quantization import LayerMetrics, QuantizedLayer
from qcnn_py.report import (
    build_comparison_report,
    build_pipeline_report,
    build_speed_report,
)
from qcnn_py.report_figures import AFTER, Point, pareto_front, tradeoff
from qcnn_py.report_page import (
    _bytes,
    _milliseconds,
    _number,
    _seconds,
    render,
    render_index,
)

SCHEMA = Path(__file__).parents[2] / "workflow" / "schemas" / "report.schema.json"
N_REPLICATES = 2
N_TEST = 20


def quantized_layer(name: str, network: Network, error: float) -> QuantizedLayer:
    rng = np.random.default_rng(0)
    node = network.node(name)
    weight = network.tensors[f"{name}.weight"]
    shape = (weight.shape[0], *weight.shape[2:], weight.shape[1])
    weights = QuantizedWeights(
        codebooks=rng.standard_normal((weight.shape[1], 4, 1)).astype(np.float32),
        codes=rng.integers(4, size=shape, dtype=np.uint8),
        bias=network.tensors[f"{name}.bias"] if node.attributes["bias"] else None,
    )
    compared = {"kmeans": 9 * error, "bcd": 2 * error, "gptvq": error}
    objective = (0.5, 0.2, 0.1, 0.1)
    metrics = LayerMetrics(error, 10 * error, compared, 100, 3, objective)
    return QuantizedLayer(name, weights, LayerSettings(), 0, metrics)


def dataset() -> Dataset:
    rng = np.random.default_rng(0)

    def split(count: int) -> Split:
        return Split(
            rng.integers(256, size=(count, 1, 8, 8), dtype=np.uint8),
            rng.integers(3, size=count),
        )

    splits = {"train": split(30), "validation": split(5), "test": split(N_TEST)}
    return Dataset(splits, ("zero", "<one>", "two"), Preprocessing("gray"))


def evaluation(replicate: int) -> dict:
    def stage(top1: float, wrong: int) -> dict:
        predictions = [0] * (N_TEST - wrong) + [1] * wrong
        return {"n": N_TEST, "top1": top1, "top5": 1.0, "predictions": predictions}

    stages = ("original", "conv_quantized", "finetuned", "requantized", "final")
    shares = np.subtract([0.98, 0.96, 0.975, 0.965, 0.97], replicate / 100)
    return {
        "stages": {
            name: stage(float(share), wrong)
            for wrong, (name, share) in enumerate(zip(stages, shares, strict=True))
        }
    }


def history() -> dict:
    epochs = [
        {
            "epoch": number,
            "learning_rate": 1e-3,
            "train_loss": 1 / number,
            "validation_loss": 1.5 / number,
            "validation_accuracy": 0.9,
        }
        for number in (1, 2, 3)
    ]
    initial = {"validation_loss": 2.0, "validation_accuracy": 0.8}
    return {
        "initial": initial,
        "epochs": epochs,
        "best_epoch": 3,
        "stopped_early": False,
    }


def timing(path: Path, seconds: float) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(f"s\th:m:s\tmax_rss\n{seconds}\t0:00:01\t-\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory) -> dict:
    """Write what the stages before the report leave, for two replicates."""
    folder = tmp_path_factory.mktemp("run")
    data = dataset()
    network = conv_fc((1, 8, 8), (4,), (6,), 3, metadata=data.metadata())
    lists = ("evaluations", "finetuning", "distillation", "layers", "timings")
    inputs: dict = {name: [] for name in lists}
    model = network
    for replicate in range(N_REPLICATES):
        place = folder / str(replicate)
        save_json(place / "evaluation.json", evaluation(replicate))
        inputs["evaluations"].append(place / "evaluation.json")
        save_json(place / "finetuning.json", history())
        inputs["finetuning"].append(place / "finetuning.json")
        distillation = history()
        for entry in (distillation["initial"], *distillation["epochs"]):
            del entry["validation_accuracy"]
        save_json(place / "distillation.json", distillation)
        inputs["distillation"].append(place / "distillation.json")
        for name, error in (("conv1", 0.01), ("fc1", 0.03)):
            layer = quantized_layer(name, network, error * (1 + replicate))
            layer.save(place / f"{name}.safetensors")
            inputs["layers"].append(place / f"{name}.safetensors")
            model = (
                model.with_quantized_layer(name, layer.weights)
                if not replicate
                else model
            )
        inputs["timings"].append(timing(place / "timings" / "finetune_fc.tsv", 1.5))
    inputs["timings"].append(timing(folder / "benchmark_model.tsv", 61.0))
    data.save(folder / "dataset.safetensors")
    network.save(folder / "network.qcnn")
    model.save(folder / "model.qcnn")
    peer = Contender("peer", "Another engine", model.decoded().compile("exact"))
    result = benchmark(model, repeats=2, batches=2, peers=[peer])
    save_json(folder / "benchmark.json", result)
    return {
        **inputs,
        "dataset": folder / "dataset.safetensors",
        "network": folder / "network.qcnn",
        "model": folder / "model.qcnn",
        "benchmark": folder / "benchmark.json",
    }


def config(kind: str) -> dict:
    return {
        "kind": kind,
        "seed": 7,
        "dataset": {"source": "npz"},
        "finetune": {"epochs": 3},
        "distill": {"epochs": 1},
        "report": {"title": None, "example_images": 4},
    }


def build(folder: Path, artefacts: dict, kind: str = "pipeline") -> tuple[dict, str]:
    function = build_pipeline_report
    inputs = dict(artefacts)
    if kind == "speed":
        function = build_speed_report
        inputs = {key: artefacts[key] for key in ("timings", "benchmark")}
    function(
        run="tiny",
        config=config(kind),
        adaptations={"fc2": "left dense: only 3 sub-vectors"},
        command="snakemake --cores 1 results/tiny/report.html",
        files=[folder / "report.json", folder / "layers" / "a%2Fb.json"],
        schema=SCHEMA,
        json_path=folder / "report.json",
        html_path=folder / "report.html",
        **inputs,
    )
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return report, (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module", params=["pipeline", "speed", "activations"])
def built(request, artefacts, comparison, tmp_path_factory) -> tuple[dict, str]:
    if request.param == "activations":
        return comparison
    return build(tmp_path_factory.mktemp("report"), artefacts, request.param)


@pytest.fixture(scope="module")
def pipeline(artefacts, tmp_path_factory) -> dict:
    return build(tmp_path_factory.mktemp("report"), artefacts)[0]


def test_files_are_linked_relative_to_the_page(built):
    report, page = built
    links = re.findall(r'<a href="([^"]*)">', page)
    assert [unquote(link) for link in links] == report["files"]
    assert "report.json" in links


CELLS = {
    "float": {},
    "few bits": {"weights": "binary", "activations": {"scheme": "sign"}},
    "few bits, noise": {
        "weights": "binary",
        "activations": {"scheme": "sign", "noise": True},
    },
}


@pytest.fixture(scope="module")
def comparison(tmp_path_factory) -> tuple[dict, str]:
    """Build the report of a run that compares networks, in two replicates."""
    folder = tmp_path_factory.mktemp("comparison")
    data = dataset()
    data.save(folder / "dataset.safetensors")
    network = conv_fc((1, 8, 8), (4,), (6,), 3, metadata=data.metadata())
    signs = {
        layer.name: np.ones(network.tensors[f"{layer.name}.weight"].shape, np.int8)
        for layer in network.layers
    }
    binary = network
    for name, array in signs.items():
        binary = binary.with_binary_layer(name, array, None)
    networks = dict(zip(CELLS, (network, binary, binary), strict=True))
    results, files = [], []
    for number, (name, top1) in enumerate(
        zip(CELLS, ((0.95, 0.9), (0.85, 0.9), (0.9, 0.9)), strict=True)
    ):
        networks[name].save(folder / f"{number}.qcnn")
        save_json(
            folder / f"{number}.json",
            {"replicates": [{"n": N_TEST, "top1": x, "top5": 1.0} for x in top1]},
        )
        results.append(folder / f"{number}.json")
        files.append(folder / f"{number}.qcnn")
    images = next(data.batches("test", N_TEST))
    timed = race(networks, images, repeats=2, batches=2)
    save_json(folder / "benchmark.json", timed)
    defaults = {
        name: CellConfig.from_mapping(cell).model_dump(mode="json")
        for name, cell in CELLS.items()
    }
    build_comparison_report(
        run="tiny",
        config={**config("activations"), "cells": defaults},
        command="snakemake --cores 1 results/tiny/report.html",
        files=[folder / "report.json"],
        results=results,
        networks=files,
        timings=[timing(folder / "train_cell.float.tsv", 2.5)],
        dataset=folder / "dataset.safetensors",
        benchmark=folder / "benchmark.json",
        schema=SCHEMA,
        json_path=folder / "report.json",
        html_path=folder / "report.html",
    )
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return report, (folder / "report.html").read_text(encoding="utf-8")


def test_comparison(comparison):
    report, page = comparison
    first, quiet, noisy = report["cells"]
    assert [cell["name"] for cell in report["cells"]] == list(CELLS)
    assert first["top1"]["values"] == pytest.approx([95, 90])
    assert quiet["points_lost"]["values"] == pytest.approx([10, 0])
    assert (first["weight_bits"], quiet["weight_bits"]) == (32, 1)
    assert (first["activation_bits"], noisy["activation_bits"]) == (32, 1)
    # The float network has biases, too.
    n_weights = 4 * 9 + 6 * 64 + 3 * 6
    assert first["weight_bytes"] == 4 * (n_weights + 4 + 6 + 3)
    assert quiet["weight_bytes"] == sum(-(-n // 8) for n in (4 * 9, 6 * 64, 3 * 6))
    assert first["speedup"]["median"] == 1
    assert "<details open>" in page
    assert "in 1 of 1 case" in page
    assert "train float" in page


class Page(HTMLParser):
    """Collects elements; fails where tags do not match."""

    VOID = frozenset({"meta", "img", "path", "use"})

    def __init__(self, html: str):
        super().__init__()
        self.elements = []
        self.open = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def every_subschema(schema):
    if isinstance(schema, dict):
        yield schema
        for value in schema.values():
            yield from every_subschema(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from every_subschema(value)


def test_schema_is_valid_and_describes_every_key():
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    for part in every_subschema(schema):
        if part.get("type") == "object" and "properties" in part:
            assert part["additionalProperties"] is False
            undescribed = [
                name
                for name, value in part["properties"].items()
                if "description" not in value
            ]
            assert undescribed == []


def test_accuracies_are_percentages_over_the_replicates(pipeline):
    accuracy = pipeline["accuracy"]
    assert accuracy["n_images"] == [N_TEST] * N_REPLICATES
    original = accuracy["stages"][0]
    assert original["name"] == "original"
    assert original["top1"]["values"] == pytest.approx([98, 97])
    assert original["top1"]["mean"] == pytest.approx(97.5)
    assert original["top1"]["spread"] == pytest.approx(np.sqrt(0.5))
    assert accuracy["points_lost"]["values"] == pytest.approx([1, 1])


def test_quantised_activations_are_a_stage(artefacts, tmp_path):
    paths = []
    for number, path in enumerate(artefacts["evaluations"]):
        stages = json.loads(path.read_text())["stages"]
        stages["activations_quantized"] = stages["original"]
        paths.append(tmp_path / f"{number}.json")
        save_json(paths[-1], {"stages": stages})
    report, page = build(tmp_path, {**artefacts, "evaluations": paths})
    names = [stage["name"] for stage in report["accuracy"]["stages"]]
    assert names[:3] == ["original", "activations_quantized", "conv_quantized"]
    assert "activations quantised" in page


def test_layers_carry_their_response_errors(pipeline):
    errors = {layer["name"]: layer["response_error"] for layer in pipeline["layers"]}
    assert errors["conv1"]["relative"]["values"] == pytest.approx([0.01, 0.02])
    assert errors["fc1"]["kmeans_relative"]["mean"] == pytest.approx(0.45)
    assert errors["fc2"] is None
    compared = errors["fc1"]["compared"]
    assert compared["bcd"]["values"] == pytest.approx([0.06, 0.12])


def test_methods_and_adaptations_are_shown(artefacts, tmp_path):
    report, html = build(tmp_path, artefacts)
    assert report["adaptations"] == {"fc2": "left dense: only 3 sub-vectors"}
    assert "fc2 left dense: only 3 sub-vectors" in html
    assert "The methods at the same place" in html


def test_sizes_are_those_of_the_files(pipeline, artefacts):
    file = pipeline["size"]["file"]
    assert file["before"] == artefacts["network"].stat().st_size
    assert file["after"] == artefacts["model"].stat().st_size
    assert file["compression"] == file["before"] / file["after"]


def test_times_are_collected_by_stage(pipeline):
    seconds = {s["name"]: s["seconds"]["values"] for s in pipeline["stage_seconds"]}
    assert seconds == {"finetune_fc": [1.5, 1.5], "benchmark_model": [61.0]}


def test_every_contender_is_shown(built):
    report, page = built
    if report["kind"] == "activations":
        assert all(f">{cell['name']}<" in page for cell in report["cells"])
        return
    contenders = report["speed"]["contenders"]
    names = ["dense", "quantized-fast", "quantized-exact", "peer"]
    assert [each["name"] for each in contenders] == names
    for each in contenders:
        assert f">{each['description']}<" in page
    ratio = contenders[1]["ratios"]["peer"]
    sign = "\N{MULTIPLICATION SIGN}"
    assert f"as fast as {_number(ratio['median'])}{sign} Another engine." in page
    low, high = (_number(ratio[f"{part}_quartile"]) for part in ("lower", "upper"))
    assert f">{_number(ratio['median'])}{sign} ({low} to {high})<" in page


def test_without_peers_no_other_engine_is_spoken_of(pipeline):
    report = copy.deepcopy(pipeline)
    *ours, peer = report["speed"]["contenders"]
    report["speed"]["contenders"] = ours
    for each in ours:
        del each["ratios"][peer["name"]]
    jsonschema.validate(report, json.loads(SCHEMA.read_text(encoding="utf-8")))
    page = render(report, [b"png"] * len(report["examples"]["images"]))
    assert "Other engines" not in page


def test_examples_come_from_changed_and_other_predictions(pipeline):
    examples = pipeline["examples"]
    # The last four of the first replicate's predictions differ.
    assert (examples["n_images"], examples["n_changed"]) == (N_TEST, 4)
    indices = [image["index"] for image in examples["images"]]
    assert len(set(indices)) == 4
    assert [index >= N_TEST - 4 for index in indices] == [True, True, False, False]


def test_title_defaults_to_the_run(built):
    report, page = built
    assert report["title"] == "tiny"
    assert '<p class="kicker">tiny</p>' in page


def test_page_is_well_formed_and_self_contained(built):
    page = Page(built[1])
    tags = {tag for tag, _ in page.elements}
    assert tags.isdisjoint({"script", "link", "iframe", "object", "embed", "base"})
    for _, attributes in page.elements:
        for name in ("src", "srcset", "data", "poster"):
            if name in attributes:
                assert attributes[name].startswith(("data:image/png;base64,", "#"))
    assert "url(" not in built[1]
    assert "@import" not in built[1]
    assert "http" not in built[1]
    assert len(built[1].encode()) < 2_000_000


def test_ids_are_unique_and_references_hold(built):
    page = Page(built[1])
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for use in page.all("use"):
        assert use["href"].removeprefix("#") in ids


def test_every_picture_has_words(built):
    page = Page(built[1])
    ids = {attributes.get("id") for _, attributes in page.elements}
    drawings = page.all("svg")
    assert len(drawings) >= (5 if built[0]["kind"] == "activations" else 7)
    for drawing in drawings:
        assert drawing["role"] == "img"
        assert set(drawing["aria-labelledby"].split()) <= ids
    assert all(image["alt"] for image in page.all("img"))
    assert len(re.findall("<figure>", built[1])) == len(page.all("figcaption"))


def test_text_in_charts_is_legible_on_a_telephone(built):
    sizes = re.findall(r"font-size: ([\d.]+)px", built[1])
    assert min(map(float, sizes)) >= 11


def test_colours_of_charts_are_the_page_s(built):
    charts = "".join(re.findall(r"<svg.*?</svg>", built[1], re.DOTALL))
    assert "var(--ink)" in charts
    assert not re.search(r"#[0-9a-f]{6}\b", charts)


def test_class_names_are_escaped(artefacts, tmp_path):
    page = build(tmp_path, artefacts)[1]
    assert "<one>" not in page


def test_equal_inputs_give_equal_bytes(artefacts, tmp_path):
    first = build(tmp_path, artefacts)
    assert build(tmp_path, artefacts) == first


def test_page_follows_from_the_report_alone(pipeline):
    pictures = [b"png"] * len(pipeline["examples"]["images"])
    assert render(pipeline, pictures) == render(copy.deepcopy(pipeline), pictures)


def one_replicate(report):
    for stage in (*report["accuracy"]["stages"], report["accuracy"]):
        for key in ("top1", "top5", "points_lost"):
            if key in stage:
                stage[key]["spread"] = None
                del stage[key]["values"][1:]
    del report["accuracy"]["n_images"][1:]
    for training in ("finetuning", "distillation"):
        del report[training][1:]


def no_epochs(report):
    report["finetuning"] = [
        {"initial": {}, "epochs": [], "best_epoch": 0, "stopped_early": False}
    ] * N_REPLICATES


def no_distillation(report):
    report["distillation"] = [
        {"initial": {}, "epochs": [], "best_epoch": 0, "stopped_early": False}
    ] * N_REPLICATES
    del report["accuracy"]["stages"][-2]


def first_parameters_kept(report):
    for each in report["finetuning"]:
        each["best_epoch"] = 0


def no_validation(report):
    for each in report["finetuning"]:
        each["initial"] = {}
        for epoch in each["epochs"]:
            del epoch["validation_loss"], epoch["validation_accuracy"]


def nothing_quantized(report):
    for layer in report["layers"]:
        layer["quantized"] = False
        layer["response_error"] = None


def speed(report, speedup):
    report["speed"]["contenders"][1] |= {"speedup": speedup, "speedup_spread": 0.1}


def within_the_spread(report):
    speed(report, 1.07)


def slower_and_better(report):
    speed(report, 0.5)
    report["accuracy"]["points_lost"]["mean"] = -0.3


def no_loss_no_errors(report):
    for layer in report["layers"]:
        if layer["response_error"]:
            for key in ("relative", "kmeans_relative"):
                layer["response_error"][key]["values"] = [0.0, 0.0]
                layer["response_error"][key]["mean"] = 0.0
    report["accuracy"]["points_lost"]["mean"] = 0.0


def only_kmeans(report):
    for layer in report["layers"]:
        if layer["response_error"]:
            layer["response_error"]["method"] = "kmeans"


def kmeans_in_one_layer(report):
    report["layers"][0]["response_error"]["method"] = "kmeans"


def long_names(report):
    for layer in report["layers"]:
        layer["name"] = f"/backbone/features/{layer['name']}/Convolution"


def no_examples(report):
    report["examples"]["images"] = []


def much_lost(report):
    report["accuracy"]["points_lost"]["mean"] = 3.0
    worst = report["layers"][0]
    worst["response_error"]["relative"]["mean"] = 0.9
    worst["subvector_dim"] = 2


def no_training_and_much_lost(report):
    much_lost(report)
    report["config"]["finetune"]["epochs"] = 0
    report["config"]["distill"]["epochs"] = 0


def slow_layer(report):
    for number, layer in enumerate(report["layers"]):
        layer["speedup"] = 2.0 if number else 0.5


def large_dense_layer(report):
    rest = sum(layer["bytes"] for layer in report["layers"][1:])
    report["layers"][0] |= {"quantized": False, "bytes": 9 * rest}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (one_replicate, "points of accuracy"),
        (no_epochs, "points of accuracy"),
        (no_distillation, "and \N{MINUS SIGN}0.50 when they were quantised too."),
        (first_parameters_kept, "Fine-tuning kept the parameters of epoch 0"),
        (no_validation, "training images"),
        (nothing_quantized, "No layer was quantised"),
        (within_the_spread, "Equally fast"),
        (slower_and_better, "2.00\N{MULTIPLICATION SIGN} slower"),
        (slower_and_better, "of accuracy gained"),
        (no_loss_no_errors, "accuracy lost"),
        (only_kmeans, "The layers are quantised by plain k-means"),
        (kmeans_in_one_layer, "beats plain k-means on 1 of 2 layers"),
        (long_names, ">\N{HORIZONTAL ELLIPSIS}conv1/Convolution<"),
        (no_examples, "points of accuracy"),
        (much_lost, "More exact: conv1 is off most"),
        (much_lost, "subvector_dim 1 instead of 2, or n_centroids"),
        (no_loss_no_errors, "Smaller: next to nothing was lost"),
        (no_training_and_much_lost, "finetune.epochs: 10"),
        (no_training_and_much_lost, "distill.epochs: 20"),
        (slow_layer, "Faster: conv1 would take less time dense"),
        (large_dense_layer, "was left dense and takes 90"),
    ],
)
def test_unusual_reports_are_drawn_too(pipeline, change, words):
    report = copy.deepcopy(pipeline)
    change(report)
    jsonschema.validate(report, json.loads(SCHEMA.read_text(encoding="utf-8")))
    page = render(report, [b"png"] * len(report["examples"]["images"]))
    Page(page)
    assert words in page


@pytest.mark.parametrize(
    ("artefact", "content", "message"),
    [
        ("evaluations", {"stages": {"original": {}}}, "lacks 'n'"),
        ("evaluations", {}, "lacks 'stages'"),
        ("benchmark", {"environment": {}}, "lacks 'layers'"),
        ("benchmark", [], "expected a JSON object"),
        ("finetuning", {"epochs": []}, r"finetuning\[0\]: .* is a required property"),
    ],
)
def test_artefacts_that_lack_something_are_refused(
    artefacts, tmp_path, artefact, content, message
):
    path = tmp_path / "broken.json"
    save_json(path, content)
    broken = path if artefact == "benchmark" else [path, *artefacts[artefact][1:]]
    with pytest.raises(ModelFormatError, match=message):
        build(tmp_path, {**artefacts, artefact: broken})
    assert not (tmp_path / "report.html").exists()


def test_timings_without_seconds_are_refused(artefacts, tmp_path):
    path = tmp_path / "finetune_fc.tsv"
    path.write_text("h:m:s\n0:00:01\n", encoding="utf-8")
    with pytest.raises(ModelFormatError, match="column 's'"):
        build(tmp_path, {**artefacts, "timings": [path]})


def test_missing_key_in_the_speed_test_is_refused(artefacts, tmp_path):
    content = json.loads(artefacts["benchmark"].read_text(encoding="utf-8"))
    del content["contenders"][1]["average_ms"]
    save_json(tmp_path / "benchmark.json", content)
    broken = {**artefacts, "benchmark": tmp_path / "benchmark.json"}
    with pytest.raises(ModelFormatError, match=r"contenders\[1\].*average_ms"):
        build(tmp_path, broken, "speed")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (14.23, "14.2"), (25, "25.0"), (0.9846, "0.985"), (1210, "1,210"),
     (100, "100"), (0.001234, "0.00123"), (999.6, "1,000"), (-2.5, "\u22122.50")],
)  # fmt: skip
def test_numbers_have_three_digits_and_no_powers(value, text):
    assert _number(value) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (_bytes(999), "999\u00a0bytes"),
        (_bytes(43_100), "43.1\u00a0kB"),
        (_bytes(243_860_896), "244\u00a0MB"),
        (_milliseconds(0.0412), "41.2\u00a0µs"),
        (_milliseconds(12.4), "12.4\u00a0ms"),
        (_seconds(4.24), "4.2\u00a0s"),
        (_seconds(196.4), "3\u00a0min 16\u00a0s"),
    ],
)
def test_units(text, expected):
    assert text == expected


def moved(report, title, *, top1=0.0, size=1.0, time=1.0):
    """Return a report whose quantised network differs by so much."""
    report = copy.deepcopy(report)
    report["title"] = title
    report["accuracy"]["stages"][-1]["top1"]["mean"] += top1
    report["size"]["file"]["after"] *= size
    report["speed"]["contenders"][1]["average_ms"] *= time
    return report


def test_runs_side_by_side(pipeline):
    others = [
        moved(pipeline, "better", top1=5, size=0.5),
        moved(pipeline, "worse", top1=-5, size=2, time=0.01),
        moved(pipeline, "<odd>"),
    ]
    speed = {**pipeline, "title": "race", "kind": "speed", "config": {"kind": "speed"}}
    # Of a kind that has no more in common with the others.
    other = {"title": "other", "kind": "other", "config": {"dataset": {}}}
    reports = [other, pipeline, speed, *others]
    text = render_index([(f"run {n}.html", each) for n, each in enumerate(reports)])
    page = Page(text)
    assert "6 runs side by side" in text
    assert {a["href"] for a in page.all("a")} == {f"run {n}.html" for n in range(6)}
    assert "&lt;odd&gt;</a>" in text
    # One for the runs on the same images, one for those without, one for the others.
    assert len(page.all("table")) == 3
    assert text.index(">tiny</a>") < text.index(">race</a>")
    (size, time) = re.findall(r"By size those are (.+); by time, (.+)\.<", text)[0]
    assert "better" in size
    assert "worse" not in size
    assert time.startswith("worse, ")


def test_pareto_front():
    points = [
        Point(label, cost, percentage, AFTER)
        for label, cost, percentage in (
            ("cheap", 1, 50),
            ("beaten", 2, 50),
            ("middle", 2, 60),
            ("dear and bad", 3, 59),
            ("best", 9, 70),
        )
    ]
    assert [p.label for p in pareto_front(points)] == ["cheap", "middle", "best"]
    # However close or far apart they are, they can be drawn.
    for chosen in (points[:1], points[1:3], points):
        for scale in (1e-3, 1, 1e9):
            scaled = [replace(p, cost=p.cost * scale) for p in chosen]
            assert "<svg" in tradeoff(scaled, str, name="x", title="x")
