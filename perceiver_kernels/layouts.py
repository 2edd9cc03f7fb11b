"""Memory layouts of results: whoever computes them, and the fakes that stand in for them, agree through these."""

from __future__ import annotations

import torch
from torch import Tensor


def heads_inside_rows(tensor: Tensor) -> bool:
    """Whether [B, H, L, d] lies in memory as [B, L, H*d] does, all heads of a token side by side."""
    return tensor.stride(1) < tensor.stride(2)


def used_strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides of the axes before the last; those of size 1 may be anything, and are left out."""
    return tuple(stride for stride, size in zip(tensor.stride()[:-1], tensor.shape[:-1], strict=True) if size > 1)


def empty_heads(like: Tensor, B: int, H: int, L: int, d: int, dtype: torch.dtype | None = None) -> Tensor:
    """Fresh [B, H, L, d] whose heads lie inside the rows where those of ``like`` [*, *, *, *] do, as in torch's attention.

    Queries that are a view of [B, L, H*d] so give a result whose heads merge without a copy.
    """
    dtype = dtype or like.dtype
    if heads_inside_rows(like):
        return torch.empty(B, L, H, d, dtype=dtype, device=like.device).transpose(1, 2)
    return torch.empty(B, H, L, d, dtype=dtype, device=like.device)


def result_dtype(dtype: torch.dtype, dropout_p: float) -> torch.dtype:
    """The dtype of attention's result as the backward reads it: wide under dropout.

    The backward subtracts dout . out from every score's gradient. A row that sees one key, whose scaled weight rounds, should
    come to 0 there, and would come to the rounding of ``out``.
    """
    return torch.promote_types(dtype, torch.float32) if dropout_p > 0.0 else dtype
