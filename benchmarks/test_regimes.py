"""Every regime under pytest-benchmark: on a GPU it measures, on a CPU the same cases run at tiny sizes.

`pytest benchmarks --benchmark-disable` is a smoke test; `-k "decode and flow"` chooses. Times are those of the GPU's clock.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cuda_timer import timer

from perceiver_kernels.cli.gate import Gate
from perceiver_kernels.cli.measure import attempt, peak_extra_bytes
from perceiver_kernels.cli.regimes import REGIMES
from perceiver_kernels.cli.stock import Peer
from perceiver_kernels.cli.subject import OURS, Subject, shape_of

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
TINY = 200
"""Inputs, or queries and keys, that cases are cut to on a CPU."""
STOCK = {
    "encode": ("eager", "efficient-pad8") if ON_GPU else ("eager",),
    "layers": ("eager", "efficient-pad8") if ON_GPU else ("eager", "flash"),
    "decode": ("cudnn", "efficient") if ON_GPU else ("flash",),
    "process": ("cudnn", "flash") if ON_GPU else ("flash",),
    "encode-kv": ("cudnn", "flash") if ON_GPU else ("flash",),
    "models": ("transformers", "sdpa"),
    "replaced": ("original",),
}
"""Peers of each regime; `perceiver-kernels bench` offers all of them."""


def measured() -> Iterator[Any]:
    """(regime, case, pass, implementation), cases one after the other, so that the tensors of one are kept at a time."""
    for regime in REGIMES.values():
        for case in regime.default_cases:
            for which in (each.name for each in regime.passes_of(regime.cases[case], regime.passes.values())):
                if which in regime.default_passes:
                    for name in (OURS, *STOCK[regime.name]):
                        yield pytest.param(regime.name, case, which, name, id=f"{regime.name}-{case}-{which}-{name}")


@functools.lru_cache(maxsize=1)
def workload(regime: str, case: str) -> Subject:
    """The tensors and layers of a case."""
    limit = None if ON_GPU or REGIMES[regime].cpu_inputs is None else TINY
    return REGIMES[regime].workload(REGIMES[regime].sizes(case, DEVICE, limit), DEVICE, DTYPE)


@pytest.mark.parametrize(("regime", "case", "which", "name"), list(measured()))
@pytest.mark.benchmark(timer=timer)
def test_pass(benchmark: Any, cold_cache: Any, regime: str, case: str, which: str, name: str) -> None:
    """Ours is judged against the specification before it is timed; a peer that cannot run is skipped with its own reason."""
    benchmark.group = f"{regime} {case} {which}"
    try:
        work = workload(regime, case)
    except ImportError as error:
        pytest.skip(f"not installed: {error}")
    calls = work.calls(which, [] if name == OURS else [Peer.parse(name)])
    if name not in calls:
        pytest.skip(f"{name} has no such pass")
    call = calls[name]
    reason = attempt(call)
    if name != OURS and reason is not None:
        pytest.skip(f"{name}: {reason}")
    assert reason is None
    if name == OURS:
        assert Gate(work).judge(which, work.results(which, {name: call}))[name].failure is None
    benchmark.extra_info |= {
        "shape": shape_of(work.case), "flops": work.flops(which, name), "bytes": work.least(which)[1],
        "peak_extra_bytes": peak_extra_bytes(call, DEVICE), **work.labels(which, name),
    }  # fmt: skip
    benchmark.pedantic(call, setup=cold_cache, iterations=1, rounds=30 if ON_GPU else 3, warmup_rounds=2)
