"""Plots: one colour for one implementation, and words that are true of what is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from perceiver_kernels.cli import plot

figure_module = pytest.importorskip("matplotlib.figure")
colors = pytest.importorskip("matplotlib.colors")


def memory_row(name: str, M: int, peak: int | None) -> dict[str, Any]:
    return {
        "implementation": name, "pass": "forward", "M": M, "shape": {"B": 1, "M": M}, "peak_extra_bytes": peak,
        "failure": None if peak else "out of memory: needs much", "predicted_bytes": None,
    }  # fmt: skip


def times_row(name: str, which: str, ms: float) -> dict[str, Any]:
    spread = {"p20_ms": 0.9 * ms, "p50_ms": ms, "p80_ms": 3 * ms}
    return {"implementation": name, "pass": which, "shape": {"B": 2, "M": 4096}, **spread}


@pytest.fixture
def panels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The axes of a figure with both panels."""
    figures: list[Any] = []
    save = figure_module.Figure.savefig
    monkeypatch.setattr(
        figure_module.Figure,
        "savefig",
        lambda figure, *a, **k: (figures.append(figure), save(figure, *a, **k)),
    )
    memory = [memory_row(name, M, 100 * M) for name in ("ours", "flash") for M in (10, 100)]
    memory.append(memory_row("flash", 1000, None))
    times = [
        times_row(name, which, ms)
        for which in ("forward", "backward")
        for name, ms in (("ours", 1.5), ("eager", 12.25), ("flash", 3.0))
    ]
    told = plot.save(tmp_path / "plot", memory=memory, times=times, title="widths")
    assert told == f"plot: {tmp_path / 'plot'}"
    assert (tmp_path / "plot").read_bytes().startswith(b"\x89PNG")
    return figures[0].axes


def test_an_implementation_has_one_colour(panels: list[Any]) -> None:
    """Colours were dealt out by panel: flash was the first stock implementation of one, the second of the other."""
    memory, times = panels
    lines = {line.get_label(): colors.to_hex(line.get_color()) for line in memory.lines}
    bars = [colors.to_hex(bar.get_facecolor()) for bar in times.patches]
    assert bars[0] == bars[3] == lines["ours, forward"]
    assert bars[2] == bars[5] == lines["flash, forward"]
    assert len({bars[0], bars[1], bars[2]}) == 3


def test_each_panel_tells_its_own_batch(panels: list[Any]) -> None:
    memory, times = panels
    assert memory.get_title() == "memory of a layer, B=1"
    assert times.get_title() == "time of a layer, B=2, 4,096 inputs"
    assert [text.get_text() for text in memory.figure.texts] == ["widths"]


def test_medians_are_named_where_the_bars_are(panels: list[Any]) -> None:
    """The median was written at p80, where it read as p80."""
    _, times = panels
    assert list(times.texts) == []
    assert [label.get_text() for label in times.get_yticklabels()][:2] == [
        "ours, forward: 1.50 ms",
        "eager, forward: 12.2 ms",
    ]
    assert list(times.get_yticks()) == [0, 1, 2, 4, 5, 6]


def test_the_legend_explains_the_cross(panels: list[Any]) -> None:
    memory, _ = panels
    (cross,) = [line for line in memory.lines if line.get_label() == "out of memory at the next size"]
    assert [(float(x), float(y)) for x, y in zip(*cross.get_data(), strict=True)] == [(100.0, 10_000.0)]
    assert cross.get_label() in [text.get_text() for text in memory.get_legend().get_texts()]
