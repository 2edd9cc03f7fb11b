"""attention for wide heads, chunk by chunk of the queries or the keys: weights to a workspace, then products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from perceiver_kernels.backends.triton.attention_call import Call, Saved
from perceiver_kernels.backends.triton.attention_steps import Hides
from perceiver_kernels.backends.triton.combine import head_products, merge_splits, sum_splits
from perceiver_kernels.backends.triton.describe import ceil_div, tile_argument
from perceiver_kernels.backends.triton.launch import launch
from perceiver_kernels.backends.triton.wide import (
    NO_STATISTICS,
    Span,
    head_strides,
    launch_values,
    launch_weights,
    product_options,
)
from perceiver_kernels.backends.triton.wide_attention_kernels import (
    _wide_attention_products_kernel,
    _wide_attention_weights_bwd_kernel,
)
from perceiver_kernels.layouts import can_describe, describable
from perceiver_kernels.plan import Slices
from perceiver_kernels.tiles import ProductTile


def _operands(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, and keys and values of all segments, as TMA reads them where it can."""
    whole = (call.query, *(parts[0] if len(parts) == 1 else torch.cat(parts, 2) for parts in (call.keys, call.values)))
    query, key, value = map(describable, whole) if call.plan.tma else whole
    return query, key, value


def _spans(call: Call, chunk: int) -> Iterator[Span]:
    Lq, Lk = call.sizes[3:5]
    if call.plan.wide.by_queries:
        yield from (Span(start, min(start + chunk, Lq), 0, Lk) for start in range(0, Lq, chunk))
    else:
        yield from (Span(0, Lq, start, min(start + chunk, Lk)) for start in range(0, Lk, chunk))


def _workspace(call: Call, like: Tensor, chunk: int, rows_per_tile: int, arrays: int) -> Tensor:
    """Uninitialized weights [B, H, arrays * queries in whole tiles, keys in whole tiles] of one chunk."""
    B, H, _, Lq = call.sizes[:4]
    wide = call.plan.wide
    rows, keys = (min(chunk, Lq), wide.keys) if wide.by_queries else (Lq, min(chunk, wide.keys))
    rows = ceil_div(rows, rows_per_tile) * rows_per_tile
    return torch.empty(B, H, arrays * rows, keys, dtype=like.dtype, device=like.device)


def _empty_float(*shape: int, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=device)


def _empty_rows(*shape: int, device: torch.device) -> Tensor:
    """fp32 rows that begin on 64 bytes, so that kernels read and write them in whole vectors."""
    *leading, width = shape
    return _empty_float(*leading, width + -width % 16, device=device)[..., :width]


def forward(call: Call, out: Tensor, lse: Tensor, statistics: Tensor) -> None:
    """``out`` [B, H, Lq, d_v], ``lse`` [B, H, Lq], and under an additive mask ``statistics`` [2, B, H, Lq]."""
    B, H, _, Lq, Lk, _, d_v = call.sizes
    wide, tma, device = call.plan.wide, call.plan.tma, out.device
    query, key, value = _operands(call)
    tma_scores = tma and can_describe(query) and can_describe(key)
    tma_values = tma and can_describe(value) and not (call.hides.key_mask or call.hides.lengths)
    weights = _workspace(call, query, wide.chunk, wide.weights.rows, 1)
    earlier: tuple[Tensor, Tensor] | None = None
    for span in _spans(call, wide.chunk):
        tile_statistics = launch_weights(
            query, key, weights, call.masks, call.hides, call.stride_mask, call.dropout, call.dropout_p, 0, call.scale,
            call.causal_shift, call.sizes, span, wide.weights, tma_scores,
        )  # fmt: skip
        rows, whole_rows = span.row_end - span.row_start, span.key_end - span.key_start == Lk
        part, lse_part = (t[:, :, span.row_start : span.row_end].unsqueeze(2) for t in (out, lse))
        splits = 1 if wide.whole_rows else wide.value_splits(B * H, rows, d_v, span.tiled(wide.weights.columns)[3])
        direct = splits == 1 and whole_rows
        if not direct:
            part, lse_part = (_empty_float(B, H, splits, rows, *width, device=device) for width in ((d_v,), ()))
        launch_values(
            weights, value, tile_statistics, part, lse_part, None, statistics, call.masks, call.hides, call.dropout_p,
            call.sizes, span, wide.weights.columns, splits, wide.values, tma, tma_values,
        )  # fmt: skip
        if direct:
            continue
        state = out[:, :, span.row_start : span.row_end], lse[:, :, span.row_start : span.row_end]
        if not whole_rows and span.key_end < Lk:
            state = _empty_float(B, H, Lq, d_v, device=device), _empty_float(B, H, Lq, device=device)
        merge_splits(part.flatten(0, 1), lse_part.flatten(0, 1), *state, earlier)
        earlier = None if whole_rows else state


