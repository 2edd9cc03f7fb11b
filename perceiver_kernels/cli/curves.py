"""Lines against a size, log-log, each named at its end in its own colour."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from perceiver_kernels.cli.console import format_bytes
from perceiver_kernels.cli.series import Chart, Line

# Okabe and Ito's colours, which the common kinds of colour blindness tell apart; yellow is left out, too light for lines. Past
# five stock implementations colours return with other markers.
OURS_COLOURS = {"ours": "#0072b2", "ours-chunked": "#009e73", "ours-triton": "#56b4e9"}
STOCK_COLOURS = ("#d55e00", "#cc79a7", "#e69f00", "#000000", "#7f7f7f")
MARKERS = ("s", "^", "v", "D", "P", "X", "h")
LABEL_POINTS = 9.5
LINE_HEIGHT = 1.25
LEAST_SPAN = 4.0
"""An axis spans this factor at least: what hardly differs shall look so."""
WHITE = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.5}
"""Behind a name, where it stands on other lines."""
QUANTITY_TITLES = {
    "p50_ms": ("time", "milliseconds (median)"),
    "peak_extra_bytes": ("extra peak memory", "bytes at the peak, beside inputs and weights"),
    "saved_bytes": ("memory kept for the backward", "bytes kept, beside inputs and weights"),
}


def looks(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return implementation -> (colour, marker), the same wherever it is drawn."""
    names = list(dict.fromkeys(names))
    stock = [name for name in names if _family(name) not in OURS_COLOURS]
    found = {name: (OURS_COLOURS[_family(name)], "o") for name in names if _family(name) in OURS_COLOURS}
    for i, name in enumerate(stock):
        found[name] = (STOCK_COLOURS[i % len(STOCK_COLOURS)], MARKERS[i % len(MARKERS)])
    return found


def _family(name: str) -> str:
    """The implementation without the device that may follow."""
    return name.split(", ")[0]


def draw(axes: Any, chart: Chart, look: dict[str, tuple[str, str]]) -> Callable[[], None]:
    """Draw a chart: a line for each implementation, a cross where it ran out of memory, dashes for closed forms.

    Args:
        axes: matplotlib's.
        chart: what to draw.
        look: of every implementation, as `looks` gives it.

    Returns:
        What writes the names, once the figure has been laid out and places on it are known.
    """
    lines = [line for line in chart.lines.values() if line.points]
    # Ours last, on top.
    for line in sorted(lines, key=lambda line: _family(line.name) in OURS_COLOURS):
        _draw_line(axes, line, look[line.name])
    what, unit = QUANTITY_TITLES[chart.quantity]
    axes.set(xscale="log", yscale="log", xlabel=chart.axis, ylabel=unit)
    told = [what] if chart.quantity == "saved_bytes" else [what, chart.title]
    axes.set_title(", ".join([*told, *(["predicted"] if chart.predicted else [])]), fontsize=11, loc="left")
    axes.grid(alpha=0.25, which="major")
    axes.spines[["top", "right"]].set_visible(False)
    _ticks(axes, chart, lines)
    return lambda: _name(axes, lines, look)


def _draw_line(axes: Any, line: Line, look: tuple[str, str]) -> None:
    colour, marker = look
    ours = _family(line.name) in OURS_COLOURS
    layer = 3 if ours else 2
    axes.plot(
        *zip(*line.ordered, strict=True), "--" if line.predicted else "-", color=colour, marker=marker,
        ms=5 if ours else 4, lw=2.8 if ours else 1.3, zorder=layer, label=line.name,
    )  # fmt: skip
    if line.closed:
        points = zip(*sorted(line.closed.items()), strict=True)
        style = ":" if line.predicted else "--"
        axes.plot(*points, style, color="#222222", lw=1.0, zorder=layer + 2, label=f"{line.name}, closed form")
    if line.out_of_memory:
        size, value = line.ordered[-1]
        axes.plot([size], [value], "x", color=colour, ms=11, mew=2.6, zorder=6, label=f"{line.name}, out of memory")


