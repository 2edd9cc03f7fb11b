"""`memory`: what is kept for a backward, sizes that only fake tensors have, originals, where lines end, snapshots."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from perceiver_kernels.cli import fake, main, measure, memory, originals, snapshot, sweep
from perceiver_kernels.cli.saved import saved_bytes
from perceiver_kernels.cli.stock import Peer
from perceiver_kernels.cli.workload import Workload, chunk_size
from perceiver_kernels.testing.cases import EncodeCase

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
CASE = EncodeCase("small", B=2, M=500, C=21, N=9, D=32, H=2, d_qk=12, d_v=12)
FAKE = ["memory", "--device", "fake", "--peers"]


def rows_of(path: Path) -> dict[tuple[str, str, int], dict[str, Any]]:
    rows = json.loads(path.read_text())["rows"]
    return {(row["pass"], row["implementation"], row["M"]): row for row in rows}


class TestSaved:
    def test_a_storage_counts_once_and_whole(self) -> None:
        x, w = torch.randn(100, 10, requires_grad=True), torch.randn(10, requires_grad=True)

        def forward() -> torch.Tensor:
            y = x * 2
            # Both factors are saved, and both are parts of y.
            return (y[:50] * y[50:]).sum() + (y * w).sum()

        assert saved_bytes(forward, [x, w]) == 4 * 1000

    def test_what_was_given_does_not_count(self) -> None:
        layer, x = nn.Linear(8, 4), torch.randn(3, 8, requires_grad=True)
        assert saved_bytes(lambda: layer(x), [x, *layer.parameters()]) == 0
        assert saved_bytes(lambda: layer(x), []) == 4 * (3 * 8 + 8 * 4)

    def test_results_that_are_kept_count(self) -> None:
        x = torch.randn(7, requires_grad=True)
        assert saved_bytes(lambda: x.exp(), [x]) == 4 * 7

    def test_without_gradient_nothing_is_kept(self) -> None:
        x = torch.randn(7)
        assert saved_bytes(lambda: x.exp(), [x]) == 0


class TestLiveStorages:
    @pytest.mark.parametrize("real", [True, False])
    def test_peak_is_that_of_the_allocator(self, real: bool) -> None:
        def call() -> torch.Tensor:
            x = torch.zeros(1000)
            y = x + 1
            del x
            return y.view(10, 100).transpose(0, 1)[:5] + torch.zeros(2, 5, 100)[:, :, :1] * y[:5, None]

        if real:
            assert fake.peak_extra_bytes(call) == measure.peak_extra_bytes(call, CPU)
        else:
            with fake.tensors():
                found = fake.peak_extra_bytes(call)
            assert found == fake.peak_extra_bytes(call)

    def test_what_was_there_and_views_are_not_counted(self) -> None:
        x = torch.zeros(1000)
        assert fake.peak_extra_bytes(lambda: x.view(10, 100)[1:].add_(1)) == 0

    @pytest.mark.parametrize(("name", "within"), [("eager", 0.02), ("flash", 0.1)])
    @pytest.mark.parametrize("which", ["forward", "backward"])
    def test_fake_layers_take_what_real_ones_take(self, name: str, within: float, which: str) -> None:
        """What is not seen is the scratch of one operator, as the fused attention of a CPU has it."""
        work = Workload(CASE, CPU, torch.float32)
        real = measure.peak_extra_bytes(work.stock(which, Peer(name)), CPU)
        with fake.tensors():
            work = fake.FakeWorkload(CASE, CPU, torch.float32)
            assert fake.peak_extra_bytes(work.stock(which, Peer(name))) == pytest.approx(real, rel=within)


class TestFake:
    def test_sizes_that_no_machine_has(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "fake.json"
        pytest.importorskip("transformers")
        call = [*FAKE, "eager,transformers", "--sizes", "512K,4M", "--json", str(path)]
        assert main(call) == 0
        rows, told = rows_of(path), capsys.readouterr().out
        assert all(row["predicted"] and row["dtype"] == "bfloat16" for row in rows.values())
        assert rows["backward", "eager", 4 * 2**20]["peak_extra_bytes"] > 18 * 2**30
        ours, chunked = (rows["backward", name, 4 * 2**20] for name in ("ours", "ours-chunked"))
        assert ours["backend"] == "fused" and ours["peak_extra_bytes"] == pytest.approx(ours["predicted_bytes"], rel=0.01)
        assert chunked["peak_extra_bytes"] == rows["backward", "ours-chunked", 2**19]["peak_extra_bytes"] < 64 * 2**20
        assert "predicted with fake tensors" in told and "closed form 548.0" in told

    def test_a_backend_cannot_be_asked_for(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([*FAKE, "none", "--backend", "sdpa"]) == 2
        captured = capsys.readouterr()
        assert "--backend must be left out with --device fake, the default without a GPU, where none runs" in captured.err
        assert captured.err.endswith("got sdpa\n") and captured.err.count("\n") == 1 and captured.out == ""

    def test_sizes_that_nobody_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fakes = memory.default_sizes(memory.GPU_CASE, CPU, torch.bfloat16, predict=True)
        assert (fakes[0], fakes[-1]) == (1024, 2**26)
        monkeypatch.setattr(measure, "free_bytes", lambda device: 2**40)
        assert memory.default_sizes(memory.GPU_CASE, torch.device("cuda"), torch.bfloat16, predict=False) == fakes
        assert memory.default_sizes(memory.CPU_CASE, CPU, torch.float32, predict=False) == [2**10, 2**12, 2**14, 2**16]

    def test_sizes_end_where_memory_does(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(measure, "free_bytes", lambda device: 2**30)
        found = memory.default_sizes(memory.GPU_CASE, torch.device("cuda"), torch.bfloat16, predict=False)
        assert found[-1] * 261 * 2 < 2**29 <= 4 * found[-1] * 261 * 2


class TestDefaultDevice:
    """What is swept where nobody named a device."""

    @pytest.fixture(autouse=True)
    def no_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def test_without_a_gpu_its_case_is_predicted(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "fake.json"
        assert main(["memory", "--sizes", "1K,4K", "--peers", "none", "--json", str(path)]) == 0
        rows = json.loads(path.read_text())["rows"]
        assert {(row["case"], row["dtype"], row["backend"], row["predicted"]) for row in rows} == {
            (memory.GPU_CASE.name, "bfloat16", "fused", True)
        }
        assert capsys.readouterr().out.startswith("fake tensors, predicted; ")

    def test_a_cpu_is_measured_when_asked_for(self, tmp_path: Path) -> None:
        path = tmp_path / "cpu.json"
        call = ["memory", "--device", "cpu", "--sizes", "1K", "--peers", "none", "--passes", "forward", "--json", str(path)]
        assert main(call) == 0
        rows = json.loads(path.read_text())["rows"]
        assert {(row["case"], row["dtype"], row["predicted"]) for row in rows} == {(memory.CPU_CASE.name, "float32", False)}

    def test_a_backend_asks_for_a_device(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["memory", "--backend", "sdpa,reference"]) == 2
        told = capsys.readouterr().err
        assert "or be given with --device cpu, got sdpa,reference" in told and told.count("\n") == 1

    def test_a_snapshot_asks_for_a_gpu(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["memory", "--snapshot", str(tmp_path / "s.pickle")]) == 2
        assert "--snapshot must be used on a GPU" in capsys.readouterr().err


def test_collections_of_a_sweep_leave_the_heap_alone() -> None:
    """A collection that walks through all of PyTorch's modules took longer than most of the sweep's measurements."""
    before = gc.get_freeze_count()
    with measure.heap_set_aside():
        assert gc.get_freeze_count() > 100_000
    assert gc.get_freeze_count() <= before


class TestOriginals:
    @pytest.mark.parametrize("name", originals.PACKAGES)
    def test_compute_what_our_layer_computes(self, name: str) -> None:
        pytest.importorskip(originals.PACKAGES[name])
        work = Workload(CASE, CPU, torch.float32)
        with torch.no_grad():
            for projection in (work.layer.q_proj, work.layer.k_proj, work.layer.v_proj):
                assert projection.bias is not None and not projection.bias.any()
            theirs = originals.layer(name, CASE, work.layer, CPU, torch.float32)(work.latents, work.inputs)
            torch.testing.assert_close(theirs, work.layer(work.latents, work.inputs), rtol=1e-4, atol=1e-5)

    def test_a_layer_of_other_widths_is_a_reason(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        pytest.importorskip("perceiver_pytorch")
        path = tmp_path / "memory.json"
        call = [*FAKE, "perceiver-pytorch", "--case", "language", "--sizes", "256,512", "--passes", "forward"]
        assert main([*call, "--json", str(path)]) == 0
        rows = rows_of(path)
        assert "heads of one width" in rows["forward", "perceiver-pytorch", 256]["failure"]
        assert ("forward", "perceiver-pytorch", 512) not in rows
        assert "perceiver-pytorch at 256 inputs: " in capsys.readouterr().out

    def test_one_that_is_missing_is_a_reason(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(originals.PACKAGES, "transformers", "no_such_module")
        assert "transformers" not in originals.installed()
        with pytest.raises(RuntimeError, match="transformers cannot be imported: No module named 'no_such_module'"):
            originals.layer("transformers", CASE, Workload(CASE, CPU, torch.float32).layer, CPU, torch.float32)


def test_a_line_ends_where_memory_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = measure.peak_extra_bytes

    def peak(call: Any, device: torch.device) -> int:
        taken = real(call, device)
        if taken > 2**21:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return taken

    monkeypatch.setattr(measure, "peak_extra_bytes", peak)
    path = tmp_path / "memory.json"
    call = ["memory", "--device", "cpu", "--sizes", "256,2K,4K", "--peers", "eager", "--passes", "backward"]
    assert main([*call, "--json", str(path)]) == 0
    rows = rows_of(path)
    ended = rows["backward", "eager", 2048]
    assert ended["failure"] == "out of memory" and ended["peak_extra_bytes"] is ended["saved_bytes"] is None
    assert ("backward", "eager", 4096) not in rows and rows["backward", "eager", 256]["saved_bytes"] > 0


class TestChunks:
    CALL = ("memory", "--device", "cpu", "--peers", "none", "--passes", "backward", "--sizes")

    def test_a_figure_is_of_its_own_size_alone(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A chunk was a quarter of the second largest size of the sweep."""
        monkeypatch.setattr(sweep, "CPU_CHUNK", 300)
        found = {}
        for sizes in ("256,1K", "256,1K,4K", "1K"):
            path = tmp_path / f"{sizes}.json"
            assert main([*self.CALL, sizes, "--json", str(path)]) == 0
            found[sizes] = rows_of(path)
        each = [rows["backward", "ours-chunked", 1024] for rows in found.values()]
        assert len({row["peak_extra_bytes"] for row in each}) == len({row["predicted_bytes"] for row in each}) == 1
        assert {row["chunk"] for row in each} == {300}
        rows = found["256,1K"]
        assert "chunk" not in rows["backward", "ours", 256]
        # Fewer inputs are one chunk.
        one = rows["backward", "ours-chunked", 256]
        assert one["peak_extra_bytes"] == pytest.approx(one["predicted_bytes"], rel=0.1)

    def test_default_sizes_show_that_chunks_do_not_grow(self) -> None:
        """Both of the sizes between which the slope is taken are chunks, and more than one."""
        assert memory.LARGEST["cpu"] // 4 > sweep.CPU_CHUNK
        assert min(memory.LARGEST["cuda"], memory.LARGEST[memory.FAKE]) // 4 > chunk_size(memory.GPU_CASE.B)

    def test_a_heading_says_what_was_measured(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([*self.CALL, "256"]) == 0
        told = capsys.readouterr().out.splitlines()
        assert "small: B=1, 69 channels, 64 latents x 128, 1 head of 69/69, float32" in told
        assert "ours-chunked reads 4,096 inputs at a time" in told


class TestPlot:
    CALL = ("memory", "--device", "fake", "--peers", "none", "--passes", "forward")

    @pytest.mark.parametrize("sizes", [["--sizes", "1K"], ["--max-inputs", "2000"]])
    def test_one_size_is_refused_before_the_work(
        self, sizes: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main([*self.CALL, *sizes, "--plot", str(tmp_path / "p.png")]) == 2
        captured = capsys.readouterr()
        assert "argument --plot: must have two sizes at least to draw, got 1024\n" in captured.err and captured.out == ""

    def test_no_matplotlib_is_told_before_the_work(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        assert main([*self.CALL, "--sizes", "1K,2K", "--plot", str(tmp_path / "p.png")]) == 2
        captured = capsys.readouterr()
        assert "p.png: matplotlib is not installed" in captured.err and captured.out == ""
        assert list(tmp_path.iterdir()) == []


class TestSnapshot:
    def test_a_cpu_has_none(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for device in ("cpu", "fake"):
            call = ["memory", "--device", device, "--sizes", "1K,2K", "--snapshot", str(tmp_path / "s.pickle")]
            assert main(call) == 2
            captured = capsys.readouterr()
            assert "--snapshot must be used on a GPU" in captured.err and captured.err.count("\n") == 1
            assert captured.out == "" and list(tmp_path.iterdir()) == []

    @pytest.fixture
    def recorded(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        """What is asked of the allocator, which a CPU does not have."""
        asked: list[Any] = []
        monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **options: asked.append(options))
        monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", asked.append)
        return asked

    def test_of_the_largest_size_that_ran_both_ways(self, tmp_path: Path, recorded: list[Any]) -> None:
        def row(which: str, M: int, failure: str | None = None) -> dict[str, Any]:
            return {"implementation": "ours", "pass": which, "M": M, "failure": failure}

        rows = [row("forward", 64), row("backward", 64), row("forward", 128), row("backward", 128, "out of memory")]
        told = snapshot.snapshot(tmp_path / "s.pickle", CASE, rows, CPU, torch.float32)
        assert told == f"snapshot: {tmp_path / 's.pickle'}, forward + backward at 64 inputs"
        assert recorded == [{"max_entries": snapshot.MAX_ENTRIES}, str(tmp_path / "s.pickle"), {"enabled": None}]

    def test_of_nothing(self, tmp_path: Path, recorded: list[Any]) -> None:
        rows = [{"implementation": "ours", "pass": "backward", "M": 64, "failure": "out of memory"}]
        assert snapshot.snapshot(tmp_path / "s", CASE, rows, CPU, torch.float32) == "no snapshot: our layer ran at no size"
        assert recorded == []

    @pytest.mark.gpu
    def test_on_a_gpu(self, tmp_path: Path) -> None:
        path = tmp_path / "s.pickle"
        assert main(["memory", "--sizes", "1K,2K", "--peers", "none", "--snapshot", str(path)]) == 0
        assert path.stat().st_size > 1000
