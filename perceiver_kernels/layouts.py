"""Memory layouts of results: whoever computes them, and the fakes that stand in for them, agree through these."""

from __future__ import annotations

import torch
from torch import Tensor


def empty_heads(like: Tensor, B: int, H: int, L: int, d: int, dtype: torch.dtype | None = None) -> Tensor:
    """Fresh [B, H, L, d] whose heads lie inside the rows where those of ``like`` [*, *, *, *] do, as in torch's attention.

    Queries that are a view of [B, L, H*d] so give a result whose heads merge without a copy.
    """
    dtype = dtype or like.dtype
    if like.stride(1) < like.stride(2):
        return torch.empty(B, L, H, d, dtype=dtype, device=like.device).transpose(1, 2)
    return torch.empty(B, H, L, d, dtype=dtype, device=like.device)
