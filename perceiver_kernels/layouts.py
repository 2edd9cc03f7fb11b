"""Memory layouts: of results, on which whoever computes them and the fakes agree; of operands, as kernels can read them."""

from __future__ import annotations

from collections.abc import Sequence

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


LEAST_JOINED = 32 * 2**20
"""Bytes that an H200 copies in about 16 us, taken for what no copy costs the host: a node of Python for seven of C++."""


def worth_joining(tensors: Sequence[Tensor]) -> bool:
    """Whether gradients of these, as views of one buffer, save more than they cost; a graph's host costs nothing."""
    if not tensors[0].is_cuda:
        return False
    return sum(tensor.nbytes for tensor in tensors) >= LEAST_JOINED or torch.cuda.is_current_stream_capturing()


def _row_pitch(tensor: Tensor) -> int | None:
    """Pitch of the rows [B, L, pitch] that [B, H, L, d] is H*d channels of, heads side by side; None where it is not."""
    (B, H, L, d), (batch, head, row, channel) = tensor.shape, tensor.stride()
    inside = channel == 1 and (head == d or H == 1) and (batch == L * row or B == 1)
    return row if inside and row >= H * d else None


def lie_side_by_side(first: Tensor, second: Tensor) -> bool:
    """Whether [B, H, L, d] and [B, H', L, d'] are channels of the same rows, those of the second right behind the first's."""
    pitch = _row_pitch(first)
    if pitch is None or pitch != _row_pitch(second) or first.dtype != second.dtype or first.shape[2] != second.shape[2]:
        return False
    width = first.shape[1] * first.shape[3]
    return (
        pitch >= width + second.shape[1] * second.shape[3]
        and second.data_ptr() == first.data_ptr() + width * first.element_size()
        and first.shape[0] == second.shape[0]
    )


def heads_of_rows(rows: Tensor, heads: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
    """Views [B, H, L, d] of rows [B, L, E], for each (H, d) the next H*d channels."""
    if all(one == heads[0] for one in heads):
        parts = rows.unflatten(-1, (len(heads), *heads[0])).unbind(-3)
        return tuple(part.transpose(1, 2) for part in parts)
    parts = rows.split([H * d for H, d in heads], -1)
    return tuple(part.unflatten(-1, one).transpose(1, 2) for part, one in zip(parts, heads, strict=True))


def empty_beside(*tensors: Tensor) -> tuple[Tensor, ...] | None:
    """Fresh tensors of these shapes, views of one buffer, where these are channels of the same rows, or all but the first are.

    So the gradients of queries, keys and values that one projection made are its gradient, without a copy. None elsewhere.
    """
    first, *rest = tensors
    pairs = zip(rest, rest[1:], strict=False)
    if not rest or not first.numel() or not all(lie_side_by_side(a, b) for a, b in pairs):
        return None
    together = lie_side_by_side(first, rest[0])
    if not together and len(rest) < 2:
        return None
    beside = tensors if together else rest
    (B, _, L, _), heads = beside[0].shape, [(t.shape[1], t.shape[3]) for t in beside]
    rows = torch.empty(B, L, sum(H * d for H, d in heads), dtype=first.dtype, device=first.device)
    views = heads_of_rows(rows, heads)
    return views if together else (empty_heads(first, *first.shape), *views)


def rows_of_heads(parts: Sequence[Tensor]) -> Tensor | None:
    """The rows [B, L, E] whose channels these are, all of them, in order, as ``heads_of_rows`` makes them; else None."""
    first, heads = parts[0], [(t.shape[1], t.shape[3]) for t in parts]
    B, _, L, _ = first.shape
    E = sum(H * d for H, d in heads)
    if not first.numel() or _row_pitch(first) != E or not all(map(lie_side_by_side, parts, parts[1:])):
        return None
    storage = first.untyped_storage().data_ptr()
    if any(t.untyped_storage().data_ptr() != storage for t in parts[1:]):
        return None
    return first.as_strided((B, L, E), (L * E, E, 1))


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
