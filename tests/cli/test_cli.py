"""The command line as its user meets it: what is printed, where, and with which exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from perceiver_kernels import __version__, dispatch
from perceiver_kernels.cli import COMMANDS, build_parser, check, main
from perceiver_kernels.cli.attention_workload import AttentionWorkload
from perceiver_kernels.cli.workload import Workload
from perceiver_kernels.dispatch import ENVIRONMENT_VARIABLE

pytestmark = pytest.mark.usefixtures("one_thread")

TINY_BENCH = ["bench", "encode", "--case", "imagenet", "--device", "cpu", "--max-inputs", "140", "--seconds", "0.01"]
TINY_RUN = ["run", "--preset", "tiny", "--device", "cpu"]


def without(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """Make imports of modules fail as if they were not installed."""
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)


def set_environment(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    """PERCEIVER_KERNELS_BACKEND as if it had been set before the import, which reads it once."""
    monkeypatch.setattr(dispatch, "_environment", tuple((value or "").replace(",", " ").split()))
    if value is None:
        monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    else:
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, value)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0 and capsys.readouterr().out == f"perceiver-kernels {__version__}\n"
    assert main(["info", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["environment"]["perceiver_kernels"] == __version__


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        with pytest.raises(SystemExit) as stopped:
            build_parser().parse_args([command, "--help"])
        assert stopped.value.code == 0
        assert "--json" in capsys.readouterr().out


def test_no_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert "required: {info,run" in told and told.count("\n") == 1


class TestInfo:
    def test_json_parses_and_names_every_backend(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["info", "--json", "-"]) == 0
        captured = capsys.readouterr()
        environment = json.loads(captured.out)["environment"]
        assert set(environment["backends"]) == {"cuda", "triton", "sdpa", "reference"}
        assert environment["backends"]["reference"]["available"] is True
        assert all(entry["available"] or entry["reason"] for entry in environment["backends"].values())
        assert "Backends" in captured.err

    def test_a_broken_probe_is_a_line(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: 1 / 0)
        assert main(["info", "--plain"]) == 0
        assert "not found out: ZeroDivisionError" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("value", "told"),
        [
            ("sdpa\nreference", "allowed, in this order: sdpa, reference (by PERCEIVER_KERNELS_BACKEND)"),
            ("tritn", "in this order: PERCEIVER_KERNELS_BACKEND must name backends among"),
            (None, "allowed, in this order: whatever is available"),
        ],
    )
    def test_tells_what_the_environment_allows(
        self,
        value: str | None,
        told: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        set_environment(monkeypatch, value)
        assert main(["info", "--plain"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert any(told in line for line in lines)
        # A line break in the value is none in the table.
        rows = [line for line in lines if line.startswith(ENVIRONMENT_VARIABLE)]
        assert [row.split()[1:] for row in rows] == ([value.split()] if value else [])

    def test_is_a_module_and_a_program(self) -> None:
        call = [sys.executable, "-m", "perceiver_kernels", "info", "--json", "-"]
        done = subprocess.run(call, capture_output=True, text=True, timeout=120, check=True)
        assert json.loads(done.stdout)["command"] == "info"


class TestBench:
    def test_rows_are_judged_timed_and_measured(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "deep" / "bench.json"
        passes = "attend,forward,backward"
        assert main([*TINY_BENCH, "--passes", passes, "--peers", "eager,cudnn", "--json", str(path)]) == 0
        report = json.loads(path.read_text())
        rows = {(row["pass"], row["implementation"]): row for row in report["rows"] if row["kind"] == "bench"}
        assert len(rows) == 3 + 2 + 2 * 3
        for which in passes.split(","):
            ours = rows[which, "ours"]
            assert ours["p20_ms"] <= ours["p50_ms"] <= ours["p80_ms"] and ours["samples"] >= 5
            assert ours["peak_extra_bytes"] > 0 and 0 < max(ours["errors"].values()) < 1e-5
            # A peer that cannot run keeps its row.
            assert rows[which, "cudnn"]["failure"] and "p50_ms" not in rows[which, "cudnn"]
        (once, tenfold) = [row for row in report["rows"] if row["kind"] == "chunked-memory"]
        assert tenfold["M"] == 10 * once["M"]
        assert report["ceilings"]["tflops"] > 0
        assert "cudnn cannot: " in capsys.readouterr().out

    def test_one_input_is_an_input(self, tmp_path: Path) -> None:
        """Cutting kept the remainder by the tile, whatever the limit: 50,176 inputs cut to 1 were none."""
        path = tmp_path / "bench.json"
        call = ["bench", "encode", "--case", "imagenet", "--device", "cpu", "--max-inputs", "1"]
        assert (
            main([*call, "--passes", "forward", "--peers", "none", "--seconds", "0.01", "--json", str(path)])
            == 0
        )
        assert {row["shape"]["M"] for row in json.loads(path.read_text())["rows"]} == {1}

    def test_a_wrong_result_is_not_timed(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        right = Workload.ours

        def wrong(work: Workload, which: str) -> Any:
            return lambda: tuple(1.001 * tensor for tensor in right(work, which)())

        monkeypatch.setattr(Workload, "ours", wrong)
        assert main([*TINY_BENCH, "--passes", "attend", "--peers", "none", "--json", "-"]) == 1
        captured = capsys.readouterr()
        (row,) = json.loads(captured.out)["rows"]
        assert row["failure"].startswith("not timed: z: ") and "p50_ms" not in row
        assert "not timed" in captured.err


class TestBenchAttention:
    """Attention over given keys and values: the rows, and what a wrong result does."""

    CALL = ("--device", "cpu", "--max-inputs", "40", "--seconds", "0.01")

    @pytest.mark.parametrize(
        ("regime", "case"), [("decode", "flow"), ("process", "language"), ("encode-kv", "kv-512x50k-d128")]
    )
    def test_rows_are_those_of_encode(
        self, regime: str, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        without(monkeypatch, "ffpa_attn")
        path = tmp_path / "bench.json"
        call = ["bench", regime, "--case", case, *self.CALL, "--peers", "eager,math,cudnn,ffpa"]
        assert main([*call, "--json", str(path)]) == 0
        report = json.loads(path.read_text())
        rows = {(row["pass"], row["implementation"]): row for row in report["rows"]}
        assert report["command"] == f"bench {regime}" and len(rows) == 2 * 5
        for which, tensors in (("forward", {"out"}), ("backward", {"dq", "dk", "dv"})):
            ours = rows[which, "ours"]
            assert (ours["kind"], ours["case"], ours["backend"], ours["failure"]) == ("bench", case, "sdpa", None)
            assert set(ours["errors"]) == set(ours["eager_errors"]) == tensors
            assert set(ours["shape"]) == {"B", "H", "Lq", "Lk", "d_qk", "d_v"}
            named = f"perceiver-kernels bench {regime} --case {case} --passes {which}"
            assert ours["command"] == f"{named} --max-inputs 40 --device cpu --seconds 0.01"
            assert ours["p20_ms"] <= ours["p50_ms"] <= ours["p80_ms"] and ours["floor_ms"] > 0
            assert rows[which, "math"]["backend"] == "stock" and rows[which, "math"]["tflops"] > 0
            assert rows[which, "cudnn"]["failure"] and "p50_ms" not in rows[which, "cudnn"]
            assert rows[which, "ffpa"]["failure"].startswith("ffpa-attn cannot be imported: ")

    @pytest.mark.parametrize("which", ["forward", "backward"])
    def test_a_wrong_result_is_not_timed(
        self, which: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        right = AttentionWorkload.ours

        def wrong(work: AttentionWorkload, which: str) -> Any:
            return lambda: (*right(work, which)()[:-1], 1.001 * right(work, which)()[-1])

        monkeypatch.setattr(AttentionWorkload, "ours", wrong)
        call = ["bench", "process", "--case", "imagenet", *self.CALL, "--passes", which, "--peers", "none"]
        assert main([*call, "--json", "-"]) == 1
        (row,) = json.loads(capsys.readouterr().out)["rows"]
        named = {"forward": "out", "backward": "dv"}[which]
        assert row["failure"].startswith(f"not timed: {named}: ") and "p50_ms" not in row

    def test_a_peer_that_gives_nan_is_told_off(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        right = AttentionWorkload.stock

        def wrong(work: AttentionWorkload, which: str, peer: Any) -> Any:
            return lambda: tuple(float("nan") * tensor for tensor in right(work, which, peer)())

        monkeypatch.setattr(AttentionWorkload, "stock", wrong)
        call = ["bench", "decode", "--case", "flow", *self.CALL, "--passes", "backward", "--peers", "math"]
        assert main([*call, "--json", "-"]) == 0
        captured = capsys.readouterr()
        ours, math = json.loads(captured.out)["rows"]
        assert "inaccurate" not in ours and math["inaccurate"].startswith("dq: ") and math["failure"] is None
        assert "math is inaccurate: dq: " in captured.err


class TestRun:
    def test_main_job_writes_json_and_plot(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        pytest.importorskip("skimage")
        pytest.importorskip("matplotlib")
        assert main([*TINY_RUN, "--output", str(tmp_path / "out"), "--progress"]) == 0
        captured = capsys.readouterr()
        assert "astronaut" in captured.out and "closed form" in captured.out
        assert str(tmp_path / "out" / "plot.png") in captured.out
        assert (tmp_path / "out" / "plot.png").read_bytes().startswith(b"\x89PNG")
        report = json.loads((tmp_path / "out" / "results.json").read_text())
        assert report["model"]["parameters"] > 0
        assert {row["kind"] for row in report["rows"]} == {"bench", "memory"}
        assert {"ours", "ours-chunked", "eager", "math"} <= {row["implementation"] for row in report["rows"]}
        assert captured.err != ""

    def test_without_optional_packages_the_text_says_what_is_missing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        image = pytest.importorskip("PIL.Image")
        image.effect_mandelbrot((64, 48), (-2, -1, 1, 1), 20).save(tmp_path / "picture.png")
        without(
            monkeypatch,
            "rich",
            "matplotlib",
            "matplotlib.figure",
            "matplotlib.backends.backend_agg",
            "skimage",
        )
        given = ["--image", str(tmp_path / "picture.png"), "--output", str(tmp_path / "out")]
        assert main([*TINY_RUN, *given]) == 0
        captured = capsys.readouterr()
        assert "plot skipped: matplotlib is not installed" in captured.out
        assert "picture.png" in captured.out
        assert captured.err == ""

    def test_no_photograph_at_all(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        without(monkeypatch, "skimage")
        assert main([*TINY_RUN, "--output", str(tmp_path)]) == 2
        assert "pass --image PATH" in capsys.readouterr().err

    @pytest.mark.parametrize("kind", ["text", "truncated", "missing", "folder", "empty"])
    def test_unreadable_image_is_one_line(
        self, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        image = pytest.importorskip("PIL.Image")
        path = tmp_path / "image.png"
        if kind == "text":
            path.write_text("this is no image")
        elif kind == "truncated":
            image.effect_mandelbrot((64, 64), (-2, -1, 1, 1), 20).save(path)
            path.write_bytes(path.read_bytes()[:200])
        elif kind == "folder":
            path.mkdir()
        elif kind == "empty":
            path.touch()
        assert main([*TINY_RUN, "--image", str(path), "--output", str(tmp_path / "out")]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith(f"perceiver-kernels run: cannot read image {path}: ")
        assert captured.err.count("\n") == 1 and captured.out == ""

    @pytest.mark.usefixtures("forgotten_choices")
    def test_a_model_that_no_backend_serves_is_one_line(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A backend without an operation of the model: the reason is told, not a traceback."""
        pytest.importorskip("skimage")
        monkeypatch.setattr(
            "perceiver_kernels.dispatch.TABLE", {**dispatch.TABLE, "attention": {"sdpa": "sdpa"}}
        )
        assert main([*TINY_RUN, "--backend", "reference", "--output", str(tmp_path)]) == 2
        told = capsys.readouterr().err
        assert "the model cannot run here: no backend can serve attention" in told and told.count("\n") == 1


