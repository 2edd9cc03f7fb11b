"""Rows of a report as CSV: one line each, the same columns whatever was measured."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from typing import Any

SHAPE = ("B", "H", "M", "C", "N", "D", "Lq", "Lk", "d_qk", "d_v")
COLUMNS = (
    "kind", "regime", "case", "pass", "implementation", "method", "backend", "dtype", *SHAPE, "p20_ms", "p50_ms", "p80_ms",
    "samples", "host_us", "flops", "tflops", "bytes", "gbytes_per_s", "floor_ms", "of_floor", "peak_extra_bytes", "worst_error",
    "worst_eager_error", "failure", "inaccurate", "command", "H_kv", "causal",
)  # fmt: skip
"""New columns are added at the end, so that what reads the old ones goes on reading them."""


def text(rows: Iterable[dict[str, Any]]) -> str:
    """Return the CSV of rows: titles first, an empty cell for what a row does not have."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(flattened, rows))
    return stream.getvalue()


def flattened(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with its sizes and its worst error beside the rest."""
    errors, eager = row.get("errors") or {}, row.get("eager_errors") or {}
    worst = max(errors, key=lambda name: errors[name], default=None)
    told = {} if worst is None else {"worst_error": errors[worst], "worst_eager_error": eager[worst]}
    return {**row, **row.get("shape", {}), **told}
