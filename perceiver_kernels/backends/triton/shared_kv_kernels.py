"""Shared-KV attention kernels: z = softmax(scale q x^T) x with keys and values one tensor, forward, dq and dx.

forward, dq: one program per (BLOCK_Q query rows, key split, batch entry); row blocks vary fastest, so that programs which run
together read the same keys through the L2. Splits write fp32 partials [B, S, R, C] that combine.py reduces in a fixed order.
dx: one program per (BLOCK_KV keys, batch entry), which walks over all query rows; no partials.

FLOPs: forward 4BRMC, dq 6BRMC, dx 8BRMC. Device memory: forward and dq read x once (B M C e) while row blocks share the L2, and
write partials, 4 B S R C; dx reads and writes x once. Accumulators are fp32, exponents base 2, everything is deterministic.
"""

from __future__ import annotations

import triton
import triton.language as tl

from perceiver_kernels.backends.triton.primitives import (
    LN_2,
    LOG2_E,
    accumulate,
    dot_transposed,
    dropout_factors,
    join_columns,
    load_rows,
    load_rows_tma,
    load_stacked_rows,
    load_tail,
    rescale,
    row_statistics,
    select_rows,
    shared_pieces,
    split_columns,
    split_rows,
    store_rows,
    store_rows_tma,
    tail_in_registers,
    visible_keys,
    zero_rows,
)

_LN_2 = tl.constexpr(LN_2)
_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit
def _load_rows(
    x, x_1, x_2, i_b, start, hi, stride_x_b, stride_x_m, C, PIECES: tl.constexpr, ROWS: tl.constexpr, TMA: tl.constexpr
):
    """Rows start..start+ROWS of x: with TMA (x, x_1, x_2) are descriptors of its column pieces, without x is a pointer."""
    if TMA:
        pieces = load_rows_tma((x, x_1, x_2), (i_b,), start, ROWS, PIECES)
    else:
        o_rows = start + tl.arange(0, ROWS)
        pieces = load_rows(x + i_b.to(tl.int64) * stride_x_b, stride_x_m, o_rows, o_rows < hi, C, PIECES)
    return pieces


@triton.jit
def _split_range(lengths, i_b, i_s, M, keys_per_split, HAS_LENGTHS: tl.constexpr):
    """Key range lo..hi of split i_s, cut at the batch entry's length."""
    lo = i_s * keys_per_split
    hi = tl.minimum(lo + keys_per_split, M)
    if HAS_LENGTHS:
        hi = tl.minimum(hi, tl.load(lengths + i_b))
    return lo, tl.maximum(hi, lo)


