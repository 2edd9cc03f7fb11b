"""Times and memory of callables, on a GPU and on a CPU.

Times. On CUDA a sample is the span between two events around the call, with a cold L2: a buffer of twice
the L2's size is overwritten before each sample, as often as it takes to keep the GPU busy while the host
enqueues the call; a sample that the GPU began while the host was still enqueuing is taken again. The figure
is device time; what the host needs to enqueue the call is reported beside it, as `host_us`. On a CPU a
sample is perf_counter around the call. Several callables are sampled in turn, so that drifting clocks meet
all of them alike.

Memory is the peak above what was allocated before the call, in bytes that PyTorch's allocator handed out.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], Any]

OUT_OF_MEMORY = "out of memory"
"""The failure of what memory does not hold."""
LONGEST_REASON = 200
"""Characters that are told of a failure."""
PROBE, LONGEST_PRODUCT = 384, 1.0
"""Rows of a small product on a CPU, and the seconds that a larger may take: some dtypes have no library's kernel there."""
MEMORY_METHOD = {
    "cuda": "torch.cuda.max_memory_allocated above the bytes allocated before the call",
    "cpu": "torch.profiler's record of PyTorch's CPU allocator, above the bytes allocated before the call "
    "(scratch inside oneDNN and BLAS is not in it)",
}
TIME_METHOD = {
    "cuda": "CUDA events around the call, cold L2, implementations interleaved; quantiles over the samples",
    "cpu": "perf_counter around the call, implementations interleaved; quantiles over the samples",
}


@dataclass(frozen=True)
class Timing:
    """Quantiles of one callable's time in milliseconds, and the host's time to enqueue it in microseconds."""

    p20_ms: float
    p50_ms: float
    p80_ms: float
    samples: int
    host_us: float | None = None

    @classmethod
    def of(cls, samples_ms: list[float], host_us: float | None = None) -> Timing:
        """Summarise samples in milliseconds."""
        p20, p50, p80 = (_quantile(sorted(samples_ms), fraction) for fraction in (0.2, 0.5, 0.8))
        return cls(p20, p50, p80, len(samples_ms), host_us)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, for JSON."""
        return asdict(self)


def attempt(call: Call) -> str | None:
    """Run a callable once and return why it failed, or None.

    SDPA explains a refusal through warnings and then raises "No available kernel"; the explanation is
    returned.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            call()
            synchronize()
        except Exception as error:
            # Whatever stops an implementation is its result: a refusal, a compiler's error, a missing kernel.
            failure = OUT_OF_MEMORY if is_out_of_memory(error) else _first_sentence(error, caught)
        else:
            return None
    release()
    return failure


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory is used up; PyTorch's CPU allocator raises a plain RuntimeError."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def synchronize() -> None:
    """Wait for the GPU, where one is in use."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def release() -> None:
    """Return unused memory to the device, so that one measurement's cache does not starve the next."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def heap_set_aside() -> Iterator[None]:
    """Leave what there is already out of the body's collections, each of which took a fifth of a second with PyTorch's."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def time_calls(
    calls: Mapping[str, Call],
    device: torch.device,
    *,
    seconds: float = 0.5,
    min_samples: int = 5,
    max_samples: int = 200,
) -> dict[str, Timing]:
    """Time callables that are known to run, sampling them in turn.

    Args:
        calls: name -> callable without arguments.
        device: where the work runs; decides the clock.
        seconds: about how long to sample each callable.
        min_samples: at least so many samples each, whatever they cost.
        max_samples: at most so many samples each.

    Returns:
        name -> Timing.
    """
    clock = _CudaClock(device) if device.type == "cuda" else _HostClock()
    wanted: dict[str, int] = {}
    for name, call in calls.items():
        # The first call warms up (compilation, handles, caches); the second says how many samples the time
        # allows.
        call()
        clock.calibrate(name, call)
        fitting = int(seconds / max(clock.estimate_s[name], 1e-6))
        wanted[name] = min(max(fitting, min_samples), max_samples)
    samples: dict[str, list[Any]] = {name: [] for name in calls}
    for turn in range(max(wanted.values(), default=0)):
        for name, call in calls.items():
            if turn < wanted[name]:
                samples[name].append(clock.sample(name, call))
    return {
        name: Timing.of(clock.milliseconds(taken), clock.host_us.get(name)) for name, taken in samples.items()
    }


class _HostClock:
    def __init__(self) -> None:
        self.estimate_s: dict[str, float] = {}
        self.host_us: dict[str, float] = {}

    def calibrate(self, name: str, call: Call) -> None:
        self.estimate_s[name] = self.sample(name, call)

    def sample(self, name: str, call: Call) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def milliseconds(self, samples: list[float]) -> list[float]:
        return [1e3 * sample for sample in samples]


class _CudaClock:
    # How often the host's share is measured; its median is reported.
    HOST_SAMPLES = 5
    # Calls that take the host longer than so many flushes take the GPU, or that wait for it, show the host's time.
    MOST_FLUSHES = 400
    ATTEMPTS = 4

    def __init__(self, device: torch.device) -> None:
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        self.scratch = torch.empty(max(size, 2**26), dtype=torch.uint8, device=device)
        self.estimate_s: dict[str, float] = {}
        self.host_us: dict[str, float] = {}
        self.flushes: dict[str, int] = {}
        self.flush_us = self._measure_flush()

    def calibrate(self, name: str, call: Call) -> None:
        hosts = []
        for _ in range(self.HOST_SAMPLES):
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            hosts.append(time.perf_counter() - start)
            torch.cuda.synchronize()
            whole = time.perf_counter() - start
        self.host_us[name] = 1e6 * statistics.median(hosts)
        self.flushes[name] = min(1 + int(1.5 * self.host_us[name] / self.flush_us), self.MOST_FLUSHES)
        self.estimate_s[name] = whole

    def sample(self, name: str, call: Call) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        for _ in range(self.ATTEMPTS):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            # One flush makes the L2 cold; more keep the GPU busy until the host has enqueued the whole call.
            for _ in range(self.flushes[name]):
                self.scratch.zero_()
            begin.record()
            call()
            end.record()
            overtaken = begin.query()
            # Waiting here keeps the flushes of the next sample from piling up behind this one.
            end.synchronize()
            if not overtaken or self.flushes[name] == self.MOST_FLUSHES:
                break
            self.flushes[name] = min(2 * self.flushes[name], self.MOST_FLUSHES)
        return begin, end

    def milliseconds(self, samples: list[tuple[torch.cuda.Event, torch.cuda.Event]]) -> list[float]:
        return [begin.elapsed_time(end) for begin, end in samples]

    def _measure_flush(self) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.scratch.zero_()
        begin.record()
        for _ in range(10):
            self.scratch.zero_()
        end.record()
        end.synchronize()
        return 1e3 * begin.elapsed_time(end) / 10


def kernel_times(call: Call, device: torch.device, *, calls: int = 5) -> list[dict[str, Any]]:
    """Return what a call's kernels take on a GPU, the longest first; nothing on other devices.

    Each entry holds a kernel's name, its launches in one call and the microseconds of all of them, the mean over
    `calls` calls one after the other (warm L2), as torch.profiler's record of the device has them.
    """
    if device.type != "cuda":
        return []
    with (
        _silent_descriptor(2),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler,
    ):
        for _ in range(calls):
            call()
        torch.cuda.synchronize(device)
    found: dict[str, list[float]] = {}
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found.setdefault(event.name, []).append(event.device_time)
    entries = [
        {"kernel": name, "launches": len(times) / calls, "us": sum(times) / calls} for name, times in found.items()
    ]
    return sorted(entries, key=lambda entry: -entry["us"])


def kernel_name(symbol: str) -> str:
    """Return a kernel's name without what its compiler adds: "void a::fwd_kernel<int>(T*)" and "_fwd_kernel" are "fwd"."""
    plain = symbol.removeprefix("void ").replace("(anonymous namespace)::", "")
    return re.split(r"[<(]", plain)[0].split("::")[-1].strip("_").removesuffix("_kernel")


