"""A report beside an older one: the same rows, how their time and memory changed, and which of them are regressions.

Rows are the same where kind, regime, case, pass, implementation, dtype and sizes are. What only one of two rows tells is not
compared: older reports hold the dtype beside the rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from perceiver_kernels.cli.console import Console, format_bytes, format_ms
from perceiver_kernels.cli.subject import OWN

TOLERANCE = 5.0
"""Percent: medians of one machine differ by less from run to run."""
FIGURES = {"p50_ms": ("ms", format_ms), "peak_extra_bytes": ("memory", format_bytes)}
COLUMNS = ("case", "pass", "implementation", "sizes", "figure", "old", "new", "new / old", "")


@dataclass(frozen=True)
class Change:
    """One figure of one row, then and now.

    Args:
        row: as it is now.
        figure: of FIGURES, or "failure".
        old, new: the figure; None where the row failed.
        ratio: new over old; infinite where the row fails now, 0 where it failed then.
    """

    row: dict[str, Any]
    figure: str
    old: float | None
    new: float | None
    ratio: float

    def is_regression(self, tolerance: float) -> bool:
        """Whether it grew by more than so many percent."""
        return self.ratio > 1 + tolerance / 100

    @property
    def is_ours(self) -> bool:
        return self.row.get("implementation") in OWN or self.row.get("implementation") is None


def changes(old: dict[str, Any], new: dict[str, Any]) -> tuple[list[Change], int, int]:
    """Join two reports.

    Returns:
        What changed, the worst first; how many rows the old report alone has, and how many the new one.
    """
    pairs, gone, fresh = _joined(old, new)
    return _changes_of(pairs), gone, fresh


def _changes_of(pairs: Iterable[tuple[dict[str, Any], dict[str, Any]]]) -> list[Change]:
    """What changed between rows that are the same, the worst first."""
    found = [change for was, row in pairs for change in _changed(was, row)]
    return sorted(found, key=lambda change: -change.ratio)


def _joined(old: dict[str, Any], new: dict[str, Any]) -> tuple[list[tuple[dict[str, Any], dict[str, Any]]], int, int]:
    """The rows that are the same, older first; how many rows the old report alone has, and how many the new one."""
    before: dict[tuple[Any, ...], list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    older, newer = ([row for row in report["rows"] if "kind" in row] for report in (old, new))
    for row in older:
        before.setdefault(_names(row), []).append((row, _sizes(row, old)))
    pairs = []
    for row in newer:
        mine = _sizes(row, new)
        same = next((was for was, sizes in before.get(_names(row), []) if _agree(mine, sizes)), None)
        if same is not None:
            pairs.append((same, row))
    return pairs, len(older) - len({id(was) for was, _ in pairs}), len(newer) - len(pairs)


def show(old: dict[str, Any], new: dict[str, Any], console: Console, tolerance: float | None = None) -> bool:
    """Print the comparison and return whether a row of ours became worse than tolerated, or nothing could be compared.

    Args:
        old, new: reports.
        console: where it goes.
        tolerance: percent; TOLERANCE when None.
    """
    limit = TOLERANCE if tolerance is None else tolerance
    pairs, gone, fresh = _joined(old, new)
    found = _changes_of(pairs)
    console.heading(f"Beside the report of {old.get('started', 'an unknown day')}")
    for told, read in CONDITIONS.items():
        then, now = read(old), read(new)
        if None not in (then, now) and then != now:
            console.warn(f"{told}: {then} then, {now} now")
    if not pairs:
        console.warn("no row of this run is in the older report")
        return True
    _warn_of_backends(pairs, console)
    if found:
        console.table(COLUMNS, [_cells(change, limit) for change in found], spare=("sizes",))
    worse = [change for change in found if change.is_regression(limit)]
    ours = sum(change.is_ours for change in worse)
    console.line(
        f"{len(worse)} of {len(found)} figures are over {limit:g} % worse, {ours} of them ours; "
        f"{gone} older rows were not measured now, {fresh} are new"
    )
    return ours > 0


def _warn_of_backends(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]], console: Console) -> None:
    """Print one warning where rows of ours were of another backend then."""
    differing = [
        (was, row) for was, row in pairs
        if row.get("implementation") in OWN and None not in (was.get("backend"), row.get("backend"))
        and was["backend"] != row["backend"]
    ]  # fmt: skip
    if differing:
        was, row = differing[0]
        first = f"{row.get('case')}, {row.get('pass')}: {was['backend']} then, {row['backend']} now"
        console.warn(f"{len(differing)} rows of ours are of another backend, the first {first}")


def device_of(report: dict[str, Any]) -> str:
    """Return the name of the GPU that a report was measured on, or that of the CPU."""
    environment = report.get("environment", {})
    gpus = environment.get("gpus")
    if gpus and isinstance(gpus, list) and report.get("device", "cuda") == "cuda":
        return str(gpus[0].get("name"))
    cpu = environment.get("cpu")
    return f"a CPU with {cpu.get('cores')} cores" if isinstance(cpu, dict) else "an unknown device"


def _version(name: str) -> Callable[[dict[str, Any]], str | None]:
    """The version of a package, where a report tells it."""

    def read(report: dict[str, Any]) -> str | None:
        found = report.get("environment", {}).get(name)
        found = found.get("version") if isinstance(found, dict) else found
        return None if found is None else str(found)

    return read


def _value(name: str) -> Callable[[dict[str, Any]], str | None]:
    return lambda report: report.get(name)


CONDITIONS: dict[str, Callable[[dict[str, Any]], str | None]] = {
    "measured on another device": device_of,
    "measured with another perceiver-kernels": _version("perceiver_kernels"),
    "measured with another torch": _version("torch"),
    "measured with another triton": _version("triton"),
    "measured in another dtype": _value("dtype"),
    "times are of another method": _value("time_method"),
    "memory is of another method": _value("memory_method"),
}
"""What figures depend on beside the code: the warning where it differs -> how a report tells it; None where it does not."""


def _names(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("kind", "case", "pass", "implementation"))


def _sizes(row: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    whole = {"regime": row.get("regime"), "dtype": row.get("dtype", report.get("dtype"))}
    whole |= {name: row.get(name) for name in ("M", "chunk")}
    sizes = {**whole, **row.get("shape", {})}
    return {name: size for name, size in sizes.items() if size is not None}


def _agree(mine: dict[str, Any], theirs: dict[str, Any]) -> bool:
    return all(mine[name] == theirs[name] for name in mine.keys() & theirs.keys())


def _changed(was: dict[str, Any], row: dict[str, Any]) -> Iterable[Change]:
    if was.get("failure") or row.get("failure"):
        if bool(was.get("failure")) != bool(row.get("failure")):
            yield Change(row, "failure", None, None, math.inf if row.get("failure") else 0.0)
        return
    for figure in FIGURES:
        old, new = was.get(figure), row.get(figure)
        if old is not None and new is not None:
            yield Change(row, figure, old, new, new / old if old > 0 else math.inf if new > 0 else 1.0)


def _cells(change: Change, tolerance: float) -> list[Any]:
    row, mark = change.row, "REGRESSION" if change.is_regression(tolerance) else ""
    shape = row.get("shape", {})
    sizes = "x".join(str(shape[name]) for name in ("B", "M", "Lq", "Lk") if name in shape) or str(row.get("M", "-"))
    labels = [row.get("case"), row.get("pass"), row.get("implementation"), sizes]
    if change.figure == "failure":
        old, new = ("yes", "no") if row["failure"] else ("no", "yes")
        return [*labels, "runs", old, new, None, f"{mark}: {row['failure']}" if row["failure"] else ""]
    name, told = FIGURES[change.figure]
    return [*labels, name, told(change.old), told(change.new), f"{change.ratio:.3f}", mark]
