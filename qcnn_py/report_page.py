"""``report.html``: the numbers of ``report.json`` in words, figures and tables.

The page is one file. It needs no script, no network and no font of its own, follows the
reader's light or dark setting and prints.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import yaml
from markupsafe import Markup

from qcnn_py import report_figures as figures

_ASSETS = Path(__file__).parent / "report_assets"

# Layers that the summary compares; the sections show all.
_BLAMED_LAYERS = 4

# Percentage points whose loss nobody minds.
_NEXT_TO_NOTHING = 0.1

# Letters of a layer's name in a chart, beside the numbers on the right.
_LONGEST_NAME = 18

_NBSP = "\N{NO-BREAK SPACE}"
_TIMES = "\N{MULTIPLICATION SIGN}"
_PRIME = "\N{PRIME}"
_MINUS = "\N{MINUS SIGN}"
_ARROW = f"{_NBSP}\N{RIGHTWARDS ARROW}{_NBSP}"

_SPREAD = ("minimum", "lower_quartile", "upper_quartile", "mean", "maximum")

_STAGE_LABELS = {
    "original": ("original", "original"),
    "activations_quantized": ("activations quantised", "inputs\nrounded"),
    "conv_quantized": ("convolutions quantised", "conv\nquantised"),
    "finetuned": ("fully connected layers fine-tuned", "fine-\ntuned"),
    "requantized": ("everything quantised", "all\nquantised"),
    "final": ("everything quantised", "all\nquantised"),
}

# Of the finished model, if it was distilled.
_DISTILLED_LABEL = ("codebooks distilled", "distilled")

_RULE_LABELS = {
    "prepare_dataset": "read and split the images",
    "prepare_network": "train or read the network",
    "draw_network": "draw the network",
    "quantize_activations": "quantise activations",
    "train_cell": "train",
    "race_cells": "speed test",
    "quantize_conv_layer": "quantise",
    "extract_features": "compute features",
    "finetune_fc": "fine-tune",
    "requantize_fc_layer": "quantise",
    "distill_codebooks": "distil",
    "evaluate_models": "evaluate",
    "benchmark_model": "speed test",
}

Key = tuple[str, str]
"""Class of a colour swatch (``before``, ``after``, ``other``) and its meaning."""


@dataclass(frozen=True)
class Chart:
    """A drawing with its key and caption."""

    svg: Markup
    caption: str
    key: Sequence[Key] = ()


@dataclass(frozen=True)
class Table:
    """Numbers, shown at once or behind a chart; the first column names the rows."""

    summary: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    shown: bool = False


@dataclass(frozen=True)
class Section:
    """A finding: heading, explanation, charts, tables."""

    name: str
    heading: str
    paragraphs: Sequence[str]
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Card:
    """One of the leading answers."""

    question: str
    answer: str
    svg: Markup
    note: str


@dataclass(frozen=True)
class Example:
    """A test image and what the network said before and after."""

    picture: str
    pixelated: bool
    label: str
    changed: bool
    predictions: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]


def render(report: Mapping[str, Any], pictures: Sequence[bytes]) -> str:
    """Return the page of a report.

    Parameters
    ----------
    report : mapping
        Content of ``report.json``, valid by its schema.
    pictures : sequence of bytes
        A PNG file for each of the report's example images.

    Returns
    -------
    str
        An HTML document; equal arguments give equal text.
    """
    match report["kind"]:
        case "pipeline":
            lede, cards = _pipeline_lede(report), _pipeline_cards(report)
            sections = _pipeline_sections(report)
        case "speed":
            lede, cards = _speed_lede(report), _speed_cards(report)
            sections = _speed_sections(report)
        case _:
            lede, cards = _comparison_lede(report), _comparison_cards(report)
            sections = [_cells_section(report)]
    pipeline = report["kind"] == "pipeline"
    return _fill(
        "report.html.j2",
        report=report,
        headline=_headline(report),
        lede=lede,
        cards=cards,
        sections=sections,
        examples_heading=_examples_heading(report) if pipeline else None,
        examples=_examples(report, pictures) if pipeline else [],
        durations=_durations_section(report),
        facts=_facts(report),
        config=yaml.safe_dump(
            dict(report["config"]), sort_keys=False, allow_unicode=True, width=72
        ),
    )


def _fill(template: str, **values: Any) -> str:
    """Return a page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_ASSETS),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    style = Markup((_ASSETS / "report.css").read_text(encoding="utf-8"))
    return environment.get_template(template).render(style=style, **values)


# Numbers in words.


def _number(value: float, digits: int = 3) -> str:
    """Write a number with a number of significant digits, never as a power of ten."""
    if value == 0:
        return "0"
    text = f"{float(f'{value:.{digits}g}'):,.10f}".rstrip("0").rstrip(".")
    # Trailing zeros that were significant.
    shown = sum(c.isdigit() for c in text.lstrip("-0."))
    if shown < digits and abs(value) < 10 ** (digits - 1):
        text += ("" if "." in text else ".") + "0" * (digits - shown)
    return text.replace("-", _MINUS)


def _times(value: float) -> str:
    return f"{_number(value)}{_TIMES}"


def _faster(contender: Mapping[str, Any]) -> tuple[str, str]:
    """Return how a contender compares with dense; no verdict inside the spread."""
    speedup: float = contender["speedup"]
    if abs(speedup - 1) <= (contender["speedup_spread"] or 0):
        return "equally", "fast"
    if speedup < 1:
        return _times(1 / speedup), "slower"
    return _times(speedup), "faster"


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{_number(count / size)}{_NBSP}{unit}"
    return f"{count:.0f}{_NBSP}bytes"


def _milliseconds(value: float) -> str:
    if value < 0.1:
        return f"{_number(value * 1000)}{_NBSP}µs"
    return f"{_number(value)}{_NBSP}ms"


def _seconds(value: float) -> str:
    if value < 60:
        return f"{value:.1f}{_NBSP}s"
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes}{_NBSP}min {seconds}{_NBSP}s"


