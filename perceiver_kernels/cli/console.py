"""What the commands print: headings, tables, progress; with rich where it is installed, else plain text."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TextIO

from perceiver_kernels.cli.report import emit

PIPE_COLUMNS = 140
"""Columns where there is no terminal: a pipe has no width of its own."""
GAP = "  "
"""Between the columns of a table."""


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

    @property
    def columns(self) -> int:
        """How wide a line may be."""
        return shutil.get_terminal_size().columns if self.stream.isatty() else PIPE_COLUMNS

    def heading(self, text: str) -> None:
        """Print a section title."""
        self.line()
        self._styled(text, "bold")
        if not self.rich:
            self.line("-" * len(text))

    def line(self, text: str = "") -> None:
        """Print one line as it is."""
        emit(text, self.stream)

    def warn(self, text: str) -> None:
        """Print one line that asks for attention."""
        self._styled(text if self.rich else f"! {text}", "yellow")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], spare: Sequence[str] = ()) -> None:
        """Print a table; columns whose every cell is a number or a dash are right-aligned.

        Text is folded between words where the line is too short, numbers never.

        Args:
            columns: titles.
            rows: cells.
            spare: titles of the columns that are left out, in this order, where folding is not enough.
        """
        cells = [list(columns), *([_text(cell) for cell in row] for row in rows)]
        titles, lines = table_lines(cells, self.columns)
        left_out = []
        for title in spare:
            if len(lines[0]) <= self.columns:
                break
            left_out.append(title)
            i = cells[0].index(title)
            cells = [row[:i] + row[i + 1 :] for row in cells]
            titles, lines = table_lines(cells, self.columns)
        for text in titles:
            self._styled(text, "bold")
        for text in lines:
            self.line(text)
        if left_out:
            self.line(f"(no room for {', '.join(left_out)})")

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

    def _styled(self, text: str, style: str) -> None:
        if self.rich:
            from rich.console import Console as RichConsole

            console = RichConsole(file=self.stream)
            # Captured, not printed: on a pipe without a reader rich ends the process with a code of its own.
            with console.capture() as captured:
                console.print(
                    text, style=style, markup=False, emoji=False, highlight=False, soft_wrap=True, end=""
                )
            text = captured.get()
        self.line(text)


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


def table_lines(cells: Sequence[Sequence[str]], width: int) -> tuple[list[str], list[str]]:
    """Return the lines of the titles and of the rest, at most `width` wide where folding can do that.

    Args:
        cells: rows of text, titles first.
        width: in characters.
    """
    columns = list(zip(*cells, strict=True))
    widths = [max(map(len, column)) for column in columns]
    rights = [all(map(_is_numeric, column[1:])) for column in columns]
    while len(GAP.join(" " * w for w in widths)) > width:
        foldable = [i for i, column in enumerate(columns) if widths[i] > _least_width(column)]
        if not foldable:
            break
        widths[max(foldable, key=lambda i: widths[i])] -= 1

    def lines(row: Sequence[str]) -> list[str]:
        folded = [_folded(text, w) for text, w in zip(row, widths, strict=True)]
        height = max(map(len, folded))
        # Titles stand on the rule below them; other cells hang from their first line.
        folded = [
            [""] * (height - len(cell)) + cell if row is cells[0] else cell + [""] * (height - len(cell))
            for cell in folded
        ]
        return [
            GAP.join(
                t.rjust(w) if r else t.ljust(w) for t, w, r in zip(line, widths, rights, strict=True)
            ).rstrip()
            for line in zip(*folded, strict=True)
        ]

    rule = GAP.join("-" * w for w in widths)
    return lines(cells[0]), [rule, *(line for row in cells[1:] for line in lines(row))]


def _least_width(column: Sequence[str]) -> int:
    """How narrow a column can be: numbers stay whole, text its words."""
    return max(len(text) if _is_numeric(text) else max(map(len, text.split())) for text in column)


def _folded(text: str, width: int) -> list[str]:
    if len(text) <= width:
        return [text]
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


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


def _three_digits(value: float) -> str:
    magnitude = abs(value)
    decimals = 0 if magnitude >= 100 else 1 if magnitude >= 10 else 2 if magnitude >= 1 else 3
    return f"{value:.{decimals}f}"


def _text(cell: Any) -> str:
    if cell is None:
        return "-"
    return f"{cell:.3g}" if isinstance(cell, float) else " ".join(str(cell).split())


def _is_numeric(text: str) -> bool:
    return text in ("", "-") or re.match(r"[-+.<>]*\d", text) is not None


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
