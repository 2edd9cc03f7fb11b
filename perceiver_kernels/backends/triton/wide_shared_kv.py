"""Shared-KV attention for wide channels, chunk by chunk of the keys: weights to a workspace, then products."""

from __future__ import annotations

import torch
from torch import Tensor

from perceiver_kernels.backends.triton.attention_steps import Hides
from perceiver_kernels.backends.triton.combine import merge_states, sum_splits
from perceiver_kernels.backends.triton.describe import (
    Statistics,
    Visibility,
    ceil_div,
    dropout_arguments,
    stack_row_blocks,
    tile_argument,
)
from perceiver_kernels.backends.triton.launch import launch
from perceiver_kernels.backends.triton.wide import (
    NO_MASK,
    NO_STATISTICS,
    Span,
    head_strides,
    launch_values,
    launch_weights,
    product_options,
)
from perceiver_kernels.backends.triton.wide_shared_kv_kernels import _wide_dx_kernel, _wide_weights_bwd_kernel
from perceiver_kernels.layouts import can_describe, positive_scale
from perceiver_kernels.plan import WidePlan

State = tuple[Tensor, Tensor, Tensor]


def forward(
    q: Tensor, x: Tensor, visibility: Visibility, *, scale: float, dropout_p: float, dropout_seed: Tensor | None,
    key_offset: int, state: State | None, dtype: torch.dtype, plan: WidePlan, tma: bool,
) -> State:  # fmt: skip
    """(z, lse, rho) of q [B, R, C] over x [B, M, C], continued from ``state``."""
    (B, R, C), M = q.shape, x.shape[1]
    q, scale = positive_scale(q, scale)
    if tma and not can_describe(q):
        q = q.contiguous()
    tma = tma and can_describe(x)
    q_head, x_head = q.unsqueeze(1), x.unsqueeze(1)
    tile, sizes = plan.weights, (B, 1, 1, R, M, C, C)
    shape = (B, 1, ceil_div(R, tile.rows) * tile.rows, min(plan.chunk, plan.padded(M)))
    weights = torch.empty(shape, dtype=q.dtype, device=q.device)
    key_mask, lengths = visibility
    hides = Hides(lengths=lengths is not None, key_mask=key_mask is not None)
    *dropout, _ = dropout_arguments(dropout_p, dropout_seed, key_offset)
    for start in range(0, M, plan.chunk):
        span = Span(0, R, start, min(start + plan.chunk, M))
        statistics = launch_weights(
            q_head, x_head, weights, (key_mask, lengths, *NO_MASK[2:]), hides, (0, 0, 0, 0), tuple(dropout), dropout_p,
            key_offset, scale, 0, sizes, span, tile, tma,
        )  # fmt: skip
        splits = plan.splits(span.tiled(tile.columns)[3])
        part = torch.empty(B, splits, R, C, dtype=torch.float32, device=q.device)
        lse, rho = (torch.empty(B, splits, R, dtype=torch.float32, device=q.device) for _ in range(2))
        # Hidden tokens are zeros: nothing is left to mask.
        launch_values(
            weights, x_head, statistics, part.unsqueeze(1), lse.unsqueeze(1), rho, None, NO_MASK, Hides(), dropout_p, sizes,
            span, tile.columns, splits, plan.values, tma, tma,
        )  # fmt: skip
        last = span.key_end == M
        state = merge_states(part, lse, rho, state, dtype if last else torch.float32)
    assert state is not None  # M > 0: the caller returns early for empty inputs
    return state


def backward(
    q: Tensor, x: Tensor, dz: Tensor, statistics: Statistics, visibility: Visibility, *, scale: float, dropout_p: float,
    dropout_seed: Tensor | None, key_offset: int, needs_dq: bool, needs_dx: bool, dq_sum: Tensor | None, plan: WidePlan,
    tma: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """(dq, dx) of q [B, R, C] and x [B, M, C]; the weights of a chunk serve both."""
    (B, R, C), M = q.shape, x.shape[1]
    tile = plan.weights_backward
    stacked, x_head, sizes = stack_row_blocks(q, dz, tile.rows).unsqueeze(1), x.unsqueeze(1), (B, 1, 1, R, M, C, C)
    tma = tma and can_describe(x)
    if tma:
        # Queries are small: a copy makes shared or oddly strided ones readable through TMA.
        q, dz = (t if can_describe(t) else t.contiguous() for t in (q, dz))
    chunk = plan.chunk_dx if needs_dx else plan.chunk_dq
    shape = (B, 1, stacked.shape[2] // (1 if needs_dx else 2), min(chunk, plan.padded(M)))
    weights = torch.empty(shape, dtype=q.dtype, device=q.device)
    dx = torch.empty(B, M, C, dtype=x.dtype, device=x.device) if needs_dx else None
    dq = dq_sum if needs_dq else None
    for start in range(0, M, chunk):
        end = min(start + chunk, M)
        span = Span(0, R, start, end)
        key_tiles = span.tiled(tile.columns)[3]
        launch(
            _wide_weights_bwd_kernel, ceil_div(R, tile.rows) * key_tiles * B,
            tile_argument(stacked, 2 * tile.rows, tile.inner, tma), tile_argument(x_head, tile.columns, tile.inner, tma),
            weights, *statistics, *dropout_arguments(dropout_p, dropout_seed, key_offset), scale, R, M, C, start, key_tiles,
            head_strides(stacked), head_strides(x_head), head_strides(weights),
            BLOCK_Q=tile.rows, BLOCK_KV=tile.columns, BLOCK_C=tile.inner, TMA=tma, STORE_P=needs_dx,
            HAS_DRHO=statistics[2] is not None, DROPOUT=dropout_p > 0.0, **product_options(tile),
        )  # fmt: skip
        if needs_dq:
            splits = plan.splits(key_tiles)
            part = torch.empty(B, splits, R, C, dtype=torch.float32, device=q.device)
            launch_values(
                weights, x_head, NO_STATISTICS, part.unsqueeze(1), None, None, None, NO_MASK, Hides(), 0.0, sizes, span,
                tile.columns, splits, plan.values, tma, tma,
            )  # fmt: skip
            earlier, dq = dq, dq_sum
            if dq is None:
                dq = torch.empty(B, R, C, dtype=q.dtype if end == M else torch.float32, device=q.device)
            sum_splits(part, dq, earlier)
        if dx is not None:
            _launch_dx(weights, q, dz, dx, visibility, start, end, plan, tma)
    return dq, dx


def _launch_dx(
    weights: Tensor, q: Tensor, dz: Tensor, dx: Tensor, visibility: Visibility, start: int, end: int, plan: WidePlan, tma: bool
) -> None:
    B, M, C = dx.shape
    tile, q, dz = plan.dx, q.unsqueeze(1), dz.unsqueeze(1)
    launch(
        _wide_dx_kernel, ceil_div(C, tile.columns) * ceil_div(end - start, tile.rows) * B,
        tile_argument(weights, tile.inner, tile.rows, tma), tile_argument(q, tile.inner, tile.columns, tma),
        tile_argument(dz, tile.inner, tile.columns, tma), dx, *visibility, q.shape[2], weights.shape[2] // 2, M, C, start, end,
        head_strides(weights), head_strides(q), head_strides(dz), BLOCK_KV=tile.rows, BLOCK_COL=tile.columns,
        BLOCK_K=tile.inner, TMA=tma, MASKED=visibility[0] is not None, HAS_LENGTHS=visibility[1] is not None,
        **product_options(tile),
    )  # fmt: skip
