"""PNG plots: memory against input size with the closed-form line, and times beside stock PyTorch's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perceiver_kernels.cli.report import CommandError

OURS_COLOURS = {"ours": "#0b6e4f", "ours-chunked": "#58b09c"}
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
    panels = [draw for draw, rows in ((_draw_memory, memory), (_draw_times, times)) if rows]
    figure = Figure(figsize=(6.4 * max(len(panels), 1), 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    for index, draw in enumerate(panels, start=1):
        draw(figure.add_subplot(1, len(panels), index), memory if draw is _draw_memory else times)
    figure.suptitle(title, fontsize=9)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=140)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror or error}") from error
    return f"plot: {path}"


def _draw_memory(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    colours = _colours(names)
    for which in dict.fromkeys(row["pass"] for row in rows):
        for name in names:
            mine = [row for row in rows if row["pass"] == which and row["implementation"] == name]
            measured = [
                (row["M"], row["peak_extra_bytes"]) for row in mine if row["peak_extra_bytes"] is not None
            ]
            if measured:
                label = f"{name}, {_title(which)}"
                axes.plot(
                    *zip(*measured, strict=True),
                    STYLES[which],
                    marker="o",
                    ms=3,
                    color=colours[name],
                    label=label,
                )
                if any("out of memory" in (row["failure"] or "") for row in mine):
                    axes.plot(*measured[-1], marker="x", ms=9, mew=2, color=colours[name])
    bound = sorted({(row["M"], row["predicted_bytes"]) for row in rows if row["predicted_bytes"]})
    if bound:
        label = "closed form: itemsize x C_padded + 16 bytes per token"
        axes.plot(*zip(*bound, strict=True), ":", color="black", label=label)
    axes.set(xscale="log", yscale="log", xlabel="inputs M", ylabel="extra peak bytes")
    axes.set_title("memory (x: the next size is out of memory)", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=6, handlelength=4)


def _draw_times(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    timed = [row for row in rows if row.get("p50_ms") is not None]
    names = list(dict.fromkeys(row["implementation"] for row in timed))
    colours = _colours(names)
    passes = list(dict.fromkeys(row["pass"] for row in timed))
    places = []
    for i_pass, which in enumerate(passes):
        for i_name, name in enumerate(names):
            row = next((row for row in timed if row["pass"] == which and row["implementation"] == name), None)
            if row is None:
                continue
            place = i_pass * (len(names) + 1) + i_name
            places.append((place, f"{name}, {_title(which)}"))
            spread = [[row["p50_ms"] - row["p20_ms"]], [row["p80_ms"] - row["p50_ms"]]]
            axes.barh(place, row["p50_ms"], xerr=spread, color=colours[name])
            axes.text(row["p80_ms"], place, f" {row['p50_ms']:.3g}", va="center", fontsize=7)
    axes.set_yticks([place for place, _ in places], [label for _, label in places], fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel="ms (median, whiskers p20 to p80)")
    axes.margins(x=0.15)
    axes.set_title("whole cross-attention layer", fontsize=9)


def _title(which: str) -> str:
    return {"forward": "forward", "backward": "forward + backward"}.get(which, which)


def _colours(names: Sequence[str]) -> dict[str, str]:
    stock = [name for name in names if name not in OURS_COLOURS]
    chosen = {name: STOCK_COLOURS[i % len(STOCK_COLOURS)] for i, name in enumerate(stock)}
    return {name: OURS_COLOURS.get(name) or chosen[name] for name in names}
