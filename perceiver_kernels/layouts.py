"""Memory layouts: of results, on which whoever computes them and the fakes agree; of operands, as kernels can read them."""

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


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor with stride 1 along its last axis, copied only if it has not."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def can_describe(tensor: Tensor) -> bool:
    """Whether TMA can read the tensor, whose last stride is 1: 16-byte base and pitches, and no stride of 0."""
    size = tensor.element_size()
    strides_fit = all(
        stride * size % 16 == 0 and (stride > 0 or n == 1)
        for stride, n in zip(tensor.stride()[:-1], tensor.shape[:-1], strict=True)
    )
    return strides_fit and tensor.data_ptr() % 16 == 0 and tensor.numel() > 0


def describable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy that TMA can read; one that repeats an axis stays, its copy would be larger than it is."""
    repeats = any(stride == 0 and n > 1 for stride, n in zip(tensor.stride(), tensor.shape, strict=True))
    if can_describe(tensor) or repeats or tensor.numel() == 0:
        return tensor
    *leading, width = tensor.shape
    pitch = width + -width % (16 // tensor.element_size())
    return tensor.new_empty(*leading, pitch)[..., :width].copy_(tensor)


def positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """Kernels take the maximum before scaling, so the scale must be positive: its sign (or zero) moves into q."""
    if scale > 0.0:
        return q, scale
    return (-q, -scale) if scale < 0.0 else (torch.zeros_like(q), 1.0)
