"""Lines against a size, out of the rows of reports: which rows belong together, what is swept, where a line ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from perceiver_kernels.cli.regimes import REGIMES

AXES = {"M": "inputs M", "O": "output queries O", "Lk": "keys", "Lq": "queries"}
"""What a sweep can vary -> its name on an axis."""
KINDS = {"bench": ("p50_ms", "peak_extra_bytes"), "memory": ("peak_extra_bytes", "saved_bytes")}
"""Kinds of rows -> what is drawn of them."""
QUANTITIES = {"p50_ms": None, "peak_extra_bytes": "predicted_bytes", "saved_bytes": "predicted_saved_bytes"}
"""What is drawn, in this order -> the closed form beside it."""
PASSES = {"forward": "forward", "backward": "forward + backward"}
"""Titles of a layer's passes, in rows that name no regime."""


@dataclass
class Line:
    """One implementation: points by size, those of its closed form, and the sizes for which memory was too small."""

    name: str
    points: dict[int, float] = field(default_factory=dict)
    closed: dict[int, float] = field(default_factory=dict)
    exhausted: set[int] = field(default_factory=set)
    predicted: bool = False

    @property
    def ordered(self) -> list[tuple[int, float]]:
        return sorted(self.points.items())

    @property
    def out_of_memory(self) -> bool:
        """Whether the line ends because memory did."""
        return bool(self.points) and any(size > max(self.points) for size in self.exhausted)


@dataclass
class Chart:
    """All implementations of one quantity of one pass of one case.

    Args:
        quantity: of QUANTITIES.
        which: name of the pass.
        title: of the pass, as words.
        axis: what is swept, as words.
        case: the case, the sizes that stay and the dtype.
        devices: where its lines were measured.
    """

    quantity: str
    which: str
    title: str
    axis: str
    case: str
    devices: list[str] = field(default_factory=list)
    lines: dict[str, Line] = field(default_factory=dict)

    @property
    def predicted(self) -> bool:
        """Whether all that is drawn is."""
        return all(line.predicted for line in self.lines.values() if line.points)


def charts(reports: Sequence[dict[str, Any]]) -> list[Chart]:
    """Return what reports have to draw against a size; later reports replace points of earlier ones.

    Args:
        reports: as `reading.load` gives them, or as `Report.content` holds them.

    Returns:
        Charts of at least two sizes, time before memory. Where several devices meet in one, lines are named by theirs too.
    """
    devices = [device_of(report) for report in reports]
    several = len(set(devices)) > 1
    found: dict[tuple[Any, ...], Chart] = {}
    for report, device in zip(reports, devices, strict=True):
        for rows in _by_problem(report):
            varied = _varied(rows)
            if not varied:
                continue
            problem = _problem(rows[0], report.get("dtype"), varied)
            for row in rows:
                for quantity in KINDS[row["kind"]]:
                    _add(found, row, quantity, varied[0], problem, device, several)
    order = list(QUANTITIES)
    drawn = [chart for chart in found.values() if any(line.points for line in chart.lines.values())]
    return sorted(drawn, key=lambda chart: (chart.case, order.index(chart.quantity)))


def device_of(report: dict[str, Any]) -> str:
    """Return the name of the device that a report was measured on."""
    if report.get("predicted"):
        return "fake tensors"
    environment = report.get("environment")
    gpus = environment.get("gpus") if isinstance(environment, dict) else None
    on_gpu = "cuda" in str(report.get("memory_method", "cuda"))
    if isinstance(gpus, list) and gpus and isinstance(gpus[0], dict) and on_gpu:
        return str(gpus[0].get("name", "GPU"))
    return "CPU"


def _by_problem(report: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The rows to draw, together where they differ in sizes that a sweep can vary alone."""
    problems: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in report["rows"]:
        if row.get("kind") in KINDS and isinstance(row.get("shape"), dict) and "implementation" in row and "pass" in row:
            problems.setdefault(_problem(row, report.get("dtype"), tuple(AXES)), []).append(row)
    return list(problems.values())


def _varied(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Which sizes differ between the rows; of queries and keys that grow together the keys come first."""
    return [name for name in AXES if len({row["shape"].get(name) for row in rows} - {None}) > 1]


def _problem(row: dict[str, Any], dtype: str | None, varied: Sequence[str]) -> tuple[Any, ...]:
    """What tells charts apart: the case, the sizes that stay, and the dtype, which older reports hold beside their rows."""
    sizes = tuple((name, size) for name, size in row["shape"].items() if name not in varied)
    return str(row.get("case", "")), sizes, row.get("dtype", dtype)


def _case_title(problem: tuple[Any, ...]) -> str:
    case, sizes, dtype = problem
    return f"{case}: {', '.join([*(f'{name}={size}' for name, size in sizes), *([dtype] if dtype else [])])}"


def pass_title(row: dict[str, Any]) -> str:
    """Return what a row's pass is, in the words of its regime."""
    regime, which = REGIMES.get(row.get("regime", "")), row["pass"]
    known = regime.passes if regime else {}
    return known[which].title.removeprefix("layer, ") if which in known else PASSES.get(which, which)


def _add(
    found: dict[tuple[Any, ...], Chart], row: dict[str, Any], quantity: str, axis: str, problem: tuple[Any, ...],
    device: str, several: bool,
) -> None:  # fmt: skip
    size, value, failure = row["shape"].get(axis), row.get(quantity), row.get("failure")
    if size is None:
        return
    # Regimes have passes of one name that are not the same, attention alone and whole layers; their words differ.
    title = pass_title(row)
    key = (problem, axis, quantity, row["pass"], title)
    chart = found.setdefault(key, Chart(quantity, row["pass"], title, AXES[axis], _case_title(problem)))
    name = f"{row['implementation']}, {device}" if several else row["implementation"]
    line = chart.lines.setdefault(name, Line(name))
    line.predicted |= bool(row.get("predicted"))
    if str(failure or "").startswith("out of memory"):
        line.exhausted.add(size)
    if device not in chart.devices:
        chart.devices.append(device)
    # Logarithms have no zero: what keeps nothing has no line.
    if isinstance(value, (int, float)) and value > 0:
        line.points[size] = value
    closed = row.get(QUANTITIES[quantity] or "")
    if isinstance(closed, (int, float)) and closed > 0:
        line.closed[size] = closed