def backward(call: Call, saved: Saved, dq: Tensor | None, dkv: tuple[Tensor, Tensor] | None) -> None:
    """``dq``, and ``dkv`` = (dk, dv) over the keys of all segments, where they are wanted."""
    wide, tile = call.plan.wide, call.plan.wide.weights_backward
    query, key, value = _operands(call)
    dout = describable(saved.dout) if call.plan.tma else saved.dout
    saved = saved._replace(dout=dout, delta=head_products(dout, saved.out, saved.dlse))
    weights = _workspace(call, query, wide.chunk_backward, tile.rows, 1 if dkv is None else 2)
    second = 0 if dkv is None else weights.shape[2] // 2
    sums = [] if dkv is None else [_key_sums(call, rows, out) for rows, out in zip((query, dout), dkv, strict=True)]
    dq_sum: Tensor | None = None
    for span in _spans(call, wide.chunk_backward):
        _launch_weights_backward(call, saved, query, key, value, weights, second, span)
        if dq is not None:
            dq_sum = _add_dq(call, weights, key, dq, dq_sum, span)
        for each, first_row in zip(sums, (0, second), strict=False):
            each.add(weights, first_row, span)
    for each in sums:
        each.finish()


def _launch_weights_backward(
    call: Call, saved: Saved, query: Tensor, key: Tensor, value: Tensor, weights: Tensor, second: int, span: Span
) -> None:
    B, H = call.sizes[:2]
    tile = call.plan.wide.weights_backward
    tma = call.plan.tma and all(map(can_describe, (query, key, value, saved.dout)))
    chunk = span.tiled(tile.columns)
    programs = ceil_div(span.row_end - span.row_start, tile.rows) * chunk[3] * H * B
    rows, keys = ((tensor, size) for tensor, size in (((query, saved.dout), tile.rows), ((key, value), tile.columns)))
    (q, do), (k, v) = ([tile_argument(t, size, tile.inner, tma) for t in tensors] for tensors, size in (rows, keys))
    launch(
        _wide_attention_weights_bwd_kernel, programs, q, k, do, v, weights, saved.lse, saved.statistics, saved.delta,
        *call.common, chunk, *map(head_strides, (query, key, saved.dout, value, weights)), call.stride_mask, second,
        BLOCK_Q=tile.rows, BLOCK_KV=tile.columns, BLOCK_C=tile.inner, TMA=tma, STORE_P=second > 0, HIDES=call.hides,
        DROPOUT=call.dropout_p > 0.0, **product_options(tile),
    )  # fmt: skip


def _add_dq(call: Call, weights: Tensor, key: Tensor, dq: Tensor, dq_sum: Tensor | None, span: Span) -> Tensor | None:
    """dq of a chunk of queries; of a chunk of keys, what it adds to the sum so far, whose last goes to ``dq``."""
    B, H, G, Lq, Lk, d_qk, _ = call.sizes
    wide, tma = call.plan.wide, call.plan.tma
    rows, whole_rows = span.row_end - span.row_start, span.key_end - span.key_start == Lk
    splits = wide.value_splits(B * H, rows, d_qk, span.tiled(wide.weights_backward.columns)[3])
    target = dq[:, :, span.row_start : span.row_end]
    direct = splits == 1 and whole_rows
    part = target.unsqueeze(2) if direct else _empty_float(B, H, splits, rows, d_qk, device=dq.device)
    launch_values(
        weights, key, NO_STATISTICS, part, None, None, None, call.masks, call.hides, 0.0, (B, H, G, Lq, Lk, d_qk, d_qk), span,
        wide.weights_backward.columns, splits, wide.values, tma,
        tma and can_describe(key) and not (call.hides.key_mask or call.hides.lengths),
    )  # fmt: skip
    if direct:
        return None
    if span.key_end < Lk:
        target = _empty_float(B, H, Lq, d_qk, device=dq.device)
    sum_splits(part.flatten(0, 1), target, dq_sum)
    return None if whole_rows else target


