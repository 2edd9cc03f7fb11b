"""Attention for wide heads, where an accumulator of all columns does not fit one program: weights, then products.

Keys or queries are taken in chunks. A *weights* kernel writes those of a chunk, [B, H, queries, keys], to a workspace whose
size the long side does not touch; a *values* kernel multiplies them with the chunk's values, a block of columns at a time. Both
are plain tiled products that read their operands tile by tile over the channels, so any width runs at full tile width and
nothing is computed twice. Shared-KV attention is the case of one head whose keys are its values.

Tiles: weights BLOCK_Q x BLOCK_KV over BLOCK_C channels; values BLOCK_Q x BLOCK_COL over BLOCK_K keys. FLOPs: forward
2 BH Lq Lk (d_qk + d_v). Device memory beyond the operands': the weights once written and once read, 4 BH Lq Lk bytes in 16
bits, from the L2 while the workspace fits it.

Arguments in tuples: masks, dropout and sizes as in attention_kernels.py; chunk = (first query, end of the queries, first key,
key tiles); rows of the workspace and of all that is indexed with it count from the first query; ``lead`` is (batch entry,
head), stride that of batch, head and row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from perceiver_kernels.backends.triton.attention_steps import (
    attn_mask_kind,
    has_lengths,
    hide,
    keys_to_read,
    row_windows,
    store_row_state,
    window_bounds,
)
from perceiver_kernels.backends.triton.primitives import LOG2_E, add_product, dropout_factors

_LOG2_E = tl.constexpr(LOG2_E)
# Tiles whose maximum lies further below the row's, in powers of two, count as if it lay there: a million such weights add less
# than 2^-28 to a sum of at least 1/2, and a sum on its way through them grows by no more than 2^48.
_NEGLIGIBLE = tl.constexpr(48.0)


@triton.jit
def load_tile(
    source, lead, row, column, m_rows, column_end, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr
):  # fmt: skip
    """Tile [ROWS, COLUMNS] at (row, column) of a descriptor (TMA), zero past the ends, or of a pointer, zero where masked."""
    if TMA:
        tile = source.load(lead + (row, column)).reshape(ROWS, COLUMNS)
    else:
        o_rows, o_columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        base = source + lead[0].to(tl.int64) * stride[0] + lead[1].to(tl.int64) * stride[1]
        p = base + o_rows.to(tl.int64)[:, None] * stride[2] + o_columns[None, :]
        tile = tl.load(p, mask=m_rows[:, None] & (o_columns < column_end)[None, :], other=0.0)
    return tile


@triton.jit
def product_of_rows(
    a, b, lead_a, lead_b, row_a, row_b, m_a, m_b, d, stride_a, stride_b,
    ROWS_A: tl.constexpr, ROWS_B: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """a b^T over d channels: [ROWS_A, ROWS_B] in fp32."""
    s = tl.zeros([ROWS_A, ROWS_B], tl.float32)
    for c in tl.range(0, d, BLOCK_C, num_stages=STAGES):
        tile_a = load_tile(a, lead_a, row_a, c, m_a, d, stride_a, ROWS_A, BLOCK_C, TMA)
        tile_b = load_tile(b, lead_b, row_b, c, m_b, d, stride_b, ROWS_B, BLOCK_C, TMA)
        s = add_product(tile_a, tile_b.T, s, PRECISION)
    return s


@triton.jit
def tile_position(row_tiles, key_tiles, H):
    """(row tile, key tile, (batch entry, head)) of this program; row tiles vary fastest, so that neighbours share keys."""
    i = tl.program_id(0)
    i_entry = i // (row_tiles * key_tiles)
    return i % row_tiles, (i // row_tiles) % key_tiles, (i_entry // H, i_entry % H)


@triton.jit
def _wide_weights_fwd_kernel(
    q, k, weights, maximum, total, kept, rounded, masks, dropout, key_offset, factor, causal_shift, sizes, chunk,
    stride_q, stride_k, stride_w, stride_mask,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
    HIDES: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Weights of one tile relative to its own row maximum, rounded up to a whole power of two, and their row sums.

    Statistics are [B, H, key tiles, queries]: maximum, total before dropout, and the sum of the weights that dropout kept,
    before and after rounding. A power of two rescales a tile's sums exactly in the values kernel. ``factor`` is scale log2(e);
    under an additive mask it is the scale, and the maximum is that of the scores as they are: rows of finfo.min have no
    finite power of two.
    """
    _, H, G, Lq, Lk, d, _ = sizes
    row_start, row_end, key_start, key_tiles = chunk
    i_row, i_tile, lead = tile_position(tl.cdiv(row_end - row_start, BLOCK_Q), key_tiles, H)
    i_b, i_h = lead
    row, key = row_start + i_row * BLOCK_Q, key_start + i_tile * BLOCK_KV
    o_rows, o_keys = row + tl.arange(0, BLOCK_Q), key + tl.arange(0, BLOCK_KV)
    m_rows = o_rows < row_end
    window = row_windows(masks, i_b, o_rows, m_rows, Lq, Lk, causal_shift, HIDES)
    some_lo, some_hi, all_lo, all_hi = window_bounds(window, m_rows, Lk, HIDES)
    m_keys = keys_to_read(masks, i_b, o_keys, Lk, some_hi, Lk, HIDES)
    # A tile that no row sees is hidden below whatever its product is: it gets none.
    d = tl.where((key < some_hi) & (key + BLOCK_KV > some_lo), d, 0)
    s = product_of_rows(
        q, k, lead, (i_b, i_h // G), row, key, m_rows, m_keys, d, stride_q, stride_k, BLOCK_Q, BLOCK_KV, BLOCK_C, STAGES, TMA,
        PRECISION,
    )  # fmt: skip
    s = hide(
        s, masks, stride_mask, i_b, i_h, o_rows[:, None], o_keys[None, :], window[0][:, None], window[1][:, None],
        m_rows[:, None], m_keys[None, :], (key, Lk, all_lo, all_hi), factor, BLOCK_KV, HIDES,
    )  # fmt: skip
    largest = tl.max(s, 1)
    safe = tl.where(largest == -float("inf"), 0.0, largest)
    if attn_mask_kind(HIDES) == "additive":
        m = largest
        p = tl.exp2((s - safe[:, None]) * _LOG2_E)
    else:
        m = tl.ceil(largest * factor)
        # p is computed twice, for its sum and for its store, each in the layout that suits it. Explicit fused operations
        # round alike in both; left to the compiler, weights and sums of scores near 1,000 differed by 3e-5.
        offset = tl.fma(safe, factor, -tl.where(largest == -float("inf"), 0.0, m))
        p = tl.exp2(tl.fma(s - safe[:, None], factor, offset[:, None]))
    l = tl.sum(p, 1)
    if DROPOUT:
        rows = (i_h * Lq + o_rows)[:, None]
        p = p * dropout_factors(dropout[0], dropout[1], 1.0, i_b, rows, key_offset + o_keys[None, :])
    w = p.to(weights.dtype.element_ty)
    o_local = o_rows - row_start
    o_statistics = ((i_b * H + i_h) * key_tiles + i_tile).to(tl.int64) * (row_end - row_start) + o_local
    tl.store(maximum + o_statistics, m, mask=m_rows)
    tl.store(total + o_statistics, l, mask=m_rows)
    tl.store(rounded + o_statistics, tl.sum(w.to(tl.float32), 1), mask=m_rows)
    if DROPOUT:
        tl.store(kept + o_statistics, tl.sum(p, 1), mask=m_rows)
    o_w = i_b.to(tl.int64) * stride_w[0] + i_h.to(tl.int64) * stride_w[1] + o_local.to(tl.int64)[:, None] * stride_w[2]
    tl.store(weights + o_w + (i_tile * BLOCK_KV + tl.arange(0, BLOCK_KV))[None, :], w, mask=m_rows[:, None])


@triton.constexpr_function
def _octaves(hides):
    """Powers of two in a unit of the tiles' maxima, which are scores under an additive mask."""
    return LOG2_E if hides[5] == "additive" else 1.0


@triton.jit
def _split_maximum(maximum, o, tile, tile_end, R, m_rows, BLOCK_Q: tl.constexpr):
    """(m, m or 0): the maximum of rows over key tiles tile..tile_end."""
    m = tl.full([BLOCK_Q], -float("inf"), tl.float32)
    for t in range(tile, tile_end):
        m = tl.maximum(m, tl.load(maximum + o + t * R, mask=m_rows, other=-float("inf")))
    return m, tl.where(m == -float("inf"), 0.0, m)


@triton.jit
def _split_sums(
    maximum, total, kept, rounded, safe, o, tile, tile_end, R, m_rows, OCTAVES: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """(l, r, g): sums of the weights over key tiles tile..tile_end, relative to the maximum: all, those kept, rounded."""
    l = tl.zeros([BLOCK_Q], tl.float32)
    r = tl.zeros([BLOCK_Q], tl.float32)
    g = tl.zeros([BLOCK_Q], tl.float32)
    for t in range(tile, tile_end):
        factor = tl.exp2((tl.load(maximum + o + t * R, mask=m_rows, other=-float("inf")) - safe) * OCTAVES)
        l += factor * tl.load(total + o + t * R, mask=m_rows, other=0.0)
        g += factor * tl.load(rounded + o + t * R, mask=m_rows, other=0.0)
        if DROPOUT:
            r += factor * tl.load(kept + o + t * R, mask=m_rows, other=0.0)
    return l, r if DROPOUT else l, g


@triton.jit
def _wide_values_kernel(
    weights, v, maximum, total, kept, rounded, part, lse, rho, row_statistics, masks, inverse_keep, sizes, chunk, parts,
    stride_w, stride_v, stride_part, stride_lse,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, BLOCK_COL: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    TMA: tl.constexpr, TMA_V: tl.constexpr, HIDES: tl.constexpr, SOFTMAX: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """weights v for BLOCK_COL columns over one split of the chunk's key tiles; parts = (S, key tiles of a split).

    With SOFTMAX the weights of tile t are relative to 2^maximum[t]. The sum so far is brought to each tile's maximum in turn,
    not the weights to a common one: weights that pass through registers are the register operand of a wgmma, which Triton 3.6
    lets the next tile's loads overwrite while it is read. The split's softmax state goes to (part, lse, rho). Rounded weights
    are divided by their own sum: a row that sees one token is that token, and errors weigh with v_j - out. Without SOFTMAX
    (dq) they are summed as they are. Under an additive mask maxima are scores, and ``row_statistics`` is written.
    """
    OCTAVES: tl.constexpr = _octaves(HIDES)
    B, H, G, Lq, Lk, _, d_v = sizes
    row_start, row_end, key_start, key_tiles = chunk
    S, tiles_per_split = parts
    R = row_end - row_start
    columns, row_tiles = tl.cdiv(d_v, BLOCK_COL), tl.cdiv(R, BLOCK_Q)
    i = tl.program_id(0)
    i_column, i_row = i % columns, (i // columns) % row_tiles
    i_s, i_entry = (i // (columns * row_tiles)) % S, i // (columns * row_tiles * S)
    i_b, i_h = i_entry // H, i_entry % H
    o_rows = i_row * BLOCK_Q + tl.arange(0, BLOCK_Q)
    m_rows = o_rows < R
    tile = i_s * tiles_per_split
    tile_end = tl.minimum(tile + tiles_per_split, key_tiles)
    o_statistics = (i_entry * key_tiles).to(tl.int64) * R + o_rows
    visible_end = Lk
    if has_lengths(HIDES):
        visible_end = tl.load(masks[1] + i_b)
    acc = tl.zeros([BLOCK_Q, BLOCK_COL], tl.float32)
    if SOFTMAX:
        m, safe = _split_maximum(maximum, o_statistics, tile, tile_end, R, m_rows, BLOCK_Q)
        reference = safe
    for k in tl.range(tile * BLOCK_KV, tile_end * BLOCK_KV, BLOCK_K, num_stages=STAGES):
        w = load_tile(weights, (i_b, i_h), i_row * BLOCK_Q, k, m_rows, tile_end * BLOCK_KV, stride_w, BLOCK_Q, BLOCK_K, TMA)
        m_keys = keys_to_read(masks, i_b, key_start + k + tl.arange(0, BLOCK_K), Lk, visible_end, Lk, HIDES)
        b_v = load_tile(
            v, (i_b, i_h // G), key_start + k, i_column * BLOCK_COL, m_keys, d_v, stride_v, BLOCK_K, BLOCK_COL, TMA_V
        )
        if SOFTMAX:  # noqa: SIM102 (decided by the compiler, the other one by the program)
            if k % BLOCK_KV == 0:
                b_m = tl.load(maximum + o_statistics + (k // BLOCK_KV) * R, mask=m_rows, other=-float("inf"))
                b_m = tl.maximum(b_m, safe - _NEGLIGIBLE / OCTAVES)
                acc = acc * tl.exp2((reference - b_m) * OCTAVES)[:, None]
                reference = b_m
        acc = add_product(w, b_v, acc, PRECISION)
    o_columns = i_column * BLOCK_COL + tl.arange(0, BLOCK_COL)
    if SOFTMAX:
        # After the loop, which so has fewer registers to keep.
        l, r, g = _split_sums(
            maximum, total, kept, rounded, safe, o_statistics, tile, tile_end, R, m_rows, OCTAVES, DROPOUT, BLOCK_Q
        )
        b_rho = r / tl.where(l == 0.0, 1.0, l) * inverse_keep
        acc = acc * (tl.exp2((reference - safe) * OCTAVES) * b_rho / tl.where(g == 0.0, 1.0, g))[:, None]
        if i_column == 0:
            o_lse = i_entry.to(tl.int64) * stride_lse[0] + i_s.to(tl.int64) * stride_lse[1] + o_rows
            store_row_state(
                lse, row_statistics, o_lse, i_entry.to(tl.int64) * Lq + row_start + o_rows, m, l, m_rows,
                tl.cast(B * H, tl.int64) * Lq, HIDES,
            )  # fmt: skip
            if rho is not None:
                tl.store(rho + o_lse, b_rho, mask=m_rows)
    o_part = i_b.to(tl.int64) * stride_part[0] + i_h.to(tl.int64) * stride_part[1] + i_s.to(tl.int64) * stride_part[2]
    p = part + o_part + o_rows.to(tl.int64)[:, None] * stride_part[3] + o_columns[None, :]
    tl.store(p, acc.to(part.dtype.element_ty), mask=m_rows[:, None] & (o_columns < d_v)[None, :])
