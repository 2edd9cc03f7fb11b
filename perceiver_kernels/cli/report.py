"""What the commands write: rows of plain values under a header that says where they were measured."""

from __future__ import annotations

import difflib
import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from perceiver_kernels.cli import info

SCHEMA = 1


class CommandError(Exception):
    """The request cannot be served; the text is the whole message, one line."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> CommandError:
    """Return the error for a name that does not exist, with the nearest names that do."""
    names = sorted(set(known))
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names[:8]
    return CommandError(f"no {kind} named {name!r}; nearest: {', '.join(near)}")


class Report:
    """Results of one command, written after every row, so that an interrupted sweep keeps what it has.

    Args:
        command: name of the command.
        path: file to write, '-' for stdout (written once, at the end), None for nowhere.
    """

    def __init__(self, command: str, path: str | os.PathLike[str] | None) -> None:
        self.path = path
        self.content: dict[str, Any] = {
            "schema": SCHEMA,
            "command": command,
            "invocation": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "environment": info.collect(),
            "rows": [],
        }
        self._keep()

    def set(self, **values: Any) -> None:
        """Put values beside the rows."""
        self.content.update(values)

    def add(self, **row: Any) -> dict[str, Any]:
        """Append one row and return it."""
        self.content["rows"].append(row)
        self._keep()
        return row

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.content["rows"]

    def close(self) -> None:
        """Write what is left to write."""
        if self.path is not None:
            self.write(self.path)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write everything to a file, in one step, or to stdout for '-'."""
        text = json.dumps(_plain(self.content), indent=1, allow_nan=False)
        if path == "-":
            print(text)
            return
        target = Path(os.fspath(path))
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(target.name + ".partial")
            partial.write_text(text + "\n")
            partial.replace(target)
        except OSError as error:
            raise CommandError(f"cannot write {target}: {error.strerror or error}") from error

    def _keep(self) -> None:
        if self.path is not None and self.path != "-":
            self.write(self.path)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
