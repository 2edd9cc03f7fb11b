"""Shared-KV attention for wide channels, where an accumulator of all C columns does not fit one program.

The keys are taken in chunks. A *weights* kernel writes those of a chunk, [B, R, chunk], to a workspace whose size M does not
touch; a *values* kernel multiplies them with the chunk's keys, a block of columns at a time. Both are plain tiled products that
read their operands tile by tile over C, so any C runs at full tile width and nothing is computed twice.

Tiles: weights BLOCK_Q x BLOCK_KV over BLOCK_C channels; values BLOCK_Q x BLOCK_COL over BLOCK_K keys; dx BLOCK_KV x BLOCK_COL
over BLOCK_K rows. FLOPs: forward 4BRMC, dq 6BRMC, dx 8BRMC as in the fused kernels. Device memory beyond theirs: the weights
once written and once read, 4 B R M e bytes forward and for dq, 8 for dx, from the L2 while the workspace fits it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from perceiver_kernels.backends.triton.primitives import LN_2, LOG2_E, dropout_factors, row_statistics, split_rows, visible_keys

_LN_2 = tl.constexpr(LN_2)
_LOG2_E = tl.constexpr(LOG2_E)
# Tiles whose maximum lies further below the row's, in powers of two, count as if it lay there: a million such weights add less
# than 2^-28 to a sum of at least 1/2, and a sum on its way through them grows by no more than 2^48.
_NEGLIGIBLE = tl.constexpr(48.0)


@triton.jit
def _load_tile(
    source, i_b, row, column, row_end, column_end, stride_b, stride_r,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Tile [ROWS, COLUMNS] at (row, column) of batch entry i_b of a descriptor (TMA) or pointer; zero past the ends."""
    if TMA:
        tile = source.load([i_b, row, column]).reshape(ROWS, COLUMNS)
    else:
        o_rows, o_columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        p = source + i_b.to(tl.int64) * stride_b + o_rows.to(tl.int64)[:, None] * stride_r + o_columns[None, :]
        tile = tl.load(p, mask=(o_rows < row_end)[:, None] & (o_columns < column_end)[None, :], other=0.0)
    return tile


