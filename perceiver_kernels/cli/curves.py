"""Lines against a size, log-log, each named at the right in its own colour."""

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
LEADER_POINTS, MARGIN_POINTS = 18.0, 8.0
"""Widths: between the last size and the names, and before the first size."""
LEAST_SPAN = 10.0
"""An axis spans this factor at least: what hardly differs shall look so, and three ticks fit."""
MOST_TICKS = 9
LADDERS = {
    "p50_ms": [(10, (1, 2, 5)), (10, (1,)), (1000, (1,))],
    "peak_extra_bytes": [(2, (1,)), (4, (1,)), (16, (1,)), (256, (1,))],
    "saved_bytes": [(2, (1,)), (4, (1,)), (16, (1,)), (256, (1,))],
}
"""Quantity -> steps of its ticks, the finest first: multiples of powers of a base."""
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


def draw(axes: Any, chart: Chart, look: dict[str, tuple[str, str]], *, named: bool = False) -> Callable[[], None]:
    """Draw a chart: a line for each implementation, a cross where it ran out of memory, dashes for closed forms.

    Args:
        axes: matplotlib's.
        chart: what to draw.
        look: of every implementation, as `looks` gives it.
        named: whether the title tells the case, where a picture has several.

    Returns:
        What writes the names and sees that all words fit, once the figure has been laid out and places on it are known.
    """
    lines = [line for line in chart.lines.values() if line.points]
    # Ours last, on top.
    for line in sorted(lines, key=lambda line: _family(line.name) in OURS_COLOURS):
        _draw_line(axes, line, look[line.name])
    what, unit = QUANTITY_TITLES[chart.quantity]
    axes.set(xscale="log", yscale="log", xlabel=chart.axis, ylabel=unit)
    told = [what] if chart.quantity == "saved_bytes" else [what, chart.title]
    words = ", ".join([*told, *(["predicted"] if chart.predicted else [])])
    title = axes.set_title(f"{chart.case}\n{words}" if named else words, fontsize=11, loc="left")
    axes.grid(alpha=0.25, which="major")
    axes.spines[["top", "right"]].set_visible(False)
    sizes = sorted({size for line in lines for size in line.points})
    _ticks(axes, chart.quantity, sizes)

    def finish() -> None:
        _shrink([title], *_extent(axes))
        _name(axes, lines, look)
        _thin(axes, sizes)

    return finish


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


def _ticks(axes: Any, quantity: str, sizes: Sequence[int]) -> None:
    """Sizes and values in the units that people say: 64K, 16 MiB."""
    _name_sizes(axes, sizes)
    axes.set_xticks([], minor=True)
    low, high = axes.get_ylim()
    widened = max(LEAST_SPAN * low / high, 1.0) ** 0.5
    low, high = low / widened, high * widened
    values = steps(low, high, quantity)
    if quantity == "p50_ms":
        labels = [f"{value:g}" for value in values]
    else:
        labels = [format_bytes(value).replace(".00", "").replace(".0 ", " ") for value in values]
    axes.set_yticks(values, labels)
    axes.set_yticks([], minor=True)
    axes.set_ylim(low, high)


def steps(low: float, high: float, quantity: str) -> list[float]:
    """Return where ticks of a quantity go: as many as there may be; three at least, where an axis spans LEAST_SPAN."""
    found: list[float] = []
    for base, parts in LADDERS[quantity]:
        first, last = (math.floor(math.log(value, base)) for value in (low, high))
        values = [part * float(base) ** power for power in range(first, last + 1) for part in parts]
        found = [value for value in values if low <= value <= high]
        if len(found) <= MOST_TICKS:
            break
    return found


def _name_sizes(axes: Any, sizes: Sequence[int]) -> None:
    axes.set_xticks(sizes, [short_count(size) for size in sizes], minor=False)


def _thin(axes: Any, sizes: Sequence[int]) -> None:
    """Name every second size, or every fourth, until the names of sizes do not touch."""
    while len(sizes) > 2:
        boxes = [label.get_window_extent().padded(3) for label in axes.get_xticklabels()]
        if not any(left.overlaps(right) for left, right in itertools.pairwise(boxes)):
            break
        sizes = sizes[::-2][::-1]
        _name_sizes(axes, sizes)