@triton.jit
def _softmax_step(
    acc, m_i, l_i, r_i, q, x, start, hi, key_mask, kept, scale_log2, i_b, M,
    BLOCK_KV: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys. After tile t, (acc, m, l) is the softmax state of the split's keys before tile t + 1."""
    s = dot_transposed(q, x, PRECISION)  # [BLOCK_Q, BLOCK_KV]
    o_keys = start + tl.arange(0, BLOCK_KV)
    if MASKED:
        s = tl.where(visible_keys(key_mask, i_b, o_keys, hi, M)[None, :], s, -float("inf"))
    elif start + BLOCK_KV > hi:
        s = tl.where((o_keys < hi)[None, :], s, -float("inf"))
    m_new = tl.maximum(m_i, tl.max(s, 1) * scale_log2)
    # A row that has seen no key yet has m = -inf; 0 in its place keeps exp2(-inf - m) at 0 instead of NaN. Without a mask
    # every tile holds a visible key.
    m_safe = tl.where(m_new == -float("inf"), 0.0, m_new) if MASKED else m_new
    p = tl.exp2(s * scale_log2 - m_safe[:, None])
    alpha = tl.exp2(m_i - m_safe)
    l_i = l_i * alpha + tl.sum(p, 1)
    if DROPOUT:
        p = p * kept
        r_i = r_i * alpha + tl.sum(p, 1)
    acc = accumulate(p.to(x[0].dtype), x, rescale(acc, alpha), PRECISION)
    return acc, m_new, l_i, r_i


@triton.jit
def _shared_kv_fwd_kernel(
    q, x, x_1, x_2, z, lse, rho, key_mask, lengths, seed, threshold, inverse_keep, key_offset, scale_log2, R, M, C, S,
    keys_per_split, stride_q_b, stride_q_r, stride_x_b, stride_x_m,
    PIECES: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
    MASKED: tl.constexpr, HAS_LENGTHS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row_blocks = tl.cdiv(R, BLOCK_Q)
    i_block = tl.program_id(0)
    i_s, i_b = (i_block // row_blocks) % S, i_block // (row_blocks * S)
    o_rows = (i_block % row_blocks) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    m_rows = o_rows < R
    b_q = load_rows(q + i_b.to(tl.int64) * stride_q_b, stride_q_r, o_rows, m_rows, C, PIECES)
    acc = zero_rows(BLOCK_Q, PIECES)
    m_i = tl.full([BLOCK_Q], -float("inf"), tl.float32)
    l_i = tl.zeros([BLOCK_Q], tl.float32)
    r_i = tl.zeros([BLOCK_Q], tl.float32)
    lo, hi = _split_range(lengths, i_b, i_s, M, keys_per_split, HAS_LENGTHS)
    for start in tl.range(lo, hi, BLOCK_KV, num_stages=STAGES):
        b_x = _load_rows(x, x_1, x_2, i_b, start, hi, stride_x_b, stride_x_m, C, PIECES, BLOCK_KV, TMA)
        o_keys = start + tl.arange(0, BLOCK_KV)
        # 1 or 0: the factor 1/(1-p) follows at the end, where it is not rounded.
        kept = dropout_factors(seed, threshold, 1.0, i_b, o_rows[:, None], key_offset + o_keys[None, :]) if DROPOUT else 1.0
        acc, m_i, l_i, r_i = _softmax_step(
            acc, m_i, l_i, r_i, b_q, b_x, start, hi, key_mask, kept, scale_log2, i_b, M, BLOCK_KV, MASKED, DROPOUT, PRECISION
        )
    inverse_l = 1.0 / tl.where(l_i == 0.0, 1.0, l_i)
    if DROPOUT:
        inverse_l *= inverse_keep
    o_part = ((i_b * S + i_s).to(tl.int64) * R) + o_rows
    store_rows(z, C, o_part, m_rows, C, acc, inverse_l, PIECES)
    tl.store(lse + o_part, (m_i + tl.log2(l_i)) * _LN_2, mask=m_rows)
    tl.store(rho + o_part, (r_i if DROPOUT else l_i) * inverse_l, mask=m_rows)


@triton.jit
def _shared_kv_bwd_dq_kernel(
    q, x, x_1, x_2, x_tail, dz, lse, delta, drho, dq, lengths, seed, threshold, inverse_keep, key_offset, scale, R, M, C, S,
    keys_per_split, stride_q_b, stride_q_r, stride_x_b, stride_x_m, stride_dz_b, stride_dz_r,
    PIECES: tl.constexpr, TAIL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, STAGES: tl.constexpr,
    TMA: tl.constexpr, MASKED: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_DRHO: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq = scale sum_j ds_j x_j, ds = p (d (dz x^T + drho) - delta).

    Invisible keys need no mask: their x is zero (masked tokens are packed so, rows past the end are read so), and p is made
    finite: held at or below 1 where tokens may be masked, 0 past the end otherwise.

    With TAIL the last piece of x is read from ``x_tail``, a pointer, one tile ahead, and takes one buffer of shared memory
    instead of one a stage; that of q and dz takes none. At 272 columns a third stage fits that way.
    """
    row_blocks = tl.cdiv(R, BLOCK_Q)
    i_block = tl.program_id(0)
    i_s, i_b = (i_block // row_blocks) % S, i_block // (row_blocks * S)
    i_row = (i_block % row_blocks) * BLOCK_Q
    o_rows = i_row + tl.arange(0, BLOCK_Q)
    m_rows = o_rows < R
    b_rows = load_stacked_rows(
        q + i_b.to(tl.int64) * stride_q_b, stride_q_r, dz + i_b.to(tl.int64) * stride_dz_b, stride_dz_r, i_row, R, C, BLOCK_Q,
        PIECES,
    )  # fmt: skip
    b_rows = tail_in_registers(b_rows, TAIL)
    b_lse, b_delta, b_drho = row_statistics(lse, delta, drho, i_b, o_rows, m_rows, R, HAS_DRHO)
    acc = zero_rows(BLOCK_Q, PIECES)
    lo, hi = _split_range(lengths, i_b, i_s, M, keys_per_split, HAS_LENGTHS)
    scale_log2 = scale * _LOG2_E
    SHARED: tl.constexpr = shared_pieces(PIECES, TAIL)
    if TAIL:
        p_tail = x_tail + i_b.to(tl.int64) * stride_x_b
        o_tile = tl.arange(0, BLOCK_KV)
        next_tail = load_tail(p_tail, stride_x_m, lo + o_tile, lo + o_tile < hi, C, PIECES)
    for start in tl.range(lo, hi, BLOCK_KV, num_stages=STAGES):
        b_x = _load_rows(x, x_1, x_2, i_b, start, hi, stride_x_b, stride_x_m, C, SHARED, BLOCK_KV, TMA)
        if TAIL:
            b_x = b_x + (next_tail,)
            o_next = start + BLOCK_KV + o_tile
            next_tail = load_tail(p_tail, stride_x_m, o_next, o_next < hi, C, PIECES)
        s, dp = split_rows(dot_transposed(b_rows, b_x, PRECISION), BLOCK_Q, BLOCK_KV)  # [BLOCK_Q, BLOCK_KV] each
        o_keys = start + tl.arange(0, BLOCK_KV)
        if MASKED:
            p = tl.exp2(tl.minimum(s * scale_log2 - b_lse[:, None], 0.0))
        else:
            p = tl.exp2(s * scale_log2 - b_lse[:, None])
            if start + BLOCK_KV > hi:
                p = tl.where((o_keys < hi)[None, :], p, 0.0)
        if DROPOUT:
            factors = dropout_factors(seed, threshold, inverse_keep, i_b, o_rows[:, None], key_offset + o_keys[None, :])
            dp = (dp + b_drho[:, None]) * factors
        ds = p * (dp - b_delta[:, None])
        acc = accumulate(ds.to(b_x[0].dtype), b_x, acc, PRECISION)
    o_part = ((i_b * S + i_s).to(tl.int64) * R) + o_rows
    store_rows(dq, C, o_part, m_rows, C, acc, tl.full([BLOCK_Q], 1.0, tl.float32) * scale, PIECES)


@triton.jit
def _shared_kv_bwd_dx_kernel(
    rows, rows_1, rows_2, x, x_1, x_2, dx, dx_1, dx_2, lse, delta, drho, key_mask, lengths, seed, threshold, inverse_keep,
    key_offset, scale, R, M, C, stride_rows_b, stride_rows_r, stride_x_b, stride_x_m,
    PIECES: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
    MASKED: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_DRHO: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tl.assume(R > 0)
    key_blocks = tl.cdiv(M, BLOCK_KV)
    i_b = tl.program_id(0) // key_blocks
    start = (tl.program_id(0) % key_blocks) * BLOCK_KV
    b_x = _load_rows(x, x_1, x_2, i_b, start, M, stride_x_b, stride_x_m, C, PIECES, BLOCK_KV, TMA)
    acc = zero_rows(BLOCK_KV, PIECES)
    for i_row in tl.range(0, R, BLOCK_Q, num_stages=STAGES):
        o_rows = i_row + tl.arange(0, BLOCK_Q)
        m_rows = o_rows < R
        b_rows = _load_rows(
            rows, rows_1, rows_2, i_b, 2 * i_row, 2 * (i_row + BLOCK_Q), stride_rows_b, stride_rows_r, C, PIECES, 2 * BLOCK_Q,
            TMA,
        )
        b_lse, b_delta, b_drho = row_statistics(lse, delta, drho, i_b, o_rows, m_rows, R, HAS_DRHO)
        s, dp = split_columns(dot_transposed(b_x, b_rows, PRECISION), BLOCK_KV, BLOCK_Q)  # [BLOCK_KV, BLOCK_Q] each
        p = tl.exp2(s * (scale * _LOG2_E) - b_lse[None, :])
        kept = p
        if DROPOUT:
            o_keys = start + tl.arange(0, BLOCK_KV)
            factors = dropout_factors(
                seed, threshold, inverse_keep, i_b, o_rows[None, :], key_offset + o_keys[:, None]
            )
            dp = (dp + b_drho[None, :]) * factors
            kept = p * factors
        ds = p * (dp - b_delta[None, :]) * scale
        weights = join_columns(ds, kept, BLOCK_KV, BLOCK_Q)  # [BLOCK_KV, 2 BLOCK_Q]
        acc = accumulate(weights.to(b_rows[0].dtype), b_rows, acc, PRECISION)
    o_keys = start + tl.arange(0, BLOCK_KV)
    _, hi = _split_range(lengths, i_b, 0, M, M, HAS_LENGTHS)
    visible = o_keys < hi
    if MASKED:
        visible = visible_keys(key_mask, i_b, o_keys, hi, M)
    # A row is one key: what an invisible one accumulated (possibly NaN) is replaced, and touches no other.
    acc = select_rows(acc, visible)
    if TMA:
        store_rows_tma((dx, dx_1, dx_2), i_b, start, acc, BLOCK_KV, PIECES)
    else:
        o_out = i_b.to(tl.int64) * M + o_keys
        store_rows(dx, C, o_out, o_keys < M, C, acc, tl.full([BLOCK_KV], 1.0, tl.float32), PIECES)
