"""What is measured is what is said: times, bytes, floors, and the judgement that comes first."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from perceiver_kernels.cli import gate, measure, textbook
from perceiver_kernels.cli.gate import Gate
from perceiver_kernels.cli.report import CommandError, unknown_name
from perceiver_kernels.cli.stock import Peer, peers_for
from perceiver_kernels.cli.sweep import slope
from perceiver_kernels.cli.workload import PASSES, Workload, flops, least_bytes
from perceiver_kernels.testing.cases import EncodeCase

CPU = torch.device("cpu")
CASE = EncodeCase("small", B=2, M=150, C=21, N=9, D=32, H=2, d_qk=12, d_v=20)


@pytest.fixture(scope="module")
def work() -> Workload:
    return Workload(CASE, CPU, torch.float32, chunk=64)


class TestTime:
    def test_quantiles(self) -> None:
        timing = measure.Timing.of([float(i) for i in range(11, 0, -1)])
        assert (timing.p20_ms, timing.p50_ms, timing.p80_ms, timing.samples) == (3.0, 6.0, 9.0, 11)

    def test_calls_are_sampled_in_turn(self) -> None:
        order: list[str] = []
        calls: dict[str, Callable[[], Any]] = {name: (lambda name=name: order.append(name)) for name in "ab"}
        timings = measure.time_calls(calls, CPU, seconds=0.0, min_samples=4)
        assert {name: timing.samples for name, timing in timings.items()} == {"a": 4, "b": 4}
        assert order[4:] == ["a", "b"] * 4

    def test_a_slow_call_takes_its_time(self) -> None:
        timings = measure.time_calls({"slow": lambda: time.sleep(0.01)}, CPU, seconds=0.05)
        assert timings["slow"].p20_ms >= 10 and timings["slow"].samples <= 5

    @pytest.mark.gpu
    def test_the_hosts_time_is_not_the_gpus(self) -> None:
        """Not even where it takes three times as long as when it was measured, as a host with other work does."""
        x, calls = torch.zeros(1, device="cuda"), iter(range(100))

        def call() -> None:
            x.zero_()
            time.sleep(0.001 if next(calls) < 6 else 0.003)
            x.zero_()

        timing = measure.time_calls({"call": call}, torch.device("cuda"), min_samples=8, max_samples=8)["call"]
        assert timing.p50_ms < 0.5 and timing.host_us is not None and timing.host_us > 1000

    @pytest.mark.gpu
    def test_kernels_of_a_call(self) -> None:
        a = torch.randn(1024, 1024, device="cuda")
        entries = measure.kernel_times(lambda: (a @ a).add_(1.0).add_(1.0), torch.device("cuda"))
        assert sorted(entry["launches"] for entry in entries) == [1, 2]
        assert all(entry["us"] > 0 for entry in entries)

    @pytest.mark.parametrize(
        "symbol",
        ["_fwd_kernel", "void a::fwd_kernel<T, 3>(a::P)", "void a::(anonymous namespace)::fwd_kernel<(int)4>(P)", "fwd"],
    )
    def test_names_of_kernels(self, symbol: str) -> None:
        assert measure.kernel_name(symbol) == "fwd"

    def test_no_kernels_without_a_gpu(self) -> None:
        assert measure.kernel_times(lambda: torch.zeros(1), CPU) == []


class TestMemory:
    def test_peak_counts_temporaries_and_the_result_but_not_what_was_there(self) -> None:
        before = torch.empty(1000)

        def call() -> torch.Tensor:
            temporary = torch.empty(3000)
            del temporary
            return torch.empty(2000) + before[0]

        assert measure.peak_extra_bytes(call, CPU) == 4 * 4000

    def test_memory_freed_during_the_call_lowers_the_peak_of_what_follows(self) -> None:
        def call() -> None:
            for _ in range(5):
                torch.empty(1000)

        assert measure.peak_extra_bytes(call, CPU) == 4000

    def test_slope_is_between_the_two_largest(self) -> None:
        rows = [
            {"implementation": "ours", "M": M, "shape": {"B": 2}, "peak_extra_bytes": peak}
            for M, peak in ((10, 900), (100, 1000), (200, 2000), (400, None))
        ]
        assert slope(rows, "ours") == 5.0
        assert slope(rows[:1], "ours") is None


@pytest.mark.parametrize(("seconds", "rows"), [(0.001, 1536), (0.015, 1536), (0.02, 768), (0.12, 768), (0.2, 384)])
def test_a_slow_product_of_a_cpu_is_a_small_one(seconds: float, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp16 a product of 1,536 rows took seconds, five times."""
    monkeypatch.setattr(measure._HostClock, "sample", lambda *_: seconds)
    assert measure._cpu_product(torch.float32) == rows


