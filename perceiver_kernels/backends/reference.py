"""The specification as a backend: pure PyTorch, any dtype including float64, memory proportional to R x M."""

from __future__ import annotations

from perceiver_kernels.backends.composite import (
    pack_inputs_backward,
    pack_inputs_forward,
    shared_kv_attention_backward,
    shared_kv_attention_delta,
    shared_kv_attention_forward,
)
from perceiver_kernels.problem import Problem
from perceiver_kernels.reference import attention, pack_inputs, shared_kv_attention

__all__ = [
    "attention",
    "pack_inputs",
    "pack_inputs_backward",
    "pack_inputs_forward",
    "shared_kv_attention",
    "shared_kv_attention_backward",
    "shared_kv_attention_delta",
    "shared_kv_attention_forward",
]

COMPOSITE = True


def reasons_against(problem: Problem) -> list[str]:
    """The reference serves every valid problem."""
    return []
