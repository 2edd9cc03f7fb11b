"""Backward kernels of shared-KV attention for wide channels: ds and the weights of a chunk of keys, and dx.

dq = ds x is wide_kernels.py's values kernel. Tiles: weights BLOCK_Q x BLOCK_KV over BLOCK_C channels; dx BLOCK_KV x BLOCK_COL
over BLOCK_K rows. FLOPs: dq 6BRMC, dx 8BRMC as in the fused kernels. Device memory beyond theirs: the weights once written and
once read, 4 B R M e bytes for dq, 8 for dx, from the L2 while the workspace fits it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from perceiver_kernels.backends.triton.primitives import (
    LOG2_E,
    add_product,
    dropout_factors,
    row_statistics,
    split_rows,
    visible_keys,
)
from perceiver_kernels.backends.triton.wide_kernels import load_tile, product_of_rows, tile_position

_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit
def _visible(key_mask, lengths, i_b, o_keys, M, MASKED: tl.constexpr, HAS_LENGTHS: tl.constexpr):
    end = M
    if HAS_LENGTHS:
        end = tl.minimum(M, tl.load(lengths + i_b))
    visible = o_keys < end
    if MASKED:
        visible = visible_keys(key_mask, i_b, o_keys, end, M)
    return visible


@triton.jit
def _wide_weights_bwd_kernel(
    rows, x, weights, lse, delta, drho, seed, threshold, inverse_keep, key_offset, scale, R, M, C, key_start, key_tiles,
    stride_rows, stride_x, stride_w,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
    STORE_P: tl.constexpr, HAS_DRHO: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scale ds of one tile and, with STORE_P, the (dropped-out) weights R' rows below it, R' = R in whole row tiles.

    ``rows`` holds every BLOCK_Q query rows above the same rows of dz. Invisible keys need no mask: their x is zero in the
    values kernel, and their rows of dx are cleared there; p, held at or below 1, is finite.
    """
    row_tiles = tl.cdiv(R, BLOCK_Q)
    i_row, i_tile, lead = tile_position(row_tiles, key_tiles, 1)
    i_b = lead[0]
    row, key = i_row * BLOCK_Q, key_start + i_tile * BLOCK_KV
    o_rows, o_keys = row + tl.arange(0, BLOCK_Q), key + tl.arange(0, BLOCK_KV)
    m_stacked = 2 * row + tl.arange(0, 2 * BLOCK_Q) < 2 * row_tiles * BLOCK_Q
    stacked = product_of_rows(
        rows, x, lead, lead, 2 * row, key, m_stacked, o_keys < M, C, stride_rows, stride_x, 2 * BLOCK_Q, BLOCK_KV, BLOCK_C,
        STAGES, TMA, PRECISION,
    )  # fmt: skip
    s, dp = split_rows(stacked, BLOCK_Q, BLOCK_KV)
    b_lse, b_delta, b_drho = row_statistics(lse, delta, drho, i_b, o_rows, o_rows < R, R, HAS_DRHO)
    p = tl.exp2(tl.minimum(s * (scale * _LOG2_E) - b_lse[:, None], 0.0))
    kept = p
    if DROPOUT:
        factors = dropout_factors(seed, threshold, inverse_keep, i_b, o_rows[:, None], key_offset + o_keys[None, :])
        dp = (dp + b_drho[:, None]) * factors
        kept = p * factors
    ds = p * (dp - b_delta[:, None]) * scale
    # Rows past R are stored too (the workspace is rounded up to whole row tiles): their p is 0.
    o_w = i_b.to(tl.int64) * stride_w[0] + o_rows.to(tl.int64)[:, None] * stride_w[2]
    o_w += (i_tile * BLOCK_KV + tl.arange(0, BLOCK_KV))[None, :]
    tl.store(weights + o_w, ds.to(weights.dtype.element_ty))
    if STORE_P:
        tl.store(weights + o_w + (row_tiles * BLOCK_Q).to(tl.int64) * stride_w[2], kept.to(weights.dtype.element_ty))


@triton.jit
def _add_transposed_product(
    acc, weights, rows, lead, row_w, key_w, column, R, keys_w, C, stride_w, stride_rows,
    BLOCK_KV: tl.constexpr, BLOCK_COL: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + weights[row_w : row_w + R]^T rows for one tile of keys and columns."""
    for r in tl.range(0, R, BLOCK_K, num_stages=STAGES):
        m_rows = r + tl.arange(0, BLOCK_K) < R
        w = load_tile(weights, lead, row_w + r, key_w, m_rows, keys_w, stride_w, BLOCK_K, BLOCK_KV, TMA)
        b_rows = load_tile(rows, lead, r, column, m_rows, C, stride_rows, BLOCK_K, BLOCK_COL, TMA)
        acc = add_product(w.T, b_rows, acc, PRECISION)
    return acc


@triton.jit
def _wide_dx_kernel(
    weights, q, dz, dx, key_mask, lengths, R, R_padded, M, C, key_start, key_end,
    stride_w, stride_q, stride_dz,
    BLOCK_KV: tl.constexpr, BLOCK_COL: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
    MASKED: tl.constexpr, HAS_LENGTHS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx = (scale ds)^T q + p^T dz for BLOCK_KV keys and BLOCK_COL columns, over all query rows."""
    columns = tl.cdiv(C, BLOCK_COL)
    key_tiles = tl.cdiv(key_end - key_start, BLOCK_KV)
    i = tl.program_id(0)
    i_column, i_tile, i_b = i % columns, (i // columns) % key_tiles, i // (columns * key_tiles)
    lead = (i_b, i_b * 0)
    key_w, column, keys_w = i_tile * BLOCK_KV, i_column * BLOCK_COL, key_tiles * BLOCK_KV
    acc = tl.zeros([BLOCK_KV, BLOCK_COL], tl.float32)
    acc = _add_transposed_product(
        acc, weights, q, lead, 0, key_w, column, R, keys_w, C, stride_w, stride_q,
        BLOCK_KV, BLOCK_COL, BLOCK_K, STAGES, TMA, PRECISION,
    )  # fmt: skip
    acc = _add_transposed_product(
        acc, weights, dz, lead, R_padded, key_w, column, R, keys_w, C, stride_w, stride_dz,
        BLOCK_KV, BLOCK_COL, BLOCK_K, STAGES, TMA, PRECISION,
    )  # fmt: skip
    o_keys = key_start + key_w + tl.arange(0, BLOCK_KV)
    o_columns = column + tl.arange(0, BLOCK_COL)
    visible = _visible(key_mask, lengths, i_b, o_keys, M, MASKED, HAS_LENGTHS)
    acc = tl.where(visible[:, None], acc, 0.0)
    p = dx + (i_b.to(tl.int64) * M + o_keys)[:, None] * C + o_columns[None, :]
    tl.store(p, acc.to(dx.dtype.element_ty), mask=(o_keys < M)[:, None] & (o_columns < C)[None, :])