class TestAttempt:
    def test_success_is_none(self) -> None:
        assert measure.attempt(lambda: 1) is None

    def test_the_first_sentence_is_the_reason(self) -> None:
        def call() -> None:
            raise ValueError("too wide. Try something else.")

        assert measure.attempt(call) == "too wide"

    def test_a_long_reason_ends_between_words(self) -> None:
        def call(text: str) -> Any:
            raise ValueError(text)

        told = measure.attempt(lambda: call("word " * 60))
        assert told == "word " * 38 + "word..." and len(told) <= measure.LONGEST_REASON
        assert measure.attempt(lambda: call("w" * 300)) == "w" * 197 + "..."

    def test_indented_lines_are_items(self) -> None:
        def call() -> None:
            raise ValueError("no backend can serve pack_inputs\n  cuda: not built\n  triton: no CUDA device")

        told = "no backend can serve pack_inputs; cuda: not built; triton: no CUDA device"
        assert measure.attempt(call) == told

    def test_out_of_memory_says_so(self) -> None:
        def call() -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

        assert measure.attempt(call) == "out of memory"

    def test_sdpa_explains_itself_in_warnings(self) -> None:
        def call() -> None:
            warnings.warn("Flash attention kernel not used because: (Triggered internally)", stacklevel=1)
            warnings.warn(
                "Head dim must be at most 256, got 261 (Triggered internally at sdp.cpp:1)", stacklevel=1
            )
            warnings.warn("cuDNN attention has been runtime disabled. (Triggered internally)", stacklevel=1)
            raise RuntimeError("No available kernel. Aborting execution.")

        assert measure.attempt(call) == "Head dim must be at most 256, got 261"


