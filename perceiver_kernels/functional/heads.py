"""Heads of what projections give: [B, L, H*d] and [B, H, L, d], views of each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from perceiver_kernels.layouts import heads_of_rows, rows_of_heads, worth_joining
from perceiver_kernels.ops.boundary import transforms_active


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, L, H*d] -> [B, H, L, d], a view."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, H, L, d] -> [B, L, H*d]; a view when there is one head or the heads already lie inside the rows."""
    return x.transpose(1, 2).flatten(2)


class _HeadsOfRows(Function):
    """Views of rows; gradients that lie side by side, as those of attention do, are the gradient of the rows, uncopied."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, heads: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.rows, ctx.heads = rows.shape, heads
        return heads_of_rows(rows, heads)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
        known = [gradient for gradient in gradients if gradient is not None]
        if not known:
            return None, None
        if len(known) == len(gradients) and not torch.is_grad_enabled() and (rows := rows_of_heads(known)) is not None:
            return rows, None
        B, L, _ = ctx.rows
        parts = [
            known[0].new_zeros(B, L, H * d) if gradient is None else merge_heads(gradient)
            for gradient, (H, d) in zip(gradients, ctx.heads, strict=True)
        ]
        return torch.cat(parts, -1), None


def split_projection(rows: Tensor, widths: Sequence[int], num_heads: int) -> tuple[Tensor, ...]:
    """[B, L, E] -> [B, H, L, w_i / H], views: what one product gives for several projections side by side.

    Args:
        rows: channels of each projection right behind the last one's.
        widths: w_i, which add up to E.
        num_heads: H, of each projection.
    """
    heads = [(num_heads, width // num_heads) for width in widths]
    recorded = rows.requires_grad and torch.is_grad_enabled() and not (torch.compiler.is_compiling() or transforms_active())
    return _HeadsOfRows.apply(rows, heads) if recorded and worth_joining((rows,)) else heads_of_rows(rows, heads)
