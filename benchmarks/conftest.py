"""Fixtures of the benchmarks; without pytest-benchmark they are not collected."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

# Tests are imported without their folder on the path, wherever pytest is called.
sys.path.insert(0, str(Path(__file__).parent))
collect_ignore = [] if importlib.util.find_spec("pytest_benchmark") else ["test_regimes.py"]


@pytest.fixture
def cold_cache() -> Callable[[], None]:
    """A function that overwrites a buffer of twice the L2, for `benchmark.pedantic(setup=...)`."""
    if not torch.cuda.is_available():
        return lambda: None
    size = 2 * torch.cuda.get_device_properties(0).L2_cache_size
    scratch = torch.empty(size, dtype=torch.uint8, device="cuda")

    def flush() -> None:
        scratch.zero_()

    return flush


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """Name the GPU and the versions beside every measurement."""
    from perceiver_kernels.cli import info

    machine_info["perceiver_kernels"] = info.collect()
