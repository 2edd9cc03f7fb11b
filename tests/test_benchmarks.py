"""The benchmarks run where there is no GPU: as a smoke test, or with one line that says what is missing."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from perceiver_kernels.cli.console import Console
from perceiver_kernels.cli.report import Report

pytestmark = pytest.mark.usefixtures("one_thread")

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def imported(monkeypatch: pytest.MonkeyPatch) -> object:
    """Import a script of benchmarks/ as Python does when it is run from there."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


@pytest.mark.skipif(torch.cuda.is_available(), reason="make gpu-bench measures here")
def test_pytest_benchmark_runs_every_regime_small(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    out = tmp_path / "benchmark.json"
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--benchmark-json={out}"]
    names = [
        "encode-imagenet-attend-ours", "layers-imagenet-forward-flash", "decode-flow-backward-ours",
        "process-language-forward-flash", "encode-kv-kv-256x1m-d256-forward-ours", "models-shape-decoder-129-forward-sdpa",
    ]  # fmt: skip
    chosen = [f"benchmarks/test_regimes.py::test_pass[{name}]" for name in (*names, "layers-language-forward-flash")]
    call = [sys.executable, "-m", "pytest", *options, *chosen]
    # pytest-benchmark measures nothing where it takes itself for a worker of xdist.
    outer = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(call, cwd=BENCHMARKS.parent, env=outer, capture_output=True, text=True, timeout=300)
    assert "6 passed, 1 skipped" in done.stdout, done.stdout + done.stderr
    results = json.loads(out.read_text())
    assert "backends" in results["machine_info"]["perceiver_kernels"]
    assert {each["param"] for each in results["benchmarks"]} == set(names)
    for each in results["benchmarks"]:
        assert each["stats"]["rounds"] == 3 and each["stats"]["median"] > 0
        assert each["extra_info"]["bytes"] > 0 and each["extra_info"]["flops"] > 0 and each["extra_info"]["shape"]


def test_pytest_benchmark_has_every_default_case(imported) -> None:
    pytest.importorskip("pytest_benchmark")
    module = imported("test_regimes")
    found = {tuple(parameters.values) for parameters in module.measured()}
    for regime in module.REGIMES.values():
        assert {case for name, case, _, _ in found if name == regime.name} == set(regime.default_cases)
        assert {which for name, _, which, _ in found if name == regime.name} == set(regime.default_passes)
    assert ("models", "imagenet-fourier-b1", "training", "ours") not in found


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_gpu_bench_without_a_gpu_is_one_line(imported, capsys: pytest.CaptureFixture[str]) -> None:
    assert imported("gpu_bench").main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == "gpu_bench: PyTorch finds no GPU here\n"


@pytest.mark.parametrize("arguments", [["--parts", "kernel"], ["--cases", "imagnet"]])
def test_gpu_bench_knows_its_parts_and_cases(
    imported, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        imported("gpu_bench").main(arguments)
    assert stopped.value.code == 2
    assert f"unknown: {arguments[1]}" in capsys.readouterr().err


def test_every_part_runs_small(imported, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The parts of gpu_bench on a CPU, with cases cut down: what they write is what the tables read."""
    gpu_bench, tables = imported("gpu_bench"), imported("tables")
    others = {"decode": "flow", "process": "imagenet", "encode-kv": "kv-256x1m-d256"}
    for name, case in {"encode": "imagenet", "layers": "imagenet", **others}.items():
        regime = gpu_bench.REGIMES[name]
        cases = {each: regime.cases[each].scaled(128) for each in (case, *(["imagenet-b1"] if name == "layers" else []))}
        small = dataclasses.replace(regime, cases=cases, default_cases=(case,))
        monkeypatch.setitem(gpu_bench.REGIMES, name, small)
    for name in ("KERNEL_CASES", "JUDGED_CASES"):
        monkeypatch.setattr(gpu_bench, name, ("imagenet",))
    monkeypatch.setattr(gpu_bench, "LAYER_SIZES", (256, 512))
    monkeypatch.setattr(gpu_bench.memory, "default_sizes", lambda *_, **__: [256, 512])
    monkeypatch.setattr(gpu_bench, "TEN_MILLION", 512)
    monkeypatch.setattr(gpu_bench, "PHOTOGRAPH_SIDE", 20)
    models = gpu_bench.REGIMES["models"]
    names = ("imagenet-fourier-b8", "multimodal-part", "shape-decoder-129", "set-transformer-modelnet40-b16")
    small = {name: models.cases[name].scaled() for name in names}
    monkeypatch.setitem(gpu_bench.REGIMES, "models", dataclasses.replace(models, cases=small, default_cases=tuple(small)))
    replaced = gpu_bench.REGIMES["replaced"]
    small = {name: replaced.cases[name].scaled() for name in ("transformers-imagenet-b8", "torch-512x50k-c512-h8")}
    monkeypatch.setitem(gpu_bench.REGIMES, "replaced", dataclasses.replace(replaced, cases=small, default_cases=tuple(small)))
    context = gpu_bench.Context(
        tmp_path,
        Console(plain=True),
        torch.device("cpu"),
        torch.float32,
        float("inf"),
        None,
        ["eager"],
        False,
        0.01,
    )
    for part in gpu_bench.PARTS.values():
        part(context)
    assert context.failures == []
    results = tables.load(tmp_path)
    assert set(results) == set(gpu_bench.PARTS)
    # A CPU works while the host waits: only a GPU has host times of its own, and kernels. Examples are not measured here.
    for name in tables.TABLES.keys() - {"host", "attention-kernels", "two-backends", "examples"}:
        assert len(tables.TABLES[name](results)) > 2, name
    for row in results["process"]["rows"]:
        row |= {"host_us": 12.3, "kernels": [{"kernel": "_one_kernel", "launches": 2.0, "us": 4.5}]}
    assert tables.host(results)[-1] == "| imagenet | backward | 12 |"
    assert tables.attention_kernels(results)[-1].endswith(" | one 0.0045 (2) |")
    assert len(tables.summary(results)) == 1 + 5 + 4 + 3 + 3 * 2


def test_every_kind_of_case_has_one_part(imported) -> None:
    gpu_bench = imported("gpu_bench")
    for name in {regime for regime, _ in gpu_bench.KINDS.values()}:
        parts = [belongs for regime, belongs in gpu_bench.KINDS.values() if regime == name]
        for case in gpu_bench.REGIMES[name].cases.values():
            assert [belongs(case) for belongs in parts].count(True) == 1, case.name


def test_the_parts_that_write_results_are_listed(imported) -> None:
    gpu_bench = imported("gpu_bench")
    for text in ((imported("tables").RESULTS / "README.md").read_text(), gpu_bench.__doc__):
        assert [part for part in gpu_bench.PARTS if not re.search(rf"[`\s]{part}[`,:]", text)] == []


def test_tables_of_what_is_no_report_are_one_line(
    imported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "h200").mkdir()
    path = tmp_path / "h200" / "kernels.json"
    path.write_text('{"schema": 2, "rows": []}')
    assert imported("tables").main(["--check", "--results", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"tables: argument --results: {path} must have schema 1, got 2\n"


def test_a_named_case_is_measured_where_it_is_no_default(
    imported, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpu_bench, tables = imported("gpu_bench"), imported("tables")
    regime = gpu_bench.REGIMES["decode"]
    small = {name: case.scaled(40) for name, case in regime.cases.items()}
    monkeypatch.setitem(gpu_bench.REGIMES, "decode", dataclasses.replace(regime, cases=small))
    named = ("multimodal", "imagenet")
    context = gpu_bench.Context(
        tmp_path, Console(plain=True), torch.device("cpu"), torch.float32, float("inf"), named, [], False, 0.01
    )
    gpu_bench.PARTS["decode"](context)
    rows = tables.load(tmp_path)["decode"]["rows"]
    assert context.failures == [] and {row["case"] for row in rows} == set(named)


def test_large_photograph_is_judged(imported, capsys: pytest.CaptureFixture[str]) -> None:
    """A small square of the same job: 900 pixels in chunks of 256, both passes within the accuracy rule."""
    report = Report("large", None)
    large = imported("large")
    failures = large.measure_photograph(report, Console(plain=True), torch.device("cpu"), side=30, chunk=256)
    assert failures == []
    assert [row["pass"] for row in report.rows] == ["forward", "backward"]
    assert all(row["M"] == 900 and row["peak_extra_bytes"] > 0 for row in report.rows)
    assert "900 pixels x 261 channels" in capsys.readouterr().out