def peak_extra_bytes(call: Call, device: torch.device) -> int:
    """Return the peak of allocated bytes during a call, above what was allocated before it.

    The result of the call counts, as it is held until the end. Call it once before, so that library
    workspaces and compiled kernels exist already. See MEMORY_METHOD for what is counted on each device.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
        del result
        return peak - before
    return _peak_of_cpu_allocator(call)


def _peak_of_cpu_allocator(call: Call) -> int:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        _silent_descriptor(2),
        torch.profiler.profile(activities=activities, profile_memory=True) as profiler,
    ):
        result = call()
    del result
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    memory = [
        event for event in events if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0
    ]
    held = peak = 0
    for event in sorted(memory, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


@contextlib.contextmanager
def _silent_descriptor(descriptor: int) -> Iterator[None]:
    """Drop what native code writes to a file descriptor: libkineto announces every profile on stderr."""
    saved = os.dup(descriptor)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), descriptor)
        yield
    finally:
        os.dup2(saved, descriptor)
        os.close(saved)


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Measure the device's ceilings: TFLOP/s of a large matrix product, GB/s of a copy (read + written)."""
    on_gpu = device.type == "cuda"
    size, count = (8192, 2**30) if on_gpu else (_cpu_product(dtype), 2**26)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.empty(count, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    calls: dict[str, Call] = {"product": lambda: a @ b, "copy": lambda: target.copy_(source)}
    times = time_calls(calls, device, seconds=0.3, min_samples=3, max_samples=50)
    return {
        "tflops": 2 * size**3 / times["product"].p50_ms / 1e9,
        "gbytes_per_s": 2 * count / times["copy"].p50_ms / 1e6,
    }


def _cpu_product(dtype: torch.dtype) -> int:
    """Return the rows of the largest product that a CPU does in LONGEST_PRODUCT."""
    a, b = (torch.randn(PROBE, PROBE).to(dtype) for _ in range(2))
    clock = _HostClock()
    least = min(clock.sample("probe", lambda: a @ b) for _ in range(5))
    return PROBE * next((factor for factor in (4, 2) if factor**3 * least <= LONGEST_PRODUCT), 1)


@contextlib.contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Run the body with a fixed random state on every device and restore the old one after."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def free_bytes(device: torch.device) -> int | None:
    """Return how many bytes can still be allocated on a device; None where that is unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        import psutil  # type: ignore[import-untyped]
    except ImportError:
        return _available_from_proc()
    return int(psutil.virtual_memory().available)


def _available_from_proc() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kibibytes = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return 1024 * kibibytes[0] if kibibytes else None


def _first_sentence(error: BaseException, caught: list[warnings.WarningMessage]) -> str:
    if "No available kernel" in str(error):
        # The last warnings speak of the backend asked for; those before say that the others are switched off.
        texts = [str(entry.message).split(" (Triggered")[0].strip() for entry in caught]
        told = [
            text
            for text in texts
            if text and "kernel not used because" not in text and "disabled" not in text
        ]
        if told:
            return " ".join(told[0].split())
    # Indented lines are items of a list.
    text = " ".join(re.sub(r"\n\s+", "; ", str(error)).split())
    sentence = text.split(". ")[0] or type(error).__name__
    return sentence if len(sentence) <= LONGEST_REASON else sentence[: LONGEST_REASON - 3].rsplit(" ", 1)[0] + "..."


def _quantile(ordered: list[float], fraction: float) -> float:
    position = fraction * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)