class TestPeers:
    def test_names_round_trip(self) -> None:
        for name in ("eager", "flash", "efficient-pad8", "compiled-eager", "compiled-cudnn-pad8", "flash-attn", "transformers"):
            assert Peer.parse(name).name == name

    def test_unknown_names_get_the_nearest(self) -> None:
        with pytest.raises(CommandError, match="no peer named 'eagre'; nearest: eager"):
            Peer.parse("eagre")
        with pytest.raises(CommandError, match="no peer named 'transformers-pad8'; nearest: transformers"):
            Peer.parse("transformers-pad8")
        assert "nearest: b" in str(unknown_name("thing", "bb", ["b", "xyz"]))

    def test_odd_head_dims_add_padded_variants_on_a_gpu(self) -> None:
        def names(dim: int, kind: str) -> set[str]:
            return {peer.name for peer in peers_for(None, (dim,), torch.device(kind), compiled=False)}

        assert names(261, "cuda") - names(64, "cuda") == {
            f"{n}-pad8" for n in ("math", "flash", "cudnn", "efficient")
        }
        assert names(261, "cpu") == {"eager", "math", "flash"}

    @pytest.mark.parametrize("name", ["eager", "math", "math-pad8", "flash"])
    def test_stock_layer_computes_what_ours_computes(self, name: str) -> None:
        case = EncodeCase("equal", B=2, M=65, C=21, N=9, D=32, H=2, d_qk=13, d_v=13)
        work = Workload(case, CPU, torch.float32)
        for mine, theirs in zip(
            work.ours("backward")(), work.stock("backward", Peer.parse(name))(), strict=True
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


class TestFlops:
    """The formulas that rates are computed from, against what runs."""

    def test_absorbed_layer_is_the_layers_own_formula(self, work: Workload) -> None:
        for method in ("absorbed", "projected"):
            assert flops(CASE, "forward", method) == work.layer.flops(CASE.B, CASE.N, CASE.M, method=method)

    def test_projected_forward_is_what_the_textbook_runs(self, work: Workload) -> None:
        with FlopCounterMode(display=False) as counter:
            work.stock("forward", Peer("eager"))()
        assert counter.get_total_flops() == flops(CASE, "forward", "projected")

    def test_projected_backward_counts_the_scores_again(self, work: Workload) -> None:
        layer, latents = work.stock_layer(Peer("eager")), work.latents.clone().requires_grad_()
        with FlopCounterMode(display=False) as counter:
            layer(latents, work.inputs).sum().backward()
        recomputed = 2 * CASE.B * CASE.H * CASE.N * CASE.M * CASE.d_qk
        assert counter.get_total_flops() + recomputed == flops(CASE, "backward", "projected")

    def test_kernels_in_units_of_rows_tokens_and_channels(self) -> None:
        unit = CASE.B * CASE.R * CASE.M * CASE.C
        assert [flops(CASE, which, "absorbed") // unit for which in ("attend", "dq", "dx")] == [4, 6, 8]

    @pytest.mark.parametrize("which", PASSES)
    def test_every_pass_has_a_floor(self, which: str) -> None:
        assert least_bytes(CASE, which, 2) >= 2 * CASE.B * CASE.M * CASE.C


class TestGate:
    @pytest.mark.parametrize("which", PASSES)
    def test_ours_passes(self, work: Workload, which: str) -> None:
        verdict = Gate(work).judge(which, {"ours": work.ours(which)})["ours"]
        assert verdict.failure is None
        assert list(verdict.errors) == work.names(which)

    @pytest.mark.parametrize("which", PASSES)
    def test_a_wrong_value_does_not(self, work: Workload, which: str) -> None:
        def wrong() -> list[torch.Tensor]:
            tensors = [tensor.clone() for tensor in work.ours(which)()]
            tensors[-1].view(-1)[0] += 1e-3 * tensors[-1].abs().max()
            return tensors

        failure = Gate(work).judge(which, {"ours": wrong})["ours"].failure
        assert failure is not None and failure.startswith(work.names(which)[-1])

    @pytest.mark.parametrize("which", ["dq", "backward", "backward-inputs"])
    def test_one_input_whose_scores_have_no_gradient(self, which: str) -> None:
        """What is zero there is what rounding leaves of others that cancel, and is judged by their size."""
        one = Workload(dataclasses.replace(CASE, M=1), torch.device("cpu"), torch.float32)
        name = "dq" if which == "dq" else "dlatents"
        place = one.names(which).index(name)
        assert one.specification(which, torch.float64)[place].norm() < 1e-9

        def wrong() -> list[torch.Tensor]:
            tensors = [tensor.clone() for tensor in one.ours(which)()]
            tensors[place].view(-1)[0] += 1e-3
            return tensors

        verdicts = Gate(one).judge(which, {"ours": one.ours(which), "wrong": wrong})
        assert verdicts["ours"].failure is None
        assert (verdicts["wrong"].failure or "").startswith(name)

    def test_a_wrong_shape_does_not(self, work: Workload) -> None:
        verdict = Gate(work).judge("forward", {"ours": lambda: [work.latents[:1]]})["ours"]
        assert verdict.failure == "out must be (2, 9, 32), got (1, 9, 32)"

    @pytest.mark.parametrize("which", ["attend", "attend-masked", "dq", "dx", "backward-inputs"])
    def test_streaming_changes_nothing(
        self, work: Workload, which: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The specification in parts of a few tokens is the specification."""
        whole = work.specification(which, torch.float64)
        monkeypatch.setattr(textbook, "PART_BYTES", 2**17)
        monkeypatch.setattr(gate, "PIECE_ELEMENTS", 100)
        for a, b in zip(whole, work.specification(which, torch.float64), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
            assert gate.relative_error(a.float(), b) < 1e-6
