"""Figures of the report: inline SVG that follows the page's colours and fonts.

Every figure is drawn for a telephone, :data:`WIDTH` units wide with text of 11 units or
more, and grows with the page. Colours are written as placeholders and leave as CSS
variables, so that one drawing serves the light, the dark and the printed page.
"""

from __future__ import annotations

import io
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

WIDTH = 328.0
"""Units of a figure's width: CSS pixels on a 360 pixel wide page."""

CARD_WIDTH = 240.0
"""Units of the width of a figure in a card of the summary."""

# Placeholders; the CSS variable of the same name has the colour.
INK, MUTED, LINE, BEFORE, AFTER, OTHER, PAPER = (f"#00000{i}" for i in range(1, 8))
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    LINE: "--line",
    BEFORE: "--before",
    AFTER: "--after",
    OTHER: "--other",
    PAPER: "--paper",
}

_SMALL = 11.0
_TEXT = 12.0
_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"


@dataclass(frozen=True)
class Bar:
    """A row of a bar chart.

    Attributes
    ----------
    name
        Written above the bars on the left.
    before, after
        Lengths of the two bars, in the same unit.
    text
        The two values in words, above the bars on the right.
    emphasis
        What the row amounts to, at the right margin.
    """

    name: str
    before: float
    after: float
    text: str
    emphasis: str


def paired_bars(rows: Sequence[Bar], *, name: str, title: str) -> str:
    """Draw two bars for each row, before and after, on one linear scale."""
    pitch, top = 42.0, 14.0
    figure, axes = _canvas(pitch * len(rows))
    longest = max(max(row.before, row.after) for row in rows)
    for index, row in enumerate(rows):
        y = top + index * pitch
        _text(axes, 0, y, row.name, weight="bold")
        _text(axes, WIDTH, y, row.emphasis, weight="bold", align="right")
        _text(axes, WIDTH - 50, y, row.text, color=MUTED, align="right", size=_SMALL)
        for offset, value, color in ((5, row.before, BEFORE), (13, row.after, AFTER)):
            # A hairline remains visible where a bar is too short to be one.
            width = max(1.0, value / longest * WIDTH)
            _bar(axes, y + offset, width, 7, color)
    description = "; ".join(f"{row.name}: {row.text} ({row.emphasis})" for row in rows)
    return _svg(figure, name, title, description)


def bars(rows: Sequence[tuple[str, float, str]], *, name: str, title: str) -> str:
    """Draw one bar for each (name, length, text), on one linear scale."""
    pitch, top = 32.0, 13.0
    figure, axes = _canvas(pitch * len(rows))
    longest = max(value for _, value, _ in rows)
    for index, (label, value, text) in enumerate(rows):
        y = top + index * pitch
        _text(axes, 0, y, label)
        _text(axes, WIDTH, y, text, color=MUTED, align="right")
        _bar(axes, y + 5, WIDTH, 6, LINE, opacity=0.6)
        _bar(axes, y + 5, max(1.0, value / longest * WIDTH), 6, AFTER)
    description = "; ".join(f"{label}: {text}" for label, _, text in rows)
    return _svg(figure, name, title, description)


@dataclass(frozen=True)
class Timing:
    """A contender of the speed test; times in milliseconds per image.

    Attributes
    ----------
    name, text
        Above the bar on the left and on the right.
    average
        Length of the bar.
    repeats
        (lower quartile, median, upper quartile) of each repeat.
    color
        Placeholder colour of the bar.
    """

    name: str
    text: str
    average: float
    repeats: Sequence[tuple[float, float, float]]
    color: str


def speed(rows: Sequence[Timing], *, name: str, title: str) -> str:
    """Draw the average time of each contender and the spread of its repeats."""
    pitch, top = 62.0, 14.0
    figure, axes = _canvas(pitch * len(rows) - 6)
    longest = max(max(row.average, *(high for *_, high in row.repeats)) for row in rows)
    scale = WIDTH / longest
    for index, row in enumerate(rows):
        y = top + index * pitch
        _text(axes, 0, y, row.name, weight="bold")
        _text(axes, WIDTH, y, row.text, align="right")
        _bar(axes, y + 6, row.average * scale, 14, row.color)
        # One thin line per repeat, from its lower to its upper quartile.
        spacing = min(4.0, 18.0 / len(row.repeats))
        for repeat, (low, median, high) in enumerate(row.repeats):
            line_y = y + 25 + repeat * spacing
            _line(axes, (low * scale, high * scale), (line_y, line_y), row.color, 1.2)
            _dots(axes, [median * scale], [line_y], row.color, 3.0)
    description = "; ".join(f"{row.name}: {row.text}" for row in rows)
    return _svg(figure, name, title, description)