class TestMemory:
    def test_chunked_does_not_grow_and_packed_does(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("perceiver_kernels.cli.sweep.CPU_CHUNK", 512)
        path = tmp_path / "memory.json"
        call = ["memory", "--device", "cpu", "--sizes", "1K,2K,4K", "--peers", "eager", "--json", str(path)]
        assert main(call) == 0
        rows = json.loads(path.read_text())["rows"]
        peaks = {(row["pass"], row["implementation"], row["M"]): row["peak_extra_bytes"] for row in rows}
        for which in ("forward", "backward"):
            assert peaks[which, "ours-chunked", 4096] <= 1.05 * peaks[which, "ours-chunked", 2048]
            assert peaks[which, "ours", 4096] > 1.8 * peaks[which, "ours", 2048] > 0
            assert peaks[which, "eager", 4096] > peaks[which, "ours", 4096]
        assert peaks["backward", "ours", 4096] == pytest.approx(
            next(row["predicted_bytes"] for row in reversed(rows) if row["implementation"] == "ours"), rel=0.05
        )

    def test_out_of_memory_is_a_data_point(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr("perceiver_kernels.cli.measure.free_bytes", lambda device: 2**21)
        monkeypatch.setattr("perceiver_kernels.cli.sweep.CPU_CHUNK", 256)
        path = tmp_path / "memory.json"
        call = ["memory", "--device", "cpu", "--sizes", "1K,4K", "--passes", "forward", "--peers", "eager"]
        assert main([*call, "--json", str(path)]) == 0
        rows = {(row["implementation"], row["M"]): row for row in json.loads(path.read_text())["rows"]}
        assert rows["eager", 4096]["failure"].startswith("out of memory: needs about")
        assert rows["ours-chunked", 4096]["failure"] is None
        assert "out of memory" in capsys.readouterr().out


class TestCheck:
    def test_reference_passes(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["check", "--backend", "reference", "--device", "cpu", "--json", "-"]) == 0
        rows = json.loads(capsys.readouterr().out)["rows"]
        assert rows and {row["verdict"] for row in rows} == {"ok"}

    def test_a_list_is_backends_of_its_own(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(check, "PROBES", check.PROBES[:1])
        assert main(["check", "--backend", "sdpa,reference", "--device", "cpu", "--json", "-"]) == 0
        rows = json.loads(capsys.readouterr().out)["rows"]
        assert [row["backend"] for row in rows] == 2 * ["sdpa", "reference"]

    def test_a_wrong_backend_fails(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from perceiver_kernels.backends import sdpa

        right = sdpa.shared_kv_attention

        def wrong(*args: Any, **kwargs: Any) -> Any:
            z, *rest = right(*args, **kwargs)
            return (1.01 * z, *rest)

        monkeypatch.setattr(sdpa, "shared_kv_attention", wrong)
        assert main(["check", "--backend", "sdpa", "--device", "cpu", "--plain"]) == 1
        assert "WRONG: sdpa shared_kv_attention float32: z: " in capsys.readouterr().out

    def test_a_backend_that_is_not_there(self, capsys: pytest.CaptureFixture[str]) -> None:
        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU")
        assert main(["check", "--backend", "cuda"]) == 2
        assert "backend cuda is not available: " in capsys.readouterr().err


def test_cuda_without_a_gpu_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert main(["run", "--device", "cuda"]) == 2
    assert "PyTorch finds no GPU" in capsys.readouterr().err


@pytest.mark.parametrize("call", [TINY_BENCH, TINY_RUN, ["memory", "--device", "cpu", "--sizes", "1K"]])
@pytest.mark.parametrize(
    ("value", "told"),
    [
        (
            "tritn",
            "PERCEIVER_KERNELS_BACKEND must name backends among cuda, triton, sdpa, reference, got 'tritn'",
        ),
        ("cuda", "PERCEIVER_KERNELS_BACKEND allows no backend that is available: cuda: "),
    ],
)
def test_an_environment_without_a_backend_is_one_line(
    call: list[str], value: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.chdir(tmp_path)
    set_environment(monkeypatch, value)
    assert main(call) == 2
    captured = capsys.readouterr()
    assert told in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert list(tmp_path.iterdir()) == [] or call is TINY_RUN
