"""The report of a run: ``report.json`` and a self-contained ``report.html``.

Stage functions, one for each kind of run, read the artefacts of the stages before.
The page shows what is in ``report.json``, and the pictures of the example images; its
template and style are in ``qcnn_py/report_assets``.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from os import PathLike
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import jsonschema
import numpy as np
import numpy.typing as npt
from PIL import Image

from qcnn_py.artefacts import load_json, replacing, save_json
from qcnn_py.benchmarking import parameter_bytes
from qcnn_py.datasets import Dataset
from qcnn_py.errors import ModelFormatError
from qcnn_py.network import Network
from qcnn_py.quantization import QuantizedLayer
from qcnn_py.report_page import render, render_index

__all__ = [
    "build_comparison_report",
    "build_pipeline_report",
    "build_speed_report",
]

StrPath = str | PathLike[str]

# The networks that are evaluated, in the order they come to be, and what of each.
# Where activations are not quantised there is none with them alone, and none before
# distillation where that changes nothing.
_OPTIONAL_STAGES = ("activations_quantized", "requantized")
_STAGES = (
    "original",
    "activations_quantized",
    "conv_quantized",
    "finetuned",
    "requantized",
    "final",
)
_EVALUATED = ("n", "top1", "top5", "predictions")

_PACKAGES = ("jax", "matplotlib", "optax", "scikit-learn", "scipy", "snakemake")

# Longer side of an example picture, in pixels.
_PICTURE_SIZE = 128


def build_pipeline_report(
    *,
    run: str,
    config: Mapping[str, Any],
    adaptations: Mapping[str, str],
    command: str,
    files: Sequence[StrPath],
    evaluations: Sequence[StrPath],
    finetuning: Sequence[StrPath],
    distillation: Sequence[StrPath],
    layers: Sequence[StrPath],
    timings: Sequence[StrPath],
    dataset: StrPath,
    network: StrPath,
    model: StrPath,
    benchmark: StrPath,
    schema: StrPath,
    json_path: StrPath,
    html_path: StrPath,
) -> None:
    """Write the report of a run that quantises a network on images.

    Parameters
    ----------
    run
        The run's name.
    config
        The run's whole section of ``config.yaml``, defaults filled in, plain values.
    adaptations
        What the preset did to fit a layer, in words, by the layer's name.
    command
        The command line that builds the report anew.
    files
        What the page links to, files and folders below its own folder.
    evaluations
        ``evaluation.json`` of each replicate, in order.
    finetuning, distillation
        ``finetuning.json`` and ``distillation.json`` of each replicate, in order.
    layers
        Artefacts of the quantised layers (``<layer>.safetensors``), of all replicates,
        each layer's in the order of the replicates.
    timings
        Snakemake's benchmark files (``<stage>.tsv``), of all replicates and the run.
    dataset, network, model
        ``dataset.safetensors``, the original ``network.qcnn`` and the final
        ``model.qcnn`` of the first replicate: sizes and example images.
    benchmark
        ``benchmark.json``, what :func:`qcnn_py.benchmarking.benchmark` returned.
    schema
        ``workflow/schemas/report.schema.json``.
    json_path, html_path
        The two files to write.

    Raises
    ------
    ModelFormatError
        If an artefact is malformed or lacks something the report needs.
    OSError
        If a file cannot be read or written.
    """
    data = Dataset.load(dataset)
    original, final = Network.load(network), Network.load(model)
    replicates = _read_evaluations(evaluations)
    before, *_, after = (stage["predictions"] for stage in replicates[0])
    changed = np.not_equal(before, after)
    chosen = _choose(changed, config["report"]["example_images"], config["seed"])
    links = _links(files, html_path)
    report = _common(run, config, adaptations, command, links, timings, benchmark)
    report["size"]["file"] = _sizes(
        Path(network).stat().st_size, Path(model).stat().st_size
    )
    errors = _response_errors(layers)
    for layer in report["layers"]:
        layer["response_error"] = errors.get(layer["name"])
    report |= {
        "dataset": _describe_dataset(config, data),
        "accuracy": _accuracy(replicates),
        "finetuning": [_read(path) for path in finetuning],
        "distillation": [_read(path) for path in distillation],
        "examples": {
            "n_images": len(changed),
            "n_changed": int(changed.sum()),
            "images": _classify(data, original, final, chosen),
        },
    }
    pictures = [_png(data, index) for index in chosen]
    _write(report, pictures, schema, json_path, html_path)


def build_speed_report(
    *,
    run: str,
    config: Mapping[str, Any],
    adaptations: Mapping[str, str],
    command: str,
    files: Sequence[StrPath],
    timings: Sequence[StrPath],
    benchmark: StrPath,
    schema: StrPath,
    json_path: StrPath,
    html_path: StrPath,
) -> None:
    """Write the report of a run that measures speed only.

    Parameters and errors are those of :func:`build_pipeline_report`.
    """
    links = _links(files, html_path)
    report = _common(run, config, adaptations, command, links, timings, benchmark)
    _write(report, [], schema, json_path, html_path)


def build_index(reports: Sequence[StrPath], html_path: StrPath) -> None:
    """Write the page that compares runs.

    Parameters
    ----------
    reports : sequence of path
        ``report.json`` of each run, with its page ``report.html`` beside it.
    html_path : path
        The page to write, in a folder around all of them.

    Raises
    ------
    ModelFormatError
        If a report is malformed.
    OSError
        If a file cannot be read or written.
    """
    folder = Path(html_path).parent
    linked = [
        (
            Path(path).with_name("report.html").relative_to(folder).as_posix(),
            _read(path),
        )
        for path in reports
    ]
    with replacing(html_path) as temporary:
        temporary.write_text(render_index(linked), encoding="utf-8")


def build_comparison_report(
    *,
    run: str,
    config: Mapping[str, Any],
    command: str,
    files: Sequence[StrPath],
    results: Sequence[StrPath],
    networks: Sequence[StrPath],
    timings: Sequence[StrPath],
    dataset: StrPath,
    benchmark: StrPath,
    schema: StrPath,
    json_path: StrPath,
    html_path: StrPath,
) -> None:
    """Write the report of a run that compares quantised networks.

    Parameters
    ----------
    run, config, command, files, timings, schema, json_path, html_path
        See :func:`build_pipeline_report`.
    results
        What :func:`qcnn_py.training.train_cell` found for each cell, in order.
    networks
        The first replicate's network of each cell.
    dataset
        ``dataset.safetensors`` of the first replicate.
    benchmark
        ``benchmark.json``, what :func:`qcnn_py.benchmarking.race` returned.

    Raises
    ------
    ModelFormatError
        If an artefact is malformed or lacks something the report needs.
    OSError
        If a file cannot be read or written.
    """
    timed = _read(benchmark)
    try:
        environment, contenders = timed.pop("environment"), timed.pop("contenders")
        accuracies = [
            [100 * replicate["top1"] for replicate in _read(path)["replicates"]]
            for path in results
        ]
        cells = [
            _describe_cell(name, config["cells"][name], Network.load(path), path)
            | {
                "top1": _statistics(top1),
                "points_lost": _statistics(np.subtract(accuracies[0], top1)),
                **contenders[name],
            }
            for name, path, top1 in zip(
                config["cells"], networks, accuracies, strict=True
            )
        ]
    except KeyError as error:
        raise ModelFormatError(f"{benchmark} or {results}: lacks {error}") from error
    environment["packages"] |= {name: metadata.version(name) for name in _PACKAGES}
    report = {
        **_head(run, config, command, _links(files, html_path), environment, timings),
        "dataset": _describe_dataset(config, Dataset.load(dataset)),
        "cells": cells,
        "race": timed,
    }
    _write(report, [], schema, json_path, html_path)


def _describe_cell(
    name: str, settings: Mapping[str, Any], network: Network, path: StrPath
) -> dict[str, Any]:
    """Return how a network of a comparison is quantised and what it takes."""
    activations = settings["activations"]
    weight_bits = {"float": 32, "binary": 1, "linear": settings["weight_bits"]}
    bits = {"none": 32, "sign": 1}
    return {
        "name": name,
        "weights": settings["weights"],
        "weight_bits": weight_bits[settings["weights"]],
        "scheme": activations["scheme"],
        "activation_bits": bits.get(activations["scheme"], activations["bits"]),
        "noise": activations["noise"],
        "weight_bytes": sum(layer.bytes for layer in network.layers),
        "parameter_bytes": parameter_bytes(network),
        "file_bytes": Path(path).stat().st_size,
    }


def _describe_dataset(config: Mapping[str, Any], data: Dataset) -> dict[str, Any]:
    return {
        "source": config["dataset"]["source"],
        "input_shape": list(data.input_shape),
        "n_classes": len(data.class_names),
        "n_train": data.size("train"),
        "n_validation": data.size("validation"),
        "n_test": data.size("test"),
    }


def _links(files: Sequence[StrPath], html_path: StrPath) -> list[str]:
    """Return how a page names files below its folder."""
    folder = Path(html_path).parent
    return [Path(file).relative_to(folder).as_posix() for file in files]


def _head(
    run: str,
    config: Mapping[str, Any],
    command: str,
    links: Sequence[str],
    environment: Mapping[str, Any],
    timings: Sequence[StrPath],
) -> dict[str, Any]:
    """Return what the reports of all kinds of run contain."""
    return {
        "format_version": 1,
        "kind": config["kind"],
        "run": run,
        "title": config["report"]["title"] or run,
        "command": command,
        "files": list(links),
        "seed": config["seed"],
        "config": config,
        "environment": environment,
        "stage_seconds": _stage_seconds(timings),
    }


def _common(
    run: str,
    config: Mapping[str, Any],
    adaptations: Mapping[str, str],
    command: str,
    links: Sequence[str],
    timings: Sequence[StrPath],
    benchmark: StrPath,
) -> dict[str, Any]:
    """Return what the reports of runs that quantise a trained network contain."""
    speed = _read(benchmark)
    try:
        environment, layers = speed.pop("environment"), speed.pop("layers")
        parameters = [speed["network"].pop(key) for key in ("dense_bytes", "bytes")]
    except KeyError as error:
        raise ModelFormatError(f"{benchmark}: lacks {error}") from error
    environment["packages"] |= {name: metadata.version(name) for name in _PACKAGES}
    return {
        **_head(run, config, command, links, environment, timings),
        "adaptations": dict(adaptations),
        "size": {"parameters": _sizes(*parameters)},
        "layers": layers,
        "speed": speed,
    }


def _write(
    report: Mapping[str, Any],
    pictures: Sequence[bytes],
    schema: StrPath,
    json_path: StrPath,
    html_path: StrPath,
) -> None:
    """Check the report and write it in both forms."""
    # What the file will hold: no tuples, no NumPy scalars.
    report = json.loads(json.dumps(report))
    validator = jsonschema.Draft202012Validator(_read(schema))
    if (
        error := jsonschema.exceptions.best_match(validator.iter_errors(report))
    ) is not None:
        raise ModelFormatError(f"report, {error.json_path}: {error.message}")
    page = render(report, pictures)
    save_json(json_path, report)
    with replacing(html_path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _read(path: StrPath) -> dict[str, Any]:
    content = load_json(path)
    if not isinstance(content, dict):
        raise ModelFormatError(f"{path}: expected a JSON object")
    return content


def _statistics(values: Iterable[float]) -> dict[str, Any]:
    """Return mean, sample standard deviation (none of a single value) and values."""
    array = np.asarray(list(values), dtype=np.float64)
    return {
        "mean": float(array.mean()),
        "spread": float(array.std(ddof=1)) if len(array) > 1 else None,
        "values": array.tolist(),
    }


def _read_evaluations(paths: Sequence[StrPath]) -> list[list[dict[str, Any]]]:
    """Return the results of each replicate, stage by stage, with the stages' names."""
    replicates = []
    for path in paths:
        try:
            stages = _read(path)["stages"]
            replicates.append(
                [
                    {"name": stage, **{key: stages[stage][key] for key in _EVALUATED}}
                    for stage in _STAGES
                    if stage in stages or stage not in _OPTIONAL_STAGES
                ]
            )
        except KeyError as error:
            raise ModelFormatError(f"{path}: lacks {error}") from error
    return replicates