@dataclass(frozen=True)
class Promise:
    """A layer's measured speed-up beside the one its operation counts promise."""

    name: str
    measured: float
    theoretical: float
    text: str


def promises(rows: Sequence[Promise], *, name: str, title: str) -> str:
    """Draw measured speed-ups as bars and theoretical ones as marks."""
    pitch, top = 36.0, 14.0
    bottom = top + pitch * len(rows) - 8
    figure, axes = _canvas(bottom + 14)
    largest = max(1.0, *(max(row.measured, row.theoretical) for row in rows))
    scale = (WIDTH - 2) / largest
    _line(axes, (scale, scale), (top - 4, bottom), MUTED, 0.8, dashes=(2, 2))
    end = scale > WIDTH / 2
    _text(
        axes,
        scale - 4 if end else scale + 4,
        bottom + 8,
        "1\N{MULTIPLICATION SIGN}: as fast as dense",
        color=MUTED,
        size=_SMALL,
        align="right" if end else "left",
    )
    for index, row in enumerate(rows):
        y = top + index * pitch
        _text(axes, 0, y, row.name, weight="bold", halo=True)
        _text(axes, WIDTH, y, row.text, color=MUTED, align="right", halo=True)
        _bar(axes, y + 7, row.measured * scale, 8, AFTER)
        x = row.theoretical * scale
        _line(axes, (x, x), (y + 4, y + 18), INK, 2.0)
    description = "; ".join(f"{row.name}: {row.text}" for row in rows)
    return _svg(figure, name, title, description)


@dataclass(frozen=True)
class Errors:
    """Response errors of one layer, over all replicates.

    Attributes
    ----------
    name, text
        Above the line on the left and on the right.
    corrected, kmeans
        One value for each replicate, as shares of the response.
    """

    name: str
    text: str
    corrected: Sequence[float]
    kmeans: Sequence[float]


def response_errors(rows: Sequence[Errors], *, name: str, title: str) -> str:
    """Draw both errors of each layer on a logarithmic scale."""
    pitch, top = 40.0, 14.0
    bottom = top + pitch * len(rows) - 6
    figure, axes = _canvas(bottom + 16)
    values = [value for row in rows for value in (*row.corrected, *row.kmeans)]
    smallest = min((value for value in values if value > 0), default=1e-3)
    low = math.floor(math.log10(smallest))
    high = max(math.ceil(math.log10(max(max(values), smallest))), low + 1)
    left, right = 6.0, WIDTH - 8.0

    def place(value: float) -> float:
        share = (math.log10(max(value, 10.0**low)) - low) / (high - low)
        return left + share * (right - left)

    for exponent in range(low, high + 1):
        x = place(10.0**exponent)
        _line(axes, (x, x), (top + 6, bottom - 4), LINE, 0.8)
        _text(
            axes,
            min(max(x, 0), WIDTH),
            bottom + 10,
            f"{100 * 10.0**exponent:g}\N{NO-BREAK SPACE}%",
            color=MUTED,
            size=_SMALL,
            align={low: "left", high: "right"}.get(exponent, "center"),
        )
    for index, row in enumerate(rows):
        y = top + index * pitch
        _text(axes, 0, y, row.name, weight="bold", halo=True)
        _text(axes, WIDTH, y, row.text, color=MUTED, align="right", halo=True)
        line_y = y + 15
        ends = [place(float(np.mean(each))) for each in (row.corrected, row.kmeans)]
        _line(axes, ends, (line_y, line_y), MUTED, 1.0)
        for each, color, marker in (
            (row.kmeans, OTHER, "D"),
            (row.corrected, AFTER, "o"),
        ):
            _dots(axes, map(place, each), [line_y] * len(each), color, 4.0, opacity=0.4)
            mean = place(float(np.mean(each)))
            size = 9.0 if marker == "o" else 7.0
            _dots(axes, [mean], [line_y], color, size, marker=marker)
    description = "; ".join(f"{row.name}: {row.text}" for row in rows)
    return _svg(figure, name, title, description)