def short_count(count: int) -> str:
    """Return a count as people say it: 65536 -> '64K', 50176 -> '49K', 1000 -> '1000'."""
    for unit, power in (("G", 30), ("M", 20), ("K", 10)):
        if count >= 2**power and (count % 2**power == 0 or count >= 10 * 2**power):
            return f"{count / 2**power:.0f}{unit}"
    return str(count)


def _extent(axes: Any) -> tuple[float, float]:
    """Width and height, in points."""
    place, figure = axes.get_position(), axes.figure
    return place.width * figure.get_figwidth() * 72, place.height * figure.get_figheight() * 72


def _measured(text: Any) -> tuple[float, float]:
    """Width and height of words as they are drawn, in points; without the leader of an annotation."""
    from matplotlib.text import Text

    box = Text.get_window_extent(text)
    return box.width * 72 / text.figure.dpi, box.height * 72 / text.figure.dpi


def _shrink(texts: Sequence[Any], width: float, height: float) -> tuple[float, float]:
    """Make words so small that each fits into a width, and all below each other into a height; return the room of one."""
    while True:
        found = [_measured(text) for text in texts]
        widest, tallest = max(each[0] for each in found), max(each[1] for each in found) + 1
        points = texts[0].get_fontsize()
        if (widest <= width and tallest * len(texts) <= height) or points <= 4:
            return widest, tallest
        for text in texts:
            text.set_fontsize(points - 0.5)


def _name(axes: Any, lines: Sequence[Line], look: dict[str, tuple[str, str]]) -> None:
    """Write the names below each other, right of all that is drawn, and lead to each from its line's end."""
    texts = []
    for line in lines:
        colour, ours = look[line.name][0], _family(line.name) in OURS_COLOURS
        leader = {"arrowstyle": "-", "color": colour, "lw": 0.8, "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 3}
        text = axes.annotate(
            line.name, line.ordered[-1], xytext=(0, 0), textcoords="axes points", va="center", ha="left", color=colour,
            fontsize=LABEL_POINTS, fontweight="bold" if ours else "normal", annotation_clip=False, arrowprops=leader,
            zorder=1.5,
        )  # fmt: skip
        # The layout is made already, and shall not move for it.
        text.set_in_layout(False)
        texts.append(text)
    width, height = _extent(axes)
    widest, tallest = _shrink(texts, 0.5 * width, height)
    left = width - widest - 1
    _make_room(axes, lines, left - LEADER_POINTS, width)
    bottom, top = axes.get_ylim()
    ends = [math.log(line.ordered[-1][1] / bottom) / math.log(top / bottom) * height for line in lines]
    for text, middle in zip(texts, spread(ends, tallest, height), strict=True):
        text.xyann = (left, middle)


def _make_room(axes: Any, lines: Sequence[Line], right: float, width: float) -> None:
    """Let the largest size stand at a place, in points of the axes' width."""
    sizes = [size for line in lines for size in (*line.points, *line.closed)]
    low, high = min(sizes), max(sizes)
    scale = max(math.log(high / low), math.log(2)) / (right - MARGIN_POINTS)
    axes.set_xlim(low * math.exp(-MARGIN_POINTS * scale), low * math.exp((width - MARGIN_POINTS) * scale))


def spread(middles: Sequence[float], height: float, top: float) -> list[float]:
    """Return where labels go that are not to overlap: as near to their own places as a column lets them, in their order.

    Args:
        middles: their own places.
        height: of a label.
        top: of the column, which begins at 0.
    """
    order = sorted(range(len(middles)), key=lambda i: middles[i])
    # Without the labels below it a label's place must not be lower than theirs: neighbours that are share their mean.
    groups: list[list[float]] = []
    for rank, i in enumerate(order):
        groups.append([middles[i] - rank * height])
        while len(groups) > 1 and _mean(groups[-2]) > _mean(groups[-1]):
            last = groups.pop()
            groups[-1] += last
    free = [_mean(group) for group in groups for _ in group]
    placed = [0.0] * len(middles)
    for rank, (i, place) in enumerate(zip(order, free, strict=True)):
        placed[i] = max(min(place, top - (len(middles) - 0.5) * height), height / 2) + rank * height
    return placed


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
