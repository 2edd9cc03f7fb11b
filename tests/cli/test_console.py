"""What is printed: sizes and times, tables that fit the terminal, progress."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

import pytest

from perceiver_kernels.cli import pass_table
from perceiver_kernels.cli.console import Console, format_bytes, format_ms, table_lines


def test_sizes_and_times_have_three_digits() -> None:
    sizes = [0, 1023, 1024, 1536, 10 * 2**20, 1000 * 2**30, None]
    assert [format_bytes(n) for n in sizes] == [
        "0 B", "1023 B", "1.00 KiB", "1.50 KiB", "10.0 MiB", "1000 GiB", "-",
    ]  # fmt: skip
    assert [format_ms(ms) for ms in (0.4321, 4.321, 43.21, 432.1, 4321.0, None)] == [
        "0.432", "4.32", "43.2", "432", "4321", "-",
    ]  # fmt: skip


def test_plain_tables_align() -> None:
    titles, lines = table_lines([["name", "n"], ["a", "10"], ["bcdef", "9"]], 80)
    assert titles == ["name    n"]
    assert lines == ["-----  --", "a      10", "bcdef   9"]


def test_progress_is_silent_unless_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    for shown in (False, True):
        with Console(plain=True, progress=shown).progress("work", 2) as progress:
            progress.advance("first")
            progress.advance("second")
        assert ("work second" in capsys.readouterr().err) == shown


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        return re.sub(r"\x1b\[[0-9;]*m", "", self.getvalue()).splitlines()


BENCH_ROWS = [
    [
        "compiled-efficient-pad8",
        "1234",
        "1198..1301",
        "10432",
        "0.0229",
        "2500",
        "100 %",
        "1000 MiB",
        "4.4e-07",
        "2.3e-07",
    ],
    ["ours", "0.626", "0.611..0.640", "98", "351", "1187", "44 %", "241 MiB", "0.0041", "0.0044"],
]
LONG = "the CUDA library is not built: the CUDA library was never built in this source tree"


@pytest.mark.parametrize("plain", [True, False])
class TestTable:
    @staticmethod
    def printed(
        plain: bool, width: int, monkeypatch: pytest.MonkeyPatch, columns: Sequence[str], rows: list[list[str]],
        spare: Sequence[str] = (),
    ) -> list[str]:  # fmt: skip
        monkeypatch.setenv("COLUMNS", str(width))
        terminal = Terminal()
        Console(terminal, plain=plain).table(columns, rows, spare)
        return terminal.lines()

    def test_numbers_stay_whole_at_80_columns(self, plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """Every column was narrowed alike: 1198..1301 stood on three lines."""
        lines = self.printed(plain, 80, monkeypatch, pass_table.COLUMNS, BENCH_ROWS, pass_table.SPARE_COLUMNS)
        assert max(map(len, lines)) <= 80
        for row in BENCH_ROWS:
            (line,) = [line for line in lines if line.startswith(row[0])]
            shown = re.split(r" {2,}", line)
            assert shown == [row[0], row[1], row[4], *row[6:]]
        assert lines[-1] == "(no room for GB/s, host us, p20..p80)"

    def test_all_columns_where_there_is_room(self, plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        lines = self.printed(plain, 120, monkeypatch, pass_table.COLUMNS, BENCH_ROWS, pass_table.SPARE_COLUMNS)
        assert [re.split(r" {2,}", line) for line in lines[-2:]] == BENCH_ROWS
        assert re.split(r" {2,}", lines[-4]) == list(pass_table.COLUMNS)

    def test_text_is_folded_between_words(self, plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        lines = self.printed(plain, 60, monkeypatch, ["backend", "ms", "why"], [["cuda", "12.25", LONG]])
        assert max(map(len, lines)) <= 60
        cuda, *rest = lines[2:]
        assert cuda.startswith("cuda     12.25  the CUDA library")
        assert " ".join([cuda[16:], *(line.strip() for line in rest)]) == LONG

    def test_text_beside_numbers_folds_and_the_numbers_do_not(
        self, plain: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lines = self.printed(
            plain, 20, monkeypatch, ["inputs", "eager"], [["1,024", "12.5 MiB"], ["4,096", "out of memory"]]
        )
        assert lines[2:] == [" 1,024  12.5 MiB", " 4,096  out of", "        memory"]

    def test_dots_are_not_a_number(self, plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        lines = self.printed(plain, 12, monkeypatch, ["call"], [["... with its sum"], ["attend"]])
        assert lines == ["call", "------------", "... with its", "sum", "attend"]

    def test_a_line_break_in_a_cell_is_a_space(self, plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.printed(plain, 80, monkeypatch, ["a", "b"], [["x\ny", "z"]])[2:] == ["x y  z"]


def test_a_pipe_is_140_columns_wide() -> None:
    stream = io.StringIO()
    Console(stream, plain=True).table(["why"], [[" ".join(60 * ["word"])]])
    assert max(map(len, stream.getvalue().splitlines())) == 140