def stages(
    labels: Sequence[str],
    values: Sequence[Sequence[float]],
    *,
    name: str,
    title: str,
    description: str,
) -> str:
    """Draw a percentage after each stage: the mean in bold, each replicate behind it.

    Parameters
    ----------
    labels
        Name of each stage; may have two lines.
    values
        For each stage the percentage in every replicate.
    name, title, description
        As everywhere.
    """
    height, top, bottom, left, right = 226.0, 26.0, 182.0, 62.0, WIDTH - 34.0
    figure, axes = _canvas(height)
    array = np.asarray(values, dtype=np.float64)
    ticks, place = _vertical_scale(array, top, bottom)
    xs = np.linspace(left, right, len(labels))
    _horizontal_grid(axes, ticks, place)
    for column in array.T if array.shape[1] > 1 else ():
        axes.plot(xs, [place(v) for v in column], color=MUTED, lw=0.9, alpha=0.45)
    means = array.mean(axis=1)
    heights = [place(mean) for mean in means]
    axes.plot(xs, heights, color=AFTER, lw=2.4)
    _dots(axes, xs, heights, AFTER, 9.0, edge=PAPER)
    for index, (x, y, label) in enumerate(zip(xs, heights, labels, strict=True)):
        # Above the point, or below it in a valley, where a line would cross the text.
        neighbours = [heights[i] for i in (index - 1, index + 1) if 0 <= i < len(xs)]
        below = all(other < y for other in neighbours)
        _text(
            axes,
            x,
            y + (18 if below else -10),
            f"{means[index]:.2f}",
            weight="bold",
            align="center",
            halo=True,
        )
        for row, part in enumerate(label.split("\n")):
            _text(axes, x, bottom + 24 + 14 * row, part, align="center", color=MUTED)
    return _svg(figure, name, title, description)


@dataclass(frozen=True)
class Curve:
    """Values by epoch.

    Attributes
    ----------
    first
        Epoch of the first value.
    values
        A value for each epoch from then on.
    kept
        Epoch to mark, if it is among them.
    color
        Placeholder colour.
    """

    first: int
    values: Sequence[float]
    kept: int
    color: str

    @property
    def epochs(self) -> range:
        """Epochs of the values."""
        return range(self.first, self.first + len(self.values))


def curves(
    panels: Sequence[tuple[str, Sequence[Curve]]],
    *,
    name: str,
    title: str,
    description: str,
) -> str:
    """Draw values by epoch, panels (heading and curves) one above the other."""
    panel_height, left = 160.0, 44.0
    figure, axes = _canvas(panel_height * len(panels) + 18)
    everything = [curve for _, panel in panels for curve in panel]
    first = min(curve.epochs[0] for curve in everything)
    last = max(curve.epochs[-1] for curve in everything)

    def across(epoch: float) -> float:
        return left + (epoch - first) / max(last - first, 1) * (WIDTH - 12 - left)

    for index, (heading, panel) in enumerate(panels):
        top = index * panel_height
        _text(axes, 0, top + 13, heading, weight="bold")
        values = np.concatenate([curve.values for curve in panel])
        ticks, place = _vertical_scale(values, top + 40, top + panel_height - 12)
        _horizontal_grid(axes, ticks, place)
        for curve in panel:
            points = [
                (across(epoch), place(value))
                for epoch, value in zip(curve.epochs, curve.values, strict=True)
            ]
            axes.plot(*zip(*points, strict=True), color=curve.color, lw=1.4, alpha=0.7)
            if curve.kept in curve.epochs:
                x, y = points[curve.kept - curve.first]
                _dots(axes, [x], [y], curve.color, 7.0, edge=PAPER)
    bottom = panel_height * len(panels)
    steps = MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]).tick_values(first, last)
    for step in steps:
        if first <= step <= last:
            _text(axes, across(step), bottom + 6, f"{step:g}", "center", MUTED, _SMALL)
    _text(axes, 0, bottom + 6, "epoch", color=MUTED, size=_SMALL)
    return _svg(figure, name, title, description)


