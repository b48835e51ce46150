"""What a model is made of: a table of its layers as JSON, text and HTML."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from qcnn_py.model import Model

__all__ = [
    "COLUMNS",
    "NUMERIC_COLUMNS",
    "describe",
    "html_page",
    "html_table",
    "table_rows",
]

COLUMNS = (
    "layer",
    "kind",
    "input",
    "output",
    "M",
    "K",
    "dsub",
    "sets",
    "bytes",
    "smaller",
    "operations",
    "fewer",
    "kernel",
)
"""Headings of :func:`table_rows`."""

NUMERIC_COLUMNS = frozenset(
    {"M", "K", "dsub", "sets", "bytes", "smaller", "operations", "fewer"}
)
_TIMES = "\N{MULTIPLICATION SIGN}"

_STYLE = """
.qcnn { border-collapse: collapse; font-size: 0.9em }
.qcnn { font-variant-numeric: tabular-nums }
.qcnn th, .qcnn td { padding: 0.15em 0.6em; text-align: left; white-space: nowrap }
.qcnn .number { text-align: right }
.qcnn thead, .qcnn tfoot { border-block: 1px solid }
"""


def describe(model: Model) -> dict[str, Any]:
    """Return what is known of a model as plain JSON values.

    Returns
    -------
    dict
        ``input_shape``, ``output_shape``, ``isa``, ``precision``; ``layers`` as in
        `Model.layers`; ``dense_bytes``, ``bytes``, ``dense_operations`` and
        ``operations``, sums over the layers; the network's ``metadata``, of whose
        mean image only the shape is told.
    """
    network = model.network
    layers = model.layers
    metadata = network.metadata
    preprocessing = metadata.get("preprocessing")
    if isinstance(preprocessing, dict) and isinstance(preprocessing.get("mean"), dict):
        preprocessing["mean"].pop("float32", None)
    return {
        "input_shape": list(network.input_shape),
        "output_shape": list(network.shapes[network.output]),
        "isa": model.isa,
        "precision": model.precision,
        "layers": layers,
        **_sums(layers),
        "metadata": metadata,
    }


def table_rows(model: Model) -> Iterator[tuple[str, ...]]:
    """Yield a row of texts for each layer, and one for all of them."""
    layers = model.layers
    for layer in layers:
        kind = layer["kind"]
        if kind == "conv":
            kind += " " + _shape(layer["kernel"])
            if layer["groups"] > 1:
                kind += f", {layer['groups']} groups"
        yield (
            layer["name"],
            kind,
            _shape(layer["input_shape"]),
            _shape(layer["output_shape"]),
            *(
                "" if layer[key] is None else str(layer[key])
                for key in (
                    "n_subspaces",
                    "n_centroids",
                    "subvector_dim",
                    "codebook_sets",
                )
            ),
            *_costs(layer),
            layer["kernel_name"],
        )
    yield ("all layers", *[""] * 7, *_costs(_sums(layers)), "")


def html_table(model: Model) -> str:
    """Return the summary and the table as a piece of HTML."""
    classes = ["number" if column in NUMERIC_COLUMNS else "text" for column in COLUMNS]

    def row(tag: str, cells: tuple[str, ...]) -> str:
        inner = "".join(
            f'<{tag} class="{name}">{escape(cell)}</{tag}>'
            for name, cell in zip(classes, cells, strict=True)
        )
        return f"<tr>{inner}</tr>"

    *rows, total = [row("td", cells) for cells in table_rows(model)]
    return (
        f"<style>{_STYLE}</style><p><code>{escape(repr(model))}</code></p>"
        f'<table class="qcnn"><thead>{row("th", COLUMNS)}</thead>'
        f"<tbody>{''.join(rows)}</tbody><tfoot>{total}</tfoot></table>"
    )


def html_page(model: Model, title: str) -> str:
    """Return a page of HTML with nothing but the summary and the table."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>:root {{ color-scheme: light dark; "
        "font-family: system-ui, sans-serif }} body { overflow-wrap: anywhere } "
        "main { overflow-x: auto }</style></head>"
        f"<body><h1>{escape(title)}</h1><main>{html_table(model)}</main></body></html>\n"
    )


def _sums(layers: list[dict[str, Any]]) -> dict[str, int]:
    keys = ("dense_bytes", "bytes", "dense_operations", "operations")
    return {key: sum(layer[key] for layer in layers) for key in keys}


def _costs(entry: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Format bytes and operations, each with how many times less than dense."""
    return (
        f"{entry['bytes']:,}",
        _ratio(entry["dense_bytes"], entry["bytes"]),
        f"{entry['operations']:,}",
        _ratio(entry["dense_operations"], entry["operations"]),
    )


def _ratio(dense: int, quantized: int) -> str:
    return f"{dense / quantized:.1f}{_TIMES}" if quantized else ""


def _shape(shape: tuple[int, ...]) -> str:
    return _TIMES.join(map(str, shape))
