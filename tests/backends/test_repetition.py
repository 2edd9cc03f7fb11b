"""Calls that are recorded and repeated give what they gave as written: on a GPU the kernels' own, elsewhere with stand-ins."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

import perceiver_kernels as pk
from perceiver_kernels.testing import same_bits

pytest.importorskip("triton")
from perceiver_kernels.backends.triton import launch as launching
from perceiver_kernels.backends.triton import repetition
from perceiver_kernels.backends.triton.describe import descriptor


class _Run:
    """A stand-in for Triton's launcher: keeps what it is started with."""

    global_scratch_size = profile_scratch_size = 0
    launch_cooperative_grid = launch_pdl = False

    def __init__(self) -> None:
        self.started: list[tuple[Any, ...]] = []
        self.launch = self.started_with

    def started_with(self, *arguments: Any) -> None:
        self.started.append(arguments)


class _Kernel:
    function, packed_metadata = "function", "metadata"

    def __init__(self) -> None:
        self.run = _Run()

    @property
    def arguments(self) -> list[tuple[Any, ...]]:
        """Arguments of each start, behind grid, stream, function and settings."""
        return [started[5 + 8 :] for started in self.run.started]


def record(run: Callable[[], Any], tensors: tuple[Tensor | None, ...], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The recording of a call on CPU tensors, or None."""
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
    _, recorded = repetition._observe(run, tensors, 0)
    if recorded is not None:
        recorded.device = torch.device("cpu", 0)
    return recorded


def told(kernel: Any, *arguments: Any) -> None:
    """What launch() tells of a launch."""
    launching._observed.observe(launching.Launch(kernel, 3, list(arguments)))


def addresses(*tensors: Tensor) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


class TestRecording:
    def test_new_addresses_in_the_same_places(self, monkeypatch: pytest.MonkeyPatch) -> None:
        first, second = (torch.zeros(4, 8) for _ in range(2))
        kernel = _Kernel()

        def run() -> tuple[Tensor, Tensor | None]:
            part, out = torch.empty(2, 4, 8), torch.empty(4, 8)
            told(kernel, first, (None, second[1:], 5), part, 0.5)
            told(kernel, part[1], out.T)
            return out.T, None

        recorded = record(run, (first, second), monkeypatch)
        others = [torch.zeros(4, 8) for _ in range(2)]
        out, nothing = recorded.repeat(tuple(others), addresses(*others))
        (a, nested, part, number), (inside, b) = kernel.arguments
        assert (a, nested, number) == (others[0].data_ptr(), (None, others[1].data_ptr() + 8 * 4, 5), 0.5)
        assert inside == part + 4 * 8 * 4 and b == out.data_ptr()
        assert out.shape == (8, 4) and out.stride() == (1, 8) and nothing is None
        again, _ = recorded.repeat(tuple(others), addresses(*others))
        assert again.data_ptr() != out.data_ptr()

    def test_memory_is_held_from_its_first_use_to_its_last(self, monkeypatch: pytest.MonkeyPatch) -> None:
        x, kernel = torch.zeros(4), _Kernel()

        def run() -> Tensor:
            early, late, out = torch.empty(4), torch.empty(4), torch.empty(4)
            told(kernel, x, early)
            told(kernel, early, late)
            told(kernel, late, out)
            return out

        launches = record(run, (x,), monkeypatch).launches
        assert [launch.allocate for launch in launches] == [[1], [2], [3]]
        assert [launch.release for launch in launches] == [[], [1], [2]]

    def test_results_that_no_kernel_touches_and_results_that_are_inputs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        x, total, kernel = torch.zeros(4), torch.zeros(2), _Kernel()

        def run() -> list[Tensor]:
            told(kernel, x, total)
            return [total, torch.empty(0), torch.empty(0)]

        other, sums = torch.zeros(4), torch.zeros(2)
        found, *empty = record(run, (x, total), monkeypatch).repeat((other, sums), addresses(other, sums))
        assert found is sums and all(each.shape == (0,) for each in empty)
        assert empty[0] is not empty[1], "equal addresses, but not one result"

    def test_descriptors_are_made_once_for_each_address(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made: list[int] = []

        def encoder(self: Any, index: int, descriptor: Any) -> Callable[[int], Any]:
            return lambda address: made.append(address) or ("map", address)  # type: ignore[func-returns-value]

        monkeypatch.setattr(launching.DirectLauncher, "encoder", encoder)
        x, kernel = torch.zeros(4, 8), _Kernel()

        def run() -> Tensor:
            out = torch.empty(4)
            told(kernel, descriptor(x, 2, 8), out, "constant")
            return out

        recorded, other = record(run, (x,), monkeypatch), torch.zeros(4, 8)
        for tensor in (x, other, x):
            recorded.repeat((tensor,), addresses(tensor))
        assert made == addresses(x, other)
        assert kernel.arguments[1][:-2] == (("map", other.data_ptr()), 4, 8, 8, 1) and kernel.arguments[1][-1] == "constant"

    def test_encoders_of_descriptors_hold_no_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.backends.nvidia import driver

        monkeypatch.setattr(driver, "make_tensordesc_arg", lambda described, metadata: [described])
        x = torch.zeros(4, 8)
        memory = StorageWeakRef(x.untyped_storage())
        encode = launching.DirectLauncher(print, (), [None]).encoder(0, descriptor(x, 2, 8))
        assert encode(x.data_ptr()) == descriptor(x, 2, 8)._replace(base=encode(x.data_ptr()).base)
        assert encode(48).base.data_ptr() == 48
        del x
        assert memory.expired()

    def test_memory_that_was_given_back_is_not_held_by_the_observer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The first call needs no more memory than the call as written, and what reuses an address is what it is."""
        x, kernel = torch.zeros(4), _Kernel()
        held: list[StorageWeakRef] = []

        def run() -> Tensor:
            early = torch.empty(1 << 20)
            held.append(StorageWeakRef(early.untyped_storage()))
            told(kernel, x, early)
            del early
            held.append(held[0].expired())  # type: ignore[arg-type]
            out = torch.empty(1 << 20)
            told(kernel, x, out)
            return out

        recorded = record(run, (x,), monkeypatch)
        assert held[1] is True and [launch.allocate for launch in recorded.launches] == [[1], [2]]

    @pytest.mark.parametrize("what", ["copies", "fills", "a foreign tensor", "part of its memory", "no launch", "many"])
    def test_what_cannot_be_repeated(self, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
        x, foreign, kernel = torch.zeros(4, 4), torch.zeros(4), _Kernel()

        def run() -> Tensor:
            out = torch.empty(4, 4)
            for _ in range({"no launch": 0, "many": repetition.MOST_LAUNCHES + 1}.get(what, 1)):
                told(kernel, x.T.contiguous() if what == "copies" else foreign if what == "a foreign tensor" else x, out)
            if what == "fills":
                out.zero_()
            return out[1:] if what == "part of its memory" else out

        assert record(run, (x,), monkeypatch) is None


@pytest.mark.gpu
class TestCalls:
    """attention on a GPU, recorded: `function` is called as written where hooks of a profiler are set."""

    @staticmethod
    def tensors(seed: int, Lq: int = 300, Lk: int = 500, d: int = 64) -> list[Tensor]:
        generator = torch.Generator("cuda").manual_seed(seed)
        return [
            torch.randn(2, 3, L, d, device="cuda", dtype=torch.bfloat16, generator=generator).requires_grad_()
            for L in (Lq, Lk, Lk)
        ]

    @staticmethod
    def results(tensors: list[Tensor], **options: Any) -> list[Tensor]:
        out, lse = pk.attention(*tensors, backend="triton", return_lse=True, **options)
        return [out, lse, *torch.autograd.grad(out, set(tensors), torch.ones_like(out).copy_(out.detach()))]

    @pytest.fixture
    def as_written(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Tensor]]:
        def call(tensors: list[Tensor], **options: Any) -> list[Tensor]:
            with monkeypatch.context() as patch:
                patch.setattr(repetition, "can_launch_directly", lambda: False)
                return self.results(tensors, **options)

        return call

    @pytest.mark.parametrize("sizes", [(300, 500, 64), (16, 5000, 64), (5000, 40, 128), (400, 300, 320), (9, 13, 32)], ids=str)
    @pytest.mark.parametrize("masked", [False, True], ids=["plain", "lengths"])
    def test_same_bits(self, sizes: tuple[int, int, int], masked: bool, as_written: Callable[..., list[Tensor]]) -> None:
        lengths = torch.tensor([7, sizes[1]], dtype=torch.int32, device="cuda")
        options = {"lengths": lengths} if masked else {}
        kept = []
        for seed in range(3):
            tensors = self.tensors(seed, *sizes)
            kept.append((self.results(tensors, **options), as_written(tensors, **options)))
        for found, expected in kept:
            assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))

    def test_one_tensor_as_keys_and_values(self, as_written: Callable[..., list[Tensor]]) -> None:
        """Shared and separate memory of the same shapes are different calls."""
        q, k, v = self.tensors(0)
        for tensors in ([q, k, k], [q, k, v], [q, k, k], [q, v, k]):
            found, expected = self.results(tensors), as_written(tensors)
            assert all(same_bits(a, b) for a, b in zip(found[:2], expected[:2], strict=True))

    def test_memory_is_that_of_the_call_as_written(self, as_written: Callable[..., list[Tensor]]) -> None:
        tensors = self.tensors(0, 64, 20_000)
        # Results are kept: when autograd's thread lets go of them is not told.
        peaks, kept = [], []
        for function in (self.results, as_written, self.results):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            kept.append(function(tensors))
            peaks.append(torch.cuda.max_memory_allocated() - before)
        assert peaks[2] <= peaks[1]

    def test_recordings_hold_no_memory(self) -> None:
        repetition.forget()
        gc.collect()
        before = torch.cuda.memory_allocated()
        self.results(self.tensors(0))
        gc.collect()
        assert torch.cuda.memory_allocated() == before and repetition._repeatable

    def test_graphs_and_streams(self) -> None:
        tensors = [tensor.detach() for tensor in self.tensors(0)]
        expected = pk.attention(*tensors, backend="triton")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            other = pk.attention(*tensors, backend="triton")
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = pk.attention(*tensors, backend="triton")
        tensors[0].copy_(torch.zeros_like(tensors[0]))
        graph.replay()
        assert same_bits(expected, other)
        assert same_bits(captured, pk.attention(*tensors, backend="triton")) and not same_bits(captured, expected)
