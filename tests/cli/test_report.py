"""Where results go: files checked before the work, streams that close, and what an interruption leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from perceiver_kernels.cli import main
from perceiver_kernels.cli.bench import Bench
from perceiver_kernels.cli.report import check_writable
from perceiver_kernels.cli.run import Job
from perceiver_kernels.cli.sweep import Sweep

pytestmark = pytest.mark.usefixtures("one_thread")

PROGRAM = [sys.executable, "-m", "perceiver_kernels"]
BENCH = ["bench", "encode", "--device", "cpu", "--max-inputs", "130"]
MEMORY = ["memory", "--device", "cpu", "--sizes", "256,512", "--passes", "forward", "--peers", "none"]
RUN = ["run", "--preset", "tiny", "--device", "cpu"]


def interrupted(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


class TestFiles:
    @pytest.mark.parametrize("place", ["folder", "file/below", "pipe"])
    @pytest.mark.parametrize(
        ("call", "option", "work"),
        [
            (BENCH, "--json", (Bench, "measure_ceilings")),
            (MEMORY, "--json", (Sweep, "run")),
            (MEMORY, "--plot", (Sweep, "run")),
            (RUN, "--json", (Job, "run_model")),
            (RUN, "--output", (Job, "run_model")),
        ],
    )
    def test_are_checked_before_the_work(
        self, call: list[str], option: str, work: tuple[type, str], place: str, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        """A plot that could not be written was found after the sweep, a second JSON file after the whole run."""
        if call is RUN:
            pytest.importorskip("skimage")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(*work, interrupted)
        (tmp_path / "file").touch()
        # A device would be replaced as a file is; a pipe stands for one, so that a failure harms no machine.
        os.mkfifo(tmp_path / "pipe")
        path = tmp_path if place == "folder" else tmp_path / place
        if option == "--output":
            # Of the two files that go there the picture, which was written last.
            if place == "folder":
                (path / "plot.png").mkdir()
            path = path if place == "folder" else tmp_path / "file"
        assert main([*call, option, str(path)]) == 2
        captured = capsys.readouterr()
        assert f"cannot write {path}" in captured.err and captured.err.count("\n") == 1
        assert captured.out == ""
        assert not list(tmp_path.glob("**/*.partial"))

    @pytest.mark.parametrize(
        ("call", "first", "second"),
        [
            (BENCH, ("--json", "x"), ("--csv", "x")),
            (BENCH, ("--json", "x"), ("--csv", "./x")),
            (BENCH, ("--json", "x"), ("--csv", "link")),
            (MEMORY, ("--json", "p.png"), ("--plot", "p.png")),
            (MEMORY, ("--plot", "p.png"), ("--snapshot", "below/../p.png")),
        ],
    )
    def test_two_that_are_one_are_refused(
        self, call: list[str], first: tuple[str, str], second: tuple[str, str], tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        """One was written over the other, and the exit code was 0."""
        monkeypatch.chdir(tmp_path)
        (tmp_path / "link").symlink_to("x")
        assert main([*call, *first, *second]) == 2
        captured = capsys.readouterr()
        told = f"argument {second[0]}: must be another file than that of {first[0]}, got {second[1]}\n"
        assert captured.err == f"perceiver-kernels {call[0]}: {told}" and captured.out == ""
        assert [path.name for path in tmp_path.iterdir()] == ["link"]

    def test_the_picture_of_the_main_job_is_no_json(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        pytest.importorskip("skimage")
        assert main([*RUN, "--output", str(tmp_path), "--json", str(tmp_path / "plot.png")]) == 2
        assert "argument --json: must be another file than that of the picture" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("call", "option"), [(BENCH, "--json"), (BENCH, "--csv"), (MEMORY, "--plot"), (MEMORY, "--snapshot"), (RUN, "--output")]
    )
    def test_are_given_once(self, call: list[str], option: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stopped:
            main([*call, option, "a", option, "b"])
        assert stopped.value.code == 2
        assert f"argument {option}: must be given once, got a and b\n" in capsys.readouterr().err

    def test_checking_leaves_nothing_and_changes_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "old").write_text("kept")
        for name in ("old", "new"):
            check_writable(tmp_path / name)
        assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("old", "kept")]


class TestInterrupted:
    @staticmethod
    def second_time(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
        """Ctrl-C at the second call."""
        function, calls = getattr(owner, name), []

        def call(*arguments: Any) -> Any:
            calls.append(arguments)
            return function(*arguments) if len(calls) == 1 else interrupted()

        monkeypatch.setattr(owner, name, call)

    def test_says_which_rows_are_where(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.second_time(monkeypatch, Sweep, "_measure")
        path = tmp_path / "memory.json"
        assert main([*MEMORY, "--json", str(path)]) == 130
        assert capsys.readouterr().err == f"perceiver-kernels memory: interrupted; 1 rows are in {path}\n"
        assert len(json.loads(path.read_text())["rows"]) == 1

    @pytest.mark.parametrize("where", [[], ["--json", "-"]])
    def test_without_a_file_nothing_is_kept(
        self, where: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.second_time(monkeypatch, Sweep, "_measure")
        assert main([*MEMORY, *where]) == 130
        captured = capsys.readouterr()
        assert captured.err.endswith("perceiver-kernels memory: interrupted; no results were written\n")
        assert "rows" not in captured.out

    def test_both_files_of_run_hold_the_rows(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pytest.importorskip("skimage")
        self.second_time(monkeypatch, Bench, "measure_pass")
        output, copy = tmp_path / "out", tmp_path / "copy.json"
        assert main([*RUN, "--output", str(output), "--json", str(copy)]) == 130
        contents = [json.loads(path.read_text()) for path in (output / "results.json", copy)]
        assert contents[0] == contents[1] and "model" in contents[0]
        told = f"interrupted; {len(contents[0]['rows'])} rows are in {output / 'results.json'} and {copy}\n"
        assert contents[0]["rows"] and capsys.readouterr().err.endswith(told)


def run_program(
    arguments: list[str], stdout: int | None, before: Callable[[], None] | None = None
) -> tuple[int, str]:
    done = subprocess.run(
        [*PROGRAM, *arguments],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        preexec_fn=before,
    )
    return done.returncode, done.stderr


class TestStreams:
    @pytest.mark.parametrize("arguments", [["info"], ["info", "--plain"], ["info", "--json", "-"]])
    def test_a_reader_that_left_ends_the_program_quietly(self, arguments: list[str]) -> None:
        if "--plain" not in arguments:
            pytest.importorskip("rich")
        reader, writer = os.pipe()
        os.close(reader)
        try:
            code, told = run_program(arguments, writer)
        finally:
            os.close(writer)
        # With JSON on stdout the tables go to stderr.
        assert code == 0 and "Traceback" not in told
        assert told == "" or "--json" in arguments

    @pytest.mark.parametrize("arguments", [["info"], ["info", "--json", "-"], ["--help"]])
    def test_a_full_disk_is_one_line(self, arguments: list[str]) -> None:
        with open("/dev/full", "w") as full:
            code, told = run_program(arguments, full.fileno())
        assert code == 2 and "Traceback" not in told
        assert told.splitlines()[-1].endswith(": cannot write to stdout: No space left on device")
        assert told.count("\n") == 1 or "--json" in arguments

    def test_a_closed_stdout_is_one_line(self) -> None:
        told = "perceiver-kernels: cannot write to stdout: it is closed\n"
        assert run_program(["info"], None, before=lambda: os.close(1)) == (2, told)
