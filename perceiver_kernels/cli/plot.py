"""`perceiver-kernels plot`: pictures of the reports that `bench --sizes` and `memory` write, time and memory against a size."""

from __future__ import annotations

import argparse
import importlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from perceiver_kernels.cli import curves, options, reading, series
from perceiver_kernels.cli.console import Console, format_ms
from perceiver_kernels.cli.report import CommandError, Report, check_apart, check_writable
from perceiver_kernels.cli.series import Chart

HELP = "draw time and memory against a size, from reports that `bench --sizes` and `memory` wrote with --json"
SUFFIXES = (".png", ".svg")
SKIPPED = "plot skipped"
Panel = Callable[[Any], Callable[[], None]]
"""Draws on axes and returns what is left to do once the figure has been laid out."""
DOTS_PER_INCH = 100
WIDTH, HEIGHT = 12.0, 4.6
"""Of two charts side by side, in inches: 1,200 dots wide."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "reports", type=options.path, nargs="+", metavar="FILE.json",
        help="reports of several sizes; of the same case, fixed sizes and dtype they go into the same charts",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=options.path, action=options.Once, required=True, metavar="PATH",
        help="the picture: its name ends in .png or .svg",
    )  # fmt: skip


def execute(arguments: argparse.Namespace, console: Console) -> int:
    """Draw reports into one picture."""
    path = Path(arguments.output)
    for name in arguments.reports:
        check_apart({"FILE.json": name, "--output": arguments.output, "--json": arguments.json})
    reports = [reading.load(Path(name), "FILE.json") for name in arguments.reports]
    for name, report in zip(arguments.reports, reports, strict=True):
        if not series.charts([report]):
            raise CommandError(f"{name} has no sizes to draw: one of {', '.join(series.AXES)} must differ between its rows")
    check_picture(path)
    told = draw(path, reports)
    if told.startswith(SKIPPED):
        raise CommandError(told)
    console.line(told)
    with Report("plot", arguments.json) as report:
        report.set(picture=str(path), reports=arguments.reports)
        for chart in series.charts(reports):
            report.add(kind="chart", quantity=chart.quantity, case=chart.case, lines=list(chart.lines), **{"pass": chart.which})
    return 0


def check_picture(path: Path, sizes: Sequence[int] | None = None) -> None:
    """Raise the CommandError of a picture that cannot be drawn or written, before the work.

    Args:
        path: where it goes; its end must name a known kind.
        sizes: what is to be drawn against; None where it is drawn from reports.
    """
    check_writable(path)
    if path.suffix.lower() not in SUFFIXES:
        raise CommandError(f"a picture's name must end in {' or '.join(SUFFIXES)}, got {path}")
    if sizes is not None and len(sizes) < 2:
        raise CommandError(f"argument --plot: must have two sizes at least to draw, got {', '.join(map(str, sizes))}")
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise CommandError(f"cannot draw {path}: matplotlib is not installed ({error})") from None


def draw(path: Path, reports: Sequence[dict[str, Any]]) -> str:
    """Draw every chart of reports and return one sentence that says where, or why there is no picture.

    Args:
        path: PNG or SVG to write.
        reports: as `reading.load` gives them.
    """
    charts = series.charts(reports)
    if not charts:
        return f"{SKIPPED}: fewer than two sizes"
    # What ran at no size has no line, and shall not use up a colour.
    look = curves.looks(name for chart in charts for name, line in chart.lines.items() if line.points)
    cases = list(dict.fromkeys(chart.case for chart in charts))
    devices = list(dict.fromkeys(device for chart in charts for device in chart.devices))
    several = len(cases) > 1
    title = " and ".join(devices) if several else f"{' and '.join(devices)}; {cases[0]}"
    panels: list[Panel] = [lambda axes, chart=chart: curves.draw(axes, chart, look, named=several) for chart in charts]
    return _save(path, panels, title, _notes(charts), "; ".join(map(origin, reports)))


def origin(report: dict[str, Any]) -> str:
    """Return what a picture says in its file of a report that it was drawn from."""
    return f"{report.get('command')} of {report.get('started')}"


def save(
    path: Path,
    *,
    memory: Sequence[dict[str, Any]] = (),
    times: Sequence[dict[str, Any]] = (),
    title: str = "",
) -> str:
    """Draw the main job's picture: memory against the number of inputs, and times of one size as bars.

    Args:
        path: PNG or SVG to write.
        memory: rows of the memory sweep.
        times: rows of the benchmark.
        title: above the figure.

    Returns:
        One sentence that says where the picture is, or why there is none.
    """
    charts = [chart for chart in series.charts([{"rows": memory}]) if chart.quantity == "peak_extra_bytes"]
    look = curves.looks(row["implementation"] for row in [*memory, *times])
    panels: list[Panel] = [lambda axes, chart=chart: curves.draw(axes, chart, look) for chart in charts]
    if times:
        panels.append(lambda axes: _draw_times(axes, times, look))
    return _save(path, panels, title, _notes(charts))


def _notes(charts: Sequence[Chart]) -> str:
    """What dashes and crosses mean, where there are any."""
    lines = [line for chart in charts for line in chart.lines.values() if line.points]
    notes = ["dashed lines are predicted with fake tensors"] if any(line.predicted for line in lines) else []
    closed = dict.fromkeys("dotted" if line.predicted else "thin dashes" for line in lines if line.closed)
    if closed:
        notes.append(f"{' or '.join(closed)}: closed form")
    if any(line.out_of_memory for line in lines):
        notes.append("cross: out of memory at the next size")
    return "; ".join(notes)


def _save(path: Path, panels: Sequence[Panel], title: str, notes: str, source: str = "") -> str:
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        return f"{SKIPPED}: matplotlib is not installed ({error})"
    columns = min(len(panels), 2)
    rows = math.ceil(len(panels) / max(columns, 1))
    # Text stays text in SVG, which readers can search and select.
    with rc_context({"svg.fonttype": "none"}):
        figure = Figure(figsize=(WIDTH, HEIGHT * rows + 0.5), layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(title, fontsize=11, wrap=True)
        figure.supxlabel(notes, fontsize=9, color="#444444")
        drawn = [(figure.add_subplot(rows, columns, index), panel) for index, panel in enumerate(panels, start=1)]
        names = [panel(axes) for axes, panel in drawn]
        figure.draw_without_rendering()
        for write in names:
            write()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            described = {"Description": source} if source else {}
            figure.savefig(path, format=path.suffix.lower().lstrip("."), dpi=DOTS_PER_INCH, metadata=described)
        except OSError as error:
            raise CommandError(f"cannot write {path}: {error.strerror or error}") from error
    return f"plot: {path}"


def _draw_times(axes: Any, rows: Sequence[dict[str, Any]], look: dict[str, tuple[str, str]]) -> Callable[[], None]:
    timed = [row for row in rows if row.get("p50_ms") is not None]
    ticks: dict[int, str] = {}
    for which in dict.fromkeys(row["pass"] for row in timed):
        # The name of a pass stands in a place of its own: beside each bar it took most of the picture.
        start = max(ticks, default=-1) + 2
        for place, row in enumerate((row for row in timed if row["pass"] == which), start):
            spread = [[row["p50_ms"] - row["p20_ms"]], [row["p80_ms"] - row["p50_ms"]]]
            axes.barh(place, row["p50_ms"], xerr=spread, color=look[row["implementation"]][0])
            ticks[place] = f"{row['implementation']}: {format_ms(row['p50_ms'])} ms"
        title = series.pass_title(next(row for row in timed if row["pass"] == which))
        axes.text(
            0.01, start - 1, title, transform=axes.get_yaxis_transform(), va="center", fontsize=9, fontweight="bold"
        )
    axes.set_yticks(list(ticks), list(ticks.values()), fontsize=9)
    # The first at the top, below the panel's title; a bar is 0.8 high.
    axes.set_ylim(max(ticks, default=0) + 0.6, -0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(xlabel="ms (median, whiskers p20 to p80)")
    axes.set_title(
        f"time of a layer, B={rows[0]['shape']['B']}, {rows[0]['shape']['M']:,} inputs", fontsize=11, loc="left"
    )
    return lambda: None
