"""PNG plots: memory against input size with the closed-form line, and times beside stock PyTorch's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from perceiver_kernels.cli.console import format_ms
from perceiver_kernels.cli.report import CommandError

OURS_COLOURS = {"ours": "#0b6e4f", "ours-chunked": "#58b09c", "ours-triton": "#9fd0c2"}
STOCK_COLOURS = ("#b3541e", "#d9a05b", "#7a5195", "#5b84b1", "#8c8c8c", "#c2577b", "#a3a847")
STYLES = {"forward": "--", "backward": "-"}


def save(
    path: Path,
    *,
    memory: Sequence[dict[str, Any]] = (),
    times: Sequence[dict[str, Any]] = (),
    title: str = "",
) -> str:
    """Draw what there is and return one sentence that says where, or why there is no plot.

    Args:
        path: PNG to write.
        memory: rows of the memory sweep.
        times: rows of the benchmark.
        title: above the figure.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        return f"plot skipped: matplotlib is not installed ({error})"
    colours = _colours(dict.fromkeys(row["implementation"] for row in [*memory, *times]))
    panels = [(draw, rows) for draw, rows in ((_draw_memory, memory), (_draw_times, times)) if rows]
    figure = Figure(figsize=(6.4 * max(len(panels), 1), 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    for index, (draw, rows) in enumerate(panels, start=1):
        draw(figure.add_subplot(1, len(panels), index), rows, colours)
    figure.suptitle(title, fontsize=9)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", dpi=140)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror or error}") from error
    return f"plot: {path}"


def _draw_memory(axes: Any, rows: Sequence[dict[str, Any]], colours: dict[str, str]) -> None:
    ends = []
    for which in dict.fromkeys(row["pass"] for row in rows):
        for name in dict.fromkeys(row["implementation"] for row in rows):
            mine = [row for row in rows if row["pass"] == which and row["implementation"] == name]
            measured = [
                (row["M"], row["peak_extra_bytes"]) for row in mine if row["peak_extra_bytes"] is not None
            ]
            if measured:
                axes.plot(
                    *zip(*measured, strict=True), STYLES[which], marker="o", ms=3, color=colours[name],
                    label=f"{name}, {_title(which)}",
                )  # fmt: skip
                if any("out of memory" in (row["failure"] or "") for row in mine):
                    ends.append(measured[-1])
    if ends:
        label = "out of memory at the next size"
        axes.plot(*zip(*ends, strict=True), "x", ms=9, mew=2, color="black", label=label)
    bound = sorted({(row["M"], row["predicted_bytes"]) for row in rows if row["predicted_bytes"]})
    if bound:
        label = "closed form: itemsize x C_padded + 16 bytes per token"
        axes.plot(*zip(*bound, strict=True), ":", color="black", label=label)
    axes.set(xscale="log", yscale="log", xlabel="inputs M", ylabel="extra peak bytes")
    axes.set_title(f"memory of a layer, B={rows[0]['shape']['B']}", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=6, handlelength=4)


def _draw_times(axes: Any, rows: Sequence[dict[str, Any]], colours: dict[str, str]) -> None:
    timed = [row for row in rows if row.get("p50_ms") is not None]
    ticks: dict[int, str] = {}
    for which in dict.fromkeys(row["pass"] for row in timed):
        # An empty place stands between the passes.
        start = max(ticks, default=-2) + 2
        for place, row in enumerate((row for row in timed if row["pass"] == which), start):
            spread = [[row["p50_ms"] - row["p20_ms"]], [row["p80_ms"] - row["p50_ms"]]]
            axes.barh(place, row["p50_ms"], xerr=spread, color=colours[row["implementation"]])
            ticks[place] = f"{row['implementation']}, {_title(which)}: {format_ms(row['p50_ms'])} ms"
    axes.set_yticks(list(ticks), list(ticks.values()), fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel="ms (median, whiskers p20 to p80)")
    axes.set_title(
        f"time of a layer, B={rows[0]['shape']['B']}, {rows[0]['shape']['M']:,} inputs", fontsize=9
    )


def _title(which: str) -> str:
    return {"forward": "forward", "backward": "forward + backward"}.get(which, which)


def _colours(names: Iterable[str]) -> dict[str, str]:
    """One colour for each implementation, the same in every panel."""
    stock = [name for name in names if name not in OURS_COLOURS]
    chosen = {name: STOCK_COLOURS[i % len(STOCK_COLOURS)] for i, name in enumerate(stock)}
    return OURS_COLOURS | chosen
