"""Encode under pytest-benchmark: on a GPU it measures, with --benchmark-disable it is a smoke test."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from cuda_timer import timer

from perceiver_kernels.cli.gate import Gate
from perceiver_kernels.cli.measure import attempt, peak_extra_bytes
from perceiver_kernels.cli.regimes import REGIMES
from perceiver_kernels.cli.stock import Peer
from perceiver_kernels.cli.workload import PASSES, Workload, flops

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32
CASES = (
    ("imagenet", "longctx", "flow", "multimodal") if torch.cuda.is_available() else ("imagenet", "language")
)
PEERS = ("eager", "efficient-pad8") if torch.cuda.is_available() else ("eager", "flash")
STOCK_PASSES = ("forward", "backward", "backward-inputs")


@functools.lru_cache(maxsize=1)
def workload(name: str) -> Workload:
    """The tensors and layers of a case; one case is kept at a time."""
    limit = None if torch.cuda.is_available() else 300
    return Workload(REGIMES["encode"].sizes(name, DEVICE, limit), DEVICE, DTYPE)


def measured(benchmark: Any, cold_cache: Any, work: Workload, which: str, call: Any, method: str) -> None:
    """Time a call and keep what else is known about it."""
    case, timing = work.case, {"rounds": 30 if torch.cuda.is_available() else 3, "warmup_rounds": 2}
    benchmark.extra_info |= {
        "flops": flops(case, which, method),
        "peak_extra_bytes": peak_extra_bytes(call, DEVICE),
    }
    benchmark.pedantic(call, setup=cold_cache, iterations=1, **timing)


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.benchmark(timer=timer)
def test_ours(benchmark: Any, cold_cache: Any, name: str, which: str) -> None:
    """Ours, judged against the specification before it is timed."""
    benchmark.group = f"{name} {which}"
    work = workload(name)
    call = work.ours(which)
    assert attempt(call) is None
    assert Gate(work).judge(which, {"ours": call})["ours"].failure is None
    measured(benchmark, cold_cache, work, which, call, work.choice(which)[0])


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("which", STOCK_PASSES)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.benchmark(timer=timer)
def test_stock(benchmark: Any, cold_cache: Any, name: str, which: str, peer: str) -> None:
    """A named stock implementation; one that cannot run is skipped with its own reason."""
    benchmark.group = f"{name} {which}"
    work = workload(name)
    call = work.stock(which, Peer.parse(peer))
    reason = attempt(call)
    if reason is not None:
        pytest.skip(f"{peer}: {reason}")
    measured(benchmark, cold_cache, work, which, call, "projected")
