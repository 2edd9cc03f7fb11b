"""Snapshots of PyTorch's CUDA allocator: every allocation of one forward and backward, with its stack."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from perceiver_kernels.cli import measure
from perceiver_kernels.cli.report import CommandError, check_writable
from perceiver_kernels.cli.subject import OURS
from perceiver_kernels.cli.workload import Workload

MAX_ENTRIES = 1_000_000
"""Allocations and releases that a recording holds; a layer has some hundreds."""


def check_snapshot(path: Path, device: torch.device) -> None:
    """Raise the CommandError of a snapshot that cannot be taken or written, before the work."""
    if device.type != "cuda":
        raise CommandError("--snapshot must be used on a GPU: PyTorch records its CUDA allocator alone, got no CUDA device")
    check_writable(path)


def snapshot(
    path: Path, case: Any, rows: Sequence[dict[str, Any]], device: torch.device, dtype: torch.dtype
) -> str:
    """Record one forward and backward of our layer, packed whole, at the largest size of a sweep at which it ran.

    Args:
        path: file for torch.cuda.memory's snapshot.
        case: of the sweep; its M is replaced.
        rows: of the sweep.
        device, dtype: of the sweep.

    Returns:
        One sentence that says where the snapshot is, or why there is none.
    """
    ran = [row["M"] for row in rows if row["implementation"] == OURS and row["failure"] is None]
    # The forward alone may have gone further than both.
    ran = [M for M in ran if not any(_failed_backward(row, M) for row in rows)]
    if not ran:
        return "no snapshot: our layer ran at no size"
    work = Workload(dataclasses.replace(case, M=max(ran)), device, dtype)
    call = work.ours("backward")
    # The first call compiles and allocates workspaces, which are not the layer's.
    failure = measure.attempt(call)
    if failure:
        return f"no snapshot: {failure} at {max(ran):,} inputs"
    torch.cuda.memory._record_memory_history(max_entries=MAX_ENTRIES)
    try:
        result = call()
        measure.synchronize()
        torch.cuda.memory._dump_snapshot(str(path))
        del result
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    return f"snapshot: {path}, forward + backward at {max(ran):,} inputs"


def _failed_backward(row: dict[str, Any], M: int) -> bool:
    return row["implementation"] == OURS and row["pass"] == "backward" and row["M"] <= M and row["failure"] is not None
