"""What the commands print: headings, tables, progress; with rich where it is installed, else plain text."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TextIO


class Progress(Protocol):
    """A task under way: `advance` says what comes next, `close` ends it."""

    def advance(self, description: str = "", steps: int = 1) -> None: ...


class Console:
    """Prints results to one stream and progress to stderr.

    Args:
        stream: where results go.
        plain: do not use rich even where it is installed.
        progress: True or False; None shows progress only when stderr is a terminal.
    """

    def __init__(
        self, stream: TextIO | None = None, *, plain: bool = False, progress: bool | None = None
    ) -> None:
        self.stream = sys.stdout if stream is None else stream
        self.shows_progress = sys.stderr.isatty() if progress is None else progress
        self.rich = not plain and importlib.util.find_spec("rich") is not None

    def heading(self, text: str) -> None:
        """Print a section title."""
        if self.rich:
            self._rich().print(f"\n[bold]{_escape(text)}[/bold]", highlight=False)
        else:
            print(f"\n{text}\n{'-' * len(text)}", file=self.stream, flush=True)

    def line(self, text: str = "") -> None:
        """Print one line as it is."""
        print(text, file=self.stream, flush=True)

    def warn(self, text: str) -> None:
        """Print one line that asks for attention."""
        if self.rich:
            self._rich().print(f"[yellow]{_escape(text)}[/yellow]", highlight=False, soft_wrap=True)
        else:
            self.line(f"! {text}")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Print a table; columns whose every cell is a number or a dash are right-aligned."""
        cells = [[_text(cell) for cell in row] for row in rows]
        rights = [all(_is_numeric(row[i]) for row in cells) for i in range(len(columns))]
        if self.rich:
            self._rich_table(columns, cells, rights)
        else:
            for text in plain_table(columns, cells, rights):
                self.line(text)

    @contextlib.contextmanager
    def progress(self, title: str, total: int) -> Iterator[Progress]:
        """Show a progress bar on stderr while the body runs."""
        if not self.shows_progress:
            yield _Silent()
        elif self.rich:
            from rich.console import Console as RichConsole
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as RichProgress

            parts = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            with RichProgress(*parts, console=RichConsole(stderr=True), transient=True) as bars:
                yield _RichTask(bars, bars.add_task(title, total=total), title)
        else:
            task = _PlainTask(title, total)
            try:
                yield task
            finally:
                task.close()

    def _rich(self) -> Any:
        from rich.console import Console as RichConsole

        # A pipe has no width of its own; 80 columns would fold the tables.
        width = None if self.stream.isatty() else 140
        return RichConsole(file=self.stream, width=width)

    def _rich_table(self, columns: Sequence[str], rows: list[list[str]], rights: list[bool]) -> None:
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name, right in zip(columns, rights, strict=True):
            table.add_column(_escape(name), justify="right" if right else "left", overflow="fold")
        for row in rows:
            table.add_row(*(_escape(cell) for cell in row))
        self._rich().print(table)


class _Silent:
    def advance(self, description: str = "", steps: int = 1) -> None:
        """Say nothing."""


class _RichTask:
    def __init__(self, bars: Any, task: Any, title: str) -> None:
        self.bars, self.task, self.title = bars, task, title

    def advance(self, description: str = "", steps: int = 1) -> None:
        text = f"{self.title}: {description}" if description else self.title
        self.bars.update(self.task, advance=steps, description=_escape(text))


class _PlainTask:
    """A bar redrawn in place with a carriage return."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total, self.done, self.width = title, max(total, 1), 0, 0
        self._draw("")

    def advance(self, description: str = "", steps: int = 1) -> None:
        self.done = min(self.done + steps, self.total)
        self._draw(description)

    def close(self) -> None:
        sys.stderr.write("\r" + " " * self.width + "\r")
        sys.stderr.flush()

    def _draw(self, description: str) -> None:
        filled = 24 * self.done // self.total
        bar = "#" * filled + "." * (24 - filled)
        text = f"[{bar}] {self.done}/{self.total} {self.title} {description}".rstrip()
        sys.stderr.write("\r" + text.ljust(self.width))
        sys.stderr.flush()
        self.width = len(text)


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]], rights: Sequence[bool]) -> list[str]:
    """Return the lines of a table in plain text."""
    widths = [max(len(row[i]) for row in [list(columns), *rows]) for i in range(len(columns))]

    def join(row: Sequence[str]) -> str:
        cells = [t.rjust(w) if r else t.ljust(w) for t, w, r in zip(row, widths, rights, strict=True)]
        return "  ".join(cells).rstrip()

    return [join(columns), "  ".join("-" * width for width in widths), *(join(row) for row in rows)]


def format_bytes(count: float | None) -> str:
    """Return a byte count with a binary unit: 1536 -> '1.5 KiB'."""
    if count is None:
        return "-"
    if abs(count) < 1024:
        return f"{count:.0f} B"
    power = min(int(math.log(abs(count), 1024)), 4)
    return f"{_three_digits(count / 1024**power)} {('KiB', 'MiB', 'GiB', 'TiB')[power - 1]}"


def format_ms(milliseconds: float | None) -> str:
    """Return a duration in milliseconds with three significant digits."""
    if milliseconds is None:
        return "-"
    return _three_digits(milliseconds)


def format_count(count: int) -> str:
    """Return a count with thousands separators."""
    return f"{count:,}"


def _three_digits(value: float) -> str:
    magnitude = abs(value)
    decimals = 0 if magnitude >= 100 else 1 if magnitude >= 10 else 2 if magnitude >= 1 else 3
    return f"{value:.{decimals}f}"


def _text(cell: Any) -> str:
    if cell is None:
        return "-"
    return f"{cell:.3g}" if isinstance(cell, float) else str(cell)


def _is_numeric(text: str) -> bool:
    return text in ("", "-") or (text[0].isdigit() or text[0] in "+-.<>")


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
