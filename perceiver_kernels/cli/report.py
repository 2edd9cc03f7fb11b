"""What the commands write: rows of plain values under a header that says where they were measured."""

from __future__ import annotations

import argparse
import difflib
import errno
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from perceiver_kernels.cli import flat, info

SCHEMA = 1


class CommandError(argparse.ArgumentTypeError):
    """The request cannot be served; the text is the whole message.

    While an option is read, argparse puts the option's name before it.
    """


def unknown_name(kind: str, name: str, known: Iterable[str]) -> CommandError:
    """Return the error for a name that does not exist, with the nearest names that do."""
    names = sorted(set(known))
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names[:8]
    return CommandError(f"no {kind} named {name!r}; nearest: {', '.join(near)}")


def emit(text: str, stream: TextIO) -> None:
    """Print lines at once.

    Raises:
        BrokenPipeError: the reader (head, less) is gone.
        CommandError: the stream takes no more, as a full disk does.
    """
    try:
        print(text, file=stream, flush=True)
    except OSError as error:
        # What the buffer still holds would fail again, with a traceback, when the interpreter exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        raise CommandError(f"cannot write to {stream.name.strip('<>')}: {error.strerror}") from None


def check_writable(path: Path) -> None:
    """Raise the CommandError of a file that cannot be written before the work, not after it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        if existed and not path.is_file():
            raise OSError(errno.EINVAL, "it is a folder or a device")
        path.open("ab").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror}") from None


def check_apart(files: Mapping[str, str | os.PathLike[str] | None]) -> None:
    """Raise the CommandError of two files that are one, of which the later would replace the other, before the work.

    Args:
        files: name of the argument -> the file; None is nowhere, '-' is stdout.
    """
    seen: dict[str, str] = {}
    for argument, path in files.items():
        if path is None or path == "-":
            continue
        other = seen.setdefault(os.path.realpath(path), argument)
        if other != argument:
            raise CommandError(f"argument {argument}: must be another file than that of {other}, got {path}")


class Report:
    """Results of one command, in files that are written after every row and hold them all when the body ends.

    Args:
        command: name of the command.
        paths: files to write; '-' is stdout, written once, at the end; None is nowhere.
        csv: file to write the rows to as CSV.
    """

    def __init__(self, command: str, *paths: str | os.PathLike[str] | None, csv: str | None = None) -> None:
        self.files = [Path(path) for path in paths if path not in (None, "-")]
        self.csv = None if csv is None else Path(csv)
        self.prints = "-" in paths
        self.content: dict[str, Any] = {
            "schema": SCHEMA,
            "command": command,
            "invocation": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "environment": info.collect(),
            "rows": [],
        }
        for path in self._written:
            check_writable(path)
        self._keep()

    def __enter__(self) -> Report:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self.prints:
            emit(self._text(), sys.stdout)
        if kind is KeyboardInterrupt:
            self._keep()
            if self._written:
                told = f"{len(self.rows)} rows are in {' and '.join(map(str, self._written))}"
                raise KeyboardInterrupt(told) from None

    def set(self, **values: Any) -> None:
        """Put values beside the rows."""
        self.content.update(values)
        self._keep()

    def add(self, **row: Any) -> dict[str, Any]:
        """Append one row and return it."""
        self.content["rows"].append(row)
        self._keep()
        return row

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.content["rows"]

    @property
    def _written(self) -> list[Path]:
        return self.files if self.csv is None else [*self.files, self.csv]

    def _keep(self) -> None:
        for path in self._written:
            try:
                partial = path.with_name(path.name + ".partial")
                partial.write_text(flat.text(self.rows) if path == self.csv else self._text() + "\n")
                partial.replace(path)
            except OSError as error:
                raise CommandError(f"cannot write {path}: {error.strerror or error}") from error

    def _text(self) -> str:
        return json.dumps(_plain(self.content), indent=1, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