def _percent(share: float) -> str:
    return f"{_number(100 * share, 2)}{_NBSP}%"


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", _MINUS)


def _mean_spread(statistics: Mapping[str, Any], decimals: int = 2) -> str:
    mean = f"{statistics['mean']:.{decimals}f}".replace("-", _MINUS)
    if statistics["spread"] is None:
        return mean
    return f"{mean}{_NBSP}±{_NBSP}{statistics['spread']:.{decimals}f}"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


# What leads the page.


def _headline(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return class, number and noun of each part of the heading."""
    if report["kind"] == "activations":
        first, smallest = report["cells"][0], _smallest(report)
        return [
            ("win", _times(_smaller(first, smallest)), "smaller"),
            ("cost", *_lost(smallest["points_lost"]["mean"])),
        ]
    size = report["size"].get("file", report["size"]["parameters"])
    speed = _faster(_compared(report)[1])
    parts = [("win", _times(size["compression"]), "smaller"), ("win", *speed)]
    if report["kind"] == "pipeline":
        parts.append(("cost", *_lost(report["accuracy"]["points_lost"]["mean"])))
    return parts


def _lost(points: float) -> tuple[str, str]:
    if abs(points) < 0.005:
        return "no", "accuracy lost"
    change = "lost" if points > 0 else "gained"
    return f"{abs(points):.2f}{_NBSP}points", f"of accuracy {change}"


def _compared(report: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return the contenders that the page is about: dense and the first quantised."""
    dense, quantized, *_ = report["speed"]["contenders"]
    return dense, quantized


def _pipeline_lede(report: Mapping[str, Any]) -> str:
    data = report["dataset"]
    n_images = report["accuracy"]["n_images"]
    tested = f"tested on {sum(n_images):,} images"
    if len(n_images) > 1:
        tested += f" in {len(n_images)} replicates"
    n_layers = len(report["layers"])
    n_quantized = sum(layer["quantized"] for layer in report["layers"])
    which = "all" if n_quantized == n_layers else f"{n_quantized} of"
    return (
        f"A network for the {data['n_classes']} classes of “{data['source']}”, "
        f"{which} its {_plural(n_layers, 'layer')} product-quantised, {tested}."
    )


def _speed_lede(report: Mapping[str, Any]) -> str:
    network = report["speed"]["network"]
    shape = _TIMES.join(map(str, network["input_shape"]))
    lede = f"{network['architecture'] or 'A network'} on inputs of {shape}."
    if network["parameters_drawn"]:
        lede += (
            " Its parameters and codes are drawn at random: the times are real, "
            "what it computes means nothing."
        )
    return lede


def _pipeline_cards(report: Mapping[str, Any]) -> list[Card]:
    accuracy = report["accuracy"]
    lost = accuracy["points_lost"]
    first, *_, last = (stage["top1"]["mean"] for stage in accuracy["stages"])
    note = f"Top-1 accuracy {first:.2f}{_ARROW}{last:.2f}{_NBSP}%"
    if lost["spread"] is not None:
        note += f"; {len(lost['values'])} replicates: {_mean_spread(lost)}"
    cost = Card(
        "What did it cost?",
        " ".join(_lost(lost["mean"])),
        Markup(
            figures.loss_strip(
                lost["values"], name="cost", title="Points of accuracy lost"
            )
        ),
        f"{note}.",
    )
    return [cost, _win_card(report), _blame_for_errors(report)]


def _win_card(report: Mapping[str, Any]) -> Card:
    file = report["size"].get("file")
    size = file or report["size"]["parameters"]
    before, after = _compared(report)
    speed = " ".join(_faster(after))
    drawing = figures.gains(
        (size["before"], size["after"], _bytes(size["before"]), _bytes(size["after"])),
        (
            before["average_ms"],
            after["average_ms"],
            _milliseconds(before["average_ms"]),
            _milliseconds(after["average_ms"]),
        ),
        name="win",
        title="Size and time before and after",
    )
    return Card(
        "What did it win?",
        f"{_times(size['compression'])} smaller, {speed}",
        Markup(drawing),
        f"Area: {'file' if file else 'parameters'}. Length: time per image.",
    )


def _blame_for_errors(report: Mapping[str, Any]) -> Card:
    layers = sorted(
        _layers_with_errors(report),
        key=lambda layer: -_error(layer)["relative"]["mean"],
    )
    rows = [
        (layer["name"], mean, _percent(mean))
        for layer in layers
        for mean in [_error(layer)["relative"]["mean"]]
    ]
    return _blame_card(
        rows, "How far each layer's response is off", "No layer was quantised."
    )


def _blame_card(
    rows: Sequence[tuple[str, float, str]], measure: str, otherwise: str
) -> Card:
    """Return the card that names the first of the layers, the worst first."""
    question = "Which layer is to blame?"
    if not rows:
        return Card(question, "none", Markup(""), otherwise)
    shown = [(_short(name), value, text) for name, value, text in rows]
    drawing = figures.ranking(
        shown[:_BLAMED_LAYERS], figures.OTHER, name="blame", title=measure
    )
    return Card(question, rows[0][0], Markup(drawing), f"{measure}.")


def _short(name: str) -> str:
    """Return the end of a name, as much of it as fits into a chart.

    Other tools name layers by whole paths, and runs get a suffix: ends differ most.
    """
    if len(name) <= _LONGEST_NAME:
        return name
    return f"\N{HORIZONTAL ELLIPSIS}{name[1 - _LONGEST_NAME :]}"


def _layers_with_errors(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [layer for layer in report["layers"] if layer["response_error"] is not None]


def _error(layer: Mapping[str, Any]) -> Mapping[str, Any]:
    error: Mapping[str, Any] = layer["response_error"]
    return error


def _speed_cards(report: Mapping[str, Any]) -> list[Card]:
    measured = _compared(report)[1]["speedup"]
    theoretical = report["speed"]["operations"]["theoretical_speedup"]
    rows = [("promised", theoretical), ("measured", measured)]
    if (published := report["speed"]["published"]) is not None:
        rows.append(("published, measured", published["speedup"]))
    promise = Card(
        "What was promised?",
        f"{_times(theoretical)} fewer operations",
        Markup(
            figures.ranking(
                [(label, value, _times(value)) for label, value in rows],
                figures.AFTER,
                name="promise",
                title="Speed-up, promised and measured",
            )
        ),
        f"{_operations(report)} operations per image, counted as the paper does.",
    )
    quantized = [layer for layer in report["layers"] if layer["quantized"]]
    blamed = [
        (
            layer["name"],
            _excess_ms(layer),
            f"{_milliseconds(layer['ms'])} for {_milliseconds(_promised_ms(layer))}",
        )
        for layer in sorted(quantized, key=_excess_ms, reverse=True)
        if _excess_ms(layer) > 0
    ]
    blame = _blame_card(
        blamed,
        "Time taken beyond what the operation count promises",
        "Every layer keeps what its operation count promises.",
    )
    return [_win_card(report), promise, blame]


def _promised_ms(layer: Mapping[str, Any]) -> float:
    return float(layer["dense_ms"] / layer["theoretical_speedup"])


def _excess_ms(layer: Mapping[str, Any]) -> float:
    return float(layer["ms"] - _promised_ms(layer))


def _operations(report: Mapping[str, Any]) -> str:
    counts = report["speed"]["operations"]
    return f"{_count(counts['dense'])}{_ARROW}{_count(counts['quantized'])}"


def _count(operations: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if operations >= size:
            return f"{_number(operations / size, 4)}{_NBSP}{unit}"
    return f"{operations:.0f}"


# The findings.


def _pipeline_sections(report: Mapping[str, Any]) -> list[Section]:
    return [
        _accuracy_section(report),
        _size_section(report),
        *_response_sections(report),
        *_finetuning_sections(report),
        *_distillation_sections(report),
        _speed_section(report),
        _layer_speed_section(report),
        *_next_sections(report),
    ]


def _speed_sections(report: Mapping[str, Any]) -> list[Section]:
    return [
        _speed_section(report),
        _layer_speed_section(report),
        _size_section(report),
    ]


def _accuracy_section(report: Mapping[str, Any]) -> Section:
    accuracy = report["accuracy"]
    stages = accuracy["stages"]
    means = [stage["top1"]["mean"] for stage in stages]
    conv, finetuning, fc, *distillation = (b - a for a, b in pairwise(means))
    if conv < -0.005 and finetuning >= -conv:
        heading = "Fine-tuning won back all that the convolutions cost"
    elif conv < -0.005 and finetuning > 0.005:
        heading = (
            f"Fine-tuning won back {finetuning:.2f} of the {-conv:.2f} points "
            "that the convolutions cost"
        )
    else:
        heading = (
            f"{' '.join(_lost(means[0] - means[-1]))} from end to end".capitalize()
        )
    words = [
        "Top-1 accuracy changed by "
        f"{_signed(conv)} points when the convolutions were quantised, "
        f"{_signed(finetuning)} when the fully connected layers were fine-tuned and "
        f"{_signed(fc)} when they were quantised too."
    ]
    words += [
        f"Distillation of the original's outputs changed it by {_signed(change)}."
        for change in distillation
    ]
    n_replicates = len(accuracy["n_images"])
    caption = "Top-1 accuracy in percent after each stage"
    if n_replicates > 1:
        words.append(
            f"Each of the {n_replicates} thin lines is a replicate with a seed and "
            "test images of its own; the bold line is their mean."
        )
        caption += f": mean of {n_replicates} replicates, and each of them"
    labels = [_STAGE_LABELS[stage["name"]] for stage in stages]
    if distillation:
        labels[-1] = _DISTILLED_LABEL
    drawing = figures.stages(
        [short for _, short in labels],
        [stage["top1"]["values"] for stage in stages],
        name="accuracy",
        title="Top-1 accuracy after each stage",
        description="; ".join(
            f"{label}: {_mean_spread(stage['top1'])} %"
            for (label, _), stage in zip(labels, stages, strict=True)
        ),
    )
    tables = [
        Table(
            "Mean and spread",
            ["stage", "top-1 %", "top-5 %"],
            [
                [label, _mean_spread(stage["top1"]), _mean_spread(stage["top5"])]
                for (label, _), stage in zip(labels, stages, strict=True)
            ],
        ),
        Table(
            "Every replicate",
            [
                "replicate",
                *(s.replace("-\n", "-") for _, s in labels),
                "lost",
            ],
            [
                [
                    str(index),
                    *(f"{stage['top1']['values'][index]:.2f}" for stage in stages),
                    f"{accuracy['points_lost']['values'][index]:.2f}".replace(
                        "-", _MINUS
                    ),
                ]
                for index in range(n_replicates)
            ],
        ),
    ]
    return Section(
        "accuracy", heading, words, [Chart(Markup(drawing), f"{caption}.")], tables
    )


def _size_section(report: Mapping[str, Any]) -> Section:
    layers = report["layers"]
    total = sum(layer["dense_bytes"] for layer in layers)
    largest = max(layers, key=lambda layer: layer["dense_bytes"])
    after = max(layers, key=lambda layer: layer["bytes"])
    heading = (
        f"{largest['name']} held {_share(largest['dense_bytes'], total)} of the bytes "
        f"and became {_times(largest['compression'])} smaller"
    )
    parameters = report["size"]["parameters"]
    words = [
        f"All parameters together: {_bytes(parameters['before'])}{_ARROW}"
        f"{_bytes(parameters['after'])}, {_times(parameters['compression'])}."
    ]
    if "file" in report["size"]:
        file = report["size"]["file"]
        words[0] += (
            f" The file, with the graph and all: {_bytes(file['before'])}{_ARROW}"
            f"{_bytes(file['after'])}, {_times(file['compression'])}."
        )
    words.append(
        f"What is left is mostly {after['name']}: "
        f"{_share(after['bytes'], sum(layer['bytes'] for layer in layers))}."
    )
    drawing = figures.paired_bars(
        [
            figures.Bar(
                _short(layer["name"]),
                layer["dense_bytes"],
                layer["bytes"],
                f"{_bytes(layer['dense_bytes'])}{_ARROW}{_bytes(layer['bytes'])}",
                _times(layer["compression"]),
            )
            for layer in layers
        ],
        name="size",
        title="Bytes of each layer before and after",
    )
    table = Table(
        "Codebooks and bytes",
        ["layer", f"C{_PRIME}/K", "codebook bits", "before", "after", "smaller"],
        [
            [
                layer["name"],
                _codebook(layer),
                layer["codebook_bits"] or "",
                f"{layer['dense_bytes']:,}",
                f"{layer['bytes']:,}",
                _times(layer["compression"]),
            ]
            for layer in layers
        ],
    )
    caption = (
        "Bytes of each layer on one linear scale; biases and codebooks are counted in."
    )
    key = [("before", "dense float32"), ("after", "as stored")]
    return Section(
        "size", heading, words, [Chart(Markup(drawing), caption, key)], [table]
    )


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f}{_NBSP}%"


def _codebook(layer: Mapping[str, Any]) -> str:
    if not layer["quantized"]:
        return "dense"
    sizes = f"{layer['subvector_dim']}/{layer['n_centroids']}"
    sets = layer["codebook_sets"]
    return sizes if sets == 1 else f"{sizes}, {sets}{_NBSP}sets"


def _response_sections(report: Mapping[str, Any]) -> list[Section]:
    layers = _layers_with_errors(report)
    if not layers:
        return []
    # A layer that k-means alone has quantised says nothing about error correction.
    corrected = [layer for layer in layers if _error(layer)["method"] != "kmeans"]
    better = [
        layer
        for layer in corrected
        if _error(layer)["relative"]["mean"] < _error(layer)["kmeans_relative"]["mean"]
    ]
    where = (
        "every layer"
        if len(better) == len(layers)
        else (f"{len(better)} of {len(layers)} layers")
    )
    heading = (
        f"Error correction beats plain k-means on {where}"
        if corrected
        else "The layers are quantised by plain k-means"
    )
    rows = [
        figures.Errors(
            _short(layer["name"]),
            f"{_percent(_error(layer)['relative']['mean'])} against "
            f"{_percent(_error(layer)['kmeans_relative']['mean'])}",
            _error(layer)["relative"]["values"],
            _error(layer)["kmeans_relative"]["values"],
        )
        for layer in layers
    ]
    drawing = figures.response_errors(
        rows, name="response", title="Response error of each layer"
    )
    table = Table(
        "Errors in percent",
        ["layer", "method", "as stored", "k-means"],
        [
            [
                layer["name"],
                _error(layer)["method"],
                *(
                    _mean_spread(_hundredfold(_error(layer)[measure]), 3)
                    for measure in ("relative", "kmeans_relative")
                ),
            ]
            for layer in layers
        ],
    )
    compared = [layer for layer in layers if _error(layer)["compared"]]
    tables = [table]
    if compared:
        methods = list(_error(compared[0])["compared"])
        tables.append(
            Table(
                "The methods at the same place, errors in percent",
                ["layer", *methods],
                [
                    [
                        layer["name"],
                        *(
                            _mean_spread(_hundredfold(error), 3)
                            for error in _error(layer)["compared"].values()
                        ),
                    ]
                    for layer in compared
                ],
            )
        )
    adapted = "; ".join(
        f"{name} {what}" for name, what in report["adaptations"].items()
    )
    return [
        Section(
            "response",
            heading,
            [
                "A layer's response is what it puts out before its activation. Its "
                "error is measured against the unquantised layer's response on "
                "calibration images, with inputs that come from the already quantised "
                "layers before it.",
                "Plain k-means keeps the weights; error correction keeps the response.",
                *([f"The preset was adapted: {adapted}."] if adapted else []),
            ],
            [
                Chart(
                    Markup(drawing),
                    "Relative error of the response, on a logarithmic scale; "
                    "small marks are replicates.",
                    [("after", "as stored"), ("other diamond", "plain k-means")],
                )
            ],
            tables,
        )
    ]


def _hundredfold(statistics: Mapping[str, Any]) -> dict[str, Any]:
    spread = statistics["spread"]
    return {
        "mean": 100 * statistics["mean"],
        "spread": None if spread is None else 100 * spread,
    }


def _finetuning_sections(report: Mapping[str, Any]) -> list[Section]:
    return _training_sections(
        report["finetuning"],
        name="finetuning",
        subject="Fine-tuning",
        title="Fine-tuning of the fully connected layers",
        loss="Cross-entropy",
        watched="validation",
        words="The convolutions stay as they were quantised; the fully connected "
        "layers learn to live with what those put out. Epoch 0 is before the "
        "first step.",
    )


def _distillation_sections(report: Mapping[str, Any]) -> list[Section]:
    return _training_sections(
        report["distillation"],
        name="distillation",
        subject="Distillation",
        title="Distillation of the original's outputs",
        loss="Divergence from the original",
        watched="held-out",
        words="Codes stay as they are; codebooks and biases learn, without labels, to "
        "give back what the original network puts out. The held-out images only "
        "choose the epoch to keep; epoch 0 is before the first step.",
    )


def _training_sections(
    histories: Sequence[Mapping[str, Any]],
    *,
    name: str,
    subject: str,
    title: str,
    loss: str,
    watched: str,
    words: str,
) -> list[Section]:
    histories = [each for each in histories if each["epochs"]]
    if not histories:
        return []

    training = [
        figures.Curve(1, _column(each["epochs"], "train_loss"), -1, figures.BEFORE)
        for each in histories
    ]
    panels = [(loss, training)]
    key = [("before", "training images")]
    validated = all(each["initial"] for each in histories)

    def watched_curves(measure: str, factor: float) -> list[figures.Curve]:
        return [
            figures.Curve(
                0,
                [
                    factor * value
                    for value in _column([each["initial"], *each["epochs"]], measure)
                ],
                each["best_epoch"],
                figures.AFTER,
            )
            for each in histories
        ]

    if validated:
        key.append(("after", f"{watched} images"))
        training += watched_curves("validation_loss", 1)
        if "validation_accuracy" in histories[0]["initial"]:
            accuracies = watched_curves("validation_accuracy", 100)
            panels.append(("Accuracy in percent", accuracies))
    best = sorted(each["best_epoch"] for each in histories)
    kept = f"{best[0]}" if best[0] == best[-1] else f"{best[0]} to {best[-1]}"
    drawing = figures.curves(
        panels,
        name=name,
        title=title,
        description=f"{loss} by epoch; parameters kept from epoch {kept}.",
    )
    header = ["replicate", "epochs", "kept", "last training loss"]
    rows = [
        [
            str(index),
            str(len(each["epochs"])),
            str(each["best_epoch"]),
            f"{each['epochs'][-1]['train_loss']:.4f}",
        ]
        for index, each in enumerate(histories)
    ]
    if validated:
        header += [f"{watched} loss before", "kept"]
        for row, each in zip(rows, histories, strict=True):
            values = _column([each["initial"], *each["epochs"]], "validation_loss")
            row += [f"{values[epoch]:.4f}" for epoch in (0, each["best_epoch"])]
    caption = "A line for each replicate"
    caption += "; the dot is what was kept." if validated else "."
    return [
        Section(
            name,
            f"{subject} kept the parameters of epoch {kept}",
            [words],
            [Chart(Markup(drawing), caption, key)],
            [Table("Every replicate", header, rows)],
        )
    ]


def _column(entries: Sequence[Mapping[str, float]], measure: str) -> list[float]:
    return [entry[measure] for entry in entries]


def _speed_section(report: Mapping[str, Any]) -> Section:
    speed = report["speed"]
    settings, contenders = speed["settings"], speed["contenders"]
    quantized = _compared(report)[1]
    peers = contenders[1 + len(settings["precisions"]) :]
    theoretical = speed["operations"]["theoretical_speedup"]
    images = (
        "single images"
        if settings["batch_size"] == 1
        else (f"batches of {settings['batch_size']} images")
    )
    words = [
        f"Operation counts promise {_times(theoretical)} ({_operations(report)}); "
        f"measured: {_times(quantized['speedup'])}.",
        f"{_plural(settings['repeats'], 'repeat')} of {settings['batches']} {images}, "
        f"{_plural(settings['threads'], 'thread')} on {report['environment']['cpu']} "
        f"({settings['isa']}, {settings['precisions'][0]} precision). The contenders "
        "take turns in short rounds; each repeat counts with its median.",
    ]
    if peers:
        compared = ", ".join(
            f"{_times(quantized['ratios'][peer['name']]['median'])} "
            f"{peer['description']}"
            for peer in peers
        )
        words.append(
            "Other engines run the same network with dense weights. Measured round by "
            f"round, the quantised one is as fast as {compared}."
        )
    if (published := speed["published"]) is not None:
        words.append(
            f"The authors of the paper count {published['theoretical_speedup']:.2f}"
            f"{_TIMES} and measured {published['speedup']:.2f}{_TIMES}: "
            f"{published['dense_ms']:.1f}{_ARROW}{published['quantized_ms']:.1f}"
            f"{_NBSP}ms against {published['baseline']} on an {published['cpu']}."
        )
    colors = [
        figures.BEFORE,
        *[figures.AFTER] * len(settings["precisions"]),
        *[figures.OTHER] * len(peers),
    ]
    drawing = figures.speed(
        [
            figures.Timing(
                each["description"],
                _average_text(each),
                each["average_ms"],
                [
                    tuple(
                        repeat[key]
                        for key in ("lower_quartile", "median", "upper_quartile")
                    )
                    for repeat in each["repeats"]
                ],
                color,
            )
            for each, color in zip(contenders, colors, strict=True)
        ],
        name="speed",
        title="Time per image",
    )
    medians = [[repeat["median"] for repeat in each["repeats"]] for each in contenders]
    rows = [
        [
            str(index + 1),
            *(_number(of_contender[index], 4) for of_contender in medians),
            _times(medians[0][index] / medians[1][index]),
        ]
        for index in range(settings["repeats"])
    ]
    rows.append(
        [
            "average",
            *(_number(each["average_ms"], 4) for each in contenders),
            _times(quantized["speedup"]),
        ]
    )
    rows.append(["theoretical", *[""] * len(contenders), _times(theoretical)])
    if published is not None:
        rows.append(
            [
                "published",
                _number(published["dense_ms"], 6),
                _number(published["quantized_ms"], 5),
                *[""] * (len(contenders) - 2),
                _times(published["speedup"]),
            ]
        )
    tables = [
        Table(
            "Milliseconds per image, every repeat",
            ["repeat", *(each["name"] for each in contenders), "speed-up"],
            rows,
        ),
        Table(
            "Spread of single batches, in milliseconds",
            ["repeat", "min", f"25{_NBSP}%", f"75{_NBSP}%", "mean", "max"],
            [
                [
                    f"{each['name']}{_NBSP}{index + 1}",
                    *(_number(repeat[key]) for key in _SPREAD),
                ]
                for each in contenders
                for index, repeat in enumerate(each["repeats"])
            ],
        ),
        Table(
            "How many times as fast as each other, median and middle half of the "
            "rounds",
            ["contender", *(f"as {each['name']}" for each in contenders)],
            [
                [
                    each["name"],
                    *(
                        _ratio(each["ratios"].get(other["name"]))
                        for other in contenders
                    ),
                ]
                for each in contenders
            ],
        ),
        Table(
            "Distance of the output from that of dense, relative L2",
            ["contender", "runs", "distance"],
            [
                [each["name"], each["description"], f"{each['relative_error']:.1e}"]
                for each in contenders
            ],
        ),
    ]
    caption = (
        "Average time per image. Below each bar, a line per repeat: median and middle "
        "half of its batches."
    )
    verdict = " ".join(_faster(quantized))
    return Section(
        "speed",
        f"{verdict[:1].upper()}{verdict[1:]}, "
        f"where operation counts promise {_times(theoretical)}",
        words,
        [Chart(Markup(drawing), caption)],
        tables,
    )


def _ratio(ratio: Mapping[str, float] | None) -> str:
    if ratio is None:
        return ""
    low, high = (_number(ratio[f"{part}_quartile"]) for part in ("lower", "upper"))
    return f"{_times(ratio['median'])} ({low} to {high})"


def _average_text(contender: Mapping[str, Any]) -> str:
    text = _milliseconds(contender["average_ms"])
    if contender["spread_ms"] is not None:
        text += f" ± {_share(contender['spread_ms'], contender['average_ms'])}"
    return text


def _layer_speed_section(report: Mapping[str, Any]) -> Section:
    layers = report["layers"]
    quantized = [layer for layer in layers if layer["quantized"]] or layers
    worst = max(quantized, key=_excess_ms)
    slowest = max(layers, key=lambda layer: layer["ms"])
    if _excess_ms(worst) > 0:
        heading = f"{worst['name']} falls furthest short of its promise"
    else:
        heading = "Every layer keeps what its operation count promises"
    words = [
        f"{slowest['name']} takes most of the time: "
        f"{_share(slowest['ms'], sum(layer['ms'] for layer in layers))} of the sum.",
        "Each layer is timed alone, on its real input. It finds its weights in the "
        "caches more often than inside the network, so these times do not add up to "
        "the network's.",
    ]
    times = figures.paired_bars(
        [
            figures.Bar(
                _short(layer["name"]),
                layer["dense_ms"],
                layer["ms"],
                f"{_milliseconds(layer['dense_ms'])}{_ARROW}{_milliseconds(layer['ms'])}",
                _times(layer["speedup"]),
            )
            for layer in layers
        ],
        name="layer-times",
        title="Time of each layer alone",
    )
    promises = figures.promises(
        [
            figures.Promise(
                _short(layer["name"]),
                layer["speedup"],
                layer["theoretical_speedup"],
                f"{_times(layer['speedup'])} of {_times(layer['theoretical_speedup'])}",
            )
            for layer in layers
        ],
        name="promises",
        title="Measured and theoretical speed-up of each layer",
    )
    table = Table(
        "Operations and kernels",
        ["layer", "dense", "quantised", "fewer", "dense kernel", "kernel"],
        [
            [
                layer["name"],
                _count(layer["dense_operations"]),
                _count(layer["operations"]),
                _times(layer["theoretical_speedup"]),
                layer["dense_kernel"],
                layer["kernel"],
            ]
            for layer in layers
        ],
    )
    return Section(
        "layers",
        heading,
        words,
        [
            Chart(
                Markup(promises),
                "Speed-up of each layer, measured and by operation count.",
                [("after", "measured"), ("mark", "theoretical")],
            ),
            Chart(
                Markup(times),
                "Time of each layer alone, on one linear scale.",
                [("before", "dense float32"), ("after", "quantised")],
            ),
        ],
        [table],
    )


def _durations_section(report: Mapping[str, Any]) -> Section | None:
    stages = report["stage_seconds"]
    if not stages:
        return None
    rows = []
    for stage in stages:
        seconds = stage["seconds"]
        text = _seconds(seconds["mean"])
        if (count := len(seconds["values"])) > 1:
            text = f"{count} {_TIMES} {text}"
        rows.append((_stage_label(stage["name"]), sum(seconds["values"]), text))
    total = sum(value for _, value, _ in rows)
    longest = max(rows, key=lambda row: row[1])
    drawing = figures.bars(rows, name="durations", title="Time of each stage")
    return Section(
        "durations",
        f"The whole chain took {_seconds(total)}",
        [
            f"The longest stage: {longest[0]}, {_share(longest[1], total)}. Whole "
            "processes, with the time it takes to start them."
        ],
        [Chart(Markup(drawing), "Time of each stage; bars add up its replicates.")],
    )


def _stage_label(name: str) -> str:
    rule, _, layer = name.partition(".")
    label = _RULE_LABELS.get(rule, rule.replace("_", " "))
    return f"{label} {_short(layer)}".strip()


# Networks that are compared.


def _smallest(report: Mapping[str, Any]) -> Mapping[str, Any]:
    cell: Mapping[str, Any] = min(report["cells"], key=lambda x: x["parameter_bytes"])
    return cell


def _smaller(first: Mapping[str, Any], cell: Mapping[str, Any]) -> float:
    return float(first["parameter_bytes"] / cell["parameter_bytes"])


def _comparison_lede(report: Mapping[str, Any]) -> str:
    data, cells = report["dataset"], report["cells"]
    replicates = len(cells[0]["top1"]["values"])
    return (
        f"A network for the {data['n_classes']} classes of “{data['source']}”, trained "
        f"from scratch in {len(cells)} ways, {_plural(replicates, 'time')} each. The "
        f"smallest, {_smallest(report)['name']}, compared with {cells[0]['name']}."
    )


def _comparison_cards(report: Mapping[str, Any]) -> list[Card]:
    first, *others = report["cells"]
    smallest = _smallest(report)
    lost = smallest["points_lost"]
    cost = Card(
        "What did it cost?",
        " ".join(_lost(lost["mean"])),
        Markup(
            figures.loss_strip(
                lost["values"], name="cost", title="Points of accuracy lost"
            )
        ),
        f"{smallest['name']}: {_mean_spread(smallest['top1'])}{_NBSP}%, "
        f"{first['name']}: {_mean_spread(first['top1'])}{_NBSP}%.",
    )
    times = [cell["milliseconds"]["median"] for cell in (first, smallest)]
    sizes = [cell["parameter_bytes"] for cell in (first, smallest)]
    win = Card(
        "What did it win?",
        f"{_times(_smaller(first, smallest))} smaller",
        Markup(
            figures.gains(
                (*sizes, *map(_bytes, sizes)),
                (*times, *map(_milliseconds, times)),
                name="win",
                title="Size and time of the first and the smallest",
            )
        ),
        "Area: parameters. Length: time per image.",
    )
    noise = [
        (quiet, noisy)
        for noisy in others
        for quiet in others
        if noisy["noise"] and not quiet["noise"] and _form(noisy) == _form(quiet)
    ]
    gains = [n["top1"]["mean"] - q["top1"]["mean"] for q, n in noise]
    rows = [
        (_short(quiet["name"]), abs(gain), _signed(gain))
        for (quiet, _), gain in zip(noise, gains, strict=True)
    ]
    helped = sum(gain > 0 for gain in gains)
    third = Card(
        "Does noise help?",
        f"in {helped} of {_plural(len(gains), 'case')}" if gains else "not tried",
        Markup(figures.ranking(rows, figures.OTHER, name="noise", title="Points"))
        if rows
        else Markup(""),
        "Points of accuracy that noise in training gains.",
    )
    return [cost, win, third]


def _form(cell: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what two cells share that differ in noise alone."""
    keys = ("weights", "weight_bits", "scheme", "activation_bits")
    return tuple(cell[key] for key in keys)


def _cells_section(report: Mapping[str, Any]) -> Section:
    cells = report["cells"]
    wrong = [
        (cell["name"], 100 - cell["top1"]["mean"], f"{100 - cell['top1']['mean']:.2f}")
        for cell in cells
    ]
    rows = [
        (
            cell["name"],
            _bits(cell["weights"], cell["weight_bits"]),
            _bits(cell["scheme"], cell["activation_bits"]),
            "yes" if cell["noise"] else "no",
            _mean_spread(cell["top1"]),
            _signed(0.0 - cell["points_lost"]["mean"]),
            _bytes(cell["weight_bytes"]),
            _bytes(cell["file_bytes"]),
            _milliseconds(cell["milliseconds"]["median"]),
        )
        for cell in cells
    ]
    header = (
        "network",
        "weights",
        "activations",
        "noise",
        "top-1, %",
        "points",
        "weights take",
        "file takes",
        "time",
    )
    return Section(
        "cells",
        "Bits, accuracy, size and time",
        [
            "Sizes are those of the files: weights of one bit are packed, weights of "
            "few levels are codes of so many bits beside their levels where that is "
            "less than float32, and normalisation is float32.",
            "Times are those of one image, for the networks as they are.",
        ],
        [
            Chart(
                Markup(figures.bars(wrong, name="wrong", title="Wrong answers, %")),
                "Wrong answers in percent of the test images, mean over replicates.",
            )
        ],
        [Table("The numbers", header, rows, shown=True)],
    )


def _bits(kind: str, bits: int) -> str:
    return f"{bits}{_NBSP}bit" + ("" if kind in ("float", "none") else f", {kind}")


# The examples.


def _examples_heading(report: Mapping[str, Any]) -> str:
    examples = report["examples"]
    answers = _plural(examples["n_images"], "answer")
    return f"{examples['n_changed']:,} of {answers} changed"


def _examples(report: Mapping[str, Any], pictures: Sequence[bytes]) -> list[Example]:
    _, height, width = report["dataset"]["input_shape"]
    return [
        Example(
            f"data:image/png;base64,{base64.b64encode(picture).decode()}",
            max(height, width) <= 64,
            image["label"],
            image["changed"],
            [("before", image["before"]), ("after", image["after"])],
        )
        for image, picture in zip(report["examples"]["images"], pictures, strict=True)
    ]


# How to have it again.


def _facts(report: Mapping[str, Any]) -> list[tuple[str, str | Markup]]:
    environment = report["environment"]
    packages = {"python": environment["python"], **environment["packages"]}
    timed = report.get("speed") or report["race"]
    link = Markup('<a href="{}">{}</a>')
    links = [link.format(quote(path), path) for path in report["files"]]
    return [
        ("files", Markup(", ").join(links)),
        ("seed", str(report["seed"])),
        ("CPU", f"{environment['cpu']}, {environment['logical_cpus']} logical"),
        ("vector units", _listing(environment["cpu_flags"])),
        (
            "engine",
            f"{timed['settings']['isa']} of {_listing(environment['isas'])}",
        ),
        ("system", environment["system"]),
        ("versions", _listing(f"{k}{_NBSP}{v}" for k, v in packages.items())),
    ]


def _listing(items: Iterable[str]) -> str:
    return ", ".join(items) or "none"


# What the numbers say to try.


def _next_sections(report: Mapping[str, Any]) -> list[Section]:
    steps = [
        *_ways_to_win_back(report),
        *_ways_to_shrink(report),
        *_ways_to_speed_up(report),
    ]
    if not steps:
        return []
    return [Section("next", "What to try next", steps)]


def _ways_to_win_back(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield what may win back accuracy, if more than noise was lost."""
    lost, config = report["accuracy"]["points_lost"], report["config"]
    if lost["mean"] <= max(_NEXT_TO_NOTHING, lost["spread"] or 0.0):
        return
    layers = _layers_with_errors(report)
    if layers:
        worst = max(layers, key=lambda layer: _error(layer)["relative"]["mean"])
        dim, count = worst["subvector_dim"], worst["n_centroids"]
        shorter = f"subvector_dim {dim // 2} instead of {dim}, or " if dim > 1 else ""
        yield (
            f"More exact: {worst['name']} is off most, by "
            f"{_percent(_error(worst)['relative']['mean'])}. Below quantize.layers, "
            f"give it {shorter}n_centroids {2 * count} instead of {count}."
        )
    if not config["finetune"]["epochs"]:
        yield "More exact: fine-tune the fully connected layers (finetune.epochs: 10)."
    if not config["distill"]["epochs"]:
        yield "More exact, without labels: distill the codebooks (distill.epochs: 20)."


def _ways_to_shrink(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield what may save bytes."""
    layers = report["layers"]
    total = sum(layer["bytes"] for layer in layers)
    largest = max(layers, key=lambda layer: layer["bytes"])
    if not largest["quantized"] and largest["bytes"] > total / 4:
        yield (
            f"Smaller: {largest['name']} was left dense and takes "
            f"{_percent(largest['bytes'] / total)} of all bytes."
        )
    if report["accuracy"]["points_lost"]["mean"] <= _NEXT_TO_NOTHING:
        yield (
            "Smaller: next to nothing was lost. Take quantize.preset small, longer "
            "sub-vectors or codebook_bits 8."
        )


def _ways_to_speed_up(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield what may save time."""
    slower = [
        layer["name"]
        for layer in report["layers"]
        if layer["quantized"] and layer["speedup"] < 1
    ]
    if slower:
        yield (
            f"Faster: {', '.join(slower)} would take less time dense "
            "(quantize.exclude) or, perhaps, with fewer codewords (n_centroids)."
        )


# Several runs side by side.


def render_index(reports: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Return a page that compares runs and links to their reports.

    Parameters
    ----------
    reports : sequence of (str, mapping)
        Link to each run's page, and content of its ``report.json``, valid by its
        schema. Runs on the same images are compared with each other.

    Returns
    -------
    str
        An HTML document; equal arguments give equal text.
    """
    alike: dict[tuple[bool, str, str], list[tuple[str, Mapping[str, Any]]]] = {}
    for link, report in reports:
        kind = report["kind"]
        images = yaml.safe_dump(report["config"].get("dataset"))
        alike.setdefault((kind != "pipeline", kind, images), []).append((link, report))
    groups = [
        (_compared_runs(f"runs-{number}", group), _table_of_runs(group))
        # Pipelines first.
        for number, (_, group) in enumerate(sorted(alike.items()), start=1)
    ]
    return _fill(
        "index.html.j2",
        heading=f"{_plural(len(reports), 'run')} side by side",
        lede="Each row of a table leads to a report. Times are milliseconds of one "
        "image, taken in turns with the dense network on the same machine.",
        groups=groups,
    )


def _compared_runs(
    name: str, group: Sequence[tuple[str, Mapping[str, Any]]]
) -> Section:
    """Return what runs on the same images trade for what."""
    reports = [report for _, report in group]
    first = reports[0]
    match first["kind"]:
        case "pipeline":
            pass
        case "speed":
            return Section(
                name,
                "Speed alone",
                ["Published geometries with drawn parameters: no images, no accuracy."],
            )
        case _:
            return Section(name, "Other runs", ["Their reports compare by themselves."])

    def points(cost: Callable[[Mapping[str, Any], int], float]) -> list[figures.Point]:
        return [
            figures.Point(
                _short(report["title"]) if last else "",
                cost(report, last),
                _top1(report, last),
                figures.AFTER if last else figures.BEFORE,
            )
            for report in reports
            for last in (0, 1)
        ]

    sizes, times = points(_file_bytes), points(_average_ms)
    key = [("before", "original"), ("after", "quantised")]
    best = [
        ", ".join(p.label or "an original" for p in figures.pareto_front(each))
        for each in (sizes, times)
    ]
    tested = sum(first["accuracy"]["n_images"])
    return Section(
        name,
        f"“{first['dataset']['source']}”: what accuracy costs",
        [
            f"Top-1 accuracy on {tested:,} test images. The line joins the networks "
            "that no other one beats in both.",
            f"By size those are {best[0]}; by time, {best[1]}.",
        ],
        [
            Chart(
                Markup(
                    figures.tradeoff(
                        sizes, _bytes, name=f"{name}-size", title="Accuracy by size"
                    )
                ),
                "Top-1 accuracy in percent over the size of the file.",
                key,
            ),
            Chart(
                Markup(
                    figures.tradeoff(
                        times,
                        _milliseconds,
                        name=f"{name}-time",
                        title="Accuracy by time",
                    )
                ),
                "Top-1 accuracy in percent over the time of an image.",
                key,
            ),
        ],
    )


def _table_of_runs(group: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    kind = group[0][1]["kind"]
    header = ["run"]
    if kind == "pipeline":
        header += ["top-1"]
    if kind in ("pipeline", "speed"):
        header += ["size", "smaller", "time", "faster"]
    rows = []
    for link, report in group:
        cells: dict[str, str] = {
            "run": Markup('<a href="{}">{}</a>').format(link, report["title"])
        }
        if "top-1" in header:
            first, last = _top1(report, 0), _top1(report, 1)
            cells["top-1"] = f"{first:.2f}{_ARROW}{last:.2f}{_NBSP}%"
        if "size" in header:
            size = report["size"].get("file", report["size"]["parameters"])
            times = [each["average_ms"] for each in _compared(report)]
            cells |= {
                "size": f"{_bytes(size['before'])}{_ARROW}{_bytes(size['after'])}",
                "smaller": _times(size["compression"]),
                "time": _ARROW.join(map(_milliseconds, times)),
                "faster": _times(times[0] / times[1]),
            }
        rows.append([cells[column] for column in header])
    return Table("", header, rows)


def _top1(report: Mapping[str, Any], last: int) -> float:
    """Return the mean accuracy before (0) or after (1) everything."""
    mean: float = report["accuracy"]["stages"][-last]["top1"]["mean"]
    return mean


def _file_bytes(report: Mapping[str, Any], last: int) -> float:
    size: float = report["size"]["file"][("before", "after")[last]]
    return size


def _average_ms(report: Mapping[str, Any], last: int) -> float:
    time: float = report["speed"]["contenders"][last]["average_ms"]
    return time
