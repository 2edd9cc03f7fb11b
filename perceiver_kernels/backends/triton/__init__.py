"""Triton kernels: every GPU from sm_80 on, bf16, fp16 and fp32, any channel count up to 1024, deterministic.

This module imports without Triton; what a call needs is imported when the backend is selected.
"""

from __future__ import annotations

import importlib.util
import os

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MIN_CAPABILITY = (8, 0)


def interpreted() -> bool:
    """Whether Triton runs kernels in its CPU interpreter (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def unavailable() -> str | None:
    """Why no Triton kernel can run in this process, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, for tests)"
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        return f"triton kernels need compute capability 8.0 or newer, got {capability[0]}.{capability[1]}"
    return None


def reasons_against_device_and_dtype(device_type: str, *dtypes: torch.dtype) -> list[str]:
    """What every Triton kernel asks of its tensors."""
    reasons = []
    if device_type != ("cpu" if interpreted() else "cuda"):
        where = "CPU tensors in its interpreter" if interpreted() else "CUDA tensors"
        reasons.append(f"triton takes {where}, got {device_type}")
    for dtype in dtypes:
        if dtype not in DTYPES:
            reasons.append(f"triton takes bfloat16, float16 and float32, got {str(dtype).removeprefix('torch.')}")
        elif interpreted() and dtype == torch.bfloat16:
            reasons.append("triton's interpreter computes bfloat16 wrongly")
    return reasons
