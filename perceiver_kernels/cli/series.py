"""Lines against a size, out of the rows of reports: which rows belong together, what is swept, where a line ends."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
        case: the case and the sizes that stay.
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
        return any(line.predicted for line in self.lines.values())


def charts(reports: Sequence[dict[str, Any]]) -> list[Chart]:
    """Return what reports have to draw against a size; later reports replace points of earlier ones.

    Args:
        reports: as `reading.load` gives them, or as `Report.content` holds them.

    Returns:
        Charts of at least two sizes, time before memory. Where several devices meet in one, lines are named by theirs too.
    """
    devices = [device_of(report) for report in reports]
    several = len(set(devices)) > 1
    found: dict[tuple[str, ...], Chart] = {}
    for report, device in zip(reports, devices, strict=True):
        for case, rows in _by_case(report["rows"]).items():
            axis = _axis(rows)
            if axis is None:
                continue
            for row in rows:
                for quantity in KINDS[row["kind"]]:
                    _add(found, row, quantity, axis, (case, _case_title(case, rows[0])), device, several)
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


def _by_case(rows: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    cases: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row.get("kind") in KINDS and isinstance(row.get("shape"), dict) and "implementation" in row and "pass" in row:
            cases.setdefault(str(row.get("case", "")), []).append(row)
    return cases


def _axis(rows: Sequence[dict[str, Any]]) -> str | None:
    """Which size differs between the rows; of queries and keys that grow together the keys."""
    varied = [name for name in AXES if len({row["shape"].get(name) for row in rows} - {None}) > 1]
    return varied[0] if varied else None


def _case_title(case: str, row: dict[str, Any]) -> str:
    sizes = ", ".join(f"{name}={size}" for name, size in row["shape"].items() if name not in AXES)
    dtype = f", {row['dtype']}" if "dtype" in row else ""
    return f"{case}: {sizes}{dtype}"


def pass_title(row: dict[str, Any]) -> str:
    """Return what a row's pass is, in the words of its regime."""
    regime, which = REGIMES.get(row.get("regime", "")), row["pass"]
    known = regime.passes if regime else {}
    return known[which].title.removeprefix("layer, ") if which in known else PASSES.get(which, which)


def _add(
    found: dict[tuple[str, ...], Chart], row: dict[str, Any], quantity: str, axis: str, case: tuple[str, str], device: str,
    several: bool,
) -> None:  # fmt: skip
    size, value, failure = row["shape"].get(axis), row.get(quantity), row.get("failure")
    if size is None:
        return
    key = (case[0], axis, quantity, row["pass"])
    chart = found.setdefault(key, Chart(quantity, row["pass"], pass_title(row), AXES[axis], case[1]))
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