def _ticks(axes: Any, chart: Chart, lines: Sequence[Line]) -> None:
    """Sizes and values in the units that people say: 64K, 16 MiB."""
    sizes = sorted({size for line in lines for size in line.points})
    while len(sizes) > 8:
        sizes = sizes[::-2][::-1]
    axes.set_xticks(sizes, [short_count(size) for size in sizes], minor=False)
    axes.set_xticks([], minor=True)
    low, high = axes.get_ylim()
    widened = max(LEAST_SPAN * low / high, 1.0) ** 0.5
    low, high = low / widened, high * widened
    # Times by tens, bytes by powers that have a unit of their own.
    if chart.quantity == "p50_ms":
        values = _powers(low, high, 10)
        labels = [f"{value:g}" for value in values]
    else:
        values = _powers(low, high, 4)
        labels = [format_bytes(value).replace(".00", "").replace(".0 ", " ") for value in values]
    axes.set_yticks(values, labels)
    axes.set_yticks([], minor=True)
    axes.set_ylim(low, high)


def _powers(low: float, high: float, base: int) -> list[float]:
    first, last = (math.log(value) / math.log(base) for value in (low, high))
    powers = list(range(math.ceil(first), math.floor(last) + 1))
    step = max(1, math.ceil(len(powers) / 8))
    return [float(base) ** power for power in powers if power % step == 0] or [math.sqrt(low * high)]


def short_count(count: int) -> str:
    """Return a count as people say it: 65536 -> '64K', 50176 -> '49K', 1000 -> '1000'."""
    for unit, power in (("G", 30), ("M", 20), ("K", 10)):
        if count >= 2**power and (count % 2**power == 0 or count >= 10 * 2**power):
            return f"{count / 2**power:.0f}{unit}"
    return str(count)


def _make_room(axes: Any, lines: Sequence[Line]) -> None:
    """Leave a margin on the right for the longest name, and one above for names that are pushed apart."""
    sizes = [size for line in lines for size in line.points]
    longest = max(len(line.name) for line in lines)
    width = axes.get_position().width * axes.figure.get_figwidth() * 72
    taken = min(longest * LABEL_POINTS * 0.6 / width, 0.45)
    low, high = min(sizes), max(sizes)
    span = max(math.log(high / low), math.log(2))
    axes.set_xlim(low / math.exp(0.04 * span), high * math.exp(span * (taken + 0.03) / (1 - taken)))
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, top * (top / bottom) ** 0.06)


def _name(axes: Any, lines: Sequence[Line], look: dict[str, tuple[str, str]]) -> None:
    """Write each name behind its line's end, apart from the others."""
    _make_room(axes, lines)
    place, figure = axes.get_position(), axes.figure
    width, height = place.width * figure.get_figwidth() * 72, place.height * figure.get_figheight() * 72
    placed = spread(
        [(line.name, *_points(axes, line, width, height), len(line.name) * LABEL_POINTS * 0.6) for line in lines],
        LABEL_POINTS * LINE_HEIGHT, height,
    )  # fmt: skip
    for line in lines:
        end = line.ordered[-1]
        ours = _family(line.name) in OURS_COLOURS
        _, y = _points(axes, line, width, height)
        text = axes.annotate(
            line.name, end, xytext=(9, placed[line.name] - y), textcoords="offset points", va="center", ha="left",
            color=look[line.name][0], fontsize=LABEL_POINTS, fontweight="bold" if ours else "normal", annotation_clip=False,
            zorder=7, bbox=WHITE,
        )  # fmt: skip
        # The layout is made already, and shall not move for it.
        text.set_in_layout(False)


def _points(axes: Any, line: Line, width: float, height: float) -> tuple[float, float]:
    """Where a line ends, in points from the axes' corner."""
    (x, y), (left, right), (bottom, top) = line.ordered[-1], axes.get_xlim(), axes.get_ylim()
    return math.log(x / left) / math.log(right / left) * width, math.log(y / bottom) / math.log(top / bottom) * height


def spread(labels: Sequence[tuple[str, float, float, float]], height: float, top: float) -> dict[str, float]:
    """Return label -> where its middle goes: as near to its own place as labels that share its columns let it.

    Args:
        labels: (name, left, middle, width) in points.
        height: of a label, in points.
        top: below which labels stay, in points.
    """
    placed = {name: middle for name, _, middle, _ in labels}
    for _ in range(500):
        moved = False
        for name in placed:
            placed[name] = min(placed[name], top - height / 2)
        ordered = sorted(labels, key=lambda label: placed[label[0]])
        for (lower, left, _, width), (upper, other, _, extent) in itertools.combinations(ordered, 2):
            overlap = height - (placed[upper] - placed[lower])
            if overlap > 0.01 and left < other + extent and other < left + width:
                placed[lower] -= overlap / 2
                placed[upper] += overlap / 2
                moved = True
        if not moved:
            break
    return placed
