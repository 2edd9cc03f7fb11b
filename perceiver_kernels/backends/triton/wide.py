"""Launches of the wide-channel kernels: chunk by chunk, weights to a workspace, then products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from perceiver_kernels.backends.triton.combine import merge_states, sum_splits
from perceiver_kernels.backends.triton.describe import (
    Statistics,
    Visibility,
    can_describe,
    ceil_div,
    dropout_arguments,
    positive_scale,
    stack_row_blocks,
    tile_argument,
)
from perceiver_kernels.backends.triton.launch import launch
from perceiver_kernels.backends.triton.primitives import LOG2_E
from perceiver_kernels.backends.triton.wide_kernels import (
    _wide_dx_kernel,
    _wide_values_kernel,
    _wide_weights_bwd_kernel,
    _wide_weights_fwd_kernel,
)
from perceiver_kernels.device import float32_precision
from perceiver_kernels.plan import WidePlan
from perceiver_kernels.tiles import ProductTile

State = tuple[Tensor, Tensor, Tensor]


def _product_options(tile: ProductTile) -> dict[str, Any]:
    return {"STAGES": tile.num_stages, "num_warps": tile.num_warps, "PRECISION": float32_precision()}


def _launch_values(
    weights: Tensor, x: Tensor, statistics: tuple[Any, ...], outputs: tuple[Any, Any, Any], R: int, start: int,
    key_tiles: int, key_tile: int, splits: int, tile: ProductTile, tma: bool, dropout_p: float,
) -> None:  # fmt: skip
    """``outputs`` = weights x over ``key_tiles`` tiles of ``key_tile`` keys, [B, splits, R, C]; no statistics: plain sums."""
    B, M, C = x.shape
    launch(
        _wide_values_kernel, ceil_div(C, tile.columns) * ceil_div(R, tile.rows) * splits * B,
        tile_argument(weights, tile.rows, tile.inner, tma), tile_argument(x, tile.inner, tile.columns, tma), *statistics,
        *outputs, 1.0 / (1.0 - dropout_p), R, M, C, splits, start, key_tiles, ceil_div(key_tiles, splits), weights.stride(0),
        weights.stride(1), x.stride(0), x.stride(1), BLOCK_Q=tile.rows, BLOCK_KV=key_tile, BLOCK_COL=tile.columns,
        BLOCK_K=tile.inner, TMA=tma, SOFTMAX=statistics[0] is not None, DROPOUT=dropout_p > 0.0, **_product_options(tile),
    )  # fmt: skip


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
    tile, rows = plan.weights, ceil_div(R, plan.weights.rows) * plan.weights.rows
    weights = torch.empty(B, rows, min(plan.chunk, plan.padded(M)), dtype=q.dtype, device=q.device)
    seed, threshold, _, _ = dropout_arguments(dropout_p, dropout_seed, key_offset)
    options: dict[str, Any] = {"dtype": torch.float32, "device": q.device}
    for start in range(0, M, plan.chunk):
        key_tiles = ceil_div(min(plan.chunk, M - start), tile.columns)
        maximum, total, rounded = (torch.empty(B, key_tiles, R, **options) for _ in range(3))
        kept = torch.empty_like(total) if dropout_p > 0.0 else None
        launch(
            _wide_weights_fwd_kernel, ceil_div(R, tile.rows) * key_tiles * B,
            tile_argument(q, tile.rows, tile.inner, tma), tile_argument(x, tile.columns, tile.inner, tma), weights, maximum,
            total, kept, rounded, *visibility, seed, threshold, key_offset, scale * LOG2_E, R, M, C, start,
            key_tiles, q.stride(0), q.stride(1), x.stride(0), x.stride(1), weights.stride(0), weights.stride(1),
            BLOCK_Q=tile.rows, BLOCK_KV=tile.columns, BLOCK_C=tile.inner, TMA=tma, MASKED=visibility[0] is not None,
            HAS_LENGTHS=visibility[1] is not None, DROPOUT=dropout_p > 0.0, **_product_options(tile),
        )  # fmt: skip
        splits = plan.splits(key_tiles)
        part = torch.empty(B, splits, R, C, **options)
        lse, rho = (torch.empty(B, splits, R, **options) for _ in range(2))
        _launch_values(
            weights, x, (maximum, total, kept, rounded), (part, lse, rho), R, start, key_tiles, tile.columns, splits,
            plan.values, tma, dropout_p,
        )  # fmt: skip
        last = start + plan.chunk >= M
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
    stacked = stack_row_blocks(q, dz, tile.rows)
    tma = tma and can_describe(x)
    if tma:
        # Queries are small: a copy makes shared or oddly strided ones readable through TMA.
        q, dz = (t if can_describe(t) else t.contiguous() for t in (q, dz))
    chunk = plan.chunk_dx if needs_dx else plan.chunk_dq
    shape = (B, stacked.shape[1] // (1 if needs_dx else 2), min(chunk, plan.padded(M)))
    weights = torch.empty(shape, dtype=q.dtype, device=q.device)
    dx = torch.empty(B, M, C, dtype=x.dtype, device=x.device) if needs_dx else None
    dq = dq_sum if needs_dq else None
    for start in range(0, M, chunk):
        end = min(start + chunk, M)
        key_tiles = ceil_div(end - start, tile.columns)
        launch(
            _wide_weights_bwd_kernel, ceil_div(R, tile.rows) * key_tiles * B,
            tile_argument(stacked, 2 * tile.rows, tile.inner, tma), tile_argument(x, tile.columns, tile.inner, tma), weights,
            *statistics, *dropout_arguments(dropout_p, dropout_seed, key_offset), scale, R, M, C, start, key_tiles,
            stacked.stride(0), stacked.stride(1), x.stride(0), x.stride(1), weights.stride(0), weights.stride(1),
            BLOCK_Q=tile.rows, BLOCK_KV=tile.columns, BLOCK_C=tile.inner, TMA=tma, STORE_P=needs_dx,
            HAS_DRHO=statistics[2] is not None, DROPOUT=dropout_p > 0.0, **_product_options(tile),
        )  # fmt: skip
        if needs_dq:
            splits = plan.splits(key_tiles)
            part = torch.empty(B, splits, R, C, dtype=torch.float32, device=q.device)
            _launch_values(
                weights, x, (None,) * 4, (part, None, None), R, start, key_tiles, tile.columns, splits, plan.values, tma, 0.0
            )
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
    tile = plan.dx
    launch(
        _wide_dx_kernel, ceil_div(C, tile.columns) * ceil_div(end - start, tile.rows) * B,
        tile_argument(weights, tile.inner, tile.rows, tma), tile_argument(q, tile.inner, tile.columns, tma),
        tile_argument(dz, tile.inner, tile.columns, tma), dx, *visibility, q.shape[1], weights.shape[1] // 2, M, C, start, end,
        weights.stride(0), weights.stride(1), q.stride(0), q.stride(1), dz.stride(0), dz.stride(1), BLOCK_KV=tile.rows,
        BLOCK_COL=tile.columns, BLOCK_K=tile.inner, TMA=tma, MASKED=visibility[0] is not None,
        HAS_LENGTHS=visibility[1] is not None, **_product_options(tile),
    )  # fmt: skip