def _key_sums(call: Call, rows: Tensor, out: Tensor) -> ProductSums:
    B, H_kv, _, d = out.shape
    wide, G = call.plan.wide, call.sizes[2]
    return ProductSums(
        rows, out, call.sizes, call.masks, call.hides, wide.products,
        lambda rows, keys: wide.row_slices(B * H_kv, rows, keys, d, G), call.plan.tma,
    )  # fmt: skip


class ProductSums:
    """``out`` [B, H_kv, keys, d] = weights^T rows over the chunks of a backward: dk of ds and q, dv of the weights and dout.

    Chunks of rows add to fp32 sums, one for each slice; a chunk of keys is complete at once. dq = ds k is the same of ds^T:
    what the kernel calls keys are then queries, and rows are keys.
    """

    def __init__(
        self, rows: Tensor, out: Tensor, sizes: tuple[int, ...], masks: tuple[Any, ...], hides: Hides, tile: ProductTile,
        slices: Callable[[int, int], Slices], tma: bool,
    ) -> None:  # fmt: skip
        """``slices`` of numbers of rows and keys; sizes, masks and hides as the kernel takes them."""
        self.rows, self.out, self.sizes, self.masks, self.hides = rows, out, sizes, masks, hides
        self.tile, self.slices, self.tma = tile, slices, tma
        self.sums: Tensor | None = None
        self.rows_per_slice = 0

    def add(self, weights: Tensor, first_row: int, span: Span) -> None:
        """Add the products of one chunk, whose weights begin in row ``first_row`` of the workspace."""
        tile, tma = self.tile, self.tma
        B, H_kv, _, d = self.out.shape
        whole_keys = span.row_end - span.row_start == self.sizes[3]
        part, part_start, direct = self.sums, 0, False
        if part is None:
            keys = span.key_end - span.key_start
            slices = self.slices(span.row_end - span.row_start, keys)
            self.rows_per_slice, direct = slices.length, slices.total == 1 and whole_keys
            if direct:
                part = self.out.unsqueeze(2)
            else:
                part, part_start = _empty_rows(B, H_kv, slices.total, keys, d, device=self.out.device), span.key_start
        chunk = span.tiled(tile.rows)
        tma_rows = tma and can_describe(self.rows) and not self.hides.query_mask
        arguments: tuple[Any, ...] = (
            tile_argument(weights, tile.inner, tile.rows, tma), tile_argument(self.rows, tile.inner, tile.columns, tma_rows),
        )  # fmt: skip
        launch(
            _wide_attention_products_kernel, ceil_div(d, tile.columns) * chunk[3] * part.shape[2] * H_kv * B, *arguments, part,
            self.masks, self.sizes, chunk, (part.shape[2], self.rows_per_slice, part_start), first_row, d,
            head_strides(weights), head_strides(self.rows), tuple(part.stride()[:4]), BLOCK_KV=tile.rows,
            BLOCK_COL=tile.columns, BLOCK_K=tile.inner, TMA=tma, TMA_ROWS=tma_rows, HIDES=self.hides,
            ADD=self.sums is not None, **product_options(tile),
        )  # fmt: skip
        if not whole_keys:
            self.sums = part
        elif not direct:
            sum_splits(part.flatten(0, 1), self.out[:, :, span.key_start : span.key_end])

    def finish(self) -> None:
        """The sums of chunks of rows, reduced over the slices."""
        if self.sums is not None:
            sum_splits(self.sums.flatten(0, 1), self.out)