def loss_strip(values: Sequence[float], *, name: str, title: str) -> str:
    """Draw the points of accuracy that each replicate lost, and their mean."""
    figure, axes = _canvas(76, CARD_WIDTH)
    low = min(0, math.floor(min(values)))
    high = max(1, math.ceil(max(values)))
    left, right, y = 8.0, CARD_WIDTH - 8.0, 34.0

    def place(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    _line(axes, (left, right), (y, y), LINE, 1.0)
    step = max(1, math.ceil((high - low) / 5))
    for tick in range(low, high + 1, step):
        x = place(tick)
        _line(axes, (x, x), (y - 5, y + 5), MUTED, 1.0)
        label = str(tick).replace("-", "\N{MINUS SIGN}")
        _text(axes, x, y + 24, label, "center", MUTED, _SMALL)
    _line(axes, (place(0), place(0)), (y - 18, y + 10), INK, 1.4)
    mean = float(np.mean(values))
    if len(values) > 1:
        _dots(axes, map(place, values), [y] * len(values), OTHER, 7.0, opacity=0.45)
    _dots(axes, [place(mean)], [y], OTHER, 13.0)
    _text(axes, CARD_WIDTH / 2, y + 39, "points lost", "center", MUTED, _SMALL)
    description = f"mean {mean:.2f} points; replicates " + ", ".join(
        f"{value:.2f}" for value in values
    )
    return _svg(figure, name, title, description)


def gains(
    size: tuple[float, float, str, str],
    time: tuple[float, float, str, str],
    *,
    name: str,
    title: str,
) -> str:
    """Draw bytes before and after as areas, and times as lengths.

    Parameters
    ----------
    size, time
        Before and after, as numbers and in words.
    name, title
        As everywhere.
    """
    side, height = 86.0, 88.0
    figure, axes = _canvas(height, CARD_WIDTH)
    before, after, before_text, after_text = size
    # Both squares grow from the same corner, on one scale of area.
    unit = side / math.sqrt(max(before, after))
    for value, color, opacity in ((before, BEFORE, 0.35), (after, AFTER, 1.0)):
        edge = max(1.0, unit * math.sqrt(value))
        _bar(axes, height - 1 - edge, edge, edge, color, opacity)
    _text(axes, 6, height - side + 13, before_text, size=_SMALL)
    edge = unit * math.sqrt(after)
    _text(axes, edge + 5, height - 5, after_text, size=_SMALL)
    left = side + 28
    before, after, before_text, after_text = time
    scale = (CARD_WIDTH - left) / max(before, after)
    for y, value, text, color in (
        (16, before, before_text, BEFORE),
        (60, after, after_text, AFTER),
    ):
        _text(axes, left, y, text, size=_SMALL)
        _bar(axes, y + 5, max(1.0, value * scale), 12, color, left=left)
    description = f"size: {size[2]}, then {size[3]}; time: {time[2]}, then {time[3]}"
    return _svg(figure, name, title, description)


def ranking(
    rows: Sequence[tuple[str, float, str]], first: str, *, name: str, title: str
) -> str:
    """Draw a short bar for each (name, length, text), the first in a colour."""
    pitch, top = 26.0, 11.0
    figure, axes = _canvas(pitch * len(rows), CARD_WIDTH)
    longest = max((value for _, value, _ in rows), default=0.0) or 1.0
    for index, (label, value, text) in enumerate(rows):
        y = top + index * pitch
        _text(axes, 0, y, label, size=_SMALL)
        _text(axes, CARD_WIDTH, y, text, "right", MUTED, _SMALL)
        width = max(1.0, value / longest * CARD_WIDTH)
        _bar(axes, y + 4, width, 6, BEFORE if index else first)
    description = "; ".join(f"{label}: {text}" for label, _, text in rows)
    return _svg(figure, name, title, description)


@dataclass(frozen=True)
class Point:
    """A network in a trade-off.

    Attributes
    ----------
    label
        Written beside the point; may be empty.
    cost
        Above 0; less is better.
    percentage
        More is better.
    color
        Placeholder colour.
    """

    label: str
    cost: float
    percentage: float
    color: str


def pareto_front(points: Iterable[Point]) -> list[Point]:
    """Return the points that no other one beats in both, cheapest first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, -p.percentage)):
        if not front or point.percentage > front[-1].percentage:
            front.append(point)
    return front


def tradeoff(
    points: Sequence[Point], words: Callable[[float], str], *, name: str, title: str
) -> str:
    """Draw percentages over costs on a logarithmic scale, and the Pareto front.

    Parameters
    ----------
    points
        At least one.
    words
        Writes a cost with its unit.
    name, title
        As everywhere.
    """
    height, top, bottom, left, right = 250.0, 22.0, 206.0, 52.0, WIDTH - 16.0
    figure, axes = _canvas(height)
    ticks, place = _vertical_scale([p.percentage for p in points], top, bottom)
    _horizontal_grid(axes, ticks, place)
    costs = [p.cost for p in points]
    low, high = math.log(min(costs)), math.log(max(costs))
    if high - low < 0.1:
        low, high = low - 0.5, high + 0.5

    def across(cost: float) -> float:
        return left + (math.log(cost) - low) / (high - low) * (right - left)

    for cost in _round_costs(math.exp(low), math.exp(high)):
        _text(axes, across(cost), bottom + 24, words(cost), "center", MUTED, _SMALL)
    front = pareto_front(points)
    xs, ys = [across(front[0].cost)], [place(front[0].percentage)]
    for point in front[1:]:
        # Until something better begins, the cheaper one is the best.
        xs += [across(point.cost)] * 2
        ys += [ys[-1], place(point.percentage)]
    _line(axes, [*xs, right], [*ys, ys[-1]], LINE, 1.6)
    taken: list[float] = []
    for point in sorted(points, key=lambda p: -p.percentage):
        x, y = across(point.cost), place(point.percentage)
        _dots(axes, [x], [y], point.color, 9.0, edge=PAPER)
        if point.label:
            row = y + 4
            while any(abs(row - other) < 13 for other in taken):
                row += 1
            taken.append(row)
            in_left_half = x < (left + right) / 2
            _text(
                axes,
                x + (9 if in_left_half else -9),
                row,
                point.label,
                "left" if in_left_half else "right",
                size=_SMALL,
                halo=True,
            )
    description = "; ".join(
        f"{p.label or 'dense'}: {p.percentage:.2f} % at {words(p.cost)}" for p in points
    )
    return _svg(figure, name, title, description)


def _round_costs(low: float, high: float) -> list[float]:
    """Return up to five round numbers in a range, evenly spread on a log scale."""
    for factors in ((1, 2, 5), (1, 3), (1,)):
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [f * 10.0**n for n in powers for f in factors]
        found = [cost for cost in found if low <= cost <= high]
        if len(found) <= 5:
            break
    return found or [low, high]


def _canvas(height: float, width: float = WIDTH) -> tuple[Figure, Axes]:
    """Return a figure whose data coordinates are SVG units, y downwards."""
    figure = Figure(figsize=(width / 72, height / 72))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    figure.patch.set_visible(False)
    return figure, axes


def _text(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    align: Any = "left",
    color: str = INK,
    size: float = _TEXT,
    weight: str = "normal",
    halo: bool = False,
) -> None:
    artist = axes.text(
        x,
        y,
        text,
        ha=align,
        va="baseline",
        color=color,
        size=size,
        weight=weight,
        parse_math=False,
    )
    if halo:
        artist.set_gid("halo")


def _bar(
    axes: Axes,
    y: float,
    width: float,
    height: float,
    color: str,
    opacity: float = 1.0,
    left: float = 0.0,
) -> None:
    axes.add_patch(Rectangle((left, y), width, height, fc=color, lw=0, alpha=opacity))


def _line(
    axes: Axes,
    xs: Sequence[float],
    ys: Sequence[float],
    color: str,
    width: float,
    dashes: tuple[float, float] | None = None,
) -> None:
    style: Any = "-" if dashes is None else (0, dashes)
    axes.plot(xs, ys, color=color, lw=width, ls=style, clip_on=False)


def _dots(
    axes: Axes,
    xs: Iterable[float],
    ys: Iterable[float],
    color: str,
    size: float,
    marker: str = "o",
    opacity: float = 1.0,
    edge: str | None = None,
) -> None:
    axes.plot(
        list(xs),
        list(ys),
        ls="none",
        marker=marker,
        color=color,
        ms=size,
        mec=edge or color,
        mew=1.5 if edge else 0,
        alpha=opacity,
        clip_on=False,
    )


def _vertical_scale(values: Any, top: float, bottom: float) -> tuple[list[float], Any]:
    """Return round tick values around `values` and the map from value to y."""
    low, high = float(np.min(values)), float(np.max(values))
    if low == high:
        low, high = low - 0.5, high + 0.5
    ticks = MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    first, last = ticks[0], ticks[-1]

    def place(value: float) -> float:
        return float(bottom - (value - first) / (last - first) * (bottom - top))

    return [float(tick) for tick in ticks], place


def _horizontal_grid(axes: Axes, ticks: Sequence[float], place: Any) -> None:
    step = ticks[1] - ticks[0]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if round(step, decimals) != round(step, 6):
        decimals += 1
    for tick in ticks:
        y = place(tick)
        _line(axes, (0, WIDTH), (y, y), LINE, 0.8)
        _text(axes, 0, y - 3, f"{tick:.{decimals}f}", color=MUTED, size=_SMALL)


def _svg(figure: Figure, name: str, title: str, description: str) -> str:
    """Write a figure as an SVG element that stands in an HTML page.

    Parameters
    ----------
    figure
        What to write.
    name
        Unique in the page; ids begin with it.
    title, description
        What a screen reader says.
    """
    buffer = io.StringIO()
    silent = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    # Text stays text: it can be read aloud, searched and follows the page's font.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata=silent)
    root = ET.fromstring(buffer.getvalue())
    _clean(root, name)
    for tag, text in (("desc", description), ("title", title)):
        element = ET.Element(f"{{{_SVG}}}{tag}", id=f"{name}-{tag}")
        element.text = text
        root.insert(0, element)
    width, height = figure.get_size_inches() * 72
    root.attrib.clear()
    root.attrib |= {
        "class": "chart",
        "viewBox": f"0 0 {width:g} {height:g}",
        "role": "img",
        "aria-labelledby": f"{name}-title {name}-desc",
    }
    ET.register_namespace("", _SVG)
    text = ET.tostring(root, encoding="unicode").replace(f' xmlns="{_SVG}"', "")
    return re.sub("#00000[1-7]", lambda match: f"var({_VARIABLES[match[0]]})", text)


def _clean(root: ET.Element, name: str) -> None:
    """Drop what a page has no use for; make ids unique in the page."""
    for parent in list(root.iter()):
        for child in list(parent):
            if (
                child.tag == f"{{{_SVG}}}defs"
                and child.find(f"{{{_SVG}}}style") is not None
            ):
                parent.remove(child)
    for element in root.iter():
        tag = element.tag.removeprefix(f"{{{_SVG}}}")
        identity = element.attrib.pop("id", None)
        if tag == "path" and identity is not None:
            element.set("id", f"{name}-{identity}")
        if identity == "halo":
            element.set("class", "halo")
        if (target := element.attrib.pop(f"{{{_XLINK}}}href", None)) is not None:
            element.set("href", f"#{name}-{target.removeprefix('#')}")
        element.attrib.pop("clip-path", None)
        if "d" in element.attrib:
            element.set("d", " ".join(element.attrib["d"].split()))
        if tag == "text":
            del element.attrib["transform"]
            style = element.get("style", "")
            element.set("style", re.sub(r"font-family:[^;]*;? ?", "", style))
        element.text = (element.text or "").strip() or None
        element.tail = None
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith("clipPath") or (
                child.tag.endswith(("defs", "}g")) and len(child) == 0
            ):
                parent.remove(child)
