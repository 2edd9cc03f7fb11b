"""Options: what is refused, with which words, and what the help says about the defaults."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import pytest

from perceiver_kernels.cli import bench, build_parser, main, memory, options, run
from perceiver_kernels.cli.regimes import REGIMES
from perceiver_kernels.cli.workload import PASSES

BENCH, RUN = ["bench", "encode", "--device", "cpu"], ["run", "--preset", "tiny", "--device", "cpu"]
DECODE = ["bench", "decode", "--device", "cpu"]
MEMORY, CHECK = ["memory", "--device", "cpu"], ["check", "--device", "cpu"]
COUNT = "argument --max-inputs: must be a whole number, at least 1, got"
SECONDS = "argument --seconds: must be above 0 and at most 3600, got"
SIZES = "argument --sizes: must be numbers like 1024,64K,1M, got"
COMMAS = "must be names with one comma between two of them, got"
FILE = "must name a file or folder, got"


@pytest.mark.parametrize(
    ("call", "option", "value", "told"),
    [
        *((call, "--max-inputs", n, f"{COUNT} {n!r}") for call in (BENCH, MEMORY, RUN) for n in ("0", "-3")),
        *((BENCH, "--max-inputs", n, f"{COUNT} {n!r}") for n in ("1.5", "many", "")),
        *((BENCH, "--seconds", s, f"{SECONDS} {s!r}") for s in ("nan", "inf", "0", "-1", "1e308", "long")),
        *((call, "--backend", "", "no backend named ''") for call in (BENCH, MEMORY, RUN, CHECK)),
        (BENCH, "--backend", "none", "argument --backend: no backend named 'none'; nearest: "),
        (BENCH, "--backend", "tritn", "argument --backend: no backend named 'tritn'; nearest: triton"),
        (CHECK, "--backend", "sdpa,tritn", "argument --backend: no backend named 'tritn'; nearest: triton"),
        (BENCH, "--backend", "sdpa,", f"argument --backend: {COMMAS} 'sdpa,'"),
        (BENCH, "--case", "c64,", f"argument --case: {COMMAS} 'c64,'"),
        *((call, "--peers", "math,,eager", f"argument --peers: {COMMAS} 'math,,eager'") for call in (BENCH, MEMORY)),
        *((call, "--peers", "none,eager", "argument --peers: 'none' must stand alone, got 'none,eager'")
          for call in (BENCH, MEMORY)),
        (BENCH, "--passes", "none", "argument --passes: no pass named 'none'"),
        (BENCH, "--passes", "", "argument --passes: no pass named ''"),
        (BENCH, "--passes", "backwards", "argument --passes: no pass named 'backwards'; nearest: backward"),
        (MEMORY, "--passes", "none", "argument --passes: no pass named 'none'; nearest: "),
        (MEMORY, "--passes", "pack", "argument --passes: no pass named 'pack'; nearest: backward"),
        (BENCH, "--peers", "", "argument --peers: no peer named ''"),
        (MEMORY, "--peers", "flsh", "argument --peers: no peer named 'flsh'; nearest: flash"),
        (BENCH, "--case", "imagnet", "argument --case: no case named 'imagnet'; nearest: imagenet"),
        (DECODE, "--case", "imagnet", "argument --case: no case named 'imagnet'; nearest: imagenet"),
        (DECODE, "--case", "longctx", "argument --case: no case named 'longctx'; nearest: "),
        (DECODE, "--passes", "dq", "argument --passes: no pass named 'dq'; nearest: "),
        (DECODE, "--peers", "fpa", "argument --peers: no peer named 'fpa'; nearest: ffpa"),
        (MEMORY, "--case", "", "argument --case: no case named ''"),
        (RUN, "--preset", "smal", "argument --preset: no preset named 'smal'; nearest: small"),
        *((MEMORY, "--sizes", s, f"{SIZES} {s!r}") for s in ("1X", "", "1K,,2K")),
        (MEMORY, "--sizes", "0", "argument --sizes: must be at least 1, got '0'"),
        *(
            (MEMORY, "--sizes", s, f"argument --sizes: must be at most 1,073,741,824 (1G), got {s!r}")
            for s in ("99999999999999999999", "1K,2G", "1025M")
        ),
        ([*MEMORY, "--case", "imagenet"], "--sizes", "1G", "--sizes must fit into memory, got 1073741824: "),
        (MEMORY, "--max-inputs", "10", "--max-inputs must be at least 1024, the smallest size of the sweep, got 10"),
        (RUN, "--max-inputs", "10", "--max-inputs must be at least 256, the smallest size of the sweep, got 10"),
        *((RUN, o, "", f"argument {o}: {FILE} ''") for o in ("--image", "--output", "--json")),
        (MEMORY, "--plot", "", f"argument --plot: {FILE} ''"),
    ],
)  # fmt: skip
def test_wrong_values_are_one_line(
    call: list[str], option: str, value: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    try:
        code = main([*call, option, value])
    except SystemExit as stopped:
        code = stopped.code
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    assert captured.err.startswith(f"perceiver-kernels {call[0]}: ") and captured.err.count("\n") == 1
    assert told in captured.err
    assert list(tmp_path.iterdir()) == []


def test_lists_hold_each_name_once() -> None:
    """Twice the same size made the slope between the two largest a division by zero."""
    assert options.sizes("1g,1023M,3k") == [3072, 1023 * 2**20, 2**30]
    assert options.names_of("pass", PASSES)("backward,forward,backward") == ["backward", "forward"]
    assert build_parser().parse_args([*MEMORY, "--sizes", "2K,1K,2K"]).sizes == [1024, 2048]
    assert options.peers("flash,eager-pad8,flash") == ["flash", "eager-pad8"]
    assert options.peers("none") == []


@pytest.mark.parametrize(
    ("call", "name", "values"),
    [
        (["bench", "encode", "--case", "flow", "c64", "--case", "flow", "c128"], "case", ["flow", "c64", "c128"]),
        (["bench", "encode", "--passes", "attend", "--passes", "dq,attend"], "passes", ["attend", "dq"]),
        (["bench", "encode", "--peers", "math", "--peers", "eager"], "peers", ["math", "eager"]),
        (["bench", "encode", "--peers", "none", "--peers", "none"], "peers", []),
        (["bench", "encode", "--sizes", "2K", "--sizes", "1K,2K"], "sizes", [1024, 2048]),
        (["bench", "encode", "--backend", "sdpa", "--backend", "reference"], "backend", ["sdpa", "reference"]),
        ([*MEMORY, "--passes", "backward"], "passes", ["backward"]),
        ([*MEMORY, "--passes", "backward", "--passes", "forward"], "passes", ["backward", "forward"]),
        ([*MEMORY, "--peers", "math", "--peers", "eager"], "peers", ["math", "eager"]),
        ([*MEMORY, "--sizes", "2K", "--sizes", "1K"], "sizes", [1024, 2048]),
        ([*CHECK, "--backend", "sdpa", "--backend", "reference"], "backend", ["sdpa", "reference"]),
    ],
)
def test_lists_given_again_add_up(call: list[str], name: str, values: list[object]) -> None:
    for _ in range(2):
        assert getattr(build_parser().parse_args(call), name) == values
    assert build_parser().parse_args(MEMORY).passes == list(memory.PASSES)


@pytest.mark.parametrize("given", [("none", "eager"), ("eager", "none")])
def test_none_stands_alone(given: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*BENCH, "--peers", given[0], "--peers", given[1]])
    told = "perceiver-kernels bench: argument --peers: 'none' must stand alone, got eager too\n"
    assert capsys.readouterr().err == told


class TestHelp:
    @staticmethod
    def of(command: str, option: str) -> str:
        """What the help of a command says about an option, on one line."""
        commands = next(
            action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction)
        )
        parser = commands.choices[command]
        (action,) = [action for action in parser._actions if option in action.option_strings]
        return " ".join(parser._get_formatter()._expand_help(action).split())

    def test_bench(self, monkeypatch: pytest.MonkeyPatch) -> None:
        encode = dataclasses.replace(REGIMES["encode"], default_cases=("flow", "c64"), cpu_inputs=777)
        monkeypatch.setitem(REGIMES, "encode", encode)
        monkeypatch.setattr(bench.Bench, "seconds", 0.125)
        told = self.of("bench", "--max-inputs")
        assert "on a CPU encode: 777; layers: 2048; decode: 512" in told
        assert "there the batch, and latents and their channels, or heads, are cut too" in told
        told = self.of("bench", "--case")
        assert "encode: flow c64" in told and "all for every case of the regime" in told
        assert "default: 0.125" in self.of("bench", "--seconds")
        (task,) = bench.planned([encode], None, None)
        assert task.cases == ("flow", "c64")

    def test_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(memory, "SMALLEST", 5)
        monkeypatch.setattr(memory, "DEFAULT_PEERS", {"cuda": ("math",), "cpu": ("flash", "eager")})
        told = self.of("memory", "--case")
        assert "imagenet-b1 on a GPU" in told and "B=1, 69 channels, 64 latents x 128" in told
        assert "default: by fours from 5, while" in self.of("memory", "--sizes")
        assert "math on cuda; flash,eager on cpu" in self.of("memory", "--peers")

    @pytest.mark.parametrize("command", ["memory", "run"])
    def test_only_bench_cuts_cases(self, command: str) -> None:
        told = self.of(command, "--max-inputs")
        assert "no limit" in told and str(REGIMES["encode"].cpu_inputs) not in told

    def test_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(run, "DEFAULT_PRESETS", {"cuda": "small", "cpu": "tiny"})
        assert "small on a GPU, tiny on a CPU" in self.of("run", "--preset")
