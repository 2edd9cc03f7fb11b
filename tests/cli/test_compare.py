"""Two reports side by side: which rows are the same, what changed, and what a regression does."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from perceiver_kernels.cli import compare, main, reading
from perceiver_kernels.cli.console import Console

pytestmark = pytest.mark.usefixtures("one_thread")

CALL = [
    "bench", "process", "--case", "imagenet", "--passes", "forward", "--peers", "eager", "--device", "cpu",
    "--max-inputs", "20", "--seconds", "0.005",
]  # fmt: skip


SHAPE = "is not a report: shape of row {} must be an object of whole numbers, got"
FIGURE = "a number, at least 0, or null"
ENVIRONMENT = "environment must be an object whose gpus are a list of objects"


def of_row(values: str) -> str:
    return f'{{"schema": 1, "rows": [{values}]}}'


def row(**changes: Any) -> dict[str, Any]:
    plain = {
        "kind": "bench", "regime": "process", "case": "imagenet", "pass": "forward", "implementation": "ours",
        "dtype": "float32", "shape": {"B": 2, "Lq": 20}, "failure": None, "p50_ms": 2.0, "peak_extra_bytes": 100,
    }  # fmt: skip
    return {**plain, **changes}


def report(*rows: dict[str, Any], gpu: str | None = None, **content: Any) -> dict[str, Any]:
    environment = {"gpus": [{"name": gpu}] if gpu else [], "cpu": {"cores": 2, "free_bytes": 7}}
    return {"schema": 1, "started": "2020-01-02T03:04:05Z", "environment": environment, "rows": list(rows), **content}


def shown(old: dict[str, Any], new: dict[str, Any], capsys: pytest.CaptureFixture[str], **options: Any) -> tuple[bool, str]:
    failed = compare.show(old, new, Console(sys.stdout, plain=True), **options)
    return failed, capsys.readouterr().out


class TestJoin:
    def test_the_worst_comes_first(self) -> None:
        old = report(row(), row(case="flow"), row(case="gone"))
        new = report(row(p50_ms=1.0, peak_extra_bytes=150), row(case="flow", p50_ms=4.0), row(case="fresh"))
        found, gone, fresh = compare.changes(old, new)
        assert [(change.row["case"], change.figure, change.ratio) for change in found] == [
            ("flow", "p50_ms", 2.0), ("imagenet", "peak_extra_bytes", 1.5), ("flow", "peak_extra_bytes", 1.0),
            ("imagenet", "p50_ms", 0.5),
        ]  # fmt: skip
        assert (gone, fresh) == (1, 1)

    @pytest.mark.parametrize(
        "change",
        [
            {"kind": "model"}, {"case": "flow"}, {"pass": "backward"}, {"implementation": "eager"}, {"dtype": "bfloat16"},
            {"shape": {"B": 2, "Lq": 21}}, {"regime": "decode"},
        ],
    )  # fmt: skip
    def test_another_key_is_another_row(self, change: dict[str, Any]) -> None:
        assert compare.changes(report(row()), report(row(**change))) == ([], 1, 1)

    def test_what_one_report_does_not_tell_is_not_compared(self) -> None:
        """Older rows have their dtype beside them, those of models no sizes at all."""
        older = {name: value for name, value in row().items() if name not in ("regime", "dtype", "shape")}
        assert len(compare.changes(report(older), report(row()))[0]) == 2
        assert len(compare.changes(report(older, dtype="float32"), report(row()))[0]) == 2
        assert compare.changes(report(older, dtype="bfloat16"), report(row()))[0] == []

    def test_a_size_beside_the_shape_counts(self) -> None:
        chunked = [{"kind": "chunked-memory", "case": "c64", "M": M, "peak_extra_bytes": M, "failure": None} for M in (1, 10)]
        found, gone, fresh = compare.changes(report(*chunked), report(*reversed(chunked)))
        assert [change.ratio for change in found] == [1.0, 1.0] and gone == fresh == 0

    def test_failures_that_come_and_go(self) -> None:
        failed = {"failure": "out of memory", "p50_ms": None, "peak_extra_bytes": None}
        (worse,) = compare.changes(report(row()), report(row(**failed)))[0]
        (better,) = compare.changes(report(row(**failed)), report(row()))[0]
        assert worse.is_regression(1000) and not better.is_regression(0)
        assert compare.changes(report(row(**failed)), report(row(**failed)))[0] == []

    def test_memory_out_of_nothing(self) -> None:
        found = compare.changes(report(row(peak_extra_bytes=0)), report(row(peak_extra_bytes=1)))[0]
        assert found[0].figure == "peak_extra_bytes" and found[0].is_regression(1000)
        assert compare.changes(report(row(peak_extra_bytes=0)), report(row(peak_extra_bytes=0)))[0][0].ratio == 1.0


class TestShow:
    def test_marks_what_is_beyond_the_tolerance(self, capsys: pytest.CaptureFixture[str]) -> None:
        old, new = report(row()), report(row(p50_ms=2.2))
        failed, told = shown(old, new, capsys)
        (line,) = [line for line in told.splitlines() if "REGRESSION" in line]
        assert failed and line.split()[-4:] == ["2.00", "2.20", "1.100", "REGRESSION"]
        assert "1 of 2 figures are over 5 % worse, 1 of them ours" in told
        failed, told = shown(old, new, capsys, tolerance=11.0)
        assert not failed and "REGRESSION" not in told

    def test_a_slower_peer_is_marked_and_fails_nothing(self, capsys: pytest.CaptureFixture[str]) -> None:
        failed, told = shown(report(row(implementation="eager")), report(row(implementation="eager", p50_ms=9)), capsys)
        assert not failed and "REGRESSION" in told and "1 of 2 figures are over 5 % worse, 0 of them ours" in told

    def test_another_gpu_is_a_warning(self, capsys: pytest.CaptureFixture[str]) -> None:
        failed, told = shown(report(row(), gpu="A"), report(row(), gpu="B"), capsys)
        assert not failed and "! measured on another device: A then, B now" in told and "1.000" in told
        assert "another" not in shown(report(row(), gpu="A"), report(row(), gpu="A"), capsys)[1]
        on_cpu = report(row(), gpu="A", device="cpu")
        assert "A then, a CPU with 2 cores now" in shown(report(row(), gpu="A"), on_cpu, capsys)[1]

    @pytest.mark.parametrize(
        ("then", "now", "told"),
        [
            ({"perceiver_kernels": "0.1"}, {"perceiver_kernels": "0.2"}, "another perceiver-kernels: 0.1 then, 0.2 now"),
            ({"torch": {"version": "2.10"}}, {"torch": {"version": "2.11"}}, "another torch: 2.10 then, 2.11 now"),
            ({"torch": "not found out: x"}, {"torch": {"version": "2"}}, "another torch: not found out: x then, 2 now"),
            ({"triton": "3.5"}, {"triton": "not installed"}, "another triton: 3.5 then, not installed now"),
        ],
    )  # fmt: skip
    def test_another_version_is_a_warning(
        self, then: dict[str, Any], now: dict[str, Any], told: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        old, new = report(row()), report(row())
        old["environment"] |= then
        new["environment"] |= now
        warnings = [line for line in shown(old, new, capsys)[1].splitlines() if line.startswith("!")]
        assert warnings == [f"! measured with {told}"]
        assert "another" not in shown(old, old, capsys)[1]
        # What one of the two does not tell is not known to differ.
        assert "another" not in shown(report(row()), new, capsys)[1]

    def test_another_dtype_or_method_is_a_warning(self, capsys: pytest.CaptureFixture[str]) -> None:
        plain = row()
        plain.pop("dtype")
        old = report(plain, dtype="float32", time_method="a", memory_method="c")
        new = report(plain, dtype="bfloat16", time_method="b", memory_method="d")
        failed, told = shown(old, new, capsys)
        assert failed and [line for line in told.splitlines() if line.startswith("!")] == [
            "! measured in another dtype: float32 then, bfloat16 now", "! times are of another method: a then, b now",
            "! memory is of another method: c then, d now", "! no row of this run is in the older report",
        ]  # fmt: skip

    def test_nothing_in_common(self, capsys: pytest.CaptureFixture[str]) -> None:
        failed, told = shown(report(), report(row()), capsys)
        assert failed and "! no row of this run is in the older report" in told

    def test_rows_that_fail_alike_are_in_both(self, capsys: pytest.CaptureFixture[str]) -> None:
        """They have no figure to compare, and were said not to be there."""
        failed = report(row(failure="out of memory", p50_ms=None, peak_extra_bytes=None))
        worse, told = shown(failed, failed, capsys)
        assert not worse and "!" not in told
        assert "0 of 0 figures are over 5 % worse, 0 of them ours; 0 older rows were not measured now, 0 are new" in told

    def test_another_backend_is_one_warning(self, capsys: pytest.CaptureFixture[str]) -> None:
        old, new = (
            report(row(backend=ours), row(case="flow", backend=ours), row(implementation="eager", backend=stock))
            for ours, stock in (("sdpa", "a"), ("reference", "b"))
        )
        failed, told = shown(old, new, capsys)
        assert not failed and [line for line in told.splitlines() if line.startswith("!")] == [
            "! 2 rows of ours are of another backend, the first imagenet, forward: sdpa then, reference now"
        ]
        assert "another backend" not in shown(old, old, capsys)[1] + shown(report(row()), report(row(backend="x")), capsys)[1]

    def test_a_row_that_fails_now_says_why(self, capsys: pytest.CaptureFixture[str]) -> None:
        failed, told = shown(report(row()), report(row(failure="out of memory")), capsys)
        assert failed and "REGRESSION: out of memory" in told


class TestLoad:
    @pytest.mark.parametrize(
        ("text", "told"),
        [
            ("{", "is not a report: it is no JSON"),
            ("\xff", "is not a report: it is no JSON"),
            ("[1]", "is not a report: it has no schema"),
            ('{"rows": []}', "is not a report: it has no schema"),
            ('{"schema": 2, "rows": []}', "must have schema 1, got 2"),
            ('{"schema": 1}', "is not a report: it has no rows"),
            ('{"schema": 1, "rows": [3]}', "is not a report: it has no rows"),
            ('{"schema": 1, "rows": {}}', "is not a report: it has no rows"),
            ("[" * 100_000, "is not a report: it is no JSON"),
            (of_row('{"shape": null}'), f"{SHAPE.format(1)} null"),
            (of_row('{}, {"shape": {"M": "x"}}'), f'{SHAPE.format(2)} {{"M": "x"}}'),
            *(
                (of_row(f'{{"{name}": {wrong}}}'), f"is not a report: {name} of row 1 must be {FIGURE}, got {wrong}")
                for name in ("p50_ms", "peak_extra_bytes")
                for wrong in ('"2"', "true", "NaN", "-1", "[]")
            ),
            (of_row(f'{{"p50_ms": {10**400}}}'), f"is not a report: p50_ms of row 1 must be {FIGURE}, got 1{59 * '0'}..."),
            (of_row('{"case": ["a"]}'), 'is not a report: case of row 1 must be text, got ["a"]'),
            (of_row('{"kind": {}}'), "is not a report: kind of row 1 must be text, got {}"),
            (of_row('{"failure": 3}'), "is not a report: failure of row 1 must be text or null, got 3"),
            (of_row('{"M": 1.5}'), "is not a report: M of row 1 must be a whole number, got 1.5"),
            ('{"schema": 1, "rows": [], "dtype": 16}', "is not a report: dtype must be text, got 16"),
            *(
                (f'{{"schema": 1, "rows": [], "environment": {wrong}}}', f"is not a report: {ENVIRONMENT}, got {wrong}")
                for wrong in ('"CPU"', "null", '{"gpus": [1]}', '{"gpus": {}}')
            ),
            (None, "cannot be read: No such file or directory"),
        ],
    )
    def test_what_is_no_report_is_one_line(
        self, text: str | None, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "old.json"
        if text is not None:
            path.write_text(text, encoding="latin-1")
        assert main([*CALL, "--compare", str(path)]) == 2
        captured = capsys.readouterr()
        assert captured.err == f"perceiver-kernels bench: argument --compare: {path} {told}\n" and captured.out == ""

    @pytest.mark.parametrize("option", [["--tolerance", "3"], ["--fail-on-regression"]])
    def test_options_of_a_comparison_want_one(self, option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        assert main([*CALL, *option]) == 2
        assert f"argument {option[0]}: must be given with --compare" in capsys.readouterr().err

    def test_committed_results_are_reports(self) -> None:
        paths = sorted((Path(__file__).resolve().parents[2] / "benchmarks" / "results").glob("*/*.json"))
        assert paths
        for path in paths:
            old = reading.load(path, "--compare")
            found, gone, fresh = compare.changes(old, old)
            assert gone == fresh == 0 and all(change.ratio == 1.0 for change in found), path


class TestCommand:
    def test_a_regression_fails_where_it_is_asked_to(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "bench.json"
        assert main([*CALL, "--json", str(path)]) == 0
        old = json.loads(path.read_text())
        for each in old["rows"]:
            each["peak_extra_bytes"] //= 2
            each["p50_ms"] *= 100
        path.write_text(json.dumps(old))
        compared = [*CALL, "--compare", str(path)]
        assert main(compared) == 0
        assert "REGRESSION" in capsys.readouterr().out
        assert main([*compared, "--fail-on-regression"]) == 1
        assert main([*compared, "--fail-on-regression", "--tolerance", "300"]) == 0
        # Its own file may be the older report: it is read before it is written.
        assert main([*compared, "--json", str(path)]) == 0
        assert json.loads(path.read_text())["rows"][0]["p50_ms"] < old["rows"][0]["p50_ms"]
