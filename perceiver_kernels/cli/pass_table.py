"""The table of one pass: a line for every implementation that ran, a sentence for every one that did not."""

from __future__ import annotations

from typing import Any

from perceiver_kernels.cli.console import Console, format_bytes, format_ms
from perceiver_kernels.cli.measure import kernel_name
from perceiver_kernels.cli.subject import OWN

COLUMNS = (
    "implementation",
    "ms",
    "p20..p80",
    "host us",
    "TFLOP/s",
    "GB/s",
    "of floor",
    "extra memory",
    "error",
    "eager's",
)
SPARE_COLUMNS = ("GB/s", "host us", "p20..p80", "extra memory", "of floor")
"""Left out, in this order, where a line has no room for all."""
MOST_KERNELS = 6
"""So many are told by name, the longest first; JSON has all."""


def show(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    """Print the rows of one pass; what failed or was inaccurate is told below."""
    console.line(f"\n{title}")
    console.table(COLUMNS, [_cells(row) for row in rows if not (row["failure"] and _is_peer(row))], SPARE_COLUMNS)
    for row in rows:
        if row["failure"] and not _is_peer(row):
            console.warn(f"{row['case']} {row['pass']} {row['implementation']}: {row['failure']}")
        elif row["failure"]:
            console.line(f"  {row['implementation']} cannot: {row['failure']}")
        elif row.get("inaccurate"):
            console.line(f"  {row['implementation']} is inaccurate: {row['inaccurate']}")
        if kernels := row.get("kernels"):
            told = ", ".join(_kernel(entry) for entry in kernels[:MOST_KERNELS])
            more = f" and {len(kernels) - MOST_KERNELS} more" if len(kernels) > MOST_KERNELS else ""
            console.line(f"  kernels of {row['implementation']}: {told}{more}")


def _kernel(entry: dict[str, Any]) -> str:
    launches = "" if entry["launches"] == 1 else f" ({entry['launches']:g} launches)"
    return f"{kernel_name(entry['kernel'])} {format_ms(entry['us'] / 1e3)}{launches}"


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _is_peer(row: dict[str, Any]) -> bool:
    return row["implementation"] not in OWN


def _cells(row: dict[str, Any]) -> list[Any]:
    if "p50_ms" not in row:
        return [row["implementation"], *([None] * (len(COLUMNS) - 1))]
    errors, eager = row.get("errors", {}), row.get("eager_errors", {})
    worst = max(errors, key=lambda name: errors[name], default=None)
    return [
        row["implementation"],
        format_ms(row["p50_ms"]),
        f"{format_ms(row['p20_ms'])}..{format_ms(row['p80_ms'])}",
        "-" if row["host_us"] is None else f"{row['host_us']:.0f}",
        f"{row['tflops']:.3g}" if row["flops"] else "-",
        _rate(row["gbytes_per_s"]),
        f"{100 * row['of_floor']:.0f} %",
        format_bytes(row["peak_extra_bytes"]),
        f"{errors[worst]:.2g}" if worst else "-",
        f"{eager[worst]:.2g}" if worst else "-",
    ]
