"""Backward kernels of attention for wide heads: ds and the weights of a chunk, and their products with rows.

dq = ds k is wide_kernels.py's values kernel, dk = ds^T q and dv = weights^T dout are the products kernel below. Tiles: weights
BLOCK_Q x BLOCK_KV over BLOCK_C channels; products BLOCK_KV x BLOCK_COL over BLOCK_K queries. FLOPs:
2 BH Lq Lk (3 d_qk + 2 d_v), nothing computed twice. Device memory beyond the operands': ds written once and read twice, the
weights written and read once, 10 BH Lq Lk bytes in 16 bits, from the L2 while the workspace fits it. Arguments in tuples are
those of wide_kernels.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from perceiver_kernels.backends.triton.attention_steps import (
    attention_weights,
    exponent_factor,
    has_query_mask,
    hide,
    hides_anything,
    keys_to_read,
    load_row_state,
    row_windows,
    window_bounds,
)
from perceiver_kernels.backends.triton.primitives import add_product, dropout_factors, loop_indices
from perceiver_kernels.backends.triton.wide_kernels import load_tile, product_of_rows, tile_position


@triton.jit
def _wide_attention_weights_bwd_kernel(
    q, k, dout, v, weights, lse, statistics, delta, masks, dropout, scale, causal_shift, sizes, chunk,
    stride_q, stride_k, stride_dout, stride_v, stride_w, stride_mask, second,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
    STORE_P: tl.constexpr, HIDES: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scale ds of one tile and, with STORE_P, the (dropped-out) weights ``second`` rows below it."""
    B, H, G, Lq, Lk, d_qk, d_v = sizes
    row_start, row_end, key_start, key_tiles = chunk
    i_row, i_tile, lead = tile_position(tl.cdiv(row_end - row_start, BLOCK_Q), key_tiles, H)
    i_b, i_h = lead
    row, key = row_start + i_row * BLOCK_Q, key_start + i_tile * BLOCK_KV
    o_rows, o_keys = row + tl.arange(0, BLOCK_Q), key + tl.arange(0, BLOCK_KV)
    m_rows = o_rows < row_end
    window = row_windows(masks, i_b, o_rows, m_rows, Lq, Lk, causal_shift, HIDES)
    some_lo, some_hi, all_lo, all_hi = window_bounds(window, m_rows, Lk, HIDES)
    m_keys = keys_to_read(masks, i_b, o_keys, Lk, some_hi, Lk, HIDES)
    # A tile that no row sees is hidden below whatever its products are: it gets none.
    seen = (key < some_hi) & (key + BLOCK_KV > some_lo)
    lead_k = (i_b, i_h // G)
    s = product_of_rows(
        q, k, lead, lead_k, row, key, m_rows, m_keys, tl.where(seen, d_qk, 0), stride_q, stride_k, BLOCK_Q, BLOCK_KV, BLOCK_C,
        STAGES, TMA, PRECISION,
    )  # fmt: skip
    dp = product_of_rows(
        dout, v, lead, lead_k, row, key, m_rows, m_keys, tl.where(seen, d_v, 0), stride_dout, stride_v, BLOCK_Q, BLOCK_KV,
        BLOCK_C, STAGES, TMA, PRECISION,
    )  # fmt: skip
    s = hide(
        s, masks, stride_mask, i_b, i_h, o_rows[:, None], o_keys[None, :], window[0][:, None], window[1][:, None],
        m_rows[:, None], m_keys[None, :], (key, Lk, all_lo, all_hi), scale, BLOCK_KV, HIDES,
    )  # fmt: skip
    o_lse = (i_b * H + i_h).to(tl.int64) * Lq + o_rows
    shift, log_l = load_row_state(lse, statistics, o_lse, m_rows, tl.cast(B * H, tl.int64) * Lq, HIDES)
    b_delta = tl.load(delta + o_lse, mask=m_rows, other=0.0)
    p = attention_weights(s, shift[:, None], log_l[:, None], exponent_factor(scale, HIDES), HIDES)
    kept = p
    if DROPOUT:
        factors = dropout_factors(*dropout, i_b, (i_h * Lq + o_rows)[:, None], o_keys[None, :])
        dp, kept = dp * factors, p * factors
    ds = p * (dp - b_delta[:, None]) * scale
    if hides_anything(HIDES):
        # What hidden tokens hold is in dp, and may be no number.
        ds = tl.where(s == -float("inf"), 0.0, ds)
    # Rows past the end are stored too (the workspace has whole row tiles): their p is 0.
    o_local = (o_rows - row_start).to(tl.int64)[:, None]
    o_w = i_b.to(tl.int64) * stride_w[0] + i_h.to(tl.int64) * stride_w[1] + o_local * stride_w[2]
    o_w += (i_tile * BLOCK_KV + tl.arange(0, BLOCK_KV))[None, :]
    tl.store(weights + o_w, ds.to(weights.dtype.element_ty))
    if STORE_P:
        tl.store(weights + o_w + tl.cast(second, tl.int64) * stride_w[2], kept.to(weights.dtype.element_ty))


@triton.jit
def _part_places(
    part, lead, key, column, part_start, Lk, d, stride, BLOCK_KV: tl.constexpr, BLOCK_COL: tl.constexpr
):  # fmt: skip
    """(addresses, which exist) of keys key.. and columns column.. of one part; ``lead`` is (batch entry, head, slice)."""
    o_keys, o_columns = key + tl.arange(0, BLOCK_KV), column + tl.arange(0, BLOCK_COL)
    o_part = lead[0].to(tl.int64) * stride[0] + lead[1].to(tl.int64) * stride[1] + lead[2].to(tl.int64) * stride[2]
    p = part + o_part + (o_keys - part_start).to(tl.int64)[:, None] * stride[3] + o_columns[None, :]
    return p, (o_keys < Lk)[:, None] & (o_columns < d)[None, :]


@triton.jit
def _wide_attention_products_kernel(
    weights, rows, part, masks, sizes, chunk, slices, first_row, d,
    stride_w, stride_rows, stride_part,
    BLOCK_KV: tl.constexpr, BLOCK_COL: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
    TMA_ROWS: tl.constexpr, HIDES: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """weights^T rows for BLOCK_KV keys and BLOCK_COL columns over one slice of the chunk's queries, of all heads of a key head.

    ``first_row`` is the workspace's row where these weights begin; slices = (S, queries of a slice, first key of ``part``).
    With ADD the slice's part of earlier chunks is added.
    """
    _, H, G, Lq, Lk, _, _ = sizes
    row_start, row_end, key_start, key_tiles = chunk
    S, rows_per_slice, part_start = slices
    H_kv = H // G
    columns = tl.cdiv(d, BLOCK_COL)
    i = tl.program_id(0)
    i_column, i_tile = i % columns, (i // columns) % key_tiles
    i_s, i_entry = (i // (columns * key_tiles)) % S, i // (columns * key_tiles * S)
    i_b, i_kv = i_entry // H_kv, i_entry % H_kv
    key_w, column = i_tile * BLOCK_KV, i_column * BLOCK_COL
    acc = tl.zeros([BLOCK_KV, BLOCK_COL], tl.float32)
    if ADD:
        p, m_part = _part_places(
            part, (i_b, i_kv, i_s), key_start + key_w, column, part_start, Lk, d, stride_part, BLOCK_KV, BLOCK_COL
        )
        acc = tl.load(p, mask=m_part, other=0.0)
    begin = i_s * rows_per_slice
    end = tl.minimum(begin + rows_per_slice, row_end - row_start)
    steps = tl.maximum(tl.cdiv(end - begin, BLOCK_K), 0)
    for t in tl.range(0, steps * G, num_stages=STAGES):
        i_g, i_step = loop_indices(t, steps)
        lead = (i_b, i_kv * G + i_g)
        r = begin + i_step * BLOCK_K
        o_rows = r + tl.arange(0, BLOCK_K)
        m_rows = o_rows < end
        m_read = m_rows
        if has_query_mask(HIDES):
            m_read = m_rows & (tl.load(masks[2] + i_b.to(tl.int64) * Lq + row_start + o_rows, mask=m_rows, other=0) != 0)
        w = load_tile(weights, lead, first_row + r, key_w, m_rows, key_tiles * BLOCK_KV, stride_w, BLOCK_K, BLOCK_KV, TMA)
        b_rows = load_tile(rows, lead, row_start + r, column, m_read, d, stride_rows, BLOCK_K, BLOCK_COL, TMA_ROWS)
        acc = add_product(w.T, b_rows, acc, PRECISION)
    # Formed again: kept through the loop, the addresses of odd widths spill a kilobyte a thread.
    p, m_part = _part_places(
        part, (i_b, i_kv, i_s), key_start + key_w, column, part_start, Lk, d, stride_part, BLOCK_KV, BLOCK_COL
    )
    tl.store(p, acc.to(part.dtype.element_ty), mask=m_part)
