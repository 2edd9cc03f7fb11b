"""Reports that commands wrote, read again: what is not as they write it is refused in one line, before it is used."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from perceiver_kernels.cli.report import SCHEMA, CommandError

LONGEST = 60
"""Characters of a wrong value that an error tells."""


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_text_or_null(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_figure(value: Any) -> bool:
    if value is None:
        return True
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max


def _is_size(value: Any) -> bool:
    return isinstance(value, int)


def _is_shape(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_size, value.values()))


def _is_environment(value: Any) -> bool:
    gpus = value.get("gpus", []) if isinstance(value, dict) else None
    # A probe that failed left its reason as text.
    return _is_text(gpus) or (isinstance(gpus, list) and all(isinstance(gpu, dict) for gpu in gpus))


Rule = tuple[Callable[[Any], bool], str]
TEXT: Rule = (_is_text, "text")
FIGURE: Rule = (_is_figure, "a number, at least 0, or null")
HEADER: dict[str, Rule] = {
    **dict.fromkeys(("command", "started", "device", "dtype", "time_method", "memory_method"), TEXT),
    "environment": (_is_environment, "an object whose gpus are a list of objects"),
}
ROW: dict[str, Rule] = {
    **dict.fromkeys(("kind", "regime", "case", "pass", "implementation", "dtype", "backend"), TEXT),
    **dict.fromkeys(("p20_ms", "p50_ms", "p80_ms", "peak_extra_bytes", "saved_bytes"), FIGURE),
    **dict.fromkeys(("predicted_bytes", "predicted_saved_bytes"), FIGURE),
    "failure": (_is_text_or_null, "text or null"),
    "shape": (_is_shape, "an object of whole numbers"),
    "M": (_is_size, "a whole number"),
}
"""What values are that are compared, drawn or tabulated, where a report has them at all."""


def load(path: Path, argument: str) -> dict[str, Any]:
    """Return a report that a command wrote.

    Args:
        path: of the JSON file.
        argument: that named it, for errors.

    Raises:
        CommandError: it cannot be read, is no report, has another schema, or holds a value of another kind.
    """

    def refused(rule: str) -> CommandError:
        return CommandError(f"argument {argument}: {path} {rule}")

    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise refused(f"cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise refused("is not a report: it is no JSON") from None
    if not isinstance(report, dict) or "schema" not in report:
        raise refused("is not a report: it has no schema")
    if report["schema"] != SCHEMA:
        raise refused(f"must have schema {SCHEMA}, got {_told(report['schema'])}")
    rows = report.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise refused("is not a report: it has no rows")
    for place, values, rules in (("", report, HEADER), *((f" of row {i}", row, ROW) for i, row in enumerate(rows, start=1))):
        for name in rules.keys() & values.keys():
            holds, kind = rules[name]
            if not holds(values[name]):
                raise refused(f"is not a report: {name}{place} must be {kind}, got {_told(values[name])}")
    return report


def _told(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
