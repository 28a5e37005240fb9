"""The report's figures: inline SVG in one style, coloured by run, told apart by line style as well (for print and for the colour-blind)."""

import io
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

COLOURS = ("#1f5fa8", "#c2410c", "#6d3fa0", "#0f766e", "#9d174d", "#57534e")
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
CLEAN, NOISY, MUTED = "#16774f", "#b3261e", "#5b6470"
POINTS = 400  # a line keeps at most so many points: each costs about 15 bytes of page

_STYLE = {
    "svg.fonttype": "none",  # text stays text: it takes the page's font, can be searched, and is smaller than outlines
    "svg.hashsalt": "report",
    "font.size": 10,
    "axes.edgecolor": "#9aa3ad",
    "axes.labelcolor": "#39424e",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e8eb",
    "grid.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": "#39424e",
    "ytick.color": "#39424e",
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "legend.handlelength": 2.2,
    "legend.labelcolor": "#39424e",
    "axes.xmargin": 0.02,
    "text.parse_math": False,  # a run's name may hold a dollar sign
}


class Series(NamedTuple):
    """One line of a chart: `x`, `y` of one length, NaN where there is nothing; `warmup` is the x where the run's warm-up ends."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    number: int  # of the run: decides colour and dashes
    warmup: float | None = None


class Plot(NamedTuple):
    """A finished figure: what the page shows, what it says below it, and what it says to who cannot see it."""

    title: str
    svg: str
    caption: str
    alt: str


def lines(
    name: str,
    series: Sequence[Series],
    *,
    xlabel: str,
    ylabel: str,
    percent: bool = False,
    chance: float | None = None,
    smooth: bool = False,
    floor: float | None = None,
) -> str:
    """A line chart over all runs as an SVG element; `name` keeps its ids apart from those of the other figures.

    `smooth` draws each line thin and a moving average over 5 % of its length on top; `chance` is a dotted line; the runs' `warmup` a
    mark with its own legend entry; `floor` a lower limit of the axis.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _canvas(xlabel, ylabel)
        for one in series:
            x, y = _thin(one.x, one.y)
            look = {"color": COLOURS[one.number % len(COLOURS)], "linestyle": DASHES[one.number % len(DASHES)]}
            if smooth and len(x) > 40:
                axes.plot(x, y, color=look["color"], linewidth=0.7, alpha=0.35)
                y = _moving_average(y)
            sparse = {"marker": "o", "markersize": 3.2} if len(x) <= 60 and not smooth else {}
            axes.plot(x, y, label=_short(one.label), **look, **sparse)
        if chance is not None:
            axes.axhline(chance, color=MUTED, linewidth=1.3, linestyle=(0, (1, 2)), label="chance")
        _mark_warmup(axes, [one.warmup for one in series])
        if percent:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
        if floor is not None:
            axes.set_ylim(bottom=floor)
        _legend(axes)
        return _svg(figure, name)


def drift(name: str, visits: Sequence[dict], *, warmup: float | None, limits: tuple[float, float] | None) -> str:
    """Mean score of clean and noisy pairs over the visits of one run (of all pairs where the truth is not known) as an SVG element."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _canvas("visit", "mean score, 100 cos")
        x = [visit["visit"] for visit in visits]
        kinds = (("score_clean", "clean pairs", CLEAN, "-", "o"), ("score_noisy", "noisy pairs", NOISY, DASHES[1], "s"))
        known = any(visit.get("score_clean") is not None for visit in visits)
        for key, label, colour, dash, marker in kinds if known else (("score", "all pairs", MUTED, "-", "o"),):
            y = [np.nan if visit.get(key) is None else visit[key] for visit in visits]
            axes.plot(x, y, color=colour, linestyle=dash, marker=marker, markersize=3.2, label=label)
        _mark_warmup(axes, [warmup])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if limits:
            axes.set_ylim(*limits)
        _legend(axes)
        return _svg(figure, name)


def score_limits(runs: Sequence[Sequence[dict]]) -> tuple[float, float] | None:
    """One y range for all drift charts, so that they can be compared by eye; None without scores."""
    keys = ("score_clean", "score_noisy", "score")
    values = [visit[key] for visits in runs for visit in visits for key in keys if visit.get(key) is not None]
    if not values:
        return None
    margin = 0.06 * (max(values) - min(values)) or 1.0
    return min(values) - margin, max(values) + margin


def _canvas(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.6, 3.3), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(visible=False, axis="x")
    return figure, axes


def _mark_warmup(axes: Axes, ends: Sequence[float | None]) -> None:
    for number, end in enumerate(sorted({round(end, 6) for end in ends if end})):
        axes.axvline(end, color="#8a6d1c", linewidth=1.1, linestyle=(0, (3, 2)), label="warm-up ends" if number == 0 else None)


def _legend(axes: Axes) -> None:
    """Above the axes, where it can cover no line."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        room, columns = 68, len(labels)  # about 68 characters fit side by side; a handle takes the room of eight
        while columns > 1 and sum(max(len(label) + 8 for label in labels[i::columns]) for i in range(columns)) > room:
            columns -= 1
        order = _by_rows(len(labels), columns)
        handles, labels = [handles[i] for i in order], [labels[i] for i in order]
        axes.legend(handles, labels, loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns, columnspacing=1.2, borderaxespad=0.2)


def _by_rows(count: int, columns: int) -> list[int]:
    """The order that makes matplotlib, which fills a legend column by column, fill it row by row."""
    return [i for column in range(columns) for i in range(column, count, columns)]


def _short(label: str) -> str:
    """A leading underscore would hide the line from matplotlib's legend."""
    label = label if len(label) <= 28 else f"{label[:25]}..."
    return f" {label}" if label.startswith("_") else label


def _thin(x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """At most POINTS points: means of equal runs of neighbours, which keeps the level where every n-th point would keep the noise."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    if len(x) <= POINTS:
        return x, y
    parts = np.array_split(np.arange(len(x)), POINTS)
    return np.array([x[part].mean() for part in parts]), np.array([y[part].mean() for part in parts])


def _moving_average(y: np.ndarray) -> np.ndarray:
    """Mean over a centred window of 5 % of the points, narrower at the ends so that these are not bent towards zero."""
    half = max(1, len(y) // 40)
    total = np.concatenate([[0.0], np.nancumsum(y)])
    count = np.concatenate([[0], np.cumsum(~np.isnan(y))])
    place = np.arange(len(y))
    reach = np.minimum(half, np.minimum(place, len(y) - 1 - place))
    low, high = place - reach, place + reach + 1
    with np.errstate(invalid="ignore"):
        return (total[high] - total[low]) / (count[high] - count[low])


def _svg(figure: Figure, name: str) -> str:
    """The bare <svg> element: no prolog, metadata, style sheet or namespace addresses (HTML needs none), the page's font, ids that
    `name` makes unique."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"font-family:[^;\"]*;?", "", text)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'((?:xlink:)?href="#|url\(#)', rf"\g<1>{name}-", text)
    for size in ("width", "height"):  # the page decides; the viewBox keeps the shape
        text = re.sub(rf'(<svg\b[^>]*?)\s{size}="[^"]*"', r"\1", text, count=1)
    return text.strip()


def finite(values: Sequence[Any]) -> list[float]:
    """Numbers as floats, NaN for what is missing or no number."""
    return [float(v) if isinstance(v, int | float) and not isinstance(v, bool) else float("nan") for v in values]
