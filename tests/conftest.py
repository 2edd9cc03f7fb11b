"""What all tests share: the gpu marker, seeds, poisoned memory, backends as parameters, skips counted by reason."""

from __future__ import annotations

import functools
import os
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from zlib import crc32

import pytest
import torch

from perceiver_kernels import dispatch
from perceiver_kernels.cli import measure
from perceiver_kernels.functional import heads
from perceiver_kernels.functional.attention import _served
from perceiver_kernels.ops import attention as attention_ops
from perceiver_kernels.plan import attention as attention_planning
from perceiver_kernels.plan import shared_kv as shared_kv_planning
from perceiver_kernels.plan import splits
from perceiver_kernels.testing import poisoned_memory
from perceiver_kernels.testing.targets import machine, targets


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    if "PYTEST_XDIST_WORKER" in os.environ:
        # Workers share the cores: one thread each.
        torch.set_num_threads(1)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``target`` runs over the backends of the module's OP that this process can run, times dtypes.

    A module may choose among them with ``wanted(target)``, a test with ``@only(dtype)``. A test that does not choose runs in
    one dtype in the interpreter, which is slow and whose dtypes differ in tiles alone, and in one of 16 bits on a CPU; its
    neighbour runs in another.
    """
    if "target" in metafunc.fixturenames:
        found = list(filter(getattr(metafunc.module, "wanted", None), targets(metafunc.module.OP)))
        # Only tests that take the gradients of another backend can run one that lacks some.
        found = [target for target in found if not target.is_partial or hasattr(metafunc.module, "PARTIAL")]
        dtypes = getattr(metafunc.function, "dtypes", None)
        found = [target for target in found if dtypes is None or target.dtype in dtypes]
        if dtypes is None and found:
            turn = crc32(metafunc.function.__qualname__.encode())
            left_out = (torch.float16, torch.bfloat16)[turn % 2] if machine() == "cpu" else None
            found = [target for target in found if target.dtype != left_out]
            found = [found[turn % len(found)]] if machine() == "interpreter" else found
        if not found:
            nothing = pytest.mark.skip(reason=f"no backend that these tests want runs here ({machine()})")
            metafunc.parametrize("target", [pytest.param(None, marks=nothing, id="none")])
            return
        metafunc.parametrize("target", found, ids=[str(target) for target in found])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if machine() == "gpu":
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """After a kernel's fault the process has no GPU, and every later test would fail without a reason of its own: stop."""
    report = yield
    if report.failed and machine() == "gpu":
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            item.session.shouldstop = f"a kernel has faulted: {str(error).splitlines()[0]}"
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    if reasons:
        terminalreporter.section("skips by reason")
    for reason, count in reasons.most_common():
        terminalreporter.line(f"{count:5d}  {reason}")
    generated = sum("::test_generated[" in report.nodeid for report in terminalreporter.stats.get("passed", []))
    if generated:
        terminalreporter.line(f"{generated:5d}  generated calls of attention passed")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same state of torch's generators."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def ceilings() -> Callable[..., dict[str, float]]:
    """The ceilings of a device, which take four seconds to measure, once for all commands of a process."""
    return functools.cache(measure.ceilings)


@pytest.fixture
def one_thread(ceilings: Callable[..., dict[str, float]], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For commands on small inputs, which more threads only slow down."""
    monkeypatch.setattr(measure, "ceilings", ceilings)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN (the largest integer) until it is written."""
    with poisoned_memory():
        yield


def _forget_choices() -> None:
    dispatch._choose_once.cache_clear()
    dispatch._choose_passes_once.cache_clear()
    _served.clear()


@pytest.fixture
def forgotten_choices() -> Iterator[None]:
    """No choice of a backend is remembered, from before or afterwards: for tests that change what can be chosen."""
    _forget_choices()
    yield
    _forget_choices()


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of what one projection gave are joined without a copy whatever their size, and on every device."""
    for module in (heads, attention_ops):
        monkeypatch.setattr(module, "worth_joining", lambda tensors: True)


def _forget_plans() -> None:
    attention_planning.plan_attention.cache_clear()
    shared_kv_planning._plan_sizes.cache_clear()
    if repetition := sys.modules.get("perceiver_kernels.backends.triton.repetition"):
        repetition.forget()


@pytest.fixture
def weights_bytes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """A function that sets the wide kernels' budget for their workspace of weights; calls are planned anew."""

    def set_budget(budget: int) -> None:
        monkeypatch.setattr(splits, "WEIGHTS_BYTES", budget)
        _forget_plans()

    yield set_budget
    monkeypatch.undo()
    _forget_plans()
