"""Launches that the wide kernels of shared-KV attention and of attention have in common; tensors are [B, H, L, d]."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from perceiver_kernels.backends.triton.attention_steps import Hides
from perceiver_kernels.backends.triton.describe import ceil_div, tile_argument
from perceiver_kernels.backends.triton.launch import launch
from perceiver_kernels.backends.triton.primitives import LOG2_E
from perceiver_kernels.backends.triton.wide_kernels import _wide_values_kernel, _wide_weights_fwd_kernel
from perceiver_kernels.device import float32_precision
from perceiver_kernels.tiles import ProductTile

NO_MASK: tuple[None, ...] = (None,) * 6


class Span(NamedTuple):
    """Queries row_start..row_end by keys key_start..key_end, whose weights the workspace holds at a time."""

    row_start: int
    row_end: int
    key_start: int
    key_end: int

    def tiled(self, keys_per_tile: int) -> tuple[int, int, int, int]:
        """The span as kernels take it: its last entry is a number of tiles."""
        return (*self[:3], ceil_div(self.key_end - self.key_start, keys_per_tile))


def product_options(tile: ProductTile) -> dict[str, Any]:
    """Options of every product kernel."""
    return {"STAGES": tile.num_stages, "num_warps": tile.num_warps, "PRECISION": float32_precision()}


def head_strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides of batch, head and row."""
    return tuple(tensor.stride()[:3])


class TileStatistics(NamedTuple):
    """fp32 [B, H, key tiles, queries]: what the values kernel needs to know of each tile of weights; kept with dropout only."""

    maximum: Tensor
    total: Tensor
    kept: Tensor | None
    rounded: Tensor


NO_STATISTICS = (None,) * 4


def launch_weights(
    q: Tensor, k: Tensor, weights: Tensor, masks: tuple[Any, ...], hides: Hides, stride_mask: tuple[int, ...],
    dropout: tuple[Any, ...], dropout_p: float, key_offset: int, scale: float, causal_shift: int, sizes: tuple[int, ...],
    span: Span, tile: ProductTile, tma: bool,
) -> TileStatistics:  # fmt: skip
    """The weights of a span, relative to each tile's own maximum."""
    B, H = sizes[:2]
    chunk = span.tiled(tile.columns)
    rows, key_tiles = span.row_end - span.row_start, chunk[3]
    maximum, total, rounded = (torch.empty(B, H, key_tiles, rows, dtype=torch.float32, device=q.device) for _ in range(3))
    statistics = TileStatistics(maximum, total, torch.empty_like(total) if dropout_p > 0.0 else None, rounded)
    factor = scale if hides.attn_mask == "additive" else scale * LOG2_E
    launch(
        _wide_weights_fwd_kernel, ceil_div(rows, tile.rows) * key_tiles * H * B, tile_argument(q, tile.rows, tile.inner, tma),
        tile_argument(k, tile.columns, tile.inner, tma), weights, *statistics, masks, dropout, key_offset, factor,
        causal_shift, sizes, chunk, head_strides(q), head_strides(k), head_strides(weights), stride_mask,
        BLOCK_Q=tile.rows, BLOCK_KV=tile.columns, BLOCK_C=tile.inner, TMA=tma, HIDES=hides, DROPOUT=dropout_p > 0.0,
        **product_options(tile),
    )  # fmt: skip
    return statistics


def launch_values(
    weights: Tensor, v: Tensor, statistics: TileStatistics | tuple[None, ...], part: Tensor, lse: Tensor | None,
    rho: Tensor | None, row_statistics: Tensor | None, masks: tuple[Any, ...], hides: Hides, dropout_p: float,
    sizes: tuple[int, ...], span: Span, key_tile: int, splits: int, tile: ProductTile, tma: bool, tma_v: bool,
) -> None:  # fmt: skip
    """``part`` [B, H, S, queries, d_v] = weights v over S splits of ``key_tile`` keys; no statistics: plain sums.

    ``row_statistics`` [2, B, H, Lq] is written under an additive mask.
    """
    B, H = sizes[:2]
    chunk = span.tiled(key_tile)
    programs = ceil_div(sizes[6], tile.columns) * ceil_div(span.row_end - span.row_start, tile.rows) * splits * H * B
    launch(
        _wide_values_kernel, programs, tile_argument(weights, tile.rows, tile.inner, tma),
        tile_argument(v, tile.inner, tile.columns, tma_v), *statistics, part, lse, rho, row_statistics, masks,
        1.0 / (1.0 - dropout_p), sizes, chunk, (splits, ceil_div(chunk[3], splits)), head_strides(weights), head_strides(v),
        tuple(part.stride()[:4]), (0, 0) if lse is None else tuple(lse.stride()[1:3]), BLOCK_Q=tile.rows, BLOCK_KV=key_tile,
        BLOCK_COL=tile.columns, BLOCK_K=tile.inner, TMA=tma, TMA_V=tma_v, HIDES=hides, SOFTMAX=lse is not None,
        DROPOUT=dropout_p > 0.0, **product_options(tile),
    )  # fmt: skip