def _accuracy(replicates: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Collect the accuracies of all replicates, in percent."""

    def percentages(stage: int, measure: str) -> list[float]:
        return [100 * stages[stage][measure] for stages in replicates]

    lost = np.subtract(percentages(0, "top1"), percentages(-1, "top1"))
    return {
        "n_images": [stages[0]["n"] for stages in replicates],
        "stages": [
            {
                "name": stage["name"],
                "top1": _statistics(percentages(index, "top1")),
                "top5": _statistics(percentages(index, "top5")),
            }
            for index, stage in enumerate(replicates[0])
        ],
        "points_lost": _statistics(lost),
    }


def _sizes(before: int, after: int) -> dict[str, float]:
    return {"before": before, "after": after, "compression": before / after}


def _response_errors(artefacts: Sequence[StrPath]) -> dict[str, dict[str, Any]]:
    """Collect the response errors of each quantised layer over the replicates."""
    found: dict[str, list[QuantizedLayer]] = {}
    for path in artefacts:
        artefact = QuantizedLayer.load(path)
        found.setdefault(artefact.layer, []).append(artefact)
    return {
        name: {
            "method": layers[0].settings.method,
            "relative": _statistics(x.metrics.relative_error for x in layers),
            "kmeans_relative": _statistics(
                x.metrics.kmeans_relative_error for x in layers
            ),
            "compared": {
                method: _statistics(x.metrics.compared[method] for x in layers)
                for method in layers[0].metrics.compared
            },
        }
        for name, layers in found.items()
    }


def _stage_seconds(timings: Sequence[StrPath]) -> list[dict[str, Any]]:
    """Collect the duration of each stage, in the order of the files."""
    seconds: dict[str, list[float]] = {}
    for path in timings:
        with Path(path).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        try:
            duration = sum(float(row["s"]) for row in rows)
        except (KeyError, TypeError, ValueError) as error:
            raise ModelFormatError(
                f"{path}: expected a table with seconds in column 's', got {error!r}"
            ) from error
        seconds.setdefault(unquote(Path(path).stem), []).append(duration)
    return [
        {"name": name, "seconds": _statistics(values)}
        for name, values in seconds.items()
    ]


def _choose(changed: npt.NDArray[np.bool_], count: int, seed: int) -> list[int]:
    """Draw test images, up to half of them with another prediction than before."""
    drawn = np.random.default_rng(seed).permutation(len(changed))
    with_change = drawn[changed[drawn]][: count // 2]
    others = drawn[~changed[drawn]][: count - len(with_change)]
    return [int(index) for index in (*with_change, *others)]


def _classify(
    dataset: Dataset, original: Network, final: Network, indices: Sequence[int]
) -> list[dict[str, Any]]:
    """Return label and predictions, before and after, of some test images."""
    if not indices:
        return []
    split = dataset.splits["test"]
    images = dataset.preprocessing.normalize(split.images[indices])
    before, after = (_probabilities(network, images) for network in (original, final))
    return [
        {
            "index": index,
            "changed": bool(before[row].argmax() != after[row].argmax()),
            "label": dataset.class_names[split.labels[index]],
            "before": _top(before[row], dataset.class_names),
            "after": _top(after[row], dataset.class_names),
        }
        for row, index in enumerate(indices)
    ]


def _probabilities(
    network: Network, images: npt.NDArray[np.float32]
) -> npt.NDArray[np.float64]:
    responses = network.compile()(images).reshape(len(images), -1)
    outputs: npt.NDArray[np.float64] = responses.astype(np.float64)
    if network.final_softmax is not None:
        return outputs
    outputs = np.exp(outputs - outputs.max(axis=1, keepdims=True))
    outputs /= outputs.sum(axis=1, keepdims=True)
    return outputs


def _top(
    probabilities: npt.NDArray[np.float64], class_names: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the three most probable classes, at least 1 % each after the first."""
    best = np.argsort(-probabilities, kind="stable")[:3]
    return [
        # A float32 softmax may round a certainty to a little more than one.
        {
            "class": class_names[index],
            "probability": min(float(probabilities[index]), 1.0),
        }
        for rank, index in enumerate(best)
        if rank == 0 or probabilities[index] >= 0.01
    ]


def _png(dataset: Dataset, index: int) -> bytes:
    """Return a test image as a PNG file."""
    pixels = dataset.splits["test"].images[index]
    if pixels.dtype != np.uint8:
        low, high = float(pixels.min()), float(pixels.max())
        pixels = ((pixels - low) / max(high - low, 1e-12) * 255).astype(np.uint8)
    if dataset.preprocessing.channel_order == "bgr":
        pixels = pixels[::-1]
    # Channels that are no colours cannot be shown together; the first stands for all.
    shown = pixels.transpose(1, 2, 0) if len(pixels) == 3 else pixels[0]
    image = Image.fromarray(np.ascontiguousarray(shown))
    image.thumbnail((_PICTURE_SIZE, _PICTURE_SIZE))
    buffer = io.BytesIO()
    image.save(buffer, format="png", optimize=True)
    return buffer.getvalue()
