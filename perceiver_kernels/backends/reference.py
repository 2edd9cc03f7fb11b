"""The specification as a backend: pure PyTorch, any dtype including float64, memory proportional to R x M."""

from __future__ import annotations

import torch
from torch import Tensor

from perceiver_kernels import reference
from perceiver_kernels.backends.composite import (
    pack_inputs_backward,
    pack_inputs_forward,
    rotary_embedding,
    shared_kv_attention_backward,
    shared_kv_attention_delta,
    shared_kv_attention_forward,
)
from perceiver_kernels.masks import NO_MASKS, Masks
from perceiver_kernels.problem import Problem
from perceiver_kernels.reference import pack_inputs, shared_kv_attention

__all__ = [
    "attention",
    "pack_inputs",
    "pack_inputs_backward",
    "pack_inputs_forward",
    "rotary_embedding",
    "shared_kv_attention",
    "shared_kv_attention_backward",
    "shared_kv_attention_delta",
    "shared_kv_attention_forward",
]

COMPOSITE = True


def reasons_against(problem: Problem) -> list[str]:
    """The reference serves every valid problem."""
    return []


def attention(
    query: Tensor, keys: tuple[Tensor, ...], values: tuple[Tensor, ...], *, masks: Masks = NO_MASKS,
    scale: float | None = None, dropout_p: float = 0.0, dropout_seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse) of ``reference.attention`` over the segments as one."""
    key, value = (parts[0] if len(parts) == 1 else torch.cat(parts, 2) for parts in (keys, values))
    return reference.attention(
        query, key, value, key_mask=masks.key_mask, lengths=masks.lengths, query_mask=masks.query_mask,
        attn_mask=masks.attn_mask, cu_seqlens_q=masks.cu_seqlens_q, cu_seqlens_k=masks.cu_seqlens_k, causal=masks.causal,
        scale=scale, dropout_p=dropout_p, dropout_seed=dropout_seed,
    )  # fmt: skip
