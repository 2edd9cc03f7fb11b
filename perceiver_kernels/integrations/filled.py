"""Attention as libraries compute it that fill hidden scores with the lowest number, where ours has -inf."""

from __future__ import annotations

import torch
from torch import Tensor

from perceiver_kernels import functional


def blind_entries(seen: Tensor) -> Tensor:
    """Batch entries that see nothing, bool [B], of what they see, bool [B, L]."""
    return ~seen.any(1)


def attend_filled(
    query: Tensor, key: Tensor | tuple[Tensor, Tensor], value: Tensor | tuple[Tensor, Tensor], seen: Tensor | None, *,
    causal: bool = False, dropout_p: float = 0.0,
) -> Tensor:  # fmt: skip
    """Attention in which a query that sees no key reads all of them alike: filled scores are equal, and so are their weights.

    Args:
        query: [B, H, Lq, d_qk].
        key, value: [B, H, Lk, d], or pairs of segments.
        seen: bool [B, Lk], True where a key is visible; None where all are.
        causal: the last query sees the last key; Lk is at least Lq.
        dropout_p: probability of dropping an attention weight.

    Returns:
        [B, H, Lq, d_v].
    """
    out = functional.attention(
        query, key, value, key_mask=seen, is_causal=causal, causal_alignment="bottom_right", dropout_p=dropout_p
    )
    if seen is None:
        return out
    first = seen.shape[1] - query.shape[2]
    blind = seen.cumsum(1)[:, first:] == 0 if causal else blind_entries(seen)[:, None]  # [B, Lq or 1]
    segments = value if isinstance(value, tuple) else (value,)
    count = sum(segment.shape[2] for segment in segments)
    mean = sum(segment.mean(2, keepdim=True) * (segment.shape[2] / count) for segment in segments if segment.shape[2])
    return torch.where(blind[:, None, :, None], mean, out) if count else out
