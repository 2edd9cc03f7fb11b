"""`bench` beyond one regime: all of them, sweeps of sizes, what memory does not hold, and rows as CSV."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from perceiver_kernels import dispatch
from perceiver_kernels.cli import bench, build_parser, flat, main, measure
from perceiver_kernels.cli.gate import Gate
from perceiver_kernels.cli.regimes import REGIMES, Regime
from perceiver_kernels.cli.rerun import Conditions
from perceiver_kernels.cli.stock import Peer
from perceiver_kernels.cli.workload import Workload
from perceiver_kernels.testing.cases import ENCODE, ENCODE_WIDE

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = ("--device", "cpu", "--seconds", "0.005")


def rows_of(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["rows"]


class TestRegimes:
    def test_layers_are_the_passes_of_whole_layers(self) -> None:
        encode, layers = REGIMES["encode"], REGIMES["layers"]
        assert set(layers.passes) == {"forward", "forward-packed", "backward", "backward-inputs"} == set(layers.default_passes)
        assert set(encode.default_passes) == {"pack", "attend", "attend-masked", "dq", "dx"}
        assert encode.cases == ENCODE and set(layers.passes) < set(encode.passes)
        assert layers.cases.items() > ENCODE.items() and layers.cases.keys() == {**ENCODE, **ENCODE_WIDE}.keys()
        assert {"language", "resampler", "pointcloud"} < set(layers.default_cases)
        assert {"c128", "c64"} < set(encode.default_cases)

    @pytest.mark.parametrize("regime", REGIMES.values(), ids=lambda regime: regime.name)
    def test_defaults_exist(self, regime: Regime) -> None:
        assert set(regime.default_cases) <= set(regime.cases) and set(regime.default_passes) <= set(regime.passes)

    def test_all_measures_nothing_twice(self) -> None:
        tasks = bench.planned(list(REGIMES.values()), None, None)
        assert [task.regime.name for task in tasks] == list(REGIMES)
        named = bench.planned(list(REGIMES.values()), ["imagenet"], ["forward"])
        assert [task.regime.name for task in named] == ["layers", "decode", "process"]
        (alone,) = bench.planned([REGIMES["encode"]], ["imagenet,flow", "c64"], ["forward"])
        assert alone.cases == ("imagenet", "flow", "c64") and [each.name for each in alone.passes] == ["forward"]

    @pytest.mark.parametrize("regimes", [["encode"], ["decode"], ["models"], list(REGIMES)], ids=lambda names: names[-1])
    def test_every_case(self, regimes: list[str]) -> None:
        tasks = bench.planned([REGIMES[name] for name in regimes], ["all"], None)
        assert {task.regime.name: task.cases for task in tasks} == {name: tuple(REGIMES[name].cases) for name in regimes}
        assert not any(bench.ALL in REGIMES[name].cases for name in regimes)

    def test_all_writes_one_report(self, tmp_path: Path) -> None:
        path = tmp_path / "bench.json"
        call = ["bench", "all", *QUICK, "--case", "imagenet", "--passes", "attend,forward", "--peers", "none"]
        assert main([*call, "--max-inputs", "40", "--json", str(path)]) == 0
        rows = rows_of(path)
        assert {(row["regime"], row["pass"]) for row in rows} == {
            ("encode", "attend"), ("layers", "forward"), ("decode", "forward"), ("process", "forward")
        }  # fmt: skip
        assert json.loads(path.read_text())["command"] == "bench all"
        for row in rows:
            named = f"perceiver-kernels bench {row['regime']} --case imagenet --passes {row['pass']}"
            assert row["command"] == f"{named} --max-inputs 40 --device cpu --seconds 0.005"
            assert row["dtype"] == "float32" and row["bytes"] > 0
            assert row["gbytes_per_s"] == pytest.approx(row["bytes"] / row["p50_ms"] / 1e6)

    @pytest.mark.parametrize(
        ("call", "told"),
        [
            (["encod"], "argument REGIME: no regime named 'encod'; nearest: encode"),
            (["all", "--case", "decode-h9"], "argument --case: no case named 'decode-h9'; nearest: decode-h8"),
            (["process", "--case", "all", "imagenet"], "argument --case: all must stand alone, got all,imagenet"),
            (["all", "--case", "imagenet", "--case", "all"], "argument --case: all must stand alone, got imagenet,all"),
            (["all", "--passes", "forwrd"], "argument --passes: no pass named 'forwrd'; nearest: forward"),
            (["all", "--case", "decode-h8", "--passes", "dq"], "no regime has both a case of decode-h8 and a pass of dq"),
            (["process", "--sizes", "1K"], "--sizes: must be given with one of encode, layers, decode, encode-kv, got process"),
            (["decode", "--sizes", "1K", "--max-inputs", "4"], "argument --max-inputs: not allowed with argument --sizes"),
            (["decode", "--sizes", "1Q"], "argument --sizes: must be numbers like 1024,64K,1M, got '1Q'"),
            (["decode", "--csv", "-"], "argument --csv: must name a file, got '-'"),
        ],
    )
    def test_wrong_requests_are_one_line(self, call: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
        try:
            code = main(["bench", *call, "--device", "cpu"])
        except SystemExit as stopped:
            code = stopped.code
        captured = capsys.readouterr()
        assert (code, captured.out) == (2, "") and told in captured.err and captured.err.count("\n") == 1


class TestWide:
    """More channels than absorption takes: a layer that computes keys and values, and nothing that needs packed inputs."""

    @pytest.mark.parametrize("name", ENCODE_WIDE)
    def test_sizes_are_those_of_the_table(self, name: str) -> None:
        case = REGIMES["layers"].cases[name]
        assert dataclasses.asdict(case) == dataclasses.asdict(ENCODE_WIDE[name])
        small = REGIMES["layers"].sizes(name, torch.device("cpu"), 40)
        assert (small.C, small.H, type(small)) == (case.C, case.H, type(case))

    def test_is_projected_and_right(self, tmp_path: Path) -> None:
        path = tmp_path / "bench.json"
        call = ["bench", "layers", *QUICK, "--case", "q-former", "ip-adapter", "--peers", "eager", "--max-inputs", "140"]
        assert main([*call, "--json", str(path)]) == 0
        rows = rows_of(path)
        assert [(row["case"], row["pass"], row["implementation"]) for row in rows] == [
            (case, which, name)
            for case in ("q-former", "ip-adapter")
            for which in ("forward", "backward", "backward-inputs")
            for name in ("ours", "eager")
        ]
        for row in rows:
            assert row["failure"] is None and row["method"] == "projected" and "inaccurate" not in row
        assert set(rows[2]["errors"]) == set(rows[3]["errors"]) and rows[0]["backend"] == "sdpa"

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_shared_keys_are_measured_as_keys_of_each_head(self, dtype: torch.dtype) -> None:
        case = dataclasses.replace(REGIMES["layers"].cases["idefics2"], B=1, M=33, N=7, D=64)
        work = REGIMES["layers"].workload(case, torch.device("cpu"), dtype)
        assert work.projected_layer.k_proj.out_features == 16 * 96
        for which in case.passes:
            assert work.method(which, "ours") == "projected"
            assert Gate(work).judge(which, work.calls(which, []))["ours"].failure is None

    def test_have_no_packed_pass(self, tmp_path: Path) -> None:
        path = tmp_path / "bench.json"
        call = ["bench", "layers", *QUICK, "--case", "q-former", "--passes", "forward-packed", "--max-inputs", "8"]
        assert main([*call, "--json", str(path)]) == 0
        assert rows_of(path) == []


class TestSizes:
    @pytest.mark.parametrize(
        ("regime", "case", "which", "axis", "other"),
        [
            ("encode", "imagenet", "attend", "M", {"C": 261}),
            ("layers", "language", "forward", "M", {"C": 768}),
            ("decode", "flow", "forward", "Lq", {"Lk": 512}),
            ("encode-kv", "kv-256x1m-d256", "forward", "Lk", {"Lq": 256}),
        ],
    )
    def test_each_is_a_case_of_that_size(
        self, regime: str, case: str, which: str, axis: str, other: dict[str, int], tmp_path: Path
    ) -> None:
        path = tmp_path / "bench.json"
        call = ["bench", regime, *QUICK, "--case", case, "--passes", which, "--peers", "none"]
        assert main([*call, "--sizes", "70,33", "--json", str(path)]) == 0
        rows = [row for row in rows_of(path) if row["implementation"] == "ours"]
        assert [row["shape"][axis] for row in rows] == [33, 70]
        assert all(row["shape"].items() >= other.items() for row in rows)
        assert rows[0]["command"].endswith(f"--case {case} --passes {which} --sizes 33 --device cpu --seconds 0.005")

    def test_what_does_not_fit_is_a_row(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(measure, "free_bytes", lambda device: 2**36)
        path = tmp_path / "bench.json"
        call = ["bench", "layers", *QUICK, "--case", "c64", "--passes", "forward,backward", "--peers", "none"]
        assert main([*call, "--sizes", "64,1G", "--json", str(path)]) == 0
        small, large = ([row for row in rows_of(path) if (row["shape"]["M"] == 64) is small] for small in (True, False))
        assert all(row["failure"] is None for row in small)
        assert [row["pass"] for row in large] == ["forward", "backward"]
        assert all(row["failure"].startswith("out of memory: needs about ") for row in large)
        assert "out of memory" in capsys.readouterr().out

    @pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: not enough")])
    @pytest.mark.parametrize("place", ["__init__", "calls", "ours", "specification"])
    def test_running_out_anywhere_is_a_row_and_no_wrong_result(
        self, place: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def exhausted(*_: Any, **__: Any) -> Any:
            raise error

        monkeypatch.setattr(Workload, place, (lambda *_: exhausted) if place == "ours" else exhausted)
        path = tmp_path / "bench.json"
        call = ["bench", "layers", *QUICK, "--case", "c64", "--passes", "forward", "--peers", "none", "--sizes", "64"]
        assert main([*call, "--json", str(path)]) == 0
        row = next(row for row in rows_of(path) if row["implementation"] == "ours")
        assert measure.OUT_OF_MEMORY in row["failure"] and "p50_ms" not in row

    def test_other_errors_are_not_hidden(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(*_: Any, **__: Any) -> Any:
            raise RuntimeError("a defect")

        monkeypatch.setattr(Workload, "calls", broken)
        with pytest.raises(RuntimeError, match="a defect"):
            main(["bench", "layers", *QUICK, "--case", "c64", "--passes", "forward", "--peers", "none", "--sizes", "64"])


class TestCut:
    CALL = ("--case", "imagenet", *QUICK, "--passes", "forward", "--peers", "none")

    @pytest.mark.parametrize(
        ("call", "told"),
        [
            (["layers", "--max-inputs", "40"], "B 8 to 2, M 50,176 to 40, N 512 to 16, D 1,024 to 64"),
            (["layers", "--sizes", "64K"], "B 8 to 2, N 512 to 16, D 1,024 to 64"),
            (["process"], "B 32 to 2, H 8 to 4"),
        ],
    )
    def test_a_cpu_says_what_it_does_not_measure(
        self, call: list[str], told: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["bench", *call, *self.CALL]) == 0
        assert f"\ncut to fit a CPU: {told}\n" in capsys.readouterr().out

    def test_what_is_whole_is_not_cut(self) -> None:
        regime = REGIMES["layers"]
        assert regime.cut_of(regime.cases["imagenet"], torch.device("cpu")) == ""
        assert regime.cut_of(regime.cases["imagenet"].cut(7), torch.device("cuda")) == ""


class TestRerun:
    """A row's command, read by the parser, is the call that gave the row."""

    @pytest.mark.parametrize(
        ("value", "given", "told"),
        [
            ("reference", [], ["reference"]), ("reference sdpa", [], ["reference", "sdpa"]),
            ("reference", ["--backend", "sdpa"], ["sdpa"]), ("cuda,sdpa", [], ["cuda", "sdpa"]), (" ", [], None),
        ],
    )  # fmt: skip
    def test_the_environment_s_backends_are_told(
        self, value: str, given: list[str], told: list[str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """But for those that are not available here."""
        monkeypatch.setattr(dispatch, "_environment", tuple(value.replace(",", " ").split()))
        monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, value)
        path = tmp_path / "bench.json"
        call = ["bench", "decode", *QUICK, "--case", "peract", "--passes", "forward", "--peers", "none", "--max-inputs", "8"]
        assert main([*call, *given, "--json", str(path)]) == 0
        (row,) = rows_of(path)
        available = None if told is None else [name for name in told if dispatch.backends()[name][0]]
        assert build_parser().parse_args(row["command"].split()[1:]).backend == available

    @pytest.mark.parametrize(
        ("call", "expected"),
        [
            (["--max-inputs", "33", "--dtype", "bf16"], {"max_inputs": 33, "dtype": "bf16"}),
            (["--max-inputs", "512", "--dtype", "fp32"], {}),
            (["--sizes", "33", "--backend", "sdpa,reference"], {"sizes": [33], "backend": ["sdpa", "reference"]}),
            (["--max-inputs", "8", "--seconds", "0.3"], {"max_inputs": 8, "seconds": 0.3}),
        ],
    )
    def test_commands_are_read_as_they_were_given(
        self, call: list[str], expected: dict[str, Any], tmp_path: Path
    ) -> None:
        path = tmp_path / "bench.json"
        quick = [] if "--seconds" in call else ["--seconds", "0.005"]
        given = ["bench", "decode", "--device", "cpu", "--case", "peract", "--passes", "forward", *call, *quick]
        assert main([*given, "--peers", "math", "--json", str(path)]) == 0
        rows = rows_of(path)
        assert [row["implementation"] for row in rows] == ["ours", "math"]
        for row, peers in zip(rows, (None, ["math"]), strict=True):
            again = vars(build_parser().parse_args(row["command"].split()[1:]))
            before = vars(build_parser().parse_args(given))
            plain = {"max_inputs": None, "dtype": None, "sizes": None, "backend": None, "seconds": 0.005}
            assert again == {**before, "peers": peers, **plain, **expected}

    @staticmethod
    def command(regime: str, case: str, which: str, name: str, *peers: str, **changes: Any) -> str | None:
        on_gpu = Conditions(torch.device("cuda"), torch.bfloat16, **changes)
        told = on_gpu.command(REGIMES[regime], case, which, name, list(map(Peer.parse, peers)))
        return told and told.removeprefix(f"perceiver-kernels bench {regime} --case {case} --passes {which}").strip()

    def test_on_a_gpu(self) -> None:
        assert self.command("encode", "flow", "attend", "ours", compiled=True) == ""
        assert self.command("encode", "flow", "attend", "ours") == "--no-compile"
        assert self.command("encode", "flow", "attend", "compiled-eager", "compiled-eager") == "--peers compiled-eager"
        assert self.command("layers", "flow", "forward", "ours", compiled=True, max_inputs=2048) == "--max-inputs 2048"
        told = self.command("layers", "flow", "forward", "eager", size=64, seconds=1.5)
        assert told == "--sizes 64 --seconds 1.5 --peers eager"
        half = Conditions(torch.device("cuda"), torch.float16, compiled=True)
        told = half.command(REGIMES["decode"], "flow", "forward", "ours", [])
        assert told == "perceiver-kernels bench decode --case flow --passes forward --dtype fp16"

    def test_of_models(self) -> None:
        model = "imagenet-fourier-b8", "training"
        peers = "transformers", "compiled-transformers"
        assert self.command("models", *model, "ours-compiled", *peers, compiled=True) == "--peers compiled-transformers"
        assert self.command("models", *model, "transformers-compiled", *peers) == "--peers compiled-transformers"
        assert self.command("models", *model, "transformers-graphed", *peers) == "--peers transformers"
        # Cut were other regimes of the same call: models have no number of inputs.
        assert self.command("models", *model, "ours-graphed", *peers, compiled=True, max_inputs=9) == ""

    def test_what_has_no_name_has_no_command(self) -> None:
        assert self.command("encode", "photograph", "forward", "ours") is None


class TestCsv:
    def test_a_line_for_every_row(self, tmp_path: Path) -> None:
        paths = tmp_path / "bench.json", tmp_path / "deep" / "bench.csv"
        call = ["bench", "layers", *QUICK, "--case", "imagenet", "--max-inputs", "33", "--passes", "backward"]
        assert main([*call, "--peers", "cudnn", "--json", str(paths[0]), "--csv", str(paths[1])]) == 0
        with paths[1].open(newline="") as stream:
            lines = list(csv.DictReader(stream))
        rows = rows_of(paths[0])
        assert [tuple(line) for line in lines] == len(rows) * [flat.COLUMNS]
        for line, row in zip(lines, rows, strict=True):
            assert (line["kind"], line["implementation"]) == (row["kind"], row.get("implementation", ""))
            assert line["failure"] == (row["failure"] or "")
            assert line["peak_extra_bytes"] == str(row.get("peak_extra_bytes", ""))
        ours, (cudnn,) = lines[0], [line for line in lines if line["implementation"] == "cudnn"]
        assert (ours["M"], ours["C"], ours["Lq"]) == ("33", "261", "") and float(ours["p50_ms"]) == rows[0]["p50_ms"]
        assert float(ours["worst_error"]) == max(rows[0]["errors"].values())
        assert cudnn["p50_ms"] == "" and cudnn["failure"] != ""

    def test_is_checked_before_the_work(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(bench.Bench, "measure_ceilings", lambda self: 1 / 0)
        assert main(["bench", "layers", *QUICK, "--csv", str(tmp_path)]) == 2
        assert capsys.readouterr().err == f"perceiver-kernels bench: cannot write {tmp_path}: it is a folder or a device\n"

    def test_a_line_break_stays_in_its_cell(self) -> None:
        told = flat.text([{"kind": "bench", "failure": 'one,\n"two"'}])
        (line,) = csv.DictReader(told.splitlines(keepends=True))
        assert line["failure"] == 'one,\n"two"' and told.startswith("kind,regime,case,pass,implementation,")