@triton.jit
def _scores(
    rows, x, i_b, row, key, row_end, key_end, C, stride_rows_b, stride_rows_r, stride_x_b, stride_x_m,
    ROWS: tl.constexpr, BLOCK_KV: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """rows x^T over all channels: [ROWS, BLOCK_KV] in fp32."""
    s = tl.zeros([ROWS, BLOCK_KV], tl.float32)
    for c in tl.range(0, C, BLOCK_C, num_stages=STAGES):
        a = _load_tile(rows, i_b, row, c, row_end, C, stride_rows_b, stride_rows_r, ROWS, BLOCK_C, TMA)
        b = _load_tile(x, i_b, key, c, key_end, C, stride_x_b, stride_x_m, BLOCK_KV, BLOCK_C, TMA)
        s = tl.dot(a, b.T, s, input_precision=PRECISION)
    return s


@triton.jit
def _tile_position(key_tiles, row_tiles):
    """(row tile, key tile, batch entry) of this program; row tiles vary fastest, so that neighbours share keys."""
    i = tl.program_id(0)
    return i % row_tiles, (i // row_tiles) % key_tiles, i // (row_tiles * key_tiles)


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
def _wide_weights_fwd_kernel(
    q, x, weights, maximum, total, kept, rounded, key_mask, lengths, seed, threshold, key_offset, scale_log2, R, M, C,
    key_start, key_tiles, stride_q_b, stride_q_r, stride_x_b, stride_x_m, stride_w_b, stride_w_r,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
    MASKED: tl.constexpr, HAS_LENGTHS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Weights of one tile relative to its own row maximum, rounded up to a whole power of two, and their row sums.

    Statistics are [B, key tiles, R]: maximum, total before dropout, and the sum of the weights that dropout kept, before and
    after rounding. A power of two rescales a tile's sums exactly in the values kernel.
    """
    row_tiles = tl.cdiv(R, BLOCK_Q)
    i_row, i_tile, i_b = _tile_position(key_tiles, row_tiles)
    row, key = i_row * BLOCK_Q, key_start + i_tile * BLOCK_KV
    s = _scores(
        q, x, i_b, row, key, R, M, C, stride_q_b, stride_q_r, stride_x_b, stride_x_m, BLOCK_Q, BLOCK_KV, BLOCK_C, STAGES, TMA,
        PRECISION,
    )  # fmt: skip
    o_rows, o_keys = row + tl.arange(0, BLOCK_Q), key + tl.arange(0, BLOCK_KV)
    s = tl.where(_visible(key_mask, lengths, i_b, o_keys, M, MASKED, HAS_LENGTHS)[None, :], s, -float("inf"))
    largest = tl.max(s, 1)
    m = tl.ceil(largest * scale_log2)
    # p is computed twice, for its sum and for its store, each in the layout that suits it. Explicit fused operations round
    # alike in both; left to the compiler, weights and sums of scores near 1,000 differed by 3e-5.
    safe = tl.where(largest == -float("inf"), 0.0, largest)
    offset = tl.fma(safe, scale_log2, -tl.where(largest == -float("inf"), 0.0, m))
    p = tl.exp2(tl.fma(s - safe[:, None], scale_log2, offset[:, None]))
    l = tl.sum(p, 1)
    if DROPOUT:
        p = p * dropout_factors(seed, threshold, 1.0, i_b, o_rows[:, None], key_offset + o_keys[None, :])
    w = p.to(weights.dtype.element_ty)
    o_statistics = (i_b * key_tiles + i_tile).to(tl.int64) * R + o_rows
    m_rows = o_rows < R
    tl.store(maximum + o_statistics, m, mask=m_rows)
    tl.store(total + o_statistics, l, mask=m_rows)
    tl.store(rounded + o_statistics, tl.sum(w.to(tl.float32), 1), mask=m_rows)
    if DROPOUT:
        tl.store(kept + o_statistics, tl.sum(p, 1), mask=m_rows)
    o_w = i_b.to(tl.int64) * stride_w_b + o_rows.to(tl.int64)[:, None] * stride_w_r
    o_w += (i_tile * BLOCK_KV + tl.arange(0, BLOCK_KV))[None, :]
    tl.store(weights + o_w, w, mask=m_rows[:, None])


@triton.jit
def _wide_weights_bwd_kernel(
    rows, x, weights, lse, delta, drho, seed, threshold, inverse_keep, key_offset, scale, R, M, C, key_start, key_tiles,
    stride_rows_b, stride_rows_r, stride_x_b, stride_x_m, stride_w_b, stride_w_r,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
    STORE_P: tl.constexpr, HAS_DRHO: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scale ds of one tile and, with STORE_P, the (dropped-out) weights R' rows below it, R' = R in whole row tiles.

    ``rows`` holds every BLOCK_Q query rows above the same rows of dz. Invisible keys need no mask: their x is zero in the
    values kernel, and their rows of dx are cleared there; p, held at or below 1, is finite.
    """
    row_tiles = tl.cdiv(R, BLOCK_Q)
    i_row, i_tile, i_b = _tile_position(key_tiles, row_tiles)
    row, key = i_row * BLOCK_Q, key_start + i_tile * BLOCK_KV
    stacked = _scores(
        rows, x, i_b, 2 * row, key, 2 * row_tiles * BLOCK_Q, M, C, stride_rows_b, stride_rows_r, stride_x_b, stride_x_m,
        2 * BLOCK_Q, BLOCK_KV, BLOCK_C, STAGES, TMA, PRECISION,
    )  # fmt: skip
    s, dp = split_rows(stacked, BLOCK_Q, BLOCK_KV)
    o_rows, o_keys = row + tl.arange(0, BLOCK_Q), key + tl.arange(0, BLOCK_KV)
    b_lse, b_delta, b_drho = row_statistics(lse, delta, drho, i_b, o_rows, o_rows < R, R, HAS_DRHO)
    p = tl.exp2(tl.minimum(s * (scale * _LOG2_E) - b_lse[:, None], 0.0))
    kept = p
    if DROPOUT:
        factors = dropout_factors(seed, threshold, inverse_keep, i_b, o_rows[:, None], key_offset + o_keys[None, :])
        dp = (dp + b_drho[:, None]) * factors
        kept = p * factors
    ds = p * (dp - b_delta[:, None]) * scale
    # Rows past R are stored too (the workspace is rounded up to whole row tiles): their p is 0.
    o_w = i_b.to(tl.int64) * stride_w_b + o_rows.to(tl.int64)[:, None] * stride_w_r
    o_w += (i_tile * BLOCK_KV + tl.arange(0, BLOCK_KV))[None, :]
    tl.store(weights + o_w, ds.to(weights.dtype.element_ty))
    if STORE_P:
        tl.store(weights + o_w + (row_tiles * BLOCK_Q).to(tl.int64) * stride_w_r, kept.to(weights.dtype.element_ty))


@triton.jit
def _split_state(
    maximum, total, kept, rounded, o, tile, tile_end, R, m_rows, DROPOUT: tl.constexpr, BLOCK_Q: tl.constexpr
):  # fmt: skip
    """(m, m or 0, l, r, g) of rows over key tiles tile..tile_end: the maximum, and the three sums relative to it."""
    m = tl.full([BLOCK_Q], -float("inf"), tl.float32)
    for t in range(tile, tile_end):
        m = tl.maximum(m, tl.load(maximum + o + t * R, mask=m_rows, other=-float("inf")))
    safe = tl.where(m == -float("inf"), 0.0, m)
    l = tl.zeros([BLOCK_Q], tl.float32)
    r = tl.zeros([BLOCK_Q], tl.float32)
    g = tl.zeros([BLOCK_Q], tl.float32)
    for t in range(tile, tile_end):
        factor = tl.exp2(tl.load(maximum + o + t * R, mask=m_rows, other=-float("inf")) - safe)
        l += factor * tl.load(total + o + t * R, mask=m_rows, other=0.0)
        g += factor * tl.load(rounded + o + t * R, mask=m_rows, other=0.0)
        if DROPOUT:
            r += factor * tl.load(kept + o + t * R, mask=m_rows, other=0.0)
    return m, safe, l, r if DROPOUT else l, g


@triton.jit
def _wide_values_kernel(
    weights, x, maximum, total, kept, rounded, part, lse, rho, inverse_keep, R, M, C, S, key_start, key_tiles, tiles_per_split,
    stride_w_b, stride_w_r, stride_x_b, stride_x_m,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, BLOCK_COL: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    TMA: tl.constexpr, SOFTMAX: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """weights x for BLOCK_COL columns over one split of the chunk's key tiles.

    With SOFTMAX the weights of tile t are relative to 2^maximum[t]. The sum so far is brought to each tile's maximum in turn,
    not the weights to a common one: weights that pass through registers are the register operand of a wgmma, which Triton 3.6
    lets the next tile's loads overwrite while it is read. The split's softmax state goes to (part, lse, rho). Rounded weights
    are divided by their own sum: a row that sees one token is that token, and errors weigh with x_j - z. Without SOFTMAX (dq)
    they are summed as they are.
    """
    columns = tl.cdiv(C, BLOCK_COL)
    row_tiles = tl.cdiv(R, BLOCK_Q)
    i = tl.program_id(0)
    i_column, i_row = i % columns, (i // columns) % row_tiles
    i_s, i_b = (i // (columns * row_tiles)) % S, i // (columns * row_tiles * S)
    o_rows = i_row * BLOCK_Q + tl.arange(0, BLOCK_Q)
    m_rows = o_rows < R
    tile = i_s * tiles_per_split
    tile_end = tl.minimum(tile + tiles_per_split, key_tiles)
    o_statistics = (i_b * key_tiles).to(tl.int64) * R + o_rows
    if SOFTMAX:
        m, safe, l, r, g = _split_state(
            maximum, total, kept, rounded, o_statistics, tile, tile_end, R, m_rows, DROPOUT, BLOCK_Q
        )
    acc = tl.zeros([BLOCK_Q, BLOCK_COL], tl.float32)
    if SOFTMAX:
        reference = safe
    for k in tl.range(tile * BLOCK_KV, tile_end * BLOCK_KV, BLOCK_K, num_stages=STAGES):
        w = _load_tile(
            weights, i_b, i_row * BLOCK_Q, k, R, tile_end * BLOCK_KV, stride_w_b, stride_w_r, BLOCK_Q, BLOCK_K, TMA
        )
        b_x = _load_tile(
            x, i_b, key_start + k, i_column * BLOCK_COL, M, C, stride_x_b, stride_x_m, BLOCK_K, BLOCK_COL, TMA
        )
        if SOFTMAX:  # noqa: SIM102 (decided by the compiler, the other one by the program)
            if k % BLOCK_KV == 0:
                b_m = tl.load(maximum + o_statistics + (k // BLOCK_KV) * R, mask=m_rows, other=-float("inf"))
                b_m = tl.maximum(b_m, safe - _NEGLIGIBLE)
                acc = acc * tl.exp2(reference - b_m)[:, None]
                reference = b_m
        acc = tl.dot(w, b_x, acc, input_precision=PRECISION)
    o_columns = i_column * BLOCK_COL + tl.arange(0, BLOCK_COL)
    o_part = ((i_b * S + i_s).to(tl.int64) * R) + o_rows
    if SOFTMAX:
        b_rho = r / tl.where(l == 0.0, 1.0, l) * inverse_keep
        acc = acc * (tl.exp2(reference - safe) * b_rho / tl.where(g == 0.0, 1.0, g))[:, None]
        if i_column == 0:
            tl.store(lse + o_part, (m + tl.log2(l)) * _LN_2, mask=m_rows)
            tl.store(rho + o_part, b_rho, mask=m_rows)
    p = part + o_part[:, None] * C + o_columns[None, :]
    tl.store(p, acc.to(part.dtype.element_ty), mask=m_rows[:, None] & (o_columns < C)[None, :])


@triton.jit
def _add_transposed_product(
    acc, weights, rows, i_b, row_w, key_w, column, R, keys_w, C, stride_w_b, stride_w_r, stride_rows_b, stride_rows_r,
    BLOCK_KV: tl.constexpr, BLOCK_COL: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + weights[row_w : row_w + R]^T rows for one tile of keys and columns."""
    for r in tl.range(0, R, BLOCK_K, num_stages=STAGES):
        w = _load_tile(weights, i_b, row_w + r, key_w, row_w + R, keys_w, stride_w_b, stride_w_r, BLOCK_K, BLOCK_KV, TMA)
        b_rows = _load_tile(rows, i_b, r, column, R, C, stride_rows_b, stride_rows_r, BLOCK_K, BLOCK_COL, TMA)
        acc = tl.dot(w.T, b_rows, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _wide_dx_kernel(
    weights, q, dz, dx, key_mask, lengths, R, R_padded, M, C, key_start, key_end,
    stride_w_b, stride_w_r, stride_q_b, stride_q_r, stride_dz_b, stride_dz_r,
    BLOCK_KV: tl.constexpr, BLOCK_COL: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
    MASKED: tl.constexpr, HAS_LENGTHS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx = (scale ds)^T q + p^T dz for BLOCK_KV keys and BLOCK_COL columns, over all query rows."""
    columns = tl.cdiv(C, BLOCK_COL)
    key_tiles = tl.cdiv(key_end - key_start, BLOCK_KV)
    i = tl.program_id(0)
    i_column, i_tile, i_b = i % columns, (i // columns) % key_tiles, i // (columns * key_tiles)
    key_w, column, keys_w = i_tile * BLOCK_KV, i_column * BLOCK_COL, key_tiles * BLOCK_KV
    acc = tl.zeros([BLOCK_KV, BLOCK_COL], tl.float32)
    acc = _add_transposed_product(
        acc, weights, q, i_b, 0, key_w, column, R, keys_w, C, stride_w_b, stride_w_r, stride_q_b, stride_q_r,
        BLOCK_KV, BLOCK_COL, BLOCK_K, STAGES, TMA, PRECISION,
    )  # fmt: skip
    acc = _add_transposed_product(
        acc, weights, dz, i_b, R_padded, key_w, column, R, keys_w, C, stride_w_b, stride_w_r, stride_dz_b, stride_dz_r,
        BLOCK_KV, BLOCK_COL, BLOCK_K, STAGES, TMA, PRECISION,
    )  # fmt: skip
    o_keys = key_start + key_w + tl.arange(0, BLOCK_KV)
    o_columns = column + tl.arange(0, BLOCK_COL)
    visible = _visible(key_mask, lengths, i_b, o_keys, M, MASKED, HAS_LENGTHS)
    acc = tl.where(visible[:, None], acc, 0.0)
    p = dx + (i_b.to(tl.int64) * M + o_keys)[:, None] * C + o_columns[None, :]
    tl.store(p, acc.to(dx.dtype.element_ty), mask=(o_keys < M)[:, None] & (o_columns < C)[None, :])
